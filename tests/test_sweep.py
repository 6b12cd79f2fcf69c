"""Sweeps: one row a case, nothing twice, nothing lost when a process is killed."""

from __future__ import annotations

import gzip
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sweep_models
from rconv_fast import sweep
from rconv_fast.baselines import aono
from rconv_fast.data import Picture, find_pictures, fit
from rconv_fast.errors import ArgumentError
from rconv_fast.sweep.case import defence_of
from rconv_fast.sweep.jobs import LOST

pytest.importorskip("pyarrow")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8)).save(pictures / f"{i}.png")
    return pictures


def run(folder: Path, out: Path, factory: Any = sweep_models.network, **options: Any) -> list[dict[str, Any]]:
    log = str(out) + ".log"
    models = {"mlp": partial(factory, log)}
    settings = {"input_shape": (3, 4, 4), "attack": aono, **options}
    return sweep.read_rows(sweep.run_sweep(models, folder, out, **settings))


def begun(out: Path) -> int:
    return len(Path(str(out) + ".log").read_text().splitlines())


def test_every_combination_is_one_row(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.parquet"
    rows = run(folder, out, batch_sizes=(1, 2), defences=("none", "clip:0.5"), noise=(0.0, 1e-3))
    assert len(rows) == (4 + 2) * 2 * 2
    assert len({row["key"] for row in rows}) == len(rows)
    assert not any(row["error"] for row in rows)
    one = {(r["defence"], r["noise"]): r for r in rows if r["batch_size"] == 1 and r["first"] == 2}
    assert one["none", 0.0]["psnr"] > 150
    assert 20 < one["none", 1e-3]["psnr"] < 100
    assert all(math.isnan(row["psnr"]) for row in rows if row["batch_size"] == 2)  # Aono's quotient is a mixture
    assert not (tmp_path / "table.parquet.parts").exists()


def test_a_sweep_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.parquet"

    class Stop(Exception): ...

    def stop(event: Any) -> None:
        if event.iteration == 3:
            raise Stop

    with pytest.raises(Stop):
        run(folder, out, noise=(0.0, 1e-3), progress=stop)
    assert not out.exists()
    rows = run(folder, out, noise=(0.0, 1e-3))
    assert len(rows) == begun(out) == 8
    more = run(folder, out, noise=(0.0, 1e-3, 1e-2))
    assert len(more) == begun(out) == 12
    assert [row for row in more if row["noise"] < 1e-2] == rows
    assert len(run(folder, out, seed=1, n_images=1)) == len(run(folder, out, dtype=torch.float32, n_images=1)) - 1 == 13


def test_a_killed_worker_loses_nothing_and_nothing_is_done_twice(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.parquet"
    rows = run(folder, out, sweep_models.deadly_once, jobs=2)
    assert sorted(row["first"] for row in rows) == [0, 1, 2, 3]
    assert all(row["psnr"] > 150 for row in rows)
    assert begun(out) <= 4 + 1  # what ran beside the killed one may have to begin again
    before = begun(out)
    assert run(folder, out, sweep_models.deadly_once, jobs=2) == rows
    assert begun(out) == before


def test_a_case_that_kills_every_process_is_a_row_with_the_reason(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.parquet"
    log = str(out) + ".log"
    models = {"bad": partial(sweep_models.deadly, log), "good": partial(sweep_models.network, log)}
    table = sweep.run_sweep(models, folder, out, input_shape=(3, 4, 4), attack=aono, jobs=2, n_images=1)
    rows = {row["model"]: row for row in sweep.read_rows(table)}
    assert rows["bad"]["error"] == LOST
    assert rows["good"]["psnr"] > 150


def test_what_goes_wrong_in_a_case_is_its_row(folder: Path, tmp_path: Path) -> None:
    rows = run(folder, tmp_path / "t.parquet", lambda _: nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), n_images=1)
    assert "mat1 and mat2" in rows[0]["error"]


def test_rows_are_summed_up(folder: Path, tmp_path: Path) -> None:
    rows = run(folder, tmp_path / "t.parquet", noise=(0.0, 1e-3))
    lines = sweep.aggregate(rows)
    assert [(line["noise"], line["cases"]) for line in lines] == [(0.0, 4), (1e-3, 4)]
    assert lines[0]["least_psnr"] == min(r["worst_psnr"] for r in rows if r["noise"] == 0)
    assert sweep.to_markdown(rows).count("\n") == 3
    sweep.save_page(rows, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "data:image/png;base64," in page
    assert f'<td class="number">{sum(not row["verified"] for row in rows)}</td>' in page  # why they are not


@pytest.mark.slow
def test_ray_runs_the_same_cases(folder: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    out = tmp_path / "table.parquet"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": _paths()})
    try:
        rows = run(folder, out, sweep_models.deadly_once, jobs=2, ray="local")
    finally:
        ray.shutdown()
    assert sorted(row["first"] for row in rows) == [0, 1, 2, 3]
    assert all(row["psnr"] > 150 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("where", [("--jobs", "2"), ("--jobs", "2", "--ray", "local")], ids=["processes", "ray"])
def test_a_sweep_that_is_killed_whole_goes_on_without_repeating(
    where: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    if "--ray" in where:
        pytest.importorskip("ray")
    out, log = tmp_path / "table.parquet", tmp_path / "log"
    noise = [text for sigma in range(10) for text in ("--noise", f"{sigma}e-6")]
    given = ["sweep", "--model", "sweep_models:slow", "--images", str(folder), "--input-shape", "3x4x4", *noise]
    command = [sys.executable, "-m", "rconv_fast", *given, "--attack", "aono", "--out", str(out), *where]
    environment = os.environ | _paths() | {"SWEEP_LOG": str(log)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    parts = Path(f"{out}.parts")
    deadline = time.monotonic() + 300
    while len(list(parts.glob("*.parquet"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(2)  # what a worker of Ray was at
    kept, before = len(list(parts.glob("*.parquet"))), len(log.read_text().splitlines())
    assert 5 <= kept < 40
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = sweep.read_rows(out)
    assert len({row["key"] for row in rows}) == len(rows) == 40
    assert len(log.read_text().splitlines()) - before == 40 - kept + 1  # each SPEC is tried once first


def _paths() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(sys.path)}


@pytest.mark.parametrize("text", ["gauss:1", "clip", "none:3", "sign:1"])
def test_a_defence_that_does_not_exist_is_named(text: str) -> None:
    with pytest.raises(ArgumentError, match="run_sweep: defences must"):
        defence_of(text)


def test_defences_reach_the_gradients() -> None:
    given = {"w": torch.tensor([3.0, -4.0, 0.1])}
    generator = torch.Generator().manual_seed(0)
    assert float(defence_of("clip:1")(given, generator)["w"].norm()) == pytest.approx(1)  # type: ignore[arg-type]
    assert defence_of("sign")(given, generator)["w"].tolist() == [1, -1, 1]  # type: ignore[arg-type]
    kept = defence_of("top_k:0.34")(given, generator)["w"]  # type: ignore[arg-type]
    assert int((kept != 0).sum()) in (1, 2)
    assert defence_of("quantise:bfloat16")(given, generator)["w"][2] != given["w"][2]  # type: ignore[arg-type]


# --- Pictures ---------------------------------------------------------------------------------------------


def test_cifar_binaries_are_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    ten = np.concatenate([np.array([[7], [0], [9]], np.uint8), pixels.reshape(3, -1)], 1)
    (tmp_path / "ten").mkdir()
    ten.tofile(tmp_path / "ten" / "data_batch_1.bin")
    found = find_pictures(tmp_path / "ten")
    assert [p.label for p in found] == [7, 0, 9]
    assert torch.equal(found[2].read((3, 32, 32)), torch.from_numpy(pixels[2] / 255))
    hundred = np.concatenate([np.array([[1, 70], [2, 80], [3, 90]], np.uint8), pixels.reshape(3, -1)], 1)
    (tmp_path / "hundred").mkdir()
    hundred.tofile(tmp_path / "hundred" / "train.bin")
    found = find_pictures(tmp_path / "hundred")
    assert [p.label for p in found] == [70, 80, 90]
    assert torch.equal(found[0].read((3, 32, 32)), torch.from_numpy(pixels[0] / 255))
    (tmp_path / "hundred" / "train.bin").write_bytes(b"123")
    with pytest.raises(ArgumentError, match=r"train.bin must hold records of 3074 bytes, got 3 bytes"):
        _fresh(tmp_path / "hundred")


def _fresh(folder: Path) -> list[Picture]:
    from rconv_fast import data

    data._cifar.cache_clear()
    return find_pictures(folder)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_binaries_are_read(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28), np.uint8)
    pack = gzip.compress if suffix else bytes
    sizes = b"".join(n.to_bytes(4, "big") for n in (2, 28, 28))
    images, labels = tmp_path / f"t10k-images-idx3-ubyte{suffix}", tmp_path / f"t10k-labels-idx1-ubyte{suffix}"
    images.write_bytes(pack((2051).to_bytes(4, "big") + sizes + pixels.tobytes()))
    labels.write_bytes(pack((2049).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes([5, 3])))
    found = find_pictures(tmp_path)
    assert [p.label for p in found] == [5, 3]
    assert torch.equal(found[1].read((1, 28, 28)), torch.from_numpy(pixels[1:] / 255))
    assert found[1].read((3, 32, 32)).shape == (3, 32, 32)


def test_one_folder_a_class_is_read(tmp_path: Path) -> None:
    for name, shade in (("cat", 10), ("dog", 200)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (6, 4), (shade, 0, 0)).save(tmp_path / name / "a.png")
    (tmp_path / "none").mkdir()
    found = find_pictures(tmp_path)
    assert [(p.name, p.label) for p in found] == [("a.png", 0), ("a.png", 1)]
    assert float(found[1].read((3, 4, 4))[0].mean()) == pytest.approx(200 / 255)
    with pytest.raises(ArgumentError, match="folder must hold pictures"):
        find_pictures(tmp_path / "none")


def test_pictures_are_cut_in_the_middle_and_resized() -> None:
    ramp = torch.linspace(0, 1, 30, dtype=torch.float64).expand(3, 10, 30)
    middle = fit(ramp, (3, 10, 10))
    assert torch.equal(middle, ramp[:, :, 10:20])
    assert fit(ramp, (1, 5, 5)).shape == (1, 5, 5)
    assert float(fit(torch.full((1, 7, 9), 0.25).double(), (3, 4, 4)).sub(0.25).abs().max()) < 1e-12
