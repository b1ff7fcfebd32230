from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel_layer import frames
from channel_layer.errors import WireError
from channel_layer.frames import Blob, BlobKind, FrameKind, Outcome, build_blob, decode_blob

# One frame of each kind this release builds, with what it reads as.
FRAMES: list[tuple[bytes, list[Any]]] = [
    (frames.build_claim(7, 1), [FrameKind.CLAIM, 7, 1]),
    (frames.build_grant(7, 1), [FrameKind.GRANT, 7, 1]),
    (frames.build_closed(7, 2), [FrameKind.CLOSED, 7, 2]),
    (frames.build_event(7, 1, b"\xffe"), [FrameKind.EVENT, 7, 1, b"\xffe"]),
    (frames.build_piece(7, 1, b"p"), [FrameKind.PIECE, 7, 1, b"p"]),
    (frames.build_last(7, 1, b"l"), [FrameKind.LAST, 7, 1, b"l"]),
    (frames.build_gone(7, 1), [FrameKind.GONE, 7, 1]),
    (frames.build_credit(7, 1, 2**40), [FrameKind.CREDIT, 7, 1, 2**40]),
    (frames.build_receiving(7, 1), [FrameKind.RECEIVING, 7, 1]),
    *(
        (frames.build_end(7, 1, outcome), [FrameKind.END, 7, 1, int(outcome)])
        for outcome in (Outcome.RETURNED, Outcome.RAISED, Outcome.CANCELLED)
    ),
    (frames.build_events([(7, 1), (8, 2)], b"e"), [FrameKind.EVENTS, [[7, 1], [8, 2]], b"e"]),
    (frames.build_group_send("room", b"m"), [FrameKind.GROUP_SEND, "room", b"m"]),
    (frames.build_group_add(7, 0, 9, "room"), [FrameKind.GROUP_ADD, 7, 0, 9, "room"]),
    (frames.build_group_discard(7, 1, 9, "room"), [FrameKind.GROUP_DISCARD, 7, 1, 9, "room"]),
    (frames.build_group_answer(9, True), [FrameKind.GROUP_ANSWER, 9, True]),
    (frames.build_bye(), [FrameKind.BYE]),
    (
        frames.build_answer(7, 1, 200, [(b"x", b"y")], b"body"),
        [FrameKind.ANSWER, 7, 1, 200, [[b"x", b"y"]], b"body"],
    ),
    (frames.build_state(7, 1, 5, 3, b"s"), [FrameKind.STATE, 7, 1, 5, 3, b"s"]),
    (frames.build_release(7, 1), [FrameKind.RELEASE, 7, 1]),
    (frames.build_released(7, 1, True), [FrameKind.RELEASED, 7, 1, True]),
    (frames.build_adopt(7, 2, b"o", b"s", 9), [FrameKind.ADOPT, 7, 2, b"o", b"s", 9]),
]


def in_a_blob(*encoded: bytes) -> bytes:
    return build_blob(BlobKind.DATA, source="i7", stream=3, sequence=1, frames=encoded)


def test_every_kind_is_here() -> None:
    assert {fields[0] for _, fields in FRAMES} == set(FrameKind)


def test_numbers_on_the_wire_never_change() -> None:
    assert [int(fields[0]) for _, fields in FRAMES] == [
        *range(1, 11),
        *(10, 10),
        *range(11, 18),
        *range(32, 36),
    ]
    assert [int(kind) for kind in BlobKind] == list(range(6))
    assert [int(outcome) for outcome in Outcome] == [0, 1, 2]


@pytest.mark.parametrize(("encoded", "fields"), FRAMES, ids=lambda value: str(value[0]))
def test_a_frame_arrives_as_it_was(encoded: bytes, fields: list[Any]) -> None:
    assert decode_blob(in_a_blob(encoded)).frames == [fields]


@pytest.mark.parametrize(("encoded", "fields"), FRAMES, ids=lambda value: str(value[0]))
def test_every_missing_field_is_refused(encoded: bytes, fields: list[Any]) -> None:
    for count in range(1, len(fields)):
        with pytest.raises(WireError, match="frame 1 of a link blob is malformed"):
            decode_blob(in_a_blob(frames.build_bye(), msgpack.packb(fields[:count])))


@pytest.mark.parametrize(("encoded", "fields"), FRAMES, ids=lambda value: str(value[0]))
def test_every_field_of_another_type_is_refused(encoded: bytes, fields: list[Any]) -> None:
    for index in range(1, len(fields)):
        for wrong in (None, 1.5, "x", b"x", 7, True, [], {}):
            if type(wrong) is type(fields[index]):
                continue
            broken = [*fields[:index], wrong, *fields[index + 1 :]]
            with pytest.raises(WireError, match="malformed"):
                decode_blob(in_a_blob(msgpack.packb(broken)))


@pytest.mark.parametrize(("encoded", "fields"), FRAMES, ids=lambda value: str(value[0]))
def test_fields_that_a_later_release_appends_are_kept(encoded: bytes, fields: list[Any]) -> None:
    assert decode_blob(in_a_blob(msgpack.packb([*fields, "new"]))).frames == [[*fields, "new"]]


def test_frames_of_a_later_release_are_left_to_the_receiver() -> None:
    unknown = [99, "anything"]
    assert decode_blob(in_a_blob(msgpack.packb(unknown), frames.build_bye())).frames == [unknown, [16]]
    assert decode_blob(in_a_blob(msgpack.packb([47]))).frames == [[47]]


@pytest.mark.parametrize("frame", [[], {}, None, 7, "x", ["1"], [True], [None], [1.0]])
def test_a_frame_without_a_kind(frame: Any) -> None:
    with pytest.raises(WireError, match="frame 0 of a link blob has no kind"):
        decode_blob(in_a_blob(msgpack.packb(frame)))


numbers = st.integers(0, 2**64 - 1)


@given(
    kind=st.sampled_from(BlobKind),
    source=st.text(st.characters(exclude_categories=["Cs"])),
    stream=numbers,
    sequence=numbers,
    ack_stream=numbers,
    ack=numbers,
    chosen=st.lists(st.sampled_from(FRAMES), max_size=40),
)
def test_a_blob_arrives_as_it_was(
    kind: BlobKind,
    source: str,
    stream: int,
    sequence: int,
    ack_stream: int,
    ack: int,
    chosen: list[tuple[bytes, list[Any]]],
) -> None:
    data = build_blob(
        kind,
        source=source,
        stream=stream,
        sequence=sequence,
        ack_stream=ack_stream,
        ack=ack,
        frames=[encoded for encoded, _ in chosen],
    )
    expected = Blob(kind, source, stream, sequence, ack_stream, ack, [fields for _, fields in chosen])
    assert decode_blob(data) == expected
    # The array's head is put together by hand; it is what msgpack would have written.
    head = [frames.BLOB_VERSION, kind, source, stream, sequence, ack_stream, ack]
    assert data == msgpack.packb([*head, [fields for _, fields in chosen]])


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 65535, 65536])
def test_any_number_of_frames(count: int) -> None:
    data = in_a_blob(*[frames.build_bye()] * count)
    assert decode_blob(data).frames == [[16]] * count


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ([], "expected an array"),
        ({}, "is a dict, expected an array"),
        (7, "is a int, expected an array"),
        ([2, 0, "i7", 3, 1, 0, 0, []], "version 2, this release reads 1"),
        (["1", 0, "i7", 3, 1, 0, 0, []], "version '1'"),
        ([1, 0, "i7", 3, 1, 0, 0], "7 fields, expected 8"),
        ([1, 0, "i7", 3, 1, 0, 0, [], 9], "9 fields, expected 8"),
        ([1, 6, "i7", 3, 1, 0, 0, []], "malformed head"),
        ([1, True, "i7", 3, 1, 0, 0, []], "malformed head"),
        ([1, 0, b"i7", 3, 1, 0, 0, []], "malformed head"),
        ([1, 0, "i7", -3, 1, 0, 0, []], "malformed head"),
        ([1, 0, "i7", 3, 1.0, 0, 0, []], "malformed head"),
        ([1, 0, "i7", 3, 1, None, 0, []], "malformed head"),
        ([1, 0, "i7", 3, 1, 0, True, []], "malformed head"),
        ([1, 0, "i7", 3, 1, 0, 0, {}], "malformed head"),
        ([1, 0, "i7", 3, 1, 0, 0, None], "malformed head"),
    ],
)
def test_what_is_no_blob(fields: Any, text: str) -> None:
    with pytest.raises(WireError, match=text):
        decode_blob(msgpack.packb(fields))


def test_every_cut_and_every_trailing_byte_is_refused() -> None:
    data = in_a_blob(*(encoded for encoded, _ in FRAMES))
    for length in range(len(data)):
        with pytest.raises(WireError):
            decode_blob(data[:length])
    with pytest.raises(WireError):
        decode_blob(data + b"\x00")


def test_a_deeply_nested_blob_is_a_wire_error() -> None:
    nested = b"\x91" * 1000 + b"\xc0"
    for data in (nested, in_a_blob(nested), in_a_blob(b"\x92\x01" + nested), b"\x92" + nested + b"\xc0"):
        with pytest.raises(WireError):
            decode_blob(data)


@given(st.binary(max_size=200))
def test_random_bytes_never_crash(data: bytes) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(decode_blob(data), Blob)


@given(st.binary(max_size=60))
def test_random_frames_never_crash(data: bytes) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(decode_blob(in_a_blob(data)), Blob)
