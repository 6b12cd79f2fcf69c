"""What a solve hands back: the answer, and the evidence that it is the only one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rconv_fast.solve.deflated import DeflatedInverse
from rconv_fast.solve.dense import PseudoInverse

PROOFS = ("cholesky", "eigenvalues", "nonnegative", "pattern", "probe", "none")


@dataclass(frozen=True)
class Evidence:
    """How an answer was found, and what speaks for its being the only one.

    Attributes
    ----------
    rank, unknowns, rows : int
        Numerical rank of the system (its bound where it was not computed), values to find, equations.
    residual : float
        ``||b - M x|| / ||b||`` of the balanced system.
    condition : float
        Estimated condition number of the system that was solved (NaN where it was not estimated).
    solver : str
        Name of the method, for people.
    proof : {"cholesky", "eigenvalues", "nonnegative", "pattern", "probe", "none"}
        What the determined values rest on: a factor of a matrix far from singular; its spectrum; equations and
        ``x >= 0`` together; the linear piece each value is on; random vectors that came back; nothing.
    converged : bool
        Whether the method met its tolerance.
    iterations : int
        Iterations, refinements included.
    hidden : int
        Constants, each shared by a class of values, that norms behind the layer take off and nothing else shows.
    """

    rank: int
    unknowns: int
    rows: int
    residual: float
    condition: float
    solver: str
    proof: str
    converged: bool = True
    iterations: int = 0
    hidden: int = 0


class HasEvidence:
    """Read-only access to the fields of ``self.evidence``."""

    evidence: Evidence

    @property
    def rank(self) -> int:
        """Numerical rank of the system (its bound where it was not computed)."""
        return self.evidence.rank

    @property
    def unknowns(self) -> int:
        """Values to find."""
        return self.evidence.unknowns

    @property
    def rows(self) -> int:
        """Equations."""
        return self.evidence.rows

    @property
    def residual(self) -> float:
        """Relative residual of the equations."""
        return self.evidence.residual

    @property
    def condition(self) -> float:
        """Estimated condition number, NaN where it was not estimated."""
        return self.evidence.condition

    @property
    def solver(self) -> str:
        """Name of the method."""
        return self.evidence.solver

    @property
    def proof(self) -> str:
        """What the determined values rest on."""
        return self.evidence.proof

    @property
    def converged(self) -> bool:
        """Whether the method met its tolerance."""
        return self.evidence.converged

    @property
    def iterations(self) -> int:
        """Iterations, refinements included."""
        return self.evidence.iterations

    @property
    def hidden(self) -> int:
        """Constants that norms behind the layer take off and nothing else shows."""
        return self.evidence.hidden


@dataclass(frozen=True)
class Solution(HasEvidence):
    r"""The input of one layer, and how far the equations determine it.

    Attributes
    ----------
    x : Tensor
        Recovered input (B, C, \*in); minimum norm where the equations leave it open.
    determined : Tensor
        Bool, shape of `x`: is this value fixed by the equations.
    evidence : Evidence
        How it was found.
    inverse : PseudoInverse, DeflatedInverse or None
        Of the balanced system, where it was computed: its null space is what the equations leave open.
    """

    x: Tensor
    determined: Tensor
    evidence: Evidence
    inverse: PseudoInverse | DeflatedInverse | None = None
