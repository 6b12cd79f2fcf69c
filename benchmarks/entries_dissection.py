"""Suite `layer`: the sparse direct factor of the weight constraints, its time and memory, and what it does for CGLS.

``python benchmarks/run.py --filter dissection`` times factor and solve beside a dense QR and scipy's SuperLU.
``python benchmarks/entries_dissection.py --size 32 --beta 0 1e-6 1e-4 [--damping 1e-7] [--iterations 100]``
counts the CGLS iterations on ``[A; beta B] x`` with the factor as preconditioner. beta and sqrt(damping) are
relative: to ``|A| / |B|`` and to ``|A|``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import scipy.sparse
import scipy.sparse.linalg
import torch
from skimage import data
from skimage.transform import resize
from torch import Tensor, nn

from bench import Entry, Target
from rconv_fast.constraints.operators import apply_gradient, apply_weight, apply_weight_adjoint
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.dissection.factor import DissectionFactor


@dataclass
class Layer:
    """First layer of LeNet-O on one photo, a square system: 3 to 12 channels, kernel 5, stride 2, padding 2.

    ``outputs`` and ``weight_gradient`` are what an attacker knows; ``x`` is only there to compare with.
    """

    geometry: ConvGeometry
    weight: Tensor
    x: Tensor
    grad_output: Tensor
    outputs: Tensor
    weight_gradient: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return apply_weight(self.geometry, x[None], self.weight)

    def adjoint(self, y: Tensor) -> Tensor:
        return apply_weight_adjoint(self.geometry, y, self.weight)[0]

    def apply_gradient(self, x: Tensor) -> Tensor:
        return apply_gradient(self.geometry, x[None], self.grad_output)

    def adjoint_gradient(self, y: Tensor) -> Tensor:
        return apply_weight_adjoint(self.geometry, self.grad_output, y)[0]

    def factor(self, damping: float = 0.0) -> DissectionFactor:
        return DissectionFactor.factor(self.geometry, self.weight, damping=damping)


def first_layer(size: int) -> Layer:
    """Weights uniform in (-0.5, 0.5), LeakyReLU, cross-entropy of 100 classes behind two more layers."""
    torch.manual_seed(0)
    side = (size + 3) // 4
    first = nn.Conv2d(3, 12, 5, 2, 2)
    rest = nn.Sequential(
        nn.LeakyReLU(),
        nn.Conv2d(12, 12, 5, 2, 2),
        nn.LeakyReLU(),
        nn.Conv2d(12, 12, 5, 1, 2),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Linear(12 * side * side, 100),
    )
    for parameter in [*first.parameters(), *rest.parameters()]:
        nn.init.uniform_(parameter, -0.5, 0.5)
    photo = resize(data.astronaut(), (size, size), anti_aliasing=True)
    x = torch.from_numpy(photo).movedim(2, 0).contiguous()
    output = first.double()(x[None]).detach().requires_grad_()
    loss = nn.functional.cross_entropy(rest.double()(output), torch.tensor([3]))
    (grad_output,) = torch.autograd.grad(loss, output)
    geometry, weight = ConvGeometry.create("benchmark", 3, 12, (size, size), 5, 2, 2), first.weight.detach()
    known = apply_weight(geometry, x[None], weight), apply_gradient(geometry, x[None], grad_output)
    return Layer(geometry, weight, x, grad_output, *known)


def dense_qr(layer: Layer) -> Tensor:
    n = layer.x.numel()
    unit = torch.eye(n, dtype=layer.weight.dtype).reshape(n, *layer.x.shape)
    return torch.linalg.qr(apply_weight(layer.geometry, unit, layer.weight).flatten(1).T, mode="r").R


def sparse_matrix(layer: Layer) -> Any:
    """Build A as CSC from the images of unit vectors, 1024 at a time."""
    n, parts = layer.x.numel(), []
    for first in range(0, n, 1024):
        unit = torch.zeros(min(1024, n - first), n, dtype=layer.weight.dtype)
        unit[torch.arange(len(unit)), first + torch.arange(len(unit))] = 1
        columns = apply_weight(layer.geometry, unit.view(-1, *layer.x.shape), layer.weight).flatten(1)
        parts.append(scipy.sparse.csr_array(columns.numpy()))
    return scipy.sparse.vstack(parts).T.tocsc()


def refined(layer: Layer, steps: int) -> Tensor:
    """Solve ``A x = o`` from nothing: factor, then `steps` steps of refinement."""
    factor = layer.factor()
    x = torch.zeros_like(layer.x)
    for _ in range(steps):
        x = x + factor.solve_normal(layer.adjoint(layer.outputs - layer.apply(x)))
    return x


def psnr(x: Tensor, reference: Tensor) -> float:
    return float(-10 * torch.log10((x - reference).square().mean()))


def entries(target: Target) -> list[Entry]:
    if target != Target():
        return []
    found = []
    for size in (32, 64):
        small = {"quick": True} if size == 32 else {}
        dense = {"torch.linalg.qr, dense": dense_qr} if size == 32 else {}
        layer = partial(first_layer, size)
        found += [
            Entry(f"layer/dissection-factor/{size}/{target.name}", layer, Layer.factor, dense, record=facts, **small),
            Entry(
                f"layer/dissection-factor-only/{size}/{target.name}",
                lambda layer=layer: (layer(), sparse_matrix(layer())),
                lambda inputs: inputs[0].factor(),
                {"scipy splu": lambda inputs: scipy.sparse.linalg.splu(inputs[1])},
            ),
            Entry(
                f"layer/dissection-solve/{size}/{target.name}",
                lambda layer=layer: (layer().factor(), layer().x),
                lambda inputs: inputs[0].solve_normal(inputs[1]),
                **small,
            ),
            Entry(
                f"layer/dissection-solve-from-nothing/{size}/{target.name}", layer, partial(refined, steps=3), **small
            ),
        ]
    layer = partial(first_layer, 224)
    damped = partial(Layer.factor, damping=1e-13)
    found.append(Entry(f"layer/dissection-factor/224/{target.name}", layer, Layer.factor, record=facts, once=True))
    found.append(Entry(f"layer/dissection-factor-damped/224/{target.name}", layer, damped, record=facts, once=True))
    return found


def facts(factor: DissectionFactor) -> dict[str, Any]:
    return {
        "megabytes": factor.memory_bytes / 1e6,
        "rank": factor.rank_estimate,
        "condition": factor.condition_estimate,
    }


Operator = Callable[[Tensor], Tensor]


def norm(apply: Operator, adjoint: Operator, like: Tensor) -> float:
    v = torch.ones_like(like)
    for _ in range(10):
        v = adjoint(apply(v / v.norm()))
    return float(v.norm().sqrt())


def cgls(layer: Layer, precondition: Operator, scale: float, x: Tensor, most: int) -> tuple[Tensor, int]:
    """Minimise ``|o - A x|^2 + scale^2 |dW - B x|^2`` from x; stop when the gradient fell by 1e-12."""
    a, b = layer.outputs - layer.apply(x), scale * (layer.weight_gradient - layer.apply_gradient(x))
    s = layer.adjoint(a) + scale * layer.adjoint_gradient(b)
    p = precondition(s)
    gamma = start = torch.sum(s * p)
    iteration = 0
    while iteration < most and gamma > 1e-24 * start:
        iteration += 1
        qa, qb = layer.apply(p), scale * layer.apply_gradient(p)
        alpha = gamma / (qa.square().sum() + qb.square().sum())
        x, a, b = x + alpha * p, a - alpha * qa, b - alpha * qb
        s = layer.adjoint(a) + scale * layer.adjoint_gradient(b)
        z = precondition(s)
        last, gamma = gamma, torch.sum(s * z)
        p = z + gamma / last * p
    return x, iteration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--beta", type=float, nargs="+", default=[0.0, 1e-6, 1e-5, 1e-4])
    parser.add_argument("--damping", type=float, default=0.0, help="sqrt(damping) relative to |A|")
    parser.add_argument("--iterations", type=int, default=100)
    arguments = parser.parse_args()
    layer = first_layer(arguments.size)
    norm_a = norm(layer.apply, layer.adjoint, layer.x)
    norm_b = norm(layer.apply_gradient, layer.adjoint_gradient, layer.x)
    start = time.perf_counter()
    factor = layer.factor((arguments.damping * norm_a) ** 2)
    print(f"factor {time.perf_counter() - start:.3f} s, {facts(factor)}")
    for beta in arguments.beta:
        x, counts, start = torch.zeros_like(layer.x), [], time.perf_counter()
        for _ in range(2):  # the second pass starts from recomputed residuals
            x, count = cgls(layer, factor.solve_normal, beta * norm_a / norm_b, x, arguments.iterations)
            counts.append(count)
        seconds = time.perf_counter() - start
        error = float((x - layer.x).norm() / layer.x.norm())
        print(
            f"beta {beta:.0e}: iterations {counts}, {seconds * 1e3:.0f} ms, "
            f"relative error {error:.1e}, PSNR {psnr(x, layer.x):.0f} dB"
        )


if __name__ == "__main__":
    main()
