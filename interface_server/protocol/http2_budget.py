"""How much of what costs a server more than its client one HTTP/2 connection may do. No I/O.

PING, SETTINGS, WINDOW_UPDATE, empty DATA and requests that are reset before they are answered are cheap to send
(CVE-2019-9512, -9515, -9518, CVE-2023-44487). Each spends from a budget that refills with time; a connection that has
spent it is ended (ENHANCE_YOUR_CALM). A browser that leaves a page with all its requests open stays far below.

What answers our own frames is paid for by them: a client that reads a large response opens its windows once or twice
for each DATA frame, and may measure with a PING how fast it comes.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

__all__ = ["Budget", "Cost"]


class Cost(IntEnum):
    """Of one frame, or of what it brings about."""

    CONTROL = 1  # PING, PRIORITY, WINDOW_UPDATE, unknown frames, DATA without data or behind the end of its stream
    SETTINGS = 5
    BAD_REQUEST = 5
    RESET = 5  # of a request that is not answered completely, whoever is said to have done it (CVE-2025-8671)


# Control frames that are paid for by one frame of ours, or by one request: its own windows may be opened, too.
_EARNED: Final = 2
# So many at most are kept. Twice the DATA frames that fit into the windows of a browser, twelve times over.
_EARNED_MAX: Final = 10_000


class Budget:
    """At first, and at most, 1000; 50 more each second."""

    __slots__ = ("_at", "_earned", "_left")
    _MOST = 1000.0
    _PER_S = 50.0

    def __init__(self, now: float) -> None:
        self._left = self._MOST
        self._at = now
        self._earned = 0  # control frames that cost nothing

    def __repr__(self) -> str:
        return f"<Budget {self._left:.0f} earned={self._earned}>"

    def earn(self) -> None:
        """A frame of ours has been sent, or a request has come."""
        if self._earned < _EARNED_MAX:
            self._earned += _EARNED

    def spend(self, cost: Cost, now: float) -> bool:
        """False when it is used up."""
        if self._earned and cost is Cost.CONTROL:
            self._earned -= 1
            return True
        self._left = min(self._MOST, self._left + (now - self._at) * self._PER_S) - cost
        self._at = now
        return self._left >= 0
