"""Several brokers, as tests of topologies need them; and readable assertions in the contract suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from channel_layer.leases import LeaseKeeper
from tests.servers import BrokerServer, ClusterServers, SentinelServers, shards

pytest.register_assert_rewrite("tests.channel_layer.contract")


@pytest.fixture
def patient_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that ends drops its lease, also when the machine stands still for longer than it waits for that."""
    monkeypatch.setattr("channel_layer.leases.RENEWAL_TIMEOUT_S", 60.0)
    monkeypatch.setattr("channel_layer.home._STOP_TIMEOUT_S", 60.0)
    monkeypatch.setattr(LeaseKeeper.stop, "__defaults__", (True, 60.0))


@pytest.fixture
def two(valkey_program: str) -> Iterator[list[BrokerServer]]:
    with shards(valkey_program) as servers:
        yield servers


@pytest.fixture
def sentinels(valkey_program: str) -> Iterator[SentinelServers]:
    with SentinelServers(valkey_program) as servers:
        yield servers


@pytest.fixture
def calm_sentinels(valkey_program: str) -> Iterator[SentinelServers]:
    """No failover but one that is asked for, however long the master is not let run."""
    with SentinelServers(valkey_program, down_after_ms=60_000) as servers:
        yield servers


@pytest.fixture
def cluster(valkey_program: str) -> Iterator[ClusterServers]:
    with ClusterServers(valkey_program) as servers:
        yield servers
