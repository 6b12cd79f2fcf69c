"""How long a computation may take: one value, passed down, asked by every loop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """A point in time after which loops end with what they have.

    Attributes
    ----------
    end : float
        On ``time.monotonic``'s clock; infinite for no limit.
    """

    end: float = math.inf

    @classmethod
    def seconds(cls, limit: float | None) -> Budget:
        """From now, `limit` seconds (None: no limit)."""
        return cls() if limit is None else cls(time.monotonic() + limit)

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.end - time.monotonic())

    @property
    def is_limited(self) -> bool:
        """Whether anybody set a limit."""
        return math.isfinite(self.end)

    @property
    def spent(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self.end

    def at_most(self, limit: float) -> Budget:
        """The earlier of this end and `limit` seconds from now."""
        return Budget(min(self.end, time.monotonic() + limit))
