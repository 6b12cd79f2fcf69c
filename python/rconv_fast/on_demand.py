"""Tensors made when they are asked for: of a large model there is never a second copy in another precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Size, Tensor

# Tensors of up to this many values are kept once they are made.
KEPT = 1 << 20
# Values of a large tensor that are looked at together, so that no large copy is made.
TOGETHER = 1 << 18


class OnDemand(Mapping[str, Tensor]):
    """Tensors by name; `make` gives the entries of one of them, in a slice of its flat order."""

    def __init__(self, shapes: Mapping[str, Size], make: Callable[[str, slice], Tensor]) -> None:
        self._shapes = dict(shapes)
        self._make = make
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        made = self._kept.get(name)
        if made is None:
            made = self._make(name, slice(None)).reshape(self._shapes[name])
            if self.count(name) <= KEPT:
                self._kept[name] = made
        return made

    def count(self, name: str) -> int:
        """How many entries one of the tensors has."""
        return self._shapes[name].numel()

    def part(self, name: str, places: slice) -> Tensor:
        """Some entries in flat order, without the whole tensor."""
        return self[name].reshape(-1)[places] if self.count(name) <= KEPT else self._make(name, places)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def entries(tensors: Mapping[str, float | Tensor] | Mapping[str, Tensor], name: str, places: slice) -> Tensor:
    """Some entries of one of the tensors in flat order, made only now where it is on demand; a number as it is."""
    if isinstance(tensors, OnDemand):
        return tensors.part(name, places)
    value = torch.as_tensor(tensors[name])
    return value.reshape(-1)[places] if value.ndim else value


def parts(tensors: Mapping[str, Tensor], name: str) -> Iterator[slice]:
    """Slices of the flat entries of one of the tensors that are looked at together."""
    count = tensors.count(name) if isinstance(tensors, OnDemand) else tensors[name].numel()
    return (slice(start, start + TOGETHER) for start in range(0, count, TOGETHER))


def root_mean_square(tensors: Mapping[str, Tensor], name: str) -> float:
    """Of the entries of one of the tensors, in float64."""
    squares, count = 0.0, 0
    for places in parts(tensors, name):
        values = entries(tensors, name, places).double()
        squares, count = squares + float(values.square().sum()), count + values.numel()
    return math.sqrt(squares / max(count, 1))
