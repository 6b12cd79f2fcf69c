"""What comes from outside and is wrong: damaged files, odd words, odd arguments end in one of the package's own errors.

Each input is a case of its own, made from its number alone: the one that failed is run again by its number.
"""

from __future__ import annotations

import io
import math
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import rconv_fast
from rconv_fast.cli.options import build_model, load_state, parse_batches, parse_shape
from rconv_fast.errors import RconvError
from rconv_fast.report.files import load_tensors

FEW, MANY = 2_000, 100_000
# Of a hundred inputs.
SHARES = {"file": 55, "words": 20, "update": 14, "shape": 1, "attack": 10}
HANG = 60  # seconds for one input, on a machine that does much else


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 3)).double()


MODEL = network()
SHAPE = (1, 3, 3)


def shared() -> dict[str, torch.Tensor]:
    MODEL.zero_grad()
    x = torch.rand(1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(MODEL(x), torch.tensor([1])).backward()
    return {name: p.grad.clone() for name, p in MODEL.named_parameters() if p.grad is not None}


GRADIENTS = shared()


def files() -> dict[str, bytes]:
    state, npz, saved = MODEL.state_dict(), io.BytesIO(), io.BytesIO()
    np.savez(npz, **{name: t.numpy() for name, t in state.items()})
    torch.save({"state_dict": state, "epoch": 3}, saved)
    return {".safetensors": safetensors.torch.save(state), ".npz": npz.getvalue(), ".pt": saved.getvalue()}


FILES = files()
PARTS = ["", "1", "0", "-1", "3x", "x", ",", "32", "9" * 30, "9" * 5000, "lenet_o", ":", "torch", ".nn", ".py",
         "Linear", "json", "loads", "..", "/", "\0", "é", "²", "٣", "\n", " "]  # fmt: skip
ODD: list[Any] = [None, True, -1, 0, 1, 2, 10**20, 0.5, math.nan, math.inf, -math.inf, 1e-320, "", "mean", "x", b"x",
                  [], {}, (), (1,), (1, 3, 3), (0, 3, 3), (-1, 3, 3), (1, 3, 2**45), [[1]], {1: 2}, object(), 1j,
                  torch.tensor(1.0), torch.tensor([1]), torch.tensor([7]),
                  torch.full((3,), math.nan), torch.zeros(0)]  # fmt: skip


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut off, repeated or put in; now and then none."""
    changed = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 2, 8, 64])):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind == 1 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del changed[at : at + rng.choice([1, 8, 100])]
        elif kind == 3:
            changed[at:at] = rng.randbytes(rng.choice([1, 8]))
        elif rng.randrange(8) == 0:
            del changed[at:]
    return bytes(changed)


def odd_tensors(rng: random.Random, of: dict[str, torch.Tensor]) -> Any:
    """The tensors with one thing wrong, or something else altogether."""
    changed: dict[Any, Any] = {name: t.clone() for name, t in of.items()}
    name = rng.choice(list(changed))
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice(ODD)
    if kind == 1:
        del changed[name]
    elif kind == 2:
        changed[name] = rng.choice(ODD)
    elif kind == 3:
        changed[name].view(-1)[rng.randrange(changed[name].numel())] = rng.choice([math.nan, math.inf, 1e300, 0.0])
    elif kind == 4:
        changed[name] = changed[name].to(rng.choice([torch.float16, torch.bfloat16, torch.int8, torch.complex64]))
    elif kind == 5:
        changed[name] = changed[name].flatten()[: rng.randrange(4)]
    elif kind == 6:
        changed[rng.choice([0, "", "other", None])] = torch.ones(2)
    elif kind == 7:
        return list(changed.values())[: rng.randrange(5)]
    else:
        changed[name] = changed[name] * rng.choice([0.0, -1.0, 1e-200, 1e200])
    return changed


def read_damaged_file(rng: random.Random, folder: Path) -> None:
    kind = rng.choice(list(FILES))
    path = folder / f"state{kind if rng.randrange(10) else rng.choice(list(FILES))}"
    path.write_bytes(damaged(FILES[kind], rng))
    tensors = load_tensors(path, "--state")
    assert isinstance(tensors, dict | list)
    load_state("fuzz", network(), path)


def read_odd_words(rng: random.Random, folder: Path) -> None:
    del folder
    text = "".join(rng.choice(PARTS) for _ in range(rng.randrange(6)))
    reader: Callable[[str, str], Any] = rng.choice([parse_shape, parse_batches, build_model])
    reader("fuzz", text)


UPDATE_ARGUMENTS = [
    "before",
    "after",
    "lr",
    "weight_decay",
    "momentum",
    "steps",
    "optimizer",
    "eps",
    "names",
    "parameters",
]


def undo_odd_update(rng: random.Random, folder: Path) -> None:
    del folder
    before, after = MODEL.state_dict(), {n: t + 1e-3 for n, t in MODEL.state_dict().items()}
    given: dict[str, Any] = {"before": before, "after": after, "lr": 0.1}
    for name in rng.sample(UPDATE_ARGUMENTS, 2):
        given[name] = odd_tensors(rng, before) if name in ("before", "after") else rng.choice(ODD)
    gradients = rconv_fast.gradients_from_update(**given)
    assert all(isinstance(g, torch.Tensor) for g in gradients.values())


def count_odd_shape(rng: random.Random, folder: Path) -> None:
    del folder
    rconv_fast.rank_analysis(MODEL, rng.choice(ODD), batch_size=rng.choice([1, *ODD]))


ARGUMENTS = ["gradients", "gradients", "input_shape", "batch_size", "labels", "loss", "reduction", "label_smoothing",
             "class_weights", "scale", "noise", "dtype", "prior", "method"]  # fmt: skip


def attack_with_odd_argument(rng: random.Random, folder: Path) -> None:
    del folder
    given: dict[str, Any] = {"gradients": GRADIENTS, "input_shape": SHAPE, "time_limit": 2.0}
    name = rng.choice(ARGUMENTS)
    given[name] = odd_tensors(rng, GRADIENTS) if name == "gradients" else rng.choice(ODD)
    found = rconv_fast.invert(MODEL, **given)
    if found.verified and name in ("gradients", "batch_size", "labels", "prior", "method", "dtype"):
        assert_explains(found, dict(found_gradients(given["gradients"])))


def found_gradients(given: Any) -> Iterator[tuple[str, torch.Tensor]]:
    names = [name for name, _ in MODEL.named_parameters()]
    return iter(given.items() if isinstance(given, dict) else zip(names, given, strict=True))


def assert_explains(found: rconv_fast.Inversion, gradients: dict[str, torch.Tensor]) -> None:
    """What is called proven gives the gradients that were handed in."""
    assert found.inputs is not None
    assert found.labels is not None
    MODEL.zero_grad()
    nn.functional.cross_entropy(MODEL(found.inputs.double()), found.labels).backward()
    for name, p in MODEL.named_parameters():
        assert p.grad is not None
        if isinstance(gradients.get(name), torch.Tensor):
            step = torch.finfo(gradients[name].dtype).eps if gradients[name].is_floating_point() else 1e-9
            largest = float(gradients[name].abs().max())
            assert float((p.grad - gradients[name]).abs().max()) <= max(1e-6, 8 * step) * max(largest, 1e-12)


READERS: dict[str, Callable[[random.Random, Path], None]] = {
    "file": read_damaged_file,
    "words": read_odd_words,
    "update": undo_odd_update,
    "shape": count_odd_shape,
    "attack": attack_with_odd_argument,
}


@contextmanager
def no_hang() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError(f"one input took more than {HANG} s")

    earlier = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def run(numbers: range, folder: Path) -> list[str]:
    """The inputs that ended in anything but an answer or an error of the package, each with its number."""
    failures = []
    for number in numbers:
        rng = random.Random(number)
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        try:
            with no_hang():
                READERS[kind](rng, folder)
        except RconvError:
            pass
        except Exception as error:
            failures.append(f"input {number}, {kind}: {type(error).__name__}: {str(error)[:200]}")
    return failures


def test_inputs_from_outside_end_in_an_answer_or_an_error_of_the_package(tmp_path: Path) -> None:
    assert run(range(FEW), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_inputs_from_outside(part: int, tmp_path: Path) -> None:
    share = MANY // 10
    assert run(range(FEW + part * share, FEW + (part + 1) * share), tmp_path) == []
