"""The broker client on several servers: static shards, Sentinels, a Cluster; real processes, killed and frozen."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from pathlib import Path
from typing import Any

import pytest

from channel_layer import scripts
from channel_layer.broker import Broker, BrokerChange, BrokerState
from channel_layer.errors import BrokerError, BrokerUnavailable, BrokerUnsuitable
from channel_layer.sharding import slot_of
from tests.channel_layer.test_broker import LOST, RESTORED, RESTORED_EMPTY, Changes, connected, until, until_blocked
from tests.servers import BrokerServer, ClusterServers, SentinelServers, free_port, url_of

# From the moment that the new master is there: the promise is one second; a machine that has few processors for all
# the servers and clients of a test, and for other tests, needs more.
RESUME_S = 10.0
PATIENCE_S = 60.0


def key_on(broker: Broker, shard_number: int, prefix: str = "key") -> str:
    """A key that is on one shard."""
    return next(
        key for n in range(1000) if broker.shard_of(key := f"{prefix}:{{{n}}}") is broker.shards[shard_number]
    )


async def resumed(broker: Broker, key: str, timeout_s: float = PATIENCE_S) -> float:
    """Wait until the key can be written; return how long that took."""
    began = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                await broker.call("SET", key, "x")
                return time.monotonic() - began
            except BrokerUnavailable:
                await asyncio.sleep(0.01)


# Static shards


async def test_each_key_is_on_one_of_the_shards_and_what_has_its_tag_beside_it(two: list[BrokerServer]) -> None:
    async with connected(url_of(two)) as broker:
        for n in range(50):
            await broker.call("SET", f"a:{{{n}}}", n)
            await broker.transaction(("RPUSH", f"b:{{{n}}}:list", "x"), ("PEXPIRE", f"b:{{{n}}}:list", 60_000))
            await broker.script(scripts.GROUP_REGISTER, [f"c:{{{n}}}"], ["w1", 60_000])
        found = []
        for server in two:
            with server.client(decode_responses=True) as client:
                keys = {key for key in client.scan_iter(count=1000) if key[:2] in ("a:", "b:", "c:")}
                tags = [{key.split("{")[1].split("}")[0] for key in keys if key[0] == kind} for kind in "abc"]
                assert tags[0] == tags[1] == tags[2]
                found.append(len(tags[0]))
        assert sum(found) == 50
        assert min(found) > 10
        assert broker.statistics().shard_count == 2
        assert broker.state is BrokerState.REACHABLE


async def test_one_shard_down_is_an_outage_of_its_keys_only(two: list[BrokerServer]) -> None:
    async with connected(url_of(two)) as broker:
        changes = Changes(broker)
        here, there = key_on(broker, 0), key_on(broker, 1)
        two[1].kill()
        await changes.wait(1)
        assert changes.seen == [LOST]
        assert changes.seen[0].shard is broker.shard_of(there)
        assert (broker.state, broker.reachable) == (BrokerState.LOST, False)
        assert broker.statistics().lost_shards == (two[1].url,)
        with pytest.raises(BrokerUnavailable):
            await broker.call("SET", there, "x")
        assert await broker.call("SET", here, "x") == b"OK"
        await broker.wait_reachable(1.0, here)
        with pytest.raises(BrokerUnavailable, match=str(two[1].socket_path)):
            await broker.wait_reachable(0.05, there)
        with pytest.raises(BrokerUnavailable):
            await broker.wait_reachable(0.05)
        two[1].start()
        await broker.wait_reachable(PATIENCE_S)
        await changes.wait(2)
        assert changes.seen == [LOST, RESTORED_EMPTY]
        assert changes.seen[1].shard is broker.shard_of(there)
        assert await broker.call("SET", there, "x") == b"OK"


async def test_a_reader_reads_where_its_key_is(two: list[BrokerServer]) -> None:
    async with connected(url_of(two)) as broker:
        for number in (0, 1):
            key = key_on(broker, number)
            reader = broker.open_reader()
            pop = asyncio.create_task(reader.pop([key], 1))
            await broker.call("RPUSH", key, "x")
            assert await pop == (key, [b"x"])
            assert two[number].socket_path.name in str(broker.shard_of(key))


async def test_a_flush_of_one_shard_is_told_of_that_one(two: list[BrokerServer]) -> None:
    async with connected(url_of(two)) as broker:
        changes = Changes(broker)
        with two[0].client() as client:
            client.flushall()
        await changes.wait(1)
        assert (changes.seen, changes.seen[0].shard) == ([RESTORED_EMPTY], broker.shards[0])


async def test_a_shard_that_is_not_there_at_the_start_is_named_and_connecting_can_be_tried_again(
    two: list[BrokerServer],
) -> None:
    broker = Broker(url_of(two), client_name="test")
    two[1].kill()
    with pytest.raises(BrokerUnavailable, match=str(two[1].socket_path)):
        await broker.connect()
    two[1].start()
    await broker.connect()
    assert await broker.call("SET", key_on(broker, 1), "x") == b"OK"
    await broker.close()
    for server in two:
        with server.client() as client:
            await until(lambda client=client: len(client.client_list()) == 1)  # type: ignore[misc]


async def test_each_shard_is_checked(two: list[BrokerServer]) -> None:
    with two[1].client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(BrokerUnsuitable, match=f"{two[1].socket_path} has maxmemory-policy allkeys-lru"):
        await Broker(url_of(two), client_name="test").connect()


async def test_processes_that_name_the_shards_in_another_order_are_refused(
    two: list[BrokerServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("channel_layer.broker_shard.HEARTBEAT_S", 0.05)
    async with connected(url_of(two)):
        for server in two:
            with server.client() as client:
                await until(lambda client=client: client.get("trunkline:generation:shard"))  # type: ignore[misc]
        for url in (url_of(two[::-1]), two[1].url, f"{url_of(two)},{two[0].url}?db=1"):
            with pytest.raises(BrokerUnsuitable, match="the same URLs in the same order"):
                await Broker(url, client_name="test").connect()
        async with connected(url_of(two)):
            pass


# Sentinels


async def test_the_master_is_found_and_followed_when_it_is_killed(sentinels: SentinelServers) -> None:
    async with connected(sentinels.url) as broker:
        assert str(sentinels.master.port) in str(broker.shards[0])
        changes = Changes(broker)
        reader = broker.open_reader()
        pop = asyncio.create_task(reader.pop(["list"], 1))
        await until_blocked(sentinels.master)
        await broker.call("SET", "key", "x")
        sentinels.master.kill()
        with pytest.raises(BrokerUnavailable):
            await pop
        await asyncio.to_thread(sentinels.wait_for_failover)
        assert await resumed(broker, "key", RESUME_S) < RESUME_S
        await changes.wait(2)
        assert changes.seen == [LOST, RESTORED_EMPTY]  # another server: it may lack the last writes
        await broker.call("RPUSH", "list", "x")
        assert await reader.pop(["list"], 1) == ("list", [b"x"])
        assert str(sentinels.replica.port) in str(broker.shards[0])


async def test_a_frozen_master_is_left_for_the_new_one_also_by_blocked_reads(sentinels: SentinelServers) -> None:
    # However long the Sentinels take, it is not the silence that ends what hangs.
    async with connected(f"{sentinels.url}?socket_timeout=60") as broker:
        reader = broker.open_reader()
        pop = asyncio.create_task(reader.pop(["list"], 1))
        await until_blocked(sentinels.master)
        await broker.call("SET", "key", "x")
        sentinels.master.pause()
        hung = broker.call("SET", "key", "y")
        try:
            await asyncio.to_thread(sentinels.wait_for_failover)
            assert await resumed(broker, "key", RESUME_S) < RESUME_S
            with pytest.raises(BrokerUnavailable, match="not the master any more"):
                await hung  # and it is not written again: it may yet be carried out
            with pytest.raises(BrokerUnavailable, match="another server is the master"):
                await pop
            await broker.call("RPUSH", "list", "x")
            assert await reader.pop(["list"], 1) == ("list", [b"x"])
        finally:
            sentinels.master.resume()


async def test_a_planned_failover_wakes_readers_and_loses_no_data(calm_sentinels: SentinelServers) -> None:
    async with connected(calm_sentinels.url) as broker:
        reader = broker.open_reader()
        await broker.call("SET", "before", "x")

        async def read() -> tuple[str, list[bytes]]:
            while True:
                try:
                    taken = await reader.pop(["list"], 1)
                except BrokerUnavailable:
                    continue
                if taken is not None:
                    return taken

        reading = asyncio.create_task(read())
        with calm_sentinels.sentinels[0].client() as client:
            client.execute_command("SENTINEL", "FAILOVER", calm_sentinels.NAME)
        await asyncio.to_thread(calm_sentinels.wait_for_failover)
        # Until the old master is told that it is a replica, it goes on taking writes.
        await until(lambda: str(calm_sentinels.replica.port) in str(broker.shards[0]), PATIENCE_S)
        await resumed(broker, "after", RESUME_S)
        assert await broker.call("GET", "before") == b"x"
        await broker.call("RPUSH", "list", "y")
        async with asyncio.timeout(RESUME_S):
            assert await reading == ("list", [b"y"])


async def test_passwords_of_the_master_and_of_its_sentinels(valkey_program: str) -> None:
    with SentinelServers(
        valkey_program, password="masters", sentinel_password="theirs", down_after_ms=60_000
    ) as servers:
        url = servers.url
        async with connected(url) as broker:
            assert await broker.call("SET", "key", "x") == b"OK"
        with pytest.raises(BrokerUnsuitable, match="sentinel_password"):
            await Broker(url.replace("=theirs", "=wrong"), client_name="test").connect()
        with pytest.raises(BrokerUnsuitable, match="NOAUTH"):
            await Broker(url.split("?")[0], client_name="test").connect()
        with pytest.raises(BrokerUnsuitable, match="user name or password"):
            await Broker(url.replace(":masters@", ":wrong@"), client_name="test").connect()


async def test_without_sentinels_the_last_master_is_tried_again(calm_sentinels: SentinelServers) -> None:
    async with connected(calm_sentinels.url) as broker:
        changes = Changes(broker)
        for sentinel in calm_sentinels.sentinels:
            sentinel.kill()
        with calm_sentinels.master.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
        await changes.wait(2)
        assert changes.seen == [LOST, RESTORED]
        assert await broker.call("SET", "key", "x") == b"OK"


async def test_what_is_wrong_with_sentinels_is_said(calm_sentinels: SentinelServers) -> None:
    with pytest.raises(BrokerUnsuitable, match=r"where master 'other' is: .*No such master"):
        await Broker(calm_sentinels.url.replace("/trunk", "/other"), client_name="test").connect()
    with pytest.raises(BrokerUnavailable, match="none of its Sentinels answers"):
        await Broker(f"redis+sentinel://127.0.0.1:{free_port()}/trunk", client_name="test").connect()
    with pytest.raises(BrokerUnsuitable, match=r"sentinel mode: name it with redis\+sentinel://"):
        await Broker(calm_sentinels.sentinels[0].url, client_name="test").connect()
    for sentinel in calm_sentinels.sentinels:  # what was wrong left no connection behind
        with sentinel.client() as client:
            # The Sentinels' own connections have names; this one has none, and neither have ours.
            await until(lambda client=client: sum(not each["name"] for each in client.client_list()) == 1)  # type: ignore[misc]
    # A single Sentinel that answers is enough.
    for sentinel in calm_sentinels.sentinels[:2]:
        sentinel.kill()
    async with connected(calm_sentinels.url) as broker:
        assert await broker.call("SET", "key", "x") == b"OK"


# Cluster


async def test_keys_are_where_the_cluster_has_them(cluster: ClusterServers) -> None:
    async with connected(cluster.url.split(",")[0]) as broker:  # one node names the others
        assert broker.statistics().shard_count == 3
        for n in range(100):
            key = f"{{{n}}}:key"
            await broker.call("SET", key, n)
            assert await broker.script(scripts.PUSH, [f"{{{n}}}:list"], [-1, 60_000, b"x"])
            await broker.transaction(("RPUSH", f"{{{n}}}:other", "x"), ("PEXPIRE", f"{{{n}}}:other", 60_000))
            assert str(cluster.owner_of(key).port) in str(broker.shard_of(key))
        counts = [await shard.call("DBSIZE") for shard in broker.shards]
        assert sum(counts) == 303  # and each shard has a generation key
        for shard in broker.shards:
            assert await shard.call("GET", shard.generation_key) is not None


async def test_a_killed_node_is_an_outage_until_its_replica_has_its_place(cluster: ClusterServers) -> None:
    async with connected(cluster.url) as broker:
        changes = Changes(broker)
        key = "{x}:list"
        shard, victim = broker.shard_of(key), cluster.owner_of(key)
        reader = broker.open_reader()
        pop = asyncio.create_task(reader.pop([key], 1))
        await until_blocked(victim)
        await broker.call("SET", "{x}:key", "x")
        victim.kill()
        with pytest.raises(BrokerUnavailable):
            await pop
        await until(lambda: cluster.owner_of(key) is not victim, PATIENCE_S)
        await resumed(broker, "{x}:key", RESUME_S)
        assert broker.shard_of(key) is shard
        assert BrokerChange(reachable=True, data_lost=True) in [
            change for change in changes.seen if change.shard is shard
        ]
        await broker.call("RPUSH", key, "x")
        assert await reader.pop([key], 1) == (key, [b"x"])


async def test_a_frozen_node_is_left_for_its_replica(cluster: ClusterServers) -> None:
    async with connected(cluster.url) as broker:
        key = "{x}:list"
        victim = cluster.owner_of(key)
        reader = broker.open_reader()
        pop = asyncio.create_task(reader.pop([key], 1))
        await until_blocked(victim)
        await broker.call("SET", "{x}:key", "x")
        victim.pause()
        try:
            hung = broker.call("SET", "{x}:key", "y")
            await until(lambda: cluster.owner_of(key) is not victim, PATIENCE_S)
            await resumed(broker, "{x}:key", RESUME_S)
            with pytest.raises(BrokerUnavailable):
                await hung
            with pytest.raises(BrokerUnavailable):
                await pop
            await broker.call("RPUSH", key, "x")
            assert await reader.pop([key], 1) == (key, [b"x"])
        finally:
            victim.resume()


async def test_a_planned_failover_loses_no_command(cluster: ClusterServers) -> None:
    key = "{x}:count"
    async with connected(cluster.url) as broker:
        index = cluster.masters.index(cluster.owner_of(key))
        stop, failed, answered = asyncio.Event(), 0, 0

        async def count() -> None:
            nonlocal failed, answered
            while not stop.is_set():
                try:
                    await broker.call("INCR", key)
                    answered += 1
                except BrokerUnavailable:
                    failed += 1
                    await asyncio.sleep(0.01)

        counting = [asyncio.create_task(count()) for _ in range(5)]
        await until(lambda: answered > 100)
        await asyncio.to_thread(cluster.ask, cluster.replicas[index], "CLUSTER", "FAILOVER")
        await until(lambda: cluster.owner_of(key) is cluster.replicas[index], PATIENCE_S)
        before = answered
        await until(lambda: answered > before + 100, PATIENCE_S)
        stop.set()
        await asyncio.gather(*counting)
        total = int(await broker.call("GET", key))
        assert answered <= total <= answered + failed


async def test_slots_that_change_hands_cost_no_command_and_keep_the_order(cluster: ClusterServers) -> None:
    """Resharding under load: every command is carried out once, in the order of the calls."""
    key = "{x}:list"
    slot = slot_of(key)
    async with connected(cluster.url) as broker:
        source = cluster.owner_of(key)
        target = next(server for server in cluster.masters if server is not source)
        reader = broker.open_reader()
        stop = asyncio.Event()
        sent = 0
        received: list[int] = []

        async def send() -> None:
            nonlocal sent
            calls: list[asyncio.Future[Any]] = []
            while not stop.is_set():
                for _ in range(5):  # on their way together
                    if sent % 3:
                        calls.append(broker.transaction(("RPUSH", key, sent), ("PEXPIRE", key, 60_000)))
                    else:
                        calls.append(broker.script(scripts.PUSH, [key], [-1, 60_000, b"%d" % sent]))
                    sent += 1
                await asyncio.sleep(0.001)
            assert len(await asyncio.gather(*calls)) == sent

        async def receive() -> None:
            while not (stop.is_set() and len(received) == sent):
                try:
                    taken = await reader.pop([key, f"{key}:mail"], 50)
                except BrokerUnavailable:
                    continue
                if taken is not None:
                    received.extend(int(each if int_like(each) else each[8:]) for each in taken[1])

        async def more() -> None:
            count = len(received) + 200
            await until(lambda: len(received) > count, PATIENCE_S)

        tasks = asyncio.create_task(send()), asyncio.create_task(receive())
        await more()
        for _ in range(3):
            await asyncio.to_thread(cluster.begin_move, slot, source, target)
            await more()  # also while it is on its way
            await asyncio.to_thread(cluster.finish_move, slot, source, target)
            await more()
            assert str(target.port) in str(broker.shard_of(key))
            source, target = target, source
        stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*tasks)
        assert received == list(range(sent))
        assert broker.statistics().connect_count == 3  # no connection of the client was lost over it


def int_like(element: bytes) -> bool:
    return element.isdigit() and len(element) < 9


async def test_a_new_node_gets_slots_while_they_are_in_use(cluster: ClusterServers, valkey_program: str) -> None:
    """A node that nobody knew: ASK names it before it owns anything."""
    key = "{x}:list"
    slot = slot_of(key)
    options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with BrokerServer(valkey_program, tcp=True, options=options) as newcomer:
        async with connected(cluster.url) as broker:
            source = cluster.owner_of(key)
            cluster.ask(newcomer, "CLUSTER", "MEET", "127.0.0.1", source.port, source.options[-1])
            await until(lambda: "cluster_state:ok" in cluster.ask(newcomer, "CLUSTER", "INFO"), PATIENCE_S)
            await until(lambda: cluster.node_id(newcomer) in cluster.ask(source, "CLUSTER", "NODES"), PATIENCE_S)
            cluster.begin_move(slot, source, newcomer)
            assert await broker.call("RPUSH", key, "a") == 1
            assert await broker.transaction(("RPUSH", key, "b"), ("PEXPIRE", key, 60_000)) == [2, 1]
            assert cluster.ask(newcomer, "CLUSTER", "COUNTKEYSINSLOT", slot) == 1
            cluster.finish_move(slot, source, newcomer)
            assert await broker.call("RPUSH", key, "c") == 3
            assert broker.statistics().shard_count == 4
            reader = broker.open_reader()
            assert await reader.pop([key], 9) == (key, [b"a", b"b", b"c"])


async def test_what_is_wrong_with_a_cluster_is_said(cluster: ClusterServers, broker_server: BrokerServer) -> None:
    with pytest.raises(BrokerUnsuitable, match=r"cluster mode: name it with redis\+cluster://"):
        await Broker(cluster.masters[0].url, client_name="test").connect()
    with pytest.raises(BrokerUnavailable, match="no node of the Cluster answers"):
        await Broker(f"redis+cluster://127.0.0.1:{free_port()}", client_name="test").connect()
    with cluster.masters[2].client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(BrokerUnsuitable, match=f"{cluster.masters[2].port} has maxmemory-policy"):
        await Broker(cluster.url, client_name="test").connect()
    with cluster.masters[2].client() as client:
        client.config_set("maxmemory-policy", "noeviction")
    async with connected(cluster.url) as broker:
        await broker.call("SET", "{x}:key", "x")
        with pytest.raises(BrokerError, match="WRONGTYPE"):
            await broker.call("RPUSH", "{x}:key", "x")


async def test_a_single_server_is_no_cluster(valkey_program: str) -> None:
    with (
        BrokerServer(valkey_program, tcp=True) as server,
        pytest.raises(BrokerUnsuitable, match="no node of a Redis Cluster"),
    ):
        await Broker(server.url.replace("redis:", "redis+cluster:"), client_name="test").connect()


SETTINGS = (Path(__file__).parent.parent.parent / "docs" / "settings.md").read_text("utf-8")
(RIGHTS,) = re.findall(r"^user trunkline (.*)$", SETTINGS, re.MULTILINE)
(CLUSTER_RIGHTS,) = re.findall(r"In a Cluster it needs `([^`]+)`", SETTINGS)
(SENTINEL_RIGHTS,) = re.findall(r"a user of the Sentinels\s+needs `([^`]+)`", SETTINGS)


async def test_a_user_with_the_rights_of_the_readme_in_a_cluster(
    cluster: ClusterServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("channel_layer.broker_cluster.LOOK_INTERVAL_S", 3600.0)  # the servers tell of the move
    for server in cluster.nodes:
        cluster.ask(server, "ACL", "SETUSER", "trunkline", *RIGHTS.split(), *CLUSTER_RIGHTS.split())
    key = "trunkline:{x}:list"
    source = cluster.owner_of(key)
    target = next(server for server in cluster.masters if server is not source)
    url = cluster.url.replace("://", "://trunkline:secret@")
    async with connected(url, generation_key="trunkline:generation") as broker:
        reader = broker.open_reader()
        assert await broker.script(scripts.PUSH, [key], [-1, 60_000, b"x"])
        assert await reader.pop([key], 1) is not None
        cluster.begin_move(slot_of(key), source, target)
        await broker.transaction(("RPUSH", key, "y"), ("PEXPIRE", key, 60_000))  # ASK
        cluster.finish_move(slot_of(key), source, target)
        await broker.transaction(("RPUSH", key, "z"), ("PEXPIRE", key, 60_000))  # MOVED
        assert broker.statistics().redirected_count == 2
        async with asyncio.timeout(PATIENCE_S):
            taken: list[bytes] = []
            while len(taken) < 2:
                with contextlib.suppress(BrokerUnavailable):
                    popped = await reader.pop([key], 2)
                    taken += popped[1] if popped is not None else []
        assert taken == [b"y", b"z"]
    for server in cluster.nodes:
        refused = cluster.ask(server, "ACL", "LOG")
        assert [entry for entry in refused if "setinfo" not in str(entry)] == []


async def test_a_user_of_the_sentinels_with_the_rights_of_the_readme(calm_sentinels: SentinelServers) -> None:
    for sentinel in calm_sentinels.sentinels:
        with sentinel.client() as client:
            client.execute_command("ACL", "SETUSER", "asks", "on", ">only", *SENTINEL_RIGHTS.split())
    url = f"{calm_sentinels.url}?sentinel_username=asks&sentinel_password=only"
    async with connected(url) as broker:
        assert await broker.call("SET", "key", "x") == b"OK"


async def test_call_before_connect_is_a_mistake_in_every_topology() -> None:
    for url in ("redis+cluster://nowhere.invalid", "redis+sentinel://nowhere.invalid/x", "redis://a,redis://b"):
        with pytest.raises(RuntimeError, match=r"connect\(\)"):
            await Broker(url, client_name="test").call("GET", "key")
