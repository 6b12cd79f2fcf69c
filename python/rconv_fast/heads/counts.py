"""How many samples of each class: from the bias gradient, which says it up to the mean softmax (after iLRG)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rconv_fast.heads.head import Head
from rconv_fast.heads.roots import HeadFactors

# A count moves only among the classes that are the cheapest to change.
_WIDTH = 12
# Draws of a mean softmax.
_DRAWS = 256
# Rounds in which class means and label counts are found from one another; a class without samples counts as this.
_ROUNDS = 12
_LEAST_COUNT = 0.5


def estimate_counts(mean_softmax: Tensor, grad_bias: Tensor, total: int, weight: float) -> Tensor:
    """Real-valued label counts ``k = B softmax - db / w`` (iLRG, from ``db = w sum_b (softmax_b - e_b)``)."""
    counts = total * mean_softmax - grad_bias / weight
    return counts + (total - counts.sum()) / counts.shape[0]


def lower_counts(grad_bias: Tensor | None, weight: float, n_classes: int) -> Tensor:
    """``k_y = sum softmax_y - db_y / w > -db_y / w``, as integers."""
    if grad_bias is None:
        return torch.zeros(n_classes, dtype=torch.int64)
    return torch.ceil(-grad_bias / weight - 1e-6).clamp_min(0).long().cpu()


def label_rows(estimate: Tensor, lower: Tensor, total: int, limit: int) -> Tensor:
    """Rows of labels (at most `limit`, `total`), the nearest to the estimated counts first."""
    classes = torch.arange(len(estimate))
    hypotheses = count_hypotheses(estimate.cpu(), lower, total, limit)
    return torch.stack([classes.repeat_interleave(torch.tensor(counts)) for counts in hypotheses])


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


def _mean_softmax(head: Head, feature_mean: float, generator: torch.Generator) -> Tensor:
    """Expected softmax for features of this mean and twice its square as variance (a normal behind a ReLU has 2.1)."""
    mean = feature_mean * head.weight.sum(1) + head.bias
    deviation = abs(feature_mean) * 2**0.5 * head.weight.norm(dim=1)
    draws = torch.randn(_DRAWS, len(mean), generator=generator, dtype=torch.float64).to(mean.device)
    return torch.softmax(mean + deviation * draws, 1).mean(0)


def estimated_counts(
    head: Head, rest: HeadFactors, grad_bias: Tensor | None, unit: float, generator: torch.Generator
) -> Tensor:
    """Label counts of the samples in `rest` from ``db``; without a bias from ``dW 1 = const * db``.

    Features behind an activation have a positive sum that varies little: ``dW 1 = d mean(x) db``, which gives
    the mean feature, hence the expected softmax. Without a bias, at least n - r classes are absent, and
    ``db_y = w r softmax_y`` there gives ``d mean(x)``.
    """
    r, n = rest.rank, rest.n_classes
    total = head.grad_weight.sum(1) / head.grad_weight.shape[1]
    if grad_bias is not None and head.grad_bias is not None:
        feature_mean = float(total @ head.grad_bias / (head.grad_bias @ head.grad_bias))
        return estimate_counts(_mean_softmax(head, feature_mean, generator), grad_bias, r, unit)
    total = (rest.u * rest.s) @ rest.vh.sum(1) / head.grad_weight.shape[1]
    feature_mean = 0.0
    for _ in range(3):
        softmax = _mean_softmax(head, feature_mean, generator)
        feature_mean = float((total / softmax).topk(n - r).values.mean() / (unit * r))
    return estimate_counts(softmax, total / feature_mean, r, unit)


def label_counts(head: Head, batch_size: int) -> Tensor | None:
    """How many samples of each class, where they cannot be separated; None where ``db`` does not say.

    ``k = B (sbar - db)`` (for smoothing e: ``(1 - e) k = B (sbar - e/n - db)``) needs the mean softmax ``sbar`` to
    half a sample. With features of class means ``xbar_y``, mean m and variance ``sigma^2`` within a class,

        k_y (xbar_y - m) = B (db_y m - dW_y + sigma^2 sbar_y (w_y - wbar)),

    whose left sides have the variance ``k_y sigma^2``: least squares gives m and sigma, and since a mean of few samples
    is poor, m is drawn to its own average over the features as far as its error says (James and Stein). The counts,
    the means and the softmax, averaged over normal features around the class means, are found from one another.

    Parameters
    ----------
    head : Head
        With a bias gradient and a known scale.
    batch_size : int
        B.

    Notes
    -----
    An estimate: right for a few samples a class where the features have a mean, as behind a ReLU or in pictures; for
    many more, or without a mean, single counts may be off by one.

    References
    ----------
    Counts from db and class means: iLRG, Ma et al., arXiv 2208.11319, section 4.
    """
    db, n = head.grad_bias, head.n_classes
    if db is None or head.scale is None or head.loss.class_weights is not None or not bool(db.any()):
        return None
    unit = head.scale / (batch_size if head.loss.reduction == "mean" else 1)
    db, dw = db / (unit * batch_size), head.grad_weight / (unit * batch_size)
    smoothing = head.loss.label_smoothing
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(_DRAWS, dw.shape[1], generator=generator, dtype=torch.float64).to(dw) @ head.weight.mT
    softmax = torch.full_like(db, 1 / n)
    counts, variance = torch.full_like(db, batch_size / n), 0.0
    for _ in range(_ROUNDS):
        tilt = softmax[:, None] * (head.weight - softmax @ head.weight)
        rows = dw - variance * tilt
        share = counts.clamp_min(_LEAST_COUNT) / batch_size
        mean, variance = _feature_mean(rows, db, share, batch_size)
        means = mean + (db[:, None] * mean - rows) / share[:, None]
        spread = (variance * (1 - 1 / counts.clamp_min(1.0))).sqrt()
        logits = head.logits(means)[:, None] + spread[:, None, None] * draws
        softmax = (counts[:, None] * torch.softmax(logits, 2).mean(1)).sum(0) / batch_size
        counts = (batch_size * (softmax - smoothing / n - db) / (1 - smoothing)).clamp_min(0)
        counts = counts * (batch_size / counts.sum())
    lower = lower_counts(db, 1 / batch_size, n) if smoothing == 0 else torch.zeros(n, dtype=torch.int64)
    nearest = next(count_hypotheses(counts.cpu(), lower, batch_size, 1))
    return torch.tensor(nearest, device=db.device)


def _feature_mean(rows: Tensor, db: Tensor, share: Tensor, batch_size: int) -> tuple[Tensor, float]:
    """Mean m of the features and sigma^2 within a class: ``dW_y - db_y m`` has the variance ``sigma^2 k_y / B^2``."""
    weight = db / share
    precision = float(weight @ db)
    mean = weight @ rows / precision
    left = (rows - db[:, None] * mean).square() / share[:, None]
    variance = float(left.mean()) * batch_size * len(db) / max(1, len(db) - 2)
    error = variance / (batch_size * precision)
    own = mean - mean.mean()
    keep = max(0.0, 1 - error / max(float(own.square().mean()), 1e-300))
    return mean.mean() + keep * own, variance
