"""All links of a process, on its loop: the adapter between link.py and the broker.

Lives here: which peers there are, when blobs are pushed, one timer for all, and telling the owner what happened.
Does not live here: what is sent when (link.py decides), how a blob is pushed and read (the owner passes ``push`` in
and calls ``receive_blob``), who is dead (the owner calls ``give_up``).

Frames that are sent in one turn of the loop leave at its end. A peer has one push under way: what is sent
meanwhile leaves with the next, so batches grow with the load, and an idle link sends at once. The pushes of a turn
are issued together, so that the broker's client can write them in one piece.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Final

from channel_layer.errors import WireError
from channel_layer.frames import Frame, build_event, decode_blob
from channel_layer.link import LEFT, Link, LinkSettings, LinkState, LinkStatistics

__all__ = ["Links", "LinksStatistics"]

logger = logging.getLogger("trunkline.channel_layer")

# Peers whose link is over, by what must be remembered of it (Link.memory). At the limit the oldest is forgotten;
# a blob of its old stream that came even later would find a link that knows nothing, which the peer notices.
_MEMORIES_MAX: Final = 1024

_LOG_INTERVAL_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class LinksStatistics:
    """Present links, and totals that include former ones."""

    peers: int
    congested_peers: int
    queued_bytes: int
    unacknowledged_bytes: int
    sent_blobs: int
    resent_blobs: int
    taken_blobs: int
    taken_frames: int
    duplicate_blobs: int
    gap_blobs: int
    dropped_frames: int
    ended_count: int
    unreadable_blobs: int
    failed_pushes: int


# The fields that both records have and that are kept when a link is forgotten.
_TOTALS: Final = tuple(
    field.name
    for field in fields(LinkStatistics)
    if field.name not in ("state", "queued_bytes", "unacknowledged_bytes")
)


def _everybody(peer: str) -> bool:
    return True


def _nobody(peer: str) -> bool:
    return False


class Links:
    """Sends frames to other processes: each arrives exactly once and in order, or ``peer_ended`` is called.

    ``push(peer, blobs)`` stores blobs in the peer's inbox, in order, and returns a future: done when the broker has
    answered, failed when that is not known. ``pushed()`` is called behind the pushes of each turn, which need not
    wait for others. ``frame_received(peer, frame)`` gets what comes; ``peer_ended(peer,
    reason)`` is told that a link is over, with everything sent on it that was not delivered; a following frame
    from or to the same peer begins a new one. ``peer_ready(peer)`` follows ``is_congested``.

    All of it on ``loop``. An exception from a callback is logged, and the next frame is delivered all the same.
    """

    def __init__(
        self,
        *,
        process_id: str,
        push: Callable[[str, list[bytes]], asyncio.Future[Any]],
        pushed: Callable[[], None] = lambda: None,
        frame_received: Callable[[str, Frame], None],
        peer_ended: Callable[[str, str], None],
        peer_ready: Callable[[str], None],
        loop: asyncio.AbstractEventLoop,
        settings: LinkSettings | None = None,
        is_away: Callable[[str], bool] = _nobody,
    ) -> None:
        """``is_away`` tells whether the broker is away for a peer with whom a link begins."""
        self.process_id = process_id
        self._push = push
        self._pushed = pushed
        self._frame_received = frame_received
        self._peer_ended = peer_ended
        self._peer_ready = peer_ready
        self._loop = loop
        self._settings = settings if settings is not None else LinkSettings()
        # Ids of streams and pings; they grow (see link.py) and fit 63 bits for as long as any process lives.
        self._new_id = itertools.count(secrets.randbits(62) + 1).__next__
        # One a peer process, from the first frame or blob until there is nothing to keep.
        self._links: dict[str, Link] = {}
        self._memories: dict[str, tuple[int, int]] = {}
        # Links that may have something to push at the end of this turn, and the call that does it.
        self._dirty: dict[str, Link] = {}
        self._flush_handle: asyncio.Handle | None = None
        # Peers that have left and to which something was sent since: they end once more at the end of this turn.
        self._refused: dict[str, None] = {}
        # Peers whose congestion somebody has seen.
        self._congested: dict[str, Link] = {}
        # The earliest deadline of all links, or earlier: it may have been postponed since.
        self._timer: asyncio.Handle | None = None
        # When it runs. Ours: a timer of uvloop that is due at once has no when().
        self._timer_deadline = float("inf")
        self._is_away = is_away
        # Set by settle(): done as soon as nothing is unacknowledged.
        self._settled: asyncio.Future[None] | None = None
        self._closed = False
        # True from leave() or close() on: what is sent is dropped.
        self._is_silent = False

        self._former = dict.fromkeys(_TOTALS, 0)
        self._unreadable_blobs = 0
        self._failed_pushes = 0
        self._logged_at = float("-inf")

    # Sending

    def send(self, peer: str, frame: bytes) -> int:
        """Queue an encoded frame for ``peer``; it leaves at the end of this turn of the loop, or with the next push.

        Return its position, for ``send_event``. To a peer that has left it is dropped, and ``peer_ended`` is called
        once more.
        """
        if self._is_silent:
            self._former["dropped_frames"] += 1
            return 0
        link = self._links.get(peer)
        if link is None:
            link = self._create(peer)
        position = link.send(frame)
        if not position and link.state is LinkState.LEFT:
            self._refused[peer] = None
        self._dirty[peer] = link
        if self._flush_handle is None:
            self._schedule_flush()
        return position

    def send_event(self, peer: str, connection: int, epoch: int, payload: bytes, behind: int) -> int:
        """As ``send``, of an EVENT that may travel with equal ones of other connections (Link.send_event)."""
        link = self._links.get(peer)
        if link is None or self._is_silent:
            return self.send(peer, build_event(connection, epoch, payload))
        position = link.send_event(connection, epoch, payload, behind)
        if not position and link.state is LinkState.LEFT:
            self._refused[peer] = None
        self._dirty[peer] = link
        if self._flush_handle is None:
            self._schedule_flush()
        return position

    def raise_barrier(self, peer: str) -> None:
        """Let no event that is sent from now on leave before what was sent to ``peer`` so far."""
        link = self._links.get(peer)
        if link is not None:
            link.raise_barrier()

    def is_congested(self, peer: str) -> bool:
        """True while so much waits for ``peer`` that senders should wait for ``peer_ready``."""
        link = self._links.get(peer)
        if link is None or not link.is_congested:
            return False
        self._congested[peer] = link
        return True

    def queued_bytes(self, peer: str) -> int:
        """What waits for ``peer`` and is not on its way: for those who may drop what they send."""
        link = self._links.get(peer)
        return 0 if link is None else link.queued_bytes

    async def settle(self, timeout_s: float) -> int:
        """Wait until everything that was sent is acknowledged, or ``timeout_s`` is over. For one caller at a time.

        Return how many peers have not acknowledged it all.
        """
        if not self._count_unacknowledged():
            return 0
        self._settled = self._loop.create_future()
        try:
            settled, _ = await asyncio.wait({self._settled}, timeout=timeout_s)
        finally:
            self._settled = None
        return 0 if settled else self._count_unacknowledged()

    def _count_unacknowledged(self) -> int:
        return sum(not link.is_acknowledged for link in self._links.values())

    async def leave(self, timeout_s: float) -> None:
        """Say goodbye on every link, wait until that is acknowledged or ``timeout_s`` is over, and close.

        Meanwhile frames are still taken, but nothing more is sent. Cancelled: closed all the same.
        """
        self._is_silent = True
        for link in self._links.values():
            link.leave()
            self._dirty[link.peer] = link
        self._flush()
        try:
            if count := await self.settle(timeout_s):
                logger.warning("%s: %d peers have not acknowledged our goodbye in %.1f s", self, count, timeout_s)
        finally:
            self.close()

    def close(self) -> None:
        """Stop at once; nothing is sent or taken any more, and no callback is called."""
        self._closed = self._is_silent = True
        if self._flush_handle is not None:
            self._flush_handle.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._flush_handle = self._timer = None

    # What happens

    def receive_blob(self, data: bytes) -> None:
        """Take an element of our inbox. What no release of ours writes is counted and logged, once a second."""
        if self._closed:
            return
        now = self._loop.time()
        try:
            blob = decode_blob(data)
            peer = blob.source
            link = self._links.get(peer)
            if link is None:
                link = self._create(peer)
            self._dirty[peer] = link
            if self._flush_handle is None:
                self._schedule_flush()
            received = link.receive(blob, len(data), now)
        except WireError as error:
            self._unreadable_blobs += 1
            self._log("%s: a blob cannot be read: %s", self, error)
            return
        if received.ended_before is not None:
            self._tell_ended(peer, received.ended_before)
        frame_received = self._frame_received
        for frame in received.frames:
            try:
                frame_received(peer, frame)
            except Exception:
                # The blob counts as taken, so the frames behind this one must be delivered now or never.
                logger.exception("%s: frame %r of %s could not be carried out", self, frame[:3], peer)
        if received.ended_after is not None:
            self._tell_ended(peer, received.ended_after)
        if self._is_silent:
            link.leave()

    def broker_lost(self, concerns: Callable[[str], bool] = _everybody) -> None:
        """The broker is away, for the peers that it concerns: nothing is pushed, and no deadline counts."""
        for peer, link in self._links.items():
            if concerns(peer):
                link.broker_lost()

    def broker_restored(self, concerns: Callable[[str], bool] = _everybody) -> None:
        """The broker is back: everything unacknowledged is sent again."""
        now = self._loop.time()
        for peer, link in self._links.items():
            if concerns(peer):
                link.broker_restored(now)
        self._all_dirty()

    def reader_restored(self) -> None:
        """The inbox reader had lost its connection: the peers are told how far we are."""
        for link in self._links.values():
            link.reader_restored()
        self._all_dirty()

    # Liveness

    def peers(self) -> list[str]:
        """Return the peers that we have a link with."""
        present = (LinkState.OPEN, LinkState.LEAVING)
        return [peer for peer, link in self._links.items() if link.state in present]

    def ping(self, peer: str) -> None:
        """Ask ``peer`` for a blob, whichever; it waits for no window. ``heard_from`` tells when one came."""
        link = self._links.get(peer)
        if link is None:
            link = self._create(peer)
        link.ping()
        self._dirty[peer] = link
        if self._flush_handle is None:
            self._schedule_flush()

    def heard_from(self, peer: str) -> float:
        """Return the time of the loop when the last blob of ``peer`` came; minus infinity without a link."""
        link = self._links.get(peer)
        return float("-inf") if link is None else link.heard_at

    def give_up(self, peer: str, reason: str) -> None:
        """End the link to a peer that was found dead. If it lives after all, it is told."""
        link = self._links.get(peer)
        if link is None or link.state is LinkState.LEFT:
            return
        link.give_up()
        self._tell_ended(peer, reason)
        self._dirty[peer] = link
        if self._flush_handle is None:
            self._schedule_flush()

    def statistics(self) -> LinksStatistics:
        totals = dict(self._former)
        queued_bytes = unacknowledged_bytes = 0
        for link in self._links.values():
            record = link.statistics()
            queued_bytes += record.queued_bytes
            unacknowledged_bytes += record.unacknowledged_bytes
            for name in _TOTALS:
                totals[name] += getattr(record, name)
        return LinksStatistics(
            peers=len(self._links),
            congested_peers=len(self._congested),
            queued_bytes=queued_bytes,
            unacknowledged_bytes=unacknowledged_bytes,
            unreadable_blobs=self._unreadable_blobs,
            failed_pushes=self._failed_pushes,
            **totals,
        )

    # Inside

    def _create(self, peer: str) -> Link:
        if peer == self.process_id:
            raise WireError(f"{peer} has no link to itself")
        link = self._links[peer] = Link(
            source=self.process_id,
            peer=peer,
            new_id=self._new_id,
            settings=self._settings,
            memory=self._memories.pop(peer, (0, 0)),
            broker_away=self._is_away(peer),
        )
        return link

    def _forget(self, link: Link) -> None:
        del self._links[link.peer]
        record = link.statistics()
        for name in _TOTALS:
            self._former[name] += getattr(record, name)
        if link.memory[0]:
            self._memories[link.peer] = link.memory
            if len(self._memories) > _MEMORIES_MAX:
                del self._memories[next(iter(self._memories))]

    def _tell_ended(self, peer: str, reason: str) -> None:
        try:
            self._peer_ended(peer, reason)
        except Exception:
            logger.exception("%s: the end of %s (%s) could not be carried out", self, peer, reason)

    def _all_dirty(self) -> None:
        self._dirty.update(self._links)
        if self._flush_handle is None:
            self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._closed:
            self._flush_handle = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Push what the links have, all in one turn."""
        self._flush_handle = None
        now = self._loop.time()
        if self._refused:
            refused, self._refused = self._refused, {}
            for peer in refused:
                self._tell_ended(peer, LEFT)
        dirty, self._dirty = self._dirty, {}
        earliest = float("inf")
        for peer, link in dirty.items():
            blobs = link.collect(now)
            if blobs:
                self._push(peer, blobs).add_done_callback(partial(self._push_done, link))
            else:
                deadline = link.next_deadline()
                if deadline is not None and deadline < earliest:
                    earliest = deadline
                if link.is_forgettable and self._links.get(peer) is link:
                    self._forget(link)
        self._pushed()
        self._arm(earliest)
        if self._congested:
            for peer, link in list(self._congested.items()):
                if link.became_ready():
                    del self._congested[peer]
                    try:
                        self._peer_ready(peer)
                    except Exception:
                        logger.exception("%s: %s is ready, and its senders failed", self, peer)
        settled = self._settled
        if settled is not None and not settled.done() and not self._count_unacknowledged():
            settled.set_result(None)

    def _push_done(self, link: Link, answer: asyncio.Future[Any]) -> None:
        error = None if answer.cancelled() else answer.exception()
        if error is None and not answer.cancelled():
            link.push_answered(self._loop.time())
        else:
            self._failed_pushes += 1
            link.push_failed(self._loop.time())
            if not isinstance(error, ConnectionError | None):
                # A lost connection is reported once, by the broker's client; this is a refusal.
                self._log("%s: a push to %s failed: %r", self, link.peer, error)
        self._dirty[link.peer] = link
        if self._flush_handle is None:
            self._schedule_flush()

    def _arm(self, deadline: float) -> None:
        """Make the timer run at ``deadline`` at the latest."""
        if deadline == float("inf") or self._closed:
            return
        if self._timer is not None:
            if self._timer_deadline <= deadline:
                return
            self._timer.cancel()
        self._timer_deadline = deadline
        self._timer = self._loop.call_at(deadline, self._deadline_passed)

    def _deadline_passed(self) -> None:
        self._timer = None
        now = self._loop.time()
        earliest = float("inf")
        for peer, link in self._links.items():
            deadline = link.next_deadline()
            if deadline is None:
                continue
            if deadline <= now:
                self._dirty[peer] = link
            elif deadline < earliest:
                earliest = deadline
        if self._dirty and self._flush_handle is None:
            self._flush()
        self._arm(earliest)

    def _log(self, text: str, *values: object) -> None:
        """Warn, but at most once in a while: a faulty peer must not fill the disk."""
        now = self._loop.time()
        if now - self._logged_at >= _LOG_INTERVAL_S:
            self._logged_at = now
            logger.warning(text, *values)

    def __repr__(self) -> str:
        return f"<Links of {self.process_id}: {len(self._links)} peers{', closed' if self._closed else ''}>"
