"""Which rule a module, a function call or a method call gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rconv_fast.geometry import ConvGeometry
from rconv_fast.layers import activation
from rconv_fast.layers.rules import (
    ActivationRule,
    AffineRule,
    AverageRule,
    ConvRule,
    RearrangeRule,
    Rule,
    SumRule,
    UnsupportedRule,
)

GradientOf = Callable[[Tensor | None], Tensor | None]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
AVERAGES = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
REARRANGEMENTS = (
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
)
AVERAGE_CALLS = {
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "mean",
}
REARRANGE_CALLS = {
    *("flatten", "view", "reshape", "permute", "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze"),
    *("unflatten", "cat", "concat", "concatenate", "getitem", "narrow", "flip", "roll", "t"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
}
SUM_CALLS = {"add", "iadd", "add_", "sub", "isub", "sub_", "rsub"}
SCALE_CALLS = {"mul", "imul", "mul_", "truediv", "itruediv", "div", "div_", "neg"}
IDENTITY_CALLS = {"contiguous", "clone", "to", "float", "double"}
CONV_CALLS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
WHY_NOT = {
    "MaxPool": "a maximum hides which inputs it passed over",
    "Norm": "its statistics are those of the private input itself",
    "LSTM": "recurrent layers use their parameters many times",
    "Attention": "attention multiplies unknowns with each other",
}


@dataclass(frozen=True)
class Call:
    """One layer as the graph met it: operands (example tensors), a function of them, and its gradients."""

    operands: Sequence[Tensor]
    forward: Callable[..., Tensor]
    gradient_of: GradientOf


def module_rule(module: nn.Module, call: Call) -> Rule | None:
    """The rule of a module; None for one that leaves its input as it is."""
    kind = type(module).__name__
    match module:
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return conv_rule(
                kind,
                call,
                module.weight,
                module.bias,
                stride=module.stride,
                padding=module.padding,
                dilation=module.dilation,
                groups=module.groups,
            )
        case nn.Linear():
            return linear_rule(kind, call, module.weight, module.bias)
        case _ if isinstance(module, BATCH_NORMS):
            return batch_norm_rule(module, call)
        case _ if isinstance(module, DROPOUTS):
            if module.training and module.p > 0:
                return UnsupportedRule(kind, "dropout in training mode, whose mask is not shared")
            return None
        case nn.Identity():
            return None
        case nn.ConstantPad1d() | nn.ConstantPad2d() | nn.ConstantPad3d() if module.value != 0:
            return UnsupportedRule(kind, f"padding with the constant {module.value}")
        case nn.ConstantPad1d() | nn.ConstantPad2d() | nn.ConstantPad3d():
            return RearrangeRule.create(kind, call.forward, call.operands)
        case nn.Upsample() if module.mode == "nearest":
            return RearrangeRule.create(kind, call.forward, call.operands)
        case _ if isinstance(module, REARRANGEMENTS):
            return RearrangeRule.create(kind, call.forward, call.operands)
        case _ if isinstance(module, AVERAGES):
            return AverageRule(kind, call.forward)
    inverse = activation.of_module(module)
    if inverse is None and isinstance(module, activation.MONOTONE_IN_PART):
        return UnsupportedRule(kind, f"{module}, which is not monotone with these parameters")
    return ActivationRule(inverse) if inverse is not None else unsupported(kind)


def unsupported(kind: str) -> UnsupportedRule:
    """The reason why a kind of layer stops the recursion."""
    if kind.lower() in activation.NOT_MONOTONE:
        return UnsupportedRule(kind, f"{kind}, which is not monotone: its derivative is no function of its output")
    for part, reason in WHY_NOT.items():
        if part.lower() in kind.lower().replace("_", ""):
            return UnsupportedRule(kind, f"{kind}: {reason}")
    return UnsupportedRule(kind, f"{kind}, a layer with no rule")


def conv_rule(
    kind: str,
    call: Call,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Rule:
    """A convolution with symmetric zero padding (the graph splits off every other padding)."""
    (x,) = call.operands
    padding = 0 if isinstance(padding, str) else padding
    if x.ndim != weight.ndim:
        return UnsupportedRule(kind, f"{kind} on an input without batch axis")
    geometry = ConvGeometry.create(
        "invert", x.shape[1], len(weight), x.shape[2:], weight.shape[2:], stride, padding, dilation, groups
    )
    detached = bias.detach() if bias is not None else None
    return ConvRule(kind, geometry, weight.detach(), detached, call.gradient_of(weight), call.gradient_of(bias))


def linear_rule(kind: str, call: Call, weight: Tensor, bias: Tensor | None) -> Rule:
    """A fully connected layer is a convolution of one position."""
    (x,) = call.operands
    if x.ndim != 2:
        return UnsupportedRule(kind, f"{kind} on {x.ndim - 1} axes a sample, where only 1 is supported")
    geometry = ConvGeometry.create("invert", x.shape[1], len(weight), (1,), (1,))
    grad_weight = call.gradient_of(weight)
    return ConvRule(
        kind,
        geometry,
        weight.detach().unsqueeze(-1),
        bias.detach() if bias is not None else None,
        grad_weight.unsqueeze(-1) if grad_weight is not None else None,
        call.gradient_of(bias),
    )


def batch_norm_rule(module: Any, call: Call) -> Rule:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias`` with the running statistics."""
    kind = type(module).__name__
    if module.training or module.running_mean is None:
        return UnsupportedRule(kind, "batch norm in training mode, whose statistics are those of the private batch")
    (x,) = call.operands
    shape = (1, -1) + (1,) * (x.ndim - 2)
    scale = (module.running_var + module.eps).rsqrt()
    shift = -module.running_mean * scale
    if module.affine:
        scale, shift = scale * module.weight, shift * module.weight + module.bias
    return AffineRule(kind, scale.detach().reshape(shape), shift.detach().reshape(shape), call.gradient_of(module.bias))


def function_rule(name: str, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    """The rule of a function or method call, `args` with example tensors for the operands."""
    if name in IDENTITY_CALLS or (name == "dropout" and not kwargs.get("training", args[2:3] == (True,))):
        return None
    if name in SUM_CALLS and len(call.operands) == 2:
        return _sum_rule(name, kwargs)
    if name in SUM_CALLS | SCALE_CALLS and len(call.operands) == 1:
        return _affine_rule(name, call)
    if name in REARRANGE_CALLS or (name == "interpolate" and kwargs.get("mode", "nearest") == "nearest"):
        return RearrangeRule.create(name, call.forward, call.operands)
    if name == "pad":
        bound = _bind(args, kwargs, pad=None, mode="constant", value=None)
        mode, value = bound["mode"], bound["value"]
        if mode == "constant" and value not in (None, 0):
            return UnsupportedRule(name, f"padding with the constant {value}")
        return RearrangeRule.create(name, call.forward, call.operands)
    if name in AVERAGE_CALLS:
        return AverageRule(name, call.forward)
    if name == "linear":
        return linear_rule(name, call, *_bind(args, kwargs, weight=None, bias=None).values())
    if name in CONV_CALLS:
        bound = _bind(args, kwargs, weight=None, bias=None, stride=1, padding=0, dilation=1, groups=1)
        if bound["padding"] == "same":
            return UnsupportedRule(name, f"padding {bound['padding']!r} in a functional convolution")
        return conv_rule(name, call, **bound)
    if len(call.operands) == 1 and not (set(kwargs) & {"input", "self"}):
        inverse = activation.of_function(name, *args[1:], **kwargs)
        if inverse is not None:
            return ActivationRule(inverse)
    return unsupported(name)


def _bind(args: Sequence[Any], kwargs: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Arguments after the first by name."""
    given = dict(zip(defaults, args[1:], strict=False))
    return {**defaults, **given, **{k: v for k, v in kwargs.items() if k in defaults}}


def _sum_rule(name: str, kwargs: Mapping[str, Any]) -> Rule:
    """A residual addition ``x_0 +- x_1``."""
    if kwargs.get("alpha", 1) != 1:
        return UnsupportedRule(name, "an addition with alpha")
    return SumRule(name, (1.0, -1.0 if "sub" in name else 1.0))


def _affine_rule(name: str, call: Call) -> Rule:
    """Arithmetic of one tensor with numbers: ``scale x + shift``, found by evaluating it at 0, 1/2 and 1."""
    (x,) = call.operands
    shift, half, one = (call.forward(torch.full_like(x, value))[:1] for value in (0.0, 0.5, 1.0))
    if not bool(torch.isfinite(shift).all()) or not torch.allclose(half, (shift + one) / 2):
        return UnsupportedRule(name, f"{name}, which is not affine here")
    return AffineRule(name, one - shift, shift)


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
