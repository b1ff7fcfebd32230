"""The two halves of a client connection's event stream, with credit (docs/flow_control.md).

Lives here: cutting events into frames no faster than the reader consumes them (``OutgoingEvents``), and putting
them together again (``IncomingEvents``). Each side of a connection has one of each. No I/O, no clock: a link
carries the frames in order and exactly once, or the connection ends with it. Does not live here: what events
mean, and who waits when nothing may leave.

    offer ─> OutgoingEvents ──EVENT, PIECE, LAST──> IncomingEvents.receive ─> the reader
                    ^ credit <───────CREDIT──────── consume <────────────────────┘

Everything is counted in bytes since the stream began. An event costs its encoded size, at least 64 bytes (one
64 KiB read of a WebSocket can hold 10,922 empty messages). The sender may be one window ahead of what has been
consumed. So that a message larger than the window passes, the receiver grants the rest of a message that has
begun while no complete event waits for its reader ("early credit"): the total in such a CREDIT lies inside a
message, which the sender recognises, for readers consume whole events. It goes on with that message, but begins
nothing behind it on that credit. So a receiver holds a window or one message, whichever is larger.

Why nobody waits for ever: credit is returned at a quarter of the window, and a piece is a quarter at most (plus
1/64). Once everything has arrived and has been consumed, less than a quarter is unreturned, so a piece fits. An
early credit is followed by another CREDIT as soon as its message has been consumed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from channel_layer.errors import ChannelLayerError
from channel_layer.frames import FrameKind, build_credit, build_event, build_last, build_piece

__all__ = [
    "EVENT_COST_MIN_BYTES",
    "PIECE_BYTES_MAX",
    "WINDOW_BYTES",
    "WINDOW_BYTES_MIN",
    "FlowControlError",
    "IncomingEvents",
    "IncomingStatistics",
    "OutgoingEvents",
    "OutgoingStatistics",
]

# The credit window of a connection, each way; the opening tells the worker which one it is. At 1 ms between two
# processes it allows 256 MB/s for one connection; a client that does not read costs this much in each process.
WINDOW_BYTES: Final = 256 * 1024
WINDOW_BYTES_MIN: Final = 1024  # so that the smallest cost fits a quarter of every window four times

# Larger events are cut, so that connections which share a link take turns.
PIECE_BYTES_MAX: Final = 64 * 1024

# What an empty event costs its holder in memory, roughly.
EVENT_COST_MIN_BYTES: Final = 64

# While a message is assembled. The protocols' own limits (--ws-max-size) are lower and answered better than this
# one, which ends the connection; it only keeps a faulty peer from filling the memory.
EVENT_BYTES_MAX: Final = 256 * 1024 * 1024

_EVENT: Final = int(FrameKind.EVENT)
_PIECE: Final = int(FrameKind.PIECE)
_LAST: Final = int(FrameKind.LAST)


# Stand for queues that hold nothing yet, and are never added to. An empty deque takes 0.1 us and 600 bytes, and each
# connection would have four of them.
_NO_EVENTS: Final[deque[bytes]] = deque(maxlen=0)
_NO_SPANS: Final[deque[tuple[int, int]]] = deque(maxlen=0)


class FlowControlError(ChannelLayerError):
    """The peer broke the rules of this module: end the connection. No release of ours does this."""


@dataclass(frozen=True, slots=True)
class OutgoingStatistics:
    sent_bytes: int
    credited_bytes: int
    waiting_bytes: int
    waiting_events: int


@dataclass(frozen=True, slots=True)
class IncomingStatistics:
    received_bytes: int
    consumed_bytes: int
    granted_bytes: int
    partial_bytes: int


class OutgoingEvents:
    """Events on their way to the peer: whole or in pieces, as far as its credit reaches.

    After ``offer``, ``offer_last`` and ``credit``, send what ``frames`` returns. What does not fit stays here, and
    has no limit here: stop offering while ``waiting_bytes`` is not 0 (pause the socket, let the application's
    ``send()`` wait), so that no more waits than one read or one event.
    """

    __slots__ = (
        "_connection",
        "_credited_bytes",
        "_epoch",
        "_last",
        "_offset",
        "_piece_bytes_max",
        "_queue",
        "_sent_bytes",
        "_spans",
        "_whole_bytes_max",
        "_window_bytes",
        "waiting_bytes",
    )

    def __init__(
        self, connection: int, epoch: int, window_bytes: int = WINDOW_BYTES, *, carried_bytes: int = 0
    ) -> None:
        """``carried_bytes``: what an earlier sender had sent and the peer's reader has yet to consume."""
        if window_bytes < WINDOW_BYTES_MIN:
            raise _window_error(window_bytes)
        self._connection = connection
        self._epoch = epoch
        self._window_bytes = window_bytes
        self._piece_bytes_max = min(PIECE_BYTES_MAX, window_bytes // 4)
        # A 64 KiB body chunk with its keys is a little more than 64 KiB, and is not worth two frames.
        self._whole_bytes_max = self._piece_bytes_max + self._piece_bytes_max // 64
        # Events that wait for credit; bounded by the caller, see above.
        self._queue: deque[bytes] = _NO_EVENTS  # replaced by the first: most connections never need one
        # How much of the first of them has left in pieces.
        self._offset = 0
        # The disconnect event, behind all others.
        self._last: bytes | None = None
        # Cost of everything in the queue that has not left.
        self.waiting_bytes = 0
        # Cost of everything that left, and of what the peer gave back; totals since the beginning.
        self._sent_bytes = carried_bytes
        self._credited_bytes = 0
        # (start, end) of events that left, or began to leave, in pieces and are not credited to their end. One is
        # larger than a piece, so a window holds five at most.
        self._spans: deque[tuple[int, int]] = _NO_SPANS  # likewise

    @property
    def is_empty(self) -> bool:
        """True when everything that was offered has left, the last event included."""
        return not self._queue and self._last is None

    @property
    def window_bytes(self) -> int:
        return self._window_bytes

    @property
    def offered_bytes(self) -> int:
        """Cost of everything that was offered so far."""
        return self._sent_bytes + self.waiting_bytes

    @property
    def credited_bytes(self) -> int:
        """Cost of what the peer has consumed, as far as it said so; of a message that it is short of, a part."""
        return self._credited_bytes

    def unsent(self) -> list[bytes]:
        """Return the events that have not left, or only in part, without the last one."""
        return list(self._queue)

    def offer(self, encoded: bytes) -> None:
        """Queue an encoded event. Call ``frames`` next."""
        if self._last is not None:
            raise RuntimeError(f"an event was offered behind the last one: {self!r}")
        if self._queue is _NO_EVENTS:
            self._queue = deque()
        self._queue.append(encoded)
        length = len(encoded)
        self.waiting_bytes += length if length > EVENT_COST_MIN_BYTES else EVENT_COST_MIN_BYTES

    def offer_last(self, encoded: bytes) -> None:
        """Queue the disconnect event: it costs no credit, and leaves when everything offered before has left."""
        if self._last is not None:
            raise RuntimeError(f"there is a last event already: {self!r}")
        self._last = encoded

    def admit(self, encoded: bytes) -> bool:
        """Charge an event that the caller sends by itself, if nothing waits and it may leave now, whole.

        For events that share a frame (EVENTS) or travel with an opening. False: nothing was charged, offer it.
        """
        if self._queue or self._last is not None or len(encoded) > self._whole_bytes_max:
            return False
        length = len(encoded)
        cost = length if length > EVENT_COST_MIN_BYTES else EVENT_COST_MIN_BYTES
        if self._sent_bytes + cost > self._limit_bytes():
            return False
        self._sent_bytes += cost
        return True

    def pass_whole(self, encoded: bytes) -> bytes | None:
        """Return the frame of an event that may leave now, whole; it counts as sent. None: offer it."""
        return build_event(self._connection, self._epoch, encoded) if self.admit(encoded) else None

    def frames(self) -> list[bytes]:
        """Return the encoded frames that may leave now; they count as sent."""
        frames: list[bytes] = []
        queue = self._queue
        while queue:
            event = queue[0]
            length = len(event)
            if self._offset == 0 and length <= self._whole_bytes_max:
                cost = length if length > EVENT_COST_MIN_BYTES else EVENT_COST_MIN_BYTES
                if self._sent_bytes + cost > self._limit_bytes():
                    return frames
                queue.popleft()
                frames.append(build_event(self._connection, self._epoch, event))
            else:
                cost = min(self._piece_bytes_max, length - self._offset)
                if self._sent_bytes + cost > self._limit_bytes():
                    return frames
                if self._offset == 0:
                    if self._spans is _NO_SPANS:
                        self._spans = deque()
                    self._spans.append((self._sent_bytes, self._sent_bytes + length))
                piece = event[self._offset : self._offset + cost]
                self._offset += cost
                if self._offset < length:
                    frames.append(build_piece(self._connection, self._epoch, piece))
                else:
                    queue.popleft()
                    self._offset = 0
                    frames.append(build_event(self._connection, self._epoch, piece))
            self._sent_bytes += cost
            self.waiting_bytes -= cost
        if self._last is not None:
            frames.append(build_last(self._connection, self._epoch, self._last))
            self._last = None
        return frames

    def credit(self, total_bytes: int) -> None:
        """Take the total of a CREDIT frame. Call ``frames`` next. Raises FlowControlError."""
        if total_bytes > self._sent_bytes:
            raise FlowControlError(f"credit for {total_bytes} bytes, of which {self._sent_bytes} were sent: {self!r}")
        if total_bytes <= self._credited_bytes:
            return
        self._credited_bytes = total_bytes
        spans = self._spans
        while spans and spans[0][1] <= total_bytes:
            spans.popleft()

    def statistics(self) -> OutgoingStatistics:
        return OutgoingStatistics(
            sent_bytes=self._sent_bytes,
            credited_bytes=self._credited_bytes,
            waiting_bytes=self.waiting_bytes,
            waiting_events=len(self._queue) + (self._last is not None),
        )

    def _limit_bytes(self) -> int:
        """Return up to which total may be sent now."""
        if self._spans:
            start, end = self._spans[0]
            # Credit inside a message that has left whole is early credit: nothing behind it may use it, because
            # the receiver still holds that message.
            if start < self._credited_bytes and end <= self._sent_bytes:
                return start + self._window_bytes
        return self._credited_bytes + self._window_bytes

    def __repr__(self) -> str:
        return (
            f"<OutgoingEvents {self._connection}/{self._epoch}: sent {self._sent_bytes}, "
            f"credited {self._credited_bytes}, window {self._window_bytes}, waiting {self.waiting_bytes} bytes>"
        )


class IncomingEvents:
    """Events from the peer, put together; tells the peer how much of them the reader has consumed.

    For each EVENT, PIECE and LAST frame call ``receive``; when it returns None, send ``credit_frame()`` unless that
    is None too. When the reader has an event, call ``consume`` with that event's whole cost and send what it
    returns. What waits for the reader is kept by the caller: a window or one message, whichever is larger.
    """

    __slots__ = (
        "_connection",
        "_consumed_bytes",
        "_epoch",
        "_event_bytes_max",
        "_granted_bytes",
        "_granted_early",
        "_partial_bytes",
        "_pieces",
        "_quarter_bytes",
        "_received_bytes",
        "_window_bytes",
    )

    def __init__(
        self,
        connection: int,
        epoch: int,
        window_bytes: int = WINDOW_BYTES,
        *,
        event_bytes_max: int = EVENT_BYTES_MAX,
        carried_bytes: int = 0,
    ) -> None:
        """``carried_bytes``: the cost of events of an earlier sender that the reader has yet to consume."""
        if window_bytes < WINDOW_BYTES_MIN:
            raise _window_error(window_bytes)
        self._connection = connection
        self._epoch = epoch
        self._window_bytes = window_bytes
        self._quarter_bytes = window_bytes // 4
        self._event_bytes_max = event_bytes_max
        # The pieces of the event that has begun; more than event_bytes_max is a FlowControlError.
        self._pieces: list[bytes] = []
        self._partial_bytes = 0
        # Cost of everything that arrived, pieces included, and of the events that were consumed.
        self._received_bytes = carried_bytes
        self._consumed_bytes = 0
        # The total of the newest CREDIT, and whether it lies inside an event that is not consumed.
        self._granted_bytes = 0
        self._granted_early = False

    @property
    def partial_bytes(self) -> int:
        """How much of an event has arrived whose rest has not."""
        return self._partial_bytes

    @property
    def unconsumed_bytes(self) -> int:
        """Cost of the events and pieces that arrived and were not consumed: held here or by the caller."""
        return self._received_bytes - self._consumed_bytes

    def receive(self, kind: int, payload: bytes) -> tuple[bytes, int] | None:
        """Take the payload of an EVENT, PIECE or LAST frame.

        Return an encoded event and its cost when one is complete, else None: then ask for ``credit_frame``.
        Raises FlowControlError when the peer sends more than it may.
        """
        length = len(payload)
        if kind == _EVENT and not self._pieces:
            cost = length if length > EVENT_COST_MIN_BYTES else EVENT_COST_MIN_BYTES
            if length > self._event_bytes_max:
                raise FlowControlError(f"event of {length} bytes, allowed are {self._event_bytes_max}: {self!r}")
            self._charge(cost)
            return payload, cost
        if kind == _LAST:
            if self._pieces:
                raise FlowControlError(f"the last event came in the middle of another: {self!r}")
            return payload, 0
        if kind != _EVENT and kind != _PIECE:
            raise FlowControlError(f"frame of kind {kind!r} among events: {self!r}")
        total = self._partial_bytes + length
        if total > self._event_bytes_max:
            raise FlowControlError(f"event of over {total} bytes, allowed are {self._event_bytes_max}: {self!r}")
        if kind == _PIECE:
            if not length:
                # It would cost nothing, so any number of them could come.
                raise FlowControlError(f"empty piece: {self!r}")
            self._charge(length)
            self._pieces.append(payload)
            self._partial_bytes = total
            return None
        cost = total if total > EVENT_COST_MIN_BYTES else EVENT_COST_MIN_BYTES
        self._charge(cost - self._partial_bytes)
        self._pieces.append(payload)
        event = b"".join(self._pieces)
        self._pieces.clear()
        self._partial_bytes = 0
        return event, cost

    def consume(self, cost: int) -> bytes | None:
        """Count ``cost`` as consumed: what ``receive`` said of one event, or the sum for several whole ones.

        Return a CREDIT frame when one is due.
        """
        self._consumed_bytes += cost
        return self.credit_frame()

    def credit_frame(self) -> bytes | None:
        """Return an encoded CREDIT frame when one is due; it counts as sent."""
        consumed = self._consumed_bytes
        total = self._received_bytes if self._no_event_waits() else consumed
        if total - self._granted_bytes < self._quarter_bytes and not (
            # The sender begins nothing more before it knows that the message of an early credit is consumed.
            self._granted_early and consumed > self._granted_bytes
        ):
            return None
        self._granted_bytes = total
        self._granted_early = total > consumed
        return build_credit(self._connection, self._epoch, total)

    def statistics(self) -> IncomingStatistics:
        return IncomingStatistics(
            received_bytes=self._received_bytes,
            consumed_bytes=self._consumed_bytes,
            granted_bytes=self._granted_bytes,
            partial_bytes=self._partial_bytes,
        )

    def _no_event_waits(self) -> bool:
        """True when every complete event has been consumed."""
        return self._received_bytes - self._partial_bytes == self._consumed_bytes

    def _charge(self, cost: int) -> None:
        # What the sender may know of us at most; it keeps to what it knows, so beyond this it is at fault.
        base = self._consumed_bytes
        if self._granted_bytes > base and self._no_event_waits():
            base = self._granted_bytes
        if self._received_bytes + cost - base > self._window_bytes:
            raise FlowControlError(f"{cost} bytes more exceed the window: {self!r}")
        self._received_bytes += cost

    def __repr__(self) -> str:
        return (
            f"<IncomingEvents {self._connection}/{self._epoch}: received {self._received_bytes}, "
            f"consumed {self._consumed_bytes}, granted {self._granted_bytes}, window {self._window_bytes}>"
        )


def _window_error(window_bytes: int) -> ValueError:
    return ValueError(f"window_bytes is {window_bytes}, at least {WINDOW_BYTES_MIN} are needed")
