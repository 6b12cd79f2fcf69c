"""Results as text: one line of verdict, a line a layer, the notes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rconv_fast.report.payload import present

if TYPE_CHECKING:
    from rconv_fast.result import Inversion

LAYER_COLUMNS = ("layer", "kind", "rows", "unknowns", "rank", "cond", "residual", "seconds", "proof", "solver")
SAMPLE_COLUMNS = ("label", "status", "error", "certificate", "times")
MAX_LISTED = 20


def summarise(inversion: Inversion) -> str:
    """An `Inversion` as text."""
    lines = [headline(inversion)]
    if inversion.layers:
        lines += table(LAYER_COLUMNS, layer_cells(inversion))
    if len(inversion.samples) > 1 or any(sample.status != "exact" for sample in inversion.samples):
        lines += table(SAMPLE_COLUMNS, sample_cells(inversion))
    return "\n".join(lines + details(inversion))


def details(inversion: Inversion) -> list[str]:
    """Where it stopped and why, what else is known, the notes: a line each."""
    lines = []
    if inversion.stops_at is not None:
        lines.append(f"stops at {inversion.stops_at}: {inversion.reason}")
    if inversion.features and inversion.inputs is None:
        known = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inversion.features.items())
        lines.append(f"recovered up to there, the inputs of: {known}")
    if inversion.tokens is not None:
        lines.append(f"token ids in the batch: {listed(inversion.tokens)}")
    return lines + [f"note: {note}" for note in inversion.notes]


def headline(inversion: Inversion) -> str:
    """The verdict and what it is about, in one line."""
    said = inversion.verdict + (", verified" if inversion.verified else ", NOT verified")
    size = inversion.batch_size if inversion.inputs is None else len(inversion.inputs)
    parts = [f"{'unknown number of' if size is None else size} sample(s)"]
    if inversion.labels is not None:
        parts.append(f"labels {listed(inversion.labels)}")
    elif inversion.label_counts is not None:
        known = ", ".join(f"{label}: {n}" for label, n in present(inversion.label_counts).items())
        parts.append(f"label counts {known}")
    if inversion.inputs is None:
        return f"{', '.join(parts)}: {said}, no inputs"
    parts[-1] += f": {said}"
    parts.append(f"gradient residual {number(inversion.gradient_residual)}")
    if math.isfinite(inversion.noise_ratio):
        parts.append(f"{number(inversion.noise_ratio)} times the noise")
    if inversion.determined is not None:
        parts.append(f"{float(inversion.determined.double().mean()):.1%} of the values determined")
    return ", ".join(parts)


def layer_cells(inversion: Inversion) -> list[tuple[str, ...]]:
    """One row a layer, of `LAYER_COLUMNS`."""
    return [
        (
            layer.name,
            layer.kind,
            str(layer.rows),
            str(layer.unknowns),
            str(layer.rank),
            number(layer.condition),
            number(layer.residual),
            f"{layer.seconds:.3f}",
            layer.proof,
            layer.solver + (f" ({layer.patterns})" if layer.patterns else ""),
        )
        for layer in inversion.layers
    ]


def sample_cells(inversion: Inversion) -> list[tuple[str, ...]]:
    """One row a sample, of `SAMPLE_COLUMNS`."""
    return [
        (str(s.label), s.status, number(s.error), number(s.certificate), str(s.multiplicity)) for s in inversion.samples
    ]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns: numbers to the right, words to the left."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    return [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in (columns, *rows)
    ]


def number(value: Any) -> str:
    """A number as it is read best: few digits, "-" for none and for NaN."""
    if value is None or value != value:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2g}"


def listed(values: Tensor) -> str:
    """A tensor's entries; of long ones the first."""
    entries = values.tolist()
    rest = len(entries) - MAX_LISTED
    return str(entries) if rest <= 0 else f"{str(entries[:MAX_LISTED])[:-1]}, ... {rest} more]"


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text[:1] == "-" or text in ("inf", "nan")
