"""Roots of the softmax head: the samples of a batch, one at a time, by batched Levenberg-Marquardt.

A head's gradient is ``dW = sum_b delta_b x_b^T`` with ``delta_b = w (softmax(W x_b + c) - e_{y_b})`` and
``w = 1/B`` (mean) or 1 (sum).  With ``dW = U S V^T`` of rank B, ``x_b = V S p_b`` and ``delta_b = U q_b``, so
``sum_b q_b p_b^T = I``.  Hence each sample is a root of

    (I - U U^T) d = 0,    w p^T U^T d = 1,    d = softmax(W V S p + c) - e_y,

for its own label y, and nothing else is, as long as there are more equations than unknowns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Levenberg-Marquardt: damping is divided by 5 after a success and multiplied by 4 after a failure.
_DAMPING_START = 1e-2
_DAMPING_SUCCESS = 0.2
_DAMPING_FAILURE = 4.0
_DAMPING_RANGE = (1e-15, 1e8)
# Finished problems leave the batch every so many iterations (each check reads one mask back to the host).
_COMPACT_EVERY = 5
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


def targets_of(labels: Tensor, n_classes: int, label_smoothing: float, dtype: torch.dtype) -> Tensor:
    """One row ``(1 - eps) e_y + eps / n`` for each label, shape (m, n)."""
    target = torch.full((labels.shape[0], n_classes), label_smoothing / n_classes, dtype=dtype, device=labels.device)
    target.scatter_add_(1, labels[:, None], torch.full_like(target[:, :1], 1.0 - label_smoothing))
    return target


@dataclass
class _State:
    """Everything Levenberg-Marquardt keeps of each problem; all tensors share the leading dimension."""

    z: Tensor
    softmax: Tensor
    d: Tensor
    q: Tensor
    p: Tensor
    residual: Tensor
    cost: Tensor

    def where(self, accept: Tensor, other: _State) -> _State:
        """Take `other` where `accept` is set."""
        fields = {}
        for name, mine in vars(self).items():
            mask = accept.reshape(-1, *([1] * (mine.ndim - 1)))
            fields[name] = torch.where(mask, getattr(other, name), mine)
        return _State(**fields)

    def take(self, index: Tensor) -> _State:
        """Keep the problems at `index`."""
        return _State(**{name: value[index] for name, value in vars(self).items()})


def _evaluate(system: RootSystem, target: Tensor, weight: Tensor, scale: Tensor, z: Tensor) -> _State:
    logits = system.base + z @ system.g.mT
    softmax = torch.softmax(logits, 1)
    d = softmax - target
    q = d @ system.u
    p = system.p0 + z @ system.t.mT
    pairing = scale * (weight * (p * q).sum(1) - 1)
    residual = torch.cat([d - q @ system.u.mT, pairing[:, None]], 1)
    return _State(z, softmax, d, q, p, residual, (residual * residual).sum(1))


def _normal_matrix(
    system: RootSystem, softmax: Tensor, p: Tensor, q: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``J^T J`` of all equations, the Jacobian of the softmax, and the pairing equation's row of J."""
    # d softmax = (diag(s) - s s^T) G dz = J dz; J^T (I - UU^T) J = J^T J - (U^T J)^T (U^T J). The difference only
    # steers the step: the right-hand side uses the projected residual itself.
    jacobian = softmax[:, :, None] * system.g
    jacobian.baddbmm_(softmax[:, :, None], (softmax @ system.g)[:, None, :], alpha=-1)
    inside = system.u.mT @ jacobian
    row = (scale * weight)[:, None] * (q @ system.t + (p[:, None, :] @ inside)[:, 0])
    normal = jacobian.mT @ jacobian - inside.mT @ inside + row[:, :, None] * row[:, None, :]
    return normal, jacobian, row


def _step(system: RootSystem, state: _State, weight: Tensor, scale: Tensor, damping: Tensor) -> Tensor:
    """Solve ``(J^T J + lambda I) dz = -J^T r`` for each problem."""
    n = system.u.shape[0]
    normal, jacobian, row = _normal_matrix(system, state.softmax, state.p, state.q, weight, scale)
    slope = (state.residual[:, None, :n] @ jacobian)[:, 0] + row * state.residual[:, n:]
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += (damping * diagonal.mean(1) + torch.finfo(normal.dtype).tiny)[:, None]
    factor, info = torch.linalg.cholesky_ex(normal)
    step = torch.cholesky_solve(slope[:, :, None], factor)[:, :, 0]
    return torch.where((info == 0)[:, None], -step, torch.zeros_like(step))


def root_spread(
    factors: HeadFactors, system: RootSystem, roots: Roots, target: Tensor, weight: Tensor, scale: Tensor
) -> Tensor:
    """How far a sample moves when its equations move: relative ``|dx| / |x|`` for residual noise of norm 1.

    ``dz = J^+ e`` with e spread evenly over the ``n - 1 - r`` directions, ``dx = V S T dz``:
    ``E |dx|^2 = tr(S T (J^T J)^-1 T^T S) / (n - 1 - r)``.

    Parameters
    ----------
    factors, system, roots, target, weight, scale
        As in :func:`solve_roots`, at its result.

    Returns
    -------
    Tensor, shape (m,)
        Infinite where the equations do not determine the sample.
    """
    softmax = target + roots.d
    normal, _, _ = _normal_matrix(system, softmax, roots.p, roots.q / weight[:, None], weight, scale)
    if normal.shape[-1] == 0:  # one sample and a bias: p is fixed by t^T p = kappa
        return torch.zeros_like(weight)
    move = factors.s[:, None] * system.t
    values, vectors = torch.linalg.eigh(normal)
    # a direction without any equation counts as badly determined, not as absent
    values = torch.maximum(values, torch.finfo(values.dtype).eps * values[:, -1:]).clamp_min(1e-300)
    trace = ((move @ vectors).square().sum(1) / values).sum(1)
    directions = max(1, factors.n_classes - 1 - factors.rank)
    spread: Tensor = (trace / directions).sqrt() / (roots.p * factors.s).norm(dim=1)
    return spread


def solve_roots(
    system: RootSystem,
    target: Tensor,
    weight: Tensor,
    start: Tensor,
    *,
    scale: Tensor,
    iterations: int = 60,
    tolerance: float = 1e-15,
    damping: float = _DAMPING_START,
) -> Roots:
    """Run Levenberg-Marquardt on every (target, start) pair at once.

    Parameters
    ----------
    system : RootSystem
        The equations.
    target : Tensor, shape (m, n)
        Label distribution of each problem.
    weight : Tensor, shape (m,)
        Weight w of the sample in the loss.
    start : Tensor, shape (m, k)
        First guess of z.
    scale : Tensor, shape (m,)
        Factor of the equation ``w p^T q = 1`` beside the others: 0 leaves it out (the weight is unknown).
    iterations : int
        Upper bound; problems stop earlier when they are solved or stuck.
    tolerance : float
        A problem is solved when the norm of its residual is below.
    damping : float
        First damping, relative to the mean diagonal of ``J^T J``; small for starts close to a root.

    Returns
    -------
    Roots
        Of all problems, in their order, solved or not.

    Notes
    -----
    Work per iteration and problem: ``O(n r^2)``. Large batches run in chunks of at most 256 MiB.
    """
    m, n, k = start.shape[0], system.u.shape[0], system.g.shape[1]
    chunk = max(1, _CHUNK_BYTES // (8 * n * max(k, 1) * 2))
    z = torch.cat(
        [
            _solve_chunk(system, target[i : i + chunk], weight[i : i + chunk], start[i : i + chunk],
                         scale[i : i + chunk], iterations, tolerance, damping)
            for i in range(0, m, chunk)
        ]
    )  # fmt: skip
    final = _evaluate(system, target, weight, torch.zeros_like(scale), z)
    logits = system.base + z @ system.g.mT
    return Roots(
        p=final.p,
        q=weight[:, None] * final.q,
        off_span=final.residual.norm(dim=1) / final.d.norm(dim=1),
        pairing=weight * (final.p * final.q).sum(1),
        d=final.d,
        logit_range=logits.abs().amax(1),
    )


def _solve_chunk(
    system: RootSystem,
    target: Tensor,
    weight: Tensor,
    start: Tensor,
    scale: Tensor,
    iterations: int,
    tolerance: float,
    first_damping: float,
) -> Tensor:
    result = start.clone()
    active = torch.arange(start.shape[0], device=start.device)
    state = _evaluate(system, target, weight, scale, start)
    damping = torch.full_like(weight, first_damping)
    for iteration in range(iterations):
        step = _step(system, state, weight, scale, damping)
        trial = _evaluate(system, target, weight, scale, state.z + step)
        better = trial.cost < state.cost
        state = state.where(better, trial)
        factor = torch.where(better, _DAMPING_SUCCESS, _DAMPING_FAILURE)
        damping = (damping * factor).clamp(*_DAMPING_RANGE)
        if iteration % _COMPACT_EVERY == _COMPACT_EVERY - 1:
            # synchronises: solved, or so damped that it no longer moves
            running = (state.cost > tolerance**2) & (damping < _DAMPING_RANGE[1])
            result[active] = state.z
            keep = running.nonzero()[:, 0]
            if keep.shape[0] == 0:
                return result
            if keep.shape[0] < running.shape[0]:
                active, state, damping = active[keep], state.take(keep), damping[keep]
                target, weight, scale = target[keep], weight[keep], scale[keep]
    result[active] = state.z
    return result
