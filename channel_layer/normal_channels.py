"""Reading normal channels: one blocking read a channel, and never more taken than somebody waits for.

Each channel has a connection of its own while it is read (one slot of a Cluster, and no channel starves another).
A read asks for as many elements as calls wait. What has no taker when it comes, because a call was cancelled
meanwhile, returns to the head of the list, in order. Lives here: the waiting calls and the readers. Does not live
here: ending a read at the broker (blocking_reader.py), writing (inbox.py).

    take() --> waiting calls --> one task a channel: pop, hand out, return the rest --idle for 10 s--> closed
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from channel_layer import scripts
from channel_layer.broker import BlockingReader, Broker
from channel_layer.broker_connection import WritesRefused
from channel_layer.errors import BrokerError, BrokerUnavailable, WireError
from channel_layer.messages import split_element

__all__ = ["NormalChannels", "NormalChannelsStatistics"]

logger = logging.getLogger("trunkline.channel_layer")

# A reader nobody waits at keeps its connection this long: a consumer is back in milliseconds, a name that was read
# once may never be read again.
IDLE_S: Final = 10.0
# Elements of one read, however many calls wait; the others are served by the next one.
_READ_COUNT_MAX: Final = 64
# While the broker is away, elements that are to return wait at most so long; then they are lost, counted and logged
# (at most once: nobody else may have them).
_RETURN_WAIT_S: Final = 10.0
_PAUSE_AFTER_ERROR_S: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalChannelsStatistics:
    readers: int
    waiting: int  # calls
    taken_count: int
    expired_count: int
    returned_count: int  # elements that went back because their caller was cancelled
    lost_count: int  # elements that could not go back
    malformed_count: int


class _Waiter:
    __slots__ = ("count", "future")

    def __init__(self, count: int, future: asyncio.Future[list[bytes]]) -> None:
        self.count = count  # the most it takes
        self.future = future


class _ChannelReader:
    """The reader of one channel. Its task ends when it is closed."""

    __slots__ = (
        "_keys",
        "idle",
        "idle_since",
        "is_closing",
        "is_interrupted",
        "is_reading",
        "is_started",
        "key",
        "reader",
        "returned",
        "returning",
        "task",
        "waiters",
    )

    def __init__(self, keys: tuple[str, ...], reader: BlockingReader) -> None:
        self.key = keys[0]
        self._keys = keys
        self.reader = reader
        # Longest waiting first; bounded by the callers.
        self.waiters: deque[_Waiter] = deque()
        # Elements that were in the hands of cancelled calls; at most one per call (a count for take_openings).
        self.returned: deque[bytes] = deque()
        # What the task waits for while nobody waits.
        self.idle: asyncio.Future[None] | None = None
        self.idle_since = 0.0
        # The task is inside of pop(), the one place where it may be cancelled while it is to go on.
        self.is_reading = False
        # It was cancelled there by interrupt(). Whatever else cancels it means its end.
        self.is_interrupted = False
        # A surplus on its way back to the list; the next read waits for it, to keep the order.
        self.returning: asyncio.Task[None] | None = None
        self.is_started = False  # a task that is cancelled before would end without a word
        self.is_closing = False
        self.task: asyncio.Task[None] | None = None

    def next_keys(self) -> tuple[str, ...]:
        """The lists to read; the first one that holds something is served, so they take turns in being the first."""
        keys = self._keys
        self._keys = (*keys[1:], keys[0])
        return keys

    def wake(self) -> None:
        if self.idle is not None and not self.idle.done():
            self.idle.set_result(None)

    def interrupt(self) -> None:
        """End the read that is under way, if any: what it brings returns to the list. The task goes on."""
        if self.is_reading and not self.is_interrupted and self.task is not None:
            self.is_interrupted = True
            self.task.cancel()


class NormalChannels:
    """The readers of a process's normal channels, on its loop."""

    def __init__(
        self,
        broker: Broker,
        loop: asyncio.AbstractEventLoop,
        *,
        keys_of: Callable[[str], tuple[str, ...]],
        expiry_s: float,
    ) -> None:
        """``keys_of`` a channel: the lists that it is read from, in one slot; what returns goes to the first one."""
        self._broker = broker
        self._loop = loop
        self._keys_of = keys_of
        self._expiry_ms = int(expiry_s * 1000)
        self._readers: dict[str, _ChannelReader] = {}
        # Tasks of readers that are being closed, to wait for them in close().
        self._ending: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._taken_count = 0
        self._expired_count = 0
        self._returned_count = 0
        self._lost_count = 0
        self._malformed_count = 0

    def __repr__(self) -> str:
        return f"<NormalChannels {self.statistics()}>"

    def statistics(self) -> NormalChannelsStatistics:
        return NormalChannelsStatistics(
            readers=len(self._readers),
            waiting=sum(len(reader.waiters) for reader in self._readers.values()),
            taken_count=self._taken_count,
            expired_count=self._expired_count,
            returned_count=self._returned_count,
            lost_count=self._lost_count,
            malformed_count=self._malformed_count,
        )

    async def take(self, channel: str, count: int) -> list[bytes]:
        """Wait for one to ``count`` elements, oldest first, as the broker held them (messages.split_element).

        A cancelled call takes nothing: what was on its way to it goes to another call or back to the head. Waits
        through outages of the broker, and while it takes no writes. Raises BrokerError if the broker refuses the
        read for another reason.
        """
        state = self._reader(channel)
        waiter = _Waiter(count, self._loop.create_future())
        state.waiters.append(waiter)
        state.wake()
        try:
            elements = await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
                self._give_back(channel, state, waiter.future.result())
            elif waiter in state.waiters:
                state.waiters.remove(waiter)
                if not state.waiters:
                    state.interrupt()  # nobody is left to take what the read would bring
            raise
        self._taken_count += len(elements)
        return elements

    def give_back(self, channel: str, elements: list[bytes]) -> None:
        """Return elements that take() gave to a caller who was cancelled: another call or the head of the list."""
        if self._is_closed:
            self._lost_count += len(elements)
            logger.error("%d messages of %s are lost: their reader was cancelled when the layer was closed",
                         len(elements), channel)  # fmt: skip
            return
        state = self._reader(channel)
        self._give_back(channel, state, elements)

    def _reader(self, channel: str) -> _ChannelReader:
        if self._is_closed:
            raise BrokerUnavailable(f"channel {channel!r} cannot be read: the channel layer was closed")
        state = self._readers.get(channel)
        if state is None:
            state = self._readers[channel] = _ChannelReader(self._keys_of(channel), self._broker.open_reader())
            state.task = self._loop.create_task(self._run(state))
        return state

    def close_idle(self) -> None:
        """Close the readers that nobody waits at any more; called every few seconds."""
        now = self._loop.time()
        for channel, state in list(self._readers.items()):
            if state.idle is not None and not state.idle.done() and now - state.idle_since >= IDLE_S:
                self._end(channel, state)

    async def close(self) -> None:
        """End all reads, return what was taken, disconnect. Calls that wait get BrokerUnavailable."""
        self._is_closed = True
        for channel, state in list(self._readers.items()):
            self._end(channel, state)
        if self._ending:
            await asyncio.wait(self._ending)

    def _give_back(self, channel: str, state: _ChannelReader, elements: list[bytes]) -> None:
        if state.task is not None and state.task.done():
            # The reader was closed under the caller; a task of its own carries the elements home.
            task = self._loop.create_task(self._return(state.key, elements))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            return
        state.returned.extend(elements)
        state.wake()
        state.interrupt()  # what the read would bring is newer

    def _end(self, channel: str, state: _ChannelReader) -> None:
        del self._readers[channel]
        state.is_closing = True
        task = state.task
        assert task is not None
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        if state.is_started:
            task.cancel()

    async def _run(self, state: _ChannelReader) -> None:
        state.is_started = True
        task = asyncio.current_task()
        assert task is not None
        failures = 0  # in a row
        try:
            while not state.is_closing:
                try:
                    if state.returning is not None:
                        await asyncio.wait((state.returning,))
                        state.returning = None
                    elif state.returned:
                        self._hand_out(state, self._collect_returned(state))
                    elif not state.waiters:
                        state.idle = self._loop.create_future()
                        state.idle_since = self._loop.time()
                        try:
                            await state.idle
                        finally:
                            state.idle = None
                    else:
                        count = min(_READ_COUNT_MAX, sum(waiter.count for waiter in state.waiters))
                        state.is_reading = True
                        try:
                            taken = await state.reader.pop(state.next_keys(), count)
                        finally:
                            state.is_reading = False
                            if state.is_interrupted:
                                state.is_interrupted = False
                                task.uncancel()
                        failures = 0
                        if taken is not None:
                            self._hand_out(state, taken[1])
                except asyncio.CancelledError:
                    if task.cancelling():
                        raise  # the reader is being closed, or the program ends without that
                except BrokerUnavailable:
                    failures += 1
                    if failures > 1:  # else the next pop() waits for the broker itself
                        await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
                except WritesRefused as error:
                    failures += 1
                    if failures == 1:
                        logger.error("%s cannot be read for now, trying again: %s", state.key, error)
                    await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
                except BrokerError as error:
                    self._fail(state, error)
        except Exception as error:
            logger.exception("reading %s ended", state.key)
            self._fail(state, error)
            raise
        finally:
            for channel, other in list(self._readers.items()):
                if other is state:
                    del self._readers[channel]
            await state.reader.close()
            while state.returned:
                await self._return(state.key, self._collect_returned(state))
            self._fail(state, BrokerUnavailable("the channel layer was closed while receive() waited"))

    def _collect_returned(self, state: _ChannelReader) -> list[bytes]:
        elements = list(state.returned)
        state.returned.clear()
        return elements

    def _fail(self, state: _ChannelReader, error: Exception) -> None:
        while state.waiters:
            waiter = state.waiters.popleft()
            if not waiter.future.done():
                waiter.future.set_exception(error)

    def _hand_out(self, state: _ChannelReader, elements: list[bytes]) -> None:
        """Give elements to the calls that wait; return what nobody wants."""
        now_ms = self._broker.time_ms(state.key)
        fresh: list[bytes] = []
        for element in elements:
            try:
                deadline_ms, _ = split_element(element)
            except WireError:
                self._malformed_count += 1
                logger.exception("an element of %s was dropped", state.key)
                continue
            if deadline_ms <= now_ms:
                self._expired_count += 1
            else:
                fresh.append(element)
        given = 0
        while given < len(fresh) and state.waiters:
            waiter = state.waiters.popleft()
            if waiter.future.done():
                continue
            portion = fresh[given : given + waiter.count]
            given += len(portion)
            waiter.future.set_result(portion)
        if given < len(fresh):
            # A task of its own: cancelling the reader must not interrupt it, the elements are nowhere else.
            state.returning = self._loop.create_task(self._return(state.key, fresh[given:]))
            self._ending.add(state.returning)
            state.returning.add_done_callback(self._ending.discard)

    async def _return(self, key: str, elements: list[bytes]) -> None:
        try:
            await self._broker.wait_reachable(_RETURN_WAIT_S, key)
            await self._broker.script(scripts.PUSH_BACK, (key,), (self._expiry_ms, *elements))
        except (BrokerUnavailable, BrokerError) as error:
            # Not tried again: it may have been carried out, and then the messages would come twice.
            self._lost_count += len(elements)
            logger.error("%d messages of %s could not return and are lost: %s", len(elements), key, error)
        else:
            self._returned_count += len(elements)
