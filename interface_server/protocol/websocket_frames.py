"""The WebSocket frames that a server writes, as bytes (RFC 6455 section 5.2). No I/O.

Building a server's frame is a header in front of the payload, because servers do not mask; it is done here and not
by Autobahn, so that a frame is one bytes object and can be shared by all receivers of a broadcast. Reading frames
is Autobahn's work (interface_server/websocket.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "BINARY",
    "CLOSE",
    "PING",
    "PONG",
    "TEXT",
    "build_close",
    "build_frame",
    "close_code_is_valid",
    "read_message",
    "truncate_reason",
]

# Opcodes, section 5.2.
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

# Section 5.5: a control frame's payload is at most 125 bytes; two of a Close are the code.
_REASON_BYTES_MAX: Final = 123

# Heads of frames with FIN set and a payload of 0 to 125 bytes: nearly all control frames and most messages.
_SHORT_HEADS: Final = {
    opcode: tuple(bytes((0x80 | opcode, length)) for length in range(126))
    for opcode in (TEXT, BINARY, CLOSE, PING, PONG, 0x40 | TEXT, 0x40 | BINARY)
}


def build_frame(opcode: int, payload: bytes) -> bytes:
    """Return an unmasked frame with FIN set; ``opcode`` with RSV bits, if any (deflate.py)."""
    length = len(payload)
    if length < 126:
        return _SHORT_HEADS[opcode][length] + payload
    if length < 65536:
        return b"%c\x7e%b%b" % (0x80 | opcode, length.to_bytes(2, "big"), payload)
    return b"%c\x7f%b%b" % (0x80 | opcode, length.to_bytes(8, "big"), payload)


def read_message(event: Mapping[str, Any]) -> tuple[int, bytes] | None:
    """Return opcode and payload of a ``websocket.send`` event; None if it is not a valid one.

    ASGI "Send": exactly one of "text" and "bytes" is not None; empty ones are messages, too.
    """
    text, data = event.get("text"), event.get("bytes")
    if data is None and type(text) is str:
        try:
            return TEXT, text.encode()
        except UnicodeEncodeError:  # a lone surrogate
            return None
    if text is None and type(data) is bytes:
        return BINARY, data
    return None


def build_close(code: int | None, reason: str = "") -> bytes:
    """Return a Close frame; ``code`` None leaves the payload empty. A long reason is cut."""
    if code is None:
        return build_frame(CLOSE, b"")
    return build_frame(CLOSE, code.to_bytes(2, "big") + truncate_reason(reason).encode())


def close_code_is_valid(code: int) -> bool:
    """True for the codes that may stand in a Close frame, of either side.

    RFC 6455 section 7.4 and the IANA registry: 1004 to 1006 and 1015 are never sent, 1016 to 2999 not assigned.
    """
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


def truncate_reason(reason: str) -> str:
    """Return what of ``reason`` fits into a Close frame, never half a character; lone surrogates become "?"."""
    encoded = reason.encode("utf-8", "replace")
    return encoded[:_REASON_BYTES_MAX].decode("utf-8", "ignore")
