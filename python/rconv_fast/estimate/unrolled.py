"""Several local steps on the same data as one function of the unknown input.

    ``g_t = dL/dw(w_t; x) + decay w_t``,  ``v_t = momentum v_(t-1) + g_t``,  ``w_(t+1) = w_t - lr v_t``

(``torch.optim.SGD``). What a client sends back is the weighted mean of the gradients (`step_coefficients`). Every step
has sides of its own for each kinked activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rconv_fast.estimate.gradient_map import GradientMap, Parts
from rconv_fast.estimate.pieces import hold, kinked_steps
from rconv_fast.observation import LocalTraining
from rconv_fast.updates import step_coefficients


class _Run(nn.Module):
    """The steps of a graph as a module, so that its model's parameters can be replaced."""

    def __init__(self, problem: GradientMap) -> None:
        super().__init__()
        self.model, self.problem = problem.model, problem

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.problem.values(x)


@dataclass(frozen=True)
class UnrolledMap(GradientMap):
    """As `GradientMap`, of the mean gradient of several steps; the model holds the weights before the first.

    Attributes
    ----------
    training : LocalTraining
        The client's.
    bits : sequence of mapping of str to Tensor
        The sides of the kinked activations in each step; those of the run where left out.
    """

    training: LocalTraining = field(default_factory=lambda: LocalTraining(1.0))
    bits: tuple[Mapping[str, Tensor], ...] = ()

    def held(self, bits: Mapping[str, Tensor]) -> UnrolledMap:
        """The same with these sides, named ``step number:activation``."""
        each: list[dict[str, Tensor]] = [{} for _ in range(self.training.steps)]
        for name, d in bits.items():
            number, _, activation = name.partition(":")
            each[int(number)][activation] = d
        return replace(self, bits=tuple(each))

    def kink_inputs(self, x: Tensor) -> dict[str, Tensor]:
        """The input of each kinked activation in each step."""
        runs: list[dict[str, Tensor]] = []
        self._steps(x.detach(), runs)
        sources = {step.name: step.inputs[0] for step in kinked_steps(self.graph)}
        return {
            f"{t}:{name}": values[source].detach() for t, values in enumerate(runs) for name, source in sources.items()
        }

    def tied(self, inputs: Mapping[str, Tensor]) -> TiedMap:
        """The same with the sides of each activation tied over the steps, about a run with these inputs of theirs."""
        return TiedMap(**vars(self), inputs=inputs)

    def gradients(self, x: Tensor) -> Parts:
        """The mean gradient, one part a seen parameter; differentiable if x is."""
        kept, total = step_coefficients(self.training)
        first, last = list(self.parameters.values()), self._steps(x, [])
        return [(kept * a.detach() - b) / (self.training.lr * total) for a, b in zip(first, last, strict=True)]

    def residual(self, x: Tensor) -> Parts:
        """``r(x)``."""
        seen = [self.seen[name] for name in self.parameters]
        return self.whiten([g - s for g, s in zip(self.gradients(x), seen, strict=True)])

    def _steps(self, x: Tensor, runs: list[dict[str, Tensor]]) -> Parts:
        """The weights after all steps; the tensors of each step's run are put into `runs`."""
        assert self.graph is not None
        training, names = self.training, list(self.parameters)
        differentiable = x.requires_grad or any(d.requires_grad for bits in self.bits for d in bits.values())
        weights: Parts = [p.detach().requires_grad_() for p in self.parameters.values()]
        velocity = [torch.zeros_like(w) for w in weights]
        for t in range(training.steps):
            held = hold(self.graph, self.bits[t]) if self.bits else {}
            run = _Run(GradientMap.with_pieces(self, held))
            with torch.enable_grad():
                named = {f"model.{name}": w for name, w in zip(names, weights, strict=True)}
                values = torch.func.functional_call(run, named, (x,))
                loss = self.scale * self.loss(values[self.graph.output], self.targets)
                found = torch.autograd.grad(loss, weights, create_graph=differentiable, materialize_grads=True)
                runs.append(values)
                decay = training.weight_decay
                velocity = [
                    training.momentum * v + g + decay * w for v, g, w in zip(velocity, found, weights, strict=True)
                ]
                weights = [w - training.lr * v for w, v in zip(weights, velocity, strict=True)]
            if not differentiable:
                weights = [w.detach().requires_grad_() for w in weights]
                velocity = [v.detach() for v in velocity]
        return weights


@dataclass(frozen=True)
class TiedMap(UnrolledMap):
    """The steps' weights are so near one another that a side moves the mean gradient nearly alike in each of them.

    So an activation has one unknown: the share d of the steps in which it is on its right side, those where its input
    is the largest: ``clip(E d - rank)`` in each, which moves with d as if it moved in all.

    Attributes
    ----------
    inputs : mapping of str to Tensor
        Of each kinked activation in each step, as `kink_inputs` names them.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def of_each(self) -> dict[str, Tensor]:
        """The inputs of each activation in all steps, (steps, *shape)."""
        names = dict.fromkeys(name.partition(":")[2] for name in self.inputs)
        return {name: torch.stack([self.inputs[f"{t}:{name}"] for t in range(self.training.steps)]) for name in names}

    def held(self, bits: Mapping[str, Tensor]) -> UnrolledMap:
        """The steps with these shares."""
        sides: dict[str, Tensor] = {}
        for name, z in self.of_each().items():
            d = bits[name]
            clipped = d.detach().clamp(0, 1)
            rank = z.argsort(0, descending=True).argsort(0)
            of_steps = (len(z) * clipped - rank).clamp(0, 1) + (d - clipped)
            sides |= {f"{t}:{name}": side for t, side in enumerate(of_steps)}
        return super().held(sides)
