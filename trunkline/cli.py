"""The ``trunkline`` command: from a command line to running processes.

    trunkline serve APP       embedded broker, interface servers and workers, supervised
    trunkline interface       interface servers
    trunkline worker APP      workers
    trunkline health          ask one of these how it is

With one process to run, ``interface`` and ``worker`` run it themselves; with more they supervise. Exit status: 0
after a stop by signal, 2 for wrong input, 1 for what could not be done; in both cases one line on stderr says why.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from channel_layer.process_life import STATUS_VARIABLE
from trunkline.broker import EmbeddedBroker, find_server
from trunkline.health import ask
from trunkline.lifeline import hold_lifeline
from trunkline.logs import configure_logging
from trunkline.options import (
    OPTIONS,
    UsageError,
    build_parser,
    find_unknown_variables,
    load_env_file,
    parse,
    render_flags,
    render_secrets,
)
from trunkline.reload import SourceWatch
from trunkline.supervisor import ProcessSpec, Role, Supervisor

if TYPE_CHECKING:
    from interface_server.listening import Listener
    from interface_server.settings import InterfaceSettings
    from worker.settings import WorkerSettings

__all__ = ["main"]

logger = logging.getLogger("trunkline.supervisor")

Settings = TypeVar("Settings")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    hold_lifeline()
    version = importlib.metadata.version("trunkline")
    try:
        options = parse(build_parser(version), sys.argv[1:] if argv is None else argv, os.environ)
        if options.command == "health":
            return _ask_health(options)
        if options.env_file is not None:
            load_env_file(options.env_file)
        configure_logging(options.log_level, options.log_config)
        _write_stacks_when_aborted()
        if STATUS_VARIABLE not in os.environ:  # else our supervisor has said it
            for line in find_unknown_variables(os.environ):
                logger.warning("%s", line)
        with _own_packages_first():
            # Here, not at the top: an application's directory may hold a worker.py, and ours must be the
            # one that is imported. From here on nothing imports these packages by name again.
            import interface_server.server
            import worker.process
        if options.command in ("serve", "interface"):
            _take_activated_socket(options)
        if options.command == "interface" and (options.interfaces or 1) == 1:
            return interface_server.server.run(_interface_settings(options))
        if options.command == "worker" and (options.workers or 1) == 1:
            return worker.process.run(_worker_settings(options))
        return _supervise(options, version)
    except UsageError as error:
        print(error if str(error).startswith("trunkline") else f"trunkline: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"trunkline: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before there was a signal handler: while it looks at the broker, say
        return 0


def _ask_health(options: argparse.Namespace) -> int:
    if not options.admin_port:
        raise UsageError("trunkline health: --admin-port PORT (or TRUNKLINE_ADMIN_PORT) of a command is expected")
    return ask(options.what, options.admin_host or "127.0.0.1", options.admin_port)


def _write_stacks_when_aborted() -> None:
    """SIGABRT, with which a supervisor ends what hangs, shows where it hangs."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no stderr, or one without a descriptor
        faulthandler.enable()


def _take_activated_socket(options: argparse.Namespace) -> None:
    """Use the socket that systemd opened, unless the flags name one."""
    from interface_server.listening import activated_descriptor

    if not _names_address(options) and not options.endpoint:
        options.fd = activated_descriptor(os.environ, os.getpid())


def _names_address(options: argparse.Namespace) -> bool:
    return any(value is not None for value in (options.fd, options.uds, options.host, options.port))


@contextlib.contextmanager
def _own_packages_first() -> Iterator[None]:
    """While entered, ``worker``, ``interface_server`` and ``channel_layer`` are those beside ``trunkline``."""
    root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)
    try:
        yield
    finally:
        sys.path.remove(root)


# From options to settings


def _given(options: argparse.Namespace, settings_class: type, command: str) -> dict[str, Any]:
    """The fields of a settings class for which an option was given; the class has the defaults of the rest."""
    names = {field.name for field in fields(settings_class)}
    return {
        option.setting: value
        for option in OPTIONS
        if command in option.commands and option.setting in names
        if (value := getattr(options, option.name, None)) is not None
    }


def _interface_settings(options: argparse.Namespace) -> InterfaceSettings:
    from interface_server.settings import InterfaceSettings

    values = _given(options, InterfaceSettings, "interface")
    values["redis_url"] = _redis_url(options)
    # As with Daphne: an address that is named is listened on beside the endpoints, the default one is not.
    values["endpoints_only"] = bool(options.endpoint) and not _names_address(options)
    return _checked(InterfaceSettings, values)


def _worker_settings(options: argparse.Namespace) -> WorkerSettings:
    from worker.settings import WorkerSettings

    values = _given(options, WorkerSettings, "worker")
    values["redis_url"] = _redis_url(options)
    values["application"] = options.app
    return _checked(WorkerSettings, values)


def _checked(settings_class: type[Settings], values: dict[str, Any]) -> Settings:
    try:
        return settings_class(**values)
    except ValueError as error:
        raise UsageError(_with_flags(str(error))) from error


def _with_flags(text: str) -> str:
    """What a settings class says of its fields, in the words of the command line."""
    for option in OPTIONS:
        # Short names are words, too: they are fields where a text begins with them.
        pattern = rf"\b{option.setting}\b" if "_" in option.setting else rf"^{option.setting}(?= is |s? are |: )"
        text = re.sub(pattern, f"--{option.flag}", text)
    return text


def _redis_url(options: argparse.Namespace) -> str:
    if options.redis is None:
        raise UsageError(f"trunkline {options.command}: --redis URL (or TRUNKLINE_REDIS) is expected")
    url: str = options.redis
    return url


# Several processes


def _supervise(options: argparse.Namespace, version: str) -> int:
    from channel_layer import leases
    from channel_layer.broker_url import redact_urls
    from channel_layer.names import Keys
    from interface_server.listening import describe_all, open_listeners

    # What is wrong with the input is said here, once, before every process says it.
    if options.command != "interface":
        _check_application(options)
    program = None
    if options.command == "serve" and options.redis is None:
        program = find_server()
    else:
        _check_broker(_redis_url(options))
    broker: EmbeddedBroker | None = None
    listeners: list[Listener] = []
    watch = None
    with contextlib.ExitStack() as stack:
        if program is not None:
            broker = EmbeddedBroker(program)
            stack.callback(broker.remove)
            options.redis = broker.url
        if options.command in ("serve", "interface"):
            listeners = open_listeners(_interface_settings(options))
            for listener in listeners:
                stack.enter_context(listener.socket)
                stack.callback(listener.remove_file)
            _check_certificates(_interface_settings(options), listeners)
        if options.command == "serve" and options.reload:
            watch = SourceWatch(options.reload_dir or (options.app_dir or ".",))
        # An application's own subprocesses and scripts find the broker, too.
        environment = {"TRUNKLINE_REDIS": options.redis}
        prefix = {}
        if options.prefix is not None:
            environment["TRUNKLINE_PREFIX"] = prefix["prefix"] = options.prefix

        def announce() -> None:
            what = options.app if options.command != "interface" else "sockets"
            where = f" on {describe_all(listeners)}" if listeners else ""
            logger.info("Trunkline %s serves %s%s (Ctrl-C to quit)", version, what, where)
            logger.info("broker: %s%s", "embedded, " if broker is not None else "", redact_urls(options.redis))
            logger.info("%s", "; ".join(_summary(supervisor)))

        def listen_no_more() -> None:
            # Nobody is started any more who needs these; while we hold them, clients would connect and wait for ever.
            for listener in listeners:
                listener.socket.close()

        supervisor = Supervisor(
            _process_specs(options, listeners),
            broker=broker,
            environment=environment,
            on_ready=announce,
            on_stopping=listen_no_more,
            watch=watch,
            tell_death=partial(leases.tell_death, options.redis, Keys(**prefix)),
            **_times(options),
        )
        return asyncio.run(supervisor.run())


def _times(options: argparse.Namespace) -> dict[str, Any]:
    """What the supervisor needs to know of its processes' settings."""
    drains, values = [], {}
    if options.command in ("serve", "interface"):
        sockets = _interface_settings(options)
        drains.append(sockets.drain_delay_s + sockets.drain_timeout_s)
    if options.command in ("serve", "worker"):
        worker = _worker_settings(options)
        drains.append(worker.drain_timeout_s + worker.lifespan_shutdown_timeout_s)
    settings: InterfaceSettings | WorkerSettings = sockets if options.command == "interface" else worker
    for name in ("hang_timeout_s", "admin_host", "admin_port"):
        values[name] = getattr(settings, name)
    return {"stop_timeout_s": max(drains), **values}


def _process_specs(options: argparse.Namespace, listeners: Sequence[Listener]) -> list[ProcessSpec]:
    # -P: the current directory must not come first, where an application's worker.py would hide ours.
    python = [sys.executable, "-P", "-m", "trunkline"]
    specs = []
    if listeners:
        flags = render_flags(
            options,
            "interface",
            skip=("host", "port", "uds", "uds_permissions", "fd", "endpoint", "reuse_port", "backlog"),
        )
        sockets = [f"--endpoint={listener.render_adopted()}" for listener in listeners]
        command = [*python, "interface", *sockets, "--interfaces=1", "--admin-port=0", *flags]
        specs += [
            ProcessSpec(
                role=Role.INTERFACE,
                number=n,
                command=command,
                environment=render_secrets(options, "interface"),
                pass_fds=tuple(listener.socket.fileno() for listener in listeners),
                takes_hangup=any(listener.is_tls for listener in listeners),
            )
            for n in range(1, (options.interfaces or 1) + 1)
        ]
    if options.command in ("serve", "worker"):
        command = [*python, "worker", options.app, "--workers=1", "--admin-port=0", *render_flags(options, "worker")]
        specs += [
            ProcessSpec(role=Role.WORKER, number=n, command=command, environment=render_secrets(options, "worker"))
            for n in range(1, (options.workers or 1) + 1)
        ]
    return specs


def _check_application(options: argparse.Namespace) -> None:
    """Raises UsageError for what is wrong for certain with APP; it is imported by the workers only."""
    from worker.loading import ApplicationError, check_reference

    _worker_settings(argparse.Namespace(**{**vars(options), "redis": options.redis or "redis://embedded"}))
    try:
        check_reference(options.app, options.app_dir)
    except ApplicationError as error:
        raise UsageError(str(error)) from error


def _check_certificates(settings: InterfaceSettings, listeners: Sequence[Listener]) -> None:
    if any(listener.is_tls for listener in listeners):
        from interface_server.tls import TlsContext, TlsSettingsError

        for listener in listeners:
            if listener.is_tls:
                own = replace(settings, ssl_certfile=listener.certfile, ssl_keyfile=listener.keyfile)
                try:
                    TlsContext(own, alpn=())
                except TlsSettingsError as error:
                    raise UsageError(str(error)) from error


def _check_broker(url: str) -> None:
    """Raises UsageError or OSError where the broker cannot be used."""
    from channel_layer.broker import Broker
    from channel_layer.errors import BrokerUnsuitable

    async def check() -> None:
        broker = Broker(url, client_name="trunkline-supervisor")
        try:
            await broker.connect()
        finally:
            await broker.close()

    try:
        asyncio.run(check())
    except (BrokerUnsuitable, ValueError) as error:
        raise UsageError(str(error)) from error


def _summary(supervisor: Supervisor) -> list[str]:
    parts = []
    for role in (Role.INTERFACE, Role.WORKER):
        pids = [str(c.process.pid) for c in supervisor.children if c.spec.role is role and c.process is not None]
        if pids:
            parts.append(f"{len(pids)} {role.value}{'s' if len(pids) > 1 else ''} (pid {', '.join(pids)})")
    return parts
