"""The body of a response from a file (ASGI extension ``http.response.pathsend``), at the client's pace.

Reads happen in the loop's threads, one at a time and only when the piece before has been written, so a file costs one
piece of memory whatever its size, and a slow disk stops nobody else.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from typing import Final

__all__ = ["FileSender"]

_PIECE_BYTES: Final = 64 * 1024


class FileSender:
    """Calls ``piece(data, is_last)`` until the file is at its end, or ``failed(error)`` once."""

    __slots__ = ("_descriptor", "_failed", "_is_cancelled", "_is_paused", "_loop", "_path", "_piece", "_reading")

    def __init__(
        self,
        path: str,
        *,
        loop: asyncio.AbstractEventLoop,
        piece: Callable[[bytes, bool], None],
        failed: Callable[[OSError], None],
    ) -> None:
        self._path = path
        self._loop = loop
        self._piece = piece
        self._failed = failed
        self._descriptor = -1  # used by one thread at a time: the reading one, else the loop's
        self._reading: asyncio.Future[bytes] | None = None
        self._is_paused = False
        self._is_cancelled = False

    def __repr__(self) -> str:
        return f"<FileSender {self._path!r} reading={self._reading is not None} paused={self._is_paused}>"

    def start(self) -> None:
        self._read_on()

    def pause(self) -> None:
        """Call nothing from now on, until ``resume``; but a read that is under way still brings its piece."""
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._read_on()

    def cancel(self) -> None:
        """Call nothing any more."""
        self._is_cancelled = True
        if self._reading is None:
            self._close()

    def _read_on(self) -> None:
        if self._reading is None and not self._is_paused and not self._is_cancelled:
            self._reading = self._loop.run_in_executor(None, self._read)
            self._reading.add_done_callback(self._read_done)

    def _read(self) -> bytes:
        """In a thread."""
        if self._descriptor < 0:
            # O_NONBLOCK: opening a named pipe would wait for its other end.
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise OSError("it is not a regular file")
        return os.read(self._descriptor, _PIECE_BYTES)

    def _read_done(self, reading: asyncio.Future[bytes]) -> None:
        self._reading = None
        if self._is_cancelled or reading.cancelled():
            self._close()
            return
        error = reading.exception()
        if error is not None:
            self._close()
            self._is_cancelled = True
            self._failed(error if isinstance(error, OSError) else OSError(str(error)))
            return
        data = reading.result()
        # A regular file gives less than was asked for at its end only.
        is_last = len(data) < _PIECE_BYTES
        if is_last:
            self._close()
            self._is_cancelled = True
        self._piece(data, is_last)
        self._read_on()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
