"""The life of one interface server process: connect, listen, serve until a signal, stop.

    connect to the broker -> listen -> "ready" -> serve -> SIGTERM, SIGINT -> (``drain_delay_s``) -> stop listening
    -> let requests finish, close WebSockets with 1012, one after the other (``drain_timeout_s``; another signal ends
    that) -> cut the rest -> leave the links

What lives here: the order of these steps, and one line for each thing that can be wrong at the start. What serves is
in connections.py, http1.py and websocket.py; this file puts them together.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from channel_layer.encryption import Cipher, read_keys
from channel_layer.errors import BrokerUnavailable, BrokerUnsuitable, InvalidName
from channel_layer.process_layer import RedisProcessLayer
from channel_layer.process_life import ProcessLife, StatusPipe, WrongInput, fail, find_release, leave, unless
from channel_layer.turns import Turns
from interface_server import event_loop
from interface_server.access_log import AccessLog
from interface_server.connections import Connections, ConnectionsStatistics
from interface_server.listening import Listener, adopt, describe, describe_all, open_listeners
from interface_server.settings import InterfaceSettings

if TYPE_CHECKING:
    from interface_server.tls import TlsContext

__all__ = ["TURN_PAUSE_S", "InterfaceServer", "InterfaceServerStatistics", "run"]

_LOGGER: Final = logging.getLogger("trunkline.interface")

# After everything was told to close: for the last bytes to leave the sockets. Then they are dropped.
_FLUSH_TIMEOUT_S: Final = 2.0
_SHORT_FLUSH_TIMEOUT_S: Final = 0.5  # where there is hardly time to drain: somebody waits
# A client that has just connected sends its request at once, if it wants anything.
_NEWCOMERS_S: Final = 0.25
# Clients that send more than is read in one go share a turn (0.1 to 0.6 ms) and this pause, so they have a quarter of
# the loop at most: 25,000 messages a second, or 100,000 chunks. Without it they would have all that the others leave,
# and whoever asks then waits for a process that never sleeps, and that the kernel serves behind those that do: on
# busy cores an answer beside a flood took three times as long. Who sends 64 frames a read at most never waits.
TURN_PAUSE_S: Final = 0.002
_OPENING_EXPIRY_MARGIN_S: Final = 5.0


def run(settings: InterfaceSettings, *, server_class: Callable[..., Any] | None = None) -> int:
    """Run an interface server until SIGTERM or SIGINT; return the exit status.

    0 a clean stop, 1 the broker or the address cannot be used now, 2 wrong input; what was wrong is one line on
    stderr. Once in a process. ``server_class`` is InterfaceServer, or what is used in its place.
    """
    pipe = StatusPipe(os.environ)
    try:
        return event_loop.run(lambda reactor: _serve(settings, reactor, server_class or InterfaceServer, pipe))
    except (BrokerUnsuitable, WrongInput) as error:
        return fail(error, 2, pipe=pipe)
    except (BrokerUnavailable, OSError) as error:
        return fail(error, 1, pipe=pipe)


async def _serve(
    settings: InterfaceSettings, reactor: Any, server_class: Callable[..., Any], pipe: StatusPipe
) -> int:
    loop = asyncio.get_running_loop()
    life = ProcessLife(
        "interface server",
        pipe=pipe,
        admin_host=settings.admin_host,
        admin_port=settings.admin_port,
        hang_timeout_s=settings.hang_timeout_s,
    )
    await life.start()
    # Before the broker is asked: a port that is taken is the likelier mistake.
    listeners = open_listeners(settings)
    with contextlib.ExitStack() as files:
        for listener in listeners:
            files.callback(listener.remove_file)
        try:
            layer = _build_layer(settings)
            contexts = _load_tls(settings, listeners, loop)
            server = server_class(settings, layer=layer, loop=loop, reactor=reactor)
            await server.start()
            for listener, context in zip(listeners, contexts, strict=True):
                server.listen(listener.socket, context)
            life.serving(
                layer,
                describe_all(listeners),
                load=lambda: (server.connections.open_count, settings.connections_max),
                facts=lambda: _describe_workers(layer, server.connections),
            )
        finally:
            for listener in listeners:
                listener.socket.close()  # the server has a copy
        # What exists now stays: no need to look through it at every collection.
        gc.collect()
        gc.freeze()
        await life.stop.wait()
        life.draining()
        if not life.is_hurried:
            await unless(life.at_once, asyncio.sleep(settings.drain_delay_s))
        await server.stop(life.at_once, drain_timeout_s=life.drain_timeout_s(settings.drain_timeout_s))
    await life.close()
    return 0


def _describe_workers(layer: RedisProcessLayer, connections: Connections) -> dict[str, Any]:
    """What can be known here of workers: a request that nobody takes says more than none that was taken."""
    waiting, longest_s = connections.queue()
    return {
        "workers_known": len(layer.linked_processes()),
        "requests_waiting": waiting,
        "longest_wait_s": round(longest_s, 1),
    }


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
            version=find_release(),
            wire_version=settings.wire_version,
        )
    except (ValueError, InvalidName, ImportError) as error:  # a bad URL, prefix, key; no package to encrypt with
        raise WrongInput(str(error)) from error


def _load_tls(
    settings: InterfaceSettings, listeners: Sequence[Listener], loop: asyncio.AbstractEventLoop
) -> list[TlsContext | None]:
    """Return the certificate to serve each socket with, if there is one; SIGHUP reads them again from then on."""
    if not any(listener.is_tls for listener in listeners):
        return [None] * len(listeners)
    from interface_server.tls import TlsContext, TlsSettingsError

    def load(listener: Listener) -> TlsContext | None:
        if not listener.is_tls:
            return None
        own = replace(settings, ssl_certfile=listener.certfile, ssl_keyfile=listener.keyfile)
        try:
            return TlsContext(own, alpn=(b"h2", b"http/1.1"))
        except TlsSettingsError as error:
            raise WrongInput(str(error)) from error

    contexts = [load(listener) for listener in listeners]

    def reload() -> None:
        for context in contexts:
            if context is None:
                continue
            try:
                context.reload()
            except TlsSettingsError as error:
                _LOGGER.error("the certificate stays as it was: %s", error)
            else:
                _LOGGER.info("read the certificate %s again", context.certfile)

    if threading.current_thread() is threading.main_thread():
        loop.add_signal_handler(signal.SIGHUP, reload)
    return contexts


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceServerStatistics:
    connections: ConnectionsStatistics
    http1: Any  # HttpStatistics
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
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        # Here, because these import parts of Twisted that must not be imported before the reactor is installed.
        from interface_server.deadlines import Deadlines
        from interface_server.end_watch import EndWatch
        from interface_server.http_factory import HttpFactory
        from interface_server.protocol.server_headers import ServerHeaders
        from interface_server.websocket import WebSockets

        self._settings = settings
        self._layer = layer
        self._loop = loop
        self._reactor = reactor
        self._ports: list[Any] = []  # Twisted's listening ports, while we listen
        self._access_log = AccessLog(wanted=settings.access_log)
        self._deadlines = Deadlines(call_later=loop.call_later, clock=loop.time)
        self._end_watch = EndWatch(reactor)
        self.connections = Connections(layer, settings, loop=loop)
        layer.owns_channel = self.connections.owns_channel
        layer.openings_held = self.connections.openings_held
        headers = ServerHeaders(
            date=settings.date_header, server=settings.server_header, extra=settings.extra_headers, clock=wall_clock
        )
        turns = Turns(partial(loop.call_later, TURN_PAUSE_S))
        websockets = WebSockets(
            settings=settings,
            connections=self.connections,
            access_log=self._access_log,
            deadlines=self._deadlines,
            server_headers=headers,
            turns=turns,
        )
        self._http1 = HttpFactory(
            settings=settings,
            connections=self.connections,
            websockets=websockets,
            access_log=self._access_log,
            deadlines=self._deadlines,
            server_headers=headers,
            end_watch=self._end_watch,
            turns=turns,
        )
        self._websockets = websockets

    def __repr__(self) -> str:
        return f"<InterfaceServer {self._layer.process_id} listening={len(self._ports)} {self.connections!r}>"

    def statistics(self) -> InterfaceServerStatistics:
        return InterfaceServerStatistics(
            connections=self.connections.statistics(),
            http1=self._http1.statistics(),
            websockets=self._websockets.statistics(),
        )

    async def start(self) -> None:
        """Connect to the broker. Raises BrokerUnavailable, BrokerUnsuitable. Next: ``listen``."""
        await self._layer.start(self.connections, self.connections.deliver)

    def listen(self, listening: socket.socket, tls: TlsContext | None = None) -> None:
        """Accept from ``listening``, too, which stays the caller's to close."""
        factory: Any = self._http1
        if tls is not None:
            from interface_server.tls import wrap_factory

            factory = wrap_factory(factory, tls, self._reactor)
        self._ports.append(adopt(self._reactor, listening, factory))
        where = describe(listening, tls=tls is not None)
        _LOGGER.info("interface server %s accepts on %s", self._layer.process_id, where)

    async def stop(self, at_once: asyncio.Event, *, drain_timeout_s: float | None = None) -> None:
        """Accept nothing new, let requests finish, close the rest one after the other, cut what remains, leave.

        ``at_once`` ends the waiting.
        """
        _LOGGER.info("%r stops", self)  # with its counts: what is left here is a leak
        timeout_s = self._settings.drain_timeout_s if drain_timeout_s is None else drain_timeout_s
        ports, self._ports = self._ports, []
        for port in ports:
            port.accept_all()  # those whom the kernel has accepted for us would be reset
            await port.stopListening().asFuture(self._loop)
        self._http1.stop()
        self.connections.stop()
        await unless(at_once, self._drain(timeout_s))
        if self.connections.open_count:
            _LOGGER.warning("%d requests are cut", self.connections.open_count)
            self.connections.cut()
        await unless(
            at_once,
            self._wait_for_sockets(_FLUSH_TIMEOUT_S if timeout_s > _FLUSH_TIMEOUT_S else _SHORT_FLUSH_TIMEOUT_S),
        )
        self._http1.abort()
        if not await leave(self._layer, at_once):
            _LOGGER.warning("the workers will find this interface server gone by its lease")
        self.connections.close()
        self._deadlines.close()
        self._end_watch.close()

    async def _drain(self, timeout_s: float) -> None:
        """Let end what runs, within so long."""
        if self._http1.newcomers():
            newcomers_s = min(_NEWCOMERS_S, timeout_s / 4)
            await asyncio.sleep(newcomers_s)
            timeout_s -= newcomers_s
        await self.connections.drain(timeout_s)
        for protocol in self._http1.newcomers():
            protocol.abort()

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
