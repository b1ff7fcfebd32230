from __future__ import annotations

import pytest

from interface_server.protocol.proxy_headers import ProxyHeaders
from interface_server.protocol.request import Peer

DEFAULT = "127.0.0.1,::1"


def peer(host: str = "127.0.0.1", *, tls: bool = False) -> Peer:
    return Peer(client=(host, 40000), server=("127.0.0.1", 8000), tls=tls)


def unix_peer(path: str = "/run/app.sock") -> Peer:
    return Peer(client=None, server=(path, None))


@pytest.mark.parametrize(
    ("trusted", "host", "is_trusted"),
    [
        (DEFAULT, "127.0.0.1", True),
        (DEFAULT, "::1", True),
        (DEFAULT, "::ffff:127.0.0.1", True),
        (DEFAULT, "127.0.0.2", False),
        (DEFAULT, "10.0.0.1", False),
        ("", "127.0.0.1", False),
        ("10.0.0.0/8, 192.168.1.1", "10.20.30.40", True),
        ("10.0.0.0/8, 192.168.1.1", "192.168.1.1", True),
        ("10.0.0.0/8, 192.168.1.1", "192.168.1.2", False),
        ("fd00::/8", "fd12::1", True),
        ("fd00::/8", "10.0.0.1", False),
        ("10.0.0.0/99", "10.0.0.1", False),
        ("*", "203.0.113.9", True),
    ],
)
def test_who_is_trusted(trusted: str, host: str, is_trusted: bool) -> None:
    assert ProxyHeaders(trusted).trusts(peer(host)) is is_trusted


def test_a_unix_socket_is_trusted_by_its_path() -> None:
    assert not ProxyHeaders(DEFAULT).trusts(unix_peer())
    assert not ProxyHeaders("/run/other.sock").trusts(unix_peer())
    assert ProxyHeaders("127.0.0.1,/run/app.sock").trusts(unix_peer())
    assert ProxyHeaders("*").trusts(unix_peer())
    assert not ProxyHeaders("/run/app.sock").trusts(Peer(client=None, server=None))


@pytest.mark.parametrize(
    ("trusted", "values", "client"),
    [
        (DEFAULT, [b"203.0.113.9"], ("203.0.113.9", 0)),
        # Only what the proxy added itself is true; the client may have sent the rest.
        (DEFAULT, [b"1.1.1.1, 203.0.113.9"], ("203.0.113.9", 0)),
        (DEFAULT, [b"1.1.1.1", b"203.0.113.9"], ("203.0.113.9", 0)),
        (DEFAULT, [b"1.1.1.1,203.0.113.9,127.0.0.1"], ("203.0.113.9", 0)),
        ("127.0.0.1,10.0.0.0/8", [b"1.1.1.1, 203.0.113.9, 10.0.0.1, 10.0.0.2"], ("203.0.113.9", 0)),
        ("127.0.0.1,10.0.0.0/8", [b"10.0.0.7, 10.0.0.1"], ("10.0.0.7", 0)),
        ("*", [b"1.1.1.1, 203.0.113.9"], ("1.1.1.1", 0)),
        (DEFAULT, [b"203.0.113.9:1234"], ("203.0.113.9", 1234)),
        (DEFAULT, [b"2001:db8::1"], ("2001:db8::1", 0)),
        (DEFAULT, [b"[2001:db8::1]:1234"], ("2001:db8::1", 1234)),
        (DEFAULT, [b"[2001:db8::1]"], ("2001:db8::1", 0)),
        (DEFAULT, [b"unknown"], ("unknown", 0)),
        (DEFAULT, [b""], ("127.0.0.1", 40000)),
        (DEFAULT, [b" , ,"], ("127.0.0.1", 40000)),
    ],
)
def test_forwarded_for(trusted: str, values: list[bytes], client: tuple[str, int]) -> None:
    headers = [(b"host", b"a"), *((b"x-forwarded-for", value) for value in values)]
    assert ProxyHeaders(trusted).decide(peer(), headers).client == client


@pytest.mark.parametrize(
    ("value", "tls"),
    [
        (b"https", True),
        (b"HTTPS", True),
        (b"wss", True),
        (b"http", False),
        (b"ws", False),
        (b"https, http", True),
        (b"gopher", True),
    ],
)
def test_forwarded_proto(value: bytes, tls: bool) -> None:
    """What is not one of the four leaves what the socket says: TLS, in this test."""
    decided = ProxyHeaders(DEFAULT).decide(peer(tls=True), [(b"x-forwarded-proto", value)])
    assert decided == Peer(client=("127.0.0.1", 40000), server=("127.0.0.1", 8000), tls=tls)


def test_without_such_headers_the_socket_is_right() -> None:
    socket = peer()
    assert ProxyHeaders(DEFAULT).decide(socket, [(b"host", b"a")]) is socket


def test_behind_a_unix_socket_the_header_names_the_client() -> None:
    decided = ProxyHeaders("*").decide(unix_peer(), [(b"x-forwarded-for", b"203.0.113.9")])
    assert decided.client == ("203.0.113.9", 0)
    assert decided.server == ("/run/app.sock", None)
