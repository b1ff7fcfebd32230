"""Broker URLs: where the broker is and how to speak to it.

    redis://[[user]:password@]host[:port][/db][?option=value…]
    rediss://…                  the same over TLS; options ssl_cert_reqs, ssl_ca_certs, ssl_certfile, ssl_keyfile …
    unix://[[user]:password@]/path/to/socket[?db=n]

redis-py parses them, so that a URL means here what it means to every other Python program. Lives here: what
redis-py leaves unchecked (it takes ``redis://host/name`` for database 0), and texts that show no password. No I/O
except reading the certificates that the URL names. Does not live here: connecting (broker_connection.py).
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from redis.connection import parse_url

__all__ = ["BrokerAddress", "parse_broker_url", "redact_url"]

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

    def __str__(self) -> str:
        return redact_url(self.url)


def redact_url(url: str) -> str:
    """Return ``url``, valid or not, with every password replaced by ``***``."""
    # Greedy up to the last "@": a password with a forgotten %-escape must not show either.
    return _PASSWORD_OPTION.sub(r"\1***", _USER_INFO.sub(r"\1:***@", url))


def parse_broker_url(url: str, *, socket_timeout_s: float = 5.0, connect_timeout_s: float = 3.0) -> BrokerAddress:
    """Parse a broker URL. The two timeouts hold unless the URL has ``socket_timeout``, ``socket_connect_timeout``.

    Raises ValueError with a text for the operator; it names the URL without its password.
    """
    try:
        # urlsplit's own errors quote parts of the URL, and what it takes for a port may be half a password.
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _error(url, "host or port is malformed (in a password, write special characters as %XX)") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise _error(url, "the scheme must be redis://, rediss:// or unix://")
    if parts.fragment:
        raise _error(url, "'#' is not allowed (in a password, write it as %23)")
    try:
        options: dict[str, Any] = dict(_parse_url(url))
    except ValueError as error:
        raise _error(url, str(error)) from None
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
        url=url,
        host=unquote(parts.hostname) if parts.hostname else "localhost",
        port=port if port is not None else 6379,
        path=path,
        username=username,
        password=password,
        db=db,
        ssl_context=_build_ssl_context(url, tls_options) if parts.scheme == "rediss" else None,
        socket_timeout_s=timeouts["socket_timeout"],
        connect_timeout_s=timeouts["socket_connect_timeout"],
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
