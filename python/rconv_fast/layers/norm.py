"""Norms that take their statistics from their input: batch norm in training mode, group, layer and instance norm.

With ``o`` the input, sets of values that share a mean and a deviation (`NormSets`), N values in each:

    ``xhat = (o - mean(o)) / sigma``,  ``sigma^2 = var(o) + eps``,  ``y = gamma xhat + beta``,  ``h = gamma dL/dy``
    ``dL/do = (h - mean(h) - xhat q) / sigma``,  ``q = mean(h xhat)``

Three ways lead to sigma, which is private. The running statistics that a client sends back hold mean and variance of
its batch. Behind a convolution W without them, the loss does not change with the size of W but for eps:

    ``sum_set (w . dW + b db) = sum_set o dL/do = N q eps / sigma^2``.

And where all of y is known, ``mean(xhat^2) = 1 - eps / sigma^2``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rconv_fast.layers.base import Operands, Rule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.solve import ZERO, NormalisedConv, NormSets
from rconv_fast.updates import UNIFORM, spacing

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# A client's mean and variance are sums of many values: off by this many units of their own rounding.
ARITHMETIC = 2.0
OWN_NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Statistics:
    """Mean and ``sqrt(var + eps)`` of the private batch, one a channel, in a shape that broadcasts to it.

    `mean_noise` and `squared_noise` are the standard deviations that rounding leaves in the mean and in ``sigma^2``.
    """

    mean: Tensor
    sigma: Tensor
    mean_noise: Tensor
    squared_noise: Tensor


@dataclass(frozen=True)
class NormRule(Rule):
    """``y = gamma (o - mean(o)) / sigma + beta`` with the statistics of o itself.

    Attributes
    ----------
    sets : NormSets
        Which values share their statistics.
    gamma, beta : Tensor
        In a shape that broadcasts to y.
    eps : float
        Under the root.
    grad_gamma : Tensor or None
        ``dL/dgamma`` in gamma's shape, None where it was not seen or there is none.
    grad_bias : Tensor or None
        ``dL/dbeta``, one a channel.
    statistics : Statistics or None
        Where the client sent them.
    dead_is_zero : bool
        Whether o is the output of activations whose lowest value is an exact 0: that places the mean.
    """

    kind: str
    sets: NormSets
    gamma: Tensor
    beta: Tensor
    eps: float
    grad_gamma: Tensor | None = None
    grad_bias: Tensor | None = None
    statistics: Statistics | None = None
    dead_is_zero: bool = False
    needs_output: ClassVar[bool] = True
    own_statistics: ClassVar[bool] = True

    @property
    def hides_constants(self) -> bool:
        """Whether only the zeros of a ReLU in front place the mean of each channel of the batch."""
        return self.dead_is_zero and self.statistics is None and self.sets.groups is None

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """``dL/do`` from all of y."""
        assert y is not None
        xhat, h = self._normalised(y), self.gamma * grad
        q = self.sets.mean(h * xhat)
        return (self.sets.centre(h) - xhat * q) / self._deviation(xhat)

    def pull_value(self, y: Knowledge, operand: int, x: Operands) -> Knowledge | None:
        """``o = mean + sigma xhat`` with the statistics that were sent, or by all of y and the zeros of a ReLU."""
        xhat, weight = self._normalised(y.value), y.weight * (self.gamma != 0)
        if self.statistics is not None:
            return Knowledge(self.statistics.mean + self.statistics.sigma * xhat, weight)
        if not self.dead_is_zero or not bool((weight > 0).all()):
            return None
        above = self._deviation(xhat) * (xhat - self.sets.lowest(xhat))
        zeros = (above <= ZERO * above.max()).to(above)
        return Knowledge(above - self.sets.mean(above * zeros) / self.sets.mean(zeros), weight)

    def rows_through(
        self, before: Rule, forward: Callable[[Tensor], Tensor], grad: Tensor, y: Knowledge | None, shape: torch.Size
    ) -> list[NormalisedConv]:
        """Everything that is known of a convolution's output: the equations of its input, around an estimate."""
        if not isinstance(before, ConvRule):
            return []
        size = (shape[0], before.geometry.out_channels, *before.geometry.out_size)

        def wide(t: Tensor) -> Tensor:
            return t.expand(grad.shape).reshape(size)

        h = wide(self.gamma * grad)
        known = h.new_zeros(size) if y is None else wide(y.weight * (self.gamma != 0))
        xhat = torch.zeros_like(h) if y is None else wide(self._normalised(y.value))
        q = self._mean_product(h, xhat, known)
        if q is None:
            return []
        if self.statistics is None:
            sigma, noise = self._sigma_behind(before, q, xhat, known)
        else:
            sigma, noise = wide(self.statistics.sigma), torch.ones_like(q)
        if sigma is None:
            return []
        sure = torch.isfinite(sigma)  # a set without a gradient says nothing of its deviation
        by_channel = (1, -1, *(1,) * before.geometry.ndim)
        bias = h.new_zeros(by_channel[:1] * h.ndim) if before.bias is None else before.bias.reshape(by_channel)
        mean = None if self.statistics is None else self.statistics.mean.reshape(by_channel) - bias
        return [
            NormalisedConv(
                geometry=before.geometry,
                weight=before.weight,
                sets=self.sets,
                h=torch.where(sure, h, 0.0),
                q=torch.where(sure, q, 0.0),
                sigma=torch.where(sure, sigma, 1.0),
                mean=mean,
                shift=self.sets.centre(bias.expand(size)),
                trust=_trust(noise),
                xhat=xhat,
                known=known * sure,
                grad_weight=before.grad_weight,
            )
        ]

    def statistics_missed(self, o: Tensor) -> list[Tensor]:
        """How far mean and ``sigma^2`` of o are from those that the client sent, in units of their rounding."""
        sent = self.statistics
        if sent is None:
            return []
        mean = self.sets.mean(o)
        squared = self.sets.mean((o - mean).square()) + self.eps
        return [(mean - sent.mean) / sent.mean_noise, (squared - sent.sigma.square()) / sent.squared_noise]

    def _normalised(self, y: Tensor) -> Tensor:
        """``(y - beta) / gamma``, 0 where gamma is."""
        return torch.where(self.gamma != 0, (y - self.beta) / self.gamma, 0.0)

    def _deviation(self, xhat: Tensor) -> Tensor:
        """``sigma`` from all of xhat: ``mean(xhat^2) = 1 - eps / sigma^2``."""
        if self.statistics is not None:
            return self.statistics.sigma
        slack = 1 - self.sets.mean(xhat.square())
        return (self.eps / slack.clamp_min(torch.finfo(slack.dtype).eps)).sqrt()

    def _mean_product(self, h: Tensor, xhat: Tensor, known: Tensor) -> Tensor | None:
        """``q = mean(h xhat)``: from xhat where h is not 0, else from ``dgamma``; None where neither tells."""
        if not bool(h[known == 0].any()):
            return self.sets.mean(h * torch.where(known > 0, xhat, 0.0)).expand_as(h)
        if self.grad_gamma is None or not (self.sets.groups is None or len(h) == 1):
            return None  # dgamma sums over the samples, each of which has a q of its own
        sums = self.gamma * self.grad_gamma  # of h xhat over all that share one gamma
        each = sums / (h.numel() / sums.numel())
        positions = h.shape[2:] if sums.numel() == h[0].numel() else (1,) * (h.ndim - 2)
        return self.sets.mean(each.reshape(1, h.shape[1], *positions).expand_as(h)).expand_as(h)

    def _sigma_behind(self, conv: ConvRule, q: Tensor, xhat: Tensor, known: Tensor) -> tuple[Tensor | None, Tensor]:
        """Sigma of each set of a convolution's outputs, NaN where nothing shows it; None where it cannot be told.

        And its relative noise, up to a factor: the terms ``w dW`` nearly add up to nothing, the rounding of each stays.
        """
        if bool((known > 0).all()):
            return self._deviation(xhat).expand_as(q), torch.ones_like(q)
        if conv.grad_weight is None or not (self.sets.groups is None or len(q) == 1):
            return None, q
        terms = (conv.weight * conv.grad_weight).flatten(1)
        if conv.bias is not None and not self.sets.by_channel(len(terms)):
            if conv.grad_bias is None:
                return None, q
            terms = torch.cat([terms, (conv.bias * conv.grad_bias)[:, None]], dim=1)
        shape, count = (1, -1, *(1,) * (q.ndim - 2)), q[:, 0].numel()
        total, size = (self.sets.mean((t.sum(dim=1) / count).reshape(shape).expand_as(q)) for t in (terms, terms.abs()))
        squared = q * self.eps / total
        return torch.where(squared > 0, squared, torch.nan).sqrt(), size / total.abs()


def _trust(noise: Tensor) -> Tensor:
    """What equations weigh whose other noise is about as large as most of this one, which may be infinite."""
    known = noise[noise.isfinite()]
    typical = known.median() if len(known) else 1.0
    return torch.where(noise.isfinite(), 1 / (1 + (noise / typical).square()).sqrt(), 1.0)


def has_own_statistics(module: nn.Module) -> bool:
    """Whether a norm takes its statistics from its input, in its present mode."""
    if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
        kept = module.running_mean is not None and module.running_var is not None
        return module.training or not kept
    return isinstance(module, nn.GroupNorm | nn.LayerNorm)


def norm_sets(module: nn.Module, x: Tensor) -> NormSets | None:
    """The sets of a norm with statistics of its own on an input like x; None for axes that are no such sets."""
    match module:
        case _ if isinstance(module, BATCH_NORMS):
            return NormSets()
        case _ if isinstance(module, INSTANCE_NORMS):
            return NormSets(x.shape[1])
        case nn.GroupNorm():
            return NormSets(module.num_groups)
        case nn.LayerNorm() if tuple(module.normalized_shape) == tuple(x.shape[1:]):
            return NormSets(1)
    return None


def norm_function(module: Any, x: Tensor) -> Tensor:
    """What such a norm computes, in x's precision and without touching its buffers."""
    sets = norm_sets(module, x)
    assert sets is not None
    gamma, beta = _parameters(module, x)
    centred = sets.centre(x)
    sigma: Tensor = (sets.mean(centred.square()) + module.eps).sqrt()
    return gamma * centred / sigma + beta


def norm_rule(module: Any, x: Tensor, gradient_of: Callable[[Tensor | None], Tensor | None]) -> NormRule | None:
    """The rule of a norm with statistics of its own, on an input like x in the working precision."""
    sets = norm_sets(module, x)
    if sets is None:
        return None
    gamma, beta = (t.detach() for t in _parameters(module, x))
    grads = gradient_of(module.weight), gradient_of(module.bias)
    grad_gamma, grad_beta = (None if g is None else g.to(x.dtype) for g in grads)
    return NormRule(
        kind=type(module).__name__,
        sets=sets,
        gamma=gamma,
        beta=beta,
        eps=module.eps,
        grad_gamma=None if grad_gamma is None else grad_gamma.reshape(gamma.shape),
        grad_bias=None if grad_beta is None or grad_beta.ndim > 1 else grad_beta,
    )


def _parameters(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gamma and beta in a shape that broadcasts to x; 1 and 0 where there are none."""
    per_value = isinstance(module, nn.LayerNorm)
    shape = (1, *x.shape[1:]) if per_value else (1, x.shape[1], *(1,) * (x.ndim - 2))
    ones = torch.ones(shape, dtype=x.dtype, device=x.device)
    gamma = ones if module.weight is None else module.weight.to(x.dtype).reshape(shape)
    beta = torch.zeros_like(ones) if module.bias is None else module.bias.to(x.dtype).reshape(shape)
    return gamma, beta


def batch_statistics(module: Any, mean: Tensor | None, var: Tensor | None, x: Tensor) -> Statistics | None:
    """Mean and deviation of the batch from batch norm's running statistics before (in `module`) and after one step.

        ``running' = (1 - m) running + m batch``,  the variance of the batch divided by N - 1

    Parameters
    ----------
    module : nn.Module
        A norm; batch norm in training mode with its buffers as before the step; momentum None averages all steps.
    mean, var : Tensor or None
        ``running_mean`` and ``running_var`` after one step.
    x : Tensor
        What it takes, in shape and working precision.
    """
    if not isinstance(module, BATCH_NORMS):
        return None
    before = [t for t in (module.running_mean, module.running_var) if t is not None]
    if mean is None or var is None or len(before) < 2:
        return None
    steps = module.num_batches_tracked
    share = 1 / (1 + (0 if steps is None else int(steps))) if module.momentum is None else module.momentum
    if share == 0:
        return None
    shape, count = (1, -1, *(1,) * (x.ndim - 2)), x.numel() // x.shape[1]
    batch = ((new.to(x) - (1 - share) * old.to(x)) / share for new, old in zip((mean, var), before, strict=True))
    average, unbiased = (t.reshape(shape) for t in batch)
    squared = unbiased.clamp_min(0) * (count - 1) / count + module.eps
    shares = (spacing(t.to(x), t.dtype).reshape(shape) / (UNIFORM * share) for t in (mean, var))
    own = ARITHMETIC * torch.finfo(mean.dtype).eps
    noise = [torch.hypot(a, own * b) for a, b in zip(shares, (squared.sqrt(), squared), strict=True)]
    return Statistics(average, squared.sqrt(), *noise)
