"""Gradients out of a weight update, against torch.optim.SGD."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rconv_fast.errors import ArgumentError, ArgumentTypeError
from rconv_fast.observation import LocalTraining, SharedGradients
from rconv_fast.updates import gradients_from_update, spacing


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).to(dtype)


def step(model: nn.Module, lr: float, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """One step of torch's own SGD: states before and after, and the gradients it was made of."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(3, 2, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    before = copy.deepcopy(model.state_dict())
    nn.functional.cross_entropy(model(inputs), torch.tensor([0, 3, 3])).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return before, copy.deepcopy(model.state_dict()), gradients


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("lr", [0.1, 1e-3])
def test_one_step_of_sgd_is_undone(lr: float, weight_decay: float) -> None:
    before, after, gradients = step(network().eval(), lr, weight_decay=weight_decay)
    found = gradients_from_update(before, after, lr, weight_decay=weight_decay)
    assert list(found) == list(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_weight_decay_makes_a_difference() -> None:
    before, after, gradients = step(network().eval(), 0.1, weight_decay=0.02)
    wrong = gradients_from_update(before, after, 0.1)
    assert not torch.allclose(wrong["0.weight"], gradients["0.weight"], rtol=1e-3)


@pytest.mark.parametrize("lr", [0.1, 0.01])
def test_the_noise_is_what_rounding_leaves(lr: float) -> None:
    """Against gradients of the same float32 step: within the bound of each entry, and as large as said on average.

    Whether the kernel rounds at lr * g depends on the processor; the bound holds either way, the average within 2.
    """
    before, after, gradients = step(network(torch.float32).eval(), lr)
    found = gradients_from_update(before, after, lr)
    assert found.noise is not None
    for name, gradient in gradients.items():
        assert found[name].dtype == torch.float32
        sigma = torch.as_tensor(found.noise[name])
        error = (found[name].double() - gradient.double()).abs()
        # Half a spacing at w' and at lr * g is sqrt(3) standard deviations of each; 1e-6: the float32 result itself.
        bound = math.sqrt(6) * sigma + 1e-6 * gradient.abs()
        assert bool((error <= bound).all()), name
        if gradient.numel() > 50:
            ratio = float((error / sigma).square().mean().sqrt())
            assert 0.5 < ratio < 1.5


def test_states_rounded_on_their_way_are_known_by_their_values() -> None:
    before, after, gradients = step(network().eval(), 0.1)
    coarse = {name: t.to(torch.bfloat16).to(t.dtype) if t.is_floating_point() else t for name, t in after.items()}
    fine, found = (gradients_from_update(before, state, 0.1) for state in (after, coarse))
    assert fine.noise is not None
    assert found.noise is not None
    error = (found["4.weight"] - gradients["4.weight"]) / torch.as_tensor(found.noise["4.weight"])
    assert 0.7 < float(error.square().mean().sqrt()) < 1.3
    assert float(torch.as_tensor(fine.noise["4.weight"]).max()) < 1e-15


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_spacing_is_numpys(dtype: type) -> None:
    values = np.array([0.0, 1.0, 0.999, -3.0, 6e-5, 1e-30, 1024.0], dtype=dtype)
    expected = torch.from_numpy(np.abs(np.spacing(values)).astype(np.float64))
    name = {np.float16: torch.float16, np.float32: torch.float32, np.float64: torch.float64}[dtype]
    assert torch.equal(spacing(torch.from_numpy(values.astype(np.float64)), name), expected)


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.9, 0.1)])
def test_several_steps_give_the_mean_of_their_gradients(momentum: float, weight_decay: float) -> None:
    """Exactly so where the gradient is the same at every step: a model that is linear in its parameters."""
    model = nn.Linear(6, 4).double()
    before, x = copy.deepcopy(model.state_dict()), torch.rand(3, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=weight_decay)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    options = {"steps": 4, "momentum": momentum, "weight_decay": weight_decay}
    found = gradients_from_update(before, model.state_dict(), 0.05, **options)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-10, atol=1e-12)
    assert found.steps == 4
    assert found.training == LocalTraining(0.05, 4, momentum, weight_decay)
    assert found.source.startswith("update, lr 0.05, 4 steps")


def test_statistics_stay_when_the_model_that_had_them_goes_on() -> None:
    model = network()
    before, after, _ = step(model, 0.1)
    found = gradients_from_update(before, model, 0.1)
    model.load_state_dict(before)
    assert torch.equal(found.statistics["1.running_mean"], after["1.running_mean"])
    assert not torch.equal(found.statistics["1.running_mean"], before["1.running_mean"])


ADAMS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def adam_step(name: str, dtype: torch.dtype, **options: Any) -> tuple[dict[str, Tensor], SharedGradients]:
    """The gradients of one step of torch's own Adam, and what is found of them."""
    options = {"weight_decay": 0.0, **options}  # torch's AdamW has one of its own accord
    model = network(dtype).eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 3, 3])).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    ADAMS[name](model.parameters(), lr=1e-3, **options).step()
    return gradients, gradients_from_update(before, model.state_dict(), 1e-3, optimizer=name, **options)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.02}, {"eps": 1e-6}], ids=str)
@pytest.mark.parametrize("name", ADAMS)
def test_the_first_step_of_adam_is_undone(name: str, options: dict[str, float]) -> None:
    gradients, found = adam_step(name, torch.float64, **options)
    assert "first step of adam" in found.source
    for key, gradient in gradients.items():
        assert float((found[key] - gradient).norm()) < 1e-6 * float(gradient.norm()), key
        error = (found[key] - gradient) / torch.as_tensor(found.noise[key]).double()
        assert float(error.square().mean().sqrt()) < 1.5, key


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("name", ADAMS)
def test_of_large_gradients_the_first_step_of_adam_in_float32_keeps_the_sign(name: str, weight_decay: float) -> None:
    gradients, found = adam_step(name, torch.float32, weight_decay=weight_decay)
    sizes = {True: 0, False: 0}
    for key, gradient in gradients.items():
        sigma = torch.as_tensor(found.noise[key])
        known = sigma.isfinite()
        sizes[True], sizes[False] = sizes[True] + int(known.sum()), sizes[False] + int((~known).sum())
        told = ~known & (found[key] != 0)
        assert torch.equal(found[key].sign()[told], gradient.sign()[told]), key
        assert bool((gradient.abs() >= found[key].abs())[~known].all()), key
        assert bool(((found[key] - gradient).abs() <= 6 * sigma)[known].all()), key
    assert min(sizes.values()) > 0


def test_one_step_with_momentum_is_a_plain_one() -> None:
    before, after, gradients = step(network().eval(), 0.1, momentum=0.9)
    found = gradients_from_update(before, after, 0.1, momentum=0.9)
    torch.testing.assert_close(found["4.bias"], gradients["4.bias"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("as_numpy", [False, True])
def test_lists_in_state_dict_order_are_taken(as_numpy: bool) -> None:
    model = network().eval()
    before, after, gradients = step(model, 0.1)
    convert = (lambda t: t.numpy()) if as_numpy else (lambda t: t)
    lists = [[convert(t) for t in state.values()] for state in (before, after)]
    found = gradients_from_update(*lists, lr=0.1, names=list(before))
    assert list(found) == list(gradients)
    torch.testing.assert_close(found["4.bias"], gradients["4.bias"], rtol=1e-9, atol=1e-12)
    assert isinstance(lists[0][0], np.ndarray) is as_numpy


def test_parameters_decide_what_a_buffer_is() -> None:
    before = {"w": torch.ones(2), "table": torch.ones(2)}
    after = {"w": torch.zeros(2), "table": torch.zeros(2)}
    assert list(gradients_from_update(before, after, 1.0)) == ["w", "table"]
    assert list(gradients_from_update(before, after, 1.0, parameters=["w"])) == ["w"]


def test_running_statistics_of_training_mode_are_kept() -> None:
    before, after, gradients = step(network().train(), 0.1)
    for options in ({}, {"parameters": [n for n, _ in network().named_parameters()]}):
        found = gradients_from_update(before, after, 0.1, **options)
        assert list(found) == list(gradients)
        assert list(found.statistics) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
        assert torch.equal(found.statistics["1.running_var"], after["1.running_var"])
    assert gradients_from_update(before, before, 0.1).statistics == {}


def as_lists(state: dict[str, Tensor]) -> list[Any]:
    """As Flower's NDArrays arrive: counters as numpy scalars or plain numbers."""
    arrays: list[Any] = [t.numpy() for t in state.values()]
    return [array if array.ndim else array[()] for array in arrays]


def as_parameters(state: dict[str, Tensor]) -> SimpleNamespace:
    buffers = [io.BytesIO() for _ in state]
    for buffer, tensor in zip(buffers, state.values(), strict=True):
        np.save(buffer, tensor.numpy(), allow_pickle=False)
    return SimpleNamespace(tensors=[b.getvalue() for b in buffers], tensor_type="numpy.ndarray")


class Record(dict[str, Any]):
    """Flower's ArrayRecord: a mapping of names to objects that give numpy arrays."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__({n: SimpleNamespace(numpy=t.numpy) for n, t in state.items()})


CONTAINERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "NDArrays with scalars": as_lists,
    "Flower's Parameters": as_parameters,
    "Flower's ArrayRecord": Record,
    "Flower's Message": lambda s: SimpleNamespace(content=SimpleNamespace(array_records={"arrays": Record(s)})),
    "a checkpoint": lambda s: {"epoch": 3, "loss": torch.tensor(0.1), "state_dict": s, "optimizer": {"state": {}}},
    "DataParallel": lambda s: {f"module.{n}": t for n, t in s.items()},
    "a checkpoint of DDP, compiled": lambda s: {"model": {f"module._orig_mod.{n}": t for n, t in s.items()}},
    "a compiled layer": lambda s: {n.replace("4.", "4._orig_mod."): t for n, t in s.items()},
}


@pytest.mark.parametrize("contain", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_states_come_in_any_container(contain: Callable[[dict[str, Tensor]], Any]) -> None:
    before, after, gradients = step(network().eval(), 0.1)
    found = gradients_from_update(before, contain(after), 0.1, names=list(before))
    assert list(found) == list(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, r"lr must be positive and finite, got 0.0$"),
        ({"lr": float("nan")}, r"lr must be positive and finite, got nan$"),
        ({"steps": 0}, r"steps must be at least 1, got 0$"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0$"),
        ({"optimizer": "lion"}, r"optimizer must be one of sgd, adam, adamw, got 'lion'$"),
        (
            {"optimizer": "adam", "after": {"w": torch.tensor([0.7, 1.0])}},
            r"after\['w'\] must be within lr of before, as a first step of adam is, got 3 lr away$",
        ),
        ({"eps": 0.0}, r"eps must be positive and finite, got 0.0$"),
        ({"optimizer": "adam", "steps": 2}, r"steps must be 1 with adam, got 2$"),
        ({"optimizer": "adam", "momentum": 0.9}, r"momentum must be 0 with adam, got 0.9$"),
        ({"weight_decay": -1.0}, r"weight_decay must be >= 0, got -1.0$"),
        ({"after": {}}, r"after must hold \['w'\]"),
        (
            {"after": {"w": torch.ones(2), "v": torch.ones(1)}},
            r"after must hold only the names of before, got also \['v'\]$",
        ),
        ({"after": {"w": torch.ones(3)}}, r"after\['w'\] must have shape \(2,\), got \(3,\)$"),
        (
            {"after": {"w": torch.tensor([1.0, float("inf")])}},
            r"after\['w'\] must be finite, got NaN or Inf$",
        ),
        ({"parameters": ["v"]}, r"before must hold every parameter, got none called \['v'\]$"),
        ({"before": [torch.ones(2)]}, r"names must be given"),
        ({"before": [torch.ones(2)], "names": ["w", "v"]}, r"before must hold 2 tensors, one a name, got 1$"),
        (
            {"before": {"n": torch.tensor(3)}, "after": {"n": torch.tensor(3)}},
            r"before must hold at least one floating-point parameter, got none$",
        ),
    ],
)
def test_what_cannot_be_undone_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"before": {"w": torch.ones(2)}, "after": {"w": torch.zeros(2)}, "lr": 0.1}
    with pytest.raises(ArgumentError, match=f"^gradients_from_update: {message}"):
        gradients_from_update(**(arguments | changes))


def test_wrong_types_are_refused() -> None:
    with pytest.raises(ArgumentTypeError, match=r"before\['w'\] must be a tensor, got list$"):
        gradients_from_update({"w": [1.0]}, {"w": torch.zeros(1)}, 0.1)
    with pytest.raises(ArgumentTypeError, match=r"before must be a mapping or a sequence of tensors, got int$"):
        gradients_from_update(3, {"w": torch.zeros(1)}, 0.1)  # type: ignore[arg-type]
