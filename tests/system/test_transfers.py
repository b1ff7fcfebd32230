"""Large bodies, slow readers: everything arrives, and nobody's memory grows with it."""

import contextlib
import hashlib
import os
import socket
import threading
import time

import httpx
import pytest
import redis
from websockets.sync.client import connect

from tests.system.applications import CHUNK
from tests.system.clients import DeafClient
from tests.system.processes import Served, memory_bytes

APP = "tests.system.applications:application"
GIB = 1024**3
MIB = 1024**2


@pytest.fixture(scope="module")
def served():
    with Served(APP, "--workers", "2", "--no-access-log") as running:
        httpx.get(running.url, timeout=60)  # what is loaded at the first request does not count as growth
        yield running


class Growth:
    """Watches how far the processes of a command grow, and what the broker holds."""

    def __init__(self, served):
        self.pids = [*served.pids("worker"), *served.pids("interface server")]
        self.before = {pid: memory_bytes(pid) for pid in self.pids}
        self.most = dict(self.before)
        self.broker_most = 0
        self._redis = redis.Redis.from_url(served.redis_url)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._redis.close()

    def _watch(self):
        while not self._stop.wait(0.05):
            for pid in self.pids:
                self.most[pid] = max(self.most[pid], memory_bytes(pid))
            self.broker_most = max(self.broker_most, self._redis.info("memory")["used_memory"])

    def check(self):
        for pid in self.pids:
            growth = self.most[pid] - self.before[pid]
            assert growth < 64 * MIB, f"process {pid} grew by {growth / MIB:.0f} MiB"
        assert self.broker_most < 64 * MIB, f"the broker held {self.broker_most / MIB:.0f} MiB"


def digest_of_chunks(count):
    digest = hashlib.sha256()
    for _ in range(count):
        digest.update(CHUNK)
    return digest.hexdigest()


@pytest.mark.timeout(300)
def test_a_gibibyte_up(served):
    count = GIB // len(CHUNK)
    with Growth(served) as growth:
        answer = httpx.post(served.url + "/upload", content=(CHUNK for _ in range(count)), timeout=240)
    assert answer.json() == {"bytes": GIB, "sha256": digest_of_chunks(count)}
    growth.check()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("slow_s", [0, 10])
def test_a_gibibyte_down(served, slow_s):
    """At full speed, and to a client that reads 1 MB a second for the first ten seconds."""
    digest, size = hashlib.sha256(), 0
    with Growth(served) as growth, socket.create_connection(("127.0.0.1", served.port)) as client:
        client.settimeout(60)
        client.sendall(b"GET /download?bytes=%d HTTP/1.0\r\nHost: x\r\n\r\n" % GIB)
        data = b""
        while b"\r\n\r\n" not in data:
            data += client.recv(65536)
        body = data.partition(b"\r\n\r\n")[2]
        slow_until = time.monotonic() + slow_s
        while True:
            digest.update(body)
            size += len(body)
            if time.monotonic() < slow_until:
                time.sleep(0.1)  # the client's pace, not a wait for something
                body = client.recv(100_000)
            else:
                body = client.recv(MIB)
            if not body:
                break
    assert (size, digest.hexdigest()) == (GIB, digest_of_chunks(GIB // len(CHUNK)))
    growth.check()


def test_an_upload_reaches_the_application_while_it_is_sent(served):
    """The application answers before the body has ended, so the body cannot have been collected first."""
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.settimeout(20)
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nabc")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_websocket_application_that_does_not_receive_stops_the_client(served):
    """The client sends without reading: the echoes fill up, then send() waits, then nobody receives any more."""
    with Growth(served) as growth, DeafClient(served.port, "/echo") as client:
        sent = 0
        frame = b"\x82\xfe\xff\xff\0\0\0\0" + bytes(0xFFFF)
        client.socket.settimeout(3)
        with contextlib.suppress(TimeoutError):
            while sent < 256 * MIB:
                client.socket.sendall(frame)
                sent += len(frame)
        # The buffers of the kernel on four sockets, two windows, and what one read holds.
        assert sent < 64 * MIB
    growth.check()


def test_a_websocket_client_that_never_reads_costs_a_window(served):
    with Growth(served) as growth, DeafClient(served.port, "/flood?n=20000&bytes=16384"):
        with connect(f"{served.ws_url}/echo") as neighbour:
            slowest = 0.0
            for number in range(500):
                begun = time.monotonic()
                neighbour.send(str(number))
                assert neighbour.recv(timeout=60) == str(number)
                slowest = max(slowest, time.monotonic() - begun)
        assert slowest < 10.0
    growth.check()


def test_messages_of_all_sizes_come_back_whole(served):
    with connect(f"{served.ws_url}/echo", max_size=None, compression=None) as client:
        for size in (0, 1, 125, 126, 65535, 65536, 65537, 300_000, 5_000_000):
            message = os.urandom(size)
            client.send(message)
            assert client.recv(timeout=60) == message
            client.send("ü" * (size // 2))
            assert client.recv(timeout=60) == "ü" * (size // 2)


def test_a_broadcast_member_that_never_reads_is_closed_and_the_others_notice_nothing():
    with Served(APP, "--client-buffer", "262144") as served, contextlib.ExitStack() as stack:
        deaf = stack.enter_context(DeafClient(served.port, "/member?group=room"))
        url = f"{served.ws_url}/member?group=room"
        readers = [stack.enter_context(connect(url, max_size=None, compression=None)) for _ in range(3)]
        for reader in readers:
            assert reader.recv(timeout=60) == "joined"
        text = "x" * 50_000
        for number in range(400):  # 20 MB: beyond what the kernel holds for the deaf one
            readers[0].send(f"{number} {text}")
            for reader in readers:
                assert reader.recv(timeout=60) == f"{number} {text}"
        received = deaf.read_to_the_end(30)
        assert len(received) < 19_000_000, "it was sent everything, so it was not deaf"
        served.wait_for(r'"WebSocket /member\?group=room" \[closed 1013\]')
