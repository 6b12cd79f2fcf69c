"""Constants that a norm hides of a ReLU's output, told by the gradient of a bias in front of it.

A norm behind a convolution takes off one constant a channel and stride class of the convolution's input z
(`hidden_classes`). Where z is a ReLU's output, a class with zeros shows its constant: its lowest values are 0. Whether
a single lowest value is one tells ``db = sum of dL/dz over all z > 0``, which misses exactly that value's gradient. In
a class without zeros no gradient of this layer or of those behind shows the constant, but all of its values pass their
gradients on: the layers in front need no more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

# What sums may miss, relative to the sizes of their terms: the layers behind leave far less in their gradients, and one
# term that should not be there misses more.
AGREES = 1e-7
# Classes of one channel of which it is tried whether they have a zero.
MOST_CLASSES = 6


@dataclass(frozen=True)
class Placed:
    """Values with their constants, which of them are determined, and which lie in a class that has no zero."""

    values: Tensor
    determined: Tensor
    positive: Tensor


def place_by_bias(z: Tensor, determined: Tensor, masks: Tensor, grad: Tensor, grad_bias: Tensor) -> Placed:
    r"""Tell single zeros from lowest values that are none.

    Parameters
    ----------
    z, determined : Tensor
        (B, C, \*in): the lowest value of each class is 0; what is determined.
    masks : Tensor
        (R, \*in) bool: the positions of each class.
    grad : Tensor
        ``dL/dz``, which does not depend on the constants.
    grad_bias : Tensor
        (C,): its sum over the positive z.

    Returns
    -------
    Placed
        As it was where not exactly one assignment of zeros to classes agrees with the bias.
    """
    z, determined, positive = z.clone(), determined.clone(), torch.zeros_like(determined)
    passed = grad * (z > AGREES * float(z.abs().max()))
    members = masks.expand(len(z), *masks.shape).unbind(1)
    for channel in range(z.shape[1]):
        value, fixed = z[:, channel], determined[:, channel]
        open_ones = [member for member in members if not bool(fixed[member].all())]
        terms = [_of_lowest(value, grad[:, channel], member) for member in open_ones]
        missing = float(grad_bias[channel] - passed[:, channel].sum())
        size = float(passed[:, channel].abs().sum()) + sum(map(abs, terms))
        without_zero = _only_choice(terms, missing, AGREES * size)
        for member, is_positive in zip(open_ones, without_zero, strict=False):
            positive[:, channel][member] = is_positive
            fixed[member] = not is_positive
            value[member] += value[member].mean() * is_positive
    return Placed(z, determined, positive)


def _of_lowest(value: Tensor, grad: Tensor, member: Tensor) -> float:
    """The gradient of a class's lowest value."""
    return float(grad[member][value[member].argmin()])


def _only_choice(terms: list[float], missing: float, tolerance: float) -> tuple[bool, ...]:
    """Which terms add up to what is missing; nothing if several choices do, or none."""
    if not 0 < len(terms) <= MOST_CLASSES:
        return ()
    fitting = []
    for choice in itertools.product((False, True), repeat=len(terms)):
        total = sum(term for term, taken in zip(terms, choice, strict=True) if taken)
        if abs(missing - total) <= tolerance:
            fitting.append(choice)
    return fitting[0] if len(fitting) == 1 else ()
