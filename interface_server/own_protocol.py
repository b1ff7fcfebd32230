"""A server for a protocol of your own, in one file: you turn bytes into events, and events into bytes.

    class Lines(OwnProtocol):
        scope_type = "tcp"

        def data_received(self, data):
            for line in self.splitter.split(data):
                self.socket.send_event({"type": "tcp.line", "text": line})

        def event_received(self, event):
            self.socket.write(event["text"].encode() + b"\\n")

    sys.exit(serve(Lines, InterfaceSettings(redis_url="redis://localhost", port=9000)))

Workers that run the application are started with ``--protocol tcp``; examples/tcp_chat.py is a whole one. The
application gets a scope of the type "tcp" for each socket, and the events

    tcp.connect      the first one
    tcp.<anything>   yours, both ways: ``send_event()`` --> receive(), send() --> ``event_received()``
    tcp.disconnect   the client is gone
    tcp.close        sent by the application: the socket is closed behind what was written

The rest comes with it. Flow control: a client that sends faster than the application receives is not read, an
application that sends faster than the client reads waits in ``send()``; what a protocol collects itself (half a line)
it bounds itself. Groups: the application adds ``scope["extensions"]["channel_layer"]["reply_channel"]`` to a group;
messages of the group whose type begins with ``tcp.`` go straight to ``event_received()``, all others to the
application's receive(). A worker that dies closes its sockets.

Lives here: the socket of one client, and the process around it. Not here: the connection to the application
(client_connection.py), the process's life (server.py). TLS is not spoken: put stunnel or a balancer in front.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket as sockets
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from channel_layer.encryption import environment_items
from channel_layer.frames import Outcome
from channel_layer.process_layer import RedisProcessLayer
from channel_layer.process_life import leave, unless
from interface_server import server
from interface_server.client import Connection, Refusal
from interface_server.connections import Connections
from interface_server.deadlines import Deadlines
from interface_server.end_watch import EndWatch
from interface_server.endpoints import parse_endpoint
from interface_server.listening import adopt
from interface_server.settings import InterfaceSettings
from interface_server.transports import buffered_bytes, socket_descriptor
from interface_server.write_watch import WriteWatch

if TYPE_CHECKING:
    from interface_server.broadcast import Broadcast, JoinedBroadcasts

__all__ = ["ClientSocket", "OwnProtocol", "serve"]

_LOGGER: Final = logging.getLogger("trunkline.interface")

# Behind the last word: what a client has not read by then, it does not get.
_FLUSH_TIMEOUT_S: Final = 5.0
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,30}")
_RESERVED: Final = frozenset({"http", "websocket", "lifespan", "channel"})


class OwnProtocol:
    """Derive from it; one object for each client. Methods are called on the loop and must not block.

    What they raise is logged and costs this client its connection.
    """

    scope_type: ClassVar[str]

    def __init__(self, socket: ClientSocket) -> None:
        self.socket = socket

    def build_scope(self) -> dict[str, Any]:
        """Return what the scope has beyond type, client, server and extensions."""
        return {}

    def data_received(self, data: bytes) -> None:
        """Bytes of the client came, 64 KiB at most: turn them into calls of ``socket.send_event``."""
        raise NotImplementedError

    def event_received(self, event: dict[str, Any]) -> None:
        """The application sent an event, or a group did: turn it into calls of ``socket.write``.

        Only called while the client reads. Events of groups come from anybody: check what you use of them.
        """
        raise NotImplementedError

    def refused(self, reason: str) -> None:
        """No application has this client (any more); the socket is closed next. Tell the client why, if you like."""

    def disconnected(self) -> None:
        """The socket is gone. Nothing else is called any more."""


class ClientSocket:
    """The socket of one client and its connection to the application. Implements ``client.Client``."""

    def __init__(self, host: OwnServer) -> None:
        self.client: tuple[str, int] | None = None  # None: a unix socket
        self._host = host
        self._protocol = host.protocol(self)
        self._transport: Any = None
        self._connection: Connection | None = None  # None when the client is gone, or the application
        self._descriptor = -1
        self._is_closing = False
        self._write_watch: WriteWatch | None = None  # from makeConnection on
        self._abort_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<ClientSocket {self._protocol.scope_type} {self.client}{' closing' if self._is_closing else ''}>"

    # For the protocol

    def send_event(self, event: dict[str, Any]) -> None:
        """Send an event to the application; its type begins with the scope type and a dot. Values as ASGI allows.

        Never waits: when too much is on its way, the socket is not read. Raises InvalidMessage for other values.
        Ignored when the client is gone.
        """
        if self._connection is not None:
            self._connection.send_event(event)

    def write(self, data: bytes) -> None:
        """Write to the client; ignored behind close(). Never waits: while the client does not read,
        ``event_received`` is not called.
        """
        if not self._is_closing:
            self._transport.write(data)

    def close(self) -> None:
        """Close the socket behind what was written (for which it has 5 s); the application gets its disconnect."""
        if self._is_closing:
            return
        self._is_closing = True
        self._leave()
        self._stop_write_watch()
        self._transport.unregisterProducer()
        self._abort_timer = self._host.loop.call_later(_FLUSH_TIMEOUT_S, self.abort)
        self._transport.loseConnection()

    def abort(self) -> None:
        """Drop the socket now."""
        self._is_closing = True
        self._leave()
        self._transport.abortConnection()

    # Called by Twisted

    def makeConnection(self, transport: Any) -> None:
        self._transport = transport
        host = self._host
        host.clients.add(self)
        server_address, self.client = _address(transport.getHost()), _address(transport.getPeer())
        if self.client is not None:
            transport.setTcpNoDelay(True)
            transport.setTcpKeepAlive(True)  # nobody else looks after a client that says nothing for hours
        self._descriptor = socket_descriptor(transport)
        self._write_watch = WriteWatch(
            transport, deadlines=host.deadlines, timeout_s=host.write_timeout_s, stalled=self._write_stalled
        )
        transport.registerProducer(self, True)
        name = self._protocol.scope_type
        self._guarded(self._open, name, server_address)

    def _open(self, name: str, server_address: tuple[str, int] | None) -> None:
        scope = {
            **self._protocol.build_scope(),
            "type": name,
            "asgi": {"version": "3.0"},
            "client": self.client,
            "server": server_address,
            "extensions": {},
        }
        self._connection = self._host.connections.open(
            self, protocol=name, scope=scope, first_event={"type": f"{name}.connect"}
        )
        self._connection.accept_broadcasts()

    def dataReceived(self, data: bytes) -> None:
        if not self._is_closing:
            self._guarded(self._protocol.data_received, data)

    def connectionLost(self, reason: Any = None) -> None:
        self._is_closing = True
        self._host.end_watch.discard(self._descriptor)
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        self._stop_write_watch()
        self._leave()
        self._guarded(self._protocol.disconnected)
        self._host.left(self)

    def pauseProducing(self) -> None:
        """The transport's buffer is full."""
        if self._write_watch is not None:
            self._write_watch.start()
        if self._connection is not None:
            self._connection.pause_delivery()

    def resumeProducing(self) -> None:
        """The transport's buffer is empty."""
        self._stop_write_watch()
        if self._connection is not None:
            self._connection.resume_delivery()

    def stopProducing(self) -> None:
        """The transport is gone; connectionLost follows."""

    # Called by the Connection

    def application_event(self, event: dict[str, Any]) -> None:
        if event["type"] == f"{self._protocol.scope_type}.close":
            self.close()
        else:
            self._guarded(self._protocol.event_received, event)

    def send_broadcast(self, broadcast: Broadcast | JoinedBroadcasts) -> None:
        """Only for WebSockets; group_delivery.py has none for us."""

    def application_receiving(self) -> None:
        """Not asked for."""

    def application_ended(self, outcome: Outcome) -> None:
        self._connection = None
        self.close()

    def refused(self, refusal: Refusal) -> None:
        self._connection = None
        self._guarded(self._protocol.refused, refusal.reason)
        self.close()

    def pause_reading(self) -> None:
        if not self._is_closing:
            # A socket that is not read is not in the reactor's set: its end is noticed in another way.
            self._host.end_watch.add(self._descriptor, self._end_noticed)
            self._transport.pauseProducing()

    def resume_reading(self) -> None:
        if not self._is_closing:
            self._transport.resumeProducing()

    def buffered_bytes(self) -> int:
        return buffered_bytes(self._transport)

    # Called by WriteWatch

    def _write_stalled(self) -> None:
        _LOGGER.info("dropped the connection of %s: it reads nothing", self.client or "a unix socket")
        self.abort()

    # Inside

    def _stop_write_watch(self) -> None:
        if self._write_watch is not None:
            self._write_watch.stop()

    def _end_noticed(self, is_reset: bool) -> None:
        if is_reset:
            self.abort()

    def _leave(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.client_gone({"type": f"{self._protocol.scope_type}.disconnect"})

    def _guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception:
            _LOGGER.exception("%r fails", self._protocol)
            self.abort()


class OwnServer:
    """What accepts the clients of one protocol in one process; also Twisted's factory for them."""

    noisy = False  # asked by Twisted

    def __init__(
        self,
        protocol: type[OwnProtocol],
        settings: InterfaceSettings,
        *,
        layer: RedisProcessLayer,
        loop: asyncio.AbstractEventLoop,
        reactor: Any,
    ) -> None:
        self.protocol = protocol
        self.loop = loop
        self.clients: set[ClientSocket] = set()  # until their sockets are gone; ``connections_max`` bounds them
        self.connections = Connections(layer, settings, loop=loop)
        self.end_watch = EndWatch(reactor)
        self.deadlines = Deadlines(call_later=loop.call_later, clock=loop.time)
        self.write_timeout_s = settings.write_timeout_s
        self._layer = layer
        self._reactor = reactor
        self._ports: list[Any] = []  # Twisted's listening ports, while we listen
        self._empty: asyncio.Event | None = None  # somebody waits for the last socket
        layer.owns_channel = self.connections.owns_channel
        layer.openings_held = self.connections.openings_held

    def __repr__(self) -> str:
        return f"<OwnServer {self.protocol.scope_type} {len(self.clients)} clients {self.connections!r}>"

    async def start(self) -> None:
        """Connect to the broker."""
        await self._layer.start(self.connections, self.connections.deliver)

    def listen(self, listening: sockets.socket, tls: None = None) -> None:
        """Accept from ``listening``, too, which stays the caller's to close."""
        self._ports.append(adopt(self._reactor, listening, self))
        name, address = self.protocol.scope_type, listening.getsockname()
        where = f"unix:{address}" if listening.family == sockets.AF_UNIX else f"{address[0]}:{address[1]}"
        _LOGGER.info("interface server %s speaks %s on %s", self._layer.process_id, name, where)

    async def stop(self, at_once: asyncio.Event, *, drain_timeout_s: float) -> None:
        """Accept nobody, tell all clients, one after the other, leave. ``at_once`` ends the waiting."""
        _LOGGER.info("interface server %s stops", self._layer.process_id)
        ports, self._ports = self._ports, []
        for port in ports:
            port.accept_all()  # those whom the kernel has accepted for us would be reset
            await port.stopListening().asFuture(self.loop)
        self.connections.stop()
        await unless(at_once, self.connections.drain(drain_timeout_s))
        if self.clients and not at_once.is_set():
            self._empty = asyncio.Event()
            waits = [self.loop.create_task(event.wait()) for event in (self._empty, at_once)]
            await asyncio.wait(waits, timeout=_FLUSH_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        for client in list(self.clients):
            client.abort()
        if not await leave(self._layer, at_once):
            _LOGGER.warning("the workers will find this interface server gone by its lease")
        self.connections.close()
        self.deadlines.close()
        self.end_watch.close()

    def left(self, client: ClientSocket) -> None:
        self.clients.discard(client)
        if not self.clients and self._empty is not None:
            self._empty.set()

    # Called by Twisted

    def doStart(self) -> None:
        """The port listens."""

    def doStop(self) -> None:
        """The port listens no more."""

    def buildProtocol(self, address: Any) -> ClientSocket:
        return ClientSocket(self)


def serve(protocol: type[OwnProtocol], settings: InterfaceSettings) -> int:
    """Run a server for ``protocol`` until SIGTERM or SIGINT; return the exit status, as server.run() does.

    Of the settings those count that are about the broker, listening, openings and flow control. Encryption keys that
    they do not have come from TRUNKLINE_ENCRYPTION_KEYS, as for everything that is no command of ours: a server
    without them reaches nobody. Once in a process. Raises ValueError for a scope type that cannot be one.
    """
    name = protocol.scope_type
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise ValueError(f"scope_type is {name!r}, expected a name in small letters, and none of ASGI's own")
    if settings.ssl_certfile is not None or any(parse_endpoint(text).certfile for text in settings.endpoints):
        raise ValueError("ssl_certfile is given, but a server for an own protocol does not speak TLS")
    if not settings.encryption_keys:
        settings = replace(settings, encryption_keys=environment_items())
    return server.run(settings, server_class=partial(OwnServer, protocol))


def _address(address: Any) -> tuple[str, int] | None:
    return (address.host, address.port) if hasattr(address, "port") else None
