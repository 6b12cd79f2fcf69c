"""Models as users hold them, gradients as clients send them: the model is left alone, the gradients are understood."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rconv_fast.errors import ArgumentError, ArgumentTypeError
from rconv_fast.observation import SharedGradients
from rconv_fast.received import read_gradients
from rconv_fast.updates import gradients_from_update
from rconv_fast.wrappers import plain_parameters, reading_copy, unwrap, working_copy


class Keeper(nn.Module):
    """Keeps its activations, a lock, and a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3 * 16, 4)
        self.lock = threading.Lock()
        self.scale = torch.full((1,), 0.5)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.norm(self.conv(x)).relu()
        self.seen.append(self.hidden)
        return self.fc(self.hidden.flatten(1) * self.scale)


def gradients_of(model: nn.Module, size: int = 6) -> dict[str, Tensor | None]:
    x = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()))
    model.zero_grad()
    nn.functional.cross_entropy(model(x), torch.tensor([1, 3])).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_a_working_copy_shares_nothing_and_fires_nothing() -> None:
    model, fired = Keeper().eval(), []
    gradients_of(model)
    before, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    model.register_forward_pre_hook(lambda *_: fired.append("before"))
    model.conv.register_forward_hook(lambda *_: fired.append("after"))
    model.conv.register_full_backward_hook(lambda *_: fired.append("backward"))
    model.conv.weight.register_hook(lambda _: fired.append("gradient"))
    hooks = len(model.conv._forward_hooks)

    twin = working_copy(model, torch.float64)
    x = torch.rand(2, 1, 6, 6)
    expected = model(x)
    fired.clear()
    torch.testing.assert_close(twin(x.double()).float(), expected, rtol=1e-5, atol=1e-6)
    twin(x.double()).sum().backward()
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers(), twin.scale]:
            tensor.zero_()

    assert fired == []
    assert twin.scale.dtype == torch.float64
    assert not twin.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert len(model.conv._forward_hooks) == hooks
    assert float(model.scale) == 0.5


def test_a_parameter_used_twice_stays_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    twin = working_copy(model, torch.float64)
    assert twin[1].weight is twin[0].weight
    assert list(plain_parameters(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    read = read_gradients("invert", model, {"1.weight": torch.ones(4, 4)})
    assert list(read) == ["0.weight"]


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda m: torch.compile(m, backend="eager"),
    "both": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_wrappers_are_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Keeper().eval()
    wrapped, expected = wrap(model), gradients_of(model)
    assert unwrap(wrapped) is model
    assert type(working_copy(wrapped, torch.float64)) is Keeper
    named = {name: p.grad for name, p in wrapped.named_parameters()}
    assert all(name not in expected for name in named)
    read = read_gradients("invert", wrapped, named)
    assert list(read) == list(expected)
    assert all(torch.equal(read[n], g) for n, g in expected.items())


def test_a_wrapped_layer_is_looked_through() -> None:
    model = Keeper().eval()
    model.conv = torch.compile(model.conv, backend="eager")
    model.fc = nn.DataParallel(model.fc)
    named = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    twin = working_copy(model, torch.float64)
    assert list(read_gradients("invert", model, named)) == [name for name, _ in twin.named_parameters()]


def test_a_module_of_the_users_called_module_is_no_wrapper() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 1)

    model = Mine()
    assert unwrap(model) is model
    expected = ["module.weight", "module.bias"]
    assert list(read_gradients("invert", model, [torch.ones(1, 2), torch.ones(1)])) == expected
    update = gradients_from_update(model, {n: t + 1 for n, t in model.state_dict().items()}, 0.1)
    assert list(read_gradients("invert", model, update)) == expected


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("norm", [old_weight_norm, nn.utils.parametrizations.weight_norm], ids=["old", "new"])
def test_weight_norm_is_folded_with_its_gradients(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(norm(nn.Conv2d(1, 3, 3)), nn.Tanh(), nn.Flatten(), norm(nn.Linear(48, 4))).double()
    gradients, kind = gradients_of(model), type(model[0])
    noisy = SharedGradients(gradients, noise={name: 1e-3 for name in gradients})
    read, twin = read_gradients("invert", model, noisy), working_copy(model, torch.float64)
    expected = gradients_of(twin)
    assert set(read) == set(expected) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    for name, gradient in expected.items():
        torch.testing.assert_close(read[name], gradient, rtol=1e-10, atol=1e-14)
    assert type(model[0]) is kind  # the caller's model still has its weight norm
    assert list(gradients_of(model)) == list(gradients)
    # The noise: against perturbed gradients.
    draws = []
    for _ in range(300):
        drawn = {n: g + 1e-3 * torch.randn_like(g) for n, g in gradients.items()}
        draws.append(read_gradients("invert", model, drawn)["0.weight"])
    assert read.noise is not None
    torch.testing.assert_close(torch.stack(draws).std(dim=0), read.noise["0.weight"], rtol=0.25, atol=0)


SEEN: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "a mapping": lambda g: g,
    "a list": lambda g: list(g.values()),
    "a generator": lambda g: (t for t in g.values()),
    "numpy": lambda g: {n: t.numpy() for n, t in g.items()},
    "numpy of the other byte order": lambda g: {n: t.numpy().astype(">f4") for n, t in g.items()},
    "sparse": lambda g: {n: t.to_sparse() for n, t in g.items()},
    "nested": lambda g: {"step": 3, "gradients": g},
    "prefixed": lambda g: {f"module.{n}": t for n, t in g.items()},
}


@pytest.mark.parametrize("sent", SEEN.values(), ids=SEEN.keys())
def test_gradients_come_in_any_container(sent: Callable[[dict[str, Tensor]], Any]) -> None:
    model = Keeper().eval()
    expected = gradients_of(model)
    read = read_gradients("invert", model, sent(expected))
    assert list(read) == list(expected)
    for name, gradient in expected.items():
        assert read[name].layout == torch.strided
        assert not read[name].requires_grad
        assert torch.equal(read[name], gradient)


def test_what_was_not_seen_is_left_out() -> None:
    model = Keeper().eval()
    gradients = gradients_of(model)
    assert "conv.bias" not in read_gradients("invert", model, {**gradients, "conv.bias": None})
    assert list(read_gradients("invert", model, {"fc.bias": gradients["fc.bias"]})) == ["fc.bias"]
    model.conv.requires_grad_(False)
    read = read_gradients("invert", model, [gradients[n] for n, p in model.named_parameters() if p.requires_grad])
    assert list(read) == ["norm.weight", "norm.bias", "fc.weight", "fc.bias"]


def test_what_shared_gradients_know_is_kept() -> None:
    model = Keeper().eval()
    seen = SharedGradients(
        {"module.fc.bias": torch.ones(4)}, noise={"module.fc.bias": 0.1}, scale_known=False, steps=3, source="clipped"
    )
    read = read_gradients("invert", model, seen)
    assert (read.noise, read.scale_known, read.steps, read.source) == ({"fc.bias": 0.1}, False, 3, "clipped")


@pytest.mark.parametrize(
    ("gradients", "kind", "message"),
    [
        ({"fc.wait": torch.ones(4)}, ArgumentError, "gradients must be named as the model's parameters, got 'fc.wait'"),
        ({"fc.bias": torch.ones(5)}, ArgumentError, "gradients['fc.bias'] must have shape (4,), got (5,)"),
        ({"fc.bias": torch.ones(4) / 0}, ArgumentError, "gradients['fc.bias'] must be finite, got NaN or Inf"),
        ({"fc.bias": torch.zeros(4)}, ArgumentError, "gradients must not be all zero, got a zero gradient"),
        ({"fc.bias": torch.ones(4).int()}, ArgumentTypeError, "must be of a real floating type, got torch.int32"),
        ({"fc.bias": [1.0] * 4}, ArgumentTypeError, "gradients['fc.bias'] must be a tensor, got list"),
        ({}, ArgumentError, "gradients must hold at least one gradient, got none"),
        ({"fc.bias": None}, ArgumentError, "gradients must hold at least one gradient, got none"),
        ([torch.ones(4)], ArgumentError, "gradients must have 6 entries in parameter order, got 1"),
        (torch.ones(4), ArgumentTypeError, "gradients must be a mapping or a sequence of tensors, got Tensor"),
        ("gradients.pt", ArgumentTypeError, "gradients must be a mapping or a sequence of tensors, got str"),
    ],
)  # fmt: skip
def test_bad_gradients_are_one_line(gradients: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        read_gradients("f", Keeper(), gradients)
    assert str(caught.value).startswith("f: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reading_copy_shares_the_weights_and_nothing_that_a_run_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    twin = reading_copy(model, torch.float32)
    assert twin[0].weight.data_ptr() == model[0].weight.data_ptr()
    twin[0].weight.requires_grad_(False)
    assert model[0].weight.requires_grad
    before = model[1].running_mean.clone()
    twin(torch.rand(5, 3)).sum()
    assert torch.equal(model[1].running_mean, before)
    assert not torch.equal(twin[1].running_mean, before)
    torch.testing.assert_close(twin[2].weight, model[2].weight)
    other = reading_copy(model, torch.float64)
    assert other[0].weight.dtype == torch.float64
