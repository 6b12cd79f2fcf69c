"""Where the cases of a sweep run: here, on processes of this machine, or on a Ray cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context
from typing import Any

from rconv_fast.errors import MissingDependencyError
from rconv_fast.sweep.case import Case, Plan, empty_row, run_case
from rconv_fast.sweep.table import Row

LOST = "the process that ran it died, also when it ran alone"


def execute(plan: Plan, cases: Sequence[Case], jobs: int, ray: str | None) -> Iterator[tuple[Case, Row]]:
    """Each case with its row, as they are finished."""
    if ray is not None:
        return _by_ray(plan, cases, jobs, ray)
    if jobs > 1:
        return _by_processes(plan, cases, jobs)
    return ((case, run_case(plan, case)) for case in cases)


def _by_processes(plan: Plan, cases: Iterable[Case], jobs: int) -> Iterator[tuple[Case, Row]]:
    """A process that dies takes its pool with it; what was running then runs again, alone, in a pool of its own."""
    waiting = deque(cases)
    while waiting:
        running: dict[Future[Row], Case] = {}
        with _pool(jobs) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        running[pool.submit(run_case, plan, waiting[0])] = waiting[0]
                        waiting.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        row = future.result()
                        yield running.pop(future), row
            except BrokenProcessPool:
                pass
        for case in running.values():
            yield case, _alone(plan, case)


def _pool(jobs: int) -> ProcessPoolExecutor:
    # A fork of this process would copy torch's threads; a server that has imported everything and run nothing has none.
    server = "forkserver" in get_all_start_methods()
    context = get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(jobs, mp_context=context)


def _alone(plan: Plan, case: Case) -> Row:
    with _pool(1) as pool:
        try:
            return pool.submit(run_case, plan, case).result()
        except BrokenProcessPool:
            return {**empty_row(case), "error": LOST}


def _by_ray(plan: Plan, cases: Iterable[Case], jobs: int, address: str) -> Iterator[tuple[Case, Row]]:
    """One task a case; Ray itself runs a task again whose worker died."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError('a sweep on a cluster needs ray: pip install "rconv-fast[ray]"') from error
    if not ray.is_initialized():
        local = address == "local"
        ray.init(num_cpus=jobs, include_dashboard=False) if local else ray.init(address=address)
    shared, task = ray.put(plan), ray.remote(max_retries=1)(run_case)
    waiting = deque(cases)
    running: dict[Any, Case] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.popleft()
            running[task.remote(shared, case)] = case
        finished, _ = ray.wait(list(running))
        for reference in finished:
            case = running.pop(reference)
            try:
                yield case, ray.get(reference)
            except ray.exceptions.WorkerCrashedError:
                yield case, {**empty_row(case), "error": LOST}
