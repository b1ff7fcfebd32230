"""Messages for the process-local channels of this process that wait for their receive().

A message comes from this process itself, from the mail or from a group, goes straight to a call that waits, else
into the channel's queue. Lives here: queues, waiting calls, capacity and expiry of what has arrived. Does not live
here: how messages come (inbox.py, process_layer.py) and what they hold (codec.py). An interface server has none
of this: its connections take their messages themselves.

    store (own send: refused when full) --+--> a call of receive() waits: its hands
    deliver (mail, groups: dropped) ------+--> queue --> receive()
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from channel_layer.capacity import Capacities
from channel_layer.channels_compat import channel_full
from channel_layer.errors import BrokerUnavailable
from channel_layer.names import non_local_name

__all__ = ["LocalChannels", "LocalChannelsStatistics"]

# Channels that hold messages while nobody waits. A message for one more is dropped and counted: names with "!" are
# made for each connection, so a hundred thousand unread ones are leftovers or somebody's mistake.
_UNREAD_CHANNELS_MAX: Final = 100_000
# A channel in which a message expired unread, and from which nobody has received for this many times the expiry,
# has lost its reader: it leaves its groups. Not at the first expired message, as a consumer may work that long.
_ABANDONED_EXPIRIES: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalChannelsStatistics:
    """What waits in the process, and what was dropped since it started."""

    channels: int  # that hold messages or have waiting calls
    messages: int
    receivers: int  # waiting calls of receive()
    expired_count: int
    full_count: int  # refused with ChannelFull
    dropped_count: int  # delivered to a full channel


class _Waiting:
    """One message; shared by all channels of a group that it waits in."""

    __slots__ = ("counted", "deadline", "encoded")

    def __init__(self, encoded: bytes, deadline: float, *, counted: bool) -> None:
        self.encoded = encoded
        self.deadline = deadline
        self.counted = counted  # against the capacity that all channels of a non-local name share


class _Channel:
    """Exists while it holds messages, has waiting calls or is suspected to be abandoned; and up to the next sweep.

    Most readers come again at once, so it is not made anew for each message.
    """

    __slots__ = ("messages", "receivers", "unread_since")

    def __init__(self) -> None:
        # Oldest first; bounded by the channel's capacity. Lists, for an empty deque takes 600 bytes.
        self.messages: list[_Waiting] = []
        # One for each waiting call; never non-empty together with messages.
        self.receivers: list[asyncio.Future[_Waiting]] = []
        # When a message expired here for the first time since the last receive().
        self.unread_since: float | None = None


class LocalChannels:
    """The process-local channels of one process, used on its loop."""

    def __init__(
        self,
        *,
        capacities: Capacities,
        expiry_s: float,
        loop: asyncio.AbstractEventLoop,
        abandoned: Callable[[str], None],
    ) -> None:
        self._capacities = capacities
        self._expiry_s = expiry_s
        self._loop = loop
        self._abandoned = abandoned  # told the name of a channel that nobody reads any more
        self._channels: dict[str, _Channel] = {}
        # Non-local name -> own messages waiting in its channels. Bounded by the capacity: store() refuses.
        self._shares: dict[str, int] = {}
        self._unread = 0  # channels that hold messages
        self._expired_count = 0
        self._full_count = 0
        self._dropped_count = 0

    def __repr__(self) -> str:
        return f"<LocalChannels channels={len(self._channels)} unread={self._unread}>"

    def statistics(self) -> LocalChannelsStatistics:
        channels = self._channels.values()
        return LocalChannelsStatistics(
            channels=len(self.names()),
            messages=sum(len(channel.messages) for channel in channels),
            receivers=sum(len(channel.receivers) for channel in channels),
            expired_count=self._expired_count,
            full_count=self._full_count,
            dropped_count=self._dropped_count,
        )

    def names(self) -> list[str]:
        """Return the channels that somebody waits at, or where something waits."""
        return [channel for channel, state in self._channels.items() if state.messages or state.receivers]

    def store(self, channel: str, encoded: bytes) -> None:
        """Append a message that this process sends to itself. Raises ChannelFull."""
        waiting = _Waiting(encoded, self._loop.time() + self._expiry_s, counted=True)
        if self._hand_over(channel, waiting):
            return
        capacity = self._capacities.of(channel)
        name = non_local_name(channel)
        if self._shares.get(name, 0) >= capacity:
            self.sweep(name)
        if self._shares.get(name, 0) >= capacity or not self._has_room(channel, capacity):
            self._full_count += 1
            raise channel_full(f"channel {name!r} holds {capacity} messages, as many as its capacity allows")
        self._append(channel, waiting)

    def deliver(self, channels: Collection[str], encoded: bytes, lifetime_s: float | None = None) -> None:
        """Give a message from elsewhere to each of ``channels``; one that is full misses it.

        ``lifetime_s`` is what is left of the message's expiry, all of it by default.
        """
        left_s = self._expiry_s if lifetime_s is None else lifetime_s
        if left_s <= 0:
            self._expired_count += len(channels)
            return
        waiting = _Waiting(encoded, self._loop.time() + left_s, counted=False)
        for channel in channels:
            if self._hand_over(channel, waiting):
                continue
            if self._has_room(channel, self._capacities.of(channel)):
                self._append(channel, waiting)
            else:
                self._dropped_count += 1

    def is_known(self, channel: str) -> bool:
        """True for a channel whose name has been looked at lately: somebody receives from it, or something waits."""
        return channel in self._channels

    async def receive(self, channel: str) -> bytes:
        """Wait for the next message of ``channel``. A cancelled call leaves it to the next reader."""
        state = self._channels.get(channel)
        if state is not None and state.messages:
            state.unread_since = None
            self._drop_expired(channel, state)
            if state.messages:
                return self._take_first(channel, state).encoded
            state = self._channels.get(channel)
        if state is None:
            state = self._channels[channel] = _Channel()
        state.unread_since = None
        receiver: asyncio.Future[_Waiting] = self._loop.create_future()
        state.receivers.append(receiver)
        try:
            return (await receiver).encoded
        except asyncio.CancelledError:
            if receiver.done() and not receiver.cancelled() and receiver.exception() is None:
                # The message was in its hands already when the call was cancelled.
                self._put_back(channel, receiver.result())
            elif receiver in state.receivers:
                state.receivers.remove(receiver)
                self._forget_if_idle(channel, state)
            raise

    def give_back(self, channel: str, encoded: bytes) -> None:
        """Return a message that receive() gave to a caller who was cancelled: the next reader gets it first."""
        self._put_back(channel, _Waiting(encoded, self._loop.time() + self._expiry_s, counted=False))

    def sweep(self, name: str | None = None) -> None:
        """Drop what has expired, and forget channels that nobody reads; called every few seconds.

        ``name`` restricts it to the channels of one non-local name.
        """
        now = self._loop.time()
        for channel, state in list(self._channels.items()):
            if name is not None and not channel.startswith(name):
                continue
            self._drop_expired(channel, state)
            unread_since = state.unread_since
            if unread_since is not None and now - unread_since > self._expiry_s * (_ABANDONED_EXPIRIES - 1):
                state.unread_since = None
                while state.messages:
                    self._take_first(channel, state)
                    self._expired_count += 1
                self._forget_if_idle(channel, state)
                self._abandoned(channel)

    def clear(self) -> None:
        """Forget all messages; calls that wait go on waiting."""
        for channel, state in list(self._channels.items()):
            if state.messages:
                state.messages.clear()
                self._unread -= 1
            state.unread_since = None
            self._forget_if_idle(channel, state)
        self._shares.clear()

    def close(self) -> None:
        """Forget everything; calls that wait get BrokerUnavailable."""
        for state in self._channels.values():
            for receiver in state.receivers:
                if not receiver.done():
                    receiver.set_exception(BrokerUnavailable("the channel layer was closed while receive() waited"))
        self._channels.clear()
        self._shares.clear()
        self._unread = 0

    def _hand_over(self, channel: str, waiting: _Waiting) -> bool:
        state = self._channels.get(channel)
        if state is None:
            return False
        while state.receivers:
            receiver = state.receivers.pop(0)
            if not receiver.done():  # else it was cancelled, and its call has not run since
                receiver.set_result(waiting)
                return True
        return False

    def _has_room(self, channel: str, capacity: int) -> bool:
        state = self._channels.get(channel)
        if state is None or not state.messages:
            return self._unread < _UNREAD_CHANNELS_MAX
        if len(state.messages) >= capacity:
            self._drop_expired(channel, state)
        return len(state.messages) < capacity

    def _append(self, channel: str, waiting: _Waiting) -> None:
        state = self._channels.get(channel)
        if state is None:
            state = self._channels[channel] = _Channel()
        self._unread += not state.messages
        state.messages.append(waiting)
        self._count(channel, waiting)

    def _put_back(self, channel: str, waiting: _Waiting) -> None:
        if self._hand_over(channel, waiting):
            return
        state = self._channels.get(channel)
        if state is None:
            state = self._channels[channel] = _Channel()
        self._unread += not state.messages
        state.messages.insert(0, waiting)
        self._count(channel, waiting)

    def _count(self, channel: str, waiting: _Waiting) -> None:
        if waiting.counted:
            name = non_local_name(channel)
            self._shares[name] = self._shares.get(name, 0) + 1

    def _take_first(self, channel: str, state: _Channel) -> _Waiting:
        waiting = state.messages.pop(0)
        self._unread -= not state.messages
        if waiting.counted:
            name = non_local_name(channel)
            left = self._shares[name] - 1
            if left:
                self._shares[name] = left
            else:
                del self._shares[name]
        return waiting

    def _drop_expired(self, channel: str, state: _Channel) -> None:
        now = self._loop.time()
        # All messages of a channel live equally long once they are here, or (mail) a little less; so a message may
        # wait behind one that expires later, and is then looked at when its turn comes.
        while state.messages and state.messages[0].deadline <= now:
            self._take_first(channel, state)
            self._expired_count += 1
            if state.unread_since is None:
                state.unread_since = now
        self._forget_if_idle(channel, state)

    def _forget_if_idle(self, channel: str, state: _Channel) -> None:
        # A state may have been forgotten before, and another taken its name.
        is_idle = not state.messages and not state.receivers and state.unread_since is None
        if is_idle and self._channels.get(channel) is state:
            del self._channels[channel]
