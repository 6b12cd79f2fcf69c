"""What a solve hands back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rconv_fast.solve.dense import PseudoInverse


@dataclass(frozen=True)
class Solution:
    r"""The input of one layer, and how far the equations determine it.

    Attributes
    ----------
    x : Tensor
        Recovered input (B, C, \*in); minimum norm where the equations leave it open.
    rank, unknowns, rows : int
        Numerical rank of the system (its bound ``min(rows, unknowns)`` where it was not computed), values to
        find, equations.
    determined : Tensor
        Bool, shape of `x`: is this value fixed by the equations.
    residual : float
        ``||b - M x|| / ||b||`` of the balanced system.
    condition : float
        Estimated condition number of the system that was solved (NaN where it was not estimated).
    solver : str
        Name of the method.
    converged : bool
        Whether the method met its tolerance.
    iterations : int
        Iterations, refinements included.
    inverse : PseudoInverse or None
        Of the balanced system, where it was computed: its null space is what the equations leave open.
    """

    x: Tensor
    rank: int
    unknowns: int
    rows: int
    determined: Tensor
    residual: float
    condition: float
    solver: str
    converged: bool
    iterations: int
    inverse: PseudoInverse | None = None
