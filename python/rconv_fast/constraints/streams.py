"""torch streams and cupy streams, in one place; cupy is imported here and only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rconv_fast.errors import MissingDependencyError


def import_cupy(purpose: str) -> Any:
    """Return the cupy module, or raise ``MissingDependencyError`` with the command that installs it.

    Parameters
    ----------
    purpose : str
        What needs it, for the message: ``"to_cupy"``.
    """
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        extra = "cu12" if (torch.version.cuda or "").startswith("12") else "cu13"
        built = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch has no CUDA"
        raise MissingDependencyError(
            f'{purpose}: cupy must be installed, got none; pip install "rconv-fast[{extra}]" ({built})'
        ) from error


@contextmanager
def cupy_on_torch_stream(device: torch.device, purpose: str = "cupy_on_torch_stream") -> Iterator[Any]:
    """Run cupy code on torch's current stream of a device; yields the cupy module.

    Work enqueued by torch before, by cupy inside and by torch after keeps its order without synchronising.
    """
    cupy = import_cupy(purpose)
    stream = torch.cuda.current_stream(device)
    # ExternalStream only borrows: torch keeps the stream alive.
    with (
        cupy.cuda.Device(stream.device_index),
        cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index),
    ):
        yield cupy
