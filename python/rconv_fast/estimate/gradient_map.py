"""All seen gradients as one function of the unknown input, in units of their noise, and its two Jacobian products.

    ``r(x) = (c dL/dp(x) - seen_p) / sigma_p``,   ``J v`` and ``J^T u`` with ``J = dr/dx``

``J^T u`` is linear in u, so differentiating it once more gives J: reverse mode twice, which every layer knows that can
be trained. Activations can be replaced by linear pieces, which makes r smooth while x moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rconv_fast.errors import UnsupportedModelError
from rconv_fast.estimate.pieces import Piece, hold, kinked_steps
from rconv_fast.losses import Loss, logits_in
from rconv_fast.walk.canonical import LOSS_OF_LOGITS
from rconv_fast.walk.graph import Graph
from rconv_fast.walk.reader import build_graph

Parts = list[Tensor]


@dataclass(frozen=True)
class GradientMap:
    """The whitened residual of one observation: of its gradients, and of the statistics that a client sent with them.

    Attributes
    ----------
    model : nn.Module
        A working copy in the working dtype.
    loss, targets : Loss, Tensor
        Of the logits; without a graph, of what the model returns.
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

    def held(self, bits: Mapping[str, Tensor]) -> GradientMap:
        """The same with its kinked activations on these sides."""
        return self.with_pieces({} if self.graph is None else hold(self.graph, bits))

    def kink_inputs(self, x: Tensor) -> dict[str, Tensor]:
        """The input of each kinked activation on a run, by the names that `held` takes."""
        sources = {step.name: step.inputs[0] for step in kinked_steps(self.graph)}
        with torch.no_grad():
            values = self.values(x) if sources else {}
        return {name: values[source] for name, source in sources.items()}

    def with_scale(self, scale: float) -> GradientMap:
        """The same with another factor."""
        return replace(self, scale=scale)

    def with_masks(self, masks: Mapping[str, Tensor]) -> GradientMap:
        """The same with these masks in the dropouts of its steps."""
        return replace(self, graph=None if self.graph is None else self.graph.with_masks(masks))

    @classmethod
    def read(
        cls,
        model: nn.Module,
        loss: Loss,
        targets: Tensor,
        seen: Mapping[str, Tensor],
        sigma: Mapping[str, Tensor],
        shape: torch.Size,
        scale: float = 1.0,
    ) -> GradientMap:
        """Of a working copy of a model, read into steps for inputs of this shape (B, ...) where that is possible."""
        whole = cls(model, loss, targets, seen, sigma, scale=scale)
        try:
            graph = build_graph(model, seen, tuple(shape[1:]), shape[0], next(iter(seen.values())).dtype)
        except UnsupportedModelError:
            return whole
        if not graph.wrappers:
            return replace(whole, graph=graph)
        name = LOSS_OF_LOGITS.get((graph.wrappers[-1], loss.name)) if len(graph.wrappers) == 1 else None
        return whole if name is None else replace(whole, graph=graph, loss=replace(loss, name=name))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters whose gradients were seen."""
        found: dict[str, Tensor] = {n: p for n, p in self.model.named_parameters() if n in self.seen}
        for p in found.values():
            p.requires_grad_(True)
        return found

    def name_of(self, stored: Tensor | None) -> str | None:
        """Which seen parameter a layer's stored weight or bias is."""
        found = (n for n, p in self.parameters.items() if stored is not None and p.data_ptr() == stored.data_ptr())
        return next(found, None)

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
        """The logits, with the pieces in place; without a graph, what the model returns."""
        if self.graph is None:
            outputs: Tensor = logits_in(self.model(x))
            return outputs
        return self.values(x)[self.graph.output]

    def gradients(self, x: Tensor) -> Parts:
        """``c dL/dp``, one a seen parameter; differentiable if x is."""
        with torch.enable_grad():
            return self._gradients_of(self.outputs(x), x.requires_grad)

    def _gradients_of(self, outputs: Tensor, create_graph: bool) -> Parts:
        with torch.enable_grad():
            value = self.scale * self.loss(outputs, self.targets)
            parameters = list(self.parameters.values())
            found = torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    def whiten(self, parts: Parts) -> Parts:
        """Each part over its noise."""
        return [part * self.weight(name) for name, part in zip(self.parameters, parts, strict=True)]

    def residual(self, x: Tensor) -> Parts:
        """``r(x)``, one part a parameter, then those of the statistics."""
        seen = [self.seen[name] for name in self.parameters]
        with torch.enable_grad():
            values = {} if self.graph is None else self.values(x)
            outputs = self.outputs(x) if self.graph is None else values[self.graph.output]
            missed = [] if self.graph is None else self.graph.statistics_missed(values)
        found = self._gradients_of(outputs, x.requires_grad)
        return [*self.whiten([g - s for g, s in zip(found, seen, strict=True)]), *missed]

    def chi2(self, x: Tensor) -> float:
        """``||r||^2``."""
        parts = [part.detach() for part in self.residual(x.detach())]
        return dot(parts, parts)

    def at(self, x: Tensor) -> Linearisation:
        """Residual and Jacobian products at x."""
        return Linearisation(self, x)


class Linearisation:
    """``r`` and the products with its Jacobian at one point (double backward, one graph for all products).

    The unknowns are x and, where given, further tensors that the pieces hold: bits that are free.

    Attributes
    ----------
    residual : list of Tensor
        ``r(x)``.
    scaled : list of Tensor
        ``dr / dlog c``: the model's gradients in units of the noise.
    """

    def __init__(self, problem: GradientMap, x: Tensor, free: Parts | None = None) -> None:
        at = x.detach().requires_grad_()
        self._unknowns = [at, *(free or [])]
        self._r = problem.residual(at)
        self._u = [torch.zeros_like(part, requires_grad=True) for part in self._r]
        self._transposed = self._pull(self._u, create_graph=True)
        self.residual = [part.detach() for part in self._r]
        seen = problem.whiten([problem.seen[name] for name in problem.parameters])
        of_gradients, others = self.residual[: len(seen)], self.residual[len(seen) :]
        self.scaled = [r + s for r, s in zip(of_gradients, seen, strict=True)] + [torch.zeros_like(r) for r in others]

    @property
    def per_scale(self) -> float:
        """``1 / t^T t`` of `scaled`; 0 where the model's gradients vanish, so that the scale explains nothing."""
        size = dot(self.scaled, self.scaled)
        return 1 / size if size > 0 else 0.0

    def adjoint(self, u: Parts) -> Tensor:
        """``J^T u`` for x; u may have a leading axis of several."""
        return self.adjoints(u)[0]

    def adjoints(self, u: Parts) -> Parts:
        """``J^T u`` for every unknown."""
        return [part.detach() for part in self._pull(u, batched=u[0].ndim > self._r[0].ndim)]

    def forward(self, v: Tensor) -> Parts:
        """``J v`` of a change of x; v may have a leading axis of several."""
        return self.push([v, *(v.new_zeros(*v.shape[: v.ndim - self._x.ndim], *d.shape) for d in self._unknowns[1:])])

    def push(self, v: Parts) -> Parts:
        """``J v`` of a change of every unknown."""
        found = torch.autograd.grad(
            self._transposed,
            self._u,
            v,
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=v[0].ndim > self._x.ndim,
        )
        several = v[0].shape[: v[0].ndim - self._x.ndim]  # which zeros of parts that do not depend on x lack
        return [part.detach().expand(*several, *r.shape) for part, r in zip(found, self._r, strict=True)]

    def normal(self, v: Tensor) -> Tensor:
        """``J^T J v`` for x."""
        return self.adjoint(self.forward(v))

    @property
    def _x(self) -> Tensor:
        return self._unknowns[0]

    def _pull(self, u: Parts, *, create_graph: bool = False, batched: bool = False) -> Parts:
        live = [(part, v) for part, v in zip(self._r, u, strict=True) if part.requires_grad]
        found = torch.autograd.grad(
            [part for part, _ in live],
            self._unknowns,
            [v for _, v in live],
            create_graph=create_graph,
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=batched,
        )
        return list(found)


def pushed(outputs: Parts, inputs: Parts, v: Parts) -> Parts:
    """``J v``, J the derivative of outputs by inputs, v each with a leading axis of several directions.

    By double backward (``J^T u`` is linear in u): torch's forward mode would import its compiler.
    """
    u = [torch.zeros_like(part, requires_grad=True) for part in outputs]
    transposed = torch.autograd.grad(outputs, inputs, u, create_graph=True, materialize_grads=True)
    found = torch.autograd.grad(transposed, u, v, is_grads_batched=True, materialize_grads=True)
    return [part.detach() for part in found]


def dot(a: Parts, b: Parts) -> float:
    """Sum over all parts, in float64."""
    return sum(float(torch.sum(x.double() * y.double())) for x, y in zip(a, b, strict=True))
