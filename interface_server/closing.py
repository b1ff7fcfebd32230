"""How a socket is closed so that its client gets the last word we had for it.

To close a socket with unread bytes resets it, and the reset can overtake the answer. So where the client may still
be sending, we ``linger``: end our side only, drop what comes, and close when the client has ended its side, at the
latest some seconds after everything was written. Where it is silent, ``close`` does it behind what is to be written.

Either way the client gets as long as it needs to read what is left, as long as it reads. When that begins, and what
is said last, is http1.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from interface_server.deadlines import Deadlines
from interface_server.transports import unsent_bytes

__all__ = ["Closing"]

# What comes while we linger is dropped; beyond this the socket is not read any more: TCP stops the client until the
# timeout.
_LINGER_BYTES_MAX: Final = 1024 * 1024
_LINGER_TIMEOUT_S: Final = 5.0
# For the rest of a response that is still to be written when nothing else is left to do; a client that reads gets as
# many of these as it needs.
_FLUSH_TIMEOUT_S: Final = 30.0


class Closing:
    """Of one socket. Implements ``deadlines.HasDeadline``. ``abort`` drops the socket."""

    __slots__ = ("_abort", "_deadlines", "_dropped_bytes", "_transport", "_unsent_bytes", "deadline_tick")

    def __init__(self, transport: Any, *, deadlines: Deadlines, abort: Callable[[], None]) -> None:
        self.deadline_tick: int | None = None  # of Deadlines
        self._transport = transport
        self._deadlines = deadlines
        self._abort = abort
        self._dropped_bytes = 0  # while we linger
        self._unsent_bytes = 0  # at the last deadline

    def __repr__(self) -> str:
        return f"<Closing {'begun' if self.deadline_tick is not None else 'not begun'} unsent={self._unsent_bytes}>"

    @property
    def can_linger(self) -> bool:
        return hasattr(self._transport, "loseWriteConnection")

    @property
    def may_read(self) -> bool:
        """False when more was dropped than a client should send."""
        return self._dropped_bytes <= _LINGER_BYTES_MAX

    def linger(self) -> None:
        """End our side behind what is written. The transport has no producer any more, or would wait for it."""
        self._begin()
        self._transport.loseWriteConnection()

    def close(self) -> None:
        """Close behind what is written."""
        self._begin()
        self._transport.loseConnection()

    def drop(self, size: int) -> None:
        """So many bytes came while we linger."""
        self._dropped_bytes += size

    def write_ended(self) -> None:
        """Our side is ended, as ``linger`` wanted. Now the client's end is awaited."""
        # The kernel may hold some MiB of it, which a reset would throw away.
        self._unsent_bytes = unsent_bytes(self._transport)
        self._deadlines.arm(self, _LINGER_TIMEOUT_S)

    def stop(self) -> None:
        """The socket is gone."""
        self._deadlines.disarm(self)

    def _begin(self) -> None:
        self._unsent_bytes = unsent_bytes(self._transport) + 1
        self._deadlines.arm(self, _FLUSH_TIMEOUT_S)

    # Called by Deadlines

    def deadline_reached(self) -> None:
        unsent = unsent_bytes(self._transport)
        if 0 < unsent < self._unsent_bytes:
            self._unsent_bytes = unsent
            self._deadlines.arm(self, _FLUSH_TIMEOUT_S)
        else:
            self._abort()
