"""Calls of synchronous code in asgiref's one thread, many at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import uvloop
from asgiref.sync import SyncToAsync, sync_to_async

from worker.thread_calls import ThreadCalls, loop_class

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(autouse=True)
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        monkeypatch.setattr(SyncToAsync, "single_thread_executor", executor)
        yield executor


@pytest.fixture(params=[asyncio.SelectorEventLoop, uvloop.Loop])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a coroutine on a worker's loop."""
    with asyncio.Runner(loop_factory=loop_class(request.param)) as runner:
        yield runner.run


def test_calls_keep_their_order_and_their_thread(run: Run, executor: ThreadPoolExecutor) -> None:
    called: list[tuple[int, int]] = []

    def call(number: int) -> int:
        called.append((number, threading.get_ident()))
        return number

    async def main() -> None:
        calls = [sync_to_async(call)(number) for number in range(1000)]
        assert await asyncio.gather(*calls) == list(range(1000))

    run(main())
    thread = executor.submit(threading.get_ident).result()
    assert thread != threading.get_ident()
    assert called == [(number, thread) for number in range(1000)]


def test_a_result_is_returned_before_the_next_call_ends(run: Run) -> None:
    first_is_known = threading.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        executor = SyncToAsync.single_thread_executor
        first = loop.run_in_executor(executor, lambda: "first")
        second = loop.run_in_executor(executor, first_is_known.wait, 20)
        assert await first == "first"
        first_is_known.set()
        assert await second

    run(main())


class Strange(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "expected"), [(ValueError("wrong"), ValueError), (Strange(), Strange), (StopIteration(), RuntimeError)]
)
def test_what_a_call_raises_is_raised_where_it_is_awaited(
    run: Run, error: BaseException, expected: type[BaseException]
) -> None:
    def fail() -> None:
        raise error

    async def main() -> None:
        loop = asyncio.get_running_loop()
        executor = SyncToAsync.single_thread_executor
        failing = loop.run_in_executor(executor, fail)
        following = loop.run_in_executor(executor, lambda: "all the same")
        with pytest.raises(expected):
            await failing
        assert await following == "all the same"

    run(main())


def test_a_call_that_is_cancelled_while_it_waits_is_not_made(run: Run) -> None:
    go_on = threading.Event()
    called: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        executor = SyncToAsync.single_thread_executor
        blocking = loop.run_in_executor(executor, go_on.wait, 20)
        cancelled, kept = (loop.run_in_executor(executor, called.append, number) for number in (1, 2))
        cancelled.cancel()
        go_on.set()
        await blocking
        await kept
        # Cancelled while it runs: the thread goes on, and its result is nobody's.
        begun, end = threading.Event(), threading.Event()
        running = loop.run_in_executor(executor, lambda: (begun.set(), end.wait(20)))
        await loop.run_in_executor(None, begun.wait, 20)
        running.cancel()
        end.set()
        await loop.run_in_executor(executor, called.append, 3)

    run(main())
    assert called == [2, 3]


def test_jobs_that_others_give_the_thread_have_their_turn(run: Run, executor: ThreadPoolExecutor) -> None:
    go_on = threading.Event()
    order: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        first = loop.run_in_executor(executor, go_on.wait, 20)
        calls = [loop.run_in_executor(executor, order.append, number) for number in range(500)]
        job = executor.submit(order.append, "job")
        go_on.set()
        await asyncio.gather(first, *calls)
        job.result(20)

    run(main())
    assert [entry for entry in order if entry != "job"] == list(range(500))
    assert order.index("job") < 200


def test_other_executors_are_used_as_ever(run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "other") as other:
            name = await loop.run_in_executor(other, lambda: threading.current_thread().name)
        assert name.startswith("other")
        assert await loop.run_in_executor(None, lambda: 1) == 1
        assert getattr(loop, "_thread_calls", None) is None

    run(main())


def test_an_executor_that_was_shut_down_says_so(run: Run, executor: ThreadPoolExecutor) -> None:
    async def main() -> None:
        calls = ThreadCalls(asyncio.get_running_loop(), executor)
        assert await calls.call(lambda: 1, ()) == 1
        executor.shutdown()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="shutdown"):
                calls.call(lambda: 2, ())
        assert repr(calls) == "<ThreadCalls waiting=0 done=0>"

    run(main())


def test_a_loop_that_is_closed_meanwhile_leaves_the_thread_usable(executor: ThreadPoolExecutor) -> None:
    go_on = threading.Event()
    loop = loop_class(asyncio.SelectorEventLoop)()
    for _ in range(2):
        loop.run_in_executor(executor, go_on.wait, 20)
    loop.close()
    go_on.set()
    assert executor.submit(lambda: "here").result(20) == "here"
