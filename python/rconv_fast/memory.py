"""How much memory a device can still give, asked before anything large is taken."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rconv_fast.errors import SystemTooLargeError

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
MEMORY_INFO = Path("/proc/meminfo")


def available_bytes(device: torch.device) -> int:
    """Memory that an allocation on `device` may still take: the smaller of the machine's and the container's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_machine_bytes(), _container_bytes())


def require_memory(function: str, what: str, need: int, device: torch.device) -> None:
    """Raise ``SystemTooLargeError`` with both numbers if `need` bytes are not to be had."""
    limit = available_bytes(device)
    if need > limit:
        raise SystemTooLargeError(
            f"{function}: {what} must fit in {limit / 2**20:.0f} MiB of free memory, got {need / 2**20:.0f} MiB"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch raises its own type on a GPU, on a CPU a ``RuntimeError`` with a text."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


# glibc takes blocks up to the largest it has seen freed, at most 32 MiB, from a heap of which it keeps twice as much.
LARGEST_KEPT = (32 << 20) - (64 << 10)


def keep_freed_pages() -> None:
    """Free one large block, untouched: from then on glibc keeps the pages of smaller ones, as after any large solve.

    Else each small inversion gives its 18 MB back to the system and gets them again page by page, an eighth of its
    time.
    """
    torch.empty(LARGEST_KEPT, dtype=torch.uint8)


def _machine_bytes() -> int:
    if MEMORY_INFO.exists():
        for line in MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_bytes() -> int:
    try:
        limit = CGROUP_LIMIT.read_text().strip()
        return int(limit) - int(CGROUP_USED.read_text()) if limit != "max" else 2**63 - 1
    except (OSError, ValueError):  # no cgroup v2
        return 2**63 - 1
