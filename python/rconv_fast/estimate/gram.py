"""Sums of ``A^T M A`` of many small M, as few large products."""

from __future__ import annotations

import torch
from torch import Tensor

from rconv_fast.geometry import ConvGeometry

# Rows of the parts in which Y^T Y is summed.
PANEL = 2048


class Gram:
    """``sum A^T M A`` of many small M, gathered into few large products."""

    def __init__(self, n: int, like: Tensor) -> None:
        self._total = like.new_zeros(n, n)
        self._rows: list[Tensor] = []
        self._width = 0

    def add(self, block: Tensor, tangent: Tensor | None, channel: int, batch: int, geometry: ConvGeometry) -> None:
        """One channel's ``A^T M A``; no tangent: A is the identity."""
        size = geometry.n_input
        start = torch.arange(batch, device=block.device)[:, None] * geometry.in_channels * size + channel * size
        places = (start + torch.arange(size, device=block.device)).flatten()
        if tangent is None:
            self._total[places[:, None], places] += block
            return
        a = tangent[places]
        live = a.any(dim=1) & (block.diagonal() > 0)
        if not bool(live.any()):
            return
        self._rows.append(_root(block[live][:, live]).mT @ a[live])
        self._width += int(live.sum())
        if self._width > PANEL:
            self._flush()

    def add_single(self, blocks: Tensor, tangent: Tensor | None) -> None:
        """The same for all channels (C, B, B) of an input with one position."""
        channels, batch = blocks.shape[:2]
        if tangent is None:
            tangent = torch.eye(len(self._total), dtype=blocks.dtype, device=blocks.device)
        a = tangent.reshape(batch, channels, -1)
        live = a.any(dim=2).any(dim=0) & (blocks.diagonal(dim1=1, dim2=2).sum(1) > 0)
        if not bool(live.any()):
            return
        values, vectors = torch.linalg.eigh(blocks[live])
        roots = vectors * values.clamp_min(0).sqrt()[:, None]
        self._rows.append(torch.einsum("bcn,cbe->cen", a[:, live], roots).flatten(0, 1))
        self._flush()

    def total(self) -> Tensor:
        """The sum."""
        self._flush()
        return self._total

    def _flush(self) -> None:
        if self._rows:
            y = torch.cat(self._rows)
            self._total += own_product(y)
        self._rows, self._width = [], 0


def own_product(y: Tensor) -> Tensor:
    """``y^T y``: the lower triangle, mirrored."""
    n = y.shape[1]
    product = y.new_empty(n, n)
    step = max(1, -(-n // 8))
    for low in range(0, n, step):
        high = min(low + step, n)
        strip = y[:, low:high].mT @ y[:, :high]
        product[low:high, :high] = strip
        product[:low, low:high] = strip[:, :low].mT
    return product


def _root(block: Tensor) -> Tensor:
    """L with ``L L^T = block``, which may be singular."""
    shift = torch.finfo(block.dtype).eps * 16 * len(block) * float(block.diagonal().mean())
    for power in range(6):
        factor, failed = torch.linalg.cholesky_ex(block + 10**power * shift * torch.eye(len(block)).to(block))
        if not bool(failed):
            root: Tensor = factor
            return root
    values, vectors = torch.linalg.eigh(block)
    root = vectors * values.clamp_min(0).sqrt()
    return root
