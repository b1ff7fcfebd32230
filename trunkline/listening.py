"""Binding the listening socket: once, by whoever starts the interface servers.

All interface servers of a command accept from the same socket. (With a socket of their own each, by
SO_REUSEPORT, the kernel hands connections to a process that is frozen, too: half of them hung when measured.)
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from trunkline.options import UsageError

__all__ = ["bind_socket", "describe"]


def bind_socket(
    *, host: str, port: int, uds: str | None, fd: int | None, reuse_port: bool, backlog: int
) -> socket.socket:
    """Return a listening socket. Raises OSError with a text that names the address, or UsageError."""
    if fd is not None:
        try:
            listening = socket.socket(fileno=os.dup(fd))
            accepts = listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise UsageError(f"--fd: {fd} is not a socket: {error.strerror}") from error
        if not accepts:
            listening.listen(backlog)
    elif uds is not None:
        listening = _bind_unix(uds)
        listening.listen(backlog)
    else:
        listening = _bind_tcp(host, port, reuse_port)
        listening.listen(backlog)
    listening.setblocking(False)
    return listening


def _bind_tcp(host: str, port: int, reuse_port: bool) -> socket.socket:
    host = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise UsageError(f"--host: {host!r} is not an address of this machine: {error.strerror}") from error
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6 and host == "::":
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(address)
    except OSError as error:
        listening.close()
        reasons = {
            errno.EADDRINUSE: "the port is taken",
            errno.EACCES: "not allowed to use this port",
            errno.EADDRNOTAVAIL: "not an address of this machine",
        }
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        raise OSError(f"cannot listen on {host}:{port}: {reason}") from error
    return listening


def _bind_unix(path: str) -> socket.socket:
    """A socket file that nobody listens on any more is replaced; any other file is not touched."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            listening.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_abandoned(path):
                raise
            Path(path).unlink()
            listening.bind(path)
        # As uvicorn does: a proxy of another user must be able to connect.
        os.chmod(path, 0o666)
    except OSError as error:
        listening.close()
        taken = error.errno == errno.EADDRINUSE
        raise OSError(f"cannot listen on {path}: {'somebody else does' if taken else error.strerror}") from error
    return listening


def _is_abandoned(path: str) -> bool:
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def describe(listening: socket.socket) -> str:
    """The address as a person types it: a URL, or the path of a unix socket."""
    address = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        return f"unix socket {address}"
    host = f"[{address[0]}]" if listening.family == socket.AF_INET6 else address[0]
    return f"http://{host}:{address[1]}"
