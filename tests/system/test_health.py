"""Health checks tell the truth: ready is who got a message through the broker just now."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.servers import free_port
from tests.system.processes import Command, Served, wait_until
from tests.system.test_draining import Hanging

APP = "tests.system.applications:application"
TRUNKLINE = str(Path(sys.executable).parent / "trunkline")


def ask(port, path):
    """(status, body) of the admin port; (0, {}) if nothing answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except OSError:
        return 0, {}
    finally:
        connection.close()


def is_ready(port):
    return ask(port, "/readyz")[0] == 200


def health(*argv, env=None):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRUNKLINE_")}
    return subprocess.run(
        [TRUNKLINE, "health", *argv], capture_output=True, text=True, timeout=60, env=environment | (env or {})
    )


def test_a_supervisor_answers_for_its_processes_through_an_outage():
    port = free_port()
    with Served(APP, "--workers", "2", "--admin-port", str(port)) as served:
        wait_until(lambda: is_ready(port), 30, "everything is ready")
        assert ask(port, "/readyz")[1] == {
            "ready": True,
            "processes": {"interface server 1": "ready", "worker 1": "ready", "worker 2": "ready"},
        }
        assert health("--admin-port", str(port)).returncode == 0
        broker = served.broker_pid()
        os.kill(broker, signal.SIGSTOP)
        try:
            began_at = time.monotonic()
            wait_until(lambda: not is_ready(port), 45, "not ready any more")
            assert time.monotonic() - began_at < 15  # promised: within 5 s
            assert ask(port, "/healthz") == (200, {"alive": True})
            asked = health("--admin-port", str(port))
            assert asked.returncode == 1
            assert "broker" in asked.stdout
            assert health("live", env={"TRUNKLINE_ADMIN_PORT": str(port)}).returncode == 0
        finally:
            os.kill(broker, signal.SIGCONT)
        wait_until(lambda: is_ready(port), 60, "ready again")
        os.kill(broker, signal.SIGKILL)
        served.wait_for("broker was ended by SIGKILL; starting another")
        wait_until(lambda: is_ready(port), 60, "ready with the new broker")
        # A frozen worker says nothing, and the supervisor says so.
        frozen = served.pids("worker")[0]
        os.kill(frozen, signal.SIGSTOP)
        wait_until(lambda: "says nothing" in str(ask(port, "/readyz")[1]), 45, "the frozen worker shows")
        os.kill(frozen, signal.SIGCONT)
        wait_until(lambda: is_ready(port), 60, "ready when it is back")
    assert ask(port, "/healthz")[0] == 0
    assert health("--admin-port", str(port)).returncode == 1


def test_single_processes_answer_for_themselves_and_are_not_ready_while_they_drain(broker_server):
    ports = {"interface": free_port(), "worker": free_port()}
    redis = ("--redis", broker_server.url)
    with (
        Command("interface", "--port", "0", "--admin-port", str(ports["interface"]), *redis) as interface,
        Command("worker", APP, "--admin-port", str(ports["worker"]), *redis) as worker,
    ):
        url = interface.wait_for(r"accepts on (http://\S+)").group(1)
        for port in ports.values():
            wait_until(lambda port=port: is_ready(port), 60, "ready")
        answer = ask(ports["interface"], "/readyz")[1]
        assert (answer["workers_known"], answer["requests_waiting"], answer["longest_wait_s"]) == (0, 0, 0.0)
        hanging = Hanging(f"{url}/hang")
        hanging.start()
        worker.wait_for("hang. has begun")
        wait_until(lambda: ask(ports["interface"], "/readyz")[1].get("workers_known") == 1, 60, "the worker is known")
        broker_server.kill()
        for port in ports.values():
            wait_until(lambda port=port: not is_ready(port), 45, "the outage shows")
            assert ask(port, "/healthz")[0] == 200
        broker_server.start()
        for port in ports.values():
            wait_until(lambda port=port: is_ready(port), 60, "ready again")
        interface.process.send_signal(signal.SIGTERM)
        wait_until(lambda: ask(ports["interface"], "/readyz")[0] == 503, 10, "not ready as soon as it drains")
        assert ask(ports["interface"], "/readyz")[1]["processes"] == {"interface server": "draining"}
        assert ask(ports["worker"], "/readyz")[0] == 200
        interface.process.send_signal(signal.SIGTERM)  # enough
        hanging.join(20)


def test_wrong_use_of_health_is_one_line():
    asked = health()
    assert (asked.returncode, asked.stdout) == (2, "")
    assert asked.stderr == (
        "trunkline health: --admin-port PORT (or TRUNKLINE_ADMIN_PORT) of a command is expected\n"
    )
    asked = health("--admin-port", str(free_port()))
    assert (asked.returncode, asked.stdout) == (1, "")
    assert asked.stderr.startswith("trunkline: nothing answers on 127.0.0.1:")
    asked = health("--admin-port", "1", "--admin-host", "a..b")
    assert (asked.returncode, asked.stdout) == (1, "")
    assert asked.stderr.startswith("trunkline: nothing answers on a..b:1: ")
    assert asked.stderr.count("\n") == 1


def test_health_of_something_else_is_one_line():
    """A number that is mistaken for the admin port's: the application's own, say."""
    with Served(APP) as served:
        port = served.port
        asked = health("--admin-port", str(port))
    assert (asked.returncode, asked.stdout, asked.stderr) == (
        1,
        "",
        f"trunkline: what answers on 127.0.0.1:{port} is not an admin port of Trunkline\n",
    )


@pytest.mark.parametrize(
    "argv", [("serve", APP, "--port", "0"), ("worker", APP), ("interface", "--port", "0")], ids=lambda argv: argv[0]
)
def test_a_taken_admin_port_is_one_line(argv, broker_server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Command(*argv, "--redis", broker_server.url, "--admin-port", str(port)) as command:
            status, output = command.wait_ended()
    assert (status, output.lower()) == (
        1,
        f"trunkline: cannot listen on the admin port 127.0.0.1:{port}: address already in use",
    )
