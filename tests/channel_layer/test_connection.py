"""channel_layer/connection.py: events arrive whole and in order, within the window, and nobody waits for ever."""

from __future__ import annotations

from collections import deque

import msgpack
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from channel_layer.connection import (
    PIECE_BYTES_MAX,
    WINDOW_BYTES,
    FlowControlError,
    IncomingEvents,
    OutgoingEvents,
)
from channel_layer.frames import FrameKind, build_credit, build_event, build_last, build_piece

KIB = 1024


def kinds(frames: list[bytes]) -> list[str]:
    return [FrameKind(msgpack.unpackb(frame)[0]).name for frame in frames]


def payload_sizes(frames: list[bytes]) -> list[int]:
    return [len(msgpack.unpackb(frame)[3]) for frame in frames]


def pass_on(frames: list[bytes], incoming: IncomingEvents) -> tuple[list[tuple[bytes, int]], list[bytes]]:
    """Give frames to the receiver; return its complete events and the CREDIT frames it wants to send."""
    events, credits = [], []
    for frame in frames:
        kind, _, _, payload = msgpack.unpackb(frame)
        complete = incoming.receive(kind, payload)
        if complete is not None:
            events.append(complete)
        else:
            credit = incoming.credit_frame()
            if credit is not None:
                credits.append(credit)
    return events, credits


def total_of(credit: bytes | None) -> int:
    assert credit is not None
    kind, _, _, total = msgpack.unpackb(credit)
    assert kind == FrameKind.CREDIT
    return total


# The sender


def test_a_small_event_leaves_at_once_as_one_frame() -> None:
    outgoing = OutgoingEvents(7, 2)
    outgoing.offer(b"event")
    assert not outgoing.is_empty
    assert outgoing.frames() == [build_event(7, 2, b"event")]
    assert outgoing.is_empty
    assert outgoing.waiting_bytes == 0
    assert outgoing.frames() == []


def test_an_event_costs_64_bytes_at_least() -> None:
    outgoing = OutgoingEvents(1, 1, 1024)
    for _ in range(17):
        outgoing.offer(b"")
    assert len(outgoing.frames()) == 16
    assert outgoing.waiting_bytes == 64
    outgoing.credit(64)
    assert len(outgoing.frames()) == 1
    assert outgoing.statistics().sent_bytes == 17 * 64


def test_large_events_are_cut_into_pieces_of_64_kib() -> None:
    outgoing = OutgoingEvents(1, 1)
    outgoing.offer(b"x" * (130 * KIB))
    frames = outgoing.frames()
    assert kinds(frames) == ["PIECE", "PIECE", "EVENT"]
    assert payload_sizes(frames) == [64 * KIB, 64 * KIB, 2 * KIB]


def test_a_body_chunk_of_64_kib_with_its_keys_travels_in_one_frame() -> None:
    outgoing = OutgoingEvents(1, 1)
    outgoing.offer(b"x" * (PIECE_BYTES_MAX + 60))
    assert kinds(outgoing.frames()) == ["EVENT"]
    outgoing.offer(b"x" * (PIECE_BYTES_MAX + KIB + 1))
    assert kinds(outgoing.frames()) == ["PIECE", "EVENT"]


def test_the_sender_stops_at_the_window_and_goes_on_with_credit() -> None:
    outgoing = OutgoingEvents(1, 1, 4096)
    for _ in range(5):
        outgoing.offer(b"x" * 1000)
    assert len(outgoing.frames()) == 4
    assert outgoing.waiting_bytes == 1000
    outgoing.credit(903)
    assert outgoing.frames() == []
    outgoing.credit(904)
    assert len(outgoing.frames()) == 1


def test_the_last_event_costs_nothing_and_follows_everything_offered() -> None:
    outgoing = OutgoingEvents(1, 1, 1024)
    for _ in range(17):
        outgoing.offer(b"")
    outgoing.offer_last(b"bye")
    assert kinds(outgoing.frames()) == ["EVENT"] * 16
    assert not outgoing.is_empty
    outgoing.credit(512)
    frames = outgoing.frames()
    assert kinds(frames) == ["EVENT", "LAST"]
    assert frames[1] == build_last(1, 1, b"bye")
    assert outgoing.is_empty
    assert outgoing.statistics().sent_bytes == 17 * 64


def test_the_last_event_needs_no_credit_at_all() -> None:
    outgoing = OutgoingEvents(1, 1, 1024)
    for _ in range(16):
        outgoing.offer(b"")
    outgoing.frames()
    outgoing.offer_last(b"bye")
    assert kinds(outgoing.frames()) == ["LAST"]


def test_nothing_can_be_offered_behind_the_last_event() -> None:
    outgoing = OutgoingEvents(1, 1)
    outgoing.offer_last(b"bye")
    with pytest.raises(RuntimeError, match="behind the last"):
        outgoing.offer(b"more")
    with pytest.raises(RuntimeError, match="already"):
        outgoing.offer_last(b"again")
    assert not outgoing.admit(b"more")


def test_credit_that_is_older_than_another_is_ignored() -> None:
    outgoing = OutgoingEvents(1, 1, 1024)
    outgoing.offer(b"x" * 200)
    outgoing.frames()
    outgoing.credit(200)
    outgoing.credit(100)
    assert outgoing.statistics().credited_bytes == 200


def test_credit_for_more_than_was_sent_is_refused() -> None:
    outgoing = OutgoingEvents(1, 1)
    outgoing.offer(b"x" * 100)
    outgoing.frames()
    with pytest.raises(FlowControlError, match="101 bytes, of which 100 were sent"):
        outgoing.credit(101)


def test_an_admitted_event_is_charged_but_not_framed() -> None:
    outgoing = OutgoingEvents(1, 1, 1024)
    assert outgoing.admit(b"x" * 256)
    assert outgoing.frames() == []
    assert outgoing.statistics().sent_bytes == 256
    assert not outgoing.admit(b"x" * 300)  # more than a piece
    for _ in range(3):
        assert outgoing.admit(b"x" * 256)
    assert not outgoing.admit(b"")  # the window is used up
    outgoing.credit(64)
    outgoing.offer(b"x" * 100)
    assert outgoing.frames() == []
    assert not outgoing.admit(b"")  # it would overtake the one that waits


def test_windows_too_small_to_work_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1024"):
        OutgoingEvents(1, 1, 1023)
    with pytest.raises(ValueError, match="at least 1024"):
        IncomingEvents(1, 1, 1023)


# The receiver


def test_pieces_become_the_event_again() -> None:
    incoming = IncomingEvents(1, 1)
    assert incoming.receive(FrameKind.PIECE, b"a" * 100) is None
    assert incoming.receive(FrameKind.PIECE, b"b" * 100) is None
    assert incoming.receive(FrameKind.EVENT, b"c") == (b"a" * 100 + b"b" * 100 + b"c", 201)
    assert incoming.receive(FrameKind.EVENT, b"d") == (b"d", 64)


def test_an_event_of_small_pieces_still_costs_64_bytes() -> None:
    incoming = IncomingEvents(1, 1)
    incoming.receive(FrameKind.PIECE, b"a")
    assert incoming.receive(FrameKind.EVENT, b"") == (b"a", 64)
    assert incoming.unconsumed_bytes == 64


def test_credit_comes_at_a_quarter_of_the_window() -> None:
    incoming = IncomingEvents(9, 3, 1024)
    costs = []
    for _ in range(4):
        complete = incoming.receive(FrameKind.EVENT, b"")
        assert complete is not None
        costs.append(complete[1])
    assert [incoming.consume(cost) for cost in costs] == [None, None, None, build_credit(9, 3, 256)]
    assert incoming.credit_frame() is None


def test_the_last_event_costs_its_receiver_nothing() -> None:
    incoming = IncomingEvents(1, 1, 1024)
    for _ in range(16):
        incoming.receive(FrameKind.EVENT, b"")
    assert incoming.receive(FrameKind.LAST, b"bye") == (b"bye", 0)


def test_a_sender_beyond_the_window_is_caught() -> None:
    incoming = IncomingEvents(1, 1, 1024)
    for _ in range(16):
        incoming.receive(FrameKind.EVENT, b"")
    with pytest.raises(FlowControlError, match="exceed the window"):
        incoming.receive(FrameKind.EVENT, b"")
    with pytest.raises(FlowControlError, match="exceed the window"):
        incoming.receive(FrameKind.PIECE, b"x")
    assert incoming.unconsumed_bytes == 1024


def test_an_event_larger_than_allowed_is_refused_while_it_is_assembled() -> None:
    incoming = IncomingEvents(1, 1, event_bytes_max=1000)
    with pytest.raises(FlowControlError, match="allowed are 1000"):
        incoming.receive(FrameKind.EVENT, b"x" * 1001)
    assert incoming.receive(FrameKind.EVENT, b"x" * 1000) is not None
    assert incoming.receive(FrameKind.PIECE, b"x" * 999) is None
    with pytest.raises(FlowControlError, match="over 1001 bytes"):
        incoming.receive(FrameKind.PIECE, b"xx")


@pytest.mark.parametrize("kind", [FrameKind.PIECE, FrameKind.LAST, FrameKind.GRANT])
def test_frames_that_no_release_sends_are_refused(kind: FrameKind) -> None:
    incoming = IncomingEvents(1, 1)
    incoming.receive(FrameKind.PIECE, b"begun")
    with pytest.raises(FlowControlError):
        incoming.receive(kind, b"")


# Early credit


def test_the_rest_of_a_message_larger_than_the_window_is_granted_early() -> None:
    outgoing, incoming = OutgoingEvents(1, 1, 1024), IncomingEvents(1, 1, 1024)
    outgoing.offer(b"x" * 3000)
    frames = outgoing.frames()
    assert kinds(frames) == ["PIECE"] * 4
    events, credits = pass_on(frames, incoming)
    assert events == []
    assert [total_of(credit) for credit in credits] == [256, 512, 768, 1024]
    outgoing.credit(1024)
    events, credits = pass_on(outgoing.frames(), incoming)
    outgoing.credit(total_of(credits[-1]))
    events, credits = pass_on(outgoing.frames(), incoming)
    assert events == [(b"x" * 3000, 3000)]


def test_no_early_credit_while_a_complete_event_waits() -> None:
    incoming = IncomingEvents(1, 1, 1024)
    incoming.receive(FrameKind.EVENT, b"")
    incoming.receive(FrameKind.PIECE, b"x" * 256)
    incoming.receive(FrameKind.PIECE, b"x" * 256)
    assert incoming.credit_frame() is None
    # Consuming it grants the rest of the message that has begun.
    assert total_of(incoming.consume(64)) == 64 + 512


def test_nothing_begins_behind_a_message_that_used_early_credit_until_it_is_consumed() -> None:
    outgoing, incoming = OutgoingEvents(1, 1, 1024), IncomingEvents(1, 1, 1024)
    outgoing.offer(b"x" * 1500)
    outgoing.offer(b"next")
    events: list[tuple[bytes, int]] = []
    while not events:
        complete, credits = pass_on(outgoing.frames(), incoming)
        events += complete
        for credit in credits:
            outgoing.credit(total_of(credit))
    assert outgoing.frames() == []
    assert incoming.unconsumed_bytes == 1500
    # Fewer than a quarter of the window is new, and still the sender must be told.
    outgoing.credit(total_of(incoming.consume(1500)))
    assert pass_on(outgoing.frames(), incoming)[0] == [(b"next", 64)]


def test_a_second_large_message_does_not_use_the_early_credit_of_the_first() -> None:
    outgoing, incoming = OutgoingEvents(1, 1, 1024), IncomingEvents(1, 1, 1024)
    outgoing.offer(b"x" * 600)
    _, credits = pass_on(outgoing.frames(), incoming)
    outgoing.credit(total_of(credits[-1]))
    outgoing.offer(b"y" * 3000)
    pass_on(outgoing.frames(), incoming)
    assert incoming.unconsumed_bytes <= 1024


# All of it together


class Stream(RuleBasedStateMachine):
    """A sender, a receiver and its reader, with frames and credits under way in both directions."""

    @initialize(window_bytes=st.sampled_from([1024, 1500, 4096]))
    def begin(self, window_bytes: int) -> None:
        self.window_bytes = window_bytes
        self.outgoing = OutgoingEvents(1, 1, window_bytes)
        self.incoming = IncomingEvents(1, 1, window_bytes)
        self.frames_under_way: deque[bytes] = deque()
        self.credits_under_way: deque[int] = deque()
        self.offered: list[bytes] = []
        self.delivered: list[bytes] = []
        self.unread: deque[tuple[bytes, int]] = deque()
        self.count = 0
        self.ended = False

    def event(self, size: int) -> bytes:
        self.count += 1
        return (b"%d:" % self.count).ljust(size, b".")

    def send(self) -> None:
        self.frames_under_way.extend(self.outgoing.frames())

    def send_credit(self, credit: bytes | None) -> None:
        if credit is not None:
            self.credits_under_way.append(total_of(credit))

    @precondition(lambda self: not self.ended)
    @rule(size=st.one_of(st.integers(0, 300), st.integers(0, 12_000)))
    def offer(self, size: int) -> None:
        event = self.event(size)
        self.offered.append(event)
        self.outgoing.offer(event)
        self.send()

    @precondition(lambda self: not self.ended)
    @rule(size=st.integers(0, 400))
    def admit(self, size: int) -> None:
        event = self.event(size)
        if self.outgoing.admit(event):
            self.offered.append(event)
            self.frames_under_way.append(build_event(1, 1, event))

    @precondition(lambda self: not self.ended)
    @rule()
    def offer_last(self) -> None:
        self.ended = True
        self.offered.append(b"last")
        self.outgoing.offer_last(b"last")
        self.send()

    @rule(count=st.integers(1, 20))
    def deliver_frames(self, count: int) -> None:
        for _ in range(min(count, len(self.frames_under_way))):
            kind, _, _, payload = msgpack.unpackb(self.frames_under_way.popleft())
            complete = self.incoming.receive(kind, payload)
            if complete is not None:
                self.unread.append(complete)
            else:
                self.send_credit(self.incoming.credit_frame())

    @rule(count=st.integers(1, 20))
    def read(self, count: int) -> None:
        for _ in range(min(count, len(self.unread))):
            event, cost = self.unread.popleft()
            self.delivered.append(event)
            self.send_credit(self.incoming.consume(cost))

    @rule()
    def read_several_at_once(self) -> None:
        self.delivered.extend(event for event, _ in self.unread)
        cost = sum(cost for _, cost in self.unread)
        self.unread.clear()
        self.send_credit(self.incoming.consume(cost))

    @rule(count=st.integers(1, 5))
    def deliver_credits(self, count: int) -> None:
        for _ in range(min(count, len(self.credits_under_way))):
            self.outgoing.credit(self.credits_under_way.popleft())
        self.send()

    @invariant()
    def in_order(self) -> None:
        if hasattr(self, "offered"):
            assert self.delivered == self.offered[: len(self.delivered)]

    @invariant()
    def no_buffer_exceeds_its_window(self) -> None:
        if not hasattr(self, "offered"):
            return
        # The receiver holds a window or one message, whichever is larger, and so does the way to it.
        largest = max([self.window_bytes, *map(len, self.offered)])
        assert self.incoming.unconsumed_bytes <= largest
        assert self.outgoing.statistics().sent_bytes - self.incoming.statistics().consumed_bytes <= largest
        assert len(self.outgoing._spans) <= 5
        # What waits at the sender is exactly what was offered and has not left.
        costs = sum(max(64, len(event)) for event in self.offered if event != b"last")
        assert self.outgoing.waiting_bytes == costs - self.outgoing.statistics().sent_bytes

    def teardown(self) -> None:
        if not hasattr(self, "offered"):
            return
        # As long as the reader reads and frames and credits arrive, everything does.
        while self.frames_under_way or self.credits_under_way or self.unread:
            self.deliver_frames(1000)
            self.read(1)
            self.deliver_credits(1000)
            self.in_order()
            self.no_buffer_exceeds_its_window()
        assert self.delivered == self.offered
        assert self.outgoing.is_empty
        assert self.incoming.unconsumed_bytes == 0


Stream.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestStream = Stream.TestCase


def test_one_mebibyte_passes_a_default_window() -> None:
    outgoing, incoming = OutgoingEvents(1, 1), IncomingEvents(1, 1)
    event = bytes(range(256)) * 4096
    outgoing.offer(event)
    rounds = 0
    while True:
        events, credits = pass_on(outgoing.frames(), incoming)
        rounds += 1
        if events:
            break
        outgoing.credit(total_of(credits[-1]))
    assert events == [(event, len(event))]
    assert rounds == len(event) // WINDOW_BYTES


def test_representations_show_the_state() -> None:
    outgoing, incoming = OutgoingEvents(5, 2), IncomingEvents(5, 2)
    outgoing.offer(b"x" * 100)
    pass_on(outgoing.frames(), incoming)
    assert "5/2: sent 100, credited 0" in repr(outgoing)
    assert "5/2: received 100, consumed 0" in repr(incoming)
    assert incoming.statistics().received_bytes == 100


def test_a_piece_is_not_confused_with_a_frame_of_another_kind() -> None:
    outgoing = OutgoingEvents(1, 1, 1024)
    outgoing.offer(b"x" * 300)
    assert outgoing.frames() == [build_piece(1, 1, b"x" * 256), build_event(1, 1, b"x" * 44)]
