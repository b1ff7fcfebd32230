"""The life of one interface server process: connect, listen, serve until a signal, stop.

    connect to the broker -> listen -> "ready" -> serve -> SIGTERM, SIGINT -> stop listening, close WebSockets (1012)
    -> wait for running requests (``stop_grace_s``; a second signal ends that) -> cut the rest -> leave the links

What lives here: the order of these steps, and one line for each thing that can be wrong at the start. What serves is
in connections.py, http1.py and websocket.py; this file puts them together.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from channel_layer.encryption import Cipher, read_keys
from channel_layer.errors import BrokerUnavailable, BrokerUnsuitable, InvalidName
from channel_layer.process_layer import RedisProcessLayer
from interface_server import event_loop
from interface_server.access_log import AccessLog
from interface_server.connections import Connections, ConnectionsStatistics
from interface_server.listening import describe, open_listening_socket
from interface_server.settings import InterfaceSettings

if TYPE_CHECKING:
    from interface_server.tls import TlsContext

__all__ = ["InterfaceServer", "InterfaceServerStatistics", "run"]

_LOGGER: Final = logging.getLogger("trunkline.interface")

READY_VARIABLE: Final = "TRUNKLINE_READY_FD"

# After everything was told to close: for the last bytes to leave the sockets. Then they are dropped.
_FLUSH_TIMEOUT_S: Final = 2.0
_OPENING_EXPIRY_MARGIN_S: Final = 5.0

# After a second signal: to say goodbye on the links. Then the workers find us gone by our lease.
_FORCED_LEAVE_TIMEOUT_S: Final = 0.5


class _WrongInput(Exception):
    """The operator's settings cannot be used; the text is the line for the operator."""


def run(settings: InterfaceSettings, *, server_class: Callable[..., Any] | None = None) -> int:
    """Run an interface server until SIGTERM or SIGINT; return the exit status.

    0 a clean stop, 1 the broker or the address cannot be used now, 2 wrong input; what was wrong is one line on
    stderr. Once in a process. ``server_class`` is InterfaceServer, or what is used in its place.
    """
    try:
        return event_loop.run(lambda reactor: _serve(settings, reactor, server_class or InterfaceServer))
    except (BrokerUnsuitable, _WrongInput) as error:
        return _fail(error, 2)
    except (BrokerUnavailable, OSError) as error:
        return _fail(error, 1)


def _fail(error: Exception, status: int) -> int:
    print(f"trunkline: {error}", file=sys.stderr)
    return status


async def _serve(settings: InterfaceSettings, reactor: Any, server_class: Callable[..., Any]) -> int:
    loop = asyncio.get_running_loop()
    stop, at_once = asyncio.Event(), asyncio.Event()
    _install_signal_handlers(loop, stop, at_once)
    tls = _load_tls(settings, loop)
    # Before the broker is asked: a port that is taken is the likelier mistake.
    listening = open_listening_socket(settings)
    try:
        server = server_class(settings, layer=_build_layer(settings), loop=loop, reactor=reactor, tls=tls)
        await server.start(listening)
    except BaseException:
        listening.close()
        raise
    _announce_ready(describe(listening, tls=tls is not None))
    listening.close()  # the server has a copy
    # What exists now stays: no need to look through it at every collection.
    gc.collect()
    gc.freeze()
    await stop.wait()
    await server.stop(at_once)
    return 0


def _build_layer(settings: InterfaceSettings) -> RedisProcessLayer:
    try:
        return RedisProcessLayer(
            url=settings.redis_url,
            prefix=settings.prefix,
            role="interface",
            opening_capacity=settings.opening_capacity,
            # A little longer than we wait, so that we remove an opening before the broker's clock does.
            opening_expiry_s=settings.queue_timeout_s + _OPENING_EXPIRY_MARGIN_S,
            cipher=Cipher(read_keys(settings.encryption_keys)),
        )
    except (ValueError, InvalidName, ImportError) as error:  # a bad URL, prefix, key; no package to encrypt with
        raise _WrongInput(str(error)) from error


def _install_signal_handlers(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, at_once: asyncio.Event) -> None:
    def received() -> None:
        if stop.is_set():
            at_once.set()
        stop.set()

    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, received)


def _load_tls(settings: InterfaceSettings, loop: asyncio.AbstractEventLoop) -> TlsContext | None:
    """Return the certificate to serve with, if there is one; SIGHUP reads it again from then on."""
    if settings.ssl_certfile is None:
        return None
    from interface_server.tls import TlsContext, TlsSettingsError

    try:
        context = TlsContext(settings, alpn=(b"h2", b"http/1.1"))
    except TlsSettingsError as error:
        raise _WrongInput(str(error)) from error

    def reload() -> None:
        try:
            context.reload()
        except TlsSettingsError as error:
            _LOGGER.error("the certificate stays as it was: %s", error)
        else:
            _LOGGER.info("read the certificate %s again", settings.ssl_certfile)

    if threading.current_thread() is threading.main_thread():
        loop.add_signal_handler(signal.SIGHUP, reload)
    return context


def _announce_ready(address: str) -> None:
    """Tell the supervisor, which waits on a pipe."""
    descriptor = os.environ.pop(READY_VARIABLE, "")
    if descriptor:
        with os.fdopen(int(descriptor), "wb") as pipe:
            pipe.write(f"ready {address}\n".encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceServerStatistics:
    connections: ConnectionsStatistics
    http1: Any  # Http1Statistics
    websockets: Any  # WebSocketsStatistics


class InterfaceServer:
    """Everything that serves clients in one process, put together."""

    def __init__(
        self,
        settings: InterfaceSettings,
        *,
        layer: RedisProcessLayer,
        loop: asyncio.AbstractEventLoop,
        reactor: Any,
        tls: TlsContext | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        # Here, because these import parts of Twisted that must not be imported before the reactor is installed.
        from interface_server.deadlines import Deadlines
        from interface_server.end_watch import EndWatch
        from interface_server.http1 import Http1Factory
        from interface_server.protocol.server_headers import ServerHeaders
        from interface_server.websocket import WebSockets

        self._settings = settings
        self._layer = layer
        self._loop = loop
        self._reactor = reactor
        self._tls = tls  # None: plain sockets
        self._port: Any = None  # Twisted's listening port, while we listen
        self._access_log = AccessLog(wanted=settings.access_log)
        self._deadlines = Deadlines(call_later=loop.call_later, clock=loop.time)
        self._end_watch = EndWatch(reactor)
        self.connections = Connections(layer, settings, loop=loop)
        layer.owns_channel = self.connections.owns_channel
        headers = ServerHeaders(
            date=settings.date_header, server=settings.server_header, extra=settings.extra_headers, clock=wall_clock
        )
        websockets = WebSockets(
            settings=settings,
            connections=self.connections,
            access_log=self._access_log,
            deadlines=self._deadlines,
            server_headers=headers,
        )
        self._http1 = Http1Factory(
            settings=settings,
            connections=self.connections,
            websockets=websockets,
            access_log=self._access_log,
            deadlines=self._deadlines,
            server_headers=headers,
            end_watch=self._end_watch,
        )
        self._websockets = websockets

    def __repr__(self) -> str:
        return f"<InterfaceServer {self._layer.process_id} listening={self._port is not None} {self.connections!r}>"

    def statistics(self) -> InterfaceServerStatistics:
        return InterfaceServerStatistics(
            connections=self.connections.statistics(),
            http1=self._http1.statistics(),
            websockets=self._websockets.statistics(),
        )

    async def start(self, listening: socket.socket) -> None:
        """Connect to the broker and accept from ``listening``, which stays the caller's to close.

        Raises BrokerUnavailable, BrokerUnsuitable.
        """
        await self._layer.start(self.connections, self.connections.deliver)
        factory: Any = self._http1
        if self._tls is not None:
            from interface_server.tls import wrap_factory

            factory = wrap_factory(factory, self._tls, self._reactor)
        self._port = self._reactor.adoptStreamPort(listening.fileno(), listening.family, factory)
        where = describe(listening, tls=self._tls is not None)
        _LOGGER.info("interface server %s accepts on %s", self._layer.process_id, where)

    async def stop(self, at_once: asyncio.Event) -> None:
        """Serve nothing new, let requests finish, close the rest, leave. ``at_once`` ends the waiting."""
        _LOGGER.info("%r stops", self)
        port, self._port = self._port, None
        await port.stopListening().asFuture(self._loop)
        self._http1.stop()
        self.connections.stop()
        await _unless(at_once, self.connections.wait_idle(self._settings.stop_grace_s))
        if self.connections.open_count:
            _LOGGER.warning("%d requests are cut", self.connections.open_count)
            self.connections.cut()
        await _unless(at_once, self._wait_for_sockets(_FLUSH_TIMEOUT_S))
        self._http1.abort()
        try:
            async with asyncio.timeout(_FORCED_LEAVE_TIMEOUT_S if at_once.is_set() else None):
                await self._layer.stop()
        except TimeoutError:
            _LOGGER.warning("the workers will find this interface server gone by its lease")
        self.connections.close()
        self._deadlines.close()
        self._end_watch.close()

    async def _wait_for_sockets(self, timeout_s: float) -> None:
        """Wait until the last socket is gone."""
        if self._http1.protocols:
            gone = asyncio.Event()
            self._http1.when_empty = gone.set
            try:
                async with asyncio.timeout(timeout_s):
                    await gone.wait()
            except TimeoutError:
                _LOGGER.debug("%d sockets are dropped", len(self._http1.protocols))


async def _unless(event: asyncio.Event, work: Any) -> None:
    """Wait for ``work``, or until ``event`` is set: then ``work`` is cancelled."""
    task = asyncio.ensure_future(work)
    interrupted = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([task, interrupted], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        task.cancel()
        interrupted.cancel()
