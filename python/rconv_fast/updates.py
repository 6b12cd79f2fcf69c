"""From what a client sends back to the gradients behind it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rconv_fast.adam import SURE, arithmetic_noise, gradient_of_first_step, with_noise_of_sums
from rconv_fast.containers import plain_names, read_state, require_names
from rconv_fast.errors import require, require_count, require_number
from rconv_fast.observation import OPTIMIZERS, LocalTraining, SharedGradients

_FUNCTION = "gradients_from_update"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# A value rounded to a grid is off by a uniform error, whose standard deviation is the spacing over this.
UNIFORM = math.sqrt(12)
# The coefficients of local steps are summed step by step: a second at most.
_MAX_STEPS = 1_000_000
# A few round numbers fit into any format; so many different ones by chance with a probability below 2^-100.
_TELLING = 32


def gradients_from_update(
    before: Any,
    after: Any,
    lr: float,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    steps: int = 1,
    optimizer: str = "sgd",
    eps: float = 1e-8,
    names: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
) -> SharedGradients:
    """Undo a client's training: for one step of SGD, ``gradient = ((1 - lr * weight_decay) * before - after) / lr``.

    Parameters
    ----------
    before, after : mapping of str to Tensor, sequence of Tensor, nn.Module, or a Flower object
        The model's state before and after the client's training: state dicts, nested checkpoints
        (``{"state_dict": ...}``), Flower's ``ArrayRecord`` or ``Parameters``, or lists in state-dict order as
        federated frameworks send them (then give `names`), of torch or numpy. Names may begin with ``module.``.
        Buffers may be among them: they give no gradient, and those that changed are kept in ``.statistics``.
    lr : float
        The learning rate.
    weight_decay, momentum : float
        Of ``torch.optim.SGD``. The buffer of the momentum is taken as empty before the first step, so that one step
        with momentum is a plain one. Adam has a weight decay only.
    steps : int
        Local steps of the client. For more than one the gradients are the mean of those of the steps, each taken at
        its own weights, the earlier ones weighted more where there is momentum. One with Adam.
    optimizer : {"sgd", "adam", "adamw"}
        Whose first step it was, its moments empty before it.
    eps : float
        Of Adam: the size of a gradient beside it says how much of its size the step has left.
    names : sequence of str, optional
        Names of the tensors when `before` and `after` are sequences: ``list(model.state_dict())``.
    parameters : sequence of str, optional
        Names of the model's parameters, ``[n for n, _ in model.named_parameters()]``. Without it, buffers are
        known by torch's names for them (``running_mean``, ``running_var``, ``num_batches_tracked``) and by
        not being floating point.

    Returns
    -------
    SharedGradients
        By parameter name, in the order of `before`, for ``rconv_fast.invert``. ``.noise`` is the standard deviation
        that the rounding of the weights leaves in each entry, ``.training`` says how it came about.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Names or shapes differ, values are not finite or no tensors, a number is out of its range.

    Notes
    -----
    A step computes ``w' = w - lr g``, rounded at ``lr g`` (fused kernels do not round there) and at ``w'``. Each is
    off by a uniform error of standard deviation spacing / sqrt(12), so that

        noise = sqrt(steps) * hypot(spacing(w'), spacing(lr g)) / sqrt(12) / lr.

    The first step of Adam is ``w' = w - lr s`` with ``s = g / (|g| + eps)``, whatever its betas. So
    ``g = eps s / (1 - |s|)``, and the noise of s becomes ``(|g| + eps)^2 / eps`` times as much. In float64 gradients
    remain; in float32 the sizes of large ones are lost: their noise is infinite, and only the signs are right.

    The spacing is that of the coarsest format which holds all weights of `after`: states that were rounded to
    float32 or bfloat16 on their way are known by that, whatever dtype they come in.

    Examples
    --------
    >>> before = {"weight": torch.tensor([1.0, 2.0])}
    >>> after = {"weight": torch.tensor([0.5, 2.0])}
    >>> gradients_from_update(before, after, lr=0.5)
    {'weight': tensor([1., 0.])}
    """
    training = LocalTraining(lr, steps, momentum, weight_decay, optimizer, eps)
    _check_training(training)
    old, new = read_state(_FUNCTION, "before", before, names), read_state(_FUNCTION, "after", after, names)
    _check_names(old, new)
    if parameters is not None:
        require_names(_FUNCTION, "parameters", parameters)
    wanted = None if parameters is None else set(plain_names(list(parameters)))
    absent = sorted((wanted or set()) - old.keys())
    require(not absent, _FUNCTION, "before", "hold every parameter", f"none called {absent[:1]}")
    weights = [name for name in old if _is_parameter(name, old[name], wanted)]
    require(bool(weights), _FUNCTION, "before", "hold at least one floating-point parameter", "none")

    for name in weights:
        for side, state in (("before", old), ("after", new)):
            require(not state[name].is_complex(), _FUNCTION, f"{side}[{name!r}]", "be real", state[name].dtype)
    spacing_of = _format_of(new[name] for name in weights)
    gradients, noise = {}, {}
    for name in weights:
        w, stepped = old[name].double(), new[name].to(old[name].device).double()
        for side, value in (("before", w), ("after", stepped)):
            require(bool(value.isfinite().all()), _FUNCTION, f"{side}[{name!r}]", "be finite", "NaN or Inf")
        undo = _undo_sgd if optimizer == "sgd" else _undo_adam
        gradient, deviation = undo(name, w, stepped, training, spacing_of)
        gradients[name] = gradient.to(torch.promote_types(old[name].dtype, new[name].dtype))
        noise[name] = deviation.float()
    if optimizer != "sgd":
        noise = with_noise_of_sums(gradients, noise, spacing_of)
    changed = {n: new[n] for n in old if n not in gradients and not torch.equal(old[n], new[n].to(old[n].device))}
    changed = {n: t.clone() for n, t in changed.items()}  # a model given as `after` may go on
    return SharedGradients(
        gradients, noise=noise, steps=steps, source=str(training), statistics=changed, training=training
    )


def _undo_sgd(
    name: str, w: Tensor, stepped: Tensor, training: LocalTraining, held: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The mean gradient and its standard deviation; `held` holds the weights."""
    del name
    kept, total = step_coefficients(training)
    step = kept * w - stepped
    rounding = torch.hypot(spacing(stepped, held), spacing(step / training.steps, held)) / UNIFORM
    divisor = training.lr * total
    return step / divisor, math.sqrt(training.steps) * rounding / divisor


def _undo_adam(
    name: str, w: Tensor, stepped: Tensor, training: LocalTraining, held: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradient of the first step and its standard deviation, less what the weight decay added to it."""
    lr, decay = training.lr, training.weight_decay
    decayed = w * (1 - lr * decay) if training.optimizer == "adamw" else w
    step = decayed - stepped
    rounding = torch.hypot(spacing(stepped, held), spacing(step, held)) / UNIFORM / lr
    s = step / lr
    noise = torch.hypot(rounding, arithmetic_noise(s, held))
    must = f"be within lr of before, as a first step of {training.optimizer} is"
    within = bool((s.abs() <= 1 + SURE * noise).all())
    require(within, _FUNCTION, f"after[{name!r}]", must, f"{float(s.abs().max()):.3g} lr away")
    whole, noise = gradient_of_first_step(s, noise, training.eps)
    gradient = whole - decay * w if training.optimizer == "adam" else whole
    unsure = noise.isinf() & (gradient * whole < 0)  # of a least size that the decay may exceed
    return torch.where(unsure, 0.0, gradient), noise


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from each value to the next one that `dtype` can hold, as numpy.spacing has it for numpy's types.

    Examples
    --------
    >>> spacing(torch.tensor([1.0, -3.0]), torch.bfloat16)
    tensor([0.0078, 0.0156])
    """
    limits = torch.finfo(dtype)
    _, exponent = torch.frexp(values)  # |value| = mantissa * 2^exponent, mantissa in [1/2, 1)
    smallest = limits.tiny * limits.eps
    grid = torch.ldexp(torch.full_like(values, limits.eps), exponent - 1).clamp_min(smallest)
    return torch.where(values == 0, smallest, grid)


def _check_training(training: LocalTraining) -> None:
    lr, steps = training.lr, training.steps
    for argument in ("lr", "weight_decay", "momentum"):
        require_number(_FUNCTION, argument, getattr(training, argument))
    require(0 < lr < math.inf, _FUNCTION, "lr", "be positive and finite", lr)
    require(0 <= training.weight_decay < math.inf, _FUNCTION, "weight_decay", "be >= 0", training.weight_decay)
    require(0 <= training.momentum < 1, _FUNCTION, "momentum", "be in [0, 1)", training.momentum)
    require_count(_FUNCTION, "steps", steps)
    require(steps <= _MAX_STEPS, _FUNCTION, "steps", f"be at most {_MAX_STEPS}", steps)
    _check_optimizer(training)


def _check_optimizer(training: LocalTraining) -> None:
    optimizer, eps = training.optimizer, training.eps
    known = isinstance(optimizer, str) and optimizer in OPTIMIZERS
    require(known, _FUNCTION, "optimizer", f"be one of {', '.join(OPTIMIZERS)}", repr(optimizer))
    require_number(_FUNCTION, "eps", eps)
    require(0 < eps < math.inf, _FUNCTION, "eps", "be positive and finite", eps)
    if optimizer != "sgd":
        require(training.steps == 1, _FUNCTION, "steps", f"be 1 with {optimizer}", training.steps)
        require(training.momentum == 0, _FUNCTION, "momentum", f"be 0 with {optimizer}", training.momentum)


def _check_names(old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    missing, extra = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    require(not missing, _FUNCTION, "after", f"hold {missing[:1]}", f"{len(new)} tensors without it")
    require(not extra, _FUNCTION, "after", "hold only the names of before", f"also {extra[:1]}")
    for name, tensor in old.items():
        shape, other = tuple(tensor.shape), tuple(new[name].shape)
        scalars = tensor.numel() == new[name].numel() == 1  # counters come as (), as (1,) and as plain numbers
        require(shape == other or scalars, _FUNCTION, f"after[{name!r}]", f"have shape {shape}", other)


def _is_parameter(name: str, tensor: Tensor, parameters: set[str] | None) -> bool:
    if parameters is not None:
        return name in parameters
    return tensor.is_floating_point() and name.rpartition(".")[2] not in _STATISTICS


def step_coefficients(training: LocalTraining) -> tuple[float, float]:
    """The steps are linear in weights and gradients: ``after = kept * before - lr * total * (mean gradient)``."""
    w, v, total, u = 1.0, 0.0, 0.0, 0.0
    for _ in range(training.steps):
        v = training.momentum * v + training.weight_decay * w
        u = training.momentum * u + 1.0 - training.lr * training.weight_decay * total
        w, total = w - training.lr * v, total + u
    return w, total


def _format_of(weights: Iterable[Tensor]) -> torch.dtype:
    """The coarsest floating format that holds every weight; the dtype itself where there are few to judge by."""
    tensors = list(weights)
    own = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    if sum(len(t.flatten()[:_TELLING].unique()) for t in tensors) < _TELLING:
        return own
    coarser = (torch.bfloat16, torch.float16, torch.float32)
    return next((d for d in coarser if all(torch.equal(t.to(d).to(t.dtype), t) for t in tensors)), own)
