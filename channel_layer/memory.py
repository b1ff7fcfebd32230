"""The channel layer of a single process: for tests, for development, for one process that needs no broker.

The same contract as RedisChannelLayer, kept by tests/channel_layer/contract.py for both. State lives in plain
dicts under one lock, because calls come from several loops and threads of the process: Channels' ``async_to_sync``
uses a new loop for each call. Messages are kept encoded, so they are checked like any others and what the sender
does to its dict later changes nothing.

A message goes straight to a reader that waits, else into the channel's queue:

    send --> a reader waits on a loop that runs --> its hands (given back if its receive() is cancelled)
        \\--> queue --> receive()
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from channel_layer.base import Message
from channel_layer.capacity import Capacities
from channel_layer.channels_compat import ChannelsBackend, channel_full
from channel_layer.codec import decode_event, encode_message
from channel_layer.messages import (
    CAPACITY_DEFAULT,
    EXPIRY_DEFAULT_S,
    GROUP_EXPIRY_DEFAULT_S,
    DecodedMessage,
    check_seconds,
)
from channel_layer.names import check_channel_name, check_group_name, new_process_id, non_local_name

__all__ = ["InMemoryChannelLayer", "MemoryStatistics"]

# Expired messages that nobody asks for are looked for this often an expiry, when any call comes: a sweep visits
# every channel, so more often costs more, and less often lets abandoned messages stay longer than they live.
_SWEEPS_PER_EXPIRY: Final = 4
# A channel in which a message expired unread, and from which nobody has received for this many times the expiry
# since, has lost its reader: it leaves its groups. Not at once, as a consumer may be at work for so long.
_ABANDONED_EXPIRIES: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStatistics:
    """What an InMemoryChannelLayer holds, and what it has dropped since it was made."""

    channels: int  # that hold messages or have readers
    messages: int
    readers: int  # waiting calls of receive()
    groups: int
    members: int
    expired_count: int  # messages nobody received in time
    full_count: int  # messages refused with ChannelFull
    group_dropped_count: int  # messages of group_send for a member that was full


class _Waiting:
    """A message in a queue, or in the hands of a reader."""

    __slots__ = ("deadline", "encoded", "shared")

    def __init__(self, encoded: bytes, deadline: float, *, shared: bool) -> None:
        self.encoded = encoded
        self.deadline = deadline
        self.shared = shared  # counts against the capacity of its non-local name


class _Reader:
    """One waiting call of receive()."""

    __slots__ = ("future", "is_called", "loop", "message")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        # True while a call that makes it look into the queue waits for its loop to run; one at a time.
        self.is_called = False
        self.future: asyncio.Future[None] = loop.create_future()
        # Set, under the lock, by whoever hands over; then the future is resolved on the reader's loop.
        self.message: _Waiting | None = None


class _Channel:
    """Exists while it holds messages or has readers, never longer: names are made for each connection."""

    __slots__ = ("messages", "name", "readers")

    def __init__(self, name: str) -> None:
        self.name = name
        # Oldest first. Bounded by the capacity of the channel: beyond it send() raises, group_send() drops.
        self.messages: deque[_Waiting] = deque()
        # Longest waiting first; one for each waiting call. Not empty together with messages, except when no
        # reader's loop runs.
        self.readers: deque[_Reader] = deque()


class InMemoryChannelLayer(ChannelsBackend):
    """Channels and groups of this process. See base.ChannelLayer for what each call does and raises.

    ``expiry``: seconds until a message that nobody received is dropped. ``capacity``, ``channel_capacity``: see
    capacity.py. ``group_expiry``: seconds after its last group_add until a membership ends. All as in
    Channels' layer of this name. A process-local channel that nobody reads any more leaves its groups earlier,
    ten expiries after the first message that expired there: the name never comes back. ``clock`` is for tests.
    """

    def __init__(
        self,
        *,
        expiry: float = EXPIRY_DEFAULT_S,
        group_expiry: float = GROUP_EXPIRY_DEFAULT_S,
        capacity: int = CAPACITY_DEFAULT,
        channel_capacity: Mapping[Any, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.extensions = ["groups", "flush"]
        self.expiry = check_seconds("expiry", expiry)
        self.group_expiry = check_seconds("group_expiry", group_expiry)
        self._capacities = Capacities(capacity, channel_capacity)
        self._clock = clock
        # In the names of new channels, where the Redis layer has the id of the process.
        self._process_id = new_process_id("client")
        self._locals = itertools.count(1)
        # Guards everything below. Held for dict and deque operations only, never while waiting.
        self._lock = threading.Lock()
        self._channels: dict[str, _Channel] = {}
        # Non-local name -> channels that hold messages sent to them, with the number of those messages. The sum
        # is bounded by the capacity: beyond it send() raises.
        self._shares: dict[str, dict[str, int]] = {}
        # Group -> channel -> when the membership ends.
        self._groups: dict[str, dict[str, float]] = {}
        # The same the other way round, for a channel that leaves all its groups.
        self._groups_of: dict[str, set[str]] = {}
        # Process-local member of a group -> when a message expired there for the first time since its last receive().
        self._unread_since: dict[str, float] = {}
        self._next_sweep = clock() + self.expiry / _SWEEPS_PER_EXPIRY
        self._expired_count = 0
        self._full_count = 0
        self._group_dropped_count = 0

    def __repr__(self) -> str:
        return f"<InMemoryChannelLayer {self.statistics()}>"

    def statistics(self) -> MemoryStatistics:
        """Return what the layer holds at the moment, and its counters."""
        with self._lock:
            return MemoryStatistics(
                channels=len(self._channels),
                messages=sum(len(channel.messages) for channel in self._channels.values()),
                readers=sum(len(channel.readers) for channel in self._channels.values()),
                groups=len(self._groups),
                members=sum(map(len, self._groups.values())),
                expired_count=self._expired_count,
                full_count=self._full_count,
                group_dropped_count=self._group_dropped_count,
            )

    # What tests look at, as in Channels' layer of this name

    @property
    def channels(self) -> dict[str, list[DecodedMessage]]:
        """The messages that wait, by channel; also of channels that only have a reader. A copy."""
        with self._lock:
            return {
                name: [decode_event(waiting.encoded) for waiting in channel.messages]
                for name, channel in self._channels.items()
            }

    @property
    def groups(self) -> dict[str, dict[str, float]]:
        """The members of each group, with the time (of ``clock``) when their membership ends. A copy."""
        with self._lock:
            return {group: dict(members) for group, members in self._groups.items()}

    # Channels

    async def send(self, channel: str, message: Message) -> None:
        check_channel_name(channel)
        encoded = encode_message(message)
        # The readers on this loop get their turn, as they do while a broker answers. Before anything is done, so
        # a call that is cancelled here has sent nothing.
        await asyncio.sleep(0)
        with self._lock:
            now = self._sweep_if_due()
            if not (self._is_awaited(channel) or self._has_room(channel, now)):
                self._full_count += 1
                raise channel_full(
                    f"channel {non_local_name(channel)!r} holds as many messages as its capacity allows, "
                    f"{self._capacities.of(channel)}"
                )
            self._put(channel, _Waiting(encoded, now + self.expiry, shared="!" in channel))

    async def receive(self, channel: str) -> DecodedMessage:
        check_channel_name(channel)
        await asyncio.sleep(0)  # a channel that always has a message does not starve the others of this loop
        with self._lock:
            now = self._sweep_if_due()
            self._unread_since.pop(channel, None)
            state = self._channels.get(channel)
            if state is not None:
                self._drop_expired(state, now)
                if state.messages:
                    waiting = self._take_first(state)
                    self._forget_if_idle(state)
                    return decode_event(waiting.encoded)
            reader = _Reader(asyncio.get_running_loop())
            self._open(channel).readers.append(reader)
        try:
            await reader.future
        except asyncio.CancelledError:
            with self._lock:
                self._give_up(channel, reader)
            raise
        assert reader.message is not None
        return decode_event(reader.message.encoded)

    async def new_channel(self, prefix: str = "specific") -> str:
        return check_channel_name(f"{prefix}.{self._process_id}!{next(self._locals)}")

    # Groups

    async def group_add(self, group: str, channel: str) -> None:
        check_group_name(group)
        check_channel_name(channel)
        with self._lock:
            now = self._sweep_if_due()
            self._groups.setdefault(group, {})[channel] = now + self.group_expiry
            self._groups_of.setdefault(channel, set()).add(group)

    async def group_discard(self, group: str, channel: str) -> None:
        check_group_name(group)
        check_channel_name(channel)
        with self._lock:
            self._end_membership(group, channel)

    async def group_send(self, group: str, message: Message) -> None:
        check_group_name(group)
        encoded = encode_message(message)
        await asyncio.sleep(0)  # as in send()
        with self._lock:
            now = self._sweep_if_due()
            for channel, membership_ends in list(self._groups.get(group, {}).items()):
                if membership_ends <= now:
                    self._end_membership(group, channel)
                elif self._is_awaited(channel) or self._has_room_of_its_own(channel, now):
                    # Not counted against the capacity that the channels of a process share: there a broadcast is
                    # one message, however many members it meets, or a group of 101 would lose one.
                    self._put(channel, _Waiting(encoded, now + self.expiry, shared=False))
                else:
                    self._group_dropped_count += 1

    # Flush

    async def flush(self) -> None:
        with self._lock:
            for channel in list(self._channels.values()):
                channel.messages.clear()
                self._forget_if_idle(channel)
            self._shares.clear()
            self._groups.clear()
            self._groups_of.clear()
            self._unread_since.clear()

    async def close(self) -> None:
        """Do nothing: there is no connection. Here because code for Channels' layers calls it."""

    # Queues and readers; the lock is held

    def _open(self, channel: str) -> _Channel:
        state = self._channels.get(channel)
        if state is None:
            state = self._channels[channel] = _Channel(channel)
        return state

    def _forget_if_idle(self, state: _Channel) -> None:
        if not state.messages and not state.readers:
            self._channels.pop(state.name, None)

    def _is_awaited(self, channel: str) -> bool:
        """True if a message would go straight to a reader, so that no capacity is asked for."""
        state = self._channels.get(channel)
        return state is not None and not state.messages and self._next_reader(state) is not None

    def _has_room(self, channel: str, now: float) -> bool:
        if not self._has_room_of_its_own(channel, now):
            return False
        name = non_local_name(channel)
        capacity = self._capacities.of(channel)
        share = self._shares.get(name)
        if share is None or sum(share.values()) < capacity:
            return True
        for local in list(share):
            self._drop_expired(self._channels[local], now)
        return sum(self._shares.get(name, {}).values()) < capacity

    def _has_room_of_its_own(self, channel: str, now: float) -> bool:
        state = self._channels.get(channel)
        if state is None:
            return True
        capacity = self._capacities.of(channel)
        if len(state.messages) >= capacity:
            self._drop_expired(state, now)
        return len(state.messages) < capacity

    def _put(self, channel: str, waiting: _Waiting, *, first: bool = False) -> None:
        state = self._open(channel)
        if first:
            state.messages.appendleft(waiting)
        else:
            state.messages.append(waiting)
        if waiting.shared:
            share = self._shares.setdefault(non_local_name(channel), {})
            share[channel] = share.get(channel, 0) + 1
        self._hand_over(state)

    def _take_first(self, state: _Channel) -> _Waiting:
        waiting = state.messages.popleft()
        if waiting.shared:
            name = non_local_name(state.name)
            share = self._shares[name]
            share[state.name] -= 1
            if not share[state.name]:
                del share[state.name]
            if not share:
                del self._shares[name]
        return waiting

    def _next_reader(self, state: _Channel) -> _Reader | None:
        """Return the reader that has waited longest on a loop that runs, and forget readers that are gone."""
        for reader in list(state.readers):
            if reader.loop.is_closed() or reader.future.done():
                state.readers.remove(reader)  # its loop was closed under it, or it is cancelled and about to go
            elif reader.loop.is_running():
                return reader
        return None

    def _hand_over(self, state: _Channel) -> None:
        """Give messages to readers, as long as there are both."""
        while state.messages and (reader := self._next_reader(state)) is not None:
            state.readers.remove(reader)
            waiting = self._take_first(state)
            reader.message = waiting
            if not _call_on(reader.loop, _resolve, reader.future):
                reader.message = None
                self._put(state.name, waiting, first=True)  # its loop was closed just now
                return
        if state.messages:
            # Left are readers whose loops stand still, as between two calls of run_until_complete(). A message in
            # their hands would be lost if they never run again, so they only learn that there is something.
            for reader in state.readers:
                if not reader.is_called:
                    reader.is_called = _call_on(reader.loop, self._look_again, state.name, reader)
        self._forget_if_idle(state)

    def _give_up(self, channel: str, reader: _Reader) -> None:
        """A reader was cancelled: the message it may hold goes to the next reader, or back to the head."""
        waiting, reader.message = reader.message, None
        if waiting is not None:
            self._put(channel, waiting, first=True)
            return
        state = self._channels.get(channel)
        if state is not None and reader in state.readers:
            state.readers.remove(reader)
            self._forget_if_idle(state)

    # What ends by itself; the lock is held

    def _sweep_if_due(self) -> float:
        """Return the time; drop now and then what has expired in channels and groups that nobody asks for."""
        now = self._clock()
        if now >= self._next_sweep:
            self._next_sweep = now + self.expiry / _SWEEPS_PER_EXPIRY
            for state in list(self._channels.values()):
                self._drop_expired(state, now)
            ended = [
                (group, channel)
                for group, members in self._groups.items()
                for channel, membership_ends in members.items()
                if membership_ends <= now
            ]
            for group, channel in ended:
                self._end_membership(group, channel)
        return now

    def _drop_expired(self, state: _Channel, now: float) -> None:
        count = 0
        while state.messages and state.messages[0].deadline <= now:
            self._take_first(state)
            count += 1
        if count:
            self._expired_count += count
            if "!" in state.name and state.name in self._groups_of and not state.readers:
                unread_since = self._unread_since.setdefault(state.name, now)
                if now - unread_since >= _ABANDONED_EXPIRIES * self.expiry:
                    for group in list(self._groups_of[state.name]):
                        self._end_membership(group, state.name)
            self._forget_if_idle(state)

    def _end_membership(self, group: str, channel: str) -> None:
        members = self._groups.get(group)
        if members is None or members.pop(channel, None) is None:
            return
        if not members:
            del self._groups[group]
        groups = self._groups_of[channel]
        groups.discard(group)
        if not groups:
            del self._groups_of[channel]
            self._unread_since.pop(channel, None)

    # On the loop of a reader that stood still; takes the lock

    def _look_again(self, channel: str, reader: _Reader) -> None:
        with self._lock:
            reader.is_called = False
            state = self._channels.get(channel)
            if state is not None:
                self._drop_expired(state, self._clock())
                self._hand_over(state)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> bool:
    """Let a loop, of this or another thread, call a function soon; False if it is closed."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        return False
    return True
