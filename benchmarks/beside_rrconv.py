"""Whole attacks on one photo, beside the R-CONV authors' own code on the same photo and parameters, in one run.

``python benchmarks/beside_rrconv.py --peer-rrconv CHECKOUT [--filter TEXT] [--out FILE]``.
CHECKOUT is a clone of https://github.com/tamertaras91/RR-CONV; it is run as it is. Both are measured in their process'
own time, which is what a clock shows on one thread of an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rconv_fast
from bench import Target
from leaks import Leak, facts, leak, ours
from peers import commit_of, run_peer
from pictures import face
from rconv_fast import models
from run_peer import LABEL


@dataclass(frozen=True)
class Attack:
    """A network of the paper with its activation and parameters of its own, and how often the peer runs."""

    network: str
    activation: str
    peer_repeats: int = 5
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.network}/{self.activation}"

    def model(self) -> nn.Sequential:
        return models.MODELS[self.network](self.activation, seed=self.seed)


ATTACKS = [
    *(Attack("lenet_o", name) for name in ("relu", "leaky_relu", "sigmoid", "tanh")),
    # Theirs takes minutes. With seed 0 so many filters are dead that conv3 has equations of rank 1211 for 1408 values.
    Attack("lenet_all_relu", "relu", peer_repeats=1, seed=1),
]


def theirs_leak(attack: Attack, parameters: list[Tensor]) -> Leak:
    """The gradients of the photo in float64, with the peer's parameters."""
    model = attack.model()
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), parameters, strict=True):
            mine.copy_(theirs)
    return leak(model, face(), torch.tensor([LABEL]), Target())


def side_by_side(attack: Attack, checkout: Path, repeats: int) -> dict[str, Any]:
    """Measure both in turn on the peer's own parameters; its clock is its own, from the gradients to the photo."""
    theirs, seconds = [run_peer("rrconv", checkout, face()[0], 1, attack.network, attack.activation)], []
    leaked = theirs_leak(attack, theirs[0]["parameters"])
    if not torch.equal(theirs[0]["original"].reshape(leaked.x.shape), leaked.x):
        raise RuntimeError(f"{attack.name}: the peer was given another photo")
    for turn in range(attack.peer_repeats):
        if turn:
            theirs.append(run_peer("rrconv", checkout, face()[0], 1, attack.network, attack.activation))
        for _ in range(repeats):
            start = time.process_time()
            returned = ours(leaked)
            seconds.append(time.process_time() - start)
    peer_seconds = [t["seconds"] for t in theirs]
    mine, other = statistics.median(seconds), statistics.median(peer_seconds)
    return {
        "name": f"invert/{attack.name}/{Target().name}",
        "ours": {"seconds": mine, "first_seconds": seconds[0], "all_seconds": seconds, **facts(returned)},
        "rrconv": {
            "seconds": other,
            "all_seconds": peer_seconds,
            "psnr": rconv_fast.psnr(theirs[0]["recovered"].reshape(leaked.x.shape), leaked.x),
        },
        "ratio": other / mine,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-rrconv", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--filter", default="", help="only attacks whose name contains this text")
    parser.add_argument("--repeats", type=int, default=7, help="of ours, after each run of theirs; the medians count")
    parser.add_argument("--out", type=Path, help="write all figures and the machine's facts as JSON")
    arguments = parser.parse_args()
    if not (arguments.peer_rrconv / "main.py").is_file():
        parser.error(f"--peer-rrconv must hold main.py, got {arguments.peer_rrconv}")
    from run import machine

    torch.set_num_threads(1)
    results = []
    print(f"{'':32}{'ours':>9}  {'PSNR':>7}  {'verified':>8}  {'theirs':>9}  {'PSNR':>7}  {'ratio':>7}")
    for attack in (a for a in ATTACKS if arguments.filter in a.name):
        line = side_by_side(attack, arguments.peer_rrconv, arguments.repeats)
        mine, peer = line["ours"], line["rrconv"]
        print(
            f"{line['name']:32}{mine['seconds']:8.3f}s  {mine['worst psnr']:7.1f}  {mine['verified']!s:>8}"
            f"  {peer['seconds']:8.2f}s  {peer['psnr']:7.1f}  {line['ratio']:6.0f}x",
            flush=True,
        )
        results.append(line)
    if arguments.out:
        settings = {**machine(), "peer_commit": commit_of(arguments.peer_rrconv), "clock": "process time"}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": settings, "results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
