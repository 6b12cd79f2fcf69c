"""A picture from noisy gradients, with error bars: what the bound allows, what is reached, and a picture of both.

Writes noisy_picture.png (needs ``pip install "rconv-fast[report]"``).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import rconv_fast
from rconv_fast import defenses
from rconv_fast.estimate import cramer_rao

try:
    from matplotlib.figure import Figure
except ImportError as error:
    print(f"SKIPPED: {error}")
    sys.exit()

NOISE = 1e-3  # of each gradient's root mean square
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
    ).double()


def face() -> Tensor:
    """A drawn face: rings, two eyes, a mouth."""
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, 16, dtype=torch.float64)], indexing="ij")
    radius = (x.square() + y.square()).sqrt()
    head = torch.sigmoid(20 * (0.9 - radius)) * 0.8
    eyes = torch.exp(-60 * ((x.abs() - 0.35).square() + (y + 0.25).square()))
    mouth = torch.exp(-80 * (y - 0.55 + 0.4 * x.square()).square()) * (x.abs() < 0.5)
    return (head - 0.7 * eyes - 0.6 * mouth).clamp(0, 1)[None, None]


def draw(pictures: dict[str, Tensor], path: str) -> None:
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(pictures)), pictures.items(), strict=True):
        is_picture = not title.startswith(("error", "predicted"))
        shown = axes.imshow(
            values[0, 0], cmap="gray" if is_picture else "magma", vmin=0, vmax=1 if is_picture else None
        )
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
        if not is_picture:
            figure.colorbar(shown, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=110)


def main() -> None:
    model, x, y = build(), face(), torch.tensor([3])
    nn.functional.cross_entropy(model(x), y).backward()
    clean = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    shared = defenses.gaussian(clean, NOISE, relative=True, generator=torch.Generator().manual_seed(0))

    found = rconv_fast.invert(model, shared, SHAPE)
    bound = cramer_rao(model, "cross_entropy", x, y, noise=NOISE)
    assert found.inputs is not None
    assert found.uncertainty is not None
    error = (found.inputs - x).abs()
    print(f"no unbiased estimate is better than {bound.psnr:.1f} dB")
    print(f"{found.verdict}, verified {found.verified}, PSNR {rconv_fast.psnr(found.inputs, x):.0f} dB")
    for times, expected in ((1, 0.68), (2, 0.95)):
        within = float((error <= times * found.uncertainty).double().mean())
        print(f"{within:.0%} of the pixels are within {times} error bar(s); of right error bars about {expected:.0%}")
    panels = {"original": x, "recovered": found.inputs, "error": error, "predicted error": found.uncertainty}
    draw({title: values.detach() for title, values in panels.items()}, "noisy_picture.png")


if __name__ == "__main__":
    main()
