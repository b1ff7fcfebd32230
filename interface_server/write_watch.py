"""Finds clients that take nothing of what was written for them.

A socket whose buffer is full waits for its client, and everything behind it waits, too: its application, its window,
its place among the worker's connections. A client that reads slowly may take its time; one that reads nothing, or has
vanished without a word, must not keep all that for ever. So while the transport is full, something must move: 16 KiB,
or everything, in each period (``--timeout-write``).

What moves is counted in the kernel's send buffer, too (``unsent_bytes``): it holds some MiB, and takes more from us
only when a third of it is free, which a slow client needs minutes for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from interface_server.deadlines import Deadlines
from interface_server.transports import unsent_bytes

__all__ = ["WriteWatch"]

# Less in a whole period is no progress: a byte now and then buys no time (slow read attacks). 136 B/s with the
# default of 120 s.
_PROGRESS_BYTES_MIN: Final = 16 * 1024


class WriteWatch:
    """Of one socket. Implements ``deadlines.HasDeadline``."""

    __slots__ = ("_deadlines", "_stalled", "_timeout_s", "_transport", "_unsent_bytes", "deadline_tick")

    def __init__(
        self, transport: Any, *, deadlines: Deadlines, timeout_s: float, stalled: Callable[[], None]
    ) -> None:
        self.deadline_tick: int | None = None  # of Deadlines
        self._transport = transport
        self._deadlines = deadlines
        self._timeout_s = timeout_s  # 0: a client may take as long as it likes
        self._stalled = stalled
        self._unsent_bytes = 0  # at the last look

    def __repr__(self) -> str:
        return f"<WriteWatch {'watches' if self.deadline_tick is not None else 'rests'} unsent={self._unsent_bytes}>"

    def start(self) -> None:
        """The transport is full. Twisted says so again with each write, of a ping say: it is the same fullness."""
        if self._timeout_s and self.deadline_tick is None:
            self._unsent_bytes = unsent_bytes(self._transport)
            self._deadlines.arm(self, self._timeout_s)

    def stop(self) -> None:
        """The transport is full no more, or is closed."""
        self._deadlines.disarm(self)

    # Called by Deadlines

    def deadline_reached(self) -> None:
        before, self._unsent_bytes = self._unsent_bytes, unsent_bytes(self._transport)
        if before - self._unsent_bytes >= _PROGRESS_BYTES_MIN:
            self._deadlines.arm(self, self._timeout_s)
        else:
            self._stalled()
