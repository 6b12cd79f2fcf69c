"""Networks for tests of sweeps, importable by worker processes: each call leaves a line, one kills its process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn


def network(log: str) -> nn.Module:
    """Build a fully connected network, and note in `log` that a case began."""
    with Path(log).open("a") as file:
        file.write(f"{os.getpid()}\n")
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 4)).double()


def deadly_once(log: str) -> nn.Module:
    """Kill the process that calls it first, as the out-of-memory killer would."""
    mark = Path(log + ".killed")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return network(log)


def deadly(log: str) -> nn.Module:
    """Kill every process that calls it."""
    os.kill(os.getpid(), signal.SIGKILL)
    return network(log)


def slow() -> nn.Module:
    """Take so long that a sweep can be killed in the middle; the log's name is in the environment."""
    time.sleep(0.2)
    return network(os.environ["SWEEP_LOG"])


def dies_in_the_middle(log: str, kind: str, after: int) -> nn.Module:
    """Build one of three networks for 8x8 digits; the process that begins case number `after` is killed, once."""
    path, mark = Path(log), Path(log + ".killed")
    if path.exists() and len(path.read_text().splitlines()) >= after and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    activation = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}[kind]
    return nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1), activation(), nn.Flatten(), nn.Linear(512, 10)).double()
