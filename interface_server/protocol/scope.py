"""Connection scopes, from a checked head and what is known about its peer. No I/O.

ASGI "HTTP" and "WebSocket", section "Connection Scope"; H1-H12 and W3-W6 in docs/conformance.md. Every call builds
new objects: applications change their scope (CVE-2020-35681 was a shared one). Lists instead of tuples and what only
the worker knows (``state``) come behind the wire; ``extensions`` is completed by ``Connections.open``.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import unquote_to_bytes

from interface_server.protocol.request import Peer, RequestHead

__all__ = ["build_http_scope", "build_websocket_scope"]

# 2.4 promises an OSError from send() after the client left, which our workers raise; 2.5 adds the reason of a close.
_SPEC_VERSION: Final = "2.5"


def build_http_scope(head: RequestHead, peer: Peer, *, root_path: str, pathsend: bool = False) -> dict[str, Any]:
    """Return the scope of an HTTP request. ``peer`` is the client as proxy_headers.py decided."""
    scope = _common("http", "https" if peer.tls else "http", head, peer, root_path)
    scope["method"] = head.method
    extensions = scope["extensions"]
    if head.http_version != "1.0":  # which knows neither chunks nor interim responses
        extensions["http.response.early_hint"] = {}
        if head.http_version == "2" or _takes_trailers(head):
            extensions["http.response.trailers"] = {}
    if pathsend:
        extensions["http.response.pathsend"] = {}
    return scope


def build_websocket_scope(
    head: RequestHead, peer: Peer, *, root_path: str, subprotocols: list[str]
) -> dict[str, Any]:
    """Return the scope of a WebSocket. ``peer`` is the client as proxy_headers.py decided."""
    scope = _common("websocket", "wss" if peer.tls else "ws", head, peer, root_path)
    scope["subprotocols"] = subprotocols
    scope["extensions"]["websocket.http.response"] = {}
    return scope


def _common(kind: str, scheme: str, head: RequestHead, peer: Peer, root_path: str) -> dict[str, Any]:
    raw_path = head.raw_path
    path = decode_path(raw_path)
    if root_path and path != "*":
        # SCRIPT_NAME + PATH_INFO: "path" includes the root path (asgiref.wsgi strips it again), as in uvicorn.
        path = root_path + path
        raw_path = root_path.encode() + raw_path
    return {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": _SPEC_VERSION},
        "http_version": head.http_version,
        "server": peer.server,
        "client": peer.client,
        "scheme": scheme,
        "root_path": root_path,
        "path": path,
        "raw_path": raw_path,
        "query_string": head.query_string,
        "headers": head.headers,
        "extensions": {} if peer.tls_extension is None else {"tls": peer.tls_extension},
    }


def _takes_trailers(head: RequestHead) -> bool:
    """RFC 9110 section 6.5.1: without "TE: trailers" somebody on the way may drop them."""
    return any(
        name == b"te" and b"trailers" in [token.partition(b";")[0].strip() for token in value.lower().split(b",")]
        for name, value in head.headers
    )


def decode_path(raw_path: bytes) -> str:
    """Return the path percent-decoded and as text. What is not UTF-8 becomes U+FFFD, as in uvicorn: "path" must be
    text that can be encoded again, and who needs the bytes has "raw_path".
    """
    if raw_path.isascii() and b"%" not in raw_path:
        return raw_path.decode()
    return unquote_to_bytes(raw_path).decode("utf-8", "replace")
