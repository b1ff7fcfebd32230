"""Every input whole, byte by byte, with trailing bytes, and cut anywhere: the same bytes give the same events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from interface_server.protocol.chunked_body import PIECE_BYTES_MAX, TURN_CHUNKS_MAX, BodyPiece
from interface_server.protocol.errors import BadRequest
from interface_server.protocol.request import RequestHead
from interface_server.protocol.request_reader import ReaderLimits, RequestReader, RequestStart

SMALL = ReaderLimits(
    request_line_bytes_max=64,
    head_bytes_max=200,
    headers_max=4,
    chunk_line_bytes_max=16,
    chunk_extensions_bytes_max=24,
    trailer_bytes_max=40,
)
DEFAULT = ReaderLimits()


def read(feeds: Iterable[bytes], limits: ReaderLimits = DEFAULT) -> list[Any]:
    """All events of a connection: RequestStart, ("body", bytes, is it complete), ("refused", status, reason)."""
    reader = RequestReader(limits)
    events: list[Any] = []
    for data in feeds:
        reader.feed(data)
        try:
            while (event := reader.next_event()) is not None:
                if isinstance(event, RequestStart):
                    events.append(event)
                elif events and events[-1][0] == "body" and not events[-1][2]:
                    events[-1] = ("body", events[-1][1] + event.data, event.is_last)
                else:
                    events.append(("body", event.data, event.is_last))
        except BadRequest as failure:
            events.append(("refused", failure.status, failure.reason))
            break
    return events


def each_byte(data: bytes) -> list[bytes]:
    return [data[index : index + 1] for index in range(len(data))]


def read_every_way(data: bytes, limits: ReaderLimits = DEFAULT) -> list[Any]:
    whole = read([data], limits)
    assert read(each_byte(data), limits) == whole
    middle = len(data) // 2
    assert read([data[:middle], data[middle:]], limits) == whole
    return whole


def request(line: bytes = b"GET / HTTP/1.1", *headers: bytes, host: bytes | None = b"example.org") -> bytes:
    lines = [line, *([] if host is None else [b"Host: " + host]), *headers, b"", b""]
    return b"\r\n".join(lines)


def start_of(data: bytes) -> RequestStart:
    event = read_every_way(data)[0]
    assert isinstance(event, RequestStart), event
    return event


def status_of(data: bytes, limits: ReaderLimits = DEFAULT) -> int:
    event = read_every_way(data, limits)[-1]
    assert event[0] == "refused", event
    assert isinstance(event[1], int)
    return event[1]


# What is understood


def test_a_plain_request() -> None:
    data = request(b"GET /a%20b/?x=1&y=%3f?z HTTP/1.1", b"X-Two: 1", b"Accept:\t*/*  \t", b"x-TWO:2", b"Empty:")
    assert read_every_way(data) == [
        RequestStart(
            RequestHead(
                method="GET",
                raw_path=b"/a%20b/",
                query_string=b"x=1&y=%3f?z",
                http_version="1.1",
                headers=[
                    (b"host", b"example.org"),
                    (b"x-two", b"1"),
                    (b"accept", b"*/*"),
                    (b"x-two", b"2"),
                    (b"empty", b""),
                ],
            ),
            body_bytes=0,
            keep_alive=True,
            expects_continue=False,
            wants_upgrade=False,
        )
    ]


def test_names_with_an_underscore_and_opaque_bytes_in_values_are_kept() -> None:
    headers = start_of(request(b"GET / HTTP/1.1", b"X_Y: 1", b"X-Y: 2", b"Bytes: \x80\x85\xff")).head.headers
    assert headers[1:] == [(b"x_y", b"1"), (b"x-y", b"2"), (b"bytes", b"\x80\x85\xff")]


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND", "QUERY"]
)
def test_methods(method: str) -> None:
    assert start_of(request(method.encode() + b" / HTTP/1.1")).head.method == method


@pytest.mark.parametrize(
    ("line", "path", "query", "host"),
    [
        (b"GET //double HTTP/1.1", b"//double", b"", b"example.org"),
        (b"GET /? HTTP/1.1", b"/", b"", b"example.org"),
        (b'GET /|{}^"<>\\`? HTTP/1.1', b'/|{}^"<>\\`', b"", b"example.org"),
        (b"GET /http://other/ HTTP/1.1", b"/http://other/", b"", b"example.org"),
        (b"OPTIONS * HTTP/1.1", b"*", b"", b"example.org"),
        (b"GET http://other/p?q HTTP/1.1", b"/p", b"q", b"other"),
        (b"GET HTTPS://Other:8443/p HTTP/1.1", b"/p", b"", b"Other:8443"),
        (b"GET http://[::1]:80?q HTTP/1.1", b"/", b"q", b"[::1]:80"),
        (b"GET http://other HTTP/1.1", b"/", b"", b"other"),
        (b"OPTIONS http://other HTTP/1.1", b"*", b"", b"other"),
        (b"OPTIONS http://other/ HTTP/1.1", b"/", b"", b"other"),
        (b"OPTIONS http://other?q HTTP/1.1", b"/", b"q", b"other"),
    ],
)
def test_forms_of_the_target(line: bytes, path: bytes, query: bytes, host: bytes) -> None:
    head = start_of(request(line)).head
    assert (head.raw_path, head.query_string) == (path, query)
    assert [value for name, value in head.headers if name == b"host"] == [host]


def test_an_absolute_target_gives_a_host_to_http_1_0() -> None:
    head = start_of(request(b"GET http://other/ HTTP/1.0", b"A: b", host=None)).head
    assert head.headers == [(b"host", b"other"), (b"a", b"b")]


@pytest.mark.parametrize(
    "host",
    [b"", b"a", b"a:80", b"a:", b"1.2.3.4:65535", b"[::1]", b"[fe80::1]:8000", b"a-b_c.d~", b"%41", b"a;b=c", b":80"],
)
def test_hosts(host: bytes) -> None:
    assert start_of(request(host=host)).head.headers == [(b"host", host)]


@pytest.mark.parametrize(
    ("version", "connection", "keeps"),
    [
        (b"1.1", None, True),
        (b"1.1", b"close", False),
        (b"1.1", b"Foo, CLOSE", False),
        (b"1.1", b"keep-alive, close", False),
        (b"1.1", b"upgrade", True),
        (b"1.1", b"closed", True),
        (b"1.0", None, False),
        (b"1.0", b"Keep-Alive", True),
        (b"1.0", b"keep-alive, close", False),
    ],
)
def test_keep_alive(version: bytes, connection: bytes | None, keeps: bool) -> None:
    headers = [] if connection is None else [b"Connection: " + connection]
    assert start_of(request(b"GET / HTTP/" + version, *headers)).keep_alive is keeps


def test_connection_may_come_in_several_lines() -> None:
    assert not start_of(request(b"GET / HTTP/1.1", b"Connection: foo", b"Connection: close")).keep_alive


@pytest.mark.parametrize(
    ("line", "headers", "expects"),
    [
        (b"POST / HTTP/1.1", [b"Expect: 100-Continue", b"Content-Length: 3"], True),
        (b"POST / HTTP/1.1", [b"Expect: 100-continue", b"Transfer-Encoding: chunked"], True),
        (b"POST / HTTP/1.1", [b"Expect: 100-continue", b"Content-Length: 0"], False),
        (b"GET / HTTP/1.1", [b"Expect: 100-continue"], False),
        (b"POST / HTTP/1.0", [b"Expect: 100-continue", b"Content-Length: 3"], False),
        (b"POST / HTTP/1.0", [b"Expect: anything", b"Content-Length: 3"], False),
    ],
)
def test_expectations(line: bytes, headers: list[bytes], expects: bool) -> None:
    assert start_of(request(line, *headers)).expects_continue is expects


def test_an_upgrade_is_reported_and_its_body_is_read() -> None:
    data = request(b"POST / HTTP/1.1", b"Upgrade: h2c", b"Connection: upgrade", b"Content-Length: 2") + b"ab"
    start, body = read_every_way(data)
    assert start.wants_upgrade
    assert body == ("body", b"ab", True)


def test_empty_lines_before_a_request_are_ignored() -> None:
    assert start_of(b"\r\n\r\n" + request()).head.method == "GET"
    assert status_of(b"\r\n" * 5 + request()) == 400


# Bodies


def test_a_body_of_a_given_length_and_the_request_behind_it() -> None:
    first, body, second = read_every_way(request(b"POST /1 HTTP/1.1", b"Content-Length: 5") + b"hello" + request())
    assert (first.body_bytes, first.head.raw_path) == (5, b"/1")
    assert body == ("body", b"hello", True)
    assert second.head.raw_path == b"/"


@pytest.mark.parametrize(
    ("wire", "body"),
    [
        (b"0\r\n\r\n", b""),
        (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
        (b"1\r\nh\r\n0004\r\nello\r\n00\r\n\r\n", b"hello"),
        (b'A;a=b;c="d"\r\n0123456789\r\n0;x\r\n\r\n', b"0123456789"),
        (b"2 \t;x\r\n\r\n\r\n0\r\nTrailer: 1\r\nContent-Length: 7\r\nEmpty:\r\n\r\n", b"\r\n"),
    ],
)
def test_chunked_bodies_and_the_request_behind_them(wire: bytes, body: bytes) -> None:
    data = request(b"POST /1 HTTP/1.1", b"transfer-encoding: Chunked") + wire + request(b"GET /2 HTTP/1.1")
    first, piece, second = read_every_way(data)
    assert first.body_bytes is None
    assert piece == ("body", body, True)
    assert second.head.raw_path == b"/2"
    assert (b"content-length", b"7") not in second.head.headers


@pytest.mark.parametrize("coding", [b"Content-Length: 200000", b"Transfer-Encoding: chunked"])
def test_a_piece_is_never_larger_than_its_limit(coding: bytes) -> None:
    body = bytes(range(250)) * 800
    wire = body if coding.startswith(b"Content") else b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    reader = RequestReader(DEFAULT)
    reader.feed(request(b"POST / HTTP/1.1", coding) + wire)
    reader.next_event()
    pieces: list[BodyPiece] = []
    while not reader.body_is_complete:
        piece = reader.next_event()
        assert isinstance(piece, BodyPiece)
        pieces.append(piece)
    assert b"".join(piece.data for piece in pieces) == body
    assert max(len(piece.data) for piece in pieces) == PIECE_BYTES_MAX
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_small_chunks_become_one_piece() -> None:
    reader = RequestReader(DEFAULT)
    reader.feed(request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked") + b"1\r\nx\r\n" * 200)
    reader.next_event()
    assert reader.next_event() == BodyPiece(b"x" * 200, False)
    assert not reader.is_behind
    assert reader.next_event() is None


@pytest.mark.parametrize("chunk", [b"1\r\nx\r\n", b"1;a\r\nx\r\n", b"0000001\r\nx\r\n", b"1\r\nx\r\n001\r\nx\r\n"])
def test_a_read_full_of_small_chunks_is_many_turns(chunk: bytes) -> None:
    """64 KiB hold 10,922 chunks of a byte; nobody else is served while they are read."""
    reader = RequestReader(replace(DEFAULT, chunk_extensions_bytes_max=10**6))
    count = 65536 // len(chunk)
    reader.feed(request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked") + chunk * count + b"0\r\n\r\n")
    reader.next_event()
    body = b""
    while not reader.body_is_complete:
        assert reader.body_bytes_missing == 0
        piece = reader.next_event()
        assert isinstance(piece, BodyPiece)
        assert len(piece.data) == TURN_CHUNKS_MAX or piece.is_last
        assert reader.is_behind is not piece.is_last
        body += piece.data
    assert body == b"x" * (count * chunk.count(b"x"))


def test_a_piece_of_one_read_is_not_copied() -> None:
    reader = RequestReader(DEFAULT)
    reader.feed(request(b"POST / HTTP/1.1", b"Content-Length: 20000"))
    reader.next_event()
    data = bytes(20000)
    reader.feed(data)
    piece = reader.next_event()
    assert isinstance(piece, BodyPiece)
    assert piece.data is data


def test_what_is_missing_of_a_body_is_known() -> None:
    reader = RequestReader(DEFAULT)
    reader.feed(request(b"POST / HTTP/1.1", b"Content-Length: 10") + b"abc")
    assert (reader.body_is_complete, reader.body_bytes_missing) == (True, 0)
    reader.next_event()
    assert (reader.body_is_complete, reader.body_bytes_missing, reader.buffered_bytes) == (False, 7, 3)
    reader.next_event()
    assert (reader.body_bytes_missing, reader.buffered_bytes) == (7, 0)
    reader = RequestReader(DEFAULT)
    reader.feed(request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked"))
    reader.next_event()
    assert reader.body_bytes_missing == 1


def test_the_next_request_is_not_looked_at_before_it_is_asked_for() -> None:
    """A bad second request must not cost the first its answer."""
    reader = RequestReader(DEFAULT)
    reader.feed(request() + b"\x00 rubbish\r\n\r\n")
    assert isinstance(reader.next_event(), RequestStart)
    assert reader.body_is_complete
    with pytest.raises(BadRequest):
        reader.next_event()
    with pytest.raises(BadRequest):
        reader.next_event()


def test_bytes_behind_an_upgrade_are_handed_over_untouched() -> None:
    reader = RequestReader(DEFAULT)
    reader.feed(request() + b"\x81\x80rest")
    reader.next_event()
    assert reader.take_rest() == b"\x81\x80rest"
    assert reader.buffered_bytes == 0


def test_the_state_can_be_seen() -> None:
    reader = RequestReader(DEFAULT)
    reader.feed(b"GET")
    assert repr(reader) == "<RequestReader HEAD buffered=3 remaining=0>"
    reader.feed(b"\0")
    with pytest.raises(BadRequest) as caught:
        reader.next_event()
    assert str(caught.value) in repr(reader)


# What is refused

CHUNKED = request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked")

REFUSED: list[tuple[str, int, bytes]] = [
    ("no host", 400, request(host=None)),
    ("no host with an absolute target", 400, request(b"GET http://a/ HTTP/1.1", host=None)),
    ("two hosts", 400, request(b"GET / HTTP/1.1", b"Host: example.org")),
    ("two hosts in 1.0", 400, request(b"GET / HTTP/1.0", b"Host: example.org")),
    *(
        ("host " + repr(host), 400, request(host=host))
        for host in (
            b"a b",
            b"a/b",
            b"u@a",
            b"a:x",
            b"a:123456",
            b"[::1",
            b"a,b\\",
            b"%4",
            b"a?b",
            b"a#",
            b"\xe4",
            b"[::1]x",
        )
    ),
    ("malformed host in 1.0", 400, request(b"GET / HTTP/1.0", host=b"a/b")),
    # Request line
    *(
        (repr(line), 400, request(line))
        for line in (
            b"GET /",
            b"GET  / HTTP/1.1",
            b"GET / HTTP/1.1 ",
            b" GET / HTTP/1.1",
            b"GET /a b HTTP/1.1",
            b"GET\t/ HTTP/1.1",
            b"GET / http/1.1",
            b"GET / HTTP/1",
            b"GET / HTTP/11",
            b"GET / HTTP/1.1.1",
            b"GET HTTP/1.1",
            b"G(T / HTTP/1.1",
            b"GET /\xc3\xa4 HTTP/1.1",
            b"GET /a#b HTTP/1.1",
            b"GET a HTTP/1.1",
            b"GET * HTTP/1.1",
            b"GET example.org:80 HTTP/1.1",
            b"GET ftp://example.org/ HTTP/1.1",
            b"GET http:///p HTTP/1.1",
            b"GET http://:80/ HTTP/1.1",
            b"GET http://u@example.org/ HTTP/1.1",
            b"GET http://a:b/ HTTP/1.1",
            b"",
        )
    ),
    ("http 2 preface", 505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    *((repr(version), 505, request(b"GET / HTTP/" + version)) for version in (b"0.9", b"1.2", b"2.0", b"3.1")),
    *((repr(method), 501, request(method + b" / HTTP/1.1")) for method in (b"FOO", b"get", b"GETT", b"Post")),
    ("connect", 501, b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n"),
    ("tls", 400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    # Lines
    ("bare LF behind the request line", 400, b"GET / HTTP/1.1\nHost: a\r\n\r\n"),
    ("bare LF behind a header", 400, b"GET / HTTP/1.1\r\nHost: a\nA: b\r\n\r\n"),
    ("bare LF only", 400, b"GET / HTTP/1.1\nHost: a\n\n"),
    ("bare LF as the empty line", 400, b"GET / HTTP/1.1\r\nHost: a\r\n\n"),
    ("bare LF before a request", 400, b"\n" + request()),
    ("bare CR in a value", 400, request(b"GET / HTTP/1.1", b"A: b\rc")),
    ("bare CR before CRLF", 400, request(b"GET / HTTP/1.1", b"A: b\r")),
    ("bare CR in the request line", 400, request(b"GET /\r HTTP/1.1")),
    ("bare CR as line end", 400, b"GET / HTTP/1.1\rHost: a\r\r"),
    ("folded by a blank", 400, request(b"GET / HTTP/1.1", b"A: b", b" c")),
    ("folded by a tab", 400, request(b"GET / HTTP/1.1", b"A: b", b"\tc")),
    ("folded first header", 400, b"GET / HTTP/1.1\r\n Host: a\r\n\r\n"),
    ("folded empty line", 400, b"GET / HTTP/1.1\r\nHost: a\r\n \r\n\r\n"),
    ("blank before the colon", 400, request(b"GET / HTTP/1.1", b"A : b")),
    ("tab before the colon", 400, request(b"GET / HTTP/1.1", b"A\t: b")),
    ("no colon", 400, request(b"GET / HTTP/1.1", b"A")),
    ("no name", 400, request(b"GET / HTTP/1.1", b": b")),
    *(
        (f"control {byte:02x} in a value", 400, request(b"GET / HTTP/1.1", b"A: b%cc" % byte))
        for byte in (*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F)
    ),
    *(
        (f"byte {byte:02x} in a name", 400, request(b"GET / HTTP/1.1", b"A%cA: b" % byte))
        for byte in range(256)
        if not (chr(byte).isascii() and chr(byte).isalnum()) and byte not in b"!#$%&'*+-.^_`|~:\r\n"
    ),
    # Framing
    ("length and coding", 400, request(b"POST / HTTP/1.1", b"Content-Length: 5", b"Transfer-Encoding: chunked")),
    ("coding and length", 400, request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked", b"Content-Length: 5")),
    ("coding in 1.0", 400, request(b"POST / HTTP/1.0", b"Transfer-Encoding: chunked")),
    ("two lengths", 400, request(b"POST / HTTP/1.1", b"Content-Length: 5", b"Content-Length: 6")),
    ("two equal lengths", 400, request(b"POST / HTTP/1.1", b"Content-Length: 5", b"Content-Length: 5")),
    *(
        ("length " + repr(value), 400, request(b"POST / HTTP/1.1", b"Content-Length: " + value))
        for value in (
            b"",
            b"-1",
            b"+1",
            b"0x5",
            b"5, 5",
            b"5,5",
            b"1 2",
            b"1_0",
            b"\xb2",
            b"5.0",
            b"9" * 19,
            b"9" * 40,
        )
    ),
    *(
        ("coding " + repr(value), status, request(b"POST / HTTP/1.1", b"Transfer-Encoding: " + value))
        for status, value in (
            (400, b""),
            (400, b"foo"),
            (400, b"identity"),
            (400, b"xchunked"),
            (400, b"chunked, gzip"),
            (400, b"chunked, chunked"),
            (400, b"chunked;a=b"),
            (400, b"chunked,"),
            (400, b'"chunked"'),
            (400, b"\x85chunked"),
            (501, b"gzip, chunked"),
            (501, b"identity, chunked"),
        )
    ),
    (
        "coding twice",
        400,
        request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    ),
    (
        "coding in two lines",
        501,
        request(b"POST / HTTP/1.1", b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked"),
    ),
    (
        "coding behind chunked",
        400,
        request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked", b"Transfer-Encoding: x"),
    ),
    ("expectation", 417, request(b"POST / HTTP/1.1", b"Expect: 200-ok", b"Content-Length: 5")),
    ("two expectations", 417, request(b"POST / HTTP/1.1", b"Expect: 100-continue", b"Expect: 100-continue")),
    # Chunks
    *(
        ("chunk " + repr(wire), 400, CHUNKED + wire)
        for wire in (
            b"\r\n",
            b"g\r\n",
            b"-1\r\nx",
            b"+1\r\nx",
            b"0x1\r\nx",
            b" 1\r\nx",
            b"1 \r\nx",
            b"1\t\r\nx",
            b"1_0\r\nx",
            b"1\nx\r\n0\r\n\r\n",
            b"1\r\nxy\r\n",
            b"1\r\nx\n0\r\n\r\n",
            b"1\r\nx\r0\r\n\r\n",
            b"1\r\nx0\r\n\r\n",
            b"1;a\nb\r\nx\r\n",
            b"1;a\rb\r\nx\r\n",
            b"1;a\0b\r\nx\r\n",
            b"1 a\r\nx\r\n",
            b"1:a\r\nx\r\n",
            b"f" * 16 + b"\r\n",
            b"0" * 16 + b"\r\n\r\n",
            b"\xb2\r\nxx\r\n",
            b"0\r\nA : b\r\n\r\n",
            b"0\r\n A: b\r\n\r\n",
            b"0\r\nA: b\n\r\n\r\n",
            b"0\r\nA: b\r\n c\r\n\r\n",
            b"0\r\nA: \0\r\n\r\n",
            b"0\r\nA\r\n\r\n",
        )
    ),
]


@pytest.mark.parametrize(("status", "data"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused(status: int, data: bytes) -> None:
    assert status_of(data) == status
    # What follows changes nothing (it is a head of its own, or more of the same body).
    assert status_of(data + request()) == status


def test_data_before_a_broken_chunk_are_delivered_first() -> None:
    assert read_every_way(CHUNKED + b"3\r\nabc\r\nzz\r\n")[1:] == [
        ("body", b"abc", False),
        ("refused", 400, "malformed chunk size"),
    ]


# Limits. Each stands in front of a request that just keeps it.


def test_length_of_the_request_line() -> None:
    def line(length: int) -> bytes:
        return b"GET /" + b"a" * (length - 14) + b" HTTP/1.1"

    assert len(line(64)) == 64
    assert isinstance(read_every_way(request(line(64)), SMALL)[0], RequestStart)
    assert status_of(request(line(65)), SMALL) == 414
    assert status_of(b"a" * 66, SMALL) == 414  # no end in sight


def test_length_of_the_head() -> None:
    def head(length: int) -> bytes:
        return request(b"GET / HTTP/1.1", b"A: " + b"b" * (length - 42))

    assert len(head(200)) == 200
    assert isinstance(read_every_way(head(200), SMALL)[0], RequestStart)
    assert isinstance(read_every_way(head(200) + request(), SMALL)[1], RequestStart)
    for length in range(201, 206):
        assert status_of(head(length), SMALL) == 431
    assert status_of(b"GET / HTTP/1.1\r\nA: " + b"b" * 200, SMALL) == 431  # no end in sight


def test_count_of_headers() -> None:
    assert isinstance(read_every_way(request(b"GET / HTTP/1.1", *[b"A: b"] * 3), SMALL)[0], RequestStart)
    assert status_of(request(b"GET / HTTP/1.1", *[b"A: b"] * 4), SMALL) == 431


def test_length_of_a_chunk_line() -> None:
    assert read_every_way(CHUNKED + b"1;" + b"a" * 14 + b"\r\nx", SMALL)[1:] == [("body", b"x", False)]
    assert status_of(CHUNKED + b"1;" + b"a" * 15 + b"\r\nx", SMALL) == 400
    assert status_of(CHUNKED + b"1;" + b"a" * 30, SMALL) == 400  # no end in sight


def test_sum_of_chunk_extensions() -> None:
    assert read_every_way(CHUNKED + (b"1;" + b"a" * 11 + b"\r\nx\r\n") * 2, SMALL)[1:] == [("body", b"xx", False)]
    assert read_every_way(CHUNKED + (b"1;" + b"a" * 11 + b"\r\nx\r\n") * 2 + b"1;\r\nx\r\n", SMALL)[1:] == [
        ("body", b"xx", False),
        ("refused", 400, "too many chunk extensions"),
    ]


def test_size_of_trailers() -> None:
    assert read_every_way(CHUNKED + b"0\r\nA: " + b"b" * 35 + b"\r\n\r\n", SMALL)[1:] == [("body", b"", True)]
    for length in (36, 37, 38, 39, 60):
        assert status_of(CHUNKED + b"0\r\nA: " + b"b" * length + b"\r\n\r\n", SMALL) == 431
    assert status_of(CHUNKED + b"0\r\n" + b"A: bcdefg\r\n" * 4 + b"\r\n", SMALL) == 431
    assert status_of(CHUNKED + b"0\r\n" + b"a" * 43, SMALL) == 431  # no end in sight


def test_count_of_trailers() -> None:
    assert read_every_way(CHUNKED + b"0\r\n" + b"A:\r\n" * 4 + b"\r\n", SMALL)[1:] == [("body", b"", True)]
    assert status_of(CHUNKED + b"0\r\n" + b"A:\r\n" * 5 + b"\r\n", SMALL) == 431


def test_the_fault_that_stands_first_is_reported() -> None:
    """However the bytes are split; else a client could choose between two answers."""
    assert (
        read_every_way(b"GET / HTTP/1.1\r\nA: \0\r\n" + b"B: c\r\n" * 100, SMALL)[0][2]
        == "control character in the head"
    )
    assert read_every_way(b"rubbish\r\nA: \0\r\n\r\n", SMALL)[0][2] == "malformed request line"
    assert read_every_way(b"GET / HTTP/1.1\r\n folded\nA: \0\r\n\r\n", SMALL)[0][2] == "folded header line"


# Any bytes at all

PARTS = st.sampled_from(
    [
        request(),
        request(b"POST / HTTP/1.1", b"Content-Length: 4") + b"body",
        request(b"GET http://a/ HTTP/1.0", b"Connection: keep-alive"),
        CHUNKED + b"4\r\nbody\r\n0\r\n\r\n",
        CHUNKED + b"4;x=y\r\nbody\r\n2\r\nab\r\n0\r\nT: r\r\n\r\n",
        b"GET / HTTP/1.1\r\n",
        b"Host: a\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\n",
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b"\0",
        b":",
        b";",
        b"0",
        b"4",
        b"A",
        b"\x80",
        b"x" * 70,
        b"y" * 150,
    ]
)


@given(
    data=st.lists(PARTS | st.binary(max_size=4), max_size=12).map(b"".join),
    cuts=st.lists(st.integers(min_value=0, max_value=600), max_size=10),
    small=st.booleans(),
)
@example(data=b"GET / HTTP/1.1\r\n" + b"y" * 182 + b"\r\n\r\n", cuts=[], small=True)
@example(data=b"GET /" + b"x" * 50 + b" HTTP/1.1\rA\r\n\r\n", cuts=[], small=True)
@settings(max_examples=1500, deadline=None)
def test_events_do_not_depend_on_how_the_bytes_are_split(data: bytes, cuts: list[int], small: bool) -> None:
    limits = SMALL if small else DEFAULT
    whole = read([data], limits)
    assert read(each_byte(data), limits) == whole
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert read([data[start:end] for start, end in pairwise(edges)], limits) == whole


def test_a_head_that_comes_byte_by_byte_is_scanned_once() -> None:
    reader = RequestReader(DEFAULT)
    data = request(b"GET / HTTP/1.1", *[b"Header-%d: %s" % (index, b"v" * 600) for index in range(100)])
    assert len(data) > 60_000
    events = []
    for byte in each_byte(data):
        reader.feed(byte)
        events.append(reader.next_event())
    assert isinstance(events[-1], RequestStart)
    assert set(events[:-1]) == {None}


# What the next head is read with depends on how the one before it ended, on whichever connection.
ENDS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n",
    b"NONSENSE / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nBad Name: b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
]


def read_head(data: bytes) -> RequestStart | tuple[int, str] | None:
    reader = RequestReader(ReaderLimits())
    reader.feed(data)
    try:
        event = reader.next_event()
    except BadRequest as failure:
        return failure.status, failure.reason
    assert event is None or isinstance(event, RequestStart)
    return event


@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("second", ENDS)
def test_no_head_depends_on_the_one_before(first: bytes, second: bytes) -> None:
    read_head(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    alone = read_head(second)
    read_head(first)
    assert read_head(second) == alone
