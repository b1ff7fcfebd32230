"""Calls of synchronous code that asgiref has run in its one thread: handed over and returned many at a time.

Django and Channels run what may touch a database in that thread, one call after the other (``sync_to_async``, thread
sensitive). asgiref asks the loop for it (``run_in_executor``), and Python makes two futures, a lock and some closures
for each call and wakes the other thread twice. Where a thousand consumers get a message of their group, as many calls
are under way at once. Here they wait in one queue, which one job of the executor works off; what is done meanwhile is
returned to the loop together.

    call() ─> _waiting ─> _work(), in the thread ─> _done ─> _settle(), on the loop

Nothing else is different: the same thread, the same order, and each result is on its way before the next call begins.
Lives here: that. Does not live here: which thread it is (asgiref), other executors (the loop).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Final

from asgiref.sync import SyncToAsync

__all__ = ["ThreadCalls", "loop_class"]

# Calls that one job of the executor works off, so that jobs which others gave it have their turn.
_CALLS_AT_ONCE: Final = 100


class ThreadCalls:
    """Of one loop, for an executor with one thread."""

    __slots__ = ("_done", "_executor", "_is_working", "_loop", "_waiting", "_wakes")

    def __init__(self, loop: asyncio.AbstractEventLoop, executor: Executor) -> None:
        self._loop = loop
        self._executor = executor
        # Bounded by the callers: each awaits its call. Both deques are filled by one thread and emptied by the other.
        self._waiting: deque[tuple[asyncio.Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._done: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        # A job that will look into _waiting again is with the executor. Two may be, for an instant, which does no
        # harm: they run in one thread.
        self._is_working = False
        self._wakes = False  # _settle() is on its way

    def __repr__(self) -> str:
        return f"<ThreadCalls waiting={len(self._waiting)} done={len(self._done)}>"

    @property
    def executor(self) -> Executor:
        return self._executor

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> asyncio.Future[Any]:
        """Have it called in the thread; as ``loop.run_in_executor``. Cancelled before it began, it is not called."""
        future = self._loop.create_future()
        self._waiting.append((future, function, arguments))
        if not self._is_working:
            self._is_working = True
            try:
                self._executor.submit(self._work)
            except BaseException:  # it was shut down
                self._is_working = False
                with contextlib.suppress(IndexError):  # a last job had it
                    self._waiting.pop()
                raise
        return future

    # In the thread

    def _work(self) -> None:
        for _ in range(_CALLS_AT_ONCE):
            if not self._waiting:
                # In this order: what comes behind the second look sees that nobody works, and submits a job.
                self._is_working = False
                if not self._waiting:
                    return
                self._is_working = True
            self._carry_out(*self._waiting.popleft())
        try:
            self._executor.submit(self._work)
        except RuntimeError:  # it was shut down, by the end of the process
            self._is_working = False

    def _carry_out(
        self, future: asyncio.Future[Any], function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        if future.cancelled():
            return
        try:
            self._done.append((future, function(*arguments), None))
        except BaseException as error:  # as concurrent.futures: whatever it is, it is the caller's
            self._done.append((future, None, error))
            del future  # the traceback leads to this frame: no cycle
        if not self._wakes:
            self._wakes = True
            try:
                self._loop.call_soon_threadsafe(self._settle)
            except RuntimeError:
                self._done.clear()  # the loop is closed: nobody waits any more

    # On the loop

    def _settle(self) -> None:
        # In this order: what is done from now on wakes the loop again.
        self._wakes = False
        for _ in range(len(self._done)):
            future, result, error = self._done.popleft()
            if future.done():
                continue
            if error is None:
                future.set_result(result)
            elif isinstance(error, StopIteration):  # no future takes one: it would end whoever awaits it
                future.set_exception(RuntimeError(f"the call raised {error!r}"))
            else:
                future.set_exception(error)


class _Calling:
    """What is ours of a worker's loop."""

    _thread_calls: ThreadCalls | None = None

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        if executor is None or executor is not SyncToAsync.single_thread_executor:
            return super().run_in_executor(executor, func, *args)  # type: ignore[misc]
        calls = self._thread_calls
        if calls is None or calls.executor is not executor:
            calls = self._thread_calls = ThreadCalls(self, executor)  # type: ignore[arg-type]
        return calls.call(func, args)


def loop_class(base: type[asyncio.AbstractEventLoop]) -> type[asyncio.AbstractEventLoop]:
    """Return ``base`` with these calls."""
    return type(f"Worker{base.__name__}", (_Calling, base), {})
