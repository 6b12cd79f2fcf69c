"""Dropout in training mode: ``z = m a / (1 - p)`` with a private mask m of zeros and ones.

A dropped value and one that is 0 anyway look alike, and neither passes a gradient on: behind a ReLU the values that are
not zero, times 1 - p, are all that the recursion needs. Behind other activations an exact zero is the mask.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rconv_fast.layers.base import Operands, Rule
from rconv_fast.layers.knowledge import Knowledge

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DROPOUT_CALLS = {"dropout", "dropout1d", "dropout2d", "dropout3d"}


@dataclass(frozen=True)
class DropoutRule(Rule):
    """``z = m a / (1 - p)``: where z is 0, a is not known and no gradient reaches it.

    Attributes
    ----------
    p : float
        Share of the values that is dropped.
    dead_is_zero : bool
        Whether a is an activation's output that passes no gradient where it is 0: then it may be taken as 0 where z is.
    """

    kind: str
    p: float
    dead_is_zero: bool = False
    needs_output: ClassVar[bool] = True

    @property
    def factor(self) -> float:
        """Of the values that are kept."""
        return 1 / (1 - self.p)

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """``m dL/dz / (1 - p)``."""
        assert y is not None
        return torch.where(y != 0, grad * self.factor, 0.0)

    def pull_value(self, y: Knowledge, operand: int, x: Operands) -> Knowledge:
        """``a = (1 - p) z``, where z is not 0 or it doesn't matter."""
        weight = y.weight if self.dead_is_zero else y.weight * (y.value != 0)
        return Knowledge(y.value / self.factor, weight)


# A zero is a value this far below the largest, or this many roundings of it; the others lie at least GAP above it.
# Where at least half as many lie below the gap as are dropped on average, a smaller one is none of chance: rounding's
# largest is a few times its usual size.
ZERO, ZERO_ROUNDINGS, GAP, GAP_OF_MANY = 1e-6, 1e3, 30.0, 6.0


def with_exact_zeros(z: Tensor, rounding: float, p: float) -> Tensor:
    """Values of a dropout's output whose zeros are exact: those below the widest gap of the small magnitudes.

    Parameters
    ----------
    z : Tensor
        As they were solved, zeros off by the noise.
    rounding : float
        Relative rounding of the gradients.
    p : float
        The share that is dropped.
    """
    size = z.abs()
    largest = float(size.max())
    ordered = size.flatten().sort().values.clamp_min(rounding * largest)  # below it, gaps say nothing
    below = ordered[ordered <= max(ZERO, ZERO_ROUNDINGS * rounding) * largest]
    if not len(below) or largest == 0:
        return z
    steps = (ordered[1 : len(below) + 1] / below[: len(ordered) - 1]).log()
    widest = int(steps.argmax()) if len(steps) else 0
    many = widest + 1 >= p / 2 * len(ordered)
    if not len(steps) or float(steps[widest].exp()) < (GAP_OF_MANY if many else GAP):
        return z
    return torch.where(size <= below[widest], 0.0, z)


class FixedDropout(TorchFunctionMode):
    """While it is active, dropouts in training mode drop what `masks` say, in the order of their calls."""

    def __init__(self, masks: Iterable[Tensor]) -> None:
        super().__init__()
        self._masks = iter(list(masks))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") != F.__name__ or func.__name__ not in DROPOUT_CALLS:
            return func(*args, **(kwargs or {}))
        kept = keep_all(*args, **(kwargs or {}))
        return kept if kept is args[0] else kept * next(self._masks).to(kept)


def with_masks(model: nn.Module, masks: Sequence[Tensor]) -> nn.Module:
    """The model (its parameters, not copies of them) with these masks in its dropouts, in the order of their calls."""
    if not masks:
        return model
    twin = copy.copy(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with FixedDropout(masks):
            return model.forward(*args, **kwargs)

    twin.forward = forward
    return twin


def keep_all(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Torch's functional dropouts, by torch's names of their arguments, with a mask of ones."""
    return input / (1 - p) if training and p > 0 else input
