"""The channel layer on shards, with Sentinels and in a Cluster: the contract, and links through failovers.

What one server does is in the other modules; here are several, which die, hang and lose their data one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from channel_layer import Publisher
from channel_layer.base import ChannelLayer
from channel_layer.frames import build_credit
from channel_layer.home import close_homes
from channel_layer.names import Keys
from channel_layer.process_layer import RedisProcessLayer
from channel_layer.redis_layer import RedisChannelLayer
from channel_layer.sharding import slot_of, static_shard
from tests.channel_layer.contract import ChannelLayerContract, HeldMessages, MakePeer
from tests.channel_layer.processes import PATIENCE_S, RecordingListener, made_peers, started, until, vanish
from tests.channel_layer.test_redis_layer import messages_of
from tests.servers import BrokerServer, ClusterServers, SentinelServers, shards, url_of

# From the moment that the new master is there: the promise is one second; a machine that has few processors for all
# the servers and clients of a test, and for other tests, needs more.
RESUME_S = 10.0
# What has nothing to do with a shard that is away. Less than the socket timeout, 5 s, for which one that hangs would
# be waited for; more than a busy machine needs.
UNTOUCHED_S = 4.0


# The contract, on servers that all its tests share


@pytest.fixture(scope="module", params=["shards", "sentinels", "cluster"])
def shared_url(request: pytest.FixtureRequest, valkey_program: str) -> Iterator[str]:
    """None of them takes a server for dead that a busy machine does not let run for a moment."""
    with contextlib.ExitStack() as stack:
        if request.param == "shards":
            yield url_of(stack.enter_context(shards(valkey_program, 3)))
        elif request.param == "sentinels":
            yield stack.enter_context(SentinelServers(valkey_program, down_after_ms=60_000)).url
        else:
            yield stack.enter_context(ClusterServers(valkey_program, replicas=False, node_timeout_ms=15_000)).url


@pytest.fixture
def prefix() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def make_layer(shared_url: str, prefix: str) -> Any:
    hosts = [shared_url] if "+" in shared_url else shared_url.split(",")

    async def make(**options: Any) -> ChannelLayer:
        return RedisChannelLayer(hosts=hosts, prefix=prefix, **options)

    yield make
    close_homes()


@pytest.fixture
async def make_peer(shared_url: str, prefix: str) -> AsyncIterator[MakePeer]:
    async with made_peers(lambda: RedisProcessLayer(shared_url, prefix)) as make:
        yield make


@pytest.fixture
def held_messages() -> HeldMessages:
    return messages_of


class TestContract(ChannelLayerContract):
    """C1-C22 on several servers."""


async def test_no_direct_send_is_lost_on_shards(shared_url: str, prefix: str) -> None:
    """channels_redis sends to one shard and reads another for about half of all process-local channels."""
    async with (
        started(shared_url, "client", prefix=prefix) as (one, _),
        started(shared_url, "client", prefix=prefix) as (other, _),
    ):
        channels = [await one.new_channel() for _ in range(50)]
        for channel in channels:
            await other.send(channel, {"type": "x", "text": channel})
        for channel in channels:
            async with asyncio.timeout(PATIENCE_S):
                assert (await one.receive(channel))["text"] == channel
        with Publisher(shared_url, prefix=prefix) as publisher:
            for channel in channels:
                publisher.send(channel, {"type": "y", "text": channel})
        for channel in channels:
            async with asyncio.timeout(PATIENCE_S):
                assert (await one.receive(channel))["type"] == "y"


# Processes with links, through what happens to their servers


class Stream:
    """Numbers from one process to another, on their link, for as long as this is open."""

    def __init__(self, source: RedisProcessLayer, target: RedisProcessLayer, heard: RecordingListener) -> None:
        self._source = source
        self._target = target
        self._heard = heard
        self.sent = 0
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Stream:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        assert self._task is not None
        await self._task
        if kind is None:
            await self._heard.until(lambda: len(self.received) >= self.sent)
            # Nothing lost, doubled or out of order.
            assert self.received == list(range(self.sent))

    @property
    def received(self) -> list[int]:
        return [frame[3] for peer, frame in self._heard.frames if peer == self._source.process_id]

    async def flows(self, timeout_s: float = PATIENCE_S) -> float:
        """Return how long it took until what is sent from now on arrives."""
        began, sent = time.monotonic(), self.sent
        await self._heard.until(lambda: len(self.received) > sent, timeout_s)
        return time.monotonic() - began

    async def _run(self) -> None:
        while not self._stop.is_set():
            self._source.link_send(self._target.process_id, build_credit(1, 1, self.sent))
            self.sent += 1
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def started_on(url: str, role: str, number: int, count: int = 2, **options: Any) -> AsyncIterator[Any]:
    """A process whose inbox is on the shard with this number."""
    while True:
        layer = RedisProcessLayer(url, role=role, **options)  # type: ignore[arg-type]
        if static_shard(Keys().mail(layer.process_id), count) == number:
            break
    heard = RecordingListener()
    await layer.start(heard, heard.deliver if role == "interface" else None)
    try:
        yield layer, heard
    finally:
        await layer.stop()


async def test_what_lives_on_one_shard_pauses_and_nothing_else(two: list[BrokerServer]) -> None:
    url = url_of(two)
    async with (
        started_on(url, "interface", 0) as (interface, at_interface),
        started_on(url, "worker", 0) as (here, at_here),
        started_on(url, "worker", 1) as (there, at_there),
        Stream(interface, here, at_here) as to_here,
        Stream(here, interface, at_interface) as from_here,
        Stream(interface, there, at_there) as to_there,
        Stream(there, interface, at_interface) as from_there,
    ):
        for stream in (to_here, from_here, to_there, from_there):
            await stream.flows()
        two[1].kill()
        await at_there.until(lambda: at_there.broker == [False])
        for _ in range(3):
            assert await to_here.flows() < UNTOUCHED_S
            assert await from_here.flows() < UNTOUCHED_S
        stuck_at = len(to_there.received)
        assert interface.broker_reachable
        assert not there.broker_reachable
        # Longer than it takes to find a silent peer dead.
        await asyncio.sleep(6)
        assert len(to_there.received) == stuck_at
        assert (at_interface.ended, at_here.ended, at_there.ended) == ([], [], [])
        await here.send("work", {"type": "x"})  # is on the shard that lives
        assert at_here.broker == []
        two[1].start()
        await to_there.flows()
        await from_there.flows()
        assert at_there.broker == [False, True]
        # Time to judge again, after the grace.
        await asyncio.sleep(6)
        assert (at_interface.ended, at_here.ended, at_there.ended) == ([], [], [])


def test_the_channel_of_the_test_above_is_on_the_first_shard() -> None:
    assert static_shard(Keys().normal("work"), 2) == 0


async def test_a_shard_that_hangs_holds_up_nothing_of_the_others(two: list[BrokerServer]) -> None:
    """The same with SIGSTOP, which nobody notices before the socket timeout: group_send, leases, groups."""
    url = url_of(two)
    groups = {static_shard(Keys().group(f"room{n}"), 2): f"room{n}" for n in range(20)}
    async with (
        started_on(url, "interface", 0) as (interface, at_interface),
        started_on(url, "worker", 0, outage_wait_s=PATIENCE_S) as (worker, at_worker),
        started_on(url, "worker", 1) as (_, at_there),
        Stream(worker, interface, at_interface) as stream,
    ):
        for number, group in groups.items():
            await worker.group_add(group, f"interface.{interface.process_id}!{number}")
        await stream.flows()
        two[1].pause()
        stopped_at = time.monotonic()
        try:
            slow = asyncio.create_task(worker.group_send(groups[1], {"type": "websocket.send", "text": "slow"}))
            while time.monotonic() - stopped_at < 8:
                assert await stream.flows() < UNTOUCHED_S
                async with asyncio.timeout(UNTOUCHED_S):
                    await worker.group_send(groups[0], {"type": "websocket.send", "text": "quick"})
                await asyncio.sleep(0.05)
            assert not slow.done()
        finally:
            two[1].resume()
        async with asyncio.timeout(PATIENCE_S):
            await slow
        await at_interface.until(lambda: any(b"slow" in encoded for _, encoded in at_interface.delivered))
        assert sum(b"slow" in encoded for _, encoded in at_interface.delivered) == 1
        await asyncio.sleep(6)
        assert (at_interface.ended, at_worker.ended, at_there.ended) == ([], [], [])


async def test_a_process_that_dies_is_noticed_while_another_shard_is_away(two: list[BrokerServer]) -> None:
    url = url_of(two)
    async with started_on(url, "interface", 0) as (interface, at_interface), contextlib.AsyncExitStack() as stack:
        worker, at_worker = await stack.enter_async_context(started_on(url, "worker", 0))
        interface.link_send(worker.process_id, build_credit(1, 1, 0))
        await at_worker.until(lambda: bool(at_worker.frames))
        two[1].kill()
        # While one shard has gone just now nobody on the other is spared.
        await vanish(worker)
        died_at = time.monotonic()
        await at_interface.until(lambda: bool(at_interface.ended))
        assert at_interface.ended[0][0] == worker.process_id
        assert time.monotonic() - died_at < 15  # three times the promise
        stack.pop_all()


async def test_a_flush_of_one_shard_registers_its_groups_anew(two: list[BrokerServer]) -> None:
    url = url_of(two)
    groups = {static_shard(Keys().group(f"room{n}"), 2): f"room{n}" for n in range(20)}
    async with started_on(url, "interface", 0) as (interface, heard), started_on(url, "client", 0) as (client, _):
        for number, group in groups.items():
            await interface.group_add(group, f"interface.{interface.process_id}!{number}")
        with two[1].client() as broker:
            broker.flushall()
            await until(lambda: broker.zcard(Keys().group(groups[1])) == 1, 9)  # three times the promise
        for group in groups.values():
            await client.group_send(group, {"type": "websocket.send", "text": group})
        await heard.until(lambda: len(heard.delivered) == 2)


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_links_and_groups_survive_a_failover_of_sentinels(sentinels: SentinelServers, how: str) -> None:
    async with (
        started(sentinels.url, "interface", delivery=True) as (interface, at_interface),
        started(sentinels.url) as (worker, at_worker),
        Stream(interface, worker, at_worker) as down,
        Stream(worker, interface, at_interface) as up,
    ):
        await worker.group_add("room", f"interface.{interface.process_id}!1")
        await down.flows()
        await up.flows()
        getattr(sentinels.master, how)()
        try:
            await asyncio.to_thread(sentinels.wait_for_failover)
            assert await down.flows() < RESUME_S
            assert await up.flows() < RESUME_S
            for number in range(20):
                await worker.group_send("room", {"type": "websocket.send", "text": str(number)})
            await at_interface.until(lambda: len(at_interface.delivered) >= 20)
            await worker.send("work", {"type": "x"})
            async with asyncio.timeout(PATIENCE_S):
                assert await interface.receive("work") == {"type": "x"}
        finally:
            if how == "pause":
                sentinels.master.resume()
        # The old master, back as a replica, disturbs nobody; and time to judge again.
        await asyncio.sleep(6)
        assert (at_interface.ended, at_worker.ended) == ([], [])
        assert len(at_interface.delivered) == 20


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_links_and_groups_survive_a_failover_of_a_cluster(cluster: ClusterServers, how: str) -> None:
    async with (
        started(cluster.url, "interface", delivery=True) as (interface, at_interface),
        started(cluster.url) as (worker, at_worker),
        Stream(interface, worker, at_worker) as down,
        Stream(worker, interface, at_interface) as up,
    ):
        for group in ("a", "b", "c"):  # three slots of three masters, see below
            await worker.group_add(group, f"interface.{interface.process_id}!1")
        assert len({slot_of(Keys().group(group)) * 3 // 16384 for group in "abc"}) > 1
        await down.flows()
        await up.flows()
        victim = cluster.owner_of(Keys().mail(worker.process_id))
        getattr(victim, how)()
        try:
            await until(lambda: cluster.owner_of(Keys().mail(worker.process_id)) is not victim, PATIENCE_S)
            assert await down.flows() < RESUME_S
            assert await up.flows() < RESUME_S
            for group in ("a", "b", "c"):
                for number in range(10):
                    await worker.group_send(group, {"type": "websocket.send", "text": str(number)})
            await at_interface.until(lambda: len(at_interface.delivered) >= 30)
        finally:
            if how == "pause":
                victim.resume()
        await asyncio.sleep(6)
        assert (at_interface.ended, at_worker.ended) == ([], [])
        assert len(at_interface.delivered) == 30


async def test_an_inbox_whose_node_is_gone_for_good_goes_on_where_its_slot_is_given(valkey_program: str) -> None:
    """No replica: an operator gives the slot to a node that never was away."""
    options = ("--cluster-require-full-coverage", "no")
    with ClusterServers(valkey_program, replicas=False, options=options) as cluster:
        async with (
            started(cluster.url, "interface") as (interface, at_interface),
            started(cluster.url) as (worker, at_worker),
            Stream(interface, worker, at_worker) as down,
        ):
            await down.flows()
            key = Keys().mail(worker.process_id)
            victim = cluster.owner_of(key)
            survivors = [server for server in cluster.masters if server is not victim]
            inboxes = [Keys().mail(process.process_id) for process in (worker, interface)]
            slots = {slot_of(inbox) for inbox in inboxes if cluster.owner_of(inbox) is victim}
            victim.kill()
            await at_worker.until(lambda: at_worker.broker == [False])
            for slot in slots:
                for server in survivors:
                    cluster.ask(server, "CLUSTER", "SETSLOT", slot, "NODE", cluster.node_id(survivors[0]))
            await at_worker.until(lambda: at_worker.broker == [False, True])
            assert worker.broker_reachable
            assert await down.flows() < PATIENCE_S
            assert (at_interface.ended, at_worker.ended) == ([], [])


async def test_links_go_on_while_the_slots_of_inboxes_change_hands(cluster: ClusterServers) -> None:
    async with (
        started(cluster.url, "interface") as (interface, at_interface),
        started(cluster.url) as (worker, at_worker),
        Stream(interface, worker, at_worker) as down,
        Stream(worker, interface, at_interface) as up,
    ):
        for process in (worker, interface, worker):
            key = Keys().mail(process.process_id)
            source = cluster.owner_of(key)
            target = next(server for server in cluster.masters if server is not source)
            await asyncio.to_thread(cluster.begin_move, slot_of(key), source, target)
            for _ in range(3):
                assert await down.flows() < RESUME_S
                assert await up.flows() < RESUME_S
            await asyncio.to_thread(cluster.finish_move, slot_of(key), source, target)
            assert await down.flows() < RESUME_S
            assert await up.flows() < RESUME_S
        assert (at_interface.ended, at_worker.ended) == ([], [])
        assert (at_interface.broker, at_worker.broker) == ([], [])  # no outage
