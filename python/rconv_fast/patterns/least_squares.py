"""Weighted least squares of a hidden layer: normal equations, dense where they are small, else by iteration.

``min_x  sum_f w_f ||B_f x - dW_f||^2 + sum_{b,f,u} S (o - t)^2 + lambda t0 x^T R x``. The matrix of the gradient rows
is shared by all channels of a group, so it is formed and factored once, ``(B n, B n)``; the value rows couple channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from rconv_fast.geometry import ConvGeometry
from rconv_fast.patterns.problem import Convolution, Reading
from rconv_fast.solve.conjugate import conjugate_gradients
from rconv_fast.solve.dense import FLOPS_A_SECOND
from rconv_fast.solve.phases.gram import input_gram

# Unknowns, and products of two weights at all outputs, up to which the whole normal matrix is formed and factored: less
# time than the iteration takes.
MAX_DENSE, MAX_PRODUCTS = 1700, 2_000_000
# Added to the diagonal, in units of its mean, so that rounding does not make a singular matrix indefinite.
SAFE, SAFER = 1e-13, 1e-9
ITERATIONS, RTOL = 40, 1e-13


@dataclass(frozen=True)
class WeightedSolver:
    """Solves the weighted equations of one convolution, again and again."""

    convolution: Convolution

    def solve(self, reading: Reading, filter_weights: Sequence[Tensor], ridge: float, start: Tensor | None) -> Tensor:
        """The minimiser.

        Parameters
        ----------
        reading : Reading
            g, t and S.
        filter_weights : sequence of one Tensor, shape (F,)
            w.
        ridge : float
            lambda, in units of the mean diagonal t0.
        start : Tensor or None
            Where an iteration starts.
        """
        c, (filter_weight,) = self.convolution, filter_weights
        per_filter = filter_weight.reshape(-1, *(1,) * (c.geometry.ndim + 1))
        g = c.as_planes(reading.g * filter_weight.sqrt()[:, None])
        gram = torch.stack([input_gram(c.geometry, g, group) for group in range(c.geometry.groups)])
        known = reading.weight * (reading.target - c.bias[:, None])
        rhs = c.back(known, c.weight) + c.back(reading.g, c.grad_weight * per_filter)
        value_diagonal = float(c.back(reading.weight, c.weight.square()).mean())
        size = float(gram.diagonal(dim1=1, dim2=2).mean()) + value_diagonal
        gram = gram + torch.block_diag(*[ridge * size * self.roughness] * c.batch)
        gram.diagonal(dim1=1, dim2=2).add_(SAFE * size)
        if math.prod(c.shape) <= MAX_DENSE and self._products <= MAX_PRODUCTS:
            return self._dense(gram, reading.weight, rhs, size)
        return self._iterate(gram, reading.weight, rhs, value_diagonal, start)

    @property
    def seconds(self) -> float:
        """What one solve takes at least: the factor of the gradient rows' matrix, ``(B n)^3 / 3`` a group."""
        g = self.convolution.geometry
        return g.groups * (self.convolution.batch * g.n_input) ** 3 / 3 / FLOPS_A_SECOND

    @property
    def _products(self) -> int:
        g = self.convolution.geometry
        return self.convolution.batch * g.groups * (g.in_channels // g.groups * g.n_taps) ** 2 * g.n_output

    @cached_property
    def roughness(self) -> Tensor:
        """R (n, n): squared differences of neighbours for a picture, squares elsewhere."""
        c, size = self.convolution, self.convolution.geometry.input_size
        if not c.image:
            return torch.eye(c.geometry.n_input).to(c.weight)
        total = c.weight.new_zeros(1, 1)
        for n in size:
            step = torch.eye(n).diff(dim=0).to(total)
            axis, so_far = step.mT @ step, torch.eye(len(total)).to(total)
            total = torch.kron(total, torch.eye(n).to(total)) + torch.kron(so_far, axis)
        return total

    def _by_group(self, x: Tensor) -> Tensor:
        r"""(B, C, \*in) to (G, B*n, C/G)."""
        g = self.convolution.geometry
        return x.reshape(len(x), g.groups, -1, g.n_input).permute(1, 0, 3, 2).flatten(1, 2)

    def _by_sample(self, x: Tensor) -> Tensor:
        c = self.convolution
        return x.view(len(x), c.batch, -1, x.shape[-1]).permute(1, 0, 3, 2).reshape(c.shape)

    def _dense(self, gram: Tensor, weight: Tensor, rhs: Tensor, size: float) -> Tensor:
        c = self.convolution
        batch, channels, n = c.batch, c.geometry.in_channels, c.geometry.n_input
        total = gram.new_zeros(batch, channels, n, batch, channels, n)
        for b in range(batch):
            total[b, :, :, b] = value_gram(c.geometry, c.weight, weight[b])
        per_group = channels // c.geometry.groups
        for channel in range(channels):
            total[:, channel, :, :, channel] += gram[channel // per_group].view(batch, n, batch, n)
        factor = safe_cholesky(total.view(rhs.numel(), -1), size)
        return torch.cholesky_solve(rhs.reshape(-1, 1), factor).view(c.shape)

    def _iterate(
        self, gram: Tensor, weight: Tensor, rhs: Tensor, value_diagonal: float, start: Tensor | None
    ) -> Tensor:
        """Conjugate gradients, preconditioned by the gradient rows and the mean of the value rows."""
        c = self.convolution
        diagonal = gram.diagonal(dim1=1, dim2=2)
        inverse = safe_cholesky(
            gram + torch.diag_embed(torch.full_like(diagonal, value_diagonal)), float(diagonal.mean())
        )

        def normal(x: Tensor) -> Tensor:
            values = (c.output(x) - c.bias[:, None]) * weight
            return self._by_sample(gram @ self._by_group(x)) + c.back(values, c.weight)

        def precondition(r: Tensor) -> Tensor:
            return self._by_sample(torch.cholesky_solve(self._by_group(r), inverse))

        x = precondition(rhs) if start is None else start
        step, _ = conjugate_gradients(normal, rhs - normal(x), precondition, tolerance=RTOL, iterations=ITERATIONS)
        return x + step


# Entries of the weights of several output positions that are held at once.
TOGETHER = 1 << 22


@lru_cache(maxsize=8)
def meeting_places(geometry: ConvGeometry, device: torch.device) -> Tensor:
    """The input position that output u and offset k meet, (U, n_taps); n_input in the padding."""
    flat = torch.zeros(1, 1, dtype=torch.long, device=device)
    outside = torch.zeros(1, 1, dtype=torch.bool, device=device)
    sizes = (geometry.input_size, geometry.out_size, geometry.kernel_size)
    steps = (geometry.stride, geometry.padding, geometry.dilation)
    for n, out, taps, s, p, d in zip(*sizes, *steps, strict=True):
        u, k = torch.arange(out, device=device), torch.arange(taps, device=device)
        i = u[:, None] * s + k * d - p
        flat = (flat[:, None, :, None] * n + i[:, None]).reshape(len(flat) * out, -1)
        outside = (outside[:, None, :, None] | (i < 0)[:, None] | (i >= n)[:, None]).reshape(flat.shape)
    return flat.masked_fill(outside, geometry.n_input)


def patches(convolution: Convolution, x: Tensor) -> list[Tensor]:
    """What each output sees, (B*U, C/G*K) a group."""
    planes = F.pad(x.flatten(2), (0, 1))[..., meeting_places(convolution.geometry, x.device)]
    return [part.transpose(1, 2).flatten(2).flatten(0, 1) for part in planes.chunk(convolution.geometry.groups, dim=1)]


def value_gram(geometry: ConvGeometry, weight: Tensor, row_weight: Tensor) -> Tensor:
    """``W^T diag(S) W`` (C, n, C, n) of one sample: ``sum_{f,u} S[f,u] W[f,c,k] W[f,c',k']`` where u meets i, i'.

    Of each output position ``w^T diag(S[:, u]) w``, w (F, C K), some positions at a time.
    """
    n, groups = geometry.n_input, geometry.groups
    place = meeting_places(geometry, weight.device)
    channels = geometry.in_channels // groups
    total = weight.new_zeros(geometry.in_channels, n, geometry.in_channels, n)
    entry = (torch.arange(channels, device=weight.device)[:, None, None] * (n + 1) + place).transpose(0, 1).flatten(1)
    side = channels * (n + 1)
    where = entry[:, :, None] * side + entry[:, None, :]
    for group in range(groups):
        filters = slice(group * len(weight) // groups, (group + 1) * len(weight) // groups)
        w = weight[filters].flatten(1)
        block = weight.new_zeros(side * side)
        together = max(1, TOGETHER // w.numel())
        for rows, places in zip(row_weight[filters].mT.split(together), where.split(together), strict=True):
            products = (w.mT * rows[:, None]) @ w
            block.index_add_(0, places.flatten(), products.flatten())
        block = block.view(channels, n + 1, channels, n + 1)[:, :n, :, :n]
        own = slice(group * channels, (group + 1) * channels)
        total[own, :, own] = block
    return total


def safe_cholesky(matrix: Tensor, size: float) -> Tensor:
    """Cholesky factor(s) of a positive semi-definite matrix whose diagonal is about `size`."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        factor = torch.linalg.cholesky(matrix + SAFER * size * torch.eye(matrix.shape[-1]).to(matrix))
    return factor
