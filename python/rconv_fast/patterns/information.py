"""The information that equations with known covariances hold of the input of one convolution, and what follows from it.

    ``F = sum_f B_f^T C_f^-1 B_f  +  W^T diag(w) W  +  diag(z)  +  R``

B_f a filter's gradient rows, C_f their covariance; w the weights of outputs whose value is known, z those of inputs
(such as are zero), R what was known beforehand. All channels see the same gradient of an output, so ``B_f`` is one
matrix ``a_f`` (K, n) for each of them, and the block of channels c and d is ``sum_f a_f^T C_f^-1[c, d] a_f``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rconv_fast.patterns.least_squares import meeting_places, safe_cholesky, value_gram
from rconv_fast.patterns.moments import Site
from rconv_fast.patterns.problem import Convolution, Reading

# Unknowns up to which the error bars are exact; draws for those of more, which are then known to 9 %.
MOST_EXACT, DRAWS = 1700, 64


@dataclass(frozen=True)
class Prior:
    r"""What is known beforehand, a Gaussian around 0: R, unknowns in the order (B, C, \*in), and its rank."""

    information: Tensor
    rank: int


@dataclass(frozen=True)
class Equations:
    r"""Weighted equations of one convolution.

    Attributes
    ----------
    convolution : Convolution
        W, b, dW.
    reading : Reading
        The gradients g of the outputs, and the values of some.
    inputs : Site
        Equations of single inputs, (B, C, \*in).
    precision : Tensor, (F, D, D)
        ``C_f^-1`` of each filter's D = C/G * K gradient equations, 0 without a gradient.
    prior : Prior or None
        R.
    """

    convolution: Convolution
    reading: Reading
    inputs: Site
    precision: Tensor
    prior: Prior | None = None

    def information(self) -> Tensor:
        r"""F, unknowns in the order (B, C, \*in)."""
        geometry, batch = self.convolution.geometry, self.convolution.batch
        n, channels = geometry.n_input, geometry.in_channels // geometry.groups
        total = self.precision.new_zeros(batch, geometry.in_channels, n, batch, geometry.in_channels, n)
        for b in range(batch):
            total[b, :, :, b] = value_gram(geometry, self.convolution.weight, self.reading.weight[b])
        blocks = self.precision.unflatten(1, (channels, -1)).unflatten(3, (channels, -1))
        rows = _gradient_rows(self.convolution, self.reading.g)
        for group, filters in enumerate(torch.arange(geometry.out_channels).chunk(geometry.groups)):
            own = total[:, group * channels : (group + 1) * channels, :, :, group * channels : (group + 1) * channels]
            for c, d in itertools.combinations_with_replacement(range(channels), 2):
                block = rows[filters].flatten(0, 1).mT @ (blocks[filters, c, :, d] @ rows[filters]).flatten(0, 1)
                own[:, c, :, :, d] += block.view(batch, n, batch, n)
                if c != d:
                    own[:, d, :, :, c] += block.mT.view(batch, n, batch, n)
        matrix = total.view(self.inputs.weight.numel(), -1)
        matrix.diagonal().add_(self.inputs.weight.flatten())
        return matrix if self.prior is None else matrix.add_(self.prior.information)

    def right(self) -> Tensor:
        r"""The right-hand side of ``F x = r``, (B, C, \*in)."""
        c = self.convolution
        weighted = (self.precision @ c.grad_weight.flatten(1)[..., None]).view_as(c.grad_weight)
        values = self.reading.weight * (self.reading.target - c.bias[:, None])
        return c.back(values, c.weight) + c.back(self.reading.g, weighted) + self.inputs.weight * self.inputs.target

    def solved(self) -> Solved:
        """The most likely input, and its information."""
        information = self.information()
        factor = safe_cholesky(information, float(information.diagonal().mean()))
        x = torch.cholesky_solve(self.right().reshape(-1, 1), factor).view(self.convolution.shape)
        return Solved(x, factor, self._misfit(x))

    def _misfit(self, x: Tensor) -> float:
        """The root of chi-square over the degrees of freedom: 1 where the covariances are true."""
        c = self.convolution
        missed = (c.weight_gradient(x, self.reading.g) - c.grad_weight).flatten(1)
        by_gradients = (missed[:, None] @ self.precision @ missed[..., None]).sum()
        by_values = (self.reading.weight * (c.output(x) - self.reading.target).square()).sum()
        by_inputs = (self.inputs.weight * (x - self.inputs.target).square()).sum()
        alive = self.precision.diagonal(dim1=1, dim2=2).sum(1) > 0
        count = missed[alive].numel() + int((self.reading.weight > 0).sum()) + int((self.inputs.weight > 0).sum())
        chi2 = by_gradients + by_values + by_inputs
        if self.prior is not None:
            chi2, count = chi2 + x.flatten() @ self.prior.information @ x.flatten(), count + self.prior.rank
        return math.sqrt(float(chi2) / max(1, count - x.numel()))


@dataclass(frozen=True)
class Solved:
    """An input, the Cholesky factor of its information, and the root of its chi-square over the degrees of freedom."""

    x: Tensor
    factor: Tensor
    misfit: float

    def variances(self, convolution: Convolution) -> tuple[Tensor, Tensor]:
        """Of input and outputs, the diagonals of ``F^-1`` and ``W F^-1 W^T``; by draws where unknowns are many."""
        if len(self.factor) > MOST_EXACT:
            draws = self.draws(convolution)
            makes = [convolution.output(draw) - convolution.bias[:, None] for draw in draws]
            return draws.square().mean(0), torch.stack(makes).square().mean(0)
        inverse = torch.cholesky_inverse(self.factor)
        return inverse.diagonal().reshape(convolution.shape), output_variances(convolution, inverse)

    def draws(self, convolution: Convolution) -> Tensor:
        r"""Errors of the input, (DRAWS, B, C, \*in): ``L^-T e``, whose covariance is the inverse of ``L L^T``."""
        generator = torch.Generator().manual_seed(0)
        white = torch.randn(len(self.factor), DRAWS, generator=generator, dtype=self.factor.dtype)
        draws: Tensor = torch.linalg.solve_triangular(self.factor.mT, white.to(self.factor), upper=True)
        return draws.mT.reshape(-1, *convolution.shape)


def output_variances(convolution: Convolution, covariance: Tensor) -> Tensor:
    """The diagonal of ``W C W^T``, (B, F, U): of each output only what it sees of C counts."""
    geometry, batch, n = convolution.geometry, convolution.batch, convolution.geometry.n_input
    channels, filters = (size // geometry.groups for size in (geometry.in_channels, geometry.out_channels))
    place = meeting_places(geometry, covariance.device)
    weight = convolution.weight.view(geometry.groups, filters, -1)
    blocks = covariance.view(batch, geometry.groups, channels, n, batch, geometry.groups, channels, n)
    found = covariance.new_empty(batch, geometry.groups, filters, geometry.n_output)
    for b, group in itertools.product(range(batch), range(geometry.groups)):
        own = F.pad(blocks[b, group, :, :, b, group], (0, 1, 0, 0, 0, 1))
        for u, seen in enumerate(place):
            block = own[:, seen][:, :, :, seen]
            found[b, group, :, u] = (weight[group] @ block.reshape(weight.shape[-1], -1) * weight[group]).sum(1)
    return found.flatten(1, 2)


def _gradient_rows(convolution: Convolution, g: Tensor) -> Tensor:
    """``a_f``, (F, K, B*n): what the gradient of one channel of a filter adds up."""
    geometry = convolution.geometry
    place = meeting_places(geometry, g.device)
    rows = g.new_zeros(geometry.out_channels, geometry.n_taps, convolution.batch, geometry.n_input + 1)
    for tap in range(geometry.n_taps):
        rows[:, tap].index_add_(-1, place[:, tap], g.transpose(0, 1))
    return rows[..., : geometry.n_input].flatten(2)
