"""Convolutions behind a max pooling as a search meets them, from made-up pictures and losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rconv_fast.geometry import ConvGeometry
from rconv_fast.layers.windows import Windows
from rconv_fast.patterns.maxima import Maxima
from rconv_fast.patterns.problem import Convolution, Problem


@dataclass
class Layer:
    """One convolution, a ReLU and a pool, and what a pass would know behind them."""

    problem: Problem
    x: Tensor

    @property
    def truth(self) -> Tensor:
        hidden, convolution = self.problem.hidden, self.problem.front
        return hidden.choose(convolution.output(self.x))


def pooled_layer(
    x: Tensor,
    filters: int,
    pool: tuple[int, int, int] = (2, 2, 0),
    *,
    image: bool = True,
    groups: int = 1,
    rare: int = 0,
) -> Layer:
    """Values and gradients behind ``pool(relu(conv(x)))``, of a random loss; `rare` filters have one active window."""
    kernel, stride, padding = pool
    conv = nn.Conv2d(x.shape[1], filters, 5, padding=2, groups=groups, dtype=torch.float64)
    with torch.no_grad():
        for f, o in enumerate(conv(x)[0, :rare]):
            conv.bias[f] -= F.max_pool2d(o[None], 2).flatten().topk(2).values.mean()
    pooled = F.max_pool2d(conv(x).relu(), kernel, stride, padding)
    grad = torch.randn_like(pooled)
    (grad_weight,) = torch.autograd.grad(pooled, conv.weight, grad)
    geometry = ConvGeometry.create("test", x.shape[1], filters, x.shape[2:], 5, padding=2, groups=groups)
    windows = Windows.create(geometry.out_size, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1))
    low = -math.inf if image else 0.0
    weight, bias = conv.weight.detach(), conv.bias.detach()
    convolution = Convolution(geometry, weight, bias, grad_weight, len(x), low, image=image)
    value = pooled.detach().flatten(2)
    return Layer(Problem(convolution, Maxima.create(windows, value, grad.flatten(2), value > 0)), x)
