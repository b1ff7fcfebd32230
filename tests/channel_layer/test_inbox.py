"""Writing lists in batches and reading the inbox: with a broker of the test, then with a real one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from channel_layer import scripts
from channel_layer.base import Stored
from channel_layer.broker import Broker
from channel_layer.errors import BrokerError, BrokerUnavailable, ChannelFull
from channel_layer.inbox import InboxReader, ListWriter
from tests.channel_layer.processes import PATIENCE_S, until
from tests.servers import BrokerServer


class Scripted:
    """Takes script calls and answers when told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, list[bytes]]] = []
        self.answers: list[asyncio.Future[Any]] = []
        self.flush_count = 0

    def script(self, script: scripts.Script, keys: Sequence[str], args: Sequence[Any]) -> asyncio.Future[Any]:
        assert script is scripts.PUSH
        self.calls.append((keys[0], args[0], args[1], list(args[2:])))
        self.answers.append(asyncio.get_running_loop().create_future())
        return self.answers[-1]

    def flush(self) -> None:
        self.flush_count += 1

    @property
    def last(self) -> tuple[str, list[bytes]]:
        return self.calls[-1][0], self.calls[-1][3]


@pytest.fixture
async def broker() -> Scripted:
    return Scripted()


@pytest.fixture
async def writer(broker: Scripted) -> ListWriter:
    scripted: Any = broker
    return ListWriter(scripted, asyncio.get_running_loop())


def store(
    writer: ListWriter, message: bytes, *, key: str = "list", capacity: int = 100, expiry_ms: int = 1000
) -> asyncio.Task[int]:
    return asyncio.create_task(
        writer.store(key, message, capacity=capacity, expiry_ms=expiry_ms, name=f"name of {key}")
    )


async def turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_the_messages_of_a_tick_leave_together_and_the_next_ones_after_the_answer(
    writer: ListWriter, broker: Scripted
) -> None:
    first = [store(writer, b"%d" % number) for number in range(3)]
    await turns()
    assert broker.last == ("list", [b"0", b"1", b"2"])
    second = [store(writer, b"%d" % number) for number in range(3, 5)]
    await turns()
    assert len(broker.calls) == 1
    broker.answers[0].set_result([3, 77])
    assert await asyncio.gather(*first) == [77, 77, 77]
    assert broker.last == ("list", [b"3", b"4"])
    broker.answers[1].set_result([2, 78])
    assert await asyncio.gather(*second) == [78, 78]
    statistics = writer.statistics()
    assert (statistics.batch_count, statistics.stored_count, statistics.waiting) == (2, 5, 0)
    assert repr(writer) == "<ListWriter lists=0>"


async def test_lists_do_not_wait_for_each_other(writer: ListWriter, broker: Scripted) -> None:
    store(writer, b"a", key="one")
    two = store(writer, b"b", key="two")
    await turns()
    assert [call[0] for call in broker.calls] == ["one", "two"]
    broker.answers[1].set_result([1, 5])
    assert await two == 5


async def test_what_was_not_stored_is_channel_full(writer: ListWriter, broker: Scripted) -> None:
    calls = [store(writer, b"%d" % number, capacity=9) for number in range(4)]
    await turns()
    broker.answers[0].set_result([2, 7])
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert results[:2] == [7, 7]
    for result in results[2:]:
        assert isinstance(result, ChannelFull)
        assert "name of list" in str(result)
        assert "9 messages" in str(result)
    assert writer.statistics().full_count == 2


async def test_more_than_fits_the_list_is_refused_without_asking(writer: ListWriter, broker: Scripted) -> None:
    calls = [store(writer, b"%d" % number, capacity=3) for number in range(5)]
    await turns()
    assert broker.last == ("list", [b"0", b"1", b"2"])
    results = await asyncio.gather(*calls[3:], return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["ChannelFull"] * 2
    broker.answers[0].set_result([3, 7])
    assert await asyncio.gather(*calls[:3]) == [7, 7, 7]


async def test_an_element_is_told_as_it_stands_in_the_list(writer: ListWriter, broker: Scripted) -> None:
    told: list[Stored] = []
    calls = [
        writer.push_element("list", b"%d" % number, capacity=9, expiry_ms=1000, name="of it") for number in range(2)
    ]
    for call in calls:
        call.add_done_callback(told.append)
    await turns()
    assert broker.last == ("list", [b"0", b"1"])
    assert told == []
    broker.answers[0].set_result([1, 7])
    await turns()
    assert told == calls
    assert calls[0].exception() is None
    assert calls[0].result() == (7).to_bytes(8, "big") + b"0"
    with pytest.raises(ChannelFull, match="'of it' holds 9 messages"):
        calls[1].result()
    failing = writer.push_element("list", b"3", capacity=9, expiry_ms=1000, name="of it")
    await turns()
    broker.answers[1].set_exception(BrokerUnavailable("away"))
    await turns()
    failing.add_done_callback(told.append)
    assert told == calls  # never at once
    await turns()
    assert told == [*calls, failing]
    assert not failing.cancelled()
    assert isinstance(failing.exception(), BrokerUnavailable)


async def test_a_fault_behind_one_element_does_not_keep_the_others_from_their_answer(
    writer: ListWriter, broker: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Stored] = []
    first, second = (
        writer.push_element("list", b"%d" % number, capacity=9, expiry_ms=1000, name="of it") for number in range(2)
    )
    first.add_done_callback(lambda call: 1 / 0)
    second.add_done_callback(told.append)
    await turns()
    broker.answers[0].set_result([2, 7])
    await turns()
    assert told == [second]
    assert "ZeroDivisionError" in caplog.text


async def test_messages_that_differ_in_capacity_or_expiry_keep_their_order(
    writer: ListWriter, broker: Scripted
) -> None:
    store(writer, b"0", capacity=10)
    store(writer, b"1", capacity=10)
    store(writer, b"2", capacity=20)
    store(writer, b"3", capacity=20, expiry_ms=5)
    await turns()
    for index in range(3):
        broker.answers[index].set_result([len(broker.calls[index][3]), 1])
        await turns()
    assert broker.calls == [
        ("list", 10, 1000, [b"0", b"1"]),
        ("list", 20, 1000, [b"2"]),
        ("list", 20, 5, [b"3"]),
    ]


async def test_large_batches_are_cut(writer: ListWriter, broker: Scripted) -> None:
    for _ in range(5):
        store(writer, bytes(400_000))
    for _ in range(2):
        await turns()
        broker.answers[-1].set_result([len(broker.calls[-1][3]), 1])
    await turns()
    assert [len(call[3]) for call in broker.calls] == [3, 2]


async def test_a_call_cancelled_before_it_left_sends_nothing(writer: ListWriter, broker: Scripted) -> None:
    store(writer, b"0")
    await turns()
    cancelled, kept = store(writer, b"1"), store(writer, b"2")
    await turns()
    cancelled.cancel()
    await turns()
    broker.answers[0].set_result([1, 1])
    await turns()
    assert broker.last == ("list", [b"2"])
    broker.answers[1].set_result([1, 1])
    assert await kept == 1


async def test_when_all_calls_were_cancelled_nothing_is_sent(writer: ListWriter, broker: Scripted) -> None:
    task = store(writer, b"0")
    await asyncio.sleep(0)
    task.cancel()
    await turns()
    assert broker.calls == []
    assert repr(writer) == "<ListWriter lists=0>"


@pytest.mark.parametrize("error", [BrokerUnavailable("lost"), BrokerError("OOM")], ids=repr)
async def test_an_error_reaches_all_callers_of_the_batch_and_the_next_batch_leaves(
    writer: ListWriter, broker: Scripted, error: Exception
) -> None:
    calls = [store(writer, b"0"), store(writer, b"1")]
    await turns()
    later = store(writer, b"2")
    await turns()
    broker.answers[0].set_exception(error)
    assert await asyncio.gather(*calls, return_exceptions=True) == [error, error]
    broker.answers[1].set_result([1, 9])
    assert await later == 9
    assert writer.statistics().failed_count == 2


async def test_letters_nobody_asked_about_are_counted(writer: ListWriter, broker: Scripted) -> None:
    writer.push_unasked("list", b"0", capacity=5, expiry_ms=1000)
    writer.push_unasked("list", b"1", capacity=5, expiry_ms=1000)
    await turns()
    broker.answers[0].set_result([1, 1])
    await turns()
    assert (writer.statistics().stored_count, writer.statistics().full_count) == (1, 1)


async def test_a_negative_capacity_has_no_limit(writer: ListWriter, broker: Scripted) -> None:
    for number in range(5):
        writer.push_unasked("list", b"%d" % number, capacity=-1, expiry_ms=1000)
    await turns()
    assert len(broker.last[1]) == 5


# With a real broker


class Received:
    def __init__(self) -> None:
        self.blobs: list[bytes] = []
        self.letters: list[bytes] = []
        self.restored_count = 0

    def blob(self, data: bytes) -> None:
        if data == b"bad":
            raise ValueError("a fault of ours")
        self.blobs.append(data)

    def letter(self, data: bytes) -> None:
        self.letters.append(data)

    def restored(self) -> None:
        self.restored_count += 1


async def test_the_reader_takes_both_lists_in_order_and_survives_everything(
    any_broker_server: BrokerServer, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Broker(any_broker_server.url, client_name="test")
    await broker.connect()
    received = Received()
    reader = InboxReader(
        broker.open_reader(),
        link_key="{i}:link",
        mail_key="{i}:mail",
        blob_received=received.blob,
        letter_received=received.letter,
        reader_restored=received.restored,
    )
    reader.start()
    blobs = [b"blob %d" % number for number in range(300)]
    letters = [b"letter %d" % number for number in range(300)]
    with any_broker_server.client() as client:
        client.rpush("{i}:link", b"bad", *blobs)
        client.rpush("{i}:mail", *letters)
    await until(lambda: len(received.blobs) == len(received.letters) == 300)
    assert (received.blobs, received.letters) == (blobs, letters)
    assert reader.statistics().error_count == 1
    assert "dropped" in caplog.text

    await asyncio.to_thread(any_broker_server.restart)
    with any_broker_server.client() as client:
        client.rpush("{i}:link", b"after")
        await until(lambda: received.blobs[-1] == b"after")
        assert received.restored_count == 1

        # Somebody else's key of another type: not ours to repair, but to survive.
        client.set("{i}:mail", "text")
        await until(lambda: reader.statistics().error_count >= 2)
        client.delete("{i}:mail")
        client.rpush("{i}:mail", b"after")
        await until(lambda: received.letters[-1] == b"after")

        await reader.stop()
        client.rpush("{i}:link", b"not ours any more")
        assert client.llen("{i}:link") == 1
    await broker.close()


async def test_a_full_read_means_that_more_may_wait(broker_server: BrokerServer) -> None:
    broker = Broker(broker_server.url, client_name="test")
    await broker.connect()
    seen: list[bool] = []
    reader = InboxReader(
        broker.open_reader(),
        link_key="{i}:link",
        mail_key="{i}:mail",
        blob_received=lambda data: seen.append(reader.is_current),
        letter_received=lambda data: None,
        reader_restored=lambda: None,
    )
    with broker_server.client() as client:
        client.rpush("{i}:link", *[b"x"] * 100)
    reader.start()
    await until(lambda: len(seen) == 100)
    assert seen == [False] * 64 + [True] * 36
    async with asyncio.timeout(PATIENCE_S):
        await reader.stop()
    await broker.close()


@pytest.mark.parametrize(("blob_count", "is_held"), [(64, False), (10, True)])
async def test_a_process_that_gets_mail_all_the_time_learns_that_no_blobs_wait(
    broker_server: BrokerServer, blob_count: int, is_held: bool
) -> None:
    """As one does that sends itself a probe each second: else it would never find anybody dead again."""
    broker = Broker(broker_server.url, client_name="test")
    await broker.connect()
    blobs: list[bytes] = []
    seen: list[bool] = []

    def blob_received(data: bytes) -> None:
        blobs.append(data)
        reader.hold(is_held)

    reader = InboxReader(
        broker.open_reader(),
        link_key="{i}:link",
        mail_key="{i}:mail",
        blob_received=blob_received,
        letter_received=lambda data: seen.append(reader.is_current),
        reader_restored=lambda: None,
    )
    with broker_server.client() as client:
        client.rpush("{i}:link", *[b"x"] * blob_count)
        client.rpush("{i}:mail", *[b"x"] * 65)
    reader.start()
    await until(lambda: len(blobs) == blob_count)
    reader.hold(False)
    await until(lambda: len(seen) == 65)
    # The first read of mail asks for it before the link, and proves nothing; the second one asks for the link first.
    assert seen == [False] * 64 + [True]
    async with asyncio.timeout(PATIENCE_S):
        await reader.stop()
    await broker.close()


async def test_a_read_that_ends_while_the_inbox_is_held_does_not_make_it_current(broker_server: BrokerServer) -> None:
    broker = Broker(broker_server.url, client_name="test")
    await broker.connect()
    seen: list[bool] = []
    reader = InboxReader(
        broker.open_reader(),
        link_key="{i}:link",
        mail_key="{i}:mail",
        blob_received=lambda data: seen.append(reader.is_current),
        letter_received=lambda data: None,
        reader_restored=lambda: None,
    )
    reader.start()
    await asyncio.sleep(0)  # the first read is under way
    reader.hold(True)
    with broker_server.client() as client:
        client.rpush("{i}:link", b"x")
    await until(lambda: len(seen) == 1)
    assert seen == [False]
    async with asyncio.timeout(PATIENCE_S):
        await reader.stop()
    await broker.close()


class Elements:
    """A reader whose first read brings all of ``elements``; the next one waits for ever."""

    restored_count = 0

    def __init__(self, key: str, elements: list[bytes]) -> None:
        self.reads: list[tuple[str, list[bytes]]] = [(key, elements)]

    async def pop(self, keys: Sequence[str], count: int) -> tuple[str, list[bytes]] | None:
        if self.reads:
            return self.reads.pop()
        await asyncio.Event().wait()
        return None

    async def close(self) -> None:
        pass


class Slow:
    """Elements that take half a millisecond each, on a clock of their own."""

    def __init__(self, key: str, count: int) -> None:
        self.now = 0.0
        self.taken: list[bytes] = []
        self.elements = [b"%d" % number for number in range(count)]
        scripted: Any = Elements(key, self.elements)
        self.reader = InboxReader(
            scripted,
            link_key="link",
            mail_key="mail",
            blob_received=self.take,
            letter_received=self.take,
            reader_restored=lambda: None,
            clock=lambda: self.now,
        )

    def take(self, data: bytes) -> None:
        self.now += 0.0005
        self.taken.append(data)


@pytest.mark.parametrize("key", ["link", "mail"])
async def test_a_large_read_is_handled_in_slices(key: str) -> None:
    """A flood's frames are read from the same list as all others; sockets are read between its slices."""
    slow = Slow(key, 20)
    slow.reader.start()
    counts = []
    while len(slow.taken) < 20:
        await asyncio.sleep(0)
        counts.append(len(slow.taken))
        assert slow.reader.is_current == (len(slow.taken) in (0, 20))  # who is not heard yet must not be found dead
    assert counts[-1] == 20
    assert max(after - before for before, after in pairwise([0, *counts])) == 2
    assert slow.taken == slow.elements
    await slow.reader.stop()


@pytest.mark.parametrize("key", ["link", "mail"])
async def test_a_stop_between_two_slices_loses_nothing(key: str) -> None:
    slow = Slow(key, 20)
    slow.reader.start()
    await asyncio.sleep(0)
    assert 0 < len(slow.taken) < 20
    await slow.reader.stop()
    assert slow.taken == slow.elements


async def test_a_held_inbox_leaves_what_comes_in_the_broker(broker_server):
    broker = Broker(broker_server.url, client_name="test")
    await broker.connect()
    received = Received()
    reader = InboxReader(
        broker.open_reader(),
        link_key="{i}:link",
        mail_key="{i}:mail",
        blob_received=lambda data: (received.blob(data), reader.hold(True)),
        letter_received=received.letter,
        reader_restored=received.restored,
    )
    with broker_server.client() as client:
        client.rpush("{i}:link", *[b"%d" % number for number in range(100)])
        reader.start()
        # The read that was under way is taken whole, the next one is not begun.
        await until(lambda: len(received.blobs) == 64)
        client.rpush("{i}:mail", b"a letter")
        assert not reader.is_current
        assert client.llen("{i}:link") == 36
        assert received.letters == []
        reader.hold(False)
        await until(lambda: received.letters == [b"a letter"])
    async with asyncio.timeout(PATIENCE_S):
        await reader.stop()
    await broker.close()
