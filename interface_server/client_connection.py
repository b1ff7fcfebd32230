"""One client connection on its way to an application instance: its phases, its queues, its credit.

What lives here: everything that concerns one connection. What does not: the table of all of them, openings and
the broker (connections.py), bytes and sockets (http1.py, websocket.py), credit arithmetic (channel_layer).

             +--broker away--> PARKED
             |                   | ^
    (opened)-+-----------------> PUSHING --stored--> WAITING --lost--> PUSHING
                                    |                   |
                    PARKED, PUSHING, WAITING --CLAIM--> OWNED --client gone, exchange over--> LEAVING
                                    |                   |                                        |
                         refused, client gone           +--END, worker lost--> ENDING            |
                                    |                   |                        |               |
                                    v                   |  all delivered, client gone            v  END, worker lost
                                   OVER <---------------|------------------------+---------------+
                                    ^                   +--worker lost, RELEASE--> MOVING --its turn--> PUSHING
                                    +--------------------- no taker, client gone -----+

An owner that is lost before it has answered anything may be followed by another one at once (OWNED to PARKED): the
opening is sent again. A WebSocket that is handed over goes through MOVING, where it waits for its turn (moves.py);
its checkpoint and the messages behind it are in a ``Handover`` (handover.py). Each owner has an epoch of its own.

In LEAVING the instance still runs (cleaning up): the connection stays known, so that its frames are not answered
with CLOSED, but it owns nothing any more, neither a client nor memberships. In ENDING the instance is over and
the client is slow: what the instance had sent is delivered first.

The queue exists only while the client does not take events. It holds events of the instance (bounded by the
credit window) and messages of groups (bounded by ``client_buffer_bytes_max``: beyond it the client is closed).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum, IntEnum
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, cast

from channel_layer.codec import decode_event, encode_event
from channel_layer.connection import FlowControlError, IncomingEvents, OutgoingEvents
from channel_layer.enums import quick
from channel_layer.errors import WireError
from channel_layer.frames import (
    STATE_COMMIT,
    FrameKind,
    Outcome,
    build_adopt,
    build_closed,
    build_gone,
    build_grant,
)
from channel_layer.openings import Opening, decode_opening, encode_opening
from interface_server.broadcast import Broadcast, JoinedBroadcasts
from interface_server.client import Client, HttpClient, Refusal
from interface_server.handover import Handover, HandoverMode, Loss, NextStep, decide_after_loss, decide_after_refusal

if TYPE_CHECKING:
    from interface_server.connections import Connections

__all__ = ["UNCLAIMED", "ClientConnection", "Run", "State"]

_LOGGER: Final = logging.getLogger("trunkline.interface")

# What a client may send before a worker has claimed the connection; beyond it the socket is not read. Such bytes
# are held by every waiting connection, so this is less than a window.
UNCLAIMED_BYTES_MAX: Final = 64 * 1024


@quick
class State(Enum):
    PARKED = "waits for the broker"
    MOVING = "lost its worker, waits for its turn to look for another"
    PUSHING = "the opening is being stored"
    WAITING = "waits for a worker"
    OWNED = "a worker has it"
    LEAVING = "the client is gone, the instance not yet"
    ENDING = "the instance is gone, its events not all delivered"
    OVER = "nobody has it"


# Broadcasts that are written in one piece; of more, each is written for itself, until the transport is full (64 KiB).
_RUN_BYTES_MAX: Final = 32 * 1024

UNCLAIMED: Final = frozenset({State.PARKED, State.MOVING, State.PUSHING, State.WAITING})

TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    State.PARKED: frozenset({State.PUSHING, State.OWNED, State.OVER}),
    # WAITING to PUSHING: lost, sent again. A lost opening may be claimed all the same, in any of the three.
    # To MOVING: the broker did not take the opening of one that is handed over.
    State.PUSHING: frozenset({State.PARKED, State.MOVING, State.WAITING, State.OWNED, State.OVER}),
    State.WAITING: frozenset({State.PUSHING, State.MOVING, State.OWNED, State.OVER}),
    State.OWNED: frozenset({State.LEAVING, State.ENDING, State.OVER, State.MOVING, State.PARKED}),
    State.MOVING: frozenset({State.PUSHING, State.OWNED, State.OVER}),
    State.LEAVING: frozenset({State.OVER}),
    State.ENDING: frozenset({State.OVER}),
    State.OVER: frozenset(),
}


@quick
class _Held(IntEnum):
    """What stands in the queue."""

    EVENT = 0  # (EVENT, encoded event of the instance, its cost in credit)
    SHARED = 1  # (SHARED, Broadcast or event that many instances sent, its cost in credit)
    BROADCAST = 2  # (BROADCAST, Broadcast of a group, bytes)
    GROUP_EVENT = 3  # (GROUP_EVENT, event of a group, bytes)
    GROUP_CLOSE = 4  # (GROUP_CLOSE, event of a group that does not wait for accept_broadcasts(), bytes)


_Item = tuple[_Held, Any, int]
_EVENT: Final = int(FrameKind.EVENT)

_OF_GROUPS: Final = frozenset({_Held.BROADCAST, _Held.GROUP_EVENT, _Held.GROUP_CLOSE})


class Run:
    """What a queue held, to be written in one piece where the next one holds the same; behind a broadcast most do."""

    __slots__ = ("cost", "joined", "queue")

    def __init__(self, queue: deque[_Item] | None = None) -> None:
        self.queue = queue if queue is not None else deque()
        self.cost = 0  # in credit
        # None if it is not only broadcasts, or more than one write should be: the transport may pause behind any.
        self.joined: Broadcast | JoinedBroadcasts | None = None
        broadcasts = []
        size = 0
        for held, value, held_bytes in self.queue:
            if type(value) is not Broadcast:
                return
            if held is _Held.SHARED:
                self.cost += held_bytes
            broadcasts.append(value)
            size += len(value.payload)
        if broadcasts and size <= _RUN_BYTES_MAX:
            self.joined = broadcasts[0] if len(broadcasts) == 1 else JoinedBroadcasts(broadcasts)


class ClientConnection:
    """Implements ``client.Connection``; made by ``Connections.open``, and most methods are for Connections."""

    __slots__ = (
        "_accepting",
        "_client",
        "_counted",
        "_delivering",
        "_early",
        "_first_bytes",
        "_flush_wanted",
        "_handover",
        "_hub",
        "_instance_is_done",
        "_is_answered",
        "_is_repeatable",
        "_loss",
        "_made_incoming",
        "_made_outgoing",
        "_offered_count",
        "_paused",
        "_queue",
        "_reading_paused",
        "_verdict",
        "broker_deadline",
        "channel",
        "epoch",
        "is_counted",
        "number",
        "opening",
        "peer",
        "protocol",
        "reply_channel",
        "state",
    )

    def __init__(
        self,
        *,
        hub: Connections,
        client: Client,
        number: int,
        reply_channel: str,
        protocol: str,
        channel: str,
        first_bytes: int = 0,
        is_repeatable: bool = False,
    ) -> None:
        """``first_bytes``: the cost of the event that travels with the opening. ``is_repeatable``: the opening may
        run twice, and with it goes the whole request.
        """
        self.number = number
        self.reply_channel = reply_channel
        self.protocol = protocol
        self.channel = channel  # the normal channel its opening goes to
        self.epoch = 1  # how often it got an owner; fences the frames of earlier ones
        self.state = State.PARKED
        self.peer: str | None = None  # process id of the worker that owns it
        # Kept while it may have to be sent again: until it is claimed; until something was answered, if it is
        # repeatable; of a WebSocket to the end, for the next owner's scope (unless --handover never).
        self.opening: bytes | None = None
        self._is_repeatable = is_repeatable
        self._is_answered = False  # an event of an instance has arrived
        self._loss: Loss | None = None  # set when it first loses an owner
        self._handover: Handover | None = None  # see there; None for nearly all connections
        self._offered_count = 0  # messages for this owner: events behind the first
        self._hub = hub
        self._client: Client | None = client  # None in LEAVING and OVER
        self._first_bytes = first_bytes
        self._made_incoming: IncomingEvents | None = None
        self._made_outgoing: OutgoingEvents | None = None
        self._queue: deque[_Item] | None = None  # see above; None when empty, for an idle WebSocket has none
        self._early: list[_Item] | None = None  # messages of groups before accept_broadcasts()
        # So many items at the head of the queue are known to BroadcastMemory, as far as they are a group's: those
        # that were there when the client paused. The others merely wait for their turn in a fan-out.
        self._counted = 0
        self._flush_wanted = False  # FanOut will call flush_queue()
        self._paused = False  # the client's transport is full
        self._accepting = False  # messages of groups may be delivered
        self._reading_paused = False  # we told the client to stop reading
        self.is_counted = True  # among the open ones, until the client is gone
        self.broker_deadline: float | None = None  # set when it first waits for the broker
        # The instance itself completed its response; then its worker gives it the disconnect.
        self._instance_is_done = False
        self._delivering = False  # a call to the client is under way: what comes meanwhile queues behind it
        self._verdict: Outcome | Refusal | None = None  # in ENDING: what the client is told at last

    @property
    def _outgoing(self) -> OutgoingEvents:
        # Made when it is needed, as the other one: for a request that an ANSWER ends, never.
        made = self._made_outgoing
        if made is None:
            made = self._made_outgoing = OutgoingEvents(
                self.number, self.epoch, self._hub.settings.window_bytes, carried_bytes=self._first_bytes
            )
        return made

    @property
    def _incoming(self) -> IncomingEvents:
        made = self._made_incoming
        if made is None:
            made = self._made_incoming = IncomingEvents(self.number, self.epoch, self._hub.settings.window_bytes)
        return made

    def __repr__(self) -> str:
        return (
            f"<ClientConnection {self.number} {self.protocol} {self.state.name} epoch={self.epoch} peer={self.peer} "
            f"queued={len(self._queue or ())} early={len(self._early or ())} paused={self._paused}>"
        )

    # Called by the Client

    def send_event(self, event: dict[str, Any]) -> None:
        if self._client is not None:
            self.send_encoded(encode_event(event))

    def client_gone(self, event: dict[str, Any]) -> None:
        self._leave(event)

    def finished(self, event: dict[str, Any] | None = None) -> None:
        self._leave(event)

    def pause_delivery(self) -> None:
        self._paused = True

    def resume_delivery(self) -> None:
        self._paused = False
        if self._queue is not None:
            self._drain()

    def accept_broadcasts(self) -> None:
        self._accepting = True
        early, self._early = self._early, None
        if early is not None:
            self._counted += len(early)
            if self._queue is None:
                self._queue = deque(early)
            else:
                # What is queued now came behind them.
                self._queue.extendleft(reversed(early))
            self._drain()

    # Called by Connections: the application side

    @property
    def is_moving(self) -> bool:
        """True from the loss of one owner to the accept of the next one."""
        return self._handover is not None and self._handover.awaits_accept

    @property
    def is_unclaimed(self) -> bool:
        return self.state in UNCLAIMED

    @property
    def is_alive(self) -> bool:
        """True while there is a client that may get messages."""
        return self._client is not None

    @property
    def waiting_bytes(self) -> int:
        """Bytes of events that wait for the application's window."""
        return self._outgoing.waiting_bytes

    def move(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"{self!r} cannot become {state.name}"
        self.state = state

    def count_first_event(self, encoded: bytes) -> None:
        """The first event travels with the opening and counts against the window like any other."""
        admitted = self._outgoing.admit(encoded)
        assert admitted, "the first event of a connection is smaller than any window"

    def claimed(self, peer: str) -> None:
        """The first claim for this epoch came from ``peer``: it owns the connection now."""
        self.move(State.OWNED)
        self.peer = peer
        if self.is_moving:
            self._hub.layer.link_send(peer, self._build_adopt())
        else:
            if not self._is_repeatable:
                self.opening = None
            self._hub.layer.link_send(peer, build_grant(self.number, self.epoch))
        if not self._outgoing.is_empty:
            self.flush()

    def answered(self, status: int, headers: list[Any], body: bytes) -> None:
        """An ANSWER came, from the owner or from who took the opening: it is all that its instance had to say."""
        client = self._client
        if client is None:  # in LEAVING
            self.ended(Outcome.RETURNED)
            return
        if self.protocol != "http":
            self._abandon(WireError(f"an ANSWER to a {self.protocol}"))
            return
        self.opening = None
        if self._paused or self._queue is not None:
            # Within no credit, but it is short, and the last that comes for this client.
            if self.state is not State.OWNED:
                self.move(State.OWNED)
            response = {"type": "http.response", "status": status, "headers": headers, "body": body}
            flush_wanted = self._queue_item((_Held.SHARED, response, 0))
            self.ended(Outcome.RETURNED)
            if flush_wanted:
                self.flush_queue()
            return
        self._client = None
        peer, self.peer = self.peer, None
        self.state = State.OVER  # from OWNED, or what is unclaimed
        if self._early is not None:
            self._discard_held()
        self._hub.over(self, peer)
        try:
            cast(HttpClient, client).whole_response(status, headers, body)
        except Exception:
            # Nobody holds this connection any more who would end it.
            _LOGGER.exception("an answer to %r could not be delivered", client)
            client.refused(Refusal.PROTOCOL)

    def send_encoded(self, encoded: bytes) -> None:
        """Queue an encoded event for the application and send what the window allows."""
        if self.state is State.ENDING:
            return  # nobody receives any more
        self._offered_count += 1
        if self._handover is not None:
            self._handover.offered(encoded)
        peer = self.peer
        if peer is not None and not self._reading_paused and not self._hub.layer.link_is_congested(peer):
            frame = self._outgoing.pass_whole(encoded)
            if frame is not None:
                self._hub.layer.link_send(peer, frame)
                return
        self._outgoing.offer(encoded)
        self.flush()

    def flush(self) -> None:
        """Send what the window and the link allow; stop or resume reading the client accordingly."""
        outgoing = self._outgoing
        peer = self.peer
        if peer is None:
            is_full = outgoing.waiting_bytes >= UNCLAIMED_BYTES_MAX
        else:
            layer = self._hub.layer
            if layer.link_is_congested(peer):
                self._hub.wait_for_link(self, peer)
            else:
                for frame in outgoing.frames():
                    layer.link_send(peer, frame)
            is_full = not outgoing.is_empty
        client = self._client
        if is_full:
            if not self._reading_paused and client is not None:
                self._reading_paused = True
                client.pause_reading()
        elif self._reading_paused:
            self._reading_paused = False
            if client is not None:
                client.resume_reading()

    def credit_received(self, total: int) -> None:
        try:
            self._outgoing.credit(total)
        except FlowControlError as error:
            self._abandon(error)
            return
        if self._handover is not None:
            self._handover.credited(self._outgoing.credited_bytes)
        if not self._outgoing.is_empty or self._reading_paused:
            self.flush()

    def event_received(self, kind: int, payload: bytes) -> None:
        """An EVENT or PIECE of the owner."""
        try:
            complete = self._incoming.receive(kind, payload)
        except FlowControlError as error:
            self._abandon(error)
            return
        if not self._is_answered and complete is not None:
            self._first_answer()
        if self._handover is not None and self._handover.takes_events:
            self._handover_event(self._handover, complete)
        elif complete is None:
            self._send_credit(self._incoming.credit_frame())
        elif self._client is None:
            self._return_credit(complete[1])  # for an instance that sends on; it must not wait for ever
        elif self._queue is not None or self._paused or self._delivering:
            # Not paused and something queued: then a flush is under way already.
            if self._queue is None:
                self._queue = deque()
            self._queue.append((_Held.EVENT, *complete))
        else:
            self._deliver_event(*complete)
            self._drain()

    def receiving(self) -> None:
        if self._client is not None:
            self._client.application_receiving()

    def ended(self, verdict: Outcome | Refusal) -> None:
        """The instance is over, or its worker is; the client is told behind everything that has arrived."""
        if self._handover is not None and self._client is not None:
            if isinstance(verdict, Outcome) and self._handover.awaits_accept:
                verdict = Refusal.NOT_ADOPTED
            elif isinstance(verdict, Outcome):
                self._deliver_held(self._handover.ended(verdict))
            if self.state is not State.OWNED:
                return  # the last of these events ended it
        if self._queue is None or self._client is None:
            self.conclude(verdict)
        else:
            self.move(State.ENDING)
            self._verdict = verdict
            peer, self.peer = self.peer, None
            self._hub.left(self, peer)

    def conclude(self, verdict: Outcome | Refusal) -> None:
        """End the connection now and tell the client, if it still listens."""
        client, self._client = self._client, None
        peer, self.peer = self.peer, None
        self.move(State.OVER)
        self._discard_held()
        self._hub.over(self, peer)
        if client is None:
            return
        if isinstance(verdict, Refusal):
            client.refused(verdict)
        else:
            client.application_ended(verdict)

    def dismiss(self, refusal: Refusal) -> None:
        """End it from our side: the client is refused, and the application, if there is one, gets a disconnect."""
        client = self._client
        if client is None:
            return
        if self.protocol == "websocket":
            event = {"type": "websocket.disconnect", "code": refusal.close_code, "reason": refusal.reason}
        else:
            event = {"type": f"{self.protocol}.disconnect"}
        self._leave(event)
        client.refused(refusal)

    def shared_event_received(self, event: dict[str, Any], broadcast: Broadcast | None, payload: bytes) -> bool:
        """An EVENTS frame of the owner names this connection. True: have ``flush_queue`` called in its turn.

        ``broadcast`` is the event once more, if it is a websocket.send.
        """
        try:
            complete = self._incoming.receive(_EVENT, payload)
            if complete is None or complete[0] is not payload:
                raise FlowControlError(f"an event for many came in the middle of another: {self!r}")
        except FlowControlError as error:
            self._abandon(error)
            return False
        if not self._is_answered:
            self._first_answer()
        if self._client is None:
            self._return_credit(complete[1])
            return False
        if self._handover is not None and self._handover.takes_events:
            self._handover_event(self._handover, complete)
            return False
        if broadcast is None or not self._accepting:
            return self._queue_item((_Held.SHARED, event, complete[1]))
        item = broadcast.queued
        if item is None:
            item = broadcast.queued = (_Held.SHARED, broadcast, complete[1])
        return self._queue_item(item)

    # Called by Connections: from one owner to the next

    def state_received(self, received: int, flags: int, state: bytes) -> None:
        """The owner stored a checkpoint."""
        if self.protocol != "websocket" or self._client is None or not self._accepting:
            return  # the client is gone; or the refusal of a WebSocket is under way
        handover = self._handover
        if handover is None:
            if self._hub.handover_mode is HandoverMode.NEVER:
                return
            handover = self._handover = Handover(
                window_bytes=self._hub.settings.window_bytes,
                offered_count=self._offered_count,
                offered_bytes=self._outgoing.offered_bytes,
            )
        if handover.awaits_accept:
            return  # not the owner yet: it has accepted nothing
        try:
            leaving = handover.checkpoint(received, state, is_commit=bool(flags & STATE_COMMIT))
        except FlowControlError as error:
            self._abandon(error)
            return
        self._deliver_held(leaving)

    def release_requested(self) -> bool:
        """The owner stands still: True if another one may go on. What it has sent leaves, as behind a checkpoint."""
        if self._client is None or self.is_moving or not self._is_movable():
            return False
        if self._handover is not None:
            self._deliver_held(self._handover.release_held())
        return self._client is not None

    def decide_after_loss(self, now: float) -> NextStep:
        """The owner is dead: what becomes of this connection. To be carried out at once."""
        if self._loss is None:
            self._loss = Loss()
        return decide_after_loss(
            self._loss,
            now,
            is_answered=self._is_answered,
            is_repeatable=self._is_repeatable and self.opening is not None,
            is_movable=self._is_movable(),
        )

    def decide_after_refusal(self) -> NextStep:
        """The owner gave it back: what becomes of this connection. To be carried out at once."""
        if self._loss is None:
            self._loss = Loss()
        return decide_after_refusal(
            self._loss,
            is_answered=self._is_answered,
            is_repeatable=self._is_repeatable and self.opening is not None,
        )

    def count_refusal(self) -> int:
        """A worker took it and gave it back: how many did so by now."""
        assert self._handover is not None
        self._handover.try_count += 1
        return self._handover.try_count

    def disown(self, state: State) -> str:
        """Begin the next epoch, with ``state``; return the former owner. Call ``opening_to_store`` next."""
        peer = self.peer
        assert peer is not None
        self.move(state)
        self.peer = None
        self.epoch += 1
        unsent = self._outgoing.unsent()
        window_bytes = self._hub.settings.window_bytes
        # What the client has yet to take of the former owner counts within the window of the next one.
        self._made_incoming = IncomingEvents(
            self.number, self.epoch, window_bytes, carried_bytes=self._carried_bytes()
        )
        self._made_outgoing = OutgoingEvents(self.number, self.epoch, window_bytes)
        if state is State.MOVING:
            if self._handover is None:
                self._handover = Handover(window_bytes=window_bytes, offered_count=0, offered_bytes=0)
                for encoded in unsent:
                    self._handover.offered(encoded)
            unsent = self._handover.begin_epoch()
        else:
            assert self.opening is not None
            opening = replace(decode_opening(self.opening), epoch=self.epoch)
            self.opening = encode_opening(opening)
            if opening.first_event is not None:
                self.count_first_event(opening.first_event)
        for encoded in unsent:
            self._outgoing.offer(encoded)
        self._offered_count = len(unsent)
        self.flush()
        return peer

    def opening_to_store(self) -> bytes:
        """What is to go to the queue: the opening, or the short one of a connection that is handed over."""
        if not self.is_moving:
            assert self.opening is not None
            return self.opening
        return encode_opening(
            Opening(
                interface=self._hub.layer.process_id,
                connection=self.number,
                epoch=self.epoch,
                reply_channel=self.reply_channel,
                # No more than an older release wants to see before it claims: its claim tells which one it is.
                scope={"type": self.protocol, "headers": []},
                first_event=None,
                window_bytes=self._hub.settings.window_bytes,
                is_handover=True,
            )
        )

    def _is_movable(self) -> bool:
        if not self._accepting or self.opening is None or self.protocol != "websocket":
            return False
        handover = self._handover
        if handover is None or handover.state is None:
            return self._hub.handover_mode is HandoverMode.ALWAYS
        return handover.is_movable

    def _carried_bytes(self) -> int:
        queue = self._queue or ()
        return sum(item[2] for item in queue if item[0] is _Held.EVENT or item[0] is _Held.SHARED)

    def _build_adopt(self) -> bytes:
        handover, opening = self._handover, self.opening
        assert handover is not None
        assert opening is not None
        # What the client took since the epoch began is no burden to the next owner.
        carried_bytes = self._carried_bytes()
        self._made_incoming = IncomingEvents(
            self.number, self.epoch, self._hub.settings.window_bytes, carried_bytes=carried_bytes
        )
        return build_adopt(self.number, self.epoch, opening, handover.state or b"", carried_bytes)

    def _first_answer(self) -> None:
        self._is_answered = True
        if self.protocol != "websocket" or self._hub.handover_mode is HandoverMode.NEVER:
            self.opening = None

    def _handover_event(self, handover: Handover, complete: tuple[bytes, int] | None) -> None:
        """An event, or a piece of one, of an owner after a checkpoint, or of a new owner."""
        if self._client is None:
            if complete is not None:
                self._return_credit(complete[1])
            return
        if complete is None:
            self._send_credit(self._incoming.credit_frame())
            if handover.is_commit:
                self._deliver_held(handover.make_room(self._incoming.partial_bytes))
            return
        encoded, cost = complete
        try:
            event = decode_event(encoded)
        except WireError as error:
            self._abandon(error)
            return
        if handover.awaits_accept:
            self._return_credit(cost)
            if event.get("type") != "websocket.accept":
                # Its instance gets a disconnect, the client 1012.
                self._hub.give_up(self, Refusal.NOT_ADOPTED)
                return
            handover.awaits_accept = False
            handover.try_count = 0
            if handover.state is None:
                self._handover = None  # begun anew, and no different from others
            self._hub.adopted(self)
        else:
            self._deliver_held(handover.sent(event, cost))

    def _deliver_held(self, events: Sequence[tuple[dict[str, Any], int]]) -> None:
        """Queue these for the client and deliver what it takes. May end this connection."""
        if not events:
            return
        if self._queue is None:
            self._queue = deque()
        self._queue.extend((_Held.SHARED, event, cost) for event, cost in events)
        if self._paused:
            self._count_held()
        else:
            self._drain()

    # Called by Connections, FanOut and BroadcastMemory: messages of groups

    def offer_application_message(self, encoded: bytes) -> bool:
        """Send a group's message on to the application; False if too many wait for it already."""
        # Nothing can make the sender wait, so what does not fit into a second window is dropped, as on any
        # channel that is full.
        if self._outgoing.waiting_bytes > self._hub.settings.window_bytes:
            return False
        self.send_encoded(encoded)
        return True

    def queue_broadcast(self, broadcast: Broadcast) -> bool:
        item = broadcast.queued
        if item is None:
            item = broadcast.queued = (_Held.BROADCAST, broadcast, broadcast.held_bytes)
        if not self._accepting or self._paused or self._client is None:
            return self._queue_for_group(item)
        # As _queue_item, for what happens a thousand times for each message.
        if self._queue is None:
            self._queue = deque((item,))
        else:
            self._queue.append(item)
        if self._flush_wanted:
            return False
        self._flush_wanted = True
        return True

    def queue_group_event(self, event: dict[str, Any], size_bytes: int, *, before_accept: bool) -> bool:
        """Queue an event that a group sent; ``before_accept``: it does not wait for ``accept_broadcasts``."""
        if before_accept:
            return self._queue_item((_Held.GROUP_CLOSE, event, size_bytes))
        return self._queue_for_group((_Held.GROUP_EVENT, event, size_bytes))

    def flush_queue(self) -> None:
        self._flush_wanted = False
        queue, client = self._queue, self._client
        is_usual = not (self._counted or self._paused or self._delivering) and self._accepting
        if queue is None or client is None or not is_usual:
            self._drain()
            return
        run = self._hub.run
        if queue != run.queue:
            run = self._hub.run = Run(queue)
        if run.joined is None:
            self._drain()
            return
        # As _drain, for what a thousand connections hold alike.
        self._queue = None
        self._delivering = True
        try:
            client.send_broadcast(run.joined)
        finally:
            self._delivering = False
        if run.cost:
            self._return_credit(run.cost)
        self._drain()  # what came meanwhile
        if self._queue is None and self.state is State.ENDING:
            assert self._verdict is not None
            self.conclude(self._verdict)

    def unsent_bytes(self) -> int:
        return 0 if self._client is None else self._client.buffered_bytes()

    def drop_slow_client(self) -> None:
        self._hub.give_up(self, Refusal.SLOW_CLIENT)

    def failed(self) -> None:
        self._hub.give_up(self, Refusal.PROTOCOL)

    # Delivery to the client

    def _queue_for_group(self, item: _Item) -> bool:
        if self._accepting or self._queue is not None:
            # Behind what the instance has sent, which may be its accept.
            return self._queue_item(item)
        if self._client is not None:
            self._hold_early(item)
            self._hub.memory.hold(self, item[2])
        return False

    def _hold_early(self, item: _Item) -> None:
        if self._early is None:
            self._early = []
        self._early.append(item)

    def _queue_item(self, item: _Item) -> bool:
        if self._client is None:
            return False
        queue = self._queue
        if queue is None:
            queue = self._queue = deque()
        queue.append(item)
        if self._paused:
            self._count_held()
            return False
        if self._flush_wanted:
            return False
        self._flush_wanted = True
        return True

    def _count_held(self) -> None:
        """Count the queued messages of groups as held: the client does not read. May end this connection."""
        queue = self._queue
        if queue is None or len(queue) == self._counted:
            return
        if len(queue) == self._counted + 1:  # as for each message to a client that does not read: it is the last one
            held, _, size = queue[-1]
            self._counted += 1
            if held in _OF_GROUPS:
                self._hub.memory.hold(self, size)
            return
        for held, _, size in islice(queue, self._counted, None):
            self._counted += 1
            if held in _OF_GROUPS:
                self._hub.memory.hold(self, size)
                if self._queue is not queue:
                    return  # it was too much, and everything is over

    def _drain(self) -> None:
        """Deliver what is queued until the client pauses. A call from within a delivery leaves it to that one."""
        queue = self._queue
        if self._delivering or queue is None:
            return
        while queue and not self._paused and (client := self._client) is not None:
            held, value, size = queue.popleft()
            is_counted = self._counted > 0
            if is_counted:
                self._counted -= 1
            if held is _Held.EVENT:
                self._deliver_event(value, size)
                continue
            if held is _Held.SHARED:
                pass
            elif not self._accepting and held is not _Held.GROUP_CLOSE:
                self._hold_early((held, value, size))
                if not is_counted:
                    self._hub.memory.hold(self, size)
                continue
            elif is_counted:
                self._hub.memory.release(self, size)
            self._delivering = True
            try:
                if type(value) is dict:
                    if held is _Held.SHARED and value.get("more_body") is False:
                        self._note_last_body(value)
                    client.application_event(value)
                else:
                    client.send_broadcast(value)
            finally:
                self._delivering = False
            if held is _Held.SHARED:
                self._return_credit(size)
        if self._queue is not queue:
            return  # everything is over
        if queue:
            self._count_held()
            return
        self._queue = None
        if self.state is State.ENDING:
            assert self._verdict is not None
            self.conclude(self._verdict)

    def _deliver_event(self, encoded: bytes, cost: int) -> None:
        client = self._client
        assert client is not None
        try:
            event = decode_event(encoded)
        except WireError as error:
            self._abandon(error)
            return
        if event.get("more_body") is False:
            self._note_last_body(event)
        self._delivering = True
        try:
            client.application_event(event)
        finally:
            self._delivering = False
        self._return_credit(cost)

    def _note_last_body(self, event: dict[str, Any]) -> None:
        # Behind it may come trailers; and the body of a refused WebSocket is not the end of its instance.
        self._instance_is_done = self.protocol == "http" and not event.get("trailers")

    def _return_credit(self, cost: int) -> None:
        self._send_credit(self._incoming.consume(cost))

    def _send_credit(self, frame: bytes | None) -> None:
        if frame is not None and self.peer is not None:
            self._hub.layer.link_send(self.peer, frame)

    def _abandon(self, error: Exception) -> None:
        """The worker cannot be understood: it is told to forget the instance, the client is refused."""
        _LOGGER.error("%r: the worker sent what cannot be read: %s", self, error)
        if self.peer is not None:
            self._hub.layer.link_send(self.peer, build_closed(self.number, self.epoch))
        self.conclude(Refusal.PROTOCOL)

    def _discard_held(self) -> None:
        """Forget what is held; nobody will take it. The credit of events goes back, their sender may wait for it."""
        queue, self._queue = self._queue, None
        early, self._early = self._early, None
        self._counted = 0
        if queue is not None:
            cost = sum(item[2] for item in queue if item[0] is _Held.EVENT or item[0] is _Held.SHARED)
            if cost:
                self._return_credit(cost)
        if queue is not None or early is not None:
            self._hub.memory.forget(self)

    def _leave(self, event: dict[str, Any] | None) -> None:
        if self._client is None:
            return
        self._client = None
        if self.state is not State.OWNED:
            # Nobody to tell: not claimed yet (a claim that comes now is answered with CLOSED), or ended already.
            self.move(State.OVER)
            self._discard_held()
            self._hub.over(self, None)
            return
        self.move(State.LEAVING)
        self._discard_held()
        self._hub.left(self, None)
        if event is not None and not self._instance_is_done:
            self._outgoing.offer_last(encode_event(event))
            self.flush()
            if not self._outgoing.is_empty:
                assert self.peer is not None
                self._hub.layer.link_send(self.peer, build_gone(self.number, self.epoch))
