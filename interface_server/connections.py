"""All client connections of this process, between their sockets and the workers' links.

What lives here: the table of connections, their openings, claims, frames, and what happens when a worker or the
broker goes away. What does not: one connection (client_connection.py), when an opening is overdue
(openings_watch.py), what a group's message means for its members (group_delivery.py), sockets.

A frame is answered with CLOSED when it speaks about a connection, an epoch or an owner that is not (or no more)
held here; that is how a worker learns that it lost a race, or that what it runs is nobody's. CLOSED and END are
never answered, so two processes cannot say CLOSED to each other for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, Protocol

from channel_layer.base import ProcessLayer, Stored
from channel_layer.broker_connection import WritesRefused
from channel_layer.codec import decode_event, encode_event
from channel_layer.connection import EVENT_COST_MIN_BYTES
from channel_layer.errors import BrokerUnavailable, ChannelFull
from channel_layer.frames import (
    SINCE_VERSION_2,
    WIRE_VERSION,
    Frame,
    FrameKind,
    Outcome,
    build_closed,
    build_released,
)
from channel_layer.openings import NO_BODY, NO_BODY_ENCODED, SAFE_METHODS, pack_opening
from interface_server.broadcast import Broadcast, BroadcastMemory, BroadcastMemoryStatistics, FanOut, FanOutStatistics
from interface_server.client import Client, Refusal
from interface_server.client_connection import UNCLAIMED, ClientConnection, Run, State
from interface_server.closing_pace import STEP_S, ClosingPace
from interface_server.group_delivery import GroupDelivery
from interface_server.handover import FURTHER_TRIES_MAX, HandoverMode, NextStep
from interface_server.moves import Moves, MovesStatistics
from interface_server.openings_watch import Decision, Look, OpeningsWatch, OpeningsWatchStatistics
from interface_server.settings import InterfaceSettings

__all__ = ["Connections", "ConnectionsStatistics"]

_LOGGER: Final = logging.getLogger("trunkline.interface")

_CHANNELS: Final = {"http": "http.request", "websocket": "websocket.connect"}
_STREAM: Final = frozenset({int(FrameKind.EVENT), int(FrameKind.PIECE)})
# How soon an opening is stored again after a failure of a broker that is said to be reachable; ``broker_wait_s``
# ends the tries.
_PUSH_AGAIN_S: Final = 0.25

_OUTCOMES: Final = {int(outcome): outcome for outcome in Outcome}


class Timer(Protocol):
    def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionsStatistics:
    http_open: int  # clients whose exchange is not over
    websocket_open: int
    own_open: int  # of protocols beside HTTP and WebSocket
    leaving: int  # the client is gone, the instance not yet
    opened_total: int
    parked: int  # wait for the broker
    openings: OpeningsWatchStatistics
    moves: MovesStatistics  # WebSockets between two workers
    run_again: int  # connections whose worker was lost, or gave them back, before it answered
    refused: dict[str, int]  # by name of the Refusal
    dropped: dict[str, int]  # messages of groups and frames, by reason
    memory: BroadcastMemoryStatistics  # messages of groups that wait for their clients
    fan_out: FanOutStatistics
    pushes: int  # openings stored, repeated ones included
    frames_answered_closed: int


class Connections:
    """Implements ProcessListener and, as ``deliver``, LocalDelivery. All calls on the layer's loop."""

    def __init__(
        self,
        layer: ProcessLayer,
        settings: InterfaceSettings,
        *,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] | None = None,
        call_later: Callable[..., Timer] | None = None,
    ) -> None:
        self.layer = layer
        self.settings = settings
        self._loop = loop
        self._clock = loop.time if clock is None else clock
        self._call_later: Callable[..., Timer] = loop.call_later if call_later is None else call_later
        self._reply_prefix = f"interface.{layer.process_id}!"
        self._last_number = 0
        # Every connection that frames may speak about. Bounded by the sockets, and the instances workers run.
        self._connections: dict[int, ClientConnection] = {}
        # Those that may be members of groups, for they have a client and may have an owner, by reply channel.
        self._reply_channels: dict[str, ClientConnection] = {}
        self._peers: dict[str, set[ClientConnection]] = {}  # by the worker that owns them
        self._waiting_for_link: dict[str, set[ClientConnection]] = {}  # by the worker whose link is congested
        # Wait for the broker, with the time they give up. At most ``opening_capacity``: what comes then is refused
        # at once, as by a full channel.
        self._parked: dict[ClientConnection, float] = {}
        self._parked_timer: Timer | None = None
        self._watch = OpeningsWatch(queue_timeout_s=settings.queue_timeout_s)
        self._watch_timer: Timer | None = None
        self._watch_period_s = min(1.0, settings.queue_timeout_s / 4)
        self._readers = self._READERS
        self.handover_mode = HandoverMode(settings.handover)
        if settings.wire_version < WIRE_VERSION:  # and does as a release that knows no more
            self._readers = {k: read for k, read in self._READERS.items() if k not in SINCE_VERSION_2}
            self.handover_mode = HandoverMode.NEVER
        self._moves: Moves[ClientConnection] = Moves(timeout_s=settings.handover_timeout_s)
        self._moves_timer: Timer | None = None
        self._calls: set[asyncio.Future[Any]] = set()  # calls of the broker under way; asyncio keeps weak references
        self.memory = BroadcastMemory(
            client_bytes_max=settings.client_buffer_bytes_max, total_bytes_max=settings.buffer_memory_bytes_max
        )
        self._fan_out = FanOut(call_soon=loop.call_soon, clock=self._clock, hold_input=layer.hold_inbox)
        self._groups = GroupDelivery(fan_out=self._fan_out, clock=self._clock)
        self._open_count: Counter[str] = Counter()
        self._idle: asyncio.Future[None] | None = None  # somebody waits until no client is left
        self._is_stopping = False
        self._is_closed = False
        self._refused_count: Counter[str] = Counter()
        self._dropped_count: Counter[str] = Counter()
        self._push_count = 0
        self.run = Run()  # what the queue held that was written last
        self._run_again_count = 0
        self._closed_count = 0

    def __repr__(self) -> str:
        return (
            f"<Connections open={self.open_count} known={len(self._connections)} parked={len(self._parked)} "
            f"openings={len(self._watch)} workers={len(self._peers)} {self.memory!r}>"
        )

    @property
    def open_count(self) -> int:
        return self._open_count.total()

    def statistics(self) -> ConnectionsStatistics:
        return ConnectionsStatistics(
            http_open=self._open_count["http"],
            websocket_open=self._open_count["websocket"],
            own_open=self.open_count - self._open_count["http"] - self._open_count["websocket"],
            leaving=sum(connection.state is State.LEAVING for connection in self._connections.values()),
            opened_total=self._last_number,
            parked=len(self._parked),
            openings=self._watch.statistics(self._clock()),
            moves=self._moves.statistics(),
            run_again=self._run_again_count,
            refused=dict(self._refused_count),
            dropped=dict(self._dropped_count + self._groups.dropped),
            memory=self.memory.statistics(),
            fan_out=self._fan_out.statistics(),
            pushes=self._push_count,
            frames_answered_closed=self._closed_count,
        )

    # Called by the adapters

    def broker_away_s(self) -> float:
        """How long the broker was away altogether since the start; deadlines of others stand still meanwhile."""
        return self._watch.still_s(self._clock())

    def open(
        self,
        client: Client,
        *,
        protocol: str,
        scope: dict[str, Any],
        first_event: dict[str, Any] | None,
        tell_receiving: bool = False,
    ) -> ClientConnection:
        """Look for a worker that takes this connection; the client is called later, never before this returns.

        A ``protocol`` beside "http" and "websocket" is somebody's own (own_protocol.py).
        Adds ``scope["extensions"]["channel_layer"]["reply_channel"]``.
        """
        self._last_number = number = self._last_number + 1
        reply_channel = f"{self._reply_prefix}{number}"
        if first_event is NO_BODY:
            encoded: bytes | None = NO_BODY_ENCODED
        else:
            encoded = None if first_event is None else encode_event(first_event)
        connection = ClientConnection(
            hub=self,
            client=client,
            number=number,
            reply_channel=reply_channel,
            protocol=protocol,
            channel=_CHANNELS.get(protocol) or f"{protocol}.connect",
            first_bytes=0 if encoded is None else max(EVENT_COST_MIN_BYTES, len(encoded)),
            is_repeatable=protocol == "websocket"
            or (
                protocol == "http"
                and scope.get("method") in SAFE_METHODS
                and first_event is not None
                and not first_event.get("more_body", False)
            ),
        )
        extensions = scope.setdefault("extensions", {})
        extensions["channel_layer"] = {"reply_channel": reply_channel}
        if protocol == "websocket" and self.handover_mode is not HandoverMode.NEVER:
            extensions["websocket.handover"] = {}
        settings = self.settings
        connection.opening = pack_opening(
            settings.wire_version,
            self.layer.process_id,
            number,
            connection.epoch,
            reply_channel,
            scope,
            encoded,
            tell_receiving,
            settings.window_bytes,
        )
        maximum = settings.connections_max
        is_too_many = maximum > 0 and self.open_count >= maximum
        self._connections[number] = connection
        self._reply_channels[reply_channel] = connection
        self._open_count[protocol] += 1
        if protocol not in _CHANNELS:
            self._groups.has_own_protocols = True
        if self._is_stopping and protocol != "http":
            self._loop.call_soon(self._refuse, connection, Refusal.STOPPING)
        elif is_too_many:
            self._loop.call_soon(self._refuse, connection, Refusal.TOO_MANY)
        elif self.layer.broker_reachable:
            self._push(connection)
        else:
            self._park(connection)
        return connection

    # Called by the layer: ProcessListener

    def frame_received(self, peer: str, frame: Frame) -> None:
        kind = frame[0]
        try:
            if kind in _STREAM:
                connection = self._connections.get(frame[1])
                if connection is not None and connection.peer == peer and connection.epoch == frame[2]:
                    connection.event_received(kind, frame[3])
                else:
                    self._answer_closed(peer, frame[1], frame[2])
            else:
                reader = self._readers.get(kind)
                if reader is None:
                    self._dropped_count[f"frame {kind}"] += 1
                else:
                    reader(self, peer, frame)
        except Exception:
            # A fault of ours in one connection must not end the reading for all others.
            _LOGGER.exception("frame %.80r of worker %s failed", frame, peer)
            number = frame[1]
            broken = self._connections.get(number) if type(number) is int else None
            if broken is not None and broken.peer == peer:
                self.give_up(broken, Refusal.PROTOCOL)

    def peer_ended(self, peer: str, reason: str) -> None:
        owned = self._peers.pop(peer, set())
        self._waiting_for_link.pop(peer, None)
        if owned:
            _LOGGER.warning("worker %s is gone (%s): %d connections lose their application", peer, reason, len(owned))
        for connection in owned:
            # A client's answer to one of these calls may end another one of them.
            if connection.peer == peer:
                self._guarded(connection, self._owner_lost, connection)

    def peer_ready(self, peer: str) -> None:
        for connection in self._waiting_for_link.pop(peer, ()):
            if connection.peer == peer:
                self._guarded(connection, connection.flush)

    def broker_changed(self, reachable: bool) -> None:
        if not reachable:
            self._watch.stand_still(self._clock())
            return
        self._watch.go_on(self._clock())
        self._continue_moves()
        parked, self._parked = self._parked, {}
        for connection in parked:
            self._guarded(connection, self._push, connection)

    def owns_channel(self, channel: str, epoch: int) -> bool:
        """True if ``channel`` is the reply channel of a connection that is alive; epoch 0 is not fenced."""
        connection = self._reply_channels.get(channel)
        return connection is not None and epoch in (0, connection.epoch)

    # Called by the layer: LocalDelivery

    def deliver(self, channels: Collection[str], encoded: bytes) -> None:
        """Hand a message of a group, or to a reply channel, to the connections named."""
        members = []
        for channel in channels:
            connection = self._reply_channels.get(channel)
            if connection is None:
                self._dropped_count["unknown channel"] += 1
            else:
                members.append(connection)
        if members:
            self._groups.deliver(members, encoded)

    # Called by server.py

    def stop(self) -> None:
        """Open no WebSocket any more, and none of own protocols. Requests on sockets that are there still run."""
        self._is_stopping = True

    async def drain(self, timeout_s: float) -> None:
        """Let requests finish, for so long; close over most of that time what does not end by itself.

        Cancelled, it leaves the rest open.
        """
        began_at = self._clock()
        waiting = [connection for connection in self._connections.values() if connection.protocol != "http"]
        pace = ClosingPace(len(waiting), timeout_s)
        while waiting and self.open_count:
            due = pace.due(self._clock() - began_at)
            while waiting and pace.count - len(waiting) < due:
                self.give_up(waiting.pop(), Refusal.STOPPING)
            if waiting:
                await asyncio.sleep(STEP_S)
        await self.wait_idle(max(0.0, began_at + timeout_s - self._clock()))

    def cut(self) -> None:
        """End what is still open."""
        for connection in list(self._connections.values()):
            self._guarded(connection, self.dismiss, connection, Refusal.STOPPING)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no exchange is open; False if that takes longer."""
        if self.open_count:
            if self._idle is None:
                self._idle = self._loop.create_future()
            await asyncio.wait([self._idle], timeout=timeout_s)
        return not self.open_count

    def close(self) -> None:
        """Stop the timers; the layer has been stopped."""
        for timer in (self._watch_timer, self._parked_timer, self._moves_timer):
            if timer is not None:
                timer.cancel()
        self._watch_timer = self._parked_timer = self._moves_timer = None
        self._is_closed = True
        for call in self._calls:
            call.cancel()

    # Called by ClientConnection

    def over(self, connection: ClientConnection, peer: str | None) -> None:
        """``connection`` is over; ``peer`` owned it until now."""
        number = connection.number
        del self._connections[number]
        self.left(connection, peer)
        if self._parked:
            self._parked.pop(connection, None)
        element = self._watch.discard(number)
        if element is not None:
            self._remove(connection.channel, element)

    def left(self, connection: ClientConnection, peer: str | None) -> None:
        """``connection`` has lost its client or its owner, ``peer``: it can be a member of no group any more."""
        if peer is not None:
            self._disowned(connection, peer)
        if connection in self._moves:
            self._moves.discard(connection)
            self._continue_moves()
        if self._reply_channels.pop(connection.reply_channel, None) is not None:
            self.layer.forget_channels((connection.reply_channel,))
        if connection.is_counted and not connection.is_alive:
            connection.is_counted = False
            self._open_count[connection.protocol] -= 1
            if self._idle is not None and not self.open_count:
                self._idle.set_result(None)
                self._idle = None

    def adopted(self, connection: ClientConnection) -> None:
        """The next owner of ``connection`` has accepted."""
        self._moves.settled(connection, self._broker_time())

    def wait_for_link(self, connection: ClientConnection, peer: str) -> None:
        self._waiting_for_link.setdefault(peer, set()).add(connection)

    def dismiss(self, connection: ClientConnection, refusal: Refusal) -> None:
        """End ``connection`` from our side: its client is refused, its application gets a disconnect."""
        if connection.is_alive:
            self._refused_count[refusal.name] += 1
            connection.dismiss(refusal)

    def give_up(self, connection: ClientConnection, refusal: Refusal) -> None:
        """As ``dismiss``, for callers who have others to look after: never raises."""
        try:
            self.dismiss(connection, refusal)
        except Exception:
            _LOGGER.exception("%r could not be ended", connection)

    def _guarded(self, connection: ClientConnection, call: Callable[..., None], *arguments: Any) -> None:
        """One of many connections must not keep the others from what all of them are told."""
        try:
            call(*arguments)
        except Exception:
            # Nobody knows how much of it was done.
            _LOGGER.exception("%r failed", connection)
            self.give_up(connection, Refusal.PROTOCOL)

    # Frames

    def _claim(self, peer: str, frame: Frame) -> None:
        _, number, epoch = frame[:3]
        connection = self._connections.get(number)
        if connection is not None and connection.epoch == epoch:
            if connection.is_unclaimed:
                self._watch.discard(number)
                self._parked.pop(connection, None)
                if connection.is_moving:
                    if frame[3:4] != [True]:  # it does not know ADOPT
                        self._answer_closed(peer, number, epoch)
                        self._given_back(connection)
                        return
                    self._moves.found(connection)
                self._peers.setdefault(peer, set()).add(connection)
                connection.claimed(peer)
                if connection.is_moving:
                    self._continue_moves()
                return
            if connection.peer == peer:
                # The opening came twice to one worker. CLOSED would end the instance that has the grant.
                self._dropped_count["claim of the owner"] += 1
                return
        self._answer_closed(peer, number, epoch)

    def _answered(self, peer: str, frame: Frame) -> None:
        connection = self._connections.get(frame[1])
        if (
            connection is None
            or connection.epoch != frame[2]
            # The owner answers what waited longer than a turn, and unsafe methods.
            or not (connection.peer == peer or connection.state in UNCLAIMED)
        ):
            # The opening came twice and another worker was first, or the client is gone. Nobody waits for a word.
            self._dropped_count["answer nobody waits for"] += 1
            return
        self._watch.discard(connection.number)
        self._parked.pop(connection, None)
        connection.answered(frame[3], frame[4], frame[5])

    def _credit(self, peer: str, frame: Frame) -> None:
        connection = self._owned(peer, frame)
        if connection is not None:
            connection.credit_received(frame[3])

    def _receiving(self, peer: str, frame: Frame) -> None:
        connection = self._owned(peer, frame)
        if connection is not None:
            connection.receiving()

    def _ended(self, peer: str, frame: Frame) -> None:
        connection = self._connections.get(frame[1])
        if connection is not None and connection.peer == peer and connection.epoch == frame[2]:
            # An outcome of a later release is some kind of failure.
            self._end(connection, _OUTCOMES.get(frame[3], Outcome.RAISED))

    def _closed(self, peer: str, frame: Frame) -> None:
        connection = self._connections.get(frame[1])
        if connection is not None and connection.peer == peer and connection.epoch == frame[2]:
            # It gave the grant up (5 s), stops, or came back from being away and has ended its instances.
            self._owner_refused(connection)

    def _state(self, peer: str, frame: Frame) -> None:
        connection = self._owned(peer, frame)
        if connection is not None:
            connection.state_received(*frame[3:6])

    def _release(self, peer: str, frame: Frame) -> None:
        connection = self._owned(peer, frame)
        if connection is not None:
            is_moved = connection.release_requested()
            self.layer.link_send(peer, build_released(connection.number, connection.epoch, is_moved))
            if is_moved:
                self._move(connection)

    def _events(self, peer: str, frame: Frame) -> None:
        addressees, payload = frame[1], frame[2]
        event = decode_event(payload)
        broadcast = Broadcast(event) if event.get("type") == "websocket.send" else None
        for number, epoch in addressees:
            connection = self._connections.get(number)
            if connection is None or connection.peer != peer or connection.epoch != epoch:
                self._answer_closed(peer, number, epoch)
                continue
            try:
                if connection.shared_event_received(event, broadcast, payload):
                    self._fan_out.add(connection)
            except Exception:
                # As in frame_received: the others must have theirs.
                _LOGGER.exception("an event of worker %s for %r failed", peer, connection)
                self.give_up(connection, Refusal.PROTOCOL)

    def _out_of_place(self, peer: str, frame: Frame) -> None:
        self._dropped_count[f"frame {FrameKind(frame[0]).name} from a worker"] += 1

    _READERS: ClassVar[dict[int, Callable[[Connections, str, Frame], None]]] = {
        FrameKind.ANSWER: _answered,
        FrameKind.CLAIM: _claim,
        FrameKind.CLOSED: _closed,
        FrameKind.CREDIT: _credit,
        FrameKind.RECEIVING: _receiving,
        FrameKind.END: _ended,
        FrameKind.EVENTS: _events,
        FrameKind.STATE: _state,
        FrameKind.RELEASE: _release,
        FrameKind.RELEASED: _out_of_place,
        FrameKind.ADOPT: _out_of_place,
        FrameKind.GRANT: _out_of_place,
        FrameKind.LAST: _out_of_place,
        FrameKind.GONE: _out_of_place,
    }

    def _owned(self, peer: str, frame: Frame) -> ClientConnection | None:
        """Return the connection a frame speaks about, if ``peer`` owns it; else answer CLOSED."""
        connection = self._connections.get(frame[1])
        if connection is not None and connection.peer == peer and connection.epoch == frame[2]:
            return connection
        self._answer_closed(peer, frame[1], frame[2])
        return None

    def _answer_closed(self, peer: str, number: int, epoch: int) -> None:
        self._closed_count += 1
        self.layer.link_send(peer, build_closed(number, epoch))

    def _end(self, connection: ClientConnection, verdict: Outcome | Refusal) -> None:
        if isinstance(verdict, Refusal) and connection.is_alive:
            self._refused_count[verdict.name] += 1
        connection.ended(verdict)

    # From one owner to the next

    def _owner_lost(self, connection: ClientConnection) -> None:
        """Its worker is dead: docs/failure_modes.md says what follows."""
        if connection.state is not State.OWNED or not connection.is_alive:
            self._end(connection, Refusal.WORKER_LOST)
            return
        step = connection.decide_after_loss(self._clock())
        if step is NextStep.RUN_AGAIN:
            self._run_again(connection)
        elif step is NextStep.MOVE:
            self._move(connection)
        elif step is NextStep.REFUSE_SECOND:
            self._end(connection, Refusal.OWNERS_LOST)
        else:
            self._end(connection, Refusal.WORKER_LOST)

    def _owner_refused(self, connection: ClientConnection) -> None:
        """Its worker lives, and does not have it (any more)."""
        if connection.state is not State.OWNED or not connection.is_alive:
            self._end(connection, Refusal.WORKER_LOST)
        elif connection.is_moving:
            self._disowned(connection, connection.disown(State.MOVING))
            self._given_back(connection)
        elif connection.decide_after_refusal() is NextStep.RUN_AGAIN:
            self._run_again(connection)
        else:
            self._owner_lost(connection)

    def _run_again(self, connection: ClientConnection) -> None:
        self._run_again_count += 1
        self._disowned(connection, connection.disown(State.PARKED))
        connection.broker_deadline = None
        if self.layer.broker_reachable:
            self._push(connection)
        else:
            self._park(connection)

    def _move(self, connection: ClientConnection) -> None:
        self._disowned(connection, connection.disown(State.MOVING))
        self._moves.add(connection, self._broker_time())
        self._continue_moves()

    def _given_back(self, connection: ClientConnection) -> None:
        """The worker that took it does not adopt it: another one is tried, twice."""
        if connection.count_refusal() > FURTHER_TRIES_MAX:
            self.give_up(connection, Refusal.NO_SUCCESSOR)
            return
        self._look_again(connection)
        self._continue_moves()

    def _look_again(self, connection: ClientConnection) -> None:
        if connection.state is not State.MOVING:
            connection.move(State.MOVING)
        self._moves.again(connection)

    def _disowned(self, connection: ClientConnection, peer: str | None) -> None:
        owned = None if peer is None else self._peers.get(peer)
        if peer is not None and owned is not None:
            owned.discard(connection)
            if not owned:
                del self._peers[peer]

    def _continue_moves(self) -> None:
        if self.layer.broker_reachable:
            for connection in self._moves.next():
                self._guarded(connection, self._push, connection)
        deadline = self._moves.next_deadline()
        if deadline is not None and self._moves_timer is None and self.layer.broker_reachable:
            delay_s = max(0.0, deadline - self._broker_time())
            self._moves_timer = self._call_later(delay_s, self._give_moves_up)

    def _give_moves_up(self) -> None:
        self._moves_timer = None
        for connection in self._moves.overdue(self._broker_time()):
            self.give_up(connection, Refusal.NO_SUCCESSOR)
        self._continue_moves()

    def _broker_time(self) -> float:
        """A clock that stands still while the broker is away."""
        now = self._clock()
        return now - self._watch.still_s(now)

    # Openings

    def _refuse(self, connection: ClientConnection, refusal: Refusal) -> None:
        """End a connection that no worker has."""
        if connection.is_unclaimed:
            if connection.is_moving:
                refusal = Refusal.NO_SUCCESSOR
            self._refused_count[refusal.name] += 1
            connection.conclude(refusal)

    def _call(self, awaitable: Awaitable[Any], done: Callable[[asyncio.Future[Any]], None]) -> None:
        """Have ``done`` called with the finished call of the broker."""
        future = asyncio.ensure_future(awaitable, loop=self._loop)
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        future.add_done_callback(done)

    def _push(self, connection: ClientConnection) -> None:
        connection.move(State.PUSHING)
        self._push_count += 1
        opening = connection.opening_to_store()
        if connection.is_moving:
            stored = self.layer.push_opening(connection.channel, opening, exempt=True)
        else:
            stored = self.layer.push_opening(connection.channel, opening)
        stored.add_done_callback(partial(self._pushed, connection, connection.epoch))

    def _pushed(self, connection: ClientConnection, epoch: int, call: Stored) -> None:
        if call.cancelled() or self._is_closed:
            return
        if connection.epoch != epoch:
            return  # claimed, and lost again
        error = call.exception()
        if error is None:
            if connection.state is State.PUSHING:
                connection.state = State.WAITING
                self._watch.stored(connection.number, connection.channel, call.result(), self._clock())
                self._arm_watch_timer()
            elif connection.state is State.OVER and connection.opening is not None:
                # The client left meanwhile, and no worker had taken it.
                self._remove(connection.channel, call.result())
        elif connection.state is not State.PUSHING:
            pass  # claimed or gone; it was stored after all, or it does not matter
        elif isinstance(error, ChannelFull):
            self._refuse(connection, Refusal.QUEUE_FULL)
        elif isinstance(error, BrokerUnavailable) or (connection.is_moving and isinstance(error, WritesRefused)):
            # It may have been stored. Sending it again is harmless: one claim for each epoch is granted. A broker
            # that takes no writes, as a new master without replicas, is a pause for a WebSocket, as for links.
            if connection.is_moving:
                self._look_again(connection)
                self._call_later(_PUSH_AGAIN_S, self._continue_moves)
                return
            connection.move(State.PARKED)
            self._park(connection)
        else:
            _LOGGER.error("opening of %r could not be stored", connection, exc_info=error)
            self._refuse(connection, Refusal.BROKER_DOWN)

    def _push_again(self, connection: ClientConnection) -> None:
        if self._parked.pop(connection, None) is not None:
            self._push(connection)

    def _park(self, connection: ClientConnection) -> None:
        """Wait for the broker, at most ``broker_wait_s`` and at most as many as a channel has room for."""
        if len(self._parked) >= self.settings.opening_capacity or self.settings.broker_wait_s <= 0:
            self._loop.call_soon(self._refuse, connection, Refusal.BROKER_DOWN)
            return
        if connection.broker_deadline is None:
            connection.broker_deadline = self._clock() + self.settings.broker_wait_s
        self._parked[connection] = connection.broker_deadline
        self._arm_parked_timer()
        if self.layer.broker_reachable:
            # Lost and restored before we were told, so no change will wake it; or the broker refuses writes.
            self._call_later(_PUSH_AGAIN_S, self._push_again, connection)

    def _arm_parked_timer(self) -> None:
        if self._parked and self._parked_timer is None:
            delay_s = max(0.0, min(self._parked.values()) - self._clock())
            self._parked_timer = self._call_later(delay_s, self._give_parked_up)

    def _give_parked_up(self) -> None:
        self._parked_timer = None
        now = self._clock()
        for connection in [connection for connection, until in self._parked.items() if until <= now]:
            self._parked.pop(connection, None)
            self._refuse(connection, Refusal.BROKER_DOWN)
        self._arm_parked_timer()

    def _arm_watch_timer(self) -> None:
        if self._watch_timer is None and len(self._watch):
            self._watch_timer = self._call_later(self._watch_period_s, self._watch_openings)

    def _watch_openings(self) -> None:
        self._watch_timer = None
        now = self._clock()
        for look in self._watch.look(now):
            self._call(self.layer.find_openings(look.channel, look.elements), partial(self._looked, look))
        for number, decision in self._watch.timed_out(now):
            self._carry_out(number, decision)
        self._arm_watch_timer()

    def queue(self) -> tuple[int, float]:
        """How many connections wait for a worker, and for how many seconds the first of them has."""
        statistics = self._watch.statistics(self._clock())
        return statistics.waiting, statistics.oldest_s

    def openings_held(self, openings: Sequence[int]) -> None:
        """A worker has taken these, number and epoch in turn, and its application keeps it from claiming them."""
        for number, epoch in zip(openings[::2], openings[1::2], strict=True):
            connection = self._connections.get(number)
            if connection is not None and connection.epoch == epoch and connection.is_unclaimed:
                self._watch.held(number, self._clock())

    def _looked(self, look: Look, call: asyncio.Future[Any]) -> None:
        found = None if _failed(call, "looking for openings") else call.result()
        for number, decision in self._watch.answered(look, found):
            self._carry_out(number, decision)

    def _removed(self, number: int, call: asyncio.Future[Any]) -> None:
        was_there = None if _failed(call, "removing an opening") else call.result()
        decision = self._watch.removed(number, was_there, self._clock())
        if decision is not None:
            self._carry_out(number, decision)

    def _carry_out(self, number: int, decision: Decision) -> None:
        connection = self._connections.get(number)
        if connection is None:
            return
        if decision is Decision.SEND_AGAIN:
            _LOGGER.warning("opening of %r was lost; sent again", connection)
            self._push(connection)
        elif decision is Decision.REMOVE:
            element = self._watch.element(number)
            assert element is not None
            self._call(self.layer.remove_opening(connection.channel, element), partial(self._removed, number))
        elif decision is Decision.GIVE_UP_LOST:
            self._refuse(connection, Refusal.OPENING_LOST)
        elif connection.is_moving:
            # That was the queue's time. Its own may be longer, and ends it if it is over.
            self._look_again(connection)
            self._continue_moves()
        else:
            self._refuse(connection, Refusal.QUEUE_TIMEOUT)

    def _remove(self, channel: str, element: bytes) -> None:
        """Remove an opening whose client is gone. If that fails, its claim is answered with CLOSED."""
        self._call(self.layer.remove_opening(channel, element), _ignore_outcome)


def _failed(call: asyncio.Future[Any], what: str) -> bool:
    """True if the broker gave no answer; anything but its absence is logged."""
    if call.cancelled():
        return True
    error = call.exception()
    if error is not None and not isinstance(error, BrokerUnavailable):
        _LOGGER.error("%s failed", what, exc_info=error)
    return error is not None


def _ignore_outcome(call: asyncio.Future[Any]) -> None:
    _failed(call, "removing an opening")
