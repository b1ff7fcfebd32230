"""The response to one HTTP/2 request: HttpExchange with frames in place of bytes. No I/O.

What an Output holds here goes to the stream, in order: ``Fields`` become HEADERS, ``Data`` DATA. The end of the
stream is the framing of every body, so a response without content-length is no worse than one with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from interface_server.protocol.actions import Output
from interface_server.protocol.http_exchange import HttpExchange, build_plain_body
from interface_server.protocol.server_headers import ServerHeaders

__all__ = ["Data", "Fields", "Http2Exchange", "build_plain_fields", "check_fields"]

Field = tuple[bytes, bytes]

# RFC 9113 section 8.2.2: fields that are about an HTTP/1.1 connection must not be sent; what the application meant
# with them is the server's business anyway (H18).
_CONNECTION_FIELDS: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)


class Fields(NamedTuple):
    fields: Sequence[Field]
    ends: bool  # the stream


class Data(NamedTuple):
    data: bytes
    ends: bool


class Http2Exchange(HttpExchange):
    """See HttpExchange. ``End.KEEP`` is the end of the stream, ``CUT`` and ``RESET`` are a RST_STREAM."""

    __slots__ = ()

    def __init__(
        self, *, method: str, expects_continue: bool, request_is_complete: bool, server_headers: ServerHeaders
    ) -> None:
        super().__init__(
            method=method,
            http_version="1.1",  # as far as HttpExchange asks: there are interim responses and open-ended bodies
            keep_alive=True,
            expects_continue=expects_continue,
            request_is_complete=request_is_complete,
            server_headers=server_headers,
        )

    def _takes_trailers(self) -> bool:
        return self._has_whole_body()

    def _frame(self, head: Any, body: bytes, *, is_last: bool) -> Sequence[Any]:
        parts: list[Any] = []
        if head:
            parts.append(Fields(head, is_last and not body))
            if not body:
                return parts
        if body or is_last:
            parts.append(Data(body, is_last))
        return parts

    def _frame_whole(self, status: int, headers: Any, body: bytes) -> None:
        """There is no such short way here."""

    def _frame_trailers(self, trailers: Sequence[Sequence[bytes]]) -> Sequence[Any]:
        if not trailers:
            return (Data(b"", True),)
        return (Fields(check_fields(trailers), True),)

    def _frame_interim(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> Output:
        return Output((Fields([(b":status", b"%d" % status), *check_fields(headers)], False),))

    def _frame_plain(self, status: int, reason: str | None) -> Sequence[Any]:
        fields, body = build_plain_fields(status, reason, self._server_headers)
        return (Fields(fields, True),) if self._is_head else (Fields(fields, False), Data(body, True))

    def _build_head(self) -> list[Field]:
        status = self.status
        assert status is not None
        fields: list[Field] = [(b":status", b"%d" % status)]
        names = set()
        for name, value in check_fields(self._headers):
            if name in _CONNECTION_FIELDS or (name == b"content-length" and status == 204):
                continue
            names.add(name)
            fields.append((name, value))
        if self._length is not None and b"content-length" not in names and self._sends_length():
            fields.append((b"content-length", b"%d" % self._length))
        fields += ((name, value) for name, value in self._server_headers.refresh().pairs if name not in names)
        return fields


def check_fields(headers: Iterable[Sequence[bytes]]) -> list[Field]:
    """Names in lower case (RFC 9113 section 8.2.1). Raises ValueError for what would be a malformed response."""
    fields = []
    for name, value in headers:
        if any(mark in value for mark in (b"\r", b"\n", b"\0")) or not name or name.startswith(b":"):
            raise ValueError(f"application sent header {name!r:.80}, which cannot be sent as it is")
        fields.append((name.lower(), value.strip(b" \t")))
    return fields


def build_plain_fields(
    status: int, reason: str | None, server_headers: ServerHeaders, headers: Iterable[Field] = ()
) -> tuple[list[Field], bytes]:
    """Return a complete response of ours."""
    body, own = build_plain_body(status, reason)
    kept = [field for field in headers if field[0] not in _CONNECTION_FIELDS]
    fields = [(b":status", b"%d" % status), *kept, *own, *server_headers.refresh().pairs]
    return [(name.lower(), value) for name, value in fields], body
