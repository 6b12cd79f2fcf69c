"""The values: the definition by brute force, the convolution identities, odd inputs, and the errors."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from layers import (
    convolve,
    gradient_matrix,
    random_grad_output,
    random_input,
    random_mask,
    random_weight,
    weight_matrix,
)
from rconv_fast.constraints import ops
from rconv_fast.constraints.arguments import gradient_numbers
from rconv_fast.errors import ArgumentError, ArgumentTypeError, SystemTooLargeError
from rconv_fast.geometry import ConvGeometry
from rconv_fast.testing import (
    adjoint_test,
    brute_force_gradient_constraints,
    brute_force_weight_constraints,
    random_geometry,
)


def assert_equal_to_brute_force(geometry: ConvGeometry, dtype: torch.dtype, device: torch.device) -> None:
    grad_output = random_grad_output(geometry, dtype=dtype)
    expected = brute_force_gradient_constraints(geometry, grad_output)
    assert torch.equal(gradient_matrix(geometry, grad_output.to(device)).to_dense().cpu(), expected)
    weight, mask = random_weight(geometry, dtype=dtype), random_mask(geometry)
    expected = brute_force_weight_constraints(geometry, weight)
    assert torch.equal(weight_matrix(geometry, weight.to(device)).to_dense().cpu(), expected)
    masked = weight_matrix(geometry, weight.to(device), mask=mask.to(device))
    assert torch.equal(masked.to_dense().cpu(), expected[mask.reshape(-1)])


def test_matrices_are_as_defined(geometry: ConvGeometry, dtype: torch.dtype, device: torch.device) -> None:
    assert_equal_to_brute_force(geometry, dtype, device)


@pytest.mark.parametrize(
    "n_cases", [10, pytest.param(200, marks=pytest.mark.slow)], ids=lambda n: f"{n} random geometries"
)
def test_matrices_are_as_defined_on(n_cases: int, device: torch.device) -> None:
    generator = random.Random(2)
    for _ in range(n_cases):
        assert_equal_to_brute_force(random_geometry(generator, 6), torch.float64, device)


def test_gradient_constraints_give_the_weight_gradient(geometry: ConvGeometry, device: torch.device) -> None:
    options = {"dtype": torch.float64, "device": device}
    x, weight = random_input(geometry, **options), random_weight(geometry, **options).requires_grad_()
    output = convolve(geometry, x, weight)
    grad_output = torch.randn_like(output)
    (grad_weight,) = torch.autograd.grad(output, weight, grad_output)
    # Columns of the right-hand side: channels. Rows of a filter: those of its group's channels.
    product = gradient_matrix(geometry, grad_output) @ x.transpose(0, 1).flatten(1).mT.contiguous()
    product = product.reshape(geometry.out_channels, geometry.n_taps, geometry.in_channels)
    n_filters = geometry.out_channels // geometry.groups
    n_channels = geometry.in_channels // geometry.groups
    for f in range(geometry.out_channels):
        first = f // n_filters * n_channels
        mine = product[f, :, first : first + n_channels].mT
        torch.testing.assert_close(mine, grad_weight[f].flatten(1), rtol=1e-12, atol=1e-12)


def test_weight_constraints_give_the_convolution(geometry: ConvGeometry, device: torch.device) -> None:
    options = {"dtype": torch.float64, "device": device}
    x, weight = random_input(geometry, 1, **options), random_weight(geometry, **options)
    output, mask = convolve(geometry, x, weight)[0], random_mask(geometry, device=device)
    column = x.reshape(-1, 1)
    product = weight_matrix(geometry, weight) @ column
    torch.testing.assert_close(product, output.reshape(-1, 1), rtol=1e-12, atol=1e-12)
    product = weight_matrix(geometry, weight, mask=mask) @ column
    torch.testing.assert_close(product, output[mask].reshape(-1, 1), rtol=1e-12, atol=1e-12)


def test_values_and_sum_values_are_transposes(geometry: ConvGeometry, device: torch.device) -> None:
    from rconv_fast.constraints.layout import ConstraintLayout

    for layout in (ConstraintLayout.of_gradient(geometry, 2), ConstraintLayout.of_weight(geometry)):
        crow, col = torch.ops.rconv_fast.pattern(layout.numbers, device)
        x = torch.randn(layout.n_source, dtype=torch.float64, device=device)
        y = torch.randn(layout.nnz, dtype=torch.float64, device=device)
        adjoint_test(
            lambda x, crow=crow, col=col, layout=layout: torch.ops.rconv_fast.values(x, crow, len(col), layout.numbers),
            lambda y, crow=crow, layout=layout: torch.ops.rconv_fast.sum_values(y, crow, layout.numbers),
            x,
            y,
        )


def test_drop_zeros_leaves_out_zeros_and_nothing_else(geometry: ConvGeometry, device: torch.device) -> None:
    grad_output = random_grad_output(geometry, device=device).relu()
    sparse = gradient_matrix(geometry, grad_output, drop_zeros=True)
    assert (sparse.values() != 0).all()
    assert torch.equal(sparse.to_dense(), gradient_matrix(geometry, grad_output).to_dense())


def test_drop_zeros_of_nothing_but_zeros(device: torch.device) -> None:
    matrix = ops.gradient_constraints(torch.zeros(1, 2, 4, device=device), 4, 1, drop_zeros=True)
    assert matrix.shape == (2, 4)
    assert matrix._nnz() == 0


@pytest.mark.parametrize("drop_zeros", [False, True])
def test_nan_and_inf_stay_visible(drop_zeros: bool, device: torch.device) -> None:
    grad_output = torch.tensor([[[0.0, float("nan"), float("inf")]]], device=device)
    values = ops.gradient_constraints(grad_output, 3, 1, drop_zeros=drop_zeros).values()
    assert values.isnan().sum() == 1
    assert values.isinf().sum() == 1


def test_empty_batch(geometry: ConvGeometry, device: torch.device) -> None:
    for drop_zeros in (False, True):
        matrix = gradient_matrix(geometry, random_grad_output(geometry, 0, device=device), drop_zeros=drop_zeros)
        assert matrix.shape == (geometry.out_channels * geometry.n_taps, 0)
        assert matrix._nnz() == 0


@pytest.mark.parametrize("kept", [False, True], ids=["no row", "every row"])
def test_mask_keeps(kept: bool, geometry: ConvGeometry, device: torch.device) -> None:
    weight = random_weight(geometry, device=device)
    mask = torch.full((geometry.out_channels, *geometry.out_size), kept, device=device)
    full, matrix = weight_matrix(geometry, weight), weight_matrix(geometry, weight, mask=mask)
    assert matrix.shape == (mask.sum(), full.shape[1])
    assert torch.equal(matrix.to_dense(), full.to_dense() if kept else full.to_dense()[:0])


def strided_alike(tensor: Tensor) -> Tensor:
    """The same numbers in memory that is neither contiguous nor at the start of its storage."""
    padded = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 3)
    view = padded[..., 3::2]
    view.copy_(tensor)
    return view


def test_views_are_read_as_tensors(geometry: ConvGeometry, device: torch.device) -> None:
    grad_output, weight = random_grad_output(geometry, device=device), random_weight(geometry, device=device)
    mask = random_mask(geometry, device=device)
    for build, tensor in ((gradient_matrix, grad_output), (weight_matrix, weight)):
        expected, got = build(geometry, tensor), build(geometry, strided_alike(tensor))
        assert torch.equal(got.to_dense(), expected.to_dense())
    got = gradient_matrix(geometry, strided_alike(grad_output.relu()), drop_zeros=True)
    assert torch.equal(got.to_dense(), gradient_matrix(geometry, grad_output.relu()).to_dense())
    got = weight_matrix(geometry, weight, mask=strided_alike(mask))
    assert torch.equal(got.to_dense(), weight_matrix(geometry, weight, mask=mask).to_dense())


G = torch.ones(1, 2, 4, 4)
W = torch.ones(2, 1, 3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.gradient_constraints(G, (5, 5), 3, padding=1),
            r"^gradient_constraints: grad_output must have shape \(B, F, 5, 5\) for this geometry, "
            r"got \(1, 2, 4, 4\)$",
        ),
        (
            lambda: ops.gradient_constraints(torch.ones(2, 3), 4, 3),
            r"^gradient_constraints: grad_output must have shape \(B, F, \*out\) .* got \(2, 3\)$",
        ),
        (
            lambda: ops.gradient_constraints(torch.ones(1, 0, 4), 4, 1),
            r"^gradient_constraints: grad_output must have at least one filter, got \(1, 0, 4\)$",
        ),
        (
            lambda: ops.gradient_constraints(G, (4, 4), 3, padding=1, groups=3),
            r"^gradient_constraints: groups must divide out_channels \(2\), got 3$",
        ),
        (
            lambda: ops.gradient_constraints(G, (4, 4), 3, padding=(1, 1, 1)),
            r"^gradient_constraints: padding must have 2 entries or be an int, got \(1, 1, 1\)$",
        ),
        (
            lambda: ops.weight_constraints(W, (2, 2)),
            r"^weight_constraints: kernel_size must fit into the padded input .*, got \(3, 3\)$",
        ),
        (
            lambda: ops.weight_constraints(W, (4, 4), padding=1, mask=torch.ones(2, 4, 3, dtype=torch.bool)),
            r"^weight_constraints: mask must have shape \(2, 4, 4\), got \(2, 4, 3\)$",
        ),
    ],
)
def test_wrong_shapes_say_so_in_one_line(call, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.gradient_constraints(G.half(), (4, 4), 3, padding=1),
            r"^gradient_constraints: grad_output must be float32 or float64, got torch.float16$",
        ),
        (
            lambda: ops.weight_constraints(W.long(), (4, 4)),
            r"^weight_constraints: weight must be float32 or float64, got torch.int64$",
        ),
        (
            lambda: ops.weight_constraints(W.numpy(), (4, 4)),
            r"^weight_constraints: weight must be a torch tensor, got ndarray$",
        ),
        (
            lambda: ops.weight_constraints(W, (4, 4), mask=torch.ones(2, 2, 2)),
            r"^weight_constraints: mask must be a bool tensor, got torch.float32$",
        ),
    ],
)
def test_wrong_types_say_so_in_one_line(call, message: str) -> None:
    with pytest.raises(ArgumentTypeError, match=message):
        call()


def test_a_matrix_larger_than_memory_is_refused_before_work() -> None:
    # 10^6 x 10^6 outputs and inputs in 1-D with a kernel of 10^6: 10^12 entries from a vector of 2 million.
    grad_output = torch.ones(1, 1, 1).expand(1, 1, 1_000_000)
    with pytest.raises(
        SystemTooLargeError, match=r"^gradient_constraints: the matrix must fit in \d+ MiB of free memory"
    ):
        ops.gradient_constraints(grad_output, 1_999_999, 1_000_000)


def test_an_operator_called_by_hand_checks_sizes() -> None:
    layout = gradient_numbers(G, (4, 4), 3, 1, 1, 1, 1)
    crow, col = torch.ops.rconv_fast.pattern(layout, torch.device("cpu"))
    with pytest.raises(ArgumentError, match=r"^rconv_fast.values: source must have 32 elements"):
        torch.ops.rconv_fast.values(G[:, :1], crow, len(col), layout)
    with pytest.raises(ArgumentError, match=r"^rconv_fast.values: start must have 19 elements of torch.int32"):
        torch.ops.rconv_fast.values(G, crow[:-1], len(col), layout)
