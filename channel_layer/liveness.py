"""Who among the peers of our links is dead: the decision, without I/O (process_layer.py carries it out).

Every process renews a lease in the broker. A missing lease is only a suspicion, since the broker may have lost it
and a loop may be slow; a suspect is pinged through its inbox. It is dead when it stayed silent for ``SILENCE_S``
while our own inbox worked, which only a message to ourselves can prove: a probe that left that long after the ping
has come back, and still nothing was heard. Where its supervisor has told its death (leases.py) there is no silence to
wait for: any probe behind the ping will do, so that what it said last has been read before.

    trusted --lease missing--> suspected (pinged) --heard, or lease back--> trusted
                                   +--a probe sent SILENCE_S after the ping came back--> dead
                                   +--its death was told, and a probe came back--------> dead

Nobody is judged while the broker is away and for ``GRACE_S`` after it came back or lost its data: all leases are
missing then, and everybody needs the time to renew. All times are given by the caller, in seconds of one
monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final

__all__ = ["GRACE_S", "SILENCE_S", "Judgement", "Liveness", "LivenessStatistics"]

# A live process answers a ping within milliseconds; one whose loop is busy keeps its lease. 1.5 s and the lease's
# 2.5 s and a round of looking make less than 5 s from a death to its notice.
SILENCE_S: Final = 1.5
# Reconnecting waits at most 1 s between tries and a lease is renewed twice a second; the rest is for slow machines.
GRACE_S: Final = 5.0
# Probes on their way; while an inbox stands still the oldest is given up. Some 15 s of them.
_PROBES_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one look at the leases asks for."""

    ping: list[str]  # suspects to ping now
    probe: int | None  # send a probe with this token to our own inbox
    dead: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LivenessStatistics:
    suspects: int
    suspected_count: int
    cleared_count: int  # suspects that turned out to live
    dead_count: int

    @classmethod
    def none(cls) -> LivenessStatistics:
        """Of a process that has nobody to watch."""
        return cls(suspects=0, suspected_count=0, cleared_count=0, dead_count=0)


class Liveness:
    """Suspects of one process. ``heard_from`` returns when the last blob of a peer came.

    Several that share an inbox share ``tokens``, which number their probes.
    """

    def __init__(self, heard_from: Callable[[str], float], tokens: Iterator[int] | None = None) -> None:
        self._heard_from = heard_from
        self._tokens = tokens if tokens is not None else count(1)
        # Suspect -> when it was pinged first.
        self._pinged_at: dict[str, float] = {}
        # Token of a probe on its way -> when it left. A lost one is forgotten with the suspects.
        self._probes: dict[int, float] = {}
        # When the newest probe left that has come back: until then our inbox is known to have worked.
        self._proved_until = 0.0
        self._broker_away = False
        self._grace_until = 0.0
        self._suspected_count = 0
        self._cleared_count = 0
        self._dead_count = 0

    def __repr__(self) -> str:
        away = " broker away" if self._broker_away else ""
        return f"<Liveness suspects={sorted(self._pinged_at)}{away}>"

    def statistics(self) -> LivenessStatistics:
        return LivenessStatistics(
            suspects=len(self._pinged_at),
            suspected_count=self._suspected_count,
            cleared_count=self._cleared_count,
            dead_count=self._dead_count,
        )

    @property
    def has_suspects(self) -> bool:
        return bool(self._pinged_at)

    def broker_lost(self) -> None:
        """Judge nobody from now on."""
        self._broker_away = True
        self._acquit()

    def broker_restored(self, now: float) -> None:
        """The broker is back, or has lost its data under us: judge again after a grace."""
        self._broker_away = False
        self.give_grace(now)

    def give_grace(self, now: float) -> None:
        """Something on our own side made everybody look silent: start anew, ``GRACE_S`` from now."""
        self._grace_until = now + GRACE_S
        self._acquit()

    def is_judging(self, now: float) -> bool:
        return not self._broker_away and now >= self._grace_until

    def probe_returned(self, token: int) -> None:
        sent_at = self._probes.pop(token, None)
        if sent_at is not None and sent_at > self._proved_until:
            self._proved_until = sent_at

    def forget(self, peer: str) -> None:
        """The link to ``peer`` is over."""
        self._pinged_at.pop(peer, None)

    def judge(
        self,
        now: float,
        leases: Iterable[tuple[str, bool]],
        *,
        told_dead: Collection[str] = (),
        inbox_is_current: bool = True,
    ) -> Judgement:
        """Look at the leases of all peers, read just now; True = present.

        ``told_dead`` are those without one whose death was told. ``inbox_is_current`` is False while blobs are known
        to wait in our inbox unread: nobody is condemned then.
        """
        if not self.is_judging(now):
            return Judgement([], None, [])
        ping: list[str] = []
        dead: list[str] = []
        for peer, present in leases:
            pinged_at = self._pinged_at.get(peer)
            if pinged_at is None:
                if not present:
                    self._pinged_at[peer] = now
                    self._suspected_count += 1
                    ping.append(peer)
            elif present or self._heard_from(peer) > pinged_at:
                # Also when only its voice is back: the lease may be missing for a reason of its own. The next look
                # suspects it again.
                del self._pinged_at[peer]
                self._cleared_count += 1
            elif inbox_is_current and self._proved_until >= pinged_at + (0.0 if peer in told_dead else SILENCE_S):
                del self._pinged_at[peer]
                self._dead_count += 1
                dead.append(peer)
        probe = None
        if self._pinged_at:
            probe = next(self._tokens)
            self._probes[probe] = now
            if len(self._probes) > _PROBES_MAX:
                del self._probes[next(iter(self._probes))]
        else:
            self._probes.clear()
        return Judgement(ping, probe, dead)

    def keep_only(self, peers: Collection[str]) -> None:
        """Forget suspects that have no link any more."""
        for peer in [peer for peer in self._pinged_at if peer not in peers]:
            del self._pinged_at[peer]

    def _acquit(self) -> None:
        self._pinged_at.clear()
        self._probes.clear()
