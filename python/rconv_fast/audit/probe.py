"""A made-up batch, to see what the structure does not show: dead units, the equations' rank, the recursion itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rconv_fast.audit.rank import Measured
from rconv_fast.errors import ArgumentError, require, require_type
from rconv_fast.layers.activation import MIN_DERIVATIVE, ActivationRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.losses import Loss, logits_in
from rconv_fast.memory import is_out_of_memory
from rconv_fast.walk.calls import trace
from rconv_fast.walk.graph import Graph
from rconv_fast.wrappers import working_copy

# Made-up pictures are smooth, as photos are: noise on a grid this coarse, interpolated.
GRID = 8


@dataclass(frozen=True)
class Probe:
    r"""A batch and its targets.

    Attributes
    ----------
    inputs : Tensor, (B, \*input_shape)
    targets : Tensor
        Labels (B,), or values of the outputs' shape.
    source : str
        ``"made up, seed 0"`` or ``"given"``.
    """

    inputs: Tensor
    targets: Tensor
    source: str

    def gradients(self, model: nn.Module, loss: Loss) -> dict[str, Tensor]:
        """What a client with this batch would share; the model is left as it is."""
        model = working_copy(model, _dtype_of(model))
        parameters = dict(model.named_parameters())
        with torch.enable_grad():
            value = loss(logits_in(model(self.inputs)), self.targets)
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }


def make_probe(
    graph: Graph,
    model: nn.Module,
    input_shape: Sequence[int],
    batch_size: int,
    loss: Loss,
    given: Tensor | tuple[Tensor, Tensor] | None,
    seed: int,
) -> Probe:
    """The batch that was given (its labels too, perhaps), else smooth random pictures (tokens, for an embedding)."""
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    outputs = (batch_size, *graph.steps[graph.output].shape[1:])
    targets = _targets(outputs, loss, generator)
    source = f"made up, seed {seed}"
    if given is None:
        shape = (batch_size, *input_shape)
        tokens = _tokens(graph, model)
        inputs = _smooth(shape, generator) if tokens is None else torch.randint(tokens, shape, generator=generator)
    else:
        inputs, targets = given if isinstance(given, tuple) else (given, targets)
        require_type(torch.is_tensor(inputs), "audit", "probe", "be a tensor or (inputs, targets)", type(inputs))
        wanted = (batch_size, *input_shape)
        require(tuple(inputs.shape) == wanted, "audit", "probe", f"have shape {wanted}", tuple(inputs.shape))
        source = "given"
    inputs = inputs.detach().to(like) if inputs.is_floating_point() else inputs.to(like.device)
    return Probe(inputs, targets.to(like.device), source)


def _tokens(graph: Graph, model: nn.Module) -> int | None:
    """How many tokens an embedding right behind the input knows, if there is one."""
    modules = dict(model.named_modules())
    behind = [modules.get(graph.steps[name].label) for name, _ in graph.consumers[graph.input]]
    return next((m.num_embeddings for m in behind if isinstance(m, nn.Embedding | nn.EmbeddingBag)), None)


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _smooth(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values in [0, 1]."""
    spatial = shape[2:]
    if not 1 <= len(spatial) <= 3:
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    coarse = [min(GRID, size) for size in spatial]
    noise = torch.rand(*shape[:2], *coarse, generator=generator, dtype=torch.float64)
    mode = ("linear", "bilinear", "trilinear")[len(spatial) - 1]
    return F.interpolate(noise, size=spatial, mode=mode, align_corners=False)


def _targets(outputs: tuple[int, ...], loss: Loss, generator: torch.Generator) -> Tensor:
    if loss.takes_labels:
        return torch.randint(outputs[-1], outputs[:1], generator=generator)
    values = torch.rand(outputs, generator=generator, dtype=torch.float64)
    return values if loss.name == "mse" else values.round()


def measure(model: nn.Module, graph: Graph, probe: Probe, loss: Loss) -> Measured:
    """Run the probe forward and back: which activations can be inverted, which filters have a gradient."""
    watch = _Watch(working_copy(model, _dtype_of(model)), graph)
    with torch.enable_grad():
        try:
            value = loss(logits_in(watch.run(probe.inputs)), probe.targets)
        except (RuntimeError, ValueError) as error:  # batch norm in training mode, on one value a channel
            if is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            must = f"be one that the model accepts ({reason})"
            raise ArgumentError(f"audit: batch_size must {must}, got {len(probe.inputs)}") from error
        torch.autograd.grad(value, list(watch.module.parameters()), allow_unused=True)
    return Measured(watch.alive, watch.filters)


class _Watch(fx.Interpreter):
    """Runs the traced model, and counts as it goes."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__(model, graph=trace(model))
        self.rules = {step.name: step.rule for step in graph.steps.values()}
        self.alive: dict[str, float] = {}
        self.filters: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One layer."""
        result = super().run_node(n)
        rule = self.rules.get(n.name)
        if isinstance(rule, ActivationRule):
            slope = rule.activation.derivative(result.detach())
            self.alive[n.name] = float((slope > MIN_DERIVATIVE).double().mean())
        elif isinstance(rule, ConvRule) and result.requires_grad:
            result.register_hook(lambda g: self._count(n.name, g))
        return result

    def _count(self, name: str, g: Tensor) -> None:
        self.filters[name] = int(g.transpose(0, 1).flatten(1).any(1).sum())
