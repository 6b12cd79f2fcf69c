"""How the tests run the command line, with a stand-in for the inversion."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from json_schema import violations
from rconv_fast.progress import Event
from rconv_fast.report.payload import schema_of
from rconv_fast.result import Inversion
from results import exact


class FakeInversion:
    """What ``invert`` returns, with the result given; the calls are recorded."""

    def __init__(self) -> None:
        self.result: Inversion | BaseException = exact(torch.zeros(1, 1))
        self.calls: list[dict[str, Any]] = []

    def __call__(self, model: torch.nn.Module, gradients: Any, input_shape: tuple[int, ...], **options: Any) -> Any:
        self.calls.append({"model": model, "gradients": gradients, "input_shape": input_shape, **options})
        for event in (Event("fc", "separate"), Event("conv1", "solve", 7, 9, 1e-3)):
            options["progress"](event)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    exit_code: int
    output: str
    errors: str


Run = Any


def error_line(done: Done) -> str:
    assert done.exit_code == 2
    lines = done.errors.strip().splitlines()
    assert len(lines) == 1, done.errors
    assert lines[0].startswith("error: ")
    return lines[0]


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    schema = schema_of(report["schema"])
    assert not list(violations(report, schema, schema))
    return report


class Page(HTMLParser):
    """Reads a page, and refuses anything that would be fetched."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        for name, value in attrs:
            assert name not in ("src", "href") or (value or "").startswith("data:")
