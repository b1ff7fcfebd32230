"""Clients that no server deserves, each beside neighbours that must not notice.

Each test says with which status, close code or silence a rude client ends, and by when; ``neighbours`` asserts that
requests and a WebSocket beside it were answered all the time.
"""

import contextlib
import os
import socket
import ssl
import struct
import threading
import time

import httpx
import pytest
from websockets.sync.client import connect

from tests.certificates import Authority
from tests.system.clients import DeafClient
from tests.system.h2_client import H2Client
from tests.system.processes import Served, wait_until
from tests.system.test_transfers import Growth

APP = "tests.system.applications:application"
MIB = 1024**2
# Short, so that the tests are; a tick of the timers (0.5 s) and a busy machine come on top.
HEADERS_S, BODY_S, WRITE_S, SLACK_S = 2, 2, 4, 15
FLAGS = (
    *("--timeout-headers", str(HEADERS_S), "--timeout-body", str(BODY_S), "--timeout-write", str(WRITE_S)),
    # These two are longer than a machine stalls: the neighbours must not be taken for rude.
    *("--timeout-keep-alive", "10", "--ws-ping-interval", "1", "--ws-ping-timeout", "10", "--no-access-log"),
)
# The longest a neighbour may wait while somebody is rude, on a machine that runs other tests beside; once longer,
# for then the machine may have stood still.
NEIGHBOUR_S, NEIGHBOUR_S_MAX = 1.5, 10
HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
UPGRADE = (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
)


@pytest.fixture(scope="module")
def served():
    with Served(APP, *FLAGS) as running:
        httpx.get(running.url, timeout=60)
        yield running


@pytest.fixture
def neighbours(served):
    """Somebody polite, all the time; memory must not grow either."""
    with Neighbours(served) as watching, Growth(served) as growth:
        yield watching
    growth.check()
    assert watching.count > 3
    *waits_s, longest_s = sorted(watching.waits_s)
    assert max(waits_s) < NEIGHBOUR_S
    assert longest_s < NEIGHBOUR_S_MAX


class Neighbours:
    def __init__(self, served):
        self.served = served
        self.count = 0
        self.waits_s = []
        self._stop = threading.Event()
        self._failure = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        wait_until(lambda: self.count or self._failure, 30, "a neighbour is served")
        return self

    def __exit__(self, *_):
        self.ask(3)
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def ask(self, count):
        """Wait until so many more were served."""
        target = self.count + count
        wait_until(lambda: self.count >= target or self._failure, 90, "neighbours are served")

    def _run(self):
        try:
            with (
                httpx.Client(base_url=self.served.url, timeout=60) as http,
                connect(f"{self.served.ws_url}/echo") as ws,
            ):
                while not self._stop.wait(0.02):
                    begun = time.monotonic()
                    assert http.get("/").text == "hello"
                    between = time.monotonic()
                    ws.send("hello")
                    assert ws.recv(timeout=60) == "hello"
                    self.waits_s += [between - begun, time.monotonic() - between]
                    self.count += 1
        except Exception as error:
            self._failure = error


def open_socket(served, data=b"", *, receive_bytes=None):
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(20)
    client.connect(("127.0.0.1", served.port))
    client.sendall(data)
    return client


def open_websocket(served):
    client = open_socket(served, b"GET /echo HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n")
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    assert head.startswith(b"HTTP/1.1 101 ")
    return client


def read_to_end(client, timeout_s=30):
    """Everything until the server closes or resets."""
    received = b""
    client.settimeout(timeout_s)
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(65536):
            received += data
    return received


def read_until(client, end):
    """Everything up to ``end``, or until the server closes or resets."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while end not in received and (data := client.recv(65536)):
            received += data
    return received


def drip(client, data, pause_s=0.1):
    """Send byte by byte until the server has had enough; return how long that took, and what it said."""
    begun = time.monotonic()
    client.settimeout(pause_s)
    received = b""
    for byte in data:
        try:
            client.sendall(bytes((byte,)))
            while piece := client.recv(65536):
                received += piece
            break
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            break
    else:
        raise AssertionError("everything was taken")
    return time.monotonic() - begun, received


def sockets_of(served):
    """How many sockets its interface server has open."""
    (pid,) = served.pids("interface server")
    found = 0
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(entry.path).startswith("socket:")
    return found


# Slow


def test_a_head_that_drips(served, neighbours):
    for data in (HEAD, HEAD + UPGRADE):
        with open_socket(served) as client:
            took_s, answer = drip(client, data + b"X-Slow: " + b"a" * 1000)
        assert took_s < HEADERS_S + SLACK_S
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_second_head_that_drips(served, neighbours):
    with open_socket(served, HEAD + b"\r\n") as client:
        assert read_until(client, b"hello").startswith(b"HTTP/1.1 200 ")
        took_s, answer = drip(client, HEAD + b"X-Slow: " + b"a" * 1000)
    assert took_s < HEADERS_S + SLACK_S
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_drips(served, neighbours, chunked):
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 100000"
    with open_socket(served, b"POST /upload HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n") as client:
        took_s, answer = drip(client, b"1\r\nx\r\n" * 1000 if chunked else b"x" * 1000, pause_s=0.2)
    assert took_s < 2 * BODY_S + SLACK_S
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_slow_upload_that_keeps_the_pace_is_served(served, neighbours):
    while True:
        longest_s, last = 0.0, time.monotonic()
        with open_socket(served, b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n") as client:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                for _ in range(20):
                    client.sendall(b"x" * 50)
                    longest_s, last = max(longest_s, time.monotonic() - last), time.monotonic()
                    time.sleep(BODY_S / 10)  # the client's pace, not a wait for something
            answer = read_until(client, b"}")
        if b'"bytes": 1000' in answer:
            return
        # The machine stalled: the client did not keep the pace, or the server did not see that it did.
        neighbours.ask(2)
        assert max(longest_s, *neighbours.waits_s) > BODY_S / 3, answer


def test_a_body_over_http_2_that_drips(served, neighbours):
    with H2Client(served.port, timeout_s=0.2) as client:
        stream_id = client.begin("/upload", method="POST", ends=False)
        stream = client.streams[stream_id]
        begun = time.monotonic()
        while stream.status is None:
            assert time.monotonic() - begun < 2 * BODY_S + SLACK_S
            client.send(stream_id, b"x")
            with contextlib.suppress(TimeoutError):
                while stream.status is None:
                    client.read_once()
        assert stream.status == 408


def test_a_thousand_connections_that_say_nothing(served, neighbours):
    before = sockets_of(served)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(open_socket(served)) for _ in range(1000)]
        for client in clients[::100]:
            assert read_to_end(client, HEADERS_S + SLACK_S) == b""
        wait_until(lambda: sockets_of(served) <= before + 10, HEADERS_S + SLACK_S, "all are closed")


def test_a_thousand_that_stop_in_the_middle_of_their_heads(served, neighbours):
    before = sockets_of(served)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(open_socket(served, HEAD)) for _ in range(1000)]
        for client in clients[::100]:
            assert read_to_end(client, HEADERS_S + SLACK_S).startswith(b"HTTP/1.1 408 ")
        stack.close()
        wait_until(lambda: sockets_of(served) <= before + 10, HEADERS_S + SLACK_S, "all are closed")


# Clients that read nothing


def test_a_download_that_nobody_reads(served, neighbours):
    """A small window at the client; its server notices that nothing moves, and drops it."""
    with open_socket(
        served, b"GET /download?bytes=100000000 HTTP/1.1\r\nHost: x\r\n\r\n", receive_bytes=4096
    ) as client:
        wait_for_reset(client, 2 * WRITE_S + SLACK_S)


def test_a_download_that_is_read_slowly_lives(served, neighbours):
    """Slower than the kernel's buffers empty within the write timeout."""
    with open_socket(
        served, b"GET /download?bytes=100000000 HTTP/1.1\r\nHost: x\r\n\r\n", receive_bytes=4096
    ) as client:
        until = time.monotonic() + 3 * WRITE_S
        while time.monotonic() < until:
            assert client.recv(8192)
            time.sleep(0.25)  # the client's pace, not a wait for something


def test_a_quiet_stream_lives(served, neighbours):
    with open_socket(served, b"GET /sse?group=quiet HTTP/1.1\r\nHost: x\r\n\r\n") as client:
        received = b""
        while b": ready" not in received:
            received += client.recv(65536)
        time.sleep(WRITE_S + 1)  # nothing is to be sent: that is what is tested
        group_send = b"POST /publish?group=quiet HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
        with open_socket(served, group_send) as other:
            assert other.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):  # it is open still, and got no end
            client.recv(65536)


def test_a_websocket_that_sends_and_never_reads(served, neighbours):
    """Both directions are full, so its pings wait as well."""
    frame = b"\x82\xfe\xff\xff\0\0\0\0" + bytes(0xFFFF)
    with DeafClient(served.port, "/echo") as client:
        client.socket.settimeout(1)
        # On a machine that stalls it may be dropped before it has waited so long.
        with contextlib.suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
            while True:
                client.socket.sendall(frame)
        wait_for_reset(client.socket, 2 * WRITE_S + SLACK_S)


def test_a_websocket_that_is_sent_a_flood_and_never_reads(served, neighbours):
    with DeafClient(served.port, "/flood?n=20000&bytes=16384") as client:
        wait_for_reset(client.socket, 2 * WRITE_S + SLACK_S)


def test_http_2_responses_that_nobody_reads(served, neighbours):
    with H2Client(served.port) as client:
        client.h2.increment_flow_control_window(2**30)
        for _ in range(5):
            stream_id = client.begin("/download?bytes=100000000")
            client.h2.increment_flow_control_window(2**30, stream_id)
        client.flush()
        wait_for_reset(client.socket, 2 * WRITE_S + SLACK_S)


def test_pipelined_requests_whose_answers_nobody_reads(served, neighbours):
    request = b"GET /download?bytes=1000000 HTTP/1.1\r\nHost: x\r\n\r\n"
    with open_socket(served, receive_bytes=4096) as client:
        client.settimeout(2)
        sent = 0
        with contextlib.suppress(TimeoutError, ConnectionResetError, BrokenPipeError):  # as above
            while sent < 64 * MIB:
                sent += client.send(request * 1000)
        assert sent < 16 * MIB
        wait_for_reset(client, 2 * WRITE_S + SLACK_S)


def wait_for_reset(client, timeout_s):
    """Wait, without reading, until the kernel says that the connection is over."""

    def is_over():
        info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return info[0] in (7, 8)  # TCP_CLOSE, TCP_CLOSE_WAIT

    wait_until(is_over, timeout_s, "the server drops the connection")


# Clients that vanish


def vanish(client):
    """Close without a FIN or a RST reaching the server: as a cable that is pulled."""
    client.setsockopt(socket.IPPROTO_TCP, 19, 1)  # TCP_REPAIR: needs CAP_NET_ADMIN
    client.close()


def test_clients_that_vanish_without_a_word():
    with Served(APP, *FLAGS) as served:
        clients = [
            open_socket(served, b"GET /hang?get HTTP/1.1\r\nHost: x\r\n\r\n"),
            open_socket(served, b"GET /download?bytes=100000000 HTTP/1.1\r\nHost: x\r\n\r\n", receive_bytes=4096),
            DeafClient(served.port, "/echo").socket,
        ]
        served.wait_for(r"hang\?get has begun")
        before = sockets_of(served)
        try:
            for client in clients[1:]:
                vanish(client)
        except PermissionError:
            pytest.skip("needs CAP_NET_ADMIN")
        finally:
            for client in clients:
                client.close()
        # The download by its write timeout, the WebSocket by its ping. (A request that waits in silence is noticed
        # with its next byte, or by TCP's keep-alive: here its FIN does it.)
        served.wait_for(r"hang\?get is over", timeout_s=60)
        wait_until(lambda: sockets_of(served) <= before - 3, 2 * WRITE_S + SLACK_S, "all are gone")


def test_half_closed_sockets(served, neighbours):
    with open_socket(served, HEAD + b"\r\n") as client:
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client).startswith(b"HTTP/1.1 200 ")
    # Half a head, half a body: there will be no more.
    for data in (HEAD, b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc"):
        with open_socket(served, data) as client:
            client.shutdown(socket.SHUT_WR)
            read_to_end(client, SLACK_S)
    with open_socket(served, b"GET /echo HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n") as client:
        assert client.recv(65536).startswith(b"HTTP/1.1 101 ")
        client.shutdown(socket.SHUT_WR)
        read_to_end(client, SLACK_S)


def test_resets_in_every_state(served, neighbours):
    before = sockets_of(served)
    for data in (
        b"",
        HEAD,
        HEAD + b"\r\n",
        b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc",
        b"GET /download?bytes=10000000 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n\x81\x85",
    ):
        for _ in range(20):
            client = open_socket(served, data)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
    wait_until(lambda: sockets_of(served) <= before + 5, SLACK_S, "all are gone")


# Floods


def blast(client, data, count):
    """Send as long as the server takes it, reading what comes; return what came."""
    received = bytearray()
    client.settimeout(20)
    reader = threading.Thread(target=lambda: received.extend(read_to_end(client)))
    reader.start()
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        for _ in range(count):
            client.sendall(data)
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_WR)
    reader.join(60)
    assert not reader.is_alive()
    return bytes(received)


@pytest.mark.parametrize(
    "frame",
    [
        b"\x89\x80\0\0\0\0",  # ping
        b"\x8a\x80\0\0\0\0",  # pong nobody asked for
        b"\x82\x81\0\0\0\0x",  # message of a byte
        b"\x82\x80\0\0\0\0",  # … of none
        b"\x02\x80\0\0\0\0" + b"\x00\x80\0\0\0\0" * 50 + b"\x80\x80\0\0\0\0",  # many fragments without a byte
        b"\x02\x81\0\0\0\0x" + b"\x00\x81\0\0\0\0x" * 50 + b"\x80\x80\0\0\0\0",  # … with one
    ],
    ids=["ping", "pong", "tiny", "empty", "empty-fragments", "fragments"],
)
def test_floods_of_websocket_frames(served, neighbours, frame):
    with open_websocket(served) as client:
        blast(client, frame * (65536 // len(frame)), 10)


def test_a_message_of_fragments_that_never_ends(served, neighbours):
    with open_websocket(served) as client:
        fragment = b"\x00\xfe\xff\xff\0\0\0\0" + bytes(0xFFFF)
        answer = blast(client, b"\x02" + fragment[1:] + fragment * 300, 1)
    assert (1009).to_bytes(2, "big") in answer


def test_a_flood_of_pipelined_requests(served, neighbours):
    with open_socket(served) as client:
        answers = blast(client, (HEAD + b"\r\n") * 500, 4)
    assert answers.count(b"HTTP/1.1 200 ") == 2000


def test_clients_that_leave_at_once(served, neighbours):
    for _ in range(3000):
        open_socket(served, HEAD + b"\r\n").close()


def test_a_flood_of_chunks(served, neighbours):
    with open_socket(served, b"POST /upload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n") as client:
        answer = blast(client, b"1\r\nx\r\n" * 10_000 + b"0\r\n\r\n", 1)
    assert b'"bytes": 10000' in answer


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"a" * 100_000, b"414"),
        (HEAD + b"X: " + b"a" * 200_000, b"431"),
        (HEAD + b"".join(b"X%d: y\r\n" % number for number in range(500)), b"431"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1;" + b"e" * 100_000, b"400"),
        (b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n", b"400"),
        (b"\x00" * 100_000, b"400"),
        (b"\r\n" * 50_000, b"400"),
    ],
    ids=["target", "header", "headers", "extensions", "length", "garbage", "empty lines"],
)
def test_what_is_too_large(served, neighbours, data, status):
    with open_socket(served) as client:
        assert blast(client, data, 1).startswith(b"HTTP/1.1 " + status)


# TLS


@pytest.fixture(scope="module")
def tls_served(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("rude"))
    authority.issue("server")
    directory = authority.directory
    flags = ("--ssl-certfile", str(directory / "server.pem"), "--ssl-keyfile", str(directory / "server.key"))
    with Served(APP, *FLAGS, *flags) as running:
        running.authority = authority
        yield running


def client_hello():
    """The first bytes of a handshake."""
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


def test_slow_tls_handshakes(tls_served):
    before = sockets_of(tls_served)
    hello = client_hello()
    with contextlib.ExitStack() as stack:
        for size in (0, 1, 100, len(hello)):
            for _ in range(20):
                stack.enter_context(open_socket(tls_served, hello[:size]))
        dripping = stack.enter_context(open_socket(tls_served))
        took_s, _ = drip(dripping, hello)
        assert took_s < HEADERS_S + SLACK_S
        context = ssl.create_default_context(cafile=tls_served.authority.path)
        assert httpx.get(f"https://localhost:{tls_served.port}", verify=context, timeout=60).text == "hello"
        wait_until(lambda: sockets_of(tls_served) <= before + 1, HEADERS_S + SLACK_S, "all are closed")


def test_a_tls_client_that_reads_nothing(tls_served):
    context = ssl.create_default_context(cafile=tls_served.authority.path)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", tls_served.port))
    with context.wrap_socket(raw, server_hostname="localhost") as client:
        client.sendall(b"GET /download?bytes=100000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for_reset(client, 2 * WRITE_S + SLACK_S)
