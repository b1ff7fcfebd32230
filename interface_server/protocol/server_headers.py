"""The headers that we add to every response, also of a WebSocket handshake: Date, Server, --header. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import Final

__all__ = ["SERVER_NAME", "ServerHeaders"]

SERVER_NAME: Final = b"trunkline"


class ServerHeaders:
    """Renders them once a second. A header that the application sends itself replaces ours of that name."""

    __slots__ = ("_clock", "_extra", "_has_date", "_names", "_second", "_server", "decisive", "lines", "pairs")

    def __init__(
        self,
        *,
        date: bool,
        server: bool,
        extra: Sequence[tuple[bytes, bytes]] = (),
        clock: Callable[[], float],
    ) -> None:
        self._has_date = date
        self._clock = clock  # seconds since 1970
        own = {name.lower() for name, _ in extra}
        self._server: tuple[tuple[bytes, bytes], ...] = (
            ((b"server", SERVER_NAME),) if server and b"server" not in own else ()
        )
        if b"date" in own:
            self._has_date = False
        self._extra = tuple(extra)
        self._second = -1
        self.pairs: tuple[tuple[bytes, bytes], ...] = ()  # valid after refresh()
        self.lines = b""  # the same as it stands in a head
        self._names: frozenset[bytes] = frozenset((*own, b"date", b"server"))
        # Who finds none of these in a response may put ``lines`` behind it.
        self.decisive = self._names | {b"connection", b"content-length", b"transfer-encoding"}

    def __repr__(self) -> str:
        return f"<ServerHeaders {self.pairs!r}>"

    def refresh(self) -> ServerHeaders:
        """Bring the date up to now (RFC 9110 section 6.6.1) and return self."""
        now = int(self._clock())
        if now != self._second:
            self._second = now
            date = ((b"date", formatdate(now, usegmt=True).encode("ascii")),) if self._has_date else ()
            self.pairs = date + self._server + self._extra
            self.lines = b"".join([name + b": " + value + b"\r\n" for name, value in self.pairs])
        return self

    def lines_without(self, names: set[bytes]) -> bytes:
        """Like ``lines`` without those that the application sends itself (``names`` in lower case)."""
        if self._names.isdisjoint(names):
            return self.lines
        return b"".join([name + b": " + value + b"\r\n" for name, value in self.pairs if name.lower() not in names])
