"""A pytest plugin that gives a torch without CUDA two GPUs made of the host's memory.

``PYTHONPATH=tests/simulated_gpu python -m pytest -p simulated_gpu -m "cuda and not slow"`` (or ``make simulated-gpu``)
runs the tests that are marked ``cuda``: the package's own CUDA kernels, compiled for the host, and every torch
operator as on a GPU, refusing to mix devices (see device.cpp). With ``--move``, the public functions move what
tests give them to the GPU, and their answers back. Compiled graphs, streams, cupy and time are not simulated.

It compiles itself, and must be imported before torch: pytest does so for ``-p``.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

assert "torch" not in sys.modules, "simulated_gpu must be imported before torch"

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SANITIZE = os.environ.get("SANITIZE", "")  # "address,undefined"; then LD_PRELOAD needs their libraries
BUILD = ROOT / "build/simulated-gpu"
(BUILD / SANITIZE).mkdir(parents=True, exist_ok=True)
TORCH = Path(importlib.util.find_spec("torch").origin).parent
LAUNCH = re.compile(r"(\w+)<<<(.*?), (\w+), 0, stream_of\(lane\)>>>\(([^;]*)\);", re.DOTALL)


def compiled(target: Path, sources: list[Path], *options: str) -> Path:
    """Compile a shared library where a source is newer than it."""
    newest = max(path.stat().st_mtime for path in [*sources, *HERE.iterdir(), *(ROOT / "csrc").iterdir()])
    if not target.exists() or target.stat().st_mtime < newest:
        flags = ["-O1", "-g", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH}/include"]
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        command = ["c++", *flags, *map(str, sources), *options, "-o", str(target)]
        subprocess.run(command, check=True, env=environment)
    return target


def kernels_for_the_host() -> Path:
    """The package's compiled module with its CUDA kernels, to be run on the host."""
    cuda = (ROOT / "csrc/constraints_cuda.cu").read_text()
    text, found = LAUNCH.subn(r"on_host::launch(\2, \3, [&] { \1(\4); });", cuda)
    assert found == cuda.count("<<<"), "a launch that is not written as expected"
    source = BUILD / "constraints_cuda.cpp"
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
    sources = [ROOT / "csrc/bindings.cpp", ROOT / "csrc/constraints_cpu.cpp", source]
    includes = [f"-I{folder}" for folder in (HERE, ROOT / "csrc", sysconfig.get_paths()["include"])]
    sanitize = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=undefined"] if SANITIZE else []
    target = BUILD / SANITIZE / ("_core" + sysconfig.get_config_var("EXT_SUFFIX"))
    return compiled(target, sources, "-fopenmp", "-DRCONV_WITH_CUDA=1", *includes, *sanitize)


def device_library() -> ctypes.CDLL:
    """Load the devices, which torch finds when it is imported."""
    links = [f"-I{TORCH}/include/torch/csrc/api/include", f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib"]
    path = compiled(BUILD / "device.so", [HERE / "device.cpp"], *links, "-lc10", "-ltorch_cpu")
    return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


DEVICES = device_library()

import torch  # noqa: E402 (after its devices)
from torch import Tensor, nn  # noqa: E402


def launches() -> int:
    """Operators run on a simulated GPU so far: about as many kernels would have been launched."""
    return DEVICES.simulated_launches()


def waits() -> int:
    """How often the host would have waited for a GPU so far."""
    return DEVICES.simulated_waits()


class Stream:
    """The only stream of a device, on which everything has happened already."""

    cuda_stream = 0

    def __init__(self, device: Any = None) -> None:
        index = -1 if device is None else torch.device(device).index
        self.device_index = DEVICES.simulated_device(-1) if index in (None, -1) else index

    def synchronize(self) -> None:
        """Nothing is left to wait for."""


@contextlib.contextmanager
def device(wanted: Any) -> Iterator[None]:
    """``torch.cuda.device``."""
    index = wanted if isinstance(wanted, int) else torch.device(wanted).index
    before = DEVICES.simulated_device(-1 if index is None else index)
    try:
        yield
    finally:
        DEVICES.simulated_device(before)


def copy_of_parameter(self: Tensor, memo: dict[int, Any]) -> Tensor:
    """Tensor.__deepcopy__, which would ask for a storage on CUDA."""
    if not self.is_cuda or id(self) in memo:
        return TENSOR_DEEPCOPY(self, memo)
    new = self.detach().clone()
    memo[id(self)] = nn.Parameter(new, self.requires_grad) if isinstance(self, nn.Parameter) else new
    return memo[id(self)]


TENSOR_DEEPCOPY = Tensor.__deepcopy__
Tensor.__deepcopy__ = copy_of_parameter
Tensor.cuda = lambda self, index=None: self.to(torch.device("cuda", 0 if index is None else index))
MEMORY = 64 << 30
for name, stand_in in {
    "_lazy_init": lambda: None,
    "_sleep": lambda *_: None,
    "is_available": lambda: True,
    "device_count": lambda: 2,
    "current_device": lambda: DEVICES.simulated_device(-1),
    "get_device_name": lambda *_: "simulated",
    "device": device,
    "Stream": Stream,
    "current_stream": Stream,
    "stream": contextlib.nullcontext,
    "synchronize": lambda *_: None,
    "mem_get_info": lambda *_: (MEMORY, MEMORY),
    "memory_reserved": lambda *_: 0,
    "memory_allocated": lambda *_: 0,
    "set_sync_debug_mode": lambda mode: DEVICES.simulated_refuse_waits(mode == "error"),
}.items():
    setattr(torch.cuda, name, stand_in)

spec = importlib.util.spec_from_file_location("rconv_fast._core", kernels_for_the_host())
sys.modules["rconv_fast._core"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["rconv_fast._core"])

# --- pytest --------------------------------------------------------------------------------------------------

MOVED = ("invert", "recover_conv_input", "recover_linear_input", "separate_softmax_batch")


def moved(value: Any, device: str) -> Any:
    """Tensors and models, also inside of containers and results, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(moved(part, device) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run on the GPU for arguments on the host."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return moved(function(*moved(args, "cuda"), **moved(kwargs, "cuda")), "cpu")
        except Exception as error:
            vars(error).update(moved(vars(error), "cpu"))
            raise

    return run


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--move", action="store_true", help="run the public functions on the simulated GPU")


def pytest_configure(config: Any) -> None:
    if config.getoption("--move"):
        import rconv_fast

        for name in MOVED:
            setattr(rconv_fast, name, on_gpu(getattr(rconv_fast, name)))


def pytest_collection_modifyitems(items: list[Any]) -> None:
    import pytest

    for item in items:
        for marker in ("compile", "real_gpu"):
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason="cannot be simulated"))
