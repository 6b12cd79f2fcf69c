"""A real photo, a network's gradients of it, and the photo back from them, as the end-to-end tests need it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor, nn

from rconv_fast import Inversion, invert, match_samples


@functools.cache
def _astronaut() -> Tensor:
    return torch.from_numpy(np.array(data.astronaut())).permute(2, 0, 1)[None].double() / 255


def photo(size: int | tuple[int, int] = 32, batch: int = 1, channels: int = 3) -> Tensor:
    """Crops of a real photo, (batch, channels, *size) in [0, 1], each of another place."""
    size = (size, size) if isinstance(size, int) else size
    crops = []
    for i in range(batch):
        y, x = i * 97 % 250, i * 151 % 250
        crop = _astronaut()[:, :channels, y : y + 200, x : x + 200]
        crops.append(F.interpolate(crop, size=size, mode="area"))
    return torch.cat(crops)


def some_labels(batch: int) -> Tensor:
    return torch.arange(batch) % 7 + 1


def gradients_of(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> dict[str, Tensor]:
    """What a client would share."""
    y = some_labels(len(x)) if y is None else y
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    return dict(zip(names, found, strict=True))


@dataclass
class Attack:
    result: Inversion
    x: Tensor

    @property
    def match(self) -> Tensor:
        """Which original each recovered sample is."""
        return match_samples(self.result.inputs, self.x.to(self.result.inputs))

    @property
    def psnr(self) -> float:
        """Of the worst sample, peak value 1."""
        error = self.result.inputs.double() - self.x.double()[self.match]
        worst = float(error.square().flatten(1).mean(1).max())
        return -10 * math.log10(worst) if worst > 0 else math.inf


def attack(model: nn.Module, x: Tensor, y: Tensor | None = None, **options: Any) -> Attack:
    """Compute the gradients of x with `model`, forget x, recover it."""
    return Attack(invert(model, gradients_of(model, x, y), x.shape[1:], **options), x)


def assert_recovered(model: nn.Module, x: Tensor, psnr: float = 150, **options: Any) -> Attack:
    """Verified, every value determined, the right labels, and really the photo."""
    y = some_labels(len(x))
    done = attack(model.double(), x.double(), y, **options)
    summary = done.result.summary()
    assert done.result.verified, summary
    assert done.result.determined.all(), summary
    assert done.result.inputs.shape == x.shape
    assert torch.equal(done.result.labels.cpu(), y[done.match]), summary
    assert done.psnr >= psnr, f"{done.psnr:.0f} dB\n{summary}"
    return done
