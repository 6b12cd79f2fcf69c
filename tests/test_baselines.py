"""The baselines do what their papers say: where they work, where they do not, and how they tell."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import gradients_of, photo
from rconv_fast import baselines, models, psnr
from rconv_fast.baselines.labels import label_of_one, labels_of_batch
from rconv_fast.baselines.rgap import LEAST_MU, logits_of
from rconv_fast.errors import ArgumentError
from rconv_fast.progress import Event

LOGISTIC = F.binary_cross_entropy_with_logits
ALL = {name: getattr(baselines, name) for name in baselines.__all__ if name != "i2f_bound"}


def small_cnn(activation: type[nn.Module], n_classes: int = 4, bias: bool = True, filters: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, filters, 3, 1, 1, bias=bias),
        activation(),
        nn.Conv2d(filters, 2 * filters, 3, 2, 1, bias=bias),
        activation(),
        nn.Flatten(),
        nn.Linear(2 * filters * 16, n_classes, bias=bias),
    ).double()


def small_photo(batch: int = 1) -> Tensor:
    return photo(8, batch, channels=1)


def logistic_gradients(model: nn.Module, x: Tensor, label: float) -> dict[str, Tensor]:
    return gradients_of(model, x, torch.full((len(x), 1), label).double(), LOGISTIC)


# --- All of them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_an_answer_is_never_verified_and_the_model_is_left_alone(name: str) -> None:
    model = small_cnn(nn.LeakyReLU, n_classes=1)
    x = small_photo()
    seen = logistic_gradients(model, x, 1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    options: dict[str, Any] = {"steps": 3} if name in ("dlg", "idlg", "copa", "inverting_gradients") else {}
    found = ALL[name](model, seen, (1, 8, 8), loss="binary_cross_entropy_with_logits", labels=[1], **options)
    assert not found.verified
    assert found.verdict in ("approximate", "features")
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["dlg", "inverting_gradients", "copa"])
def test_one_seed_gives_one_answer(name: str) -> None:
    model, x = small_cnn(nn.Sigmoid), small_photo()
    seen = gradients_of(model, x, torch.tensor([2]))
    first, again, other = (ALL[name](model, seen, (1, 8, 8), steps=4, seed=seed).inputs for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert name == "copa" or not torch.equal(first, other)


@pytest.mark.parametrize("name", ["dlg", "inverting_gradients"])
def test_the_time_limit_ends_a_descent_and_progress_is_told(name: str) -> None:
    model, x = small_cnn(nn.Sigmoid), small_photo()
    events: list[Event] = []
    start = time.monotonic()
    found = ALL[name](
        model, gradients_of(model, x), (1, 8, 8), steps=10**6, time_limit=0.5, progress=events.append, restarts=9
    )
    assert time.monotonic() - start < 10
    assert found.inputs.shape == x.shape
    assert all(event.total == 10**6 for event in events)


def test_bad_arguments_are_named() -> None:
    model, x = small_cnn(nn.Sigmoid), small_photo()
    seen = gradients_of(model, x)
    with pytest.raises(ArgumentError, match=r"dlg: options must be among .*, got colour"):
        baselines.dlg(model, seen, (1, 8, 8), colour=3)  # type: ignore[call-arg]
    with pytest.raises(ArgumentError, match="rgap: loss must be"):
        baselines.rgap(model, seen, (1, 8, 8), loss="cross_entropy")
    with pytest.raises(ArgumentError, match="idlg: batch_size must be 1"):
        baselines.idlg(model, seen, (1, 8, 8), batch_size=2)
    with pytest.raises(ArgumentError, match=r"gradients\['0.weight'\] must be finite"):
        baselines.aono(model, seen | {"0.weight": seen["0.weight"] * math.nan}, (1, 8, 8))
    with pytest.raises(ArgumentError, match="start must be given with held"):
        baselines.inverting_gradients(model, seen, (1, 8, 8), held=torch.ones(1, 1, 8, 8, dtype=torch.bool))


# --- Aono -------------------------------------------------------------------------------------------------


def test_aono_divides_one_sample_out_of_a_fully_connected_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 5)).double()
    x = small_photo()
    found = baselines.aono(model, gradients_of(model, x, torch.tensor([3])), (1, 8, 8))
    assert psnr(found.inputs, x) > 200
    assert found.labels.tolist() == [3]
    assert found.layers[0].residual < 1e-12


def test_aono_says_that_a_batch_is_a_mixture() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 5)).double()
    found = baselines.aono(model, gradients_of(model, small_photo(3)), (1, 8, 8), batch_size=3)
    assert found.inputs is None
    assert found.layers[0].residual > 0.01


def test_aono_stops_at_a_convolution_with_the_features_behind_it() -> None:
    model, x = small_cnn(nn.ReLU), small_photo()
    found = baselines.aono(model, gradients_of(model, x), (1, 8, 8))
    assert found.verdict == "features"
    assert found.inputs is None
    assert torch.allclose(found.features["5"], model[:5](x), atol=1e-12)


# --- Labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_label_of_one_sample_is_the_class_with_the_other_sign(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for label in range(6):
        features = torch.randn(1, 9, generator=generator, dtype=torch.float64)
        head = nn.Linear(9, 6).double()
        seen = gradients_of(head, features, torch.tensor([label]))
        assert label_of_one(seen["weight"], seen["bias"] if bias else None).tolist() == [label]


def test_the_labels_of_a_batch_are_counted() -> None:
    torch.manual_seed(0)
    head = nn.Linear(9, 10).double()
    x = torch.rand(8, 9).double()
    y = torch.tensor([1, 1, 1, 4, 4, 7, 8, 9])
    probabilities = head(torch.rand(50, 9).double()).softmax(1).mean(0)  # of other inputs
    assert labels_of_batch(gradients_of(head, x, y)["bias"], probabilities, 8).tolist() == y.tolist()


# --- DLG, iDLG, Inverting Gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dlg", "idlg"])
def test_dlg_converges_behind_a_sigmoid_and_not_behind_a_relu(name: str) -> None:
    x, y = small_photo(), torch.tensor([2])
    decibels: dict[str, float] = {}
    for activation in (nn.Sigmoid, nn.ReLU):
        model = small_cnn(activation, filters=3)
        for parameter in model.parameters():  # as DLG draws them
            nn.init.uniform_(parameter, -0.5, 0.5)
        found = ALL[name](
            model, gradients_of(model, x, y), (1, 8, 8), steps=40, restarts=2 if activation is nn.Sigmoid else 1
        )
        decibels[activation.__name__] = psnr(found.inputs, x)
        assert found.labels.tolist() == [2] or activation is nn.ReLU
    assert decibels["Sigmoid"] > 40
    assert decibels["ReLU"] < 20


def test_dlg_takes_a_batch_and_other_losses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 4)).double()
    x, y = small_photo(2), torch.tensor([1, 3])
    found = baselines.dlg(model, gradients_of(model, x, y), (1, 8, 8), batch_size=2, steps=2)
    assert found.inputs.shape == (2, 1, 8, 8)
    assert found.labels.shape == (2,)
    regression = gradients_of(model, x, torch.rand(2, 4).double(), F.mse_loss)
    assert baselines.dlg(model, regression, (1, 8, 8), batch_size=2, steps=2, loss="mse").labels.shape == (2, 4)


def test_inverting_gradients_comes_near_and_keeps_to_the_box() -> None:
    model, x = small_cnn(nn.ReLU, filters=8), small_photo()
    seen = gradients_of(model, x, torch.tensor([2]))
    found = baselines.inverting_gradients(model, seen, (1, 8, 8), steps=150, box=(0.0, 1.0), tv=1e-4)
    assert found.labels.tolist() == [2]
    assert float(found.inputs.min()) >= 0
    assert float(found.inputs.max()) <= 1
    assert psnr(found.inputs, x) > 12
    assert found.verdict == "approximate"
    assert not found.determined.any()


def test_inverting_gradients_holds_what_is_known() -> None:
    model, x = small_cnn(nn.ReLU, filters=8), small_photo()
    held = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    held[..., :5] = True
    start = torch.where(held, x, 0.5)
    found = baselines.inverting_gradients(
        model, gradients_of(model, x, torch.tensor([2])), (1, 8, 8), steps=150, start=start, held=held, labels=[2]
    )
    assert torch.equal(found.inputs[held], x[held])
    assert torch.equal(found.determined, held)
    assert torch.equal(found.uncertainty == 0, held)
    assert psnr(found.inputs, x) > psnr(start, x) + 3


# --- R-GAP ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_rgap_recovers_one_sample_behind_leaky_relus(label: float, known: bool, bias: bool) -> None:
    model, x = small_cnn(nn.LeakyReLU, 1, bias), small_photo()
    options: dict[str, Any] = {"labels": [label]} if known else {}
    found = baselines.rgap(model, logistic_gradients(model, x, label), (1, 8, 8), **options)
    assert psnr(found.inputs, x) > 150
    assert found.labels.tolist() == [label]
    assert [report.name for report in found.layers] == ["5", "2", "0"]


def test_rgap_stops_at_a_relu_with_the_features_behind_it() -> None:
    model, x = small_cnn(nn.ReLU, 1, bias=False), small_photo()
    found = baselines.rgap(model, logistic_gradients(model, x, 1.0), (1, 8, 8))
    assert found.verdict == "features"
    assert (found.stops_at, found.reason) == ("3", "ReLU is not invertible")
    assert list(found.features) == ["5"]


def test_rgap_wants_one_logit_and_a_chain() -> None:
    model, x = small_cnn(nn.LeakyReLU, 4), small_photo()
    found = baselines.rgap(model, gradients_of(model, x), (1, 8, 8))
    assert found.verdict == "nothing"
    assert "one output" in found.reason

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(1, 6, 3, 1, 1), nn.LeakyReLU(), nn.Linear(384, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.act(self.conv(x)) + x).flatten(1))

    torch.manual_seed(0)
    skip = Skip().double()
    found = baselines.rgap(skip, logistic_gradients(skip, x, 1.0), (1, 8, 8))
    assert found.verdict == "features"
    assert found.stops_at == "head"


@pytest.mark.parametrize("mu", [-30.0, -1.0, -1e-3, 0.5, 1.2, LEAST_MU, 2.0, 9.0])
def test_logits_of_a_product_hold_the_true_one(mu: float) -> None:
    product = -mu / (1 + math.exp(mu))
    roots = [float(root) for root in logits_of(product)]
    assert min(abs(root - mu) for root in roots) < 1e-6
    assert len(roots) == (1 if mu < 0 else 2) or mu == LEAST_MU
    assert logits_of(-0.3) == [torch.tensor(LEAST_MU, dtype=torch.float64)]


def test_rgap_gives_a_linear_combination_of_a_batch_in_a_fully_connected_network() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 20, bias=False), nn.LeakyReLU(0.2), nn.Linear(20, 1, bias=False)]
    model, x = nn.Sequential(nn.Flatten(), *layers).double(), small_photo(3)
    found = baselines.rgap(model, logistic_gradients(model, x, 1.0), (1, 8, 8), batch_size=3)
    samples = x.flatten(1).T
    weights = torch.linalg.lstsq(samples, found.inputs.reshape(64, 1)).solution
    assert torch.allclose(samples @ weights, found.inputs.reshape(64, 1), atol=1e-10)
    assert any("linear combination" in note for note in found.notes)


# --- COPA -------------------------------------------------------------------------------------------------


def test_copa_passes_a_relu_where_the_constraints_suffice() -> None:
    model, x = small_cnn(nn.ReLU, 4, filters=16), small_photo()
    found = baselines.copa(model, gradients_of(model, x, torch.tensor([2])), (1, 8, 8), steps=3)
    assert psnr(found.inputs, x) > 150
    assert found.labels.tolist() == [2]


def test_copa_lowers_the_mismatch_of_its_start() -> None:
    model, x = small_cnn(nn.LeakyReLU, 4), small_photo()
    generator = torch.Generator().manual_seed(0)
    seen = {
        name: g + 1e-4 * g.norm() / g.numel() ** 0.5 * torch.randn(g.shape, generator=generator, dtype=torch.float64)
        for name, g in gradients_of(model, x, torch.tensor([2])).items()
    }
    start = baselines.copa(model, seen, (1, 8, 8), steps=0)
    found = baselines.copa(model, seen, (1, 8, 8), steps=20)
    assert found.gradient_residual < start.gradient_residual / 2
    assert psnr(found.inputs, x) > psnr(start.inputs, x)


# --- I2F --------------------------------------------------------------------------------------------------


def test_i2f_is_the_bound_of_the_dense_jacobian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Sigmoid(), nn.Linear(12, 3)).double()
    x, y, sigma = torch.rand(1, 5).double(), torch.tensor([1]), 1e-3
    parameters = list(model.parameters())

    def gradient(at: Tensor) -> Tensor:
        found = torch.autograd.grad(F.cross_entropy(model(at), y), parameters, create_graph=True)
        return torch.cat([g.flatten() for g in found])

    j = torch.autograd.functional.jacobian(gradient, x).reshape(-1, 5).T  # (d_x, d_w)
    names = [name for name, _ in model.named_parameters()]
    expected = sigma * j.norm() / torch.linalg.eigvalsh(j @ j.T)[-1] / 5**0.5
    bound = baselines.i2f_bound(model, x, y, dict.fromkeys(names, sigma))
    assert bound == pytest.approx(float(expected), rel=0.3)  # a mean over draws of the norm
    error = sigma * torch.linalg.solve(j @ j.T, j).norm() / 5**0.5
    assert bound < float(error)
    double = baselines.i2f_bound(model, x, y, dict.fromkeys(names, 2 * sigma))
    assert double == pytest.approx(2 * bound, rel=1e-3)


def test_paper_networks_answer_as_their_papers_say() -> None:
    model, x = models.cnn6("leaky_relu"), photo(32)
    found = baselines.rgap(model, logistic_gradients(model, x, 1.0), (3, 32, 32), labels=[1])
    assert psnr(found.inputs, x) > 150
