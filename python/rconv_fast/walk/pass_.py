"""The recursion of R-CONV, last layer first: each input from its layer's output, gradient and equations.

One pure function of the graph, a reading of the head and a pattern. Whoever wants another answer makes another pattern.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rconv_fast.layers.activation import ActivationRule, relu
from rconv_fast.layers.affine import AffineRule
from rconv_fast.layers.base import Equations, Rule, UnsupportedRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.dropout import DropoutRule, with_exact_zeros
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.layers.norm import NormRule
from rconv_fast.layers.rearrange import RearrangeRule
from rconv_fast.patterns.pattern import Pattern
from rconv_fast.patterns.threshold import OTHER_FACTORS, THRESHOLD_FACTOR, snap
from rconv_fast.progress import Event
from rconv_fast.solve import (
    CurvedSystem,
    NormalisedConv,
    PointRows,
    Solution,
    System,
    apply_prior,
    place_by_zeros,
    solve,
    solve_curved,
    solve_nonnegative,
)
from rconv_fast.solve.krylov import InterruptedSolve
from rconv_fast.walk.bounds import flat_rows
from rconv_fast.walk.found import INTERRUPTED, OUT_OF_TIME, Contradiction, Known, Options, Pass, Stop
from rconv_fast.walk.graph import Graph, Step
from rconv_fast.walk.report import LayerReport

# With fewer equations an unknown than this, what x >= 0 adds is worth more than further iterations.
SCARCE, SCARCE_ITERATIONS = 1.2, 300


def run_pass(
    graph: Graph,
    grad_logits: Tensor,
    known: Known,
    pattern: Pattern,
    options: Options,
    *,
    until: str | None = None,
) -> Pass:
    """Recover what follows from ``dL/dlogits`` and the tensors `known` with it, back to the input or to a stop.

    Parameters
    ----------
    graph : Graph
        The model.
    grad_logits : Tensor
        ``dL/dlogits`` (B, n), one reading of the head.
    known : Known
        The head's input at least.
    pattern : Pattern
        The pieces that are decided; the rest is decided from the data.
    options : Options
        Noise, prior, budget, progress.
    until : str, optional
        End after this step.

    Returns
    -------
    Pass
        Also where Ctrl-C or the budget ended it (`stop` says so).

    References
    ----------
    R-CONV (Eltaras et al., WISE 2024), algorithm 1.
    """
    return _Recursion(graph, grad_logits, known, pattern, options).run(until)


class _Halt(Exception):
    """The pass ends here."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop


class _Recursion:
    """The tables that one pass fills; nothing of it outlives the pass."""

    def __init__(self, graph: Graph, grad_logits: Tensor, known: Known, pattern: Pattern, options: Options) -> None:
        self.graph, self.pattern, self.options = graph, pattern, options
        self.given = known
        self.values: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] = {}
        self.factors: dict[str, float] = {}
        self.grads = {graph.output: grad_logits.reshape(graph.steps[graph.output].shape)}
        self.determined = dict(known.determined)
        self.reports = dict(known.reports)
        self.open = set(known.open)
        self.contradiction: Contradiction | None = None
        self.late: set[str] = set()

    def run(self, until: str | None) -> Pass:
        stop = None
        try:
            for name in reversed(list(self.graph.steps)[:-1]):
                self._settle(self.graph.steps[name])
                if name == until or (self.contradiction is not None and until is None):
                    break
        except _Halt as halt:
            stop = halt.stop
        except KeyboardInterrupt as interrupt:
            stop = self._interrupted(self.graph.steps[name], interrupt)
        tables = self.values, self.grads, self.raw, self.determined, self.reports
        return Pass(*tables, stop, self.contradiction, frozenset(self.open))

    def _settle(self, step: Step) -> None:
        """Find the gradient of one step's tensor, and its values where they follow."""
        if not self.graph.consumers[step.name]:
            return
        if self.options.budget.spent:
            raise _Halt(Stop(step.name, self.graph.layer_of(step.name)[0], OUT_OF_TIME))
        gradient = self._gradient(step)
        if gradient is not None:
            self.grads[step.name] = gradient
        known = self._given_or_known(step.name)
        if step.name in self.given.values:
            self.values[step.name] = self.given.values[step.name]
        elif known is not None and known.is_full:
            self.values[step.name] = known.value
        elif known is not None and self._gradient_covered(step, known):
            self.values[step.name] = torch.where(known.weight > 0, known.value, 0.0)
            self.determined[step.name] = known.weight > 0
        elif self._must_solve(step):
            self._solve(step, known)
        if step.name not in self.values:
            if gradient is None:
                self.late.add(step.name)
            return
        if gradient is None:
            self._catch_up(step)
        self._snap(step)

    def _catch_up(self, step: Step) -> None:
        """Gradients that wait for a step's values: those in front of norms with statistics of their own."""
        for name, _ in self.graph.consumers[step.name]:
            if name in self.late:
                value = self._evaluate(name)
                if value is None:
                    continue
                self.values[name] = value
                self.late.discard(name)
                self._catch_up(self.graph.steps[name])
        gradient = self._gradient(step)
        if gradient is None:
            raise self._unpassed_norm(step)
        self.grads[step.name] = gradient

    def _unpassed_norm(self, step: Step) -> _Halt:
        """A norm whose input no equations of a convolution in front of it give."""
        names = [step.name]
        while names:
            for name, _ in self.graph.consumers[names.pop(0)]:
                consumer = self.graph.steps[name]
                if consumer.rule.own_statistics and name not in self.values:
                    reason = f"{consumer.rule.kind}, whose statistics are private, not right behind a convolution"
                    return _Halt(Stop(name, consumer.label, reason))
                names.append(name)
        raise AssertionError(f"no norm behind {step.name}")

    def _given_or_known(self, name: str) -> Knowledge | None:
        return None if name in self.given.values else self._knowledge(name)

    def _gradient_covered(self, step: Step, known: Knowledge) -> bool:
        """Whether only values that pass no gradient are open: no layer before an activation needs them."""
        if not isinstance(step.rule, ActivationRule | DropoutRule) or step.name not in self.grads:
            return False
        return not bool(self.grads[step.name][known.weight == 0].any())

    def _must_solve(self, step: Step) -> bool:
        """Whether to solve: for inputs of convolutions and the network's; other tensors follow from those."""
        consumers = [self.graph.steps[name].rule for name, _ in self.graph.consumers[step.name]]
        return step.name == self.graph.input or any(isinstance(rule, ConvRule) for rule in consumers)

    def _rule(self, step: Step) -> Rule:
        """The step's rule on the pieces that the pattern names."""
        if not step.rule.hidden or step.name not in self.pattern.pieces:
            return step.rule
        return step.rule.at(self.pattern.pieces[step.name])

    def _gradient(self, step: Step) -> Tensor | None:
        """``dL/d(step)``: the sum over its consumers; None where it waits for values (see `_catch_up`)."""
        logits = self.grads[self.graph.output]
        total = torch.zeros(step.shape, dtype=logits.dtype, device=logits.device)
        for name, operand in self.graph.consumers[step.name]:
            consumer = self.graph.steps[name]
            rule = self._rule(consumer)
            if isinstance(rule, UnsupportedRule):
                raise _Halt(Stop(name, consumer.label, rule.reason))
            if name in self.late:
                return None
            if name not in self.grads:
                continue
            y = self.values.get(name)
            if rule.own_statistics and y is None:
                if step.name not in self.values:
                    return None
                total = total + _backward(consumer, self.values[step.name], self.grads[name])
                continue
            if rule.hidden or (rule.needs_output and y is None):
                reason = f"{rule.kind}, whose output the layers behind it do not determine"
                if y is not None:
                    reason = f"{rule.kind}, of which no pattern was found"
                raise _Halt(Stop(name, consumer.label, reason, hidden=True))
            total = total + rule.pull_gradient(self.grads[name], y, operand, step.shape)
        return total

    def _knowledge(self, name: str) -> Knowledge | None:
        """What is known of a step's values one by one: recovered, or following from the steps behind it."""
        if name in self.values:
            fixed = self.determined.get(name)
            value = self.values[name]
            return Knowledge.full(value) if fixed is None else Knowledge(value, fixed.to(value))
        known: Knowledge | None = None
        for consumer_name, operand in self.graph.consumers[name]:
            consumer = self.graph.steps[consumer_name]
            rule = self._rule(consumer)
            if isinstance(rule, ConvRule | UnsupportedRule) or rule.hidden:
                continue
            behind = self._knowledge(consumer_name)
            if behind is None:
                continue
            operands = [None if o == name else self._evaluate(o) for o in consumer.inputs]
            pulled = rule.pull_value(behind, operand, operands)
            if pulled is not None:
                known = pulled if known is None else known.merge(pulled)
        return known

    def _evaluate(self, name: str) -> Tensor | None:
        """A step's values by running the model forward from what is recovered, or None."""
        ahead = self.graph.ahead(self.values, name)
        if ahead is None:
            return None
        values = dict(self.values)
        with torch.no_grad():
            for step in ahead:
                values[step.name] = step.forward(*(values[o] for o in step.inputs))
        return values[name]

    def _rows(self, step: Step) -> list[Equations]:
        """The equations that a step's consumers have for it."""
        rows: list[Equations] = []
        shape = _with_positions(step.shape)
        for name, _ in self.graph.consumers[step.name]:
            through = self._rows_through(step, name, shape)
            rows += through
            whole = any(isinstance(equations, NormalisedConv) for equations in through)
            if name in self.grads and not whole:
                rows += self._rule(self.graph.steps[name]).rows(self.grads[name], self._knowledge(name), shape)
        return rows

    def _rows_through(self, step: Step, name: str, shape: torch.Size) -> list[Equations]:
        """What the layers behind a step's consumer say of the step."""
        rows: list[Equations] = []
        consumer, behind_all = self.graph.steps[name], self.graph.consumers[name]
        for behind_name, _ in behind_all:
            behind = self.graph.steps[behind_name]
            alone = not behind.rule.own_statistics or len(behind_all) == 1
            if behind_name in self.grads and alone:
                forward = _composed(consumer, behind, step.shape)
                grad, known = self.grads[behind_name], self._knowledge(behind_name)
                rows += self._rule(behind).rows_through(consumer.rule, forward, grad, known, shape)
        return rows

    def _solve(self, step: Step, known: Knowledge | None) -> None:
        """Solve a step's equations and report it."""
        start = time.perf_counter()
        label, kind = self.graph.layer_of(step.name)
        self.options.progress(Event(label, "solve"))
        chosen = self._threshold_step(step) if self._all_determined() else None
        rows = self._rows(step)
        if not rows and self._waits(step):
            raise self._unpassed_norm(step)
        system = self._system(step, rows, known)
        best = self._solve_once(system, step, label)
        contradicts = best.residual > self.options.bar and best.converged and best.rows > best.unknowns
        if contradicts and chosen is not None:
            self.contradiction = Contradiction(step.name, chosen.name, self.factors.get(chosen.name, THRESHOLD_FACTOR))
        if self.options.prior is not None and step.name == self.graph.input and not bool(best.determined.all()):
            self.options.progress(Event(label, f"prior {self.options.prior}"))
            if isinstance(system, CurvedSystem):
                system = system.around(best.x)
            inequalities = flat_rows(self.graph, self.values, step.name)
            best = apply_prior(system, best, self.options.prior, inequalities, budget=self.options.budget)
        self.values[step.name] = best.x.reshape(step.shape)
        self.determined[step.name] = best.determined.reshape(step.shape)
        if not _is_fixed(step, best) and self._matters(step):
            self.open.add(step.name)
        self.reports[step.name] = LayerReport(label, kind, best.evidence, time.perf_counter() - start)

    def _matters(self, step: Step) -> bool:
        """Whether a layer before needs what is open: values that pass no gradient back are in no equation there."""
        unknown, grad = ~self.determined[step.name], self.grads.get(step.name)
        return step.name == self.graph.input or grad is None or bool(grad[unknown].any())

    def _interrupted(self, step: Step, interrupt: KeyboardInterrupt) -> Stop:
        """Ctrl-C: the iterate of the solve that was under way is kept, as not determined."""
        if isinstance(interrupt, InterruptedSolve):
            self.values[step.name] = interrupt.x.reshape(step.shape)
            self.determined[step.name] = torch.zeros(step.shape, dtype=torch.bool, device=interrupt.x.device)
        return Stop(step.name, self.graph.layer_of(step.name)[0], INTERRUPTED)

    def _waits(self, step: Step) -> bool:
        return any(name in self.late for name, _ in self.graph.consumers[step.name])

    def _system(self, step: Step, equations: list[Equations], known: Knowledge | None) -> System | CurvedSystem:
        """All equations of a step's values."""
        shape = _with_positions(step.shape)
        rows = [rows for rows in equations if not isinstance(rows, NormalisedConv)]
        norms = tuple(rows for rows in equations if isinstance(rows, NormalisedConv))
        if known is not None and (not equations or bool((known.weight > 0).any())):  # without any: all is open
            rows = [*rows, PointRows.create(known.value.reshape(shape), known.weight.reshape(shape))]
        support = step.rule.support if isinstance(step.rule, RearrangeRule) else None
        support = None if support is None or bool(support.all()) else support.reshape(shape)
        return CurvedSystem(shape, tuple(rows), norms, support) if norms else System(shape, tuple(rows), support)

    def _solve_once(self, system: System | CurvedSystem, step: Step, label: str) -> Solution:
        if isinstance(system, CurvedSystem):
            found = solve_curved(system, lambda linear: self._solve_linear(linear, label), self.options.budget)
            return place_by_zeros(system, found) if self.graph.never_negative(step.name) else found
        options, bounded = self.options, self.graph.never_negative(step.name)
        scarce = system.count < SCARCE * system.unknowns and bounded
        found = self._solve_linear(system, label, SCARCE_ITERATIONS if scarce else None, nonnegative=bounded)
        settled = found.converged and (_is_fixed(step, found) or found.residual > options.bar)
        if settled or not bounded or found.unknowns > 2 * found.rank:
            return found  # the last: zeros cannot fix more directions than half of the values (Wendel)
        return solve_nonnegative(
            system,
            found,
            tolerance=options.bar,
            budget=options.budget,
            progress=lambda i, r: options.progress(Event(label, "nonnegative", i, None, r)),
        )

    def _solve_linear(
        self, system: System, label: str, max_iterations: int | None = None, *, nonnegative: bool = False
    ) -> Solution:
        options = self.options
        return solve(
            system,
            rtol=max(1e-15, 1e-3 * options.precision),
            max_iterations=max_iterations,
            nonnegative=nonnegative,
            budget=options.budget,
            progress=lambda i, r: options.progress(Event(label, "solve", i, None, r)),
        )

    def _all_determined(self) -> bool:
        """Whether the layers so far left nothing open: otherwise equations contradict each other for that reason."""
        return all(bool(determined.all()) for determined in self.determined.values())

    def _threshold_step(self, step: Step) -> Step | None:
        """The activation with flat pieces whose thresholds shaped a step's gradient, if they are still open."""
        names = [name for name, _ in self.graph.consumers[step.name]]
        for name in names:  # which grows: the nearest first, each once
            behind = self.graph.steps[name]
            if isinstance(behind.rule, ActivationRule) and behind.rule.activation.flats:
                decided = behind.name in self.pattern.pieces or behind.name in self.pattern.thresholds
                return None if decided else behind
            names += [farther for farther, _ in self.graph.consumers[name] if farther not in names]
        return None

    def _snap(self, step: Step) -> None:
        """Put recovered activations on their side of the kinks."""
        rule = step.rule
        if isinstance(rule, DropoutRule):
            self.values[step.name] = self._with_zeros(step)
        if not isinstance(rule, ActivationRule) or not (rule.activation.kinks or _bounded(rule)):
            return
        raw = self.raw[step.name] = self.values[step.name]
        piece = self.pattern.pieces.get(step.name)
        if piece is not None:
            self.values[step.name] = _impose(rule, raw, piece)
            return
        decided = step.name in self.pattern.thresholds
        snapped = snap(
            rule.activation,
            raw,
            self.grads[step.name],
            self._grad_bias(step),
            precision=self.options.precision,
            factor=self.pattern.thresholds.get(step.name, THRESHOLD_FACTOR),
            others=() if decided else OTHER_FACTORS,
        )
        self.values[step.name], self.factors[step.name] = snapped.value, snapped.factor

    def _with_zeros(self, step: Step) -> Tensor:
        """A dropout's output, its zeros exact."""
        z = self.values[step.name]
        if self.graph.never_negative(step.name):
            return snap(relu(), z, self.grads[step.name], None, precision=self.options.precision).value
        assert isinstance(step.rule, DropoutRule)
        return with_exact_zeros(z, self.options.precision, step.rule.p)

    def _grad_bias(self, step: Step) -> Tensor | None:
        """The known sum over ``dL/do`` of an activation's input o, if o is made by a layer with a bias."""
        before = self.graph.steps[step.inputs[0]]
        if len(self.graph.consumers[before.name]) > 1:
            return None
        if isinstance(before.rule, ConvRule | AffineRule | NormRule):
            return before.rule.grad_bias
        return None


def _is_fixed(step: Step, found: Solution) -> bool:
    """Whether the equations determine all values; of copies that a rearrangement made, one is enough."""
    fixed = found.determined.reshape(step.shape)
    if not isinstance(step.rule, RearrangeRule) or bool(fixed.all()):
        return bool(fixed.all())
    known = Knowledge(found.x.reshape(step.shape), fixed.to(found.x))
    return all(step.rule.pull_value(known, operand, ()).is_full for operand in range(len(step.inputs)))


def _with_positions(shape: torch.Size) -> torch.Size:
    r"""(B, C, \*positions), also for a fully connected layer's (B, C)."""
    return torch.Size((shape[0], shape[1], *(shape[2:] or (1,))))


def _composed(first: Step, second: Step, shape: torch.Size) -> Callable[[Tensor], Tensor]:
    return lambda x: second.forward(first.forward(x.reshape(shape)))


def _backward(step: Step, x: Tensor, grad: Tensor) -> Tensor:
    """``dL/dx`` of a layer from its input and ``dL/dy``."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(step.forward(leaf), leaf, grad)
    return gradient


def _bounded(rule: ActivationRule) -> bool:
    return math.isfinite(rule.activation.low) or math.isfinite(rule.activation.high)


def _impose(rule: ActivationRule, raw: Tensor, piece: Tensor) -> Tensor:
    """Values on the sides that a forward pass shows."""
    value = raw.clamp(rule.activation.low, rule.activation.high)
    for kink in rule.activation.kinks:
        wrong = torch.sign(value - kink) != torch.sign(piece - kink)
        value = torch.where(wrong, piece, value)
    return value
