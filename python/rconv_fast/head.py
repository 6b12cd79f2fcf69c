"""Split the gradient of a classification head into the samples of the batch, each with a certificate.

Notation of :mod:`rconv_fast.head_roots`: n classes, d features, B samples,
``dW = sum_b delta_b x_b^T``, ``db = sum_b delta_b``, ``delta_b = w (softmax(W x_b + c) - e_{y_b})``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rconv_fast.errors import require, require_type
from rconv_fast.head_joint import (
    MAX_UNKNOWNS,
    JointSolution,
    count_hypotheses,
    estimate_counts,
    solve_joint,
)
from rconv_fast.head_roots import HeadFactors, Roots, RootSystem, root_spread, solve_roots, targets_of

# A residual is accepted up to this factor above what the gradients' noise explains.
_SAFETY = 30.0
# Beyond this relative noise a residual says nothing about a sample.
_CERTIFICATE_LIMIT = 1e-2
# One sample's equations must outnumber its unknowns by this much before its root counts as proof.
_PROOF_EXCESS = 2
# A root of the deflated equations this close is polished and judged on the whole gradient.
_CANDIDATE = 3e-2
# A sample is reported only if its expected relative error is below: 1e-8 with float64, 3e-4 with float32 gradients.
_ACCURACY_IN_ROUNDINGS = 4e7
_ACCURACY_LIMIT = 3e-4
# Weights of repeated samples are told apart to this relative accuracy.
_WHOLE = 1e-2
# ``q_a^T p_b`` of a complete separation is 0 or 1 this closely, or as closely as the noise allows.
_PAIRING = 1e-8
# The search gives up after so many widening rounds without a new sample.
_IDLE_ROUNDS = 3
# The joint solve: problems at once, and the bound of problems * B^6; label counts tried; draws of a mean softmax.
_JOINT_BATCH = 64
_JOINT_WORK = 10**9
_HYPOTHESES = 128
_HYPOTHESIS_WORK = 4 * 10**7
_DRAWS = 256
# Values looked at before a whole tensor.
_PROBE = 256
# Heads with at most so many classes, or on machines with at most so many threads, are separated on one CPU thread.
_ONE_THREAD_CLASSES = 256
_ONE_THREAD_OF = 2
# Where one sample's equations outnumber its unknowns by more, the joint solve adds nothing.
_JOINT_EXCESS = 6
# Standard deviations, in logits, of the starting points (the first of each class is 0).
_START_SPREADS = (0.0, 1.0, 0.3, 2.0, 4.0)
_JOINT_SPREADS = (0.3, 1.0, 0.1, 2.0)


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


@dataclass
class _Head:
    """The arguments of one separation in float64, and what has been found so far."""

    grad_weight: Tensor
    grad_bias: Tensor | None
    weight: Tensor
    bias: Tensor
    label_smoothing: float
    reduction: str
    rounding: float
    generator: torch.Generator
    factors: HeadFactors = field(init=False)
    system: RootSystem = field(init=False)
    noise: float = field(init=False)
    batch_size: int = field(init=False)
    weight_known: bool = field(init=False)

    @property
    def sample_weight(self) -> float:
        """``w``: the factor of one sample in the loss."""
        return 1.0 / self.batch_size if self.reduction == "mean" else 1.0

    def normal(self, *shape: int) -> Tensor:
        """Seeded standard normal numbers, the same on every device."""
        numbers = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return numbers.to(self.weight.device)


@dataclass
class _Found:
    """Separated samples: extended features, deltas, labels, residuals, weights in the loss."""

    x: Tensor  # [m, d or d + 1]
    delta: Tensor  # [m, n]
    labels: Tensor
    residuals: Tensor
    weights: Tensor

    @classmethod
    def none(cls, factors: HeadFactors) -> _Found:
        x = factors.weight.new_zeros(0, factors.weight.shape[1])
        whole = torch.zeros(0, dtype=torch.int64, device=x.device)
        return cls(x, x.new_zeros(0, factors.n_classes), whole, x.new_zeros(0), x.new_zeros(0))

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def take(self, keep: Tensor) -> _Found:
        """The samples where `keep` is set."""
        return _Found(*(value[keep] for value in vars(self).values()))

    def join(self, other: _Found) -> _Found:
        """These samples and `other`'s."""
        return _Found(*(torch.cat([a, getattr(other, n)]) for n, a in vars(self).items()))


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
) -> tuple[_Head, Tensor | None]:
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
    head = _Head(
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


def _single_sample(head: _Head, batch_size: int | None, given: Tensor | None) -> HeadSeparation | None:
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
    if not rank_gap <= _SAFETY * head.rounding:  # also NaN, of a zero bias gradient
        return None
    limit = _SAFETY * head.rounding * max(1.0, reach) * max(1.0, 1.0 / size)
    if not residual <= min(limit, _CERTIFICATE_LIMIT):
        return None
    if given is not None and int(given[0]) != int(y):
        return None
    one = torch.ones(1, dtype=torch.int64, device=x.device)
    return HeadSeparation(
        x[None], label[None], delta[None], values[1:2], 1, one, True, rank_gap, 1
    )  # fmt: skip


def _separate(head: _Head, batch_size: int | None, given: Tensor | None) -> HeadSeparation:
    spectrum = _factorise(head)
    rank = numerical_rank(spectrum, tuple(head.grad_weight.shape), head.rounding)  # type: ignore[arg-type]
    expected = batch_size if given is None else len(given)
    if expected is not None:
        rank = min(rank, expected)
    head.batch_size = rank if expected is None else expected
    head.weight_known = expected is not None or head.reduction == "sum"
    _truncate(head, spectrum, rank)
    found = _search(head, given)
    if expected is None:
        size = _batch_size_of(found, head.reduction)
        if size is None:  # no batch has such weights: keep what occurs once in a batch of `rank`
            found = found.take((found.weights * rank - 1).abs() <= _WHOLE)
        head.batch_size = size or rank
    return _assemble(head, found)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def _factorise(head: _Head) -> Tensor:
    """Set the full factors ``[dW, kappa db] = U S V^T`` and return the singular values."""
    if head.grad_bias is None:
        matrix, weight, offset, kappa = head.grad_weight, head.weight, head.bias, None
    else:
        kappa = float(head.grad_weight.norm() / head.grad_bias.norm())
        matrix = torch.cat([head.grad_weight, kappa * head.grad_bias[:, None]], 1)
        weight = torch.cat([head.weight, head.bias[:, None] / kappa], 1)
        offset = torch.zeros_like(head.bias)
    u, s, vh = _svd(matrix)
    head.factors = HeadFactors(u, s, vh, weight, offset, kappa)
    return s


def _truncate(head: _Head, spectrum: Tensor, rank: int) -> None:
    full = head.factors
    tail = float(spectrum[rank]) if rank < len(spectrum) else 0.0
    # the last singular value is 0 but for rounding (the columns of dW sum to zero): two measure the noise
    measured = len(spectrum) - rank >= 2
    least = torch.finfo(torch.float64).eps if measured else head.rounding
    head.noise = max(tail, least * float(spectrum[0]))
    head.factors = HeadFactors(full.u[:, :rank], full.s[:rank], full.vh[:rank], full.weight, full.offset, full.kappa)
    head.system = RootSystem.build(head.factors)


def _limits(head: _Head, factors: HeadFactors, roots: Roots) -> tuple[Tensor, Tensor]:
    """What the noise explains of ``off_span`` and of ``pairing - 1``, to first order.

    With ``dW + E``: ``|(I - UU^T) delta| <= |E| |S^-1 q|`` and ``|q^T p - 1| <= |E| |p| |S^-1 q|``; and the
    softmax itself is rounded: ``eps (1 + |logits|) / |d|``.
    """
    amplified = (roots.q / factors.s).norm(dim=1)
    rounded = head.rounding * (1 + roots.logit_range) / roots.size
    off_span = _SAFETY * (head.noise * amplified / roots.q.norm(dim=1) + rounded)
    pairing = _SAFETY * (head.noise * amplified * roots.p.norm(dim=1) + rounded)
    return off_span, pairing


def _certified(head: _Head, factors: HeadFactors, roots: Roots, paired: bool) -> tuple[Tensor, Tensor]:
    """Which roots are samples, and their relative residuals."""
    off_span, pairing = _limits(head, factors, roots)
    good = (roots.off_span <= off_span) & (off_span <= _CERTIFICATE_LIMIT)
    residual = roots.off_span
    if paired:
        good &= ((roots.pairing - 1).abs() <= pairing) & (pairing <= _CERTIFICATE_LIMIT)
        residual = torch.maximum(residual, (roots.pairing - 1).abs())
    return good & torch.isfinite(residual), residual


def _distinct(roots: Roots, good: Tensor, residual: Tensor) -> list[int]:
    """One root for each sample: ``q_a^T p_b`` is 1 for the same sample and 0 for another one."""
    order = good.nonzero()[:, 0]
    order = order[residual[order].argsort()]
    p, q = roots.p[order], roots.q[order] / roots.pairing[order, None]
    overlap = (q @ p.mT).abs().cpu()
    chosen: list[int] = []
    for i in range(len(order)):
        if all(float(overlap[i, j]) < 0.5 for j in chosen):
            chosen.append(i)
    return [int(order[i]) for i in chosen]


def _class_order(factors: HeadFactors, rest: Tensor | None) -> Tensor:
    """Classes that may be among the labels, likeliest first.

    If y is a label, ``(I - U U^T) e_y = (I - U U^T) softmax``, which is short unless the model is sure of a
    class; and ``db_y = w (sum softmax_y - k_y)`` is mostly negative.
    """
    score = factors.u.square().sum(1)  # |U^T e_y|^2
    if rest is not None:
        score = score - rest / rest.abs().max().clamp_min(torch.finfo(rest.dtype).tiny)
    return score.argsort(descending=True)


def _search(head: _Head, given: Tensor | None) -> _Found:
    """Individual roots with deflation, then the joint solve for what is left."""
    found = _Found.none(head.factors)
    rank = head.factors.rank
    if head.factors.excess >= _PROOF_EXCESS:
        found = _search_roots(head, given)
    if len(found) < rank == head.batch_size and head.factors.excess <= _JOINT_EXCESS:
        rest = _search_joint(head, given, found)
        found = found if rest is None else found.join(rest)
    return found


def _deflated(head: _Head, found: _Found) -> HeadFactors:
    if len(found) == 0:
        return head.factors
    p = found.x @ head.factors.vh.mT / head.factors.s
    q = found.delta @ head.factors.u
    return head.factors.deflate(p, q)


def _remaining(given: Tensor, found: _Found, weight: float) -> Tensor:
    """The given labels without those of the found samples."""
    left = given.tolist()
    times = (found.weights / weight).round().long().tolist()
    for label, repeats in zip(found.labels.tolist(), times, strict=True):
        for _ in range(repeats):
            if label in left:
                left.remove(label)
    return torch.tensor(left, dtype=torch.int64, device=given.device)


def _search_roots(head: _Head, given: Tensor | None) -> _Found:
    """Rounds of individual roots: few classes and starts first, more of both when nothing is found."""
    found = _Found.none(head.factors)
    rank, n = head.factors.rank, head.factors.n_classes
    idle, first = 0, True
    while len(found) < rank and idle <= _IDLE_ROUNDS:
        factors = _deflated(head, found)
        left = factors.rank
        if given is not None:
            classes = torch.unique(_remaining(given, found, head.sample_weight))
        else:
            rest = None if head.grad_bias is None else head.grad_bias - found.delta.sum(0)
            breadth = min(n, (rank if first else max(2 * left, rank)) * 4 ** max(0, idle - 1))
            classes = _class_order(factors, rest)[:breadth]
        if len(classes) == 0:
            break
        starts = 1 if first else 4 * max(1, idle)
        # samples that occur several times have another weight: every idle round first tries it as an unknown
        free = idle > 0 and factors.excess > _PROOF_EXCESS
        new = _round(head, factors, classes, min(starts, 4) if free else starts, first, paired=not free)
        if free and len(new) == 0:
            new = _round(head, factors, classes, starts, first, paired=True)
        found = found.join(new)
        idle = 0 if len(new) else idle + 1
        first = False
    return found


def _round(head: _Head, factors: HeadFactors, classes: Tensor, starts: int, first: bool, paired: bool) -> _Found:
    """Try every class from several starts; polish and certify what comes close to a root."""
    system = RootSystem.build(factors)
    tried = classes.repeat_interleave(starts)
    m, k = len(tried), system.g.shape[1]
    spreads = torch.tensor(_START_SPREADS, dtype=torch.float64, device=classes.device)
    index = torch.arange(m, device=classes.device) % starts + (0 if first else 1)
    start = head.normal(m, k) * spreads[index % len(spreads)][:, None]
    target = targets_of(tried, factors.n_classes, head.label_smoothing, torch.float64)
    weight = torch.full((m,), head.sample_weight, dtype=torch.float64, device=classes.device)
    roots = solve_roots(system, target, weight, start, scale=torch.full_like(weight, float(paired)))
    near = roots.off_span <= _CANDIDATE
    if paired:
        near &= (roots.pairing - 1).abs() <= _CANDIDATE
    keep = _distinct(roots, near, roots.off_span)
    if not keep:
        return _Found.none(head.factors)
    index = torch.tensor(keep, dtype=torch.int64, device=classes.device)
    return _refined(head, (roots.p[index] * factors.s) @ factors.vh, tried[index], paired)


def _centred_logits(factors: HeadFactors, p: Tensor) -> Tensor:
    slope = factors.weight @ (factors.vh.mT * factors.s)
    return p @ (slope - slope.mean(0)).mT + factors.offset - factors.offset.mean()


def _refined(head: _Head, x: Tensor, labels: Tensor, paired: bool) -> _Found:
    """Polish candidates on the whole gradient, where no error of a subtraction is left, and certify them there."""
    factors = head.factors
    system = head.system
    p = x @ factors.vh.mT / factors.s
    target = targets_of(labels, factors.n_classes, head.label_smoothing, torch.float64)
    weight = torch.full((len(x),), head.sample_weight, dtype=torch.float64, device=x.device)
    start = (_centred_logits(factors, p) - system.base) @ system.g
    scale = torch.full_like(weight, float(paired))
    for _ in range(2):  # the second time, the pairing equation counts as much as its noise allows
        roots = solve_roots(system, target, weight, start, scale=scale, iterations=40, tolerance=1e-16, damping=1e-6)
        off_span, pairing = _limits(head, factors, roots)
        scale = float(paired) * (off_span * roots.size / pairing).clamp(max=1.0)
        start = (_centred_logits(factors, roots.p) - system.base) @ system.g
    good, residual = _certified(head, factors, roots, paired)
    good &= roots.pairing > 0
    level = off_span / _SAFETY * roots.size
    if not head.weight_known:  # samples too well classified to be seen would make the weight smaller than 1/rank
        scale = torch.zeros_like(scale)
    accuracy = level * root_spread(factors, system, roots, target, weight, scale)
    good &= accuracy <= min(_ACCURACY_LIMIT, _ACCURACY_IN_ROUNDINGS * head.rounding)
    if head.weight_known:
        times = 1 / roots.pairing  # how often a sample of unknown weight occurs
        good &= (times - times.round()).abs() <= _WHOLE
    keep = _distinct(roots, good, residual)
    return _collect(factors, roots, labels, residual, keep, head.sample_weight, rescale=not paired)


def _collect(
    factors: HeadFactors,
    roots: Roots,
    labels: Tensor,
    residual: Tensor,
    keep: list[int],
    weight: float,
    rescale: bool = False,
) -> _Found:
    """Samples in the coordinates of the head; an unknown weight is what makes ``q^T p = 1``."""
    index = torch.tensor(keep, dtype=torch.int64, device=labels.device)
    scale = 1 / roots.pairing[index] if rescale else torch.ones_like(roots.pairing[index])
    return _Found(
        x=(roots.p[index] * factors.s) @ factors.vh,
        delta=(roots.q[index] * scale[:, None]) @ factors.u.mT,
        labels=labels[index],
        residuals=residual[index],
        weights=weight * scale,
    )


def _search_joint(head: _Head, given: Tensor | None, found: _Found) -> _Found | None:
    """Solve for all remaining samples together; None unless every one is found."""
    factors = _deflated(head, found)
    r, n = factors.rank, factors.n_classes
    system = RootSystem.build(factors)
    k = system.g.shape[1]
    # r (n - 1) equations (and r more with a bias) for r^2 unknowns
    if r > n - (2 if factors.kappa is None else 1) or r * max(k, 1) > MAX_UNKNOWNS:
        return None
    hypotheses = _label_hypotheses(head, factors, given, found)
    spreads = torch.tensor(_JOINT_SPREADS, dtype=torch.float64, device=factors.u.device)
    for labels, starts in hypotheses:
        h = labels.shape[0] * starts
        tried = labels.repeat_interleave(starts, 0)
        spread = spreads[torch.arange(h, device=spreads.device) % len(spreads)]
        start = head.normal(h, r, k) * spread[:, None, None]
        solution = solve_joint(system, tried, head.sample_weight, start, label_smoothing=head.label_smoothing)
        best = int(solution.cost.argmin())
        rest = _joint_samples(head, factors, solution.p[best], solution.labels[best])
        if rest is not None and (head.weight_known or not _fits_smaller_weight(head, system, solution, best)):
            return rest
    return None


def _fits_smaller_weight(head: _Head, system: RootSystem, solution: JointSolution, best: int) -> bool:
    """Whether ``w = 1/(B+1)`` explains the gradient just as well: then neither B nor the samples are proved."""
    weight = 1.0 / (head.batch_size + 1)
    start = torch.linalg.lstsq(system.t, (solution.p[best] - system.p0).mT).solution.mT
    other = solve_joint(system, solution.labels[best][None], weight, start[None], label_smoothing=head.label_smoothing)
    return bool(other.cost[0] <= max(1e-6, 10 * float(solution.cost[best])))


def _joint_samples(head: _Head, factors: HeadFactors, p: Tensor, labels: Tensor) -> _Found | None:
    """Certify a joint solution: every sample's own equations, and ``q_a^T p_b = 0`` between samples."""
    slope = factors.weight @ (factors.vh.mT * factors.s)
    logits = p @ slope.mT + factors.offset
    d = torch.softmax(logits, 1) - targets_of(labels, factors.n_classes, head.label_smoothing, p.dtype)
    q = d @ factors.u
    off_span = d - q @ factors.u.mT
    q = head.sample_weight * q
    spread = (logits - logits.mean(1, keepdim=True)).abs().amax(1)
    roots = Roots(p, q, off_span.norm(dim=1) / d.norm(dim=1), (p * q).sum(1), d, spread)
    good, residual = _certified(head, factors, roots, paired=True)
    mixing = q @ p.mT - torch.eye(len(p), dtype=p.dtype, device=p.device)
    bound = _SAFETY * (head.noise / factors.s[-1] + head.rounding) * q.norm(dim=1) * p.norm(dim=1).max()
    good &= mixing.abs().amax(1) <= bound
    if not bool(good.all()):
        return None
    residual = torch.maximum(residual, mixing.abs().amax(1))
    return _collect(factors, roots, labels, residual, list(range(len(p))), head.sample_weight)


def _mean_softmax(head: _Head, feature_mean: float) -> Tensor:
    """Expected softmax for features of this mean and twice its square as variance (a normal behind a ReLU has 2.1)."""
    mean = feature_mean * head.weight.sum(1) + head.bias
    deviation = abs(feature_mean) * 2**0.5 * head.weight.norm(dim=1)
    return torch.softmax(mean + deviation * head.normal(_DRAWS, len(mean)), 1).mean(0)


def _estimated_counts(head: _Head, rest: HeadFactors, grad_bias: Tensor | None) -> Tensor:
    """Label counts of the samples in `rest` from ``db``; without a bias from ``dW 1 = const * db``.

    Features behind an activation have a positive sum that varies little: ``dW 1 = d mean(x) db``, which gives
    the mean feature, hence the expected softmax. Without a bias, at least n - r classes are absent, and
    ``db_y = w r softmax_y`` there gives ``d mean(x)``.
    """
    w, r, n = head.sample_weight, rest.rank, rest.n_classes
    total = head.grad_weight.sum(1) / head.grad_weight.shape[1]
    if grad_bias is not None and head.grad_bias is not None:
        feature_mean = float(total @ head.grad_bias / (head.grad_bias @ head.grad_bias))
        return estimate_counts(_mean_softmax(head, feature_mean), grad_bias, r, w)
    total = (rest.u * rest.s) @ rest.vh.sum(1) / head.grad_weight.shape[1]
    feature_mean = 0.0
    for _ in range(3):
        softmax = _mean_softmax(head, feature_mean)
        feature_mean = float((total / softmax).topk(n - r).values.mean() / (w * r))
    return estimate_counts(softmax, total / feature_mean, r, w)


def _label_hypotheses(
    head: _Head, factors: HeadFactors, given: Tensor | None, found: _Found
) -> list[tuple[Tensor, int]]:
    """Label rows to try, in batches with a number of starts: likely ones first, then more of both."""
    r, n = factors.rank, factors.n_classes
    device = factors.u.device
    budget = max(1, min(_JOINT_BATCH, _JOINT_WORK // r**6))  # problems at once
    if given is not None:
        rows = [_remaining(given, found, head.sample_weight)]
    else:
        rest = None if head.grad_bias is None else head.grad_bias - found.delta.sum(0)
        lower = torch.zeros(n, dtype=torch.int64)
        if rest is not None:  # k_y = sum softmax_y - db_y / w > -db_y / w
            lower = torch.ceil(-rest / head.sample_weight - 1e-6).clamp_min(0).long().cpu()
        estimate = _estimated_counts(head, factors, rest).cpu()
        limit = max(1, min(_HYPOTHESES, _HYPOTHESIS_WORK // r**6))
        if r > n - 2:  # at the very limit the equations are too stiff for many tries to pay
            limit = min(limit, _HYPOTHESES // 4)
        rows = [
            torch.repeat_interleave(torch.arange(n), torch.tensor(counts)).to(device)
            for counts in count_hypotheses(estimate, lower, r, limit)
        ]
    plan = [(rows[0][None], budget)] * 2
    if len(rows) == 1:
        return plan * 2
    per = min(4, budget)
    for i in range(1, len(rows), max(1, budget // per)):
        plan.append((torch.stack(rows[i : i + max(1, budget // per)]), per))
    return plan


def _batch_size_of(found: _Found, reduction: str) -> int | None:
    """The smallest B for which every sample's weight is a multiple of ``1/B`` and they add up to B."""
    if len(found) == 0:
        return None
    if reduction == "sum":
        return int(found.weights.round().sum())
    weights = found.weights
    for size in range(len(found), 8 * len(found) + 1):
        times = weights * size
        whole = bool(((times - times.round()).abs() < _WHOLE * times).all() & (times.round() >= 1).all())
        if whole and int(times.round().sum()) == size:
            return size
    return None


def _assemble(head: _Head, found: _Found) -> HeadSeparation:
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


def _reason(head: _Head, found: _Found) -> str:
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
