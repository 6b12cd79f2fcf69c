"""What an audit found, as a value: for a program, for a page, for a model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rconv_fast.audit.advice import Advice
from rconv_fast.audit.defences import DefenceRow, recovered_pictures
from rconv_fast.audit.defences import to_markdown as defences_to_markdown
from rconv_fast.audit.leak_map import describe, leak_picture
from rconv_fast.audit.privacy import PrivacyRow
from rconv_fast.audit.privacy import to_markdown as privacy_to_markdown
from rconv_fast.audit.rank import LayerRank
from rconv_fast.report.files import write_private

SCHEMA = "rconv_fast.audit/1"
VERDICTS = ("exact", "partial", "features only", "none found", "not covered")
MEANING = {
    "exact": "every value of every sample follows from the gradients",
    "partial": "some samples or values follow from the gradients, the rest are open",
    "features only": "inputs of the last layers and labels follow from the gradients, the inputs themselves do not",
    "none found": "this package finds no sample in the gradients",
    "not covered": "this package has no exact method for a layer; that does not make the model safe",
}


@dataclass(frozen=True)
class AuditReport:
    r"""What the gradients of a model would give away.

    Attributes
    ----------
    verdict : {"exact", "partial", "features only", "none found", "not covered"}
        For a batch of `batch_size`. ``"not covered"`` is not "safe".
    reason : str
        Why, in one sentence.
    max_batch_size : int
        The largest batch of which every sample is recovered (0: none): by the count of equations, with ``run=True`` as
        tried on made-up batches; `assumptions` says which.
    stops_at : str or None
        The layer at which the recursion ends, or None.
    layers : list of LayerRank
        The equations of every layer, in forward order.
    predicted_psnr : float or None
        What no unbiased estimate can beat at the given noise (Cramer-Rao), peak 1, in dB; inf without noise where the
        verdict is exact, None where it isn't known.
    leak_map : Tensor or None
        (\*input_shape): predicted standard deviation of each input value, inf where it is open.
    advice : list of Advice
        The smallest changes that break an exact recovery.
    assumptions : list of str
        What the audit took for granted. A reader must know them.
    batch_size : int
    noise : float
        Relative to each gradient's root mean square; nan where it was given entry by entry.
    weights : {"untrained", "random", "trained"}
        What the parameters look like.
    tried : str
        What `invert` said of the probe; empty if it was not run.
    defences : sequence of DefenceRow
        What usual defences would leave, where that was asked for.
    privacy : sequence of PrivacyRow
        Differential privacy beside it: ``dataclasses.replace(report, privacy=privacy_table(...))``.
    model : dict
        Name, number of parameters, input shape, hash of the state.
    versions : dict
    seconds : float
    max_batch_by_count : int
        The largest batch whose every layer is determined by the count of equations.
    """

    verdict: str
    reason: str
    max_batch_size: int
    stops_at: str | None
    layers: list[LayerRank]
    predicted_psnr: float | None
    leak_map: Tensor | None
    advice: list[Advice]
    assumptions: list[str]
    batch_size: int = 1
    noise: float = 0.0
    weights: str = "trained"
    tried: str = ""
    defences: Sequence[DefenceRow] = ()
    privacy: Sequence[PrivacyRow] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    max_batch_by_count: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; numbers that are not finite are None, of the map there is its shape and a sentence."""
        from rconv_fast.report.payload import plain

        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        own["layers"] = [_layer(layer) for layer in self.layers]
        own["advice"] = [asdict(advice) for advice in self.advice]
        own["defences"] = [row.to_dict() for row in self.defences]
        own["privacy"] = [asdict(row) for row in self.privacy]
        if self.leak_map is not None:
            own["leak_map"] = {"shape": list(self.leak_map.shape), "values": describe(self.leak_map)}
        found: dict[str, Any] = plain({"schema": SCHEMA, "meaning": MEANING[self.verdict], **own})
        return found

    def to_json(self, path: str | Path | None = None) -> str:
        """The same as JSON text, written to `path` if given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            write_private(Path(path), text + "\n")
        return text

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page, with the leak map and what defences left as pictures."""
        write_private(Path(path), self.to_page())

    def to_page(self) -> str:
        """The page as text."""
        from rconv_fast.report.page import render

        return render("audit", self._for_a_page())

    def _for_a_page(self) -> dict[str, Any]:
        """The same with sentences for advice, a picture of the map, and the columns that a reader wants."""
        from rconv_fast.report.png import data_uri

        payload = self.to_dict()
        model = payload.pop("model")
        pixels = None if self.leak_map is None else leak_picture(self.leak_map)
        pictures = []
        if pixels is not None and self.leak_map is not None:
            title = "Leak map: what is known of each place of the input (red: exactly, pale: nothing)"
            pictures = [{"title": title, "uri": data_uri(pixels), "caption": describe(self.leak_map)}]
        pictures += recovered_pictures(self.defences)
        lines = _lines(self.layers)
        return {
            **{name: value for name, value in payload.items() if name not in ("leak_map", "versions", "meaning")},
            "predicted_psnr": self._bound(),
            "advice": [advice.sentence for advice in self.advice],
            "layers": [dict(zip(lines[0], line, strict=True)) for line in lines[1:]],
            "pictures": pictures,
            "sha256": {"state of the model": model.pop("state_sha256", None)},
            "settings": model,
            "environment": payload["versions"],
        }

    def summary(self) -> str:
        """Verdict, layers, advice and assumptions as text."""
        lines = [f"{self.verdict}: {MEANING[self.verdict]}", f"  {self.reason}"]
        lines += [f"  largest batch recovered whole: {self.max_batch_size}; {self._bound()}", ""]
        lines += [f"  {line}" for line in _aligned(_lines(self.layers))]
        lines += ["", *(f"  {row.sentence}" for row in self.defences)] if self.defences else []
        lines += ["", *(f"to break it: {advice.sentence}" for advice in self.advice)]
        lines += [f"assumed: {assumption}" for assumption in self.assumptions]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """For a model card."""
        name = self.model.get("name", "model")
        rows = _lines(self.layers, "A", "B")
        body = [f"| {' | '.join(row)} |" for row in rows]
        lines = [
            f"## Gradient leakage of {name}",
            "",
            f"**{self.verdict}**: {MEANING[self.verdict]}. {self.reason}",
            "",
            f"Batch size {self.batch_size}; largest batch recovered whole: {self.max_batch_size}. {self._bound()}",
            "",
            body[0],
            "|" + "---|" * len(rows[0]),
            *body[1:],
            "",
            *((*defences_to_markdown(self.defences).splitlines(), "") if self.defences else ()),
            *((*privacy_to_markdown(self.privacy).splitlines(), "") if self.privacy else ()),
            *(f"* To break it: {advice.sentence}" for advice in self.advice),
            *(f"* Assumed: {assumption}" for assumption in self.assumptions),
            f"* Made with {', '.join(f'{k} {v}' for k, v in self.versions.items())} in {self.seconds:.1f} s",
        ]
        return "\n".join(lines) + "\n"

    def _bound(self) -> str:
        if self.predicted_psnr is None:
            return "no bound computed"
        if math.isinf(self.predicted_psnr):
            return "no noise" if self.predicted_psnr > 0 else "the gradients leave values open at any noise"
        return f"at this noise no unbiased estimate is better than {self.predicted_psnr:.1f} dB"


def _layer(layer: LayerRank) -> dict[str, Any]:
    return {**asdict(layer), "phases": [phase._asdict() for phase in layer.phases]}


def _lines(layers: Sequence[LayerRank], weights: str = "|A|", gradients: str = "|B|") -> list[tuple[str, ...]]:
    """The head of the table and one line a layer; the paper's count beside the bound."""
    head = ("layer", "kind", weights, gradients, "unknowns", "paper", "rank at most", "determined", "remark")
    return [
        head,
        *(
            (
                layer.name[:32],
                layer.kind[:24],
                *(f"{n}" for n in (layer.weight_constraints, layer.gradient_constraints, layer.unknowns)),
                "yes" if layer.paper_says else "no",
                f"{layer.rank_bound}",
                "yes" if layer.determined else ("no" if layer.covered else "not covered"),
                layer.reason or layer.pattern,
            )
            for layer in layers
        ),
    ]


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
