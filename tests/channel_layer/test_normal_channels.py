"""Reading normal channels: a broker that refuses to be read, reads that end early."""

from __future__ import annotations

import asyncio
import sys

import pytest

from channel_layer.blocking_reader import ReaderState
from channel_layer.errors import BrokerError
from channel_layer.normal_channels import NormalChannels
from tests.channel_layer.processes import PATIENCE_S, started, until
from tests.servers import BrokerServer


def is_reading(channels: NormalChannels, channel: str) -> bool:
    """Whether a read of the channel is under way at the broker."""
    reader = channels._readers.get(channel)
    return reader is not None and reader.is_reading and reader.reader.statistics().state is ReaderState.READING


async def test_a_broker_that_takes_no_writes_for_a_while_is_waited_for(any_broker_server: BrokerServer) -> None:
    """Popping is a write: a full disk (MISCONF) or a replica that is away (NOREPLICAS) must not end workers."""
    async with (
        started(any_broker_server.url) as (worker, _),
        started(any_broker_server.url, "interface") as (other, _),
    ):
        taking = asyncio.create_task(worker.take_openings("http.request", 8))
        with any_broker_server.client() as client:

            def refused_count() -> int:
                return int(client.info("errorstats").get("errorstat_NOREPLICAS", {"count": 0})["count"])

            client.config_set("min-replicas-to-write", 1)
            await asyncio.sleep(2.5)  # a read that is under way goes on for 2 s
            refused = refused_count()
            await until(lambda: refused_count() > refused + 5)
            assert not taking.done()
            client.config_set("min-replicas-to-write", 0)
        await other.push_opening("http.request", b"opening")
        async with asyncio.timeout(PATIENCE_S):
            assert await taking == [b"opening"]


async def test_a_key_of_another_type_fails_the_call(broker_server: BrokerServer) -> None:
    async with started(broker_server.url) as (worker, _):
        with broker_server.client() as client:
            client.set("trunkline:1:channel:{jobs}", "no list")
        with pytest.raises(BrokerError, match="WRONGTYPE"):
            await worker.receive("jobs")


async def test_what_returns_comes_before_what_a_read_under_way_would_bring(broker_server: BrokerServer) -> None:
    async with started(broker_server.url) as (worker, _):
        assert worker._parts is not None
        channels = worker._parts.normal
        await worker.send("jobs", {"type": "older"})
        older = await channels.take("jobs", 1)
        waiting = asyncio.create_task(channels.take("jobs", 1))
        await until(lambda: is_reading(channels, "jobs"))
        channels.give_back("jobs", older)
        await worker.send("jobs", {"type": "newer"})
        async with asyncio.timeout(PATIENCE_S):
            assert await waiting == older
            assert await worker.receive("jobs") == {"type": "newer"}


async def test_a_program_ends_that_does_not_close_its_layer(broker_server: BrokerServer) -> None:
    """asyncio.run() cancels every task once, and waits for it."""
    program = await asyncio.create_subprocess_exec(sys.executable, "-c", _UNCLOSED_PROGRAM, broker_server.url)
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert await program.wait() == 0
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()


_UNCLOSED_PROGRAM = """
import asyncio, sys
from channel_layer.process_layer import RedisProcessLayer
from tests.channel_layer.processes import RecordingListener, until
from tests.channel_layer.test_normal_channels import is_reading

async def main():
    layer = RedisProcessLayer(sys.argv[1], role="worker")
    await layer.start(RecordingListener())
    receiving = asyncio.create_task(layer.receive("jobs"))
    await until(lambda: is_reading(layer._parts.normal, "jobs"))

asyncio.run(main())
"""
