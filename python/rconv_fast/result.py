"""What `invert` hands back: whatever the gradients give away, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rconv_fast.walk.report import LayerReport


@dataclass(frozen=True)
class Sample:
    """One recovered sample.

    Attributes
    ----------
    label : int, float, list or None
        Its class, or its target where the loss is no classification.
    certificate : float
        Relative residual of the equations of the head that it alone must satisfy.
    multiplicity : int
        How often it occurs in the batch.
    status : {"exact", "approximate", "features"}
        Proven up to the noise, with error bars only, or known only as features of the last layers.
    error : float
        Predicted root mean square error of its input values, from error bars or from rounding (inf where open).
    """

    label: object
    certificate: float
    multiplicity: int = 1
    status: str = "features"
    error: float = math.inf


@dataclass(frozen=True)
class Inversion:
    r"""What the gradients give away.

    Attributes
    ----------
    verdict : {"exact", "approximate", "partial", "features", "nothing"}
        Everything proven, up to the noise; inputs with error bars, not proven unique; some samples or values proven;
        no inputs but features, labels, tokens or counts; nothing.
    verified : bool
        The inputs reproduce all gradients to within the noise, everything is determined, and no other reading
        does too.
    inputs : Tensor or None
        Recovered inputs (B, \*input_shape).
    labels : Tensor or None
        Their labels (targets for regression), (B, ...).
    layers : list of LayerReport
        One entry a solved layer, in the order they were solved (last layer first).
    gradient_residual : float
        Relative mismatch of all gradients when the model is run on `inputs` and `labels`; of one sample whose bias
        gradient shows the gradient of the logits, back-propagated from that.
    noise_ratio : float
        The same in units of the noise: 1 is what a true answer has.
    determined : Tensor or None
        Bool (B, \*input_shape): proven to be fixed by the equations.
    uncertainty : Tensor or None
        (B, \*input_shape): predicted standard deviation of each value, under the noise (inf where open) or, where
        a hidden pattern leaves a picture open, under the prior that chose it.
    samples : list of Sample
        One entry a sample of the batch.
    batch_size : int or None
        Samples behind the gradients, as far as it follows.
    label_counts : Tensor or None
        How many samples each class has (n,), also where the samples cannot be separated.
    features : mapping of str to Tensor
        Recovered input of each layer, by layer name.
    tokens : Tensor or None
        The ids that an embedding's gradient lists.
    stops_at, reason : str or None, str
        Layer and one sentence, where the recursion stopped.
    scale : float
        Factor by which the gradients are multiplied, given or found.
    notes : list of str
        What a reader must know, each a sentence with what to do.
    """

    verdict: str
    verified: bool = False
    inputs: Tensor | None = None
    labels: Tensor | None = None
    layers: list[LayerReport] = field(default_factory=list)
    gradient_residual: float = math.inf
    noise_ratio: float = math.inf
    determined: Tensor | None = None
    uncertainty: Tensor | None = None
    samples: list[Sample] = field(default_factory=list)
    batch_size: int | None = None
    label_counts: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    stops_at: str | None = None
    reason: str = ""
    scale: float = 1.0
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The result and one line a layer, as text."""
        from rconv_fast.report.text import summarise

        return summarise(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The result without the recovered values, as JSON with a schema; written to `path` if one is given."""
        from rconv_fast.report import files, payload

        text = payload.to_json(payload.of_inversion(self))
        if path is not None:
            files.write_private(Path(path), text)
        return text

    def to_html(self, path: str | Path) -> None:
        """Write the result, with pictures of the samples, as one self-contained page."""
        from rconv_fast.report import files, page, payload

        shown = {
            **payload.of_inversion(self),
            "pictures": page.inversion_pictures(self),
            "environment": payload.environment(),
        }
        files.write_private(Path(path), page.render("inversion", shown))
