"""What was seen: gradients, their noise and scale; how far a candidate answer is from them, in units of the noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rconv_fast.losses import Loss, logits_in
from rconv_fast.on_demand import TOGETHER

Noise = Mapping[str, "float | Tensor"]


@dataclass(frozen=True)
class LocalTraining:
    """A client's SGD between the weights it was sent and those it sends back.

    Attributes
    ----------
    lr : float
        Learning rate.
    steps : int
        Local steps.
    momentum, weight_decay : float
        Of ``torch.optim.SGD``, with an empty buffer before the first step.
    """

    lr: float
    steps: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __str__(self) -> str:
        parts = [f"update, lr {self.lr:g}"]
        parts += [f"{self.steps} steps"] if self.steps > 1 else []
        parts += [f"momentum {self.momentum:g}"] if self.momentum else []
        parts += [f"weight decay {self.weight_decay:g}"] if self.weight_decay else []
        return ", ".join(parts)


class SharedGradients(dict[str, Tensor]):
    """Gradients by parameter name, with what is known of how they came about.

    Attributes
    ----------
    noise : dict of str to float or Tensor, or None
        Standard deviation of each entry, by parameter name; None where nothing is known of it.
    scale_known : bool
        False where an unknown factor multiplies all gradients (clipping).
    steps : int
        Local steps behind them.
    source : str
        One phrase: ``"gradients"``, ``"update, lr 0.1"``, ``"gaussian 0.001"``.
    statistics : dict of str to Tensor
        Buffers that the client's step changed (running statistics), by name, after the step.
    training : LocalTraining or None
        Where they follow from an update: how the client trained.
    """

    def __init__(
        self,
        gradients: Mapping[str, Tensor],
        *,
        noise: Noise | None = None,
        scale_known: bool = True,
        steps: int = 1,
        source: str = "gradients",
        statistics: Mapping[str, Tensor] | None = None,
        training: LocalTraining | None = None,
    ) -> None:
        super().__init__(gradients)
        self.noise = None if noise is None else dict(noise)
        self.scale_known = scale_known
        self.steps = steps
        self.source = source
        self.statistics = dict(statistics or {})
        self.training = training

    def replaced(self, gradients: Mapping[str, Tensor]) -> SharedGradients:
        """The same with other values: those of a working precision."""
        return SharedGradients(
            gradients,
            noise=self.noise,
            scale_known=self.scale_known,
            steps=self.steps,
            source=self.source,
            statistics=self.statistics,
            training=self.training,
        )


@dataclass(frozen=True)
class Match:
    """How a candidate answer compares with what was seen.

    Attributes
    ----------
    relative : float
        ``||grad - seen|| / ||seen||`` over all parameters.
    ratio : float
        Root mean square of the mismatch in units of the noise: 1 is what a true answer has.
    chi2 : float
        Sum of the squares in units of the noise.
    entries : int
        Entries compared that are no structural zeros (zero in both, whatever the input).
    """

    relative: float
    ratio: float
    chi2: float
    entries: int


@dataclass(frozen=True)
class Observation:
    """The gradients of one step in working precision, their noise, and the loss they belong to.

    Attributes
    ----------
    gradients : mapping of str to Tensor
        By parameter name, in the working dtype and on the model's device; parameters that were not seen are absent.
    loss : Loss
        The client's loss.
    noise : mapping of str to float or Tensor
        Standard deviation of each entry.
    rounding : float
        Relative rounding of the arithmetic that made them (2^-53 for float64), the smallest noise there is.
    scale : float or None
        Factor by which the gradients are multiplied; None where it is not known (a reading of the head finds it).
    source : str
        Where the noise comes from, for the report.
    """

    gradients: Mapping[str, Tensor]
    loss: Loss
    noise: Noise = field(default_factory=dict)
    rounding: float = 2.0**-53
    scale: float | None = 1.0
    source: str = "gradients"

    @property
    def precision(self) -> float:
        """Relative spacing of the values: twice the rounding."""
        return 2 * self.rounding

    @property
    def factor(self) -> float:
        """The scale, 1 where it is not known."""
        return 1.0 if self.scale is None else self.scale

    def compare(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Match:
        """Run the model on a candidate and compare all gradients, in float64."""
        found = self.gradients_at(model, inputs, targets)
        miss2 = seen2 = chi2 = 0.0
        entries = 0
        for name, seen in self.gradients.items():
            sigma = self.sigma(name).double().clamp_min(torch.finfo(torch.float64).tiny)  # 0 / 0 is no mismatch
            noise = sigma.reshape(-1).split(TOGETHER) if sigma.numel() == seen.numel() else itertools.repeat(sigma)
            parts = (found[name].reshape(-1).split(TOGETHER), seen.reshape(-1).split(TOGETHER))
            for other, own, deviation in zip(*parts, noise, strict=False):
                difference = (other - own).double()
                miss2 += float(difference.square().sum())
                seen2 += float(own.double().square().sum())
                chi2 += float((difference / deviation).square().sum())
                entries += int(torch.count_nonzero((own != 0) | (other != 0)))
        relative = math.sqrt(miss2 / seen2) if math.isfinite(miss2) and seen2 > 0 else math.inf
        ratio = math.sqrt(chi2 / max(entries, 1)) if math.isfinite(chi2) else math.inf
        return Match(relative, ratio, chi2, entries)

    def gradients_at(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Gradients of the scaled loss at a candidate, by name; zeros for parameters it does not reach.

        A model in training mode is left with the running statistics it had.
        """
        parameters = {name: p for name, p in model.named_parameters() if name in self.gradients}
        buffers = [(b, b.clone()) for b in model.buffers()]
        with torch.enable_grad():
            for p in parameters.values():
                p.requires_grad_(True)
            value = self.factor * self.loss(logits_in(model(inputs)), targets)
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for buffer, before in buffers:
            if not torch.equal(buffer, before):  # in evaluation mode a graph of another run may hold it
                buffer.copy_(before)
        return {
            name: torch.zeros_like(p) if g is None else g.detach()
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }

    def sigma(self, name: str) -> Tensor:
        """Standard deviation of the entries of one gradient, broadcastable to it; the rounding where none is stated."""
        given = self.noise.get(name)
        if isinstance(given, Tensor) and given.ndim:  # of the gradient's shape, and on its device
            return given.double()
        seen = self.gradients[name]
        if given is None:
            given = self.rounding * float(seen.double().square().mean().sqrt())
        return torch.as_tensor(given, dtype=torch.float64, device=seen.device)
