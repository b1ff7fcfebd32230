from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel_layer.frames import Outcome
from interface_server.client import Refusal
from interface_server.protocol.actions import NOTHING, End, Output
from interface_server.protocol.http_exchange import HttpExchange, Phase, build_plain_response
from interface_server.protocol.server_headers import ServerHeaders

NO_HEADERS = ServerHeaders(date=False, server=False, clock=lambda: 0.0)


def exchange(
    *,
    method: str = "GET",
    http_version: str = "1.1",
    keep_alive: bool = True,
    expects_continue: bool = False,
    request_is_complete: bool = True,
    server_headers: ServerHeaders = NO_HEADERS,
) -> HttpExchange:
    return HttpExchange(
        method=method,
        http_version=http_version,
        keep_alive=keep_alive,
        expects_continue=expects_continue,
        request_is_complete=request_is_complete,
        server_headers=server_headers,
    )


def start(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: bytes = b"", more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def run(subject: HttpExchange, *events: dict[str, Any]) -> tuple[bytes, End | None, list[str]]:
    """What is written for these events, how it ended, and the problems."""
    written, end, problems = b"", None, []
    for event in events:
        assert end is None, "events behind the end"
        output = subject.apply(event)
        written += b"".join(output.data)
        end = output.end
        if output.problem is not None:
            problems.append(output.problem)
    return written, end, problems


# Framing


def test_start_and_body_leave_in_one_write() -> None:
    subject = exchange()
    assert subject.apply(start((b"content-length", b"5"), (b"x", b"y"))) == NOTHING
    assert subject.apply(body(b"hello")) == Output(
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nx: y\r\n\r\nhello",), End.KEEP
    )


def test_a_response_of_one_body_gets_its_length() -> None:
    assert run(exchange(), start(), body(b"hello")) == (
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        End.KEEP,
        [],
    )
    assert run(exchange(http_version="1.0"), start(), body()) == (
        b"HTTP/1.1 200 OK\r\nconnection: keep-alive\r\ncontent-length: 0\r\n\r\n",
        End.KEEP,
        [],
    )


def test_a_response_of_unknown_length_is_chunked() -> None:
    assert run(
        exchange(),
        start(),
        body(b"hello", True),
        body(b"", True),
        body(b" world"),
    ) == (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n",
        End.KEEP,
        [],
    )
    assert run(exchange(), start(), body(b"", True), body(b"x", True), body()) == (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        End.KEEP,
        [],
    )


@pytest.mark.parametrize(
    ("method", "status", "headers", "lines"),
    [
        ("GET", 200, [], b"transfer-encoding: chunked\r\n"),
        ("GET", 200, [(b"content-length", b"5")], b"content-length: 5\r\n"),
        ("HEAD", 200, [], b""),
        ("GET", 204, [], b""),
    ],
)
def test_an_empty_body_of_which_more_follows_writes_the_head(
    method: str, status: int, headers: list[tuple[bytes, bytes]], lines: bytes
) -> None:
    subject = exchange(method=method)
    written, end, problems = run(subject, start(*headers, status=status), body(b"", True))
    assert written.split(b"\r\n", 1)[1] == lines + b"\r\n"
    assert (end, problems) == (None, [])
    assert run(subject, body(b"hello"))[1:] == (End.KEEP, [])


def test_to_http_1_0_the_end_of_the_connection_is_the_end_of_the_body() -> None:
    assert run(exchange(http_version="1.0"), start(), body(b"hello", True), body(b"!")) == (
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello!",
        End.CLOSE,
        [],
    )


def test_large_bodies_are_not_copied() -> None:
    data = bytes(100_000)
    subject = exchange()
    subject.apply(start())
    first = subject.apply(body(data, True))
    assert first.data[1] is data
    assert b"".join(first.data).endswith(b"\r\n186a0\r\n" + data + b"\r\n")
    last = subject.apply(body(data))
    assert last.data[1] is data
    assert b"".join(last.data) == b"186a0\r\n" + data + b"\r\n0\r\n\r\n"
    subject = exchange()
    subject.apply(start((b"content-length", b"100000")))
    assert [part is data for part in subject.apply(body(data)).data] == [False, True]


def test_an_applications_transfer_encoding_is_ignored() -> None:
    assert run(exchange(), start((b"Transfer-Encoding", b"gzip")), body(b"x", True))[0] == (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n"
    )


@pytest.mark.parametrize(
    ("method", "status", "length_is_kept"),
    [("HEAD", 200, True), ("HEAD", 404, True), ("GET", 304, True), ("GET", 204, False), ("HEAD", 204, False)],
)
def test_responses_without_a_body(method: str, status: int, length_is_kept: bool) -> None:
    for events in ([body(b"hello")], [body(b"he", True), body(b"llo")], [body()]):
        written, end, problems = run(
            exchange(method=method), start((b"content-length", b"5"), status=status), *events
        )
        assert (b"content-length: 5\r\n" in written) is length_is_kept
        assert written.endswith(b"\r\n\r\n")
        assert written.count(b"\r\n\r\n") == 1
        assert (end, problems) == (End.KEEP, [])
        assert b"transfer-encoding" not in run(exchange(method=method), start(status=status), *events)[0]


def test_the_status_line() -> None:
    assert run(exchange(), start(status=404), body())[0].startswith(b"HTTP/1.1 404 Not Found\r\n")
    assert run(exchange(), start(status=599), body())[0].startswith(b"HTTP/1.1 599 \r\n")


def test_header_names_order_and_duplicates_are_kept() -> None:
    written, _, _ = run(exchange(), start((b"set-cookie", b"a"), (b"X-A", b""), (b"set-cookie", b"b")), body())
    assert b"\r\nset-cookie: a\r\nX-A: \r\nset-cookie: b\r\n" in written


# Length


def test_more_than_the_content_length_is_cut_off_and_told_once() -> None:
    subject = exchange()
    written, end, problems = run(
        subject, start((b"content-length", b"5")), body(b"hello wo", True), body(b"rld", True), body()
    )
    assert written.endswith(b"\r\n\r\nhello")
    assert (end, len(problems), subject.surplus_bytes) == (End.KEEP, 1, 6)
    assert "content-length of 5" in problems[0]


def test_less_than_the_content_length_cuts_the_connection() -> None:
    written, end, problems = run(exchange(), start((b"content-length", b"5")), body(b"he", True), body(b"l"))
    assert written.endswith(b"hel")
    assert (end, len(problems)) == (End.CUT, 1)


@pytest.mark.parametrize("values", [[b"x"], [b"-1"], [b""], [b"5", b"5"], [b"9" * 19]])
def test_a_content_length_that_is_none(values: list[bytes]) -> None:
    written, end, problems = run(exchange(), start(*((b"Content-Length", value) for value in values)))
    assert written.startswith(b"HTTP/1.1 500 ")
    assert (end, len(problems)) == (End.KEEP, 1)


# The connection


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_wants_to_close_is_told_so(version: str) -> None:
    written, end, _ = run(exchange(http_version=version, keep_alive=False), start(), body())
    assert b"connection: close\r\n" in written
    assert end is End.CLOSE


@pytest.mark.parametrize("value", [b"close", b"Foo, Close"])
def test_an_application_may_close(value: bytes) -> None:
    written, end, _ = run(exchange(), start((b"connection", value)), body())
    assert written.count(b"onnection") == 1
    assert end is End.CLOSE


def test_an_application_may_not_keep_what_we_close() -> None:
    written, end, _ = run(exchange(keep_alive=False), start((b"connection", b"upgrade")), body())
    assert b"connection: upgrade\r\nconnection: close\r\n" in written
    assert end is End.CLOSE


def test_no_further_request_while_the_server_stops() -> None:
    subject = exchange()
    subject.apply(start())
    subject.close_after()
    output = subject.apply(body())
    assert b"connection: close\r\n" in output.data[0]
    assert output.end is End.CLOSE
    subject = exchange()
    run(subject, start(), body(b"x", True))
    subject.close_after()
    assert subject.apply(body()).end is End.CLOSE


def test_our_headers_stand_behind_the_applications() -> None:
    headers = ServerHeaders(date=True, server=True, extra=((b"x-node", b"7"),), clock=lambda: 0.0)
    assert run(exchange(server_headers=headers), start((b"a", b"b")), body())[0] == (
        b"HTTP/1.1 200 OK\r\na: b\r\ncontent-length: 0\r\n"
        b"date: Thu, 01 Jan 1970 00:00:00 GMT\r\nserver: trunkline\r\nx-node: 7\r\n\r\n"
    )
    assert b"trunkline" not in run(exchange(server_headers=headers), start((b"Server", b"x")), body())[0]


# 100 Continue


def expecting(**changes: Any) -> HttpExchange:
    return exchange(method="POST", expects_continue=True, request_is_complete=False, **changes)


def test_a_100_is_sent_when_the_application_wants_the_body() -> None:
    subject = expecting()
    assert subject.apply_receiving() == Output((b"HTTP/1.1 100 Continue\r\n\r\n",))
    assert subject.apply_receiving() == NOTHING
    subject.request_is_complete = True
    assert run(subject, start(), body())[1] is End.KEEP


def test_no_100_for_who_did_not_ask() -> None:
    assert exchange(request_is_complete=False).apply_receiving() == NOTHING


def test_no_100_once_the_response_has_begun() -> None:
    subject = expecting()
    subject.apply(start())
    assert subject.apply_receiving() == NOTHING


def test_a_response_without_100_closes() -> None:
    """Whether the client sends its body now is its own choice: nobody can tell what comes next."""
    written, end, _ = run(expecting(), start(), body())
    assert b"connection: close\r\n" in written
    assert b"100" not in written
    assert end is End.CLOSE


def test_a_client_that_did_not_wait_needs_no_100() -> None:
    subject = expecting()
    subject.apply_body_begun()
    assert subject.apply_receiving() == NOTHING
    subject = expecting()
    subject.request_is_complete = True
    assert subject.apply_receiving() == NOTHING
    assert run(subject, start(), body())[1] is End.KEEP


# The end of the application


def test_an_application_that_returns_without_a_response() -> None:
    for events in ([], [start((b"x", b"y"))]):
        subject = exchange()
        run(subject, *events)
        data, end, problem = subject.apply_ended(Outcome.RETURNED)
        assert data == (
            b"HTTP/1.1 500 Internal Server Error\r\ncontent-type: text/plain; charset=utf-8\r\n"
            b"content-length: 22\r\n\r\nInternal Server Error\n",
        )
        assert end is End.KEEP
        assert problem is None  # the worker knows more, and has logged it
        assert subject.status == 500


@pytest.mark.parametrize("outcome", [Outcome.RAISED, Outcome.CANCELLED])
def test_an_application_that_fails_is_its_workers_to_log(outcome: Outcome) -> None:
    data, end, problem = exchange().apply_ended(outcome)
    assert data[0].startswith(b"HTTP/1.1 500 ")
    assert (end, problem) == (End.KEEP, None)


def test_an_application_that_ends_in_mid_body() -> None:
    """Nothing may make the response look complete."""
    for headers in ([], [(b"content-length", b"9")]):
        subject = exchange()
        run(subject, start(*headers), body(b"x", True))
        data, end, problem = subject.apply_ended(Outcome.RETURNED)
        assert (list(data), end, problem) == ([], End.CUT, None)
    subject = exchange(http_version="1.0")
    run(subject, start(), body(b"x", True))
    assert subject.apply_ended(Outcome.RAISED) == Output((), End.RESET)


def test_the_end_behind_a_complete_response_changes_nothing() -> None:
    subject = exchange()
    run(subject, start(), body())
    assert subject.apply_ended(Outcome.RAISED) == NOTHING


@pytest.mark.parametrize("refusal", list(Refusal))
def test_refusals(refusal: Refusal) -> None:
    data, end, _ = exchange().apply_refused(refusal)
    assert data[0].startswith(b"HTTP/1.1 %d " % refusal.status)
    assert (b"\r\nretry-after: 1\r\n" in data[0]) is (refusal.status == 503)
    assert refusal.reason.encode() in data[0]
    assert end is End.KEEP
    subject = exchange()
    run(subject, start(), body(b"x", True))
    assert subject.apply_refused(refusal) == Output((), End.CUT)


def test_an_error_response_to_head_has_no_body() -> None:
    data, _, _ = exchange(method="HEAD").apply_refused(Refusal.QUEUE_FULL)
    assert data[0].endswith(b"\r\n\r\n")


def test_a_bad_body_is_answered_and_closes() -> None:
    data, end, _ = exchange(request_is_complete=False).apply_bad_request(400, "malformed chunk size")
    assert data[0].startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert data[0].endswith(b"Bad Request: malformed chunk size\n")
    assert b"connection: close\r\n" in data[0]
    assert end is End.CLOSE


# Every event in every phase

EVENTS: dict[str, dict[str, Any]] = {
    "start": start(),
    "body": body(b"x", True),
    "last body": body(b"x"),
    "unknown": {"type": "http.response.trailers", "headers": []},
}
BEFORE: dict[Phase, list[dict[str, Any]]] = {
    Phase.WAITING: [],
    Phase.STARTED: [start()],
    Phase.STREAMING: [start(), body(b"x", True)],
    Phase.OVER: [start(), body(b"x")],
}
ALLOWED = {
    (Phase.WAITING, "start"): (Phase.STARTED, None),
    (Phase.STARTED, "body"): (Phase.STREAMING, None),
    (Phase.STARTED, "last body"): (Phase.OVER, End.KEEP),
    (Phase.STREAMING, "body"): (Phase.STREAMING, None),
    (Phase.STREAMING, "last body"): (Phase.OVER, End.KEEP),
}


@pytest.mark.parametrize("phase", list(Phase), ids=lambda phase: phase.name)
@pytest.mark.parametrize("name", list(EVENTS))
def test_every_event_in_every_phase(phase: Phase, name: str) -> None:
    subject = exchange()
    run(subject, *BEFORE[phase])
    assert subject.phase is phase
    output = subject.apply(EVENTS[name])
    if (phase, name) in ALLOWED:
        assert (subject.phase, output.end) == ALLOWED[phase, name]
        assert output.problem is None
        return
    assert subject.phase is Phase.OVER
    if phase is Phase.OVER:
        assert output == NOTHING
        assert subject.late_count == 1
    elif phase is Phase.STREAMING:
        assert output.end is End.CUT
        assert output.problem is not None
    else:
        assert output.data[0].startswith(b"HTTP/1.1 500 ")
        assert output.problem is not None


@pytest.mark.parametrize("status", [100, 101, 199, 1000, 0])
def test_a_status_that_is_no_final_response(status: int) -> None:
    assert run(exchange(), start(status=status))[0].startswith(b"HTTP/1.1 500 ")


@pytest.mark.parametrize(
    "header", [(b"a", b"b\r\nc: d"), (b"a", b"b\n"), (b"a", b"b\r"), (b"a\r\nb", b""), (b"a", b"\0"), (b"a\n", b"")]
)
def test_headers_that_would_split_the_response(header: tuple[bytes, bytes]) -> None:
    """The worker refuses them in send(); a broken worker must not reach the client either."""
    written, end, problems = run(exchange(), start(header), body())
    assert written.startswith(b"HTTP/1.1 500 ")
    assert (end, len(problems)) == (End.KEEP, 1)


# Groups


@pytest.mark.parametrize(
    ("changes", "events", "takes"),
    [
        ({}, [], False),
        ({}, [start()], True),
        ({}, [start(), body(b"x", True)], True),
        ({}, [start(), body(b"x")], False),
        ({}, [start((b"content-length", b"5"))], False),
        ({}, [start((b"content-length", b"5")), body(b"x", True)], False),
        ({"http_version": "1.0"}, [start(), body(b"x", True)], True),
        ({"method": "HEAD"}, [start()], False),
        ({"method": "HEAD"}, [start(), body(b"x", True)], False),
        ({}, [start(status=204)], False),
    ],
)
def test_when_messages_of_groups_mean_something(
    changes: dict[str, Any], events: list[dict[str, Any]], takes: bool
) -> None:
    subject = exchange(**changes)
    run(subject, *events)
    assert subject.takes_groups is takes


def test_a_message_of_a_group_that_does_not_fit_is_dropped() -> None:
    for before in ([start()], [start(), body(b"x", True)]):
        subject = exchange()
        run(subject, *before)
        assert subject.apply({"type": "http.response.body", "body": "text", "more_body": True}) == NOTHING
        assert subject.dropped_count == 1
        assert subject.apply(body(b"y")).end is End.KEEP


def test_plain_responses() -> None:
    assert build_plain_response(400, None, server_headers=NO_HEADERS, keep_alive=False) == (
        b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 12\r\n"
        b"connection: close\r\n\r\nBad Request\n"
    )
    assert b"\r\nconnection: keep-alive\r\n" in build_plain_response(
        503, "later", server_headers=NO_HEADERS, keep_alive=True, is_modern=False
    )


def test_the_state_can_be_seen() -> None:
    subject = exchange()
    run(subject, start(), body(b"abc", True))
    assert repr(subject) == "<HttpExchange STREAMING status=200 framing=CHUNKS body_bytes=3 keep_alive=True>"
    assert subject.is_written


WHOLE_HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            (
                b"content-length",
                b"Content-Length",
                b"connection",
                b"transfer-encoding",
                b"date",
                b"server",
                b"x",
                b"X-Y",
            )
        ),
        st.sampled_from((b"", b"0", b"3", b"4", b"close", b"chunked", b"keep-alive", b"a\r\nb: c", b"\0", b"\n")),
    ),
    max_size=4,
)


@given(
    method=st.sampled_from(("GET", "HEAD")),
    http_version=st.sampled_from(("1.0", "1.1")),
    keep_alive=st.booleans(),
    expects_continue=st.booleans(),
    status=st.sampled_from((100, 199, 200, 204, 304, 404, 418, 599, 999, 1000)),
    headers=WHOLE_HEADERS,
    body=st.sampled_from((b"", b"abc", b"x" * 16384, b"x" * 16385)),
)
def test_a_whole_response_is_written_as_its_parts_would_be(
    method: str,
    http_version: str,
    keep_alive: bool,
    expects_continue: bool,
    status: int,
    headers: list[tuple[bytes, bytes]],
    body: bytes,
) -> None:
    whole, parts = (
        exchange(
            method=method,
            http_version=http_version,
            keep_alive=keep_alive,
            expects_continue=expects_continue,
            request_is_complete=not expects_continue,
            server_headers=ServerHeaders(date=True, server=True, extra=((b"X-Y", b"z"),), clock=lambda: 0.0),
        )
        for _ in range(2)
    )
    output = parts.apply({"type": "http.response.start", "status": status, "headers": headers})
    if parts.phase is Phase.STARTED:
        output = parts.apply({"type": "http.response.body", "body": body, "more_body": False})
    got = whole.apply_whole(status, headers, body)
    assert (b"".join(got.data), got.end, got.problem) == (b"".join(output.data), output.end, output.problem)
    assert (whole.phase, whole.status, whole.body_bytes) == (parts.phase, parts.status, parts.body_bytes)
    assert got.end is not None


def test_a_whole_response_behind_the_end_is_late() -> None:
    over = exchange()
    over.apply_refused(Refusal.STOPPING)
    assert over.apply_whole(200, [], b"x") == NOTHING
    assert over.late_count == 1
