"""Who the client is and whether it speaks TLS, when proxies stand before us. No I/O.

The one place for that decision, for HTTP and WebSocket alike. A header that any client may set is believed only if
the peer of the socket is a proxy we were told to trust (``--forwarded-allow-ips``, as uvicorn):

    X-Forwarded-For     the rightmost address that is not itself a trusted proxy: everything left of it the client
                        may have invented. If all are trusted, the leftmost
    X-Forwarded-Proto   http, https, ws or wss; anything else (a list, for example) is ignored

Not here: Forwarded (RFC 7239), which no common proxy sends by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from interface_server.protocol.request import Peer

__all__ = ["ProxyHeaders"]

_IS_TLS: Final = {b"http": False, b"ws": False, b"https": True, b"wss": True}
_BRACKETED: Final = re.compile(r"\[([^\]]*)\](?::([0-9]{1,5}))?")
_WITH_PORT: Final = re.compile(r"([^:]*):([0-9]{1,5})")


class ProxyHeaders:
    """Decides by a list of trusted peers: addresses, networks, literals (paths of unix sockets), "*" for all."""

    __slots__ = ("_addresses", "_always", "_literals", "_networks")

    def __init__(self, trusted: str) -> None:
        self._always = False
        self._addresses: set[IPv4Address | IPv6Address] = set()
        self._networks: list[IPv4Network | IPv6Network] = []
        self._literals: set[str] = set()
        for item in (part.strip() for part in trusted.split(",")):
            if item == "*":
                self._always = True
            elif "/" in item and not item.startswith("/"):
                try:
                    self._networks.append(ip_network(item))
                except ValueError:
                    self._literals.add(item)
            elif item:
                address = _address(item)
                if address is None:
                    self._literals.add(item)
                else:
                    self._addresses.add(address)

    def __repr__(self) -> str:
        return (
            f"<ProxyHeaders {'everybody' if self._always else ''} addresses={len(self._addresses)} "
            f"networks={len(self._networks)} literals={sorted(self._literals)}>"
        )

    def trusts(self, peer: Peer) -> bool:
        """True if what this peer says about the client is believed. Constant for a socket, so ask once."""
        if self._always:
            return True
        if peer.client is None:
            # A unix socket: its peer has no address; the path of the socket itself stands for it.
            return peer.server is not None and peer.server[1] is None and peer.server[0] in self._literals
        return self._trusts_host(peer.client[0])

    def decide(self, peer: Peer, headers: Sequence[tuple[bytes, bytes]]) -> Peer:
        """Return the peer that the application is to see. Only for peers that ``trusts`` said yes to."""
        forwarded_for: list[bytes] = []
        proto = b""
        for name, value in headers:
            if name == b"x-forwarded-for":
                forwarded_for.append(value)  # RFC 9110 section 5.3: several lines are one list
            elif name == b"x-forwarded-proto":
                proto = value
        if not forwarded_for and not proto:
            return peer
        hosts = [item.strip() for item in b",".join(forwarded_for).decode("latin-1").split(",")]
        return Peer(
            client=self._client([host for host in hosts if host]) or peer.client,
            server=peer.server,
            tls=_IS_TLS.get(proto.lower(), peer.tls),
            tls_extension=peer.tls_extension,
        )

    def _client(self, hosts: Sequence[str]) -> tuple[str, int] | None:
        if not hosts:
            return None
        if not self._always:
            for item in reversed(hosts):
                host, port = _split_port(item)
                if not self._trusts_host(host):
                    return host, port
        return _split_port(hosts[0])

    def _trusts_host(self, host: str) -> bool:
        address = _address(host)
        if address is None:
            return host in self._literals
        return address in self._addresses or any(address in network for network in self._networks)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # A dual-stack listener shows IPv4 clients as ::ffff:192.0.2.1; the operator means the same host.
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _split_port(item: str) -> tuple[str, int]:
    """Return host and port of ``192.0.2.1:80``, ``[2001:db8::1]:80`` or a host alone; port 0: not given."""
    match = _BRACKETED.fullmatch(item) or _WITH_PORT.fullmatch(item)
    if match is None:
        return item, 0
    return match[1], int(match[2] or 0)
