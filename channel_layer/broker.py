"""The process's connection to the broker: commands, reconnecting, and what the rest must know about outages.

Every command of the channel layer goes through here or through a BlockingReader, so that another topology
(Sentinel, Cluster) or a faster client changes this module and broker_connection.py only. Does not live here: the
pipeline itself (broker_connection.py), blocking reads (blocking_reader.py), URLs (broker_url.py).

    IDLE --connect()--> CONNECTING --> REACHABLE <--> LOST      LOST: commands fail at once, tries to reconnect go on,
      ^------- failed ------+              any --close()--> CLOSED    1 s apart at most, until close()

``subscribe()`` tells about the two arrows between REACHABLE and LOST, and whether the broker lost its data: it is
another server or another run of it (run_id, master_replid), or the generation key is missing or foreign
(FLUSHALL without a disconnect is found by the heartbeat), or its clock has jumped ahead and everything expired.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final

from channel_layer import scripts
from channel_layer.blocking_reader import BlockingReader
from channel_layer.broker_connection import (
    REFUSALS,
    Argument,
    BrokerConnection,
    BrokerNotServing,
    CommandCounters,
    open_connection,
    parse_info,
)
from channel_layer.broker_url import parse_broker_url
from channel_layer.enums import quick
from channel_layer.errors import BrokerError, BrokerUnavailable, BrokerUnsuitable
from channel_layer.scripts import Script

__all__ = ["BlockingReader", "Broker", "BrokerChange", "BrokerState", "BrokerStatistics"]

logger = logging.getLogger("trunkline.channel_layer")

# Tries to reconnect: the first at once, then after a random half to whole of a wait that doubles up to this.
RECONNECT_WAIT_FIRST_S: Final = 0.05
RECONNECT_WAIT_MAX_S: Final = 1.0

# How often the broker's clock and the generation key are looked at. Lost data must be noticed within 3 s, and an
# idle connection whose peer vanished without a word is found by it (after the socket timeout).
HEARTBEAT_S: Final = 2.0

# BLMPOP, LPOP with a count in scripts, and effects replication of scripts that call TIME.
_VERSION_MIN: Final = (7, 0)

# A step of the broker's clock by more than this is taken for lost data: leases, registrations and lists expire.
_CLOCK_STEP_MS: Final = 1000.0

_CLIENT_NAME = re.compile(r"[!-~]+")  # what CLIENT SETNAME takes


@quick
class BrokerState(Enum):
    IDLE = auto()
    CONNECTING = auto()
    REACHABLE = auto()
    LOST = auto()
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class BrokerChange:
    """The broker went away, came back, or lost its data while it was reachable."""

    reachable: bool
    data_lost: bool


@dataclass(frozen=True, slots=True)
class BrokerStatistics:
    state: BrokerState
    connect_count: int
    data_lost_count: int
    reader_count: int
    unanswered_count: int
    command_count: int
    overloaded_count: int
    noscript_count: int
    written_bytes: int
    received_bytes: int


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


class Broker:
    """One per process and loop. Commands from one loop tick leave in one write; answers come in order."""

    def __init__(
        self,
        url: str,
        *,
        client_name: str,
        generation_key: str = "trunkline:generation",
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """``client_name`` is what CLIENT LIST shows. Raises ValueError for a bad URL."""
        if not _CLIENT_NAME.fullmatch(client_name):
            raise ValueError(f"client name {client_name!r} is not printable ASCII without spaces")
        self.url = url
        self._address = parse_broker_url(url)
        self._client_name = client_name
        self._generation_key = generation_key
        self._loop = loop  # else the one that runs connect()
        self._state = BrokerState.IDLE
        self._connection: BrokerConnection | None = None  # present while REACHABLE
        self._lost_reason = BrokerUnavailable(f"broker {self._address}: not connected")
        self._lineage: _Lineage | None = None  # of the last time it was reachable
        self._reachable_event = asyncio.Event()  # set while REACHABLE, and when CLOSED so that nobody waits on
        self._reconnecting: asyncio.Task[None] | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self._listeners: list[Callable[[BrokerChange], None]] = []
        self._readers: set[BlockingReader] = set()  # open ones, to close them
        # The broker's clock is in [monotonic + this], in ms; our own wall clock until it was asked.
        self._clock_offset_ms = time.time() * 1000 - time.monotonic() * 1000
        self._counters = CommandCounters()
        self._connect_count = 0
        self._data_lost_count = 0

    def __repr__(self) -> str:
        return f"<Broker {self._address} {self._state.name}>"

    @property
    def reachable(self) -> bool:
        return self._state is BrokerState.REACHABLE

    @property
    def _is_closed(self) -> bool:
        return self._state is BrokerState.CLOSED

    @property
    def run_id(self) -> str | None:
        """The run of the server that answers commands now; None while it is not reachable."""
        connection = self._connection
        return connection.server.run_id if connection is not None and connection.server is not None else None

    def statistics(self) -> BrokerStatistics:
        counters = self._counters
        return BrokerStatistics(
            state=self._state,
            connect_count=self._connect_count,
            data_lost_count=self._data_lost_count,
            reader_count=len(self._readers),
            unanswered_count=self._connection.unanswered_count if self._connection is not None else 0,
            command_count=counters.command_count,
            overloaded_count=counters.overloaded_count,
            noscript_count=counters.noscript_count,
            written_bytes=counters.written_bytes,
            received_bytes=counters.received_bytes,
        )

    # Commands

    def call(self, *args: Argument) -> asyncio.Future[Any]:
        """Send a command with the others of this tick; the future gets the answer, strings as bytes.

        It fails with BrokerUnavailable at once while the broker is not reachable or the connection is overloaded,
        and when the connection is lost before the answer: then the command may have been carried out. Nothing is
        ever sent twice. BrokerError if the broker refuses the command.
        """
        connection = self._connection
        return connection.call(args) if connection is not None else self._fail()

    def script(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> asyncio.Future[Any]:
        """Run a script of the package ``scripts``; else as call()."""
        connection = self._connection
        return connection.script(script, keys, args) if connection is not None else self._fail()

    def transaction(self, *commands: Sequence[Argument]) -> asyncio.Future[list[Any]]:
        """Run commands as one transaction; the future gets the list of their answers. Else as call().

        If a command fails when it runs, so does the future, and the other commands have been carried out.
        """
        connection = self._connection
        return connection.transaction(commands) if connection is not None else self._fail()

    def flush(self) -> None:
        """Write now what was to be written at the end of the tick: for who knows that it ends here."""
        if self._connection is not None:
            self._connection.flush()

    def _fail(self) -> asyncio.Future[Any]:
        if self._loop is None:
            raise RuntimeError(f"{self!r}: call connect() first")
        future: asyncio.Future[Any] = self._loop.create_future()
        future.set_exception(self._lost_reason)
        return future

    def look_for_lost_data(self) -> asyncio.Future[Any]:
        """Look at the generation key now, for who cannot wait for the heartbeat. Otherwise as call().

        If the broker has lost its data, the subscribers know when the future is done.
        """
        call = self.call("GET", self._generation_key)
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

    def open_reader(self) -> BlockingReader:
        """Return a new reader; it connects at its first pop(). Close it before the broker, or with it."""
        reader = BlockingReader(self, address=self._address, client_name=f"{self._client_name}:reader")
        self._readers.add(reader)
        return reader

    def forget_reader(self, reader: BlockingReader) -> None:
        """Called by a reader that was closed."""
        self._readers.discard(reader)

    # Outages

    def subscribe(self, on_change: Callable[[BrokerChange], None]) -> None:
        """Have ``on_change`` called at each change from now on, on the loop; it must not raise."""
        self._listeners.append(on_change)

    async def wait_reachable(self, timeout_s: float) -> None:
        """Return when the broker is reachable. Raises BrokerUnavailable after the timeout, and once closed."""
        if self.reachable:
            return
        try:
            async with asyncio.timeout(timeout_s):
                while not (self.reachable or self._is_closed):
                    await self._reachable_event.wait()
        except TimeoutError:
            raise BrokerUnavailable(str(self._lost_reason)) from None
        if self._is_closed:
            raise BrokerUnavailable(str(self._lost_reason))

    # Connecting

    async def connect(self) -> None:
        """Connect for the first time. From then on the broker reconnects by itself until close().

        A broker that loads its data is waited for, as long as connecting may take. Raises BrokerUnavailable;
        BrokerUnsuitable, with what to change, if it must not be used. After either, connect() may be called again.
        """
        if self._state is not BrokerState.IDLE:
            raise RuntimeError(f"{self!r}: connect() is for once, before anything else")
        self._loop = asyncio.get_running_loop()
        self._state = BrokerState.CONNECTING
        deadline = self._loop.time() + self._address.connect_timeout_s
        try:
            while True:
                try:
                    connection, lineage = await self._open()
                except BrokerNotServing:
                    if self._loop.time() + RECONNECT_WAIT_FIRST_S > deadline:
                        raise
                    await asyncio.sleep(RECONNECT_WAIT_FIRST_S)
                else:
                    break
            if self._is_closed:  # close() came while this waited
                await connection.disconnect(str(self._lost_reason))
                raise BrokerUnavailable(str(self._lost_reason))
            self._take(connection, lineage)
        except BaseException:
            if not self._is_closed:
                self._state = BrokerState.IDLE
            raise

    async def close(self) -> None:
        """Disconnect for good; unanswered commands fail, open readers are closed first."""
        if self._is_closed:
            return
        await asyncio.gather(*(reader.close() for reader in self._readers))
        self._state = BrokerState.CLOSED
        self._lost_reason = BrokerUnavailable(f"broker {self._address}: closed by this process")
        self._stop_heartbeat()
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.on_lost = None
            await connection.disconnect(str(self._lost_reason))
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait((self._reconnecting,))
        self._reachable_event.set()

    async def _open(self) -> tuple[BrokerConnection, _Lineage]:
        """Connect, check that this broker may be used, and make it ready."""
        assert self._loop is not None
        connection = await open_connection(
            self._address,
            client_name=self._client_name,
            loop=self._loop,
            silence_timeout_s=self._address.socket_timeout_s,
            counters=self._counters,
        )
        try:
            async with asyncio.timeout(self._address.connect_timeout_s):
                replication = await self._check(connection)
                lineage = await self._prepare(connection, replication)
        except TimeoutError as error:
            reason = f"broker {self._address} did not answer within {self._address.connect_timeout_s:g} s"
            await connection.disconnect(reason)
            raise BrokerUnavailable(reason) from error
        except BrokerError as error:
            await connection.disconnect(str(error))
            raise BrokerUnsuitable(f"broker {self._address} refuses a command that is needed: {error}") from error
        except BaseException as error:
            await connection.disconnect(f"connecting to broker {self._address} ended: {error!r}")
            raise
        return connection, lineage

    async def _check(self, connection: BrokerConnection) -> dict[str, str]:
        assert connection.server is not None
        _check_version(str(self._address), connection.server.info)
        replication_call = connection.call(("INFO", "replication"))
        memory_call = connection.call(("INFO", "memory"))
        replication = parse_info(await replication_call)
        memory = parse_info(await memory_call)
        if replication.get("role") != "master":
            raise BrokerNotServing(f"broker {self._address} is a replica of {replication.get('master_host')}")
        # INFO, not CONFIG GET: it tells the same and needs no right to the server's configuration.
        policy = memory.get("maxmemory_policy", "unknown")
        if policy != "noeviction":
            raise BrokerUnsuitable(
                f"broker {self._address} has maxmemory-policy {policy}, which may delete queues and memberships: "
                "set it to noeviction (in redis.conf, or CONFIG SET maxmemory-policy noeviction)"
            )
        return replication

    async def _prepare(self, connection: BrokerConnection, replication: dict[str, str]) -> _Lineage:
        assert connection.server is not None
        loads = [connection.call(("SCRIPT", "LOAD", script.source)) for script in scripts.ALL]
        generation_call = connection.call(("GET", self._generation_key))
        asked_at = time.monotonic()
        time_call = connection.call(("TIME",))
        for load in loads:
            await load
        generation = await generation_call
        self._read_clock(await time_call, asked_at, is_first=True)
        if generation is None:
            generation = await self._store_generation(connection)
        return _Lineage(connection.server.run_id, replication.get("master_replid", ""), generation)

    async def _store_generation(self, connection: BrokerConnection) -> bytes | None:
        value = secrets.token_hex(8).encode()
        try:
            present = await connection.call(("SET", self._generation_key, value, "NX", "GET"))
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
        is_restored = self._lineage is not None
        self._lineage = lineage
        self._connection = connection
        connection.on_lost = self._lost
        self._state = BrokerState.REACHABLE
        self._connect_count += 1
        self._reachable_event.set()
        self._start_heartbeat()
        if is_restored:
            logger.info("broker %s is reachable again%s", self._address, ", without its data" if data_lost else "")
            self._tell(reachable=True, data_lost=data_lost)

    def _tell(self, *, reachable: bool, data_lost: bool) -> None:
        self._data_lost_count += data_lost
        change = BrokerChange(reachable=reachable, data_lost=data_lost)
        for listener in self._listeners:
            listener(change)

    def _lost(self, connection: BrokerConnection) -> None:
        assert self._loop is not None
        assert connection.lost_reason is not None
        self._connection = None
        self._lost_reason = connection.lost_reason
        self._state = BrokerState.LOST
        self._reachable_event.clear()
        self._stop_heartbeat()
        logger.warning("%s; reconnecting", connection.lost_reason)
        self._reconnecting = self._loop.create_task(self._reconnect())
        self._reconnecting.add_done_callback(self._reconnecting_ended)
        self._tell(reachable=False, data_lost=False)

    async def _reconnect(self) -> None:
        wait_s = RECONNECT_WAIT_FIRST_S
        unsuitable = ""  # said once, not at every try
        while True:
            try:
                connection, lineage = await self._open()
                self._take(connection, lineage)
            except BrokerUnavailable as error:
                self._lost_reason = error
            except BrokerUnsuitable as error:
                self._lost_reason = BrokerUnavailable(str(error))
                if str(error) != unsuitable:
                    unsuitable = str(error)
                    logger.error("%s", unsuitable)
            else:
                return
            # Jitter, because all processes lost the broker at the same instant.
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(wait_s * 2, RECONNECT_WAIT_MAX_S)

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
        connection = self._connection
        if connection is None:
            return
        asked_at = time.monotonic()
        self._start_heartbeat()
        connection.call(("TIME",)).add_done_callback(lambda call: self._time_answered(call, asked_at))
        self.look_for_lost_data()

    def _time_answered(self, call: asyncio.Future[Any], asked_at: float) -> None:
        if call.exception() is not None:
            return  # the connection is lost or overloaded, which others report
        before_ms = self._clock_offset_ms
        self._read_clock(call.result(), asked_at, is_first=False)
        if self._clock_offset_ms - before_ms > _CLOCK_STEP_MS:
            # Its clock was set, or our machine was suspended: what had less time left than that has expired.
            logger.warning("the clock of broker %s is %.1f s ahead of what it was", self._address,
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
        lineage, connection = self._lineage, self._connection
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
            connection.call(("SET", self._generation_key, mine, "NX", "GET")).add_done_callback(
                lambda call: self._generation_stored(call, lineage, mine)
            )
        if data_lost:
            logger.warning("broker %s has lost its data", self._address)
            self._tell(reachable=True, data_lost=True)

    def _generation_stored(self, call: asyncio.Future[Any], lineage: _Lineage, mine: bytes) -> None:
        if call.exception() is None:  # else out of memory: the next heartbeat tries again
            lineage.generation = mine if call.result() is None else call.result()


def _check_version(name: str, info: dict[str, str]) -> None:
    mode = info.get("redis_mode", "standalone")
    if mode != "standalone":
        raise BrokerUnsuitable(f"broker {name} runs in {mode} mode; this release needs a single server")
    # Valkey says redis_version:7.2.4, the version it is compatible with, and its own besides.
    version = info.get("redis_version", "")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < _VERSION_MIN:
        raise BrokerUnsuitable(
            f"broker {name} is Redis {version or 'of an unknown version'}; needed is Redis 7.0 or newer, or Valkey"
        )
