"""What an audit writes: JSON, text, page, pictures, tables of defences."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
import torch
from torch import nn

from networks import narrow
from rconv_fast import defenses
from rconv_fast.audit import AuditReport, audit
from rconv_fast.audit.leak_map import leak_picture
from rconv_fast.audit.privacy import PrivacyRow


@pytest.fixture(scope="module")
def report() -> AuditReport:
    return audit(narrow(), (1, 8, 8), noise=1e-4)


def test_json_is_strict_and_names_its_schema(report: AuditReport, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = report.to_json(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read == json.loads(text)
    assert read["schema"] == "rconv_fast.audit/1"
    assert read["verdict"] == report.verdict
    assert [layer["name"] for layer in read["layers"]] == [layer.name for layer in report.layers]
    assert len(read["model"]["state_sha256"]) == 64
    assert read["assumptions"]


def test_text_says_verdict_layers_advice_and_assumptions(report: AuditReport) -> None:
    for text in (report.summary(), report.to_markdown()):
        assert report.verdict in text
        assert all(layer.name in text for layer in report.layers)
        assert all(advice.sentence in text for advice in report.advice)
        assert all(assumption in text for assumption in report.assumptions)
    rows = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


def test_page_is_self_contained_and_shows_the_map(report: AuditReport, tmp_path: Path) -> None:
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "http" not in page.replace("http-equiv", "")
    assert all(escape(advice.sentence) in page for advice in report.advice)
    assert report.model["state_sha256"] in page


def test_picture_is_red_where_values_are_known_and_grey_where_they_are_open() -> None:
    leak = torch.ones(3, 2, 2)
    leak[:, 0, 0], leak[0, 1, 1] = 0, math.inf
    pixels = leak_picture(leak)
    assert pixels is not None
    known, unknown, opened = pixels[0, 0].tolist(), pixels[0, -1].tolist(), pixels[-1, -1].tolist()
    assert known[0] > 2 * known[1]
    assert min(unknown) > 220
    assert len(set(opened)) == 1
    assert leak_picture(torch.ones(5)) is None


def test_map_of_a_partial_leak_is_open_where_no_output_reads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 64, 3, 2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64 * 9, 10)).double()
    report = audit(model, (1, 8, 8), advice=False)
    assert report.verdict == "partial"
    assert report.leak_map is not None
    assert report.leak_map[0, :7, :7].eq(0).all()
    assert report.leak_map[0, 7].isinf().all()
    assert report.leak_map[0, :, 7].isinf().all()


def test_reports_are_written_for_their_owner_alone(tmp_path: Path) -> None:
    report = audit(narrow(), (1, 8, 8), advice=False)
    report.to_json(tmp_path / "a.json")
    report.to_html(tmp_path / "a.html")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_report_shows_defences_and_privacy_side_by_side() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
    found = audit(model, (1, 8, 8), advice=False, defences={"bfloat16": lambda g: defenses.quantise(g, torch.bfloat16)})
    found = replace(found, privacy=[PrivacyRow(1.0, 4.5, 0.09, 21.0)])
    none, rounded = found.defences
    assert none.verified
    assert rounded.sentence in found.summary()
    page, card, read = found.to_page(), found.to_markdown(), json.loads(found.to_json())
    assert page.count("data:image/png;base64") == 1 + len(found.defences)  # the leak map first
    assert "<th>reached psnr</th>" in page
    assert "<th>epsilon</th>" in page
    assert "| bfloat16 |" in card
    assert "| 1 | 4.50 | 9.0% | 21.0 |" in card
    assert [row["defence"] for row in read["defences"]] == ["none", "bfloat16"]
    assert read["privacy"][0]["epsilon"] == 4.5
