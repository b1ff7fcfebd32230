"""The programs in README and docs/, as a reader would copy them, under the real command.

A program is a fenced block whose first line is a comment with its file's name (``# main.py``). Everything else that
documents say is looked after by tests/test_docs.py.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from functools import partial

import httpx
from websockets.sync.client import connect as connect_websocket

from tests.servers import free_port
from tests.system.processes import ROOT, Command, Served, wait_until

# A busy machine may take its time to accept; what is tested here is what is said.
connect = partial(connect_websocket, open_timeout=60)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document):
    return BLOCK.findall((ROOT / document).read_text("utf-8"))


def program(document, name):
    """The one block of ``document`` that begins with the name of its file."""
    (found,) = [block for block in blocks(document) if block.startswith(f"# {name}\n")]
    return found


def script(document, *words):
    """The one block without a name that has all of ``words``."""
    (found,) = [block for block in blocks(document) if not block.startswith("# ") and all(w in block for w in words)]
    return found


def run_script(code, redis_url):
    assert "redis://localhost:6379" in code
    code = code.replace("redis://localhost:6379", redis_url)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_the_quick_start_of_the_readme(tmp_path):
    code = program("README.md", "main.py") + script("README.md", "store_state")
    (tmp_path / "main.py").write_text(code)
    with Served("main:app", "--workers", "2", cwd=tmp_path) as served, connect(served.ws_url + "/room") as ada:
        ada.send("I am here")  # joined, and heard by herself
        assert ada.recv(timeout=60) == "I am here"
        assert httpx.get(served.url + "/say/hello", timeout=60).json() == {"said": "hello"}
        assert ada.recv(timeout=60) == "hello"
        run_script(script("README.md", "Publisher"), served.redis_url)
        assert ada.recv(timeout=60) == "The build is green"
        with connect(served.ws_url + "/count") as counter:
            for number in ("1", "2"):
                counter.send("one more")
                assert counter.recv(timeout=60) == number
            for pid in served.pids("worker"):
                os.kill(pid, signal.SIGKILL)
            counter.send("one more")
            assert counter.recv(timeout=60) == "3"


def test_rooms_and_streams(tmp_path):
    (tmp_path / "rooms.py").write_text(program("docs/groups.md", "rooms.py"))
    with (
        Served("rooms:application", "--workers", "2", cwd=tmp_path) as served,
        connect(served.ws_url) as ada,
        httpx.stream("GET", served.url + "/events", timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        assert [next(lines), next(lines)] == [": welcome", ""]
        # The application joins behind what it has sent, so a word may come too early: it is said until it is heard.
        said = threading.Event()

        def repeat():
            while not said.wait(0.2):
                assert httpx.post(served.url + "/say", content="hello everybody", timeout=60).status_code == 204

        speaker = threading.Thread(target=repeat)
        speaker.start()
        try:
            assert next(lines) == "data: hello everybody"
            assert ada.recv(timeout=60) == "hello everybody"
        finally:
            said.set()
            speaker.join()
        run_script(script("docs/groups.md", "group_send"), served.redis_url)
        assert "data: the build is green" in lines
        while (text := ada.recv(timeout=60)) == "hello everybody":
            pass
        assert text == "The build is green"


def test_background_work(tmp_path):
    (tmp_path / "work.py").write_text(program("docs/groups.md", "work.py"))
    with (
        Served("examples.hello:application") as served,
        Command(
            "worker", "work:application", "--redis", served.redis_url, "--channel", "thumbnails", cwd=tmp_path
        ) as worker,
    ):
        worker.wait_for("runs work:application")
        run_script(script("docs/groups.md", "thumbnails"), served.redis_url)
        worker.wait_for("thumbnail 7 from thumbnails")


def test_a_protocol_of_one_s_own(tmp_path):
    port = free_port()
    lines = program("docs/own_protocols.md", "lines.py")
    assert "port=9000" in lines
    (tmp_path / "lines.py").write_text(lines.replace("port=9000", f"port={port}"))
    (tmp_path / "shout.py").write_text(program("docs/own_protocols.md", "shout.py"))
    with (
        Served("examples.hello:application") as served,
        Command(
            "worker", "shout:application", "--redis", served.redis_url, "--protocol", "tcp", cwd=tmp_path
        ) as worker,
    ):
        worker.wait_for("runs shout:application")
        server = subprocess.Popen([sys.executable, str(tmp_path / "lines.py"), served.redis_url], cwd=ROOT)
        try:
            wait_until(lambda: answers(port), 60, "the server listens")
            with socket.create_connection(("127.0.0.1", port), timeout=60) as client, client.makefile("rb") as answer:
                client.sendall(b"hello\n")
                assert answer.readline() == b"HELLO\n"
        finally:
            server.terminate()
            assert server.wait(60) == 0


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def count_on(tmp_path, application, path, message="one more"):
    """Count to 2, replace the worker, count on."""
    with Served(application, cwd=tmp_path) as served, connect(served.ws_url + path) as client:
        for number in ("1", "2"):
            client.send(message)
            assert client.recv(timeout=60) == number
        served.process.send_signal(signal.SIGHUP)
        served.wait_for("all workers are replaced")
        client.send(message)
        assert client.recv(timeout=60) == "3"


def test_a_counter_with_checkpoints(tmp_path):
    (code,) = [block for block in blocks("docs/handover.md") if block.startswith("async def application")]
    (tmp_path / "counter.py").write_text(code)
    count_on(tmp_path, "counter:application", "/")


def test_hand_over_in_one_line(tmp_path):
    framework = "from fastapi import FastAPI, WebSocket\n\napp = FastAPI()\n"
    imports, count = (script("docs/handover.md", words) for words in ("import store_state", "@app.websocket"))
    (tmp_path / "counting.py").write_text(framework + imports + count)
    count_on(tmp_path, "counting:app", "/count")


def test_a_consumer_with_checkpoints(tmp_path):
    """Channels, and JSON both ways."""
    settings = "from django.conf import settings\n\nsettings.configure()\n"
    consumer = "from channels.generic.websocket import AsyncJsonWebsocketConsumer\n"
    code = script("docs/handover.md", "class Counter(HandoverMixin")
    (tmp_path / "consumer.py").write_text(f"{settings}{consumer}{code}\n\napplication = Counter.as_asgi()\n")
    count_on(tmp_path, "consumer:application", "/", message='"one more"')
