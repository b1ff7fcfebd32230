"""What the head of a request and the socket below it say, before anybody interprets it.

Built by the readers of HTTP/1.1 (and later HTTP/2), used by everything behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Peer", "RequestHead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """The two ends of a client's socket, as the operating system tells them.

    ``client`` is None on a unix socket; ``server`` is ``(path, None)`` there.
    """

    client: tuple[str, int] | None
    server: tuple[str, int | None] | None
    tls: bool = False
    tls_extension: Mapping[str, Any] | None = None  # scope["extensions"]["tls"], where this socket speaks TLS


@dataclass(slots=True, kw_only=True)  # nobody changes one; frozen, each request would cost 0.5 us more
class RequestHead:
    """A checked request head. Header names are lower-case, values without blanks around them, both as received
    otherwise; ``host`` stands in the headers as the rules of RFC 9112 section 3.2 leave it.
    """

    method: str  # upper-case
    raw_path: bytes  # before "?", percent-encoded, as received
    query_string: bytes  # behind "?", percent-encoded
    http_version: str  # "1.0", "1.1", "2"
    headers: list[tuple[bytes, bytes]]
