"""Many inversions in one table: pictures x models x batch sizes x defences x noise, resumable, on many processes.

Every finished case is a row in a file of its own beside the table until all are done, so that whatever is killed loses
only the cases it was at. A sweep that is started again does what is missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from rconv_fast.data import Picture, find_pictures
from rconv_fast.errors import require
from rconv_fast.invert import invert
from rconv_fast.progress import Event, progress_callback
from rconv_fast.sweep.case import Attack, Case, Factory, Plan, cases_of, defence_of
from rconv_fast.sweep.jobs import execute
from rconv_fast.sweep.page import save_page
from rconv_fast.sweep.table import aggregate, pyarrow_parquet, read_rows, to_markdown, write_rows


def run_sweep(
    models: Mapping[str, Factory],
    images: Path | str | Sequence[Picture],
    out: Path | str,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    batch_sizes: Sequence[int] = (1,),
    defences: Sequence[str] = ("none",),
    noise: Sequence[float] = (0.0,),
    n_images: int | None = None,
    attack: Attack | None = None,
    dtype: torch.dtype = torch.float64,
    time_limit: float | None = None,
    seed: int = 0,
    jobs: int = 1,
    ray: str | None = None,
    progress: bool | Callable[[Event], None] = False,
) -> Path:
    """Invert every combination and write one row a case.

    Parameters
    ----------
    models : mapping of str to callable
        Make the networks, without arguments. With `jobs` > 1 or `ray` they are pickled.
    images : Path, str or sequence of Picture
        A folder that ``rconv_fast.data.find_pictures`` reads, or its pictures.
    out : Path or str
        The table, in Parquet. Rows that it holds, or that lie in the folder ``<out>.parts``, are not computed again.
    input_shape : sequence of int
        (C, H, W), to which pictures are brought.
    batch_sizes : sequence of int
        Each divides the pictures into batches of consecutive ones; the rest is left out.
    defences : sequence of str
        ``none``, ``gaussian:SIGMA``, ``clip:NORM``, ``top_k:SHARE``, ``quantise:DTYPE`` or ``sign``, see
        ``rconv_fast.defenses``.
    noise : sequence of float
        Gaussian, relative to each tensor's root mean square, before the defence.
    n_images : int, optional
        Take only so many pictures.
    attack : callable, optional
        ``rconv_fast.invert`` if not given; one of ``rconv_fast.baselines`` for a comparison.
    dtype : torch.dtype
        Of the client's model and gradients.
    time_limit : float, optional
        Seconds for each inversion.
    seed : int
        Of labels and noise.
    jobs : int
        Processes of this machine; 1 runs here.
    ray : str, optional
        Address of a Ray cluster (``auto``; ``local`` for one of this machine); then `jobs` cases run at once.
    progress : bool or callable
        Show a progress bar, or call this with an ``Event`` a finished case.

    Returns
    -------
    Path
        The table.

    Raises
    ------
    ArgumentError
        An option has a wrong value.
    MissingDependencyError
        Without pyarrow, or without ray where it is asked for.
    """
    pyarrow_parquet()
    function = "run_sweep"
    require(bool(models), function, "models", "not be empty", models)
    require(jobs >= 1, function, "jobs", "be at least 1", jobs)
    require(all(b >= 1 for b in batch_sizes), function, "batch_sizes", "be at least 1", batch_sizes)
    require(all(n >= 0 for n in noise), function, "noise", "be at least 0", noise)
    for text in defences:
        defence_of(text)
    pictures = tuple(find_pictures(images) if isinstance(images, Path | str) else images)[:n_images]
    threads = 0 if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    plan = Plan(models, pictures, tuple(input_shape), attack or invert, dtype, time_limit, seed, threads)
    with progress_callback(progress) as report:
        return _fill(plan, list(cases_of(plan, batch_sizes, defences, noise)), Path(out), jobs, ray, report)


def _fill(
    plan: Plan, cases: Sequence[Case], table: Path, jobs: int, ray: str | None, report: Callable[[Event], None]
) -> Path:
    """Run the cases that neither the table nor its parts hold, then make one table of all."""
    parts = table.with_name(table.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    done = {row["key"] for row in read_rows(table)} | {path.stem for path in parts.glob("*.parquet")}
    left = [case for case in cases if case.key not in done]
    n_done = len(cases) - len(left)
    for case, row in execute(plan, left, jobs, ray):
        write_rows([row], parts / f"{case.key}.parquet")
        n_done += 1
        report(Event("sweep", f"{case.model}: {row['verdict'] or row['error']}", n_done, len(cases)))
    rows = {row["key"]: row for path in [table, *sorted(parts.glob("*.parquet"))] for row in read_rows(path)}
    write_rows(list(rows.values()), table)
    shutil.rmtree(parts)
    return table


__all__ = ["Case", "aggregate", "read_rows", "run_sweep", "save_page", "to_markdown"]
