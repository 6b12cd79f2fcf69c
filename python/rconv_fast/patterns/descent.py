"""Positions of maxima by coordinate descent: for a fixed x, each window moves to where gradient and value fit best.

With patches ``P_u`` of x a filter's gradient rows are ``sum_v g_v P_{q(v)} = dW_f``. Moving window v from q to q'
changes

    ``||dW_f - sum_v g_v P_{q(v)}||^2``  by  ``2 g_v h . (P_q - P_q') + g_v^2 ||P_q - P_q'||^2``

h the miss: all of it inner products of patches and of patches with dW.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rconv_fast.patterns.least_squares import patches
from rconv_fast.patterns.problem import Convolution

if TYPE_CHECKING:
    from rconv_fast.patterns.maxima import Maxima

SWEEPS = 6


def descend(convolution: Convolution, maxima: Maxima, x: Tensor, pattern: Tensor, sigma: float) -> Tensor:
    """Entries (B, F, V) after coordinate descent, started from those of a forward run.

    `sigma` is the size of the misfit of values; that of the gradients is the median of the filters' own.
    """
    o = convolution.output(x)
    excess = (maxima.windows.gather(o) - maxima.value[..., None]).clamp_min(0).square()
    wrong = (maxima.windows.gather(o, 0.0) - maxima.value[..., None]).square()
    price = ((wrong - excess) / sigma**2).masked_fill(~maxima.candidates, math.inf)
    miss = convolution.weight_gradient(x, maxima.tight(pattern).g) - convolution.grad_weight
    variance = float(miss.square().flatten(1).mean(1).median()) + torch.finfo(x.dtype).tiny
    groups = convolution.geometry.groups
    found = [
        _descend_group(*parts, maxima, variance)
        for parts in zip(
            patches(convolution, x),
            convolution.grad_weight.flatten(1).chunk(groups),
            pattern.chunk(groups, dim=1),
            price.chunk(groups, dim=1),
            maxima.grad.chunk(groups, dim=1),
            strict=True,
        )
    ]
    return torch.where(maxima.known, torch.cat(found, dim=1), pattern)


def _descend_group(
    patches: Tensor, seen: Tensor, pattern: Tensor, price: Tensor, grad: Tensor, maxima: Maxima, variance: float
) -> Tensor:
    """Coordinate descent of the filters of one group, all at once, window by window, the largest gradients first."""
    pattern = pattern.clone()
    batch, n = len(pattern), maxima.windows.n
    index = maxima.windows.index.clamp_max(n - 1)
    gram = patches @ patches.mT
    chosen = index.expand(*pattern.shape, -1).gather(-1, pattern[..., None])[..., 0]
    g = grad.new_zeros(*grad.shape[:2], n).scatter_add_(-1, chosen, grad).transpose(0, 1).flatten(1)
    h = seen @ patches.mT - g @ gram
    order = [(b, v) for v in grad.abs().sum((0, 1)).argsort(descending=True).tolist() for b in range(batch)]
    for _ in range(SWEEPS):
        moved = 0
        for b, v in order:
            places, now = index[v] + b * n, pattern[b, :, v]
            size, current = grad[b, :, v, None], places[now]
            inner = gram[places][:, places]
            square = inner.diagonal()
            distance = square[now][:, None] + square - 2 * inner[now]
            gain = 2 * size * (h.gather(1, current[:, None]) - h[:, places]) + size.square() * distance
            best = (gain / variance + price[b, :, v]).argmin(1)
            changed = (best != now).nonzero()[:, 0]
            if len(changed):
                moved += len(changed)
                h[changed] += size[changed] * (gram[current[changed]] - gram[places[best[changed]]])
                pattern[b, changed, v] = best[changed]
        if not moved:
            break
    return pattern
