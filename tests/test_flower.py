"""A federation in Flower is audited and not disturbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attacks import photo

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from rconv_fast import psnr
from rconv_fast.integrations.flower import AuditedStrategy, UpdateAuditor, audit_mod

LR = 0.5


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a SuperLink gives a server."""
    for name, value in (("_run_id", 1), ("_task_id", 1), ("_node_id", 0)):
        monkeypatch.setattr(TaskIdentity, name, value)


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 12, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(12 * 16, 10)]
    return nn.Sequential(*layers).double()


def auditor() -> UpdateAuditor:
    return UpdateAuditor(build(), (1, 8, 8), lr=LR)


def train(message: Message, _: Any = None) -> Message:
    model = build()
    model.load_state_dict(next(iter(message.content.array_records.values())).to_torch_state_dict())
    nn.functional.cross_entropy(model(photo(8, 1, 1)), torch.tensor([3])).backward()
    torch.optim.SGD(model.parameters(), lr=LR).step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


def instruction(message_type: str = "train") -> Message:
    content = {"arrays": ArrayRecord(build().state_dict()), "config": ConfigRecord({"server-round": 7})}
    return Message(RecordDict(content), dst_node_id=5, message_type=message_type)


class OneClient:
    """As much of a grid as FedAvg asks for."""

    def get_node_ids(self) -> list[int]:
        return [5]


def strategies() -> FedAvg:
    return FedAvg(min_train_nodes=1, min_available_nodes=1)


def test_server_recovers_what_it_receives_and_aggregates_as_before(tmp_path: Path) -> None:
    arrays, config = ArrayRecord(build().state_dict()), ConfigRecord({})
    audited, plain = AuditedStrategy(strategies(), auditor(), tmp_path / "audits"), strategies()
    instructions = list(audited.configure_train(1, arrays, config, OneClient()))  # type: ignore[arg-type]
    replies = [train(message) for message in instructions]
    mean, _ = audited.aggregate_train(1, replies)
    expected, _ = plain.aggregate_train(1, replies)
    assert mean is not None
    assert expected is not None
    for name, value in expected.to_torch_state_dict().items():
        assert torch.equal(mean.to_torch_state_dict()[name], value)
    (finding,) = audited.findings
    assert finding.leaks
    assert finding.inversion is not None
    assert finding.inversion.inputs is not None
    assert psnr(finding.inversion.inputs, photo(8, 1, 1)) > 150
    report = json.loads((tmp_path / "audits" / "round-001-client-5.json").read_text())
    assert report["verdict"] == finding.verdict
    assert report["client"] == "5"
    assert (tmp_path / "audits" / "round-001-client-5.json").stat().st_mode & 0o077 == 0


def test_failed_replies_and_odd_updates_do_not_end_the_training() -> None:
    audited = AuditedStrategy(strategies(), auditor(), sample=3)
    instructions = list(
        audited.configure_train(1, ArrayRecord(build().state_dict()), ConfigRecord({}), OneClient())  # type: ignore[arg-type]
    )
    failed = Message(Error(code=1, reason="out of memory"), reply_to=instructions[0])
    other = {"arrays": ArrayRecord({"0.weight": torch.zeros(3)}), "metrics": MetricRecord({"num-examples": 1})}
    audited.aggregate_train(1, [failed, Message(RecordDict(other), reply_to=instructions[0])])
    (finding,) = audited.findings
    assert finding.verdict == "failed"
    assert finding.reason


def context() -> Context:
    return Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})


def test_client_sees_what_its_update_gives_away_and_sends_it_unchanged(tmp_path: Path) -> None:
    message = instruction()
    reply = audit_mod(auditor(), tmp_path)(message, context(), train)
    sent = next(iter(reply.content.array_records.values())).to_torch_state_dict()
    expected = next(iter(train(message).content.array_records.values())).to_torch_state_dict()
    assert all(torch.equal(sent[name], expected[name]) for name in expected)
    assert json.loads((tmp_path / "round-007-client-5.json").read_text())["round"] == 7


def test_client_can_refuse_to_send() -> None:
    leaking = ("exact", "approximate", "partial")
    reply = audit_mod(auditor(), refuse=leaking)(instruction(), context(), train)
    assert reply.has_error()
    assert "gives inputs away" in reply.error.reason


def test_other_messages_pass_by() -> None:
    def evaluate(message: Message, _: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"loss": 1.0})}), reply_to=message)

    reply = audit_mod(auditor())(instruction("evaluate"), context(), evaluate)
    assert reply.content.metric_records
