"""Judge a model before anything is shared: count its equations, audit it, and attack it."""

from __future__ import annotations

import torch
from torch import nn

import rconv_fast

SHAPE = (1, 16, 16)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 24, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def main() -> None:
    model = build()
    # From the structure alone: no gradient, no solve.
    for layer in rconv_fast.rank_analysis(model, SHAPE):
        print(f"{layer.name} {layer.kind}: at most {layer.rank_bound} equations for {layer.unknowns} values")

    # With a made-up batch, and the recovery itself where it is quick.
    print()
    print(rconv_fast.audit(model, SHAPE, noise=1e-3).summary())

    # The same with a batch of yours: what a server would see.
    print()
    x, y = torch.rand(1, *SHAPE), torch.tensor([3])
    nn.functional.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = rconv_fast.invert(model, gradients, SHAPE)
    print(found.summary())
    print(f"PSNR {rconv_fast.psnr(found.inputs, x.double()):.0f} dB")


if __name__ == "__main__":
    main()
