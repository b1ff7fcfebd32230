"""Mail: what is sent to a process without a link, one element a letter, in its inbox's ``mail`` list.

A letter stands behind the element's deadline (messages.split_element) and is a msgpack array:

    [version, kind, fields …]

    MESSAGE        channel, payload              a message for a process-local channel of the reader
    GROUP_SEND     group, payload                deliver to your members of the group
    GROUP_ADD      group, channel, request, answer_to   take your channel into the group and answer
    GROUP_DISCARD  group, channel, request, answer_to   take it out and answer
    GROUP_ANSWER   request, done                 the answer to GROUP_ADD, GROUP_DISCARD and FLUSH
    PROBE          token                         from the process to itself: does its own inbox work?
    FLUSH          request, answer_to            forget what waits for you and your memberships, and answer
    HELD           number, epoch, …              openings of yours that a worker has taken, and cannot claim yet

``payload`` is an encoded message (codec.py); ``answer_to`` is the process id that awaits the answer. A version
that the reader does not know is a WireError; a kind that it does not know is returned as it is and the reader
counts it. To add a kind: a number, a row above, a build_ function and an entry in ``_FIELDS``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, NamedTuple

import msgpack

from channel_layer.errors import WireError, repr_short

__all__ = [
    "LETTER_VERSION",
    "MAIL_CAPACITY",
    "Letter",
    "LetterKind",
    "build_flush",
    "build_group_add",
    "build_group_answer",
    "build_group_discard",
    "build_group_send",
    "build_held",
    "build_message",
    "build_probe",
    "decode_letter",
]

# Nobody knows what the reader of a letter reads, so this may grow only a release after all read the new one.
LETTER_VERSION: Final = 1
# Letters of groups, requests and answers in a process's mail; one more is dropped and counted by its sender. More
# than the 100 of a channel, because all groups share one mail, and a process handles a thousand in some 20 ms.
MAIL_CAPACITY: Final = 1000


class LetterKind(IntEnum):
    MESSAGE = 1
    GROUP_SEND = 2
    GROUP_ADD = 3
    GROUP_DISCARD = 4
    GROUP_ANSWER = 5
    PROBE = 6
    FLUSH = 7
    HELD = 8


class Letter(NamedTuple):
    """A decoded letter. ``kind`` is a plain int, since a newer release may send one we do not know."""

    kind: int
    fields: list[Any]


_pack: Callable[[object], bytes] = msgpack.Packer(use_bin_type=True, autoreset=True).pack
_FIELDS: Final[dict[int, tuple[type, ...]]] = {
    LetterKind.MESSAGE: (str, bytes),
    LetterKind.GROUP_SEND: (str, bytes),
    LetterKind.GROUP_ADD: (str, str, int, str),
    LetterKind.GROUP_DISCARD: (str, str, int, str),
    LetterKind.GROUP_ANSWER: (int, bool),
    LetterKind.PROBE: (int,),
    LetterKind.FLUSH: (int, str),
    LetterKind.HELD: (int, int),
}


def build_message(channel: str, payload: bytes) -> bytes:
    return _pack([LETTER_VERSION, 1, channel, payload])


def build_group_send(group: str, payload: bytes) -> bytes:
    return _pack([LETTER_VERSION, 2, group, payload])


def build_group_add(group: str, channel: str, *, request: int, answer_to: str) -> bytes:
    return _pack([LETTER_VERSION, int(LetterKind.GROUP_ADD), group, channel, request, answer_to])


def build_group_discard(group: str, channel: str, *, request: int, answer_to: str) -> bytes:
    return _pack([LETTER_VERSION, int(LetterKind.GROUP_DISCARD), group, channel, request, answer_to])


def build_group_answer(request: int, done: bool) -> bytes:
    return _pack([LETTER_VERSION, int(LetterKind.GROUP_ANSWER), request, done])


def build_probe(token: int) -> bytes:
    return _pack([LETTER_VERSION, int(LetterKind.PROBE), token])


def build_flush(*, request: int, answer_to: str) -> bytes:
    return _pack([LETTER_VERSION, int(LetterKind.FLUSH), request, answer_to])


def build_held(openings: list[int]) -> bytes:
    """``openings``: number and epoch of each, in turn."""
    return _pack([LETTER_VERSION, int(LetterKind.HELD), *openings])


def decode_letter(data: bytes) -> Letter:
    """Decode and check a letter (without the deadline). Raises WireError, which names what was wrong."""
    try:
        array = msgpack.unpackb(data, raw=False)
    except Exception as error:  # msgpack raises half a dozen unrelated types
        raise WireError(f"letter of {len(data)} bytes is not msgpack: {error!r}") from error
    if type(array) is not list or not array:
        raise WireError(f"letter is not an array: {repr_short(array)}")
    if array[0] != LETTER_VERSION:
        raise WireError(f"letter has version {repr_short(array[0])}, this release reads {LETTER_VERSION}")
    if len(array) < 2 or type(array[1]) is not int:
        raise WireError(f"letter has no kind: {repr_short(array)}")
    kind, fields = array[1], array[2:]
    expected = _FIELDS.get(kind, ())
    # A later release may append fields, so only the known ones are checked.
    if len(fields) < len(expected) or any(
        type(field) is not wanted for field, wanted in zip(fields, expected, strict=False)
    ):
        raise WireError(f"letter of kind {kind} is malformed: {repr_short(fields)}")
    return Letter(kind, fields)
