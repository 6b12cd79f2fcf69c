"""Roots of the softmax head: the samples of a batch, one at a time, by batched Levenberg-Marquardt.

A head's gradient is ``dW = sum_b delta_b x_b^T`` with ``delta_b = w (softmax(W x_b + c) - e_{y_b})`` and
``w = 1/B`` (mean) or 1 (sum).  With ``dW = U S V^T`` of rank B, ``x_b = V S p_b`` and ``delta_b = U q_b``, so
``sum_b q_b p_b^T = I``.  Hence each sample is a root of

    (I - U U^T) d = 0,    w p^T U^T d = 1,    d = softmax(W V S p + c) - e_y,

for its own label y, and nothing else is, as long as there are more equations than unknowns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.heads.levenberg_marquardt import State, damped_step, minimise

# A Jacobian batch stays below this many bytes; larger batches of problems are run in chunks.
_CHUNK_BYTES = 1 << 28


@dataclass(frozen=True)
class HeadFactors:
    """The rank-r factors of a head's gradient, and the head's map in their coordinates.

    With a bias, the features are extended by one constant ``kappa`` (the bias is that feature's weight), so
    ``[dW, kappa db] = U S V^T`` and every sample also satisfies the linear equation ``t^T p = kappa``.

    Attributes
    ----------
    u : Tensor, shape (n, r)
        Orthonormal basis of the span of the ``delta_b``.
    s : Tensor, shape (r,)
        Singular values.
    vh : Tensor, shape (r, d) or (r, d + 1)
        Right singular vectors.
    weight : Tensor, shape (n, d) or (n, d + 1)
        ``W`` or ``[W, c / kappa]``.
    offset : Tensor, shape (n,)
        Part of the logits that does not depend on ``p``: the bias if it has no gradient, else 0.
    kappa : float or None
        Value of the constant feature; None without a bias gradient.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    weight: Tensor
    offset: Tensor
    kappa: float | None

    @property
    def rank(self) -> int:
        """Number of samples that are still mixed."""
        return int(self.s.shape[0])

    @property
    def n_classes(self) -> int:
        """Number of rows of the head."""
        return int(self.u.shape[0])

    @property
    def excess(self) -> int:
        """Equations minus unknowns of one sample's root: positive means that a root proves itself.

        ``(n - 1 - r) + 1`` equations (the columns of dW sum to zero) for ``r`` unknowns, one less with a bias.
        """
        return self.n_classes - 2 * self.rank + (0 if self.kappa is None else 1)

    def truncated(self, rank: int) -> HeadFactors:
        """Keep the largest `rank` singular values."""
        return replace(self, u=self.u[:, :rank], s=self.s[:rank], vh=self.vh[:rank])

    def deflate(self, p: Tensor, q: Tensor) -> HeadFactors:
        """Take samples with coordinates `p`, `q` (m, r) out: ``U (I - sum q p^T) S V^T`` has rank r - m."""
        core = (torch.eye(self.rank, dtype=p.dtype, device=p.device) - q.mT @ p) * self.s
        left, values, right = torch.linalg.svd(core)
        keep = self.rank - p.shape[0]
        return HeadFactors(
            self.u @ left[:, :keep],
            values[:keep],
            right[:keep] @ self.vh,
            self.weight,
            self.offset,
            self.kappa,
        )


@dataclass(frozen=True)
class RootSystem:
    """One sample's equations, with the unknown measured in logits: ``logits = base + G z``, ``p = p0 + T z``.

    ``G`` has orthonormal columns, so a unit step of ``z`` moves the (centred) logits by one, whatever the
    scale of the weights, the features and the singular values.
    """

    u: Tensor
    g: Tensor
    t: Tensor
    p0: Tensor
    base: Tensor

    @classmethod
    def build(cls, factors: HeadFactors) -> RootSystem:
        """Eliminate the bias equation ``t^T p = kappa`` and orthonormalise the map from p to the logits."""
        slope = factors.weight @ (factors.vh.mT * factors.s)  # (n, r): logits = slope p + offset
        slope = slope - slope.mean(0)  # softmax does not see a common shift
        base = factors.offset - factors.offset.mean()
        r = factors.rank
        if factors.kappa is None:
            p0 = torch.zeros(r, dtype=slope.dtype, device=slope.device)
            free = torch.eye(r, dtype=slope.dtype, device=slope.device)
        else:
            row = factors.s * factors.vh[:, -1]
            p0 = row * (factors.kappa / (row @ row))
            free = torch.linalg.qr(row[:, None], mode="complete").Q[:, 1:]
        g, upper = torch.linalg.qr(slope @ free)
        t = torch.linalg.solve_triangular(upper, free, upper=True, left=False)
        base = base + slope @ p0
        shift = g.mT @ base  # start from the smallest logits that satisfy the bias equation
        return cls(factors.u, g, t, p0 - t @ shift, base - g @ shift)


@dataclass(frozen=True)
class Roots:
    """Candidate roots: coordinates and equation residuals.

    Attributes
    ----------
    p, q : Tensor, shape (m, r)
        ``x = V S p`` and ``delta = U q``.
    off_span : Tensor, shape (m,)
        ``|(I - U U^T) d| / |d|``.
    pairing : Tensor, shape (m,)
        ``q^T p``, which is 1 for a sample that occurs once.
    d : Tensor, shape (m, n)
        ``softmax - e_y``.
    logit_range : Tensor, shape (m,)
        Largest absolute centred logit.
    """

    p: Tensor
    q: Tensor
    off_span: Tensor
    pairing: Tensor
    d: Tensor
    logit_range: Tensor

    @property
    def size(self) -> Tensor:
        """``|softmax - e_y|``, shape (m,)."""
        return self.d.square().sum(1).sqrt()


@dataclass
class _State(State):
    softmax: Tensor
    d: Tensor
    q: Tensor
    p: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Slack:
    """The entry of the label as an unknown of its own: ``delta = w (softmax - e_y + eta e_y)``.

    A client's softmax is rounded relatively; where it is nearly 1 at the label, nothing but rounding is left there
    after the subtraction. With ``v`` the unit vector along ``(I - U U^T) e_y``, ``eta = -(v^T d) / (v^T e_y)``.

    Attributes
    ----------
    v : Tensor, shape (m, n)
        That vector, for each problem's label.
    gain : Tensor, shape (m, r)
        ``U^T e_y / (v^T e_y)``.
    """

    v: Tensor
    gain: Tensor

    @classmethod
    def of(cls, u: Tensor, labels: Tensor) -> Slack:
        """Of an orthonormal basis u (n, r) and labels (m,)."""
        inside = u[labels]
        v = -inside @ u.mT
        v.scatter_add_(1, labels[:, None], torch.ones_like(v[:, :1]))
        length = v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)  # v^T e_y as well
        return cls(v / length, inside / length)

    def take(self, index: Tensor) -> Slack:
        """Of the problems at `index`."""
        return Slack(self.v[index], self.gain[index])


@dataclass(frozen=True)
class RootProblems:
    """One sample's equations for many labels: ``[(I - U U^T) d, scale (w p^T q - 1)]``.

    Attributes
    ----------
    system : RootSystem
        The equations.
    target : Tensor, shape (m, n)
        Label distribution of each problem.
    weight : Tensor, shape (m,)
        Weight w of the sample in the gradient.
    scale : Tensor, shape (m,)
        Factor of the equation ``w p^T q = 1`` beside the others: 0 leaves it out (the weight is unknown).
    slack : Slack or None
        Where the entry of the label is not to be trusted.
    """

    system: RootSystem
    target: Tensor
    weight: Tensor
    scale: Tensor
    slack: Slack | None = None

    def take(self, index: Tensor) -> RootProblems:
        """The problems at `index`."""
        slack = None if self.slack is None else self.slack.take(index)
        return RootProblems(self.system, self.target[index], self.weight[index], self.scale[index], slack)

    def evaluate(self, z: Tensor) -> _State:
        """Residuals at z."""
        system, slack = self.system, self.slack
        softmax = torch.softmax(system.base + z @ system.g.mT, 1)
        d = softmax - self.target
        q = d @ system.u
        off_span = d - q @ system.u.mT
        if slack is not None:
            along = (d * slack.v).sum(1, keepdim=True)
            off_span = off_span - along * slack.v
            q = q - along * slack.gain
        p = system.p0 + z @ system.t.mT
        pairing = self.scale * (self.weight * (p * q).sum(1) - 1)
        residual = torch.cat([off_span, pairing[:, None]], 1)
        return _State(z, residual.square().sum(1), softmax, d, q, p, residual)

    def step(self, state: _State, damping: Tensor) -> Tensor:
        """Solve ``(J^T J + lambda I) dz = -J^T r``."""
        n = self.system.u.shape[0]
        normal, jacobian, row = self.normal_matrix(state.softmax, state.p, state.q)
        slope = (state.residual[:, None, :n] @ jacobian)[:, 0] + row * state.residual[:, n:]
        return damped_step(normal, slope, damping)

    def normal_matrix(self, softmax: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``J^T J`` of all equations, the Jacobian of the softmax, and the pairing equation's row of J."""
        # d softmax = (diag(s) - s s^T) G dz = J dz; J^T (I - UU^T) J = J^T J - (U^T J)^T (U^T J). The difference only
        # steers the step: the right-hand side uses the projected residual itself.
        system, slack = self.system, self.slack
        jacobian = softmax[:, :, None] * system.g
        jacobian.baddbmm_(softmax[:, :, None], (softmax @ system.g)[:, None, :], alpha=-1)
        inside = system.u.mT @ jacobian
        normal = jacobian.mT @ jacobian - inside.mT @ inside
        if slack is not None:
            along = slack.v[:, None, :] @ jacobian
            normal = normal - along.mT @ along
            inside = inside - slack.gain[:, :, None] * along
        row = (self.scale * self.weight)[:, None] * (q @ system.t + (p[:, None, :] @ inside)[:, 0])
        return normal + row[:, :, None] * row[:, None, :], jacobian, row


def root_spread(factors: HeadFactors, problems: RootProblems, roots: Roots) -> Tensor:
    """How far a sample moves when its equations move: relative ``|dx| / |x|`` for residual noise of norm 1.

    ``dz = J^+ e`` with e spread evenly over the ``n - 1 - r`` directions, ``dx = V S T dz``:
    ``E |dx|^2 = tr(S T (J^T J)^-1 T^T S) / (n - 1 - r)``.

    Parameters
    ----------
    factors : HeadFactors
        Of the whole gradient.
    problems, roots
        As given to and got from :func:`solve_roots`.

    Returns
    -------
    Tensor, shape (m,)
        Infinite where the equations do not determine the sample.
    """
    softmax = problems.target + roots.d
    normal, _, _ = problems.normal_matrix(softmax, roots.p, roots.q / problems.weight[:, None])
    if normal.shape[-1] == 0:  # one sample and a bias: p is fixed by t^T p = kappa
        return torch.zeros_like(problems.weight)
    move = factors.s[:, None] * problems.system.t
    values, vectors = torch.linalg.eigh(normal)
    # a direction without any equation counts as badly determined, not as absent
    values = torch.maximum(values, torch.finfo(values.dtype).eps * values[:, -1:]).clamp_min(1e-300)
    trace = ((move @ vectors).square().sum(1) / values).sum(1)
    directions = max(1, factors.n_classes - 1 - factors.rank)
    spread: Tensor = (trace / directions).sqrt() / (roots.p * factors.s).norm(dim=1)
    return spread


def solve_roots(
    problems: RootProblems,
    start: Tensor,
    *,
    budget: Budget,
    iterations: int = 60,
    tolerance: float = 1e-15,
    damping: float = 1e-2,
    stall: float = 1.0,
) -> Roots:
    """Run Levenberg-Marquardt on every (label, start) pair at once.

    Parameters
    ----------
    problems : RootProblems
        The equations of m pairs.
    start : Tensor, shape (m, k)
        First guess of z.
    budget, iterations, tolerance, damping, stall
        As in :func:`~rconv_fast.heads.levenberg_marquardt.minimise`.

    Returns
    -------
    Roots
        Of all problems, in their order, solved or not.

    Notes
    -----
    Work per iteration and problem: ``O(n r^2)``. Large batches run in chunks of at most 256 MiB.
    """
    system = problems.system
    m, n, k = start.shape[0], system.u.shape[0], system.g.shape[1]
    chunk = max(1, _CHUNK_BYTES // (8 * n * max(k, 1) * 2))
    z = torch.cat(
        [
            minimise(
                problems.take(i),
                start[i],
                iterations=iterations,
                tolerance=tolerance,
                budget=budget,
                damping=damping,
                stall=stall,
            )
            for i in torch.arange(m, device=start.device).split(chunk)
        ]
    )
    final = problems.evaluate(z)
    return Roots(
        p=final.p,
        q=problems.weight[:, None] * final.q,
        off_span=final.residual[:, :n].norm(dim=1) / final.d.norm(dim=1),
        pairing=problems.weight * (final.p * final.q).sum(1),
        d=final.d,
        logit_range=(system.base + z @ system.g.mT).abs().amax(1),
    )
