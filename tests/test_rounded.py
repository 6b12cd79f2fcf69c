"""Products in bfloat16: near the exact ones, in their shapes, and only where the processor multiplies bfloat16."""

from __future__ import annotations

import pytest
import torch

from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve import tiles
from rconv_fast.solve.rounded import RoundedSystem
from rconv_fast.solve.rows import GradientRows, System, WeightRows, norm
from rconv_fast.solve.tiles import products

ROUNDING = 2.0**-8  # of bfloat16


def large() -> System:
    """Gradient and weight rows of a convolution of 32 channels, a third of the values held at 0."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    geometry = ConvGeometry.create("test", 32, 64, (16, 16), (5, 5), stride=2, padding=2)
    outputs, support = (1, 64, 8, 8), torch.rand(1, 32, 16, 16, generator=generator) > 0.3
    gradient = GradientRows.create(geometry, draw(64, 32, 5, 5), draw(*outputs))
    weight = WeightRows.create(geometry, draw(64, 32, 5, 5), draw(*outputs), (draw(*outputs) > 0).double())
    return System(support.shape, (gradient, weight), support)


def test_rounded_products_are_the_exact_ones_to_eight_bits() -> None:
    system = large()
    rounded = RoundedSystem.create(system)
    x = torch.randn(system.shape, generator=torch.Generator().manual_seed(1))
    exact = system.apply(x.double())
    found = rounded.apply(x)
    assert {part.dtype for part in found} == {torch.float32}
    for part, other in zip(found, exact, strict=True):
        assert norm([part - other]) < ROUNDING * norm([other])
    back, other = rounded.adjoint(found), system.adjoint([part.double() for part in found])
    assert back.dtype == torch.float32
    assert norm([back - other]) < ROUNDING * norm([other])
    assert not back[~system.support].any()


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_for_processors_that_have_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "has_bfloat16", lambda _: native)
    assert isinstance(products(large(), torch.bfloat16), RoundedSystem) == native
