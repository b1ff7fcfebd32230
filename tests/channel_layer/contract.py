"""What every channel layer must do, as one suite: C1-C22 of docs/conformance.md and the faults of older layers.

``ChannelLayerContract`` is run by test_memory.py and test_redis_layer.py, which derive from it and give it three
fixtures: ``make_layer(**options)`` (capacity, channel_capacity, expiry), ``make_peer(layer)`` (another layer on the
same store, as another process would have; the same object where there is none) and ``held_messages(layer)``
(messages this layer holds in this process's memory). C23 is replaced by links, the group expiry of C17 by deadlines.

"Nothing more came" is shown by what comes next, not by waiting, wherever the contract allows that.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from channel_layer.base import ChannelLayer
from channel_layer.errors import InvalidMessage, InvalidName
from channel_layer.messages import MESSAGE_BYTES_MAX
from channel_layer.names import NAME_LENGTH_MAX, check_channel_name, new_process_id

MakeLayer = Callable[..., Awaitable[ChannelLayer]]
MakePeer = Callable[[ChannelLayer], Awaitable[ChannelLayer]]
HeldMessages = Callable[[ChannelLayer], int]

# Far beyond what anything here takes, so that it is reached only when something is broken.
PATIENCE_S = 60.0
# Broker clocks are estimated, so a message may be delivered this long after its deadline.
CLOCK_SLACK_S = 0.2

BAD_CHANNEL_NAMES = [
    "",
    "a\n",
    "a b",
    "a/b",
    "a?b",
    "x!y!z",
    "!x",
    "x!é",
    "é",
    "٣",
    "x!٣",
    "x!y\n",
    "a" * (NAME_LENGTH_MAX + 1),
    b"bytes",
    None,
    7,
]
BAD_GROUP_NAMES = ["", "a\n", "a b", "a!b", "a?", "é", "٣", "g" * (NAME_LENGTH_MAX + 1), b"bytes", None, 7]


async def receive(layer: ChannelLayer, channel: str) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        return await layer.receive(channel)


async def drain(layer: ChannelLayer, channel: str) -> list[dict[str, Any]]:
    """Receive a message, and on until nothing has come for half a second; for what the contract leaves open."""
    received = [await receive(layer, channel)]
    try:
        while True:
            async with asyncio.timeout(0.5):
                received.append(await layer.receive(channel))
    except TimeoutError:
        return received


async def let_it_wait(task: asyncio.Task[Any]) -> None:
    """Give a receive() the turns it needs to get to its waiting."""
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()


def in_another_loop(call: Callable[[], Awaitable[Any]]) -> Awaitable[Any]:
    """Await ``call()`` on a new loop in another thread, as ``async_to_sync`` does for a view."""

    async def run() -> Any:
        return await call()

    return asyncio.to_thread(lambda: asyncio.run(run()))


class ChannelLayerContract:
    """Derive, name the class Test…, and provide the fixtures of the module's docstring."""

    # How long the idle receive() of one test waits. Layers with a broker: more than the 5 s after which redis-py's
    # default socket timeout ends a blocking read.
    idle_s = 5.5

    # Attributes

    async def test_extensions_and_error_classes(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        assert {"groups", "flush"} <= set(layer.extensions)
        assert issubclass(layer.ChannelFull, Exception)
        assert issubclass(layer.MessageTooLarge, Exception)

    # Names: C2-C5

    @pytest.mark.parametrize("name", BAD_CHANNEL_NAMES, ids=ascii)
    async def test_bad_channel_name_is_a_type_error(self, make_layer: MakeLayer, name: Any) -> None:
        layer = await make_layer()
        for call in (
            lambda: layer.send(name, {"type": "x"}),
            lambda: layer.receive(name),
            lambda: layer.group_add("group", name),
            lambda: layer.group_discard("group", name),
        ):
            with pytest.raises(TypeError) as raised:
                await call()
            assert isinstance(raised.value, InvalidName)
            assert repr(name) in str(raised.value)

    @pytest.mark.parametrize("name", BAD_GROUP_NAMES, ids=ascii)
    async def test_bad_group_name_is_a_type_error(self, make_layer: MakeLayer, name: Any) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        for call in (
            lambda: layer.group_add(name, channel),
            lambda: layer.group_discard(name, channel),
            lambda: layer.group_send(name, {"type": "x"}),
        ):
            with pytest.raises(TypeError) as raised:
                await call()
            assert isinstance(raised.value, InvalidName)

    async def test_names_of_100_characters(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        name = "c" * NAME_LENGTH_MAX
        await layer.send(name, {"type": "long"})
        assert await receive(layer, name) == {"type": "long"}
        member = await layer.new_channel()
        await layer.group_add("g" * NAME_LENGTH_MAX, member)
        await layer.group_send("g" * NAME_LENGTH_MAX, {"type": "long"})
        assert await receive(layer, member) == {"type": "long"}

    async def test_all_characters_of_names(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        name = "azAZ09.-_"
        await layer.send(name, {"type": "x"})
        assert await receive(layer, name) == {"type": "x"}

    # Messages: C1, C10, C11, C20, C21

    async def test_every_allowed_value_arrives_as_it_was(self, make_layer: MakeLayer, make_peer: MakePeer) -> None:
        layer = await make_layer()
        message = {
            "type": "all",
            "bytes": b"\x00\xff",
            "text": "\x00é€𝄞",
            "empty": ["", b"", [], {}],
            "int": [0, -1, 2**63 - 1, -(2**63)],
            "float": [0.0, -1.5, 1e308, 5e-324],
            "bool": [True, False],
            "none": None,
            "nested": {"a": [{"b": [b"c", {"": "d"}]}]},
        }
        await layer.send("all", message)
        received = await receive(await make_peer(layer), "all")
        assert received == message
        assert repr(received) == repr(message)  # also the types: True is not 1, 0.0 is not 0

    async def test_bytes_and_text_stay_apart(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        await layer.send(channel, {"type": "x", "value": b"text"})
        await layer.send(channel, {"type": "x", "value": "text"})
        first, second = await receive(layer, channel), await receive(layer, channel)
        assert (type(first["value"]), type(second["value"])) == (bytes, str)

    async def test_tuples_become_lists(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.send("tuples", {"type": "x", "value": (1, (b"a", "b"))})
        assert (await receive(layer, "tuples"))["value"] == [1, [b"a", "b"]]

    async def test_bad_value_is_refused_with_its_place_and_nothing_is_sent(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        await layer.group_add("group", channel)
        for value in (float("nan"), float("inf"), 2**63, {1: 2}, {1, 2}, bytearray(b"x"), "\ud800", object()):
            bad = {"type": "x", "headers": [[b"a", b"b"], ["c", 1, value]]}
            with pytest.raises(InvalidMessage, match=re.escape('message["headers"][1][2]: ')):
                await layer.send(channel, bad)
            with pytest.raises(InvalidMessage, match=re.escape('message["headers"][1][2]: ')):
                await layer.group_send("group", bad)
        await layer.send(channel, {"type": "next"})
        assert await receive(layer, channel) == {"type": "next"}

    async def test_a_message_is_a_dict_without_the_reserved_key(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        bad: Any
        for bad in ("text", [("type", "x")], None, {"type": "x", "__asgi_channel__": "a"}):
            with pytest.raises(InvalidMessage):
                await layer.send("normal", bad)
            with pytest.raises(InvalidMessage):
                await layer.group_send("group", bad)

    async def test_altering_a_message_after_send_alters_nothing(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        await layer.group_add("group", channel)
        message = {"type": "x", "list": [1, {"a": "b"}]}
        await layer.send(channel, message)
        message["list"][1]["a"] = "changed"  # type: ignore[index]
        await layer.group_send("group", message)
        message["list"].append(2)  # type: ignore[attr-defined]
        first, second = await receive(layer, channel), await receive(layer, channel)
        assert first == {"type": "x", "list": [1, {"a": "b"}]}
        assert second == {"type": "x", "list": [1, {"a": "changed"}]}

    async def test_receivers_get_messages_of_their_own(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channels = [await layer.new_channel(), await layer.new_channel()]
        for channel in channels:
            await layer.group_add("group", channel)
        await layer.group_send("group", {"type": "x", "list": []})
        first, second = [await receive(layer, channel) for channel in channels]
        first["list"].append("mine")
        assert second == {"type": "x", "list": []}

    async def test_a_message_of_1_mb_as_json_arrives(self, make_layer: MakeLayer, make_peer: MakePeer) -> None:
        layer = await make_layer()
        text = "x" * (1_000_000 - len('{"type": "big", "text": ""}'))
        await layer.send("big", {"type": "big", "text": text})
        assert (await receive(await make_peer(layer), "big"))["text"] == text
        channel = await layer.new_channel()
        await layer.send(channel, {"type": "big", "text": text})
        assert (await receive(layer, channel))["text"] == text

    async def test_a_message_above_the_limit_is_too_large(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        await layer.group_add("group", channel)
        too_large = {"type": "big", "data": bytes(MESSAGE_BYTES_MAX)}
        with pytest.raises(layer.MessageTooLarge, match=str(MESSAGE_BYTES_MAX)):
            await layer.send(channel, too_large)
        with pytest.raises(layer.MessageTooLarge, match=str(MESSAGE_BYTES_MAX)):
            await layer.group_send("group", too_large)
        await layer.send(channel, {"type": "next"})
        assert await receive(layer, channel) == {"type": "next"}

    # Normal channels: C6, C8

    async def test_first_in_first_out(self, make_layer: MakeLayer, make_peer: MakePeer) -> None:
        layer = await make_layer()
        peer = await make_peer(layer)
        for number in range(60):
            await layer.send("fifo", {"type": "x", "number": number})
        assert [(await receive(peer, "fifo"))["number"] for _ in range(60)] == list(range(60))

    @pytest.mark.parametrize("step_s", [0.0, -0.5], ids=["frozen", "stepping back"])
    async def test_order_does_not_come_from_a_clock(
        self, make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch, step_s: float
    ) -> None:
        layer = await make_layer()
        now = time.time()

        def odd_clock() -> float:
            nonlocal now
            now += step_s
            return now

        channel = await layer.new_channel()
        monkeypatch.setattr(time, "time", odd_clock)
        for number in range(20):
            await layer.send("clock", {"type": "x", "number": number})
            await layer.send(channel, {"type": "x", "number": number})
        assert [(await receive(layer, "clock"))["number"] for _ in range(20)] == list(range(20))
        assert [(await receive(layer, channel))["number"] for _ in range(20)] == list(range(20))

    async def test_several_readers_never_get_the_same_message(
        self, make_layer: MakeLayer, make_peer: MakePeer
    ) -> None:
        layer = await make_layer(capacity=1000)
        peer = await make_peer(layer)
        received: list[int] = []

        async def read(reading_layer: ChannelLayer) -> None:
            while True:
                received.append((await reading_layer.receive("work"))["number"])
                if len(received) >= 400:
                    complete.set()
                if received[-1] == 400:
                    over.set()

        complete, over = asyncio.Event(), asyncio.Event()
        readers = [asyncio.create_task(read(each)) for each in (layer, peer, layer, peer)]
        for number in range(400):
            await layer.send("work", {"type": "x", "number": number})
        async with asyncio.timeout(PATIENCE_S):
            await complete.wait()
        # A duplicate would come before this, the last message.
        await layer.send("work", {"type": "x", "number": 400})
        async with asyncio.timeout(PATIENCE_S):
            await over.wait()
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        assert sorted(received) == list(range(401))

    async def test_a_message_waits_for_its_reader(self, make_layer: MakeLayer, make_peer: MakePeer) -> None:
        layer = await make_layer()
        await layer.send("later", {"type": "x"})
        assert await receive(await make_peer(layer), "later") == {"type": "x"}

    async def test_a_reader_waits_for_its_message(self, make_layer: MakeLayer, make_peer: MakePeer) -> None:
        layer = await make_layer()
        waiting = asyncio.create_task(receive(layer, "soon"))
        await let_it_wait(waiting)
        await (await make_peer(layer)).send("soon", {"type": "x"})
        assert await waiting == {"type": "x"}

    async def test_channels_do_not_mix(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        names = ["a", "b", "a.b", "A"]
        for name in names:
            await layer.send(name, {"type": "x", "to": name})
        assert [(await receive(layer, name))["to"] for name in names] == names

    async def test_a_receive_that_is_idle_for_long_goes_on(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        normal = asyncio.create_task(receive(layer, "idle"))
        local = asyncio.create_task(receive(layer, channel))
        done, _ = await asyncio.wait([normal, local], timeout=self.idle_s)
        assert not done
        await layer.send("idle", {"type": "normal"})
        await layer.send(channel, {"type": "local"})
        assert await normal == {"type": "normal"}
        assert await local == {"type": "local"}

    # Cancelling

    @pytest.mark.parametrize("kind", ["normal", "process-local"])
    async def test_a_cancelled_receive_loses_doubles_and_reorders_nothing(
        self, make_layer: MakeLayer, kind: str
    ) -> None:
        layer = await make_layer()
        channel = "cancelled" if kind == "normal" else await layer.new_channel()
        received = []
        for number in range(60):
            reading = asyncio.create_task(layer.receive(channel))
            for _ in range(number % 4):
                await asyncio.sleep(0)  # cancelled in different stages of its waiting
            sending = asyncio.create_task(layer.send(channel, {"type": "x", "number": number}))
            for _ in range(number % 7):
                await asyncio.sleep(0)
            if number % 3 == 0:
                await sending
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                received.append((await reading)["number"])
            await sending
        await layer.send(channel, {"type": "x", "number": "last"})
        while not received or received[-1] != "last":
            received.append((await receive(layer, channel))["number"])
        assert received == [*range(60), "last"]

    async def test_a_cancelled_receive_leaves_the_message_to_the_other_readers(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        first = asyncio.create_task(layer.receive(channel))
        second = asyncio.create_task(receive(layer, channel))
        await let_it_wait(first)
        await layer.send(channel, {"type": "x"})
        first.cancel()
        results = await asyncio.gather(first, return_exceptions=True)
        if isinstance(results[0], asyncio.CancelledError):
            assert await second == {"type": "x"}
        else:
            assert results == [{"type": "x"}]
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)

    # Process-local channels: C7

    async def test_new_channels(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        names = {await layer.new_channel() for _ in range(100)}
        assert len(names) == 100
        for name in names:
            assert check_channel_name(name).startswith("specific.")
            assert "!" in name
        assert (await layer.new_channel("reply")).startswith("reply.")
        with pytest.raises(TypeError):
            await layer.new_channel("a b")
        with pytest.raises(TypeError):
            await layer.new_channel("p" * NAME_LENGTH_MAX)

    async def test_process_local_channels_do_not_mix_and_keep_order(
        self, make_layer: MakeLayer, make_peer: MakePeer
    ) -> None:
        layer = await make_layer()
        peer = await make_peer(layer)
        mine, other = await layer.new_channel(), await layer.new_channel()
        for number in range(30):
            await peer.send(mine, {"type": "x", "number": number})
            await peer.send(other, {"type": "x", "number": -number})
        assert [(await receive(layer, mine))["number"] for _ in range(30)] == list(range(30))
        assert [(await receive(layer, other))["number"] for _ in range(30)] == [-number for number in range(30)]

    # Expiry: C9

    @pytest.mark.parametrize("kind", ["normal", "process-local"])
    async def test_an_expired_message_is_never_delivered_even_if_others_follow(
        self, make_layer: MakeLayer, kind: str
    ) -> None:
        expiry_s = 1.0
        layer = await make_layer(expiry=expiry_s, capacity=1000)
        channel = "expiring" if kind == "normal" else await layer.new_channel()
        begun_at: list[float] = []
        sent_at: list[float] = []

        async def send() -> None:
            begun_at.append(time.monotonic())
            await layer.send(channel, {"type": "x", "number": len(begun_at) - 1})
            sent_at.append(time.monotonic())

        async def keep_sending() -> None:
            # Each send would re-arm an expiry of the whole channel. It goes on: whenever somebody receives,
            # something is alive.
            while True:
                await asyncio.sleep(0.05)
                await send()

        await send()
        sending = asyncio.create_task(keep_sending())
        await asyncio.sleep(1.5 * expiry_s)
        former = -1
        for _ in range(2):
            asked_at = time.monotonic()
            number = (await receive(layer, channel))["number"]
            received_at = time.monotonic()
            assert number > max(0, former)
            assert number >= len(sent_at) or sent_at[number] + expiry_s + CLOCK_SLACK_S >= asked_at
            # What is alive comes in order: all that is passed over has expired.
            assert all(at + expiry_s - CLOCK_SLACK_S <= received_at for at in begun_at[former + 1 : number])
            former = number
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

    # Capacity: C11, C12

    async def test_a_full_channel_refuses_at_once_and_takes_again_when_read(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(capacity=3)
        for number in range(3):
            await layer.send("full", {"type": "x", "number": number})
        with pytest.raises(layer.ChannelFull, match="full"):
            await layer.send("full", {"type": "x", "number": "refused"})
        assert (await receive(layer, "full"))["number"] == 0
        await layer.send("full", {"type": "x", "number": 3})
        assert [(await receive(layer, "full"))["number"] for _ in range(3)] == [1, 2, 3]

    async def test_other_channels_are_not_full(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(capacity=1)
        await layer.send("full", {"type": "x"})
        await layer.send("other", {"type": "x"})
        with pytest.raises(layer.ChannelFull):
            await layer.send("full", {"type": "x"})

    async def test_capacity_by_pattern_first_match_wins(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(
            capacity=2, channel_capacity={"images.*": 3, re.compile("images"): 9, re.compile(r"^mail\.\d+$"): 1}
        )
        for channel, capacity in (("images.small", 3), ("imagesx", 9), ("mail.7", 1), ("mail.x", 2), ("other", 2)):
            for _ in range(capacity):
                await layer.send(channel, {"type": "x"})
            with pytest.raises(layer.ChannelFull):
                await layer.send(channel, {"type": "x"})

    async def test_expired_messages_do_not_fill_a_channel(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(capacity=2, expiry=0.3)
        for number in range(2):
            await layer.send("full", {"type": "x", "number": number})
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await layer.send("full", {"type": "x", "number": 2})
                    break
                except layer.ChannelFull:
                    await asyncio.sleep(0.05)

    async def test_channels_of_one_process_share_a_capacity(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(capacity=3)
        # A process that does not read, so that what is sent to it stays.
        process = f"specific.{new_process_id('client')}!"
        for local in "abc":
            await layer.send(process + local, {"type": "x"})
        with pytest.raises(layer.ChannelFull, match=re.escape(process)):
            await layer.send(process + "d", {"type": "x"})
        with pytest.raises(layer.ChannelFull):
            await layer.send(process + "a", {"type": "x"})
        await layer.send(f"specific.{new_process_id('client')}!a", {"type": "x"})

    async def test_a_process_local_channel_nobody_reads_is_bounded(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(capacity=5)
        channel = await layer.new_channel()
        for number in range(30):
            with contextlib.suppress(layer.ChannelFull):
                await layer.send(channel, {"type": "x", "number": number})
        numbers = [message["number"] for message in await drain(layer, channel)]
        assert 1 <= len(numbers) <= 5
        assert numbers == sorted(set(numbers))

    async def test_messages_for_channels_nobody_reads_vanish(
        self, make_layer: MakeLayer, held_messages: HeldMessages
    ) -> None:
        layer = await make_layer(expiry=0.3, capacity=1000)
        for _ in range(50):
            channel = await layer.new_channel()
            await layer.group_add("abandoned", channel)
            await layer.send(channel, {"type": "x"})
            await layer.group_send("abandoned", {"type": "x"})
            await layer.group_discard("abandoned", channel)
        used = await layer.new_channel()
        async with asyncio.timeout(PATIENCE_S):
            while held_messages(layer):
                await asyncio.sleep(0.05)
                await layer.send(used, {"type": "x"})  # a layer may clean up when it is used
                with contextlib.suppress(TimeoutError):  # it has expired before it could be received
                    async with asyncio.timeout(1.0):
                        await layer.receive(used)

    # Groups: C13, C15

    async def test_a_group_reaches_its_members(self, make_layer: MakeLayer, make_peer: MakePeer) -> None:
        layer = await make_layer()
        peer = await make_peer(layer)
        mine, other, outside = await layer.new_channel(), await layer.new_channel(), await layer.new_channel()
        remote = await peer.new_channel()
        await layer.group_add("room", mine)
        await layer.group_add("room", other)
        await peer.group_add("room", remote)
        await layer.group_add("elsewhere", outside)
        await layer.group_send("room", {"type": "x", "value": b"\xff"})
        for reader, channel in ((layer, mine), (layer, other), (peer, remote)):
            assert await receive(reader, channel) == {"type": "x", "value": b"\xff"}
        await layer.send(outside, {"type": "next"})
        assert await receive(layer, outside) == {"type": "next"}

    async def test_group_messages_keep_their_order(self, make_layer: MakeLayer, make_peer: MakePeer) -> None:
        layer = await make_layer()
        peer = await make_peer(layer)
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        for number in range(50):
            await peer.group_send("room", {"type": "x", "number": number})
        assert [(await receive(layer, channel))["number"] for _ in range(50)] == list(range(50))

    async def test_group_add_twice_is_one_membership(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.group_add("room", channel)
        await layer.group_send("room", {"type": "once"})
        await layer.group_send("room", {"type": "next"})
        assert await receive(layer, channel) == {"type": "once"}
        assert await receive(layer, channel) == {"type": "next"}
        await layer.group_discard("room", channel)
        await layer.group_send("room", {"type": "nobody"})
        await layer.send(channel, {"type": "last"})
        assert await receive(layer, channel) == {"type": "last"}

    async def test_group_discard(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        stays, leaves = await layer.new_channel(), await layer.new_channel()
        for channel in (stays, leaves):
            await layer.group_add("room", channel)
        await layer.group_discard("room", leaves)
        await layer.group_send("room", {"type": "x"})
        await layer.send(leaves, {"type": "next"})
        assert await receive(layer, stays) == {"type": "x"}
        assert await receive(layer, leaves) == {"type": "next"}

    async def test_a_member_may_come_back(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        for number in range(5):
            await layer.group_add("room", channel)
            await layer.group_send("room", {"type": "x", "number": number})
            await layer.group_discard("room", channel)
            await layer.group_send("room", {"type": "x", "number": "missed"})
        assert [(await receive(layer, channel))["number"] for _ in range(5)] == list(range(5))

    async def test_group_discard_of_a_stranger_is_no_error(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        await layer.group_discard("room", channel)
        await layer.group_add("room", channel)
        await layer.group_discard("other", channel)
        await layer.group_send("room", {"type": "x"})
        assert await receive(layer, channel) == {"type": "x"}

    async def test_a_group_without_members_takes_messages(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.group_send("nobody", {"type": "x"})

    async def test_a_channel_of_another_process_can_be_added_and_discarded(
        self, make_layer: MakeLayer, make_peer: MakePeer
    ) -> None:
        layer = await make_layer()
        peer = await make_peer(layer)
        channel = await peer.new_channel()
        await layer.group_add("room", channel)
        await layer.group_send("room", {"type": "x"})
        assert await receive(peer, channel) == {"type": "x"}
        await layer.group_discard("room", channel)
        await layer.group_send("room", {"type": "missed"})
        await layer.send(channel, {"type": "next"})
        assert await receive(peer, channel) == {"type": "next"}

    async def test_a_normal_channel_can_be_a_member(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        await layer.group_add("jobs", "work")
        await layer.group_send("jobs", {"type": "x"})
        assert await receive(layer, "work") == {"type": "x"}

    async def test_group_send_drops_for_full_members_only(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(capacity=2)
        quick, slow = await layer.new_channel(), await layer.new_channel()
        for channel in (quick, slow):
            await layer.group_add("room", channel)
        for number in range(10):
            await layer.group_send("room", {"type": "x", "number": number})
            assert (await receive(layer, quick))["number"] == number
        numbers = [message["number"] for message in await drain(layer, slow)]
        assert 1 <= len(numbers) <= 2
        assert numbers == sorted(set(numbers))

    async def test_a_group_larger_than_the_capacity_reaches_everyone(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(capacity=10)
        channels = [await layer.new_channel() for _ in range(150)]
        for channel in channels:
            await layer.group_add("crowd", channel)
        await layer.group_send("crowd", {"type": "x"})
        for channel in channels:
            assert await receive(layer, channel) == {"type": "x"}

    # Flush: C16

    async def test_flush_forgets_messages_and_groups(self, make_layer: MakeLayer, make_peer: MakePeer) -> None:
        layer = await make_layer(capacity=2)
        peer = await make_peer(layer)
        channel, remote = await layer.new_channel(), await peer.new_channel()
        waiting = asyncio.create_task(receive(layer, "waiting"))
        await let_it_wait(waiting)
        await layer.group_add("room", channel)
        await peer.group_add("room", remote)
        for _ in range(2):
            await layer.send("normal", {"type": "old"})
            await layer.send(channel, {"type": "old"})
        await layer.flush()
        await layer.group_send("room", {"type": "old"})
        await peer.group_send("room", {"type": "old"})
        for reader, name in ((layer, "normal"), (layer, channel), (peer, remote)):
            await layer.send(name, {"type": "new"})
            assert await receive(reader, name) == {"type": "new"}
        # Readers that wait, and groups, go on as if new.
        await layer.send("waiting", {"type": "new"})
        assert await waiting == {"type": "new"}
        await layer.group_add("room", channel)
        await layer.group_send("room", {"type": "again"})
        assert await receive(layer, channel) == {"type": "again"}

    # Fairness: C19

    async def test_a_busy_channel_does_not_starve_a_quiet_one(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        busy = asyncio.Event()

        async def keep_sending() -> None:
            while True:
                try:
                    await layer.send("busy", {"type": "x"})
                except layer.ChannelFull:
                    await asyncio.sleep(0)

        async def keep_reading() -> None:
            while True:
                await layer.receive("busy")
                busy.set()

        tasks = [asyncio.create_task(keep_sending()), asyncio.create_task(keep_reading())]
        for number in range(20):
            await layer.send("quiet", {"type": "x", "number": number})
            assert (await receive(layer, "quiet"))["number"] == number
        async with asyncio.timeout(PATIENCE_S):
            await busy.wait()
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)

    # Several loops and threads: async_to_sync uses a new loop for each call

    async def test_a_channel_made_in_one_loop_is_received_in_another(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await in_another_loop(layer.new_channel)
        await in_another_loop(lambda: layer.send(channel, {"type": "sent elsewhere"}))
        assert await receive(layer, channel) == {"type": "sent elsewhere"}
        await layer.send(channel, {"type": "sent here"})
        assert await in_another_loop(lambda: receive(layer, channel)) == {"type": "sent here"}

    async def test_a_message_from_another_loop_wakes_a_reader(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        for name in (channel, "normal"):
            waiting = asyncio.create_task(receive(layer, name))
            await let_it_wait(waiting)
            await in_another_loop(lambda name=name: layer.send(name, {"type": "x"}))
            assert await waiting == {"type": "x"}

    async def test_groups_from_another_loop(self, make_layer: MakeLayer) -> None:
        layer = await make_layer()
        channel = await layer.new_channel()
        await in_another_loop(lambda: layer.group_add("room", channel))
        await in_another_loop(lambda: layer.group_send("room", {"type": "x"}))
        assert await receive(layer, channel) == {"type": "x"}
        await in_another_loop(lambda: layer.group_discard("room", channel))
        await layer.group_send("room", {"type": "missed"})
        await layer.send(channel, {"type": "next"})
        assert await receive(layer, channel) == {"type": "next"}

    async def test_many_loops_at_once_lose_and_double_nothing(self, make_layer: MakeLayer) -> None:
        layer = await make_layer(capacity=1000)

        async def send_some(first: int) -> None:
            for number in range(first, first + 50):
                await layer.send("shared", {"type": "x", "number": number})

        async def receive_some() -> list[int]:
            return [(await receive(layer, "shared"))["number"] for _ in range(50)]

        results = await asyncio.gather(
            *(in_another_loop(lambda first=first: send_some(first)) for first in (0, 50, 100)),
            *(in_another_loop(receive_some) for _ in range(3)),
        )
        assert sorted(number for numbers in results[3:] for number in numbers) == list(range(150))

    # As a backend of Django Channels

    async def test_channels_own_except_clauses_catch_ours(self, make_layer: MakeLayer) -> None:
        exceptions = pytest.importorskip("channels.exceptions")
        layer = await make_layer(capacity=1)
        await layer.send("full", {"type": "x"})
        with pytest.raises(exceptions.ChannelFull) as full:
            await layer.send("full", {"type": "x"})
        assert isinstance(full.value, layer.ChannelFull)
        with pytest.raises(exceptions.MessageTooLarge) as too_large:
            await layer.send("other", {"type": "x", "data": bytes(MESSAGE_BYTES_MAX)})
        assert isinstance(too_large.value, layer.MessageTooLarge)

    async def test_the_helpers_of_channels_base_layer(self, make_layer: MakeLayer) -> None:
        layer: Any = await make_layer(capacity=7, channel_capacity={"a*": 8}, expiry=9)
        assert (layer.expiry, layer.capacity, layer.get_capacity("abc"), layer.get_capacity("x")) == (9, 7, 8, 7)
        assert layer.valid_channel_name("a!b")
        assert layer.valid_group_name("a")
        assert layer.require_valid_channel_name("a.b")
        assert layer.require_valid_group_name("a")
        assert layer.non_local_name("a.b!c") == "a.b!"
        for check in (layer.valid_channel_name, layer.require_valid_group_name):
            with pytest.raises(TypeError):
                check("a b")

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"capacity": True}, TypeError, "capacity is True"),
            ({"capacity": 0}, ValueError, "capacity is 0"),
            ({"channel_capacity": {"a*": -1}}, ValueError, "channel_capacity['a*'] is -1"),
            ({"expiry": "60"}, TypeError, "expiry is '60'"),
            ({"expiry": 0}, ValueError, "expiry is 0"),
            ({"expiry": float("nan")}, ValueError, "expiry is nan"),
        ],
        ids=str,
    )
    async def test_bad_options_are_named(
        self, make_layer: MakeLayer, options: dict[str, Any], error: type[Exception], text: str
    ) -> None:
        with pytest.raises(error, match=re.escape(text)):
            await make_layer(**options)
