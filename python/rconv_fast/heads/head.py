"""The last layer as a value: its gradient, its parameters, its loss, and how well the gradient is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.errors import require, require_type
from rconv_fast.losses import REDUCTIONS, Loss
from rconv_fast.rounding import rounding_of

# Noise below this share of the gradient is treated as rounding: the equations then hold exactly for all purposes.
_ROUNDING_LIKE = 1e-6


@dataclass(frozen=True)
class Head:
    """A fully connected last layer in float64.

    Attributes
    ----------
    grad_weight, grad_bias : Tensor, shapes (n, d) and (n,)
        Gradients; `grad_bias` is None where there is none.
    weight, bias : Tensor, shapes (n, d) and (n,)
        Parameters; zeros for a missing bias.
    loss : Loss
        What was minimised.
    rounding : float
        Relative rounding of the gradient's entries.
    sigma_weight, sigma_bias : Tensor or None
        Standard deviation of each entry where the noise is more than rounding.
    scale : float or None
        Factor by which the gradients are multiplied; None where it is to be found.
    budget : Budget
        When the searches end.
    """

    grad_weight: Tensor
    grad_bias: Tensor | None
    weight: Tensor
    bias: Tensor
    loss: Loss
    rounding: float
    sigma_weight: Tensor | None = None
    sigma_bias: Tensor | None = None
    scale: float | None = 1.0
    budget: Budget = Budget()  # noqa: RUF009 (frozen)

    @property
    def n_classes(self) -> int:
        """Number of outputs."""
        return len(self.weight)

    @property
    def has_bias(self) -> bool:
        """Whether the bias has a gradient."""
        return self.grad_bias is not None

    @property
    def noisy(self) -> bool:
        """Whether the noise is more than rounding."""
        return self.sigma_weight is not None

    def logits(self, x: Tensor) -> Tensor:
        """``x W^T + c``."""
        return x @ self.weight.mT + self.bias

    def share_of_weight(self, x: Tensor, labels: Tensor) -> Tensor:
        """What a sample's weight is multiplied by: ``softmax_y`` where the loss is taken of it and not of its log.

        ``L = -softmax_y`` has the gradient ``softmax_y (softmax - e_y)`` by the logits.
        """
        if not self.of_probabilities:
            return torch.ones_like(x[:, 0])
        return torch.softmax(self.logits(x), 1).gather(1, labels[:, None])[:, 0]

    @property
    def of_probabilities(self) -> bool:
        """Whether the loss is ``-softmax_y`` (with its logarithm, "nll" is cross-entropy)."""
        return self.loss.name == "nll"

    def mismatch(self, x: Tensor, delta: Tensor) -> float:
        """``|dW - sum_b delta_b x_b^T| / |dW|`` and the same for db, the larger."""
        left = (self.grad_weight - delta.mT @ x).norm() / self.grad_weight.norm()
        if self.grad_bias is not None:
            left = torch.maximum(left, (self.grad_bias - delta.sum(0)).norm() / self.grad_bias.norm())
        return float(left)

    @classmethod
    def create(
        cls,
        grad_weight: Tensor,
        grad_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        loss: Loss,
        *,
        rounding: float | None = None,
        sigma: tuple[Tensor, Tensor | None] | None = None,
        scale: float | None = 1.0,
        budget: Budget = Budget(),  # noqa: B008 (frozen)
    ) -> Head:
        """From tensors of any floating dtype; noise `sigma` of weight and bias that is like rounding counts as that."""
        rounding = rounding_of(grad_weight, grad_bias) if rounding is None else rounding
        dw = grad_weight.detach().double()
        sigma_weight = sigma_bias = None
        if sigma is not None and grad_bias is not None and sigma[1] is None:
            sigma = (sigma[0], sigma[0].double().square().mean().sqrt())
        if sigma is not None:
            share = float(_rms(sigma[0].double()) / _rms(dw))
            if share <= _ROUNDING_LIKE:
                rounding = max(rounding, share)
            else:
                sigma_weight = sigma[0].double().expand_as(dw)
                sigma_bias = None if grad_bias is None or sigma[1] is None else sigma[1].double().expand_as(grad_bias)
        return cls(
            grad_weight=dw,
            grad_bias=None if grad_bias is None else grad_bias.detach().double(),
            weight=weight.detach().double(),
            bias=(weight.new_zeros(len(weight)) if bias is None else bias.detach()).double(),
            loss=loss,
            rounding=rounding,
            sigma_weight=sigma_weight,
            sigma_bias=sigma_bias,
            scale=scale,
            budget=budget,
        )


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def check_gradients(function: str, grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor | None = None) -> None:
    """Refuse gradients of a fully connected layer of a wrong type or shape, with NaN or Inf, or that are zero."""
    named = [("grad_weight", grad_weight), ("grad_bias", grad_bias), ("weight", weight)]
    for name, value in named:
        if value is None:
            continue
        require_type(isinstance(value, Tensor), function, name, "be a torch.Tensor", type(value).__name__)
        require_type(value.is_floating_point(), function, name, "be of a real floating type", value.dtype)
        require(bool(torch.isfinite(value).all()), function, name, "be finite", "NaN or Inf")
    shape = tuple(grad_weight.shape)
    require(len(shape) == 2 and 0 not in shape, function, "grad_weight", "have shape (n, d), n, d > 0", shape)
    if grad_bias is not None:
        got = tuple(grad_bias.shape)
        require(got == shape[:1], function, "grad_bias", f"have shape {shape[:1]}", got)
    if weight is not None:
        got = tuple(weight.shape)
        require(got == shape, function, "weight", f"have grad_weight's shape {shape}", got)
    require(bool(grad_weight.any()), function, "grad_weight", "not be zero", "a zero gradient")


def check_head(
    function: str,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    reduction: str,
) -> None:
    """Refuse a head whose tensors do not belong together, and an unknown reduction."""
    check_gradients(function, grad_weight, grad_bias, weight)
    wanted = (grad_weight.shape[0],)
    if bias is not None:
        require(tuple(bias.shape) == wanted, function, "bias", f"have shape {wanted}", tuple(bias.shape))
    require(grad_bias is None or bias is not None, function, "bias", "be given with grad_bias", None)
    require(reduction in REDUCTIONS, function, "reduction", f"be one of {', '.join(REDUCTIONS)}", repr(reduction))
