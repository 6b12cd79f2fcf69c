"""Draw a search for hidden positions converging: ``python benchmarks/search_picture.py [FILE.png]``.

A convolution of 32 filters, a ReLU, a 2x2 max pooling; the maxima and their gradients are known, where each one was
found is not. Shown is the picture after some iterations of the first schedule, and how many positions are still wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from torch.nn import functional as F

matplotlib.use("Agg")
from matplotlib import pyplot

from pictures import face
from rconv_fast import models, psnr
from rconv_fast.budget import Budget
from rconv_fast.geometry import ConvGeometry
from rconv_fast.layers.windows import Windows
from rconv_fast.patterns.alternation import alternate
from rconv_fast.patterns.maxima import Maxima
from rconv_fast.patterns.problem import Convolution, Problem
from rconv_fast.patterns.robust import SHARP

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "search.png"
SHOWN = (1, 3, 5, 7, 9)


def pooled(x: Tensor) -> Problem:
    """What is known of the first layer of FedAvg's CNN once the layers behind it are solved."""
    conv = models.fedavg_cnn().conv1
    maxima = F.max_pool2d(conv(x).relu(), 2)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(maxima.shape, dtype=torch.float64, generator=generator)
    (grad_weight,) = torch.autograd.grad(maxima, conv.weight, grad)
    geometry = ConvGeometry.create("picture", 1, 32, x.shape[2:], 5, padding=2)
    windows = Windows.create(geometry.out_size, (2, 2), (2, 2), (0, 0), (1, 1))
    front = Convolution(geometry, conv.weight.detach(), conv.bias.detach(), grad_weight, image=True)
    value = maxima.detach().flatten(2)
    return Problem(front, Maxima.create(windows, value, grad.flatten(2), value > 0))


@dataclass(frozen=True)
class Stand:
    """Where the search is after some iterations."""

    x: Tensor
    decibels: float
    wrong: float


def stand(problem: Problem, truth: Tensor, iterations: int) -> Stand:
    fit = alternate(problem, replace(SHARP, iterations=iterations), Budget()).fit
    hidden, front = problem.hidden, problem.front
    missed = hidden.choose(front.output(fit.x)) != hidden.choose(front.output(truth))
    return Stand(fit.x, float(psnr(fit.x, truth)), float(missed[hidden.known].double().mean()))


def draw(path: Path) -> None:
    x = face(28).mean(1, keepdim=True)
    problem = pooled(x)
    stands = {n: stand(problem, x, n) for n in range(1, SHOWN[-1] + 1)}
    figure = pyplot.figure(figsize=(9, 4.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    for axes, n in zip(above.subplots(1, len(SHOWN)), SHOWN, strict=True):
        axes.imshow(stands[n].x[0, 0], cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"iteration {n}: {stands[n].decibels:.0f} dB", fontsize=9)
        axes.axis("off")
    left, right = below.subplots(1, 2)
    left.plot(list(stands), [100 * s.wrong for s in stands.values()], "o-")
    left.set(xlabel="iteration", ylabel="positions wrong, %", ylim=(0, None))
    right.plot(list(stands), [s.decibels for s in stands.values()], "o-")
    right.set(xlabel="iteration", ylabel="PSNR, dB", ylim=(0, None))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
