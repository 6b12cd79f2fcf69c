"""Products by tiles are the products: in value, as each other's adjoint, and to float32's rounding."""

from __future__ import annotations

import pytest
import torch

from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.rows import GradientRows, System, WeightRows, balance
from rconv_fast.solve.tiles import TiledSystem, products

# Batch, channels, size, filters, kernel, stride, padding: 3 to 5 taps an axis, tiles that do not fill the picture.
LAYERS = [
    (1, 8, (24, 24), 64, 5, 2, 2),
    (2, 8, (17, 30), 64, 5, 2, 1),
    (1, 32, (9, 12), 64, 3, 1, 1),
    (1, 32, (14, 13), 64, 5, 1, 0),
    (3, 8, (29, 20), 64, 7, 2, 3),
    (1, 4, (40, 37), 64, 7, 3, 2),
]
# Of the norm of what a product gives: some tens of float32's roundings.
ROUNDING = 5e-6


def layer(batch: int, channels: int, size: tuple[int, int], filters: int, kernel: int, stride: int, pad: int) -> System:
    geometry = ConvGeometry.create("test", channels, filters, size, (kernel, kernel), stride, pad)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (filters, channels, kernel, kernel)
    weight, output = draw(*shape), draw(batch, filters, *geometry.out_size)
    gradient = GradientRows.create(geometry, draw(*shape), draw(*output.shape))
    known = WeightRows.create(geometry, weight, output, (output > 0).double())
    return balance(System(torch.Size((batch, channels, *size)), (gradient, known)), 0.5)


def distance(found: list[torch.Tensor], true: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))


@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_products_by_tiles_are_the_products(shape: tuple[int, ...]) -> None:
    system = layer(*shape)  # type: ignore[arg-type]
    tiled = products(system, torch.float32)
    assert isinstance(tiled, TiledSystem)
    x = torch.randn(system.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = system.apply(x)
    assert distance(tiled.apply(x.float()), tiled.rows(rows)) < ROUNDING
    assert distance([tiled.adjoint(tiled.rows(rows))], [system.adjoint(rows)]) < ROUNDING
    assert distance(tiled.rhs, tiled.rows(system.rhs)) == 0


def test_the_layout_of_tiles_keeps_norms() -> None:
    system = layer(*LAYERS[1])
    for part, tiles in zip(system.rhs, products(system, torch.float32).rows(system.rhs), strict=True):
        torch.testing.assert_close(tiles.norm(), part.float().norm())


def test_values_off_the_support_stay_out() -> None:
    system = layer(*LAYERS[0])
    support = torch.rand(system.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    held = System(system.shape, system.blocks, support)
    tiled = products(held, torch.float32)
    assert not tiled.adjoint(tiled.rhs)[~support].any()


def test_float64_products_and_small_layers_go_without_tiles() -> None:
    assert not isinstance(products(layer(*LAYERS[0]), torch.float64), TiledSystem)
    assert not isinstance(products(layer(1, 3, (20, 20), 64, 3, 1, 1), torch.float32), TiledSystem)
