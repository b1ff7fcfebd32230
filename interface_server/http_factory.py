"""What all HTTP connections of a process share, whichever version they speak; server.py listens with it.

One socket on it: http1.py, which hands those that speak HTTP/2 over to http2.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twisted.internet.protocol import Factory

from channel_layer.turns import Turns
from interface_server.access_log import AccessLog
from interface_server.connections import Connections
from interface_server.deadlines import Deadlines
from interface_server.end_watch import EndWatch
from interface_server.http1 import Http1Protocol, Phase
from interface_server.protocol.proxy_headers import ProxyHeaders
from interface_server.protocol.request_reader import ReaderLimits
from interface_server.protocol.server_headers import ServerHeaders
from interface_server.settings import InterfaceSettings
from interface_server.websocket import WebSockets

__all__ = ["HttpFactory", "HttpStatistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpStatistics:
    sockets: int  # WebSockets included
    idle: int  # wait for a request
    accepted_total: int
    requests_total: int
    bad_requests_total: int
    timeouts_total: int
    dropped_total: int  # events of groups that did not fit their response


class HttpFactory(Factory):
    """Makes a protocol for each accepted socket, and knows all of them."""

    noisy = False

    def __init__(
        self,
        *,
        settings: InterfaceSettings,
        connections: Connections,
        websockets: WebSockets,
        access_log: AccessLog,
        deadlines: Deadlines,
        server_headers: ServerHeaders,
        end_watch: EndWatch | None = None,
        turns: Turns | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.settings = settings
        self.connections = connections
        self.websockets = websockets
        self.access_log = access_log
        self.deadlines = deadlines
        self.server_headers = server_headers
        self.end_watch = end_watch  # None: the ends of sockets that are not read are not watched
        self.turns = Turns() if turns is None else turns  # of clients that sent more than is read in one go
        self.clock = clock  # for the access log
        self.limits = ReaderLimits(
            request_line_bytes_max=settings.request_line_bytes_max,
            head_bytes_max=settings.head_bytes_max,
            headers_max=settings.headers_max,
        )
        self.proxy_headers = ProxyHeaders(settings.forwarded_allow_ips) if settings.proxy_headers else None
        self.protocols: set[Http1Protocol] = set()  # until their sockets are gone
        self.when_empty: Callable[[], None] | None = None  # called when the last socket is gone
        self.is_stopping = False
        self.accepted_count = 0
        self.request_count = 0
        self.bad_request_count = 0
        self.timeout_count = 0
        self.dropped_count = 0

    def __repr__(self) -> str:
        return f"<HttpFactory sockets={len(self.protocols)} stopping={self.is_stopping}>"

    def statistics(self) -> HttpStatistics:
        return HttpStatistics(
            sockets=len(self.protocols),
            idle=sum(protocol.phase is Phase.HEAD for protocol in self.protocols),
            accepted_total=self.accepted_count,
            requests_total=self.request_count,
            bad_requests_total=self.bad_request_count,
            timeouts_total=self.timeout_count,
            dropped_total=self.dropped_count,
        )

    def stop(self) -> None:
        """Close sockets that wait for a further request, at once; the others when their exchange is over."""
        self.is_stopping = True
        for protocol in list(self.protocols):
            protocol.stop()

    def newcomers(self) -> list[Http1Protocol]:
        """Sockets whose first request has not begun to come."""
        return [protocol for protocol in self.protocols if protocol.is_newcomer]

    def abort(self) -> None:
        """Drop every socket that is left."""
        for protocol in list(self.protocols):
            protocol.abort()

    # Called by Twisted

    def buildProtocol(self, addr: Any) -> Http1Protocol:  # type: ignore[override]
        return Http1Protocol(self)
