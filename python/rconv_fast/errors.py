"""The package's own errors: one line each, naming the argument, what it must be and what it was."""

from __future__ import annotations

from collections.abc import Mapping
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
    layer : str
        The layer whose input was being solved for.
    features : dict[str, Tensor]
        The inputs recovered before, by layer name.
    partial : Tensor or None
        The iterate of the solve that was interrupted.
    """

    def __init__(self, layer: str, features: Mapping[str, Any], partial: Any = None) -> None:
        self.layer = layer
        self.features = dict(features)
        self.partial = partial
        known = ", ".join(self.features) or "nothing"
        super().__init__(f"invert: interrupted at {layer!r}; recovered up to there: inputs of {known}")


class UnsupportedModelError(RconvError, ValueError):
    """The recursion cannot pass a module of the model.

    Attributes
    ----------
    module : str
        Qualified name of the module (or of the function call) that stops the recursion.
    reason : str
        Why it stops there.
    features : dict[str, Tensor]
        What was recovered before the stop: the input of each layer behind ``module``, by layer name.
    """

    def __init__(self, module: str, reason: str, features: Mapping[str, Any] | None = None) -> None:
        self.module = module
        self.reason = reason
        self.features = dict(features or {})
        known = ", ".join(self.features) or "nothing"
        super().__init__(
            f"invert: model must be invertible at {module!r}, got {reason}; recovered up to there: inputs of {known}"
        )


def require(condition: bool, function: str, argument: str, must: str, got: object) -> None:
    """Raise ``ArgumentError`` with the package's one-line message unless `condition` holds."""
    if not condition:
        raise ArgumentError(f"{function}: {argument} must {must}, got {got}")


def require_type(condition: bool, function: str, argument: str, must: str, got: object) -> None:
    """Raise ``ArgumentTypeError`` with the package's one-line message unless `condition` holds."""
    if not condition:
        raise ArgumentTypeError(f"{function}: {argument} must {must}, got {got}")
