"""Who among the peers of our links lives: carries out what liveness.py decides, for each shard of the broker apart.

A peer's lease and inbox are on one shard, our own inbox is on another perhaps. A peer is judged only while both of
them work: whoever lives on a shard that is away, or came back just now, is not dead. A shard that hangs holds up the
looks at its own peers only.

    look() --> one task a shard: are the leases there? --> ping, probe --> dead: the link is given up
                                 +--one is missing: was its death told? then the next look follows the probe at once
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from channel_layer.broker import Broker, BrokerShard
from channel_layer.errors import BrokerUnavailable
from channel_layer.links import Links
from channel_layer.liveness import Liveness, LivenessStatistics
from channel_layer.names import Keys

__all__ = ["PeerWatch"]

logger = logging.getLogger("trunkline.channel_layer")

# How often the leases of our peers are read; oftener while one is missing. With a lease's 2.5 s and the 1.5 s of
# liveness.py a death is noticed within 5 s.
_LOOK_INTERVAL_S: Final = 0.5
_SUSPECT_INTERVAL_S: Final = 0.25
# While our own lease has not been renewed for so long, the broker refuses those of others, too (out of memory).
_OWN_LEASE_LATE_S: Final = 1.5
# A dead process stays registered under its groups until its deadline; nothing is sent to it meanwhile.
_DEAD_REMEMBERED_S: Final = 75.0


class _ShardWatch:
    """What is known of the peers on one shard."""

    __slots__ = ("has_told_dead", "liveness", "looking", "refusal_count")

    def __init__(self, liveness: Liveness) -> None:
        self.liveness = liveness
        self.looking: asyncio.Task[None] | None = None  # one look at a time
        # What the broker had refused at the last look, while there are suspects.
        self.refusal_count: int | None = None
        self.has_told_dead = False  # the death of a suspect was told; our own probe is all that is waited for


class PeerWatch:
    """Looks at the leases of the peers of ``links``, on its loop."""

    def __init__(
        self,
        *,
        process_id: str,
        keys: Keys,
        broker: Broker,
        links: Links,
        loop: asyncio.AbstractEventLoop,
        push_probe: Callable[[int], None],
        inbox_is_current: Callable[[], bool],
        lease_renewed: Callable[[], float | None],
    ) -> None:
        """``push_probe(token)`` sends a message to our own inbox; ``probe_returned(token)`` is called when it comes.

        ``lease_renewed`` tells when our own lease was renewed last, monotonic.
        """
        self._inbox_key = keys.mail(process_id)
        self._keys = keys
        self._broker = broker
        self._links = links
        self._loop = loop
        self._push_probe = push_probe
        self._inbox_is_current = inbox_is_current
        self._lease_renewed = lease_renewed
        self._tokens = itertools.count(1)  # of probes, unique over all shards
        self._shards: dict[BrokerShard, _ShardWatch] = {}
        # Peers found dead, with the time; see _DEAD_REMEMBERED_S.
        self._dead: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<PeerWatch {[watch.liveness for watch in self._shards.values()]} dead={len(self._dead)}>"

    @property
    def dead_count(self) -> int:
        """Dead peers that are remembered."""
        return len(self._dead)

    @property
    def interval_s(self) -> float:
        """How long to wait before the next look()."""
        suspects = any(watch.liveness.has_suspects for watch in self._shards.values())
        return _SUSPECT_INTERVAL_S if suspects else _LOOK_INTERVAL_S

    def statistics(self) -> LivenessStatistics:
        """Return the sum over all shards."""
        each = [watch.liveness.statistics() for watch in self._shards.values()]
        return LivenessStatistics(
            suspects=sum(statistics.suspects for statistics in each),
            suspected_count=sum(statistics.suspected_count for statistics in each),
            cleared_count=sum(statistics.cleared_count for statistics in each),
            dead_count=sum(statistics.dead_count for statistics in each),
        )

    def is_dead(self, peer: str) -> bool:
        """True if ``peer`` was found dead not long ago and has shown no life since."""
        return peer in self._dead

    def probe_returned(self, token: int) -> None:
        for watch in self._shards.values():
            watch.liveness.probe_returned(token)
        if self._inbox_is_current() and any(watch.has_told_dead for watch in self._shards.values()):
            self._loop.call_soon(self.look)  # behind what came with the probe

    def forget(self, peer: str) -> None:
        """The link to ``peer`` is over."""
        for watch in self._shards.values():
            watch.liveness.forget(peer)

    def give_grace(self) -> None:
        """Something on our own side made everybody look silent."""
        for watch in self._shards.values():
            watch.liveness.give_grace(self._loop.time())

    def shard_changed(self, shard: BrokerShard) -> None:
        """A shard went away, came back or lost its data. All peers are concerned if our own inbox is there."""
        own = self._broker.shard_of(self._inbox_key)
        for each in self._broker.shards if shard is own else (shard,):
            liveness = self._watch_of(each).liveness
            if each.reachable and own.reachable:
                liveness.broker_restored(self._loop.time())
            else:
                liveness.broker_lost()

    def look(self) -> None:
        """Look at all leases, each shard's unless the last look there is still under way."""
        own = self._broker.shard_of(self._inbox_key)
        if not own.reachable:
            return
        renewed = self._lease_renewed()
        if renewed is None or time.monotonic() - renewed > _OWN_LEASE_LATE_S:
            self.give_grace()
        peers: dict[BrokerShard, list[str]] = {shard: [] for shard in self._shards}
        for peer in self._links.peers():
            peers.setdefault(self._shard_of(peer), []).append(peer)
        dead: dict[BrokerShard, list[str]] = {}
        for peer in self._dead:
            dead.setdefault(self._shard_of(peer), []).append(peer)
        for shard in {*peers, *dead}:
            watch = self._watch_of(shard)
            if shard.reachable and (watch.looking is None or watch.looking.done()):
                look = self._look(shard, watch, peers.get(shard, []), dead.get(shard, []))
                watch.looking = self._loop.create_task(look)
        for shard in [shard for shard in self._shards if shard not in self._broker.shards and not peers.get(shard)]:
            del self._shards[shard]  # of a Cluster; its slots have gone elsewhere

    async def close(self) -> None:
        looking = [watch.looking for watch in self._shards.values() if watch.looking is not None]
        for task in looking:
            task.cancel()
        if looking:
            await asyncio.wait(looking)

    def _shard_of(self, peer: str) -> BrokerShard:
        return self._broker.shard_of(self._keys.lease(peer))

    def _watch_of(self, shard: BrokerShard) -> _ShardWatch:
        watch = self._shards.get(shard)
        if watch is None:
            watch = self._shards[shard] = _ShardWatch(Liveness(self._links.heard_from, self._tokens))
        return watch

    async def _look(self, shard: BrokerShard, watch: _ShardWatch, peers: list[str], dead: list[str]) -> None:
        try:
            await self._judge(shard, watch, peers, dead)
        except BrokerUnavailable:
            pass  # shard_changed() is told
        except Exception:
            logger.exception("looking at the leases of %d peers failed; going on", len(peers))

    async def _judge(self, shard: BrokerShard, watch: _ShardWatch, peers: list[str], dead: list[str]) -> None:
        liveness = watch.liveness
        watch.has_told_dead = False
        if not liveness.is_judging(self._loop.time()):
            return
        liveness.keep_only(peers)
        looked_at = [*peers, *dead]
        if not looked_at:
            return
        calls: list[Awaitable[Any]] = [self._broker.call("EXISTS", self._keys.lease(peer)) for peer in looked_at]
        refusals = [self._count_refusals(shard)] if liveness.has_suspects else []
        answers = await asyncio.gather(*calls, *refusals)
        now = self._loop.time()
        refused_before, watch.refusal_count = watch.refusal_count, answers.pop() if refusals else None
        if refusals and refused_before not in (None, watch.refusal_count):
            # Some commands pass and some do not: perhaps the leases and the answers of our suspects did not.
            liveness.give_grace(now)
            return
        present = dict(zip(looked_at, map(bool, answers), strict=True))
        told_dead = await self._find_told_dead([peer for peer in peers if not present[peer]])
        watch.has_told_dead = bool(told_dead)
        for peer in dead:
            died_at = self._dead.get(peer)
            if died_at is not None and (present[peer] or now - died_at > _DEAD_REMEMBERED_S):
                del self._dead[peer]
        judgement = liveness.judge(
            now,
            [(peer, present[peer]) for peer in peers],
            told_dead=told_dead,
            inbox_is_current=self._inbox_is_current(),
        )
        for peer in judgement.ping:
            self._links.ping(peer)
        for peer in judgement.dead:
            why = "its supervisor says so" if peer in told_dead else "its lease is gone and it does not answer"
            logger.warning("process %s is dead: %s", peer, why)
            self._dead[peer] = now
            self._links.give_up(peer, f"the process is dead: {why}")
        if judgement.probe is not None:
            self._push_probe(judgement.probe)

    async def _find_told_dead(self, missing: list[str]) -> set[str]:
        """Those whose supervisors have told that they are no more."""
        if not missing:
            return set()
        told = await asyncio.gather(*[self._broker.call("EXISTS", self._keys.death(peer)) for peer in missing])
        return {peer for peer, is_told in zip(missing, told, strict=True) if is_told}

    async def _count_refusals(self, shard: BrokerShard) -> int:
        """What was refused where they live, and where their answers go."""
        own = self._broker.shard_of(self._inbox_key)
        return sum(await asyncio.gather(*[each.count_refusals() for each in {shard, own}]))
