"""Listening sockets that take a few clients at a time; listening.py makes them.

Twisted's take a hundred in one turn of the loop, and twenty more each time as many come: beside clients that connect
and leave as fast as they can, that was 250 at once, 25 ms of work and as much again for what they had sent, while all
others waited. Not imported before the reactor is made, as the rest of Twisted's sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from twisted.internet import tcp, unix

__all__ = ["TURN_ACCEPTS_MAX", "TcpPort", "UnixPort"]

# Clients that are accepted in a turn of the loop: 0.5 ms, and as much for their requests. The others wait in the
# kernel (--backlog) for the next one; in turns of nothing else that is 5,000 a second and more.
TURN_ACCEPTS_MAX: Final = 4

# As many as any kernel keeps for us.
_ALL: Final = 65536


class _FewAtOnce:
    doRead: Callable[[], None]
    _accepts_max = TURN_ACCEPTS_MAX

    @property
    def numberAccepts(self) -> int:
        """Twisted sets it behind each turn, to what it would like to take in the next."""
        return self._accepts_max

    @numberAccepts.setter
    def numberAccepts(self, value: int) -> None:
        pass

    def accept_all(self) -> None:
        """Take everybody whom the kernel has accepted for us: we are about to close, and they would be reset."""
        self._accepts_max = _ALL
        self.doRead()


class TcpPort(_FewAtOnce, tcp.Port):
    pass


class UnixPort(_FewAtOnce, unix.Port):
    _shouldShutdown = False  # it would end the others' listening, too; for TCP Twisted sees to that itself

    def connectionLost(self, reason: Any) -> None:
        """As Twisted's, but the file stays: other processes listen on it, and whoever has made it removes it."""
        tcp.Port.connectionLost(self, reason)  # type: ignore[no-untyped-call]
