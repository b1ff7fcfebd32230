"""The two ends of a process's inbox: writing into lists of the broker in batches, and reading our own.

    ListWriter    what one loop tick (and, under load, one round trip) has for a list leaves in one script call
    InboxReader   one task that reads both lists of our inbox, ``link`` and ``mail``, and hands on what came

Lives here: batching, and surviving whatever the broker or an element does. Does not live here: what elements mean
(links.py, mail.py, process_layer.py) and what normal channels need besides (normal_channels.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from channel_layer import scripts
from channel_layer.base import Stored
from channel_layer.broker import BlockingReader, Broker
from channel_layer.broker_connection import WritesRefused
from channel_layer.channels_compat import channel_full
from channel_layer.encryption import Cipher
from channel_layer.errors import BrokerUnavailable

__all__ = ["InboxReader", "InboxStatistics", "ListWriter", "WriterStatistics"]

logger = logging.getLogger("trunkline.channel_layer")

# One script call carries at most this much: Redis runs nothing else meanwhile. Further messages go with the next.
_BATCH_MESSAGES_MAX: Final = 500
_BATCH_BYTES_MAX: Final = 1024 * 1024
# Elements that one read of the inbox takes: what a loop handles in a few milliseconds.
_READ_COUNT: Final = 64
# Elements are handled so long before the others on this loop have a turn: a read may bring 4 MiB, or thousands of
# frames of a flood, and what a client sends would wait for all of them. The rest of the read follows then.
_READ_SLICE_S: Final = 0.001
# After an error that is not the broker's absence (which has a pause of its own), so that a lasting one is not a
# busy loop.
_PAUSE_AFTER_ERROR_S: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterStatistics:
    waiting: int  # messages not yet written
    batch_count: int
    stored_count: int
    full_count: int  # messages the broker had no room for
    failed_count: int  # messages that the broker did not answer for


class _Entry:
    """One message on its way into a list."""

    __slots__ = ("capacity", "expiry_ms", "future", "message")

    def __init__(self, message: bytes, capacity: int, expiry_ms: int, future: asyncio.Future[Any] | None) -> None:
        self.message = message
        self.capacity = capacity
        self.expiry_ms = expiry_ms
        # Told the deadline of the stored message, or why it was not stored. None: nobody wants to know.
        self.future: asyncio.Future[Any] | None = future

    def stored(self, deadline_ms: int) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_result(deadline_ms)

    def full(self) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_result(-1)

    def failed(self, error: Exception) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_exception(error)


class _ElementEntry(_Entry):
    """One that is told the element as it stands in the list. Implements base.Stored: each request has one, and a
    future would take two turns of the loop to say what is known.
    """

    __slots__ = ("_callback", "_error", "_loop", "_result", "name")

    def __init__(
        self, message: bytes, capacity: int, expiry_ms: int, name: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        # As _Entry does; one call less for each request.
        self.message = message
        self.capacity = capacity
        self.expiry_ms = expiry_ms
        self.future = None
        self.name = name
        self._loop = loop
        self._callback: Callable[[Any], object] | None = None
        self._result: bytes | None = None
        self._error: Exception | None = None

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        if self._result is None and self._error is None:
            self._callback = callback
        else:
            self._loop.call_soon(callback, self)

    def __await__(self) -> Generator[Any, None, bytes]:
        told = self._loop.create_future()
        self.add_done_callback(lambda entry: None if told.done() else told.set_result(None))
        yield from told
        return self.result()

    def cancelled(self) -> bool:
        return False

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> bytes:
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def stored(self, deadline_ms: int) -> None:
        self._result = deadline_ms.to_bytes(8, "big") + self.message
        self._tell()

    def full(self) -> None:
        self.failed(_full(self.name, self.capacity))

    def failed(self, error: Exception) -> None:
        self._error = error
        self._tell()

    def _tell(self) -> None:
        if self._callback is not None:
            try:
                self._callback(self)
            except Exception:
                # The others of its batch have their own answers to get.
                logger.exception("the answer to a push into %s could not be handled", self.name)


class _List:
    """What waits for one list. Exists while something waits or is unanswered."""

    __slots__ = ("busy", "entries", "key")

    def __init__(self, key: str) -> None:
        self.key = key
        self.entries: deque[_Entry] = deque()
        # A batch is scheduled for the end of the tick, or written and unanswered: the next one waits for it, so
        # batches grow under load and leave at once when there is none.
        self.busy = False


class ListWriter:
    """Appends to lists through push.lua, one outstanding call a list. What it appends is encrypted by ``cipher``."""

    def __init__(self, broker: Broker, loop: asyncio.AbstractEventLoop, cipher: Cipher | None = None) -> None:
        self._broker = broker
        self._loop = loop
        self._cipher = cipher if cipher is not None and cipher.is_encrypting else None
        self._lists: dict[str, _List] = {}
        self._batch_count = 0
        self._stored_count = 0
        self._full_count = 0
        self._failed_count = 0

    def __repr__(self) -> str:
        return f"<ListWriter lists={len(self._lists)}>"

    def statistics(self) -> WriterStatistics:
        return WriterStatistics(
            waiting=sum(len(each.entries) for each in self._lists.values()),
            batch_count=self._batch_count,
            stored_count=self._stored_count,
            full_count=self._full_count,
            failed_count=self._failed_count,
        )

    async def store(self, key: str, message: bytes, *, capacity: int, expiry_ms: int, name: str) -> int:
        """Append a message; return its deadline (broker time, ms) when the broker has it.

        ``name`` is for the text of ChannelFull. Raises ChannelFull, BrokerUnavailable. A call that is cancelled
        before its batch left has sent nothing.
        """
        future = self.push(key, message, capacity=capacity, expiry_ms=expiry_ms)
        deadline_ms = await future
        if deadline_ms < 0:
            raise _full(name, capacity)
        return deadline_ms

    def push(self, key: str, message: bytes, *, capacity: int, expiry_ms: int) -> asyncio.Future[int]:
        """As ``store``; the future's result is -1 when the list is full."""
        future: asyncio.Future[int] = self._loop.create_future()
        self._add(key, _Entry(message, capacity, expiry_ms, future))
        return future

    def push_element(self, key: str, message: bytes, *, capacity: int, expiry_ms: int, name: str) -> Stored:
        """As ``store``, without a coroutine; the result is the element as it stands in the list."""
        entry = _ElementEntry(message, capacity, expiry_ms, name, self._loop)
        self._add(key, entry)
        return entry

    def push_unasked(self, key: str, message: bytes, *, capacity: int, expiry_ms: int) -> None:
        """As ``push`` for a message whose loss is only counted (a letter somebody else asked for)."""
        self._add(key, _Entry(message, capacity, expiry_ms, None))

    def _add(self, key: str, entry: _Entry) -> None:
        target = self._lists.get(key)
        if target is None:
            target = self._lists[key] = _List(key)
        elif 0 <= entry.capacity <= len(target.entries):
            # More than the list can hold waits already: the broker would refuse this one.
            self._settle_full(entry)
            return
        if self._cipher is not None:
            entry.message = self._cipher.seal(entry.message)
        target.entries.append(entry)
        if not target.busy:
            target.busy = True
            self._loop.call_soon(self._write_at_once, target)

    def _write_at_once(self, target: _List) -> None:
        self._write(target)
        self._broker.flush()

    def _write(self, target: _List) -> None:
        """Write the next batch: the first entries that have capacity and expiry in common."""
        entries = target.entries
        batch: list[_Entry] = []
        batch_bytes = 0
        while entries and len(batch) < _BATCH_MESSAGES_MAX and batch_bytes < _BATCH_BYTES_MAX:
            entry = entries[0]
            if entry.future is not None and entry.future.done():
                entries.popleft()  # its caller was cancelled before it was written
                continue
            if batch and (entry.capacity != batch[0].capacity or entry.expiry_ms != batch[0].expiry_ms):
                break
            batch.append(entries.popleft())
            batch_bytes += len(entry.message)
        if not batch:
            del self._lists[target.key]
            return
        self._batch_count += 1
        head = batch[0]
        answer = self._broker.script(
            scripts.PUSH, [target.key], [head.capacity, head.expiry_ms, *[entry.message for entry in batch]]
        )
        answer.add_done_callback(lambda future: self._answered(target, batch, future))

    def _answered(self, target: _List, batch: list[_Entry], answer: asyncio.Future[Any]) -> None:
        error = asyncio.CancelledError() if answer.cancelled() else answer.exception()
        if error is None:
            stored, deadline_ms = answer.result()
            self._stored_count += stored
            for index, entry in enumerate(batch):
                if index >= stored:
                    self._settle_full(entry)
                else:
                    entry.stored(deadline_ms)
        else:
            self._failed_count += len(batch)
            failure = error if isinstance(error, Exception) else BrokerUnavailable("the broker connection was closed")
            for entry in batch:
                entry.failed(failure)
        if target.entries:
            self._write(target)
        else:
            del self._lists[target.key]

    def _settle_full(self, entry: _Entry) -> None:
        self._full_count += 1
        entry.full()


def _full(name: str, capacity: int) -> Exception:
    return channel_full(f"channel {name!r} holds {capacity} messages, as many as its capacity allows")


@dataclass(frozen=True, slots=True, kw_only=True)
class InboxStatistics:
    read_count: int  # reads that brought something
    blob_count: int
    letter_count: int
    error_count: int


class InboxReader:
    """Reads our own inbox for ever, in one task. Nothing it calls may wait for a socket or an application.

    The owner may ``hold`` it, but only for work that is our own loop's to do, never for somebody else.
    """

    def __init__(
        self,
        reader: BlockingReader,
        *,
        link_key: str,
        mail_key: str,
        blob_received: Callable[[bytes], None],
        letter_received: Callable[[bytes], None],
        reader_restored: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reader = reader
        # The first key that holds something is read, so the order alternates or one would starve the other.
        self._orders = ((link_key, mail_key), (mail_key, link_key))
        self._link_key = link_key
        self._blob_received = blob_received
        self._letter_received = letter_received
        self._reader_restored = reader_restored
        self._clock = clock
        # False while the last read of ``link`` was a full one, so that more is likely to wait, or is not all handled,
        # or nothing is read (see liveness.py). True again as soon as a read shows that ``link`` is empty.
        self.is_current = True
        self._task: asyncio.Task[None] | None = None
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._read_count = 0
        self._blob_count = 0
        self._letter_count = 0
        self._error_count = 0

    def __repr__(self) -> str:
        return f"<InboxReader {self.statistics()}>"

    def statistics(self) -> InboxStatistics:
        return InboxStatistics(
            read_count=self._read_count,
            blob_count=self._blob_count,
            letter_count=self._letter_count,
            error_count=self._error_count,
        )

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._read())

    def hold(self, held: bool) -> None:
        """Read nothing more while ``held``: this process has more to do than it gets done. What comes waits in the
        broker, bounded by the windows of the links and the capacity of the mail.
        """
        if held:
            self._may_read.clear()
            self.is_current = False
        else:
            self._may_read.set()

    async def stop(self) -> None:
        """End the read; what it had taken when it was ended is back in the list."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._reader.close()

    async def _read(self) -> None:
        restored_count = self._reader.restored_count
        turn = 0
        failures = 0  # in a row
        while True:
            await self._may_read.wait()
            keys = self._orders[turn & 1]
            try:
                taken = await self._reader.pop(keys, _READ_COUNT)
            except BrokerUnavailable:
                # The next pop() reconnects and waits for the broker; but if commands pass and only reads fail (no
                # more clients allowed), it fails at once.
                failures += 1
                if failures > 1:
                    await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
                continue
            except WritesRefused as error:
                failures += 1
                if failures == 1:
                    logger.error("the inbox cannot be read for now, trying again: %s", error)
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
                continue
            except Exception:
                self._error_count += 1
                logger.exception("the inbox could not be read; trying again")
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
                continue
            if self._reader.restored_count != restored_count:
                # What the old connection had taken may be lost: each link tells its peer what it has.
                restored_count = self._reader.restored_count
                self._guarded(self._reader_restored)
            failures = 0
            turn += 1
            if taken is None:
                self.is_current = self._may_read.is_set()
                continue
            self._read_count += 1
            key, elements = taken
            if key == self._link_key:
                self._blob_count += len(elements)
                self.is_current = len(elements) < _READ_COUNT and self._may_read.is_set()
                await self._handle(self._blob_received, elements)
            else:
                if keys[0] == self._link_key:
                    # The first key that holds something is read: ``link`` held nothing. A process that gets mail each
                    # second, as from its own probes, may see no other sign of that.
                    self.is_current = self._may_read.is_set()
                self._letter_count += len(elements)
                await self._handle(self._letter_received, elements)

    async def _handle(self, call: Callable[[bytes], None], elements: Sequence[bytes]) -> None:
        """Handle what was read, all of it also if this is cancelled: nobody else has these elements."""
        clock = self._clock
        until = clock() + _READ_SLICE_S
        cancelled: asyncio.CancelledError | None = None
        for element in elements:
            if cancelled is None and clock() >= until:
                # What is in our hands speaks for its senders, and was not heard yet.
                was_current, self.is_current = self.is_current, False
                try:
                    await asyncio.sleep(0)
                except asyncio.CancelledError as error:
                    cancelled = error
                self.is_current = was_current and self._may_read.is_set()
                until = clock() + _READ_SLICE_S
            self._guarded(call, element)
        if cancelled is not None:
            raise cancelled

    def _guarded(self, call: Callable[..., None], *arguments: bytes) -> None:
        # One bad element, or a fault of ours, must not end the reader: everybody's events come through it.
        try:
            call(*arguments)
        except Exception:
            self._error_count += 1
            logger.exception("an element of the inbox could not be handled and was dropped")
