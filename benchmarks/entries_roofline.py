"""Suite `layer`: the stages of a solve on the layers they are for, against the machine's bandwidth and flops."""

from __future__ import annotations

from functools import partial

import torch

from bench import Entry, Target
from roofline import (
    Stage,
    adjoint,
    apply,
    direct,
    direct_work,
    gradient_stage,
    hybrid,
    iterate,
    iteration_work,
    product_work,
    roofline,
    solve_direct,
    weight_stage,
)


def entries(target: Target) -> list[Entry]:
    """Both matrices, a stem of 224 pixels, and in float64 the third layer of cnn4_224."""
    system = partial(hybrid, 224, target.dtype)
    stages = {
        "gradient-matrix": gradient_stage((64, 112, 7, 2, 3), target.dtype),
        "weight-matrix": weight_stage((3, 32, 112, 7, 2, 3), target.dtype),
        "system-apply": Stage(system, apply, lambda given, _: product_work(given)),
        "system-adjoint": Stage(system, adjoint, lambda given, _: product_work(given)),
        "krylov-iteration": Stage(system, iterate, iteration_work),
    }
    found = [roofline(name, stage, target, quick=name != "krylov-iteration") for name, stage in stages.items()]
    if target.dtype == torch.float64:
        third = Stage(partial(direct, 256, 256, 56, 5, 2, 2), solve_direct, direct_work)
        found.append(roofline("phase-direct", third, target, quick=False))
    return found
