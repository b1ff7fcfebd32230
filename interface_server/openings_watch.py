"""Which openings wait for a worker, which are lost, which have waited too long. No I/O and no clock of its own.

A taken opening leaves no trace in the broker, so one that nobody has claimed for a while is looked for
(docs/architecture.md). connections.py carries the looking, sending again and removing out and tells
this class the answers.

    stored --2 s--> OVERDUE --found--> OVERDUE (looked for again, once a second)
                       +--held: a worker has it, and is too busy to claim it--> looked for again 3 s later
                       +--missing--> MISSED --found--> OVERDUE
                                       +--missing again--> lost: sent again (three times), then OPENING_LOST
    queue timeout --> REMOVING --removed--> QUEUE_TIMEOUT
                         +--somebody took it--> TAKEN --no claim for 2 s--> QUEUE_TIMEOUT

A worker takes an opening and claims it a moment later, so missing once proves nothing. While the broker is away,
``now`` must stand still (``stand_still``, ``go_on``): nobody is late because nobody could come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from channel_layer.enums import quick

__all__ = ["Decision", "Look", "OpeningsWatch", "OpeningsWatchStatistics"]

# A worker that took an opening claims it within milliseconds, a busy one within the loop turn.
OVERDUE_S: Final = 2.0
LOOK_PERIOD_S: Final = 1.0
# A worker whose loop is blocked by its application says twice a second which openings it has not claimed.
HELD_S: Final = 3.0
LOST_SENDS_MAX: Final = 3  # beyond: the connection is refused with OPENING_LOST

# LPOS walks the list, so looking for everything in a full channel (4096 openings) would cost the broker 8 million
# comparisons a second for each interface server. What does not fit is looked for a second later; those that were
# looked for least recently go first.
LOOKED_FOR_MAX: Final = 512


@quick
class Decision(Enum):
    SEND_AGAIN = "lost: send it again with the same epoch"
    GIVE_UP_LOST = "lost too often: refuse with OPENING_LOST"
    REMOVE = "waited too long: remove it, then say whether it was there"
    GIVE_UP_TIMEOUT = "nobody has it in time: refuse with QUEUE_TIMEOUT"


@quick
class _Phase(Enum):
    WAITING = "stored; nothing is wrong"
    MISSED = "looked for once and not found"
    REMOVING = "being removed after the queue timeout"
    TAKEN = "not there any more at the queue timeout: a claim must come soon"


@dataclass(frozen=True, slots=True)
class Look:
    """Openings of one channel to look for, in one pipeline."""

    channel: str
    numbers: list[int]
    elements: list[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpeningsWatchStatistics:
    waiting: int
    oldest_s: float
    looked_for: int
    lost: int
    timed_out: int


class _Entry:
    __slots__ = ("channel", "element", "look_at", "phase", "sent_again_count", "since", "until")

    def __init__(self, channel: str, element: bytes, now: float, timeout_s: float) -> None:
        self.channel = channel
        self.element = element
        self.since = now  # of the first copy: sending again does not extend the queue timeout
        self.until = now + timeout_s  # the next thing that happens without an answer: queue timeout, missing claim
        self.look_at = now + OVERDUE_S
        self.phase = _Phase.WAITING
        self.sent_again_count = 0


class OpeningsWatch:
    """Openings that were stored and not claimed yet, by the number of their connection.

    ``now`` of every call comes from one monotonic clock. Call ``look`` and ``timed_out`` about once a second
    while ``len(self)``.
    """

    def __init__(self, *, queue_timeout_s: float) -> None:
        self._queue_timeout_s = queue_timeout_s
        # Ordered: whoever was stored or looked for last stands last. Bounded by the capacity of the channels.
        self._entries: dict[int, _Entry] = {}
        self._still_since: float | None = None  # the broker is away since
        self._still_s = 0.0  # how long it was away altogether
        self._looking: set[str] = set()  # channels whose last look has no answer yet
        self._looked_for_count = 0
        self._lost_count = 0
        self._timed_out_count = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, number: int) -> bool:
        return number in self._entries

    def __repr__(self) -> str:
        return f"<OpeningsWatch waiting={len(self._entries)} still={self._still_since is not None}>"

    def statistics(self, now: float) -> OpeningsWatchStatistics:
        time = self._time(now)
        return OpeningsWatchStatistics(
            waiting=len(self._entries),
            oldest_s=max((time - entry.since for entry in self._entries.values()), default=0.0),
            looked_for=self._looked_for_count,
            lost=self._lost_count,
            timed_out=self._timed_out_count,
        )

    def stored(self, number: int, channel: str, element: bytes, now: float) -> None:
        """An opening, or the next copy of a lost one, is in the broker as ``element``."""
        time = self._time(now)
        entry = self._entries.pop(number, None)
        if entry is None:
            entry = _Entry(channel, element, time, self._queue_timeout_s)
        else:
            entry.element = element
            entry.look_at = time + OVERDUE_S
            entry.phase = _Phase.WAITING
        self._entries[number] = entry

    def held(self, number: int, now: float) -> None:
        """A worker says that it has taken this opening and will claim it when it can."""
        entry = self._entries.get(number)
        if entry is None or entry.phase is _Phase.REMOVING or entry.look_at == float("inf"):
            return
        entry.phase = _Phase.WAITING
        entry.look_at = self._time(now) + HELD_S
        entry.until = max(entry.until, entry.look_at)
        # Its application has begun, perhaps: should it be lost now, it may begin once more, as behind a claim.
        entry.sent_again_count = max(entry.sent_again_count, LOST_SENDS_MAX - 1)

    def discard(self, number: int) -> bytes | None:
        """Forget an opening: claimed, or the client is gone. Returns its element."""
        entry = self._entries.pop(number, None)
        return None if entry is None else entry.element

    def element(self, number: int) -> bytes | None:
        entry = self._entries.get(number)
        return None if entry is None else entry.element

    def stand_still(self, now: float) -> None:
        """The broker went away."""
        if self._still_since is None:
            self._still_since = now
        # Answers to looks that are under way do not come, or come as errors.
        self._looking.clear()

    def go_on(self, now: float) -> None:
        """The broker is back."""
        if self._still_since is not None:
            self._still_s += now - self._still_since
            self._still_since = None

    def still_s(self, now: float) -> float:
        """How long the broker was away altogether, the present absence included."""
        return self._still_s if self._still_since is None else self._still_s + now - self._still_since

    def look(self, now: float) -> list[Look]:
        """Return what to look for now, at most one Look for each channel; ``answered`` wants the answers."""
        if self._still_since is not None:
            return []
        time = self._time(now)
        looks: dict[str, Look] = {}
        for number, entry in self._entries.items():
            if entry.look_at > time or entry.phase in (_Phase.REMOVING, _Phase.TAKEN):
                continue
            if entry.channel in self._looking:
                continue
            look = looks.setdefault(entry.channel, Look(entry.channel, [], []))
            if len(look.numbers) < LOOKED_FOR_MAX:
                look.numbers.append(number)
                look.elements.append(entry.element)
        for look in looks.values():
            self._looking.add(look.channel)
            self._looked_for_count += len(look.numbers)
            for number in look.numbers:
                self._entries[number] = entry = self._entries.pop(number)
                entry.look_at = time + LOOK_PERIOD_S
        return list(looks.values())

    def answered(self, look: Look, found: Sequence[bool] | None) -> Iterator[tuple[int, Decision]]:
        """Take the answer to a Look; None: there was none. Yields what to do with those that are lost."""
        self._looking.discard(look.channel)
        if found is None:
            return
        for number, element, is_there in zip(look.numbers, look.elements, found, strict=True):
            entry = self._entries.get(number)
            if entry is None or entry.element != element or entry.phase not in (_Phase.WAITING, _Phase.MISSED):
                continue  # claimed, gone, sent again or timed out while we looked
            if is_there:
                entry.phase = _Phase.WAITING
            elif entry.phase is _Phase.WAITING:
                entry.phase = _Phase.MISSED
            else:
                self._lost_count += 1
                entry.sent_again_count += 1
                if entry.sent_again_count > LOST_SENDS_MAX:
                    del self._entries[number]
                    yield number, Decision.GIVE_UP_LOST
                else:
                    # Not looked for again until ``stored`` says that the next copy is there.
                    entry.look_at = float("inf")
                    yield number, Decision.SEND_AGAIN

    def timed_out(self, now: float) -> list[tuple[int, Decision]]:
        """Return those whose time is over now, and what to do with them."""
        if self._still_since is not None:
            return []
        time = self._time(now)
        decisions = []
        for number, entry in self._entries.items():
            if entry.until <= time:
                # Lost, and the next copy has not been stored: there is nothing to remove.
                if entry.phase is _Phase.TAKEN or entry.look_at == float("inf"):
                    decisions.append((number, Decision.GIVE_UP_TIMEOUT))
                elif entry.phase is not _Phase.REMOVING:
                    entry.phase = _Phase.REMOVING
                    decisions.append((number, Decision.REMOVE))
        for number, decision in decisions:
            if decision is Decision.GIVE_UP_TIMEOUT:
                del self._entries[number]
                self._timed_out_count += 1
        return decisions

    def removed(self, number: int, was_there: bool | None, now: float) -> Decision | None:
        """Take the answer to REMOVE; None: there was none, so it is tried again."""
        entry = self._entries.get(number)
        if entry is None or entry.phase is not _Phase.REMOVING:
            return None
        if was_there:
            del self._entries[number]
            self._timed_out_count += 1
            return Decision.GIVE_UP_TIMEOUT
        if was_there is None:
            entry.phase = _Phase.WAITING
        else:
            entry.phase = _Phase.TAKEN
            entry.until = self._time(now) + OVERDUE_S
        return None

    def _time(self, now: float) -> float:
        """The clock without the time the broker was away."""
        return (now if self._still_since is None else self._still_since) - self._still_s
