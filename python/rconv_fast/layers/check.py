"""A rule held against autograd on random values when it is built: a wrong sign cannot get into the recursion."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rconv_fast.errors import RconvError
from rconv_fast.layers.base import Rule, UnsupportedRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.layers.registry import Call, builder_of

# A rule is the same formula at every size: layers above this many values are not run twice to check it.
LARGEST = 2**16
# Relative; torch's own backward formulas have constants in single precision (Hardsigmoid), no wrong rule is this near.
TOLERANCE = 1e-6

# What was found to agree in this process.
_AGREED: set[tuple[object, ...]] = set()


class WrongRuleError(RconvError):
    """A rule that disagrees with autograd."""


def check_rule(label: str, rule: Rule, call: Call, layer: nn.Module | None = None) -> None:
    """Compare ``pull_gradient`` with autograd, ``pull_value`` with the input, at random values.

    A rule that agreed for one of torch's own layers agrees for another with the same settings and sizes.

    Raises
    ------
    WrongRuleError
        Where they differ; the message names the layer and what is wrong.
    """
    sizes = sum(x.numel() for x in call.operands)
    weights = rule.stored.weight.numel() if isinstance(rule, ConvRule) else 0
    bare = any(x.is_meta for x in call.operands)
    if bare or isinstance(rule, UnsupportedRule) or rule.hidden or sizes + weights > LARGEST:
        return
    settings = _settings(rule, call, layer)
    if settings in _AGREED:
        return
    generator = torch.Generator().manual_seed(0)
    operands = [_random(x, generator) for x in call.operands]
    with torch.enable_grad():
        leaves = [x.requires_grad_() for x in operands]
        y = call.forward(*leaves)
        grad = _random(y, generator)
        expected = torch.autograd.grad(y, leaves, grad, allow_unused=True, materialize_grads=True)
    output = y.detach()
    for operand, (leaf, wanted) in enumerate(zip(leaves, expected, strict=True)):
        found = rule.pull_gradient(grad, output, operand, leaf.shape)
        _compare(label, "pull_gradient", found, wanted)
        others = [None if i == operand else other.detach() for i, other in enumerate(leaves)]
        known = rule.pull_value(Knowledge.full(output), operand, others)
        if known is not None:
            alive = known.weight > 0
            _compare(label, "pull_value", known.value[alive], leaf.detach()[alive])
    if settings is not None:
        _AGREED.add(settings)


def _settings(rule: Rule, call: Call, layer: nn.Module | None) -> tuple[object, ...] | None:
    """All that the formulas of a layer of torch's own depend on; None for others.

    A convolution's are the same for all weights. Those of other layers with parameters may depend on their values.
    """
    own = layer is not None and type(layer).__module__.startswith("torch.nn.")
    if layer is None or not own or not (isinstance(rule, ConvRule) or not any(True for _ in layer.parameters())):
        return None
    sizes = tuple((x.shape, x.dtype, x.device) for x in call.operands)
    return type(rule), builder_of(layer), type(layer), repr(layer), layer.training, sizes


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=generator).to(like.device)


def _compare(label: str, what: str, found: Tensor, wanted: Tensor) -> None:
    size = float(wanted.norm()) + torch.finfo(torch.float64).tiny
    miss = float((found - wanted).norm()) / size if found.shape == wanted.shape else float("inf")
    if not miss <= TOLERANCE:
        raise WrongRuleError(f"invert: the rule of {label!r} must agree with autograd, got {what} off by {miss:.1e}")
