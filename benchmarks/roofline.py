"""How far each stage is from the machine's limits: the bytes and flops it needs, the bandwidth and flops there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import builders
from bench import Entry, Target, measure
from builders import Case
from rconv_fast.constraints.layout import ConstraintLayout
from rconv_fast.constraints.operators import apply_gradient
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.conjugate import Preconditioner
from rconv_fast.solve.krylov import KrylovResult, refine
from rconv_fast.solve.phases.gram import tap_windows
from rconv_fast.solve.phases.solve import solve_by_phases
from rconv_fast.solve.preconditioners import jacobi
from rconv_fast.solve.rows import GradientRows, System, WeightRows, balance
from rconv_fast.solve.solution import Solution
from single_layers import STEMS, layer

DTYPES = (torch.float64, torch.float32)
# --- What the machine can do ------------------------------------------------------------------------------

# Large enough to go through no cache, and to keep every core busy.
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
LIMIT_SECONDS = 0.2


@dataclass(frozen=True)
class Limits:
    """Bytes a second of a copy on the device (read and written), flops a second of a square matrix product."""

    bandwidth: float
    flops: dict[torch.dtype, float]


@lru_cache
def limits_of(device: str) -> Limits:
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    bandwidth = 2 * len(source) / seconds_of(torch.empty_like(source).copy_, source)
    return Limits(bandwidth, {dtype: matrix_flops(device, dtype) for dtype in DTYPES})


def matrix_flops(device: str, dtype: torch.dtype) -> float:
    n = MATRIX_SIDE[device]
    matrix = torch.rand(n, n, dtype=dtype, device=device)  # products of constants take less power, hence time
    return 2 * n**3 / seconds_of(lambda a: a @ a, matrix)


def seconds_of(function: Callable[[Any], Any], given: Any) -> float:
    timing = measure(function, given, once=False, min_run_time=LIMIT_SECONDS)
    if timing.median is None:
        raise RuntimeError(timing.error)
    return timing.median


# --- Roofline: what a stage has to do -------------------------------------------------------------------
#
# Least bytes: every array that a step of the algorithm reads or writes, once a step. Elementwise work counts as
# done while the data pass by. Least flops: a multiplication and an addition for every entry of the matrix met.


@dataclass(frozen=True)
class Work:
    """Least bytes and flops of one stage in its precision, and how many stages one run is."""

    bytes: int
    flops: int
    dtype: torch.dtype
    times: int = 1


@dataclass(frozen=True)
class Stage:
    """What is timed, on what, and how much work that is: ``work(given, result)``."""

    setup: Callable[[str], Any]
    run: Callable[[Any], Any]
    work: Callable[[Any, Any], Work]


def roofline(name: str, stage: Stage, target: Target, *, quick: bool) -> Entry:
    def record(returned: tuple[Any, Any]) -> dict[str, Any]:
        given, result = returned
        work = stage.work(given, result)
        return shares(work, seconds_of(stage.run, given) / work.times, limits_of(target.device))

    return Entry(
        f"layer/roofline/{name}/{target.name}",
        partial(stage.setup, target.device),
        lambda given: (given, stage.run(given)),
        record=record,
        quick=quick,
    )


def shares(work: Work, seconds: float, limits: Limits) -> dict[str, Any]:
    """Compare the seconds of one stage with what its bytes and its flops must take; data in a cache can beat that."""
    at_bandwidth, at_flops = work.bytes / limits.bandwidth, work.flops / limits.flops[work.dtype]
    return {
        "bytes": work.bytes,
        "flops": work.flops,
        "seconds": seconds,
        "seconds at the bandwidth limit": at_bandwidth,
        "seconds at the flop limit": at_flops,
        "share of the limit reached": max(at_bandwidth, at_flops) / seconds,
        "copy GB/s": limits.bandwidth / 1e9,
        "matrix product Gflop/s": limits.flops[work.dtype] / 1e9,
    }


@dataclass(frozen=True)
class Sizes:
    """Elements of a layer's arrays, and the flops of one product with either matrix.

    With M the pairs (tap, output) that meet an input, both matrices have ``F C M`` entries for each sample, all
    channels counted, and a product takes ``2 B F C M`` flops.
    """

    x: int
    output: int
    weight: int
    product: int

    @classmethod
    def of(cls, geometry: ConvGeometry, samples: int) -> Sizes:
        channels = geometry.in_channels // geometry.groups
        return cls(
            samples * geometry.in_channels * geometry.n_input,
            samples * geometry.out_channels * geometry.n_output,
            geometry.out_channels * channels * geometry.n_taps,
            2 * channels * ConstraintLayout.of_gradient(geometry, samples).nnz,
        )


# A matrix: nnz values and columns, n_rows + 1 offsets are written, n_source values read; no flops.


def builder_work(layout: ConstraintLayout, dtype: torch.dtype) -> Work:
    index = layout.index_dtype.itemsize
    written = layout.nnz * (dtype.itemsize + index) + (layout.n_rows + 1) * index
    return Work(written + layout.n_source * dtype.itemsize, 0, dtype)


def gradient_stage(size: tuple[int, ...], dtype: torch.dtype) -> Stage:
    def work(case: Case, _: Tensor) -> Work:
        return builder_work(builders.gradient_layout(case), dtype)

    return Stage(lambda device: builders.gradient_case(size, device, dtype), builders.ours_gradient, work)


def weight_stage(size: tuple[int, ...], dtype: torch.dtype) -> Stage:
    def work(case: Case, _: Tensor) -> Work:
        return builder_work(builders.weight_layout(case), dtype)

    return Stage(lambda device: builders.weight_case(size, device, dtype), builders.ours_weight, work)


@dataclass
class Hybrid:
    """Both systems of a layer, balanced, with their preconditioner and one vector for each of their products."""

    system: System
    preconditioner: Preconditioner
    x: Tensor
    y: list[Tensor]

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.system.blocks[0].geometry, len(self.x))


def hybrid(size: int, dtype: torch.dtype, device: str) -> Hybrid:
    given = layer(size, *STEMS["resnet"], relu=True).to(device)
    shape = [given.x.shape[1], len(given.weight), given.x.shape[2:], given.weight.shape[2:]]
    geometry = ConvGeometry.create("benchmark", *shape, given.stride, given.padding)
    gradient = GradientRows.create(geometry, given.grad_weight, given.grad_output)
    weight = WeightRows.create(geometry, given.weight, given.output, given.known.to(given.output))
    system = balance(System(given.x.shape, (gradient, weight)), 1.0).to(dtype)
    x = given.x.to(dtype)
    return Hybrid(system, jacobi(system, dtype), x, system.apply(x))


# M x: x, the weights, the output gradients and the row weights are read, an output and a weight gradient
# written: x + 2 weight + 3 output elements. M^T y: the last two are read instead, and x is written.


def product_work(given: Hybrid) -> Work:
    sizes, dtype = given.sizes, given.x.dtype
    elements = sizes.x + 2 * sizes.weight + 3 * sizes.output
    return Work(elements * dtype.itemsize, 2 * sizes.product, dtype)


# An iteration of CGLS, with n = x elements and m = output + weight rows: q = M p; ||q||^2 reads m; x + alpha p and
# r - alpha q read two vectors and write one, 3 n + 3 m; s = M^T r; z = D s with s.z reads s, D and writes z,
# 3 n; z + beta p, 3 n. Together two products and 9 n + 4 m elements, at two flops each for n and m of these.


def iteration_work(given: Hybrid, result: KrylovResult) -> Work:
    """Work of one iteration; to start and to end, `refine` takes the two products of one more."""
    sizes, product = given.sizes, product_work(given)
    rows = sizes.output + sizes.weight
    vectors = (9 * sizes.x + 4 * rows) * product.dtype.itemsize
    flops = 2 * (4 * sizes.x + 2 * rows)
    return Work(2 * product.bytes + vectors, 2 * product.flops + flops, product.dtype, result.iterations + 1)


# So many that the one more does not matter.
ITERATIONS = 32


def apply(given: Hybrid) -> list[Tensor]:
    return given.system.apply(given.x)


def adjoint(given: Hybrid) -> Tensor:
    return given.system.adjoint(given.y)


def iterate(given: Hybrid) -> KrylovResult:
    return refine(given.system, given.preconditioner, inner_rtol=0.0, rtol=0.0, max_iterations=ITERATIONS)


@dataclass
class Direct:
    """The gradient constraints of a layer that they determine alone."""

    rows: GradientRows
    shape: torch.Size


def direct(channels: int, filters: int, size: int, kernel: int, stride: int, padding: int, device: str) -> Direct:
    sizes = (size, size), (kernel, kernel), stride, padding
    geometry = ConvGeometry.create("benchmark", channels, filters, *sizes)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, channels, size, size, dtype=torch.float64, generator=generator)
    grad_output = torch.randn(1, filters, *geometry.out_size, dtype=torch.float64, generator=generator)
    grad_weight = apply_gradient(geometry, x, grad_output)
    return Direct(GradientRows.create(geometry, grad_weight.to(device), grad_output.to(device)), x.shape)


def solve_direct(given: Direct) -> Solution:
    return solve_by_phases(given.rows, given.shape, 1e-14)


# H = g^T g, with N = B outputs of a filter: 2 F N^2 flops, N^2 elements written, read once a phase. Each phase of n
# unknowns: G sums a window of H a tap, at most n^2 flops each, is written, and read by the factorisation of n^3/3
# flops, which writes as much: 3 n^2 elements. A solve of all C channels: 2 n^2 C flops, the factor read forwards
# and backwards, 2 n^2. With it go one product with B and one with B^T, each x, g and dW once. That is done once and
# once more an iteration. The estimate of the condition number is left out: eight vectors.


def direct_work(given: Direct, solution: Solution) -> Work:
    geometry, dtype = given.rows.geometry, given.rows.rhs.dtype
    samples, channels = given.shape[0], geometry.in_channels
    sizes, solves = Sizes.of(geometry, samples), 1 + solution.iterations
    gram = (samples * geometry.n_output) ** 2
    elements = gram * (1 + len(geometry.phases)) + solves * 2 * (sizes.x + sizes.output + sizes.weight)
    flops = 2 * geometry.out_channels * gram + solves * 2 * sizes.product
    for phase in geometry.phases:
        n = samples * phase.n_positions
        elements += (3 + 2 * solves) * n**2
        flops += len(tap_windows(geometry, phase)) * n**2 + n**3 // 3 + solves * 2 * n**2 * channels
    return Work(elements * dtype.itemsize, flops, dtype)
