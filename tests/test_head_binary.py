"""Logistic and regression heads: the readings of one gradient, checked against the batch that made it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rconv_fast.heads.head import Head
from rconv_fast.heads.logistic import logistic_readings
from rconv_fast.heads.mse import mse_readings
from rconv_fast.losses import Loss


def _case(loss, n, d, batch, *, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(n, d, generator=generator, dtype=torch.float64) * 2 - 1) / d**0.5
    offset = (torch.rand(n, generator=generator, dtype=torch.float64) * 2 - 1) / d**0.5 if bias else None
    x = F.leaky_relu(torch.randn(batch, d, generator=generator, dtype=torch.float64), 0.2)
    if loss is F.mse_loss:
        target = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    else:
        target = torch.randint(2, (batch, n), generator=generator).double()
    parameters = [p.requires_grad_() for p in (weight, offset) if p is not None]
    gradients = torch.autograd.grad(loss(F.linear(x, weight, offset), target), parameters)
    weight = weight.detach()
    offset = None if offset is None else offset.detach()
    name = Loss("mse" if loss is F.mse_loss else "binary_cross_entropy_with_logits")
    return x, target, Head.create(gradients[0], gradients[1] if bias else None, weight, offset, name)


def _distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("n", [1, 3])
def test_logistic_head_with_bias_has_one_reading(n, seed):
    x, target, head = _case(F.binary_cross_entropy_with_logits, n, 20, 1, bias=True, seed=seed)
    (reading,) = logistic_readings(head)
    assert _distance(reading.inputs, x) < 1e-12
    assert torch.equal(reading.labels, target)
    assert _distance(reading.grad_logits, head.grad_bias[None]) < 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_logistic_head_without_bias_lists_the_true_sample_among_few(seed):
    x, target, head = _case(F.binary_cross_entropy_with_logits, 1, 20, 1, bias=False, seed=seed)
    readings = logistic_readings(head)
    assert 1 <= len(readings) <= 4
    right = [r for r in readings if _distance(r.inputs, x) < 1e-9]
    assert len(right) == 1
    assert torch.equal(right[0].labels, target)
    for r in readings:  # every reading makes the same gradient
        grad = r.grad_logits.mT @ r.inputs
        logits = head.logits(r.inputs)
        assert _distance(torch.sigmoid(logits) - r.labels, r.grad_logits) < 1e-9
        assert _distance(grad, head.grad_weight) < 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_logistic_head_with_several_logits_needs_no_bias(seed):
    x, target, head = _case(F.binary_cross_entropy_with_logits, 5, 20, 1, bias=False, seed=seed)
    readings = logistic_readings(head)
    right = [r for r in readings if _distance(r.inputs, x) < 1e-9]
    assert len(right) == 1
    assert torch.equal(right[0].labels, target)


def test_logistic_head_does_not_accept_a_mixture():
    *_, head = _case(F.binary_cross_entropy_with_logits, 1, 20, 3, bias=True, seed=0)
    assert logistic_readings(head) == []


@pytest.mark.parametrize("seed", range(5))
def test_mse_head_with_bias_recovers_input_and_target(seed):
    x, target, head = _case(F.mse_loss, 4, 20, 1, bias=True, seed=seed)
    (reading,) = mse_readings(head)
    assert _distance(reading.inputs, x) < 1e-12
    assert _distance(reading.labels, target) < 1e-11


def test_mse_head_without_bias_or_targets_has_no_reading():
    *_, head = _case(F.mse_loss, 4, 20, 1, bias=False, seed=0)
    assert mse_readings(head) == []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_mse_head_with_targets_recovers_a_batch(batch, bias):
    x, target, head = _case(F.mse_loss, 6, 20, batch, bias=bias, seed=batch)
    readings = mse_readings(head, targets=target)
    assert min(_distance(r.inputs, x) for r in readings) < 1e-8


def test_mse_head_does_not_take_a_batch_for_one_sample():
    *_, head = _case(F.mse_loss, 4, 20, 3, bias=True, seed=0)
    assert mse_readings(head) == []
