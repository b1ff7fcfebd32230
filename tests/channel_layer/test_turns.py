"""Who goes on, in which turn of the loop."""

import asyncio
import logging

from channel_layer.turns import Turns


class Loop:
    """Turns of a loop, one at a time."""

    def __init__(self):
        self.calls = []

    def run_turn(self):
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class Flood:
    """Wants so many turns, one after the other."""

    def __init__(self, name, turns, served, count):
        self.name, self.turns, self.served, self.left = name, turns, served, count
        turns.wait(self.go_on)

    def go_on(self):
        self.served.append(self.name)
        self.left -= 1
        if self.left:
            self.turns.wait(self.go_on)


def test_one_client_goes_on_in_a_turn_however_many_wait():
    loop, served = Loop(), []
    turns = Turns(lambda call: loop.calls.append(call))
    for name in "abc":
        Flood(name, turns, served, 3)
    for count in range(1, 10):
        loop.run_turn()
        assert len(served) == count
    assert "".join(served) == "abcabcabc"
    assert loop.calls == []
    assert len(turns) == 0


def test_who_comes_later_waits_for_each_of_the_others_once():
    loop, served = Loop(), []
    turns = Turns(lambda call: loop.calls.append(call))
    for name in "abc":
        Flood(name, turns, served, 100)
    loop.run_turn()
    Flood("d", turns, served, 1)
    while "d" not in served:
        loop.run_turn()
    assert "".join(served) == "abcad"
    assert repr(turns) == "<Turns waiting=3>"


def test_a_client_that_fails_costs_the_others_nothing(caplog):
    loop, served = Loop(), []
    turns = Turns(lambda call: loop.calls.append(call))
    turns.wait(lambda: 1 / 0)
    Flood("a", turns, served, 1)
    with caplog.at_level(logging.ERROR, "trunkline.channel_layer"):
        loop.run_turn()
        loop.run_turn()
    assert served == ["a"]
    assert "ZeroDivisionError" in caplog.text
    Flood("b", turns, served, 1)
    loop.run_turn()
    assert served == ["a", "b"]


async def test_what_others_have_called_soon_comes_between():
    turns, served = Turns(), []
    Flood("a", turns, served, 3)
    for _ in range(3):
        asyncio.get_running_loop().call_soon(served.append, "other")
        await asyncio.sleep(0)
    assert served == ["a", "other"] * 3


def test_a_pause_bounds_what_all_of_them_have_of_the_loop():
    now, busy, calls = 0.0, 0.0, []
    turns = Turns(lambda call: calls.append((now + 0.002, call)))

    def go_on():
        nonlocal now, busy
        now += 0.0005
        busy += 0.0005
        turns.wait(go_on)

    for _ in range(100):
        turns.wait(go_on)
    while now < 1.0:
        (at, call), *calls = calls  # there is never more than one
        assert not calls
        now = max(now, at)
        call()
    assert 0.19 < busy < 0.21
