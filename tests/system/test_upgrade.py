"""Releases side by side: workers are upgraded first, then interface servers, and nobody outside notices.

``--wire-version 1`` makes a process one of the release before: it reads and writes that version, and nothing newer.
"""

import re
import signal
import threading

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.system.processes import LATE_LEASE, Command, wait_until
from tests.system.test_rolling_restart import Load

APP = "tests.system.applications:application"
OLD = ("--wire-version", "1")
# Answers like those of test_rolling_restart.Load's application, and keeps a checkpoint where it may.
APPLICATION = """
async def application(scope, receive, send):
    event = await receive()
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        offered = "websocket.handover" in scope["extensions"]
        await send({"type": "websocket.send", "text": "offered" if offered else "not offered"})
        if offered:
            await send({"type": "websocket.handover.state", "state": 1})
        while (await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": "echo"})
        return
    body = event["body"]
    while event["more_body"]:
        event = await receive()
        body += event["body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"x " + body})
"""


class Release:
    """Starts processes of one deployment."""

    def __init__(self, broker_server, directory):
        (directory / "main.py").write_text(APPLICATION)
        self._redis = ("--redis", broker_server.url)
        self._directory = directory

    def worker(self, *flags, app="main:application"):
        cwd = {"cwd": self._directory} if app.startswith("main") else {}
        return Command("worker", app, "--lifespan", "off", *flags, *self._redis, **cwd)

    def interface(self, *flags):
        return Command("interface", "--port", "0", "--no-access-log", *flags, *self._redis)


@pytest.fixture
def release(broker_server, tmp_path):
    return Release(broker_server, tmp_path)


def address(interface):
    return interface.wait_for(r"accepts on (http://\S+)").group(1)


def exercise(url):
    """Everything that two halves say to each other; with the application of the system tests."""
    sockets = url.replace("http", "ws", 1)
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/").text == "hello"  # short: in one frame, where the interface server knows that
        assert len(client.get("/download?bytes=1000000").content) == 1_000_000
        assert client.post("/upload", content=bytes(300_000)).json()["bytes"] == 300_000
        assert client.get("/fail").status_code == 500
        with connect(f"{sockets}/member?group=g") as one, connect(f"{sockets}/member?group=g") as other:
            assert one.recv(timeout=60) == other.recv(timeout=60) == "joined"
            one.send("to all")
            assert one.recv(timeout=60) == other.recv(timeout=60) == "to all"
        with connect(f"{sockets}/echo") as client:
            for size in (1, 100_000):
                client.send("x" * size)
                assert len(client.recv(timeout=60)) == size


@pytest.mark.parametrize(
    ("interface_flags", "worker_flags"),
    [((), ()), (OLD, OLD), (OLD, ())],
    ids=["both new", "both old", "old interface server, new worker"],
)
def test_every_pair_that_an_upgrade_makes_understands_each_other(release, interface_flags, worker_flags):
    with release.interface(*interface_flags) as interface, release.worker(*worker_flags, app=APP) as worker:
        worker.wait_for("runs tests.system.applications")
        exercise(address(interface))
        for output in (interface.output, worker.output):
            warnings = [line for line in output.splitlines() if "WARNING" in line]
            assert not [line for line in warnings if not re.search(LATE_LEASE, line)]
            assert "ERROR:    trunkline" not in output


def test_an_old_worker_never_takes_what_it_cannot_read(release):
    with release.interface() as interface, release.worker(*OLD) as old:
        old.wait_for("runs main")
        url = address(interface)
        answers = []
        asking = threading.Thread(target=lambda: answers.append(httpx.post(url, content=b"y", timeout=60).text))
        asking.start()
        asking.join(2)
        assert answers == []  # it waits in a list that the old worker does not read
        with release.worker() as new:
            new.wait_for("runs main")
            asking.join(20)
            assert answers == ["x y"]
        assert "ERROR" not in old.output


def test_an_interface_server_may_come_first_if_it_speaks_as_before(release):
    with release.interface(*OLD) as interface, release.worker(*OLD, app=APP) as worker:
        worker.wait_for("runs tests")
        exercise(address(interface))


def test_hand_over_is_offered_by_those_who_know_it(release):
    with release.interface(*OLD) as old, release.interface() as new, release.worker() as first:
        first.wait_for("runs main")
        old_url, new_url = (address(each).replace("http", "ws", 1) for each in (old, new))
        with connect(old_url) as by_old, connect(new_url) as by_new:
            assert by_old.recv(timeout=60) == "not offered"
            assert by_new.recv(timeout=60) == "offered"
            with release.worker() as second:
                second.wait_for("runs main")
                first.stop()
                with pytest.raises(ConnectionClosed):
                    by_old.recv(timeout=60)
                assert by_old.close_code == 1012
                by_new.send("still here?")
                while by_new.recv(timeout=60) != "echo":  # the new instance says "offered" again
                    pass


def test_an_upgrade_under_load_fails_no_request(release):
    """Workers first, one after the other; then the interface server beside a new one."""
    with release.interface(*OLD) as old_interface, release.worker(*OLD) as old_worker:
        old_worker.wait_for("runs main")
        old_url = address(old_interface)
        with release.worker() as new_worker, Load(old_url, threads=2) as load:
            new_worker.wait_for("runs main")
            seen = load.count
            wait_until(lambda: load.count > seen + 50, 60, "both serve")
            # As operators do it: after Ctrl-C it would cut what does not finish within a second.
            old_worker.process.send_signal(signal.SIGTERM)
            assert old_worker.wait_ended()[0] == 0
            seen = load.count
            wait_until(lambda: load.count > seen + 50, 60, "the new worker serves the old interface server")
            with release.interface() as new_interface, Load(address(new_interface), threads=2) as new_load:
                wait_until(lambda: new_load.count > 50, 60, "the new interface server serves")
            assert new_load.failures == []
        assert load.failures == []
