"""What a sweep says as one page: its averages as a table and a plot, and why cases failed."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rconv_fast.errors import MissingDependencyError
from rconv_fast.report.files import write_private
from rconv_fast.report.page import render
from rconv_fast.sweep.table import Row, aggregate


def save_page(rows: Sequence[Row], path: Path | str) -> None:
    """Write a self-contained page; without matplotlib it has no plot."""
    try:
        picture = base64.b64encode(plot(rows)).decode()
        shown = [{"title": "by setting", "uri": f"data:image/png;base64,{picture}"}] if rows else []
    except MissingDependencyError:
        shown = []
    payload = {
        "schema": "rconv_fast.sweep/1",
        "cases": len(rows),
        "verified": sum(row["verified"] for row in rows),
        "pictures": shown,
        "averages": aggregate(rows),
        "not_verified": reasons(rows),
    }
    write_private(Path(path), render("sweep", payload))


def reasons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Why cases are not verified, the most frequent first, with one of them each."""
    said = [(row["model"], row["defence"], row["error"] or row["reason"] or row["verdict"]) for row in rows]
    failed = [(why, row) for why, row in zip(said, rows, strict=True) if not row["verified"]]
    example = {why: row["images"] for why, row in reversed(failed)}
    return [
        {"cases": n, "model": why[0], "defence": why[1], "reason": why[2], "as with": example[why]}
        for why, n in Counter(why for why, _ in failed).most_common()
    ]


def plot(rows: Sequence[Row]) -> bytes:
    """Share of verified cases and median PSNR of every setting, one colour a model and attack; a PNG file."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('plots need matplotlib: pip install "rconv-fast[report]"') from error
    lines = aggregate(rows)
    settings = list(dict.fromkeys(_setting(line) for line in lines))
    figure = Figure(figsize=(10, 1.6 + 0.35 * len(settings)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for name in dict.fromkeys((line["model"], line["attack"]) for line in lines):
        own = [line for line in lines if (line["model"], line["attack"]) == name]
        places = [settings.index(_setting(line)) for line in own]
        for axes, column in zip(panels, ("verified", "median_psnr"), strict=True):
            axes.plot([line[column] for line in own], places, "o", label=", ".join(name), alpha=0.7)
    panels[0].set(xlabel="share verified", xlim=(-0.05, 1.05), yticks=range(len(settings)), yticklabels=settings)
    panels[0].invert_yaxis()
    panels[1].set(xlabel="median of the worst PSNR in dB")
    panels[1].legend(fontsize="small")
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=120)
    return written.getvalue()


def _setting(line: Row) -> str:
    return f"batch {line['batch_size']}, {line['defence']}, noise {line['noise']:g}"
