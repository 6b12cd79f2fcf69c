"""R-GAP: the recursive attack on networks with one logit and invertible activations, and its rank analysis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from rconv_fast.baselines.chain import Chain, Link, Reached, chain_of, recurse
from rconv_fast.baselines.problem import Options, Problem, posed
from rconv_fast.constraints.ops import gradient_constraints, weight_constraints
from rconv_fast.constraints.sparse import to_scipy
from rconv_fast.errors import require
from rconv_fast.verdict import Inversion

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Where -mu / (1 + exp(mu)) is least: exp(mu) (mu - 1) = 1.
LEAST_MU = 1.2784645427610738


@dataclass(frozen=True)
class Head:
    """One reading of the last layer: the gradient of the logits (1, n), and the label."""

    gradient: Tensor
    label: float


def rgap(
    model: nn.Module,
    gradients: Mapping[str, Tensor] | Sequence[Tensor],
    input_shape: Sequence[int],
    **options: Unpack[Options],
) -> Inversion:
    """Recursive Gradient Attack on Privacy [1]_: a linear system a layer, from the logit to the input.

    For one sample, one logit with the logistic loss, and a chain of convolutions and linear layers with invertible
    activations. ``<W, dW> = -mu / (1 + exp(mu))`` gives the logit (section 3.2 of [1]_; up to two roots); then every
    layer's input is the least-squares solution of its weight and gradient constraints together (sections 3.3, 3.4). The
    reading of the head whose answer has the gradients that fit best is taken.

    Parameters
    ----------
    model : nn.Module
        What the gradients were computed with; left as it is.
    gradients : mapping of str to Tensor, or sequence of Tensor
        Of the loss, by parameter name or in parameter order.
    input_shape : sequence of int
        Shape of one sample.
    **options
        See ``rconv_fast.baselines.problem.Options``; the loss is ``"binary_cross_entropy_with_logits"``.

    Returns
    -------
    Inversion
        With verdict "approximate"; "features" or "nothing" where a layer is not invertible, as a ReLU.

    Raises
    ------
    ArgumentError
        For a batch, or another loss.

    References
    ----------
    .. [1] Zhu, Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021.
    """
    with posed("rgap", model, gradients, input_shape, {"loss": LOGISTIC, **options}) as problem:
        name = problem.observation.loss.name
        require(name == LOGISTIC, "rgap", "loss", f"be {LOGISTIC!r}", repr(name))
        require(problem.batch_size == 1, "rgap", "batch_size", "be 1", problem.batch_size)
        chain = chain_of(problem.model, torch.zeros(1, *problem.input_shape).to(problem.like))
        heads = logistic_heads(problem, chain)
        if not heads:
            at = chain.links[-1].name if chain.links else ""
            return problem.stopped(at, "R-GAP needs a linear layer with one output at the end", {}, [])
        return best_reading(problem, [(h, recurse(problem, chain, h.gradient, through_flats=False)) for h in heads])


LOGISTIC = "binary_cross_entropy_with_logits"


def best_reading(problem: Problem, readings: Sequence[tuple[Head, Reached]]) -> Inversion:
    """The answer with the least gradient mismatch; without any input, what the first reading left."""
    answers = [
        problem.answer(r.inputs, torch.tensor([h.label], device=r.inputs.device), layers=r.layers, features=r.features)
        for h, r in readings
        if r.inputs is not None
    ]
    if answers:
        return min(answers, key=lambda answer: answer.gradient_residual)
    first = readings[0][1]
    return problem.stopped(first.stops_at, first.reason, first.features, first.layers)


def logistic_heads(problem: Problem, chain: Chain) -> list[Head]:
    """Readings of a last layer with one output ``o``, by the bias or by the roots of ``<W, dW>``.

    With ``mu = (2 y - 1) o`` the logit's gradient is ``k = -(2 y - 1) / (1 + exp(mu))``.
    """
    last = chain.links[-1] if chain.links else None
    if last is None or not isinstance(last.module, nn.Linear) or last.module.out_features != 1:
        return []
    seen, scale = problem.observation.gradients, problem.observation.factor
    if f"{last.name}.weight" not in seen:
        return []
    labels = [0.0, 1.0] if problem.labels is None else [float(problem.labels)]
    bias = seen.get(f"{last.name}.bias")
    if bias is not None:
        return [Head(bias.reshape(1, 1), y) for y in labels if (float(bias) / scale < 0) == (y == 1)]
    product = float((last.module.weight.detach() * seen[f"{last.name}.weight"]).sum()) / scale
    readings = [(y, mu) for y in labels for mu in logits_of(product)]
    return [Head(scale * -(2 * y - 1) * torch.sigmoid(-mu).reshape(1, 1).to(problem.like), y) for y, mu in readings]


def logits_of(product: float) -> list[Tensor]:
    """All ``mu`` with ``-mu / (1 + exp(mu)) = product``: one where it is positive, else two, one or none."""

    def miss(mu: float) -> float:
        return -mu / (1 + math.exp(mu)) - product

    # below 0 the function is at least |mu| / 2; above 745 it is 0
    brackets = [(-2 * product - 1, 0.0)] if product > 0 else [(0.0, LEAST_MU), (LEAST_MU, 700.0)]
    roots = [brentq(miss, low, high, xtol=1e-15, rtol=1e-15) for low, high in brackets if miss(low) * miss(high) <= 0]
    if not roots and product < 0:
        roots = [LEAST_MU]  # the least value there is, missed by rounding
    return [torch.tensor(root, dtype=torch.float64) for root in roots]


@dataclass(frozen=True)
class LayerIndex:
    """Rank of one layer's weight and gradient constraints together, beside its unknowns."""

    name: str
    rank: int
    unknowns: int


def rank_index(
    model: nn.Module, input_shape: Sequence[int], *, seed: int = 0, rtol: float = 1e-12
) -> tuple[float, list[LayerIndex]]:
    """R-GAP's rank analysis: RA-i and its layers.

    ``RA-i = sum_i (d - i + 1) / d * (rank A_i - n_i) / n_i`` over the d layers from the first, ``A_i`` the weight and
    gradient constraints of layer i together and ``n_i`` its unknowns (R-GAP, ICLR 2021, section 4). 0 says that every
    layer's input is determined; the more negative, the safer. The ranks are those at a random input, with the
    gradients of a random linear function of the outputs.

    Parameters
    ----------
    model : nn.Module
        A chain of layers; linear layers count as full rank, which their gradient constraints have.
    input_shape : sequence of int
        Shape of one sample.
    seed : int
        Of the random input.
    rtol : float
        Eigenvalues of ``A^T A`` below this share of the largest count as zero.

    Returns
    -------
    index : float
    layers : list of LayerIndex
        First layer first.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    x = torch.rand(1, *input_shape, generator=generator, dtype=torch.float64).to(parameter)
    chain = chain_of(model, x)
    require(not chain.broken, "rank_index", "model", "be a chain of layers", chain.broken)
    outputs: dict[str, Tensor] = {}
    handles = [
        link.module.register_forward_hook(lambda _m, _i, out, name=link.name: outputs.update({name: out}))
        for link in chain.links
        if isinstance(link.module, nn.Conv2d)
    ]
    with torch.enable_grad():
        value = model(x.requires_grad_())
        for handle in handles:
            handle.remove()
        weights = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        found = torch.autograd.grad((value * weights).sum(), list(outputs.values()))
    gradients = dict(zip(outputs, found, strict=True))
    layers = [_rank_of(link, gradients.get(link.name), rtol) for link in chain.links if _has_weight(link)]
    depth = len(layers)
    index = sum((depth - i) / depth * (layer.rank - layer.unknowns) / layer.unknowns for i, layer in enumerate(layers))
    return float(index), layers


def _has_weight(link: Link) -> bool:
    return isinstance(link.module, nn.Linear | nn.Conv2d)


def _rank_of(link: Link, gradient: Tensor | None, rtol: float) -> LayerIndex:
    n = link.in_shape.numel()
    if gradient is None:
        return LayerIndex(link.name, n, n)
    conv = link.module
    assert isinstance(conv, nn.Conv2d)
    require(conv.groups == 1, "rank_index", "model", "have convolutions of one group", conv.groups)
    size: torch.Size = link.in_shape[2:]
    sizes: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    known = to_scipy(weight_constraints(conv.weight.detach().double(), size, **sizes))
    one = to_scipy(gradient_constraints(gradient.detach().double(), size, conv.kernel_size, **sizes))
    normal = torch.from_numpy((known.T @ known).toarray())
    block = torch.from_numpy((one.T @ one).toarray())
    # both kinds of rows at one size, so that neither drowns in the other's rounding
    normal += torch.block_diag(*[block / block.trace() * normal.trace()] * conv.in_channels)
    eigenvalues = torch.linalg.eigvalsh(normal)
    return LayerIndex(link.name, int((eigenvalues > rtol * eigenvalues[-1]).sum()), n)
