"""The largest batch that may be recovered whole, by its count of equations."""

from __future__ import annotations

from rconv_fast.audit.finding import Finding
from rconv_fast.audit.rank import Measured, count_layers
from rconv_fast.walk.graph import Graph

# No batch larger than this is counted.
LARGEST_BATCH = 1024


def largest_batch(graph: Graph, measured: Measured, loss: str, finding: Finding, batch_size: int) -> int:
    """The largest batch whose every layer is determined, in agreement with the verdict for `batch_size`.

    Of one near the head's limit some batches are taken apart and some are not: it counts.
    """

    def whole(batch: int) -> bool:
        layers = count_layers(graph, batch, measured, loss)
        return all(layer is layers[-1] and layer.determined for layer in layers if layer.stops)

    low, high = 0, 1
    while high <= LARGEST_BATCH and whole(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if whole(middle) else (low, middle)
    return max(low, batch_size) if finding.verdict == "exact" else min(low, batch_size - 1)
