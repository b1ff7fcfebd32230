"""The servers of the comparison: how each is started with the probe application, and ended.

Every server runs as it is installed, with one worker process, and with its access log off so that the log shows
errors only. To add one: an entry in ``SERVERS``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import ServerProcess, free_port

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Kind:
    """A server and its command line, with {port} and {application}."""

    name: str
    package: str
    command: tuple[str, ...]
    pings: tuple[str, ...] | None = None  # flags for a PING every second

    def start(
        self,
        *flags: str,
        application: str = "application",
        environment: Mapping[str, str] = {},
        wait: bool = True,
    ) -> AbstractContextManager[RunningServer]:
        return running(self, flags, application, environment, wait)


SERVERS = [
    Kind(
        "Trunkline",
        "trunkline",
        ("trunkline", "serve", "--app-dir", str(HERE), "--port", "{port}", "--no-access-log", "{application}"),
        ("--ws-ping-interval", "1"),
    ),
    Kind(
        "Daphne",
        "daphne",
        ("daphne", "-b", "127.0.0.1", "-p", "{port}", "--access-log", "/dev/null", "{application}"),
        ("--ping-interval", "1"),
    ),
    Kind(
        "uvicorn",
        "uvicorn",
        ("uvicorn", "--port", "{port}", "--no-access-log", "{application}"),
        ("--ws-ping-interval", "1"),
    ),
    Kind(
        "hypercorn",
        "hypercorn",
        ("hypercorn", "-b", "127.0.0.1:{port}", "{application}"),
        ("--websocket-ping-interval", "1"),
    ),
    Kind(
        "granian",
        "granian",
        ("granian", "--interface", "asgi", "--port", "{port}", "--no-access-log", "{application}"),
    ),
]


class RunningServer:
    """A server process; its log is what it has written so far."""

    def __init__(self, process: ServerProcess, port: int) -> None:
        self.process = process
        self.port = port

    def log(self) -> str:
        return Path(f"/proc/self/fd/{self.process.log.fileno()}").read_bytes().decode("utf-8", "replace")

    def terminate(self) -> None:
        self.process.process.terminate()

    def wait_ended(self, timeout_s: float) -> bool:
        try:
            self.process.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


@contextmanager
def running(
    kind: Kind, flags: Sequence[str], application: str, environment: Mapping[str, str], wait: bool
) -> Iterator[RunningServer]:
    port = free_port()
    words = [
        word.format(port=port, application=f"probe_application:{application}") for word in (*kind.command[1:], *flags)
    ]
    program = Path(sys.executable).parent / kind.command[0]
    process = ServerProcess(
        [str(program), *words],
        environment={
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            **environment,
        },
        port=port,
    )
    try:
        if wait:
            process.wait_until_it_serves()
        yield RunningServer(process, port)
    finally:
        process.stop()
