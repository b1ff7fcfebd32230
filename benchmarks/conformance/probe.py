"""What a probe is, and what it gets to work with.

A probe is a function with ``@probe(row, level, title)``: it talks to the server it is given and raises ``Failed``
when the server does not do what the row says, ``NotOffered`` when the row is about something this server does not
claim to have. Rows are those of docs/conformance.md. To add a probe: a function in one of the probes_*.py.

The rules for probes. What a text leaves to the server is none. MUST is what the texts demand, by that word or by a
plain statement; SHOULD is what they recommend. Where a version of the specification brought something, a server that
announces an older one is not measured by it. Nobody is asked for an optional feature, but who offers it must have it
right.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.conformance.client import Failed, HttpConnection, NotOffered, WebSocketConnection

MUST, SHOULD = "must", "should"
KEYS = (f"k{number}" for number in itertools.count())

Notes = list[tuple[Any, ...]]
Scope = dict[str, Any]


class Running(Protocol):
    """One server process with the probe application."""

    port: int

    def log(self) -> str: ...
    def terminate(self) -> None: ...
    def wait_ended(self, timeout_s: float) -> bool: ...


class Launcher(Protocol):
    """Starts the server under test for probes that need one of their own."""

    name: str
    pings: Sequence[str] | None  # flags that make the server send a PING every second; None: it cannot

    def start(
        self,
        *flags: str,
        application: str = "application",
        environment: Mapping[str, str] = {},
        wait: bool = True,
    ) -> AbstractContextManager[Running]: ...


@dataclass(frozen=True)
class Probe:
    row: str
    level: str
    title: str
    run: Callable[[Any], None]
    needs_launcher: bool  # else a Server

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def level_letter(self) -> str:
        """As the table writes it: demanded, recommended."""
        return {MUST: "d", SHOULD: "r"}[self.level]


PROBES: list[Probe] = []


def probe(row: str, level: str, title: str, *, launches: bool = False) -> Callable[[Any], Any]:
    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        PROBES.append(Probe(row, level, title, function, launches))
        return function

    return register


class Server:
    """The running server a probe talks to, with the probe application in it."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.port = running.port
        self.key = next(KEYS)

    def http(self) -> HttpConnection:
        return HttpConnection(self.port)

    def websocket(self, script: object, target: str = "/", *fields: str, **options: Any) -> WebSocketConnection:
        return WebSocketConnection(self.port, script, target, *fields, key=self.key, **options)

    @contextmanager
    def asked(self, script: object, target: str = "/", *fields: str, **options: Any) -> Iterator[HttpConnection]:
        """A connection on which one request has been sent."""
        with self.http() as client:
            client.request(script, target, *fields, key=self.key, **options)
            yield client

    def control(self, target: str, timeout_s: float = 15.0) -> Any:
        with HttpConnection(self.port, timeout_s) as client:
            client.request(None, target, "Connection: close")
            return ast.literal_eval(client.response().body.decode())

    def settle(self) -> None:
        """Return when the server has answered something behind what it was asked before."""
        self.control("/-/lifespan")

    def open(self, gate: str) -> None:
        self.control(f"/-/open?name={gate}{self.key}")

    def gate(self, name: str) -> tuple[str, str]:
        """The step that waits for ``open(name)``."""
        return ("wait", name + self.key)

    def notes(self, timeout_s: float = 5.0) -> Notes:
        """What the instance noted, when it is over."""
        is_over, notes = self.control(f"/-/notes?key={self.key}&timeout_s={timeout_s}")
        if not is_over:
            raise Failed(f"the application still waits after {timeout_s:g} s; it noted {shortened(notes)}")
        return list(notes)

    def received(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        return [note[1] for note in self.notes(timeout_s) if note[0] == "received"]

    def scope(self, target: str = "/", *fields: str, **options: Any) -> Scope:
        """The scope of an HTTP request."""
        with self.asked([("note scope",), ("respond", b"")], target, *fields, **options) as client:
            check(client.response().status, 200, "status of the response")
        return dict(next(note[1] for note in self.notes() if note[0] == "scope"))

    def websocket_scope(self, target: str = "/", *fields: str) -> Scope:
        script = [
            ("note scope",),
            ("receive",),
            ("send", {"type": "websocket.accept"}),
            ("until", "websocket.disconnect"),
        ]
        with self.websocket(script, target, *fields) as client:
            client.close()
        return dict(next(note[1] for note in self.notes() if note[0] == "scope"))

    def speaks(self, kind: str, version: str) -> None:
        """Raise NotOffered unless scopes of this kind announce this version of the specification."""
        found = Server(self.running).websocket_scope() if kind == "websocket" else Server(self.running).scope()
        spoken = found["asgi"].get("spec_version", "2.0")
        if tuple(map(int, spoken.split("."))) < tuple(map(int, version.split("."))):
            raise NotOffered(f"announces version {spoken}, this came with {version}")

    def offers(self, extension: str, kind: str = "http", *fields: str) -> None:
        """Raise NotOffered unless the extension is in the scope."""
        fresh = Server(self.running)
        found = fresh.websocket_scope("/", *fields) if kind == "websocket" else fresh.scope("/", *fields)
        if extension not in (found.get("extensions") or {}):
            raise NotOffered("not in scope['extensions']")


def check(found: object, expected: object, what: str) -> None:
    if found != expected or type(found) is not type(expected):
        raise Failed(f"{what} is {shortened(found)}, expected {shortened(expected)}")


def demand(condition: object, text: str) -> None:
    if not condition:
        raise Failed(text)


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:119] + "…"


def start(status: int = 200, headers: Sequence[tuple[bytes, bytes]] = (), **more: object) -> tuple[str, object]:
    return ("send", {"type": "http.response.start", "status": status, "headers": list(headers), **more})


def body(data: bytes = b"", more: bool = False, **keys: object) -> tuple[str, object]:
    return ("send", {"type": "http.response.body", "body": data, "more_body": more, **keys})


def accept(**keys: object) -> tuple[str, object]:
    return ("send", {"type": "websocket.accept", **keys})
