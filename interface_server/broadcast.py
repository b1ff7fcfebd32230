"""One message of a group on its way to many clients: framed once, handed out in slices, bounded in bytes.

    Broadcast        the message and its frame, the same bytes object for every connection (with the same compression)
    JoinedBroadcasts several of them that stand in a row for many connections, as one piece of bytes
    FanOut           lets connections write what they queued, some hundreds a loop turn
    BroadcastMemory  what waits for clients that do not read, and which of them has to go

Order is kept by each connection's own queue: a broadcast is appended to the queues of all its receivers at once
(0.2 us each), and only the writing is spread over loop turns. A later event of the application finds the queue not
empty and stands behind. So there is no order between fan-outs to look after, and several broadcasts to one
connection within a loop turn become one write.

Does not live here: the queue (client_connection.py), writing (websocket.py).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from interface_server.protocol.deflate import Deflate
from interface_server.protocol.websocket_frames import build_frame, read_message

__all__ = [
    "Broadcast",
    "BroadcastMemory",
    "BroadcastMemoryStatistics",
    "FanOut",
    "FanOutStatistics",
    "JoinedBroadcasts",
    "Receiver",
]

_LOGGER: Final = logging.getLogger("trunkline.interface")

# A slice ends after so many connections or so much time, whichever is first; then other callbacks of the loop have
# their turn, and what was written leaves (some 10 us a socket). Short slices are what joins broadcasts: the next one
# is read between two of them, not behind the whole fan-out, and then most sockets get both in one send(). With 4
# broadcasts under way to 1,000 clients a send carried 1.3 messages at 500 connections a slice, 2.5 at 100 and 3.4 at
# 16; a message cost 11.8, 8.5 and 6.3 us of CPU at 500, 100 and 32 (one run), and at 16 and 8 no less than at 32.
_SLICE_CONNECTIONS: Final = 32
_SLICE_S: Final = 0.005

# Writes that may be queued before the next messages are read from our inbox. Nobody else slows down who sends more
# than our sockets can be written to, and the queues would grow for ever. At some 10 us each this is half a second of
# work, and some 10 MB. At the limit the inbox is held until all of it is written; its links then fill, and their
# senders drop what a group sends (process_layer.py).
_BACKLOG_MAX: Final = 50_000

# A message counts at least so much where it waits: ten thousand empty ones are not free.
_HELD_BYTES_MIN: Final = 64

# When the process holds too much, clients go until this share of the limit is left, so that the next broadcast does
# not begin to search again.
_EVICT_TO: Final = 0.9


class Broadcast:
    """One ``websocket.send`` for many clients. Raises ValueError if the event is not a valid one."""

    __slots__ = ("_compressed", "_frame", "held_bytes", "opcode", "payload", "queued")

    def __init__(self, event: dict[str, Any]) -> None:
        message = read_message(event)
        if message is None or event.get("type") != "websocket.send":
            raise ValueError(f'not a websocket.send with either "text" or "bytes": {event!r:.200}')
        self.opcode, self.payload = message
        self.held_bytes = max(_HELD_BYTES_MIN, len(self.payload))  # what it counts where it waits
        # Built when the first connection wants it: the plain frame, and one for each window; there are four.
        self._frame: bytes | None = None
        self._compressed: dict[int, bytes] | None = None
        self.queued: Any = None  # how it stands in connections' queues, for them to share (client_connection.py)

    def __repr__(self) -> str:
        return f"<Broadcast opcode={self.opcode} payload={len(self.payload)} bytes>"

    @property
    def frame(self) -> bytes:
        """The uncompressed frame; the same object at every call."""
        if self._frame is None:
            self._frame = build_frame(self.opcode, self.payload)
        return self._frame

    def compressed_frame(self, deflate: Deflate) -> bytes:
        """The frame for connections that agreed on this; the same object for all with the same window."""
        if self._compressed is None:
            self._compressed = {}
        bits = deflate.server_window_bits
        frame = self._compressed.get(bits)
        if frame is None:
            frame = self._compressed[bits] = deflate.build_message(self.opcode, self.payload)
        return frame


class JoinedBroadcasts:
    """Broadcasts one behind the other, written as if they were one. Joined once for all connections."""

    __slots__ = ("_compressed", "_frame", "broadcasts")

    def __init__(self, broadcasts: Sequence[Broadcast]) -> None:
        self.broadcasts = broadcasts
        self._frame: bytes | None = None  # as in Broadcast
        self._compressed: dict[int, bytes] = {}

    def __repr__(self) -> str:
        return f"<JoinedBroadcasts {len(self.broadcasts)}>"

    @property
    def frame(self) -> bytes:
        if self._frame is None:
            self._frame = b"".join([broadcast.frame for broadcast in self.broadcasts])
        return self._frame

    def compressed_frame(self, deflate: Deflate) -> bytes:
        bits = deflate.server_window_bits
        frames = self._compressed.get(bits)
        if frames is None:
            frames = b"".join([broadcast.compressed_frame(deflate) for broadcast in self.broadcasts])
            self._compressed[bits] = frames
        return frames


class Receiver(Protocol):
    """A connection, as the classes here see it."""

    def queue_broadcast(self, broadcast: Broadcast) -> bool:
        """Append to the connection's queue. True: it wants a ``flush_queue`` and does not wait for one yet."""

    def flush_queue(self) -> None:
        """Write what is queued, in order, until the transport is full. Must not raise; may be over already."""

    def unsent_bytes(self) -> int:
        """What the client's transport holds (Client.buffered_bytes)."""

    def drop_slow_client(self) -> None:
        """End the connection with Refusal.SLOW_CLIENT; calls BroadcastMemory.forget."""

    def failed(self) -> None:
        """``flush_queue`` raised: end the connection. Must not raise."""


@dataclass(frozen=True, slots=True)
class FanOutStatistics:
    broadcast_count: int
    receiver_count: int  # over all broadcasts
    slice_count: int
    waiting_count: int  # connections that wait for their turn now
    held_count: int  # how often the inbox was held


class FanOut:
    """Hands broadcasts to connections. Used on the loop only; never calls a connection re-entrantly."""

    def __init__(
        self,
        *,
        call_soon: Callable[[Callable[[], None]], object],
        clock: Callable[[], float],
        hold_input: Callable[[bool], None],
        slice_connections: int = _SLICE_CONNECTIONS,
        slice_s: float = _SLICE_S,
        backlog_max: int = _BACKLOG_MAX,
    ) -> None:
        """``hold_input(True)`` is called when too much waits to be written, with False when nothing does any more."""
        self._call_soon = call_soon
        self._hold_input = hold_input
        self._backlog_max = backlog_max
        self._backlog = 0  # writes queued since nothing waited; nobody counts how many of them have been done
        self._holds = False
        self._clock = clock  # seconds, monotonic
        self._slice_connections = slice_connections
        self._slice_s = slice_s
        # Connections with something to write. Bounded: each is in here once at most (see Receiver.queue_broadcast).
        self._waiting: deque[Receiver] = deque()
        self._scheduled = False  # a call of _run is on its way
        self._broadcast_count = 0
        self._receiver_count = 0
        self._slice_count = 0
        self._held_count = 0

    def __repr__(self) -> str:
        return f"<FanOut waiting={len(self._waiting)} backlog={self._backlog}>"

    def statistics(self) -> FanOutStatistics:
        return FanOutStatistics(
            broadcast_count=self._broadcast_count,
            receiver_count=self._receiver_count,
            slice_count=self._slice_count,
            waiting_count=len(self._waiting),
            held_count=self._held_count,
        )

    def deliver(self, broadcast: Broadcast, receivers: Iterable[Receiver]) -> None:
        """Queue a broadcast on each connection and see that it is written soon."""
        self._broadcast_count += 1
        count = 0
        waiting = self._waiting
        for receiver in receivers:
            count += 1
            if receiver.queue_broadcast(broadcast):
                waiting.append(receiver)
        self._receiver_count += count
        if waiting:
            self._backlog += count
            if self._backlog > self._backlog_max and not self._holds:
                self._holds = True
                self._held_count += 1
                self._hold_input(True)
        self._schedule()

    def add(self, receiver: Receiver) -> None:
        """Have ``flush_queue`` of one connection called in its turn; the caller sees to it that it waits once."""
        self._waiting.append(receiver)
        self._schedule()

    def _schedule(self) -> None:
        if self._waiting and not self._scheduled:
            self._scheduled = True
            self._call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        self._slice_count += 1
        waiting = self._waiting
        end = self._clock() + self._slice_s
        for done in range(1, min(len(waiting), self._slice_connections) + 1):
            receiver = waiting.popleft()
            try:
                receiver.flush_queue()
            except Exception:
                # A fault of ours in one connection must not keep all others waiting.
                _LOGGER.exception("what was sent to %r could not be written", receiver)
                receiver.failed()
            # The clock is asked now and then: asking costs a tenth of a small write.
            if not done % 16 and self._clock() >= end:
                break
        if not waiting:
            self._backlog = 0
            if self._holds:
                self._holds = False
                self._hold_input(False)
        self._schedule()


@dataclass(frozen=True, slots=True)
class BroadcastMemoryStatistics:
    held_bytes: int
    held_bytes_highest: int
    holding_count: int  # connections that hold something
    dropped_by_client_limit_count: int
    dropped_by_process_limit_count: int


class BroadcastMemory:
    """Counts the broadcasts that wait because their client does not read, and drops clients beyond the limits.

    What merely waits for its turn in a fan-out is not counted: that is our slowness, not the client's. A payload
    that waits for many clients is counted once for each, though it is in memory once: until a client's transport
    takes it over, which copies, nobody knows how long each of them will keep it alive.
    """

    def __init__(self, *, client_bytes_max: int, total_bytes_max: int) -> None:
        # Of one client, what its transport holds included; beyond: drop_slow_client(). One broadcast is always
        # allowed, whatever its size.
        self._client_bytes_max = client_bytes_max
        # Of all clients; beyond: drop_slow_client() on those that hold most, until a tenth is free.
        self._total_bytes_max = total_bytes_max
        self._held: dict[Receiver, int] = {}
        self._total = 0
        self._total_highest = 0
        self._dropped_by_client_limit = 0
        self._dropped_by_process_limit = 0

    def __repr__(self) -> str:
        return f"<BroadcastMemory {self._total} of {self._total_bytes_max} bytes, {len(self._held)} clients>"

    def statistics(self) -> BroadcastMemoryStatistics:
        return BroadcastMemoryStatistics(
            held_bytes=self._total,
            held_bytes_highest=self._total_highest,
            holding_count=len(self._held),
            dropped_by_client_limit_count=self._dropped_by_client_limit,
            dropped_by_process_limit_count=self._dropped_by_process_limit,
        )

    def hold(self, receiver: Receiver, size: int) -> None:
        """``size`` more bytes wait for this client. May drop it or others before it returns."""
        held = self._held.get(receiver, 0)
        if held and held + size + receiver.unsent_bytes() > self._client_bytes_max:
            self._dropped_by_client_limit += 1
            receiver.drop_slow_client()
            self.forget(receiver)  # in case it was over already and did not
            return
        self._held[receiver] = held + size
        self._total += size
        if self._total > self._total_highest:
            self._total_highest = self._total
        if self._total > self._total_bytes_max:
            self._evict()

    def release(self, receiver: Receiver, size: int) -> None:
        """``size`` bytes that were held have been written."""
        held = self._held.get(receiver)
        if held is None:
            return  # it was forgotten; its queue is being emptied into nothing
        self._total -= min(size, held)
        if held > size:
            self._held[receiver] = held - size
        else:
            del self._held[receiver]

    def forget(self, receiver: Receiver) -> None:
        """The connection is over and holds nothing any more."""
        self._total -= self._held.pop(receiver, 0)

    def _evict(self) -> None:
        # Sorted once: dropping a few thousand clients one by one, each after a search, would block the loop.
        for receiver in sorted(self._held, key=self._held.__getitem__, reverse=True):
            if self._total <= self._total_bytes_max * _EVICT_TO:
                break
            if receiver in self._held:  # dropping one may end others
                self._dropped_by_process_limit += 1
                receiver.drop_slow_client()
                self.forget(receiver)
