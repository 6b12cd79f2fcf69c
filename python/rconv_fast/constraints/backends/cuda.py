"""Memory and launches on the GPU: torch's allocator, the tensor's device and torch's current stream there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def empty(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for `n` elements, to be written."""
    return torch.empty(n, dtype=dtype, device=device)


def launch(kernel: Callable[..., None], tensor: Tensor, *arguments: Any) -> None:
    """Enqueue `kernel` on the current stream of the tensor's device; does not wait for it."""
    with torch.cuda.device(tensor.device):
        kernel(*arguments, torch.cuda.current_stream(tensor.device).cuda_stream)
