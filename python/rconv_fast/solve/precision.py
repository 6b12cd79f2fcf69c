"""Float32 products with all their 24 bits, whatever the caller allows elsewhere.

Torch rounds float32 convolutions on a GPU to TF32, 11 bits, unless told otherwise, and many training scripts allow it
for matrix products as well. A mixed-precision iteration whose products are that coarse stalls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Where torch keeps the choice: newer versions by name, older ones as a flag; a program must not mix the two.
_PLACES: tuple[Any, ...]
_NAME: str
_EXACT: str | bool
if hasattr(torch.backends.cudnn, "conv") and hasattr(torch.backends.cudnn.conv, "fp32_precision"):
    _PLACES, _NAME, _EXACT = (torch.backends.cudnn.conv, torch.backends.cuda.matmul), "fp32_precision", "ieee"
else:
    _PLACES, _NAME, _EXACT = (torch.backends.cudnn, torch.backends.cuda.matmul), "allow_tf32", False


@contextmanager
def exact_float32() -> Iterator[None]:
    """Switch TF32 off for convolutions and matrix products, and back to what it was."""
    before = [getattr(place, _NAME) for place in _PLACES]
    try:
        for place in _PLACES:
            setattr(place, _NAME, _EXACT)
        yield
    finally:
        for place, value in zip(_PLACES, before, strict=True):
            setattr(place, _NAME, value)
