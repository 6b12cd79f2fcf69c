"""Audits in a Flower federation: of what the server receives, and of what a client is about to send.

Server: wrap the strategy. ``AuditedStrategy(FedAvg(), UpdateAuditor(model, (1, 28, 28), lr=0.1), "audits")``.
Client: a mod. ``ClientApp(mods=[audit_mod(UpdateAuditor(model, (1, 28, 28), lr=0.1))])``.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rconv_fast.errors import MissingDependencyError, require
from rconv_fast.integrations.update_audit import UpdateAudit, UpdateAuditor

try:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Strategy
except ImportError as error:
    raise MissingDependencyError('an audit in Flower needs flwr: pip install "rconv-fast[flower]"') from error

__all__ = ["AuditedStrategy", "UpdateAudit", "UpdateAuditor", "audit_mod"]

_LOG = logging.getLogger("rconv_fast")
_REFUSED = 300  # Flower leaves codes from 200 on to applications

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


class AuditedStrategy(Strategy):
    """A strategy that looks at some of the updates of every round before its own strategy aggregates them.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy
        Does all the work of the federation, unchanged.
    auditor : UpdateAuditor
        How the clients train.
    out : str or Path, optional
        A folder for reports, two files an update.
    sample : int
        Updates a round that are looked at.
    seed : int
        Of the choice of them.

    Attributes
    ----------
    findings : list of UpdateAudit
        In the order they were made.
    """

    def __init__(
        self,
        strategy: Strategy,
        auditor: UpdateAuditor,
        out: str | Path | None = None,
        *,
        sample: int = 1,
        seed: int = 0,
    ) -> None:
        require(sample >= 1, "AuditedStrategy", "sample", "be at least 1", sample)
        self.strategy = strategy
        self.auditor = auditor
        self.out = None if out is None else Path(out)
        self.sample = sample
        self.findings: list[UpdateAudit] = []
        self._choice = random.Random(seed)
        self._before: dict[str, Tensor] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the wrapped strategy; the weights that go out are kept."""
        self._before = _state(arrays)
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Look at a sample of the updates, then aggregate all as the wrapped strategy does."""
        received = list(replies)
        sent = [message for message in received if not message.has_error() and message.content.array_records]
        for message in self._choice.sample(sent, min(self.sample, len(sent))):
            (after, *_) = message.content.array_records.values()
            client = str(message.metadata.src_node_id)
            finding = self.auditor.audit(server_round, client, self._before, _state(after))
            _LOG.info("round %d, client %s: %s. %s", server_round, client, finding.verdict, finding.reason)
            self.findings.append(finding)
            if self.out is not None:
                finding.write(self.out)
        return self.strategy.aggregate_train(server_round, received)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the wrapped strategy."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the wrapped strategy."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """As the wrapped strategy."""
        self.strategy.summary()


def audit_mod(auditor: UpdateAuditor, out: str | Path | None = None, *, refuse: Sequence[str] = ()) -> Mod:
    """A client mod that looks at the update that is about to leave, as a curious server would.

    Parameters
    ----------
    auditor : UpdateAuditor
        How this client trains.
    out : str or Path, optional
        A folder on the client for reports.
    refuse : sequence of str
        Verdicts (``"exact"``, ``"partial"``, ...) with which nothing is sent but an error.

    Returns
    -------
    callable
        ``(Message, Context, call_next) -> Message``, for ``ClientApp(mods=[...])``. Put it last: what runs after it
        (clipping, noise) is not seen.
    """

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        training = message.metadata.message_type.split(".")[0] == MessageType.TRAIN
        before = _state(_only(message)) if training and message.content.array_records else None
        reply = call_next(message, context)
        if before is None or reply.has_error() or not reply.content.array_records:
            return reply
        server_round = _round_of(message)
        client = str(message.metadata.dst_node_id)
        finding = auditor.audit(server_round, client, before, _state(_only(reply)))
        _LOG.info("round %d, this update: %s. %s", server_round, finding.verdict, finding.reason)
        if out is not None:
            finding.write(Path(out))
        if finding.verdict in refuse:
            reason = f"not sent: the update gives inputs away ({finding.verdict})"
            return Message(Error(code=_REFUSED, reason=reason), reply_to=message)
        return reply

    return mod


def _only(message: Message) -> ArrayRecord:
    """The first record of arrays: Flower's own strategies send one."""
    return next(iter(message.content.array_records.values()))


def _round_of(message: Message) -> int:
    configs: Iterable[Any] = message.content.config_records.values()
    return next((int(config["server-round"]) for config in configs if "server-round" in config), 0)


def _state(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Weights and buffers by name, as copies."""
    return {name: value.clone() for name, value in arrays.to_torch_state_dict().items()}
