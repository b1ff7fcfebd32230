"""`make bench`: Trunkline and its peers, row by row, side by side, in one go.

Each row is one kind of work; each server does it in a fresh process, in turn, and the whole is repeated. Counted is
the CPU time of all server processes together, broker and supervisor included, client excluded; what is printed is the
median of the repetitions. Results go to benchmarks/results/<name>.md and .json: "latest" if every row was measured
with every server, else "quick" or "partial". README's table is made of "latest" (readme_table.py).

    python benchmarks/bench.py                      everything: three repetitions, some 25 minutes
    python benchmarks/bench.py --quick              one short repetition of each, some 4 minutes
    python benchmarks/bench.py --only http,echo     some rows; --servers trunkline,daphne: some servers

Lives here: rows, servers, marks, table. Starting and reading processes is in processes.py, what is served in
applications.py and channels_application.py. To add a row or a server: an entry in ROWS or SERVERS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from processes import CLIENT, HERE, LoadClient, ServerProcess, free_port, run_broker

BIN = Path(sys.executable).parent
PACKAGES = ("trunkline", "daphne", "channels", "channels-redis", "uvicorn", "granian", "uvloop", "redis", "twisted")


@dataclass(frozen=True)
class Server:
    """A command line with {port}; ``environment`` is given to the application."""

    title: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    needs_broker: bool = False  # a broker of ours beside it; {broker} is its URL


def _trunkline(application: str) -> tuple[str, ...]:
    # Defaults, but for the access log: no server of the table writes one.
    return ("trunkline", "serve", application, "--port", "{port}", "--no-access-log", "--log-level", "warning")


def _uvicorn(application: str) -> tuple[str, ...]:
    settings = ("--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning")
    return ("uvicorn", application, "--port", "{port}", *settings)


def _daphne(application: str) -> tuple[str, ...]:
    return ("daphne", "-v", "0", "-b", "127.0.0.1", "-p", "{port}", application)


def _channels(
    title: str, command: Callable[[str], tuple[str, ...]], backend: str, config: str, broker: bool
) -> Server:
    environment = {"BENCH_LAYER": backend, "BENCH_LAYER_CONFIG": config}
    return Server(title, command("channels_application:application"), environment, broker)


PLAIN = "applications:application"
# Above what 4 broadcasts to 10,000 members hold: at its default of 100 channels_redis drops messages in this row.
CORE = ("channels_redis.core.RedisChannelLayer", '{{"hosts": ["{broker}"], "capacity": 100000}}')
PUBSUB = ("channels_redis.pubsub.RedisPubSubChannelLayer", '{{"hosts": ["{broker}"]}}')
HAND_WRITTEN = {"BENCH_BROADCAST": "pubsub", "BENCH_REDIS": "{broker}"}
GRANIAN = ("granian", "--interface", "asgi", "--loop", "uvloop", "--port", "{port}", "--no-log", PLAIN)
SERVERS = {
    "trunkline": Server("Trunkline", _trunkline(PLAIN), {"BENCH_BROADCAST": "groups"}),
    "trunkline-2-4": Server(
        "Trunkline, 2 interface servers, 4 workers",
        (*_trunkline(PLAIN), "--interfaces", "2", "--workers", "4"),
        {"BENCH_BROADCAST": "groups"},
    ),
    "daphne": Server("Daphne", _daphne(PLAIN)),
    "uvicorn": Server("uvicorn", _uvicorn(PLAIN)),
    "granian": Server("granian", GRANIAN),
    "uvicorn-redis": Server("uvicorn + Redis by hand", _uvicorn(PLAIN), HAND_WRITTEN, True),
    "granian-redis": Server("granian + Redis by hand", GRANIAN, HAND_WRITTEN, True),
    "trunkline-channels": _channels(
        "Trunkline + Channels", _trunkline, "channel_layer.RedisChannelLayer", "{{}}", False
    ),
    "daphne-core": _channels("Daphne + Channels, core", _daphne, *CORE, True),
    "daphne-pubsub": _channels("Daphne + Channels, pubsub", _daphne, *PUBSUB, True),
    "uvicorn-core": _channels("uvicorn + Channels, core", _uvicorn, *CORE, True),
    "uvicorn-pubsub": _channels("uvicorn + Channels, pubsub", _uvicorn, *PUBSUB, True),
}


@dataclass(frozen=True)
class Figure:
    """One number of a row's runs. ``better`` says which way; ``mark`` is what we must reach, if anything."""

    key: str
    title: str
    digits: int = 1
    better: str = "lower"
    mark: Callable[[dict[str, float]], float | None] = lambda others: None  # given the other servers' medians


@dataclass(frozen=True)
class Row:
    title: str
    mode: str
    path: str
    servers: tuple[str, ...]
    numbers: Callable[[Any], tuple[float, ...]]
    figures: tuple[Figure, ...]
    # What another client does meanwhile on the same server: mode, path, numbers. It is not counted.
    beside: Callable[[Any], tuple[str, str, tuple[float, ...]]] | None = None


def at_most(limit: float) -> Callable[[dict[str, float]], float | None]:
    return lambda others: limit


def times(factor: float, server: str) -> Callable[[dict[str, float]], float | None]:
    return lambda others: factor * others[server] if server in others else None


ALL_HTTP = ("trunkline", "daphne", "uvicorn", "granian")
ROWS = {
    "broadcast": Row(
        "Group broadcast: 1,000 clients, 128 B, 4 outstanding",
        "broadcast",
        "/broadcast",
        ("trunkline", "granian-redis", "uvicorn-redis", "daphne-pubsub", "daphne-core"),
        lambda a: (1000, a.seconds, 128, 4),
        (
            Figure("cpu_us", "µs CPU per delivered message", mark=at_most(6.0)),
            Figure("per_s", "delivered per second", 0, "higher"),
        ),
    ),
    "consumer": Row(
        "The same through an unmodified Channels consumer",
        "broadcast",
        "/broadcast",
        ("trunkline-channels", "uvicorn-pubsub", "uvicorn-core", "daphne-pubsub"),
        lambda a: (1000, a.seconds, 128, 4),
        (
            Figure("cpu_us", "µs CPU per delivered message", mark=times(0.9, "uvicorn-pubsub")),
            Figure("per_s", "delivered per second", 0, "higher"),
        ),
    ),
    "http": Row(
        "HTTP hello: 64 connections",
        "http",
        "/",
        ALL_HTTP,
        lambda a: (64, a.seconds),
        (
            Figure("cpu_us", "µs CPU per request", mark=at_most(85)),
            Figure("per_s", "requests per second", 0, "higher", times(1.6, "daphne")),
        ),
    ),
    "http-one": Row(
        "HTTP hello: 1 connection",
        "http",
        "/",
        ALL_HTTP,
        lambda a: (1, a.seconds),
        (Figure("p50_ms", "ms, median", 2, mark=at_most(0.6)), Figure("cpu_us", "µs CPU per request")),
    ),
    "echo": Row(
        "WebSocket echo: 64 clients, 128 B",
        "echo",
        "/echo",
        ALL_HTTP,
        lambda a: (64, a.seconds, 128),
        (
            Figure("cpu_us", "µs CPU per message", mark=at_most(57)),
            Figure("per_s", "messages per second", 0, "higher"),
        ),
    ),
    "connect": Row(
        "Connecting WebSockets, 128 at a time",
        "connect",
        "/hold",
        ALL_HTTP,
        lambda a: (1000 if a.quick else 5000, 128),
        (Figure("per_s", "connected per second", 0, "higher", at_most(1500)),),
    ),
    "idle": Row(
        "Idle WebSockets: memory of each",
        "hold",
        "/hold",
        ALL_HTTP,
        lambda a: (2000 if a.quick else 5000,),
        (
            Figure("server_kb", "KB in the server", mark=at_most(12)),
            Figure("worker_kb", "KB in the worker", mark=at_most(12)),
        ),
    ),
    "broadcast-10k": Row(
        "Growth: group broadcast to 10,000 clients",
        "broadcast",
        "/broadcast",
        ("trunkline",),
        lambda a: (10000, a.seconds, 128, 4),
        (
            Figure("cpu_us", "µs CPU per delivered message"),
            Figure("per_s", "delivered per second", 0, "higher"),
        ),
    ),
    "http-1000": Row(
        "Growth: HTTP hello, 1,000 connections",
        "http",
        "/",
        ("trunkline", "uvicorn"),
        lambda a: (1000, a.seconds),
        (Figure("cpu_us", "µs CPU per request"), Figure("per_s", "requests per second", 0, "higher")),
    ),
    "http-scaled": Row(
        "Growth: HTTP hello, 256 connections, more processes",
        "http",
        "/",
        ("trunkline", "trunkline-2-4"),
        lambda a: (256, a.seconds),
        (Figure("cpu_us", "µs CPU per request"), Figure("per_s", "requests per second", 0, "higher")),
    ),
    "broadcast-scaled": Row(
        "Growth: group broadcast to 1,000 clients, more processes",
        "broadcast",
        "/broadcast",
        ("trunkline", "trunkline-2-4"),
        lambda a: (1000, a.seconds, 128, 4),
        (
            Figure("cpu_us", "µs CPU per delivered message"),
            Figure("per_s", "delivered per second", 0, "higher"),
        ),
    ),
    "http-beside-broadcast": Row(
        "HTTP hello, 1 connection, while one message after the other goes to 10,000 WebSockets",
        "http",
        "/",
        ("trunkline",),
        lambda a: (1, a.seconds),
        (Figure("p99_ms", "ms, 99 of 100", mark=at_most(20)), Figure("max_ms", "ms, longest")),
        beside=lambda a: ("broadcast", "/broadcast", (10000, a.seconds + 2, 128, 1)),
    ),
}


def measure(row: Row, server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """One server does one row's work once, in fresh processes."""
    with contextlib.ExitStack() as stack:
        trees: list[ServerProcess] = []
        values = {"port": str(free_port()), "broker": ""}
        if server.needs_broker:
            values["broker"], broker = stack.enter_context(run_broker())
            trees.append(broker)
        command = [str(BIN / server.command[0]), *(word.format(**values) for word in server.command[1:])]
        environment = {name: text.format(**values) for name, text in server.environment.items()}
        process = ServerProcess(command, environment=environment, port=int(values["port"]))
        stack.callback(process.stop)
        trees.append(process)
        process.wait_until_it_serves()
        time.sleep(0.5)  # what starts late (worker threads, first leases) is not part of the work

        if row.beside is not None:
            mode, path, numbers = row.beside(arguments)
            other = stack.enter_context(LoadClient(mode, int(values["port"]), path, *numbers))
            other.wait_ready()
            working = threading.Thread(target=other.work)
            working.start()
            stack.callback(working.join)
            time.sleep(0.5)  # it is to have begun
        memory_before = process.resident_bytes()
        client = stack.enter_context(LoadClient(row.mode, int(values["port"]), row.path, *row.numbers(arguments)))
        client.wait_ready()
        roles = {pid: role for tree in trees for pid, role in tree.roles().items()}
        before = {pid: cpu for tree in trees for pid, cpu in tree.cpu_s().items()}
        result = client.work()
        after = {pid: cpu for tree in trees for pid, cpu in tree.cpu_s().items()}

        used: dict[str, float] = {}
        for pid, cpu_s in after.items():
            role = roles.get(pid, "server")
            used[role] = used.get(role, 0.0) + cpu_s - before.get(pid, 0.0)
        result["cpu_s"] = round(sum(used.values()), 2)
        result["cpu_s_by_role"] = {role: round(cpu_s, 2) for role, cpu_s in used.items()}
        if result["count"]:
            result["cpu_us"] = sum(used.values()) / result["count"] * 1e6
        if row.mode == "hold":
            grown = {"server": 0.0, "worker": 0.0}
            for pid, size in process.resident_bytes().items():
                role = "worker" if roles.get(pid) == "worker" else "server"
                grown[role] += (size - memory_before.get(pid, size)) / 1000 / max(result["clients"], 1)
            result["server_kb"] = grown["server"]
            if "worker" in roles.values():
                result["worker_kb"] = grown["worker"]
        return result


def fault_of(run: dict[str, Any]) -> str:
    faults = ("failed", "closed", "incomplete", "gaps", "repeated")
    return ", ".join(f"{run[name]} {name}" for name in faults if run.get(name))


def table(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> list[str]:
    """The results as Markdown, one table for each row."""
    lines: list[str] = []
    for row_name, by_server in runs.items():
        row = ROWS[row_name]
        lines += ["", f"### {row.title}", ""]
        head = ["server"]
        for figure in row.figures:
            head += [figure.title, "ours / theirs" if figure.better == "lower" else "ours : theirs"]
        lines += [
            f"| {' | '.join([*head, 'p50 ms', 'p99 ms', 'remarks'])} |",
            "|---" + "|---:" * (len(head) + 1) + "|---|",
        ]
        medians: dict[str, dict[str, float]] = {}
        for name, results in by_server.items():
            keys = {key for result in results for key, value in result.items() if isinstance(value, int | float)}
            medians[name] = {
                key: statistics.median(result[key] for result in results if key in result) for key in keys
            }
        ours = next((name for name in by_server if name.startswith("trunkline")), None)
        for name, results in by_server.items():
            cells = [SERVERS[name].title]
            remarks = sorted({text for result in results if (text := result.get("error") or fault_of(result))})
            for figure in row.figures:
                value = medians[name].get(figure.key)
                mine = medians[ours].get(figure.key) if ours is not None else None
                cells.append("–" if value is None else f"{value:,.{figure.digits}f}")
                cells.append(f"{mine / value:.2f}" if name != ours and mine and value else "")
                if name == ours and value is not None:
                    mark = figure.mark(
                        {other: median[figure.key] for other, median in medians.items() if figure.key in median}
                    )
                    if mark is not None:
                        sign = "≤" if figure.better == "lower" else "≥"
                        met = value <= mark if figure.better == "lower" else value >= mark
                        remarks.append(f"{'**reached**' if met else '**missed**'}: {sign} {mark:,.{figure.digits}f}")
            for key in ("p50_ms", "p99_ms"):
                value = medians[name].get(key)
                cells.append(f"{value:.2f}" if value else "")
            if name == ours and results and (roles := results[0].get("cpu_s_by_role")) and row.mode != "hold":
                total = sum(roles.values()) or 1
                remarks.append(", ".join(f"{role} {cpu_s / total:.0%}" for role, cpu_s in roles.items() if cpu_s))
            lines.append(f"| {' | '.join([*cells, '; '.join(remarks)])} |")
    return lines


def describe_machine() -> dict[str, Any]:
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "revision": revision.stdout.strip() or "no git",
        "load_average_before": os.getloadavg()[0],
    }


def render(machine: dict[str, Any], runs: dict[str, Any], arguments: argparse.Namespace) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return "\n".join(
        [
            f"# Benchmarks: {arguments.name}",
            "",
            f"Measured {time.strftime('%Y-%m-%d')} at revision {machine['revision']}, on {machine['cores']} cores of "
            f"{machine['processor']}, Linux {machine['kernel']}, Python {machine['python']}; load average before: "
            f"{machine['load_average_before']:.2f}.",
            f"{packages}.",
            "",
            f"Medians of {arguments.repeat} runs of {arguments.seconds:g} s. CPU time is that of all server "
            "processes together, broker included, client excluded. Repeat with "
            f'`make bench ARGS="{" ".join(arguments.words)}"`.',
            *table(runs),
            "",
        ]
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trunkline and its peers, side by side.")
    parser.add_argument("--quick", action="store_true", help="one repetition of 2 s")
    parser.add_argument("--only", metavar="ROWS", default="", help="rows, comma separated: " + ", ".join(ROWS))
    parser.add_argument(
        "--servers", metavar="NAMES", default="", help="servers, comma separated: " + ", ".join(SERVERS)
    )
    parser.add_argument("--repeat", type=int, metavar="N", help="repetitions (3)")
    parser.add_argument("--seconds", type=float, metavar="S", help="measured time of each run (5)")
    parser.add_argument("--name", help="of the files in benchmarks/results (latest; quick; partial)")
    arguments = parser.parse_args()
    arguments.words = sys.argv[1:]
    arguments.repeat = arguments.repeat or (1 if arguments.quick else 3)
    arguments.seconds = arguments.seconds or (2.0 if arguments.quick else 5.0)
    is_partial = bool(arguments.only or arguments.servers)
    arguments.name = arguments.name or ("quick" if arguments.quick else "partial" if is_partial else "latest")
    arguments.rows = [name for name in arguments.only.split(",") if name] or list(ROWS)
    arguments.chosen = [name for name in arguments.servers.split(",") if name] or list(SERVERS)
    for name in arguments.rows:
        if name not in ROWS:
            parser.error(f"no row {name!r}: {', '.join(ROWS)}")
    for name in arguments.chosen:
        if name not in SERVERS:
            parser.error(f"no server {name!r}: {', '.join(SERVERS)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if not CLIENT.exists():
        raise SystemExit("the load client is not compiled: run make bench")
    machine = describe_machine()
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row_name in arguments.rows:
        row = ROWS[row_name]
        by_server = runs[row_name] = {name: [] for name in row.servers if name in arguments.chosen}
        for repetition in range(arguments.repeat):
            for name, results in by_server.items():
                print(
                    f"{row_name}: {SERVERS[name].title}, {repetition + 1}/{arguments.repeat}", end=" … ", flush=True
                )
                try:
                    results.append(measure(row, SERVERS[name], arguments))
                except RuntimeError as error:  # one server's fault must not hide the others' figures
                    results.append({"error": str(error).splitlines()[0]})
                    print(error)
                    continue
                shown = [
                    f"{results[-1][figure.key]:,.{figure.digits}f} {figure.title}"
                    for figure in row.figures
                    if figure.key in results[-1]
                ]
                print("; ".join([*shown, fault_of(results[-1])]).rstrip("; "), flush=True)
    text = render(machine, runs, arguments)
    target = HERE / "results" / arguments.name
    target.parent.mkdir(exist_ok=True)
    target.with_suffix(".md").write_text(text)
    target.with_suffix(".json").write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")
    print(text)
    print(f"written to {target}.md and .json")


if __name__ == "__main__":
    main()
