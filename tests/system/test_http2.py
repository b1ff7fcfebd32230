"""HTTP/2 with the real command and real clients: curl, nghttp2's, httpx, the h2 library, and raw frames."""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess

import httpx
import pytest
from h2.errors import ErrorCodes
from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)

from tests.certificates import Authority
from tests.system.applications import CHUNK
from tests.system.h2_client import H2Client
from tests.system.h2_websocket import H2WebSocket
from tests.system.processes import Served
from tests.system.test_transfers import Growth, digest_of_chunks

APP = "tests.system.applications:application"
MIB = 1024**2
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.fixture(scope="module")
def served():
    with Served(APP) as running:
        httpx.get(running.url, timeout=60)
        yield running


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("tls"))
    authority.issue("server")
    return authority


@pytest.fixture(scope="module")
def tls_served(authority):
    directory = authority.directory
    flags = ("--ssl-certfile", str(directory / "server.pem"), "--ssl-keyfile", str(directory / "server.key"))
    with Served(APP, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def extensions():
    with Served("tests.system.extensions_application:application", "--pathsend") as running:
        yield running


@pytest.fixture
def client(served):
    with H2Client(served.port) as connected:
        yield connected


# Clients


@pytest.mark.parametrize(("flags", "version"), [(["--http2"], b"2"), (["--http1.1"], b"1.1")])
def test_curl_over_tls_gets_what_it_asks_for(authority, tls_served, flags, version):
    command = ["curl", "-sS", "--cacert", authority.path, *flags, "-w", "%{http_version}"]
    answer = subprocess.run(
        [*command, f"https://localhost:{tls_served.port}/"], capture_output=True, timeout=60, check=True
    )
    assert answer.stdout == b"hello" + version


def test_curl_with_prior_knowledge(served):
    command = ["curl", "-sS", "--http2-prior-knowledge", "-w", "%{http_version}", f"{served.url}/"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=True).stdout == b"hello2"
    served.wait_for(r'"GET / HTTP/2" 200')


def test_h2load(served, tls_served):
    for running in (served, tls_served):
        command = ["h2load", "-n", "600", "-c", "3", "-m", "50", f"{running.url}/"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert "600 succeeded, 0 failed, 0 errored" in answer.stdout


def test_nghttp_with_a_body(served, tmp_path):
    path = tmp_path / "body"
    path.write_bytes(CHUNK * 40)
    command = ["nghttp", "-d", str(path), f"{served.url}/upload"]
    answer = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert json.loads(answer.stdout) == {"bytes": 40 * len(CHUNK), "sha256": digest_of_chunks(40)}


def test_httpx(authority, tls_served):
    context = ssl.create_default_context(cafile=authority.path)
    with httpx.Client(
        http2=True, verify=context, base_url=f"https://localhost:{tls_served.port}", timeout=60
    ) as http:
        scope = http.get("/scope?a=%20b", headers=[("cookie", "a=1"), ("x-a", "1"), ("cookie", "b=2")]).json()
    assert (scope["http_version"], scope["scheme"], scope["path"]) == ("2", "https", "/scope")
    assert scope["query_string"] == "a=%20b"
    assert scope["headers"][0] == ["host", f"localhost:{tls_served.port}"]
    assert ["cookie", "a=1; b=2"] in scope["headers"]
    assert scope["extensions"]["tls"]["tls_version"] == 0x0304


# Requests


def test_many_streams_at_once(client):
    ids = [client.begin(f"/numbers?n=20&pause=0.001&{number}") for number in range(100)]
    for stream_id in ids:
        stream = client.finish(stream_id)
        assert (stream.status, stream.body) == (200, b"".join(b"%d\n" % number for number in range(20)))
    assert client.get("/").body == b"hello"


def test_head_has_no_body(client):
    stream = client.get("/", method="HEAD")
    assert (stream.status, stream.body, stream.is_ended) == (200, b"", True)
    assert dict(stream.headers)[b"content-length"] == b"5"


def test_headers_that_belong_to_http_1_are_not_sent(extensions):
    with H2Client(extensions.port) as client:
        stream = client.get("/odd-headers")
        assert stream.status == 204
        names = [name for name, _ in stream.headers]
        assert names == [b":status", b"x-odd", b"date", b"server"]


def test_an_error_before_the_response_is_a_500_and_in_the_middle_a_reset(client):
    assert client.get("/fail").status == 500
    stream = client.get("/fail-later")
    assert (stream.status, stream.body, stream.reset) == (200, b"some", ErrorCodes.INTERNAL_ERROR)
    assert client.get("/").body == b"hello"


def test_what_a_client_may_not_ask_is_its_stream_s_affair(client):
    for path, method, headers, status in (
        ("no-slash", "GET", (), 400),
        ("/with#fragment", "GET", (), 400),
        ("/" + "a" * 20_000, "GET", (), 414),
        ("/", "GET", [(b"x%d" % number, b"") for number in range(200)], 431),
        ("/", "GET", ((b"expect", b"miracles"),), 417),
        ("/", "G T", (), 400),
    ):
        stream = client.get(path, method=method, headers=headers)
        assert stream.status == status, path[:20]
    assert client.get("/").body == b"hello"


def test_the_body_is_asked_for_when_the_application_wants_it(client):
    expects = ((b"expect", b"100-continue"),)
    stream_id = client.begin("/upload", method="POST", headers=expects, ends=False)
    stream = client.streams[stream_id]
    client.read_until(lambda: stream.interim)
    assert dict(stream.interim[0])[b":status"] == b"100"
    client.send(stream_id, b"abc", ends=True)
    assert json.loads(client.finish(stream_id).body)["bytes"] == 3
    # An application that does not read the body never asks for it.
    stream = client.finish(client.begin("/", method="POST", headers=expects, ends=False))
    assert (stream.status, stream.interim, stream.body) == (200, [], b"hello")


def test_an_answer_before_the_end_of_the_body_stops_the_client(client):
    stream_id = client.begin("/", method="POST", ends=False)
    client.send(stream_id, bytes(10_000))
    stream = client.finish(stream_id)
    assert (stream.status, stream.body) == (200, b"hello")
    client.read_until(lambda: stream.reset is not None)
    assert stream.reset == ErrorCodes.NO_ERROR


def test_trailers_of_the_client_end_its_body(client):
    stream_id = client.begin("/upload", method="POST", ends=False)
    client.send(stream_id, b"abc")
    client.h2.send_headers(stream_id, [(b"x-sum", b"1")], end_stream=True)
    client.flush()
    assert json.loads(client.finish(stream_id).body)["bytes"] == 3


def test_a_client_that_resets_is_a_disconnect(served, client):
    stream_id = client.begin("/hang?reset", method="POST")
    served.wait_for(r"hang\?reset has begun")
    client.h2.reset_stream(stream_id, ErrorCodes.CANCEL)
    client.flush()
    served.wait_for(r"hang\?reset is over", timeout_s=60)
    assert client.get("/").body == b"hello"


def test_a_client_that_goes_away_is_a_disconnect_for_each_stream(served):
    with H2Client(served.port) as client:
        for number in range(3):
            client.begin(f"/hang?gone{number}", method="POST")
            served.wait_for(rf"hang\?gone{number} has begun")
    for number in range(3):
        served.wait_for(rf"hang\?gone{number} is over", timeout_s=60)


def test_a_goaway_of_the_client_lets_its_streams_finish(client):
    stream_id = client.begin("/numbers?n=5&pause=0.1")
    # A frame right behind, as the acknowledgement of our settings may be, is read together with it.
    client.socket.sendall(GoAwayFrame(0).serialize() + PingFrame(0, b"12345678").serialize())
    assert client.finish(stream_id).body == b"0\n1\n2\n3\n4\n"
    client.wait_closed()


# Extensions of ASGI


def test_early_hints_and_trailers(extensions, tmp_path):
    with H2Client(extensions.port) as client:
        stream = client.get("/hint-behind")
        ((status, link, _),) = stream.interim
        assert (status, link) == ((b":status", b"103"), (b"link", b"</a.css>; rel=preload"))
        assert (stream.status, stream.body) == (200, b"hinted")
        stream = client.get("/trailers")
        assert (stream.body, stream.trailers) == (b"body", [(b"x-sum", b"1"), (b"x-time", b"2")])
        stream = client.get("/trailers?forget")
        assert (stream.body, stream.trailers, stream.is_ended) == (b"body", None, True)
        path = tmp_path / "file"
        path.write_bytes(CHUNK * 20)
        ids = [client.begin(f"/file?{path}") for _ in range(10)]
        assert all(client.finish(stream_id).body == CHUNK * 20 for stream_id in ids)


# Flow control


def test_large_bodies_both_ways(served):
    count = 100 * MIB // len(CHUNK)
    with Growth(served) as growth, H2Client(served.port) as client:
        stream_id = client.begin("/upload", method="POST", ends=False)
        for _ in range(count):
            client.send(stream_id, CHUNK)
        client.send(stream_id, b"", ends=True)
        assert json.loads(client.finish(stream_id).body)["sha256"] == digest_of_chunks(count)
    growth.check()
    command = ["curl", "-sS", "--http2-prior-knowledge", "-o", "/dev/null", "-w", "%{size_download}"]
    with Growth(served) as growth:
        target = f"{served.url}/download?bytes={200 * MIB}"
        answer = subprocess.run([*command, target], capture_output=True, timeout=120, check=True)
    assert int(answer.stdout) == 200 * MIB
    growth.check()


def test_an_application_that_does_not_receive_stops_its_stream_and_no_other(served):
    with Growth(served) as growth, H2Client(served.port) as client:
        stream_id = client.begin("/deaf", method="POST", ends=False)
        client.timeout_s = 1.5
        with pytest.raises(TimeoutError) as stopped:
            client.send(stream_id, bytes(64 * MIB))
        client.timeout_s = 60
        assert stopped.value.args[0] <= (256 + 128 + 64) * 1024
        assert client.get("/").body == b"hello"
        other = client.begin("/upload", method="POST", ends=False)
        client.send(other, bytes(4 * MIB), ends=True)
        assert json.loads(client.finish(other).body)["bytes"] == 4 * MIB
    growth.check()


def test_a_client_that_grants_nothing_costs_a_window_a_stream_and_its_neighbours_nothing(served):
    with Growth(served) as growth, H2Client(served.port, grants=False) as client:
        # The connection's window for all of them, each stream's for some: nothing moves any more.
        stalled = [client.begin(f"/download?bytes={10 * MIB}") for _ in range(50)]
        client.read_until(lambda: sum(len(client.streams[i].body) for i in stalled) == 65535)
        assert httpx.get(served.url, timeout=60).text == "hello"
        # One of them is let go on; what the connection has is its alone.
        client.h2.increment_flow_control_window(15 * MIB)
        client.h2.increment_flow_control_window(11 * MIB, stalled[7])
        client.flush()
        client.read_until(lambda: client.streams[stalled[7]].is_ended)
        assert len(client.streams[stalled[7]].body) == 10 * MIB
        # The others used what their own windows let through.
        assert all(len(client.streams[i].body) <= 65535 for i in stalled if i != stalled[7])
    growth.check()


def test_streams_take_turns(served):
    with H2Client(served.port) as client:
        large = client.begin(f"/download?bytes={50 * MIB}")
        client.read_until(lambda: len(client.streams[large].body) > MIB)
        small = client.begin("/")
        assert client.finish(small).body == b"hello"
        assert not client.streams[large].is_ended


# The end


def test_stop_says_goaway_and_lets_streams_finish():
    with Served(APP) as running, H2Client(running.port) as client, H2Client(running.port) as idle:
        assert idle.get("/").body == b"hello"
        expects = ((b"expect", b"100-continue"),)
        stream_id = client.begin("/upload", method="POST", headers=expects, ends=False)
        client.read_until(lambda: client.streams[stream_id].interim)
        os.kill(running.pids("interface server")[0], signal.SIGTERM)
        idle.read_until(lambda: idle.goaway is not None)
        assert idle.goaway.error_code == ErrorCodes.NO_ERROR
        idle.wait_closed()
        client.send(stream_id, b"body", ends=True)
        frames = []
        while True:  # h2 as a client takes a GOAWAY for the end, so frames are read here
            data = client.socket.recv(65536)
            if not data:
                break
            frames.append(data)
        received = b"".join(frames)
        assert b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + stream_id.to_bytes(4, "big") + bytes(4) in received
        assert b'"bytes": 4' in received


def test_an_idle_connection_is_closed():
    # The second is what a client has for its first request, the one that says one as well.
    with Served(APP, "--timeout-keep-alive", "1", "--timeout-headers", "6") as running:
        for request in (True, False):
            with H2Client(running.port) as client:
                if request:
                    assert client.get("/").body == b"hello"
                client.wait_closed()
                assert client.goaway.error_code == ErrorCodes.NO_ERROR


def test_a_killed_worker_is_a_502_for_each_stream():
    with Served(APP) as running, H2Client(running.port) as client:
        ids = [client.begin(f"/hang?{number}", method="POST") for number in range(3)]
        for number in range(3):
            running.wait_for(rf"hang\?{number} has begun")
        os.kill(running.pids("worker")[0], signal.SIGKILL)
        assert [client.finish(stream_id).status for stream_id in ids] == [502] * 3


# Abuse


class Raw:
    """A connection on which frames are written by hand."""

    def __init__(self, served):
        self.socket = socket.create_connection(("127.0.0.1", served.port))
        self.socket.settimeout(20)
        self.encoder = Encoder()
        self.socket.sendall(PREFACE + SettingsFrame(0).serialize())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def head(self, stream_id, *, ends=True, extra=()):
        fields = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x"), *extra]
        flags = ["END_HEADERS", *(["END_STREAM"] if ends else [])]
        return HeadersFrame(stream_id, self.encoder.encode(fields), flags=flags).serialize()

    def send(self, data):
        # The server may have ended the connection already, which is what is tested.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            self.socket.sendall(data)

    def read_goaway(self):
        """Read to the end; return the error code of the GOAWAY."""
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := self.socket.recv(65536):
                received += data
        code = None
        while received:
            frame, length = Frame.parse_frame_header(memoryview(received[:9]))
            frame.parse_body(memoryview(received[9 : 9 + length]))
            if isinstance(frame, GoAwayFrame):
                code = frame.error_code
            received = received[9 + length :]
        return code


@pytest.fixture
def raw(served):
    with Raw(served) as connected:
        yield connected
    assert httpx.get(served.url, timeout=60).text == "hello"


def test_rapid_reset(served, raw):
    """CVE-2023-44487."""
    for number in range(1, 1200, 2):
        raw.send(raw.head(number) + RstStreamFrame(number, error_code=8).serialize())
    assert raw.read_goaway() == ErrorCodes.ENHANCE_YOUR_CALM
    served.wait_for("too many resets or control frames")


@pytest.mark.parametrize(
    "frame",
    [
        PingFrame(0, b"12345678").serialize(),
        SettingsFrame(0, {4: 65536}).serialize(),
        b"\x00\x00\x05\x02\x00\x00\x00\x00\x07\x00\x00\x00\x00\x10",  # PRIORITY
        b"\x00\x00\x00\xfe\x00\x00\x00\x00\x00",  # of a type nobody knows
    ],
    ids=["ping", "settings", "priority", "unknown"],
)
def test_floods_of_control_frames(raw, frame):
    raw.send(frame * 3000)
    assert raw.read_goaway() == ErrorCodes.ENHANCE_YOUR_CALM


def test_a_flood_of_data_without_data(raw):
    raw.send(raw.head(1, ends=False) + DataFrame(1).serialize() * 3000)
    assert raw.read_goaway() == ErrorCodes.ENHANCE_YOUR_CALM


def test_a_flood_of_continuation(raw):
    raw.send(HeadersFrame(1, b"", flags=["END_STREAM"]).serialize())
    raw.send(ContinuationFrame(1, b"").serialize() * 1000)
    assert raw.read_goaway() in (ErrorCodes.PROTOCOL_ERROR, ErrorCodes.ENHANCE_YOUR_CALM)


def test_a_header_list_that_is_too_large(raw):
    # Small on the wire: one large field, then references to it.
    fields = [("x-large", "a" * 4000)] * 400
    raw.send(raw.head(1, extra=fields))
    assert raw.read_goaway() == ErrorCodes.ENHANCE_YOUR_CALM


def test_a_header_list_that_is_somewhat_too_large_is_its_stream_s_affair(client):
    assert client.get("/", headers=[(b"x-large", b"a" * 4000)] * 40).status == 431
    assert client.get("/").body == b"hello"


def test_more_streams_than_are_allowed(raw):
    # At once: of those that come one by one, a server that is faster than the client has answered the ones before.
    raw.send(b"".join(raw.head(number, ends=False) for number in range(1, 2000, 2)))
    assert raw.read_goaway() == ErrorCodes.ENHANCE_YOUR_CALM


def test_a_fault_of_one_stream_costs_no_other(client):
    neighbour = client.begin("/numbers?n=20&pause=0.05")
    client.read_until(lambda: client.streams[neighbour].body)
    for headers in ([(b"te", b"gzip")], [(b"content-length", b"x")], [(b":late", b"")]):
        stream = client.finish(client.begin("/", headers=headers))
        assert stream.reset == ErrorCodes.PROTOCOL_ERROR, headers
    for size in (2, 4):
        stream_id = client.begin("/upload", method="POST", headers=[(b"content-length", b"3")], ends=False)
        client.send(stream_id, bytes(size), ends=True)
        assert client.finish(stream_id).reset == ErrorCodes.PROTOCOL_ERROR
    assert client.finish(neighbour).body.endswith(b"19\n")


def test_a_client_that_reads_no_answers_is_dropped_or_stopped(served):
    with Growth(served) as growth, Raw(served) as raw:
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.socket.settimeout(3)
        with contextlib.suppress(TimeoutError):
            for _ in range(200):
                raw.send(PingFrame(0, b"12345678").serialize() * 1000)
    growth.check()


def test_what_is_no_http_2_behind_the_preface(served):
    for garbage in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\xff" * 100):
        with socket.create_connection(("127.0.0.1", served.port)) as sock:
            sock.settimeout(20)
            sock.sendall(PREFACE + garbage)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(65536):
                    pass


def test_a_frame_that_is_too_long_is_not_waited_for(raw):
    raw.send(raw.head(1, ends=False) + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(20_000))
    assert raw.read_goaway() == ErrorCodes.FRAME_SIZE_ERROR


def test_the_preface_in_pieces_and_what_only_begins_like_it(served):
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.settimeout(20)
        for byte in PREFACE:
            sock.sendall(bytes((byte,)))
        sock.sendall(SettingsFrame(0).serialize())
        assert sock.recv(9)[3] == 4  # SETTINGS
    for request in (b"PRI * HTTP/1.1\r\nHost: x\r\n\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", served.port)) as sock:
            sock.settimeout(20)
            sock.sendall(request[:2])
            sock.sendall(request[2:])
            assert sock.recv(9) == b"HTTP/1.1 "


# WebSockets (RFC 8441)


def test_a_websocket_beside_requests(served, client):
    client.read_until(lambda: client.h2.remote_settings.enable_connect_protocol == 1)
    sockets = [H2WebSocket(client, f"/echo?{number}") for number in range(3)]
    assert [socket_.stream.status for socket_ in sockets] == [200] * 3
    for size in (0, 1, 125, 126, 65536, 3_000_000):
        for socket_ in sockets:
            message = os.urandom(size)
            socket_.send(message)
            assert socket_.receive() == (2, message)
    assert client.get("/").body == b"hello"
    sockets[0].send("ü".encode(), opcode=1)
    assert sockets[0].receive() == (1, "ü".encode())
    sockets[0].send(b"ping", opcode=9)
    assert sockets[0].receive() == (10, b"ping")
    sockets[0].send(b"\x0f\xa1bye", opcode=8)
    assert sockets[0].receive() == (8, b"\x0f\xa1")
    assert client.finish(sockets[0].stream_id).is_ended
    served.wait_for(r'"WebSocket /echo\?0" \[closed 4001\]')
    # Without a Close: a reset, the end of the stream, the end of the socket.
    client.h2.reset_stream(sockets[1].stream_id, ErrorCodes.CANCEL)
    client.h2.end_stream(sockets[2].stream_id)
    client.flush()
    served.wait_for(r'"WebSocket /echo\?1" \[closed 1006\]')
    served.wait_for(r'"WebSocket /echo\?2" \[closed 1006\]')
    assert client.finish(sockets[2].stream_id).is_over
    H2WebSocket(client, "/echo?3")
    client.socket.close()
    served.wait_for(r'"WebSocket /echo\?3" \[closed 1006\]')


def test_a_websocket_client_that_ends_its_side_behind_its_close(served, client):
    socket_ = H2WebSocket(client, "/echo?ended")
    messages = b"".join(socket_.build_frame(b"%d" % number) for number in range(100))
    close = socket_.build_frame(b"\x03\xe8", opcode=8)
    client.h2.send_data(socket_.stream_id, messages + close, end_stream=True)
    client.flush()
    served.wait_for(r'"WebSocket /echo\?ended" \[closed 1000\]')
    assert client.finish(socket_.stream_id).is_ended
    assert client.get("/").body == b"hello"


def test_a_websocket_that_its_application_closes(served, client):
    socket_ = H2WebSocket(client, "/fail?over-http2")
    opcode, payload = socket_.receive()
    assert (opcode, payload[:2]) == (8, (1011).to_bytes(2, "big"))
    socket_.send(payload, opcode=8)
    assert client.finish(socket_.stream_id).is_ended
    assert client.get("/").body == b"hello"


def test_a_websocket_client_that_breaks_the_protocol(client):
    socket_ = H2WebSocket(client, "/echo")
    client.send(socket_.stream_id, b"\xff\xff\xff\xff")
    assert socket_.receive()[1][:2] == (1002).to_bytes(2, "big")
    assert client.finish(socket_.stream_id).is_over
    assert client.get("/").body == b"hello"


def test_websocket_handshakes_over_http_2(extensions):
    with H2Client(extensions.port) as client:
        socket_ = H2WebSocket(client, "/echo", headers=[(b"sec-websocket-protocol", b"chat, other")])
        assert dict(socket_.stream.headers)[b"sec-websocket-protocol"] == b"chat"
        for path, status, body in (
            ("/refuse", 401, b"who are you?"),
            ("/refuse-nothing", 500, b"Internal Server Error\n"),
            ("/close", 403, b"Forbidden\n"),
        ):
            refused = H2WebSocket(client, path)
            client.h2.end_stream(refused.stream_id)
            stream = client.finish(refused.stream_id)
            assert (stream.status, stream.body) == (status, body)
        faulty = H2WebSocket(client, "/echo", headers=[(b"sec-websocket-version", b"8")])
        assert client.finish(faulty.stream_id).status == 400


def test_a_websocket_application_that_does_not_receive_stops_its_client(served):
    with Growth(served) as growth, H2Client(served.port, grants=False) as client:
        socket_ = H2WebSocket(client, "/echo")
        client.timeout_s = 1.5
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 64 * MIB:
                socket_.send(bytes(60_000))  # the echoes are not read: then nobody receives any more
                sent += 60_000
        assert sent < 4 * MIB
    growth.check()
