"""The broker is silent, unreachable or gone, and an interface server is away: who waits, who is told, and what stays.

What is random, and hits open connections from all sides, is in test_chaos.py and tests/soak/; here is each outage by
itself, with its promises.
"""

import asyncio
import contextlib
import os
import signal
import threading
import time

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from channel_layer import Publisher
from tests.proxies import BrokerProxy
from tests.system.processes import Command, Served, wait_until

APP = "tests.system.applications:application"
HANDOVER_APP = "tests.system.handover_application:application"
# What is promised takes 5 s; a machine that does other things may take three times as long.
SLACK = 3


class Stream:
    """A response of numbered lines that is read in a thread."""

    def __init__(self, url):
        self.count = 0
        self.error = None
        self._thread = threading.Thread(target=self._read, args=(url,))
        self._thread.start()
        wait_until(lambda: self.count or self.error, 60, "it has begun")

    def _read(self, url):
        try:
            with httpx.stream("GET", url, timeout=60) as answer:
                for line in answer.iter_lines():
                    assert line == str(self.count)
                    self.count += 1
        except (httpx.HTTPError, AssertionError) as error:
            self.error = error

    def join(self):
        self._thread.join(60)
        if self.error is not None:
            raise self.error
        return self.count


def echo(client, text, timeout_s=60):
    client.send(text)
    assert client.recv(timeout=timeout_s) == text


def test_twenty_seconds_without_the_broker_close_nothing_and_declare_nobody_dead(broker_server):
    flags = ("--redis", broker_server.url, "--workers", "2")
    with Served(APP, *flags) as served:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(f"{served.ws_url}/echo")) for _ in range(10)]
            for client in clients:
                echo(client, "before")
            stream = Stream(f"{served.url}/numbers?n=400&pause=0.02")
            broker_server.pause()
            stopped_at = time.monotonic()
            try:
                for client in clients:
                    client.send("meanwhile")
                # A new request waits for --broker-wait and then for nothing.
                refused = httpx.get(served.url, timeout=60)
                assert refused.status_code == 503
                assert int(refused.headers["retry-after"]) > 0
                assert time.monotonic() - stopped_at < 5 * SLACK
                while time.monotonic() < stopped_at + 20:
                    assert not broker_server.answers()  # which takes a second
            finally:
                broker_server.resume()
            resumed_at = time.monotonic()
            for client in clients:
                assert client.recv(timeout=5 * SLACK) == "meanwhile"
                echo(client, "after")
            assert stream.join() == 400
            assert httpx.get(served.url, timeout=60).text == "hello"
            assert time.monotonic() - resumed_at < 5 * SLACK + 8
        assert "is dead" not in served.output
        assert "lose their application" not in served.output


async def test_connections_that_hang_without_a_reset_are_given_up_and_nothing_is_lost(broker_server):
    async with BrokerProxy(broker_server.socket_path) as proxy:
        await asyncio.to_thread(hang_connections, proxy, broker_server, asyncio.get_running_loop())


def hang_connections(proxy, broker_server, loop):
    with (
        Command("interface", "--port", "0", "--redis", proxy.url) as interface,
        Command("worker", APP, "--redis", broker_server.url) as worker,
    ):
        url = interface.wait_for(r"accepts on (http://\S+)").group(1)
        worker.wait_for("runs")
        with connect(url.replace("http", "ws") + "/echo", open_timeout=60) as client:
            echo(client, "before")
            stream = Stream(f"{url}/numbers?n=600&pause=0.02")
            loop.call_soon_threadsafe(proxy.hang)
            for number in range(20):
                client.send(str(number))
            for number in range(20):
                assert client.recv(timeout=60) == str(number)
            assert stream.join() == 600
        assert proxy.hung_count > 0
        interface.wait_for("reconnecting")
        for command in (interface, worker):
            assert "is dead" not in command.output


def test_an_interface_server_that_was_away_gives_its_clients_to_new_calls(tmp_path):
    """Its workers take it for dead; when it is back, that is as if they had been killed."""
    log = tmp_path / "log"
    with Served(HANDOVER_APP, "--workers", "2") as served:
        url = f"{served.ws_url}/counter?"
        with (
            connect(f"{url}commit=1&group=away&log={log}") as stored,
            connect(f"{url}store=no&log={log}") as bare,
            Publisher(served.redis_url) as publisher,
        ):
            for client in (stored, bare):
                client.send("x")
                assert client.recv(timeout=60).startswith("1 ")
            (interface,) = served.pids("interface server")
            os.kill(interface, signal.SIGSTOP)
            try:
                # Within 5 s both applications are told that their clients are gone.
                wait_until(
                    lambda: log.exists() and log.read_text().count("disconnect 1006") == 2, 5 * SLACK, "they are told"
                )
                stored.send("sent meanwhile")
            finally:
                os.kill(interface, signal.SIGCONT)
            # The client with a checkpoint was never gone: another call goes on from it.
            assert stored.recv(timeout=5 * SLACK).startswith("2 ")
            stored.send("x")
            assert stored.recv(timeout=60).startswith("3 ")
            publisher.group_send("away", {"type": "websocket.send", "text": "still a member"})
            assert stored.recv(timeout=60) == "still a member"
            with pytest.raises(ConnectionClosed):
                bare.recv(timeout=5 * SLACK)
            assert bare.close_code == 1012
        assert httpx.get(f"{served.url}/pid", timeout=60).status_code == 200
