"""The errors of the channel layer, named by who must act.

Lives here: every exception the package raises on purpose. Does not live here: translating a library's
errors; each adapter does that where it calls the library, with ``raise … from``.

    ChannelFull        the sender: slow down or give the message up
    MessageTooLarge    the application: send less at once
    InvalidMessage     the application: this value may not cross the wire (ASGI, "Events")
    InvalidName        the application: not a channel or group name (a TypeError, as Channels raises)
    BrokerUnavailable  the operator: the broker did not answer (a ConnectionError)
    BrokerUnsuitable   the operator: the broker answers, but must not be used (version, eviction policy)
    BrokerError        the operator: the broker refused one command (rights, memory, a key of another type)
    WireError          nobody at run time: bytes that no release of ours writes
"""

from __future__ import annotations

import reprlib

__all__ = [
    "BrokerError",
    "BrokerUnavailable",
    "BrokerUnsuitable",
    "ChannelFull",
    "ChannelLayerError",
    "InvalidMessage",
    "InvalidName",
    "MessageTooLarge",
    "WireError",
    "repr_short",
]


class ChannelLayerError(Exception):
    """Base of the errors below, for callers that treat them alike."""


class ChannelFull(ChannelLayerError):
    """The channel holds as many messages as its capacity allows; this one was not stored.

    Channel layer specification, "Capacity": sending never waits for room.
    """


class MessageTooLarge(ChannelLayerError):
    """The encoded message is larger than the layer carries in one piece."""


class InvalidMessage(ChannelLayerError, ValueError):
    """A value that ASGI does not allow in a message; the text names its place.

    For example ``message["headers"][2][1]: NaN is not allowed``.
    """


class InvalidName(ChannelLayerError, TypeError):
    """Not a valid channel or group name; the text names the value and the rule."""


class BrokerUnavailable(ChannelLayerError, ConnectionError):
    """The broker could not be reached, or the connection was lost before it answered.

    A command that was already written may or may not have been carried out.
    """


class BrokerUnsuitable(ChannelLayerError):
    """The broker is too old or configured to evict keys; the text says which and what to change."""


class BrokerError(ChannelLayerError):
    """The broker refused a command, with this text; it was not carried out."""


class WireError(ChannelLayerError, ValueError):
    """Bytes from the broker that this release cannot read; the text says what was expected."""


def repr_short(value: object) -> str:
    """Show what came over the wire in an error's text. repr() fails on the thousand levels that msgpack reads."""
    return reprlib.repr(value)[:200]
