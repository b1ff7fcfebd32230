"""Whose turn it is among those who have more to do than is done in one go. No I/O, no clock.

One read of a socket may hold 10,922 pings or chunks of a byte, and whoever reads it to its end has the loop for 10 ms
and longer, while everybody else waits. So each reader stops behind some of them (``TURN_FRAMES_MAX`` of
frame_reader.py, ``TURN_CHUNKS_MAX`` of chunked_body.py), pauses its transport and asks here for another turn. In a
worker an application instance does, behind some events that had come before it asked (``TURN_EVENTS_MAX`` of
instance.py).

In a turn of the loop **one** of them goes on, however many wait, then all sockets are looked at again: a thousand
floods hold up what their neighbours send as little as one does, and share what is left of the loop among themselves.
Who has little to do never comes here: it is done at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final

__all__ = ["Turns"]

_LOGGER: Final = logging.getLogger("trunkline.channel_layer")


class Turns:
    """One for a process."""

    __slots__ = ("_call_later", "_is_called", "_waiting")

    def __init__(self, call_later: Callable[[Callable[[], None]], Any] | None = None) -> None:
        """``call_later`` calls back in the next turn of the loop, or behind a pause, which bounds what they
        all have of the loop together. None: asyncio's call_soon.
        """
        self._call_later = call_later
        # Bounded by the sockets, or the instances: each waits here once at most, and nothing more comes from a paused
        # socket meanwhile.
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_called = False  # the loop will call _next, or does

    def __repr__(self) -> str:
        return f"<Turns waiting={len(self._waiting)}>"

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, go_on: Callable[[], None]) -> None:
        """Call ``go_on``, once, in a later turn of the loop, behind those who wait already.

        It cannot be taken back: who is gone by then finds that out by itself.
        """
        self._waiting.append(go_on)
        if not self._is_called:
            self._is_called = True
            self._call()

    def _call(self) -> None:
        (self._call_later or asyncio.get_running_loop().call_soon)(self._next)

    def _next(self) -> None:
        try:
            self._waiting.popleft()()
        except Exception:
            # This one's affair; the others wait behind it.
            _LOGGER.exception("what waited for its turn failed")
        if self._waiting:
            self._call()
        else:
            self._is_called = False
