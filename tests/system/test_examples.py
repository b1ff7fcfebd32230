"""Each example, run as its docstring says."""

import hashlib
import json
import os
import subprocess
import sys

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.system.processes import ROOT, Served


def test_hello():
    with Served("examples.hello:application") as served:
        assert httpx.get(served.url, timeout=60).text == "Hello, world!\n"


@pytest.mark.parametrize(("name", "who"), [("closure", "a closure"), ("partial", "a partial"), ("Class", "a class")])
def test_asgi2(name, who):
    with Served(f"examples.asgi2:{name}") as served:
        assert httpx.get(served.url + "/x", timeout=60).text == f"Hello from {who}, you asked for /x\n"


@pytest.fixture(scope="module")
def starlette():
    with Served("examples.starlette_app:app") as served:
        yield served


class TestStarlette:
    def test_a_request_tells_everything(self, starlette):
        answer = httpx.put(
            starlette.url + "/?a=1&b=%C3%BC",
            headers={"x-thing": "yes", "cookie": "c=d; e=f"},
            content=b"ignored",
            timeout=60,
        ).json()
        assert answer["method"] == "PUT"
        assert answer["url"] == starlette.url + "/?a=1&b=%C3%BC"
        assert answer["query"] == {"a": "1", "b": "ü"}
        assert answer["headers"]["x-thing"] == "yes"
        assert answer["cookies"] == {"c": "d", "e": "f"}
        assert answer["client"] == "127.0.0.1"
        assert answer["greeting"] == "hello"  # the state of the lifespan

    def test_bodies(self, starlette):
        data = os.urandom(1_000_000)
        digest = hashlib.sha256(data).hexdigest()
        assert httpx.post(starlette.url + "/body", content=data, timeout=60).text == digest
        chunks = (data[start : start + 7777] for start in range(0, len(data), 7777))
        assert httpx.post(starlette.url + "/stream", content=chunks, timeout=60).json() == {
            "bytes": len(data),
            "sha256": digest,
        }
        assert httpx.post(starlette.url + "/json", json={"a": [1, None]}, timeout=60).json() == {
            "received": {"a": [1, None]}
        }

    def test_forms(self, starlette):
        assert httpx.post(starlette.url + "/form", data={"name": "Ada"}, timeout=60).json() == {"name": "Ada"}
        files = {"upload": ("notes.txt", b"x" * 300_000)}
        assert httpx.post(starlette.url + "/form", files=files, data={"a": "b"}, timeout=60).json() == {
            "a": "b",
            "upload": {"file": "notes.txt", "bytes": 300_000},
        }

    def test_a_streamed_response(self, starlette):
        assert httpx.get(starlette.url + "/countdown/5", timeout=60).text == "5\n4\n3\n2\n1\n"

    def test_server_sent_events(self, starlette):
        with httpx.stream("GET", starlette.url + "/events", timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": welcome"
            assert httpx.post(starlette.url + "/events", content="one\ntwo", timeout=60).status_code == 200
            assert [next(lines) for _ in range(3)] == ["", "data: one", "data: two"]

    def test_websocket(self, starlette):
        with connect(starlette.ws_url + "/echo") as client:
            client.send("hello")
            assert client.recv(timeout=60) == "hello"


def test_chat_and_publish():
    with Served("chat:application", "--app-dir", "examples/chat", "--workers", "2") as served:
        assert "<title>Chat</title>" in httpx.get(served.url, timeout=60).text
        assert httpx.get(served.url + "/chat.js", timeout=60).headers["content-type"].startswith("text/javascript")
        assert httpx.get(served.url + "/../secret", timeout=60).status_code == 404
        url = served.ws_url + "/rooms/lobby?name={0}&id={0}"
        with connect(url.format("ada")) as ada:
            read(ada, "here", "ada")
            with connect(url.format("grace")) as grace:
                read(ada, "joined", "grace")
                read(grace, "here", "ada")  # the roll call
                grace.send(json.dumps({"kind": "say", "text": " hello "}))
                assert read(ada, "said", "grace")["text"] == "hello"
                environment = {**os.environ, "TRUNKLINE_REDIS": served.redis_url}
                script = [sys.executable, str(ROOT / "examples" / "publish.py"), "lobby", "The build is green"]
                subprocess.run(script, check=True, env=environment, timeout=60)
                assert read(grace, "said", "publish.py")["text"] == "The build is green"
                grace.send("not JSON")
                with pytest.raises(ConnectionClosed):
                    read(grace, "nothing of this kind", "nobody")
                assert grace.close_code == 1003
            read(ada, "left", "grace")


def read(client, kind, name):
    """Read until a line of this kind about this visitor comes."""
    while True:
        line = json.loads(client.recv(timeout=60))
        if (line["kind"], line["name"]) == (kind, name):
            return line


def test_publish_without_a_broker_is_one_line():
    environment = {name: value for name, value in os.environ.items() if name != "TRUNKLINE_REDIS"}
    command = [sys.executable, str(ROOT / "examples" / "publish.py"), "lobby", "x"]
    for variables, text in (({}, "set TRUNKLINE_REDIS"), ({"TRUNKLINE_REDIS": "redis://127.0.0.1:1"}, "127.0.0.1:1")):
        ended = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1
        (line,) = ended.stderr.splitlines()
        assert line.startswith("publish.py: ")
        assert text in line
