"""What a pass knows so far, and what follows from it for one step: gradient, values, equations.

Nothing here writes into the tables; the pass does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rconv_fast.layers.affine import AffineRule
from rconv_fast.layers.base import Equations, Rule, UnsupportedRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.layers.norm import NormRule
from rconv_fast.layers.rearrange import RearrangeRule
from rconv_fast.patterns.pattern import Pattern
from rconv_fast.solve import CurvedSystem, NormalisedConv, PointRows, System
from rconv_fast.walk.found import Contradiction, Known, Options, Stop
from rconv_fast.walk.graph import Graph, Step

# Why a norm right behind a convolution is not passed all the same.
NOT_FOLLOWING = "before values that are hidden: dL/dgamma sums over several samples, or was not seen"


class Halt(Exception):
    """The pass ends here."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop


class Tables:
    """The tables of one pass, by step: values, gradients, what is determined, what is open."""

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
        self.constants: dict[str, Tensor] = {}  # classes of positions whose constants a norm behind takes off

    def given_or_known(self, name: str) -> Knowledge | None:
        """`knowledge`, but of what was given: that is taken as it is."""
        return None if name in self.given.values else self.knowledge(name)

    def rule(self, step: Step) -> Rule:
        """The step's rule on the pieces that the pattern names."""
        if not step.rule.hidden or step.name not in self.pattern.pieces:
            return step.rule
        return step.rule.at(self.pattern.pieces[step.name])

    def gradient(self, step: Step) -> Tensor | None:
        """``dL/d(step)``: the sum over its consumers; None where it waits for values behind it."""
        logits = self.grads[self.graph.output]
        total = torch.zeros(step.shape, dtype=logits.dtype, device=logits.device)
        for name, operand in self.graph.consumers[step.name]:
            consumer = self.graph.steps[name]
            rule = self.rule(consumer)
            if isinstance(rule, UnsupportedRule):
                raise Halt(Stop(name, consumer.label, rule.reason))
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
                raise Halt(Stop(name, consumer.label, reason, hidden=True))
            total = total + rule.pull_gradient(self.grads[name], y, operand, step.shape)
        return total

    def knowledge(self, name: str) -> Knowledge | None:
        """What is known of a step's values one by one: recovered, or following from the steps behind it."""
        if name in self.values:
            fixed = self.determined.get(name)
            value = self.values[name]
            return Knowledge.full(value) if fixed is None else Knowledge(value, fixed.to(value))
        known: Knowledge | None = None
        for consumer_name, operand in self.graph.consumers[name]:
            consumer = self.graph.steps[consumer_name]
            rule = self.rule(consumer)
            if isinstance(rule, ConvRule | UnsupportedRule) or rule.hidden:
                continue
            behind = self.knowledge(consumer_name)
            if behind is None:
                continue
            operands = [None if o == name else self.evaluate(o) for o in consumer.inputs]
            pulled = rule.pull_value(behind, operand, operands)
            if pulled is not None:
                known = pulled if known is None else known.merge(pulled)
        return known

    def evaluate(self, name: str) -> Tensor | None:
        """A step's values by running the model forward from what is recovered, or None."""
        ahead = self.graph.ahead(self.values, name)
        if ahead is None:
            return None
        values = dict(self.values)
        with torch.no_grad():
            for step in ahead:
                values[step.name] = step.forward(*(values[o] for o in step.inputs))
        return values[name]

    def rows(self, step: Step) -> list[Equations]:
        """The equations that a step's consumers have for it."""
        rows: list[Equations] = []
        shape = _with_positions(step.shape)
        for name, _ in self.graph.consumers[step.name]:
            through = self._rows_through(step, name, shape)
            rows += through
            whole = any(isinstance(equations, NormalisedConv) for equations in through)
            if name in self.grads and not whole:
                rows += self.rule(self.graph.steps[name]).rows(self.grads[name], self.knowledge(name), shape)
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
                grad, known = self.grads[behind_name], self.knowledge(behind_name)
                rows += self.rule(behind).rows_through(consumer.rule, forward, grad, known, shape)
        return rows

    def system(self, step: Step, equations: list[Equations], known: Knowledge | None) -> System | CurvedSystem:
        """All equations of a step's values."""
        shape = _with_positions(step.shape)
        rows = [rows for rows in equations if not isinstance(rows, NormalisedConv)]
        norms = tuple(rows for rows in equations if isinstance(rows, NormalisedConv))
        if known is not None and (not equations or bool((known.weight > 0).any())):  # without any: all is open
            rows = [*rows, PointRows.create(known.value.reshape(shape), known.weight.reshape(shape))]
        support = step.rule.support if isinstance(step.rule, RearrangeRule) else None
        support = None if support is None or bool(support.all()) else support.reshape(shape)
        return CurvedSystem(shape, tuple(rows), norms, support) if norms else System(shape, tuple(rows), support)

    def all_determined(self) -> bool:
        """Whether the layers so far left nothing open: otherwise equations contradict each other for that reason."""
        return all(bool(determined.all()) for determined in self.determined.values())

    def matters(self, step: Step) -> bool:
        """Whether a layer before needs what is open: values that pass no gradient back are in no equation there."""
        unknown, grad = ~self.determined[step.name], self.grads.get(step.name)
        return step.name == self.graph.input or grad is None or bool(grad[unknown].any())

    def grad_bias(self, step: Step) -> Tensor | None:
        """The known sum over ``dL/do`` of an activation's input o, if o is made by a layer with a bias."""
        before = self.graph.steps[step.inputs[0]]
        if len(self.graph.consumers[before.name]) > 1:
            return None
        if isinstance(before.rule, ConvRule | AffineRule | NormRule):
            return before.rule.grad_bias
        return None

    def shown_by_norm(self, step: Step) -> bool:
        """Whether a ReLU's output is known only from a batch norm right behind it, but for a constant a channel."""
        behind = [self.graph.steps[name].rule for name, _ in self.graph.consumers[step.name]]
        return step.is_relu and all(isinstance(r, NormRule) and r.hides_constants for r in behind)

    def waits(self, step: Step) -> bool:
        """Whether a consumer's values are not found yet."""
        return any(name in self.late for name, _ in self.graph.consumers[step.name])

    def unpassed_norm(self, step: Step) -> Halt:
        """A norm whose input no equations of a convolution in front of it give."""
        names = [step.name]
        while names:
            for name, _ in self.graph.consumers[names.pop(0)]:
                consumer = self.graph.steps[name]
                if consumer.rule.own_statistics and name not in self.values:
                    right_behind = isinstance(self.graph.steps[consumer.inputs[0]].rule, ConvRule)
                    why = NOT_FOLLOWING if right_behind else "not right behind a convolution"
                    reason = f"{consumer.rule.kind}, whose statistics are private, {why}"
                    return Halt(Stop(name, consumer.label, reason))
                names.append(name)
        raise AssertionError(f"no norm behind {step.name}")


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
