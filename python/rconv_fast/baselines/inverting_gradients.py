"""Inverting Gradients: cosine distance and total variation, lowered by signed Adam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rconv_fast.baselines.labels import given_or_read
from rconv_fast.baselines.matching import Descent, Objective, best_of, cosine, descend
from rconv_fast.baselines.problem import Options, posed
from rconv_fast.errors import require
from rconv_fast.result import Inversion

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The learning rate falls to a tenth after these shares of the steps.
DECAYS = (3 / 8, 5 / 8, 7 / 8)


def inverting_gradients(
    model: nn.Module,
    gradients: Mapping[str, Tensor] | Sequence[Tensor],
    input_shape: Sequence[int],
    *,
    steps: int = 4800,
    restarts: int = 1,
    lr: float = 0.1,
    tv: float = 1e-4,
    box: tuple[float, float] | None = None,
    start: Tensor | None = None,
    held: Tensor | None = None,
    features: Mapping[str, Tensor] | None = None,
    **options: Unpack[Options],
) -> Inversion:
    r"""Inverting Gradients [1]_: match the direction of the gradients, prefer smooth pictures.

    Minimises ``1 - <g, g*> / (||g|| ||g*||) + tv * TV(x)`` (equation 4 of [1]_) by Adam on the sign of its gradient,
    with a learning rate that falls to a tenth after 3/8, 5/8 and 7/8 of the steps.

    Parameters
    ----------
    model : nn.Module
        What the gradients were computed with; left as it is.
    gradients : mapping of str to Tensor, or sequence of Tensor
        Of the loss, by parameter name or in parameter order.
    input_shape : sequence of int
        Shape of one sample.
    steps : int
        Of Adam. The authors take 4800 for 32x32 and 24000 for larger pictures.
    restarts : int
        From so many starts; the least objective counts.
    lr : float
        First learning rate.
    tv : float
        Weight of the total variation. The authors take 1e-6 to 1e-1, by network.
    box : (float, float), optional
        Least and largest value of an input, to which every step is brought back.
    start : Tensor, shape (B, \*input_shape), optional
        Where the first descent begins, instead of standard normal numbers.
    held : Tensor, bool, broadcastable to `start`, optional
        Values of `start` that are known and stay as they are.
    features : mapping of str to Tensor, shape (B, ...), optional
        Inputs of layers, by the layer's name, that are known; their relative distance is added to the objective.
    **options
        See ``rconv_fast.baselines.problem.Options``. Labels that are not given are read from the last layer first.

    Returns
    -------
    Inversion
        With verdict "approximate"; `determined` where it was held.

    References
    ----------
    .. [1] Geiping, Bauermeister, Dröge, Moeller, "Inverting Gradients", NeurIPS 2020, sections 4 and 5.
    """
    name = "inverting_gradients"
    require(held is None or start is not None, name, "start", "be given with held", None)
    with posed(name, model, gradients, input_shape, options) as problem:
        labels = given_or_read(problem)
        shape = (problem.batch_size, *problem.input_shape)
        if start is not None:
            require(tuple(start.shape) == shape, name, "start", f"have shape {shape}", tuple(start.shape))
            start = start.detach().to(problem.like)

        def project(x: Tensor) -> None:
            if box is not None:
                x.clamp_(*box)

        known = {name: value.detach().to(problem.like) for name, value in (features or {}).items()}
        objective = Objective(problem, cosine, weight=tv, start=start, held=held, features=known)

        def attempt(generator: torch.Generator, first: bool) -> Descent:
            x = start.clone() if first and start is not None else problem.normal(shape, generator)
            x = x.requires_grad_()
            optimiser = torch.optim.Adam([x], lr=lr)
            return descend(
                lambda: objective(x, labels),
                [x],
                optimiser,
                problem,
                steps=steps,
                stage="signed Adam",
                schedule=torch.optim.lr_scheduler.MultiStepLR(optimiser, [int(steps * share) for share in DECAYS]),
                direction=torch.sign,
                project=lambda: project(x),
            )

        best = best_of(problem, restarts, attempt)
        return problem.answer(objective.inputs(best.variables[0]), labels, held=held)
