"""How much the papers' equations say of each layer's input: R-GAP's counts (RA-i), and the ranks of COPA's index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rconv_fast.baselines.chain import Link, chain_of
from rconv_fast.constraints.ops import gradient_components, weight_components
from rconv_fast.constraints.sparse import csr_array
from rconv_fast.errors import require


@dataclass(frozen=True)
class LayerCount:
    """The constraints that R-GAP counts for the input of layer i.

    Attributes
    ----------
    name : str
        The layer.
    unknowns, gradient_constraints, weight_constraints : int
        ``|X_i|``, ``|W_i|``, ``|Z_i|``: values of its input, of its weight, of its output.
    virtual_constraints : int
        ``|V_i|``: what layers before it that widen, ``|Z_n| > |X_n|``, leave of freedom to their outputs.
    """

    name: str
    unknowns: int
    gradient_constraints: int
    weight_constraints: int
    virtual_constraints: int

    @property
    def index(self) -> int:
        """``RA-i``: unknowns without a constraint; above 0 the layer is not determined."""
        return self.unknowns - self.gradient_constraints - self.weight_constraints - self.virtual_constraints


def ra_index(model: nn.Module, input_shape: Sequence[int]) -> list[LayerCount]:
    """R-GAP's rank analysis [1]_: ``RA-i = |X_i| - |W_i| - |Z_i| - |V_i|`` for each layer.

    With ``|V_i| = sum_(n<i) max(|Z_n| - |X_n|, 0)``: outputs of a layer that widens lie in a space of its input's
    dimension, which constrains all that follows. The paper expects an attack to succeed where no index is above 0;
    counts are no ranks, and a network can be safe all the same (see `copa_index`, ``rconv_fast.rank_analysis``).

    Parameters
    ----------
    model : nn.Module
        A chain of layers.
    input_shape : sequence of int
        Shape of one sample.

    Returns
    -------
    list of LayerCount
        First layer first.

    References
    ----------
    .. [1] Zhu, Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021, section 4.
    """
    x = torch.zeros(1, *input_shape).to(next(model.parameters()))
    counts, virtual = [], 0
    for link in _weighted("ra_index", model, x):
        weight = link.module.weight
        assert isinstance(weight, Tensor)
        count = LayerCount(link.name, link.in_shape.numel(), weight.numel(), link.out_shape.numel(), virtual)
        counts.append(count)
        virtual += max(count.weight_constraints - count.unknowns, 0)
    return counts


@dataclass(frozen=True)
class LayerRank:
    """Rank of one convolution's weight and gradient constraints together, beside its unknowns."""

    name: str
    rank: int
    unknowns: int


def copa_index(
    model: nn.Module, input_shape: Sequence[int], *, seed: int = 0, rtol: float = 1e-12
) -> tuple[float, list[LayerRank]]:
    """COPA's metric of security [1]_: the rank deficiencies of the convolutions, the first ones weighing most.

    ``sum_i (d - i + 1) / d * (rank A_i - n_i)`` over the d convolutions from the first, ``A_i`` the weight and gradient
    constraints of layer i together and ``n_i`` its unknowns. 0 says that every layer's input is determined; the more
    negative, the safer. The ranks are those at a random input, with the gradients of a random linear function of the
    outputs.

    Parameters
    ----------
    model : nn.Module
        A chain of layers; the linear layers, whose gradient constraints have full rank, are left out as in the paper.
    input_shape : sequence of int
        Shape of one sample.
    seed : int
        Of the random input.
    rtol : float
        Eigenvalues of ``A^T A`` below this share of the largest count as zero.

    Returns
    -------
    index : float
    layers : list of LayerRank
        First layer first.

    References
    ----------
    .. [1] Chen, Campbell, "Analysing Training-Data Leakage from Gradients through Linear Systems and Gradient
       Matching", BMVC 2022 (arXiv 2210.13231), section 3.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, *input_shape, generator=generator, dtype=torch.float64).to(next(model.parameters()))
    links = [link for link in _weighted("copa_index", model, x) if isinstance(link.module, nn.Conv2d)]
    gradients = _output_gradients(model, x, links, generator)
    layers = [_rank_of(link, gradients[link.name], rtol) for link in links]
    depth = len(layers)
    return sum((depth - i) / depth * (layer.rank - layer.unknowns) for i, layer in enumerate(layers)), layers


def _weighted(function: str, model: nn.Module, x: Tensor) -> list[Link]:
    """The layers with a weight, first to last."""
    chain = chain_of(model, x)
    require(not chain.broken, function, "model", "be a chain of layers", chain.broken)
    return [link for link in chain.links if isinstance(link.module, nn.Linear | nn.Conv2d)]


def _output_gradients(
    model: nn.Module, x: Tensor, links: Sequence[Link], generator: torch.Generator
) -> dict[str, Tensor]:
    """Of a random linear function of the model's outputs, with respect to those of each layer."""
    outputs: dict[str, Tensor] = {}
    handles = [
        link.module.register_forward_hook(lambda _m, _i, out, name=link.name: outputs.update({name: out}))
        for link in links
    ]
    with torch.enable_grad():
        value = model(x.requires_grad_())
        for handle in handles:
            handle.remove()
        weights = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        found = torch.autograd.grad((value * weights).sum(), list(outputs.values())) if outputs else ()
    return dict(zip(outputs, found, strict=True))


def _rank_of(link: Link, gradient: Tensor, rtol: float) -> LayerRank:
    conv = link.module
    assert isinstance(conv, nn.Conv2d)
    require(conv.groups == 1, "copa_index", "model", "have convolutions of one group", conv.groups)
    size: torch.Size = link.in_shape[2:]
    sizes: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    known = csr_array(weight_components(conv.weight.detach().double(), size, **sizes), link.in_shape.numel())
    one = csr_array(gradient_components(gradient.detach().double(), size, conv.kernel_size, **sizes), size.numel())
    normal = torch.from_numpy((known.T @ known).toarray())
    block = torch.from_numpy((one.T @ one).toarray())
    # both kinds of rows at one size, so that neither drowns in the other's rounding
    normal += torch.block_diag(*[block / block.trace() * normal.trace()] * conv.in_channels)
    eigenvalues = torch.linalg.eigvalsh(normal)
    return LayerRank(link.name, int((eigenvalues > rtol * eigenvalues[-1]).sum()), link.in_shape.numel())
