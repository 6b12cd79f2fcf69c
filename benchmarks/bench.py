"""Timing one thing beside its competitors: what an entry is, and how it is measured."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.benchmark import Timer


@dataclass
class Entry:
    """One line of the benchmark.

    Attributes
    ----------
    name : str
        ``group/size``, what ``--filter`` looks at.
    setup : callable
        Makes the inputs, outside the clock; what it returns is passed to ``run`` and to the references.
    run : callable
        Ours. What it returns goes to ``record``.
    references : dict of str to callable
        The competitors, timed in the same way on the same inputs.
    n_bytes : callable, optional
        Bytes that ``run`` writes, from what it returned; for the rate in GB/s.
    record : callable, optional
        Further facts about what ``run`` returned, as a dict: psnr, iterations, errors.
    once : bool
        Run once and take the wall clock, for whole attacks of seconds to minutes.
    quick : bool
        Part of ``--quick``, the smoke test.
    """

    name: str
    setup: Callable[[], Any]
    run: Callable[[Any], Any]
    references: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    n_bytes: Callable[[Any], int] | None = None
    record: Callable[[Any], dict[str, Any]] | None = None
    once: bool = False
    quick: bool = False


@dataclass
class Timing:
    """Seconds of one callable: median and interquartile range of `n` measurements, or why there are none."""

    median: float | None
    iqr: float | None
    n: int
    error: str | None = None


def measure(function: Callable[[Any], Any], inputs: Any, *, once: bool, min_run_time: float) -> Timing:
    """Time one callable after a warm-up; an exception becomes the timing's ``error``, not a missing line."""
    try:
        if once:
            start = time.perf_counter()
            function(inputs)
            _wait()
            return Timing(time.perf_counter() - start, 0.0, 1)
        function(inputs)
        timer = Timer(
            "function(inputs)",
            globals={"function": function, "inputs": inputs},
            num_threads=torch.get_num_threads(),
        )
        measurement = timer.blocked_autorange(min_run_time=min_run_time)
        return Timing(measurement.median, measurement.iqr, len(measurement.times))
    except Exception:
        return _failed()


def _failed() -> Timing:
    return Timing(None, None, 0, traceback.format_exc(limit=1).strip().splitlines()[-1])


def run_entry(entry: Entry, *, min_run_time: float) -> dict[str, Any]:
    """Measure an entry and all its references; the result is ready for JSON, also where the entry failed."""
    try:
        return _run_entry(entry, min_run_time=min_run_time)
    except Exception:  # the set-up, or the record
        return {"name": entry.name, "ours": asdict(_failed()), "references": {}}


def _run_entry(entry: Entry, *, min_run_time: float) -> dict[str, Any]:
    inputs = entry.setup()
    kept: list[Any] = []  # a long run is not repeated for its record

    def run(given: Any) -> None:
        kept[:] = [entry.run(given)]

    ours = measure(run if entry.once else entry.run, inputs, once=entry.once, min_run_time=min_run_time)
    result: dict[str, Any] = {"name": entry.name, "ours": asdict(ours), "references": {}}
    if ours.median is not None and (entry.n_bytes or entry.record):
        returned = kept[0] if kept else entry.run(inputs)
        if entry.n_bytes:
            result["bytes"] = entry.n_bytes(returned)
            result["gb_per_s"] = result["bytes"] / ours.median / 1e9
        if entry.record:
            result["record"] = entry.record(returned)
        del returned
    for name, reference in entry.references.items():
        theirs = measure(reference, inputs, once=entry.once, min_run_time=min_run_time)
        result["references"][name] = asdict(theirs)
        if ours.median and theirs.median:
            result["references"][name]["ratio"] = theirs.median / ours.median
    return result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
