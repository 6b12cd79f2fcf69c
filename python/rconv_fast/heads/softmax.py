"""Split the gradient of a classification head into the samples of the batch, each with a certificate.

Notation of :mod:`rconv_fast.heads.roots`: n classes, d features, B samples,
``dW = sum_b delta_b x_b^T``, ``db = sum_b delta_b``, ``delta_b = w (softmax(W x_b + c) - e_{y_b})``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.errors import require
from rconv_fast.heads.roots import targets_of
from rconv_fast.heads.search import CERTIFICATE_LIMIT, SAFETY, WHOLE, Found, HeadProblem, factorise, search, truncate
from rconv_fast.heads.separation import HeadSeparation, check_head, numerical_rank, rounding_of

# ``q_a^T p_b`` of a complete separation is 0 or 1 this closely, or as closely as the noise allows.
_PAIRING = 1e-8
# A search that has not ended by then will not end with success.
SEARCH_SECONDS = 60.0


def separate_softmax_batch(
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    batch_size: int | None = None,
    labels: Sequence[int] | Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    seed: int = 0,
    time_limit: float | None = None,
) -> HeadSeparation:
    """Split the gradient of a softmax head into the samples of its batch.

    Solves ``delta_b = w (softmax(W x_b + c) - e_{y_b})``, ``dW = sum_b delta_b x_b^T``,
    ``db = sum_b delta_b`` for all ``x_b``, ``y_b`` and B. Three stages, each only where the one before
    cannot finish: the closed form for one sample; one sample's equations at a time (all classes and starts in one
    batched Levenberg-Marquardt; found samples are subtracted, which makes the rest easier); all samples
    jointly, over the likeliest label counts.

    Parameters
    ----------
    grad_weight : Tensor, shape (n, d)
        Gradient of the cross-entropy with respect to the head's weight.
    grad_bias : Tensor, shape (n,), or None
        Gradient with respect to the bias; None for a head without one.
    weight : Tensor, shape (n, d)
        The head's weight.
    bias : Tensor, shape (n,), or None
        The head's bias. With `grad_bias` None it is a constant offset (a frozen bias).
    batch_size : int, optional
        Number of samples; by default the rank of the gradient, corrected for repeated samples where that
        is possible.
    labels : sequence of int, optional
        The labels of the batch, in any order. By default they are found.
    label_smoothing : float
        As in ``torch.nn.functional.cross_entropy``.
    reduction : {"mean", "sum"}
        Of the loss over the batch.
    seed : int
        Seed of the starting points. The result does not depend on it, except for what is found at all.
    time_limit : float, optional
        Seconds after which the search ends with what it has; by default one minute.

    Returns
    -------
    HeadSeparation
        Only certified samples; look at ``complete`` and ``reason``. In the dtype of `grad_weight`.

    Raises
    ------
    ArgumentError
        If a shape, value or option is wrong, or the gradient is zero.
    ArgumentTypeError
        If a tensor is not of a real floating type.

    Notes
    -----
    Arithmetic is float64. The noise of the gradients is read off their values (float64, or float32 numbers)
    and their singular values; residuals are judged against it.
    One sample has ``n - 2B + 1`` more equations than unknowns (one less without a bias): for fewer than 2
    only the batch as a whole is a proof, and samples are returned only if all of them are found. That
    leaves ``B <= n - 1`` with a bias and ``B <= n - 2`` without.
    Two identical samples with the same label act as one of twice the weight: they come back as one row with
    multiplicity 2. Identical inputs with different labels are not separated.

    References
    ----------
    The label counts' start: iLRG (Ma et al., arXiv 2208.11319), from ``db``.
    """
    function = "separate_softmax_batch"
    check_head(function, grad_weight, grad_bias, weight, bias, reduction)
    n = grad_weight.shape[0]
    require(n >= 2, function, "grad_weight", "have at least 2 rows (classes)", n)
    smooth = 0.0 <= label_smoothing < 1.0
    require(smooth, function, "label_smoothing", "lie in [0, 1)", label_smoothing)
    given = checked_labels(function, labels, n, batch_size, grad_weight.device)
    head = HeadProblem(
        grad_weight=grad_weight.detach().double(),
        grad_bias=None if grad_bias is None else grad_bias.detach().double(),
        weight=weight.detach().double(),
        bias=(weight.new_zeros(n) if bias is None else bias.detach()).double(),
        label_smoothing=label_smoothing,
        reduction=reduction,
        rounding=rounding_of(grad_weight, grad_bias),
        generator=torch.Generator().manual_seed(seed),
        budget=Budget.seconds(time_limit).at_most(SEARCH_SECONDS),
    )
    return separate(head, batch_size, given).to(grad_weight.dtype)


def separate(head: HeadProblem, batch_size: int | None, given: Tensor | None) -> HeadSeparation:
    """The closed form of one sample where it fits, else the search."""
    return _single_sample(head, batch_size, given) or _separate(head, batch_size, given)


def checked_labels(
    function: str,
    labels: Sequence[int] | Tensor | None,
    n_classes: int,
    batch_size: int | None,
    device: torch.device,
) -> Tensor | None:
    """Labels as a vector of class numbers, one a sample."""
    require(batch_size is None or batch_size >= 1, function, "batch_size", "be at least 1", batch_size)
    if labels is None:
        return None
    given = torch.as_tensor(labels, dtype=torch.int64, device=device).reshape(-1)
    require(len(given) > 0, function, "labels", "not be empty", "an empty batch")
    inside = bool(((given >= 0) & (given < n_classes)).all())
    require(inside, function, "labels", f"lie in [0, {n_classes})", given.tolist())
    fits = batch_size is None or len(given) == batch_size
    require(fits, function, "labels", f"have batch_size = {batch_size} entries", len(given))
    return given


def _single_sample(head: HeadProblem, batch_size: int | None, given: Tensor | None) -> HeadSeparation | None:
    """One sample and a bias: ``delta = db``, ``x = dW^T db / |db|^2``, ``e_y = softmax(W x + c) - delta``."""
    expected = batch_size if given is None else len(given)
    if head.grad_bias is None or expected not in (None, 1):
        return None
    delta = head.grad_bias
    square = delta @ delta
    x = head.grad_weight.mT @ delta / square
    mixed = (head.grad_weight - torch.outer(delta, x)).norm() / head.grad_weight.norm()
    logits = head.weight @ x + head.bias
    target = torch.softmax(logits, 0) - delta
    label = target.argmax()
    gap = target - targets_of(label[None], len(target), head.label_smoothing, target.dtype)[0]
    values = torch.stack([mixed, gap.norm() / square.sqrt(), square.sqrt(), logits.abs().max(), label.double()])
    rank_gap, residual, size, reach, y = values.tolist()  # the only synchronisation
    if not rank_gap <= SAFETY * head.rounding:  # also NaN, of a zero bias gradient
        return None
    limit = SAFETY * head.rounding * max(1.0, reach) * max(1.0, 1.0 / size)
    if not residual <= min(limit, CERTIFICATE_LIMIT):
        return None
    if given is not None and int(given[0]) != int(y):
        return None
    one = torch.ones(1, dtype=torch.int64, device=x.device)
    return HeadSeparation(
        x[None], label[None], delta[None], values[1:2], 1, one, True, rank_gap, 1, spare=spare_equations(head, 1)
    )


def spare_equations(head: HeadProblem, rank: int) -> int:
    """Equations that no unknown was needed for: ``r (n - 1)`` (and r with a bias) for the ``r^2`` of all p_b."""
    return rank * (len(head.weight) - 1 - rank + (head.grad_bias is not None))


def _separate(head: HeadProblem, batch_size: int | None, given: Tensor | None) -> HeadSeparation:
    spectrum = factorise(head)
    rank = numerical_rank(spectrum, tuple(head.grad_weight.shape), head.rounding)  # type: ignore[arg-type]
    expected = batch_size if given is None else len(given)
    if expected is not None:
        rank = min(rank, expected)
    head.batch_size = rank if expected is None else expected
    head.weight_known = expected is not None or head.reduction == "sum"
    truncate(head, spectrum, rank)
    found = search(head, given)
    if expected is None:
        size = _batch_size_of(found, head.reduction)
        if size is None:  # no batch has such weights: keep what occurs once in a batch of `rank`
            found = found.take((found.weights * rank - 1).abs() <= WHOLE)
        head.batch_size = size or rank
    return _assemble(head, found)


def _batch_size_of(found: Found, reduction: str) -> int | None:
    """The smallest B for which every sample's weight is a multiple of ``1/B`` and they add up to B."""
    if len(found) == 0:
        return None
    if reduction == "sum":
        return int(found.weights.round().sum())
    weights = found.weights
    for size in range(len(found), 8 * len(found) + 1):
        times = weights * size
        whole = bool(((times - times.round()).abs() < WHOLE * times).all() & (times.round() >= 1).all())
        if whole and int(times.round().sum()) == size:
            return size
    return None


def _assemble(head: HeadProblem, found: Found) -> HeadSeparation:
    factors, rank, m = head.factors, head.factors.rank, len(found)
    x = found.x[:, : head.grad_weight.shape[1]]
    left = (head.grad_weight - found.delta.mT @ x).norm() / head.grad_weight.norm()
    if head.grad_bias is not None:
        left = torch.maximum(left, (head.grad_bias - found.delta.sum(0)).norm() / head.grad_bias.norm())
    # sum_b q_b p_b^T = I, or (the same for m = rank) q_a^T p_b = delta_ab
    p, q = found.x @ factors.vh.mT / factors.s, found.delta @ factors.u
    pairing = (q @ p.mT - torch.eye(m, dtype=p.dtype, device=p.device)).abs().amax() if m else left
    bound = min(max(_PAIRING, (head.noise / float(factors.s[-1])) ** 0.5), 0.1)
    times = (found.weights / head.sample_weight).round().long()
    complete = m == rank and float(pairing) <= bound and int(times.sum()) == head.batch_size
    return HeadSeparation(
        inputs=x,
        labels=found.labels,
        grad_logits=found.delta,
        residuals=found.residuals,
        batch_size=head.batch_size,
        multiplicities=times,
        complete=complete,
        head_residual=float(left),
        rank=rank,
        reason="" if complete else _reason(head, found),
        spare=spare_equations(head, rank),
    )


def _reason(head: HeadProblem, found: Found) -> str:
    rank, n = head.factors.rank, head.factors.n_classes
    if head.batch_size > rank:
        return (
            f"{head.batch_size} samples in a gradient of rank {rank}: more than the head's {n - 1} directions, "
            f"or samples that depend on each other"
        )
    if len(found) == rank:
        return "the certified samples do not explain the whole gradient"
    limit = n - (2 if head.factors.kappa is None else 1)
    if rank > limit:
        return f"{rank} samples with {n} classes: at most {limit} leave more equations than unknowns"
    return f"{len(found)} of {rank} samples certified; no further root was found"
