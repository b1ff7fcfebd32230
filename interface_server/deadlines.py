"""Deadlines of very many connections on one timer.

Each connection has one deadline at most (of its handshake, its pong, its closing …); moving it costs a set
operation, not a timer. So 100,000 idle sockets wake the loop twice a second, not 100,000 times. A deadline is kept
to the tick: never early, late by a tick at most, and later while the loop is busy.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

__all__ = ["Deadlines", "DeadlinesStatistics", "HasDeadline"]

_LOGGER: Final = logging.getLogger("trunkline.interface")

_TICK_S: Final = 0.5
# So many connections in one loop turn, then others have theirs: whoever connected together (after a deploy, say)
# is due together, and each is worth a write.
_SLICE_ITEMS: Final = 250


class HasDeadline(Protocol):
    deadline_tick: int | None  # written by Deadlines only; None initially, and while no deadline is set

    def deadline_reached(self) -> None:
        """It is over; no deadline is set any more. Must not raise."""


@dataclass(frozen=True, slots=True)
class DeadlinesStatistics:
    armed_count: int
    reached_count: int


class Deadlines:
    """Used on the loop only."""

    def __init__(
        self,
        *,
        call_later: Callable[[float, Callable[[], None]], Any],
        clock: Callable[[], float],
        tick_s: float = _TICK_S,
    ) -> None:
        self._call_later = call_later
        self.clock = clock  # seconds, monotonic
        self._tick_s = tick_s
        # By tick. Bounded: an item is in one slot at most.
        self._slots: dict[int, set[HasDeadline]] = {}
        self._next_tick = 0  # the first slot that has not been emptied; has a meaning while the timer runs
        self._due: deque[HasDeadline] = deque()  # out of their slots, wait for their slice
        self._timer: Any = None  # runs while anything is armed
        self._armed_count = 0
        self._reached_count = 0

    def __repr__(self) -> str:
        return f"<Deadlines armed={self._armed_count}>"

    def statistics(self) -> DeadlinesStatistics:
        return DeadlinesStatistics(armed_count=self._armed_count, reached_count=self._reached_count)

    def arm(self, item: HasDeadline, delay_s: float) -> None:
        """Set the item's deadline, instead of one that is set."""
        if item.deadline_tick is not None:
            self.disarm(item)
        now = self.clock()
        item.deadline_tick = tick = int((now + delay_s) / self._tick_s) + 1
        slot = self._slots.get(tick)
        if slot is None:
            slot = self._slots[tick] = set()
        slot.add(item)
        self._armed_count += 1
        if self._timer is None:
            self._next_tick = int(now / self._tick_s)
            self._timer = self._call_later(self._tick_s, self._tick)

    def disarm(self, item: HasDeadline) -> None:
        """Forget the item's deadline, if there is one."""
        tick, item.deadline_tick = item.deadline_tick, None
        if tick is None:
            return
        self._armed_count -= 1
        slot = self._slots.get(tick)
        if slot is not None:
            slot.discard(item)
            if not slot:
                del self._slots[tick]

    def close(self) -> None:
        """Stop the timer; no deadline is reached any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._slots.clear()
        self._due.clear()

    def _tick(self) -> None:
        now_tick = int(self.clock() / self._tick_s)
        for tick in range(self._next_tick, now_tick + 1):
            self._due.extend(self._slots.pop(tick, ()))
        self._next_tick = now_tick + 1
        for _ in range(min(len(self._due), _SLICE_ITEMS)):
            item = self._due.popleft()
            # It may have been disarmed, or moved to a later slot, since it fell due.
            if item.deadline_tick is not None and item.deadline_tick <= now_tick:
                item.deadline_tick = None
                self._armed_count -= 1
                self._reached_count += 1
                try:
                    item.deadline_reached()
                except Exception:
                    # A fault of ours in one connection must not stop the deadlines of all others.
                    _LOGGER.exception("the deadline of %r failed", item)
        if self._due:
            self._timer = self._call_later(0, self._tick)
        elif self._slots:
            self._timer = self._call_later(self._tick_s, self._tick)
        else:
            self._timer = None
