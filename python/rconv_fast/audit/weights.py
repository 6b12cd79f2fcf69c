"""What a model's parameters look like: torch's initialisation, random numbers, or trained."""

from __future__ import annotations

import math

from torch import Tensor, nn

from rconv_fast.layers.norm import BATCH_NORMS
from rconv_fast.layers.registry import CONVOLUTIONS

# Fewer values say nothing of their distribution.
_ENOUGH = 64


def describe_weights(model: nn.Module) -> str:
    """``"untrained"`` (torch's own initialisation), ``"random"`` (uniform numbers), else ``"trained"``.

    Torch draws the weights of convolutions and linear layers from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). Uniform numbers
    end sharply, and any training blurs that. "trained" is said of all that looks like neither, normal numbers included;
    batch norms that have seen no batch tell on them.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.track_running_stats]
    if norms:
        seen = any(int(n.num_batches_tracked) > 0 for n in norms if n.num_batches_tracked is not None)
        return "trained" if seen else "untrained"
    layers = [module for module in model.modules() if isinstance(module, (*CONVOLUTIONS, nn.Linear))]
    weights = [layer.weight.detach() for layer in layers if layer.weight.numel() >= _ENOUGH]
    if not weights or not all(map(_is_uniform, weights)):
        return "trained"
    return "untrained" if all(map(_within_default, weights)) else "random"


def _within_default(weight: Tensor) -> bool:
    bound = 1 / math.sqrt(weight[0].numel())
    return 0.9 * bound <= float(weight.abs().max()) <= bound * (1 + 1e-6)


def _is_uniform(weight: Tensor) -> bool:
    """Mean 0 and no value beyond ``sqrt(3)`` deviations, both to within four standard errors."""
    values = weight.double().flatten()
    root, deviation = math.sqrt(len(values)), float(weight.double().square().mean().sqrt())
    centred = abs(float(values.mean())) <= 4 * deviation / root
    sharp = float(values.abs().max()) <= math.sqrt(3) * deviation * (1 + 4 * 0.45 / root)
    return centred and sharp and deviation > 0
