"""Pictures from where people keep them: folders, ImageFolder trees, the binaries of CIFAR-10, CIFAR-100 and MNIST."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rconv_fast.errors import ArgumentError, MissingDependencyError, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_CIFAR_SIDE = 32
_IDX_IMAGES, _IDX_LABELS = 2051, 2049


@dataclass(frozen=True)
class Picture:
    """One picture that has not been read yet.

    Attributes
    ----------
    file : Path
        Where it is.
    index : int
        Which one of the file, 0 for a picture file.
    label : int or None
        Its class, where that is known.
    """

    file: Path
    index: int = 0
    label: int | None = None

    @property
    def name(self) -> str:
        """For tables: the file's name, with the index where the file holds many."""
        return self.file.name if self.file.suffix.lower() in SUFFIXES else f"{self.file.name}[{self.index}]"

    def read(self, shape: Sequence[int]) -> Tensor:
        """The picture as (C, H, W) = `shape` in [0, 1], float64: its middle, resized with antialiasing."""
        return fit(_pixels(self.file, self.index), shape)


def find_pictures(folder: Path | str) -> list[Picture]:
    """All pictures of a folder, in a fixed order.

    Parameters
    ----------
    folder : Path or str
        Holds CIFAR-10's ``data_batch_*.bin`` and ``test_batch.bin``, or CIFAR-100's ``train.bin`` and ``test.bin``
        (then fine labels), or MNIST's ``*-images-idx3-ubyte`` beside ``*-labels-idx1-ubyte`` (``.gz`` too), or
        picture files, or one folder of picture files a class (the classes are numbered in the order of their names).

    Raises
    ------
    ArgumentError
        If there are none.
    """
    folder = Path(folder)
    require(folder.is_dir(), "find_pictures", "folder", "be a folder", folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    binaries = [path for path in files if _record_bytes(path) is not None]
    idx = [path for path in files if "-images-idx3-ubyte" in path.name]
    found: list[Picture] = []
    for path in binaries:
        found += [Picture(path, i, int(label)) for i, label in enumerate(_cifar(path)[1])]
    for path in idx:
        labels = _idx(path.with_name(path.name.replace("-images-idx3", "-labels-idx1")), _IDX_LABELS)
        found += [Picture(path, i, int(label)) for i, label in enumerate(labels)]
    found += [Picture(path) for path in files if path.suffix.lower() in SUFFIXES]
    for number, sub in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        pictures = sorted(path for path in sub.rglob("*") if path.suffix.lower() in SUFFIXES)
        found += [Picture(path, label=number) for path in pictures]
    require(bool(found), "find_pictures", "folder", "hold pictures", folder)
    return found


def fit(picture: Tensor, shape: Sequence[int]) -> Tensor:
    """A picture (C, H, W) cut to the proportions of `shape` and resized to it; grey repeated, colours averaged."""
    channels, height, width = shape
    if picture.shape[0] != channels:
        grey = picture.mean(0, keepdim=True)
        picture = picture[:channels] if channels < picture.shape[0] and channels > 1 else grey.expand(channels, -1, -1)
    have_height, have_width = picture.shape[1:]
    cut = min(have_height / height, have_width / width)
    cut_height, cut_width = round(cut * height), round(cut * width)
    top, left = (have_height - cut_height) // 2, (have_width - cut_width) // 2
    middle = picture[:, top : top + cut_height, left : left + cut_width]
    if middle.shape[1:] == (height, width):
        return middle.contiguous()
    return F.interpolate(middle[None], (height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)


def _pixels(file: Path, index: int) -> Tensor:
    """One picture (C, H, W) in [0, 1], float64."""
    if file.suffix.lower() in SUFFIXES:
        array = _open(file)
    elif _record_bytes(file) is not None:
        array = _cifar(file)[0][index]
    else:
        array = _idx(file, _IDX_IMAGES)[index][None]
    return torch.from_numpy(array.astype(np.float64) / 255)


def _open(file: Path) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError('pictures need Pillow: pip install "rconv-fast[report]"') from error
    try:
        with Image.open(file) as opened:
            picture = opened if opened.mode in ("L", "RGB") else opened.convert("RGB")
            array = np.array(picture)
    except (UnidentifiedImageError, OSError) as error:
        raise ArgumentError(f"find_pictures: {file.name} must be a picture that Pillow reads, got {error}") from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _record_bytes(file: Path) -> tuple[int, int] | None:
    """Label bytes and their last offset of a CIFAR binary's records, by its name; None for other files."""
    if file.suffix != ".bin":
        return None
    if file.stem in ("train", "test"):
        return 2, 1  # coarse, fine
    return (1, 0) if file.stem.startswith(("data_batch", "test_batch")) else None


@lru_cache(maxsize=8)
def _cifar(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 3, 32, 32) and labels (n,) of a CIFAR binary."""
    record = _record_bytes(file)
    assert record is not None
    n_labels, fine = record
    size = n_labels + 3 * _CIFAR_SIDE**2
    data = np.fromfile(file, np.uint8)
    require(len(data) % size == 0, "find_pictures", file.name, f"hold records of {size} bytes", f"{len(data)} bytes")
    records = data.reshape(-1, size)
    return records[:, n_labels:].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE), records[:, fine]


@lru_cache(maxsize=8)
def _idx(file: Path, magic: int) -> np.ndarray:
    """The array of an IDX file of bytes: a magic number, its sizes, its values."""
    require(file.is_file(), "find_pictures", "folder", f"hold {file.name}", "none")
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    found = int.from_bytes(data[:4], "big")
    require(found == magic, "find_pictures", file.name, f"begin with the number {magic}", found)
    axes = data[3]
    sizes = [int.from_bytes(data[4 * i : 4 * i + 4], "big") for i in range(1, axes + 1)]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(sizes)
