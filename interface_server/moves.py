"""Which connections look for their next worker, how many at a time, and until when. No I/O and no clock of its own.

    add --> waiting --next()--> looking --found()--> adopting --settled()--> (gone)
               ^                   |
               +----- again() -----+

A worker may lose ten thousand connections at once. So at most ``MOVES_AT_ONCE`` have an opening in the queue: that is
exempt from the queue's capacity, and must not keep others from it. All of them together have the same time, which
stands still while the broker is away.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, TypeVar

from channel_layer.enums import quick

__all__ = ["MOVES_AT_ONCE", "Moves", "MovesStatistics"]

# Openings of these that wait in the queue at a time; the rest waits here for its turn.
MOVES_AT_ONCE: Final = 32

T = TypeVar("T")


@quick
class _Phase(Enum):
    WAITING = "for its turn"
    LOOKING = "for a worker that takes it"
    ADOPTING = "a worker has it and has not accepted"


@dataclass(frozen=True, slots=True, kw_only=True)
class MovesStatistics:
    waiting: int
    looking: int
    adopting: int
    moved: int  # accepted by their next owner
    given_up: int  # in time by none
    longest_s: float  # of those that were moved, from the loss of one owner to the accept of the next


class _Move:
    __slots__ = ("phase", "since", "until")

    def __init__(self, now: float, timeout_s: float) -> None:
        self.since = now
        self.until = now + timeout_s
        self.phase = _Phase.WAITING


class Moves(Generic[T]):
    """``now`` of every call comes from one clock, which stands still while the broker is away."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._moves: dict[T, _Move] = {}  # in the order of their deadlines; bounded by the sockets
        self._waiting: dict[T, None] = {}  # a queue from which any may leave
        self._looking = 0
        self._moved = 0
        self._given_up = 0
        self._longest_s = 0.0

    def __len__(self) -> int:
        return len(self._moves)

    def __contains__(self, connection: T) -> bool:
        return connection in self._moves

    def __repr__(self) -> str:
        return f"<Moves {len(self._waiting)} waiting, {self._looking} looking, {len(self._moves)} in all>"

    def statistics(self) -> MovesStatistics:
        return MovesStatistics(
            waiting=len(self._waiting),
            looking=self._looking,
            adopting=len(self._moves) - len(self._waiting) - self._looking,
            moved=self._moved,
            given_up=self._given_up,
            longest_s=self._longest_s,
        )

    def add(self, connection: T, now: float) -> None:
        """``connection`` lost its owner. One that had begun to move before keeps its deadline."""
        if connection in self._moves:
            self.again(connection)
            return
        self._moves[connection] = _Move(now, self._timeout_s)
        self._waiting[connection] = None

    def next(self) -> list[T]:
        """Return those whose turn it is: their openings are to be stored now."""
        turn: list[T] = []
        while self._waiting and self._looking < MOVES_AT_ONCE:
            connection = next(iter(self._waiting))
            del self._waiting[connection]
            self._moves[connection].phase = _Phase.LOOKING
            self._looking += 1
            turn.append(connection)
        return turn

    def again(self, connection: T) -> None:
        """It was not stored, or whoever took it gave it back: it waits for another turn."""
        move = self._moves.get(connection)
        if move is not None and move.phase is not _Phase.WAITING:
            self._looking -= move.phase is _Phase.LOOKING
            move.phase = _Phase.WAITING
            self._waiting[connection] = None

    def found(self, connection: T) -> None:
        """A worker claimed it; perhaps when it waited again, for an opening of which the broker did not tell."""
        move = self._moves.get(connection)
        if move is not None:
            self._looking -= move.phase is _Phase.LOOKING
            self._waiting.pop(connection, None)
            move.phase = _Phase.ADOPTING

    def settled(self, connection: T, now: float) -> None:
        """Its next owner accepted."""
        move = self._moves.get(connection)
        if move is not None:
            self._moved += 1
            self._longest_s = max(self._longest_s, now - move.since)
            self.discard(connection)

    def discard(self, connection: T) -> None:
        """It is over, or its client is gone."""
        move = self._moves.pop(connection, None)
        if move is not None:
            self._looking -= move.phase is _Phase.LOOKING
            self._waiting.pop(connection, None)

    def next_deadline(self) -> float | None:
        move = next(iter(self._moves.values()), None)
        return None if move is None else move.until

    def overdue(self, now: float) -> list[T]:
        """Return, and forget, those whose time is over."""
        late = []
        for connection, move in self._moves.items():
            if move.until > now:
                break
            late.append(connection)
        for connection in late:
            self.discard(connection)
        self._given_up += len(late)
        return late
