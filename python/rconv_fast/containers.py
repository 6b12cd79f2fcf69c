"""Names and tensors out of whatever holds them: state dicts, checkpoints, lists of arrays, Flower's records.

Nothing here imports a federated framework: its objects are known by what they have.
"""

from __future__ import annotations

import io
import numbers
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rconv_fast.errors import ArgumentTypeError, require, require_type

_ARRAYS = (Tensor, np.ndarray, np.generic, numbers.Number)
# Under these names checkpoints hold the state of the model, beside that of the optimiser and the like.
_NESTED = ("state_dict", "model_state_dict", "model", "net", "params", "parameters", "weights", "gradients", "grads")
# What torch.compile, DataParallel (and DDP) and Opacus put before, or into, the names of what they wrap.
WRAPPERS = ("_orig_mod", "module", "_module")


def open_container(state: Any) -> Any:
    """The mapping or list of tensors inside a model, a checkpoint, or a Flower object; others as they are."""
    if isinstance(state, nn.Module):
        return state.state_dict()
    if hasattr(state, "tensors") and hasattr(state, "tensor_type"):  # Flower's Parameters: serialised arrays
        return [np.load(io.BytesIO(data), allow_pickle=False) for data in state.tensors]
    if hasattr(state, "content") and hasattr(state.content, "array_records"):  # Flower's Message
        state = state.content
    records = getattr(state, "array_records", None)
    if isinstance(records, Mapping) and len(records) == 1:  # Flower's RecordDict
        return next(iter(records.values()))
    if isinstance(state, Mapping):
        for key in _NESTED:
            if isinstance(state.get(key), Mapping) and state[key]:
                return open_container(state[key])
    return state


def is_tensor_like(value: Any) -> bool:
    """Whether `as_tensor` takes it: torch, numpy, a number, or something that turns into numpy (Flower's Array)."""
    return isinstance(value, _ARRAYS) or hasattr(value, "numpy") or hasattr(value, "__array__")


def as_tensor(value: Any) -> Tensor:
    """A dense, detached tensor of the same dtype; numpy arrays are copied."""
    if not isinstance(value, _ARRAYS):
        value = value.numpy() if hasattr(value, "numpy") else np.asarray(value)
    if isinstance(value, np.ndarray | np.generic):
        native = np.array(value, dtype=np.asarray(value).dtype.newbyteorder("="))
        return torch.from_numpy(native)
    tensor = torch.as_tensor(value).detach()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def read_tensor(function: str, argument: str, value: Any) -> Tensor:
    """`as_tensor` of what came from outside: numbers, nested lists and arrays, or the package's own error."""
    try:
        return as_tensor(value if is_tensor_like(value) else np.asarray(value))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentTypeError(f"{function}: {argument} must hold numbers, got {type(value).__name__}") from error


def require_names(function: str, argument: str, names: object) -> None:
    """Raise ``ArgumentTypeError`` unless `names` is a sequence of str."""
    listed = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(n, str) for n in names)
    require_type(listed, function, argument, "be a sequence of str", type(names).__name__)


def read_state(function: str, argument: str, state: Any, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Tensors by plain name: out of its container, dense, without the prefixes of wrappers.

    Parameters
    ----------
    function, argument : str
        For the error messages.
    state : mapping, sequence, nn.Module or a Flower object
        See `open_container`. Values may be torch or numpy, of any dtype; ``_extra_state`` is left out.
    names : sequence of str, optional
        Of a sequence's entries.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Names are missing or do not fit; a value is no tensor.
    """
    opened = open_container(state)
    if not isinstance(opened, Mapping):
        listed = isinstance(opened, Iterable) and not isinstance(opened, str | bytes | Tensor)
        must = "be a mapping or a sequence of tensors"
        require_type(listed, function, argument, must, type(opened).__name__)
        entries = list(opened)
        must = "be given when states are sequences, as in list(model.state_dict())"
        require(names is not None, function, "names", must, None)
        assert names is not None
        require_names(function, "names", names)
        require(len(names) == len(entries), function, argument, f"hold {len(names)} tensors, one a name", len(entries))
        opened = dict(zip(names, entries, strict=True))
    tensors = {}
    for name, value in opened.items():
        if str(name).endswith("_extra_state"):
            continue
        must, kind = "be a tensor", type(value).__name__
        require_type(is_tensor_like(value), function, f"{argument}[{name!r}]", must, kind)
        tensors[str(name)] = read_tensor(function, f"{argument}[{name!r}]", value)
    return dict(zip(plain_names(list(tensors)), tensors.values(), strict=True))


def plain_names(names: Sequence[str]) -> list[str]:
    """Names without the prefixes of wrappers: those of torch.compile anywhere, others where every name has one.

    Examples
    --------
    >>> plain_names(["module.conv._orig_mod.weight", "module.fc.bias"])
    ['conv.weight', 'fc.bias']
    """
    plain = [without(name, WRAPPERS[:1]) for name in names]
    while plain and any(all(name.startswith(f"{prefix}.") for name in plain) for prefix in WRAPPERS):
        plain = [name.partition(".")[2] for name in plain]
    return plain


def known_as(given: Iterable[str], known: Iterable[str]) -> dict[str, str | None]:
    """Which of the known names each given one means, whatever wrappers either has been through; None for no one.

    Examples
    --------
    >>> known_as(["module.fc.bias", "fc.weight", "conv.bias"], ["fc.weight", "fc._orig_mod.bias"])
    {'module.fc.bias': 'fc._orig_mod.bias', 'fc.weight': 'fc.weight', 'conv.bias': None}
    """
    names = dict.fromkeys(known)
    bare = [_bare(name) for name in names]
    count = Counter(bare)
    unique = {b: name for b, name in zip(bare, names, strict=True) if count[b] == 1}
    return {name: name if name in names else unique.get(_bare(name)) for name in given}


def _bare(name: str) -> str:
    return without(name, WRAPPERS)


def without(name: str, parts: Sequence[str]) -> str:
    """A dotted name without some of its parts."""
    return ".".join(part for part in name.split(".") if part not in parts)
