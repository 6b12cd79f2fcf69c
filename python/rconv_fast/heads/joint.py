"""All samples of a softmax head at once, for batches too large to certify one sample alone.

Beyond ``2 B > n`` one sample has no more equations than unknowns, but the batch together has
(:mod:`rconv_fast.heads.roots` for the notation): the unknowns are all ``p_b`` (B^2 numbers), the equations say that
the batch is the gradient, ``sum_b w_b U^T d_b p_b^T = I`` and ``(I - U U^T) d_b = 0``. With ``P`` the matrix of the
rows ``p_b`` and ``P^-1 = [a_1 .. a_B]`` both are

    d_b = U a_b / w_b        for every b:

the softmax that a sample's features give is the one that the gradient leaves for it. That is measured in
probabilities, whatever the singular values are; the products ``q_b p_b^T`` are not, and descent on them creeps.
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
    inverse: Tensor  # [h, r, r], columns a_b
    residual: Tensor  # [h, r, n]


@dataclass(frozen=True)
class _JointProblems:
    """All samples' equations for each hypothesis of their labels, ``z`` of shape (h, r, k)."""

    system: RootSystem
    target: Tensor  # [h, r, n]
    weight: Tensor  # [h, r]

    def evaluate(self, z: Tensor) -> _State:
        """Residuals ``d_b - U a_b / w_b`` at z; a singular P is never a step forward."""
        system = self.system
        softmax = torch.softmax(system.base + z @ system.g.mT, -1)
        inverse, info = torch.linalg.inv_ex(system.p0 + z @ system.t.mT)
        residual = softmax - self.target - (system.u @ inverse).mT / self.weight[..., None]
        cost = residual.square().sum((1, 2))
        worst = torch.finfo(cost.dtype).max
        return _State(z, torch.where((info == 0) & (cost < worst), cost, worst), softmax, inverse, residual)

    def take(self, index: Tensor) -> _JointProblems:
        """The hypotheses at `index`."""
        return _JointProblems(self.system, self.target[index], self.weight[index])

    def step(self, state: _State, damping: Tensor) -> Tensor:
        """Solve ``(J^T J + lambda I) dz = -J^T r`` of all samples together.

        ``dr_c = [b = c] J_c dz_c + U a_b (a_c^T T dz_b) / w_c`` for a step ``dz_b`` of sample b.
        """
        system, inverse = self.system, state.inverse
        h, r, k = state.z.shape
        # d softmax_b = (diag(s) - s s^T) G dz_b
        jacobian = state.softmax[..., None] * (system.g - (state.softmax @ system.g)[..., None, :])  # [h, r, n, k]
        inside = system.u.mT @ jacobian  # [h, r, r, k]
        along = (inverse.mT @ system.t) / self.weight[..., None]  # a_c^T T / w_c, [h, r, k]
        normal = (inverse.mT @ inverse)[:, :, None, :, None] * (along.mT @ along)[:, None, :, None, :]
        cross = torch.einsum("hxb,hcxi->hbci", inverse, inside)  # (U a_b) . (J_c)_i
        mixed = torch.einsum("hbci,hcj->hbjci", cross, along)
        normal += mixed
        normal += mixed.permute(0, 3, 4, 1, 2)
        blocks = normal.diagonal(dim1=1, dim2=3)  # [h, k, k, r]
        blocks += (jacobian.mT @ jacobian).permute(0, 2, 3, 1)
        slope = (state.residual[..., None, :] @ jacobian)[..., 0, :]
        slope = slope + inverse.mT @ (state.residual @ system.u).mT @ along
        step = damped_step(normal.reshape(h, r * k, r * k), slope.reshape(h, r * k), damping)
        return step.reshape(h, r, k)


def features_of_softmax(system: RootSystem, target: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    """The features that the gradient leaves for samples whose softmax is that of these logits: a first guess.

    ``P = (w d U)^-T`` needs no luck where the labels differ: a guessed softmax says little against ``e_y``.

    Parameters
    ----------
    system, target, weight
        As in :func:`solve_joint`.
    logits : Tensor, shape (h, r, k)
        In the coordinates of the unknown.

    Returns
    -------
    Tensor, shape (h, r, k)
        Coordinates of P, projected on those that meet the bias equation.
    """
    softmax = torch.softmax(system.base + logits @ system.g.mT, -1)
    p = torch.linalg.inv_ex(weight[..., None] * ((softmax - target) @ system.u)).inverse.mT
    start: Tensor = (p - system.p0) @ torch.linalg.pinv(system.t).mT
    return start


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
    p, q = system.p0 + z @ system.t.mT, weight[..., None] * ((final.softmax - target) @ system.u)
    return JointSolution(p, q, final.cost.sqrt())
