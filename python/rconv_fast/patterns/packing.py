"""Columns of a hidden 0/1 matrix from its products: which filters are active at each position behind an average.

Behind a ReLU and a global average ``D_f = dW_f n / delta_f = (M P)_f``: M (F, n) says which filters are active at each
of the n positions, the rows of P are the patches there. The columns of M are the 0/1 vectors in the column space of D;
with Q an orthonormal basis of it they are vertices of ``0 <= Q t <= 1``, met by linear programs ``max c^T Q t`` in the
directions ``c = W p + b`` of likely patches p. Row sums of M are known (the bias gradients): a packing, an integer
program, picks the columns that add up to them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from rconv_fast.budget import Budget

Array = NDArray[np.float64]

# A vertex this far from 0/1 is none of M's columns.
INTEGRAL = 1e-6
# Singular values below this, relative, are 0; a packing that leaves more of D unexplained is wrong.
RANK, UNEXPLAINED = 1e-10, 1e-9
# Programs in the directions of single filters' mean patches, then of mixtures, before each packing, per position.
SINGLE, MIXED = 4, 3
# Seconds a packing may take.
PACKING = 5.0


@dataclass
class _Search:
    """The vertices met so far, and how often."""

    products: Array
    counts: Array
    weight: Array
    bias: Array
    basis: Array
    n: int
    met: dict[bytes, Array] = field(default_factory=dict)
    hits: dict[bytes, int] = field(default_factory=dict)

    def climb(self, patch: Array, most: Array) -> None:
        """Go to the vertex of ``0 <= Q t <= most`` farthest in the direction of a patch."""
        q = self.basis
        limits = np.concatenate([most, np.zeros(len(q))])
        found = linprog(-(q.T @ (self.weight @ patch + self.bias)), np.vstack([q, -q]), limits, bounds=(None, None))
        if found.x is None:
            return
        column = q @ found.x
        whole = np.round(column)
        if np.abs(column - whole).max() < INTEGRAL and whole.any():
            key = whole.astype(np.int8).tobytes()
            self.met[key] = whole
            self.hits[key] = self.hits.get(key, 0) + 1

    def pack(self) -> Array:
        """The columns (F, found) that add up to at most the counts, as many as possible, often met ones first."""
        if not self.met:
            return np.zeros((len(self.counts), 0))
        columns = np.stack(list(self.met.values()), axis=1)
        worth = np.array([1 + 0.1 * np.log(self.hits[key]) for key in self.met])
        fits = LinearConstraint(columns, -np.inf, self.counts)
        few = LinearConstraint(np.ones((1, len(worth))), 0, self.n)
        limit = {"time_limit": PACKING}
        found = milp(
            -worth, constraints=[fits, few], integrality=np.ones(len(worth)), bounds=Bounds(0, 1), options=limit
        )
        return columns[:, np.round(found.x) > 0] if found.x is not None else columns[:, :0]

    def solves(self, columns: Array) -> bool:
        """Whether columns add up to all counts and explain D."""
        if columns.shape[1] == 0 or (columns.sum(1) != self.counts).any():
            return False
        patches = np.linalg.lstsq(columns, self.products, rcond=None)[0]
        return bool(np.linalg.norm(columns @ patches - self.products) <= UNEXPLAINED * np.linalg.norm(self.products))


def find_columns(
    products: Array, counts: Array, weight: Array, bias: Array, n: int, budget: Budget
) -> tuple[Array | None, int]:
    """M (F, n) up to the order of its columns (None if it was not found), and the linear programs solved.

    Parameters
    ----------
    products : array, shape (F, m)
        D.
    counts : array of whole numbers, shape (F,)
        Row sums of M.
    weight, bias : array, shape (F, m) and (F,)
        Of the filters: they are active where ``weight @ patch + bias > 0``.
    n : int
        Positions.
    budget : Budget
        When to give up.
    """
    u, s, _ = np.linalg.svd(products, full_matrices=False)
    rank = int((s > RANK * s[0]).sum())
    if rank != n:
        return None, 0
    search = _Search(products, counts, weight, bias, u[:, :rank], n)
    rng = np.random.default_rng(0)
    alive = np.flatnonzero(counts > 0)
    alive = alive[np.argsort(counts[alive], kind="stable")]
    mean = products[alive].sum(0) / counts[alive].sum()
    programs, most, left = 0, np.ones(len(counts)), counts
    queue = [products[f] / counts[f] for f in alive[: SINGLE * n]]
    while not budget.spent:
        patches = queue or [_mixture(search, alive, left, mean, rng) for _ in range(MIXED * n)]
        for patch in itertools.takewhile(lambda _: not budget.spent, patches):
            search.climb(patch, most)
            programs += 1
        columns = search.pack()
        if columns.shape[1] == n and search.solves(columns):
            return columns, programs
        left = counts - columns.sum(1)
        queue, most = [], np.minimum(1.0, left) if most.all() and left.any() else np.ones(len(counts))
    return None, programs


def _mixture(search: _Search, alive: NDArray[np.intp], left: Array, mean: Array, rng: np.random.Generator) -> Array:
    """A patch like those at positions still missing: between the means of a few filters active there, and beyond."""
    pool = alive[left[alive] > 0]
    pool = pool if len(pool) > 1 else alive
    filters = rng.choice(pool, rng.integers(1, 4))
    share = rng.dirichlet(np.ones(len(filters)))
    patch = share @ (search.products[filters] / search.counts[filters, None])
    return np.asarray(mean + rng.uniform(0.8, 3.0) * (patch - mean))
