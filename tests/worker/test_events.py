"""Every message an application may send, in every state."""

from __future__ import annotations

import http
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest

from channel_layer.codec import decode_event, encode_event
from worker.events import (
    BODY_EVENT_BYTES_MAX,
    EXTENSION_TRANSITIONS,
    TRANSITIONS,
    ClientDisconnected,
    HttpEvents,
    InvalidEvent,
    SentEvents,
    State,
    WebSocketEvents,
)

START = {"type": "http.response.start", "status": 200}
BODY = {"type": "http.response.body", "body": b"x"}
MORE = BODY | {"more_body": True}
ACCEPT = {"type": "websocket.accept"}
SEND = {"type": "websocket.send", "text": "x"}
CLOSE = {"type": "websocket.close"}
EXTENSIONS = [
    "http.response.push",
    "http.response.zerocopysend",
    "http.response.pathsend",
    "http.response.early_hint",
    "http.response.trailers",
    "http.response.debug",
    "websocket.http.response.start",
    "websocket.http.response.body",
]


def http_at(state: State) -> HttpEvents:
    events = HttpEvents()
    for message in {State.WAITING: [], State.STARTED: [START], State.COMPLETE: [START, BODY]}[state]:
        list(events.apply(message))
    assert events.state is state
    return events


def websocket_at(state: State) -> WebSocketEvents:
    events = WebSocketEvents()
    for message in {State.CONNECTING: [], State.OPEN: [ACCEPT], State.CLOSED: [ACCEPT, CLOSE]}[state]:
        list(events.apply(message))
    assert events.state is state
    return events


HTTP_STATES = (State.WAITING, State.STARTED, State.COMPLETE)
WEBSOCKET_STATES = (State.CONNECTING, State.OPEN, State.CLOSED)
MAKERS: Mapping[State, Callable[[State], SentEvents]] = {
    **dict.fromkeys(HTTP_STATES, http_at),
    **dict.fromkeys(WEBSOCKET_STATES, websocket_at),
}
MESSAGES = [START, BODY, MORE, ACCEPT, SEND, CLOSE, {"type": "http.bogus"}, *({"type": name} for name in EXTENSIONS)]

# (state, message) -> state behind it, and the types that leave.
ALLOWED: dict[tuple[State, str, bool], tuple[State, list[str]]] = {
    (State.WAITING, "http.response.start", False): (State.STARTED, []),
    (State.STARTED, "http.response.body", True): (State.STARTED, ["http.response.start", "http.response.body"]),
    (State.STARTED, "http.response.body", False): (State.COMPLETE, ["http.response.start", "http.response.body"]),
    (State.CONNECTING, "websocket.accept", False): (State.OPEN, ["websocket.accept"]),
    (State.CONNECTING, "websocket.close", False): (State.CLOSED, ["websocket.close"]),
    (State.OPEN, "websocket.send", False): (State.OPEN, ["websocket.send"]),
    (State.OPEN, "websocket.close", False): (State.CLOSED, ["websocket.close"]),
}


@pytest.mark.parametrize("state", MAKERS)
@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m["type"] + ("+" if m.get("more_body") else ""))
def test_every_message_in_every_state(state: State, message: dict[str, Any]) -> None:
    events = MAKERS[state](state)
    kind = message["type"]
    allowed = ALLOWED.get((state, kind, message.get("more_body", False)))
    if allowed is not None:
        leaving = list(events.apply(message))
        assert (events.state, [event["type"] for event in leaving]) == allowed
        assert events.is_complete is (allowed[0] in (State.COMPLETE, State.CLOSED))
    elif state is State.COMPLETE and kind.startswith("http.response."):
        assert list(events.apply(message)) == []  # ASGI: ignored
        assert events.state is state
    elif state is State.CLOSED:
        with pytest.raises(ClientDisconnected) as closed:
            events.apply(message)
        assert isinstance(closed.value, OSError)
    else:
        with pytest.raises(InvalidEvent) as refused:
            events.apply(message)
        assert kind in str(refused.value)
        assert events.state is state
        if kind in EXTENSIONS and kind.startswith(events.protocol + "."):
            assert "not offered" in str(refused.value)
        else:
            assert state.value in str(refused.value)


def test_the_table_and_this_test_agree() -> None:
    assert {(state, kind) for state, kind, _ in ALLOWED} == set(TRANSITIONS)


def test_the_error_of_a_wrong_order_names_event_state_and_what_is_expected() -> None:
    with pytest.raises(InvalidEvent) as error:
        http_at(State.WAITING).apply(BODY)
    assert str(error.value) == (
        "the application sent 'http.response.body' while no response has been started; expected 'http.response.start'"
    )


@pytest.mark.parametrize("state", HTTP_STATES + WEBSOCKET_STATES[:2])
@pytest.mark.parametrize(
    ("message", "text"),
    [
        (None, "NoneType"),
        ([], "a list"),
        ("http.response.start", "a str"),
        ({}, 'no "type"'),
        ({"type": None}, "expected str"),
        ({"type": 1}, "expected str"),
        ({"type": ["http.response.start"]}, "expected str"),
        ({"type": b"http.response.start"}, "expected str"),
        ({"type": ""}, "only these are known"),
    ],
)
def test_not_a_message(state: State, message: Any, text: str) -> None:
    events = MAKERS[state](state)
    with pytest.raises(InvalidEvent, match=text):
        events.apply(message)
    assert events.state is state


class Unprintable:
    def __repr__(self) -> str:
        return "z" * 10_000


WRONG_STARTS = [
    ({}, '"status" is missing'),
    ({"status": None}, '"status" is None'),
    ({"status": "200"}, "'200' \\(str\\), expected an int"),
    ({"status": True}, "True"),
    ({"status": 200.0}, "200.0"),
    ({"status": 99}, "200 to 999"),
    ({"status": 103}, "200 to 999"),
    ({"status": 1000}, "200 to 999"),
    ({"status": -200}, "200 to 999"),
    ({"status": Unprintable()}, "z{79} \\(Unprintable\\)|z{80} \\(Unprintable\\)"),
]
WRONG_HEADERS = [
    (None, "headers"),
    (1, "headers"),
    ("x", "headers"),
    (b"xy", "headers"),
    ({b"x": b"y"}, "headers"),
    ([b"xy"], r"headers\[0\]"),
    (["xy"], r"headers\[0\]"),
    ([(b"x",)], r"headers\[0\]"),
    ([(b"x", b"y", b"z")], r"headers\[0\]"),
    ([(b"ok", b"ok"), 5], r"headers\[1\]"),
    ([("x", b"y")], r"headers\[0\] name.*encode it"),
    ([(b"x", "y")], r"headers\[0\] value.*encode it"),
    ([(b"x", 1)], r"headers\[0\] value.*int"),
    ([(b"x", None)], r"headers\[0\] value.*None"),
    ([(b"", b"y")], "token"),
    ([(b":status", b"200")], "token"),
    ([(b"x y", b"z")], "token"),
    ([(b"x:", b"z")], "token"),
    ([(b"x\r\n", b"z")], "token"),
    ([(b"x\n", b"z")], "token"),
    ([("x-\xe4".encode("latin-1"), b"z")], "token"),
    ([(b"x", b"a\r\nset-cookie: a")], "CR, LF or NUL"),
    ([(b"x", b"a\n")], "CR, LF or NUL"),
    ([(b"x", b"\ra")], "CR, LF or NUL"),
    ([(b"x", b"a\0")], "CR, LF or NUL"),
]


@pytest.mark.parametrize(("keys", "text"), WRONG_STARTS)
def test_wrong_response_starts(keys: dict[str, Any], text: str) -> None:
    events = HttpEvents()
    with pytest.raises(InvalidEvent, match=text):
        events.apply({"type": "http.response.start"} | keys)
    assert events.state is State.WAITING
    assert list(events.apply(START)) == []  # nothing is broken by the attempt


@pytest.mark.parametrize(("headers", "text"), WRONG_HEADERS)
def test_wrong_headers(headers: Any, text: str) -> None:
    events = HttpEvents()
    with pytest.raises(InvalidEvent, match=text):
        events.apply(START | {"headers": headers})
    assert events.state is State.WAITING
    handshake = WebSocketEvents()
    with pytest.raises(InvalidEvent, match=text):
        handshake.apply(ACCEPT | {"headers": headers})
    assert handshake.state is State.CONNECTING


def test_the_start_is_held_until_the_body_and_holds_only_known_keys() -> None:
    events = HttpEvents()
    start = {
        "type": "http.response.start",
        "status": http.HTTPStatus.NOT_FOUND,
        "headers": iter([[bytearray(b"X-A"), memoryview(b"1")], (b"x-a", b"2"), (b"Set-Cookie", b"\xff\t")]),
        "trailers": True,
        "unknown": object(),
    }
    assert list(events.apply(start)) == []
    first, body = events.apply({"type": "http.response.body", "other": object()})
    assert first == {
        "type": "http.response.start",
        "status": 404,
        "headers": [(b"x-a", b"1"), (b"x-a", b"2"), (b"set-cookie", b"\xff\t")],
    }
    assert type(first["status"]) is int
    assert body == {"type": "http.response.body", "body": b"", "more_body": False}
    assert decode_event(encode_event(first))["headers"][0] == [b"x-a", b"1"]


def test_a_held_start_can_be_released_once() -> None:
    events = http_at(State.STARTED)
    released = events.release_start()
    assert released is not None
    assert released["status"] == 200
    assert events.release_start() is None
    assert [event["type"] for event in events.apply(BODY)] == ["http.response.body"]


def test_a_websocket_holds_nothing() -> None:
    assert websocket_at(State.OPEN).release_start() is None


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"body": "x"}, "\"body\" is 'x' \\(str\\), expected bytes, encode it"),
        ({"body": None}, '"body" is None'),
        ({"body": [1]}, "list"),
        ({"more_body": None}, '"more_body" is None'),
        ({"more_body": 1}, '"more_body" is 1'),
        ({"more_body": "yes"}, "yes"),
    ],
)
def test_wrong_bodies(keys: dict[str, Any], text: str) -> None:
    events = http_at(State.STARTED)
    with pytest.raises(InvalidEvent, match=text):
        events.apply({"type": "http.response.body"} | keys)
    assert events.state is State.STARTED
    assert events.release_start() is not None


@pytest.mark.parametrize(
    "body", [b"abc", bytearray(b"abc"), memoryview(b"xabcx")[1:4], type("B", (bytes,), {})(b"abc")]
)
def test_bodies_become_bytes(body: Any) -> None:
    _, event = http_at(State.STARTED).apply({"type": "http.response.body", "body": body})
    assert event["body"] == b"abc"
    assert type(event["body"]) is bytes


@pytest.mark.parametrize("more_body", [True, False])
@pytest.mark.parametrize("excess", [-1, 0, 1, BODY_EVENT_BYTES_MAX, BODY_EVENT_BYTES_MAX + 1])
def test_a_large_body_leaves_in_several_events(more_body: bool, excess: int) -> None:
    body = bytes(range(256)) * (BODY_EVENT_BYTES_MAX // 256 * 3)
    body = body[: BODY_EVENT_BYTES_MAX + excess]
    events = http_at(State.STARTED)
    start, *parts = events.apply({"type": "http.response.body", "body": body, "more_body": more_body})
    assert start["type"] == "http.response.start"
    assert b"".join(part["body"] for part in parts) == body
    assert all(0 < len(part["body"]) <= BODY_EVENT_BYTES_MAX for part in parts)
    assert [part["more_body"] for part in parts] == [True] * (len(parts) - 1) + [more_body]
    assert len(parts) == -(-len(body) // BODY_EVENT_BYTES_MAX)
    assert events.is_complete is not more_body


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({}, "neither is"),
        ({"text": None, "bytes": None}, "neither is"),
        ({"text": "a", "bytes": b"a"}, "both are"),
        ({"text": "", "bytes": b""}, "both are"),
        ({"text": b"a"}, "\"text\" is b'a'"),
        ({"text": 1}, "int"),
        ({"bytes": "a"}, "encode it"),
        ({"bytes": 1}, "int"),
        ({"text": "a\ud800"}, "lone surrogate at 1"),
    ],
)
def test_wrong_websocket_messages(keys: dict[str, Any], text: str) -> None:
    events = websocket_at(State.OPEN)
    with pytest.raises(InvalidEvent, match=text):
        events.apply({"type": "websocket.send"} | keys)
    assert events.state is State.OPEN


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"text": ""}, {"text": ""}),
        ({"bytes": b""}, {"bytes": b""}),
        ({"text": "ä", "bytes": None, "more": 1}, {"text": "ä"}),
        ({"text": None, "bytes": bytearray(b"a")}, {"bytes": b"a"}),
        ({"bytes": memoryview(b"a")}, {"bytes": b"a"}),
    ],
)
def test_websocket_messages(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    (event,) = websocket_at(State.OPEN).apply({"type": "websocket.send"} | keys)
    assert event == {"type": "websocket.send"} | expected


def test_accept() -> None:
    message = {"type": "websocket.accept", "subprotocol": "chat.v2", "headers": [(b"X-A", b"1")], "x": object()}
    (event,) = WebSocketEvents().apply(message)
    assert event == {"type": "websocket.accept", "subprotocol": "chat.v2", "headers": [(b"x-a", b"1")]}
    (event,) = WebSocketEvents().apply({"type": "websocket.accept"})
    assert event == {"type": "websocket.accept", "subprotocol": None, "headers": []}


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"subprotocol": b"chat"}, "expected a str"),
        ({"subprotocol": 1}, "expected a str"),
        ({"subprotocol": ["chat"]}, "expected a str"),
        ({"subprotocol": ""}, "token"),
        ({"subprotocol": "a, b"}, "token"),
        ({"subprotocol": "a\r\nx: y"}, "token"),
        ({"subprotocol": "\ud800"}, "token"),
        ({"headers": [(b"Sec-WebSocket-Protocol", b"chat")]}, "sec-websocket-protocol"),
    ],
)
def test_wrong_accepts(keys: dict[str, Any], text: str) -> None:
    events = WebSocketEvents()
    with pytest.raises(InvalidEvent, match=text):
        events.apply(ACCEPT | keys)
    assert events.state is State.CONNECTING


@pytest.mark.parametrize("state", [State.CONNECTING, State.OPEN])
@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"code": None}, "None"),
        ({"code": "1000"}, "expected an int"),
        ({"code": True}, "True"),
        ({"code": 1000.0}, "expected an int"),
        *(({"code": code}, "RFC 6455") for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, -1)),
        ({"reason": b"bye"}, "expected a str"),
        ({"reason": 1}, "expected a str"),
        ({"reason": "a" * 124}, "124 bytes"),
        ({"reason": "ä" * 62}, "124 bytes"),
        ({"reason": "\udcff"}, "lone surrogate"),
    ],
)
def test_wrong_closes(state: State, keys: dict[str, Any], text: str) -> None:
    events = websocket_at(state)
    with pytest.raises(InvalidEvent, match=text):
        events.apply(CLOSE | keys)
    assert events.state is state


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1008, 1011, 1012, 1013, 1014, 3000, 4001, 4999])
def test_closes(code: int) -> None:
    (event,) = websocket_at(State.OPEN).apply(CLOSE | {"code": code, "reason": "ä" * 61, "extra": 1})
    assert event == {"type": "websocket.close", "code": code, "reason": "ä" * 61}


def test_a_close_has_defaults_and_a_reason_of_none_is_empty() -> None:
    (event,) = websocket_at(State.OPEN).apply(MappingProxyType(CLOSE | {"reason": None}))
    assert event == {"type": "websocket.close", "code": 1000, "reason": ""}


def test_repr_shows_the_state() -> None:
    assert repr(http_at(State.STARTED)) == "<HttpEvents STARTED>"


# Extensions, where the scope offers them

HINT = {"type": "http.response.early_hint", "links": [b"</a>; rel=preload"]}
TRAILERS = {"type": "http.response.trailers", "headers": [(b"X-Sum", b"1")]}
FILE = {"type": "http.response.pathsend", "path": "/file"}
OFFERED = {"http.response.early_hint": {}, "http.response.trailers": {}, "http.response.pathsend": {}}


def sent(events: SentEvents, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for message in messages for event in events.apply(message)]


def test_early_hints_leave_before_the_held_start_and_mean_nothing_behind_it() -> None:
    events = HttpEvents(OFFERED)
    leaving = sent(events, HINT, START, HINT, {**BODY, "more_body": True}, HINT, BODY)
    assert [event["type"].rpartition(".")[2] for event in leaving] == [
        *("early_hint", "early_hint", "start", "body", "body"),
    ]
    assert leaving[0] == HINT
    assert events.state is State.COMPLETE


def test_promised_trailers_are_awaited_behind_the_last_body() -> None:
    events = HttpEvents(OFFERED)
    leaving = sent(events, {**START, "trailers": True}, BODY)
    assert events.state is State.TRAILERS
    assert leaving[0]["trailers"] is True
    assert leaving[1]["trailers"] is True  # so nobody takes it for the end
    with pytest.raises(InvalidEvent, match=r"expected 'http\.response\.trailers'"):
        events.apply(BODY)
    (first,) = events.apply({**TRAILERS, "more_trailers": True})
    assert first == {
        "type": "http.response.trailers",
        "headers": [(b"x-sum", b"1")],
        "more_trailers": True,
    }
    assert events.state is State.TRAILERS
    (last,) = events.apply(TRAILERS)
    assert last["more_trailers"] is False
    assert events.is_complete


def test_of_a_large_last_body_the_last_piece_tells_of_trailers() -> None:
    events = HttpEvents(OFFERED)
    large = {"type": "http.response.body", "body": bytes(200_000)}
    _, *pieces = sent(events, {**START, "trailers": True}, large)
    assert [("trailers" in piece, piece["more_body"]) for piece in pieces] == [(False, True)] * 3 + [(True, False)]


def test_a_promise_of_trailers_that_are_not_offered_is_dropped() -> None:
    events = HttpEvents()
    assert "trailers" not in sent(events, {**START, "trailers": True}, BODY)[0]
    assert events.is_complete


def test_a_file_is_the_whole_body() -> None:
    events = HttpEvents(OFFERED)
    assert [event["type"] for event in sent(events, START, FILE)] == ["http.response.start", FILE["type"]]
    assert events.is_complete
    begun = HttpEvents(OFFERED)
    sent(begun, START, {**BODY, "more_body": True})
    with pytest.raises(InvalidEvent, match="the body has begun"):
        begun.apply(FILE)


@pytest.mark.parametrize(
    ("before", "message", "text"),
    [
        ([], {**HINT, "links": b"</a>"}, "an iterable of bytes"),
        ([], {**HINT, "links": ["</a>"]}, "encode it"),
        ([], {**HINT, "links": [b"a\r\nb: c"]}, "has a CR, LF or NUL"),
        ([], {"type": "http.response.early_hint"}, 'the key "links" is missing'),
        ([], FILE, "no response has been started"),
        ([START], {**FILE, "path": "file"}, "expected an absolute path"),
        ([START], {**FILE, "path": b"/file"}, "expected a str"),
        ([START], TRAILERS, "the response is being sent"),
        ([], {**START, "trailers": 1}, "expected a bool"),
        ([{**START, "trailers": True}, BODY], {**TRAILERS, "headers": [(b"Content-Length", b"1")]}, "a trailer"),
    ],
)
def test_what_extensions_do_not_allow(before: list[dict[str, Any]], message: dict[str, Any], text: str) -> None:
    events = HttpEvents(OFFERED)
    sent(events, *before)
    state = events.state
    with pytest.raises(InvalidEvent, match=text):
        events.apply(message)
    assert events.state is state


def test_a_websocket_is_refused_with_a_response() -> None:
    events = WebSocketEvents({"websocket.http.response": {}})
    start = {"type": "websocket.http.response.start", "status": 401, "headers": [(b"A", b"b")]}
    body = {"type": "websocket.http.response.body", "body": b"no", "more_body": True}
    assert sent(events, start) == []  # held, as that of an HTTP response
    assert events.state is State.REFUSING
    with pytest.raises(InvalidEvent, match=r"expected 'websocket\.http\.response\.body'"):
        events.apply({"type": "websocket.accept"})
    with pytest.raises(InvalidEvent, match=r'^websocket\.http\.response\.body: "body" is'):
        list(events.apply({**body, "body": "text"}))
    first, second = events.apply(body)
    assert first == {**start, "headers": [(b"a", b"b")]}
    assert second == body
    assert [event["more_body"] for event in sent(events, {**body, "more_body": False})] == [False]
    assert events.is_complete
    with pytest.raises(ClientDisconnected):
        events.apply(body)


def test_the_table_of_extensions_has_no_state_that_this_test_forgot() -> None:
    assert {kind for _, kind in EXTENSION_TRANSITIONS} == {
        *(HINT["type"], TRAILERS["type"], FILE["type"]),
        *("websocket.http.response.start", "websocket.http.response.body"),
        "websocket.handover.state",
    }
    assert set(EXTENSION_TRANSITIONS.values()) <= set(State)
