"""Equations of a convolution whose outputs are normalised by their own statistics, as blocks of rows.

With ``o = W * x``, sets of outputs that share a mean and a deviation (a channel of the whole batch for batch norm, a
group of channels of one sample for group norm), ``xhat = (o - mean(o)) / sigma``, ``y = gamma xhat + beta``,
``g_y = dL/dy``, ``h = gamma g_y`` and ``q = mean(h xhat)``:

    ``g_o = (h - mean(h) - xhat q) / sigma``            (the norm's backward, every mean over the set)
    ``o - mean(o) = sigma xhat``  where y is known      (`CentredRows`; `WeightRows` where the mean is known too)
    ``sum_{b,u} g_o[b,f,u] x[b,c,i] = dW[f,c,k]``       (`GradientRows`; `TangentRows` where g_o depends on x)

Where y is not known, behind the zeros of a ReLU, xhat follows from x: the last equations are quadratic there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rconv_fast.constraints.operators import apply_gradient, apply_weight, apply_weight_adjoint
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.map_rows import normal_by_columns
from rconv_fast.solve.rows import GradientRows


@dataclass(frozen=True)
class NormSets:
    """Which outputs share a mean and a deviation.

    Attributes
    ----------
    groups : int or None
        None: a channel of all samples (batch norm). A number: so many groups of channels of each sample (group norm;
        1 is layer norm, one a channel instance norm).
    """

    groups: int | None = None

    def mean(self, o: Tensor) -> Tensor:
        r"""The mean over each set, in a shape that broadcasts to o (B, F, \*out)."""
        return self._over_sets(torch.mean, o)

    def lowest(self, o: Tensor) -> Tensor:
        """The lowest value of each set, likewise."""
        return self._over_sets(torch.amin, o)

    def _over_sets(self, reduce: Callable[..., Tensor], o: Tensor) -> Tensor:
        if self.groups is None:
            return reduce(o, dim=(0, *range(2, o.ndim)), keepdim=True)
        grouped = o.reshape(len(o), self.groups, -1)
        return reduce(grouped, dim=-1, keepdim=True).expand_as(grouped).reshape(o.shape)

    def centre(self, o: Tensor) -> Tensor:
        """``o - mean(o)``."""
        return o - self.mean(o)

    def by_channel(self, channels: int) -> bool:
        """Whether no set holds values of two of so many channels."""
        return self.groups in (None, channels)


@dataclass(frozen=True)
class CentredRows:
    """``w (A x - mean(A x)) = w rhs``: outputs known but for their mean; ``row_weight`` w is 0 for unknown ones."""

    geometry: ConvGeometry
    weight: Tensor
    sets: NormSets
    row_weight: Tensor
    rhs: Tensor

    @classmethod
    def create(
        cls, geometry: ConvGeometry, weight: Tensor, sets: NormSets, centred: Tensor, row_weight: Tensor
    ) -> CentredRows:
        """`centred` is ``o - mean(o)`` without bias, read only where `row_weight` is positive."""
        rhs = torch.where(row_weight > 0, centred, 0.0) * row_weight
        return cls(geometry, weight, sets, row_weight, rhs)

    @cached_property
    def count(self) -> int:
        """Known outputs."""
        return int((self.row_weight > 0).sum())

    def apply(self, x: Tensor) -> Tensor:
        """``w (A x - mean(A x))``."""
        return self.sets.centre(apply_weight(self.geometry, x, self.weight)) * self.row_weight

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T (w y - mean(w y))``."""
        return apply_weight_adjoint(self.geometry, self.sets.centre(y * self.row_weight), self.weight)

    def diagonal(self) -> Tensor:
        """``sum_{f,u} W[f,c,k]^2 w[b,f,u]^2``: the mean's share, one over the size of a set, is left out."""
        return apply_weight_adjoint(self.geometry, self.row_weight.square(), self.weight.square())

    def normal(self) -> Tensor:
        """``M^T M``, column by column."""
        shape = torch.Size((len(self.rhs), self.geometry.in_channels, *self.geometry.input_size))
        return normal_by_columns(self, shape, self.rhs)

    def scaled(self, factor: float) -> CentredRows:
        """The block times `factor`."""
        return replace(self, row_weight=self.row_weight * factor, rhs=self.rhs * factor)

    def to(self, dtype: torch.dtype) -> CentredRows:
        """The block in another dtype."""
        return replace(self, weight=self.weight.to(dtype), row_weight=self.row_weight.to(dtype), rhs=self.rhs.to(dtype))


@dataclass(frozen=True)
class MeanRows:
    """``w mean(A x) = rhs``, one equation a channel of the whole batch: what a running mean tells."""

    geometry: ConvGeometry
    weight: Tensor
    batch: int
    rhs: Tensor
    row_weight: float = 1.0

    @property
    def shape(self) -> torch.Size:
        """Of x."""
        return torch.Size((self.batch, self.geometry.in_channels, *self.geometry.input_size))

    @property
    def count(self) -> int:
        """One a channel."""
        return self.rhs.numel()

    def apply(self, x: Tensor) -> Tensor:
        """``w mean(A x)``, (1, F, 1, ...)."""
        return self.row_weight * NormSets().mean(apply_weight(self.geometry, x, self.weight))

    def adjoint(self, y: Tensor) -> Tensor:
        """``w A^T (y / N)``, N outputs a channel."""
        shared = y * (self.row_weight / (self.batch * self.geometry.n_output))
        spread = shared.expand(self.batch, self.geometry.out_channels, *self.geometry.out_size)
        return apply_weight_adjoint(self.geometry, spread, self.weight)

    def diagonal(self) -> Tensor:
        """About ``(|W| w)^2 / n`` for each of the n values: a small share of any system's."""
        return (self.weight.square().sum() * self.row_weight**2 / self.shape.numel()).reshape(1)

    def normal(self) -> Tensor:
        """``M^T M``, column by column."""
        return normal_by_columns(self, self.shape, self.rhs)

    def scaled(self, factor: float) -> MeanRows:
        """The block times `factor`."""
        return replace(self, row_weight=self.row_weight * factor, rhs=self.rhs * factor)

    def to(self, dtype: torch.dtype) -> MeanRows:
        """The block in another dtype."""
        return replace(self, weight=self.weight.to(dtype), rhs=self.rhs.to(dtype))


@dataclass(frozen=True)
class TangentRows:
    """Gradient constraints around x0 where ``g(x) = g0 + slope C A (x - x0)`` depends on x.

        ``B(g0) x + B(slope C A x) x0 = dW + B(slope C A x0) x0``,  ``B(g) x = sum_{b,u} g[b,f,u] x[b,c,i]``

    C takes each set's mean off (the identity where the mean is known). At x0 the residual is ``B(g0) x0 - dW``.
    """

    main: GradientRows
    weight: Tensor
    sets: NormSets | None
    slope: Tensor
    point: Tensor
    rhs: Tensor

    @classmethod
    def create(
        cls, main: GradientRows, weight: Tensor, sets: NormSets | None, slope: Tensor, point: Tensor
    ) -> TangentRows:
        """`main` are the rows with g0, `slope` (B, F, ...) scaled filter by filter as they are."""
        rows = cls(main, weight, sets, slope, point, main.rhs)
        return replace(rows, rhs=main.rhs + rows._turn(point))

    @property
    def geometry(self) -> ConvGeometry:
        """Of the convolution."""
        return self.main.geometry

    @property
    def count(self) -> int:
        """As many as gradient constraints."""
        return self.main.count

    def _centre(self, o: Tensor) -> Tensor:
        return o if self.sets is None else self.sets.centre(o)

    def _turn(self, x: Tensor) -> Tensor:
        """``B(slope C A x) x0``: what the change of g adds."""
        change = self.slope * self._centre(apply_weight(self.geometry, x, self.weight))
        return apply_gradient(self.geometry, self.point, change)

    def apply(self, x: Tensor) -> Tensor:
        """``B(g0) x + B(slope C A x) x0``."""
        return self.main.apply(x) + self._turn(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """``B(g0)^T y + A^T C slope (y * x0)``."""
        change = self._centre(self.slope * apply_weight(self.geometry, self.point, y))
        return self.main.adjoint(y) + apply_weight_adjoint(self.geometry, change, self.weight)

    def diagonal(self) -> Tensor:
        """That of ``B(g0)``, to which the change of g adds little."""
        return self.main.diagonal()

    def normal(self) -> Tensor:
        """``M^T M``, column by column."""
        return normal_by_columns(self, self.point.shape, self.rhs)

    def scaled(self, factor: float) -> TangentRows:
        """The block times `factor`."""
        return replace(self, main=self.main.scaled(factor), slope=self.slope * factor, rhs=self.rhs * factor)

    def to(self, dtype: torch.dtype) -> TangentRows:
        """The block in another dtype."""
        return replace(
            self,
            main=self.main.to(dtype),
            weight=self.weight.to(dtype),
            slope=self.slope.to(dtype),
            point=self.point.to(dtype),
            rhs=self.rhs.to(dtype),
        )


@dataclass(frozen=True)
class OffsetRows:
    r"""``w mean(x over a class) = 0``: pins the constants that a norm hides, one a channel and class.

    Attributes
    ----------
    classes : Tensor
        (R, \*in): w over its size on the positions of a class (see `hidden_classes`), else 0.
    shape : torch.Size
        Of x, (B, C, \*in).
    shared : bool
        Whether all samples share one constant (batch norm) or each has its own.
    """

    classes: Tensor
    shape: torch.Size
    shared: bool
    rhs: Tensor

    @classmethod
    def create(cls, classes: Tensor, shape: torch.Size, shared: bool, like: Tensor) -> OffsetRows:
        """`classes` (R, ...) bool; values in the dtype and on the device of `like`."""
        sizes = classes.flatten(1).sum(dim=1).to(like)
        mean = classes.to(like) / sizes.reshape(-1, *(1,) * (classes.ndim - 1))
        return cls(mean, shape, shared, like.new_zeros(1 if shared else shape[0], shape[1], len(classes)))

    @property
    def count(self) -> int:
        """One a channel and class."""
        return self.rhs.numel()

    @property
    def masks(self) -> Tensor:
        r"""The classes (R, \*in), bool."""
        return self.classes != 0

    @property
    def members(self) -> Tensor:
        r"""Which positions belong to a class, (\*in) bool."""
        return self.masks.any(dim=0)

    def apply(self, x: Tensor) -> Tensor:
        """``w mean(x)``, (1 or B, C, R)."""
        means = x.flatten(2) @ self.classes.flatten(1).mT
        return means.mean(dim=0, keepdim=True) if self.shared else means

    def adjoint(self, y: Tensor) -> Tensor:
        """Each class's number on its positions."""
        values = (y @ self.classes.flatten(1)).reshape(*y.shape[:2], *self.shape[2:])
        return (values / self.shape[0]).expand(self.shape) if self.shared else values

    def diagonal(self) -> Tensor:
        """``w^2 / size^2``."""
        squares = self.classes.square().sum(dim=0)
        return squares / self.shape[0] ** 2 if self.shared else squares

    def normal(self) -> Tensor:
        """``M^T M``, column by column."""
        return normal_by_columns(self, self.shape, self.rhs)

    def scaled(self, factor: float) -> OffsetRows:
        """The block times `factor`."""
        return replace(self, classes=self.classes * factor, rhs=self.rhs * factor)

    def to(self, dtype: torch.dtype) -> OffsetRows:
        """The block in another dtype."""
        return replace(self, classes=self.classes.to(dtype), rhs=self.rhs.to(dtype))
