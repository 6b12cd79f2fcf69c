"""What a pass finds, what it may start from, and what it may do: values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.layers.conv import ConvRule
from rconv_fast.progress import Event
from rconv_fast.walk.graph import Graph
from rconv_fast.walk.report import LayerReport

Progress = Callable[[Event], None]

# The reasons of a stop by Ctrl-C and by the budget.
INTERRUPTED, OUT_OF_TIME = "an interrupt", "the time limit"


@dataclass(frozen=True)
class Stop:
    """Where a pass could not go on, why, and whether a hidden pattern is all it lacks."""

    step: str
    label: str
    reason: str
    hidden: bool = False


@dataclass(frozen=True)
class Contradiction:
    """Equations of `step` that do not fit each other, the activation `chosen` whose thresholds shaped them, by what."""

    step: str
    chosen: str
    factor: float


@dataclass(frozen=True)
class Pass:
    """What one pass found, by step name.

    Attributes
    ----------
    values, grads : mapping of str to Tensor
        Recovered tensors (activations on their side of the kinks), and ``dL/d`` them.
    raw : mapping of str to Tensor
        Those of `values` that were put on their side of a kink, as they were solved.
    determined : mapping of str to Tensor
        Bool: which values the equations fix; all where left out.
    solutions : mapping of str to Solution
        Of the steps that were solved for.
    reports : mapping of str to LayerReport
        One a solved step, last layer first.
    stop : Stop or None
        Where it ended before the input.
    contradiction : Contradiction or None
        Where it ended since another threshold may do better.
    open : frozenset of str
        Solved steps whose equations leave open what the layers before need.
    deviations : mapping of str to Tensor
        Standard deviations of values that are only to be expected, under a prior.
    """

    values: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]
    raw: Mapping[str, Tensor] = field(default_factory=dict)
    determined: Mapping[str, Tensor] = field(default_factory=dict)
    reports: Mapping[str, LayerReport] = field(default_factory=dict)
    stop: Stop | None = None
    contradiction: Contradiction | None = None
    open: frozenset[str] = frozenset()
    deviations: Mapping[str, Tensor] = field(default_factory=dict)

    def repeated(self, index: Tensor) -> Pass:
        """The same for a batch whose samples are these, by number."""

        def rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor[index] for name, tensor in tensors.items()}

        values, grads, raw, determined = map(rows, (self.values, self.grads, self.raw, self.determined))
        deviations = rows(self.deviations)
        return replace(self, values=values, grads=grads, raw=raw, determined=determined, deviations=deviations)

    def with_value(self, name: str, value: Tensor) -> Pass:
        """The same with another value of one step."""
        return replace(self, values={**self.values, name: value})

    def known(self, names: list[str] | None = None) -> Known:
        """What another pass may start from: these steps (all if left out), activations as they were solved."""
        names = list(self.values) if names is None else names
        values = {**self.values, **self.raw}
        return Known(
            {name: values[name] for name in names if name in values},
            {name: self.determined[name] for name in names if name in self.determined},
            {name: self.reports[name] for name in names if name in self.reports},
            self.open & set(names),
            {name: self.deviations[name] for name in names if name in self.deviations},
        )


@dataclass(frozen=True)
class Known:
    """Tensors a pass need not solve for, as a `Pass` holds them."""

    values: Mapping[str, Tensor] = field(default_factory=dict)
    determined: Mapping[str, Tensor] = field(default_factory=dict)
    reports: Mapping[str, LayerReport] = field(default_factory=dict)
    open: frozenset[str] = frozenset()
    deviations: Mapping[str, Tensor] = field(default_factory=dict)

    def and_also(self, other: Known) -> Known:
        """Both."""
        return Known(
            {**self.values, **other.values},
            {**self.determined, **other.determined},
            {**self.reports, **other.reports},
            self.open | other.open,
            {**self.deviations, **other.deviations},
        )


@dataclass(frozen=True)
class Options:
    """What a pass may do: spacing of the gradients' values, prior for an open input, time, who is told, their noise."""

    precision: float
    prior: str | None = None
    budget: Budget = field(default_factory=Budget)
    progress: Progress = lambda _: None
    noise: Mapping[str, float | Tensor] = field(default_factory=dict)

    def relative_noise(self, name: str, gradient: Tensor) -> float:
        """The noise of a parameter's gradient over its size, 0 where none was stated."""
        sigma = torch.as_tensor(self.noise.get(name, 0.0), dtype=torch.float64, device=gradient.device)
        return float(sigma.square().mean().sqrt() / gradient.double().square().mean().sqrt())

    @property
    def bar(self) -> float:
        """Relative residual up to which equations agree with each other."""
        return max(1e3 * self.precision, 1e-9)


def features_of(graph: Graph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The recovered inputs of layers with weights, by layer name."""
    return {
        graph.steps[consumer].label: values[name]
        for name in values
        for consumer, _ in graph.consumers.get(name, [])
        if isinstance(graph.steps[consumer].rule, ConvRule)
    }
