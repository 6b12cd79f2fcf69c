"""Which rule a module, a function call or a method call gets; users add rules for layers of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rconv_fast.errors import require
from rconv_fast.geometry import ConvGeometry
from rconv_fast.layers import activation
from rconv_fast.layers.activation import ActivationRule
from rconv_fast.layers.affine import AffineRule, SumRule
from rconv_fast.layers.average import AverageRule
from rconv_fast.layers.base import Rule, UnsupportedRule
from rconv_fast.layers.conv import ConvRule, Stored
from rconv_fast.layers.dropout import DROPOUT_CALLS, DROPOUTS, DropoutRule
from rconv_fast.layers.norm import OWN_NORMS, has_own_statistics, norm_rule
from rconv_fast.layers.pool import MaxPoolRule
from rconv_fast.layers.rearrange import RearrangeRule
from rconv_fast.layers.valley import VALLEY_CALLS, ValleyRule, valley_of_call, valley_of_module

GradientOf = Callable[[Tensor | None], Tensor | None]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ALPHA_DROPOUTS = (nn.AlphaDropout, nn.FeatureAlphaDropout)
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
    *("chunk", "split", "tensor_split", "unbind", "select", "stack"),
    *("unflatten", "cat", "concat", "concatenate", "getitem", "narrow", "flip", "roll", "t"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
}
SUM_CALLS = {"add", "iadd", "add_", "sub", "isub", "sub_", "rsub"}
SCALE_CALLS = {"mul", "imul", "mul_", "truediv", "itruediv", "div", "div_", "neg"}
IDENTITY_CALLS = {"contiguous", "clone", "to", "float", "double"}
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
ADAPTIVE_MAX_POOLS = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
MAX_POOL_CALLS = {"max_pool1d", "max_pool2d", "max_pool3d"}
ADAPTIVE_MAX_POOL_CALLS = {"adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"}
CONV_CALLS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
WHY_NOT = {
    "MaxPool": "a maximum hides which inputs it passed over",
    "Norm": "its statistics are those of the private input itself",
    "LSTM": "recurrent layers use their parameters many times",
    "Attention": "attention multiplies unknowns with each other",
}


@dataclass(frozen=True)
class Call:
    """One layer as the graph met it.

    Attributes
    ----------
    operands : sequence of Tensor
        Example tensors of what it takes, in the working dtype.
    forward : callable
        A function of the operands, in their dtype.
    gradient_of : callable
        The gradient of a parameter, None where it was not seen.
    dtype : torch.dtype
        The working precision.
    name_of : callable
        The name of a parameter in the model, empty for what is none.
    """

    operands: Sequence[Tensor]
    forward: Callable[..., Tensor]
    gradient_of: GradientOf
    dtype: torch.dtype
    name_of: Callable[[Tensor | None], str] = lambda parameter: ""


Builder = Callable[[Any, Call], "Rule | None"]


_BUILDERS: dict[type[nn.Module], Builder] = {}


def register_rule(layer: type[nn.Module], build: Builder) -> None:
    """Teach the recursion a layer of your own.

    Parameters
    ----------
    layer : type
        A module class; it then counts as one layer and is not looked into.
    build : callable
        ``build(module, call) -> Rule``; see `rconv_fast.layers.base.Rule` for what a rule knows. None: the layer
        leaves its input as it is. Every rule that is built is checked against autograd (`check_rule`).
    """
    is_layer = isinstance(layer, type) and issubclass(layer, nn.Module)
    require(is_layer, "register_rule", "layer", "be a torch.nn.Module class", repr(layer))
    _BUILDERS[layer] = build


def is_registered(module: nn.Module) -> bool:
    """Whether a module's class, or one whose forward it keeps, has a rule."""
    return builder_of(module) is not None


def builder_of(module: nn.Module) -> Builder | None:
    """What makes the rule of a module's class, or of one whose forward it keeps; None where nothing is registered."""
    for base in type(module).__mro__:
        if base in _BUILDERS:
            return _BUILDERS[base] if type(module).forward is base.forward else None
    return None


def module_rule(module: nn.Module, call: Call) -> Rule | None:
    """The rule of a module; None for one that leaves its input as it is."""
    build = builder_of(module)
    return build(module, call) if build is not None else _activation_rule(module, call)


def _activation_rule(module: nn.Module, call: Call) -> Rule:
    kind = type(module).__name__
    if (valley := valley_of_module(module)) is not None:
        return ValleyRule(valley)
    inverse = activation.of_module(module)
    if inverse is None and isinstance(module, activation.MONOTONE_IN_PART):
        return UnsupportedRule(kind, f"{module}, which is not monotone with these parameters")
    return ActivationRule(inverse) if inverse is not None else unsupported(kind)


def _conv_module(module: Any, call: Call) -> Rule:
    options = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation, "groups": module.groups}
    return conv_rule(type(module).__name__, call, module.weight, module.bias, **options)


def _linear_module(module: Any, call: Call) -> Rule:
    return linear_rule(type(module).__name__, call, module.weight, module.bias)


def _dropout_module(module: Any, call: Call) -> Rule | None:
    kind = type(module).__name__
    if not module.training or module.p == 0:
        return None
    if isinstance(module, ALPHA_DROPOUTS):
        return UnsupportedRule(kind, f"{kind} in training mode, whose mask is not shared")
    return DropoutRule(kind, module.p)


def _rearrange_module(module: nn.Module, call: Call) -> Rule:
    return RearrangeRule.create(type(module).__name__, call.forward, call.operands)


def _constant_pad_module(module: Any, call: Call) -> Rule:
    if module.value != 0:
        return UnsupportedRule(type(module).__name__, f"padding with the constant {module.value}")
    return _rearrange_module(module, call)


def _upsample_module(module: Any, call: Call) -> Rule:
    if module.mode != "nearest":
        return unsupported(f"Upsample({module.mode})")
    return _rearrange_module(module, call)


def _average_module(module: nn.Module, call: Call) -> Rule:
    return AverageRule(type(module).__name__, call.forward)


def _max_pool_module(module: Any, call: Call) -> Rule:
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return _max_pool_rule(type(module).__name__, call, *sizes, module.ceil_mode)


def _max_pool_rule(kind: str, call: Call, *sizes: Any) -> Rule:
    (x,) = call.operands
    return MaxPoolRule.create(kind, x, *sizes) if _has_batch_axis(kind, x) else _unbatched(kind)


def _adaptive_max_pool_rule(kind: str, call: Call) -> Rule:
    (x,) = call.operands
    return MaxPoolRule.adaptive(kind, x, call.forward(x)) if _has_batch_axis(kind, x) else _unbatched(kind)


def _has_batch_axis(kind: str, x: Tensor) -> bool:
    """Whether x has two axes beside the positions of a ...1d to ...3d layer."""
    return x.ndim == int(kind[-2]) + 2


def _unbatched(kind: str) -> UnsupportedRule:
    return UnsupportedRule(kind, f"{kind} on an input without batch axis")


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
        return _unbatched(kind)
    geometry = ConvGeometry.create(
        "invert", x.shape[1], len(weight), x.shape[2:], weight.shape[2:], stride, padding, dilation, groups
    )
    return ConvRule(kind, geometry, _stored(call, weight, bias), call.dtype)


def linear_rule(kind: str, call: Call, weight: Tensor, bias: Tensor | None, *, positions: int | None = None) -> Rule:
    """A fully connected layer is a convolution of one position, or (on (B, C, positions)) of kernel 1 over several."""
    (x,) = call.operands
    if x.ndim != (2 if positions is None else 3):
        return UnsupportedRule(kind, f"{kind} on {x.ndim - 1} axes a sample, where only 1 is supported")
    geometry = ConvGeometry.create("invert", weight.shape[1], len(weight), (positions or 1,), (1,))
    return ConvRule(kind, geometry, _stored(call, weight, bias), call.dtype)


def _stored(call: Call, weight: Tensor, bias: Tensor | None) -> Stored:
    gradients = call.gradient_of(weight), call.gradient_of(bias)
    names = call.name_of(weight), call.name_of(bias)
    return Stored(weight.detach(), None if bias is None else bias.detach(), *gradients, *names)


def _norm_module(module: Any, call: Call) -> Rule:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias``, with the running statistics or those of x itself."""
    kind = type(module).__name__
    (x,) = call.operands
    if has_own_statistics(module):
        own = norm_rule(module, x, call.gradient_of)
        return own or UnsupportedRule(kind, f"{kind} over the last axes {tuple(module.normalized_shape)} alone")
    shape = (1, -1) + (1,) * (x.ndim - 2)
    scale = (module.running_var.to(call.dtype) + module.eps).rsqrt()
    shift = -module.running_mean.to(call.dtype) * scale
    if module.affine:
        scale, shift = scale * module.weight, shift * module.weight + module.bias
    grad_bias = call.gradient_of(module.bias)
    grad_bias = None if grad_bias is None else grad_bias.to(call.dtype)
    return AffineRule(kind, scale.detach().reshape(shape), shift.detach().reshape(shape), grad_bias)


def function_rule(name: str, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    """The rule of a function or method call, `args` with example tensors for the operands."""
    if name in IDENTITY_CALLS:
        return None
    if name in DROPOUT_CALLS:
        bound = _bind(args, kwargs, p=0.5, training=True)
        return DropoutRule(name, bound["p"]) if bound["training"] and bound["p"] > 0 else None
    if name == "stochastic_depth" and not _bind(args, kwargs, p=0.0, mode="row", training=True)["training"]:
        return None
    if name in SUM_CALLS and len(call.operands) == 2:
        return _sum_rule(name, call, kwargs)
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
    if name in MAX_POOL_CALLS:
        bound = _bind(args, kwargs, kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False)
        return _max_pool_rule(name, call, *bound.values())
    if name in ADAPTIVE_MAX_POOL_CALLS:
        return _adaptive_max_pool_rule(name, call)
    if name == "linear":
        return linear_rule(name, call, *_bind(args, kwargs, weight=None, bias=None).values())
    if name in CONV_CALLS:
        bound = _bind(args, kwargs, weight=None, bias=None, stride=1, padding=0, dilation=1, groups=1)
        if bound["padding"] == "same":
            return UnsupportedRule(name, f"padding {bound['padding']!r} in a functional convolution")
        return conv_rule(name, call, **bound)
    if name in VALLEY_CALLS and len(call.operands) == 1:
        return ValleyRule(valley_of_call(name, kwargs.get("approximate", "none")))
    if len(call.operands) == 1 and not (set(kwargs) & {"input", "self"}):
        inverse = activation.of_function(name, *args[1:], **kwargs)
        if inverse is not None:
            return ActivationRule(inverse)
    return unsupported(name)


def _bind(args: Sequence[Any], kwargs: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Arguments after the first by name."""
    given = dict(zip(defaults, args[1:], strict=False))
    return {**defaults, **given, **{k: v for k, v in kwargs.items() if k in defaults}}


def _sum_rule(name: str, call: Call, kwargs: Mapping[str, Any]) -> Rule:
    """A residual addition ``x_0 +- x_1``."""
    if kwargs.get("alpha", 1) != 1:
        return UnsupportedRule(name, "an addition with alpha")
    first, second = (-1.0, 1.0) if name == "rsub" else (1.0, -1.0 if "sub" in name else 1.0)
    a, b = call.operands
    return SumRule(name, (first, second), (a.shape, b.shape))


def _affine_rule(name: str, call: Call) -> Rule:
    """Arithmetic of one tensor with numbers: ``scale x + shift``, found by evaluating it at 0, 1/2 and 1."""
    (x,) = call.operands
    if x.is_meta:  # no values to evaluate: taken as affine
        return AffineRule(name, torch.ones_like(x[:1]), torch.zeros_like(x[:1]))
    shift, half, one = (call.forward(torch.full_like(x, value))[:1] for value in (0.0, 0.5, 1.0))
    if not bool(torch.isfinite(shift).all()) or not torch.allclose(half, (shift + one) / 2):
        return UnsupportedRule(name, f"{name}, which is not affine here")
    return AffineRule(name, one - shift, shift)


for _layers, _build in (
    (CONVOLUTIONS, _conv_module),
    ((nn.Linear,), _linear_module),
    (OWN_NORMS, _norm_module),
    (DROPOUTS + ALPHA_DROPOUTS, _dropout_module),
    ((nn.Identity,), lambda module, call: None),
    ((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), _constant_pad_module),
    ((nn.Upsample,), _upsample_module),
    (REARRANGEMENTS, _rearrange_module),
    (AVERAGES, _average_module),
    (MAX_POOLS, _max_pool_module),
    (ADAPTIVE_MAX_POOLS, lambda module, call: _adaptive_max_pool_rule(type(module).__name__, call)),
):
    for _layer in _layers:
        register_rule(_layer, _build)
