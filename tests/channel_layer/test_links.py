"""channel_layer/links.py on a real loop, with inboxes in memory instead of a broker."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from channel_layer import links as links_module
from channel_layer.errors import BrokerUnavailable, WireError
from channel_layer.frames import BlobKind, build_blob, build_group_send, decode_blob
from channel_layer.link import LEFT, RESET, LinkSettings
from channel_layer.links import Links

QUICK = LinkSettings(ack_delay_s=0.005, rto_s=0.02, rto_max_s=0.04, gap_interval_s=0.01)
# Nothing is pushed because time passes, however slow the machine is.
CALM = LinkSettings(ack_delay_s=60.0, rto_s=60.0, rto_max_s=60.0)


class Broker:
    """Inboxes in memory. A push is answered in the next turn, unless somebody holds or breaks it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.members: dict[str, Member] = {}
        self.pushes: list[tuple[str, str, list[bytes]]] = []
        self.under_way = 0  # pushes without an answer
        self.is_down = False
        self.away: set[str] = set()  # peers on shards that are away
        self.holds = False
        self.held: list[Callable[[], None]] = []
        self.error: Exception | None = None
        # Decides for each blob whether it is lost.
        self.loses: Callable[[bytes], bool] = lambda blob: False

    def push(self, source: str, peer: str, blobs: list[bytes]) -> asyncio.Future[Any]:
        self.pushes.append((source, peer, blobs))
        answer: asyncio.Future[Any] = self.loop.create_future()
        self.under_way += 1
        answer.add_done_callback(self.answered)  # behind the blobs that it has delivered

        def store() -> None:
            if self.is_down or self.error is not None:
                answer.set_exception(self.error or BrokerUnavailable("connection lost"))
                return
            for blob in blobs:
                if peer in self.members and not self.loses(blob):
                    self.loop.call_soon(self.members[peer].links.receive_blob, blob)
            answer.set_result(len(blobs))

        if self.holds:
            self.held.append(store)
        else:
            self.loop.call_soon(store)
        return answer

    def answered(self, answer: asyncio.Future[Any]) -> None:
        self.under_way -= 1

    def release(self) -> None:
        self.holds = False
        held, self.held = self.held, []
        for store in held:
            store()

    def blobs_from(self, source: str) -> list[bytes]:
        return [blob for sender, _, blobs in self.pushes if sender == source for blob in blobs]


class Member:
    """A process: its links, and what they told it."""

    def __init__(self, broker: Broker, process_id: str, settings: LinkSettings = QUICK) -> None:
        self.received: list[tuple[str, int]] = []
        self.ended: list[tuple[str, str]] = []
        self.ready: list[str] = []
        self.on_frame: Callable[[str, list[Any]], None] = lambda peer, frame: None
        self.changed = asyncio.Event()
        broker.members[process_id] = self
        self.links = Links(
            process_id=process_id,
            push=lambda peer, blobs: broker.push(process_id, peer, blobs),
            frame_received=self.frame_received,
            peer_ended=self.peer_ended,
            peer_ready=self.peer_ready,
            loop=broker.loop,
            settings=settings,
            is_away=lambda peer: peer in broker.away,
        )

    def frame_received(self, peer: str, frame: list[Any]) -> None:
        self.changed.set()
        self.received.append((peer, int(frame[1])))
        self.on_frame(peer, frame)

    def peer_ended(self, peer: str, reason: str) -> None:
        self.changed.set()
        self.ended.append((peer, reason))

    def peer_ready(self, peer: str) -> None:
        self.changed.set()
        self.ready.append(peer)

    def send(self, peer: str, *numbers: int, size: int = 0) -> None:
        for number in numbers:
            self.links.send(peer, build_group_send(str(number), b"." * size))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that no callback tells."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - there is nothing to wait on
            await asyncio.sleep(0.001)


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    broker = Broker()
    yield broker
    for member in broker.members.values():
        member.links.close()


async def connected(broker: Broker, settings: LinkSettings = QUICK) -> tuple[Member, Member]:
    a, b = Member(broker, "ia", settings), Member(broker, "wb", settings)
    a.send("wb", 1)
    b.send("ia", 1)
    await a.until(lambda: len(a.received) == 1)
    await b.until(lambda: len(b.received) == 1)

    def is_at_rest() -> bool:
        """Also what was sent again, on a slow machine, and the answers to that are behind us."""
        links = [*a.links._links.values(), *b.links._links.values()]
        is_acknowledged = all(link.is_acknowledged and link.next_deadline() is None for link in links)
        return is_acknowledged and not (broker.under_way or a.links._dirty or b.links._dirty)

    await until(is_at_rest)
    for member in (a, b):
        member.received.clear()
    broker.pushes.clear()
    return a, b


async def test_frames_of_one_turn_leave_in_one_push(broker: Broker) -> None:
    a, b = Member(broker, "ia", CALM), Member(broker, "wb", CALM)
    a.send("wb", *range(100))
    await b.until(lambda: len(b.received) == 100)
    assert b.received == [("ia", number) for number in range(100)]
    assert len(broker.pushes) == 1


async def test_what_is_sent_while_a_push_is_under_way_leaves_with_the_next(broker: Broker) -> None:
    a, b = Member(broker, "ia", CALM), Member(broker, "wb", CALM)
    broker.holds = True
    a.send("wb", 0)
    await until(lambda: len(broker.pushes) == 1)
    for number in range(1, 50):
        a.send("wb", number)
        await asyncio.sleep(0)
    assert len(broker.pushes) == 1
    broker.release()
    await b.until(lambda: len(b.received) == 50)
    assert [number for _, number in b.received] == list(range(50))
    assert len(broker.blobs_from("ia")) == 2


async def test_pushes_to_several_peers_go_out_in_the_same_turn(broker: Broker) -> None:
    a = Member(broker, "ia")
    broker.holds = True
    a.send("wb", 1)
    a.send("wc", 1)
    await asyncio.sleep(0)
    assert [peer for _, peer, _ in broker.pushes] == ["wb", "wc"]


async def test_lost_blobs_come_again(broker: Broker) -> None:
    a, b = await connected(broker)
    dice = random.Random(1)
    broker.loses = lambda blob: dice.random() < 0.3
    for number in range(300):
        a.send("wb", number)
        b.send("ia", number)
        if number % 5 == 0:
            await asyncio.sleep(0.001)
    await b.until(lambda: len(b.received) >= 300)
    await a.until(lambda: len(a.received) >= 300)
    assert [number for _, number in b.received] == list(range(300))
    assert [number for _, number in a.received] == list(range(300))
    assert a.links.statistics().resent_blobs > 0
    assert a.ended == b.ended == []


async def test_one_timer_for_all_links_and_none_at_rest(broker: Broker) -> None:
    a, _ = await connected(broker)
    await until(lambda: a.links._timer is None)
    a.send("wb", 1)
    a.send("wc", 1)
    await until(lambda: a.links._timer is not None)
    # Nobody reads as wc: it is sent to again and again.
    await until(lambda: sum(peer == "wc" for _, peer, _ in broker.pushes) >= 4)
    a.links.give_up("wc", "dead")
    await until(lambda: a.links._timer is None)


async def test_nothing_is_pushed_while_the_broker_is_away(broker: Broker) -> None:
    a, b = await connected(broker)
    broker.is_down = True
    a.send("wb", 1)
    await until(lambda: a.links.statistics().failed_pushes == 1)
    a.links.broker_lost()
    b.links.broker_lost()
    broker.away = {"ia", "wb", "wc"}
    a.send("wb", 2)
    a.send("wc", 3)
    count = len(broker.pushes)
    await asyncio.sleep(0.1)
    assert len(broker.pushes) == count
    broker.is_down = False
    broker.away = set()
    a.links.broker_restored()
    b.links.broker_restored()
    await b.until(lambda: len(b.received) == 2)
    assert b.received == [("ia", 1), ("ia", 2)]
    assert broker.pushes[-1][1] in ("wb", "wc", "ia")


async def test_an_outage_of_one_shard_is_none_for_peers_elsewhere(broker: Broker) -> None:
    a, b = await connected(broker)
    c, d = Member(broker, "wc"), Member(broker, "wd")
    broker.away = {"wc", "wd"}
    a.send("wc", 1)  # a link that begins during the outage
    a.links.broker_lost(lambda peer: peer in broker.away)
    a.send("wb", 1)
    await b.until(lambda: b.received == [("ia", 1)])
    assert {peer for source, peer, _ in broker.pushes if source == "ia"} == {"wb"}
    a.links.broker_restored(lambda peer: peer == "wd")
    a.send("wd", 1)
    assert not c.received
    broker.away.discard("wc")
    a.links.broker_restored(lambda peer: peer == "wc")
    await c.until(lambda: c.received == [("ia", 1)])
    broker.away.discard("wd")
    a.links.broker_restored(lambda peer: peer == "wd")
    await d.until(lambda: d.received == [("ia", 1)])


async def test_a_refused_push_is_logged_and_tried_again(
    broker: Broker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links_module, "_LOG_INTERVAL_S", 60.0)
    a, b = Member(broker, "ia"), Member(broker, "wb")
    broker.error = RuntimeError("OOM command not allowed")
    a.send("wb", 1)
    await until(lambda: a.links.statistics().failed_pushes >= 3)
    broker.error = None
    await b.until(lambda: b.received == [("ia", 1)])
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1  # at most one in an interval
    assert "OOM command not allowed" in warnings[0]


async def test_a_restored_reader_asks_for_what_it_missed(broker: Broker) -> None:
    slow = LinkSettings(rto_s=60.0, rto_max_s=60.0)
    a, b = await connected(broker, slow)
    broker.loses = lambda blob: True
    a.send("wb", 1)
    await until(lambda: len(broker.pushes) == 1)
    await asyncio.sleep(0.01)
    broker.loses = lambda blob: False
    b.links.reader_restored()
    await b.until(lambda: b.received == [("ia", 1)])


async def test_congestion_is_seen_and_its_end_is_told(broker: Broker) -> None:
    a, b = await connected(broker, LinkSettings(window_bytes=10_000, congested_bytes=20_000, ready_bytes=10_000))
    broker.holds = True
    number = 0
    while not a.links.is_congested("wb"):
        number += 1
        a.send("wb", number, size=1000)
    assert 20_000 < a.links.queued_bytes("wb") < 22_000
    assert a.links.statistics().congested_peers == 1
    assert a.ready == []
    broker.release()
    await a.until(lambda: a.ready == ["wb"])
    assert not a.links.is_congested("wb")
    await b.until(lambda: len(b.received) == number)
    assert a.links.statistics().congested_peers == 0


async def test_the_end_of_a_congested_link_frees_its_senders(broker: Broker) -> None:
    a = Member(broker, "ia", LinkSettings(window_bytes=10_000, congested_bytes=20_000, ready_bytes=10_000))
    while not a.links.is_congested("wb"):
        a.send("wb", 1, size=1000)
    a.links.give_up("wb", "dead")
    await a.until(lambda: a.ready == ["wb"])
    assert a.ended == [("wb", "dead")]


async def test_a_peer_that_was_given_up_is_told_and_both_begin_anew(broker: Broker) -> None:
    a, b = await connected(broker)
    a.links.give_up("wb", "its lease is gone")
    assert a.ended == [("wb", "its lease is gone")]
    assert a.links.peers() == []
    await b.until(lambda: b.ended == [("ia", RESET)])
    b.send("ia", 7)
    await a.until(lambda: a.received == [("wb", 7)])
    a.send("wb", 8)
    await b.until(lambda: b.received == [("ia", 8)])
    assert a.links.statistics().ended_count == 1
    # Nobody is there any more to be given up.
    a.links.give_up("wc", "never heard of")
    assert len(a.ended) == 1


async def test_late_blobs_of_a_forgotten_link_are_refused(broker: Broker) -> None:
    a, b = await connected(broker)
    late: list[bytes] = []
    broker.loses = lambda blob: late.append(blob) is None
    b.send("ia", 5)
    await until(lambda: bool(late))
    a.links.give_up("wb", "dead")
    await until(lambda: repr(a.links) == "<Links of ia: 0 peers>")
    broker.loses = lambda blob: False
    a.links.receive_blob(late[0])
    await b.until(lambda: b.ended == [("ia", RESET)])
    assert a.received == []


async def test_memories_are_bounded_and_the_oldest_goes(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "_MEMORIES_MAX", 3)
    a = Member(broker, "ia")
    for number in range(5):
        source = f"w{number}"
        a.links.receive_blob(build_blob(BlobKind.DATA, source=source, stream=9, sequence=1))
        a.links.give_up(source, "dead")
        await until(lambda: not a.links._links)
    assert list(a.links._memories) == ["w2", "w3", "w4"]


async def test_pings_are_answered_and_show_when_a_peer_was_heard(broker: Broker) -> None:
    a, _ = await connected(broker)
    before = a.links.heard_from("wb")
    assert before > 0
    assert a.links.heard_from("wc") == float("-inf")
    await asyncio.sleep(0.002)
    a.links.ping("wb")
    await until(lambda: a.links.heard_from("wb") > before)
    assert [decode_blob(blob).kind for blob in broker.blobs_from("wb")] == [BlobKind.PONG]
    # Somebody we have no link with may be asked, too.
    a.links.ping("wc")
    await until(lambda: broker.pushes[-1][1] == "wc")


async def test_leaving_waits_for_the_acknowledgements(broker: Broker) -> None:
    a, b = await connected(broker)
    a.send("wb", 2, 3)
    await a.links.leave(5.0)
    assert b.received == [("ia", 2), ("ia", 3)]
    assert b.ended == [("ia", LEFT)]
    assert b.links.peers() == []
    assert a.ended == []
    # Closed: nothing is taken or sent any more.
    count = len(broker.blobs_from("ia"))
    a.send("wb", 4)
    a.links.receive_blob(build_blob(BlobKind.PING, source="wb"))
    await asyncio.sleep(0.01)
    assert len(broker.blobs_from("ia")) == count
    assert a.links.statistics().dropped_frames == 1


async def test_who_sends_to_a_peer_that_has_left_is_told_again(broker: Broker) -> None:
    a, b = await connected(broker)
    await a.links.leave(5.0)
    await until(lambda: not b.links._links)
    b.ended.clear()
    b.send("ia", 5, 6)
    assert b.ended == []  # never from within send
    await b.until(lambda: b.ended == [("ia", LEFT)])
    assert b.links.statistics().dropped_frames == 2
    await until(lambda: not b.links._links)


async def test_a_peer_that_comes_while_we_leave_is_told(broker: Broker) -> None:
    a, _ = await connected(broker)
    broker.holds = True
    leaving = asyncio.create_task(a.links.leave(5.0))
    await asyncio.sleep(0)
    c = Member(broker, "wc")
    a.links.receive_blob(
        build_blob(BlobKind.DATA, source="wc", stream=1, sequence=1, frames=[build_group_send("1", b"")])
    )
    await a.until(lambda: a.received == [("wc", 1)])
    broker.release()
    await leaving
    assert c.ended == [("ia", LEFT)]


async def test_leaving_ends_at_the_timeout_and_says_so(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    a = Member(broker, "ia")
    a.send("wb", 1)
    await a.links.leave(0.05)
    assert "1 peers have not acknowledged our goodbye in 0.1 s" in caplog.text
    count = len(broker.pushes)
    await asyncio.sleep(0.1)
    assert len(broker.pushes) == count


async def test_leaving_without_peers_needs_no_time(broker: Broker) -> None:
    a = Member(broker, "ia")
    async with asyncio.timeout(1):
        await a.links.leave(60.0)


async def test_a_cancelled_leave_closes_all_the_same(broker: Broker) -> None:
    a = Member(broker, "ia")
    a.send("wb", 1)
    leaving = asyncio.create_task(a.links.leave(60.0))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert "closed" in repr(a.links)


async def test_unreadable_blobs_are_counted_and_logged_once_in_an_interval(
    broker: Broker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links_module, "_LOG_INTERVAL_S", 60.0)
    a, _ = await connected(broker)
    other_version = bytearray(build_blob(BlobKind.PING, source="wb"))
    other_version[1] = 2
    for data in (bytes(other_version), b"junk", build_blob(BlobKind.DATA, source="wb", sequence=1)):
        a.links.receive_blob(data)
    a.links.receive_blob(build_blob(BlobKind.PING, source="ia"))
    assert a.links.statistics().unreadable_blobs == 4
    assert [record.getMessage() for record in caplog.records] == [
        "<Links of ia: 1 peers>: a blob cannot be read: link blob has version 2, this release reads 1"
    ]


async def test_a_faulty_callback_is_logged_and_the_next_frame_delivered(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await connected(broker)

    def fail_at_2(peer: str, frame: list[Any]) -> None:
        if frame[1] == "2":
            raise ValueError("a bug")

    b.on_frame = fail_at_2
    a.send("wb", 1, 2, 3)
    await b.until(lambda: b.received == [("ia", 1), ("ia", 2), ("ia", 3)])
    assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_there_is_no_link_to_oneself(broker: Broker) -> None:
    a = Member(broker, "ia")
    with pytest.raises(WireError, match="ia has no link to itself"):
        a.send("ia", 1)


async def test_counters_of_former_links_are_kept(broker: Broker) -> None:
    a, b = await connected(broker)
    a.send("wb", 2)
    await b.until(lambda: b.received == [("ia", 2)])
    before = a.links.statistics()
    assert before.peers == 1
    a.links.give_up("wb", "dead")
    await until(lambda: a.links.statistics().peers == 0)
    after = a.links.statistics()
    assert after.sent_blobs == before.sent_blobs == 2
    assert after.taken_frames == before.taken_frames == 1
    assert after.ended_count == 1
