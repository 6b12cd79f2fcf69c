"""The input of one convolution, from its gradients and from what is known of its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.errors import require, require_type
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve import (
    SOLVERS,
    Evidence,
    GradientRows,
    HasEvidence,
    Rows,
    System,
    WeightRows,
    solve,
    widened,
    within_windows,
)
from rconv_fast.solve.linear_operator import as_linear_operator


@dataclass(frozen=True)
class ConvRecovery(HasEvidence):
    r"""The recovered input of one convolution.

    Attributes
    ----------
    input : Tensor
        (B, C, \*in), in the dtype and on the device of `grad_output`; minimum norm where not determined.
    determined : Tensor
        Bool (B, C, \*in): is this value proven to be fixed by the constraints.
    evidence : Evidence
        `rank`, `unknowns`, `rows`, `residual`, `condition`, `solver`, `proof`, `converged` and `iterations`, each
        also an attribute of the recovery itself.
    """

    input: Tensor
    determined: Tensor
    evidence: Evidence


def recover_conv_input(
    grad_weight: Tensor,
    grad_output: Tensor,
    input_size: Sequence[int] | int,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    output: Tensor | None = None,
    known: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    solver: str = "auto",
    rtol: float | None = None,
    dtype: torch.dtype = torch.float64,
    time_limit: float | None = None,
) -> ConvRecovery:
    r"""Solve a convolution's gradient constraints, and weight constraints of known outputs, for its input.

    The gradient constraints alone fall apart into stride phases, each solved directly with all channels as
    right-hand sides; they suffice where ``F * n_k >= B * n_pixels`` in every phase. With `weight` and
    `output` the weight constraints join in.

    Parameters
    ----------
    grad_weight : Tensor, shape (F, C/groups, \\*K)
        Gradient of the weight, summed over the batch.
    grad_output : Tensor, shape (B, F, \\*out)
        Gradient of the pre-activations.
    input_size : sequence of int
        Spatial size of the input.
    weight : Tensor, shape (F, C/groups, \\*K), optional
    bias : Tensor, shape (F,), optional
    output : Tensor, shape (B, F, \\*out), optional
        Pre-activations, bias included.
    known : Tensor, bool, shape (B, F, \\*out), optional
        Which pre-activations are known; all if left out.
    stride, padding, dilation, groups
        As in ``torch.nn.functional.conv2d``.
    solver : {"auto", "direct", "hybrid"}
        "direct" uses the gradient rows alone, "hybrid" all rows; "auto" decides by the counts.
    rtol : float, optional
        Relative residual at which an iteration stops, and relative singular value below which a direction
        counts as undetermined. By default the rounding of `dtype`.
    dtype : torch.dtype
        Working precision of the solve.
    time_limit : float, optional
        Seconds after which iterations end with what they have, of which nothing counts as determined.

    Returns
    -------
    ConvRecovery

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes do not fit, a value is not finite, or the gradient is zero everywhere.

    References
    ----------
    R-CONV (Eltaras et al., WISE 2024), section 3.3 (gradient constraints) and section 4 (both systems).

    Examples
    --------
    >>> x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    >>> w = torch.randn(16, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    >>> o = torch.nn.functional.conv2d(x, w, padding=1)
    >>> g = torch.randn_like(o)
    >>> (dw,) = torch.autograd.grad(o, w, g)
    >>> found = recover_conv_input(dw, g, (8, 8), padding=1)
    >>> found.solver, bool((found.input - x).abs().max() < 1e-10)
    ('phase-cholesky', True)
    """
    function = "recover_conv_input"
    require(solver in SOLVERS, function, "solver", f"be one of {', '.join(SOLVERS)}", repr(solver))
    outputs = _Outputs(weight, bias, output, known)
    system = _checked_system(
        function, grad_weight, grad_output, input_size, outputs, (stride, padding, dilation), groups, dtype
    )
    tolerance = 4 * torch.finfo(dtype).eps if rtol is None else rtol
    reached = within_windows(system)
    found = solve(reached, solver=solver, rtol=tolerance, budget=Budget.seconds(time_limit))
    found = widened(found, system)
    return ConvRecovery(found.x.to(grad_output.dtype), found.determined, found.evidence)


def constraint_operator(
    grad_weight: Tensor,
    grad_output: Tensor,
    input_size: Sequence[int] | int,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    output: Tensor | None = None,
    known: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, Tensor]:
    r"""The equations of `recover_conv_input` as a linear operator, for the solvers of scipy and cupy.

    Products are convolutions; the matrix is never built. Gradient rows are scaled to ``||g_f|| = 1`` filter by
    filter; rows of unknown outputs are zero.

    Parameters
    ----------
    grad_weight, grad_output, input_size, weight, bias, output, known, stride, padding, dilation, groups, dtype
        As in `recover_conv_input`.

    Returns
    -------
    operator : scipy.sparse.linalg.LinearOperator or cupyx.scipy.sparse.linalg.LinearOperator
        M, of shape (rows, B * C * prod(in)): cupy's for tensors on CUDA, there on torch's current stream.
    rhs : Tensor, shape (rows,)
        Right-hand side; ``rhs.numpy()`` or ``cupy.from_dlpack(rhs)`` shares its memory.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        As in `recover_conv_input`.
    MissingDependencyError
        For tensors on CUDA without cupy.

    References
    ----------
    R-CONV (Eltaras et al., WISE 2024), sections 3.3 and 4.

    Examples
    --------
    >>> from scipy.sparse.linalg import lsmr
    >>> x = torch.rand(1, 2, 6, 6, dtype=torch.float64)
    >>> g = torch.randn(1, 16, 6, 6, dtype=torch.float64)
    >>> dw = torch.nn.grad.conv2d_weight(x, (16, 2, 3, 3), g, padding=1)
    >>> operator, rhs = constraint_operator(dw, g, (6, 6), padding=1)
    >>> found = lsmr(operator, rhs.numpy(), atol=1e-12, btol=1e-12)[0]
    >>> bool(abs(found - x.numpy().ravel()).max() < 1e-6)
    True
    """
    outputs = _Outputs(weight, bias, output, known)
    system = _checked_system(
        "constraint_operator",
        grad_weight,
        grad_output,
        input_size,
        outputs,
        (stride, padding, dilation),
        groups,
        dtype,
    )
    return as_linear_operator(system), torch.cat([part.reshape(-1) for part in system.rhs])


@dataclass(frozen=True)
class _Outputs:
    """What is known of a layer's pre-activations, as the caller gave it."""

    weight: Tensor | None
    bias: Tensor | None
    output: Tensor | None
    known: Tensor | None


def _checked_system(
    function: str,
    grad_weight: Tensor,
    grad_output: Tensor,
    input_size: Sequence[int] | int,
    outputs: _Outputs,
    sizes: tuple[int | Sequence[int], int | Sequence[int], int | Sequence[int]],
    groups: int,
    dtype: torch.dtype,
) -> System:
    """The equations, once the arguments are found to agree; `sizes` are stride, padding, dilation."""
    for name, value in {"grad_weight": grad_weight, "grad_output": grad_output, **vars(outputs)}.items():
        if value is None or name == "known":
            continue
        require_type(isinstance(value, Tensor), function, name, "be a torch.Tensor", type(value).__name__)
        require_type(value.is_floating_point(), function, name, "be of a real floating type", value.dtype)
        require(bool(torch.isfinite(value).all()), function, name, "be finite", "NaN or Inf")
    geometry = _geometry(function, grad_weight, grad_output, input_size, sizes, groups)
    require(bool(grad_output.any()), function, "grad_output", "not be zero", "a zero gradient")
    rows: list[Rows] = [GradientRows.create(geometry, grad_weight.detach().to(dtype), grad_output.detach().to(dtype))]
    if outputs.output is not None or outputs.known is not None:
        rows.append(_weight_rows(function, geometry, tuple(grad_output.shape), outputs, dtype))
    return System(torch.Size((len(grad_output), geometry.in_channels, *geometry.input_size)), tuple(rows))


def _geometry(
    function: str,
    grad_weight: Tensor,
    grad_output: Tensor,
    input_size: Sequence[int] | int,
    sizes: tuple[int | Sequence[int], int | Sequence[int], int | Sequence[int]],
    groups: int,
) -> ConvGeometry:
    """The geometry that the arguments describe, and a check that they agree with it."""
    require(
        3 <= grad_weight.ndim <= 5,
        function,
        "grad_weight",
        "have shape (F, C/groups, *K) with 1 to 3 axes in K",
        tuple(grad_weight.shape),
    )
    filters, channels = grad_weight.shape[:2]
    geometry = ConvGeometry.create(
        function,
        channels * groups,
        filters,
        input_size,
        grad_weight.shape[2:],
        *sizes,
        groups,
    )
    wanted = (filters, *geometry.out_size)
    got = tuple(grad_output.shape)
    described = f"have shape (B, {', '.join(map(str, wanted))}) with B >= 1"
    require(got[1:] == wanted and got[0] >= 1, function, "grad_output", described, got)
    return geometry


def _weight_rows(
    function: str, geometry: ConvGeometry, wanted: tuple[int, ...], outputs: _Outputs, dtype: torch.dtype
) -> WeightRows:
    """The weight constraints of the known outputs, which have the shape `wanted`."""
    weight, bias, output, known = outputs.weight, outputs.bias, outputs.output, outputs.known
    shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel_size)
    require(weight is not None, function, "weight", "be given with output", None)
    require(output is not None, function, "output", "be given with known", None)
    assert weight is not None
    assert output is not None
    require(tuple(weight.shape) == shape, function, "weight", f"have shape {shape}", tuple(weight.shape))
    require(
        tuple(output.shape) == wanted,
        function,
        "output",
        f"have grad_output's shape {wanted}",
        tuple(output.shape),
    )
    values = output.detach().to(dtype)
    if bias is not None:
        require(tuple(bias.shape) == shape[:1], function, "bias", f"have shape {shape[:1]}", tuple(bias.shape))
        values = values - bias.detach().to(dtype).reshape(1, -1, *(1,) * geometry.ndim)
    if known is None:
        mask = torch.ones_like(values)
    else:
        require(tuple(known.shape) == wanted, function, "known", f"have shape {wanted}", tuple(known.shape))
        require_type(known.dtype == torch.bool, function, "known", "be a bool tensor", known.dtype)
        mask = known.to(values)
    return WeightRows.create(geometry, weight.detach().to(dtype), values, mask)


__all__ = ["ConvRecovery", "constraint_operator", "recover_conv_input"]
