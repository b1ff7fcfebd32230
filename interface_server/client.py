"""The seam between a socket and its connection: what a protocol adapter must offer, and what it may use.

``Client`` is implemented once per protocol: http1.py (one object per request), websocket.py. ``Connection`` is
implemented in connections.py. A new protocol server needs these two and nothing else.

Who does what: the adapter turns bytes into events and events into bytes. The connection opens at a worker, keeps
order, credit, the epoch and group memberships, and holds what the socket does not take at the moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from channel_layer.enums import quick
from channel_layer.frames import Outcome

if TYPE_CHECKING:
    from interface_server.broadcast import Broadcast, JoinedBroadcasts

__all__ = ["Client", "Connection", "HttpClient", "Refusal"]


@quick
class Refusal(Enum):
    """Why no application takes (or keeps) a connection. HTTP: the status; an open WebSocket: the close code."""

    QUEUE_FULL = (503, 1013, "no worker is free and the queue is full")
    QUEUE_TIMEOUT = (503, 1013, "no worker took the connection in time")
    BROKER_DOWN = (503, 1013, "the broker does not answer")
    OPENING_LOST = (503, 1013, "the opening was lost three times")
    WORKER_LOST = (502, 1012, "the worker died")
    OWNERS_LOST = (502, 1011, "two workers died")  # of this connection, perhaps
    NO_SUCCESSOR = (502, 1012, "no other worker took the connection over")
    NOT_ADOPTED = (502, 1012, "the application did not go on")  # ASGI knows no refusal for a client accepted long ago
    SLOW_CLIENT = (502, 1013, "the client does not read what is broadcast to it")
    TOO_MANY = (503, 1013, "the limit of connections is reached")
    STOPPING = (503, 1012, "the server is stopping")
    PROTOCOL = (502, 1011, "the worker sent what this release cannot read")

    def __init__(self, status: int, close_code: int, reason: str) -> None:
        self.status = status
        self.close_code = close_code
        self.reason = reason


class Client(Protocol):
    """The socket side of one connection. Called by its Connection, on the loop; must not raise or block."""

    def application_event(self, event: dict[str, Any]) -> None:
        """Carry out one event of the application (or of a group): write it to the transport now.

        Called only while delivery is not paused; the worker has validated its own events, events of a group are
        validated here and counted as dropped when they do not fit the state.
        """

    def send_broadcast(self, broadcast: Broadcast | JoinedBroadcasts) -> None:
        """Write prepared WebSocket messages. Only called after ``Connection.accept_broadcasts()``."""

    def application_receiving(self) -> None:
        """The application called receive() for the first time (asked for with ``tell_receiving``)."""

    def application_ended(self, outcome: Outcome) -> None:
        """The instance returned or raised, and all its events have been delivered before this call."""

    def refused(self, refusal: Refusal) -> None:
        """No application has the connection (any more): answer, close or abort it, as its state demands."""

    def pause_reading(self) -> None:
        """The application's window is used up: stop reading the socket (its end is still watched)."""

    def resume_reading(self) -> None:
        """There is room again."""

    def buffered_bytes(self) -> int:
        """Bytes written to the transport that the kernel has not taken."""


class HttpClient(Client, Protocol):
    """The client of an "http" connection."""

    def whole_response(self, status: int, headers: Sequence[Sequence[bytes]], body: bytes) -> None:
        """Carry out a response that came in one piece. The connection is over; no other call follows."""


class Connection(Protocol):
    """The application side of one connection, for its Client."""

    number: int
    reply_channel: str

    def send_event(self, event: dict[str, Any]) -> None:
        """Send an event of the client to the application, in order, within the window.

        May call ``pause_reading`` before it returns. An adapter that goes on all the same is not stopped, so what
        it can still produce from bytes already read must be bounded by the size of one read.
        """

    def client_gone(self, event: dict[str, Any]) -> None:
        """The client is gone: ``event`` (http.disconnect, websocket.disconnect) is the last one.

        Events sent before are delivered first. The Client is not called any more.
        """

    def finished(self, event: dict[str, Any] | None = None) -> None:
        """The exchange is complete on our side (response sent, closing handshake done) and the Client wants no
        more calls; ``event`` is a last event for the application, which may still be running. It is not sent to an
        instance that has completed its response by itself: there the worker knows.
        """

    def pause_delivery(self) -> None:
        """The transport's buffer is full: hold further events back (bounded by the credit the worker has)."""

    def resume_delivery(self) -> None:
        """The transport has room again; held events are delivered before this returns, until it pauses again."""

    def accept_broadcasts(self) -> None:
        """From now on messages of groups may be delivered (WebSocket accepted, streaming response started)."""
