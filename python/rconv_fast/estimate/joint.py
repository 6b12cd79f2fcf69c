"""The joint maximum-likelihood estimate from a start: bits held, all gradients at once; bits in doubt settled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rconv_fast.budget import Budget
from rconv_fast.estimate import bits as bit
from rconv_fast.estimate.bounds import without_scale
from rconv_fast.estimate.fisher import dense_fisher
from rconv_fast.estimate.gauss_newton import Fit, gauss_newton
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.estimate.information import Information
from rconv_fast.estimate.noise_model import arithmetic_variance, capped, entry_noise
from rconv_fast.estimate.pieces import Bits, Piece, hold, same, signs, turned_over
from rconv_fast.observation import Observation
from rconv_fast.patterns.pattern import Pattern
from rconv_fast.solve.solution import Evidence

# Rounds of Gauss-Newton and settling bits.
ROUNDS = 14
# With more bits than these turned over, the information is formed anew before the next fit, which then takes few steps.
FEW = 16
# A misfit above this many times the noise's own that as many rounds did not halve: the start is not near any answer.
HOPELESS, PATIENCE = 1e4, 3
# Least noise of an entry, in units of the root mean square of its tensor's: bounds the range of the weights until the
# bits are known. Gradients of a narrow type have entries whose rounding is next to nothing.
CAPS: tuple[float, ...] = (0.1, 0.0)
# Where the first cap touches a smaller share of the entries than this, or the start fits under it, the fit is first
# tried without it.
TOUCHED = 0.2
# How far errors may be above what the noise makes them while bits are wrong: as many bits are taken as doubtful.
INFLATIONS = (1.0, 4.0, 16.0, 64.0)


@dataclass(frozen=True)
class Estimate:
    r"""The most likely inputs and how sure they are.

    Attributes
    ----------
    inputs : Tensor
        (B, \*input_shape).
    uncertainty : Tensor
        (B, \*input_shape): standard deviation of each value, inf where the gradients leave it open.
    chi2 : float
        Misfit of all gradients in units of their noise with the bits held, and of the bits that contradict their
        sign, in units of its uncertainty.
    dof : int
        Entries that are not zero whatever the input, less the values estimated.
    pattern : Pattern
        The bits, as a run's activations.
    contradicting : int
        Bits on the other side than the input says, as noise allows it near a kink.
    iterations : int
        Inner iterations in all.
    scale : float
        Factor of the gradients, given or estimated.
    evidence : Evidence
        All gradients as one system for the inputs: equations, rank, how it was solved.
    notes : list of str
        What a reader must know.
    """

    inputs: Tensor
    uncertainty: Tensor
    chi2: float
    dof: int
    pattern: Pattern
    contradicting: int
    iterations: int
    scale: float
    evidence: Evidence
    notes: list[str] = field(default_factory=list)

    @property
    def z(self) -> float:
        """How far chi^2 is from what the noise makes it, in standard deviations."""
        return (self.chi2 - self.dof) / math.sqrt(2 * max(self.dof, 1))

    @property
    def ratio(self) -> float:
        """Root mean square misfit in units of the noise: 1 is what a true answer has."""
        return math.sqrt(self.chi2 / max(self.dof, 1))


def estimate(
    model: nn.Module,
    observation: Observation,
    start_inputs: Tensor,
    targets: Tensor,
    *,
    pattern: Pattern | None = None,
    free_scale: bool = False,
    client: nn.Module | None = None,
    budget: Budget | None = None,
) -> Estimate:
    r"""The inputs that make the observed gradients most likely, from a start within some 20 dB of them.

    Parameters
    ----------
    model : nn.Module
        A working copy in working precision.
    observation : Observation
        Gradients and their noise.
    start_inputs : Tensor
        (B, \*input_shape): an analytic answer.
    targets : Tensor
        Labels or targets.
    pattern : Pattern, optional
        Bits to start with; those of the start if left out.
    free_scale : bool
        Whether the factor of the gradients is to be estimated too.
    client : nn.Module, optional
        The model in the client's precision: what its rounding adds to the error bars is measured.
    budget : Budget, optional
        When to end with what is known.

    Returns
    -------
    Estimate

    Notes
    -----
    With the bits held the gradients are smooth and Gauss-Newton converges in a few steps. Bits whose side the error
    bars do not tell are solved for with the input (`bits.settle`); the pattern of least chi^2 wins.
    """
    budget = budget or Budget()
    sigma = {name: entry_noise(observation, name) for name in observation.gradients}
    x = start_inputs.detach()
    whole = GradientMap.read(
        model, observation.loss, targets, observation.gradients, sigma, x.shape, observation.factor
    )
    bits, iterations = first_bits(whole, x, pattern), 0
    tried: list[_Candidate] = []
    for caps in _ways(whole, x):
        ended, iterations = _capped_in_turn(whole, x, bits, caps, budget, free_scale, iterations)
        tried.append(ended)
        if budget.spent or _is_enough(whole, ended):
            break
    found = min(tried, key=lambda candidate: candidate.score)
    x, bits, whole = found.x, found.bits, whole.with_scale(found.scale)
    held = whole.with_pieces(_hold(whole, bits))
    with torch.no_grad():
        at_bits = held.values(x) if bits else {}
    variance = found.information.variance
    if client is not None:
        at_scale = replace(observation, scale=found.scale)
        variance = variance + arithmetic_variance(held, client, x, found.information.solve, at_scale)
    entries, fixed = _entries(held, x), int((~found.information.is_open).sum())
    return Estimate(
        inputs=x,
        uncertainty=variance.sqrt(),
        chi2=found.chi2 + found.penalty,
        dof=entries - fixed - int(free_scale),
        pattern=Pattern({name: at_bits[name] for name in bits}, origin="joint estimate"),
        contradicting=found.contradicting,
        iterations=iterations,
        scale=found.scale,
        evidence=Evidence(
            rank=fixed,
            unknowns=x.numel(),
            rows=entries,
            residual=math.sqrt(found.chi2 / max(_size(held), 1e-300)),
            condition=math.nan,
            solver="gauss-newton",
            proof="cholesky",
            converged=not budget.spent,
            iterations=iterations,
        ),
        notes=[] if not budget.spent else ["the time limit ended the joint estimate"],
    )


def _ways(problem: GradientMap, x: Tensor) -> list[tuple[float, ...]]:
    """Each way's caps on the weights, one after the other; the cheapest first where it has a chance."""
    touched = sum(int((s < capped(s, CAPS[0])).sum()) for s in problem.sigma.values())
    if not touched:
        return [CAPS[-1:]]
    few = touched <= TOUCHED * entry_count(problem)
    return [CAPS[-1:], CAPS] if few or under(problem, CAPS[0]).chi2(x) < entry_count(problem) else [CAPS]


def under(problem: GradientMap, cap: float) -> GradientMap:
    """The same with no entry less noisy than `cap` times the root mean square over its tensor."""
    return replace(problem, sigma={name: capped(s, cap) for name, s in problem.sigma.items()})


def _capped_in_turn(
    whole: GradientMap,
    x: Tensor,
    bits: Bits,
    caps: Sequence[float],
    budget: Budget,
    free_scale: bool,
    before: int,
) -> tuple[_Candidate, int]:
    """The best pattern under each cap, from the one before; and the iterations so far, `before` of them earlier."""
    for cap in caps:
        found = _finish(under(whole, cap), x, bits, budget, free_scale, final=cap == caps[-1])
        x, bits, whole, before = found.x, found.bits, whole.with_scale(found.scale), before + found.iterations
        if _is_hopeless(whole, found):
            break
    return found, before


@dataclass(frozen=True)
class _Candidate:
    """One pattern, the best input for it, and the information there."""

    x: Tensor
    scale: float
    bits: Bits
    chi2: float
    penalty: float
    contradicting: int
    iterations: int
    information: Information
    doubt: bit.Doubt
    inflation: float

    @property
    def score(self) -> float:
        """Misfit of the gradients and of the bits."""
        return self.chi2 + self.penalty


def _finish(
    problem: GradientMap, x: Tensor, bits: Bits, budget: Budget, free_scale: bool, *, final: bool
) -> _Candidate:
    """Rounds of settling bits and of Gauss-Newton with them held, while that improves; the best round.

    A bit turned over moves the gradients by many times their noise, nearly all of which a move of the input makes up
    for: what is left of it is right only where the information is that of the very bits it is turned over from.
    """
    information, known_at = _information(problem, x, bits, free_scale), bits
    x, bits = _settled(problem, x, bits, information, 1.0, free_scale)
    if turned_over(bits, known_at) > FEW:
        information, known_at = _information(problem, x, bits, free_scale), bits
    best = _fit(problem, x, bits, information, budget, free_scale)
    halved, last = 0, best.score  # the round that last halved the score, and that score
    for index in range(1, ROUNDS):
        problem = problem.with_scale(best.scale)
        stalled = index - halved > PATIENCE and _is_hopeless(problem, best)
        if (not final and _is_enough(problem, best)) or stalled or budget.spent or not len(best.doubt):
            break
        if not same(best.bits, known_at):
            information, known_at = _information(problem, best.x, best.bits, free_scale), best.bits
        x, bits = _settled(problem, best.x, best.bits, information, best.inflation, free_scale)
        if same(bits, best.bits):
            break
        if turned_over(bits, known_at) > FEW:
            information, known_at = _information(problem, x, bits, free_scale), bits
        found = _fit(problem, x, bits, information, budget, free_scale, best.iterations)
        if not found.score < best.score:
            best = replace(best, iterations=found.iterations)
            break
        halved, last = (index, found.score) if found.score < last / 2 else (halved, last)
        best = found
    if final and not same(best.bits, known_at):
        information = _information(problem, best.x, best.bits, free_scale)
    if final and best.information is not information:
        best = _fit(problem, best.x, best.bits, information, budget, free_scale, best.iterations)
    return best


def _settled(
    problem: GradientMap, x: Tensor, bits: Bits, information: Information, inflation: float, free_scale: bool
) -> tuple[Tensor, Bits]:
    """The doubtful bits settled, by the information matrix."""
    held = problem.with_pieces(_hold(problem, bits))
    errors = information.draw(bit.DRAWS, torch.Generator().manual_seed(0))

    def settle(doubt: bit.Doubt) -> tuple[Tensor, Bits]:
        return bit.settle(held, x, bits, doubt, information, free_scale=free_scale)

    return settled_by(settle, problem, x, bits, errors, inflation)


def settled_by(
    settle: Callable[[bit.Doubt], tuple[Tensor, Bits]],
    problem: GradientMap,
    x: Tensor,
    bits: Bits,
    errors: Tensor,
    inflation: float = 1.0,
    most: int = bit.MOST,
) -> tuple[Tensor, Bits]:
    """The doubtful bits settled, of ever larger sets until one fits the best; as they are where none does better.

    Parameters
    ----------
    settle : callable
        An input and bits, from the bits in doubt.
    problem, x, bits
        Where they are in doubt.
    errors : Tensor
        Drawn errors of x, (count, *shape).
    inflation : float
        How much larger they may be.
    most : int
        Bits in doubt at once.
    """
    held = problem.with_pieces(_hold(problem, bits))
    inputs, deviations = held.kink_inputs(x), bit.input_deviations(held, x, errors)
    best, least, size = (x, bits), held.chi2(x), 0
    for factor in INFLATIONS:
        doubt = bit.find_doubt(inputs, deviations, bits, factor * inflation, most)
        if len(doubt) == size:
            continue
        size = len(doubt)
        moved, settled = settle(doubt)
        chi2 = problem.with_pieces(_hold(problem, settled)).chi2(moved)
        best, least = ((moved, settled), chi2) if chi2 < least else (best, least)
        if least < entry_count(problem):
            break
    return best


def entry_count(problem: GradientMap) -> int:
    """Entries of all gradients."""
    return sum(g.numel() for g in problem.seen.values())


def _is_enough(problem: GradientMap, found: _Candidate) -> bool:
    """Whether the misfit is no larger than the noise makes it."""
    return found.score < entry_count(problem)


def _is_hopeless(problem: GradientMap, found: _Candidate) -> bool:
    return found.chi2 > HOPELESS * entry_count(problem)


def _fit(
    problem: GradientMap,
    x: Tensor,
    bits: Bits,
    information: Information,
    budget: Budget,
    free_scale: bool,
    before: int = 0,
) -> _Candidate:
    """The best input for one pattern; `before`: iterations so far."""
    held = problem.with_pieces(_hold(problem, bits))
    fit = gauss_newton(held, x, information.solve, budget=budget, free_scale=free_scale)
    errors = information.draw(bit.DRAWS, torch.Generator().manual_seed(0))
    inputs, deviations = held.kink_inputs(fit.x), bit.input_deviations(held, fit.x, errors)
    penalty, wrong = bit.contradiction(inputs, deviations, bits)
    inflated = inflation(held, fit, x.numel())
    doubt = bit.find_doubt(inputs, deviations, bits, inflated)
    return _Candidate(
        fit.x, fit.scale, bits, fit.chi2, penalty, wrong, before + fit.iterations, information, doubt, inflated
    )


def _hold(problem: GradientMap, bits: Bits) -> dict[str, Piece]:
    return {} if problem.graph is None else hold(problem.graph, bits)


def inflation(problem: GradientMap, fit: Fit, unknowns: int) -> float:
    """How much larger than the noise makes them errors are while the fit is not yet good."""
    misfit = max(1.0, fit.chi2 / entry_count(problem)) * max(1.0, fit.decrement / unknowns)
    return max(1.0, math.sqrt(misfit) / 2)


def _information(problem: GradientMap, x: Tensor, bits: Bits, free_scale: bool) -> Information:
    held = problem.with_pieces(_hold(problem, bits))
    fisher = dense_fisher(held, x)
    return Information.create(without_scale(fisher, held.at(x)) if free_scale else fisher, x.shape)


def first_bits(problem: GradientMap, x: Tensor, pattern: Pattern | None) -> Bits:
    """The signs of a run on x, and of the proposed activations where there are any."""
    if problem.graph is None:
        return {}
    with torch.no_grad():
        bits = signs(problem.graph, problem.values(x))
    given = {} if pattern is None else pattern.pieces
    return {name: (given[name] > 0).to(d) if name in given else d for name, d in bits.items()}


def _size(problem: GradientMap) -> float:
    """Squares of all seen gradients in units of their noise."""
    return sum(float((g * problem.weight(name)).square().sum()) for name, g in problem.seen.items())


def _entries(problem: GradientMap, x: Tensor) -> int:
    """Entries that are not zero both here and in what was seen."""
    pairs = zip(problem.seen.values(), problem.gradients(x), strict=True)
    return sum(int(((seen != 0) | (found != 0)).sum()) for seen, found in pairs)
