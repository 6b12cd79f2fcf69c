"""How many equations each layer has for its input: the papers' count, and the true one by stride phase and batch.

A convolution with F filters (of one group), stride s, and g = dL/do says of one channel of its input x (B samples)

    dW[f,k] = sum_b sum_u g[b,f,u] x[b, u s + k d - p]        gradient constraints
    o - bias = A x                                            weight constraints, where o is known

The papers compare |A| + |B| with |X|. But rows with ``k d - p = r (mod s)`` touch only positions of the residue r: the
gradient constraints fall apart into stride phases, and rows that one phase has too many are no help to another.
Within a phase, offset k gives at most ``min(F, B n_u(k))`` independent rows, n_u(k) the outputs at which k meets the
input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from rconv_fast.audit.hidden import hidden_pattern, is_pool, is_searched, merged_pattern, merged_with
from rconv_fast.audit.structure import checked_shape, read_structure
from rconv_fast.audit.tally import PhaseRank, Places, Tally, head_capacity, tally, union
from rconv_fast.errors import require_count
from rconv_fast.layers.activation import ActivationRule
from rconv_fast.layers.affine import AffineRule, SumRule
from rconv_fast.layers.average import AverageRule
from rconv_fast.layers.base import UnsupportedRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.rearrange import RearrangeRule
from rconv_fast.walk.graph import Graph, Step

# Of the outputs of an activation with flat pieces (ReLU) this share is expected to be invertible, unless measured.
EXPECTED_ALIVE = 0.5


@dataclass(frozen=True)
class LayerRank:
    """What one layer's equations can say of its input.

    Attributes
    ----------
    name, kind : str
        Layer (layers, joined by ``" + "``, where several read the same tensor) and what it is.
    weight_constraints : int
        The paper's ``|A|``: outputs recoverable through the activation behind; expected (or measured) where a ReLU
        decides.
    gradient_constraints : int
        The paper's ``|B| = |W|``.
    unknowns : int
        The paper's ``|X|``: values of the input, all samples of the batch.
    paper_says : bool
        The paper's rule: ``|A| + |B| >= |X|``, "recoverable".
    phases : tuple of PhaseRank
        Rows and unknowns of each stride phase, one channel.
    rank_bound : int
        No system of these equations has a higher rank: phases, batch, unreached positions and known values counted.
    determined : bool
        ``rank_bound == unknowns``: the equations can determine every value.
    equations : int
        The same, not capped by the unknowns: how much there is to spare.
    values : int
        Value equations that really are available: also through averages and skip connections.
    unreached : int
        Values that no output depends on. Within the network they carry no gradient and stop nothing.
    covered : bool
        False where this package has no exact method for the layer. Not covered is not safe.
    reason : str
        One sentence where the recursion stops here, else empty.
    pattern : str
        The hidden pattern in front of which the layer stands, and how hard it is to find; empty if there is none.
    """

    name: str
    kind: str
    weight_constraints: int = 0
    gradient_constraints: int = 0
    unknowns: int = 0
    paper_says: bool = False
    phases: tuple[PhaseRank, ...] = ()
    rank_bound: int = 0
    determined: bool = False
    equations: int = 0
    values: int = 0
    unreached: int = 0
    covered: bool = True
    reason: str = ""
    pattern: str = ""

    @property
    def stops(self) -> bool:
        """Whether the recursion ends here: values that matter are open."""
        return bool(self.reason)


@dataclass(frozen=True)
class Measured:
    """What a probe showed: the share of an activation's outputs that can be inverted, filters with a gradient."""

    alive: Mapping[str, float] = field(default_factory=dict)
    filters: Mapping[str, int] = field(default_factory=dict)


def rank_analysis(model: nn.Module, input_shape: Sequence[int], *, batch_size: int = 1) -> list[LayerRank]:
    """Count every layer's equations from the model's structure alone.

    No gradient is computed, nothing is solved, no parameter is copied: the model is read on torch's meta device. Of
    the outputs of a ReLU half are expected to be positive; `audit` measures them with a probe.

    Parameters
    ----------
    model : nn.Module
        The model, on any device.
    input_shape : sequence of int
        Shape of one sample, without the batch.
    batch_size : int
        Samples behind the shared gradient.

    Returns
    -------
    list of LayerRank
        Layers with unknowns to solve for, and layers that stop the recursion, in forward order. The last fully
        connected layer is `determined` if cross-entropy's samples can be separated there (``B <= n - 1``, or B = 1).

    Raises
    ------
    ArgumentError, ArgumentTypeError
        For a wrong argument, or an input shape that the model refuses.
    UnsupportedModelError
        For a model that torch.fx cannot trace.

    References
    ----------
    R-CONV (Eltaras et al., WISE 2024), section 4; the counts by stride phase are this package's own.
    """
    shape = checked_shape("rank_analysis", model, input_shape)
    require_count("rank_analysis", "batch_size", batch_size)
    return count_layers(read_structure(model, shape), batch_size)


def count_layers(
    graph: Graph, batch_size: int, measured: Measured | None = None, loss: str = "cross_entropy"
) -> list[LayerRank]:
    """The counts of a graph of one sample, for a batch of `batch_size`, with a probe's shares where given."""
    return _Count(graph, batch_size, measured or Measured(), loss).run()


class _Count:
    """The recursion of `walk` with shares instead of values: what would be known of each tensor, last layer first."""

    def __init__(self, graph: Graph, batch_size: int, measured: Measured, loss: str) -> None:
        self.graph, self.batch, self.measured, self.loss = graph, batch_size, measured, loss
        self.known: dict[str, float] = {}
        self.read: dict[str, Places] = {}
        self.found: dict[str, LayerRank] = {}

    def run(self) -> list[LayerRank]:
        """All layers, in forward order."""
        head = self._head()
        steps = list(self.graph.steps)
        behind = steps if head is None else steps[: steps.index(head.name)]
        for name in reversed(behind):
            self._settle(self.graph.steps[name])
        return [self.found[name] for name in steps if name in self.found]

    def _head(self) -> Step | None:
        """Enter the last fully connected layer; None where the model does not end in one."""
        step = self.graph.steps[self.graph.output]
        rule = step.rule
        if not isinstance(rule, ConvRule) or rule.geometry.n_taps != 1 or len(step.shape) != 2:
            reason = f"{rule.kind} as the last layer, where a fully connected one is needed"
            self.found[step.name] = LayerRank(step.label, rule.kind, covered=False, reason=reason)
            return None
        classes, features = rule.geometry.out_channels, rule.geometry.in_channels
        capacity = head_capacity(self.loss, classes, rule.bias is not None)
        unknowns, rows = self.batch * features, classes * features
        enough = self.batch <= capacity.most
        reason = f"a batch of {self.batch} where {classes} outputs can separate {capacity.most}" * (not enough)
        if capacity.certain < self.batch <= capacity.most:
            reason = f"{self.batch} samples of {classes} outputs: whether all of them are found depends on the batch"
        self.found[step.name] = LayerRank(
            step.label,
            rule.kind,
            gradient_constraints=rows,
            unknowns=unknowns,
            paper_says=rows >= unknowns,
            phases=(PhaseRank(classes, self.batch),),
            rank_bound=min(rows, unknowns),
            determined=enough,
            equations=rows,
            reason=reason,
        )
        self.known[step.inputs[0]] = 1.0
        return step

    def _settle(self, step: Step) -> None:
        """What is known of one tensor; where too little is, say so and go on as if it were known."""
        consumers = [self.graph.steps[name] for name, _ in self.graph.consumers[step.name]]
        if isinstance(step.rule, UnsupportedRule) and step.name != self.graph.input:
            self.found[step.name] = LayerRank(step.label, step.rule.kind, covered=False, reason=step.rule.reason)
        if step.name in self.known or not consumers:
            return
        share = self._share(step.name)
        convolved = any(isinstance(consumer.rule, ConvRule) for consumer in consumers)
        stopped = any(isinstance(consumer.rule, UnsupportedRule) for consumer in consumers)
        if convolved or (share < 1 and step.name == self.graph.input and not stopped):
            counted = self._count(step, consumers, share)
            self.known[step.name] = 1 - counted.unreached / counted.unknowns
            return
        elif share < 1 and step.rule.needs_output and not is_searched(self.graph, step, self.batch):
            reason = f"{step.rule.kind}, whose output the layers behind it do not determine"
            self.found[step.name] = LayerRank(step.label, step.rule.kind, reason=reason)
        elif share < 1:
            return  # its values, where they are needed, follow from the steps behind
        self.known[step.name] = 1.0

    def _share(self, name: str) -> float:
        """The share of a tensor's values that follows one by one from the tensors behind it."""
        if name in self.known:
            return self.known[name]
        return max((self._pulled(name, consumer) for consumer, _ in self.graph.consumers[name]), default=0.0)

    def _pulled(self, name: str, behind: str) -> float:
        """The same, through one of its consumers."""
        step = self.graph.steps[behind]
        match step.rule:
            case ActivationRule():
                return self._share(behind) * self._alive(step)
            case AffineRule() | RearrangeRule():
                return self._share(behind)
            case SumRule():
                others = [operand for operand in step.inputs if operand != name]
                computable = all(self.graph.ahead(self.known, other) is not None for other in others)
                return self._share(behind) if computable else 0.0
            case rule if rule.hidden and rule.needs_output:  # once its sides are found, it can be inverted
                return self._share(behind)
            case _:
                return 0.0

    def _alive(self, step: Step) -> float:
        """The share of an activation's outputs that can be inverted."""
        assert isinstance(step.rule, ActivationRule)
        expected = EXPECTED_ALIVE if step.rule.activation.flats else 1.0
        return self.measured.alive.get(step.name, expected)

    def _equations(self, name: str) -> float:
        """Equations for a tensor from its values behind: one a value, or one an average or a pool's window."""
        found = self._share(name) * self._numel(name)
        for behind, _ in self.graph.consumers[name]:
            step = self.graph.steps[behind]
            if isinstance(step.rule, AverageRule) or is_pool(step):
                found = max(found, self._share(behind) * self._numel(behind))
            elif isinstance(step.rule, ActivationRule):
                found = max(found, self._active_windows(step))
            elif isinstance(step.rule, AffineRule):
                found = max(found, self._equations(behind))
        return found

    def _active_windows(self, activation: Step) -> float:
        """Windows of a pool behind an activation in which some value can be inverted."""
        pools = [name for name, _ in self.graph.consumers[activation.name] if is_pool(self.graph.steps[name])]
        if not pools:
            return 0.0
        windows = self._share(pools[0]) * self._numel(pools[0])
        of_each = self._numel(activation.name) / self._numel(pools[0])
        return float(windows * (1 - (1 - self._alive(activation)) ** of_each))

    def _numel(self, name: str) -> int:
        return self.batch * math.prod(self.graph.steps[name].shape[1:])

    def _count(self, step: Step, consumers: list[Step], share: float) -> LayerRank:
        """The equations of one tensor: a layer's input."""
        layers = [consumer for consumer in consumers if isinstance(consumer.rule, ConvRule)]
        tallies = [self._tally(layer) for layer in layers]
        if len(layers) == len(consumers):
            self.read[step.name] = union([tally.read for tally in tallies])
        unknowns = self._numel(step.name)
        reached = max((tally.reached for tally in tallies), default=0)
        unreached = 0 if share > 0 else unknowns - reached
        values = [math.floor(self._equations(layer.name)) for layer in layers]
        points = math.floor(share * unknowns)
        equations = points + sum(min(t.rank + v, t.most) for t, v in zip(tallies, values, strict=True))
        rank = min(unknowns - unreached, equations)
        weights = math.floor(sum(self._paper_share(layer) * self._numel(layer.name) for layer in layers))
        gradients = sum(tally.gradients for tally in tallies)
        rows_a_value = (gradients + points + sum(values)) / unknowns
        hidden, hopeless = hidden_pattern(self.graph, [layer.name for layer in layers], unknowns, rows_a_value)
        reason = self._shortfall(step, rank, unknowns, unreached) or hidden * hopeless
        if reason and hidden and (merged := self._merged(layers, gradients + sum(values))):
            hidden, reason = merged, ""
        named = layers or consumers
        label = " + ".join(layer.label for layer in named)
        counted = LayerRank(
            label,
            " + ".join(dict.fromkeys(layer.rule.kind for layer in named)),
            weight_constraints=weights,
            gradient_constraints=gradients,
            unknowns=unknowns,
            paper_says=weights + gradients >= unknowns,
            phases=tuple(phase for tally in tallies for phase in tally.phases),
            rank_bound=rank,
            determined=rank == unknowns,
            equations=equations,
            values=points + sum(values),
            unreached=unreached,
            reason=reason,
            pattern=hidden,
        )
        self.found[named[-1].name] = counted
        return counted

    def _merged(self, layers: list[Step], rows: int) -> str:
        """How a layer with too few equations of its own is recovered with the convolution before; or nothing."""
        before = merged_with(self.graph, [layer.name for layer in layers])
        if before is None:
            return ""
        rows += self._tally(before).gradients
        return merged_pattern(layers[0].label, before.label, rows / self._numel(before.inputs[0]))

    def _shortfall(self, step: Step, rank: int, unknowns: int, unreached: int) -> str:
        """Why the recursion stops here, or nothing."""
        if rank < unknowns - unreached:
            return f"at most {rank} independent equations for {unknowns - unreached} values"
        if unreached and step.name == self.graph.input:
            return f"{unreached} of {unknowns} values are read by no output"
        return ""

    def _tally(self, layer: Step) -> Tally:
        assert isinstance(layer.rule, ConvRule)
        geometry = layer.rule.geometry
        filters = self.measured.filters.get(layer.name, geometry.out_channels)
        return tally(geometry, self.batch, filters, self._with_gradient(layer.name), self._averaged(layer.name))

    def _averaged(self, name: str) -> tuple[int, ...] | None:
        """The spatial size of the average behind a linear layer, if there is one."""
        if len(self.graph.consumers[name]) != 1:
            return None
        ((behind, _),) = self.graph.consumers[name]
        match self.graph.steps[behind].rule:
            case AverageRule():
                sizes = tuple(self.graph.steps[behind].shape[2:])
                return sizes or (1,) * (len(self.graph.steps[name].shape) - 2)
            case AffineRule():
                return self._averaged(behind)
            case _:
                return None

    def _with_gradient(self, name: str) -> Places | None:
        """The places of a tensor that the layers behind it read (None: all); others have no gradient."""
        if name in self.read:
            return self.read[name]
        behind = [(b, self.graph.steps[b].rule) for b, _ in self.graph.consumers[name]]
        if not behind or not all(isinstance(rule, ActivationRule | AffineRule | SumRule) for _, rule in behind):
            return None
        found = [places for b, _ in behind if (places := self._with_gradient(b)) is not None]
        return union(found) if len(found) == len(behind) else None

    def _paper_share(self, layer: Step) -> float:
        """The share of a layer's outputs that the paper's rule counts: what the activation behind it lets through."""
        behind = [self.graph.steps[name] for name, _ in self.graph.consumers[layer.name]]
        if len(behind) != 1:
            return 1.0
        match behind[0].rule:
            case ActivationRule():
                return self._alive(behind[0])
            case AffineRule() | RearrangeRule() | SumRule():
                return self._paper_share(behind[0])
            case ConvRule():
                return 1.0
            case _:
                return 0.0
