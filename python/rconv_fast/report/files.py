"""Files of tensors and reports. Nothing here ever unpickles."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rconv_fast.errors import ArgumentError, require

LAYER_FIELDS = ("name", "kind", "rows", "unknowns", "rank", "condition", "residual", "solver", "seconds")


def load_tensors(path: Path, argument: str) -> dict[str, Tensor] | list[Tensor]:
    """Read a mapping or a list of tensors from a safetensors file or a ``torch.save`` file.

    The latter is read with ``weights_only=True``, which runs no code from the file.

    Parameters
    ----------
    path : Path
        A name ending in ``.safetensors``, or any other for ``torch.load``.
    argument : str
        What the caller named the file, for the error messages.
    """
    require(path.is_file(), "load_tensors", argument, "be a file", path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the two libraries raise whatever the bytes lead them into
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        must = "be safetensors or loadable with torch.load(weights_only=True)"
        raise ArgumentError(f"load_tensors: {argument} must {must}, got {path}: {reason}") from error
    values = list(loaded.values()) if isinstance(loaded, Mapping) else loaded
    is_tensors = isinstance(values, list | tuple) and all(isinstance(v, Tensor) for v in values)
    must = "hold a mapping of names to tensors or a list of tensors"
    require(is_tensors, "load_tensors", argument, must, f"{path}: {type(loaded).__name__}")
    return dict(loaded) if isinstance(loaded, Mapping) else list(loaded)


def save_inputs(path: Path, inputs: Tensor, labels: Tensor | None) -> None:
    """Write ``inputs`` and, where they were found, ``labels`` as safetensors."""
    from safetensors.torch import save_file

    tensors = {"inputs": inputs.detach().cpu().contiguous()}
    if labels is not None:
        tensors["labels"] = labels.detach().cpu().contiguous()
    save_file(tensors, path)


def save_partial(path: Path, features: Mapping[str, Tensor], partial: Tensor | None) -> None:
    """Write what an interrupted inversion knew: recovered layer inputs, and the iterate it was at."""
    from safetensors.torch import save_file

    tensors = {f"input of {layer}": value.detach().cpu().contiguous().clone() for layer, value in features.items()}
    if partial is not None:
        tensors["iterate"] = partial.detach().cpu().contiguous()
    save_file(tensors, path)


def layer_rows(layers: Any) -> list[dict[str, Any]]:
    """Turn layer reports into plain dictionaries of `LAYER_FIELDS`."""
    return [{field: _plain(getattr(layer, field)) for field in LAYER_FIELDS} for layer in layers]


def save_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write strict JSON: NaN and infinities become null."""
    path.write_text(json.dumps(_plain(dict(report)), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
