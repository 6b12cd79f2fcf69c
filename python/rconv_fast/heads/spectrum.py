"""How many samples a gradient holds: the singular values above its rounding, or above the noise that they show."""

from __future__ import annotations

import torch
from torch import Tensor

# Singular values of noise alone: at least so many, half of them within this factor, this far below the others.
_TAIL_COUNT = 3
_TAIL_SPREAD = 30.0
_TAIL_GAP = 10.0
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


def noise_in_spectrum(singular_values: Tensor, shape: tuple[int, int], rank: int) -> tuple[int, float] | None:
    """Rank and standard deviation of an entry's noise, where the spectrum shows a gap above a flat tail.

    Parameters
    ----------
    singular_values : Tensor, shape (k,)
        In descending order, of a matrix of the given shape (n, d).
    rank : int
        The rank that rounding alone would explain: a tail of rounding is none of noise.

    Notes
    -----
    The tail of ``n x d`` noise beyond rank r has a squared Frobenius norm of ``sigma^2 (n - r) (d - r)``. The last
    value is left out: the columns of a softmax head's gradient sum to zero.
    """
    values = singular_values[: min(rank, len(singular_values) - 1)].tolist()
    best: tuple[float, int] | None = None
    for k in range(1, len(values) - _TAIL_COUNT + 1):
        gap = values[k - 1] / max(values[k], 1e-300)
        flat = values[k] <= _TAIL_SPREAD * values[(k + len(values)) // 2]
        if gap >= _TAIL_GAP and flat and (best is None or gap > best[0]):
            best = (gap, k)
    if best is None:
        return None
    k = best[1]
    n, d = shape
    tail = float(singular_values[k:].square().sum())
    return k, (tail / max(1, (n - k) * (d - k))) ** 0.5
