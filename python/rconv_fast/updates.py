"""From what a client sends back to the gradients behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rconv_fast.errors import require, require_type

State = Mapping[str, Any] | Sequence[Any]

_FUNCTION = "gradients_from_update"
_RUNNING_STATISTICS = ("running_mean", "running_var")
_OTHER_BUFFERS = ("num_batches_tracked",)


def gradients_from_update(
    before: State,
    after: State,
    lr: float,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    steps: int = 1,
    names: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Undo one plain SGD step: ``gradient = (before - after) / lr - weight_decay * before``.

    Parameters
    ----------
    before, after : mapping of str to Tensor, or sequence of Tensor
        The model's state before and after the client's step: state dicts, or lists in state-dict order as
        federated frameworks send them (then give `names`), of tensors or numpy arrays. Buffers may be among
        them; they are left out.
    lr : float
        The learning rate of the step.
    weight_decay : float
        Of ``torch.optim.SGD``, where it is added to the gradient.
    momentum : float
        Must be 0. (A first step with momentum from an empty buffer is a plain step: say 0 then.)
    steps : int
        Local steps of the client. Must be 1: a sum of gradients at different weights cannot be taken apart.
    names : sequence of str, optional
        Names of the tensors when `before` and `after` are sequences: ``list(model.state_dict())``.
    parameters : sequence of str, optional
        Names of the model's parameters, ``[n for n, _ in model.named_parameters()]``. Without it, buffers are
        known by torch's names for them (``running_mean``, ``running_var``, ``num_batches_tracked``) and by
        not being floating point.

    Returns
    -------
    dict of str to Tensor
        Gradients by parameter name, in the order of `before`, for ``rconv_fast.invert``.

    Raises
    ------
    ArgumentError
        When names or shapes differ, values are not finite, or the update cannot be undone exactly: momentum,
        several steps, or changed running statistics (batch norm in training mode, where one sample's gradient
        depends on the whole batch).

    Notes
    -----
    The weights were rounded after the step, which leaves a relative error of about
    ``6e-8 * |weight| / (lr * |gradient|)`` in a float32 gradient. The subtraction itself is done in float64.

    Examples
    --------
    >>> before = {"weight": torch.tensor([1.0, 2.0])}
    >>> after = {"weight": torch.tensor([0.5, 2.0])}
    >>> gradients_from_update(before, after, lr=0.5)
    {'weight': tensor([1., 0.])}
    """
    require(0 < lr < math.inf, _FUNCTION, "lr", "be positive and finite", lr)
    require(weight_decay >= 0, _FUNCTION, "weight_decay", "be >= 0", weight_decay)
    require(
        momentum == 0,
        _FUNCTION,
        "momentum",
        "be 0 (an update with momentum mixes in earlier gradients)",
        momentum,
    )
    require(steps == 1, _FUNCTION, "steps", "be 1 (several steps add gradients taken at different weights)", steps)
    old = _by_name("before", before, names)
    new = _by_name("after", after, names)
    missing, extra = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    require(not missing, _FUNCTION, "after", f"hold {missing[:1]}", f"{len(new)} tensors without it")
    require(not extra, _FUNCTION, "after", "hold only the names of before", f"also {extra[:1]}")
    wanted = None if parameters is None else set(parameters)
    if wanted is not None:
        absent = sorted(wanted - old.keys())
        require(not absent, _FUNCTION, "before", "hold every parameter", f"none called {absent[:1]}")

    gradients = {}
    for name, tensor in old.items():
        other = new[name].to(tensor.device)
        require(
            tensor.shape == other.shape,
            _FUNCTION,
            f"after[{name!r}]",
            f"have shape {tuple(tensor.shape)}",
            tuple(other.shape),
        )
        if _is_buffer(name, tensor, wanted):
            _refuse_training_mode(name, tensor, other)
            continue
        for side, value in (("before", tensor), ("after", other)):
            require(bool(value.isfinite().all()), _FUNCTION, f"{side}[{name!r}]", "be finite", "NaN or Inf")
        gradient = (tensor.double() - other.double()) / lr - weight_decay * tensor.double()
        gradients[name] = gradient.detach().to(torch.promote_types(tensor.dtype, other.dtype))
    require(bool(gradients), _FUNCTION, "before", "hold at least one floating-point parameter", "none")
    return gradients


def _by_name(argument: str, state: State, names: Sequence[str] | None) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        require_type(
            isinstance(state, Sequence) and not isinstance(state, str | bytes),
            _FUNCTION,
            argument,
            "be a mapping or a sequence of tensors",
            type(state).__name__,
        )
        require(names is not None, _FUNCTION, "names", "be given when before and after are sequences", None)
        assert names is not None
        require(
            len(names) == len(state),
            _FUNCTION,
            argument,
            f"hold {len(names)} tensors, one a name",
            len(state),
        )
        state = dict(zip(names, state, strict=True))
    tensors = {}
    for name, value in state.items():
        kind = type(value).__name__
        require_type(isinstance(value, Tensor | np.ndarray), _FUNCTION, f"{argument}[{name!r}]", "be a tensor", kind)
        tensors[name] = torch.as_tensor(value)
    return tensors


def _is_buffer(name: str, tensor: Tensor, parameters: set[str] | None) -> bool:
    if parameters is not None:
        return name not in parameters
    last = name.rpartition(".")[2]
    return last in _RUNNING_STATISTICS + _OTHER_BUFFERS or not tensor.is_floating_point()


def _refuse_training_mode(name: str, before: Tensor, after: Tensor) -> None:
    last = name.rpartition(".")[2]
    require(
        last not in _RUNNING_STATISTICS + _OTHER_BUFFERS or torch.equal(before, after),
        _FUNCTION,
        f"after[{name!r}]",
        "be unchanged (the model trained with batch norm in training mode, which mixes the samples)",
        "a changed value",
    )
