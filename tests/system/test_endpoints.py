"""Several sockets at once, in Twisted's words: each process serves all of them."""

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time

import httpx
import pytest

from tests.certificates import Authority
from tests.servers import free_port
from tests.system.processes import ROOT, Command, Served, wait_until

APP = "tests.system.applications:application"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("endpoints"))
    authority.issue("server")
    return authority


@pytest.mark.parametrize("interfaces", ["1", "2"])
def test_tcp_ssl_and_unix_beside_a_port(authority, tmp_path, interfaces):
    plain, tls, path = free_port(), free_port(), tmp_path / "app.sock"
    files = f"privateKey={authority.directory / 'server.key'}:certKey={authority.directory / 'server.pem'}"
    flags = (
        *("-e", f"tcp:{plain}:interface=127.0.0.1", "--endpoint", f"ssl:{tls}:interface=127.0.0.1:{files}"),
        *("-e", f"unix:{path}:mode=600", "--interfaces", interfaces),
    )
    with Served(APP, *flags) as served:
        context = ssl.create_default_context(cafile=authority.path)
        for _ in range(5):
            for port in (served.port, plain):
                scope = httpx.get(f"http://127.0.0.1:{port}/scope", timeout=60).json()
                assert (scope["scheme"], scope["server"]) == ("http", ["127.0.0.1", port])
            scope = httpx.get(f"https://localhost:{tls}/scope", verify=context, timeout=60).json()
            assert (scope["scheme"], scope["server"][1]) == ("https", tls)
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=60) as client:
                assert client.get("http://x/scope").json()["server"] == [str(path), None]
        assert path.stat().st_mode & 0o777 == 0o600
        assert f"http://127.0.0.1:{plain} and https://127.0.0.1:{tls} and unix:{path}" in served.output
    assert not path.exists()


class Upload:
    """A request on a unix socket that has begun, and lasts until ``finish``."""

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._received = self._socket.makefile("rb")
        self._socket.sendall(
            b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nConnection: close\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert self._received.readline() == b"HTTP/1.1 100 Continue\r\n", "the application waits for the body"
        assert self._received.readline() == b"\r\n"

    def finish(self):
        self._socket.sendall(b"body")
        response = self._received.read()
        self.close()
        assert response.startswith(b"HTTP/1.1 200 ")
        assert b'"bytes": 4' in response

    def close(self):
        self._received.close()
        self._socket.close()


@contextlib.contextmanager
def frozen(pid):
    """Meanwhile the others do its work."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: state(pid) == "T", 30, "it is stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def can_connect(path):
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def upload_to_each(path, pids):
    """A request in flight in each of two processes."""
    while True:
        began = time.monotonic()
        uploads = []
        for other in pids:
            with frozen(other):
                uploads.append(Upload(path))
        if time.monotonic() - began < 1.5:
            return uploads
        # A process that finds that it was away for longer than its lease gives up what it has in hand.
        for upload in uploads:
            upload.close()


@pytest.mark.parametrize("flag", ["--uds={}", "--endpoint=unix:{}"])
def test_requests_of_all_processes_on_a_unix_socket_finish(tmp_path, flag):
    path = tmp_path / "app.sock"
    with Command("serve", APP, flag.format(path), "--interfaces=2", "--drain-timeout=60") as served:
        pids = [int(pid) for pid in served.wait_for(r"2 interface servers \(pid (\d+), (\d+)\)").groups()]
        uploads = upload_to_each(path, pids)
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not can_connect(path), 30, "nobody listens")
        assert served.process.poll() is None
        for upload in uploads:
            upload.finish()
        status, output = served.wait_ended()
        assert status == 0, output
    assert not path.exists()


def test_a_unix_socket_outlives_one_of_its_processes(tmp_path):
    path = tmp_path / "app.sock"
    with Command("serve", APP, "--uds", str(path), "--interfaces=2") as served:
        ended, other = map(int, served.wait_for(r"2 interface servers \(pid (\d+), (\d+)\)").groups())
        os.kill(ended, signal.SIGTERM)
        served.wait_for(r"starting another")
        Upload(path).finish()
        served.wait_for(r"accepts on unix:", count=3)
        with frozen(other):  # so the new one serves
            Upload(path).finish()


@pytest.mark.parametrize("command", ["serve", "interface"])
def test_a_unix_socket_of_a_successor_stays(broker_server, tmp_path, command):
    """The one before drains, and ends behind the start of the other."""
    path = tmp_path / "app.sock"
    common = ("--redis", broker_server.url)
    flags = (command, *([APP] if command == "serve" else []), "--uds", str(path), "--drain-timeout=60", *common)
    with Command("worker", APP, *common) as worker, Command(*flags) as old:
        worker.wait_for("runs tests.system.applications")
        old.wait_for("accepts on unix:")
        upload = Upload(path)
        old.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not can_connect(path), 30, "nobody listens")
        with Command(*flags) as new:
            new.wait_for("accepts on unix:")
            upload.finish()
            status, output = old.wait_ended()
            assert status == 0, output
            Upload(path).finish()
        assert not path.exists()


def test_endpoints_alone_take_the_place_of_the_default_address():
    port = free_port()
    with Command("serve", APP, "-e", f"tcp:{port}:interface=127.0.0.1") as served:
        served.wait_for(rf"serves \S+ on http://127\.0\.0\.1:{port} \(Ctrl-C")
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=60).text == "hello"


def test_in_the_environment():
    ports = [free_port(), free_port()]
    endpoints = "\n".join(f"tcp:{port}:interface=127.0.0.1" for port in ports)
    with Command("serve", APP, env={"TRUNKLINE_ENDPOINT": endpoints}) as served:
        served.wait_for("Ctrl-C")
        for port in ports:
            assert httpx.get(f"http://127.0.0.1:{port}/", timeout=60).text == "hello"


def test_certificates_of_endpoints_are_read_again(authority, tmp_path):
    port, directory = free_port(), authority.directory
    files = [tmp_path / name for name in ("server.pem", "server.key")]
    for file in files:
        file.write_bytes((directory / file.name).read_bytes())
    endpoint = f"ssl:{port}:interface=127.0.0.1:privateKey={files[1]}:certKey={files[0]}"
    with Command("serve", APP, "-e", endpoint) as served:
        served.wait_for("Ctrl-C")
        first = ssl.get_server_certificate(("127.0.0.1", port))
        authority.issue("server")
        for file in files:
            file.write_bytes((directory / file.name).read_bytes())
        os.kill(served.process.pid, 1)
        served.wait_for("read the certificate")
        assert ssl.get_server_certificate(("127.0.0.1", port)) != first


@pytest.mark.parametrize(
    ("endpoint", "text", "status"),
    [
        ("onion:80", "sockets of the kind 'onion' cannot be shared by processes; known are", 2),
        ("ssl:0:privateKey=/nowhere.pem", "the certificate /nowhere.pem cannot be read", 2),
        ("tcp:0:interface=203.0.113.1", "cannot listen on 203.0.113.1:0", 1),
        ("systemd:domain=INET:index=0", "systemd handed over 0 sockets", 1),
    ],
)
def test_what_cannot_be_is_one_line(endpoint, text, status):
    with Command("serve", APP, "-e", endpoint) as command:
        ended, output = command.wait_ended()
    assert ended == status, output
    (line,) = [line for line in output.splitlines() if line.startswith("trunkline: ")]
    assert text in line


def test_sockets_of_systemd():
    """As its manager hands them over: descriptors from 3 on, named in the environment of that very process."""
    script = (
        "import os, sys\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2', LISTEN_FDNAMES='web:admin')\n"
        "os.dup2(int(sys.argv[1]), 103); os.dup2(int(sys.argv[2]), 104)\n"
        "os.dup2(103, 3); os.dup2(104, 4)\n"
        "os.execv(sys.argv[3], sys.argv[3:])\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [listening.getsockname()[1] for listening in (first, second)]
        descriptors = (first.fileno(), second.fileno())
        program = os.path.join(os.path.dirname(sys.executable), "trunkline")
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", script, *map(str, descriptors), program, "serve", APP),
                *("-e", "systemd:domain=INET:index=0", "-e", "systemd:domain=INET:name=admin"),
            ],
            pass_fds=descriptors,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            for line in process.stdout:
                if "Ctrl-C" in line:
                    break
            assert [httpx.get(f"http://127.0.0.1:{port}/", timeout=60).text for port in ports] == ["hello", "hello"]
        finally:
            process.terminate()
            process.communicate(timeout=60)
