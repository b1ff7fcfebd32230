"""Twisted's asyncio reactor, with a repair for sockets that are reset while uvloop polls them.

libuv reports a socket with an error as a failed poll (``EBADF``), and uvloop then calls reader and writer once more
and closes its handle for good. If that one ``doRead`` finds data that came before the reset, it knows of no error,
and nobody will ever call it again: the connection would stay for ever, and whoever writes to it would get a
RuntimeError ("the handler is closed"). So the socket is asked for its error behind each read that found none.

Import it only where the reactor is made (event_loop.py): the class below is one.
"""

from __future__ import annotations

from socket import SO_ERROR, SOL_SOCKET
from typing import Any

from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.tcp import Connection

__all__ = ["Reactor"]


class Reactor(AsyncioSelectorReactor):
    """For uvloop loops and asyncio's own alike."""

    _readers: dict[Any, int]

    # Called by the loop

    def _readOrWrite(self, selectable: Any, read: bool) -> None:
        super()._readOrWrite(selectable, read)  # type: ignore[no-untyped-call]
        if (
            read
            and selectable in self._readers  # neither lost nor paused; to be read again it gets a new handle
            and isinstance(selectable, Connection)
            # This takes 0.3 us. It clears the error as well, so the end must follow.
            and selectable.socket.getsockopt(SOL_SOCKET, SO_ERROR)
        ):
            self._disconnectSelectable(selectable, CONNECTION_LOST, read)  # type: ignore[no-untyped-call]
