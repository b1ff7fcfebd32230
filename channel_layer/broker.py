"""The process's connections to the broker: commands, and what the rest must know about outages.

Every command of the channel layer goes through here or through a BlockingReader. Whoever calls says which key it is
about; where that key is, nobody else knows. Does not live here: one server's connection (broker_shard.py), the
pipeline (broker_connection.py), blocking reads (blocking_reader.py), asking Sentinels and Clusters
(broker_sentinel.py, broker_cluster.py), URLs (broker_url.py).

    one URL                 --> one shard, which call(), script() and transaction() use without looking
    several                 --> a shard each, by the slot of the key (sharding.py)
    redis+sentinel://       --> a shard that its Sentinels send from master to master; alone, or one of several
    redis+cluster://        --> as many shards as the Cluster has owners of slots at the moment

An outage is counted for each shard: ``subscribe()`` tells which one went or came back, ``shard_of()`` which keys that
concerns. To add a topology: a branch in __init__, and a Finder if it moves.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from channel_layer.blocking_reader import BlockingReader
from channel_layer.broker_cluster import Cluster, Errand
from channel_layer.broker_connection import Argument, CommandCounters
from channel_layer.broker_sentinel import Sentinels
from channel_layer.broker_shard import BrokerShard, BrokerState, Finder
from channel_layer.broker_url import ClusterPlace, SentinelPlace, parse_broker_urls, redact_urls
from channel_layer.errors import BrokerUnavailable
from channel_layer.scripts import Script
from channel_layer.sharding import Node, slot_of, static_shard

__all__ = ["BlockingReader", "Broker", "BrokerChange", "BrokerShard", "BrokerState", "BrokerStatistics"]

_CLIENT_NAME = re.compile(r"[!-~]+")  # what CLIENT SETNAME takes

# Keys whose place is remembered. When full, all are forgotten: computing one again costs 2 us.
_ROUTES_MAX: Final = 16_384


@dataclass(frozen=True, slots=True)
class BrokerChange:
    """A shard went away, came back, or lost its data while it was reachable."""

    reachable: bool
    data_lost: bool
    shard: BrokerShard | None = field(default=None, compare=False)  # set by Broker; compared are changes


@dataclass(frozen=True, slots=True)
class BrokerStatistics:
    state: BrokerState  # REACHABLE only while every shard is
    shard_count: int
    lost_shards: tuple[str, ...]  # the URLs of those that are not reachable
    connect_count: int
    data_lost_count: int
    reader_count: int
    unanswered_count: int
    command_count: int
    overloaded_count: int
    noscript_count: int
    redirected_count: int  # commands that a node of a Cluster sent elsewhere
    written_bytes: int
    received_bytes: int


class Broker:
    """One per process and loop. Commands from one tick leave in one write a shard; answers come in order."""

    def __init__(
        self,
        url: str,
        *,
        client_name: str,
        generation_key: str = "trunkline:generation",
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """``url`` may be several, see broker_url.py. ``client_name`` is what CLIENT LIST shows.

        Raises ValueError for a bad URL.
        """
        if not _CLIENT_NAME.fullmatch(client_name):
            raise ValueError(f"client name {client_name!r} is not printable ASCII without spaces")
        self.url = url
        places = parse_broker_urls(url)
        self._client_name = client_name
        self._generation_key = generation_key
        self._loop = loop  # else the one that runs connect()
        self._counters = CommandCounters()  # of all shards
        self._listeners: list[Callable[[BrokerChange], None]] = []
        self._readers: set[BlockingReader] = set()  # open ones, to close them
        self._state = BrokerState.IDLE  # of all; CONNECTING and REACHABLE say nothing about a single shard
        self._routes: dict[str, BrokerShard] = {}  # key -> shard; _ROUTES_MAX
        self._slots: dict[str, int] = {}  # key -> slot of a Cluster; _ROUTES_MAX
        self._places = places
        self._cluster = self._make_cluster(places[0]) if isinstance(places[0], ClusterPlace) else None
        self._sentinels: list[tuple[Sentinels, BrokerShard]] = []
        self._static = [] if self._cluster is not None else self._make_static()
        # The one server of most deployments: found without a look at the key.
        self._only = self._static[0] if len(self._static) == 1 else None

    def _make_cluster(self, place: ClusterPlace) -> Cluster:
        def make_shard(finder: Finder, generation_key: str) -> BrokerShard:
            return BrokerShard(
                None,
                name=str(place),
                connect_timeout_s=place.seeds[0].connect_timeout_s,
                client_name=self._client_name,
                generation_key=generation_key,
                changed=self._changed,
                counters=self._counters,
                finder=finder,
                mode="cluster",
            )

        return Cluster(
            place,
            client_name=self._client_name,
            generation_prefix=self._generation_key,
            make_shard=make_shard,
            changed=self._changed,
            installed=self._routes.clear,
        )

    def _make_static(self) -> list[BrokerShard]:
        shards = []
        self._sentinels.clear()
        for number, place in enumerate(self._places, 1):
            assert not isinstance(place, ClusterPlace)
            sentinels = Sentinels(place, client_name=self._client_name) if isinstance(place, SentinelPlace) else None
            shard = BrokerShard(
                None if isinstance(place, SentinelPlace) else place,
                name=str(place),
                connect_timeout_s=(place.template if isinstance(place, SentinelPlace) else place).connect_timeout_s,
                client_name=self._client_name,
                generation_key=self._generation_key,
                changed=self._changed,
                counters=self._counters,
                finder=sentinels,
                position=(f"{self._generation_key}:shard", number, len(self._places)),
            )
            if sentinels is not None:
                self._sentinels.append((sentinels, shard))
            shards.append(shard)
        return shards

    def __repr__(self) -> str:
        return f"<Broker {redact_urls(self.url)} {self.state.name}>"

    @property
    def state(self) -> BrokerState:
        """REACHABLE while all shards are, LOST while one is not."""
        if self._only is not None:
            return self._only.state
        if self._state is BrokerState.REACHABLE and not self.reachable:
            return BrokerState.LOST
        return self._state

    @property
    def reachable(self) -> bool:
        """True while every shard answers; ``shard_of(key).reachable`` is about one."""
        only = self._only
        if only is not None:
            return only.reachable
        shards = self.shards
        return bool(shards) and all(shard.reachable for shard in shards)

    @property
    def is_cluster(self) -> bool:
        return self._cluster is not None

    @property
    def shards(self) -> Sequence[BrokerShard]:
        """Where keys are now; in a Cluster others may come."""
        return self._static if self._cluster is None else self._cluster.shards

    def shard_of(self, key: str) -> BrokerShard:
        """Return the shard that has ``key`` now."""
        if self._only is not None:
            return self._only
        shard = self._routes.get(key)
        if shard is None:
            if len(self._routes) >= _ROUTES_MAX:
                self._routes.clear()
            if self._cluster is not None:
                shard = self._cluster.owner(slot_of(key))
            else:
                shard = self._static[static_shard(key, len(self._static))]
            self._routes[key] = shard
        return shard

    def statistics(self) -> BrokerStatistics:
        counters, shards = self._counters, self.shards
        return BrokerStatistics(
            state=self.state,
            shard_count=len(shards),
            lost_shards=tuple(str(shard) for shard in shards if not shard.reachable),
            connect_count=sum(shard.connect_count for shard in shards),
            data_lost_count=sum(shard.data_lost_count for shard in shards),
            reader_count=len(self._readers),
            unanswered_count=sum(
                shard.connection.unanswered_count for shard in shards if shard.connection is not None
            ),
            command_count=counters.command_count,
            overloaded_count=counters.overloaded_count,
            noscript_count=counters.noscript_count,
            redirected_count=0 if self._cluster is None else self._cluster.redirected_count,
            written_bytes=counters.written_bytes,
            received_bytes=counters.received_bytes,
        )

    # Commands

    def call(self, *args: Argument) -> asyncio.Future[Any]:
        """Send a command, whose first argument is its key, with the others of this tick; the future gets the answer.

        Strings in answers are bytes. It fails with BrokerUnavailable at once while the key's shard is not reachable
        or its connection is overloaded, and when the connection is lost before the answer: then the command may have
        been carried out. What may have been is never sent twice. BrokerError if the broker refuses the command.
        """
        shard = self._only
        if shard is None:
            if self._cluster is not None:
                return self._cluster.start(Errand(self._cluster, self._slot_of(str(args[1])), args))
            shard = self.shard_of(str(args[1]))
        connection = shard.connection
        return connection.call(args) if connection is not None else shard.fail()

    def script(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> asyncio.Future[Any]:
        """Run a script of the package ``scripts``; else as call()."""
        shard = self._only
        if shard is None:
            if self._cluster is not None:
                return self._cluster.start(Errand(self._cluster, self._slot_of(keys[0]), args, (script, keys)))
            shard = self.shard_of(keys[0])
        connection = shard.connection
        return connection.script(script, keys, args) if connection is not None else shard.fail()

    def transaction(self, *commands: Sequence[Argument]) -> asyncio.Future[list[Any]]:
        """Run commands with one key as one transaction; the future gets the list of their answers. Else as call().

        If a command fails when it runs, so does the future, and the other commands have been carried out.
        """
        shard = self._only
        if shard is None:
            key = str(commands[0][1])
            if self._cluster is not None:
                return self._cluster.start(Errand(self._cluster, self._slot_of(key), commands))
            shard = self.shard_of(key)
        connection = shard.connection
        return connection.transaction(commands) if connection is not None else shard.fail()

    def _slot_of(self, key: str) -> int:
        """The slot of a key, in a Cluster that is connected."""
        if self._loop is None:
            raise RuntimeError(f"{self!r}: call connect() first")
        slot = self._slots.get(key)
        if slot is None:
            if len(self._slots) >= _ROUTES_MAX:
                self._slots.clear()
            slot = self._slots[key] = slot_of(key)
        return slot

    def flush(self) -> None:
        """Write now what was to be written at the end of the tick: for who knows that it ends here."""
        only = self._only
        if only is not None:
            if only.connection is not None:
                only.connection.flush()
            return
        for shard in self.shards:
            if shard.connection is not None:
                shard.connection.flush()

    def time_ms(self, key: str) -> int:
        """Return the clock of the key's shard (TIME), in milliseconds, as estimated from our monotonic clock."""
        return self.shard_of(key).time_ms()

    def open_reader(self) -> BlockingReader:
        """Return a new reader; it connects at its first pop(). Close it before the broker, or with it."""
        reader = BlockingReader(self, client_name=f"{self._client_name}:reader")
        self._readers.add(reader)
        return reader

    def forget_reader(self, reader: BlockingReader) -> None:
        """Called by a reader that was closed."""
        self._readers.discard(reader)

    # Outages

    def subscribe(self, on_change: Callable[[BrokerChange], None]) -> None:
        """Have ``on_change`` called at each change from now on, on the loop; it must not raise."""
        self._listeners.append(on_change)

    async def wait_reachable(self, timeout_s: float, key: str | None = None) -> None:
        """Return when the key's shard is reachable; without a key, when all are.

        Raises BrokerUnavailable after the timeout, and once closed.
        """
        if key is not None or self._only is not None:
            shard = self._only if self._only is not None else self.shard_of(key or "")
            await shard.wait_reachable(timeout_s)
            return
        try:
            async with asyncio.timeout(timeout_s):
                while not self.reachable:
                    await asyncio.gather(*[shard.wait_reachable(timeout_s) for shard in self.shards])
        except TimeoutError:
            raise BrokerUnavailable(f"broker {redact_urls(self.url)}: not all shards are reachable") from None

    async def look_again(self, node: Node | None) -> None:
        """A Cluster's node said that keys are elsewhere: ask for their owners anew, best of all at ``node``."""
        if self._cluster is not None:
            await self._cluster.look_again(node)

    def _changed(self, shard: BrokerShard, reachable: bool, data_lost: bool) -> None:
        change = BrokerChange(reachable=reachable, data_lost=data_lost, shard=shard)
        for listener in self._listeners:
            listener(change)

    # Start and end

    async def connect(self) -> None:
        """Connect to every shard for the first time. From then on they reconnect by themselves until close().

        A broker that loads its data is waited for, as long as connecting may take. Raises BrokerUnavailable;
        BrokerUnsuitable, with what to change, if one must not be used. After either, connect() may be called again.
        """
        if self._state is not BrokerState.IDLE:
            raise RuntimeError(f"{self!r}: connect() is for once, before anything else")
        self._state = BrokerState.CONNECTING
        self._loop = asyncio.get_running_loop()
        try:
            if self._cluster is not None:
                await self._cluster.connect()
            else:
                await self._connect_static()
        except BaseException:
            for sentinels, _ in self._sentinels:
                await sentinels.close()
            if not self._is_closed:
                self._state = BrokerState.IDLE
                if self._only is None and self._cluster is None:
                    self._static = self._make_static()
            raise
        if self._is_closed:
            raise BrokerUnavailable(f"broker {redact_urls(self.url)}: closed by this process")
        self._state = BrokerState.REACHABLE

    @property
    def _is_closed(self) -> bool:
        return self._state is BrokerState.CLOSED

    async def _connect_static(self) -> None:
        if self._only is not None:
            await self._only.connect()
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    for shard in self._static:
                        group.create_task(shard.connect())
            except BaseException as error:
                # Those that connected did so in vain; connect() makes new ones.
                self._routes.clear()
                for shard in self._static:
                    await shard.close()
                if isinstance(error, BaseExceptionGroup):
                    raise error.exceptions[0] from None
                raise
        for sentinels, shard in self._sentinels:
            sentinels.watch(shard)

    async def close(self) -> None:
        """Disconnect for good; unanswered commands fail, open readers are closed first."""
        if self._is_closed:
            return
        await asyncio.gather(*(reader.close() for reader in self._readers))
        self._state = BrokerState.CLOSED
        if self._cluster is not None:
            await self._cluster.close()
        for shard in self._static:
            await shard.close()
        for sentinels, _ in self._sentinels:  # behind the shards, which ask them
            await sentinels.close()
