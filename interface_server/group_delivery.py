"""What a message of a group, or one sent to a reply channel from elsewhere, means for the connections it is for.

    websocket.send       to the sockets of the WebSockets among them, framed once (broadcast.py)
    websocket.close      ends them
    http.response.body   to the sockets of the streaming responses among them; ends them only with an explicit
                         ``more_body: False``, for the sender seldom knows that it is the last one
    other http.…, websocket.…   dropped: they are between one client and one instance
    anything else        to the application instance, as an event of receive()
    <own protocol>.…     to the sockets of that protocol (own_protocol.py); they know no other types, so all others,
                         websocket.send too, go to their application instances

What does not fit is dropped and counted, and told to the operator once in a while: its sender is somewhere else
and cannot be told. Delivering is connections' and broadcast.py's business; adding a type is a branch in ``deliver``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from channel_layer.codec import decode_message
from channel_layer.errors import WireError
from interface_server.broadcast import Broadcast, FanOut
from interface_server.client_connection import ClientConnection

__all__ = ["GroupDelivery"]

_LOGGER: Final = logging.getLogger("trunkline.interface")

# One line in this time says what was dropped since the last one; a flood of bad messages is not a flood of lines.
_LOG_PERIOD_S: Final = 10.0

# An event counts at least so much where it waits: ten thousand empty ones are not free.
_EVENT_BYTES_MIN: Final = 64


class GroupDelivery:
    """Sorts messages for the connections of this process. Must not raise."""

    def __init__(self, *, fan_out: FanOut, clock: Callable[[], float]) -> None:
        self._fan_out = fan_out
        self.has_own_protocols = False  # set with the first connection of one; most processes never have any
        self._clock = clock
        self.dropped: Counter[str] = Counter()  # messages times connections, by reason
        self._unlogged: Counter[str] = Counter()
        self._next_log = clock()

    def __repr__(self) -> str:
        return f"<GroupDelivery dropped={dict(self.dropped)}>"

    def deliver(self, members: Sequence[ClientConnection], encoded: bytes) -> None:
        """Hand one encoded message to each of ``members``."""
        try:
            message = decode_message(encoded)
        except WireError as error:
            self.drop(f"unreadable ({error})"[:120], len(members))
            return
        kind = message.get("type")
        if self.has_own_protocols and type(kind) is str:
            members = self._to_own_protocols(members, kind, message, encoded)
            if not members:
                return
        if type(kind) is not str:
            self.drop("message without a type", len(members))
        elif kind == "websocket.send":
            self._websocket_send(members, message)
        elif kind == "websocket.close":
            self._group_event(members, "websocket", message, before_accept=True)
        elif kind == "http.response.body":
            self._response_body(members, message)
        elif kind.startswith(("http.", "websocket.")):
            self.drop(f"{kind:.40} is not for groups", len(members))
        else:
            for member in members:
                if not member.offer_application_message(encoded):
                    self.drop("the application does not receive", 1)

    def drop(self, reason: str, count: int) -> None:
        """Count what was not delivered, and say so at most once in ten seconds."""
        if reason not in self.dropped and len(self.dropped) >= 100:
            reason = "other reasons"  # a reason names a type, and anybody can make up types
        self.dropped[reason] += count
        self._unlogged[reason] += count
        now = self._clock()
        if now >= self._next_log:
            self._next_log = now + _LOG_PERIOD_S
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self._unlogged.items())
            self._unlogged.clear()
            _LOGGER.warning("messages for clients dropped: %s", reasons)

    def _websocket_send(self, members: Sequence[ClientConnection], message: dict[str, Any]) -> None:
        try:
            broadcast = Broadcast(message)
        except ValueError:
            self.drop('websocket.send without exactly one of "text" and "bytes"', len(members))
            return
        self._fan_out.deliver(broadcast, self._only("websocket", members, "websocket.send"))

    def _response_body(self, members: Sequence[ClientConnection], message: dict[str, Any]) -> None:
        body = message.get("body", b"")
        more_body = message.get("more_body", True)
        if type(body) is not bytes or type(more_body) is not bool:
            self.drop("http.response.body whose body is not bytes or more_body not bool", len(members))
            return
        event = {"type": "http.response.body", "body": body, "more_body": more_body}
        self._group_event(members, "http", event, before_accept=False)

    def _group_event(
        self, members: Sequence[ClientConnection], protocol: str, event: dict[str, Any], *, before_accept: bool
    ) -> None:
        size = max(_EVENT_BYTES_MIN, len(event.get("body", b"")))
        for member in self._only(protocol, members, event["type"]):
            if member.queue_group_event(event, size, before_accept=before_accept):
                self._fan_out.add(member)

    def _to_own_protocols(
        self, members: Sequence[ClientConnection], kind: str, message: dict[str, Any], encoded: bytes
    ) -> list[ClientConnection]:
        """Deliver to the members of own protocols; return the others."""
        others = []
        for member in members:
            if member.protocol in ("http", "websocket"):
                others.append(member)
            elif kind.startswith(f"{member.protocol}."):
                if member.queue_group_event(message, max(_EVENT_BYTES_MIN, len(encoded)), before_accept=False):
                    self._fan_out.add(member)
            elif not member.offer_application_message(encoded):
                self.drop("the application does not receive", 1)
        return others

    def _only(self, protocol: str, members: Sequence[ClientConnection], kind: str) -> list[ClientConnection]:
        chosen = [member for member in members if member.protocol == protocol]
        if len(chosen) != len(members):
            self.drop(f"{kind} for a connection of another protocol", len(members) - len(chosen))
        return chosen
