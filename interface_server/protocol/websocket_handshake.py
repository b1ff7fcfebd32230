"""The opening handshake of a WebSocket, from a parsed request head to the bytes of the answer. No I/O.

RFC 6455 section 4.2. The headers come from the request reader and are never put back into text and parsed again:
a second parser with other ideas of where a line ends is how headers are smuggled (CVE-2026-44546).

Lives here: whether a request is an upgrade, what is wrong with it, what the client offers, the 101 and every other
answer before it. Does not live here: when which answer is given (websocket_session.py), what an offer of compression
means (deflate.py).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from interface_server.protocol.deflate import Deflate, MalformedOffer, negotiate
from interface_server.protocol.request import RequestHead

__all__ = [
    "Handshake",
    "HandshakeFault",
    "InvalidAccept",
    "build_accept",
    "build_refusal",
    "check_accept",
    "is_websocket_upgrade",
    "read_handshake",
    "read_offers",
]

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3

_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2
_UNSAFE_VALUE: Final = re.compile(rb"[\r\n\0]")

# Of an application's headers for the 101: what the handshake itself decides (the first two by the ASGI
# specification, "Accept"), and what would give a 101 a body, which no 1xx has (RFC 9110 section 15.2).
_RESERVED_HEADERS: Final = frozenset(
    (
        b"sec-websocket-protocol",
        b"sec-websocket-accept",
        b"sec-websocket-extensions",
        b"connection",
        b"upgrade",
        b"content-length",
        b"transfer-encoding",
    )
)

# A client that was told "not now" may ask again after this; it is not a promise.
_RETRY_AFTER_S: Final = 1


class HandshakeFault(Exception):
    """The client's upgrade request is wrong: answer ``build_refusal(status, headers)`` and close.

    The text says what was wrong.
    """

    def __init__(self, status: int, text: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(text)
        self.status = status
        self.headers = tuple(headers)


class InvalidAccept(ValueError):
    """The application's ``websocket.accept`` cannot be sent; the text names the field and the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """A valid opening handshake that waits for its answer."""

    accept: bytes  # value of Sec-WebSocket-Accept
    subprotocols: list[str]  # as offered, best first, each once
    deflate: Deflate | None = None  # the compression that the accept agrees on


def is_websocket_upgrade(head: RequestHead) -> bool:
    """True if the request wants to become a WebSocket, even if ``read_handshake`` then finds a fault.

    Anything else with an ``Upgrade`` is a plain request: RFC 9110 section 7.8 lets a server ignore the header, and
    obliges it to in HTTP/1.0. Connection may list several tokens (Firefox: ``keep-alive, Upgrade``).
    """
    return (
        head.method == "GET"
        and head.http_version == "1.1"
        and _has_token(head.headers, b"upgrade", b"websocket")
        and _has_token(head.headers, b"connection", b"upgrade")
    )


def read_handshake(head: RequestHead, *, may_deflate: bool = False) -> Handshake:
    """Check an upgrade request (RFC 6455 section 4.2.1). Raises HandshakeFault."""
    # Bytes behind the head would be a body for one reader and frames for another.
    if any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in head.headers
    ):
        raise HandshakeFault(400, "a WebSocket upgrade request must not have a body")
    versions = _values(head.headers, b"sec-websocket-version")
    if versions != [b"13"]:
        # Section 4.4: name the version we speak. RFC 9110 section 15.5.22: a 426 must carry Upgrade.
        raise HandshakeFault(
            426,
            f"Sec-WebSocket-Version is {_shown(versions)}, must be 13",
            ((b"upgrade", b"websocket"), (b"sec-websocket-version", b"13")),
        )
    keys = _values(head.headers, b"sec-websocket-key")
    if len(keys) != 1 or not _is_nonce(keys[0]):
        raise HandshakeFault(400, f"Sec-WebSocket-Key is {_shown(keys)}, must be 16 bytes in base64")
    accept = base64.b64encode(hashlib.sha1(keys[0] + _GUID).digest())
    return read_offers(head, accept=accept, may_deflate=may_deflate)


def read_offers(head: RequestHead, *, accept: bytes, may_deflate: bool) -> Handshake:
    """Read what the client offers, which is the same in every version of HTTP. Raises HandshakeFault."""
    subprotocols: dict[str, None] = {}
    for token in _list_items(head.headers, b"sec-websocket-protocol"):
        if not _TOKEN.fullmatch(token):
            raise HandshakeFault(400, f"Sec-WebSocket-Protocol names {_shown([token])}, which is not a token")
        subprotocols[token.decode("ascii")] = None
    deflate = None
    if may_deflate:  # else we know no extension, and what is offered is none of our business
        try:
            deflate = negotiate(_values(head.headers, b"sec-websocket-extensions"))
        except MalformedOffer as error:
            raise HandshakeFault(400, f"Sec-WebSocket-Extensions: {error}") from error
    return Handshake(accept=accept, subprotocols=list(subprotocols), deflate=deflate)


def build_accept(
    handshake: Handshake,
    *,
    subprotocol: str | None,
    headers: Iterable[Sequence[bytes]] = (),
    server_headers: Iterable[tuple[bytes, bytes]] = (),
) -> bytes:
    """Return the 101 (section 4.2.2). ``headers`` are the application's, ``server_headers`` ours (Date, Server …).

    Raises InvalidAccept for what the application may not send. Names are written as given, in the order given.
    """
    lines = [
        b"HTTP/1.1 101 Switching Protocols",
        b"upgrade: websocket",
        b"connection: Upgrade",
        b"sec-websocket-accept: " + handshake.accept,
    ]
    own = check_accept(handshake, subprotocol=subprotocol, headers=headers)
    if subprotocol is not None:
        lines.append(b"sec-websocket-protocol: " + subprotocol.encode("ascii"))
    if handshake.deflate is not None:
        lines.append(b"sec-websocket-extensions: " + handshake.deflate.answer)
    own_names = set()
    for name, value in own:
        lines.append(name + b": " + value)
        own_names.add(name.lower())
    # As in HTTP responses: what the application says about Date and Server replaces ours.
    lines.extend(name + b": " + value for name, value in server_headers if name.lower() not in own_names)
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def check_accept(
    handshake: Handshake, *, subprotocol: str | None, headers: Iterable[Sequence[bytes]]
) -> list[tuple[bytes, bytes]]:
    """Return the application's headers. Raises InvalidAccept for what it may not send."""
    # A client must fail the connection when it did not offer what was chosen (section 4.1, last item 6).
    if subprotocol is not None and subprotocol not in handshake.subprotocols:
        raise InvalidAccept(
            f'websocket.accept: "subprotocol" is {subprotocol!r}, the client offered {handshake.subprotocols!r}'
        )
    return list(_checked(headers))


def build_refusal(
    status: int,
    *,
    headers: Iterable[tuple[bytes, bytes]] = (),
    server_headers: Iterable[tuple[bytes, bytes]] = (),
    text: str = "",
) -> bytes:
    """Return a complete response other than 101, after which the connection is closed.

    ``text`` becomes the body, for whoever debugs a client; the status phrase if it is empty.
    """
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    body = (text or phrase).encode()
    connection = b"close"
    lines = [b"HTTP/1.1 %d %s" % (status, phrase.encode("ascii"))]
    for name, value in headers:
        lines.append(name + b": " + value)
        if name == b"upgrade":  # RFC 9110 section 7.8: Upgrade must be named in Connection
            connection = b"close, upgrade"
    if status == 503:
        lines.append(b"retry-after: %d" % _RETRY_AFTER_S)
    lines += [
        b"content-type: text/plain; charset=utf-8",
        b"content-length: %d" % len(body),
        b"connection: " + connection,
    ]
    lines.extend(name + b": " + value for name, value in server_headers)
    lines += [b"", body]
    return b"\r\n".join(lines)


def _checked(headers: Iterable[Sequence[bytes]]) -> Iterable[tuple[bytes, bytes]]:
    for header in headers:
        try:
            name, value = header
            reserved = name.lower() in _RESERVED_HEADERS
            good = _TOKEN.fullmatch(name) is not None and _UNSAFE_VALUE.search(value) is None
        except (TypeError, ValueError, AttributeError) as error:
            raise InvalidAccept(f"websocket.accept: header {header!r:.200} is not a pair of byte strings") from error
        if reserved:
            raise InvalidAccept(f"websocket.accept: header {name!r} is decided by the server")
        if not good:
            raise InvalidAccept(
                f"websocket.accept: header {name!r}: {value!r:.200} is not a token and a value without CR, LF and NUL"
            )
        yield name, value


def _values(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> list[bytes]:
    return [value for name, value in headers if name == wanted]


def _list_items(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> list[bytes]:
    """Members of a list header, over all its lines; empty ones do not count (RFC 9110 section 5.6.1.2)."""
    items = (item.strip(b" \t") for name, value in headers if name == wanted for item in value.split(b","))
    return [item for item in items if item]


def _has_token(headers: Iterable[tuple[bytes, bytes]], wanted: bytes, token: bytes) -> bool:
    return any(item.lower() == token for item in _list_items(headers, wanted))


def _is_nonce(key: bytes) -> bool:
    try:
        return len(key) == 24 and len(base64.b64decode(key, validate=True)) == 16
    except binascii.Error:
        return False


def _shown(values: list[bytes]) -> str:
    """What a client sent, for an error text."""
    if not values:
        return "missing"
    return ascii(b", ".join(values)[:80].decode("latin-1"))
