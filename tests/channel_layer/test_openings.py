from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel_layer.codec import encode_event
from channel_layer.errors import WireError
from channel_layer.openings import Opening, decode_opening, encode_opening, pack_opening

OPENING = Opening(
    interface="i7",
    connection=42,
    epoch=1,
    reply_channel="interface.i7!42",
    scope={"type": "http", "path": "/é", "query_string": b"\xff", "headers": [[b"host", b"x"]], "client": None},
    first_event=encode_event({"type": "http.request", "body": b"x", "more_body": True}),
    tell_receiving=True,
    window_bytes=128 * 1024,
)
FIELDS = [
    2,
    OPENING.interface,
    OPENING.connection,
    OPENING.epoch,
    OPENING.reply_channel,
    OPENING.scope,
    OPENING.first_event,
    OPENING.tell_receiving,
    OPENING.window_bytes,
]


@pytest.mark.parametrize("opening", [OPENING, dataclasses.replace(OPENING, first_event=None, tell_receiving=False)])
def test_an_opening_arrives_as_it_was(opening: Opening) -> None:
    assert decode_opening(encode_opening(opening)) == opening


def test_tuples_of_the_scope_become_lists() -> None:
    opening = dataclasses.replace(OPENING, scope={"headers": [(b"a", b"b")], "client": ("::1", 7)})
    assert decode_opening(encode_opening(opening)).scope == {"headers": [[b"a", b"b"]], "client": ["::1", 7]}


def test_the_wire_is_this_array() -> None:
    assert encode_opening(OPENING) == msgpack.packb(FIELDS)
    assert pack_opening(*FIELDS) == msgpack.packb(FIELDS)


def test_the_previous_version_is_read_and_written() -> None:
    previous = dataclasses.replace(OPENING, version=1)
    assert encode_opening(previous) == msgpack.packb([1, *FIELDS[1:]])
    assert decode_opening(encode_opening(previous)) == previous


@pytest.mark.parametrize("version", [0, 3, "2", None])
def test_another_version_is_refused_by_name(version: Any) -> None:
    with pytest.raises(WireError, match="is not an array of version 1 or 2"):
        decode_opening(msgpack.packb([version, *FIELDS[1:]]))


def test_fields_that_a_later_release_appends_are_ignored() -> None:
    assert decode_opening(msgpack.packb([*FIELDS, "new"])) == OPENING


@pytest.mark.parametrize("count", range(9))
def test_a_missing_field_is_refused(count: int) -> None:
    with pytest.raises(WireError):
        decode_opening(msgpack.packb(FIELDS[:count]))


@pytest.mark.parametrize(
    ("index", "wrong"),
    [
        (index, wrong)
        for index in range(1, 9)
        for wrong in (None, 1.5, "x", b"x", 7, True, [], {})
        if type(wrong) is not type(FIELDS[index]) and (index, wrong) != (6, None)
    ],
)
def test_a_field_of_another_type_is_refused(index: int, wrong: Any) -> None:
    with pytest.raises(WireError, match="malformed fields"):
        decode_opening(msgpack.packb([*FIELDS[:index], wrong, *FIELDS[index + 1 :]]))


def test_a_window_in_which_nothing_moves_is_refused() -> None:
    with pytest.raises(WireError, match="malformed fields"):
        decode_opening(msgpack.packb([*FIELDS[:-1], 1023]))


@pytest.mark.parametrize("value", [{}, 7, None, "x", []])
def test_what_is_no_array(value: Any) -> None:
    with pytest.raises(WireError, match="not an array"):
        decode_opening(msgpack.packb(value))


def test_every_cut_and_every_trailing_byte_is_refused() -> None:
    data = encode_opening(OPENING)
    for length in range(len(data)):
        with pytest.raises(WireError):
            decode_opening(data[:length])
    with pytest.raises(WireError):
        decode_opening(data + b"\x00")


def test_a_deeply_nested_opening_is_a_wire_error() -> None:
    nested = b"\x91" * 1000 + b"\xc0"
    for data in (nested, b"\x98\x01" + nested + b"\xc0" * 6):
        with pytest.raises(WireError):
            decode_opening(data)


@given(st.binary(max_size=200))
def test_random_bytes_never_crash(data: bytes) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(decode_opening(data), Opening)
