"""The gradients that a client sent, checked one by one against the model they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rconv_fast.containers import is_tensor_like, known_as, open_container, read_tensor
from rconv_fast.errors import require, require_type
from rconv_fast.observation import SharedGradients
from rconv_fast.wrappers import WeightNorm, plain_parameters, unwrap, weight_norms

# Sums of squares of larger entries leave float64.
LARGEST = 1e100


def read_gradients(function: str, model: nn.Module, gradients: Any) -> SharedGradients:
    """Gradients by the parameter names of ``working_copy(model, dtype)``, in their own dtype and on their own device.

    Parameters
    ----------
    function : str
        Who asks, for the error messages.
    model : nn.Module
        Wrapped or not.
    gradients : mapping from parameter name to Tensor, sequence in ``model.parameters()`` order, or a Flower object
        Of torch or numpy, dense or sparse; None, or a name left out, where a parameter's gradient was not seen.
        Names may carry the prefixes of wrappers. A sequence may leave out the frozen parameters.

    Returns
    -------
    SharedGradients
        With the noise and the rest of what `gradients` knew of itself. Those of weight norm's two parts are joined
        to that of the weight.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A name is not of the model, a shape differs, a value is no tensor or not finite, there are none, all are zero.
    """
    parameters = plain_parameters(model)
    named = _by_name(function, parameters, open_container(gradients))
    meant = known_as(named, parameters)
    names = {id(p): name for name, p in reversed(list(parameters.items()))}  # the first name of a parameter used twice
    read: dict[str, Tensor] = {}
    for given, value in named.items():
        if value is None:
            continue
        argument = f"gradients[{given!r}]"
        name = meant[given]
        must = "be named as the model's parameters"
        require(name is not None, function, "gradients", must, repr(given))
        assert name is not None
        read[names[id(parameters[name])]] = _checked(function, argument, value, tuple(parameters[name].shape))
    require(bool(read), function, "gradients", "hold at least one gradient", "none")
    require(any(bool(g.any()) for g in read.values()), function, "gradients", "not be all zero", "a zero gradient")
    known = gradients if isinstance(gradients, SharedGradients) else SharedGradients(read)
    sigmas = {meant[given]: sigma for given, sigma in (known.noise or {}).items() if given in meant}
    noise = {names[id(parameters[name])]: sigma for name, sigma in sigmas.items() if name is not None}
    read, noise = _fold_weight_norms(model, parameters, read, noise)
    return SharedGradients(
        read,
        noise=None if known.noise is None else noise,
        scale_known=known.scale_known,
        steps=known.steps,
        source=known.source,
        statistics=known.statistics,
        training=known.training,
    )


def _by_name(function: str, parameters: Mapping[str, nn.Parameter], opened: Any) -> dict[str, Any]:
    if isinstance(opened, Mapping):
        return {str(name): value for name, value in opened.items()}
    iterable = isinstance(opened, Iterable) and not isinstance(opened, Tensor | str | bytes)
    listed, kind = list(opened) if iterable else [], type(opened).__name__
    require_type(iterable, function, "gradients", "be a mapping or a sequence of tensors", kind)
    unique = {id(p): name for name, p in reversed(list(parameters.items()))}
    order = [name for name, p in parameters.items() if unique[id(p)] == name]
    trained = [name for name in order if parameters[name].requires_grad]
    expected = trained if len(listed) == len(trained) else order
    must = f"have {len(order)} entries in parameter order"
    require(len(listed) == len(expected), function, "gradients", must, len(listed))
    return dict(zip(expected, listed, strict=True))


def _checked(function: str, argument: str, value: Any, shape: Sequence[int]) -> Tensor:
    require_type(is_tensor_like(value), function, argument, "be a tensor", type(value).__name__)
    tensor = read_tensor(function, argument, value)
    require_type(tensor.is_floating_point(), function, argument, "be of a real floating type", tensor.dtype)
    require(tuple(tensor.shape) == shape, function, argument, f"have shape {shape}", tuple(tensor.shape))
    bounds = [float(bound) for bound in tensor.aminmax()] if tensor.numel() else [0.0]  # makes no copy
    require(all(map(math.isfinite, bounds)), function, argument, "be finite", "NaN or Inf")
    largest = max(map(abs, bounds))
    require(largest < LARGEST, function, argument, f"be below {LARGEST:.0e}", f"{largest:.1e}")
    return tensor


def _fold_weight_norms(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], read: dict[str, Tensor], noise: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Join the gradients of lengths and directions to those of the weights, where both were seen."""
    read, noise = dict(read), dict(noise)
    for prefix, norm in _all_weight_norms(unwrap(model), ""):
        length, direction = prefix + norm.length, prefix + norm.direction
        parts = read.pop(length, None), read.pop(direction, None)
        sigmas = [torch.as_tensor(noise.pop(name, 0.0), dtype=torch.float64) for name in (length, direction)]
        if parts[0] is None or parts[1] is None:
            continue
        dtype, device = parts[1].dtype, parts[1].device
        g, v = (parameters[name].detach().to(device, torch.float64) for name in (length, direction))
        if bool((g == 0).any()):
            continue  # a weight of length 0 hides how its direction would matter
        read[prefix + norm.name] = norm.gradient(g, v, parts[0].to(g), parts[1].to(g)).to(dtype)
        if any(bool((s != 0).any()) for s in sigmas):
            noise[prefix + norm.name] = norm.deviation(g, v, *(s.to(device) for s in sigmas))
    return read, noise


def _all_weight_norms(module: nn.Module, prefix: str) -> Iterable[tuple[str, WeightNorm]]:
    for norm in weight_norms(module):
        yield prefix, norm
    for name, child in module._modules.items():
        if child is not None:
            yield from _all_weight_norms(unwrap(child), f"{prefix}{name}.")
