"""A Redis Cluster: which node has a key now, and commands that follow the keys.

Lives here: the table of slots, kept true by asking the nodes, and redirections. Does not live here: what the nodes'
answers mean (sharding.py), a node's connection (broker_shard.py), blocking reads (blocking_reader.py).

A shard is a set of slots with one owner. When its owner changes (failover), it is the same shard elsewhere; when
slots change hands (resharding), they go from one shard to another.

    errand --slot--> shard --answer--> future
      ^               +--MOVED: it waits, and what comes for this shard waits behind it, until the nodes were asked
      +---------------+--ASK: once more, at once, at the node that is named
                      +--lost answer--> the future fails: what may have been carried out is never sent again

The order of commands with one key holds: those that a node refused with MOVED, in its order, then the later ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from channel_layer.broker_connection import (
    UNANSWERED_COMMANDS_MAX,
    BrokerConnection,
    CommandCounters,
    open_connection,
    pack_command,
    parse_info,
)
from channel_layer.broker_shard import BrokerShard, Finder
from channel_layer.broker_url import ClusterPlace
from channel_layer.errors import BrokerError, BrokerUnavailable, BrokerUnsuitable, WireError
from channel_layer.scripts import Script
from channel_layer.sharding import (
    SLOT_COUNT,
    Node,
    Redirect,
    SlotTable,
    read_redirect,
    read_slot_table,
    slot_of,
    tag_for,
)

__all__ = ["Cluster", "Errand"]

logger = logging.getLogger("trunkline.channel_layer")

# A node that does not answer for so long is not asked; others know the same.
ANSWER_TIMEOUT_S: Final = 0.5
CONNECT_TIMEOUT_S: Final = 1.0
# How often the table is read again without a reason, for slots that changed hands without our noticing.
LOOK_INTERVAL_S: Final = 5.0
# How often it is looked whether nodes are silent; then others are asked each time.
TICK_S: Final = 0.5
# What a refused command waits, at most, for the new owner to be connected. Then it fails.
OWNER_WAIT_S: Final = 2.0
# Redirections of one command. Nodes that disagree for longer than their waits add up to are no Cluster.
REDIRECTS_MAX: Final = 10
# A table that is older by the Cluster's epoch comes from a node that is cut off. It counts when for so long nobody
# has had a newer one: the Cluster was built anew.
EPOCH_MEMORY_S: Final = 15.0
# A shard that lost its last slot is closed so much later: for the answers that are on their way.
_RETIRE_S: Final = 10.0

_ASKING: Final = pack_command(("ASKING",))


class Errand:
    """One command (or script, or transaction) on its way to the node that has its key. It is its own Answer."""

    __slots__ = ("_args", "_cluster", "_script", "future", "redirect_count", "shard", "slot")

    def __init__(
        self, cluster: Cluster, slot: int, args: Sequence[Any], script: tuple[Script, Sequence[str]] | None = None
    ) -> None:
        """``args``: of a command; of a script, beside the script and its keys; or the commands of a transaction."""
        self._cluster = cluster
        self._args = args
        self._script = script
        self.slot = slot
        self.future: asyncio.Future[Any] = cluster.loop.create_future()
        self.shard: BrokerShard | None = None  # where it was sent last
        self.redirect_count = 0

    def send(self, connection: BrokerConnection, *, asking: bool = False) -> None:
        if asking:
            connection.send(_ASKING, _Ignored())
        if self._script is not None:
            connection.send_script(*self._script, self._args, self)
        elif isinstance(self._args[0], str):
            connection.send(pack_command(tuple(self._args)), self)
        else:
            connection.send_transaction(self._args, self)

    def done(self) -> bool:
        return self.future.done()

    def set_result(self, result: Any, /) -> None:
        self.future.set_result(result)

    def set_exception(self, exception: Exception, /) -> None:
        if isinstance(exception, BrokerError) and self._cluster.redirected(self, str(exception)):
            return
        self.future.set_exception(exception)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Ignored:
    """Takes the answer to ASKING."""

    def done(self) -> bool:
        return True

    def set_result(self, result: Any, /) -> None: ...

    def set_exception(self, exception: Exception, /) -> None: ...


class _Detour:
    """What waits until it is known where the slots of a shard are."""

    __slots__ = ("later", "refused", "slots")

    def __init__(self, slots: frozenset[int]) -> None:
        self.slots = slots  # that the shard had: what comes for them waits, also when they have a new owner
        self.refused: list[Errand] = []  # answered with MOVED, in this order
        self.later: list[Errand] = []  # called since; UNANSWERED_COMMANDS_MAX


class Cluster:
    """All nodes of a Cluster that have slots. Implements broker_shard.Finder for them."""

    def __init__(
        self,
        place: ClusterPlace,
        *,
        client_name: str,
        generation_prefix: str,
        make_shard: Callable[[Finder, str], BrokerShard],
        changed: Callable[[BrokerShard, bool, bool], None],
        installed: Callable[[], None],
    ) -> None:
        """``make_shard(finder, generation_key)``; ``installed()`` is called when slots have changed hands."""
        self._place = place
        self._template = place.seeds[0]
        self._client_name = client_name
        self._generation_prefix = generation_prefix
        self._make_shard = make_shard
        self._changed = changed
        self._installed = installed
        self.loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]  # set by connect()
        self.shards: list[BrokerShard] = []
        self._slots: dict[BrokerShard, frozenset[int]] = {}
        # Owner of each slot. Those of nobody have one that is never reachable.
        self._nobody = make_shard(self, "")
        self._owner: list[BrokerShard] = [self._nobody] * SLOT_COUNT
        # Nodes that were named by ASK and have no slots (yet), and what waits for their connections.
        self._guests: dict[Node, BrokerShard] = {}
        self._asking: dict[Node, list[Errand]] = {}
        self._nodes: tuple[Node, ...] = tuple(seed.node for seed in place.seeds)
        self._table: SlotTable | None = None
        self._epoch = 0
        self._epoch_seen_at = float("-inf")
        self._looking = asyncio.Lock()
        self._detours: dict[BrokerShard, _Detour] = {}
        self._watching: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # detours and retirements under way
        self._counters = CommandCounters()  # of connections that only ask
        self.redirected_count = 0

    def __repr__(self) -> str:
        return f"<Cluster {self._place}, {len(self.shards)} shards, {self.redirected_count} redirected>"

    def owner(self, slot: int) -> BrokerShard:
        return self._owner[slot]

    # Start and end

    async def connect(self) -> None:
        """Ask where everything is, and connect to all owners. Raises BrokerUnavailable, BrokerUnsuitable."""
        self.loop = asyncio.get_running_loop()
        table = await self._ask(None)
        if not table.owners:
            raise BrokerUnavailable(f"broker {self._place}: no node of the Cluster has slots (yet)")
        shards = {self._new_shard(node, slots): slots for node, slots in table.owners.items()}
        try:
            await asyncio.gather(*[shard.connect() for shard in shards])
        except BaseException:
            for shard in shards:
                await shard.close()
            raise
        self._nobody.stay_lost(BrokerUnavailable(f"broker {self._place}: no node has this part of the keys"))
        self._table = table
        self._assign(shards)
        self._watching = self.loop.create_task(self._watch())

    async def close(self) -> None:
        tasks = [task for task in (self._watching, *self._tasks) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for shard in (*self.shards, *self._guests.values()):
            await shard.close()

    def _new_shard(self, node: Node, slots: frozenset[int]) -> BrokerShard:
        key = f"{self._generation_prefix}:{{{tag_for(slots)}}}" if slots else ""
        shard = self._make_shard(self, key)
        shard.relocate(self._template.at(*node))
        return shard

    # Commands

    def start(self, errand: Errand) -> asyncio.Future[Any]:
        """Send an errand where its key is."""
        for detour in self._detours.values():
            if errand.slot in detour.slots:
                if len(detour.later) < UNANSWERED_COMMANDS_MAX:
                    detour.later.append(errand)
                else:
                    errand.fail(BrokerUnavailable(f"too many commands wait for the owner of slot {errand.slot}"))
                return errand.future
        shard = self._owner[errand.slot]
        connection = shard.connection
        if connection is None:
            errand.fail(shard.lost_reason)
        else:
            errand.shard = shard
            errand.send(connection)
        return errand.future

    def redirected(self, errand: Errand, text: str) -> bool:
        """Send ``errand`` elsewhere, if this error says so: then it was not carried out."""
        shard = errand.shard
        if shard is None or shard.address is None:
            return False
        redirect = read_redirect(text, shard.address.node)
        if redirect is None:
            return False
        errand.redirect_count += 1
        self.redirected_count += 1
        if errand.redirect_count > REDIRECTS_MAX:
            errand.fail(BrokerUnavailable(f"broker {self._place}: its nodes do not agree about a key: {text}"))
            return True
        if redirect.kind == "ASK" and redirect.node is not None:
            self._ask_once(errand, redirect.node)
        else:
            detour = self._detours.get(shard)
            if detour is None:
                detour = self._detours[shard] = _Detour(self._slots.get(shard, frozenset()))
                self._spawn(self._carry_on(shard, detour, redirect))
            detour.refused.append(errand)
        return True

    async def _carry_on(self, shard: BrokerShard, detour: _Detour, redirect: Redirect) -> None:
        try:
            again = max(errand.redirect_count for errand in detour.refused)
            if again > 1:
                # The nodes do not agree yet, or keys are on their way (TRYAGAIN).
                await asyncio.sleep(0.01 * 2 ** min(again, 6))
            with contextlib.suppress(BrokerUnavailable, BrokerError):
                # When this is answered, so is everything before it.
                await shard.call("TIME")
            await self.look_again(redirect.node)
            waiting = {self._owner[errand.slot] for errand in (*detour.refused, *detour.later)}
            await asyncio.gather(*[each.wait_reachable(OWNER_WAIT_S) for each in waiting], return_exceptions=True)
        finally:
            del self._detours[shard]
            for errand in (*detour.refused, *detour.later):
                if not errand.done():
                    self.start(errand)

    def _ask_once(self, errand: Errand, node: Node) -> None:
        shard = next((each for each in self.shards if each.address is not None and each.address.node == node), None)
        if shard is None:
            shard = self._guests.get(node)
        waiting = self._asking.get(node)
        if waiting is not None:
            waiting.append(errand)
        elif shard is not None and shard.connection is not None:
            errand.shard = shard
            errand.send(shard.connection, asking=True)
        else:
            if shard is None:
                shard = self._guests[node] = self._new_shard(node, frozenset())
                shard.begin()
            self._asking[node] = [errand]
            self._spawn(self._ask_when_reachable(node, shard))

    async def _ask_when_reachable(self, node: Node, shard: BrokerShard) -> None:
        try:
            with contextlib.suppress(BrokerUnavailable):
                await shard.wait_reachable(OWNER_WAIT_S)
        finally:
            for errand in self._asking.pop(node):
                if shard.connection is None:
                    errand.fail(shard.lost_reason)
                else:
                    errand.shard = shard
                    errand.send(shard.connection, asking=True)

    # The table

    async def find(self, shard: BrokerShard) -> None:
        """Relocate ``shard`` if its slots have another owner. Implements broker_shard.Finder; never raises."""
        # A look that is under way may wait for this very shard, and relocates it in the end.
        if self._table is not None and not self._looking.locked():
            await self.look_again(None)

    async def look_again(self, hint: Node | None) -> None:
        """Read the table again, from the node ``hint`` if it answers. Where nobody answers, the old one holds."""
        async with self._looking:
            try:
                table = await self._ask(hint)
            except (BrokerUnavailable, BrokerUnsuitable) as error:
                logger.debug("%s", error)
                return
            if table.owners and table.owners != (self._table.owners if self._table is not None else None):
                await self._install(table)

    async def _watch(self) -> None:
        next_look = self.loop.time() + LOOK_INTERVAL_S
        while True:
            await asyncio.sleep(TICK_S)
            if self.loop.time() < next_look and not any(shard.is_suspicious for shard in self.shards):
                continue
            next_look = self.loop.time() + LOOK_INTERVAL_S
            try:
                await self.look_again(None)
            except Exception:
                logger.exception("%r: reading the slots failed; going on", self)

    async def _ask(self, hint: Node | None) -> SlotTable:
        """Ask one node after another that we are connected to, then all others at once."""
        silent_s = {
            shard.address.node: shard.connection.silent_s
            for shard in self.shards
            if shard.connection is not None and shard.address is not None
        }
        connected = sorted(silent_s, key=lambda node: (node != hint, silent_s[node]))
        shards = {shard.address.node: shard for shard in self.shards if shard.address is not None}
        if hint is not None and hint not in silent_s:
            with contextlib.suppress(BrokerUnavailable, BrokerUnsuitable):
                return await self._ask_stranger(hint)
        for node in connected:
            connection = shards[node].connection
            if connection is not None:
                with contextlib.suppress(BrokerUnavailable, BrokerUnsuitable):
                    return await self._ask_at(connection, node)
        others = [node for node in dict.fromkeys((*self._nodes, *shards)) if node not in silent_s and node != hint]
        asking = [asyncio.ensure_future(self._ask_stranger(node)) for node in others]
        error: Exception = BrokerUnavailable(f"broker {self._place}: no node of the Cluster answers")
        try:
            for answered in asyncio.as_completed(asking):
                try:
                    return await answered
                except BrokerUnsuitable as unsuitable:
                    error = unsuitable
                except BrokerUnavailable as unavailable:
                    if not isinstance(error, BrokerUnsuitable):
                        error = BrokerUnavailable(
                            f"broker {self._place}: no node of the Cluster answers: {unavailable}"
                        )
        finally:
            for task in asking:
                task.cancel()
            if asking:
                await asyncio.wait(asking)
            for task in asking:
                task.cancelled() or task.exception()
        raise error

    async def _ask_stranger(self, node: Node) -> SlotTable:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                connection = await open_connection(
                    self._template.at(*node),
                    client_name=self._client_name,
                    loop=self.loop,
                    silence_timeout_s=CONNECT_TIMEOUT_S,
                    counters=self._counters,
                )
        except TimeoutError as error:
            raise BrokerUnavailable(f"node {node[0]}:{node[1]} did not answer") from error
        try:
            if connection.server is not None and connection.server.mode != "cluster":
                raise BrokerUnsuitable(
                    f"broker {self._template.at(*node)} is no node of a Redis Cluster: name it with redis:// "
                    "(or switch cluster-enabled on)"
                )
            return await self._ask_at(connection, node)
        finally:
            await connection.disconnect(f"{self!r}: asked")

    async def _ask_at(self, connection: BrokerConnection, node: Node) -> SlotTable:
        slots = connection.call(("CLUSTER", "SLOTS"))
        info = connection.call(("CLUSTER", "INFO"))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                table = read_slot_table(await slots, node)
                epoch = int(parse_info(await info).get("cluster_current_epoch", "0"))
        except TimeoutError as error:
            raise BrokerUnavailable(f"node {node[0]}:{node[1]} did not answer") from error
        except BrokerError as error:
            raise BrokerUnsuitable(
                f"node {node[0]}:{node[1]} refuses CLUSTER SLOTS or CLUSTER INFO, which must be allowed: {error}"
            ) from error
        except (WireError, ValueError) as error:
            raise BrokerUnavailable(str(error)) from error
        finally:
            for call in (slots, info):
                call.cancelled() or call.cancel() or call.exception()
        now = self.loop.time()
        if epoch < self._epoch and now - self._epoch_seen_at < EPOCH_MEMORY_S:
            raise BrokerUnavailable(f"node {node[0]}:{node[1]} knows an older Cluster (epoch {epoch})")
        self._epoch, self._epoch_seen_at = epoch, now
        if table.nodes:
            self._nodes = table.nodes
        return table

    async def _install(self, table: SlotTable) -> None:
        """Make the shards those of ``table``: some move to other nodes, some begin, some lose their last slot."""
        present = {shard.address.node: shard for shard in self.shards if shard.address is not None}
        free = [shard for node, shard in present.items() if node not in table.owners]
        slots_of: dict[BrokerShard, frozenset[int]] = {}
        moved: list[tuple[BrokerShard, Node]] = []
        begun: list[BrokerShard] = []
        for node, slots in table.owners.items():
            shard = present.get(node)
            if shard is None:
                # After a failover all slots of a shard have one new owner.
                former = max(free, key=lambda each: len(self._slots[each] & slots), default=None)
                if former is not None and self._slots[former] & slots:
                    free.remove(former)
                    moved.append((former, node))
                    shard = former
                else:
                    guest = self._guests.get(node)
                    shard = guest if guest is not None else self._new_shard(node, slots)
                    if guest is None:
                        begun.append(shard)
            slots_of[shard] = slots
        for shard, slots in slots_of.items():
            if not shard.generation_key or slot_of(shard.generation_key) not in slots:
                shard.generation_key = f"{self._generation_prefix}:{{{tag_for(slots)}}}"
        for shard in begun:
            shard.begin()
        try:
            # A new owner gets its keys when it answers, or shows that it does not.
            await asyncio.gather(*[shard.wait_reachable(OWNER_WAIT_S) for shard in begun], return_exceptions=True)
        except BaseException:
            for shard in begun:
                await shard.close()
            raise
        gained = {
            shard: {self._owner[slot] for slot in slots - self._slots.get(shard, frozenset())} - {shard}
            for shard, slots in slots_of.items()
        }
        retired = [shard for shard in self.shards if shard not in slots_of]
        self._table = table
        self._guests = {node: guest for node, guest in self._guests.items() if guest not in slots_of}
        self._assign(slots_of)
        logger.info("broker %s: the slots have %d owners now, %d of them elsewhere than before",
                    self._place, len(self.shards), len(moved) + len(begun))  # fmt: skip
        for shard, node in moved:
            shard.relocate(self._template.at(*node))
        for shard, former_owners in gained.items():
            # Whoever has keys there must know whether they can be reached, also if that was different before.
            if any(owner.reachable != shard.reachable for owner in former_owners):
                self._changed(shard, shard.reachable, shard.reachable)
        for shard in retired:
            self._spawn(self._retire(shard))

    def _assign(self, slots_of: dict[BrokerShard, frozenset[int]]) -> None:
        self._slots = slots_of
        self.shards = list(slots_of)
        self._owner = [self._nobody] * SLOT_COUNT
        for shard, slots in slots_of.items():
            for slot in slots:
                self._owner[slot] = shard
        self._installed()

    async def _retire(self, shard: BrokerShard) -> None:
        try:
            await asyncio.sleep(_RETIRE_S)
        finally:
            if shard not in self._slots:
                await shard.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()  # a mistake of ours is reported by the loop
