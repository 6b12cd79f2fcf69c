"""Columns of a hidden 0/1 matrix from its products: which filters are active at each position behind an average.

Behind a ReLU and a global average ``D_f = dW_f n / delta_f = (M P)_f``: M (F, n) says which filters are active at each
of the n positions, the rows of P are the patches there. The columns of M are the 0/1 vectors in the column space of D.
n of D's rows are a basis of all, ``D = C D_basis``, so a column is ``C t``, t its entries in those rows, and a vertex
of ``0 <= C t <= 1``: the one farthest in the direction ``W p + b`` of its own patch p, since it is 1 where that is
positive. A packing, an integer program, picks the columns that add up to the row sums of M, which are known (the bias
gradients); it is right if the patches that it implies, run forward, give it back.

Patches near enough to a column's own lead to it. They come from where the last packing ends: with its columns, and
vertices that are no columns yet for those still missing, ``D = S P`` has a solution P; and D less what those columns
explain, over what they leave of a filter's count, is the mean of the missing patches at which that filter is active.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr
from scipy.optimize import Bounds, LinearConstraint, milp

from rconv_fast.budget import Budget

Array = NDArray[np.float64]

# A vertex this far from 0/1 is none of M's columns.
INTEGRAL = 1e-6
# Singular values below this, relative, are 0; a packing that leaves more of D unexplained is wrong.
RANK, UNEXPLAINED = 1e-10, 1e-9
# Rows of C this near, and outputs this near to 0 in units of the largest, are the same.
SAME = 1e-9
# Seconds a packing may take, and packings that add up tried after each other.
PACKING, PACKINGS = 1.0, 8
# Columns met often, and those whose own patch gave them back, are preferred (UNSEEN: how much a column is doubted that
# no packing had yet); a packing that does not add up is one of many, so chance decides among those.
OFTEN, UNSEEN, CHANCE = 0.1, 1, 0.5
# Vertices nearer than this to what a basis spans, relative, do not complete it.
APART = 1e-3
# Weight of "a patch is the mean patch", in units of one filter.
MEAN = 1e-3


@dataclass(frozen=True)
class _Products:
    """What is known: D (F, m), the counts (F,) of positions at which each filter is active, W, b, n; and C from D."""

    products: Array
    counts: Array
    weight: Array
    bias: Array
    n: int
    basis: NDArray[np.intp]
    others: NDArray[np.intp]
    coefficients: Array

    @classmethod
    def create(cls, products: Array, counts: Array, weight: Array, bias: Array, n: int) -> _Products:
        space = np.linalg.svd(products, full_matrices=False)[0][:, :n]
        basis = qr(space.T, mode="r", pivoting=True)[1][:n]
        coefficients = space @ np.linalg.inv(space[basis])
        rest = np.setdiff1d(np.flatnonzero(counts > 0), basis)
        distinct = np.unique((coefficients[rest] / SAME).round(), axis=0, return_index=True)[1]
        return cls(products, counts, weight, bias, n, basis, rest[distinct], coefficients)

    def vertex(self, patch: Array, most: Array) -> Array | None:
        """Find the vertex of ``0 <= C t <= most`` farthest in the direction of a patch."""
        c = self.coefficients
        inside = LinearConstraint(c[self.others], 0, most[self.others])
        found = milp(-((self.weight @ patch + self.bias) @ c), constraints=inside, bounds=Bounds(0, most[self.basis]))
        return None if found.x is None else c @ found.x

    def patches(self, columns: Array) -> Array:
        """P of ``D = columns P``."""
        return np.asarray(np.linalg.lstsq(columns, self.products, rcond=None)[0])

    @property
    def rarest(self) -> NDArray[np.intp]:
        """Filters that are active somewhere, those active at the fewest positions first."""
        alive = np.flatnonzero(self.counts > 0)
        return alive[np.argsort(self.counts[alive], kind="stable")]

    @property
    def mean(self) -> Array:
        """Of all patches, each as often as filters are active there."""
        return np.asarray(self.products[self.counts > 0].sum(0) / self.counts.sum())


@dataclass
class _Search:
    """The columns met so far, how often and how doubtful; the last vertices that are none; the packings refused."""

    known: _Products
    met: dict[bytes, Array] = field(default_factory=dict)
    hits: dict[bytes, int] = field(default_factory=dict)
    doubts: dict[bytes, float] = field(default_factory=dict)
    loose: list[Array] = field(default_factory=list)
    refused: list[set[bytes]] = field(default_factory=list)
    nearest: list[bytes] = field(default_factory=list)
    programs: int = 0

    def climb(self, patch: Array, most: Array | float = 1.0) -> bool:
        """Go to the vertex in the direction of a patch, and say whether it is a new column."""
        self.programs += 1
        vertex = self.known.vertex(patch, np.broadcast_to(most, self.known.counts.shape))
        if vertex is None:
            return False
        column = np.round(vertex)
        if not column.any() or np.abs(vertex - column).max() > INTEGRAL:
            self.loose.append(vertex)
            return False
        key = column.astype(np.int8).tobytes()
        self.hits[key] = self.hits.get(key, 0) + 1
        return self.met.setdefault(key, column) is column

    def packed(self) -> Array | None:
        """The columns that add up to all counts, explain D, and are given back by their patches; None so far."""
        self.nearest, least = [], np.inf
        for _ in range(PACKINGS):
            chosen = self._pack(exactly=True)
            if not chosen:
                break
            columns = self._columns(chosen)
            wrong = self._wrong(columns)
            if not wrong.any():
                return columns
            self.refused.append(set(chosen))
            for key, doubtful in zip(chosen, wrong > 0, strict=True):
                self.doubts[key] = self.doubts.get(key, UNSEEN) + 1 if doubtful else 0
            if wrong.sum() < least:
                self.nearest, least = chosen, float(wrong.sum())
        return None

    def _wrong(self, columns: Array) -> Array:
        """At how many filters each column differs from the forward run of its patch, at all if others combine to it."""
        known, (_, s, v) = self.known, np.linalg.svd(columns, full_matrices=False)
        if s[-1] <= RANK * s[0]:
            return np.where(np.abs(v[s <= RANK * s[0]]).max(0) > APART, float(len(columns)), 0.0)
        patches = known.patches(columns)
        if np.linalg.norm(columns @ patches - known.products) > UNEXPLAINED * np.linalg.norm(known.products):
            return np.full(known.n, float(len(columns)))
        outputs = known.weight @ patches.T + known.bias[:, None]
        clear = np.abs(outputs) > SAME * np.abs(outputs).max()
        return np.asarray((clear & ((outputs > 0) != (columns > 0))).sum(0), dtype=np.float64)

    def _pack(self, exactly: bool, noise: Array | float = 0.0) -> list[bytes]:
        """Which columns add up to all counts, or else to at most the counts, as many as possible."""
        if not self.met:
            return []
        known, keys, columns = self.known, list(self.met), self._columns(list(self.met))
        cost = np.array([self.doubts.get(k, UNSEEN) - OFTEN * np.log(self.hits[k]) for k in keys])
        rules = [LinearConstraint(columns, known.counts if exactly else -np.inf, known.counts)]
        rules.append(LinearConstraint(np.ones((1, len(keys))), known.n if exactly else 0, known.n))
        if exactly:
            rules += [
                LinearConstraint(np.array([[float(key in old) for key in keys]]), -np.inf, known.n - 1)
                for old in self.refused
            ]
        else:
            cost = cost / (1 + np.abs(cost).max()) - 1 - CHANCE + noise
        limit = {"time_limit": PACKING}
        found = milp(cost, constraints=rules, integrality=np.ones(len(keys)), bounds=Bounds(0, 1), options=limit)
        return [] if found.x is None else [key for key, taken in zip(keys, found.x, strict=True) if taken > 0.5]

    def _columns(self, keys: list[bytes]) -> Array:
        return np.stack([self.met[key] for key in keys], axis=1) if keys else np.zeros((len(self.known.counts), 0))

    def explore(self, rng: np.random.Generator) -> None:
        """Climb in the directions of the patches that one of the best packings so far implies."""
        known = self.known
        chosen = self.nearest or self._pack(exactly=False, noise=CHANCE * rng.random(len(self.met)))
        columns = self._columns(chosen)
        left = np.maximum(known.counts - columns.sum(1), 0)
        completed = self._completed(columns, self._columns([key for key in self.met if key not in chosen]))
        self.loose = []
        for patch in known.patches(completed):
            if not self.climb(patch) and left.any():
                self.climb(patch, np.minimum(1.0, left))
        for patch in itertools.chain(self._missing(columns, left), self._mixtures(left, rng)):
            self.climb(patch)

    def _completed(self, columns: Array, others: Array) -> Array:
        """Columns, other columns and loose vertices that are independent of each other, n at most."""
        basis, taken = np.zeros((len(columns), 0)), columns[:, :0]
        for column in np.concatenate([columns, others], axis=1).T:
            apart = _apart(basis, column[:, None])
            if np.linalg.norm(apart) > APART * np.linalg.norm(column):
                basis, taken = np.c_[basis, apart / np.linalg.norm(apart)], np.c_[taken, column]
        loose = np.stack(self.loose, axis=1) if self.loose else columns[:, :0]
        while taken.shape[1] < self.known.n and loose.shape[1]:
            apart = _apart(basis, loose)
            farthest = int(np.linalg.norm(apart, axis=0).argmax())
            far, vertex = apart[:, farthest], loose[:, farthest]
            if np.linalg.norm(far) <= APART * np.linalg.norm(vertex):
                break
            basis, taken = np.c_[basis, far / np.linalg.norm(far)], np.c_[taken, vertex]
        return taken[:, : self.known.n]

    def _missing(self, columns: Array, left: Array) -> Iterator[Array]:
        """The mean patches at which filters are active beside these columns, of those least active there first.

        ``D_f - (columns P)_f`` over ``left_f``, P by least squares with the mean patch for what is missing.
        """
        known, share, n_columns = self.known, 1 / (1 + left[:, None]), columns.shape[1]
        equations = np.vstack([columns * share, MEAN * np.eye(n_columns)])
        explained = (known.products - left[:, None] * known.mean) * share
        patches = np.linalg.lstsq(equations, np.vstack([explained, np.tile(MEAN * known.mean, (n_columns, 1))]))[0]
        few = np.flatnonzero(left > 0)
        for f in few[np.argsort(left[few], kind="stable")][: known.n]:
            yield (known.products[f] - columns[f] @ patches) / left[f]

    def _mixtures(self, left: Array, rng: np.random.Generator) -> Iterator[Array]:
        """Patches between the means of a few filters active at positions still missing, and beyond."""
        known = self.known
        pool = known.rarest[left[known.rarest] > 0] if left.any() else known.rarest
        for _ in range(known.n // 2):
            filters = rng.choice(pool, rng.integers(1, 4))
            share = rng.dirichlet(np.ones(len(filters)))
            patch = share @ (known.products[filters] / known.counts[filters, None])
            yield known.mean + rng.uniform(0.8, 3.0) * (patch - known.mean)


def _apart(basis: Array, vectors: Array) -> Array:
    """What an orthonormal basis leaves of vectors."""
    once = vectors - basis @ (basis.T @ vectors)
    return np.asarray(once - basis @ (basis.T @ once))


def rank_of(products: Array) -> int:
    """How many rows of D are independent of each other."""
    s = np.linalg.svd(products, compute_uv=False)
    return int((s > RANK * s[0]).sum())


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
    if rank_of(products) != n:
        return None, 0
    known = _Products.create(products, counts, weight, bias, n)
    search, rng = _Search(known), np.random.default_rng(0)
    for f in known.rarest[:n]:
        search.climb(products[f] / counts[f])
    while (columns := search.packed()) is None and not budget.spent:
        search.explore(rng)
    return columns, search.programs
