"""The Fisher information of all gradients about the input, exact and dense where it fits.

    ``F = J^T J``,   J the Jacobian of the whitened gradients by the input

For a network of linear layers and held pieces the gradient of one layer's weight is bilinear in the layer's input
``a_l`` and in ``d = dL/dlogits``: ``dW_l = sum_u g_l[u] a_l[u]^T``, ``g_l = P_l d``. With ``A_l = da_l/dx``,
``T = dd/dx``, ``B_l`` the gradient constraints of g_l and ``R_l`` the derivative of dW_l by d,

    ``F = sum_l A_l^T M_l A_l + T^T X^T + X T + T^T Y T``,
    ``M_l = B_l^T W B_l``,  ``X = sum_l A_l^T B_l^T W R_l``,  ``Y = sum_l R_l^T W R_l``,  ``W = 1 / sigma^2``

where M_l is block diagonal over the channels of a_l: far fewer operations than J itself takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.constraints.library import Components
from rconv_fast.constraints.operators import apply_gradient, apply_weight_adjoint
from rconv_fast.constraints.ops import weight_components
from rconv_fast.constraints.sparse import to_dense
from rconv_fast.estimate.gradient_map import GradientMap, Linearisation, pushed
from rconv_fast.estimate.gram import Gram
from rconv_fast.estimate.pieces import is_piecewise_linear
from rconv_fast.geometry import ConvGeometry
from rconv_fast.layers.activation import ActivationRule
from rconv_fast.layers.affine import AffineRule, SumRule
from rconv_fast.layers.average import AverageRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.dropout import DropoutRule
from rconv_fast.layers.pool import MaxPoolRule
from rconv_fast.layers.rearrange import RearrangeRule
from rconv_fast.solve.phases.gram import input_gram, phase_places, phase_rows, tap_windows
from rconv_fast.walk.graph import Graph, Step

# Products with J done at once where the structure is not known; tangents sent through a step at once.
TOGETHER, ALONG = 64, 256
# Parameters that are no weights of a convolution or fully connected layer (batch norm's) are few.
MOST_OTHERS = 4096
# Steps that are linear between kinks. Norms with statistics of their own are not, nor activations with a valley.
PIECEWISE_LINEAR = (ConvRule, AffineRule, SumRule, AverageRule, RearrangeRule, MaxPoolRule, DropoutRule)


def dense_fisher(problem: GradientMap, x: Tensor) -> Tensor:
    """``F`` (n, n) at x, n all values of x: by the structure where every layer has it, else by products with J."""
    structure = _structure(problem)
    return fisher_from_products(problem, x) if structure is None else _from_structure(problem, structure, x)


def has_structure(problem: GradientMap) -> bool:
    """Whether F follows layer by layer: much cheaper than J."""
    return _structure(problem) is not None


# --- From products with J ---------------------------------------------------------------------------------


def fisher_from_products(problem: GradientMap, x: Tensor) -> Tensor:
    """``J^T J e`` of all units e: J's own columns would take as long, and their products several times that."""
    at = problem.at(x)
    units = torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape).split(TOGETHER)
    fisher = torch.cat([at.normal(v).flatten(1) for v in units])
    return (fisher + fisher.mT) / 2


# --- From the structure ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """One convolution or fully connected layer and the names of its seen parameters."""

    step: Step
    rule: ConvRule
    weight: str | None
    bias: str | None


@dataclass(frozen=True)
class _Structure:
    """The layers of a network that is piecewise linear up to its last layer; parameters of other layers."""

    graph: Graph
    layers: list[_Layer]
    others: list[str]


def _structure(problem: GradientMap) -> _Structure | None:
    graph = problem.graph
    if graph is None:
        return None
    layers = []
    for step in graph.steps.values():
        if isinstance(step.rule, ConvRule):
            stored = step.rule.stored
            layers.append(_Layer(step, step.rule, problem.name_of(stored.weight), problem.name_of(stored.bias)))
    if not layers:
        return None
    order = list(graph.steps)
    before_last = [graph.steps[name] for name in order[1 : order.index(layers[-1].step.name)]]
    owned = {name for layer in layers for name in (layer.weight, layer.bias)}
    others = [name for name in problem.parameters if name not in owned]
    if sum(problem.seen[name].numel() for name in others) > MOST_OTHERS:
        return None
    return _Structure(graph, layers, others) if all(map(_is_piecewise_linear, before_last)) else None


def _is_piecewise_linear(step: Step) -> bool:
    """Whether its derivative does not move with the input, as far as its kinks: known of these kinds only."""
    if isinstance(step.rule, ActivationRule):
        return is_piecewise_linear(step.rule.activation)
    return isinstance(step.rule, PIECEWISE_LINEAR)


def _from_structure(problem: GradientMap, structure: _Structure, x: Tensor) -> Tensor:
    layers, last = structure.layers, structure.layers[-1]
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        values = problem.values(x)
        logits = values[last.step.name]
        d, hessian = _loss_curvature(problem, last.step, logits.detach())
        basis = torch.eye(logits.numel(), dtype=x.dtype, device=x.device).reshape(-1, *logits.shape)
        made = [values[layer.step.name] for layer in layers[:-1]]
        spread = list(torch.autograd.grad(logits, made, basis, is_grads_batched=True)) if made else []
    spread.append(basis)
    with torch.no_grad():
        values = {name: value.detach() for name, value in values.items()}
        reach = {layer.step.name: p for layer, p in zip(layers, spread, strict=True)}
        tangents = _Tangents(problem, structure.graph, values, reach)
        n, m = x.numel(), logits.numel()
        fisher, cross, inner = Gram(n, x.detach()), x.new_zeros(n, m), x.new_zeros(m, m)
        for layer in layers:
            source = layer.step.inputs[0]
            p, a = reach[layer.step.name], tangents.of(source)
            _add_layer(problem, layer, values[source], d, p, a, fisher, cross, inner)
        t = tangents.dense(last.step.name).mT @ hessian
        half = cross + t @ (inner / 2)
        mixed = t @ half.mT
        total = fisher.total() + mixed + mixed.mT
    if structure.others:
        total = total + _normal_of(problem, structure.others, x)
    return total


def _loss_curvature(problem: GradientMap, last: Step, logits: Tensor) -> tuple[Tensor, Tensor]:
    """``d = c dL/dlogits`` and its derivative by the logits (m, m)."""
    assert problem.graph is not None
    logits = logits.requires_grad_()
    outputs = problem.values(logits, last.name)[problem.graph.output]
    value = problem.scale * problem.loss(outputs, problem.targets)
    (d,) = torch.autograd.grad(value, logits, create_graph=True)
    m = logits.numel()
    basis = torch.eye(m, dtype=logits.dtype, device=logits.device).reshape(m, *logits.shape)
    (hessian,) = torch.autograd.grad(d, logits, basis, is_grads_batched=True, materialize_grads=True)
    return d.detach(), hessian.reshape(m, m)


def _add_layer(
    problem: GradientMap,
    layer: _Layer,
    a: Tensor,
    d: Tensor,
    p: Tensor,
    tangent: Tensor | None,
    fisher: Gram,
    cross: Tensor,
    inner: Tensor,
) -> None:
    """One layer's terms of ``A^T M A``, X and Y; p (m, B, F, ...) is dg/dd."""
    geometry = layer.rule.geometry
    p = p.reshape(len(p), len(a), geometry.out_channels, *geometry.out_size)
    if layer.bias is not None:
        rows = p.flatten(3).sum((1, 3)) * problem.weight(layer.bias)
        inner += rows @ rows.mT
    if layer.weight is None:
        return
    a = a.reshape(len(a), geometry.in_channels, *geometry.input_size)
    g = torch.einsum("m,m...->...", d.flatten(), p)
    w = problem.weight(layer.weight)
    w = w.expand(problem.seen[layer.weight].shape).reshape(geometry.out_channels, -1, *geometry.kernel_size)
    if geometry.n_input == geometry.groups == 1:
        back, own = _logits_connected(a, g, p, w)
    else:
        back, own = _logits_convolved(geometry, a, g, p, w)
    inner += own
    cross += back.mT if tangent is None else tangent.mT @ back.mT
    if geometry.n_input == 1:
        fisher.add_single(torch.einsum("bf,fc,ef->cbe", g.flatten(1), w.flatten(1).square(), g.flatten(1)), tangent)
        return
    for channel, block in input_normals(geometry, g, w):
        fisher.add(block, tangent, channel, len(a), geometry)


def _logits_convolved(geometry: ConvGeometry, a: Tensor, g: Tensor, p: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """``(B^T W R)^T`` (m, values of a) and ``R^T W R`` (m, m): column j of R is the gradient with g = p_j."""
    derivative = torch.stack([apply_gradient(geometry, a, p_j) for p_j in p])
    rows = (derivative * w).flatten(1)
    back = torch.stack([apply_weight_adjoint(geometry, g, y) for y in derivative * w.square()])
    return back.flatten(1), rows @ rows.mT


def _logits_connected(a: Tensor, g: Tensor, p: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a fully connected layer, filter by filter, from the logits that each reaches."""
    a, g, p, w = a.flatten(1), g.flatten(1), p.flatten(2), w.flatten(1)
    back, own = a.new_zeros(len(p), *a.shape), a.new_zeros(len(p), len(p))
    for f, w_f in enumerate(w):
        reached = p[:, :, f].any(dim=1).nonzero().flatten()
        rows = (p[reached, :, f] @ a) * w_f
        own[reached[:, None], reached] += rows @ rows.mT
        back[reached] += g[:, f, None] * (rows * w_f)[:, None]
    return back.flatten(1), own


def input_normals(geometry: ConvGeometry, g: Tensor, w: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``M`` (B P, B P) of each channel of a layer's input."""
    filters, channels = geometry.out_channels // geometry.groups, geometry.in_channels // geometry.groups
    per_filter = bool((w == w.flatten(1)[:, 0].reshape(-1, *(1,) * (w.ndim - 1))).all())
    if per_filter:
        g = g * w.flatten(1)[:, 0].reshape(1, -1, *(1,) * geometry.ndim)
    for group in range(geometry.groups):
        shared = input_gram(geometry, g, group) if per_filter else None
        for channel in range(channels):
            if shared is None:
                mine = slice(group * filters, (group + 1) * filters)
                yield group * channels + channel, _weighted_gram(geometry, g[:, mine], w[mine, channel])
            else:
                yield group * channels + channel, shared


def _weighted_gram(geometry: ConvGeometry, g: Tensor, w: Tensor) -> Tensor:
    """``B^T W B`` with one weight an equation, w (F, *K)."""
    batch, n = len(g), geometry.n_input
    gram = g.new_zeros(batch, n, batch, n)
    w = w.flatten(1)
    for phase in geometry.phases:
        taps = [window.tap for window in tap_windows(geometry, phase)]
        if not taps:
            continue
        (place,) = phase_places(geometry, (phase,), g.device)
        rows = phase_rows(geometry, phase, g) * w[:, taps].reshape(-1, 1)
        block = g.new_zeros(batch, len(place), batch, n)
        block[..., place] = (rows.mT @ rows).view(batch, len(place), batch, -1)
        gram[:, place] = block
    return gram.view(batch * n, batch * n)


class _Tangents:
    """``da/dx`` of each step's tensor, (values of the step, n); None is the identity."""

    def __init__(
        self, problem: GradientMap, graph: Graph, values: dict[str, Tensor], spread: dict[str, Tensor]
    ) -> None:
        self._problem, self._graph, self._values, self._spread = problem, graph, values, spread
        self._n = values[graph.input].numel()
        self._found: dict[str, Tensor | None] = {graph.input: None}

    def of(self, name: str) -> Tensor | None:
        """Of one step."""
        if name not in self._found:
            step = self._graph.steps[name]
            rule = step.rule
            if isinstance(rule, ConvRule):
                self._found[name] = self._through(step, rule)
            else:
                self._found[name] = self._along(step)
        return self._found[name]

    def _through(self, step: Step, rule: ConvRule) -> Tensor:
        """``W A``, at the outputs that reach the logits; the others are left 0."""
        before = self.of(step.inputs[0])
        live = self._spread[step.name].flatten(1).any(dim=0)
        outputs = rule.geometry.out_channels * rule.geometry.n_output
        inputs = rule.geometry.in_channels * rule.geometry.n_input
        result = rule.weight.new_zeros(step.shape[0] * outputs, self._n)
        for b in range(step.shape[0]):
            mine = live[b * outputs : (b + 1) * outputs]
            rows, target = dense_rows(rule, mine), result[b * outputs : (b + 1) * outputs]
            if before is None:
                target[mine, b * inputs : (b + 1) * inputs] = rows
            else:
                _sparse_product(rows, before[b * inputs : (b + 1) * inputs], mine, rule.geometry.n_output, target)
        return result

    def _along(self, step: Step) -> Tensor:
        """Through a step that is linear here: an activation's slope, else forward differentiation."""
        operands = [self._values[o] for o in step.inputs]
        run = self._problem.pieces.get(step.name, step.forward)
        if isinstance(step.rule, ActivationRule):
            return self.dense(step.inputs[0]) * _slope(run, operands[0]).reshape(-1, 1)
        if isinstance(step.rule, RearrangeRule) and step.rule.keeps_order:
            return self.dense(step.inputs[0])
        parts = zip(*(self.dense(o).mT.split(ALONG) for o in step.inputs), strict=True)
        with torch.enable_grad():
            operands = [x.detach().requires_grad_() for x in operands]
            outputs = run(*operands)
            moved = [
                pushed([outputs], operands, [v.reshape(-1, *x.shape) for v, x in zip(part, operands, strict=True)])[0]
                for part in parts
            ]
        return torch.cat([m.flatten(1) for m in moved]).mT

    def dense(self, name: str) -> Tensor:
        """Of one step, the identity written out."""
        found, like = self.of(name), self._values[self._graph.input]
        return torch.eye(self._n, dtype=like.dtype, device=like.device) if found is None else found


def _slope(run: Callable[..., Tensor], z: Tensor) -> Tensor:
    """``da/dz`` of an element-wise function."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(run(z).sum(), z)[0]


def _sparse_product(rows: Tensor, a: Tensor, live: Tensor, positions: int, target: Tensor) -> None:
    """``rows a`` into the live rows of `target`: outputs at one position see the same few values of x."""
    outputs = live.nonzero().flatten()
    for u in range(positions):
        mine = outputs % positions == u
        if not bool(mine.any()):
            continue
        block = rows[mine]
        seen = block.any(dim=0).nonzero().flatten()
        part = a[seen]
        reached = part.any(dim=0).nonzero().flatten()
        target[outputs[mine][:, None], reached] = block[:, seen] @ part[:, reached]


def dense_rows(rule: ConvRule, live: Tensor) -> Tensor:
    """The rows (F U, C P) of a layer's matrix where `live`."""
    g = rule.geometry
    if g.n_taps == g.n_input == g.groups == 1 and g.padding == (0,):
        return rule.weight.flatten(1)[live]
    return to_dense(sparse_rows(rule, live), g.in_channels * g.n_input)


def sparse_rows(rule: ConvRule, live: Tensor) -> Components:
    """The same as ``(values, crow, col)``."""
    g = rule.geometry
    return weight_components(
        rule.weight,
        g.input_size,
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        groups=g.groups,
        mask=live.reshape(g.out_channels, *g.out_size),
    )


def _normal_of(problem: GradientMap, names: list[str], x: Tensor) -> Tensor:
    """``J^T J`` of few parameters, row by row."""
    chosen = {name: problem.seen[name] for name in names}
    at = Linearisation(GradientMap(**{**vars(problem), "seen": chosen}), x)
    count = sum(part.numel() for part in at.residual)
    units = torch.eye(count, dtype=x.dtype, device=x.device)
    shapes = [part.shape for part in at.residual]
    total = x.new_zeros(x.numel(), x.numel())
    for u in units.split(TOGETHER):
        parts = [v.reshape(len(u), *s) for v, s in zip(u.split([math.prod(s) for s in shapes], 1), shapes, strict=True)]
        rows = at.adjoint(parts).flatten(1)
        total += rows.mT @ rows
    return total
