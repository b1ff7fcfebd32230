"""The public channel layer on Redis or Valkey, also as Django Channels' ``CHANNEL_LAYERS`` backend.

    CHANNEL_LAYERS = {"default": {"BACKEND": "channel_layer.RedisChannelLayer"}}

Takes the constructor options of channels_redis. Lives here: those options, and which layer of this process the calls
go to. Does not live here: the layer itself (process_layer.py), its thread (home.py).

    hosts given --> the worker's own layer if it is on the same broker and prefix, else a home of ours
    no hosts    --> inside a worker the worker's own layer, else a home of ours for TRUNKLINE_REDIS
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, urlencode

import channel_layer
from channel_layer.base import Message
from channel_layer.broker_url import parse_broker_url, redact_url
from channel_layer.capacity import Capacities
from channel_layer.channels_compat import ChannelsBackend
from channel_layer.errors import ChannelFull, MessageTooLarge
from channel_layer.home import Home, home_for
from channel_layer.messages import (
    CAPACITY_DEFAULT,
    EXPIRY_DEFAULT_S,
    GROUP_EXPIRY_DEFAULT_S,
    DecodedMessage,
    check_seconds,
)
from channel_layer.names import Keys, check_channel_name, check_group_name
from channel_layer.process_layer import RedisProcessLayer, RedisProcessLayerStatistics

__all__ = ["RedisChannelLayer", "RedisProcessLayer"]

_PORT: Final = 6379
# Options of a host in the form of a dict that become part of the URL itself; the others become its query.
_HOST_FIELDS: Final = frozenset({"address", "host", "port", "db", "username", "password", "ssl"})
_UNSUPPORTED: Final = {
    "on_disconnect": "consumers keep their channels through an outage of the broker",
    "on_reconnect": "consumers keep their channels through an outage of the broker",
    "connection_kwargs": "put the options into the URL",
}


class RedisChannelLayer(ChannelsBackend):
    """Channels and groups for any process; see base.ChannelLayer for what each call does and raises.

    May be made and called in any thread and on any loop. Nothing connects before the first call.
    """

    ChannelFull = ChannelFull
    MessageTooLarge = MessageTooLarge

    def __init__(
        self,
        hosts: Sequence[Any] | None = None,
        prefix: str | None = None,
        expiry: float = EXPIRY_DEFAULT_S,
        group_expiry: float = GROUP_EXPIRY_DEFAULT_S,
        capacity: int = CAPACITY_DEFAULT,
        channel_capacity: Mapping[Any, int] | None = None,
        symmetric_encryption_keys: Sequence[Any] | None = None,
        random_prefix_length: int | None = None,
        serializer_format: str = "msgpack",
        **unsupported: Any,
    ) -> None:
        """``hosts`` is a list of one broker: a URL, a pair of host and port, or a dict with ``address`` or ``host``.

        ``prefix`` is TRUNKLINE_PREFIX or "trunkline" by default. ``group_expiry`` concerns memberships of normal
        channels, others end with their process; ``random_prefix_length`` is accepted and changes nothing. Raises
        ValueError and TypeError, which name the option and what to use instead.
        """
        for name in unsupported:
            hint = _UNSUPPORTED.get(name)
            raise TypeError(f"RedisChannelLayer has no option {name!r}" + (f": {hint}" if hint is not None else ""))
        if symmetric_encryption_keys:
            raise ValueError(
                "symmetric_encryption_keys is not supported: encrypt the way to the broker, with a rediss:// URL"
            )
        if serializer_format != "msgpack":
            raise ValueError(f"serializer_format is {serializer_format!r}, only 'msgpack' is supported")
        self.extensions = ["groups", "flush"]
        self.expiry = check_seconds("expiry", expiry)
        self.group_expiry = check_seconds("group_expiry", group_expiry)
        self._capacities = Capacities(capacity, channel_capacity)
        self._channel_capacity = dict(channel_capacity) if channel_capacity is not None else {}
        self._url = None if hosts is None else build_url(hosts)
        self._prefix = prefix
        if prefix is not None:
            Keys(prefix)  # checks it
        # The home of this process, to spare the look-up; another process (a fork) has another.
        self._home: tuple[int, Home] | None = None

    def __repr__(self) -> str:
        broker = "the process's own broker" if self._url is None else redact_url(self._url)
        return f"<RedisChannelLayer {broker} {self._home[1] if self._home is not None else 'not connected'}>"

    async def statistics(self) -> RedisProcessLayerStatistics:
        """Connect if necessary, and return what the layer of this process holds and has done."""
        return (await self._layer()).statistics()

    async def send(self, channel: str, message: Message) -> None:
        check_channel_name(channel)  # wrong names and values cost no connection
        await (await self._layer()).send(channel, message)

    async def receive(self, channel: str) -> DecodedMessage:
        check_channel_name(channel)
        return await (await self._layer()).receive(channel)

    async def new_channel(self, prefix: str = "specific") -> str:
        return await (await self._layer()).new_channel(prefix)

    async def group_add(self, group: str, channel: str) -> None:
        check_group_name(group)
        check_channel_name(channel)
        await (await self._layer()).group_add(group, channel)

    async def group_discard(self, group: str, channel: str) -> None:
        check_group_name(group)
        check_channel_name(channel)
        await (await self._layer()).group_discard(group, channel)

    async def group_send(self, group: str, message: Message) -> None:
        check_group_name(group)
        await (await self._layer()).group_send(group, message)

    async def flush(self) -> None:
        await (await self._layer()).flush()

    async def close(self) -> None:
        """Do nothing: the connection belongs to the process, and is closed at its exit. Channels' helpers call it."""

    async def close_pools(self) -> None:
        """Do nothing; as close(). Users of channels_redis call it."""

    async def _layer(self) -> RedisProcessLayer:
        """Return the layer of this process that calls go to, connected."""
        installed = channel_layer.installed_process_layer()
        if isinstance(installed, RedisProcessLayer) and self._is_same(installed):
            return installed
        pid = os.getpid()
        if self._home is None or self._home[0] != pid or self._home[1].is_closed:
            url, prefix = self._broker(), self._own_prefix()
            options = (
                url,
                prefix,
                self.expiry,
                self.group_expiry,
                self._capacities.default,
                tuple(self._channel_capacity.items()),
            )
            home = home_for(
                options,
                lambda: RedisProcessLayer(
                    url,
                    prefix,
                    "client",
                    expiry=self.expiry,
                    group_expiry=self.group_expiry,
                    capacity=self._capacities.default,
                    channel_capacity=self._channel_capacity,
                ),
            )
            self._home = (pid, home)
        return await self._home[1].layer()

    def _is_same(self, installed: RedisProcessLayer) -> bool:
        """True if the worker's layer is what we were asked for. Its capacities and expiry then hold."""
        if self._prefix is not None and self._prefix != installed.prefix:
            return False
        return self._url is None or self._url == installed.url

    def _broker(self) -> str:
        if self._url is not None:
            return self._url
        url = os.environ.get("TRUNKLINE_REDIS")
        if not url:
            raise RuntimeError(
                "RedisChannelLayer has no broker: this process is not a Trunkline worker, hosts is not given and "
                "TRUNKLINE_REDIS is not set (for example TRUNKLINE_REDIS=redis://localhost:6379)"
            )
        return url

    def _own_prefix(self) -> str:
        return self._prefix if self._prefix is not None else os.environ.get("TRUNKLINE_PREFIX") or "trunkline"


def build_url(hosts: object) -> str:
    """Return the broker URL that ``hosts``, in the forms that channels_redis takes, means.

    Raises ValueError and TypeError, which say what is supported.
    """
    if isinstance(hosts, str | bytes | Mapping) or not isinstance(hosts, Sequence):
        raise TypeError(f"hosts is a {type(hosts).__name__}, expected a list: hosts=['redis://localhost:6379']")
    if len(hosts) != 1:
        raise ValueError(
            f"hosts has {len(hosts)} entries: sharding over several brokers is not supported yet, give one"
        )
    host = hosts[0]
    if isinstance(host, str):
        url = host
    elif isinstance(host, Mapping):
        url = _url_of_dict(host)
    elif isinstance(host, tuple | list) and len(host) == 2:
        url = _url_of_pair(*host)
    else:
        raise TypeError(f"hosts[0] is {host!r}, expected a URL, a pair of host and port, or a dict with 'address'")
    parse_broker_url(url)  # a wrong one is told now, not at the first call
    return url


def _url_of_pair(host: object, port: object, *, scheme: str = "redis", user: str = "") -> str:
    if not isinstance(host, str) or not isinstance(port, int):
        raise TypeError(f"hosts[0] has host {host!r} and port {port!r}, expected a str and an int")
    return f"{scheme}://{user}{f'[{host}]' if ':' in host else host}:{port}"


def _url_of_dict(host: Mapping[str, Any]) -> str:
    if "sentinels" in host or "master_name" in host:
        raise ValueError("hosts[0] names Sentinels: they are not supported yet, give the address of the broker")
    address = host.get("address")
    options = {name: value for name, value in host.items() if name not in _HOST_FIELDS and value is not None}
    if host.get("ssl_cert_reqs", "") is None:
        options["ssl_cert_reqs"] = "none"  # what redis-py means by None
    if isinstance(address, str):
        if clash := sorted((_HOST_FIELDS - {"address"}) & host.keys()):
            raise ValueError(f"hosts[0] has 'address' and {clash[0]!r}: put the latter into the URL")
        url = address
    else:
        user = ""
        if host.get("username") is not None or host.get("password") is not None:
            user = f"{quote(host.get('username') or '', safe='')}:{quote(host.get('password') or '', safe='')}@"
        pair = address if address is not None else (host.get("host", "localhost"), host.get("port", _PORT))
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"hosts[0]['address'] is {address!r}, expected a URL or a pair of host and port")
        url = _url_of_pair(*pair, scheme="rediss" if host.get("ssl") else "redis", user=user)
        if host.get("db"):
            url += f"/{host['db']}"
    if options:
        url += ("&" if "?" in url else "?") + urlencode(options)
    return url
