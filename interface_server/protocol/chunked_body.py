"""A chunked request body from bytes (RFC 9112 section 7.1). No I/O; request_reader.py owns the bytes.

Chunk extensions are dropped (section 7.1.1 tells recipients to ignore what they do not know); trailers are checked
and dropped: ASGI has no event for them. Both are bounded, for they are work without a body.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from channel_layer.enums import quick
from interface_server.protocol.errors import BadRequest

if TYPE_CHECKING:
    from interface_server.protocol.request_reader import ReaderLimits

__all__ = ["PIECE_BYTES_MAX", "TOKEN", "TURN_CHUNKS_MAX", "BodyPiece", "ChunkedBody"]

# One piece is one event of the application and one EVENT frame on the link.
PIECE_BYTES_MAX: Final = 64 * 1024

# Chunks that are read without a pause, in 0.1 to 0.5 ms: one read may hold 10,922 of a byte, and all other clients
# would wait for them. What was read so far is a piece; the rest waits for another turn of the loop (``is_behind``).
TURN_CHUNKS_MAX: Final = 256

TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 section 5.6.2
# Section 7.1.1 allows blanks before ";", and nothing else behind the size.
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]+)((?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?)")
_TRAILER: Final = re.compile(TOKEN + rb":[\t\x20-\x7e\x80-\xff]*")
# What stands for nearly all sizes, without extensions: looked up here it takes a quarter of the time.
_SHORT_SIZES: Final = {
    text.encode(): size for size in range(1, 256) for text in (f"{size:x}", f"{size:X}", f"{size:02x}", f"{size:02X}")
}
# 60 bits: sizes stay in what ASGI calls an integer. More digits are zeros, or an attempt at an overflow.
_SIZE_DIGITS_MAX: Final = 15


class BodyPiece(NamedTuple):
    data: bytes
    is_last: bool


@quick
class _Part(IntEnum):
    """What the next byte belongs to."""

    LINE = 0
    DATA = 1
    DATA_END = 2  # the CRLF behind the data
    TRAILERS = 3


class ChunkedBody:
    """Reads one body. Bytes and position are handed in, and the new position is handed back."""

    __slots__ = (
        "_data",
        "_extension_bytes",
        "_failure",
        "_limits",
        "_part",
        "_position",
        "_remaining_bytes",
        "_trailer_bytes",
        "_trailer_count",
        "is_behind",
    )

    def __init__(self, limits: ReaderLimits) -> None:
        self._limits = limits
        self._part = _Part.LINE
        self._remaining_bytes = 0  # of the chunk
        self._extension_bytes = 0
        self._trailer_bytes = 0
        self._trailer_count = 0
        self._failure: BadRequest | None = None  # found behind data that was delivered first
        # The last call of read() ended because it had read enough for one turn, not for want of bytes.
        self.is_behind = False
        # During a call of read().
        self._data = b""
        self._position = 0

    def __repr__(self) -> str:
        return f"<ChunkedBody {self._part.name} remaining={self._remaining_bytes}>"

    def read(self, data: bytes, position: int) -> tuple[BodyPiece | None, int]:
        """Return the next piece, None if more bytes are needed, and how far ``data`` has been read.

        The data of many small chunks become one piece: an event costs far more than a chunk. ``is_behind`` asks to
        wait for another turn of the loop before the next call. Raises BadRequest.
        """
        self.is_behind = False
        if self._failure is not None:
            raise self._failure
        self._data, self._position = data, position
        try:
            piece = self._read_piece()
        finally:
            self._data = b""
        return piece, self._position

    def _read_piece(self) -> BodyPiece | None:
        data = self._data
        parts: list[bytes] = []
        size_bytes = 0
        chunk_count = 0
        try:
            while size_bytes < PIECE_BYTES_MAX:
                if self._part is _Part.LINE:
                    start = self._position
                    # Whole chunks of fewer than 256 bytes: more chunks than bytes is what costs.
                    while True:
                        if chunk_count >= TURN_CHUNKS_MAX:
                            self.is_behind = True
                            break
                        end = data.find(b"\r\n", start, start + 4)
                        if end < 0:
                            break
                        size = _SHORT_SIZES.get(data[start:end], 0)
                        stop = end + 2 + size
                        if not size or data[stop : stop + 2] != b"\r\n" or size_bytes + size > PIECE_BYTES_MAX:
                            break
                        parts.append(data[end + 2 : stop])
                        size_bytes += size
                        chunk_count += 1
                        start = stop + 2
                    self._position = start
                    if self.is_behind or not self._read_chunk_line():
                        break
                    chunk_count += 1
                elif self._part is _Part.DATA:
                    start = self._position
                    size = min(len(data) - start, self._remaining_bytes, PIECE_BYTES_MAX - size_bytes)
                    if size == 0:
                        break
                    parts.append(data[start : start + size])
                    size_bytes += size
                    self._position = start + size
                    self._remaining_bytes -= size
                    if self._remaining_bytes == 0:
                        self._part = _Part.DATA_END
                elif self._part is _Part.DATA_END:
                    if not self._read_chunk_end():
                        break
                elif not self._read_trailers():
                    break
                else:
                    return BodyPiece(b"".join(parts), True)
        except BadRequest as failure:
            if not parts:
                raise
            self._failure = failure  # what came before it is delivered first
        if not parts:
            return None
        return BodyPiece(parts[0] if len(parts) == 1 else b"".join(parts), False)

    def _read_chunk_end(self) -> bool:
        end = self._data[self._position : self._position + 2]
        if end == b"\r\n":
            self._position += 2
            self._part = _Part.LINE
            return True
        if end and end != b"\r":
            raise BadRequest(400, "chunk is longer than its size")
        return False

    def _read_chunk_line(self) -> bool:
        data, start = self._data, self._position
        limits = self._limits
        end = data.find(b"\r\n", start, start + limits.chunk_line_bytes_max + 2)
        if end < 0:
            if len(data) - start >= limits.chunk_line_bytes_max + 2:
                raise BadRequest(400, "chunk-size line is too long")
            return False
        line = _CHUNK_LINE.fullmatch(data, start, end)
        if line is None or len(line[1]) > _SIZE_DIGITS_MAX:
            raise BadRequest(400, "malformed chunk size")
        size = int(line[1], 16)
        self._extension_bytes += len(line[2])
        if self._extension_bytes > limits.chunk_extensions_bytes_max:
            raise BadRequest(400, "too many chunk extensions")
        self._position = end + 2
        self._remaining_bytes = size
        self._part = _Part.DATA if size else _Part.TRAILERS
        return True

    def _read_trailers(self) -> bool:
        """True when the empty line behind the trailers has been read."""
        data = self._data
        limits = self._limits
        while True:
            start = self._position
            left = limits.trailer_bytes_max - self._trailer_bytes
            end = data.find(b"\r\n", start, start + left + 2)
            if end == start:
                self._position += 2
                return True
            if end < 0:
                if len(data) - start >= left + 2:
                    raise BadRequest(431, "trailers are too large")
                return False
            if not _TRAILER.fullmatch(data, start, end):
                raise BadRequest(400, "malformed trailer")
            self._trailer_count += 1
            if self._trailer_count > limits.headers_max:
                raise BadRequest(431, "too many trailers")
            self._trailer_bytes += end + 2 - start
            if self._trailer_bytes > limits.trailer_bytes_max:
                raise BadRequest(431, "trailers are too large")
            self._position = end + 2
