"""Gradient matching that starts from what the exact method knows, for networks it cannot pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rconv_fast.baselines.inverting_gradients import inverting_gradients
from rconv_fast.baselines.problem import Options
from rconv_fast.errors import ArgumentError
from rconv_fast.result import Inversion

if TYPE_CHECKING:
    from typing_extensions import Unpack


def continued(
    known: Inversion,
    model: nn.Module,
    gradients: Mapping[str, Tensor] | Sequence[Tensor],
    input_shape: Sequence[int],
    **options: Unpack[Options],
) -> Inversion:
    """`inverting_gradients` with the labels of `known`, from its inputs, what is proven of them held.

    Where the recursion did not come to the inputs, those of the layers behind, as far as it came, draw the descent.

    Parameters
    ----------
    known : Inversion
        What the exact method found.
    model, gradients, input_shape, **options
        As in `inverting_gradients`.

    Returns
    -------
    Inversion
        `known` with the inputs that match the gradients better, and verdict "approximate"; `known` itself where it is
        verified, or where no better inputs were found; a note says so where labels are missing.
    """
    if known.verified:
        return known
    if known.labels is not None and options.get("batch_size") in (None, len(known.labels)):
        options["labels"] = known.labels
    where: dict[str, Any] = (
        {"features": _fixed(known)} if known.inputs is None else {"start": known.inputs, "held": known.determined}
    )
    try:
        found = inverting_gradients(model, gradients, input_shape, **where, **options)
    except ArgumentError as error:  # invert has checked what it was given: this is what the descent lacks
        return replace(known, notes=[*known.notes, f"gradient matching was not tried: {error}"])
    if found.inputs is None or not found.gradient_residual < known.gradient_residual:
        return known
    note = "the inputs come from gradient matching, from what the equations say: nothing proves that no others match"
    return replace(
        known,
        verdict="approximate",
        inputs=found.inputs,
        labels=known.labels if known.labels is not None else found.labels,
        gradient_residual=found.gradient_residual,
        noise_ratio=found.noise_ratio,
        determined=found.determined,
        uncertainty=None,
        batch_size=known.batch_size or len(found.inputs),
        samples=[replace(sample, status="approximate") for sample in known.samples] or found.samples,
        notes=[*known.notes, note],
    )


def _fixed(known: Inversion) -> dict[str, Tensor]:
    """The inputs of layers that belong to the samples found, without those that a layer's equations left open."""
    open_layers = {layer.name for layer in known.layers if layer.proof == "none"}
    size = known.batch_size if known.labels is None else len(known.labels)
    return {n: f for n, f in known.features.items() if n not in open_layers and len(f) == size and bool(f.any())}
