"""Results as plain values: what report.json holds and the page shows. Each kind has a schema with a version."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
import torch
from torch import Tensor

from rconv_fast.errors import require

if TYPE_CHECKING:
    from rconv_fast.result import Inversion

INVERSION_SCHEMA = "rconv_fast.inversion/1"
# Where each kind is described.
SCHEMAS = {
    "rconv_fast.audit/1": "audit-1.json",
    "rconv_fast.check/1": "check-1.json",
    INVERSION_SCHEMA: "inversion-1.json",
}
LAYER_FIELDS = (
    "name",
    "kind",
    "rows",
    "unknowns",
    "rank",
    "condition",
    "residual",
    "solver",
    "proof",
    "seconds",
    "patterns",
)


def of_inversion(inversion: Inversion) -> dict[str, Any]:
    """Everything an `Inversion` says but for the values themselves: of inputs and features the shapes."""
    determined, deviation = inversion.determined, inversion.uncertainty
    known = None if deviation is None else deviation[deviation.isfinite()].double()
    return {
        "schema": INVERSION_SCHEMA,
        "verdict": inversion.verdict,
        "verified": inversion.verified,
        "batch_size": inversion.batch_size,
        "labels": inversion.labels,
        "label_counts": None if inversion.label_counts is None else present(inversion.label_counts),
        "shape": shape_of(inversion.inputs),
        "determined": None if determined is None else float(determined.double().mean()),
        "predicted_error": None if known is None or not len(known) else float(known.square().mean().sqrt()),
        "gradient_residual": inversion.gradient_residual,
        "noise_ratio": inversion.noise_ratio,
        "scale": inversion.scale,
        "stops_at": inversion.stops_at,
        "reason": inversion.reason,
        "notes": list(inversion.notes),
        "samples": [asdict(sample) for sample in inversion.samples],
        "layers": [{field: getattr(layer, field) for field in LAYER_FIELDS} for layer in inversion.layers],
        "features": {name: shape_of(value) for name, value in inversion.features.items()},
        "tokens": inversion.tokens,
    }


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a kind of report, by what its ``"schema"`` says.

    Examples
    --------
    >>> schema_of("rconv_fast.audit/1")["properties"]["verdict"]["enum"]
    ['exact', 'partial', 'features only', 'none found', 'not covered']
    """
    must = f"be one of {', '.join(SCHEMAS)}"
    require(name in SCHEMAS, "schema_of", "name", must, name)
    path = resources.files("rconv_fast.report") / "schemas" / SCHEMAS[name]
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema


def present(label_counts: Tensor) -> dict[str, int]:
    """How many samples each class has, of the classes that occur."""
    return {str(label): int(n) for label, n in enumerate(label_counts.tolist()) if n}


def environment() -> dict[str, str]:
    """Versions of what computed."""
    from rconv_fast import __version__

    return {
        "rconv_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: the same tensors give the same digest, whatever file they came in.

    Examples
    --------
    >>> a, b = torch.zeros(2), torch.ones(3)
    >>> digest({"a": a, "b": b}) == digest({"b": b, "a": a.clone()}) != digest({"a": a.double(), "b": b})
    True
    """
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def to_json(payload: Mapping[str, Any]) -> str:
    """Strict JSON: NaN and infinities become null, tensors lists."""
    return json.dumps(plain(payload), indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """The same in types that JSON has; anything unknown as text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return value.name if isinstance(value, Path) else str(value)


def shape_of(tensor: Tensor | None) -> list[int] | None:
    """Its sizes, None for none."""
    return None if tensor is None else list(tensor.shape)
