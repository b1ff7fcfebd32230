"""Bytes of any kind on an HTTP/1.x socket: no exception, an answer or silence, and the same however they are cut."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interface_server.http1 import Phase
from tests.interface_server.test_http1 import World

# What requests are made of, good and bad, so that a walk through them gets somewhere.
LINES = [
    *(b"GET / HTTP/1.1", b"POST /p HTTP/1.1", b"HEAD / HTTP/1.0", b"OPTIONS * HTTP/1.1", b"GET http://a/b HTTP/1.1"),
    *(b"GET / HTTP/2.0", b"get / HTTP/1.1", b"GET  / HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"PRI * HTTP/2.0", b"GET /"),
    *(b"Host: a", b"Host: b", b"Host:", b"host : a", b"Connection: close", b"Connection: keep-alive, upgrade"),
    *(
        b"Content-Length: 5",
        b"Content-Length: 0",
        b"Content-Length: +5",
        b"Content-Length: 5, 5",
        b"Content-Length: 1e1",
    ),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: chunked, identity"),
    *(b"Transfer-Encoding : chunked", b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding: xchunked", b" folded"),
    *(b"Expect: 100-continue", b"Expect: wonders", b"X: \x00", b"X: \xff", b"X\x80: y", b": y", b"X", b"X: a\rb"),
    *(
        b"Upgrade: websocket",
        b"Upgrade: h2c",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==",
    ),
    *(b"", b"", b"", b"0", b"5", b"5;x=y", b"-1", b"0x5", b"fffffffffffffffff", b"5 ", b" 5", b"hello", b"SM"),
]
ENDS = [b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\r\n", b"\n\r\n"]
PIECES = st.one_of(
    st.tuples(st.sampled_from(LINES), st.sampled_from(ENDS)).map(b"".join),
    st.sampled_from(
        [
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n",
        ]
    ),
    st.binary(max_size=20),
)
STREAMS = st.lists(PIECES, min_size=1, max_size=12).map(b"".join)

BOUNDED = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


def serve(*pieces: bytes) -> tuple[bytes, list[Any], list[str], Phase]:
    """What clients and applications see of these bytes: each application answers when it has its whole request."""
    world = World()
    answered = 0
    for piece in pieces:
        world.feed(piece)
        while answered < len(world.connections.opened):
            connection = world.connections.opened[answered]
            if not connection.is_complete and connection.last_event is None:
                break
            answered += 1
            if connection.last_event is None:
                connection.respond(b"%d:" % answered + connection.body)
    sent = world.take()
    seen = [
        (opened.scope["method"], opened.scope["raw_path"], opened.scope["headers"], opened.body)
        for opened in world.connections.opened
        if opened.is_complete  # else a fault further down may have come in the same read: then nobody was asked
    ]
    upgraded = [[call for call in socket.calls if isinstance(call, bytes)] for socket in world.websockets.upgraded]
    calls, phase = list(world.calls), world.protocol.phase
    # Time and the end of the socket find it in any state.
    world.advance(200)
    world.lose()
    assert not world.factory.protocols
    return sent, [*seen, *(b"".join(calls) for calls in upgraded)], calls, phase


def cut(data: bytes, seed: int) -> list[bytes]:
    chance = random.Random(seed)
    at = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(1, 6)))
    return [data[start:stop] for start, stop in zip([0, *at], [*at, len(data)], strict=True) if start < stop]


@BOUNDED
@given(STREAMS, st.integers(0, 2**16))
def test_bytes_mean_the_same_however_they_are_cut(data: bytes, seed: int) -> None:
    whole = serve(data)
    assert serve(*(data[index : index + 1] for index in range(len(data)))) == whole
    assert serve(*cut(data, seed)) == whole


ASKED = serve(b"GET /asked HTTP/1.1\r\nHost: b\r\nX: own\r\n\r\n")


@BOUNDED
@given(STREAMS)
def test_nobody_hears_of_what_another_sent(data: bytes) -> None:
    """Parsers are shared: whatever state one client leaves them in, the next finds its own request."""
    World().feed(data)
    assert serve(b"GET /asked HTTP/1.1\r\nHost: b\r\nX: own\r\n\r\n") == ASKED


@BOUNDED
@given(STREAMS)
def test_what_is_answered_is_http(data: bytes) -> None:
    sent, seen, _, _ = serve(data)
    for line in sent.split(b"\r\n"):
        assert b"\n" not in line or line.startswith(b"malformed") or b":" in line or line.endswith(b"\n")
    if b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" not in data:
        assert sent == b"" or sent.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")) or seen
    for request in seen:
        if isinstance(request, tuple):
            for name, value in request[2]:
                assert not any(byte in name + value for byte in b"\r\n\0")


# Request smuggling: what two readers could frame differently is refused, and nothing behind it is read as a request.

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"
BEHIND = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
SMUGGLING = {
    "CL.TE": HEAD + b"Content-Length: 4\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "TE.CL": HEAD + CHUNKED + b"Content-Length: 4\r\n\r\n0\r\n\r\n",
    "two CLs": HEAD + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n",
    "two equal CLs": HEAD + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n",
    "list of CLs": HEAD + b"Content-Length: 0, 0\r\n\r\n",
    "CL with a sign": HEAD + b"Content-Length: +0\r\n\r\n",
    "CL negative": HEAD + b"Content-Length: -1\r\n\r\n",
    "CL hexadecimal": HEAD + b"Content-Length: 0x0\r\n\r\n",
    "CL with an underscore": HEAD + b"Content-Length: 1_0\r\n\r\n",
    "CL not ASCII": HEAD + "Content-Length: ０\r\n\r\n".encode(),
    "CL empty": HEAD + b"Content-Length:\r\n\r\n",
    "CL beyond all bounds": HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
    "two TEs": HEAD + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked is not last": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunked, then identity": HEAD + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "unknown coding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "vertical tab": HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "quoted coding": HEAD + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "space before colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "CL space before colon": HEAD + b"Content-Length : 0\r\n\r\n",
    "tab before colon": HEAD + b"Content-Length\t: 0\r\n\r\n",
    "obs-fold": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "obs-fold with a tab": HEAD + b"X: y\r\n\tTransfer-Encoding: chunked\r\n\r\n",
    "space before the first header": b"POST / HTTP/1.1\r\n Host: a\r\n\r\n",
    "bare LF": b"POST / HTTP/1.1\nHost: a\nContent-Length: 0\n\n",
    "bare LF in the head": HEAD + b"X: y\nContent-Length: 0\r\n\r\n",
    "bare CR": HEAD + b"X: y\rContent-Length: 0\r\n\r\n",
    "NUL in a value": HEAD + b"Content-Length: 0\x00\r\n\r\n",
    "NUL in a name": HEAD + b"Content\x00-Length: 0\r\n\r\n",
    "name without colon": HEAD + b"Content-Length\r\n\r\n",
    "empty name": HEAD + b": 0\r\n\r\n",
    "high byte in a name": HEAD + b"Transfer-Encoding\xff: chunked\r\n\r\n0\r\n\r\n",
    "TE in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: a\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "HTTP/1.2": b"POST / HTTP/1.2\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n",
    "two spaces": b"POST  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "tab in the request line": b"POST\t/\tHTTP/1.1\r\nHost: a\r\n\r\n",
    "two Hosts": HEAD + b"Host: b\r\n\r\n",
    "no Host": b"POST / HTTP/1.1\r\n\r\n",
    "chunk size with 0x": HEAD + CHUNKED + b"\r\n0x0\r\n\r\n",
    "chunk size with a sign": HEAD + CHUNKED + b"\r\n+0\r\n\r\n",
    "chunk size with a space before": HEAD + CHUNKED + b"\r\n 0\r\n\r\n",
    "chunk size with a space behind": HEAD + CHUNKED + b"\r\n0 \r\n\r\n",
    "chunk size empty": HEAD + CHUNKED + b"\r\n\r\n\r\n",
    "chunk size too large": HEAD + CHUNKED + b"\r\n" + b"f" * 17 + b"\r\n",
    "chunk size with an underscore": HEAD + CHUNKED + b"\r\n1_0\r\n",
    "chunk line ends with LF": HEAD + CHUNKED + b"\r\n0\n\r\n",
    "chunk line ends with CR": HEAD + CHUNKED + b"\r\n0\rX\r\n\r\n",
    "LF in a chunk extension": HEAD + CHUNKED + b"\r\n0;a\nb\r\n\r\n",
    "chunk longer than it says": HEAD + CHUNKED + b"\r\n1\r\nabc\r\n0\r\n\r\n",
    "chunk ends with LF": HEAD + CHUNKED + b"\r\n1\r\na\n0\r\n\r\n",
    "trailers end with LF": HEAD + CHUNKED + b"\r\n0\r\nX: y\n\n",
    "folded trailer": HEAD + CHUNKED + b"\r\n0\r\nX: y\r\n z\r\n\r\n",
    "trailer without colon": HEAD + CHUNKED + b"\r\n0\r\nX\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
def test_request_smuggling(name: str) -> None:
    data = SMUGGLING[name] + BEHIND
    whole = serve(data)
    sent, seen, calls, _ = whole
    assert sent.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ", b"HTTP/1.1 505 ")), sent
    assert sent.count(b"\r\n\r\n") == 1
    assert calls in (["end writing"], ["close"])
    assert all(path != b"/smuggled" for _, path, *_ in seen)
    assert serve(*(data[index : index + 1] for index in range(len(data)))) == whole


def test_the_longest_forms_that_are_right_are_read() -> None:
    """So that the table above cannot be passed by refusing everything."""
    for data in (
        HEAD + b"Content-Length: 000\r\n\r\n",
        HEAD + b'Transfer-Encoding:chunked \r\n\r\n00000;a="b";c\r\nX:\r\n\r\n',
        HEAD + b"TRANSFER-ENCODING: Chunked\r\n\r\n0\r\n\r\n",
        b"\r\nPOST / HTTP/1.1\r\nHost:\ta \r\n\r\n",
    ):
        sent, seen, _, _ = serve(data + BEHIND)
        assert sent.count(b"HTTP/1.1 200 OK\r\n") == 2
        assert [path for _, path, *_ in seen] == [b"/", b"/smuggled"]
