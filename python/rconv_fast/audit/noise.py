"""The leak under noise without an attack: the Cramer-Rao bound of the probe."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rconv_fast.audit.probe import Probe
from rconv_fast.errors import RconvError
from rconv_fast.estimate import cramer_rao
from rconv_fast.losses import Loss
from rconv_fast.observation import Noise, SharedGradients
from rconv_fast.wrappers import working_copy


@dataclass(frozen=True)
class Prediction:
    r"""What no unbiased estimate can beat.

    Attributes
    ----------
    psnr : float or None
        Peak 1, in dB; None where it is not known.
    leak_map : Tensor or None
        (\*input_shape): standard deviation of each input value, root mean square over the batch.
    notes : tuple of str
    """

    psnr: float | None
    leak_map: Tensor | None
    notes: tuple[str, ...] = ()


def predict(
    model: nn.Module, loss: Loss, probe: Probe, noise: float | Noise, verdict: str, determined: Tensor | None = None
) -> Prediction:
    """The bound at a noise; without noise what was proven is exact and the rest open."""
    if not isinstance(noise, int | float) or noise != 0:
        return bound_of(model, loss, probe, noise)
    if verdict == "exact":
        return Prediction(math.inf, torch.zeros_like(probe.inputs[0]))
    if verdict == "partial" and determined is not None:
        known = determined.all(0)
        return Prediction(None, torch.where(known, 0.0, math.inf))
    return Prediction(None, None)


def bound_of(
    model: nn.Module, loss: Loss, probe: Probe, noise: float | Noise, *, known_scale: bool = True
) -> Prediction:
    """The Cramer-Rao bound of the probe's inputs."""
    subject = working_copy(model, probe.inputs.dtype)
    try:
        bound = cramer_rao(subject, loss, probe.inputs, probe.targets, noise, known_scale=known_scale)
    except RconvError as error:
        return Prediction(None, None, (f"no bound computed: {error}",))
    notes = ["the bound holds the sides of all ReLUs and is that of the probe"]
    if not bound.exact:
        notes.append("the bound was estimated from random solves (to about 20 % of each deviation)")
    return Prediction(bound.psnr, bound.std.square().mean(0).sqrt(), tuple(notes))


def shared_bound(model: nn.Module, loss: Loss, probe: Probe, shared: SharedGradients) -> Prediction:
    """The bound for gradients that carry their noise, and perhaps an unknown factor."""
    return bound_of(model, loss, probe, shared.noise or {}, known_scale=shared.scale_known)
