"""Where HTTP/2 frames begin, and how long they say they are: looked at before h2 collects them. No I/O.

h2 collects a whole frame, up to 16 MiB, before it finds that it is longer than we allow.
"""

from __future__ import annotations

from typing import Final

__all__ = ["FrameGate"]

_PREFACE_BYTES: Final = 24
_HEADER_BYTES: Final = 9
# RFC 9113 section 4.2: what we announce, and everybody may send.
_FRAME_BYTES_MAX: Final = 16 * 1024
_SETTINGS: Final = 4
_ACK: Final = 1


class FrameGate:
    """Is shown all bytes of a client, from its preface on."""

    __slots__ = ("_header", "_is_first", "_skip_bytes")

    def __init__(self) -> None:
        self._skip_bytes = _PREFACE_BYTES  # until the next frame begins
        self._header = b""  # of a frame, as far as it has come
        self._is_first = True

    def __repr__(self) -> str:
        return f"<FrameGate skip={self._skip_bytes} header={self._header!r}>"

    def passes(self, data: bytes) -> bool:
        """False if a frame is too long, or the first one is not SETTINGS (RFC 9113 section 3.4).

        An acknowledgement of SETTINGS is too long if it holds anything (section 6.5); h2 has another code for it.
        """
        position, end = 0, len(data)
        while position < end:
            if self._skip_bytes:
                step = min(self._skip_bytes, end - position)
                self._skip_bytes -= step
                position += step
                continue
            step = _HEADER_BYTES - len(self._header)
            header = self._header + data[position : position + step]
            position += step
            if len(header) < _HEADER_BYTES:
                self._header = header
                return True
            self._header = b""
            self._skip_bytes = int.from_bytes(header[:3], "big")
            if self._skip_bytes > _FRAME_BYTES_MAX or (self._is_first and header[3] != _SETTINGS):
                return False
            if header[3] == _SETTINGS and header[4] & _ACK and self._skip_bytes:
                return False
            self._is_first = False
        return True
