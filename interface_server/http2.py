"""HTTP/2 on Twisted transports, with the h2 library for frames, header compression and the states of streams.

    Http2Connection   one socket: frames in and out, limits, its end. http1.py hands sockets over to it
    Http2Stream       one request on it: what HttpClient knows as its socket
    StreamTransport   one WebSocket on it (RFC 8441): what WebSocketClient knows as its transport

    OPEN --stop, the client's GOAWAY--> DRAINING --last stream over--> CLOSED
      +--idle, fault of the client, budget spent, socket lost-------------^

**Flow control.** What an application has not taken is not granted again: a stream's window (RFC 9113 section 5.2)
opens only while its application's credit lasts, so a slow one costs both and no more. The window of the whole
connection opens at once: a stalled stream must not stop its neighbours. Towards the client a stream holds 64 KiB;
then its application waits. Streams take turns, a frame each.

**Limits** beside those of HTTP/1.1: streams (h2 ends a connection that exceeds them), the header list (the same), 64
CONTINUATION frames (h2), the length of frames (protocol/http2_frames.py), what is cheap to send and dear to answer
(protocol/http2_budget.py), answers that nobody reads, streams that do not move.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Protocol

from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    UnknownFrameReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError, StreamClosedError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import Frame, GoAwayFrame

from channel_layer.enums import quick
from interface_server.http_client import HttpClient
from interface_server.protocol.actions import End
from interface_server.protocol.errors import BadRequest
from interface_server.protocol.http2_budget import Budget, Cost
from interface_server.protocol.http2_exchange import Data, Fields, Http2Exchange, build_plain_fields
from interface_server.protocol.http2_frames import FrameGate
from interface_server.protocol.http2_request import read_request
from interface_server.protocol.request import Peer, RequestHead
from interface_server.protocol.scope import build_http_scope
from interface_server.transports import OwnTransport

if TYPE_CHECKING:
    from interface_server.http1 import Http1Factory
    from interface_server.websocket import WebSocketClient

__all__ = ["PREFACE", "Http2Connection", "Http2Statistics", "Http2Stream", "Phase", "StreamTransport"]

_LOGGER: Final = logging.getLogger("trunkline.interface")

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113 section 3.4

# More at a time: h2 ends the connection. What RFC 9113 section 6.5.2 recommends as the least.
_STREAMS_MAX: Final = 100
# What a client may send on a stream beyond what its application has credit for; beyond it the client waits.
_STREAM_WINDOW_BYTES: Final = 128 * 1024
# On the whole connection. It opens as bytes are read, so it bounds one read, not memory.
_CONNECTION_WINDOW_BYTES: Final = 1024 * 1024
# Frames a stream may hold for a client that does not take them; beyond it the application waits …
_HELD_BYTES_MAX: Final = 64 * 1024
# … until less than this is left.
_HELD_BYTES_LOW: Final = 16 * 1024
# Handed to h2 at a time: between two of these the budget is looked at.
_FEED_BYTES: Final = 16 * 1024
# Written at a time: between two of these the transport may say that it is full.
_WRITE_BYTES: Final = 64 * 1024
# Frames for a client that reads nothing at all, beyond what streams hold: the connection is dropped.
_UNREAD_BYTES_MAX: Final = 1024 * 1024
# A stream that holds data which its client has not let move for so long (twice that at most) is reset: CVE-2019-9517.
_STALL_TIMEOUT_S: Final = 120.0

_NO_BODY: Final = {"type": "http.request", "body": b"", "more_body": False}


@quick
class Phase(Enum):
    OPEN = "streams come and go"
    DRAINING = "the streams that are there finish"
    CLOSED = "the socket is gone, or about to be"


class _Reset:
    """In place of frames: the stream is reset when it is this one's turn."""

    __slots__ = ("code",)

    def __init__(self, code: ErrorCodes) -> None:
        self.code = code


class Socket(Protocol):
    """What a connection needs of its socket (http1.py)."""

    def write_bytes(self, data: bytes) -> None: ...

    def close_behind(self, *, linger: bool) -> None:
        """Close when everything is written; ``linger``: the client may still be sending."""

    def abort(self) -> None: ...

    def buffered_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Http2Statistics:
    streams: int
    held_bytes: int  # frames that wait for the client's windows or for the socket
    requests_total: int
    resets_total: int


class _H2Connection(H2Connection):
    """Takes the client's GOAWAY for what it is. h2 takes the connection for over: it drops what was to be sent, and
    refuses every frame behind, an acknowledgement of our settings included. RFC 9113 section 6.8 lets streams finish.
    """

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        event = ConnectionTerminated()
        event.error_code = frame.error_code
        event.last_stream_id = frame.last_stream_id
        event.additional_data = frame.additional_data or None
        return [], [event]


class Http2Connection:
    """One client socket that speaks HTTP/2. Like WebSocketClient it is told everything by http1.py."""

    def __init__(self, socket: Socket, factory: Http1Factory, peer: Peer, *, trusts_peer: bool) -> None:
        self.factory = factory
        self.phase = Phase.OPEN
        self.streams: dict[int, Http2Stream] = {}  # bounded by _STREAMS_MAX, and by what is still to be written
        self.deadline_tick: int | None = None  # of Deadlines
        self._socket = socket
        self._peer = peer
        self._trusts_peer = trusts_peer
        self._writing_paused = False  # the transport's buffer is full
        self._waiting: deque[Http2Stream] = deque()  # have something to send; each is in here once at most
        self._is_sending = False  # _send is on the stack
        self._is_receiving = False  # data_received is: what is to be written leaves at its end
        self._windows_opened = False  # of all streams: look at them when what was read is read
        self._is_new = True  # no request has come
        self._gate = FrameGate()
        self._budget = Budget(factory.deadlines.clock())
        self._request_count = 0
        self._reset_count = 0
        self._h2 = h2 = _H2Connection(
            H2Configuration(client_side=False, header_encoding=None, validate_outbound_headers=False)
        )
        limits = factory.limits
        # In force from the first frame, not from the client's acknowledgement on: h2 counts by this object.
        h2.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: _STREAMS_MAX,
                SettingCodes.INITIAL_WINDOW_SIZE: _STREAM_WINDOW_BYTES,
                SettingCodes.MAX_HEADER_LIST_SIZE: limits.head_bytes_max,
                SettingCodes.ENABLE_CONNECT_PROTOCOL: 1,
            },
        )
        h2.decoder.max_header_list_size = limits.head_bytes_max
        h2.initiate_connection()
        h2.increment_flow_control_window(_CONNECTION_WINDOW_BYTES - 65535)
        factory.deadlines.arm(self, factory.settings.header_timeout_s)
        self._flush()

    def __repr__(self) -> str:
        return (
            f"<Http2Connection {self.phase.name} {self._peer.client} streams={len(self.streams)} "
            f"waiting={len(self._waiting)} writing_paused={self._writing_paused} {self._budget!r}>"
        )

    def statistics(self) -> Http2Statistics:
        return Http2Statistics(
            streams=len(self.streams),
            held_bytes=sum(stream.held_bytes for stream in self.streams.values()),
            requests_total=self._request_count,
            resets_total=self._reset_count,
        )

    # Called by http1.py

    def data_received(self, data: bytes) -> None:
        self._is_receiving = True
        try:
            for offset in range(0, len(data), _FEED_BYTES):
                if self.phase is Phase.CLOSED:
                    return
                self._receive(data[offset : offset + _FEED_BYTES])
        finally:
            self._is_receiving = False
        if self._windows_opened:
            self._windows_opened = False
            for stream in self.streams.values():
                if stream.has_frames and not stream.is_waiting:
                    stream.is_waiting = True
                    self._waiting.append(stream)
        self._send()

    def connection_lost(self) -> None:
        """The socket is gone."""
        self._end_streams()

    def pause_producing(self) -> None:
        self._writing_paused = True

    def resume_producing(self) -> None:
        self._writing_paused = False
        self._send()

    def stop(self) -> None:
        """Take no further request; end with the last stream."""
        if self.phase is Phase.OPEN:
            self.phase = Phase.DRAINING
            # h2 believes that a connection is over with its GOAWAY; RFC 9113 section 6.8 lets its streams finish.
            self._h2.close_connection(ErrorCodes.NO_ERROR, last_stream_id=self._h2.highest_inbound_stream_id)
            self._h2.state_machine.state = ConnectionState.SERVER_OPEN
            self._flush()
            self._look_for_end()

    # Called by Deadlines

    def deadline_reached(self) -> None:
        """No request came in time, or none any more."""
        if not self.streams:
            self.factory.timeout_count += self._is_new
            self._finish(ErrorCodes.NO_ERROR)

    # Receiving

    def _receive(self, data: bytes) -> None:
        if not self._gate.passes(data):
            self.factory.bad_request_count += 1
            self._finish(ErrorCodes.FRAME_SIZE_ERROR)
            return
        try:
            events = self._h2.receive_data(data)
        except ProtocolError as error:
            # h2 has written the GOAWAY. The text may hold what the client sent, so it stays out of the log.
            _LOGGER.info("ended the HTTP/2 connection of %s: %s", self._peer.client, type(error).__name__)
            self.factory.bad_request_count += 1
            self._finish(None)
            return
        # Of requests that are reset within one read nobody needs to hear.
        reset: set[int | None] = {event.stream_id for event in events if isinstance(event, StreamReset)}
        for event in events:
            if self.phase is Phase.CLOSED:
                return
            self._apply(event, reset)
        if self._socket.buffered_bytes() > _UNREAD_BYTES_MAX:
            _LOGGER.info("dropped the HTTP/2 connection of %s: it reads nothing", self._peer.client)
            self._socket.abort()

    def _apply(self, event: Event, reset: set[int | None]) -> None:
        match event:
            case DataReceived():
                self._data(event)
            case RequestReceived():
                if event.stream_id in reset:
                    self._spend(Cost.RESET)
                else:
                    self._request(event)
            case WindowUpdated():
                stream = self.streams.get(event.stream_id or 0)
                if event.stream_id == 0:
                    self._windows_opened = True
                elif stream is not None and stream.has_frames:
                    self.wait(stream)
            case StreamEnded():
                stream = self.streams.get(event.stream_id or 0)
                if stream is not None:
                    stream.request_ended()
            case StreamReset():
                self._stream_reset(event)
            case RemoteSettingsChanged():
                self._spend(Cost.SETTINGS)
                self._windows_opened = True  # the initial one may have grown
            case PingReceived() | PriorityUpdated() | UnknownFrameReceived():
                self._spend(Cost.CONTROL)
            case ConnectionTerminated():
                self._client_leaves(event)

    def _request(self, event: RequestReceived) -> None:
        factory = self.factory
        stream_id = event.stream_id
        assert stream_id is not None
        if self.phase is not Phase.OPEN:
            self.reset(stream_id, ErrorCodes.REFUSED_STREAM)  # RFC 9113 section 6.8: it may try it elsewhere
            return
        self._is_new = False
        self._request_count += 1
        factory.request_count += 1
        factory.deadlines.disarm(self)
        stream = Http2Stream(self, stream_id, has_body=event.stream_ended is None)
        self.streams[stream_id] = stream
        try:
            request = read_request(event.headers or (), factory.limits)
        except BadRequest as failure:
            factory.bad_request_count += 1
            _LOGGER.info("refused a request of %s: %s", self._peer.client or "a unix socket", failure)
            fields, body = build_plain_fields(failure.status, failure.reason, factory.server_headers)
            stream.write((Fields(fields, False), Data(body, True)))
            stream.exchange_over(End.KEEP)
            self._spend(Cost.BAD_REQUEST)
            return
        peer = self._peer
        if self._trusts_peer:
            assert factory.proxy_headers is not None
            peer = factory.proxy_headers.decide(peer, request.head.headers)
        if request.is_websocket:
            stream.open_websocket(request.head, peer)
        else:
            stream.open_request(request.head, peer, expects_continue=request.expects_continue)

    def _data(self, event: DataReceived) -> None:
        size = event.flow_controlled_length or 0
        if size:
            self._h2.increment_flow_control_window(size)
        if not event.data and event.stream_ended is None:
            self._spend(Cost.CONTROL)
        stream = self.streams.get(event.stream_id or 0)
        if stream is not None:
            stream.data_received(bytes(event.data or b""), size, is_last=event.stream_ended is not None)

    def _stream_reset(self, event: StreamReset) -> None:
        self._reset_count += 1
        stream = self.streams.get(event.stream_id or 0)
        if stream is not None:
            if not stream.is_over:
                self._spend(Cost.RESET)
            stream.lost()

    def _client_leaves(self, event: ConnectionTerminated) -> None:
        """Its GOAWAY: no further streams, but those that are there may finish."""
        if event.error_code == ErrorCodes.NO_ERROR and self.streams:
            self.phase = Phase.DRAINING
        else:
            self._finish(None)

    def _spend(self, cost: Cost) -> None:
        if not self._budget.spend(cost, self.factory.deadlines.clock()) and self.phase is not Phase.CLOSED:
            _LOGGER.warning("ended the HTTP/2 connection of %s: too many resets or control frames", self._peer.client)
            self._finish(ErrorCodes.ENHANCE_YOUR_CALM)

    # Sending, called by Http2Stream

    def wait(self, stream: Http2Stream) -> None:
        """``stream`` has something to send."""
        if not stream.is_waiting:
            stream.is_waiting = True
            self._waiting.append(stream)
        self._send()

    def grant(self, stream_id: int, size: int) -> None:
        """Let the client send so much more on a stream."""
        if self.phase is not Phase.CLOSED:
            # h2 may know already of an end that stands further down in what was read.
            with suppress(StreamClosedError):
                self._h2.increment_flow_control_window(size, stream_id)
            self._flush()

    def reset(self, stream_id: int, code: ErrorCodes) -> None:
        if self.phase is not Phase.CLOSED:
            with suppress(StreamClosedError):
                self._h2.reset_stream(stream_id, code)
            self._flush()

    def stream_over(self, stream: Http2Stream) -> None:
        """Nothing more will be sent on it or received."""
        if self.streams.pop(stream.stream_id, None) is not None:
            self._look_for_end()

    def _send(self) -> None:
        """Send what the client's windows and the socket allow; streams take turns."""
        if self._is_sending or self._is_receiving:
            return
        self._is_sending = True
        try:
            unwritten = 0
            while self._waiting and not self._writing_paused and self.phase is not Phase.CLOSED:
                stream = self._waiting.popleft()
                stream.is_waiting = False
                unwritten += stream.send_frame(self._h2)
                if stream.can_send(self._h2):
                    stream.is_waiting = True
                    self._waiting.append(stream)
                # else a WINDOW_UPDATE, or its application, brings it back
                if unwritten >= _WRITE_BYTES:
                    unwritten = 0
                    self._write()
        finally:
            self._is_sending = False
        self._write()

    def _flush(self) -> None:
        if not self._is_sending and not self._is_receiving:
            self._write()

    def _write(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._socket.write_bytes(data)

    # The end

    def _look_for_end(self) -> None:
        if self.streams or self.phase is Phase.CLOSED:
            return
        if self.phase is Phase.DRAINING:
            self._finish(None)
        else:
            self.factory.deadlines.arm(self, self.factory.settings.keep_alive_timeout_s)

    def _finish(self, code: ErrorCodes | None) -> None:
        """Close behind a GOAWAY, which has been written where ``code`` is None."""
        if code is not None:
            self._h2.close_connection(code)
        had_streams = bool(self.streams)
        self.phase = Phase.CLOSED
        self._write()
        self._end_streams()
        self._socket.close_behind(linger=had_streams or code is not ErrorCodes.NO_ERROR)

    def _end_streams(self) -> None:
        self.phase = Phase.CLOSED
        self.factory.deadlines.disarm(self)
        self._waiting.clear()
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.lost()


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
            first_event=_NO_BODY if self._request_ended else None,
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
            # Like the end of a socket: without a Close frame it has no more to say or to hear.
            self._request_ended = True
            websocket, self._websocket = self._websocket, None
            websocket.connection_lost()
            self.end()
        elif not self._request_ended:
            # Behind the last DATA, in a frame of its own (or with trailers, which ASGI does not know).
            self.data_received(b"", 0, is_last=True)
        self._request_ended = True
        if self.is_over:
            self._connection.stream_over(self)

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
            if size >= _STREAM_WINDOW_BYTES // 4:
                self._received_bytes = 0
                self._connection.grant(self.stream_id, size)

    # Called by HttpClient and StreamTransport

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
            self._connection.factory.timeout_count += 1
            self._client.bad_request(BadRequest(408, "the rest of the body did not come in time"))

    def _arm(self) -> None:
        """Give the client time for what is its turn now."""
        factory = self._connection.factory
        if self.is_over:
            factory.deadlines.disarm(self)
        elif self.held_bytes:
            if self.deadline_tick is None or self._sent_bytes != self._sent_bytes_before:
                self._sent_bytes_before = self._sent_bytes
                factory.deadlines.arm(self, _STALL_TIMEOUT_S)
        elif (
            self._client is not None
            and not self._request_ended
            and not self._application_is_full
            and not self._waits_for_100
            and factory.settings.body_timeout_s > 0
        ):
            factory.deadlines.arm(self, factory.settings.body_timeout_s)
        else:
            factory.deadlines.disarm(self)


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
