"""Frames as a server writes them, against the examples of RFC 6455 section 5.7 and an independent parser."""

import pytest
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from interface_server.protocol.websocket_frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    build_close,
    build_frame,
    close_code_is_valid,
    read_message,
    truncate_reason,
)


def parse(data: bytes) -> Frame:
    reader = StreamReader()
    reader.feed_data(data)
    parser = Frame.parse(reader.read_exact, mask=False)
    try:
        next(parser)
    except StopIteration as stop:
        frame = stop.value
    assert not reader.buffer, "bytes behind the frame"
    return frame


def test_examples_of_the_rfc():
    assert build_frame(TEXT, b"Hello") == bytes((0x81, 0x05, 0x48, 0x65, 0x6C, 0x6C, 0x6F))
    assert build_frame(PONG, b"Hello")[:2] == bytes((0x8A, 0x05))
    assert build_frame(BINARY, bytes(256))[:4] == bytes((0x82, 0x7E, 0x01, 0x00))
    assert build_frame(BINARY, bytes(65536))[:10] == bytes((0x82, 0x7F, 0, 0, 0, 0, 0, 1, 0, 0))


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_every_length_encoding_is_read_back(opcode, size):
    payload = b"x" * size
    assert parse(build_frame(opcode, payload)) == Frame(Opcode(opcode), payload)


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
def test_control_frames_are_read_back(opcode):
    assert parse(build_frame(opcode, b"\x03\xe8ab")) == Frame(Opcode(opcode), b"\x03\xe8ab")


def test_close():
    assert build_close(None) == b"\x88\x00"
    assert build_close(None, "ignored: no reason without a code") == b"\x88\x00"
    assert build_close(1000) == b"\x88\x02\x03\xe8"
    assert build_close(4001, "because") == b"\x88\x09\x0f\xa1because"


def test_a_long_reason_is_cut_between_characters():
    frame = parse(build_close(4000, "ä" * 100))
    assert len(frame.data) == 2 + 122
    assert frame.data[2:].decode() == "ä" * 61
    assert truncate_reason("x" * 124) == "x" * 123
    assert truncate_reason("a\ud800b") == "a?b"


def test_close_codes():
    valid = {code for code in range(65536) if close_code_is_valid(code)}
    assert valid == {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}
    assert not close_code_is_valid(-1)
    assert not close_code_is_valid(10**6)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"text": "ä"}, (TEXT, "ä".encode())),
        ({"text": ""}, (TEXT, b"")),
        ({"text": "a", "bytes": None}, (TEXT, b"a")),
        ({"bytes": b"a"}, (BINARY, b"a")),
        ({"bytes": b""}, (BINARY, b"")),
        ({"bytes": b"a", "text": None, "further": 1}, (BINARY, b"a")),
        ({}, None),
        ({"text": None, "bytes": None}, None),
        ({"text": "a", "bytes": b"a"}, None),
        ({"text": "", "bytes": b""}, None),
        ({"text": b"a"}, None),
        ({"bytes": "a"}, None),
        ({"text": 1}, None),
        ({"text": "\ud800"}, None),
    ],
)
def test_read_message(event, expected):
    assert read_message(event) == expected
