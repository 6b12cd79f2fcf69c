"""Activations that fall, then rise: GELU, SiLU, Mish, Hardswish. A negative output has two inputs, one on either side.

Which side is hidden. On a given side everything is a function of the output ``a`` again: ``o = f^-1(a)``, ``f'(o)``.
Far to the left they underflow: ``a`` is 0, so is the derivative, and ``o`` cannot be known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rconv_fast.layers.base import Operands, Rule
from rconv_fast.layers.knowledge import Knowledge

# Bisections that halve any interval of doubles down to neighbours.
HALVINGS = 120
# All of them are above their least value by here, and have underflowed (or are flat) below the other.
RISEN, GONE = 2.0, -800.0
# Values this close to 0, relative to the largest, say nothing of the left side: a and f' are 0 up to rounding.
UNDERFLOW = 1e-14
RIGHT, LEFT = 0, 1


@dataclass(frozen=True)
class Valley:
    """One activation with a single minimum.

    Attributes
    ----------
    name : str
        The torch name.
    function : callable
        ``a = f(o)``.
    """

    name: str
    function: Callable[[Tensor], Tensor]

    def slope(self, o: Tensor) -> Tensor:
        """``f'(o)``."""
        with torch.enable_grad():
            leaf = o.detach().requires_grad_()
            (derivative,) = torch.autograd.grad(self.function(leaf).sum(), leaf)
        return derivative

    @cached_property
    def bottom(self) -> float:
        """The input of the least value."""
        low, high = torch.tensor([-2.9, 0.0], dtype=torch.float64)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if float(self.slope(middle)) < 0 else (low, middle)
        return float(high)

    def inverse(self, a: Tensor, left: Tensor) -> Tensor:
        """``o`` on the left (where `left`) or right of the bottom; outputs below the least value give the bottom."""
        high = torch.where(left, self.bottom, a.clamp_min(0) + RISEN)
        low = torch.where(left, GONE, self.bottom)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = (self.function(middle) < a) ^ left
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def underflows(self, a: Tensor) -> Tensor:
        """Outputs that are 0 up to rounding: on the left side nothing is known of their inputs."""
        return a >= -UNDERFLOW * float(a.abs().max())

    def has_sides(self, a: Tensor) -> Tensor:
        """Outputs whose input may be on either side."""
        return a <= UNDERFLOW * float(a.abs().max())


GELU, GELU_TANH = Valley("GELU", F.gelu), Valley("GELU", lambda o: F.gelu(o, approximate="tanh"))
SILU, MISH, HARDSWISH = Valley("SiLU", F.silu), Valley("Mish", F.mish), Valley("Hardswish", F.hardswish)
VALLEY_CALLS = {"gelu": GELU, "silu": SILU, "mish": MISH, "hardswish": HARDSWISH}


def valley_of_module(module: nn.Module) -> Valley | None:
    """The valley a module computes, or None."""
    match module:
        case nn.GELU():
            return valley_of_call("gelu", module.approximate)
        case nn.SiLU():
            return SILU
        case nn.Mish():
            return MISH
        case nn.Hardswish():
            return HARDSWISH
    return None


def valley_of_call(name: str, approximate: str) -> Valley:
    """The valley of a function or method."""
    return GELU_TANH if approximate == "tanh" else VALLEY_CALLS[name]


@dataclass(frozen=True)
class ValleyRule(Rule):
    """An activation with a valley, sides unknown."""

    valley: Valley
    hidden: ClassVar[bool] = True
    needs_output: ClassVar[bool] = True

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The activation's name."""
        return self.valley.name

    def at(self, piece: Tensor) -> SideRule:
        """The rule with every value on a given side (0: right, 1: left)."""
        return SideRule(self.valley, piece == LEFT)

    def piece_of(self, x: Tensor, tie: float = 0.0) -> Tensor:
        """The sides of a forward run's inputs."""
        return torch.where(x < self.valley.bottom, LEFT, RIGHT)


@dataclass(frozen=True)
class SideRule(Rule):
    """An activation with a valley on known sides: invertible, its derivative a function of its output."""

    valley: Valley
    left: Tensor
    needs_output: ClassVar[bool] = True

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The activation's name."""
        return self.valley.name

    def _gone(self, y: Tensor) -> Tensor:
        return self.left & self.valley.underflows(y)

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """``f'(o) dL/da``."""
        assert y is not None
        return torch.where(self._gone(y), 0.0, grad * self.valley.slope(self.valley.inverse(y, self.left)))

    def pull_value(self, y: Knowledge, operand: int, x: Operands) -> Knowledge:
        """``o``; its error is a's times ``1/f'``, so its weight is ``|f'|``."""
        o = self.valley.inverse(y.value, self.left)
        weight = torch.where(self._gone(y.value), 0.0, self.valley.slope(o).abs().clamp_max(1.0)) * y.weight
        return Knowledge(torch.where(weight > 0, o, 0.0), weight)
