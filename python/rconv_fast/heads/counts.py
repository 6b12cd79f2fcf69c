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
# Rounds in which class means and label counts are found from one another.
_ROUNDS = 20


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

    ``K db_i = sum_j k_j (p_ji - [i = j])`` with ``p_j`` the softmax of class j's mean features. The mean of all
    features is the slope of ``dW = db xbar^T``; a class differs from it by
    ``k_y (xbar_y - xbar) = -K (dW_y - db_y xbar)``, as far as the softmax hardly varies. Counts and means are found
    from one another; the nearest whole counts of sum B are the answer.

    Parameters
    ----------
    head : Head
        With a bias gradient and a known scale.
    batch_size : int
        B.

    References
    ----------
    iLRG: Ma et al., arXiv 2208.11319, section 4.
    """
    db, n = head.grad_bias, head.n_classes
    if db is None or head.scale is None or head.loss.class_weights is not None or not bool(db.any()):
        return None
    total = float(batch_size) if head.loss.reduction == "mean" else 1.0
    unit = head.scale / total
    smoothing = head.loss.label_smoothing
    mean = head.grad_weight.mT @ db / (db @ db)
    excess = (head.grad_weight - torch.outer(db, mean)) / unit  # -k_y (xbar_y - xbar)
    softmax = torch.softmax(head.logits(mean), 0)
    counts = softmax.new_zeros(n)
    for _ in range(_ROUNDS):
        before = counts
        # db / w = B softmax - (1 - e) k - e B / n
        counts = (batch_size * (softmax - smoothing / n) - db / unit) / (1 - smoothing)
        counts = counts.clamp_min(0)
        counts = counts * (batch_size / counts.sum())
        means = mean - excess / counts.clamp_min(0.5)[:, None]
        softmax = (counts[:, None] * torch.softmax(head.logits(means), 1)).sum(0) / batch_size
        if bool((counts - before).abs().max() < 1e-6):
            break
    lower = lower_counts(db, unit, n) if smoothing == 0 else torch.zeros(n, dtype=torch.int64)
    nearest = next(count_hypotheses(counts.cpu(), lower, batch_size, 1))
    return torch.tensor(nearest, device=db.device)
