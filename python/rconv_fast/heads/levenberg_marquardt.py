"""Levenberg-Marquardt on many small problems at once: the one solver of every head's equations."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from rconv_fast.budget import Budget

# Damping is divided by 5 after a success and multiplied by 4 after a failure.
_START = 1e-2
_SUCCESS = 0.2
_FAILURE = 4.0
_RANGE = (1e-15, 1e8)
# Finished problems leave the batch every so many iterations (each check reads a mask back to the host).
_CHECK_EVERY = 5

S = TypeVar("S", bound="State")


@dataclass
class State:
    """Where each problem stands; a subclass adds what its next step needs. All tensors share the leading dimension.

    Attributes
    ----------
    z : Tensor, shape (m, ...)
        Unknowns.
    cost : Tensor, shape (m,)
        Squared norm of the residual.
    """

    z: Tensor
    cost: Tensor

    def where(self: S, accept: Tensor, other: S) -> S:
        """Take `other` where `accept` is set."""
        kept = {}
        for f in fields(self):
            mine = getattr(self, f.name)
            mask = accept.reshape(-1, *(1,) * (mine.ndim - 1))
            kept[f.name] = torch.where(mask, getattr(other, f.name), mine)
        return type(self)(**kept)

    def take(self: S, index: Tensor) -> S:
        """Keep the problems at `index`."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


class Problems(Protocol[S]):
    """Least-squares problems of one kind, all of one size."""

    def evaluate(self, z: Tensor) -> S:
        """The state of every problem at z."""

    def step(self, state: S, damping: Tensor) -> Tensor:
        """The damped Gauss-Newton step of every problem, see :func:`damped_step`."""

    def take(self, index: Tensor) -> Problems[S]:
        """The problems at `index`."""


def damped_step(normal: Tensor, slope: Tensor, damping: Tensor) -> Tensor:
    """Solve ``(J^T J + lambda mean(diag J^T J) I) dz = -J^T r`` for each problem; 0 where that is not definite.

    Parameters
    ----------
    normal : Tensor, shape (m, k, k)
        ``J^T J``; its diagonal is overwritten.
    slope : Tensor, shape (m, k)
        ``J^T r``.
    damping : Tensor, shape (m,)
        ``lambda``.
    """
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += (damping * diagonal.mean(1) + torch.finfo(normal.dtype).tiny)[:, None]
    factor, info = torch.linalg.cholesky_ex(normal)
    step = torch.cholesky_solve(slope[:, :, None], factor)[:, :, 0]
    return torch.where((info == 0)[:, None], -step, torch.zeros_like(step))


def minimise(
    problems: Problems[S],
    start: Tensor,
    *,
    iterations: int,
    tolerance: float,
    budget: Budget,
    damping: float = _START,
    stall: float = 1.0,
    one_is_enough: bool = False,
) -> Tensor:
    """Run Levenberg-Marquardt on every problem at once.

    Parameters
    ----------
    problems : Problems
        The equations.
    start : Tensor, shape (m, ...)
        First guess.
    iterations : int
        Upper bound; problems stop earlier when they are solved or stuck.
    tolerance : float
        A problem is solved when the norm of its residual is below.
    budget : Budget
        When it is over, every problem stays where it stands.
    damping : float
        First damping, relative to the mean diagonal of ``J^T J``; small for starts close to a root.
    stall : float
        A problem is given up when its squared residual is not below this share of what it was five iterations before.
    one_is_enough : bool
        Whether all problems stop as soon as one is solved.

    Returns
    -------
    Tensor, shape (m, ...)
        The unknowns, solved or not.
    """
    result = start.clone()
    active = torch.arange(start.shape[0], device=start.device)
    state = problems.evaluate(start)
    lam = torch.full_like(state.cost, damping)
    before = state.cost
    for iteration in range(iterations):
        trial = problems.evaluate(state.z + problems.step(state, lam))
        better = trial.cost < state.cost
        state = state.where(better, trial)
        lam = (lam * torch.where(better, _SUCCESS, _FAILURE)).clamp(*_RANGE)
        if budget.spent:
            break
        if iteration % _CHECK_EVERY != _CHECK_EVERY - 1:
            continue
        # synchronises: solved, stalled, or so damped that it no longer moves
        solved = state.cost <= tolerance**2
        running = ~solved & (lam < _RANGE[1]) & (state.cost <= stall * before)
        result[active] = state.z
        keep = running.nonzero()[:, 0]
        if len(keep) == 0 or (one_is_enough and bool(solved.any())):
            return result
        if len(keep) < len(running):
            active, state, lam, problems = active[keep], state.take(keep), lam[keep], problems.take(keep)
        before = state.cost
    result[active] = state.z
    return result
