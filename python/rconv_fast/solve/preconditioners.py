"""Approximate inverses of the normal matrix ``M^T M``, each from the part of the system it can factor."""

from __future__ import annotations

import torch
from torch import Tensor

from rconv_fast.solve.dissection import DissectionFactor
from rconv_fast.solve.gram import GramFactor, sum_of
from rconv_fast.solve.krylov import Preconditioner
from rconv_fast.solve.rows import GradientRows, System, WeightRows


def jacobi(system: System, dtype: torch.dtype) -> Preconditioner:
    """The inverse diagonal."""
    diagonal = system.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0).to(dtype)
    if system.support is not None:
        inverse = inverse * system.support
    return lambda v: v * inverse


def phase_cholesky(system: System, dtype: torch.dtype) -> Preconditioner | None:
    """``(B^T B + D)^-1``: gradient rows exactly, of the others only the diagonal D; None where it fails."""
    gradient = gradient_blocks(system)
    diagonal = system.diagonal()
    rest = diagonal - sum_of(block.diagonal() for block in gradient)
    rest = rest.clamp_min(1e-6 * float(rest.mean()) + torch.finfo(dtype).eps * float(diagonal.mean()))
    factor = GramFactor.create([(block.geometry, block.grad_output) for block in gradient], rest, dtype)
    return None if factor.failed else factor.solve


# Below this (a lower bound of the) condition number the undamped factor preconditions well; above, its nearly
# null directions are damped at this share of the column norms and left to the gradient rows.
MAX_UNDAMPED_CONDITION, DAMPING = 1e7, 1e-7


def dissection(rows: WeightRows) -> tuple[Preconditioner, bool] | None:
    """``(A^T w^2 A)^-1`` by nested dissection, one factor a sample (one for all where all outputs are known).

    Returns the preconditioner and a lower bound of the condition number; None where rows are missing so that
    A alone is singular beyond damping.
    """
    masks: list[Tensor | None] = list(rows.row_weight)
    if bool((rows.row_weight == rows.row_weight.flatten()[0]).all()):
        masks, scale = [None], float(rows.row_weight.flatten()[0])
    else:
        scale = 1.0
    weight = rows.weight * scale
    factors = [DissectionFactor.factor(rows.geometry, weight, mask) for mask in masks]
    condition = max(factor.condition_estimate for factor in factors)
    proven = condition <= MAX_UNDAMPED_CONDITION and not any(f.is_singular or f.n_untouched for f in factors)
    if not proven:
        damping = DAMPING**2 * float(rows.diagonal().max()) * 4
        try:
            factors = [DissectionFactor.factor(rows.geometry, weight, mask, damping=damping) for mask in masks]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # public, missing in torch's stubs
            return None

    def solve(v: Tensor) -> Tensor:
        if len(factors) == 1:
            return factors[0].solve_normal(v)
        return torch.stack([factor.solve_normal(part) for factor, part in zip(factors, v, strict=True)])

    return solve, proven


def gradient_blocks(system: System) -> list[GradientRows]:
    """The gradient rows whose stride phases agree with those of the block with the most equations."""
    blocks = [block for block in system.blocks if isinstance(block, GradientRows) and block.count]
    if not blocks:
        return []
    main = max(blocks, key=lambda block: block.count).geometry
    return [b for b in blocks if (b.geometry.stride, b.geometry.groups) == (main.stride, main.groups)]
