"""Messages and events as bytes (msgpack), and the check that they hold only what ASGI allows.

``encode_message`` and ``decode_message`` are for messages of applications, which may hold anything: they check
every value, because plain msgpack is laxer than ASGI (it takes NaN, ints up to 2**64 and keys of any type), and
the error names the place: ``message["headers"][2][1]: NaN is not allowed``. ``encode_event`` and ``decode_event``
are for events that a validator of ours has built or checked, on the path between interface server and worker.

Encoding is a snapshot: what the caller does to the message afterwards changes nothing. No I/O happens here.
To allow a further type, change ``_is_plain`` and ``_plain_copy`` together; the tests compare them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import msgpack

from channel_layer.channels_compat import message_too_large
from channel_layer.errors import InvalidMessage, WireError
from channel_layer.messages import DEPTH_MAX, INT_MAX, INT_MIN, MESSAGE_BYTES_MAX, RESERVED_KEY, DecodedMessage

__all__ = ["decode_event", "decode_message", "encode_event", "encode_message"]

# Shared, so its buffer is allocated once. Only for values without dict subclasses: their items() is Python code,
# and msgpack's Packer lets a nested or concurrent pack() overwrite the bytes of the outer one.
_pack_event: Callable[[object], bytes] = msgpack.Packer(use_bin_type=True, autoreset=True).pack

# What needs no further look. bool before int: type() is exact here, so True never meets the range check.
_LEAVES: Final = frozenset({str, bytes, bool, type(None)})

_KEY_SHOWN_CHARS_MAX: Final = 40


def encode_message(message: Mapping[str, Any]) -> bytes:
    """Check a message and encode it. Tuples become lists, subclasses of the allowed types their base type.

    Raises InvalidMessage, which names the place, and MessageTooLarge.
    """
    plain: object = message
    if type(message) is not dict or RESERVED_KEY in message or not _is_plain(message, DEPTH_MAX):
        # Refused, or right but with subclasses (Django's SafeString, enums, OrderedDict): the slow way tells.
        plain = _plain_message(message)
    try:
        # A packer of its own costs 0.1 us and leaves no buffer of the size of the largest message ever seen.
        encoded: bytes = msgpack.Packer(use_bin_type=True, buf_size=1024).pack(plain)
    except UnicodeEncodeError:
        _plain_message(message)  # names the place of the lone surrogate
        raise
    if len(encoded) > MESSAGE_BYTES_MAX:
        raise message_too_large(f"the message is {len(encoded)} bytes when encoded, the limit is {MESSAGE_BYTES_MAX}")
    return encoded


def decode_message(data: bytes) -> DecodedMessage:
    """Decode a message and check it like ``encode_message``. Raises WireError."""
    message = _unpack(data, "message")
    if not _is_plain(message, DEPTH_MAX):
        try:
            _plain_copy(message, "message", DEPTH_MAX)
        except InvalidMessage as error:
            raise WireError(f"message of {len(data)} bytes holds what ASGI does not allow: {error}") from error
    return message


def encode_event(event: Mapping[str, Any]) -> bytes:
    """Encode an event that a validator of ours has built: allowed types only, no dict subclasses, not checked."""
    return _pack_event(event)


def decode_event(data: bytes) -> DecodedMessage:
    """Decode what ``encode_event`` of the peer wrote; values are not checked. Raises WireError."""
    return _unpack(data, "event")


def _unpack(data: bytes, what: str) -> DecodedMessage:
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True, ext_hook=_refuse_extension)
    except Exception as error:  # msgpack raises half a dozen unrelated types
        raise WireError(f"{what} of {len(data)} bytes is not msgpack: {error!r}") from error
    if type(value) is not dict:
        raise WireError(f"{what} of {len(data)} bytes is a {type(value).__name__}, expected a map")
    return value


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code} with {len(data)} bytes of data")


def _is_plain(container: Any, levels: int) -> bool:
    """True if a dict, list or tuple holds only values of exactly the allowed types, at most ``levels`` deep.

    False says "look closer", not "refused". Lone surrogates are found by the packer, which reads the text anyway.
    """
    values = container
    if type(container) is dict:
        for key in container:
            if type(key) is not str:
                return False
        values = container.values()
    for value in values:
        kind = type(value)
        if kind in _LEAVES:
            continue
        if kind is list or kind is dict or kind is tuple:
            if levels <= 1 or not _is_plain(value, levels - 1):
                return False
        elif kind is int:
            if not INT_MIN <= value <= INT_MAX:
                return False
        elif kind is not float or value - value != 0.0:  # NaN and the infinities: x - x is NaN
            return False
    return True


def _plain_message(message: object) -> DecodedMessage:
    if not isinstance(message, dict):
        raise InvalidMessage(f"message: {type(message).__name__} is not allowed, a message is a dict")
    if RESERVED_KEY in message:
        raise InvalidMessage(f'message["{RESERVED_KEY}"]: this key is reserved for channel layers')
    plain: DecodedMessage = _plain_copy(message, "message", DEPTH_MAX)
    return plain


def _plain_copy(value: Any, place: str, levels: int) -> Any:
    """Return a copy of exactly the allowed types; raise InvalidMessage at the first value that is not allowed.

    The base types' own methods are called, because a subclass may say something else about itself:
    ``str(Colour.RED)`` is "Colour.RED" for many enums, while the value on the wire is "red".
    """
    if value is None or type(value) is bool:
        return value
    if isinstance(value, str):
        return _plain_text(value, place)
    if isinstance(value, bytes):
        return bytes(memoryview(value))
    if isinstance(value, int):
        if not INT_MIN <= value <= INT_MAX:
            raise InvalidMessage(f"{place}: an int outside -2**63 … 2**63-1 is not allowed")
        return int.__int__(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            name = "NaN" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
            raise InvalidMessage(f"{place}: {name} is not allowed")
        return float.__float__(value)
    if not isinstance(value, dict | list | tuple):
        hint = ", use bytes" if isinstance(value, bytearray | memoryview) else ""
        raise InvalidMessage(f"{place}: {type(value).__name__} is not allowed{hint}")
    if levels < 1:
        raise InvalidMessage(f"{place}: more than {DEPTH_MAX} levels of dicts and lists are not allowed")
    if not isinstance(value, dict):
        return [_plain_copy(item, f"{place}[{index}]", levels - 1) for index, item in enumerate(value)]
    copy: DecodedMessage = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise InvalidMessage(f"{place}: the key {key!r:.40} of type {type(key).__name__} is not allowed, use str")
        plain_key = _plain_text(key, f"{place}: the key {_shown(key)}")
        copy[plain_key] = _plain_copy(item, f"{place}[{_shown(key)}]", levels - 1)
    return copy


def _plain_text(text: str, place: str) -> str:
    plain = str.__str__(text)
    try:
        plain.encode()
    except UnicodeEncodeError as error:
        code = ord(plain[error.start])
        raise InvalidMessage(
            f"{place}: a lone surrogate (U+{code:04X} at {error.start}) is not allowed in text"
        ) from None
    return plain


def _shown(key: str) -> str:
    """The key in double quotes, in ASCII, shortened if it is long."""
    plain = str.__str__(key)
    cut = plain if len(plain) <= _KEY_SHOWN_CHARS_MAX else plain[:_KEY_SHOWN_CHARS_MAX] + "…"
    return json.dumps(cut, ensure_ascii=not cut.isprintable())
