"""The response to one HTTP request: from events of the application to bytes of HTTP/1.x. No I/O.

HTTP/2 has the same exchange with other bytes: http2_exchange.py overrides the methods under "Framing".

    WAITING --start--> STARTED --body--> STREAMING --last body--> OVER
       |                  |                  |
       +--ended, refused: 500, 502, 503 -----+--ended, refused: cut--> OVER

The head is not written with the start but with the first body event (ASGI "Response Start" allows it): until then a
failure can still be answered properly, the two leave in one write, and a body that is complete gets its length.

Interim responses (103, where the ASGI extension is offered) leave at once. Trailers follow a body of chunks, or any
in HTTP/2, with which the response is over; behind any other body they mean nothing and are counted as late.

Framing is ours (H18): the application's content-length if it gave one, chunks to HTTP/1.1, else the end of the
connection. What the application may send is checked in its worker, inside ``send()``; what is wrong here all the
same ends the exchange with a line in the log. Events of a group cannot be checked there: those that do not fit are
dropped and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from http import HTTPStatus
from typing import Any, Final

from channel_layer.enums import quick
from channel_layer.frames import Outcome
from interface_server.client import Refusal
from interface_server.protocol.actions import NOTHING, End, Output
from interface_server.protocol.server_headers import ServerHeaders

__all__ = ["HttpExchange", "Phase", "build_plain_body", "build_plain_response"]

# Where a piece is large, head and chunk marks are written beside it instead of being copied together with it.
_JOIN_BYTES_MAX: Final = 16 * 1024

_LAST_CHUNK: Final = b"0\r\n"  # trailers and an empty line follow

_STATUS_LINES: Final[Mapping[int, bytes]] = {
    status.value: b"HTTP/1.1 %d %s\r\n" % (status.value, status.phrase.encode("ascii")) for status in HTTPStatus
}
# With a body, and without rules of their own.
_USUAL_STATUSES: Final = frozenset(_STATUS_LINES.keys() - {204, 304} - set(range(100, 200)))
# A client may try again after this; it is not a promise.
_RETRY_AFTER_S: Final = 1


@quick
class Phase(IntEnum):
    WAITING = 0  # nothing from the application
    STARTED = 1  # start received, nothing written
    STREAMING = 2  # head written
    OVER = 3


@quick
class _Framing(IntEnum):
    NOTHING = 0  # HEAD, 204, 304: there is no body, whatever the application sends
    LENGTH = 1
    CHUNKS = 2
    CLOSE = 3


class HttpExchange:
    """Ask each method what to write; after an Output with ``end`` everything is ignored and counted."""

    __slots__ = (
        "_body_is_over",
        "_expects_continue",
        "_framing",
        "_headers",
        "_is_head",
        "_is_modern",
        "_keep_alive",
        "_length",
        "_promises_trailers",
        "_remaining_bytes",
        "_server_headers",
        "_trailers",
        "body_bytes",
        "dropped_count",
        "late_count",
        "phase",
        "request_is_complete",
        "status",
        "surplus_bytes",
    )

    def __init__(
        self,
        *,
        method: str,
        http_version: str,
        keep_alive: bool,
        expects_continue: bool,
        request_is_complete: bool,
        server_headers: ServerHeaders,
    ) -> None:
        self.phase = Phase.WAITING
        # The body of the request has been read to its end; kept up to date by the adapter.
        self.request_is_complete = request_is_complete
        self._is_head = method == "HEAD"
        self._is_modern = http_version == "1.1"
        self._keep_alive = keep_alive
        self._expects_continue = expects_continue  # and no 100 has been sent
        self._server_headers = server_headers
        # Of the start.
        self.status: int | None = None  # of the response as it was, or will be, written
        self._headers: Sequence[Sequence[bytes]] = ()
        self._length: int | None = None  # the application's content-length
        self._promises_trailers = False
        # Of the body.
        self._framing = _Framing.NOTHING
        self._remaining_bytes = 0  # of LENGTH
        self._body_is_over = False  # and only trailers may follow
        self._trailers: list[Sequence[bytes]] = []
        self.body_bytes = 0  # written, without framing
        self.surplus_bytes = 0  # sent by the application beyond its content-length, not written
        self.late_count = 0  # events that came when the exchange was over
        self.dropped_count = 0  # events of groups that did not fit

    def __repr__(self) -> str:
        return (
            f"<HttpExchange {self.phase.name} status={self.status} framing={self._framing.name} "
            f"body_bytes={self.body_bytes} keep_alive={self._keep_alive}>"
        )

    @property
    def is_written(self) -> bool:
        """The head of the final response has been written (or given back to be)."""
        return self.phase >= Phase.STREAMING

    @property
    def owes_continue(self) -> bool:
        """True while the client waits for a 100, or a response, before it sends its body."""
        return self._expects_continue

    @property
    def takes_groups(self) -> bool:
        """True while ``http.response.body`` of a group means something: started, and without a length."""
        if self.phase is Phase.STARTED:
            return self._length is None and not self._has_no_body()
        return self.phase is Phase.STREAMING and self._framing >= _Framing.CHUNKS and not self._body_is_over

    @property
    def wants_body(self) -> bool:
        """False where the bytes of the body are dropped: HEAD, 204, 304."""
        return not self._has_no_body()

    def close_after(self) -> None:
        """Let no further request follow; the head says so, if it has not been written."""
        self._keep_alive = False

    def apply(self, event: Mapping[str, Any]) -> Output:
        """Apply an event of the application, or of a group."""
        handler = _TABLE.get((self.phase, event["type"]))
        if handler is not None:
            return handler(self, event)
        if self.phase is Phase.OVER:
            # The worker cannot know yet that the exchange is over: a race, not a fault.
            self.late_count += 1
            return NOTHING
        return self._fail(f"application sent {event['type']!r:.80} in phase {self.phase.name}")

    def apply_whole(self, status: int, headers: Sequence[Sequence[bytes]], body: bytes) -> Output:
        """Apply start and body in one, as an ANSWER brings them."""
        if self.phase is Phase.WAITING:
            data = self._frame_whole(status, headers, body)
            if data is not None:
                self.phase = Phase.OVER
                self.status = status
                self.body_bytes = len(body)
                return Output((data,), End.KEEP)
        start = self.apply({"type": "http.response.start", "status": status, "headers": headers})
        if self.phase is not Phase.STARTED:
            return start
        return self.apply({"type": "http.response.body", "body": body})

    def apply_receiving(self) -> Output:
        """The application waits for the body: now is the time to ask for it (RFC 9110 section 10.1.1)."""
        if not self._expects_continue or self.phase is not Phase.WAITING:
            return NOTHING
        self._expects_continue = False
        return NOTHING if self.request_is_complete else self._frame_interim(100, ())

    def apply_body_begun(self) -> None:
        """The client sends its body without having waited for the 100, which is then needed no more."""
        self._expects_continue = False

    def apply_ended(self, outcome: Outcome) -> Output:
        """The application instance is over."""
        if self.phase is Phase.OVER:
            return NOTHING
        if self._body_is_over and outcome is Outcome.RETURNED:
            return self._end_with_trailers()
        return self._fail(None)  # its worker has logged why

    def apply_refused(self, refusal: Refusal) -> Output:
        """No application has the connection any more."""
        return self._fail(None, refusal.status, refusal.reason)

    def apply_bad_request(self, status: int, reason: str) -> Output:
        """What the client sent as body is wrong: nothing behind it can be read."""
        self._keep_alive = False
        return self._fail(None, status, reason)

    def apply_fault(self, problem: str) -> Output:
        """The response cannot go on; ``problem`` is for the log."""
        return self._fail(problem)

    # Handlers of _TABLE

    def _start(self, event: Mapping[str, Any]) -> Output:
        status = event["status"]
        if not 200 <= status <= 999:
            return self._fail(f"application started a response with status {status}")
        headers: Sequence[Sequence[bytes]] = event.get("headers") or ()
        for name, value in headers:
            if name.lower() == b"content-length":
                if self._length is not None or not value.isdigit() or len(value) > 18:
                    return self._fail(f"application sent content-length {value!r:.80}, or more than one")
                self._length = int(value)
        self.status = status
        self._headers = headers
        self._promises_trailers = event.get("trailers") is True
        self.phase = Phase.STARTED
        return NOTHING

    def _first_body(self, event: Mapping[str, Any]) -> Output:
        body, more = event.get("body", b""), event.get("more_body", False)
        if type(body) is not bytes:
            return self._drop()
        if self._has_no_body():
            self._framing = _Framing.NOTHING
        elif self._length is not None:
            self._framing = _Framing.LENGTH
        elif not more and not self._promises_trailers:
            self._length = len(body)
            self._framing = _Framing.LENGTH
        else:
            self._framing = _Framing.CHUNKS if self._is_modern else _Framing.CLOSE
        try:
            head = self._build_head()
        except ValueError as error:
            return self._fail(str(error))
        self.phase = Phase.STREAMING
        if self._framing is _Framing.LENGTH:
            assert self._length is not None
            self._remaining_bytes = self._length
        return self._write(head, body, is_last=not more)

    def _next_body(self, event: Mapping[str, Any]) -> Output:
        body = event.get("body", b"")
        if type(body) is not bytes or self._body_is_over:
            return self._drop()
        return self._write(b"", body, is_last=not event.get("more_body", False))

    def _early_hint(self, event: Mapping[str, Any]) -> Output:
        links = event.get("links")
        if type(links) is not list or not all(type(link) is bytes and _is_value(link) for link in links):
            return self._fail("application sent an early hint that is not a list of links")
        return self._frame_interim(103, [(b"link", link) for link in links])

    def _ignore(self, event: Mapping[str, Any]) -> Output:
        return NOTHING

    def _add_trailers(self, event: Mapping[str, Any]) -> Output:
        if not self._body_is_over:
            return self._fail("application sent trailers that its start did not promise, or before the body was over")
        self._trailers += event.get("headers") or ()
        if event.get("more_trailers"):
            return NOTHING
        return self._end_with_trailers()

    def _end_with_trailers(self) -> Output:
        try:
            data = self._frame_trailers(self._trailers)
        except ValueError as error:
            return self._fail(str(error))
        self.phase = Phase.OVER
        return Output(data, End.KEEP if self._keep_alive else End.CLOSE)

    def _drop(self) -> Output:
        # Bodies of the application are bytes, its worker saw to that: this came from a group.
        self.dropped_count += 1
        return NOTHING

    # Writing

    def _has_no_body(self) -> bool:
        return self._is_head or self.status in (204, 304)  # RFC 9112 section 6.3, first item

    def _sends_length(self) -> bool:
        return self._framing is _Framing.LENGTH

    def _has_whole_body(self) -> bool:
        """True if nothing is missing of a body that ends here."""
        return self._framing is not _Framing.NOTHING and not self._remaining_bytes

    def _write(self, head: Any, body: bytes, *, is_last: bool) -> Output:
        problem = None
        framing = self._framing
        if framing is _Framing.NOTHING:
            body = b""
        elif framing is _Framing.LENGTH:
            left = self._remaining_bytes - len(body)
            if left < 0:
                if not self.surplus_bytes:
                    problem = f"application sent more than its content-length of {self._length}; the rest is cut off"
                self.surplus_bytes -= left
                body = body[: self._remaining_bytes]
                left = 0
            self._remaining_bytes = left
        self.body_bytes += len(body)
        if is_last and self._promises_trailers and self._takes_trailers():
            self._body_is_over = True
            is_last = False
        data = self._frame(head, body, is_last=is_last)
        if not is_last:
            return Output(data, None, problem)
        self.phase = Phase.OVER
        if framing is _Framing.LENGTH and self._remaining_bytes:
            problem = f"application sent {self._remaining_bytes} bytes less than its content-length of {self._length}"
            return Output(data, End.CUT, problem)
        keep = self._keep_alive and framing is not _Framing.CLOSE
        return Output(data, End.KEEP if keep else End.CLOSE, problem)

    # Framing: what is different in HTTP/2

    def _takes_trailers(self) -> bool:
        """True if trailers may follow the body, which is complete."""
        return self._framing is _Framing.CHUNKS

    def _frame(self, head: Any, body: bytes, *, is_last: bool) -> Sequence[Any]:
        """Return the bytes of a step. ``head`` is what ``_build_head`` returned, or empty."""
        if self._framing is _Framing.CHUNKS:
            mark = b"%x\r\n" % len(body) if body else b""
            tail = b"\r\n" if body else b""
            if is_last:
                tail += _LAST_CHUNK + b"\r\n"
        else:
            mark = tail = b""
        if len(body) > _JOIN_BYTES_MAX:
            return [part for part in (head + mark, body, tail) if part]
        whole = head + mark + body + tail if mark or tail else head + body
        return (whole,) if whole else ()

    def _frame_whole(self, status: int, headers: Sequence[Sequence[bytes]], body: bytes) -> bytes | None:
        """Return a response of the kind that nearly all are; None for what the steps below have to look at."""
        if (
            not (self._keep_alive and self._is_modern)
            or self._is_head
            or self._expects_continue
            or status not in _USUAL_STATUSES
            or len(body) > _JOIN_BYTES_MAX
        ):
            return None
        server_headers = self._server_headers
        parts = [_STATUS_LINES[status]]
        has_length = False
        for name, value in headers:
            lowered = name.lower()
            if lowered in server_headers.decisive:
                if has_length or lowered != b"content-length" or value != b"%d" % len(body):
                    return None
                has_length = True
            parts.append(name + b": " + value + b"\r\n")
        lines = b"".join(parts)
        count = len(parts)
        if lines.count(b"\n") != count or lines.count(b"\r") != count or b"\0" in lines:
            return None
        if has_length:
            return b"".join((lines, server_headers.refresh().lines, b"\r\n", body))
        return b"".join((lines, b"content-length: %d\r\n" % len(body), server_headers.refresh().lines, b"\r\n", body))

    def _frame_trailers(self, trailers: Sequence[Sequence[bytes]]) -> Sequence[Any]:
        """Return the end of a body of chunks. Raises ValueError."""
        return (_LAST_CHUNK + _build_lines(trailers) + b"\r\n",)

    def _frame_interim(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> Output:
        return Output((_STATUS_LINES[status] + _build_lines(headers) + b"\r\n",))

    def _frame_plain(self, status: int, reason: str | None) -> Sequence[Any]:
        """Return a complete response of ours."""
        return (
            build_plain_response(
                status,
                reason,
                server_headers=self._server_headers,
                keep_alive=self._keep_alive,
                is_modern=self._is_modern,
                with_body=not self._is_head,
            ),
        )

    def _build_head(self) -> Any:
        """Return the response head. Raises ValueError for headers that would become something else on the wire."""
        status = self.status
        assert status is not None
        framing = self._framing
        if framing is _Framing.CLOSE or (self._expects_continue and not self.request_is_complete):
            # In the second case the client may or may not send the body now: nobody can tell what follows.
            self._keep_alive = False
        parts = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        names: set[bytes] = set()
        says_close = has_connection = has_length = False
        for name, value in self._headers:
            lowered = name.lower()
            if lowered == b"transfer-encoding" or (lowered == b"content-length" and status == 204):
                continue  # H18; RFC 9110 section 8.6: no Content-Length in a 204
            if lowered == b"connection":
                has_connection = True
                says_close = says_close or b"close" in [token.strip() for token in value.lower().split(b",")]
            elif lowered == b"content-length":
                has_length = True
            names.add(lowered)
            parts.append(name + b": " + value + b"\r\n")
        count = len(parts)
        application = b"".join(parts)
        # The worker has refused these in send(); on the wire they would be other headers, or another response.
        if application.count(b"\n") != count or application.count(b"\r") != count or b"\0" in application:
            raise ValueError("application sent a header with CR, LF or NUL")
        if says_close:
            self._keep_alive = False
        elif not self._keep_alive:
            application += b"connection: close\r\n"
        elif not self._is_modern and not has_connection:
            application += b"connection: keep-alive\r\n"
        if framing is _Framing.CHUNKS:
            application += b"transfer-encoding: chunked\r\n"
        elif framing is _Framing.LENGTH and not has_length:
            assert self._length is not None
            application += b"content-length: %d\r\n" % self._length
        return application + self._server_headers.refresh().lines_without(names) + b"\r\n"

    def _fail(self, problem: str | None, status: int = 500, reason: str | None = None) -> Output:
        """End the exchange: with an error response where that is still possible, else by cutting it."""
        phase, self.phase = self.phase, Phase.OVER
        if phase is Phase.OVER:
            return NOTHING
        if phase is Phase.STREAMING:
            return Output((), End.RESET if self._framing is _Framing.CLOSE else End.CUT, problem)
        if self._expects_continue and not self.request_is_complete:
            self._keep_alive = False
        self.status = status
        return Output(self._frame_plain(status, reason), End.KEEP if self._keep_alive else End.CLOSE, problem)


# What may come when. A pair that is not here ends the exchange (or, when it is over, is late).
_TABLE: Final[Mapping[tuple[int, str], Callable[[HttpExchange, Mapping[str, Any]], Output]]] = {
    (Phase.WAITING, "http.response.start"): HttpExchange._start,
    (Phase.STARTED, "http.response.body"): HttpExchange._first_body,
    (Phase.STREAMING, "http.response.body"): HttpExchange._next_body,
    (Phase.WAITING, "http.response.early_hint"): HttpExchange._early_hint,
    (Phase.STARTED, "http.response.early_hint"): HttpExchange._early_hint,
    (Phase.STREAMING, "http.response.early_hint"): HttpExchange._ignore,
    (Phase.STREAMING, "http.response.trailers"): HttpExchange._add_trailers,
}


def _is_value(value: bytes) -> bool:
    """True if it can stand in a field line without ending it (RFC 9110 section 5.5)."""
    return not any(mark in value for mark in (b"\r", b"\n", b"\0"))


def _build_lines(headers: Sequence[Sequence[bytes]]) -> bytes:
    lines = b"".join([name + b": " + value + b"\r\n" for name, value in headers])
    if lines.count(b"\n") != len(headers) or lines.count(b"\r") != len(headers) or b"\0" in lines:
        raise ValueError("application sent a field with CR, LF or NUL")
    return lines


def build_plain_body(status: int, reason: str | None) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return the body of a response of ours, and the fields that go with it."""
    try:
        text = HTTPStatus(status).phrase
    except ValueError:
        text = str(status)
    body = (f"{text}: {reason}\n" if reason else f"{text}\n").encode()
    fields = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    if status == 503:
        fields.append((b"retry-after", b"%d" % _RETRY_AFTER_S))
    return body, fields


def build_plain_response(
    status: int,
    reason: str | None,
    *,
    server_headers: ServerHeaders,
    keep_alive: bool,
    is_modern: bool = True,
    with_body: bool = True,
) -> bytes:
    """Return a complete response of ours: the phrase of the status as text, with ``reason`` behind it."""
    body, fields = build_plain_body(status, reason)
    parts = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status, _build_lines(fields)]
    if not keep_alive:
        parts.append(b"connection: close\r\n")
    elif not is_modern:
        parts.append(b"connection: keep-alive\r\n")
    parts.append(server_headers.refresh().lines)
    parts.append(b"\r\n")
    if with_body:
        parts.append(body)
    return b"".join(parts)
