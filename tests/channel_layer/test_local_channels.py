"""Queues of process-local channels: hands, capacity, expiry, cancelled calls and readers that are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from channel_layer.capacity import Capacities
from channel_layer.errors import BrokerUnavailable, ChannelFull
from channel_layer.local_channels import LocalChannels


class Clock:
    """A loop whose time the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._loop = asyncio.get_running_loop()

    def time(self) -> float:
        return self.now

    def create_future(self) -> asyncio.Future[Any]:
        return self._loop.create_future()


@pytest.fixture
async def clock() -> Clock:
    return Clock()


@pytest.fixture
def abandoned() -> list[str]:
    return []


@pytest.fixture
def make(clock: Clock, abandoned: list[str]) -> Callable[..., LocalChannels]:
    def make(capacity: int = 3, expiry_s: float = 10.0) -> LocalChannels:
        loop: Any = clock
        return LocalChannels(
            capacities=Capacities(capacity), expiry_s=expiry_s, loop=loop, abandoned=abandoned.append
        )

    return make


Make = Callable[..., LocalChannels]


async def waiting_call(local: LocalChannels, channel: str) -> asyncio.Task[bytes]:
    task = asyncio.create_task(local.receive(channel))
    await asyncio.sleep(0)
    return task


async def test_messages_wait_in_order_and_leave_nothing_behind(make: Make) -> None:
    local = make()
    local.store("x.c1!a", b"1")
    local.deliver(["x.c1!a"], b"2")
    assert [await local.receive("x.c1!a"), await local.receive("x.c1!a")] == [b"1", b"2"]
    assert local.statistics().channels == 0


async def test_a_waiting_call_gets_the_message_at_once(make: Make) -> None:
    local = make()
    call = await waiting_call(local, "x.c1!a")
    local.deliver(["x.c1!a", "x.c1!b"], b"1")
    assert await call == b"1"
    assert await local.receive("x.c1!b") == b"1"


async def test_own_sends_share_the_capacity_of_the_process(make: Make) -> None:
    local = make(capacity=3)
    for name in "abc":
        local.store(f"x.c1!{name}", b"1")
    with pytest.raises(ChannelFull, match=r"x\.c1!"):
        local.store("x.c1!d", b"1")
    local.store("y.c1!a", b"1")
    await local.receive("x.c1!b")
    local.store("x.c1!d", b"1")
    assert local.statistics().full_count == 1


async def test_a_delivered_message_is_dropped_for_a_full_channel_only(make: Make) -> None:
    local = make(capacity=2)
    for number in range(4):
        local.deliver(["x.c1!a"], b"%d" % number)
    local.deliver(["x.c1!a", "x.c1!b"], b"last")
    assert [await local.receive("x.c1!a"), await local.receive("x.c1!a")] == [b"0", b"1"]
    assert await local.receive("x.c1!b") == b"last"
    assert local.statistics().dropped_count == 3


async def test_deliveries_do_not_count_against_the_shared_capacity(make: Make) -> None:
    local = make(capacity=3)
    channels = [f"x.c1!{number}" for number in range(50)]
    local.deliver(channels, b"1")
    assert local.statistics().messages == 50
    local.store("x.c1!a", b"1")


async def test_expired_messages_are_dropped_and_make_room(make: Make, clock: Clock) -> None:
    local = make(capacity=2)
    local.store("x.c1!a", b"1")
    local.store("x.c1!b", b"2")
    with pytest.raises(ChannelFull):
        local.store("x.c1!b", b"3")
    clock.now += 11
    local.store("x.c1!b", b"4")
    assert await local.receive("x.c1!b") == b"4"
    call = await waiting_call(local, "x.c1!a")
    assert not call.done()
    local.store("x.c1!a", b"5")
    assert await call == b"5"
    assert local.statistics().expired_count == 2


async def test_what_is_left_of_a_lifetime_counts(make: Make, clock: Clock) -> None:
    local = make()
    local.deliver(["x.c1!a"], b"old", 2.0)
    local.deliver(["x.c1!a"], b"gone", 0.0)
    local.deliver(["x.c1!a"], b"new")
    clock.now += 3
    assert await local.receive("x.c1!a") == b"new"
    assert local.statistics().expired_count == 2


async def test_a_sweep_empties_what_nobody_reads(make: Make, clock: Clock) -> None:
    local = make()
    for number in range(100):
        local.deliver([f"x.c1!{number}"], b"1")
    clock.now += 11
    local.sweep()
    assert local.statistics().messages == 0


async def test_a_channel_without_a_reader_for_long_is_abandoned_and_forgotten(
    make: Make, clock: Clock, abandoned: list[str]
) -> None:
    local = make(expiry_s=10.0)
    for _ in range(30):
        local.deliver(["x.c1!a"], b"1")
        clock.now += 4
        local.sweep()
        if abandoned:
            break
    assert abandoned == ["x.c1!a"]
    assert 90 < clock.now - 1000 < 120
    assert local.statistics().channels == 0


async def test_a_slow_reader_is_not_abandoned(make: Make, clock: Clock, abandoned: list[str]) -> None:
    local = make(expiry_s=10.0)
    for _ in range(30):
        local.deliver(["x.c1!a"], b"1")
        clock.now += 40  # it works, then asks for the next
        local.sweep()
        call = await waiting_call(local, "x.c1!a")
        local.deliver(["x.c1!a"], b"2")
        assert await call == b"2"
    assert abandoned == []


async def test_a_cancelled_call_leaves_its_place(make: Make) -> None:
    local = make()
    first = await waiting_call(local, "x.c1!a")
    second = await waiting_call(local, "x.c1!a")
    first.cancel()
    local.store("x.c1!a", b"1")
    assert await second == b"1"
    with pytest.raises(asyncio.CancelledError):
        await first
    assert local.statistics().channels == 0


async def test_a_call_cancelled_with_the_message_in_its_hands_puts_it_back_first(make: Make) -> None:
    local = make()
    call = await waiting_call(local, "x.c1!a")
    local.store("x.c1!a", b"1")
    call.cancel()
    local.store("x.c1!a", b"2")
    with pytest.raises(asyncio.CancelledError):
        await call
    assert [await local.receive("x.c1!a"), await local.receive("x.c1!a")] == [b"1", b"2"]


async def test_a_call_cancelled_with_the_message_in_its_hands_gives_it_to_the_next_call(make: Make) -> None:
    local = make()
    first = await waiting_call(local, "x.c1!a")
    second = await waiting_call(local, "x.c1!a")
    local.store("x.c1!a", b"1")
    first.cancel()
    assert await second == b"1"


async def test_a_message_given_back_is_the_next(make: Make) -> None:
    local = make()
    local.store("x.c1!a", b"1")
    local.store("x.c1!a", b"2")
    taken = await local.receive("x.c1!a")
    local.give_back("x.c1!a", taken)
    assert [await local.receive("x.c1!a"), await local.receive("x.c1!a")] == [b"1", b"2"]


async def test_unread_channels_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("channel_layer.local_channels._UNREAD_CHANNELS_MAX", 5)
    local = make(capacity=100)
    for number in range(10):
        local.deliver([f"x.c1!{number}"], b"1")
    assert (local.statistics().channels, local.statistics().dropped_count) == (5, 5)
    assert await local.receive("x.c1!0") == b"1"
    local.deliver(["x.c1!7"], b"2")
    assert await local.receive("x.c1!7") == b"2"


async def test_clear_forgets_messages_and_keeps_calls(make: Make) -> None:
    local = make(capacity=1)
    local.store("x.c1!a", b"1")
    call = await waiting_call(local, "x.c1!b")
    local.clear()
    local.store("x.c1!a", b"2")
    assert await local.receive("x.c1!a") == b"2"
    local.store("x.c1!b", b"3")
    assert await call == b"3"


async def test_close_ends_the_calls(make: Make) -> None:
    local = make()
    call = await waiting_call(local, "x.c1!a")
    local.close()
    with pytest.raises(BrokerUnavailable):
        await call
    assert repr(local) == "<LocalChannels channels=0 unread=0>"
