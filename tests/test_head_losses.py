"""Heads under every loss: class weights, smoothing, unknown scale, and what is said where a reading is no proof."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rconv_fast.heads import HeadOutcome, head_candidates, separate_softmax_batch
from rconv_fast.heads.counts import label_counts
from rconv_fast.heads.head import Head
from rconv_fast.heads.other_loss import other_loss
from rconv_fast.heads.tokens import token_ids
from rconv_fast.losses import Loss
from rconv_fast.observation import Observation
from rconv_fast.walk.reader import build_graph
from softmax_batches import Batch, assert_nothing_wrong, make_batch

CLASS_WEIGHTS = torch.linspace(0.5, 2.0, 60, dtype=torch.float64)


def scaled(batch: Batch, scale: float) -> Batch:
    bias = None if batch.grad_bias is None else batch.grad_bias * scale
    return Batch(batch.inputs, batch.labels, batch.weight, batch.bias, batch.grad_weight * scale, bias)


def outcome_of(model: nn.Module, x: Tensor, target: Tensor, loss: Loss, **options: object) -> HeadOutcome:
    """What the last layer of a model gives away of a batch."""
    value = loss(model(x), target)
    names = [name for name, _ in model.named_parameters()]
    shared = dict(zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True))
    graph = build_graph(model, shared, tuple(x.shape[1:]), 1, torch.float64)
    observation = Observation({name: shared[name] for name in shared}, loss)
    return head_candidates(graph, observation, **options)  # type: ignore[arg-type]


def linear(n: int, bias: bool = True, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(20, n, bias=bias).double()


def some_inputs(batch: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_class_weights_are_part_of_the_equations(batch_size: int, smoothing: float, reduction: str) -> None:
    loss = {"reduction": reduction, "label_smoothing": smoothing}
    batch = make_batch(60, batch_size, seed=2, class_weights=CLASS_WEIGHTS, **loss)
    result = separate_softmax_batch(*batch.head, class_weights=CLASS_WEIGHTS, **loss)
    assert result.complete, result.reason
    assert result.scale == pytest.approx(1, rel=1e-9)
    assert len(result.inputs) == batch_size
    assert_nothing_wrong(result, batch, 1e-9)


@pytest.mark.parametrize("given", [None, 3, 4])
def test_unequal_weights_are_not_read_as_repeated_samples(given: int | None) -> None:
    labels = [3, 30, 55]
    batch = make_batch(60, 3, seed=4, labels=labels, class_weights=CLASS_WEIGHTS)
    result = separate_softmax_batch(*batch.head, batch_size=given)
    assert not result.complete
    assert_nothing_wrong(result, batch, 1e-9)
    assert torch.equal(result.multiplicities, torch.ones(3, dtype=torch.int64))
    assert "weights" in result.reason


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_unknown_scale_is_found(batch_size: int, bias: bool) -> None:
    batch = scaled(make_batch(60, batch_size, seed=5, bias=bias), 0.0371)
    result = separate_softmax_batch(*batch.head, scale=None)
    assert result.complete, result.reason
    assert result.scale == pytest.approx(0.0371, rel=1e-9)
    assert_nothing_wrong(result, batch, 1e-9)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_wrong_scale_is_named_and_the_features_are_kept(batch_size: int) -> None:
    batch = scaled(make_batch(60, batch_size, seed=5), 0.0371)
    result = separate_softmax_batch(*batch.head)
    assert not result.complete
    assert "0.0371 times" in result.reason
    assert "scale=None" in result.reason
    assert len(result.inputs) == batch_size
    assert_nothing_wrong(result, batch, 1e-9)


def test_soft_and_smoothed_targets_are_named() -> None:
    batch = make_batch(10, 1, seed=6, label_smoothing=0.1)
    smoothed = separate_softmax_batch(*batch.head)
    assert not smoothed.complete
    assert "label_smoothing=0.1" in smoothed.reason
    soft = torch.zeros(1, 10, dtype=torch.float64)
    soft[0, [2, 5]] = torch.tensor([0.7, 0.3], dtype=torch.float64)
    leaves = [batch.weight.clone().requires_grad_(), batch.bias.clone().requires_grad_()]
    grads = torch.autograd.grad(F.cross_entropy(F.linear(batch.inputs, *leaves), soft), leaves)
    mixed = separate_softmax_batch(*grads, batch.weight, batch.bias)
    assert not mixed.complete
    assert "soft" in mixed.reason
    torch.testing.assert_close(mixed.labels, soft, rtol=0, atol=1e-9)
    torch.testing.assert_close(mixed.inputs, batch.inputs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("given", [2, 6])
def test_a_wrong_batch_size_is_contradicted(given: int) -> None:
    batch = make_batch(60, 4, seed=7)
    result = separate_softmax_batch(*batch.head, batch_size=given)
    assert not result.complete
    assert f"holds 4 samples, not {given}" in result.reason
    assert_nothing_wrong(result, batch, 1e-9)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_batch_size_above_the_rank_is_no_error(bias: bool) -> None:
    batch = make_batch(10, 1, seed=8, bias=bias)
    result = separate_softmax_batch(*batch.head, batch_size=3)
    assert result.batch_size == 3
    assert result.multiplicities.tolist() == [3]


@pytest.mark.parametrize("steps", [300, 3000])
@pytest.mark.parametrize(("n", "batch_size"), [(10, 1), (100, 4)])
def test_well_classified_samples_of_a_float32_client_are_not_refused(n: int, batch_size: int, steps: int) -> None:
    """softmax - 1 cancels at the label: its entry is nothing but rounding, and the others say enough."""
    batch = make_batch(n, batch_size, seed=9)
    x, weight, bias = batch.inputs.float(), batch.weight.float(), batch.bias.float()
    for _ in range(steps + 1):
        leaves = [weight.requires_grad_(), bias.requires_grad_()]
        grads = torch.autograd.grad(F.cross_entropy(F.linear(x, *leaves), batch.labels), leaves)
        used = (weight.detach(), bias.detach())
        weight, bias = (p.detach() - 0.05 * g for p, g in zip(leaves, grads, strict=True))
    result = separate_softmax_batch(*grads, *used)
    assert result.complete, result.reason
    double = separate_softmax_batch(*(g.double() for g in grads), *(p.double() for p in used))
    assert_nothing_wrong(double, batch, 1e-5)


@pytest.mark.parametrize("batch_size", [10, 30])
def test_label_counts_where_nothing_separates(batch_size: int) -> None:
    for seed in range(5):
        batch = make_batch(10, batch_size, seed=seed)
        counts = label_counts(Head.create(*batch.head, Loss()), batch_size)
        assert torch.equal(counts, torch.bincount(batch.labels, minlength=10))


def test_a_batch_that_fills_the_heads_rank_may_be_larger() -> None:
    outcome = outcome_of(linear(6), some_inputs(30), torch.arange(30) % 6, Loss("cross_entropy"))
    assert outcome.candidates == ()
    assert outcome.label_counts is None
    assert "batch_size= gives at least the label counts" in outcome.reason


def test_an_outcome_holds_the_counts_and_the_reason() -> None:
    x, labels = some_inputs(30).abs(), torch.arange(30) % 7
    outcome = outcome_of(linear(10), x, labels, Loss(), batch_size=30)
    assert outcome.candidates == ()
    assert outcome.label_counts.tolist() == torch.bincount(labels, minlength=10).tolist()
    assert "10 classes" in outcome.reason or "9 directions" in outcome.reason


@pytest.mark.parametrize("batch_size", [2, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_one_output_of_a_regression_proves_nothing(batch_size: int, bias: bool) -> None:
    """Any batch has a one-sample reading there."""
    x, target = some_inputs(batch_size), torch.linspace(-1, 1, batch_size, dtype=torch.float64)[:, None]
    outcome = outcome_of(linear(1, bias), x, target, Loss("mse"))
    assert not any(candidate.complete for candidate in outcome.candidates)
    assert outcome.reason
    refused = outcome_of(linear(1, bias), x, target, Loss("mse"), batch_size=batch_size)
    assert refused.candidates == ()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_one_logit_without_bias_proves_nothing(batch_size: int) -> None:
    x, target = some_inputs(batch_size), (torch.arange(batch_size) % 2).double()[:, None]
    outcome = outcome_of(linear(1, bias=False), x, target, Loss("binary_cross_entropy_with_logits"))
    assert all(candidate.spare == 0 and not candidate.complete for candidate in outcome.candidates)


def test_both_signs_of_one_logit_without_bias_are_returned() -> None:
    x, target = some_inputs(1), torch.ones(1, 1, dtype=torch.float64)
    outcome = outcome_of(linear(1, bias=False), x, target, Loss("binary_cross_entropy_with_logits"))
    found = [next(iter(c.values.values())) for c in outcome.candidates]
    for sign in (1, -1):
        assert any(torch.allclose(f, sign * x, atol=1e-9) for f in found)


@pytest.mark.parametrize("name", ["mse", "binary_cross_entropy_with_logits"])
def test_several_outputs_prove_one_sample(name: str) -> None:
    x, target = some_inputs(1), torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    outcome = outcome_of(linear(4), x, target, Loss(name))
    (candidate,) = outcome.candidates
    assert candidate.complete
    assert candidate.spare > 0
    torch.testing.assert_close(candidate.labels, target, rtol=0, atol=1e-9)
    assert outcome_of(linear(4), x, target, Loss(name), batch_size=2).candidates == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_coarse_gradients_of_a_regression_are_no_classification(dtype: torch.dtype) -> None:
    """Coarse values leave room for chance: targets near 0 or 1 are found by it, others are not."""
    generator = torch.Generator().manual_seed(5)
    rounding = torch.finfo(dtype).eps
    logits = torch.randn(400, 1, generator=generator, dtype=torch.float64)
    delta = 2 * (logits - torch.randn(400, 1, generator=generator, dtype=torch.float64))
    named = [other_loss(a[None], b[None].to(dtype).double(), rounding) for a, b in zip(logits, delta, strict=True)]
    assert sum(name is not None for name in named) <= (4 if dtype == torch.float32 else 40)
    assert all(name.endswith(("(targets [0])", "(targets [1])")) for name in named if name is not None)
    for target in (0.0, 1.0):
        one = (torch.sigmoid(logits) - target).to(dtype).double()
        found = [other_loss(a[None], b[None], rounding) for a, b in zip(logits, one, strict=True)]
        assert all(name is not None and f"targets [{int(target)}]" in name for name in found)


def test_a_regression_without_a_bias_asks_for_its_targets() -> None:
    x, target = some_inputs(1), torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    outcome = outcome_of(linear(4, bias=False), x, target, Loss("mse"))
    assert outcome.candidates == ()
    assert "pass the targets" in outcome.reason
    (given,) = outcome_of(linear(4, bias=False), x, target, Loss("mse"), labels=target).candidates
    torch.testing.assert_close(next(iter(given.values.values())), x, rtol=0, atol=1e-8)


def test_a_regression_batch_with_its_targets() -> None:
    x, target = some_inputs(2), torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outcome = outcome_of(linear(6), x, target, Loss("mse"), labels=target)
    found = [next(iter(c.values.values())) for c in outcome.candidates if c.complete]
    assert any(torch.allclose(f, x, atol=1e-8) for f in found)


def test_a_loss_of_the_softmax_itself() -> None:
    """``nll`` of probabilities: every sample weighs softmax_y, as no logarithm was taken."""
    batch = make_batch(60, 3, seed=3)
    leaves = [batch.weight.clone().requires_grad_(), batch.bias.clone().requires_grad_()]
    value = F.nll_loss(F.linear(batch.inputs, *leaves).softmax(1), batch.labels)
    grads = torch.autograd.grad(value, leaves)
    graph = build_graph(nn.Linear(192, 60).double(), {"weight": grads[0], "bias": grads[1]}, (192,), 1, torch.float64)
    with torch.no_grad():
        model = nn.Linear(192, 60).double()
        model.weight.copy_(batch.weight)
        model.bias.copy_(batch.bias)
    shared = {"weight": grads[0], "bias": grads[1]}
    graph = build_graph(model, shared, (192,), 1, torch.float64)
    (candidate,) = head_candidates(graph, Observation(shared, Loss("nll"))).candidates
    assert candidate.complete
    assert sorted(candidate.labels.tolist()) == sorted(batch.labels.tolist())


def test_tokens_are_the_rows_of_an_embeddings_gradient() -> None:
    ids = torch.tensor([[5, 2, 2, 9]])
    for sparse in (False, True):
        layer = nn.Embedding(12, 3, padding_idx=2, sparse=sparse)
        layer(ids).sum().backward()
        assert token_ids(layer.weight.grad).tolist() == [5, 9]
