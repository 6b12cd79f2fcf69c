"""Models from the wild by `rank_analysis`: all classifiers of torchvision, one of each family of timm, as one table.

    python benchmarks/wild.py --out docs/models.md

Needs torchvision and timm. Every model is built and counted in a process of its own (a fork of this one, which has
imported them), on torch's meta device where its code allows that: seconds are CPU time of the count, memory is the
process' peak with all imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import nn

import rconv_fast
from rconv_fast import RconvError, rank_analysis
from rconv_fast.audit.finding import Finding, judge
from rconv_fast.errors import UnsupportedModelError

HEAD = ("model", "input", "mode", "verdict", "reason", "CPU s", "peak MiB")

LEAD = (
    "What the structure of well-known models says of one sample's gradients, by `rconv_fast.rank_analysis`: every",
    "classifier of torchvision, in evaluation and in training mode, and one model of each family of timm.",
    '**`not covered` is not "safe"**: this package has no exact method for a layer there. `features only` is about',
    "inputs: labels and the inputs of the last layers follow. What an optimiser or a prior would guess is not",
    "judged.",
)


@dataclass(frozen=True)
class Subject:
    """A model to build, in a mode."""

    name: str
    input_shape: tuple[int, ...]
    training: bool
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class Row:
    """What was found, and what it cost."""

    verdict: str
    reason: str
    seconds: float
    mebibytes: int


def of_torchvision() -> Iterator[Subject]:
    """Every classification model, in both modes: clients train, and dropout and batch norm hide what they do."""
    from torchvision import models

    for name in models.list_models(module=models):
        transform = models.get_model_weights(name).DEFAULT.transforms()
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        if name.startswith("vit"):
            options = {"image_size": transform.crop_size[0]}
        for training in (False, True):
            shape = (3, transform.crop_size[0], transform.crop_size[0])
            yield Subject(name, shape, training, lambda n=name, o=options: models.get_model(n, **o))


def of_timm() -> Iterator[Subject]:
    """The first model of each of timm's modules, in evaluation mode."""
    import timm

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            shape = tuple(timm.get_pretrained_cfg(names[0]).input_size)
            yield Subject(f"timm {names[0]}", shape, False, lambda n=names[0]: timm.create_model(n))


def count(subject: Subject) -> Row:
    try:
        with torch.device("meta"):
            model = subject.build()
    except (NotImplementedError, RuntimeError):  # its code looks at values
        model = subject.build()
    start = time.process_time()
    try:
        finding = judge(rank_analysis(model.train(subject.training), subject.input_shape))
    except UnsupportedModelError as error:
        finding = Finding("not covered", f"{error.module}: {error.reason}")
    except RconvError as error:
        finding = Finding("refused", str(error))
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return Row(finding.verdict, finding.reason, round(seconds, 2), peak)


def forked(subject: Subject, measure: Callable[[Subject], Row]) -> Row:
    """`measure` in a child; what kills it is a row as well."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            row = measure(subject)
        except BaseException as error:
            row = Row("failed", f"{type(error).__name__}: {error}", 0.0, 0)
        with os.fdopen(writer, "w") as out:
            json.dump(astuple(row), out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return Row(*json.loads(said)) if said else Row("failed", "the process was killed", 0.0, 0)


def cells(subject: Subject, row: Row) -> tuple[str, ...]:
    """A line of the table."""
    shape, mode = "x".join(map(str, subject.input_shape)), "training" if subject.training else "evaluation"
    reason = row.reason.replace("|", "/").replace("\n", " ")[:160]
    return subject.name, shape, mode, row.verdict, reason, f"{row.seconds:.2f}", str(row.mebibytes)


def lines_of(path: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """The lines of an earlier page, by model and mode."""
    text = path.read_text() if path.exists() else ""
    found = [tuple(line[2:-2].split(" | ")) for line in text.splitlines() if line.startswith("| ")]
    return {(line[0], line[2]): line for line in found if line != HEAD}


def page(table: Collection[tuple[str, ...]]) -> str:
    """The table, with what it was made with."""
    versions = {"rconv_fast": rconv_fast.__version__, "torch": torch.__version__}
    for name in ("torchvision", "timm"):
        versions[name] = __import__(name).__version__
    tally = Counter(line[3] for line in table)
    return "\n".join(
        [
            "# Models from the wild, by `check`",
            "",
            *LEAD,
            "",
            f"{len(table)} rows: {', '.join(f'{n} {verdict}' for verdict, n in tally.most_common())}. Slowest count "
            f"{max(float(line[5]) for line in table):.1f} s of CPU time,",
            f"largest peak {max(int(line[6]) for line in table)} MiB with all imports. Written by",
            f"`benchmarks/wild.py` with {', '.join(f'{k} {v}' for k, v in versions.items())}.",
            "",
            f"| {' | '.join(HEAD)} |",
            "|" + "---|" * len(HEAD),
            *(f"| {' | '.join(line)} |" for line in table),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument("--filter", default="", help="only models whose name holds this; other lines of the page stay")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # the models' own
    torch.set_num_threads(1)  # a fork may not inherit a pool of threads
    table = lines_of(given.out) if given.filter else {}
    for subject in (*of_torchvision(), *of_timm()):
        if given.filter in subject.name:
            line = cells(subject, forked(subject, count))
            table[line[0], line[2]] = line
            print(*line, flush=True)
    given.out.write_text(page(table.values()))


if __name__ == "__main__":
    main()
