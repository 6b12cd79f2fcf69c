"""Timing one thing beside its competitors: what an entry is, and how it is measured."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

Clock = Callable[[], float]
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Target:
    """Where and in which precision a suite runs."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float64

    @property
    def name(self) -> str:
        """As in ``cpu-float64``, the last part of an entry's name."""
        return f"{self.device}-{str(self.dtype).removeprefix('torch.')}"


@dataclass
class Entry:
    """One line of the benchmark.

    Attributes
    ----------
    name : str
        ``suite/what/size/device-dtype``, what ``--filter`` looks at.
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
    long : bool
        Takes minutes; run with ``--long`` only.
    on_cpu : bool
        Stands beside the same on the CPU where it runs on another device.
    """

    name: str
    setup: Callable[[], Any]
    run: Callable[[Any], Any]
    references: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    n_bytes: Callable[[Any], int] | None = None
    record: Callable[[Any], dict[str, Any]] | None = None
    once: bool = False
    quick: bool = False
    long: bool = False
    on_cpu: bool = False


@dataclass
class Rate:
    """One line about many cases of one kind: how many succeed, how well, how fast, and which do not.

    Attributes
    ----------
    name : str
        As an entry's.
    cases : dict of str to callable
        Each makes its inputs, outside the clock; the names are those of the failures.
    run : callable
        Ours, run once a case.
    judge : callable
        What it returned, as an `Outcome`.
    quick, long : bool
        As an entry's.
    alone : bool
        Each case has a process of its own, whose peak memory is measured.
    """

    name: str
    cases: dict[str, Callable[[], Any]]
    run: Callable[[Any], Any]
    judge: Callable[[Any], Outcome]
    quick: bool = False
    long: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """Whether a case succeeded, how near it came, if it failed one phrase why, and whether the answer was proven.

    `rows` are the equations for each unknown of the layer that has least of them, `iterations` those of a single layer.
    """

    success: bool
    psnr: float
    why: str = ""
    verified: bool = False
    rows: float | None = None
    iterations: int | None = None


@dataclass(frozen=True)
class Finished:
    """A case that was run: seconds (None where it raised), how it came out, peak of its own process in MiB."""

    seconds: float | None
    outcome: Outcome
    peak: float | None = None


@dataclass
class Timing:
    """Seconds of one callable: median and interquartile range of `n` measurements, or why there are none."""

    median: float | None
    iqr: float | None
    n: int
    error: str | None = None


def measure(
    function: Callable[[Any], Any],
    inputs: Any,
    *,
    once: bool,
    min_run_time: float,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Time one callable after a warm-up; an exception becomes the timing's ``error``, not a missing line."""
    try:
        if once:
            start = clock()
            function(inputs)
            _wait()
            return Timing(clock() - start, 0.0, 1)
        function(inputs)
        timer = Timer(
            "function(inputs)",
            globals={"function": function, "inputs": inputs},
            timer=clock,
            num_threads=torch.get_num_threads(),
        )
        measurement = timer.blocked_autorange(min_run_time=min_run_time)
        return Timing(measurement.median, measurement.iqr, len(measurement.times))
    except Exception:
        return _failed()


def _failed() -> Timing:
    return Timing(None, None, 0, traceback.format_exc(limit=1).strip().splitlines()[-1])


def run_entry(
    entry: Entry | Rate, *, min_run_time: float, clock: Clock = time.perf_counter, rate_limit: float = math.inf
) -> dict[str, Any]:
    """Measure an entry and all its references; the result is ready for JSON, also where the entry failed.

    A rate begins no further case after `rate_limit` seconds.
    """
    try:
        if isinstance(entry, Rate):
            return _run_rate(entry, clock, rate_limit)
        return _run_entry(entry, min_run_time=min_run_time, clock=clock)
    except Exception:  # the set-up, or the record
        return {"name": entry.name, "ours": asdict(_failed()), "references": {}}


def _run_entry(entry: Entry, *, min_run_time: float, clock: Clock) -> dict[str, Any]:
    inputs = entry.setup()
    kept: list[Any] = []  # a long run is not repeated for its record

    def run(given: Any) -> None:
        kept[:] = [entry.run(given)]

    ours = measure(run if entry.once else entry.run, inputs, once=entry.once, min_run_time=min_run_time, clock=clock)
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
        theirs = measure(reference, inputs, once=entry.once, min_run_time=min_run_time, clock=clock)
        result["references"][name] = asdict(theirs)
        if ours.median and theirs.median:
            result["references"][name]["ratio"] = theirs.median / ours.median
    return result


def _run_rate(rate: Rate, clock: Clock, limit: float) -> dict[str, Any]:
    done: dict[str, Finished] = {}
    end = time.monotonic() + limit
    for name in rate.cases:
        if done and time.monotonic() >= end:
            break
        done[name] = run_alone(rate.name, name, clock) if rate.alone else run_case(rate, name, clock)
    seconds = {name: case.seconds for name, case in done.items() if case.seconds is not None}
    error = None if seconds else "no case ran"
    quartiles = statistics.quantiles(seconds.values(), n=4) if len(seconds) > 1 else [0.0, 0.0, 0.0]
    median = statistics.median(seconds.values()) if seconds else None
    timing = Timing(median, quartiles[2] - quartiles[0], len(seconds), error)
    return {"name": rate.name, "ours": asdict(timing), "references": {}, "record": _facts(done, seconds)}


def _facts(done: dict[str, Finished], seconds: dict[str, float]) -> dict[str, Any]:
    """What a rate's cases say together, the worst of them by name."""
    outcomes = {name: case.outcome for name, case in done.items()}
    quality = {name: o.psnr for name, o in outcomes.items() if not math.isnan(o.psnr)}
    failures = {name: o.why or "not verified" for name, o in outcomes.items() if not o.success}
    return {
        "cases": len(done),
        "successes": len(done) - len(failures),
        "verified": sum(o.verified for o in outcomes.values()),
        "median psnr": statistics.median(quality.values()) if quality else None,
        "least psnr": min(quality.values(), default=None),
        "worst": min(quality, key=lambda name: quality[name], default=None),
        "slowest": max(seconds.items(), key=lambda case: case[1], default=None),
        "peak MiB": max((case.peak for case in done.values() if case.peak is not None), default=None),
        "iterations": _ends([o.iterations for o in outcomes.values() if o.iterations is not None]),
        "rows per unknown": _ends([o.rows for o in outcomes.values() if o.rows is not None]),
        "failures": failures,
    }


def _ends(values: Sequence[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None


def run_case(rate: Rate, name: str, clock: Clock) -> Finished:
    """One case, in this process; an exception becomes its outcome."""
    try:
        inputs = rate.cases[name]()
        start = clock()
        returned = rate.run(inputs)
        _wait()
        seconds = clock() - start
        return Finished(seconds, rate.judge(returned))
    except Exception as error:
        return Finished(None, Outcome(False, float("nan"), f"{type(error).__name__}: {error}".splitlines()[0]))


def run_alone(rate: str, case: str, clock: Clock) -> Finished:
    """One case in a process of its own, by `alone.py`."""
    command = [sys.executable, "-W", "ignore", str(HERE / "alone.py"), rate, case, clock.__name__]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return Finished(None, Outcome(False, float("nan"), (ran.stderr.strip() or "killed").splitlines()[-1]))
    found = json.loads(ran.stdout.splitlines()[-1])
    return Finished(found["seconds"], Outcome(**found["outcome"]), found["peak"])


def beside_the_cpu(entries: Sequence[Entry | Rate], twins: Sequence[Entry | Rate]) -> None:
    """Give each entry of another device that asks for it its twin of the CPU as a reference.

    `twins` are the entries of the CPU, in the same order. What runs once is warmed up first: loading cuSOLVER and
    cuDNN is not what is measured.
    """
    for entry, twin in zip(entries, twins, strict=True):
        if isinstance(entry, Entry) and isinstance(twin, Entry) and entry.on_cpu:
            entry.references = {"the same on the CPU": _Twin(twin)} | entry.references
            if entry.once:
                entry.setup = _warmed(entry.setup, entry.run)


class _Twin:
    """The same entry on the CPU, set up when it is first asked for."""

    def __init__(self, twin: Entry) -> None:
        self.twin = twin
        self.inputs: list[Any] = []

    def __call__(self, _: Any) -> Any:
        if not self.inputs:
            self.inputs.append(self.twin.setup())
        return self.twin.run(self.inputs[0])


def _warmed(setup: Callable[[], Any], run: Callable[[Any], Any]) -> Callable[[], Any]:
    def both() -> Any:
        inputs = setup()
        with suppress(Exception):  # what fails here fails again where it is reported
            run(inputs)
        return inputs

    return both


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
