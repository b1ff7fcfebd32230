"""A worker on a layer in memory: what it takes, claims, answers and ends."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from channel_layer.codec import encode_event
from channel_layer.errors import BrokerUnavailable
from channel_layer.frames import FrameKind, Outcome
from tests.worker.support import INTERFACE, FakeInterface, FakeLayer, http_scope, make_opening, turns, websocket_scope
from worker import process as process_module
from worker.process import OPENINGS_AT_ONCE, WorkerProcess
from worker.settings import HTTP_CHANNEL, WEBSOCKET_CHANNEL, WorkerSettings

REQUEST = {"type": "http.request", "body": b"", "more_body": False}
CONNECT = {"type": "websocket.connect"}


class Application:
    """Records its scopes; each call waits until it is released, or for the disconnect."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.events: list[Any] = []
        self.release = asyncio.Event()
        self.when_called: Callable[[], object] = lambda: None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.when_called()
        if scope["type"] == "websocket":
            self.events.append(await receive())
            await send({"type": "websocket.accept"})
            while self.events[-1]["type"] != "websocket.disconnect":
                self.events.append(await receive())
            return
        await self.release.wait()
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})


class Bench:
    def __init__(self, **settings: Any) -> None:
        self.layer = FakeLayer()
        self.application = Application()
        self.state: dict[str, Any] = {"shared": [], "value": 1}
        self.process = WorkerProcess(
            WorkerSettings(redis_url="redis://unused", application="unused:app", **settings),
            application=self.application,
            layer=self.layer,  # type: ignore[arg-type]
            state=self.state,
        )

    async def open(self, scope: dict[str, Any] | None = None, connection: int = 1, **opening: Any) -> None:
        opening.setdefault("first", REQUEST)
        await self.layer.offer(make_opening(scope or http_scope(), connection=connection, **opening))
        await turns()

    def frame(
        self, kind: FrameKind, connection: int = 1, *fields: Any, epoch: int = 1, peer: str = INTERFACE
    ) -> None:
        self.process.frame_received(peer, [int(kind), connection, epoch, *fields])

    def kinds(self) -> list[FrameKind]:
        return [FrameKind(frame[0]) for frame in self.layer.take()]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    bench.process.start()
    yield bench
    await bench.process.stop(0)


async def test_a_safe_request_is_claimed_and_runs_before_the_grant(bench: Bench) -> None:
    await bench.open()
    assert bench.layer.frames == [[INTERFACE, int(FrameKind.CLAIM), 1, 1]]
    assert len(bench.application.scopes) == 1
    bench.application.release.set()
    await turns()
    frames = bench.layer.take()
    interface = FakeInterface()
    interface.read(frames)
    assert interface.claimed
    assert [event["type"] for event in interface.events] == ["http.response.start", "http.response.body"]
    assert interface.outcome is Outcome.RETURNED
    assert bench.process.instances() == []


async def test_an_application_that_does_not_wait_answers_in_one_frame(bench: Bench) -> None:
    bench.application.release.set()
    await bench.open()
    assert bench.layer.take() == [[int(FrameKind.ANSWER), 1, 1, 204, [], b""]]
    assert bench.process.instances() == []


async def test_openings_behind_a_first_turn_that_blocks_are_told_from_a_second_look_on(bench: Bench) -> None:
    """As the lease's thread looks, twice a second. Unsafe ones, too: their claims leave behind that turn."""
    seen: list[list[tuple[str, int, int]]] = []

    def look(*_: object) -> None:
        seen.append(bench.process.stalled_openings())

    look()
    bench.application.when_called = lambda: [look() for _ in range(3)]
    openings = [
        make_opening(http_scope(method), connection=number, first=REQUEST)
        for number, method in ((1, "GET"), (2, "POST"))
    ]
    await bench.layer.offer(*openings)
    await turns()
    look()
    both = [(INTERFACE, 1, 1), (INTERFACE, 2, 1)]
    assert seen == [[], [], both, both, []]
    bench.application.when_called = lambda: None
    await bench.layer.offer(make_opening(http_scope("POST"), connection=3, first=REQUEST))
    await turns()
    look()
    look()
    assert seen[5:] == [[], []], "nothing of it runs"


async def test_an_unsafe_request_is_answered_at_once_behind_its_grant(bench: Bench) -> None:
    bench.application.release.set()
    await bench.open(http_scope("POST"))
    assert bench.kinds() == [FrameKind.CLAIM]
    bench.frame(FrameKind.GRANT)
    await turns()
    assert bench.kinds() == [FrameKind.ANSWER]


async def test_the_answers_of_one_turn_leave_together(bench: Bench) -> None:
    """A link pushes at the end of the turn in which it was first given something, and then waits for the broker."""
    bench.application.release.set()
    first_push: list[list[Any]] = []
    link_send = bench.layer.link_send

    def send_and_push(peer: str, frame: bytes) -> None:
        if not bench.layer.frames:
            asyncio.get_running_loop().call_soon(lambda: first_push.extend(bench.layer.frames))
        link_send(peer, frame)

    bench.layer.link_send = send_and_push  # type: ignore[method-assign]
    await bench.layer.offer(*(make_opening(http_scope(), connection=number, first=REQUEST) for number in (1, 2)))
    await turns()
    assert [frame[1:3] for frame in first_push] == [[int(FrameKind.ANSWER), 1], [int(FrameKind.ANSWER), 2]]


@pytest.mark.parametrize("verdict", [FrameKind.GRANT, FrameKind.CLOSED])
async def test_the_answer_to_the_claim_of_a_call_that_is_over_is_not_answered(
    bench: Bench, verdict: FrameKind
) -> None:
    await bench.open()
    bench.application.release.set()
    await turns()
    assert bench.kinds() == [FrameKind.CLAIM, FrameKind.ANSWER]
    bench.frame(verdict)
    assert bench.layer.frames == []
    assert bench.process.statistics().unknown_connection_count == 0
    bench.frame(FrameKind.GRANT)  # only one is due
    assert bench.kinds() == [FrameKind.CLOSED]


async def test_answers_that_are_due_are_forgotten_with_their_interface_server(bench: Bench) -> None:
    await bench.open()
    bench.application.release.set()
    await turns()
    bench.layer.take()
    bench.process.peer_ended(INTERFACE, "killed")
    bench.frame(FrameKind.GRANT)
    assert bench.kinds() == [FrameKind.CLOSED]


@pytest.mark.parametrize(
    ("scope", "is_safe"),
    [
        (http_scope("GET"), True),
        (http_scope("HEAD"), True),
        (http_scope("OPTIONS"), True),
        (http_scope("POST"), False),
        (http_scope("PUT"), False),
        (http_scope("DELETE"), False),
        (http_scope("PATCH"), False),
        (http_scope("TRACE"), False),
        (http_scope("BREW"), False),
        (websocket_scope(), False),
    ],
)
async def test_what_is_not_safe_waits_for_the_grant(bench: Bench, scope: dict[str, Any], is_safe: bool) -> None:
    await bench.open(scope, first=REQUEST if scope["type"] == "http" else CONNECT)
    assert bench.kinds() == [FrameKind.CLAIM]
    assert len(bench.application.scopes) == is_safe
    bench.frame(FrameKind.GRANT)
    await turns()
    assert len(bench.application.scopes) == 1
    statistics = bench.process.statistics()
    assert (statistics.opened_count, statistics.granted_count, statistics.waiting_for_grant_count) == (1, 1, 0)


async def test_the_scope_has_tuples_and_a_state_of_its_own(bench: Bench) -> None:
    await bench.open(connection=1)
    await bench.open(connection=2)
    first, second = bench.application.scopes
    assert first["headers"] == [(b"host", b"example.org")]
    assert (first["client"], first["server"]) == (("127.0.0.1", 50000), ("127.0.0.1", 8000))
    assert first["state"] == bench.state
    assert first["state"] is not second["state"]
    assert first["state"]["shared"] is second["state"]["shared"]  # shallow, ASGI "Lifespan State"


async def test_client_and_server_may_be_unknown(bench: Bench) -> None:
    await bench.open(http_scope(client=None, server=["/run/socket", None]))
    (scope,) = bench.application.scopes
    assert (scope["client"], scope["server"]) == (None, ("/run/socket", None))


async def test_a_refused_claim_is_dropped(bench: Bench) -> None:
    await bench.open(http_scope("POST"))
    bench.frame(FrameKind.CLOSED)
    await turns()
    assert bench.application.scopes == []
    assert bench.kinds() == [FrameKind.CLAIM]  # CLOSED is not answered
    assert bench.process.statistics().refused_count == 1
    assert bench.process.instances() == []


async def test_a_running_call_whose_claim_is_refused_is_cancelled(bench: Bench) -> None:
    await bench.open()
    bench.frame(FrameKind.CLOSED)
    await turns()
    assert bench.process.instances() == []
    assert bench.kinds() == [FrameKind.CLAIM]


async def test_a_claim_without_answer_is_given_up_and_a_late_grant_is_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_module, "GRANT_TIMEOUT_S", 0.02)
    bench = Bench()
    bench.process.start()
    await bench.open(http_scope("POST"))
    await bench.process._wait_idle(5, None)
    assert bench.process.statistics().grant_timeout_count == 1
    assert "did not answer the claim" in caplog.text
    assert bench.kinds() == [FrameKind.CLAIM]
    bench.frame(FrameKind.GRANT)
    await turns()
    assert bench.layer.take() == [[int(FrameKind.CLOSED), 1, 1]]
    assert bench.application.scopes == []
    await bench.process.stop(0)


async def test_the_clock_of_claims_stands_still_while_the_broker_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "GRANT_TIMEOUT_S", 0.02)
    bench = Bench()
    bench.process.start()
    link_send = bench.layer.link_send

    def send_and_lose_the_broker(peer: str, frame: bytes) -> int:
        position = link_send(peer, frame)
        bench.process.broker_changed(False)  # right behind the claim: later, its time may be over already
        return position

    bench.layer.link_send = send_and_lose_the_broker  # type: ignore[method-assign]
    await bench.open(http_scope("POST"))
    await asyncio.sleep(0.05)
    assert bench.process.statistics().waiting_for_grant_count == 1
    bench.process.broker_changed(True)
    bench.frame(FrameKind.GRANT)
    await turns()
    assert len(bench.application.scopes) == 1
    await bench.process.stop(0)


async def test_a_claim_is_not_late_while_its_interface_server_lives_on_a_shard_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_module, "GRANT_TIMEOUT_S", 0.02)
    bench = Bench()
    bench.process.start()
    bench.layer.unreachable = {INTERFACE}
    await bench.open(http_scope("POST"))
    await asyncio.sleep(0.1)
    assert bench.process.statistics().waiting_for_grant_count == 1
    bench.layer.unreachable = set()
    await bench.process._wait_idle(5, None)
    assert bench.process.statistics().grant_timeout_count == 1
    await bench.process.stop(0)


@pytest.mark.parametrize("second", [{}, {"first": None}])
async def test_a_second_copy_of_an_opening_is_ignored(bench: Bench, second: dict[str, Any]) -> None:
    await bench.open(http_scope("POST"))
    await bench.open(http_scope("POST"), **second)
    assert bench.kinds() == [FrameKind.CLAIM]
    assert bench.process.statistics().duplicate_count == 1
    await bench.open(http_scope("POST"), epoch=2)
    await bench.open(http_scope("POST"), interface="ianother")
    assert len(bench.process.instances()) == 3


@pytest.mark.parametrize(
    ("data", "channel"),
    [
        (b"", HTTP_CHANNEL),
        (b"\xc1", HTTP_CHANNEL),
        (b"\x93\x01\x02\x03", WEBSOCKET_CHANNEL),
    ],
)
async def test_an_unreadable_opening_is_counted_and_the_next_is_taken(
    bench: Bench, data: bytes, channel: str, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.layer.offer(data, channel=channel)
    await bench.open()
    assert bench.process.statistics().unreadable_count == 1
    assert "an opening is dropped" in caplog.text
    assert len(bench.application.scopes) == 1


async def test_openings_that_do_not_fit_their_channel_are_dropped(bench: Bench) -> None:
    await bench.layer.offer(make_opening(websocket_scope()), channel=HTTP_CHANNEL)
    await bench.layer.offer(make_opening(http_scope() | {"headers": None}))
    await bench.layer.offer(make_opening(http_scope() | {"headers": [1]}))
    broken = make_opening(http_scope(), connection=3)
    object.__setattr__(broken, "first_event", b"\xc1")
    await bench.layer.offer(broken)
    await turns()
    assert bench.process.statistics().unreadable_count == 4
    assert bench.layer.take() == []
    assert bench.process.instances() == []


# Room


async def test_no_more_is_taken_than_there_is_room() -> None:
    bench = Bench(concurrency=3, websockets_max=2)
    bench.process.start()
    for connection in range(1, 6):
        await bench.layer.offer(make_opening(http_scope(), connection=connection, first=REQUEST))
    for connection in range(11, 15):
        await bench.layer.offer(make_opening(websocket_scope(), connection=connection, first=CONNECT))
    await turns()
    statistics = bench.process.statistics()
    assert (statistics.http_count, statistics.websocket_count) == (3, 2)  # counted apart
    assert (len(bench.layer.queues[HTTP_CHANNEL]), len(bench.layer.queues[WEBSOCKET_CHANNEL])) == (2, 2)
    assert max(count for channel, count in bench.layer.asked if channel == HTTP_CHANNEL) == 3
    bench.application.release.set()
    await turns()
    assert bench.process.statistics().ended_count == 5
    assert not bench.layer.queues[HTTP_CHANNEL]
    assert len(bench.layer.queues[WEBSOCKET_CHANNEL]) == 2
    await bench.process.stop(0)


async def test_a_worker_that_stays_full_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.process.FULL_WARNING_S", 0.01)
    bench = Bench(concurrency=2)
    bench.process.start()
    for connection in (1, 2):
        await bench.layer.offer(make_opening(http_scope(), connection=connection, first=REQUEST))
    async with asyncio.timeout(30):
        while not caplog.messages:  # noqa: ASYNC110 - there is no event for a line of the log
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert caplog.messages == ["nothing is taken before one of 2 http connections ends: --concurrency"]
    bench.application.release.set()
    await turns()
    await bench.process.stop(0)


async def test_at_most_eight_are_asked_for_at_once(bench: Bench) -> None:
    await turns()
    assert {count for _, count in bench.layer.asked} == {OPENINGS_AT_ONCE}


async def test_a_worker_that_is_behind_takes_more_at_once_until_it_is_not(bench: Bench) -> None:
    await bench.layer.offer(
        *(make_opening(http_scope(), connection=number, first=REQUEST) for number in range(1, 8 + 16 + 32 + 31 + 1))
    )
    await turns()
    counts = [count for channel, count in bench.layer.asked if channel == HTTP_CHANNEL]
    assert counts == [8, 16, 32, 32, 8]


async def offer_together(bench: Bench, first: int, count: int) -> list[int]:
    """Offer openings that are taken at once; return how many were asked for since, by what came of them."""
    numbers = range(first, first + count)
    await bench.layer.offer(*(make_opening(http_scope(), connection=number, first=REQUEST) for number in numbers))
    await turns()
    return [asked for channel, asked in bench.layer.asked if channel == HTTP_CHANNEL]


def stop_clock(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """Let each reading of the clock that times first turns be so much later than the one before."""
    now = itertools.count()
    monkeypatch.setattr(process_module, "perf_counter", lambda: next(now) * step_s)


async def test_an_application_that_answers_at_once_has_twice_as_many_taken(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_clock(monkeypatch, 0.0001)
    bench.application.release.set()
    # The count for the next take is asked for before the first turns of this one.
    assert await offer_together(bench, 1, 6) == [8, 8]
    assert await offer_together(bench, 10, 6) == [8, 8, 12]
    assert await offer_together(bench, 20, 12) == [8, 8, 12, 24]  # full: 24 as ever
    assert await offer_together(bench, 40, 20) == [8, 8, 12, 24, 24]
    assert await offer_together(bench, 60, 20) == [8, 8, 12, 24, 24, 32]  # OPENINGS_AT_ONCE_MAX
    assert await offer_together(bench, 90, 1) == [8, 8, 12, 24, 24, 32, 32]
    assert (await offer_together(bench, 91, 1))[-2:] == [32, OPENINGS_AT_ONCE]  # one is no proof


async def test_one_request_that_waits_has_eight_taken_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_clock(monkeypatch, 0.0001)
    bench.application.release.set()
    for number in (1, 10):
        await offer_together(bench, number, 7)
    assert (await offer_together(bench, 20, 7))[-1] == 14
    bench.application.release.clear()
    await offer_together(bench, 30, 1)
    assert (await offer_together(bench, 31, 1))[-1] == OPENINGS_AT_ONCE


async def test_an_unsafe_request_among_them_has_eight_taken(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_clock(monkeypatch, 0.0001)
    bench.application.release.set()
    openings = [make_opening(http_scope(), connection=number, first=REQUEST) for number in range(1, 7)]
    await bench.layer.offer(*openings, make_opening(http_scope("POST"), connection=7, first=REQUEST))
    await turns()
    assert (await offer_together(bench, 10, 1))[-1] == OPENINGS_AT_ONCE


async def test_no_more_is_taken_than_is_answered_in_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_clock(monkeypatch, process_module.QUICK_TAKE_S / 2)
    bench.application.release.set()
    for number in (1, 10):
        await offer_together(bench, number, 5)  # 10 in time
    assert (await offer_together(bench, 20, 5))[-1] == 10
    stop_clock(monkeypatch, process_module.QUICK_TAKE_S)
    await offer_together(bench, 30, 5)
    assert (await offer_together(bench, 40, 5))[-1] == OPENINGS_AT_ONCE


async def test_only_the_channels_of_the_settings_are_served() -> None:
    bench = Bench(channels=(WEBSOCKET_CHANNEL,))
    bench.process.start()
    await bench.open()
    assert bench.layer.frames == []
    assert {channel for channel, _ in bench.layer.asked} == {WEBSOCKET_CHANNEL}
    await bench.process.stop(0)


# Trouble with the broker


async def test_taking_goes_on_after_the_broker_was_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "TAKE_RETRY_S", 0.001)
    bench = Bench()
    bench.layer.fail_next_take()
    bench.layer.fail_next_take(BrokerUnavailable("still away"))
    called = asyncio.Event()
    bench.application.when_called = called.set
    bench.process.start()
    await bench.layer.offer(make_opening(http_scope(), first=REQUEST))
    await asyncio.wait_for(called.wait(), 60)
    assert len(bench.application.scopes) == 1
    await bench.process.stop(0)


async def test_nothing_is_asked_for_while_the_broker_is_away() -> None:
    bench = Bench()
    bench.process.broker_changed(False)
    bench.process.start()
    await turns()
    assert bench.layer.asked == []
    bench.process.broker_changed(True)
    await turns()
    assert len(bench.layer.asked) == 2
    await bench.process.stop(0)


async def test_an_unexpected_error_ends_the_worker_instead_of_leaving_it_idle() -> None:
    bench = Bench()
    error = RuntimeError("a fault of ours")
    bench.layer.fail_next_take(error)
    bench.process.start()
    assert await asyncio.wait_for(bench.process.wait_failed(), 30) is error
    await bench.process.stop(0)


# Frames


@pytest.mark.parametrize(
    ("kind", "fields", "answered"),
    [
        (FrameKind.GRANT, [], True),
        (FrameKind.EVENT, [b"x"], True),
        (FrameKind.PIECE, [b"x"], True),
        (FrameKind.CLOSED, [], False),
        (FrameKind.LAST, [b"x"], False),
        (FrameKind.GONE, [], False),
        (FrameKind.CREDIT, [5], False),
    ],
)
async def test_frames_of_unknown_connections(
    bench: Bench, kind: FrameKind, fields: list[Any], answered: bool
) -> None:
    bench.frame(kind, 7, *fields)
    assert bench.layer.frames == ([[INTERFACE, int(FrameKind.CLOSED), 7, 1]] if answered else [])
    assert bench.process.statistics().unknown_connection_count == 1


async def test_a_frame_of_another_epoch_is_not_for_this_instance(bench: Bench) -> None:
    await bench.open(http_scope("POST"), epoch=2)
    bench.layer.take()
    bench.frame(FrameKind.GRANT, epoch=1)
    assert bench.layer.take() == [[int(FrameKind.CLOSED), 1, 1]]
    assert bench.application.scopes == []


@pytest.mark.parametrize("frame", [[int(FrameKind.CLAIM), 1, 1], [int(FrameKind.STATE), 1, 1], [99]])
async def test_frames_that_are_not_for_workers_are_counted(bench: Bench, frame: list[Any]) -> None:
    bench.process.frame_received(INTERFACE, frame)
    assert bench.process.statistics().unreadable_count == 1
    assert bench.layer.frames == []


async def test_events_credit_and_disconnect_reach_their_instance(bench: Bench) -> None:
    interfaces = {connection: FakeInterface(connection) for connection in (1, 2)}
    for connection, interface in interfaces.items():
        await bench.open(websocket_scope(), connection=connection, first=CONNECT)
        interface.event(CONNECT)
        bench.frame(FrameKind.GRANT, connection)
    await turns()
    message = {"type": "websocket.receive", "text": "to 2"}
    for frame in interfaces[2].event(message):
        bench.process.frame_received(INTERFACE, frame)
    bench.frame(FrameKind.CREDIT, 2, 64)
    gone = {"type": "websocket.disconnect", "code": 1001, "reason": ""}
    bench.frame(FrameKind.GONE, 1)
    bench.frame(FrameKind.LAST, 1, encode_event(gone))
    await turns()
    assert bench.application.events == [CONNECT, CONNECT, message, gone]
    assert [instance.connection for instance in bench.process.instances()] == [2]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (FrameKind.EVENT, [b"\xc1"]),
        (FrameKind.LAST, [b"\x01"]),
        (FrameKind.CREDIT, [10**9]),
        (FrameKind.PIECE, [b""]),
    ],
)
async def test_a_faulty_peer_costs_the_connection(
    bench: Bench, kind: FrameKind, fields: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    await bench.open(websocket_scope(), first=CONNECT)
    bench.frame(FrameKind.GRANT)
    await turns()
    bench.layer.take()
    bench.frame(kind, 1, *fields)
    await turns()
    assert bench.kinds() == [FrameKind.CLOSED]
    assert bench.application.events[-1]["code"] == 1006
    assert bench.process.instances() == []
    assert "is given up" in caplog.text


async def test_the_end_of_an_interface_server_ends_its_connections_and_no_others(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.open(websocket_scope(), connection=1, first=CONNECT)
    await bench.open(websocket_scope(), connection=2, first=CONNECT, interface="ianother")
    await bench.open(http_scope("POST"), connection=3)  # not granted
    bench.frame(FrameKind.GRANT, 1)
    bench.frame(FrameKind.GRANT, 2, peer="ianother")
    await turns()
    bench.layer.take()
    bench.process.peer_ended(INTERFACE, "killed")
    bench.process.peer_ended("iunknown", "killed")
    await turns()
    assert [instance.connection for instance in bench.process.instances()] == [2]
    assert bench.application.events[-1] == {"type": "websocket.disconnect", "code": 1006, "reason": ""}
    assert bench.layer.frames == []
    assert "2 connections" in caplog.text


async def test_senders_go_on_when_the_link_has_room_again(bench: Bench) -> None:
    bench.layer.congested = True
    await bench.open()
    bench.application.release.set()
    await turns()
    assert bench.kinds() == [FrameKind.CLAIM]
    bench.layer.congested = False
    bench.process.peer_ready("iunknown")
    bench.process.peer_ready(INTERFACE)
    await turns()
    assert bench.kinds() == [FrameKind.EVENT, FrameKind.EVENT, FrameKind.END]


async def test_epoch_of_a_reply_channel(bench: Bench) -> None:
    channel = f"interface.{INTERFACE}!1"
    assert bench.process.epoch_of(channel) == 0
    await bench.open(http_scope("POST"), epoch=4)
    assert bench.process.epoch_of(channel) == 4
    bench.frame(FrameKind.CLOSED, epoch=4)
    assert bench.process.epoch_of(channel) == 0


# Stopping


async def test_stop_takes_nothing_more_and_leaves_openings_to_others(bench: Bench) -> None:
    assert await bench.process.stop(1) == 0
    await bench.open()
    assert len(bench.layer.queues[HTTP_CHANNEL]) == 1
    assert bench.layer.frames == []


async def test_stop_lets_http_finish_and_closes_websockets_1012_towards_its_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "DRAIN_CLOSES_FROM", 0.05)  # far from the end, where a machine may stall
    await bench.open(http_scope(), connection=1)
    await bench.open(http_scope("POST"), connection=2)  # its grant is on the way
    await bench.open(websocket_scope(), connection=3, first=CONNECT)
    await bench.open(websocket_scope(), connection=4, first=CONNECT)  # likewise
    bench.frame(FrameKind.GRANT, 3)
    await turns()
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    stopping = asyncio.create_task(bench.process.stop(60))
    await turns()
    bench.frame(FrameKind.GRANT, 2)
    bench.frame(FrameKind.GRANT, 4)
    await turns()
    assert [
        INTERFACE,
        int(FrameKind.CLOSED),
        4,
        1,
    ] in bench.layer.frames  # so that its interface server knows at once
    bench.application.release.set()
    await turns()
    assert not stopping.done()
    assert bench.application.events == [CONNECT]
    assert await stopping == 0
    assert 60 * 0.05 - 0.1 <= loop.time() - began_at < 60  # with the last instance
    assert bench.application.events[-1]["code"] == 1012
    frames = bench.layer.take()
    assert {frame[1] for frame in frames if frame[0] == FrameKind.ANSWER} == {1, 2}
    assert [frame[1:] for frame in frames if frame[0] == FrameKind.END] == [[3, 1, Outcome.CANCELLED]]


async def test_stop_closes_websockets_one_after_the_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only waiting moves: a machine that stalls would have all closed at once."""
    for connection in range(1, 21):
        await bench.open(websocket_scope(), connection=connection, first=CONNECT)
        bench.frame(FrameKind.GRANT, connection)
    await turns()
    bench.layer.take()
    at: list[float] = []
    now = 0.0
    link_send = bench.layer.link_send

    def send(peer: str, frame: bytes) -> None:
        link_send(peer, frame)
        if bench.layer.frames[-1][1] == FrameKind.END:
            at.append(now)

    async def wait_idle(timeout_s: float, at_once: asyncio.Event | None) -> None:
        nonlocal now
        await turns()
        now += timeout_s

    bench.layer.link_send = send  # type: ignore[method-assign]
    monkeypatch.setattr(bench.process, "_wait_idle", wait_idle)
    monkeypatch.setattr(bench.process, "_loop", SimpleNamespace(time=lambda: now))
    assert await bench.process.stop(1) == 0
    assert len(at) == 20
    portions = [sum(1 for other in at if abs(other - time) < 0.02) for time in at]
    assert max(portions) <= 15, at  # not in one go
    assert at[-1] - at[0] > 0.08


async def test_stop_at_once_closes_websockets_at_once(bench: Bench) -> None:
    await bench.open(websocket_scope(), first=CONNECT)
    bench.frame(FrameKind.GRANT)
    await turns()
    at_once = asyncio.Event()
    stopping = asyncio.create_task(bench.process.stop(1000, at_once=at_once))
    await turns()
    assert bench.application.events == [CONNECT]
    at_once.set()
    assert await asyncio.wait_for(stopping, 30) == 0
    assert bench.application.events[-1]["code"] == 1012


async def test_stop_cancels_what_does_not_finish(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    await bench.open()
    bench.frame(FrameKind.GRANT)
    assert await bench.process.stop(0.01) == 0
    assert bench.layer.take()[-1] == [int(FrameKind.END), 1, 1, int(Outcome.CANCELLED)]
    assert "0.01 s were not enough" in caplog.text


async def test_stop_at_once_does_not_wait(bench: Bench) -> None:
    await bench.open()
    at_once = asyncio.Event()
    stopping = asyncio.create_task(bench.process.stop(1000, at_once=at_once))
    await turns()
    assert not stopping.done()
    at_once.set()
    await asyncio.wait_for(stopping, 30)


async def test_stop_tells_of_applications_that_refuse_to_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_module, "CANCEL_TIMEOUT_S", 0.01)
    bench = Bench()
    go = asyncio.Event()

    async def stubborn(scope: Any, receive: Any, send: Any) -> None:
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue

    bench.process._application = stubborn
    bench.process.start()
    await bench.open()
    caplog.set_level(logging.ERROR)
    assert await bench.process.stop(0.01) == 1
    assert "GET / does not end although it was cancelled" in caplog.text
    go.set()
    await turns()
    assert bench.process.instances() == []


def test_python_looks_for_garbage_less_often_unless_the_application_has_its_own_idea() -> None:
    before = gc.get_threshold()
    try:
        process_module.spare_collections()
        assert gc.get_threshold() == process_module.GC_THRESHOLDS
        gc.set_threshold(1234, 5, 6)
        process_module.spare_collections()
        assert gc.get_threshold() == (1234, 5, 6)
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


async def test_statistics_and_repr(bench: Bench) -> None:
    await bench.open(http_scope("POST"))
    statistics = bench.process.statistics()
    assert (statistics.http_count, statistics.opened_count, statistics.waiting_for_grant_count) == (1, 1, 1)
    assert repr(bench.process) == "<WorkerProcess wtestworker: 1 http, 0 websocket>"
