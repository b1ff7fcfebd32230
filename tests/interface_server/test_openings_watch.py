"""Which openings are overdue, lost or timed out; the clock is a number here."""

import pytest

from interface_server.openings_watch import LOOKED_FOR_MAX, Decision, OpeningsWatch

HTTP, WEBSOCKET = "http.request", "websocket.connect"


@pytest.fixture
def watch():
    return OpeningsWatch(queue_timeout_s=30.0)


def look_at(watch, now, found):
    """Look and answer everything with ``found``; return the decisions."""
    return [decision for look in watch.look(now) for decision in watch.answered(look, [found] * len(look.numbers))]


def test_nothing_is_looked_for_in_the_first_two_seconds(watch):
    watch.stored(1, HTTP, b"a", 10.0)
    assert watch.look(11.9) == []
    (look,) = watch.look(12.0)
    assert (look.channel, look.numbers, look.elements) == (HTTP, [1], [b"a"])


def test_a_claimed_opening_is_not_looked_for(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    assert watch.discard(1) == b"a"
    assert watch.discard(1) is None
    assert watch.look(100.0) == []
    assert watch.timed_out(100.0) == []


def test_one_look_for_each_channel_a_second(watch):
    for number, channel in ((1, HTTP), (2, WEBSOCKET), (3, HTTP)):
        watch.stored(number, channel, b"%d" % number, 0.0)
    looks = watch.look(2.0)
    assert [(look.channel, look.numbers) for look in looks] == [(HTTP, [1, 3]), (WEBSOCKET, [2])]
    assert watch.look(4.0) == [], "the last look has no answer yet"
    for look in looks:
        assert list(watch.answered(look, [True] * len(look.numbers))) == []
    assert watch.look(2.9) == []
    assert len(watch.look(3.0)) == 2


def test_found_openings_wait_and_one_miss_proves_nothing(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    assert look_at(watch, 2.0, True) == []
    assert look_at(watch, 3.0, False) == []
    assert look_at(watch, 4.0, True) == []
    assert look_at(watch, 5.0, False) == []
    assert look_at(watch, 6.0, False) == [(1, Decision.SEND_AGAIN)]


def test_a_lost_opening_is_sent_again_three_times(watch):
    now = 0.0
    for copy in range(4):
        watch.stored(1, HTTP, b"%d" % copy, now)
        assert look_at(watch, now + 2.0, False) == []
        expected = Decision.SEND_AGAIN if copy < 3 else Decision.GIVE_UP_LOST
        assert look_at(watch, now + 3.0, False) == [(1, expected)]
        assert watch.look(now + 4.0) == [], "not before the next copy is there"
        now += 4.0
    assert 1 not in watch
    assert watch.statistics(now).lost == 4


def test_answers_about_what_has_changed_meanwhile_are_ignored(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    watch.stored(2, HTTP, b"b", 0.0)
    assert look_at(watch, 2.0, False) == []
    (look,) = watch.look(3.0)
    watch.discard(1)
    watch.stored(2, HTTP, b"another copy", 3.0)
    assert list(watch.answered(look, [False, False])) == []
    assert 2 in watch


def test_no_answer_counts_as_nothing(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    assert look_at(watch, 2.0, False) == []
    (look,) = watch.look(3.0)
    assert list(watch.answered(look, None)) == []
    assert look_at(watch, 4.0, False) == [(1, Decision.SEND_AGAIN)]


def test_a_full_channel_is_looked_through_in_turns(watch):
    for number in range(LOOKED_FOR_MAX + 10):
        watch.stored(number, HTTP, b"%d" % number, 0.0)
    (first,) = watch.look(2.0)
    assert len(first.numbers) == LOOKED_FOR_MAX
    list(watch.answered(first, [True] * LOOKED_FOR_MAX))
    (second,) = watch.look(3.0)
    assert second.numbers[:10] == list(range(LOOKED_FOR_MAX, LOOKED_FOR_MAX + 10))


def test_queue_timeout_removes_and_then_refuses(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    assert watch.timed_out(29.9) == []
    assert watch.timed_out(30.0) == [(1, Decision.REMOVE)]
    assert watch.timed_out(31.0) == [], "the removal is under way"
    assert watch.look(31.0) == []
    assert watch.removed(1, True, 31.0) is Decision.GIVE_UP_TIMEOUT
    assert 1 not in watch
    assert watch.statistics(31.0).timed_out == 1


def test_an_opening_taken_just_before_the_timeout_may_still_be_claimed(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    assert watch.timed_out(30.0) == [(1, Decision.REMOVE)]
    assert watch.removed(1, False, 30.1) is None
    assert watch.timed_out(32.0) == []
    assert watch.look(32.0) == []
    assert watch.timed_out(32.1) == [(1, Decision.GIVE_UP_TIMEOUT)]
    assert len(watch) == 0


def test_a_removal_without_an_answer_is_tried_again(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    assert watch.timed_out(30.0) == [(1, Decision.REMOVE)]
    assert watch.removed(1, None, 30.1) is None
    assert watch.timed_out(31.0) == [(1, Decision.REMOVE)]


def test_a_removal_answered_after_the_claim_decides_nothing(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    watch.timed_out(30.0)
    watch.discard(1)
    assert watch.removed(1, False, 30.1) is None


def test_sending_again_does_not_extend_the_queue_timeout(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    look_at(watch, 2.0, False)
    look_at(watch, 3.0, False)
    watch.stored(1, HTTP, b"b", 4.0)
    assert watch.timed_out(30.0) == [(1, Decision.REMOVE)]


def test_a_lost_opening_whose_copy_is_not_stored_times_out_without_a_removal(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    look_at(watch, 28.0, False)
    assert look_at(watch, 29.0, False) == [(1, Decision.SEND_AGAIN)]
    assert watch.timed_out(30.0) == [(1, Decision.GIVE_UP_TIMEOUT)]


def test_timers_stand_still_while_the_broker_is_away(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    watch.stand_still(1.0)
    watch.stand_still(50.0)
    assert watch.look(1000.0) == []
    assert watch.timed_out(1000.0) == []
    watch.go_on(1001.0)
    watch.go_on(2000.0)
    assert watch.look(1001.9) == []
    assert len(watch.look(1002.0)) == 1
    assert watch.timed_out(1029.9) == []
    assert watch.timed_out(1030.0) == [(1, Decision.REMOVE)]


def test_a_look_that_the_outage_swallowed_does_not_block_the_next_one(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    assert len(watch.look(2.0)) == 1
    watch.stand_still(2.1)
    watch.go_on(5.1)
    assert len(watch.look(6.0)) == 1


def test_statistics_and_repr(watch):
    watch.stored(1, HTTP, b"a", 5.0)
    statistics = watch.statistics(8.0)
    assert (statistics.waiting, statistics.oldest_s) == (1, 3.0)
    assert "waiting=1" in repr(watch)


def test_an_opening_that_a_busy_worker_holds_is_neither_lost_nor_too_late(watch):
    watch.stored(1, HTTP, b"a", 0.0)
    assert look_at(watch, 2.0, False) == []
    now = 2.5
    while now < 40.0:
        watch.held(1, now)
        now += 0.5
        assert look_at(watch, now, False) == []
        assert watch.timed_out(now) == []
    # It says no more: its worker has died, perhaps. As behind a claim, its application may begin once more.
    assert look_at(watch, now + 3.0, False) == []
    assert look_at(watch, now + 4.0, False) == [(1, Decision.SEND_AGAIN)]
    watch.stored(1, HTTP, b"b", now + 4.0)
    watch.held(1, now + 5.0)
    assert look_at(watch, now + 8.0, False) == []
    assert look_at(watch, now + 9.0, False) == [(1, Decision.GIVE_UP_LOST)]


def test_what_is_held_is_not_found_where_nobody_waits_for_it(watch):
    watch.held(1, 0.0)
    assert 1 not in watch
    watch.stored(1, HTTP, b"a", 0.0)
    assert look_at(watch, 2.0, False) == look_at(watch, 2.9, False) == []
    assert look_at(watch, 3.0, False) == [(1, Decision.SEND_AGAIN)]
    watch.held(1, 3.1)  # the next copy is not stored yet
    assert look_at(watch, 20.0, False) == []
