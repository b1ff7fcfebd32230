"""What Http2Machine changes about h2, frame by frame. That h2's own methods are still called as we expect, too."""

from __future__ import annotations

from typing import Any

import pytest
from h2.connection import ConnectionState
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, Event, RequestReceived, StreamReset
from h2.exceptions import ProtocolError
from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from interface_server.protocol.http2_machine import STREAM_WINDOW_BYTES, STREAMS_MAX, Flood, Http2Machine

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PSEUDO = ((":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "a"))


class World:
    """A machine that has been greeted, and a client's compression."""

    def __init__(self) -> None:
        self.machine = Http2Machine(header_list_bytes_max=64 * 1024, now=0.0)
        self.encoder = Encoder()
        self.machine.receive_data(
            PREFACE + SettingsFrame(0).serialize() + SettingsFrame(0, flags=["ACK"]).serialize()
        )
        self.sent()

    def receive(self, *frames: Frame) -> list[Event]:
        return self.machine.receive_data(b"".join(frame.serialize() for frame in frames))

    def head(
        self, stream_id: int, *fields: tuple[str, str], ends: bool = False, pseudo: Any = PSEUDO
    ) -> HeadersFrame:
        flags = ["END_HEADERS", *(["END_STREAM"] if ends else [])]
        return HeadersFrame(stream_id, self.encoder.encode([*pseudo, *fields]), flags=flags)

    def trailers(self, stream_id: int, *fields: tuple[str, str], ends: bool = True) -> HeadersFrame:
        return self.head(stream_id, *fields, ends=ends, pseudo=())

    def sent(self) -> list[Any]:
        data = self.machine.data_to_send()
        frames = []
        while data:
            frame, length = Frame.parse_frame_header(memoryview(data[:9]))
            frame.parse_body(memoryview(data[9 : 9 + length]))
            frames.append(frame)
            data = data[9 + length :]
        return frames

    def refusal(self, *frames: Frame) -> ErrorCodes:
        """What the GOAWAY says."""
        with pytest.raises(ProtocolError):
            self.receive(*frames)
        (goaway,) = [frame for frame in self.sent() if isinstance(frame, GoAwayFrame)]
        return ErrorCodes(goaway.error_code)

    def resets(self) -> list[tuple[int, ErrorCodes]]:
        return [(f.stream_id, ErrorCodes(f.error_code)) for f in self.sent() if isinstance(f, RstStreamFrame)]

    def is_alive(self) -> bool:
        """Another stream is served."""
        stream_id = self.machine.highest_inbound_stream_id + 2 | 1
        return any(isinstance(event, RequestReceived) for event in self.receive(self.head(stream_id, ends=True)))


def data(stream_id: int, size: int, *, ends: bool = False) -> DataFrame:
    return DataFrame(stream_id, bytes(size), flags=["END_STREAM"] if ends else [])


@pytest.mark.parametrize(
    ("fields", "pseudo"),
    [
        ((("Upper", "1"),), PSEUDO),
        ((("connection", "close"),), PSEUDO),
        ((("te", "gzip"),), PSEUDO),
        ((("transfer-encoding", "chunked"),), PSEUDO),
        ((("content-length", "-1"),), PSEUDO),
        ((("content-length", "1"), ("content-length", "2")), PSEUDO),
        (((":path", "/again"),), PSEUDO),
        (((":unknown", "1"),), PSEUDO),
        (((":status", "200"),), PSEUDO),
        ((), PSEUDO[1:]),
        ((), (*PSEUDO[:2], *PSEUDO[3:])),
        ((), (("x", "1"), *PSEUDO)),
        ((("content-length", "1"),), PSEUDO),  # and no body
    ],
    ids=str,
)
def test_a_malformed_request_resets_its_stream(fields: Any, pseudo: Any) -> None:
    world = World()
    events = world.receive(world.head(1, *fields, ends=True, pseudo=pseudo))
    (reset,) = events
    assert isinstance(reset, StreamReset)
    assert (reset.stream_id, reset.error_code, reset.remote_reset) == (1, ErrorCodes.PROTOCOL_ERROR, False)
    assert world.resets() == [(1, ErrorCodes.PROTOCOL_ERROR)]
    assert world.machine.state_machine.state is ConnectionState.SERVER_OPEN
    assert world.is_alive()


def test_what_follows_on_a_stream_that_was_reset_is_nobody_s() -> None:
    world = World()
    world.receive(world.head(1, ("te", "gzip")))
    world.sent()
    window = world.machine.inbound_flow_control_window
    for _ in range(100):
        assert not any(isinstance(event, DataReceived) for event in world.receive(data(1, 16384)))
        assert world.machine.inbound_flow_control_window > 0
    assert world.machine.inbound_flow_control_window > window // 3
    assert world.is_alive()
    world.receive(data(1, 100))  # and when h2 has forgotten the stream
    assert world.is_alive()


@pytest.mark.parametrize(
    ("length", "sizes", "trailers"),
    [
        (3, (4,), None),
        (3, (2, 2), None),
        (3, (1, 1), None),
        (3, (2, 0), None),
        (3, (0,), None),
        (3, (2,), ()),
        (3, (2,), (("content-length", "2"),)),
    ],
)
def test_a_body_that_is_not_as_long_as_it_says(length: int, sizes: Any, trailers: Any) -> None:
    world = World()
    world.receive(world.head(1, ("content-length", str(length))))
    window = world.machine.inbound_flow_control_window
    events: list[Event] = []
    for index, size in enumerate(sizes):
        events += world.receive(data(1, size, ends=trailers is None and index == len(sizes) - 1))
    if trailers is not None:
        events += world.receive(world.trailers(1, *trailers))
    assert isinstance(events[-1], StreamReset)
    assert (1, ErrorCodes.PROTOCOL_ERROR) in world.resets()
    delivered = sum(event.flow_controlled_length for event in events if isinstance(event, DataReceived))
    assert world.machine.inbound_flow_control_window == window - delivered
    assert world.is_alive()


def test_a_body_that_is_as_long_as_it_says() -> None:
    world = World()
    world.receive(world.head(1, ("content-length", "3")))
    world.receive(data(1, 3), world.trailers(1, ("x", "y")))
    world.receive(world.head(3, ("content-length", "0"), ends=True))
    assert world.resets() == []


def test_malformed_trailers_reset_their_stream() -> None:
    for fields, ends in (((":path", "/"), True), (("x", "y"), False)):
        world = World()
        world.receive(world.head(1))
        events = world.receive(world.trailers(1, fields, ends=ends))
        assert isinstance(events[-1], StreamReset)
        assert world.resets() == [(1, ErrorCodes.PROTOCOL_ERROR)]
        assert world.is_alive()


def test_more_than_a_stream_s_window_resets_it_and_more_than_the_connection_s_ends_it() -> None:
    world = World()
    world.receive(world.head(1), world.head(3))
    for _ in range(STREAM_WINDOW_BYTES // 16384):
        world.receive(data(1, 16384))
    events = world.receive(data(1, 1))
    assert isinstance(events[-1], StreamReset)
    assert world.resets() == [(1, ErrorCodes.FLOW_CONTROL_ERROR)]
    # Nothing of this is granted again.
    assert world.is_alive()
    world = World()
    ids = range(1, 2 * 9, 2)
    world.receive(*(world.head(stream_id) for stream_id in ids))
    frames = [data(stream_id, 16384) for stream_id in ids for _ in range(STREAM_WINDOW_BYTES // 16384)]
    assert world.refusal(*frames) == ErrorCodes.FLOW_CONTROL_ERROR


def test_a_window_that_overflows_resets_its_stream() -> None:
    world = World()
    world.receive(world.head(1))
    world.receive(WindowUpdateFrame(1, window_increment=2**31 - 1))
    assert world.resets() == [(1, ErrorCodes.FLOW_CONTROL_ERROR)]
    assert world.is_alive()
    assert world.refusal(WindowUpdateFrame(0, window_increment=2**31 - 1)) == ErrorCodes.FLOW_CONTROL_ERROR


def test_streams_beyond_the_limit_are_refused_and_their_fields_still_count() -> None:
    world = World()
    world.receive(*(world.head(2 * number + 1) for number in range(STREAMS_MAX)))
    refused = 2 * STREAMS_MAX + 1
    assert world.receive(world.head(refused, ("x-new", "remembered by both"))) == []
    assert world.resets() == [(refused, ErrorCodes.REFUSED_STREAM)]
    assert world.receive(data(refused, 10)) == []
    world.receive(RstStreamFrame(1, error_code=8))
    events = world.receive(world.head(refused + 2, ("x-new", "remembered by both")))
    assert isinstance(events[0], RequestReceived)
    assert (b"x-new", b"remembered by both") in [tuple(field) for field in events[0].headers or ()]


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ((DataFrame(1, b"x"),), ErrorCodes.PROTOCOL_ERROR),
        ((RstStreamFrame(1),), ErrorCodes.PROTOCOL_ERROR),
        ((RstStreamFrame(2),), ErrorCodes.PROTOCOL_ERROR),
        ((WindowUpdateFrame(1, window_increment=1),), ErrorCodes.PROTOCOL_ERROR),
        ((ContinuationFrame(1, b"", flags=["END_HEADERS"]),), ErrorCodes.PROTOCOL_ERROR),
        ((PushPromiseFrame(1, promised_stream_id=2, flags=["END_HEADERS"]),), ErrorCodes.PROTOCOL_ERROR),
        ((HeadersFrame(2, b"\x82", flags=["END_HEADERS"]),), ErrorCodes.PROTOCOL_ERROR),
        ((HeadersFrame(1, b"\xff\xff\xff\xff", flags=["END_HEADERS"]),), ErrorCodes.COMPRESSION_ERROR),
        ((HeadersFrame(1, b"\x82"), PingFrame(0, bytes(8))), ErrorCodes.PROTOCOL_ERROR),
        ((HeadersFrame(1, b"\x82"), *[ContinuationFrame(1)] * 100), ErrorCodes.PROTOCOL_ERROR),
        ((SettingsFrame(0, {4: 2**31}),), ErrorCodes.FLOW_CONTROL_ERROR),
        ((SettingsFrame(0, {5: 1}),), ErrorCodes.PROTOCOL_ERROR),
    ],
)
def test_faults_of_the_connection_end_it(frames: Any, code: ErrorCodes) -> None:
    assert World().refusal(*frames) == code


def test_numbers_of_streams_only_grow() -> None:
    world = World()
    world.receive(world.head(5, ends=True))
    assert world.refusal(world.head(3)) == ErrorCodes.PROTOCOL_ERROR


def test_a_header_list_beyond_all_limits_ends_the_connection() -> None:
    world = World()
    fields = [("x-large", "a" * 4000)] * 100
    assert world.refusal(world.head(1, *fields)) == ErrorCodes.ENHANCE_YOUR_CALM


FLOODS = [
    PingFrame(0, b"12345678"),
    PingFrame(0, b"12345678", flags=["ACK"]),
    SettingsFrame(0, {4: 65536}),
    SettingsFrame(0, flags=["ACK"]),
    PriorityFrame(7),
    WindowUpdateFrame(0, window_increment=1),
    WindowUpdateFrame(1, window_increment=1),
    DataFrame(1),
    DataFrame(3, bytes(10)),  # of a stream that is over
    RstStreamFrame(3),
    GoAwayFrame(0),
]


@pytest.mark.parametrize("frame", FLOODS, ids=lambda frame: type(frame).__name__)
def test_floods(frame: Frame) -> None:
    world = World()
    world.receive(world.head(1), world.head(3), RstStreamFrame(3))
    flood = frame.serialize() * 1100
    with pytest.raises(Flood):
        world.machine.receive_data(flood)
    goaway = world.sent()[-1]
    assert isinstance(goaway, GoAwayFrame)
    assert goaway.error_code == ErrorCodes.ENHANCE_YOUR_CALM


def test_resets_whoever_is_said_to_have_done_them() -> None:
    """CVE-2023-44487, CVE-2025-8671."""
    for fault in (RstStreamFrame, lambda stream_id: WindowUpdateFrame(stream_id, window_increment=2**31 - 1)):
        world = World()
        frames = [frame for number in range(1, 500, 2) for frame in (world.head(number), fault(number))]
        with pytest.raises(Flood):
            world.receive(*frames)
    world = World()
    frames = [world.head(number, ("te", "gzip")) for number in range(1, 500, 2)]
    with pytest.raises(Flood):
        world.receive(*frames)


def test_who_reads_a_large_response_may_open_windows_as_it_comes() -> None:
    world = World()
    world.receive(world.head(1, ends=True))
    world.machine.send_headers(1, [(b":status", b"200")])
    for _ in range(5000):
        world.machine.send_data(1, bytes(1000))
        world.receive(WindowUpdateFrame(1, window_increment=1000), WindowUpdateFrame(0, window_increment=1000))
    for _ in range(500):
        world.receive(PingFrame(0, bytes(8)))


def test_a_goaway_of_either_side_leaves_streams_alone() -> None:
    world = World()
    world.receive(world.head(1))
    world.machine.announce_end()
    (goaway,) = world.sent()
    assert (goaway.last_stream_id, goaway.error_code) == (1, ErrorCodes.NO_ERROR)
    (event,) = world.receive(GoAwayFrame(0))
    assert isinstance(event, ConnectionTerminated)
    assert isinstance(world.receive(data(1, 3, ends=True))[0], DataReceived)
    world.machine.send_headers(1, [(b":status", b"200")], end_stream=True)
    (frame,) = world.sent()
    assert isinstance(frame, HeadersFrame)
