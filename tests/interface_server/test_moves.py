"""How many connections look for their next worker at a time, and until when."""

import random

import pytest

from interface_server.moves import MOVES_AT_ONCE, Moves


@pytest.fixture
def moves():
    return Moves(timeout_s=30)


def test_so_many_at_a_time_oldest_first(moves):
    for number in range(100):
        moves.add(number, now=number)
    assert moves.next() == list(range(MOVES_AT_ONCE))
    assert moves.next() == []
    moves.found(5)
    moves.discard(7)
    assert moves.next() == [MOVES_AT_ONCE, MOVES_AT_ONCE + 1]
    statistics = moves.statistics()
    assert (statistics.waiting, statistics.looking, statistics.adopting) == (66, 32, 1)
    assert 7 not in moves
    assert len(moves) == 99


def test_one_that_is_given_back_waits_for_another_turn_with_the_same_deadline(moves):
    moves.add("a", now=0)
    assert moves.next() == ["a"]
    moves.found("a")
    moves.again("a")
    assert moves.next() == ["a"]
    moves.again("a")
    moves.again("a")
    assert moves.next() == ["a"]
    moves.add("a", now=20)  # its next owner was lost, too
    assert moves.next_deadline() == 30
    assert moves.next() == ["a"]
    assert moves.overdue(29.9) == []
    assert moves.overdue(30) == ["a"]
    assert moves.next_deadline() is None
    assert moves.statistics().given_up == 1


def test_those_that_are_moved_are_counted_with_the_longest_time(moves):
    for name, now in (("a", 0), ("b", 1)):
        moves.add(name, now=now)
    moves.next()
    moves.found("a")
    moves.settled("a", now=0.5)
    moves.found("b")
    moves.settled("b", now=4)
    moves.settled("b", now=9)
    assert (moves.statistics().moved, moves.statistics().longest_s, len(moves)) == (2, 3, 0)


def test_what_is_not_known_changes_nothing(moves):
    for call in (moves.found, moves.again, moves.discard):
        call("unknown")
    moves.settled("unknown", now=1)
    assert (len(moves), moves.next(), moves.overdue(100)) == (0, [], [])


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_calls_keeps_the_books(moves, seed):
    generator = random.Random(seed)
    now = 0.0
    for _ in range(2000):
        now += generator.random() / 10
        number = generator.randrange(80)
        call = generator.choice(["add", "add", "next", "found", "again", "settled", "discard", "overdue"])
        if call in ("add", "settled"):
            getattr(moves, call)(number, now)
        elif call == "next":
            moves.next()
        elif call == "overdue":
            moves.overdue(now)
        else:
            getattr(moves, call)(number)
        statistics = moves.statistics()
        assert 0 <= statistics.looking <= MOVES_AT_ONCE
        assert statistics.waiting >= 0
        assert statistics.adopting >= 0
        assert statistics.waiting + statistics.looking + statistics.adopting == len(moves)
        assert repr(moves)
