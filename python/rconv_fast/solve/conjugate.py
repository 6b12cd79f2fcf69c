"""The step of conjugate gradients, once for all who iterate; when to stop is theirs to say.

For ``N x = v`` with N positive semidefinite and a preconditioner P of it, from x = 0 and ``s = v``
(Hestenes and Stiefel 1952):

    q = N p,  alpha = gamma / <p, q>,  x += alpha p,  s -= alpha q,
    z = P^-1 s,  gamma' = <s, z>,  p = z + (gamma' / gamma) p.

For ``min ||r - M x||``, ``N = M^T M``, the residual r is updated instead and ``s = M^T r`` (Bjorck 1996, section 7.4).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

Preconditioner = Callable[[Tensor], Tensor]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two tensors of the same shape, in one pass."""
    return torch.dot(a.flatten(), b.flatten())


def identity(v: Tensor) -> Tensor:
    """No preconditioner."""
    return v


class ConjugateGradients(ABC):
    """State of the iteration.

    Attributes
    ----------
    x : Tensor
        The iterate.
    s, z, p : Tensor
        What is left of the right-hand side, the same preconditioned, the direction.
    gamma, before : Tensor
        ``<s, z>``, now and one step ago.
    alpha : Tensor
        How far the last step went along p.
    """

    def __init__(self, s: Tensor, preconditioner: Preconditioner) -> None:
        self.preconditioner = preconditioner
        self.x = torch.zeros_like(s)
        self.look(s)
        self.before = self.gamma
        self.p = self.z.clone()

    def look(self, s: Tensor) -> None:
        """Take `s` for what is left of the right-hand side."""
        self.s = s
        self.z = self.preconditioner(s)
        self.gamma = dot(self.s, self.z)

    def step(self) -> None:
        """Go to the minimum along p."""
        curvature = self._product()
        self.alpha = self._slope() / curvature
        self.before = self.gamma
        self.x.addcmul_(self.p, self.alpha)
        self.look(self._remaining(self.alpha))

    def turn(self) -> None:
        """The next direction, conjugate to the last ones."""
        self.p = torch.addcmul(self.z, self.p, self._beta())

    def _slope(self) -> Tensor:
        """``<s, p>``, which is gamma as long as directions are conjugate."""
        return self.gamma

    def _beta(self) -> Tensor:
        """Share of the last direction in the next."""
        return self.gamma / self.before

    @abstractmethod
    def _product(self) -> Tensor:
        """``<p, N p>``."""

    @abstractmethod
    def _remaining(self, alpha: Tensor) -> Tensor:
        """``s - alpha N p``."""


class Symmetric(ConjugateGradients):
    """``N x = s`` for N given by its products."""

    def __init__(self, apply: Callable[[Tensor], Tensor], s: Tensor, preconditioner: Preconditioner = identity) -> None:
        self.apply = apply
        super().__init__(s, preconditioner)

    def _product(self) -> Tensor:
        self._q = self.apply(self.p)
        return dot(self.p, self._q)

    def _remaining(self, alpha: Tensor) -> Tensor:
        return self.s.addcmul(self._q, alpha, value=-1)


class _Bounded(Symmetric):
    """The same, standing still along a direction that N does not see."""

    def _product(self) -> Tensor:
        curvature = super()._product()
        self.seen = curvature > 0
        return torch.where(self.seen, curvature, 1.0)

    def _slope(self) -> Tensor:
        return torch.where(self.seen, self.gamma, 0.0)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    v: Tensor,
    preconditioner: Preconditioner = identity,
    *,
    tolerance: float,
    iterations: int,
) -> tuple[Tensor, int]:
    """Solve ``N x = v`` from 0, and how many iterations that took.

    It ends where ``||P^-1/2 s||`` has fallen by `tolerance`, after so many `iterations`, or at a direction that N does
    not see.
    """
    state = _Bounded(apply, v, preconditioner)
    goal, count = tolerance**2 * float(state.gamma), 0
    while count < iterations and float(state.gamma) > goal:  # synchronize!
        count += 1
        state.step()
        if not bool(state.seen):
            break
        state.turn()
    return state.x, count


class LeastSquares(ConjugateGradients):
    """``min ||r - M x||`` for M given by its products; the residual is kept in `r`, part by part."""

    def __init__(
        self,
        apply: Callable[[Tensor], list[Tensor]],
        adjoint: Callable[[list[Tensor]], Tensor],
        r: list[Tensor],
        preconditioner: Preconditioner = identity,
    ) -> None:
        self.apply, self.adjoint, self.r = apply, adjoint, r
        super().__init__(adjoint(r), preconditioner)

    def _product(self) -> Tensor:
        self._q = self.apply(self.p)
        return functools.reduce(torch.add, [dot(part, part) for part in self._q])

    def _remaining(self, alpha: Tensor) -> Tensor:
        self.r = [ri.addcmul(qi, alpha, value=-1) for ri, qi in zip(self.r, self._q, strict=True)]
        return self.adjoint(self.r)

    def renew(self, r: list[Tensor], factor: float) -> None:
        """Go on from x = 0 with another residual, `factor` times the one that is left, in the same direction."""
        self.x.zero_()
        self.r = r
        self.p, self.before = self.p * factor, self.before * factor**2
        self.look(self.adjoint(r))
