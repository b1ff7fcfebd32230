"""A worker: takes openings from the queues, claims their connections, and leads frames to the right instance.

``WorkerProcess`` does that on a ProcessLayer; ``run()`` is the whole life of the process around it: import the
application, connect, lifespan startup, take openings until a signal, stop. How one connection behaves is
instance.py's business.

    opening taken --CLAIM--> claimed --GRANT--> granted      safe HTTP methods run from the claim on,
          |                     +-----CLOSED, or 5 s---> dropped      everything else from the grant
          +--ANSWER (a safe method's whole response) --> over

To handle a further kind of frame from interface servers: a branch in ``_apply``.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final, NoReturn

import channel_layer
from channel_layer.admin import AdminPortError
from channel_layer.base import ProcessLayer
from channel_layer.connection import FlowControlError
from channel_layer.encryption import Cipher, read_keys
from channel_layer.errors import BrokerUnavailable, BrokerUnsuitable, InvalidName, WireError
from channel_layer.frames import Frame, FrameKind, build_closed
from channel_layer.link import GIVEN_UP_REASONS
from channel_layer.openings import Opening, decode_opening
from channel_layer.process_layer import RedisProcessLayer
from channel_layer.process_life import (
    INTERRUPTED,
    ProcessLife,
    StatusPipe,
    WrongInput,
    fail,
    find_release,
    leave,
    unless,
)
from channel_layer.turns import Turns
from worker.application import Application, build_application
from worker.background import BackgroundChannel
from worker.instance import CURRENT_INSTANCE, Instance, Phase
from worker.lifespan import Lifespan, LifespanFailed
from worker.loading import ApplicationError, load_application, prepare_import
from worker.settings import HTTP_CHANNEL, WEBSOCKET_CHANNEL, WorkerSettings
from worker.thread_calls import loop_class

__all__ = ["GC_THRESHOLDS", "WorkerProcess", "WorkerStatistics", "run", "spare_collections"]

logger = logging.getLogger("trunkline.worker")

# Few enough that idle workers get their share. A worker that got so many takes twice as many the next time: where
# openings wait there are no idle workers, and each take costs it and the broker a wake-up.
OPENINGS_AT_ONCE: Final = 8
OPENINGS_AT_ONCE_MAX: Final = 32
# An application that answers in its first turn has more taken at once although the last take was not full: twice as
# many as it just answered so, and no more than it answers in this time, by which no idle worker would be sooner. One
# request that waits or takes longer, and the next take is OPENINGS_AT_ONCE again.
QUICK_TAKE_S: Final = 0.002
# A claim that nobody answers is given up: the interface server may be gone, or the opening an old copy.
GRANT_TIMEOUT_S: Final = 5.0
# How long a take that failed at once is held back, so that a broker that refuses does not keep the loop busy.
TAKE_RETRY_S: Final = 0.2
# A full worker of whose connections none ends for so long says that it is full: that is more than a busy moment.
FULL_WARNING_S: Final = 5.0
# WebSockets that are still here when a drain ends are closed between these parts of its time: not at once, for their
# clients connect again at once; not at its very end, for their applications clean up.
DRAIN_CLOSES_FROM: Final = 0.75
DRAIN_CLOSES_UNTIL: Final = 0.95
_DRAIN_STEP_S: Final = 0.05
# WebSockets that a stopping worker gives away at a time. One whose application was asked for a last checkpoint, and
# takes its time, holds its place so long.
MOVES_AT_ONCE: Final = 32
MOVE_PLACE_S: Final = 1.0
# After the drain timeout: for applications that were cancelled to end. Then the process goes without them.
CANCEL_TIMEOUT_S: Final = 2.0
# When all is over: for threads and tasks of the application to end. Then the process goes without them.
EXIT_TIMEOUT_S: Final = 2.0
# So many objects are made and not dropped before Python looks for cycles of garbage among them, instead of its own
# 700. A broadcast that a thousand consumers carry out at once makes some fifty objects for each of them, all alive:
# looking through them again and again took half of the worker's time (docs/decisions/0022). What cycles hold stays so
# longer: 20,000 objects are some 2 MB, and what hangs on them; what was alive by chance when Python looked, five or
# 25 times as long.
GC_THRESHOLDS: Final = (20_000, 5, 5)
# Threads for synchronous code (run_in_executor, to_thread, sync_to_async beside its one sensitive thread). Further
# calls wait for a free one. asgiref's variable overrides it.
THREADS_MAX: Final = 64
THREADS_VARIABLE: Final = "ASGI_THREADS"

_GC_THRESHOLDS_BEFORE: Final = gc.get_threshold()  # as Python starts with, whichever release

_PROTOCOLS: Final[Mapping[str, str]] = {HTTP_CHANNEL: "http", WEBSOCKET_CHANNEL: "websocket"}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatistics:
    http_count: int  # HTTP requests that hold a place
    websocket_count: int  # WebSockets that hold a place
    waiting_for_grant_count: int
    opened_count: int  # openings taken and claimed
    granted_count: int
    refused_count: int  # claims answered with CLOSED
    grant_timeout_count: int
    duplicate_count: int  # openings of connections that are here already
    unreadable_count: int  # openings and frames this release cannot read
    unknown_connection_count: int  # frames for connections that are not here (any more)
    ended_count: int
    adopted_count: int  # WebSockets that had another owner
    given_away_count: int  # WebSockets handed over when this worker stopped


class WorkerProcess:
    """Implements base.ProcessListener. ``start()`` begins to take openings, ``stop()`` ends everything."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        application: Application,
        layer: ProcessLayer,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """``state`` is the lifespan's: each scope gets a shallow copy. To be made on the worker's loop."""
        self._settings = settings
        self._application = application
        self._layer = layer
        self._state = state if state is not None else {}
        self._loop = asyncio.get_running_loop()
        # Instances run in copies of this context, not in that of the task that happened to read their frame.
        self._context = contextvars.copy_context()
        self._turns = Turns()  # of instances to which more has come than is received in one go

        # Each connection we claimed: by interface server, then by connection and epoch.
        self._peers: dict[str, dict[tuple[int, int], Instance]] = {}
        self._by_channel: dict[str, Instance] = {}
        # How many connections there are of each protocol, and may be; at the limit nothing more is taken.
        self._protocols = {**_PROTOCOLS, **{f"{name}.connect": name for name in settings.protocols}}  # by channel
        self._counts = dict.fromkeys(self._protocols.values(), 0)
        self._limits = {**dict.fromkeys(self._protocols.values(), settings.websockets_max), "http": settings.http_max}
        self._room = {name: asyncio.Event() for name in self._counts}
        self._idle = asyncio.Event()  # no connection is here
        self._idle.set()
        # Claims without an answer, oldest first, each with the loop time at which it is given up.
        self._unanswered: dict[Instance, float] = {}
        self._grant_timer: asyncio.TimerHandle | None = None
        # Connections that were over before their claim was answered, as most small GETs are, by interface server:
        # the answer is swallowed, not replied to. As many as there are claims on the way.
        self._early_ends: dict[str, set[tuple[int, int]]] = {}

        # What was taken last, while the applications of its safe requests have their first turn; and what another
        # thread saw here when it looked last (stalled_openings).
        self._beginning: Sequence[Instance] = ()
        self._seen_before: Sequence[Instance] = ()
        self._quick_count = OPENINGS_AT_ONCE  # may be taken of HTTP: see QUICK_TAKE_S

        self._takers: list[asyncio.Task[None]] = []
        self._background: list[BackgroundChannel] = []  # one for each channel that is not of connections
        self._is_stopping = False
        # While stopping: WebSockets to give away that have not had their turn, and those that have, with the time
        # when they lose their place.
        self._to_move: list[Instance] = []
        self._moving: dict[Instance, float] = {}
        self._move_timer: asyncio.TimerHandle | None = None
        self._reachable = asyncio.Event()
        self._reachable.set()
        # Why this process cannot go on.
        self._failure: asyncio.Future[BaseException] = self._loop.create_future()

        self._opened_count = 0
        self._granted_count = 0
        self._refused_count = 0
        self._grant_timeout_count = 0
        self._duplicate_count = 0
        self._unreadable_count = 0
        self._unknown_connection_count = 0
        self._ended_count = 0
        self._adopted_count = 0
        self._given_away_count = 0

    @property
    def process_id(self) -> str:
        return self._layer.process_id

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {protocol}" for protocol, count in self._counts.items())
        return f"<WorkerProcess {self._layer.process_id}: {counts}{', stopping' if self._is_stopping else ''}>"

    def statistics(self) -> WorkerStatistics:
        return WorkerStatistics(
            http_count=self._counts["http"],
            websocket_count=self._counts["websocket"],
            waiting_for_grant_count=len(self._unanswered),
            opened_count=self._opened_count,
            granted_count=self._granted_count,
            refused_count=self._refused_count,
            grant_timeout_count=self._grant_timeout_count,
            duplicate_count=self._duplicate_count,
            unreadable_count=self._unreadable_count,
            unknown_connection_count=self._unknown_connection_count,
            ended_count=self._ended_count,
            adopted_count=self._adopted_count,
            given_away_count=self._given_away_count,
        )

    def load(self) -> tuple[int, int]:
        """How many connections there are, and may be."""
        return sum(self._counts.values()), sum(self._limits.values())

    def instances(self) -> list[Instance]:
        return [instance for of_peer in self._peers.values() for instance in of_peer.values()]

    def epoch_of(self, channel: str) -> int:
        """The epoch of the connection with this reply channel here, or 0: group frames carry it."""
        current = CURRENT_INSTANCE.get(None)
        if current is not None and current.reply_channel == channel:
            return current.epoch  # perhaps handed over since
        instance = self._by_channel.get(channel)
        return instance.epoch if instance is not None else 0

    def start(self) -> None:
        """Begin to take openings, and messages of background work."""
        for channel in (*self._settings.channels, *(f"{name}.connect" for name in self._settings.protocols)):
            if channel not in self._protocols:
                background = BackgroundChannel(
                    channel,
                    application=self._application,
                    layer=self._layer,
                    state=self._state,
                    context=self._context,
                )
                background.start().add_done_callback(self._taker_done)
                self._background.append(background)
                continue
            taker = self._loop.create_task(self._take(channel), name=f"take {channel}")
            taker.add_done_callback(self._taker_done)
            self._takers.append(taker)

    async def wait_failed(self) -> BaseException:
        """Wait until this process cannot take connections any more, which should not happen; return why."""
        return await asyncio.shield(self._failure)

    async def stop(self, timeout_s: float, *, at_once: asyncio.Event | None = None) -> int:
        """Drain: take nothing more and let end what runs; return how many instances refused to end.

        Everything has ``timeout_s``. WebSockets whose applications store checkpoints are given away to other workers
        (docs/handover.md). Towards the end those that are left are closed with 1012, one after the other; at the end
        what still runs is cancelled. ``at_once`` ends the waiting early.
        """
        self._is_stopping = True
        ends_at = self._loop.time() + timeout_s
        background = asyncio.gather(*(each.stop(timeout_s, at_once=at_once) for each in self._background))
        takers, self._takers = self._takers, []
        for taker in takers:
            taker.cancel()
        # An opening that a cancelled take still hands over stays in its queue (base.take_openings).
        await asyncio.gather(*takers, return_exceptions=True)
        for instance in self._lasting():
            if instance.phase is Phase.CLAIMED:
                instance.refused("the worker stops")  # its grant will be answered with CLOSED
            elif instance.protocol == "websocket":
                self._to_move.append(instance)
        self._move_next()
        await self._wait_idle(timeout_s * DRAIN_CLOSES_FROM, at_once)
        self._to_move.clear()
        await self._close_lasting(timeout_s * (DRAIN_CLOSES_UNTIL - DRAIN_CLOSES_FROM), at_once)
        await self._wait_idle(max(0.0, ends_at - self._loop.time()), at_once)
        for instance in self.instances():
            if instance.phase is Phase.CLAIMED:
                instance.refused("the worker stops")
            else:
                instance.cancel(f"the worker stops, and {timeout_s:g} s were not enough to finish")
        if at_once is None or not at_once.is_set():
            await self._wait_idle(CANCEL_TIMEOUT_S, at_once)
        for timer in (self._grant_timer, self._move_timer):
            if timer is not None:
                timer.cancel()
        self._grant_timer = self._move_timer = None
        running = [instance for instance in self.instances() if instance.task is not None]
        for instance in running[:10]:
            logger.error("%s does not end although it was cancelled", instance.describe())
        return len(running) + sum(await background)

    def _lasting(self) -> list[Instance]:
        """What does not end by itself, as an HTTP request does: WebSockets, and connections of own protocols."""
        return [instance for instance in self.instances() if instance.protocol != "http"]

    def _move_next(self) -> None:
        """Give WebSockets away, as many at a time as have a place."""
        now = self._loop.time()
        if self._move_timer is not None:
            self._move_timer.cancel()
            self._move_timer = None
        for instance in [late for late, until in self._moving.items() if until <= now]:
            del self._moving[instance]
        while self._to_move and len(self._moving) < MOVES_AT_ONCE:
            instance = self._to_move.pop()
            if instance.phase is Phase.RUNNING and instance.begin_move(self._move_settled):
                self._moving[instance] = now + MOVE_PLACE_S
        if self._to_move and self._moving:
            self._move_timer = self._loop.call_at(min(self._moving.values()), self._move_next)

    def _move_settled(self, instance: Instance, moved: bool) -> None:
        self._given_away_count += moved
        if self._moving.pop(instance, None) is not None:
            self._move_next()

    async def _close_lasting(self, spread_s: float, at_once: asyncio.Event | None) -> None:
        """Close what is left, evenly over ``spread_s``; ``at_once`` closes the rest."""
        waiting = self._lasting()
        began_at = self._loop.time()
        count = len(waiting)
        while waiting and not self._idle.is_set():
            elapsed_s = self._loop.time() - began_at
            is_over = elapsed_s >= spread_s or (at_once is not None and at_once.is_set())
            due = count if is_over else int(count * elapsed_s / spread_s) + 1
            while waiting and count - len(waiting) < due:
                waiting.pop().shut_down()
            if waiting:
                await self._wait_idle(min(_DRAIN_STEP_S, max(0.0, spread_s - elapsed_s)), at_once)

    # Called by the layer

    def frame_received(self, peer: str, frame: Frame) -> None:
        kind = frame[0]
        if kind not in _KINDS:
            self._unreadable_count += 1
            logger.debug("frame of the kind %r from %s is not for a worker", kind, peer)
            return
        connection: int = frame[1]
        epoch: int = frame[2]
        of_peer = self._peers.get(peer)
        instance = of_peer.get((connection, epoch)) if of_peer is not None else None
        if instance is None:
            if kind in _VERDICTS and self._swallow_verdict(peer, (connection, epoch)):
                return
            self._unknown_connection_count += 1
            # Only what the other side would wait behind: a grant we gave up, events nobody will consume. The rest
            # (CREDIT, GONE, LAST, CLOSED) crossed our END on the way, and an answer to CLOSED could go on for ever.
            if kind in _ANSWERED:
                self._layer.link_send(peer, build_closed(connection, epoch))
            return
        try:
            self._apply(instance, kind, frame)
        except (FlowControlError, WireError) as error:
            self._unreadable_count += 1
            logger.error("%s is given up, its interface server %s sent: %s", instance.describe(), peer, error)
            self._layer.link_send(peer, build_closed(connection, epoch))
            instance.refused("the interface server sent what this release cannot read")

    def peer_ended(self, peer: str, reason: str) -> None:
        self._early_ends.pop(peer, None)
        of_peer = self._peers.get(peer)
        if of_peer is None:
            return
        if reason in GIVEN_UP_REASONS:
            # The interface server lives, and thinks that we do not: what it had here may be elsewhere by now.
            logger.warning("%d connections of %s are not ours any more (%s)", len(of_peer), peer, reason)
            for instance in list(of_peer.values()):
                self._unanswered.pop(instance, None)
                instance.fenced(f"this worker was taken for dead ({reason})")
            return
        logger.warning("interface server %s is gone (%s), and %d connections with it", peer, reason, len(of_peer))
        for instance in list(of_peer.values()):
            self._unanswered.pop(instance, None)
            instance.refused(f"the interface server is gone ({reason})")

    def peer_ready(self, peer: str) -> None:
        for instance in list(self._peers.get(peer, {}).values()):
            instance.link_ready()

    def broker_changed(self, reachable: bool) -> None:
        if not reachable:
            self._reachable.clear()
            # While the broker is away nobody can answer a claim.
            if self._grant_timer is not None:
                self._grant_timer.cancel()
                self._grant_timer = None
            return
        self._reachable.set()
        deadline = self._loop.time() + GRANT_TIMEOUT_S
        self._unanswered = dict.fromkeys(self._unanswered, deadline)
        self._arm_grant_timer()

    # Openings

    async def _take(self, channel: str) -> None:
        protocol = self._protocols[channel]
        room = self._room[protocol]
        wanted = OPENINGS_AT_ONCE
        while not self._is_stopping:
            free = self._limits[protocol] - self._counts[protocol]
            if free <= 0:
                room.clear()
                try:
                    async with asyncio.timeout(FULL_WARNING_S):
                        await room.wait()
                except TimeoutError:
                    flag = "--concurrency" if protocol == "http" else "--max-websockets"
                    count = self._counts[protocol]
                    logger.warning("nothing is taken before one of %d %s connections ends: %s", count, protocol, flag)
                    await room.wait()
                continue
            await self._reachable.wait()
            if protocol == "http":
                wanted = max(wanted, self._quick_count)
            try:
                taken = await self._layer.take_openings(channel, min(wanted, free))
            except BrokerUnavailable as error:
                logger.debug("no openings of %s: %s", channel, error)
                await asyncio.sleep(TAKE_RETRY_S)
                continue
            wanted = OPENINGS_AT_ONCE if len(taken) < wanted else min(wanted * 2, OPENINGS_AT_ONCE_MAX)
            self._open_all(protocol, taken)

    def _open_all(self, protocol: str, taken: list[bytes]) -> None:
        # Not in _take: there its last instances would stay, as variables, until the next ones come.
        opened = [instance for data in taken if (instance := self._open(protocol, data)) is not None]
        is_any_started = False
        for instance in opened:
            if instance.is_safe:
                instance.start()
                is_any_started = True
            else:
                self._unanswered[instance] = self._loop.time() + GRANT_TIMEOUT_S
                self._arm_grant_timer()
                instance.claim()
        if is_any_started:
            # Behind their first turn: then the answer of an application that does not wait is the claim.
            self._beginning = opened
            self._loop.call_soon(self._first_turns_over, opened, perf_counter())

    def _first_turns_over(self, instances: list[Instance], began_at: float) -> None:
        self._beginning = ()
        are_answered = True
        for instance in instances:
            if instance.phase is not Phase.ENDED:
                are_answered = False
                instance.claim()
        if not are_answered:
            self._quick_count = OPENINGS_AT_ONCE
            return
        count = len(instances)
        in_time = int(count * QUICK_TAKE_S / max(perf_counter() - began_at, 1e-6))
        self._quick_count = max(OPENINGS_AT_ONCE, min(2 * count, in_time, OPENINGS_AT_ONCE_MAX))

    def stalled_openings(self) -> list[tuple[str, int, int]]:
        """Openings taken before the last call, whose claims have not left: the loop stands in a first turn since.

        Called on another thread, again and again, while the loop runs or does not.
        """
        beginning = self._beginning
        if not beginning or beginning is not self._seen_before:
            self._seen_before = beginning
            return []
        return [(instance.peer, instance.connection, instance.epoch) for instance in beginning]

    def _taker_done(self, taker: asyncio.Task[None]) -> None:
        error = taker.exception() if not taker.cancelled() else None
        if error is not None and not self._failure.done():
            self._failure.set_result(error)

    def _open(self, protocol: str, data: bytes) -> Instance | None:
        """Make the instance of an opening; None if there is nothing to claim."""
        try:
            opening = decode_opening(data)
            if opening.scope.get("type") != protocol:
                raise WireError(f"an opening of {protocol} has a scope of {opening.scope.get('type')!r}")
            key = (opening.connection, opening.epoch)
            of_peer = self._peers.get(opening.interface)
            if of_peer is not None and key in of_peer:
                # A retry, or a broker that went back in time. The first copy has claimed it.
                self._duplicate_count += 1
                return None
            if not opening.is_handover:  # else it comes with ADOPT
                self._complete_scope(opening)
            instance = Instance(
                opening,
                application=self._application,
                link=self._layer,
                loop=self._loop,
                close_timeout_s=self._settings.close_timeout_s,
                ended=self._instance_ended,
                context=self._context,
                turns=self._turns,
            )
        except (WireError, FlowControlError) as error:
            # Its interface server will miss a claim, and refuse the client after --queue-timeout.
            self._unreadable_count += 1
            logger.error("an opening is dropped: %s", error)
            return None
        except Exception:
            # A fault of ours, or a scope that no release of ours writes; the next one must be taken all the same.
            self._unreadable_count += 1
            logger.exception("an opening is dropped")
            return None
        if of_peer is None:
            of_peer = self._peers.setdefault(opening.interface, {})
        of_peer[key] = instance
        self._by_channel[opening.reply_channel] = instance
        self._counts[protocol] += 1
        self._idle.clear()
        self._opened_count += 1
        return instance

    def _complete_scope(self, opening: Opening) -> None:
        """Add what only this process knows; msgpack's lists become the tuples that servers give elsewhere."""
        scope = opening.scope
        if scope["type"] in ("http", "websocket"):
            headers = scope.get("headers")
            if type(headers) is not list:
                raise WireError(f"the scope of an opening has headers {headers!r:.80}")
            # Applications put pairs into sets, and compare them with tuples.
            scope["headers"] = [tuple(pair) for pair in headers]
        for name in ("client", "server"):
            address = scope.get(name)
            if address is not None:
                scope[name] = tuple(address)
        # ASGI "Lifespan State": a shallow copy for each, so that what a request adds is its own.
        scope["state"] = dict(self._state)

    def _instance_ended(self, instance: Instance) -> None:
        self._ended_count += 1
        if self._unanswered:
            self._unanswered.pop(instance, None)
        if self._moving and self._moving.pop(instance, None) is not None:
            self._move_next()
        of_peer = self._peers[instance.peer]
        del of_peer[instance.connection, instance.epoch]
        if not of_peer:
            del self._peers[instance.peer]
        if self._by_channel.get(instance.reply_channel) is instance:
            del self._by_channel[instance.reply_channel]
        if instance.is_verdict_due:
            self._early_ends.setdefault(instance.peer, set()).add((instance.connection, instance.epoch))
        self._counts[instance.protocol] -= 1
        room = self._room[instance.protocol]
        if not room.is_set():
            room.set()
        if not self._peers:
            self._idle.set()

    # Frames

    def _swallow_verdict(self, peer: str, key: tuple[int, int]) -> bool:
        early = self._early_ends.get(peer)
        if early is None or key not in early:
            return False
        early.remove(key)
        if not early:
            del self._early_ends[peer]
        return True

    def _apply(self, instance: Instance, kind: int, frame: Frame) -> None:
        if kind == FrameKind.EVENT or kind == FrameKind.PIECE:
            instance.event_received(kind, frame[3])
        elif kind == FrameKind.CREDIT:
            instance.credit_received(frame[3])
        elif kind == FrameKind.GRANT:
            self._granted_count += 1
            self._unanswered.pop(instance, None)
            instance.grant()
        elif kind == FrameKind.GONE:
            instance.client_gone()
        elif kind == FrameKind.LAST:
            instance.last_received(frame[3])
        elif kind == FrameKind.ADOPT:
            self._adopt(instance, frame)
        elif kind == FrameKind.RELEASED:
            instance.released(frame[3])
        else:  # CLOSED
            self._unanswered.pop(instance, None)
            if not instance.granted:
                self._refused_count += 1
            instance.refused("the interface server has closed the connection")

    def _adopt(self, instance: Instance, frame: Frame) -> None:
        opening = decode_opening(frame[3])
        self._complete_scope(opening)
        instance.adopt(opening.scope, frame[4], frame[5])
        self._unanswered.pop(instance, None)
        self._granted_count += 1
        self._adopted_count += 1

    def _arm_grant_timer(self) -> None:
        if self._grant_timer is None and self._unanswered and self._reachable.is_set():
            first = next(iter(self._unanswered.values()))
            self._grant_timer = self._loop.call_at(first, self._give_up_claims)

    def _give_up_claims(self) -> None:
        self._grant_timer = None
        now = self._loop.time()
        for instance in [late for late, deadline in self._unanswered.items() if deadline <= now]:
            del self._unanswered[instance]
            if not self._layer.peer_is_reachable(instance.peer):
                # One of the shards between us is away, or hangs and is not given up yet: nobody can answer.
                self._unanswered[instance] = now + GRANT_TIMEOUT_S
                continue
            self._grant_timeout_count += 1
            logger.warning(
                "%s is given up: its interface server did not answer the claim in %g s",
                instance.describe(),
                GRANT_TIMEOUT_S,
            )
            instance.refused("the claim was not answered")
        self._arm_grant_timer()

    async def _wait_idle(self, timeout_s: float, at_once: asyncio.Event | None) -> None:
        waits = [self._loop.create_task(self._idle.wait())]
        if at_once is not None:
            waits.append(self._loop.create_task(at_once.wait()))
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


# Frames about a connection that come from interface servers, as ints: a frame's kind is one.
_KINDS: Final = frozenset(
    int(kind)
    for kind in (
        FrameKind.GRANT,
        FrameKind.CLOSED,
        FrameKind.EVENT,
        FrameKind.PIECE,
        FrameKind.LAST,
        FrameKind.GONE,
        FrameKind.CREDIT,
        FrameKind.ADOPT,
        FrameKind.RELEASED,
    )
)
_VERDICTS: Final = (int(FrameKind.GRANT), int(FrameKind.CLOSED))
_ANSWERED: Final = frozenset(
    int(kind) for kind in (FrameKind.GRANT, FrameKind.ADOPT, FrameKind.EVENT, FrameKind.PIECE)
)


# The life of the process


def run(settings: WorkerSettings) -> int:
    """Run a worker until SIGTERM or SIGINT; return the exit status.

    0 a clean stop, 1 it could not run or not stop cleanly, 2 wrong input; what was wrong is one line on stderr. A
    second signal ends the process at once, and so does an application that cannot be ended, without returning.
    """
    pipe = StatusPipe(os.environ)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            status = 1
            try:
                status = runner.run(_serve(settings, pipe))
            # Said here, not behind the Runner, which waits for the application's tasks and threads.
            except ApplicationError as error:
                if error.details:
                    print(error.details, file=sys.stderr)
                status = fail(error, 2, pipe=pipe)
            except (BrokerUnsuitable, WrongInput) as error:
                status = fail(error, 2, pipe=pipe)
            except (BrokerUnavailable, LifespanFailed, AdminPortError) as error:
                status = fail(error, 1, pipe=pipe)
            finally:
                _limit_exit(runner.get_loop(), status or 1)
        return status
    except KeyboardInterrupt:  # before the signal handlers were there
        return fail("interrupted", 1, pipe=pipe)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # not made for every platform
        return loop_class(asyncio.SelectorEventLoop)
    return loop_class(uvloop.Loop)


async def _serve(settings: WorkerSettings, pipe: StatusPipe) -> int:
    loop = asyncio.get_running_loop()
    threads = os.environ.get(THREADS_VARIABLE, "")
    threads_max = int(threads) if threads.isdigit() and int(threads) else THREADS_MAX
    loop.set_default_executor(ThreadPoolExecutor(threads_max, "application"))
    layer = _build_layer(settings)
    # Before the import: an application may ask for its layer at module level.
    channel_layer.install_process_layer(layer)
    prepare_import(settings.app_dir)
    # On the running loop, as elsewhere: an application may create what needs one at module level. One for WSGI knows
    # of none, and may do what is refused where one runs: query a database with Django, call asyncio.run().
    if settings.interface == "wsgi":
        asyncio._set_running_loop(None)
    try:
        candidate = load_application(settings.application, factory=settings.factory)
    finally:
        asyncio._set_running_loop(loop)
    application = build_application(candidate, settings.interface, threads=settings.threads)
    lifespan = Lifespan(application, mode=settings.lifespan)
    process = WorkerProcess(settings, application=application, layer=layer, state=lifespan.state)
    layer.epoch_of = process.epoch_of
    layer.stalled_openings = process.stalled_openings
    # From here on signals are ours; until here they end the process as they end any Python.
    life = ProcessLife(
        "worker",
        pipe=pipe,
        admin_host=settings.admin_host,
        admin_port=settings.admin_port,
        hang_timeout_s=settings.hang_timeout_s,
    )
    await life.start()
    await layer.start(process)  # before the lifespan, which may use the layer
    try:
        is_clean = await _serve_connections(settings, lifespan, process, layer, life)
    finally:
        if not await leave(layer, life.at_once):
            logger.warning("the other processes will find this worker gone by its lease")
        await life.close()
    if life.at_once.is_set():
        _leave_at_once(1)
    return 0 if is_clean else 1


async def _serve_connections(
    settings: WorkerSettings, lifespan: Lifespan, process: WorkerProcess, layer: RedisProcessLayer, life: ProcessLife
) -> bool:
    """From lifespan startup to lifespan shutdown; True if everything ended well. Raises LifespanFailed."""
    started = await unless(life.stop, lifespan.startup())
    if life.stop.is_set() and started is INTERRUPTED:
        return True
    process.start()
    life.serving(layer, load=process.load)
    spare_collections()
    logger.info("worker %s runs %s", process.process_id, settings.application)
    is_clean = True
    failed = await unless(life.stop, process.wait_failed())
    if isinstance(failed, BaseException):
        logger.critical("worker %s cannot take connections any more", process.process_id, exc_info=failed)
        is_clean = False
    life.draining()
    logger.info("%r stops", process)  # with its counts: what is left here is a leak
    clock = asyncio.get_running_loop().time
    timeout_s = life.drain_timeout_s(settings.drain_timeout_s)
    drain_until = clock() + timeout_s
    if await process.stop(timeout_s, at_once=life.at_once):
        is_clean = False
    # The last events of responses may be on their way, and the broker away.
    await unless(life.at_once, layer.settle(max(0.0, drain_until - clock())))
    # ASGI "Lifespan", Shutdown: behind the last connection.
    ended = await unless(life.at_once, lifespan.shutdown(settings.lifespan_shutdown_timeout_s))
    return ended is True and is_clean


def spare_collections() -> None:
    """Call when everything is loaded: what exists stays, and is not looked through any more."""
    gc.collect()
    gc.freeze()
    if gc.get_threshold() == _GC_THRESHOLDS_BEFORE:  # else the application has its own idea
        gc.set_threshold(*GC_THRESHOLDS)


def _build_layer(settings: WorkerSettings) -> RedisProcessLayer:
    try:
        return RedisProcessLayer(
            url=settings.redis_url,
            prefix=settings.prefix,
            role="worker",
            cipher=Cipher(read_keys(settings.encryption_keys)),
            version=find_release(),
            wire_version=settings.wire_version,
        )
    except (ValueError, InvalidName, ImportError) as error:  # a bad URL, prefix, key; no package to encrypt with
        raise WrongInput(str(error)) from error


def _limit_exit(loop: asyncio.AbstractEventLoop, status: int) -> None:
    """Have the process end with ``status``, EXIT_TIMEOUT_S from now, if it does not end by itself."""
    # Threads that run the application's synchronous code cannot be ended, and a task may refuse to be cancelled:
    # Python would wait for them for ever. Most are idle and end at once; this thread ends with the process then.
    threads_remain = any(not (thread.daemon or thread is threading.main_thread()) for thread in threading.enumerate())
    if threads_remain or asyncio.all_tasks(loop):
        threading.Thread(target=_leave_after, args=(EXIT_TIMEOUT_S, status), daemon=True).start()


def _leave_after(timeout_s: float, status: int) -> NoReturn:
    time.sleep(timeout_s)
    logger.error("threads or tasks of the application do not end: the worker leaves without them")
    _leave_at_once(status)


def _leave_at_once(status: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
