"""What a rule knows of its layer ``y = f(x)``, with ``dL/dy`` given.

* ``pull_gradient``: ``dL/dx`` (to each operand);
* ``pull_value``: the values of x that follow from values of y one by one (inverting an activation, an affine
  map, a reshape, a sum whose other operand is known);
* ``rows``: linear equations for x (a convolution's gradient and weight constraints, an average);
* ``at``: the same layer once it is known which linear piece each of its values is on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.solve import NormalisedConv, Rows

Forward = Callable[..., Tensor]
Operands = Sequence[Tensor | None]
Equations = Rows | NormalisedConv


class Rule:
    """The default: a layer that says nothing of its input. `x` are the operands, None where not recovered."""

    kind: str
    needs_output: ClassVar[bool] = False
    hidden: ClassVar[bool] = False
    own_statistics: ClassVar[bool] = False

    def at(self, piece: Tensor) -> Rule:
        """The rule of this layer with every value on the linear piece that `piece` names; only if `hidden`."""
        raise NotImplementedError

    def piece_of(self, x: Tensor, tie: float = 0.0) -> Tensor:
        """The linear pieces that an input's values are on, as a forward run takes them; only if `hidden`.

        Values that differ by `tie`, relative, are equal.
        """
        raise NotImplementedError

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """``dL/dx`` of one operand of the given shape, from ``dL/dy`` (and y where `needs_output`)."""
        raise NotImplementedError

    def pull_value(self, y: Knowledge, operand: int, x: Operands) -> Knowledge | None:
        """What the output's values say of one operand, value by value."""
        return None

    def rows(self, grad: Tensor, y: Knowledge | None, shape: torch.Size) -> list[Rows]:
        """Linear equations for the operand."""
        return []

    def rows_through(
        self, before: Rule, forward: Forward, grad: Tensor, y: Knowledge | None, shape: torch.Size
    ) -> Sequence[Equations]:
        """Equations for the operand of the layer `before` this one, whose output y is this one's.

        For a layer that cannot be inverted value by value, but is linear behind a linear one: ``y = f(before(x))``.
        `forward` is ``f(before(.))``, `grad` is ``dL/dy``, `shape` that of x.
        """
        return []


@dataclass(frozen=True)
class UnsupportedRule(Rule):
    """A layer the recursion cannot pass."""

    kind: str
    reason: str
