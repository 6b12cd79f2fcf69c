"""Gradients out of a weight update, against torch.optim.SGD."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rconv_fast.errors import ArgumentError, ArgumentTypeError
from rconv_fast.updates import gradients_from_update


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


def test_float32_states_keep_what_rounding_leaves() -> None:
    before, after, gradients = step(network(torch.float32).eval(), 0.1)
    found = gradients_from_update(before, after, 0.1)
    for name, gradient in gradients.items():
        assert found[name].dtype == torch.float32
        rounding = 6e-8 * float(before[name].abs().max()) / 0.1
        assert float((found[name] - gradient).abs().max()) <= 1.5 * rounding


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


def test_batch_norm_in_training_mode_is_refused() -> None:
    before, after, _ = step(network().train(), 0.1)
    with pytest.raises(ArgumentError, match=r"after\['1.running_mean'\] must be unchanged \(.*training mode.*\)"):
        gradients_from_update(before, after, 0.1)
    names = [n for n, _ in network().named_parameters()]
    with pytest.raises(ArgumentError, match="training mode"):
        gradients_from_update(before, after, 0.1, parameters=names)


def test_a_step_with_momentum_is_not_a_plain_one() -> None:
    with pytest.raises(ArgumentError, match=r"momentum must be 0 \(.*earlier gradients\), got 0.9$"):
        gradients_from_update({"w": torch.ones(1)}, {"w": torch.zeros(1)}, 0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, r"lr must be positive and finite, got 0.0$"),
        ({"lr": float("nan")}, r"lr must be positive and finite, got nan$"),
        ({"steps": 5}, r"steps must be 1 \(several steps add .*\), got 5$"),
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
