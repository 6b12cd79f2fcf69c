"""What clients do to gradients before they share them, each with the noise it leaves, entry by entry.

Every function takes gradients by parameter name and returns `SharedGradients`: the changed values, `.noise` (that of
the defence together with what the gradients brought), `.source` for the report. None is a proof of privacy;
``rconv_fast.audit`` says what is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rconv_fast.errors import require, require_type
from rconv_fast.observation import SharedGradients
from rconv_fast.updates import spacing

# A value rounded to a grid is off by a uniform error, whose standard deviation is the spacing over this.
_UNIFORM = math.sqrt(12)
# What a sign leaves of a normally distributed entry of variance 1: sqrt(1 - 2 / pi) after the best scaling.
_SIGN = math.sqrt(1 - 2 / math.pi)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def gaussian(
    gradients: Mapping[str, Tensor],
    sigma: float,
    *,
    relative: bool = False,
    generator: torch.Generator | None = None,
) -> SharedGradients:
    """Add normal noise.

    Parameters
    ----------
    gradients : mapping of str to Tensor
        By parameter name.
    sigma : float
        Standard deviation of each entry; with `relative`, in units of each tensor's root mean square.
    relative : bool
        As the number that ``invert`` and ``audit`` take as `noise`.
    generator : torch.Generator, optional
        Source of the noise, on the CPU; torch's own if not given.

    Returns
    -------
    SharedGradients
    """
    _check("gaussian", gradients)
    require(0 <= sigma < math.inf, "gaussian", "sigma", "be finite and >= 0", sigma)
    values, noise = {}, {}
    for name, g in gradients.items():
        size = sigma * (_rms(g) if relative else 1.0)
        drawn = torch.randn(g.shape, dtype=torch.float64, generator=generator).to(g.device)
        values[name], noise[name] = (g.double() + size * drawn).to(g.dtype), size
    return _shared(gradients, values, noise, f"gaussian {sigma:g}{' of each tensor' if relative else ''}")


def clip(gradients: Mapping[str, Tensor], norm: float) -> SharedGradients:
    """Scale all gradients so that their common norm is `norm` at most.

    Parameters
    ----------
    gradients : mapping of str to Tensor
        By parameter name.
    norm : float
        The largest norm over all parameters.

    Returns
    -------
    SharedGradients
        With ``scale_known=False`` where it scaled: who receives them doesn't know by what.
    """
    _check("clip", gradients)
    require(0 < norm < math.inf, "clip", "norm", "be positive and finite", norm)
    length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    factor = min(1.0, norm / length) if length > 0 else 1.0
    values = {name: g * factor for name, g in gradients.items()}
    return _shared(gradients, values, {}, f"clip {norm:g}", factor=factor, scale_known=factor == 1.0)


def top_k(gradients: Mapping[str, Tensor], share: float) -> SharedGradients:
    """Keep the largest entries of each tensor, and put 0 for the rest.

    Parameters
    ----------
    gradients : mapping of str to Tensor
        By parameter name.
    share : float
        Of each tensor's entries, in (0, 1]; one entry is kept at least.

    Returns
    -------
    SharedGradients
        An entry that was dropped is known to be smaller than the smallest kept, t: its noise is ``t / sqrt(3)``.
    """
    _check("top_k", gradients)
    require(0 < share <= 1, "top_k", "share", "be in (0, 1]", share)
    values, noise = {}, {}
    for name, g in gradients.items():
        size = g.abs().flatten()
        kept = max(1, round(share * size.numel()))
        index = size.topk(kept).indices
        keep = torch.zeros_like(size, dtype=torch.bool).index_fill_(0, index, True).reshape(g.shape)
        bound = float(size[index[-1]])
        values[name] = torch.where(keep, g, 0)
        noise[name] = torch.where(keep, 0.0, bound / math.sqrt(3)).double()
    return _shared(gradients, values, noise, f"top-k {share:g}")


def quantise(gradients: Mapping[str, Tensor], dtype: torch.dtype) -> SharedGradients:
    """Round to a narrower type, and back to the own one.

    Parameters
    ----------
    gradients : mapping of str to Tensor
        By parameter name.
    dtype : torch.dtype
        float16, bfloat16 or float32 (values beyond the largest are cut there); int8: 255 steps a tensor, from minus
        its largest entry to it.

    Returns
    -------
    SharedGradients
        In the dtype they came in. The noise of a rounding is its spacing over sqrt(12).
    """
    _check("quantise", gradients)
    known = dtype in (*_FLOATS, torch.int8)
    require(known, "quantise", "dtype", "be float16, bfloat16, float32 or int8", dtype)
    rounding = _to_int8 if dtype == torch.int8 else _to_float(dtype)
    rounded = {name: rounding(g) for name, g in gradients.items()}
    values = {name: value for name, (value, _) in rounded.items()}
    noise = {name: steps / _UNIFORM for name, (_, steps) in rounded.items()}
    return _shared(gradients, values, noise, f"rounded to {str(dtype).removeprefix('torch.')}")


def sign(gradients: Mapping[str, Tensor]) -> SharedGradients:
    """Share signs only: -1, 0 or 1 an entry.

    Parameters
    ----------
    gradients : mapping of str to Tensor
        By parameter name.

    Returns
    -------
    SharedGradients
        With ``scale_known=False``. The noise is that of a normally distributed entry, ``sqrt(1 - 2 / pi)``; a zero is
        exact.
    """
    _check("sign", gradients)
    values = {name: g.sign() for name, g in gradients.items()}
    noise = {name: _SIGN * value.abs().double() for name, value in values.items()}
    return _shared(gradients, values, noise, "sign", factor=0.0, scale_known=False)


DEFENSES: dict[str, Callable[..., SharedGradients]] = {
    "gaussian": gaussian,
    "clip": clip,
    "top_k": top_k,
    "quantise": quantise,
    "sign": sign,
}
"""All of them by name."""


def _to_float(dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    limit = torch.finfo(dtype).max

    def rounding(g: Tensor) -> tuple[Tensor, Tensor]:
        value = g.clamp(-limit, limit).to(dtype).to(g.dtype)
        return value, spacing(value.double(), dtype)

    return rounding


def _to_int8(g: Tensor) -> tuple[Tensor, Tensor]:
    step = float(g.abs().max()) / 127 if g.numel() else 0.0
    value = (g / step).round() * step if step > 0 else g.clone()
    return value, torch.full_like(g, step, dtype=torch.float64)


def _rms(g: Tensor) -> float:
    return float(g.double().square().mean().sqrt()) if g.numel() else 0.0


def _check(function: str, gradients: Mapping[str, Tensor]) -> None:
    mapped = isinstance(gradients, Mapping) and all(torch.is_tensor(g) for g in gradients.values())
    require_type(mapped, function, "gradients", "map parameter names to tensors", type(gradients).__name__)
    require(bool(gradients), function, "gradients", "hold at least one tensor", "none")


def _shared(
    given: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    noise: Mapping[str, float | Tensor],
    source: str,
    *,
    factor: float = 1.0,
    scale_known: bool = True,
) -> SharedGradients:
    """The changed gradients, with the noise and history of the given ones, which were scaled by `factor`."""
    before: dict[str, Any] = {}
    history: dict[str, Any] = {}
    if isinstance(given, SharedGradients):
        before = given.noise or {}
        scale_known = scale_known and given.scale_known
        source = source if given.source == "gradients" else f"{given.source}, {source}"
        history = {"steps": given.steps, "statistics": given.statistics, "training": given.training}
    total = {
        name: _hypot(noise.get(name, 0.0), before.get(name, 0.0), factor)
        for name in values
        if name in noise or name in before
    }
    return SharedGradients(values, noise=total, scale_known=scale_known, source=source, **history)


def _hypot(own: float | Tensor, before: float | Tensor, factor: float) -> float | Tensor:
    if not torch.is_tensor(own) and not torch.is_tensor(before):
        return math.hypot(float(own), factor * float(before))
    like = own if torch.is_tensor(own) else before
    assert isinstance(like, Tensor)
    old = factor * torch.as_tensor(before, dtype=torch.float64, device=like.device)
    return torch.hypot(torch.as_tensor(own, dtype=torch.float64, device=like.device), old)
