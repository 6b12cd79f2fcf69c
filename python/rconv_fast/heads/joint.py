"""All samples of a softmax head at once, for batches too large to certify one sample alone.

Beyond ``2 B > n`` one sample has no more equations than unknowns, but the batch together has
(:mod:`rconv_fast.heads.roots` for the notation): the unknowns are all ``p_b`` (B^2 numbers), the equations
``(I - U U^T) d_b = 0`` for every b and ``sum_b w q_b p_b^T = I``, about ``n B`` of them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.heads.levenberg_marquardt import State, damped_step, minimise
from rconv_fast.heads.roots import RootSystem, targets_of

# The normal matrix has (B k)^2 entries and a handful of copies; beyond this many unknowns it is refused.
MAX_UNKNOWNS = 8192
# Hypotheses whose squared residual falls by less than this factor in five iterations are given up.
_STALL = 0.995
# A count moves only among the classes that are the cheapest to change.
_WIDTH = 12


@dataclass(frozen=True)
class JointSolution:
    """The end of one joint solve, for each hypothesis h.

    Attributes
    ----------
    p, q : Tensor, shape (h, r, r)
        Row b holds sample b: ``x_b = V S p_b``, ``delta_b = U q_b``.
    labels : Tensor, shape (h, r)
        The labels that were assumed.
    cost : Tensor, shape (h,)
        Norm of all residuals.
    """

    p: Tensor
    q: Tensor
    labels: Tensor
    cost: Tensor


def estimate_counts(mean_softmax: Tensor, grad_bias: Tensor, total: int, weight: float) -> Tensor:
    """Real-valued label counts ``k = B softmax - db / w`` (iLRG, from ``db = w sum_b (softmax_b - e_b)``)."""
    counts = total * mean_softmax - grad_bias / weight
    return counts + (total - counts.sum()) / counts.shape[0]


def count_hypotheses(estimate: Tensor, lower: Tensor, total: int, limit: int) -> Iterator[tuple[int, ...]]:
    """Integer label counts of the given total, nearest to the estimate first.

    Parameters
    ----------
    estimate : Tensor, shape (n,)
        Real-valued counts.
    lower : Tensor, shape (n,), integer
        ``k_y >= lower_y``, known because a softmax is positive.
    total : int
        Sum of the counts.
    limit : int
        How many to yield at most.

    Notes
    -----
    Best-first search over single moves (one sample from a class to another) from the nearest integer point,
    which the greedy rule finds: the cost is separable and convex.
    """
    target = estimate.tolist()
    low = [max(0, int(v)) for v in lower.tolist()]
    if sum(low) > total:
        low = [0] * len(low)
    best = list(low)
    for _ in range(total - sum(best)):
        best[max(range(len(best)), key=lambda y: target[y] - best[y])] += 1

    def cost(counts: tuple[int, ...]) -> float:
        return math.fsum((k - t) ** 2 for k, t in zip(counts, target, strict=True))

    first = tuple(best)
    seen = {first}
    queue = [(cost(first), first)]
    # only the classes that are cheapest to change can matter for the first `limit` hypotheses
    width = min(len(target), _WIDTH)
    for _ in range(limit):
        if not queue:
            return
        _, counts = heapq.heappop(queue)
        yield counts
        order = sorted(range(len(target)), key=lambda y: counts[y] - target[y])
        donors = [y for y in reversed(order) if counts[y] > low[y]][:width]
        for y in donors:
            for v in order[:width]:
                moved = list(counts)
                moved[y] -= 1
                moved[v] += 1
                key = tuple(moved)
                if key not in seen:
                    seen.add(key)
                    heapq.heappush(queue, (cost(key), key))


@dataclass
class _State(State):
    softmax: Tensor  # [h, r, n]
    q: Tensor  # [h, r, r], includes w
    p: Tensor  # [h, r, r]
    off_span: Tensor  # [h, r, n]
    pairing: Tensor  # [h, r, r]


@dataclass(frozen=True)
class _JointProblems:
    """All samples' equations for each hypothesis of their labels, ``z`` of shape (h, r, k)."""

    system: RootSystem
    target: Tensor  # [h, r, n]
    weight: float

    def evaluate(self, z: Tensor) -> _State:
        """Residuals at z."""
        system = self.system
        softmax = torch.softmax(system.base + z @ system.g.mT, -1)
        d = softmax - self.target
        inside = d @ system.u
        p = system.p0 + z @ system.t.mT
        q = self.weight * inside
        off_span = d - inside @ system.u.mT
        pairing = q.mT @ p - torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        cost = off_span.square().sum((1, 2)) + pairing.square().sum((1, 2))
        return _State(z, cost, softmax, q, p, off_span, pairing)

    def take(self, index: Tensor) -> _JointProblems:
        """The hypotheses at `index`."""
        return _JointProblems(self.system, self.target[index], self.weight)

    def step(self, state: _State, damping: Tensor) -> Tensor:
        """Solve ``(J^T J + lambda I) dz = -J^T r`` of all samples together."""
        system, weight = self.system, self.weight
        h, r, k = state.z.shape
        # d softmax_b = (diag(s) - s s^T) G dz_b
        jacobian = state.softmax[..., None] * (system.g - (state.softmax @ system.g)[..., None, :])  # [h, r, n, k]
        inside = system.u.mT @ jacobian  # [h, r, r, k]
        jacobian = jacobian - system.u @ inside
        dq = weight * inside
        # d(q_b p_b^T) = dq_b p_b^T + q_b (T dz_b)^T; all inner products of two such matrices
        flat = dq.movedim(2, 1).reshape(h, r, r * k)
        pp, qq = state.p @ state.p.mT, state.q @ state.q.mT
        normal = (flat.mT @ flat).reshape(h, r, k, r, k) * pp[:, :, None, :, None]
        cross = (state.q @ flat).reshape(h, r, r, k)  # cross[c, b, i] = q_c . dq_b,i
        pt = state.p @ system.t  # [h, r, k]
        mixed = cross.permute(0, 2, 3, 1)[..., None] * pt[:, :, None, None, :]  # (dq_b,i . q_c)(p_b . T_j)
        normal += mixed
        normal += mixed.permute(0, 3, 4, 1, 2)
        normal += qq[:, :, None, :, None] * (system.t.mT @ system.t)[None, None, :, None, :]
        own = jacobian.mT @ jacobian  # [h, r, k, k]
        blocks = normal.diagonal(dim1=1, dim2=3)  # [h, k, k, r]
        blocks += own.permute(0, 2, 3, 1)
        slope = (state.off_span[..., None, :] @ jacobian)[..., 0, :]
        slope = slope + torch.einsum("hbai,hac,hbc->hbi", dq, state.pairing, state.p)
        slope = slope + state.q @ state.pairing @ system.t
        step = damped_step(normal.reshape(h, r * k, r * k), slope.reshape(h, r * k), damping)
        return step.reshape(h, r, k)


def solve_joint(
    system: RootSystem,
    labels: Tensor,
    weight: float,
    start: Tensor,
    *,
    budget: Budget,
    label_smoothing: float = 0.0,
    iterations: int = 200,
    tolerance: float = 1e-14,
) -> JointSolution:
    """Run Levenberg-Marquardt on all samples together, for several label hypotheses at once.

    Parameters
    ----------
    system : RootSystem
        The equations.
    labels : Tensor, shape (h, r)
        One row of labels for each hypothesis.
    weight : float
        Weight w of every sample in the loss.
    start : Tensor, shape (h, r, k)
        First guess.
    label_smoothing : float
        As in ``torch.nn.functional.cross_entropy``.
    budget, iterations, tolerance
        As in :func:`~rconv_fast.heads.levenberg_marquardt.minimise`; all stop when one hypothesis is solved.

    Notes
    -----
    Work per iteration and hypothesis: ``O(B^5)`` for the normal matrix, ``O(B^6 / 3)`` for its factor.
    """
    h, r = labels.shape
    n = system.u.shape[0]
    target = targets_of(labels.reshape(-1), n, label_smoothing, start.dtype).reshape(h, r, n)
    problems = _JointProblems(system, target, weight)
    z = minimise(
        problems, start, iterations=iterations, tolerance=tolerance, budget=budget, stall=_STALL, one_is_enough=True
    )
    final = problems.evaluate(z)
    return JointSolution(final.p, final.q, labels, final.cost.sqrt())
