"""The wire between two processes: blobs, and the frames inside them.

A blob is one element of a process's ``link`` list (see names.py). It is a msgpack array:

    [version, kind, source, stream, sequence, ack_stream, ack, frames]

    kind        DATA carries frames and a sequence number; ACK, GAP, PING, PONG and RESET carry neither
    source      id of the process that sent the blob
    stream      random id of the sender's direction, chosen by it, greater than all it chose before; 0 where it has
                none yet
    sequence    1, 2, 3 … for DATA; for PING a number that its PONG repeats; else 0
    ack_stream  the receiver's own stream that ``ack`` speaks about; for RESET the stream that is refused
    ack         every DATA blob of ``ack_stream`` up to and including this one has been taken

A frame is a msgpack array whose first element is its kind; the second and third are, where a frame speaks
about a client connection, the connection's number at its interface server and its epoch (how often it
changed its owner, from 1). Frames are encoded once, when they are queued, and joined into blobs as bytes.

    CLAIM           worker -> interface   connection, epoch           I took the opening: is it mine?
    GRANT           interface -> worker   connection, epoch           it is yours
    CLOSED          both                  connection, epoch           I do not hold this (any more)
    EVENT           both                  connection, epoch, payload  an ASGI event, or its last piece
    PIECE           both                  connection, epoch, payload  a piece of an event; more follow
    LAST            interface -> worker   connection, epoch, payload  the disconnect event; costs no credit
    GONE            interface -> worker   connection, epoch           the client is gone: send() fails from now on;
                                                                      events it sent before may still follow
    CREDIT          both                  connection, epoch, total    bytes of events consumed since the start
    RECEIVING       worker -> interface   connection, epoch           the application waits for the request body
    END             worker -> interface   connection, epoch, outcome  the application instance is over (Outcome)
    EVENTS          worker -> interface   [[connection, epoch], …], payload   one event for many connections
    GROUP_SEND      both                  group, payload              deliver to your members of the group
    GROUP_ADD       both                  connection, epoch, request, group     epoch 0: not fenced
    GROUP_DISCARD   both                  connection, epoch, request, group
    GROUP_ANSWER    both                  request, done               the answer to the two above
    BYE             both                                              nothing follows; in sequence
    STATE           worker -> interface   connection, epoch, received, flags, state    a checkpoint of the application
                                                                      that had received so many messages
                                                                      (STATE_NOTIFY, STATE_COMMIT; state as bytes)
    RELEASE         worker -> interface   connection, epoch           the application stands still, its last state
                                                                      covers all it received: move it if you can
    RELEASED        interface -> worker   connection, epoch, moved    True: it is not yours any more; False: go on
    ADOPT           interface -> worker   connection, epoch, opening, state, carried     GRANT where another worker
                                                                      was owner: first opening, last state (or b""),
                                                                      bytes of events that the client has yet to take
    ANSWER          worker -> interface   connection, epoch, status, headers, body     this is all of the response:
                                                                      its events and END in one, never answered; of a
                                                                      safe request that nobody has, also the CLAIM

Kinds 32-47 belong to hand-over (docs/handover.md). A CLAIM with a fourth field, True, takes ADOPT for an answer. A
receiver answers a kind that it does not know with nothing and counts it. To add a frame: a number here, a build_
function, a row above, and its reader in interface_server/connections.py or worker/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

import msgpack

from channel_layer.enums import quick
from channel_layer.errors import WireError, repr_short

__all__ = [
    "BLOB_VERSION",
    "SINCE_VERSION_2",
    "STATE_COMMIT",
    "STATE_NOTIFY",
    "WIRE_VERSION",
    "WIRE_VERSION_PREVIOUS",
    "Blob",
    "BlobKind",
    "Frame",
    "FrameKind",
    "Outcome",
    "build_adopt",
    "build_answer",
    "build_blob",
    "build_bye",
    "build_claim",
    "build_closed",
    "build_credit",
    "build_end",
    "build_event",
    "build_events",
    "build_gone",
    "build_grant",
    "build_group_add",
    "build_group_answer",
    "build_group_discard",
    "build_group_send",
    "build_last",
    "build_piece",
    "build_receiving",
    "build_release",
    "build_released",
    "build_state",
    "decode_blob",
]

# What this release speaks, and the oldest that it still reads. docs/decisions/0018-wire-versions.md says what has to
# be done for a new one. An interface server's openings say which one it speaks.
#   1  kinds up to BYE
#   2  ANSWER, and hand-over
WIRE_VERSION: Final = 2
WIRE_VERSION_PREVIOUS: Final = 1
# The layout of a blob is still the one of version 1: what has changed is which frames may be in it.
BLOB_VERSION: Final = 1

# Flags of STATE; a receiver ignores those that it does not know.
STATE_NOTIFY: Final = 1
STATE_COMMIT: Final = 2

# A decoded frame: its kind, then the fields of the table above. A list because that is what msgpack makes,
# and because the frames of a busy process are not worth an object each.
Frame = list[Any]


@quick
class BlobKind(IntEnum):
    DATA = 0
    ACK = 1
    GAP = 2
    PING = 3
    PONG = 4
    RESET = 5


@quick
class FrameKind(IntEnum):
    CLAIM = 1
    GRANT = 2
    CLOSED = 3
    EVENT = 4
    PIECE = 5
    LAST = 6
    GONE = 7
    CREDIT = 8
    RECEIVING = 9
    END = 10
    EVENTS = 11
    GROUP_SEND = 12
    GROUP_ADD = 13
    GROUP_DISCARD = 14
    GROUP_ANSWER = 15
    BYE = 16
    ANSWER = 17
    # Hand-over.
    STATE = 32
    RELEASE = 33
    RELEASED = 34
    ADOPT = 35


# Kinds that an interface server of version 1 does not know; workers send them to others only.
SINCE_VERSION_2: Final = frozenset(
    map(int, (FrameKind.ANSWER, FrameKind.STATE, FrameKind.RELEASE, FrameKind.RELEASED, FrameKind.ADOPT))
)


@quick
class Outcome(IntEnum):
    """How an application instance ended."""

    RETURNED = 0
    RAISED = 1
    CANCELLED = 2


class Blob(NamedTuple):
    """A decoded blob; the fields are those of the module's docstring."""

    kind: BlobKind
    source: str
    stream: int
    sequence: int
    ack_stream: int
    ack: int
    frames: list[Frame]


_pack: Callable[[object], bytes] = msgpack.Packer(use_bin_type=True, autoreset=True).pack
_KINDS: Final = {int(kind): kind for kind in BlobKind}
# The fixed fields of each kind that a receiver relies on, by type, behind the kind itself.
_FIELDS: Final[dict[int, tuple[type, ...]]] = {
    FrameKind.CLAIM: (int, int),
    FrameKind.GRANT: (int, int),
    FrameKind.CLOSED: (int, int),
    FrameKind.EVENT: (int, int, bytes),
    FrameKind.PIECE: (int, int, bytes),
    FrameKind.LAST: (int, int, bytes),
    FrameKind.GONE: (int, int),
    FrameKind.CREDIT: (int, int, int),
    FrameKind.RECEIVING: (int, int),
    FrameKind.END: (int, int, int),
    FrameKind.EVENTS: (list, bytes),
    FrameKind.GROUP_SEND: (str, bytes),
    FrameKind.GROUP_ADD: (int, int, int, str),
    FrameKind.GROUP_DISCARD: (int, int, int, str),
    FrameKind.GROUP_ANSWER: (int, bool),
    FrameKind.BYE: (),
    FrameKind.STATE: (int, int, int, int, bytes),
    FrameKind.RELEASE: (int, int),
    FrameKind.RELEASED: (int, int, bool),
    FrameKind.ADOPT: (int, int, bytes, bytes, int),
    FrameKind.ANSWER: (int, int, int, list, bytes),
}
# The same, by the types of a whole frame: one look-up instead of a loop over the fields of each frame.
_KINDS_BY_SHAPE: Final[dict[tuple[type, ...], set[int]]] = {}
for _kind, _fields in _FIELDS.items():
    _KINDS_BY_SHAPE.setdefault((int, *_fields), set()).add(_kind)


def build_blob(
    kind: BlobKind,
    *,
    source: str,
    stream: int = 0,
    sequence: int = 0,
    ack_stream: int = 0,
    ack: int = 0,
    frames: Sequence[bytes] = (),
) -> bytes:
    """Encode a blob; ``frames`` are encoded already."""
    head = _pack([BLOB_VERSION, int(kind), source, stream, sequence, ack_stream, ack])
    # The array has eight elements; the first seven were packed as an array of seven (0x97), so one byte changes.
    count = len(frames)
    if count < 16:
        mark = bytes((0x90 | count,))
    elif count < 65536:
        mark = b"\xdc" + count.to_bytes(2, "big")
    else:
        mark = b"\xdd" + count.to_bytes(4, "big")
    return b"".join((b"\x98", head[1:], mark, *frames))


def decode_blob(data: bytes) -> Blob:
    """Decode and check a blob. Raises WireError, which names what was wrong."""
    try:
        fields = msgpack.unpackb(data, raw=False, strict_map_key=True, use_list=True)
    except Exception as error:  # msgpack raises half a dozen unrelated types
        raise WireError(f"link blob of {len(data)} bytes is not msgpack: {error}") from error
    if not isinstance(fields, list) or not fields:
        raise WireError(f"link blob is a {type(fields).__name__}, expected an array")
    if fields[0] != BLOB_VERSION:
        raise WireError(f"link blob has version {repr_short(fields[0])}, this release reads {BLOB_VERSION}")
    if len(fields) != 8:
        raise WireError(f"link blob has {len(fields)} fields, expected 8")
    _, kind, source, stream, sequence, ack_stream, ack, frames = fields
    known = _KINDS.get(kind) if type(kind) is int else None
    numbers_ok = all(type(n) is int and n >= 0 for n in (stream, sequence, ack_stream, ack))
    if known is None or type(source) is not str or not numbers_ok or type(frames) is not list:
        raise WireError(f"link blob has a malformed head: {repr_short(fields[:7])}")
    for index, frame in enumerate(frames):
        # Nearly every frame is exactly as this release writes it; the rest is looked at field by field.
        kinds = _KINDS_BY_SHAPE.get(tuple(map(type, frame))) if type(frame) is list else None
        if kinds is None or frame[0] not in kinds:
            _check_frame(frame, index)
    return Blob(known, source, stream, sequence, ack_stream, ack, frames)


def _check_frame(frame: object, index: int) -> None:
    if type(frame) is not list or not frame or type(frame[0]) is not int:
        raise WireError(f"frame {index} of a link blob has no kind: {repr_short(frame)}")
    expected = _FIELDS.get(frame[0])
    if expected is None:
        return  # a newer release's: the receiver counts it
    # A later release may append fields, so only the known ones are checked.
    if len(frame) <= len(expected) or any(
        type(value) is not kind for value, kind in zip(frame[1:], expected, strict=False)
    ):
        if not expected:
            return
        raise WireError(f"frame {index} of a link blob is malformed: {repr_short(frame)}")


def build_answer(connection: int, epoch: int, status: int, headers: Sequence[Sequence[bytes]], body: bytes) -> bytes:
    return _pack([17, connection, epoch, status, headers, body])


def build_claim(connection: int, epoch: int, *, adopts: bool = False) -> bytes:
    """``adopts``: the claim of a connection that had an owner, by a worker that knows ADOPT."""
    return _pack([int(FrameKind.CLAIM), connection, epoch, *((True,) if adopts else ())])


def build_grant(connection: int, epoch: int) -> bytes:
    return _pack([int(FrameKind.GRANT), connection, epoch])


def build_closed(connection: int, epoch: int) -> bytes:
    return _pack([int(FrameKind.CLOSED), connection, epoch])


def build_event(connection: int, epoch: int, payload: bytes) -> bytes:
    return _pack([4, connection, epoch, payload])


def build_piece(connection: int, epoch: int, payload: bytes) -> bytes:
    return _pack([5, connection, epoch, payload])


def build_last(connection: int, epoch: int, payload: bytes) -> bytes:
    return _pack([int(FrameKind.LAST), connection, epoch, payload])


def build_gone(connection: int, epoch: int) -> bytes:
    return _pack([int(FrameKind.GONE), connection, epoch])


def build_credit(connection: int, epoch: int, total: int) -> bytes:
    return _pack([8, connection, epoch, total])


def build_receiving(connection: int, epoch: int) -> bytes:
    return _pack([int(FrameKind.RECEIVING), connection, epoch])


def build_end(connection: int, epoch: int, outcome: Outcome) -> bytes:
    return _pack([int(FrameKind.END), connection, epoch, int(outcome)])


def build_events(addressees: Sequence[tuple[int, int]], payload: bytes) -> bytes:
    return _pack([int(FrameKind.EVENTS), list(addressees), payload])


def build_group_send(group: str, payload: bytes) -> bytes:
    return _pack([int(FrameKind.GROUP_SEND), group, payload])


def build_group_add(connection: int, epoch: int, request: int, group: str) -> bytes:
    return _pack([int(FrameKind.GROUP_ADD), connection, epoch, request, group])


def build_group_discard(connection: int, epoch: int, request: int, group: str) -> bytes:
    return _pack([int(FrameKind.GROUP_DISCARD), connection, epoch, request, group])


def build_group_answer(request: int, done: bool) -> bytes:
    return _pack([int(FrameKind.GROUP_ANSWER), request, done])


def build_state(connection: int, epoch: int, received: int, flags: int, state: bytes) -> bytes:
    return _pack([int(FrameKind.STATE), connection, epoch, received, flags, state])


def build_release(connection: int, epoch: int) -> bytes:
    return _pack([int(FrameKind.RELEASE), connection, epoch])


def build_released(connection: int, epoch: int, moved: bool) -> bytes:
    return _pack([int(FrameKind.RELEASED), connection, epoch, moved])


def build_adopt(connection: int, epoch: int, opening: bytes, state: bytes, carried_bytes: int) -> bytes:
    return _pack([int(FrameKind.ADOPT), connection, epoch, opening, state, carried_bytes])


def build_bye() -> bytes:
    return _pack([int(FrameKind.BYE)])
