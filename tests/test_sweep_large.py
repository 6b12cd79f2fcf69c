"""A sweep of 200 digits x 3 models x 3 defences loses nothing when a worker is killed, and repeats nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sweep_models
from rconv_fast import sweep
from test_sweep import _paths

pytest.importorskip("pyarrow")
datasets = pytest.importorskip("sklearn.datasets")

N_IMAGES, MODELS, DEFENCES = 200, ("relu", "leaky_relu", "mlp"), ("none", "gaussian:1e-4", "quantise:float16")
CASES = N_IMAGES * len(MODELS) * len(DEFENCES)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """scikit-learn's digits as MNIST's binaries."""
    found = datasets.load_digits()
    pixels = (found.images[:N_IMAGES] * (255 / 16)).astype(np.uint8)
    folder = tmp_path / "digits"
    folder.mkdir()
    sizes = b"".join(n.to_bytes(4, "big") for n in pixels.shape)
    (folder / "t10k-images-idx3-ubyte").write_bytes((2051).to_bytes(4, "big") + sizes + pixels.tobytes())
    labels = found.target[:N_IMAGES].astype(np.uint8)
    head = (2049).to_bytes(4, "big") + N_IMAGES.to_bytes(4, "big")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("where", ["processes", "ray"])
def test_a_killed_worker_costs_what_it_was_at(where: str, digits: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "table.parquet", tmp_path / "log"
    models = {kind: partial(sweep_models.dies_in_the_middle, str(log), kind, CASES // 2) for kind in MODELS}
    settings: dict[str, Any] = {"input_shape": (1, 8, 8), "defences": DEFENCES, "jobs": 2}
    if where == "ray":
        ray = pytest.importorskip("ray")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": _paths()})
        settings["ray"] = "local"
    try:
        rows = sweep.read_rows(sweep.run_sweep(models, digits, out, **settings))
        begun = len(log.read_text().splitlines())
        again = sweep.read_rows(sweep.run_sweep(models, digits, out, **settings))
    finally:
        if where == "ray":
            ray.shutdown()
    assert (tmp_path / "log.killed").exists()
    assert len({row["key"] for row in rows}) == len(rows) == CASES
    assert not any(row["error"] for row in rows)
    assert begun <= CASES + 1  # what ran beside the killed one may have begun again
    assert str(again) == str(rows)  # NaN is what it was
    assert len(log.read_text().splitlines()) == begun  # a sweep that is done computes nothing
    undefended = [row for row in rows if row["defence"] == "none"]
    assert sum(row["verified"] for row in undefended) > 0.9 * len(undefended)
