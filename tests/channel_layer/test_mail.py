from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel_layer import mail
from channel_layer.errors import WireError
from channel_layer.mail import Letter, LetterKind, decode_letter

# One of each kind, with what it reads as.
LETTERS: list[tuple[bytes, LetterKind, list[Any]]] = [
    (mail.build_message("a.c7!x", b"\xffm"), LetterKind.MESSAGE, ["a.c7!x", b"\xffm"]),
    (mail.build_group_send("room", b"m"), LetterKind.GROUP_SEND, ["room", b"m"]),
    (
        mail.build_group_add("room", "a.c7!x", request=7, answer_to="w1"),
        LetterKind.GROUP_ADD,
        ["room", "a.c7!x", 7, "w1"],
    ),
    (
        mail.build_group_discard("room", "a.c7!x", request=2**40, answer_to="w1"),
        LetterKind.GROUP_DISCARD,
        ["room", "a.c7!x", 2**40, "w1"],
    ),
    (mail.build_group_answer(7, True), LetterKind.GROUP_ANSWER, [7, True]),
    (mail.build_group_answer(0, False), LetterKind.GROUP_ANSWER, [0, False]),
    (mail.build_probe(12345), LetterKind.PROBE, [12345]),
    (mail.build_flush(request=7, answer_to="c1"), LetterKind.FLUSH, [7, "c1"]),
    (mail.build_held([7, 1]), LetterKind.HELD, [7, 1]),
]


def test_every_kind_is_here() -> None:
    assert {kind for _, kind, _ in LETTERS} == set(LetterKind)


@pytest.mark.parametrize(("data", "kind", "fields"), LETTERS)
def test_round_trip(data: bytes, kind: LetterKind, fields: list[Any]) -> None:
    assert decode_letter(data) == Letter(kind, fields)


@pytest.mark.parametrize(("data", "kind", "fields"), LETTERS)
def test_every_cut_and_every_trailing_byte_is_refused(data: bytes, kind: LetterKind, fields: list[Any]) -> None:
    for length in range(len(data)):
        with pytest.raises(WireError):
            decode_letter(data[:length])
    with pytest.raises(WireError):
        decode_letter(data + b"\x00")


@pytest.mark.parametrize(("data", "kind", "fields"), LETTERS)
def test_every_missing_or_mistyped_field_is_refused(data: bytes, kind: LetterKind, fields: list[Any]) -> None:
    for count in range(len(fields)):
        with pytest.raises(WireError, match=f"kind {int(kind)}"):
            decode_letter(msgpack.packb([1, kind, *fields[:count]]))
    for index in range(len(fields)):
        for wrong in (None, 1.5, [], {}):
            with pytest.raises(WireError, match=f"kind {int(kind)}"):
                decode_letter(msgpack.packb([1, kind, *fields[:index], wrong, *fields[index + 1 :]]))


@pytest.mark.parametrize(("data", "kind", "fields"), LETTERS)
def test_fields_that_a_later_release_appends_are_kept(data: bytes, kind: LetterKind, fields: list[Any]) -> None:
    assert decode_letter(msgpack.packb([1, kind, *fields, "new"])) == Letter(kind, [*fields, "new"])


def test_a_kind_of_a_later_release_is_left_to_the_reader() -> None:
    assert decode_letter(msgpack.packb([1, 99, "x"])) == Letter(99, ["x"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([2, 1, "a", b"b"], "version 2"),
        (["1", 1], "version '1'"),
        ([1], "no kind"),
        ([1, "x"], "no kind"),
        ([1, True], "no kind"),
        ([], "not an array"),
        ({}, "not an array"),
        (7, "not an array"),
    ],
)
def test_what_is_no_letter(value: Any, text: str) -> None:
    with pytest.raises(WireError, match=text):
        decode_letter(msgpack.packb(value))


def test_a_deeply_nested_letter_is_a_wire_error() -> None:
    nested = b"\x91" * 1000 + b"\xc0"
    for data in (nested, b"\x92\x01" + nested, b"\x93\x01\x06" + nested, b"\x92" + nested + b"\x01"):
        with pytest.raises(WireError):
            decode_letter(data)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read_but_never_crash(data: bytes) -> None:
    try:
        letter = decode_letter(data)
    except WireError:
        return
    assert type(letter.kind) is int


@given(st.text(), st.binary())
def test_any_channel_and_payload_arrive(channel: str, payload: bytes) -> None:
    channel = channel.encode("utf-8", "replace").decode()
    assert decode_letter(mail.build_message(channel, payload)).fields == [channel, payload]
    assert decode_letter(mail.build_group_send(channel, payload)).fields == [channel, payload]
