"""The pattern: which linear piece every element of every piecewise layer is on, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """A (partial) assignment of pieces; what it leaves out, a pass decides from the data.

    Attributes
    ----------
    pieces : mapping of str to Tensor
        By step name, of the step's output shape. For an activation with kinks or flat pieces: its output of
        the forward run that proposes the pattern, whose side of each kink counts. For a maximum: the flat position
        in its input that each output came from (torch's ``return_indices``), -1 where unknown. For an activation that
        is not monotone: the number of the branch.
    confidence : mapping of str to Tensor
        How sure, 0 to 1, same shapes; 1 where left out.
    thresholds : mapping of str to float
        By step name, the threshold beside a flat piece in units of the noise, where pieces are found from the data.
    origin : str
        Who proposed it, for the report.
    """

    pieces: Mapping[str, Tensor] = field(default_factory=dict)
    confidence: Mapping[str, Tensor] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    origin: str = ""

    def with_pieces(self, pieces: Mapping[str, Tensor], origin: str = "") -> Pattern:
        """The same with further (or other) pieces."""
        return replace(self, pieces={**self.pieces, **pieces}, origin=origin or self.origin)

    def with_threshold(self, step: str, factor: float) -> Pattern:
        """The same with another threshold at one step."""
        return replace(self, thresholds={**self.thresholds, step: factor})
