"""Rows of docs/conformance.md that need a command line of their own: unix sockets, proxies, mount points, lifespan
modes, time limits.
"""

import ast
import re
import socket
import time

import httpx
import pytest
from websockets.sync.client import connect, unix_connect

from tests.system.processes import Command, Served, wait_until
from tests.system.test_conformance_websocket import PING, RawClient

APP = "tests.system.conformance_app:application"

LIFESPAN_APP = """
import os

async def application(scope, receive, send):
    # In one write: other processes share the pipe.
    os.write(1, f"called for {scope['type']} {os.getpid()}\\n".encode())
    if scope["type"] == "lifespan":
        raise RuntimeError("no lifespan here")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"served"})
"""


def scope_of(answer):
    return ast.literal_eval(answer.text)


# Where the application is mounted: H8, W5


@pytest.fixture(scope="module")
def mounted():
    with Served(APP, "--root-path", "/mounted", "--no-access-log") as running:
        yield running


def test_the_path_includes_the_root_path(mounted):
    scope = scope_of(httpx.get(mounted.url + "/scope", timeout=60))
    assert (scope["root_path"], scope["path"]) == ("/mounted", "/mounted/scope")
    assert scope["raw_path"] == b"/mounted/scope"
    with connect(mounted.ws_url + "/scope") as client:
        scope = ast.literal_eval(client.recv(timeout=60))
    assert (scope["root_path"], scope["path"]) == ("/mounted", "/mounted/scope")


def test_no_client_can_say_where_the_application_is_mounted(mounted):
    for name in ("Daphne-Root-Path", "Root-Path", "X-Forwarded-Prefix", "Script-Name"):
        assert (
            scope_of(httpx.get(mounted.url + "/scope", headers={name: "/evil"}, timeout=60))["root_path"]
            == "/mounted"
        )


# Behind a proxy: H4, H10, W4, W5

FORWARDED = {"X-Forwarded-For": "203.0.113.9, 192.0.2.1", "X-Forwarded-Proto": "https"}


def test_a_trusted_proxy_names_scheme_and_client():
    with Served(APP, "--forwarded-allow-ips", "127.0.0.1,192.0.2.0/24", "--no-access-log") as running:
        scope = scope_of(httpx.get(running.url + "/scope", headers=FORWARDED, timeout=60))
        assert (scope["scheme"], scope["client"]) == ("https", ("203.0.113.9", 0))
        assert "tls" not in scope["extensions"]  # T1: that is about our socket
        with connect(running.ws_url + "/scope", additional_headers=FORWARDED) as client:
            scope = ast.literal_eval(client.recv(timeout=60))
        assert (scope["scheme"], scope["client"]) == ("wss", ("203.0.113.9", 0))
    with Served(APP, "--forwarded-allow-ips", "192.0.2.7", "--no-access-log") as running:
        scope = scope_of(httpx.get(running.url + "/scope", headers=FORWARDED, timeout=60))
        assert (scope["scheme"], scope["client"][0]) == ("http", "127.0.0.1")


# On a unix socket: H10, H11, W5


def test_addresses_of_a_unix_socket(tmp_path):
    path = tmp_path / "socket"
    with Command("serve", APP, "--uds", str(path), "--no-access-log") as running:
        running.wait_for("serves .* on ")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=60) as client:
            scope = scope_of(client.get("http://x/scope"))
        assert (scope["client"], scope["server"]) == (None, (str(path), None))
        with unix_connect(str(path), "ws://x/scope") as client:
            scope = ast.literal_eval(client.recv(timeout=60))
        assert (scope["client"], scope["server"]) == (None, (str(path), None))


# Lifespan: L1, L5, L6, L9


@pytest.fixture
def failing_app(tmp_path):
    (tmp_path / "failing_lifespan.py").write_text(LIFESPAN_APP)
    return ("failing_lifespan:application", "--app-dir", str(tmp_path))


def test_without_a_flag_an_application_without_lifespan_is_served(failing_app):
    with Served(*failing_app) as running:
        assert httpx.get(running.url, timeout=60).text == "served"
        running.wait_for("called for lifespan")


def test_lifespan_on_makes_its_failure_fatal(failing_app):
    with Command("serve", *failing_app, "--port", "0", "--lifespan", "on") as command:
        status, output = command.wait_ended()
    assert status != 0
    assert "no lifespan here" in output


def test_lifespan_off_calls_nothing(failing_app):
    with Served(*failing_app, "--lifespan", "off") as running:
        assert httpx.get(running.url, timeout=60).text == "served"
        assert "called for lifespan" not in running.output


def test_each_worker_has_a_lifespan_and_a_new_one_when_it_is_replaced(failing_app):
    """The application runs in the workers: one lifespan for each of their loops, and none for interface servers."""
    with Served(*failing_app, "--workers", "2", "--interfaces", "2") as running:
        running.wait_for("called for lifespan", count=2)
        called = re.findall(r"called for lifespan (\d+)", running.output)
        assert sorted(map(int, called)) == sorted(running.pids("worker"))


# Time: A16, W1, W7


@pytest.fixture(scope="module")
def impatient():
    flags = ("--application-close-timeout", "1", "--ws-ping-interval", "1", "--ws-ping-timeout", "4")
    with Served(APP, *flags, "--no-access-log") as running:
        yield running


@pytest.mark.parametrize("target", ["/linger", "/linger?start=1"])
def test_an_application_that_stays_behind_its_client_is_cancelled(impatient, target):
    """It has the time of --application-close-timeout to clean up; the log says where it was then."""
    key = f"linger{len(target)}"
    target += ("&" if "?" in target else "?") + f"key={key}"
    with socket.create_connection(("127.0.0.1", impatient.port), 15) as client:
        client.sendall(f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nab".encode())
        wait_until(lambda: key in httpx.get(impatient.url + "/keys", timeout=60).text, 30, "the instance runs")
        begun = time.monotonic()
    answer = httpx.get(f"{impatient.url}/record?key={key}", timeout=60)
    assert ast.literal_eval(answer.text)[-1] == "cancelled"
    assert time.monotonic() - begun > 0.5
    impatient.wait_for("linger")


def test_a_websocket_client_that_answers_no_ping_is_closed(impatient):
    with RawClient(impatient.port, "/wait?key=mute") as client:
        client.accepted()
        assert client.receive() == (PING, b"")
        # No Close: whoever is silent would not answer it. A reset lets its kernel forget the socket, if there is one.
        with pytest.raises(ConnectionResetError):
            client.rest()
    events = ast.literal_eval(httpx.get(f"{impatient.url}/record?key=mute", timeout=60).text)
    assert events[1] == {"type": "websocket.disconnect", "code": 1006, "reason": "ping timeout"}


def test_a_websocket_client_that_answers_pings_stays(impatient):
    with connect(impatient.ws_url + "/echo") as client:
        time_up = time.monotonic() + 7  # the first ping would have been missed by then
        while time.monotonic() < time_up:
            client.send("x")
            assert client.recv(timeout=60) == "x"
            time.sleep(0.5)
