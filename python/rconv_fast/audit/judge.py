"""The verdict on a model: the count of equations, corrected by what a probe shows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from rconv_fast.audit.advice import advise
from rconv_fast.audit.attempt import CHEAP, attempt
from rconv_fast.audit.batches import LargestBatch, counted_batch, most_of_three, tried_batch
from rconv_fast.audit.defences import Defence, defence_table
from rconv_fast.audit.finding import Finding, judge
from rconv_fast.audit.noise import predict
from rconv_fast.audit.probe import make_probe, measure
from rconv_fast.audit.rank import LayerRank, count_layers
from rconv_fast.audit.report import AuditReport
from rconv_fast.audit.structure import checked_shape, read_structure
from rconv_fast.audit.weights import describe_weights
from rconv_fast.errors import UnsupportedModelError, require, require_type
from rconv_fast.losses import Loss
from rconv_fast.observation import Noise
from rconv_fast.report.payload import digest, environment
from rconv_fast.walk.graph import Graph
from rconv_fast.wrappers import unwrap

ASSUMED = (
    "the model's parameters and mode are those the client used; the gradients are of one step on one batch",
    "who sees the gradients is honest but curious: no parameter was chosen to leak more",
    "recovery is exact and analytic; what a picture prior or an optimiser would guess beyond it is not judged",
)


def audit(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    batch_size: int = 1,
    loss: str = "cross_entropy",
    noise: float | Noise = 0.0,
    probe: Tensor | tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    run: bool | None = None,
    advice: bool = True,
    defences: bool | Mapping[str, Defence] = False,
) -> AuditReport:
    r"""Say what the gradients of a model would give away, without any private data.

    The equations of every layer are counted (`rank_analysis`), with the share of dead units that a made-up batch
    shows; where that is cheap, the whole recovery is run on that batch, and decides.

    Parameters
    ----------
    model : nn.Module
        With the parameters and in the mode that a client would use. It is left untouched.
    input_shape : sequence of int
        Shape of one sample, without the batch.
    batch_size : int
        Samples behind one shared gradient.
    loss : str
        As in `invert`.
    noise : float or mapping of str to float or Tensor
        Standard deviation of what is added to the gradients: relative to each one's root mean square, or by name.
    probe : Tensor or (Tensor, Tensor), optional
        A batch (batch_size, \*input_shape) like the client's, its targets perhaps; made up from `seed` if not given.
    seed : int
        Of the made-up batch.
    run : bool, optional
        Whether to run the recovery on the probe; by default where it takes about a second. With True the largest batch
        is tried as well, on made-up batches of sizes around what the count of equations allows: up to minutes.
    advice : bool
        Whether to look for the smallest changes that break a recovery.
    defences : bool or mapping of str to callable
        Whether to attack the probe behind the usual defences as well, or behind which: half a minute each at most.

    Returns
    -------
    AuditReport

    Raises
    ------
    ArgumentError, ArgumentTypeError
        For a wrong argument, or an input shape that the model refuses.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).double()
    >>> report = audit(net, (1, 8, 8))
    >>> report.verdict, report.max_batch_size
    ('exact', 9)
    """
    start = time.perf_counter()
    shape = checked_shape("audit", model, input_shape)
    require_type(isinstance(batch_size, int), "audit", "batch_size", "be an int", repr(batch_size))
    require(batch_size >= 1, "audit", "batch_size", "be at least 1", batch_size)
    model, objective = unwrap(model), Loss(loss)
    subject = _Subject(model, shape, batch_size, objective)
    try:
        graph = read_structure(model, shape)
    except UnsupportedModelError as error:
        finding = Finding("not covered", f"{error.module}: {error.reason}", error.module)
        return subject.report(finding, [], LargestBatch(0, 0), noise)
    batch = make_probe(graph, model, shape, batch_size, objective, probe, seed)
    measured = measure(model, graph, batch, objective)
    layers = count_layers(graph, batch_size, measured, loss)
    finding = judge(layers)
    if run or (run is None and finding.open and sum(layer.unknowns for layer in layers) <= CHEAP):
        finding = finding.corrected(attempt(model, batch, shape, objective))
        if probe is None and _is_close(finding, layers):
            other = make_probe(graph, model, shape, batch_size, objective, None, seed + 1)
            finding = finding.seconded(attempt(model, other, shape, objective))
    largest = counted_batch(graph, measured, loss, finding, batch_size)
    if run and finding.verdict == "exact":
        largest = subject.tried(largest, graph, seed)
    predicted = predict(model, objective, batch, noise, finding.verdict, finding.determined)
    found = []
    if advice and finding.verdict in ("exact", "partial"):
        at = None
        if isinstance(noise, int | float) and noise > 0 and predicted.psnr is not None:
            at = (noise, predicted.psnr)
        found = advise(model, shape, layers, batch_size, largest.size, loss, at)
    rows = []
    if defences:
        named = None if defences is True else defences
        given = (batch.inputs, batch.targets)
        rows = defence_table(model, shape, named, batch_size=batch_size, loss=loss, probe=given, seed=seed)
    report = subject.report(finding, layers, largest, noise)
    probed = f"dead units and the verdict are those of one batch ({batch.source})"
    return replace(
        report,
        predicted_psnr=predicted.psnr,
        leak_map=predicted.leak_map,
        advice=found,
        defences=rows,
        assumptions=[*report.assumptions, probed, largest.sentence, *finding.notes, *predicted.notes],
        seconds=time.perf_counter() - start,
    )


# With fewer equations than this share more than needed, dead units of one batch more than of another decide.
_TO_SPARE = 1.25


def _is_close(finding: Finding, layers: Sequence[LayerRank]) -> bool:
    """Whether a run was made, and another batch may come out otherwise."""
    scarce = any(layer.equations < _TO_SPARE * layer.unknowns for layer in layers)
    refuted = any("by its count" in note for note in finding.notes)
    return bool(finding.tried) and (refuted or (finding.verdict == "exact" and scarce))


@dataclass(frozen=True)
class _Subject:
    """The model under audit, for the report."""

    model: nn.Module
    input_shape: tuple[int, ...]
    batch_size: int
    loss: Loss

    def tried(self, counted: LargestBatch, graph: Graph, seed: int) -> LargestBatch:
        """The largest batch of which most made-up ones are recovered."""

        def recovered(size: int, seed: int) -> bool:
            batch = make_probe(graph, self.model, self.input_shape, size, self.loss, None, seed)
            return attempt(self.model, batch, self.input_shape, self.loss).verdict == "exact"

        def whole(size: int) -> bool:
            return most_of_three(recovered(size, seed + i) for i in range(3))

        return tried_batch(counted, self.batch_size, whole)

    def report(
        self, finding: Finding, layers: list[LayerRank], largest: LargestBatch, noise: float | Noise
    ) -> AuditReport:
        """What is known so far."""
        weights = describe_weights(self.model)
        mode = "training" if self.model.training else "evaluation"
        return AuditReport(
            finding.verdict,
            finding.reason,
            largest.size,
            finding.stops_at,
            layers,
            predicted_psnr=None,
            leak_map=None,
            advice=[],
            assumptions=[*ASSUMED, f"the weights are those given ({weights}), the model is in {mode} mode"],
            batch_size=self.batch_size,
            noise=noise if isinstance(noise, int | float) else math.nan,
            weights=weights,
            tried=finding.tried,
            max_batch_by_count=largest.counted,
            model={
                "name": type(self.model).__name__,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "input_shape": list(self.input_shape),
                "loss": self.loss.name,
                "mode": mode,
                "state_sha256": digest(self.model.state_dict()),
            },
            versions=environment(),
        )
