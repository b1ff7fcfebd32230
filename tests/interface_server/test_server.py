"""A whole interface server on real sockets: with a scripted worker in place of the layer, and as a process.

The reactor of the first kind is not Twisted's global one: each test has its own, on its own loop.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import msgpack
import pytest
import websockets
from twisted.internet.asyncioreactor import AsyncioSelectorReactor

from channel_layer.codec import decode_event, encode_event, encode_message
from channel_layer.frames import FrameKind, Outcome, build_claim, build_end, build_event
from channel_layer.openings import decode_opening
from interface_server.server import InterfaceServer
from interface_server.settings import InterfaceSettings

ROOT = Path(__file__).resolve().parents[2]
WORKER = "wscripted"


class ScriptedLayer:
    """A layer with one worker behind it, which answers by the path of the scope."""

    def __init__(self):
        self.process_id = "iserver"
        self.broker_reachable = True
        self.owns_channel = None
        self.listener = self.delivery = None
        self.openings = {}
        self.received = []  # (connection, event) from clients
        self.changed = asyncio.Event()  # something was received, forgotten or stopped
        self.forgotten = set()
        self.is_stopped = False

    async def start(self, listener, delivery=None):
        self.listener, self.delivery = listener, delivery

    async def stop(self):
        self.is_stopped = True

    def hold_inbox(self, held):
        pass

    def push_opening(self, channel, opening):
        decoded = decode_opening(opening)
        self.openings[decoded.connection] = decoded
        if decoded.scope["path"] != "/nobody":
            asyncio.get_running_loop().call_soon(self.frame, build_claim(decoded.connection, decoded.epoch))
        stored = asyncio.get_running_loop().create_future()
        stored.set_result(opening)
        return stored

    async def find_openings(self, channel, elements):
        return [True] * len(elements)

    async def remove_opening(self, channel, element):
        return True

    def forget_channels(self, channels):
        self.forgotten.update(channels)
        self.changed.set()

    def link_is_congested(self, peer):
        return False

    def link_send(self, peer, frame):
        kind, connection, _, *rest = msgpack.unpackb(frame)
        if kind == FrameKind.GRANT:
            first = self.openings[connection].first_event
            if first is not None:
                self.answer(connection, decode_event(first))
        elif kind in (FrameKind.EVENT, FrameKind.LAST):
            self.answer(connection, decode_event(rest[0]))

    def frame(self, encoded):
        self.listener.frame_received(WORKER, msgpack.unpackb(encoded))

    def send(self, connection, *events):
        for event in events:
            self.frame(build_event(connection, 1, encode_event(event)))

    def end(self, connection):
        self.frame(build_end(connection, 1, Outcome.RETURNED))

    def answer(self, connection, event):
        self.received.append((connection, event))
        self.changed.set()
        scope = self.openings[connection].scope
        start = {"type": "http.response.start", "status": 200, "headers": [[b"content-type", b"text/plain"]]}
        if event["type"] == "websocket.connect":
            self.send(connection, {"type": "websocket.accept"})
        elif event["type"] == "websocket.receive":
            self.send(connection, {"type": "websocket.send", "text": event["text"].upper()})
        elif event["type"] == "http.request" and scope["path"] in ("/", "/later"):
            self.send(connection, start)
            if scope["path"] == "/":
                body = f"{scope['method']} {event['body'].decode()}".encode()
                self.send(connection, {"type": "http.response.body", "body": body, "more_body": False})
                self.end(connection)
            else:
                self.send(connection, {"type": "http.response.body", "body": b"begun ", "more_body": True})

    async def until(self, condition):
        while not condition():
            self.changed.clear()
            async with asyncio.timeout(30):
                await self.changed.wait()


class Served:
    def __init__(self, server, layer, host, port):
        self.server = server
        self.layer = layer
        self.http = f"http://{host}:{port}"
        self.websocket = f"ws://{host}:{port}"
        self.address = (host, port)


@pytest.fixture
async def serve():
    """Starts servers on free ports; stops them."""
    loop = asyncio.get_running_loop()
    reactor = AsyncioSelectorReactor(loop)
    started = []

    async def start(**settings):
        layer = ScriptedLayer()
        server = InterfaceServer(
            InterfaceSettings(redis_url="redis://unused", **settings), layer=layer, loop=loop, reactor=reactor
        )
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setblocking(False)
            address = listening.getsockname()
            await server.start()
            server.listen(listening)
        started.append((server, layer))
        return Served(server, layer, *address)

    yield start
    at_once = asyncio.Event()
    at_once.set()
    for server, layer in started:
        if not layer.is_stopped:
            await server.stop(at_once)
    reactor.removeAll()
    await asyncio.sleep(0)
    gc.collect()


async def test_a_request_and_its_response(serve):
    served = await serve()
    async with httpx.AsyncClient(timeout=60) as client:
        for _ in range(2):
            response = await client.post(served.http, content=b"hello")
            assert (response.status_code, response.text) == (200, "POST hello")
            assert response.headers["server"] == "trunkline"
    assert served.server.statistics().connections.opened_total == 2
    assert served.server.statistics().http1.accepted_total == 1
    assert "listening=1" in repr(served.server)


async def test_a_websocket_that_echoes_and_hears_its_group(serve):
    served = await serve()
    async with websockets.connect(f"{served.websocket}/ws") as client:
        await client.send("hello")
        assert await client.recv() == "HELLO"
        channel = served.layer.openings[1].reply_channel
        assert served.layer.owns_channel(channel, 1)
        served.layer.delivery([channel], encode_message({"type": "websocket.send", "text": "everybody"}))
        assert await client.recv() == "everybody"
    await served.layer.until(lambda: channel in served.layer.forgotten)
    await served.layer.until(lambda: served.layer.received[-1][1]["type"] == "websocket.disconnect")
    assert not served.layer.owns_channel(channel, 1)


async def test_server_sent_events_of_a_group(serve):
    served = await serve()
    async with httpx.AsyncClient(timeout=60) as client, client.stream("GET", f"{served.http}/later") as response:
        chunks = response.aiter_bytes()
        assert await anext(chunks) == b"begun "
        channel = served.layer.openings[1].reply_channel
        served.layer.delivery([channel], encode_message({"type": "http.response.body", "body": b"event"}))
        assert await anext(chunks) == b"event"
        served.layer.delivery([channel], encode_message({"type": "http.response.body", "more_body": False}))
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)


async def test_no_worker_in_time_is_503(serve):
    served = await serve(queue_timeout_s=0.2)
    async with httpx.AsyncClient(timeout=60) as client:
        assert (await client.get(f"{served.http}/nobody")).status_code == 503


async def test_a_dead_worker_is_502_before_the_response_and_1012_for_a_websocket(serve):
    served = await serve()
    async with httpx.AsyncClient(timeout=60) as client, websockets.connect(f"{served.websocket}/ws") as socket_:
        request = asyncio.create_task(client.post(f"{served.http}/silent"))  # a GET would run again
        await served.layer.until(lambda: any(event["type"] == "http.request" for _, event in served.layer.received))
        served.layer.listener.peer_ended(WORKER, "killed")
        assert (await request).status_code == 502
        with pytest.raises(websockets.ConnectionClosed):
            await socket_.recv()
        assert socket_.close_code == 1012


async def test_stop_closes_websockets_and_lets_a_request_finish(serve):
    served = await serve(drain_timeout_s=60)
    async with httpx.AsyncClient(timeout=60) as client, websockets.connect(f"{served.websocket}/ws") as socket_:
        async with client.stream("GET", f"{served.http}/later") as response:
            assert response.status_code == 200
            stopping = asyncio.create_task(served.server.stop(asyncio.Event()))
            with pytest.raises(websockets.ConnectionClosed):
                await socket_.recv()
            assert socket_.close_code == 1012
            with pytest.raises(OSError):  # noqa: PT011
                await asyncio.open_connection(*served.address)
            assert not stopping.done()
            number = next(n for n, opening in served.layer.openings.items() if opening.scope["type"] == "http")
            served.layer.send(number, {"type": "http.response.body", "body": b"and ended", "more_body": False})
            served.layer.end(number)
            assert await response.aread() == b"begun and ended"
        await asyncio.wait_for(stopping, 30)
    assert served.layer.is_stopped


@pytest.mark.parametrize("second_signal", [False, True])
async def test_stop_cuts_a_request_that_does_not_finish(serve, second_signal):
    served = await serve(drain_timeout_s=60 if second_signal else 0.1)
    async with httpx.AsyncClient(timeout=60) as client, client.stream("GET", f"{served.http}/later") as response:
        at_once = asyncio.Event()
        stopping = asyncio.create_task(served.server.stop(at_once))
        if second_signal:
            await asyncio.sleep(0)
            at_once.set()
        with pytest.raises(httpx.TransportError):
            await response.aread()
        await asyncio.wait_for(stopping, 30)
    assert {"type": "http.disconnect"} in [event for _, event in served.layer.received]


# As a process


def start_process(settings, **keywords):
    """Run ``run(InterfaceSettings(**settings))`` in a process of its own; its exit status is run's."""
    program = textwrap.dedent(
        f"""
        import json, sys
        from interface_server.server import run
        from interface_server.settings import InterfaceSettings
        sys.exit(run(InterfaceSettings(**json.loads({json.dumps(settings)!r}))))
        """
    )
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True, **keywords
    )


def one_line_and_status(settings, **keywords):
    process = start_process(settings, **keywords)
    _, errors = process.communicate(timeout=60)
    (line,) = errors.splitlines()
    return line, process.returncode


def test_a_taken_port_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line, status = one_line_and_status({"redis_url": "redis://127.0.0.1:1", "port": port})
    assert (line, status) == (f"trunkline: cannot listen on 127.0.0.1:{port}: Address already in use", 1)


def test_no_broker_is_one_line():
    line, status = one_line_and_status({"redis_url": "redis://127.0.0.1:1", "port": 0})
    assert status == 1
    assert line.startswith("trunkline: ")
    assert "127.0.0.1:1" in line


@pytest.mark.parametrize("wrong", [{"redis_url": "http://nonsense"}, {"prefix": "a b"}])
def test_wrong_input_is_one_line_and_status_2(wrong):
    line, status = one_line_and_status({"redis_url": "redis://127.0.0.1:1", "port": 0, **wrong})
    assert status == 2
    assert line.startswith("trunkline: ")


@pytest.fixture
def broker(tmp_path):
    """The path of a Redis of our own."""
    path = tmp_path / "redis.sock"
    process = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--daemonize", "no"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    for line in process.stdout:
        if "The server is now ready" in line or "Ready to accept connections" in line:
            break
    yield path
    process.kill()
    process.communicate()


def test_ready_is_told_and_a_signal_ends_it_cleanly(broker, tmp_path):
    read_end, write_end = os.pipe()
    uds = tmp_path / "server.sock"
    process = start_process(
        {"redis_url": f"unix://{broker}", "uds": str(uds), "queue_timeout_s": 0.5},
        pass_fds=(write_end,),
        env={**os.environ, "TRUNKLINE_STATUS_FD": str(write_end)},
    )
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        assert pipe.readline().startswith("process i")
        assert pipe.readline() == f"ready unix:{uds}\n"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(uds)), timeout=60) as client:
        assert client.get("http://localhost/").status_code == 503, "there is no worker"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert not uds.exists()
