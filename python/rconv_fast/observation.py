"""What was seen: gradients, their noise and scale; how far a candidate answer is from them, in units of the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from rconv_fast.losses import Loss, logits_in
from rconv_fast.on_demand import entries, parts, root_mean_square

Noise = Mapping[str, "float | Tensor"]

# A gradient smaller than this many roundings of the largest is what rounding left of terms that cancel, as those of a
# bias in front of a batch norm do: its own size says nothing of its noise.
CANCELLED = 10.0

OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class LocalTraining:
    """A client's training between the weights it was sent and those it sends back.

    Attributes
    ----------
    lr : float
        Learning rate.
    steps : int
        Local steps.
    momentum, weight_decay : float
        Of ``torch.optim.SGD``, with an empty buffer before the first step; Adam has a weight decay only.
    optimizer : {"sgd", "adam", "adamw"}
        Of Adam only the first step is covered.
    eps : float
        Of Adam.
    """

    lr: float
    steps: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: str = "sgd"
    eps: float = 1e-8

    def __str__(self) -> str:
        parts = [f"update, lr {self.lr:g}"]
        parts += [f"first step of {self.optimizer}"] if self.optimizer != "sgd" else []
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
class _Miss:
    """Sums of squares over some entries: of the mismatch, of what was seen, of the mismatch in units of the noise."""

    miss2: float = 0.0
    seen2: float = 0.0
    chi2: float = 0.0
    entries: int = 0

    def __add__(self, other: _Miss) -> _Miss:
        return _Miss(
            self.miss2 + other.miss2, self.seen2 + other.seen2, self.chi2 + other.chi2, self.entries + other.entries
        )

    @property
    def match(self) -> Match:
        relative = math.sqrt(self.miss2 / self.seen2) if math.isfinite(self.miss2) and self.seen2 > 0 else math.inf
        ratio = math.sqrt(self.chi2 / max(self.entries, 1)) if math.isfinite(self.chi2) else math.inf
        return Match(relative, ratio, self.chi2, self.entries)


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
        """Run the model on a candidate and compare all gradients, in float64, one after the other."""
        missed: dict[str, _Miss] = {}

        def look(name: str, found: Tensor) -> None:
            missed[name] = self._miss(name, found)

        self._visit(model, inputs, targets, look)
        for name in self.gradients.keys() - missed.keys():
            look(name, torch.zeros_like(self.gradients[name]))
        return sum(missed.values(), _Miss()).match

    def _miss(self, name: str, found: Tensor) -> _Miss:
        total, flat = _Miss(), found.reshape(-1)
        least = torch.finfo(torch.float64).tiny  # 0 / 0 is no mismatch
        for part in parts(self.gradients, name):
            own, other = entries(self.gradients, name, part), flat[part]
            seen, difference = own.double(), (other - own).double()
            deviation = self.sigma(name, part).clamp_min(least)
            in_units = difference / deviation
            total += _Miss(
                float(torch.dot(difference, difference)),
                float(torch.dot(seen, seen)),
                float(torch.dot(in_units, in_units)),
                int(torch.count_nonzero((own != 0) | (other != 0))),
            )
        return total

    def gradients_at(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Gradients of the scaled loss at a candidate, by name; zeros for parameters it does not reach.

        A model in training mode is left with the running statistics it had.
        """
        found: dict[str, Tensor] = {}
        self._visit(model, inputs, targets, found.__setitem__)
        parameters = {name: p for name, p in model.named_parameters() if name in self.gradients}
        return {name: found[name] if name in found else torch.zeros_like(p) for name, p in parameters.items()}

    def _visit(self, model: nn.Module, inputs: Tensor, targets: Tensor, visit: Callable[[str, Tensor], None]) -> None:
        """Show the gradient of every parameter that the loss reaches as soon as it is there; none is kept."""
        parameters = {name: p for name, p in model.named_parameters() if name in self.gradients}
        buffers = [(b, b.clone()) for b in model.buffers()]

        def shown(name: str) -> Callable[[Tensor], None]:
            def show(p: Tensor) -> None:
                gradient, p.grad = p.grad, None
                assert gradient is not None
                visit(name, gradient)

            return show

        for p in parameters.values():
            p.requires_grad_(True)
        handles = [p.register_post_accumulate_grad_hook(shown(name)) for name, p in parameters.items()]
        try:
            with torch.enable_grad():
                value = self.factor * self.loss(logits_in(model(inputs)), targets)
                value.backward(inputs=list(parameters.values()))
        finally:
            for handle in handles:
                handle.remove()
        for buffer, before in buffers:
            if not torch.equal(buffer, before):  # in evaluation mode a graph of another run may hold it
                buffer.copy_(before)

    @cached_property
    def _sizes(self) -> dict[str, float]:
        """Root mean square of each gradient."""
        return {name: root_mean_square(self.gradients, name) for name in self.gradients}

    def sigma(self, name: str, part: slice | None = None) -> Tensor:
        """Standard deviation of the entries of one gradient, or of a slice of them in flat order.

        Broadcastable to them; the rounding where none is stated.
        """
        given: float | Tensor
        if name not in self.noise:
            size, rest = self._sizes[name], CANCELLED * self.precision * max(self._sizes.values())
            given = self.rounding * size if size > rest else rest
        else:
            given = self.noise[name] if part is None else entries(self.noise, name, part)
        device = entries(self.gradients, name, slice(0, 1)).device
        return torch.as_tensor(given, dtype=torch.float64, device=device)
