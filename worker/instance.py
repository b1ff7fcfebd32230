"""One running call of the application for one client connection.

An ``Instance`` stands between the frames of a link and the ``scope``, ``receive()`` and ``send()`` of the
application. It keeps the order of events, waits for credit, and decides when ``send()`` fails and when the call is
cancelled. Which connections there are, and which frame is for which, is process.py's business; what an application
may send is events.py's.

    CLAIMED --start()--> RUNNING --the call is over--> FINISHING --its events have left--> ENDED
       +---- refused() ------------------------------------------------------------------> ENDED

Safe HTTP methods start with the claim, everything else with the grant (process.py calls ``start()``). While
FINISHING, what the application sent still waits for the client to read it; END follows it.

The claim of a safe method leaves behind the first turn of its application (process.py calls ``claim()``), or before
the first frame that leaves earlier. An application that by then has sent a whole short response and returned, as
most that answer from memory do, leaves one frame, ANSWER, in place of all the others. Later, or behind a grant, it
stands for such a response and END, if the application returns in the turn in which it sends the response.

A WebSocket may be handed over to another worker (moving.py). An instance that gave its connection away is cancelled
without a disconnect event; one that takes it up gets scope and checkpoint with ``adopt()`` in place of ``grant()``.

What the other side may do at any time:

    GONE    send() fails from now on; events may still follow, and LAST does
    LAST    the disconnect event: receive() returns it, behind the events before it, for ever
    CLOSED, or the end of the link: both at once, and nothing is answered any more
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import math
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import CodeType
from typing import Any, Final, Protocol, TypeGuard, cast

from channel_layer.codec import decode_event, decode_message, encode_event
from channel_layer.connection import EVENT_COST_MIN_BYTES, IncomingEvents, OutgoingEvents
from channel_layer.enums import quick
from channel_layer.frames import (
    STATE_COMMIT,
    STATE_NOTIFY,
    WIRE_VERSION_PREVIOUS,
    FrameKind,
    Outcome,
    build_answer,
    build_claim,
    build_end,
    build_receiving,
    build_release,
    build_state,
)
from channel_layer.openings import NO_BODY, NO_BODY_ENCODED, SAFE_METHODS, Opening
from channel_layer.turns import Turns
from worker.application import Application, Scope
from worker.events import Checkpoint, ClientDisconnected, HttpEvents, SentEvents, State, WebSocketEvents
from worker.moving import REQUEST, Moving
from worker.own_events import OwnEvents

__all__ = ["TURN_EVENTS_MAX", "Instance", "InstanceStatistics", "Link", "Phase", "describe_wait"]

logger = logging.getLogger("trunkline.worker")

# The WebSocket whose application runs here; also for tasks that it leaves behind. What they do to the groups of its
# reply channel is fenced by the epoch they were started under, and handover.py finds it.
CURRENT_INSTANCE: Final[contextvars.ContextVar[Instance]] = contextvars.ContextVar("CURRENT_INSTANCE")

_HTTP_DISCONNECT: Final = {"type": "http.disconnect"}
_EMPTY_BODY: Final = {"type": "http.response.body", "body": b"", "more_body": True}

# Enough to see which line of the application called which library; a whole chain through middleware is a page.
_WAIT_FRAMES_SHOWN: Final = 4

# Events that receive() returns one after the other without the others having a turn: some 30 us each with what the
# application does. A window holds 4096 of a client that floods us, and an application that never has to wait would
# have the loop for all of them. Behind these it waits for a turn, as all others that have as much (turns.py).
TURN_EVENTS_MAX: Final = 32

# An application that is to be asked for its latest state, and does not come back to receive() for so long, is taken
# for one that only sends, if it has stored a checkpoint behind the last message. Else it may still owe an answer.
PUSHING_AFTER_S: Final = 5.0

# A longer response leaves as events, within the client's credit, which an ANSWER does not ask for.
_ANSWER_BYTES_MAX: Final = 16 * 1024


class Link(Protocol):
    """What an instance needs of base.ProcessLayer."""

    def link_send(self, peer: str, frame: bytes) -> int: ...

    def link_send_event(self, peer: str, connection: int, epoch: int, payload: bytes, behind: int) -> int: ...

    def link_is_congested(self, peer: str) -> bool: ...


@quick
class Phase(Enum):
    CLAIMED = "claimed"
    RUNNING = "running"
    FINISHING = "finishing"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStatistics:
    phase: Phase
    claimed: bool  # we have said so
    granted: bool
    sent: State  # how far the application has answered
    arrived_count: int  # events that wait for receive()
    unsent_count: int  # calls of send() that wait for credit
    unsent_bytes: int  # of encoded events that wait for credit


class _Sending:
    """One call of send() whose events have not all left."""

    __slots__ = ("events", "waiter")

    def __init__(self, events: Iterator[dict[str, Any] | bytes], waiter: asyncio.Future[None] | None) -> None:
        self.events = events  # bytes: a frame that is built already
        self.waiter = waiter  # None: nobody waits for these


class Instance:
    """See the module's docstring. Used on the worker's loop only; ``ended`` is called once, at the very end."""

    __slots__ = (
        "__weakref__",
        "_answer",
        "_application",
        "_arrived",
        "_asking",
        "_close_timeout_s",
        "_close_timer",
        "_context",
        "_disconnect",
        "_ended",
        "_first_bytes",
        "_is_cancelled",
        "_is_claimed",
        "_is_commit",
        "_is_frozen",
        "_is_handover",
        "_is_held",
        "_is_shut_down",
        "_latest_state",
        "_link",
        "_loop",
        "_made_incoming",
        "_made_outgoing",
        "_may_answer",
        "_moved",
        "_moving",
        "_outcome",
        "_received_count",
        "_receivers",
        "_refusal",
        "_sent",
        "_sent_at",
        "_task",
        "_tell_receiving",
        "_turn_left",
        "_turns",
        "_unsent",
        "_window_bytes",
        "connection",
        "epoch",
        "granted",
        "is_safe",
        "peer",
        "phase",
        "protocol",
        "reply_channel",
        "scope",
    )

    def __init__(
        self,
        opening: Opening,
        *,
        application: Application,
        link: Link,
        loop: asyncio.AbstractEventLoop,
        close_timeout_s: float,
        ended: Callable[[Instance], None],
        context: contextvars.Context | None = None,
        turns: Turns | None = None,
    ) -> None:
        """``turns``: of all instances of the worker. Raises FlowControlError or WireError if the first event of the
        opening is not one.
        """
        self.peer = opening.interface
        self.connection = opening.connection
        self.epoch = opening.epoch
        self.reply_channel = opening.reply_channel
        self.scope: Scope = opening.scope
        self.protocol: str = opening.scope["type"]
        self.is_safe = self.protocol == "http" and opening.scope.get("method") in SAFE_METHODS
        self.phase = Phase.CLAIMED
        self.granted = False

        self._application = application
        self._link = link
        self._loop = loop
        self._context = context
        self._ended = ended
        self._close_timeout_s = close_timeout_s
        self._task: asyncio.Task[None] | None = None
        self._close_timer: asyncio.TimerHandle | None = None
        self._outcome: Outcome | None = None  # set when the call is over
        self._is_cancelled = False  # by us: so its CancelledError is no error
        self._is_shut_down = False  # the worker stops
        self._is_claimed = False  # CLAIM has left, or what takes its place
        self._may_answer = opening.version > WIRE_VERSION_PREVIOUS  # else its interface server knows no ANSWER
        # A whole response that may still become an ANSWER: its start and its body.
        self._answer: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._is_held = True  # False: the interface server holds this connection no more, nothing is answered

        # From one worker to another.
        self._is_handover = opening.is_handover  # it had an owner: adopt() will come, not grant()
        self._moving: Moving | None = None  # None: no checkpoint yet, and the worker does not stop
        self._moved: Callable[[Instance, bool], None] | None = None  # told whether it was given away
        # Asked when the worker stops, in place of receive(), in the context of whoever stored it.
        self._latest_state: tuple[Callable[[], Any], contextvars.Context] | None = None
        self._is_commit = False  # as of the last store_state()
        self._asking: asyncio.Task[None] | None = None  # asks it
        self._is_frozen = False  # nothing is received or sent until the interface server has said who has it
        # Messages that receive() has returned, as the interface server counts them: without websocket.connect.
        self._received_count = 0 if opening.first_event is None else -1

        # Towards the application. Lists, not deques: 20,000 idle WebSockets would hold 12 MB of empty deques, and
        # the window bounds the list to some thousand entries, of which pop(0) costs half a microsecond.
        self._window_bytes = opening.window_bytes
        self._first_bytes = 0
        self._made_incoming: IncomingEvents | None = None
        self._made_outgoing: OutgoingEvents | None = None
        self._arrived: list[tuple[dict[str, Any], int]] = []  # bounded by the window; full: the peer sends no more
        self._disconnect: dict[str, Any] | None = None  # the last event, from then on receive() returns copies of it
        self._receivers: list[asyncio.Future[None]] = []  # one for each receive() that waits
        self._tell_receiving = opening.tell_receiving
        self._turns = Turns(loop.call_soon) if turns is None else turns
        self._turn_left = TURN_EVENTS_MAX  # events that receive() may still return without waiting

        # Towards the client. ``_outgoing`` holds encoded events beyond the credit, one call's at most; further
        # calls of send() wait in ``_unsent``, one entry each: the application bounds them by awaiting.
        extensions = self.scope.get("extensions") or {}
        self._sent: SentEvents
        if self.protocol == "http":
            self._sent = HttpEvents(extensions)
        else:
            self._sent = WebSocketEvents(extensions) if self.protocol == "websocket" else OwnEvents(self.protocol)
        self._unsent: list[_Sending] = []
        self._refusal: str | None = None  # why send() raises ClientDisconnected
        # The position in what leaves on the link of our last frame of those whose order counts: events, checkpoints.
        self._sent_at = 0

        if opening.first_event == NO_BODY_ENCODED:
            self._first_bytes = EVENT_COST_MIN_BYTES  # counts as arrived
            self._arrived.append((NO_BODY, EVENT_COST_MIN_BYTES))
        elif opening.first_event is not None:
            self.event_received(FrameKind.EVENT, opening.first_event)

    @property
    def _outgoing(self) -> OutgoingEvents:
        # Made when it is needed, as the other one: for a request that an ANSWER ends, never.
        made = self._made_outgoing
        if made is None:
            made = self._made_outgoing = OutgoingEvents(self.connection, self.epoch, self._window_bytes)
        return made

    @property
    def _incoming(self) -> IncomingEvents:
        made = self._made_incoming
        if made is None:
            made = self._made_incoming = IncomingEvents(
                self.connection, self.epoch, self._window_bytes, carried_bytes=self._first_bytes
            )
        return made

    def __repr__(self) -> str:
        return (
            f"<Instance {self.describe()} {self.peer}!{self.connection} epoch {self.epoch} {self.phase.value}"
            f"{'' if self.granted else ', not granted'}, {self._sent.state.name}>"
        )

    def statistics(self) -> InstanceStatistics:
        return InstanceStatistics(
            phase=self.phase,
            claimed=self._is_claimed,
            granted=self.granted,
            sent=self._sent.state,
            arrived_count=len(self._arrived),
            unsent_count=len(self._unsent),
            unsent_bytes=self._outgoing.waiting_bytes,
        )

    def describe(self) -> str:
        """The connection in words, for log lines: ``POST /upload``."""
        if self.protocol not in ("http", "websocket"):
            return f"{self.protocol} of {self.scope.get('client')}"
        return f"{self.scope.get('method', 'WebSocket')} {self.scope.get('path', '')}"

    @property
    def is_verdict_due(self) -> bool:
        """True while the answer to the claim, GRANT or CLOSED, is still to come."""
        return self._is_held and self._is_claimed and not self.granted

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The running call, while there is one."""
        return self._task

    # Told by the process

    def claim(self) -> None:
        """Tell the interface server that the connection is here, if it was not told."""
        if self._is_claimed or not self._is_held or self.phase is Phase.ENDED:
            return
        self._is_claimed = True
        self._link.link_send(self.peer, build_claim(self.connection, self.epoch, adopts=self._is_handover))
        self._release_answer()

    def _release_answer(self) -> None:
        """Send a response as events that was held back to be an ANSWER: its application goes on behind it."""
        answer, self._answer = self._answer, None
        if answer is not None and self._is_held:
            self._unsent.append(_Sending(iter(answer), None))
            self._pump()

    def start(self) -> None:
        """Call the application."""
        if self.phase is not Phase.CLAIMED:
            return
        self.phase = Phase.RUNNING
        # A context of its own for each instance (a copy), whichever frame happened to start it.
        context = self._context.copy() if self._context is not None else None
        if context is not None and self.protocol == "websocket":
            context.run(CURRENT_INSTANCE.set, self)
        self._task = self._loop.create_task(self._run(), name=self.reply_channel, context=context)

    def grant(self) -> None:
        """A GRANT frame came: the connection is ours; call the application if it does not run yet."""
        self.granted = self._is_claimed = True
        self.start()

    def adopt(self, scope: Scope, state: bytes, carried_bytes: int) -> None:
        """An ADOPT frame came: as ``grant()`` for a connection that had another owner. Raises WireError.

        ``scope`` is complete; ``state`` the last checkpoint, encoded, or empty.
        """
        extensions = dict(scope.get("extensions") or {})
        if state:
            extensions["websocket.handover"] = {"state": decode_message(state).get("state")}
            self._moving = Moving(is_adopted=True)
        scope["extensions"] = extensions
        self.scope = scope
        self._sent = WebSocketEvents(extensions)
        self._made_outgoing = OutgoingEvents(
            self.connection, self.epoch, self._outgoing.window_bytes, carried_bytes=carried_bytes
        )
        self._arrived.insert(0, ({"type": "websocket.connect"}, 0))
        self.grant()

    def event_received(self, kind: int, payload: bytes) -> None:
        """An EVENT or PIECE frame came. Raises FlowControlError, WireError: then the connection is to be given up."""
        if self.phase is Phase.FINISHING:
            return  # nobody will receive it, and END tells the interface server so
        complete = self._incoming.receive(kind, payload)
        if complete is None:
            credit = self._incoming.credit_frame()
            if credit is not None and self._is_held:
                self._link.link_send(self.peer, credit)
            return
        encoded, cost_bytes = complete
        self._arrived.append((NO_BODY if encoded == NO_BODY_ENCODED else decode_event(encoded), cost_bytes))
        self._wake_receivers()

    def last_received(self, payload: bytes) -> None:
        """A LAST frame came. Raises FlowControlError, WireError."""
        if self.phase is not Phase.FINISHING:
            self._incoming.receive(FrameKind.LAST, payload)
        self._disconnected(decode_event(payload), "the client has disconnected")

    def client_gone(self) -> None:
        """A GONE frame came."""
        self._refuse_sends("the client has disconnected")

    def credit_received(self, total_bytes: int) -> None:
        """A CREDIT frame came. Raises FlowControlError."""
        self._outgoing.credit(total_bytes)
        self._pump()

    def link_ready(self) -> None:
        """The link has room again."""
        self._pump()

    def begin_move(self, moved: Callable[[Instance, bool], None]) -> bool:
        """The worker stops: give the connection away as soon as that can be done with nothing lost.

        ``moved`` is told when the interface server has decided, perhaps never, perhaps more than once. True: that is
        to be expected soon, for the application was asked, or stands still.
        """
        if self.protocol != "websocket" or "websocket.handover" not in (self.scope.get("extensions") or {}):
            return False
        if self._moving is None:
            self._moving = Moving()
        self._moved = moved
        if self._moving.begin():
            # One that has never received a message, and one that waits for the next, has answered all it received.
            if self._latest_state is not None and (
                self._received_count <= 0 or not all(receiver.cancelled() for receiver in self._receivers)
            ):
                self._begin_asking()
                return True
            self._arrived.insert(0, (REQUEST, 0))
            self._wake_receivers()
            if self._latest_state is not None:
                self._loop.call_later(PUSHING_AFTER_S, self._ask_if_pushing)
            return True
        if self._receivers:
            self._freeze_if_still()
        return self._is_frozen

    def released(self, moved: bool) -> None:
        """A RELEASED frame came: ``moved``, another worker goes on; else everything goes on here."""
        moving = self._moving
        if moving is None or not self._is_frozen:
            return
        self._is_frozen = False
        if moved:
            self._is_held = False
            if not moving.has_checkpoint:
                # Its successor begins anew, so this one has to clean up as behind any other end.
                self._set_disconnect({**self._abnormal_disconnect(), "code": 1012})
            self.fenced("the connection was handed over", at_once=moving.has_checkpoint)
        else:
            moving.declined()
            self._pump()
            self._wake_receivers()
        if self._moved is not None:
            self._moved(self, moved)

    def fenced(self, reason: str, *, at_once: bool = True) -> None:
        """Another worker may have this connection already: end without a disconnect event.

        What the application would do behind one, leave groups or say that a user has gone, is not true.
        """
        self._is_held = False
        if self.phase is Phase.CLAIMED:
            self._end()
            return
        self._is_frozen = False
        self._refuse_sends(reason)
        if at_once:
            self.cancel()

    def refused(self, reason: str) -> None:
        """The connection is not ours: CLOSED came, the link ended, or no grant came in time.

        An application that was started on the claim alone is cancelled at once; one that had the connection gets
        its disconnect and ``close_timeout_s``.
        """
        self._is_held = False
        self._is_frozen = False
        if self.phase is Phase.CLAIMED:
            self._end()
            return
        self._disconnected(self._abnormal_disconnect(), reason)
        if not self.granted:
            self.cancel()

    def shut_down(self) -> None:
        """The worker stops: a WebSocket is closed with 1012 and its application gets the disconnect.

        So is a connection of an own protocol.

        Nothing happens to a running HTTP request; ``cancel()`` ends it at the deadline.
        """
        if self.protocol == "http" or self._is_shut_down or self.phase is not Phase.RUNNING:
            return
        details = {"code": 1012, "reason": "the worker stops"} if self.protocol == "websocket" else {}
        self._is_shut_down = True
        # Frozen, it stays so: the disconnect and the close are for one that is told to go on.
        if self._sent.state is State.OPEN and self._refusal is None:
            # In order behind what the application has sent, within the client's credit. Where a slow client leaves
            # none, the end of the link closes the WebSocket, with 1012, too.
            close = self._sent.apply({"type": f"{self.protocol}.close", **details})
            self._unsent.append(_Sending(iter(close), None))
            self._pump()
        if self._refusal is None:
            self._refusal = "the worker stops"
        self._set_disconnect({**self._abnormal_disconnect(), **({"code": 1012} if details else {})})

    def cancel(self, log: str | None = None) -> None:
        """Cancel the call; ``log`` says why in a line that also tells where the application waited.

        A call that was cancelled before cleans up; only a deadline interrupts it in that, one with a ``log``.
        """
        self._drop_close_timer()
        if self._task is None or self._task.done() or (self._is_cancelled and log is None):
            return
        if log is not None:
            logger.warning(
                "%s: %s; it is cancelled, it waited at %s", self.describe(), log, describe_wait(self._task)
            )
        if not self._is_cancelled and _has_not_begun(self._task):
            # It was to begin in this turn of the loop, and ends without a line of _run().
            self._task.add_done_callback(lambda task: self._application_ended(Outcome.CANCELLED))
        self._is_cancelled = True
        self._task.cancel()

    # Called by handover.py, for the application

    @property
    def takes_checkpoints(self) -> bool:
        return (
            self.phase is Phase.RUNNING
            and self._refusal is None
            and self._sent.state is State.OPEN
            and "websocket.handover" in (self.scope.get("extensions") or {})
        )

    def stored_state(self, default: Any) -> Any:
        """What the instance before this one stored last, else ``default``."""
        return (self.scope.get("extensions") or {}).get("websocket.handover", {}).get("state", default)

    async def store_state(self, state: Any, *, commit: bool, latest: Callable[[], Any] | None) -> None:
        """Send a checkpoint; ``latest`` is asked for another one, instead of receive(), when the worker stops."""
        self._latest_state = None if latest is None else (latest, contextvars.copy_context())
        event = {"state": state, "commit": commit, "notify": latest is not None}
        await self.send({"type": "websocket.handover.state", **event})
        self._is_commit = commit

    # Called by the application

    async def receive(self) -> dict[str, Any]:
        """Wait for the next event. A cancelled call leaves the event to the next one.

        After the end of the connection, and after a complete HTTP response, it returns the disconnect event,
        however often it is called.
        """
        if self._tell_receiving:
            self._tell_receiving = False
            self.claim()
            if self._is_held:
                self._link.link_send(self.peer, build_receiving(self.connection, self.epoch))
        while True:
            if self._sent.state is State.COMPLETE:
                # ASGI, "Disconnect": also when receive() is called after the response has been sent.
                return {"type": "http.disconnect"}
            # What is received meanwhile would count as covered by a state that does not know of it.
            is_asking = self._asking is not None and self._disconnect is None
            if self._arrived and not (self._is_frozen or is_asking):
                if self._turn_left == 0:
                    self._turn_left = TURN_EVENTS_MAX
                    turn = self._loop.create_future()
                    self._turns.wait(partial(_wake, turn))
                    await turn
                    continue
                self._turn_left -= 1
                event, cost_bytes = self._arrived.pop(0)
                if cost_bytes:
                    self._received_count += 1
                elif event is REQUEST:
                    assert self._moving is not None
                    if self._latest_state is None:
                        self._moving.request_read()
                        return dict(event)
                    self._begin_asking()
                    continue
                credit = self._incoming.consume(cost_bytes)
                if credit is not None and self._is_held and self._disconnect is None:
                    self.claim()
                    self._link.link_send(self.peer, credit)
                return dict(event) if event is NO_BODY else event
            if self._disconnect is not None and not self._is_frozen:
                return dict(self._disconnect)
            # A response of which only the start was sent, by an application that waits: it may mean to send its
            # body from elsewhere, through a group. So the client gets the head, unless a body follows in this turn.
            if self._sent.holds_start:
                self._loop.call_soon(self._release_start)
            if self._moving is not None:
                self._freeze_if_still()
            self._turn_left = TURN_EVENTS_MAX
            receiver = self._loop.create_future()
            self._receivers.append(receiver)
            try:
                await receiver
            finally:
                if receiver in self._receivers:
                    self._receivers.remove(receiver)

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send one event to the client; return when it is within the client's window and the link has room.

        Calls from several tasks keep their order. What a cancelled call had to send is sent all the same. Raises
        InvalidEvent for what ASGI does not allow, ClientDisconnected (an OSError) when the client is gone.
        """
        sent = self._sent
        if self._refusal is not None and sent.state is not State.COMPLETE:
            if sent.state is not State.TRAILERS:
                raise ClientDisconnected(self._refusal)
            # Behind a body that trailers cannot follow (HEAD, a content-length in HTTP/1.1) the exchange is over.
            sent.apply(message)
            if sent.is_complete:
                self._drop_close_timer()  # as below: what it does from here on is not the client's
            return
        if type(sent) is WebSocketEvents and type(message) is dict and not (self._unsent or self._is_frozen):
            text = sent.encode_text(message)
            if text is not None and not self._link.link_is_congested(self.peer) and self._message_leaves(text):
                return
        events = sent.apply(message)
        if type(events) is Checkpoint:
            await self._send_checkpoint(events)
            return
        if self._receivers:
            if sent.state is State.COMPLETE:
                self._wake_receivers()
            elif sent.holds_start:
                self._loop.call_soon(self._release_start)
        if not events:  # a held http.response.start, or what follows a complete response
            return
        if sent.state is State.COMPLETE and self._may_answer and not self._unsent and _is_short_answer(events):
            self._answer = events
            if self._is_claimed:  # else claim() does the same
                self._loop.call_soon(self._release_answer)
            return
        if not self._is_claimed:
            self.claim()
        rest = iter(events)
        if not self._unsent and self._let_leave(rest):
            return
        await self._until_left(rest)

    async def _until_left(self, events: Iterator[dict[str, Any] | bytes]) -> None:
        waiter = self._loop.create_future()
        self._unsent.append(_Sending(events, waiter))
        try:
            await waiter
        finally:
            # Its error has a traceback, which has this frame: a cycle, with all that the application holds.
            del waiter

    async def _send_checkpoint(self, checkpoint: Checkpoint) -> None:
        flags = STATE_NOTIFY * checkpoint.notify + STATE_COMMIT * checkpoint.commit
        moving = self._moving
        if moving is None:
            moving = self._moving = Moving()
        is_last = moving.checkpoint(self._received_count, wants_notice=checkpoint.notify)
        state = build_state(self.connection, self.epoch, self._received_count, flags, checkpoint.state)
        frames = self._frames_of_last_checkpoint(state) if is_last else iter((state,))
        if self._unsent or not self._let_leave(frames):
            await self._until_left(frames)

    # Inside

    def _begin_asking(self) -> None:
        assert self._moving is not None
        assert self._latest_state is not None
        self._moving.request_read()
        latest, context = self._latest_state
        self._asking = self._loop.create_task(self._ask(latest), context=context)

    def _ask_if_pushing(self) -> None:
        """The application has not come back to receive(): if its own checkpoint covers all, it only sends."""
        assert self._moving is not None
        if self._arrived and self._arrived[0][0] is REQUEST and self._moving.covers(self._received_count):
            del self._arrived[0]
            self._begin_asking()

    async def _ask(self, latest: Callable[[], Any]) -> None:
        try:
            state = latest()
            if inspect.isawaitable(state):
                state = await state
            if self.takes_checkpoints:
                await self.store_state(state, commit=self._is_commit, latest=latest)
        except ClientDisconnected:
            pass  # gone, or handed over: that is the rule
        except Exception:
            # It stays, until the drain ends.
            logger.exception("%s: the application did not say what its last state is", self.describe())
        finally:
            self._asking = None
            self._wake_receivers()

    def _frames_of_last_checkpoint(self, state: bytes) -> Iterator[bytes]:
        yield state
        # Lazily, behind the checkpoint: from here on nothing leaves until released().
        yield self._freeze()

    def _freeze(self) -> bytes:
        assert self._moving is not None
        self._moving.freeze()
        self._is_frozen = True
        return build_release(self.connection, self.epoch)

    def _freeze_if_still(self) -> None:
        """The application waits in receive(): give it away, if this is the moment."""
        assert self._moving is not None
        if (
            not (self._arrived or self._unsent or self._is_frozen)
            and self._outgoing.is_empty
            and self.phase is Phase.RUNNING
            and self._sent.state is State.OPEN
            and self._refusal is None
            and self._disconnect is None
            and self._moving.may_freeze(self._received_count)
        ):
            self._sent_at = self._link.link_send(self.peer, self._freeze())

    async def _run(self) -> None:
        outcome = Outcome.RAISED
        try:
            await self._application(self.scope, self.receive, self.send)
            outcome = Outcome.RETURNED
            self._report_incomplete()
        except GeneratorExit:
            raise  # the loop is torn down; there is nobody left to tell
        except asyncio.CancelledError as error:
            if self._is_cancelled:
                outcome = Outcome.CANCELLED
            else:
                self._report(error)
        except BaseException as error:  # sys.exit() in a view ends the view, not the worker
            self._report(error)
        self._application_ended(Outcome.CANCELLED if self._is_shut_down else outcome)

    def _application_ended(self, outcome: Outcome) -> None:
        self.phase = Phase.FINISHING
        self._outcome = outcome
        self._task = None
        if self._close_timer is not None:
            self._drop_close_timer()
        self._arrived.clear()
        # Tasks that the call has left behind: one may wait in receive(), another go on sending, to nobody.
        self._set_disconnect(self._abnormal_disconnect())
        if self._refusal is None:
            self._refusal = "its application call is over"
        if self._unsent or self._is_frozen:
            self._pump()
        else:
            self._end()

    def _let_leave(self, events: Iterator[dict[str, Any] | bytes]) -> bool:
        """Let events leave while there is credit and the link has room; True when all have left."""
        link, peer, outgoing = self._link, self.peer, self._outgoing
        while not (self._is_frozen or link.link_is_congested(peer)):
            if not outgoing.is_empty:
                for frame in outgoing.frames():
                    self._sent_at = link.link_send(peer, frame)
                if not outgoing.is_empty:
                    return False  # until credit_received()
            event = next(events, None)
            if event is None:
                return True
            if isinstance(event, bytes):
                self._sent_at = link.link_send(peer, event)
                continue
            encoded = encode_event(event)
            if event["type"] == "websocket.send":
                if self._message_leaves(encoded):
                    continue
            elif (whole := outgoing.pass_whole(encoded)) is not None:
                self._sent_at = link.link_send(peer, whole)
                continue
            outgoing.offer(encoded)
        return False  # until link_ready() or released()

    def _message_leaves(self, encoded: bytes) -> bool:
        """Let a WebSocket message leave that nothing waits in front of; False if there is no credit for all of it.

        Other instances may be sending the same one, behind a message of a group: then they travel together.
        """
        if not self._outgoing.admit(encoded):
            return False
        self._sent_at = self._link.link_send_event(self.peer, self.connection, self.epoch, encoded, self._sent_at)
        return True

    def _pump(self) -> None:
        while self._unsent:
            sending = self._unsent[0]
            if not self._let_leave(sending.events):
                return
            del self._unsent[0]
            if sending.waiter is not None and not sending.waiter.done():
                sending.waiter.set_result(None)
        if self.phase is Phase.FINISHING and not self._is_frozen:
            self._end()

    def _release_start(self) -> None:
        """Let a start leave that has no body yet, if the application (still) waits in receive()."""
        if self._refusal is not None or all(receiver.done() for receiver in self._receivers):
            return
        start = self._sent.release_start()
        if start is not None:
            self.claim()
            # The head is written with the first body.
            self._unsent.append(_Sending(iter((start, _EMPTY_BODY)), None))
            self._pump()

    def _disconnected(self, event: dict[str, Any], reason: str) -> None:
        self._set_disconnect(event)
        self._refuse_sends(reason)

    def _set_disconnect(self, event: dict[str, Any]) -> None:
        if self._disconnect is None:
            self._disconnect = event
            if self._receivers:
                self._wake_receivers()

    def _refuse_sends(self, reason: str) -> None:
        if self._refusal is None:
            self._refusal = reason
        # What has not left has nobody to go to.
        unsent, self._unsent = self._unsent, []
        for sending in unsent:
            if sending.waiter is not None and not sending.waiter.done():
                sending.waiter.set_exception(ClientDisconnected(reason))
        if self.phase is Phase.FINISHING:
            self._end()
        elif (
            self.phase is Phase.RUNNING
            and self._close_timer is None
            # What an application does behind a complete response (Starlette's BackgroundTasks) is not the client's.
            and self._sent.state is not State.COMPLETE
            and not math.isinf(self._close_timeout_s)
        ):
            self._close_timer = self._loop.call_later(self._close_timeout_s, self._close_timed_out)

    def _close_timed_out(self) -> None:
        self._close_timer = None
        self.cancel(f"the application did not return within {self._close_timeout_s:g} s after {self._refusal}")

    def _drop_close_timer(self) -> None:
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None

    def _wake_receivers(self) -> None:
        # All of them: which one gets the event is decided when they run, so a cancelled one loses nothing.
        for receiver in self._receivers:
            if not receiver.done():
                receiver.set_result(None)

    def _abnormal_disconnect(self) -> dict[str, Any]:
        if self.protocol == "http":
            return _HTTP_DISCONNECT  # receive() returns copies
        if self.protocol != "websocket":
            return {"type": f"{self.protocol}.disconnect"}
        # RFC 6455 section 7.1.5: 1006 where no close frame was received.
        return {"type": "websocket.disconnect", "code": 1006, "reason": ""}

    def _end(self) -> None:
        if self._is_held:
            if self._answer is not None:
                start, body = self._answer
                frame = build_answer(self.connection, self.epoch, start["status"], start["headers"], body["body"])
                if (
                    self._outcome is not Outcome.RETURNED
                    or len(frame) > _ANSWER_BYTES_MAX
                    or self._link.link_is_congested(self.peer)
                ):
                    # Both come back here when everything has left.
                    if self._is_claimed:
                        self._release_answer()
                    else:
                        self.claim()
                    return
                self._answer = None
                self._link.link_send(self.peer, frame)
            elif self._outcome is not None:
                self.claim()
                self._link.link_send(self.peer, build_end(self.connection, self.epoch, self._outcome))
        self.phase = Phase.ENDED
        self._ended(self)

    def _report_incomplete(self) -> None:
        if self._sent.state is State.COMPLETE or self._refusal is not None:
            return
        if self._sent.state in (State.WAITING, State.STARTED, State.TRAILERS, State.REFUSING):
            logger.error("%s: the application returned, but %s", self.describe(), self._sent.state.value)
        elif self._sent.state is State.CONNECTING:
            logger.error("%s: the application returned without accepting or closing the WebSocket", self.describe())

    def _report(self, error: BaseException) -> None:
        if _is_disconnect(error):
            return  # ASGI, "Disconnected Client - send exception": not to be logged as an error
        if self._refusal is not None and _follows_disconnect(error):
            # Starlette answers our error with its ClientDisconnect. Nobody needs a traceback for each client
            # that leaves; a fault in the application's cleanup is still told.
            logger.info("%s: %s, and the application ended with %r", self.describe(), self._refusal, error)
            return
        trace = error.__traceback__
        shown = trace.tb_next if trace is not None and trace.tb_next is not None else trace  # without _run()
        logger.error("Exception in ASGI application, %s", self.describe(), exc_info=(type(error), error, shown))


def _is_short_answer(events: Iterable[dict[str, Any]]) -> TypeGuard[tuple[dict[str, Any], dict[str, Any]]]:
    """True for start and body of a response that is complete with them and may fit an ANSWER."""
    return (
        type(events) is tuple
        and len(events) == 2
        and events[1]["type"] == "http.response.body"
        and len(events[1]["body"]) <= _ANSWER_BYTES_MAX
    )


def _has_not_begun(task: asyncio.Task[Any]) -> bool:
    return inspect.getcoroutinestate(cast(Coroutine[Any, Any, Any], task.get_coro())) == inspect.CORO_CREATED


def _is_disconnect(error: BaseException) -> bool:
    """True for ClientDisconnected, and for a group of nothing else (anyio and asyncio task groups make them)."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(ClientDisconnected)[1] is None
    return isinstance(error, ClientDisconnected)


def _follows_disconnect(error: BaseException) -> bool:
    """True if the error was raised while a ClientDisconnected was handled."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if _is_disconnect(current):
            return True
        waiting += (current.__cause__, current.__context__)
    return False


def describe_wait(task: asyncio.Task[Any]) -> str:
    """Where a task waits: the innermost frames that its chain of awaits leads to, outermost first.

    Task.get_stack() shows the outermost coroutine only, which is ours.
    """
    places: list[str] = []
    awaited: Any = task.get_coro()
    while awaited is not None:
        frame = (
            getattr(awaited, "cr_frame", None)
            or getattr(awaited, "gi_frame", None)
            or getattr(awaited, "ag_frame", None)
        )
        if frame is not None and frame.f_code is not Instance._run.__code__:
            code: CodeType = frame.f_code
            places.append(f"{code.co_filename}:{frame.f_lineno} in {code.co_name}")
        awaited = _first_attribute(awaited, "cr_await", "gi_yieldfrom", "ag_await")
    return " > ".join(places[-_WAIT_FRAMES_SHOWN:]) or "its beginning"


def _first_attribute(value: object, *names: str) -> Any:
    """The first of these attributes that is there and not None: coroutines, generators and async ones differ."""
    return next((found for name in names if (found := getattr(value, name, None)) is not None), None)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
