"""Sending to groups when the registry cannot be trusted: the broker has lost it, or somebody else wrote into it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from channel_layer.codec import encode_message
from channel_layer.frames import build_credit
from channel_layer.process_layer import RedisProcessLayer
from tests.channel_layer.processes import PATIENCE_S, RecordingListener, started, until
from tests.servers import BrokerServer


@contextlib.asynccontextmanager
async def linked(
    server: BrokerServer,
) -> AsyncIterator[tuple[RedisProcessLayer, RecordingListener, RedisProcessLayer]]:
    """An interface server with a member of "room", and a worker that has a link with it."""
    async with (
        started(server.url, "interface", delivery=True) as (interface, heard),
        started(server.url) as (worker, _),
    ):
        await worker.group_add("room", f"interface.{interface.process_id}!7")
        yield interface, heard, worker


def numbered(number: int) -> dict[str, object]:
    return {"type": "websocket.send", "text": str(number)}


@pytest.mark.parametrize("how", ["killed", "flushed"])
async def test_broadcasts_on_links_have_no_gap_when_the_broker_loses_its_data(
    broker_server: BrokerServer, how: str
) -> None:
    async with linked(broker_server) as (_, heard, worker):
        sent = 0

        async def send(count: int) -> None:
            nonlocal sent
            for _ in range(count):
                await worker.group_send("room", numbered(sent))
                sent += 1

        for _ in range(3):
            await send(20)
            if how == "killed":
                await asyncio.to_thread(broker_server.restart)
            else:
                with broker_server.client() as client:
                    client.flushall()
            await send(200)
        await heard.until(lambda: len(heard.delivered) >= sent)
        assert [encoded for _, encoded in heard.delivered] == [encode_message(numbered(n)) for n in range(sent)]


async def test_a_worker_that_starts_behind_the_loss_reaches_those_it_has_a_link_with(
    broker_server: BrokerServer,
) -> None:
    """It finds a broker that has lost nothing since it knows it, and a registry that is not whole yet."""
    async with linked(broker_server) as (interface, heard, _):
        with broker_server.client() as client:
            client.flushall()
        async with started(broker_server.url) as (young, _):
            young.link_send(interface.process_id, build_credit(1, 1, 0))
            await young.group_send("room", numbered(0))
            await heard.until(lambda: len(heard.delivered) == 1)


async def test_processes_without_members_are_spared_once_the_registry_is_whole_again(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("channel_layer.group_sender._DOUBT_S", 0.5)
    async with (
        linked(broker_server) as (_, heard, worker),
        started(broker_server.url, "interface", delivery=True) as (other, other_heard),
    ):
        worker.link_send(other.process_id, build_credit(1, 1, 0))
        with broker_server.client() as client:
            client.flushall()
        await worker.group_send("room", numbered(0))
        assert worker.statistics().group_sender.frame_count == 2  # nobody knows better
        await asyncio.sleep(0.6)
        await until(lambda: _is_registered(broker_server))
        await worker.group_send("room", numbered(1))
        assert worker.statistics().group_sender.frame_count == 3
        await heard.until(lambda: len(heard.delivered) == 2)
        assert other_heard.delivered == []


def _is_registered(server: BrokerServer) -> bool:
    with server.client() as client:
        return bool(client.zcard("trunkline:group:{room}"))


async def test_a_strangers_entry_in_the_registry_fails_one_call_and_holds_up_no_other(
    broker_server: BrokerServer,
) -> None:
    async with linked(broker_server) as (_, heard, worker):
        with broker_server.client() as client:
            client.zadd("trunkline:group:{broken}", {b"\xff\xfe": 1e15})
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(UnicodeDecodeError):
                await worker.group_send("broken", numbered(0))
            await worker.group_send("room", numbered(1))
        await heard.until(lambda: len(heard.delivered) == 1)
