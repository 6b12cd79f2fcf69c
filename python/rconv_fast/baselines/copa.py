"""COPA: a layer-wise analytic answer, corrected by gradient matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rconv_fast.baselines.chain import Chain, chain_of, recurse
from rconv_fast.baselines.labels import label_of_one
from rconv_fast.baselines.matching import Objective, descend, squared
from rconv_fast.baselines.problem import Options, Problem, posed
from rconv_fast.baselines.rgap import LOGISTIC, Head, best_reading, logistic_heads
from rconv_fast.errors import require
from rconv_fast.result import Inversion

if TYPE_CHECKING:
    from typing_extensions import Unpack


def copa(
    model: nn.Module,
    gradients: Mapping[str, Tensor] | Sequence[Tensor],
    input_shape: Sequence[int],
    *,
    steps: int = 100,
    **options: Unpack[Options],
) -> Inversion:
    """Combined optimisation attack [1]_: constraints layer by layer, then gradient matching [2]_.

    For one sample and a chain of layers. Each layer's input minimises ``||W x - z||^2 + ||K(k) x - dW||^2``, weight and
    gradient constraints together (R-GAP's recursion; behind a ReLU only the active outputs give weight constraints).
    From there L-BFGS lowers ``||grad(x) - grad*||^2`` over the network's input, where the papers match layer by layer.
    Where the recursion ends early, the descent starts from standard normal numbers.

    Parameters
    ----------
    model : nn.Module
        What the gradients were computed with; left as it is.
    gradients : mapping of str to Tensor, or sequence of Tensor
        Of the loss, by parameter name or in parameter order.
    input_shape : sequence of int
        Shape of one sample.
    steps : int
        Of L-BFGS.
    **options
        See ``rconv_fast.baselines.problem.Options``.

    Returns
    -------
    Inversion
        With verdict "approximate"; the notes say from which gradient mismatch the descent began.

    Raises
    ------
    ArgumentError
        For a batch, or a last layer that does not tell the label.

    References
    ----------
    .. [1] Chen, Campbell, "Understanding Training-Data Leakage from Gradients in Neural Networks for Image
       Classification", 2021 (arXiv 2111.10178), section 2.
    .. [2] Chen, Campbell, "Analysing Training-Data Leakage from Gradients through Linear Systems and Gradient
       Matching", BMVC 2022 (arXiv 2210.13231), section 3.
    """
    with posed("copa", model, gradients, input_shape, options) as problem:
        require(problem.batch_size == 1, "copa", "batch_size", "be 1", problem.batch_size)
        chain = chain_of(problem.model, torch.zeros(1, *problem.input_shape).to(problem.like))
        heads = _heads(problem, chain)
        require(bool(heads), "copa", "model", "end in a linear layer that tells the gradient of its outputs", "another")
        readings = [(h, recurse(problem, chain, h.gradient, through_flats=True)) for h in heads]
        start = best_reading(problem, readings)
        return _matched(problem, start, heads[0], steps)


def _heads(problem: Problem, chain: Chain) -> list[Head]:
    """Readings of the last layer: one logit as in R-GAP, or the bias' gradient, which is that of the logits."""
    if problem.observation.loss.name == LOGISTIC:
        return logistic_heads(problem, chain)
    last, seen = chain.links[-1] if chain.links else None, problem.observation.gradients
    if last is None or f"{last.name}.bias" not in seen or not problem.observation.loss.takes_labels:
        return []
    bias = seen[f"{last.name}.bias"]
    label = label_of_one(seen[f"{last.name}.weight"], bias) if problem.labels is None else problem.labels
    return [Head(bias.reshape(1, -1), int(label))]


def _matched(problem: Problem, start: Inversion, head: Head, steps: int) -> Inversion:
    targets = torch.tensor([head.label], device=problem.like.device) if start.labels is None else start.labels
    generator = torch.Generator().manual_seed(problem.seed)
    shape = (1, *problem.input_shape)
    begin = problem.normal(shape, generator) if start.inputs is None else start.inputs
    x = begin.clone().requires_grad_()
    objective = Objective(problem, squared)
    optimiser = torch.optim.LBFGS([x], line_search_fn="strong_wolfe")
    best = descend(lambda: objective(x, targets), [x], optimiser, problem, steps=steps, stage="L-BFGS")
    note = (
        f"the recursion ended at {start.stops_at}: {start.reason}; the descent began from noise"
        if start.inputs is None
        else f"the descent began at a gradient mismatch of {start.gradient_residual:.1e}"
    )
    found = problem.answer(best.variables[0], targets, notes=[note], layers=start.layers, features=start.features)
    if start.inputs is not None and start.gradient_residual <= found.gradient_residual:
        return start
    return found
