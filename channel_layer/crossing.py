"""Calls from one event loop to another, usually in another thread, that lose no result.

``asyncio.run_coroutine_threadsafe`` forgets a result that is ready at the instant its caller is cancelled; for a
received message that is a lost message. Here exactly one of the two happens: the caller gets the result, or
``undo`` gets it on the loop that made it. Lives here: that hand-over. Does not live here: which loop is the right
one (process_layer.py, home.py).

    WAITING --the call ended--> DELIVERED --the caller was cancelled all the same--> undo
       +----the caller was cancelled--> ABANDONED (the call is cancelled) --it ended nevertheless--> undo
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from enum import Enum, auto
from typing import Any, Generic, TypeVar

from channel_layer.errors import BrokerUnavailable

__all__ = ["call_on"]

T = TypeVar("T")


class _State(Enum):
    WAITING = auto()
    DELIVERED = auto()
    ABANDONED = auto()


async def call_on(
    home: asyncio.AbstractEventLoop,
    make: Callable[[], Coroutine[Any, Any, T]],
    undo: Callable[[T], None] | None = None,
) -> T:
    """Run the coroutine that ``make`` returns on the loop ``home``; return what it returns.

    Cancelling this cancels the coroutine, without waiting for its end. If it has a result all the same, ``undo`` is
    called with that on ``home``. Raises BrokerUnavailable if ``home`` is closed.
    """
    crossing = _Crossing(home, asyncio.get_running_loop(), make, undo)
    try:
        home.call_soon_threadsafe(crossing.begin)
    except RuntimeError as error:
        raise BrokerUnavailable("the channel layer's event loop is closed: its process has stopped it") from error
    try:
        return await crossing.answer
    except asyncio.CancelledError:
        crossing.abandon()
        raise


class _Crossing(Generic[T]):
    """One call on its way."""

    __slots__ = ("_caller", "_home", "_lock", "_make", "_state", "_task", "_undo", "answer")

    def __init__(
        self,
        home: asyncio.AbstractEventLoop,
        caller: asyncio.AbstractEventLoop,
        make: Callable[[], Coroutine[Any, Any, T]],
        undo: Callable[[T], None] | None,
    ) -> None:
        self._home = home
        self._caller = caller
        self._make = make
        self._undo = undo
        self._lock = threading.Lock()  # guards _state, which both threads change
        self._state = _State.WAITING
        self._task: asyncio.Task[T] | None = None  # on home
        self.answer: asyncio.Future[T] = caller.create_future()  # on the caller's loop

    # On the caller's loop

    def abandon(self) -> None:
        with self._lock:
            was, self._state = self._state, _State.ABANDONED
        # If home is closed, so is its process layer: there is nothing to return a message to.
        with contextlib.suppress(RuntimeError):
            self._home.call_soon_threadsafe(self._take_back if was is _State.DELIVERED else self._cancel)

    def _settle(self, task: asyncio.Task[T]) -> None:
        if self.answer.done():
            return  # cancelled; abandon() has seen to the result, or does when the caller's task runs
        if task.cancelled():
            self.answer.set_exception(BrokerUnavailable("the channel layer was closed during the call"))
        elif (error := task.exception()) is not None:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(task.result())

    # On home

    def begin(self) -> None:
        with self._lock:
            if self._state is _State.ABANDONED:
                return
        self._task = self._home.create_task(self._make())
        self._task.add_done_callback(self._ended)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _ended(self, task: asyncio.Task[T]) -> None:
        with self._lock:
            is_delivered = self._state is _State.WAITING
            if is_delivered:
                self._state = _State.DELIVERED
        if is_delivered:
            try:
                self._caller.call_soon_threadsafe(self._settle, task)
            except RuntimeError:
                self._take_back()  # the caller's loop was closed under the call
        else:
            self._take_back()

    def _take_back(self) -> None:
        task = self._task
        if task is None or task.cancelled() or task.exception() is not None:
            return
        if self._undo is not None:
            self._undo(task.result())
