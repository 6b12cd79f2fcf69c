"""How many samples a gradient holds: the singular values above its rounding, or above its noise."""

from __future__ import annotations

import torch
from torch import Tensor

# Column sums of a softmax head's gradient above so many roundings are noise.
_SUM_ROUNDINGS = 100.0
# Below this share of the gradient they hardly matter.
_LEAST_SHARE = 1e-8
# Noise fills this share of the rank that there can be: not all, where coarse rounding makes rows alike.
_FULL = 0.9
# A matrix with more rows is first projected on a random range of so many dimensions, which hold most batches.
_RANGE_FROM = 256
_RANGE = 128


def singular_triplets(matrix: Tensor, rounding: float) -> tuple[Tensor, Tensor, Tensor]:
    """``U, S, V^T``; only the leading ones where the rest is less than the rounding.

    References
    ----------
    Halko, Martinsson and Tropp, SIAM Review 53(2), 2011, algorithms 4.4 and 5.1.
    """
    if min(matrix.shape) > _RANGE_FROM:
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(matrix.shape[1], _RANGE, generator=generator, dtype=torch.float64).to(matrix)
        basis = torch.linalg.qr(matrix @ draws).Q
        basis = torch.linalg.qr(matrix @ (matrix.mT @ basis)).Q
        inside = basis.mT @ matrix
        if (matrix - basis @ inside).norm() <= rounding * max(matrix.shape) ** 0.5 * matrix.norm():
            u, s, vh = torch.linalg.svd(inside, full_matrices=False)
            return basis @ u, s, vh
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def numerical_rank(singular_values: Tensor, shape: tuple[int, int], rounding: float) -> int:
    """Count the singular values above the noise: the widest gap near the level that rounding explains."""
    values = (singular_values / singular_values[0]).tolist()
    floor = rounding * max(shape) ** 0.5
    low, high = floor / 100, min(floor * 300, 0.1)
    tiny = rounding * 1e-3
    candidates = [k for k in range(1, len(values)) if values[k] <= high and values[k - 1] >= low]
    if not candidates:
        return sum(v > floor for v in values)
    return max(candidates, key=lambda k: values[k - 1] / max(values[k], tiny))


def noisy_rank(singular_values: Tensor, edge: float) -> int:
    """Count the singular values above the largest one that noise of known size has."""
    return max(1, int((singular_values > edge).sum()))


def noise_in_sums(grad_weight: Tensor, singular_values: Tensor, rounding: float) -> float | None:
    """Standard deviation of an entry's noise, from the column sums of a softmax head's gradient; None if there is none.

    A softmax and its target both sum to 1, so the columns of ``dW`` sum to 0, and noise of n entries to
    ``sigma sqrt(n)``: an estimate that no sample has a part in. Noise also leaves no gap in the spectrum, which tells
    it from the rounding of a nearly certain softmax. Rows and columns of zeros (dead features) are left out.
    """
    alive = grad_weight != 0
    rows, columns = int(alive.any(1).sum()), int(alive.any(0).sum())
    rank = numerical_rank(singular_values, (len(grad_weight), grad_weight.shape[1]), rounding)
    level = float(grad_weight.sum(0).norm())
    least = max(_SUM_ROUNDINGS * rounding, _LEAST_SHARE) * float(grad_weight.norm())
    if rank < _FULL * min(rows, columns) or level <= least:
        return None
    return float(level / (len(grad_weight) * columns) ** 0.5)
