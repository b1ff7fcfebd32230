"""One line for each HTTP response and each change of a WebSocket, in the format of uvicorn's access log.

    127.0.0.1:5000 - "GET /x?a=1 HTTP/1.1" 200 3.1ms
    127.0.0.1:5000 - "WebSocket /ws" [accepted] 2.0ms
    127.0.0.1:5000 - "WebSocket /ws" 403 2.0ms
    127.0.0.1:5000 - "WebSocket /ws" [closed 1000] 61042.7ms

The time is the application's, as a client feels it: from the moment the opening left for a worker to the response
start (the accept, the refusal); for ``closed`` it is how long the WebSocket was open. No time is written where no
application was asked (a 400). What a client sent is escaped, so that it cannot forge lines or steer a terminal.
Handlers, level and colours are the business of trunkline/logs.py.
"""

from __future__ import annotations

import logging
import re
from typing import Final

__all__ = ["AccessLog", "escape"]

_LOGGER: Final = logging.getLogger("trunkline.access")

# C0, DEL, C1 (ESC [ as one byte on some terminals), the quote that ends the field, the backslash we escape with,
# and the line separators that log viewers break lines at.
_UNSAFE = re.compile('[\x00-\x1f\x7f-\x9f"\\\\\u2028\u2029]')


def escape(text: str) -> str:
    """Return ``text`` with control characters, quotes and backslashes written as escapes."""
    if text.isalnum() or not _UNSAFE.search(text):
        return text
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1] if match[0] != '"' else '\\"', text)


class AccessLog:
    """Writes the lines. ``enabled`` is cheap; callers that must build arguments ask it first."""

    __slots__ = ("_wanted", "line_count")

    def __init__(self, *, wanted: bool = True) -> None:
        self._wanted = wanted  # --no-access-log
        self.line_count = 0

    def __repr__(self) -> str:
        return f"<AccessLog wanted={self._wanted} lines={self.line_count}>"

    @property
    def enabled(self) -> bool:
        return self._wanted and _LOGGER.isEnabledFor(logging.INFO)

    def http(
        self,
        *,
        client: tuple[str, int] | None,
        method: str,
        raw_path: bytes,
        query_string: bytes,
        http_version: str,
        status: int,
        application_s: float | None = None,
    ) -> None:
        """The response to a request has been started (or refused) with ``status``."""
        if self.enabled:
            target = _target(raw_path, query_string)
            self._write(
                f'{_address(client)} - "{escape(method)} {target} HTTP/{http_version}" {status}', application_s
            )

    def websocket_accepted(
        self,
        *,
        client: tuple[str, int] | None,
        raw_path: bytes,
        query_string: bytes,
        application_s: float | None = None,
    ) -> None:
        if self.enabled:
            self._websocket(client, raw_path, query_string, "[accepted]", application_s)

    def websocket_refused(
        self,
        *,
        client: tuple[str, int] | None,
        raw_path: bytes,
        query_string: bytes,
        status: int,
        application_s: float | None = None,
    ) -> None:
        """The opening handshake was answered with an HTTP ``status`` other than 101."""
        if self.enabled:
            self._websocket(client, raw_path, query_string, str(status), application_s)

    def websocket_closed(
        self,
        *,
        client: tuple[str, int] | None,
        raw_path: bytes,
        query_string: bytes,
        code: int,
        open_s: float | None = None,
    ) -> None:
        """An accepted WebSocket is over; ``code`` is what the application is told (1006: the socket broke)."""
        if self.enabled:
            self._websocket(client, raw_path, query_string, f"[closed {code}]", open_s)

    def _websocket(
        self, client: tuple[str, int] | None, raw_path: bytes, query_string: bytes, result: str, seconds: float | None
    ) -> None:
        self._write(f'{_address(client)} - "WebSocket {_target(raw_path, query_string)}" {result}', seconds)

    def _write(self, line: str, seconds: float | None) -> None:
        self.line_count += 1
        text = line if seconds is None else f"{line} {seconds * 1000:.1f}ms"
        # As info() does, but for looking through the stack for its caller, which takes 2 us and is always this one.
        # The text is an argument: it may contain "%".
        record = _LOGGER.makeRecord(_LOGGER.name, logging.INFO, __file__, 0, "%s", (text,), None, "AccessLog")
        _LOGGER.handle(record)


def _address(client: tuple[str, int] | None) -> str:
    """``host:port``; "-" for a unix socket. A proxy's header may have named the client, so it is escaped, too."""
    if client is None:
        return "-"
    host, port = client
    return f"[{escape(host)}]:{port}" if ":" in host else f"{escape(host)}:{port}"


def _target(raw_path: bytes, query_string: bytes) -> str:
    target = raw_path + b"?" + query_string if query_string else raw_path
    return escape(target.decode("latin-1"))
