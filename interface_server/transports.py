"""What we ask of transports that Twisted's interfaces do not tell.

A transport of our own (tls.py) is an ``OwnTransport`` and answers itself; of Twisted's the attributes are read.
"""

from __future__ import annotations

import fcntl
import sys
import termios
from typing import Any

from twisted.internet.tcp import Server

__all__ = ["OwnTransport", "buffered_bytes", "held_bytes", "socket_descriptor", "unsent_bytes", "write_now"]


class OwnTransport:
    """Base of transports that stand on another one."""

    __slots__ = ()

    def buffered_bytes(self) -> int:
        raise NotImplementedError

    def held_bytes(self) -> int:
        return 0

    def socket_descriptor(self) -> int:
        raise NotImplementedError


def buffered_bytes(transport: Any) -> int:
    """Bytes that were written and the kernel has not taken; 0 where they cannot be counted."""
    if isinstance(transport, OwnTransport):
        return transport.buffered_bytes()
    try:
        return len(transport.dataBuffer) - int(transport.offset) + int(transport._tempDataLen)
    except AttributeError:
        return 0  # not one of Twisted's: then only its pausing bounds it


def held_bytes(transport: Any) -> int:
    """Bytes, at most, that were read from the socket of a paused transport and not given to its protocol."""
    return transport.held_bytes() if isinstance(transport, OwnTransport) else 0


def unsent_bytes(transport: Any) -> int:
    """Bytes that were written and the client's kernel has not acknowledged: our kernel's send buffer is in it."""
    waiting = buffered_bytes(transport)
    descriptor = socket_descriptor(transport)
    if descriptor >= 0:
        buffer = bytearray(4)
        try:
            fcntl.ioctl(descriptor, termios.TIOCOUTQ, buffer)
        except OSError:
            return waiting  # not a socket that knows: then only what we hold counts
        waiting += int.from_bytes(buffer, sys.byteorder)
    return waiting


def write_now(transport: Any, data: bytes) -> None:
    """Write, and let a plain TCP socket have it at once instead of at the end of the loop turn.

    For what nothing follows in this turn, else it would be two sends. Saves Twisted's buffer, its reactor's list of
    writers, and the call at the end of the turn (reactor.py).
    """
    if (
        type(transport) is not Server
        or transport._tempDataBuffer
        or transport.dataBuffer
        or not transport.connected
        or transport.disconnecting
        or transport._writeDisconnected
        or transport._writeDisconnecting
    ):
        transport.write(data)
        return
    try:
        sent = transport.socket.send(data)
    except OSError:
        sent = 0  # the transport meets it again
    if sent < len(data):
        transport.write(data[sent:] if sent else data)  # type: ignore[no-untyped-call]


def socket_descriptor(transport: Any) -> int:
    """File descriptor of the socket; -1 if there is none (any more)."""
    if isinstance(transport, OwnTransport):
        return transport.socket_descriptor()
    try:
        handle = transport.getHandle()
    except AttributeError:
        return -1  # Twisted's transports forget a socket that is closed
    return -1 if handle is None else int(handle.fileno())
