"""What a baseline is given, checked once, and how its answer becomes an `Inversion`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from rconv_fast.budget import Budget
from rconv_fast.errors import require, require_type
from rconv_fast.estimate.noise_model import noise_of
from rconv_fast.losses import Loss
from rconv_fast.observation import Noise, Observation
from rconv_fast.progress import Event, progress_callback
from rconv_fast.received import read_gradients
from rconv_fast.result import Inversion, Sample
from rconv_fast.walk.report import LayerReport
from rconv_fast.wrappers import working_copy


class Options(TypedDict, total=False):
    """Options that all baselines share; they mean what they mean in ``rconv_fast.invert``.

    Attributes
    ----------
    batch_size : int or None
        Samples behind the gradients: the number of `labels`, else 1.
    labels : sequence of int or Tensor, or None
        Labels (targets where the loss takes values); found where the method can.
    loss, reduction, label_smoothing, class_weights
        The client's loss, see ``rconv_fast.losses.Loss``.
    scale : float or None
        Factor by which the gradients are multiplied; None, not known, is taken as 1.
    noise : float, mapping or None
        Standard deviation of the entries, relative to each tensor's root mean square or by parameter name.
    dtype : torch.dtype
        Working precision, float64 if not given.
    time_limit : float or None
        Seconds after which the best answer so far is returned.
    progress : bool or callable
        Show a progress bar, or call this with each ``Event``.
    seed : int
        Of everything that is drawn, 0 if not given.
    """

    batch_size: int | None
    labels: Sequence[int] | Tensor | None
    loss: str
    reduction: str
    label_smoothing: float
    class_weights: Tensor | None
    scale: float | None
    noise: float | Noise | None
    dtype: torch.dtype
    time_limit: float | None
    progress: bool | Callable[[Event], None]
    seed: int


@dataclass(frozen=True)
class Problem:
    """One inversion to be tried.

    Attributes
    ----------
    function : str
        The baseline's name, for messages.
    model : nn.Module
        A copy in the working precision.
    observation : Observation
        What was seen, in the working precision.
    input_shape : tuple of int
        Of one sample.
    batch_size : int
        Samples behind the gradients.
    labels : Tensor or None
        As far as they were given.
    budget : Budget
        When to stop.
    seed : int
        Of everything that is drawn.
    report : callable
        Takes each ``Event``.
    """

    function: str
    model: nn.Module
    observation: Observation
    input_shape: tuple[int, ...]
    batch_size: int
    labels: Tensor | None
    budget: Budget
    seed: int
    report: Callable[[Event], None]

    @property
    def like(self) -> Tensor:
        """A tensor of the working precision, on the device."""
        return next(iter(self.observation.gradients.values()))

    def normal(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Standard normal numbers, the same on every device."""
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(self.like)

    def outputs(self, inputs: Tensor) -> Tensor:
        """What the model returns, without a graph."""
        with torch.no_grad():
            found: Tensor = self.model(inputs)
        return found

    def answer(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        held: Tensor | None = None,
        notes: Sequence[str] = (),
        layers: Sequence[LayerReport] = (),
        features: Mapping[str, Tensor] | None = None,
    ) -> Inversion:
        """An answer without a proof: compared with all gradients, but not shown to be the only one."""
        match = self.observation.compare(self.model, inputs, targets)
        determined = torch.zeros_like(inputs, dtype=torch.bool) if held is None else held.expand_as(inputs).clone()
        error = torch.where(determined, 0.0, math.inf).to(inputs)
        samples = [Sample(t.tolist(), match.relative, status="approximate", error=math.inf) for t in targets]
        return Inversion(
            verdict="approximate",
            inputs=inputs,
            labels=targets,
            layers=list(layers),
            gradient_residual=match.relative,
            noise_ratio=match.ratio,
            determined=determined,
            uncertainty=error,
            samples=samples,
            batch_size=len(inputs),
            features=dict(features or {}),
            scale=self.observation.factor,
            notes=[f"{self.function}: nothing shows that no other input has these gradients", *notes],
        )

    def stopped(self, at: str, reason: str, features: Mapping[str, Tensor], layers: Sequence[LayerReport]) -> Inversion:
        """No inputs: what was found before layer `at`, and why it ended there."""
        return Inversion(
            verdict="features" if features else "nothing",
            layers=list(layers),
            batch_size=self.batch_size,
            features=dict(features),
            stops_at=at,
            reason=reason,
            scale=self.observation.factor,
        )


@contextmanager
def posed(
    function: str,
    model: nn.Module,
    gradients: Mapping[str, Tensor] | Sequence[Tensor],
    input_shape: Sequence[int],
    options: Options,
) -> Iterator[Problem]:
    """Check the arguments of a baseline; its progress is shown until the block ends."""
    unknown = sorted(options.keys() - Options.__annotations__.keys())
    known = ", ".join(Options.__annotations__)
    require(not unknown, function, "options", f"be among {known}", ", ".join(unknown))
    require_type(isinstance(model, nn.Module), function, "model", "be a torch.nn.Module", type(model).__name__)
    shape = tuple(input_shape)
    sized = all(isinstance(n, int) and n >= 1 for n in shape)
    require(sized and bool(shape), function, "input_shape", "be one sample's shape", shape)
    dtype = options.get("dtype", torch.float64)
    require_type(dtype.is_floating_point, function, "dtype", "be a real floating type", dtype)
    work = working_copy(model, dtype)
    device = next(work.parameters()).device
    loss = Loss(
        options.get("loss", "cross_entropy"),
        options.get("reduction", "mean"),
        options.get("label_smoothing", 0.0),
        options.get("class_weights"),
    )
    shared = read_gradients(function, model, gradients)
    noise, source = noise_of(shared, options.get("noise"))
    seen = {name: g.detach().to(device, dtype) for name, g in shared.items()}
    observation = Observation(seen, loss, noise, scale=options.get("scale", 1.0), source=source)
    labels = options.get("labels")
    if labels is not None:
        labels = torch.as_tensor(labels, device=device)
        labels = labels.long() if loss.takes_labels else labels.to(dtype)
    size = options.get("batch_size") or (1 if labels is None else len(labels))
    agree = labels is None or len(labels) == size
    require(agree, function, "labels", f"hold {size} entries", "none" if labels is None else len(labels))
    budget = Budget.seconds(options.get("time_limit"))
    with progress_callback(options.get("progress", False)) as report:
        yield Problem(function, work, observation, shape, size, labels, budget, options.get("seed", 0), report)
