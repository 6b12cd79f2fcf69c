"""Products of a convolution's equations in bfloat16, where the processor has them: four times as fast as in float32.

They keep 8 bits, which costs an iteration hardly a step as long as the residual is computed anew, more exactly, each
time it has fallen by a factor of ten: the answer is as exact as those residuals are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.phases.gram import sum_of
from rconv_fast.solve.rows import System

# Channels, and filters and outputs, from which the conversions are nothing beside the products.
MIN_CHANNELS, MIN_FILTERS = 32, 64


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 itself; older versions of torch do not tell."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def pays(geometry: ConvGeometry) -> bool:
    """Whether a convolution is so large that the products outweigh the conversions."""
    few = min(geometry.out_channels, geometry.n_output) < MIN_FILTERS
    return geometry.ndim == 2 and geometry.groups == 1 and geometry.in_channels >= MIN_CHANNELS and not few


@dataclass(frozen=True)
class RoundedSystem:
    """The products of a system in bfloat16; vectors are float32.

    Attributes
    ----------
    exact : System
        In float32: for residuals.
    rounded : System
        In bfloat16.
    """

    exact: System
    rounded: System

    @classmethod
    def create(cls, system: System) -> RoundedSystem:
        """Round what does not change."""
        return cls(system.to(torch.float32), system.to(torch.bfloat16))

    @property
    def rhs(self) -> list[Tensor]:
        """Right-hand sides in float32."""
        return self.exact.rhs

    def rows(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Parts of a residual in float32."""
        return self.exact.rows(parts)

    def apply(self, x: Tensor) -> list[Tensor]:
        """``M x``."""
        return [part.float() for part in self.rounded.apply(x.bfloat16())]

    def adjoint(self, y: list[Tensor]) -> Tensor:
        """``M^T y``, restricted to the support."""
        blocks = zip(self.rounded.blocks, y, strict=True)
        total = sum_of(block.adjoint(part.bfloat16()).float() for block, part in blocks)
        return total if self.exact.support is None else total * self.exact.support
