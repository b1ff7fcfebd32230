"""A hostile or broken peer on the broker: whatever stands in an element is read, or refused by name.

Refused means a WireError (or FlowControlError), which the readers count; anything else would be a fault of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channel_layer import mail
from channel_layer.codec import decode_event, decode_message, encode_message
from channel_layer.connection import FlowControlError, IncomingEvents, OutgoingEvents
from channel_layer.errors import WireError
from channel_layer.frames import BLOB_VERSION, WIRE_VERSION, Blob, BlobKind, FrameKind, build_blob, decode_blob
from channel_layer.link import Link, LinkSettings
from channel_layer.links import Links
from channel_layer.openings import Opening, decode_opening, encode_opening

BOUNDED = settings(
    max_examples=500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
READERS = [decode_blob, decode_opening, decode_message, decode_event, mail.decode_letter]

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 2**64 - 1]),
    st.floats(),
    st.text(max_size=10),
    st.binary(max_size=10),
    st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4)),
)
KEYS = LEAVES.filter(lambda key: not isinstance(key, float) or not math.isnan(key))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=12,
)


def pack(value: Any) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=True))


@BOUNDED
@given(st.one_of(st.binary(max_size=200), VALUES.map(pack)))
def test_any_bytes(data: bytes) -> None:
    for read in READERS:
        with contextlib.suppress(WireError):
            read(data)


HEAD_FIELDS = st.lists(st.one_of(st.integers(0, 5), LEAVES), min_size=7, max_size=7)
# A frame as it should be, with one or more fields of another kind.
KINDS = st.one_of(st.sampled_from([int(kind) for kind in FrameKind]), st.integers(-1, 300))
FRAMES = st.tuples(KINDS, st.lists(st.one_of(st.integers(0, 5), VALUES), max_size=6)).map(lambda f: [f[0], *f[1]])


@BOUNDED
@given(HEAD_FIELDS, st.one_of(st.lists(st.one_of(FRAMES, VALUES), max_size=5), VALUES))
def test_any_blob(head: list[Any], frames: Any) -> None:
    with contextlib.suppress(WireError):
        decode_blob(pack([BLOB_VERSION, *head[1:], frames]))


@BOUNDED
@given(st.lists(st.one_of(st.sampled_from([True, 0, 1, "i1", b"", {}, {"type": "http"}, 4096]), VALUES), max_size=12))
def test_any_opening_and_any_letter(fields: list[Any]) -> None:
    for version, read in ((WIRE_VERSION, decode_opening), (mail.LETTER_VERSION, mail.decode_letter)):
        with contextlib.suppress(WireError):
            read(pack([version, *fields]))


OPENING = Opening(
    interface="i1", connection=1, epoch=1, reply_channel="interface.i1!1", scope={"type": "http"}, first_event=None
)


@BOUNDED
@given(st.integers(1, 8), VALUES)
def test_an_opening_with_one_field_of_another_kind(index: int, value: Any) -> None:
    fields = msgpack.unpackb(encode_opening(OPENING))
    fields[index] = value
    with contextlib.suppress(WireError):
        opening = decode_opening(pack(fields))
        assert type(opening.connection) is int
        assert type(opening.scope) is dict
        assert opening.window_bytes >= 1024


PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=20),
        st.binary(max_size=20),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=5), inner, max_size=5)),
    max_leaves=20,
)


@BOUNDED
@given(st.dictionaries(st.text(max_size=5).filter(lambda key: not key.startswith("__")), PLAIN, max_size=5))
def test_what_is_allowed_comes_back(message: dict[str, Any]) -> None:
    assert decode_message(encode_message(message)) == message


LIES = [
    b"\xdd\xff\xff\xff\xff",  # an array of 4 G elements
    b"\xdf\xff\xff\xff\xff",  # a map of as many
    b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\x98" + b"\xdd\x7f\xff\xff\xff" * 8,
    b"\x91" * 100_000,  # deep
    b"\x81\xa1a" * 100_000,
    b"\xdc\xff\xff" + b"\x90" * 65535,
]


@pytest.mark.parametrize("data", LIES, ids=lambda data: data[:6].hex())
def test_lengths_that_lie_and_depth(data: bytes) -> None:
    for read in READERS:
        with pytest.raises(WireError) as refused:
            read(data)
        assert len(str(refused.value)) < 2000


def test_depth_that_msgpack_allows() -> None:
    for read in (decode_blob, decode_opening, decode_message, mail.decode_letter):
        for data in (b"\x91" * 500 + b"\xc0", b"\x81\xa1a" * 500 + b"\xc0"):
            with pytest.raises(WireError) as refused:
                read(data)
            assert len(str(refused.value)) < 2000


# Links


BLOBS = st.builds(
    Blob,
    kind=st.sampled_from(list(BlobKind)),
    source=st.sampled_from(["w1", "w1", "w1", "w2", "", "x" * 300]),
    stream=st.sampled_from([0, 1, 1, 1, 2, 7, 2**63, 2**64 - 1]),
    sequence=st.sampled_from([0, 1, 1, 2, 2, 3, 4, 2**64 - 1]),
    ack_stream=st.sampled_from([0, 1, 2, 2**63]),
    ack=st.sampled_from([0, 0, 1, 2, 2**63]),
    frames=st.lists(st.sampled_from([[1, 1, 1], [4, 1, 1, b"x"], [8, 1, 1, 2**63], [16], [200]]), max_size=3),
)


@BOUNDED
@given(st.lists(BLOBS, max_size=20), st.lists(st.integers(0, 5), max_size=20))
def test_any_blobs_on_a_link(blobs: list[Blob], moves: list[int]) -> None:
    link = Link(source="i1", peer="w1", new_id=iter(range(1, 1000)).__next__, settings=LinkSettings())
    now = 0.0
    for index, blob in enumerate(blobs):
        with contextlib.suppress(WireError):
            link.receive(blob, 100, now)
        move = moves[index] if index < len(moves) else 0
        now += 0.1
        if move == 1:
            link.send(b"\x93\x01\x01\x01")
        elif move == 2 and link.collect(now):
            link.push_answered(now)
        elif move == 3:
            link.reader_restored()
        elif move == 4:
            link.broker_restored(now)
        elif move == 5:
            link.give_up()
        link.next_deadline()
        link.statistics()
        assert link.unacknowledged_bytes >= 0
        assert link.queued_bytes >= 0


async def test_elements_of_any_kind_leave_the_reader_going(caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read is counted; what a frame breaks is told, and the next is delivered all the same."""
    delivered: list[Any] = []
    loop = asyncio.get_running_loop()
    links = Links(
        process_id="i1",
        push=lambda peer, blobs: _done(loop),
        frame_received=lambda peer, frame: delivered.append(frame),
        peer_ended=lambda peer, reason: None,
        peer_ready=lambda peer: None,
        loop=loop,
    )
    refused = 0
    for element in (
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 10_000,
        pack(None),
        pack([]),
        pack([2, 0, "w1", 1, 1, 0, 0, []]),
        pack([1, 0, "w1", 1, 0, 0, 0, []]),
        pack([1, 0, "w1", 1, 1, 0, 0, [[4, "1", 1, b""]]]),
        pack([1, 0, "w1", 1, 1, 0, 0, [[4]]]),
        pack([1, 0, "w1", 1, 1, 0, 0, ["frame"]]),
        pack([1, 9, "w1", 1, 1, 0, 0, []]),
        pack([1, 0, b"w1", 1, 1, 0, 0, []]),
        pack([1, 0, "w1", -1, 1, 0, 0, []]),
    ):
        links.receive_blob(element)
        refused += 1
    assert links.statistics().unreadable_blobs == refused
    for sequence in range(1, 4):
        links.receive_blob(build_blob(BlobKind.DATA, source="w1", stream=5, sequence=sequence, frames=[pack([200])]))
    assert delivered == [[200]] * 3
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR and record.exc_info]


def _done(loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
    future: asyncio.Future[None] = loop.create_future()
    future.set_result(None)
    return future


# Connections


@BOUNDED
@given(
    st.lists(st.tuples(st.sampled_from([4, 5, 6, 1, 300]), st.binary(max_size=300), st.integers(0, 400)), max_size=30)
)
def test_any_events_of_a_connection(steps: list[tuple[int, bytes, int]]) -> None:
    incoming = IncomingEvents(1, 1, 1024, event_bytes_max=4096)
    costs: list[int] = []
    for kind, payload, consume in steps:
        try:
            complete = incoming.receive(kind, payload)
        except FlowControlError:
            return  # the connection ends
        if complete is not None:
            costs.append(complete[1])
        assert incoming.partial_bytes <= 4096
        assert sum(costs) <= 1024 + 4096
        if consume % 2 and costs:
            incoming.consume(costs.pop(0))
        incoming.credit_frame()


@BOUNDED
@given(st.lists(st.one_of(st.integers(0, 2000), st.sampled_from([-1, 2**63])), max_size=30))
def test_any_credit(totals: list[int]) -> None:
    outgoing = OutgoingEvents(1, 1, 1024)
    for total in totals:
        outgoing.offer(bytes(300))
        outgoing.frames()
        try:
            outgoing.credit(total)
        except FlowControlError:
            return
        assert outgoing.waiting_bytes >= 0
