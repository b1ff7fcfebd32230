"""channel_layer/link.py: nothing lost, doubled or reordered between two live ends, and nobody waits for ever.

First one test per rule, then two machines: one plays the network against two ends, the other looks at the buffers.
"""

from __future__ import annotations

import itertools
from typing import Any

import msgpack
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from channel_layer.connection import IncomingEvents, OutgoingEvents
from channel_layer.errors import WireError
from channel_layer.frames import (
    Blob,
    BlobKind,
    FrameKind,
    build_blob,
    build_bye,
    build_event,
    build_group_send,
    decode_blob,
)
from channel_layer.link import FORGOTTEN, LEFT, RESET, RESTARTED, Link, LinkSettings, LinkState, Received

SMALL = LinkSettings(
    window_bytes=2000, blob_bytes=300, push_bytes=1000, congested_bytes=4000, ready_bytes=2000, ack_delay_s=0.03
)


def frame(number: int, size: int = 0) -> bytes:
    return build_group_send(str(number), b"." * size)


def numbers(frames: list[list[Any]]) -> list[int]:
    return [int(frame[1]) for frame in frames]


class End:
    """A link with names for what its tests do again and again."""

    def __init__(
        self,
        source: str = "ia",
        peer: str = "wb",
        *,
        first_id: int = 100,
        settings: LinkSettings | None = None,
        memory: tuple[int, int] = (0, 0),
    ) -> None:
        self.source = source
        self.link = Link(
            source=source,
            peer=peer,
            new_id=itertools.count(first_id).__next__,
            settings=settings or LinkSettings(),
            memory=memory,
        )

    def send(self, *sent: int, size: int = 0) -> None:
        for number in sent:
            self.link.send(frame(number, size))

    def push(self, now: float = 0.0) -> list[bytes]:
        """Collect, and let the broker answer at once."""
        blobs = self.link.collect(now)
        if blobs:
            self.link.push_answered(now)
        return blobs

    def take(self, blobs: list[bytes], now: float = 0.0) -> list[Received]:
        return [self.link.receive(decode_blob(blob), len(blob), now) for blob in blobs]

    def taken(self, blobs: list[bytes], now: float = 0.0) -> list[int]:
        return [number for received in self.take(blobs, now) for number in numbers(received.frames)]


def kinds(blobs: list[bytes]) -> list[str]:
    return [decode_blob(blob).kind.name for blob in blobs]


def pair(settings: LinkSettings | None = None) -> tuple[End, End]:
    return End("ia", "wb", settings=settings), End("wb", "ia", first_id=500, settings=settings)


def connected(settings: LinkSettings | None = None) -> tuple[End, End]:
    """Two ends that have heard of each other, at rest at time 0."""
    a, b = pair(settings)
    a.send(1)
    b.take(a.push())
    b.send(1)
    a.take(b.push())
    b.take(a.push(0.03), 0.03)
    assert a.link.is_acknowledged
    assert b.link.is_acknowledged
    assert a.link.next_deadline() is None
    return a, b


# Sending


def test_frames_of_one_turn_leave_as_one_numbered_blob() -> None:
    end = End()
    end.send(1, 2, 3)
    assert end.push() == [
        build_blob(BlobKind.DATA, source="ia", stream=100, sequence=1, frames=[frame(1), frame(2), frame(3)])
    ]
    end.send(4)
    assert end.push() == [build_blob(BlobKind.DATA, source="ia", stream=100, sequence=2, frames=[frame(4)])]


def test_frames_are_cut_into_blobs_of_64_kib_and_a_larger_one_goes_alone() -> None:
    end = End()
    end.send(1, size=40_000)
    end.send(2, size=20_000)
    end.send(3, size=100_000)
    end.send(4)
    frames = [[frame[1] for frame in decode_blob(blob).frames] for blob in end.push()]
    assert frames == [["1", "2"], ["3"], ["4"]]


def test_one_push_at_a_time() -> None:
    end = End()
    end.send(1)
    assert len(end.link.collect(0.0)) == 1
    end.send(2)
    assert end.link.collect(0.0) == []
    assert end.link.next_deadline() is None
    end.link.push_answered(0.0)
    assert len(end.link.collect(0.0)) == 1


def test_unacknowledged_bytes_stop_at_the_window_and_the_rest_waits() -> None:
    end = End(settings=SMALL)
    for number in range(20):
        end.send(number, size=250)
    blobs = end.push() + end.push() + end.push()
    assert SMALL.window_bytes <= end.link.unacknowledged_bytes < SMALL.window_bytes + 350
    assert end.link.queued_bytes > 0
    # An acknowledgement of two makes room for two.
    end.take([build_blob(BlobKind.ACK, source="wb", ack_stream=100, ack=2)])
    assert len(end.push()) == 2
    assert len(blobs) + 2 < 20


def test_a_push_is_limited_so_that_others_get_their_turn() -> None:
    end = End(settings=SMALL)
    for number in range(20):
        end.send(number, size=250)
    assert len(end.link.collect(0.0)) == 4


def test_congestion_has_a_high_and_a_low_mark() -> None:
    end = End(settings=SMALL)
    while not end.link.is_congested:
        end.send(1, size=250)
    assert SMALL.congested_bytes < end.link.queued_bytes < SMALL.congested_bytes + 350
    assert not end.link.became_ready()
    end.push()
    assert SMALL.ready_bytes < end.link.queued_bytes < SMALL.congested_bytes
    assert end.link.is_congested
    assert not end.link.became_ready()
    end.push()
    assert end.link.became_ready()
    assert not end.link.became_ready()
    assert not end.link.is_congested


# Acknowledging


def test_a_taken_blob_is_acknowledged_after_30_ms() -> None:
    a, b = pair()
    a.send(1)
    b.take(a.push())
    assert b.push(0.029) == []
    assert b.link.next_deadline() == 0.03
    assert b.push(0.03) == [build_blob(BlobKind.ACK, source="wb", ack_stream=100, ack=1)]
    assert b.link.next_deadline() is None


def test_data_carry_the_acknowledgement() -> None:
    a, b = pair()
    a.send(1)
    b.take(a.push())
    b.send(9)
    blobs = b.push()
    assert kinds(blobs) == ["DATA"]
    a.take(blobs)
    assert a.link.is_acknowledged
    assert b.push(1.0)[:1] != [build_blob(BlobKind.ACK, source="wb", ack_stream=100, ack=1)]


def test_a_quarter_of_the_window_is_acknowledged_at_once() -> None:
    a, b = pair(SMALL)
    a.send(1, size=200)
    b.take(a.push())
    assert b.push() == []
    a.send(2, size=300)
    b.take(a.push())
    assert kinds(b.push()) == ["ACK"]


def test_duplicates_are_dropped_and_acknowledged_again() -> None:
    a, b = pair()
    a.send(1)
    blobs = a.push()
    assert b.taken(blobs) == [1]
    b.push(0.03)
    assert b.taken(blobs) == []
    assert kinds(b.push(0.03)) == ["ACK"]
    assert b.link.statistics().duplicate_blobs == 1


# Gaps


def test_a_gap_is_reported_with_what_was_taken_last_and_everything_is_sent_again() -> None:
    a, b = pair()
    pushed = []
    for number in (1, 2, 3, 4):
        a.send(number)
        pushed += a.push()
    assert b.taken([pushed[0], pushed[2]]) == [1]
    report = b.push()
    assert report == [build_blob(BlobKind.GAP, source="wb", ack_stream=100, ack=1)]
    a.take(report)
    again = a.push()
    assert again[:-1] == pushed[1:]
    assert kinds(again)[-1] == "PING"
    assert b.taken(again) == [2, 3, 4]


def test_a_gap_is_reported_at_most_every_50_ms() -> None:
    a, b = pair()
    pushed = []
    for number in range(6):
        a.send(number)
        pushed += a.push()
    b.take([pushed[2]])
    assert kinds(b.push(0.0)) == ["GAP"]
    b.take([pushed[3]], 0.049)
    assert b.push(0.049) == []
    b.take([pushed[4]], 0.05)
    assert kinds(b.push(0.05)) == ["GAP"]


def test_a_stream_that_does_not_begin_with_1_is_a_gap() -> None:
    a, b = pair()
    a.send(1)
    first = a.push()
    a.send(2)
    second = a.push()
    assert b.taken(second) == []
    report = b.push()
    assert report == [build_blob(BlobKind.GAP, source="wb", ack_stream=100, ack=0)]
    a.take(report)
    assert a.push()[:2] == first + second


def test_gap_reports_from_before_are_ignored_until_the_pong() -> None:
    a, _ = pair()
    pushed = []
    for number in range(5):
        a.send(number)
        pushed += a.push()
    gap = build_blob(BlobKind.GAP, source="wb", ack_stream=100, ack=0)
    a.take([gap])
    assert len(a.push()) == 6
    a.take([gap, gap])
    assert a.push() == []
    # The peer read the PING and is still behind: what came again was lost as well.
    ping = decode_blob(build_blob(BlobKind.PING, source="ia", sequence=101))
    a.take([build_blob(BlobKind.PONG, source="wb", sequence=ping.sequence, ack_stream=100, ack=2)])
    assert a.push()[:-1] == pushed[2:]


def test_a_pong_that_knows_everything_pushed_before_its_ping_causes_nothing() -> None:
    a, b = connected()
    a.send(2)
    a.link.ping()
    b.take(a.push())
    a.send(3)
    a.push()
    a.take(b.push())
    assert a.push() == []
    assert not a.link.is_acknowledged


def test_the_reader_reports_its_place_after_it_was_restored() -> None:
    _, b = connected()
    b.link.reader_restored()
    assert b.push(1.0) == [build_blob(BlobKind.GAP, source="wb", stream=500, ack_stream=100, ack=1)]
    # Also right after another report.
    b.link.reader_restored()
    assert kinds(b.push(1.0)) == ["GAP"]


def test_a_reader_that_has_taken_nothing_has_nothing_to_report() -> None:
    end = End()
    end.link.reader_restored()
    assert end.push() == []


# Timeouts


def test_after_a_silence_the_first_unacknowledged_blob_is_sent_again_with_a_ping() -> None:
    end = End()
    end.send(1)
    first = end.push(0.0)
    end.send(2)
    end.push(0.1)
    assert end.link.next_deadline() == 0.4
    assert end.push(0.399) == []
    blobs = end.push(0.4)
    assert blobs[:1] == first
    assert kinds(blobs) == ["DATA", "PING"]


def test_the_timeout_doubles_up_to_five_seconds_and_progress_resets_it() -> None:
    end = End()
    end.send(1)
    end.push(0.0)
    end.send(2)
    end.push(0.0)
    now, waits = 0.0, []
    for _ in range(6):
        deadline = end.link.next_deadline()
        assert deadline is not None
        waits.append(round(deadline - now, 6))
        now = deadline
        assert end.push(now)
    assert waits == [0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    end.take([build_blob(BlobKind.ACK, source="wb", ack_stream=100, ack=1)], now)
    assert end.link.next_deadline() == now + 0.4


def test_the_timeout_runs_from_the_brokers_answer_and_never_beside_an_unanswered_push() -> None:
    end = End()
    end.send(1)
    end.link.collect(0.0)
    assert end.link.next_deadline() is None
    assert end.link.collect(100.0) == []
    end.link.push_answered(100.0)
    assert end.link.next_deadline() == 100.4


def test_steady_pushes_do_not_postpone_the_timeout_but_a_slow_broker_does() -> None:
    end = End()
    end.send(1)
    end.push(0.0)
    for step in range(1, 4):
        end.send(2)
        end.push(step / 10)
    assert end.link.next_deadline() == 0.4
    end.send(3)
    end.link.collect(0.35)
    end.link.push_answered(0.7)
    assert end.link.next_deadline() == pytest.approx(1.1)


def test_a_lost_tail_is_recovered_in_one_timeout_however_many_blobs_it_had() -> None:
    a, b = connected()
    for number in range(2, 50):
        a.send(number)
        a.push(1.0)
    deadline = a.link.next_deadline()
    assert deadline == pytest.approx(1.4)
    b.take(a.push(1.4), 1.4)
    a.take(b.push(1.4), 1.4)
    assert b.taken(a.push(1.4), 1.4) == list(range(3, 50))


def test_nothing_unacknowledged_needs_no_deadline() -> None:
    a, b = connected()
    assert a.link.next_deadline() is None
    assert b.link.next_deadline() is None
    assert a.push(1000.0) == []


# The broker


def test_nothing_happens_while_the_broker_is_away_and_everything_is_sent_again_after() -> None:
    end = End()
    end.send(1)
    first = end.push(0.0)
    end.link.broker_lost()
    end.send(2)
    end.link.ping()
    assert end.link.next_deadline() is None
    assert end.link.collect(100.0) == []
    end.link.broker_restored(200.0)
    blobs = end.link.collect(200.0)
    assert kinds(blobs) == ["DATA", "DATA", "PING"]
    assert blobs[:1] == first


def test_a_link_made_while_the_broker_is_away_waits_as_well() -> None:
    link = Link(source="ia", peer="wb", new_id=itertools.count(1).__next__, settings=SMALL, broker_away=True)
    link.send(frame(1))
    assert link.collect(0.0) == []
    link.broker_restored(1.0)
    assert len(link.collect(1.0)) == 1


@pytest.mark.parametrize("order", ["failed first", "lost first", "restored first"])
def test_a_push_that_failed_with_its_connection_is_sent_again_when_the_broker_is_back(order: str) -> None:
    end = End()
    end.send(1)
    first = end.link.collect(0.0)
    if order == "failed first":
        end.link.push_failed(0.1)
        end.link.broker_lost()
        end.link.broker_restored(0.2)
    elif order == "lost first":
        end.link.broker_lost()
        end.link.push_failed(0.1)
        end.link.broker_restored(0.2)
    else:
        end.link.broker_lost()
        end.link.broker_restored(0.2)
        assert end.link.collect(0.2) == []
        end.link.push_failed(0.2)
    assert end.link.collect(0.2)[:1] == first


def test_a_refused_push_is_tried_again_later_and_later() -> None:
    end = End()
    end.send(1)
    first = end.link.collect(0.0)
    end.link.push_failed(0.0)
    end.send(2)
    now, waits = 0.0, []
    for _ in range(6):
        deadline = end.link.next_deadline()
        assert deadline is not None
        waits.append(round(deadline - now, 6))
        assert end.link.collect(deadline - 0.001) == []
        now = deadline
        assert end.link.collect(now)[:1] == first
        end.link.push_failed(now)
    assert waits == [0.4, 0.8, 1.0, 1.0, 1.0, 1.0]


def test_a_ping_in_a_refused_push_is_sent_again() -> None:
    end = End()
    end.link.ping()
    assert [decode_blob(blob).kind for blob in end.link.collect(0.0)] == [BlobKind.PING]
    end.link.push_failed(0.0)
    deadline = end.link.next_deadline()
    assert deadline is not None
    assert [decode_blob(blob).kind for blob in end.link.collect(deadline)] == [BlobKind.PING]


def test_an_acknowledgement_in_a_failed_push_is_sent_again() -> None:
    a, b = pair()
    a.send(1)
    b.take(a.push())
    assert kinds(b.link.collect(0.03)) == ["ACK"]
    b.link.push_failed(0.03)
    deadline = b.link.next_deadline()
    assert deadline is not None
    assert kinds(b.link.collect(deadline)) == ["ACK"]


def test_the_place_is_acknowledged_again_after_the_broker_was_away() -> None:
    _, b = connected()
    b.link.broker_lost()
    b.link.broker_restored(1.0)
    assert kinds(b.push(1.0)) == ["ACK"]


# Pings


def test_a_ping_is_answered_at_once_and_beside_a_full_window() -> None:
    a, b = connected(SMALL)
    for number in range(20):
        b.send(number, size=250)
    while b.push():
        pass
    a.link.ping()
    ping = a.push(1.0)
    assert kinds(ping) == ["PING"]
    b.take(ping, 1.0)
    pong = b.push(0.1)
    assert kinds(pong) == ["PONG"]
    assert decode_blob(pong[0]).sequence == decode_blob(ping[0]).sequence
    a.take(pong, 2.5)
    assert a.link.heard_at == 2.5


def test_a_stranger_is_answered_and_leaves_nothing_behind() -> None:
    end = End()
    end.take([build_blob(BlobKind.PING, source="wb", sequence=7)])
    assert not end.link.is_forgettable
    assert end.push() == [build_blob(BlobKind.PONG, source="ia", sequence=7)]
    assert end.link.is_forgettable


def test_who_has_said_goodbye_is_asked_no_more_and_forgotten() -> None:
    a, b = connected(SMALL)
    b.link.leave()
    a.take(b.push())
    b.take(a.push())
    assert a.link.is_forgettable
    a.link.ping()
    assert a.push() == []
    assert a.link.is_forgettable


# Ends


def test_a_peer_that_was_given_up_is_told_and_its_blobs_are_refused() -> None:
    a, b = connected()
    b.send(2)
    late = b.push(1.0)
    a.link.give_up()
    assert a.link.state is LinkState.ENDED
    reset = a.push(1.0)
    assert reset == [build_blob(BlobKind.RESET, source="ia", ack_stream=500)]
    assert a.link.is_forgettable
    # It comes with a blob that is older, too, and from a new link that only remembers.
    memory = a.link.memory
    assert a.take(late) == [Received(None, [], None)]
    assert a.push(1.0) == reset
    revived = End(memory=memory)
    assert revived.take(late) == [Received(None, [], None)]
    assert revived.push(1.0) == reset


def test_whoever_gets_reset_ends_both_directions() -> None:
    _, b = connected()
    b.send(2, 3)
    b.push(1.0)
    b.send(4)
    reset = [build_blob(BlobKind.RESET, source="ia", ack_stream=500)]
    assert b.take(reset) == [Received(RESET, [], None)]
    assert b.link.state is LinkState.ENDED
    assert b.link.is_acknowledged
    assert b.link.next_deadline() is None
    assert b.push(1.0) == []
    assert b.link.statistics().dropped_frames == 1
    # Only once: the second names a stream that is over.
    assert b.take(reset) == [Received(None, [], None)]


def test_a_reset_for_an_older_stream_disturbs_nothing() -> None:
    _, b = connected()
    assert b.take([build_blob(BlobKind.RESET, source="ia", ack_stream=499)]) == [Received(None, [], None)]
    assert b.link.state is LinkState.OPEN
    fresh = End()
    assert fresh.take([build_blob(BlobKind.RESET, source="wb", ack_stream=0)]) == [Received(None, [], None)]


def test_after_an_end_both_begin_anew() -> None:
    a, b = connected()
    a.link.give_up()
    assert b.take(a.push()) == [Received(RESET, [], None)]
    b.send(7)
    assert a.taken(b.push()) == [7]
    a.send(8)
    assert b.taken(a.push()) == [8]
    assert a.link.state is b.link.state is LinkState.OPEN


def test_whoever_missed_its_reset_is_told_at_its_next_word() -> None:
    a, b = connected()
    a.link.give_up()
    reset = a.push()  # lost, with the connection of the reader
    b.link.reader_restored()
    gap = b.push()
    assert kinds(gap) == ["GAP"]
    assert a.take(gap) == [Received(None, [], None)]
    assert a.push() == reset
    assert b.take(reset) == [Received(RESET, [], None)]


def test_a_newer_stream_means_that_the_peer_gave_us_up() -> None:
    a, b = connected()
    b.send(2)
    b.push(1.0)
    a.link.give_up()
    a.send(8)
    blobs = a.push()
    assert kinds(blobs) == ["RESET", "DATA"]
    # The RESET was lost.
    received = b.take(blobs[1:])
    assert [(r.ended_before, numbers(r.frames)) for r in received] == [(RESTARTED, [8])]
    assert b.link.is_acknowledged
    b.send(9)
    assert a.taken(b.push()) == [9]
    # And if it comes now, it comes too late.
    assert b.take(blobs[:1]) == [Received(None, [], None)]


def test_a_newer_stream_that_does_not_begin_with_1_ends_the_link_and_is_a_gap() -> None:
    a, b = connected()
    a.link.give_up()
    a.send(8)
    first = a.push()[1:]
    a.send(9)
    second = a.push()
    assert b.take(second) == [Received(RESTARTED, [], None)]
    assert kinds(b.push()) == ["GAP"]
    assert b.taken(first + second) == [8, 9]


def test_late_copies_of_an_old_stream_never_disturb_the_new_one() -> None:
    a, b = connected()
    a.send(2)
    late = a.push()
    b.take(late)
    a.link.give_up()
    a.send(8)
    b.take(a.push()[1:])
    assert b.take(late) == [Received(None, [], None)]
    refusal = b.push()
    assert "RESET" in kinds(refusal)
    assert a.take(refusal)[0] == Received(None, [], None)
    a.send(9)
    assert b.taken(a.push()) == [9]
    assert a.link.statistics().ended_count == b.link.statistics().ended_count == 1


def test_a_peer_that_forgot_us_ends_the_link() -> None:
    a, _ = connected()
    a.send(2)
    a.push()
    forgetful = End("wb", "ia", first_id=900)
    now = a.link.next_deadline()
    assert now is not None
    assert forgetful.taken(a.push(now), now) == []
    received = a.take(forgetful.push(now), now)
    assert RESET not in [r.ended_before for r in received]
    assert [r.ended_before for r in received if r.ended_before] == [FORGOTTEN]
    a.send(8)
    assert forgetful.taken(a.push(now), now) == [8]


def test_a_pong_counts_for_its_own_ping_only() -> None:
    a, _ = connected()
    a.send(2)
    a.push(1.0)
    now = a.link.next_deadline()
    assert now is not None
    ping = decode_blob(a.push(now)[-1])
    stale = build_blob(BlobKind.PONG, source="wb", sequence=ping.sequence - 1, ack_stream=100, ack=0)
    assert a.take([stale], now) == [Received(None, [], None)]
    assert a.push(now) == []
    exact = build_blob(BlobKind.PONG, source="wb", sequence=ping.sequence, ack_stream=100, ack=0)
    assert a.take([exact], now) == [Received(FORGOTTEN, [], None)]


def test_a_refusal_by_the_stream_that_we_know_ends_only_ours() -> None:
    _, b = pair()
    b.send(1)
    b.push()
    blobs = [
        build_blob(BlobKind.DATA, source="ia", stream=200, sequence=number, frames=[frame(number)])
        for number in (1, 2)
    ]
    # It does not speak of ours: that may still be on its way, so it stays.
    assert b.taken(blobs[:1]) == [1]
    assert not b.link.is_acknowledged
    reset = build_blob(BlobKind.RESET, source="ia", stream=200, ack_stream=500)
    assert b.take([reset]) == [Received(RESET, [], None)]
    assert b.link.state is LinkState.OPEN
    assert b.link.is_acknowledged
    assert b.taken(blobs[1:]) == [2]
    b.send(3)
    assert decode_blob(b.push()[-1])[:6] == (BlobKind.DATA, "wb", 501, 1, 200, 2)


def test_a_stream_that_is_refused_without_a_word_is_dropped() -> None:
    """The peer knew ours before it had one of its own; its first blob does not speak of ours, so it has ended it."""
    a, b = pair()
    a.send(1)
    b.take(a.push())
    a.take(b.push(0.03))
    b.link.give_up()
    b.push()
    a.send(2)
    a.push()
    b.send(3)
    received = a.take(b.push())
    assert [(r.ended_before, numbers(r.frames)) for r in received] == [(RESTARTED, [3])]
    assert a.link.is_acknowledged


def test_a_stream_older_than_the_one_we_know_is_refused() -> None:
    _, b = pair()
    new = build_blob(BlobKind.DATA, source="ia", stream=200, sequence=1, frames=[frame(1)])
    old = build_blob(BlobKind.DATA, source="ia", stream=199, sequence=1, frames=[frame(0)])
    assert b.taken([new, old]) == [1]
    assert b.push()[0] == build_blob(BlobKind.RESET, source="wb", ack_stream=199)


def test_two_that_begin_at_once_keep_both_streams() -> None:
    a, b = pair()
    a.send(1)
    b.send(2)
    from_a, from_b = a.push(), b.push()
    assert a.taken(from_b) == [2]
    assert b.taken(from_a) == [1]
    assert a.link.statistics().ended_count == b.link.statistics().ended_count == 0


def test_two_that_gave_each_other_up_before_they_heard_of_each_other_come_to_agree() -> None:
    a, b = pair()
    a.send(1)
    b.send(1)
    from_a, from_b = a.push(), b.push()
    a.link.give_up()
    b.link.give_up()
    # Both take a stream that its sender has ended, and send another.
    a.send(2)
    b.send(2)
    from_a += a.push()
    from_b += b.push()
    for round_number in range(3, 10):
        a.take(from_b)
        b.take(from_a)
        a.send(round_number)
        b.send(round_number)
        from_a, from_b = a.push(), b.push()
    assert a.taken(from_b)[-1] == 9
    assert b.taken(from_a)[-1] == 9
    assert a.link.statistics().ended_count == b.link.statistics().ended_count == 2


# Leaving


def test_bye_is_the_last_frame_and_ends_politely() -> None:
    a, b = connected()
    a.send(2)
    a.link.leave()
    assert a.link.state is LinkState.LEAVING
    assert not a.link.send(frame(3))
    b.send(4)
    assert [(r.ended_before, numbers(r.frames), r.ended_after) for r in b.take(a.push())] == [(None, [2], LEFT)]
    assert b.link.state is LinkState.LEFT
    assert not a.link.is_acknowledged
    # At once, for somebody waits for it; and what was queued is dropped.
    answer = b.push()
    assert kinds(answer) == ["ACK"]
    a.take(answer)
    assert a.link.is_acknowledged
    assert a.link.next_deadline() is None
    assert b.link.is_forgettable
    assert not b.link.send(frame(5))
    assert b.link.statistics().dropped_frames == 2


def test_a_bye_that_comes_again_is_acknowledged_even_from_memory() -> None:
    a, b = connected()
    a.link.leave()
    blobs = a.push()
    b.take(blobs)
    b.push()
    assert b.link.memory == (100, 2)
    revived = End("wb", "ia", first_id=900, memory=b.link.memory)
    assert revived.link.state is LinkState.LEFT
    assert revived.take(blobs) == [Received(None, [], None)]
    assert revived.push() == [build_blob(BlobKind.ACK, source="wb", ack_stream=100, ack=2)]
    assert revived.link.is_forgettable


def test_two_that_leave_at_once_both_finish() -> None:
    a, b = connected()
    a.link.leave()
    b.link.leave()
    from_a, from_b = a.push(), b.push()
    assert a.take(from_b)[-1].ended_after == LEFT
    assert b.take(from_a)[-1].ended_after == LEFT
    a.take(b.push())
    b.take(a.push())
    assert a.link.is_acknowledged
    assert b.link.is_acknowledged


def test_there_is_no_goodbye_to_somebody_who_never_heard_of_us() -> None:
    end = End()
    end.link.leave()
    assert end.push() == []


def test_the_peer_still_arrives_while_we_are_leaving() -> None:
    a, b = connected()
    b.send(5)
    late = b.push()
    a.link.leave()
    a.push()
    assert a.taken(late) == [5]
    assert a.link.state is LinkState.LEAVING


# Nonsense


@pytest.mark.parametrize(
    "blob",
    [
        Blob(BlobKind.DATA, "wb", 0, 1, 0, 0, []),
        Blob(BlobKind.DATA, "wb", 500, 0, 0, 0, []),
        Blob(BlobKind.DATA, "wb", 500, 2, 100, 99, []),
        Blob(BlobKind.ACK, "wb", 500, 0, 100, 99, []),
    ],
)
def test_blobs_that_no_release_sends_are_refused(blob: Blob) -> None:
    a, _ = connected()
    with pytest.raises(WireError, match="wb"):
        a.link.receive(blob, 50, 1.0)


def test_a_blob_of_another_version_is_refused() -> None:
    blob = bytearray(build_blob(BlobKind.PING, source="wb"))
    assert blob[1] == 1
    blob[1] = 2
    with pytest.raises(WireError, match="version 2, this release reads 1"):
        decode_blob(bytes(blob))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\x90", b"\x91\x01", b"\xa3abc", b"\x98\x01\x00\xa2wb\x01\x01\x00\x00\xa0"],
)
def test_bytes_that_are_no_blob_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_blob(data)


@pytest.mark.parametrize("wrong", [b"\x90", b"\x05", b"\x91\xa1x", b"\x92\x01\x01", b"\x94\x04\x01\x01\xa1x"])
def test_malformed_frames_are_refused(wrong: bytes) -> None:
    blob = build_blob(BlobKind.DATA, source="wb", stream=1, sequence=1, frames=[build_bye(), wrong])
    with pytest.raises(WireError, match="frame 1"):
        decode_blob(blob)


def test_a_representation_shows_the_state() -> None:
    a, _ = connected()
    assert repr(a.link) == "<Link ia -> wb open: sent 1, acknowledged 1, taken 1, queued 0 bytes>"
    assert a.link.statistics().taken_frames == 1


# The machines


class Process:
    """One live process with its links and its inbox; checks what it is given."""

    def __init__(self, world: World, process_id: str) -> None:
        self.world = world
        self.process_id = process_id
        self.new_id = itertools.count(1000 * (len(world.processes) + 1)).__next__
        self.inbox: list[bytes] = []
        self.links: dict[str, Link] = {}
        self.memories: dict[str, tuple[int, int]] = {}
        self.under_way: dict[str, list[bytes]] = {}
        # Frames sent and not reported as lost by an end, by peer; numbers never repeat.
        self.sent: dict[str, list[int]] = {}
        self.last_number = 0
        # What each DATA blob of ours holds, and what was taken of each stream of others.
        self.pushed: dict[tuple[str, int], list[int]] = {}
        self.taken: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[str, list[str]] = {}
        self.given_up: dict[str, int] = {}

    def link(self, peer: str) -> Link:
        link = self.links.get(peer)
        if link is None:
            link = self.links[peer] = Link(
                source=self.process_id,
                peer=peer,
                new_id=self.new_id,
                settings=SMALL,
                memory=self.memories.pop(peer, (0, 0)),
                broker_away=self.world.broker_away,
            )
        return link

    def send(self, peer: str, size: int) -> None:
        self.last_number += 1
        link = self.link(peer)
        if link.is_congested and not link.became_ready():
            return  # as a well-behaved sender
        assert link.send(frame(self.last_number, size))
        self.sent.setdefault(peer, []).append(self.last_number)

    def collect(self, peer: str) -> list[bytes]:
        link = self.link(peer)
        stream_before = link._stream
        blobs = link.collect(self.world.now)
        for blob in map(decode_blob, blobs):
            if blob.kind is BlobKind.DATA:
                log = self.pushed.setdefault((peer, blob.stream), [])
                expected = numbers(blob.frames)
                if expected[0] not in log:
                    assert not stream_before or blob.stream == stream_before
                    log.extend(expected)
        log = self.pushed.get((peer, link._stream), [])
        if link._stream:
            # In order and nothing left out, from the first one that was not reported as lost.
            assert [*log, *self.queued(peer)] == self.sent[peer]
        if not blobs and link.is_forgettable:
            del self.links[peer]
            if link.memory[0]:
                self.memories[peer] = link.memory
        return blobs

    def queued(self, peer: str) -> list[int]:
        link = self.links[peer]
        batches = [*(frames for frames, _ in link._batches), link._batch]
        return [int(msgpack.unpackb(frame)[1]) for frames in batches for frame in frames]

    def receive(self, data: bytes) -> None:
        blob = decode_blob(data)
        peer = blob.source
        link = self.link(peer)
        stream, queued = link._stream, self.queued(peer)
        received = link.receive(blob, len(data), self.world.now)
        has_ended = received.ended_before is not None
        if has_ended:
            self.ends.setdefault(peer, []).append(str(received.ended_before))
        if link._stream != stream or self.queued(peer) != queued:
            # Whatever is dropped is reported.
            assert has_ended
            self.sent[peer] = []
        if received.frames:
            self.taken.setdefault((peer, blob.stream), []).extend(numbers(received.frames))
            # Exactly what the peer put into this stream, from its first frame on.
            taken = self.taken[peer, blob.stream]
            log = self.world.everybody[peer].pushed[self.process_id, blob.stream]
            assert taken == log[: len(taken)]

    def give_up(self, peer: str) -> None:
        if peer in self.links:
            self.links[peer].give_up()
            self.given_up[peer] = self.given_up.get(peer, 0) + 1
            self.sent[peer] = []


class World(RuleBasedStateMachine):
    """Two places with a live process each, and a broker and a network that do what they like with blobs."""

    settings = SMALL

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.broker_away = False
        self.everybody: dict[str, Process] = {}
        # What was stored lately, to come again when nobody expects it.
        self.history: list[tuple[str, bytes]] = []
        self.processes: list[Process] = []
        for place in "ab":
            self.start(place)

    def start(self, place: str) -> Process:
        process = Process(self, f"{place}{len(self.everybody)}")
        self.everybody[process.process_id] = process
        self.processes = [p for p in self.processes if p.process_id[0] != place] + [process]
        self.processes.sort(key=lambda p: p.process_id[0])
        return process

    def pair(self, side: int) -> tuple[Process, str]:
        return self.processes[side], self.processes[1 - side].process_id

    sides = st.integers(0, 1)

    @rule(side=sides, count=st.integers(1, 4), size=st.sampled_from([0, 10, 100, 290, 700]))
    def send(self, side: int, count: int, size: int) -> None:
        process, peer = self.pair(side)
        for _ in range(count):
            process.send(peer, size)

    @rule(side=sides)
    def collect(self, side: int) -> None:
        for process in self.processes:
            for peer in list(process.links):
                if process is self.processes[side] and peer not in process.under_way:
                    blobs = process.collect(peer)
                    if blobs:
                        process.under_way[peer] = blobs

    @rule(count=st.integers(1, 3), size=st.sampled_from([0, 290]), read_first=st.integers(0, 3))
    def converse(self, count: int, size: int, read_first: int) -> None:
        """A stretch of time without harm, so that there is something to harm."""
        for _ in range(count):
            for side in (0, 1):
                self.read(side, 1000 if read_first else 1)
                self.send(side, 2, size)
                self.collect(side)
                self.answer(side)

    @rule(side=sides, size=st.sampled_from([0, 290]))
    def send_blob_by_blob(self, side: int, size: int) -> None:
        for _ in range(3):
            self.send(side, 1, size)
            self.collect(side)
            self.answer(side)

    def store(self, peer: str, blobs: list[bytes]) -> None:
        self.everybody[peer].inbox.extend(blobs)
        self.history += [(peer, blob) for blob in blobs]
        del self.history[:-40]

    @rule(side=sides)
    def answer(self, side: int) -> None:
        process = self.processes[side]
        for peer, blobs in list(process.under_way.items()):
            self.store(peer, blobs)
            del process.under_way[peer]
            process.links[peer].push_answered(self.now)

    @rule(side=sides, stored=st.booleans(), whole=st.booleans())
    def fail(self, side: int, stored: bool, whole: bool) -> None:
        process = self.processes[side]
        for peer, blobs in list(process.under_way.items()):
            if stored:
                self.store(peer, blobs if whole else blobs[: len(blobs) // 2])
            del process.under_way[peer]
            process.links[peer].push_failed(self.now)

    @rule(side=sides)
    def arrive_late(self, side: int) -> None:
        """The broker stores a push whose answer is still awaited; with ``fail`` it is stored twice in the end."""
        process = self.processes[side]
        for peer, blobs in process.under_way.items():
            self.store(peer, blobs)

    @rule(side=sides, count=st.integers(1, 8))
    def read(self, side: int, count: int) -> None:
        process = self.processes[side]
        for _ in range(min(count, len(process.inbox))):
            process.receive(process.inbox.pop(0))

    @precondition(lambda self: any(process.inbox for process in self.processes))
    @rule(data=st.data())
    def harm(self, data: st.DataObject) -> None:
        inbox = data.draw(st.sampled_from([p.inbox for p in self.processes if p.inbox]))
        index = data.draw(st.integers(0, len(inbox) - 1))
        match data.draw(st.sampled_from(["drop", "double", "delay", "reorder"])):
            case "drop":
                del inbox[index]
            case "double":
                inbox.insert(data.draw(st.integers(0, len(inbox))), inbox[index])
            case "delay":
                inbox.append(inbox.pop(index))
            case "reorder":
                inbox[:] = data.draw(st.permutations(inbox)) if len(inbox) < 12 else inbox[::-1]

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def repeat_history(self, data: st.DataObject) -> None:
        peer, blob = data.draw(st.sampled_from(self.history))
        self.everybody[peer].inbox.append(blob)

    @rule()
    def flush_all(self) -> None:
        for process in self.everybody.values():
            process.inbox.clear()

    @precondition(lambda self: not self.broker_away)
    @rule(data_lost=st.booleans(), fail_pushes=st.booleans())
    def lose_broker(self, data_lost: bool, fail_pushes: bool) -> None:
        self.broker_away = True
        if data_lost:
            self.flush_all()
        for process in self.processes:
            for link in process.links.values():
                link.broker_lost()
        if fail_pushes:
            for side in (0, 1):
                self.fail(side, False, False)

    @precondition(lambda self: self.broker_away)
    @rule()
    def restore_broker(self) -> None:
        self.broker_away = False
        for process in self.processes:
            for link in process.links.values():
                link.broker_restored(self.now)

    @rule(side=sides)
    def restore_reader(self, side: int) -> None:
        for link in self.processes[side].links.values():
            link.reader_restored()

    @rule(side=sides)
    def ping(self, side: int) -> None:
        process, peer = self.pair(side)
        process.link(peer).ping()

    @rule(step=st.sampled_from([0.001, 0.03, 0.06, 0.5, 6.0]))
    def pass_time(self, step: float) -> None:
        self.now += step

    @rule()
    def pass_to_next_deadline(self) -> None:
        deadlines = [link.next_deadline() for process in self.processes for link in process.links.values()]
        self.now = max(self.now, min((d for d in deadlines if d is not None), default=self.now))

    @rule(side=sides)
    def give_up(self, side: int) -> None:
        process, peer = self.pair(side)
        process.give_up(peer)

    @rule(side=sides)
    def kill_and_revive(self, side: int) -> None:
        dead = self.processes[side].process_id
        self.start(dead[0])
        # The other end finds out by its lease, sooner or later; here at once, though its blobs may still come.
        other = self.processes[1 - side]
        other.give_up(dead)

    @invariant()
    def whoever_waits_has_a_deadline(self) -> None:
        for process in self.processes:
            for peer, link in process.links.items():
                has_reason = peer in process.under_way or self.broker_away or link._resend_next
                if link.unacknowledged_bytes and not has_reason:
                    assert link.next_deadline() is not None

    @invariant()
    def no_buffer_exceeds_its_window(self) -> None:
        for process in self.processes:
            for link in process.links.values():
                assert link.unacknowledged_bytes == sum(map(len, link._unacknowledged))
                assert link.unacknowledged_bytes <= SMALL.window_bytes + 800
                assert link.queued_bytes <= SMALL.congested_bytes + 800
                assert link._sent - link._acknowledged == len(link._unacknowledged)

    @invariant()
    def nobody_ends_without_a_reason(self) -> None:
        # Each giving up ends the link once at each end, and once more where the ends disagreed.
        a, b = self.processes
        given_up = a.given_up.get(b.process_id, 0) + b.given_up.get(a.process_id, 0)
        for process, peer in ((a, b.process_id), (b, a.process_id)):
            assert len(process.ends.get(peer, [])) <= 2 * given_up, process.ends

    def teardown(self) -> None:
        """From now on the network behaves: everything arrives, and both come to rest."""
        if self.broker_away:
            self.restore_broker()
        for process, other in itertools.permutations(self.processes):
            for peer in list(process.links):
                if peer != other.process_id:
                    process.give_up(peer)  # dead: not our subject any more
                    process.links.pop(peer)
                    process.under_way.pop(peer, None)
        # Those that were given up and do not know yet learn of it from the next frame of either.
        for side in (0, 1):
            self.settle()
            process, peer = self.pair(side)
            process.send(peer, 10)
        self.settle()
        a, b = self.processes
        for process, other in ((a, b), (b, a)):
            peer = other.process_id
            sent = process.sent.get(peer, [])
            link = process.links.get(peer)
            if link is not None:
                assert link.is_acknowledged
                assert link.next_deadline() is None
            if sent:
                assert link is not None
                assert other.taken[process.process_id, link._stream][-len(sent) :] == sent
        self.nobody_ends_without_a_reason()
        # And the two agree on which streams make the link.
        for process, other in ((a, b), (b, a)):
            link, opposite = process.links.get(other.process_id), other.links.get(process.process_id)
            if link is not None and opposite is not None and link._stream:
                assert opposite._peer_stream == link._stream

    def settle(self) -> None:
        for _ in range(500):
            for process in self.processes:
                for peer, blobs in list(process.under_way.items()):
                    self.store(peer, blobs)
                    process.links[peer].push_answered(self.now)
                process.under_way.clear()
                while process.inbox:
                    data = process.inbox.pop(0)
                    if decode_blob(data).source in {p.process_id for p in self.processes}:
                        process.receive(data)
                for peer in list(process.links):
                    blobs = process.collect(peer)
                    if blobs:
                        process.under_way[peer] = blobs
                self.whoever_waits_has_a_deadline()
                self.no_buffer_exceeds_its_window()
            if any(process.under_way or process.inbox for process in self.processes):
                continue
            deadlines = [link.next_deadline() for process in self.processes for link in process.links.values()]
            due = [deadline for deadline in deadlines if deadline is not None]
            if not due:
                return
            self.now = max(self.now, min(due))
        raise AssertionError(f"the ends do not come to rest: {[p.links for p in self.processes]}")


World.TestCase.settings = hypothesis_settings(max_examples=150, stateful_step_count=60, deadline=None)
TestWorld = World.TestCase


class Flood(RuleBasedStateMachine):
    """One end is sent far more than its link takes, and the other reads when it likes."""

    @initialize(window_bytes=st.sampled_from([500, 2000, 9000]), blob_bytes=st.sampled_from([100, 1000]))
    def begin(self, window_bytes: int, blob_bytes: int) -> None:
        self.settings = LinkSettings(
            window_bytes=window_bytes,
            blob_bytes=blob_bytes,
            push_bytes=1000,
            congested_bytes=3 * window_bytes,
            ready_bytes=window_bytes,
        )
        self.sender, self.receiver = pair(self.settings)
        self.inbox: list[bytes] = []
        self.now = 0.0
        self.number = 0
        self.largest = 0
        self.taken: list[int] = []

    @rule(size=st.integers(0, 3000))
    def send_until_congested(self, size: int) -> None:
        self.largest = max(self.largest, size + 100)
        while not self.sender.link.is_congested:
            self.number += 1
            self.sender.send(self.number, size=size)
        self.sender.link.became_ready()

    @rule()
    def push(self) -> None:
        self.inbox += self.sender.push(self.now)
        self.sender.link.became_ready()

    @rule(count=st.integers(1, 10))
    def read(self, count: int) -> None:
        self.taken += self.receiver.taken(self.inbox[:count], self.now)
        del self.inbox[:count]
        self.sender.take(self.receiver.push(self.now), self.now)

    @rule(step=st.sampled_from([0.01, 0.03, 1.0]))
    def pass_time(self, step: float) -> None:
        self.now += step

    @invariant()
    def bounded(self) -> None:
        if not hasattr(self, "sender"):
            return
        link = self.sender.link
        blob = max(self.largest, self.settings.blob_bytes) + 100
        assert link.unacknowledged_bytes <= self.settings.window_bytes + blob
        assert link.queued_bytes <= self.settings.congested_bytes + self.largest + 100
        # The broker holds every blob that is not taken once, besides copies of a timeout or a gap report.
        data_blobs = [data for data in self.inbox if decode_blob(data).kind is BlobKind.DATA]
        blobs = {decode_blob(data).sequence: data for data in data_blobs}
        news = [data for sequence, data in blobs.items() if sequence > self.receiver.link._taken]
        assert sum(map(len, news)) <= self.settings.window_bytes + blob
        assert self.taken == list(range(1, len(self.taken) + 1))

    def teardown(self) -> None:
        if not hasattr(self, "sender"):
            return
        link = self.sender.link
        for _ in range(2000):
            self.push()
            self.read(1000)
            if link.is_acknowledged:
                break
            self.now += 0.03
        assert len(self.taken) == self.number


Flood.TestCase.settings = hypothesis_settings(max_examples=40, stateful_step_count=30, deadline=None)
TestFlood = Flood.TestCase


def test_the_window_bounds_what_a_silent_peer_costs_the_broker() -> None:
    """Nobody reads for an hour: one window, and one blob and a PING for each timeout."""
    end = End(settings=SMALL)
    for number in range(100):
        end.send(number, size=250)
    stored = 0
    now = 0.0
    while blobs := end.push(now):
        stored += sum(map(len, blobs))
    assert stored < SMALL.window_bytes + 350
    pushes = 0
    while now < 3600:
        deadline = end.link.next_deadline()
        assert deadline is not None
        now = deadline
        blobs = end.push(now)
        assert len(blobs) == 2
        pushes += 1
    assert pushes < 3600 / 5 + 10


# Equal events of several connections


def queued_frames(link: Link) -> list[list[Any]]:
    blobs = link.collect(0.0)
    link.push_answered(0.0)
    return [frame for blob in blobs for frame in decode_blob(blob).frames]


def test_equal_events_that_wait_become_one_frame() -> None:
    link = End().link
    positions = [link.send_event(connection, 1, b"all", 0) for connection in (1, 2, 3)]
    other = link.send_event(4, 1, b"other", 0)
    assert positions == [1, 1, 1]
    assert other == 2
    assert link.send_event(5, 2, b"all", 0) == 1
    assert queued_frames(link) == [
        [FrameKind.EVENTS, [[1, 1], [2, 1], [3, 1], [5, 2]], b"all"],
        [FrameKind.EVENT, 4, 1, b"other"],
    ]
    assert link.queued_bytes == 0
    # What has left is not joined.
    assert link.send_event(6, 1, b"all", 0) == 3
    assert queued_frames(link) == [[FrameKind.EVENT, 6, 1, b"all"]]


def test_an_event_does_not_overtake_the_last_frame_of_its_connection() -> None:
    link = End().link
    link.send_event(1, 1, b"all", 0)
    own = link.send(build_event(2, 1, b"own"))
    again = link.send_event(2, 1, b"all", own)
    assert again > own
    # The newer one is joined from now on, also by one that has sent the same already.
    assert link.send_event(3, 1, b"all", 0) == again
    twice = link.send_event(1, 1, b"all", 1)
    assert twice == again
    assert link.send_event(1, 1, b"all", twice) > again
    assert queued_frames(link) == [
        [FrameKind.EVENT, 1, 1, b"all"],
        [FrameKind.EVENT, 2, 1, b"own"],
        [FrameKind.EVENTS, [[2, 1], [3, 1], [1, 1]], b"all"],
        [FrameKind.EVENT, 1, 1, b"all"],
    ]


def test_no_event_joins_one_that_stands_before_the_barrier() -> None:
    link = End().link
    link.send_event(1, 1, b"all", 0)
    link.send(frame(7))
    link.raise_barrier()
    link.send_event(2, 1, b"all", 0)
    assert [sent[0] for sent in queued_frames(link)] == [FrameKind.EVENT, FrameKind.GROUP_SEND, FrameKind.EVENT]


def test_addressees_count_towards_blob_and_congestion() -> None:
    settings = LinkSettings(blob_bytes=640, congested_bytes=5000, ready_bytes=100, push_bytes=10_000)
    link = End(settings=settings).link
    for connection in range(100):
        link.send_event(connection, 1, b"all", 0)
    assert link.is_congested
    blobs = [decode_blob(blob) for blob in link.collect(0.0)]
    assert [blob.frames for blob in blobs] == [
        [[FrameKind.EVENTS, [[connection, 1] for connection in range(first, first + 10)], b"all"]]
        for first in range(0, 100, 10)
    ]
    assert link.queued_bytes == 0


def test_events_of_a_link_that_ended_are_not_joined() -> None:
    a, _ = connected()
    a.link.send_event(1, 1, b"all", 0)
    a.link.give_up()
    assert a.link.queued_bytes == 0
    a.link.send_event(2, 1, b"all", 0)
    assert [frame for blob in a.push() for frame in decode_blob(blob).frames] == [[FrameKind.EVENT, 2, 1, b"all"]]


def test_events_for_a_peer_that_has_left_are_dropped() -> None:
    a, b = connected()
    a.link.send_event(2, 1, b"all", 0)
    b.send(1)
    b.link.leave()
    a.take(b.push())
    assert a.link.state is LinkState.LEFT
    assert a.link.send_event(3, 1, b"all", 0) == 0
    assert a.link.queued_bytes == 0


def test_nothing_joins_what_stands_before_a_goodbye() -> None:
    a, _ = connected()
    a.link.send_event(1, 1, b"all", 0)
    a.link.leave()
    assert a.link.send_event(2, 1, b"all", 0) == 0
    assert [frame[0] for blob in a.push() for frame in decode_blob(blob).frames] == [FrameKind.EVENT, FrameKind.BYE]


class Sharing(RuleBasedStateMachine):
    """Connections of one worker send equal and other events, within their credit, on a link that loses pushes.

    Each gets its own events, and what was sent to groups, exactly as the worker sent them; none exceeds its window.
    """

    window_bytes = 1024

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        limits = LinkSettings(blob_bytes=600, blob_frames=5, push_bytes=1200, window_bytes=2000)
        self.worker, self.interface = pair(limits)
        self.outgoing = {number: OutgoingEvents(number, 1, self.window_bytes) for number in range(1, 5)}
        self.incoming = {number: IncomingEvents(number, 1, self.window_bytes) for number in range(1, 5)}
        self.sent_at = dict.fromkeys(self.outgoing, 0)
        # For each connection its events, and the messages to groups between them.
        self.sent: dict[int, list[bytes]] = {number: [] for number in self.outgoing}
        self.taken: dict[int, list[bytes]] = {number: [] for number in self.outgoing}
        self.unread: list[tuple[int, int]] = []  # connection, cost
        self.credits: list[tuple[int, int]] = []  # connection, total
        self.lists: dict[End, list[bytes]] = {self.worker: [], self.interface: []}  # what the broker holds for each

    def event(self, text: int, size: int) -> bytes:
        return (b"%d" % text).ljust(size, b".")

    @rule(number=st.integers(1, 4), text=st.integers(0, 2), size=st.sampled_from((1, 64, 200)))
    def say(self, number: int, text: int, size: int) -> None:
        """As Instance does: what may leave at once may be shared, the rest waits for credit."""
        event = self.event(text, size)
        self.sent[number].append(event)
        if self.outgoing[number].admit(event):
            self.sent_at[number] = self.worker.link.send_event(number, 1, event, self.sent_at[number])
        else:
            self.outgoing[number].offer(event)
            self.pump(number)

    @rule(text=st.integers(0, 2), numbers=st.permutations((1, 2, 3, 4)))
    def say_to_all(self, text: int, numbers: list[int]) -> None:
        for number in numbers:
            self.say(number, text, 100)

    @rule(number=st.integers(1, 4), size=st.sampled_from((300, 700, 3000)))
    def say_in_pieces(self, number: int, size: int) -> None:
        event = self.event(9, size)
        self.sent[number].append(event)
        self.outgoing[number].offer(event)
        self.pump(number)

    # What waits for credit has no order with messages to groups: its send() has not returned.
    @precondition(lambda self: all(outgoing.is_empty for outgoing in self.outgoing.values()))
    @rule(text=st.integers(0, 2))
    def say_to_group(self, text: int) -> None:
        self.worker.link.send(build_group_send("g", self.event(text, 9)))
        self.worker.link.raise_barrier()
        for events in self.sent.values():
            events.append(b"group " + self.event(text, 9))

    @precondition(lambda self: all(outgoing.is_empty for outgoing in self.outgoing.values()))
    @rule(number=st.integers(1, 4), other=st.integers(1, 4), text=st.integers(0, 2))
    def say_around_a_message_to_the_group(self, number: int, other: int, text: int) -> None:
        self.say(number, text, 64)
        if all(outgoing.is_empty for outgoing in self.outgoing.values()):
            self.say_to_group(text)
        self.say(other, text, 64)

    def pump(self, number: int) -> None:
        for encoded in self.outgoing[number].frames():
            self.sent_at[number] = self.worker.link.send(encoded)

    @rule(is_lost=st.booleans(), is_stored=st.booleans())
    def push(self, is_lost: bool, is_stored: bool) -> None:
        blobs = self.worker.link.collect(self.now)
        if not blobs:
            return
        if is_stored or not is_lost:
            self.lists[self.interface] += blobs
        if is_lost:
            self.worker.link.push_failed(self.now)
        else:
            self.worker.link.push_answered(self.now)

    @rule(count=st.integers(1, 5))
    def read(self, count: int) -> None:
        for blob in self.lists[self.interface][:count]:
            for received in self.interface.take([blob], self.now):
                assert received.ended_before is None
                for decoded in received.frames:
                    self.take(decoded)
        del self.lists[self.interface][:count]
        answer = self.interface.push(self.now)
        self.worker.take(answer, self.now)

    def take(self, decoded: list[Any]) -> None:
        kind = decoded[0]
        if kind == FrameKind.GROUP_SEND:
            for events in self.taken.values():
                events.append(b"group " + decoded[2])
            return
        pairs = decoded[1] if kind == FrameKind.EVENTS else [decoded[1:3]]
        for number, epoch in pairs:
            assert epoch == 1
            # Raises if the window is exceeded.
            complete = self.incoming[number].receive(
                FrameKind.EVENT if kind == FrameKind.EVENTS else kind, decoded[-1]
            )
            if complete is None:
                self.credit(number, self.incoming[number].credit_frame())
            else:
                self.taken[number].append(complete[0])
                self.unread.append((number, complete[1]))

    def credit(self, number: int, encoded: bytes | None) -> None:
        if encoded is not None:
            self.credits.append((number, msgpack.unpackb(encoded)[3]))

    @rule(count=st.integers(1, 9))
    def write_to_clients(self, count: int) -> None:
        for number, cost in self.unread[:count]:
            self.credit(number, self.incoming[number].consume(cost))
        del self.unread[:count]

    @rule(count=st.integers(1, 5))
    def give_credit(self, count: int) -> None:
        for number, total in self.credits[:count]:
            self.outgoing[number].credit(total)
            self.pump(number)
        del self.credits[:count]

    @rule()
    def pass_time(self) -> None:
        self.now += 0.5

    @invariant()
    def in_order(self) -> None:
        if hasattr(self, "sent"):
            for number, taken in self.taken.items():
                assert taken == self.sent[number][: len(taken)]

    def teardown(self) -> None:
        if not hasattr(self, "sent"):
            return
        for _ in range(1000):
            self.pass_time()
            self.push(is_lost=False, is_stored=True)
            self.read(100)
            self.write_to_clients(100)
            self.give_credit(100)
            if self.taken == self.sent:
                break
        assert self.taken == self.sent
        self.pass_time()
        self.push(is_lost=False, is_stored=True)
        self.read(100)
        assert self.worker.link.queued_bytes == 0
        assert self.worker.link.is_acknowledged


Sharing.TestCase.settings = hypothesis_settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSharing = Sharing.TestCase
