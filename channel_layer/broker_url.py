"""Broker URLs: where the broker is and how to speak to it.

    redis://[[user]:password@]host[:port][/db][?option=value…]
    rediss://…                  the same over TLS; options ssl_cert_reqs, ssl_ca_certs, ssl_certfile, ssl_keyfile …
    unix://[[user]:password@]/path/to/socket[?db=n]
    redis+sentinel://[[user]:password@]host[:26379][,host…]/master[/db][?sentinel_password=…]
    rediss+sentinel://…         TLS to the master and to its Sentinels (not to these with ?sentinel_ssl=false)
    redis+cluster://[[user]:password@]host[:port][,host…], rediss+cluster://…
    URL,URL…                    static sharding: each is a shard; none of them may be a Cluster

redis-py parses those of single servers, so that a URL means here what it means to every other Python program. Lives
here: what redis-py leaves unchecked (it takes ``redis://host/name`` for database 0) or does not know, and texts that
show no password. No I/O except reading the certificates that the URL names. Does not live here: connecting
(broker_connection.py), which key lives where (sharding.py).
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from redis.connection import parse_url

__all__ = [
    "BrokerAddress",
    "ClusterPlace",
    "Place",
    "SentinelPlace",
    "parse_broker_url",
    "parse_broker_urls",
    "redact_url",
    "redact_urls",
    "split_urls",
]

# What redis-py's own clients understand and what changes nothing for ours: it is accepted, because one URL often
# serves several programs.
_IGNORED_OPTIONS: Final = frozenset(
    {
        "client_name",
        "decode_responses",
        "encoding",
        "encoding_errors",
        "health_check_interval",
        "legacy_responses",
        "lib_name",
        "lib_version",
        "max_connections",
        "protocol",
        "retry_on_error",
        "retry_on_timeout",
        "socket_keepalive",
        "socket_read_size",
        "timeout",
    }
)
_TLS_OPTIONS: Final = frozenset(
    {
        "ssl_ca_certs",
        "ssl_ca_data",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_ciphers",
        "ssl_keyfile",
        "ssl_min_version",
        "ssl_password",
    }
)
_CERT_REQS: Final = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}

_parse_url: Callable[[str], Mapping[str, Any]] = parse_url  # redis-py leaves it without types

_SENTINEL_PORT: Final = 26379
_CLUSTER_PORT: Final = 6379
_SENTINEL_OPTIONS: Final = ("sentinel_username", "sentinel_password", "sentinel_ssl")
_SWITCHES: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

_SCHEME_EXPECTED: Final = (
    "the scheme must be redis://, rediss:// or unix://, or one of the first two with +sentinel or +cluster"
)

# Between two URLs: a comma inside of one (between hosts) is not followed by a scheme.
_URL_BORDER = re.compile(r"\s*,\s*(?=[A-Za-z+]+://)")
_USER_INFO = re.compile(r"(?<=://)([^:@/]*):.*@", re.DOTALL)
_PASSWORD_OPTION = re.compile(r"((?:ssl_)?password=)[^&]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerAddress:
    """A broker URL, parsed. ``str()`` shows it without the password."""

    url: str = field(repr=False)
    host: str
    port: int
    path: str | None  # of a unix socket; None means TCP
    username: str | None
    password: str | None = field(repr=False)
    db: int
    ssl_context: ssl.SSLContext | None = field(repr=False)
    socket_timeout_s: float
    connect_timeout_s: float
    # What redis-py's own clients take for it.
    client_options: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)

    def __str__(self) -> str:
        return redact_url(self.url)

    @property
    def node(self) -> tuple[str, int]:
        return self.host, self.port

    def at(self, host: str, port: int) -> BrokerAddress:
        """Return the address of another server that is spoken to in the same way."""
        scheme = "redis" if self.ssl_context is None else "rediss"
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return replace(
            self,
            url=f"{scheme}://{place}" + (f"/{self.db}" if self.db else ""),
            host=host,
            port=port,
            client_options={**self.client_options, "host": host, "port": port},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SentinelPlace:
    """One master, wherever its Sentinels say that it is."""

    url: str = field(repr=False)
    master: str
    sentinels: tuple[BrokerAddress, ...]
    template: BrokerAddress  # how to speak to the master; host and port are a Sentinel's

    def __str__(self) -> str:
        return redact_url(self.url)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlace:
    """A Redis Cluster, of which these nodes are known."""

    url: str = field(repr=False)
    seeds: tuple[BrokerAddress, ...]

    def __str__(self) -> str:
        return redact_url(self.url)


Place = BrokerAddress | SentinelPlace | ClusterPlace


def split_urls(text: str) -> list[str]:
    """Return the URLs of a list of them, separated by commas."""
    return _URL_BORDER.split(text.strip())


def redact_urls(text: str) -> str:
    """As redact_url(), for a list of URLs."""
    return ",".join(map(redact_url, split_urls(text)))


def redact_url(url: str) -> str:
    """Return ``url``, valid or not, with every password replaced by ``***``."""
    # Greedy up to the last "@": a password with a forgotten %-escape must not show either.
    return _PASSWORD_OPTION.sub(r"\1***", _USER_INFO.sub(r"\1:***@", url))


def parse_broker_urls(
    text: str, *, socket_timeout_s: float = 5.0, connect_timeout_s: float = 3.0
) -> tuple[Place, ...]:
    """Parse one URL of any kind, or several with commas between them: one place a shard, in that order.

    Raises ValueError as parse_broker_url(); of several URLs it says which one.
    """
    urls = split_urls(text)
    places: list[Place] = []
    for number, url in enumerate(urls, 1):
        where = f"{number} of {len(urls)} " if len(urls) > 1 else ""
        try:
            place = _parse_place(url, socket_timeout_s, connect_timeout_s)
            if len(urls) > 1 and isinstance(place, ClusterPlace):
                raise _error(url, "a Cluster divides the keys itself, and cannot be one of several brokers")
            if any(_is_same(place, other) for other in places):
                raise _error(url, "is named twice")
        except ValueError as error:
            if not where:
                raise
            text = str(error).replace("broker URL ", f"broker URL {where}", 1)
            raise ValueError(text) from None
        places.append(place)
    return tuple(places)


def _is_same(one: Place, other: Place) -> bool:
    """Whether two shards would be one and the same server, spelled alike."""
    if isinstance(one, BrokerAddress) and isinstance(other, BrokerAddress):
        return (one.host, one.port, one.path, one.db) == (other.host, other.port, other.path, other.db)
    if isinstance(one, SentinelPlace) and isinstance(other, SentinelPlace):
        nodes = {each.node for each in one.sentinels} & {each.node for each in other.sentinels}
        return bool(nodes) and (one.master, one.template.db) == (other.master, other.template.db)
    return False


def _parse_place(url: str, socket_timeout_s: float, connect_timeout_s: float) -> Place:
    scheme, _, rest = url.partition("://")
    base, plus, kind = scheme.lower().partition("+")
    if not plus:
        return parse_broker_url(url, socket_timeout_s=socket_timeout_s, connect_timeout_s=connect_timeout_s)
    if base not in ("redis", "rediss") or kind not in ("sentinel", "cluster"):
        raise _error(url, _SCHEME_EXPECTED)
    # A "/", "?" or "#" in a password that is not written as %XX ends up in the wrong part, which is then refused.
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    tail = rest[len(place) :]
    user, at, hosts = place.rpartition("@")
    if "#" in tail:
        raise _error(url, "'#' is not allowed (in a password, write it as %23)")
    path, _, query = tail.partition("?")
    names = [name.strip() for name in hosts.split(",")]
    if not all(names):
        what = "a host is missing" if len(names) == 1 else f"host {names.index('') + 1} of {len(names)} is empty"
        raise _error(url, f"{what}: {base}+{kind}://host1,host2,host3" + ("/master" if kind == "sentinel" else ""))
    options = dict(parse_qsl(query, keep_blank_values=True))
    to_sentinels = {name: options.pop(name) for name in _SENTINEL_OPTIONS if name in options}
    if to_sentinels and kind != "sentinel":
        raise _error(url, f"option {min(to_sentinels)!r} is for +sentinel URLs")

    def address(base: str, user: str, name: str, port: int, path: str = "", **more: str) -> BrokerAddress:
        server = f"{base}://{user}{name}{path}" + (f"?{urlencode(options | more)}" if options or more else "")
        parsed = _parse_server(server, url, socket_timeout_s, connect_timeout_s)
        has_port = urlsplit(f"//{name}").port is not None
        # Without credentials, for log lines and errors.
        return parsed.at(parsed.host, parsed.port if has_port else port)

    if kind == "cluster":
        if path.strip("/") or options.get("db", "0") != "0":
            raise _error(url, "a Cluster has no databases: leave out what follows the hosts")
        return ClusterPlace(
            url=url, seeds=tuple(address(base, user + at, name, _CLUSTER_PORT, db="0") for name in names)
        )
    master, _, database = path.strip("/").partition("/")
    if not master:
        raise _error(url, "the name of the master is missing: redis+sentinel://host1,host2/master")
    switch = to_sentinels.get("sentinel_ssl", "true").lower()
    if switch not in _SWITCHES:
        raise _error(url, f"sentinel_ssl={switch} is not one of true, false")
    template = address(base, user + at, names[0], _SENTINEL_PORT, f"/{database}")
    user = ""
    if "sentinel_username" in to_sentinels or "sentinel_password" in to_sentinels:
        name, password = (quote(to_sentinels.get(each, ""), safe="") for each in _SENTINEL_OPTIONS[:2])
        user = f"{name}:{password}@"
    if base == "rediss" and not _SWITCHES[switch]:
        base = "redis"
        options = {name: value for name, value in options.items() if name not in _TLS_OPTIONS}
    return SentinelPlace(
        url=url,
        master=unquote(master),
        sentinels=tuple(address(base, user, name, _SENTINEL_PORT, db="0") for name in names),
        template=template,
    )


def parse_broker_url(url: str, *, socket_timeout_s: float = 5.0, connect_timeout_s: float = 3.0) -> BrokerAddress:
    """Parse the URL of a single server; its ``socket_timeout`` and ``socket_connect_timeout`` go before ours.

    Raises ValueError with a text for the operator; it names the URL without its password.
    """
    return _parse_server(url, url, socket_timeout_s, connect_timeout_s)


def _parse_server(server: str, url: str, socket_timeout_s: float, connect_timeout_s: float) -> BrokerAddress:
    """Parse ``server``, a part of ``url``, which errors name."""
    try:
        # urlsplit's own errors quote parts of the URL, and what it takes for a port may be half a password.
        parts = urlsplit(server)
        port = parts.port
    except ValueError:
        raise _error(url, "host or port is malformed (in a password, write special characters as %XX)") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise _error(url, _SCHEME_EXPECTED)
    if parts.fragment:
        raise _error(url, "'#' is not allowed (in a password, write it as %23)")
    try:
        client_options = _parse_url(server)
    except ValueError as error:
        raise _error(url, str(error)) from None
    options: dict[str, Any] = dict(client_options)
    options.pop("connection_class", None)
    options.pop("host", None)
    options.pop("port", None)
    path = options.pop("path", None)
    if parts.scheme == "unix":
        if not path:
            raise _error(url, "the path of the socket is missing: unix:///path/to/socket")
        if parts.hostname:
            raise _error(url, "a unix socket has no host: unix:///path/to/socket, with three slashes")
    else:
        database = unquote(parts.path).strip("/")
        if database and not database.isdecimal():
            raise _error(url, f"database {database!r} is not a number")
    db = options.pop("db", 0)
    if db < 0:
        raise _error(url, f"database {db} is negative")
    timeouts = {
        "socket_timeout": options.pop("socket_timeout", socket_timeout_s),
        "socket_connect_timeout": options.pop("socket_connect_timeout", connect_timeout_s),
    }
    for name, value in timeouts.items():
        if not 0 < value < float("inf"):
            raise _error(url, f"{name} must be more than 0 seconds")
    username, password = options.pop("username", None), options.pop("password", None)
    tls_options = {name: options.pop(name) for name in _TLS_OPTIONS & options.keys()}
    if tls_options and parts.scheme != "rediss":
        raise _error(url, f"{min(tls_options)} needs rediss://")
    if unknown := sorted(options.keys() - _IGNORED_OPTIONS):
        raise _error(url, f"option {unknown[0]!r} is not known")
    return BrokerAddress(
        url=server,
        host=unquote(parts.hostname) if parts.hostname else "localhost",
        port=port if port is not None else 6379,
        path=path,
        username=username,
        password=password,
        db=db,
        ssl_context=_build_ssl_context(url, tls_options) if parts.scheme == "rediss" else None,
        socket_timeout_s=timeouts["socket_timeout"],
        connect_timeout_s=timeouts["socket_connect_timeout"],
        client_options=client_options,
    )


def _error(url: str, problem: str) -> ValueError:
    return ValueError(f"broker URL {redact_url(url)!r}: {problem}")


def _build_ssl_context(url: str, options: dict[str, Any]) -> ssl.SSLContext:
    """Build the context that redis-py would build from the same options."""
    cert_reqs = str(options.get("ssl_cert_reqs", "required")).lower()
    if cert_reqs not in _CERT_REQS:
        raise _error(url, f"ssl_cert_reqs={cert_reqs} is not one of none, optional, required")
    if "ssl_keyfile" in options and "ssl_certfile" not in options:
        raise _error(url, "ssl_keyfile needs ssl_certfile")
    try:
        context = ssl.create_default_context(
            cafile=options.get("ssl_ca_certs"),
            capath=options.get("ssl_ca_path"),
            cadata=options.get("ssl_ca_data"),
        )
        context.check_hostname = cert_reqs != "none" and options.get("ssl_check_hostname") is not False
        context.verify_mode = _CERT_REQS[cert_reqs]
        if "ssl_min_version" in options:
            context.minimum_version = ssl.TLSVersion(options["ssl_min_version"])
        if "ssl_ciphers" in options:
            context.set_ciphers(options["ssl_ciphers"])
        if "ssl_certfile" in options:
            context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"), options.get("ssl_password"))
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise _error(url, f"TLS options cannot be used: {error}") from error
    return context
