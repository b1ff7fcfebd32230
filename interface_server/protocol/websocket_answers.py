"""The answers to a WebSocket handshake over HTTP/1.1, for websocket_session.py. No I/O.

Over HTTP/2 (RFC 8441) they are others: http2_websocket.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from interface_server.protocol.http_exchange import HttpExchange
from interface_server.protocol.server_headers import ServerHeaders
from interface_server.protocol.websocket_handshake import Handshake, build_accept, build_refusal

__all__ = ["Http1Answers"]


class Http1Answers:
    """Implements ``websocket_session.Answers``. One for all WebSockets."""

    __slots__ = ("_server_headers",)

    def __init__(self, server_headers: ServerHeaders) -> None:
        self._server_headers = server_headers

    def accept(
        self, handshake: Handshake, *, subprotocol: str | None, headers: Iterable[Sequence[bytes]]
    ) -> Sequence[bytes]:
        answer = build_accept(
            handshake,
            subprotocol=subprotocol,
            headers=headers,
            server_headers=self._server_headers.refresh().pairs,
        )
        return (answer,)

    def refuse(self, status: int, text: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> Sequence[bytes]:
        return (
            build_refusal(status, headers=headers, server_headers=self._server_headers.refresh().pairs, text=text),
        )

    def exchange(self) -> HttpExchange:
        return HttpExchange(
            method="GET",
            http_version="1.1",
            keep_alive=False,
            expects_continue=False,
            request_is_complete=True,
            server_headers=self._server_headers,
        )
