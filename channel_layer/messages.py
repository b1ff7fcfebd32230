"""What a message is: its type, its limits, and how long and how many of them a channel keeps by default.

The allowed value types are those of the ASGI specification ("Events"): bytes, str, int in 64 signed bits, finite
float, list, dict with str keys, bool and None. codec.py checks them and turns messages into bytes. The layout of
one element of a broker list is here too, since everything that reads such a list needs it.

There are no TypedDicts of the ASGI events here: asgiref.typing has them, and the validators of the worker and of
the interface server know their own fields.
"""

from __future__ import annotations

import math
from typing import Any, Final

from channel_layer.errors import WireError

__all__ = [
    "CAPACITY_DEFAULT",
    "DEPTH_MAX",
    "EXPIRY_DEFAULT_S",
    "GROUP_EXPIRY_DEFAULT_S",
    "INT_MAX",
    "INT_MIN",
    "MESSAGE_BYTES_MAX",
    "RESERVED_KEY",
    "DecodedMessage",
    "check_seconds",
    "split_element",
]

DecodedMessage = dict[str, Any]

# Encoded. The channel layer specification ("Messages") has 1 MB measured as JSON pass. Encoded text is shorter than
# its JSON, but a float takes 9 bytes where an array in JSON needs no more than 4 ("1.5,"). Nothing grows more, and
# 1 MiB of that is 2.25 MiB. A larger message raises MessageTooLarge and nothing is sent.
MESSAGE_BYTES_MAX: Final = 2304 * 1024

# Containers inside each other, the message itself counted. Far above what people write and far below Python's
# recursion limit, so a list that contains itself is an InvalidMessage and not a crash.
DEPTH_MAX: Final = 64

INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**63 - 1

# Channels' layers put the full channel name into messages under this key. Ours do not, but an application that
# relies on the key would break on other layers.
RESERVED_KEY: Final = "__asgi_channel__"

# As Channels. A message that nobody received for so long is dropped.
EXPIRY_DEFAULT_S: Final = 60.0
# As Channels. Messages waiting in one channel; one more raises ChannelFull (group_send drops it instead).
CAPACITY_DEFAULT: Final = 100
# As Channels: a day after its last group_add, a membership ends; in RedisChannelLayer only that of a normal channel.
GROUP_EXPIRY_DEFAULT_S: Final = 86400.0

_DEADLINE_BYTES: Final = 8


def split_element(element: bytes) -> tuple[int, bytes]:
    """Split an element of a normal channel or of mail into its deadline (broker time, ms) and its content.

    scripts/push.lua puts the deadline in front, eight bytes, big-endian. Raises WireError.
    """
    if len(element) < _DEADLINE_BYTES:
        raise WireError(f"list element of {len(element)} bytes is shorter than its deadline: {element!r}")
    return int.from_bytes(element[:_DEADLINE_BYTES], "big"), element[_DEADLINE_BYTES:]


def check_seconds(option: str, value: object) -> float:
    """Return ``value`` if it is a finite number above zero; else TypeError or ValueError that names the option."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{option} is {value!r}, expected a number of seconds")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{option} is {value!r}, expected a finite number of seconds above 0")
    return float(value)
