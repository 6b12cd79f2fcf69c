"""Samples separated from a layer's gradients: the value, what one sample gives at once, and the gradients' noise."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rconv_fast.errors import require, require_type
from rconv_fast.losses import REDUCTIONS

# Values looked at before a whole tensor.
_PROBE = 256


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
    grad_preactivation : Tensor, shape (m, n_1), or None
        Gradient at the pre-activation of the first layer, where a stack of layers was separated.
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
    grad_preactivation: Tensor | None = None

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


def check_head_gradients(
    function: str, grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor | None = None
) -> None:
    """Refuse head gradients of a wrong type or shape, with NaN or Inf, or that are zero."""
    named = [("grad_weight", grad_weight), ("grad_bias", grad_bias), ("weight", weight)]
    for name, value in named:
        if value is None:
            continue
        require_type(isinstance(value, Tensor), function, name, "be a torch.Tensor", type(value).__name__)
        require_type(value.is_floating_point(), function, name, "be of a real floating type", value.dtype)
        require(bool(torch.isfinite(value).all()), function, name, "be finite", "NaN or Inf")
    shape = tuple(grad_weight.shape)
    require(len(shape) == 2 and 0 not in shape, function, "grad_weight", "have shape (n, d), n, d > 0", shape)
    if grad_bias is not None:
        got = tuple(grad_bias.shape)
        require(got == shape[:1], function, "grad_bias", f"have shape {shape[:1]}", got)
    if weight is not None:
        got = tuple(weight.shape)
        require(got == shape, function, "weight", f"have grad_weight's shape {shape}", got)
    require(bool(grad_weight.any()), function, "grad_weight", "not be zero", "a zero gradient")


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
    check_head_gradients(function, grad_weight, grad_bias)
    require(bool(grad_bias.any()), function, "grad_bias", "not be zero", "a zero gradient")
    exact = grad_bias.double() / grad_bias.abs().max()  # normalised first: no underflow in |db|^2
    return (grad_weight.double().mT @ exact / (exact @ exact) / grad_bias.abs().max()).to(grad_weight.dtype)


def rounding_of(*tensors: Tensor | None) -> float:
    """Unit roundoff of the coarsest format that holds every value: float64 gradients may be rounded float32."""
    given = [t.detach().reshape(-1) for t in tensors if t is not None]
    for coarse in (torch.bfloat16, torch.float16, torch.float32):
        # a few values decide almost always
        if all(_holds(coarse, t[:_PROBE]) for t in given) and all(_holds(coarse, t) for t in given):
            return float(torch.finfo(coarse).eps)
    return float(torch.finfo(torch.float64).eps)


def _holds(coarse: torch.dtype, values: Tensor) -> bool:
    return values.dtype == coarse or bool((values.to(coarse).to(values.dtype) == values).all())


def numerical_rank(singular_values: Tensor, shape: tuple[int, int], rounding: float) -> int:
    """Count the singular values above the noise: the widest gap near the level that rounding explains."""
    values = (singular_values / singular_values[0]).tolist()
    floor = rounding * max(shape) ** 0.5
    low, high = floor / 100, min(floor * 300, 0.1)
    tiny = rounding * 1e-3
    candidates = [k for k in range(1, len(values)) if values[k] <= high and values[k - 1] >= low]
    if not candidates:
        return sum(v > floor for v in values)
    return max(candidates, key=lambda k: values[k - 1] / max(values[k], tiny))


def check_head(
    function: str,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    reduction: str,
) -> None:
    """Refuse a head whose tensors do not belong together, and an unknown reduction."""
    check_head_gradients(function, grad_weight, grad_bias, weight)
    wanted = (grad_weight.shape[0],)
    if bias is not None:
        require(tuple(bias.shape) == wanted, function, "bias", f"have shape {wanted}", tuple(bias.shape))
    require(grad_bias is None or bias is not None, function, "bias", "be given with grad_bias", None)
    require(reduction in REDUCTIONS, function, "reduction", f"be one of {', '.join(REDUCTIONS)}", repr(reduction))
