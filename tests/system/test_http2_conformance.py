"""What RFC 9113 and RFC 7541 demand of a server, case by case, with frames written by hand against the real command.

Each case says what the client sends behind the preface and what must come: an answer, the reset of its stream, or the
end of the connection. Where the RFC names a code, the code is checked. A stream error must cost its stream only,
though the RFC lets a server end the connection for it: so behind each of them the connection is asked again.

The cases are those of h2spec in our own words, as far as they are about servers. What limits are for is in
test_http2.py.
"""

import ast
import contextlib
import socket
import struct
import subprocess

import pytest
from h2.errors import ErrorCodes
from hpack import Decoder, Encoder

from tests.system.processes import Served

APP = "tests.system.conformance_app:application"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 1, 1, 4, 8, 32
HEADER_TABLE_SIZE, ENABLE_PUSH, _, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = range(1, 6)

PROTOCOL, FLOW_CONTROL = ErrorCodes.PROTOCOL_ERROR, ErrorCodes.FLOW_CONTROL_ERROR
CLOSED, FRAME_SIZE, COMPRESSION = ErrorCodes.STREAM_CLOSED, ErrorCodes.FRAME_SIZE_ERROR, ErrorCodes.COMPRESSION_ERROR

REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/echo"), (":authority", "x")]


def frame(kind, flags=0, stream=0, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def block(fields):
    """A header block that touches no dynamic table."""
    return Encoder().encode([(name, value, True) for name, value in fields])


def head(stream=1, fields=REQUEST, *, ends=True, flags=0, more=()):
    return frame(HEADERS, END_HEADERS | (END_STREAM if ends else 0) | flags, stream, block([*fields, *more]))


def settings(*pairs):
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def window(stream, increment):
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", increment))


def without(name):
    return [field for field in REQUEST if field[0] != name]


def changed(name, value):
    return [(found, value if found == name else old) for found, old in REQUEST]


class Client:
    """A connection in which the preface has been exchanged."""

    def __init__(self, port, *pairs):
        self.socket = socket.create_connection(("127.0.0.1", port), 20)
        self.decoder = Decoder()
        self.data = b""
        self.send(PREFACE + settings(*pairs))
        assert self.frame()[0] == SETTINGS
        self.send(frame(SETTINGS, ACK))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        # The server may have ended the connection already, which is what is tested.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            self.socket.sendall(data)

    def frame(self):
        """(kind, flags, stream, payload) of the next frame; None at the end."""
        while len(self.data) < 9 or len(self.data) < 9 + int.from_bytes(self.data[:3], "big"):
            try:
                received = self.socket.recv(65536)
            except ConnectionResetError:
                return None
            if not received:
                return None
            self.data += received
        end = 9 + int.from_bytes(self.data[:3], "big")
        taken, self.data = self.data[:end], self.data[end:]
        return taken[3], taken[4], int.from_bytes(taken[5:9], "big"), taken[9:]

    def until(self, kind, stream=None):
        """The next frame of this kind; an AssertionError with what came instead, if the connection ends first."""
        seen = []
        while (found := self.frame()) is not None:
            if found[0] == HEADERS:
                self.fields = dict(self.decoder.decode(found[3]))
            if found[0] == kind and stream in (None, found[2]) and not (kind == SETTINGS and found[1] & ACK):
                return found
            seen.append(found[:3])
        raise AssertionError(f"the connection ended; there came {seen}")

    def answers(self, stream=99):
        """Ask for something; it must be answered with a 200, whatever came before."""
        self.send(head(stream))
        self.until(HEADERS, stream)
        assert self.fields[":status"] == "200"


@pytest.fixture(scope="module")
def served():
    with Served(APP, "--no-access-log") as running:
        yield running


def answered(client):
    client.until(HEADERS, 1)
    assert client.fields[":status"] == "200"


def resets(*codes):
    def check(client):
        *_, payload = client.until(RST_STREAM, 1)
        assert ErrorCodes(int.from_bytes(payload, "big")) in codes
        client.answers()

    return check


def ends(*codes):
    def check(client):
        *_, payload = client.until(GOAWAY)
        assert ErrorCodes(int.from_bytes(payload[4:8], "big")) in codes
        while client.frame() is not None:  # and the server closes
            pass

    return check


def closes(client):
    while client.frame() is not None:
        pass


def stays(client):
    client.answers()


OPEN = head(ends=False)
SILENT = [*REQUEST[:2], (":path", "/silent"), REQUEST[3]]  # not answered, so that the stream stays half closed
PIECES = block([*REQUEST, ("x-long", "a" * 60)])
RANGE_END = 2**31 - 1

# (RFC 9113 section and what is sent, the frames, what must come)
CASES = [
    # Frames: section 4
    ("4.1 a frame of an unknown type", frame(0x16, 0xFF, 0, b"12345678") + head(), answered),
    ("4.1 unknown flags", frame(PING, 0x16, 0, b"12345678") + head(), answered),
    ("4.1 the reserved bit", frame(HEADERS, 5, 1 | 1 << 31, block(REQUEST)), answered),
    ("4.2 DATA of the largest size", OPEN + frame(DATA, END_STREAM, 1, bytes(2**14)), answered),
    ("4.2 DATA beyond the largest size", OPEN + frame(DATA, END_STREAM, 1, bytes(2**14 + 1)), ends(FRAME_SIZE)),
    ("4.2 HEADERS beyond the largest size", frame(HEADERS, 5, 1, bytes(2**14 + 1)), ends(FRAME_SIZE)),
    ("4.3 a header block that is none", frame(HEADERS, 5, 1, b"\x40"), ends(COMPRESSION)),
    (
        "4.3 a frame of another kind inside a block",
        frame(HEADERS, 1, 1, PIECES) + frame(PRIORITY, 0, 1, bytes(5)),
        ends(PROTOCOL),
    ),
    ("4.3 a frame of another stream inside a block", frame(HEADERS, 1, 1, PIECES) + head(3), ends(PROTOCOL)),
    # Streams: section 5
    ("5.1 idle: DATA", frame(DATA, END_STREAM, 1, b"x"), ends(PROTOCOL)),
    ("5.1 idle: RST_STREAM", frame(RST_STREAM, 0, 1, bytes(4)), ends(PROTOCOL)),
    ("5.1 idle: WINDOW_UPDATE", window(1, 100), ends(PROTOCOL)),
    ("5.1 idle: PRIORITY", frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 10)), stays),
    ("5.1 half closed: DATA", head(fields=SILENT) + frame(DATA, END_STREAM, 1, b"x"), resets(CLOSED)),
    ("5.1 half closed: HEADERS", head(fields=SILENT) + head(), resets(CLOSED)),
    ("5.1 half closed: WINDOW_UPDATE", head() + window(1, 100), answered),
    ("5.1 reset: what was on its way", OPEN + frame(RST_STREAM, 0, 1, bytes(4)) + window(1, 1), stays),
    ("5.1.1 an even number", head(2), ends(PROTOCOL)),
    ("5.1.1 a number below one that was used", head(5) + head(3), ends(PROTOCOL, CLOSED)),
    ("5.3.1 a PRIORITY on itself", frame(PRIORITY, 0, 1, struct.pack(">IB", 1, 10)), ends(PROTOCOL)),
    ("5.5 a frame of an unknown type inside a block", frame(HEADERS, 1, 1, PIECES) + frame(0x16), ends(PROTOCOL)),
    # DATA: 6.1
    ("6.1 DATA without a stream", frame(DATA, END_STREAM, 0, b"x"), ends(PROTOCOL)),
    ("6.1 padding", OPEN + frame(DATA, END_STREAM | PADDED, 1, b"\x06test\0\0\0\0\0\0"), answered),
    ("6.1 more padding than there is", OPEN + frame(DATA, END_STREAM | PADDED, 1, b"\x06test"), ends(PROTOCOL)),
    # HEADERS: 6.2
    ("6.2 HEADERS without a stream", head(0), ends(PROTOCOL)),
    ("6.2 padding", frame(HEADERS, 5 | PADDED, 1, b"\x02" + block(REQUEST) + b"\0\0"), answered),
    ("6.2 more padding than there is", frame(HEADERS, 5 | PADDED, 1, b"\xff" + block(REQUEST)), ends(PROTOCOL)),
    (
        "6.2 with a priority",
        frame(HEADERS, 5 | HAS_PRIORITY, 1, struct.pack(">IB", 0, 255) + block(REQUEST)),
        answered,
    ),
    # PRIORITY: 6.3
    ("6.3 PRIORITY without a stream", frame(PRIORITY, 0, 0, bytes(5)), ends(PROTOCOL)),
    ("6.3 of a wrong length", OPEN + frame(PRIORITY, 0, 1, bytes(4)), ends(FRAME_SIZE)),
    # RST_STREAM: 6.4
    ("6.4 RST_STREAM without a stream", frame(RST_STREAM, 0, 0, bytes(4)), ends(PROTOCOL)),
    ("6.4 of a wrong length", OPEN + frame(RST_STREAM, 0, 1, bytes(3)), ends(FRAME_SIZE)),
    ("6.4 with an unknown code", OPEN + frame(RST_STREAM, 0, 1, b"\0\0\0\xff"), stays),
    # SETTINGS: 6.5
    ("6.5 an acknowledgement with contents", frame(SETTINGS, ACK, 0, bytes(6)), ends(FRAME_SIZE)),
    ("6.5 SETTINGS of a stream", frame(SETTINGS, 0, 1, struct.pack(">HI", 3, 100)), ends(PROTOCOL)),
    ("6.5 of a wrong length", frame(SETTINGS, 0, 0, bytes(5)), ends(FRAME_SIZE)),
    ("6.5.2 ENABLE_PUSH of 2", settings((ENABLE_PUSH, 2)), ends(PROTOCOL)),
    ("6.5.2 a window beyond the largest", settings((INITIAL_WINDOW_SIZE, 2**31)), ends(FLOW_CONTROL)),
    ("6.5.2 frames below the smallest", settings((MAX_FRAME_SIZE, 2**14 - 1)), ends(PROTOCOL)),
    ("6.5.2 frames beyond the largest", settings((MAX_FRAME_SIZE, 2**24)), ends(PROTOCOL)),
    ("6.5.2 an unknown setting", settings((0xFF, 1)) + head(), answered),
    # PUSH_PROMISE: 6.6, 8.4
    (
        "8.4 a client that pushes",
        OPEN + frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4) + block(REQUEST)),
        ends(PROTOCOL),
    ),
    # PING: 6.7
    ("6.7 PING of a stream", frame(PING, 0, 1, bytes(8)), ends(PROTOCOL)),
    ("6.7 of a wrong length", frame(PING, 0, 0, bytes(6)), ends(FRAME_SIZE)),
    ("6.7 an acknowledgement nobody asked for", frame(PING, ACK, 0, bytes(8)), stays),
    # GOAWAY: 6.8
    ("6.8 GOAWAY of a stream", frame(GOAWAY, 0, 1, bytes(8)), ends(PROTOCOL)),
    ("7 GOAWAY with an unknown code", frame(GOAWAY, 0, 0, bytes(4) + b"\0\0\0\xff"), closes),
    # WINDOW_UPDATE: 6.9
    ("6.9 of zero", window(0, 0), ends(PROTOCOL)),
    # Of the stream, says the RFC; the parser of h2 knows no stream, and 5.4.2 lets it be the connection's.
    ("6.9 of zero for a stream", OPEN + window(1, 0), ends(PROTOCOL)),
    ("6.9 of a wrong length", frame(WINDOW_UPDATE, 0, 0, bytes(3)), ends(FRAME_SIZE)),
    ("6.9.1 the connection's window beyond the largest", window(0, RANGE_END), ends(FLOW_CONTROL)),
    ("6.9.1 a stream's window beyond the largest", OPEN + window(1, RANGE_END), resets(FLOW_CONTROL)),
    (
        "6.9.2 all windows beyond the largest",
        OPEN + window(1, 100) + settings((INITIAL_WINDOW_SIZE, RANGE_END)),
        ends(FLOW_CONTROL),
    ),
    # CONTINUATION: 6.10
    (
        "6.10 a block in pieces",
        frame(HEADERS, END_STREAM, 1, PIECES[:5])
        + frame(CONTINUATION, 0, 1, PIECES[5:9])
        + frame(CONTINUATION, 4, 1, PIECES[9:]),
        answered,
    ),
    ("6.10 CONTINUATION without a stream", frame(HEADERS, 1, 1, PIECES) + frame(CONTINUATION, 4, 0), ends(PROTOCOL)),
    ("6.10 CONTINUATION of nothing", frame(CONTINUATION, 4, 1, PIECES), ends(PROTOCOL)),
    ("6.10 CONTINUATION behind a whole block", OPEN + frame(CONTINUATION, 4, 1), ends(PROTOCOL)),
    ("6.10 CONTINUATION behind DATA", OPEN + frame(DATA, 0, 1, b"x") + frame(CONTINUATION, 4, 1), ends(PROTOCOL)),
    # Requests: section 8
    (
        "8.1 HEADERS behind HEADERS that do not end the stream",
        OPEN + head(fields=[("x-a", "1")], ends=False),
        resets(PROTOCOL),
    ),
    ("8.2.1 a name in upper case", head(more=[("X-Test", "1")]), resets(PROTOCOL)),
    ("8.2.1 a line break in a value", head(more=[("x-test", "a\r\nb: c")]), resets(PROTOCOL)),
    ("8.2.1 a space in a name", head(more=[("x test", "1")]), resets(PROTOCOL)),
    ("8.2.2 connection", head(more=[("connection", "keep-alive")]), resets(PROTOCOL)),
    ("8.2.2 transfer-encoding", head(more=[("transfer-encoding", "chunked")]), resets(PROTOCOL)),
    ("8.2.2 te", head(more=[("te", "trailers, deflate")]), resets(PROTOCOL)),
    ("8.2.2 te: trailers", head(more=[("te", "trailers")]), answered),
    ("8.3 an unknown pseudo-header", head(fields=[*REQUEST, (":test", "1")]), resets(PROTOCOL)),
    ("8.3 a pseudo-header of responses", head(fields=[*REQUEST, (":status", "200")]), resets(PROTOCOL)),
    ("8.3 a pseudo-header among the trailers", OPEN + head(fields=[(":method", "GET")]), resets(PROTOCOL)),
    ("8.3 a pseudo-header behind others", head(fields=[("x-a", "1"), *REQUEST]), resets(PROTOCOL)),
    ("8.3.1 an empty path", head(fields=changed(":path", "")), resets(PROTOCOL)),
    ("8.3.1 no method", head(fields=without(":method")), resets(PROTOCOL)),
    ("8.3.1 no scheme", head(fields=without(":scheme")), resets(PROTOCOL)),
    ("8.3.1 no path", head(fields=without(":path")), resets(PROTOCOL)),
    ("8.3.1 two methods", head(fields=[*REQUEST, (":method", "GET")]), resets(PROTOCOL)),
    ("8.3.1 two schemes", head(fields=[*REQUEST, (":scheme", "http")]), resets(PROTOCOL)),
    ("8.3.1 two paths", head(fields=[*REQUEST, (":path", "/")]), resets(PROTOCOL)),
    (
        "8.1.1 less than the content-length",
        head(ends=False, more=[("content-length", "2")]) + frame(DATA, END_STREAM, 1, b"x"),
        resets(PROTOCOL),
    ),
    (
        "8.1.1 more than the content-length",
        head(ends=False, more=[("content-length", "1")]) + frame(DATA, END_STREAM, 1, b"xy"),
        resets(PROTOCOL),
    ),
    # RFC 7541
    ("HPACK 2.3.3 an index nobody has", frame(HEADERS, 5, 1, block(REQUEST) + b"\xfe"), ends(COMPRESSION)),
    ("HPACK 6.1 the index 0", frame(HEADERS, 5, 1, block(REQUEST) + b"\x80"), ends(COMPRESSION)),
    (
        "HPACK 4.2 a new size of the table at the end",
        frame(HEADERS, 5, 1, block(REQUEST) + b"\x3f\x01"),
        ends(COMPRESSION),
    ),
    (
        "HPACK 6.3 a table beyond what was agreed on",
        frame(HEADERS, 5, 1, b"\x3f\xe1\xff\x03" + block(REQUEST)),
        ends(COMPRESSION),
    ),
    (
        "HPACK 5.2 padding that is too long",
        frame(HEADERS, 5, 1, block(REQUEST) + b"\x00\x85\xf2\xb2\x4a\x84\xff\x84\x49\x50\x9f\xff"),
        ends(COMPRESSION),
    ),
    (
        "HPACK 5.2 padding of zeros",
        frame(HEADERS, 5, 1, block(REQUEST) + b"\x00\x85\xf2\xb2\x4a\x84\xff\x83\x49\x50\x90"),
        ends(COMPRESSION),
    ),
    (
        "HPACK 5.2 the end of a string inside of it",
        frame(HEADERS, 5, 1, block(REQUEST) + b"\x00\x85\xf2\xb2\x4a\x84\xff\x87\x49\x51\xff\xff\xff\xfa\x7f"),
        ends(COMPRESSION),
    ),
]


@pytest.mark.parametrize(("frames", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_case(served, frames, expected):
    with Client(served.port) as client:
        client.send(frames)
        expected(client)
    with Client(served.port) as neighbour:
        neighbour.answers(1)


# What needs more than one thing to be sent


def test_settings_are_acknowledged(served):
    """6.5.3"""
    with Client(served.port) as client:
        client.send(settings((INITIAL_WINDOW_SIZE, 100)))
        for _ in range(2):  # of the first SETTINGS, and of these
            found = client.frame()
            while found[0] != SETTINGS:
                found = client.frame()
            assert (found[1] & ACK, found[3]) == (ACK, b"")


def test_a_ping_is_answered_with_what_it_holds(served):
    """6.7"""
    with Client(served.port) as client:
        client.send(frame(PING, 0, 0, b"h2 probe"))
        kind, flags, _, payload = client.until(PING)
        assert (kind, flags & ACK, payload) == (PING, ACK, b"h2 probe")


def data_of(client, stream, count):
    received = b""
    while len(received) < count:
        received += client.until(DATA, stream)[3]
    return received


def body_of(client):
    received = b""
    while True:
        _, flags, _, payload = client.until(DATA, 1)
        received += payload
        if flags & END_STREAM:
            return received


def test_a_response_waits_for_the_window(served):
    """6.9.1, 6.9.2: also when SETTINGS open the window later."""
    with Client(served.port, (INITIAL_WINDOW_SIZE, 1)) as client:
        client.send(head(ends=False) + frame(DATA, END_STREAM, 1, b"hello"))
        answered(client)
        assert data_of(client, 1, 1) == b"h"
        client.send(window(1, 1))
        assert data_of(client, 1, 1) == b"e"
        client.send(settings((INITIAL_WINDOW_SIZE, 100)))
        assert data_of(client, 1, 3) == b"llo"


def test_a_window_may_become_negative(served):
    """6.9.2: what was sent counts against a smaller window, too."""
    with Client(served.port, (INITIAL_WINDOW_SIZE, 3)) as client:
        client.send(head(ends=False) + frame(DATA, END_STREAM, 1, b"hello"))
        answered(client)
        assert data_of(client, 1, 3) == b"hel"
        client.send(settings((INITIAL_WINDOW_SIZE, 1)) + window(1, 2) + frame(PING, 0, 0, bytes(8)))
        kind, *_ = client.frame()
        while kind != PING:  # nothing more may come: the window is 0
            assert kind != DATA
            kind, *_ = client.frame()
        client.send(window(1, 2))
        assert data_of(client, 1, 2) == b"lo"


def test_no_frame_is_larger_than_the_client_takes(served):
    """4.2, 6.5.2"""
    body = bytes(40_000)
    with Client(served.port) as client:
        client.send(
            head(ends=False) + b"".join(frame(DATA, 0, 1, body[n : n + 10_000]) for n in range(0, 40_000, 10_000))
        )
        client.send(frame(DATA, END_STREAM, 1))
        answered(client)
        received = b""
        while len(received) < len(body):
            payload = client.until(DATA, 1)[3]
            assert len(payload) <= 2**14
            received += payload
    assert received == body


def test_a_head_too_large_for_one_frame(served):
    """6.10: with fields of the client that come back in a body of frames."""
    fields = [(f"x-{number}", "a" * 900) for number in range(40)]
    data = block([*changed(":path", "/scope"), *fields])
    first, *rest = [data[n : n + 2**14] for n in range(0, len(data), 2**14)]
    with Client(served.port) as client:
        client.send(frame(HEADERS, END_STREAM, 1, first))
        for number, piece in enumerate(rest, 1):
            client.send(frame(CONTINUATION, END_HEADERS if number == len(rest) else 0, 1, piece))
        answered(client)
        assert b"x-39" in body_of(client)


def test_cookies_and_authority_in_the_scope(served):
    """H9, H28; 8.2.3: several Cookie fields are one before they reach "a generic HTTP server application"."""
    more = [("cookie", "a=1"), ("x-a", "1"), ("cookie", "b=2"), ("x-a", "2")]
    with Client(served.port) as client:
        client.send(head(fields=changed(":path", "/scope?h2"), more=more))
        answered(client)
        scope = ast.literal_eval(body_of(client).decode())
    assert scope["headers"][0] == (b"host", b"x")
    assert [pair for pair in scope["headers"] if pair[0] == b"cookie"] == [(b"cookie", b"a=1; b=2")]
    assert [pair for pair in scope["headers"] if pair[0] == b"x-a"] == [(b"x-a", b"1"), (b"x-a", b"2")]
    assert not [name for name, _ in scope["headers"] if name.startswith(b":")]
    assert scope["http_version"] == "2"


def test_nothing_was_logged_as_an_error(served):
    """Faults of clients are not the operator's. Runs last."""
    assert not [line for line in served.output.splitlines() if line.startswith(("ERROR", "CRITICAL"))]


def test_curl_agrees(served):
    answer = subprocess.run(
        ["curl", "-sS", "--http2-prior-knowledge", "-d", "hello", f"{served.url}/echo"],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert answer.stdout == b"hello"
