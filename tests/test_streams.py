"""Order on streams, and devices other than the current one."""

from __future__ import annotations

import pytest
import torch

from layers import gradient_matrix, random_grad_output, random_mask, random_weight, weight_matrix
from rconv_fast.constraints.streams import cupy_on_torch_stream, import_cupy
from rconv_fast.errors import MissingDependencyError
from rconv_fast.geometry import ConvGeometry
from rconv_fast.testing import GEOMETRIES

LATE = 200_000_000  # cycles that a producer sleeps, some 0.1 s


@pytest.mark.cuda
def test_kernels_wait_for_their_producer_on_another_stream() -> None:
    geometry = ConvGeometry.create("test", 8, 16, (64, 64), 3, padding=1)
    source = random_grad_output(geometry, device="cuda")
    expected = gradient_matrix(geometry, source.relu())
    expected_nonzeros = gradient_matrix(geometry, source.relu(), drop_zeros=True)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(source)
        torch.cuda._sleep(LATE)
        late.copy_(source.relu())
        full, nonzeros = gradient_matrix(geometry, late), gradient_matrix(geometry, late, drop_zeros=True)
    stream.synchronize()
    assert torch.equal(full.values(), expected.values())
    assert torch.equal(nonzeros.values(), expected_nonzeros.values())
    assert torch.equal(nonzeros.col_indices(), expected_nonzeros.col_indices())


@pytest.mark.cuda
@pytest.mark.real_gpu
def test_the_pattern_does_not_wait_for_the_device() -> None:
    geometry = GEOMETRIES["same 3x3"]
    grad_output = random_grad_output(geometry, device="cuda")
    gradient_matrix(geometry, grad_output)
    torch.cuda.synchronize()
    torch.cuda._sleep(LATE)
    gradient_matrix(geometry, grad_output)
    assert not torch.cuda.current_stream().query()


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_the_second_device() -> None:
    geometry = GEOMETRIES["groups 2"]
    weight, mask = random_weight(geometry, device="cuda:1"), random_mask(geometry, device="cuda:1")
    with torch.cuda.device(0):
        matrix = weight_matrix(geometry, weight, mask=mask)
    assert matrix.device == weight.device
    assert torch.equal(matrix.to_dense().cpu(), weight_matrix(geometry, weight.cpu(), mask=mask.cpu()).to_dense())


@pytest.mark.cuda
def test_cupy_runs_on_torchs_stream() -> None:
    pytest.importorskip("cupy")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros(1 << 20, device="cuda")
        torch.cuda._sleep(LATE)
        late.fill_(1)
        with cupy_on_torch_stream(late.device) as cupy:
            assert cupy.cuda.get_current_stream().ptr == stream.cuda_stream
            total = cupy.from_dlpack(late).sum()
    assert float(total) == 1 << 20


def test_missing_cupy_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cupy", None)  # import then raises ImportError
    with pytest.raises(MissingDependencyError, match=r'^to_cupy: cupy .*pip install "rconv-fast\[cu1[23]\]"'):
        import_cupy("to_cupy")
