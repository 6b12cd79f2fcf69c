"""Progress of a long computation: nothing, the caller's own function, or a live display on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Event:
    """One step of a running inversion: the layer at work, what is done there, and how far it is."""

    layer: str
    stage: str
    iteration: int = 0
    total: int | None = None
    residual: float | None = None


class ProgressDisplay:
    """Show events as one line a layer on standard error; silent when that is not a terminal.

    Examples
    --------
    >>> with ProgressDisplay() as show:  # doctest: +SKIP
    ...     invert(model, gradients, (3, 32, 32), progress=show)
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[layer]}"),
            TextColumn("[dim]{task.fields[stage]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[residual]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._running: str | None = None

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            completed=event.iteration,
            total=event.total,
            stage=event.stage,
            count=count if event.iteration else "",
            residual="" if event.residual is None else f"residual {event.residual:.1e}",
        )


@contextmanager
def progress_callback(progress: bool | Callable[[Event], None]) -> Iterator[Callable[[Event], None]]:
    """The function to call with each event while the computation runs."""
    if callable(progress):
        yield progress
    elif progress:
        with ProgressDisplay() as show:
            yield show
    else:
        yield _ignore


def _ignore(event: Event) -> None:
    """Show nothing."""
    del event
