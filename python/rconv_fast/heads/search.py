"""The search for the samples of a batch in a softmax head's gradient: single roots first, then all together.

Notation of :mod:`rconv_fast.heads.roots`; :mod:`rconv_fast.heads.softmax` reads the result.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rconv_fast.heads.counts import estimated_counts, label_rows, lower_counts
from rconv_fast.heads.joint import MAX_UNKNOWNS, JointSolution, features_of_softmax, solve_joint
from rconv_fast.heads.problem import Found, HeadProblem
from rconv_fast.heads.roots import HeadFactors, RootProblems, Roots, RootSystem, Slack, root_spread, solve_roots

# A wrong root meets m more equations than unknowns to a relative eps with a chance of about eps^m: at most this.
_CHANCE = 1e-8
# Beyond this relative noise a residual says nothing about a sample, however many equations there are.
_CERTIFICATE_LIMIT = 0.1
# One sample's equations must outnumber its unknowns by this much before its root counts as proof.
_PROOF_EXCESS = 2
# Residual at which a problem is near enough to a root; five more steps must bring its square below this share.
_NEAR = 1e-9
_STALL = 0.99
# A root of the deflated equations this close is polished and judged on the whole gradient.
_CANDIDATE = 3e-2
# With gradients rounded more coarsely, the softmax's entry of the label is not trusted.
_ROUGH = 1e-10
# The search gives up after so many widening rounds without a new sample.
_IDLE_ROUNDS = 3
# The joint solve: problems at once, and the bound of problems * B^6; label counts tried.
_JOINT_BATCH = 64
_JOINT_WORK = 10**9
_HYPOTHESES = 128
_HYPOTHESIS_WORK = 4 * 10**7
# Where one sample's equations outnumber its unknowns by more, the joint solve adds nothing.
_JOINT_EXCESS = 6
# Standard deviations, in logits, of the starting points (the first of each class is 0); of the joint solve, of the
# softmax that starting points are made from.
_START_SPREADS = (0.0, 1.0, 0.3, 2.0, 4.0)
_JOINT_SPREADS = (1.0, 0.3, 2.0, 0.5)


def search(problem: HeadProblem) -> Found:
    """Individual roots with deflation, then the joint solve for what is left."""
    found = Found.none(problem.factors)
    rank, excess = problem.rank, problem.factors.excess
    if excess >= _PROOF_EXCESS:
        found = _search_roots(problem)
    if len(found) < rank and problem.batch_size in (None, rank) and excess <= _JOINT_EXCESS:
        rest = _search_joint(problem, found)
        found = found if rest is None else found.join(rest)
    return found


def _certificate_limit(spare: Tensor) -> Tensor:
    """Relative residual below which this many equations left over prove a root; 0 where none is."""
    limit = _CHANCE ** (1 / spare.clamp_min(1).double())
    return torch.where(spare > 0, limit.clamp_max(_CERTIFICATE_LIMIT), 0.0)


def _limits(
    problem: HeadProblem, factors: HeadFactors, roots: Roots, slack: Slack | None = None
) -> tuple[Tensor, Tensor]:
    """What the noise explains of ``off_span`` and of ``pairing - 1``, to first order.

    With ``dW + E``: ``|(I - UU^T) delta| <= |E| |S^-1 q|`` and ``|q^T p - 1| <= |E| |p| |S^-1 q|``; and the
    softmax itself is rounded: ``eps (1 + |logits|) / |d|``, or without the label's entry relative to itself.
    """
    amplified = (roots.q / factors.s).norm(dim=1)
    rounded = problem.head.rounding * (1 + roots.logit_range)
    if slack is None:
        rounded = rounded / roots.size
    off_span = problem.safety * (problem.noise * amplified / roots.q.norm(dim=1) + rounded)
    pairing = problem.safety * (problem.noise * amplified * roots.p.norm(dim=1) + rounded)
    return off_span, pairing


def _certified(
    problem: HeadProblem, factors: HeadFactors, roots: Roots, paired: bool, spare: int, slack: Slack | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which roots can be samples, their relative residuals, and which of them are proven by that.

    Classes whose softmax is below the noise say nothing: where the model is sure of two, any logits will do.
    """
    off_span, pairing = _limits(problem, factors, roots, slack)
    n = factors.n_classes
    silent = (roots.d.abs() <= (off_span * roots.size)[:, None] / n**0.5).sum(1)
    good, residual, bound = roots.off_span <= off_span, roots.off_span, off_span
    if paired:
        good &= (roots.pairing - 1).abs() <= pairing
        residual = torch.maximum(residual, (roots.pairing - 1).abs())
        bound = torch.maximum(bound, pairing)
    good &= torch.isfinite(residual) & (bound <= _certificate_limit(torch.full_like(silent, spare)))
    return good, residual, good & (bound <= _certificate_limit(spare - silent))


def _distinct(roots: Roots, good: Tensor, residual: Tensor) -> Tensor:
    """One root for each sample: ``q_a^T p_b`` is 1 for the same sample and 0 for another one."""
    order = good.nonzero()[:, 0]
    order = order[residual[order].argsort()]
    p, q = roots.p[order], roots.q[order] / roots.pairing[order, None]
    near = ((q @ p.mT).abs() >= 0.5).cpu()
    chosen: list[int] = []
    for i in range(len(order)):
        if not bool(near[i, chosen].any()):
            chosen.append(i)
    return order[torch.tensor(chosen, dtype=torch.int64, device=order.device)]


def _class_order(factors: HeadFactors, rest: Tensor | None) -> Tensor:
    """Classes that may be among the labels, likeliest first.

    If y is a label, ``(I - U U^T) e_y = (I - U U^T) softmax``, which is short unless the model is sure of a
    class; and ``db_y = w (sum softmax_y - k_y)`` is mostly negative.
    """
    score = factors.u.square().sum(1)  # |U^T e_y|^2
    if rest is not None:
        score = score - rest / rest.abs().max().clamp_min(torch.finfo(rest.dtype).tiny)
    return score.argsort(descending=True)


def _deflated(problem: HeadProblem, found: Found) -> HeadFactors:
    factors = problem.factors
    if len(found) == 0:
        return factors
    return factors.deflate(found.x @ factors.vh.mT / factors.s, found.delta @ factors.u)


def _bias_left(problem: HeadProblem, found: Found) -> Tensor | None:
    bias = problem.head.grad_bias
    return None if bias is None else bias - found.delta.sum(0)


def _labels_left(problem: HeadProblem, found: Found) -> Tensor:
    """The given labels without those of the found samples."""
    assert problem.labels is not None
    left = problem.labels.tolist()
    weights = problem.targets(found.labels)[1]
    times = (found.weights / weights).round().long().tolist() if problem.unit_known else [1] * len(found)
    for label, repeats in zip(found.labels.tolist(), times, strict=True):
        for _ in range(repeats):
            if label in left:
                left.remove(label)
    return torch.tensor(left, dtype=torch.int64, device=problem.labels.device)


def _search_roots(problem: HeadProblem) -> Found:
    """Rounds of individual roots: few classes and starts first, more of both when nothing is found."""
    found = Found.none(problem.factors)
    rank, n = problem.rank, problem.head.n_classes
    idle, first = 0, True
    while len(found) < rank and idle <= _IDLE_ROUNDS and not problem.head.budget.spent:
        factors = _deflated(problem, found)
        if problem.labels is not None:
            classes = torch.unique(_labels_left(problem, found))
        else:
            breadth = min(n, (rank if first else max(2 * factors.rank, rank)) * 4 ** max(0, idle - 1))
            classes = _class_order(factors, _bias_left(problem, found))[:breadth]
        if len(classes) == 0:
            break
        starts = 1 if first else 4 * max(1, idle)
        # samples that occur several times have another weight: every idle round first tries it as an unknown
        free = (idle > 0 or not problem.guess) and factors.excess > _PROOF_EXCESS
        new = _round(problem, factors, classes, min(starts, 4) if free else starts, first, paired=not free)
        if free and len(new) == 0 and problem.guess:
            new = _round(problem, factors, classes, starts, first, paired=True)
        found = found.join(new)
        idle = 0 if len(new) else idle + 1
        first = False
    return found


def _round(
    problem: HeadProblem, factors: HeadFactors, classes: Tensor, starts: int, first: bool, paired: bool
) -> Found:
    """Try every class from several starts; polish and certify what comes close to a root."""
    system = RootSystem.build(factors)
    tried = classes.repeat_interleave(starts)
    m, k = len(tried), system.g.shape[1]
    spreads = torch.tensor(_START_SPREADS, dtype=torch.float64, device=classes.device)
    index = torch.arange(m, device=classes.device) % starts + (0 if first else 1)
    start = problem.normal(m, k) * spreads[index % len(spreads)][:, None]
    target, weight = problem.targets(tried)
    problems = RootProblems(system, target, weight, torch.full_like(weight, float(paired)))
    roots = solve_roots(problems, start, budget=problem.head.budget, tolerance=_NEAR, stall=_STALL)
    near = roots.off_span <= _CANDIDATE
    if paired:
        near &= (roots.pairing - 1).abs() <= _CANDIDATE
    keep = _distinct(roots, near, roots.off_span)
    if len(keep) == 0:
        return Found.none(problem.factors)
    return _refined(problem, (roots.p[keep] * factors.s) @ factors.vh, tried[keep], paired)


def _centred_logits(factors: HeadFactors, p: Tensor) -> Tensor:
    slope = factors.weight @ (factors.vh.mT * factors.s)
    return p @ (slope - slope.mean(0)).mT + factors.offset - factors.offset.mean()


def _refined(problem: HeadProblem, x: Tensor, labels: Tensor, paired: bool) -> Found:
    """Polish candidates on the whole gradient, where no error of a subtraction is left, and certify them there."""
    factors, system = problem.factors, problem.system
    target, weight = problem.targets(labels)
    start = (_centred_logits(factors, x @ factors.vh.mT / factors.s) - system.base) @ system.g
    excess = factors.excess - (not paired)
    slack = None
    if problem.head.rounding > _ROUGH and not problem.head.noisy and excess > _PROOF_EXCESS:
        slack, excess = Slack.of(factors.u, labels), excess - 1
    problems = RootProblems(system, target, weight, torch.full_like(weight, float(paired)), slack)
    for _ in range(2):  # the second time, the pairing equation counts as much as its noise allows
        roots = solve_roots(
            problems, start, budget=problem.head.budget, iterations=40, tolerance=1e-16, damping=1e-6, stall=_STALL
        )
        off_span, pairing = _limits(problem, factors, roots, slack)
        problems = replace(problems, scale=float(paired) * (off_span * roots.size / pairing).clamp(max=1.0))
        start = (_centred_logits(factors, roots.p) - system.base) @ system.g
    good, residual, alone = _certified(problem, factors, roots, paired, excess, slack)
    good &= roots.pairing > 0
    level = off_span / problem.safety * roots.size
    if not problem.unit_known:  # samples too well classified to be seen would make the weight smaller than 1/rank
        problems = replace(problems, scale=torch.zeros_like(weight))
    accuracy = level * root_spread(factors, problems, roots)
    good &= accuracy <= problem.accuracy_limit
    if bool((good & alone).any()):
        good &= alone
    keep = _distinct(roots, good, residual)
    return _collect(factors, roots, labels, residual, alone, keep, weight, rescale=not paired)


def _collect(
    factors: HeadFactors,
    roots: Roots,
    labels: Tensor,
    residual: Tensor,
    alone: Tensor,
    keep: Tensor,
    weight: Tensor,
    rescale: bool = False,
) -> Found:
    """Samples in the coordinates of the head; an unknown weight is what makes ``q^T p = 1``."""
    scale = 1 / roots.pairing[keep] if rescale else torch.ones_like(roots.pairing[keep])
    return Found(
        x=(roots.p[keep] * factors.s) @ factors.vh,
        delta=(roots.q[keep] * scale[:, None]) @ factors.u.mT,
        labels=labels[keep],
        residuals=residual[keep],
        weights=weight[keep] * scale,
        alone=alone[keep],
    )


def _search_joint(problem: HeadProblem, found: Found) -> Found | None:
    """Solve for all remaining samples together; None unless every one is found."""
    head, factors = problem.head, _deflated(problem, found)
    r, n = factors.rank, factors.n_classes
    system = RootSystem.build(factors)
    k = system.g.shape[1]
    weighable = problem.unit_known or problem.guess or (head.scale is not None and not head.of_probabilities)
    # r (n - 1) equations (and r more with a bias) for r^2 unknowns
    if r > n - (2 if factors.kappa is None else 1) or r * max(k, 1) > MAX_UNKNOWNS or not weighable:
        return None
    spreads = torch.tensor(_JOINT_SPREADS, dtype=torch.float64, device=factors.u.device)
    for labels, starts in _label_hypotheses(problem, factors, found):
        if head.budget.spent:
            break
        tried = labels.repeat_interleave(starts, 0)
        h = len(tried)
        drawn = problem.normal(h, r, k) * spreads[torch.arange(h, device=spreads.device) % len(spreads)][:, None, None]
        target, weight = _joint_targets(problem, tried, found)
        start = features_of_softmax(system, target, weight, drawn)
        solution = solve_joint(system, target, weight, start, budget=head.budget)
        best = int(solution.cost.argmin())
        one = (tried[best], target[best], weight[best])
        rest = _joint_samples(problem, factors, solution.p[best], *one)
        certain = problem.unit_known or not problem.guess
        if rest is not None and (certain or not _fits_smaller_weight(problem, system, solution, best, one)):
            return rest
    return None


def _joint_targets(problem: HeadProblem, labels: Tensor, found: Found) -> tuple[Tensor, Tensor]:
    """Targets (h, r, n) and weights (h, r) of each row of labels; where classes weigh differently, so do the rows."""
    head = problem.head
    h, r = labels.shape
    target, v = head.loss.class_targets(labels.reshape(-1), head.n_classes, torch.float64)
    if head.loss.class_weights is None or problem.unit_known:
        unit = v.new_full((h,), problem.unit)
    else:
        totals = [head.loss.total_weight(torch.cat([found.labels, row]), head.n_classes) for row in labels]
        unit = (head.scale or 1.0) / v.new_tensor(totals)
    return target.reshape(h, r, -1), v.reshape(h, r) * unit[:, None]


def _fits_smaller_weight(
    problem: HeadProblem,
    system: RootSystem,
    solution: JointSolution,
    best: int,
    one: tuple[Tensor, Tensor, Tensor],
) -> bool:
    """Whether ``w = 1/(B+1)`` explains the gradient just as well: then neither B nor the samples are proved."""
    _, target, weight = one
    start = torch.linalg.lstsq(system.t, (solution.p[best] - system.p0).mT).solution.mT
    smaller = weight * problem.rank / (problem.rank + 1)
    other = solve_joint(system, target[None], smaller[None], start[None], budget=problem.head.budget)
    return bool(other.cost[0] <= max(1e-6, 10 * float(solution.cost[best])))


def _joint_samples(
    problem: HeadProblem, factors: HeadFactors, p: Tensor, labels: Tensor, target: Tensor, weight: Tensor
) -> Found | None:
    """Certify a joint solution: every sample's own equations, and ``q_a^T p_b = 0`` between samples."""
    slope = factors.weight @ (factors.vh.mT * factors.s)
    logits = p @ slope.mT + factors.offset
    d = torch.softmax(logits, 1) - target
    q = d @ factors.u
    off_span = d - q @ factors.u.mT
    q = weight[:, None] * q
    reach = (logits - logits.mean(1, keepdim=True)).abs().amax(1)
    roots = Roots(p, q, off_span.norm(dim=1) / d.norm(dim=1), (p * q).sum(1), d, reach)
    spare = factors.rank * (factors.n_classes - 1 - factors.rank + (factors.kappa is not None))
    good, residual, alone = _certified(problem, factors, roots, paired=True, spare=spare)
    mixing = (q @ p.mT - torch.eye(len(p), dtype=p.dtype, device=p.device)).abs().amax(1)
    relative = problem.noise / factors.s[-1] + problem.head.rounding
    good &= mixing <= problem.safety * relative * q.norm(dim=1) * p.norm(dim=1).max()
    if not bool(good.all()):
        return None
    everyone = torch.arange(len(p), device=p.device)
    return _collect(factors, roots, labels, torch.maximum(residual, mixing), alone, everyone, weight)


def _label_hypotheses(problem: HeadProblem, factors: HeadFactors, found: Found) -> list[tuple[Tensor, int]]:
    """Label rows to try, in batches with a number of starts: likely ones first, then more of both."""
    r, n = factors.rank, factors.n_classes
    budget = max(1, min(_JOINT_BATCH, _JOINT_WORK // r**6))  # problems at once
    if problem.labels is not None:
        rows = _labels_left(problem, found)[None]
        if rows.shape[1] != r:
            return []
    else:
        left = _bias_left(problem, found)
        estimate = estimated_counts(problem.head, factors, left, problem.unit, problem.generator)
        limit = max(1, min(_HYPOTHESES, _HYPOTHESIS_WORK // r**6))
        if r > n - 2:  # at the very limit the equations are too stiff for many tries to pay
            limit = min(limit, _HYPOTHESES // 4)
        rows = label_rows(estimate, lower_counts(left, problem.unit, n), r, limit).to(factors.u.device)
    plan = [(rows[:1], budget)] * 2
    if len(rows) == 1:
        return plan * 2
    per = min(4, budget)
    return plan + [(piece, per) for piece in rows[1:].split(max(1, budget // per))]
