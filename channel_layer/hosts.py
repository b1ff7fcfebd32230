"""The ``hosts`` of channels_redis, as broker URLs; and whether two URLs mean the same broker.

    "redis://h:6379/1"                                    a URL
    ("h", 6379)                                           host and port
    {"address": "redis://h", "db": 1, "ssl_cert_reqs": …} a URL, and options that it lacks
    {"host": "h", "port": 6379, "password": …, "ssl": …}  options of redis-py's Connection
    {"sentinels": [("h", 26379), …], "master_name": "m", "sentinel_kwargs": {…}, …}  Sentinels; options of the master

Several of them are shards. Lives here: the spellings. Does not live here: what a URL may hold (broker_url.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from channel_layer.broker_url import split_urls

__all__ = ["build_urls", "is_same_broker"]

_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
# Options of a host that become part of the URL itself; the others become its query.
_PLACED: Final = frozenset(
    {"host", "port", "path", "unix_socket_path", "username", "password", "ssl", "connection_class"}
)
# redis-py's, and objects: nothing of ours looks at them, and a layer works without. Our client reconnects by itself.
_IGNORED: Final = frozenset({"retry", "retry_on_error", "parser_class", "encoder_class", "redis_connect_func"})
_NO_COUNTERPART: Final = {
    "credential_provider": "give username and password",
    "cache": "there is nothing to cache",
    "service_class": "the connections are Trunkline's own",
}
# redis-py's connection classes, by what they connect to.
_SCHEMES: Final = {
    "Connection": "redis",
    "SSLConnection": "rediss",
    "UnixDomainSocketConnection": "unix",
    "SentinelManagedConnection": "redis",
    "SentinelManagedSSLConnection": "rediss",
}


def build_urls(hosts: object) -> str:
    """Return what ``hosts`` means: a URL, or several with commas between them, one for each shard.

    Raises ValueError and TypeError, which say what is expected.
    """
    if isinstance(hosts, str | bytes | Mapping) or not isinstance(hosts, Sequence):
        raise TypeError(f"hosts is a {type(hosts).__name__}, expected a list: hosts=['redis://localhost:6379']")
    return ",".join(_url_of(host, f"hosts[{index}]") for index, host in enumerate(hosts))


def is_same_broker(one: str, other: str) -> bool:
    """True if two valid URLs, or lists of them, mean the same brokers in the same order, however they are spelled.

    Compared are addresses and databases; not who connects, or with which options.
    """
    return one == other or [*map(_place_of, split_urls(one))] == [*map(_place_of, split_urls(other))]


def _url_of(host: object, where: str) -> str:
    if isinstance(host, str):
        return host
    if isinstance(host, Mapping):
        return _url_of_dict(host, where)
    if isinstance(host, tuple | list) and len(host) == 2:
        return f"redis://{_node(host, where)}"
    raise TypeError(f"{where} is {host!r}, expected a URL, a pair of host and port, or a dict")


def _url_of_dict(host: Mapping[str, Any], where: str) -> str:
    options = {name: value for name, value in host.items() if name not in _IGNORED and value is not None}
    for name, instead in _NO_COUNTERPART.items():
        if name in options:
            raise ValueError(f"{where}[{name!r}] has no counterpart here: {instead}")
    if "ssl_cert_reqs" in host and host["ssl_cert_reqs"] is None:
        options["ssl_cert_reqs"] = "none"  # what redis-py means by None
    master = options.pop("master_name", options.pop("service_name", None))
    sentinels = options.pop("sentinels", None)
    if master is not None or sentinels is not None:
        return _url_of_sentinels(master, sentinels, options, where)
    address = options.pop("address", None)
    if isinstance(address, str):
        return _url_of_address(address, options)
    if address is not None:
        if not isinstance(address, tuple | list) or len(address) != 2:
            raise TypeError(f"{where}['address'] is {address!r}, expected a URL or a pair of host and port")
        options["host"], options["port"] = address
    path = options.get("path", options.get("unix_socket_path"))
    scheme = _scheme_of(options, where)
    if path is not None or scheme == "unix":
        if not isinstance(path, str):
            raise TypeError(f"{where}['path'] is {path!r}, expected the path of a unix socket")
        return _assemble("unix", "", quote(path), options)
    node = _node((options.get("host", "localhost"), options.get("port", _PORT)), where)
    database = options.pop("db", None)
    return _assemble(scheme, node, f"/{database}" if database else "", options)


def _url_of_address(url: str, options: dict[str, Any]) -> str:
    """A URL with options beside it: as in redis-py, what the URL says holds."""
    if options.get("ssl"):
        url = url.replace("redis://", "rediss://", 1) if url.startswith("redis://") else url
    head, separator, rest = url.partition("://")
    place, slash, tail = rest.partition("/")
    if "@" not in place:
        place = _user(options) + place
    query = parse_qs(urlsplit(url).query)
    has_database = "db" in query or (head in ("redis", "rediss") and urlsplit(url).path.strip("/") != "")
    beside = {
        name: value
        for name, value in options.items()
        if name not in _PLACED and name not in query and not (name == "db" and (has_database or not value))
    }
    url = f"{head}{separator}{place}{slash}{tail}"
    return url + (("&" if "?" in url else "?") + urlencode(beside) if beside else "")


def _url_of_sentinels(master: object, sentinels: object, options: dict[str, Any], where: str) -> str:
    if not isinstance(master, str) or not master:
        raise ValueError(f"{where} has 'sentinels' and no 'master_name'")
    if not isinstance(sentinels, list | tuple) or not sentinels:
        raise ValueError(f"{where} has 'master_name' and no 'sentinels': a list of pairs of host and port")
    nodes: list[str] = []
    for sentinel in sentinels:
        if not isinstance(sentinel, tuple | list) or len(sentinel) not in (1, 2):
            raise TypeError(f"{where}['sentinels'] has {sentinel!r}, expected a pair of host and port")
        nodes.append(_node((sentinel[0], sentinel[1] if len(sentinel) == 2 else _SENTINEL_PORT), where))
    to_sentinels = options.pop("sentinel_kwargs", None) or {}
    for name in ("username", "password"):
        if to_sentinels.get(name) is not None:
            options[f"sentinel_{name}"] = to_sentinels[name]
    scheme = _scheme_of(options, where)
    if to_sentinels.get("ssl") and scheme == "redis":
        raise ValueError(f"{where}: TLS to the Sentinels and none to their master is not possible")
    if scheme == "rediss" and not to_sentinels.get("ssl"):
        options["sentinel_ssl"] = "false"  # a URL means both
    database = options.pop("db", None)
    path = f"/{quote(master, safe='')}" + (f"/{database}" if database else "")
    return _assemble(f"{scheme}+sentinel", ",".join(nodes), path, options)


def _scheme_of(options: Mapping[str, Any], where: str) -> str:
    kind = options.get("connection_class")
    if kind is None:
        return "rediss" if options.get("ssl") else "redis"
    scheme = _SCHEMES.get(getattr(kind, "__name__", ""))
    if scheme is None:
        raise ValueError(f"{where}['connection_class'] is {kind!r}, known are {', '.join(_SCHEMES)}")
    return "rediss" if scheme == "redis" and options.get("ssl") else scheme


def _assemble(scheme: str, place: str, path: str, options: Mapping[str, Any]) -> str:
    query = {name: value for name, value in options.items() if name not in _PLACED}
    url = f"{scheme}://{_user(options)}{place}{path}"
    return url + (f"?{urlencode(query)}" if query else "")


def _user(options: Mapping[str, Any]) -> str:
    if options.get("username") is None and options.get("password") is None:
        return ""
    return f"{quote(options.get('username') or '', safe='')}:{quote(options.get('password') or '', safe='')}@"


def _node(pair: Sequence[Any], where: str) -> str:
    host, port = pair
    if isinstance(port, str) and port.isdecimal():
        port = int(port)  # redis-py takes it, and settings are often read from the environment
    if not isinstance(host, str) or not isinstance(port, int) or isinstance(port, bool):
        raise TypeError(f"{where} has host {host!r} and port {port!r}, expected a str and an int")
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def _place_of(url: str) -> tuple[Any, ...]:
    """What tells one broker from another: kind, addresses, master, database."""
    scheme, _, rest = url.partition("://")
    parts = urlsplit(f"//{rest}")
    query = parse_qs(parts.query)
    path = unquote(parts.path)
    database = query.get("db", ["0"])[-1].lstrip("0")
    if scheme == "unix":
        return ("unix", path, database)
    _base, _, kind = scheme.partition("+")
    place = parts.netloc.rpartition("@")[2]
    port = _SENTINEL_PORT if kind == "sentinel" else _PORT
    nodes = frozenset(_node_of(node, port) for node in place.split(","))
    master, in_path = "", path.strip("/")
    if kind == "sentinel":
        master, _, in_path = in_path.partition("/")
    return (kind, nodes, master, in_path.lstrip("0") or database)


def _node_of(text: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{unquote(text)}")
    host = (parts.hostname or "localhost").lower()
    # One machine, and nobody runs two brokers on the same port of it.
    return "localhost" if host in ("127.0.0.1", "::1") else host, parts.port if parts.port is not None else port
