"""How few filters a search for hidden maxima takes: ``python benchmarks/pattern_trials.py [--seeds 6]``.

One convolution of 5x5 behind a picture of 16x16, a ReLU, a 2x2 max pooling, a random loss. Of each way to search: how
many of the seeds it finds, and its seconds.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F

from pictures import face
from rconv_fast.budget import Budget
from rconv_fast.geometry import ConvGeometry
from rconv_fast.layers.windows import Windows
from rconv_fast.patterns.alternation import BELIEFS, alternate
from rconv_fast.patterns.maxima import Maxima
from rconv_fast.patterns.problem import Convolution, Problem
from rconv_fast.patterns.robust import DESCENT, GENTLE, SHARP, SOFT

SIZE = 16
FILTERS = {3: (32, 24, 20, 16, 12, 10, 8), 1: (32, 16, 12, 10, 8, 6, 5)}
WAYS = (BELIEFS, SHARP, SOFT, DESCENT, GENTLE)


def problem(channels: int, filters: int, seed: int) -> Problem:
    """What is known of a convolution once all behind its pooling is."""
    torch.manual_seed(seed)
    x = face(SIZE) if channels == 3 else face(SIZE).mean(1, keepdim=True)
    conv = nn.Conv2d(channels, filters, 5, padding=2).double()
    maxima = F.max_pool2d(conv(x).relu(), 2)
    grad = torch.randn_like(maxima)
    (grad_weight,) = torch.autograd.grad(maxima, conv.weight, grad)
    geometry = ConvGeometry.create("picture", channels, filters, x.shape[2:], 5, padding=2)
    windows = Windows.create(geometry.out_size, (2, 2), (2, 2), (0, 0), (1, 1))
    front = Convolution(geometry, conv.weight.detach(), conv.bias.detach(), grad_weight, image=True)
    value = maxima.detach().flatten(2)
    return Problem(front, Maxima.create(windows, value, grad.flatten(2), value > 0))


def trials(channels: int, filters: int, seeds: int) -> str:
    """One line: rows per unknown as an audit counts them (of windows and gradients), then each way's count."""
    made = [problem(channels, filters, seed) for seed in range(seeds)]
    rows = filters * (SIZE * SIZE / 4 + 25 * channels) / (channels * SIZE * SIZE)
    cells = []
    for way in WAYS:
        start = time.process_time()
        found = sum(alternate(one, way, Budget()).certified for one in made)
        cells.append(f"{way.name} {found} ({(time.process_time() - start) / seeds:.1f} s)")
    return f"{channels} channels, {filters} filters, {rows:.2f} rows per unknown: {', '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    for channels, counts in FILTERS.items():
        for filters in counts:
            print(trials(channels, filters, seeds), flush=True)


if __name__ == "__main__":
    main()
