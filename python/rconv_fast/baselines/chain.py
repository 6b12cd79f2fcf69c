"""A network read as a chain of layers from the last to the first, and R-GAP's recursion along it (one sample)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from rconv_fast.baselines.problem import Problem
from rconv_fast.layers.activation import of_module
from rconv_fast.progress import Event
from rconv_fast.recover import ConvRecovery, recover_conv_input
from rconv_fast.solve import Evidence
from rconv_fast.walk.report import LayerReport

# An output this near a flat part of its activation, relative to the largest, is on it: the solves before it round.
FLAT = 1e-9
SHAPES_ONLY = (nn.Flatten, nn.Unflatten, nn.Identity)


@dataclass(frozen=True)
class Link:
    """One layer of the chain, with the shapes (1, ...) of what goes in and out."""

    name: str
    module: nn.Module
    in_shape: torch.Size
    out_shape: torch.Size


@dataclass(frozen=True)
class Chain:
    """Layers each of which takes what the one before returns, and why there is none before the first, if so."""

    links: list[Link]
    broken: str = ""


def chain_of(model: nn.Module, probe: Tensor) -> Chain:
    """The longest chain that ends at the model's output, in order; `probe` is one input (1, ...)."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def hook(name: str) -> Any:
        def called(module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
            calls.append((name, module, given[0], returned))

        return called

    leaves = [(name, m) for name, m in model.named_modules() if next(m.children(), None) is None]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            output = model(probe)
    finally:
        for handle in handles:
            handle.remove()
    links: list[Link] = []
    for name, module, given, returned in reversed(calls):
        if not _is_same(returned, output):
            break
        links.insert(0, Link(name, module, given.shape, returned.shape))
        output = given
    whole = _is_same(output, probe)
    return Chain(links, "" if whole else "what it takes is not what one layer before it returns")


def _is_same(one: Tensor, other: Tensor) -> bool:
    """The same values in the same order, perhaps in another shape."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


@dataclass
class Reached:
    """How far the recursion came.

    Attributes
    ----------
    inputs : Tensor or None
        Of the network, (1, ...).
    features : dict of str to Tensor
        Input of each solved layer, by name.
    layers : list of LayerReport
        One a solved layer, last first.
    stops_at, reason : str
        Where it ended before the input, and why.
    """

    inputs: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    stops_at: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Known:
    """What is known behind a layer: the loss' gradient, and values where `mask` says so (None: no values)."""

    gradient: Tensor
    value: Tensor | None = None
    mask: Tensor | None = None


def recurse(problem: Problem, chain: Chain, gradient: Tensor, *, through_flats: bool) -> Reached:
    """Inputs layer by layer, from the gradient of the logits (1, n).

    Layer i with pre-activations ``z = W x`` and their gradient ``k`` has the weight constraints ``W x = z`` and the
    gradient constraints ``K(k) x = dW``; before it, ``z' = s^-1(x)`` and ``k' = (W^T k) s'(z')``.

    Parameters
    ----------
    problem : Problem
        What was seen.
    chain : Chain
        The network.
    gradient : Tensor, shape (1, n)
        Of the logits, multiplied as the gradients seen are.
    through_flats : bool
        Whether to pass a ReLU: where its output is 0 the pre-activation is unknown. If not, it ends there.
    """
    reached, known = Reached(), Known(gradient)
    for link in reversed(chain.links):
        if problem.budget.spent:
            reached.stops_at, reached.reason = link.name, "the time limit was reached"
            return reached
        problem.report(Event(link.name, "solve"))
        before, reason = _pass(problem, link, known, reached, through_flats)
        if before is None:
            reached.stops_at, reached.reason = link.name, reason
            return reached
        known = before
    if chain.broken:
        reached.stops_at, reached.reason = chain.links[0].name if chain.links else "", chain.broken
    else:
        reached.inputs = known.value
    return reached


def _pass(
    problem: Problem, link: Link, behind: Known, reached: Reached, through_flats: bool
) -> tuple[Known | None, str]:
    """What is known before a layer, or why that is not known; solved layers are noted in `reached`."""
    module, seen = link.module, problem.observation.gradients
    shaped = {name: None if t is None else t.reshape(link.out_shape) for name, t in vars(behind).items()}
    known = Known(**shaped)  # type: ignore[arg-type]
    if isinstance(module, SHAPES_ONLY) or (isinstance(module, nn.Dropout) and not module.training):
        return known, ""
    if isinstance(module, nn.Linear | nn.Conv2d):
        if f"{link.name}.weight" not in seen:
            return None, "the gradient of its weight was not seen"
        solve = _linear if isinstance(module, nn.Linear) else _convolution
        return solve(link, known, seen, reached)
    activation = of_module(module)
    if activation is None or known.value is None:
        return None, f"{type(module).__name__} is not inverted"
    if activation.flats and not through_flats:
        return None, f"{type(module).__name__} is not invertible"
    a = known.value
    near = FLAT * float(a.abs().max())
    flat = torch.stack([(a - value).abs() <= near for value in activation.flats]).any(0) if activation.flats else a != a
    inverse = activation.inverse(a)
    finite = ~flat & inverse.isfinite()  # not so where a sigmoid's output was rounded out of its range
    slope = torch.where(flat, 0.0, activation.derivative(a))
    return Known(known.gradient * slope, torch.where(finite, inverse, 0.0), finite), ""


def _linear(link: Link, behind: Known, seen: Mapping[str, Tensor], reached: Reached) -> tuple[Known | None, str]:
    """``dW = k x^T``, so ``x = dW^T k / ||k||^2``: the gradient constraints are enough."""
    start = time.perf_counter()
    assert isinstance(link.module, nn.Linear)
    if len(behind.gradient.flatten()) != link.module.out_features:
        return None, "it is applied at several places"
    k, dw = behind.gradient.reshape(-1), seen[f"{link.name}.weight"]
    if not bool(k.any()):
        return None, "the gradient behind it is zero"
    x = dw.T @ k / k.square().sum()
    residual = float((dw - k[:, None] * x).norm() / dw.norm())
    evidence = Evidence(len(x), len(x), dw.numel(), residual, 1.0, "division", "none")
    report = LayerReport(link.name, "Linear", evidence, time.perf_counter() - start)
    reached.layers.append(report)
    reached.features[link.name] = x.reshape(link.in_shape)
    return Known((link.module.weight.detach().T @ k).reshape(link.in_shape), x.reshape(link.in_shape)), ""


def _convolution(link: Link, behind: Known, seen: Mapping[str, Tensor], reached: Reached) -> tuple[Known | None, str]:
    """Both kinds of constraints, solved as one least-squares problem."""
    module = link.module
    assert isinstance(module, nn.Conv2d)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None, f"padding {module.padding!r} with mode {module.padding_mode!r} is not handled"
    if not bool(behind.gradient.any()):
        return None, "the gradient behind it is zero"
    weight = module.weight.detach()
    sizes: dict[str, Any] = {
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
    }
    start = time.perf_counter()
    found: ConvRecovery = recover_conv_input(
        seen[f"{link.name}.weight"],
        behind.gradient,
        link.in_shape[2:],
        weight=None if behind.value is None else weight,
        bias=None if behind.value is None or module.bias is None else module.bias.detach(),
        output=behind.value,
        known=behind.mask,
        solver="auto" if behind.value is None else "hybrid",
        dtype=weight.dtype,
        **sizes,
    )
    report = LayerReport(link.name, "Conv2d", found.evidence, time.perf_counter() - start)
    reached.layers.append(report)
    reached.features[link.name] = found.input
    gradient = conv2d_input(link.in_shape, weight, behind.gradient, **sizes)
    return Known(gradient, found.input), ""
