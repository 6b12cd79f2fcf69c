"""End to end: a real photo's gradients in, the photo out, with a verdict that can be trusted."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import assert_recovered, attack, gradients_of, photo
from rconv_fast import Inversion, RconvError, invert
from rconv_fast.heads import head_candidates
from rconv_fast.losses import Loss
from rconv_fast.observation import Observation
from rconv_fast.solve import Evidence
from rconv_fast.verdict import what_misses
from rconv_fast.walk import pass_
from rconv_fast.walk.reader import build_graph
from rconv_fast.walk.report import LayerReport
from small_networks import SHAPE, Residual, X, small

# How gradients come in, how results come out


@pytest.mark.parametrize("kind", [nn.ELU, nn.Sigmoid, nn.Tanh])
def test_saturated_units_do_not_speak_as_loudly_as_others(kind: type[nn.Module]) -> None:
    """Their gradient is all rounding: filters scaled to equal gradients gave 78 dB, not verified, for Tanh."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 12, 5, 2, 2), kind(), nn.Flatten(), nn.Linear(768, 385), kind())
    model.append(nn.Linear(385, 20))
    for parameter in model[3:].parameters():
        nn.init.uniform_(parameter, -2, 2)
    assert_recovered(model, photo(16), psnr=200)


def test_a_reading_of_the_head_that_a_relu_cannot_put_out_is_dropped() -> None:
    """A logistic head without bias leaves the sign of its input open."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 5, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1, bias=False)).double()
    loss = F.binary_cross_entropy_with_logits(model(X), torch.ones(1, 1, dtype=torch.float64))
    names, parameters = zip(*model.named_parameters(), strict=True)
    shared = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    seen = Observation(shared, Loss("binary_cross_entropy_with_logits"))
    outcome = head_candidates(build_graph(model, shared, SHAPE, 1), seen)
    features = [value for candidate in outcome.candidates for value in candidate.values.values()]
    assert len(features) == 2  # of four: the logit has two values for each sign
    assert all(bool((value >= 0).all()) for value in features)
    assert any(torch.allclose(value, model[:3](X), atol=1e-12) for value in features)


@pytest.mark.parametrize("seed", range(4))
def test_a_wrong_threshold_shows_in_the_residual_and_another_is_tried(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without biases, nothing but the next layer's residual tells a small activation from a zero."""
    monkeypatch.setattr(pass_, "THRESHOLD_FACTOR", 1e12)  # takes activations below 0.1% of the largest for zeros
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 48, 5, 2, 2, bias=False), nn.ReLU(), nn.Conv2d(48, 32, 3, 1, 1, bias=False))
    model.extend([nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10)])
    assert_recovered(model, X, psnr=200)


def test_a_sequence_in_parameter_order_is_a_mapping() -> None:
    model = small()
    named = gradients_of(model, X)
    mapped = invert(model, named, SHAPE)
    for listed in (list(named.values()), tuple(named.values())):
        assert torch.equal(invert(model, listed, SHAPE).inputs, mapped.inputs)
    assert mapped.verified


def test_the_order_of_a_mapping_does_not_matter() -> None:
    model = small()
    named = gradients_of(model, X)
    backwards = dict(reversed(named.items()))
    assert torch.equal(invert(model, backwards, SHAPE).inputs, invert(model, named, SHAPE).inputs)


def test_the_model_is_left_untouched() -> None:
    model = Residual(False).double()
    shared = gradients_of(model.eval(), photo())
    del shared["head.bias"]  # it was not trained
    model.head.bias.requires_grad_(False)
    model.conv1.weight.requires_grad_(False)
    model.stem.weight.grad = torch.full_like(model.stem.weight, 7.0)
    hook = model.norm1.register_forward_hook(lambda *_: None)
    given = {name: g.clone() for name, g in shared.items()}
    before = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    identities = [id(p) for p in model.parameters()]
    assert invert(model, shared, (3, 32, 32)).verified
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [module.training for module in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == identities
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert value.dtype == before[name].dtype, name
    assert torch.equal(model.stem.weight.grad, torch.full_like(model.stem.weight, 7.0))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "stem.weight")
    assert all(torch.equal(shared[name], given[name]) for name in given), "nor are the gradients"
    assert list(model.norm1._forward_hooks) == [hook.id]


def test_global_state_is_left_untouched() -> None:
    model = small()
    shared = gradients_of(model, X)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dtype = torch.get_default_dtype()
    invert(model, shared, SHAPE)
    assert torch.equal(torch.rand(3), expected), "the random state"
    assert torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert invert(model, shared, SHAPE).verified
        assert not torch.is_grad_enabled()


def test_a_float32_model_is_solved_in_float64() -> None:
    model = small().float()
    result = invert(model, gradients_of(model, X.float()), SHAPE)
    assert result.verified
    assert result.inputs.dtype == torch.float64
    assert not result.inputs.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_report_of_a_result() -> None:
    result = attack(small(), X).result
    assert isinstance(result, Inversion)
    text = result.summary()
    assert text.startswith("1 sample(s), labels [1]: exact, verified")
    assert "100.0% of the values determined" in text
    for layer in result.layers:
        assert layer.name in text
        assert layer.kind == "Conv2d"
        assert layer.rank == layer.unknowns <= layer.rows
        assert layer.residual < 1e-12
        assert layer.seconds > 0
        assert layer.solver in text
    assert [layer.name for layer in result.layers] == ["2", "0"]
    assert [layer.unknowns for layer in result.layers] == [24 * 36, 3 * 144]
    assert [(s.label, s.multiplicity, s.status) for s in result.samples] == [(1, 1, "exact")]
    assert result.samples[0].certificate < 1e-9
    assert result.samples[0].error < 1e-10
    assert result.verdict == "exact"
    assert set(result.features) == {"5", "2", "0"}
    assert result.determined.dtype == torch.bool
    assert result.determined.shape == result.inputs.shape == (1, *SHAPE)


def test_progress_is_reported_layer_by_layer() -> None:
    model, events = small(), []
    invert(model, gradients_of(model, X), SHAPE, progress=events.append)
    layers = list(dict.fromkeys(event.layer for event in events))
    assert layers[0] == "head"
    assert [layer for layer in layers if layer in ("2", "0")] == ["2", "0"]
    assert all(event.stage for event in events)


# A verdict that can be trusted


def test_gradients_of_another_model_are_not_verified() -> None:
    model = small()
    stranger = small()
    try:
        result = invert(model, gradients_of(stranger, X), SHAPE)
    except RconvError:
        return  # saying that no sample explains the head is just as honest
    assert not result.verified
    assert result.gradient_residual > 1e-3
    assert "NOT verified" in result.summary()


def test_one_changed_layer_is_not_verified() -> None:
    """The head is right and so are its features; the first convolution is another one."""
    model = small()
    shared = gradients_of(model, X)
    with torch.no_grad():
        model[0].weight.mul_(1 + 0.1 * torch.randn_like(model[0].weight))
    result = invert(model, shared, SHAPE)
    assert not result.verified
    assert result.gradient_residual > 1e-3


def test_one_changed_gradient_is_not_verified() -> None:
    model = small()
    shared = gradients_of(model, X)
    shared["2.weight"] = shared["2.weight"] * (1 + 1e-3 * torch.randn_like(shared["2.weight"]))
    result = invert(model, shared, SHAPE)
    assert not result.verified
    assert not result.determined.any() or result.gradient_residual > 1e-6


def test_too_few_equations_are_not_verified() -> None:
    """Half as many filters as needed in the first layer: some solution, said to be one of many."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 5, 2, 2), nn.ReLU(), nn.Conv2d(4, 48, 3, 1, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(48 * 36, 10),
    ).double()  # fmt: skip
    done = attack(model, X)
    result = done.result
    assert not result.verified
    assert not result.determined.all()
    assert done.psnr < 60
    first = result.layers[-1]
    assert (first.name, first.unknowns) == ("0", 432)
    assert first.rank < first.unknowns
    assert any("minimum-norm" in note for note in result.notes)
    missing = first.unknowns - min(first.rank, first.rows)
    assert any(note.startswith("0: ") and f"{missing} too few" in note for note in result.notes)
    assert "NOT verified" in result.summary()


def test_an_open_layer_says_how_many_equations_it_misses_only_where_that_is_known() -> None:
    def said(rows: int, rank: int) -> str:
        evidence = Evidence(rank, 100, rows, 0.0, math.inf, "hybrid", "none")
        return what_misses(LayerReport("0", "Conv2d", evidence, 0.0), 100)

    assert said(90, 90) == "0: 90 equations for 100 values, 10 too few; 100 values are open"
    assert "120 equations of rank 97 for 100 values, 3 too few" in said(120, 97)
    # what an iteration that did not converge reports
    assert "120 equations for 100 values, not shown to have full rank" in said(120, 99)


def test_what_is_determined_of_an_open_input_is_exact() -> None:
    """A pointwise stem of stride 2 never looks at three quarters of the pixels."""
    model = nn.Sequential(
        nn.Conv2d(3, 24, 1, 2), nn.ReLU(), nn.Conv2d(24, 48, 3, 1, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(48 * 36, 10),
    ).double()  # fmt: skip
    result = attack(model, X).result
    seen = torch.zeros(12, 12, dtype=torch.bool)
    seen[::2, ::2] = True
    assert torch.equal(result.determined, seen.expand_as(result.determined))
    assert float((result.inputs - X)[result.determined].abs().max()) < 1e-10
    assert result.gradient_residual < 1e-10
    assert not result.verified, "the gradients match, but so do those of other photos"


# What stops the recursion

MIDDLE = {
    "GELU behind ReLU": (nn.GELU(), "2", "GELU, behind something else than one convolution"),
    "alpha dropout in training mode": (nn.AlphaDropout(0.5), "2", "whose mask is not shared"),
    "layer norm over the last axis": (nn.LayerNorm(6), "2", "over the last axes (6,) alone"),
    "softmax": (nn.Softmax(1), "2", "a layer with no rule"),
    "a falling PReLU": (nn.PReLU(init=-0.1), "2", "not monotone with these parameters"),
}


@pytest.mark.parametrize(("layer", "name", "reason"), MIDDLE.values(), ids=MIDDLE.keys())
def test_unsupported_layers_are_named_and_the_features_kept(layer: nn.Module, name: str, reason: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 5, 2, 2), nn.ReLU(), layer, nn.Conv2d(24, 48, 3, 1, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(48 * 36, 10),
    ).double()  # fmt: skip
    seen: dict[str, Tensor] = {}
    for index in (3, 6):
        model[index].register_forward_pre_hook(
            lambda _, inputs, index=index: seen.__setitem__(str(index), inputs[0].detach())
        )
    shared = gradients_of(model, X)
    truth = dict(seen)
    result = invert(model, shared, SHAPE)
    assert (result.verdict, result.stops_at, result.inputs) == ("features", name, None)
    assert reason in result.reason
    assert result.labels.tolist() == [1]
    assert set(result.features) == {"3", "6"}
    for key in ("3", "6"):
        assert float((result.features[key] - truth[key]).abs().max()) < 1e-9, key
    assert f"stops at {name}: " in result.summary()


@pytest.mark.parametrize(
    ("head", "name"), [(nn.Conv2d(48, 10, 6), "5"), (nn.GELU(), "5"), (nn.AvgPool2d(6), "5")], ids=str
)
def test_a_head_that_is_not_linear_is_named(head: nn.Module, name: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 5, 2, 2), nn.ReLU(), nn.Conv2d(24, 48, 3, 1, 1), nn.ReLU(), nn.Identity(), head
    ).double()
    gradients = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    result = invert(model, gradients, SHAPE)
    assert (result.verdict, result.stops_at, result.features) == ("nothing", name, {})
    assert "a fully connected one is needed" in result.reason
