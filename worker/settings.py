"""Every knob of a worker, with its default, and what happens at each limit.

The command line (trunkline/) parses flags and environment into this record; everything below takes it as a value
and never reads the environment. Names are uvicorn's or Daphne's where they have the knob; units stand last.
To add a knob: a field here with its sentence, its flag in trunkline/, its reader.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from channel_layer.errors import InvalidName
from channel_layer.frames import WIRE_VERSION, WIRE_VERSION_PREVIOUS
from channel_layer.names import check_channel_name, process_of

__all__ = [
    "HTTP_CHANNEL",
    "THREADS_DEFAULT",
    "WEBSOCKET_CHANNEL",
    "InterfaceStyle",
    "LifespanMode",
    "WorkerSettings",
]

# The normal channels on which connections wait for a worker.
HTTP_CHANNEL = "http.request"
WEBSOCKET_CHANNEL = "websocket.connect"

InterfaceStyle = Literal["auto", "asgi3", "asgi2", "wsgi"]
LifespanMode = Literal["auto", "on", "off"]

THREADS_DEFAULT = 16

_ASGI_SCOPES = ("http", "websocket", "lifespan", "channel")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Settings of one worker process. Raises ValueError for values that cannot work together."""

    # Broker.
    redis_url: str = field(repr=False)  # it may hold a password
    prefix: str = "trunkline"  # separates deployments that share a broker
    # Keys, or "@" and a file of them (encryption.read_keys); the first encrypts, each decrypts. Without: plain text.
    encryption_keys: tuple[str, ...] = field(default=(), repr=False)
    # The version of the wire between the halves; the previous one, too: see docs/deployment.md.
    wire_version: int = WIRE_VERSION

    # The application.
    application: str  # "module:attribute"
    factory: bool = False  # the attribute is a function that makes the application
    app_dir: str | None = None  # goes to the front of sys.path; None: the current directory
    interface: InterfaceStyle = "auto"  # "auto" looks at the application, see application.py
    # "auto": an application that raises for the lifespan scope is served without it; "on": then the worker does
    # not start; "off": no lifespan scope is sent.
    lifespan: LifespanMode = "auto"

    # What is taken from the queues. At the limit nothing more is taken: openings wait for another worker or for
    # room here, and after the interface server's --queue-timeout they get 503.
    # Any other name is a channel of background work (background.py).
    channels: tuple[str, ...] = (HTTP_CHANNEL, WEBSOCKET_CHANNEL)
    protocols: tuple[str, ...] = ()  # own ones (interface_server/own_protocol.py): scope types, beside the channels
    concurrency: int = 100  # running HTTP requests; one counts until its application call returns
    websockets_max: int = 20_000  # WebSockets, likewise; and connections of each own protocol
    # Of a WSGI application, one for each running request. A worker takes no request for which it has none: so what
    # is above the smaller of ``threads`` and ``concurrency`` waits in the broker's queue, for whichever worker is
    # free first, and not in this one behind a slow request.
    threads: int = THREADS_DEFAULT

    # An application whose client left before the exchange was complete has this long to return; then it is
    # cancelled, with a log line that says where it waited. Not applied to work after a complete HTTP response.
    close_timeout_s: float = 10.0
    # After SIGTERM: HTTP requests have this long to finish, WebSockets to be handed over or else to be closed (1012)
    # towards its end; then what still runs is cancelled. After SIGINT: 1 s at most (process_life.HURRIED_DRAIN_S).
    drain_timeout_s: float = 20.0
    # The application's lifespan shutdown; then its task is cancelled.
    lifespan_shutdown_timeout_s: float = 30.0

    # Health checks (channel_layer/admin.py). Whoever may connect there may read how this process is.
    admin_host: str = "127.0.0.1"
    admin_port: int = 0  # 0: none
    # A loop that has not turned for so long ends the process, with its stack on stderr; 0: never. A supervisor sees
    # to that where there is one.
    hang_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("concurrency", "websockets_max", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("close_timeout_s", "drain_timeout_s", "lifespan_shutdown_timeout_s", "hang_timeout_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        if not WIRE_VERSION_PREVIOUS <= self.wire_version <= WIRE_VERSION:
            raise ValueError(
                f"wire_version is {self.wire_version}, must be {WIRE_VERSION_PREVIOUS} or {WIRE_VERSION}"
            )
        if not 0 <= self.admin_port <= 65535:
            raise ValueError(f"admin_port is {self.admin_port}, must be 0 to 65535")
        if not self.channels or len(set(self.channels)) < len(self.channels):
            raise ValueError(f"channels are {self.channels!r}, must be one or more different ones")
        for channel in self.channels:
            try:
                is_normal = process_of(check_channel_name(channel)) is None
            except InvalidName as error:
                raise ValueError(f"channels: {error}") from error
            if not is_normal:
                raise ValueError(f"channels: {channel!r} belongs to one process, workers read those without '!'")
            if self.interface == "wsgi" and channel not in (HTTP_CHANNEL, WEBSOCKET_CHANNEL):
                raise ValueError(f"channels: {channel!r} is background work, which a WSGI application cannot do")
        for protocol in self.protocols:
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", protocol) or protocol in _ASGI_SCOPES:
                raise ValueError(f"protocols: {protocol!r} is not a name in small letters, or is one of ASGI's own")
            if f"{protocol}.connect" in self.channels or self.protocols.count(protocol) > 1:
                raise ValueError(f"protocols: {protocol!r} is taken twice")
            if self.interface == "wsgi":
                raise ValueError(f"protocols: {protocol!r} is nothing a WSGI application can speak")
        if self.interface not in ("auto", "asgi3", "asgi2", "wsgi"):
            raise ValueError(f"interface is {self.interface!r}, must be 'auto', 'asgi3', 'asgi2' or 'wsgi'")
        if self.lifespan not in ("auto", "on", "off"):
            raise ValueError(f"lifespan is {self.lifespan!r}, must be 'auto', 'on' or 'off'")

    @property
    def http_max(self) -> int:
        """How many HTTP requests this worker holds at a time."""
        return min(self.concurrency, self.threads) if self.interface == "wsgi" else self.concurrency
