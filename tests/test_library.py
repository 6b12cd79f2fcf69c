"""The contract of torch.library: opcheck on every operator."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from layers import random_mask
from rconv_fast.layout import ConstraintLayout
from rconv_fast.testing import GEOMETRIES

OPS = torch.ops.rconv_fast
LAYOUTS = {
    "gradient": ConstraintLayout.of_gradient(GEOMETRIES["unlike axes"], 2),
    "weight": ConstraintLayout.of_weight(GEOMETRIES["groups 2"]),
    "weight 1-D": ConstraintLayout.of_weight(GEOMETRIES["1-D"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_opcheck(name: str, device: torch.device) -> None:
    layout = LAYOUTS[name]
    numbers = layout.numbers
    start, col = OPS.pattern(numbers, device)
    opcheck(OPS.pattern.default, (numbers, device))
    options = {"dtype": torch.float64, "device": device}
    source = torch.randn(layout.n_source, **options).requires_grad_()
    opcheck(OPS.values.default, (source, start, len(col), numbers))
    opcheck(OPS.values.default, (source.float().detach(), start, len(col), numbers))
    opcheck(OPS.sum_values.default, (torch.randn(len(col), **options).requires_grad_(), start, numbers))
    opcheck(OPS.nonzero_pattern.default, (source.detach().relu(), numbers))


def test_opcheck_masked_pattern(device: torch.device) -> None:
    geometry = GEOMETRIES["groups 2"]
    numbers = ConstraintLayout.of_weight(geometry).numbers
    mask = random_mask(geometry, device=device)
    opcheck(OPS.masked_pattern.default, (mask, numbers))
    start, _, col = OPS.masked_pattern(mask, numbers)
    source = torch.randn(LAYOUTS["weight"].n_source, dtype=torch.float64, device=device, requires_grad=True)
    opcheck(OPS.values.default, (source, start, len(col), numbers))


def test_every_operator_is_checked_here() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("rconv_fast::")
    }
    builders = {"pattern", "masked_pattern", "nonzero_pattern", "values", "sum_values"}
    assert builders <= registered
