"""One stream of an HTTP/2 connection: a request and its response, or a WebSocket (RFC 8441).

    Http2Stream       what HttpClient knows as its socket
    StreamTransport   what WebSocketClient knows as its transport

Which stream's turn it is, and the socket, are http2.py's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from h2.connection import H2Connection
from h2.errors import ErrorCodes

from channel_layer.openings import NO_BODY
from interface_server.http_client import HttpClient
from interface_server.protocol.actions import End
from interface_server.protocol.body_pace import BodyPace
from interface_server.protocol.errors import BadRequest
from interface_server.protocol.http2_exchange import Data, Fields, Http2Exchange
from interface_server.protocol.http2_machine import STREAM_WINDOW_BYTES
from interface_server.protocol.request import Peer, RequestHead
from interface_server.protocol.scope import build_http_scope
from interface_server.transports import OwnTransport

if TYPE_CHECKING:
    from interface_server.http2 import Http2Connection
    from interface_server.websocket import WebSocketClient

__all__ = ["Http2Stream", "StreamTransport"]

# Frames a stream may hold for a client that does not take them; beyond it the application waits …
_HELD_BYTES_MAX: Final = 64 * 1024
# … until less than this is left.
_HELD_BYTES_LOW: Final = 16 * 1024


class _Reset:
    """In place of frames: the stream is reset when it is this one's turn."""

    __slots__ = ("code",)

    def __init__(self, code: ErrorCodes) -> None:
        self.code = code


class Http2Stream:
    """One stream. Implements ``http_client.HttpSocket``; ``write`` takes ``Fields`` and ``Data``."""

    __slots__ = (
        "_application_is_full",
        "_client",
        "_connection",
        "_frames",
        "_is_ended",
        "_is_paused",
        "_offset",
        "_pace",
        "_received_bytes",
        "_request_ended",
        "_sent_bytes",
        "_sent_bytes_before",
        "_waits_for_100",
        "_websocket",
        "deadline_tick",
        "held_bytes",
        "is_over",
        "is_waiting",
        "stream_id",
    )

    def __init__(self, connection: Http2Connection, stream_id: int, *, has_body: bool) -> None:
        self.stream_id = stream_id
        self.deadline_tick: int | None = None  # of Deadlines
        self.is_waiting = False  # in the connection's queue
        self.is_over = False  # the end of the response has been sent, or never will be
        # Fields, Data and _Reset. Data is bounded: beyond _HELD_BYTES_MAX the application is paused.
        self._frames: deque[Any] = deque()
        self._offset = 0  # of the first one, if it is Data: so much of it is sent
        self.held_bytes = 0  # of Data in there
        self._connection = connection
        self._client: HttpClient | None = None
        self._websocket: WebSocketClient | None = None
        self._request_ended = not has_body
        self._is_ended = False  # the end of our side stands in the queue, or is sent
        self._is_paused = False  # the application waits
        self._application_is_full = False  # its window for the body is used up
        self._waits_for_100 = False  # the client sends no body before it
        settings = connection.factory.settings
        self._pace = BodyPace(silence_s=settings.body_timeout_s, rate=settings.body_rate)  # of the request's body
        self._received_bytes = 0  # of DATA, not granted again yet
        self._sent_bytes = 0
        self._sent_bytes_before = 0  # at the last deadline

    def __repr__(self) -> str:
        return (
            f"<Http2Stream {self.stream_id} held={self.held_bytes} ended={self._is_ended} over={self.is_over} "
            f"request_ended={self._request_ended} full={self._application_is_full} {self._client!r}>"
        )

    # Opening

    def open_request(self, head: RequestHead, peer: Peer, *, expects_continue: bool) -> None:
        factory = self._connection.factory
        expects_continue = self._waits_for_100 = expects_continue and not self._request_ended
        exchange = Http2Exchange(
            method=head.method,
            expects_continue=expects_continue,
            request_is_complete=self._request_ended,
            server_headers=factory.server_headers,
        )
        client = HttpClient(self, head, exchange, peer=peer, access_log=factory.access_log, clock=factory.clock)
        self._client = client
        settings = factory.settings
        client.connection = factory.connections.open(
            client,
            protocol="http",
            scope=build_http_scope(head, peer, root_path=settings.root_path, pathsend=settings.pathsend),
            first_event=NO_BODY if self._request_ended else None,
            tell_receiving=expects_continue,
        )
        self._arm()

    def open_websocket(self, head: RequestHead, peer: Peer) -> None:
        transport = StreamTransport(self)
        self._websocket = websocket = self._connection.factory.websockets.upgrade(
            head, peer=peer, transport=transport, over_http2=True
        )
        if self._is_paused:
            websocket.pause_producing()

    # What the client sends

    def data_received(self, data: bytes, size: int, *, is_last: bool) -> None:
        """``size`` is what the frame cost the client's window; ``is_last``: request_ended() follows."""
        self._received_bytes += size
        if self._websocket is not None:
            if data:
                self._websocket.data_received(data)
        elif self._client is not None and (data or is_last):
            client = self._client
            self._waits_for_100 = False
            self._pace.received(len(data), self._connection.factory.deadlines.clock())
            client.exchange.apply_body_begun()
            if is_last:
                self._request_ended = client.exchange.request_is_complete = True
            assert client.connection is not None
            client.connection.send_event({"type": "http.request", "body": data, "more_body": not is_last})
            self._arm()
        self._grant()

    def request_ended(self) -> None:
        """The client has ended its side."""
        if self._websocket is not None:
            self._request_ended = True
            self._websocket.read_ended(self._websocket_read)
        elif not self._request_ended:
            # Behind the last DATA, in a frame of its own (or with trailers, which ASGI does not know).
            self.data_received(b"", 0, is_last=True)
        self._request_ended = True
        if self.is_over:
            self._connection.stream_over(self)

    def _websocket_read(self) -> None:
        """The client has ended its side, and what it sent before is read."""
        # Like the end of a socket: without a Close frame it has no more to say or to hear.
        websocket, self._websocket = self._websocket, None
        if websocket is not None:
            websocket.connection_lost()
        self.end()

    def lost(self) -> None:
        """The stream, or the whole connection, is gone."""
        self.is_over = self._is_ended = self._request_ended = True
        self._frames.clear()
        self.held_bytes = self._offset = 0
        self._connection.factory.deadlines.disarm(self)
        client, self._client = self._client, None
        if client is not None:
            client.gone()
        websocket, self._websocket = self._websocket, None
        if websocket is not None:
            websocket.connection_lost()
        self._connection.stream_over(self)

    def _grant(self) -> None:
        # In quarters: a WINDOW_UPDATE for every frame would double the frames.
        if not self._application_is_full and not self._request_ended:
            size = self._received_bytes
            if size >= STREAM_WINDOW_BYTES // 4:
                self._received_bytes = 0
                self._connection.grant(self.stream_id, size)

    # Called by HttpClient and StreamTransport

    def write_last(self, data: Sequence[Any]) -> None:
        self.write(data)

    def write(self, data: Sequence[Any]) -> None:
        if self._is_ended:
            return
        for frame in data:
            self._frames.append(frame)
            if frame.ends:
                self._is_ended = True
            if type(frame) is Data:
                self.held_bytes += len(frame.data)
        self._connection.wait(self)
        if not self._is_paused and self.held_bytes > _HELD_BYTES_MAX:
            self._is_paused = True
            if self._client is not None:
                self._client.pause_writing()
            elif self._websocket is not None:
                self._websocket.pause_producing()
        self._arm()

    def buffered_bytes(self) -> int:
        return self.held_bytes

    def application_is_full(self, is_full: bool) -> None:
        self._application_is_full = is_full
        if not is_full:
            self._grant()
        self._arm()

    def body_awaited(self) -> None:
        self._waits_for_100 = False
        self._arm()

    def count_dropped(self, count: int) -> None:
        self._connection.factory.dropped_count += count

    def exchange_over(self, end: End) -> None:
        self._client = None
        self._application_is_full = False
        if end is End.CUT or end is End.RESET:
            self.abort(ErrorCodes.INTERNAL_ERROR)
        self._arm()

    def end(self) -> None:
        """End our side behind what is held."""
        if not self._is_ended:
            self.write((Data(b"", True),))

    def abort(self, code: ErrorCodes) -> None:
        """Reset the stream behind what is held: what is missing is no end that looks like one."""
        if not self.is_over:
            self._is_ended = True
            self._frames.append(_Reset(code))
            self._connection.wait(self)

    def cut(self, code: ErrorCodes) -> None:
        """Reset the stream now."""
        if not self.is_over:
            self._frames.clear()
            self.held_bytes = self._offset = 0
            self.abort(code)
        elif not self._request_ended:
            self._stop_client(code)

    def websocket_over(self) -> None:
        """The transport of the WebSocket has been closed from our side."""
        websocket, self._websocket = self._websocket, None
        if websocket is not None:
            websocket.connection_lost()
        if self.is_over and not self._request_ended:
            self._stop_client(ErrorCodes.NO_ERROR)

    def _stop_client(self, code: ErrorCodes) -> None:
        """Our side has ended, and nobody reads the client's."""
        self._request_ended = True
        self._connection.reset(self.stream_id, code)
        self._connection.stream_over(self)

    # Called by Http2Connection

    @property
    def has_frames(self) -> bool:
        return bool(self._frames)

    def can_send(self, h2: H2Connection) -> bool:
        if not self._frames:
            return False
        frame = self._frames[0]
        return type(frame) is not Data or not frame.data or h2.local_flow_control_window(self.stream_id) > 0

    def send_frame(self, h2: H2Connection) -> int:
        """Send one frame, if the windows allow it; return how many bytes of data it has."""
        if not self.can_send(h2):
            return 0
        frame = self._frames.popleft()
        size = 0
        ends = False
        if type(frame) is Data:
            data, ends = frame
            offset = self._offset
            room = min(h2.local_flow_control_window(self.stream_id), h2.max_outbound_frame_size)
            size = len(data) - offset
            if size > room:
                size, ends = room, False
                self._frames.appendleft(frame)
                self._offset = offset + size
            else:
                self._offset = 0
            if size < len(data):
                data = data[offset : offset + size]
            self.held_bytes -= size
            self._sent_bytes += size + 1
            h2.send_data(self.stream_id, data, end_stream=ends)
        elif type(frame) is Fields:
            ends = frame.ends
            self._sent_bytes += 1
            h2.send_headers(self.stream_id, frame.fields, end_stream=ends)
        else:
            h2.reset_stream(self.stream_id, frame.code)
            self._request_ended = ends = True
        if ends:
            self._sent_end(h2)
        elif self._is_paused and self.held_bytes < _HELD_BYTES_LOW:
            self._is_paused = False
            if self._client is not None:
                self._client.resume_writing()
            elif self._websocket is not None:
                self._websocket.resume_producing()
        if size and not self.held_bytes and self._client is not None and not self._request_ended:
            self._arm()  # from now on it is the body that the client owes
        return size

    def _sent_end(self, h2: H2Connection) -> None:
        """Our side is over."""
        self.is_over = True
        self._connection.factory.deadlines.disarm(self)
        if self._websocket is None and not self._request_ended:
            # RFC 9113 section 8.1: the answer is complete, and nobody will read the rest of the request.
            h2.reset_stream(self.stream_id, ErrorCodes.NO_ERROR)
            self._request_ended = True
        if self._request_ended:
            self._connection.stream_over(self)

    # Called by Deadlines

    def deadline_reached(self) -> None:
        if self.held_bytes:
            if self._sent_bytes == self._sent_bytes_before:
                self.cut(ErrorCodes.CANCEL)
                client, self._client = self._client, None
                if client is not None:
                    client.gone()
                self.websocket_over()
            else:
                self._arm()
        elif self._client is not None and not self._request_ended and not self._application_is_full:
            self._body_late()

    def _body_late(self) -> None:
        assert self._client is not None
        self._connection.factory.timeout_count += 1
        self._client.bad_request(BadRequest(408, "the rest of the body did not come in time"))

    def _arm(self) -> None:
        """Give the client time for what is its turn now."""
        factory = self._connection.factory
        left_s: float | None
        if self.is_over:
            factory.deadlines.disarm(self)
        elif self.held_bytes:
            self._pace.stop(factory.deadlines.clock())
            if self.deadline_tick is None or self._sent_bytes != self._sent_bytes_before:
                self._sent_bytes_before = self._sent_bytes
                timeout_s = factory.settings.write_timeout_s
                if timeout_s:
                    factory.deadlines.arm(self, timeout_s)
                else:
                    factory.deadlines.disarm(self)
        elif (
            self._client is not None
            and not self._request_ended
            and not self._application_is_full
            and not self._waits_for_100
            and (left_s := self._pace.wait(factory.deadlines.clock())) is not None
        ):
            if left_s == 0:
                self._body_late()
            else:
                factory.deadlines.arm(self, left_s)
        else:
            factory.deadlines.disarm(self)
            self._pace.stop(factory.deadlines.clock())


class StreamTransport(OwnTransport):
    """A stream as the transport of a WebSocket."""

    __slots__ = ("_stream",)

    def __init__(self, stream: Http2Stream) -> None:
        self._stream = stream

    def __repr__(self) -> str:
        return f"<StreamTransport {self._stream!r}>"

    def write(self, data: Any) -> None:
        """Bytes of frames, or what answers the handshake."""
        self._stream.write((Data(data, False) if type(data) is bytes else data,))

    def buffered_bytes(self) -> int:
        return self._stream.buffered_bytes()

    def socket_descriptor(self) -> int:
        return -1

    def pauseProducing(self) -> None:
        self._stream.application_is_full(True)

    def resumeProducing(self) -> None:
        self._stream.application_is_full(False)

    def unregisterProducer(self) -> None:
        """There is nothing to unregister."""

    def loseWriteConnection(self) -> None:
        self._stream.end()

    def loseConnection(self) -> None:
        self._stream.end()
        self._later(self._stream.websocket_over)

    def abortConnection(self) -> None:
        self._stream.cut(ErrorCodes.CANCEL)
        self._later(self._stream.websocket_over)

    def _later(self, call: Any) -> None:
        # As with Twisted's transports: their protocol hears of it in another turn of the loop.
        asyncio.get_running_loop().call_soon(call)
