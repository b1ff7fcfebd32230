"""Every flag of the ``trunkline`` commands, as one table.

An option is declared once, here: its flag, which commands have it, its type and its help. The parsers of
``serve``, ``interface`` and ``worker``, the environment variable ``TRUNKLINE_<FLAG>`` that may stand in for
each flag, and the command lines of the supervised processes are all derived from the table. Defaults live in
the settings classes (interface_server/settings.py, worker/settings.py), not here; where the flag has uvicorn's
name it has uvicorn's meaning.

To add a flag: a row in ``OPTIONS``, a field in the settings class it fills (``field``).
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from channel_layer.encryption import read_keys
from channel_layer.errors import InvalidName
from channel_layer.frames import WIRE_VERSION, WIRE_VERSION_PREVIOUS
from channel_layer.names import Keys
from channel_layer.process_life import STATUS_VARIABLE

__all__ = [
    "OPTIONS",
    "Option",
    "UsageError",
    "build_parser",
    "find_unknown_variables",
    "parse",
    "render_flags",
    "render_secrets",
]

Command = str
SERVE: Final = "serve"
INTERFACE: Final = "interface"
WORKER: Final = "worker"
HEALTH: Final = "health"
ALL: Final = (SERVE, INTERFACE, WORKER)
EVERY: Final = (SERVE, INTERFACE, WORKER, HEALTH)
SOCKETS: Final = (SERVE, INTERFACE)
APPLICATION: Final = (SERVE, WORKER)


# What loops, timers and the broker's milliseconds can all hold, and nobody waits for.
_SECONDS_MAX: Final = 365 * 24 * 3600

# A value of an environment file: in quotes, perhaps with a comment behind it; the comment behind a value without.
_QUOTED = re.compile(r"""(['"])(.*?)\1\s*(?:#.*)?""")
_COMMENT = re.compile(r"\s+#.*")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2: a token
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # section 5.5


class UsageError(Exception):
    """The command line is wrong; the text is the one line the user gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One flag. ``convert`` turns its text into a value or raises ValueError with the reason."""

    flag: str
    commands: tuple[Command, ...]
    help: str
    convert: Callable[[str], Any] | None = str  # None: a switch, --flag and --no-flag
    metavar: str | None = None
    repeat: bool = False
    short: str | None = None  # a second spelling: one letter
    field: str | None = None  # field of the settings class, where its name differs from the flag's
    for_supervisor: bool = False  # not handed on to the processes it starts
    secret: bool = False  # handed on in the environment: everybody may read a command line

    @property
    def name(self) -> str:
        """Attribute of the parsed options."""
        return self.flag.replace("-", "_")

    @property
    def setting(self) -> str:
        return self.field or self.name

    @property
    def environment_variable(self) -> str:
        return "TRUNKLINE_" + self.name.upper()


def _integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError("a whole number is expected") from None
        if value < lowest or (highest is not None and value > highest):
            raise ValueError(
                f"at least {lowest} is expected" if highest is None else f"{lowest} to {highest} expected"
            )
        return value

    return convert


def _seconds(*, zero_is_off: bool = False) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError("a number of seconds is expected") from None
        if not 0 <= value < float("inf") or (value == 0 and not zero_is_off):
            raise ValueError("a number of seconds above 0 is expected" + (", or 0 for none" if zero_is_off else ""))
        if value > _SECONDS_MAX:
            raise ValueError(f"at most {_SECONDS_MAX} seconds (a year) are expected")
        return value

    return convert


def _one_of(*choices: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError("one of " + ", ".join(choices) + " is expected")
        return text.lower()

    return convert


def _certificate_demand(text: str) -> str:
    return _one_of("none", "optional", "required")({"0": "none", "1": "optional", "2": "required"}.get(text, text))


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    name, value = name.strip(), value.strip(" \t")
    if not colon or not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
        raise ValueError("Name:Value is expected, as HTTP writes it")
    return name.lower().encode("ascii"), value.encode("latin-1")


def _prefix(text: str) -> str:
    try:
        return Keys(text).prefix
    except InvalidName:
        raise ValueError("ASCII letters, digits, '.', ':', '-' and '_' are expected") from None


def _mode(text: str) -> str:
    if not re.fullmatch("0?[0-7]{3}", text):
        raise ValueError("three octal digits are expected, such as 660")
    return text


def _encryption_key(text: str) -> str:
    if not text.strip():  # an unset variable of a shell, say; nobody shall believe that it is encrypted
        raise ValueError("a key, or @FILE, is expected")
    read_keys([text])  # a file that cannot be read is told now; each process reads it again when it starts
    return text


def _existing_file(text: str) -> str:
    if not Path(text).is_file():
        raise ValueError("no such file")
    return text


def _existing_directory(text: str) -> str:
    if not Path(text).is_dir():
        raise ValueError("no such directory")
    return text


OPTIONS: Final[tuple[Option, ...]] = (
    # Where the broker is
    Option(
        flag="redis",
        commands=ALL,
        metavar="URL",
        field="redis_url",
        secret=True,  # it may hold a password
        help="the broker: redis://, rediss:// or unix:// URL, redis+sentinel://…/MASTER, redis+cluster://…; several "
        "with commas between them are shards (serve: an embedded one if absent)",
    ),
    Option(
        flag="prefix",
        commands=ALL,
        convert=_prefix,
        help="keys begin with this, so that deployments can share a broker (trunkline)",
    ),
    Option(
        flag="encryption-keys",
        commands=ALL,
        convert=_encryption_key,
        metavar="KEY",
        repeat=True,
        secret=True,
        help="encrypt what goes through the broker: a key, or @FILE of one key a line; may be repeated: the first "
        "encrypts, each decrypts. Better as a variable: other users can read command lines",
    ),
    Option(
        flag="wire-version",
        commands=ALL,
        convert=_integer(WIRE_VERSION_PREVIOUS, WIRE_VERSION),
        metavar="N",
        help=f"version of what goes between the halves, for upgrades ({WIRE_VERSION}, or {WIRE_VERSION_PREVIOUS})",
    ),
    # Sockets
    Option(flag="host", commands=SOCKETS, help="address to listen on (127.0.0.1)"),
    Option(flag="port", commands=SOCKETS, convert=_integer(0, 65535), help="port to listen on (8000); 0 takes any"),
    Option(flag="uds", commands=SOCKETS, metavar="PATH", help="listen on a unix socket instead"),
    Option(
        flag="uds-permissions",
        commands=SOCKETS,
        convert=_mode,
        metavar="MODE",
        help="mode of the unix socket, octal (666)",
    ),
    Option(
        flag="fd",
        commands=SOCKETS,
        convert=_integer(0),
        help="take over a listening socket with this file descriptor (one of systemd's is found without)",
    ),
    Option(
        flag="endpoint",
        short="e",
        commands=SOCKETS,
        metavar="TEXT",
        repeat=True,
        field="endpoints",
        help="listen on this, too, in Twisted's words: tcp:8000:interface=127.0.0.1, unix:/run/app.sock, "
        "ssl:443:privateKey=key.pem:certKey=cert.pem, systemd:domain=INET:index=0; may be repeated",
    ),
    Option(
        flag="reuse-port",
        commands=SOCKETS,
        convert=None,
        help="bind with SO_REUSEPORT, to share the port with other commands",
    ),
    Option(flag="backlog", commands=SOCKETS, convert=_integer(1), help="connections the kernel may hold (2048)"),
    Option(
        flag="ssl-certfile",
        commands=SOCKETS,
        convert=_existing_file,
        metavar="FILE",
        help="speak TLS with this certificate (PEM, with those between it and the root); SIGHUP reads it again",
    ),
    Option(
        flag="ssl-keyfile",
        commands=SOCKETS,
        convert=_existing_file,
        metavar="FILE",
        help="private key of the certificate (PEM), if it is not in the same file",
    ),
    Option(
        flag="ssl-keyfile-password",
        commands=SOCKETS,
        metavar="TEXT",
        secret=True,
        help="password of the private key; better given as TRUNKLINE_SSL_KEYFILE_PASSWORD",
    ),
    Option(
        flag="ssl-ca-certs",
        commands=SOCKETS,
        convert=_existing_file,
        metavar="FILE",
        help="certificates (PEM) of those who sign clients' certificates",
    ),
    Option(
        flag="ssl-cert-reqs",
        commands=SOCKETS,
        convert=_certificate_demand,
        metavar="WHEN",
        help="client certificates: none, optional or required, as words or as 0, 1, 2 (none)",
    ),
    Option(
        flag="ssl-ciphers",
        commands=SOCKETS,
        metavar="LIST",
        help="ciphers of TLS 1.2, in OpenSSL's words (those with forward secrecy and AEAD)",
    ),
    Option(
        flag="ssl-min-version",
        commands=SOCKETS,
        convert=_one_of("tlsv1.2", "tlsv1.3"),
        metavar="VERSION",
        help="TLSv1.2 or TLSv1.3 (TLSv1.2)",
    ),
    Option(
        flag="interfaces",
        commands=SOCKETS,
        convert=_integer(1, 1024),
        metavar="N",
        for_supervisor=True,
        help="interface server processes (1)",
    ),
    Option(flag="root-path", commands=SOCKETS, help="ASGI root_path, where a proxy mounts the application"),
    Option(
        flag="proxy-headers",
        commands=SOCKETS,
        convert=None,
        help="believe X-Forwarded-For and -Proto of the addresses in --forwarded-allow-ips (on)",
    ),
    Option(
        flag="forwarded-allow-ips",
        commands=SOCKETS,
        metavar="LIST",
        help="addresses and networks of proxies, comma separated, or * (127.0.0.1,::1)",
    ),
    Option(
        flag="header",
        commands=SOCKETS,
        convert=_header,
        metavar="NAME:VALUE",
        repeat=True,
        field="extra_headers",
        help="add a header to every response; may be repeated",
    ),
    Option(
        flag="pathsend",
        commands=SOCKETS,
        convert=None,
        help="offer http.response.pathsend: interface servers and workers see the same files (off)",
    ),
    Option(flag="server-header", commands=SOCKETS, convert=None, help="send a Server header (on)"),
    Option(flag="date-header", commands=SOCKETS, convert=None, help="send a Date header (on)"),
    Option(flag="access-log", commands=SOCKETS, convert=None, help="log a line for each request (on)"),
    Option(
        flag="timeout-keep-alive",
        commands=SOCKETS,
        convert=_seconds(),
        metavar="S",
        field="keep_alive_timeout_s",
        help="close an idle connection after this many seconds (5)",
    ),
    Option(
        flag="timeout-headers",
        commands=SOCKETS,
        convert=_seconds(),
        metavar="S",
        field="header_timeout_s",
        help="longest time for a client to send the head of a request (30)",
    ),
    Option(
        flag="timeout-body",
        commands=SOCKETS,
        convert=_seconds(zero_is_off=True),
        metavar="S",
        field="body_timeout_s",
        help="longest silence of a client within the body of its request (60; 0: any)",
    ),
    Option(
        flag="body-rate",
        commands=SOCKETS,
        convert=_integer(0),
        metavar="BYTES",
        help="bytes a second at which the body of a request must come in the long run (64; 0: any)",
    ),
    Option(
        flag="timeout-write",
        commands=SOCKETS,
        convert=_seconds(zero_is_off=True),
        metavar="S",
        field="write_timeout_s",
        help="drop a client that reads nothing of what waits for it for this many seconds (120; 0: never)",
    ),
    Option(
        flag="ws-max-size",
        commands=SOCKETS,
        convert=_integer(1),
        metavar="BYTES",
        field="ws_max_size_bytes",
        help="largest WebSocket message of a client (16777216; 256 MiB at most); above it: close 1009",
    ),
    Option(
        flag="ws-per-message-deflate",
        commands=SOCKETS,
        convert=None,
        help="compress WebSocket messages of 256 bytes and more, with clients that offer it (off)",
    ),
    Option(
        flag="ws-ping-interval",
        commands=SOCKETS,
        convert=_seconds(zero_is_off=True),
        metavar="S",
        field="ws_ping_interval_s",
        help="ping a WebSocket client that was silent for this long (20; 0: never)",
    ),
    Option(
        flag="ws-ping-timeout",
        commands=SOCKETS,
        convert=_seconds(zero_is_off=True),
        metavar="S",
        field="ws_ping_timeout_s",
        help="close the connection if a ping is not answered in this time (20; 0: never)",
    ),
    Option(
        flag="ws-handshake-timeout",
        commands=SOCKETS,
        convert=_seconds(),
        metavar="S",
        field="ws_handshake_timeout_s",
        help="longest time for the application to accept a WebSocket, waiting for a worker included (30)",
    ),
    Option(
        flag="handover",
        commands=SOCKETS,
        convert=_one_of("checkpoint", "always", "never"),
        metavar="WHICH",
        help="which WebSockets go on in another worker when theirs stops or dies: those that stored a checkpoint, "
        "always all (others begin anew), never any (checkpoint)",
    ),
    Option(
        flag="handover-timeout",
        commands=SOCKETS,
        convert=_seconds(),
        metavar="S",
        field="handover_timeout_s",
        help="a WebSocket that no other worker goes on with in this time is closed, 1012 (30)",
    ),
    Option(
        flag="queue-timeout",
        commands=SOCKETS,
        convert=_seconds(),
        metavar="S",
        field="queue_timeout_s",
        help="a request that no worker takes in this time is answered 503 (30)",
    ),
    Option(
        flag="broker-wait",
        commands=SOCKETS,
        convert=_seconds(),
        metavar="S",
        field="broker_wait_s",
        help="a new request waits this long for a broker that is away, then gets 503 (5)",
    ),
    Option(
        flag="client-buffer",
        commands=SOCKETS,
        convert=_integer(65536),
        metavar="BYTES",
        field="client_buffer_bytes_max",
        help="broadcasts waiting for one client (1048576); above it: close 1013",
    ),
    Option(
        flag="buffer-memory",
        commands=SOCKETS,
        convert=_integer(1048576),
        metavar="BYTES",
        field="buffer_memory_bytes_max",
        help="broadcasts waiting for all clients of a process (268435456); above it the slowest are closed",
    ),
    Option(
        flag="limit-concurrency",
        commands=SOCKETS,
        convert=_integer(1),
        metavar="N",
        field="connections_max",
        help="client connections of one process; more get 503 (no limit)",
    ),
    # The application
    Option(
        flag="workers",
        commands=APPLICATION,
        convert=_integer(1, 1024),
        metavar="N",
        for_supervisor=True,
        help="worker processes (1)",
    ),
    Option(
        flag="channel",
        commands=(WORKER,),
        metavar="NAME",
        repeat=True,
        field="channels",
        help="take background work from this channel instead of HTTP and WebSockets; may be repeated",
    ),
    Option(
        flag="protocol",
        commands=APPLICATION,
        metavar="NAME",
        repeat=True,
        field="protocols",
        help="also take connections of a protocol server of your own, by its scope type; may be repeated",
    ),
    Option(flag="factory", commands=APPLICATION, convert=None, help="APP is a function that makes the application"),
    Option(
        flag="app-dir",
        commands=APPLICATION,
        convert=_existing_directory,
        metavar="DIR",
        help="look for APP in this directory (.)",
    ),
    Option(
        flag="interface",
        commands=APPLICATION,
        convert=_one_of("auto", "asgi3", "asgi2", "wsgi"),
        help="auto (asgi3 or asgi2), asgi3, asgi2 or wsgi (auto)",
    ),
    Option(
        flag="threads",
        commands=APPLICATION,
        convert=_integer(1),
        metavar="N",
        help="WSGI requests one worker runs at a time (16); more wait in the queue",
    ),
    Option(
        flag="lifespan",
        commands=APPLICATION,
        convert=_one_of("auto", "on", "off"),
        help="auto, on (its failure is fatal) or off (auto)",
    ),
    Option(
        flag="concurrency",
        commands=APPLICATION,
        convert=_integer(1),
        metavar="N",
        help="HTTP requests one worker runs at a time (100); more wait in the queue",
    ),
    Option(
        flag="max-websockets",
        commands=APPLICATION,
        convert=_integer(1),
        metavar="N",
        field="websockets_max",
        help="WebSockets one worker holds (20000)",
    ),
    Option(
        flag="application-close-timeout",
        commands=APPLICATION,
        convert=_seconds(),
        metavar="S",
        field="close_timeout_s",
        help="an application has this long to return after its client left (10)",
    ),
    Option(
        flag="shutdown-timeout",
        commands=APPLICATION,
        convert=_seconds(zero_is_off=True),
        metavar="S",
        field="lifespan_shutdown_timeout_s",
        help="the application's lifespan shutdown may take this long (30)",
    ),
    # Start and end
    Option(
        flag="drain-timeout",
        commands=ALL,
        convert=_seconds(zero_is_off=True),
        metavar="S",
        field="drain_timeout_s",
        help="after SIGTERM: time for requests to finish, and for WebSockets to be handed over or closed (20)",
    ),
    Option(
        flag="drain-delay",
        commands=SOCKETS,
        convert=_seconds(zero_is_off=True),
        metavar="S",
        field="drain_delay_s",
        help="after SIGTERM: go on accepting for this long, not ready, while a balancer turns to others (0)",
    ),
    Option(
        flag="hang-timeout",
        commands=ALL,
        convert=_seconds(zero_is_off=True),
        metavar="S",
        field="hang_timeout_s",
        help="end a process whose loop is blocked for this long (60; 0: never)",
    ),
    Option(
        flag="admin-host",
        commands=EVERY,
        for_supervisor=True,
        help="address of the admin port (127.0.0.1)",
    ),
    Option(
        flag="admin-port",
        commands=EVERY,
        for_supervisor=True,
        convert=_integer(0, 65535),
        metavar="PORT",
        help="answer /healthz and /readyz on this port; health: ask there (0: none)",
    ),
    # serve only
    Option(
        flag="reload",
        commands=(SERVE,),
        convert=None,
        for_supervisor=True,
        help="restart the workers when a Python file changes",
    ),
    Option(
        flag="reload-dir",
        commands=(SERVE,),
        convert=_existing_directory,
        metavar="DIR",
        repeat=True,
        for_supervisor=True,
        help="watch this directory instead of --app-dir; may be repeated",
    ),
    # Logging and environment
    Option(
        flag="log-level",
        commands=ALL,
        convert=_one_of("critical", "error", "warning", "info", "debug", "trace"),
        help="critical, error, warning, info, debug or trace (info)",
    ),
    Option(
        flag="log-config",
        commands=ALL,
        convert=_existing_file,
        metavar="FILE",
        help="logging configuration: .ini, .json or .yaml (needs PyYAML)",
    ),
    Option(
        flag="env-file",
        commands=ALL,
        convert=_existing_file,
        metavar="FILE",
        help="read environment variables from this file; those already set win",
    ),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")


_ARGUMENTS: Final = {SERVE: " APP", INTERFACE: "", WORKER: " APP", HEALTH: " [ready | live]"}


def build_parser(version: str) -> argparse.ArgumentParser:
    """Return the parser of the whole command. It raises UsageError instead of leaving the process."""
    parser = _Parser(
        prog="trunkline",
        allow_abbrev=False,  # what is unique today is ambiguous with the next flag
        description="Serves ASGI applications with the sockets in one process and the application in another.",
    )
    parser.add_argument("--version", action="version", version=f"trunkline {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for command, summary in (
        (SERVE, "everything in one command: broker, interface servers, workers"),
        (INTERFACE, "interface servers: hold the sockets"),
        (WORKER, "workers: run the application"),
        (HEALTH, "ask the admin port of a command how it is; the exit status answers"),
    ):
        sub = commands.add_parser(
            command,
            help=summary,
            allow_abbrev=False,
            usage=f"trunkline {command} [FLAG …]{_ARGUMENTS[command]}",
            description=summary.capitalize() + ".",
            epilog="Each flag may be given as an environment variable: TRUNKLINE_, then its name in capitals, with _ "
            "for -. Defaults are in brackets.",
        )
        if command in APPLICATION:
            sub.add_argument("app", metavar="APP", nargs="?", help="module:attribute (or TRUNKLINE_APP)")
        if command == HEALTH:
            sub.add_argument("what", choices=("ready", "live"), nargs="?", default="ready", help="ready unless given")
        for option in OPTIONS:
            if command in option.commands:
                _add_argument(sub, option)
    return parser


def _add_argument(parser: argparse.ArgumentParser, option: Option) -> None:
    flags: dict[str, Any] = {"dest": option.name, "default": None, "help": option.help}
    if option.convert is None:
        parser.add_argument(f"--{option.flag}", action=argparse.BooleanOptionalAction, **flags)
        return
    if option.repeat:
        flags["action"] = "append"
    # Values stay text here: they are converted in one place together with those of the environment.
    names = [f"--{option.flag}", *([f"-{option.short}"] if option.short is not None else [])]
    parser.add_argument(*names, metavar=option.metavar or option.flag.upper().replace("-", "_"), **flags)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str], environ: Mapping[str, str]) -> argparse.Namespace:
    """Parse a command line; a flag that is absent is taken from its environment variable.

    A supervised process takes secrets alone from variables: its supervisor has read the others, has opened the
    sockets they name, and hands on as flags what the process needs.

    The result has ``command``, ``app`` (where the command has one) and an attribute for each option of the
    command: its converted value, or None where neither flag nor variable is given. Raises UsageError.
    """
    options = parser.parse_args(argv)
    if options.command is None:
        raise UsageError("trunkline: a command is expected: serve, interface, worker, health (see trunkline --help)")
    is_supervised = STATUS_VARIABLE in environ  # ours alone: the process removes it before it starts anything
    if options.command == HEALTH:
        options.env_file = None
    elif options.env_file is None and environ.get("TRUNKLINE_ENV_FILE"):
        options.env_file = environ["TRUNKLINE_ENV_FILE"]
    if options.env_file is not None:
        environ = {**_read_env_file(options.env_file), **environ}
    for option in OPTIONS:
        if options.command not in option.commands:
            continue
        value = getattr(options, option.name)
        if value is None:
            text = environ.get(option.environment_variable)
            if text and (option.secret or not is_supervised):
                value = _convert(option, _split(option, text), option.environment_variable)
        elif option.convert is not None:
            value = _convert(option, value, f"--{option.flag}")
        setattr(options, option.name, value)
    if options.command == SERVE and options.reload_dir is not None and options.reload is None:
        raise UsageError("trunkline serve: --reload-dir is given, and --reload is not")
    if options.command in SOCKETS and options.fd is not None and options.uds is not None:
        raise UsageError(f"trunkline {options.command}: --fd and --uds are given, one of them is expected")
    if options.command in SOCKETS and not is_supervised:
        _check_sockets(options)
    if options.command == WORKER and options.channel is not None and options.protocol is not None:
        raise UsageError(
            "trunkline worker: --channel and --protocol are given: a worker for background work takes no connections"
        )
    if options.command in APPLICATION:
        options.app = options.app or environ.get("TRUNKLINE_APP")
        if not options.app:
            raise UsageError(f"trunkline {options.command}: APP is expected, for example main:app (or TRUNKLINE_APP)")
    return options


def _check_sockets(options: argparse.Namespace) -> None:
    endpoints = options.endpoint or ()
    if (
        options.uds_permissions is not None
        and options.uds is None
        and not any(endpoint.startswith("unix:") for endpoint in endpoints)
    ):
        raise UsageError(f"trunkline {options.command}: --uds-permissions is given, and --uds is not")
    for item in (part.strip() for part in (options.forwarded_allow_ips or "*").split(",")):
        # What stands for a unix socket is its path, as it was given.
        if item in ("", "*", options.uds) or item.startswith("/") or any(item in endpoint for endpoint in endpoints):
            continue
        try:
            ipaddress.ip_network(item)
        except ValueError as error:
            raise UsageError(
                f"--forwarded-allow-ips: {item!r} is not valid: addresses, networks such as 10.0.0.0/8, paths of "
                f"unix sockets, or * are expected ({error})"
            ) from error


def find_unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A line for each variable that looks like one of ours, and is none."""
    known = {option.environment_variable for option in OPTIONS} | {"TRUNKLINE_APP"}
    lines = []
    for name in sorted(environ):
        if name.startswith("TRUNKLINE_") and name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75)
            hint = f", did you mean {nearest[0]}?" if nearest else ""
            lines.append(f"the environment variable {name} means nothing to this release{hint}")
    return lines


def _split(option: Option, text: str) -> str | list[str]:
    return [line for line in text.split("\n") if line] if option.repeat else text


def _convert(option: Option, value: Any, place: str) -> Any:
    if option.convert is None:
        lowered = value.lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off"):
            return False
        raise UsageError(f"{place}={value!r} is not valid: true or false is expected")
    converted = []
    for item in value if option.repeat else (value,):
        try:
            converted.append(option.convert(item))
        except ValueError as error:
            raise UsageError(f"{place}: {item!r} is not valid: {error}") from error
    return tuple(converted) if option.repeat else converted[0]


def _read_env_file(path: str) -> dict[str, str]:
    """NAME=value lines, with optional quotes, ``export`` and comments; nothing is expanded."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--env-file: {path!r} cannot be read: {error}") from error
    variables = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(f"--env-file: {path}, line {number}: NAME=value is expected, got {line!r}")
        variables[name.strip()] = _unquote(value.strip())
    return variables


def _unquote(value: str) -> str:
    """The value of a line, without its quotes and the comment behind it."""
    quoted = _QUOTED.fullmatch(value)
    if quoted is not None:
        return quoted[2]
    return _COMMENT.sub("", value)


def load_env_file(path: str) -> None:
    """Put the variables of a file into this process's environment; those already set win."""
    for name, value in _read_env_file(path).items():
        os.environ.setdefault(name, value)


def render_flags(options: argparse.Namespace, command: Command, skip: Iterable[str] = ()) -> list[str]:
    """Return the flags with which a supervised process of ``command`` gets the values in ``options``."""
    flags: list[str] = []
    for option in OPTIONS:
        value = getattr(options, option.name, None)
        if value is None or command not in option.commands or option.for_supervisor or option.secret:
            continue
        if option.name in skip:
            continue
        if option.convert is None:
            flags.append(f"--{option.flag}" if value else f"--no-{option.flag}")
        else:
            for item in value if option.repeat else (value,):
                flags.append(f"--{option.flag}={_render(item)}")
    return flags


def render_secrets(options: argparse.Namespace, command: Command) -> dict[str, str]:
    """Return the environment variables with which such a process gets what is no other user's business."""
    return {
        option.environment_variable: "\n".join(value) if option.repeat else value
        for option in OPTIONS
        if option.secret and command in option.commands and (value := getattr(options, option.name, None)) is not None
    }


def _render(value: Any) -> str:
    if isinstance(value, tuple):  # a header
        name, content = value
        return f"{name.decode('latin-1')}:{content.decode('latin-1')}"
    return str(value)
