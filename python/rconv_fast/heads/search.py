"""The search for the samples of a batch in a softmax head's gradient: single roots first, then all together.

Notation of :mod:`rconv_fast.heads.roots`; :mod:`rconv_fast.heads.softmax` checks the arguments and reads the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.heads.joint import (
    MAX_UNKNOWNS,
    JointSolution,
    count_hypotheses,
    estimate_counts,
    solve_joint,
)
from rconv_fast.heads.roots import HeadFactors, Roots, RootSystem, root_spread, solve_roots, targets_of

# A residual is accepted up to this factor above what the gradients' noise explains.
SAFETY = 30.0
# Beyond this relative noise a residual says nothing about a sample.
CERTIFICATE_LIMIT = 1e-2
# One sample's equations must outnumber its unknowns by this much before its root counts as proof.
_PROOF_EXCESS = 2
# A root of the deflated equations this close is polished and judged on the whole gradient.
_CANDIDATE = 3e-2
# A sample is reported only if its expected relative error is below: 1e-8 with float64, 3e-4 with float32 gradients.
_ACCURACY_IN_ROUNDINGS = 4e7
_ACCURACY_LIMIT = 3e-4
# Weights of repeated samples are told apart to this relative accuracy.
WHOLE = 1e-2
# The search gives up after so many widening rounds without a new sample.
_IDLE_ROUNDS = 3
# The joint solve: problems at once, and the bound of problems * B^6; label counts tried; draws of a mean softmax.
_JOINT_BATCH = 64
_JOINT_WORK = 10**9
_HYPOTHESES = 128
_HYPOTHESIS_WORK = 4 * 10**7
_DRAWS = 256
# Where one sample's equations outnumber its unknowns by more, the joint solve adds nothing.
_JOINT_EXCESS = 6
# Standard deviations, in logits, of the starting points (the first of each class is 0).
_START_SPREADS = (0.0, 1.0, 0.3, 2.0, 4.0)
_JOINT_SPREADS = (0.3, 1.0, 0.1, 2.0)


@dataclass
class HeadProblem:
    """The arguments of one separation in float64, and what has been found so far."""

    grad_weight: Tensor
    grad_bias: Tensor | None
    weight: Tensor
    bias: Tensor
    label_smoothing: float
    reduction: str
    rounding: float
    generator: torch.Generator
    budget: Budget
    factors: HeadFactors = field(init=False)
    system: RootSystem = field(init=False)
    noise: float = field(init=False)
    batch_size: int = field(init=False)
    weight_known: bool = field(init=False)

    @property
    def sample_weight(self) -> float:
        """``w``: the factor of one sample in the loss."""
        return 1.0 / self.batch_size if self.reduction == "mean" else 1.0

    def normal(self, *shape: int) -> Tensor:
        """Seeded standard normal numbers, the same on every device."""
        numbers = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return numbers.to(self.weight.device)


@dataclass
class Found:
    """Separated samples: extended features, deltas, labels, residuals, weights in the loss."""

    x: Tensor  # [m, d or d + 1]
    delta: Tensor  # [m, n]
    labels: Tensor
    residuals: Tensor
    weights: Tensor

    @classmethod
    def none(cls, factors: HeadFactors) -> Found:
        """No samples, in the shapes of `factors`."""
        x = factors.weight.new_zeros(0, factors.weight.shape[1])
        whole = torch.zeros(0, dtype=torch.int64, device=x.device)
        return cls(x, x.new_zeros(0, factors.n_classes), whole, x.new_zeros(0), x.new_zeros(0))

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def take(self, keep: Tensor) -> Found:
        """The samples where `keep` is set."""
        return Found(*(value[keep] for value in vars(self).values()))

    def join(self, other: Found) -> Found:
        """These samples and `other`'s."""
        return Found(*(torch.cat([a, getattr(other, n)]) for n, a in vars(self).items()))


def factorise(head: HeadProblem) -> Tensor:
    """Set the full factors ``[dW, kappa db] = U S V^T`` and return the singular values."""
    if head.grad_bias is None:
        matrix, weight, offset, kappa = head.grad_weight, head.weight, head.bias, None
    else:
        kappa = float(head.grad_weight.norm() / head.grad_bias.norm())
        matrix = torch.cat([head.grad_weight, kappa * head.grad_bias[:, None]], 1)
        weight = torch.cat([head.weight, head.bias[:, None] / kappa], 1)
        offset = torch.zeros_like(head.bias)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    head.factors = HeadFactors(u, s, vh, weight, offset, kappa)
    return head.factors.s


def truncate(head: HeadProblem, spectrum: Tensor, rank: int) -> None:
    """Keep `rank` singular values; the others measure the noise."""
    full = head.factors
    tail = float(spectrum[rank]) if rank < len(spectrum) else 0.0
    # the last singular value is 0 but for rounding (the columns of dW sum to zero): two measure the noise
    measured = len(spectrum) - rank >= 2
    least = torch.finfo(torch.float64).eps if measured else head.rounding
    head.noise = max(tail, least * float(spectrum[0]))
    head.factors = HeadFactors(full.u[:, :rank], full.s[:rank], full.vh[:rank], full.weight, full.offset, full.kappa)
    head.system = RootSystem.build(head.factors)


def _limits(head: HeadProblem, factors: HeadFactors, roots: Roots) -> tuple[Tensor, Tensor]:
    """What the noise explains of ``off_span`` and of ``pairing - 1``, to first order.

    With ``dW + E``: ``|(I - UU^T) delta| <= |E| |S^-1 q|`` and ``|q^T p - 1| <= |E| |p| |S^-1 q|``; and the
    softmax itself is rounded: ``eps (1 + |logits|) / |d|``.
    """
    amplified = (roots.q / factors.s).norm(dim=1)
    rounded = head.rounding * (1 + roots.logit_range) / roots.size
    off_span = SAFETY * (head.noise * amplified / roots.q.norm(dim=1) + rounded)
    pairing = SAFETY * (head.noise * amplified * roots.p.norm(dim=1) + rounded)
    return off_span, pairing


def _certified(head: HeadProblem, factors: HeadFactors, roots: Roots, paired: bool) -> tuple[Tensor, Tensor]:
    """Which roots are samples, and their relative residuals."""
    off_span, pairing = _limits(head, factors, roots)
    good = (roots.off_span <= off_span) & (off_span <= CERTIFICATE_LIMIT)
    residual = roots.off_span
    if paired:
        good &= ((roots.pairing - 1).abs() <= pairing) & (pairing <= CERTIFICATE_LIMIT)
        residual = torch.maximum(residual, (roots.pairing - 1).abs())
    return good & torch.isfinite(residual), residual


def _distinct(roots: Roots, good: Tensor, residual: Tensor) -> list[int]:
    """One root for each sample: ``q_a^T p_b`` is 1 for the same sample and 0 for another one."""
    order = good.nonzero()[:, 0]
    order = order[residual[order].argsort()]
    p, q = roots.p[order], roots.q[order] / roots.pairing[order, None]
    overlap = (q @ p.mT).abs().cpu()
    chosen: list[int] = []
    for i in range(len(order)):
        if all(float(overlap[i, j]) < 0.5 for j in chosen):
            chosen.append(i)
    return [int(order[i]) for i in chosen]


def _class_order(factors: HeadFactors, rest: Tensor | None) -> Tensor:
    """Classes that may be among the labels, likeliest first.

    If y is a label, ``(I - U U^T) e_y = (I - U U^T) softmax``, which is short unless the model is sure of a
    class; and ``db_y = w (sum softmax_y - k_y)`` is mostly negative.
    """
    score = factors.u.square().sum(1)  # |U^T e_y|^2
    if rest is not None:
        score = score - rest / rest.abs().max().clamp_min(torch.finfo(rest.dtype).tiny)
    return score.argsort(descending=True)


def search(head: HeadProblem, given: Tensor | None) -> Found:
    """Individual roots with deflation, then the joint solve for what is left."""
    found = Found.none(head.factors)
    rank = head.factors.rank
    if head.factors.excess >= _PROOF_EXCESS:
        found = _search_roots(head, given)
    if len(found) < rank == head.batch_size and head.factors.excess <= _JOINT_EXCESS:
        rest = _search_joint(head, given, found)
        found = found if rest is None else found.join(rest)
    return found


def _deflated(head: HeadProblem, found: Found) -> HeadFactors:
    if len(found) == 0:
        return head.factors
    p = found.x @ head.factors.vh.mT / head.factors.s
    q = found.delta @ head.factors.u
    return head.factors.deflate(p, q)


def _remaining(given: Tensor, found: Found, weight: float) -> Tensor:
    """The given labels without those of the found samples."""
    left = given.tolist()
    times = (found.weights / weight).round().long().tolist()
    for label, repeats in zip(found.labels.tolist(), times, strict=True):
        for _ in range(repeats):
            if label in left:
                left.remove(label)
    return torch.tensor(left, dtype=torch.int64, device=given.device)


def _search_roots(head: HeadProblem, given: Tensor | None) -> Found:
    """Rounds of individual roots: few classes and starts first, more of both when nothing is found."""
    found = Found.none(head.factors)
    rank, n = head.factors.rank, head.factors.n_classes
    idle, first = 0, True
    while len(found) < rank and idle <= _IDLE_ROUNDS and not head.budget.spent:
        factors = _deflated(head, found)
        left = factors.rank
        if given is not None:
            classes = torch.unique(_remaining(given, found, head.sample_weight))
        else:
            rest = None if head.grad_bias is None else head.grad_bias - found.delta.sum(0)
            breadth = min(n, (rank if first else max(2 * left, rank)) * 4 ** max(0, idle - 1))
            classes = _class_order(factors, rest)[:breadth]
        if len(classes) == 0:
            break
        starts = 1 if first else 4 * max(1, idle)
        # samples that occur several times have another weight: every idle round first tries it as an unknown
        free = idle > 0 and factors.excess > _PROOF_EXCESS
        new = _round(head, factors, classes, min(starts, 4) if free else starts, first, paired=not free)
        if free and len(new) == 0:
            new = _round(head, factors, classes, starts, first, paired=True)
        found = found.join(new)
        idle = 0 if len(new) else idle + 1
        first = False
    return found


def _round(head: HeadProblem, factors: HeadFactors, classes: Tensor, starts: int, first: bool, paired: bool) -> Found:
    """Try every class from several starts; polish and certify what comes close to a root."""
    system = RootSystem.build(factors)
    tried = classes.repeat_interleave(starts)
    m, k = len(tried), system.g.shape[1]
    spreads = torch.tensor(_START_SPREADS, dtype=torch.float64, device=classes.device)
    index = torch.arange(m, device=classes.device) % starts + (0 if first else 1)
    start = head.normal(m, k) * spreads[index % len(spreads)][:, None]
    target = targets_of(tried, factors.n_classes, head.label_smoothing, torch.float64)
    weight = torch.full((m,), head.sample_weight, dtype=torch.float64, device=classes.device)
    scale = torch.full_like(weight, float(paired))
    roots = solve_roots(system, target, weight, start, scale=scale, budget=head.budget)
    near = roots.off_span <= _CANDIDATE
    if paired:
        near &= (roots.pairing - 1).abs() <= _CANDIDATE
    keep = _distinct(roots, near, roots.off_span)
    if not keep:
        return Found.none(head.factors)
    index = torch.tensor(keep, dtype=torch.int64, device=classes.device)
    return _refined(head, (roots.p[index] * factors.s) @ factors.vh, tried[index], paired)


def _centred_logits(factors: HeadFactors, p: Tensor) -> Tensor:
    slope = factors.weight @ (factors.vh.mT * factors.s)
    return p @ (slope - slope.mean(0)).mT + factors.offset - factors.offset.mean()


def _refined(head: HeadProblem, x: Tensor, labels: Tensor, paired: bool) -> Found:
    """Polish candidates on the whole gradient, where no error of a subtraction is left, and certify them there."""
    factors = head.factors
    system = head.system
    p = x @ factors.vh.mT / factors.s
    target = targets_of(labels, factors.n_classes, head.label_smoothing, torch.float64)
    weight = torch.full((len(x),), head.sample_weight, dtype=torch.float64, device=x.device)
    start = (_centred_logits(factors, p) - system.base) @ system.g
    scale = torch.full_like(weight, float(paired))
    for _ in range(2):  # the second time, the pairing equation counts as much as its noise allows
        roots = solve_roots(
            system, target, weight, start,
            scale=scale, budget=head.budget, iterations=40, tolerance=1e-16, damping=1e-6,
        )  # fmt: skip
        off_span, pairing = _limits(head, factors, roots)
        scale = float(paired) * (off_span * roots.size / pairing).clamp(max=1.0)
        start = (_centred_logits(factors, roots.p) - system.base) @ system.g
    good, residual = _certified(head, factors, roots, paired)
    good &= roots.pairing > 0
    level = off_span / SAFETY * roots.size
    if not head.weight_known:  # samples too well classified to be seen would make the weight smaller than 1/rank
        scale = torch.zeros_like(scale)
    accuracy = level * root_spread(factors, system, roots, target, weight, scale)
    good &= accuracy <= min(_ACCURACY_LIMIT, _ACCURACY_IN_ROUNDINGS * head.rounding)
    if head.weight_known:
        times = 1 / roots.pairing  # how often a sample of unknown weight occurs
        good &= (times - times.round()).abs() <= WHOLE
    keep = _distinct(roots, good, residual)
    return _collect(factors, roots, labels, residual, keep, head.sample_weight, rescale=not paired)


def _collect(
    factors: HeadFactors,
    roots: Roots,
    labels: Tensor,
    residual: Tensor,
    keep: list[int],
    weight: float,
    rescale: bool = False,
) -> Found:
    """Samples in the coordinates of the head; an unknown weight is what makes ``q^T p = 1``."""
    index = torch.tensor(keep, dtype=torch.int64, device=labels.device)
    scale = 1 / roots.pairing[index] if rescale else torch.ones_like(roots.pairing[index])
    return Found(
        x=(roots.p[index] * factors.s) @ factors.vh,
        delta=(roots.q[index] * scale[:, None]) @ factors.u.mT,
        labels=labels[index],
        residuals=residual[index],
        weights=weight * scale,
    )


def _search_joint(head: HeadProblem, given: Tensor | None, found: Found) -> Found | None:
    """Solve for all remaining samples together; None unless every one is found."""
    factors = _deflated(head, found)
    r, n = factors.rank, factors.n_classes
    system = RootSystem.build(factors)
    k = system.g.shape[1]
    # r (n - 1) equations (and r more with a bias) for r^2 unknowns
    if r > n - (2 if factors.kappa is None else 1) or r * max(k, 1) > MAX_UNKNOWNS:
        return None
    hypotheses = _label_hypotheses(head, factors, given, found)
    spreads = torch.tensor(_JOINT_SPREADS, dtype=torch.float64, device=factors.u.device)
    for labels, starts in hypotheses:
        h = labels.shape[0] * starts
        tried = labels.repeat_interleave(starts, 0)
        spread = spreads[torch.arange(h, device=spreads.device) % len(spreads)]
        start = head.normal(h, r, k) * spread[:, None, None]
        solution = solve_joint(
            system, tried, head.sample_weight, start, budget=head.budget, label_smoothing=head.label_smoothing
        )
        best = int(solution.cost.argmin())
        rest = _joint_samples(head, factors, solution.p[best], solution.labels[best])
        if rest is not None and (head.weight_known or not _fits_smaller_weight(head, system, solution, best)):
            return rest
        if head.budget.spent:
            break
    return None


def _fits_smaller_weight(head: HeadProblem, system: RootSystem, solution: JointSolution, best: int) -> bool:
    """Whether ``w = 1/(B+1)`` explains the gradient just as well: then neither B nor the samples are proved."""
    weight = 1.0 / (head.batch_size + 1)
    start = torch.linalg.lstsq(system.t, (solution.p[best] - system.p0).mT).solution.mT
    other = solve_joint(
        system, solution.labels[best][None], weight, start[None],
        budget=head.budget, label_smoothing=head.label_smoothing,
    )  # fmt: skip
    return bool(other.cost[0] <= max(1e-6, 10 * float(solution.cost[best])))


def _joint_samples(head: HeadProblem, factors: HeadFactors, p: Tensor, labels: Tensor) -> Found | None:
    """Certify a joint solution: every sample's own equations, and ``q_a^T p_b = 0`` between samples."""
    slope = factors.weight @ (factors.vh.mT * factors.s)
    logits = p @ slope.mT + factors.offset
    d = torch.softmax(logits, 1) - targets_of(labels, factors.n_classes, head.label_smoothing, p.dtype)
    q = d @ factors.u
    off_span = d - q @ factors.u.mT
    q = head.sample_weight * q
    spread = (logits - logits.mean(1, keepdim=True)).abs().amax(1)
    roots = Roots(p, q, off_span.norm(dim=1) / d.norm(dim=1), (p * q).sum(1), d, spread)
    good, residual = _certified(head, factors, roots, paired=True)
    mixing = q @ p.mT - torch.eye(len(p), dtype=p.dtype, device=p.device)
    bound = SAFETY * (head.noise / factors.s[-1] + head.rounding) * q.norm(dim=1) * p.norm(dim=1).max()
    good &= mixing.abs().amax(1) <= bound
    if not bool(good.all()):
        return None
    residual = torch.maximum(residual, mixing.abs().amax(1))
    return _collect(factors, roots, labels, residual, list(range(len(p))), head.sample_weight)


def _mean_softmax(head: HeadProblem, feature_mean: float) -> Tensor:
    """Expected softmax for features of this mean and twice its square as variance (a normal behind a ReLU has 2.1)."""
    mean = feature_mean * head.weight.sum(1) + head.bias
    deviation = abs(feature_mean) * 2**0.5 * head.weight.norm(dim=1)
    return torch.softmax(mean + deviation * head.normal(_DRAWS, len(mean)), 1).mean(0)


def _estimated_counts(head: HeadProblem, rest: HeadFactors, grad_bias: Tensor | None) -> Tensor:
    """Label counts of the samples in `rest` from ``db``; without a bias from ``dW 1 = const * db``.

    Features behind an activation have a positive sum that varies little: ``dW 1 = d mean(x) db``, which gives
    the mean feature, hence the expected softmax. Without a bias, at least n - r classes are absent, and
    ``db_y = w r softmax_y`` there gives ``d mean(x)``.
    """
    w, r, n = head.sample_weight, rest.rank, rest.n_classes
    total = head.grad_weight.sum(1) / head.grad_weight.shape[1]
    if grad_bias is not None and head.grad_bias is not None:
        feature_mean = float(total @ head.grad_bias / (head.grad_bias @ head.grad_bias))
        return estimate_counts(_mean_softmax(head, feature_mean), grad_bias, r, w)
    total = (rest.u * rest.s) @ rest.vh.sum(1) / head.grad_weight.shape[1]
    feature_mean = 0.0
    for _ in range(3):
        softmax = _mean_softmax(head, feature_mean)
        feature_mean = float((total / softmax).topk(n - r).values.mean() / (w * r))
    return estimate_counts(softmax, total / feature_mean, r, w)


def _label_hypotheses(
    head: HeadProblem, factors: HeadFactors, given: Tensor | None, found: Found
) -> list[tuple[Tensor, int]]:
    """Label rows to try, in batches with a number of starts: likely ones first, then more of both."""
    r, n = factors.rank, factors.n_classes
    device = factors.u.device
    budget = max(1, min(_JOINT_BATCH, _JOINT_WORK // r**6))  # problems at once
    if given is not None:
        rows = [_remaining(given, found, head.sample_weight)]
    else:
        rest = None if head.grad_bias is None else head.grad_bias - found.delta.sum(0)
        lower = torch.zeros(n, dtype=torch.int64)
        if rest is not None:  # k_y = sum softmax_y - db_y / w > -db_y / w
            lower = torch.ceil(-rest / head.sample_weight - 1e-6).clamp_min(0).long().cpu()
        estimate = _estimated_counts(head, factors, rest).cpu()
        limit = max(1, min(_HYPOTHESES, _HYPOTHESIS_WORK // r**6))
        if r > n - 2:  # at the very limit the equations are too stiff for many tries to pay
            limit = min(limit, _HYPOTHESES // 4)
        rows = [
            torch.repeat_interleave(torch.arange(n), torch.tensor(counts)).to(device)
            for counts in count_hypotheses(estimate, lower, r, limit)
        ]
    plan = [(rows[0][None], budget)] * 2
    if len(rows) == 1:
        return plan * 2
    per = min(4, budget)
    for i in range(1, len(rows), max(1, budget // per)):
        plan.append((torch.stack(rows[i : i + max(1, budget // per)]), per))
    return plan
