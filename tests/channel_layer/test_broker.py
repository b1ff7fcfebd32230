"""The broker client against real servers: pipelining, outages, and what it tells about them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import logging
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop

from channel_layer import blocking_reader, broker_connection, broker_shard, scripts
from channel_layer.broker import BlockingReader, Broker, BrokerChange, BrokerState
from channel_layer.broker_url import parse_broker_url
from channel_layer.errors import BrokerError, BrokerUnavailable, BrokerUnsuitable
from tests.proxies import BrokerProxy
from tests.servers import BrokerServer, free_port

LOST = BrokerChange(reachable=False, data_lost=False)
RESTORED = BrokerChange(reachable=True, data_lost=False)
RESTORED_EMPTY = BrokerChange(reachable=True, data_lost=True)


@pytest.fixture(autouse=True)
def long_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A blocking read does not end by itself while a test is kept from what it does next."""
    monkeypatch.setattr(blocking_reader, "BLOCK_S", 30.0)


def on_both_loops(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test on asyncio's own loop and on uvloop, which differ in when timers and sockets come."""

    @functools.wraps(test)
    def run(loop_factory: Callable[[], asyncio.AbstractEventLoop], **fixtures: Any) -> None:
        async def main() -> None:
            await test(**fixtures)

        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(main())

    del run.__wrapped__  # or pytest takes it for a coroutine function
    signature = inspect.signature(test)
    loop_parameter = inspect.Parameter("loop_factory", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), loop_parameter]
    )
    loops = [asyncio.new_event_loop, uvloop.new_event_loop]
    both: Callable[..., None] = pytest.mark.parametrize("loop_factory", loops, ids=["asyncio", "uvloop"])(run)
    return both


class Changes:
    """What the broker tells its listeners, to be waited for."""

    def __init__(self, broker: Broker) -> None:
        self.seen: list[BrokerChange] = []
        self._event = asyncio.Event()
        broker.subscribe(self._on_change)

    def _on_change(self, change: BrokerChange) -> None:
        self.seen.append(change)
        self._event.set()

    async def wait(self, count: int, timeout_s: float = 15.0) -> list[BrokerChange]:
        async with asyncio.timeout(timeout_s):
            while len(self.seen) < count:
                self._event.clear()
                await self._event.wait()
        return self.seen


@contextlib.asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[Broker]:
    broker = Broker(url, client_name="test", **options)
    await broker.connect()
    try:
        yield broker
    finally:
        await broker.close()


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Wait for something only the server can tell, which has no event: ask it again and again."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it is another process that changes
            await asyncio.sleep(0.005)


def generation_of(broker: Broker) -> bytes | None:
    lineage = broker.shards[0]._lineage
    return None if lineage is None else lineage.generation


async def until_blocked(server: BrokerServer, count: int = 1) -> None:
    with server.client() as client:
        await until(lambda: client.info("clients")["blocked_clients"] == count)


async def open_and_connect(broker: Broker) -> BlockingReader:
    """A reader that has connected, which the first pop() does."""
    reader = broker.open_reader()
    await broker.call("RPUSH", "connect", "x")
    assert await reader.pop(["connect"], 1) == ("connect", [b"x"])
    return reader


async def kill_and_start(server: BrokerServer, changes: Changes) -> None:
    seen_count = len(changes.seen)
    server.kill()
    await changes.wait(seen_count + 1)
    server.start()
    await changes.wait(seen_count + 2)


# Commands


@on_both_loops
async def test_answers_come_in_the_order_of_the_calls_and_leave_in_one_write(any_broker_server: BrokerServer) -> None:
    async with connected(any_broker_server.url) as broker:
        connection = broker.shards[0].connection
        assert connection is not None
        writes: list[bytes] = []
        transport = connection._transport
        assert transport is not None

        class Recorder:
            def write(self, data: bytes) -> None:
                writes.append(data)
                assert transport is not None
                transport.write(data)

            def abort(self) -> None:
                assert transport is not None
                transport.abort()

        connection._transport = Recorder()  # type: ignore[assignment]
        answers = await asyncio.gather(*(broker.call("RPUSH", "list", f"{i}") for i in range(2000)))
        assert answers == list(range(1, 2001))
        assert len(writes) == 1
        assert await broker.call("LRANGE", "list", 0, 2) == [b"0", b"1", b"2"]


async def test_strings_stay_bytes_and_nil_and_nested_answers_keep_their_shape(
    any_broker_server: BrokerServer,
) -> None:
    async with connected(any_broker_server.url) as broker:
        value = bytes(range(256)) + "ä\r\n".encode()
        assert await broker.call("SET", "key", value) == b"OK"
        assert await broker.call("GET", b"key") == value
        assert await broker.call("GET", "missing") is None
        assert await broker.call("MGET", "key", "missing") == [value, None]
        assert await broker.call("EVAL", "return {1, {'a', {}}}", 0) == [1, [b"a", []]]


async def test_an_error_answer_belongs_to_its_command_only(any_broker_server: BrokerServer) -> None:
    async with connected(any_broker_server.url) as broker:
        before = broker.call("SET", "key", "text")
        wrong = broker.call("RPUSH", "key", "x")
        after = broker.call("GET", "key")
        assert await before == b"OK"
        with pytest.raises(BrokerError, match=r"^WRONGTYPE"):
            await wrong
        assert await after == b"text"
        assert broker.reachable


@on_both_loops
async def test_cancelled_calls_do_not_shift_the_answers(broker_server: BrokerServer) -> None:
    async with connected(broker_server.url) as broker:
        calls = [broker.call("ECHO", f"{i}") for i in range(300)]
        for call in calls[::3]:
            call.cancel()
        await asyncio.sleep(0)
        for call in calls[1::3]:
            call.cancel()
        for i, call in list(enumerate(calls))[2::3]:
            assert await call == b"%d" % i
        cancelled_script = broker.script(scripts.PUSH, ["list"], [-1, 1000, b"x"])
        cancelled_script.cancel()
        cancelled_transaction = broker.transaction(("ECHO", "1"), ("ECHO", "2"))
        cancelled_transaction.cancel()
        assert await broker.call("ECHO", "last") == b"last"


async def test_a_transaction_answers_with_a_list(any_broker_server: BrokerServer) -> None:
    async with connected(any_broker_server.url) as broker:
        first, second = await asyncio.gather(
            broker.transaction(("RPUSH", "list", b"x"), ("PEXPIRE", "list", 60_000)), broker.call("LLEN", "list")
        )
        assert first == [1, 1]
        assert second == 1
        assert await broker.transaction() == []


async def test_a_transaction_that_is_refused_says_why(any_broker_server: BrokerServer) -> None:
    async with connected(any_broker_server.url) as broker:
        await broker.call("SET", "text", "x")
        with pytest.raises(BrokerError, match=r"wrong number of arguments"):
            await broker.transaction(("SET", "a", "1"), ("SET", "a"), ("SET", "b", "1"))
        assert await broker.call("EXISTS", "a", "b") == 0
        with pytest.raises(BrokerError, match=r"^WRONGTYPE"):
            await broker.transaction(("SET", "a", "1"), ("RPUSH", "text", "x"), ("SET", "b", "1"))
        assert await broker.call("EXISTS", "a", "b") == 2
        assert await broker.call("ECHO", "in step") == b"in step"


async def test_a_script_that_the_broker_forgot_runs_once(any_broker_server: BrokerServer) -> None:
    async with connected(any_broker_server.url) as broker:
        await broker.call("SCRIPT", "FLUSH")
        calls = [broker.script(scripts.PUSH, ["list"], [-1, 60_000, b"%d" % i]) for i in range(50)]
        assert [(await call)[0] for call in calls] == [1] * 50
        elements = await broker.call("LRANGE", "list", 0, -1)
        assert [element[8:] for element in elements] == [b"%d" % i for i in range(50)]
        assert broker.statistics().noscript_count >= 1
        noscript_count = broker.statistics().noscript_count
        await broker.script(scripts.PUSH, ["list"], [-1, 60_000, b"again"])
        assert broker.statistics().noscript_count == noscript_count


async def test_too_many_unanswered_commands_fail_and_are_not_sent(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_connection, "UNANSWERED_COMMANDS_MAX", 10)
    async with connected(broker_server.url) as broker:
        calls = [broker.call("INCR", "key") for _ in range(12)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert results[:10] == list(range(1, 11))
        for error in results[10:]:
            assert isinstance(error, BrokerUnavailable)
            assert "overloaded" in str(error)
        assert await broker.call("GET", "key") == b"10"
        assert broker.statistics().overloaded_count == 2


@on_both_loops
async def test_a_broker_that_does_not_read_costs_a_bounded_buffer(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_connection, "UNWRITTEN_BYTES_MAX", 1_000_000)
    async with connected(broker_server.url) as broker:
        broker_server.pause()
        sent = []
        refused_count = 0
        while not refused_count:
            call = broker.call("SET", "key", b"x" * 100_000)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if call.done():
                assert "overloaded" in str(call.exception())
                refused_count += 1
            else:
                sent.append(call)
            assert len(sent) < 50
        broker_server.resume()
        assert await asyncio.gather(*sent) == [b"OK"] * len(sent)
        assert await broker.call("STRLEN", "key") == 100_000


async def test_call_before_connect_is_a_mistake() -> None:
    broker = Broker("redis://127.0.0.1", client_name="test")
    with pytest.raises(RuntimeError, match="connect"):
        broker.call("PING")


# Outages


@on_both_loops
async def test_a_killed_broker_fails_what_is_unanswered_and_repeats_nothing(any_broker_server: BrokerServer) -> None:
    async with connected(any_broker_server.url) as broker:
        changes = Changes(broker)
        any_broker_server.pause()
        calls = [broker.call("RPUSH", "list", f"{i}") for i in range(100)]
        script = broker.script(scripts.PUSH, ["list"], [-1, 1000, b"x"])
        transaction = broker.transaction(("RPUSH", "list", "t"))
        await asyncio.sleep(0.01)  # now they are in the socket
        any_broker_server.kill()
        for result in await asyncio.gather(*calls, script, transaction, return_exceptions=True):
            assert isinstance(result, BrokerUnavailable)
        assert changes.seen == [LOST]
        assert not broker.reachable
        with pytest.raises(ConnectionError):
            await broker.call("PING")
        any_broker_server.start()
        await changes.wait(2)
        assert changes.seen == [LOST, RESTORED_EMPTY]
        assert await broker.call("EXISTS", "list") == 0
        assert (await broker.script(scripts.PUSH, ["list"], [-1, 1000, b"x"]))[0] == 1


async def test_a_written_push_is_never_written_again_when_its_answer_is_lost(broker_server: BrokerServer) -> None:
    async with BrokerProxy(broker_server.socket_path) as proxy, connected(proxy.url) as broker:
        changes = Changes(broker)
        proxy.is_deaf = True
        call = broker.call("RPUSH", "list", "once")
        with broker_server.client() as client:
            await until(lambda: client.llen("list"))
            proxy.abandon_clients()
            proxy.is_deaf = False
            with pytest.raises(BrokerUnavailable):
                await call
            await changes.wait(2)
            assert changes.seen == [LOST, RESTORED]  # the same server with its data
            await broker.call("PING")
            assert client.lrange("list", 0, -1) == [b"once"]


async def test_a_client_kill_is_an_outage_without_lost_data(any_broker_server: BrokerServer) -> None:
    async with connected(any_broker_server.url) as broker:
        changes = Changes(broker)
        await broker.call("SET", "key", "kept")
        with any_broker_server.client() as client:
            client.client_kill_filter(skipme=True)
        await changes.wait(2)
        assert changes.seen == [LOST, RESTORED]
        assert await broker.call("GET", "key") == b"kept"


@on_both_loops
async def test_a_frozen_broker_is_given_up_after_the_socket_timeout(broker_server: BrokerServer) -> None:
    async with connected(f"{broker_server.url}?socket_timeout=3&socket_connect_timeout=30") as broker:
        changes = Changes(broker)
        broker_server.pause()
        started = time.monotonic()
        call = broker.call("PING")
        with pytest.raises(BrokerUnavailable, match=r"did not answer for 3 s"):
            await call
        assert 3 <= time.monotonic() - started < 13
        broker_server.resume()
        await changes.wait(2)
        assert changes.seen == [LOST, RESTORED]
        assert await broker.call("PING") == b"PONG"


@on_both_loops
async def test_an_idle_connection_notices_a_frozen_broker_by_the_heartbeat(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("channel_layer.broker_shard.HEARTBEAT_S", 0.2)
    async with connected(f"{broker_server.url}?socket_timeout=3") as broker:
        changes = Changes(broker)
        broker_server.pause()
        await changes.wait(1)
        assert changes.seen == [LOST]
        broker_server.resume()
        await changes.wait(2)


@on_both_loops
async def test_a_loop_that_the_application_blocks_is_not_taken_for_a_silent_broker(
    broker_server: BrokerServer,
) -> None:
    async with connected(f"{broker_server.url}?socket_timeout=3") as broker:
        changes = Changes(broker)
        for is_written in (True, False):
            call = broker.call("PING")
            if is_written:
                await asyncio.sleep(0)
            time.sleep(3.2)  # noqa: ASYNC251 - this is the application that blocks the loop
            assert await call == b"PONG"
        assert changes.seen == []


@on_both_loops
async def test_a_slow_broker_that_goes_on_answering_is_not_given_up(broker_server: BrokerServer) -> None:
    async with connected(f"{broker_server.url}?socket_timeout=4") as broker:
        answers = [broker.call("BLPOP", "none", "1") for _ in range(5)]  # each answered 1 s after the one before
        assert await asyncio.gather(*answers) == [None] * 5
        assert broker.statistics().connect_count == 1


async def test_idle_for_longer_than_the_socket_timeout_is_not_an_outage(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("channel_layer.broker_shard.HEARTBEAT_S", 60)
    async with connected(f"{broker_server.url}?socket_timeout=3") as broker:
        changes = Changes(broker)
        await broker.call("PING")
        with pytest.raises(TimeoutError):
            await changes.wait(1, timeout_s=3.5)
        assert await broker.call("PING") == b"PONG"


async def test_reconnecting_goes_on_and_waits_a_second_at_most(broker_server: BrokerServer) -> None:
    async with connected(broker_server.url) as broker:
        changes = Changes(broker)
        broker_server.kill()
        await changes.wait(1)
        with pytest.raises(BrokerUnavailable, match="not reachable"):
            await broker.wait_reachable(2.5)
        broker_server.start()
        started = time.monotonic()
        await broker.wait_reachable(10)
        assert time.monotonic() - started < 5
        assert changes.seen == [LOST, RESTORED_EMPTY]


async def test_flushall_is_noticed_within_3_s_and_by_every_process(any_broker_server: BrokerServer) -> None:
    assert broker_shard.HEARTBEAT_S < 3  # by which it is noticed; the machine may take longer
    async with connected(any_broker_server.url) as one, connected(any_broker_server.url) as other:
        changes = Changes(one), Changes(other)
        generation = await one.call("GET", "trunkline:generation")
        await one.call("FLUSHALL")
        for each in changes:
            await each.wait(1)
            assert each.seen == [RESTORED_EMPTY]
        await until(lambda: generation_of(one) is not None and generation_of(one) == generation_of(other))
        new_generation = await one.call("GET", "trunkline:generation")
        assert new_generation not in (None, generation)
        one.shards[0]._beat()
        await one.call("PING")
        await one.call("PING")
        assert changes[0].seen == [RESTORED_EMPTY]  # told once


async def test_flushall_during_an_outage_is_noticed(broker_server: BrokerServer) -> None:
    async with BrokerProxy(broker_server.socket_path) as proxy, connected(proxy.url) as broker:
        changes = Changes(broker)
        with broker_server.client() as client:
            client.flushall()
        proxy.abandon_clients()
        await changes.wait(2)
        assert changes.seen == [LOST, RESTORED_EMPTY]


async def test_generation_keys_of_two_deployments_are_apart(broker_server: BrokerServer) -> None:
    async with connected(broker_server.url, generation_key="other:generation") as broker:
        assert await broker.call("EXISTS", "other:generation") == 1
        assert await broker.call("EXISTS", "trunkline:generation") == 0


@on_both_loops
async def test_a_broker_that_became_a_replica_is_left_until_it_is_master_again(broker_server: BrokerServer) -> None:
    async with connected(broker_server.url) as broker:
        changes = Changes(broker)
        reader = broker.open_reader()
        pop = asyncio.ensure_future(reader.pop(["list"], 1))
        with broker_server.client() as client:
            await until_blocked(broker_server)
            client.execute_command("REPLICAOF", "127.0.0.1", free_port())
            with pytest.raises(BrokerUnavailable, match="UNBLOCKED"):
                await pop
            with pytest.raises(BrokerUnavailable, match="READONLY"):
                await broker.call("SET", "key", "x")
            await changes.wait(1)
            with pytest.raises(BrokerUnavailable, match="replica"):
                await broker.wait_reachable(0.5)
            client.execute_command("REPLICAOF", "NO", "ONE")
        await changes.wait(2)
        # Another master_replid: what was written between may be gone.
        assert changes.seen == [LOST, RESTORED_EMPTY]
        await broker.call("RPUSH", "list", "x")
        assert await reader.pop(["list"], 1) == ("list", [b"x"])


async def test_close_fails_what_is_unanswered_and_who_waits(broker_server: BrokerServer) -> None:
    broker = Broker(broker_server.url, client_name="test")
    await broker.connect()
    broker_server.pause()
    call = broker.call("PING")
    await broker.close()
    with pytest.raises(BrokerUnavailable, match="closed"):
        await call
    with pytest.raises(BrokerUnavailable, match="closed"):
        await broker.call("PING")
    with pytest.raises(BrokerUnavailable, match="closed"):
        await broker.wait_reachable(10)
    await broker.close()
    assert broker.statistics().state is BrokerState.CLOSED


async def test_close_during_an_outage_ends_the_reconnecting(broker_server: BrokerServer) -> None:
    async with connected(broker_server.url) as broker:
        changes = Changes(broker)
        broker_server.kill()
        await changes.wait(1)
        waiting = asyncio.ensure_future(broker.wait_reachable(30))
        await asyncio.sleep(0)
        await broker.close()
        with pytest.raises(BrokerUnavailable):
            await waiting
        assert changes.seen == [LOST]


async def test_an_outage_is_logged_once(broker_server: BrokerServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trunkline.channel_layer")
    async with connected(broker_server.url) as broker:
        changes = Changes(broker)
        broker_server.kill()
        await changes.wait(1)
        with pytest.raises(BrokerUnavailable):
            await broker.wait_reachable(0.5)
        broker_server.start()
        await changes.wait(2)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "reachable again, without its data" in caplog.records[1].getMessage()


# Connecting


async def test_nobody_listens() -> None:
    broker = Broker(f"redis://:pa55@127.0.0.1:{free_port()}", client_name="test")
    with pytest.raises(BrokerUnavailable, match=r"redis://:\*\*\*@127.0.0.1:\d+ is not reachable") as caught:
        await broker.connect()
    assert "pa55" not in str(caught.value)
    assert broker.statistics().state is BrokerState.IDLE


async def test_no_such_socket_and_no_such_host(broker_server: BrokerServer) -> None:
    with pytest.raises(BrokerUnavailable, match="not reachable"):
        await Broker(f"unix://{broker_server.directory}/none.sock", client_name="test").connect()
    with pytest.raises(BrokerUnavailable, match="not reachable"):
        # The resolver may take its time, and then says so.
        await Broker("redis://no-such-host.invalid?socket_connect_timeout=60", client_name="test").connect()


async def test_connect_may_be_tried_again(broker_server: BrokerServer) -> None:
    broker_server.kill()
    broker = Broker(broker_server.url, client_name="test")
    with pytest.raises(BrokerUnavailable):
        await broker.connect()
    broker_server.start()
    await broker.connect()
    assert await broker.call("PING") == b"PONG"
    with pytest.raises(RuntimeError):
        await broker.connect()
    await broker.close()


async def test_connect_may_be_tried_again_after_a_loss_at_its_last_instant(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker(broker_server.url, client_name="test")
    open_connection = broker.shards[0]._open

    async def open_and_lose() -> Any:
        connection, lineage = await open_connection()
        connection.give_up("lost at the last instant")
        return connection, lineage

    monkeypatch.setattr(broker.shards[0], "_open", open_and_lose)
    with pytest.raises(BrokerUnavailable, match="last instant"):
        await broker.connect()
    monkeypatch.undo()
    await broker.connect()
    assert await broker.call("PING") == b"PONG"
    await broker.close()


async def test_close_while_connecting_ends_the_connecting(broker_server: BrokerServer) -> None:
    broker_server.pause()
    broker = Broker(broker_server.url, client_name="test")
    connecting = asyncio.ensure_future(broker.connect())
    await asyncio.sleep(0.01)
    await broker.close()
    broker_server.resume()
    with pytest.raises(BrokerUnavailable, match="closed"):
        await connecting
    assert broker.statistics().state is BrokerState.CLOSED
    with broker_server.client() as client:
        await until(lambda: len(client.client_list()) == 1)


@on_both_loops
async def test_a_frozen_broker_does_not_hold_connect_longer_than_its_timeout(broker_server: BrokerServer) -> None:
    broker_server.pause()
    broker = Broker(f"{broker_server.url}?socket_connect_timeout=0.3", client_name="test")
    with pytest.raises(BrokerUnavailable, match=r"did not answer within 0.3 s"):
        await broker.connect()
    broker_server.resume()


async def test_password_and_database(valkey_program: str, redis_program: str) -> None:
    for program in (valkey_program, redis_program):
        with BrokerServer(program, tcp=True, password="geheim/@:") as server:
            url = f"redis://:geheim%2F%40%3A@127.0.0.1:{server.port}"
            async with connected(f"{url}/3") as broker, connected(f"{url}?db=0") as other:
                await broker.call("SET", "key", "3")
                assert await other.call("GET", "key") is None
                reader = broker.open_reader()
                await broker.call("RPUSH", "list", "x")
                assert await reader.pop(["list"], 1) == ("list", [b"x"])
            for wrong in (f"redis://:wrong@127.0.0.1:{server.port}", f"redis://127.0.0.1:{server.port}"):
                with pytest.raises(BrokerUnsuitable, match=r"password|INFO") as caught:
                    await Broker(wrong, client_name="test").connect()
                assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
            with pytest.raises(BrokerUnsuitable, match="database 77"):
                await Broker(f"{url}/77", client_name="test").connect()


async def test_an_acl_user_with_few_rights(any_broker_server: BrokerServer) -> None:
    rights = (
        "+info +client|id +client|setname +client|kill +client|unblock +script|load +evalsha +eval +time "
        "+get +set +del +rpush +lpush +llen +lrange +lpop +blmpop +pexpire +pttl +multi +exec"
    )
    with any_broker_server.client() as client:
        client.execute_command("ACL", "SETUSER", "few", "on", ">pw", "~*", *rights.split())
        client.execute_command("ACL", "SETUSER", "fewer", "on", ">pw", "~*", "+info", "+get")
    path = any_broker_server.socket_path
    async with connected(f"unix://few:pw@{path}") as broker:
        assert (await broker.script(scripts.PUSH, ["list"], [5, 1000, b"x"]))[0] == 1
        reader = broker.open_reader()
        popped = await reader.pop(["list"], 1)
        assert popped is not None
        pop = asyncio.ensure_future(reader.pop(["list"], 1))
        await until_blocked(any_broker_server)
        pop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pop
        with pytest.raises(BrokerError, match="NOPERM"):
            await broker.call("FLUSHALL")
    with pytest.raises(BrokerUnsuitable, match="NOPERM"):
        await Broker(f"unix://fewer:pw@{path}", client_name="test").connect()


async def test_an_evicting_policy_is_refused_with_what_to_change(any_broker_server: BrokerServer) -> None:
    with any_broker_server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(BrokerUnsuitable, match=r"allkeys-lru.*noeviction"):
            await Broker(any_broker_server.url, client_name="test").connect()
        assert client.keys("*") == []  # and nothing was written


async def test_a_policy_that_changed_during_an_outage_keeps_the_broker_away(
    broker_server: BrokerServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(broker_server.url) as broker:
        changes = Changes(broker)
        with broker_server.client() as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
            client.client_kill_filter(skipme=True)
        await changes.wait(1)
        await until(lambda: "ERROR" in [record.levelname for record in caplog.records])
        with pytest.raises(BrokerUnavailable, match="noeviction"):
            await broker.wait_reachable(1.0)
        assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
        with broker_server.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
        await changes.wait(2)


async def test_a_full_broker_can_be_connected_to_and_read(broker_server: BrokerServer) -> None:
    with broker_server.client() as client:
        client.rpush("list", "x")
        client.config_set("maxmemory", 1)
    async with connected(broker_server.url) as broker:
        with pytest.raises(BrokerError, match=r"^OOM"):
            await broker.call("SET", "key", "x")
        reader = broker.open_reader()
        assert await reader.pop(["list"], 1) == ("list", [b"x"])
        changes = Changes(broker)
        await broker.call("CONFIG", "SET", "maxmemory", 0)
        broker.shards[0]._beat()
        await until(lambda: generation_of(broker))
        assert changes.seen == []


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ("redis_version:6.2.14", "Redis 6.2.14.*7.0"),
        ("redis_version:unstable", "7.0"),
        ("redis_version:7.2.4\r\nredis_mode:cluster", "cluster"),
        ("redis_version:7.2.4\r\nredis_mode:sentinel", "sentinel"),
    ],
)
async def test_old_versions_and_other_modes_are_refused(info: str, expected: str) -> None:
    """No real server of these kinds is at hand; what answers here is INFO and nothing else."""
    body = f"# Server\r\n{info}\r\nrun_id:abc\r\n".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"SETNAME")
        writer.write(b"$%d\r\n%s\r\n:7\r\n+OK\r\n" % (len(body), body))
        await reader.read()
        writer.close()

    port = free_port()
    async with await asyncio.start_server(answer, "127.0.0.1", port):
        with pytest.raises(BrokerUnsuitable, match=expected):
            await Broker(f"redis://127.0.0.1:{port}", client_name="test").connect()


@pytest.mark.parametrize("hello", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x46", b""])
async def test_what_is_not_a_broker_is_said_to_be_none(hello: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"SETNAME")
        writer.write(hello)
        writer.close()

    port = free_port()
    async with await asyncio.start_server(answer, "127.0.0.1", port):
        with pytest.raises(BrokerUnavailable, match=r"not a broker|was lost"):
            await Broker(f"redis://127.0.0.1:{port}", client_name="test").connect()


async def test_too_many_clients_is_unavailable(broker_server: BrokerServer) -> None:
    with broker_server.client() as client:
        client.config_set("maxclients", 1)
        with pytest.raises(BrokerUnavailable, match=r"max number of clients|was lost"):
            await Broker(broker_server.url, client_name="test").connect()


async def test_a_loading_broker_is_waited_for() -> None:
    """LOADING cannot be held open on a real, empty server: the first connection is told so, the second is not."""
    connection_count = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connection_count
        connection_count += 1
        await reader.readuntil(b"SETNAME")
        if connection_count == 1:
            writer.write(b"-LOADING Redis is loading the dataset in memory\r\n" * 3)
        else:
            body = b"redis_version:6.0.0"
            writer.write(b"$%d\r\n%s\r\n:7\r\n+OK\r\n" % (len(body), body))
        await reader.read()
        writer.close()

    port = free_port()
    async with await asyncio.start_server(answer, "127.0.0.1", port):
        with pytest.raises(BrokerUnsuitable, match=r"6\.0\.0"):
            await Broker(f"redis://127.0.0.1:{port}", client_name="test").connect()
    assert connection_count == 2


async def test_client_names_show_in_client_list_and_are_checked(broker_server: BrokerServer) -> None:
    with pytest.raises(ValueError, match="client name"):
        Broker(broker_server.url, client_name="two words")
    async with connected(broker_server.url) as broker:
        reader = broker.open_reader()
        pop = asyncio.ensure_future(reader.pop(["list"], 1))
        await until_blocked(broker_server)
        with broker_server.client() as client:
            assert {"test", "test:reader"} <= {entry["name"] for entry in client.client_list()}
        pop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pop


# The broker's clock


async def test_time_ms_is_the_brokers_clock(broker_server: BrokerServer) -> None:
    began = time.monotonic()
    async with connected(broker_server.url) as broker:
        # The estimate is as good as the way to the broker was quick.
        slack_ms = (time.monotonic() - began) * 1000 + 100
        asked_ms = broker.time_ms("any")
        seconds, microseconds = await broker.call("TIME")
        broker_ms = int(seconds) * 1000 + int(microseconds) / 1000
        assert asked_ms - slack_ms <= broker_ms <= broker.time_ms("any") + slack_ms


async def test_a_late_answer_to_time_does_not_spoil_the_estimate(broker_server: BrokerServer) -> None:
    async with connected(broker_server.url) as broker:
        offset_ms = broker.shards[0]._clock_offset_ms
        # Asked 10 s ago, answered by the broker at once, read only now, because the loop was blocked.
        now = time.monotonic()
        broker_ms = int((now - 10) * 1000 + offset_ms)
        broker.shards[0]._read_clock(
            (b"%d" % (broker_ms // 1000), b"%d" % (broker_ms % 1000 * 1000)), now - 10, is_first=False
        )
        assert broker.shards[0]._clock_offset_ms == pytest.approx(offset_ms, abs=5)
        # The broker's clock was set back by an hour: an answer read at once says so.
        broker_ms = int(now * 1000 + offset_ms) - 3_600_000
        broker.shards[0]._read_clock((b"%d" % (broker_ms // 1000), b"0"), now, is_first=False)
        assert broker.shards[0]._clock_offset_ms == pytest.approx(offset_ms - 3_600_000, abs=1100)


async def test_a_clock_that_jumps_ahead_is_lost_data_and_one_that_is_set_back_is_not(
    broker_server: BrokerServer,
) -> None:
    """Registrations and leases have expired then, and so has everything that waits in a list."""
    async with connected(broker_server.url) as broker:
        changes: list[BrokerChange] = []
        broker.subscribe(changes.append)
        broker.shards[0]._clock_offset_ms += 3_600_000  # as if the clock had been set back since
        await until(lambda: abs(broker.time_ms("any") - time.time() * 1000) < 1000)
        assert changes == []
        broker.shards[0]._clock_offset_ms -= 3_600_000
        await until(lambda: changes)
        assert changes == [RESTORED_EMPTY]


# Blocking reads


async def test_pop_takes_up_to_count_elements_of_the_first_list_that_has_any(any_broker_server: BrokerServer) -> None:
    async with connected(any_broker_server.url) as broker:
        reader = broker.open_reader()
        await broker.call("RPUSH", "b", *range(5))
        assert await reader.pop(["a", "b"], 3) == ("b", [b"0", b"1", b"2"])
        await broker.call("RPUSH", "a", "x")
        assert await reader.pop(["a", "b"], 3) == ("a", [b"x"])
        assert await reader.pop(["a", "b"], 3) == ("b", [b"3", b"4"])
        assert reader.statistics().element_count == 6


async def test_an_idle_pop_outlives_the_socket_timeout(
    any_broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py's default socket timeout of 5 s ends an idle receive() of channels_redis."""
    monkeypatch.setattr(blocking_reader, "BLOCK_S", 5.5)
    async with connected(f"{any_broker_server.url}?socket_timeout=3") as broker:
        reader = broker.open_reader()
        assert await reader.pop(["list"], 1) is None
        assert reader.restored_count == 0
        await broker.call("RPUSH", "list", "x")
        assert await reader.pop(["list"], 1) == ("list", [b"x"])


@on_both_loops
async def test_a_cancelled_pop_takes_nothing(any_broker_server: BrokerServer) -> None:
    async with connected(any_broker_server.url) as broker:
        reader = broker.open_reader()
        pop = asyncio.ensure_future(reader.pop(["list"], 1))
        await until_blocked(any_broker_server)
        started = time.monotonic()
        pop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pop
        assert time.monotonic() - started < blocking_reader.BLOCK_S / 2  # not all the time of the block
        await broker.call("RPUSH", "list", "x")
        assert await broker.call("LLEN", "list") == 1
        assert await reader.pop(["list"], 1) == ("list", [b"x"])
        assert reader.statistics().cancelled_count == 1
        assert reader.restored_count == 0


@on_both_loops
async def test_cancelling_before_the_read_was_written_takes_nothing(broker_server: BrokerServer) -> None:
    async with connected(broker_server.url) as broker:
        reader = await open_and_connect(broker)
        for _ in range(20):
            pop = asyncio.ensure_future(reader.pop(["list"], 1))
            await asyncio.sleep(0)
            pop.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pop
        await broker.call("RPUSH", "list", "x")
        assert await reader.pop(["list"], 1) == ("list", [b"x"])


@on_both_loops
async def test_a_caller_with_a_shorter_timeout_than_connecting_takes_gets_connected(
    broker_server: BrokerServer,
) -> None:
    async with connected(broker_server.url) as broker:
        reader = broker.open_reader()
        await broker.call("RPUSH", "list", "x")
        popped = None
        async with asyncio.timeout(30):
            while popped is None:
                pop = asyncio.ensure_future(reader.pop(["list"], 1))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                if not pop.done():
                    pop.cancel()
                await asyncio.wait((pop,))
                popped = None if pop.cancelled() else pop.result()
                if reader.statistics().pop_count:  # it is connected: now one that may take its time
                    popped = await reader.pop(["list"], 1)
        assert popped == ("list", [b"x"])


@on_both_loops
async def test_cancelling_under_racing_pushes_loses_nothing_and_keeps_the_order(
    any_broker_server: BrokerServer,
) -> None:
    """Closing the connection instead lost 299 of 300 messages."""
    message_count = 600
    chance = random.Random(7)
    async with connected(any_broker_server.url) as broker, connected(any_broker_server.url) as pusher:
        reader = broker.open_reader()
        received: list[int] = []

        sent = 0

        def is_enough() -> bool:
            statistics = reader.statistics()
            return statistics.cancelled_count > 50 and statistics.pushed_back_count > 10

        async def push() -> None:
            nonlocal sent
            while sent < message_count or not is_enough():
                portion = range(sent, sent + chance.randint(1, 4))
                await pusher.call("RPUSH", "list", *portion)
                sent = portion.stop
                await asyncio.sleep(chance.random() * 0.002)

        pushing = asyncio.ensure_future(push())
        while not pushing.done() or await broker.call("LLEN", "list"):
            # The first of them are cancelled while they connect, which must go on nevertheless.
            pop = asyncio.ensure_future(reader.pop(["other", "list"], chance.randint(1, 5)))
            await asyncio.wait((pop,), timeout=chance.random() * 0.002)
            pop.cancel()
            await asyncio.wait((pop,))
            if not pop.cancelled():
                popped = pop.result()
                assert popped is not None
                received += map(int, popped[1])
        await pushing
        assert received == list(range(sent))
        assert is_enough()
        assert reader.statistics().lost_count == 0


@on_both_loops
async def test_elements_come_back_in_order_before_younger_ones_and_the_list_still_expires(
    broker_server: BrokerServer,
) -> None:
    async with connected(broker_server.url) as broker:
        reader = await open_and_connect(broker)
        assert reader._connection is not None
        transport = reader._connection._transport
        assert transport is not None
        for remaining in ([b"3", b"4"], []):
            await broker.call("RPUSH", "list", b"0", b"1", b"2", *remaining)
            transport.pause_reading()
            pop = asyncio.ensure_future(reader.pop(["list"], 3))
            with broker_server.client() as client:
                await until(lambda: client.llen("list") == len(remaining))  # noqa: B023 - taken, but not read here
                pop.cancel()
                await asyncio.sleep(0.05)  # CLIENT UNBLOCK finds nobody, and asks again
                assert not pop.done()
                transport.resume_reading()
                with pytest.raises(asyncio.CancelledError):
                    await pop
                assert client.lrange("list", 0, -1) == [b"0", b"1", b"2", *remaining]
                assert 50_000 < client.pttl("list") <= 60_000
                client.delete("list")
        assert reader.statistics().pushed_back_count == 6


@on_both_loops
async def test_a_second_cancel_does_not_stop_the_pushing_back(broker_server: BrokerServer) -> None:
    async with connected(broker_server.url) as broker:
        reader = await open_and_connect(broker)
        pop = asyncio.ensure_future(reader.pop(["list"], 3))
        await until_blocked(broker_server)
        with broker_server.client() as client:
            client.rpush("list", 1, 2, 3)
        for _ in range(3):
            pop.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await pop
        # The next read waits for the end of the one before.
        assert await reader.pop(["list"], 9) == ("list", [b"1", b"2", b"3"])
        assert reader.statistics().pushed_back_count == 3


async def test_elements_that_cannot_be_pushed_back_are_counted_as_lost(
    broker_server: BrokerServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(broker_server.url) as broker:
        reader = await open_and_connect(broker)
        pop = asyncio.ensure_future(reader.pop(["list"], 3))
        await until_blocked(broker_server)
        with broker_server.client() as client:
            client.rpush("list", 1, 2, 3)
            client.config_set("maxmemory", 1)
            pop.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pop
        assert reader.statistics().lost_count == 3
        assert "3 messages of list were lost" in caplog.text
        monkeypatch.setattr(blocking_reader, "BLOCK_S", 0.5)
        assert await reader.pop(["list"], 1) is None


async def test_a_ghost_eats_nothing(any_broker_server: BrokerServer) -> None:
    """A reader's connection vanished, the server did not notice and still holds its BLMPOP."""
    async with (
        BrokerProxy(any_broker_server.socket_path) as proxy,
        connected(proxy.url) as broker,
    ):
        reader = broker.open_reader()
        pop = asyncio.ensure_future(reader.pop(["list"], 1))
        await until_blocked(any_broker_server)
        proxy.abandon_clients()
        with pytest.raises(BrokerUnavailable):
            await pop
        with any_broker_server.client() as client:
            assert client.info("clients")["blocked_clients"] == 1  # the ghost
            await broker.wait_reachable(5)
            pop = asyncio.ensure_future(reader.pop(["list"], 1))
            await until(lambda: reader.statistics().killed_ghost_count)
            await until_blocked(any_broker_server)
            client.rpush("list", "x")
        assert await pop == ("list", [b"x"])
        assert reader.restored_count == 1
        assert reader.statistics().killed_ghost_count == 1


async def test_a_ghost_that_may_not_be_killed_is_outlived(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user without the right to CLIENT KILL: reading stops for the time of one read, not for ever."""
    monkeypatch.setattr(blocking_reader, "BLOCK_S", 4.0)
    async with BrokerProxy(broker_server.socket_path) as proxy, connected(proxy.url) as broker:
        reader = broker.open_reader()
        pop = asyncio.ensure_future(reader.pop(["list"], 1))
        await until_blocked(broker_server)
        proxy.abandon_clients()
        with pytest.raises(BrokerUnavailable):
            await pop
        with broker_server.client() as client:

            def blocked() -> set[str]:
                return {each["id"] for each in client.client_list() if "b" in each["flags"]}

            client.execute_command("ACL", "SETUSER", "default", "-client|kill")
            ghost = blocked()
            assert len(ghost) == 1
            await broker.wait_reachable(5)
            pop = asyncio.ensure_future(reader.pop(["list"], 1))
            await until(lambda: blocked() and not blocked() & ghost, 60.0)
            client.rpush("list", "x")
        assert await pop == ("list", [b"x"])


async def test_a_cancelled_read_that_is_never_answered_is_given_up_and_its_ghost_killed(
    broker_server: BrokerServer,
) -> None:
    async with (
        BrokerProxy(broker_server.socket_path) as proxy,
        connected(f"{proxy.url}?socket_timeout=3") as broker,
    ):
        reader = broker.open_reader()
        pop = asyncio.ensure_future(reader.pop(["list"], 1))
        await until_blocked(broker_server)
        proxy.is_deaf = True
        pop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pop
        proxy.is_deaf = False
        await broker.wait_reachable(30)
        await broker.call("RPUSH", "list", "x")
        assert await reader.pop(["list"], 1) == ("list", [b"x"])
        assert reader.restored_count == 1


async def test_after_a_restart_no_stranger_is_killed(broker_server: BrokerServer) -> None:
    """Client numbers begin anew with the server: the ghost's may be somebody else's now."""
    async with connected(broker_server.url) as broker:
        changes = Changes(broker)
        for _ in range(20):  # a number that the few clients of the new server have not reached
            assert broker_server.answers()
        reader = broker.open_reader()
        pop = asyncio.ensure_future(reader.pop(["list"], 1))
        await until_blocked(broker_server)
        assert reader._connection is not None
        assert reader._connection.server is not None
        ghost_id = reader._connection.server.client_id
        await kill_and_start(broker_server, changes)
        with pytest.raises(BrokerUnavailable):
            await pop
        with contextlib.ExitStack() as strangers:
            stranger = strangers.enter_context(broker_server.client(single_connection_client=True))
            assert stranger.client_id() < ghost_id
            while stranger.client_id() < ghost_id:
                stranger = strangers.enter_context(broker_server.client(single_connection_client=True))
            assert stranger.client_id() == ghost_id
            await broker.call("RPUSH", "list", "x")
            assert await reader.pop(["list"], 1) == ("list", [b"x"])
            assert ghost_id in {int(entry["id"]) for entry in stranger.client_list()}
        assert reader.restored_count == 1
        assert reader.statistics().killed_ghost_count == 0
        assert changes.seen == [LOST, RESTORED_EMPTY]


async def test_pop_during_an_outage_fails_and_does_not_spin(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(broker_server.url) as broker:
        reader = broker.open_reader()
        changes = Changes(broker)
        broker_server.kill()
        await changes.wait(1)
        failure_count = 0
        started = time.monotonic()
        while time.monotonic() - started < 1.5:
            with pytest.raises(BrokerUnavailable):
                await reader.pop(["list"], 1)
            failure_count += 1
        assert failure_count <= 2
        monkeypatch.setattr(blocking_reader, "RECONNECT_WAIT_S", 60.0)  # the next one waits until the broker is back
        broker_server.start()
        pop = asyncio.ensure_future(reader.pop(["list"], 1))
        await broker.wait_reachable(5)
        await broker.call("RPUSH", "list", "x")
        assert await pop == ("list", [b"x"])


async def test_a_killed_reader_connection_is_reported_and_the_next_pop_reconnects(
    broker_server: BrokerServer,
) -> None:
    async with connected(broker_server.url) as broker:
        reader = broker.open_reader()
        for round_number in range(1, 4):
            pop = asyncio.ensure_future(reader.pop(["list"], 1))
            await until_blocked(broker_server)
            with broker_server.client() as client:
                (entry,) = [entry for entry in client.client_list() if entry["name"] == "test:reader"]
                client.client_kill_filter(_id=entry["id"])
            with pytest.raises(BrokerUnavailable):
                await pop
            await broker.call("RPUSH", "list", "x")
            assert await reader.pop(["list"], 1) == ("list", [b"x"])
            assert reader.restored_count == round_number
        assert broker.statistics().connect_count == 1


async def test_a_reader_that_only_ever_reaches_a_replica_does_not_spin(
    broker_server: BrokerServer, valkey_program: str
) -> None:
    """As behind a name that leads to the master for one connection and to a replica for the next."""
    with BrokerServer(valkey_program) as replica, replica.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", free_port())
        async with connected(broker_server.url) as broker:
            reader = broker.open_reader()
            broker.shards[0].address = parse_broker_url(replica.url)
            started = time.monotonic()
            for _ in range(6):
                with pytest.raises(BrokerUnavailable, match="READONLY"):
                    await reader.pop(["list"], 1)
            assert time.monotonic() - started > 1.4  # the waits between the tries: 0.1, 0.2, 0.4 and 0.8 s


async def test_a_key_of_another_type_is_an_error_and_the_reader_goes_on(broker_server: BrokerServer) -> None:
    async with connected(broker_server.url) as broker:
        reader = broker.open_reader()
        await broker.call("SET", "text", "x")
        await broker.call("RPUSH", "list", "x")
        with pytest.raises(BrokerError, match="WRONGTYPE"):
            await reader.pop(["text"], 1)
        assert await reader.pop(["list"], 1) == ("list", [b"x"])
        assert reader.restored_count == 0


async def test_two_pops_at_once_are_a_mistake(broker_server: BrokerServer) -> None:
    async with connected(broker_server.url) as broker:
        reader = broker.open_reader()
        first = asyncio.ensure_future(reader.pop(["list"], 1))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="already running"):
            await reader.pop(["list"], 1)
        await broker.call("RPUSH", "list", "x")
        assert await first == ("list", [b"x"])


@on_both_loops
async def test_closing_a_reader_ends_its_pop_and_takes_nothing(broker_server: BrokerServer) -> None:
    async with connected(broker_server.url) as broker:
        for when in ("connecting", "blocked", "answered"):
            reader = broker.open_reader()
            pop = asyncio.ensure_future(reader.pop(["list"], 1))
            await asyncio.sleep(0)
            if when != "connecting":
                await until_blocked(broker_server)
            if when == "answered":
                with broker_server.client() as client:
                    client.rpush("list", "x")
            await reader.close()
            await reader.close()
            with pytest.raises(BrokerUnavailable):
                await pop
            with pytest.raises(BrokerUnavailable):
                await reader.pop(["list"], 1)
        assert await broker.call("LRANGE", "list", 0, -1) == [b"x"]
        assert broker.statistics().reader_count == 0


async def test_closing_the_broker_ends_running_pops(broker_server: BrokerServer) -> None:
    broker = Broker(broker_server.url, client_name="test")
    await broker.connect()
    readers: list[BlockingReader] = [broker.open_reader() for _ in range(3)]
    pops = [asyncio.ensure_future(reader.pop([f"list{i}"], 1)) for i, reader in enumerate(readers)]
    await until_blocked(broker_server, 3)
    await broker.close()
    for result in await asyncio.gather(*pops, return_exceptions=True):
        assert isinstance(result, BrokerUnavailable)
    with broker_server.client() as client:
        await until(lambda: len(client.client_list()) == 1)


@on_both_loops
async def test_nothing_is_left_behind(broker_server: BrokerServer) -> None:
    """No task, no socket, no exception that nobody looked at."""
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    async with connected(broker_server.url) as broker:
        changes = Changes(broker)
        reader = broker.open_reader()
        pop = asyncio.ensure_future(reader.pop(["list"], 1))
        await until_blocked(broker_server)
        await kill_and_start(broker_server, changes)
        with pytest.raises(BrokerUnavailable):
            await pop
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    del broker, changes, reader, pop
    gc.collect()
    assert complaints == []
    assert broker_server.process is not None
    broker_server.process.send_signal(signal.SIGCONT)
