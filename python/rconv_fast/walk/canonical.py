"""Rewrites of a model's graph before the walk: what is one layer to a user, but two or none to the mathematics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rconv_fast.layers.registry import CONVOLUTIONS

# Names of what stands behind the logits at a model's end, modules and functions alike, in lower case.
OUTPUT_WRAPPERS = {
    "logsoftmax": "log_softmax",
    "log_softmax": "log_softmax",
    "softmax": "softmax",
    "sigmoid": "sigmoid",
}
# A loss of such an output is another loss of the logits.
LOSS_OF_LOGITS = {
    ("log_softmax", "nll"): "cross_entropy",
    ("log_softmax", "cross_entropy"): "cross_entropy",
    ("sigmoid", "binary_cross_entropy"): "binary_cross_entropy_with_logits",
}


def split_padding(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The padding of a convolution module where it isn't symmetric zeros: to be done as a layer before it."""
    if not isinstance(module, CONVOLUTIONS):
        return None
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return None
    amounts = list(module._reversed_padding_repeated_twice)
    if not any(amounts):
        return None
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return lambda x: F.pad(x, amounts, mode=mode)


def positions_last(x: Tensor) -> Tensor:
    """(B, ..., C) to (B, C, N): a fully connected layer over positions is a convolution of kernel 1."""
    return x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)


def positions_back(y: Tensor, shape: torch.Size) -> Tensor:
    """(B, F, N) to (B, ..., F), the axes between as in `shape`."""
    return y.transpose(1, 2).reshape(len(y), *shape[1:-1], y.shape[1])
