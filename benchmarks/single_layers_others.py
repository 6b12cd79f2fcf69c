"""Competitors on single convolutions: plain conjugate gradients, dense least squares by phases, LSMR of scipy and cupy.

The first is the obvious recipe: conjugate gradients on the normal equations, Jacobi-scaled, in float64, products by
``torch.nn.grad``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from builders import csr
from rconv_fast.constraints import ops
from rconv_fast.constraints.sparse import to_cupy
from rconv_fast.constraints.streams import cupy_on_torch_stream
from single_layers import Layer

# Iterations after which the plain recipe is stopped; it is reported as not converged.
PLAIN_ITERATIONS = 5000


def plain(given: Layer) -> tuple[Tensor, int]:
    """Jacobi-scaled conjugate gradients in float64 on both blocks, each scaled to mean column norm 1."""
    grad, weight, shape = given.grad_output, given.weight, given.x.shape
    options: dict[str, Any] = {"stride": given.stride, "padding": given.padding}
    mask = given.known.double()

    def normal(b: float, x: Tensor) -> Tensor:
        rows = torch.nn.grad.conv2d_weight(x, weight.shape, grad, **options)
        outputs = F.conv2d(x, weight, **options) * mask
        return b * adjoint(rows) + torch.nn.grad.conv2d_input(shape, weight, outputs, **options)

    def adjoint(rows: Tensor) -> Tensor:
        return torch.nn.grad.conv2d_input(shape, rows, grad, **options)

    ones = torch.ones_like(weight)
    diagonal_b = torch.nn.grad.conv2d_input(shape, ones, grad.square(), **options)
    diagonal_a = torch.nn.grad.conv2d_input(shape, weight.square(), mask, **options)
    b = float(diagonal_a.mean() / diagonal_b.mean())
    diagonal = b * diagonal_b + diagonal_a
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)  # black pixels that no equation meets
    right = b * adjoint(given.grad_weight)
    right = right + torch.nn.grad.conv2d_input(shape, weight, given.output * mask, **options)
    x = torch.zeros_like(given.x)
    r = right
    z = r * inverse
    p, gamma = z, float((r * z).sum())
    start, iteration = gamma, 0
    while gamma > 1e-28 * start and iteration < PLAIN_ITERATIONS:
        iteration += 1
        q = normal(b, p)
        alpha = gamma / float((p * q).sum())
        x, r = x + alpha * p, r - alpha * q
        z = r * inverse
        gamma, previous = float((r * z).sum()), gamma
        p = z + gamma / previous * p
    return x, iteration


def plain_direct(given: Layer) -> Tensor:
    """Dense least squares by stride phases, all channels as right-hand sides."""
    channels, side = given.x.shape[1], given.x.shape[2]
    kernel, s, p = given.weight.shape[2], given.stride, given.padding
    dw = given.grad_weight.movedim(1, 3)  # (F, k, k, C)
    padded = F.pad(given.grad_output[0], (side, side, side, side))
    x = torch.empty(side, side, channels, dtype=dw.dtype, device=dw.device)
    for ry in range(s):
        for rx in range(s):
            taps = [(a, b) for a in range((ry + p) % s, kernel, s) for b in range((rx + p) % s, kernel, s)]
            rows = []
            for a, b in taps:  # g at u = (i + p - k) / s for all i of the phase
                first_y, first_x = (ry + p - a) // s + side, (rx + p - b) // s + side
                n_y, n_x = len(range(ry, side, s)), len(range(rx, side, s))
                rows.append(padded[:, first_y : first_y + n_y, first_x : first_x + n_x].flatten(1))
            right = torch.cat([dw[:, a, b] for a, b in taps])
            solved = torch.linalg.lstsq(torch.cat(rows), right).solution
            x[ry::s, rx::s] = solved.view(len(range(ry, side, s)), len(range(rx, side, s)), channels)
    return x.movedim(2, 0)[None]


# Of the layers of a whole photo: where the gradient constraints alone do not suffice.
HYBRID_LAYERS = 2


def prototype(layers: list[Layer]) -> list[Any]:
    """The prototype's recipe, each layer from exact data: `plain` where it takes both systems, else `plain_direct`."""
    return [*map(plain, layers[:HYBRID_LAYERS]), *map(plain_direct, layers[HYBRID_LAYERS:])]


# --- Both systems as one sparse matrix --------------------------------------------------------------------


@dataclass
class Stacked:
    """Both systems of a layer as one sparse matrix with columns of norm 1; ``scale`` times its solution is x."""

    matrix: Tensor
    rhs: Tensor
    scale: Tensor


def stacked(given: Layer) -> Stacked:
    """Gradient rows of each channel over the weight rows of the known outputs, weighted as in `plain`."""
    channels, size = given.x.shape[1], given.x.shape[2:]
    sizes = {"stride": given.stride, "padding": given.padding}
    one = ops.gradient_constraints(given.grad_output, size, given.weight.shape[2:], **sizes)
    known = ops.weight_constraints(given.weight, size, mask=given.known[0], **sizes)
    weight = (column_squares(known).mean() / column_squares(one).mean()).sqrt()
    blocks = [moved(one, weight, c, channels) for c in range(channels)]
    matrix = stack([*blocks, known])
    norm = column_squares(matrix).sqrt()
    scale = torch.where(norm > 0, 1 / norm, 0.0)  # black pixels that no equation meets
    matrix.values().mul_(scale[matrix.col_indices()])
    rhs = torch.cat([weight * given.grad_weight.transpose(0, 1).flatten(), given.output[given.known]])
    return Stacked(matrix, rhs, scale)


def moved(matrix: Tensor, factor: Tensor, block: int, n_blocks: int) -> Tensor:
    """`factor` times a matrix, as the block of columns `block` of `n_blocks`."""
    n_cols = matrix.shape[1]
    col = matrix.col_indices() + block * n_cols
    return csr(matrix.crow_indices(), col, matrix.values() * factor, n_blocks * n_cols)


def stack(blocks: list[Tensor]) -> Tensor:
    """Blocks of rows, one below the other."""
    firsts = accumulate((b.values().numel() for b in blocks[:-1]), initial=0)
    ends = [b.crow_indices()[1:] + first for first, b in zip(firsts, blocks, strict=True)]
    crow = torch.cat([blocks[0].crow_indices()[:1], *ends])
    col, values = (torch.cat([f(b) for b in blocks]) for f in (Tensor.col_indices, Tensor.values))
    return csr(crow, col, values, blocks[0].shape[1])


def column_squares(matrix: Tensor) -> Tensor:
    """Squared norms of the columns."""
    squares = matrix.values().new_zeros(matrix.shape[1])
    return squares.index_add_(0, matrix.col_indices(), matrix.values().square())


def lsmr(linalg: Any, matrix: Any, rhs: Any) -> Any:
    """Run scipy's or cupy's LSMR (`linalg` is the module) to rounding, for at most as long as `plain`."""
    return linalg.lsmr(matrix, rhs, atol=1e-14, btol=1e-14, conlim=0.0, maxiter=PLAIN_ITERATIONS)[0]


def cupy_lsmr(given: Layer) -> Tensor:
    """LSMR of cupy; its matrix comes from our builders, which is in its favour."""
    system = stacked(given)
    with cupy_on_torch_stream(given.x.device, "plain cupy") as cupy:
        from cupyx.scipy.sparse import linalg

        found = lsmr(linalg, to_cupy(system.matrix), cupy.from_dlpack(system.rhs))
        return torch.from_dlpack(found) * system.scale
