"""ASGI over HTTP as specified, against the real command with raw sockets: what the probe application saw, and the
client.

The numbers (H1, A9, L3 …) are those of docs/conformance.md. What needs another command line is in test_serve.py,
great amounts are in test_transfers.py.
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

from tests.system.processes import LATE_LEASE, Served

APP = "tests.system.conformance_app:application"
KEYS = (f"h{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def served():
    with Served(APP, "--workers", "1", "--no-access-log") as running:
        yield running


@pytest.fixture
def client(served):
    with RawClient(served.port) as raw:
        yield raw


@pytest.fixture
def key():
    return next(KEYS)


class RawClient:
    """A socket that reads what HTTP says, and keeps what it has not read."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), 15)
        self.data = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def get(self, target, *headers):
        self.send("\r\n".join([f"GET {target} HTTP/1.1", "Host: x", *headers, "", ""]).encode())
        return self.response()

    def until(self, mark):
        while mark not in self.data:
            received = self.socket.recv(65536)
            assert received, f"the end, instead of {mark!r}: {self.data!r:.300}"
            self.data += received
        found, _, self.data = self.data.partition(mark)
        return found + mark

    def exactly(self, count):
        while len(self.data) < count:
            received = self.socket.recv(65536)
            assert received, f"the end, with {count - len(self.data)} bytes missing: {self.data!r:.300}"
            self.data += received
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def head(self):
        """(status, list of headers in lower case)"""
        lines = self.until(b"\r\n\r\n")[:-4].split(b"\r\n")
        return int(lines[0].split()[1]), [
            (name.lower(), value) for name, _, value in (x.partition(b": ") for x in lines[1:])
        ]

    def chunk(self):
        size = int(self.until(b"\r\n"), 16)
        data = self.exactly(size)
        assert self.exactly(2) == b"\r\n"
        return data

    def response(self):
        """(status, headers, body) of a response with a length or chunks."""
        status, headers = self.head()
        fields = dict(headers)
        if b"content-length" in fields:
            return status, headers, self.exactly(int(fields[b"content-length"]))
        assert fields[b"transfer-encoding"] == b"chunked"
        return status, headers, b"".join(iter(self.chunk, b""))

    def rest(self):
        """Everything until the server closes."""
        while received := self.socket.recv(65536):
            self.data += received
        rest, self.data = self.data, b""
        return rest

    def reset(self):
        """Leave with a reset, as a client that is killed with unread data does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def record(served, key, get=httpx.get):
    """What the application noted under ``key``, when it is over."""
    answer = get(f"{served.url}/record?key={key}", timeout=60)
    assert answer.status_code == 200, answer.text
    return ast.literal_eval(answer.text)


# Scope: A1-A3, H1-H12


def test_scope(served, client):
    client.send(
        b"GET /scope?q=%20&b HTTP/1.1\r\nHost: Example:80\r\nCookie: a=1\r\nX-A:  1 \r\nCookie: b=2\r\n"
        b"x-a: 2\r\nx_under: 3\r\n\r\n"
    )
    scope = ast.literal_eval(client.response()[2].decode())
    assert scope["type"] == "http"
    assert scope["asgi"] == {"version": "3.0", "spec_version": "2.5"}
    assert scope["http_version"] == "1.1"
    assert scope["method"] == "GET"
    assert scope["scheme"] == "http"
    assert scope["path"] == "/scope"
    assert scope["raw_path"] == b"/scope"
    assert scope["query_string"] == b"q=%20&b"
    assert scope["root_path"] == ""
    assert scope["headers"] == [
        (b"host", b"Example:80"),
        (b"cookie", b"a=1"),
        (b"x-a", b"1"),
        (b"cookie", b"b=2"),
        (b"x-a", b"2"),
        (b"x_under", b"3"),
    ]
    assert scope["client"] == client.socket.getsockname()
    assert scope["server"] == ("127.0.0.1", served.port)
    assert scope["state"].keys() == {"started"}
    # What this connection can have, and nothing else: no tls without TLS (T1), no push, no file descriptors (X2, X3),
    # no files without the flag (X4), no debug (X7), no trailers for who does not ask for them (X6).
    assert scope["extensions"].keys() == {"channel_layer", "http.response.early_hint"}


@pytest.mark.parametrize(
    ("target", "path"), [("/s%63ope", "/scope"), ("/%73cope?a", "/scope"), ("http://other/scope", "/scope")]
)
def test_path_is_decoded_and_raw_path_is_not(client, target, path):
    scope = ast.literal_eval(client.get(target)[2].decode())
    assert scope["path"] == path
    assert scope["raw_path"] == target.removeprefix("http://other").partition("?")[0].encode()
    if target.startswith("http:"):
        assert scope["headers"][0] == (b"host", b"other")


@pytest.mark.parametrize("target", ["/%ff%fe", "/%ED%A0%80", "/%00", "/%", "/%zz", "/" + "a" * 8000])
def test_odd_paths_reach_the_application(client, target):
    assert client.get(target, "Content-Length: 0")[0] == 200


def test_http_1_0_is_told_and_answered_without_chunks(client):
    client.send(b"GET /scope HTTP/1.0\r\n\r\n")
    head, _, body = client.rest().partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert b"connection: close" in head.lower()
    assert ast.literal_eval(body.decode())["http_version"] == "1.0"


def test_http_1_0_stream_ends_with_the_connection(client):
    client.send(b"POST /echo HTTP/1.0\r\nContent-Length: 4\r\n\r\nab")
    client.until(b"\r\n\r\nab")
    client.send(b"cd")
    assert client.rest() == b"cd"


def test_http_1_0_keep_alive(client):
    for _ in range(2):
        client.send(b"GET /answer HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        status, headers, body = client.response()
        assert (status, body) == (200, bytes(5))
        assert (b"connection", b"keep-alive") in headers


def test_each_request_has_a_scope_of_its_own(client):
    first = ast.literal_eval(client.get("/scope?1")[2].decode())
    second = ast.literal_eval(client.get("/scope?2")[2].decode())
    assert (first["query_string"], second["query_string"]) == (b"1", b"2")
    channels = [scope["extensions"]["channel_layer"]["reply_channel"] for scope in (first, second)]
    assert channels[0] != channels[1]


# Lifespan: L1-L3, L8


def test_lifespan_state_is_copied_into_each_scope(client):
    started, loop, event = ast.literal_eval(client.get("/lifespan")[2].decode())
    assert started == [(loop, {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}})]
    assert event == [{"type": "lifespan.startup"}]
    assert ast.literal_eval(client.get("/scope")[2].decode())["state"].keys() == {"started"}


# Request bodies: H13-H15


def test_the_body_reaches_the_application_while_it_is_sent_and_the_answer_the_client(client):
    client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    for data in (b"one", b"two" * 10_000, b"3"):
        client.send(b"%x\r\n%b\r\n" % (len(data), data))
        if data == b"one":
            assert client.head()[0] == 200
        received = b""
        while len(received) < len(data):
            received += client.chunk()
        assert received == data
    client.send(b"0\r\n\r\n")
    assert client.exactly(5) == b"0\r\n\r\n"


def test_a_request_without_body_is_one_empty_event(served, client, key):
    client.get(f"/echo?key={key}")
    assert record(served, key) == [{"type": "http.request", "body": b"", "more_body": False}]


@pytest.mark.parametrize("size", [1, 8192, 8193, 65536, 300_000])
def test_bodies_of_every_size_come_whole(served, client, key, size):
    body = bytes(range(256)) * (size // 256 + 1)
    answer = httpx.post(f"{served.url}/echo?key={key}", content=body[:size], timeout=60)
    assert answer.content == body[:size]
    events = record(served, key)
    assert b"".join(event["body"] for event in events) == body[:size]
    assert [event["more_body"] for event in events] == [True] * (len(events) - 1) + [False]


def test_100_continue_is_sent_when_the_application_receives(client):
    client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    assert client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"body")
    assert client.response()[::2] == (200, b"body")
    assert client.get("/answer")[0] == 200


def test_an_early_answer_instead_of_100_continue_closes(client):
    client.send(
        b"POST /answer?status=413 HTTP/1.1\r\nHost: x\r\nContent-Length: 400000\r\nExpect: 100-continue\r\n\r\n"
    )
    status, headers, _ = client.response()
    assert status == 413
    assert (b"connection", b"close") in headers
    assert client.rest() == b""


def test_an_early_answer_to_a_large_upload_arrives(client):
    """The client goes on sending: closing with unread data would reset the connection and lose the answer."""
    client.send(b"POST /answer?status=413 HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
    sent = 0
    try:
        while sent < 3_000_000:
            sent += client.socket.send(bytes(65536))
    except (BrokenPipeError, ConnectionResetError, TimeoutError):
        pytest.fail(f"the upload broke after {sent} bytes")
    assert client.response()[0] == 413


def test_a_small_body_that_nobody_read_does_not_cost_the_connection(client):
    client.send(b"POST /answer HTTP/1.1\r\nHost: x\r\nContent-Length: 20000\r\n\r\n")
    assert client.response()[0] == 200
    client.send(bytes(20000))
    assert client.get("/answer")[0] == 200


# Responses: H16-H22, H28, H29


def test_headers_of_the_response(client):
    status, headers, body = client.get("/headers")
    names = [name for name, _ in headers]
    assert (status, body) == (200, b"body")
    assert [value for name, value in headers if name == b"set-cookie"] == [
        b"a=1; Expires=Thu, 01 Jan 2026 00:00:00 GMT",
        b"b=2",
    ]
    assert (b"x-mixed", b"Case") in headers
    assert b"transfer-encoding" not in names
    assert names.count(b"content-length") == names.count(b"date") == names.count(b"server") == 1


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("length", ["", "&length=1"])
def test_no_body_behind_204_and_304(client, status, length):
    client.send(f"GET /answer?status={status}{length} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    found, headers = client.head()
    assert found == status
    assert b"transfer-encoding" not in dict(headers)
    assert status == 304 or b"content-length" not in dict(headers)
    assert client.get("/answer")[0] == 200


@pytest.mark.parametrize("target", ["/answer", "/answer?length=1", "/echo", "/answer?status=404", "/nothing"])
def test_no_body_to_head(client, target):
    client.send(f"HEAD {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    status, headers = client.head()
    assert status == (500 if target == "/nothing" else 404 if "404" in target else 200)
    assert "length" not in target or (b"content-length", b"5") in headers
    assert client.get("/answer")[2] == bytes(5)


@pytest.mark.parametrize("target", ["/nothing", "/start-only", "/fail"])
def test_an_application_that_does_not_answer_is_500(client, target):
    assert client.get(target)[0] == 500
    assert client.get("/answer")[0] == 200


@pytest.mark.parametrize("target", ["/half", "/half?length=1", "/half?raise=1"])
def test_an_application_that_ends_in_the_middle_cuts_the_response(client, target):
    client.send(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    data = client.rest()
    assert b"half" in data
    assert not data.endswith(b"0\r\n\r\n")


def test_a_cut_http_1_0_response_is_a_reset(client):
    """Without a length the end of the connection would mean that it is complete."""
    client.send(b"GET /half HTTP/1.0\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        client.rest()


def test_invalid_events_raise_in_send(client):
    status, _, body = client.get("/invalid")
    assert (status, set(ast.literal_eval(body.decode()))) == (200, {"InvalidEvent"})


def test_what_messages_may_hold_is_checked_where_they_are_sent(client):
    """A4, A5: plain msgpack would let NaN and other keys than str through."""
    failures, received = ast.literal_eval(client.get("/values")[2].decode())
    assert failures == ["InvalidMessage"] * 12
    assert received == {"type": "x", "value": [None, True, -(2**63), 1.5, "ü", b"\xff", {"a": [1, 2]}]}


def test_events_behind_a_complete_response(served, client, key):
    assert client.get(f"/after-complete?key={key}")[2] == b"complete"
    assert record(served, key) == [{"type": "http.disconnect"}] * 2


# Keep-alive and pipelining


def test_pipelined_requests_are_answered_in_order(client):
    client.send(
        b"".join(
            b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(b"%d" % number), b"%d" % number)
            for number in range(200)
        )
    )
    assert [client.response()[2] for _ in range(200)] == [b"%d" % number for number in range(200)]


def test_a_bad_second_request_does_not_cost_the_first_its_answer(client):
    client.send(b"GET /answer HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost : x\r\n\r\n")
    assert client.response()[0] == 200
    status, headers, _ = client.response()
    assert status == 400
    assert (b"connection", b"close") in headers
    assert client.rest() == b""


def test_connection_close_is_honoured(client):
    _, headers, _ = client.get("/answer", "Connection: close")
    assert (b"connection", b"close") in headers
    assert client.rest() == b""


def test_a_half_closed_client_gets_its_answer(client):
    client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody")
    client.socket.shutdown(socket.SHUT_WR)
    assert client.response()[2] == b"body"
    assert client.rest() == b""


# The end of the client: H24-H27, A11-A13


def test_a_client_that_leaves_before_the_response_is_noticed_at_once(served, client, key):
    client.send(f"POST /silent?key={key} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
    opened(served, key)
    begun = time.monotonic()
    client.reset()
    assert record(served, key)[1:] == [{"type": "http.disconnect"}, ["ClientDisconnected", True]]
    assert time.monotonic() - begun < 4


def test_a_client_that_leaves_right_behind_its_request_is_noticed_at_once(served, key):
    with httpx.Client(timeout=60) as asking:  # one: making twenty takes longer than all that is timed here
        begun = time.monotonic()
        for number in range(20):
            with RawClient(served.port) as hasty:
                hasty.send(
                    f"POST /silent?key={key}{number} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
                )
                hasty.reset()
        with RawClient(served.port) as client:  # behind them: whatever was opened is over soon
            assert client.get("/answer")[0] == 200
        for number in range(20):
            if f"{key}{number}" in ast.literal_eval(asking.get(f"{served.url}/keys").text):
                record(served, f"{key}{number}", asking.get)
        assert time.monotonic() - begun < 4.5


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_client_that_leaves_in_the_middle_of_its_body_is_noticed_at_once(served, client, key, how):
    client.send(f"POST /silent?key={key} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nsome".encode())
    opened(served, key)
    begun = time.monotonic()
    client.reset() if how == "reset" else client.socket.close()
    assert record(served, key) == [
        {"type": "http.request", "body": b"some", "more_body": True},
        {"type": "http.disconnect"},
        ["ClientDisconnected", True],
    ]
    assert time.monotonic() - begun < 4


def test_a_client_that_leaves_in_the_middle_of_the_response_is_noticed_at_once(served, client, key):
    client.send(f"GET /stream?key={key} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    client.until(b"first")
    begun = time.monotonic()
    client.reset()
    assert record(served, key)[1:] == [{"type": "http.disconnect"}, ["ClientDisconnected", True]]
    assert time.monotonic() - begun < 4


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_client_that_leaves_a_flood_ends_it(served, client, key, how):
    """The application never receives: send() is all that can tell it."""
    client.send(f"GET /flood?key={key} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    client.exactly(1_000_000)
    client.reset() if how == "reset" else client.socket.close()
    assert record(served, key) == [["ClientDisconnected", True]]


def test_a_client_that_leaves_a_flood_it_never_read_ends_it(served, client, key):
    client.send(f"GET /flood?key={key} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    opened(served, key)
    client.socket.close()
    assert record(served, key) == [["ClientDisconnected", True]]


def test_a_client_that_leaves_before_a_worker_has_it_leaves_nothing(served):
    for _ in range(50):
        with RawClient(served.port) as hasty:
            hasty.send(b"GET /answer HTTP/1.1\r\nHost: x\r\n\r\n")
            hasty.reset()
    with RawClient(served.port) as next_one:
        assert next_one.get("/answer")[0] == 200


def opened(served, key):
    """Wait until an instance with this key runs."""
    deadline = time.monotonic() + 60
    while key not in ast.literal_eval(httpx.get(f"{served.url}/keys", timeout=60).text):
        assert time.monotonic() < deadline


# Many at once


def test_many_clients_at_once_get_their_own_answers(served):
    failures = []

    def ask(number):
        with RawClient(served.port) as one:
            for turn in range(20):
                body = b"%d of %d " % (turn, number) * 500
                one.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                if one.response()[2] != body:
                    failures.append((number, turn))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures


def test_nothing_was_logged_as_an_error_but_what_is_one(served):
    """A13, H27: what the server raised in send() is no error of the application. Runs last."""
    httpx.get(served.url + "/answer", timeout=60)
    errors = [line for line in served.output.splitlines() if line.startswith(("ERROR", "CRITICAL", "WARNING"))]
    assert errors
    expected = rf" /(nothing|start-only|fail|half)\b|{LATE_LEASE}"
    assert not [line for line in errors if not re.search(expected, line)]
    assert "Disconnect" not in served.output
