"""The admin port of a command: a few answers over HTTP/1.1 for operators, balancers and container checks.

    GET /healthz    200 while the process turns
    GET /readyz     200 when it can serve, else 503; the body says why

One request a connection, no bodies, nothing of the clients'. What the answers are is the caller's: a mapping from
paths to functions. It serves on asyncio alone, so it is the same in workers, interface servers and the supervisor.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

__all__ = ["AdminPortError", "AdminServer", "Answer", "alive", "explain_listen_error", "readiness"]

logger = logging.getLogger("trunkline.admin")

_HEAD_BYTES_MAX: Final = 8 * 1024
# For a request to come and its answer to leave; then the connection is dropped.
_TIMEOUT_S: Final = 5.0
# Checks are few; for one more the oldest is closed: it has asked for nothing yet, or does not read its answer.
_CONNECTIONS_MAX: Final = 64


def explain_listen_error(error: Exception) -> str:
    """Why a socket could not be opened, without the address: whoever asks knows it, and libraries add it or not."""
    if isinstance(error, UnicodeError):
        return "this is no name of a host"  # its text is about a codec
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)  # its numbers are not errno's
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error)


class AdminPortError(OSError):
    """The operator has to choose another port; the text names this one."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: HTTPStatus
    content: Mapping[str, Any]  # sent as JSON


def alive() -> Answer:
    """That somebody answers is the answer."""
    return Answer(HTTPStatus.OK, {"alive": True})


def readiness(
    why_not: Mapping[str, str | None], *, is_ready: bool | None = None, facts: Mapping[str, Any] | None = None
) -> Answer:
    """``why_not``: for each process None, or why it is not ready. ``is_ready``: all are, unless given."""
    if is_ready is None:
        is_ready = bool(why_not) and not any(reason is not None for reason in why_not.values())
    processes = {name: "ready" if reason is None else reason for name, reason in why_not.items()}
    return Answer(
        HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE,
        {"ready": is_ready, "processes": processes, **(facts or {})},
    )


class AdminServer:
    """Answers GET and HEAD for the paths of ``routes``; each answer is made when it is asked for."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Callable[[], Answer]]) -> None:
        self.host = host
        self.port = port  # 0 takes any; then start() sets it
        self._routes = dict(routes)
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], None] = {}  # oldest first
        self._answered_count = 0

    def __repr__(self) -> str:
        state = "closed" if self._server is None else "open"
        return f"<AdminServer {self.host}:{self.port} {state}, {self._answered_count} answers>"

    async def start(self) -> None:
        """Listen. Raises AdminPortError."""
        try:
            self._server = await asyncio.start_server(
                self._connected, self.host, self.port, limit=_HEAD_BYTES_MAX, reuse_address=True
            )
        except (OSError, UnicodeError) as error:
            reason = explain_listen_error(error)
            raise AdminPortError(f"cannot listen on the admin port {self.host}:{self.port}: {reason}") from error
        self.port = self._server.sockets[0].getsockname()[1]
        logger.info("health checks on http://%s:%d/readyz and /healthz", _bracketed(self.host), self.port)

    async def close(self) -> None:
        """Listen no more; answers under way are dropped."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= _CONNECTIONS_MAX:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        self._connections[task] = None
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._answer(reader, writer)
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # it asked for nothing, or too much, or has left
        except asyncio.CancelledError:
            # Of close(), or for a newer one; asyncio's stream protocol would report it as an error.
            pass
        finally:
            self._connections.pop(task, None)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        route = self._routes.get(path)
        if route is None:
            answer = Answer(HTTPStatus.NOT_FOUND, {"paths": sorted(self._routes)})
        elif method not in ("GET", "HEAD"):
            answer = Answer(HTTPStatus.METHOD_NOT_ALLOWED, {"methods": ["GET", "HEAD"]})
        else:
            answer = route()
        body = json.dumps(answer.content, ensure_ascii=False).encode() + b"\n"
        allow = "Allow: GET, HEAD\r\n" if answer.status is HTTPStatus.METHOD_NOT_ALLOWED else ""
        start = (
            f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\nContent-Type: application/json\r\n{allow}"
            f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        writer.write(start.encode("latin-1") + (b"" if method == "HEAD" else body))
        self._answered_count += 1
        await writer.drain()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
