"""All samples of a softmax head at once, for batches too large to certify one sample alone.

Beyond ``2 B > n`` one sample has no more equations than unknowns, but the batch together has
(:mod:`rconv_fast.heads.roots` for the notation): the unknowns are all ``p_b`` (B^2 numbers), the equations
``(I - U U^T) d_b = 0`` for every b and ``sum_b w q_b p_b^T = I``, about ``n B`` of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.heads.levenberg_marquardt import State, damped_step, minimise
from rconv_fast.heads.roots import RootSystem

# The normal matrix has (B k)^2 entries and a handful of copies; beyond this many unknowns it is refused.
MAX_UNKNOWNS = 4096
# Hypotheses whose squared residual falls by less than this factor in five iterations are given up.
_STALL = 0.995


@dataclass(frozen=True)
class JointSolution:
    """The end of one joint solve, for each hypothesis h.

    Attributes
    ----------
    p, q : Tensor, shape (h, r, r)
        Row b holds sample b: ``x_b = V S p_b``, ``delta_b = U q_b``.
    cost : Tensor, shape (h,)
        Norm of all residuals.
    """

    p: Tensor
    q: Tensor
    cost: Tensor


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
    weight: Tensor  # [h, r]

    def evaluate(self, z: Tensor) -> _State:
        """Residuals at z."""
        system = self.system
        softmax = torch.softmax(system.base + z @ system.g.mT, -1)
        d = softmax - self.target
        inside = d @ system.u
        p = system.p0 + z @ system.t.mT
        q = self.weight[..., None] * inside
        off_span = d - inside @ system.u.mT
        pairing = q.mT @ p - torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        cost = off_span.square().sum((1, 2)) + pairing.square().sum((1, 2))
        return _State(z, cost, softmax, q, p, off_span, pairing)

    def take(self, index: Tensor) -> _JointProblems:
        """The hypotheses at `index`."""
        return _JointProblems(self.system, self.target[index], self.weight[index])

    def step(self, state: _State, damping: Tensor) -> Tensor:
        """Solve ``(J^T J + lambda I) dz = -J^T r`` of all samples together."""
        system, weight = self.system, self.weight
        h, r, k = state.z.shape
        # d softmax_b = (diag(s) - s s^T) G dz_b
        jacobian = state.softmax[..., None] * (system.g - (state.softmax @ system.g)[..., None, :])  # [h, r, n, k]
        inside = system.u.mT @ jacobian  # [h, r, r, k]
        jacobian = jacobian - system.u @ inside
        dq = weight[..., None, None] * inside
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
    target: Tensor,
    weight: Tensor,
    start: Tensor,
    *,
    budget: Budget,
    iterations: int = 200,
    tolerance: float = 1e-14,
) -> JointSolution:
    """Run Levenberg-Marquardt on all samples together, for several label hypotheses at once.

    Parameters
    ----------
    system : RootSystem
        The equations.
    target : Tensor, shape (h, r, n)
        Targets of the samples, for each hypothesis.
    weight : Tensor, shape (h, r)
        Weight of each sample in the gradient.
    start : Tensor, shape (h, r, k)
        First guess.
    budget, iterations, tolerance
        As in :func:`~rconv_fast.heads.levenberg_marquardt.minimise`; all stop when one hypothesis is solved.

    Notes
    -----
    Work per iteration and hypothesis: ``O(B^5)`` for the normal matrix, ``O(B^6 / 3)`` for its factor.
    """
    problems = _JointProblems(system, target, weight)
    z = minimise(
        problems, start, iterations=iterations, tolerance=tolerance, budget=budget, stall=_STALL, one_is_enough=True
    )
    final = problems.evaluate(z)
    return JointSolution(final.p, final.q, final.cost.sqrt())
