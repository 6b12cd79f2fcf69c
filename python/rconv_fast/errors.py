"""The package's own errors: one line each, naming the argument, what it must be and what it was."""

from __future__ import annotations

import importlib
import numbers
from types import ModuleType
from typing import Any

# what torch's own factorisations raise: public, missing in its stubs
from torch.linalg import LinAlgError as LinAlgError  # type: ignore[attr-defined]


class RconvError(Exception):
    """Base class of every error this package raises on purpose."""


class ArgumentError(RconvError, ValueError):
    """An argument has the wrong shape, value or name."""


class ArgumentTypeError(RconvError, TypeError):
    """An argument has the wrong Python type or dtype."""


class SystemTooLargeError(RconvError, MemoryError):
    """A system would not fit in memory; the message holds the need and the limit in bytes."""


class BuildError(RconvError, RuntimeError):
    """The binary lacks what was asked of it (for example, it was built without CUDA)."""


class MissingDependencyError(RconvError, ImportError):
    """An optional dependency is not installed; the message holds the command that installs it."""


class InterruptedInversionError(RconvError, KeyboardInterrupt):
    """Ctrl-C during an inversion.

    Attributes
    ----------
    inversion : Inversion
        Everything that was recovered before.
    """

    def __init__(self, inversion: Any) -> None:
        self.inversion = inversion
        known = ", ".join(inversion.features) or "nothing"
        super().__init__(f"invert: interrupted at {inversion.stops_at!r}; recovered up to there: inputs of {known}")


class UnsupportedModelError(RconvError, ValueError):
    """A model that cannot be read layer by layer.

    Attributes
    ----------
    module : str
        Qualified name of the module (or of the function call) where reading ends.
    reason : str
        Why it ends there.
    """

    def __init__(self, module: str, reason: str) -> None:
        self.module = module
        self.reason = reason
        super().__init__(f"invert: model must be readable at {module!r}, got {reason}")


def require(condition: bool, function: str, argument: str, must: str, got: object) -> None:
    """Raise ``ArgumentError`` with the package's one-line message unless `condition` holds."""
    if not condition:
        raise ArgumentError(f"{function}: {argument} must {must}, got {got}")


def require_type(condition: bool, function: str, argument: str, must: str, got: object) -> None:
    """Raise ``ArgumentTypeError`` with the package's one-line message unless `condition` holds."""
    if not condition:
        raise ArgumentTypeError(f"{function}: {argument} must {must}, got {got}")


def require_number(function: str, argument: str, got: object) -> None:
    """Raise ``ArgumentTypeError`` unless `got` is a real number."""
    real = isinstance(got, numbers.Real) and not isinstance(got, bool)
    require_type(real, function, argument, "be a number", f"{type(got).__name__}")


def require_count(function: str, argument: str, got: object) -> None:
    """Raise one of the package's errors unless `got` is an int of at least 1."""
    whole = isinstance(got, numbers.Integral) and not isinstance(got, bool)  # numpy's count as well
    require_type(whole, function, argument, "be an int", repr(got))
    assert isinstance(got, numbers.Integral)
    require(int(got) >= 1, function, argument, "be at least 1", got)


def optional(module: str, extra: str, function: str) -> ModuleType:
    """Import a module that an extra of this package installs.

    Parameters
    ----------
    module : str
        Its name.
    extra : str
        The extra in ``pip install "rconv-fast[EXTRA]"``.
    function : str
        Who needs it, for the message.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        command = f'pip install "rconv-fast[{extra}]"'
        raise MissingDependencyError(f"{function}: {module} must be installed, got none: {command}") from error
