"""Audit what a federated client sends: not gradients, but its weights after one step of SGD."""

from __future__ import annotations

import copy

import torch
from torch import nn

import rconv_fast
from rconv_fast import models


def main() -> None:
    model = models.cnn3(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())

    # The client, on its own machine:
    generator = torch.Generator().manual_seed(1)
    sample, label = torch.rand(1, 3, 32, 32, generator=generator), torch.tensor([4])
    client = copy.deepcopy(model)
    optimizer = torch.optim.SGD(client.parameters(), lr=1.0)
    nn.functional.cross_entropy(client(sample), label).backward()
    optimizer.step()
    after = client.state_dict()

    # The server, who knows both states and the learning rate:
    gradients = rconv_fast.gradients_from_update(before, after, lr=1.0)
    found = rconv_fast.invert(model, gradients, input_shape=(3, 32, 32))
    print(found.summary())
    # The float32 weights were rounded after the step. That leaves noise of about 6e-8 * |weight| / lr in each
    # gradient, more than its own rounding: `gradients.noise` has it entry by entry, and `invert` uses it.
    print(f"label {found.labels.tolist()}, PSNR {rconv_fast.psnr(found.inputs.float(), sample):.0f} dB")


if __name__ == "__main__":
    main()
