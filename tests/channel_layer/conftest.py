"""Several brokers, as tests of topologies need them; and readable assertions in the contract suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import BrokerServer, ClusterServers, SentinelServers, shards

pytest.register_assert_rewrite("tests.channel_layer.contract")


@pytest.fixture
def two(valkey_program: str) -> Iterator[list[BrokerServer]]:
    with shards(valkey_program) as servers:
        yield servers


@pytest.fixture
def sentinels(valkey_program: str) -> Iterator[SentinelServers]:
    with SentinelServers(valkey_program) as servers:
        yield servers


@pytest.fixture
def cluster(valkey_program: str) -> Iterator[ClusterServers]:
    with ClusterServers(valkey_program) as servers:
        yield servers
