"""``rconv-fast check`` and ``audit``: what gradients of a model would give away, without private data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from rconv_fast.audit import LayerRank, rank_analysis
from rconv_fast.audit import audit as judge
from rconv_fast.audit.finding import judge as by_count
from rconv_fast.cli import DONE, LESS, screen
from rconv_fast.cli.options import build_model, load_state, parse_batches, parse_shape
from rconv_fast.errors import UnsupportedModelError, require
from rconv_fast.report import files, page, payload

CHECK_SCHEMA = "rconv_fast.check/1"
# From the worst to the best; --fail-on fails at its verdict and at all before it.
SEVERITY = ("exact", "partial", "features only", "not covered", "none found")
COLOURS = dict(zip(SEVERITY, ("red", "red", "yellow", "yellow", "green"), strict=True))
COLUMNS = ("layer", "kind", "|A|", "|B|", "unknowns", "paper says", "rank at most", "determined", "stops here because")


def check(
    model: str,
    input_shape: str,
    batch: str,
    training: bool,
    json: Path | None,
    html: Path | None,
    fail_on: str | None,
) -> int:
    """Count the equations of every layer; returns the exit code."""
    shape, sizes = parse_shape("check", input_shape), parse_batches("check", batch)
    _check_severity("check", fail_on)
    network = build_model("check", model).train(training)
    layers = {size: _layers(network, shape, size) for size in sizes}
    findings = {size: by_count(found) for size, found in layers.items()}
    for size, finding in findings.items():
        screen.print_line(f"batch size {size}: {finding.verdict}. {finding.reason}", COLOURS[finding.verdict])
        screen.print_rows(COLUMNS, [_cells(layer) for layer in layers[size]])
    worst = _worst(finding.verdict for finding in findings.values())
    said = {
        "schema": CHECK_SCHEMA,
        "verdict": worst,
        "settings": {"model": model, "input_shape": input_shape, "batch": batch, "training": training},
        "environment": payload.environment(),
    }
    if json is not None:
        by_size = {
            size: {"verdict": finding.verdict, "reason": finding.reason, "stops_at": finding.stops_at}
            for size, finding in findings.items()
        }
        plain = {size: list(map(_plain, found)) for size, found in layers.items()}
        files.save_report(json, {**said, "batches": by_size, "layers": plain})
    if html is not None:
        tables = {
            f"batch size {size}: {finding.verdict}": [
                dict(zip(COLUMNS, _cells(layer), strict=True)) for layer in layers[size]
            ]
            for size, finding in findings.items()
        }
        files.write_private(html, page.render("check", {**said, **tables}))
    return _exit_code(worst, fail_on)


def audit(
    model: str,
    state: Path | None,
    input_shape: str,
    batch: str,
    training: bool,
    options: Mapping[str, Any],
    written: Mapping[str, Path | None],
    fail_on: str | None,
) -> int:
    """Judge a model with a probe, write its report in the forms that have a path; returns the exit code."""
    shape, sizes = parse_shape("audit", input_shape), parse_batches("audit", batch)
    one = "be one number with --json, --html or --markdown"
    require(len(sizes) == 1 or not any(written.values()), "audit", "--batch", one, batch)
    _check_severity("audit", fail_on)
    network = build_model("audit", model)
    if state is not None:
        network = load_state("audit", network, state)
    given = {name: value for name, value in options.items() if value is not None}
    reports = [judge(network.train(training), shape, batch_size=size, **given) for size in sizes]
    for report in reports:
        screen.print_line(report.summary())
        forms = {"json": report.to_json, "html": report.to_page, "markdown": report.to_markdown}
        for form, path in written.items():
            if path is not None:
                files.write_private(path, forms[form]())
    return _exit_code(_worst(report.verdict for report in reports), fail_on)


def _layers(network: nn.Module, shape: tuple[int, ...], size: int) -> list[LayerRank]:
    """The analysis; of a model that cannot be read, one layer that is not covered."""
    try:
        return rank_analysis(network, shape, batch_size=size)
    except UnsupportedModelError as error:
        return [LayerRank(error.module, type(network).__name__, covered=False, reason=error.reason)]


def _cells(layer: LayerRank) -> tuple[str, ...]:
    return (
        layer.name,
        layer.kind,
        str(layer.weight_constraints),
        str(layer.gradient_constraints),
        str(layer.unknowns),
        "yes" if layer.paper_says else "no",
        str(layer.rank_bound),
        "yes" if layer.determined else "no",
        layer.reason,
    )


def _plain(layer: LayerRank) -> dict[str, Any]:
    return {**asdict(layer), "phases": [phase._asdict() for phase in layer.phases]}


def _check_severity(command: str, fail_on: str | None) -> None:
    require(fail_on is None or fail_on in SEVERITY, command, "--fail-on", f"be one of {', '.join(SEVERITY)}", fail_on)


def _worst(verdicts: Iterable[str]) -> str:
    return min(verdicts, key=SEVERITY.index)


def _exit_code(verdict: str, fail_on: str | None) -> int:
    failed = fail_on is not None and SEVERITY.index(verdict) <= SEVERITY.index(fail_on)
    return LESS if failed else DONE
