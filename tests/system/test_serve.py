"""``trunkline serve`` and the two halves as a user starts, stops, breaks and misuses them."""

import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.servers import free_port
from tests.system.processes import ROOT, Command, Served, children_of, is_alive, wait_until

APP = "tests.system.applications:application"


@pytest.fixture(scope="module")
def served():
    with Served(APP, "--workers", "2") as running:
        yield running


def test_hello(served):
    answer = httpx.get(served.url, timeout=60)
    assert (answer.status_code, answer.text) == (200, "hello")
    assert answer.headers["server"] == "trunkline"


def test_access_log_names_request_status_and_time(served):
    httpx.get(served.url + "/nowhere?a=%0a", timeout=60)
    served.wait_for(r'INFO: +127\.0\.0\.1:\d+ - "GET /nowhere\?a=%0a HTTP/1\.1" 404 .*\d+\.\d+ ?ms')
    with connect(served.ws_url + "/echo") as client:
        client.send("x")
        assert client.recv(timeout=60) == "x"
    served.wait_for(r'"WebSocket /echo" \[accepted\]')
    served.wait_for(r'"WebSocket /echo" \[closed 1000\]')


def test_an_error_of_the_application_is_logged_once_and_answered(served):
    assert httpx.get(served.url + "/fail", timeout=60).status_code == 500
    served.wait_for("RuntimeError: this application fails on purpose")
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(served.url + "/fail-later", timeout=60)
    with connect(served.ws_url + "/fail") as client:
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=60)
        assert client.close_code == 1011


def test_ctrl_c_ends_everything_with_status_0():
    running = Served(APP)
    pids = [pid for pid, _ in children_of(running.process.pid)]
    assert len(pids) == 3  # broker, interface server, worker
    assert running.stop() == 0
    assert not any(is_alive(pid) for pid in pids)
    assert not os.path.exists(running.redis_url.removeprefix("unix://"))
    assert "Traceback" not in running.output


def test_no_child_survives_a_killed_supervisor():
    running = Served(APP, "--interfaces", "2", "--workers", "2")
    pids = [pid for pid, _ in children_of(running.process.pid)]
    assert len(pids) == 5
    running.process.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in pids), 30, "the children end")
    running.stop()


@pytest.mark.parametrize("role", ["worker", "interface server", "broker"])
def test_a_dead_process_is_replaced(role):
    with Served(APP) as running:
        pid = running.broker_pid() if role == "broker" else running.pids(role)[0]
        os.kill(pid, signal.SIGKILL)
        running.wait_for(rf"{role}( 1)? was ended by SIGKILL; starting another")

        def answers():
            try:
                return httpx.get(running.url, timeout=60).status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(answers, 45, "requests are answered again")


def test_a_killed_worker_costs_its_requests_a_502_and_its_sockets_a_1012():
    with Served(APP) as running, httpx.Client(base_url=running.url, timeout=60) as client:
        with connect(running.ws_url + "/echo") as socket_client:
            socket_client.send("x")
            assert socket_client.recv(timeout=60) == "x"
            with socket.create_connection(("127.0.0.1", running.port)) as hanging:
                hanging.settimeout(60)
                hanging.sendall(b"POST /hang HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
                running.wait_for(r"hang\? has begun")
                assert client.get("/").status_code == 200
                os.kill(running.pids("worker")[0], signal.SIGKILL)
                assert hanging.recv(4096).startswith(b"HTTP/1.1 502 ")
            with pytest.raises(ConnectionClosed):
                socket_client.recv(timeout=60)
            assert socket_client.close_code == 1012


def test_reload_restarts_the_workers_and_nothing_else(tmp_path):
    source = tmp_path / "main.py"
    text = (ROOT / "examples" / "hello.py").read_text("utf-8")
    source.write_text(text)
    with Served("main:application", "--reload", cwd=tmp_path) as running:
        interface = running.pids("interface server")
        assert httpx.get(running.url, timeout=60).text == "Hello, world!\n"
        source.write_text(text.replace("world", "moon"))
        wait_until(lambda: httpx.get(running.url, timeout=60).text == "Hello, moon!\n", 60, "the change shows")
        assert running.pids("interface server") == interface
        source.write_text("def what is this\n")
        running.wait_for("SyntaxError")
        running.wait_for("worker 1 could not start; waiting for a file to change")
        source.write_text(text)
        wait_until(lambda: httpx.get(running.url, timeout=60).text == "Hello, world!\n", 90, "the mended file shows")


@pytest.mark.parametrize("name", ["worker", "interface_server"])
def test_an_application_may_have_a_module_of_our_name(tmp_path, name):
    (tmp_path / f"{name}.py").write_text((ROOT / "examples" / "hello.py").read_text("utf-8"))
    with Served(f"{name}:application", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}) as running:
        assert httpx.get(running.url, timeout=60).text == "Hello, world!\n"


def taken_port():
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    return listening


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        (["serve"], 2, "APP is expected"),
        (["serve", "no.such.module:app"], 2, "no.such.module"),
        (["serve", "examples.hello:applikation"], 2, "applikation"),
        (["serve", "examples.hello:__doc__"], 2, "callable"),
        (["serve", "examples.hello"], 2, "examples.hello"),
        (["serve", "examples.hello:application", "--port", "x"], 2, "--port: 'x' is not valid"),
        (["serve", "examples.hello:application", "--redis", "redis://127.0.0.1:1"], 1, "127.0.0.1:1"),
        (["worker", "examples.hello:application", "--redis", "redis://127.0.0.1:1"], 1, "127.0.0.1:1"),
        (["interface", "--port", "0", "--redis", "redis://127.0.0.1:1"], 1, "127.0.0.1:1"),
        (["worker", "examples.hello:application", "--redis", "http://127.0.0.1"], 2, "http://127.0.0.1"),
        (["interface", "--port", "0"], 2, "--redis URL"),
    ],
)
def test_wrong_input_is_one_line_and_a_status(argv, status, text):
    with Command(*argv) as command:
        assert command.wait_ended()[0] == status, command.output
        lines = [line for line in command.output.splitlines() if line and not line.startswith("INFO")]
        assert len(lines) == 1, command.output
        assert text in lines[0]


@pytest.mark.parametrize("reference", ["examples.hello", "nosuchmodule:app", "examples.hello:applikation"])
def test_a_reference_that_is_wrong_for_certain_is_told_before_anything_is_started(reference):
    with Command("serve", reference, "--port", "0", "--workers", "2") as command:
        assert command.wait_ended()[0] == 2
        assert len(command.output.splitlines()) == 1


def test_a_variable_that_means_nothing_is_told_once():
    with Served("examples.hello:application", env={"TRUNKLINE_WORKER": "3"}) as served:
        line = (
            "the environment variable TRUNKLINE_WORKER means nothing to this release, did you mean TRUNKLINE_WORKERS?"
        )
        assert served.output.count(line) == 1


def test_a_taken_port_is_one_line():
    with taken_port() as listening:
        port = listening.getsockname()[1]
        with Command("serve", APP, "--port", str(port)) as command:
            status, output = command.wait_ended()
        assert status == 1
        assert output.lower() == f"trunkline: cannot listen on 127.0.0.1:{port}: address already in use"


def test_the_address_may_be_given_as_variables():
    """Those of the processes that bind nothing themselves stand in the same environment."""
    port = free_port()
    variables = {
        "TRUNKLINE_HOST": "127.0.0.1",
        "TRUNKLINE_PORT": str(port),
        "TRUNKLINE_CHANNEL": "of-another-command",
    }
    with Command("serve", APP, env=variables) as command:
        command.wait_for(rf"serves \S+ on http://127\.0\.0\.1:{port} \(Ctrl-C")
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=60).text == "hello"


def test_several_interface_servers_share_a_unix_socket_that_is_given_as_variables(broker_server, tmp_path):
    flags = ("--redis", broker_server.url, "--prefix", "variables")
    variables = {
        "TRUNKLINE_UDS": "http",
        "TRUNKLINE_UDS_PERMISSIONS": "660",
        "TRUNKLINE_FORWARDED_ALLOW_IPS": "http",
        "TRUNKLINE_INTERFACES": "2",
    }
    with (
        Command("worker", APP, *flags),
        Command("interface", *flags, cwd=tmp_path, env=variables) as interface,
    ):
        interface.wait_for(r"2 interface servers")
        assert (tmp_path / "http").stat().st_mode & 0o777 == 0o660
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(tmp_path / "http")), timeout=60) as client:
            assert client.get("http://x/").text == "hello"


def test_the_halves_by_themselves(broker_server):
    """Two commands that share nothing but the broker; ``python -m`` is the same door."""
    flags = ("--redis", broker_server.url, "--prefix", "halves")
    with (
        Command("worker", APP, *flags) as worker,
        Command("interface", "--uds", f"{broker_server.directory}/http", *flags) as interface,
    ):
        transport = httpx.HTTPTransport(uds=f"{broker_server.directory}/http")
        interface.wait_for(r"accepts on unix:")
        with httpx.Client(transport=transport, timeout=60) as client:
            assert client.get("http://x/").text == "hello"
        assert worker.stop() == 0
        assert interface.stop() == 0
    for module in ("worker", "interface_server"):
        shown = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        assert "--redis URL" in shown.stdout


def test_log_config_and_header_flags(tmp_path):
    path = tmp_path / "log.json"
    handler = {"class": "logging.FileHandler", "filename": str(tmp_path / "log")}
    path.write_text(
        json.dumps(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "handlers": {"file": handler, "err": {"class": "logging.StreamHandler"}},
                "root": {"handlers": ["file", "err"], "level": "INFO"},
            }
        )
    )
    flags = ("--log-config", str(path), "--header", "X-Served-By: us", "--no-server-header")
    with Served(APP, *flags) as running:
        answer = httpx.get(running.url, timeout=60)
        assert answer.headers["x-served-by"] == "us"
        assert "server" not in answer.headers
        wait_until(lambda: '"GET / HTTP/1.1" 200' in (tmp_path / "log").read_text(), 30, "the access log line")


def test_a_socket_that_systemd_opened_is_served_without_a_flag():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        # As systemd does it: the socket is descriptor 3 of the process that it starts.
        code = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3)\n"
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n"
            "os.execv(sys.argv[2], sys.argv[2:])"
        )
        trunkline = f"{os.path.dirname(sys.executable)}/trunkline"
        command = subprocess.Popen(
            [sys.executable, "-c", code, str(listening.fileno()), trunkline, "serve", APP],
            cwd=ROOT,
            pass_fds=(listening.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            # It listens already, so this waits until somebody accepts.
            assert httpx.get(f"http://127.0.0.1:{port}/", timeout=60).text == "hello"
        finally:
            command.send_signal(signal.SIGINT)
            assert command.wait(30) == 0
