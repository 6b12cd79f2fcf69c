"""``rconv-fast invert``: the batch behind the gradients, or the update, of a user's own model."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rconv_fast import updates
from rconv_fast.cli import running
from rconv_fast.cli.options import build_model, load_state, parse_shape
from rconv_fast.errors import ArgumentError, optional, require
from rconv_fast.losses import Loss
from rconv_fast.observation import SharedGradients
from rconv_fast.received import read_gradients
from rconv_fast.report import files


@dataclass(frozen=True)
class Update:
    """What ``--after`` and the options beside it say of the client's training."""

    after: Path
    lr: float | None
    steps: int
    momentum: float
    weight_decay: float
    optimizer: str = "sgd"
    eps: float = 1e-8


def invert(
    model: str,
    state: Path,
    gradients: Path | None,
    update: Update | None,
    input_shape: str,
    options: dict[str, Any],
    training: bool,
    device: torch.device,
    out: Path,
    overwrite: bool,
) -> int:
    """Run the inversion; returns the exit code."""
    optional("matplotlib", "cli", "invert")
    require((gradients is None) != (update is None), "invert", "--gradients", "be given, or --after", "both or none")
    size = options["batch_size"]
    require(size is None or size >= 1, "invert", "--batch", "be >= 1", size)
    shape = parse_shape("invert", input_shape)
    network = load_state("invert", build_model("invert", model), state).train(training)
    shared = _gradients(network, gradients) if update is None else _update(network, update)
    given = {name: value for name, value in options.items() if value is not None}
    if "scale" in given:
        text = given["scale"]
        given["scale"] = None if text == "unknown" else _number("--scale", "a number or unknown", text)
    if "quantum" in given:
        given["quantum"] = _number("--quantum", "a number, as in 1/255", given["quantum"])
    Loss(given["loss"], given.get("reduction", "mean"), given.get("label_smoothing", 0.0))  # wrong ones are said now
    files.prepare_folder(out, overwrite)

    seen = {"state": network.state_dict(), "gradients": dict(shared)}
    outcome = running.invert(network.to(device), _to(shared, device), shape, **given)

    settings = {"model": model, "input_shape": input_shape, "device": device, **options}
    if update is not None:
        settings |= {"lr": update.lr, "steps": update.steps, "momentum": update.momentum, "optimizer": update.optimizer}
    assumed = running.assumptions(options["loss"] or "cross_entropy", training, options["noise"], shared.source)
    written = running.report(out, outcome, seen, None, settings=settings, assumptions=assumed)
    return running.finish(outcome, "", written)


def _number(option: str, must: str, text: str) -> float:
    """A number, also as a fraction."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise ArgumentError(f"invert: {option} must be {must}, got {text!r}") from error


def _gradients(network: nn.Module, path: Path | None) -> SharedGradients:
    assert path is not None
    return read_gradients("invert", network, files.load_tensors(path, "--gradients"))


def _update(network: nn.Module, update: Update) -> SharedGradients:
    require(update.lr is not None, "invert", "--lr", "be given with --after", None)
    assert update.lr is not None
    found = updates.gradients_from_update(
        network.state_dict(),
        files.load_tensors(update.after, "--after"),
        update.lr,
        weight_decay=update.weight_decay,
        momentum=update.momentum,
        steps=update.steps,
        optimizer=update.optimizer,
        eps=update.eps,
        names=list(network.state_dict()),
        parameters=[name for name, _ in network.named_parameters()],
    )
    return read_gradients("invert", network, found)


def _to(shared: SharedGradients, device: torch.device) -> SharedGradients:
    """The same on another device."""
    moved = SharedGradients({name: g.to(device) for name, g in shared.items()})
    vars(moved).update(vars(shared))
    return moved
