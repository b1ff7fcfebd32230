"""Compression of WebSocket messages: permessage-deflate (RFC 7692), from a client's offer to frames and back. No I/O.

    negotiate   a client's offers, and our answer
    Deflate     what was agreed on: builds compressed frames
    Inflater    inflates one message of a client, never beyond a number of bytes

Neither side keeps anything from one message to the next (``server_no_context_takeover`` and
``client_no_context_takeover``): a connection that says nothing costs no memory for it, and a compressed message is
the same bytes for every client with the same window, so that broadcasts are compressed once (broadcast.py). The price
is the ratio of small messages that resemble each other; docs/decisions/0012-compression.md has the measurements.

Does not live here: when a frame is read (frame_reader.py), the handshake around the offers (websocket_handshake.py).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

from interface_server.protocol.websocket_frames import build_frame

__all__ = ["CorruptMessage", "Deflate", "Inflater", "MalformedOffer", "MessageTooLarge", "inflate", "negotiate"]

_NAME: Final = b"permessage-deflate"

# The largest windows we use and, where the client lets us choose, ask for: 4 KiB. A compressor of this size is made
# in 3 us, one of zlib's defaults (15 bits, memory level 8) in 55; 16 KiB of JSON become 3,800 bytes, not 3,774.
_WINDOW_BITS: Final = 12
_MEMORY_LEVEL: Final = 5
_LEVEL: Final = 6

# Messages of fewer bytes leave as they are: with nothing before them to refer to, 128 bytes of JSON lose 15%, 256
# lose 40%.
_COMPRESSED_BYTES_MIN: Final = 256
# And so do messages of more: they are compressed on the event loop, which 1 MiB holds for some 8 ms.
_COMPRESSED_BYTES_MAX: Final = 1024 * 1024

_RSV1: Final = 0x40  # section 6: the message is compressed

# Section 7.2.2: what a sender leaves away. Behind it an empty final block, without which nobody could tell a whole
# message from the first half of one.
_TAIL: Final = b"\x00\x00\xff\xff"
_END: Final = _TAIL + b"\x01\x00\x00\xff\xff"

# The farthest that DEFLATE refers back, whatever the window (RFC 1951 section 3.2.5).
_HISTORY_BYTES: Final = 32 * 1024

_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2
_QUOTED: Final = re.compile(rb'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_BITS: Final = {b"%d" % bits: bits for bits in range(8, 16)}  # section 7.1.2: decimal, without leading zeros


class MalformedOffer(ValueError):
    """Sec-WebSocket-Extensions does not follow its grammar (RFC 6455 section 9.1)."""


class MessageTooLarge(Exception):
    """A client's message inflates to more than it may."""


class CorruptMessage(Exception):
    """A client's message is not DEFLATE, or not all of it."""


@dataclass(frozen=True, slots=True)
class Deflate:
    """One setting of the extension."""

    server_window_bits: int  # of what we send; frames of the same number are the same
    client_window_bits: int  # of what the client sends
    answer: bytes  # value of Sec-WebSocket-Extensions

    def build_message(self, opcode: int, payload: bytes) -> bytes:
        """Return the frame of one message, compressed if that makes it smaller."""
        if _COMPRESSED_BYTES_MIN <= len(payload) <= _COMPRESSED_BYTES_MAX:
            deflater = zlib.compressobj(_LEVEL, zlib.DEFLATED, -self.server_window_bits, _MEMORY_LEVEL)
            compressed = (deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH))[: -len(_TAIL)]
            if len(compressed) < len(payload):
                return build_frame(_RSV1 | opcode, compressed)
        return build_frame(opcode, payload)


class Inflater:
    """Inflates one message of a client, in pieces."""

    __slots__ = ("_bytes_left", "_history", "_inflate", "_is_empty", "_window_bits")

    def __init__(self, window_bits: int, message_bytes_max: int) -> None:
        self._window_bits = window_bits
        self._bytes_left = message_bytes_max  # to come; beyond: MessageTooLarge
        self._inflate = zlib.decompressobj(-window_bits)
        self._is_empty = True  # nothing came yet
        self._history = b""  # the end of what was inflated: a block behind a final one may refer to it

    def __repr__(self) -> str:
        return f"<Inflater window={self._window_bits} bits, {self._bytes_left} bytes left>"

    def feed(self, data: bytes) -> bytes:
        """Return what ``data`` inflates to. Raises MessageTooLarge, CorruptMessage."""
        if not data:
            return b""
        self._is_empty = False
        parts: list[bytes] = []
        while True:
            inflate = self._inflate
            if inflate.eof:
                # Section 7.2.1: a message may be made of several streams that end with a final block.
                self._inflate = inflate = zlib.decompressobj(-self._window_bits, zdict=self._history)
            try:
                part = inflate.decompress(data, self._bytes_left + 1)
            except zlib.error as error:
                raise CorruptMessage(str(error)) from error
            self._bytes_left -= len(part)
            if self._bytes_left < 0:
                raise MessageTooLarge
            parts.append(part)
            if len(part) < _HISTORY_BYTES:
                part = self._history + part
            self._history = part[-_HISTORY_BYTES:]
            data = inflate.unused_data
            if not data:
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def finish(self) -> bytes:
        """Return the rest, behind the last piece. Raises as ``feed``."""
        # Not quite allowed: no payload at all for an empty message, no empty block behind a final one.
        if self._is_empty or self._has_ended():
            return b""
        rest = self.feed(_END)
        if not self._has_ended():
            raise CorruptMessage("the compressed message is cut off")
        return rest

    def _has_ended(self) -> bool:
        return self._inflate.eof


def inflate(payload: bytes, *, window_bits: int, message_bytes_max: int) -> bytes:
    """Inflate a whole message. Raises as Inflater."""
    inflater = zlib.decompressobj(-window_bits)
    try:
        message = inflater.decompress(payload + _END, message_bytes_max + 1)
    except zlib.error:
        message = b""
    if len(message) > message_bytes_max:
        raise MessageTooLarge
    if inflater.eof and not inflater.unused_data:
        return message
    # Something is unusual, or wrong.
    careful = Inflater(window_bits, message_bytes_max)
    return careful.feed(payload) + careful.finish()


def negotiate(values: Iterable[bytes]) -> Deflate | None:
    """Accept the first offer that we can (section 5); None if there is none. Raises MalformedOffer.

    ``values`` are those of all Sec-WebSocket-Extensions headers.
    """
    offers = [offer for value in values for offer in _read_extensions(value)]
    for name, parameters in offers:
        if name.lower() == _NAME:
            deflate = _accept(parameters)
            if deflate is not None:
                return deflate
    return None


def _accept(parameters: list[tuple[bytes, bytes | None]]) -> Deflate | None:
    """Section 7.1: an offer with an unknown parameter, a repeated one or a wrong value is declined."""
    server_bits = _WINDOW_BITS
    client_bits: int | None = None
    seen = set()
    for name, value in parameters:
        if name in seen:
            return None
        seen.add(name)
        if name == b"server_no_context_takeover" or name == b"client_no_context_takeover":
            if value is not None:
                return None
        elif name == b"server_max_window_bits":
            # zlib makes no raw streams with windows of 8 bits.
            wanted = _BITS.get(value or b"", 8)
            if wanted == 8:
                return None
            server_bits = min(server_bits, wanted)
        elif name == b"client_max_window_bits":
            allowed = 15 if value is None else _BITS.get(value)
            if allowed is None:
                return None
            client_bits = min(_WINDOW_BITS, allowed)
        else:
            return None
    return _agree(server_bits, client_bits)


@cache  # there are some twenty
def _agree(server_bits: int, client_bits: int | None) -> Deflate:
    # The first three may stand in an answer without having been offered (sections 7.1.1 and 7.1.2.1), the fourth may
    # not (7.1.2.2).
    answer = b"%b; server_no_context_takeover; client_no_context_takeover; server_max_window_bits=%d" % (
        _NAME,
        server_bits,
    )
    if client_bits is not None:
        answer += b"; client_max_window_bits=%d" % client_bits
    return Deflate(server_bits, 15 if client_bits is None else client_bits, answer)


def _read_extensions(value: bytes) -> Iterator[tuple[bytes, list[tuple[bytes, bytes | None]]]]:
    """Names and parameters (RFC 6455 section 9.1).

    Splitting at commas and semicolons is right: a quoted value must be a token, too, which has neither.
    """
    for item in value.split(b","):
        if not item.strip(b" \t"):
            continue  # RFC 9110 section 5.6.1.2
        name, *rest = (part.strip(b" \t") for part in item.split(b";"))
        parameters = []
        for part in rest:
            key, equals, text = part.partition(b"=")
            key, text = key.rstrip(b" \t"), text.lstrip(b" \t")
            if quoted := _QUOTED.fullmatch(text):
                text = re.sub(rb"\\(.)", rb"\1", quoted[1], flags=re.DOTALL)
            if not _TOKEN.fullmatch(key) or (equals and not _TOKEN.fullmatch(text)):
                raise MalformedOffer(f"{part[:80].decode('latin-1')!a} is not a parameter of an extension")
            parameters.append((key, text if equals else None))
        if not _TOKEN.fullmatch(name):
            raise MalformedOffer(f"{name[:80].decode('latin-1')!a} is not the name of an extension")
        yield name, parameters
