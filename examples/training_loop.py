"""Look at every step of a training loop as a curious server would."""

from __future__ import annotations

import torch
from torch import nn

import rconv_fast
from rconv_fast import models


def main() -> None:
    model = models.cnn3("leaky_relu", n_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for step in range(2):
        sample = torch.rand(1, 3, 32, 32, dtype=torch.float64, generator=generator)
        label = torch.randint(10, (1,), generator=generator)

        optimizer.zero_grad()
        nn.functional.cross_entropy(model(sample), label).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        found = rconv_fast.invert(model, gradients, input_shape=(3, 32, 32))
        right = bool((found.labels == label).all())
        print(f"step {step}: verified {found.verified}, label right {right}, ", end="")
        print(f"PSNR {rconv_fast.psnr(found.inputs, sample):.0f} dB")

        optimizer.step()


if __name__ == "__main__":
    main()
