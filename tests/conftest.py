"""What every test gets: a seed, exact float32 products, fresh dynamo state where it compiles, devices."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import pytest
import torch

from rconv_fast.geometry import ConvGeometry
from rconv_fast.testing import GEOMETRIES

if TYPE_CHECKING:
    from command_line import FakeInversion, Run


def pytest_report_header() -> str:
    from rconv_fast._build_info import build_info

    return "rconv_fast: " + ", ".join(f"{key}={value}" for key, value in build_info().items())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU and a build with CUDA")
    for item in items:
        if "cuda" in item.keywords and not has_cuda():
            item.add_marker(skip)


def has_cuda() -> bool:
    from rconv_fast.constraints.backends import _core

    return _core is not None and _core.has_cuda and torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _repeatable(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if request.node.get_closest_marker("compile"):
        torch._dynamo.reset()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Run the test on the CPU and, where there is one, on the GPU; RCONV_TEST_DEVICE picks one."""
    wanted = os.environ.get("RCONV_TEST_DEVICE")
    if wanted and wanted != request.param:
        pytest.skip(f"RCONV_TEST_DEVICE={wanted}")
    return torch.device(request.param)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=GEOMETRIES.values(), ids=GEOMETRIES.keys())
def geometry(request: pytest.FixtureRequest) -> ConvGeometry:
    """Run the test on every named geometry."""
    return request.param


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeInversion:
    """A stand-in for ``invert``."""
    import rconv_fast
    from command_line import FakeInversion

    fake = FakeInversion()
    monkeypatch.setattr(rconv_fast, "invert", fake, raising=False)
    return fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, in this process."""
    from command_line import Done
    from rconv_fast import cli

    logging.getLogger("rconv_fast").propagate = True

    def run(*arguments: object) -> Done:
        code = cli.run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run
