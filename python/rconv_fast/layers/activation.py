"""Activations, inverted and differentiated in terms of their output ``a`` (R-CONV, table 1).

The derivative of SoftPlus in the paper's table is wrong; it is ``A' = 1 - exp(-beta a)``. Every row is tested
against autograd. Activations that fall, then rise (GELU, SiLU, Mish, Hardswish) have no such form: see `valley`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rconv_fast.layers.base import Operands, Rule
from rconv_fast.layers.knowledge import Knowledge

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """One monotone activation.

    Attributes
    ----------
    name : str
        The torch name.
    inverse : callable
        ``o`` from ``a``, where ``derivative(a) > 0``.
    derivative : callable
        ``A'(o)`` in terms of ``a``.
    low, high : float
        The closed range of outputs.
    kinks : tuple of float
        Outputs at which the derivative jumps.
    flats : tuple of float
        Outputs that whole ranges of ``o`` map to (0 for ReLU): ``o`` is unknown there, the derivative 0.
    """

    name: str
    inverse: Function
    derivative: Function
    low: float = -math.inf
    high: float = math.inf
    kinks: tuple[float, ...] = ()
    flats: tuple[float, ...] = ()


def _ones(a: Tensor) -> Tensor:
    return torch.ones_like(a)


def _step(condition: Tensor, a: Tensor, inside: float, outside: float) -> Tensor:
    """One of two numbers, in a's dtype (``torch.where`` of two numbers would round them to float32)."""
    return torch.where(condition, torch.full_like(a, inside), torch.full_like(a, outside))


def identity() -> Activation:
    """``a = o``."""
    return Activation("Identity", lambda a: a, _ones)


def sigmoid() -> Activation:
    """``A' = a (1 - a)``."""
    return Activation("Sigmoid", torch.logit, lambda a: a * (1 - a), 0.0, 1.0)


def log_sigmoid() -> Activation:
    """``A' = 1 - exp(a)``."""
    return Activation("LogSigmoid", lambda a: a - torch.log(-torch.expm1(a)), lambda a: -torch.expm1(a), high=0.0)


def tanh() -> Activation:
    """``A' = 1 - a^2``."""
    return Activation("Tanh", torch.atanh, lambda a: 1 - a.square(), -1.0, 1.0)


def arctan() -> Activation:
    """``A' = 1 / (1 + tan(a)^2) = cos(a)^2``."""
    half = math.pi / 2
    return Activation("ArcTan", torch.tan, lambda a: torch.cos(a).square(), -half, half)


def softsign() -> Activation:
    """``A' = (1 - |a|)^2``."""
    return Activation("Softsign", lambda a: a / (1 - a.abs()), lambda a: (1 - a.abs()).square(), -1.0, 1.0)


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    """``A' = 1 - exp(-beta a)``; linear above the threshold, as in torch."""

    def inverse(a: Tensor) -> Tensor:
        return torch.where(a * beta > threshold, a, a + torch.log(-torch.expm1(-beta * a)) / beta)

    def derivative(a: Tensor) -> Tensor:
        return torch.where(a * beta > threshold, 1.0, -torch.expm1(-beta * a))

    return Activation("Softplus", inverse, derivative, low=0.0)


def leaky_relu(slope: float = 0.01) -> Activation:
    """``A' = 1`` for a >= 0, else the slope."""
    return Activation(
        "LeakyReLU",
        lambda a: torch.where(a >= 0, a, a / slope),
        lambda a: _step(a >= 0, a, 1.0, slope),
        kinks=(0.0,),
    )


def prelu(weight: Tensor) -> Activation:
    """LeakyReLU with a learned slope, one or one a channel (B, C, ...)."""

    def slope(a: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (a.ndim - 2)
        return weight.detach().to(a).reshape(shape)

    return Activation(
        "PReLU",
        lambda a: torch.where(a >= 0, a, a / slope(a)),
        lambda a: torch.where(a >= 0, torch.ones_like(a), slope(a)),
        kinks=(0.0,),
    )


def elu(alpha: float = 1.0, scale: float = 1.0) -> Activation:
    """``A' = 1`` for a >= 0, else ``a + alpha`` (times the scale of SELU)."""
    return Activation(
        "ELU",
        lambda a: torch.where(a >= 0, a / scale, torch.log1p(a.clamp_max(0) / (scale * alpha))),
        lambda a: torch.where(a >= 0, scale, a + scale * alpha),
        low=-scale * alpha,
        kinks=() if alpha == 1.0 else (0.0,),
    )


def celu(alpha: float = 1.0) -> Activation:
    """``A' = 1`` for a >= 0, else ``1 + a / alpha``."""
    return Activation(
        "CELU",
        lambda a: torch.where(a >= 0, a, alpha * torch.log1p(a.clamp_max(0) / alpha)),
        lambda a: torch.where(a >= 0, 1.0, 1 + a / alpha),
        low=-alpha,
    )


def clamp(name: str, low: float = -math.inf, high: float = math.inf, slope: float = 1.0) -> Activation:
    """``slope * o + c`` between two flat pieces: ReLU, ReLU6, Hardtanh (slope 1, c 0)."""
    ends = tuple(end for end in (low, high) if math.isfinite(end))
    return Activation(
        name,
        lambda a: a / slope,
        lambda a: _step((a > low) & (a < high), a, slope, 0.0),
        low,
        high,
        kinks=ends,
        flats=ends,
    )


def relu() -> Activation:
    """``A' = 1`` for a > 0, else 0."""
    return clamp("ReLU", low=0.0)


# torch's backward of hardsigmoid rounds 1/6 to float32 in float64 too.
HARDSIGMOID_SLOPE = float(torch.tensor(1 / 6, dtype=torch.float32))


def hardsigmoid() -> Activation:
    """``a = clamp(o / 6 + 1/2, 0, 1)``, ``A' = 1/6`` between the ends."""
    return Activation(
        "Hardsigmoid",
        lambda a: 6 * a - 3,
        lambda a: _step((a > 0) & (a < 1), a, HARDSIGMOID_SLOPE, 0.0),
        0.0,
        1.0,
        kinks=(0.0, 1.0),
        flats=(0.0, 1.0),
    )


def of_module(module: nn.Module) -> Activation | None:
    """The activation a module computes in its present mode, or None if it isn't one we can invert."""
    match module:
        case nn.ReLU():
            return relu()
        case nn.ReLU6():
            return clamp("ReLU6", 0.0, 6.0)
        case nn.Hardtanh():
            return clamp("Hardtanh", module.min_val, module.max_val)
        case nn.LeakyReLU() if module.negative_slope > 0:
            return leaky_relu(module.negative_slope)
        case nn.LeakyReLU() if module.negative_slope == 0:
            return relu()
        case nn.PReLU() if bool((module.weight > 0).all()):
            return prelu(module.weight)
        case nn.RReLU() if not module.training:
            return leaky_relu((module.lower + module.upper) / 2)
        case nn.Sigmoid():
            return sigmoid()
        case nn.LogSigmoid():
            return log_sigmoid()
        case nn.Tanh():
            return tanh()
        case nn.Softsign():
            return softsign()
        case nn.Softplus() if module.beta > 0:
            return softplus(module.beta, module.threshold)
        case nn.ELU() if module.alpha > 0:
            return elu(module.alpha)
        case nn.SELU():
            return elu(1.6732632423543772848170429916717, 1.0507009873554804934193349852946)
        case nn.CELU() if module.alpha > 0:
            return celu(module.alpha)
        case nn.Hardsigmoid():
            return hardsigmoid()
        case nn.Identity():
            return identity()
    return None


# Functional forms and the modules that compute the same: those take the same arguments after the tensor.
FUNCTIONS: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "logsigmoid": nn.LogSigmoid,
    "tanh": nn.Tanh,
    "softsign": nn.Softsign,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "hardsigmoid": nn.Hardsigmoid,
}

# Monotone with some parameters only (and, for RReLU, in evaluation mode).
MONOTONE_IN_PART = (nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Softplus, nn.ELU, nn.CELU)
NOT_MONOTONE = ("glu",)


def of_function(name: str, *args: Any, **kwargs: Any) -> Activation | None:
    """The activation a functional or method call computes, or None if it isn't one we can invert."""
    if name in ("atan", "arctan"):
        return arctan()
    if name == "clamp":
        return _clamp_call(*args, **kwargs)
    build = FUNCTIONS.get(name)
    return of_module(build(*args, **kwargs)) if build is not None else None


def _clamp_call(min: float | None = None, max: float | None = None) -> Activation:
    """``torch.clamp``, with torch's names of its arguments."""
    return clamp("clamp", -math.inf if min is None else min, math.inf if max is None else max)


# Below this derivative an activation is saturated: inverting it would amplify noise by more than the inverse.
MIN_DERIVATIVE = 1e-7


@dataclass(frozen=True)
class ActivationRule(Rule):
    """An element-wise monotone activation; its derivative is a function of its output."""

    activation: Activation
    needs_output: ClassVar[bool] = True

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The activation's name."""
        return self.activation.name

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """``A'(o) dL/da``."""
        assert y is not None
        return grad * self.activation.derivative(y)

    def pull_value(self, y: Knowledge, operand: int, x: Operands) -> Knowledge:
        """``o`` where the derivative is not 0; its error is a's times ``1/A'``: the weight is ``A'``."""
        slope = self.activation.derivative(y.value)
        weight = torch.where(slope > MIN_DERIVATIVE, slope.clamp_max(1.0), 0.0) * y.weight
        value = torch.where(weight > 0, self.activation.inverse(y.value), 0.0)
        bad = ~torch.isfinite(value)
        return Knowledge(value.masked_fill(bad, 0.0), weight.masked_fill(bad, 0.0))
