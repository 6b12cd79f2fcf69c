"""The sparse structure, before any value: CSR invariants, index types, equality of all ways to build it."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from layers import gradient_matrix, random_grad_output, random_mask, random_weight, weight_matrix
from rconv_fast.constraints import reference
from rconv_fast.constraints.backends import backend_for, cpu
from rconv_fast.constraints.layout import ConstraintLayout
from rconv_fast.geometry import ConvGeometry
from rconv_fast.testing import assert_csr_valid, geometries, random_geometry

CPU = torch.device("cpu")


def layouts(geometry: ConvGeometry) -> tuple[ConstraintLayout, ConstraintLayout]:
    return ConstraintLayout.of_gradient(geometry, 2), ConstraintLayout.of_weight(geometry)


def assert_valid_everywhere(geometry: ConvGeometry, device: torch.device) -> None:
    grad_output = random_grad_output(geometry, device=device)
    weight, mask = random_weight(geometry, device=device), random_mask(geometry, device=device)
    for matrix, n_rows in (
        (gradient_matrix(geometry, grad_output), geometry.out_channels * geometry.n_taps),
        (
            gradient_matrix(geometry, grad_output.relu(), drop_zeros=True),
            geometry.out_channels * geometry.n_taps,
        ),
        (weight_matrix(geometry, weight), geometry.out_channels * geometry.n_output),
        (weight_matrix(geometry, weight, mask=mask), int(mask.sum())),
    ):
        assert_csr_valid(matrix)
        assert matrix.shape[0] == n_rows
        assert matrix.crow_indices().dtype == torch.int32
        assert matrix.device.type == device.type


def test_csr_is_valid(geometry: ConvGeometry, device: torch.device) -> None:
    assert_valid_everywhere(geometry, device)


@settings(max_examples=25, deadline=None)
@given(geometries())
def test_csr_is_valid_on_random_geometries(geometry: ConvGeometry) -> None:
    assert_valid_everywhere(geometry, CPU)


def assert_kernels_equal_reference(layout: ConstraintLayout, device: torch.device) -> None:
    backend = backend_for(device)
    start = backend.offsets(layout, device)
    assert torch.equal(start.cpu(), reference.offsets(layout, CPU))
    assert torch.equal(
        backend.columns(start, layout.nnz, layout).cpu(), reference.columns(start.cpu(), layout.nnz, layout)
    )
    source = torch.randn(layout.n_source, device=device).relu()
    values = backend.values(source, start, layout.nnz, layout)
    assert torch.equal(values.cpu(), reference.values(source.cpu(), start.cpu(), layout.nnz, layout))
    expected = reference.nonzero_pattern(source.cpu(), layout)
    for ours, theirs in zip(backend.nonzero_pattern(source, layout), expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs)


def test_kernels_equal_reference(geometry: ConvGeometry, device: torch.device) -> None:
    for layout in layouts(geometry):
        assert_kernels_equal_reference(layout, device)


@pytest.mark.parametrize("side", [5, 9, 13, 18, 25, 45, 75])
def test_kernels_equal_reference_for_rows_of_every_length(side: int, device: torch.device) -> None:
    """A GPU shares a row of few entries among few threads, a long one among several warps."""
    filters = 70 if side == 5 else 4
    geometry = ConvGeometry.create("test", 3, filters, (side, side + 1), 3, padding=1, dilation=(1, 2))
    assert_kernels_equal_reference(ConstraintLayout.of_gradient(geometry, 1), device)
    assert_kernels_equal_reference(ConstraintLayout.of_gradient(geometry, 3), device)
    assert_kernels_equal_reference(ConstraintLayout.of_weight(geometry), device)


@pytest.mark.slow
def test_kernels_equal_reference_on_200_random_geometries(device: torch.device) -> None:
    generator = random.Random(1)
    for _ in range(200):
        for layout in layouts(random_geometry(generator)):
            assert_kernels_equal_reference(layout, device)


def test_wide_indices_equal_narrow_ones(geometry: ConvGeometry, device: torch.device) -> None:
    for narrow in layouts(geometry):
        wide = ConstraintLayout.from_numbers(narrow.numbers)
        object.__setattr__(wide, "index_dtype", torch.int64)  # a matrix that needs it would not fit here
        backend, source = backend_for(device), torch.randn(narrow.n_source, device=device).relu()
        start, start_wide = backend.offsets(narrow, device), backend.offsets(wide, device)
        assert start_wide.dtype == torch.int64
        assert torch.equal(start, start_wide)
        columns = (backend.columns(s, narrow.nnz, narrow) for s in (start, start_wide))
        values = (backend.values(source, s, narrow.nnz, narrow) for s in (start, start_wide))
        assert torch.equal(*columns)
        assert torch.equal(*values)
        sums = (backend.sum_values(torch.ones(narrow.nnz, device=device), s, narrow) for s in (start, start_wide))
        assert torch.equal(*sums)
        for a, b in zip(backend.nonzero_pattern(source, narrow), backend.nonzero_pattern(source, wide), strict=True):
            assert b.dtype == torch.int64
            assert torch.equal(a, b)


@pytest.mark.cuda
def test_cuda_equals_cpu_bit_for_bit(geometry: ConvGeometry) -> None:
    for layout in layouts(geometry):
        values, source = torch.randn(layout.nnz), torch.randn(layout.n_source)
        on = {}
        for device in (CPU, torch.device("cuda")):
            backend = backend_for(device)
            start = backend.offsets(layout, device)
            on[device.type] = (
                start,
                backend.columns(start, layout.nnz, layout),
                backend.values(source.to(device), start, layout.nnz, layout),
                backend.sum_values(values.to(device), start, layout),
            )
        for a, b in zip(on["cpu"], on["cuda"], strict=True):
            assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("n_threads", [2, 3, 7])
def test_threads_do_not_change_a_bit(n_threads: int) -> None:
    # Large enough that the kernels do use several threads.
    geometry = ConvGeometry.create("test", 3, 10, (40, 40), 5, padding=2)
    grad_output, weight = random_grad_output(geometry, 1), random_weight(geometry)
    mask, before = random_mask(geometry), torch.get_num_threads()
    try:
        built = []
        for n in (1, n_threads):
            torch.set_num_threads(n)
            w = weight.clone().requires_grad_()
            full = weight_matrix(geometry, w)
            (gradient,) = torch.autograd.grad(full.values().sin().sum(), w)
            matrices = [
                gradient_matrix(geometry, grad_output),
                gradient_matrix(geometry, grad_output.relu(), drop_zeros=True),
                full.detach(),
                weight_matrix(geometry, weight, mask=mask),
            ]
            built.append(
                [
                    gradient,
                    *(part for m in matrices for part in (m.crow_indices(), m.col_indices(), m.values())),
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert built[0][3].numel() > 2**18
    for one, many in zip(*built, strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_a_matrix_of_many_memory_pages_is_that_of_its_filters_one_by_one(n_threads: int) -> None:
    geometry = ConvGeometry.create("test", 1, 24, (101, 113), 9, stride=1, padding=4)
    grad_output, before = random_grad_output(geometry, 1).relu(), torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        for drop_zeros in (False, True):
            whole = gradient_matrix(geometry, grad_output, drop_zeros=drop_zeros)
            assert whole.col_indices().numel() * 4 > 2**25, "large enough for huge pages"
            first = 0
            for f in range(geometry.out_channels):
                one = replace(geometry, out_channels=1)
                part = gradient_matrix(one, grad_output[:, f : f + 1], drop_zeros=drop_zeros)
                here = slice(first, first + part.values().numel())
                assert torch.equal(whole.values()[here], part.values())
                assert torch.equal(whole.col_indices()[here], part.col_indices())
                first = here.stop
            assert first == whole.values().numel()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n", [0, 1, 2**22 - 1, 2**22, 2**22 + 1])  # 2**22 float64 are where huge pages begin
def test_memory_for_large_arrays_is_that_of_an_ordinary_tensor(n: int) -> None:
    with torch.device("meta"):
        array = cpu.empty(n, torch.float64, CPU)
    assert (array.shape, array.dtype, array.device) == ((n,), torch.float64, CPU)
    assert array.untyped_storage().nbytes() == 8 * n
    copy = array.fill_(3.0).clone()
    file = io.BytesIO()
    torch.save(array, file)
    assert len(file.getvalue()) < 8 * n + 2**12
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), copy)


def test_outputs_share_no_memory_with_later_ones(geometry: ConvGeometry) -> None:
    grad_output = random_grad_output(geometry)
    first = gradient_matrix(geometry, grad_output)
    expected = first.to_dense()
    for part in (first.crow_indices(), first.col_indices(), first.values()):
        part.zero_()
    assert torch.equal(gradient_matrix(geometry, grad_output).to_dense(), expected)
