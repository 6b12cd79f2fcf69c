"""Aono's attack: the input of a fully connected layer is the quotient of two of its gradients."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rconv_fast.baselines.chain import SHAPES_ONLY, chain_of
from rconv_fast.baselines.labels import label_of_one, last_layer
from rconv_fast.baselines.problem import Options, Problem, posed
from rconv_fast.result import Inversion
from rconv_fast.solve import Evidence
from rconv_fast.walk.report import LayerReport

if TYPE_CHECKING:
    from typing_extensions import Unpack


def aono(
    model: nn.Module,
    gradients: Mapping[str, Tensor] | Sequence[Tensor],
    input_shape: Sequence[int],
    **options: Unpack[Options],
) -> Inversion:
    """Recovery from a fully connected layer with a bias [1]_: ``x = dW_f / db_f`` for any neuron f.

    ``dW_f = k_f x`` and ``db_f = k_f`` (section 3 of [1]_). All neurons are used,
    ``x = sum_f db_f dW_f / sum_f db_f^2``, and how well ``dW = db x^T`` fits is the layer's residual. For a batch the
    quotient is a mean of its samples, with weights that may be negative.

    Parameters
    ----------
    model : nn.Module
        What the gradients were computed with; left as it is.
    gradients : mapping of str to Tensor, or sequence of Tensor
        Of the loss, by parameter name or in parameter order.
    input_shape : sequence of int
        Shape of one sample.
    **options
        See ``rconv_fast.baselines.problem.Options``.

    Returns
    -------
    Inversion
        The inputs where the first layer is fully connected, else that layer's input among the `features`.

    References
    ----------
    .. [1] Phong, Aono, Hayashi, Wang, Moriai, "Privacy-Preserving Deep Learning via Additively Homomorphic
       Encryption", IEEE TIFS 2018, section 3.
    """
    with posed("aono", model, gradients, input_shape, options) as problem:
        chain = chain_of(problem.model, torch.zeros(1, *problem.input_shape).to(problem.like))
        seen = problem.observation.gradients
        usable = [
            i
            for i, link in enumerate(chain.links)
            if isinstance(link.module, nn.Linear)
            and f"{link.name}.weight" in seen
            and bool(seen.get(f"{link.name}.bias", torch.zeros(())).any())
        ]
        if not usable:
            return problem.stopped("", "no fully connected layer with a bias has a gradient", {}, [])
        first = usable[0]
        name = chain.links[first].name
        x, report = _quotient(name, seen[f"{name}.weight"], seen[f"{name}.bias"])
        ahead = chain.links[:first]
        if chain.broken or not all(isinstance(link.module, SHAPES_ONLY) for link in ahead):
            at = ahead[-1].name if ahead else name
            return problem.stopped(at, "the attack knows fully connected layers only", {name: x[None]}, [report])
        return _answer(problem, x.reshape(1, *problem.input_shape), name, report)


def _quotient(name: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, LayerReport]:
    start = time.perf_counter()
    x = weight.T @ bias / bias.square().sum()
    residual = float((weight - bias[:, None] * x).norm() / weight.norm()) if bool(weight.any()) else 0.0
    seconds = time.perf_counter() - start
    evidence = Evidence(len(x), len(x), weight.numel(), residual, 1.0, "division", "none")
    return x, LayerReport(name, "Linear", evidence, seconds)


def _answer(problem: Problem, x: Tensor, name: str, report: LayerReport) -> Inversion:
    labels = problem.labels
    if labels is None and problem.observation.loss.takes_labels and (last := last_layer(problem)):
        seen = problem.observation.gradients
        labels = label_of_one(seen[f"{last[0]}.weight"], seen.get(f"{last[0]}.bias"))
    notes = []
    if problem.batch_size > 1:
        notes.append(f"aono: of a batch of {problem.batch_size} the quotient is a weighted mean of the samples")
        labels = None
    if labels is None:
        return problem.stopped(name, "the label was not found, so the answer is not compared", {name: x}, [report])
    return problem.answer(x, labels[:1], notes=notes, layers=[report], features={name: x})
