"""Many deadlines on one timer, with a clock that moves when told to."""

import pytest

from interface_server.deadlines import Deadlines


class World:
    def __init__(self):
        self.now = 500.0
        self.timers = []
        self.deadlines = Deadlines(call_later=self.call_later, clock=lambda: self.now, tick_s=0.5)
        self.reached = []

    def call_later(self, delay_s, callback):
        timer = Timer(self, self.now + delay_s, callback)
        self.timers.append(timer)
        return timer

    def advance(self, seconds):
        end = self.now + seconds
        while due := [timer for timer in self.timers if timer.when <= end]:
            first = min(due, key=lambda timer: timer.when)
            self.timers.remove(first)
            self.now = max(self.now, first.when)
            first.callback()
        self.now = end

    def item(self, name, **arguments):
        return Item(self, name, **arguments)


class Timer:
    def __init__(self, world, when, callback):
        self.world, self.when, self.callback = world, when, callback

    def cancel(self):
        self.world.timers.remove(self)


class Item:
    def __init__(self, world, name, *, then=lambda item: None):
        self.world, self.name, self.then = world, name, then
        self.deadline_tick = None

    def deadline_reached(self):
        self.world.reached.append((self.name, self.world.now))
        self.then(self)


def test_one_that_fails_does_not_stop_the_others(caplog):
    world = World()

    def fail(item):
        raise RuntimeError("a fault of ours")

    world.deadlines.arm(world.item("a", then=fail), 1)
    world.deadlines.arm(world.item("b"), 1)
    world.deadlines.arm(world.item("c"), 2)
    world.advance(3)
    assert sorted(name for name, _ in world.reached) == ["a", "b", "c"]
    assert "a fault of ours" in caplog.text
    assert world.deadlines.statistics().armed_count == 0


@pytest.mark.parametrize("delay_s", [0, 0.1, 0.5, 0.7, 1, 20, 86_400])
def test_a_deadline_is_never_early_and_late_by_a_tick_at_most(delay_s):
    for offset in (0.0, 0.1, 0.49):
        world = World()
        world.now += offset
        start = world.now
        world.deadlines.arm(world.item("a"), delay_s)
        world.advance(delay_s + 2)
        ((name, when),) = world.reached
        assert name == "a"
        assert delay_s <= when - start <= delay_s + 1.0


def test_deadlines_are_reached_in_order_and_once():
    world = World()
    for name, delay in (("c", 30), ("a", 1), ("b", 10)):
        world.deadlines.arm(world.item(name), delay)
    world.advance(100)
    assert [name for name, _ in world.reached] == ["a", "b", "c"]
    assert world.deadlines.statistics().reached_count == 3


def test_arming_again_moves_the_deadline():
    world = World()
    item = world.item("a")
    world.deadlines.arm(item, 5)
    world.advance(4)
    world.deadlines.arm(item, 5)
    world.advance(4)
    assert world.reached == []
    assert world.deadlines.statistics().armed_count == 1
    world.advance(2)
    assert len(world.reached) == 1


def test_disarming():
    world = World()
    item = world.item("a")
    world.deadlines.disarm(item)
    world.deadlines.arm(item, 5)
    world.deadlines.disarm(item)
    world.deadlines.disarm(item)
    world.advance(10)
    assert world.reached == []
    assert world.deadlines.statistics().armed_count == 0


def test_one_timer_for_all_and_none_without_any():
    world = World()
    assert world.timers == []
    for number in range(1000):
        world.deadlines.arm(world.item(number), number / 100)
    assert len(world.timers) == 1
    world.advance(60)
    assert len(world.reached) == 1000
    assert world.timers == []
    world.deadlines.arm(world.item("later"), 1)
    assert len(world.timers) == 1


def test_a_callback_may_arm_and_disarm():
    world = World()
    other = world.item("other")

    def again(item):
        world.deadlines.disarm(other)
        if len(world.reached) < 3:
            world.deadlines.arm(item, 0)

    world.deadlines.arm(world.item("a", then=again), 1)
    world.deadlines.arm(other, 3)
    world.advance(10)
    assert [name for name, _ in world.reached] == ["a"] * 3
    assert world.timers == []


def test_many_at_once_are_spread_over_loop_turns():
    world = World()
    for number in range(1000):
        world.deadlines.arm(world.item(number), 1)
    turns = []
    while world.timers:
        before = len(world.reached)
        timer = world.timers.pop()
        world.now = max(world.now, timer.when)
        timer.callback()
        if len(world.reached) > before:
            turns.append(len(world.reached) - before)
    assert len(world.reached) == 1000
    assert len(turns) >= 4
    assert max(turns) <= 250


def test_one_that_is_disarmed_or_moved_while_it_waits_for_its_turn_is_not_reached():
    world = World()
    items = [world.item(number) for number in range(600)]

    def meddle(item):
        if item.name is None:
            return
        for other in items:
            other.then = lambda item: None
        done = {name for name, _ in world.reached}
        left = [other for other in items if other.name not in done]
        for other in left[1:]:
            world.deadlines.disarm(other)
        world.deadlines.arm(left[0], 50)

    for item in items:
        item.then = meddle
        world.deadlines.arm(item, 1)
    world.advance(20)
    assert len(world.reached) == 1
    world.advance(50)
    assert len(world.reached) == 2
    assert world.deadlines.statistics().armed_count == 0


def test_after_a_long_stop_of_the_loop_everything_is_reached():
    world = World()
    for delay in (1, 10, 100, 1000):
        world.deadlines.arm(world.item(delay), delay)
    world.now += 500
    world.advance(1)
    assert [name for name, _ in world.reached] == [1, 10, 100]


def test_close():
    world = World()
    world.deadlines.arm(world.item("a"), 1)
    world.deadlines.close()
    world.deadlines.close()
    world.advance(10)
    assert world.reached == []
    assert "armed" in repr(world.deadlines)
