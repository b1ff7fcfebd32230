"""``docker compose up`` for real: the images, the scaling, the balancer. Run by ``make compose-test``."""

import contextlib
import json
import os
import resource
import subprocess
import time

import httpx
import pytest
from websockets.sync.client import connect

from tests.system.processes import ROOT

pytestmark = [
    pytest.mark.docker,
    pytest.mark.skipif(
        not os.environ.get("TRUNKLINE_COMPOSE_TEST"), reason="needs a Docker engine: run by `make compose-test`"
    ),
]


def compose(*argv, **variables):
    command = ["docker", "compose", "--project-name", "trunkline-test", "--profile", "balanced", *argv]
    # The engine may run where the limit of open files is lower than a server's.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    environment = {**os.environ, "NOFILE": str(min(most, 65536) if most > 0 else 65536), **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stack():
    try:
        compose("up", "--build", "--detach", "--wait", "redis", "interface", "worker")
        yield
    finally:
        print(compose("logs", "--tail", "50"))
        compose("down", "--timeout", "5", "--volumes")


def window(port, name):
    return connect(f"ws://127.0.0.1:{port}/rooms/lobby?name={name}&id={name}", open_timeout=60)


def read(client, kind, name):
    while True:
        line = json.loads(client.recv(timeout=60))
        if (line["kind"], line["name"]) == (kind, name):
            return line


def running(service):
    return [line for line in compose("ps", "--quiet", service).splitlines() if line]


def test_the_chat_answers_and_workers_are_scaled_while_clients_are_connected(stack):
    assert "<title>Chat</title>" in httpx.get("http://127.0.0.1:8000/", timeout=60).text
    with window(8000, "ada") as ada:
        read(ada, "here", "ada")
        compose("up", "--detach", "--wait", "--no-recreate", "--scale", "worker=3", "worker")
        assert len(running("worker")) == 3
        with contextlib.ExitStack() as windows:
            guests = [windows.enter_context(window(8000, f"guest{number}")) for number in range(12)]
            # In any order: several workers announce them.
            missing = {f"guest{number}" for number in range(12)}
            while missing:
                line = json.loads(ada.recv(timeout=60))
                if line["kind"] == "joined":
                    missing.discard(line["name"])
            guests[5].send(json.dumps({"kind": "say", "text": "hello from a container"}))
            for client in (ada, *guests):
                assert read(client, "said", "guest5")["text"] == "hello from a container"
        assert ada.close_code is None


def test_several_interface_servers_behind_the_balancer(stack):
    compose("up", "--detach", "--scale", "interface=2", "interface", "balancer", INTERFACE_PORT="0")
    assert len(running("interface")) == 2
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get("http://127.0.0.1:8080/", timeout=60).status_code == 200:
                break
        assert time.monotonic() < deadline, "the balancer does not find the interface servers"
        time.sleep(0.5)
    with contextlib.ExitStack() as windows:
        guests = [windows.enter_context(window(8080, f"g{number}")) for number in range(8)]
        for number, client in enumerate(guests):
            read(client, "here", f"g{number}")
        guests[0].send(json.dumps({"kind": "say", "text": "through the balancer"}))
        for client in guests:
            assert read(client, "said", "g0")["text"] == "through the balancer"
