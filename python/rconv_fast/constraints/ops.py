r"""The constraint matrices of a convolution, as torch operators.

Output position ``u`` and kernel offset ``k`` meet input position ``i = u*s + k*d - p``. Hence

* gradient constraints ``dW[f,c,k] = sum_{b,u} g[b,f,u] x[b,c,i]``: rows (f, k), columns (b, i);
* weight constraints ``o[f,u] = sum_{c,k} W[f,c,k] x[c,i]``: rows (f, u), columns (c, i).

The operators that fill them are in ``library.py``. Whoever builds many matrices of one layer asks for its pattern once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rconv_fast.constraints.arguments import IntOrSize, gradient_numbers, require_room, weight_numbers
from rconv_fast.constraints.layout import Numbers, layout_of
from rconv_fast.constraints.library import OPERATORS, Components

__all__ = ["gradient_components", "gradient_constraints", "weight_components", "weight_constraints"]


def gradient_constraints(
    grad_output: Tensor,
    input_size: IntOrSize,
    kernel_size: IntOrSize,
    *,
    stride: IntOrSize = 1,
    padding: IntOrSize = 0,
    dilation: IntOrSize = 1,
    groups: int = 1,
    drop_zeros: bool = False,
) -> Tensor:
    r"""Build the sparse matrix that maps one input channel to its weight gradient.

    ``A[(f,k), (b,i)] = g[b,f,u]`` where ``i = u*s + k*d - p``.

    Equivalent, with ``groups=1``, for every channel c:
    ``A @ x[:, c].reshape(-1) == grad_weight[:, c].reshape(-1)``.

    Parameters
    ----------
    grad_output : Tensor, shape (B, F, \*out)
        Gradient of the loss in the convolution's output, float32 or float64.
    input_size : int or sequence of int
        Spatial size of the input, 1 to 3 axes.
    kernel_size, stride, padding, dilation : int or sequence of int
        As in ``torch.nn.functional.conv2d``.
    groups : int
        As there. The rows of all filters stand in the one matrix: take those of a channel's group.
    drop_zeros : bool
        Leave out the entries where ``grad_output`` is 0 (behind a ReLU, about half).

    Returns
    -------
    Tensor, sparse CSR, shape (F * prod(kernel_size), B * prod(input_size))
        Columns sorted and unique in each row; int32 indices while they fit, else int64. Differentiable in
        ``grad_output``. NaN and Inf become entries like any other number.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument has the wrong shape, value or dtype.
    SystemTooLargeError
        If the matrix is larger than the device's memory.

    Notes
    -----
    One pass over the memory written, no sort. No host synchronisation, but for one with ``drop_zeros``, whose
    backward is torch's ``index_add`` and so not bitwise repeatable on a GPU. Under
    ``torch.compile(fullgraph=True)`` use ``gradient_components``.

    Examples
    --------
    >>> g = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> gradient_constraints(g, 4, 2).to_dense()
    tensor([[1., 2., 3., 0.],
            [0., 1., 2., 3.]])
    """
    numbers = gradient_numbers(grad_output, input_size, kernel_size, stride, padding, dilation, groups)
    if not drop_zeros:
        require_room("gradient_constraints", grad_output, numbers)
    return _to_csr(_gradient_components(grad_output, numbers, drop_zeros), numbers)


def gradient_components(
    grad_output: Tensor,
    input_size: IntOrSize,
    kernel_size: IntOrSize,
    *,
    stride: IntOrSize = 1,
    padding: IntOrSize = 0,
    dilation: IntOrSize = 1,
    groups: int = 1,
    drop_zeros: bool = False,
) -> Components:
    """Return ``(values, crow, col)`` of ``gradient_constraints``; works inside ``torch.compile``."""
    numbers = gradient_numbers(grad_output, input_size, kernel_size, stride, padding, dilation, groups)
    return _gradient_components(grad_output, numbers, drop_zeros)


def weight_constraints(
    weight: Tensor,
    input_size: IntOrSize,
    *,
    stride: IntOrSize = 1,
    padding: IntOrSize = 0,
    dilation: IntOrSize = 1,
    groups: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Build the sparse matrix of a convolution: ``A @ x.reshape(-1) == conv(x, weight).reshape(-1)[mask]``.

    ``A[(f,u), (c,i)] = W[f,c,k]`` where ``i = u*s + k*d - p``, for one sample x (C, \*in).

    Parameters
    ----------
    weight : Tensor, shape (F, C // groups, \*K)
        The convolution's weight, float32 or float64.
    input_size, stride, padding, dilation, groups
        As in ``gradient_constraints``.
    mask : Tensor of bool, shape (F, \*out), optional
        Keep only the rows of the outputs marked True.

    Returns
    -------
    Tensor, sparse CSR, shape (n_rows, C * prod(input_size))
        ``n_rows`` is the number of outputs kept. Differentiable in ``weight``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument has the wrong shape, value or dtype.
    SystemTooLargeError
        If the matrix is larger than the device's memory.

    Notes
    -----
    No host synchronisation, but for one with ``mask``.

    Examples
    --------
    >>> weight_constraints(torch.tensor([[[1.0, 2.0]]]), 4).to_dense()
    tensor([[1., 2., 0., 0.],
            [0., 1., 2., 0.],
            [0., 0., 1., 2.]])
    """
    numbers = weight_numbers(weight, input_size, stride, padding, dilation, groups, mask)
    if mask is None:
        require_room("weight_constraints", weight, numbers)
    return _to_csr(_weight_components(weight, numbers, mask), numbers)


def weight_components(
    weight: Tensor,
    input_size: IntOrSize,
    *,
    stride: IntOrSize = 1,
    padding: IntOrSize = 0,
    dilation: IntOrSize = 1,
    groups: int = 1,
    mask: Tensor | None = None,
) -> Components:
    """Return ``(values, crow, col)`` of ``weight_constraints``; works inside ``torch.compile``."""
    numbers = weight_numbers(weight, input_size, stride, padding, dilation, groups, mask)
    return _weight_components(weight, numbers, mask)


def _gradient_components(grad_output: Tensor, numbers: Numbers, drop_zeros: bool) -> Components:
    if drop_zeros:
        crow, col, origin = OPERATORS.nonzero_pattern(grad_output, numbers)
        return grad_output.reshape(-1).index_select(0, origin), crow, col
    crow, col = OPERATORS.pattern(numbers, grad_output.device)
    return OPERATORS.values(grad_output, crow, col.shape[0], numbers), crow, col


def _weight_components(weight: Tensor, numbers: Numbers, mask: Tensor | None) -> Components:
    if mask is None:
        start, col = OPERATORS.pattern(numbers, weight.device)
        crow = start
    else:
        start, crow, col = OPERATORS.masked_pattern(mask, numbers)
    return OPERATORS.values(weight, start, col.shape[0], numbers), crow, col


def _to_csr(components: Components, numbers: Numbers) -> Tensor:
    values, crow, col = components
    shape = (crow.shape[0] - 1, layout_of(numbers).n_cols)
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)
