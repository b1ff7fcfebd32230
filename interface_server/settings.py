"""Every knob of an interface server, with its default, and what happens at each limit.

The command line (trunkline/) parses flags and environment into this record; everything below takes it as a
value and never reads the environment. Names are uvicorn's where uvicorn has the knob; units stand last.
To add a knob: a field here with its sentence, its flag in trunkline/, its reader.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from channel_layer.connection import EVENT_BYTES_MAX
from channel_layer.frames import WIRE_VERSION, WIRE_VERSION_PREVIOUS
from interface_server.endpoints import parse_endpoint

__all__ = ["InterfaceSettings"]

# One message is one event of the channel layer, with some bytes around it.
_WS_MAX_SIZE_BYTES_MAX: Final = EVENT_BYTES_MAX - 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceSettings:
    """Settings of one interface server process. Raises ValueError for values that cannot work together.

    Limits of count, bytes or time say what happens when they are reached; 0 means "no limit" only where
    the sentence says so.
    """

    # Broker.
    redis_url: str = field(repr=False)  # it may hold a password
    prefix: str = "trunkline"  # separates deployments that share a broker
    # Keys, or "@" and a file of them (encryption.read_keys); the first encrypts, each decrypts. Without: plain text.
    encryption_keys: tuple[str, ...] = field(default=(), repr=False)
    # The version of the wire between the halves; the previous one, too: see docs/deployment.md.
    wire_version: int = WIRE_VERSION
    # How long a new connection waits for a broker that is away; then 503 (close 1013).
    broker_wait_s: float = 5.0

    # Listening: the first that is given of fd, uds, host and port; and each of the endpoints (endpoints.py).
    endpoints: tuple[str, ...] = ()  # Twisted's strings: tcp:8000, ssl:443:privateKey=key.pem:certKey=cert.pem, …
    endpoints_only: bool = False  # fd, uds, host and port mean nothing
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port; the line written when ready names it
    uds: str | None = None  # path of a unix socket; a stale one is replaced
    uds_permissions: str = "666"  # its mode, octal; the default is uvicorn's: a proxy of another user may connect
    fd: int | None = None  # an inherited socket that listens already
    reuse_port: bool = False  # SO_REUSEPORT: several servers bind the same port by themselves
    # Connections the kernel completes before we accept them; what comes beyond is dropped and tried again by
    # the client's kernel (somaxconn caps it).
    backlog: int = 2048

    # TLS: spoken on the listening socket when there is a certificate. SIGHUP reads the files again.
    ssl_certfile: str | None = None  # PEM: the server's certificate, then those between it and the root
    ssl_keyfile: str | None = None  # PEM; None: the key is in the certificate's file
    ssl_keyfile_password: str | None = field(default=None, repr=False)
    ssl_ca_certs: str | None = None  # PEM: who signs clients' certificates
    ssl_cert_reqs: str = "none"  # client certificates: none, optional, required; one that is not valid: no connection
    ssl_ciphers: str | None = None  # OpenSSL's list for TLS 1.2; None: those with forward secrecy and AEAD
    ssl_min_version: str = "tlsv1.2"  # or tlsv1.3

    # What applications see.
    root_path: str = ""
    proxy_headers: bool = True  # believe X-Forwarded-For and -Proto of the peers in forwarded_allow_ips
    forwarded_allow_ips: str = "127.0.0.1,::1"  # addresses, networks, literals for unix sockets; "*" is everybody

    # Offer http.response.pathsend: this server opens the files that workers name. Where both see the same files.
    pathsend: bool = False

    # What clients see.
    server_header: bool = True
    date_header: bool = True
    extra_headers: tuple[tuple[bytes, bytes], ...] = ()  # appended to every response head

    access_log: bool = True

    # HTTP.
    keep_alive_timeout_s: float = 5.0  # an idle connection is closed after it
    header_timeout_s: float = 30.0  # a head that is not complete by then: 408 and close
    body_timeout_s: float = 60.0  # longest silence within a request body we want to read: 408 and close; 0: no limit
    # Bytes a second that win that time back; a body that is slower for long is a 408, too (protocol/body_pace.py).
    body_rate: int = 64  # 0: a byte wins all of it back, so a body may trickle
    # A client that takes nothing for so long while its socket is full: the socket is dropped, or the HTTP/2 stream is
    # reset (write_watch.py); WebSockets, too. 0: no limit.
    write_timeout_s: float = 120.0
    request_line_bytes_max: int = 16 * 1024  # beyond: 414 and close
    head_bytes_max: int = 64 * 1024  # request line and headers together; beyond: 431 and close
    headers_max: int = 128  # count of header fields; beyond: 431 and close

    # WebSocket.
    ws_max_size_bytes: int = 16 * 1024 * 1024  # a larger message of a client: close 1009
    ws_per_message_deflate: bool = False  # compress messages with clients that offer it (RFC 7692)
    ws_ping_interval_s: float = 20.0  # 0: no pings
    ws_ping_timeout_s: float = 20.0  # no answer in time: the connection is dropped (1006); 0: wait for ever
    ws_handshake_timeout_s: float = 30.0  # neither accept nor close by then: 504
    ws_close_timeout_s: float = 5.0  # the closing handshake; then the socket is dropped

    # WebSockets whose worker stops or dies: "checkpoint" hands those over whose application stored a checkpoint,
    # "always" starts all others anew, "never" does not offer the extension. Else: close 1012.
    handover: str = "checkpoint"
    handover_timeout_s: float = 30.0  # no other worker has it by then: close 1012

    # Openings: connections that wait for a worker.
    queue_timeout_s: float = 30.0  # not taken by then: removed and 503 (close 1013)
    opening_capacity: int = 4096  # of each of the two channels, over all interface servers; a full one is 503 at once

    # Flow control, per connection.
    # Bytes of events on their way to the application; used up: the socket is not read. Also what the application
    # may have on its way to us. The worker is told with the opening.
    window_bytes: int = 256 * 1024
    # Broadcasts that wait for a client which does not read; beyond: close 1013.
    client_buffer_bytes_max: int = 1024 * 1024

    # For the whole process.
    buffer_memory_bytes_max: int = 256 * 1024 * 1024  # of such broadcasts together; beyond: the slowest close first
    connections_max: int = 0  # uvicorn's --limit-concurrency: more connections get 503; 0: no limit
    # After SIGTERM: how long this server goes on as if nothing had happened, but for /readyz, so that a balancer
    # sends its clients elsewhere before we refuse them.
    drain_delay_s: float = 0.0
    # Then: HTTP exchanges have this long to finish before they are cut, and over this time WebSockets are closed
    # (1012). After SIGINT: 1 s at most (process_life.HURRIED_DRAIN_S).
    drain_timeout_s: float = 20.0

    # Health checks (channel_layer/admin.py). Whoever may connect there may read how this process is.
    admin_host: str = "127.0.0.1"
    admin_port: int = 0  # 0: none
    # A loop that has not turned for so long ends the process, with its stack on stderr; 0: never. A supervisor sees
    # to that where there is one.
    hang_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not WIRE_VERSION_PREVIOUS <= self.wire_version <= WIRE_VERSION:
            raise ValueError(
                f"wire_version is {self.wire_version}, must be {WIRE_VERSION_PREVIOUS} or {WIRE_VERSION}"
            )
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, must be 0 to 65535")
        if not 0 <= self.admin_port <= 65535:
            raise ValueError(f"admin_port is {self.admin_port}, must be 0 to 65535")
        if not re.fullmatch("0?[0-7]{3}", self.uds_permissions):
            raise ValueError(f"uds_permissions is {self.uds_permissions!r}, must be three octal digits")
        for name in (
            "backlog",
            "request_line_bytes_max",
            "head_bytes_max",
            "headers_max",
            "ws_max_size_bytes",
            "opening_capacity",
            "client_buffer_bytes_max",
            "buffer_memory_bytes_max",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.ws_max_size_bytes > _WS_MAX_SIZE_BYTES_MAX:
            raise ValueError(
                f"ws_max_size_bytes is {self.ws_max_size_bytes}, must be at most {_WS_MAX_SIZE_BYTES_MAX}: "
                "the channel layer carries no larger message"
            )
        if self.handover not in ("checkpoint", "always", "never"):
            raise ValueError(f"handover is {self.handover!r}, must be checkpoint, always or never")
        for name in ("queue_timeout_s", "header_timeout_s", "ws_handshake_timeout_s", "handover_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be more than 0")
        for name in (
            "broker_wait_s",
            "keep_alive_timeout_s",
            "body_timeout_s",
            "write_timeout_s",
            "body_rate",
            "ws_ping_interval_s",
            "ws_ping_timeout_s",
            "ws_close_timeout_s",
            "connections_max",
            "drain_delay_s",
            "drain_timeout_s",
            "hang_timeout_s",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        is_tls = self.ssl_certfile is not None or any(parse_endpoint(text).certfile for text in self.endpoints)
        if self.endpoints_only and not self.endpoints:
            raise ValueError("endpoints_only is given, but no endpoint")
        if not is_tls and any((self.ssl_keyfile, self.ssl_ca_certs, self.ssl_ciphers)):
            raise ValueError("a key, CA certificates or ciphers are given, but no certificate (ssl_certfile)")
        if self.ssl_cert_reqs not in ("none", "optional", "required"):
            raise ValueError(f"ssl_cert_reqs is {self.ssl_cert_reqs!r}, must be none, optional or required")
        if (self.ssl_cert_reqs != "none") is (self.ssl_ca_certs is None):
            raise ValueError(
                "ssl_ca_certs is to be given if, and only if, ssl_cert_reqs asks for client certificates"
            )
        if self.ssl_min_version not in ("tlsv1.2", "tlsv1.3"):
            raise ValueError(f"ssl_min_version is {self.ssl_min_version!r}, must be tlsv1.2 or tlsv1.3")
        # Below two pieces (64 KiB each) a transfer would wait for a round trip after every piece.
        if self.window_bytes < 128 * 1024:
            raise ValueError(f"window_bytes is {self.window_bytes}, must be at least {128 * 1024}")
        for header, value in self.extra_headers:
            if not header or any(mark in header + value for mark in b"\r\n\0"):
                raise ValueError(f"extra header {header!r}: {value!r} is empty or contains CR, LF or NUL")
