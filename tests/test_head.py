"""Splitting a softmax head's gradient: every sample, every label, and nothing that is not in the batch."""

from __future__ import annotations

import time

import pytest
import torch

from rconv_fast.errors import ArgumentError, ArgumentTypeError
from rconv_fast.heads import separate_softmax_batch
from rconv_fast.heads import softmax as head_module
from softmax_batches import assert_nothing_wrong, assert_separated, errors, gradients, make_batch, trained


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch_size", [1, 2, 8, 24, 48])
def test_hundred_classes(batch_size, bias):
    batch = make_batch(100, batch_size, bias=bias, seed=batch_size)
    assert_separated(separate_softmax_batch(*batch.head), batch)


@pytest.mark.parametrize("batch_size", range(1, 10))
def test_ten_classes(batch_size):
    batch = make_batch(10, batch_size, seed=batch_size)
    assert_separated(separate_softmax_batch(*batch.head), batch)


@pytest.mark.parametrize("seed", range(5))
def test_one_sample_fewer_than_classes(seed):
    """As many as the head has directions, whatever the labels: the gradient's span says nothing, only the softmax."""
    batch = make_batch(10, 9, seed=100 + seed)
    assert_separated(separate_softmax_batch(*batch.head), batch)


def test_ten_classes_without_bias_up_to_eight():
    batch = make_batch(10, 8, bias=False, seed=0)
    assert_separated(separate_softmax_batch(*batch.head), batch)


def test_two_hundred_classes_sixty_four_samples():
    batch = make_batch(200, 64, d=512, seed=1)
    assert_separated(separate_softmax_batch(*batch.head), batch)


@pytest.mark.slow
def test_thousand_classes_sixty_four_samples():
    batch = make_batch(1000, 64, d=2048, seed=1)
    start = time.perf_counter()
    assert_separated(separate_softmax_batch(*batch.head), batch)
    print(f"{time.perf_counter() - start:.1f} s")


@pytest.mark.parametrize("labels", [[3] * 4, [3] * 6 + [5] * 6, [0, 0, 1, 1, 1, 2, 2, 9]], ids=str)
def test_repeated_labels(labels):
    batch = make_batch(100, len(labels), labels=labels, seed=4)
    assert_separated(separate_softmax_batch(*batch.head), batch)


@pytest.mark.parametrize("size", [1e-3, 1e3], ids=["tiny", "huge"])
def test_scale_of_the_features_does_not_matter(size):
    batch = make_batch(50, 6, seed=2, size=size, bound=0.07 / max(size, 1.0))
    assert_separated(separate_softmax_batch(*batch.head), batch)


@pytest.mark.parametrize("slope", [0.0, 0.2], ids=["relu", "leaky"])
def test_peaked_softmax_of_a_wide_initialisation(slope):
    batch = make_batch(100, 16, bound=0.5, seed=3, slope=slope)
    assert_separated(separate_softmax_batch(*batch.head), batch)


def test_peaked_softmax_of_a_trained_head():
    batch = trained(make_batch(100, 16, seed=5))
    assert_separated(separate_softmax_batch(*batch.head), batch)


@pytest.mark.parametrize("batch_size", [1, 8, 24])
def test_float32_gradients(batch_size):
    batch = make_batch(100, batch_size, seed=batch_size)
    batch.grad_weight, batch.grad_bias = batch.grad_weight.float(), batch.grad_bias.float()
    result = separate_softmax_batch(*batch.head)
    assert result.inputs.dtype == torch.float32
    assert_separated(_doubled(result), batch, tolerance=1e-5)


def test_float32_training_loop():
    """Weights, features and autograd in float32: the softmax itself is rounded."""
    batch = make_batch(100, 8, seed=7)
    low = gradients(batch.inputs.float(), batch.labels, batch.weight.float(), batch.bias.float())
    result = _doubled(separate_softmax_batch(*low.head))
    assert result.complete
    assert_nothing_wrong(result, batch, tolerance=1e-4)


def _doubled(result):
    fields = dict(vars(result))
    fields.update({k: v.double() for k, v in fields.items() if isinstance(v, torch.Tensor) and v.is_floating_point()})
    return type(result)(**fields)


def test_given_labels_and_batch_size():
    batch = make_batch(60, 10, seed=8)
    result = separate_softmax_batch(*batch.head, batch_size=10, labels=batch.labels.flip(0).tolist())
    assert_separated(result, batch)


def test_sum_reduction():
    batch = make_batch(60, 10, seed=8, reduction="sum")
    result = separate_softmax_batch(*batch.head, reduction="sum")
    assert result.complete
    assert_nothing_wrong(result, batch, 1e-10)


@pytest.mark.parametrize("batch_size", [1, 6])
def test_label_smoothing(batch_size):
    batch = make_batch(60, batch_size, seed=9, label_smoothing=0.1)
    result = separate_softmax_batch(*batch.head, label_smoothing=0.1)
    assert result.complete
    assert_nothing_wrong(result, batch, 1e-10)


def test_wrong_label_smoothing_is_noticed():
    batch = make_batch(60, 1, seed=9, label_smoothing=0.1)
    assert not separate_softmax_batch(*batch.head).complete


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("given", [None, 8])
def test_identical_samples_are_reported(given, bias):
    single = make_batch(40, 5, d=64, seed=3, bias=bias)
    index = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1])
    batch = gradients(single.inputs[index], single.labels[index], single.weight, single.bias)
    result = separate_softmax_batch(*batch.head, batch_size=given)
    assert result.complete == (given == 8)  # else it is an assumption: unequal weights look alike
    assert given or "batch_size=8" in result.reason
    assert result.batch_size == 8
    assert result.rank == 5
    error, nearest = errors(result, single)
    assert float(error.max()) < 1e-9
    assert torch.equal(result.multiplicities, torch.tensor([3, 2, 1, 1, 1])[nearest])
    assert sorted(nearest[result.duplicates].tolist()) == [0, 1]


def test_identical_inputs_with_two_labels_are_not_accepted():
    single = make_batch(40, 3, d=64, seed=3)
    inputs = single.inputs[[0, 0, 1, 2]]
    batch = gradients(inputs, torch.tensor([4, 5, 6, 7]), single.weight, single.bias)
    result = separate_softmax_batch(*batch.head)
    assert not result.complete
    assert result.reason
    assert_nothing_wrong(result, batch)


@pytest.mark.parametrize("batch_size", [9, 10, 12])
def test_ten_classes_beyond_the_limit_is_honest(batch_size):
    batch = make_batch(10, batch_size, seed=batch_size)
    for given in (None, batch_size):
        result = separate_softmax_batch(*batch.head, batch_size=given)
        assert_nothing_wrong(result, batch)
        assert result.complete or result.reason


def test_wrong_weight_finds_nothing():
    batch = make_batch(50, 5, seed=1)
    other = make_batch(50, 5, seed=2)
    result = separate_softmax_batch(batch.grad_weight, batch.grad_bias, other.weight, other.bias)
    assert not result.complete
    assert len(result.inputs) == 0


def test_wrong_labels_find_nothing_wrong():
    batch = make_batch(50, 4, seed=1)
    wrong = (batch.labels + 1) % 50
    result = separate_softmax_batch(*batch.head, labels=wrong)
    assert not result.complete
    assert_nothing_wrong(result, batch)


def test_certificates_are_small_and_wrong_samples_have_none():
    batch = make_batch(50, 5, seed=1)
    result = separate_softmax_batch(*batch.head)
    assert float(result.residuals.max()) < 1e-12
    assert result.head_residual < 1e-12


def test_disturbed_gradients_are_not_certified():
    """Noise well above the rounding spoils the rank and every certificate."""
    batch = make_batch(50, 5, seed=1)
    noise = torch.randn(50, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch.grad_weight = batch.grad_weight + 1e-3 * batch.grad_weight.abs().max() * noise
    assert not separate_softmax_batch(*batch.head).complete


def sweep_case(seed):
    """A random head: classes, batch, width, initialisation, bias, labels and precision all vary."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    n = pick(3, 5, 10, 20, 50)
    batch_size = int(torch.randint(1, min(n, 16) + 2, (1,), generator=generator))
    labels = torch.randint(pick(1, 2, n), (batch_size,), generator=generator) if pick(True, False) else None
    batch = make_batch(
        n, batch_size, d=pick(32, 128), seed=seed, bias=pick(True, False), bound=pick(None, 0.5),
        labels=labels, slope=pick(0.0, 0.2), size=pick(0.1, 1.0, 10.0),
    )  # fmt: skip
    precise = pick(True, True, False)
    if not precise:
        batch.grad_weight = batch.grad_weight.float().double()
        batch.grad_bias = None if batch.grad_bias is None else batch.grad_bias.float().double()
    return batch, precise


def _sweep(seeds, *, quick):
    accepted = 0
    for seed in seeds:
        batch, precise = sweep_case(seed)
        if quick and 2 * len(batch.labels) > len(batch.weight) and len(batch.labels) > 6:
            continue  # the joint solve of a head without a solution takes seconds
        result = separate_softmax_batch(*batch.head)
        assert_nothing_wrong(result, batch, 1e-6 if precise else 1e-2)
        accepted += len(result.inputs)
    return accepted


def test_certificate_never_accepts_a_wrong_sample_in_forty_random_heads():
    assert _sweep(range(40), quick=True) > 80


@pytest.mark.slow
def test_certificate_never_accepts_a_wrong_sample_in_two_hundred_random_heads():
    assert _sweep(range(200), quick=False) > 400


def test_single_sample_skips_the_search(monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("the closed form was not used")

    monkeypatch.setattr(head_module, "search", fail)
    batch = make_batch(10, 1, seed=0)
    assert_separated(separate_softmax_batch(*batch.head), batch, 1e-12)


def test_global_random_state_is_left_alone():
    batch = make_batch(20, 4, seed=0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = separate_softmax_batch(*batch.head)
    assert torch.equal(before, torch.get_rng_state())
    second = separate_softmax_batch(*batch.head)
    assert torch.equal(first.inputs, second.inputs)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"grad_weight": torch.zeros(5, 7)}, ArgumentError, "grad_weight must not be zero"),
        (
            {"grad_weight": torch.full((5, 7), torch.nan)},
            ArgumentError,
            "grad_weight must be finite, got NaN",
        ),
        ({"grad_weight": torch.ones(5)}, ArgumentError, r"grad_weight must have shape \(n, d\)"),
        ({"grad_weight": torch.ones(5, 7, dtype=torch.int64)}, ArgumentTypeError, "real floating type"),
        ({"grad_bias": torch.ones(4)}, ArgumentError, r"grad_bias must have shape \(5,\), got \(4,\)"),
        ({"weight": torch.ones(5, 8)}, ArgumentError, "weight must have grad_weight's shape"),
        ({"bias": None}, ArgumentError, "bias must be given with grad_bias"),
        ({"bias": torch.ones(4)}, ArgumentError, r"bias must have shape \(5,\)"),
        ({"batch_size": 0}, ArgumentError, "batch_size must be at least 1, got 0"),
        ({"labels": []}, ArgumentError, "labels must not be empty"),
        ({"labels": [5]}, ArgumentError, r"labels must lie in \[0, 5\)"),
        (
            {"labels": [1, 2], "batch_size": 3},
            ArgumentError,
            "labels must have batch_size = 3 entries, got 2",
        ),
        ({"label_smoothing": 1.0}, ArgumentError, r"label_smoothing must lie in \[0, 1\)"),
        ({"reduction": "none"}, ArgumentError, "reduction must be one of mean, sum"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_arguments(change, kind, message):
    arguments = {
        "grad_weight": torch.ones(5, 7), "grad_bias": torch.ones(5), "weight": torch.ones(5, 7), "bias": torch.ones(5),
    }  # fmt: skip
    arguments.update(change)
    with pytest.raises(kind, match="^separate_softmax_batch: .*" + message):
        separate_softmax_batch(**arguments)


@pytest.mark.cuda
def test_gpu_gives_the_same_samples():
    batch = make_batch(100, 24, seed=3)
    result = separate_softmax_batch(*(t.cuda() for t in batch.head))
    assert result.inputs.is_cuda
    fields = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in vars(result).items()}
    assert_separated(type(result)(**fields), batch)
