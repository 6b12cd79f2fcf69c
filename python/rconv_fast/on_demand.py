"""Tensors made when they are asked for: of a large model there is never a second copy in another precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

# Tensors of up to this many values are kept once they are made.
KEPT = 1 << 20
# Values of a large tensor that are looked at together, so that no large copy is made.
TOGETHER = 1 << 22


class OnDemand(Mapping[str, Tensor]):
    """Tensors by name; `make` gives one of them."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        made = self._kept.get(name)
        if made is None:
            made = self._make(name)
            if made.numel() <= KEPT:
                self._kept[name] = made
        return made

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def root_mean_square(g: Tensor) -> float:
    """Of the entries, in float64 part by part."""
    return math.sqrt(sum(float(p.double().square().sum()) for p in g.reshape(-1).split(TOGETHER)) / max(g.numel(), 1))
