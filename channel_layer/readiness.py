"""Whether a process can serve now: the decision, and the words in which it tells its supervisor. No I/O.

    STARTING --everything is up--> SERVING --signal--> DRAINING

A process is ready while it is SERVING and a message to itself has come back through the broker that left within the
last ``PROOF_AGE_S_MAX``: an open port proves nothing, and neither does a connection to a broker that failed over. Who
sends those messages is process_life.py; who is told is an operator (admin.py), or the supervisor, by lines:

    process ID      its id on the broker, said once: should it be killed, the supervisor can tell the others
    ready TEXT      said again and again; the first one says that the process has started, and TEXT where it serves
    waiting WHY     it has started, and cannot serve now
    draining        it stops
    broker-away     it ends because it could not reach the broker when it started: another try may succeed

To say more: a word here, and its reader in trunkline/child.py.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

__all__ = [
    "BEAT_INTERVAL_S",
    "PROOF_AGE_S_MAX",
    "LifePhase",
    "StatusWord",
    "build_status",
    "decode_status",
    "explain_unready",
]

# How often a process shows that its loop turns, and that the broker carries its messages.
BEAT_INTERVAL_S: Final = 1.0
# Three of these in a row may be slow; then it is not ready.
PROOF_AGE_S_MAX: Final = 3.5


class LifePhase(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class StatusWord(Enum):
    PROCESS = "process"
    READY = "ready"
    WAITING = "waiting"
    DRAINING = "draining"
    BROKER_AWAY = "broker-away"


def explain_unready(phase: LifePhase, *, now: float, broker_reachable: bool, proved_at: float | None) -> str | None:
    """Return why a process is not ready, or None if it is.

    ``proved_at`` is when the newest message left that has come back through the broker.
    """
    if phase is not LifePhase.SERVING:
        return str(phase.value)
    if not broker_reachable:
        return "the broker does not answer"
    if proved_at is None:
        return "no message has come back through the broker yet"
    if now - proved_at > PROOF_AGE_S_MAX:
        return f"no message has come back through the broker for {now - proved_at:.0f} s"
    return None


def build_status(word: StatusWord, text: str = "") -> bytes:
    """One line for the supervisor; short enough to be written whole (PIPE_BUF is 512 bytes at least)."""
    line = " ".join(f"{word.value} {text}".split())
    return line.encode("utf-8", "replace")[:500] + b"\n"


def decode_status(line: bytes) -> tuple[StatusWord, str] | None:
    """The word and its text; None for a line that no release of ours writes."""
    head, _, text = line.decode("utf-8", "replace").strip().partition(" ")
    try:
        return StatusWord(head), text
    except ValueError:
        return None
