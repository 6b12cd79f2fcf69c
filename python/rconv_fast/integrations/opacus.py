"""Opacus' private steps as shared gradients, to audit them with and without their noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rconv_fast.errors import MissingDependencyError, require_type
from rconv_fast.observation import SharedGradients
from rconv_fast.wrappers import plain_parameters

try:
    from opacus.optimizers import DPOptimizer
except ImportError as error:
    raise MissingDependencyError('an audit of Opacus needs opacus: pip install "rconv-fast[opacus]"') from error


class StepRecorder:
    """Keeps what the last step of a private optimiser shared.

    Opacus clips every sample's gradient, sums, adds noise and divides by the expected batch size. The recorder sees
    both sides of the noise.

    Parameters
    ----------
    optimizer : opacus.optimizers.DPOptimizer
        As ``PrivacyEngine.make_private`` returns it. A step hook that it has goes on running.
    model : nn.Module
        As returned with it; names are those of the model inside.

    Attributes
    ----------
    shared : SharedGradients or None
        What was shared: with noise, its standard deviation in ``.noise``.
    clean : SharedGradients or None
        The same before the noise.

    Examples
    --------
    ::

        recorder = StepRecorder(optimizer, model)
        loss.backward()
        optimizer.step()
        found = rconv_fast.invert(model, recorder.shared, input_shape)
    """

    def __init__(self, optimizer: DPOptimizer, model: nn.Module) -> None:
        private = isinstance(optimizer, DPOptimizer)
        require_type(private, "StepRecorder", "optimizer", "be a DPOptimizer", type(optimizer).__name__)
        self.shared: SharedGradients | None = None
        self.clean: SharedGradients | None = None
        self._parameters = plain_parameters(model)
        self._next: Callable[[Any], None] | None = optimizer.step_hook
        optimizer.attach_step_hook(self._record)

    def _record(self, optimizer: DPOptimizer) -> None:
        """After the noise, before the step: ``grad = (summed_grad + noise) / divisor``."""
        divisor = 1.0
        if optimizer.loss_reduction == "mean":
            divisor = float(optimizer.expected_batch_size * optimizer.accumulated_iterations)
        private = {name: p for name, p in self._parameters.items() if getattr(p, "summed_grad", None) is not None}
        sigma = optimizer.noise_multiplier * optimizer.max_grad_norm / divisor
        noisy: dict[str, Tensor] = {name: p.grad.detach().clone() for name, p in private.items() if p.grad is not None}
        clean = {name: _summed(p).detach().view_as(p) / divisor for name, p in private.items()}
        about = f"DP-SGD, noise multiplier {optimizer.noise_multiplier:g}, clip {optimizer.max_grad_norm:g}"
        self.shared = SharedGradients(noisy, noise=dict.fromkeys(noisy, sigma), scale_known=False, source=about)
        self.clean = SharedGradients(clean, scale_known=False, source=f"{about}, before the noise")
        if self._next is not None:
            self._next(optimizer)


def _summed(parameter: Tensor) -> Tensor:
    summed: Tensor = parameter.summed_grad  # type: ignore[attr-defined]
    return summed
