"""Process layers on a real broker: links through an outage, openings, groups across processes, deaths, the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from redis.exceptions import OutOfMemoryError

from channel_layer.codec import encode_message
from channel_layer.encryption import Cipher
from channel_layer.errors import BrokerError, BrokerUnavailable, ChannelFull, InvalidName
from channel_layer.frames import build_credit, build_event
from channel_layer.leases import LeaseKeeper, tell_death
from channel_layer.messages import split_element
from channel_layer.process_layer import RedisProcessLayer
from tests.channel_layer.processes import PATIENCE_S, RecordingListener, started, until, vanish
from tests.servers import BrokerServer

HELLO = {"type": "websocket.send", "text": "hello"}


def numbers(listener: RecordingListener) -> list[int]:
    return [frame[3] for _, frame in listener.frames]


def group_of(server: BrokerServer, group: str) -> list[bytes]:
    with server.client() as client:
        return list(client.zrange(f"trunkline:group:{{{group}}}", 0, -1))


# Links


async def test_frames_survive_a_killed_broker_in_order_and_once(any_broker_server: BrokerServer) -> None:
    url = any_broker_server.url
    async with started(url, "interface") as (one, one_heard), started(url, "worker") as (two, two_heard):
        sent = 0

        async def send_some() -> None:
            nonlocal sent
            for _ in range(100):
                for _ in range(5):
                    one.link_send(two.process_id, build_credit(1, 1, sent))
                    two.link_send(one.process_id, build_credit(1, 1, sent))
                    sent += 1
                await asyncio.sleep(0.001)

        await send_some()
        sending = asyncio.create_task(send_some())
        await asyncio.sleep(0.02)
        await asyncio.to_thread(any_broker_server.kill)
        await one_heard.until(lambda: one_heard.broker == [False])
        await sending
        await send_some()  # while it is away
        await asyncio.to_thread(any_broker_server.start)
        await send_some()
        await one_heard.until(lambda: len(one_heard.frames) == sent)
        await two_heard.until(lambda: len(two_heard.frames) == sent)
        assert numbers(one_heard) == list(range(sent))
        assert numbers(two_heard) == list(range(sent))
        assert one_heard.broker == [False, True]
        assert one_heard.ended == two_heard.ended == []


async def test_frames_survive_a_flush_of_the_broker(broker_server: BrokerServer) -> None:
    url = broker_server.url
    async with started(url, "interface") as (one, _), started(url, "worker") as (two, two_heard):
        with broker_server.client() as client:
            for number in range(1000):
                one.link_send(two.process_id, build_credit(1, 1, number))
                if number % 50 == 0:
                    client.flushall()
                    await asyncio.sleep(0.005)
        await two_heard.until(lambda: len(two_heard.frames) == 1000)
        assert numbers(two_heard) == list(range(1000))
        assert two_heard.ended == []


@pytest.mark.usefixtures("patient_ends")
async def test_stopping_says_goodbye_and_leaves_nothing_in_the_broker(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, "interface", delivery=True) as (interface, heard):
        async with started(broker_server.url, "worker") as (worker, _):
            interface.link_send(worker.process_id, build_credit(1, 1, 0))
            worker.link_send(interface.process_id, build_credit(1, 1, 1))
            await heard.until(lambda: len(heard.frames) == 1)
            channel = await worker.new_channel()
            await worker.group_add("room", channel)
            await worker.send("normal", HELLO)
            await worker.receive("normal")
        await heard.until(lambda: len(heard.ended) == 1)
        assert heard.ended[0][0] == worker.process_id
    with broker_server.client() as client:
        assert client.keys("*") == [b"trunkline:generation"]


async def test_a_layer_that_is_not_started_says_so(broker_server: BrokerServer) -> None:
    layer = RedisProcessLayer(broker_server.url, role="worker")
    with pytest.raises(RuntimeError, match="before start"):
        await layer.send("x", HELLO)
    with pytest.raises(TypeError, match="needs a listener"):
        await layer.start()
    await layer._broker.close()


async def test_elements_nobody_can_read_are_counted_and_the_next_ones_arrive(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, "worker") as (worker, heard), started(broker_server.url) as (other, _):
        channel = await worker.new_channel()
        with broker_server.client() as client:
            client.rpush(worker.keys.mail(worker.process_id), b"short", b"\xff" * 8 + b"no msgpack", b"\xff" * 20)
            client.rpush(worker.keys.link(worker.process_id), b"garbage", b"")
        await other.send(channel, HELLO)
        assert await worker.receive(channel) == HELLO
        other.link_send(worker.process_id, build_credit(1, 1, 7))
        await heard.until(lambda: len(heard.frames) == 1)
        statistics = worker.statistics()
        assert statistics.malformed_count == 3
        assert statistics.links is not None
        assert statistics.links.unreadable_blobs == 2


# Channels


async def test_a_local_channel_of_another_process_cannot_be_received_from(broker_server: BrokerServer) -> None:
    async with started(broker_server.url) as (one, _), started(broker_server.url) as (two, _):
        channel = await one.new_channel()
        with pytest.raises(InvalidName, match=one.process_id):
            await two.receive(channel)


async def test_a_send_that_finds_the_broker_away_waits_for_it(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, outage_wait_s=PATIENCE_S) as (layer, heard):
        await asyncio.to_thread(broker_server.kill)
        await heard.until(lambda: heard.broker == [False])
        sending = asyncio.create_task(layer.send("normal", HELLO))
        receiving = asyncio.create_task(layer.receive("normal"))
        await asyncio.to_thread(broker_server.start)
        await sending
        assert await receiving == HELLO


async def test_a_send_gives_up_when_the_broker_stays_away(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, outage_wait_s=0.2) as (layer, heard):
        channel = await layer.new_channel()
        await asyncio.to_thread(broker_server.kill)
        await heard.until(lambda: heard.broker == [False])
        for call in (
            layer.send("normal", HELLO),
            layer.group_send("room", HELLO),
            layer.group_add("room", channel),
            layer.group_add("room", "normal"),
        ):
            with pytest.raises(BrokerUnavailable) as raised:
                await call
            assert isinstance(raised.value, ConnectionError)
        assert layer.statistics().groups.members == 0
        # Its own channels need no broker.
        await layer.send(channel, HELLO)
        assert await layer.receive(channel) == HELLO
        await asyncio.to_thread(broker_server.start)


async def test_idle_readers_of_normal_channels_disconnect(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("channel_layer.normal_channels.IDLE_S", 0.05)
    monkeypatch.setattr("channel_layer.process_layer._SWEEP_INTERVAL_S", 0.05)
    async with started(broker_server.url) as (layer, _):
        await layer.send("normal", HELLO)
        assert await layer.receive("normal") == HELLO
        await until(lambda: layer.statistics().normal_channels.readers == 0)
        await until(lambda: layer.statistics().broker.reader_count == 1)  # the inbox's
        await layer.send("normal", HELLO)
        assert await layer.receive("normal") == HELLO


# Openings


async def test_openings_are_stored_found_taken_and_removed(any_broker_server: BrokerServer) -> None:
    url = any_broker_server.url
    async with started(url, "interface") as (interface, _), started(url, "worker") as (worker, _):
        openings = [b"opening %d" % number for number in range(5)]
        elements = [await interface.push_opening("http.request", opening) for opening in openings]
        assert [element[8:] for element in elements] == openings
        assert await interface.find_openings("http.request", elements) == [True] * 5
        assert await interface.remove_opening("http.request", elements[1]) is True
        assert await interface.remove_opening("http.request", elements[1]) is False
        assert await worker.take_openings("http.request", 3) == [openings[0], openings[2], openings[3]]
        assert await interface.find_openings("http.request", elements) == [False] * 4 + [True]
        assert await worker.take_openings("http.request", 8) == [openings[4]]


async def test_openings_beyond_the_capacity_are_refused(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, "interface", opening_capacity=3) as (interface, _):
        results = await asyncio.gather(
            *[interface.push_opening("http.request", b"%d" % number) for number in range(5)], return_exceptions=True
        )
        assert [isinstance(result, ChannelFull) for result in results] == [False, False, False, True, True]


async def test_openings_too_old_are_not_taken(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, "interface", opening_expiry_s=0.05) as (interface, _):
        deadline_ms, _ = split_element(await interface.push_opening("http.request", b"old"))
        async with started(broker_server.url, "interface") as (other, _):
            # As it estimates the broker's clock.
            await until(lambda: other._broker.time_ms(other.keys.normal("http.request")) > deadline_ms)
            await other.push_opening("http.request", b"new")
            assert await other.take_openings("http.request", 8) == [b"new"]


async def test_a_cancelled_take_leaves_the_openings_in_order(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, "worker") as (worker, _), started(broker_server.url) as (other, _):
        taken: list[bytes] = []
        for number in range(60):
            taking = asyncio.create_task(worker.take_openings("http.request", 3))
            for _ in range(number % 5):
                await asyncio.sleep(0)
            pushing = other.push_opening("http.request", b"%d" % number)
            if number % 3 == 0:
                await pushing
            for _ in range(number % 7):
                await asyncio.sleep(0)
            taking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                taken.extend(await taking)
            await pushing
        while len(taken) < 60:
            async with asyncio.timeout(PATIENCE_S):
                taken.extend(await worker.take_openings("http.request", 8))
        assert [int(opening) for opening in taken] == list(range(60))


# Groups across processes


async def test_a_group_send_of_a_worker_keeps_its_place_among_its_frames(broker_server: BrokerServer) -> None:
    url = broker_server.url
    async with started(url, "interface", delivery=True) as (interface, heard), started(url) as (worker, _):
        channel = f"interface.{interface.process_id}!7"
        await worker.group_add("room", channel)
        assert group_of(broker_server, "room") == [interface.process_id.encode()]
        for number in range(20):
            worker.link_send(interface.process_id, build_event(7, 1, b"%d" % number))
            await worker.group_send("room", HELLO)
        await heard.until(lambda: len(heard.order) == 40)
        assert heard.order == ["frame", "delivered"] * 20
        assert heard.delivered == [((channel,), encode_message(HELLO))] * 20
        statistics = worker.statistics().group_sender
        assert (statistics.frame_count, statistics.letter_count) == (20, 0)
        await worker.group_discard("room", channel)
        assert interface.statistics().groups.members == 0
        await until(lambda: group_of(broker_server, "room") == [])


async def test_a_client_reaches_members_by_mail_and_once_a_process(broker_server: BrokerServer) -> None:
    url = broker_server.url
    async with (
        started(url, "interface", delivery=True) as (interface, heard),
        started(url, "client") as (client, _),
    ):
        channels = [f"interface.{interface.process_id}!{number}" for number in range(50)]
        for channel in channels:
            interface.add_local_member("room", channel, when_registered=lambda done: None)
        await until(lambda: group_of(broker_server, "room") == [interface.process_id.encode()])
        await client.group_send("room", HELLO)
        await heard.until(lambda: len(heard.delivered) == 1)
        assert heard.delivered == [(tuple(channels), encode_message(HELLO))]
        assert client.statistics().group_sender.letter_count == 1


async def test_a_connection_that_is_gone_joins_no_group(broker_server: BrokerServer) -> None:
    url = broker_server.url
    async with (
        started(url, "interface", delivery=True) as (interface, _),
        started(url) as (worker, _),
        started(url, "client") as (client, _),
    ):
        asked: list[tuple[str, int]] = []

        def owns_channel(channel: str, epoch: int) -> bool:
            asked.append((channel, epoch))
            return channel.endswith("!1")

        interface.owns_channel = owns_channel
        worker.epoch_of = lambda channel: 3
        name = f"interface.{interface.process_id}!"
        await worker.group_add("room", name + "2")
        await client.group_add("room", name + "2")
        await worker.group_add("room", name + "1")
        await worker.group_discard("room", name + "2")
        assert asked == [(name + "2", 3), (name + "2", 0), (name + "1", 3), (name + "2", 3)]
        assert interface.statistics().groups.members == 1


async def test_group_add_at_a_dead_owner_is_a_no_op(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, "client") as (client, _):
        await client.group_add("room", "specific.cdead!x")
        await client.group_discard("room", "specific.cdead!x")
        assert group_of(broker_server, "room") == []


async def test_group_add_at_an_owner_that_does_not_answer_times_out(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        started(broker_server.url, "client") as (client, _),
        started(broker_server.url, "client") as (owner, _),
    ):
        channel = await owner.new_channel()
        await client.group_add("room", channel)
        assert owner._parts is not None
        assert owner._parts.inbox is not None
        await owner._parts.inbox.stop()  # it lives, its lease says
        monkeypatch.setattr("channel_layer.group_requests.ANSWER_WAIT_S", 0.3)
        with pytest.raises(TimeoutError, match=owner.process_id):
            await client.group_add("other", channel)
        assert client.statistics().group_requests_waiting == 0


async def test_a_link_that_holds_too_much_misses_group_messages_which_are_counted(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("channel_layer.process_layer._GROUP_LINK_BYTES_MAX", 1000)
    url = broker_server.url
    async with started(url, "interface", delivery=True) as (interface, heard), started(url) as (worker, _):
        interface.add_local_member("room", f"interface.{interface.process_id}!1", when_registered=lambda done: None)
        await until(lambda: group_of(broker_server, "room") != [])
        await asyncio.gather(
            *[worker.group_send("room", {"type": "websocket.send", "text": "x" * 400}) for _ in range(10)]
        )
        statistics = worker.statistics().group_sender
        assert 0 < statistics.frame_count < 10
        assert statistics.frame_count + statistics.congested_count == 10
        await heard.until(lambda: len(heard.delivered) == statistics.frame_count)


async def test_concurrent_group_sends_ask_about_each_group_once(broker_server: BrokerServer) -> None:
    async with started(broker_server.url) as (one, _), started(broker_server.url, "client") as (client, _):
        channel = await one.new_channel()
        await one.group_add("room", channel)
        await client.group_send("room", HELLO)
        before = client.statistics().broker.command_count
        await asyncio.gather(*[client.group_send("room", {"type": "x", "number": n}) for n in range(100)])
        # One read of the registry and one push, and the heartbeat's two commands if it falls between.
        assert client.statistics().broker.command_count - before <= 4
        assert await one.receive(channel) == HELLO
        assert [(await one.receive(channel))["number"] for _ in range(99)] == list(range(99))


@pytest.mark.parametrize("how", ["killed", "flushed"])
async def test_groups_reach_their_members_within_3_s_of_lost_data(broker_server: BrokerServer, how: str) -> None:
    url = broker_server.url
    async with started(url, "interface", delivery=True) as (interface, heard), started(url, "client") as (client, _):
        groups = [f"room-{number}" for number in range(1200)]
        for group in groups:
            interface.add_local_member(
                group, f"interface.{interface.process_id}!1", when_registered=lambda done: None
            )
        await until(lambda: group_of(broker_server, groups[-1]) != [])
        if how == "killed":
            await asyncio.to_thread(broker_server.restart)
        else:
            with broker_server.client() as redis:
                redis.flushall()
        lost_at = time.monotonic()
        await until(lambda: all(group_of(broker_server, group) for group in groups[::100]))
        await until(lambda: group_of(broker_server, groups[-1]) != [])
        assert time.monotonic() - lost_at < 10.0
        await client.group_send(groups[-1], HELLO)
        await heard.until(lambda: len(heard.delivered) == 1)


async def test_a_group_add_that_meets_an_outage_holds_afterwards(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, outage_wait_s=PATIENCE_S) as (one, heard):
        channel = await one.new_channel()
        await asyncio.to_thread(broker_server.kill)
        await heard.until(lambda: heard.broker == [False])
        adding = asyncio.create_task(one.group_add("room", channel))
        await asyncio.to_thread(broker_server.start)
        await adding
        assert group_of(broker_server, "room") == [one.process_id.encode()]
        async with started(broker_server.url, "client") as (client, _):
            await client.group_send("room", HELLO)
        assert await one.receive(channel) == HELLO


async def test_forgotten_channels_leave_nothing_behind(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, "interface", delivery=True) as (interface, _):
        channels = [f"interface.{interface.process_id}!{number}" for number in range(3)]
        for channel in channels:
            for group in ("a", "b"):
                interface.add_local_member(group, channel, when_registered=lambda done: None)
        interface.forget_channels(channels[:2])
        await until(lambda: group_of(broker_server, "a") != [])
        interface.forget_channels(channels)
        # Joining again right behind it must win.
        interface.add_local_member("b", channels[0], when_registered=lambda done: None)
        await until(lambda: group_of(broker_server, "a") == [])
        await until(lambda: group_of(broker_server, "b") == [interface.process_id.encode()])
        assert interface.statistics().groups.members == 1


# Deaths


async def test_a_vanished_peer_is_dead_within_5_s(broker_server: BrokerServer) -> None:
    url = broker_server.url
    async with started(url, "interface") as (interface, heard), started(url, "interface") as (other, _):
        worker, worker_heard = RedisProcessLayer(url, role="worker"), RecordingListener()
        await worker.start(worker_heard)
        for process in (interface, other):
            process.link_send(worker.process_id, build_credit(1, 1, 0))
            worker.link_send(process.process_id, build_credit(1, 1, 0))
        await heard.until(lambda: len(heard.frames) == 1)
        await worker.group_add("room", await worker.new_channel())
        other.link_send(interface.process_id, build_credit(1, 1, 0))
        await heard.until(lambda: len(heard.frames) == 2)
        await vanish(worker)
        died_at = time.monotonic()
        await heard.until(lambda: len(heard.ended) == 1)
        assert time.monotonic() - died_at < 15.0
        assert heard.ended[0][0] == worker.process_id
        # Its registration outlives it; nothing is sent to it, and nobody ends a second time.
        await interface.group_send("room", HELLO)
        assert interface.statistics().group_sender.congested_count == 1
        assert interface.statistics().liveness.dead_count == 1
        assert other.process_id in interface._links().peers()


async def test_a_death_that_is_told_is_noticed_without_any_wait_for_silence(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("channel_layer.liveness.SILENCE_S", 3600.0)
    url = broker_server.url
    async with started(url, "interface") as (interface, heard):
        worker, worker_heard = RedisProcessLayer(url, role="worker"), RecordingListener()
        await worker.start(worker_heard)
        interface.link_send(worker.process_id, build_credit(1, 1, 0))
        await worker_heard.until(lambda: len(worker_heard.frames) == 1)
        worker.link_send(interface.process_id, build_credit(1, 1, 0))
        await heard.until(lambda: len(heard.frames) == 1)
        await vanish(worker)
        await asyncio.to_thread(tell_death, url, worker.keys, worker.process_id)
        await heard.until(lambda: len(heard.ended) == 1)
        assert heard.ended == [(worker.process_id, "the process is dead: its supervisor says so")]
        assert interface.statistics().liveness.dead_count == 1


@pytest.mark.parametrize("keys", [[], ["a secret"]], ids=["plain", "encrypted"])
async def test_openings_that_a_blocked_loop_cannot_claim_are_told(
    any_broker_server: BrokerServer, keys: list[str]
) -> None:
    url, cipher = any_broker_server.url, Cipher(keys)
    async with started(url, "interface", cipher=cipher) as (interface, _), started(url, cipher=cipher) as (worker, _):
        held: list[list[int]] = []
        told = asyncio.Event()

        def hold(openings: Sequence[int]) -> None:
            held.append(list(openings))
            told.set()

        interface.openings_held = hold
        # Told one after another: when the last has heard, the others' letters are there.
        stalled = [("igone", 4, 1), (interface.process_id, 3, 1), (interface.process_id, 5, 2)]
        worker.stalled_openings = lambda: stalled
        async with asyncio.timeout(PATIENCE_S):
            await told.wait()
        worker.stalled_openings = tuple
        assert held[0] == [3, 1, 5, 2]
        with any_broker_server.client() as redis:
            assert 0 < redis.pttl(worker.keys.mail("igone")) <= 60_000


async def test_requests_to_a_peer_that_dies_are_no_ops(broker_server: BrokerServer) -> None:
    url = broker_server.url
    interface, interface_heard = RedisProcessLayer(url, role="interface"), RecordingListener()
    await interface.start(interface_heard, interface_heard.deliver)
    async with started(url) as (worker, _):
        channel = f"interface.{interface.process_id}!1"
        await worker.group_add("room", channel)
        await vanish(interface)
        await worker.group_add("other", channel)  # returns when the death is noticed, or finds no lease after 5 s


async def test_nobody_dies_of_an_outage_or_of_lost_leases(broker_server: BrokerServer) -> None:
    url = broker_server.url
    async with started(url, "interface") as (interface, heard), started(url) as (worker, worker_heard):
        interface.link_send(worker.process_id, build_credit(1, 1, 0))
        await worker_heard.until(lambda: len(worker_heard.frames) == 1)
        await asyncio.to_thread(broker_server.kill)
        await asyncio.sleep(4.0)  # longer than leases live
        await asyncio.to_thread(broker_server.start)
        await heard.until(lambda: heard.broker == [False, True])
        await asyncio.sleep(1.0)
        with broker_server.client() as redis:
            redis.flushall()
        await asyncio.sleep(6.0)  # longer than the grace
        interface.link_send(worker.process_id, build_credit(1, 1, 1))
        await worker_heard.until(lambda: len(worker_heard.frames) == 2)
        assert heard.ended == worker_heard.ended == []
        assert interface.statistics().liveness.dead_count == 0


async def test_no_error_of_a_lost_connection_stays_unread(broker_server: BrokerServer) -> None:
    """Whatever is under way, and whoever is cancelled meanwhile: asyncio reports errors that nobody has looked at."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    url = broker_server.url
    async with (
        started(url, "interface") as (interface, _),
        started(url) as (worker, _),
        started(url) as (other, _),
    ):
        there, here = f"interface.{interface.process_id}!1", await other.new_channel()
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: worker.send("normal", HELLO),
            lambda: worker.send(here, HELLO),
            lambda: worker.receive("normal"),
            lambda: worker.group_add("room", there),
            lambda: worker.group_add("room", here),
            lambda: other.group_discard("room", here),
            lambda: worker.group_send("room", HELLO),
            lambda: interface.find_openings("http.request", [b"x", b"y"]),
            lambda: interface.push_opening("http.request", b"x"),
            lambda: other.take_openings("http.request", 2),
        ]

        async def call_on(number: int) -> None:
            for round_ in itertools.count():
                with contextlib.suppress(TimeoutError, BrokerUnavailable, BrokerError, ChannelFull):
                    async with asyncio.timeout((0.001, 0.01, 0.1, 1.0)[(number + round_) % 4]):
                        await calls[(number + 3 * round_) % len(calls)]()

        callers = [asyncio.create_task(call_on(number)) for number in range(20)]
        with broker_server.client() as redis:
            for number in range(200):
                await asyncio.sleep(number % 20 / 1000)  # some meet connections that are being made ready
                redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
        assert all(caller.cancelled() for caller in callers)
        del callers
    gc.collect()
    assert reported == []


async def test_nobody_dies_while_the_broker_is_full(valkey_program: str) -> None:
    # It refuses leases, pings and probes alike (OOM); what is left of the leases' time runs out.
    with BrokerServer(valkey_program, options=("--maxmemory", "16mb")) as server, server.client() as redis:
        async with contextlib.AsyncExitStack() as stack:
            interface, heard = await stack.enter_async_context(started(server.url, "interface"))
            workers = [await stack.enter_async_context(started(server.url)) for _ in range(8)]
            for worker, _ in workers:
                interface.link_send(worker.process_id, build_credit(1, 1, 0))
            for _, worker_heard in workers:
                await worker_heard.until(lambda heard=worker_heard: len(heard.frames) == 1)
            for _ in range(2):
                with contextlib.suppress(OutOfMemoryError):
                    while True:
                        redis.rpush("ballast", bytes(1000))
                await asyncio.sleep(4.5)
                redis.delete("ballast")
                await asyncio.sleep(1.0)
            for worker, _ in workers:
                interface.link_send(worker.process_id, build_credit(1, 1, 1))
            for _, worker_heard in workers:
                await worker_heard.until(lambda heard=worker_heard: len(heard.frames) == 2)
            assert heard.ended == []
            assert [worker_heard.ended for _, worker_heard in workers] == [[]] * len(workers)


async def test_a_peer_with_a_blocked_lease_but_a_voice_lives(broker_server: BrokerServer) -> None:
    url = broker_server.url
    async with started(url, "interface") as (interface, heard), started(url) as (worker, worker_heard):
        interface.link_send(worker.process_id, build_credit(1, 1, 0))
        await worker_heard.until(lambda: len(worker_heard.frames) == 1)
        assert worker._parts is not None
        assert worker._parts.lease is not None
        await asyncio.to_thread(worker._parts.lease.stop)
        await until(lambda: interface.statistics().liveness.cleared_count >= 3)
        assert heard.ended == []


CHILD = """
import asyncio, sys
from channel_layer.frames import build_credit
from channel_layer.process_layer import RedisProcessLayer

class Listener:
    def frame_received(self, peer, frame): print("frame", frame[3], flush=True)
    def peer_ended(self, peer, reason): print("ended", peer, reason, flush=True)
    def peer_ready(self, peer): pass
    def broker_changed(self, reachable): print("broker", reachable, flush=True)

async def main():
    layer = RedisProcessLayer(sys.argv[1], role="worker")
    await layer.start(Listener())
    layer.link_send(sys.argv[2], build_credit(1, 1, 0))
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_frozen_process_is_dead_within_5_s_and_ends_its_links_when_it_is_back(
    broker_server: BrokerServer,
) -> None:
    async with started(broker_server.url, "interface") as (interface, heard):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CHILD, broker_server.url, interface.process_id, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert child.stdout is not None
            await heard.until(lambda: len(heard.frames) == 1)
            worker = heard.frames[0][0]
            child.send_signal(signal.SIGSTOP)
            frozen_at = time.monotonic()
            await heard.until(lambda: len(heard.ended) == 1)
            assert time.monotonic() - frozen_at < 15.0  # three times the promise
            child.send_signal(signal.SIGCONT)
            async with asyncio.timeout(PATIENCE_S):
                line = await child.stdout.readline()
            assert line.startswith(f"ended {interface.process_id}".encode())
            # It may begin anew: a new link, both ways.
            interface.link_send(worker, build_credit(1, 1, 5))
            async with asyncio.timeout(PATIENCE_S):
                assert await child.stdout.readline() == b"frame 5\n"
        finally:
            child.kill()
            await child.wait()


# Other loops


async def test_the_layer_of_a_worker_is_called_from_other_threads(broker_server: BrokerServer) -> None:
    async with started(broker_server.url) as (worker, _):

        async def in_a_thread() -> dict[str, Any]:
            channel = await worker.new_channel()
            await worker.group_add("room", channel)
            await worker.group_send("room", HELLO)
            message = await worker.receive(channel)
            await worker.group_discard("room", channel)
            return message

        assert await asyncio.to_thread(lambda: asyncio.run(in_a_thread())) == HELLO


@pytest.mark.parametrize("kind", ["normal", "process-local"])
async def test_receives_cancelled_on_other_loops_lose_nothing(broker_server: BrokerServer, kind: str) -> None:
    async with started(broker_server.url, capacity=10_000) as (worker, _):
        channel = "normal" if kind == "normal" else await worker.new_channel()
        received: list[int] = []
        over = asyncio.Event()

        async def read_and_cancel() -> None:
            while not over.is_set():
                try:
                    async with asyncio.timeout(0.0005):
                        received.append((await worker.receive(channel))["number"])
                except TimeoutError:
                    pass

        readers = [asyncio.to_thread(lambda: asyncio.run(read_and_cancel())) for _ in range(2)]
        reading = asyncio.gather(*readers)
        for number in range(300):
            await worker.send(channel, {"type": "x", "number": number})
            await asyncio.sleep(0)
        over.set()
        await reading
        while len(received) < 300:
            async with asyncio.timeout(PATIENCE_S):
                received.append((await worker.receive(channel))["number"])
        assert sorted(received) == list(range(300))


async def test_the_lease_is_there_before_anybody_can_know_the_process(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a channel made a moment ago would be taken for one of the dead, and flush() would forget to ask."""
    monkeypatch.setattr(LeaseKeeper, "start", lambda keeper: None)  # its thread does not get to run
    monkeypatch.setitem(LeaseKeeper.__init__.__kwdefaults__, "ttl_s", PATIENCE_S)  # nor renews it, then
    layer = RedisProcessLayer(broker_server.url)
    await layer.start()
    channel = await layer.new_channel()
    await layer.send("somebody", {"type": "x", "channel": channel})
    with broker_server.client() as client:
        assert client.exists(layer.keys.lease(layer.process_id)) == 1
    await layer.stop()


async def test_settling_waits_for_a_broker_that_is_away(broker_server: BrokerServer) -> None:
    """Or a worker that is told to stop just then would take the ends of its responses with it."""
    async with (
        started(broker_server.url, "interface") as (interface, heard),
        started(broker_server.url) as (worker, _),
    ):
        worker.link_send(interface.process_id, build_credit(1, 1, 1))
        await heard.until(lambda: len(heard.frames) == 1)
        await worker.settle(PATIENCE_S)
        broker_server.pause()
        try:
            worker.link_send(interface.process_id, build_credit(1, 1, 2))
            settling = asyncio.create_task(worker.settle(PATIENCE_S))
            await asyncio.wait((settling,), timeout=1)
            assert not settling.done()
        finally:
            broker_server.resume()
        await settling
        assert len(heard.frames) == 2
        broker_server.pause()
        try:
            worker.link_send(interface.process_id, build_credit(1, 1, 3))
            await worker.settle(0.1)
        finally:
            broker_server.resume()
