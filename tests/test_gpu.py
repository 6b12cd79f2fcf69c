"""The whole package on a GPU: the answers of the CPU, on any stream and device, without hidden synchronisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from attacks import gradients_of, photo, some_labels
from layers import random_grad_output, random_input, random_weight
from rconv_fast import invert, match_samples, psnr, recover_conv_input, separate_softmax_batch
from rconv_fast.constraints.operators import apply_gradient, apply_weight
from rconv_fast.solve import GradientRows, System, WeightRows, plan
from rconv_fast.testing import geometry as make

pytestmark = pytest.mark.cuda
SECOND = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LATE = 20_000_000  # cycles that a stream waits before its work, so that a missing dependency shows


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def relu_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 5, 2, 2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 20)).double()


LAYERS: dict[str, Callable[[], dict[str, Tensor | int]]] = {}


def layer(name: str, filters: int, known: float) -> None:
    def build() -> dict[str, Tensor | int]:
        torch.manual_seed(1)
        g = make((3, filters), (16, 16), 5, stride=2, padding=2)
        x, weight = random_input(g, 1, dtype=torch.float64), random_weight(g, dtype=torch.float64)
        grad = random_grad_output(g, 1, dtype=torch.float64)
        return {
            "x": x,
            "grad_weight": apply_gradient(g, x, grad),
            "grad_output": grad,
            "weight": weight,
            "output": apply_weight(g, x, weight),
            "known": torch.rand_like(grad) < known,
        }

    LAYERS[name] = build


layer("direct", 32, 1.0)
layer("jacobi or dense", 16, 0.7)
layer("dissection", 12, 1.1)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_as_on_the_cpu(name: str, inverted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plans of the CPU, and with small systems inverted as a GPU does it."""
    if not inverted:
        monkeypatch.setitem(plan.MAX_INVERTED_UNKNOWNS, "cuda", 0)
    given = LAYERS[name]()
    x = given.pop("x")
    options = {"input_size": (16, 16), "stride": 2, "padding": 2}
    on_cpu = recover_conv_input(**given, **options)
    on_gpu = recover_conv_input(**{key: value.cuda() for key, value in given.items()}, **options)
    assert on_gpu.input.is_cuda
    assert on_gpu.determined.is_cuda
    assert (on_gpu.rank, on_gpu.unknowns) == (on_cpu.rank, on_cpu.unknowns)
    expected = "cgls+inverse" if inverted and on_cpu.solver.startswith("cgls") else on_cpu.solver
    assert on_gpu.solver == expected
    assert torch.equal(on_gpu.determined.cpu(), on_cpu.determined)
    assert float((on_gpu.input.cpu() - x).abs().max()) < 1e-9


@pytest.mark.real_gpu  # torch without cuDNN does not keep its TF32 flags
def test_a_layer_large_enough_for_float32_products() -> None:
    torch.manual_seed(2)
    g = make((3, 24), (96, 96), 3, padding=1)
    x, weight = random_input(g, 1, dtype=torch.float64), random_weight(g, dtype=torch.float64)
    grad, output = random_grad_output(g, 1, dtype=torch.float64), apply_weight(g, x, weight)
    given = {"grad_weight": apply_gradient(g, x, grad), "grad_output": grad, "weight": weight, "output": output}
    for rounded in (False, True):  # the second is torch's default: products in float64 then
        torch.backends.cudnn.allow_tf32 = rounded
        found = recover_conv_input(**{k: v.cuda() for k, v in given.items()}, input_size=(96, 96), padding=1)
        assert ("float32" in found.solver) != rounded
        assert found.residual < 1e-12
        assert psnr(found.input.cpu(), x) > 200


def test_a_head_as_on_the_cpu() -> None:
    torch.manual_seed(3)
    head, x, y = nn.Linear(64, 30).double(), torch.randn(8, 64, dtype=torch.float64).relu(), torch.arange(8)
    grads = torch.autograd.grad(nn.functional.cross_entropy(head(x), y), list(head.parameters()))
    found = separate_softmax_batch(*(t.detach().cuda() for t in (*grads, head.weight, head.bias)))
    assert found.inputs.is_cuda
    assert found.labels.is_cuda
    order = match_samples(found.inputs.cpu(), x)
    assert torch.allclose(found.inputs.cpu(), x[order], atol=1e-8)
    assert torch.equal(found.labels.cpu(), y[order])


def check_inversion(batch: int, device: str, dtype: torch.dtype, bar: float) -> None:
    model, x = relu_network(), photo(16, batch=batch)
    shared = {name: g.to(device=device, dtype=dtype) for name, g in gradients_of(model, x, some_labels(batch)).items()}
    found = invert(model.to(device), shared, x.shape[1:])
    assert found.inputs.device == torch.device(device)
    assert found.verified, found.summary()
    inputs = found.inputs.cpu()
    order = match_samples(inputs, x)
    assert min(psnr(a, b) for a, b in zip(inputs, x[order], strict=True)) > bar


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 200), (torch.float32, 100)])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_whole_model(batch: int, dtype: torch.dtype, bar: float) -> None:
    check_inversion(batch, "cuda:0", dtype, bar)


@SECOND
def test_a_whole_model_on_the_second_device() -> None:
    with torch.cuda.device(0):
        check_inversion(1, "cuda:1", torch.float64, 200)


def test_a_whole_model_on_another_stream() -> None:
    model, x = relu_network().cuda(), photo(16).cuda()
    shared = gradients_of(model, x, some_labels(1).cuda())
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LATE)
        late = {name: g * 1.0 for name, g in shared.items()}
        found = invert(model, late, x.shape[1:])
    stream.synchronize()
    assert found.verified, found.summary()


def test_products_do_not_synchronise() -> None:
    g = make((3, 12), (16, 16), 5, stride=2, padding=2)
    x, weight = random_input(g, 1, device="cuda"), random_weight(g, device="cuda")
    grad = random_grad_output(g, 1, device="cuda")
    output = apply_weight(g, x, weight)
    system = System(
        x.shape,
        (
            GradientRows.create(g, apply_gradient(g, x, grad), grad),
            WeightRows.create(g, weight, output, torch.ones_like(output)),
        ),
    )
    system.adjoint(system.apply(x))  # cuDNN chooses its algorithms
    with no_synchronisation():
        system.adjoint(system.apply(x))
