"""The parts of HTTP/2 that do no I/O: request heads, responses, handshakes, the budget, the lengths of frames."""

from __future__ import annotations

from typing import Any

import pytest

from channel_layer.frames import Outcome
from interface_server.client import Refusal
from interface_server.protocol.actions import End, Output
from interface_server.protocol.errors import BadRequest
from interface_server.protocol.http2_budget import Budget, Cost
from interface_server.protocol.http2_exchange import Data, Fields, Http2Exchange
from interface_server.protocol.http2_frames import FrameGate
from interface_server.protocol.http2_request import Http2Request, read_request
from interface_server.protocol.http2_websocket import Http2Answers, read_extended_connect
from interface_server.protocol.request import RequestHead
from interface_server.protocol.request_reader import ReaderLimits
from interface_server.protocol.server_headers import ServerHeaders
from interface_server.protocol.websocket_handshake import HandshakeFault, InvalidAccept

HEADERS = ServerHeaders(date=False, server=True, clock=lambda: 0.0)
SERVER = (b"server", b"trunkline")
PSEUDO = {b":method": b"GET", b":scheme": b"https", b":path": b"/a%20b?x=1", b":authority": b"example.org:8443"}


def read(*headers: tuple[bytes, bytes], **pseudo: bytes | None) -> Http2Request:
    fields = {**PSEUDO, **{f":{name}".encode(): value for name, value in pseudo.items()}}
    return read_request(
        [*((name, value) for name, value in fields.items() if value is not None), *headers], ReaderLimits()
    )


# Request heads


def test_a_request_looks_as_one_of_http_1() -> None:
    request = read((b"accept", b" text/html "), (b"x", b""), (b"x", b"2"))
    assert request == Http2Request(
        RequestHead(
            method="GET",
            raw_path=b"/a%20b",
            query_string=b"x=1",
            http_version="2",
            headers=[(b"host", b"example.org:8443"), (b"accept", b"text/html"), (b"x", b""), (b"x", b"2")],
        ),
        is_websocket=False,
        expects_continue=False,
    )


def test_cookies_become_one_line_where_the_first_stood() -> None:
    headers = read((b"a", b"1"), (b"cookie", b"b=2"), (b"c", b"3"), (b"cookie", b"d=4")).head.headers
    assert headers[1:] == [(b"a", b"1"), (b"cookie", b"b=2; d=4"), (b"c", b"3")]


def test_the_authority_is_the_host_and_a_host_alone_will_do() -> None:
    assert read((b"host", b"example.org:8443")).head.headers == [(b"host", b"example.org:8443")]
    assert read((b"host", b"a"), authority=None).head.headers == [(b"host", b"a")]


def test_extended_connect() -> None:
    assert read(method=b"CONNECT", protocol=b"websocket").is_websocket
    assert read((b"expect", b"100-Continue")).expects_continue
    assert read(method=b"OPTIONS", path=b"*").head.raw_path == b"*"


@pytest.mark.parametrize(
    ("headers", "pseudo", "status"),
    [
        ([], {"method": b"G(T"}, 400),
        ([], {"method": b""}, 400),
        ([], {"method": b"CONNECT", "path": None, "scheme": None}, 501),
        ([], {"method": b"CONNECT", "protocol": b"webtransport"}, 501),
        ([], {"path": b""}, 400),
        ([], {"path": b"a"}, 400),
        ([], {"path": b"*"}, 400),
        ([], {"path": b"/a b"}, 400),
        ([], {"path": b"/a#b"}, 400),
        ([], {"path": b"/\xc3\xa4"}, 400),
        ([], {"path": b"/" + b"a" * 16384}, 414),
        ([], {"authority": b"a/b"}, 400),
        ([], {"authority": b"user@a"}, 400),
        ([], {"authority": None}, 400),
        ([(b"host", b"a"), (b"host", b"b")], {"authority": None}, 400),
        ([(b"x\n", b"a")], {}, 400),
        ([(b"X", b"a")], {}, 400),
        ([(b"", b"a")], {}, 400),
        ([(b"x", b"a\rb")], {}, 400),
        ([(b"x", b"a\0b")], {}, 400),
        ([(b"expect", b"more")], {}, 417),
        ([(b"x", b"a")] * 129, {}, 431),
    ],
)
def test_what_is_refused(headers: list[tuple[bytes, bytes]], pseudo: dict[str, Any], status: int) -> None:
    with pytest.raises(BadRequest) as refused:
        read(*headers, **pseudo)
    assert refused.value.status == status


# Responses


def exchange(method: str = "GET", *, expects_continue: bool = False, complete: bool = True) -> Http2Exchange:
    return Http2Exchange(
        method=method, expects_continue=expects_continue, request_is_complete=complete, server_headers=HEADERS
    )


def start(*headers: tuple[bytes, bytes], status: int = 200, **further: Any) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers), **further}


def body(data: bytes = b"", more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def run(subject: Http2Exchange, *events: dict[str, Any]) -> list[Output]:
    return [output for event in events if (output := subject.apply(event)).data or output.end]


def head(*fields: tuple[bytes, bytes], status: bytes = b"200", ends: bool = False) -> Fields:
    return Fields([(b":status", status), *fields, SERVER], ends)


def test_a_complete_body_gets_its_length() -> None:
    (output,) = run(exchange(), start((b"A", b" b ")), body(b"xyz"))
    assert list(output.data) == [head((b"a", b"b"), (b"content-length", b"3")), Data(b"xyz", True)]
    assert output.end is End.KEEP


def test_a_stream_has_no_length_and_ends_with_the_stream() -> None:
    outputs = run(exchange(), start(), body(b"x", True), body(b"", True), body(b"y", True), body())
    assert [list(output.data) for output in outputs] == [
        [head(), Data(b"x", False)],
        [Data(b"y", False)],
        [Data(b"", True)],
    ]
    assert [output.end for output in outputs] == [None, None, End.KEEP]


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_without_a_body_the_head_is_the_end(method: str, status: int) -> None:
    (output,) = run(exchange(method), start(status=status), body(b"dropped"))
    assert list(output.data) == [head(status=b"%d" % status, ends=True)]
    assert output.end is End.KEEP


def test_fields_of_http_1_connections_are_not_sent() -> None:
    fields = [(name, b"x") for name in (b"Connection", b"keep-alive", b"TE", b"transfer-encoding", b"upgrade")]
    (output,) = run(exchange(), start(*fields), body())
    assert list(output.data) == [head((b"te", b"x"), (b"content-length", b"0"), ends=True)]


@pytest.mark.parametrize("field", [(b"a", b"b\r\nc: d"), (b":status", b"200"), (b"", b"x"), (b"a", b"\0")])
def test_fields_that_cannot_be_sent_are_a_500(field: tuple[bytes, bytes]) -> None:
    (output,) = run(exchange(), start(field), body())
    assert output.data[0].fields[0] == (b":status", b"500")
    assert output.problem is not None


def test_too_little_is_cut() -> None:
    (output,) = run(exchange(), start((b"content-length", b"5")), body(b"abc"))
    assert output.end is End.CUT


def test_an_empty_body_of_which_more_follows_writes_the_head() -> None:
    for method in ("GET", "HEAD"):
        outputs = run(exchange(method), start(), body(b"", True), body())
        assert [list(output.data) for output in outputs[-2:]] == [[head()], [Data(b"", True)]]


def test_interim_responses_and_trailers() -> None:
    subject = exchange("POST", expects_continue=True, complete=False)
    assert list(subject.apply_receiving().data) == [Fields([(b":status", b"100")], False)]
    hint = {"type": "http.response.early_hint", "links": [b"</a>"]}
    outputs = run(
        subject,
        hint,
        start(trailers=True),
        body(b"x"),
        {"type": "http.response.trailers", "headers": [(b"a", b"1")], "more_trailers": True},
        {"type": "http.response.trailers", "headers": [(b"b", b"2")], "more_trailers": False},
    )
    assert [list(output.data) for output in outputs] == [
        [Fields([(b":status", b"103"), (b"link", b"</a>")], False)],
        [head(), Data(b"x", False)],
        [Fields([(b"a", b"1"), (b"b", b"2")], True)],
    ]
    assert outputs[-1].end is End.KEEP


def test_trailers_behind_a_body_with_a_length() -> None:
    trailers = {"type": "http.response.trailers", "headers": [(b"a", b"1")], "more_trailers": False}
    for data in (b"x", b""):
        length = (b"content-length", b"%d" % len(data))
        outputs = run(exchange(), start(length, trailers=True), body(data), trailers)
        assert not any(part.ends for part in outputs[0].data)
        assert outputs[-1] == Output((Fields([(b"a", b"1")], True),), End.KEEP)
    # Without all of its body the response is broken, whatever follows.
    assert run(exchange(), start((b"content-length", b"2"), trailers=True), body(b"x"))[-1].end is End.CUT
    # Without a body there is nothing for them to follow.
    assert run(exchange("HEAD"), start(trailers=True), body(b"x"))[-1].end is End.KEEP


def test_promised_trailers_that_do_not_come() -> None:
    subject = exchange()
    run(subject, start(trailers=True), body(b"x"))
    assert subject.apply_ended(Outcome.RETURNED) == Output((Data(b"", True),), End.KEEP)


def test_the_end_of_the_application() -> None:
    output = exchange().apply_ended(Outcome.RAISED)
    assert output.data[0].fields[0] == (b":status", b"500")
    assert output.data[1] == Data(b"Internal Server Error\n", True)
    subject = exchange()
    run(subject, start(), body(b"x", True))
    assert subject.apply_refused(Refusal.WORKER_LOST) == Output((), End.CUT)
    (only,) = exchange("HEAD").apply_refused(Refusal.QUEUE_FULL).data
    assert only.ends


# WebSockets


def websocket_head(*headers: tuple[bytes, bytes]) -> RequestHead:
    return read((b"sec-websocket-version", b"13"), *headers, method=b"CONNECT", protocol=b"websocket").head


def test_the_handshake_needs_no_key() -> None:
    handshake = read_extended_connect(websocket_head((b"sec-websocket-protocol", b"a, b")))
    assert handshake.subprotocols == ["a", "b"]
    assert handshake.deflate is None
    (accept,) = Http2Answers(HEADERS).accept(handshake, subprotocol="b", headers=[(b"X", b"1")])
    assert accept == Fields([(b":status", b"200"), (b"sec-websocket-protocol", b"b"), (b"x", b"1"), SERVER], False)
    with pytest.raises(InvalidAccept):
        Http2Answers(HEADERS).accept(handshake, subprotocol="c", headers=())


def test_compression_is_agreed_on_as_in_http1() -> None:
    head = websocket_head((b"sec-websocket-extensions", b"permessage-deflate; server_max_window_bits=10"))
    assert read_extended_connect(head).deflate is None
    handshake = read_extended_connect(head, may_deflate=True)
    assert handshake.deflate is not None
    (accept,) = Http2Answers(HEADERS).accept(handshake, subprotocol=None, headers=())
    extension = (b"sec-websocket-extensions", handshake.deflate.answer)
    assert accept == Fields([(b":status", b"200"), extension, SERVER], False)


@pytest.mark.parametrize("versions", [[], [b"8"], [b"13", b"13"]])
def test_another_version_is_refused(versions: list[bytes]) -> None:
    fields = [(b"sec-websocket-version", version) for version in versions]
    with pytest.raises(HandshakeFault) as fault:
        read_extended_connect(read(*fields, method=b"CONNECT", protocol=b"websocket").head)
    fields_of_answer, _ = Http2Answers(HEADERS).refuse(fault.value.status, str(fault.value), fault.value.headers)
    assert (b"sec-websocket-version", b"13") in fields_of_answer.fields


# The budget


def test_the_budget_refills_with_time_and_not_beyond_what_it_was() -> None:
    budget = Budget(0.0)
    assert all(budget.spend(Cost.RESET, 0.0) for _ in range(200))
    assert not budget.spend(Cost.CONTROL, 0.0)
    assert budget.spend(Cost.CONTROL, 1.0)
    assert all(budget.spend(Cost.RESET, 1000.0) for _ in range(200))
    assert not budget.spend(Cost.RESET, 1000.0)


# The lengths of frames

SETTINGS = b"\x00\x00\x06\x04\x00\x00\x00\x00\x00" + bytes(6)
LONGEST = b"\x00\x40\x00\x00\x00\x00\x00\x00\x01" + bytes(16384)
TOO_LONG = b"\x00\x40\x01\x00\x00\x00\x00\x00\x01"


@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_frames_are_told_apart_however_they_are_split(step: int) -> None:
    gate = FrameGate()
    good = bytes(24) + SETTINGS + LONGEST + SETTINGS
    assert all(gate.passes(good[at : at + step]) for at in range(0, len(good), step))
    assert [gate.passes(TOO_LONG[at : at + step]) for at in range(0, len(TOO_LONG), step)][-1] is False


def test_an_acknowledgement_of_settings_that_holds_something_is_too_long() -> None:
    gate = FrameGate()
    assert gate.passes(bytes(24) + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\0\4\1\0\0\0\0")
    assert not gate.passes(b"\0\0\6\4\1\0\0\0\0" + bytes(6))


def test_the_first_frame_is_settings() -> None:
    assert not FrameGate().passes(bytes(24) + LONGEST)
