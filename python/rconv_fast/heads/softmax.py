"""Split the gradient of a classification head into the samples of the batch, each with a certificate.

Notation of :mod:`rconv_fast.heads.roots`: n classes, d features, B samples,
``dW = sum_b delta_b x_b^T``, ``db = sum_b delta_b``, ``delta_b = w (softmax(W x_b + c) - e_{y_b})``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.containers import read_tensor
from rconv_fast.errors import require, require_type
from rconv_fast.heads.head import Head, check_head
from rconv_fast.heads.multiplicity import Occurrences, count_occurrences
from rconv_fast.heads.noisy_single import noisy_single_sample
from rconv_fast.heads.problem import Found, HeadProblem
from rconv_fast.heads.refine import Refined, complete_limit, refine
from rconv_fast.heads.roots import HeadFactors, RootSystem
from rconv_fast.heads.search import search
from rconv_fast.heads.separation import HeadSeparation
from rconv_fast.heads.single import single_sample
from rconv_fast.heads.spectrum import noise_in_sums, noisy_rank, numerical_rank, singular_triplets
from rconv_fast.losses import Loss

# ``q_a^T p_b`` of a complete separation is 0 or 1 this closely, or as closely as the noise allows.
_PAIRING = 1e-8
# Shares of repeated samples are whole multiples of each other this closely, and never less closely than that.
_SHARE = 1e-6
_COARSE_SHARE = 1e-2
_NOISY_SHARE = 0.3
# How far above its mean the norm of noise may be, in standard deviations of its noisiest entry: exp(-_TAIL^2 / 2).
_TAIL = 5.0
# A search that has not ended by then will not end with success: the largest that do take a few seconds.
_SEARCH_SECONDS = 60.0


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
    class_weights: Tensor | None = None,
    scale: float | None = 1.0,
    seed: int = 0,
    time_limit: float | None = None,
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
    class_weights : Tensor, shape (n,), optional
        ``weight`` of ``torch.nn.functional.cross_entropy``.
    scale : float or None
        Factor by which the gradient is multiplied; None: find it.
    seed : int
        Seed of the starting points. The result does not depend on it, except for what is found at all.
    time_limit : float, optional
        Seconds after which the search ends with what it has; by default one minute.

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
    check_head(function, grad_weight, grad_bias, weight, bias, reduction)
    n = grad_weight.shape[0]
    require(n >= 2, function, "grad_weight", "have at least 2 rows (classes)", n)
    smooth = 0.0 <= label_smoothing < 1.0
    require(smooth, function, "label_smoothing", "lie in [0, 1)", label_smoothing)
    given = checked_labels(function, labels, n, batch_size, grad_weight.device)
    head = Head.create(
        grad_weight, grad_bias, weight, bias, Loss("cross_entropy", reduction, label_smoothing, class_weights),
        scale=scale, budget=Budget.seconds(time_limit),
    )  # fmt: skip
    return separate(head, batch_size, given, seed).to(grad_weight.dtype)


def checked_labels(
    function: str,
    labels: Sequence[int] | Tensor | None,
    n_classes: int,
    batch_size: int | None,
    device: torch.device,
) -> Tensor | None:
    """Labels as a vector of class numbers, one a sample."""
    require(batch_size is None or batch_size >= 1, function, "batch_size", "be at least 1", batch_size)
    if labels is None:
        return None
    given = read_tensor(function, "labels", labels)
    require_type(not given.is_complex(), function, "labels", "be class numbers", given.dtype)
    given = given.to(device, torch.int64).reshape(-1)
    require(len(given) > 0, function, "labels", "not be empty", "an empty batch")
    inside = bool(((given >= 0) & (given < n_classes)).all())
    require(inside, function, "labels", f"lie in [0, {n_classes})", given.tolist())
    fits = batch_size is None or len(given) == batch_size
    require(fits, function, "labels", f"have batch_size = {batch_size} entries", len(given))
    return given


def separate(head: Head, batch_size: int | None, given: Tensor | None, seed: int = 0) -> HeadSeparation:
    """The closed form of one sample where it fits, else the search.

    Parameters
    ----------
    head : Head
        With cross-entropy as its loss.
    batch_size : int, optional
        Number of samples.
    given : Tensor, optional
        Their labels, int64.
    seed : int
        Of the starting points.
    """
    head = replace(head, budget=head.budget.at_most(_SEARCH_SECONDS))
    expected = batch_size if given is None else len(given)
    single = None if head.noisy else single_sample(head, expected, given)
    if single is not None:
        return single
    factors, note = _factors(head), ""
    if not head.noisy and (sigma := noise_in_sums(head.grad_weight, factors.s, head.rounding)) is not None:
        entry = head.grad_weight.new_full((), sigma)
        share = sigma / float(head.grad_weight.square().mean().sqrt())
        note = f"the gradient carries noise of about {share:.0e} of its entries, which noise= should say"
        head = replace(head, sigma_weight=entry, sigma_bias=entry)
        factors = _factors(head)
    problem = _problem(head, factors, expected, given, torch.Generator().manual_seed(seed))
    noisy = noisy_single_sample(problem.head, problem.factors, expected, given, note)
    return noisy or _assemble(problem, search(problem), note, expected)


def _problem(
    head: Head,
    factors: HeadFactors,
    expected: int | None,
    given: Tensor | None,
    generator: torch.Generator,
) -> HeadProblem:
    """Keep as many singular values as samples; the noise, and the weight of a sample, given or guessed."""
    n, d = head.n_classes, factors.vh.shape[1]
    if head.sigma_weight is not None:
        sigma = float(head.sigma_weight.square().mean().sqrt())
        rank = noisy_rank(factors.s, _norm_of_noise(head.sigma_weight.expand_as(head.grad_weight)))
        noise = sigma * n**0.5
    else:
        rank = numerical_rank(factors.s, (n, d), head.rounding)
    if expected is not None and rank > expected:
        if rank < n - 1:  # a gap: the gradient holds more samples than were stated
            expected = given = None
        else:
            rank = expected
    if not head.noisy:
        spectrum = factors.s
        tail = float(spectrum[rank]) if rank < len(spectrum) else 0.0
        # the last singular value is 0 but for rounding (the columns of dW sum to zero): two measure the noise
        least = torch.finfo(torch.float64).eps if len(spectrum) - rank >= 2 else head.rounding
        noise = max(tail, least * float(spectrum[0]))
    factors = factors.truncated(rank)
    scale = 1.0 if head.scale is None else head.scale
    loss = head.loss
    plain = head.scale is not None and not head.of_probabilities
    weighted = loss.class_weights is not None and loss.reduction == "mean"
    counted = loss.reduction == "sum" or given is not None or (expected is not None and not weighted)
    labels = given if given is not None else torch.zeros(expected or rank, dtype=torch.int64)
    total = float(len(labels)) if weighted and given is None else loss.total_weight(labels, n)
    return HeadProblem(
        head=head,
        factors=factors,
        system=RootSystem.build(factors),
        noise=noise,
        unit=scale / total,
        unit_known=plain and counted,
        guess=plain and (counted or not weighted),
        batch_size=expected,
        labels=given,
        generator=generator,
    )


def _norm_of_noise(sigma: Tensor) -> float:
    """What the norm of a matrix of independent entries exceeds once in a hundred thousand times.

    Its mean is at most ``max_i |sigma_i| + max_j |sigma_j|`` over rows and columns (of constant sigma, (n, d):
    ``sigma (sqrt(n) + sqrt(d))``; Bandeira and van Handel, arXiv 1408.6185, theorem 1.1), and it is t more with a
    probability of ``exp(-t^2 / (2 max sigma^2))`` at most.
    """
    return float(sigma.norm(dim=0).max() + sigma.norm(dim=1).max() + _TAIL * sigma.max())


def _factors(head: Head) -> HeadFactors:
    """``[dW, kappa db] = U S V^T``, with kappa such that both parts have the same noise."""
    if head.grad_bias is None:
        matrix, weight, offset, kappa = head.grad_weight, head.weight, head.bias, None
    else:
        if head.sigma_weight is not None and head.sigma_bias is not None:
            kappa = float((head.sigma_weight.square().mean() / head.sigma_bias.square().mean()).sqrt())
        else:
            kappa = float(head.grad_weight.norm() / head.grad_bias.norm())
        matrix = torch.cat([head.grad_weight, kappa * head.grad_bias[:, None]], 1)
        weight = torch.cat([head.weight, head.bias[:, None] / kappa], 1)
        offset = torch.zeros_like(head.bias)
    return HeadFactors(*singular_triplets(matrix, head.rounding), weight, offset, kappa)


def _assemble(problem: HeadProblem, found: Found, note: str, expected: int | None) -> HeadSeparation:
    head, factors, m = problem.head, problem.factors, len(found)
    x, delta = found.x[:, : head.grad_weight.shape[1]], found.delta
    # sum_b q_b p_b^T = I, or (the same for m = rank) q_a^T p_b = delta_ab
    p, q = found.x @ factors.vh.mT / factors.s, delta @ factors.u
    pairing = (q @ p.mT - torch.eye(m, dtype=p.dtype, device=p.device)).abs().amax() if m else torch.ones(())
    bound = min(max(_PAIRING, (problem.noise / float(factors.s[-1])) ** 0.5), 0.1)
    explained = m == problem.rank and (head.noisy or float(pairing) <= bound)
    if not explained and not bool(found.alone.all()):
        return _assemble(problem, found.take(found.alone), note, expected)
    counted = _occurrences(problem, found, expected)
    reason = (note or counted.doubt) if explained else _reason(problem, found)
    scale, errors = counted.scale, None
    if explained and not head.of_probabilities:
        best = _refined(problem, found, counted)
        errors = best.errors
        if head.noisy:
            x, delta, scale = best.x, best.delta, counted.scale * best.factor
            reason = reason or best.misfit
        if errors is not None and float(errors.max()) > complete_limit(head):
            reason = reason or f"the equations leave a relative error of {float(errors.max()):.0e} in the features"
    return HeadSeparation(
        inputs=x,
        labels=found.labels,
        grad_logits=delta,
        residuals=found.residuals,
        batch_size=counted.batch_size,
        multiplicities=counted.times,
        complete=not reason,
        head_residual=head.mismatch(x, delta),
        rank=problem.rank,
        reason=reason,
        spare=problem.spare,
        scale=scale,
        errors=errors,
    )


def _refined(problem: HeadProblem, found: Found, counted: Occurrences) -> Refined:
    """The best fit under the stated noise, or the error that the rounding leaves."""
    head = problem.head
    target, v = head.loss.class_targets(found.labels, head.n_classes, torch.float64)
    total = head.loss.total_weight(found.labels.repeat_interleave(counted.times), head.n_classes)
    weight = v * counted.times * counted.scale / total
    x = found.x[:, : head.grad_weight.shape[1]]
    if head.sigma_weight is not None:
        return refine(head, (head.sigma_weight, head.sigma_bias), x, target, weight)
    level = x.new_tensor(problem.noise / max(x.shape) ** 0.5)
    kappa = problem.factors.kappa
    return refine(head, (level, None if kappa is None else level / kappa), x, target, weight, steps=0)


def _occurrences(problem: HeadProblem, found: Found, expected: int | None) -> Occurrences:
    head = problem.head
    if len(found) == 0:
        scale = 1.0 if head.scale is None else head.scale
        none = torch.zeros(0, dtype=torch.int64, device=found.labels.device)
        return Occurrences(none, expected or problem.rank, scale)
    shares = found.weights / head.loss.class_targets(found.labels, head.n_classes, torch.float64)[1]
    shares = shares / head.share_of_weight(found.x[:, : head.weight.shape[1]], found.labels)
    tolerance = min(max(_SHARE, 1e4 * problem.noise / float(problem.factors.s[0])), _COARSE_SHARE)
    if head.noisy:
        tolerance = _NOISY_SHARE  # the fit of the whole gradient decides
    return count_occurrences(
        shares, found.labels, head.n_classes, head.loss, head.scale, expected, tolerance
    )  # fmt: skip


def _reason(problem: HeadProblem, found: Found) -> str:
    rank, n, size = problem.rank, problem.head.n_classes, problem.batch_size
    if size is not None and size > rank:
        return (
            f"{size} samples in a gradient of rank {rank}: more than the head's {n - 1} directions, "
            f"or samples that depend on each other"
        )
    if len(found) == rank:
        return "the certified samples do not explain the whole gradient"
    limit = n - (2 if problem.factors.kappa is None else 1)
    if rank > limit:
        return f"{rank} samples with {n} classes: at most {limit} leave more equations than unknowns"
    more = ""
    if size is None and rank == n - 1:  # all that a softmax over n classes can show
        more = "; the batch may be larger than the head's rank: batch_size= gives at least the label counts"
    if problem.head.budget.spent:
        return f"{len(found)} of {rank} samples certified when the time was over{more}"
    return f"{len(found)} of {rank} samples certified; no further root was found{more}"
