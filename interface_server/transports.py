"""What we ask of transports that Twisted's interfaces do not tell.

A transport of our own (tls.py) is an ``OwnTransport`` and answers itself; of Twisted's the attributes are read.
"""

from __future__ import annotations

from typing import Any

__all__ = ["OwnTransport", "buffered_bytes", "socket_descriptor"]


class OwnTransport:
    """Base of transports that stand on another one."""

    __slots__ = ()

    def buffered_bytes(self) -> int:
        raise NotImplementedError

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


def socket_descriptor(transport: Any) -> int:
    """File descriptor of the socket; -1 if there is none."""
    if isinstance(transport, OwnTransport):
        return transport.socket_descriptor()
    handle = transport.getHandle()
    return -1 if handle is None else int(handle.fileno())
