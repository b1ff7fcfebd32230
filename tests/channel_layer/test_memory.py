from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import pytest

from channel_layer.base import ChannelLayer
from channel_layer.memory import InMemoryChannelLayer
from tests.channel_layer.contract import ChannelLayerContract, let_it_wait


class TestInMemoryChannelLayer(ChannelLayerContract):
    idle_s = 0.1  # no socket below, so no timeout to outlive

    @pytest.fixture
    def make_layer(self) -> Any:
        async def make(**options: Any) -> ChannelLayer:
            return InMemoryChannelLayer(**options)

        return make

    @pytest.fixture
    def make_peer(self) -> Any:
        async def make(layer: ChannelLayer) -> ChannelLayer:
            return layer

        return make

    @pytest.fixture
    def held_messages(self) -> Any:
        return lambda layer: layer.statistics().messages


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_a_message_expires_exactly_at_its_deadline() -> None:
    clock = Clock()
    layer = InMemoryChannelLayer(expiry=60, clock=clock)
    await layer.send("a", {"type": "old"})
    clock.now += 59.999
    assert await layer.receive("a") == {"type": "old"}
    await layer.send("a", {"type": "old"})
    clock.now += 30
    await layer.send("a", {"type": "fresh"})
    clock.now += 30
    assert await layer.receive("a") == {"type": "fresh"}
    assert layer.statistics().expired_count == 1
    assert layer.statistics().channels == 0


async def test_channels_nobody_asks_for_are_swept_by_any_call() -> None:
    clock = Clock()
    layer = InMemoryChannelLayer(expiry=60, clock=clock)
    for number in range(1000):
        await layer.send(f"specific.gone!{number % 7}.{number}" if number < 100 else f"n{number}", {"type": "x"})
    assert layer.statistics().channels == 1000
    clock.now += 61
    await layer.group_add("g", "c")
    statistics = layer.statistics()
    assert (statistics.channels, statistics.messages, statistics.expired_count) == (0, 0, 1000)
    assert layer._shares == {}


async def test_a_received_channel_leaves_nothing_behind() -> None:
    layer = InMemoryChannelLayer()
    for _ in range(50):
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.send(channel, {"type": "x"})
        await layer.receive(channel)
        await layer.group_discard("room", channel)
        waiting = asyncio.create_task(layer.receive(channel))
        await let_it_wait(waiting)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert not any((layer._channels, layer._shares, layer._groups, layer._groups_of, layer._unread_since))


async def test_membership_ends_a_group_expiry_after_the_last_group_add() -> None:
    clock = Clock()
    layer = InMemoryChannelLayer(group_expiry=100, clock=clock)
    await layer.group_add("room", "early")
    await layer.group_add("room", "again")
    clock.now += 99
    await layer.group_add("room", "again")
    clock.now += 1
    await layer.group_send("room", {"type": "x"})
    assert await layer.receive("again") == {"type": "x"}
    assert layer.statistics().members == 1
    clock.now += 100
    await layer.send("other", {"type": "x"})
    assert layer.statistics().groups == 0


async def test_a_local_channel_that_nobody_reads_any_more_leaves_its_groups() -> None:
    clock = Clock()
    layer = InMemoryChannelLayer(expiry=60, clock=clock)
    gone, busy, alive = [await layer.new_channel() for _ in range(3)]
    for channel in (gone, busy, alive, "normal"):
        for group in ("room", "lobby"):
            await layer.group_add(group, channel)
    for round_number in range(11):
        await layer.group_send("room", {"type": "x", "number": round_number})
        assert (await layer.receive(alive))["number"] == round_number
        if round_number == 8:
            # At work for eight minutes, not gone. What it missed is expired.
            assert (await layer.receive(busy))["number"] == round_number
        clock.now += 61
    assert layer.statistics().members == 8
    await layer.group_send("room", {"type": "x"})
    # A normal channel stays: its readers may be away for long and come back.
    assert layer.statistics().members == 6
    assert set(layer._groups["lobby"]) == {busy, alive, "normal"}
    assert set(layer._unread_since) == {busy}
    for channel in (busy, alive, "normal"):
        await layer.receive(channel)
    assert layer.statistics().messages == 0


async def test_a_message_a_reader_waits_for_needs_no_capacity() -> None:
    layer = InMemoryChannelLayer(capacity=1)
    channels = [await layer.new_channel() for _ in range(20)]
    readers = [asyncio.create_task(layer.receive(channel)) for channel in channels]
    await let_it_wait(readers[0])
    for channel in channels:
        await layer.send(channel, {"type": "x", "to": channel})
    assert [message["to"] for message in await asyncio.gather(*readers)] == channels
    assert layer.statistics().full_count == 0


async def test_expired_messages_do_not_fill_the_share_of_a_process() -> None:
    clock = Clock()
    layer = InMemoryChannelLayer(capacity=2, expiry=60, clock=clock)
    await layer.send("p!a", {"type": "x"})
    clock.now += 59
    await layer.send("p!b", {"type": "x"})
    with pytest.raises(layer.ChannelFull):
        await layer.send("p!c", {"type": "x"})
    clock.now += 1
    layer._next_sweep = clock.now + 1000  # the room is found without a sweep
    await layer.send("p!c", {"type": "x"})
    assert layer.statistics().full_count == 1


async def test_full_members_are_counted() -> None:
    layer = InMemoryChannelLayer(capacity=1)
    await layer.group_add("room", "full")
    for _ in range(3):
        await layer.group_send("room", {"type": "x"})
    assert layer.statistics().group_dropped_count == 2
    assert "group_dropped_count=2" in repr(layer)


async def test_readers_are_served_in_the_order_of_their_asking() -> None:
    layer = InMemoryChannelLayer()
    readers = [asyncio.create_task(layer.receive("a")) for _ in range(3)]
    await let_it_wait(readers[0])
    for number in range(3):
        await layer.send("a", {"type": "x", "number": number})
    assert [message["number"] for message in await asyncio.gather(*readers)] == [0, 1, 2]


async def test_a_message_in_the_hands_of_a_cancelled_reader_goes_to_the_next() -> None:
    layer = InMemoryChannelLayer()
    first, second = (asyncio.create_task(layer.receive("a")) for _ in range(2))
    await let_it_wait(second)
    await layer.send("a", {"type": "x"})
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert first.cancelled()
    assert await second == {"type": "x"}


async def test_a_message_in_the_hands_of_a_cancelled_reader_goes_back_to_the_head() -> None:
    layer = InMemoryChannelLayer()
    reader = asyncio.create_task(layer.receive("p!a"))
    await let_it_wait(reader)
    await layer.send("p!a", {"type": "in hand"})
    await layer.send("p!a", {"type": "in the queue"})
    assert not reader.done()
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    assert reader.cancelled()
    assert [(await layer.receive("p!a"))["type"] for _ in range(2)] == ["in hand", "in the queue"]
    assert layer._shares == {}


async def test_a_broadcast_leaves_the_share_of_a_process_to_direct_messages() -> None:
    layer = InMemoryChannelLayer(capacity=2)
    channels = [await layer.new_channel() for _ in range(5)]
    for channel in channels:
        await layer.group_add("room", channel)
    await layer.group_send("room", {"type": "x"})
    for channel in channels[:2]:
        await layer.send(channel, {"type": "y"})
    with pytest.raises(layer.ChannelFull):
        await layer.send(channels[2], {"type": "y"})


async def test_a_receiver_that_always_finds_a_message_lets_others_run() -> None:
    layer = InMemoryChannelLayer()
    for _ in range(100):
        await layer.send("a", {"type": "x"})
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(count_turns())
    for _ in range(100):
        await layer.receive("a")
    assert turns >= 99
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)


async def test_a_cancelled_send_has_sent_nothing() -> None:
    layer = InMemoryChannelLayer()
    sending = asyncio.create_task(layer.send("a", {"type": "x"}))
    await asyncio.sleep(0)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    assert layer.statistics().messages == 0


def test_a_reader_on_a_loop_that_stands_still_gets_its_message_later() -> None:
    layer = InMemoryChannelLayer()
    loop = asyncio.new_event_loop()

    async def start() -> asyncio.Task[dict[str, Any]]:
        task = loop.create_task(layer.receive("a"))
        await let_it_wait(task)
        return task

    waiting = loop.run_until_complete(start())
    asyncio.run(layer.send("a", {"type": "x"}))
    asyncio.run(layer.send("a", {"type": "y"}))
    # Not lost in the hands of a reader that may never run again:
    assert asyncio.run(layer.receive("a")) == {"type": "x"}
    assert loop.run_until_complete(waiting) == {"type": "y"}
    loop.close()
    assert layer.statistics().channels == 0


def test_a_reader_whose_loop_was_closed_under_it_takes_nothing() -> None:
    layer = InMemoryChannelLayer()
    loop = asyncio.new_event_loop()

    async def start() -> asyncio.Task[dict[str, Any]]:
        task = loop.create_task(layer.receive("a"))
        await let_it_wait(task)
        return task

    abandoned = loop.run_until_complete(start())
    abandoned._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    asyncio.run(layer.send("a", {"type": "x"}))
    del abandoned
    gc.collect()
    assert layer.statistics().readers == 0
    assert asyncio.run(layer.receive("a")) == {"type": "x"}


def test_threads_that_send_to_and_cancel_readers_of_other_threads_lose_nothing() -> None:
    layer = InMemoryChannelLayer(capacity=10_000)
    received: list[int] = []
    stop = threading.Event()

    async def read_and_cancel() -> None:
        while not stop.is_set():
            reader = asyncio.create_task(layer.receive("a"))
            await asyncio.wait([reader], timeout=0.0005)
            reader.cancel()
            results = await asyncio.gather(reader, return_exceptions=True)
            received.extend(result["number"] for result in results if isinstance(result, dict))

    async def send_all() -> None:
        for number in range(1500):
            await layer.send("a", {"type": "x", "number": number})

    threads = [threading.Thread(target=asyncio.run, args=(read_and_cancel(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    asyncio.run(send_all())
    stop.set()
    for thread in threads:
        thread.join()

    async def rest() -> None:
        for _ in range(layer.statistics().messages):
            received.append((await layer.receive("a"))["number"])

    asyncio.run(rest())
    assert sorted(received) == list(range(1500))


async def test_django_channels_uses_it_as_a_backend() -> None:
    pytest.importorskip("channels")
    from asgiref.testing import ApplicationCommunicator
    from channels.consumer import AsyncConsumer
    from channels.layers import channel_layers
    from django.conf import settings

    if not settings.configured:
        settings.configure()
    layer = InMemoryChannelLayer()
    previous = channel_layers.set("default", layer)

    class Greeter(AsyncConsumer):  # type: ignore[misc]
        async def test_join(self, message: dict[str, Any]) -> None:
            await self.channel_layer.group_add("room", self.channel_name)
            await self.send({"type": "test.joined"})

        async def test_greet(self, message: dict[str, Any]) -> None:
            await self.send({"type": "test.greeted", "name": message["name"]})

    try:
        communicator = ApplicationCommunicator(Greeter.as_asgi(), {"type": "test"})
        await communicator.send_input({"type": "test.join"})
        assert await communicator.receive_output() == {"type": "test.joined"}
        await layer.group_send("room", {"type": "test.greet", "name": "Ada"})
        assert await communicator.receive_output() == {"type": "test.greeted", "name": "Ada"}
        communicator.stop()
    finally:
        channel_layers.set("default", previous)


async def test_tests_may_look_into_channels_and_groups_as_in_channels_own_layer() -> None:
    layer = InMemoryChannelLayer(expiry=60, group_expiry=100, clock=lambda: 7.0)
    await layer.send("work", {"type": "x"})
    await layer.group_add("room", "work")
    reading = asyncio.create_task(layer.receive("awaited"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert layer.channels == {"work": [{"type": "x"}], "awaited": []}
    assert layer.groups == {"room": {"work": 107.0}}
    layer.channels.clear()
    layer.groups["room"].clear()
    assert (len(layer.channels), len(layer.groups["room"])) == (2, 1)
    reading.cancel()
    await layer.flush()
    assert layer.groups == {}
