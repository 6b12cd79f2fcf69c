"""What is known of the values of one tensor inside the network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Knowledge:
    """Values (B, ...) and how well each is known.

    The weight is 0 where nothing is known, 1 as well as the layer behind, less where inverting an activation
    amplified the noise.
    """

    value: Tensor
    weight: Tensor

    @classmethod
    def full(cls, value: Tensor) -> Knowledge:
        """Everything is known."""
        return cls(value, torch.ones_like(value))

    @property
    def is_full(self) -> bool:
        """Whether every value is known."""
        return bool((self.weight > 0).all())

    def merge(self, other: Knowledge) -> Knowledge:
        """Value by value, the better known of the two."""
        better = other.weight > self.weight
        return Knowledge(torch.where(better, other.value, self.value), torch.where(better, other.weight, self.weight))
