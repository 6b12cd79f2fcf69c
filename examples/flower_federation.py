"""A Flower federation whose server looks at what it receives, and whose clients look at what they send.

Needs flwr (``pip install "rconv-fast[flower]"``). The clients run in this process, one after the other; in a real
federation only ``local_grid`` goes away.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import create_autospec

import torch
from torch import Tensor, nn

import rconv_fast
from rconv_fast import models

try:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    from rconv_fast.integrations.flower import AuditedStrategy, UpdateAuditor, audit_mod
except ImportError as error:
    print(f"SKIPPED: {error}")
    sys.exit()

CLIENTS, ROUNDS, LR = 3, 2, 0.1


def build() -> nn.Module:
    return models.cnn3(n_classes=10, in_channels=1, image_size=16, dtype=torch.float32)


def private_data(client: int) -> tuple[Tensor, Tensor]:
    """One picture a client: a smooth blob of its own."""
    grid = torch.linspace(-1, 1, 16)
    radius = (grid[:, None] - 0.2 * client + 0.3).square() + (grid[None, :] + 0.1 * client).square()
    return torch.exp(-3 * radius)[None, None], torch.tensor([client])


def train(message: Message, _: Context) -> Message:
    """One step of SGD, as any client app."""
    model = build()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    x, y = private_data(message.metadata.dst_node_id)
    nn.functional.cross_entropy(model(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=LR).step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


def local_grid(client_app: Callable[[Message], Message]) -> Grid:
    """Clients in this process; the identity is what a SuperLink would give this server."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0

    def send_and_receive(messages: Iterable[Message], **_: object) -> list[Message]:
        return [client_app(message) for message in messages]

    grid: Grid = create_autospec(Grid, instance=True)
    grid.get_node_ids.return_value = list(range(1, CLIENTS + 1))
    grid.send_and_receive.side_effect = send_and_receive
    return grid


def main() -> None:
    auditor = UpdateAuditor(build(), (1, 16, 16), lr=LR)
    own_look = audit_mod(auditor)  # on a client: ClientApp(mods=[own_look])
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    strategy = AuditedStrategy(FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS), auditor, Path("audits"))
    grid = local_grid(
        lambda message: (
            own_look(message, context, train) if message.metadata.dst_node_id == 1 else train(message, context)
        )
    )
    strategy.start(grid, ArrayRecord(build().state_dict()), num_rounds=ROUNDS, train_config=ConfigRecord({}))

    for finding in strategy.findings:
        assert finding.inversion is not None
        assert finding.inversion.inputs is not None
        x, _ = private_data(int(finding.client))
        reached = rconv_fast.psnr(finding.inversion.inputs, x.double())
        print(f"round {finding.round}, client {finding.client}: {finding.verdict}, PSNR {reached:.0f} dB")
    print(sorted(path.name for path in Path("audits").iterdir()))


if __name__ == "__main__":
    main()
