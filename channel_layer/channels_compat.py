"""What Django Channels' users expect of a layer besides the contract: their exceptions and the old helpers.

Channels is not a dependency and is never imported here. Code written for it says
``except channels.exceptions.ChannelFull``, so once that module is loaded, the errors that the layers raise are
of both classes. The names of channels are checked by names.py; the methods here only hand over.
"""

from __future__ import annotations

import sys

from channel_layer import errors
from channel_layer.capacity import Capacities
from channel_layer.errors import ChannelFull, ChannelLayerError, MessageTooLarge
from channel_layer.names import NAME_LENGTH_MAX, check_channel_name, check_group_name, non_local_name

__all__ = ["ChannelsBackend", "channel_full", "message_too_large"]


def channel_full(text: str) -> ChannelFull:
    """Build a ChannelFull that ``except channels.exceptions.ChannelFull`` catches too, if that class exists."""
    error = _class_for_both(ChannelFull)(text)
    assert isinstance(error, ChannelFull)
    return error


def message_too_large(text: str) -> MessageTooLarge:
    """Build a MessageTooLarge that ``except channels.exceptions.MessageTooLarge`` catches too."""
    error = _class_for_both(MessageTooLarge)(text)
    assert isinstance(error, MessageTooLarge)
    return error


def _class_for_both(ours: type[ChannelLayerError]) -> type[ChannelLayerError]:
    # Looked up at each error, not once: Channels may be imported after us.
    theirs = getattr(sys.modules.get("channels.exceptions"), ours.__name__, None)
    if not (isinstance(theirs, type) and issubclass(theirs, Exception)):
        return ours
    both = _CLASSES_FOR_BOTH.get((ours, theirs))
    if both is None:
        both = type(ours.__name__, (ours, theirs), {"__doc__": ours.__doc__, "__module__": ours.__module__})
        _CLASSES_FOR_BOTH[ours, theirs] = both
    return both


# Two entries in practice. Kept because a class made anew for every full channel costs 10 us and a cycle to collect.
_CLASSES_FOR_BOTH: dict[tuple[type, type], type[ChannelLayerError]] = {}


class ChannelsBackend:
    """What applications and libraries use of ``channels.layers.BaseChannelLayer``.

    A layer derives from it and sets ``expiry`` and ``_capacities``.
    """

    # Required of a layer object by the specification; what is raised is one of these or a subclass.
    ChannelFull: type[Exception] = errors.ChannelFull
    MessageTooLarge: type[Exception] = errors.MessageTooLarge

    MAX_NAME_LENGTH = NAME_LENGTH_MAX

    expiry: float
    _capacities: Capacities

    @property
    def capacity(self) -> int:
        """The capacity of channels that no pattern of ``channel_capacity`` matches."""
        return self._capacities.default

    def get_capacity(self, channel: str) -> int:
        """Return the capacity of a channel."""
        return self._capacities.of(channel)

    def require_valid_channel_name(self, name: str, receive: bool = False) -> bool:
        """Return True, or raise TypeError. ``receive`` is ignored: ours receive from full names, as consumers do."""
        check_channel_name(name)
        return True

    def require_valid_group_name(self, name: str) -> bool:
        """Return True, or raise TypeError."""
        check_group_name(name)
        return True

    # Names before Channels 4.2; libraries still call them.
    def valid_channel_name(self, name: str, receive: bool = False) -> bool:
        return self.require_valid_channel_name(name)

    def valid_group_name(self, name: str) -> bool:
        return self.require_valid_group_name(name)

    def non_local_name(self, name: str) -> str:
        """Return the name up to and including "!", or the whole name of a normal channel."""
        return non_local_name(name)
