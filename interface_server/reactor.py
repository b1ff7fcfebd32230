"""Twisted's asyncio reactor, with cheaper writes and reads, and a repair for sockets that are reset under uvloop.

**Writes.** Twisted registers a transport that has something to write with the loop, is called when the socket takes
it (which it nearly always does at once), and takes the registration back: two epoll_ctl and a callback for each
answer. Here what was written within a loop turn is sent at the end of that turn, still as one send() for each socket,
and only a socket that does not take everything is registered. That was 5 of 22 us of a broadcast. What is in the way
of the usual case, a short write to a plain TCP socket that takes all of it, is left out: that was 3 us more.

**Reads** are called without Twisted's log context (1 us), which nothing here looks at, and of plain TCP sockets
without the calls between the loop and the protocol (1 us).

**Repair.** libuv reports a socket with an error as a failed poll (``EBADF``), and uvloop then calls reader and writer
once more and closes its handle for good. If that one ``doRead`` finds data that came before the reset, it knows of no
error, and nobody will ever call it again: the connection would stay for ever, and whoever writes to it would get a
RuntimeError ("the handler is closed"). So the socket is asked for its error behind each read that found none.

Import it only where the reactor is made (event_loop.py): the class below is one.
"""

from __future__ import annotations

import logging
from socket import SO_ERROR, SOL_SOCKET
from typing import Any, Final

from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.tcp import Connection, Server

__all__ = ["Reactor"]

_LOGGER: Final = logging.getLogger("trunkline.interface")


class Reactor(AsyncioSelectorReactor):
    """For uvloop loops and asyncio's own alike."""

    _readers: dict[Any, int]
    _writers: dict[Any, int]
    _asyncioEventloop: Any

    def __init__(self, eventloop: Any) -> None:
        # Both are bounded by the sockets, each of which is in here once at most.
        self._unwritten: dict[Any, None] = {}  # have something to write; tried at the end of the loop turn
        self._writing: dict[Any, None] = {}  # are being tried; those that took everything are removed
        super().__init__(eventloop)

    # Called by Twisted's transports

    def addReader(self, reader: Any) -> None:
        if isinstance(reader, Connection):
            if reader not in self._readers:
                descriptor = reader.fileno()
                self._asyncioEventloop.add_reader(descriptor, self._read, reader)
                self._readers[reader] = descriptor
        else:
            super().addReader(reader)  # type: ignore[no-untyped-call]

    def addWriter(self, writer: Any) -> None:
        if not isinstance(writer, Connection):
            super().addWriter(writer)  # type: ignore[no-untyped-call]
        elif writer not in self._writers and writer not in self._writing:
            if not self._unwritten:
                self._asyncioEventloop.call_soon(self._write)
            self._unwritten[writer] = None

    def removeWriter(self, writer: Any) -> None:
        if writer in self._writing:
            del self._writing[writer]
        elif writer in self._unwritten:
            # The call of _write that it asked for may find nothing to do.
            del self._unwritten[writer]
        else:
            super().removeWriter(writer)  # type: ignore[no-untyped-call]

    def getWriters(self) -> list[Any]:
        return [*super().getWriters(), *self._unwritten, *self._writing]  # type: ignore[no-untyped-call]

    # Called by the loop

    def _read(self, reader: Any) -> None:
        if not reader.connected:
            return  # lost in this turn
        why: BaseException | None
        try:
            if type(reader) is Server:
                # As Connection.doRead does.
                try:
                    data = reader.socket.recv(reader.bufferSize)
                except BlockingIOError:
                    why = None
                except OSError:
                    why = CONNECTION_LOST
                else:
                    protocol: Any = reader.protocol
                    why = protocol.dataReceived(data) if data else CONNECTION_DONE
            else:
                why = reader.doRead()
        except Exception as error:
            _LOGGER.exception("reading %r failed", reader)
            why = error
        if why is not None:
            self._disconnectSelectable(reader, why, True)  # type: ignore[no-untyped-call]
        elif (
            reader in self._readers  # neither lost nor paused; to be read again it gets a new handle
            # This takes 0.3 us. It clears the error as well, so the end must follow.
            and reader.socket.getsockopt(SOL_SOCKET, SO_ERROR)
        ):
            self._disconnectSelectable(reader, CONNECTION_LOST, True)  # type: ignore[no-untyped-call]

    def _write(self) -> None:
        writing = self._writing = self._unwritten
        self._unwritten = {}
        for writer in list(writing):
            if writer not in writing:
                continue  # lost meanwhile
            try:
                if type(writer) is Server and _send_at_once(writer):
                    del writing[writer]
                    continue
                self._readOrWrite(writer, False)  # type: ignore[no-untyped-call]
                if writer in writing:
                    del writing[writer]
                    super().addWriter(writer)  # type: ignore[no-untyped-call]
            except Exception:
                # A connectionLost raised, or uvloop's handle is closed: this socket's affair, not the others'.
                writing.pop(writer, None)
                _LOGGER.exception("writing to %r failed", writer)


def _send_at_once(writer: Any) -> bool:
    """Send what was written if nothing else is to be done with it; True if that was all. As doWrite() otherwise."""
    if (
        writer.dataBuffer
        or writer._tempDataLen > writer.SEND_LIMIT
        or writer.disconnecting
        or writer._writeDisconnecting
        or (writer.producer is not None and (writer.producerPaused or not writer.streamingProducer))
    ):
        return False
    written = writer._tempDataBuffer
    data = written[0] if len(written) == 1 else b"".join(written)
    try:
        sent = writer.socket.send(data)
    except OSError:
        return False  # doWrite() meets it again
    written.clear()
    writer._tempDataLen = 0
    if sent == len(data):
        return True
    writer.dataBuffer = data
    writer.offset = sent
    return False
