"""group_add and group_discard for channels of other processes: asking the owner, and waiting for its answer.

A reply channel of an interface server is asked for on the link, if we have one: in order with the connection's
frames and fenced by its epoch. Everything else goes by mail. Lives here: requests and their answers. Does not live
here: being asked (process_layer.py).

    ask --> frame or letter --answer--> done
                +--owner ended, or its lease is missing--> done (a dead owner's channels are in no group)
                +--owner took us for dead--> asked again, on the new link
                +--5 s--> TimeoutError
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from channel_layer import frames, mail
from channel_layer.broker import Broker
from channel_layer.errors import BrokerError, BrokerUnavailable
from channel_layer.inbox import ListWriter
from channel_layer.link import GIVEN_UP_REASONS
from channel_layer.names import Keys, is_linked

__all__ = ["ANSWER_WAIT_S", "GroupRequests", "connection_of"]

logger = logging.getLogger("trunkline.channel_layer")

# Base contract, group_add: 5 s without an answer is a TimeoutError.
ANSWER_WAIT_S: Final = 5.0
# A missing lease is looked at a second time after this: a process renews it twice a second, also right after the
# broker lost its data.
_LEASE_AGAIN_S: Final = 1.0


def connection_of(channel: str) -> int | None:
    """Return the number of the connection whose reply channel this is; None for any other channel."""
    head, _, local = channel.partition("!")
    if head.startswith("interface.i") and local.isdecimal():
        return int(local)
    return None


class GroupRequests:
    """What this process has asked others for."""

    def __init__(
        self,
        *,
        process_id: str,
        keys: Keys,
        broker: Broker,
        writer: ListWriter,
        loop: asyncio.AbstractEventLoop,
        expiry_s: float,
        link_send: Callable[[str, bytes], object] | None,
    ) -> None:
        self._process_id = process_id
        self._keys = keys
        self._broker = broker
        self._writer = writer
        self._loop = loop
        self._expiry_ms = int(expiry_s * 1000)
        self._link_send = link_send
        # Request -> its owner, who waits, and what asks (again) on the link; None: asked by mail. Each ends after
        # ANSWER_WAIT_S, so callers bound it.
        self._waiting: dict[int, tuple[str, asyncio.Future[bool], Callable[[], object] | None]] = {}
        self._last_request = 0

    def __repr__(self) -> str:
        return f"<GroupRequests waiting={len(self._waiting)}>"

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def ask(self, owner: str, group: str, channel: str, *, add: bool, epoch: int) -> None:
        """Have ``owner`` add its ``channel`` to the group, or take it out. Raises TimeoutError, BrokerUnavailable."""
        self._last_request += 1
        request = self._last_request
        answered: asyncio.Future[bool] = self._loop.create_future()
        ask_on_link: Callable[[], object] | None = None
        connection = connection_of(channel)
        if self._link_send is not None and connection is not None and is_linked(owner):
            build_frame = frames.build_group_add if add else frames.build_group_discard
            ask_on_link = partial(self._link_send, owner, build_frame(connection, epoch, request, group))
        self._waiting[request] = (owner, answered, ask_on_link)
        deadline = self._loop.time() + ANSWER_WAIT_S
        try:
            if ask_on_link is not None:
                ask_on_link()
                await self._wait(answered, deadline)
            else:
                build_letter = mail.build_group_add if add else mail.build_group_discard
                letter = build_letter(group, channel, request=request, answer_to=self._process_id)
                await self._ask_by_mail(owner, letter, answered, deadline)
            if answered.done():
                if not answered.result():
                    raise BrokerError(f"process {owner} could not register itself under group {group}; see its log")
            elif not await self._is_dead(owner):
                verb = "added to" if add else "discarded from"
                raise TimeoutError(
                    f"process {owner} did not answer for {ANSWER_WAIT_S:g} s: {channel} may or may not have been "
                    f"{verb} {group}"
                )
        finally:
            del self._waiting[request]

    async def flush(self, processes: Iterable[str]) -> None:
        """Have other processes forget what they hold; return when all have, or after ANSWER_WAIT_S."""
        answers: list[asyncio.Future[bool]] = []
        requests: list[int] = []
        for process in processes:
            self._last_request += 1
            requests.append(self._last_request)
            answered: asyncio.Future[bool] = self._loop.create_future()
            self._waiting[self._last_request] = (process, answered, None)
            answers.append(answered)
            self._writer.push_unasked(
                self._keys.mail(process),
                mail.build_flush(request=self._last_request, answer_to=self._process_id),
                capacity=mail.MAIL_CAPACITY,
                expiry_ms=self._expiry_ms,
            )
        try:
            if answers:
                await asyncio.wait(answers, timeout=ANSWER_WAIT_S)
        finally:
            for request in requests:
                del self._waiting[request]

    def answered(self, request: int, done: bool) -> None:
        """The owner's answer came. One that nobody waits for any more is ignored."""
        waiting = self._waiting.get(request)
        if waiting is not None and not waiting[1].done():
            waiting[1].set_result(done)

    def peer_ended(self, peer: str, reason: str) -> None:
        """The link to ``peer`` is over, and its memberships with it, unless it lives and only took us for dead."""
        for owner, answered, ask_on_link in self._waiting.values():
            if owner != peer or answered.done():
                continue
            if reason not in GIVEN_UP_REASONS:
                answered.set_result(True)
            elif ask_on_link is not None:
                ask_on_link()  # it may have arrived before: to add or to discard twice is to do it once

    async def _ask_by_mail(self, owner: str, letter: bytes, answered: asyncio.Future[bool], deadline: float) -> None:
        pushed = self._writer.push(
            self._keys.mail(owner), letter, capacity=mail.MAIL_CAPACITY, expiry_ms=self._expiry_ms
        )
        lease = self._broker.call("EXISTS", self._keys.lease(owner))
        # A mail that is full is a TimeoutError in the end: its owner does not read it.
        await asyncio.gather(pushed, lease)
        if not lease.result():
            await self._wait(answered, self._loop.time() + _LEASE_AGAIN_S)
            if not answered.done() and await self._is_dead(owner):
                if not answered.done():  # the answer may have come meanwhile
                    answered.set_result(True)
                return
        await self._wait(answered, deadline)

    async def _wait(self, answered: asyncio.Future[bool], deadline: float) -> None:
        if not answered.done():
            await asyncio.wait((answered,), timeout=max(0.0, deadline - self._loop.time()))

    async def _is_dead(self, owner: str) -> bool:
        try:
            return not await self._broker.call("EXISTS", self._keys.lease(owner))
        except BrokerUnavailable:
            return False  # nobody is dead while the broker is away
