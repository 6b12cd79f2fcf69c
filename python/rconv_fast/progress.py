"""Progress of a long computation: nothing, the caller's own function, or a bar on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Callback = Callable[[Any], None]


@contextmanager
def progress_callback(progress: bool | Callback) -> Iterator[Callback]:
    """The function to call with each event while the computation runs."""
    if callable(progress):
        yield progress
    else:
        yield lambda _: None
