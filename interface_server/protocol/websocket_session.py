"""State of one WebSocket connection, between its socket and its application.

No I/O happens here: the adapter, ``interface_server/websocket.py``, tells this class what happened and carries out
the actions it returns, in their order. Everything that can change ``state`` is in this file, as a table.

    CONNECTING --accept--> OPEN --our Close--> CLOSING --peer's Close, fault, timeout, loss--> CLOSED
         |                   +--peer's Close, fault, ping timeout, loss------------------------> CLOSED
         +--close (403), application over (500), refused (502, 503), timeout (504), loss-------> CLOSED
         +--http.response.start--> REFUSING --last body, application over, timeout, loss-------> CLOSED

The application hears of the end at once when it leaves OPEN (or CONNECTING): who sends a Close does not wait for
the other's, and what a client says behind our Close is dropped. In CLOSED the socket may still be writing; the
adapter's deadline then ends it (``timed_out``).

Which code the application sees in its ``websocket.disconnect``: the one the client sent; 1005 if its Close had none;
1006 if there was no Close (loss, ping timeout, no handshake); the one the application or a group sent to the
client, with its reason; for a client's fault (1002, 1007, 1009) and for the server's own end (1012, 1013) the code
that we sent.

To add something that can happen: an ``Input``, its rows in ``TRANSITIONS`` (all four states), a method below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol

from channel_layer.enums import quick
from channel_layer.frames import Outcome
from interface_server.client import Refusal
from interface_server.protocol.actions import End, Output
from interface_server.protocol.deflate import Deflate
from interface_server.protocol.http_exchange import HttpExchange
from interface_server.protocol.websocket_frames import (
    PONG,
    build_close,
    build_frame,
    close_code_is_valid,
    read_message,
    truncate_reason,
)
from interface_server.protocol.websocket_handshake import Handshake, InvalidAccept

__all__ = [
    "TRANSITIONS",
    "Abort",
    "Action",
    "Answers",
    "Closed",
    "Finish",
    "Input",
    "Opened",
    "Refused",
    "Report",
    "State",
    "WebSocketSession",
    "Write",
]


@quick
class State(Enum):
    CONNECTING = "the handshake waits for the application"
    REFUSING = "the application answers the handshake with a response of its own"
    OPEN = "messages pass"
    CLOSING = "our Close is sent, the client's is awaited"
    CLOSED = "nothing passes any more"


@quick
class Input(Enum):
    """Everything that can happen to a connection."""

    # From the application, or a message of a group. INVALID: not an event that may be sent, in any state.
    ACCEPT = "websocket.accept"
    SEND = "websocket.send"
    CLOSE = "websocket.close"
    RESPONSE_START = "websocket.http.response.start"
    RESPONSE_BODY = "websocket.http.response.body"
    INVALID = "an event we do not know"
    # From the channel layer.
    RETURNED = "the application returned"
    RAISED = "the application raised"
    CANCELLED = "the application was cancelled"
    REFUSED = "no application takes or keeps the connection, or this server stops"
    # From the client. FAULT: what RFC 6455 forbids, or a message larger than we take.
    MESSAGE = "message"
    PING = "ping"
    PEER_CLOSE = "close frame"
    FAULT = "fault"
    LOST = "the socket is gone"
    # From ourselves.
    TIMED_OUT = "the deadline of this state has passed"


_EVENTS: Final = {
    "websocket.accept": Input.ACCEPT,
    "websocket.send": Input.SEND,
    "websocket.close": Input.CLOSE,
    "websocket.http.response.start": Input.RESPONSE_START,
    "websocket.http.response.body": Input.RESPONSE_BODY,
}

# What each input does in each state. A pair that is not listed cannot happen: before its accept a client is not
# listened to, so nothing of it but its loss is known.
TRANSITIONS: Final[Mapping[tuple[State, Input], State]] = {
    (State.CONNECTING, Input.ACCEPT): State.OPEN,  # or CLOSED, when its headers cannot be sent: 500
    (State.CONNECTING, Input.SEND): State.CONNECTING,  # dropped: the worker lets no application do this
    (State.CONNECTING, Input.CLOSE): State.CLOSED,  # 403; ASGI "Close"
    (State.CONNECTING, Input.RESPONSE_START): State.REFUSING,  # nothing is written before the body
    (State.CONNECTING, Input.RESPONSE_BODY): State.CONNECTING,  # dropped
    (State.CONNECTING, Input.INVALID): State.CONNECTING,  # dropped
    (State.CONNECTING, Input.RETURNED): State.CLOSED,  # 500, without an answer as with an exception
    (State.CONNECTING, Input.RAISED): State.CLOSED,  # 500
    (State.CONNECTING, Input.CANCELLED): State.CLOSED,  # 503
    (State.CONNECTING, Input.REFUSED): State.CLOSED,  # 502 or 503
    (State.CONNECTING, Input.LOST): State.CLOSED,
    (State.CONNECTING, Input.TIMED_OUT): State.CLOSED,  # 504
    (State.REFUSING, Input.ACCEPT): State.REFUSING,  # dropped, as are the next three
    (State.REFUSING, Input.SEND): State.REFUSING,
    (State.REFUSING, Input.CLOSE): State.REFUSING,
    (State.REFUSING, Input.RESPONSE_START): State.REFUSING,
    (State.REFUSING, Input.RESPONSE_BODY): State.REFUSING,  # or CLOSED, with the last one
    (State.REFUSING, Input.INVALID): State.REFUSING,  # dropped
    (State.REFUSING, Input.RETURNED): State.CLOSED,  # 500, or cut where the head is written; so the next three
    (State.REFUSING, Input.RAISED): State.CLOSED,
    (State.REFUSING, Input.CANCELLED): State.CLOSED,
    (State.REFUSING, Input.REFUSED): State.CLOSED,
    (State.REFUSING, Input.LOST): State.CLOSED,
    (State.REFUSING, Input.TIMED_OUT): State.CLOSED,
    (State.OPEN, Input.ACCEPT): State.OPEN,  # dropped
    (State.OPEN, Input.RESPONSE_START): State.OPEN,  # dropped
    (State.OPEN, Input.RESPONSE_BODY): State.OPEN,  # dropped
    (State.OPEN, Input.SEND): State.OPEN,
    (State.OPEN, Input.CLOSE): State.CLOSING,
    (State.OPEN, Input.INVALID): State.OPEN,  # dropped
    (State.OPEN, Input.RETURNED): State.CLOSING,  # 1000
    (State.OPEN, Input.RAISED): State.CLOSING,  # 1011
    (State.OPEN, Input.CANCELLED): State.CLOSING,  # 1012
    (State.OPEN, Input.REFUSED): State.CLOSING,  # 1011, 1012, 1013
    (State.OPEN, Input.MESSAGE): State.OPEN,
    (State.OPEN, Input.PING): State.OPEN,
    (State.OPEN, Input.PEER_CLOSE): State.CLOSED,  # echoed
    (State.OPEN, Input.FAULT): State.CLOSED,  # RFC 6455 section 7.1.7: no Close is awaited after a failure
    (State.OPEN, Input.LOST): State.CLOSED,
    (State.OPEN, Input.TIMED_OUT): State.CLOSED,  # the ping timeout
    (State.CLOSING, Input.ACCEPT): State.CLOSING,  # late, as all events of the application from here on
    (State.CLOSING, Input.SEND): State.CLOSING,
    (State.CLOSING, Input.CLOSE): State.CLOSING,
    (State.CLOSING, Input.RESPONSE_START): State.CLOSING,
    (State.CLOSING, Input.RESPONSE_BODY): State.CLOSING,
    (State.CLOSING, Input.INVALID): State.CLOSING,
    (State.CLOSING, Input.RETURNED): State.CLOSING,
    (State.CLOSING, Input.RAISED): State.CLOSING,
    (State.CLOSING, Input.CANCELLED): State.CLOSING,
    (State.CLOSING, Input.REFUSED): State.CLOSING,
    (State.CLOSING, Input.MESSAGE): State.CLOSING,  # dropped
    (State.CLOSING, Input.PING): State.CLOSING,  # section 5.5.2: answered until the client's Close
    (State.CLOSING, Input.PEER_CLOSE): State.CLOSED,
    (State.CLOSING, Input.FAULT): State.CLOSED,
    (State.CLOSING, Input.LOST): State.CLOSED,
    (State.CLOSING, Input.TIMED_OUT): State.CLOSED,  # the close timeout
    **{(State.CLOSED, input_): State.CLOSED for input_ in Input},
}


class Write(NamedTuple):
    """Give these bytes to the transport (or what answers a handshake, in HTTP/2)."""

    data: Any


class Opened(NamedTuple):
    """The handshake is complete: let messages of groups in, read frames."""


class Refused(NamedTuple):
    """The handshake was answered with this HTTP status; for the access log."""

    status: int


class Closed(NamedTuple):
    """The application's part is over: tell its connection; ``event``, the disconnect, is the last one."""

    event: dict[str, Any]


class Finish(NamedTuple):
    """Nothing more will be written: flush, close the socket, ignore what still comes.

    ``linger``: the client may still be sending. Closing a socket with unread data resets it, and the client would
    lose our last words; so its end is awaited (RFC 9112 section 9.6), until the deadline.
    """

    linger: bool


class Abort(NamedTuple):
    """Drop the socket now, with what it has not sent."""


class Report(NamedTuple):
    """Log this error: the application did what the worker should have refused."""

    text: str


Action = Write | Opened | Refused | Closed | Finish | Abort | Report
Actions = Iterable[Action]

_NOTHING: Final[Actions] = ()


class Answers(Protocol):
    """How a handshake is answered in one version of HTTP. What is returned goes to the transport, in order."""

    def accept(
        self,
        handshake: Handshake,
        *,
        subprotocol: str | None,
        headers: Iterable[Sequence[bytes]],
    ) -> Sequence[Any]:
        """Return the answer behind which frames follow. Raises InvalidAccept."""

    def refuse(self, status: int, text: str) -> Sequence[Any]:
        """Return a complete response."""

    def exchange(self) -> HttpExchange:
        """Return what makes a response of the application's events; the connection is not kept."""


class WebSocketSession:
    """Decides what happens on one WebSocket. Each method takes one input and returns the actions it asks for."""

    __slots__ = (
        "_answers",
        "_exchange",
        "_handshake",
        "close_code",
        "deflate",
        "dropped_count",
        "late_count",
        "state",
    )

    def __init__(self, handshake: Handshake, *, answers: Answers) -> None:
        self.state = State.CONNECTING
        self._handshake: Handshake | None = handshake  # until it is answered
        self._answers = answers
        self.deflate: Deflate | None = None  # how messages are compressed; None: they are not, or it is not open yet
        self._exchange: HttpExchange | None = None  # in REFUSING
        self.close_code: int | None = None  # what the application was told; None until then, and before an accept
        self.dropped_count = 0  # events that did not fit the state, or were malformed
        self.late_count = 0  # events of the application that crossed the end on their way

    def __repr__(self) -> str:
        return (
            f"<WebSocketSession {self.state.name} close_code={self.close_code} "
            f"dropped={self.dropped_count} late={self.late_count}>"
        )

    # From the application and from groups

    def application_event(self, event: Mapping[str, Any]) -> Actions:
        """Apply an event of the application or of a group. Malformed ones are dropped and counted: a group's
        message may hold anything, and an application's own has been validated by its worker.
        """
        kind = _EVENTS.get(event.get("type", ""), Input.INVALID)
        state = self._advance(kind)
        if state is State.REFUSING:
            if kind is Input.RESPONSE_BODY:
                return self._answer({**event, "type": "http.response.body"})
            self.dropped_count += 1
            return _NOTHING
        if state is not State.OPEN and state is not State.CONNECTING:
            # The application cannot know yet: its disconnect is on the way. So this is a race, not a fault.
            self.late_count += 1
            return _NOTHING
        if kind is Input.SEND and state is State.OPEN:
            message = read_message(event)
            if message is not None:
                build = build_frame if self.deflate is None else self.deflate.build_message
                return (Write(build(*message)),)
        elif kind is Input.CLOSE:
            if state is State.CONNECTING:
                return self._refuse(403)
            return self._close(*_close_fields(event))
        elif kind is Input.ACCEPT and state is State.CONNECTING:
            return self._accept(event)
        elif kind is Input.RESPONSE_START and state is State.CONNECTING:
            self._handshake = None
            self._exchange = self._answers.exchange()
            return self._answer({**event, "type": "http.response.start"})
        self.dropped_count += 1
        return _NOTHING

    def build_message(self, event: Mapping[str, Any]) -> bytes | None:
        """Return the frame of an event that is nothing but a message to an open connection: the short way for what
        happens most. None: ``application_event`` knows what it is.
        """
        if self.state is not State.OPEN or event.get("type") != "websocket.send":
            return None
        message = read_message(event)
        if message is None:
            return None
        return build_frame(*message) if self.deflate is None else self.deflate.build_message(*message)

    def frame_sent(self) -> bool:
        """A broadcast, framed already, is about to be written: True if it may be (else it is counted)."""
        if self._advance(Input.SEND) is State.OPEN:
            return True
        self.late_count += 1
        return False

    def application_ended(self, outcome: Outcome) -> Actions:
        """The instance is over, and all it sent has been applied."""
        state = self._advance(_OUTCOMES[outcome])
        if state is State.CONNECTING:
            return self._refuse(503 if outcome is Outcome.CANCELLED else 500)
        if state is State.REFUSING:
            assert self._exchange is not None
            return self._answered(self._exchange.apply_ended(outcome))
        if state is State.OPEN:
            return self._close(_OUTCOME_CODES[outcome], "")
        return _NOTHING

    def refused(self, refusal: Refusal) -> Actions:
        """No application takes the connection, or the one that had it is lost."""
        state = self._advance(Input.REFUSED)
        if state is State.CONNECTING:
            return self._refuse(refusal.status)
        if state is State.REFUSING:
            assert self._exchange is not None
            return self._answered(self._exchange.apply_refused(refusal))
        if state is State.OPEN:
            return self._close(refusal.close_code, refusal.reason)
        return _NOTHING

    # From the client

    def message(self, payload: str | bytes) -> dict[str, Any] | None:
        """A complete message; a str is a text message. Return the event for the application; None: drop it."""
        if self.state is not State.OPEN and self._advance(Input.MESSAGE) is not State.OPEN:
            return None
        # Exactly one key, as uvicorn: nobody has to ask which of two is None.
        if type(payload) is str:
            return {"type": "websocket.receive", "text": payload}
        return {"type": "websocket.receive", "bytes": payload}

    def ping(self, payload: bytes) -> Actions:
        if self._advance(Input.PING) is State.CLOSED:
            return _NOTHING
        return (Write(build_frame(PONG, payload)),)

    def close_frame(self, payload: bytes) -> Actions:
        """A Close frame with this payload (section 5.5.1)."""
        code: int | None = None
        reason = ""
        if payload:
            code = int.from_bytes(payload[:2], "big")
            if len(payload) == 1 or not close_code_is_valid(code):
                return self.fault(1002, "invalid close code")
            try:
                reason = payload[2:].decode()
            except UnicodeDecodeError:
                return self.fault(1007, "the close reason is not UTF-8")
        state = self._advance(Input.PEER_CLOSE)
        if state is State.OPEN:
            # Section 5.5.1: typically the status code is echoed; the reason is not, it was the client's.
            told = self._tell(1005 if code is None else code, reason)
            return (Write(build_close(code)), told, Finish(linger=False))
        return (Finish(linger=False),) if state is State.CLOSING else _NOTHING

    def fault(self, code: int, reason: str) -> Actions:
        """The client broke the protocol (1002), sent text that is not UTF-8 (1007) or too much (1009)."""
        state = self._advance(Input.FAULT)
        if state is State.OPEN:
            return (Write(build_close(code, reason)), self._tell(code, reason), Finish(linger=True))
        return (Finish(linger=True),) if state is State.CLOSING else _NOTHING

    def lost(self) -> Actions:
        """The socket is gone."""
        state = self._advance(Input.LOST)
        if state is State.OPEN or state is State.CONNECTING or state is State.REFUSING:
            return (self._tell(1006, "", was_open=state is State.OPEN),)
        return _NOTHING

    # From ourselves

    def timed_out(self) -> Actions:
        """The deadline of the present state has passed: of the handshake, of a pong, of the closing handshake or,
        in CLOSED, of writing the rest.
        """
        state = self._advance(Input.TIMED_OUT)
        if state is State.CONNECTING:
            return self._refuse(504, text="the application did not accept in time")
        if state is State.OPEN:
            return (self._tell(1006, "ping timeout"), Abort())
        if state is State.REFUSING:
            return (self._tell(1006, "", was_open=False), Abort())
        return (Abort(),)

    # How

    def _advance(self, kind: Input) -> State:
        """Make the transition and return the state it starts from; the caller acts on that one."""
        state = self.state
        self.state = TRANSITIONS[state, kind]
        return state

    def _accept(self, event: Mapping[str, Any]) -> Actions:
        assert self._handshake is not None
        try:
            subprotocol = event.get("subprotocol")
            headers = event.get("headers") or ()
            if not isinstance(headers, list | tuple):
                raise InvalidAccept(f'websocket.accept: "headers" is {headers!r:.200}, must be a list of pairs')
            answer = self._answers.accept(self._handshake, subprotocol=subprotocol, headers=headers)
        except InvalidAccept as error:
            self.state = State.CLOSED
            return (Report(str(error)), *self._refuse(500))
        self.deflate = self._handshake.deflate
        self._handshake = None
        return (*map(Write, answer), Opened())

    def _refuse(self, status: int, *, text: str = "") -> Actions:
        """Answer the handshake with an error; the state is CLOSED already."""
        self._handshake = None
        answer = self._answers.refuse(status, text)
        told = self._tell(1006, "", was_open=False)
        return (*map(Write, answer), Refused(status), told, Finish(linger=True))

    def _answer(self, event: Mapping[str, Any]) -> Actions:
        assert self._exchange is not None
        return self._answered(self._exchange.apply(event))

    def _answered(self, output: Output) -> Actions:
        """Carry out a step of the application's own response; with its end the state is CLOSED."""
        data, end, problem = output
        actions: list[Action] = [] if problem is None else [Report(problem)]
        actions += map(Write, data)
        if end is not None:
            assert self._exchange is not None
            self.state = State.CLOSED
            if self._exchange.status is not None:
                actions.append(Refused(self._exchange.status))
            actions.append(self._tell(1006, "", was_open=False))
            is_whole = end is End.CLOSE or end is End.KEEP
            actions.append(Finish(linger=True) if is_whole else Abort())
        return actions

    def _close(self, code: int | None, reason: str) -> Actions:
        """Begin the closing handshake; ``code`` None: a Close without one."""
        told = self._tell(1005 if code is None else code, reason)
        return (Write(build_close(code, reason)), told)

    def _tell(self, code: int, reason: str, *, was_open: bool = True) -> Closed:
        if was_open:
            self.close_code = code
        return Closed({"type": "websocket.disconnect", "code": code, "reason": reason})


_OUTCOMES: Final = {
    Outcome.RETURNED: Input.RETURNED,
    Outcome.RAISED: Input.RAISED,
    Outcome.CANCELLED: Input.CANCELLED,
}
_OUTCOME_CODES: Final = {Outcome.RETURNED: 1000, Outcome.RAISED: 1011, Outcome.CANCELLED: 1012}


def _close_fields(event: Mapping[str, Any]) -> tuple[int | None, str]:
    """Code and reason of a ``websocket.close``, made sendable: who asks for a close gets one.

    1005 is what an application sees when a client gave no code, and what it hands on here, so it means none. Any
    other code that must not be sent (section 7.4.1) becomes 1011.
    """
    code, reason = event.get("code"), event.get("reason")
    reason = truncate_reason(reason) if type(reason) is str else ""
    if code is None:
        return 1000, reason
    if code == 1005:
        return None, ""
    if type(code) is int and close_code_is_valid(code):
        return code, reason
    return 1011, reason
