"""Ctrl-C and failed allocations: what was known by then is kept, and nothing is taken for an answer."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

from attacks import gradients_of, photo
from rconv_fast import gradients_from_update, invert
from rconv_fast.errors import InterruptedInversionError
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.losses import Loss
from rconv_fast.polish import polish


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def network(*front: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*front, nn.Conv2d(3, 24, 3, 2, 1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(384, 10)).double()


def of_steps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([1])).backward()
        optimiser.step()
    after = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    return gradients_from_update(before, after, 1e-3, steps=2)


# Where Ctrl-C falls, what the gradients are like, and whether features of the last layer are known by then.
STAGES = {
    "head": ("rconv_fast.invert.head_candidates", {}, False),
    "layer": ("rconv_fast.walk.pass_.solve", {}, True),
    "joint estimate first": ("rconv_fast.one_reading.joint_answer", {"noise": 1e-3}, True),
    "joint estimate of rounded gradients": (
        "rconv_fast.one_reading.joint_answer",
        {"dtype of gradients": "bfloat16"},
        True,
    ),
    "polish": ("rconv_fast.one_reading.polish", {"dtype of gradients": "float32"}, True),
    "several steps": ("rconv_fast.invert.answer_of_steps", {"steps": 2}, True),
}


@pytest.mark.parametrize(("where", "options", "known"), STAGES.values(), ids=STAGES.keys())
def test_ctrl_c_keeps_what_is_known(
    where: str, options: dict[str, object], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, options = network(), photo(8), dict(options)
    shared = of_steps(model, x) if options.pop("steps", 1) == 2 else gradients_of(model, x)
    if kind := options.pop("dtype of gradients", None):
        shared = {name: g.to(getattr(torch, str(kind))) for name, g in shared.items()}
    module, _, name = where.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, interrupt)
    if name == "polish":
        monkeypatch.setattr(importlib.import_module(module), "match_bar", lambda _: 0.0)
    with pytest.raises(InterruptedInversionError) as caught:
        invert(model, shared, x.shape[1:], **options)
    found = caught.value.inversion
    assert isinstance(caught.value, KeyboardInterrupt)
    assert not found.verified or float((found.inputs - x).abs().max()) < 1e-5  # the polish had no need to come
    assert ("3" in found.features) == known
    assert found.labels is None or found.labels.tolist() == [1]


def test_ctrl_c_in_a_search_for_a_hidden_pattern_keeps_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24 * 36, 10)
    ).double()
    x = photo(12, channels=1)
    monkeypatch.setattr("rconv_fast.walk.hidden.alternate", interrupt)
    with pytest.raises(InterruptedInversionError) as caught:
        invert(model, gradients_of(model, x), x.shape[1:])
    assert "4" in caught.value.inversion.features
    assert caught.value.inversion.stops_at == "2"


@pytest.mark.parametrize("text", ["DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", "other"])
def test_a_polish_does_not_hide_a_failed_allocation(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), photo(8)
    shared = gradients_of(model, x)
    sigma = {name: g.square().mean().sqrt() for name, g in shared.items()}
    problem = GradientMap.read(model, Loss("cross_entropy"), torch.tensor([1]), shared, sigma, x.shape)

    def fail(*_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr("rconv_fast.polish._moved", fail)
    start = x + 0.01
    if "allocate" in text:
        with pytest.raises(RuntimeError, match="allocate memory"):
            polish(problem, start, 1e-12)
    else:
        assert torch.equal(polish(problem, start, 1e-12), start)
