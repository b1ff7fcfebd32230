"""Blocking reads of lists, each reader on a connection of its own, that lose nothing when they are cancelled.

Lives here: BLMPOP, ending it early with CLIENT UNBLOCK, returning what came too late to its place, and killing
connections that were given up, so that no ghost eats the next message. Does not live here: which keys are read
and what the elements mean (the callers), deadlines (they travel inside the elements), where the keys are (broker.py:
each pop() asks, and follows them to another server).

    DISCONNECTED --pop--> CONNECTING --> READING --answer--> IDLE --pop--> READING …
         ^                    |            |  +--cancelled--> ENDING --answer, elements pushed back--> IDLE
         +---- failed, lost --+------------+--------------------+            any --close--> CLOSED

What the broker has popped and answered on a connection that was lost before the answer arrived is lost with it:
delivery is at most once. Links repair that for connections (link.py); a normal channel does not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final

from channel_layer import scripts
from channel_layer.broker_connection import (
    BrokerConnection,
    CommandCounters,
    ServerIdentity,
    open_connection,
    pack_command,
)
from channel_layer.enums import quick
from channel_layer.errors import BrokerError, BrokerUnavailable, BrokerUnsuitable
from channel_layer.sharding import read_redirect

if TYPE_CHECKING:
    from channel_layer.broker import Broker
    from channel_layer.broker_shard import BrokerShard
    from channel_layer.broker_url import BrokerAddress

__all__ = ["BlockingReader", "BlockingReaderStatistics", "ReaderState"]

logger = logging.getLogger("trunkline.channel_layer")

# How long one BLMPOP waits at the broker. Also the longest that a ghost could, where it cannot be killed.
BLOCK_S: Final = 2.0

# How long pop() waits for the command connection before it says that the broker is unavailable, and so the longest
# time between two tries to connect.
RECONNECT_WAIT_S: Final = 1.0

# Where connecting works and reading does not (a name that leads to a replica now and then), the second and later
# tries wait, this doubled each time and RECONNECT_WAIT_S at most.
RETRY_WAIT_FIRST_S: Final = 0.025

# CLIENT UNBLOCK finds nobody blocked while the BLMPOP is still on its way: ask again after this long. Ends after
# BLOCK_S at the latest, because then the read ends by itself.
UNBLOCK_AGAIN_S: Final = 0.01

# While keys are on their way from one node of a Cluster to another, no blocking read of two of them is allowed, and
# none sees what arrives at the other node: they are looked at so often, for so long, then reading is tried again.
_MOVING_LOOK_S: Final = 0.05
_MOVING_S: Final = 1.0

# Least time a list lives after elements were returned to it (push_back.lua); nobody reads it longer without a push.
PUSH_BACK_EXPIRY_MS: Final = 60_000


@quick
class ReaderState(Enum):
    DISCONNECTED = auto()
    CONNECTING = auto()
    IDLE = auto()
    READING = auto()
    ENDING = auto()  # a cancelled read waits for its answer
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class BlockingReaderStatistics:
    state: ReaderState
    pop_count: int
    element_count: int
    cancelled_count: int
    pushed_back_count: int  # elements
    lost_count: int  # elements that came after a cancelled read and could not be returned
    restored_count: int
    killed_ghost_count: int


class _Read:
    """Takes the answer to one BLMPOP, also when the task that waited for it is gone."""

    __slots__ = ("error", "is_answered", "reply", "waiter")

    def __init__(self, waiter: asyncio.Future[None]) -> None:
        self.is_answered = False
        self.reply: Any = None
        self.error: Exception | None = None
        self.waiter = waiter

    async def wait(self, timeout_s: float | None) -> None:
        """Return when the answer is there, or after the timeout."""
        if not self.is_answered:
            self.waiter = asyncio.get_running_loop().create_future()
            await asyncio.wait((self.waiter,), timeout=timeout_s)

    def done(self) -> bool:
        return False  # the answer is wanted in any case

    def set_result(self, result: Any, /) -> None:
        self.reply = result
        self._wake()

    def set_exception(self, exception: Exception, /) -> None:
        self.error = exception
        self._wake()

    def _wake(self) -> None:
        self.is_answered = True
        if not self.waiter.done():
            self.waiter.set_result(None)


class BlockingReader:
    """Pops elements from lists, waiting for them. Made by Broker.open_reader(); one pop() at a time."""

    def __init__(self, broker: Broker, *, client_name: str) -> None:
        self._broker = broker
        self._shard: BrokerShard | None = None  # of the present connection, or of the last one
        self._client_name = client_name
        self._counters = CommandCounters()
        self._state = ReaderState.DISCONNECTED
        self._connection: BrokerConnection | None = None
        # Whose read was never answered. It may still be blocked at the broker and would eat the next message.
        self._ghost: tuple[BrokerShard, ServerIdentity] | None = None
        self._moving_until = float("-inf")  # loop time; see _MOVING_S
        self._is_popping = False
        self._opening: asyncio.Task[BrokerConnection] | None = None  # runs on when its pop() is cancelled
        self._opening_to: BrokerAddress | None = None  # None while it waits for the command connection
        self._ending: asyncio.Task[None] | None = None  # runs on when a cancelled pop() is cancelled again
        self._closing: asyncio.Future[None] | None = None  # set by close() while a pop() runs; pop() resolves it
        self._read: _Read | None = None  # the one outstanding read
        self._was_connected = False
        self._fruitless_count = 0  # connections in a row that answered nothing: tries to connect are spaced by it
        self.restored_count = 0  # grows with each reconnect: what was on its way then may be lost
        self._pop_count = 0
        self._element_count = 0
        self._cancelled_count = 0
        self._pushed_back_count = 0
        self._lost_count = 0
        self._killed_ghost_count = 0

    def __repr__(self) -> str:
        return f"<BlockingReader {self._client_name} {self._state.name}>"

    def statistics(self) -> BlockingReaderStatistics:
        return BlockingReaderStatistics(
            state=self._state,
            pop_count=self._pop_count,
            element_count=self._element_count,
            cancelled_count=self._cancelled_count,
            pushed_back_count=self._pushed_back_count,
            lost_count=self._lost_count,
            restored_count=self.restored_count,
            killed_ghost_count=self._killed_ghost_count,
        )

    async def pop(self, keys: Sequence[str], count: int) -> tuple[str, list[bytes]] | None:
        """Wait up to 2 s for elements of the first of ``keys`` that has any; take ``count`` at most.

        None means that nothing came. Raises BrokerUnavailable when the connection is or gets lost; the next call
        reconnects, and waits up to 1 s for that. Cancelling ends the read at the broker and returns what came
        meanwhile to the head of its list, in order, before CancelledError is raised.
        """
        if self._is_popping:
            raise RuntimeError(f"{self!r}: pop() is already running")
        self._is_popping = True
        try:
            return await self._pop(keys, count)
        finally:
            self._is_popping = False

    async def _pop(self, keys: Sequence[str], count: int) -> tuple[str, list[bytes]] | None:
        if self._ending is not None:
            await asyncio.shield(self._ending)
        loop = asyncio.get_running_loop()
        shard = self._broker.shard_of(keys[0])
        if loop.time() < self._moving_until and self._state is not ReaderState.CLOSED:
            return await self._pop_moving(keys, count)
        connection = self._connection
        if shard is not self._shard:
            self._leave_shard(shard)
            connection = None
        if connection is None or connection.lost_reason is not None:
            connection = await self._connected(shard)
        read = self._read = _Read(loop.create_future())
        self._state = ReaderState.READING
        self._pop_count += 1
        connection.send(
            pack_command(("BLMPOP", f"{BLOCK_S:g}", len(keys), *keys, "LEFT", "COUNT", count)),
            read,
        )
        try:
            await read.waiter
        except asyncio.CancelledError:
            self._cancelled_count += 1
            await self._end(connection, read)
            raise
        if self._closing is not None:
            await self._end(connection, read)
            raise BrokerUnavailable(f"{self!r} was closed")
        self._read = None
        self._state = ReaderState.IDLE
        if read.error is not None:
            if connection.lost_reason is not None:
                self._lost(connection)
            elif self._broker.is_cluster and isinstance(read.error, BrokerError):
                await self._follow(shard, read.error)
            raise read.error
        self._fruitless_count = 0
        if read.reply is None:
            return None
        key, elements = read.reply
        self._element_count += len(elements)
        return key.decode(), elements

    async def _follow(self, shard: BrokerShard, error: BrokerError) -> None:
        """Do what an error means that says where the keys are instead; raises BrokerUnavailable then."""
        assert shard.address is not None
        redirect = read_redirect(str(error), shard.address.node)
        if redirect is None:
            return
        if redirect.kind == "MOVED":
            await self._broker.look_again(redirect.node)
        else:
            self._moving_until = asyncio.get_running_loop().time() + _MOVING_S
        raise BrokerUnavailable(f"{self!r}: the keys are not at {shard}: {error}") from error

    async def _pop_moving(self, keys: Sequence[str], count: int) -> tuple[str, list[bytes]] | None:
        """Pop without blocking, through the command connections, which follow each key."""
        for key in keys:
            call = self._broker.call("LPOP", key, count)
            try:
                elements = await asyncio.shield(call)
            except asyncio.CancelledError:
                self._cancelled_count += 1
                self._ending = asyncio.get_running_loop().create_task(self._undo_pop(key, call))
                await asyncio.shield(self._ending)
                raise
            if elements:
                self._element_count += len(elements)
                return key, elements
        await asyncio.sleep(_MOVING_LOOK_S)
        return None

    async def _undo_pop(self, key: str, call: asyncio.Future[list[bytes] | None]) -> None:
        try:
            elements = await call
            if elements:
                await self._push_back(key.encode(), elements)
        except (BrokerUnavailable, BrokerError):
            pass  # what it may have taken is lost, as with any answer that does not come
        finally:
            self._ending = None

    def server_changed(self, run_id: str) -> None:
        """Called by the shard: from now on its keys are at the server with this ``run_id``.

        A read at another one is over, although that one may not know: it hangs, or was the master before.
        """
        shard = self._shard
        if self._opening is not None and shard is not None and self._opening_to not in (None, shard.address):
            self._opening.cancel()  # it may hang, too
        connection = self._connection
        if connection is not None and connection.server is not None and connection.server.run_id != run_id:
            connection.give_up(f"{self!r}: another server is the master now")

    def _leave_shard(self, shard: BrokerShard) -> None:
        """The keys are at another shard than the connection."""
        if self._connection is not None:
            self._connection.give_up(f"{self!r}: the keys have moved to {shard}")
            self._connection = None
            self._state = ReaderState.DISCONNECTED
        if self._shard is not None:
            self._shard.readers.discard(self)
        self._shard = shard
        shard.readers.add(self)

    async def close(self) -> None:
        """Disconnect. A running pop() is ended as if cancelled and raises BrokerUnavailable."""
        if self._state is ReaderState.CLOSED:
            return
        read = self._read
        if self._state is ReaderState.READING and read is not None:
            self._closing = asyncio.get_running_loop().create_future()
            if not read.waiter.done():
                read.waiter.set_result(None)
            await self._closing
        elif self._ending is not None:
            await asyncio.shield(self._ending)
        self._state = ReaderState.CLOSED
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait((self._opening,))
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.disconnect(f"{self!r}")
        if self._shard is not None:
            self._shard.readers.discard(self)
        self._broker.forget_reader(self)

    # Connecting

    async def _connected(self, shard: BrokerShard) -> BrokerConnection:
        if self._state is ReaderState.CLOSED:
            raise BrokerUnavailable(f"{self!r}")
        opening = self._opening
        if opening is None:
            self._state = ReaderState.CONNECTING
            opening = self._opening = asyncio.get_running_loop().create_task(self._open(shard))
            opening.add_done_callback(self._opened)
        # wait() leaves the task running when this pop() is cancelled: a caller with a timeout shorter than connecting
        # takes would never get connected.
        await asyncio.wait((opening,))
        if opening.cancelled():
            raise BrokerUnavailable(f"{self!r}")
        return opening.result()

    def _opened(self, opening: asyncio.Task[BrokerConnection]) -> None:
        self._opening = self._opening_to = None
        # exception() also marks it as seen: the pop() that started this may be gone, and the next one tries again.
        failed = opening.cancelled() or opening.exception() is not None
        if self._state is ReaderState.CONNECTING:
            self._state = ReaderState.DISCONNECTED if failed else ReaderState.IDLE

    async def _open(self, shard: BrokerShard) -> BrokerConnection:
        if self._fruitless_count > 1:
            await asyncio.sleep(min(RECONNECT_WAIT_S, RETRY_WAIT_FIRST_S * 2 ** min(self._fruitless_count, 10)))
        self._fruitless_count += 1
        # First the command connection: it has the checks, it paces the tries, and it kills the ghost.
        await shard.wait_reachable(RECONNECT_WAIT_S)
        address = self._opening_to = shard.address
        assert address is not None
        try:
            connection = await open_connection(
                address,
                client_name=self._client_name,
                loop=asyncio.get_running_loop(),
                silence_timeout_s=BLOCK_S + address.socket_timeout_s,
                counters=self._counters,
            )
        except BrokerUnsuitable as error:
            # The same broker passed the command connection's checks; that one reports it, should it stay so.
            raise BrokerUnavailable(str(error)) from error
        try:
            await self._kill_ghost()
            if shard is not self._shard or address is not shard.address:
                raise BrokerUnavailable(f"{self!r}: the keys have moved to {self._shard}")
            if connection.lost_reason is not None:
                raise connection.lost_reason
        except BaseException:
            await connection.disconnect(f"{self!r}: connecting ended")
            raise
        if self._was_connected:
            self.restored_count += 1
        self._was_connected = True
        self._connection = connection
        return connection

    async def _kill_ghost(self) -> None:
        if self._ghost is None:
            return
        shard, ghost = self._ghost
        # After a restart of the broker there is no ghost, and its number may be somebody else's.
        if ghost.run_id == shard.run_id:
            try:
                self._killed_ghost_count += await shard.call("CLIENT", "KILL", "ID", ghost.client_id)
            except BrokerError as error:
                # The broker's user lacks the right. Reading on beats being right: the ghost's read ends by itself.
                logger.error("%r: a read that was given up cannot be ended (%s); waiting for its end", self, error)
                await asyncio.sleep(BLOCK_S)
        self._ghost = None

    def _lost(self, connection: BrokerConnection) -> None:
        if self._shard is not None and connection.server is not None:
            self._ghost = self._shard, connection.server
        self._connection = None
        self._state = ReaderState.DISCONNECTED

    # Ending a read

    async def _end(self, connection: BrokerConnection, read: _Read) -> None:
        self._state = ReaderState.ENDING
        self._ending = asyncio.get_running_loop().create_task(self._end_read(connection, read))
        await asyncio.shield(self._ending)

    async def _end_read(self, connection: BrokerConnection, read: _Read) -> None:
        try:
            await self._unblock(connection, read)
            if read.error is None and read.reply is not None:
                await self._push_back(*read.reply)
        finally:
            self._read = None
            self._ending = None
            if connection.lost_reason is not None or not read.is_answered:
                connection.give_up(f"{self!r}: a cancelled read was not answered")
                self._lost(connection)
            else:
                self._fruitless_count = 0
                self._state = ReaderState.IDLE
            if self._closing is not None and not self._closing.done():
                self._closing.set_result(None)

    async def _unblock(self, connection: BrokerConnection, read: _Read) -> None:
        """Wait for the answer to ``read``, and see that it comes now."""
        server, shard = connection.server, self._shard
        assert server is not None
        assert shard is not None
        while not read.is_answered:
            if server.run_id != shard.run_id:
                return  # the broker's number of this client means nothing to the one that answers commands now
            try:
                unblocked = await shard.call("CLIENT", "UNBLOCK", server.client_id)
            except (BrokerUnavailable, BrokerError) as error:
                logger.warning("%r: cannot end a read: %s", self, error)
                return
            # 1: the answer is on its way, and the silence timeout watches it. 0: not blocked yet, or just answered.
            await read.wait(None if unblocked else UNBLOCK_AGAIN_S)

    async def _push_back(self, key: bytes, elements: list[bytes]) -> None:
        try:
            await self._broker.wait_reachable(RECONNECT_WAIT_S, key.decode())
            await self._broker.script(scripts.PUSH_BACK, (key.decode(),), (PUSH_BACK_EXPIRY_MS, *elements))
        except (BrokerUnavailable, BrokerError) as error:
            # Not tried again: it may have been carried out, and then the messages would come twice.
            self._lost_count += len(elements)
            logger.error("%d messages of %s were lost: a cancelled read could not return them: %s",
                         len(elements), key.decode(), error)  # fmt: skip
        else:
            self._pushed_back_count += len(elements)
