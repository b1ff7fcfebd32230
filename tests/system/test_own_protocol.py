"""A protocol server of somebody's own: the TCP chat, flow control both ways, groups, and deaths."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from websockets.sync.client import connect

from channel_layer import Publisher
from tests.system.processes import ROOT, Served, wait_until

FLOW = """
import asyncio, logging, sys
from interface_server.own_protocol import OwnProtocol, serve
from interface_server.settings import InterfaceSettings
from channel_layer import get_channel_layer

class Bytes(OwnProtocol):
    scope_type = "flow"

    def build_scope(self):
        return {"greeting": "hello"}

    def data_received(self, data):
        self.socket.send_event({"type": "flow.data", "data": data})

    def event_received(self, event):
        if event["type"] == "flow.fault":
            raise RuntimeError("this protocol fails on purpose")
        self.socket.write(event["data"])

    def refused(self, reason):
        self.socket.write(b"refused: " + reason.encode())

sent = received = 0
listening = asyncio.Event()  # the deaf one is deaf until then

async def application(scope, receive, send):
    global sent, received
    if scope["type"] == "http":
        if scope["path"] == "/listen":
            listening.set()
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"%d %d" % (sent, received)})
        return
    assert (await receive()) == {"type": "flow.connect"}
    assert scope["greeting"] == "hello" and scope["client"][0] == "127.0.0.1" and scope["server"][1] > 0
    channel = scope["extensions"]["channel_layer"]["reply_channel"]
    task, _, rest = (await receive())["data"].partition(b"\\n")
    task = task.decode()
    if task == "flood":
        try:
            for _ in range(3000):
                await send({"type": "flow.data", "data": b"x" * 10_000})
                sent += 10_000
            await send({"type": "flow.close"})
        except OSError:
            print("the flood ends", flush=True)
    elif task == "deaf":
        await listening.wait()
        received = len(rest)
        while True:
            event = await receive()
            if event["type"] == "flow.disconnect":
                return
            received += len(event["data"])
    elif task == "group":
        await get_channel_layer().group_add("everybody", channel)
        await send({"type": "flow.data", "data": b"joined"})
        while (event := await receive())["type"] != "flow.disconnect":
            await send({"type": "flow.data", "data": b"application got " + event["type"].encode()})
        print("left", flush=True)
    elif task == "bad":
        for message in ({"type": "http.response.start"}, {"type": 1}, {"type": "flow.data", "data": float("nan")}):
            try:
                await send(message)
            except RuntimeError as error:
                await send({"type": "flow.data", "data": str(error).encode() + b"\\n"})
        await send({"type": "flow.close"})
        try:
            await send({"type": "flow.data", "data": b"never"})
        except OSError:
            print("nothing behind close", flush=True)
    elif task == "fault":
        await send({"type": "flow.fault"})
        print(f"the application got {(await receive())['type']}", flush=True)

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    sys.exit(serve(Bytes, InterfaceSettings(redis_url=sys.argv[1], port=0, queue_timeout_s=float(sys.argv[2]))))
"""


class ProtocolServer:
    """A protocol server as its own process; ``port`` is the one it found."""

    def __init__(self, program, *arguments, log):
        self.log = log
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(program), *arguments], stdout=output, stderr=output, env=environment
            )
        wait_until(lambda: " speaks " in self.output or self.process.poll() is not None, 60, "the server is ready")
        assert " speaks " in self.output, self.output
        self.port = int(self.output.partition(" speaks ")[2].split("\n")[0].rpartition(":")[2])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def connect(self):
        client = socket.create_connection(("127.0.0.1", self.port))
        client.settimeout(60)
        return client


@pytest.fixture
def flow(tmp_path):
    """The application above, and its protocol server."""
    (tmp_path / "flow.py").write_text(FLOW)
    with Served("flow:application", "--protocol", "flow", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}) as served:
        # Longer than a worker takes to start: one test kills the only one there is.
        with ProtocolServer(tmp_path / "flow.py", served.redis_url, "60", log=tmp_path / "log") as server:
            yield served, server


def numbers(served):
    return [int(number) for number in httpx.get(served.url, timeout=60).text.split()]


def read_all(client):
    data = b""
    while piece := client.recv(65536):
        data += piece
    return data


def settled(read):
    """The value when it has stopped changing."""
    last, since = read(), time.monotonic()
    while time.monotonic() - since < 0.5:
        now = read()
        if now != last:
            last, since = now, time.monotonic()
    return last


def test_an_application_waits_for_a_client_that_does_not_read(flow):
    served, server = flow
    with server.connect() as client:
        client.sendall(b"flood\n")
        wait_until(lambda: numbers(served)[0] > 0, 60, "the flood has begun")
        sent = settled(lambda: numbers(served)[0])
        assert 0 < sent < 20_000_000  # of 30: windows, and the buffers of two kernels
        assert len(read_all(client)) == 30_000_000
    assert numbers(served)[0] == 30_000_000
    with server.connect() as client:
        client.sendall(b"flood\n")
        assert client.recv(1) == b"x"
    served.wait_for("the flood ends")


def test_a_client_waits_for_an_application_that_does_not_receive(flow):
    served, server = flow
    with server.connect() as client:
        client.sendall(b"deaf\n")
        client.setblocking(False)
        written = 0
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                written += client.send(b"x" * 65536)
        assert numbers(served)[1] == 0
        assert written < 20_000_000
        client.setblocking(True)
        client.settimeout(60)
        httpx.get(f"{served.url}/listen", timeout=60)
        client.sendall(b"x" * (30_000_000 - written))
        wait_until(lambda: numbers(served)[1] == 30_000_000, 90, "everything arrives")


def test_messages_of_groups_and_the_end_of_a_client(flow):
    served, server = flow
    with server.connect() as client, Publisher(served.redis_url) as publisher:
        client.sendall(b"group\n")
        assert client.recv(100) == b"joined"
        publisher.group_send("everybody", {"type": "flow.data", "data": b"straight"})
        assert client.recv(100) == b"straight"
        publisher.group_send("everybody", {"type": "websocket.send", "text": "x"})
        assert client.recv(100) == b"application got websocket.send"
        publisher.group_send("everybody", {"type": "flow.close"})
        assert client.recv(100) == b""
    served.wait_for("left")


def test_what_an_application_may_not_send_is_an_error_there(flow):
    served, server = flow
    with server.connect() as client:
        client.sendall(b"bad\n")
        lines = read_all(client).decode().splitlines()
    assert len(lines) == 3
    assert all('expected a dict with a "type" flow.' in line for line in lines[:2])
    assert 'message["data"]: NaN is not allowed' in lines[2] or "nan" in lines[2].lower()
    served.wait_for("nothing behind close")


def test_a_fault_of_the_protocol_costs_one_client(flow):
    served, server = flow
    with server.connect() as other, server.connect() as client:
        client.sendall(b"fault\n")
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(100) == b""
        served.wait_for("the application got flow.disconnect")
        assert "this protocol fails on purpose" in server.output
        other.sendall(b"group\n")
        assert other.recv(100) == b"joined"


def test_deaths_and_stops_reach_the_client(flow):
    served, server = flow
    with server.connect() as client:
        client.sendall(b"group\n")
        assert client.recv(100) == b"joined"
        os.kill(served.pids("worker")[0], signal.SIGKILL)
        assert read_all(client) == b"refused: the worker died"
    served.wait_for("starting another")
    with server.connect() as client:
        client.sendall(b"group\n")
        assert client.recv(100) == b"joined"
        assert server.stop() == 0
        assert read_all(client) == b"refused: the server is stopping"
    served.wait_for("left")


def test_without_a_worker_for_it_a_client_is_refused(tmp_path, broker_server):
    (tmp_path / "flow.py").write_text(FLOW)
    with ProtocolServer(tmp_path / "flow.py", broker_server.url, "3", log=tmp_path / "log") as server:
        with server.connect() as client:
            assert read_all(client) == b"refused: no worker took the connection in time"


def test_a_stopping_worker_closes_the_connection(flow):
    served, server = flow
    with server.connect() as client:
        client.sendall(b"group\n")
        assert client.recv(100) == b"joined"
        os.kill(served.pids("worker")[0], signal.SIGTERM)
        assert read_all(client) == b""
    served.wait_for("left")


def test_the_tcp_chat_shares_its_rooms_with_the_web_chat(tmp_path):
    with Served("tcp_chat:application", "--app-dir", "examples", "--protocol", "tcp") as served:
        arguments = ("--redis", served.redis_url, "--port", "0")
        with ProtocolServer(ROOT / "examples" / "tcp_chat.py", *arguments, log=tmp_path / "log") as server:
            with server.connect() as ada, connect(served.ws_url + "/rooms/lobby?name=grace&id=g") as grace:
                lines = ada.makefile("rw", encoding="utf-8", newline="\n")

                def say(text):
                    lines.write(text + "\r\n")
                    lines.flush()

                def hear(text):
                    while (line := lines.readline()) != text + "\r\n":
                        assert line, f"never heard {text!r}"

                assert lines.readline().startswith("Which room")
                say("No Room")
                assert lines.readline().startswith("A room")
                say("lobby ada")
                hear("* grace is here")
                say("hellö")
                while (said := json.loads(grace.recv(timeout=60)))["kind"] != "said":
                    pass
                assert (said["name"], said["text"]) == ("ada", "hellö")
                grace.send(json.dumps({"kind": "say", "text": "hello yourself"}))
                hear("grace: hello yourself")
                with server.connect() as late:
                    late.sendall(b"lobby lin\n")
                    hear("* lin is here")
                hear("* lin has left")
                say("/quit")
                assert lines.readline() == ""
                while (left := json.loads(grace.recv(timeout=60)))["kind"] != "left" or left["name"] != "ada":
                    pass
            with server.connect() as client:
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                    client.sendall(b"x" * 100_000)
                    assert b"That line is too long." in read_all(client)
