"""The opening handshake of a WebSocket over HTTP/2 (RFC 8441), for websocket_session.py. No I/O.

It is a CONNECT with ``:protocol``: there is no key, the answer is a 200, and frames travel as DATA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from interface_server.protocol.http2_exchange import Data, Fields, Http2Exchange, build_plain_fields
from interface_server.protocol.request import RequestHead
from interface_server.protocol.server_headers import ServerHeaders
from interface_server.protocol.websocket_handshake import (
    Handshake,
    HandshakeFault,
    check_accept,
    read_offers,
)

__all__ = ["Http2Answers", "read_extended_connect"]

_VERSION: Final = b"13"


def read_extended_connect(head: RequestHead, *, may_deflate: bool = False) -> Handshake:
    """Check an extended CONNECT (RFC 8441 section 5). Raises HandshakeFault."""
    versions = [value for name, value in head.headers if name == b"sec-websocket-version"]
    if versions != [_VERSION]:
        raise HandshakeFault(400, "Sec-WebSocket-Version must be 13", ((b"sec-websocket-version", _VERSION),))
    return read_offers(head, accept=b"", may_deflate=may_deflate)


class Http2Answers:
    """Implements ``websocket_session.Answers``. One for all WebSockets."""

    __slots__ = ("_server_headers",)

    def __init__(self, server_headers: ServerHeaders) -> None:
        self._server_headers = server_headers

    def accept(
        self, handshake: Handshake, *, subprotocol: str | None, headers: Iterable[Sequence[bytes]]
    ) -> Sequence[Any]:
        fields = [(b":status", b"200")]
        if subprotocol is not None:
            fields.append((b"sec-websocket-protocol", subprotocol.encode("ascii")))
        if handshake.deflate is not None:
            fields.append((b"sec-websocket-extensions", handshake.deflate.answer))
        own = check_accept(handshake, subprotocol=subprotocol, headers=headers)
        fields += ((name.lower(), value.strip(b" \t")) for name, value in own)
        names = {name for name, _ in fields}
        pairs = self._server_headers.refresh().pairs
        fields += ((name.lower(), value) for name, value in pairs if name.lower() not in names)
        return (Fields(fields, False),)

    def refuse(self, status: int, text: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> Sequence[Any]:
        fields, body = build_plain_fields(status, text or None, self._server_headers, headers)
        return (Fields(fields, False), Data(body, False))  # the transport's end is the stream's

    def exchange(self) -> Http2Exchange:
        # Not CONNECT: what refuses it has a body.
        return Http2Exchange(
            method="GET", expects_continue=False, request_is_complete=True, server_headers=self._server_headers
        )
