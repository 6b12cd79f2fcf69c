"""A sweep's table: its columns, its Parquet files, and what they say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rconv_fast.errors import MissingDependencyError

Row = dict[str, Any]

EMPTY: Row = {
    "key": "",
    "model": "",
    "images": "",
    "first": 0,
    "batch_size": 0,
    "defence": "",
    "noise": 0.0,
    "attack": "",
    "dtype": "",
    "input_shape": "",
    "seed": 0,
    "verdict": "",
    "verified": False,
    "psnr": math.nan,
    "worst_psnr": math.nan,
    "seconds": math.nan,
    "gradient_residual": math.nan,
    "noise_ratio": math.nan,
    "stops_at": "",
    "reason": "",
    "error": "",
}
"""The columns, each with what it holds where nothing was measured."""


def pyarrow_parquet() -> Any:
    """``pyarrow`` with its Parquet module loaded."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        must = 'a sweep needs pyarrow: pip install "rconv-fast[sweep]"'
        raise MissingDependencyError(f"{must}, got {error}") from error
    return pyarrow


def read_rows(table: Path) -> list[Row]:
    """The rows of a table, none where there is no file."""
    if not table.exists():
        return []
    rows: list[Row] = pyarrow_parquet().parquet.read_table(table).to_pylist()
    return rows


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Under another name first: a file with the right name is complete."""
    arrow = pyarrow_parquet()
    kinds = {str: arrow.string(), int: arrow.int64(), bool: arrow.bool_(), float: arrow.float64()}
    schema = arrow.schema([(name, kinds[type(value)]) for name, value in EMPTY.items()])
    unfinished = path.with_name(path.name + ".tmp")
    arrow.parquet.write_table(arrow.Table.from_pylist(list(rows), schema), unfinished)
    unfinished.replace(path)


def aggregate(rows: Iterable[Row]) -> list[Row]:
    """One line for each model, attack, batch size, defence and noise: cases, shares, medians."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in GROUP), []).append(row)
    return [dict(zip(GROUP, key, strict=True)) | _aggregated(group) for key, group in sorted(groups.items())]


GROUP = ("model", "attack", "batch_size", "defence", "noise")


def _aggregated(rows: Sequence[Row]) -> Row:
    finite = {name: [r[name] for r in rows if math.isfinite(r[name])] for name in ("worst_psnr", "seconds")}
    return {
        "cases": len(rows),
        "verified": sum(r["verified"] for r in rows) / len(rows),
        "with_inputs": len(finite["worst_psnr"]) / len(rows),
        "median_psnr": statistics.median(finite["worst_psnr"]) if finite["worst_psnr"] else math.nan,
        "least_psnr": min(finite["worst_psnr"], default=math.nan),
        "median_seconds": statistics.median(finite["seconds"]) if finite["seconds"] else math.nan,
        "errors": sum(bool(r["error"]) for r in rows),
    }


def to_markdown(rows: Iterable[Row]) -> str:
    """The aggregated table as Markdown."""
    lines = aggregate(rows)
    header = list(lines[0]) if lines else [*GROUP]
    shown = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in line.values()] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *shown])
