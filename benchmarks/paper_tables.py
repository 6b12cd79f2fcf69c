"""The R-CONV paper's table 2 and figures 2 and 3, with more attacks beside them, on the samples that foolbox brings.

``python benchmarks/paper_tables.py --images 3 [--pictures docs] [--out FILE] [--peer-rrconv CHECKOUT] [--peer-rgap
CHECKOUT] [--peer-dlg CHECKOUT]``. The paper compares its attack on LeNet-O and CNN6-O with DLG on LeNet and R-GAP on
CNN6, each network that its attack can take; so do the figures here. Every attack gets the same images (CIFAR-100 and
MNIST for figure 2, CIFAR-10 for figure 3), one process and the same threads. A peer's code runs from a checkout, on
parameters that it draws itself.
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
TITLES = {"rrconv": "R-CONV", "rgap": "R-GAP", "dlg": "DLG"}


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
    found = []
    for data in ("cifar100", "mnist"):
        for activation in ("sigmoid", "relu"):
            found.append(Line(data, "lenet_o", activation, "ours", ours))
            found.append(Line(data, "lenet", activation, "DLG", dlg))
    found += [Line("cifar100", "lenet", a, "Inverting Gradients", matching) for a in ("sigmoid", "relu")]
    found += [Line("cifar100", "lenet_o", a, "COPA", copa) for a in ("sigmoid", "relu")]
    for activation in ("leaky_relu", "relu"):
        found.append(Line("cifar10", "cnn6_o", activation, "ours", ours))
        found.append(Line("cifar10", "cnn6", activation, "R-GAP", rgap))
    return [*found, Line("cifar10", "cnn6", "leaky_relu", "ours", ours)]


@dataclass(frozen=True)
class Outcome:
    """One attack on one image: the picture, if any, the seconds, whether it was proven, and why it ended."""

    picture: Tensor | None
    seconds: float
    verified: bool = False
    reason: str = ""


def attacked(line: Line, time_limit: float, picture: Tensor) -> Outcome:
    given = line.leak(picture)
    start = time.perf_counter()
    _, found = line.run(given)
    seconds = time.perf_counter() - start
    usable = found.inputs is not None and found.inputs.shape == given.x.shape
    reason = "cut at the time limit" if seconds > time_limit else found.reason
    return Outcome(found.inputs[0].detach().double() if usable else None, seconds, found.verified, reason)


def attacked_by_peer(peer: str, checkout: Path, more: Sequence[str], picture: Tensor) -> Outcome:
    found = run_peer(peer, checkout, picture, torch.get_num_threads(), *more)
    return Outcome(found["recovered"].reshape(picture.shape), found["seconds"])


def result(name: str, attack: str, pictures: Sequence[Tensor], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    pairs = [(o.picture, p) for o, p in zip(outcomes, pictures, strict=True) if o.picture is not None]
    reasons = [
        f"{n} of {len(outcomes)} {reason}" for reason, n in Counter(o.reason for o in outcomes if o.reason).items()
    ]
    proven = sum(o.verified for o in outcomes)
    note = "; ".join([*reasons, *([f"{proven} of {len(outcomes)} verified"] if attack == "ours" else [])])
    return {
        "network": name,
        "attack": attack,
        "seconds": [o.seconds for o in outcomes],
        "mse": spread([rconv_fast.mse(a, b) for a, b in pairs]),
        "psnr": spread([rconv_fast.psnr(a, b) for a, b in pairs]),
        "time": spread([o.seconds for o in outcomes]),
        "note": note,
    }


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
        for axes, picture in zip(axes_row, row, strict=True):
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
        ("dlg", arguments.peer_dlg, "cifar100", "lenet sigmoid", ()),
        ("rgap", arguments.peer_rgap, "cifar10", "cnn6 leaky_relu", ()),
    ):
        if checkout:
            run = partial(attacked_by_peer, peer, checkout, more)
            found.append(Job(data, f"{name}, {data}", f"{TITLES[peer]} authors' code", run))
    return [job for job in found if arguments.filter in f"{job.name} {job.attack}"]


def show(made: dict[str, Any]) -> None:
    psnr = made["psnr"]["mean"]
    quality = "no picture" if psnr is None else f"{psnr:7.1f} dB"
    print(
        f"{made['network']:30}{made['attack']:24}{quality:>10}{made['time']['mean']:10.2f} s  {made['note']}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3, help="of each data set, at most 20")
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds an optimisation has for an image")
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
    results: list[dict[str, Any]] = []
    rows: dict[str, dict[str, Sequence[Outcome]]] = {name: {} for name in FIGURES}
    for job in jobs_of(arguments):
        pictures = sets[job.data][: arguments.images]
        outcomes = [job.run(picture) for picture in pictures]
        rows[job.data][f"{job.attack}, {job.name.partition(',')[0]}"] = outcomes
        results.append(result(job.name, job.attack, pictures, outcomes))
        show(results[-1])
    if arguments.pictures:
        for data, found in rows.items():
            save_grid(arguments.pictures / f"figure-{FIGURES[data]}-{data}.png", sets[data][: arguments.images], found)
    if arguments.out:
        checkouts = {f"peer_{peer}": getattr(arguments, f"peer_{peer}") for peer in TITLES}
        commits = {name: commit_of(path) for name, path in checkouts.items() if path}
        facts = {**machine(), **commits, "time_limit": arguments.time_limit}
        arguments.out.write_text(json.dumps({"machine": facts, "results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
