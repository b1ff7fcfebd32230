"""One link: nothing lost, doubled or reordered between two live processes (docs/architecture.md, "Links").

Lives here: the state machine for one peer, without I/O. Time comes in as ``now`` (seconds of a monotonic clock),
blobs go out of ``collect`` and come in through ``receive``. Does not live here: the loop, the timer and the broker
(links.py carries them), the bytes of a blob (frames.py), what a frame means.

The broker may lose blobs (restart, FLUSHALL), deliver them twice (a push whose answer was lost) or late; each
inbox is first in, first out. Each direction is a stream of its own, begun by its sender:

    sender     numbers DATA blobs from 1, keeps them until they are acknowledged, sends all of them again on a GAP
               and after its broker connection was lost, and the first one after a silence (RTO)
    receiver   takes blobs in sequence, drops duplicates and acknowledges them again, reports a GAP

Stream ids of one process grow, so whoever knows one id of a peer can tell an older stream, of which only late
copies can come, from a newer one, by which the peer says that it gave the old link up.

    OPEN  ---- leave() -----------------> LEAVING   BYE is the last frame of our stream; we still receive
    OPEN, LEAVING ---- BYE taken -------> LEFT      the peer reads nothing more: what is sent to it is dropped
    OPEN, LEAVING ---- an end (below) --> ENDED     nothing is held
    ENDED ---- send() ------------------> OPEN
    ENDED, LEFT ---- newer stream ------> OPEN

An end: RESET for our stream; a newer stream while the older is not over (and OPEN again at once); the peer has
forgotten us; give_up(). What is queued and unacknowledged is dropped: it speaks about connections that are over.
A pair that is not listed changes nothing.

Without a handshake, the ends must still agree on which two streams belong together, or each new stream of one
would end the link for the other, for ever. Each blob names its sender's stream and the one that it acknowledges:

    a newer stream comes that acknowledges ours           ours belongs to it: we keep it
    … that does not, though the older acknowledged ours   the peer has ended both: ours is refused, so it ends
    … and we never saw ours acknowledged                  it may be on its way: we keep it; if it is refused, RESET
    RESET for our stream from the stream that we know     only ours ends: the peer's began after the refusal

Why nobody waits for ever: while blobs are unacknowledged there is a push under way (the broker answers it or fails
it), or ``next_deadline`` says when the first of them is sent again, or the broker is away.

Whatever is sent again is followed by a PING, and its PONG tells exactly how far the peer has come: an inbox keeps
the order, so what was pushed before the PING and is missing in the PONG is lost, and a peer that is behind what it
once acknowledged has forgotten us. While the PONG is awaited gap reports are ignored: they are of the time before.
So one window at most is sent again in one round trip, however slow the peer is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Final, NamedTuple

from channel_layer.enums import quick
from channel_layer.errors import WireError
from channel_layer.frames import Blob, BlobKind, Frame, FrameKind, build_blob, build_bye, build_event, build_events

__all__ = [
    "AWAY",
    "FORGOTTEN",
    "GIVEN_UP_REASONS",
    "LEFT",
    "RESET",
    "RESTARTED",
    "Link",
    "LinkSettings",
    "LinkState",
    "LinkStatistics",
    "Received",
]

# Why a link ended, besides the reason that give_up() is called with.
LEFT: Final = "left"  # politely: the peer stops
RESET: Final = "reset"  # the peer had given us up and refused a blob of ours
RESTARTED: Final = "restarted"  # the peer had given us up and began a new stream
FORGOTTEN: Final = "forgotten"  # the peer does not know any more what it acknowledged
AWAY: Final = "this process was away longer than its lease"  # give_up() is called with it, by process_layer.py
# Of these, those that say that the peer lives, and has taken us for dead.
GIVEN_UP_REASONS: Final = frozenset({RESET, RESTARTED, AWAY})

# What a queued frame costs in memory besides its bytes.
_FRAME_OVERHEAD_BYTES: Final = 48
# What one more addressee of a shared event counts, in a blob and in the queue. On the wire it takes a dozen bytes, in
# memory some eighty; what counts is the receiver's work for each, so a blob holds a thousand of them at most.
_ADDRESSEE_BYTES: Final = 64
_BYE: Final = build_bye()
_NO_FRAMES: Final[list[Frame]] = []


@quick
class LinkState(Enum):
    OPEN = "open"
    LEAVING = "leaving"
    LEFT = "left"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """Limits and times of links; tests make them smaller."""

    # Unacknowledged bytes, exceeded by one blob at most; beyond it frames wait in the queue. Bounds what a peer
    # that does not read costs in the broker.
    window_bytes: int = 4 * 1024 * 1024
    # Frames in one blob; a larger frame goes alone.
    blob_bytes: int = 64 * 1024
    # The same in number. A receiver handles a blob in one go; these are 0.5 to 4 ms of its loop.
    blob_frames: int = 64
    # Blobs in one push, exceeded by one blob at most; the rest follows when the broker has answered.
    push_bytes: int = 1024 * 1024
    # Waiting frames: above the high mark the link is congested, senders wait until it is down to the low mark.
    # What is sent all the same is kept: only the senders know what may be dropped.
    congested_bytes: int = 8 * 1024 * 1024
    ready_bytes: int = 4 * 1024 * 1024
    # How long an acknowledgement waits for data to travel with. At a quarter of the window it does not wait.
    ack_delay_s: float = 0.03
    # A gap shows at every blob behind it; one report in this time is enough.
    gap_interval_s: float = 0.05
    # Silence after which the first unacknowledged blob is sent again; doubles up to the maximum.
    rto_s: float = 0.4
    rto_max_s: float = 5.0
    # The same for a broker that refuses pushes (out of memory, overloaded), which costs it little to be asked again.
    hold_max_s: float = 1.0


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    state: LinkState
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


class Received(NamedTuple):
    """What a blob brought, to be carried out in this order."""

    ended_before: str | None
    frames: list[Frame]
    ended_after: str | None


_NOTHING: Final = Received(None, _NO_FRAMES, None)


class _SharedEvent:
    """A queued event for several connections; it becomes an EVENTS frame."""

    __slots__ = ("addressees", "payload")

    def __init__(self, payload: bytes, addressees: list[tuple[int, int]]) -> None:
        self.payload = payload
        self.addressees = addressees  # bounded by the blob that it stands in


class Link:
    """The link to one peer. After any call that may change it, push what ``collect`` returns.

    ``new_id`` returns a positive number greater than all before it in this process. ``memory`` is that of an
    earlier Link for the same peer, if there was one.
    """

    __slots__ = (
        "_ack_bytes",
        "_ack_deadline",
        "_ack_due",
        "_acknowledged",
        "_barrier",
        "_batch",
        "_batch_bytes",
        "_batches",
        "_broker_away",
        "_dropped_frames",
        "_duplicate_blobs",
        "_ended_count",
        "_ended_stream",
        "_gap_blobs",
        "_gap_due",
        "_gap_reported_at",
        "_hold_until",
        "_new_id",
        "_open_events",
        "_paired",
        "_peer_stream",
        "_ping_due",
        "_pong_due",
        "_probe",
        "_push_begun_at",
        "_pushing",
        "_queued_count",
        "_resend_next",
        "_resent_blobs",
        "_reset_due",
        "_restored_in_push",
        "_rto_deadline",
        "_rto_s",
        "_sent",
        "_sent_blobs",
        "_settings",
        "_source",
        "_stream",
        "_taken",
        "_taken_blobs",
        "_taken_frames",
        "_unacknowledged",
        "_was_congested",
        "heard_at",
        "peer",
        "queued_bytes",
        "state",
        "unacknowledged_bytes",
    )

    def __init__(
        self,
        *,
        source: str,
        peer: str,
        new_id: Callable[[], int],
        settings: LinkSettings,
        memory: tuple[int, int] = (0, 0),
        broker_away: bool = False,
    ) -> None:
        self._source = source
        self.peer = peer
        self._new_id = new_id
        self._settings = settings
        self.state = LinkState.OPEN
        # When the last blob of the peer came, of whatever kind; liveness asks for it.
        self.heard_at = float("-inf")
        self._ended_count = 0

        # Sending. 0 until the first frame; a new one after each end.
        self._stream = 0
        # Frames that wait, in batches of one blob each, the last of them still open. Bounded by the senders, who
        # look at is_congested.
        self._batches: deque[tuple[list[bytes | _SharedEvent], int]] = deque()
        self._batch: list[bytes | _SharedEvent] = []
        self._batch_bytes = 0
        # Frames queued since the beginning: the number of the newest is its position. What send_event() put into the
        # open batch, by payload: its position, connection and epoch. Nothing joins what stands before the barrier.
        self._queued_count = 0
        self._open_events: dict[bytes, tuple[int, int, int]] = {}
        self._barrier = 0
        self.queued_bytes = 0
        self._was_congested = False
        # Blobs with the numbers _acknowledged + 1 … _sent; at window_bytes nothing is added.
        self._unacknowledged: deque[bytes] = deque()
        self.unacknowledged_bytes = 0
        self._acknowledged = 0
        self._sent = 0
        # The number to go on with while everything is sent again, else 0.
        self._resend_next = 0
        # The retransmission timeout, and when it is over; set when the broker has answered a push.
        self._rto_s = settings.rto_s
        self._rto_deadline: float | None = None
        # Of the newest PING without a PONG: its number, and the first and the last blob that it speaks about less
        # one, that is _acknowledged and what had been pushed.
        self._probe: tuple[int, int, int] | None = None
        self._ping_due = False

        # Pushing: one at a time.
        self._pushing = False
        self._push_begun_at = 0.0
        # Nothing is pushed before this, after the broker refused a push.
        self._hold_until: float | None = None
        self._broker_away = broker_away
        # The broker came back before the push that was under way when it went has failed.
        self._restored_in_push = False

        # Receiving: the peer's stream, 0 until its first blob, and the last number taken from it.
        self._peer_stream = 0
        self._taken = 0
        # True when a blob of that stream (or of a peer without one) has acknowledged ours, or named it at least.
        self._paired = False
        # Bytes taken and not acknowledged, and when or whether an acknowledgement must leave.
        self._ack_bytes = 0
        self._ack_deadline: float | None = None
        self._ack_due = False
        self._gap_due = False
        self._gap_reported_at = float("-inf")
        # Number in the newest PING that must be answered, if any. (Of several one PONG is enough.)
        self._pong_due: int | None = None
        # The newest stream of the peer that ended otherwise than with BYE.
        self._ended_stream = 0
        # A stream of which a blob came though it is over: RESET is due.
        self._reset_due = 0
        # A peer that has left keeps its stream: its late copies are acknowledged.
        if memory[1]:
            self.state = LinkState.LEFT
            self._peer_stream, self._taken = memory
        else:
            self._ended_stream = memory[0]

        self._sent_blobs = 0
        self._resent_blobs = 0
        self._taken_blobs = 0
        self._taken_frames = 0
        self._duplicate_blobs = 0
        self._gap_blobs = 0
        self._dropped_frames = 0

    # Sending

    def send(self, frame: bytes) -> int:
        """Queue an encoded frame. Return its position, which grows with each frame.

        0: dropped, because the peer has left or we have said goodbye.
        """
        if self.state is not LinkState.OPEN:
            if self.state is not LinkState.ENDED:
                self._dropped_frames += 1
                return 0
            self.state = LinkState.OPEN
        length = len(frame)
        settings = self._settings
        batch_bytes = self._batch_bytes
        if batch_bytes and (batch_bytes + length > settings.blob_bytes or len(self._batch) >= settings.blob_frames):
            self._close_batch()
        self._batch.append(frame)
        self._batch_bytes += length
        self.queued_bytes += length + _FRAME_OVERHEAD_BYTES
        self._queued_count = position = self._queued_count + 1
        return position

    def send_event(self, connection: int, epoch: int, payload: bytes, behind: int) -> int:
        """Queue an EVENT, or add its connection to an equal one that waits: together they become one EVENTS frame.

        ``behind`` is the position of what this event must not overtake, the last frame of its connection. Return the
        position to name next time, as ``send``.
        """
        found = self._open_events.get(payload)
        if found is not None and found[0] > behind and found[0] > self._barrier:
            if self._batch_bytes + _ADDRESSEE_BYTES <= self._settings.blob_bytes:
                self._join(found, payload, connection, epoch)
                return found[0]
            self._close_batch()
        position = self.send(build_event(connection, epoch, payload))
        if position:
            self._open_events[payload] = (position, connection, epoch)
        return position

    def raise_barrier(self) -> None:
        """From now on no event joins one that is queued already: each stays behind what was sent so far."""
        self._barrier = self._queued_count

    def leave(self) -> None:
        """Queue BYE, the last frame of our stream, if the peer knows of us. ``is_acknowledged`` tells the end."""
        if self.state is LinkState.OPEN and (self._peer_stream or self._stream or self.queued_bytes):
            self.send(_BYE)
            self._open_events.clear()  # nothing comes behind it, and nothing joins what stands before it
            self.state = LinkState.LEAVING

    def ping(self) -> None:
        """Ask the peer for a sign of life, at once: ``heard_at`` tells when one came."""
        if self.state is not LinkState.LEFT:  # who has said goodbye does not answer, and we would never forget it
            self._ping_due = True

    @property
    def is_congested(self) -> bool:
        """True from the moment too much waits here until ``became_ready``."""
        if self.queued_bytes > self._settings.congested_bytes:
            self._was_congested = True
        return self._was_congested

    def became_ready(self) -> bool:
        """True once when the link has room again after ``is_congested`` was true."""
        if self._was_congested and self.queued_bytes <= self._settings.ready_bytes:
            self._was_congested = False
            return True
        return False

    @property
    def is_acknowledged(self) -> bool:
        """True when everything that was sent has been acknowledged (or dropped)."""
        return not self._unacknowledged and not self.queued_bytes

    @property
    def is_forgettable(self) -> bool:
        """True when nothing would be lost with this object but its ``memory``."""
        return (
            not self._stream
            and (not self._peer_stream or (self.state is LinkState.LEFT and not self._ack_due))
            and not self.queued_bytes
            and not self._pushing
            and not self._reset_due
            and not self._ping_due
            and self._pong_due is None
            and self._probe is None
        )

    @property
    def memory(self) -> tuple[int, int]:
        """The newest stream of the peer that is over, and its last number if it ended with BYE, else 0."""
        return (self._peer_stream, self._taken) if self.state is LinkState.LEFT else (self._ended_stream, 0)

    def give_up(self) -> None:
        """End both directions: the peer is found dead, or the other end of its connections is. It is told."""
        if self._peer_stream:
            self._reset_due = self._peer_stream
        self._end()

    # Pushing

    def collect(self, now: float) -> list[bytes]:
        """Return the blobs to push now, in order; call ``push_answered`` or ``push_failed`` unless there are none.

        Nothing while another push is under way or the broker is away.
        """
        if self._pushing or self._broker_away:
            return []
        if self._hold_until is not None:
            if now < self._hold_until:
                return []
            self._hold_until = None
            self._send_all_again()
        settings = self._settings
        data: list[bytes] = []
        pushed_bytes = 0

        if self._rto_deadline is not None and now >= self._rto_deadline:
            self._rto_deadline = None
            self._rto_s = min(self._rto_s * 2, settings.rto_max_s)
            if not self._resend_next:
                self._ping_due = True
                data.append(self._unacknowledged[0])
                self._resent_blobs += 1
                pushed_bytes = len(self._unacknowledged[0])
        if self._resend_next:
            for blob in islice(self._unacknowledged, self._resend_next - self._acknowledged - 1, None):
                if pushed_bytes >= settings.push_bytes:
                    break
                data.append(blob)
                pushed_bytes += len(blob)
                self._resend_next += 1
                self._resent_blobs += 1
            if self._resend_next > self._sent:
                self._resend_next = 0
                self._ping_due = True
        if self.queued_bytes and not self._resend_next:
            window_bytes = settings.window_bytes
            push_bytes = settings.push_bytes
            while self.queued_bytes and self.unacknowledged_bytes < window_bytes and pushed_bytes < push_bytes:
                blob = self._build_data()
                data.append(blob)
                pushed_bytes += len(blob)

        control = self._collect_control(now)
        if self._ping_due:
            # Behind the data, so that the PONG speaks about them.
            self._ping_due = False
            number = self._new_id()
            self._probe = (number, self._acknowledged, self._resend_next - 1 if self._resend_next else self._sent)
            data.append(self._build(BlobKind.PING, sequence=number))
        if control:
            data = control + data
        if data:
            self._pushing = True
            self._push_begun_at = now
        return data

    def push_answered(self, now: float) -> None:
        """The broker has stored what ``collect`` returned."""
        self._pushing = False
        self._restored_in_push = False
        if not self._unacknowledged:
            return
        # Under steady pushes the timeout of an earlier blob goes on; a slow broker must not look like a loss.
        if self._rto_deadline is None or now - self._push_begun_at > self._rto_s / 2:
            self._rto_deadline = now + self._rto_s

    def push_failed(self, now: float) -> None:
        """Whether the broker has stored what ``collect`` returned is not known (or it certainly has not)."""
        self._pushing = False
        self._ack_again()
        if self._probe is not None:
            # The PING may be lost: liveness would take that for silence, and gap reports would be ignored for ever.
            self._ping_due = True
        if self._restored_in_push:
            self._restored_in_push = False
            self._send_all_again()
        elif not self._broker_away:
            self._hold_until = now + min(self._rto_s, self._settings.hold_max_s)
            self._rto_s = min(self._rto_s * 2, self._settings.rto_max_s)
            self._rto_deadline = None

    def next_deadline(self) -> float | None:
        """Return when ``collect`` must be called even if nothing happens until then; None: never."""
        if self._pushing or self._broker_away:
            return None
        if self._hold_until is not None:
            return self._hold_until
        rto, ack = self._rto_deadline, self._ack_deadline
        if rto is None or (ack is not None and ack < rto):
            return ack
        return rto

    def broker_lost(self) -> None:
        """The broker is away: everything waits."""
        self._broker_away = True

    def broker_restored(self, now: float) -> None:
        """The broker is back, with its data or without: everything unacknowledged is sent again."""
        self._broker_away = False
        self._hold_until = None
        self._restored_in_push = self._pushing
        self._rto_s = self._settings.rto_s
        self._send_all_again()
        self._ack_again()

    def reader_restored(self) -> None:
        """Our reader had lost its connection, and perhaps what it was reading: tell the peer how far we are."""
        if self._peer_stream:
            self._gap_due = True

    # Receiving

    def receive(self, blob: Blob, size_bytes: int, now: float) -> Received:
        """Take a blob of the peer; ``size_bytes`` is its length. Raises WireError when it makes no sense."""
        self.heard_at = now
        kind = blob.kind
        if kind is BlobKind.DATA:
            if not blob.stream or not blob.sequence:
                raise WireError(f"DATA blob of {self.peer} without a number: {blob[:6]!r}")
            return self._receive_data(blob, size_bytes, now)
        if kind is BlobKind.RESET:
            # For a stream that is not our newest it comes too late: that link is over already.
            return self._refused(blob, RESET) if self._stream and blob.ack_stream == self._stream else _NOTHING
        if 0 < blob.stream <= self._ended_stream:
            # It does not know that the link is over: our RESET may be lost. (For a late copy it changes nothing.)
            self._reset_due = blob.stream
        if kind is BlobKind.PING:
            self._pong_due = blob.sequence
        if kind is BlobKind.PONG and self._probe is not None and self._probe[0] == blob.sequence:
            _, acknowledged, pushed = self._probe
            self._probe = None
            known = blob.ack if blob.ack_stream == self._stream else 0
            if self._stream and known < acknowledged:
                return self._refused(blob, FORGOTTEN)
            self._acknowledge(blob, now)
            if self._acknowledged < pushed and not self._resend_next:
                self._send_all_again()
            return _NOTHING
        self._acknowledge(blob, now)
        if kind is BlobKind.GAP and blob.ack_stream == self._stream and self._probe is None and not self._resend_next:
            self._send_all_again()
        return _NOTHING

    def statistics(self) -> LinkStatistics:
        return LinkStatistics(
            state=self.state,
            queued_bytes=self.queued_bytes,
            unacknowledged_bytes=self.unacknowledged_bytes,
            sent_blobs=self._sent_blobs,
            resent_blobs=self._resent_blobs,
            taken_blobs=self._taken_blobs,
            taken_frames=self._taken_frames,
            duplicate_blobs=self._duplicate_blobs,
            gap_blobs=self._gap_blobs,
            dropped_frames=self._dropped_frames,
            ended_count=self._ended_count,
        )

    # Sending, inside

    def _join(self, found: tuple[int, int, int], payload: bytes, connection: int, epoch: int) -> None:
        """Add a connection to an event of the open batch."""
        # The batch ends with the newest frame. (The state is OPEN: whatever ends it drops the batch, or closes it.)
        index = found[0] - self._queued_count - 1
        shared = self._batch[index]
        if isinstance(shared, bytes):
            self._batch[index] = _SharedEvent(payload, [found[1:], (connection, epoch)])
        else:
            shared.addressees.append((connection, epoch))
        self._batch_bytes += _ADDRESSEE_BYTES
        self.queued_bytes += _ADDRESSEE_BYTES

    def _close_batch(self) -> None:
        self._batches.append((self._batch, self._batch_bytes))
        self._batch = []
        self._batch_bytes = 0
        self._open_events.clear()

    def _build_data(self) -> bytes:
        if self._batches:
            frames, frames_bytes = self._batches.popleft()
        else:
            frames, frames_bytes = self._batch, self._batch_bytes
            self._batch = []
            self._batch_bytes = 0
            self._open_events.clear()
        self.queued_bytes -= frames_bytes + _FRAME_OVERHEAD_BYTES * len(frames)
        encoded = [
            frame if isinstance(frame, bytes) else build_events(frame.addressees, frame.payload) for frame in frames
        ]
        if not self._stream:
            self._stream = self._new_id()
        self._sent += 1
        blob = self._build(BlobKind.DATA, sequence=self._sent, frames=encoded)
        self._unacknowledged.append(blob)
        self.unacknowledged_bytes += len(blob)
        self._sent_blobs += 1
        return blob

    def _build(self, kind: BlobKind, *, sequence: int = 0, frames: list[bytes] | tuple[()] = ()) -> bytes:
        """Encode a blob; it carries the acknowledgement, so none is due any more."""
        self._ack_due = False
        self._ack_deadline = None
        self._ack_bytes = 0
        return build_blob(
            kind,
            source=self._source,
            stream=self._stream,
            sequence=sequence,
            ack_stream=self._peer_stream,
            ack=self._taken,
            frames=frames,
        )

    def _collect_control(self, now: float) -> list[bytes]:
        """Build the blobs that carry no data and wait for no window. Called behind the data, which acknowledge."""
        control: list[bytes] = []
        if self._reset_due:
            control.append(
                build_blob(BlobKind.RESET, source=self._source, stream=self._stream, ack_stream=self._reset_due)
            )
            self._reset_due = 0
        if self._gap_due:
            self._gap_due = False
            self._gap_reported_at = now
            control.append(self._build(BlobKind.GAP))
        if self._pong_due is not None:
            control.append(self._build(BlobKind.PONG, sequence=self._pong_due))
            self._pong_due = None
        if self._ack_due or (self._ack_deadline is not None and now >= self._ack_deadline):
            control.append(self._build(BlobKind.ACK))
        return control

    def _send_all_again(self) -> None:
        if self._unacknowledged:
            self._resend_next = self._acknowledged + 1
            # Everything is on its way again: the timeout begins with the answer to that push.
            self._rto_deadline = None

    def _acknowledge(self, blob: Blob, now: float) -> None:
        """Drop what the peer has taken."""
        if blob.ack_stream != self._stream or not self._stream:
            return
        if blob.stream == self._peer_stream:
            self._paired = True
        ack = blob.ack
        if ack <= self._acknowledged:
            return
        if ack > self._sent:
            raise WireError(f"{self.peer} acknowledges blob {ack} of a stream of {self._sent}")
        unacknowledged = self._unacknowledged
        for _ in range(ack - self._acknowledged):
            self.unacknowledged_bytes -= len(unacknowledged.popleft())
        self._acknowledged = ack
        if self._resend_next and self._resend_next <= ack:
            self._resend_next = ack + 1 if ack < self._sent else 0
        self._rto_s = self._settings.rto_s
        self._rto_deadline = now + self._rto_s if unacknowledged and not self._pushing else None

    # Receiving, inside

    def _receive_data(self, blob: Blob, size_bytes: int, now: float) -> Received:
        stream, sequence = blob.stream, blob.sequence
        ended_before = None
        if stream != self._peer_stream:
            if stream <= self._ended_stream or stream < self._peer_stream:
                # A late copy, or a peer that does not know yet that the link is over.
                self._reset_due = stream
                return _NOTHING
            if self._begin_receiving(stream, blob.ack_stream):
                ended_before = RESTARTED
        self._acknowledge(blob, now)
        if sequence != self._taken + 1:
            if sequence <= self._taken:
                self._duplicate_blobs += 1
                self._ack_due = True
            else:
                self._gap_blobs += 1
                if now - self._gap_reported_at >= self._settings.gap_interval_s:
                    self._gap_due = True
            return _NOTHING if ended_before is None else Received(ended_before, _NO_FRAMES, None)
        self._taken = sequence
        self._taken_blobs += 1
        frames = blob.frames
        self._taken_frames += len(frames)
        if frames and frames[-1][0] == FrameKind.BYE:
            self._drop_outgoing()
            self.state = LinkState.LEFT
            self._ended_count += 1
            self._ack_due = True
            return Received(ended_before, frames[:-1], LEFT)
        self._ack_bytes += size_bytes
        if self._ack_bytes >= self._settings.window_bytes // 4:
            self._ack_due = True
        elif self._ack_deadline is None:
            self._ack_deadline = now + self._settings.ack_delay_s
        return Received(ended_before, frames, None)

    def _begin_receiving(self, stream: int, ack_stream: int) -> bool:
        """Turn to a newer stream of the peer. Return True if that ends what there was."""
        has_ended = self._peer_stream != 0 and self.state is not LinkState.LEFT
        is_refused = self._paired and ack_stream != self._stream if self._stream else has_ended
        if has_ended:
            self._end_incoming()
        if is_refused:
            self._drop_outgoing()
            self.state = LinkState.OPEN
            has_ended = True
        elif self.state is not LinkState.LEAVING:
            self.state = LinkState.OPEN
        self._ended_count += has_ended
        self._peer_stream = stream
        self._taken = 0
        self._paired = False
        return has_ended

    def _ack_again(self) -> None:
        """What told the peer how far we are may be lost."""
        if self._peer_stream:
            self._ack_due = True

    def _refused(self, blob: Blob, reason: str) -> Received:
        """The peer does not hold our stream (any more)."""
        if self._peer_stream and 0 < blob.stream <= self._peer_stream:
            # What we receive began after the link that ours belonged to was over.
            self._drop_outgoing()
            self.state = LinkState.OPEN
            self._ended_count += 1
        else:
            self._end()
        return Received(reason, _NO_FRAMES, None)

    def _end(self) -> None:
        """End both directions; a push under way stays under way."""
        self._drop_outgoing()
        if self._peer_stream:
            self._end_incoming()
        self.state = LinkState.ENDED
        self._ended_count += 1

    def _end_incoming(self) -> None:
        self._ended_stream = self._peer_stream
        self._peer_stream = 0
        self._taken = 0
        self._ack_bytes = 0
        self._ack_deadline = None
        self._ack_due = False
        self._gap_due = False

    def _drop_outgoing(self) -> None:
        """End our stream and forget what it holds."""
        self._paired = False
        self._dropped_frames += len(self._batch) + sum(len(frames) for frames, _ in self._batches)
        self._stream = 0
        self._batches.clear()
        self._batch = []
        self._batch_bytes = 0
        self._open_events.clear()
        self.queued_bytes = 0
        self._unacknowledged.clear()
        self.unacknowledged_bytes = 0
        self._acknowledged = 0
        self._sent = 0
        self._resend_next = 0
        self._rto_s = self._settings.rto_s
        self._rto_deadline = None
        self._probe = None

    def __repr__(self) -> str:
        return (
            f"<Link {self._source} -> {self.peer} {self.state.value}: sent {self._sent}, acknowledged "
            f"{self._acknowledged}, taken {self._taken}, queued {self.queued_bytes} bytes>"
        )
