"""Take a batch apart in a fully connected ReLU layer, where the head alone mixes too many samples.

Behind a ReLU most neurons are active for a part of the batch only. With ``G = dL/dW`` (rows are neurons) and
``h = dL/db`` of the first fully connected layer, ``G_j = sum_i delta_ij x_i`` and ``h_j = sum_i delta_ij``: a neuron
that is active for sample i alone shows it, ``x_i = G_j / h_j``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.errors import require
from rconv_fast.heads.head import check_head
from rconv_fast.heads.separation import HeadSeparation
from rconv_fast.heads.sparse_columns import DRAWS_AT_ONCE, sparse_directions, sparsest_basis
from rconv_fast.heads.spectrum import numerical_rank
from rconv_fast.rounding import rounding_of

# A candidate's predicted gradient may differ from the given one by this many roundings, relative to the sum of
# what has been added and subtracted there.
_SAFETY = 1e4
# The same for a whole column of gradients against the column space, beyond the noise measured there.
_SPAN_SAFETY = 100.0
# Two neurons show the same sample when their candidates differ by less than this, relatively.
_SAME = 1e-3
# The sparsity search: most samples left, draws of neurons.
_SEARCH_SAMPLES = 12
_SEARCH_DRAWS = 1 << 16


@dataclass(frozen=True)
class _Span:
    """``[G, kappa h] = U S V^T`` of the first layer, of rank B."""

    u: Tensor
    s: Tensor
    vh: Tensor
    kappa: float
    noise: float


@dataclass
class _Stack:
    """The layers in float64, the gradients, what is left of the first layer's, and its rounding."""

    weights: list[Tensor]
    biases: list[Tensor]
    grads: list[tuple[Tensor, Tensor]]
    weight: float  # 1/B or 1
    rounding: float
    left_weight: Tensor  # [n_1, d]
    left_bias: Tensor  # [n_1]
    scale: Tensor  # [n_1]: sum of the magnitudes in left_bias, for its rounding
    span: _Span | None  # None where the batch is larger than the layer's rank can be

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Pre-activations of every hidden layer and the softmax, for x of shape (m, d)."""
        hidden = []
        for w, b in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden.append(x @ w.mT + b)
            x = hidden[-1].relu()
        return hidden, torch.softmax(x @ self.weights[-1].mT + self.biases[-1], 1)

    def backward(self, hidden: list[Tensor], grad_logits: Tensor) -> list[Tensor]:
        """Gradients at every pre-activation, first layer first, the logits last."""
        grads = [grad_logits]
        for w, z in zip(reversed(self.weights[1:]), reversed(hidden), strict=True):
            grads.append((grads[-1] @ w) * (z > 0))
        return grads[::-1]

    def slopes(self, hidden: list[Tensor], neurons: Tensor) -> Tensor:
        """``d logits / d (pre-activation of neuron j)`` for sample j and its own neuron, shape (m, n)."""
        rows = torch.arange(len(neurons), device=neurons.device)
        tangent = self.weights[1].mT[neurons] * (hidden[0][rows, neurons] > 0)[:, None]
        for w, z in zip(self.weights[2:], hidden[1:], strict=True):
            tangent = (tangent * (z > 0)) @ w.mT
        return tangent


@dataclass
class _Samples:
    x: Tensor
    labels: Tensor
    residuals: Tensor

    def join(self, other: _Samples) -> _Samples:
        """These samples and `other`'s."""
        return _Samples(*(torch.cat([a, b]) for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def peel_relu_batch(
    layers: Sequence[tuple[Tensor, Tensor]],
    grads: Sequence[tuple[Tensor, Tensor]],
    *,
    batch_size: int | None = None,
    reduction: str = "mean",
    seed: int = 0,
    time_limit: float | None = None,
) -> HeadSeparation:
    """Separate a batch in a stack of fully connected ReLU layers that ends in a softmax head.

    Peeling: neuron j of the first layer gives the candidate ``x = G_j / h_j``. It is a sample if some label y
    explains the neuron's bias gradient, ``h_j = w (J^T softmax - J_y)_j`` with ``J = d logits / d z`` at that
    candidate, and if its gradients in all neurons lie in the column space of G and pair with it (``delta = U q``,
    ``q^T p = 1``). The samples found are subtracted, which leaves other neurons with a single sample, and so on.

    Where that stalls with r <= 12 samples left: the remaining gradient is ``Delta X`` with sparse columns of Delta. A
    sample that is inactive in r - 1 drawn neurons is the null vector of their rows in the column space. Up to 65536
    draws are tried, the sparsest independent directions kept; as soon as r of them give ``X = pinv(Delta) G`` whose
    samples are all certified by a label against their whole column, they are taken.

    Parameters
    ----------
    layers : sequence of (weight, bias)
        ``(n_k, n_{k-1})`` and ``(n_k,)``; a ReLU between them; the last one makes the logits. At least two.
    grads : sequence of (grad_weight, grad_bias)
        Their gradients.
    batch_size : int, optional
        Number of samples; by default the rank of the first layer's gradient.
    reduction : {"mean", "sum"}
        Of the cross-entropy over the batch.
    seed : int
        Seed of the draws of the sparsity search.
    time_limit : float, optional
        Seconds after which the search ends with what it has.

    Returns
    -------
    HeadSeparation
        Only certified samples; see ``complete``. ``inputs`` are those of the first fully connected layer,
        ``grad_preactivation`` the gradients behind it. In the dtype of the first gradient.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If there are fewer than two layers, or a shape, type or value is wrong.

    Notes
    -----
    Peeling needs neurons of a single sample: with half of the neurons active, about ``B n_1 / 2^B`` of them, so a
    bias that keeps neurons mostly off helps far more than width. The search costs about ``2^(r-1)`` draws a sample.

    References
    ----------
    Peeling and its certificate: Shariati and Alambardar Meybodi, 2026. Sparsity search: SPEAR (Dimitrov et al.,
    NeurIPS 2024), section 4, without its greedy repair of false directions.
    """
    function = "peel_relu_batch"
    budget = Budget.seconds(time_limit)
    stack, size = _checked_stack(function, layers, grads, batch_size, reduction)
    found = _peel(stack, size, budget)
    if 0 < size - len(found.x) <= _SEARCH_SAMPLES:
        more = _search_sparse(stack, size - len(found.x), torch.Generator().manual_seed(seed), budget)
        if more is not None:
            found = found.join(more)
    if len(found.x) == size:
        found = _polished(stack, found)
    return _result(stack, found, size, grads[0][0].dtype)


def _checked_stack(
    function: str,
    layers: Sequence[tuple[Tensor, Tensor]],
    grads: Sequence[tuple[Tensor, Tensor]],
    batch_size: int | None,
    reduction: str,
) -> tuple[_Stack, int]:
    require(len(layers) >= 2, function, "layers", "hold at least 2 layers", len(layers))
    require(len(grads) == len(layers), function, "grads", f"hold {len(layers)} pairs", len(grads))
    require(batch_size is None or batch_size >= 1, function, "batch_size", "be at least 1", batch_size)
    width = layers[0][0].shape[-1]
    for (weight, bias), (grad_weight, grad_bias) in zip(layers, grads, strict=True):
        check_head(function, grad_weight, grad_bias, weight, bias, reduction)
        require(weight.shape[1] == width, function, "layers", f"have {width} inputs here", weight.shape[1])
        width = weight.shape[0]
    pairs = [(a.detach().double(), b.detach().double()) for a, b in grads]
    first, bias_grad = pairs[0]
    rounding = rounding_of(*grads[0])
    kappa = float(first.norm() / bias_grad.norm())
    u, s, vh = torch.linalg.svd(torch.cat([first, kappa * bias_grad[:, None]], 1), full_matrices=False)
    rank = numerical_rank(s, (first.shape[0], first.shape[1] + 1), rounding)
    size = batch_size or rank
    span = None
    if size == rank < len(s):
        span = _Span(u[:, :rank], s[:rank], vh[:rank], kappa, max(float(s[rank]), 1e-16 * float(s[0])))
    stack = _Stack(
        [w.detach().double() for w, _ in layers],
        [b.detach().double() for _, b in layers],
        pairs,
        1.0 / size if reduction == "mean" else 1.0,
        rounding,
        first.clone(),
        bias_grad.clone(),
        bias_grad.abs(),
        span,
    )
    return stack, size


def _peel(stack: _Stack, size: int, budget: Budget) -> _Samples:
    d = stack.left_weight.shape[1]
    empty = stack.left_weight.new_zeros(0)
    found = _Samples(empty.reshape(0, d), empty.long(), empty)
    while len(found.x) < size and not budget.spent:
        new = _single_neuron_samples(stack, found.x)
        if len(new.x) == 0:
            break
        room = size - len(found.x)
        new = _Samples(new.x[:room], new.labels[:room], new.residuals[:room])
        _subtract(stack, new)
        found = found.join(new)
    return found


def _single_neuron_samples(stack: _Stack, known: Tensor) -> _Samples:
    """All samples that some neuron shows alone, best certificate first."""
    h, limit = stack.left_bias, _SAFETY * stack.rounding * stack.scale
    neurons = (h.abs() > limit.clamp_min(1e-300)).nonzero()[:, 0]
    x = stack.left_weight[neurons] / h[neurons, None]
    hidden, softmax = stack.forward(x)
    slopes = stack.slopes(hidden, neurons)
    # h_j = w (sum_k softmax_k J_kj - J_yj), for every label y
    predicted = stack.weight * ((softmax * slopes).sum(1, keepdim=True) - slopes)
    gap, labels = (predicted - h[neurons, None]).abs().min(1)
    relative = gap / h[neurons].abs()
    error = stack.rounding * stack.scale[neurons] / h[neurons].abs()  # of the candidate itself
    safety = _SPAN_SAFETY if stack.span is None else _SAFETY  # one equation alone must be exact
    good = (relative <= safety * error) & (relative <= _SAME)
    good[good.clone()] = _fits_the_span(stack, _Samples(x[good], labels[good], relative[good]), error[good])
    order = good.nonzero()[:, 0]
    order = order[error[order].argsort()]
    chosen: list[int] = []
    taken = known
    for i in order.tolist():
        if len(taken) and bool(((taken - x[i]).norm(dim=1) <= _SAME * x[i].norm()).any()):
            continue
        chosen.append(i)
        taken = torch.cat([taken, x[i : i + 1]])
    index = torch.tensor(chosen, dtype=torch.int64, device=x.device)
    return _Samples(x[index], labels[index], relative[index])


def _fits_the_span(stack: _Stack, samples: _Samples, error: Tensor) -> Tensor:
    """Whether each sample's own gradients ``delta`` fit the whole layer's: ``delta = U q``, ``q^T p = 1``.

    These are ``n_1 - B`` equations beyond those of the neuron that showed the sample (:mod:`rconv_fast.heads.roots`).
    """
    span = stack.span
    if span is None:
        return torch.ones_like(error, dtype=torch.bool)
    delta = _deltas(stack, samples)[0][0]
    size = delta.norm(dim=1).clamp_min(1e-300)
    q = delta @ span.u
    p = torch.cat([samples.x, torch.full_like(error[:, None], span.kappa)], 1) @ span.vh.mT / span.s
    amplified = span.noise * (q / span.s).norm(dim=1)
    off_span = (delta - q @ span.u.mT).norm(dim=1) / size
    own = _SPAN_SAFETY * (error + stack.rounding)
    off_limit = own + _SPAN_SAFETY * amplified / size
    pair_limit = own * size * p.norm(dim=1) + _SPAN_SAFETY * amplified * p.norm(dim=1)
    pairing = ((p * q).sum(1) - 1).abs()
    certified: Tensor = (off_span <= off_limit.clamp(max=_SAME)) & (pairing <= pair_limit.clamp(max=0.1))
    return certified


def _deltas(stack: _Stack, samples: _Samples) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients at all pre-activations and the inputs of all layers, for each sample."""
    hidden, softmax = stack.forward(samples.x)
    target = torch.nn.functional.one_hot(samples.labels, softmax.shape[1]).to(softmax)
    grads = stack.backward(hidden, stack.weight * (softmax - target))
    return grads, [samples.x, *(z.relu() for z in hidden)]


def _subtract(stack: _Stack, samples: _Samples) -> None:
    grads, _ = _deltas(stack, samples)
    stack.left_weight -= grads[0].mT @ samples.x
    stack.left_bias -= grads[0].sum(0)
    stack.scale += grads[0].abs().sum(0)


def _search_sparse(stack: _Stack, r: int, generator: torch.Generator, budget: Budget) -> _Samples | None:
    """SPEAR's search for the r samples that are left; None unless all are found and certified."""
    kappa = float(stack.left_weight.norm() / stack.left_bias.norm())
    joined = torch.cat([stack.left_weight, kappa * stack.left_bias[:, None]], 1)
    basis, values, _ = torch.linalg.svd(joined, full_matrices=False)
    noise = float(values[r]) if r < len(values) else stack.rounding * float(values[0])
    if float(values[r - 1]) <= 30 * noise:
        return None
    basis = basis[:, :r]
    alive = (basis.norm(dim=1) > 1e-6 * basis.norm(dim=1).max()).nonzero()[:, 0]
    zero = max(1e-9, 1e3 * noise / float(values[r - 1]))  # of the largest entry
    columns = basis.new_zeros(basis.shape[0], 0)
    for _ in range(_SEARCH_DRAWS // DRAWS_AT_ONCE):
        if budget.spent:
            break
        new = basis @ sparse_directions(basis[alive], r, zero, generator)
        new = torch.where(new.abs() <= zero * new.abs().amax(0), 0.0, new)
        before = columns.shape[1]
        columns = sparsest_basis(torch.cat([columns, new / new.norm(dim=0)], 1), r)
        if columns.shape[1] == r and (before < r or new.shape[1] > 0):
            extended = torch.linalg.lstsq(columns, joined).solution  # rows (x_i, kappa) up to a factor
            x = extended[:, :-1] * (kappa / extended[:, -1:])
            found = _certified_columns(stack, x, columns * (extended[:, -1] / kappa), zero)
            if found is not None:
                return found
    return None


def _certified_columns(stack: _Stack, x: Tensor, columns: Tensor, tolerance: float) -> _Samples | None:
    """Find the label that explains each sample's whole column of first-layer gradients."""
    hidden, softmax = stack.forward(x)
    n = softmax.shape[1]
    labels, residuals = [], []
    for i in range(len(x)):
        grad = softmax[i] - torch.eye(n, dtype=x.dtype, device=x.device)  # every label at once
        one = [z[i].expand(n, -1) for z in hidden]
        predicted = stack.backward(one, stack.weight * grad)[0]
        gap, label = (predicted - columns[:, i]).norm(dim=1).min(0)
        labels.append(label)
        residuals.append(gap / columns[:, i].norm())
    residual = torch.stack(residuals)
    if bool((residual > min(_SAME, 1e3 * tolerance)).any()):
        return None
    return _Samples(x, torch.stack(labels), residual)


def _polished(stack: _Stack, found: _Samples) -> _Samples:
    """All samples at once: ``X = pinv(Delta) G`` with the Delta of the samples, while that improves the match."""
    grad_weight, _ = stack.grads[0]
    mismatch = _mismatch(stack, found)
    for _ in range(3):
        delta = _deltas(stack, found)[0][0]
        if float(torch.linalg.svdvals(delta)[-1]) <= 1e-12 * float(delta.norm()):
            break
        trial = _Samples(torch.linalg.lstsq(delta.mT, grad_weight).solution, found.labels, found.residuals)
        now = _mismatch(stack, trial)
        if now >= mismatch:
            break
        found, mismatch = trial, now
    return found


def _mismatch(stack: _Stack, found: _Samples) -> float:
    """Largest relative mismatch of a layer's gradients."""
    grads, inputs = _deltas(stack, found)
    worst = 0.0
    for delta, x, (grad_weight, grad_bias) in zip(grads, inputs, stack.grads, strict=True):
        worst = max(worst, float((delta.mT @ x - grad_weight).norm() / grad_weight.norm()))
        worst = max(worst, float((delta.sum(0) - grad_bias).norm() / grad_bias.norm()))
    return worst


def _result(stack: _Stack, found: _Samples, size: int, dtype: torch.dtype) -> HeadSeparation:
    grads, _ = _deltas(stack, found)
    mismatch = _mismatch(stack, found) if len(found.x) else 1.0
    complete = len(found.x) == size and mismatch <= _SAFETY * stack.rounding
    reason = ""
    if len(found.x) < size:
        reason = f"{len(found.x)} of {size} samples certified; no neuron shows another one alone"
    elif not complete:
        reason = f"the samples leave {mismatch:.1e} of the gradients unexplained"
    m, rank = len(found.x), size if stack.span is None else len(stack.span.s)
    return HeadSeparation(
        inputs=found.x,
        labels=found.labels,
        grad_logits=grads[-1],
        residuals=found.residuals,
        batch_size=size,
        multiplicities=torch.ones(m, dtype=torch.int64, device=found.x.device),
        complete=complete,
        head_residual=mismatch,
        rank=rank,
        reason=reason,
        spare=rank * (grads[0].shape[1] - rank),
        grad_preactivation=grads[0],
    ).to(dtype)
