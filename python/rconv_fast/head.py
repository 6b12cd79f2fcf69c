"""Split the gradient of a classification head into the samples of the batch, each with a certificate.

Notation of :mod:`rconv_fast.head_roots`: n classes, d features, B samples,
``dW = sum_b delta_b x_b^T``, ``db = sum_b delta_b``, ``delta_b = w (softmax(W x_b + c) - e_{y_b})``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.errors import require, require_type
from rconv_fast.head_roots import targets_of
from rconv_fast.head_search import CERTIFICATE_LIMIT, SAFETY, WHOLE, Found, HeadProblem, factorise, search, truncate

# ``q_a^T p_b`` of a complete separation is 0 or 1 this closely, or as closely as the noise allows.
_PAIRING = 1e-8
# Values looked at before a whole tensor.
_PROBE = 256
# Heads with at most so many classes, or on machines with at most so many threads, are separated on one CPU thread.
_ONE_THREAD_CLASSES = 256
_ONE_THREAD_OF = 2


@dataclass(frozen=True)
class HeadSeparation:
    """The samples of a batch, separated from the gradient of a head.

    Attributes
    ----------
    inputs : Tensor, shape (m, d)
        Input features of the head, one row for each separated sample, in arbitrary order. ``m`` is
        ``batch_size`` when the separation is complete and nothing occurs twice, less otherwise.
    labels : Tensor, shape (m,), int64
        The label that each sample's certificate proves (-1 where the loss has none).
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


def separate_softmax_batch(
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    batch_size: int | None = None,
    labels: Sequence[int] | Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    seed: int = 0,
) -> HeadSeparation:
    """Split the gradient of a softmax head into the samples of its batch.

    Solves ``delta_b = w (softmax(W x_b + c) - e_{y_b})``, ``dW = sum_b delta_b x_b^T``,
    ``db = sum_b delta_b`` for all ``x_b``, ``y_b`` and B. Three stages, each only where the one before
    cannot finish: the closed form for one sample; one sample's equations at a time (all classes and starts in one
    batched Levenberg-Marquardt; found samples are subtracted, which makes the rest easier); all samples
    jointly, over the likeliest label counts.

    Parameters
    ----------
    grad_weight : Tensor, shape (n, d)
        Gradient of the cross-entropy with respect to the head's weight.
    grad_bias : Tensor, shape (n,), or None
        Gradient with respect to the bias; None for a head without one.
    weight : Tensor, shape (n, d)
        The head's weight.
    bias : Tensor, shape (n,), or None
        The head's bias. With `grad_bias` None it is a constant offset (a frozen bias).
    batch_size : int, optional
        Number of samples; by default the rank of the gradient, corrected for repeated samples where that
        is possible.
    labels : sequence of int, optional
        The labels of the batch, in any order. By default they are found.
    label_smoothing : float
        As in ``torch.nn.functional.cross_entropy``.
    reduction : {"mean", "sum"}
        Of the loss over the batch.
    seed : int
        Seed of the starting points. The result does not depend on it, except for what is found at all.

    Returns
    -------
    HeadSeparation
        Only certified samples; look at ``complete`` and ``reason``. In the dtype of `grad_weight`.

    Raises
    ------
    ArgumentError
        If a shape, value or option is wrong, or the gradient is zero.
    ArgumentTypeError
        If a tensor is not of a real floating type.

    Notes
    -----
    Arithmetic is float64. The noise of the gradients is read off their values (float64, or float32 numbers)
    and their singular values; residuals are judged against it.
    One sample has ``n - 2B + 1`` more equations than unknowns (one less without a bias): for fewer than 2
    only the batch as a whole is a proof, and samples are returned only if all of them are found. That
    leaves ``B <= n - 1`` with a bias and ``B <= n - 2`` without.
    Two identical samples with the same label act as one of twice the weight: they come back as one row with
    multiplicity 2. Identical inputs with different labels are not separated.

    References
    ----------
    The label counts' start: iLRG (Ma et al., arXiv 2208.11319), from ``db``.
    """
    function = "separate_softmax_batch"
    head, given = _checked_head(
        function, grad_weight, grad_bias, weight, bias, batch_size, labels, label_smoothing, reduction, seed
    )
    result = _single_sample(head, batch_size, given)
    if result is None:
        with _few_threads(grad_weight):
            result = _separate(head, batch_size, given)
    return _cast(result, grad_weight.dtype)


@contextmanager
def _few_threads(grad_weight: Tensor) -> Iterator[None]:
    """Run small problems on one thread: thousands of tiny products, where waiting threads cost more than they do."""
    before = torch.get_num_threads()
    small = grad_weight.shape[0] <= _ONE_THREAD_CLASSES or before <= _ONE_THREAD_OF
    torch.set_num_threads(1 if small and grad_weight.device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _checked_head(
    function: str,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    batch_size: int | None,
    labels: Sequence[int] | Tensor | None,
    label_smoothing: float,
    reduction: str,
    seed: int,
) -> tuple[HeadProblem, Tensor | None]:
    check_head_gradients(function, grad_weight, grad_bias, weight)
    n = grad_weight.shape[0]
    require(n >= 2, function, "grad_weight", "have at least 2 rows (classes)", n)
    if bias is not None:
        require(tuple(bias.shape) == (n,), function, "bias", f"have shape {(n,)}", tuple(bias.shape))
    require(grad_bias is None or bias is not None, function, "bias", "be given with grad_bias", None)
    require(reduction in ("mean", "sum"), function, "reduction", "be 'mean' or 'sum'", repr(reduction))
    smooth = 0.0 <= label_smoothing < 1.0
    require(smooth, function, "label_smoothing", "lie in [0, 1)", label_smoothing)
    require(batch_size is None or batch_size >= 1, function, "batch_size", "be at least 1", batch_size)
    given = None
    if labels is not None:
        given = torch.as_tensor(labels, dtype=torch.int64, device=grad_weight.device).reshape(-1)
        require(len(given) > 0, function, "labels", "not be empty", "an empty batch")
        inside = bool(((given >= 0) & (given < n)).all())
        require(inside, function, "labels", f"lie in [0, {n})", given.tolist())
        fits = batch_size is None or len(given) == batch_size
        require(fits, function, "labels", f"have batch_size = {batch_size} entries", len(given))
    zero = weight.new_zeros(n) if bias is None else bias.detach()
    head = HeadProblem(
        grad_weight=grad_weight.detach().double(),
        grad_bias=None if grad_bias is None else grad_bias.detach().double(),
        weight=weight.detach().double(),
        bias=zero.double(),
        label_smoothing=label_smoothing,
        reduction=reduction,
        rounding=rounding_of(grad_weight, grad_bias),
        generator=torch.Generator().manual_seed(seed),
    )
    return head, given


def _single_sample(head: HeadProblem, batch_size: int | None, given: Tensor | None) -> HeadSeparation | None:
    """One sample and a bias: ``delta = db``, ``x = dW^T db / |db|^2``, ``e_y = softmax(W x + c) - delta``."""
    expected = batch_size if given is None else len(given)
    if head.grad_bias is None or expected not in (None, 1):
        return None
    delta = head.grad_bias
    square = delta @ delta
    x = head.grad_weight.mT @ delta / square
    mixed = (head.grad_weight - torch.outer(delta, x)).norm() / head.grad_weight.norm()
    logits = head.weight @ x + head.bias
    target = torch.softmax(logits, 0) - delta
    label = target.argmax()
    gap = target - targets_of(label[None], len(target), head.label_smoothing, target.dtype)[0]
    values = torch.stack([mixed, gap.norm() / square.sqrt(), square.sqrt(), logits.abs().max(), label.double()])
    rank_gap, residual, size, reach, y = values.tolist()  # the only synchronisation
    if not rank_gap <= SAFETY * head.rounding:  # also NaN, of a zero bias gradient
        return None
    limit = SAFETY * head.rounding * max(1.0, reach) * max(1.0, 1.0 / size)
    if not residual <= min(limit, CERTIFICATE_LIMIT):
        return None
    if given is not None and int(given[0]) != int(y):
        return None
    one = torch.ones(1, dtype=torch.int64, device=x.device)
    return HeadSeparation(
        x[None], label[None], delta[None], values[1:2], 1, one, True, rank_gap, 1
    )  # fmt: skip


def _separate(head: HeadProblem, batch_size: int | None, given: Tensor | None) -> HeadSeparation:
    spectrum = factorise(head)
    rank = numerical_rank(spectrum, tuple(head.grad_weight.shape), head.rounding)  # type: ignore[arg-type]
    expected = batch_size if given is None else len(given)
    if expected is not None:
        rank = min(rank, expected)
    head.batch_size = rank if expected is None else expected
    head.weight_known = expected is not None or head.reduction == "sum"
    truncate(head, spectrum, rank)
    found = search(head, given)
    if expected is None:
        size = _batch_size_of(found, head.reduction)
        if size is None:  # no batch has such weights: keep what occurs once in a batch of `rank`
            found = found.take((found.weights * rank - 1).abs() <= WHOLE)
        head.batch_size = size or rank
    return _assemble(head, found)


def _batch_size_of(found: Found, reduction: str) -> int | None:
    """The smallest B for which every sample's weight is a multiple of ``1/B`` and they add up to B."""
    if len(found) == 0:
        return None
    if reduction == "sum":
        return int(found.weights.round().sum())
    weights = found.weights
    for size in range(len(found), 8 * len(found) + 1):
        times = weights * size
        whole = bool(((times - times.round()).abs() < WHOLE * times).all() & (times.round() >= 1).all())
        if whole and int(times.round().sum()) == size:
            return size
    return None


def _assemble(head: HeadProblem, found: Found) -> HeadSeparation:
    factors, rank, m = head.factors, head.factors.rank, len(found)
    x = found.x[:, : head.grad_weight.shape[1]]
    left = (head.grad_weight - found.delta.mT @ x).norm() / head.grad_weight.norm()
    if head.grad_bias is not None:
        left = torch.maximum(left, (head.grad_bias - found.delta.sum(0)).norm() / head.grad_bias.norm())
    # sum_b q_b p_b^T = I, or (the same for m = rank) q_a^T p_b = delta_ab
    p, q = found.x @ factors.vh.mT / factors.s, found.delta @ factors.u
    pairing = (q @ p.mT - torch.eye(m, dtype=p.dtype, device=p.device)).abs().amax() if m else left
    bound = min(max(_PAIRING, (head.noise / float(factors.s[-1])) ** 0.5), 0.1)
    times = (found.weights / head.sample_weight).round().long()
    complete = m == rank and float(pairing) <= bound and int(times.sum()) == head.batch_size
    return HeadSeparation(
        inputs=x,
        labels=found.labels,
        grad_logits=found.delta,
        residuals=found.residuals,
        batch_size=head.batch_size,
        multiplicities=times,
        complete=complete,
        head_residual=float(left),
        rank=rank,
        reason="" if complete else _reason(head, found),
    )


def _reason(head: HeadProblem, found: Found) -> str:
    rank, n = head.factors.rank, head.factors.n_classes
    if head.batch_size > rank:
        return (
            f"{head.batch_size} samples in a gradient of rank {rank}: more than the head's {n - 1} directions, "
            f"or samples that depend on each other"
        )
    if len(found) == rank:
        return "the certified samples do not explain the whole gradient"
    limit = n - (2 if head.factors.kappa is None else 1)
    if rank > limit:
        return f"{rank} samples with {n} classes: at most {limit} leave more equations than unknowns"
    return f"{len(found)} of {rank} samples certified; no further root was found"


def _cast(result: HeadSeparation, dtype: torch.dtype) -> HeadSeparation:
    fields = dict(vars(result))
    for name in ("inputs", "grad_logits", "residuals"):
        fields[name] = fields[name].to(dtype)
    return HeadSeparation(**fields)
