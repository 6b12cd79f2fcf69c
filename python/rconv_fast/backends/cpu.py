"""Launching a kernel on the CPU: on as many threads as torch itself uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Callable[..., None], tensor: Tensor, *arguments: Any) -> None:  # noqa: ARG001 (as in cuda)
    """Run `kernel` on torch's number of threads."""
    kernel(*arguments, torch.get_num_threads())
