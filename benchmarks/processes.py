"""Servers under measurement: starting them, reading what they used, and leaving nothing behind.

``ServerProcess`` is one command with everything it starts; CPU and memory are read from /proc for the whole tree.
``LoadClient`` is one run of the C client. What is measured with them is in bench.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["LoadClient", "ServerProcess", "free_port", "run_broker"]

HERE = Path(__file__).resolve().parent
CLIENT = HERE / "load"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _read_stat(pid: int) -> tuple[int, int, int] | None:
    """Parent, CPU ticks (user and system) and resident pages of a process; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[1]), int(fields[11]) + int(fields[12]), int(fields[21])


class ServerProcess:
    """One command, started in the constructor. ``stop()`` ends it and everything it started, always."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], port: int | None) -> None:
        self.port = port
        self.command = command
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - stop() closes it
        self.process = subprocess.Popen(
            command,
            cwd=HERE,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    def __repr__(self) -> str:
        return f"<ServerProcess {' '.join(self.command)}, pid {self.process.pid}>"

    def wait_until_it_serves(self) -> None:
        """Return when a request is answered with 200 or 404. RuntimeError with the server's output if it never is."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port or 0), 5) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                if client.recv(100).split(b" ")[1:2] and self.process.poll() is None:
                    return
            time.sleep(0.05)  # servers have no common way to say that they listen
        raise RuntimeError(f"{self!r} does not answer:\n{self.output()}")

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode("utf-8", "replace")[-4000:]

    def tree(self) -> dict[int, tuple[int, int, int]]:
        """What /proc says of the process and all its descendants."""
        every = {
            int(name): stat for name in os.listdir("/proc") if name.isdigit() and (stat := _read_stat(int(name)))
        }
        found: dict[int, tuple[int, int, int]] = {}
        grown = [self.process.pid]
        while grown:
            pid = grown.pop()
            if pid in every:
                found[pid] = every[pid]
            grown += [child for child, stat in every.items() if stat[0] == pid]
        return found

    def roles(self) -> dict[int, str]:
        """What each process of the tree is, as far as its command line tells."""
        names = {}
        for pid in self.tree():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                line = " ".join(words)
                if "valkey" in words[0] or "redis-server" in words[0]:
                    names[pid] = "broker"
                elif "trunkline" not in line:
                    names[pid] = "server"
                else:
                    names[pid] = next((word for word in ("interface", "worker") if word in words), "supervisor")
        return names

    def cpu_s(self) -> dict[int, float]:
        return {pid: ticks / TICKS_PER_S for pid, (_, ticks, _) in self.tree().items()}

    def resident_bytes(self) -> dict[int, int]:
        return {pid: pages * PAGE_BYTES for pid, (_, _, pages) in self.tree().items()}

    def stop(self) -> None:
        pids = list(self.tree())
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
        for pid in pids:  # what ended is gone; a pid is not used again within these seconds
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


class LoadClient:
    """One run of the C client, in step with its measurer: ``wait_ready``, ``work``, then the end of the context."""

    def __init__(self, mode: str, port: int, path: str, *numbers: float) -> None:
        self.process = subprocess.Popen(
            [str(CLIENT), mode, "127.0.0.1", str(port), path, *(f"{number:g}" for number in numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            preexec_fn=_die_with_parent,
        )

    def __enter__(self) -> LoadClient:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load client ended with status {self.process.wait()}")
        return line

    def wait_ready(self) -> None:
        self._line()

    def work(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        return dict(json.loads(self._line()))


@contextlib.contextmanager
def run_broker() -> Iterator[tuple[str, ServerProcess]]:
    """A broker for the peers: the same program, with the same options, as ``trunkline serve`` embeds."""
    from trunkline.broker import EmbeddedBroker, find_server

    broker = EmbeddedBroker(find_server())
    process = ServerProcess(broker.command_line(), environment={}, port=None)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not broker.answers():
            if process.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the broker does not answer:\n{process.output()}")
            time.sleep(0.01)
        yield broker.url, process
    finally:
        process.stop()
        broker.remove()


if sys.platform != "linux":
    raise SystemExit("the benchmarks read /proc: they run on Linux")
