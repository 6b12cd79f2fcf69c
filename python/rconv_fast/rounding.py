"""The floating type that values were rounded to, whatever type they are stored in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rconv_fast.on_demand import TOGETHER

# Narrowest first: the first that holds every value is the one they were rounded to.
_TYPES = (torch.bfloat16, torch.float16, torch.float32)
# Values looked at first, which decide almost always.
_PROBE = 4096


def rounded_to(tensors: Iterable[Tensor | None]) -> torch.dtype:
    """The narrowest floating type that holds all values; float64 where none does."""
    given = [t.detach().reshape(-1) for t in tensors if t is not None]
    for dtype in _TYPES:
        if all(_holds(dtype, t[:_PROBE]) for t in given) and all(_holds(dtype, t) for t in given):
            return dtype
    return torch.float64


def rounding_of(*tensors: Tensor | None) -> float:
    """Unit roundoff of that type: float64 gradients may be rounded float32."""
    return float(torch.finfo(rounded_to(tensors)).eps)


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    if values.dtype == dtype:
        return True
    return all(bool((part.to(dtype).to(part.dtype) == part).all()) for part in values.split(TOGETHER))
