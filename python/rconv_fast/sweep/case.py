"""One inversion of a sweep: the client is played, its pictures forgotten, the answer compared with them."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rconv_fast import defenses
from rconv_fast.data import Picture
from rconv_fast.errors import require
from rconv_fast.losses import Loss
from rconv_fast.observation import SharedGradients
from rconv_fast.sweep.table import EMPTY, Row

Factory = Callable[[], nn.Module]
Attack = Callable[..., Any]  # (model, gradients, input_shape, **options) -> Inversion


@dataclass(frozen=True)
class Case:
    """One inversion, with all that its row depends on; what is drawn for it follows from its `key`.

    Attributes
    ----------
    model : str
        Name in the sweep's models.
    images : tuple of str
        Names of the pictures of the batch.
    first : int
        Index of the first of them; they are consecutive.
    batch_size : int
    defence : str
        As in ``gaussian:1e-3``; ``none``.
    noise : float
        Of each gradient, relative to its root mean square; told to the attack, as the defence is.
    attack, dtype, input_shape : str
        Name of the attack, precision of the client, shape of a picture as in ``3x32x32``.
    seed : int
        The sweep's.
    """

    model: str
    images: tuple[str, ...]
    first: int
    batch_size: int
    defence: str
    noise: float
    attack: str
    dtype: str
    input_shape: str
    seed: int

    @property
    def key(self) -> str:
        """Short and the same in every run."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """What all cases share; it is sent to every worker.

    Attributes
    ----------
    models : mapping of str to callable
        Make the networks; what is sent to other processes must be importable there (functions, partials of them).
    pictures : tuple of Picture
        All of the sweep.
    input_shape : tuple of int
        (C, H, W).
    attack : callable
        ``(model, gradients, input_shape, **options) -> Inversion``.
    dtype : torch.dtype
        Of the client's model and gradients.
    time_limit : float or None
        Seconds a case.
    seed : int
        Of labels and noise.
    threads : int
        Of each worker; 0 leaves them as they are.
    """

    models: Mapping[str, Factory]
    pictures: tuple[Picture, ...]
    input_shape: tuple[int, ...]
    attack: Attack
    dtype: torch.dtype
    time_limit: float | None
    seed: int
    threads: int


def cases_of(plan: Plan, batch_sizes: Sequence[int], defences: Sequence[str], noise: Sequence[float]) -> Iterator[Case]:
    """All combinations, the pictures last."""
    attack = getattr(plan.attack, "__name__", repr(plan.attack))
    dtype, shape = str(plan.dtype).removeprefix("torch."), "x".join(map(str, plan.input_shape))
    for model in plan.models:
        for batch in batch_sizes:
            for defence in defences:
                for sigma in noise:
                    for first in range(0, len(plan.pictures) - batch + 1, batch):
                        names = tuple(p.name for p in plan.pictures[first : first + batch])
                        sizes = (first, batch, defence, float(sigma))
                        yield Case(model, names, *sizes, attack, dtype, shape, plan.seed)


def run_case(plan: Plan, case: Case) -> Row:
    """Play the client, forget the pictures, attack, compare. What goes wrong becomes the row's `error`."""
    if plan.threads:
        torch.set_num_threads(plan.threads)  # of a worker process, which is ours
    row = empty_row(case)
    try:
        row |= _measured(plan, case)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def _measured(plan: Plan, case: Case) -> Row:
    from rconv_fast.metrics import match_samples, psnr

    generator = torch.Generator().manual_seed(int(case.key, 16))
    model = plan.models[case.model]().to(plan.dtype)
    x = torch.stack([p.read(plan.input_shape) for p in plan.pictures[case.first : case.first + case.batch_size]])
    x = x.to(plan.dtype)
    gradients, loss = client_gradients(model, x, generator)
    if case.noise:
        gradients = defenses.gaussian(gradients, case.noise, relative=True, generator=generator)
    gradients = defence_of(case.defence)(gradients, generator)
    start = time.perf_counter()
    limit = {} if plan.time_limit is None else {"time_limit": plan.time_limit}
    found = plan.attack(model, gradients, plan.input_shape, loss=loss, batch_size=case.batch_size, **limit)
    seconds = time.perf_counter() - start
    quality = [math.nan]
    if found.inputs is not None and found.inputs.shape == x.shape and bool(found.inputs.isfinite().all()):
        matched = x[match_samples(found.inputs.cpu(), x)].double()
        quality = [psnr(a.cpu().double(), b) for a, b in zip(found.inputs, matched, strict=True)]
    return {
        "verdict": found.verdict,
        "verified": found.verified,
        "psnr": statistics.median(quality),
        "worst_psnr": min(quality),
        "seconds": seconds,
        "gradient_residual": found.gradient_residual,
        "noise_ratio": found.noise_ratio,
        "stops_at": found.stops_at or "",
        "reason": found.reason,
    }


def client_gradients(model: nn.Module, x: Tensor, generator: torch.Generator) -> tuple[SharedGradients, str]:
    """What a client shares for a batch with random labels, and the loss: one output means a logistic one."""
    outputs = model(x)
    n_classes = outputs[0].numel()
    loss = "cross_entropy" if n_classes > 1 else "binary_cross_entropy_with_logits"
    labels = torch.randint(max(n_classes, 2), (len(x),), generator=generator)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(Loss(loss)(outputs, labels), list(named.values()), materialize_grads=True)
    return SharedGradients(dict(zip(named, found, strict=True))), loss


_DEFENCES: dict[str, Callable[[SharedGradients, str, torch.Generator], SharedGradients]] = {
    "none": lambda g, _, __: g,
    "gaussian": lambda g, text, generator: defenses.gaussian(g, float(text), generator=generator),
    "clip": lambda g, text, _: defenses.clip(g, float(text)),
    "top_k": lambda g, text, _: defenses.top_k(g, float(text)),
    "quantise": lambda g, text, _: defenses.quantise(g, getattr(torch, text)),
    "sign": lambda g, _, __: defenses.sign(g),
}


def defence_of(text: str) -> Callable[[SharedGradients, torch.Generator], SharedGradients]:
    """The defence that ``NAME:STRENGTH`` names.

    Examples
    --------
    >>> defence_of("clip:1.0")({"w": torch.tensor([3.0, 4.0])}, torch.Generator())["w"]
    tensor([0.6000, 0.8000])
    """
    name, _, strength = text.partition(":")
    require(name in _DEFENCES, "run_sweep", "defences", f"be among {', '.join(_DEFENCES)}", repr(text))
    strong = bool(strength) != (name in ("none", "sign"))
    require(strong, "run_sweep", "defences", "look like NAME:STRENGTH, none or sign", repr(text))
    defence = _DEFENCES[name]
    return lambda gradients, generator: defence(gradients, strength, generator)


def empty_row(case: Case) -> Row:
    """The row of a case of which nothing is measured yet."""
    return {**EMPTY, **asdict(case), "images": ", ".join(case.images), "key": case.key}
