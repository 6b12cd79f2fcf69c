"""A verdict is never wrong: what almost any gradient has a reading for, and readings that are not the only one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import Attack, assert_recovered, attack, gradients_of, photo, some_labels
from rconv_fast import Inversion, invert
from rconv_fast.heads.candidates import head_candidates
from rconv_fast.losses import Loss
from rconv_fast.observation import Observation
from rconv_fast.walk.reader import build_graph

BCE = F.binary_cross_entropy_with_logits
SIZE = 12


def network(
    classes: int = 10, activation: Callable[[], nn.Module] = nn.ReLU, *, bias: bool = True, width: int = 24
) -> nn.Sequential:
    """Two convolutions that their equations determine, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, width, 5, 2, 2, bias=bias), activation(),
        nn.Conv2d(width, 48, 3, 1, 1, bias=bias), activation(),
        nn.Flatten(), nn.Linear(48 * 36, classes, bias=bias),
    ).double()  # fmt: skip


def result_of(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], name: str) -> Inversion:
    return invert(model, gradients_of(model, x, y, loss), x.shape[1:], loss=name)


@pytest.mark.parametrize("batch", [2, 3])
def test_a_mixture_behind_one_output_is_no_sample(batch: int) -> None:
    torch.manual_seed(batch)
    targets = torch.randn(batch, 1, dtype=torch.float64)
    result = result_of(network(1), photo(SIZE, batch), targets, F.mse_loss, "mse")
    assert not result.verified
    assert result.batch_size is None
    assert any("no equation of the head is left over" in note for note in result.notes)


@pytest.mark.parametrize("batch", [2, 4, 7])
def test_a_mixture_behind_a_logit_without_bias_is_no_sample(batch: int) -> None:
    torch.manual_seed(batch)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 1, bias=False)).double()
    x, y = torch.rand(batch, 3, 4, 4).double(), torch.randint(0, 2, (batch, 1)).double()
    assert not result_of(model, x, y, BCE, "binary_cross_entropy_with_logits").verified


def test_one_sample_behind_one_logit_is_proven_where_batch_size_says_so() -> None:
    """All readings are tried: behind layers with biases only one of them leads to an input."""
    model, y = network(1, nn.LeakyReLU), torch.ones(1, 1, dtype=torch.float64)
    model[5] = nn.Linear(48 * 36, 1, bias=False).double()
    shared = gradients_of(model, photo(SIZE), y, BCE)
    options = {"loss": "binary_cross_entropy_with_logits"}
    assert not invert(model, shared, (3, SIZE, SIZE), **options).verified
    done = Attack(invert(model, shared, (3, SIZE, SIZE), batch_size=1, **options), photo(SIZE))
    assert done.result.verified
    assert done.psnr > 150
    assert any("as batch_size says" in note for note in done.result.notes)
    odd = network(1, nn.Tanh, bias=False)
    both = invert(odd, gradients_of(odd, photo(SIZE), y, BCE), (3, SIZE, SIZE), batch_size=1, **options)
    assert not both.verified, "the other sign is one sample as well"


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Identity, nn.Softsign])
def test_of_an_odd_network_both_answers_are_named(activation: Callable[[], nn.Module], label: float) -> None:
    """Without a bias, -x with the other label has the same gradients."""
    model, y = network(1, activation, bias=False), torch.full((1, 1), label, dtype=torch.float64)
    result = result_of(model, photo(SIZE), y, BCE, "binary_cross_entropy_with_logits")
    assert not result.verified
    assert any("another reading of the head reproduces the gradients" in note for note in result.notes)


def test_readings_that_were_not_followed_could_be_others(monkeypatch: pytest.MonkeyPatch) -> None:
    module, model = importlib.import_module("rconv_fast.invert"), network()
    shared = gradients_of(model, photo(SIZE))
    assert invert(model, shared, (3, SIZE, SIZE)).verified
    graph = build_graph(model, shared, (3, SIZE, SIZE), 1)
    outcome = head_candidates(graph, Observation(shared, Loss()))
    twice = replace(outcome, candidates=outcome.candidates * 2)
    monkeypatch.setattr(module, "head_candidates", lambda *_: twice)
    assert invert(model, shared, (3, SIZE, SIZE)).verified, "the second reading leads to the same answer"
    monkeypatch.setattr(module, "MAX_READINGS", 1)
    result = invert(model, shared, (3, SIZE, SIZE))
    assert not result.verified
    assert any("not followed to their end" in note for note in result.notes)


def test_coarse_gradients_are_no_proof() -> None:
    """Rounded to bfloat16, whatever type they are stored in."""
    model = network(activation=nn.LeakyReLU)
    shared = {name: g.bfloat16().double() for name, g in gradients_of(model, photo(SIZE)).items()}
    done = Attack(invert(model, shared, (3, SIZE, SIZE)), photo(SIZE))
    assert done.result.labels.tolist() == [1]
    assert not done.result.verified or done.psnr > 60


def test_weights_of_classes_that_nobody_named_are_no_duplicates() -> None:
    weights = torch.tensor([1.0, 3.0, 0.5] * 3 + [1.0], dtype=torch.float64)
    model, x, y = network(), photo(SIZE, 3), torch.tensor([0, 1, 2])
    shared = gradients_of(model, x, y, lambda o, t: F.cross_entropy(o, t, weights))
    unsaid = invert(model, shared, x.shape[1:])
    assert not unsaid.verified
    assert unsaid.batch_size is None
    said = Attack(invert(model, shared, x.shape[1:], class_weights=weights), x)
    assert said.result.verified
    assert said.psnr > 200
    assert sorted(said.result.labels.tolist()) == [0, 1, 2]


def test_clients_of_unequal_size_are_no_duplicates() -> None:
    model, x = network(), photo(SIZE, 2)
    first, second = (gradients_of(model, x[i : i + 1], torch.tensor([1 + 3 * i])) for i in range(2))
    result = invert(model, {name: first[name] / 4 + second[name] * 3 / 4 for name in first}, x.shape[1:])
    assert not result.verified
    assert any("batch_size=4 would confirm" in note for note in result.notes)


def test_a_sample_that_occurs_three_times_is_solved_for_once() -> None:
    """Three equal pictures have the gradient of one: batch_size decides, and costs no equations."""
    done = attack(network(), photo(SIZE), batch_size=3)
    assert done.result.verified
    assert done.result.inputs.shape == (3, 3, SIZE, SIZE)
    assert [sample.multiplicity for sample in done.result.samples] == [3, 3, 3]
    assert done.result.layers[0].unknowns == 24 * 36


def test_a_classification_read_as_a_regression_is_named() -> None:
    """Free targets explain every gradient, so they prove no loss."""
    model = network()
    result = invert(model, gradients_of(model, photo(SIZE)), (3, SIZE, SIZE), loss="mse")
    assert not result.verified
    assert any("loss='cross_entropy' (label 1)" in note for note in result.notes)


def test_a_regression_with_free_targets_is_still_proven() -> None:
    model, y = network(4), torch.tensor([[0.3, -1.0, 2.0, 0.1]], dtype=torch.float64)
    result = result_of(model, photo(SIZE), y, F.mse_loss, "mse")
    assert result.verified
    assert float((result.labels - y).abs().max()) < 1e-9


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_scale_is_named_and_found(factor: float) -> None:
    model = network()
    shared = {name: factor * g for name, g in gradients_of(model, photo(SIZE)).items()}
    result = invert(model, shared, (3, SIZE, SIZE))
    assert not result.verified
    assert any("pass scale=None" in note for note in result.notes)
    found = invert(model, shared, (3, SIZE, SIZE), scale=None)
    assert found.verified
    assert found.scale == pytest.approx(factor, rel=1e-9)


class Written(nn.Module):
    """Two convolutions and a head, joined as a test says."""

    def __init__(self, join: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 24, 5, 2, 2), nn.Conv2d(24, 48, 3, 1, 1), nn.Linear(48 * 36, 10)
        self.join = join
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


def chunked(net: Written, x: Tensor) -> Tensor:
    a, b = F.relu(net.conv1(x)).chunk(2, 1)
    return net.fc(F.relu(net.conv2(torch.cat([b, a], 1))).flatten(1))


def split(net: Written, x: Tensor) -> Tensor:
    a, b, c = torch.split(F.relu(net.conv1(x)), (4, 8, 12), 1)
    return net.fc(F.relu(net.conv2(torch.cat([2 * c, b, a], 1))).flatten(1))


def reversed_subtraction(net: Written, x: Tensor) -> Tensor:
    return net.fc(F.relu(net.conv2(F.relu(net.conv1(torch.rsub(x, 1.0))))).flatten(1))


@pytest.mark.parametrize("join", [chunked, split, reversed_subtraction], ids=lambda join: join.__name__)
def test_what_depends_on_the_input_is_followed(join: Callable[..., Tensor]) -> None:
    assert_recovered(Written(join), photo(SIZE))


def test_a_reversed_subtraction_of_two_branches_has_its_signs() -> None:
    def join(net: Written, x: Tensor) -> Tensor:
        h = F.relu(net.conv1(x))
        return net.fc(torch.tanh(torch.rsub(net.conv2(h), net.other(h))).flatten(1))

    assert_recovered(Written(join, other=nn.Conv2d(24, 48, 1)), photo(SIZE))


def test_a_maximum_over_an_axis_is_no_constant() -> None:
    def join(net: Written, x: Tensor) -> Tensor:
        h = F.relu(net.conv2(F.relu(net.conv1(x))))
        return net.fc((h - h.max(2, keepdim=True)[0]).flatten(1))

    result = attack(Written(join).double(), photo(SIZE)).result
    assert result.inputs is None
    assert result.labels.tolist() == [1]
    assert "max" in result.reason


def test_tied_weights_through_a_transpose_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.head = nn.Linear(48, 30), nn.Linear(48, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.encode(x.flatten(1)))
            return self.head(torch.tanh(F.linear(h, self.encode.weight.t())))

    result = attack(Tied().double(), torch.rand(1, 3, 4, 4).double()).result
    assert not result.verified
    assert "used more than once" in result.reason
    assert "head" in result.features


def test_the_gradient_of_the_head_alone_gives_features_and_label() -> None:
    model = network()
    shared = {name: g for name, g in gradients_of(model, photo(SIZE)).items() if name.startswith("5.")}
    done = Attack(invert(model, shared, (3, SIZE, SIZE)), photo(SIZE))
    result = done.result
    assert not result.verified or done.psnr > 150  # known outputs may be equations enough
    assert result.labels.tolist() == [1]
    assert float((result.features["5"] - model[:5](photo(SIZE)).detach()).abs().max()) < 1e-9


def test_tokens_are_listed_by_an_embedding_behind_which_nothing_is_solved() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.lstm, self.head = nn.Embedding(50, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(self.words(x))[0][:, -1])

    model, x = Reader().double(), torch.tensor([[3, 41, 41, 7, 0]])
    result = invert(model, gradients_of(model, x, some_labels(1)), (5,))
    assert result.verdict == "features"
    assert result.labels.tolist() == [1]
    assert result.tokens.tolist() == [0, 3, 7, 41]
    assert "LSTM" in result.reason


class Asking(nn.Module):
    """Asks what kind of result it got, which tracing cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.reads, self.head = nn.Embedding(50, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        read = self.reads(self.embedding(ids))
        logits: Tensor = self.head((read[0] if isinstance(read, tuple) else read).mean(1))
        return logits


def test_a_model_that_asks_what_it_got_gives_label_and_tokens() -> None:
    torch.manual_seed(0)
    model, ids = Asking().double(), torch.tensor([[3, 7, 41, 0]])
    result = invert(model, gradients_of(model, ids, torch.tensor([2])), (4,))
    assert result.labels.tolist() == [2]
    assert result.tokens.tolist() == [0, 3, 7, 41]
    assert "head" in result.features
    assert any("torch.fx cannot trace" in text for text in (result.reason, *result.notes))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_loud_noise_is_verified_with_error_bars_only(batch_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no joint estimate can be had, a fit to loud noise says nothing of what the noise hides."""
    monkeypatch.setattr(sys.modules["rconv_fast.one_reading"], "JOINT_UP_TO", 0)
    model = network()
    shared = gradients_of(model, photo(SIZE))
    result = invert(model, shared, (3, SIZE, SIZE), noise=0.1, batch_size=batch_size)
    assert not result.verified
    assert any("error bars" in note for note in result.notes)
    assert result.verdict == "approximate"
    coarse = {name: g.bfloat16() for name, g in shared.items()}
    assert not invert(model, coarse, (3, SIZE, SIZE), batch_size=batch_size).verified


def test_an_estimate_that_does_not_fit_is_made_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    module, model, made = sys.modules["rconv_fast.one_reading"], network(), []
    original = module.joint_answer
    monkeypatch.setattr(
        module, "joint_answer", lambda *args, **given: made.append(original(*args, **given)) or made[-1]
    )
    monkeypatch.setattr(module, "fits", lambda *_: False)
    shared = {
        name: g + 1e-3 * g.square().mean().sqrt() * torch.randn_like(g)
        for name, g in gradients_of(model, photo(SIZE)).items()
    }
    result = invert(model, shared, (3, SIZE, SIZE), noise=1e-3)
    assert len(made) == 1
    assert result.inputs is not None
    assert torch.equal(result.inputs, made[0].inputs)
    assert not result.verified


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_samples_that_are_certified_one_by_one_are_not_lost_with_the_others(dtype: torch.dtype) -> None:
    """More samples than neurons that show one alone: some are taken out of the batch exactly, the others stay mixed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 100), nn.ReLU(), nn.Linear(100, 10)).to(dtype)
    x, y = torch.rand(32, 3, 8, 8, dtype=dtype), torch.randint(0, 10, (32,))
    result = invert(model, gradients_of(model, x, y), x.shape[1:], batch_size=32)
    assert not result.verified
    assert result.verdict == "partial"
    assert 0 < len(result.inputs) < 32
    assert {sample.status for sample in result.samples} == {"exact"}
    gaps = torch.cdist(result.inputs.flatten(1).double(), x.flatten(1).double()).min(dim=1)
    assert float(gaps.values.max()) < 1e-3 * float(x.double().flatten(1).norm(dim=1).min())
    assert torch.equal(result.labels, y[gaps.indices])
    assert result.batch_size == 32


def test_hidden_values_that_nothing_reads_leave_nothing_open() -> None:
    """A pointwise convolution of stride 2 reads a quarter of its input: the rest passes no gradient back."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 48, 3, 1, 1), nn.ReLU(), nn.Conv2d(48, 64, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 10)
    )  # fmt: skip
    assert_recovered(model, photo(SIZE))


def test_a_reading_that_kills_the_first_layer_leaves_the_input_open() -> None:
    """Behind one logit without bias -x is a reading, too; there no filter of the first layer passes a gradient."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, 2, 1, bias=False, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(12, 24, 1),
        nn.Flatten(), nn.Linear(24 * 25, 1, bias=False),
    ).double()  # fmt: skip
    x, y = photo(10, 1, 1), torch.tensor([[0.0]], dtype=torch.float64)
    shared = gradients_of(model, x, y, F.binary_cross_entropy_with_logits)
    result = invert(model, shared, x.shape[1:], loss="binary_cross_entropy_with_logits")
    assert not result.verified
    assert any("left over to prove this reading" in note for note in result.notes)
    assert float((result.inputs - x).abs().max()) < 1e-6


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_at_an_unknown_scale_copies_look_like_samples_without_trace(bias: bool) -> None:
    """The second picture is dead behind the ReLU; half of the first one's gradient is twice half of it, scaled."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 60), nn.ReLU(), nn.Linear(60, 10, bias=bias)).double()
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    shared = {name: g / 2 for name, g in gradients_of(model, x, torch.tensor([1])).items()}
    result = invert(model, shared, x.shape[1:], batch_size=2, scale=None)
    assert not result.verified
    assert any("at an unknown scale" in note for note in result.notes), result.notes
    both = {name: 2 * g for name, g in shared.items()}
    assert invert(model, both, x.shape[1:], batch_size=2).verified
    assert invert(model, shared, x.shape[1:], scale=None).verified


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_two_classes_at_an_unknown_scale_prove_nothing(batch: int) -> None:
    """The gradient of any batch has rank 1 there, and a scale at which one sample explains it."""
    torch.manual_seed(batch)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double()
    x, y = torch.rand(batch, 3, 4, 4, dtype=torch.float64), torch.randint(0, 2, (batch,))
    shared = gradients_of(model, x, y)
    assert not invert(model, shared, x.shape[1:], scale=None).verified
    assert invert(model, shared, x.shape[1:], batch_size=batch).verified == (batch == 1)
