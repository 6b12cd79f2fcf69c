"""Where float32 products keep all their 24 bits, and float64 in their place where they do not.

Torch rounds float32 convolutions on a GPU to TF32, 11 bits, unless told otherwise: a mixed-precision iteration whose
products are that coarse stalls. The setting is the whole process's, so it is read here and never changed; with
``torch.backends.cudnn.allow_tf32 = False`` large systems are iterated in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Concatenate, ParamSpec

import torch

from rconv_fast.solve.rows import System
from rconv_fast.solve.solution import Solution

P = ParamSpec("P")


def float32_is_exact(device: torch.device) -> bool:
    """Whether float32 convolutions and matrix products on `device` are not rounded to TF32."""
    if device.type != "cuda":
        return True
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is not None:  # the names of newer versions, which must not be mixed with the older flags
        return conv.fp32_precision == "ieee" and torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
    return not (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)


Solver = Callable[Concatenate[System, P], Solution]


def in_exact_products(solver: Solver[P]) -> Solver[P]:
    """Let a solver see a float64 system in place of a float32 one whose products would be coarse."""

    @wraps(solver)
    def exactly(system: System, /, *args: P.args, **kwargs: P.kwargs) -> Solution:
        dtype, device = system.rhs[0].dtype, system.rhs[0].device
        if dtype != torch.float32 or float32_is_exact(device):
            return solver(system, *args, **kwargs)
        found = solver(system.to(torch.float64), *args, **kwargs)
        return replace(found, x=found.x.to(dtype))

    return exactly
