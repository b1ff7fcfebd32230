"""A request head of HTTP/2, from the fields of a HEADERS frame. No I/O.

The h2 library has checked the frames, the order and kinds of the pseudo-headers and the connection-specific fields
(RFC 9113 section 8). Here is what HTTP/1.1 asks of the same things, so that an application cannot tell which version
its client spoke: the target, Host, sizes, control characters, cookies in one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from interface_server.protocol.chunked_body import TOKEN
from interface_server.protocol.errors import BadRequest
from interface_server.protocol.request import RequestHead
from interface_server.protocol.request_reader import ReaderLimits

__all__ = ["Http2Request", "read_request"]

_NAME: Final = re.compile(TOKEN)
_METHOD: Final = re.compile(TOKEN)
_TARGET: Final = re.compile(rb"[\x21\x22\x24-\x7e]+")  # as in request_reader.py
_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*)(?::[0-9]{0,5})?")
_VALUE_FORBIDDEN: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
# What a field counts for beside its name and value: RFC 9113 section 6.5.2, SETTINGS_MAX_HEADER_LIST_SIZE.
_FIELD_BYTES: Final = 32


class Http2Request(NamedTuple):
    head: RequestHead
    is_websocket: bool  # RFC 8441
    expects_continue: bool


def read_request(fields: Iterable[tuple[bytes, bytes]], limits: ReaderLimits) -> Http2Request:
    """Raises BadRequest; only this stream is concerned."""
    pseudo: dict[bytes, bytes] = {}
    headers: list[tuple[bytes, bytes]] = []
    cookies: list[bytes] = []
    cookie_index = 0
    host: bytes | None = None
    expects_continue = False
    count = 0
    left = limits.head_bytes_max
    for name, value in fields:
        # h2 has tuples of its own; the codec knows plain ones.
        name, value = bytes(name), bytes(value)
        left -= len(name) + len(value) + _FIELD_BYTES
        if name.startswith(b":"):
            pseudo[name] = value
            continue
        count += 1
        if not _NAME.fullmatch(name) or name != name.lower() or _VALUE_FORBIDDEN.search(value):
            raise BadRequest(400, "malformed header")
        value = value.strip(b" \t")
        if name == b"host":
            if host is not None and host != value:
                raise BadRequest(400, "Host is given more than once")
            host = value
            continue
        if name == b"cookie":
            # RFC 9113 section 8.2.3: they may come in crumbs, and are one line for everybody else.
            if not cookies:
                cookie_index = len(headers)
                headers.append((name, b""))
            cookies.append(value)
            continue
        if name == b"expect":
            if value.lower() != b"100-continue":
                raise BadRequest(417, "unknown expectation")
            expects_continue = True
        headers.append((name, value))
    if count > limits.headers_max:
        raise BadRequest(431, "too many headers")
    if left < 0:
        raise BadRequest(431, "headers are too large")
    if cookies:
        headers[cookie_index] = (b"cookie", b"; ".join(cookies))
    method = pseudo.get(b":method", b"")
    if not _METHOD.fullmatch(method):
        raise BadRequest(400, "malformed method")
    is_websocket = False
    if method == b"CONNECT":
        if pseudo.get(b":protocol") != b"websocket":
            raise BadRequest(501, "CONNECT is for proxies")
        is_websocket = True
    authority = pseudo.get(b":authority", host)
    if authority is None:
        raise BadRequest(400, "Host is missing")
    if not _HOST.fullmatch(authority):
        raise BadRequest(400, "malformed Host")
    # ASGI, "HTTP Connection Scope": :authority becomes the first header.
    headers.insert(0, (b"host", authority))
    target = pseudo.get(b":path", b"")
    if len(target) > limits.request_line_bytes_max:
        raise BadRequest(414, "request target is too long")
    if not _TARGET.fullmatch(target) or not (target.startswith(b"/") or (target == b"*" and method == b"OPTIONS")):
        raise BadRequest(400, "malformed request target")
    raw_path, _, query = target.partition(b"?")
    head = RequestHead(
        method=method.decode("ascii"), raw_path=raw_path, query_string=query, http_version="2", headers=headers
    )
    return Http2Request(head, is_websocket, expects_continue)
