"""Peeling of fully connected ReLU stacks: more samples than the head has classes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks import assert_recovered, gradients_of, photo, some_labels
from rconv_fast import invert
from rconv_fast.errors import ArgumentError
from rconv_fast.heads import peel_relu_batch


def make_stack(batch, widths, *, seed=0, shift=0.0, classes=10):
    """Inputs behind a ReLU; `shift` moves the first layer's biases down, so that fewer neurons are active."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [*widths, classes]
    layers = []
    for k, (a, b) in enumerate(pairwise(sizes)):
        weight = (torch.rand(b, a, generator=generator, dtype=torch.float64) * 2 - 1) / a**0.5
        bias = (torch.rand(b, generator=generator, dtype=torch.float64) * 2 - 1) / a**0.5
        layers.append((weight.requires_grad_(), (bias - (shift if k == 0 else 0.0)).requires_grad_()))
    x = torch.randn(batch, sizes[0], generator=generator, dtype=torch.float64).relu()
    labels = torch.randint(classes, (batch,), generator=generator)
    value = x
    for k, (weight, bias) in enumerate(layers):
        value = F.linear(value if k == 0 else value.relu(), weight, bias)
    flat = torch.autograd.grad(F.cross_entropy(value, labels), [p for pair in layers for p in pair])
    grads = list(zip(flat[::2], flat[1::2], strict=True))
    return x, labels, [(w.detach(), b.detach()) for w, b in layers], grads


def assert_separated(result, x, labels, tolerance):
    assert result.complete, result.reason
    assert result.batch_size == len(x)
    distance = (result.inputs.double()[:, None] - x[None]).norm(dim=2)
    nearest = distance.argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(x)))
    assert float((distance.amin(1) / x[nearest].norm(dim=1)).max()) < tolerance
    assert torch.equal(result.labels, labels[nearest])


@pytest.mark.parametrize("widths", [[64, 1024], [64, 1024, 96]], ids=["one hidden", "two hidden"])
def test_peeling_separates_more_samples_than_classes(widths):
    x, labels, layers, grads = make_stack(16, widths, shift=0.6)
    result = peel_relu_batch(layers, grads)
    assert_separated(result, x, labels, 1e-8)
    first = result.grad_preactivation.mT @ result.inputs
    assert float((first - grads[0][0]).norm() / grads[0][0].norm()) < 1e-9


def test_peeling_of_float32_gradients():
    x, labels, layers, grads = make_stack(12, [64, 1024], shift=0.7)
    rounded = [(a.float(), b.float()) for a, b in grads]
    result = peel_relu_batch(layers, rounded)
    assert result.inputs.dtype == torch.float32
    assert_separated(result, x, labels, 1e-3)


def test_sparsity_search_where_no_neuron_is_alone():
    """Eleven samples, half of the neurons active: hardly a neuron has one sample only."""
    x, labels, layers, grads = make_stack(11, [64, 256], classes=6, seed=1)
    result = peel_relu_batch(layers, grads)
    assert_separated(result, x, labels, 1e-8)


def test_stalled_peeling_returns_only_true_samples():
    x, labels, layers, grads = make_stack(40, [64, 128])
    result = peel_relu_batch(layers, grads)
    assert not result.complete
    assert "of 40 samples" in result.reason
    if len(result.inputs):
        distance = (result.inputs[:, None] - x[None]).norm(dim=2)
        nearest = distance.argmin(1)
        assert float((distance.amin(1) / x[nearest].norm(dim=1)).max()) < 1e-6
        assert torch.equal(result.labels, labels[nearest])


def test_wrong_weights_certify_nothing():
    *_, grads = make_stack(8, [64, 512], shift=0.6)
    _, _, others, _ = make_stack(8, [64, 512], shift=0.6, seed=5)
    result = peel_relu_batch(others, grads)
    assert len(result.inputs) == 0
    assert not result.complete


def test_arguments_are_checked():
    _, _, layers, grads = make_stack(3, [16, 32])
    with pytest.raises(ArgumentError, match="peel_relu_batch: layers must hold at least 2 layers, got 1"):
        peel_relu_batch(layers[:1], grads[:1])
    with pytest.raises(ArgumentError, match="grads must hold 2 pairs"):
        peel_relu_batch(layers, grads[:1])
    with pytest.raises(ArgumentError, match="reduction must be one of"):
        peel_relu_batch(layers, grads, reduction="none")


def wide_network(classes=10):
    """One convolution, then 1024 ReLU neurons that are seldom active."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 24, 3, stride=2, padding=1)
    wide = nn.Linear(384, 1024)
    model = nn.Sequential(conv, nn.LeakyReLU(0.2), nn.Flatten(), wide, nn.ReLU(), nn.Linear(1024, classes))
    with torch.no_grad():
        wide.bias -= 0.25
    return model.double()


def test_invert_takes_a_batch_apart_in_a_wide_relu_layer():
    done = assert_recovered(wide_network(), photo(8, batch=12), psnr=200)
    assert any("taken apart in 3" in note for note in done.result.notes)


def test_invert_peels_with_the_batch_size_given():
    x = photo(8, batch=12)
    model = wide_network()
    found = invert(model, gradients_of(model, x, some_labels(12)), x.shape[1:], batch_size=12)
    assert found.verified
