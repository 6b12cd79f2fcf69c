"""Which preconditioner a system gets: ordered values that say whether they serve, what they cost, how they are built.

One product with M costs the convolutions' flops and is the unit; what decides is the number of iterations, and what
the preconditioner costs before the first:

* `INVERSE` on a GPU, for systems so small that inverting ``M^T M`` takes less than a few iterations' launches;
* `PHASE_CHOLESKY` when the gradient rows cover most unknowns: a factor of n^3/3 flops for each stride phase of n
  unknowns, shared by all channels, leaves few iterations for the weight rows;
* `DISSECTION` when the weight rows are nearly square, hence ill-conditioned, and their factor is cheap: with a sketch
  of the gradient rows it inverts the system up to rounding, and a few iterations suffice;
* `OUTPUTS` when the gradient rows are few beside the others, which suffice: what they add is not worth their products;
* `JACOBI` otherwise, in float32 for large systems; where it has not converged when it has cost as much as a dissection
  would, the dissection takes over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from rconv_fast.solve.conjugate import Preconditioner
from rconv_fast.solve.dissection.border import winds
from rconv_fast.solve.dissection.factor import DissectionFactor
from rconv_fast.solve.dissection.sketch import are_few, sketch_size
from rconv_fast.solve.map_rows import MapRows, ThroughRows
from rconv_fast.solve.phases.solve import count_phases
from rconv_fast.solve.precision import float32_is_exact
from rconv_fast.solve.preconditioners import SketchedDissection, gradient_blocks, jacobi, normal_inverse, phase_cholesky
from rconv_fast.solve.rows import System, WeightRows, gradient_part

# Share of a channel's unknowns that the gradient rows must cover for factoring them to pay.
GRADIENT_COVERAGE = 0.6
# Largest phase (unknowns of one channel, all samples) whose Gram matrix is factored as a preconditioner.
MAX_FACTORED_PHASE = 8192
# Systems with fewer equations an unknown than this are ill-conditioned enough for a dissection to pay, if its
# flops are below the limit (a few seconds) and its memory below the other.
NEARLY_SQUARE = 1.6
MAX_DISSECTION_FLOPS, MAX_DISSECTION_BYTES = 1e12, 3e9
# What iterations by Jacobi may cost before a dissection is worth it.
JACOBI_FLOPS = 5e9
# Known outputs an unknown from which gradient rows, up to this share of them, are left out of the iteration, and the
# share of all iterations that this is given.
ENOUGH_OUTPUTS, FEW_GRADIENTS, OUTPUTS_SHARE = 1.35, 0.1, 8
# Largest system whose normal matrix is inverted; on a CPU the other ways are faster from a few hundred values on.
MAX_INVERTED_UNKNOWNS = {"cpu": 0, "cuda": 4096}
# Above this many unknowns the inner iterations run in float32 (four times faster convolutions on a CPU).
MIXED_PRECISION_UNKNOWNS = 20_000
MAX_ITERATIONS, MAX_MIXED_ITERATIONS = 2000, 5000
# With fewer equations than unknowns the answer is a choice anyway; with hardly more, what has not converged by then
# does not in any time that one would wait.
MAX_OPEN_ITERATIONS = 1000
SCARCE, MAX_SCARCE_ITERATIONS = 1.2, 2000
# Data asked to be solved less precisely than this are noisy.
NOISY = 1e-12


@dataclass(frozen=True)
class Built:
    """Equations, their preconditioner, and whether building it proved that they have full rank."""

    system: System
    preconditioner: Preconditioner
    proven: bool = False


@dataclass(frozen=True)
class Way:
    """One kind of preconditioner.

    Attributes
    ----------
    name : str
        As the report quotes it.
    build : callable
        From a balanced system and the precision of the products; None where it cannot be had.
    available : callable
        Whether it can serve a system.
    cost : callable
        Flops of a system before the way pays, for data that are exact (True) or noisy; the cheapest is tried first.
    gradient_weight : callable
        What the gradient rows of a system should weigh, beside 1 for the others.
    mixes : bool
        Whether its products may run in float32.
    """

    name: str
    build: Callable[[System, torch.dtype], Built | None]
    available: Callable[[System], bool] = lambda _: True
    cost: Callable[[System, bool], float] = lambda _, __: 0.0
    gradient_weight: Callable[[System], float] = lambda _: 1.0
    mixes: bool = False


def _inverse(system: System, _: torch.dtype) -> Built | None:
    inverse = normal_inverse(system)
    return None if inverse is None else Built(system, inverse, proven=True)


def _worth_inverting(system: System) -> bool:
    """Whether the inverse of the normal matrix may exist, takes little time and keeps some digits."""
    like = system.rhs[0]
    if system.support is not None or like.dtype != torch.float64:
        return False
    if any(
        isinstance(block, MapRows | ThroughRows) for block in system.blocks
    ):  # known by products only, one for each column
        return False
    return system.unknowns <= MAX_INVERTED_UNKNOWNS.get(like.device.type, 0) and system.count >= system.unknowns


def _by_phase(system: System, dtype: torch.dtype) -> Built | None:
    by_phase = phase_cholesky(system, dtype)
    return None if by_phase is None else Built(system, by_phase)


def covered(system: System) -> bool:
    """Whether the gradient rows cover so many unknowns that factoring them leaves few iterations."""
    return system.support is None and coverage(system) >= GRADIENT_COVERAGE


def coverage(system: System) -> float:
    """Share of one channel's unknowns that the gradient rows could fix, phase by phase; 0 where too large."""
    gradient = gradient_blocks(system)
    if not gradient:
        return 0.0
    phases = zip(*(count_phases(block) for block in gradient), strict=True)
    counts: list[tuple[int, int]] = [(sum(c.rows for c in phase), phase[0].unknowns) for phase in phases]
    if max(unknowns for _, unknowns in counts) > MAX_FACTORED_PHASE:
        return 0.0
    return sum(min(rows, unknowns) for rows, unknowns in counts) / sum(unknowns for _, unknowns in counts)


def _dissection(system: System, _: torch.dtype) -> Built | None:
    dissection = SketchedDissection.create(system)
    return None if dissection is None else Built(dissection.system, dissection)


def _dissection_flops(system: System) -> float:
    """Cost of dissecting the weight rows; infinite where that cannot or need not be done."""
    blocks = [block for block in system.blocks if isinstance(block, WeightRows)]
    if system.support is not None or len(blocks) != 1 or system.count > NEARLY_SQUARE * system.unknowns:
        return math.inf
    (block,) = blocks
    if block.count < 0.9 * system.unknowns:
        return math.inf
    memory, flops = DissectionFactor.estimate(block.geometry, row_weights=not block.uniform)
    samples = 1 if block.uniform else system.shape[0]
    others = [other for other in system.blocks if other is not block]
    size = sketch_size(block)
    dense_rows = sum(other.rhs.numel() for other in others) if are_few(others, size) else 2 * size
    total = memory * samples + 8 * dense_rows * system.unknowns
    return float(flops) * samples if total <= MAX_DISSECTION_BYTES else math.inf


def _winds(system: System) -> bool:
    """Whether the weight rows are square and leave directions nearly open, which iterations do not find in time."""
    if _dissection_flops(system) <= JACOBI_FLOPS:
        return False  # a dissection is tried first anyway
    blocks = [block for block in system.blocks if isinstance(block, WeightRows)]
    few = len(blocks) == 1 and system.count <= NEARLY_SQUARE * system.unknowns
    return few and winds(blocks[0].geometry, blocks[0].weight)


def without_gradients(system: System) -> System:
    """The other rows alone."""
    return System(system.shape, tuple(b for b in system.blocks if gradient_part(b) is None), system.support)


def _outputs_suffice(system: System) -> bool:
    """Whether a system is large, and rows other than the few of the gradients suffice by their count."""
    if system.unknowns < MIXED_PRECISION_UNKNOWNS:
        return False
    others = without_gradients(system).count
    return others >= ENOUGH_OUTPUTS * system.unknowns and 0 < system.count - others <= FEW_GRADIENTS * others


def _equal_rows(system: System) -> float:
    """The weight that gives gradient rows the size of the other rows.

    A few gradient rows that weigh as much as all others together are as many large singular values, each of which
    costs the iteration a step.
    """
    gradient = sum(block.count for block in system.blocks if gradient_part(block) is not None)
    others = sum(block.count for block in system.blocks) - gradient
    return min(1.0, gradient / others) if others else 1.0


INVERSE = Way("inverse", _inverse, available=_worth_inverting)
# A large weight of the gradient rows costs no iterations: the preconditioner inverts them exactly.
PHASE_CHOLESKY = Way("phase-cholesky", _by_phase, available=covered, gradient_weight=lambda _: 1e3, mixes=True)
# It takes a sketch of the gradient rows; rounded ones are better served by all of them, so it comes last there.
DISSECTION = Way(
    "dissection",
    _dissection,
    available=lambda system: not covered(system) and _dissection_flops(system) <= MAX_DISSECTION_FLOPS,
    cost=lambda system, exact: _dissection_flops(system) if exact else math.inf,
)
JACOBI = Way(
    "jacobi",
    lambda system, dtype: Built(system, jacobi(system, dtype)),
    cost=lambda system, exact: math.inf if exact and _winds(system) else JACOBI_FLOPS,
    gradient_weight=_equal_rows,
    mixes=True,
)
OUTPUTS = Way(
    "jacobi of outputs",
    lambda system, dtype: Built(without_gradients(system), jacobi(without_gradients(system), dtype)),
    available=lambda system: _outputs_suffice(system),
    cost=lambda system, exact: JACOBI.cost(system, exact) if exact else math.inf,
    mixes=True,
)
WAYS = (INVERSE, PHASE_CHOLESKY, DISSECTION, OUTPUTS, JACOBI)


@dataclass(frozen=True)
class Plan:
    """What the cost model chose: preconditioner, precision, iterations; whether rows are hardly more than values."""

    way: Way
    mixed: bool
    max_iterations: int
    scarce: bool = False

    @property
    def name(self) -> str:
        """As the report quotes it."""
        return f"cgls+{self.way.name}" + ("+float32" if self.mixed else "")


def plans(system: System, rtol: float, max_iterations: int | None = None, *, all_rows: bool = False) -> Iterator[Plan]:
    """The plans for a system, cheapest first; the next is for when the last could not be built or did not converge."""
    mixed = system.unknowns >= MIXED_PRECISION_UNKNOWNS and float32_is_exact(system.rhs[0].device)
    most = MAX_MIXED_ITERATIONS if system.unknowns >= MIXED_PRECISION_UNKNOWNS else MAX_ITERATIONS
    scarce = system.count < SCARCE * system.unknowns
    if scarce:
        most = MAX_SCARCE_ITERATIONS if system.count >= system.unknowns else MAX_OPEN_ITERATIONS
    most = most if max_iterations is None else min(most, max_iterations)
    exact = rtol < NOISY
    open_ways = [way for way in WAYS if way.available(system) and not (all_rows and way is OUTPUTS)]
    ways = sorted(open_ways, key=lambda way: way.cost(system, exact))
    for way in ways:
        share = OUTPUTS_SHARE if way is OUTPUTS else 2 if way is JACOBI and way is not ways[-1] else 1
        yield Plan(way, mixed and way.mixes, most // share, scarce and way is JACOBI and mixed)
