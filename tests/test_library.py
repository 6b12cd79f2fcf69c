"""The contract of torch.library: opcheck on every operator."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from layers import random_mask
from rconv_fast.constraints import ops
from rconv_fast.constraints.layout import ConstraintLayout
from rconv_fast.testing import GEOMETRIES

OPS = torch.ops.rconv_fast
# opcheck of torch 2.14 itself reads .grad of what is no leaf, and is warned; the operators read none.
OPCHECK_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
LAYOUTS = {
    "gradient": ConstraintLayout.of_gradient(GEOMETRIES["unlike axes"], 2),
    "weight": ConstraintLayout.of_weight(GEOMETRIES["groups 2"]),
    "weight 1-D": ConstraintLayout.of_weight(GEOMETRIES["1-D"]),
}


@OPCHECK_GRAD
@pytest.mark.compile
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


@OPCHECK_GRAD
@pytest.mark.compile
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


def test_a_dispatch_mode_sees_the_operators() -> None:
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    grad_output = torch.randn(1, 2, 4, 4)
    plain = ops.gradient_components(grad_output, (4, 4), 3, padding=1)
    with Watch():
        watched = ops.gradient_components(grad_output, (4, 4), 3, padding=1)
    assert {"rconv_fast::pattern", "rconv_fast::values"} <= set(names)
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a, b)


def test_fake_tensors_get_the_fake() -> None:
    with FakeTensorMode() as mode:
        values, crow, col = ops.gradient_components(mode.from_tensor(torch.randn(1, 2, 4, 4)), (4, 4), 3, padding=1)
    assert isinstance(values, FakeTensor)
    assert values.shape == col.shape == (200,)
    assert crow.shape == (19,)


def test_a_profile_shows_the_operators() -> None:
    with torch.profiler.profile() as profile:
        ops.gradient_components(torch.randn(1, 2, 4, 4), (4, 4), 3, padding=1)
    assert "rconv_fast::values" in {event.name for event in profile.events()}


def test_a_jit_trace_is_refused_and_not_frozen() -> None:
    """TorchScript's tracer knows no device as an argument: an error, and no constant in the trace."""
    with pytest.raises(RuntimeError, match="Device"):
        torch.jit.trace(lambda g: ops.gradient_components(g, (4, 4), 3)[0], torch.randn(1, 2, 2, 2))
