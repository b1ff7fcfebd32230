"""One shard: the server that has a part of the keys, and the process's command connection to it.

Lives here: connecting to that one server, checking that it may be used, reconnecting, its clock, and whether it still
holds what it was given. Where the server is may change under way: a Finder knows (Sentinels, a Cluster). Does not
live here: which key is where (broker.py, broker_cluster.py), the pipeline itself (broker_connection.py), blocking
reads (blocking_reader.py).

    IDLE --connect()--> CONNECTING --> REACHABLE <--> LOST      LOST: commands fail at once, tries to reconnect go on,
      ^------- failed ------+  begin()--> LOST  any --close()--> CLOSED    1 s apart at most, until close()

Its owner is told about the two arrows between REACHABLE and LOST, and whether the server lost its data: it is
another server or another run of it (run_id, master_replid), or the generation key is missing or foreign
(FLUSHALL without a disconnect is found by the heartbeat), or its clock has jumped ahead and everything expired.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import secrets
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from channel_layer import scripts
from channel_layer.broker_connection import (
    REFUSALS,
    Argument,
    BrokerConnection,
    BrokerNotServing,
    CommandCounters,
    ServerIdentity,
    open_connection,
    parse_info,
)
from channel_layer.broker_url import BrokerAddress
from channel_layer.enums import quick
from channel_layer.errors import BrokerError, BrokerUnavailable, BrokerUnsuitable

if TYPE_CHECKING:
    from channel_layer.blocking_reader import BlockingReader

__all__ = ["HEARTBEAT_S", "BrokerShard", "BrokerState", "Finder"]

logger = logging.getLogger("trunkline.channel_layer")
# Not Python's shared generator: a program that seeds it gets the numbers that it expects, whatever threads we have.
_CHANCE: Final = random.SystemRandom()

# Tries to reconnect: the first at once, then after a random half to whole of a wait that doubles up to this. Half of
# it where somebody else becomes the master, which is to be noticed within a second.
RECONNECT_WAIT_FIRST_S: Final = 0.05
RECONNECT_WAIT_MAX_S: Final = 1.0
_RECONNECT_WAIT_MAX_FOUND_S: Final = 0.5

# How often the broker's clock and the generation key are looked at. Lost data must be noticed within 3 s, and an
# idle connection whose peer vanished without a word is found by it (after the socket timeout).
HEARTBEAT_S: Final = 2.0

# A broker that owes an answer for so long may not be the master any more: the finder is asked.
SUSPICIOUS_SILENCE_S: Final = 0.5

# BLMPOP, LPOP with a count in scripts, and effects replication of scripts that call TIME.
_VERSION_MIN: Final = (7, 0)

# A step of the broker's clock by more than this is taken for lost data: leases, registrations and lists expire.
_CLOCK_STEP_MS: Final = 1000.0

# How long a server remembers which shard it was, beyond the last heartbeat of the last process.
_POSITION_EXPIRY_MS: Final = 10_000


@quick
class BrokerState(Enum):
    IDLE = auto()
    CONNECTING = auto()
    REACHABLE = auto()
    LOST = auto()
    CLOSED = auto()


class Finder(Protocol):
    """Knows where the server of a shard is, if that may change."""

    async def find(self, shard: BrokerShard) -> None:
        """Call ``shard.relocate()`` with where it is now. Raises BrokerUnavailable, BrokerUnsuitable."""


class _Lineage:
    """Whether a broker still holds what it was given: who it is, and the value of the generation key."""

    __slots__ = ("generation", "master_replid", "run_id")

    def __init__(self, run_id: str, master_replid: str, generation: bytes | None) -> None:
        self.run_id = run_id
        self.master_replid = master_replid
        self.generation = generation  # None: the key could not be stored (out of memory)

    def continues(self, other: _Lineage) -> bool:
        return (self.run_id, self.master_replid, self.generation) == (
            other.run_id,
            other.master_replid,
            other.generation,
        )


class BrokerShard:
    """The command connection to one server, kept for ever. Commands of one tick leave in one write."""

    def __init__(
        self,
        address: BrokerAddress | None,
        *,
        name: str,
        connect_timeout_s: float,
        client_name: str,
        generation_key: str,
        changed: Callable[[BrokerShard, bool, bool], None],
        counters: CommandCounters,
        finder: Finder | None = None,
        mode: Literal["standalone", "cluster"] = "standalone",
        position: tuple[str, int, int] | None = None,
    ) -> None:
        """``address`` None: the finder says it. ``changed(shard, reachable, data_lost)`` is called at each change.

        ``generation_key`` "": no key may be touched (a Cluster's node that has no slots). ``position`` is a key, and
        which of how many shards this is: what must not differ from process to process.
        """
        self.address = address
        self._name = name  # until the address is known
        self._connect_timeout_s = connect_timeout_s
        self._client_name = client_name
        self.generation_key = generation_key
        self._changed = changed
        self._counters = counters
        self._finder = finder
        self._mode = mode
        self._position_key, self._position = "", ""
        self._announces_position = False
        if position is not None:
            self._position_key, number, count = position
            self._position = f"{number} of {count}"
            self._announces_position = count > 1  # a single one only looks
        self._loop: asyncio.AbstractEventLoop | None = None
        self.state = BrokerState.IDLE
        self.connection: BrokerConnection | None = None  # present while REACHABLE
        self.lost_reason = BrokerUnavailable(f"broker {self}: not connected")
        self._lineage: _Lineage | None = None  # of the last time it was reachable
        self._reachable_event = asyncio.Event()  # set while REACHABLE, and when CLOSED so that nobody waits on
        self._moved = asyncio.Event()  # set by relocate(): the try under way, or the wait for the next, is over
        self._reconnecting: asyncio.Task[None] | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self.readers: set[BlockingReader] = set()  # connected to this server
        # The broker's clock is in [monotonic + this], in ms; our own wall clock until it was asked.
        self._clock_offset_ms = time.time() * 1000 - time.monotonic() * 1000
        self.connect_count = 0
        self.data_lost_count = 0

    def __repr__(self) -> str:
        return f"<BrokerShard {self} {self.state.name}>"

    def __str__(self) -> str:
        return str(self.address) if self.address is not None else self._name

    @property
    def reachable(self) -> bool:
        return self.state is BrokerState.REACHABLE

    @property
    def is_suspicious(self) -> bool:
        """It does not answer, or not at once."""
        return self.connection is None or self.connection.silent_s > SUSPICIOUS_SILENCE_S

    @property
    def _is_closed(self) -> bool:
        return self.state is BrokerState.CLOSED

    @property
    def run_id(self) -> str | None:
        """The run of the server that answers commands now; None while it is not reachable."""
        connection = self.connection
        return connection.server.run_id if connection is not None and connection.server is not None else None

    # Commands

    def call(self, *args: Argument) -> asyncio.Future[Any]:
        """As Broker.call(), for commands to this server."""
        connection = self.connection
        return connection.call(args) if connection is not None else self.fail()

    def fail(self) -> asyncio.Future[Any]:
        """Return what a command gets while the server is not reachable."""
        if self._loop is None:
            raise RuntimeError(f"{self!r}: call connect() first")
        future: asyncio.Future[Any] = self._loop.create_future()
        future.set_exception(self.lost_reason)
        return future

    def look_for_lost_data(self) -> asyncio.Future[Any]:
        """Look at the generation key now, for who cannot wait for the heartbeat. Otherwise as call().

        If the broker has lost its data, the owner knows when the future is done.
        """
        call = self.call("GET", self.generation_key)
        call.add_done_callback(self._generation_answered)
        return call

    async def count_refusals(self) -> int:
        """Return how many commands of all clients the broker has refused because it takes no writes for now.

        Raises BrokerUnavailable.
        """
        errors = parse_info(await self.call("INFO", "errorstats"))
        counts = (errors.get(f"errorstat_{code}", "") for code in REFUSALS)
        return sum(int(count.removeprefix("count=")) for count in counts if count)

    def time_ms(self) -> int:
        """Return the broker's clock (TIME), in milliseconds, as estimated from this process's monotonic clock."""
        return int(time.monotonic() * 1000 + self._clock_offset_ms)

    # Outages

    async def wait_reachable(self, timeout_s: float) -> None:
        """Return when the server is reachable. Raises BrokerUnavailable after the timeout, and once closed."""
        if self.reachable:
            return
        try:
            async with asyncio.timeout(timeout_s):
                while not (self.reachable or self._is_closed):
                    await self._reachable_event.wait()
        except TimeoutError:
            raise BrokerUnavailable(str(self.lost_reason)) from None
        if self._is_closed:
            raise BrokerUnavailable(str(self.lost_reason))

    def relocate(self, address: BrokerAddress) -> None:
        """The keys of this shard are on the server at ``address`` now."""
        former = self.address
        if former is not None and former.node == address.node:
            return
        self.address = address
        if former is None:
            return
        self._moved.set()
        if self.connection is not None:
            self.connection.give_up(f"broker {former} is not the master any more, {address} is")

    # Connecting

    async def connect(self) -> None:
        """Connect for the first time. From then on it reconnects by itself until close().

        A broker that loads its data is waited for, as long as connecting may take. Raises BrokerUnavailable;
        BrokerUnsuitable, with what to change, if it must not be used. After either, connect() may be called again.
        """
        if self.state is not BrokerState.IDLE:
            raise RuntimeError(f"{self!r}: connect() is for once, before anything else")
        self._loop = asyncio.get_running_loop()
        self.state = BrokerState.CONNECTING
        deadline = self._loop.time() + self._connect_timeout_s
        try:
            while True:
                try:
                    await self._locate()
                    connection, lineage = await self._open()
                except BrokerNotServing:
                    if self._loop.time() + RECONNECT_WAIT_FIRST_S > deadline:
                        raise
                    await asyncio.sleep(RECONNECT_WAIT_FIRST_S)
                else:
                    break
            if self._is_closed:  # close() came while this waited
                await connection.disconnect(str(self.lost_reason))
                raise BrokerUnavailable(str(self.lost_reason))
            self._take(connection, lineage)
        except BaseException:
            if not self._is_closed:
                self.state = BrokerState.IDLE
            raise

    def begin(self) -> None:
        """As connect(), without waiting for it: the shard is LOST, and tries to become reachable."""
        self._loop = asyncio.get_running_loop()
        self.state = BrokerState.LOST
        self._begin_reconnecting()

    def stay_lost(self, reason: BrokerUnavailable) -> None:
        """Never be reachable: commands fail with ``reason``."""
        self._loop = asyncio.get_running_loop()
        self.state = BrokerState.LOST
        self.lost_reason = reason

    async def close(self) -> None:
        """Disconnect for good; unanswered commands fail."""
        if self._is_closed:
            return
        self.state = BrokerState.CLOSED
        self.lost_reason = BrokerUnavailable(f"broker {self}: closed by this process")
        self._stop_heartbeat()
        if self.connection is not None:
            connection, self.connection = self.connection, None
            connection.on_lost = None
            await connection.disconnect(str(self.lost_reason))
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait((self._reconnecting,))
        self._reachable_event.set()

    async def _locate(self) -> None:
        if self._finder is not None:
            try:
                await self._finder.find(self)
            except BrokerUnavailable:
                # Nobody who knows answers. Where it was is better than nowhere; a replica there is refused.
                if self.address is None:
                    raise
        self._moved.clear()

    async def _open(self) -> tuple[BrokerConnection, _Lineage]:
        """Connect, check that this broker may be used, and make it ready."""
        assert self._loop is not None
        address = self.address
        assert address is not None
        connection = await open_connection(
            address,
            client_name=self._client_name,
            loop=self._loop,
            silence_timeout_s=address.socket_timeout_s,
            counters=self._counters,
        )
        try:
            async with asyncio.timeout(address.connect_timeout_s):
                replication = await self._check(connection)
                lineage = await self._prepare(connection, replication)
        except TimeoutError as error:
            reason = f"broker {address} did not answer within {address.connect_timeout_s:g} s"
            await connection.disconnect(reason)
            raise BrokerUnavailable(reason) from error
        except BrokerError as error:
            await connection.disconnect(str(error))
            if str(error).startswith("MOVED "):
                raise BrokerNotServing(f"broker {address} does not have the keys any more: {error}") from error
            raise BrokerUnsuitable(f"broker {address} refuses a command that is needed: {error}") from error
        except BaseException as error:
            await connection.disconnect(f"connecting to broker {address} ended: {error!r}")
            raise
        return connection, lineage

    async def _check(self, connection: BrokerConnection) -> dict[str, str]:
        assert connection.server is not None
        _check_version(str(self), connection.server, self._mode)
        replication, memory = map(
            parse_info,
            # gather() also reads the errors behind the first: unread, the loop would log each with a traceback.
            await asyncio.gather(connection.call(("INFO", "replication")), connection.call(("INFO", "memory"))),
        )
        if replication.get("role") != "master":
            raise BrokerNotServing(f"broker {self} is a replica of {replication.get('master_host')}")
        # INFO, not CONFIG GET: it tells the same and needs no right to the server's configuration.
        policy = memory.get("maxmemory_policy", "unknown")
        if policy != "noeviction":
            raise BrokerUnsuitable(
                f"broker {self} has maxmemory-policy {policy}, which may delete queues and memberships: "
                "set it to noeviction (in redis.conf, or CONFIG SET maxmemory-policy noeviction)"
            )
        return replication

    async def _prepare(self, connection: BrokerConnection, replication: dict[str, str]) -> _Lineage:
        assert connection.server is not None
        loads = [connection.call(("SCRIPT", "LOAD", script.source)) for script in scripts.ALL]
        generation_key = self.generation_key
        generation_call = connection.call(("GET", generation_key)) if generation_key else None
        position_call = connection.call(("GET", self._position_key)) if self._position_key else None
        asked_at = time.monotonic()
        time_call = connection.call(("TIME",))
        # One that is refused or lost fails them all, and none of their errors stays unread.
        calls = (*loads, generation_call, position_call, time_call)
        await asyncio.gather(*(call for call in calls if call is not None))
        generation = generation_call.result() if generation_call is not None else b""
        if position_call is not None:
            self._check_position(position_call.result())
        self._read_clock(time_call.result(), asked_at, is_first=True)
        if generation is None:
            generation = await self._store_generation(connection, generation_key)
        return _Lineage(connection.server.run_id, replication.get("master_replid", ""), generation)

    def _check_position(self, present: bytes | None) -> None:
        """Refuse a server that is another shard to other processes: they would never find each other."""
        if present is not None and present != self._position.encode():
            theirs = present.decode("utf-8", "replace")
            raise BrokerUnsuitable(
                f"broker {self} is shard {self._position} here and shard {theirs} for other "
                "processes: all of them need the same URLs in the same order. (After a change, stop all and wait "
                f"{_POSITION_EXPIRY_MS // 1000} s)"
            )

    async def _store_generation(self, connection: BrokerConnection, key: str) -> bytes | None:
        value = secrets.token_hex(8).encode()
        try:
            present = await connection.call(("SET", key, value, "NX", "GET"))
        except BrokerError as error:
            if not str(error).startswith("OOM"):
                raise
            return None  # full of messages: readers must be able to connect; the heartbeat tries again
        return value if present is None else bytes(present)

    def _take(self, connection: BrokerConnection, lineage: _Lineage) -> None:
        """Use this connection from now on."""
        if connection.lost_reason is not None:
            raise connection.lost_reason
        data_lost = self._lineage is not None and not lineage.continues(self._lineage)
        is_restored = self.state is BrokerState.LOST
        self._lineage = lineage
        self.connection = connection
        connection.on_lost = self._lost
        self.state = BrokerState.REACHABLE
        self.connect_count += 1
        self._reachable_event.set()
        self._start_heartbeat()
        for reader in list(self.readers):
            reader.server_changed(lineage.run_id)
        if is_restored:
            logger.info("broker %s is reachable again%s", self, ", without its data" if data_lost else "")
            self._tell(reachable=True, data_lost=data_lost)

    def _tell(self, *, reachable: bool, data_lost: bool) -> None:
        self.data_lost_count += data_lost
        self._changed(self, reachable, data_lost)

    def _lost(self, connection: BrokerConnection) -> None:
        assert connection.lost_reason is not None
        self.connection = None
        self.lost_reason = connection.lost_reason
        self.state = BrokerState.LOST
        self._reachable_event.clear()
        self._stop_heartbeat()
        logger.warning("%s; reconnecting", connection.lost_reason)
        self._begin_reconnecting()
        self._tell(reachable=False, data_lost=False)

    def _begin_reconnecting(self) -> None:
        assert self._loop is not None
        self._reconnecting = self._loop.create_task(self._reconnect())
        self._reconnecting.add_done_callback(self._reconnecting_ended)

    async def _reconnect(self) -> None:
        wait_s = RECONNECT_WAIT_FIRST_S
        wait_max_s = RECONNECT_WAIT_MAX_S if self._finder is None else _RECONNECT_WAIT_MAX_FOUND_S
        unsuitable = ""  # said once, not at every try
        while True:
            try:
                await self._locate()
                opened = await self._open_unless_moved()
                if opened is None:
                    continue
                self._take(*opened)
            except BrokerUnavailable as error:
                self.lost_reason = error
            except BrokerUnsuitable as error:
                self.lost_reason = BrokerUnavailable(str(error))
                if str(error) != unsuitable:
                    unsuitable = str(error)
                    logger.error("%s", unsuitable)
            else:
                return
            # Jitter, because all processes lost the broker at the same instant.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s * _CHANCE.uniform(0.5, 1.0)):
                    await self._moved.wait()
            wait_s = min(wait_s * 2, wait_max_s)

    async def _open_unless_moved(self) -> tuple[BrokerConnection, _Lineage] | None:
        """As _open(); None if the shard moves meanwhile, since the server there may hang."""
        if self._finder is None:
            return await self._open()
        assert self._loop is not None
        opening = self._loop.create_task(self._open())
        moving = self._loop.create_task(self._moved.wait())
        try:
            await asyncio.wait((opening, moving), return_when=asyncio.FIRST_COMPLETED)
            return opening.result() if opening.done() else None
        finally:
            moving.cancel()
            if not opening.done():
                opening.cancel()
                await asyncio.wait((opening,))
                if not opening.cancelled() and opening.exception() is None:
                    await opening.result()[0].disconnect(f"{self!r}: the shard has moved")

    def _reconnecting_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.result()  # a mistake of ours must not end the reconnecting in silence: the loop reports it

    # Heartbeat

    def _start_heartbeat(self) -> None:
        assert self._loop is not None
        self._heartbeat = self._loop.call_later(HEARTBEAT_S, self._beat)

    def _stop_heartbeat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            self._heartbeat = None

    def _beat(self) -> None:
        connection = self.connection
        if connection is None:
            return
        asked_at = time.monotonic()
        self._start_heartbeat()
        connection.call(("TIME",)).add_done_callback(lambda call: self._time_answered(call, asked_at))
        if self.generation_key:
            self.look_for_lost_data()
        if self._announces_position:
            # Its failures are those of the connection, or of a broker without memory: others report them.
            connection.call(("SET", self._position_key, self._position, "PX", _POSITION_EXPIRY_MS)).add_done_callback(
                lambda call: call.cancelled() or call.exception()
            )

    def _time_answered(self, call: asyncio.Future[Any], asked_at: float) -> None:
        if call.exception() is not None:
            return  # the connection is lost or overloaded, which others report
        before_ms = self._clock_offset_ms
        self._read_clock(call.result(), asked_at, is_first=False)
        if self._clock_offset_ms - before_ms > _CLOCK_STEP_MS:
            # Its clock was set, or our machine was suspended: what had less time left than that has expired.
            logger.warning("the clock of broker %s is %.1f s ahead of what it was", self,
                           (self._clock_offset_ms - before_ms) / 1000)  # fmt: skip
            self._tell(reachable=True, data_lost=True)

    def _read_clock(self, reply: Sequence[bytes], asked_at: float, *, is_first: bool) -> None:
        """Take an answer to TIME, asked at ``asked_at`` and answered now, both monotonic.

        When it was asked and answered bounds what the offset can be. An offset between the bounds stays: the next
        sample is no better, and a loop that was blocked before it read the answer makes it worse.
        """
        broker_ms = int(reply[0]) * 1000 + int(reply[1]) / 1000
        least, most = broker_ms - time.monotonic() * 1000, broker_ms - asked_at * 1000
        if is_first:
            self._clock_offset_ms = (least + most) / 2
        else:
            self._clock_offset_ms = min(max(self._clock_offset_ms, least), most)

    def _generation_answered(self, call: asyncio.Future[Any]) -> None:
        lineage, connection = self._lineage, self.connection
        if call.cancelled() or call.exception() is not None or lineage is None or connection is None:
            return
        value: bytes | None = call.result()
        if value == lineage.generation and value is not None:
            return
        data_lost = lineage.generation is not None
        lineage.generation = value
        if value is None:
            # The others miss it too; whoever is first makes the new one.
            mine = secrets.token_hex(8).encode()
            connection.call(("SET", self.generation_key, mine, "NX", "GET")).add_done_callback(
                lambda call: self._generation_stored(call, lineage, mine)
            )
        if data_lost:
            logger.warning("broker %s has lost its data", self)
            self._tell(reachable=True, data_lost=True)

    def _generation_stored(self, call: asyncio.Future[Any], lineage: _Lineage, mine: bytes) -> None:
        if call.exception() is None:  # else out of memory: the next heartbeat tries again
            lineage.generation = mine if call.result() is None else call.result()


def _check_version(name: str, server: ServerIdentity, expected_mode: str) -> None:
    mode = server.mode
    if mode != expected_mode:
        hints = {
            "standalone": "name it with redis:// or rediss://",
            "cluster": "name it with redis+cluster:// (or rediss+cluster://)",
            "sentinel": "name it with redis+sentinel:// (or rediss+sentinel://) and the master's name: "
            "redis+sentinel://host:26379/master",
        }
        raise BrokerUnsuitable(f"broker {name} runs in {mode} mode: {hints.get(mode, 'it cannot be used')}")
    # Valkey says redis_version:7.2.4, the version it is compatible with, and its own besides.
    version = server.info.get("redis_version", "")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < _VERSION_MIN:
        raise BrokerUnsuitable(
            f"broker {name} is Redis {version or 'of an unknown version'}; needed is Redis 7.0 or newer, or Valkey"
        )
