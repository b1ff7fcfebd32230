"""How many messages a channel holds: the default and the exceptions to it, by pattern.

    {"thumbnails": 1000, "http.*": 200, re.compile(r"specific\\..+!"): 20}

A str is a glob for the whole name (case counts), a compiled regular expression is matched from the start of the
name; the first match in the order of the dict wins. Patterns meet the full name of a channel, as in Channels,
so Channels' documented ``re.compile(r"^websocket.send\\!.+")`` works. The messages counted are those of the
non-local name: all channels ``specific.c7…!…`` of one process share one capacity (channel layer specification,
"Capacity"), so a pattern should not depend on what stands behind the "!".

What happens at the limit is the layers' business: send() raises ChannelFull, group_send() drops.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping

from channel_layer.messages import CAPACITY_DEFAULT

__all__ = ["Capacities"]


class Capacities:
    """The capacity of every channel name."""

    __slots__ = ("_patterns", "default")

    def __init__(
        self, default: int = CAPACITY_DEFAULT, channel_capacity: Mapping[str | re.Pattern[str], int] | None = None
    ) -> None:
        """Raises TypeError and ValueError, which name the option and the value."""
        self.default = _check_capacity("capacity", default)
        # In the order they were given: the first match wins.
        self._patterns: list[tuple[re.Pattern[str], int]] = []
        if channel_capacity is None:
            return
        if not isinstance(channel_capacity, Mapping):
            raise TypeError(
                f"channel_capacity is a {type(channel_capacity).__name__}, expected a dict of patterns to capacities"
            )
        for pattern, capacity in channel_capacity.items():
            if isinstance(pattern, str):
                compiled = re.compile(fnmatch.translate(pattern))
            elif isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
                compiled = pattern
            else:
                raise TypeError(
                    f"channel_capacity has the key {pattern!r}, expected a glob (str) or a compiled "
                    "regular expression of text"
                )
            self._patterns.append((compiled, _check_capacity(f"channel_capacity[{pattern!r}]", capacity)))

    def __repr__(self) -> str:
        exceptions = {pattern.pattern: capacity for pattern, capacity in self._patterns}
        return f"<Capacities default={self.default} exceptions={exceptions}>"

    @property
    def is_default(self) -> bool:
        return self.default == CAPACITY_DEFAULT and not self._patterns

    def adopt(self, other: Capacities) -> None:
        """Be as ``other`` from now on."""
        self.default, self._patterns = other.default, other._patterns

    def of(self, channel: str) -> int:
        """Return how many messages may wait in ``channel``, or in all channels of its non-local name."""
        for pattern, capacity in self._patterns:
            if pattern.match(channel):
                return capacity
        return self.default


def _check_capacity(option: str, value: object) -> int:
    # True is an int, and a capacity of True is never what somebody meant.
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{option} is {value!r}, expected an int")
    if value < 1:
        raise ValueError(f"{option} is {value}, expected at least 1: nothing could ever be sent")
    return value
