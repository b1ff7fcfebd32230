"""The sockets that clients connect to: inherited, bound to an address, or unix sockets.

Under ``trunkline serve`` and ``trunkline interface`` the roof binds it and hands it down (``fd``); binding by
ourselves is for whoever runs a single interface server from Python.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from channel_layer.admin import explain_listen_error
from interface_server.endpoints import Endpoint, parse_endpoint, render_adopted
from interface_server.settings import InterfaceSettings

__all__ = [
    "UNSENT_BYTES_MAX",
    "Listener",
    "activated_descriptor",
    "adopt",
    "describe",
    "describe_all",
    "open_listeners",
    "open_listening_socket",
]

# What the kernel takes of a response before it can be sent; what is on its way to the client does not count. The rest
# waits with us, within its windows. The kernel's own limit is 3 MB and more for each socket: fifty clients that asked
# for much and read nothing had us move 170 MB at once, and an answer to anybody else stood behind that for 0.2 s.
UNSENT_BYTES_MAX: Final = 256 * 1024

_FIRST_DESCRIPTOR: Final = 3  # SD_LISTEN_FDS_START


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A listening socket, and what is spoken on it."""

    socket: socket.socket
    certfile: str | None  # None: no TLS
    keyfile: str | None
    path: str | None = None  # of a unix socket that we made
    file: tuple[int, int, int] | None = None  # which of that name

    @property
    def is_tls(self) -> bool:
        return self.certfile is not None

    def render_adopted(self) -> str:
        """The endpoint as which another process, which has inherited the socket, listens on it."""
        return render_adopted(self.socket.fileno(), self.certfile, self.keyfile)

    def remove_file(self) -> None:
        """Remove the file of a unix socket that we made, unless it is gone, or our successor has its own there."""
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                if _identify_file(self.path) == self.file:
                    os.unlink(self.path)


def open_listeners(settings: InterfaceSettings) -> list[Listener]:
    """Return all sockets to listen on, one at least. Raises OSError whose text names the address."""
    with contextlib.ExitStack() as opened:
        listeners = []
        if not settings.endpoints_only:
            own = opened.enter_context(open_listening_socket(settings))
            path = settings.uds if settings.fd is None else None
            listeners.append(_listener(own, settings.ssl_certfile, settings.ssl_keyfile, path))
        for text in settings.endpoints:
            endpoint = parse_endpoint(text)
            listening = opened.enter_context(_open_endpoint(endpoint, settings))
            listeners.append(_listener(listening, endpoint.certfile, endpoint.keyfile, endpoint.path))
        opened.pop_all()
    return listeners


def _listener(listening: socket.socket, certfile: str | None, keyfile: str | None, path: str | None) -> Listener:
    file = None if path is None else _identify_file(path)
    return Listener(socket=listening, certfile=certfile, keyfile=keyfile, path=path, file=file)


def _identify_file(path: str) -> tuple[int, int, int]:
    # The number of a file that is gone may be given to the next one. Connecting and chmod leave the time alone.
    status = os.lstat(path)
    return status.st_dev, status.st_ino, status.st_mtime_ns


def adopt(reactor: Any, listening: socket.socket, factory: Any) -> Any:
    """Have Twisted accept from a copy of ``listening``; return its port.

    As adoptStreamPort of its reactors, but that listens again, for 50 connections, and opens a unix socket to
    everybody (666), whatever whoever made the socket wanted.
    """
    from interface_server.ports import TcpPort, UnixPort

    if listening.family != socket.AF_UNIX and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        # Whom we accept inherits it.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)
    port: Any
    if listening.family == socket.AF_UNIX:
        port = UnixPort._fromListeningDescriptor(reactor, listening.fileno(), factory)  # type: ignore[no-untyped-call]
        path = listening.getsockname()
        if isinstance(path, str) and path:
            port.mode = stat.S_IMODE(os.stat(path).st_mode)
    else:
        port = TcpPort._fromListeningDescriptor(reactor, listening.fileno(), listening.family, factory)  # type: ignore[no-untyped-call]
    port._preexistingSocket = _Listening(fileno=port._preexistingSocket.detach())
    port.startListening()
    return port


class _Listening(socket.socket):
    def listen(self, backlog: int = 0) -> None:
        """It does already."""


def describe_all(listeners: Sequence[Listener]) -> str:
    """All addresses in words."""
    return " and ".join(describe(listener.socket, tls=listener.is_tls) for listener in listeners)


def _open_endpoint(endpoint: Endpoint, settings: InterfaceSettings) -> socket.socket:
    if endpoint.fd is not None:
        return _take_over(endpoint.fd)
    fd = None if endpoint.domain is None else _find_activated(endpoint)
    listening = open_listening_socket(
        replace(
            settings,
            fd=fd,
            uds=endpoint.path,
            uds_permissions=endpoint.mode or settings.uds_permissions,
            host=endpoint.host,
            port=endpoint.port or 0,
            backlog=endpoint.backlog or settings.backlog,
        )
    )
    if endpoint.domain is not None and listening.family.name != f"AF_{endpoint.domain.upper()}":
        listening.close()
        raise OSError(f"endpoint {endpoint.text!r}: the socket of systemd is of the kind {listening.family.name[3:]}")
    return listening


def _take_over(fd: int) -> socket.socket:
    """The socket of our supervisor, which listens already. Not a copy: that would listen on while we drain."""
    try:
        listening = socket.socket(fileno=fd)
    except OSError as error:
        raise OSError(f"cannot listen on file descriptor {fd}: {os.strerror(error.errno or 0)}") from error
    listening.set_inheritable(False)
    return listening


def _find_activated(endpoint: Endpoint) -> int:
    """The descriptor of one of systemd's sockets (sd_listen_fds_with_names(3))."""
    # Twisted has read systemd's variables, and removed them, when its parser was imported.
    from twisted.internet.endpoints import _SystemdParser

    inherited = _SystemdParser._sddaemon
    descriptors = inherited.inheritedDescriptors()
    if endpoint.name is not None:
        found = inherited.inheritedNamedDescriptors().get(endpoint.name)
    else:
        index = endpoint.index or 0
        found = descriptors[index] if index < len(descriptors) else None
    if found is None:
        raise OSError(
            f"endpoint {endpoint.text!r}: systemd handed over {len(descriptors)} sockets, this one is not among them"
        )
    return int(found)


def open_listening_socket(settings: InterfaceSettings) -> socket.socket:
    """Return the socket of the fields fd, uds, host and port. Raises OSError whose text names the address."""
    if settings.fd is not None:
        where = f"file descriptor {settings.fd}"
    elif settings.uds is not None:
        where = settings.uds
    else:
        where = f"{settings.host}:{settings.port}"
    try:
        listening = _open(settings)
    except (OSError, OverflowError, UnicodeError) as error:
        raise OSError(f"cannot listen on {where}: {explain_listen_error(error)}") from error
    listening.setblocking(False)
    return listening


def describe(listening: socket.socket, *, tls: bool = False) -> str:
    """The address in words: a URL, or the path of a unix socket."""
    address = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        return f"unix:{address}"
    host = f"[{address[0]}]" if listening.family == socket.AF_INET6 else address[0]
    return f"{'https' if tls else 'http'}://{host}:{address[1]}"


def activated_descriptor(environ: MutableMapping[str, str], process_id: int) -> int | None:
    """Return the descriptor of the socket that systemd opened for this process, if it did (sd_listen_fds(3)).

    Removes what says so, for it is not meant for the processes we start. Raises OSError for several sockets.
    """
    process, count = environ.get("LISTEN_PID"), environ.get("LISTEN_FDS")
    if process != str(process_id) or count is None:
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(name, None)
    if count != "1":
        raise OSError(
            f"systemd hands over {count} sockets, expected one; which one is meant says --fd (the first: 3)"
        )
    return _FIRST_DESCRIPTOR


def _open(settings: InterfaceSettings) -> socket.socket:
    if settings.fd is not None:
        # A copy: closing ours leaves the caller's alone.
        listening = socket.socket(fileno=os.dup(settings.fd))
        listening.listen(settings.backlog)
        return listening
    if settings.uds is not None:
        return _open_unix(settings.uds, settings.backlog, int(settings.uds_permissions, 8))
    host = settings.host.removeprefix("[").removesuffix("]")
    family, *_, address = socket.getaddrinfo(
        host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    # "::" takes IPv4 as well, as people expect of "all addresses".
    is_dual = family == socket.AF_INET6 and host in ("", "::") and socket.has_dualstack_ipv6()
    return socket.create_server(
        address[:2], family=family, backlog=settings.backlog, reuse_port=settings.reuse_port, dualstack_ipv6=is_dual
    )


def _open_unix(path: str, backlog: int, mode: int) -> socket.socket:
    """A socket nobody listens on any more is replaced; any other file is left alone."""
    is_there = os.path.lexists(path)
    if is_there and not (os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode)):
        kind = "a directory" if os.path.isdir(path) else "a file that is no socket"
        raise OSError(f"{kind} of that name is there already; it is left alone")
    if is_there:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                Path(path).unlink()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(path)
        os.chmod(path, mode)  # before anybody can connect
        listening.listen(backlog)
    except OSError:
        listening.close()
        raise
    return listening
