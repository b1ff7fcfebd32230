"""Lifespan: rows L, H12 and A8. Each of these probes starts the server anew.

A server that never calls the application with a lifespan scope does not offer it: no text demands that it does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.conformance.client import Failed, NotOffered
from benchmarks.conformance.probe import MUST, SHOULD, Launcher, Running, Server, accept, check, demand, probe

CLOSED = ("until", "websocket.disconnect")


@contextmanager
def started(
    launcher: Launcher, mode: str = "normal", *, wait: bool = True, must_know: bool = True
) -> Iterator[tuple[Running, Path]]:
    """The server, with the probe application behaving like ``mode``, and the application's own log."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "log"
        path.touch()
        with launcher.start(environment={"PROBE_LIFESPAN": mode, "PROBE_LOG": str(path)}, wait=wait) as running:
            if must_know and wait and "call lifespan" not in path.read_text():
                raise NotOffered("it never calls the application for a lifespan")
            yield running, path


def steps_of(path: Path) -> list[str]:
    return [line.partition(" ")[2] for line in path.read_text().splitlines()]


@probe(
    "L1",
    MUST,
    "the application is called once for its lifespan, on the loop of the requests (Lifespan)",
    launches=True,
)
def one_lifespan_on_the_loop_of_the_requests(launcher: Launcher) -> None:
    with started(launcher) as (running, _):
        found = Server(running).control("/-/lifespan")
    check(found["calls"], 1, "count of calls")
    check(found["loop"], found["loop_now"], "the loop of the lifespan")


@probe("L3", MUST, "scope and first event of the lifespan (Lifespan, Scope)", launches=True)
def the_lifespan_scope(launcher: Launcher) -> None:
    with started(launcher) as (running, _):
        found = Server(running).control("/-/lifespan")
    scope = found["scope"]
    check((scope["type"], scope["asgi"]["version"]), ("lifespan", "3.0"), "type and asgi version")
    demand(isinstance(scope["asgi"].get("spec_version", "1.0"), str), "spec_version is no str")
    demand(scope.get("state", {}) == {}, f"state is {scope.get('state')!r} at the start")
    check(found["events"], [{"type": "lifespan.startup"}], "events")


@probe(
    "L4",
    MUST,
    "no connection is processed before the startup is complete (Lifespan, Startup Complete)",
    launches=True,
)
def connections_wait_for_the_startup(launcher: Launcher) -> None:
    with started(launcher, "slow") as (_, path):
        steps = steps_of(path)
    demand("call http" in steps, f"nobody was served: {steps}")
    demand(steps.index("startup complete") < steps.index("call http"), f"the order was {steps}")


@probe("L5", MUST, "an application that knows no lifespan is served (Lifespan, Scope)", launches=True)
def an_application_without_lifespan(launcher: Launcher) -> None:
    with started(launcher, "raise", must_know=False) as (running, _):
        check(Server(running).scope()["type"], "http", "type")


@probe("L5", MUST, "so is one that raises when it gets lifespan.startup (Lifespan, Scope)", launches=True)
def an_application_that_raises_at_startup(launcher: Launcher) -> None:
    with started(launcher, "raise on startup", must_know=False) as (running, _):
        check(Server(running).scope()["type"], "http", "type")


@probe("L6", SHOULD, "lifespan.startup.failed ends the server, with the message in the log (Lifespan)", launches=True)
def a_startup_that_failed(launcher: Launcher) -> None:
    with started(launcher) as _:
        pass  # raises NotOffered
    with started(launcher, "fail", wait=False) as (running, _):
        demand(running.wait_ended(15), "the server goes on")
        demand("the cellar is flooded" in running.log(), f"the log says {running.log()[-300:]!r}")


@probe("L7", MUST, "lifespan.shutdown is sent and its answer awaited (Lifespan, Shutdown)", launches=True)
def the_shutdown_is_told_and_awaited(launcher: Launcher) -> None:
    with started(launcher) as (running, path):
        running.terminate()
        demand(running.wait_ended(25), "the server does not end")
        check(steps_of(path)[-2:], ["lifespan.shutdown", "shutdown complete"], "the last steps")


@probe("L7", MUST, "lifespan.shutdown comes when all connections are closed (Lifespan, Shutdown)", launches=True)
def the_shutdown_comes_behind_the_connections(launcher: Launcher) -> None:
    with started(launcher) as (running, path):
        server = Server(running)
        script = [("receive",), accept(), CLOSED, ("note", "websocket over")]
        with server.websocket(script) as client:
            running.terminate()
            try:
                code, _ = client.closed()
                client.close(code or 1000)
            except Failed:
                pass  # how it ends is told by other rows
            demand(running.wait_ended(25), "the server does not end")
        steps = steps_of(path)
        demand("websocket over" in steps, f"the application of the open WebSocket was not told: {steps}")
        demand("lifespan.shutdown" in steps, f"the shutdown was not told: {steps}")
        demand(steps.index("websocket over") < steps.index("lifespan.shutdown"), f"the order was {steps}")


@probe("L7", SHOULD, "lifespan.shutdown.failed is logged (Lifespan, Shutdown Failed)", launches=True)
def a_shutdown_that_failed(launcher: Launcher) -> None:
    with started(launcher, "fail shutdown") as (running, _):
        running.terminate()
        demand(running.wait_ended(25), "the server does not end")
        demand("the attic is on fire" in running.log(), f"the log says {running.log()[-300:]!r}")


@probe(
    "L8", MUST, "each connection has a shallow copy of the state, where there is one (Lifespan State)", launches=True
)
def each_connection_has_a_copy_of_the_state(launcher: Launcher) -> None:
    with started(launcher) as (running, _):
        server = Server(running)
        script = [("mutate scope",), ("note state",), ("respond", b"")]
        for _ in range(2):
            with server.asked(script) as client:
                client.response()
        with server.websocket([("note state",), ("receive",), accept(), CLOSED]) as client:
            client.close()
        states = [note[1] for note in server.notes() if note[0] == "state"]
    if None in states:
        raise NotOffered("no state")
    check([state[1] for state in states], [True] * 3, "that the objects in it are shared")
    check([state[0] for state in states], [["mutated", "shared"], ["mutated", "shared"], ["shared"]], "the keys")
