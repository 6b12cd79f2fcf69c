"""Samples separated from a layer's gradients: the value, and the closed form of one sample's input."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rconv_fast.errors import require
from rconv_fast.heads.head import check_gradients

# Why a reading that uses all equations is no proof: any batch has one.
NOTHING_LEFT = "no equation of the head is left over to prove this reading"


@dataclass(frozen=True)
class HeadSeparation:
    """The samples of a batch, separated from the gradient of a head.

    Attributes
    ----------
    inputs : Tensor, shape (m, d)
        Input features of the head, one row for each separated sample, in arbitrary order. ``m`` is
        ``batch_size`` when the separation is complete and nothing occurs twice, less otherwise.
    labels : Tensor, shape (m,), int64
        The label that each sample's certificate proves; targets (m, n) where the loss takes values.
    grad_logits : Tensor, shape (m, n)
        ``delta_b = dL/dlogits`` of each sample, including the factor ``1/B`` of a mean, and the
        multiplicity of a sample that occurs several times.
    residuals : Tensor, shape (m,)
        Certificate: relative violation of the sample's own equations. At the level of the gradients'
        rounding it proves the sample.
    batch_size : int
        Number of samples in the batch, repeated ones counted.
    multiplicities : Tensor, shape (m,), int64
        How often the sample occurs in the batch: identical samples of one label cannot be told apart.
    complete : bool
        Whether the samples explain the head's whole gradient: ``sum_b q_b p_b^T = I`` and
        ``head_residual`` is at the level of the rounding.
    head_residual : float
        ``|dW - sum_b delta_b x_b^T| / |dW|`` and the same for db, the larger.
    rank : int
        Numerical rank of the head's gradient, the number of distinct samples that it can hold.
    reason : str
        Why the separation is not complete; empty when it is.
    spare : int
        Equations of the head that were left over: beyond the unknowns of a gradient of this rank. None left over means
        that almost any gradient of this rank has such a reading.
    scale : float
        Factor by which the gradients are multiplied, given or found.
    errors : Tensor, shape (m,), or None
        Predicted relative error of each sample's features under the noise, where it was computed.
    grad_preactivation : Tensor, shape (m, n_1), or None
        Gradient at the pre-activation of the first layer, where a stack of layers was separated.
    seen : bool
        Whether `grad_logits` is what the client computed, to the last bit, and not what its softmax should be.
    """

    inputs: Tensor
    labels: Tensor
    grad_logits: Tensor
    residuals: Tensor
    batch_size: int
    multiplicities: Tensor
    complete: bool
    head_residual: float
    rank: int
    reason: str = ""
    spare: int = 0
    scale: float = 1.0
    errors: Tensor | None = None
    grad_preactivation: Tensor | None = None
    seen: bool = False

    def to(self, dtype: torch.dtype) -> HeadSeparation:
        """The same with values of another dtype."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                values[name] = value.to(dtype)
        return HeadSeparation(**values)

    @property
    def duplicates(self) -> Tensor:
        """Indices of the samples that occur more than once."""
        return (self.multiplicities > 1).nonzero()[:, 0]


def recover_linear_input(grad_weight: Tensor, grad_bias: Tensor) -> Tensor:
    """Recover the input of a fully connected layer from one sample's gradients.

    One sample's gradients are ``dW = db x^T``, so every row j with ``db_j != 0`` gives ``x = dW_j / db_j``.
    All rows together, least squares: ``x = dW^T db / |db|^2``.

    Parameters
    ----------
    grad_weight : Tensor, shape (n, d)
        Gradient of the weight.
    grad_bias : Tensor, shape (n,)
        Gradient of the bias.

    Returns
    -------
    Tensor, shape (d,)
        The input, in the dtype and on the device of `grad_weight`.

    Raises
    ------
    ArgumentError
        If a shape is wrong, a value is not finite, or the bias gradient is zero.
    ArgumentTypeError
        If an argument is not a real floating tensor.

    Notes
    -----
    For a batch the result is the mixture ``sum_b (delta_b . db) x_b / |db|^2``, not a sample.

    References
    ----------
    R-CONV (Eltaras et al., WISE 2024), section 3; the one-row form is Phong et al., IEEE TIFS 13(5), 2018.

    Examples
    --------
    >>> recover_linear_input(torch.tensor([[2.0, 4.0], [-1.0, -2.0]]), torch.tensor([2.0, -1.0]))
    tensor([1., 2.])
    """
    function = "recover_linear_input"
    check_gradients(function, grad_weight, grad_bias)
    require(bool(grad_bias.any()), function, "grad_bias", "not be zero", "a zero gradient")
    exact = grad_bias.double() / grad_bias.abs().max()  # normalised first: no underflow in |db|^2
    return (grad_weight.double().mT @ exact / (exact @ exact) / grad_bias.abs().max()).to(grad_weight.dtype)
