"""Models from the wild under attack: what `invert` gives back of one sample, in seconds and memory, as one table.

    python benchmarks/attacked.py --out docs/attacked.md

Needs torchvision. The models have 10 outputs and torch's own parameters of seed 0, the inputs are random, gradients are
float32, one thread. Each is attacked in a process of its own (a fork of this one): seconds are CPU time of `invert`,
memory is the process' peak with all imports, the model and its gradients.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rconv_fast
from rconv_fast import invert, models
from wild import Row, Subject, forked

HEAD = ("model", "input", "verdict", "what came back, and where it stopped", "CPU s", "peak MiB")
OF_TORCHVISION = ("resnet18", "vgg11", "alexnet", "mobilenet_v3_small", "convnext_tiny")
WORDS, CLASSES, LABEL = 1000, 10, 3


class Mnist(nn.Module):
    """The network of PyTorch's MNIST example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2).flatten(1)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), 1)


class UNet(nn.Module):
    """Two levels, and a class for the whole picture."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = (self._block(i, o) for i, o in ((3, 16), (16, 32), (32, 32)))
        self.up2, self.up1, self.head = self._block(64, 16), self._block(32, 32), nn.Linear(32, CLASSES)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = F.interpolate(self.middle(F.max_pool2d(second, 2)), scale_factor=2)
        x = F.interpolate(self.up2(torch.cat([x, second], 1)), scale_factor=2)
        logits: Tensor = self.head(self.up1(torch.cat([x, first], 1)).mean((2, 3)))
        return logits


class Text(nn.Module):
    """An embedding, what reads it, and a class."""

    def __init__(self, reads: nn.Module) -> None:
        super().__init__()
        self.embedding, self.reads, self.head = nn.Embedding(WORDS, 64), reads, nn.Linear(64, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        read = self.reads(self.embedding(ids))
        logits: Tensor = self.head((read[0] if isinstance(read, tuple) else read).mean(1))
        return logits


def transformer() -> nn.Module:
    """Two layers of four heads."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2)


def subjects() -> Iterator[Subject]:
    from torchvision import models as wild

    for name in OF_TORCHVISION:
        yield Subject(name, (3, 64, 64), False, lambda n=name: wild.get_model(n, num_classes=CLASSES))
    yield Subject("vit_b_16", (3, 224, 224), False, lambda: wild.vit_b_16(num_classes=CLASSES))
    yield Subject("PyTorch's MNIST example", (1, 28, 28), False, Mnist)
    yield Subject("Flower's tutorial", (3, 32, 32), False, models.flower_tutorial)
    yield Subject("U-Net", (3, 64, 64), False, UNet)
    yield Subject("LSTM", (20,), False, lambda: Text(nn.LSTM(64, 64, batch_first=True)))
    yield Subject("Transformer", (20,), False, lambda: Text(transformer()))


def attack(subject: Subject) -> Row:
    """The gradients of one sample, and what they give away."""
    torch.manual_seed(0)
    model = subject.build().float().eval()
    text = len(subject.input_shape) == 1
    x = torch.randint(WORDS, (1, *subject.input_shape)) if text else torch.rand(1, *subject.input_shape)
    loss = "nll" if isinstance(model, Mnist) else "cross_entropy"
    value = (F.nll_loss if loss == "nll" else F.cross_entropy)(model(x), torch.tensor([LABEL]))
    named = dict(model.named_parameters())
    shared = dict(zip(named, torch.autograd.grad(value, list(named.values()), allow_unused=True), strict=True))
    start = time.process_time()
    found = invert(model, shared, subject.input_shape, loss=loss)
    seconds = time.process_time() - start
    said = [f"label {'right' if found.labels is not None and found.labels.tolist() == [LABEL] else 'wrong or unknown'}"]
    said += [f"inputs of {', '.join(found.features)}"] if found.features else []
    if text:
        same = found.tokens is not None and set(found.tokens.tolist()) == set(x.flatten().tolist())
        said.append(f"tokens {'right' if same else 'wrong or unknown'}")
    said += [f"stops at {found.stops_at}: {found.reason}"] if found.stops_at else []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return Row(found.verdict + (", verified" if found.verified else ""), "; ".join(said), round(seconds, 1), peak)


def page(lines: list[tuple[str, ...]]) -> str:
    """The table, with what it was made with."""
    import torchvision

    made = f"rconv_fast {rconv_fast.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    lead = [
        "# Models from the wild under attack",
        "",
        "What `rconv_fast.invert` gives back of one random input, from float32 gradients of networks with torch's own",
        "parameters (seed 0), with no time limit given: a search for a hidden pattern ends by itself after a minute.",
        "One thread; CPU seconds of the attack, peak memory of its process. Written by `benchmarks/attacked.py` with",
        f"{made}.",
        "",
    ]
    rows = [HEAD, ("---",) * len(HEAD), *lines]
    return "\n".join([*lead, *(f"| {' | '.join(row)} |" for row in rows), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # the models' own
    torch.set_num_threads(1)  # a fork may not inherit a pool of threads
    lines = []
    for subject in subjects():
        row = forked(subject, attack)
        shape = "x".join(map(str, subject.input_shape))
        said = row.reason.replace("|", "/").replace("\n", " ")
        lines.append((subject.name, shape, row.verdict, said, f"{row.seconds:.1f}", str(row.mebibytes)))
        print(*lines[-1], flush=True)
    given.out.write_text(page(lines))


if __name__ == "__main__":
    main()
