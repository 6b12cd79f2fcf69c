"""What several commands take: shapes, batch sizes, a device, a model by its SPEC, its state."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rconv_fast import errors
from rconv_fast.containers import known_as, read_state
from rconv_fast.report.files import load_tensors
from rconv_fast.wrappers import unwrap

# Of a shape or a list of sizes: Python itself refuses numbers of more than 4300 digits.
LONGEST = 1000


class Device(str, Enum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"

    def resolve(self) -> torch.device:
        """Return the device, the GPU where there is one for `auto`."""
        available = torch.cuda.is_available()
        if self is Device.auto:
            return torch.device("cuda" if available else "cpu")
        usable = self is not Device.cuda or available
        errors.require(usable, "rconv-fast", "--device", "be available", f"{self.value} (torch sees no GPU)")
        return torch.device(self.value)


class Precision(str, Enum):
    """Precision of the model and of its gradients; the solves are done in float64 either way."""

    float64 = "float64"
    float32 = "float32"

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of that name."""
        return torch.float64 if self is Precision.float64 else torch.float32


def parse_shape(command: str, text: str) -> tuple[int, ...]:
    """``3x32x32`` as numbers."""
    matched = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text)
    errors.require(matched is not None, command, "--input-shape", "look like 3x32x32", repr(text))
    errors.require(len(text) <= LONGEST, command, "--input-shape", f"have at most {LONGEST} characters", len(text))
    return tuple(int(n) for n in text.split("x"))


def parse_batches(command: str, text: str) -> list[int]:
    """``1,4,8`` as numbers."""
    matched = re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text)
    errors.require(matched is not None, command, "--batch", "be positive numbers, as in 1,4,8", repr(text))
    errors.require(len(text) <= LONGEST, command, "--batch", f"have at most {LONGEST} characters", len(text))
    return [int(n) for n in text.split(",")]


def build_model(command: str, spec: str) -> nn.Module:
    """The model that a SPEC names: this runs the user's own code.

    Parameters
    ----------
    command : str
        For the error messages.
    spec : str
        ``PKG.MODULE:FACTORY`` or ``path/to/file.py:FACTORY``, where FACTORY is called without arguments (or is a
        module already), or the name of a network in ``rconv_fast.models``.
    """
    from rconv_fast.models import MODELS

    if spec in MODELS:
        return MODELS[spec]()
    place, _, name = spec.rpartition(":")
    must = f"look like PKG.MODULE:FACTORY or file.py:FACTORY, or be one of {', '.join(MODELS)}"
    errors.require(bool(place and name), command, "--model", must, repr(spec))
    try:
        found: Any = _module(place)
        for part in name.split("."):
            found = getattr(found, part)
        model = found if isinstance(found, nn.Module) else found()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise errors.ArgumentError(
            f"{command}: --model must be importable and callable, got {spec}: {reason}"
        ) from error
    errors.require_type(
        isinstance(model, nn.Module), command, "--model", "return a torch.nn.Module", type(model).__name__
    )
    assert isinstance(model, nn.Module)
    return unwrap(model)


def load_state(command: str, model: nn.Module, path: Path) -> nn.Module:
    """Fill the model in the precision of the file, as it is in a checkpoint of any of the usual forms."""
    own = model.state_dict()
    read = read_state(command, "--state", load_tensors(path, "--state"), list(own))
    meant = known_as(read, own)
    state = {meant[name] or name: tensor for name, tensor in read.items()}
    dtypes = {t.dtype for t in state.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        model = model.to(dtypes.pop())
    scalars = {n: t.reshape(own[n].shape) for n, t in state.items() if n in own and t.numel() == own[n].numel() == 1}
    try:
        model.load_state_dict({**state, **scalars})
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)
        raise errors.ArgumentError(f"{command}: --state must fit the model, got {reason}") from error
    return model


def _module(place: str) -> Any:
    """A module by its dotted name, or the one in a file; the file's own folder is looked in for what it imports."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no file {place}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)
    specification.loader.exec_module(module)
    return module
