"""The life of a worker process, on a real broker: ready, connections, signals, exit statuses."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgpack
import pytest

from channel_layer.frames import Frame, FrameKind, Outcome, build_grant
from channel_layer.leases import Lease, decode_lease
from channel_layer.openings import Opening, encode_opening
from channel_layer.process_layer import RedisProcessLayer
from tests.servers import BrokerServer, free_port
from tests.worker.support import FakeInterface, http_scope, make_opening, websocket_scope

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 30.0

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from worker.process import run
from worker.settings import WorkerSettings
sys.exit(run(WorkerSettings(application=sys.argv[2], redis_url=sys.argv[1], app_dir=sys.argv[3], {settings})))
"""

APPLICATION = """
import asyncio, multiprocessing, os, sys, threading, time
import channel_layer
from channel_layer import get_channel_layer

layer = get_channel_layer()  # at module level, before anything is connected

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        scope["state"]["answer"] = 42
        print((await receive())["type"], flush=True)
        await send({"type": "lifespan.startup.complete"})
        print((await receive())["type"], flush=True)
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        print("left", (await receive())["code"], flush=True)
        return
    if scope["path"] == "/stuck":
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "more_body": True})
        await asyncio.to_thread(time.sleep, 300)
    name = await layer.new_channel()
    await layer.send(name, {"type": "note", "n": scope["state"]["answer"]})
    note = await layer.receive(name)
    own = layer is get_channel_layer() and name.startswith("specific.w") and note["n"] == 42
    await send({"type": "http.response.start", "status": 200 if own else 500})
    await send({"type": "http.response.body", "body": b"x" * 1_000_000})

async def stubborn(scope, receive, send):
    if scope["type"] == "lifespan":
        return await app(scope, receive, send)
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "more_body": True})
    await refuse()

async def refuse():
    while True:
        try:
            await asyncio.sleep(300)
        except asyncio.CancelledError:
            pass

def block():
    os.write(1, b"blocked\\n")
    time.sleep(300)

async def filling(scope, receive, send):
    if scope["type"] == "lifespan":
        return await app(scope, receive, send)
    await asyncio.gather(*[asyncio.to_thread(block) for _ in range(int(os.environ["ASGI_THREADS"]))])

def end_a_fork():
    context = multiprocessing.get_context("fork")
    runs = context.Event()
    child = context.Process(target=lambda: runs.set() or time.sleep(300))
    child.start()
    runs.wait(30)
    child.terminate()
    child.join(30)
    return child.exitcode

async def forking(scope, receive, send):
    if scope["type"] == "lifespan":
        return await app(scope, receive, send)
    codes = [end_a_fork(), await asyncio.to_thread(end_a_fork)]
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": repr(codes).encode()})

async def leaving(scope, receive, send):
    async def leave():
        print("leaving", flush=True)
        await asyncio.Event().wait()

    layer.stop = leave
    await app(scope, receive, send)

async def failing(scope, receive, send):
    await send({"type": "lifespan.startup.failed", "message": "no database here"})

async def failing_with_call(scope, receive, send):
    asyncio.get_running_loop().run_in_executor(None, block)
    await failing(scope, receive, send)

async def failing_with_thread(scope, receive, send):
    threading.Thread(target=block).start()
    await failing(scope, receive, send)

async def failing_with_task(scope, receive, send):
    scope["state"]["task"] = asyncio.create_task(refuse())
    await asyncio.sleep(0)
    await failing(scope, receive, send)

async def starting(scope, receive, send):
    print("starting", flush=True)
    await asyncio.sleep(300)
"""


class Worker:
    """A worker process; ``ready`` is read from the pipe that a supervisor would read."""

    def __init__(self, url: str, directory: Path, reference: str = "main:app", settings: str = "") -> None:
        (directory / "main.py").write_text(APPLICATION)
        self.ready, write = os.pipe()
        program = PROGRAM.format(root=str(ROOT), settings=settings)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", program, url, reference, str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=directory,
            pass_fds=[write],
            env=os.environ | {"TRUNKLINE_STATUS_FD": str(write)},
        )
        os.close(write)

    def wait_ready(self) -> bytes:
        """The first line that came through the pipe behind its name: b"" if the process ended without."""
        lines = self.wait_said(b"ready\n").splitlines(keepends=True)
        return next((line for line in lines if not line.startswith(b"process w")), b"")

    def wait_said(self, line: bytes) -> bytes:
        """What came through the pipe until there was this line, or the process ended."""
        said = b""
        while line not in said:
            readable, _, _ = select.select([self.ready], [], [], TIMEOUT_S)
            assert readable, "neither ready nor ended"
            data = os.read(self.ready, 100)
            if not data:
                break
            said += data
        return said

    def wait_line(self, line: str) -> None:
        assert self.process.stdout is not None
        for printed in self.process.stdout:
            if printed.rstrip("\n") == line:
                return
        raise AssertionError(f"the worker ended without printing {line!r}")

    def end(self) -> tuple[int, str, str]:
        """Exit status, rest of stdout, stderr."""
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, out, err

    def close(self) -> None:
        os.close(self.ready)
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    started: list[Worker] = []
    yield started
    for worker in started:
        worker.close()


class Interface:
    """An interface server's layer, which answers claims with grants and reads everything."""

    def __init__(self, layer: RedisProcessLayer) -> None:
        self.layer = layer
        self.connections: dict[int, FakeInterface] = {}
        self.changed = asyncio.Event()
        self.ended_peers: list[str] = []

    async def open(self, opening: Opening) -> FakeInterface:
        self.connections[opening.connection] = client = FakeInterface(opening.connection)
        channel = "http.request" if opening.scope["type"] == "http" else "websocket.connect"
        await self.layer.push_opening(channel, encode_opening(opening))
        return client

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def frame_received(self, peer: str, frame: Frame) -> None:
        client = self.connections[frame[1]]
        if frame[0] == FrameKind.CLAIM:
            self.layer.link_send(peer, build_grant(frame[1], frame[2]))
        for answer in client.read([frame]):
            self.layer.link_send(peer, pack(answer))
        self.changed.set()

    def peer_ended(self, peer: str, reason: str) -> None:
        self.ended_peers.append(peer)
        self.changed.set()

    def peer_ready(self, peer: str) -> None: ...

    def broker_changed(self, reachable: bool) -> None: ...


def pack(frame: Frame) -> bytes:
    packed: bytes = msgpack.packb(frame)
    return packed


@pytest.fixture
async def interface(broker_server: BrokerServer) -> AsyncIterator[Interface]:
    layer = RedisProcessLayer(url=broker_server.url, role="interface")
    interface = Interface(layer)
    await layer.start(interface, lambda channels, encoded: None)
    yield interface
    await layer.stop()


REQUEST = {"type": "http.request", "body": b"", "more_body": False}


async def test_from_ready_to_a_clean_stop(
    broker_server: BrokerServer, interface: Interface, tmp_path: Path, workers: list[Worker]
) -> None:
    worker = Worker(broker_server.url, tmp_path)
    workers.append(worker)
    assert await asyncio.to_thread(worker.wait_ready) == b"ready\n"
    worker.wait_line("lifespan.startup")
    expected = Lease(role="worker", version=version("trunkline"), load=0, room=20_100)
    with broker_server.client() as broker:

        def leases() -> list[Lease]:
            found = [broker.get(key) for key in broker.keys("trunkline:lease:{w*")]
            return [decode_lease(lease) for lease in found if lease is not None]  # it may end between the two

        async with asyncio.timeout(TIMEOUT_S):
            while leases() != [expected]:  # noqa: ASYNC110 - the lease says it with its next renewal
                await asyncio.sleep(0.05)
    client = await interface.open(
        make_opening(http_scope("POST"), interface=interface.layer.process_id, first=REQUEST)
    )
    await interface.until(lambda: client.outcome is not None)
    assert client.claimed
    start, *bodies = client.events
    assert start["status"] == 200
    assert sum(len(event["body"]) for event in bodies) == 1_000_000
    socket = await interface.open(
        make_opening(
            websocket_scope(),
            connection=2,
            interface=interface.layer.process_id,
            first={"type": "websocket.connect"},
        )
    )
    await interface.until(lambda: socket.events)
    worker.process.send_signal(signal.SIGTERM)
    await interface.until(lambda: socket.outcome is not None)
    assert socket.events[-1] == {"type": "websocket.close", "code": 1012, "reason": "the worker stops"}
    assert socket.outcome is Outcome.CANCELLED
    status, out, err = await asyncio.to_thread(worker.end)
    assert (status, out, err) == (0, "left 1012\nlifespan.shutdown\n", "")
    await interface.until(lambda: interface.ended_peers)


async def test_ending_a_process_that_the_application_has_forked_ends_that_one_alone(
    broker_server: BrokerServer, interface: Interface, tmp_path: Path, workers: list[Worker]
) -> None:
    worker = Worker(broker_server.url, tmp_path, "main:forking")
    workers.append(worker)
    assert await asyncio.to_thread(worker.wait_ready) == b"ready\n"
    for connection in (1, 2):  # the second one says that the worker takes what comes
        opening = make_opening(
            http_scope("POST"), connection=connection, interface=interface.layer.process_id, first=REQUEST
        )
        client = await interface.open(opening)
        await interface.until(lambda client=client: client.outcome is not None)
        assert client.events[1]["body"] == repr([-signal.SIGTERM] * 2).encode()
    worker.process.send_signal(signal.SIGTERM)
    assert (await asyncio.to_thread(worker.end))[0] == 0


async def test_a_wsgi_application_may_run_a_loop_while_it_is_imported(
    broker_server: BrokerServer, interface: Interface, tmp_path: Path, workers: list[Worker]
) -> None:
    (tmp_path / "pages.py").write_text(
        "import asyncio\n"
        "async def ask(): return b'an answer'\n"
        "BODY = asyncio.run(ask())\n"
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [])\n"
        "    return [BODY]\n"
    )
    worker = Worker(broker_server.url, tmp_path, "pages:app", "interface='wsgi'")
    workers.append(worker)
    assert await asyncio.to_thread(worker.wait_ready) == b"ready\n"
    opening = make_opening(http_scope(), interface=interface.layer.process_id, first=REQUEST)
    client = await interface.open(opening)
    await interface.until(lambda: client.outcome is not None)
    assert [event["body"] for event in client.events if event.get("body")] == [b"an answer"]


async def test_a_second_signal_ends_the_process_at_once_although_a_thread_is_stuck(
    broker_server: BrokerServer, interface: Interface, tmp_path: Path, workers: list[Worker]
) -> None:
    worker = Worker(broker_server.url, tmp_path)
    workers.append(worker)
    assert await asyncio.to_thread(worker.wait_ready) == b"ready\n"
    opening = make_opening(http_scope(path="/stuck"), interface=interface.layer.process_id, first=REQUEST)
    client = await interface.open(opening)
    await interface.until(lambda: client.events)
    worker.process.send_signal(signal.SIGTERM)
    # Nothing promises the order of two signals that are both pending: the first one is heard by now.
    assert b"draining\n" in await asyncio.to_thread(worker.wait_said, b"draining\n")
    assert worker.process.poll() is None
    # A supervised process takes a second SIGTERM for one that systemd sends to all: this one has a pipe.
    worker.process.send_signal(signal.SIGINT)
    status, out, _ = await asyncio.wait_for(asyncio.to_thread(worker.end), 30)
    assert status == 1
    assert "lifespan.shutdown" not in out


@pytest.mark.parametrize(("reference", "outcome"), [("main:app", Outcome.CANCELLED), ("main:stubborn", None)])
async def test_what_does_not_end_does_not_keep_the_process_after_the_stop_timeout(
    broker_server: BrokerServer,
    interface: Interface,
    tmp_path: Path,
    workers: list[Worker],
    reference: str,
    outcome: Outcome | None,
) -> None:
    worker = Worker(broker_server.url, tmp_path, reference, settings="drain_timeout_s=0.1")
    workers.append(worker)
    assert await asyncio.to_thread(worker.wait_ready) == b"ready\n"
    opening = make_opening(http_scope(path="/stuck"), interface=interface.layer.process_id, first=REQUEST)
    client = await interface.open(opening)
    await interface.until(lambda: client.events)
    worker.process.send_signal(signal.SIGINT)
    status, out, err = await asyncio.to_thread(worker.end)
    await interface.until(lambda: interface.ended_peers)  # behind all that the worker sent
    assert client.outcome is outcome  # None: its interface server learns it from the end of the link
    assert "lifespan.shutdown" in out
    assert status == 1
    assert "threads or tasks of the application do not end" in err


def test_a_second_signal_ends_the_process_also_while_its_layer_stops(
    broker_server: BrokerServer, tmp_path: Path, workers: list[Worker]
) -> None:
    worker = Worker(broker_server.url, tmp_path, "main:leaving")
    workers.append(worker)
    assert worker.wait_ready() == b"ready\n"
    worker.process.send_signal(signal.SIGTERM)
    worker.wait_line("leaving")
    worker.process.send_signal(signal.SIGINT)  # see above
    status, _, err = worker.end()
    assert status == 1
    assert "will find this worker gone by its lease" in err


async def test_a_full_thread_pool_does_not_keep_the_process(
    broker_server: BrokerServer,
    interface: Interface,
    tmp_path: Path,
    workers: list[Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ASGI_THREADS", "4")
    worker = Worker(broker_server.url, tmp_path, "main:filling", settings="drain_timeout_s=0.1")
    workers.append(worker)
    assert await asyncio.to_thread(worker.wait_ready) == b"ready\n"
    await interface.open(make_opening(http_scope(), interface=interface.layer.process_id, first=REQUEST))
    for _ in range(4):
        await asyncio.to_thread(worker.wait_line, "blocked")
    worker.process.send_signal(signal.SIGTERM)
    status, out, err = await asyncio.to_thread(worker.end)
    assert "lifespan.shutdown" in out
    assert status == 1
    assert "threads or tasks of the application do not end" in err
    await interface.until(lambda: interface.ended_peers)


def test_a_signal_during_startup_ends_the_worker(
    broker_server: BrokerServer, tmp_path: Path, workers: list[Worker]
) -> None:
    worker = Worker(broker_server.url, tmp_path, "main:starting")
    workers.append(worker)
    worker.wait_line("starting")
    worker.process.send_signal(signal.SIGTERM)
    assert worker.end()[0] == 0
    assert worker.wait_ready() == b""


@pytest.mark.parametrize(
    ("reference", "status", "text"),
    [
        ("absent:app", 2, "trunkline: no module named 'absent'"),
        ("main:absent", 2, "trunkline: 'main' has no attribute 'absent'"),
        ("main", 2, "trunkline: the application 'main' is not of the form module:attribute"),
        ("main:layer", 2, "trunkline: 'main:layer' is not callable: it is a RedisProcessLayer"),
        ("main:failing", 1, "trunkline: the application could not start: no database here"),
    ],
)
def test_what_is_wrong_is_one_line(
    broker_server: BrokerServer, tmp_path: Path, workers: list[Worker], reference: str, status: int, text: str
) -> None:
    worker = Worker(broker_server.url, tmp_path, reference)
    workers.append(worker)
    ended, out, err = worker.end()
    assert (ended, out) == (status, "")
    assert err.startswith(text)
    assert err.count("\n") == 1
    assert worker.wait_ready() == b""


@pytest.mark.parametrize(
    ("url", "status"),
    [("redis://127.0.0.1:{port}", 1), ("http://localhost", 2), ("redis://127.0.0.1/not-a-number", 2)],
)
def test_a_broker_that_cannot_be_used_is_one_line(
    tmp_path: Path, workers: list[Worker], url: str, status: int
) -> None:
    worker = Worker(url.format(port=free_port()), tmp_path)
    workers.append(worker)
    ended, _, err = worker.end()
    assert ended == status
    assert err.startswith("trunkline: ")
    assert err.count("\n") == 1


THREADED = "import main, threading\nthreading.Thread(target=main.block).start()"
LEFT = "threads or tasks of the application do not end: the worker leaves without them"


@pytest.mark.parametrize("what", ["call", "thread", "task"])
def test_what_a_failed_startup_leaves_behind_does_not_keep_the_worker(
    broker_server: BrokerServer, tmp_path: Path, workers: list[Worker], what: str
) -> None:
    worker = Worker(broker_server.url, tmp_path, f"main:failing_with_{what}")
    workers.append(worker)
    status, _, err = worker.end()
    assert status == 1
    assert err.splitlines() == ["trunkline: the application could not start: no database here", LEFT]


def test_a_thread_of_an_import_that_fails_does_not_keep_the_worker(
    broker_server: BrokerServer, tmp_path: Path, workers: list[Worker]
) -> None:
    (tmp_path / "threaded.py").write_text(f"{THREADED}\n1 / 0")
    worker = Worker(broker_server.url, tmp_path, "threaded:app")
    workers.append(worker)
    status, _, err = worker.end()
    assert status == 2
    *_, said, left = err.splitlines()
    assert said.startswith("trunkline: ")
    assert left == LEFT


def test_a_thread_of_an_import_does_not_keep_a_worker_without_broker(tmp_path: Path, workers: list[Worker]) -> None:
    (tmp_path / "threaded.py").write_text(f"{THREADED}\napp = main.app")
    worker = Worker(f"redis://127.0.0.1:{free_port()}", tmp_path, "threaded:app")
    workers.append(worker)
    status, _, err = worker.end()
    assert status == 1
    said, left = err.splitlines()
    assert said.startswith("trunkline: ")
    assert left == LEFT
    assert worker.wait_ready() == b"broker-away\n"
