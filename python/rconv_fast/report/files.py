"""Files of tensors and reports. Nothing here ever unpickles; what is written only its owner can read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rconv_fast.containers import open_container
from rconv_fast.errors import ArgumentError, require
from rconv_fast.report.payload import to_json

# What a run may leave in its folder; a folder with any of them holds an earlier run.
RUN_FILES = (
    "report.json",
    "report.html",
    "recovered.png",
    "comparison.png",
    "inputs.safetensors",
    "features.safetensors",
)
PRIVATE = 0o600


def load_tensors(path: Path, argument: str) -> Any:
    """Read the tensors in a safetensors file, an npz file, or a ``torch.save`` file, nested as they are there.

    The latter is read with ``weights_only=True``, which runs no code from the file; npz without pickles.

    Parameters
    ----------
    path : Path
        A name ending in ``.safetensors`` or ``.npz``, or any other for ``torch.load``.
    argument : str
        What the caller named the file, for the error messages.

    Returns
    -------
    mapping or list
        Names to tensors, or tensors in order (numpy names them ``arr_0``, ``arr_1``, ... then).
    """
    require(path.is_file(), "load_tensors", argument, "be a file", path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive.items())
            unnamed = [f"arr_{i}" for i in range(len(arrays))]
            return [arrays[name] for name in unnamed] if set(unnamed) == set(arrays) else arrays
        with warnings.catch_warnings():  # torch's remarks on a file's age, or on bytes that are no file of its own
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the libraries raise whatever the bytes lead them into
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        must = "be safetensors, npz or loadable with torch.load(weights_only=True)"
        raise ArgumentError(f"load_tensors: {argument} must {must}, got {path}: {reason}") from error
    opened = open_container(loaded)
    values = list(opened.values()) if isinstance(opened, Mapping) else opened
    holds_tensors = isinstance(values, list | tuple) and any(isinstance(v, Tensor) for v in values)
    must = "hold a mapping of names to tensors or a list of tensors"
    require(holds_tensors, "load_tensors", argument, must, f"{path}: {type(loaded).__name__}")
    return opened


def prepare_folder(path: Path, overwrite: bool) -> None:
    """Make the folder of a run; files of an earlier run in it are refused, or removed.

    Raises
    ------
    ArgumentError
        It cannot be made, or holds an earlier run and `overwrite` is False.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ArgumentError(f"rconv-fast: --out must be a folder that can be made, got {path}") from error
    earlier = [path / name for name in RUN_FILES if (path / name).exists()]
    must = "hold no earlier run (--overwrite removes it)"
    require(overwrite or not earlier, "rconv-fast", "--out", must, ", ".join(map(str, earlier[:1])))
    for file in earlier:
        file.unlink()


def write_private(path: Path, content: str | bytes) -> None:
    """Write a file that nobody but its owner can read, also where there was one before."""
    data = content.encode() if isinstance(content, str) else content
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, PRIVATE)
        file.write(data)


def save_tensors(path: Path, tensors: Mapping[str, Tensor | None]) -> None:
    """Write the tensors that are there as safetensors; an empty selection writes no file."""
    from safetensors.torch import save

    present = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if t is not None}
    if present:
        write_private(path, save(present))


def save_report(path: Path, payload: Mapping[str, Any]) -> None:
    """Write a payload as strict JSON."""
    write_private(path, to_json(payload))
