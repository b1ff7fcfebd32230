"""How far one WebSocket is on its way to another worker, as its present worker sees it. No I/O.

    STAYING --begin--> READY --still, and covered by a checkpoint--> FROZEN --RELEASED True--> (cancelled)
                         ^--------------- RELEASED False --------------+

READY means that the worker stops and would give the connection away. It can when the application stands still and its
last checkpoint covers all that it has received; then it is frozen, so that this stays true until the interface server
has answered. An application that stored its checkpoint with ``notify`` is asked for a last one first. instance.py
feeds this class and does what it says; what the interface server does is its handover.py.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

from channel_layer.enums import quick

__all__ = ["REQUEST", "Moving", "MovingPhase"]

REQUEST: Final[dict[str, Any]] = {"type": "websocket.handover.request"}


@quick
class MovingPhase(Enum):
    STAYING = "staying"
    READY = "ready to be handed over"
    FROZEN = "frozen until the interface server has answered"


class Moving:
    """Made with the first checkpoint of an instance (or that of the one before), or when its worker stops."""

    __slots__ = ("_asked", "_checkpoint_count", "_covered", "_request_is_read", "_tried", "phase", "wants_notice")

    def __init__(self, *, is_adopted: bool = False) -> None:
        """``is_adopted``: the checkpoint of a former worker covers the beginning of this instance."""
        self.phase = MovingPhase.STAYING
        self.wants_notice = False  # as of the last checkpoint
        self._checkpoint_count = int(is_adopted)
        self._covered = 0  # messages received when the last one was stored
        self._tried: int | None = None  # as many checkpoints there were at the last try, which was declined
        self._asked = False  # the application is being asked for a last checkpoint
        self._request_is_read = False  # receive() has returned the request

    def __repr__(self) -> str:
        return f"<Moving {self.phase.name} covered={self._covered} checkpoints={self._checkpoint_count}>"

    @property
    def has_checkpoint(self) -> bool:
        return self._checkpoint_count > 0

    def checkpoint(self, received_count: int, *, wants_notice: bool) -> bool:
        """The application stored a checkpoint. True: it is the last one, freeze as soon as it has left."""
        self._checkpoint_count += 1
        self._covered = received_count
        self.wants_notice = wants_notice
        return self.phase is MovingPhase.READY and self._request_is_read

    def begin(self) -> bool:
        """The worker stops. True: put REQUEST in front of what waits for the application."""
        if self.phase is not MovingPhase.STAYING:
            return False
        self.phase = MovingPhase.READY
        return self._ask()

    def request_read(self) -> None:
        """receive() has returned REQUEST."""
        self._request_is_read = True

    def may_freeze(self, received_count: int) -> bool:
        """The application waits in receive(), and nothing is on its way: True if it is to be given away now."""
        if self.phase is not MovingPhase.READY or self._tried == self._checkpoint_count or self._asked:
            return False
        return not self.has_checkpoint or self.covers(received_count)

    def covers(self, received_count: int) -> bool:
        """The last checkpoint was stored behind the last message that was received."""
        return self._covered == received_count

    def freeze(self) -> None:
        self.phase = MovingPhase.FROZEN
        self._tried = self._checkpoint_count

    def declined(self) -> None:
        """The connection stays for now. A further checkpoint is worth a further try, without a further request."""
        self.phase = MovingPhase.READY
        self._asked = self._request_is_read = False

    def _ask(self) -> bool:
        self._asked = self.has_checkpoint and self.wants_notice
        return self._asked
