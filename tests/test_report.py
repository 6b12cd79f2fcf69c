"""Pictures, files and the progress display."""

from __future__ import annotations

import io
import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from rconv_fast.errors import ArgumentError
from rconv_fast.progress import ProgressDisplay
from rconv_fast.report import files, pictures


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_comparison_grows_with_the_batch_and_stays_small(tmp_path: Path, batch: int, channels: int) -> None:
    photos = torch.rand(batch, channels, 32, 32, dtype=torch.float64)
    pictures.save_comparison(tmp_path / "c.png", photos, photos + 1e-13)
    assert pixels(tmp_path / "c.png").shape == (341 * batch, 990, 3)
    assert (tmp_path / "c.png").stat().st_size < 200_000


def test_comparison_shows_the_photo_it_is_given(tmp_path: Path) -> None:
    """A red original and a blue recovered photo are found left and right of each other."""
    red, blue = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    red[:, 0], blue[:, 2] = 1, 1
    pictures.save_comparison(tmp_path / "c.png", red, blue)
    drawn = pixels(tmp_path / "c.png")
    is_red, is_blue = (drawn == (255, 0, 0)).all(axis=-1), (drawn == (0, 0, 255)).all(axis=-1)
    assert is_red.sum() > 20_000
    assert is_blue.sum() > 20_000
    assert np.nonzero(is_red)[1].max() < np.nonzero(is_blue)[1].min()


def test_comparison_survives_a_perfect_recovery(tmp_path: Path) -> None:
    photo = torch.rand(1, 3, 16, 16)
    pictures.save_comparison(tmp_path / "c.png", photo, photo)
    assert (tmp_path / "c.png").exists()


def test_comparison_refuses_different_shapes(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="recovered must have shape"):
        pictures.save_comparison(tmp_path / "c.png", torch.rand(1, 3, 8, 8), torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    "shape", [(1, 3, 32, 32), (5, 1, 8, 9), (2, 2, 6, 6), (1, 1, 4, 4, 4), (2, 3, 50), (1, 7), (20, 1, 4, 4)]
)
def test_batches_of_all_shapes_are_drawn(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pictures.save_batch(tmp_path / "b.png", 3 * torch.randn(shape))
    assert pixels(tmp_path / "b.png").std() > 5


def test_tensors_come_back_from_both_kinds_of_file(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(3), "b": torch.arange(4)}
    save_file(tensors, tmp_path / "t.safetensors")
    torch.save(tensors, tmp_path / "t.pt")
    torch.save(list(tensors.values()), tmp_path / "list.pt")
    for name in ("t.safetensors", "t.pt"):
        loaded = files.load_tensors(tmp_path / name, "--state")
        assert isinstance(loaded, dict)
        assert set(loaded) == {"a", "b"}
        assert torch.equal(loaded["a"], tensors["a"])
    loaded = files.load_tensors(tmp_path / "list.pt", "--state")
    assert isinstance(loaded, list)
    assert torch.equal(loaded[1], tensors["b"])


class Trap:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["bare.pkl", "torch.pt", "named.safetensors"])
def test_no_file_is_ever_unpickled(tmp_path: Path, name: str) -> None:
    trap = Trap(tmp_path / "sprung")
    if name == "torch.pt":
        torch.save({"w": trap}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps({"w": trap}))
    with pytest.raises(ArgumentError, match=r"--state must be safetensors or loadable") as caught:
        files.load_tensors(tmp_path / name, "--state")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_other_contents_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "t.pt")
    with pytest.raises(ArgumentError, match="--gradients must hold a mapping of names to tensors"):
        files.load_tensors(tmp_path / "t.pt", "--gradients")
    with pytest.raises(ArgumentError, match="--gradients must be a file, got"):
        files.load_tensors(tmp_path / "absent.pt", "--gradients")


def test_inputs_are_saved_whole(tmp_path: Path) -> None:
    inputs = torch.rand(2, 3, 4, 4, dtype=torch.float64).transpose(2, 3)
    files.save_inputs(tmp_path / "i.safetensors", inputs, torch.tensor([3, 1]))
    loaded = load_file(tmp_path / "i.safetensors")
    assert torch.equal(loaded["inputs"], inputs)
    assert loaded["labels"].tolist() == [3, 1]
    files.save_inputs(tmp_path / "j.safetensors", inputs, None)
    assert list(load_file(tmp_path / "j.safetensors")) == ["inputs"]


def test_report_is_strict_json(tmp_path: Path) -> None:
    report = {
        "psnr": math.inf,
        "labels": torch.tensor([1, 2]),
        "dtype": torch.float64,
        "layers": [{"r": math.nan}],
    }
    files.save_report(tmp_path / "r.json", report)
    text = (tmp_path / "r.json").read_text()
    expected = {"psnr": None, "labels": [1, 2], "dtype": "torch.float64", "layers": [{"r": None}]}
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == expected


def event(layer: str, iteration: int, total: int | None = None, residual: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(layer=layer, stage="solve", iteration=iteration, total=total, residual=residual)


def test_progress_shows_layer_count_and_residual() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with ProgressDisplay(console) as show:
        show(event("conv3", 1))
        show(event("conv2", 5, 40, 1.5e-3))
        show._progress.refresh()
    assert "conv3" in stream.getvalue()
    assert "5/40" in stream.getvalue()
    assert "residual 1.5e-03" in stream.getvalue()


def test_progress_is_silent_in_a_file() -> None:
    stream = io.StringIO()
    with ProgressDisplay(Console(file=stream)) as show:
        show(event("conv2", 5, 40, 1.5e-3))
    assert stream.getvalue() == ""
