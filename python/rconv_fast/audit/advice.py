"""The smallest changes that stop a recovery, found by counting the equations of the changed network again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from rconv_fast.audit.finding import ENOUGH
from rconv_fast.audit.rank import LayerRank, count_layers
from rconv_fast.audit.structure import read_structure
from rconv_fast.audit.variants import variant
from rconv_fast.layers.registry import CONVOLUTIONS

# Layers that are tried, those with the fewest equations per unknown first.
LAYERS_TRIED = 3
LARGEST_STRIDE = 4
# Below this a picture is hard to recognise.
UNRECOGNISABLE_PSNR = 15.0


@dataclass(frozen=True)
class Advice:
    """One change of the model or of the training that breaks the exact recovery.

    Attributes
    ----------
    change : {"filters", "stride", "batch_size", "noise"}
        What to change.
    layer : str
        Of which layer; empty where it is none's.
    before, after : float
        The value now, and the nearest one that breaks the recovery.
    parameters : int
        How many parameters the model gains by it (negative: loses).
    equations_per_unknown : float
        At the layer where the recursion then stops; 0 where that is not counted.
    sentence : str
        All of that, to be read.
    """

    change: str
    layer: str
    before: float
    after: float
    parameters: int
    equations_per_unknown: float
    sentence: str


def advise(
    model: nn.Module,
    input_shape: Sequence[int],
    layers: Sequence[LayerRank],
    batch_size: int,
    max_batch_size: int,
    loss: str,
    psnr_at: tuple[float, float] | None = None,
) -> list[Advice]:
    """The smallest change of each kind that makes a recoverable batch unrecoverable, cheapest in parameters first.

    Parameters
    ----------
    model, input_shape, batch_size, loss
        As in `audit`.
    layers : sequence of LayerRank
        The counts as they are.
    max_batch_size : int
        The largest batch that can be recovered as it is.
    psnr_at : (float, float), optional
        A relative noise and the PSNR predicted at it: tells how much noise would do.
    """
    trials = _Trials(model, tuple(input_shape), batch_size, loss)
    candidates = [layer for layer in layers if _is_convolution(model, layer.name)]
    candidates = sorted(candidates, key=_equations_per_unknown)[:LAYERS_TRIED]
    found = [advice for layer in candidates for advice in (trials.filters(layer.name), trials.stride(layer.name))]
    changes = [advice for advice in found if advice is not None]
    changes.sort(key=lambda advice: (abs(advice.parameters), advice.change))
    larger = [_larger_batch(batch_size, max_batch_size)] if max_batch_size >= batch_size else []
    return [*changes, *larger, *_noise(psnr_at)]


def is_broken(layers: Sequence[LayerRank]) -> tuple[bool, float]:
    """Whether a count leaves no doubt that the recursion stops, and the equations per unknown where it does."""
    for layer in reversed(layers):
        if layer.stops and _equations_per_unknown(layer) < ENOUGH:
            return True, _equations_per_unknown(layer)
    return False, math.inf


def _equations_per_unknown(layer: LayerRank) -> float:
    reached = layer.unknowns - layer.unreached
    return layer.rank_bound / reached if reached else 0.0


def _is_convolution(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), CONVOLUTIONS)
    except AttributeError:
        return False


@dataclass(frozen=True)
class _Trials:
    """Counts of changed networks."""

    model: nn.Module
    input_shape: tuple[int, ...]
    batch_size: int
    loss: str

    def filters(self, layer: str) -> Advice | None:
        """The largest number of filters below the present one that is too few."""
        module = self.model.get_submodule(layer)
        assert isinstance(module, CONVOLUTIONS)
        before, groups = module.out_channels, module.groups
        breaks: Callable[[int], bool] = lambda n: self._count(layer, filters=n * groups)[0]  # noqa: E731
        most = _largest(breaks, 1, before // groups - 1)
        return None if most is None else self._advice("filters", layer, before, most * groups, filters=most * groups)

    def stride(self, layer: str) -> Advice | None:
        """The smallest stride above the present one that is too large."""
        module = self.model.get_submodule(layer)
        assert isinstance(module, CONVOLUTIONS)
        before = max(module.stride)
        for stride in range(before + 1, LARGEST_STRIDE + 1):
            if self._count(layer, stride=stride)[0]:
                return self._advice("stride", layer, before, stride, stride=stride)
        return None

    def _count(self, layer: str, **change: int) -> tuple[bool, float, int]:
        """Whether the changed network stops the recursion, its equations per unknown there, the change in size."""
        try:
            changed = variant(self.model, self.input_shape, layer, **change)
            broken, ratio = is_broken(count_layers(read_structure(changed, self.input_shape), self.batch_size))
        except Exception:  # the model's own code refuses the change
            return False, math.inf, 0
        return broken, ratio, _size(changed) - _size(self.model)

    def _advice(self, change: str, layer: str, before: int, after: int, **options: int) -> Advice:
        _, ratio, parameters = self._count(layer, **options)
        what = "filters" if change == "filters" else "stride"
        cost = f"{parameters:+,} parameters ({parameters / _size(self.model):+.1%})"
        sentence = f"{layer}: {what} {after} instead of {before}; {ratio:.2f} equations per unknown, {cost}"
        return Advice(change, layer, before, after, parameters, ratio, sentence)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _largest(condition: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest n in [low, high] with the condition, which holds up to some n; None if it holds for none."""
    if high < low or not condition(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if condition(middle) else (low, middle - 1)
    return low


def _larger_batch(batch_size: int, max_batch_size: int) -> Advice:
    after = max_batch_size + 1
    sentence = (
        f"batches of {after} or more instead of {batch_size}: not all samples can be recovered (some still may), "
        "no parameters"
    )
    return Advice("batch_size", "", batch_size, after, 0, 0.0, sentence)


def _noise(psnr_at: tuple[float, float] | None) -> list[Advice]:
    """The error is proportional to the noise: PSNR falls by 20 dB for ten times as much."""
    if psnr_at is None or not math.isfinite(psnr_at[1]):
        return []
    noise, psnr = psnr_at
    after = noise * 10 ** ((psnr - UNRECOGNISABLE_PSNR) / 20)
    sentence = (
        f"noise of {after:.2g} of each gradient's root mean square instead of {noise:.2g}: "
        f"{UNRECOGNISABLE_PSNR:.0f} dB at best, if all stays as linear as at {noise:.2g}; no parameters"
    )
    return [Advice("noise", "", noise, after, 0, 0.0, sentence)]
