"""What an application may send on a connection of somebody's own protocol (interface_server/own_protocol.py).

The types of events are the protocol's own, so only their form is checked: ``<protocol>.<anything>``, with values that
ASGI allows. ``<protocol>.close`` is the last one. No I/O happens here.

    OPEN --<protocol>.close--> CLOSED (whatever follows raises ClientDisconnected)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from channel_layer.codec import decode_event, encode_message
from channel_layer.errors import InvalidMessage, MessageTooLarge
from worker.events import ClientDisconnected, InvalidEvent, SentEvents, State

__all__ = ["OwnEvents"]


class OwnEvents(SentEvents):
    """The events that were sent on one connection of the protocol (scope type) ``name``."""

    __slots__ = ("_name",)
    final_state = State.CLOSED

    def __init__(self, name: str) -> None:
        self.state = State.OPEN
        self._name = name

    def apply(self, message: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        if self.state is State.CLOSED:
            raise ClientDisconnected("the application has closed this connection, nothing can be sent any more")
        kind = message.get("type") if isinstance(message, Mapping) else None
        if not isinstance(kind, str) or not kind.startswith(f"{self._name}."):
            raise InvalidEvent(f'the application sent {message!r:.80}, expected a dict with a "type" {self._name}.…')
        try:
            # There and back: a copy of plain values only, which is what the codec takes from a validator.
            event = decode_event(encode_message(message))
        except (InvalidMessage, MessageTooLarge) as error:
            raise InvalidEvent(f"{kind}: {error}") from error
        if kind == f"{self._name}.close":
            self.state = State.CLOSED
        return (event,)
