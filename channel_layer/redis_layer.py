"""The public channel layer on Redis or Valkey, also as Django Channels' ``CHANNEL_LAYERS`` backend.

    CHANNEL_LAYERS = {"default": {"BACKEND": "channel_layer.RedisChannelLayer"}}

Takes the constructor options of channels_redis. Lives here: those options, and which layer of this process the calls
go to. Does not live here: the layer itself (process_layer.py), its thread (home.py).

    hosts given --> the worker's own layer if it is on the same broker and prefix, else a home of ours
    no hosts    --> inside a worker the worker's own layer, else a home of ours for TRUNKLINE_REDIS
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import channel_layer
from channel_layer.base import Message
from channel_layer.broker_url import parse_broker_urls, redact_urls
from channel_layer.capacity import Capacities
from channel_layer.channels_compat import ChannelsBackend
from channel_layer.encryption import Cipher, keys_from_environment
from channel_layer.errors import ChannelFull, MessageTooLarge
from channel_layer.home import Home, home_for
from channel_layer.hosts import build_urls, is_same_broker
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

logger = logging.getLogger("trunkline.channel_layer")

# What travels is always ours (codec.py). These two name what an application may put into a message: less than that.
_SERIALIZERS: Final = ("msgpack", "json")
_UNSUPPORTED: Final = {
    "connection_kwargs": "put the options into the URL, or into a dict in hosts",
    "channel_layer": "it is channels_redis' own",
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
        on_disconnect: str | None = None,
        on_reconnect: str | None = None,
        **unsupported: Any,
    ) -> None:
        """The options of channels_redis' two layers. Raises ValueError and TypeError, which name the option and what
        to use instead.

        hosts                      brokers, as hosts.py spells them; None: the worker's own, else TRUNKLINE_REDIS
        prefix                     of the broker's keys; None: TRUNKLINE_PREFIX, else "trunkline"
        expiry                     seconds that a message waits for a reader (60)
        group_expiry               seconds that a normal channel stays in a group (86400); others: until they end
        capacity                   messages in a channel (100); channel_capacity: others by pattern (capacity.py)
        symmetric_encryption_keys  the first encrypts, each decrypts; None: TRUNKLINE_ENCRYPTION_KEYS
        on_disconnect              type of the message that the channels of this process get when the broker goes
        on_reconnect               … and when it is back
        random_prefix_length, serializer_format ("msgpack" or "json")    accepted; they change nothing

        In a worker, and with the worker's own broker, the worker's expiry and keys hold; capacities that are given
        are the worker's from the first call on.
        """
        for name in unsupported:
            hint = _UNSUPPORTED.get(name)
            raise TypeError(f"RedisChannelLayer has no option {name!r}" + (f": {hint}" if hint is not None else ""))
        if serializer_format not in _SERIALIZERS:
            raise ValueError(
                f"serializer_format is {serializer_format!r}, expected one of {', '.join(_SERIALIZERS)}: Trunkline's "
                "processes share one format, in which bytes and text survive"
            )
        if random_prefix_length is not None and (
            not isinstance(random_prefix_length, int) or isinstance(random_prefix_length, bool)
        ):
            raise TypeError(f"random_prefix_length is {random_prefix_length!r}, expected an int")
        self.extensions = ["groups", "flush"]
        self.expiry = check_seconds("expiry", expiry)
        self.group_expiry = check_seconds("group_expiry", group_expiry)
        self._capacities = Capacities(capacity, channel_capacity)
        self._channel_capacity = dict(channel_capacity) if channel_capacity is not None else {}
        # None: not given, so the process's own. Channels' users also write [] for the default.
        self._url = None if hosts is None or hosts in ([], ()) else build_urls(hosts)
        if self._url is not None:
            parse_broker_urls(self._url)  # a wrong one is told now, not at the first call
        self._cipher = None if symmetric_encryption_keys is None else Cipher(symmetric_encryption_keys)
        self._notices = (_message_type("on_disconnect", on_disconnect), _message_type("on_reconnect", on_reconnect))
        self._prefix = prefix
        if prefix is not None:
            Keys(prefix)  # checks it
        # The home of this process, to spare the look-up; another process (a fork) has another.
        self._home: tuple[int, Home] | None = None
        # The worker's layer that was looked at last, and whether it is ours.
        self._judged: tuple[RedisProcessLayer, bool] | None = None

    def __repr__(self) -> str:
        broker = "the process's own broker" if self._url is None else redact_urls(self._url)
        return f"<RedisChannelLayer {broker} {self._home[1] if self._home is not None else 'not connected'}>"

    async def statistics(self) -> RedisProcessLayerStatistics:
        """Connect if necessary, and return what the layer of this process holds and has done."""
        return (await self._layer()).statistics()

    async def send(self, channel: str, message: Message) -> None:
        check_channel_name(channel)  # wrong names and values cost no connection
        await (await self._layer()).send(channel, message)

    async def receive(self, channel: str) -> DecodedMessage:
        judged = self._judged
        if judged is not None and judged[1] and judged[0] is channel_layer.installed_process_layer():
            return await judged[0].receive(channel)  # as _layer(), for what a consumer does with each message
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
        if isinstance(installed, RedisProcessLayer):
            if self._judged is None or self._judged[0] is not installed:
                self._judged = (installed, self._is_same(installed))
            if self._judged[1]:
                return installed
        pid = os.getpid()
        if self._home is None or self._home[0] != pid or self._home[1].is_closed:
            url, prefix, cipher = self._broker(), self._own_prefix(), self._own_cipher()
            options = (
                url,
                prefix,
                cipher,
                self._notices,
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
                    cipher=cipher,
                    notices=self._notices,
                ),
            )
            self._home = (pid, home)
        return await self._home[1].layer()

    def _is_same(self, installed: RedisProcessLayer) -> bool:
        """True if the worker's layer is what we were asked for. Its expiry and keys then hold, and our capacities.

        Raises ValueError if we were asked to encrypt and the worker does not: then not even its interface servers
        could read what we send.
        """
        if (self._prefix is not None and self._prefix != installed.prefix) or (
            self._url is not None and not is_same_broker(self._url, installed.url)
        ):
            logger.warning(
                "the channel layer at %s, prefix %s, is not this worker's own, at %s, prefix %s: it knows "
                "none of its clients",
                redact_urls(self._broker()),
                self._own_prefix(),
                redact_urls(installed.url),
                installed.prefix,
            )
            return False
        if self._cipher is not None and self._cipher != installed.cipher:
            if self._cipher.is_encrypting and not installed.cipher.is_encrypting:
                raise ValueError(
                    "symmetric_encryption_keys are given, but this worker has none: give them to all processes, as "
                    "TRUNKLINE_ENCRYPTION_KEYS or with --encryption-keys"
                )
            logger.warning("symmetric_encryption_keys are not those of this worker, which hold")
        if not self._capacities.is_default:
            installed.adopt_capacities(self._capacities)
        if self.expiry != installed.expiry:
            logger.warning("expiry=%g is not this worker's, %g s, which holds", self.expiry, installed.expiry)
        installed.announce_outages(self._notices)
        return True

    def _own_cipher(self) -> Cipher:
        return self._cipher if self._cipher is not None else Cipher(keys_from_environment())

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


def _message_type(option: str, value: object) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise TypeError(f"{option} is {value!r}, expected the type of a message, for example 'broker.lost'")
