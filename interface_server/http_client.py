"""One HTTP request between its socket and its Connection; the same for every version of HTTP.

HttpClient carries out what an exchange decides (protocol/http_exchange.py) on what it knows as ``HttpSocket``
(http1.py). Who is asked, how the request was read and when the socket is closed is not decided here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

from channel_layer.frames import Outcome
from interface_server.access_log import AccessLog
from interface_server.broadcast import Broadcast, JoinedBroadcasts
from interface_server.client import Connection, Refusal
from interface_server.file_sender import FileSender
from interface_server.protocol.actions import End, Output
from interface_server.protocol.errors import BadRequest
from interface_server.protocol.http_exchange import HttpExchange
from interface_server.protocol.request import Peer, RequestHead

__all__ = ["HttpClient", "HttpSocket"]

_LOGGER: Final = logging.getLogger("trunkline.interface")

_DISCONNECT: Final = {"type": "http.disconnect"}


class HttpSocket(Protocol):
    """What a request needs of the socket (or stream) it came on."""

    def write(self, data: Sequence[bytes]) -> None:
        """Write these in order. May call ``pause_delivery`` of the connection before it returns."""

    def write_last(self, data: Sequence[bytes]) -> None:
        """As ``write``; nothing more is written in this turn of the loop, so it need not wait for its end."""

    def buffered_bytes(self) -> int:
        """Bytes that the kernel has not taken."""

    def application_is_full(self, is_full: bool) -> None:
        """Relay no more of the body until it is False again."""

    def body_awaited(self) -> None:
        """The client has been asked for the body (100 Continue)."""

    def exchange_over(self, end: End) -> None:
        """This request is done with."""

    def count_dropped(self, count: int) -> None:
        """So many messages of groups did not fit."""


class HttpClient:
    """One request. Implements ``client.Client``. ``peer`` is the client as proxy_headers.py decided."""

    __slots__ = (
        "_access_log",
        "_asked_at",
        "_clock",
        "_file",
        "_is_logged",
        "_peer",
        "_socket",
        "_verdict",
        "_writing_paused",
        "connection",
        "exchange",
        "head",
    )

    def __init__(
        self,
        socket: HttpSocket,
        head: RequestHead,
        exchange: HttpExchange,
        *,
        peer: Peer,
        access_log: AccessLog,
        clock: Callable[[], float],
    ) -> None:
        self.head = head
        self.exchange = exchange
        # None until Connections.open has returned it, and behind a whole response.
        self.connection: Connection | None = None
        self._socket: HttpSocket | None = socket  # None when the exchange is over
        self._peer = peer
        self._access_log = access_log
        self._clock = clock
        self._asked_at = clock()
        self._is_logged = False
        self._file: FileSender | None = None  # while one is the body of the response
        self._verdict: Outcome | Refusal | None = None  # came meanwhile
        self._writing_paused = False

    def __repr__(self) -> str:
        return f"<HttpClient {self.head.method} {self.head.raw_path!r} {self.exchange!r}>"

    # Called by the Connection

    def application_event(self, event: dict[str, Any]) -> None:
        exchange, kind = self.exchange, event["type"]
        if kind == "http.response.pathsend":
            self._send_file(event["path"])
            return
        if kind == "http.response":  # one that had to wait
            self.whole_response(event["status"], event["headers"], event["body"])
            return
        self._carry_out(exchange.apply(event))
        if kind == "http.response.start" and exchange.takes_groups and self.connection is not None:
            self.connection.accept_broadcasts()

    def whole_response(self, status: int, headers: Sequence[Sequence[bytes]], body: bytes) -> None:
        self.connection = None
        socket = self._socket
        if socket is None:
            return
        output = self.exchange.apply_whole(status, headers, body)
        data, end, problem = output
        if problem is not None or end is None:
            self._carry_out(output)
            return
        # As _carry_out, for nearly all.
        if self._access_log.enabled:
            self._log()
        self._socket = None
        socket.write_last(data)
        socket.exchange_over(end)

    def send_broadcast(self, broadcast: Broadcast | JoinedBroadcasts) -> None:
        """A ``websocket.send`` of a group that this connection is a member of: it means nothing here."""
        if self._socket is not None:
            self._socket.count_dropped(1)

    def application_receiving(self) -> None:
        output = self.exchange.apply_receiving()
        self._carry_out(output)
        if output.data and self._socket is not None:
            self._socket.body_awaited()

    def application_ended(self, outcome: Outcome) -> None:
        if self._file is not None:
            self._verdict = outcome
        else:
            self._carry_out(self.exchange.apply_ended(outcome))

    def refused(self, refusal: Refusal) -> None:
        if self._file is not None:
            self._verdict = refusal  # the application is gone, and not needed for a file
        else:
            self._carry_out(self.exchange.apply_refused(refusal))

    def pause_reading(self) -> None:
        if self._socket is not None:
            self._socket.application_is_full(True)

    def resume_reading(self) -> None:
        if self._socket is not None:
            self._socket.application_is_full(False)

    def buffered_bytes(self) -> int:
        return 0 if self._socket is None else self._socket.buffered_bytes()

    # Called by the protocol

    def pause_writing(self) -> None:
        """Nothing more can be written at the moment."""
        self._writing_paused = True
        if self._file is not None:
            self._file.pause()
        elif self.connection is not None:
            self.connection.pause_delivery()

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._file is not None:
            self._file.resume()
        elif self.connection is not None:
            self.connection.resume_delivery()

    def bad_request(self, failure: BadRequest) -> None:
        """The body of the request cannot be read."""
        if self.connection is not None:
            self.connection.client_gone(_DISCONNECT)
        self._carry_out(self.exchange.apply_bad_request(failure.status, failure.reason))

    def gone(self) -> None:
        """The client is gone."""
        self._socket = None
        self._drop_file()
        if self.connection is not None:
            self.connection.client_gone(_DISCONNECT)

    def _carry_out(self, output: Output) -> None:
        socket = self._socket
        if socket is None:
            return
        data, end, problem = output
        if problem is not None:
            _LOGGER.error("%s (%s %s)", problem, self.head.method, ascii(self.head.raw_path)[2:-1][:200])
        if self.exchange.is_written and not self._is_logged:
            self._log()
        if end is not None:
            self._socket = None
            self._drop_file()
        if data:
            socket.write(data)
        if end is not None:
            socket.count_dropped(self.exchange.dropped_count)
            if self.connection is not None:
                self.connection.finished(_DISCONNECT)
            socket.exchange_over(end)

    # A file as the body

    def _send_file(self, path: str) -> None:
        if not self.exchange.wants_body:
            self._file_piece(b"", True)
            return
        # What the application sends behind it (trailers) waits within its credit.
        if self.connection is not None:
            self.connection.pause_delivery()
        self._file = FileSender(
            path, loop=asyncio.get_running_loop(), piece=self._file_piece, failed=partial(self._file_failed, path)
        )
        self._file.start()
        if self._writing_paused:
            self._file.pause()

    def _file_piece(self, data: bytes, is_last: bool) -> None:
        if is_last:
            self._file = None
        self._carry_out(self.exchange.apply({"type": "http.response.body", "body": data, "more_body": not is_last}))
        if is_last:
            self._file_over()

    def _file_failed(self, path: str, error: OSError) -> None:
        self._file = None
        self._carry_out(self.exchange.apply_fault(f"{path!r} cannot be sent: {error.strerror or error}"))
        self._file_over()

    def _file_over(self) -> None:
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            if self.connection is not None and not self._writing_paused:
                self.connection.resume_delivery()
        elif isinstance(verdict, Refusal):
            self.refused(verdict)
        else:
            self.application_ended(verdict)

    def _drop_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.cancel()

    def _log(self) -> None:
        self._is_logged = True
        log = self._access_log
        if log.enabled and self.exchange.status is not None:
            head = self.head
            log.http(
                client=self._peer.client,
                method=head.method,
                raw_path=head.raw_path,
                query_string=head.query_string,
                http_version=head.http_version,
                status=self.exchange.status,
                application_s=self._clock() - self._asked_at,
            )
