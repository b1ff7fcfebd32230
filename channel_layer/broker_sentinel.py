"""Where a master is, by what its Sentinels say.

All of them are asked at once, over connections that stay open, and the newest opinion counts (the configuration
epoch: how Sentinels agree among themselves), because one that is cut off goes on naming the former master. What they
name is looked at before it is used: broker_shard.py connects to masters only. Lives here: asking. Does not live
here: URLs with Sentinels (broker_url.py), the lease's own way of asking (lease_connection.py).

    find() before each try to connect        watch(): every LOOK_INTERVAL_S; oftener while the master is silent
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Final

from channel_layer.broker_connection import BrokerConnection, CommandCounters, open_connection
from channel_layer.broker_shard import BrokerShard
from channel_layer.broker_url import BrokerAddress, SentinelPlace
from channel_layer.errors import BrokerError, BrokerUnavailable, BrokerUnsuitable

__all__ = ["Opinion", "Sentinels", "read_opinion"]

logger = logging.getLogger("trunkline.channel_layer")

# A Sentinel that does not answer for so long has no opinion. It may hang as the master does: they often share a
# machine.
ANSWER_TIMEOUT_S: Final = 1.0
# The news of a failover may be missed: a master that was cut off with us goes on answering.
LOOK_INTERVAL_S: Final = 5.0
# How often it is looked whether the master is silent; then the Sentinels are asked each time.
TICK_S: Final = 0.5


@dataclass(frozen=True, slots=True, order=True)
class Opinion:
    """What one Sentinel says."""

    epoch: int
    host: str
    port: int


def read_opinion(reply: Any) -> Opinion:
    """Read an answer to SENTINEL MASTER. Raises ValueError."""
    fields = dict(zip(reply[::2], reply[1::2], strict=True))
    try:
        return Opinion(int(fields[b"config-epoch"]), fields[b"ip"].decode(), int(fields[b"port"]))
    except KeyError as error:
        raise ValueError(f"no field {error} in an answer to SENTINEL MASTER") from error


class Sentinels:
    """The Sentinels of one shard's master. Implements broker_shard.Finder."""

    def __init__(self, place: SentinelPlace, *, client_name: str) -> None:
        self._place = place
        self._client_name = client_name
        self._connections: dict[BrokerAddress, BrokerConnection] = {}
        self._counters = CommandCounters()
        self._watching: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Sentinels {self._place}, {len(self._connections)} connected>"

    async def find(self, shard: BrokerShard) -> None:
        """Let ``shard`` be where most of the Sentinels know the master to be, or all that answer.

        Raises BrokerUnavailable if none answers; BrokerUnsuitable if all that answer refuse: another name, rights.
        """
        asking = [asyncio.ensure_future(self._ask(sentinel)) for sentinel in self._place.sentinels]
        opinions: list[Opinion] = []
        errors: list[Exception] = []
        try:
            for answered in asyncio.as_completed(asking):
                try:
                    opinions.append(await answered)
                except (BrokerUnavailable, BrokerUnsuitable) as error:
                    errors.append(error)
                if len(opinions) > len(asking) // 2:
                    break
        finally:
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
            for task in asking:
                task.cancelled() or task.exception()
        if opinions:
            newest = max(opinions)
            shard.relocate(self._place.template.at(newest.host, newest.port))
            return
        unsuitable = [error for error in errors if isinstance(error, BrokerUnsuitable)]
        if unsuitable:
            raise unsuitable[0]
        raise BrokerUnavailable(f"broker {self._place}: none of its Sentinels answers: {errors[0]}") from errors[0]

    def watch(self, shard: BrokerShard) -> None:
        """From now on, relocate ``shard`` when the master has become another."""
        self._watching = asyncio.get_running_loop().create_task(self._watch(shard))

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait((self._watching,))
            self._watching = None
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.disconnect(f"{self!r} was closed")

    async def _watch(self, shard: BrokerShard) -> None:
        loop = asyncio.get_running_loop()
        next_look = loop.time() + LOOK_INTERVAL_S
        while True:
            await asyncio.sleep(TICK_S)
            if not shard.is_suspicious and loop.time() < next_look:
                continue
            next_look = loop.time() + LOOK_INTERVAL_S
            try:
                await self.find(shard)
            except (BrokerUnavailable, BrokerUnsuitable) as error:
                # As long as the master answers, this is no outage; its end would be.
                logger.debug("%s", error)
            except Exception:
                logger.exception("%r: looking for the master failed; going on", self)

    async def _ask(self, sentinel: BrokerAddress) -> Opinion:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                connection = self._connections.get(sentinel)
                if connection is None or connection.lost_reason is not None:
                    connection = await open_connection(
                        sentinel,
                        client_name=self._client_name,
                        loop=asyncio.get_running_loop(),
                        silence_timeout_s=ANSWER_TIMEOUT_S,
                        counters=self._counters,
                        is_sentinel=True,
                    )
                    former = self._connections.get(sentinel)
                    if former is not None and former.lost_reason is None:  # two asked at once
                        await connection.disconnect(f"{self!r}: one connection is enough")
                        connection = former
                    self._connections[sentinel] = connection
                reply = await connection.call(("SENTINEL", "MASTER", self._place.master))
        except TimeoutError as error:
            raise BrokerUnavailable(f"Sentinel {sentinel} did not answer within {ANSWER_TIMEOUT_S:g} s") from error
        except BrokerError as error:
            raise BrokerUnsuitable(
                f"Sentinel {sentinel} does not say where master {self._place.master!r} is: {error}"
            ) from error
        try:
            return read_opinion(reply)
        except (TypeError, ValueError) as error:
            raise BrokerUnavailable(f"what Sentinel {sentinel} says cannot be read: {error}") from error
