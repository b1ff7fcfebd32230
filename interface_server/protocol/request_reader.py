"""HTTP/1.x requests from bytes: what a client may send, and where each request ends. No I/O.

Bytes go in with ``feed``; ``next_event`` gives one event after the other, and raises BadRequest for what is refused:

    RequestStart   a complete, checked head, and how its body is framed
    BodyPiece      decoded bytes of the body, 64 KiB at most; the last one says so. None for a request without body

The caller decides when the next request begins, by asking for the next event: what follows a request stays unread
until then. So pipelined requests cannot mix, and a bad second one does not cost the first its answer. The same bytes
give the same events however they are split (pieces of a body may be cut elsewhere).

The head goes to llhttp (httptools), but only when it is complete and within our limits, which llhttp does not have;
the rules that need more than one line (Host, framing, Connection, Expect) are ours. Chunks are taken apart by
chunked_body.py: llhttp neither bounds the line before a chunk nor tells where in a buffer a chunked body ends.

We are strict wherever two readers could disagree about where a request ends, for that is how requests are smuggled
past a proxy: RFC 9112 section 11.2. Names with "_" are kept, as uvicorn does: only CGI's names make ``x_y`` and
``x-y`` the same (CVE-2015-0219), so who builds such names (WSGI) must drop them there.

To change a limit: ReaderLimits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final, NamedTuple

import httptools

from channel_layer.enums import quick
from interface_server.protocol.chunked_body import PIECE_BYTES_MAX, TOKEN, BodyPiece, ChunkedBody
from interface_server.protocol.errors import BadRequest
from interface_server.protocol.request import RequestHead

__all__ = ["PIECE_BYTES_MAX", "BodyPiece", "ReaderLimits", "RequestReader", "RequestStart"]

# RFC 9112 section 2.2 asks for "at least one" to be ignored (old clients send one behind a body); more: 400.
_BLANK_LINES_MAX: Final = 4
# Lengths stay in what ASGI calls an integer.
_LENGTH_DIGITS_MAX: Final = 18

# Visible ASCII without "#": a fragment never leaves a client (RFC 9110 section 4.2.5). What else RFC 3986 forbids in
# a URI ("|", "{", a quote) browsers do send.
_REQUEST_LINE: Final = re.compile(rb"(" + TOKEN + rb") ([\x21\x22\x24-\x7e]+) HTTP/([0-9]\.[0-9])")
_ABSOLUTE: Final = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?]*)([^?]*)(?:\?(.*))?")
_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*)(?::[0-9]{0,5})?")


# Clients ask for few hosts, again and again; one that varies them costs a bounded cache, and a little time.
@lru_cache(maxsize=256)
def _is_host(value: bytes) -> bool:
    return _HOST.fullmatch(value) is not None


# What a head may consist of, beside line ends. Control bytes are refused, bytes from 0x80 on are opaque (RFC 9110,
# section 5.5).
_FIELD_BYTES: Final = bytes((0x09, *range(0x20, 0x7F), *range(0x80, 0x100)))
# The same for a search: a control byte, or a CR that is not followed by LF (only where the next byte is known).
_FORBIDDEN: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]")

# The headers that decide something here; all others are passed on unread.
_READ_HERE: Final = frozenset(
    (b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect")
)
_NO_VALUES: Final[Sequence[bytes]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderLimits:
    """What is beyond a limit is refused with the status that stands behind it, and the connection closed."""

    request_line_bytes_max: int = 16 * 1024  # 414
    head_bytes_max: int = 64 * 1024  # request line, headers and the empty line; 431
    headers_max: int = 128  # 431; the same for the count of trailers
    chunk_line_bytes_max: int = 256  # size and extensions of one chunk; 400
    chunk_extensions_bytes_max: int = 16 * 1024  # of one request; 400
    trailer_bytes_max: int = 8 * 1024  # 431


class RequestStart(NamedTuple):
    head: RequestHead
    body_bytes: int | None  # 0: there is none, and no BodyPiece comes; None: chunked
    keep_alive: bool  # the client is willing to send another request
    expects_continue: bool  # RFC 9110 section 10.1.1: it waits for a 100 before it sends the body
    wants_upgrade: bool  # there is an Upgrade header; whether it counts is not decided here


@quick
class _Part(IntEnum):
    """What the next byte belongs to."""

    HEAD = 0
    LENGTH_BODY = 1
    CHUNKED_BODY = 2


class RequestReader:
    """Reads the requests of one client connection. After BadRequest every further call raises it again."""

    __slots__ = (
        "_blank_lines",
        "_chunks",
        "_data",
        "_failure",
        "_limits",
        "_line_count",
        "_line_start",
        "_part",
        "_position",
        "_remaining_bytes",
        "_scanned",
    )

    def __init__(self, limits: ReaderLimits) -> None:
        self._limits = limits
        # What was fed and not read yet begins at _position of _data. Replaced, never changed, so that a body that
        # comes in pieces of one read each is not copied. Bounded by the caller, who stops reading its socket.
        self._data = b""
        self._position = 0
        self._part = _Part.HEAD
        self._failure: BadRequest | None = None
        # Of a head that is not complete; offsets from _position. They make a head that comes byte by byte linear.
        self._blank_lines = 0
        self._line_start = 0
        self._line_count = 0
        self._scanned = 0
        # Of a body.
        self._remaining_bytes = 0  # of LENGTH_BODY
        self._chunks: ChunkedBody | None = None  # of CHUNKED_BODY

    def __repr__(self) -> str:
        return (
            f"<RequestReader {self._part.name} buffered={self.buffered_bytes} remaining={self._remaining_bytes}"
            f"{f' failed={self._failure}' if self._failure is not None else ''}>"
        )

    @property
    def buffered_bytes(self) -> int:
        """Bytes that were fed and not read."""
        return len(self._data) - self._position

    @property
    def is_idle(self) -> bool:
        """True between two requests, with nothing of the next one here."""
        return self._part is _Part.HEAD and self._position == len(self._data)

    @property
    def body_is_complete(self) -> bool:
        """True when everything of the request that started last has been returned."""
        return self._part is _Part.HEAD

    @property
    def is_behind(self) -> bool:
        """True when the last event was enough work for one turn of the loop: ask for the next one in another."""
        return self._chunks is not None and self._chunks.is_behind

    @property
    def body_bytes_missing(self) -> int:
        """How much the client has to send at least until the body is complete."""
        if self._part is _Part.HEAD:
            return 0
        if self._part is _Part.LENGTH_BODY:
            return max(0, self._remaining_bytes - self.buffered_bytes)
        # Its end may be in what is not read yet.
        return 0 if self._data.find(b"\r\n\r\n", self._position) >= 0 else 1

    def feed(self, data: bytes) -> None:
        """Add what the client sent."""
        if self._position == len(self._data):
            self._data = data
        else:
            self._data = self._data[self._position :] + data
        self._position = 0

    def take_rest(self) -> bytes:
        """Return what was fed and not read: after an upgrade it belongs to another protocol."""
        rest = self._data[self._position :]
        self._data = b""
        self._position = 0
        return rest

    def next_event(self) -> RequestStart | BodyPiece | None:
        """Return the next event, or None if more bytes are needed. Raises BadRequest."""
        if self._failure is not None:
            raise self._failure
        if self._position == len(self._data):
            return None
        try:
            if self._part is _Part.HEAD:
                return self._read_head()
            if self._part is _Part.LENGTH_BODY:
                return self._read_length_body()
            return self._read_chunked_body()
        except BadRequest as failure:
            self._failure = failure
            raise

    # Heads

    def _read_head(self) -> RequestStart | None:
        data = self._data
        while data.startswith(b"\r\n", self._position):
            self._position += 2
            self._scanned = 0
            self._blank_lines += 1
            if self._blank_lines > _BLANK_LINES_MAX:
                raise BadRequest(400, "too many empty lines before a request")
        start = self._position
        end = data.find(b"\r\n\r\n", start + max(0, self._scanned - 3)) + 4
        if end < 4:
            self._check_lines(data[start:])
            return None
        head = data[start:end] if start or end < len(data) else data
        limits = self._limits
        line_end = head.find(b"\r\n")
        line = _REQUEST_LINE.fullmatch(head, 0, line_end)
        line_count = head.count(b"\r\n")
        # A few passes in C over a head that is good; only one that is not is looked at line by line.
        if (
            line is None
            or line_end > limits.request_line_bytes_max
            or len(head) > limits.head_bytes_max
            or line_count - 2 > limits.headers_max
            or len(head.translate(None, _FIELD_BYTES)) != 2 * line_count  # CR and LF in pairs, and nothing forbidden
            or b"\n " in head
            or b"\n\t" in head
        ):
            self._check_lines(head)
            raise BadRequest(400, "malformed head")
        event = self._build_start(head, line, line_count - 2)
        self._position = end
        self._blank_lines = self._line_start = self._line_count = self._scanned = 0
        return event

    def _check_lines(self, text: bytes) -> None:
        """Look for the first fault in ``text``, a head or its beginning, behind what was looked at before.

        Raises the fault whose decisive byte stands first, so the answer does not depend on how the bytes were split.
        """
        limits = self._limits
        while True:
            start = self._line_start
            line_feed = text.find(b"\n", max(start, self._scanned))
            stop = line_feed if line_feed >= 0 else len(text)
            faults: list[tuple[int, int, str]] = []  # index of the decisive byte, status, reason
            forbidden = _FORBIDDEN.search(text, max(start, self._scanned - 1), stop)
            if forbidden is not None:
                faults.append((forbidden.end() - 1, 400, "control character in the head"))
            if line_feed >= 0 and (line_feed == start or text[line_feed - 1] != 0x0D):
                faults.append((line_feed, 400, "line ends without CR"))
            if (stop if line_feed < 0 else line_feed + 1) > limits.head_bytes_max:
                faults.append((limits.head_bytes_max, 431, "head is too large"))
            if self._line_count == 0:
                over = start + limits.request_line_bytes_max + 1
                if stop > over:
                    faults.append((over, 414, "request line is too long"))
                elif line_feed >= 0 and not _REQUEST_LINE.fullmatch(text, start, max(start, line_feed - 1)):
                    faults.append((line_feed, 400, "malformed request line"))
            elif stop > start:
                if text[start] in b" \t":
                    faults.append((start, 400, "folded header line"))  # RFC 9112 section 5.2
                if self._line_count > limits.headers_max and text[start] != 0x0D:
                    faults.append((start, 431, "too many headers"))
            if faults:
                _, status, reason = min(faults, key=lambda fault: fault[0])
                raise BadRequest(status, reason)
            if line_feed < 0:
                self._scanned = len(text)
                break
            self._line_start = self._scanned = line_feed + 1
            self._line_count += 1
            if self._line_start == len(text):
                break

    def _build_start(self, head: bytes, line: re.Match[bytes], header_count: int) -> RequestStart:
        """Apply the rules that need the whole head. Raises BadRequest."""
        method, target, version = line.groups()
        if version != b"1.1" and version != b"1.0":
            raise BadRequest(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
        if method == b"CONNECT":
            raise BadRequest(501, "CONNECT is for proxies")
        fields = _HEAD_PARSER
        try:
            fields.parse(head)
        except httptools.HttpParserUpgrade:
            pass  # llhttp stops behind the head of any upgrade; we decide later whether it is one
        except httptools.HttpParserInvalidMethodError as error:
            raise BadRequest(501, "unknown method") from error
        except httptools.HttpParserError as error:
            raise BadRequest(400, "malformed head") from error
        headers = fields.headers
        if len(headers) != header_count:
            raise BadRequest(400, "malformed head")
        read = fields.read.get
        is_modern = version == b"1.1"

        hosts = read(b"host", _NO_VALUES)
        # RFC 9112 section 3.2
        if len(hosts) != 1 and (is_modern or hosts):
            raise BadRequest(400, "Host is missing" if not hosts else "Host is given more than once")
        if hosts and not _is_host(hosts[0]):
            raise BadRequest(400, "malformed Host")
        raw_path, query = self._read_target(method, target, headers)

        keep_alive = is_modern
        if b"connection" in fields.read:
            tokens = _tokens(read(b"connection", _NO_VALUES))
            keep_alive = b"close" not in tokens and (is_modern or b"keep-alive" in tokens)
        body_bytes: int | None = 0
        if b"content-length" in fields.read or b"transfer-encoding" in fields.read:
            body_bytes = self._read_framing(
                read(b"content-length", _NO_VALUES), read(b"transfer-encoding", _NO_VALUES), is_modern=is_modern
            )
        expects_continue = False
        expectations = read(b"expect", _NO_VALUES)
        if expectations and is_modern:  # a server must ignore it in HTTP/1.0
            if len(expectations) > 1 or expectations[0].lower() != b"100-continue":
                raise BadRequest(417, "unknown expectation")
            expects_continue = body_bytes != 0
        if body_bytes is None:
            self._part = _Part.CHUNKED_BODY
            self._chunks = ChunkedBody(self._limits)
        elif body_bytes:
            self._part = _Part.LENGTH_BODY
            self._remaining_bytes = body_bytes
        return RequestStart(
            RequestHead(
                method=method.decode(),
                raw_path=raw_path,
                query_string=query,
                http_version="1.1" if is_modern else "1.0",
                headers=headers,
            ),
            body_bytes,
            keep_alive,
            expects_continue,
            b"upgrade" in fields.read,
        )

    def _read_target(self, method: bytes, target: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
        """Return path and query; the host of an absolute target replaces Host (RFC 9112 section 3.2.2)."""
        if target.startswith(b"/"):
            path, _, query = target.partition(b"?")
            return path, query
        if target == b"*" and method == b"OPTIONS":
            return target, b""
        absolute = _ABSOLUTE.fullmatch(target)
        # RFC 9110 section 4.2.1: an http URI has a host; 4.2.4: a user name in it is treated as an error, which the
        # pattern of a host does by not knowing "@".
        if absolute is None or absolute[1][:1] in (b"", b":") or not _HOST.fullmatch(absolute[1]):
            raise BadRequest(400, "malformed request target")
        host = (b"host", absolute[1])
        for index, (name, _) in enumerate(headers):
            if name == b"host":
                headers[index] = host
                break
        else:
            headers.insert(0, host)
        path, query = absolute[2], absolute[3] or b""
        if not path:
            # RFC 9112 section 3.2.4: this is how "*" looks to the last proxy.
            path = b"*" if method == b"OPTIONS" and absolute[3] is None else b"/"
        return path, query

    @staticmethod
    def _read_framing(lengths: Sequence[bytes], codings: Sequence[bytes], *, is_modern: bool) -> int | None:
        """Return the length of the body; None for chunks. RFC 9112 section 6.3, without any of its leniencies."""
        if codings:
            if lengths:
                raise BadRequest(400, "both Content-Length and Transfer-Encoding")
            if not is_modern:
                raise BadRequest(400, "Transfer-Encoding in HTTP/1.0")
            names = [name.strip(b" \t").lower() for value in codings for name in value.split(b",")]
            if names[-1] != b"chunked" or b"chunked" in names[:-1]:
                raise BadRequest(400, "the last transfer coding is not chunked, or it is not the only chunked")
            if len(names) > 1:
                raise BadRequest(501, "unknown transfer coding")
            return None
        if not lengths:
            return 0
        if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > _LENGTH_DIGITS_MAX:
            raise BadRequest(400, "malformed Content-Length")
        return int(lengths[0])

    # Bodies

    def _read_length_body(self) -> BodyPiece | None:
        data, start = self._data, self._position
        size = min(len(data) - start, self._remaining_bytes, PIECE_BYTES_MAX)
        if size == 0:
            return None
        self._position = start + size
        self._remaining_bytes -= size
        if self._remaining_bytes == 0:
            self._part = _Part.HEAD
        # Slicing the whole of bytes copies nothing.
        return BodyPiece(data[start : start + size], self._remaining_bytes == 0)

    def _read_chunked_body(self) -> BodyPiece | None:
        assert self._chunks is not None
        piece, self._position = self._chunks.read(self._data, self._position)
        if piece is not None and piece.is_last:
            self._chunks = None
            self._part = _Part.HEAD
        return piece


class _HeadParser:
    """Has llhttp read whole heads, one after the other, whichever clients they come from, and collects what it finds.

    A parser goes on to the next head only if it said itself that the one before was a whole message, and nothing in
    it the last one; for any other end the next head gets a new parser, which costs 2 us more.
    """

    __slots__ = ("_goes_on", "_parser", "headers", "read")

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []  # of the last head
        self.read: dict[bytes, list[bytes]] = {}  # values of the names in _READ_HERE
        self._goes_on = False  # the parser may read another head
        self._parser: httptools.HttpRequestParser | None = None

    def parse(self, head: bytes) -> None:
        """Raises httptools' errors."""
        if not self._goes_on or self._parser is None:
            self._parser = httptools.HttpRequestParser(self)
        self.headers = []
        self.read = {}
        self._goes_on = False
        self._parser.feed_data(head)

    # Called by httptools

    def on_message_complete(self) -> None:
        assert self._parser is not None
        self._goes_on = self._parser.should_keep_alive()

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        value = value.strip(b" \t")  # llhttp removes leading blanks only
        self.headers.append((name, value))
        if name in _READ_HERE:
            self.read.setdefault(name, []).append(value)


_HEAD_PARSER: Final = _HeadParser()


def _tokens(values: Sequence[bytes]) -> list[bytes]:
    """Members of a list header over all its lines, in lower case."""
    if not values:
        return []
    return [token.strip(b" \t") for value in values for token in value.lower().split(b",")]
