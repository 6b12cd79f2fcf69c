"""Defences by strength: what they should leave, and what they leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rconv_fast import defenses
from rconv_fast.audit.attempt import nearness
from rconv_fast.audit.noise import shared_bound
from rconv_fast.audit.probe import make_probe
from rconv_fast.audit.structure import checked_shape, read_structure
from rconv_fast.invert import invert
from rconv_fast.losses import Loss
from rconv_fast.observation import SharedGradients
from rconv_fast.report.pictures import is_image, pixels
from rconv_fast.report.png import data_uri
from rconv_fast.wrappers import unwrap

Defence = Callable[[Mapping[str, Tensor]], SharedGradients]


@dataclass(frozen=True)
class DefenceRow:
    r"""One defence at one strength.

    Attributes
    ----------
    defence : str
        Its name and strength.
    predicted_psnr : float or None
        No unbiased estimate is better (Cramer-Rao with the noise that the defence names), peak 1, in dB.
    reached_psnr : float
        Of what `invert` made of the probe; -inf where it returned no inputs.
    verdict : str
        Of the inversion.
    verified : bool
    inputs : Tensor or None
        What was recovered, (B, \*input_shape), to be looked at.
    """

    defence: str
    predicted_psnr: float | None
    reached_psnr: float
    verdict: str
    verified: bool
    inputs: Tensor | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without what was recovered."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "inputs"}

    @property
    def sentence(self) -> str:
        """The row as text."""
        predicted = "no bound" if self.predicted_psnr is None else f"{self.predicted_psnr:.1f} dB at best"
        verified = "verified" if self.verified else "not verified"
        return f"{self.defence}: {predicted}, {self.reached_psnr:.1f} dB reached ({self.verdict}, {verified})"


def usual_defences(seed: int = 0) -> dict[str, Defence]:
    """Noise of four sizes (of each gradient's root mean square), three roundings, two sparsities, clipping, signs."""

    def noisy(size: float) -> Defence:
        generator = torch.Generator().manual_seed(seed)
        return lambda g: defenses.gaussian(g, size, relative=True, generator=generator)

    def rounded(dtype: torch.dtype) -> Defence:
        return lambda g: defenses.quantise(g, dtype)

    def sparse(share: float) -> Defence:
        return lambda g: defenses.top_k(g, share)

    return {
        **{f"gaussian {size:g}": noisy(size) for size in (1e-6, 1e-4, 1e-2, 1.0)},
        **{name: rounded(getattr(torch, name)) for name in ("float16", "bfloat16", "int8")},
        **{f"top-k {share:g}": sparse(share) for share in (0.5, 0.1)},
        "clip 0.01": lambda g: defenses.clip(g, 0.01),
        "sign": defenses.sign,
    }


def defence_table(
    model: nn.Module,
    input_shape: Sequence[int],
    defences: Mapping[str, Defence] | None = None,
    *,
    batch_size: int = 1,
    loss: str = "cross_entropy",
    probe: Tensor | tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    time_limit: float = 30.0,
) -> list[DefenceRow]:
    """Apply defences to a probe's gradients; say what the bound predicts and what the recovery reaches.

    Parameters
    ----------
    model, input_shape, batch_size, loss, probe, seed
        As in `audit`.
    defences : mapping of str to callable, optional
        By name, from gradients to `SharedGradients`; `usual_defences` if not given.
    time_limit : float
        Seconds a defence.

    Returns
    -------
    list of DefenceRow
        The first is no defence at all.
    """
    shape = checked_shape("defence_table", model, input_shape)
    model, objective = unwrap(model), Loss(loss)
    graph = read_structure(model, shape)
    batch = make_probe(graph, model, shape, batch_size, objective, probe, seed)
    gradients = batch.gradients(model, objective)
    rows = []
    for name, defence in {"none": SharedGradients, **(usual_defences(seed) if defences is None else defences)}.items():
        shared = defence(gradients)
        found = invert(model, shared, shape, batch_size=batch_size, loss=loss, time_limit=time_limit)
        predicted = shared_bound(model, objective, batch, shared).psnr if shared.noise or name != "none" else math.inf
        reached = nearness(found.inputs, batch.inputs)
        rows.append(DefenceRow(name, predicted, reached, found.verdict, found.verified, found.inputs))
    return rows


def recovered_pictures(rows: Sequence[DefenceRow]) -> list[dict[str, str]]:
    """What was recovered behind each defence, side by side: the first sample, where it is a picture."""
    return [
        {"title": row.defence, "uri": data_uri(pixels(row.inputs[0])), "caption": row.sentence.partition(": ")[2]}
        for row in rows
        if row.inputs is not None and is_image(row.inputs[0])
    ]


def to_markdown(rows: Sequence[DefenceRow]) -> str:
    """The table for a report."""
    lines = ["| defence | predicted, dB | reached, dB | verdict | verified |", "|---|---|---|---|---|"]
    for row in rows:
        predicted = "-" if row.predicted_psnr is None else f"{row.predicted_psnr:.1f}"
        verified = "yes" if row.verified else "no"
        lines.append(f"| {row.defence} | {predicted} | {row.reached_psnr:.1f} | {row.verdict} | {verified} |")
    return "\n".join(lines) + "\n"
