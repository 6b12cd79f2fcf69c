"""Rules that disagree with autograd do not get into a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rconv_fast.layers import registry
from rconv_fast.layers.activation import ActivationRule, of_module
from rconv_fast.layers.check import WrongRuleError
from rconv_fast.layers.registry import Call, register_rule
from rconv_fast.walk.reader import build_graph


class Doubled(ActivationRule):
    """A derivative twice too large."""

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        return 2 * super().pull_gradient(grad, y, operand, shape)


def network(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 4)).double()


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))


def rule_of(module: nn.Module, _: Call) -> ActivationRule:
    activation = of_module(module)
    assert activation is not None
    return ActivationRule(activation)


@pytest.mark.usefixtures("rules")
def test_a_wrong_derivative_is_refused_by_name() -> None:
    register_rule(nn.Sigmoid, lambda module, call: Doubled(rule_of(module, call).activation))
    with pytest.raises(WrongRuleError, match=r"'1'.*pull_gradient"):
        build_graph(network(nn.Sigmoid()), {}, (6,), 1)


@pytest.mark.usefixtures("rules")
def test_that_the_usual_rule_agreed_says_nothing_of_another_of_its_class() -> None:
    build_graph(network(nn.Sigmoid()), {}, (6,), 1)
    register_rule(
        nn.Sigmoid, lambda module, call: replace(rule_of(module, call), activation=rule_of(nn.Tanh(), call).activation)
    )
    with pytest.raises(WrongRuleError):
        build_graph(network(nn.Sigmoid()), {}, (6,), 1)
