"""Background work: one instance for a channel, a message only when it asks, nothing lost at a stop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import deque
from typing import Any

import pytest

from channel_layer.memory import InMemoryChannelLayer
from tests.worker.support import turns
from worker.background import BackgroundChannel
from worker.events import InvalidEvent


class Source:
    """A channel as the broker holds it: a cancelled receive() leaves its message there."""

    def __init__(self) -> None:
        self.waiting: deque[dict[str, Any]] = deque()
        self.changed = asyncio.Condition()

    async def put(self, *messages: dict[str, Any]) -> None:
        async with self.changed:
            self.waiting.extend(messages)
            self.changed.notify_all()
        await turns()

    async def receive(self, channel: str) -> dict[str, Any]:
        assert channel == "jobs"
        async with self.changed:
            await self.changed.wait_for(lambda: self.waiting)
        return self.waiting.popleft()


class Work:
    """An application that notes what it gets, and works on each message until it is let go on."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.done: list[Any] = []
        self.begun: list[Any] = []
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.cancelled_count = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        try:
            while True:
                message = await receive()
                self.begun.append(message["n"])
                if message["type"] == "fail":
                    raise RuntimeError("this job fails on purpose")
                if message["type"] == "return":
                    return
                await self.go_on.wait()
                self.done.append(message["n"])
        except asyncio.CancelledError:
            self.cancelled_count += 1
            raise


def job(number: int, kind: str = "job") -> dict[str, Any]:
    return {"type": kind, "n": number}


def make(application: Any, source: Source, **more: Any) -> BackgroundChannel:
    background = BackgroundChannel("jobs", application=application, layer=source, state={"a": 1}, **more)
    background.start()
    return background


async def test_one_instance_gets_all_messages_in_order() -> None:
    source, work = Source(), Work()
    background = make(work, source)
    await turns()
    assert work.scopes == []  # made with the first message, as Channels does
    for number in range(5):
        await source.put(job(number))
    assert work.done == [0, 1, 2, 3, 4]
    assert [(scope["type"], scope["channel"], scope["state"]) for scope in work.scopes] == [
        ("channel", "jobs", {"a": 1})
    ]
    assert await background.stop(5) == 0
    assert work.cancelled_count == 1
    assert background.statistics().received_count == 5


async def test_messages_wait_in_the_channel_while_the_instance_works() -> None:
    source, work = Source(), Work()
    work.go_on.clear()
    background = make(work, source)
    await source.put(job(1), job(2), job(3))
    assert work.begun == [1]
    assert [message["n"] for message in source.waiting] == [2, 3]
    work.go_on.set()
    await turns()
    assert work.done == [1, 2, 3]
    await background.stop(5)


@pytest.mark.parametrize("kind", ["fail", "return"])
async def test_after_an_instance_ended_the_next_message_starts_another(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, work = Source(), Work()
    background = make(work, source)
    await source.put(job(1, kind), job(2))
    assert work.begun == [1, 2]
    assert work.done == [2]
    assert len(work.scopes) == 2
    assert ("Exception in ASGI application, channel jobs" in caplog.text) == (kind == "fail")
    await background.stop(5)
    statistics = background.statistics()
    assert (statistics.started_count, statistics.failed_count) == (2, kind == "fail")


async def test_an_instance_that_takes_nothing_does_not_get_its_message_again_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def refusing(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("no application configured for this channel")

    source = Source()
    background = make(refusing, source)
    await source.put(job(1), job(2))
    assert not source.waiting
    assert background.statistics().dropped_count == 2
    assert "no application configured" in caplog.text
    await background.stop(5)


async def test_a_message_without_a_type_is_dropped_and_the_next_one_arrives(caplog: pytest.LogCaptureFixture) -> None:
    source, work = Source(), Work()
    background = make(work, source)
    await source.put({"n": 0}, {"type": "", "n": 1}, {"type": 7, "n": 2}, job(3))
    assert work.done == [3]
    assert caplog.text.count('a message without "type" is dropped') == 3
    await background.stop(5)


async def test_there_is_nobody_to_send_to() -> None:
    errors: list[InvalidEvent] = []

    async def sending(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        try:
            await send({"type": "websocket.send", "text": "hello"})
        except InvalidEvent as error:
            errors.append(error)

    source = Source()
    background = make(sending, source)
    await source.put(job(1))
    assert "there is no client to send to" in str(errors[0])
    await background.stop(5)


async def test_an_instance_runs_in_a_context_of_its_own() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        seen.append(variable.get())
        variable.set("of an instance")

    variable.set("of the worker")
    source = Source()
    background = make(application, source, context=contextvars.copy_context())
    await source.put(job(1), job(2))
    assert seen == ["of the worker", "of the worker"]
    await background.stop(5)


# The end


async def test_a_stop_lets_the_message_in_hand_be_finished_and_takes_no_other() -> None:
    source, work = Source(), Work()
    work.go_on.clear()
    background = make(work, source)
    await source.put(job(1), job(2))
    stopping = asyncio.create_task(background.stop(20))
    await turns()
    assert not stopping.done()
    work.go_on.set()
    assert await stopping == 0
    assert work.done == [1]
    assert [message["n"] for message in source.waiting] == [2]


@pytest.mark.parametrize("how", ["time is up", "at once"])
async def test_a_stop_cancels_what_takes_too_long(how: str, caplog: pytest.LogCaptureFixture) -> None:
    source, work = Source(), Work()
    work.go_on.clear()
    background = make(work, source)
    await source.put(job(1))
    at_once = asyncio.Event()
    if how == "at once":
        at_once.set()
    await background.stop(0 if how == "time is up" else 20, at_once=at_once)
    await turns()
    assert work.cancelled_count == 1
    assert work.done == []
    assert "were not enough to finish" in caplog.text


async def test_an_instance_that_refuses_to_end_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.background.CANCEL_TIMEOUT_S", 0.01)
    end = asyncio.Event()

    async def stubborn(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        while not end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await end.wait()

    source = Source()
    background = make(stubborn, source)
    await source.put(job(1))
    assert await background.stop(0) == 1
    assert "does not end although it was cancelled" in caplog.text
    end.set()
    await turns()


async def test_a_message_taken_for_a_call_that_was_cancelled_goes_to_the_next_one() -> None:
    got: list[int] = []
    asked_again = asyncio.Event()

    async def impatient(scope: Any, receive: Any, send: Any) -> None:
        got.append((await receive())["n"])
        first = asyncio.create_task(receive())
        await asyncio.sleep(0)
        first.cancel()
        await asked_again.wait()
        got.append((await receive())["n"])

    source = Source()
    background = make(impatient, source)
    await source.put(job(1))
    await source.put(job(2))
    assert got == [1]
    stopping = asyncio.create_task(background.stop(20))  # it waits for the message in between, too
    await turns()
    asked_again.set()
    assert await stopping == 0
    assert got == [1, 2]


async def test_an_error_of_the_layer_ends_the_reader(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        async def receive(self, channel: str) -> dict[str, Any]:
            raise OSError("refused")

    background = BackgroundChannel("jobs", application=Work(), layer=Broken(), state={})
    reader = background.start()
    with pytest.raises(OSError, match="refused"):
        await reader
    assert await background.stop(5) == 0


async def test_on_a_layer_a_stop_leaves_the_rest_in_the_channel() -> None:
    layer, work = InMemoryChannelLayer(), Work()
    work.go_on.clear()
    background = BackgroundChannel("jobs", application=work, layer=layer, state={})
    background.start()
    for number in (1, 2):
        await layer.send("jobs", job(number))
    async with asyncio.timeout(30):
        while not work.begun:
            await turns()
    stopping = asyncio.create_task(background.stop(5))
    await turns()
    work.go_on.set()
    await stopping
    assert (await layer.receive("jobs"))["n"] == 2
