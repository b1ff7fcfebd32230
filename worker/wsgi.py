"""WSGI applications (PEP 3333: Flask, Django's ``wsgi.py``) as ASGI 3: one thread for each running request.

    thread of the pool                              loop of the worker
    application(environ, start_response)
    for chunk in iterable:  --_Exchange.put()-->    pump(): await send(…)
    wsgi.input.read()       --run on the loop-->    await receive()

The thread waits where the client is slow (bounded by ``WAITING_BYTES_MAX`` and the connection's window) and where
the body has not arrived; nothing is collected whole, in neither direction. Everything of a request runs in its one
thread and in one copy of the context: the call, the iteration, ``close()``.

A thread cannot be cancelled. When the client has gone or the call is cancelled, the next chunk or read raises
ClientDisconnected in the application, the iterable is closed, and until then the request keeps its thread and its
place in the worker. So requests beyond ``threads`` are not taken from the broker's queue (settings.py), and none
waits here behind a busy thread while another worker has one free.

The environ is wsgi_environ.py's. To offer more to applications: a variable there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import io
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from worker.events import ClientDisconnected
from worker.wsgi_environ import build_environ

if TYPE_CHECKING:
    from worker.application import Receive, Scope, Send

__all__ = ["WAITING_BYTES_MAX", "FileWrapper", "WsgiAdapter", "WsgiError"]

logger = logging.getLogger("trunkline.worker")

# What the application has produced beyond what send() has taken: more, and its thread waits. PEP 3333 wants a block
# to be on its way while the application makes the next, so one large block is enough.
WAITING_BYTES_MAX: Final = 64 * 1024
# How much of the body a small read() fetches ahead of the application, out of an event that is here already.
INPUT_BUFFER_BYTES: Final = 16 * 1024
# wsgi.file_wrapper reads at least this much: Django asks for blocks of 4 KiB, each of which would be an event.
FILE_BLOCK_BYTES_MIN: Final = 64 * 1024
# A line to wsgi.errors that does not end is logged in pieces of this length.
ERROR_LINE_CHARACTERS_MAX: Final = 64 * 1024

# PEP 3333, "Other HTTP Features": these are the server's.
_HOP_BY_HOP: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)

Header = tuple[bytes, bytes]
ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None]
WsgiApplication = Callable[[dict[str, Any], Callable[..., Any]], Any]


class WsgiError(RuntimeError):
    """The application did what PEP 3333 does not allow; the text names the value."""


class WsgiAdapter:
    """A WSGI application as an ASGI application, with a thread pool of its own."""

    def __init__(self, application: WsgiApplication, *, threads: int) -> None:
        self._application = application
        # Its queue holds only what was taken while a thread was still busy with a request whose client had gone.
        self._pool = ThreadPoolExecutor(threads, "wsgi")

    def __repr__(self) -> str:
        return f"<WsgiAdapter of {self._application!r:.80}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A cancelled call waits for the thread all the same: the thread cannot be ended, only told."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})  # before accept: the client gets 403
            return
        if scope["type"] != "http":
            raise WsgiError(f"a WSGI application has no {scope['type']!r}")
        exchange = _Exchange(scope, receive)
        context = contextvars.copy_context()
        future = self._pool.submit(context.run, exchange.run, self._application)
        try:
            await exchange.pump(send)
        except asyncio.CancelledError:
            exchange.refuse("the request was cancelled")
            if not future.cancel():  # it runs
                await exchange.wait_ended()
            raise


class _Exchange:
    """One request: what its thread and the loop share. ``_changed`` guards every field below it."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._scope = scope
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._wakeup = asyncio.Event()  # there is something for pump()

        # The thread's own.
        self._start: tuple[int, list[Header]] | None = None  # of start_response()
        self._is_start_put = False

        self._changed = threading.Condition()
        self._head: tuple[int, list[Header]] | None = None  # for pump() to send
        self._chunks: list[bytes] = []  # bounded by WAITING_BYTES_MAX and one chunk: then put() waits
        self._waiting_bytes = 0  # of chunks, and of those that send() has not taken yet
        self._is_last = False  # the body is complete with these chunks
        self._is_woken = False
        self._refusal: str | None = None  # why put() and receive_body() raise ClientDisconnected
        self._reading: concurrent.futures.Future[Any] | None = None  # the receive() that the thread waits for
        self._is_ended = False
        self._error: BaseException | None = None  # with which the thread ended

    # On the thread

    def run(self, application: WsgiApplication) -> None:
        error: BaseException | None = None
        errors = _ErrorLog(f"{self._scope['method']} {self._scope['path']}")
        try:
            environ = build_environ(
                self._scope,
                wsgi_input=io.BufferedReader(_RequestBody(self.receive_body), INPUT_BUFFER_BYTES),
                wsgi_errors=errors,
                file_wrapper=FileWrapper,
            )
            self._respond(application, environ)
        except BaseException as raised:  # sys.exit() in a view ends the view; pump() raises it again
            error = raised
        errors.flush_rest()
        with self._changed:
            self._is_ended = True
            self._error = error
            self._wake()

    def _respond(self, application: WsgiApplication, environ: dict[str, Any]) -> None:
        result = application(environ, self.start_response)
        try:
            if isinstance(result, (bytes, str)):
                raise WsgiError(f"the application returned {type(result).__name__}, expected a list of bytes")
            if type(result) in (list, tuple) and len(result) == 1:
                # PEP 3333, "Handling the Content-Length Header": known to be whole, so the response gets its length.
                self.put(_checked_chunk(result[0]), is_last=True)
                return
            for chunk in result:
                if _checked_chunk(chunk):
                    self.put(chunk)
                    if self._scope["method"] == "HEAD":
                        break  # nobody reads it
            self.put(b"", is_last=True)
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                close()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExceptionInfo | None = None
    ) -> Callable[[bytes], None]:
        """PEP 3333, "The start_response() Callable"; faults are raised here, at the faulty line."""
        if exc_info is not None:
            try:
                if self._is_start_put:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # a circle with the frame otherwise
        elif self._start is not None:
            raise WsgiError("start_response() was called again, and without exc_info")
        self._start = _checked_status(status), _checked_headers(headers)
        return self._write

    def _write(self, data: bytes) -> None:
        if _checked_chunk(data):
            self.put(data)

    def put(self, chunk: bytes, *, is_last: bool = False) -> None:
        """Hand a chunk to the loop; return when the client's window has room for more.

        Raises ClientDisconnected, WsgiError.
        """
        if self._start is None:
            raise WsgiError("the application sent its body without having called start_response()")
        with self._changed:
            if self._refusal is not None:
                raise ClientDisconnected(self._refusal)
            if not self._is_start_put:
                self._is_start_put = True
                self._head = self._start
            self._chunks.append(chunk)
            self._waiting_bytes += len(chunk)
            self._is_last = is_last
            self._wake()
            if is_last:
                return  # close() is next, and need not wait for the client
            while self._waiting_bytes > WAITING_BYTES_MAX and self._refusal is None:
                self._changed.wait()
            if self._refusal is not None:
                raise ClientDisconnected(self._refusal)

    def receive_body(self) -> tuple[bytes, bool]:
        """Wait for the next piece of the body; returns it, and whether it is the last. Raises ClientDisconnected."""
        with self._changed:
            if self._refusal is not None:
                raise ClientDisconnected(self._refusal)
            # A task for each: pump() may wait in send() for a client that first wants its body to be read.
            reading = asyncio.run_coroutine_threadsafe(self._next_event(), self._loop)
            self._reading = reading
        try:
            event = reading.result()
        except concurrent.futures.CancelledError:
            raise ClientDisconnected(self._refusal or "the request was cancelled") from None
        finally:
            with self._changed:
                self._reading = None
        if event["type"] != "http.request":
            raise ClientDisconnected("the client disconnected before its request was complete")
        return event.get("body", b""), not event.get("more_body", False)

    def _wake(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            # A closed loop: the worker did not wait for this thread any longer, and nobody is left to tell.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wakeup.set)

    # On the loop

    async def _next_event(self) -> dict[str, Any]:
        return await self._receive()

    async def pump(self, send: Send) -> None:
        """Send what the thread puts, until it has ended; raise what it raised."""
        failure: Exception | None = None
        is_ended = False
        while not is_ended:
            await self._wakeup.wait()
            self._wakeup.clear()
            with self._changed:
                self._is_woken = False
                head, self._head = self._head, None
                chunks, self._chunks = self._chunks, []
                is_last, is_ended = self._is_last, self._is_ended
            if not chunks or failure is not None:
                continue
            body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            try:
                if head is not None:
                    await send({"type": "http.response.start", "status": head[0], "headers": head[1]})
                await send({"type": "http.response.body", "body": body, "more_body": not is_last})
            except Exception as error:
                failure = error
                self.refuse(str(error))
                continue
            with self._changed:
                self._waiting_bytes -= len(body)
                self._changed.notify_all()
        raised: BaseException | None = self._error
        # ClientDisconnected is what a refused thread ends with: then why it was refused is the reason.
        if raised is not None and not (failure is not None and isinstance(raised, ClientDisconnected)):
            raise raised from failure
        if failure is not None:
            raise failure

    def refuse(self, reason: str) -> None:
        """Let the thread's next put() or read raise, also one that waits."""
        with self._changed:
            if self._refusal is None:
                self._refusal = reason
            self._changed.notify_all()
            reading = self._reading
        if reading is not None:
            reading.cancel()

    async def wait_ended(self) -> None:
        """Wait for the thread, and drop what it still puts."""
        while not self._is_ended:
            await self._wakeup.wait()
            self._wakeup.clear()
            with self._changed:
                self._is_woken = False


class _RequestBody(io.RawIOBase):
    """The body as it arrives; io.BufferedReader makes read(), readline(), readlines() and iteration of it.

    It ends where the body ends: the interface server has counted the content-length.
    """

    def __init__(self, fetch: Callable[[], tuple[bytes, bool]]) -> None:
        self._fetch = fetch
        self._rest = memoryview(b"")  # of the last piece
        self._is_complete = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and not self._is_complete:
            piece, self._is_complete = self._fetch()
            self._rest = memoryview(piece)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


class _ErrorLog(io.TextIOBase):
    """``wsgi.errors``: each line becomes a line of the log."""

    def __init__(self, request: str) -> None:
        self._request = request
        self._rest = ""  # of a line; bounded by ERROR_LINE_CHARACTERS_MAX, then it is logged as it is

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._log(line)
        if len(self._rest) > ERROR_LINE_CHARACTERS_MAX:
            self.flush_rest()
        return len(text)

    def flush_rest(self) -> None:
        """Log a line that has not ended. Not flush(): what print() flushes need not be a line."""
        rest, self._rest = self._rest, ""
        if rest:
            self._log(rest)

    def _log(self, line: str) -> None:
        logger.error("%s: %s", self._request, line)


class FileWrapper:
    """``wsgi.file_wrapper``: the blocks of a file, from where it stands."""

    def __init__(self, file: Any, block_bytes: int = FILE_BLOCK_BYTES_MIN) -> None:
        self._file = file
        self._block_bytes = max(block_bytes, FILE_BLOCK_BYTES_MIN)

    def __iter__(self) -> Iterator[bytes]:
        while block := self._file.read(self._block_bytes):
            yield block

    def close(self) -> None:
        close = getattr(self._file, "close", None)
        if close is not None:
            close()


# What the application hands over


def _checked_chunk(chunk: Any) -> bytes:
    if not isinstance(chunk, bytes):
        raise WsgiError(f"the application sent {chunk!r:.80} ({type(chunk).__name__}) as body, expected bytes")
    return chunk


def _checked_status(status: Any) -> int:
    if not isinstance(status, str):
        raise WsgiError(f"start_response(): the status is {status!r:.80} ({type(status).__name__}), expected a str")
    digits = status[:3]
    if not (digits.isascii() and digits.isdigit() and status[3:4] in ("", " ") and 200 <= int(digits) <= 999):
        raise WsgiError(f"start_response(): the status is {status!r:.80}, expected one like '200 OK'")
    return int(digits)


def _checked_headers(headers: Any) -> list[Header]:
    if not isinstance(headers, list):
        raise WsgiError(f"start_response(): the headers are a {type(headers).__name__}, expected a list")
    checked = []
    for header in headers:
        try:
            name, value = header
            encoded = name.lower().encode("latin-1"), value.encode("latin-1")
        except (ValueError, TypeError, AttributeError) as error:
            raise WsgiError(
                f"start_response(): the header {header!r:.80} is not a pair of str in Latin-1: {error}"
            ) from error
        if not encoded[0] or any(forbidden in text for text in encoded for forbidden in (b"\r", b"\n", b"\0")):
            raise WsgiError(f"start_response(): the header {header!r:.80} has CR, LF or NUL, or no name")
        if encoded[0] not in _HOP_BY_HOP:
            checked.append(encoded)
    return checked
