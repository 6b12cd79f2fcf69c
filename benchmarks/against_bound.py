"""Photos from noisy gradients beside the bound: ``python benchmarks/against_bound.py [--photos 3] [--out FILE.json]``.

Eight networks, four noises relative to each tensor's root mean square. Of each answer: how far below the bound it
ends, how many of its values are within two of their error bars, the law of its chi-square, and whether it is verified.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rconv_fast
from bench import Target
from leaks import Leak, leak
from pictures import crops
from rconv_fast import defenses
from rconv_fast.estimate import cramer_rao
from rconv_fast.observation import SharedGradients
from run import machine

SIGMAS = (1e-6, 1e-4, 1e-3, 1e-2)
WIDTHS = (32, 64, 96)


@dataclass(frozen=True)
class Network:
    """Strided convolutions in front of a classifier of ten."""

    activation: type[nn.Module]
    depth: int
    size: int
    channels: int

    @property
    def name(self) -> str:
        return f"{self.activation.__name__}, {self.depth} layers, {self.channels}x{self.size}x{self.size}"

    def build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            channels, edge = self.channels, self.size
            for i, width in enumerate(WIDTHS[: self.depth]):
                kernel = 3 if i else 5
                layers[f"conv{i + 1}"] = nn.Conv2d(channels, width, kernel, 2, kernel // 2)
                layers[f"act{i + 1}"] = self.activation()
                channels, edge = width, (edge + 1) // 2
            layers["flatten"], layers["head"] = nn.Flatten(), nn.Linear(channels * edge * edge, 10)
            return nn.Sequential(layers).double()


NETWORKS = [
    Network(activation, depth, size, channels)
    for (activation, depth), (size, channels) in zip(
        product((nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid), (2, 3)),
        [(16, 1), (20, 1), (12, 3), (16, 3), (20, 1), (16, 1), (12, 1), (12, 3)],
        strict=True,
    )
]


@dataclass(frozen=True)
class Reached:
    """One answer beside the bound; decibels of a peak of 1, `z` in standard deviations of its chi-square."""

    photo: int
    bound: float
    psnr: float
    within_two: float
    z: float
    verified: bool
    seconds: float
    why: str


def pictures(network: Network, n: int) -> Tensor:
    photos = crops(n, network.size)
    return photos if network.channels == 3 else photos.mean(1, keepdim=True)


def noisy(network: Network, x: Tensor, sigma: float, seed: int) -> Leak:
    given = leak(network.build(seed), x, torch.tensor([seed % 10]), Target())
    generator = torch.Generator().manual_seed(seed)
    given.gradients = defenses.gaussian(SharedGradients(given.gradients), sigma, relative=True, generator=generator)
    return given


def freedom(given: Leak) -> int:
    """Entries of the gradients less the unknowns: how many squares the chi-square adds up."""
    return sum(g.numel() for g in given.gradients.values()) - given.x.numel()


def reach(network: Network, sigma: float, x: Tensor, photo: int, seed: int) -> Reached:
    given = noisy(network, x, sigma, seed)
    noise = given.gradients.noise
    bound = cramer_rao(given.model, given.loss, given.x, given.labels, noise=noise)
    start = time.process_time()
    found = rconv_fast.invert(given.model, given.gradients, given.x.shape[1:], time_limit=600)
    seconds = time.process_time() - start
    if found.inputs is None or found.inputs.shape != given.x.shape:
        return Reached(photo, bound.psnr, math.nan, math.nan, math.nan, found.verified, seconds, found.reason)
    error = (found.inputs - given.x).abs()
    within = math.nan if found.uncertainty is None else float((error <= 2 * found.uncertainty).double().mean())
    dof = freedom(given)
    z = (found.noise_ratio**2 - 1) * math.sqrt(dof / 2)
    return Reached(
        photo, bound.psnr, rconv_fast.psnr(found.inputs, given.x), within, z, found.verified, seconds, found.reason
    )


def rows(n_photos: int) -> Iterator[dict[str, Any]]:
    """Every answer has parameters and noise of its own."""
    seeds = itertools.count()
    for network, sigma in product(NETWORKS, SIGMAS):
        found = [reach(network, sigma, x[None], i, next(seeds)) for i, x in enumerate(pictures(network, n_photos))]
        yield {"name": f"bound/{network.name}", "sigma": sigma, "reached": [asdict(one) for one in found]}


def say(row: dict[str, Any]) -> None:
    cells = [
        f"{r['bound']:.1f} -> {r['psnr']:.1f} dB, {r['within_two']:.3f}, z {r['z']:.1f}, {r['seconds']:.1f} s"
        + ", verified" * r["verified"]
        for r in row["reached"]
    ]
    print(f"{row['name']} {row['sigma']:g}: {' | '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=3)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for row in rows(chosen.photos):
        say(row)
        found.append(row)
        if chosen.out:
            chosen.out.write_text(
                json.dumps({"machine": {**machine(), "clock": "process time"}, "results": found}, indent=1)
            )


if __name__ == "__main__":
    main()
