"""Calls between loops: exactly one of caller and undo gets the result, whenever the caller is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from channel_layer.crossing import _Crossing, call_on
from channel_layer.errors import BrokerUnavailable

PATIENCE_S = 60.0


@pytest.fixture
def home() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def settle(home: asyncio.AbstractEventLoop) -> None:
    """Return when both loops have done what was on its way."""
    for _ in range(3):
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), home))
        await asyncio.sleep(0)


async def test_results_and_errors_come_back(home: asyncio.AbstractEventLoop) -> None:
    async def answer() -> str:
        assert asyncio.get_running_loop() is home
        return "answer"

    async def fail() -> None:
        raise KeyError("x")

    assert await call_on(home, answer) == "answer"
    with pytest.raises(KeyError):
        await call_on(home, fail)


async def test_a_cancelled_call_is_cancelled_at_home(home: asyncio.AbstractEventLoop) -> None:
    started, ended = threading.Event(), threading.Event()

    async def wait() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    call = asyncio.create_task(call_on(home, wait))
    assert await asyncio.to_thread(started.wait, PATIENCE_S)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(ended.wait, PATIENCE_S)


async def test_a_call_cancelled_before_it_began_does_not_begin(home: asyncio.AbstractEventLoop) -> None:
    begun: list[int] = []

    async def begin() -> None:
        begun.append(1)

    gate = threading.Event()
    home.call_soon_threadsafe(gate.wait)
    call = asyncio.create_task(call_on(home, begin))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gate.set()
    await settle(home)
    assert begun == []


async def test_a_result_on_its_way_to_a_cancelled_caller_is_undone(home: asyncio.AbstractEventLoop) -> None:
    undone: list[tuple[str, bool]] = []
    delivered = threading.Event()

    async def answer() -> str:
        home.call_soon(home.call_soon, home.call_soon, delivered.set)
        return "answer"

    call = asyncio.create_task(
        call_on(home, answer, undo=lambda it: undone.append((it, asyncio.get_running_loop() is home)))
    )
    await asyncio.sleep(0)
    # Blocks this loop, so that the result is there and its caller has not run.
    assert delivered.wait(PATIENCE_S)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await settle(home)
    assert undone == [("answer", True)]


async def test_a_call_that_ends_though_it_was_cancelled_is_undone(home: asyncio.AbstractEventLoop) -> None:
    undone: list[str] = []
    started = threading.Event()

    async def stubborn() -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "all the same"
        return "never"

    call = asyncio.create_task(call_on(home, stubborn, undo=undone.append))
    assert await asyncio.to_thread(started.wait, PATIENCE_S)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await settle(home)
    assert undone == ["all the same"]


async def test_a_caller_whose_loop_was_closed_gets_nothing_and_undo_gets_it(home: asyncio.AbstractEventLoop) -> None:
    undone: list[str] = []
    gate = asyncio.run_coroutine_threadsafe(_make_event(), home).result(PATIENCE_S)

    async def answer() -> str:
        await gate.wait()
        return "answer"

    def call_and_close() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(call_on(home, answer, undo=undone.append))
        loop.run_until_complete(asyncio.sleep(0))
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()

    await asyncio.to_thread(call_and_close)
    home.call_soon_threadsafe(gate.set)
    await settle(home)
    assert undone == ["answer"]


async def _make_event() -> asyncio.Event:
    return asyncio.Event()


async def test_exactly_one_gets_each_result_whenever_the_caller_is_cancelled(
    home: asyncio.AbstractEventLoop,
) -> None:
    undone: list[int] = []
    got: list[int] = []
    made: list[int] = []

    async def answer(number: int) -> int:
        for _ in range(number % 3):
            await asyncio.sleep(0)
        made.append(number)
        return number

    number = 0
    while number < 2000 or not undone:
        number += 1
        call = asyncio.create_task(call_on(home, lambda number=number: answer(number), undo=undone.append))  # type: ignore[misc]
        for _ in range(number % 11):
            await asyncio.sleep(0)
        call.cancel()
        results = await asyncio.gather(call, return_exceptions=True)
        got += [result for result in results if isinstance(result, int)]
    await settle(home)
    assert sorted(got + undone) == sorted(made)
    assert undone


async def test_a_call_abandoned_at_the_instant_of_its_delivery_is_undone_once() -> None:
    loop = asyncio.get_running_loop()
    undone: list[str] = []

    async def answer() -> str:
        return "answer"

    crossing = _Crossing(loop, loop, answer, undone.append)
    releases: list[object] = []

    class Lock:
        """Has the caller's thread run, and abandon the call, between the delivery's lock and what is behind it."""

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            releases.append(None)
            if len(releases) == 2:  # the first one is begin()'s
                crossing.answer.cancel()
                crossing.abandon()

    crossing._lock = Lock()  # type: ignore[assignment]
    crossing.begin()
    await settle(loop)
    assert len(releases) == 3  # and abandon()'s
    assert undone == ["answer"]


async def test_a_closed_home_is_an_unavailable_broker() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(BrokerUnavailable):
        await call_on(loop, lambda: asyncio.sleep(0))
