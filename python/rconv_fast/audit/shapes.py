"""Usual layers on the meta device without torch's own meta functions, whose first call imports its compiler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# What of floats of one dtype makes one tensor of that dtype, of the shape that they are broadcast to.
ELEMENTWISE = {
    *("relu", "relu_", "relu6", "hardtanh", "leaky_relu", "elu", "celu", "selu", "softplus", "softsign", "sigmoid"),
    *("tanh", "hardsigmoid", "logsigmoid", "gelu", "silu", "mish", "hardswish", "clamp", "clamp_min", "add", "mul"),
}


class UsualShapes(TorchFunctionMode):
    """While it is entered, elementwise functions and linear layers of meta tensors only work out a shape.

    Torch's own are Python functions behind a decorator that imports ``torch._dynamo``: more than a second, for a
    shape. All other functions are left to torch.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """One call."""
        kwargs = kwargs or {}
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if tensors and all(x.is_meta and x.is_floating_point() and x.dtype == tensors[0].dtype for x in tensors):
            if func is F.linear and args[0].shape[-1:] == args[1].shape[1:]:
                return args[0].new_empty(*args[0].shape[:-1], args[1].shape[0])
            if getattr(func, "__name__", "") in ELEMENTWISE and kwargs.get("out") is None:
                return _broadcast(tensors)
        return func(*args, **kwargs)


def _broadcast(tensors: list[Tensor]) -> Tensor:
    """A tensor like the first that has the whole shape already, with its strides."""
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    whole = [x for x in tensors if x.shape == shape]
    return torch.empty_like(whole[0]) if whole else tensors[0].new_empty(shape)
