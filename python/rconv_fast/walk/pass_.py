"""The recursion of R-CONV, last layer first: each input from its layer's output, gradient and equations.

One pure function of the graph, a reading of the head and a pattern. Whoever wants another answer makes another pattern.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from rconv_fast.layers.activation import ActivationRule, relu
from rconv_fast.layers.constants import place_by_bias
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.dropout import DropoutRule, with_exact_zeros
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.layers.rearrange import RearrangeRule
from rconv_fast.patterns.pattern import Pattern
from rconv_fast.patterns.threshold import OTHER_FACTORS, THRESHOLD_FACTOR, snap
from rconv_fast.progress import Event
from rconv_fast.solve import (
    ZERO,
    CurvedSystem,
    Solution,
    System,
    apply_prior,
    place_by_zeros,
    solve,
    solve_curved,
    solve_nonnegative,
    widened,
    with_zeros_behind,
    within_windows,
)
from rconv_fast.solve.krylov import InterruptedSolve
from rconv_fast.walk.bounds import flat_rows
from rconv_fast.walk.found import INTERRUPTED, OUT_OF_TIME, Contradiction, Known, Options, Pass, Stop
from rconv_fast.walk.graph import Graph, Step
from rconv_fast.walk.report import LayerReport
from rconv_fast.walk.tables import Halt, Tables

# With fewer equations an unknown than this, what x >= 0 adds is worth more than further iterations.
SCARCE, SCARCE_ITERATIONS = 1.2, 300
# A gradient that came back from the last layer is off by no more than this where all behind is right.
AS_SEEN = 1e-3


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


class _Recursion(Tables):
    """Fills the tables, from the last step to the first; nothing of it outlives the pass."""

    def run(self, until: str | None) -> Pass:
        stop = None
        try:
            for name in reversed(list(self.graph.steps)[:-1]):
                self._settle(self.graph.steps[name])
                if name == until or (self.contradiction is not None and until is None):
                    break
        except Halt as halt:
            stop = halt.stop
        except KeyboardInterrupt as interrupt:
            stop = self._interrupted(self.graph.steps[name], interrupt)
        if stop is None and self.contradiction is None:
            self._fill_constants()
        tables = self.values, self.grads, self.raw, self.determined, self.reports
        return Pass(*tables, stop, self.contradiction, frozenset(self.open), self.given.deviations)

    def _settle(self, step: Step) -> None:
        """Find the gradient of one step's tensor, and its values where they follow."""
        if not self.graph.consumers[step.name]:
            return
        if self.options.budget.spent:
            raise Halt(Stop(step.name, self.graph.layer_of(step.name)[0], OUT_OF_TIME))
        gradient = self.gradient(step)
        if gradient is not None:
            self.grads[step.name] = _as_seen(step, gradient)
        known = self.given_or_known(step.name)
        if step.name in self.given.values:
            self.values[step.name] = self.given.values[step.name]
        elif known is not None and known.is_full:
            self.values[step.name] = known.value
            self._doubt_zeros(step)
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
        self._place(step)
        self._snap(step)

    def _catch_up(self, step: Step) -> None:
        """Gradients that wait for a step's values: those in front of norms with statistics of their own."""
        for name, _ in self.graph.consumers[step.name]:
            if name in self.late:
                value = self.evaluate(name)
                if value is None:
                    continue
                self.values[name] = value
                self.late.discard(name)
                self._catch_up(self.graph.steps[name])
        gradient = self.gradient(step)
        if gradient is None:
            raise self.unpassed_norm(step)
        self.grads[step.name] = gradient

    def _gradient_covered(self, step: Step, known: Knowledge) -> bool:
        """Whether only values that pass no gradient are open: no layer before an activation needs them."""
        if not isinstance(step.rule, ActivationRule | DropoutRule) or step.name not in self.grads:
            return False
        return not bool(self.grads[step.name][known.weight == 0].any())

    def _must_solve(self, step: Step) -> bool:
        """Whether to solve: for inputs of convolutions and the network's; other tensors follow from those."""
        consumers = [self.graph.steps[name].rule for name, _ in self.graph.consumers[step.name]]
        return step.name == self.graph.input or any(isinstance(rule, ConvRule) for rule in consumers)

    def _solve(self, step: Step, known: Knowledge | None) -> None:
        """Solve a step's equations and report it."""
        start = time.perf_counter()
        label, kind = self.graph.layer_of(step.name)
        self.options.progress(Event(label, "solve"))
        chosen = self._threshold_step(step) if self.all_determined() else None
        rows = self.rows(step)
        if not rows and self.waits(step):
            raise self.unpassed_norm(step)
        system = self.system(step, rows, known)
        best = self._solve_once(system, step, label)
        contradicts = best.residual > self.options.bar and best.converged and best.rows > best.rank
        if contradicts and chosen is not None:
            self.contradiction = Contradiction(step.name, chosen.name, self.factors.get(chosen.name, THRESHOLD_FACTOR))
        if self.options.prior is not None and step.name == self.graph.input and not bool(best.determined.all()):
            self.options.progress(Event(label, f"prior {self.options.prior}"))
            if isinstance(system, CurvedSystem):
                system = system.around(best.x)
            inequalities = flat_rows(self.graph, self.values, step.name)
            best = apply_prior(system, best, self.options.prior, inequalities, budget=self.options.budget)
        offsets = system.offsets if isinstance(system, CurvedSystem) else None
        if offsets is not None:
            self.constants[step.name] = offsets.masks
        self.values[step.name] = best.x.reshape(step.shape)
        self.determined[step.name] = best.determined.reshape(step.shape)
        if not _is_fixed(step, best) and self.matters(step):
            self.open.add(step.name)
        self.reports[step.name] = LayerReport(label, kind, best.evidence, time.perf_counter() - start)

    def _doubt_zeros(self, step: Step) -> None:
        """Where a norm behind shows a ReLU's output: one lowest value of a channel alone may be no zero.

        Without a bias in front they are taken as zeros, which the equations in front must bear out.
        """
        z = self.values[step.name]
        if z.ndim < 3 or not self.shown_by_norm(step) or self.grad_bias(step) is None:
            return
        zeros = (z <= ZERO * float(z.abs().max())).transpose(0, 1).flatten(1).sum(dim=1)
        several = (zeros >= 2).reshape(1, -1, *(1,) * (z.ndim - 2)).expand_as(z)
        if not bool(several.all()):
            self.determined[step.name] = several
            self.constants[step.name] = torch.ones(1, *z.shape[2:], dtype=torch.bool, device=z.device)
            self.open.add(step.name)

    def _place(self, step: Step) -> None:
        """Fix the constants that a norm hides of a ReLU's output; those of classes without zeros are not needed."""
        masks, grad_bias = self.constants.get(step.name), self.grad_bias(step) if step.is_relu else None
        if masks is None or grad_bias is None:
            return
        before = self.determined[step.name]
        placed = place_by_bias(self.values[step.name], before, masks, self.grads[step.name], grad_bias)
        self.values[step.name], self.determined[step.name] = placed.values, placed.determined
        if step.name in self.reports:
            known = placed.determined & ~before
            found = sum(int(known[:, :, mask].any(dim=(0, 2)).sum()) for mask in masks)
            report = self.reports[step.name]
            evidence = replace(report.evidence, rank=report.rank + found, hidden=report.hidden - found)
            self.reports[step.name] = replace(report, evidence=evidence)
        if bool((placed.determined | placed.positive).all()):
            self.open.discard(step.name)

    def _fill_constants(self) -> None:
        """Those that no layer needed, by a run forward from an input that is determined."""
        names = [n for n in self.constants if n not in self.open and not bool(self.determined[n].all())]
        x, fixed = self.values.get(self.graph.input), self.determined.get(self.graph.input)
        if names and x is not None and (fixed is None or bool(fixed.all())):
            values = self.graph.with_masks(self.graph.masks(self.values)).forward(x)
            for name in names:
                self.values[name], self.determined[name] = values[name], torch.ones_like(self.determined[name])

    def _interrupted(self, step: Step, interrupt: KeyboardInterrupt) -> Stop:
        """Ctrl-C: the iterate of the solve that was under way is kept, as not determined."""
        if isinstance(interrupt, InterruptedSolve):
            self.values[step.name] = with_zeros_behind(interrupt.x, step.shape)
            self.determined[step.name] = torch.zeros(step.shape, dtype=torch.bool, device=interrupt.x.device)
        return Stop(step.name, self.graph.layer_of(step.name)[0], INTERRUPTED)

    def _solve_once(self, system: System | CurvedSystem, step: Step, label: str) -> Solution:
        if isinstance(system, CurvedSystem):
            found = solve_curved(system, lambda linear: self._solve_linear(linear, label), self.options.budget)
            return place_by_zeros(system, found) if self.graph.never_negative(step.name) else found
        reached, options, bounded = within_windows(system), self.options, self.graph.never_negative(step.name)
        scarce = reached.count < SCARCE * reached.unknowns and bounded
        found = self._solve_linear(reached, label, SCARCE_ITERATIONS if scarce else None, nonnegative=bounded)
        whole = widened(found, system)
        fixed = bool(found.determined.all()) or _is_fixed(step, whole)
        settled = found.converged and (fixed or found.residual > options.bar)
        if settled or not bounded or found.unknowns > 2 * found.rank:
            return whole  # the last: zeros cannot fix more directions than half of the values (Wendel)
        found = solve_nonnegative(
            reached,
            found,
            tolerance=options.bar,
            budget=options.budget,
            progress=lambda i, r: options.progress(Event(label, "nonnegative", i, None, r)),
        )
        return widened(found, system)

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
            self.grad_bias(step),
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


def _is_fixed(step: Step, found: Solution) -> bool:
    """Whether the equations determine all values; of copies that a rearrangement made, one is enough."""
    fixed = found.determined.reshape(step.shape)
    if not isinstance(step.rule, RearrangeRule) or bool(fixed.all()):
        return bool(fixed.all())
    known = Knowledge(found.x.reshape(step.shape), fixed.to(found.x))
    return all(step.rule.pull_value(known, operand, ()).is_full for operand in range(len(step.inputs)))


def _as_seen(step: Step, gradient: Tensor) -> Tensor:
    """The gradient of a bias for that of the output it is added to: one sample's are equal.

    It is what the client computed, to the last digit, without the rounding of the way back from the last layer. Where
    the two differ by more than rounding, something behind is wrong, which the equations must show.
    """
    rule = step.rule
    if not isinstance(rule, ConvRule) or not rule.is_linear or len(gradient) != 1 or rule.grad_bias is None:
        return gradient
    seen = rule.grad_bias.reshape(gradient.shape)
    return seen if float((seen - gradient).norm()) <= AS_SEEN * float(gradient.norm()) else gradient


def _bounded(rule: ActivationRule) -> bool:
    return math.isfinite(rule.activation.low) or math.isfinite(rule.activation.high)


def _impose(rule: ActivationRule, raw: Tensor, piece: Tensor) -> Tensor:
    """Values on the sides that a forward pass shows."""
    value = raw.clamp(rule.activation.low, rule.activation.high)
    for kink in rule.activation.kinks:
        wrong = torch.sign(value - kink) != torch.sign(piece - kink)
        value = torch.where(wrong, piece, value)
    return value
