"""Beliefs: how likely each position of a window is its maximum, given an input with error bars; the input given those.

While an output ``o = W x + b`` is known up to s, position q of a window with maximum m is where it was found if its
output is m and all others are below:

    ``p_q ~ phi(z_q) / Phi(-z_q)``,   ``z_q = (o_q - m) / s_q``.

So the equations hold up to what is left open, P_q the patch of x that position q sees:

    ``o_q = m``                         variance    ``eps^2 + s_q^2 (1 - p_q) / p_q``
    ``sum_v g_v sum_q p_q P_q = dW_f``  covariance  ``C_f = sum_v g_v^2 (Cov_p[P_q] + (1 - sum_q p_q^2) s_x^2) + white``

A window in doubt takes the directions between its candidates out of its filter's equations, and nothing else. Behind a
ReLU a value of x may be exactly zero, believed in likewise. Solved with these weights the equations give the next x,
their information matrix its error bars.

An equation must not confirm itself: what it added to the information on its own output is taken out before that output
is asked (the cavity of expectation propagation [1]_). Where the error bars are true, the doubts vanish within a dozen
rounds, and more than linearly.

References
----------
.. [1] T. P. Minka. Expectation propagation for approximate Bayesian inference. UAI 2001.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.patterns.information import Equations
from rconv_fast.patterns.least_squares import patches
from rconv_fast.patterns.maxima import Maxima
from rconv_fast.patterns.moments import Moments, Site
from rconv_fast.patterns.problem import Convolution, Problem, Reading

# Unknowns of which the information matrix is formed, and multiplications of a round, at most.
MOST, MOST_WORK = 3600, 6e10
# Error bars are taken this many times as large as the information says: beliefs that are too sure do not come back.
INFLATION = 2.5
# eps in units of the median error bar, and its least in units of the spread of the outputs.
SURE, LEAST = 0.3, 1e-15
# Positions less likely are not believed in at all.
UNLIKELY = 1e-3
# How often the gradients are asked about the positions, and how much of the answer is believed: the error of x is the
# same for all windows, so each hears it more than once.
ASKED, HEARD = 2, 0.5
# First error bar of the outputs, in units of this quantile of the misfit of a relaxed start.
FIRST, QUANTILE = 2.0, 0.7
# No equation is more than this part of the information on its own value, no output farther from its maximum than this.
LARGEST_SHARE, FARTHEST = 0.99, 30.0


@dataclass(frozen=True)
class Marginal:
    """Values, an error bar each, and the part of the information that their own equations ``value = target`` gave."""

    mean: Tensor
    deviation: Tensor
    share: Tensor

    @classmethod
    def alike(cls, mean: Tensor, deviation: float) -> Marginal:
        """The same error bar for all."""
        return cls(mean, torch.full_like(mean, deviation), torch.zeros_like(mean))

    @classmethod
    def create(cls, mean: Tensor, deviation: Tensor, share: Tensor) -> Marginal:
        """No error bar is quite zero, no share the whole."""
        least = max(LEAST * float(mean.std()), torch.finfo(mean.dtype).tiny)
        return cls(mean, deviation.clamp_min(least), share.clamp_max(LARGEST_SHARE))

    def without_own(self, target: Tensor | float) -> Marginal:
        """The cavity: what all other equations say."""
        mean = (self.mean - self.share * target) / (1 - self.share)
        return Marginal(mean, self.deviation / (1 - self.share).sqrt(), torch.zeros_like(mean))


@dataclass(frozen=True)
class Estimate:
    r"""What is known of the input (B, C, \*in) and of the outputs (B, F, U)."""

    x: Marginal
    o: Marginal

    @classmethod
    def of_start(cls, problem: Problem, x: Tensor) -> Estimate:
        """A relaxed start, whose error is about its own misfit."""
        convolution = problem.front.last
        o = convolution.output(x)
        miss = problem.hidden.residual(o, problem.hidden.choose(o)).abs()
        size = FIRST * float(torch.quantile(miss, QUANTILE))
        gain = float(convolution.weight.flatten(1).norm(dim=1).median())
        return cls(Marginal.alike(x, size / gain), Marginal.alike(o, size))

    @property
    def size(self) -> float:
        """The error of x, root mean square."""
        return float(self.x.deviation.square().mean().sqrt())


def can_believe(problem: Problem) -> bool:
    """Whether beliefs can be formed: on maxima behind one convolution whose matrices are not too large."""
    one = isinstance(problem.front, Convolution) and isinstance(problem.hidden, Maxima)
    unknowns = math.prod(problem.front.shape)
    return one and unknowns <= MOST and _work(problem.front.last, unknowns) <= MOST_WORK


def _work(convolution: Convolution, unknowns: int) -> float:
    """Multiplications of a round: inverse covariances of the filters, the information matrix, its factor."""
    g = convolution.geometry
    rows = g.in_channels // g.groups * g.n_taps
    return g.out_channels * (2 * (1 + ASKED) * rows**3 + g.n_taps * unknowns**2 / g.groups) + unknowns**3


def updated(problem: Problem, known: Estimate) -> Estimate:
    """The next estimate: beliefs from the last one, and the input from all equations weighed by them."""
    convolution, maxima = problem.front.last, problem.hidden
    assert isinstance(maxima, Maxima)
    x, cavity = known.x.mean, known.o.without_own(maxima.target)
    eps = error_of_values(cavity)
    belief = position_and_gradient_belief(convolution, maxima, known, cavity)
    reading = Reading(maxima.gradient(belief), maxima.target, _value_weights(maxima, cavity, belief, eps))
    rectified = problem.front.low == 0
    zeros = _zero_weights(known.x, SURE * known.size) if rectified else torch.zeros_like(x)
    precision = precision_of(convolution, maxima, known, belief, reading.g, eps)
    solved = Equations(convolution, reading, Site.zeros(zeros), precision).solved()
    of_x, of_o = solved.variances(convolution)
    scale = INFLATION * solved.misfit
    x = solved.x.clamp(problem.front.low, problem.front.high)
    return Estimate(
        Marginal.create(x, scale * of_x.sqrt(), zeros * of_x),
        Marginal.create(convolution.output(x), scale * of_o.sqrt(), reading.weight * of_o),
    )


def error_of_values(o: Marginal) -> float:
    """The error eps of an equation ``o = m``, from those of the outputs."""
    return max(SURE * float(o.deviation.median()), LEAST * float(o.mean.std()))


def position_and_gradient_belief(convolution: Convolution, maxima: Maxima, known: Estimate, o: Marginal) -> Tensor:
    """P (B, F, V, Q) from what all other equations say of the outputs, and from the gradients."""
    by_value = belief = position_belief(maxima, o)
    for _ in range(ASKED):
        belief = gradient_belief(convolution, maxima, known, by_value, belief)
    return belief


def position_belief(maxima: Maxima, o: Marginal) -> Tensor:
    """P (B, F, V, Q) from the values alone; 0 for windows whose maximum is not known."""
    z = (maxima.windows.gather(o.mean) - maxima.value[..., None]) / maxima.windows.gather(o.deviation, 1.0)
    z = z.clamp(-FARTHEST, FARTHEST)
    odds = torch.exp(-z.square() / 2 - torch.special.log_ndtr(-z)).masked_fill(~maxima.candidates, 0.0)
    return (odds / odds.sum(-1, keepdim=True)).masked_fill(~maxima.known[..., None], 0.0)


def gradient_belief(convolution: Convolution, maxima: Maxima, known: Estimate, by_value: Tensor, p: Tensor) -> Tensor:
    """What the values say of each window (B, F, V, Q), and its filter's gradients, the other windows as in p.

    With ``a_q = g_v (P_q - mean_p P)`` and r the miss under p, they say ``exp(-|r - a_q|^2 / 2)`` of window v at q, in
    the metric of ``(C_f - U U^T)^-1``, ``U = sqrt(p_q) a_q``: the covariance without that window.
    """
    belief = by_value.clone()
    g = maxima.gradient(p)
    missed = (convolution.grad_weight - convolution.weight_gradient(known.x.mean, g)).flatten(1)
    for f, doubts in enumerate(_all_doubts(convolution, maxima, known.x.mean, p)):
        if not len(doubts.apart):
            continue
        inverse = torch.linalg.inv(doubts.covariance(known.size**2 * g[:, f].square().sum()))
        apart, root = doubts.apart, doubts.belief.sqrt()
        left = apart @ inverse
        gram, along = left @ apart.mT, left @ missed[f]
        others = torch.eye(root.shape[1]).to(gram) - root[..., None] * gram * root[:, None]
        shift = root[..., None] * (along[..., None] - gram)
        square = gram.diagonal(dim1=1, dim2=2) - 2 * along + (shift * torch.linalg.solve(others, shift)).sum(1)
        before = by_value[:, f][doubts.where]
        square = square.masked_fill(before == 0, math.inf)
        odds = before * torch.exp(-HEARD * (square - square.amin(1, keepdim=True)) / 2)
        belief[:, f][doubts.where] = odds / odds.sum(-1, keepdim=True)
    return belief


@dataclass(frozen=True)
class _Doubts:
    """The windows of one filter that are in doubt.

    `where` (B, V) they are; the `belief` (m, Q) in their positions; `apart` (m, Q, D), ``g_v (P_q - mean P)``; and
    `loose`, ``sum_v g_v^2 (1 - sum_q p_q^2)``, by which an error of the patches enters.
    """

    where: Tensor
    belief: Tensor
    apart: Tensor
    loose: Tensor

    def covariance(self, white: Tensor) -> Tensor:
        """``sum_v g_v^2 Cov_p[P_q] + white``, (D, D)."""
        weighted = (self.belief.sqrt()[..., None] * self.apart).flatten(0, 1)
        covariance = weighted.mT @ weighted
        covariance.diagonal().add_(white)
        return covariance


def _all_doubts(convolution: Convolution, maxima: Maxima, x: Tensor, p: Tensor) -> Iterator[_Doubts]:
    """Filter by filter."""
    geometry, n = convolution.geometry, maxima.windows.n
    by_group = patches(convolution, x)
    index = maxima.windows.index.clamp_max(n - 1) + n * torch.arange(len(x), device=x.device)[:, None, None]
    for f in range(geometry.out_channels):
        where = ((p[:, f] > UNLIKELY) & (p[:, f] < 1 - UNLIKELY)).any(-1)
        belief, size = p[:, f][where], maxima.grad[:, f][where]
        options = by_group[f * geometry.groups // geometry.out_channels][index[where]]
        apart = size[:, None, None] * (options - (belief[..., None] * options).sum(1, keepdim=True))
        yield _Doubts(where, belief, apart, (size.square() * (1 - belief.square().sum(-1))).sum())


def precision_of(convolution: Convolution, maxima: Maxima, known: Estimate, p: Tensor, g: Tensor, eps: float) -> Tensor:
    """``C_f^-1`` of all filters; eps is the error of an output, so the rows have it in proportion to their size."""
    found = []
    for f, doubts in enumerate(_all_doubts(convolution, maxima, known.x.mean, p)):
        white = eps**2 * g[:, f].square().sum() / convolution.weight[f].square().sum() + known.size**2 * doubts.loose
        covariance = doubts.covariance(white)
        found.append(torch.linalg.inv(covariance) if float(white) > 0 else torch.zeros_like(covariance))
    return torch.stack(found)


def _value_weights(maxima: Maxima, o: Marginal, p: Tensor, eps: float) -> Tensor:
    """The weight of ``o = m``, (B, F, U); outputs above their limit that are no maximum are pulled down to it."""
    variance = _left_open(p, maxima.windows.gather(o.deviation, 1.0), eps)
    weight = maxima.windows.largest(torch.where(p > UNLIKELY, 1 / variance, 0.0))
    excess = o.mean - maxima.limit
    above = (excess > 0) & (weight == 0)
    return torch.where(above, 1 / (o.deviation.square() + excess.square()), weight)


def _zero_weights(x: Marginal, eps: float) -> Tensor:
    """The weight of ``x = 0``, for values behind a ReLU."""
    x = x.without_own(0.0)
    p, _ = zero_or_positive(x)
    return torch.where(p > UNLIKELY, 1 / _left_open(p, x.deviation, eps), 0.0)


def zero_or_positive(x: Marginal) -> tuple[Tensor, Moments]:
    """The chance that a value is 0, and its Gaussian, to be cut at 0, where it is positive.

    Half of the values are zero, half normal and positive beforehand.
    """
    size = x.mean.square().mean().sqrt()
    spread = (size**2 + x.deviation.square()).sqrt()
    zero = torch.exp(-(x.mean / x.deviation).square() / 2) / x.deviation
    positive = torch.special.ndtr(x.mean * size / (x.deviation * spread))
    positive = 2 / spread * torch.exp(-(x.mean / spread).square() / 2) * positive
    share = (size / spread).square()
    return zero / (zero + positive), Moments(share * x.mean, share * x.deviation.square())


def _left_open(p: Tensor, deviation: Tensor, eps: float) -> Tensor:
    """The variance of an equation that holds with probability p, of a value known to `deviation`."""
    return eps**2 + deviation.square() * (1 - p) / p
