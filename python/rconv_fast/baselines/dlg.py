"""DLG and iDLG: gradient matching by L-BFGS from noise, with the labels unknown or read first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rconv_fast.baselines.labels import given_or_read
from rconv_fast.baselines.matching import Descent, Objective, best_of, descend, squared
from rconv_fast.baselines.problem import Options, Problem, posed
from rconv_fast.errors import require
from rconv_fast.result import Inversion

if TYPE_CHECKING:
    from typing_extensions import Unpack


def dlg(
    model: nn.Module,
    gradients: Mapping[str, Tensor] | Sequence[Tensor],
    input_shape: Sequence[int],
    *,
    steps: int = 300,
    restarts: int = 1,
    **options: Unpack[Options],
) -> Inversion:
    """Deep Leakage from Gradients [1]_: match the gradients over inputs and labels together.

    Minimises ``||grad(x, softmax(y)) - grad*||^2`` over x and y by L-BFGS with learning rate 1 and a history of 100,
    from standard normal x and y (algorithm 1 of [1]_). It works for smooth activations; behind a ReLU the second
    derivatives that it descends along vanish and it mostly diverges.

    Parameters
    ----------
    model : nn.Module
        What the gradients were computed with; left as it is.
    gradients : mapping of str to Tensor, or sequence of Tensor
        Of the loss, by parameter name or in parameter order.
    input_shape : sequence of int
        Shape of one sample.
    steps : int
        Of L-BFGS, each of up to 20 evaluations.
    restarts : int
        From so many starts; the least distance counts.
    **options
        See ``rconv_fast.baselines.problem.Options``. With `labels`, only x is varied.

    Returns
    -------
    Inversion
        With verdict "approximate"; whether it converged shows in its `gradient_residual`.

    References
    ----------
    .. [1] Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019, section 3.
    """
    with posed("dlg", model, gradients, input_shape, options) as problem:
        return _lbfgs(problem, problem.labels, steps, restarts)


def idlg(
    model: nn.Module,
    gradients: Mapping[str, Tensor] | Sequence[Tensor],
    input_shape: Sequence[int],
    *,
    steps: int = 300,
    restarts: int = 1,
    **options: Unpack[Options],
) -> Inversion:
    """Improved DLG [1]_: the label of one sample from the last layer's signs, then DLG over x alone.

    Of the last layer's rows ``dW_i = g_i h`` with ``g_i = p_i - [i = y]`` only the label's has the other sign:
    ``<dW_i, dW_y> <= 0`` for all ``i != y``. Then ``||grad(x, y) - grad*||^2`` is minimised over x as in `dlg`.

    Parameters
    ----------
    model : nn.Module
        What the gradients were computed with; left as it is.
    gradients : mapping of str to Tensor, or sequence of Tensor
        Of the loss, by parameter name or in parameter order.
    input_shape : sequence of int
        Shape of one sample.
    steps : int
        Of L-BFGS, each of up to 20 evaluations.
    restarts : int
        From so many starts; the least distance counts.
    **options
        See ``rconv_fast.baselines.problem.Options``.

    Returns
    -------
    Inversion
        With verdict "approximate".

    Raises
    ------
    ArgumentError
        For a batch without labels: the signs tell one label only.

    References
    ----------
    .. [1] Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020, sections 3.1 and 3.2.
    """
    with posed("idlg", model, gradients, input_shape, options) as problem:
        one = problem.batch_size == 1 or problem.labels is not None
        require(one, "idlg", "batch_size", "be 1 where no labels are given", problem.batch_size)
        return _lbfgs(problem, given_or_read(problem), steps, restarts)


def _lbfgs(problem: Problem, labels: Tensor | None, steps: int, restarts: int) -> Inversion:
    objective = Objective(problem, squared)
    shape = (problem.batch_size, *problem.input_shape)
    relax = None if labels is not None else _relaxed(problem)

    def targets(variables: Sequence[Tensor]) -> Tensor:
        if relax is not None:
            return relax(variables[1])
        assert labels is not None
        return labels

    def attempt(generator: torch.Generator, _: bool) -> Descent:
        variables = [problem.normal(shape, generator)]
        if relax is not None:
            variables.append(problem.normal(problem.outputs(variables[0]).shape, generator))
        variables = [v.requires_grad_() for v in variables]
        optimiser = torch.optim.LBFGS(variables)  # learning rate 1, history 100, 20 evaluations a step, as the authors

        def value() -> Tensor:
            return objective(variables[0], targets(variables))

        return descend(value, variables, optimiser, problem, steps=steps, stage="L-BFGS")

    best = best_of(problem, restarts, attempt)
    found = targets(best.variables)
    classes = relax is not None and problem.observation.loss.takes_labels
    notes = [f"dlg: L-BFGS left the finite numbers at step {best.steps}"] if best.diverged else []
    return problem.answer(best.variables[0], found.argmax(1) if classes else found, notes=notes)


def _relaxed(problem: Problem) -> Callable[[Tensor], Tensor]:
    """From any numbers to targets that the loss takes: probabilities of classes, or values."""
    name = problem.observation.loss.name
    require(name != "nll", problem.function, "labels", "be given with loss 'nll', which takes no probabilities", None)
    if name == "cross_entropy":
        return lambda values: values.softmax(1)
    return torch.sigmoid if name.startswith("binary") else lambda values: values
