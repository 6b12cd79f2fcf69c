"""torch.compile(fullgraph=True) over the components."""

from __future__ import annotations

import pytest
import torch

from layers import random_grad_output, random_mask, random_weight, sizes
from rconv_fast.constraints import ops
from rconv_fast.testing import GEOMETRIES

pytestmark = [
    pytest.mark.compile,
    # dynamo looks through our cache of checked geometries and says so; what it finds there is a constant.
    pytest.mark.filterwarnings("ignore:.*lru_cache.*:UserWarning"),
    # inductor of torch 2.6 says so of a setting of its own.
    pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning"),
]
GEOMETRY = GEOMETRIES["unlike axes"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_gradient_components(dynamic: bool, device: torch.device) -> None:
    def loss(g: torch.Tensor) -> torch.Tensor:
        values, crow, col = ops.gradient_components(g, GEOMETRY.input_size, GEOMETRY.kernel_size, **sizes(GEOMETRY))
        return (values.sin() * col).sum() + crow[-1]

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (1, 2):
        eager = random_grad_output(GEOMETRY, batch, dtype=torch.float64, device=device).requires_grad_()
        traced = eager.detach().clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(eager), eager)
        result = compiled(traced)
        (gradient,) = torch.autograd.grad(result, traced)
        torch.testing.assert_close(result, loss(eager), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_weight_components_with_inductor(device: torch.device) -> None:
    def components(w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ops.weight_components(w, GEOMETRY.input_size, **sizes(GEOMETRY))

    weight = random_weight(GEOMETRY, device=device)
    for ours, eager in zip(torch.compile(components, fullgraph=True)(weight), components(weight), strict=True):
        assert torch.equal(ours, eager)


def test_data_dependent_sizes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def masked(w: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ops.weight_components(w, GEOMETRY.input_size, mask=mask, **sizes(GEOMETRY))

    def nonzeros(g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = (GEOMETRY.input_size, GEOMETRY.kernel_size)
        return ops.gradient_components(g, *size, drop_zeros=True, **sizes(GEOMETRY))

    weight, mask = random_weight(GEOMETRY, device=device), random_mask(GEOMETRY, device=device)
    grad_output = random_grad_output(GEOMETRY, device=device).relu()
    monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)  # newer torch does so unasked
    for function, arguments in ((masked, (weight, mask)), (nonzeros, (grad_output,))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(compiled(*arguments), function(*arguments), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.cuda
def test_reduce_overhead_replays_in_a_cuda_graph() -> None:
    def values(g: torch.Tensor) -> torch.Tensor:
        size = (GEOMETRY.input_size, GEOMETRY.kernel_size)
        return ops.gradient_components(g, *size, **sizes(GEOMETRY))[0] * 2

    compiled = torch.compile(values, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        grad_output = random_grad_output(GEOMETRY, device="cuda")
        assert torch.equal(compiled(grad_output), values(grad_output))
