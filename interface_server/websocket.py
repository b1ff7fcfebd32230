"""The WebSocket adapter: between a Twisted transport and a connection.

    WebSockets       what all WebSockets of a process share; http1.py calls ``upgrade``
    WebSocketClient  one WebSocket: carries out what protocol/websocket_session.py decides

Does not live here: the rules (protocol/websocket_handshake.py, protocol/websocket_session.py), reading frames
(frame_reader.py, which has Autobahn do it), building them (protocol/websocket_frames.py), compressing them
(protocol/deflate.py), timers (deadlines.py: one for all connections).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from random import random
from typing import TYPE_CHECKING, Any, Final

from channel_layer.frames import Outcome
from channel_layer.turns import Turns
from interface_server.client import Connection, Refusal
from interface_server.frame_reader import FrameReader
from interface_server.protocol.http2_websocket import Http2Answers, read_extended_connect
from interface_server.protocol.request import Peer, RequestHead
from interface_server.protocol.scope import build_websocket_scope
from interface_server.protocol.websocket_answers import Http1Answers
from interface_server.protocol.websocket_frames import PING, PONG, build_frame
from interface_server.protocol.websocket_handshake import Handshake, HandshakeFault, read_handshake
from interface_server.protocol.websocket_session import (
    Abort,
    Actions,
    Closed,
    Finish,
    Opened,
    Refused,
    Report,
    State,
    WebSocketSession,
    Write,
)
from interface_server.transports import buffered_bytes, unsent_bytes

if TYPE_CHECKING:
    from interface_server.access_log import AccessLog
    from interface_server.broadcast import Broadcast, JoinedBroadcasts
    from interface_server.connections import Connections
    from interface_server.deadlines import Deadlines
    from interface_server.protocol.server_headers import ServerHeaders
    from interface_server.settings import InterfaceSettings

__all__ = ["WebSocketClient", "WebSockets", "WebSocketsStatistics"]

_LOGGER: Final = logging.getLogger("trunkline.interface")

# What a client may say before the handshake is answered; beyond it the socket is not read until then.
_EARLY_BYTES_MAX: Final = 16 * 1024

# What a client may send when its application has been told of the end. Many libraries finish the message they are
# sending before they read our Close (1009 for one that is too large, say), so this is more than most messages, and
# is only dropped. Beyond it the socket is not read: TCP stops the client until the close timeout.
_DISCARDED_BYTES_MAX: Final = 64 * 1024 * 1024

# A client that goes on reading what is left for it may take so many close timeouts in all; then it is cut off.
_CLOSE_TIMEOUTS_MAX: Final = 12


@dataclass(frozen=True, slots=True)
class WebSocketsStatistics:
    connecting_count: int
    open_count: int
    closing_count: int  # the application is told already, the socket is still there
    refused_count: int  # handshakes answered with anything but 101
    dropped_count: int  # events that did not fit, of connections that are over
    ping_timeout_count: int


class WebSockets:
    """What the WebSockets of one process share."""

    def __init__(
        self,
        *,
        settings: InterfaceSettings,
        connections: Connections,
        access_log: AccessLog,
        deadlines: Deadlines,
        server_headers: ServerHeaders,
        turns: Turns | None = None,
    ) -> None:
        """``turns``: of all clients of the process; None: of WebSockets alone."""
        self.settings = settings
        self.connections = connections
        self.access_log = access_log
        self.deadlines = deadlines
        self.turns = Turns() if turns is None else turns
        self.answers = Http1Answers(server_headers)
        self.http2_answers = Http2Answers(server_headers)
        self.clients: set[WebSocketClient] = set()  # until their sockets are gone; bounded by the sockets
        self.refused_count = 0
        self.dropped_count = 0
        self.ping_timeout_count = 0

    def __repr__(self) -> str:
        return f"<WebSockets {len(self.clients)}>"

    def statistics(self) -> WebSocketsStatistics:
        states = [client.state for client in self.clients]
        return WebSocketsStatistics(
            connecting_count=states.count(State.CONNECTING),
            open_count=states.count(State.OPEN),
            closing_count=states.count(State.CLOSING) + states.count(State.CLOSED),
            refused_count=self.refused_count,
            dropped_count=self.dropped_count,
            ping_timeout_count=self.ping_timeout_count,
        )

    def upgrade(
        self,
        head: RequestHead,
        *,
        peer: Peer,
        transport: Any,
        over_http2: bool = False,
    ) -> WebSocketClient:
        """Take a connection over whose request ``is_websocket_upgrade``; ``peer`` as proxy_headers.py decided.

        From now on everything about the transport goes to the client that is returned: ``data_received`` (bytes
        behind the head first), ``pause_producing`` and ``resume_producing`` as its producer, ``connection_lost``,
        and of a stream of HTTP/2 ``read_ended``.
        A faulty handshake is answered here; its client only waits for the end of the socket.
        """
        return WebSocketClient(self, head, peer=peer, transport=transport, over_http2=over_http2)


class WebSocketClient:
    """One WebSocket. Implements ``client.Client``; never raises."""

    __slots__ = (
        "_answers",
        "_application_is_full",
        "_broker_away_s",
        "_close_timeouts_left",
        "_connection",
        "_discarded_bytes",
        "_early",
        "_heard_at",
        "_log_target",
        "_ping_sent_at",
        "_pong_due",
        "_read_over",
        "_reader",
        "_reading_paused",
        "_session",
        "_shared",
        "_since",
        "_transport",
        "_unread_bytes_before",
        "_unsent_bytes_before",
        "_writing_paused",
        "deadline_tick",
    )

    def __init__(
        self,
        shared: WebSockets,
        head: RequestHead,
        *,
        peer: Peer,
        transport: Any,
        over_http2: bool,
    ) -> None:
        now = shared.deadlines.clock()
        self._shared = shared
        self._transport = transport  # ITCPTransport, a TLS one, or a stream of HTTP/2
        self._answers: Http1Answers | Http2Answers = shared.http2_answers if over_http2 else shared.answers
        self.deadline_tick: int | None = None  # of Deadlines
        self._session: WebSocketSession | None = None  # None: the handshake was faulty, nobody was asked
        self._connection: Connection | None = None  # until the application has been told of the end
        self._reader: FrameReader | None = None  # in OPEN and CLOSING
        self._discarded_bytes = 0  # what came since the application was told of the end
        self._broker_away_s = shared.connections.broker_away_s()  # in all, when the deadline of the handshake was set
        self._early = b""  # what came before the handshake was answered; bounded, see data_received
        self._application_is_full = False  # its window is used up
        self._reading_paused = False  # the transport is told not to read
        self._writing_paused = False  # the transport told us that it is full
        self._pong_due: bytes | None = None  # the last ping that came while it was full
        self._heard_at = now  # when the client last gave a sign of life
        self._ping_sent_at: float | None = None  # a ping waits for a sign of life
        self._unsent_bytes_before = 0  # at the last deadline; fewer now: the client reads
        self._close_timeouts_left = _CLOSE_TIMEOUTS_MAX
        self._read_over: Callable[[], None] | None = None  # the client has ended its side; called when all is read
        self._unread_bytes_before = 0  # at the last deadline since then; fewer now: the application takes them
        self._since = now  # of the request, then of the accept; for the access log
        self._log_target: dict[str, Any] = {
            "client": peer.client,
            "raw_path": head.raw_path,
            "query_string": head.query_string,
        }
        shared.clients.add(self)
        try:
            read = read_extended_connect if over_http2 else read_handshake
            handshake = read(head, may_deflate=shared.settings.ws_per_message_deflate)
        except HandshakeFault as fault:
            self._refuse_fault(fault)
        else:
            self._open(handshake, head, peer)

    def __repr__(self) -> str:
        return (
            f"<WebSocketClient {self.state.name} {self._log_target['raw_path']!r} buffered={self.buffered_bytes()} "
            f"reading_paused={self._reading_paused} writing_paused={self._writing_paused}>"
        )

    @property
    def state(self) -> State:
        return State.CLOSED if self._session is None else self._session.state

    def _open(self, handshake: Handshake, head: RequestHead, peer: Peer) -> None:
        shared = self._shared
        self._session = WebSocketSession(handshake, answers=self._answers)
        scope = build_websocket_scope(
            head, peer, root_path=shared.settings.root_path, subprotocols=handshake.subprotocols
        )
        shared.deadlines.arm(self, shared.settings.ws_handshake_timeout_s)
        self._connection = shared.connections.open(
            self, protocol="websocket", scope=scope, first_event={"type": "websocket.connect"}
        )

    def _refuse_fault(self, fault: HandshakeFault) -> None:
        shared = self._shared
        shared.refused_count += 1
        shared.access_log.websocket_refused(**self._log_target, status=fault.status)
        for part in self._answers.refuse(fault.status, str(fault), fault.headers):
            self._write(part)
        self._finish(linger=True)

    # Called by Twisted, by way of http1.py

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._shared.deadlines.clock()
        self._ping_sent_at = None
        reader = self._reader
        if self._connection is None:
            self._discard(data)
        if reader is not None:
            self._feed(reader, data)
        elif self.state is State.CONNECTING:
            self._early += data
            # A client may not speak before it is answered (RFC 6455 section 4.1), but some do.
            if len(self._early) > _EARLY_BYTES_MAX:
                self._pause_transport()

    def _discard(self, data: bytes) -> None:
        """It is over: what comes is read only to find the client's Close, or the end of the socket."""
        self._discarded_bytes += len(data)
        if self._discarded_bytes > _DISCARDED_BYTES_MAX:
            self._pause_transport()

    def read_ended(self, over: Callable[[], None]) -> None:
        """The client has ended its side. ``over`` is called, at once or later, when what it sent before is read, or
        its application takes none of it for a close timeout; not behind ``connection_lost``.
        """
        if self._reader is None or not self._reader.unread_bytes:
            over()
            return
        self._read_over = over
        if self.state is State.OPEN:  # else the close timeout runs
            self._arm_read()

    def connection_lost(self) -> None:
        """The socket is gone, or the client has ended its side: without a Close frame it is the same."""
        self._read_over = None
        self._shared.deadlines.disarm(self)
        self._shared.clients.discard(self)
        if self._session is not None:
            self._carry_out(self._session.lost())
        self._stop_reading()

    def pause_producing(self) -> None:
        """The transport's buffer is full."""
        self._writing_paused = True
        if self._connection is not None:
            self._connection.pause_delivery()

    def resume_producing(self) -> None:
        """The transport's buffer is empty."""
        self._writing_paused = False
        payload, self._pong_due = self._pong_due, None
        if payload is not None:
            self._ping_received(payload)
        if self._connection is not None:
            self._connection.resume_delivery()

    # Called by the Connection

    def application_event(self, event: dict[str, Any]) -> None:
        session = self._session
        assert session is not None
        frame = session.build_message(event)
        if frame is not None:
            self._transport.write(frame)
        else:
            self._carry_out(session.application_event(event))

    def send_broadcast(self, broadcast: Broadcast | JoinedBroadcasts) -> None:
        session = self._session
        assert session is not None
        # A message leaves an open session as it is; of a thousand connections nearly all are open.
        if session.state is State.OPEN or session.frame_sent():
            deflate = session.deflate
            self._transport.write(broadcast.frame if deflate is None else broadcast.compressed_frame(deflate))

    def application_receiving(self) -> None:
        """Nothing waits for it: what a WebSocket client sends is sent on as it comes."""

    def application_ended(self, outcome: Outcome) -> None:
        assert self._session is not None
        self._carry_out(self._session.application_ended(outcome))

    def refused(self, refusal: Refusal) -> None:
        assert self._session is not None
        self._carry_out(self._session.refused(refusal))

    def pause_reading(self) -> None:
        self._application_is_full = True
        self._pause_transport()
        if self._reader is not None:
            self._reader.pause()

    def resume_reading(self) -> None:
        self._application_is_full = False
        self._heard_at = self._shared.deadlines.clock()  # the ping timeout stood still
        self._ping_sent_at = None
        if self._reader is not None:
            self._resume(self._reader)
        elif len(self._early) <= _EARLY_BYTES_MAX:
            self._resume_transport()

    def buffered_bytes(self) -> int:
        return buffered_bytes(self._transport)

    # Called by FrameReader

    def _message_received(self, payload: str | bytes) -> None:
        assert self._session is not None
        event = self._session.message(payload)
        if event is not None and self._connection is not None:
            self._connection.send_event(event)

    def _ping_received(self, payload: bytes) -> None:
        assert self._session is not None
        if self._writing_paused:
            # A client that does not read must not make us write. RFC 6455 section 5.5.3: answering the last ping
            # is enough.
            self._pong_due = payload
        elif self._session.state is State.OPEN:
            self._write(build_frame(PONG, payload))  # as below, for nearly all: a flood of pings is cheap to send
        else:
            self._carry_out(self._session.ping(payload))

    def _close_received(self, payload: bytes) -> None:
        assert self._session is not None
        self._carry_out(self._session.close_frame(payload))

    def _fault_found(self, code: int, reason: str) -> None:
        assert self._session is not None
        self._carry_out(self._session.fault(code, reason))

    # Called by Deadlines

    def deadline_reached(self) -> None:
        if self.state is State.OPEN:
            if self._read_over is None:
                self._keep_alive()
            elif self._reader is not None and self._reader.unread_bytes < self._unread_bytes_before:
                self._arm_read()
            else:
                self._read_over()
            return
        if self.state is State.CONNECTING:
            # While the broker is away no application can answer: that time does not count.
            before, self._broker_away_s = self._broker_away_s, self._shared.connections.broker_away_s()
            if self._broker_away_s > before:
                self._shared.deadlines.arm(self, self._broker_away_s - before)
                return
        if self.state is not State.CONNECTING and self._close_timeouts_left > 0 and self._client_reads():
            self._close_timeouts_left -= 1
            self._arm_close()
            return
        if self._session is None:
            self._abort()
        else:
            self._carry_out(self._session.timed_out())

    def _keep_alive(self) -> None:
        """Ping a client that has been silent, give one up that stays silent."""
        shared, settings = self._shared, self._shared.settings
        now = shared.deadlines.clock()
        reads = self._client_reads()
        if self._reading_paused:
            # Its silence says nothing while we do not listen. The ping is for the other kernel: when its process is
            # gone it answers with a reset, which end_watch.py notices.
            self._write(build_frame(PING, b""))
        if self._reading_paused or reads:
            # Or it takes what we send, and our ping is behind that.
            self._heard_at = now
            self._ping_sent_at = None
        if self._ping_sent_at is not None:
            if settings.ws_ping_timeout_s and now - self._ping_sent_at >= settings.ws_ping_timeout_s:
                assert self._session is not None
                shared.ping_timeout_count += 1
                self._carry_out(self._session.timed_out())
                return
        elif now - self._heard_at >= settings.ws_ping_interval_s:
            self._ping_sent_at = now
            self._write(build_frame(PING, b""))
        self._arm_ping(now)

    def _arm_ping(self, now: float) -> None:
        settings = self._shared.settings
        if self._ping_sent_at is not None:
            if settings.ws_ping_timeout_s:
                self._shared.deadlines.arm(self, self._ping_sent_at + settings.ws_ping_timeout_s - now)
                return
            self._ping_sent_at = None  # nobody waits for the answer; the next ping comes after the interval
            self._heard_at = now
        self._unsent_bytes_before = unsent_bytes(self._transport)
        self._shared.deadlines.arm(self, self._heard_at + settings.ws_ping_interval_s - now)

    def _client_reads(self) -> bool:
        """True if transport and kernel hold fewer bytes than at the last deadline."""
        before, self._unsent_bytes_before = self._unsent_bytes_before, unsent_bytes(self._transport)
        return self._unsent_bytes_before < before

    # How

    def _carry_out(self, actions: Actions) -> None:
        for action in actions:
            match action:
                case Write(data):
                    self._write(data)
                case Closed(event):
                    self._closed(event)
                case Opened():
                    self._opened()
                case Refused(status):
                    self._shared.refused_count += 1
                    self._shared.access_log.websocket_refused(
                        **self._log_target, status=status, application_s=self._elapsed_s()
                    )
                case Finish(linger):
                    self._finish(linger=linger)
                case Abort():
                    self._abort()
                case Report(text):
                    _LOGGER.error("WebSocket %r: %s", self._log_target["raw_path"], text)

    def _write(self, data: bytes) -> None:
        """The one place that writes. Twisted joins what is written within a loop turn into one send()."""
        self._transport.write(data)

    def _opened(self) -> None:
        shared = self._shared
        shared.access_log.websocket_accepted(**self._log_target, application_s=self._elapsed_s())
        self._since = self._heard_at = shared.deadlines.clock()
        assert self._session is not None
        deflate = self._session.deflate
        self._reader = reader = FrameReader(
            message=self._message_received,
            ping=self._ping_received,
            close_frame=self._close_received,
            fault=self._fault_found,
            message_bytes_max=shared.settings.ws_max_size_bytes,
            window_bits=None if deflate is None else deflate.client_window_bits,
            turn_over=self._turn_over,
        )
        interval_s = shared.settings.ws_ping_interval_s
        if interval_s:
            # The first look comes at a random time, so that clients that connected together part.
            shared.deadlines.arm(self, interval_s * random())
        else:
            shared.deadlines.disarm(self)
        assert self._connection is not None
        self._connection.accept_broadcasts()
        early, self._early = self._early, b""
        if self._application_is_full:
            reader.pause()
        else:
            self._resume_transport()
        if early:
            self._feed(reader, early)

    def _feed(self, reader: FrameReader, data: bytes) -> None:
        try:
            reader.feed(data)
        except Exception:
            self._reader_failed(reader)

    def _turn_over(self) -> None:
        """So much has come at once that the others have their turn now."""
        self._pause_transport()
        self._shared.turns.wait(self._next_turn)

    def _next_turn(self) -> None:
        if self not in self._shared.clients:
            return
        reader = self._reader
        if reader is not None:
            try:
                reader.next_turn()
            except Exception:
                self._reader_failed(reader)
            if reader.is_behind:
                return
        if not self._application_is_full and self._discarded_bytes <= _DISCARDED_BYTES_MAX:
            self._resume_transport()
        self._look_for_end()

    def _look_for_end(self) -> None:
        if self._read_over is not None and (self._reader is None or not self._reader.unread_bytes):
            self._read_over()

    def _arm_read(self) -> None:
        assert self._reader is not None
        self._unread_bytes_before = self._reader.unread_bytes
        self._shared.deadlines.arm(self, self._shared.settings.ws_close_timeout_s)

    def _resume(self, reader: FrameReader) -> None:
        if not reader.is_behind:
            self._resume_transport()
        try:
            reader.resume()
        except Exception:
            self._reader_failed(reader)
        if self._read_over is not None and not reader.unread_bytes:
            self._shared.turns.wait(self._look_for_end)  # whoever called us is not done with this connection

    def _reader_failed(self, reader: FrameReader) -> None:
        """A fault of ours (or Autobahn's) costs this connection, and no other."""
        _LOGGER.exception("reading a frame failed: %r of %r", reader, self)
        reader.stop()
        self._fault_found(1011, "internal error")

    def _closed(self, event: dict[str, Any]) -> None:
        """The application's part is over; the socket may take a while."""
        assert self._session is not None
        shared = self._shared
        connection, self._connection = self._connection, None
        if self._session.close_code is not None:
            shared.access_log.websocket_closed(
                **self._log_target, code=self._session.close_code, open_s=self._elapsed_s()
            )
        shared.dropped_count += self._session.dropped_count
        self._early = b""
        if connection is not None:
            connection.client_gone(event)
        if self in shared.clients:
            # From here on everything is read, for the client's Close or the end of the socket.
            self._arm_close()
            if self._reader is not None:
                self._resume(self._reader)
            else:
                self._resume_transport()

    def _arm_close(self) -> None:
        self._unsent_bytes_before = unsent_bytes(self._transport)
        self._shared.deadlines.arm(self, self._shared.settings.ws_close_timeout_s)

    def _finish(self, *, linger: bool) -> None:
        self._stop_reading()
        transport = self._transport
        # A transport closes only behind its producer.
        transport.unregisterProducer()
        if linger:
            # Ends our side behind what is written; the client's end closes the socket, or the deadline does.
            transport.loseWriteConnection()
        else:
            transport.loseConnection()
        self._arm_close()

    def _abort(self) -> None:
        self._stop_reading()
        self._transport.abortConnection()

    def _stop_reading(self) -> None:
        """Messages mean nothing any more; drops the reader, its callbacks make a cycle with this object."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.stop()

    def _pause_transport(self) -> None:
        if not self._reading_paused:
            self._reading_paused = True
            self._transport.pauseProducing()

    def _resume_transport(self) -> None:
        if self._reading_paused:
            self._reading_paused = False
            self._transport.resumeProducing()

    def _elapsed_s(self) -> float:
        return self._shared.deadlines.clock() - self._since
