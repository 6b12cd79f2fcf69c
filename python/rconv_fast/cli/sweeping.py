"""``rconv-fast sweep``: many inversions, a table, its averages on the screen and on a page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rconv_fast import baselines, progress
from rconv_fast.cli import DONE, screen
from rconv_fast.cli.options import build_model, parse_batches, parse_shape
from rconv_fast.errors import require
from rconv_fast.report.text import number
from rconv_fast.sweep import aggregate, read_rows, run_sweep, save_page


def sweep(
    models: Sequence[str],
    images: Path,
    out: Path,
    input_shape: str,
    batch: str,
    defences: Sequence[str],
    noise: Sequence[float],
    n_images: int | None,
    attack: str | None,
    time_limit: float | None,
    seed: int,
    jobs: int,
    ray: str | None,
) -> int:
    """Run the sweep, or what is missing of it; returns the exit code."""
    require(jobs >= 1, "sweep", "--jobs", "be >= 1", jobs)
    require(images.exists(), "sweep", "--images", "be a folder of pictures", images)
    attacks = [name for name in baselines.__all__ if name != "i2f_bound"]
    require(attack is None or attack in attacks, "sweep", "--attack", f"be one of {', '.join(attacks)}", repr(attack))
    factories = {spec: partial(build_model, "sweep", spec) for spec in models}
    for factory in factories.values():
        factory()  # a wrong SPEC is said before any work
    with progress.display() as show:
        table = run_sweep(
            factories,
            images,
            out,
            input_shape=parse_shape("sweep", input_shape),
            batch_sizes=parse_batches("sweep", batch),
            defences=defences,
            noise=noise,
            n_images=n_images,
            attack=None if attack is None else getattr(baselines, attack),
            time_limit=time_limit,
            seed=seed,
            jobs=jobs,
            ray=ray,
            progress=show,
        )
    rows = read_rows(table)
    page = table.with_name(table.name + ".html")
    save_page(rows, page)
    lines = aggregate(rows)
    cells = [[number(v) if isinstance(v, float) else str(v) for v in line.values()] for line in lines]
    screen.print_rows([name.replace("_", " ") for name in lines[0]] if lines else ["no cases"], cells)
    screen.print_files([table, page])
    return DONE
