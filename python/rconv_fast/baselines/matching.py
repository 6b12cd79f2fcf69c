"""Gradient matching: the distance from a candidate's gradients to those seen, and one loop that lowers it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rconv_fast.baselines.problem import Problem
from rconv_fast.progress import Event

Distance = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def squared(found: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
    """``sum_p ||g_p - g*_p||^2``, the distance of DLG."""
    return torch.stack([(f - s).square().sum() for f, s in zip(found, seen, strict=True)]).sum()


def cosine(found: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
    """``1 - <g, g*> / (||g|| ||g*||)`` over all parameters, the distance of Inverting Gradients."""
    inner = torch.stack([(f * s).sum() for f, s in zip(found, seen, strict=True)]).sum()
    norms = [torch.stack([g.square().sum() for g in gs]).sum().sqrt() for gs in (found, seen)]
    return 1 - inner / (norms[0] * norms[1])


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours along each axis behind the channels; 0 for what is no picture."""
    axes = range(2, x.ndim)
    return torch.stack([x.new_zeros(()), *(x.diff(dim=axis).abs().mean() for axis in axes)]).sum()


@dataclass(frozen=True)
class Objective:
    """``distance(gradients at x, gradients seen) + weight * prior(x)``, where some of x may be held.

    Where inputs f of inner layers are known, ``sum_l ||f_l(x) - f_l||^2 / ||f_l||^2`` is added.

    Attributes
    ----------
    problem : Problem
        The model and what was seen.
    distance : callable
        Of two lists of gradients.
    prior : callable, optional
        Of x.
    weight : float
        Of the prior.
    start : Tensor, optional
        (B, ...), values of x where it is held.
    held : Tensor, optional
        Bool, broadcastable to x: what is not varied.
    features : mapping of str to Tensor
        Inputs of layers by name, (B, ...), as far as they are known.
    """

    problem: Problem
    distance: Distance
    prior: Callable[[Tensor], Tensor] = total_variation
    weight: float = 0.0
    start: Tensor | None = None
    held: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def inputs(self, free: Tensor) -> Tensor:
        """x: the free values, or those held."""
        return free if self.held is None or self.start is None else torch.where(self.held, self.start, free)

    def __call__(self, free: Tensor, targets: Tensor) -> Tensor:
        """The value, with a graph to `free` and `targets`."""
        seen = self.problem.observation
        parameters = {n: p for n, p in self.problem.model.named_parameters() if n in seen.gradients}
        x = self.inputs(free)
        # of torch's kinds of attention only this one can be differentiated twice
        with inputs_of(self.problem.model, self.features) as inner, sdpa_kernel(SDPBackend.MATH):
            loss = seen.factor * seen.loss(self.problem.model(x), targets)
        found = torch.autograd.grad(
            loss, list(parameters.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        value = self.distance(found, [seen.gradients[name] for name in parameters])
        for name, known in self.features.items():
            value = value + (inner[name].flatten(1) - known.flatten(1)).square().sum() / known.square().sum()
        return value + self.weight * self.prior(x) if self.weight else value


@contextmanager
def inputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What the layers `names` are given while this is entered."""
    given: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, n=name: given.update({n: inputs[0]}))
        for name in names
    ]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Descent:
    """The best variables of a descent, their value, the steps made, and whether it left the numbers."""

    variables: list[Tensor]
    value: float
    steps: int
    diverged: bool


def descend(
    value: Callable[[], Tensor],
    variables: Sequence[Tensor],
    optimiser: Optimizer,
    problem: Problem,
    *,
    steps: int,
    stage: str,
    schedule: LRScheduler | None = None,
    direction: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    project: Callable[[], None] = lambda: None,
) -> Descent:
    """Lower ``value()`` over `variables` and keep the best that was met.

    Parameters
    ----------
    value : callable
        The objective at the variables as they are, with a graph.
    variables : sequence of Tensor
        Leaves that require gradients; changed in place.
    optimiser : Optimizer
        Over the same variables.
    problem : Problem
        Its budget ends the loop, its `report` hears of it.
    steps : int
        At most so many.
    stage : str
        What to call it in a report.
    schedule : LRScheduler, optional
        Stepped with the optimiser.
    direction : callable
        Applied to each gradient before the optimiser sees it.
    project : callable
        Called after each step, to bring the variables back to where they may be.
    """

    def closure() -> Tensor:
        at = value()
        for variable, gradient in zip(variables, torch.autograd.grad(at, variables), strict=True):
            variable.grad = direction(gradient)
        return at.detach()

    best, best_value, made = [v.detach().clone() for v in variables], math.inf, 0
    diverged = False
    every = max(1, steps // 100)
    while made < steps and not problem.budget.spent:
        before = [v.detach().clone() for v in variables]
        with torch.enable_grad():
            # what an optimiser returns is the value it began with
            here = float(optimiser.step(closure))  # type: ignore[arg-type]
        made += 1
        if not math.isfinite(here):
            diverged = True
            break
        if here < best_value:
            best, best_value = before, here
        if schedule is not None:
            schedule.step()
        with torch.no_grad():
            project()
        if made % every == 0:
            problem.report(Event("input", stage, made, steps, best_value))
    with torch.enable_grad():
        last = float(value().detach()) if made and not diverged else math.inf
    if last < best_value:
        best, best_value = [v.detach().clone() for v in variables], last
    return Descent(best, best_value, made, diverged)


def best_of(problem: Problem, restarts: int, attempt: Callable[[torch.Generator, bool], Descent]) -> Descent:
    """The descent with the least value of several; ``attempt(generator, first)`` makes one."""
    generator = torch.Generator().manual_seed(problem.seed)
    best = attempt(generator, True)
    for _ in range(restarts - 1):
        if problem.budget.spent:
            break
        other = attempt(generator, False)
        best = min(best, other, key=lambda descent: descent.value)
    return best
