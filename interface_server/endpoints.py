"""Where to listen, in Twisted's words: ``tcp:8000``, ``ssl:443:privateKey=key.pem:certKey=cert.pem``, as in Daphne.

Strings become ``Endpoint`` records here, with Twisted's own tokenizer and its names of arguments; listening.py opens
the sockets. Twisted itself would open them in the process that serves, and each process of ``--interfaces`` must have
the same ones: so kinds that are no sockets which can be handed on (``onion:``, ``haproxy:``, those of plugins) are
refused.

    tcp:port:interface:backlog        tcp6: the same     ssl: the same, with privateKey and certKey
    unix:address:mode:backlog         lockfile means nothing: a socket nobody listens on is replaced
    systemd:domain=INET:index=0       or name=…
    adopted:fd                        from our supervisor to its processes; with privateKey and certKey it speaks TLS

To add a kind: ``_PARAMETERS``, ``parse_endpoint``, listening.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["Endpoint", "parse_endpoint", "render_adopted"]

_TLS: Final = ("privateKey", "certKey")
# The arguments of each kind, in Twisted's order for those that may stand without a name.
_PARAMETERS: Final = {
    "tcp": ("port", "interface", "backlog"),
    "tcp6": ("port", "backlog", "interface"),
    "ssl": ("port", *_TLS, "sslmethod", "interface", "backlog", "extraCertChain", "dhParameters"),
    "unix": ("address", "mode", "backlog", "lockfile"),
    "systemd": ("domain", "index", "name"),
    "adopted": ("fd", *_TLS),
}
_REQUIRED: Final = {
    "tcp": ("port",),
    "tcp6": ("port",),
    "ssl": ("port",),
    "unix": ("address",),
    "systemd": ("domain",),
    "adopted": ("fd",),
}
# What Twisted's SSL endpoints take beside, and where that is said here.
_ELSEWHERE: Final = {
    "sslmethod": "--ssl-min-version chooses the version of TLS",
    "extraCertChain": "the certificates between the server's and the root belong into the file of certKey, behind it",
    "dhParameters": "only ciphers with elliptic curves are offered",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One of: ``port`` (with ``host``), ``path``, ``fd``, ``domain`` with ``index`` or ``name``."""

    text: str  # as it was given
    host: str = ""  # all addresses
    port: int | None = None
    path: str | None = None
    mode: str | None = None  # octal
    fd: int | None = None
    domain: str | None = None  # of a socket of systemd's: INET, INET6, UNIX
    index: int | None = None
    name: str | None = None
    backlog: int | None = None
    certfile: str | None = None  # None: no TLS
    keyfile: str | None = None


def parse_endpoint(text: str) -> Endpoint:
    """Raises ValueError; its text is the line for the operator."""
    # Twisted has no public name for its tokenizer, which is as old as its documentation of these strings.
    from twisted.internet.endpoints import _parse

    try:
        positional, named = _parse(text)  # type: ignore[no-untyped-call]
    except RuntimeError:  # a StopIteration within its generator
        raise ValueError(f"endpoint {text!r}: a backslash at the end escapes nothing") from None
    kind = positional.pop(0).lower() if positional else ""
    parameters = _PARAMETERS.get(kind)
    if parameters is None:
        kinds = ", ".join(name for name in _PARAMETERS if name != "adopted")
        raise ValueError(
            f"endpoint {text!r}: sockets of the kind {kind!r} cannot be shared by processes; known are {kinds}"
        )
    if len(positional) > len(parameters):
        raise ValueError(f"endpoint {text!r}: {kind} takes no more than {', '.join(parameters)}")
    given = dict(zip(parameters, positional, strict=False))
    for name, value in named.items():
        if name not in parameters or name in given:
            raise ValueError(
                f"endpoint {text!r}: {name!r} is unknown or given twice; {kind} takes {', '.join(parameters)}"
            )
        given[name] = value
    for name in _REQUIRED[kind]:
        if not given.get(name):
            raise ValueError(f"endpoint {text!r}: {name} is missing")
    for name, where in _ELSEWHERE.items():
        if name in given:
            raise ValueError(f"endpoint {text!r}: {name} is not taken: {where}")
    if kind == "systemd" and ("index" in given) is ("name" in given):
        raise ValueError(f"endpoint {text!r}: either index or name is expected")
    if given.get("mode") and not _is_octal(given["mode"]):
        raise ValueError(f"endpoint {text!r}: mode is three octal digits")
    key = given.get("privateKey", "server.pem" if kind == "ssl" else None)
    return Endpoint(
        text=text,
        host=given.get("interface", "") or ("::" if kind == "tcp6" else "0.0.0.0" if "port" in given else ""),
        port=_number(text, given, "port", 65535),
        path=given.get("address"),
        mode=given.get("mode"),
        fd=_number(text, given, "fd"),
        domain=given.get("domain"),
        index=_number(text, given, "index"),
        name=given.get("name"),
        backlog=_number(text, given, "backlog"),
        certfile=given.get("certKey", key),
        keyfile=key,
    )


def render_adopted(fd: int, certfile: str | None, keyfile: str | None) -> str:
    """Return the endpoint as which a process is handed a socket that listens already."""
    from twisted.internet.endpoints import quoteStringArgument

    if certfile is None:
        return f"adopted:{fd}"
    key, certificate = (quoteStringArgument(path) for path in (keyfile or certfile, certfile))  # type: ignore[no-untyped-call]
    return f"adopted:{fd}:privateKey={key}:certKey={certificate}"


def _is_octal(text: str) -> bool:
    return 3 <= len(text) <= 4 and all(digit in "01234567" for digit in text)


def _number(text: str, given: dict[str, str], name: str, most: int | None = None) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or (most is not None and int(value) > most):
        raise ValueError(f"endpoint {text!r}: {name} is {value!r}, a number is expected")
    return int(value)
