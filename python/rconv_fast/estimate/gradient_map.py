"""All seen gradients as one function of the unknown input, in units of their noise, and its two Jacobian products.

    ``r(x) = (c dL/dp(x) - seen_p) / sigma_p``,   ``J v`` and ``J^T u`` with ``J = dr/dx``

``J^T u`` is linear in u, so differentiating it once more gives J: reverse mode twice, which every layer knows that can
be trained. Activations can be replaced by linear pieces, which makes r smooth while x moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rconv_fast.losses import Loss
from rconv_fast.walk.graph import Graph

Parts = list[Tensor]
Piece = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GradientMap:
    """The whitened residual of one observation.

    Attributes
    ----------
    model : nn.Module
        A working copy in the working dtype.
    loss, targets : Loss, Tensor
        The client's.
    seen : mapping of str to Tensor
        Observed gradients by parameter name.
    sigma : mapping of str to Tensor
        Standard deviations, broadcastable; infinite for entries that say nothing.
    graph : Graph or None
        The model's steps; without it the model is run as it is, and `pieces` must be empty.
    pieces : mapping of str to callable
        What stands for an activation, by step name.
    scale : float
        c.
    """

    model: nn.Module
    loss: Loss
    targets: Tensor
    seen: Mapping[str, Tensor]
    sigma: Mapping[str, Tensor]
    graph: Graph | None = None
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    scale: float = 1.0

    def with_pieces(self, pieces: Mapping[str, Piece]) -> GradientMap:
        """The same with other pieces."""
        return replace(self, pieces=pieces)

    def with_scale(self, scale: float) -> GradientMap:
        """The same with another factor."""
        return replace(self, scale=scale)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters whose gradients were seen."""
        found: dict[str, Tensor] = {n: p for n, p in self.model.named_parameters() if n in self.seen}
        for p in found.values():
            p.requires_grad_(True)
        return found

    def weight(self, name: str) -> Tensor:
        """``1 / sigma``, 0 where sigma is infinite."""
        return 1 / self.sigma[name]

    def values(self, x: Tensor, start: str | None = None) -> dict[str, Tensor]:
        """Every step's tensor of a run on x, which is the value of the step `start` (the input)."""
        assert self.graph is not None
        values = {start or self.graph.input: x}
        for name, step in list(self.graph.steps.items())[1:]:
            if name not in values and all(operand in values for operand in step.inputs):
                run: Piece = self.pieces.get(name, step.forward)
                values[name] = run(*(values[operand] for operand in step.inputs))
        return values

    def outputs(self, x: Tensor) -> Tensor:
        """What the model returns, with the pieces in place."""
        if self.graph is None:
            outputs: Tensor = self.model(x)
            return outputs
        return self.values(x)[self.graph.output]

    def gradients(self, x: Tensor) -> Parts:
        """``c dL/dp``, one a seen parameter; differentiable if x is."""
        with torch.enable_grad():
            value = self.scale * self.loss(self.outputs(x), self.targets)
            parameters = list(self.parameters.values())
            found = torch.autograd.grad(value, parameters, create_graph=x.requires_grad, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    def whiten(self, parts: Parts) -> Parts:
        """Each part over its noise."""
        return [part * self.weight(name) for name, part in zip(self.parameters, parts, strict=True)]

    def residual(self, x: Tensor) -> Parts:
        """``r(x)``, one part a parameter."""
        seen = [self.seen[name] for name in self.parameters]
        return self.whiten([found - s for found, s in zip(self.gradients(x), seen, strict=True)])

    def chi2(self, x: Tensor) -> float:
        """``||r||^2``."""
        return dot(*[self.residual(x.detach())] * 2)

    def at(self, x: Tensor) -> Linearisation:
        """Residual and Jacobian products at x."""
        return Linearisation(self, x)


class Linearisation:
    """``r`` and the products with ``J`` at one x (double backward, one graph for all products).

    Attributes
    ----------
    residual : list of Tensor
        ``r(x)``.
    scaled : list of Tensor
        ``dr / dlog c``: the model's gradients in units of the noise.
    """

    def __init__(self, problem: GradientMap, x: Tensor) -> None:
        self._x = x.detach().requires_grad_()
        self._r = problem.residual(self._x)
        self._u = [torch.zeros_like(part, requires_grad=True) for part in self._r]
        self._transposed = self._grad(self._r, self._x, self._u, create_graph=True)
        self.residual = [part.detach() for part in self._r]
        seen = problem.whiten([problem.seen[name] for name in problem.parameters])
        self.scaled = [r + s for r, s in zip(self.residual, seen, strict=True)]

    @staticmethod
    def _grad(of: Parts, x: Tensor, u: Parts, *, create_graph: bool = False, batched: bool = False) -> Tensor:
        live = [(part, v) for part, v in zip(of, u, strict=True) if part.requires_grad]
        outputs, vectors = [part for part, _ in live], [v for _, v in live]
        (found,) = torch.autograd.grad(
            outputs,
            x,
            vectors,
            create_graph=create_graph,
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=batched,
        )
        return found

    def adjoint(self, u: Parts) -> Tensor:
        """``J^T u``; u may have a leading axis of several."""
        return self._grad(self._r, self._x, u, batched=u[0].ndim > self._r[0].ndim).detach()

    def forward(self, v: Tensor) -> Parts:
        """``J v``; v may have a leading axis of several."""
        found = torch.autograd.grad(
            self._transposed,
            self._u,
            v,
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=v.ndim > self._x.ndim,
        )
        return [part.detach() for part in found]

    def normal(self, v: Tensor) -> Tensor:
        """``J^T J v``."""
        return self.adjoint(self.forward(v))


def dot(a: Parts, b: Parts) -> float:
    """Sum over all parts, in float64."""
    return sum(float(torch.sum(x.double() * y.double())) for x, y in zip(a, b, strict=True))
