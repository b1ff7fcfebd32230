"""Notices the end of sockets that nobody reads at the moment.

A transport that is paused, or whose client has shut down its sending side, is not in the reactor's read set: a client
that dies then would be noticed only when something is written to it. So the kernel is asked with a mask that says
nothing about data: one epoll of our own for all such sockets, itself a reader of the reactor. Edge-triggered, so a
socket that stays in this state costs nothing.

Linux only. Elsewhere nothing is watched (``add`` does nothing), and such a client is noticed by the next write.
"""

from __future__ import annotations

import fcntl
import logging
import select
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

__all__ = ["EndWatch", "EndWatchStatistics", "unread_bytes"]

_LOGGER: Final = logging.getLogger("trunkline.interface")


class _Reactor(Protocol):
    def addReader(self, reader: Any) -> Any: ...
    def removeReader(self, reader: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class EndWatchStatistics:
    watched_count: int
    reported_count: int


class EndWatch:
    """Calls ``ended(is_reset)`` of a socket: False when the client sends no more, True when the socket is dead."""

    def __init__(self, reactor: _Reactor) -> None:
        self._reactor = reactor
        # By file descriptor; bounded by the sockets, each of which discards itself when it is closed.
        self._watched: dict[int, Callable[[bool], None]] = {}
        self._epoll: Any = select.epoll() if sys.platform == "linux" else None
        self._reported_count = 0
        if self._epoll is not None:
            reactor.addReader(self)

    def __repr__(self) -> str:
        return f"<EndWatch {len(self._watched)} sockets>"

    def statistics(self) -> EndWatchStatistics:
        return EndWatchStatistics(watched_count=len(self._watched), reported_count=self._reported_count)

    def add(self, descriptor: int, ended: Callable[[bool], None]) -> None:
        """Watch a socket until ``discard``; nothing happens if it is watched already."""
        if self._epoll is not None and descriptor not in self._watched:
            self._watched[descriptor] = ended
            # Errors and hang-ups are always reported.
            self._epoll.register(descriptor, select.EPOLLRDHUP | select.EPOLLET)

    def discard(self, descriptor: int) -> None:
        """Forget a socket that is closed or about to be."""
        if self._watched.pop(descriptor, None) is not None:
            with suppress(OSError):  # closed already: the kernel has removed it
                self._epoll.unregister(descriptor)

    def close(self) -> None:
        if self._epoll is not None:
            self._reactor.removeReader(self)
            self._epoll.close()
            self._epoll = None
            self._watched.clear()

    # Called by Twisted

    def fileno(self) -> int:
        return -1 if self._epoll is None else int(self._epoll.fileno())

    def doRead(self) -> None:
        for descriptor, events in self._epoll.poll(0):
            ended = self._watched.get(descriptor)
            if ended is not None:
                self._reported_count += 1
                try:
                    ended(bool(events & (select.EPOLLERR | select.EPOLLHUP)))
                except Exception:
                    # Twisted would remove the watch of all sockets.
                    _LOGGER.exception("the end of a socket could not be told")

    def connectionLost(self, reason: Any) -> None:
        """The reactor stops; ``close`` does what is to be done."""

    def logPrefix(self) -> str:
        return "end watch"


def unread_bytes(descriptor: int) -> int:
    """Return how many bytes of a socket wait in the kernel to be read."""
    buffer = bytearray(4)
    fcntl.ioctl(descriptor, termios.FIONREAD, buffer)
    return int.from_bytes(buffer, sys.byteorder)
