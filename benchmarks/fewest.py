"""How few of a layer's constraints determine its input: R-CONV++ says fewer than 5 % of those deemed necessary.

R-GAP stacks |A| weight constraints (known outputs) and |B| gradient constraints (weights) for all values of a layer's
input. The gradient constraints of a filter, ``dW[f,c,k] = sum_u g[f,u] x[c, u s + k d - p]``, have the same matrix for
every channel c: where those of F' filters have the rank of one channel's values, these ``F' K^2`` rows are enough.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rconv_fast
from leaks import Leak
from rconv_fast.losses import Loss


def fewest(given: Leak) -> dict[str, str]:
    """Rows that are enough beside |A| + |B|, by convolution; none where no number of filters is enough."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def look(name: str, given: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[name], outputs[name] = given[0].detach(), output

    modules = dict(given.model.named_modules())
    convs = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    handles = [m.register_forward_hook(lambda _, x, o, n=n: look(n, x, o)) for n, m in convs.items()]
    loss = Loss(given.loss)(given.model(given.x), given.labels)
    for handle in handles:
        handle.remove()
    gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    relu = any(isinstance(module, nn.ReLU) for module in modules.values())
    found = {}
    for name, conv in convs.items():
        known = int((outputs[name] > 0).sum()) if relu else outputs[name].numel()
        deemed = known + conv.weight.numel()
        rows = _enough(conv, gradients[name], inputs[name].shape[2:])
        found[name] = (
            "gradient constraints are too few" if rows is None else f"{rows} of {deemed} ({rows / deemed:.1%})"
        )
    return found


def _enough(conv: nn.Conv2d, gradient: Tensor, size: torch.Size) -> int | None:
    """Rows of the first so many filters with a gradient whose constraints determine a channel."""
    sizes: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    alive = gradient[:, gradient.abs().sum((0, 2, 3)) > 0]
    per_filter, unknowns = conv.kernel_size[0] * conv.kernel_size[1], size.numel()

    def determined(n: int) -> bool:
        if n * per_filter < unknowns:
            return False
        matrix = rconv_fast.gradient_constraints(alive[:, :n].contiguous(), size, conv.kernel_size, **sizes)
        return int(torch.linalg.matrix_rank(matrix.to_dense())) == unknowns

    low, high = 0, alive.shape[1]
    if not determined(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if determined(middle) else (middle, high)
    return high * per_filter
