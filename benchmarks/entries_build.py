"""Suite `build`: the constraint matrices, against copies of their bytes and against other ways to build them.

On a GPU every builder is also replayed from a CUDA graph, which leaves the host's part out: small matrices take a GPU
less time than calling it. A copy reads what it writes, so it moves twice as many bytes as it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import builders
import builders_others as others
from bench import Entry, Target
from builders import Case

COPY = "device copy of the same bytes"
References = dict[str, Callable[[Any], Any]]


def entries(target: Target) -> list[Entry]:
    found = [entry for size in builders.SIZES for entry in of_gradient(size, target)]
    return found + [entry for size in builders.WEIGHT_SIZES for entry in of_weight(size, target)]


def of_gradient(size: tuple[int, ...], target: Target) -> list[Entry]:
    """Our matrix of gradient constraints beside all others; with int64 indices; of a half-dead layer; in parts."""
    case = partial(builders.gradient_case, size, target.device, target.dtype)
    named = partial(name_of, size, target)
    wide = partial(builders.widened, layout_of=builders.gradient_layout)
    parts = {"the pattern alone": builders.pattern_alone, "the values and their transpose": builders.sum_values}
    full = {"the full matrix": builders.ours_gradient}
    return [
        builder(named("gradient"), case, builders.ours_gradient, competitors(target), quick=size[1] <= 16),
        builder(named("gradient-int64"), lambda: wide(case()), builders.ours_wide),
        builder(
            named("gradient-drop_zeros"),
            partial(builders.half_dead, case),
            builders.ours_gradient_nonzeros,
            full,
            waits=True,
        ),
        Entry(named("gradient-values"), partial(builders.parts_of, case), builders.values_alone, parts),
    ]


def of_weight(size: tuple[int, ...], target: Target) -> list[Entry]:
    case = partial(builders.weight_case, size, target.device, target.dtype)
    named = partial(name_of, size, target)
    by_hand = {"numpy writing CSR by hand": others.numpy_weight_by_hand} if is_reference(target) else {}
    return [
        builder(named("weight"), case, builders.ours_weight, by_hand),
        builder(named("weight-int64"), lambda: builders.widened(case(), builders.weight_layout), builders.ours_wide),
        builder(named("weight-mask"), lambda: builders.half_known(case()), builders.ours_weight, waits=True),
    ]


def name_of(size: tuple[int, ...], target: Target, what: str) -> str:
    return f"build/{what}/{','.join(map(str, size))}/{target.name}"


def is_reference(target: Target) -> bool:
    """Where the competitors in numpy and scipy run."""
    return target == Target("cpu", torch.float64)


def competitors(target: Target) -> References:
    if target.device != "cpu":
        return {"plain torch: unfold, COO to CSR": others.torch_unfold_coo, "plain cupy: COO to CSR": others.cupy_coo}
    if not is_reference(target):
        return {}
    return {
        "copy into fresh memory": others.copy_fresh,
        "fill of fresh pages": others.fill_fresh,
        "numpy writing CSR by hand": others.numpy_by_hand,
        "scipy COO to CSR": others.scipy_coo,
        "torch unfold, COO to CSR": others.torch_unfold_coo,
    }


def builder(
    name: str,
    case: Callable[[], Case],
    ours: Callable[[Any], Tensor],
    references: References | None = None,
    *,
    waits: bool = False,
    quick: bool = False,
) -> Entry:
    """One builder beside a copy of buffers as large as its own matrix; on a GPU one that never `waits` is replayed."""

    def setup() -> Case:
        given = case()
        return builders.with_buffers(given, ours(given))

    replayed = {f"{COPY}, replayed": others.Replayed(others.copy_warm), "ours, replayed": others.Replayed(ours)}
    found = {COPY: others.copy_warm} | (replayed if "/cuda" in name and not waits else {}) | (references or {})
    return Entry(name, setup, ours, found, builders.csr_bytes, quick=quick)
