"""Who is hurt when one half goes away or comes, by itself or at its operator's wish."""

import contextlib
import os
import signal
import threading

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.system.processes import Command, Served

APP = "tests.system.applications:application"


def test_a_killed_interface_server_costs_its_sockets_and_its_applications_are_told(tmp_path):
    (tmp_path / "told.py").write_text(
        """
async def app(scope, receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": "welcome"})
    print(f"told {await receive()}", flush=True)
"""
    )
    with Served("told:app", "--lifespan", "off", cwd=tmp_path) as served:
        with connect(served.ws_url) as client:
            assert client.recv(timeout=60) == "welcome"
            os.kill(served.pids("interface server")[0], signal.SIGKILL)
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=60)
        served.wait_for(r"told \{'type': 'websocket\.disconnect', 'code': 1006, 'reason': ''\}", 60)
        served.wait_for("interface server 1 was ended by SIGKILL; starting another")
        with connect(served.ws_url, open_timeout=60) as client:
            assert client.recv(timeout=60) == "welcome"


def test_workers_come_and_go_while_clients_stay_connected(broker_server):
    flags = ("--redis", broker_server.url)
    with Command("interface", "--port", "0", *flags) as interface, Command("worker", APP, *flags) as first:
        address = interface.wait_for(r"accepts on (http://\S+)").group(1)
        sockets = address.replace("http", "ws")
        first.wait_for("runs tests.system.applications")
        with connect(f"{sockets}/echo", open_timeout=60) as early:
            with Command("worker", APP, *flags) as second:
                second.wait_for("runs tests.system.applications")
                pids = set()
                while len(pids) < 2:  # both are asked
                    pids.add(httpx.get(f"{address}/pid", timeout=60).text)
                early.send("still here")
                assert early.recv(timeout=60) == "still here"
                # One goes: what it runs is finished, its WebSockets are told to come again, and come to the other.
                with contextlib.ExitStack() as stack:
                    others = [stack.enter_context(connect(f"{sockets}/echo", open_timeout=60)) for _ in range(8)]
                    slow = [Download(f"{address}/numbers?n=50&pause=0.02") for _ in range(6)]
                    first.process.send_signal(signal.SIGTERM)
                    with pytest.raises(ConnectionClosed):
                        early.recv(timeout=60)
                    assert early.close_code == 1012
                    assert first.wait_ended()[0] == 0
                    for download in slow:  # on both workers
                        assert download.lines() == [str(number) for number in range(50)]
                    stayed = 0
                    for other in others:
                        try:
                            other.send("x")
                            stayed += other.recv(timeout=60) == "x"
                        except ConnectionClosed:
                            assert other.close_code == 1012
                    assert stayed > 0, "none of eight was at the worker that stayed"
                with connect(f"{sockets}/echo", open_timeout=60) as again:
                    again.send("back")
                    assert again.recv(timeout=60) == "back"


class Download:
    """A response that is being read; it has begun when this is made."""

    def __init__(self, url):
        self._lines = []
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(url,))
        self._thread.start()
        assert self._has_begun.wait(20)

    def lines(self):
        self._thread.join(30)
        return self._lines

    def _read(self, url):
        with httpx.stream("GET", url, timeout=60) as answer:
            for line in answer.iter_lines():
                self._lines.append(line)
                self._has_begun.set()
