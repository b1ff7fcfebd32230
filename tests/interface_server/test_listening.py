"""Opening the listening socket in every way the settings allow."""

import contextlib
import os
import socket
import stat
import sys
from dataclasses import replace

import pytest
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactor

from interface_server.listening import (
    UNSENT_BYTES_MAX,
    activated_descriptor,
    adopt,
    describe,
    open_listeners,
    open_listening_socket,
)
from interface_server.ports import TURN_ACCEPTS_MAX
from interface_server.settings import InterfaceSettings


def listen(**settings):
    return open_listening_socket(InterfaceSettings(redis_url="redis://unused", **settings))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", ""])
def test_tcp(host):
    with listen(host=host, port=0) as listening:
        assert describe(listening).startswith("http://")
        assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        with socket.create_connection(("localhost", listening.getsockname()[1])):
            pass


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_ipv6(host):
    with listen(host=host, port=0) as listening:
        port = listening.getsockname()[1]
        assert describe(listening) == f"http://[{host.strip('[]')}]:{port}"
        with socket.create_connection(("127.0.0.1" if host == "::" else "::1", port)):
            pass


def test_reuse_port_lets_several_bind():
    with listen(port=0, reuse_port=True) as first:
        port = first.getsockname()[1]
        with listen(port=port, reuse_port=True):
            pass
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: .*already in use"):
            listen(port=port)


def test_an_inherited_socket_stays_the_caller_s():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with listen(fd=bound.fileno()) as listening:
            assert listening.getsockname() == bound.getsockname()
        with socket.create_connection(bound.getsockname()):
            pass


def test_a_socket_of_the_supervisor_is_taken_over_as_it_is():
    with socket.create_server(("127.0.0.1", 0), backlog=7) as server:
        descriptor = os.dup(server.fileno())
        settings = InterfaceSettings(
            redis_url="redis://unused", endpoints=(f"adopted:{descriptor}",), endpoints_only=True, backlog=100
        )
        (listener,) = open_listeners(settings)
        with listener.socket as listening:
            assert listening.fileno() == descriptor
            assert not listening.get_inheritable()
            # struct tcp_info: of a listening socket, tcpi_sacked is the backlog.
            info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            assert int.from_bytes(info[28:32], sys.byteorder) == 7
    with pytest.raises(OSError, match=f"cannot listen on file descriptor {descriptor}: Bad file"):
        open_listeners(settings)


def test_a_descriptor_that_is_no_socket(tmp_path):
    with (tmp_path / "file").open("w") as file, pytest.raises(OSError, match="cannot listen on file descriptor"):
        listen(fd=file.fileno())


def test_an_unknown_host():
    with pytest.raises(OSError, match=r"cannot listen on no\.such\.invalid:0"):
        listen(host="no.such.invalid", port=0)


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".b"])
def test_what_is_no_host_at_all(host):
    with pytest.raises(OSError, match=r"cannot listen on a.*b:0: this is no name of a host"):
        listen(host=host, port=0)


def test_a_unix_socket_others_may_use_and_a_stale_one_is_replaced(tmp_path):
    path = str(tmp_path / "s")
    listen(uds=path).close()
    assert os.path.exists(path)
    with listen(uds=path) as listening:
        assert describe(listening) == f"unix:{path}"
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
        with pytest.raises(OSError, match=r"cannot listen on .*already in use"):
            listen(uds=path)


def test_a_file_is_not_replaced_by_a_unix_socket(tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match=r"cannot listen on .*precious: a file that is no socket of that name is there"):
        listen(uds=str(path))
    assert path.read_text() == "data"
    with pytest.raises(OSError, match=r"cannot listen on .*: a directory of that name is there already"):
        listen(uds=str(tmp_path))


@pytest.mark.parametrize(("mode", "expected"), [("666", 0o666), ("0600", 0o600), ("660", 0o660)])
def test_the_mode_of_a_unix_socket(tmp_path, mode, expected):
    path = tmp_path / "socket"
    with listen(uds=str(path), uds_permissions=mode):
        assert stat.S_IMODE(path.stat().st_mode) == expected


@pytest.mark.parametrize("mode", ["", "66", "888", "rw-rw----", "1777"])
def test_a_mode_that_is_none(mode):
    with pytest.raises(ValueError, match="three octal digits"):
        listen(uds="/unused", uds_permissions=mode)


def test_a_socket_of_systemd():
    environ = {"LISTEN_PID": "12", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "HOME": "/"}
    assert activated_descriptor(environ, 13) is None  # of our parent
    assert activated_descriptor(environ, 12) == 3
    assert environ == {"HOME": "/"}
    assert activated_descriptor(environ, 12) is None
    with pytest.raises(OSError, match="hands over 2 sockets, expected one"):
        activated_descriptor({"LISTEN_PID": "12", "LISTEN_FDS": "2"}, 12)


@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_twisted_leaves_a_socket_as_it_is(tmp_path, mode):
    """Its own adoption would listen again, for 50 connections, and open a unix socket to everybody."""
    path = tmp_path / "app.sock"
    with (
        listen(host="127.0.0.1", port=0, backlog=321) as tcp,
        listen(uds=str(path), uds_permissions=f"{mode:o}") as unix,
    ):
        ports = [adopt(MemoryReactor(), listening, Factory()) for listening in (tcp, unix)]
        information = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
        assert int.from_bytes(information[28:32], sys.byteorder) == 321
        assert path.stat().st_mode & 0o777 == mode
        for port in ports:
            port.socket.close()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_few_are_accepted_in_a_turn_and_all_at_the_end(kind, tmp_path):
    """The others wait in the kernel, while what all clients send is read."""

    class Accepted(Protocol):
        def connectionMade(self):
            accepted.append(self.transport)

    accepted = []
    factory = Factory.forProtocol(Accepted)
    factory.noisy = False
    settings = {"uds": str(tmp_path / "socket")} if kind == "unix" else {"port": 0}
    with listen(**settings) as listening:
        port = adopt(MemoryReactor(), listening, factory)
        clients = [socket.socket(listening.family) for _ in range(5 * TURN_ACCEPTS_MAX)]
        for client in clients:
            client.connect(listening.getsockname())
        for turn in (1, 2, 3):
            port.doRead()
            assert len(accepted) == turn * TURN_ACCEPTS_MAX
        port.accept_all()
        assert len(accepted) == len(clients)
        for each in (*clients, *(transport.socket for transport in accepted), port.socket):
            each.close()


def test_the_file_of_a_unix_socket_outlives_one_that_stops_accepting(tmp_path):
    """Others accept from it, too; who has made it removes it, also where that is not us."""
    path = tmp_path / "socket"
    settings = InterfaceSettings(redis_url="redis://unused", endpoints=(f"unix:{path}",), endpoints_only=True)
    (listener,) = open_listeners(settings)
    factory = Factory()
    factory.noisy = False
    with listener.socket:
        for _ in range(2):
            adopt(MemoryReactor(), listener.socket, factory).connectionLost(None)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
        (inherited,) = open_listeners(replace(settings, endpoints=(f"adopted:{os.dup(listener.socket.fileno())}",)))
        inherited.socket.close()
        inherited.remove_file()
        assert path.exists()
    listener.remove_file()
    assert not path.exists()
    listener.remove_file()  # somebody was faster


def test_the_file_of_a_successor_stays(tmp_path):
    path = tmp_path / "socket"
    settings = InterfaceSettings(redis_url="redis://unused", uds=str(path))
    (old,) = open_listeners(settings)
    old.socket.close()
    clock = tmp_path / "clock"
    clock.touch()
    while clock.stat().st_mtime_ns <= path.stat().st_mtime_ns:  # a few ms, on kernels that count in ticks
        clock.touch()
    (new,) = open_listeners(settings)  # on ext4 its file has the number of the old one
    with new.socket:
        old.remove_file()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        path.chmod(0o600)
    new.remove_file()
    assert not path.exists()


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="a kernel that cannot be told")
def test_the_kernel_takes_little_for_a_client_that_reads_nothing():
    with listen(port=0) as listening:
        port = adopt(MemoryReactor(), listening, Factory())
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(listening.getsockname())
            accepted, _ = port.socket.accept()
            with accepted:
                accepted.setblocking(False)
                taken = 0
                with contextlib.suppress(BlockingIOError):
                    while taken < 100 * UNSENT_BYTES_MAX:
                        taken += accepted.send(bytes(65536))
                assert UNSENT_BYTES_MAX <= taken < 2 * UNSENT_BYTES_MAX
        port.socket.close()
