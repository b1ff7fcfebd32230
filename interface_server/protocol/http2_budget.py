"""How much of what costs a server more than its client one HTTP/2 connection may do. No I/O.

PING, SETTINGS, empty DATA and requests that are reset before they are answered are cheap to send (CVE-2019-9512,
-9515, -9518, CVE-2023-44487). Each spends from a budget that refills with time; a connection that has spent it is
ended (ENHANCE_YOUR_CALM). A browser that leaves a page with all its requests open, and a gRPC client that pings,
stay far below.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Budget", "Cost"]


class Cost(IntEnum):
    """Of one frame, or of what it brings about."""

    CONTROL = 1  # PING, PRIORITY, unknown frames, DATA without data
    SETTINGS = 5
    BAD_REQUEST = 5
    RESET = 5  # of a request that is not answered completely, whoever is said to have done it (CVE-2025-8671)


class Budget:
    """At first, and at most, 1000; 50 more each second."""

    __slots__ = ("_at", "_left")
    _MOST = 1000.0
    _PER_S = 50.0

    def __init__(self, now: float) -> None:
        self._left = self._MOST
        self._at = now

    def __repr__(self) -> str:
        return f"<Budget {self._left:.0f}>"

    def spend(self, cost: Cost, now: float) -> bool:
        """False when it is used up."""
        self._left = min(self._MOST, self._left + (now - self._at) * self._PER_S) - cost
        self._at = now
        return self._left >= 0
