"""The lifespan protocol, with applications of every kind."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from worker.events import InvalidEvent
from worker.lifespan import Lifespan, LifespanFailed, LifespanPhase

COMPLETE = {"type": "lifespan.startup.complete"}
SHUTDOWN_COMPLETE = {"type": "lifespan.shutdown.complete"}


def make_application(log: list[Any], *, startup: Any = COMPLETE, shutdown: Any = SHUTDOWN_COMPLETE) -> Any:
    """An application that answers with these; an exception is raised, None returns."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        log.append(dict(scope))
        for answer in (startup, shutdown):
            event = await receive()
            log.append(event["type"])
            if answer is None:
                return
            if isinstance(answer, BaseException):
                raise answer
            if event["type"] == "lifespan.startup":
                scope["state"]["db"] = "connected"
            await send(answer)

    return application


async def test_startup_and_shutdown() -> None:
    log: list[Any] = []
    lifespan = Lifespan(make_application(log))
    await lifespan.startup()
    assert lifespan.phase is LifespanPhase.STARTED
    assert lifespan.state == {"db": "connected"}
    assert log == [
        {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": lifespan.state},
        "lifespan.startup",
    ]
    assert await lifespan.shutdown(5) is True
    assert log[2:] == ["lifespan.shutdown"]
    assert lifespan.phase is LifespanPhase.OVER
    assert repr(lifespan) == "<Lifespan auto, over>"


async def test_startup_waits_for_the_answer() -> None:
    go = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await go.wait()
        await send(COMPLETE)
        await receive()

    lifespan = Lifespan(application)
    starting = asyncio.create_task(lifespan.startup())
    await asyncio.sleep(0.01)
    assert not starting.done()
    go.set()
    await starting
    assert await lifespan.shutdown(5) is True  # it returns without an answer: that is over, too


@pytest.mark.parametrize("mode", ["auto", "on"])
async def test_startup_failed_is_fatal(mode: Any) -> None:
    failed = {"type": "lifespan.startup.failed", "message": "no database"}
    with pytest.raises(LifespanFailed, match="could not start: no database"):
        await Lifespan(make_application([], startup=failed), mode=mode).startup()


async def test_startup_failed_without_a_message_and_then_an_exception(caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.failed"})
        raise RuntimeError("as Starlette does")

    with pytest.raises(LifespanFailed, match=r"could not start$"):
        await Lifespan(application).startup()
    assert "Traceback" not in caplog.text


async def test_an_application_without_lifespan_is_served(caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", "only HTTP here"

    caplog.set_level(logging.INFO)
    lifespan = Lifespan(application)
    await lifespan.startup()
    assert lifespan.phase is LifespanPhase.OVER
    assert "without lifespan" in caplog.text
    assert "Traceback" not in caplog.text
    assert await lifespan.shutdown(5) is True


async def test_an_exception_of_an_application_that_knows_lifespan_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    lifespan = Lifespan(make_application([], startup=ZeroDivisionError("mine")))
    await lifespan.startup()
    assert lifespan.phase is LifespanPhase.OVER
    assert "ZeroDivisionError: mine" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("startup", [RuntimeError("no"), SystemExit(3), None])
async def test_on_makes_its_failure_fatal(startup: Any) -> None:
    with pytest.raises(LifespanFailed, match="--lifespan on"):
        await Lifespan(make_application([], startup=startup), mode="on").startup()


async def test_off_calls_nothing() -> None:
    log: list[Any] = []
    lifespan = Lifespan(make_application(log), mode="off")
    await lifespan.startup()
    assert await lifespan.shutdown(5) is True
    assert (log, lifespan.state) == ([], {})


async def test_shutdown_failed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    failed = {"type": "lifespan.shutdown.failed", "message": "could not flush"}
    lifespan = Lifespan(make_application([], shutdown=failed))
    await lifespan.startup()
    assert await lifespan.shutdown(5) is False
    assert "could not flush" in caplog.text


async def test_an_exception_at_shutdown_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    lifespan = Lifespan(make_application([], shutdown=ZeroDivisionError("late")))
    await lifespan.startup()
    assert await lifespan.shutdown(5) is False
    assert "ZeroDivisionError: late" in caplog.text


async def test_a_shutdown_that_hangs_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    cancelled = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(COMPLETE)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    lifespan = Lifespan(application)
    await lifespan.startup()
    assert await lifespan.shutdown(0.01) is False
    assert cancelled.is_set()
    assert "within 0.01 s" in caplog.text


async def test_a_lifespan_that_ends_by_itself_gets_no_shutdown(caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(COMPLETE)
        raise ZeroDivisionError("in between")

    lifespan = Lifespan(application)
    await lifespan.startup()
    await asyncio.sleep(0)
    assert lifespan.phase is LifespanPhase.OVER
    assert "ZeroDivisionError: in between" in caplog.text
    assert await lifespan.shutdown(5) is True


async def test_a_cancelled_startup_cancels_the_application() -> None:
    cancelled = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    starting = asyncio.create_task(Lifespan(application).startup())
    await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert cancelled.is_set()


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"type": "lifespan.shutdown.complete"}], "'lifespan.shutdown.complete' while its lifespan is starting"),
        ([{"type": "http.response.start"}], "expected 'lifespan.startup.complete'"),
        ([{}], "None"),
        ([None], "None"),
        ([COMPLETE, COMPLETE], "expected nothing"),
        ([{"type": "lifespan.startup.failed", "message": 5}], '"message" is 5'),
    ],
)
async def test_wrong_answers_raise_in_the_application(messages: list[Any], text: str) -> None:
    errors: list[Exception] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        try:
            for message in messages:
                await send(message)
        except InvalidEvent as error:
            errors.append(error)

    await Lifespan(application).startup()
    (error,) = errors
    assert text in str(error)
