"""HTTP/2 on Twisted transports: one socket, whose frames protocol/http2_machine.py understands.

    Http2Connection   frames in and out, whose turn it is, its end. http1.py hands sockets over to it
    Http2Stream       one request or WebSocket on it (http2_stream.py)

    OPEN --stop, the client's GOAWAY--> DRAINING --last stream over--> CLOSED
      +--idle, fault of the client, budget spent, socket lost-------------^

**Flow control.** What an application has not taken is not granted again: a stream's window (RFC 9113 section 5.2)
opens only while its application's credit lasts, so a slow one costs both and no more. The window of the whole
connection opens at once: a stalled stream must not stop its neighbours. Towards the client a stream holds 64 KiB;
then its application waits. Streams take turns, a frame each.

**Limits** beside those of HTTP/1.1: streams (more are refused), the header list, 64 CONTINUATION frames (h2), the
length of frames (protocol/http2_frames.py), what is cheap to send and dear to answer (protocol/http2_budget.py),
answers that nobody reads, streams that do not move.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import ProtocolError, StreamClosedError

from channel_layer.enums import quick
from interface_server.http2_stream import Http2Stream
from interface_server.protocol.actions import End
from interface_server.protocol.errors import BadRequest
from interface_server.protocol.http2_budget import Cost
from interface_server.protocol.http2_exchange import Data, Fields, build_plain_fields
from interface_server.protocol.http2_frames import FrameGate
from interface_server.protocol.http2_machine import Flood, Http2Machine
from interface_server.protocol.http2_request import read_request
from interface_server.protocol.request import Peer

if TYPE_CHECKING:
    from interface_server.http_factory import HttpFactory

__all__ = ["PREFACE", "Http2Connection", "Http2Statistics", "Phase"]

_LOGGER: Final = logging.getLogger("trunkline.interface")

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113 section 3.4

# Handed to h2 at a time: between two of these the budget is looked at.
_FEED_BYTES: Final = 16 * 1024
# Written at a time: between two of these the transport may say that it is full.
_WRITE_BYTES: Final = 64 * 1024
# Frames for a client that reads nothing at all, beyond what streams hold: the connection is dropped.
_UNREAD_BYTES_MAX: Final = 1024 * 1024


@quick
class Phase(Enum):
    OPEN = "streams come and go"
    DRAINING = "the streams that are there finish"
    CLOSED = "the socket is gone, or about to be"


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


class Http2Connection:
    """One client socket that speaks HTTP/2. Like WebSocketClient it is told everything by http1.py."""

    def __init__(self, socket: Socket, factory: HttpFactory, peer: Peer, *, trusts_peer: bool) -> None:
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
        self._request_count = 0
        self._reset_count = 0
        self._h2 = Http2Machine(header_list_bytes_max=factory.limits.head_bytes_max, now=factory.deadlines.clock())
        factory.deadlines.arm(self, factory.settings.header_timeout_s)
        self._flush()

    def __repr__(self) -> str:
        return (
            f"<Http2Connection {self.phase.name} {self._peer.client} streams={len(self.streams)} "
            f"waiting={len(self._waiting)} writing_paused={self._writing_paused} {self._h2!r}>"
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
                if stream.has_frames:
                    self._queue(stream)
        self._send()
        if self.factory.is_stopping and not self._is_new:
            self.stop()  # it began during the stop, and its first request, perhaps in a read of its own, is here

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
            self._h2.announce_end()
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
        self._h2.now = self.factory.deadlines.clock()
        try:
            events = self._h2.receive_data(data)
        except Flood:
            self._flooded()
            return
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
                if event.stream_id not in reset:
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
                self._windows_opened = True  # the initial one may have grown
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
            if not self._h2.budget.spend(Cost.BAD_REQUEST, self._h2.now):
                self._h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
                self._flooded()
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
        stream = self.streams.get(event.stream_id or 0)
        if stream is not None:
            stream.data_received(bytes(event.data or b""), size, is_last=event.stream_ended is not None)

    def _stream_reset(self, event: StreamReset) -> None:
        self._reset_count += 1
        stream = self.streams.get(event.stream_id or 0)
        if stream is not None:
            stream.lost()

    def _client_leaves(self, event: ConnectionTerminated) -> None:
        """Its GOAWAY: no further streams, but those that are there may finish."""
        if event.error_code == ErrorCodes.NO_ERROR and self.streams:
            self.phase = Phase.DRAINING
        else:
            self._finish(None)

    def _flooded(self) -> None:
        _LOGGER.warning("ended the HTTP/2 connection of %s: too many resets or control frames", self._peer.client)
        self.factory.bad_request_count += 1
        self._finish(None)

    # Sending, called by Http2Stream

    def wait(self, stream: Http2Stream) -> None:
        """``stream`` has something to send."""
        self._queue(stream)
        self._send()

    def _queue(self, stream: Http2Stream) -> None:
        """Have ``stream`` send behind those that wait; each is there once, or it would take the others' turns."""
        if not stream.is_waiting:
            stream.is_waiting = True
            self._waiting.append(stream)

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
                # Its application may have written meanwhile, and have put it there already.
                if stream.can_send(self._h2):
                    self._queue(stream)
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
