"""ASGI over WebSocket as specified, against the real command: what the probe application saw, and the client.

The numbers (W1, W12 …) are those of docs/conformance.md. What needs great amounts is in test_transfers.py, what
groups do in test_groups.py.
"""

import ast
import itertools
import re
import socket
import struct
import threading
import time

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as connect_to

from tests.system.processes import LATE_LEASE, Served

APP = "tests.system.conformance_app:application"
KEYS = (f"w{number}" for number in itertools.count())

REQUEST = (
    "GET {} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


@pytest.fixture(scope="module")
def served():
    with Served(APP, "--workers", "1", "--no-access-log", "--ws-handshake-timeout", "8") as running:
        yield running


@pytest.fixture
def connect(served):
    def connect_here(target, **options):
        return connect_to(served.ws_url + target, open_timeout=60, **options)

    return connect_here


@pytest.fixture
def key():
    return next(KEYS)


class RawClient:
    """A WebSocket client that sends the frames it is told to, and nothing by itself."""

    def __init__(self, port, target, *, early=b""):
        self.socket = socket.create_connection(("127.0.0.1", port), 15)
        self.data = b""
        self.socket.sendall(REQUEST.format(target).encode() + early)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def exactly(self, count):
        while len(self.data) < count:
            received = self.socket.recv(65536)
            assert received, f"the end, with {count - len(self.data)} bytes missing: {self.data!r:.300}"
            self.data += received
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def accepted(self):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.exactly(1)
        assert head.startswith(b"HTTP/1.1 101 "), head
        return self

    def send(self, opcode, payload=b"", *, fin=True):
        self.socket.sendall(frame(opcode, payload, fin=fin))

    def receive(self):
        """(opcode, payload) of the next frame"""
        opcode, length = self.exactly(2)
        if length == 126:
            (length,) = struct.unpack(">H", self.exactly(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self.exactly(8))
        return opcode & 15, self.exactly(length)

    def close_code(self):
        """The code of the Close frame that must be next, behind which the server ends."""
        opcode, payload = self.receive()
        assert opcode == CLOSE, (opcode, payload)
        return int.from_bytes(payload[:2], "big") if payload else None

    def rest(self):
        while received := self.socket.recv(65536):
            self.data += received
        return self.data

    def reset(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def frame(opcode, payload=b"", *, fin=True):
    length = len(payload)
    if length < 126:
        head = bytes((opcode | fin << 7, 128 | length))
    elif length < 65536:
        head = bytes((opcode | fin << 7, 128 | 126)) + struct.pack(">H", length)
    else:
        head = bytes((opcode | fin << 7, 128 | 127)) + struct.pack(">Q", length)
    return head + b"\0\0\0\0" + payload


def record(served, key):
    """What the application noted under ``key``, when it is over."""
    answer = httpx.get(f"{served.url}/record?key={key}", timeout=60)
    assert answer.status_code == 200, answer.text
    return ast.literal_eval(answer.text)


def opened(served, key):
    """Wait until an instance with this key runs."""
    deadline = time.monotonic() + 60
    while key not in ast.literal_eval(httpx.get(f"{served.url}/keys", timeout=60).text):
        assert time.monotonic() < deadline


CONNECT = {"type": "websocket.connect"}
SENT_TOO_LATE = ["ClientDisconnected", True]


def disconnect(code, reason=""):
    return {"type": "websocket.disconnect", "code": code, "reason": reason}


# Scope and handshake: W3-W9, W13


def test_scope(connect, served):
    with connect("/scope?q=%20", additional_headers=[("X-A", "1"), ("x-a", "2")], subprotocols=["a", "b"]) as client:
        scope = ast.literal_eval(client.recv(timeout=60))
        local = client.local_address
    assert scope["type"] == "websocket"
    assert scope["asgi"] == {"version": "3.0", "spec_version": "2.5"}
    assert scope["http_version"] == "1.1"
    assert scope["scheme"] == "ws"
    assert (scope["path"], scope["raw_path"]) == ("/scope", b"/scope")
    assert scope["query_string"] == b"q=%20"
    assert scope["root_path"] == ""
    assert [value for name, value in scope["headers"] if name == b"x-a"] == [b"1", b"2"]
    assert scope["subprotocols"] == ["a", "b"]
    assert scope["client"] == local
    assert scope["server"] == ("127.0.0.1", served.port)
    assert scope["state"].keys() == {"started"}
    assert "channel_layer" in scope["extensions"]
    assert "tls" not in scope["extensions"]  # T1: of TLS connections only
    assert "method" not in scope


def test_accept_with_headers_and_subprotocol(connect):
    with connect("/accept?subprotocol=b", subprotocols=["a", "b"]) as client:
        assert client.subprotocol == "b"
        assert client.response.headers.get_all("set-cookie") == ["a=1", "b=2"]
        assert client.response.headers["x-one"] == "1"
    with connect("/accept", subprotocols=["a", "b"]) as client:
        assert client.subprotocol is None


@pytest.mark.parametrize(
    ("target", "status"),
    [("/refuse", 403), ("/fail-early", 500), ("/return-early", 500), ("/never-accept", 504)],
)
def test_a_handshake_that_is_not_accepted(served, connect, key, target, status):
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{target}?key={key}")
    assert refused.value.response.status_code == status
    events = record(served, key)
    if target in ("/refuse", "/never-accept"):
        assert events == [CONNECT, disconnect(1006)]


def test_a_client_that_leaves_before_the_accept(served, key):
    with RawClient(served.port, f"/never-accept?key={key}") as client:
        opened(served, key)
        client.socket.close()
        assert record(served, key) == [CONNECT, disconnect(1006)]


def test_what_the_client_says_before_the_accept_is_not_lost(served):
    with RawClient(served.port, "/echo", early=frame(TEXT, b"early") + frame(BINARY, b"bird")) as client:
        client.accepted()
        assert [client.receive(), client.receive()] == [(TEXT, b"early"), (BINARY, b"bird")]


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        ("Version: 13", "Version: 8", 426),
        ("Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n", "", 400),
        ("MDEyMzQ1Njc4OWFiY2RlZg==", "short", 400),
    ],
)
def test_a_faulty_handshake_is_refused(served, old, new, status):
    with socket.create_connection(("127.0.0.1", served.port), 15) as client:
        client.sendall(REQUEST.format("/echo").replace(old, new).encode())
        assert client.recv(65536).startswith(b"HTTP/1.1 %d " % status)


# Messages: W1, W2, W10, W11


@pytest.mark.parametrize("message", ["", b"", "x", b"\0", "ü" * 70_000, bytes(1_000_000)])
def test_messages_keep_kind_and_content(served, connect, key, message):
    with connect(f"/echo?key={key}", max_size=None) as client:
        client.send(message)
        assert client.recv(timeout=60) == message
    name = "text" if isinstance(message, str) else "bytes"
    assert record(served, key) == [CONNECT, {"type": "websocket.receive", name: message}, disconnect(1000)]


def test_fragments_are_one_message_and_pings_pass_between(served, key):
    with RawClient(served.port, f"/echo?key={key}") as client:
        client.accepted()
        client.send(TEXT, "ü".encode()[:1], fin=False)
        client.send(PING, b"hello")
        client.send(0, b"", fin=False)
        client.send(0, "ü".encode()[1:])
        assert [client.receive(), client.receive()] == [(PONG, b"hello"), (TEXT, "ü".encode())]


def test_many_messages_stay_in_order(connect):
    with connect("/echo", compression=None) as client:

        def send_all():
            for number in range(5000):
                client.send(str(number))

        sender = threading.Thread(target=send_all)
        sender.start()
        received = [client.recv(timeout=60) for _ in range(5000)]
        sender.join()
    assert received == [str(number) for number in range(5000)]


# Closing: W12-W16


@pytest.mark.parametrize(
    ("payload", "code", "reason", "echoed"),
    [
        (b"", 1005, "", None),
        (struct.pack(">H", 1000), 1000, "", 1000),
        (struct.pack(">H", 1001), 1001, "", 1001),
        (struct.pack(">H", 4001) + "weil ü".encode(), 4001, "weil ü", 4001),
        # Faults of the client, RFC 6455 section 7.4.
        (b"\x03", 1002, "received close control frame with payload len 1", 1002),
        (struct.pack(">H", 1005), 1002, "invalid close code", 1002),
        (struct.pack(">H", 1000) + b"\xff", 1007, "the close reason is not UTF-8", 1007),
    ],
)
def test_a_client_that_closes(served, key, payload, code, reason, echoed):
    with RawClient(served.port, f"/wait?key={key}") as client:
        client.accepted()
        client.send(CLOSE, payload)
        assert client.close_code() == echoed
        assert client.rest() == b""
    told = disconnect(code, reason)
    assert record(served, key) == [CONNECT, told, told, SENT_TOO_LATE]


def test_what_a_client_said_before_its_close_comes_first(served, key):
    """Also when the application receives it long after the client has gone."""
    with RawClient(served.port, f"/slow-reader?key={key}") as client:
        client.accepted()
        words = [b"%d" % number for number in range(100)]
        client.socket.sendall(b"".join(frame(TEXT, word) for word in words) + frame(CLOSE, struct.pack(">H", 1000)))
        assert client.close_code() == 1000
        assert client.rest() == b""
    events = record(served, key)
    assert [event["text"].encode() for event in events[1:-1]] == words
    assert events[-1] == disconnect(1000)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_is_lost(served, key, how):
    client = RawClient(served.port, f"/wait?key={key}").accepted()
    begun = time.monotonic()
    client.reset() if how == "reset" else client.socket.close()
    assert record(served, key) == [CONNECT, disconnect(1006), disconnect(1006), SENT_TOO_LATE]
    assert time.monotonic() - begun < 4


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ("", 1000, ""),
        ("code=4001&reason=because", 4001, "because"),
        ("code=1001", 1001, ""),
        ("code=3000&reason=" + "x" * 123, 3000, "x" * 123),
    ],
)
def test_an_application_that_closes(served, connect, key, arguments, code, reason):
    with connect(f"/close?key={key}&{arguments}") as client:
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=60)
        assert (client.close_code, client.close_reason) == (code, reason)
    assert record(served, key) == [CONNECT, disconnect(code, reason), SENT_TOO_LATE]


def test_an_application_that_closes_is_told_without_waiting_for_the_client(served, key):
    """The client reads nothing and answers no Close; the application is told at once, the socket ends in time."""
    with RawClient(served.port, f"/close?key={key}&code=4000") as client:
        client.accepted()
        begun = time.monotonic()
        assert record(served, key) == [CONNECT, disconnect(4000), SENT_TOO_LATE]
        assert time.monotonic() - begun < 4
        assert client.close_code() == 4000


@pytest.mark.parametrize(("target", "code"), [("/fail", 1011), ("/return", 1000)])
def test_an_application_that_ends_closes(connect, target, code):
    with connect(target) as client:
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=60)
        assert client.close_code == code


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_leaves_a_flood_ends_it(served, key, how):
    """The application never receives: send() is all that can tell it."""
    client = RawClient(served.port, f"/flood?key={key}").accepted()
    client.exactly(1_000_000)
    client.reset() if how == "reset" else client.socket.close()
    assert record(served, key) == [CONNECT, SENT_TOO_LATE]


# Faults of the client: W2, W17; RFC 6455 sections 5 and 7


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x81\x01x", 1002),  # not masked
        (frame(3), 1002),  # an opcode nobody knows
        (b"\xf1" + frame(TEXT, b"x")[1:], 1002),  # reserved bits
        (frame(0, b"x"), 1002),  # goes on with nothing
        (frame(TEXT, b"x", fin=False) + frame(TEXT, b"y"), 1002),  # a message within a message
        (frame(PING, b"x", fin=False), 1002),  # a control frame in fragments
        (frame(PING, bytes(126)), 1002),
        (frame(TEXT, b"\xff"), 1007),
        (frame(TEXT, b"\xc3", fin=False) + frame(0, b"\xff"), 1007),
        (b"\x82\xff" + struct.pack(">Q", 17 * 1024 * 1024) + b"\0\0\0\0", 1009),
    ],
)
def test_what_a_client_must_not_send(served, key, data, code):
    with RawClient(served.port, f"/wait?key={key}") as client:
        client.accepted()
        client.socket.sendall(data)
        assert client.close_code() == code
    events = record(served, key)
    assert (events[-2]["type"], events[-2]["code"]) == ("websocket.disconnect", code)
    assert events[-1] == SENT_TOO_LATE


def test_invalid_events_raise_in_send(connect):
    with connect("/invalid") as client:
        assert set(ast.literal_eval(client.recv(timeout=60))) == {"InvalidEvent"}


def test_nothing_was_logged_as_an_error_but_what_is_one(served):
    """A13, W15: what the server raised in send() is no error of the application. Runs last."""
    errors = [line for line in served.output.splitlines() if line.startswith(("ERROR", "CRITICAL", "WARNING"))]
    assert errors
    expected = rf" /(fail|fail-early|return-early)\b|{LATE_LEASE}"
    assert not [line for line in errors if not re.search(expected, line)]
    assert "Disconnect" not in served.output
