"""The largest batch that is recovered whole: by its count of equations, and by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rconv_fast.audit.finding import Finding
from rconv_fast.audit.rank import Measured, count_layers
from rconv_fast.walk.graph import Graph

# No batch larger than this is counted.
LARGEST_BATCH = 1024
# No batch larger than this is tried.
LARGEST_TRIED = 32


@dataclass(frozen=True)
class LargestBatch:
    """What is known of it.

    Attributes
    ----------
    size : int
        The largest batch recovered whole: as tried, else by the count.
    counted : int
        The largest batch whose every layer is determined by the count of equations.
    sentence : str
        How it is known.
    """

    size: int
    counted: int
    sentence: str = "the largest batch is what the count of equations allows; it was not tried (run=True)"

    def as_tried(self, size: int, *, more_failed: bool) -> LargestBatch:
        """The same once a size was recovered, and one more failed or was not tried."""
        more = f"of {size + 1} not" if more_failed else f"more than {LARGEST_TRIED} were not tried"
        said = f"most of three made-up batches of {size} were recovered whole, {more}"
        counted = f"the count of equations allows {self.counted}"
        return replace(self, size=size, sentence=f"the largest batch is what was tried: {said}; {counted}")


def counted_batch(graph: Graph, measured: Measured, loss: str, finding: Finding, batch_size: int) -> LargestBatch:
    """The largest batch whose every layer is determined, in agreement with the verdict for `batch_size`.

    Of one near the head's limit some batches are taken apart and some are not: it counts.
    """

    def whole(batch: int) -> bool:
        layers = count_layers(graph, batch, measured, loss)
        return all(layer is layers[-1] and layer.determined for layer in layers if layer.stops)

    low, high = 0, 1
    while high <= LARGEST_BATCH and whole(high):
        low, high = high, 2 * high
    low = bisect(whole, low, high)
    return LargestBatch(max(low, batch_size) if finding.verdict == "exact" else min(low, batch_size - 1), low)


def most_of_three(outcomes: Iterator[bool]) -> bool:
    """Whether two of three are true; the third is not asked for where two agree."""
    first, second = next(outcomes), next(outcomes)
    return first if first == second else next(outcomes)


def tried_batch(counted: LargestBatch, known: int, whole: Callable[[int], bool]) -> LargestBatch:
    """The largest batch that is recovered, up or down from the one that the count allows.

    Parameters
    ----------
    counted : LargestBatch
        By its count.
    known : int
        A batch that is recovered.
    whole : callable
        Tries a batch.
    """
    size = counted.size
    if size > LARGEST_TRIED:
        sentence = f"the largest batch is what the count of equations allows; more than {LARGEST_TRIED} are not tried"
        return replace(counted, sentence=sentence)
    if not whole(size):
        return counted.as_tried(bisect(whole, known, size), more_failed=True)
    more_failed = False
    while size < LARGEST_TRIED and not more_failed:
        more_failed = not whole(size + 1)
        size += not more_failed
    return counted.as_tried(size, more_failed=more_failed)


def bisect(condition: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number with the condition, which holds at `low` and not at `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if condition(middle) else (low, middle)
    return low
