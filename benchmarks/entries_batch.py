"""Batches (algorithm 3): cost and accuracy from 1 to 16 samples, ``python benchmarks/run.py --filter batch/``."""

from __future__ import annotations

from typing import Any

import torch
from skimage import data
from skimage.transform import resize
from torch import Tensor, nn
from torch.nn import functional as F

import rconv_fast
from bench import Entry
from rconv_fast import models

SIZES = (1, 2, 4, 8, 12, 16)


def photos(batch: int) -> Tensor:
    """Different crops of real photos, (B, 3, 32, 32)."""
    sources = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    crops = []
    for i in range(batch):
        picture = sources[i % 4]
        top, left = 23 * (i // 4), 60 * (i // 4)
        crops.append(resize(picture[top : top + 230, left : left + 230], (32, 32), anti_aliasing=True))
    return torch.stack([torch.from_numpy(c).permute(2, 0, 1) for c in crops]).double()


def network(activation: str, filters: int) -> nn.Sequential:
    """Three convolutions of `filters`, twice and four times as many, and a head of 100 classes."""
    act = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}[activation]
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, filters, 5, 2, 2),
        act(),
        nn.Conv2d(filters, 2 * filters, 5, 2, 2),
        act(),
        nn.Conv2d(2 * filters, 4 * filters, 3, 2, 1),
        act(),
        nn.Flatten(),
        nn.Linear(64 * filters, 100),
    ).double()


def setup(
    activation: str, filters: int, batch: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    model, x = network(activation, filters), photos(batch)
    labels = torch.arange(batch) * 7 % 100
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), labels), parameters)
    shared = {name: g.to(device, dtype) for name, g in zip(names, gradients, strict=True)}
    return model.to(device), x.to(device), shared


def run(given: tuple[nn.Module, Tensor, dict[str, Tensor]]) -> tuple[Tensor, Any]:
    model, x, gradients = given
    return x, rconv_fast.invert(model, gradients, x.shape[1:])


def record(result: tuple[Tensor, Any]) -> dict[str, Any]:
    x, found = result
    matched = x[rconv_fast.match_samples(found.inputs, x)]
    worst = min(float(rconv_fast.psnr(a, b)) for a, b in zip(found.inputs, matched, strict=True))
    tightest = min(found.layers, key=lambda r: r.rows / r.unknowns)
    stops = [note for note in found.notes if note.endswith("values are open")]
    return {
        "worst psnr": worst,
        "verified": found.verified,
        "gradient residual": found.gradient_residual,
        "tightest layer": [*stops, f"{tightest.name}: {tightest.rows} rows for {tightest.unknowns} unknowns"][0],
    }


def large_setup() -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """Two photos of 224 pixels through a network wide enough for them."""
    model = models.cnn4_224("relu", filters=(32, 384, 448, 512), dtype=torch.float64, seed=0)
    pictures = [resize(picture, (224, 224), anti_aliasing=True) for picture in (data.astronaut(), data.coffee())]
    x = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pictures]).double()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), torch.tensor([3, 7])), parameters)
    return model, x, dict(zip(names, gradients, strict=True))


def entries() -> list[Entry]:
    cases = [("leaky_relu", 32, b, torch.float64) for b in SIZES] + [("relu", 64, b, torch.float64) for b in SIZES]
    cases += [("relu", 32, 4, torch.float64), ("relu", 32, 4, torch.float32), ("relu", 44, 8, torch.float64)]
    large = Entry("batch/relu-224-pixels/2/float64", large_setup, run, record=record, once=True)
    return [large] + [
        Entry(
            f"batch/{activation}-{filters}/{batch}/{str(dtype).removeprefix('torch.')}",
            lambda a=activation, f=filters, b=batch, d=dtype: setup(a, f, b, d),
            run,
            record=record,
            once=True,
            quick=batch == 1,
        )
        for activation, filters, batch, dtype in cases
    ]
