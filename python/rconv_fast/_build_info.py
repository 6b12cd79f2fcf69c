"""What this installation can do: version, build, libraries found, devices."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from rconv_fast.constraints import backends


def build_info() -> dict[str, Any]:
    """Return the version, how the binary was built, and what it found on this machine.

    Returns
    -------
    dict
        ``version``, ``python``, ``torch``; of the build ``compiled``, ``load_error`` (why not), ``openmp``,
        ``cuda``, ``cuda_toolkit``, ``cuda_architectures``; of the machine ``cupy`` (version or None),
        ``torch_cuda`` (version or None), ``threads`` and ``devices`` (names of the GPUs).
    """
    core = backends._core
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "version": version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiled": core is not None,
        "load_error": backends.load_error,
        "openmp": core is not None and core.has_openmp,
        "cuda": core is not None and core.has_cuda,
        "cuda_toolkit": core.cuda_toolkit if core is not None else "",
        "cuda_architectures": core.cuda_architectures if core is not None else "",
        "torch_cuda": torch.version.cuda,
        "cupy": next(filter(None, map(_version, ("cupy-cuda13x", "cupy-cuda12x", "cupy"))), None),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(index) for index in gpus],
    }


def version() -> str:
    """The installed package's version, which is its tag's."""
    return _version("rconv-fast") or "0.0.0 (source tree)"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
