"""HTTP/1.x on Twisted transports: carries out what request_reader.py and http_exchange.py decide.

    HttpFactory     what all HTTP connections of a process share (http_factory.py)
    Http1Protocol   one socket: whose turn it is, what is read, when it is closed
    HttpClient      one request on it (http_client.py)
    Closing         its end (closing.py)

    HEAD --request--> EXCHANGE --response, body read--> HEAD (the next request)
      |                  |  |                             ^
      |                  |  +--response, body not read--> DRAIN --body read--+
      |                  +--response, not to be kept--> LINGER --end, timeout--> CLOSED
      +--refused--> LINGER        +--WebSocket--> UPGRADED
      +--HTTP/2, by ALPN or its preface--> UPGRADED

Requests on one connection are served one after the other. While one is served, what the client sends behind it waits
unread in the reader, 64 KiB at most; then the socket is not read.

**A socket is read** only while its application takes the body (client.py, ``pause_reading``). Its end is watched all
the same, by end_watch.py. A client that ends its sending side behind a complete request still gets its answer
(RFC 9112 section 9.6 knows such half-closed connections; ``printf … | nc`` is one); a reset, at any time, is a
disconnect. A client that closes its socket and one that only stops sending look the same until something is written:
the first write to a closed one brings a reset. Where nothing is written for 5 s, it counts as gone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.address import UNIXAddress
from twisted.internet.interfaces import IHalfCloseableProtocol, IHandshakeListener, IPushProducer, ISSLTransport
from twisted.internet.protocol import Protocol
from zope.interface import implementer

from channel_layer.enums import quick
from channel_layer.openings import FIRST_BODY_BYTES_MAX, NO_BODY
from interface_server.closing import Closing
from interface_server.end_watch import unread_bytes
from interface_server.http2 import PREFACE, Http2Connection
from interface_server.http_client import HttpClient
from interface_server.protocol.actions import End
from interface_server.protocol.body_pace import BodyPace
from interface_server.protocol.errors import BadRequest
from interface_server.protocol.http_exchange import HttpExchange, build_plain_response
from interface_server.protocol.request import Peer, RequestHead
from interface_server.protocol.request_reader import BodyPiece, RequestReader, RequestStart
from interface_server.protocol.scope import build_http_scope
from interface_server.protocol.websocket_handshake import is_websocket_upgrade
from interface_server.transports import buffered_bytes, held_bytes, socket_descriptor, write_now
from interface_server.websocket import WebSocketClient
from interface_server.write_watch import WriteWatch

if TYPE_CHECKING:
    from interface_server.http_factory import HttpFactory

__all__ = ["Http1Protocol", "Phase"]

_LOGGER: Final = logging.getLogger("trunkline.interface")

# What a client may send behind the request that is being served; beyond it the socket is not read until its turn.
_PIPELINED_BYTES_MAX: Final = 64 * 1024
# Of a body that its application left unread, behind a complete response: more closes the connection.
_DRAIN_BYTES_MAX: Final = 64 * 1024
# A client that has ended its sending side behind its request: the longest time without a word from the application;
# then it counts as gone. It may be waiting still, but most that look like this have closed their socket: each closed
# tab of a page that polls would keep an instance waiting so long. Other servers do not wait for them at all.
_HALF_CLOSED_TIMEOUT_S: Final = 5.0

_DISCONNECT: Final = {"type": "http.disconnect"}


@quick
class Phase(Enum):
    HEAD = "waits for a request"
    EXCHANGE = "serves a request"
    DRAIN = "reads the rest of a body nobody wants"
    LINGER = "has answered for the last time"
    UPGRADED = "belongs to a WebSocket, or speaks HTTP/2"
    CLOSED = "the socket is gone, or about to be"


@implementer(IHalfCloseableProtocol, IHandshakeListener, IPushProducer)
class Http1Protocol(Protocol):
    """One client socket."""

    transport: Any
    factory: HttpFactory

    def __init__(self, factory: HttpFactory) -> None:
        self.factory = factory
        self.phase = Phase.HEAD
        self.deadline_tick: int | None = None  # of Deadlines
        self._reader = RequestReader(factory.limits)
        self._client: HttpClient | None = None  # in EXCHANGE
        self._successor: WebSocketClient | Http2Connection | None = None  # in UPGRADED
        # The first bytes, while they may still be the preface of HTTP/2; None: they are not, or it is TLS.
        self._first_bytes: bytes | None = b""
        self._peer = Peer(client=None, server=None)  # known from connectionMade on
        self._trusts_peer = False  # what it says about the client in headers
        self._descriptor = -1  # of the socket, for the end watch
        self._is_advancing = False  # _advance is on the stack; what changes meanwhile it will see
        self._is_reading = True  # the transport is
        self._read_ended = False  # the client has ended its sending side
        self._application_is_full = False  # its window for the body is used up
        self._writing_paused = False  # the transport's buffer is full
        self._write_watch: WriteWatch | None = None  # from connectionMade on
        self._closing: Closing | None = None  # the same
        self._is_first = True  # no request has been read yet
        self._waits_for_head = False  # its deadline is that of a head that has begun
        self._pace: BodyPace | None = None  # of a body that has not come whole
        self._dropped_bytes = 0  # in DRAIN
        self._awaits_turn = False  # of Turns: a body of so many chunks has come that the others go first

    def __repr__(self) -> str:
        return (
            f"<Http1Protocol {self.phase.name} {self._peer.client} {self._reader!r} reading={self._is_reading} "
            f"read_ended={self._read_ended} writing_paused={self._writing_paused} {self._client!r}>"
        )

    # Called by Twisted

    def connectionMade(self) -> None:
        transport, factory = self.transport, self.factory
        factory.protocols.add(self)
        factory.accepted_count += 1
        self._peer = _build_peer(transport)
        proxies = factory.proxy_headers
        self._trusts_peer = proxies is not None and proxies.trusts(self._peer)
        if self._peer.client is not None:
            # We write whole responses; Nagle would hold the last packet of a stream back for the client's ACK.
            transport.setTcpNoDelay(True)
        self._descriptor = socket_descriptor(transport)
        self._write_watch = WriteWatch(
            transport,
            deadlines=factory.deadlines,
            timeout_s=factory.settings.write_timeout_s,
            stalled=self._write_stalled,
        )
        self._closing = Closing(transport, deadlines=factory.deadlines, abort=self.abort)
        transport.registerProducer(self, True)
        factory.deadlines.arm(self, factory.settings.header_timeout_s)
        if factory.is_stopping:
            self._close()

    def handshakeCompleted(self) -> None:
        """Of TLS."""
        self._peer = replace(self._peer, tls_extension=self.transport.describe_tls())
        self._first_bytes = None
        if self.transport.negotiatedProtocol == b"h2" and self.phase is Phase.HEAD:
            self._speak_http2(b"")

    def dataReceived(self, data: bytes) -> None:
        phase = self.phase
        if phase is Phase.UPGRADED:
            assert self._successor is not None
            self._successor.data_received(data)
        elif phase is Phase.LINGER:
            assert self._closing is not None
            self._closing.drop(len(data))
            self._update_reading()
        elif phase is not Phase.CLOSED:
            if self._first_bytes is not None:
                data = self._first_bytes + data
                if data.startswith(PREFACE):
                    self._speak_http2(data)
                    return
                if PREFACE.startswith(data):
                    self._first_bytes = data
                    return
                self._first_bytes = None
            self._reader.feed(data)
            self._advance()

    def readConnectionLost(self) -> None:
        """The client has ended its sending side."""
        self._read_ended = True
        if self.phase is Phase.UPGRADED:
            # A WebSocket ends with Close frames; one that ends like this has no more to say or to hear.
            self._lose_successor()
            self._close()
        elif self.phase is Phase.LINGER:
            self._close()
        elif self.phase is not Phase.CLOSED:
            self._advance()
            if self.phase is Phase.EXCHANGE:
                self._watch_end()
                self._await_application()

    def writeConnectionLost(self) -> None:
        """Our side is ended, as ``_linger`` wanted: everything is written."""
        if self.phase is Phase.LINGER and self._closing is not None:
            self._closing.write_ended()

    def connectionLost(self, reason: Any = None) -> None:
        factory = self.factory
        self.phase = Phase.CLOSED
        factory.protocols.discard(self)
        factory.deadlines.disarm(self)
        if self._write_watch is not None:
            self._write_watch.stop()
        if self._closing is not None:
            self._closing.stop()
        if factory.end_watch is not None and self._descriptor >= 0:
            factory.end_watch.discard(self._descriptor)
        client, self._client = self._client, None
        if client is not None:
            client.gone()
        self._lose_successor()
        if not factory.protocols and factory.when_empty is not None:
            factory.when_empty()

    def pauseProducing(self) -> None:
        """The transport's buffer is full."""
        self._writing_paused = True
        if self._write_watch is not None:
            self._write_watch.start()
        if self._successor is not None:
            self._successor.pause_producing()
        elif self._client is not None:
            self._client.pause_writing()

    def resumeProducing(self) -> None:
        """The transport's buffer is empty."""
        self._writing_paused = False
        if self._write_watch is not None:
            self._write_watch.stop()
        if self._successor is not None:
            self._successor.resume_producing()
        elif self._client is not None:
            self._client.resume_writing()

    def stopProducing(self) -> None:
        """The transport is gone; connectionLost follows."""

    # Called by Deadlines

    def deadline_reached(self) -> None:
        phase = self.phase
        self.factory.timeout_count += phase in (Phase.HEAD, Phase.EXCHANGE)
        if phase is Phase.HEAD:
            if self._reader.buffered_bytes:
                self._refuse(BadRequest(408, "the request did not come in time"))
            else:
                self._close()
        elif phase is Phase.EXCHANGE and self._read_ended:
            if self.buffered_bytes():  # it does not read either, which is the business of TCP
                self.factory.deadlines.arm(self, _HALF_CLOSED_TIMEOUT_S)
            else:
                self.abort()
        elif phase is Phase.EXCHANGE:
            self._body_late()
        elif phase is Phase.DRAIN:
            self._close()

    # Called by WriteWatch

    def _write_stalled(self) -> None:
        _LOGGER.info("dropped the connection of %s: it reads nothing", self._peer.client or "a unix socket")
        self.factory.timeout_count += 1
        self.abort()

    # Called by HttpFactory

    @property
    def is_newcomer(self) -> bool:
        return self.phase is Phase.HEAD and self._is_first and not self._reader.buffered_bytes

    def stop(self) -> None:
        """Serve no further request; one that comes, or may be on its way, is answered."""
        if self.phase is Phase.HEAD:
            if not (self._is_first or self._reader.buffered_bytes):
                self._close()
        elif self._client is not None:
            self._client.exchange.close_after()
        elif isinstance(self._successor, Http2Connection):
            self._successor.stop()

    def abort(self) -> None:
        """Drop the socket; the application gets its disconnect now."""
        self.phase = Phase.CLOSED
        client, self._client = self._client, None
        if client is not None:
            client.gone()
        self._lose_successor()
        self.transport.abortConnection()

    # Called by Http2Connection

    def write_bytes(self, data: bytes) -> None:
        self.transport.write(data)

    def close_behind(self, *, linger: bool) -> None:
        self._successor = None
        if linger:
            self._linger()
        else:
            self._close()

    # Called by HttpClient

    def write(self, data: Sequence[bytes]) -> None:
        if self._read_ended:
            self._await_application()
        if len(data) == 1:
            self.transport.write(data[0])
        else:
            self.transport.writeSequence(data)

    def write_last(self, data: Sequence[bytes]) -> None:
        if len(data) == 1 and not self._read_ended:
            write_now(self.transport, data[0])
        else:
            self.write(data)

    def buffered_bytes(self) -> int:
        return buffered_bytes(self.transport)

    def application_is_full(self, is_full: bool) -> None:
        self._application_is_full = is_full
        if is_full:
            self._update_reading()
        else:
            self._advance()

    def body_awaited(self) -> None:
        self._advance()

    def count_dropped(self, count: int) -> None:
        self.factory.dropped_count += count

    def exchange_over(self, end: End) -> None:
        """The response is written (to the transport), or will never be."""
        self._client = None
        self._application_is_full = False
        factory, reader = self.factory, self._reader
        if (
            end is End.KEEP
            and self._is_reading
            and reader.is_idle
            and not (self._read_ended or self._is_advancing or factory.is_stopping)
        ):
            # As below, for nearly all.
            self.phase = Phase.HEAD
            factory.deadlines.arm(self, factory.settings.keep_alive_timeout_s)
        elif end is End.RESET:
            self.abort()
        elif end is End.KEEP and not self.factory.is_stopping:
            self.phase = Phase.HEAD if self._reader.body_is_complete else Phase.DRAIN
            self._dropped_bytes = 0
            self.factory.deadlines.disarm(self)
            self._advance()
        else:
            self._finish()

    # Reading

    def _advance(self) -> None:
        """Take one step after the other until bytes, the application or the response is needed."""
        if self._is_advancing:
            return
        self._is_advancing = True
        try:
            while self._step():
                pass
        finally:
            self._is_advancing = False
        self._update_reading()

    def _step(self) -> bool:
        phase = self.phase
        if phase is Phase.EXCHANGE:
            if self._application_is_full or self._reader.body_is_complete or self._awaits_turn:
                return False
        elif (phase is not Phase.HEAD and phase is not Phase.DRAIN) or self._awaits_turn:
            return False
        try:
            event = self._reader.next_event()
            if isinstance(event, RequestStart):
                self._begin(event)
                # A request without body, as most are: nothing can follow before it is answered.
                return not (self._reader.body_is_complete and self.phase is Phase.EXCHANGE)
        except BadRequest as failure:
            self._failed(failure)
            return False
        if event is None:
            self._wait()
            return False
        if self._reader.is_behind:
            self._awaits_turn = True
            self.factory.turns.wait(self._next_turn)
        if phase is Phase.EXCHANGE:
            self._relay(event)
        else:
            self._dropped_bytes += len(event.data)
            if self._dropped_bytes > _DRAIN_BYTES_MAX:
                self._finish()
            elif event.is_last:
                self.factory.deadlines.disarm(self)
                self.phase = Phase.HEAD
                if self.factory.is_stopping:
                    self._close()
        return True

    def _next_turn(self) -> None:
        self._awaits_turn = False
        self._advance()

    def _wait(self) -> None:
        """Nothing more can be done until the client sends something: at most so long."""
        factory = self.factory
        settings = factory.settings
        phase = self.phase
        if self._read_ended:
            if phase is Phase.EXCHANGE:
                self.abort()  # it will never send the rest of its body
            else:
                self._close()
        elif phase is Phase.HEAD:
            if self._reader.buffered_bytes:
                if not self._waits_for_head:
                    # Once for a head: a byte now and then buys no time (slowloris).
                    self._waits_for_head = True
                    if not self._is_first:
                        factory.deadlines.arm(self, settings.header_timeout_s)
            elif not self._is_first and not self._waits_for_head:
                factory.deadlines.arm(self, settings.keep_alive_timeout_s)
        elif phase is Phase.DRAIN:
            if self.deadline_tick is None:  # once for all of it, as for a head
                factory.deadlines.arm(self, settings.header_timeout_s)
        elif self._pace is not None:
            assert self._client is not None
            if not self._client.exchange.owes_continue:  # a client that waits for us is not late
                left_s = self._pace.wait(factory.deadlines.clock())
                if left_s == 0:
                    self._body_late()
                elif left_s is not None:
                    factory.deadlines.arm(self, left_s)

    def _body_late(self) -> None:
        assert self._client is not None
        self._client.bad_request(BadRequest(408, "the rest of the body did not come in time"))

    def _await_application(self) -> None:
        """The client has no more to do; a deadline is set only if nobody knows whether it still waits."""
        if self._read_ended:
            self.factory.deadlines.arm(self, _HALF_CLOSED_TIMEOUT_S)
        else:
            self.factory.deadlines.disarm(self)

    def _begin(self, start: RequestStart) -> None:
        """A request has come; ask for an application."""
        factory, settings = self.factory, self.factory.settings
        if self._read_ended or self.deadline_tick is not None:
            self._await_application()
        factory.request_count += 1
        self._is_first = self._waits_for_head = False
        head, reader = start.head, self._reader
        peer = self._peer
        if self._trusts_peer:
            assert factory.proxy_headers is not None
            peer = factory.proxy_headers.decide(peer, head.headers)
        if start.wants_upgrade and is_websocket_upgrade(head):
            self._upgrade(head, peer)
            return
        first: BodyPiece | None = None
        self._pace = None
        if not reader.body_is_complete:
            self._pace = BodyPace(silence_s=settings.body_timeout_s, rate=settings.body_rate)
            event = reader.next_event()  # BadRequest here: nobody has been asked yet
            assert event is None or isinstance(event, BodyPiece)
            first = event
            if reader.is_behind:
                self._awaits_turn = True
                factory.turns.wait(self._next_turn)
        exchange = HttpExchange(
            method=head.method,
            http_version=head.http_version,
            keep_alive=start.keep_alive and not factory.is_stopping and settings.keep_alive_timeout_s > 0,
            expects_continue=start.expects_continue and first is None,
            request_is_complete=reader.body_is_complete,
            server_headers=factory.server_headers,
        )
        client = HttpClient(self, head, exchange, peer=peer, access_log=factory.access_log, clock=factory.clock)
        self._client = client
        self.phase = Phase.EXCHANGE
        first_event: dict[str, Any] | None = None
        if start.body_bytes == 0:
            first_event = NO_BODY
        elif first is not None and len(first.data) <= FIRST_BODY_BYTES_MAX:
            first_event = {"type": "http.request", "body": first.data, "more_body": not first.is_last}
            first = None
        connection = factory.connections.open(
            client,
            protocol="http",
            scope=build_http_scope(head, peer, root_path=settings.root_path, pathsend=settings.pathsend),
            first_event=first_event,
            tell_receiving=start.expects_continue and first is None and first_event is None,
        )
        client.connection = connection
        if self._writing_paused:  # by the response before
            client.pause_writing()
        if first is not None:
            connection.send_event({"type": "http.request", "body": first.data, "more_body": not first.is_last})

    def _relay(self, piece: BodyPiece) -> None:
        client = self._client
        assert client is not None
        assert client.connection is not None
        exchange = client.exchange
        exchange.apply_body_begun()
        if self._pace is not None:
            self._pace.received(len(piece.data), self.factory.deadlines.clock())
        if piece.is_last:
            exchange.request_is_complete = True
            self._await_application()
        client.connection.send_event({"type": "http.request", "body": piece.data, "more_body": not piece.is_last})

    def _upgrade(self, head: RequestHead, peer: Peer) -> None:
        factory = self.factory
        self.phase = Phase.UPGRADED
        rest = self._reader.take_rest()
        if not (self._is_reading or self._read_ended):
            # Too much came behind the request before; from here on the WebSocket pauses and resumes.
            self._is_reading = True
            self.transport.resumeProducing()
        websocket = factory.websockets.upgrade(head, peer=peer, transport=self.transport)
        self._successor = websocket
        self._watch_end()
        if self._writing_paused:
            websocket.pause_producing()
        if rest:
            websocket.data_received(rest)
        if self._read_ended:
            self.readConnectionLost()

    def _speak_http2(self, data: bytes) -> None:
        """Everything belongs to HTTP/2 from now on; ``data`` begins with its preface."""
        self._first_bytes = None
        self.phase = Phase.UPGRADED
        self.factory.deadlines.disarm(self)
        self._successor = successor = Http2Connection(self, self.factory, self._peer, trusts_peer=self._trusts_peer)
        if self._writing_paused:
            successor.pause_producing()
        if data:
            successor.data_received(data)

    def _failed(self, failure: BadRequest) -> None:
        if self.phase is Phase.HEAD:
            self._refuse(failure)
        elif self.phase is Phase.EXCHANGE:
            self.factory.bad_request_count += 1
            assert self._client is not None
            self._client.bad_request(failure)
        else:
            self._finish()

    def _refuse(self, failure: BadRequest) -> None:
        """Answer a request that nobody was asked about."""
        factory = self.factory
        factory.bad_request_count += 1
        _LOGGER.info("refused a request of %s: %s", self._peer.client or "a unix socket", failure)
        response = build_plain_response(
            failure.status, failure.reason, server_headers=factory.server_headers, keep_alive=False
        )
        self.transport.write(response)
        self._linger()

    def _update_reading(self) -> None:
        """Read the socket, or do not, as the state demands."""
        if self._read_ended:
            return  # Twisted would report the end again
        phase = self.phase
        if phase is Phase.EXCHANGE:
            reader = self._reader
            wanted = not (self._application_is_full or self._awaits_turn) and not (
                reader.buffered_bytes > _PIPELINED_BYTES_MAX and reader.body_is_complete
            )
        elif phase is Phase.LINGER:
            assert self._closing is not None
            wanted = self._closing.may_read
        elif phase is Phase.HEAD or phase is Phase.DRAIN:
            wanted = not self._awaits_turn
        else:
            return
        if wanted is self._is_reading:
            return
        self._is_reading = wanted
        if wanted:
            self.transport.resumeProducing()
        else:
            # A client's silence is not its fault while we do not listen.
            if phase is Phase.EXCHANGE:
                self.factory.deadlines.disarm(self)
                if self._pace is not None:
                    self._pace.stop(self.factory.deadlines.clock())
            self._watch_end()
            self.transport.pauseProducing()

    # Ending

    def _finish(self) -> None:
        """Close behind the response."""
        if self._read_ended or (self._reader.body_is_complete and not self._reader.buffered_bytes):
            self._close()
        else:
            self._linger()

    def _linger(self) -> None:
        """End our side, and give the client time to read the answer before the socket is closed."""
        assert self._closing is not None
        if self._read_ended or not self._closing.can_linger:
            self._close()
            return
        self.phase = Phase.LINGER
        self.factory.deadlines.disarm(self)
        self._reader.take_rest()
        self._unregister_producer()
        self._closing.linger()
        self._update_reading()

    def _close(self) -> None:
        """Close when everything is written."""
        assert self._closing is not None
        if self.phase is not Phase.LINGER:
            self._unregister_producer()
        self.phase = Phase.CLOSED
        self.factory.deadlines.disarm(self)
        self._closing.close()

    def _unregister_producer(self) -> None:
        """With one registered Twisted would not end its side; from now on the deadlines of closing count."""
        if self._write_watch is not None:
            self._write_watch.stop()
        self.transport.unregisterProducer()

    def _lose_successor(self) -> None:
        successor, self._successor = self._successor, None
        if successor is not None:
            successor.connection_lost()

    # The end of a socket that is not read

    def _watch_end(self) -> None:
        watch = self.factory.end_watch
        if watch is not None and self._descriptor >= 0:
            watch.add(self._descriptor, self._end_noticed)

    def _end_noticed(self, is_reset: bool) -> None:
        if is_reset or self._is_body_lost():
            self.abort()

    def _is_body_lost(self) -> bool:
        """The client sends no more. What it sent is not read yet: is its body complete in there?"""
        if self.phase is not Phase.EXCHANGE or self._is_reading or self._read_ended:
            return False
        return self._reader.body_bytes_missing > unread_bytes(self._descriptor) + held_bytes(self.transport)


def _build_peer(transport: Any) -> Peer:
    client, server = transport.getPeer(), transport.getHost()
    is_tls = bool(ISSLTransport.providedBy(transport))
    if isinstance(server, UNIXAddress):
        name = server.name
        path = None if name is None else name.decode("utf-8", "replace")
        return Peer(client=None, server=None if path is None else (path, None), tls=is_tls)
    return Peer(client=(client.host, client.port), server=(server.host, server.port), tls=is_tls)
