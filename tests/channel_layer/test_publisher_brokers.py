"""Plain calls on shards, with Sentinels and in a Cluster, through failovers and while slots change hands."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from channel_layer import Publisher
from channel_layer.errors import BrokerError, BrokerUnavailable
from channel_layer.names import Keys
from channel_layer.sharding import slot_of, static_shard
from tests.servers import BrokerServer, ClusterServers, SentinelServers, free_port, shards, url_of

CHANNELS = [f"work.{n}" for n in range(20)]
PATIENCE_S = 60.0


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # it is other processes that change


def length(server: BrokerServer, channel: str) -> int:
    with server.client() as client:
        return int(client.llen(Keys().normal(channel)))


def test_messages_go_to_the_shard_of_their_channel(valkey_program: str) -> None:
    with shards(valkey_program, 3) as servers, Publisher(url_of(servers)) as publisher:
        for channel in CHANNELS:
            publisher.send(channel, {"type": "x"})
            lengths = [length(server, channel) for server in servers]
            assert lengths[static_shard(Keys().normal(channel), 3)] == sum(lengths) == 1


def test_a_group_spans_shards(valkey_program: str) -> None:
    with shards(valkey_program) as servers, Publisher(url_of(servers)) as publisher:
        home = servers[static_shard(Keys().group("all"), 2)]
        with home.client() as client:
            client.zadd(Keys().group("all"), {f"#{channel}": (time.time() + 60) * 1000 for channel in CHANNELS})
        publisher.group_send("all", {"type": "x"})
        assert [sum(length(server, channel) for server in servers) for channel in CHANNELS] == [1] * len(CHANNELS)
        servers[1 - servers.index(home)].kill()
        with pytest.raises(BrokerUnavailable):
            publisher.group_send("all", {"type": "x"})


def test_a_failover_of_sentinels_is_waited_for(sentinels: SentinelServers) -> None:
    """A call that cannot connect has sent nothing, so it waits for the new master, as long as for an answer."""
    with Publisher(sentinels.url, socket_timeout_s=PATIENCE_S) as publisher:
        publisher.send("work", {"type": "x"})
        sentinels.master.kill()
        publisher.send("work", {"type": "x"})
        assert length(sentinels.replica, "work") >= 1


def test_a_demoted_master_refuses_and_the_new_one_gets_the_message(valkey_program: str) -> None:
    with (
        SentinelServers(valkey_program, down_after_ms=60_000) as sentinels,  # no failover but the one asked for
        Publisher(sentinels.url, socket_timeout_s=PATIENCE_S) as publisher,
    ):
        publisher.send("work", {"type": "x"})
        with sentinels.sentinels[0].client() as client:
            client.execute_command("SENTINEL", "FAILOVER", sentinels.NAME)
        sentinels.wait_for_failover()

        def is_replica() -> bool:
            # The Sentinel that demotes it ends its connections, this one as well.
            with contextlib.suppress(redis.ConnectionError), sentinels.master.client() as client:
                return bool(client.info("replication")["role"] == "slave")
            return False

        until(is_replica)
        for _ in range(3):
            publisher.send("work", {"type": "x"})
        assert length(sentinels.replica, "work") == 4


def test_passwords(valkey_program: str) -> None:
    with SentinelServers(
        valkey_program, password="masters", sentinel_password="theirs", down_after_ms=60_000
    ) as servers:
        with Publisher(servers.url) as publisher:
            publisher.send("work", {"type": "x"})
            assert "theirs" not in repr(publisher)
            assert "masters" not in repr(publisher)
        with (
            Publisher(servers.url.replace("=theirs", "=wrong"), socket_timeout_s=0.3) as publisher,
            pytest.raises(BrokerUnavailable, match="none of the Sentinels answers"),
        ):
            publisher.send("work", {"type": "x"})


def test_messages_go_to_the_owners_of_their_slots(cluster: ClusterServers) -> None:
    with Publisher(cluster.url.split(",")[0]) as publisher:
        for channel in CHANNELS:
            publisher.send(channel, {"type": "x"})
            owner = cluster.owner_of(Keys().normal(channel))
            assert length(owner, channel) == 1
        with cluster.owner_of(Keys().group("all")).client() as client:
            client.zadd(Keys().group("all"), {f"#{channel}": (time.time() + 60) * 1000 for channel in CHANNELS})
        publisher.group_send("all", {"type": "x"})
        for channel in CHANNELS:
            assert length(cluster.owner_of(Keys().normal(channel)), channel) == 2


def test_slots_that_change_hands_cost_no_message_and_double_none(cluster: ClusterServers) -> None:
    key = Keys().normal("work")
    slot = slot_of(key)
    source = cluster.owner_of(key)
    target = next(server for server in cluster.masters if server is not source)
    stop = threading.Event()
    sent = 0

    def send() -> None:
        nonlocal sent
        with Publisher(cluster.url, capacity=1_000_000) as publisher:
            while not stop.is_set():
                publisher.send("work", {"type": "x"})
                sent += 1

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for _ in range(2):
            before = sent
            until(lambda before=before: sent > before + 50)  # type: ignore[misc]
            cluster.begin_move(slot, source, target)
            before = sent
            until(lambda before=before: sent > before + 50)  # type: ignore[misc]
            cluster.finish_move(slot, source, target)
            source, target = target, source
    finally:
        stop.set()
        sender.join(PATIENCE_S)
    assert length(source, "work") == sent


def test_a_key_on_its_way_is_asked_for_once(cluster: ClusterServers) -> None:
    key = Keys().normal("work")
    source = cluster.owner_of(key)
    target = next(server for server in cluster.masters if server is not source)
    with Publisher(cluster.url) as publisher:
        publisher.send("work.else", {"type": "x"})
        cluster.begin_move(slot_of(key), source, target)
        publisher.send("work", {"type": "x"})  # the key does not exist at its source: ASK
        assert cluster.ask(target, "CLUSTER", "COUNTKEYSINSLOT", slot_of(key)) == 1
        cluster.finish_move(slot_of(key), source, target)
        publisher.send("work", {"type": "x"})
        assert length(target, "work") == 2


def test_what_cannot_be_reached_is_said(cluster: ClusterServers) -> None:
    port = free_port()
    for url in (f"redis+sentinel://127.0.0.1:{port}/x", f"redis+cluster://127.0.0.1:{port}"):
        with (
            Publisher(url, socket_timeout_s=0.2) as publisher,
            pytest.raises(BrokerUnavailable, match=f"{port}.*none? of|no node"),
        ):
            publisher.send("work", {"type": "x"})
    channel = next(each for each in CHANNELS if cluster.owner_of(Keys().normal(each)) is not cluster.masters[0])
    with (
        Publisher(cluster.masters[0].url) as publisher,
        pytest.raises(BrokerError, match=r"name it with redis\+cluster://"),
    ):
        publisher.send(channel, {"type": "x"})
