"""A convolution behind which a norm takes its statistics from the batch: its equations around an estimate.

The notation is that of `rconv_fast.solve.normalised`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.constraints.operators import apply_weight
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.normalised import CentredRows, MeanRows, NormSets, TangentRows
from rconv_fast.solve.rows import GradientRows, Rows, WeightRows


@dataclass(frozen=True)
class NormalisedConv:
    r"""What is known of one convolution whose output a norm with statistics of its own takes.

    Attributes
    ----------
    geometry, weight : ConvGeometry, Tensor
        Of the convolution.
    sets : NormSets
        Which outputs share a mean and a deviation.
    h : Tensor
        ``gamma dL/dy`` (B, F, \*out).
    q : Tensor
        ``mean(h xhat)`` of each output's set, broadcastable to `h`.
    sigma : Tensor
        ``sqrt(var(o) + eps)``, broadcastable to `h`.
    trust : Tensor
        What the equations with each sigma weigh, broadcastable to `h`.
    mean : Tensor or None
        ``mean(o)`` without bias where it is known, (1, F, 1, ...).
    shift : Tensor
        The bias less its mean over the set, broadcastable to `h`: ``o - mean(o) = A x - mean(A x) + shift``.
    xhat : Tensor
        Normalised outputs, read where `known` is positive.
    known : Tensor
        How well each is known (0: not at all).
    grad_weight : Tensor or None
        ``dL/dW``.
    """

    geometry: ConvGeometry
    weight: Tensor
    sets: NormSets
    h: Tensor
    q: Tensor
    sigma: Tensor
    trust: Tensor
    mean: Tensor | None
    shift: Tensor
    xhat: Tensor
    known: Tensor
    grad_weight: Tensor | None

    @property
    def is_linear(self) -> bool:
        """Whether all equations are linear in x: no output is unknown."""
        return bool((self.known > 0).all())

    def normalised(self, x: Tensor | None) -> Tensor:
        """``xhat``: what is known of it, the rest from x (without x, what makes each set's mean 0)."""
        known = self.known > 0
        if x is None:
            seen = torch.where(known, self.xhat, 0.0)
            share = self.sets.mean((~known).to(seen))
            rest = -self.sets.mean(seen) / share.clamp_min(torch.finfo(seen.dtype).tiny)
        else:
            o = apply_weight(self.geometry, x, self.weight)
            rest = ((self.sets.centre(o) if self.mean is None else o - self.mean) + self.shift) / self.sigma
        return torch.where(known, self.xhat, rest)

    def gradient(self, x: Tensor | None) -> Tensor:
        """``g_o = (h - mean(h) - xhat q) / sigma``."""
        return (self.sets.centre(self.h) - self.normalised(x) * self.q) / self.sigma

    def rows(self, x: Tensor | None) -> list[Rows]:
        """The equations around x; without x, those with a first guess of what is not known."""
        return [*self._value_rows(), *self._gradient_rows(x)]

    def _value_rows(self) -> list[Rows]:
        """``o - mean(o) = sigma xhat`` where known; its error is sigma times that of xhat."""
        centred = self.sigma * self.xhat - self.shift
        weight = self.known * self.trust * (self.sigma.min() / self.sigma)
        if self.mean is None:
            return [CentredRows.create(self.geometry, self.weight, self.sets, centred, weight)]
        values = WeightRows.create(self.geometry, self.weight, centred + self.mean, weight)
        return [values, MeanRows(self.geometry, self.weight, len(self.h), self.mean)]

    def _gradient_rows(self, x: Tensor | None) -> list[Rows]:
        if self.grad_weight is None:
            return []
        g = self.gradient(x)
        noise = g / self.trust
        main = GradientRows.create(self.geometry, self.grad_weight, g, noise)
        if x is None or self.is_linear:
            return [main]
        scale = GradientRows.scales(noise).reshape(1, -1, *(1,) * self.geometry.ndim)
        slope = torch.where(self.known > 0, 0.0, -scale * self.q / self.sigma.square())
        return [TangentRows.create(main, self.weight, self.sets if self.mean is None else None, slope, x)]


def hidden_classes(geometry: ConvGeometry) -> Tensor:
    r"""The classes of input positions on which a constant changes each filter's outputs by a constant.

    A norm takes such a change off. Kernel offsets that ever meet at one position belong together; a class is what the
    offsets of such a group read, if none of them ever meets the padding.

    Returns
    -------
    Tensor
        (R, \*in) bool: the positions of each class.
    """
    axes = [_axis_classes(geometry, axis) for axis in range(geometry.ndim)]
    masks = [torch.zeros(0, *geometry.input_size, dtype=torch.bool)]
    for positions in itertools.product(*axes):
        mask = torch.zeros(1, *geometry.input_size, dtype=torch.bool)
        mask[0][torch.meshgrid(*map(torch.tensor, positions), indexing="ij")] = True
        masks.append(mask)
    return torch.cat(masks)


def _axis_classes(geometry: ConvGeometry, axis: int) -> list[list[int]]:
    """Along one axis: what each group of offsets that meet reads, where it never reads padding."""
    s, p, d = geometry.stride[axis], geometry.padding[axis], geometry.dilation[axis]
    size, outputs = geometry.input_size[axis], range(geometry.out_size[axis])
    groups: list[set[int]] = []
    for k in range(geometry.kernel_size[axis]):
        read = {u * s + k * d - p for u in outputs}
        read = read.union(*(group for group in groups if group & read))
        groups = [group for group in groups if not group & read] + [read]
    return [sorted(group) for group in groups if min(group) >= 0 and max(group) < size]
