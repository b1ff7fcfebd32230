"""What a WebSocket needs to go on in another worker: its checkpoint, and everything that no checkpoint covers.

What lives here: the rules of hand-over, as plain state without I/O and without a clock. What does not: looking for
the next worker (moves.py, connections.py), the frames (client_connection.py), what an application must do
(docs/handover.md).

A ``Handover`` exists from the first checkpoint of a connection on, so that connections which never store one cost
nothing. It numbers the messages of the client from 1, anew for each owner, as the owner counts what its application
has received.

        forgotten       retained: offered to the owner, covered by no checkpoint
    |---------------|-----------------------------------------------|
    0               retained_from                                   offered_count
                    ^ a checkpoint that covers up to here (or later: then it moves there) makes the connection movable

``retained`` is bounded by two windows: one that the application may receive without a checkpoint (beyond it all of
them are forgotten, and a checkpoint helps again only when it covers them), one that is on its way to it. One message
may be larger.

With ``commit`` what the application sends waits here for the next checkpoint, ``HELD_SHARE`` of a window at most.
Beyond it everything leaves, and the connection is movable no more until the next checkpoint: what the client has, it
must not get again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final

from channel_layer.connection import EVENT_COST_MIN_BYTES, FlowControlError
from channel_layer.enums import quick
from channel_layer.frames import Outcome

__all__ = [
    "FURTHER_TRIES_MAX",
    "STATE_BYTES_MAX",
    "Handover",
    "HandoverMode",
    "Loss",
    "NextStep",
    "decide_after_loss",
    "decide_after_refusal",
]

# A checkpoint, encoded; the worker refuses a larger one in ``send()``, with room for the envelope.
STATE_BYTES_MAX: Final = 64 * 1024 + 64

# A little less than half, so that behind what is held there is always credit for one more piece: otherwise the
# application's send() could wait for credit, and the credit for the checkpoint behind that send().
HELD_SHARE: Final = 1 / 2 - 1 / 64

# A worker that took a connection may give it back. Then another one is tried, so often; then the client is told.
FURTHER_TRIES_MAX: Final = 2

# A connection that loses a second owner to a crash within this time may well be what kills them.
TWO_LOSSES_WITHIN_S: Final = 60.0

# An event that is held, and its cost in credit.
_Sent = tuple[dict[str, Any], int]
_NOTHING: Final[Sequence[_Sent]] = ()


@quick
class HandoverMode(Enum):
    """``--handover``."""

    CHECKPOINT = "checkpoint"  # connections that stored a checkpoint
    ALWAYS = "always"  # and all others start anew, as if just connected
    NEVER = "never"  # the extension is not offered


@quick
class NextStep(Enum):
    """What becomes of a connection whose owner was lost."""

    RUN_AGAIN = "its opening goes to another worker; nobody has answered yet"
    MOVE = "another worker goes on"
    REFUSE = "its client is told"
    REFUSE_SECOND = "its client is told that this was the second one"


class Loss:
    """When a connection last lost its owner to a crash, and how often its opening was sent again."""

    __slots__ = ("at", "given_back_count", "has_run_again")

    def __init__(self) -> None:
        self.at: float | None = None
        self.has_run_again = False
        self.given_back_count = 0  # workers that took it and gave it back: they stop, or had no grant in time


def decide_after_loss(
    loss: Loss, now: float, *, is_answered: bool, is_repeatable: bool, is_movable: bool
) -> NextStep:
    """Decide about a connection whose client is there; docs/failure_modes.md has the table. Notes the loss.

    ``is_answered``: something of an application has arrived. ``is_repeatable``: the opening may run twice (safe, or a
    WebSocket) and is held with all that belongs to it.
    """
    before, loss.at = loss.at, now
    if before is not None and now - before < TWO_LOSSES_WITHIN_S:
        return NextStep.REFUSE_SECOND
    if is_answered:
        return NextStep.MOVE if is_movable else NextStep.REFUSE
    if is_repeatable and not loss.has_run_again:
        loss.has_run_again = True
        return NextStep.RUN_AGAIN
    return NextStep.REFUSE


def decide_after_refusal(loss: Loss, *, is_answered: bool, is_repeatable: bool) -> NextStep:
    """Decide about a connection that its owner gave back, before or behind what it had to say. Notes that."""
    loss.given_back_count += 1
    if not is_answered and is_repeatable and loss.given_back_count <= FURTHER_TRIES_MAX:
        return NextStep.RUN_AGAIN
    return NextStep.REFUSE


class Handover:
    """The checkpoint of one WebSocket, the messages behind it, and what waits for the next one."""

    __slots__ = (
        "_checkpoint_stands",
        "_covered_bytes",
        "_held_bytes",
        "_held_bytes_max",
        "_received",
        "_retained",
        "_retained_from",
        "_window_bytes",
        "awaits_accept",
        "held",
        "is_commit",
        "state",
        "try_count",
    )

    def __init__(self, *, window_bytes: int, offered_count: int, offered_bytes: int) -> None:
        """``offered_count`` messages, and ``offered_bytes`` in all, went to the owner before; they are forgotten."""
        self.state: bytes | None = None  # the checkpoint; None: there is none (--handover always)
        self.is_commit = False
        self._window_bytes = window_bytes
        self._held_bytes_max = int(window_bytes * HELD_SHARE)
        # Nothing has been forgotten since, and nothing has left that should have waited for the next one.
        self._checkpoint_stands = False
        self._received = 0  # of the newest checkpoint
        self._retained_from = offered_count
        self._covered_bytes = offered_bytes  # cost of everything up to there
        self._retained: deque[bytes] = deque()  # encoded; bounded as the docstring says
        self.held: list[_Sent] = []  # sent with ``is_commit`` since the checkpoint; bounded by _held_bytes_max
        self._held_bytes = 0
        # While the connection changes its owner: the next one has not accepted.
        self.awaits_accept = False
        self.try_count = 0  # workers that took it and gave it back

    def __repr__(self) -> str:
        return (
            f"<Handover {'no' if self.state is None else len(self.state)} bytes of state, covers {self._received} of "
            f"{self._retained_from}+{len(self._retained)} messages, held={len(self.held)} movable={self.is_movable}>"
        )

    @property
    def is_movable(self) -> bool:
        """True while another worker can go on from the checkpoint, with nothing lost."""
        return self._checkpoint_stands

    @property
    def takes_events(self) -> bool:
        """True while what the application sends does not simply go to the client."""
        return self.is_commit or self.awaits_accept

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @property
    def retained_count(self) -> int:
        return len(self._retained)

    @property
    def retained_bytes(self) -> int:
        return sum(map(_cost, self._retained))

    # From the client

    def offered(self, encoded: bytes) -> None:
        """A message was given to the owner, or waits for its window."""
        self._retained.append(encoded)

    def credited(self, total_bytes: int) -> None:
        """The owner's application has received so much."""
        if total_bytes - self._covered_bytes > self._window_bytes:
            self._forget()

    # From the application

    def checkpoint(self, received: int, state: bytes, *, is_commit: bool) -> Sequence[_Sent]:
        """Store a checkpoint that covers the first ``received`` messages; return what leaves with it.

        Raises FlowControlError for what no worker of ours says.
        """
        offered_count = self._retained_from + len(self._retained)
        if not self._received <= received <= offered_count:
            raise FlowControlError(
                f"a checkpoint for {received} messages behind one for {self._received}; {offered_count} were sent"
            )
        if len(state) > STATE_BYTES_MAX:
            raise FlowControlError(f"a checkpoint of {len(state)} bytes, allowed are {STATE_BYTES_MAX}")
        retained = self._retained
        while self._retained_from < received:
            self._covered_bytes += _cost(retained.popleft())
            self._retained_from += 1
        self._received = received
        self.state = state
        self.is_commit = is_commit
        # If it covers less than what was forgotten, messages in between are lost for any other owner.
        self._checkpoint_stands = received == self._retained_from
        return self.release_held()

    def sent(self, event: dict[str, Any], cost: int, partial_bytes: int = 0) -> Sequence[_Sent]:
        """The application has sent an event: return what leaves now. Call only with ``is_commit``.

        ``partial_bytes``: so much of a further event has arrived.
        """
        self.held.append((event, cost))
        self._held_bytes += cost
        if not self._checkpoint_stands or event.get("type") != "websocket.send":
            # A close ends it all; behind it no checkpoint comes.
            return self.release_held()
        return self.make_room(partial_bytes)

    def make_room(self, partial_bytes: int) -> Sequence[_Sent]:
        """A piece of a large event has arrived: return what must leave, so that the rest can come."""
        if self._held_bytes + partial_bytes <= self._held_bytes_max:
            return _NOTHING
        self._checkpoint_stands = False
        return self.release_held()

    def ended(self, outcome: Outcome) -> Sequence[_Sent]:
        """The instance is over: return what still leaves. One that failed has committed nothing more."""
        if outcome is Outcome.RETURNED:
            return self.release_held()
        return _NOTHING

    def release_held(self) -> Sequence[_Sent]:
        if not self.held:
            return _NOTHING
        held, self.held = self.held, []
        self._held_bytes = 0
        return held

    # From one owner to the next

    def begin_epoch(self) -> list[bytes]:
        """Forget the owner; return the messages that the next one gets first. They count from 1 again."""
        self.held.clear()
        self._held_bytes = 0
        self._received = 0
        self._retained_from = 0
        self._covered_bytes = 0
        self.awaits_accept = True
        return list(self._retained)

    def _forget(self) -> None:
        """The application has received a window without a checkpoint."""
        self._checkpoint_stands = False
        while self._retained:
            self._covered_bytes += _cost(self._retained.popleft())
            self._retained_from += 1


def _cost(encoded: bytes) -> int:
    length = len(encoded)
    return length if length > EVENT_COST_MIN_BYTES else EVENT_COST_MIN_BYTES
