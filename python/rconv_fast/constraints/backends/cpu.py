"""Memory and launches on the CPU: huge pages for large arrays, as many threads as torch itself uses."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

# Below this size malloc reuses its heap, whose pages are there already.
FRESH_BYTES = 2**25
HUGE_PAGE = 2**21


def empty(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for `n` elements, to be written.

    Fresh memory costs a page fault per 4 KiB, which takes longer than writing it. torch's allocator asks for no
    larger pages; with a map of its own, Linux aligns a large array to pages of 2 MiB.
    """
    size = n * dtype.itemsize
    if size < FRESH_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(n, dtype=dtype, device=device)
    whole_pages = -(-size // HUGE_PAGE) * HUGE_PAGE
    memory = mmap.mmap(-1, whole_pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages: slower, nothing else
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=n)


def launch(kernel: Callable[..., None], tensor: Tensor, *arguments: Any) -> None:  # noqa: ARG001 (as in cuda)
    """Run `kernel` on torch's number of threads."""
    kernel(*arguments, torch.get_num_threads())
