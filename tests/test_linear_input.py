"""The input of a linear layer from its gradients, and how many digits they have."""

from __future__ import annotations

import pytest
import torch

from rconv_fast.errors import ArgumentError
from rconv_fast.heads import recover_linear_input
from rconv_fast.heads.spectrum import numerical_rank
from rconv_fast.rounding import rounding_of


def test_linear_input_uses_all_rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, generator=generator, dtype=torch.float64)
    delta = torch.randn(20, generator=generator, dtype=torch.float64) * 1e-6
    exact = torch.outer(delta, x)
    torch.testing.assert_close(recover_linear_input(exact, delta), x, rtol=1e-13, atol=0)
    noise = 1e-9 * torch.randn(20, 30, generator=generator, dtype=torch.float64)
    error = (recover_linear_input(exact + noise, delta) - x).norm()
    row = int(delta.abs().argmax())  # the best single row is worse than all rows together
    assert error < ((exact + noise)[row] / delta[row] - x).norm()
    tiny = recover_linear_input(exact * 1e-200, delta * 1e-200)  # |db|^2 would underflow
    torch.testing.assert_close(tiny, x, rtol=1e-12, atol=0)


def test_linear_input_keeps_the_dtype():
    x = recover_linear_input(torch.ones(2, 3), torch.ones(2))
    assert x.dtype == torch.float32
    assert torch.equal(x, torch.ones(3))


def test_rounding_is_read_off_the_values():
    values = torch.rand(50, dtype=torch.float64)
    assert rounding_of(values) == torch.finfo(torch.float64).eps
    assert rounding_of(values.float().double()) == torch.finfo(torch.float32).eps
    assert rounding_of(values.bfloat16().float(), None) == torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(("rounding", "noise"), [(2.2e-16, 3e-16), (1.2e-7, 1e-7)])
def test_rank_is_the_gap_above_the_rounding(rounding, noise):
    values = torch.tensor([1.0, 0.5, 1e-2, 1e-4, noise, noise / 2, noise / 1000], dtype=torch.float64)
    assert numerical_rank(values, (7, 20), rounding) == 4


def test_zero_gradient_of_a_linear_layer():
    with pytest.raises(ArgumentError, match="grad_bias must not be zero"):
        recover_linear_input(torch.ones(2, 3), torch.zeros(2))
