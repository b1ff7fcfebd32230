"""How fast a server that stops closes its WebSockets. No I/O.

Not all at once, for their clients connect again at once. Few are closed within a moment; many are spread over the
time there is, so that the other servers, and the application's database behind them, see a stream of newcomers.
"""

from __future__ import annotations

from typing import Final

__all__ = ["CLOSES_PER_S_MIN", "STEP_S", "ClosingPace"]

# So many newcomers a second are no burden to anybody.
CLOSES_PER_S_MIN: Final = 50
# The last ones need time, too: for the closing handshake, and for their applications to clean up.
_PART_OF_TIME: Final = 0.8
# How often the next ones are due.
STEP_S: Final = 0.05


class ClosingPace:
    """``count`` connections to close within ``time_s``."""

    def __init__(self, count: int, time_s: float) -> None:
        self.count = count
        self.duration_s = min(time_s * _PART_OF_TIME, count / CLOSES_PER_S_MIN)

    def __repr__(self) -> str:
        return f"<ClosingPace {self.count} over {self.duration_s:g} s>"

    def due(self, elapsed_s: float) -> int:
        """How many are to be closed by then, since the beginning."""
        if elapsed_s >= self.duration_s:
            return self.count
        return min(self.count, 1 + int(self.count * elapsed_s / self.duration_s))
