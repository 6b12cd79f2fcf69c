"""Progress of a long computation: nothing, the caller's own function, bars on a terminal, or a log line a layer."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Where an iteration in float64 ends at the latest.
_ROUNDING = 1e-15
LOGGER = logging.getLogger("rconv_fast")


@dataclass(frozen=True)
class Event:
    """One step of a running computation: the layer at work, what is done there, and how far it is."""

    layer: str
    stage: str
    iteration: int = 0
    total: int | None = None
    residual: float | None = None

    @property
    def share(self) -> float | None:
        """How much of the work is done, 0 to 1: of the iterations, else of the way of the residual to rounding."""
        if self.total:
            return min(self.iteration / self.total, 1.0)
        if self.residual is None:
            return None
        return min(max(math.log(max(self.residual, _ROUNDING)) / math.log(_ROUNDING), 0.0), 1.0)


Show = Callable[[Event], None]


class ProgressDisplay(AbstractContextManager["ProgressDisplay"]):
    """Show events as one bar a layer on standard error, with share, time left and residual; needs rich.

    Examples
    --------
    >>> with ProgressDisplay() as show:  # doctest: +SKIP
    ...     invert(model, gradients, (3, 32, 32), progress=show)
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskID,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[layer]}"),
            TextColumn("[dim]{task.fields[stage]}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[residual]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._running: str | None = None

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Update the line of the event's layer; the layer before it is done."""
        if event.layer != self._running:
            if self._running is not None:
                self._progress.update(self._tasks[self._running], total=1, completed=1)
            self._running = event.layer
        if event.layer not in self._tasks:
            self._tasks[event.layer] = self._progress.add_task(
                "", total=None, layer=event.layer, stage="", count="", residual=""
            )
        count = str(event.iteration) if event.total is None else f"{event.iteration}/{event.total}"
        self._progress.update(
            self._tasks[event.layer],
            completed=event.share or 0.0,
            total=None if event.share is None else 1.0,
            stage=event.stage,
            count=count if event.iteration else "",
            residual="" if event.residual is None else f"residual {event.residual:.1e}",
        )


class LogLines(AbstractContextManager["LogLines"]):
    """Log one line a layer, when it is done, as the logger ``rconv_fast`` at level INFO."""

    def __init__(self) -> None:
        self._last: Event | None = None
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._done()

    def __call__(self, event: Event) -> None:
        """Take an event in; the layer before it is done."""
        if self._last is None or event.layer != self._last.layer:
            self._done()
            self._since = time.perf_counter()
        self._last = event

    def _done(self) -> None:
        if self._last is None:
            return
        parts = [f"{self._last.layer}: {self._last.stage}"]
        parts += [f"{self._last.iteration} iterations"] if self._last.iteration else []
        parts += [] if self._last.residual is None else [f"residual {self._last.residual:.1e}"]
        LOGGER.info("%s, %.2f s", ", ".join(parts), time.perf_counter() - self._since)
        self._last = None


def display() -> ProgressDisplay | LogLines:
    """Bars where standard error is a terminal and rich is there, log lines else."""
    return ProgressDisplay() if sys.stderr.isatty() and find_spec("rich") else LogLines()


@contextmanager
def progress_callback(progress: bool | Callable[[Event], Any]) -> Iterator[Show]:
    """The function to call with each event while the computation runs."""
    if callable(progress):
        yield progress
    elif progress:
        with display() as show:
            yield show
    else:
        yield _ignore


def _ignore(event: Event) -> None:
    """Show nothing."""
    del event
