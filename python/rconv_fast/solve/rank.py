"""Do the equations fix the values? By a factor of the normal matrix where it is small, else by random vectors.

A claim of full rank is never taken from a residual: a null vector leaves none. It rests on one of

* a Cholesky factor of ``M^T M`` less a multiple of the identity above all rounding (`factored_condition`);
* an upper bound, below 1, of what an iteration leaves of any error (`contracts`);
* random vectors z that the equations give back (`probe`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rconv_fast.solve.dense import normal_matrix
from rconv_fast.solve.phases.gram import gram_condition
from rconv_fast.solve.rows import System, norm

# Up to this many unknowns the normal matrix is factored; building it for more takes longer than the probes.
MAX_FACTORED_UNKNOWNS = 512
# The normal matrix is known to a few times n roundings of its norm.
SHIFT_ROUNDINGS = 10

# ``x - z`` of a probe is minus the part of z in the null space. Of a Gaussian z that is at least as long as one
# Gaussian number: shorter than t with a probability of at most sqrt(2 / pi) t. For all probes together: one in a
# million.
PROBES, FALSE_CLAIM = 2, 1e-6
PROBE_TOLERANCE = math.sqrt(math.pi / 2) * FALSE_CLAIM ** (1 / PROBES)
# Where some directions are open, a value is fixed if the null space moves it by no more than this; by chance an open
# one agrees about once in 1e12 times.
VALUE_TOLERANCE = 1e-6

# ``||B|| <= LOOSE sqrt(2 / pi) max_i ||B w_i||`` for so many Gaussian w but once in 1e10 times (Halko, Martinsson and
# Tropp 2011, lemma 4.1). A good preconditioner leaves that little after so many steps, or it is none.
BOUND_VECTORS, LOOSE, CONTRACTIONS = 2, 1e5, 4

Accept = Callable[[Tensor], bool]
# The least-norm solution for other right-hand sides; ends early when the second argument accepts the iterate.
Recover = Callable[[list[Tensor], Accept], Tensor]


def touched(system: System) -> Tensor:
    """Values that some equation holds (or that are known to be 0): no others can be determined."""
    held = (system.diagonal() > 0).expand(system.shape)
    return held if system.support is None else held | ~system.support


def probe(system: System, recover: Recover) -> Tensor:
    """Which values the equations fix, bool of x's shape, by projecting Gaussian vectors z on the row space.

    The solution x of ``M x = M z`` that starts from 0 is z less its part in the null space. All values are fixed if
    ``||x - z|| < PROBE_TOLERANCE`` for each z, in the 2-norm: a null vector may be spread over all of them. With
    fewer equations than values that is never said.
    """
    determined = touched(system)
    free = determined if system.support is None else determined & system.support
    scarce = system.count < int(free.sum())
    generator = torch.Generator().manual_seed(1)  # not that of a sketch, which z must not depend on
    full = not scarce
    for _ in range(PROBES):
        z = torch.randn(system.shape, generator=generator, dtype=torch.float64).to(system.rhs[0]) * free
        x = recover(system.apply(z), lambda x, z=z: norm([x - z]) < PROBE_TOLERANCE)  # type: ignore[misc]
        if scarce or norm([x - z]) >= PROBE_TOLERANCE:
            full = False
            determined = determined & ((x - z).abs() < VALUE_TOLERANCE)
    if not full and bool(determined[free].all()):  # a contradiction: nothing is certain
        return determined & ~free
    return determined


def factored_condition(system: System) -> float:
    """Condition number of M where ``M^T M - s`` has a Cholesky factor, s above all rounding: full rank; else inf."""
    free = touched(system) if system.support is None else touched(system) & system.support
    kept = free.flatten()
    normal = normal_matrix(system.to(torch.float64))[kept][:, kept]
    largest = float(normal.abs().sum(dim=0).max())
    shift = SHIFT_ROUNDINGS * len(normal) * torch.finfo(normal.dtype).eps * largest
    factor, info = torch.linalg.cholesky_ex(normal - shift * torch.eye(len(normal)).to(normal))
    if int(info) != 0:  # synchronize!
        return math.inf
    return float(gram_condition(normal, lambda v: torch.cholesky_solve(v, factor)))


def contracts(system: System, preconditioner: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``||T^k|| < 1`` for an error's way ``T = I - P^-1 M^T M`` through k steps: then M has full rank.

    A null vector of M would be left as it is by every step. In floating point too: what rounding adds to it, a few
    roundings times the condition number of P, is nothing beside it.
    """
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(BOUND_VECTORS, *system.shape, generator=generator, dtype=torch.float64).to(system.rhs[0])
    w = w if system.support is None else w * system.support
    errors = list(w)
    for _ in range(CONTRACTIONS):
        errors = [e - preconditioner(system.adjoint(system.apply(e))) for e in errors]
        left = max(norm([e]) for e in errors)
        if LOOSE * math.sqrt(2 / math.pi) * left < 1:
            return True
        if not left < norm([w]):
            return False
    return False
