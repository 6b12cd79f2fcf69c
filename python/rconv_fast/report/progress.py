"""A live display of what ``invert`` is doing, for terminals."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Event(Protocol):
    """One step of a running inversion."""

    @property
    def layer(self) -> str:
        """Name of the layer at work."""

    @property
    def stage(self) -> str:
        """What is done there, in a word or two."""

    @property
    def iteration(self) -> int:
        """Steps done in this stage."""

    @property
    def total(self) -> int | None:
        """Steps there will be at most, where that is known."""

    @property
    def residual(self) -> float | None:
        """Relative residual so far, where there is one."""


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
