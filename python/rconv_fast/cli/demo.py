"""``rconv-fast demo``: real photos, the gradients a client would share, and what they give away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rconv_fast import defenses, models
from rconv_fast.cli import photos, running
from rconv_fast.cli.options import Device, Precision
from rconv_fast.errors import optional, require
from rconv_fast.metrics import match_samples, mse, psnr
from rconv_fast.observation import SharedGradients
from rconv_fast.report import files, pictures

SIZES = {32: "cnn3", 224: "cnn4_224"}


def demo(
    image: Path | None,
    size: int,
    batch: int,
    model: str | None,
    activation: str,
    noise: float,
    device: Device,
    dtype: Precision,
    seed: int,
    out: Path,
    overwrite: bool,
) -> int:
    """Run the demo; returns the exit code."""
    for module in ("matplotlib", "PIL"):
        optional(module, "demo", "demo")
    require(size in SIZES, "demo", "--size", f"be {' or '.join(map(str, SIZES))}", size)
    require(batch >= 1, "demo", "--batch", "be >= 1", batch)
    require(noise >= 0, "demo", "--noise", "be >= 0", noise)
    name = model or SIZES[size]
    require(name in models.MODELS, "demo", "--model", f"be one of {', '.join(models.MODELS)}", repr(name))
    place, precision = device.resolve(), dtype.dtype
    network = models.MODELS[name](activation, dtype=precision, seed=seed, image_size=size).to(place)
    originals = _as_taken_by(network, photos.load(image, size, batch)).to(place, precision)
    files.prepare_folder(out, overwrite)

    gradients = _client_gradients(network, originals, seed, noise)
    outcome = running.invert(network, gradients, tuple(originals.shape[1:]), **_options(network))

    settings = {
        "model": name,
        "activation": activation,
        "size": size,
        "batch": batch,
        "noise": noise,
        "image": None if image is None else image.name,
        "dtype": precision,
        "device": place,
        "seed": seed,
    }
    said, drawn, measured = _compare(out, outcome, originals)
    seen = {"state": network.state_dict(), "gradients": gradients}
    assumed = running.assumptions(_loss_of(network), False, noise or None, gradients.source)
    written = running.report(out, outcome, seen, drawn, **measured, settings=settings, assumptions=assumed)
    return running.finish(outcome, said, written)


def _as_taken_by(model: nn.Module, images: Tensor) -> Tensor:
    """Photos in grey for a network of one input channel."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    return images.mean(1, keepdim=True) if first.in_channels == 1 else images


def _compare(out: Path, outcome: running.Outcome, originals: Tensor) -> tuple[str, Path | None, dict[str, Any]]:
    """How far the recovered photos are from the originals, which the recovery never saw."""
    recovered = outcome.inversion.inputs
    if recovered is None:
        return "no photo recovered", None, {}
    if recovered.shape != originals.shape:
        return f"{len(recovered)} photos found, {len(originals)} were there", None, {}
    originals = originals[match_samples(recovered, originals)].to(recovered.dtype)
    each = [psnr(r, o) for r, o in zip(recovered, originals, strict=True)]
    path = out / "comparison.png"
    pictures.save_comparison(path, originals, recovered, pictures.stamp(outcome.inversion))
    measured = {"psnr": psnr(recovered, originals), "mse": mse(recovered, originals), "psnr_per_sample": each}
    return f"PSNR {min(each):.0f} dB", path, measured


def _client_gradients(model: nn.Module, images: Tensor, seed: int, noise: float) -> SharedGradients:
    """Do what a client does: one backward pass over its private batch. Only the gradients leave."""
    generator = torch.Generator().manual_seed(seed)
    outputs = model(images)
    names, parameters = zip(*model.named_parameters(), strict=True)
    classes = outputs.shape[1]
    labels = torch.randint(max(classes, 2), (len(images),), generator=generator).to(images.device)
    if classes == 1:
        loss = nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels.to(outputs))
    else:
        loss = nn.functional.cross_entropy(outputs, labels)
    shared = SharedGradients(dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)))
    return defenses.gaussian(shared, noise, relative=True, generator=generator) if noise else shared


def _loss_of(model: nn.Module) -> str:
    """Of the demo's networks, those with one logit are trained with the binary loss."""
    *_, last = (m for m in model.modules() if isinstance(m, nn.Linear))
    return "binary_cross_entropy_with_logits" if last.out_features == 1 else "cross_entropy"


def _options(model: nn.Module) -> dict[str, Any]:
    loss = _loss_of(model)
    return {} if loss == "cross_entropy" else {"loss": loss}
