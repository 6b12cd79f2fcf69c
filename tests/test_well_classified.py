"""A sample that a model classifies well: its ``softmax - 1`` has lost its digits in float32, the picture has not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import Attack, gradients_of, photo
from rconv_fast import invert, models


def perceptron() -> nn.Sequential:
    layers = [nn.Flatten(), nn.Linear(432, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10)]
    return nn.Sequential(*layers)


def strided() -> nn.Sequential:
    layers = [nn.Conv2d(3, 32, 5, 2, 2), nn.LeakyReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.LeakyReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64 * 9, 10))


def pooled() -> nn.Sequential:
    return models.fedavg_cnn(filters=(24, 48), in_channels=3, image_size=12, hidden=128, dtype=torch.float32)


def sure_of(model: nn.Sequential, x: Tensor, y: Tensor, loss: float) -> None:
    """Raise the label's bias until the loss is this small."""
    head = model[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        others = model(x)[0].index_fill(0, y, -math.inf).logsumexp(0)
        head.bias[y] += others - model(x)[0, y] - math.log(math.expm1(loss))


@pytest.mark.parametrize(
    ("make", "loss", "psnr"),
    [*((make, loss, psnr) for make, psnr in ((perceptron, 160), (strided, 115)) for loss in (1e-2, 1e-4, 1e-6)),
     (pooled, 1e-4, 115)],
)  # fmt: skip
def test_float32_gradients_of_a_well_classified_sample_are_verified(make: type, loss: float, psnr: float) -> None:
    torch.manual_seed(0)
    model, x, y = make(), photo(12).float(), torch.tensor([4])
    sure_of(model, x, y, loss)
    assert F.cross_entropy(model(x), y).item() == pytest.approx(loss, rel=0.5)
    done = Attack(invert(model, gradients_of(model, x, y), x.shape[1:]), x)
    assert done.result.verified, done.result.summary()
    assert done.psnr > psnr


def test_a_wrong_label_is_not_verified_however_small_the_loss() -> None:
    torch.manual_seed(0)
    model, x, y = strided(), photo(12).float(), torch.tensor([4])
    sure_of(model, x, y, 1e-6)
    found = invert(model, gradients_of(model, x, y), x.shape[1:], labels=[5])
    assert not found.verified


def test_a_fully_connected_layer_uses_what_the_client_computed() -> None:
    # Its own bias gradient, not what came back through two layers: all rows average their rounding to below a tenth.
    torch.manual_seed(0)
    model, x = perceptron(), photo(12).float()
    done = Attack(invert(model, gradients_of(model, x), x.shape[1:]), x)
    assert done.psnr > 20 * math.log10(10 * 2**24)
