"""The networks of the papers, and a few more to measure on: plain ``nn.Sequential`` models.

Every factory is deterministic: the parameters come from a generator of their own (``seed``, or a
``torch.Generator`` you pass), and torch's global random state is left alone. Two initialisations are
offered: ``"uniform"``, all parameters from U(-0.5, 0.5) as in the experiments of the R-CONV paper, and
``"torch"``, from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which ``nn.Conv2d`` and ``nn.Linear`` use themselves.

References
----------
.. [1] T. A. Eltaras, Q. Malluhi, A. Savino, S. Di Carlo, A. Qayyum. R-CONV: An Analytical Approach for
   Efficient Data Reconstruction via Convolutional Gradients. WISE 2024, LNCS 15440.
.. [2] J. Zhu, M. Blaschko. R-GAP: Recursive Gradient Attack on Privacy. ICLR 2021.
.. [3] L. Zhu, Z. Liu, S. Han. Deep Leakage from Gradients. NeurIPS 2019.
.. [4] H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas. Communication-Efficient Learning of Deep
   Networks from Decentralized Data. AISTATS 2017.
.. [5] Y. LeCun, L. Bottou, Y. Bengio, P. Haffner. Gradient-Based Learning Applied to Document Recognition. 1998.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import nn

from rconv_fast.errors import require
from rconv_fast.geometry import ConvGeometry

if TYPE_CHECKING:
    from typing_extensions import Unpack

Init = Literal["uniform", "torch"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "hardtanh": nn.Hardtanh,
    "relu6": nn.ReLU6,
    "identity": nn.Identity,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
"""Activation modules by name. The leaky slope is 0.2, as in both papers."""


class Options(TypedDict, total=False):
    """What every factory takes besides its activations.

    Attributes
    ----------
    n_classes, in_channels, image_size : int
        Outputs (100 unless the factory says otherwise), input channels (3), side of the square input.
    init : {"uniform", "torch"}
        Where the parameters are drawn from, see the module's docstring.
    dtype : torch.dtype
        Of all parameters; float64 unless given.
    seed : int or torch.Generator
        Source of the parameters; 0 unless given.
    """

    n_classes: int
    in_channels: int
    image_size: int
    init: Init
    dtype: torch.dtype
    seed: int | torch.Generator


@dataclass(frozen=True)
class FirstLayer:
    """The first convolution of a well-known network, as a case for ``recover_conv_input``."""

    out_channels: int
    kernel_size: int
    stride: int
    padding: int
    in_channels: int = 3
    input_size: tuple[int, int] = (224, 224)

    @property
    def geometry(self) -> ConvGeometry:
        """All sizes of the layer."""
        return ConvGeometry.create(
            "FirstLayer",
            self.in_channels,
            self.out_channels,
            self.input_size,
            self.kernel_size,
            self.stride,
            self.padding,
        )


FIRST_LAYERS: dict[str, FirstLayer] = {
    "resnet": FirstLayer(64, kernel_size=7, stride=2, padding=3),
    "vgg": FirstLayer(64, kernel_size=3, stride=1, padding=1),
    "alexnet": FirstLayer(64, kernel_size=11, stride=4, padding=2),
    "convnext": FirstLayer(96, kernel_size=4, stride=4, padding=0),
}
"""First convolutions as torchvision builds them, for 224x224 photos."""


@dataclass(frozen=True)
class _Conv:
    """One convolution of a chain, with the activation behind it and (sides of its windows, 0: none) a max pool."""

    filters: int
    kernel: int
    stride: int
    padding: int
    activation: str
    pool: int = 0


def lenet(activation: str = "sigmoid", **options: Unpack[Options]) -> nn.Sequential:
    """Build the LeNet of DLG [3]_ (figure 1a of [1]_): four 5x5 convolutions of 12 filters, one linear layer.

    Parameters
    ----------
    activation : str
        A key of `ACTIVATIONS`, used behind every convolution.
    **options
        See `Options`.
    """
    return _lenet("lenet", (12, 12, 12, 12), [activation] * 4, options)


def lenet_o(
    activation: str = "relu", *, first_activation: str = "leaky_relu", **options: Unpack[Options]
) -> nn.Sequential:
    """Build LeNet-O (figure 1c of [1]_): 12, 16, 12 and 3 filters, as in the authors' ``main.py``.

    `first_activation` stands behind the first two convolutions, `activation` behind the last two. The first
    layer has as many outputs as inputs (3072), so it is recovered from its weight constraints: with
    ``first_activation="relu"`` about half of those are lost and the photo is not determined any more.
    """
    return _lenet("lenet_o", (12, 16, 12, 3), [first_activation] * 2 + [activation] * 2, options)


def lenet_o_notebook(activation: str = "relu", **options: Unpack[Options]) -> nn.Sequential:
    """Build LeNet-O as the authors' notebook has it: 12, 16 (LeakyReLU), 3 and 3 filters."""
    return _lenet("lenet_o_notebook", (12, 16, 3, 3), ["leaky_relu"] * 2 + [activation] * 2, options)


def lenet_notebook(activation: str = "relu", **options: Unpack[Options]) -> nn.Sequential:
    """Build LeNet as the authors' notebook has it: 12, 16 (LeakyReLU), 12 and 12 filters."""
    return _lenet("lenet_notebook", (12, 16, 12, 12), ["leaky_relu"] * 2 + [activation] * 2, options)


def lenet_4_relu(activation: str = "relu", **options: Unpack[Options]) -> nn.Sequential:
    """Build the notebooks' LeNet with one LeakyReLU, then ReLUs: 12, 22, 3 and 3 filters."""
    return _lenet("lenet_4_relu", (12, 22, 3, 3), ["leaky_relu"] + [activation] * 3, options)


def lenet_all_relu(activation: str = "relu", **options: Unpack[Options]) -> nn.Sequential:
    """Build the notebooks' LeNet with ReLU behind every layer: 77, 22, 3 and 3 filters.

    With 77 filters the gradient constraints alone determine the first layer: even the poorest of its stride
    phases has ``77 * 4 = 308`` rows for its ``16 * 16 = 256`` pixels.
    """
    return _lenet("lenet_all_relu", (77, 22, 3, 3), [activation] * 4, options)


def cnn6(activation: str = "leaky_relu", **options: Unpack[Options]) -> nn.Sequential:
    """Build CNN6 of R-GAP [2]_ (figure 1b of [1]_): six convolutions and one logit, no biases.

    With torch's own initialisation. With its one output the loss is ``"binary_cross_entropy_with_logits"``.
    """
    sizes = [(12, 4, 2, 2), (36, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1)]
    convs = [_Conv(*size, activation) for size in sizes]
    return _chain("cnn6", convs, {"n_classes": 1, "init": "torch", **options}, bias=False)


def cnn6_d(activation: str = "leaky_relu", **options: Unpack[Options]) -> nn.Sequential:
    """Build CNN6-d of R-GAP [2]_: CNN6 with 20 filters in its second layer, which are too few for R-GAP."""
    sizes = [(12, 4, 2, 2), (20, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1)]
    convs = [_Conv(*size, activation) for size in sizes]
    return _chain("cnn6_d", convs, {"n_classes": 1, "init": "torch", **options}, bias=False)


def cnn6_o(
    activation: str = "relu", *, first_activation: str = "leaky_relu", **options: Unpack[Options]
) -> nn.Sequential:
    """Build CNN6-O (figure 1d of [1]_): 12 and 16 filters, then four layers of 3; see `lenet_o`."""
    sizes = [(12, 5, 2, 2), (16, 5, 2, 2), (3, 5, 1, 2), (3, 5, 1, 2), (3, 5, 1, 2), (3, 5, 1, 2)]
    names = [first_activation] * 2 + [activation] * 4
    convs = [_Conv(*size, name) for size, name in zip(sizes, names, strict=True)]
    return _chain("cnn6_o", convs, {"n_classes": 10, **options})


def cnn3(activation: str = "relu", **options: Unpack[Options]) -> nn.Sequential:
    """Build an ordinary small CNN, the network of the demo: 32, 64 and 128 filters, all of stride 2.

    With torch's own initialisation. Wide enough for a batch of four 32x32 photos behind ReLUs.
    """
    convs = [_Conv(32, 5, 2, 2, activation), _Conv(64, 5, 2, 2, activation), _Conv(128, 3, 2, 1, activation)]
    return _chain("cnn3", convs, {"init": "torch", **options})


def cnn4_224(
    activation: str = "relu", *, filters: Sequence[int] = (32, 256, 256, 256), **options: Unpack[Options]
) -> nn.Sequential:
    """Build a strided CNN for ImageNet-size photos: a 7x7 stem of 32 filters, then three layers of 256.

    With torch's own initialisation. The last two layers are determined by their gradient constraints alone,
    the first two need the weight constraints as well. A batch of 2 needs about ``filters=(32, 384, 448, 512)``.

    Parameters
    ----------
    activation : str
        As in the other factories.
    filters : sequence of 4 int
        Filters of the four layers.
    **options
        As in the other factories.
    """
    require(len(filters) == 4, "cnn4_224", "filters", "have 4 entries", len(filters))
    stem, second, third, fourth = filters
    convs = [
        _Conv(stem, 7, 2, 3, activation),
        _Conv(second, 5, 2, 2, activation),
        _Conv(third, 5, 2, 2, activation),
        _Conv(fourth, 3, 2, 1, activation),
    ]
    return _chain("cnn4_224", convs, {"image_size": 224, "init": "torch", **options})


def patch_cnn_224(activation: str = "relu", **options: Unpack[Options]) -> nn.Sequential:
    """Build a CNN with ConvNeXt's 4x4 patch stem, of 192 filters, then two strided layers of 256.

    With torch's own initialisation. A 4x4 patch holds 48 values, and of its 192 outputs about 96 are known
    behind a ReLU.
    """
    convs = [
        _Conv(192, 4, 4, 0, activation),
        _Conv(256, 5, 2, 2, activation),
        _Conv(256, 3, 2, 1, activation),
    ]
    return _chain("patch_cnn_224", convs, {"image_size": 224, "init": "torch", **options})


GREY: Options = {"n_classes": 10, "in_channels": 1, "image_size": 28, "init": "torch"}


def fedavg_cnn(
    activation: str = "relu", *, filters: Sequence[int] = (32, 64), hidden: int = 512, **options: Unpack[Options]
) -> nn.Sequential:
    """Build the CNN of FedAvg [4]_: two 5x5 convolutions, each with 2x2 max pooling, and a hidden layer.

    With torch's own initialisation, for grey 28x28 pictures of ten classes unless the options say otherwise.
    """
    require(len(filters) == 2, "fedavg_cnn", "filters", "have 2 entries", len(filters))
    convs = [_Conv(n, 5, 1, 2, activation, pool=2) for n in filters]
    return _chain("fedavg_cnn", convs, {**GREY, **options}, hidden=[(hidden, activation)])


def lenet5(activation: str = "tanh", **options: Unpack[Options]) -> nn.Sequential:
    """Build LeNet-5 [5]_ as it is built today: 6 and 16 filters, max pooling, hidden layers of 120 and 84.

    With torch's own initialisation, for grey 28x28 pictures of ten classes unless the options say otherwise.
    """
    convs = [_Conv(6, 5, 1, 2, activation, pool=2), _Conv(16, 5, 1, 0, activation, pool=2)]
    return _chain("lenet5", convs, {**GREY, **options}, hidden=[(120, activation), (84, activation)])


def flower_tutorial(activation: str = "relu", **options: Unpack[Options]) -> nn.Sequential:
    """Build the network of Flower's PyTorch tutorial: LeNet-5's sizes without padding, for 32x32 colour pictures.

    With torch's own initialisation. Its 6 and 16 filters are too few to determine a picture.
    """
    convs = [_Conv(6, 5, 1, 0, activation, pool=2), _Conv(16, 5, 1, 0, activation, pool=2)]
    defaults: Options = {"n_classes": 10, "init": "torch"}
    return _chain("flower_tutorial", convs, {**defaults, **options}, hidden=[(120, activation), (84, activation)])


def vgg_block(activation: str = "relu", **options: Unpack[Options]) -> nn.Sequential:
    """Build a small VGG: 3x3 convolutions of 32 and 64 filters, a max pool, 128 filters, a max pool.

    With torch's own initialisation.
    """
    convs = [_Conv(32, 3, 1, 1, activation), *(_Conv(n, 3, 1, 1, activation, pool=2) for n in (64, 128))]
    return _chain("vgg_block", convs, {"init": "torch", **options})


def gap_cnn(activation: str = "relu", **options: Unpack[Options]) -> nn.Sequential:
    """Build three strided convolutions of 64, 128 and 256 filters, then a global average in front of the head.

    With torch's own initialisation. The average of 4x4 positions hides which of them each filter is active at.
    """
    convs = [_Conv(64, 5, 2, 2, activation), _Conv(128, 3, 2, 1, activation), _Conv(256, 3, 2, 1, activation)]
    return _chain("gap_cnn", convs, {"init": "torch", **options}, average=True)


MODELS: dict[str, Callable[..., nn.Sequential]] = {
    factory.__name__: factory
    for factory in (
        lenet,
        lenet_o,
        lenet_o_notebook,
        lenet_notebook,
        lenet_4_relu,
        lenet_all_relu,
        cnn6,
        cnn6_d,
        cnn6_o,
        cnn3,
        cnn4_224,
        patch_cnn_224,
        fedavg_cnn,
        lenet5,
        flower_tutorial,
        vgg_block,
        gap_cnn,
    )
}
"""All factories by name; each can be called without arguments."""


def _lenet(function: str, filters: Sequence[int], activations: Sequence[str], options: Options) -> nn.Sequential:
    """Build the four 5x5 "same" convolutions, the first two of stride 2, that all LeNets here share."""
    strides = (2, 2, 1, 1)
    convs = [_Conv(n, 5, s, 2, name) for n, s, name in zip(filters, strides, activations, strict=True)]
    return _chain(function, convs, options)


def _chain(
    function: str,
    convs: Sequence[_Conv],
    options: Options,
    bias: bool = True,
    hidden: Sequence[tuple[int, str]] = (),
    average: bool = False,
) -> nn.Sequential:
    """Build convolutions (and a global average), a flatten, hidden layers and one linear layer; draw the parameters."""
    unknown = sorted(options.keys() - Options.__annotations__.keys())
    require(not unknown, function, "options", f"be among {', '.join(Options.__annotations__)}", ", ".join(unknown))
    n_classes, channels = options.get("n_classes", 100), options.get("in_channels", 3)
    init, dtype = options.get("init", "uniform"), options.get("dtype", torch.float64)
    size = (options.get("image_size", 32),) * 2
    require(n_classes >= 1, function, "n_classes", "be >= 1", n_classes)
    require(channels >= 1, function, "in_channels", "be >= 1", channels)
    require(init in ("uniform", "torch"), function, "init", "be 'uniform' or 'torch'", repr(init))
    names = ", ".join(ACTIVATIONS)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    # On the meta device torch's own initialisation draws nothing, so the global random state stays as it is.
    with torch.device("meta"):
        for i, conv in enumerate(convs, start=1):
            require(conv.activation in ACTIVATIONS, function, "activation", f"be one of {names}", conv.activation)
            shape = (conv.kernel, conv.stride, conv.padding)
            geometry = ConvGeometry.create(function, channels, conv.filters, size, *shape)
            layers[f"conv{i}"] = nn.Conv2d(channels, conv.filters, *shape, bias=bias, dtype=dtype)
            layers[f"act{i}"] = ACTIVATIONS[conv.activation]()
            channels, size = conv.filters, (geometry.out_size[0], geometry.out_size[1])
            if conv.pool:
                layers[f"pool{i}"] = nn.MaxPool2d(conv.pool)
                size = (size[0] // conv.pool, size[1] // conv.pool)
        if average:
            layers["average"], size = nn.AdaptiveAvgPool2d(1), (1, 1)
        layers["flatten"] = nn.Flatten()
        features = channels * math.prod(size)
        for i, (width, activation) in enumerate(hidden, start=1):
            layers[f"hidden{i}"] = nn.Linear(features, width, bias=bias, dtype=dtype)
            layers[f"act{len(convs) + i}"] = ACTIVATIONS[activation]()
            features = width
        layers["fc"] = nn.Linear(features, n_classes, bias=bias, dtype=dtype)
    model = nn.Sequential(layers).to_empty(device="cpu")
    _draw(model, init, options.get("seed", 0))
    return model


@torch.no_grad()
def _draw(model: nn.Module, init: Init, seed: int | torch.Generator) -> None:
    """Fill all parameters in order, drawn in float64 so that a float32 model is the rounded float64 one."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        bound = 0.5 if init == "uniform" else 1 / math.sqrt(module.weight[0].numel())
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(bound * (2 * values - 1))
