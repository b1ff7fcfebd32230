"""--encryption-keys with the real commands: what the broker gets to see, changing keys, and keys that do not fit."""

import asyncio
import contextlib
import os
import socket
import threading

import httpx
import pytest
from websockets.sync.client import connect

from channel_layer import Publisher, RedisChannelLayer
from channel_layer.home import close_homes
from tests.system.processes import Command, Served, children_of, wait_until

APP = "tests.system.applications:application"
# What may not show. Everything that the test says contains one of them.
SECRETS = [b"secret-header", b"secret-path", b"secret-body", b"secret-text", b"secret-work", b"secret-view"]


class Spy:
    """Everything that goes to a broker, as MONITOR shows it: printable characters as they are."""

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._socket.sendall(b"MONITOR\r\n")
        assert self._socket.recv(5) == b"+OK\r\n"
        self.seen = bytearray()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _read(self):
        while data := self._socket.recv(1 << 20):
            self.seen += data


async def work(url, keys):
    """A normal channel, a process-local channel and groups of both, from outside."""
    layer = RedisChannelLayer(hosts=[url], symmetric_encryption_keys=keys)
    message = {"type": "x", "text": "secret-work"}
    await layer.send("jobs", message)
    assert await layer.receive("jobs") == message
    channel = await layer.new_channel()
    other = RedisChannelLayer(hosts=[url], symmetric_encryption_keys=keys, capacity=7)  # another process, as it were
    await other.group_add("all", "jobs")
    await layer.group_add("all", channel)
    await other.group_send("all", message)
    assert await layer.receive("jobs") == await layer.receive(channel) == message
    await other.send(channel, message)
    assert await layer.receive(channel) == message


def use_everything(url, ws_url, redis_url, keys):
    headers = {"X-Secret": "secret-header"}
    body = b"secret-body" * 20_000
    answer = httpx.post(url + "/upload?secret-path", headers=headers, content=body, timeout=60)
    assert answer.json()["bytes"] == len(body)
    assert "secret-header" in httpx.get(url + "/scope?secret-path", headers=headers, timeout=60).text
    with connect(ws_url + "/echo?secret-path", open_timeout=60) as client:
        client.send("secret-text" * 100)
        assert client.recv(timeout=60) == "secret-text" * 100
    with connect(ws_url + "/member?group=room", open_timeout=60) as client:
        assert client.recv(timeout=60) == "joined"
        client.send("secret-text of a client")
        assert client.recv(timeout=60) == "secret-text of a client"
        assert httpx.post(url + "/publish?group=room", content=b"secret-view", timeout=60).text == "sent"
        assert client.recv(timeout=60) == "secret-view"
        with Publisher(redis_url, symmetric_encryption_keys=keys) as publisher:
            publisher.group_send("room", {"type": "websocket.send", "text": "secret-work of a script"})
        assert client.recv(timeout=60) == "secret-work of a script"
    asyncio.run(work(redis_url, keys))


@pytest.mark.parametrize("keys", [["a key of the tests", "an older one"], []], ids=["encrypted", "plain"])
def test_nothing_readable_goes_through_the_broker(broker_server, keys):
    """And without keys the spy does see everything, so it would notice."""
    environment = {"TRUNKLINE_ENCRYPTION_KEYS": "\n".join(keys)} if keys else {}
    flags = ("--workers", "2", "--redis", broker_server.url)
    with Spy(str(broker_server.directory / "broker.sock")) as spy, Served(APP, *flags, env=environment) as served:
        try:
            use_everything(served.url, served.ws_url, broker_server.url, keys)
        finally:
            close_homes()
        for _, command in children_of(served.process.pid):
            assert "a key of the tests" not in command
        assert served.stop() == 0
        assert "decrypt" not in served.output
        with broker_server.client() as client:
            client.echo("that is all")
        wait_until(lambda: b"that is all" in spy.seen, 60, "the spy has seen everything")
    assert len(spy.seen) > 200_000
    assert [secret for secret in SECRETS if secret in spy.seen] == ([] if keys else SECRETS)


def test_the_embedded_brokers_environment_has_the_keys_for_scripts_of_the_application(tmp_path):
    (tmp_path / "keys").write_text("a key of the tests\n")
    (tmp_path / "main.py").write_text(
        "import asyncio, sys\n"
        "SCRIPT = 'from channel_layer import Publisher; '"
        '\'Publisher().group_send("room", {"type": "websocket.send", "text": "from a child"})\'\n'
        "from channel_layer import get_channel_layer\n"
        "async def app(scope, receive, send):\n"
        "    assert scope['type'] == 'websocket'\n"
        "    await receive()\n"
        "    await send({'type': 'websocket.accept'})\n"
        "    reply = scope['extensions']['channel_layer']['reply_channel']\n"
        "    await get_channel_layer().group_add('room', reply)\n"
        "    child = await asyncio.create_subprocess_exec(sys.executable, '-c', SCRIPT)\n"
        "    assert await child.wait() == 0\n"
        "    await receive()\n"
    )
    flags = ("--encryption-keys", f"@{tmp_path / 'keys'}", "--lifespan", "off")
    with Served("main:app", *flags, cwd=tmp_path) as served, connect(served.ws_url, open_timeout=60) as client:
        assert client.recv(timeout=60) == "from a child"


class Halves:
    """An interface server and workers, each started with keys of its own."""

    def __init__(self, stack, redis_url):
        self.stack = stack
        self.redis_url = redis_url

    def interface(self, *keys):
        command = self._start("interface", "--port", "0", keys=keys)
        return command, command.wait_for(r"accepts on (http://\S+)").group(1)

    def worker(self, *keys):
        command = self._start("worker", APP, keys=keys)
        command.wait_for(r"worker \w+ runs")
        return command

    def _start(self, *arguments, keys):
        environment = {"TRUNKLINE_REDIS": self.redis_url, "TRUNKLINE_ENCRYPTION_KEYS": "\n".join(keys)}
        return self.stack.enter_context(Command(*arguments, env=environment))


@pytest.fixture
def halves(broker_server):
    with contextlib.ExitStack() as stack:
        yield Halves(stack, broker_server.url)


def answers(url):
    return httpx.get(url, timeout=60).text == "hello"


def test_keys_are_replaced_in_three_rounds_while_requests_go_on(halves):
    interface, url = halves.interface("old")
    worker = halves.worker("old")
    assert answers(url)
    for keys in (("old", "new"), ("new", "old"), ("new",)):
        # Workers first, then the interface server; at each step the two of them have a key in common.
        successor = halves.worker(*keys)
        assert worker.stop() == 0
        worker = successor
        assert answers(url)
        next_interface, next_url = halves.interface(*keys)
        assert answers(next_url)
        assert interface.stop() == 0
        interface, url = next_interface, next_url
        assert answers(url)
        assert "decrypt" not in worker.output + interface.output


def test_a_worker_with_other_keys_says_so_and_lives_and_another_one_answers(halves):
    interface, url = halves.interface("right")
    wrong = halves.worker("wrong")
    with contextlib.ExitStack() as stack:
        # It takes the opening and cannot read it; the interface server misses it, and sends it again.
        pool = stack.enter_context(contextlib.closing(httpx.Client(timeout=60)))
        result = []
        thread = threading.Thread(target=lambda: result.append(pool.get(url).text))
        thread.start()
        wrong.wait_for(
            "an opening of http.request is dropped: the encryption key of this process does not decrypt it"
        )
        assert wrong.process.poll() is None
        assert wrong.stop() == 0
        halves.worker("right")
        thread.join(40)
    assert result == ["hello"]
    assert "Traceback" not in interface.output + wrong.output


def test_a_key_dropped_too_early_ends_connections_instead_of_holding_them(halves):
    """The worker reads the interface server, which does not read the worker: nobody waits for ever."""
    interface, url = halves.interface("old")
    worker = halves.worker("new", "old")
    assert httpx.get(url, timeout=60).status_code == 503
    interface.wait_for("a blob of w.* is dropped: the encryption key of this process does not decrypt it")
    halves.worker("old")
    assert worker.stop() == 0
    assert answers(url)
    assert "Traceback" not in interface.output + worker.output


def test_what_is_wrong_with_the_keys_is_one_line(tmp_path):
    for value, text in (
        (f"@{tmp_path}/missing", "the file of encryption keys .* cannot be read"),
        (f"@{os.devnull}", "the file of encryption keys .* has no key"),
    ):
        with Command("interface", "--redis", "redis://localhost:1", "--encryption-keys", value) as command:
            status, output = command.wait_ended()
            assert status == 2
            assert len(output.splitlines()) == 1
            command.wait_for(text)
