"""The schemas that are shipped describe the reports that are written."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attacks import gradients_of, photo
from json_schema import violations
from rconv_fast import defenses, invert
from rconv_fast.audit import audit
from rconv_fast.audit.privacy import PrivacyRow
from rconv_fast.cli.judging import check
from rconv_fast.integrations.update_audit import UpdateAuditor
from rconv_fast.report.payload import schema_of
from results import exact, features


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(192, 10)).double()


def assert_valid(report: dict[str, Any]) -> None:
    schema = schema_of(report["schema"])
    assert not list(violations(report, schema, schema))


@pytest.mark.parametrize("name", ["rconv_fast.audit/1", "rconv_fast.check/1", "rconv_fast.inversion/1"])
def test_schema_is_of_the_draft_it_names_and_of_its_own_reports(name: str) -> None:
    schema = schema_of(name)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["properties"]["schema"] == {"const": name}
    assert set(schema["required"]) <= set(schema["properties"])


def test_unknown_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="schema_of: name must be one of"):
        schema_of("rconv_fast.audit/0")


def test_audits_of_every_kind_are_valid() -> None:
    model = conv_net()
    found = audit(
        model,
        (1, 8, 8),
        batch_size=2,
        noise=1e-4,
        defences={"bfloat16": lambda g: defenses.quantise(g, torch.bfloat16)},
    )
    uncovered = nn.Sequential(nn.Conv2d(1, 8, 3), nn.LayerNorm([6, 6]), nn.Flatten(), nn.Linear(288, 10))
    by_name = {name: 1e-3 for name, _ in model.named_parameters()}
    for report in (
        found,
        replace(found, privacy=[PrivacyRow(1.0, 4.5, 0.09, 21.0)]),
        audit(model, (1, 8, 8), run=True),
        audit(model, (1, 8, 8), batch_size=20),
        audit(model, (1, 8, 8), noise=by_name),
        audit(uncovered, (1, 8, 8)),
        audit(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).double(), (1, 8, 8), loss="mse"),
    ):
        assert_valid(json.loads(report.to_json()))


def test_checks_of_models_covered_and_not_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "nets.py"
    path.write_text(
        "from torch import nn\n"
        "def covered(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))\n"
        "def uncovered(): return nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 10))\n"
        "class unreadable(nn.Linear):\n"
        "    def __init__(self): super().__init__(64, 2)\n"
        "    def forward(self, x): return x.flatten(1) if x.sum() > 0 else x\n"
    )
    for factory in ("covered", "uncovered", "unreadable"):
        written = tmp_path / f"{factory}.json"
        check(f"{path}:{factory}", "1x8x8", "1,4", training=False, json=written, html=None, fail_on=None)
        report = json.loads(written.read_text())
        assert set(report["batches"]) == set(report["layers"]) == {"1", "4"}
        assert_valid(report)


def test_inversions_of_every_kind_are_valid() -> None:
    model, x = conv_net(), photo(8, 2, 1)
    shared = gradients_of(model, x)
    noisy = defenses.gaussian(shared, 1e-3, relative=True, generator=torch.Generator().manual_seed(0))
    for found in (
        invert(model, shared, (1, 8, 8)),
        invert(model, noisy, (1, 8, 8), batch_size=2),
        invert(model, defenses.sign(shared), (1, 8, 8), batch_size=2, time_limit=5),
        exact(torch.rand(2, 3, 4, 4)),
        exact(torch.rand(2, 5), labels=torch.rand(2, 3)),
        features(),
        features(tokens=torch.tensor([3, 5])),
    ):
        assert_valid(json.loads(found.to_json()))


def test_report_of_an_update_is_valid(tmp_path: Path) -> None:
    model, x = conv_net(), photo(8, 1, 1)
    before = copy.deepcopy(model.state_dict())
    gradients = gradients_of(model, x)
    after = {name: value - 0.1 * gradients[name] for name, value in before.items()}
    UpdateAuditor(model, (1, 8, 8), lr=0.1).audit(3, "7", before, after).write(tmp_path)
    assert_valid(json.loads((tmp_path / "round-003-client-7.json").read_text()))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("verdict", "safe"),
        ("max_batch_size", -1),
        ("max_batch_size", 1.5),
        ("layers", [{}]),
        ("assumptions", []),
        ("surprise", 1),
        ("model", {"name": "net"}),
    ],
)
def test_wrong_report_is_not_valid(name: str, wrong: Any) -> None:
    report = json.loads(audit(conv_net(), (1, 8, 8), advice=False).to_json())
    schema = schema_of(report["schema"])
    assert list(violations({**report, name: wrong}, schema, schema))
