"""Checkpoints from Starlette, FastAPI and Channels, and what becomes of them when the worker stops."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.generic.websocket import AsyncJsonWebsocketConsumer, JsonWebsocketConsumer
from django.conf import settings as django_settings
from fastapi import FastAPI
from fastapi import WebSocket as FastApiWebSocket
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from channel_layer.codec import decode_message, encode_message
from channel_layer.frames import STATE_COMMIT, STATE_NOTIFY, FrameKind, Outcome
from channel_layer.link import AWAY, RESET
from channel_layer.openings import encode_opening
from tests.worker.support import INTERFACE, FakeInterface, FakeLayer, make_opening, turns, websocket_scope
from worker.events import STATE_BYTES_MAX, InvalidEvent
from worker.handover import HandoverMixin, SyncHandoverMixin, store_state, stored_state
from worker.process import WorkerProcess
from worker.settings import WorkerSettings

CONNECT = {"type": "websocket.connect"}


class Bench:
    """One worker, and the interface server's side of connection 1."""

    def __init__(self, application: Any) -> None:
        self.layer = FakeLayer()
        self.process = WorkerProcess(
            WorkerSettings(redis_url="redis://unused", application="unused:app"),
            application=application,
            layer=self.layer,  # type: ignore[arg-type]
        )
        self.interface = FakeInterface(epoch=1)
        self.scope = websocket_scope(extensions={"websocket.handover": {}})
        self.states: list[tuple[int, int, Any]] = []  # received, flags, state
        self.released = 0

    async def settle(self) -> None:
        """Let the application go on until nothing more comes of it; synchronous consumers run in threads."""
        for _ in range(40):
            await turns()
            await asyncio.sleep(0.002)
            await sync_to_async(lambda: None)()  # behind what they have given their thread
            for frame in self.layer.take():
                if frame[0] == FrameKind.STATE:
                    self.states.append((frame[3], frame[4], decode_message(frame[5])["state"]))
                elif frame[0] == FrameKind.RELEASE:
                    self.released += 1
                else:
                    for credit in self.interface.read([frame]):
                        self.process.frame_received(INTERFACE, credit)

    async def connect(self) -> None:
        self.process._open_all("websocket", [encode_opening(make_opening(self.scope, first=CONNECT))])
        self.interface.event(CONNECT)
        self.process.frame_received(INTERFACE, [int(FrameKind.GRANT), 1, 1])
        await self.settle()

    async def adopt(self, state: Any) -> None:
        """Connection 1 comes from elsewhere, with epoch 2."""
        self.interface = FakeInterface(epoch=2)
        short = make_opening({"type": "websocket"}, epoch=2)
        object.__setattr__(short, "is_handover", True)
        self.process._open_all("websocket", [encode_opening(short)])
        assert self.layer.take() == [[int(FrameKind.CLAIM), 1, 2, True]]
        opening = encode_opening(make_opening(self.scope, first=CONNECT))
        encoded = encode_message({"state": state})
        self.process.frame_received(INTERFACE, [int(FrameKind.ADOPT), 1, 2, opening, encoded, 0])
        await self.settle()

    async def say(self, text: str) -> None:
        for frame in self.interface.event({"type": "websocket.receive", "text": text}):
            self.process.frame_received(INTERFACE, frame)
        await self.settle()

    async def stop(self) -> None:
        for instance in self.process.instances():
            instance.begin_move(self.process._move_settled)
        await self.settle()

    def texts(self) -> list[str]:
        return [event["text"] for event in self.interface.events if event["type"] == "websocket.send"]


async def starlette_endpoint(websocket: WebSocket) -> None:
    count = stored_state(0)
    await websocket.accept()
    await store_state(count, latest=lambda: count)
    async for _ in websocket.iter_text():
        count += 1
        await websocket.send_text(str(count))


starlette_application = Starlette(
    routes=[WebSocketRoute("/ws", starlette_endpoint)], middleware=[Middleware(GZipMiddleware)]
)
fastapi_application = FastAPI()


@fastapi_application.websocket("/ws")
async def fastapi_endpoint(websocket: FastApiWebSocket) -> None:
    await starlette_endpoint(websocket)


class Consumer(HandoverMixin, AsyncJsonWebsocketConsumer):  # type: ignore[misc]
    count = 0

    def get_handover_state(self) -> Any:
        return {"count": self.count}

    def set_handover_state(self, state: Any) -> None:
        self.count = state["count"]

    async def receive_json(self, content: Any, **_: Any) -> None:
        self.count += 1
        await self.send_json(self.count)


class SyncConsumer(SyncHandoverMixin, JsonWebsocketConsumer):  # type: ignore[misc]
    count = 0

    def get_handover_state(self) -> Any:
        return {"count": self.count}

    def set_handover_state(self, state: Any) -> None:
        self.count = state["count"]

    def receive_json(self, content: Any, **_: Any) -> None:
        self.count += 1
        self.send_json(self.count)


@pytest.fixture(params=[starlette_application, fastapi_application], ids=["starlette", "fastapi"])
async def web(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    bench = Bench(request.param)
    yield bench
    await bench.process.stop(0)


async def test_an_endpoint_is_asked_for_its_latest_state_when_the_worker_stops(web: Bench) -> None:
    await web.connect()
    assert web.states == [(0, STATE_NOTIFY, 0)]
    for number in range(3):
        await web.say(f"message {number}")
    assert web.texts() == ["1", "2", "3"]
    await web.stop()
    assert web.states[1:] == [(3, STATE_NOTIFY, 3)]
    assert web.released == 1
    await web.say("not for this one any more")
    assert web.texts() == ["1", "2", "3"]
    web.process.frame_received(INTERFACE, [int(FrameKind.RELEASED), 1, 1, True])
    await web.settle()
    assert web.process.instances() == []
    assert web.interface.outcome is None  # END is not for an epoch that is over
    assert web.process.statistics().given_away_count == 1
    await web.adopt(3)
    await web.say("on")
    assert web.texts() == ["4"]
    assert web.process.statistics().adopted_count == 1


async def test_an_endpoint_that_may_not_go_stays_and_goes_on(web: Bench) -> None:
    await web.connect()
    await web.stop()
    await web.say("waits")
    assert web.texts() == []
    web.process.frame_received(INTERFACE, [int(FrameKind.RELEASED), 1, 1, False])
    await web.settle()
    assert web.texts() == ["1"]
    assert web.released == 1


@pytest.mark.parametrize("consumer", [Consumer, SyncConsumer])
async def test_consumers_of_channels(consumer: Any) -> None:
    if not django_settings.configured:
        django_settings.configure()
    bench = Bench(consumer.as_asgi())
    await bench.connect()
    await bench.say("{}")
    await bench.say("{}")
    assert bench.texts() == ["1", "2"]
    assert [(received, state) for received, _, state in bench.states] == [(n, {"count": n}) for n in range(3)]
    await bench.stop()
    assert bench.released == 1
    bench.process.frame_received(INTERFACE, [int(FrameKind.RELEASED), 1, 1, True])
    await bench.settle()
    assert bench.process.instances() == []
    await bench.adopt({"count": 7})
    await bench.say("{}")
    assert bench.texts() == ["8"]
    assert bench.states[-1][2] == {"count": 8}
    await bench.process.stop(0)


async def test_a_consumer_that_says_nothing_of_its_state() -> None:
    class Silent(HandoverMixin, AsyncJsonWebsocketConsumer):  # type: ignore[misc]
        pass

    with pytest.raises(NotImplementedError, match="Silent needs a get_handover_state"):
        Silent().get_handover_state()
    with pytest.raises(NotImplementedError, match="Silent needs a set_handover_state"):
        Silent().set_handover_state(1)


async def test_elsewhere_the_same_code_does_nothing() -> None:
    assert stored_state("default") == "default"
    assert await store_state(1) is False


async def test_where_it_is_not_offered_nothing_is_stored() -> None:
    results = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        results.append(await store_state(1))  # not open yet
        await receive()
        await send({"type": "websocket.accept"})
        results.append(await store_state(1))
        results.append(stored_state("none"))
        await send({"type": "websocket.close"})
        results.append(await store_state(1))

    bench = Bench(application)
    bench.scope["extensions"] = {}
    await bench.connect()
    assert results == [False, False, "none", False]
    assert bench.states == []
    bench = Bench(application)
    results.clear()
    await bench.connect()
    assert results == [False, True, "none", False]


async def test_commit_and_states_that_are_refused() -> None:
    errors: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        for state in ({1, 2}, b"x" * (STATE_BYTES_MAX + 1), {"deep": [float("nan")]}):
            try:
                await store_state(state)
            except InvalidEvent as error:
                errors.append(str(error))
        for event in ({}, {"state": 1, "notify": 1}, {"state": 1, "commit": None}):
            try:
                await send({"type": "websocket.handover.state", **event})
            except InvalidEvent as error:
                errors.append(str(error))
        assert await store_state(b"x" * (STATE_BYTES_MAX - 10), commit=True)
        await receive()

    bench = Bench(application)
    await bench.connect()
    assert [(received, flags) for received, flags, _ in bench.states] == [(0, STATE_COMMIT)]
    assert "set" in errors[0]
    assert "the limit is 65536" in errors[1]
    assert '["deep"][0]' in errors[2]
    assert '"state" is missing' in errors[3]
    assert '"notify" is 1' in errors[4]
    assert '"commit" is None' in errors[5]
    await bench.process.stop(0)


@pytest.mark.parametrize("is_async", [True, False])
async def test_the_latest_state_is_asked_for_where_the_application_runs(is_async: bool) -> None:
    """In its context: functions find the instance, and variables of the application are there."""
    user = contextvars.ContextVar("user", default="nobody")

    def latest() -> Any:
        return [stored_state(), user.get()]

    async def latest_async() -> Any:
        await asyncio.sleep(0)
        return latest()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        user.set("ada")
        await store_state(stored_state(), latest=latest_async if is_async else latest)
        await receive()

    bench = Bench(application)
    await bench.adopt("first")
    await bench.stop()
    assert [state for _, _, state in bench.states] == ["first", ["first", "ada"]]
    bench.process.frame_received(INTERFACE, [int(FrameKind.RELEASED), 1, 2, True])
    await bench.settle()


class Handling:
    """An endpoint that takes its time over a message; ``is_covered``: it stores a checkpoint before it answers."""

    def __init__(self, *, is_covered: bool = False) -> None:
        self.go_on = asyncio.Event()
        self.is_covered = is_covered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        count = stored_state(0)

        def latest() -> Any:
            return count

        await receive()
        await send({"type": "websocket.accept"})
        await store_state(count, latest=latest)
        while (await receive())["type"] != "websocket.disconnect":
            count += 1
            if self.is_covered:
                await store_state(count, latest=latest)
            await self.go_on.wait()
            await send({"type": "websocket.send", "text": str(count)})


@pytest.mark.parametrize("is_covered", [False, True])
async def test_a_message_that_is_being_handled_is_answered_before_the_state_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, is_covered: bool
) -> None:
    monkeypatch.setattr("worker.instance.PUSHING_AFTER_S", 60.0)  # not on a machine that stalls either
    application = Handling(is_covered=is_covered)
    bench = Bench(application)
    await bench.connect()
    await bench.say("one")
    await bench.stop()
    assert bench.released == 0
    await bench.say("two")  # for whoever goes on
    application.go_on.set()
    await bench.settle()
    assert bench.texts() == ["1"]
    assert bench.released == 1
    assert bench.states[-1] == (1, STATE_NOTIFY, 1)
    bench.process.frame_received(INTERFACE, [int(FrameKind.RELEASED), 1, 1, True])
    await bench.settle()
    assert bench.process.instances() == []


@pytest.mark.parametrize("is_covered", [False, True])
async def test_an_endpoint_that_only_sends_is_asked_if_its_checkpoint_covers_what_it_received(
    monkeypatch: pytest.MonkeyPatch, is_covered: bool
) -> None:
    monkeypatch.setattr("worker.instance.PUSHING_AFTER_S", 0.0)
    bench = Bench(Handling(is_covered=is_covered))
    await bench.connect()
    await bench.say("subscribe")
    await bench.stop()
    await bench.settle()
    assert bench.released == int(is_covered)
    await bench.process.stop(0)


async def test_nothing_is_received_while_the_latest_state_is_made() -> None:
    asked, answer = asyncio.Event(), asyncio.Event()
    received: list[Any] = []

    async def latest() -> Any:
        asked.set()
        await answer.wait()
        return len(received)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await store_state(0, latest=latest)
        while (event := await receive())["type"] != "websocket.disconnect":
            received.append(event)

    bench = Bench(application)
    await bench.connect()
    await bench.stop()
    await asked.wait()
    await bench.say("not for this one any more")
    answer.set()
    await bench.settle()
    assert (bench.states[-1], bench.released, received) == ((0, STATE_NOTIFY, 0), 1, [])
    bench.process.frame_received(INTERFACE, [int(FrameKind.RELEASED), 1, 1, False])
    await bench.settle()
    assert [event["text"] for event in received] == ["not for this one any more"]
    await bench.process.stop(0)


async def test_a_client_that_leaves_while_the_latest_state_is_made_is_told() -> None:
    received: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await store_state(0, latest=asyncio.Event().wait)
        received.append(await receive())

    bench = Bench(application)
    await bench.connect()
    await bench.stop()
    for frame in bench.interface.last({"type": "websocket.disconnect", "code": 1001}):
        bench.process.frame_received(INTERFACE, frame)
    await bench.settle()
    assert received == [{"type": "websocket.disconnect", "code": 1001}]
    await bench.process.stop(0)


async def test_a_latest_state_that_fails_is_told_and_the_websocket_stays(caplog: pytest.LogCaptureFixture) -> None:
    async def latest() -> Any:
        raise RuntimeError("no state today")

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await store_state(1, latest=latest)
        while (await receive())["type"] != "websocket.disconnect":
            await send({"type": "websocket.send", "text": "here"})

    bench = Bench(application)
    await bench.connect()
    await bench.stop()
    assert "no state today" in caplog.text
    await bench.say("still there?")
    assert bench.texts() == ["here"]
    await bench.process.stop(0)


@pytest.mark.parametrize("moved", [True, False])
async def test_what_is_being_given_away_when_the_drain_ends_is_not_told_that_its_client_left(moved: bool) -> None:
    received: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await store_state(0)
        while not received or received[-1]["type"] != "websocket.disconnect":
            received.append(await receive())

    bench = Bench(application)
    await bench.connect()
    await bench.stop()
    assert bench.released == 1
    await bench.say("for whoever goes on")
    for instance in bench.process.instances():
        instance.shut_down()
    await bench.settle()
    assert received == []
    bench.process.frame_received(INTERFACE, [int(FrameKind.RELEASED), 1, 1, moved])
    await bench.settle()
    closes = [event for event in bench.interface.events if event["type"] == "websocket.close"]
    assert [close["code"] for close in closes] == ([] if moved else [1012])
    assert [event["type"] for event in received] == ([] if moved else ["websocket.receive", "websocket.disconnect"])
    assert bench.process.instances() == []


async def test_an_instance_without_a_checkpoint_that_is_moved_gets_a_disconnect() -> None:
    """--handover always: its successor begins anew, so this one ends as behind any other end."""
    events: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        events.append(await receive())

    bench = Bench(application)
    await bench.connect()
    await bench.stop()
    assert bench.released == 1
    bench.process.frame_received(INTERFACE, [int(FrameKind.RELEASED), 1, 1, True])
    await bench.settle()
    assert events == [{"type": "websocket.disconnect", "code": 1012, "reason": ""}]
    assert bench.process.instances() == []


@pytest.mark.parametrize(
    ("reason", "ends"),
    [("reset", ["cancelled"]), ("left", [{"type": "websocket.disconnect", "code": 1006, "reason": ""}])],
)
async def test_who_is_taken_for_dead_is_cancelled_without_a_disconnect(reason: str, ends: list[Any]) -> None:
    ended: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            ended.append(await receive())
        except asyncio.CancelledError:
            ended.append("cancelled")
            # What it does to groups now is fenced by its epoch, also when another instance is here already.
            ended.append(bench.process.epoch_of(f"interface.{INTERFACE}!1"))
            raise

    bench = Bench(application)
    await bench.connect()
    bench.process.peer_ended(INTERFACE, reason)
    await turns()
    assert ended == (ends if reason == "left" else ["cancelled", 1])
    assert bench.process.instances() == []


async def test_who_is_taken_for_dead_cleans_up_undisturbed() -> None:
    """A frozen worker that wakes is told twice: by the interface server's RESET, and by its own clock."""
    cleaned_up: list[str] = []
    answered = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            await receive()
        finally:
            await answered.wait()  # a group_discard, say
            cleaned_up.append("done")

    bench = Bench(application)
    await bench.connect()
    bench.process.peer_ended(INTERFACE, RESET)
    await turns()
    bench.process.peer_ended(INTERFACE, AWAY)
    await turns()
    answered.set()
    await turns()
    assert cleaned_up == ["done"]
    assert bench.process.instances() == []


async def test_an_adoption_that_cannot_be_read_is_given_back(caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody calls it")

    bench = Bench(application)
    short = make_opening({"type": "websocket"}, epoch=2)
    object.__setattr__(short, "is_handover", True)
    bench.process._open_all("websocket", [encode_opening(short)])
    bench.layer.take()
    bench.process.frame_received(INTERFACE, [int(FrameKind.ADOPT), 1, 2, b"\xc1", b"", 0])
    await turns()
    assert bench.layer.take() == [[int(FrameKind.CLOSED), 1, 2]]
    assert bench.process.instances() == []
    # And one that comes when the claim was given up.
    bench.process.frame_received(INTERFACE, [int(FrameKind.ADOPT), 1, 3, b"", b"", 0])
    assert bench.layer.take() == [[int(FrameKind.CLOSED), 1, 3]]
    bench.process.frame_received(INTERFACE, [int(FrameKind.RELEASED), 1, 3, True])
    assert bench.layer.take() == []


async def test_at_most_so_many_are_given_away_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from worker import process as process_module

    monkeypatch.setattr(process_module, "MOVES_AT_ONCE", 2)
    monkeypatch.setattr(process_module, "MOVE_PLACE_S", 60.0)  # a stalled machine must not free a place

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await store_state(1)
        await receive()

    bench = Bench(application)
    for connection in range(1, 6):
        opening = make_opening(bench.scope, connection=connection, first=CONNECT)
        bench.process._open_all("websocket", [encode_opening(opening)])
        bench.process.frame_received(INTERFACE, [int(FrameKind.GRANT), connection, 1])
    await turns()
    bench.layer.take()
    stopping = asyncio.create_task(bench.process.stop(60))
    asked: list[int] = []
    for _ in range(5):
        await turns()
        releases = [frame[1] for frame in bench.layer.take() if frame[0] == FrameKind.RELEASE]
        asked += releases
        assert 0 < len(asked) <= 2
        bench.process.frame_received(INTERFACE, [int(FrameKind.RELEASED), asked.pop(0), 1, True])
    assert await asyncio.wait_for(stopping, 30) == 0  # not only at its end
    assert bench.process.statistics().given_away_count == 5


async def test_an_application_that_is_asked_and_does_not_answer_loses_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from worker import process as process_module

    monkeypatch.setattr(process_module, "MOVES_AT_ONCE", 1)
    monkeypatch.setattr(process_module, "MOVE_PLACE_S", 0.05)
    events: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.handover.state", "state": 1, "notify": True})
        while events.append(await receive()) or events[-1]["type"] != "websocket.disconnect":
            pass

    bench = Bench(application)
    for connection in (1, 2):
        opening = make_opening(bench.scope, connection=connection, first=CONNECT)
        bench.process._open_all("websocket", [encode_opening(opening)])
        bench.process.frame_received(INTERFACE, [int(FrameKind.GRANT), connection, 1])
    await turns()
    assert await bench.process.stop(0.5) == 0
    assert [event["type"] for event in events].count("websocket.handover.request") == 2
    ends = [frame[3] for frame in bench.layer.take() if frame[0] == FrameKind.END]
    assert ends == [Outcome.CANCELLED] * 2


@pytest.mark.parametrize("moved", [True, False])
async def test_nothing_leaves_while_the_interface_server_decides(moved: bool) -> None:
    """What left behind RELEASE would be refused where it moves, and lost."""
    go = asyncio.Event()
    results: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        async def other_task() -> None:
            await go.wait()
            try:
                await send({"type": "websocket.send", "text": "from another task"})
                results.append("sent")
            except OSError as error:
                results.append(str(error))

        await receive()
        await send({"type": "websocket.accept"})
        await store_state(1)
        task = asyncio.create_task(other_task())
        try:
            await receive()
        finally:
            await asyncio.gather(task)

    bench = Bench(application)
    await bench.connect()
    await bench.stop()
    assert bench.released == 1
    go.set()
    await bench.settle()
    assert (bench.texts(), results) == ([], [])
    bench.process.frame_received(INTERFACE, [int(FrameKind.RELEASED), 1, 1, moved])
    await bench.settle()
    assert bench.texts() == ([] if moved else ["from another task"])
    assert results == (["the connection was handed over"] if moved else ["sent"])
    await bench.process.stop(0)
