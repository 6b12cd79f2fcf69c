"""The sparsest vectors of a column space: a sample has no gradient at the neurons that it leaves inactive (SPEAR)."""

from __future__ import annotations

import torch
from torch import Tensor

# Draws of rows at once, and the most directions kept of them.
DRAWS_AT_ONCE = 1 << 12
_KEPT = 512


def sparsest_basis(columns: Tensor, r: int) -> Tensor:
    """At most r independent columns, the sparsest first (greedy, which is optimal for a basis)."""
    order = (columns != 0).sum(0).argsort(stable=True)
    left = columns[:, order]
    chosen: list[int] = []
    for _ in range(r):
        size = left.norm(dim=0)
        independent = (size > 1e-6).nonzero()[:, 0]
        if len(independent) == 0:
            break
        i = int(independent[0])
        chosen.append(i)
        unit = left[:, i] / size[i]
        left = left - torch.outer(unit, unit @ left)
    basis: Tensor = columns[:, order[chosen]]
    return basis


def sparse_directions(rows: Tensor, r: int, zero: float, generator: torch.Generator) -> Tensor:
    """Null vectors of r - 1 drawn rows whose column has many more zeros than those rows, shape (r, m)."""
    n = rows.shape[0]
    if n < r + 2:
        return rows.new_zeros(r, 0)
    if r == 1:
        return rows.new_ones(1, 1)
    picked = torch.rand(DRAWS_AT_ONCE, n, generator=generator).topk(r - 1, dim=1).indices
    # the last column of a complete QR of the (r, r - 1) transposed rows spans their null space
    q = torch.linalg.qr(rows[picked.to(rows.device)].mT, mode="complete").Q[:, :, -1]
    columns = q @ rows.mT
    count = (columns.abs() <= zero * columns.abs().amax(1, keepdim=True)).sum(1)
    # r - 1 zeros by construction; a sample has about as many as there are neurons in which it is inactive
    best = count.topk(min(_KEPT, len(count))).indices
    directions: Tensor = q[best[count[best] >= max(r + 2, n // 10)]]
    return directions.mT
