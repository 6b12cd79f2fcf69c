"""Approximate inverses of the normal matrix ``M^T M``, each from the part of the system it can factor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.errors import LinAlgError
from rconv_fast.solve.conjugate import Preconditioner
from rconv_fast.solve.dense import normal_matrix
from rconv_fast.solve.dissection.factor import DissectionFactor
from rconv_fast.solve.dissection.sketch import SketchRows, are_few, each_row, leaves_open, sketch_size
from rconv_fast.solve.phases.factors import GramFactor
from rconv_fast.solve.phases.gram import gram_condition, sum_of
from rconv_fast.solve.rows import GradientRows, System, WeightRows, gradient_part


def jacobi(system: System, dtype: torch.dtype) -> Preconditioner:
    """The inverse diagonal."""
    inverse = inverse_diagonal(system, dtype)
    return lambda v: v * inverse


def inverse_diagonal(system: System, dtype: torch.dtype) -> Tensor:
    """One over the diagonal of ``M^T M``, 0 where that is 0 and off the support."""
    diagonal = system.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0).to(dtype)
    return inverse if system.support is None else inverse * system.support


def phase_cholesky(system: System, dtype: torch.dtype) -> Preconditioner | None:
    """``(B^T B + D)^-1``: gradient rows exactly, of the others only the diagonal D; None where it fails."""
    gradient = gradient_blocks(system)
    diagonal = system.diagonal()
    rest = diagonal - sum_of(block.diagonal() for block in gradient)
    rest = rest.clamp_min(1e-6 * float(rest.mean()) + torch.finfo(dtype).eps * float(diagonal.mean()))
    factor = GramFactor.create([(block.geometry, block.grad_output) for block in gradient], rest, dtype)
    return None if factor is None else factor.solve


# Up to this condition number of M the normal matrix, whose is its square, is inverted to some digits.
MAX_INVERTED_CONDITION = 1e6


def normal_inverse(system: System) -> Preconditioner | None:
    """``(M^T M)^-1`` as a matrix; None where M is not of full rank beyond doubt."""
    normal = normal_matrix(system)
    cholesky, info = torch.linalg.cholesky_ex(normal)
    if int(info) != 0:  # synchronize!
        return None
    inverse = torch.cholesky_inverse(cholesky)
    if not float(gram_condition(normal, inverse.matmul)) < MAX_INVERTED_CONDITION:
        return None
    return lambda v: (inverse @ v.flatten()).view(v.shape)


# Up to this (a lower bound of the) condition number a float32 factor preconditions well; above, the nearly null
# directions are damped at this share of the columns' squares and left to the sketch.
MAX_UNDAMPED_CONDITION, DAMPING = 3e5, 1e-10
# Rows of the sketch that are solved with at once: each needs several times its own memory meanwhile.
TOGETHER, COLUMNS_TOGETHER = 64, 128


@dataclass(frozen=True)
class SketchedDissection:
    """``(A^T w^2 A + U^T U)^-1``: weight rows by nested dissection, the other rows U or a sketch of them by Woodbury.

    With ``R^T R = A^T w^2 A`` and ``Z = R^-T U^T`` it is ``R^-1 (I - Z (I + Z^T Z)^-1 Z^T) R^-T``.

    Attributes
    ----------
    system : System
        The weight rows and the others or their sketch: the equations that this is the preconditioner of.
    factors : list of DissectionFactor
        R, one a sample, or one for all where all outputs are known.
    z : Tensor, shape (unknowns, k)
        Z, in the order of the factors.
    core : Tensor, shape (k, k)
        Cholesky factor of ``I + Z^T Z``.
    """

    system: System
    factors: list[DissectionFactor]
    z: Tensor
    core: Tensor

    @classmethod
    def create(cls, system: System) -> SketchedDissection | None:
        """Factor a balanced system; None where rows are missing beyond what damping and the sketch can fill."""
        (rows,) = (block for block in system.blocks if isinstance(block, WeightRows))
        others = [block for block in system.blocks if block is not rows]
        size = sketch_size(rows)
        if not are_few(others, size):
            others = [SketchRows.create(others, size, system.shape, rows.rhs)]
        try:
            factors = _factor(rows)
            z = rows.rhs.new_empty(math.prod(system.shape), sum(block.rhs.numel() for block in others))
            first = 0
            for rows_of_u in each_row(others, TOGETHER):
                last = first + len(rows_of_u)
                z[:, first:last] = _solve_rt(factors, rows_of_u)
                first = last
            core = torch.linalg.cholesky(torch.eye(z.shape[1]).to(z) + _gram(z))
        except LinAlgError:
            return None
        return cls(System(system.shape, (*others, rows)), factors, z, core)

    def __call__(self, v: Tensor) -> Tensor:
        """Apply the inverse to v, (B, C, *in)."""
        y = _solve_rt(self.factors, v.unsqueeze(0))
        y = y - self.z @ torch.cholesky_solve(self.z.mT @ y, self.core)
        if len(self.factors) == 1:
            return self.factors[0].solve_r(y.view(-1, len(v)))
        parts = y.view(len(v), -1)
        return torch.stack([factor.solve_r(part) for factor, part in zip(self.factors, parts, strict=True)])


def _gram(z: Tensor) -> Tensor:
    """``Z^T Z``, each product of two columns once."""
    gram = z.new_empty(z.shape[1], z.shape[1])
    for first in range(0, len(gram), COLUMNS_TOGETHER):
        columns = slice(first, min(first + COLUMNS_TOGETHER, len(gram)))
        product = z[:, first:].mT @ z[:, columns]
        gram[columns, first:], gram[first:, columns] = product.mT, product
    return gram


def _factor(rows: WeightRows) -> list[DissectionFactor]:
    """R of each sample, undamped if well conditioned."""
    masks: list[Tensor | None] = list(rows.row_weight)
    scale = 1.0
    if rows.uniform:
        masks, scale = [None], float(rows.row_weight.flatten()[0])
    geometry, weight = rows.geometry, rows.weight * scale
    if not leaves_open(geometry, weight):
        factors = [DissectionFactor.factor(geometry, weight, mask, dtype=torch.float32) for mask in masks]
        if all(f.condition_estimate <= MAX_UNDAMPED_CONDITION and not f.n_untouched for f in factors):
            return factors
        del factors  # before the next ones take as much memory
    damping = DAMPING * float(rows.diagonal().max())
    return [DissectionFactor.factor(geometry, weight, mask, damping=damping) for mask in masks]


def _solve_rt(factors: list[DissectionFactor], v: Tensor) -> Tensor:
    """``R^-T`` of v (k, B, C, *in), as (unknowns, k): sample by sample, or together where they share their factor."""
    if len(factors) > 1:
        return torch.cat([factor.solve_rt(part) for factor, part in zip(factors, v.unbind(1), strict=True)])
    y = factors[0].solve_rt(v.flatten(0, 1))
    return y.view(len(y), *v.shape[:2]).transpose(1, 2).flatten(0, 1)


def gradient_blocks(system: System) -> list[GradientRows]:
    """The gradient rows whose stride phases agree with those of the block with the most equations."""
    parts = [gradient_part(block) for block in system.blocks]
    blocks = [part for part in parts if part is not None and part.count]
    if not blocks:
        return []
    main = max(blocks, key=lambda block: block.count).geometry
    return [b for b in blocks if (b.geometry.stride, b.geometry.groups) == (main.stride, main.groups)]
