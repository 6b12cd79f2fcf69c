"""Defences: the noise they name is the noise they make."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rconv_fast import defenses
from rconv_fast.observation import SharedGradients


def some_gradients(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(40, 20, 5, 5, generator=generator, dtype=dtype),
        "fc.bias": 1e-3 * torch.randn(4000, generator=generator, dtype=dtype),
    }


def in_units_of_noise(shared: SharedGradients, true: dict[str, Tensor], name: str) -> float:
    assert shared.noise is not None
    sigma = torch.as_tensor(shared.noise[name], dtype=torch.float64).expand(true[name].shape)
    error, alive = (shared[name] - true[name]).double(), sigma > 0
    assert not error[~alive].any()
    return float((error[alive] / sigma[alive]).square().mean().sqrt())


@pytest.mark.parametrize(
    "defence",
    [
        lambda g: defenses.gaussian(g, 1e-2),
        lambda g: defenses.gaussian(g, 1e-2, relative=True),
        lambda g: defenses.quantise(g, torch.float16),
        lambda g: defenses.quantise(g, torch.bfloat16),
        lambda g: defenses.quantise(g, torch.int8),
        lambda g: defenses.gaussian(defenses.gaussian(g, 3e-2), 4e-2),
        lambda g: defenses.quantise(defenses.gaussian(g, 1e-5), torch.float32),
    ],
    ids=["gaussian", "relative", "float16", "bfloat16", "int8", "twice", "gaussian then float32"],
)
def test_noise_is_the_size_of_the_error(defence: Callable[[dict[str, Tensor]], SharedGradients]) -> None:
    torch.manual_seed(0)
    true = some_gradients()
    shared = defence(true)
    for name in true:
        assert in_units_of_noise(shared, true, name) == pytest.approx(1, rel=0.1)


def test_noise_of_gaussian_is_absolute_unless_relative() -> None:
    true = some_gradients()
    assert defenses.gaussian(true, 0.5).noise == {"conv.weight": 0.5, "fc.bias": 0.5}
    relative = defenses.gaussian(true, 0.5, relative=True).noise
    assert relative is not None
    assert relative["fc.bias"] == pytest.approx(0.5e-3, rel=0.05)


def test_same_generator_same_noise() -> None:
    first, second = (defenses.gaussian(some_gradients(), 1, generator=torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(first["fc.bias"], second["fc.bias"])


def test_clip_scales_all_tensors_alike_and_hides_the_factor() -> None:
    true = some_gradients()
    norm = math.sqrt(sum(float(g.square().sum()) for g in true.values()))
    clipped = defenses.clip(true, norm / 4)
    for name, g in true.items():
        torch.testing.assert_close(clipped[name], g / 4)
    assert not clipped.scale_known
    assert defenses.clip(true, 2 * norm).scale_known
    noisy = defenses.clip(defenses.gaussian(true, 1e-9), norm / 4)
    assert noisy.noise is not None
    assert noisy.noise["fc.bias"] == pytest.approx(1e-9 / 4)


def test_top_k_keeps_the_largest_and_bounds_the_rest() -> None:
    true = some_gradients()
    shared = defenses.top_k(true, 0.1)
    for name, g in true.items():
        kept = shared[name] != 0
        assert int(kept.sum()) == round(0.1 * g.numel())
        assert torch.equal(shared[name][kept], g[kept])
        assert float(g[~kept].abs().max()) <= float(g[kept].abs().min())
        assert shared.noise is not None
        dropped = torch.as_tensor(shared.noise[name])[~kept] * math.sqrt(3)
        torch.testing.assert_close(dropped.max(), g[kept].abs().min())


def test_sign_has_three_values_and_the_noise_of_a_normal_entry() -> None:
    true = some_gradients()
    true["fc.bias"][:5] = 0
    shared = defenses.sign(true)
    assert set(shared["conv.weight"].unique().tolist()) == {-1.0, 1.0}
    assert not shared["fc.bias"][:5].any()
    assert not shared.scale_known
    best = math.sqrt(2 / math.pi) * true["conv.weight"]
    assert in_units_of_noise(shared, {**true, "conv.weight": best}, "conv.weight") == pytest.approx(1, rel=0.1)


def test_float16_overflow_is_cut() -> None:
    shared = defenses.quantise({"w": torch.tensor([1e6, -1e6, 1.0])}, torch.float16)
    assert shared["w"].tolist() == [65504.0, -65504.0, 1.0]


def test_dtype_and_device_stay() -> None:
    true = some_gradients(torch.float32)
    for shared in (defenses.gaussian(true, 0.1), defenses.quantise(true, torch.int8), defenses.sign(true)):
        assert shared["fc.bias"].dtype == torch.float32


def test_arguments_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="gaussian: sigma must be finite and >= 0, got -1"):
        defenses.gaussian(some_gradients(), -1)
    with pytest.raises(ValueError, match=r"top_k: share must be in \(0, 1\], got 2"):
        defenses.top_k(some_gradients(), 2)
    with pytest.raises(ValueError, match="quantise: dtype must be"):
        defenses.quantise(some_gradients(), torch.int64)
    with pytest.raises(TypeError, match="clip: gradients must map"):
        defenses.clip([torch.ones(1)], 1)  # type: ignore[arg-type]
