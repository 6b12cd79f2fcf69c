"""Gradient matching that goes on from what the equations say."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attacks import gradients_of, photo
from rconv_fast import Inversion, invert
from rconv_fast.baselines.continued import continued
from rconv_fast.baselines.matching import inputs_of


def scarce() -> nn.Sequential:
    """A first layer with too few equations."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(3, 12, 3, 1, 1), nn.Sigmoid(), nn.Flatten())
    return body.append(nn.Linear(12 * 16, 10)).double()


def test_only_on_demand_and_never_verified() -> None:
    model, x = scarce(), photo(8)
    shared = gradients_of(model, x)
    plain = invert(model, shared, x.shape[1:])
    assert not plain.verified
    assert not any("miss the gradients" in note for note in plain.notes), "open values are a choice, no mistake"
    found = invert(model, shared, x.shape[1:], method="optimise", time_limit=1.0)
    assert found.verdict == "approximate"
    assert not found.verified
    assert found.labels.tolist() == [1]
    assert found.gradient_residual <= plain.gradient_residual
    assert [layer.name for layer in found.layers] == [layer.name for layer in plain.layers]


def test_a_verified_answer_is_left_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).double()
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    found = invert(model, gradients_of(model, x), x.shape[1:], method="optimise")
    assert found.verified
    assert found.verdict == "exact"


class Attending(nn.Module):
    """A network that the exact method cannot pass, and torch's fast attention not differentiate twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.attention = nn.Conv2d(3, 8, 3, 2, 1), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        attended: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        logits: Tensor = self.head(torch.sigmoid(attended).flatten(1))
        return logits


def test_known_features_draw_the_descent_through_what_cannot_be_passed() -> None:
    model, x = Attending().double(), photo(8)
    shared = gradients_of(model, x)
    known = invert(model, shared, x.shape[1:])
    assert known.verdict == "features"
    found = continued(known, model, shared, x.shape[1:], steps=150)  # type: ignore[call-arg]
    assert found.verdict == "approximate"
    with torch.no_grad(), inputs_of(model, known.features) as inner:
        model(found.inputs)
    assert float((inner["head"] - known.features["head"]).norm() / known.features["head"].norm()) < 0.1


def test_what_the_descent_lacks_is_a_note_and_no_error() -> None:
    model, x = scarce(), photo(8)
    shared = gradients_of(model, x, torch.rand(1, 10).double(), nn.functional.mse_loss)
    known = Inversion(verdict="nothing", notes=["nothing known"])
    found = continued(known, model, shared, x.shape[1:], loss="mse")
    assert found.verdict == "nothing"
    assert "labels must be given" in found.notes[-1]
