"""One inversion of the command line: with progress, to its end or to Ctrl-C, and everything known into its folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import rconv_fast
from rconv_fast import progress
from rconv_fast.cli import DONE, INTERRUPTED, LESS, screen
from rconv_fast.errors import InterruptedInversionError
from rconv_fast.report import files, page, payload, pictures
from rconv_fast.result import Inversion


@dataclass(frozen=True)
class Outcome:
    """An inversion, how long it took, and whether Ctrl-C ended it."""

    inversion: Inversion
    seconds: float
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """Of the process."""
        if self.interrupted:
            return INTERRUPTED
        return DONE if self.inversion.verified else LESS


def invert(model: nn.Module, gradients: Any, shape: tuple[int, ...], **options: Any) -> Outcome:
    """Run ``rconv_fast.invert`` behind a progress display; all it is given are the model, the gradients and a shape."""
    start, interrupted = time.perf_counter(), False
    with progress.display() as show:
        try:
            found = rconv_fast.invert(model, gradients, shape, progress=show, **options)
        except InterruptedInversionError as error:
            found, interrupted = error.inversion, True
    return Outcome(found, time.perf_counter() - start, interrupted)


def assumptions(loss: str, training: bool, noise: float | None, source: str) -> list[str]:
    """What an answer rests on, a sentence each."""
    mode = "training" if training else "evaluation"
    size = "that of the arithmetic and of what is known of their way" if noise is None else f"{noise:g} of each tensor"
    return [
        f"The model and its parameters are those the client computed with, in {mode} mode.",
        f"The gradients are of one client and one batch ({source}), of the loss {loss}.",
        f"Their noise is {size}.",
        "No assumption is made about the data.",
    ]


def report(
    folder: Path, outcome: Outcome, seen: Mapping[str, Mapping[str, Tensor]], picture: Path | None, **more: Any
) -> list[Path]:
    """Write report.json, report.html, and what was recovered, whatever the verdict; say which files.

    Parameters
    ----------
    folder : Path
        Of the run.
    outcome : Outcome
        What was found.
    seen : mapping
        What went in, by name (``state``, ``gradients``): its digests go into the report.
    picture : Path, optional
        A picture that the caller has drawn; recovered.png is drawn if not.
    **more
        Further entries of the report.
    """
    inversion = outcome.inversion
    data = {
        **payload.of_inversion(inversion),
        "seconds": outcome.seconds,
        "interrupted": outcome.interrupted,
        **more,
        "sha256": {name: payload.digest(tensors) for name, tensors in seen.items()},
        "environment": payload.environment(),
    }
    files.save_report(folder / "report.json", data)
    shown = {**data, "pictures": page.inversion_pictures(inversion)}
    files.write_private(folder / "report.html", page.render("inversion", shown))
    written = [folder / "report.html", folder / "report.json"]
    if inversion.inputs is not None:
        kept = {"labels": inversion.labels, "determined": inversion.determined, "uncertainty": inversion.uncertainty}
        files.save_tensors(folder / "inputs.safetensors", {"inputs": inversion.inputs, **kept})
        written.append(folder / "inputs.safetensors")
        if picture is None:
            picture = folder / "recovered.png"
            pictures.save_batch(picture, inversion)
    elif inversion.features or inversion.tokens is not None:
        known = {f"input of {layer}": value for layer, value in inversion.features.items()}
        more_known = {"labels": inversion.labels, "label_counts": inversion.label_counts, "tokens": inversion.tokens}
        files.save_tensors(folder / "features.safetensors", {**known, **more_known})
        written.append(folder / "features.safetensors")
    return written if picture is None else [picture, *written]


def finish(outcome: Outcome, said: str, written: Sequence[Path]) -> int:
    """Print the outcome and return the exit code."""
    screen.print_inversion(outcome.inversion, outcome.seconds, said, written)
    return outcome.exit_code
