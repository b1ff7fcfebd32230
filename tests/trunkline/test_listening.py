"""Binding the listening socket, and what people read when that fails."""

import socket

import pytest

from trunkline.listening import bind_socket, describe
from trunkline.options import UsageError


def bind(**given):
    values = {"host": "127.0.0.1", "port": 0, "uds": None, "fd": None, "reuse_port": False, "backlog": 16}
    return bind_socket(**{**values, **given})


def test_a_free_port_is_described_as_a_url():
    with bind() as listening:
        port = listening.getsockname()[1]
        assert describe(listening) == f"http://127.0.0.1:{port}"
        socket.create_connection(("127.0.0.1", port), 2).close()


def test_ipv6_in_brackets():
    with bind(host="[::1]") as listening:
        assert describe(listening).startswith("http://[::1]:")


def test_a_taken_port_is_named():
    with bind() as listening:
        port = listening.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1:{port}: the port is taken"):
            bind(port=port)


def test_reuse_port_shares_it():
    with bind(reuse_port=True) as listening, bind(reuse_port=True, port=listening.getsockname()[1]) as other:
        assert other.getsockname() == listening.getsockname()


def test_unknown_host_and_foreign_address():
    with pytest.raises(UsageError, match=r"--host: 'no\.such\.host\.invalid' is not an address"):
        bind(host="no.such.host.invalid")
    with pytest.raises(OSError, match="not an address of this machine"):
        bind(host="192.0.2.1")


def test_unix_socket_replaces_an_abandoned_one_only(tmp_path):
    path = str(tmp_path / "socket")
    first = bind(uds=path)
    assert describe(first) == f"unix socket {path}"
    with pytest.raises(OSError, match="somebody else does"):
        bind(uds=path)
    first.close()
    bind(uds=path).close()
    ordinary = tmp_path / "file"
    ordinary.write_text("precious")
    with pytest.raises(OSError, match="somebody else does"):
        bind(uds=str(ordinary))
    assert ordinary.read_text() == "precious"


def test_an_inherited_descriptor():
    with bind() as listening, bind(fd=listening.fileno()) as same:
        assert same.getsockname() == listening.getsockname()
    with pytest.raises(UsageError, match="--fd: 9999 is not a socket"):
        bind(fd=9999)
