"""Batches behind a softmax head with known samples, and what a separation must say of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Batch:
    inputs: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    grad_weight: torch.Tensor
    grad_bias: torch.Tensor | None

    @property
    def head(self):
        return self.grad_weight, self.grad_bias, self.weight, self.bias


def gradients(inputs, labels, weight, bias, class_weights=None, **loss):
    leaves = [p.detach().clone().requires_grad_() for p in (weight, bias) if p is not None]
    value = F.cross_entropy(
        F.linear(inputs, leaves[0], leaves[1] if bias is not None else None), labels, class_weights, **loss
    )
    grads = torch.autograd.grad(value, leaves)
    return Batch(inputs, labels, weight, bias, grads[0], grads[1] if bias is not None else None)


def make_batch(n, batch, *, d=192, seed=0, bias=True, bound=None, labels=None, slope=0.0, size=1.0, **loss):
    """A head with PyTorch's initialisation (or uniform in +-bound) behind a (leaky) ReLU."""
    generator = torch.Generator().manual_seed(seed)
    bound = d**-0.5 if bound is None else bound
    weight = (torch.rand(n, d, generator=generator, dtype=torch.float64) * 2 - 1) * bound
    offset = (torch.rand(n, generator=generator, dtype=torch.float64) * 2 - 1) * bound if bias else None
    inputs = F.leaky_relu(torch.randn(batch, d, generator=generator, dtype=torch.float64), slope) * size
    if labels is None:
        labels = torch.randint(n, (batch,), generator=generator)
    return gradients(inputs, torch.as_tensor(labels), weight, offset, **loss)


def trained(batch, steps=300):
    """The same batch after the head has learnt it for a while: a peaked softmax."""
    weight, bias = batch.weight, batch.bias
    for _ in range(steps):
        now = gradients(batch.inputs, batch.labels, weight, bias)
        weight, bias = weight - 0.05 * now.grad_weight, bias - 0.05 * now.grad_bias
    return gradients(batch.inputs, batch.labels, weight, bias)


def errors(result, batch):
    """Relative error of each recovered sample, and which original it is."""
    distance = (result.inputs[:, None] - batch.inputs[None]).norm(dim=2)
    nearest = distance.argmin(1)
    return distance.amin(1) / batch.inputs[nearest].norm(dim=1), nearest


def assert_separated(result, batch, tolerance=1e-8):
    assert result.complete, result.reason
    assert result.batch_size == len(batch.inputs)
    error, nearest = errors(result, batch)
    assert sorted(nearest.tolist()) == list(range(len(batch.inputs)))
    assert float(error.max()) < tolerance
    assert torch.equal(result.labels, batch.labels[nearest])
    assert (result.multiplicities == 1).all()
    logits = F.linear(batch.inputs, batch.weight, batch.bias)
    delta = (torch.softmax(logits, 1) - F.one_hot(batch.labels, logits.shape[1])) / len(logits)
    torch.testing.assert_close(result.grad_logits, delta[nearest], rtol=0, atol=tolerance)


def assert_nothing_wrong(result, batch, tolerance=1e-6):
    """Every returned sample is one of the batch, with its label."""
    if len(result.inputs):
        error, nearest = errors(result, batch)
        assert float(error.max()) < tolerance
        assert torch.equal(result.labels, batch.labels[nearest])
    if result.complete:
        assert len(result.inputs) == len(batch.inputs)
