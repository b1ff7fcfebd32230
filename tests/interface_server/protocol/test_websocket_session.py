"""Every input in every state of a WebSocket, and what the application and the client see of the ends."""

import pytest

from channel_layer.frames import Outcome
from interface_server.client import Refusal
from interface_server.protocol.deflate import negotiate
from interface_server.protocol.server_headers import ServerHeaders
from interface_server.protocol.websocket_answers import Http1Answers
from interface_server.protocol.websocket_frames import PONG, TEXT, build_close, build_frame
from interface_server.protocol.websocket_handshake import Handshake, read_handshake
from interface_server.protocol.websocket_session import (
    TRANSITIONS,
    Abort,
    Closed,
    Finish,
    Input,
    Opened,
    Refused,
    Report,
    State,
    WebSocketSession,
    Write,
)
from tests.interface_server.websocket_helpers import ACCEPT, build_head


def disconnect(code, reason=""):
    return Closed({"type": "websocket.disconnect", "code": code, "reason": reason})


def build_session(state=State.CONNECTING, *, extra=()):
    server_headers = ServerHeaders(date=False, server=True, clock=lambda: 0.0)
    session = WebSocketSession(read_handshake(build_head(extra=extra)), answers=Http1Answers(server_headers))
    if state is State.REFUSING:
        session.application_event({"type": "websocket.http.response.start", "status": 401, "headers": []})
    elif state is not State.CONNECTING:
        session.application_event({"type": "websocket.accept"})
    if state is State.CLOSING:
        session.application_event({"type": "websocket.close"})
    elif state is State.CLOSED:
        session.lost()
    assert session.state is state
    return session


# How each input is told to a session.
INPUTS = {
    Input.ACCEPT: lambda session: session.application_event({"type": "websocket.accept"}),
    Input.SEND: lambda session: session.application_event({"type": "websocket.send", "text": "x"}),
    Input.CLOSE: lambda session: session.application_event({"type": "websocket.close", "code": 4001, "reason": "r"}),
    Input.RESPONSE_START: lambda session: session.application_event(
        {"type": "websocket.http.response.start", "status": 403, "headers": []}
    ),
    Input.RESPONSE_BODY: lambda session: session.application_event(
        {"type": "websocket.http.response.body", "body": b"no", "more_body": False}
    ),
    Input.INVALID: lambda session: session.application_event({"type": "websocket.bogus"}),
    Input.RETURNED: lambda session: session.application_ended(Outcome.RETURNED),
    Input.RAISED: lambda session: session.application_ended(Outcome.RAISED),
    Input.CANCELLED: lambda session: session.application_ended(Outcome.CANCELLED),
    Input.REFUSED: lambda session: session.refused(Refusal.WORKER_LOST),
    Input.MESSAGE: lambda session: [event for event in [session.message("x")] if event is not None],
    Input.PING: lambda session: session.ping(b"p"),
    Input.PEER_CLOSE: lambda session: session.close_frame(b"\x0f\xa1r"),
    Input.FAULT: lambda session: session.fault(1002, "f"),
    Input.LOST: lambda session: session.lost(),
    Input.TIMED_OUT: lambda session: session.timed_out(),
}
LINGER, CLOSE = Finish(linger=True), Finish(linger=False)
LOST_REASON = Refusal.WORKER_LOST.reason


def refusal(status):
    return ["HTTP", Refused(status), disconnect(1006), LINGER]


# What each input brings about in each state; "HTTP" stands for an answer that other tests read.
EXPECTED = {
    (State.CONNECTING, Input.ACCEPT): ["HTTP", Opened()],
    (State.CONNECTING, Input.SEND): [],
    (State.CONNECTING, Input.CLOSE): refusal(403),
    (State.CONNECTING, Input.RESPONSE_START): [],
    (State.CONNECTING, Input.RESPONSE_BODY): [],
    (State.CONNECTING, Input.INVALID): [],
    (State.CONNECTING, Input.RETURNED): refusal(500),
    (State.CONNECTING, Input.RAISED): refusal(500),
    (State.CONNECTING, Input.CANCELLED): refusal(503),
    (State.CONNECTING, Input.REFUSED): refusal(502),
    (State.CONNECTING, Input.LOST): [disconnect(1006)],
    (State.CONNECTING, Input.TIMED_OUT): refusal(504),
    (State.REFUSING, Input.ACCEPT): [],
    (State.REFUSING, Input.SEND): [],
    (State.REFUSING, Input.CLOSE): [],
    (State.REFUSING, Input.RESPONSE_START): [],
    (State.REFUSING, Input.RESPONSE_BODY): refusal(401),
    (State.REFUSING, Input.INVALID): [],
    (State.REFUSING, Input.RETURNED): refusal(500),
    (State.REFUSING, Input.RAISED): refusal(500),
    (State.REFUSING, Input.CANCELLED): refusal(500),
    (State.REFUSING, Input.REFUSED): refusal(502),
    (State.REFUSING, Input.LOST): [disconnect(1006)],
    (State.REFUSING, Input.TIMED_OUT): [disconnect(1006), Abort()],
    (State.OPEN, Input.ACCEPT): [],
    (State.OPEN, Input.RESPONSE_START): [],
    (State.OPEN, Input.RESPONSE_BODY): [],
    (State.OPEN, Input.SEND): [Write(build_frame(TEXT, b"x"))],
    (State.OPEN, Input.CLOSE): [Write(build_close(4001, "r")), disconnect(4001, "r")],
    (State.OPEN, Input.INVALID): [],
    (State.OPEN, Input.RETURNED): [Write(build_close(1000)), disconnect(1000)],
    (State.OPEN, Input.RAISED): [Write(build_close(1011)), disconnect(1011)],
    (State.OPEN, Input.CANCELLED): [Write(build_close(1012)), disconnect(1012)],
    (State.OPEN, Input.REFUSED): [Write(build_close(1012, LOST_REASON)), disconnect(1012, LOST_REASON)],
    (State.OPEN, Input.MESSAGE): [{"type": "websocket.receive", "text": "x"}],
    (State.OPEN, Input.PING): [Write(build_frame(PONG, b"p"))],
    (State.OPEN, Input.PEER_CLOSE): [Write(build_close(4001)), disconnect(4001, "r"), CLOSE],
    (State.OPEN, Input.FAULT): [Write(build_close(1002, "f")), disconnect(1002, "f"), LINGER],
    (State.OPEN, Input.LOST): [disconnect(1006)],
    (State.OPEN, Input.TIMED_OUT): [disconnect(1006, "ping timeout"), Abort()],
    (State.CLOSING, Input.ACCEPT): [],
    (State.CLOSING, Input.SEND): [],
    (State.CLOSING, Input.CLOSE): [],
    (State.CLOSING, Input.RESPONSE_START): [],
    (State.CLOSING, Input.RESPONSE_BODY): [],
    (State.CLOSING, Input.INVALID): [],
    (State.CLOSING, Input.RETURNED): [],
    (State.CLOSING, Input.RAISED): [],
    (State.CLOSING, Input.CANCELLED): [],
    (State.CLOSING, Input.REFUSED): [],
    (State.CLOSING, Input.MESSAGE): [],
    (State.CLOSING, Input.PING): [Write(build_frame(PONG, b"p"))],
    (State.CLOSING, Input.PEER_CLOSE): [CLOSE],
    (State.CLOSING, Input.FAULT): [LINGER],
    (State.CLOSING, Input.LOST): [],
    (State.CLOSING, Input.TIMED_OUT): [Abort()],
    **{(State.CLOSED, input_): [] for input_ in Input},
    (State.CLOSED, Input.TIMED_OUT): [Abort()],
}
PAIRS = [(state, input_) for state in State for input_ in Input]


def test_the_tables_are_complete():
    assert set(INPUTS) == set(Input)
    assert set(TRANSITIONS) == set(EXPECTED)
    # Nothing but these is left out: before the accept nobody reads what a client sends.
    assert set(PAIRS) - set(TRANSITIONS) == {
        (state, input_)
        for state in (State.CONNECTING, State.REFUSING)
        for input_ in (Input.MESSAGE, Input.PING, Input.PEER_CLOSE, Input.FAULT)
    }


@pytest.mark.parametrize(("state", "input_"), PAIRS, ids=lambda value: value.name)
def test_every_input_in_every_state(state, input_):
    session = build_session(state)
    if (state, input_) not in TRANSITIONS:
        with pytest.raises(KeyError):
            INPUTS[input_](session)
        return
    actions = list(INPUTS[input_](session))
    ends = (state, input_) == (State.REFUSING, Input.RESPONSE_BODY)  # it is the last one here
    assert session.state is (State.CLOSED if ends else TRANSITIONS[state, input_])
    expected = EXPECTED[state, input_]
    if expected and expected[0] == "HTTP":
        assert actions.pop(0).data.startswith(b"HTTP/1.1 ")
        expected = expected[1:]
    assert actions == expected


@pytest.mark.parametrize(("state", "input_"), list(EXPECTED), ids=lambda value: value.name)
def test_the_application_is_told_of_the_end_exactly_once(state, input_):
    session = build_session(state)
    told = [action for action in INPUTS[input_](session) if isinstance(action, Closed)]
    was_told = state in (State.CLOSING, State.CLOSED)
    is_over = session.state in (State.CLOSING, State.CLOSED)
    assert len(told) == (1 if is_over and not was_told else 0)


@pytest.mark.parametrize(("state", "input_"), list(EXPECTED), ids=lambda value: value.name)
def test_nothing_is_written_behind_the_end(state, input_):
    session = build_session(state)
    actions = list(INPUTS[input_](session))
    for position, action in enumerate(actions):
        if isinstance(action, Finish | Abort):
            assert actions[position + 1 :] == []


# Refused with a response of the application


def test_a_response_of_the_application_is_streamed():
    session = build_session(State.REFUSING)
    (write,) = session.application_event(
        {"type": "websocket.http.response.body", "body": b"first", "more_body": True}
    )
    assert write.data.startswith(b"HTTP/1.1 401 Unauthorized\r\nconnection: close\r\n")
    assert write.data.endswith(b"\r\n\r\n5\r\nfirst\r\n")
    # The head is written: what is missing can only be cut.
    assert list(session.application_ended(Outcome.RAISED)) == [Refused(401), disconnect(1006), Abort()]


# Accept


def test_accept_answers_with_everything_the_application_said():
    session = build_session(extra=[(b"sec-websocket-protocol", b"a, b")])
    write, opened = session.application_event(
        {"type": "websocket.accept", "subprotocol": "b", "headers": [[b"x-a", b"1"]], "further": 1}
    )
    assert opened == Opened()
    assert b"sec-websocket-accept: " + ACCEPT + b"\r\n" in write.data
    assert b"sec-websocket-protocol: b\r\n" in write.data
    assert b"x-a: 1\r\n" in write.data
    assert b"server: trunkline\r\n" in write.data


@pytest.mark.parametrize(
    "fields",
    [
        {"subprotocol": "other"},
        {"headers": [[b"sec-websocket-protocol", b"a"]]},
        {"headers": [[b"x", b"a\r\nb: c"]]},
        {"headers": "text"},
        {"headers": {b"x": b"a"}},
        {"headers": [1]},
    ],
)
def test_an_accept_that_cannot_be_sent_is_a_500_and_an_error_in_the_log(fields):
    session = build_session()
    report, write, *rest = session.application_event({"type": "websocket.accept", **fields})
    assert isinstance(report, Report)
    assert "websocket.accept" in report.text
    assert write.data.startswith(b"HTTP/1.1 500 ")
    assert rest == [Refused(500), disconnect(1006), LINGER]
    assert session.state is State.CLOSED


def test_an_empty_list_of_headers_and_none_are_the_same():
    for headers in ([], None, ()):
        assert Opened() in build_session().application_event({"type": "websocket.accept", "headers": headers})


# Refused before the accept


@pytest.mark.parametrize("refused", list(Refusal))
def test_a_refusal_is_answered_with_its_status_or_its_close_code(refused):
    write, *rest = build_session().refused(refused)
    assert write.data.startswith(b"HTTP/1.1 %d " % refused.status)
    assert (b"retry-after: " in write.data) == (refused.status == 503)
    assert rest == [Refused(refused.status), disconnect(1006), LINGER]
    write, told = build_session(State.OPEN).refused(refused)
    assert write.data == build_close(refused.close_code, refused.reason)
    assert told == disconnect(refused.close_code, refused.reason)


# Send


@pytest.mark.parametrize(
    ("fields", "frame"),
    [
        ({"text": "ä"}, b"\x81\x02\xc3\xa4"),
        ({"text": ""}, b"\x81\x00"),
        ({"bytes": b""}, b"\x82\x00"),
        ({"bytes": b"\0\1", "text": None}, b"\x82\x02\0\1"),
    ],
)
def test_sends_become_frames(fields, frame):
    assert list(build_session(State.OPEN).application_event({"type": "websocket.send", **fields})) == [Write(frame)]


@pytest.mark.parametrize(
    "fields", [{}, {"text": "a", "bytes": b"a"}, {"text": None}, {"text": 1}, {"text": "\ud800"}]
)
def test_what_a_group_sends_may_be_malformed(fields):
    session = build_session(State.OPEN)
    assert list(session.application_event({"type": "websocket.send", **fields})) == []
    assert session.state is State.OPEN
    assert session.dropped_count == 1


@pytest.mark.parametrize("event", [{}, {"type": "websocket.bogus"}, {"type": None}, {"type": 1}])
def test_unknown_events_are_dropped_and_counted(event):
    session = build_session(State.OPEN)
    assert list(session.application_event(event)) == []
    assert session.dropped_count == 1


@pytest.mark.parametrize("state", State)
def test_the_short_way_is_for_messages_to_open_connections(state):
    event = {"type": "websocket.send", "text": "x"}
    session = build_session(state)
    frame = session.build_message(event)
    assert frame == (build_frame(TEXT, b"x") if state is State.OPEN else None)
    for other in ({"type": "websocket.send"}, {"type": "websocket.close"}, {"text": "x"}):
        assert session.build_message(other) is None
    assert (session.state, session.dropped_count, session.late_count) == (state, 0, 0)


def test_sends_are_compressed_where_it_is_agreed():
    deflate = negotiate([b"permessage-deflate"])
    handshake = Handshake(accept=ACCEPT, subprotocols=[], deflate=deflate)
    session = WebSocketSession(handshake, answers=Http1Answers(ServerHeaders(date=False, server=True, clock=float)))
    assert session.deflate is None
    answer, _ = session.application_event({"type": "websocket.accept"})
    assert b"\r\nsec-websocket-extensions: " + deflate.answer + b"\r\n" in answer.data
    assert session.deflate is deflate
    (large,) = session.application_event({"type": "websocket.send", "text": "abc" * 1000})
    assert large == Write(deflate.build_message(TEXT, b"abc" * 1000))
    assert large.data[0] == 0xC1
    (small,) = session.application_event({"type": "websocket.send", "text": "abc"})
    assert small == Write(build_frame(TEXT, b"abc"))
    assert session.build_message({"type": "websocket.send", "text": "abc" * 1000}) == large.data


def test_broadcasts_are_let_through_only_while_open():
    for state in State:
        session = build_session(state)
        before = session.late_count
        is_open = state is State.OPEN
        assert session.frame_sent() is is_open
        assert session.late_count == before + (not is_open)


def test_events_that_crossed_the_end_are_counted_as_late_and_not_as_faults():
    session = build_session(State.CLOSING)
    for kind in ("websocket.send", "websocket.close", "websocket.accept", "websocket.bogus"):
        assert list(session.application_event({"type": kind, "text": "x"})) == []
    assert session.late_count == 4
    assert session.dropped_count == 0


# Receive


def test_a_message_is_exactly_one_of_text_and_bytes():
    session = build_session(State.OPEN)
    for payload, key in (("", "text"), ("ä", "text"), (b"", "bytes"), (b"a", "bytes")):
        assert session.message(payload) == {"type": "websocket.receive", key: payload}


# Close, by the application


@pytest.mark.parametrize(
    ("fields", "frame", "code", "reason"),
    [
        ({}, build_close(1000), 1000, ""),
        ({"code": None, "reason": None}, build_close(1000), 1000, ""),
        ({"code": 4001}, build_close(4001), 4001, ""),
        ({"code": 3000, "reason": "bä"}, build_close(3000, "bä"), 3000, "bä"),
        ({"reason": "x"}, build_close(1000, "x"), 1000, "x"),
        ({"code": 4000, "reason": "x" * 200}, build_close(4000, "x" * 123), 4000, "x" * 123),
        ({"code": 1005}, build_close(None), 1005, ""),  # the code of a disconnect, handed on
        ({"code": 1005, "reason": "x"}, build_close(None), 1005, ""),
        ({"code": 1006, "reason": "x"}, build_close(1011, "x"), 1011, "x"),
        ({"code": 0}, build_close(1011), 1011, ""),
        ({"code": 5000}, build_close(1011), 1011, ""),
        ({"code": "1000"}, build_close(1011), 1011, ""),
        ({"code": True}, build_close(1011), 1011, ""),
        ({"reason": 5}, build_close(1000), 1000, ""),
    ],
)
def test_close_is_sent_and_told_as_the_application_said(fields, frame, code, reason):
    session = build_session(State.OPEN)
    assert list(session.application_event({"type": "websocket.close", **fields})) == [
        Write(frame),
        disconnect(code, reason),
    ]
    assert session.close_code == code


# Close, by the client


@pytest.mark.parametrize(
    ("payload", "echo", "code", "reason"),
    [
        (b"", build_close(None), 1005, ""),
        (b"\x03\xe8", build_close(1000), 1000, ""),
        (b"\x03\xe9bye", build_close(1001), 1001, "bye"),
        (b"\x0f\xa0" + "ä".encode(), build_close(4000), 4000, "ä"),
        (b"\x03\xf6", build_close(1014), 1014, ""),
    ],
)
def test_the_clients_close_is_echoed_and_told(payload, echo, code, reason):
    session = build_session(State.OPEN)
    assert list(session.close_frame(payload)) == [Write(echo), disconnect(code, reason), CLOSE]
    assert session.close_code == code


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"\x03", 1002),
        *[(number.to_bytes(2, "big"), 1002) for number in (0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535)],
        (b"\x03\xe8\xff", 1007),
        (b"\x03\xe8\xc3", 1007),
        (b"\x03\xe8\xed\xa0\x80", 1007),  # a surrogate
    ],
)
def test_a_faulty_close_is_a_fault(payload, code):
    session = build_session(State.OPEN)
    write, told, end = session.close_frame(payload)
    assert write.data[2:4] == code.to_bytes(2, "big")
    assert told.event["code"] == session.close_code == code
    assert end == LINGER


def test_a_connection_that_was_never_open_has_no_close_code():
    session = build_session()
    list(session.lost())
    assert session.close_code is None


def test_repr_shows_the_state():
    assert "OPEN" in repr(build_session(State.OPEN))
