"""The R-CONV paper's table 2 and figures 2 and 3, with more attacks beside them, on the samples that foolbox brings.

``python benchmarks/paper_tables.py --images 20 [--line-limit SECONDS] [--pictures docs] [--out FILE] [--peer-rrconv
CHECKOUT] [--peer-rgap CHECKOUT] [--peer-dlg CHECKOUT] [--peer-breaching CHECKOUT]``. The paper compares its attack on
LeNet-O and CNN6-O with DLG on LeNet and R-GAP on CNN6, each network that its attack can take; so do the figures here.
Every attack gets the same images (CIFAR-100 and MNIST for figure 2, CIFAR-10 for figure 3) in the same order; one that
takes minutes gets as many as fit into its line's seconds. A peer's code runs from a checkout, in a process of its own,
on parameters that it draws itself. All run on one thread, and their seconds are the process' own, which other work on
the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rconv_fast
from bench import Target
from leaks import Answer, Leak, beside, leak, ours
from peers import commit_of, run_peer
from pictures import samples
from rconv_fast import baselines, models

LABEL = 1
FIGURES = {"cifar100": 2, "mnist": 2, "cifar10": 3}
TITLES = {"rrconv": "R-CONV", "rgap": "R-GAP", "dlg": "DLG", "breaching": "Inverting Gradients"}
# What one sees no difference in, an image counts as recovered from here on: gradient matching seldom comes to more.
SEEN_PSNR = 30.0


@dataclass(frozen=True)
class Line:
    """One attack on one network over one data set."""

    data: str
    network: str
    activation: str
    attack: str
    run: Callable[[Leak], Answer]

    @property
    def name(self) -> str:
        return f"{self.network} {self.activation}, {self.data}"

    def leak(self, picture: Tensor) -> Leak:
        model: nn.Sequential = models.MODELS[self.network](self.activation, in_channels=len(picture))
        single = model[-1].out_features == 1
        loss = "binary_cross_entropy_with_logits" if single else "cross_entropy"
        return leak(model, picture[None], torch.tensor([LABEL]), Target(), loss)


def lines(time_limit: float) -> list[Line]:
    """What the paper compares, then the same networks under the others."""
    limited = {"time_limit": time_limit}
    as_authors = {"dtype": torch.float32, **limited}  # gradient matching gains nothing from float64 but time
    dlg, matching = beside(baselines.dlg, **as_authors), beside(baselines.inverting_gradients, box=(0, 1), **as_authors)
    rgap, copa = beside(baselines.rgap), beside(baselines.copa, **limited)
    alone = partial(ours, batch_size=1)  # as the others are told
    found = []
    for data in ("cifar100", "mnist"):
        for activation in ("sigmoid", "relu"):
            found += [Line(data, network, activation, "ours", alone) for network in ("lenet_o", "lenet")]
            found.append(Line(data, "lenet", activation, "DLG", dlg))
    found += [Line("cifar100", "lenet", a, "Inverting Gradients", matching) for a in ("sigmoid", "relu")]
    found += [Line("cifar100", "lenet_o", a, "COPA", copa) for a in ("sigmoid", "relu")]
    for activation in ("leaky_relu", "relu"):
        found.append(Line("cifar10", "cnn6_o", activation, "ours", alone))
        found.append(Line("cifar10", "cnn6", activation, "R-GAP", rgap))
    return [*found, Line("cifar10", "cnn6", "leaky_relu", "ours", alone)]


@dataclass(frozen=True)
class Outcome:
    """One attack on one image: the picture, if any, the seconds, whether it was proven, and why it ended."""

    picture: Tensor | None
    seconds: float
    verified: bool = False
    reason: str = ""


def attacked(line: Line, time_limit: float, picture: Tensor) -> Outcome:
    given = line.leak(picture)
    start, begun = time.process_time(), time.monotonic()
    _, found = line.run(given)
    seconds, waited = time.process_time() - start, time.monotonic() - begun
    usable = found.inputs is not None and found.inputs.shape == given.x.shape
    reason = "cut at the time limit" if waited > time_limit else found.reason
    return Outcome(found.inputs[0].detach().double() if usable else None, seconds, found.verified, reason)


def attacked_by_peer(peer: str, checkout: Path, more: Sequence[str], picture: Tensor) -> Outcome:
    try:
        found = run_peer(peer, checkout, picture, 1, *more)
    except RuntimeError as error:
        return Outcome(None, math.nan, reason=str(error))
    return Outcome(found["recovered"].reshape(picture.shape), found["seconds"])


def attacked_in_turn(run: Callable[[Tensor], Outcome], pictures: Sequence[Tensor], limit: float) -> list[Outcome]:
    """One picture after the other, until all are done or so many seconds are spent."""
    outcomes: list[Outcome] = []
    for picture in pictures:
        if sum(o.seconds for o in outcomes if o.seconds == o.seconds) >= limit:
            break
        outcomes.append(run(picture))
    return outcomes


def result(name: str, attack: str, pictures: Sequence[Tensor], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    pairs = [(o.picture, p) for o, p in zip(outcomes, pictures, strict=False) if o.picture is not None]
    quality = [rconv_fast.psnr(a, b) for a, b in pairs]
    reasons = [
        f"{n} of {len(outcomes)} {reason}" for reason, n in Counter(o.reason for o in outcomes if o.reason).items()
    ]
    proven = sum(o.verified for o in outcomes)
    return {
        "network": name,
        "attack": attack,
        "images": len(outcomes),
        "recovered": sum(q >= SEEN_PSNR for q in quality),
        "failures": failures(pictures, outcomes),
        "seconds": [o.seconds for o in outcomes],
        "mse": spread([rconv_fast.mse(a, b) for a, b in pairs]),
        "psnr": spread(quality),
        "least psnr": min((q for q in quality if math.isfinite(q)), default=None),
        "time": spread([o.seconds for o in outcomes]),
        "note": "; ".join([*reasons, *([f"{proven} verified"] if attack == "ours" else [])]),
    }


def failures(pictures: Sequence[Tensor], outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """PSNR, by the picture's place, of those that did not come back; None where nothing did."""
    failed: dict[str, float | None] = {}
    for i, (outcome, picture) in enumerate(zip(outcomes, pictures, strict=False)):
        near = math.nan if outcome.picture is None else rconv_fast.psnr(outcome.picture, picture)
        if not near >= SEEN_PSNR:
            failed[str(i)] = near if math.isfinite(near) else None
    return failed


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation, as the paper's table has them; None where there is nothing finite."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return {"mean": None, "deviation": None}
    return {"mean": statistics.mean(finite), "deviation": statistics.stdev(finite) if len(finite) > 1 else 0.0}


def save_grid(path: Path, pictures: Sequence[Tensor], rows: dict[str, Sequence[Outcome]]) -> None:
    """The originals, then one row of pictures an attack; what did not come back is an empty place."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown: dict[str, Sequence[Tensor | None]] = {"original": pictures}
    shown |= {name: [o.picture for o in outcomes] for name, outcomes in rows.items()}
    figure, grid = pyplot.subplots(len(shown), len(pictures), squeeze=False, layout="constrained")
    figure.set_size_inches(1.2 * len(pictures) + 2.5, 1.2 * len(shown))
    for axes_row, (name, row) in zip(grid, shown.items(), strict=True):
        for axes, picture in zip_longest(axes_row, row):  # a slow attack has had fewer
            axes.set(xticks=[], yticks=[])
            if picture is not None:
                axes.imshow(picture.movedim(0, 2).clamp(0, 1).nan_to_num().numpy(), cmap="gray", vmin=0, vmax=1)
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@dataclass(frozen=True)
class Job:
    """One line of the table: what is attacked, by whom, and how one picture is."""

    data: str
    name: str
    attack: str
    run: Callable[[Tensor], Outcome]


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    found = [
        Job(a.data, a.name, a.attack, partial(attacked, a, arguments.time_limit)) for a in lines(arguments.time_limit)
    ]
    for peer, checkout, data, name, more in (
        ("rrconv", arguments.peer_rrconv, "cifar100", "lenet_o sigmoid", ("lenet_o", "sigmoid")),
        ("rrconv", arguments.peer_rrconv, "cifar100", "lenet_o relu", ("lenet_o", "relu")),
        ("rrconv", arguments.peer_rrconv, "cifar10", "cnn6_o relu", ("cnn6_o", "relu")),
        ("dlg", arguments.peer_dlg, "cifar100", "lenet sigmoid", ()),
        ("rgap", arguments.peer_rgap, "cifar10", "cnn6 leaky_relu", ()),
        ("breaching", arguments.peer_breaching, "cifar100", "lenet sigmoid", ("lenet", "sigmoid")),
        ("breaching", arguments.peer_breaching, "cifar100", "lenet relu", ("lenet", "relu")),
    ):
        if checkout:
            run = partial(attacked_by_peer, peer, checkout, more)
            found.append(Job(data, f"{name}, {data}", f"{TITLES[peer]} authors' code", run))
    return [job for job in found if arguments.filter in f"{job.name} {job.attack}"]


def show(made: dict[str, Any]) -> None:
    psnr, time = made["psnr"]["mean"], made["time"]["mean"]
    quality = "no picture" if psnr is None else f"{psnr:7.1f} dB"
    rate = f"{made['recovered']} of {made['images']}"
    print(
        f"{made['network']:30}{made['attack']:34}{rate:>9}{quality:>11}{time or math.nan:10.2f} s  {made['note']}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3, help="of each data set, at most 20")
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds an optimisation has for an image")
    parser.add_argument("--line-limit", type=float, default=math.inf, help="no further image of a line after so many")
    parser.add_argument("--filter", default="", help="only lines whose network or attack contains this text")
    for peer in TITLES:
        parser.add_argument(f"--peer-{peer}", type=Path, metavar="CHECKOUT")
    parser.add_argument("--pictures", type=Path, help="folder for the figures, one a data set")
    parser.add_argument("--out", type=Path, help="write all figures and the machine's facts as JSON")
    arguments = parser.parse_args()
    from run import machine

    sets = {name: [p.read((1 if name == "mnist" else 3, 32, 32)) for p in samples(name)] for name in FIGURES}
    if not all(sets.values()):
        parser.error("foolbox must be installed for its pictures: pip install --no-deps foolbox==3.3.4")
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    rows: dict[str, dict[str, Sequence[Outcome]]] = {name: {} for name in FIGURES}
    for job in jobs_of(arguments):
        pictures = sets[job.data][: arguments.images]
        outcomes = attacked_in_turn(job.run, pictures, arguments.line_limit)
        rows[job.data][f"{job.attack}, {job.name.partition(',')[0]}"] = outcomes
        results.append(result(job.name, job.attack, pictures, outcomes))
        show(results[-1])
    if arguments.pictures:
        for data, found in rows.items():
            if not found:
                continue
            save_grid(arguments.pictures / f"figure-{FIGURES[data]}-{data}.png", sets[data][: arguments.images], found)
    if arguments.out:
        checkouts = {f"peer_{peer}": getattr(arguments, f"peer_{peer}") for peer in TITLES}
        commits = {name: commit_of(path) for name, path in checkouts.items() if path}
        facts = {**machine(), **commits, "time_limit": arguments.time_limit, "clock": "process time"}
        arguments.out.write_text(json.dumps({"machine": facts, "results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
