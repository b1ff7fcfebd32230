"""Frames of any kind on an HTTP/2 connection: no exception, and the same however the bytes are cut."""

from __future__ import annotations

from typing import Any

from hpack import Encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interface_server.http2 import PREFACE
from tests.fuzz.test_http1 import cut
from tests.interface_server.test_http1 import World
from tests.interface_server.test_http2 import Upgrades

BOUNDED = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
PSEUDO = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")]
# Each is encoded alone, without the dynamic table, so that any order of them can be decoded.
BLOCKS = [
    b"".join(Encoder().encode([(name, value, True)]) for name, value in fields)  # never indexed
    for fields in (
        PSEUDO,
        [(":method", "POST"), *PSEUDO[1:]],
        [*PSEUDO, ("content-length", "5")],
        [*PSEUDO, ("expect", "100-continue")],
        [*PSEUDO, ("te", "gzip")],
        [(":method", "CONNECT"), (":protocol", "websocket"), *PSEUDO[1:], ("sec-websocket-version", "13")],
        [("x-trailer", "1")],
        PSEUDO[:2],
        [],
    )
]


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


IDS = st.sampled_from([0, 1, 1, 1, 3, 3, 5, 7, 2, 2**31 - 1])
FLAGS = st.sampled_from([0, 1, 4, 5, 5, 8, 0x20, 0x2D, 255])
NUMBERS = st.sampled_from([0, 1, 5, 100, 65535, 2**31 - 1, 2**31, 2**32 - 1]).map(lambda n: n.to_bytes(4, "big"))
SETTING = st.tuples(st.integers(0, 10).map(lambda n: n.to_bytes(2, "big")), NUMBERS).map(b"".join)
FRAMES = st.one_of(
    st.builds(frame, st.just(1), FLAGS, IDS, st.one_of(st.sampled_from(BLOCKS), st.binary(max_size=30))),
    st.builds(frame, st.just(9), FLAGS, IDS, st.one_of(st.sampled_from(BLOCKS), st.binary(max_size=30))),
    st.builds(frame, st.just(0), FLAGS, IDS, st.binary(max_size=30)),
    st.builds(frame, st.sampled_from([3, 8]), FLAGS, IDS, NUMBERS),
    st.builds(
        frame, st.just(4), st.sampled_from([0, 0, 1]), st.sampled_from([0, 0, 1]), st.lists(SETTING).map(b"".join)
    ),
    st.builds(frame, st.just(6), FLAGS, IDS, st.binary(min_size=8, max_size=8)),
    st.builds(frame, st.just(7), FLAGS, st.sampled_from([0, 0, 1]), st.binary(min_size=8, max_size=12)),
    st.builds(frame, st.integers(0, 255), FLAGS, IDS, st.binary(max_size=30)),
    st.binary(max_size=30),
)
GOOD = st.sampled_from([frame(1, 5, stream_id, BLOCKS[0]) for stream_id in (1, 3, 5)])
STREAMS = st.lists(st.one_of(GOOD, FRAMES, FRAMES, FRAMES), min_size=1, max_size=15).map(b"".join)


def serve(*pieces: bytes) -> tuple[bytes, list[Any], list[str]]:
    world = World()
    world.factory.websockets = Upgrades()  # type: ignore[assignment]
    for piece in pieces:
        world.feed(piece)
    for connection in world.connections.opened:
        if connection.last_event is None:
            connection.respond(connection.body)
    sent, calls = world.take(), list(world.calls)
    seen = [
        (opened.scope["method"], opened.scope["raw_path"], opened.scope["headers"], opened.body)
        for opened in world.connections.opened
    ]
    world.advance(300)
    world.lose()
    assert not world.factory.protocols
    return sent, seen, calls


@BOUNDED
@given(STREAMS, st.integers(0, 2**16))
def test_any_frames(data: bytes, seed: int) -> None:
    data = PREFACE + frame(4, 0, 0, b"") + data
    sent, seen, _ = serve(data)
    pieces = cut(data, seed)
    for way in (pieces, [data[index : index + 1] for index in range(len(data))]):
        again = serve(*way)
        # A request that is reset within one read asks nobody, so in pieces it may be more who are asked.
        later = iter(again[1])
        assert all(any(request[:3] == other[:3] for other in later) for request in seen)
    assert sent.startswith(b"\x00\x00")


@BOUNDED
@given(st.binary(max_size=300))
def test_any_bytes_behind_the_preface(data: bytes) -> None:
    serve(PREFACE + data)
    serve(PREFACE[:7] + data)
