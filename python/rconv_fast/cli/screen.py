"""What a command prints: the verdict in one line, a table that fits the terminal, where the files are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rconv_fast.report import text
from rconv_fast.result import Inversion

# What goes first where the terminal is too narrow for all columns.
DISPENSABLE = ("cond", "rank", "proof", "residual", "kind", "seconds", "rows")
COLOURS = {"exact": "green", "approximate": "yellow", "partial": "yellow", "features": "yellow", "nothing": "red"}


def print_inversion(inversion: Inversion, seconds: float, said: str, files: Sequence[Path]) -> None:
    """An inversion: its table, its verdict with the labels, `said` about it, its notes, its files."""
    console = _console()
    if inversion.layers:
        print_table(console, text.LAYER_COLUMNS, text.layer_cells(inversion))
        console.print()
    if len(inversion.samples) > 1:
        print_table(console, text.SAMPLE_COLUMNS, text.sample_cells(inversion)[: text.MAX_LISTED])
        console.print()
    console.print(Text(text.headline(inversion), style=COLOURS.get(inversion.verdict, "")))
    for line in text.details(inversion):
        console.print(Text(line))
    console.print(Text(f"{said}{', ' if said else ''}{seconds:.2f} s"))
    print_files(files)


def print_files(files: Sequence[Path]) -> None:
    """Where to look."""
    for file in files:
        _console().print(Text(f"  {file}"))


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, as wide as the terminal allows."""
    print_table(_console(), columns, rows)


def print_line(line: str, style: str = "") -> None:
    """One line of text."""
    _console().print(Text(line, style=style))


def print_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; on a terminal the dispensable ones are left out until a line fits."""
    names, cells = list(columns), [list(row) for row in rows]
    waiting = [name for name in DISPENSABLE if name in names]
    while console.is_terminal and waiting and max(map(len, text.table(names, cells))) > console.width:
        i = names.index(waiting.pop(0))
        names, cells = names[:i] + names[i + 1 :], [row[:i] + row[i + 1 :] for row in cells]
    head, *lines = text.table(names, cells)
    console.print(Text(head, style="dim"))
    for line in lines:
        console.print(Text(line))


def as_text(value: Any) -> str:
    """Settings as words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k} {as_text(v)}" for k, v in value.items()) or "none"
    return "none" if value is None else str(value) or "none"


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)
