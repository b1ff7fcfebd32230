"""One application call between a recorded link and injected frames."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import weakref
from types import MappingProxyType
from typing import Any

import msgpack
import pytest

from channel_layer.codec import decode_event, encode_event
from channel_layer.connection import FlowControlError
from channel_layer.frames import FrameKind, Outcome
from channel_layer.turns import Turns
from tests.worker.support import (
    FakeInterface,
    FakeLink,
    http_scope,
    make_opening,
    turns,
    websocket_scope,
)
from worker.events import ClientDisconnected, InvalidEvent, State
from worker.instance import TURN_EVENTS_MAX, Instance, Phase

START = {"type": "http.response.start", "status": 200, "headers": []}
REQUEST = {"type": "http.request", "body": b"", "more_body": False}
CONNECT = {"type": "websocket.connect"}
DISCONNECT = {"type": "http.disconnect"}
GOING_AWAY = {"type": "websocket.disconnect", "code": 1001, "reason": "bye"}


def body(data: bytes, more_body: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more_body}


class Bench:
    """An instance, its link, and the interface server's side of the connection."""

    def __init__(
        self,
        application: Any,
        scope: dict[str, Any] | None = None,
        *,
        close_timeout_s: float = 10.0,
        started: bool = True,
        turns: Turns | None = None,
        **opening: Any,
    ) -> None:
        self.link = FakeLink()
        self.interface = FakeInterface()
        self.ended: list[Instance] = []
        self.ending = asyncio.Event()
        scope = scope if scope is not None else http_scope()
        if scope["type"] == "http":
            opening.setdefault("first", REQUEST)
        self.instance = Instance(
            make_opening(scope, **opening),
            application=application,
            link=self.link,
            loop=asyncio.get_running_loop(),
            close_timeout_s=close_timeout_s,
            ended=self._instance_ended,
            turns=turns,
        )
        if opening.get("first") is not None:
            self.interface.event(opening["first"])  # counted there, carried by the opening
        if started:
            self.instance.grant()

    def _instance_ended(self, instance: Instance) -> None:
        self.ended.append(instance)
        self.ending.set()

    def deliver(self, *frames: list[Any]) -> None:
        for frame in frames:
            kind = frame[0]
            if kind in (FrameKind.EVENT, FrameKind.PIECE):
                self.instance.event_received(kind, frame[3])
            elif kind == FrameKind.CREDIT:
                self.instance.credit_received(frame[3])
            elif kind == FrameKind.LAST:
                self.instance.last_received(frame[3])

    def event(self, event: dict[str, Any]) -> None:
        self.deliver(*self.interface.event(event))

    def disconnect(self, event: dict[str, Any]) -> None:
        self.instance.client_gone()
        self.deliver(*self.interface.last(event))

    async def settle(self) -> list[dict[str, Any]]:
        """Run until nothing moves, the client reading everything; return all events it got so far."""
        await turns()
        while frames := self.link.take():
            self.deliver(*self.interface.read(frames))
            await turns()
        return self.interface.events

    async def over(self) -> Outcome | None:
        await self.settle()
        assert self.ended == [self.instance]
        assert self.instance.phase is Phase.ENDED
        return self.interface.outcome


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send(START)
    await send(body(b"hello"))


async def test_a_response_and_its_end() -> None:
    bench = Bench(hello)
    assert await bench.settle() == [START, body(b"hello")]
    assert await bench.over() is Outcome.RETURNED
    assert "ended, COMPLETE" in repr(bench.instance)


async def test_websocket_messages_may_travel_with_equal_ones_and_nothing_else_does() -> None:
    sent = [
        {"type": "websocket.accept"},
        {"type": "websocket.send", "text": "one"},
        {"type": "websocket.send", "bytes": b"two"},
        {"type": "websocket.send", "bytes": b"." * 100_000},
        {"type": "websocket.send", "text": "three", "bytes": None},
        {"type": "websocket.close"},
    ]

    async def application(scope: Any, receive: Any, send: Any) -> None:
        for event in sent:
            await send(event)

    bench = Bench(application, websocket_scope())
    assert [event["type"] for event in await bench.settle()] == [event["type"] for event in sent]
    assert [decode_event(payload) for payload in bench.link.shareable] == [
        {"type": "websocket.send", "text": "one"},
        {"type": "websocket.send", "bytes": b"two"},
        {"type": "websocket.send", "text": "three"},
    ]
    # Each behind the last frame of this connection whose order counts.
    assert bench.link.behind == [1, 2, 5]


async def test_a_message_that_no_client_can_get_is_refused_where_it_is_sent() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        for wrong in ({"text": "\ud800"}, {"text": 1}, {"text": "a", "bytes": b"b"}, {}):
            with pytest.raises(InvalidEvent):
                await send({"type": "websocket.send", **wrong})
        with pytest.raises(InvalidEvent):
            await send(["websocket.send"])
        await send(MappingProxyType({"type": "websocket.send", "text": "right"}))

    bench = Bench(application, websocket_scope())
    assert (await bench.settle())[1:] == [{"type": "websocket.send", "text": "right"}]


async def test_start_and_body_leave_in_one_turn_and_send_does_not_wait() -> None:
    bench = Bench(hello)
    await asyncio.sleep(0)  # one turn: the call runs to its end
    kinds = [frame[0] for frame in bench.link.take()]
    assert kinds == [FrameKind.ANSWER]


async def test_a_call_that_goes_on_behind_its_response_sends_it_at_the_end_of_the_turn() -> None:
    goes_on = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await hello(scope, receive, send)
        await goes_on.wait()

    bench = Bench(application)
    await turns()
    assert [frame[0] for frame in bench.link.take()] == [FrameKind.EVENT, FrameKind.EVENT]
    goes_on.set()
    await turns()
    assert [frame[0] for frame in bench.link.take()] == [FrameKind.END]


async def test_the_window_is_the_one_the_opening_names() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        while True:
            await send(body(bytes(1000), more_body=True))

    bench = Bench(application, window_bytes=16 * 1024)
    await turns()
    sent = sum(len(frame[3]) for frame in bench.link.take())
    assert 15 * 1024 < sent <= 16 * 1024
    bench.instance.cancel()
    await turns()


async def test_a_task_that_outlives_its_call_cannot_send() -> None:
    """Its event would go to nobody, and no credit would come back: it would wait for ever."""
    failures: list[Exception] = []
    returned = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        async def straggler() -> None:
            await returned.wait()
            try:
                await send({"type": "websocket.send", "text": "late"})
            except OSError as error:
                failures.append(error)

        await receive()
        await send({"type": "websocket.accept"})
        tasks.append(asyncio.create_task(straggler()))

    bench = Bench(application, websocket_scope(), first=CONNECT)
    assert await bench.over() is Outcome.RETURNED
    returned.set()
    await tasks[0]
    assert [type(failure) for failure in failures] == [ClientDisconnected]
    assert bench.link.take() == []


async def test_the_application_gets_scope_and_events_in_order() -> None:
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        while True:
            seen.append(await receive())
            if not seen[-1].get("more_body"):
                break
        await hello(scope, receive, send)

    first = {"type": "http.request", "body": b"a", "more_body": True}
    bench = Bench(application, http_scope("POST", "/up"), first=first)
    await turns()
    rest = [first | {"body": b"b"}, first | {"body": b"c", "more_body": False}]
    for event in rest:
        bench.event(event)
    assert await bench.over() is Outcome.RETURNED
    assert seen == ["/up", first, *rest]


async def test_nothing_runs_before_the_start_and_only_once() -> None:
    calls: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope)
        await hello(scope, receive, send)

    bench = Bench(application, started=False)
    await turns()
    assert (calls, bench.instance.phase) == ([], Phase.CLAIMED)
    bench.instance.start()
    bench.instance.grant()
    await bench.over()
    bench.instance.start()
    await turns()
    assert len(calls) == 1


async def test_a_refused_claim_never_runs_and_sends_nothing() -> None:
    bench = Bench(hello, started=False)
    bench.instance.refused("no")
    await turns()
    assert bench.ended == [bench.instance]
    assert bench.link.take() == []


async def test_a_call_started_on_the_claim_alone_is_cancelled_when_refused() -> None:
    cancelled = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    bench = Bench(application, started=False)
    bench.instance.start()
    await turns()
    bench.instance.refused("no")
    await turns()
    assert cancelled.is_set()
    assert bench.ended == [bench.instance]
    assert bench.link.take() == []  # no END either: the interface server does not know us


# Credit, towards the client


async def test_send_waits_for_the_client_and_no_frame_exceeds_the_window() -> None:
    sent: list[int] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        for number in range(64):
            await send(body(bytes(32 * 1024), more_body=True))
            sent.append(number)
        await send(body(b""))

    bench = Bench(application)
    await turns()
    assert len(sent) == 7  # 8 times 32 KiB and their keys are more than the window
    assert bench.instance.statistics().unsent_count == 1
    events = await bench.settle()
    assert sum(len(event.get("body", b"")) for event in events) == 64 * 32 * 1024
    assert await bench.over() is Outcome.RETURNED


async def test_a_send_that_a_client_interrupts_leaves_no_garbage() -> None:
    """Its error and its frame must not hold each other, or they hold what the application held until Python looks."""

    class Held:
        pass

    held: list[weakref.ref[Held]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        large = Held()
        held.append(weakref.ref(large))
        await send(START)
        while True:
            await send(body(bytes(32 * 1024), more_body=True))

    bench = Bench(application)
    await turns()
    assert bench.instance.statistics().unsent_count == 1
    gc.disable()
    try:
        bench.instance.client_gone()
        await bench.over()
        await turns()
        del bench
        assert held[0]() is None
    finally:
        gc.enable()


async def test_one_large_body_moves_through_the_window() -> None:
    data = bytes(range(256)) * 20_000  # 5 MB

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(body(data))

    bench = Bench(application)
    await turns()
    assert bench.instance.statistics().unsent_bytes <= 2 * 64 * 1024
    events = await bench.settle()
    assert b"".join(event["body"] for event in events[1:]) == data
    assert [event["more_body"] for event in events[1:]] == [True] * (len(events) - 2) + [False]
    assert await bench.over() is Outcome.RETURNED


async def test_a_websocket_message_larger_than_the_window() -> None:
    text = "ä" * 1_000_000
    echoed: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        message = await receive()
        echoed.append(message)
        await send({"type": "websocket.send", "text": message["text"]})
        await send({"type": "websocket.close"})

    bench = Bench(application, websocket_scope(), first=CONNECT)
    await bench.settle()
    frames = bench.interface.event({"type": "websocket.receive", "text": text})
    while frames:
        bench.deliver(*frames)
        await bench.settle()
        frames = [msgpack.unpackb(frame) for frame in bench.interface.outgoing.frames()]
    events = await bench.settle()
    assert echoed == [{"type": "websocket.receive", "text": text}]
    assert events[1] == {"type": "websocket.send", "text": text}
    assert await bench.over() is Outcome.RETURNED


async def test_a_congested_link_makes_send_wait_until_it_is_ready() -> None:
    sent: list[int] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        for number in range(3):
            await send(body(b"x", more_body=True))
            sent.append(number)
        await send(body(b""))

    bench = Bench(application)
    bench.link.congested = True
    await turns()
    assert (sent, bench.link.take()) == ([], [])
    bench.instance.link_ready()  # still congested
    await turns()
    assert (sent, bench.link.take()) == ([], [])
    bench.link.congested = False
    bench.instance.link_ready()
    assert await bench.over() is Outcome.RETURNED
    assert sent == [0, 1, 2]


async def test_sends_of_several_tasks_keep_their_order() -> None:
    big = 300 * 1024

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await asyncio.gather(*(send(body(bytes([number]) * big, more_body=True)) for number in range(5)))
        await send(body(b"end"))

    bench = Bench(application)
    events = await bench.settle()
    data = b"".join(event["body"] for event in events[1:])
    assert data == b"".join(bytes([number]) * big for number in range(5)) + b"end"
    assert await bench.over() is Outcome.RETURNED


async def test_what_a_cancelled_send_had_to_send_is_sent() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        first = asyncio.create_task(send(body(b"a" * 600_000, more_body=True)))
        second = asyncio.create_task(send(body(b"b" * 10, more_body=True)))
        await turns()
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.cancelled()
        assert second.cancelled()
        await send(body(b"c"))

    bench = Bench(application)
    events = await bench.settle()
    assert b"".join(event["body"] for event in events[1:]) == b"a" * 600_000 + b"b" * 10 + b"c"
    assert await bench.over() is Outcome.RETURNED


async def test_the_end_follows_what_still_waits_for_the_client() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        sending = asyncio.create_task(send(body(b"a" * 600_000)))
        await asyncio.sleep(0)
        assert not sending.done()

    bench = Bench(application)
    await turns()
    assert bench.instance.phase is Phase.FINISHING
    events = await bench.settle()  # FakeInterface fails on events behind END
    assert sum(len(event["body"]) for event in events[1:]) == 600_000
    assert await bench.over() is Outcome.RETURNED


async def test_credit_that_was_never_sent_is_refused() -> None:
    bench = Bench(hello, started=False)
    with pytest.raises(FlowControlError):
        bench.instance.credit_received(1)


# The held start


async def test_a_start_without_body_is_sent_when_the_application_waits_in_receive() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(START)
        assert (await receive())["type"] == "http.disconnect"

    bench = Bench(application)
    assert await bench.settle() == [START, body(b"", True)]  # the head is written with a body
    bench.disconnect(DISCONNECT)
    assert await bench.over() is Outcome.RETURNED


async def test_the_claim_leaves_before_a_start_without_body() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(START)
        await receive()

    bench = Bench(application, started=False)
    bench.instance.start()
    await turns()
    frames = bench.link.take()
    assert [frame[0] for frame in frames] == [FrameKind.CLAIM, FrameKind.EVENT, FrameKind.EVENT]
    bench.instance.grant()
    bench.deliver(*bench.interface.read(frames))
    bench.disconnect(DISCONNECT)
    await bench.over()


async def test_behind_a_start_that_left_alone_all_that_may_follow_a_start_may_follow() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(START)
        listening = asyncio.create_task(receive())
        await turns(5)
        with pytest.raises(InvalidEvent):
            await send(START)
        await send({"type": "http.response.pathsend", "path": "/file"})
        await listening

    bench = Bench(application, scope=http_scope(extensions={"http.response.pathsend": {}}))
    events = await bench.settle()
    assert events == [START, body(b"", True), {"type": "http.response.pathsend", "path": "/file"}]
    assert await bench.over() is Outcome.RETURNED


async def test_a_start_is_sent_when_somebody_waits_in_receive_already() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        listening = asyncio.create_task(receive())
        await turns(3)
        await send(START)
        await listening

    bench = Bench(application)
    assert await bench.settle() == [START, body(b"", True)]
    bench.disconnect(DISCONNECT)
    await bench.over()


async def test_a_start_waits_for_a_body_that_follows_it_at_once() -> None:
    """As Django's does, which listens for the disconnect meanwhile: the body, complete, gets its length."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        listening = asyncio.create_task(receive())
        await turns(3)
        await send(START)
        await send(body(b"hello"))
        await listening

    bench = Bench(application)
    assert await bench.settle() == [START, body(b"hello")]
    assert await bench.over() is Outcome.RETURNED


async def test_a_start_does_not_leave_for_a_receive_that_is_cancelled_at_once() -> None:
    """As Starlette's is_disconnected() does, which only looks."""
    seen = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(START)
        looking = asyncio.create_task(receive())
        await asyncio.sleep(0)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await turns(3)
        seen.set()
        raise ZeroDivisionError("still a clean 500")

    bench = Bench(application)
    assert await bench.over() is Outcome.RAISED
    assert seen.is_set()
    assert bench.interface.events == []


@pytest.mark.parametrize("end", ["returns", "raises"])
async def test_a_start_without_body_is_not_sent_when_the_application_ends(
    end: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        if end == "raises":
            raise ZeroDivisionError("between start and body")

    bench = Bench(application)
    outcome = await bench.over()
    assert bench.interface.events == []  # so the interface server can still answer 500
    assert outcome is (Outcome.RAISED if end == "raises" else Outcome.RETURNED)
    assert ("between start and body" if end == "raises" else "the application returned, but") in caplog.text


# Trailers


async def test_trailers_that_cannot_follow_their_body_are_taken_and_dropped() -> None:
    ready = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(START | {"trailers": True})
        await send(body(b"x"))
        await ready.wait()
        await send({"type": "http.response.trailers", "headers": [(b"a", b"1")], "more_trailers": True})
        with pytest.raises(InvalidEvent):
            await send(body(b"x"))
        await send({"type": "http.response.trailers", "headers": [(b"b", b"2")]})
        assert (await receive())["type"] == "http.disconnect"
        # Work behind the response, longer than close_timeout_s.
        await behind.wait()

    behind = asyncio.Event()
    extensions = {"http.response.trailers": {}}
    bench = Bench(application, http_scope(extensions=extensions), close_timeout_s=0.01)
    assert len(await bench.settle()) == 2
    bench.disconnect(DISCONNECT)  # the exchange is over with its body
    ready.set()
    await turns()
    timer = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, timer.set)  # behind the instance's
    await timer.wait()
    behind.set()
    assert await bench.over() is Outcome.RETURNED


# receive()


async def test_a_cancelled_receive_loses_nothing() -> None:
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(receive(), 0.001)
        waiting = asyncio.create_task(receive())
        await asyncio.sleep(0)
        ready.set()
        await arrived.wait()
        waiting.cancel()  # woken by the event, cancelled before it ran
        await asyncio.gather(waiting, return_exceptions=True)
        seen.append(waiting.cancelled())
        seen.append(await receive())

    ready, arrived = asyncio.Event(), asyncio.Event()
    bench = Bench(application, first={"type": "http.request", "body": b"", "more_body": True})
    await ready.wait()
    late = {"type": "http.request", "body": b"late", "more_body": False}
    arrived.set()
    bench.event(late)
    await bench.over()
    assert seen == [True, late]


async def test_several_receives_get_one_event_each() -> None:
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        seen.extend(await asyncio.gather(*(receive() for _ in range(4))))

    bench = Bench(application, websocket_scope(), first=CONNECT)
    await turns()
    messages = [{"type": "websocket.receive", "text": str(number)} for number in range(3)]
    for message in messages:
        bench.event(message)
    await bench.over()
    assert seen == [CONNECT, *messages]


async def test_receive_after_the_response_is_a_disconnect() -> None:
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        waiting = asyncio.create_task(receive())  # already waiting when the response is complete
        await turns(2)
        await hello(scope, receive, send)
        seen.append(await waiting)
        seen.append(await receive())
        seen.append(await receive())

    await Bench(application).over()
    assert seen == [DISCONNECT] * 3


async def test_the_disconnect_comes_behind_the_events_before_it_and_for_ever() -> None:
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        while len(seen) < 5:
            seen.append(await receive())

    go = asyncio.Event()
    bench = Bench(application, websocket_scope(), first=CONNECT)
    message = {"type": "websocket.receive", "bytes": b"1"}
    bench.event(message)
    bench.disconnect(GOING_AWAY)
    go.set()
    await bench.over()
    assert seen == [CONNECT, message, GOING_AWAY, GOING_AWAY, GOING_AWAY]
    assert seen[2] is not seen[3]  # an application may change what it got


async def test_a_waiting_receive_gets_the_disconnect() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert await receive() == DISCONNECT

    bench = Bench(application)
    await turns()
    bench.disconnect(DISCONNECT)
    assert await bench.over() is Outcome.RETURNED


async def test_a_receive_of_another_task_does_not_hang_when_the_call_is_over() -> None:
    waiting: list[asyncio.Task[Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        waiting.append(asyncio.create_task(receive()))
        await asyncio.sleep(0)
        raise ZeroDivisionError

    await Bench(application).over()
    assert await waiting[0] == DISCONNECT


async def test_credit_is_returned_as_the_application_receives() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            await step.wait()
        await hello(scope, receive, send)

    step = asyncio.Event()
    chunk = {"type": "http.request", "body": bytes(60_000), "more_body": True}
    bench = Bench(application, http_scope("POST"), first=chunk)
    await turns()
    for _ in range(3):
        bench.event(chunk)
    assert bench.interface.event(chunk) == []  # the window is used up
    await turns()
    assert bench.link.take() == []
    step.set()
    await bench.settle()
    frames = [msgpack.unpackb(frame) for frame in bench.interface.outgoing.frames()]
    assert len(frames) == 1
    bench.deliver(*frames)
    bench.event({"type": "http.request", "body": b"", "more_body": False})
    assert await bench.over() is Outcome.RETURNED


async def test_a_peer_that_exceeds_the_window_is_noticed() -> None:
    bench = Bench(hello, started=False, first=None)
    event = encode_event({"type": "http.request", "body": bytes(60_000)})
    for _ in range(4):
        bench.instance.event_received(FrameKind.EVENT, event)
    with pytest.raises(FlowControlError):
        bench.instance.event_received(FrameKind.EVENT, event)
    assert bench.instance.statistics().arrived_count == 4


@pytest.mark.parametrize("asked", [True, False])
async def test_receiving_is_told_once_and_only_when_asked(asked: bool) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await receive()
        await asyncio.wait([asyncio.create_task(receive())], timeout=0.001)
        await hello(scope, receive, send)

    go = asyncio.Event()
    bench = Bench(application, http_scope("POST"), first=REQUEST, tell_receiving=asked)
    await turns()
    assert bench.link.take() == []
    go.set()
    await asyncio.sleep(0.01)
    kinds = [frame[0] for frame in bench.link.take()]
    assert kinds.count(FrameKind.RECEIVING) == asked


# The client leaves


async def test_send_raises_an_oserror_once_the_client_is_gone_and_nobody_logs_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        while True:
            await send(body(bytes(1000), more_body=True))
            await asyncio.sleep(0)

    bench = Bench(application)
    await turns()
    bench.instance.client_gone()
    await turns()
    assert bench.ended == [bench.instance]
    assert bench.link.take()[-1][0] == FrameKind.END
    assert caplog.text == ""


async def test_a_waiting_send_raises_when_the_client_goes() -> None:
    errors: list[BaseException] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        with pytest.raises(ClientDisconnected, match="the client has disconnected") as error:
            await send(body(bytes(10_000_000), more_body=True))
        errors.append(error.value)
        with pytest.raises(OSError, match="disconnected"):
            await send(body(b""))
        await receive()

    bench = Bench(application)
    await turns()
    assert not errors
    bench.instance.client_gone()
    await turns()
    assert len(errors) == 1
    assert bench.instance.statistics().unsent_count == 0


async def test_events_may_follow_gone_until_last() -> None:
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while not seen or seen[-1]["type"] != "websocket.disconnect":
            seen.append(await receive())

    bench = Bench(application, websocket_scope(), first=CONNECT)
    await turns()
    bench.instance.client_gone()
    bench.event({"type": "websocket.receive", "text": "late"})
    await turns()
    assert seen[-1]["text"] == "late"
    bench.deliver(*bench.interface.last(GOING_AWAY))
    assert await bench.over() is Outcome.RETURNED
    assert seen[-1] == GOING_AWAY


async def test_an_exception_group_of_disconnects_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(send(body(bytes(1_000_000), more_body=True)))

    bench = Bench(application)
    await turns()
    bench.instance.client_gone()
    await turns()
    assert bench.ended
    assert caplog.text == ""


async def test_an_error_in_answer_to_a_disconnect_is_one_line_without_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class FrameworkDisconnect(Exception):
        pass

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        try:
            await send(body(bytes(1_000_000), more_body=True))
        except OSError:
            raise FrameworkDisconnect("left") from None

    caplog.set_level(logging.INFO)
    bench = Bench(application)
    await turns()
    bench.instance.client_gone()
    await turns()
    (record,) = caplog.records
    assert (record.levelname, record.exc_info) == ("INFO", None)
    assert "FrameworkDisconnect('left')" in record.getMessage()


async def test_an_error_after_a_disconnect_that_has_another_cause_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()
        raise ZeroDivisionError("in the cleanup")

    bench = Bench(application)
    await turns()
    bench.disconnect(DISCONNECT)
    assert await bench.over() is Outcome.RAISED
    assert "Traceback" in caplog.text


async def test_an_application_that_stays_is_cancelled_and_the_log_says_where_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def a_forgotten_wait() -> None:
        await asyncio.Event().wait()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await a_forgotten_wait()

    bench = Bench(application, http_scope("POST", "/slow"), close_timeout_s=0.01)
    await turns()
    bench.disconnect(DISCONNECT)
    await bench.ending.wait()
    assert await bench.over() is Outcome.CANCELLED
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("POST /slow: the application did not return within 0.01 s after the client has")
    assert "test_instance.py" in message
    assert "in a_forgotten_wait" in message


async def test_work_behind_a_complete_response_is_not_cancelled() -> None:
    done = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await hello(scope, receive, send)
        await asyncio.sleep(0.05)
        done.set()

    bench = Bench(application, close_timeout_s=0.001)
    await bench.settle()
    bench.disconnect(DISCONNECT)
    await done.wait()
    assert await bench.over() is Outcome.RETURNED


@pytest.mark.parametrize("close_timeout_s", [float("inf"), 30.0])
async def test_an_application_that_returns_in_time_is_left_alone(close_timeout_s: float) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()
        await asyncio.sleep(0.01)

    bench = Bench(application, close_timeout_s=close_timeout_s)
    await turns()
    bench.disconnect(DISCONNECT)
    await bench.ending.wait()
    assert await bench.over() is Outcome.RETURNED


async def test_messages_behind_a_complete_response_are_ignored_also_when_the_client_is_gone() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await hello(scope, receive, send)
        await gone.wait()
        await send(body(b"more"))

    gone = asyncio.Event()
    bench = Bench(application)
    await bench.settle()
    bench.disconnect(DISCONNECT)
    gone.set()
    assert await bench.over() is Outcome.RETURNED


async def test_a_websocket_application_that_sends_after_its_own_close_gets_an_oserror() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 4001})
        with pytest.raises(OSError, match="closed this WebSocket"):
            await send({"type": "websocket.send", "text": "late"})
        assert await receive() == CONNECT
        assert await receive() == GOING_AWAY

    bench = Bench(application, websocket_scope(), first=CONNECT)
    events = await bench.settle()
    assert events[-1] == {"type": "websocket.close", "code": 4001, "reason": ""}
    bench.deliver(*bench.interface.last(GOING_AWAY))
    assert await bench.over() is Outcome.RETURNED


@pytest.mark.parametrize(
    ("scope", "first", "expected"),
    [
        (http_scope(), REQUEST, DISCONNECT),
        (websocket_scope(), CONNECT, {"type": "websocket.disconnect", "code": 1006, "reason": ""}),
    ],
)
async def test_the_end_of_the_link_is_a_disconnect_and_nothing_is_answered(
    scope: dict[str, Any], first: dict[str, Any], expected: dict[str, Any]
) -> None:
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())
        seen.append(await receive())
        with pytest.raises(ClientDisconnected, match="interface server died"):
            await send(START if scope["type"] == "http" else {"type": "websocket.accept"})

    bench = Bench(application, scope, first=first)
    await turns()
    bench.instance.refused("the interface server died")
    await turns()
    assert bench.ended
    assert seen == [first, expected]
    assert bench.link.take() == []


# Ends


async def test_an_exception_is_logged_once_with_the_applications_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError("mine")

    assert await Bench(application, http_scope("POST", "/x")).over() is Outcome.RAISED
    (record,) = caplog.records
    assert record.name == "trunkline.worker"
    assert record.getMessage() == "Exception in ASGI application, POST /x"
    assert "ZeroDivisionError: mine" in caplog.text
    assert "in _run" not in caplog.text


@pytest.mark.parametrize(
    "error", [SystemExit(3), asyncio.CancelledError(), type("MyError", (BaseException,), {})("mine")], ids=repr
)
async def test_any_exception_ends_the_instance_only(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise error

    assert await Bench(application).over() is Outcome.RAISED
    assert len(caplog.records) == 1


async def test_an_invalid_event_is_raised_at_the_faulty_line(caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": "200"})

    assert await Bench(application).over() is Outcome.RAISED
    assert 'await send({"type": "http.response.start", "status": "200"})' in caplog.text


async def test_an_invalid_event_may_be_caught_and_the_response_goes_on() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(InvalidEvent):
            await send({"type": "http.response.start", "status": 200, "headers": [("x", "y")]})
        await hello(scope, receive, send)

    bench = Bench(application)
    assert await bench.settle() == [START, body(b"hello")]
    await bench.over()


@pytest.mark.parametrize(
    ("application_events", "scope", "text"),
    [
        ([], http_scope(), "no response has been started"),
        ([START, body(b"", True)], http_scope(), "the response is being sent"),
        ([], websocket_scope(), "without accepting or closing"),
        ([START, body(b"")], http_scope(), None),
        ([{"type": "websocket.accept"}], websocket_scope(), None),
        ([{"type": "websocket.close"}], websocket_scope(), None),
    ],
)
async def test_a_return_that_leaves_the_client_waiting_is_logged(
    application_events: list[Any], scope: dict[str, Any], text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        for event in application_events:
            await send(event)

    assert await Bench(application, scope).over() is Outcome.RETURNED
    assert [text in record.getMessage() for record in caplog.records if text] == ([True] if text else [])
    assert len(caplog.records) == (text is not None)


async def test_each_instance_has_a_context_of_its_own() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(variable.get())
        variable.set(scope["path"])
        await asyncio.sleep(0)
        seen.append(variable.get())

    for path in ("/a", "/b"):
        Bench(application, websocket_scope(path), first=CONNECT)
    await turns()
    assert seen == ["unset", "unset", "/a", "/b"]
    assert variable.get() == "unset"


# The worker stops


async def test_a_websocket_is_closed_1012_and_its_application_told() -> None:
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        seen.append(await receive())
        with pytest.raises(OSError, match="the worker stops"):
            await send({"type": "websocket.send", "text": "late"})

    bench = Bench(application, websocket_scope(), first=CONNECT)
    await bench.settle()
    bench.instance.shut_down()
    bench.instance.shut_down()
    assert await bench.over() is Outcome.CANCELLED
    assert seen == [{"type": "websocket.disconnect", "code": 1012, "reason": ""}]
    assert bench.interface.events[1:] == [{"type": "websocket.close", "code": 1012, "reason": "the worker stops"}]


async def test_a_websocket_that_is_not_accepted_is_not_closed_by_us() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert (await receive())["code"] == 1012

    bench = Bench(application, websocket_scope(), first=CONNECT)
    await turns()
    bench.instance.shut_down()
    assert await bench.over() is Outcome.CANCELLED
    assert bench.interface.events == []  # a close now would be a 403


async def test_http_goes_on_when_the_worker_stops_until_it_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await asyncio.Event().wait()

    bench = Bench(application)
    bench.instance.shut_down()
    await turns()
    assert bench.instance.phase is Phase.RUNNING
    bench.instance.cancel("time is up")
    assert await bench.over() is Outcome.CANCELLED
    assert "time is up; it is cancelled, it waited at" in caplog.text


async def test_cancel_after_the_end_does_nothing() -> None:
    bench = Bench(hello)
    await bench.over()
    bench.instance.cancel("late")
    bench.instance.shut_down()
    bench.instance.client_gone()
    assert bench.ended == [bench.instance]


async def test_statistics_and_repr_show_the_state() -> None:
    bench = Bench(hello, started=False)
    statistics = bench.instance.statistics()
    assert (statistics.phase, statistics.granted, statistics.sent) == (Phase.CLAIMED, False, State.WAITING)
    assert (statistics.arrived_count, statistics.unsent_bytes) == (1, 0)
    assert repr(bench.instance) == "<Instance GET / itestinterface!1 epoch 1 claimed, not granted, WAITING>"


async def run_unclaimed(application: Any, scope: dict[str, Any] | None = None, **opening: Any) -> Bench:
    """An instance that started without a claim, behind the first turn of its application."""
    bench = Bench(application, scope, started=False, **opening)
    bench.instance.start()
    await asyncio.sleep(0)
    return bench


def answering(data: bytes, *, then: Any = None, headers: Any = ()) -> Any:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})
        if then is not None:
            await then(receive, send)

    return application


async def test_an_interface_server_of_the_release_before_gets_no_frame_that_it_does_not_know() -> None:
    bench = await run_unclaimed(answering(b"hello"), version=1)
    bench.instance.claim()
    kinds = [frame[0] for frame in bench.link.take()]
    assert kinds == [FrameKind.CLAIM, FrameKind.EVENT, FrameKind.EVENT, FrameKind.END]


async def test_a_whole_short_response_is_the_claim_and_the_end() -> None:
    bench = await run_unclaimed(answering(b"hello", headers=[(b"X-Name", b"value")]))
    assert bench.link.take() == [[int(FrameKind.ANSWER), 1, 1, 200, [[b"x-name", b"value"]], b"hello"]]
    assert bench.instance.phase is Phase.ENDED
    assert bench.ended == [bench.instance]
    assert not bench.instance.is_verdict_due
    bench.instance.claim()
    assert bench.link.take() == []


async def test_a_failure_behind_a_whole_short_response_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(receive: Any, send: Any) -> None:
        raise ValueError("behind the response")

    bench = await run_unclaimed(answering(b"hello", then=fail))
    bench.interface.read(bench.link.take())
    assert bench.interface.events[-1]["body"] == b"hello"
    assert bench.interface.outcome is Outcome.RAISED
    assert "behind the response" in caplog.text


async def test_an_application_that_goes_on_behind_its_response_is_claimed_and_the_response_leaves() -> None:
    released = asyncio.Event()

    async def wait(receive: Any, send: Any) -> None:
        await released.wait()

    bench = await run_unclaimed(answering(b"hello", then=wait))
    assert bench.link.take() == []
    bench.instance.claim()
    frames = bench.link.take()
    assert [frame[0] for frame in frames] == [FrameKind.CLAIM, FrameKind.EVENT, FrameKind.EVENT]
    bench.interface.read(frames)
    assert bench.interface.events[-1]["body"] == b"hello"
    assert bench.instance.is_verdict_due
    released.set()
    await turns()
    assert bench.link.take() == [[int(FrameKind.END), 1, 1, int(Outcome.RETURNED)]]


@pytest.mark.parametrize("size", [16 * 1024 - 100, 16 * 1024, 16 * 1024 + 1, 300_000])
async def test_a_longer_response_leaves_within_its_credit(size: int) -> None:
    bench = await run_unclaimed(answering(b"x" * size, headers=[(b"x-long", b"y" * 200)]))
    frames = bench.link.take()
    assert frames[0][0] == FrameKind.CLAIM
    bench.deliver(*bench.interface.read(frames))
    await turns()
    bench.deliver(*bench.interface.read(bench.link.take()))
    assert b"".join(event["body"] for event in bench.interface.events[1:]) == b"x" * size
    assert bench.interface.outcome is Outcome.RETURNED


async def test_an_answer_waits_for_a_congested_link_as_events_do() -> None:
    bench = Bench(answering(b"hello"), started=False)
    bench.link.congested = True
    bench.instance.start()
    await turns()
    assert [frame[0] for frame in bench.link.take()] == [FrameKind.CLAIM]
    assert bench.ended == []
    bench.link.congested = False
    bench.instance.link_ready()
    assert [frame[0] for frame in bench.link.take()] == [FrameKind.EVENT, FrameKind.EVENT, FrameKind.END]
    assert bench.ended == [bench.instance]


async def test_what_leaves_early_leaves_behind_the_claim() -> None:
    async def first_words(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})

    bench = await run_unclaimed(first_words, tell_receiving=True)
    assert [frame[0] for frame in bench.link.take()] == [
        FrameKind.CLAIM,
        FrameKind.RECEIVING,
        FrameKind.EVENT,
        FrameKind.EVENT,
        FrameKind.EVENT,
        FrameKind.END,
    ]


async def test_an_application_that_fails_at_once_is_claimed_and_ended(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("at once")

    bench = await run_unclaimed(fail)
    assert [frame[0] for frame in bench.link.take()] == [FrameKind.CLAIM, FrameKind.END]


async def test_an_answer_to_an_interface_server_that_is_gone_goes_nowhere() -> None:
    bench = Bench(answering(b"hello"), started=False)
    bench.instance.start()
    bench.instance.refused("the interface server is gone")
    await turns()
    assert bench.link.take() == []
    assert bench.ended == [bench.instance]


# The others of the worker


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": event["text"]})


def sends_of(bench: Bench) -> int:
    return sum(frame[0] == FrameKind.EVENT for frame in bench.link.take())


async def test_a_flood_of_events_leaves_the_others_their_turns() -> None:
    """Nothing makes an application wait whose events are here already: it would have the loop for all of them."""
    shared = Turns()
    floods = [Bench(echo, websocket_scope(), first=CONNECT, turns=shared) for _ in range(3)]
    await turns()
    assert [sends_of(flood) for flood in floods] == [1, 1, 1]
    for flood in floods:
        for _ in range(10 * TURN_EVENTS_MAX):
            flood.event({"type": "websocket.receive", "text": "x"})
    await asyncio.sleep(0)  # each has the rest of a first turn
    assert all(0 < sends_of(flood) <= TURN_EVENTS_MAX for flood in floods)
    left = [flood.instance.statistics().arrived_count for flood in floods]
    while any(left):
        await asyncio.sleep(0)
        now = [flood.instance.statistics().arrived_count for flood in floods]
        went_on = [before - after for before, after in zip(left, now, strict=True)]
        assert sum(went_on) <= TURN_EVENTS_MAX
        assert sum(count > 0 for count in went_on) <= 1
        left = now
    assert [sends_of(flood) > 0 for flood in floods] == [True] * 3


async def test_who_waits_for_each_event_never_waits_for_a_turn() -> None:
    shared = Turns(lambda call: pytest.fail("nobody floods"))
    bench = Bench(echo, websocket_scope(), first=CONNECT, turns=shared)
    for _ in range(3 * TURN_EVENTS_MAX):
        await turns(3)
        bench.event({"type": "websocket.receive", "text": "x"})


async def test_a_receive_that_is_cancelled_at_its_turn_leaves_the_event() -> None:
    got: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await begin.wait()
        for _ in range(TURN_EVENTS_MAX + 5):
            call = asyncio.ensure_future(receive())
            await asyncio.sleep(0)
            if not call.done():
                call.cancel()
                call = asyncio.ensure_future(receive())
            got.append((await call)["text"])

    begin = asyncio.Event()
    bench = Bench(application, websocket_scope(), first=CONNECT)
    await turns()
    for number in range(TURN_EVENTS_MAX + 5):
        bench.event({"type": "websocket.receive", "text": str(number)})
    begin.set()
    await turns(4 * TURN_EVENTS_MAX)
    assert got == [str(number) for number in range(TURN_EVENTS_MAX + 5)]


async def test_the_end_comes_between_two_turns() -> None:
    bench = Bench(echo, websocket_scope(), first=CONNECT)
    await turns()
    for _ in range(3 * TURN_EVENTS_MAX):
        bench.event({"type": "websocket.receive", "text": "x"})
    await asyncio.sleep(0)
    assert bench.instance.statistics().arrived_count > 0
    bench.instance.refused("the link is over")
    await turns()
    assert bench.ended == [bench.instance]
