"""The recursion of R-CONV, last layer first: each input from its layer's output, gradient and equations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rconv_fast.errors import InterruptedInversionError, UnsupportedModelError
from rconv_fast.graph import Graph, Step
from rconv_fast.layers.bounds import flat_rows
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.layers.rules import (
    ActivationRule,
    AffineRule,
    AverageRule,
    ConvRule,
    RearrangeRule,
    UnsupportedRule,
    linear_map_rows,
)
from rconv_fast.layers.snap import THRESHOLD_FACTOR, snap
from rconv_fast.progress import Event
from rconv_fast.solve import PointRows, Rows, Solution, System, apply_prior, solve, solve_nonnegative
from rconv_fast.solve.krylov import InterruptedSolve

# With fewer equations an unknown than this, what x >= 0 adds is worth more than further iterations.
SCARCE, SCARCE_ITERATIONS = 1.2, 300
# Thresholds tried, in units of the noise, when a layer's equations contradict the first choice.
RETRY_FACTORS = (1.0, 30.0, 0.1, 300.0)


@dataclass(frozen=True)
class LayerReport:
    """How one layer's input was found: counts, rank, condition, relative residual, solver, seconds."""

    name: str
    kind: str
    rows: int
    unknowns: int
    rank: int
    condition: float
    residual: float
    solver: str
    proof: str
    seconds: float
    iterations: int = 0


@dataclass
class Walk:
    """One pass over the graph, from the logits' gradient to the input.

    Attributes
    ----------
    graph : Graph
        The model.
    precision : float
        Relative rounding of the shared gradients.
    values, grads : dict
        Recovered tensors and their gradients, by step.
    prior : {None, "box", "nonnegative", "tv"}
        Which solution to prefer for the network's input where the equations leave it open.
    patterns : dict
        Activations of a forward pass of an earlier answer; where given, they decide the sides of the kinks.
    """

    graph: Graph
    precision: float
    progress: Callable[[Event], None] = lambda _: None
    prior: str | None = None
    patterns: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    determined: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    reports: dict[str, LayerReport] = field(default_factory=dict)

    def run(self, grad_logits: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        r"""Recover the input (B, \*input_shape) from ``dL/dlogits`` and the tensors `known` with it, by step.

        Raises
        ------
        UnsupportedModelError
            At a layer that cannot be passed; the features recovered so far ride on it.
        """
        output = self.graph.steps[self.graph.output]
        self.grads[output.name] = grad_logits.reshape(output.shape)
        self.values.update(known)
        for name in reversed(list(self.graph.steps)[:-1]):
            self._settle_or_stop(self.graph.steps[name])
        return self.values[self.graph.input]

    def _settle_or_stop(self, step: Step) -> None:
        """Settle a step; Ctrl-C leaves with what is known."""
        try:
            self.settle(step)
        except KeyboardInterrupt as interrupt:
            partial = interrupt.x if isinstance(interrupt, InterruptedSolve) else None
            raise InterruptedInversionError(self._layer_of(step)[0], self._features(), partial) from None

    def settle(self, step: Step) -> None:
        """Find the gradient of one step's tensor, and its values where they follow."""
        consumers = self.graph.consumers[step.name]
        if not consumers:
            return
        self.grads[step.name] = self._gradient(step)
        if step.name in self.values:
            self._snap(step)
            return
        known = self.knowledge(step.name)
        if known is not None and known.is_full:
            self.values[step.name] = known.value
        elif known is not None and self._gradient_covered(step, known):
            self.values[step.name] = torch.where(known.weight > 0, known.value, 0.0)
            self.determined[step.name] = known.weight > 0
        elif self._must_solve(step):
            rows = [rows for name, _ in consumers for rows in self._rows(name, step)]
            self._solve(step, rows, known)
        if step.name in self.values:
            self._snap(step)

    def _gradient_covered(self, step: Step, known: Knowledge) -> bool:
        """Whether only values that pass no gradient are open: no layer before an activation needs them."""
        if not isinstance(step.rule, ActivationRule):
            return False
        return not bool(self.grads[step.name][known.weight == 0].any())

    def _must_solve(self, step: Step) -> bool:
        """Whether to solve: for inputs of convolutions and the network's; other tensors follow from those."""
        consumers = [self.graph.steps[name].rule for name, _ in self.graph.consumers[step.name]]
        return step.name == self.graph.input or any(isinstance(rule, ConvRule) for rule in consumers)

    def _gradient(self, step: Step) -> Tensor:
        """``dL/d(step)``: the sum over its consumers."""
        total = torch.zeros(step.shape, dtype=self._any().dtype, device=self._any().device)
        for name, operand in self.graph.consumers[step.name]:
            consumer = self.graph.steps[name]
            rule = consumer.rule
            if isinstance(rule, UnsupportedRule):
                raise self._stop(consumer, rule.reason)
            if name not in self.grads:
                continue
            y = self.values.get(name)
            if rule.needs_output and y is None:
                reason = f"{rule.kind}, whose output the layers behind it do not determine"
                raise self._stop(consumer, reason)
            total = total + rule.pull_gradient(self.grads[name], y, operand, step.shape)
        return total

    def _any(self) -> Tensor:
        return self.grads[self.graph.output]

    def _stop(self, step: Step, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(step.label, reason, self._features())

    def _features(self) -> dict[str, Tensor]:
        """The layer inputs recovered so far, by layer name."""
        return {
            self.graph.steps[consumer].label: self.values[name]
            for name in self.values
            for consumer, _ in self.graph.consumers[name]
            if isinstance(self.graph.steps[consumer].rule, ConvRule)
        }

    def knowledge(self, name: str) -> Knowledge | None:
        """What is known of a step's values one by one: recovered, or following from the steps behind it."""
        if name in self.values:
            fixed = self.determined.get(name)
            value = self.values[name]
            return Knowledge.full(value) if fixed is None else Knowledge(value, fixed.to(value))
        known: Knowledge | None = None
        for consumer_name, operand in self.graph.consumers[name]:
            consumer = self.graph.steps[consumer_name]
            if isinstance(consumer.rule, ConvRule):
                continue
            behind = self.knowledge(consumer_name)
            if behind is None:
                continue
            operands = [None if o == name else self.evaluate(o) for o in consumer.inputs]
            pulled = consumer.rule.pull_value(behind, operand, operands)
            if pulled is not None:
                known = pulled if known is None else known.merge(pulled)
        return known

    def evaluate(self, name: str) -> Tensor | None:
        """A step's values by running the model forward from what is recovered, or None."""
        if name in self.values:
            return self.values[name]
        step = self.graph.steps[name]
        operands = [self.evaluate(o) for o in step.inputs]
        if not operands or any(o is None for o in operands):
            return None
        with torch.no_grad():
            return step.forward(*operands)

    def _rows(self, name: str, step: Step) -> list[Rows]:
        """The equations that one consumer of a step has for it."""
        if name not in self.grads:
            return []
        rule = self.graph.steps[name].rule
        shape = torch.Size((step.shape[0], step.shape[1], *(step.shape[2:] or (1,))))
        rows = rule.rows(self.grads[name], self.knowledge(name), shape)
        for behind, _ in self.graph.consumers[name]:  # a convolution, then an average: their product is linear
            average = self.graph.steps[behind]
            if isinstance(rule, ConvRule) and isinstance(average.rule, AverageRule):
                forward = self._composed(self.graph.steps[name], average, step.shape)
                rows += linear_map_rows(forward, self.knowledge(behind), shape)
        return rows

    @staticmethod
    def _composed(first: Step, second: Step, shape: torch.Size) -> Callable[[Tensor], Tensor]:
        return lambda x: second.forward(first.forward(x.reshape(shape)))

    def _solve(self, step: Step, rows: list[Rows], known: Knowledge | None) -> None:
        """Solve a step's equations; where they contradict themselves, retry with other ReLU thresholds."""
        start = time.perf_counter()
        label, kind = self._layer_of(step)
        self.progress(Event(label, "solve"))
        best = self._solve_once(step, rows, known, label)
        bar = self._bar()
        chosen = self._threshold_step(step) if self._all_determined() else None
        if best.residual > bar and best.converged and best.rows > best.unknowns and chosen is not None:
            best = self._retry(step, chosen, best, bar, label)
        if self.prior is not None and step.name == self.graph.input and not bool(best.determined.all()):
            self.progress(Event(label, f"prior {self.prior}"))
            inequalities = flat_rows(self.graph, self.values, step.name)
            rows = [rows for name, _ in self.graph.consumers[step.name] for rows in self._rows(name, step)]
            best = apply_prior(self._system(step, rows, known), best, self.prior, inequalities)
        shape = step.shape
        self.values[step.name] = best.x.reshape(shape)
        self.determined[step.name] = best.determined.reshape(shape)
        self.reports[step.name] = LayerReport(
            label,
            kind,
            best.rows,
            best.unknowns,
            best.rank,
            best.condition,
            best.residual,
            best.solver,
            best.proof,
            time.perf_counter() - start,
            best.iterations,
        )

    def _system(self, step: Step, rows: list[Rows], known: Knowledge | None) -> System:
        """All equations of a step's values."""
        shape = torch.Size((step.shape[0], step.shape[1], *(step.shape[2:] or (1,))))
        if known is not None and bool((known.weight > 0).any()):
            rows = [*rows, PointRows.create(known.value.reshape(shape), known.weight.reshape(shape))]
        support = step.rule.support if isinstance(step.rule, RearrangeRule) else None
        support = None if support is None or bool(support.all()) else support.reshape(shape)
        return System(shape, tuple(rows), support)

    def _solve_once(self, step: Step, rows: list[Rows], known: Knowledge | None, label: str) -> Solution:
        system = self._system(step, rows, known)
        scarce = system.count < SCARCE * system.unknowns and self._never_negative(step)
        found = solve(
            system,
            rtol=max(1e-15, 1e-3 * self.precision),
            max_iterations=SCARCE_ITERATIONS if scarce else None,
            progress=lambda i, r: self.progress(Event(label, "solve", i, None, r)),
        )
        bar = self._bar()
        settled = found.converged and (self._is_fixed(step, found) or found.residual > bar)
        if settled or not self._never_negative(step) or found.unknowns > 2 * found.rank:
            return found  # the last: zeros cannot fix more directions than half of the values (Wendel)
        return solve_nonnegative(
            system,
            found,
            tolerance=bar,
            progress=lambda i, r: self.progress(Event(label, "nonnegative", i, None, r)),
        )

    def _all_determined(self) -> bool:
        """Whether the layers so far left nothing open: otherwise equations contradict each other for that reason."""
        return all(bool(determined.all()) for determined in self.determined.values())

    @staticmethod
    def _is_fixed(step: Step, found: Solution) -> bool:
        """Whether the equations determine all values; of copies that a rearrangement made, one is enough."""
        fixed = found.determined.reshape(step.shape)
        if not isinstance(step.rule, RearrangeRule) or bool(fixed.all()):
            return bool(fixed.all())
        known = Knowledge(found.x.reshape(step.shape), fixed.to(found.x))
        return all(step.rule.pull_value(known, operand, ()).is_full for operand in range(len(step.inputs)))

    def _bar(self) -> float:
        """Relative residual up to which equations agree with each other."""
        return max(1e3 * self.precision, 1e-9)

    def _never_negative(self, step: Step) -> bool:
        """Whether a step's values are outputs of activations that have 0 as their low flat piece, moved about."""
        activations = self.graph.activations(step.name)
        return activations is not None and all(a.low == 0 and 0.0 in a.flats for a in activations)

    def _layer_of(self, step: Step) -> tuple[str, str]:
        """Name and kind of the layer(s) whose input a step is."""
        consumers = [self.graph.steps[name] for name, _ in self.graph.consumers[step.name]]
        layers = [c for c in consumers if isinstance(c.rule, ConvRule)] or consumers
        return " + ".join(c.label for c in layers), " + ".join(dict.fromkeys(c.rule.kind for c in layers))

    def _threshold_step(self, step: Step) -> Step | None:
        """The activation with flat pieces whose thresholds shaped the gradient a step was solved with."""
        names = [name for name, _ in self.graph.consumers[step.name]]
        while names:
            behind = self.graph.steps[names.pop(0)]
            if isinstance(behind.rule, ActivationRule) and behind.rule.activation.flats:
                return None if behind.name in self.patterns else behind  # there, the forward pass decides
            names += [name for name, _ in self.graph.consumers[behind.name]]
        return None

    def _retry(self, step: Step, chosen: Step, best: Solution, bar: float, label: str) -> Solution:
        """Other thresholds at one activation, the steps between solved again; the smallest residual wins."""
        names = list(self.graph.steps)
        between = names[names.index(step.name) + 1 : names.index(chosen.name)]
        best_factor = self.factors.get(chosen.name, THRESHOLD_FACTOR)
        for factor in RETRY_FACTORS:
            self.progress(Event(label, f"retry with another threshold at {chosen.label}"))
            candidate = self._with_factor(step, chosen, between, factor, label)
            if candidate.residual < best.residual / 2:
                best, best_factor = candidate, factor
            if best.residual <= bar:
                return best
        return self._with_factor(step, chosen, between, best_factor, label)

    def _with_factor(self, step: Step, chosen: Step, between: list[str], factor: float, label: str) -> Solution:
        self.factors[chosen.name] = factor
        for name in (*between, step.name):
            self.values.pop(name, None)
        self._snap(chosen)
        for name in reversed(between):
            self.settle(self.graph.steps[name])
        self.grads[step.name] = self._gradient(step)
        rows = [rows for name, _ in self.graph.consumers[step.name] for rows in self._rows(name, step)]
        return self._solve_once(step, rows, self.knowledge(step.name), label)

    def _snap(self, step: Step) -> None:
        """Put recovered activations on their side of the kinks."""
        rule = step.rule
        if not isinstance(rule, ActivationRule) or not (rule.activation.kinks or _bounded(rule)):
            return
        raw = self.raw.setdefault(step.name, self.values[step.name])
        pattern = self.patterns.get(step.name)
        if pattern is not None:
            self.values[step.name] = _impose(rule, raw, pattern)
            return
        snapped = snap(
            rule.activation,
            raw,
            self.grads[step.name],
            self._grad_bias(step),
            precision=self.precision,
            factor=self.factors.get(step.name, THRESHOLD_FACTOR),
        )
        self.values[step.name] = snapped.value

    def _grad_bias(self, step: Step) -> Tensor | None:
        """The known sum over ``dL/do`` of an activation's input o, if o is made by a layer with a bias."""
        before = self.graph.steps[step.inputs[0]]
        if len(self.graph.consumers[before.name]) > 1:
            return None
        if isinstance(before.rule, ConvRule | AffineRule):
            return before.rule.grad_bias
        return None

    raw: dict[str, Tensor] = field(default_factory=dict)


def _bounded(rule: ActivationRule) -> bool:
    return math.isfinite(rule.activation.low) or math.isfinite(rule.activation.high)


def _impose(rule: ActivationRule, raw: Tensor, pattern: Tensor) -> Tensor:
    """Values on the sides that a forward pass shows."""
    value = raw.clamp(rule.activation.low, rule.activation.high)
    for kink in rule.activation.kinks:
        wrong = torch.sign(value - kink) != torch.sign(pattern - kink)
        value = torch.where(wrong, pattern, value)
    return value
