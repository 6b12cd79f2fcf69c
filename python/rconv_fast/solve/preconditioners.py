"""Approximate inverses of the normal matrix ``M^T M``, each from the part of the system it can factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.solve.dissection import DissectionFactor
from rconv_fast.solve.gram import GramFactor, sum_of
from rconv_fast.solve.krylov import Preconditioner
from rconv_fast.solve.rows import GradientRows, System, WeightRows
from rconv_fast.solve.sketch import SketchRows


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


# Up to this (a lower bound of the) condition number a float32 factor is nonsingular beyond doubt and preconditions
# well; above, the nearly null directions are damped at this share of the columns' squares and left to the sketch.
MAX_UNDAMPED_CONDITION, DAMPING = 3e5, 1e-10


@dataclass(frozen=True)
class SketchedDissection:
    """``(A^T w^2 A + U^T U)^-1``: weight rows by nested dissection, of the other rows the sketch U, by Woodbury.

    With ``R^T R = A^T w^2 A`` and ``Z = U R^-1`` it is ``R^-1 (I - Z^T (I + Z Z^T)^-1 Z) R^-T``.

    Attributes
    ----------
    system : System
        The weight rows and the sketch: the equations that this is the preconditioner of.
    factors : list of DissectionFactor
        R, one a sample, or one for all where all outputs are known.
    z : Tensor, shape (k, unknowns)
        Z.
    core : Tensor, shape (k, k)
        Cholesky factor of ``I + Z Z^T``.
    proven : bool
        Whether the weight rows alone have full rank.
    """

    system: System
    factors: list[DissectionFactor]
    z: Tensor
    core: Tensor
    proven: bool

    @classmethod
    def create(cls, system: System) -> SketchedDissection | None:
        """Factor a balanced system; None where rows are missing beyond what damping and the sketch can fill."""
        (rows,) = (block for block in system.blocks if isinstance(block, WeightRows))
        others = [block for block in system.blocks if block is not rows]
        sketch = SketchRows.create(others, system.shape, rows.rhs)
        try:
            factors, proven = _factor(rows)
            z = _each_sample(factors, DissectionFactor.solve_rt, sketch.matrix).flatten(1)
            core = torch.linalg.cholesky(torch.eye(len(z)).to(z) + z @ z.mT)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # public, missing in torch's stubs
            return None
        return cls(System(system.shape, (sketch, rows)), factors, z, core, proven)

    def __call__(self, v: Tensor) -> Tensor:
        """Apply the inverse to v, (B, C, *in)."""
        y = _each_sample(self.factors, DissectionFactor.solve_rt, v.unsqueeze(0)).flatten()
        y = y - torch.cholesky_solve((self.z @ y).unsqueeze(1), self.core).squeeze(1) @ self.z
        return _each_sample(self.factors, DissectionFactor.solve_r, y.view(1, *v.shape)).squeeze(0)


def _factor(rows: WeightRows) -> tuple[list[DissectionFactor], bool]:
    """R of each sample, undamped if well conditioned, and whether it was."""
    masks: list[Tensor | None] = list(rows.row_weight)
    scale = 1.0
    if rows.uniform:
        masks, scale = [None], float(rows.row_weight.flatten()[0])
    geometry, weight = rows.geometry, rows.weight * scale
    factors = [DissectionFactor.factor(geometry, weight, mask, dtype=torch.float32) for mask in masks]
    if all(f.condition_estimate <= MAX_UNDAMPED_CONDITION and not f.n_untouched for f in factors):
        return factors, True
    damping = DAMPING * float(rows.diagonal().max())
    return [DissectionFactor.factor(geometry, weight, mask, damping=damping) for mask in masks], False


def _each_sample(
    factors: list[DissectionFactor], solve: Callable[[DissectionFactor, Tensor], Tensor], v: Tensor
) -> Tensor:
    """Solve with each sample's factor; v of shape (n, B, C, *in), where n may be 0."""
    if not len(v):
        return v
    if len(factors) == 1:
        return solve(factors[0], v.flatten(0, 1)).view(v.shape)
    return torch.stack([solve(f, part) for f, part in zip(factors, v.unbind(1), strict=True)], dim=1)


def gradient_blocks(system: System) -> list[GradientRows]:
    """The gradient rows whose stride phases agree with those of the block with the most equations."""
    blocks = [block for block in system.blocks if isinstance(block, GradientRows) and block.count]
    if not blocks:
        return []
    main = max(blocks, key=lambda block: block.count).geometry
    return [b for b in blocks if (b.geometry.stride, b.geometry.groups) == (main.stride, main.groups)]
