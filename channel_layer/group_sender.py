"""Sending to groups: one message per process, however many members it has.

What is sent within one tick (and, under load, while the registry is asked) leaves together: one pipeline asks the
registry about each distinct group once, a second one carries the messages. Lives here: that, in the order of the
calls, for the groups of each shard of the broker. Does not live here: who is a member (groups.py).

A broker that lost its data has an empty registry until everybody has noticed and registered anew. So each reading of
the registry is followed by a look at the generation key, and in doubt every process that we have a link with gets
the message: one without members drops it, and broadcasts on links survive the loss without a gap.

    send() --> collected --> registry (group_members.lua, once a group) --> own members: delivered here
                                                                        +-> linked processes, if we are one: a frame,
                                                                        |   behind what the link was given before
                                                                        +-> other processes: a letter in their mail
                                                                        +-> a normal channel: its list
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from channel_layer import mail, scripts
from channel_layer.broker import Broker, BrokerShard
from channel_layer.capacity import Capacities
from channel_layer.errors import BrokerError, BrokerUnavailable
from channel_layer.frames import build_group_send
from channel_layer.inbox import ListWriter
from channel_layer.names import NORMAL_MEMBER_MARK, Keys, is_linked

__all__ = ["OUTAGE_WAIT_S", "GroupSender", "GroupSenderStatistics"]

logger = logging.getLogger("trunkline.channel_layer")

# How long a call waits for a broker that is away, before it raises BrokerUnavailable.
OUTAGE_WAIT_S: Final = 10.0
# Messages that wait for the registry, in bytes; a call beyond raises BrokerUnavailable at once. Only an outage, or
# callers that do not wait for their calls, can fill it.
_WAITING_BYTES_MAX: Final = 64 * 1024 * 1024
# Groups of one portion of registry reads; the messages behind them come with the next.
_GROUPS_MAX: Final = 500
# So long after the broker lost its data the registry may lack processes that have members: everybody notices within
# 3 s and registers at once; the rest is for slow machines.
_DOUBT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSenderStatistics:
    waiting: int
    sent_count: int  # messages, each counted once
    frame_count: int  # to linked processes
    letter_count: int  # to the mail of others
    congested_count: int  # dropped at a link that holds too much
    full_count: int  # dropped at a full mail or normal channel
    failed_count: int  # calls that raised BrokerUnavailable


class _Sending:
    """One call of group_send."""

    __slots__ = ("encoded", "error", "future", "give_up_at", "group", "key", "unanswered")

    def __init__(self, group: str, key: str, encoded: bytes, future: asyncio.Future[None], give_up_at: float) -> None:
        self.group = group
        self.key = key
        self.encoded = encoded
        self.future = future
        self.give_up_at = give_up_at
        # Letters written and not answered, one more while they are being written.
        self.unanswered = 1
        self.error: Exception | None = None


class _Lane:
    """The calls for the groups of one shard, in their order. A shard that hangs holds up its own only."""

    __slots__ = ("doubt_until", "draining", "waiting")

    def __init__(self, doubt_until: float) -> None:
        self.waiting: deque[_Sending] = deque()  # _WAITING_BYTES_MAX over all lanes
        self.draining: asyncio.Task[None] | None = None
        # Until then the registry may lack processes that have members.
        self.doubt_until = doubt_until


class GroupSender:
    """The group_send of one process, on its loop."""

    def __init__(
        self,
        *,
        process_id: str,
        keys: Keys,
        broker: Broker,
        writer: ListWriter,
        loop: asyncio.AbstractEventLoop,
        expiry_s: float,
        capacities: Capacities,
        members: Callable[[str], Collection[str]],
        deliver: Callable[[Collection[str], bytes], None],
        link_send: Callable[[str, bytes], bool] | None,
        linked: Callable[[], Collection[str]] = tuple,
        outage_wait_s: float = OUTAGE_WAIT_S,
    ) -> None:
        """``link_send`` queues a frame, False if the link holds too much; None in a process without links.

        ``linked`` returns the processes that we have a link with.
        """
        self._process_id = process_id
        self._keys = keys
        self._broker = broker
        self._writer = writer
        self._loop = loop
        self._expiry_ms = int(expiry_s * 1000)
        self._capacities = capacities
        self._members = members
        self._deliver = deliver
        self._link_send = link_send
        self._linked = linked
        self._outage_wait_s = outage_wait_s
        # A process that starts cannot know whether the data were lost just before.
        self._young_until = loop.time() + _DOUBT_S
        self._lanes: dict[BrokerShard, _Lane] = {}
        self._waiting_bytes = 0
        self._sent_count = 0
        self._frame_count = 0
        self._letter_count = 0
        self._congested_count = 0
        self._full_count = 0
        self._failed_count = 0

    def __repr__(self) -> str:
        return f"<GroupSender waiting={self._waiting_count} sent={self._sent_count}>"

    @property
    def _waiting_count(self) -> int:
        return sum(len(lane.waiting) for lane in self._lanes.values())

    def statistics(self) -> GroupSenderStatistics:
        return GroupSenderStatistics(
            waiting=self._waiting_count,
            sent_count=self._sent_count,
            frame_count=self._frame_count,
            letter_count=self._letter_count,
            congested_count=self._congested_count,
            full_count=self._full_count,
            failed_count=self._failed_count,
        )

    async def send(self, group: str, encoded: bytes) -> None:
        """Send to all members of ``group``; return when the message is on its way to each process.

        Waits while the broker is away. Raises BrokerUnavailable. A call cancelled while it waits for the registry
        sends nothing.
        """
        if self._waiting_bytes + len(encoded) > _WAITING_BYTES_MAX:
            self._failed_count += 1
            raise BrokerUnavailable(f"{self._waiting_count} messages to groups wait for the broker already")
        key = self._keys.group(group)
        lane = self._lane_of(self._broker.shard_of(key))
        sending = _Sending(group, key, encoded, self._loop.create_future(), self._loop.time() + self._outage_wait_s)
        lane.waiting.append(sending)
        self._waiting_bytes += len(encoded)
        if lane.draining is None:
            lane.draining = self._loop.create_task(self._drain(lane))
        await sending.future

    def data_lost(self, shard: BrokerShard) -> None:
        """The shard has lost its data, and with it the registry of its groups."""
        self._lane_of(shard).doubt_until = self._loop.time() + _DOUBT_S

    async def close(self) -> None:
        for lane in self._lanes.values():
            if lane.draining is not None:
                lane.draining.cancel()
                await asyncio.wait((lane.draining,))
            self._fail(list(lane.waiting), BrokerUnavailable("the channel layer was closed"))
            lane.waiting.clear()
        self._waiting_bytes = 0

    def _lane_of(self, shard: BrokerShard) -> _Lane:
        lane = self._lanes.get(shard)
        if lane is None:
            lane = self._lanes[shard] = _Lane(self._young_until)
        return lane

    async def _drain(self, lane: _Lane) -> None:
        try:
            while lane.waiting:
                try:
                    await self._send_batch(lane)
                except BrokerUnavailable as error:
                    await self._wait_for_broker(lane, error)
        finally:
            lane.draining = None

    async def _send_batch(self, lane: _Lane) -> None:
        """Ask about the groups of what waits at the front, then send that. On BrokerUnavailable all still waits."""
        reads: dict[str, asyncio.Future[Any]] = {}
        count = 0
        shards: set[BrokerShard] = set()  # one, but for a Cluster whose slots change hands at this moment
        for sending in lane.waiting:
            if sending.group not in reads:
                if len(reads) == _GROUPS_MAX:
                    break
                reads[sending.group] = self._broker.script(scripts.GROUP_MEMBERS, [sending.key], [])
                shards.add(self._broker.shard_of(sending.key))
            count += 1
        pending = list(reads.values())
        if self._link_send is not None:
            # Behind the reads: if the data are there now, they were there before. Otherwise data_lost() has been
            # called by the time this goes on.
            pending.extend(shard.look_for_lost_data() for shard in shards)
        answers = await asyncio.gather(*pending, return_exceptions=True)
        processes: dict[str, Any] = dict(zip(reads, answers, strict=False))
        if self._link_send is not None and any(
            self._loop.time() < self._lane_of(shard).doubt_until for shard in shards
        ):
            linked = [process.encode() for process in self._linked()]
            for group, answer in processes.items():
                if not isinstance(answer, BaseException):
                    processes[group] = [*answer, *(process for process in linked if process not in answer)]
        for answer in answers:
            if isinstance(answer, BrokerUnavailable):
                raise answer
        for _ in range(count):
            sending = lane.waiting.popleft()
            self._waiting_bytes -= len(sending.encoded)
            if sending.future.done():
                continue
            answer = processes[sending.group]
            if isinstance(answer, BaseException):
                # The broker refuses the read: rights, or somebody else's key.
                sending.error = answer if isinstance(answer, Exception) else BrokerError(repr(answer))
            else:
                try:
                    self._send(sending, answer)
                except Exception as error:
                    # A registry entry that none of ours wrote, say: it must cost this call only, and be told.
                    sending.error = error
            self._settle(sending)

    def _send(self, sending: _Sending, processes: list[bytes]) -> None:
        self._sent_count += 1
        members = self._members(sending.group)
        if members:
            self._deliver(members, sending.encoded)
        frame: bytes | None = None
        letter: bytes | None = None
        for name in processes:
            process = name.decode()
            if process == self._process_id:
                continue
            if process[:1] == NORMAL_MEMBER_MARK:
                channel = process[1:]
                self._push(
                    sending, self._keys.normal(channel), sending.encoded, capacity=self._capacities.of(channel)
                )
                continue
            if self._link_send is not None and is_linked(process):
                if frame is None:
                    frame = build_group_send(sending.group, sending.encoded)
                if self._link_send(process, frame):
                    self._frame_count += 1
                else:
                    self._congested_count += 1
                continue
            if letter is None:
                letter = mail.build_group_send(sending.group, sending.encoded)
            self._letter_count += 1
            self._push(sending, self._keys.mail(process), letter, capacity=mail.MAIL_CAPACITY)

    def _push(self, sending: _Sending, key: str, content: bytes, *, capacity: int) -> None:
        sending.unanswered += 1
        self._writer.push(key, content, capacity=capacity, expiry_ms=self._expiry_ms).add_done_callback(
            lambda answer: self._stored(sending, answer)
        )

    def _stored(self, sending: _Sending, answer: asyncio.Future[int]) -> None:
        if answer.cancelled():
            sending.error = BrokerUnavailable("the channel layer was closed")
        elif (error := answer.exception()) is not None:
            sending.error = error if isinstance(error, Exception) else BrokerUnavailable(repr(error))
        elif answer.result() < 0:
            # Channel layer specification, "Groups": a full channel misses the message, group_send never raises.
            self._full_count += 1
        self._settle(sending)

    def _settle(self, sending: _Sending) -> None:
        sending.unanswered -= 1
        if sending.unanswered or sending.future.done():
            return
        if sending.error is None:
            sending.future.set_result(None)
        else:
            self._failed_count += 1
            sending.future.set_exception(sending.error)

    async def _wait_for_broker(self, lane: _Lane, error: BrokerUnavailable) -> None:
        """Return when the broker may be asked again; fail the calls that have waited long enough."""
        now = self._loop.time()
        waiting = lane.waiting
        overdue: list[_Sending] = []
        while waiting and (waiting[0].give_up_at <= now or waiting[0].future.done()):
            sending = waiting.popleft()
            self._waiting_bytes -= len(sending.encoded)
            overdue.append(sending)
        self._fail(overdue, error)
        if not waiting:
            return
        key = waiting[0].key
        if self._broker.shard_of(key).reachable:
            # Overloaded, or lost this instant: a moment later it is known which.
            await asyncio.sleep(0.05)
            return
        try:
            await self._broker.wait_reachable(max(0.0, waiting[0].give_up_at - now), key)
        except BrokerUnavailable:
            return  # the next read fails at once, and the overdue ones with it

    def _fail(self, sendings: list[_Sending], error: Exception) -> None:
        for sending in sendings:
            if not sending.future.done():
                self._failed_count += 1
                sending.future.set_exception(error)
