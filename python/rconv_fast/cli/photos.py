"""Photos for the demo: those in scikit-image's wheel, and the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rconv_fast import errors

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTOS: dict[str, tuple[int, int, int]] = {
    "astronaut": (10, 120, 220),
    "chelsea": (20, 100, 240),
    "coffee": (0, 150, 400),
    "rocket": (20, 160, 400),
    "stereo_motorcycle": (60, 130, 400),
    "retina": (200, 200, 1000),
    "hubble_deep_field": (300, 400, 300),
    "immunohistochemistry": (100, 100, 300),
}
"""Real photos in scikit-image's wheel, and the square of each that is shown: top, left, side."""


def load(path: Path | None, size: int, batch: int) -> Tensor:
    """Load square photos, antialiased to `size` pixels: shape (B, 3, size, size), float64 in [0, 1]."""
    most = len(PHOTOS)
    errors.require(batch <= most, "demo", "--batch", f"be <= {most}, the number of photos shipped", batch)
    crops = [] if path is None else [_own_photo(path)]
    crops += [_shipped_photo(name) for name in list(PHOTOS)[: batch - len(crops)]]
    return torch.stack([_to_tensor(crop, size) for crop in crops])


def _own_photo(path: Path) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    errors.require(path.is_file(), "demo", "--image", "be a file", path)
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise errors.ArgumentError(f"demo: --image must be a picture that Pillow reads, got {path}") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _shipped_photo(name: str) -> Image:
    from PIL import Image

    data = errors.optional("skimage.data", "demo", "demo")
    top, left, side = PHOTOS[name]
    loaded = getattr(data, name)()
    pixels = loaded[0] if isinstance(loaded, tuple) else loaded
    return Image.fromarray(pixels[top : top + side, left : left + side])


def _to_tensor(picture: Image, size: int) -> Tensor:
    from PIL import Image

    small = picture.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).double() / 255
