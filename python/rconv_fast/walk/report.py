"""How one layer's input was found, as a reader sees it."""

from __future__ import annotations

from dataclasses import dataclass

from rconv_fast.solve import Evidence, HasEvidence


@dataclass(frozen=True)
class LayerReport(HasEvidence):
    """How one layer's input was found; rows, unknowns, rank, condition, residual, solver, proof are its evidence's.

    Attributes
    ----------
    name, kind : str
        The layer.
    evidence : Evidence
        Of the solution.
    seconds : float
        Wall time.
    patterns : str
        How a hidden pattern was found; empty where none was hidden.
    """

    name: str
    kind: str
    evidence: Evidence
    seconds: float
    patterns: str = ""
