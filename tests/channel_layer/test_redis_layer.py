"""The public RedisChannelLayer: the contract on both kinds of broker, its options, and the calls of any loop."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync

import channel_layer
from channel_layer.base import ChannelLayer
from channel_layer.encryption import Cipher
from channel_layer.errors import BrokerUnavailable, ChannelFull
from channel_layer.home import close_homes
from channel_layer.process_layer import RedisProcessLayer
from channel_layer.redis_layer import RedisChannelLayer
from tests.channel_layer.contract import ChannelLayerContract, HeldMessages, MakePeer
from tests.channel_layer.processes import PATIENCE_S, PATIENT, made_peers, started, until
from tests.servers import BrokerServer

HELLO = {"type": "hello"}


def statistics_of(layer: Any) -> Any:
    """Of the layer of a home, read without a turn of its loop, and again if its thread changes a part just then."""
    while True:
        try:
            return layer._home[1]._layer.statistics()
        except RuntimeError as error:
            if "during iteration" not in str(error):
                raise


def messages_of(layer: Any) -> int:
    return int(statistics_of(layer).local_channels.messages)


@pytest.fixture
def make_layer(any_broker_server: BrokerServer) -> Any:
    async def make(**options: Any) -> ChannelLayer:
        return RedisChannelLayer(hosts=[any_broker_server.url], **options)

    yield make
    close_homes()


@pytest.fixture
async def make_peer(any_broker_server: BrokerServer) -> AsyncIterator[MakePeer]:
    async with made_peers(lambda: RedisProcessLayer(any_broker_server.url)) as make:
        yield make


@pytest.fixture
def held_messages() -> HeldMessages:
    return messages_of


class TestContract(ChannelLayerContract):
    """C1-C22 through the background thread."""


# Options


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"hosts": "redis://h"}, TypeError, "hosts is a str, expected a list"),
        ({"hosts": ["http://h"]}, ValueError, "redis://, rediss:// or unix://"),
        ({"hosts": [{"host": "h", "colour": "red"}]}, ValueError, "colour"),
        ({"hosts": ["redis://a", "redis+cluster://b"]}, ValueError, "cannot be one of several"),
        ({"prefix": "a b"}, TypeError, "prefix 'a b'"),
        ({"symmetric_encryption_keys": "secret"}, ValueError, "encryption keys are a list"),
        ({"symmetric_encryption_keys": [7]}, TypeError, "an encryption key is a int"),
        ({"serializer_format": "pickle"}, ValueError, "expected one of msgpack, json"),
        ({"random_prefix_length": "12"}, TypeError, "random_prefix_length is '12'"),
        ({"on_disconnect": 7}, TypeError, "on_disconnect is 7, expected the type of a message"),
        ({"on_reconnect": ""}, TypeError, "on_reconnect is ''"),
        ({"connection_kwargs": {}}, TypeError, "put the options into the URL"),
        ({"colour": "red"}, TypeError, "no option 'colour'"),
        ({"group_expiry": 0}, ValueError, "group_expiry is 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_with_what_to_use(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        RedisChannelLayer(**options)


def test_the_options_of_channels_redis_are_accepted() -> None:
    layer = RedisChannelLayer(
        hosts=["redis://:secret@localhost"],
        prefix="asgi",
        expiry=10,
        group_expiry=100,
        capacity=7,
        channel_capacity={"http.*": 3},
        symmetric_encryption_keys=["new", b"old"],
        random_prefix_length=12,
        serializer_format="json",
        on_disconnect="broker.lost",
        on_reconnect="broker.back",
    )
    assert (layer.expiry, layer.group_expiry, layer.capacity, layer.get_capacity("http.x")) == (10, 100, 7, 3)
    assert repr(layer) == "<RedisChannelLayer redis://:***@localhost not connected>"


async def test_without_hosts_and_environment_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRUNKLINE_REDIS", raising=False)
    with pytest.raises(RuntimeError, match="TRUNKLINE_REDIS"):
        await RedisChannelLayer().send("x", HELLO)


async def test_a_broker_that_is_not_there_is_an_error_each_time(tmp_path: Path) -> None:
    layer = RedisChannelLayer(hosts=[f"unix://{tmp_path}/none.sock"])
    for _ in range(2):
        with pytest.raises(BrokerUnavailable):
            await layer.send("x", HELLO)
    close_homes()


# What is encrypted


async def test_layers_with_the_same_keys_read_each_other_and_others_do_not(broker_server: BrokerServer) -> None:
    hosts = [broker_server.url]
    new = RedisChannelLayer(hosts=hosts, symmetric_encryption_keys=["new", "old"])
    old = RedisChannelLayer(hosts=hosts, symmetric_encryption_keys=[b"old"])
    try:
        await old.send("x", HELLO)
        assert await new.receive("x") == HELLO
        await new.send("x", HELLO)
        with broker_server.client() as client:
            assert b"hello" not in client.lindex("trunkline:1:channel:{x}", 0)
        reading = asyncio.create_task(old.receive("x"))
        await until(lambda: statistics_of(old).undecryptable_count == 1)
        await old.send("x", HELLO)
        assert await reading == HELLO
    finally:
        close_homes()


async def test_keys_come_from_the_environment_unless_the_layer_has_its_own(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUNKLINE_ENCRYPTION_KEYS", "key")
    hosts = [broker_server.url]
    try:
        await RedisChannelLayer(hosts=hosts).send("x", HELLO)
        assert await RedisChannelLayer(hosts=hosts, symmetric_encryption_keys=["key"]).receive("x") == HELLO
        await RedisChannelLayer(hosts=hosts, symmetric_encryption_keys=[]).send("x", HELLO)
        with broker_server.client() as client:
            assert b"hello" in client.lindex("trunkline:1:channel:{x}", 0)
    finally:
        close_homes()


async def test_a_layer_with_keys_in_a_worker_without_is_an_error_and_sends_nothing(
    broker_server: BrokerServer,
) -> None:
    async with started(broker_server.url) as (worker, _):
        channel_layer.install_process_layer(worker)
        try:
            layer = RedisChannelLayer(symmetric_encryption_keys=["key"])
            for _ in range(2):
                with pytest.raises(ValueError, match="--encryption-keys"):
                    await layer.send("x", HELLO)
            with broker_server.client() as client:
                assert not client.exists("trunkline:1:channel:{x}")
        finally:
            channel_layer.install_process_layer(None)


@pytest.mark.parametrize("keys", [None, ["key"], ["another"], []])
async def test_in_a_worker_with_keys_the_workers_hold(
    broker_server: BrokerServer, keys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(broker_server.url, cipher=Cipher(["key"])) as (worker, _):
        channel_layer.install_process_layer(worker)
        try:
            layer = RedisChannelLayer(hosts=[broker_server.url], symmetric_encryption_keys=keys)
            await layer.send("x", HELLO)
            assert await layer.receive("x") == HELLO
            assert worker.statistics().normal_channels.taken_count == 1
            assert ("which hold" in caplog.text) == (keys in (["another"], []))
        finally:
            channel_layer.install_process_layer(None)


async def test_in_a_worker_capacities_that_are_given_hold_and_its_own_expiry(
    broker_server: BrokerServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(broker_server.url) as (worker, _):
        channel_layer.install_process_layer(worker)
        try:
            layer = RedisChannelLayer(capacity=2, channel_capacity={"large": 3}, expiry=3600)
            # A second one without is no reason to forget them.
            for each, name, capacity in ((layer, "small", 2), (layer, "large", 3), (RedisChannelLayer(), "other", 2)):
                for _ in range(capacity):
                    await each.send(name, HELLO)
                with pytest.raises(ChannelFull):
                    await each.send(name, HELLO)
            assert caplog.messages == ["expiry=3600 is not this worker's, 60 s, which holds"]
        finally:
            channel_layer.install_process_layer(None)


# Outages of the broker


async def test_consumers_are_told_when_the_broker_goes_and_when_it_is_back(broker_server: BrokerServer) -> None:
    layer = RedisChannelLayer(hosts=[broker_server.url], on_disconnect="broker.lost", on_reconnect="broker.back")
    silent = RedisChannelLayer(hosts=[broker_server.url])
    try:
        waiting, busy, unread = [await layer.new_channel() for _ in range(3)]
        other = await silent.new_channel()
        await layer.group_add("room", busy)
        reading = [asyncio.create_task(each.receive(name)) for each, name in ((layer, waiting), (silent, other))]
        await until(lambda: statistics_of(layer).local_channels.receivers == 1)
        broker_server.kill()
        assert await reading[0] == {"type": "broker.lost"}
        broker_server.start()
        await layer.group_send("nobody", HELLO)  # it returns behind the outage, while nobody waits at the channel
        assert await layer.receive(waiting) == {"type": "broker.back"}
        assert [(await layer.receive(busy))["type"] for _ in range(2)] == ["broker.lost", "broker.back"]
        await layer.send(unread, HELLO)  # nobody has read it before, and it was in no group
        assert await layer.receive(unread) == HELLO
        await silent.send(other, HELLO)
        assert await reading[1] == HELLO
    finally:
        close_homes()


async def test_consumers_in_a_worker_are_told_also_when_only_the_data_are_lost(broker_server: BrokerServer) -> None:
    async with started(broker_server.url) as (worker, _):
        channel_layer.install_process_layer(worker)
        try:
            layer = RedisChannelLayer(on_reconnect="broker.back")
            reading = asyncio.create_task(layer.receive(await layer.new_channel()))
            await until(lambda: worker.statistics().local_channels.receivers == 1)
            with broker_server.client() as client:
                client.flushall()
            assert await asyncio.wait_for(reading, PATIENCE_S) == {"type": "broker.back"}
        finally:
            channel_layer.install_process_layer(None)


# Which layer it is


async def test_the_environment_names_broker_and_prefix(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUNKLINE_REDIS", broker_server.url)
    monkeypatch.setenv("TRUNKLINE_PREFIX", "here")
    await RedisChannelLayer().send("x", HELLO)
    with broker_server.client() as client:
        assert client.llen("here:1:channel:{x}") == 1
    assert await RedisChannelLayer(hosts=[broker_server.url], prefix="here").receive("x") == HELLO
    close_homes()


async def test_inside_a_worker_it_is_the_workers_own_layer(
    broker_server: BrokerServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(broker_server.url) as (worker, _):
        channel_layer.install_process_layer(worker)
        try:
            for layer in (RedisChannelLayer(), RedisChannelLayer(hosts=[broker_server.url])):
                channel = await layer.new_channel()
                assert f".{worker.process_id}!" in channel
                await asyncio.to_thread(lambda layer=layer, channel=channel: asyncio.run(layer.send(channel, HELLO)))
                assert await layer.receive(channel) == HELLO
            spelled_differently = RedisChannelLayer(hosts=[{"path": broker_server.url.removeprefix("unix://")}])
            assert f".{worker.process_id}!" in await spelled_differently.new_channel()
            assert not caplog.messages
            elsewhere = RedisChannelLayer(hosts=[broker_server.url], prefix="other")
            for _ in range(2):
                assert f".{worker.process_id}!" not in await elsewhere.new_channel()
            (warning,) = caplog.messages
            assert "prefix other, is not this worker's own" in warning
        finally:
            channel_layer.install_process_layer(None)
            close_homes()


async def test_layers_with_equal_options_share_one_thread_and_inbox(broker_server: BrokerServer) -> None:
    one, two = RedisChannelLayer(hosts=[broker_server.url]), RedisChannelLayer(hosts=[broker_server.url])
    assert (await one.statistics()).process_id == (await two.statistics()).process_id
    other = RedisChannelLayer(hosts=[broker_server.url], capacity=7)
    assert (await other.statistics()).process_id != (await one.statistics()).process_id
    close_homes()


# A process that only sends needs no inbox


@pytest.mark.usefixtures("patient_ends")
async def test_a_process_that_only_sends_has_no_inbox_and_no_lease(broker_server: BrokerServer) -> None:
    layer = RedisChannelLayer(hosts=[broker_server.url])
    await layer.send("x", HELLO)
    await layer.group_send("room", HELLO)
    with broker_server.client() as client:
        assert client.keys("*lease*") == []
    await layer.new_channel()
    await until(lambda: bool(_leases(broker_server)))
    close_homes()
    assert _leases(broker_server) == []


def _leases(server: BrokerServer) -> list[bytes]:
    with server.client() as client:
        return list(client.keys("*lease*"))


# Synchronous callers


def test_async_to_sync_from_many_threads_for_long_leaks_nothing(broker_server: BrokerServer) -> None:
    layer = RedisChannelLayer(hosts=[broker_server.url], capacity=100_000)
    channel = async_to_sync(layer.new_channel)()
    async_to_sync(layer.group_add)("room", channel)

    def view(number: int) -> None:
        async_to_sync(layer.group_send)("room", {"type": "x", "number": number})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(view, range(400)))
    numbers = [async_to_sync(layer.receive)(channel)["number"] for _ in range(100)]
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for number in range(200):
        view(number)
    # Far less than one a call; the thread of the last call may still be ending.
    assert len(os.listdir("/proc/self/fd")) < descriptors + 10
    assert threading.active_count() < threads + 10
    numbers += [async_to_sync(layer.receive)(channel)["number"] for _ in range(300)]
    assert sorted(numbers) == list(range(400))
    close_homes()


def run_script(text: str, server: BrokerServer) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PATIENT + text, server.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "TRUNKLINE_REDIS": server.url},
    )


SCRIPT_THAT_EXITS = """
import sys, asyncio, logging
logging.getLogger("asyncio").setLevel(logging.ERROR)  # -X dev warns of calls that took 0.1 s, which any may
from asgiref.sync import async_to_sync
from channel_layer import get_channel_layer
layer = get_channel_layer()
channel = async_to_sync(layer.new_channel)()
async_to_sync(layer.group_add)("room", channel)
async_to_sync(layer.group_send)("room", {"type": "x"})
print(async_to_sync(layer.receive)(channel))

async def main():
    reading = asyncio.ensure_future(layer.receive("never"))
    await asyncio.sleep(0.2)
    reading.cancel()
    print(await layer.new_channel() != channel)

asyncio.run(main())
"""


def test_a_script_exits_at_once_without_a_word_and_leaves_nothing(broker_server: BrokerServer) -> None:
    done = run_script(SCRIPT_THAT_EXITS, broker_server)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{'type': 'x'}\nTrue\n", "")
    with broker_server.client() as client:
        assert client.keys("*") == [b"trunkline:generation"]


SCRIPT_THAT_FORKS = """
import os, sys, threading
from asgiref.sync import async_to_sync
from channel_layer import RedisChannelLayer
layer = RedisChannelLayer()
mine = async_to_sync(layer.new_channel)()
async_to_sync(layer.group_add)("room", mine)
read, write = os.pipe()
child = os.fork()
if child == 0:
    own = async_to_sync(layer.new_channel)()
    assert own.split("!")[0] != mine.split("!")[0], "the child has its parent's id"
    async_to_sync(layer.group_add)("room", own)
    async_to_sync(layer.send)(mine, {"type": "from the child"})
    os.write(write, b"x")
    print(async_to_sync(layer.receive)(own), flush=True)
    sys.exit(0)
os.read(read, 1)
print(async_to_sync(layer.receive)(mine), flush=True)
async_to_sync(layer.group_send)("room", {"type": "to both"})
os.waitpid(child, 0)
print(async_to_sync(layer.receive)(mine), flush=True)
"""


def test_a_fork_has_an_id_and_an_inbox_of_its_own(broker_server: BrokerServer) -> None:
    done = run_script(SCRIPT_THAT_FORKS, broker_server)
    assert done.stdout == "{'type': 'from the child'}\n{'type': 'to both'}\n{'type': 'to both'}\n", done.stderr
    assert done.returncode == 0
    with broker_server.client() as client:
        assert client.keys("*") == [b"trunkline:generation"]


async def test_close_and_close_pools_change_nothing(broker_server: BrokerServer) -> None:
    layer = RedisChannelLayer(hosts=[broker_server.url])
    await layer.send("x", HELLO)
    await layer.close()
    await layer.close_pools()
    assert await layer.receive("x") == HELLO
    close_homes()
    # Also after the homes were closed, a call begins anew.
    await layer.send("x", HELLO)
    assert await layer.receive("x") == HELLO
    close_homes()


def test_a_receive_is_ended_when_the_layer_is_closed(broker_server: BrokerServer) -> None:
    layer = RedisChannelLayer(hosts=[broker_server.url])

    async def read(channel: str) -> str:
        try:
            await layer.receive(channel)
        except BrokerUnavailable as error:
            return str(error)
        return "received"

    with ThreadPoolExecutor(2) as pool:
        channel = async_to_sync(layer.new_channel)()
        calls = [pool.submit(asyncio.run, read(name)) for name in (channel, "normal")]
        async_to_sync(layer.group_send)("room", HELLO)
        while sum(messages_waiting(layer)) < 2:
            time.sleep(0.01)
        close_homes()
        assert ["closed" in call.result(10) for call in calls] == [True, True]


def messages_waiting(layer: Any) -> tuple[int, int]:
    statistics = statistics_of(layer)
    return statistics.local_channels.receivers, statistics.normal_channels.waiting
