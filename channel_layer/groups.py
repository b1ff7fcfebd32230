"""Groups: who of this process is a member, and that the broker knows this process has members.

Membership lives in the process that owns the channel. In the broker stands only, for each group, which processes
have members: a sorted set of process ids with deadlines in broker time. Lives here: memberships, and the
registration of this process under its groups. Does not live here: sending to groups (group_sender.py), asking
other processes (group_requests.py).

A group's registration, from its first member here to its last:

    ABSENT --first member--> REGISTERING --answered--> REGISTERED --renewed every 15 s--> REGISTERED
      ^                          ^------ broker came back, or lost its data ------'
      +------------------ last member leaves (ZREM) -------------------------------'

Registering and leaving are commands on one connection, in the order of the calls, so a member that joins right
behind the last one's leaving is registered in the end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from channel_layer import scripts
from channel_layer.broker import Broker, BrokerShard
from channel_layer.errors import BrokerUnavailable
from channel_layer.names import Keys

__all__ = ["REGISTRATION_S", "RENEWAL_INTERVAL_S", "Groups", "GroupsStatistics"]

logger = logging.getLogger("trunkline.channel_layer")

# Other processes reach a dead one's groups in vain for at most this long.
REGISTRATION_S: Final = 60.0
# Four times a registration's life, so that three renewals in a row may fail.
RENEWAL_INTERVAL_S: Final = 15.0
# A registration that is about to end counts as ended: the answer to group_add must still hold when it is read.
_MARGIN_S: Final = 5.0
# Renewals written at once; the next portion waits for the answers.
_PORTION: Final = 500
# Groups that were left and are not removed from the registry yet: the broker is away, or a portion is under way.
# Beyond, they end by their deadline.
_LEFT_MAX: Final = 100_000

# Told None when the group is registered, else why not.
WhenRegistered = Callable[[Exception | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupsStatistics:
    groups: int  # that have members here
    members: int
    unregistered: int  # groups whose registration is not answered (yet)
    registered_count: int  # answers to registrations and renewals
    failed_count: int


class _Registration:
    """This process under one group; exists while the group has members here."""

    __slots__ = ("is_pending", "joining", "valid_until", "waiting")

    def __init__(self) -> None:
        self.valid_until = 0.0  # loop time
        self.is_pending = False  # written, not answered
        # Channel -> who waits for the answer; bounded by the calls of group_add.
        self.waiting: dict[str, list[WhenRegistered]] = {}
        # Members whose first answer is still to come: a refusal ends their membership.
        self.joining: set[str] = set()

    def take_waiting(self) -> list[WhenRegistered]:
        waiting, self.waiting = self.waiting, {}
        return [when_registered for calls in waiting.values() for when_registered in calls]


class Groups:
    """The memberships of one process, on its loop."""

    def __init__(self, *, process_id: str, keys: Keys, broker: Broker, loop: asyncio.AbstractEventLoop) -> None:
        self._process_id = process_id
        self._keys = keys
        self._broker = broker
        self._loop = loop
        # Group -> its channels here, in the order of joining (a dict because sets have no order).
        self._channels_of: dict[str, dict[str, None]] = {}
        self._groups_of: dict[str, dict[str, None]] = {}
        # What members() returned, until the group changes: a copy for each message would cost as much as its fan-out,
        # and a live view breaks when a member leaves because it cannot take the message.
        self._members: dict[str, tuple[str, ...]] = {}
        self._registrations: dict[str, _Registration] = {}
        self._left: dict[str, None] = {}
        self._removing = 0  # removals without an answer
        self._renewing: asyncio.Task[None] | None = None
        self._registered_count = 0
        self._failed_count = 0

    def __repr__(self) -> str:
        return f"<Groups of {self._process_id}: {len(self._channels_of)} groups, {len(self._groups_of)} channels>"

    def statistics(self) -> GroupsStatistics:
        now = self._loop.time()
        return GroupsStatistics(
            groups=len(self._channels_of),
            members=sum(map(len, self._channels_of.values())),
            unregistered=sum(each.valid_until <= now for each in self._registrations.values()),
            registered_count=self._registered_count,
            failed_count=self._failed_count,
        )

    def members(self, group: str) -> tuple[str, ...]:
        """Return the channels of this process in ``group``, in the order of joining."""
        members = self._members.get(group)
        if members is None:
            channels = self._channels_of.get(group)
            if channels is None:
                return ()
            members = self._members[group] = tuple(channels)
        return members

    def channels(self) -> list[str]:
        """Return the channels of this process that are in any group."""
        return list(self._groups_of)

    def add(self, group: str, channel: str, when_registered: WhenRegistered) -> bool:
        """Make ``channel`` a member at once; return True if it was none.

        ``when_registered`` is called when messages from other processes will reach it, perhaps before this returns.
        While the broker is away it is called after that. Told an error, it is no member, unless it was one before.
        """
        channels = self._channels_of.get(group)
        if channels is None:
            channels = self._channels_of[group] = {}
        is_new = channel not in channels
        if is_new:
            channels[channel] = None
            self._members.pop(group, None)
            groups = self._groups_of.get(channel)
            if groups is None:
                groups = self._groups_of[channel] = {}
            groups[group] = None
        registration = self._registrations.get(group)
        if registration is None:
            registration = self._registrations[group] = _Registration()
        if registration.valid_until > self._loop.time():
            when_registered(None)
            return is_new
        if is_new:
            registration.joining.add(channel)
        registration.waiting.setdefault(channel, []).append(when_registered)
        if not registration.is_pending:
            self._register(group, registration)
        return is_new

    async def add_and_wait(self, group: str, channel: str, timeout_s: float) -> None:
        """As ``add``; return when it is registered.

        Raises BrokerUnavailable and BrokerError: then it is no member, unless it was one before or another call still
        waits for the same.
        """
        registration = self._registrations.get(group)
        if registration is not None and registration.valid_until > self._loop.time():
            self.add(group, channel, _ignore)
            return
        registered: asyncio.Future[None] = self._loop.create_future()

        def settle(error: Exception | None) -> None:
            if not registered.done():
                if error is None:
                    registered.set_result(None)
                else:
                    registered.set_exception(error)

        self.add(group, channel, settle)
        try:
            async with asyncio.timeout(timeout_s):
                await registered
        except TimeoutError:
            if registered.cancelled():
                raise BrokerUnavailable(
                    f"the broker did not answer for {timeout_s:g} s: {channel} was not added to {group}"
                ) from None
            registered.result()  # it came at the last instant
        finally:
            self._wait_no_more(group, channel, settle)

    def discard(self, group: str, channel: str) -> None:
        """End a membership, at once; the registry follows."""
        channels = self._channels_of.get(group)
        if channels is None or channel not in channels:
            return
        del channels[channel]
        self._registrations[group].joining.discard(channel)
        self._members.pop(group, None)
        groups = self._groups_of[channel]
        del groups[group]
        if not groups:
            del self._groups_of[channel]
        if not channels:
            del self._channels_of[group]
            self._leave(group)

    def forget(self, channels: Iterable[str]) -> None:
        """End all memberships of ``channels``."""
        for channel in channels:
            for group in list(self._groups_of.get(channel, ())):
                self.discard(group, channel)

    def clear(self) -> None:
        """End all memberships."""
        self.forget(list(self._groups_of))

    # Called by the process layer

    def renew(self) -> None:
        """Renew all registrations, in portions; called every RENEWAL_INTERVAL_S."""
        if self._registrations and (self._renewing is None or self._renewing.done()):
            self._renewing = self._loop.create_task(self._renew())

    def retry(self) -> None:
        """Register what somebody waits for and nobody registers (a refused or overloaded connection)."""
        for group, registration in self._registrations.items():
            if registration.waiting and not registration.is_pending and self._shard_of(group).reachable:
                self._register(group, registration)

    def broker_restored(self, shard: BrokerShard | None = None) -> None:
        """The shard is back, or lost its data: register what is there anew, at once. None: all of them."""
        self._remove_more()
        for group, registration in self._registrations.items():
            if shard is None or self._shard_of(group) is shard:
                registration.valid_until = 0.0
        if self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None
        self.renew()

    async def close(self) -> None:
        """End all memberships and tell the broker, if it answers."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait((self._renewing,))
        groups = [*self._registrations, *self._left]
        self._left.clear()
        self._channels_of.clear()
        self._groups_of.clear()
        self._members.clear()
        self._registrations.clear()
        for start in range(0, len(groups), _PORTION):
            # Where the broker is away, the deadlines will do it.
            portion = [group for group in groups[start : start + _PORTION] if self._shard_of(group).reachable]
            calls = [self._broker.call("ZREM", self._keys.group(group), self._process_id) for group in portion]
            await asyncio.gather(*calls, return_exceptions=True)

    # The registry

    async def _renew(self) -> None:
        groups_of: dict[BrokerShard, list[str]] = {}
        for group in self._registrations:
            groups_of.setdefault(self._shard_of(group), []).append(group)
        # Each shard at its own pace: one may hang.
        await asyncio.gather(*[self._renew_at(shard, groups) for shard, groups in groups_of.items()])

    async def _renew_at(self, shard: BrokerShard, groups: list[str]) -> None:
        for start in range(0, len(groups), _PORTION):
            if not shard.reachable:
                return  # broker_restored() begins anew
            answers: list[asyncio.Future[Any]] = []
            for group in groups[start : start + _PORTION]:
                registration = self._registrations.get(group)
                if registration is not None:
                    answers.append(self._register(group, registration))
            if answers:
                await asyncio.wait(answers)

    def _shard_of(self, group: str) -> BrokerShard:
        return self._broker.shard_of(self._keys.group(group))

    def _register(self, group: str, registration: _Registration) -> asyncio.Future[Any]:
        registration.is_pending = True
        written_at = self._loop.time()
        answer = self._broker.script(
            scripts.GROUP_REGISTER, [self._keys.group(group)], [self._process_id, int(REGISTRATION_S * 1000)]
        )
        answer.add_done_callback(lambda future: self._answered(group, registration, written_at, future))
        return answer

    def _answered(
        self, group: str, registration: _Registration, written_at: float, answer: asyncio.Future[Any]
    ) -> None:
        registration.is_pending = False
        error = BrokerUnavailable("the connection was closed") if answer.cancelled() else answer.exception()
        if error is None:
            self._registered_count += 1
            registration.valid_until = written_at + REGISTRATION_S - _MARGIN_S
            registration.joining.clear()
        else:
            self._failed_count += 1
            if isinstance(error, BrokerUnavailable):
                return  # broker_restored() or retry() registers again; who waits has a limit of its own
            logger.error("group %s could not be registered: %s", group, error)
        waiting = registration.take_waiting()
        for channel in list(registration.joining):  # empty, unless it was refused
            self.discard(group, channel)
        for when_registered in waiting:
            when_registered(error if isinstance(error, Exception) else None)

    def _wait_no_more(self, group: str, channel: str, when_registered: WhenRegistered) -> None:
        """A call ends: if it has no answer and nobody else waits for one, a new membership ends with it."""
        registration = self._registrations.get(group)
        if registration is None or when_registered not in registration.waiting.get(channel, ()):
            return
        calls = registration.waiting[channel]
        calls.remove(when_registered)
        if not calls:
            del registration.waiting[channel]
            if channel in registration.joining:
                self.discard(group, channel)

    def _leave(self, group: str) -> None:
        registration = self._registrations.pop(group)
        for when_registered in registration.take_waiting():
            when_registered(None)  # it joined and left again; there is nothing to wait for
        if self._removing < _PORTION:
            self._remove(group)
        elif len(self._left) < _LEFT_MAX:
            # Thousands of clients leave at once: the connection is for others, too.
            self._left[group] = None

    def _remove(self, group: str) -> None:
        self._removing += 1
        answer = self._broker.call("ZREM", self._keys.group(group), self._process_id)
        answer.add_done_callback(lambda future: self._removed(group, future))

    def _removed(self, group: str, answer: asyncio.Future[Any]) -> None:
        self._removing -= 1
        if answer.cancelled():
            return
        if answer.exception() is None:
            self._remove_more()
        elif len(self._left) < _LEFT_MAX:
            self._left[group] = None

    def _remove_more(self) -> None:
        # Those of a shard that is away may keep others waiting behind them: then the deadlines end these, too.
        for group in list(islice(self._left, max(0, _PORTION - self._removing))):
            if self._shard_of(group).reachable:
                del self._left[group]
                if group not in self._registrations:  # else somebody has joined again
                    self._remove(group)


def _ignore(error: Exception | None) -> None:
    """For members whose group is registered already."""
