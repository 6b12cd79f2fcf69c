"""The same network with one convolution changed, on the meta device: what is behind it follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rconv_fast.audit.shapes import UsualShapes
from rconv_fast.layers.norm import BATCH_NORMS
from rconv_fast.layers.registry import CONVOLUTIONS
from rconv_fast.walk.calls import trace
from rconv_fast.wrappers import meta_copy


def variant(
    model: nn.Module,
    input_shape: Sequence[int],
    layer: str,
    *,
    filters: int | None = None,
    stride: int | None = None,
) -> nn.Module:
    """A copy without numbers whose convolution `layer` has other filters or another stride.

    Input channels of convolutions and batch norms behind it, and input features of linear layers, are made to fit.

    Raises
    ------
    Exception
        Whatever the model's own code raises where it does not fit (a residual sum of other channels).
    """
    changed = meta_copy(model)
    module = changed.get_submodule(layer)
    assert isinstance(module, CONVOLUTIONS)
    if filters is not None:
        _resize_convolution(module, module.in_channels, filters)
    if stride is not None:
        module.stride = (stride,) * len(module.stride)
    like = next(changed.parameters())
    with UsualShapes():
        _Fitting(changed, graph=trace(changed)).run(like.new_empty(1, *input_shape))
    return changed


class _Fitting(fx.Interpreter):
    """Runs the model on shapes, and makes every layer fit what it is given."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One layer."""
        module = self.fetch_attr(target)
        if args and isinstance(args[0], Tensor) and args[0].ndim >= 2:
            _fit(module, args[0])
        return super().call_module(target, args, kwargs)


def _fit(module: nn.Module, x: Tensor) -> None:
    channels = x.shape[1]
    if isinstance(module, CONVOLUTIONS) and module.in_channels != channels:
        _resize_convolution(module, channels, module.out_channels)
    elif isinstance(module, BATCH_NORMS) and module.num_features != channels:
        module.num_features = channels
        _resize(module, channels, "weight", "bias", "running_mean", "running_var")
    elif isinstance(module, nn.Linear) and module.in_features != x.shape[-1]:
        module.in_features = x.shape[-1]
        module.weight = nn.Parameter(module.weight.new_empty(module.out_features, x.shape[-1]))


def _resize_convolution(module: Any, channels: int, filters: int) -> None:
    """Other numbers of channels and filters; a depthwise convolution stays one."""
    if module.groups > 1 and module.groups == module.in_channels:
        filters, module.groups = filters // module.in_channels * channels, channels
    module.in_channels, module.out_channels = channels, filters
    module.weight = nn.Parameter(module.weight.new_empty(filters, channels // module.groups, *module.kernel_size))
    _resize(module, filters, "bias")


def _resize(module: nn.Module, size: int, *names: str) -> None:
    """Vectors of another length, parameters and buffers."""
    for name in names:
        old = getattr(module, name)
        if old is not None:
            new = torch.empty(size, dtype=old.dtype, device=old.device)
            setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
