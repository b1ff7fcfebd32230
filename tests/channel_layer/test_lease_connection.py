"""Where a lease is renewed: on shards, with Sentinels and in a Cluster, through failovers. Real processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from channel_layer.broker_url import parse_broker_urls
from channel_layer.errors import BrokerError, BrokerUnavailable
from channel_layer.lease_connection import LeaseConnection
from channel_layer.leases import LeaseKeeper
from channel_layer.names import Keys
from channel_layer.sharding import slot_of, static_shard
from tests.servers import BrokerServer, ClusterServers, SentinelServers, free_port, shards, url_of

KEY = Keys().lease("w1")
PATIENCE_S = 60.0
# From the moment that the new master is there the lease is renewed within a period and a try; a machine that has few
# processors for all the servers needs more.
RESUME_S = 10.0


def until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # it is other processes and a thread that change


def has_lease(server: BrokerServer) -> bool:
    with server.client() as client:
        return bool(client.exists(KEY))


def connection_to(url: str) -> LeaseConnection:
    return LeaseConnection(parse_broker_urls(url), KEY, timeout_s=PATIENCE_S)


def test_a_lease_is_on_the_shard_of_its_process(valkey_program: str) -> None:
    with shards(valkey_program, 3) as servers:
        keeper = LeaseKeeper(url_of(servers), KEY, b"lease", ttl_s=PATIENCE_S)
        keeper.start()
        try:
            until(lambda: any(map(has_lease, servers)))
            assert [has_lease(server) for server in servers].index(True) == static_shard(KEY, 3)
        finally:
            keeper.stop(timeout_s=PATIENCE_S)
        assert not any(map(has_lease, servers))


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_lease_follows_its_master(sentinels: SentinelServers, how: str) -> None:
    keeper = LeaseKeeper(sentinels.url, KEY, b"lease", on_outage=lambda error: None)
    keeper.start()
    try:
        until(lambda: has_lease(sentinels.master))
        getattr(sentinels.master, how)()
        sentinels.wait_for_failover()
        renewed_at = keeper.last_renewed
        until(lambda: keeper.last_renewed != renewed_at, RESUME_S)
        until(lambda: has_lease(sentinels.replica))
    finally:
        if how == "pause":
            sentinels.master.resume()
        keeper.stop()


def test_a_hanging_sentinel_costs_no_lease(calm_sentinels: SentinelServers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("channel_layer.lease_connection._ASK_TIMEOUT_S", 2.0)  # the other two may be slow
    calm_sentinels.sentinels[0].pause()
    try:
        connection = connection_to(calm_sentinels.url)
        began = time.monotonic()
        assert connection.execute("SET", KEY, "x") == b"OK"
        assert time.monotonic() - began < PATIENCE_S / 2  # not all the time that there is
        connection.close()
    finally:
        calm_sentinels.sentinels[0].resume()


def test_a_planned_failover_in_a_cluster(cluster: ClusterServers) -> None:
    master = cluster.owner_of(KEY)
    replica = cluster.replicas[cluster.masters.index(master)]
    connection = connection_to(cluster.url)
    assert connection.execute("SET", KEY, "x") == b"OK"
    cluster.ask(replica, "CLUSTER", "FAILOVER")
    until(lambda: cluster.owner_of(KEY) is replica)

    def renewed() -> bool:
        try:
            return bool(connection.execute("SET", KEY, "y") == b"OK")
        except (BrokerError, OSError):
            return False

    until(renewed, RESUME_S)
    assert str(replica.port) in str(connection)
    connection.close()


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_lease_follows_its_slot_when_its_node_dies(cluster: ClusterServers, how: str) -> None:
    master = cluster.owner_of(KEY)
    keeper = LeaseKeeper(cluster.url, KEY, b"lease", on_outage=lambda error: None)
    keeper.start()
    try:
        until(lambda: has_lease(master))
        getattr(master, how)()
        until(lambda: cluster.owner_of(KEY) is not master)
        renewed_at = keeper.last_renewed
        until(lambda: keeper.last_renewed != renewed_at, RESUME_S)
    finally:
        if how == "pause":
            master.resume()
        keeper.stop()


def test_a_lease_is_renewed_while_its_slot_is_on_its_way(cluster: ClusterServers) -> None:
    slot = slot_of(KEY)
    source = cluster.owner_of(KEY)
    target = next(server for server in cluster.masters if server is not source)
    connection = connection_to(cluster.url)
    assert connection.execute("SET", "{w1}:other", "x") == b"OK"
    cluster.begin_move(slot, source, target)
    assert connection.execute("SET", KEY, "x") == b"OK"  # ASK
    assert cluster.ask(target, "CLUSTER", "COUNTKEYSINSLOT", slot) == 1
    cluster.finish_move(slot, source, target)
    assert connection.execute("SET", KEY, "y") == b"OK"  # MOVED
    assert str(target.port) in str(connection)
    assert connection.execute("DEL", KEY) == 1
    connection.close()


def test_what_cannot_be_reached_is_said() -> None:
    port = free_port()
    with pytest.raises(BrokerUnavailable, match="none of its Sentinels answers"):
        connection_to(f"redis+sentinel://127.0.0.1:{port}/trunk").execute("GET", KEY)
    with pytest.raises(BrokerUnavailable, match="no node of the Cluster answers"):
        connection_to(f"redis+cluster://127.0.0.1:{port}").execute("GET", KEY)
    with pytest.raises(ConnectionRefusedError):
        connection_to(f"redis://127.0.0.1:{port}").execute("GET", KEY)


def test_a_key_of_another_kind_is_an_error_and_a_new_connection(broker_server: BrokerServer) -> None:
    with broker_server.client() as client:
        client.rpush(KEY, "x")
    connection = connection_to(broker_server.url)
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        connection.execute("GET", KEY)
    assert connection.execute("SET", KEY, "x") == b"OK"
    connection.close()
