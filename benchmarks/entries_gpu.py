"""The GPU set, ``python benchmarks/run.py --filter /cuda/``, and how far each stage is from the machine's limits.

Every attack stands beside the same on the CPU, every builder beside a copy on the device of as many bytes as its
matrix has (a copy reads what it writes, so it moves twice as many), both called and replayed from a CUDA graph, which
leaves the host's part out: small matrices take a GPU less time than calling it. ``--filter roofline/`` compares the
stages with the bandwidth and the flops measured in the same run, on a CPU too. The functions take the device: with
"cpu" the whole set but for cupy's part and the replays runs without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import entries_attack as attack
import entries_batch as batch
import entries_builders as build
import entries_large as large
from bench import Entry, measure
from entries_builders import Case
from entries_large import Layer
from rconv_fast.constraints import ops
from rconv_fast.constraints.backends import backend_for
from rconv_fast.constraints.layout import ConstraintLayout
from rconv_fast.constraints.operators import apply_gradient
from rconv_fast.constraints.sparse import to_cupy
from rconv_fast.constraints.streams import cupy_on_torch_stream
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.conjugate import Preconditioner
from rconv_fast.solve.krylov import KrylovResult, refine
from rconv_fast.solve.phases.gram import tap_windows
from rconv_fast.solve.phases.solve import solve_by_phases
from rconv_fast.solve.preconditioners import jacobi
from rconv_fast.solve.rows import GradientRows, System, WeightRows, balance
from rconv_fast.solve.solution import Solution

DTYPES = (torch.float64, torch.float32)
BATCHES = [("leaky_relu", 32, 8), ("relu", 44, 8)]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- Attacks: the same on the device and on the CPU --------------------------------------------------------


# Float32 with all its bits, without which the solver iterates in float64.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@dataclass
class Twin:
    """One case on the device, and the same case on the CPU."""

    here: Any
    cpu: Any


def attack_entry(
    name: str,
    make: Callable[[str], Any],
    run: Callable[[Any], Any],
    record: Callable[[Any], dict[str, Any]],
    device: str,
    *,
    others: dict[str, Callable[[Any], Any]] | None = None,
    once: bool = False,
) -> Entry:
    """``make(device)`` is the case; `others` are competitors on the device. What runs once is warmed up before."""

    def setup() -> Twin:
        twin = Twin(make(device), make("cpu"))
        if once:
            with suppress(Exception):  # what fails here fails again where it is reported
                run(twin.here)  # loads cuSOLVER and cuDNN, outside the clock
        return twin

    def on_device(function: Callable[[Any], Any]) -> Callable[[Twin], Any]:
        return lambda twin: function(twin.here)

    references = {"the same on the CPU": lambda twin: run(twin.cpu)}
    references |= {title: on_device(other) for title, other in (others or {}).items()}
    return Entry(name, setup, on_device(run), references, record=record, once=once)


def attacks(device: str) -> list[Entry]:
    return [
        attack_entry(
            f"attack/{device}/{a.name}", lambda d, a=a: attack.leak(a, device=d), attack.ours, attack.facts, device
        )
        for a in attack.ATTACKS
    ]


def batches(device: str) -> list[Entry]:
    return [
        attack_entry(
            f"batch-{b}/{device}/{activation}-{filters}",
            partial(batch.setup, activation, filters, b, torch.float64),
            batch.run,
            batch.record,
            device,
        )
        for activation, filters, b in BATCHES
    ]


def photos(device: str) -> list[Entry]:
    prototype = {"the prototype's recipe in plain torch": large.prototype}
    return [
        attack_entry(
            f"photo-224/{device}/{short(dtype)}",
            partial(large.whole_photo, dtype),
            large.invert_photo,
            large.photo_record,
            device,
            others=prototype,
            once=True,
        )
        for dtype in DTYPES
    ]


def stem_layer(device: str, size: int = 224) -> Layer:
    return large.layer(size, *large.STEMS["resnet"], relu=True).to(device)


def stems(device: str) -> list[Entry]:
    others = {"plain torch: Jacobi-CG": large.plain, "plain cupy: lsmr on both matrices": cupy_lsmr}
    name = f"stem-224/{device}/resnet"
    return [attack_entry(name, stem_layer, large.ours, large.record, device, others=others, once=True)]


# --- Both systems of a layer as one sparse matrix, for cupy's solver ----------------------------------------


@dataclass
class Stacked:
    """Both systems of a layer as one sparse matrix with columns of norm 1; ``scale`` times its solution is x."""

    matrix: Tensor
    rhs: Tensor
    scale: Tensor


def stacked(given: Layer) -> Stacked:
    """Gradient rows of each channel over the weight rows of the known outputs, weighted as in `large.plain`."""
    channels, size = given.x.shape[1], given.x.shape[2:]
    sizes = {"stride": given.stride, "padding": given.padding}
    one = ops.gradient_constraints(given.grad_output, size, given.weight.shape[2:], **sizes)
    known = ops.weight_constraints(given.weight, size, mask=given.known[0], **sizes)
    weight = (column_squares(known).mean() / column_squares(one).mean()).sqrt()
    blocks = [moved(one, weight, c, channels) for c in range(channels)]
    matrix = stack([*blocks, known])
    norm = column_squares(matrix).sqrt()
    scale = torch.where(norm > 0, 1 / norm, 0.0)  # black pixels that no equation meets
    matrix.values().mul_(scale[matrix.col_indices()])
    rhs = torch.cat([weight * given.grad_weight.transpose(0, 1).flatten(), given.output[given.known]])
    return Stacked(matrix, rhs, scale)


def csr(crow: Tensor, col: Tensor, values: Tensor, n_cols: int) -> Tensor:
    return torch.sparse_csr_tensor(crow, col, values, (len(crow) - 1, n_cols), check_invariants=False)


def moved(matrix: Tensor, factor: Tensor, block: int, n_blocks: int) -> Tensor:
    """`factor` times a matrix, as the block of columns `block` of `n_blocks`."""
    n_cols = matrix.shape[1]
    col = matrix.col_indices() + block * n_cols
    return csr(matrix.crow_indices(), col, matrix.values() * factor, n_blocks * n_cols)


def stack(blocks: list[Tensor]) -> Tensor:
    """Blocks of rows, one below the other."""
    firsts = accumulate((b.values().numel() for b in blocks[:-1]), initial=0)
    ends = [b.crow_indices()[1:] + first for first, b in zip(firsts, blocks, strict=True)]
    crow = torch.cat([blocks[0].crow_indices()[:1], *ends])
    col, values = (torch.cat([f(b) for b in blocks]) for f in (Tensor.col_indices, Tensor.values))
    return csr(crow, col, values, blocks[0].shape[1])


def column_squares(matrix: Tensor) -> Tensor:
    """Squared norms of the columns."""
    squares = matrix.values().new_zeros(matrix.shape[1])
    return squares.index_add_(0, matrix.col_indices(), matrix.values().square())


def lsmr(linalg: Any, matrix: Any, rhs: Any) -> Any:
    """Run scipy's or cupy's LSMR (`linalg` is the module) to rounding, for at most as long as `large.plain`."""
    return linalg.lsmr(matrix, rhs, atol=1e-14, btol=1e-14, conlim=0.0, maxiter=large.PLAIN_ITERATIONS)[0]


def cupy_lsmr(given: Layer) -> Tensor:
    """LSMR of cupy; its matrix comes from our builders, which is in its favour."""
    system = stacked(given)
    with cupy_on_torch_stream(given.x.device, "plain cupy") as cupy:
        from cupyx.scipy.sparse import linalg

        found = lsmr(linalg, to_cupy(system.matrix), cupy.from_dlpack(system.rhs))
        return torch.from_dlpack(found) * system.scale


# --- Builders -------------------------------------------------------------------------------------------


COPY = "device copy of the same bytes"


class Replayed:
    """What a function launches, captured once for each case in a CUDA graph: the device's time without the host's."""

    def __init__(self, function: Callable[[Any], Tensor]) -> None:
        self.function = function
        self.case: Any = None

    def __call__(self, case: Any) -> Tensor:
        if case is not self.case:
            self.case, self.graph = case, torch.cuda.CUDAGraph()
            self.function(case)  # what is set up at a first call is not captured
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                self.returned = self.function(case)
        self.graph.replay()
        return self.returned


def builder(
    name: str,
    case: Callable[[], Case],
    ours: Callable[[Any], Tensor],
    others: dict[str, Callable[[Any], Any]] | None = None,
    *,
    waits: bool = False,
    quick: bool = False,
) -> Entry:
    """One builder beside a copy of buffers as large as its own matrix; one that never `waits` is replayed, too."""

    def setup() -> Case:
        given = case()
        return build.with_buffers(given, ours(given))

    replays = {f"{COPY}, replayed": Replayed(build.copy_warm), "ours, replayed": Replayed(ours)}
    references = {COPY: build.copy_warm} | (replays if "/cuda/" in name and not waits else {}) | (others or {})
    return Entry(name, setup, ours, references, build.csr_bytes, quick=quick)


def gradient_builders(size: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Entry]:
    case = partial(build.gradient_case, size, device, dtype)
    kind, where = f"builders/{device}/gradient-{short(dtype)}", ",".join(map(str, size))
    plain = {"plain torch: unfold, COO to CSR": build.torch_unfold_coo, "plain cupy: COO to CSR": cupy_coo}
    full = {"the full matrix": build.ours_gradient}
    return [
        builder(
            f"{kind}/{where}",
            case,
            build.ours_gradient,
            plain if dtype == torch.float64 else {},
            quick=size[1] <= 16,
        ),
        builder(f"{kind}-int64/{where}", lambda: widened(case(), build.gradient_layout), ours_wide),
        builder(
            f"{kind}-drop_zeros/{where}",
            partial(build.half_dead, case),
            build.ours_gradient_nonzeros,
            full,
            waits=True,
        ),
    ]


def weight_builders(size: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Entry]:
    case = partial(build.weight_case, size, device, dtype)
    kind, where = f"builders/{device}/weight-{short(dtype)}", ",".join(map(str, size))
    return [
        builder(f"{kind}/{where}", case, build.ours_weight),
        builder(f"{kind}-int64/{where}", lambda: widened(case(), weight_layout), ours_wide),
        builder(f"{kind}-mask/{where}", lambda: half_known(case()), build.ours_weight, waits=True),
    ]


def parts(size: tuple[int, ...], device: str) -> Entry:
    return Entry(
        f"builders/{device}/values-float64/{','.join(map(str, size))}",
        partial(build.parts_of, partial(build.gradient_case, size, device)),
        build.values_alone,
        {"the pattern alone": build.pattern_alone, "the values and their transpose": build.sum_values},
    )


def builders(device: str) -> list[Entry]:
    found = [parts(size, device) for size in build.SIZES]
    for dtype in DTYPES:
        for size in build.SIZES:
            found += gradient_builders(size, dtype, device)
        for size in build.WEIGHT_SIZES:
            found += weight_builders(size, dtype, device)
    return found


def half_known(case: Case) -> Case:
    """Put the outputs behind a ReLU: about half of them are known."""
    generator = torch.Generator().manual_seed(0)
    known = torch.rand(len(case.source), case.out_side, case.out_side, generator=generator) < 0.5
    case.mask = known.to(case.source.device)
    return case


@dataclass(kw_only=True)
class WideCase(Case):
    """A case whose matrix gets int64 indices, which the public functions choose for larger ones only."""

    layout: ConstraintLayout


def widened(case: Case, layout_of: Callable[[Case], ConstraintLayout]) -> WideCase:
    layout = layout_of(case)
    object.__setattr__(layout, "index_dtype", torch.int64)
    return WideCase(**vars(case), layout=layout)


def weight_layout(case: Case) -> ConstraintLayout:
    return ConstraintLayout.of_weight(build.geometry_of(case, case.source.shape[1], len(case.source)))


def ours_wide(case: WideCase) -> Tensor:
    backend, layout = backend_for(case.source.device), case.layout
    crow = backend.offsets(layout, case.source.device)
    col = backend.columns(crow, layout.nnz, layout)
    values = backend.values(case.source, crow, layout.nnz, layout)
    return csr(crow, col, values, layout.n_cols)


def cupy_coo(case: Case) -> Any:
    with cupy_on_torch_stream(case.source.device, "plain cupy") as cupy:
        from cupyx.scipy.sparse import coo_matrix

        return build.coo_to_csr(cupy, coo_matrix, cupy.from_dlpack(case.source[0]), case)


# --- Roofline: what the machine can do ------------------------------------------------------------------

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


def roofline(name: str, stage: Stage, device: str, *, quick: bool) -> Entry:
    def record(returned: tuple[Any, Any]) -> dict[str, Any]:
        given, result = returned
        work = stage.work(given, result)
        return shares(work, seconds_of(stage.run, given) / work.times, limits_of(device))

    return Entry(
        f"roofline/{device}/{name}",
        partial(stage.setup, device),
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
        return builder_work(build.gradient_layout(case), dtype)

    return Stage(lambda device: build.gradient_case(size, device, dtype), build.ours_gradient, work)


def weight_stage(size: tuple[int, ...], dtype: torch.dtype) -> Stage:
    def work(case: Case, _: Tensor) -> Work:
        return builder_work(weight_layout(case), dtype)

    return Stage(lambda device: build.weight_case(size, device, dtype), build.ours_weight, work)


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
    given = stem_layer(device, size)
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


def rooflines(device: str) -> list[Entry]:
    """The stages on the layers they are for: both matrices, a stem of 224 pixels, the third layer of cnn4_224."""
    found = []
    for dtype in DTYPES:
        system = partial(hybrid, 224, dtype)
        stages = {
            "gradient-matrix": gradient_stage((64, 112, 7, 2, 3), dtype),
            "weight-matrix": weight_stage((3, 32, 112, 7, 2, 3), dtype),
            "system-apply": Stage(system, apply, lambda given, _: product_work(given)),
            "system-adjoint": Stage(system, adjoint, lambda given, _: product_work(given)),
            "krylov-iteration": Stage(system, iterate, iteration_work),
        }
        quick = dtype == torch.float64
        found += [
            roofline(f"{name}/{short(dtype)}", stage, device, quick=quick and name != "krylov-iteration")
            for name, stage in stages.items()
        ]
    third = Stage(partial(direct, 256, 256, 56, 5, 2, 2), solve_direct, direct_work)
    return [*found, roofline("phase-direct/float64", third, device, quick=False)]


# --- Entries --------------------------------------------------------------------------------------------


def gpu_set(device: str) -> list[Entry]:
    kinds = (attacks, batches, photos, stems, builders, rooflines)
    return [entry for kind in kinds for entry in kind(device)]


def entries() -> list[Entry]:
    return rooflines("cpu") + (gpu_set("cuda") if torch.cuda.is_available() else [])
