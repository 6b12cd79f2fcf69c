"""Several local steps on the same data (experimental): the mean gradient, and the weights it nearly belongs to.

The gradients of E steps are taken at E different weights. Their mean is, up to the square of the way between, the
gradient at the weights half way between the first and the last: ``w_0 + (E - 1) / (2 E) (w_E - w_0)``.
"""

from __future__ import annotations

import torch
from torch import nn

from rconv_fast.observation import SharedGradients
from rconv_fast.updates import step_coefficients


def to_middle_weights(model: nn.Module, shared: SharedGradients) -> None:
    """Give a copy the weights half way through the steps, its own ones; as it is where they are not known."""
    if shared.training is None or shared.steps == 1:
        return
    kept, total = step_coefficients(shared.training)
    share = (shared.steps - 1) / (2 * shared.steps)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in shared:
                mean = shared[name].to(weight)
                weight.data = weight + share * ((kept - 1) * weight - shared.training.lr * total * mean)


SEVERAL = (
    "the samples of several cannot be told apart: the last layer's mean gradient is only nearly that of one weight"
)


def what_steps_mean(shared: SharedGradients, *, reproduced: bool, proven: bool, uncovered: str = "") -> str:
    """What a reader must know of an answer from several steps; `uncovered`: why they were not unrolled."""
    if reproduced:
        said = f"experimental: all {shared.steps} local steps were run on the input, and the update is reproduced"
        return said if proven else f"{said}; that no other input does so was not shown: time_limit= may allow it"
    why = f": {uncovered}" if uncovered else ", which no input that was tried reproduces"
    return (
        f"the update sums {shared.steps} local steps{why}: nothing is verified, "
        "inputs are at best approximate, and only if all steps saw the same data"
    )
