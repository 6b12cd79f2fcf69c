"""R-GAP: the recursive attack on networks with one logit and invertible activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from rconv_fast.baselines.chain import SHAPES_ONLY, Chain, Reached, chain_of, recurse
from rconv_fast.baselines.problem import Options, Problem, posed
from rconv_fast.errors import require
from rconv_fast.layers.activation import of_module
from rconv_fast.result import Inversion
from rconv_fast.verdict import match_bar

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

    For one logit with the logistic loss, and a chain of convolutions and linear layers with invertible activations.
    ``<W, dW> = -mu / (1 + exp(mu))`` gives the logit (section 3 of [1]_; up to two roots); then every layer's input is
    the least-squares solution of its weight constraints ``W x = z`` and gradient constraints ``K(k) x = dW`` together,
    where ``z = s^-1(x')`` and ``k = (W'^T k') s'(z)`` come from the layer behind. The reading of the head whose answer
    has the gradients that fit best is taken. Of a batch, which the paper attacks in fully connected networks alone,
    one picture comes back: as ``dW = sum_b k_b x_b^T``, it is a linear combination of the samples.

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
        For another loss, or for a batch in a network that is not fully connected.

    References
    ----------
    .. [1] Zhu, Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021.
    """
    with posed("rgap", model, gradients, input_shape, {"loss": LOGISTIC, **options}) as problem:
        name = problem.observation.loss.name
        require(name == LOGISTIC, "rgap", "loss", f"be {LOGISTIC!r}", repr(name))
        chain = chain_of(problem.model, torch.zeros(1, *problem.input_shape).to(problem.like))
        size, alone = problem.batch_size, "be 1 in a network that is not fully connected"
        require(size == 1 or _fully_connected(chain), "rgap", "batch_size", alone, size)
        heads = logistic_heads(problem, chain)
        if not heads:
            at = chain.links[-1].name if chain.links else ""
            return problem.stopped(at, "R-GAP needs a linear layer with one output at the end", {}, [])
        notes = [f"rgap: of a batch of {size} this is a linear combination"] if size > 1 else []
        readings = [(h, recurse(problem, chain, h.gradient, through_flats=False)) for h in heads]
        return best_reading(problem, readings, notes)


def _fully_connected(chain: Chain) -> bool:
    modules = [link.module for link in chain.links]
    return all(isinstance(m, (nn.Linear, *SHAPES_ONLY)) or of_module(m) is not None for m in modules)


LOGISTIC = "binary_cross_entropy_with_logits"


def best_reading(problem: Problem, readings: Sequence[tuple[Head, Reached]], notes: Sequence[str] = ()) -> Inversion:
    """The answer with the least gradient mismatch; without any input, what the first reading left.

    Of those that match, as both readings of a homogeneous network do, the first: it has the smaller logit.
    """
    answers = [
        problem.answer(
            r.inputs,
            torch.tensor([h.label], device=r.inputs.device),
            notes=notes,
            layers=r.layers,
            features=r.features,
        )
        for h, r in readings
        if r.inputs is not None
    ]
    if answers:
        bar = match_bar(problem.observation.precision)
        return min(answers, key=lambda answer: max(answer.gradient_residual, bar))
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
    one = problem.labels is not None and len(problem.labels) == 1
    labels = [float(problem.labels)] if problem.labels is not None and one else [0.0, 1.0]
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
