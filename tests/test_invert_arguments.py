"""Bad input to ``invert`` is one line that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import gradients_of
from rconv_fast import RconvError, invert
from rconv_fast.errors import ArgumentError, ArgumentTypeError
from small_networks import SHAPE, X, small


def bad_gradients(change: Callable[[dict[str, Tensor]], Any]) -> Any:
    model = small()
    shared = dict(gradients_of(model, X))
    changed = change(shared)
    return model, shared if changed is None else changed


def set_first(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda g: g.__setitem__("0.weight", value(g["0.weight"]))


BAD = {
    "NaN": (set_first(lambda g: g * math.nan), ArgumentError, "gradients['0.weight'] must be finite"),
    "one infinite value": (
        set_first(lambda g: g.index_fill(0, torch.tensor([3]), math.inf)),
        ArgumentError,
        "gradients['0.weight'] must be finite, got NaN or Inf",
    ),
    "an unknown name": (
        lambda g: g.__setitem__("7.weight", torch.ones(3)),
        ArgumentError,
        "gradients must be named as the model's parameters, got '7.weight'",
    ),
    "a wrong shape": (
        set_first(lambda g: g[:, :2]),
        ArgumentError,
        "gradients['0.weight'] must have shape (24, 3, 5, 5), got (24, 2, 5, 5)",
    ),
    "a scalar": (set_first(lambda g: g.sum()), ArgumentError, "must have shape (24, 3, 5, 5), got ()"),
    "zero gradients": (
        lambda g: {name: torch.zeros_like(value) for name, value in g.items()},
        ArgumentError,
        "gradients must not be all zero",
    ),
    "too short a sequence": (
        lambda g: list(g.values())[:-1],
        ArgumentError,
        "gradients must have 6 entries in parameter order, got 5",
    ),
    "an empty mapping": (lambda _: {}, ArgumentError, "gradients must hold at least one gradient, got none"),
    "a sequence out of order": (lambda g: list(g.values())[::-1], ArgumentError, "must have shape"),
    "a text": (
        set_first(lambda _: "0.5"),
        ArgumentTypeError,
        "gradients['0.weight'] must be a tensor, got str",
    ),
    "integers": (
        set_first(lambda g: g.long()),
        ArgumentTypeError,
        "gradients['0.weight'] must be of a real floating type, got torch.int64",
    ),
    "complex numbers": (
        set_first(lambda g: g.to(torch.complex128)),
        ArgumentTypeError,
        "gradients['0.weight'] must be of a real floating type",
    ),
    "no collection": (lambda _: 3, ArgumentTypeError, "gradients must be"),
    "one tensor": (lambda g: g["0.weight"], ArgumentTypeError, "gradients must be"),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_gradients(change: Callable[..., Any], kind: type[RconvError], message: str) -> None:
    model, shared = bad_gradients(change)
    check(kind, message, model, shared, SHAPE)


OPTIONS = {
    "an unknown loss": ({"loss": "hinge"}, ArgumentError, "loss must be one of cross_entropy, "),
    "an unknown prior": ({"prior": "smooth"}, ArgumentError, "prior must be one of "),
    "an empty batch": ({"batch_size": 0}, ArgumentError, "batch_size must be at least 1, got 0"),
    "an input shape of nothing": ({"input_shape": ()}, ArgumentError, "input_shape must be one sample's shape"),
    "a side of 0": ({"input_shape": (3, 0, 12)}, ArgumentError, "input_shape must be one sample's shape"),
    "another number of channels": ({"input_shape": (1, 12, 12)}, ArgumentError, "input_shape must be one that"),
    "a batch in the shape": ({"input_shape": (1, 3, 12, 12)}, ArgumentError, "got (1, 3, 12, 12)"),
    "an integer as shape": ({"input_shape": 12}, ArgumentTypeError, "input_shape must be"),
    "a working precision that is no dtype": ({"dtype": "float64"}, ArgumentTypeError, "dtype must be"),
    "an integer working precision": ({"dtype": torch.int64}, ArgumentTypeError, "dtype must be"),
    "a batch size that is no number": ({"batch_size": "4"}, ArgumentTypeError, "batch_size must be"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_options(change: dict[str, Any], kind: type[RconvError], message: str) -> None:
    model, shared = bad_gradients(lambda _: None)
    check(kind, message, **{"model": model, "gradients": shared, "input_shape": SHAPE, **change})


def test_bad_models() -> None:
    gradients = {"weight": torch.ones(3)}
    check(ArgumentTypeError, "model must be a torch.nn.Module, got function", F.relu, gradients, SHAPE)
    check(ArgumentError, "model must have parameters", nn.ReLU(), gradients, SHAPE)


def check(kind: type[RconvError], message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(kind) as caught:
        invert(*args, **kwargs)
    text = str(caught.value)
    assert message in text
    assert text.startswith("invert: ")
    assert "\n" not in text
    assert isinstance(caught.value, TypeError if kind is ArgumentTypeError else ValueError)
