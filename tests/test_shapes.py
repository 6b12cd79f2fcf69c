"""Shapes of usual layers on the meta device are torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rconv_fast.audit.shapes import UsualShapes

LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    **{layer.__name__: layer() for layer in (
        nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Softsign, nn.Sigmoid,
        nn.Tanh, nn.Hardsigmoid, nn.LogSigmoid, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    )},
    "in place": nn.ReLU(inplace=True),
    "functional": torch.relu,
    "method": lambda x: x.clamp(min=0),
    "broadcast": lambda x: x[:, :1] + x[:, :, :1],
    "scaled": lambda x: 2 * x + 1,
    "permuted": lambda x: F.relu(x.permute(0, 2, 3, 1)),
    "linear": nn.Linear(6, 5, device="meta"),
    "linear without a bias": nn.Linear(6, 5, bias=False, device="meta"),
    "linear by vector": lambda x: F.linear(x, x[0, 0, 0]),
    "other dtypes": lambda x: x + x.double() + x.long(),
    "comparison": lambda x: x > 0,
    "convolution": nn.Conv2d(3, 4, 3, device="meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_shape_dtype_and_strides_are_torchs(name: str) -> None:
    x = torch.zeros(2, 3, 4, 6, device="meta")
    expected = LAYERS[name](x.clone())
    with UsualShapes():
        found = LAYERS[name](x.clone())
    assert found.is_meta
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_what_does_not_fit_is_refused_as_by_torch() -> None:
    x = torch.zeros(2, 3, device="meta")
    for wrong in (lambda: F.linear(x, x.new_zeros(4, 5)), lambda: x + x.new_zeros(2, 4)):
        with pytest.raises(RuntimeError), UsualShapes():
            wrong()
