"""How long a client may still take for its request body. No I/O.

A client may be silent for some time; that allowance is used up while we wait for it, and grows again by what it
sends, a second for each ``rate`` bytes. So one that sends at that rate or faster may go on for ever, and one that
sends a byte now and then, to hold a place in a worker (slowloris), is out of time soon. Time in which nobody waits
for the client (its application does not take the body) does not count.
"""

from __future__ import annotations

__all__ = ["BodyPace"]


class BodyPace:
    """Of one request body."""

    __slots__ = ("_left_s", "_most_s", "_rate", "_since")

    def __init__(self, *, silence_s: float, rate: float) -> None:
        """``silence_s``: 0 for any; ``rate``, in bytes a second: 0 for any."""
        self._most_s = silence_s
        self._rate = rate
        self._left_s = silence_s
        self._since: float | None = None  # when we began to wait; None: nobody waits

    def __repr__(self) -> str:
        return f"<BodyPace left={self._left_s:.1f} waiting={self._since is not None}>"

    def wait(self, now: float) -> float | None:
        """Wait for the client from now on; return for how long at most, None for ever."""
        if not self._most_s:
            return None
        if self._since is None:
            self._since = now
        return max(0.0, self._left_s - (now - self._since))

    def received(self, size: int, now: float) -> None:
        """It sent so many bytes; nobody waits for it until the next ``wait``."""
        self.stop(now)
        self._left_s = min(self._most_s, self._left_s + size / self._rate) if self._rate else self._most_s

    def stop(self, now: float) -> None:
        """Nobody waits any more."""
        if self._since is not None:
            self._left_s -= now - self._since
            self._since = None
