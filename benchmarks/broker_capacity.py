"""What one broker carries: its CPU time for each operation, and that of our processes, for docs/scaling.md.

    make bench-capacity                                          everything, some 6 minutes
    make bench-capacity ARGS="--only blobs,groups"               some parts
    make bench-capacity ARGS="--program redis-server --tcp"      another server; over TCP, not a unix socket

CPU time, not wall clock, so that a busy machine changes little: the broker's is what it says of itself (INFO cpu, in
microseconds), that of other processes is in /proc. Each figure is the median of the repetitions. Results go to
benchmarks/results/<name>.md.

The first parts play the broker's clients with bare sockets and bytes made in advance: the commands are exactly those
of our processes (channel_layer/process_layer.py, inbox.py, group_sender.py), the load costs the broker nothing
else. The last parts run `trunkline serve` and the C client. To add a part: a function in PARTS that returns lines.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hiredis
from bench import BIN, describe_machine
from processes import CLIENT, HERE, START_TIMEOUT_S, LoadClient, ServerProcess, free_port

from channel_layer import scripts
from trunkline.broker import EmbeddedBroker, find_server

# What waits for an answer longer than this hangs.
ANSWER_TIMEOUT_S = 30.0
LINK_EXPIRY_MS = 60_000
# Of a core: what is left is for bursts, and for the operating system's part of the network.
CORE_SHARE = 0.7


class Line:
    """One connection to the broker."""

    def __init__(self, address: Any) -> None:
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.socket.settimeout(ANSWER_TIMEOUT_S)
        self.socket.connect(address)
        if not isinstance(address, str):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = hiredis.Reader()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answers(self, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            answer = self.reader.gets()
            if answer is False:
                data = self.socket.recv(1 << 20)
                if not data:
                    raise RuntimeError("the broker closed the connection")
                self.reader.feed(data)
            elif isinstance(answer, Exception):
                raise answer
            else:
                found.append(answer)
        return found

    def call(self, *words: Any) -> Any:
        self.send(pack(*words))
        return self.answers(1)[0]


def pack(*words: Any) -> bytes:
    packed: bytes = hiredis.pack_command(words)
    return packed


@dataclass
class Measured:
    """The broker under measurement."""

    url: str
    address: Any
    control: Line
    repeat: int
    tree: ServerProcess

    def lines(self, count: int) -> list[Line]:
        return [Line(self.address) for _ in range(count)]

    def cpu_s(self) -> float:
        info = self.control.call("INFO", "cpu").decode()
        values = dict(line.split(":") for line in info.split() if ":" in line)
        return float(values["used_cpu_user"]) + float(values["used_cpu_sys"])

    def commands(self) -> dict[str, int]:
        """How often each command has been called."""
        found = {}
        for line in self.control.call("INFO", "commandstats").decode().split():
            if line.startswith("cmdstat_"):
                name, _, text = line.removeprefix("cmdstat_").partition(":")
                found[name] = int(text.split(",")[0].removeprefix("calls="))
        return found

    def cost_us(self, turn: Callable[[], None], turns: int, operations: int) -> float:
        """CPU of the broker for each operation: the median of the repetitions. A turn does ``operations`` of them."""
        for _ in range(turns // 10 + 1):
            turn()
        runs = []
        for _ in range(self.repeat):
            before = self.cpu_s()
            for _ in range(turns):
                turn()
            runs.append((self.cpu_s() - before) / (turns * operations) * 1e6)
        return statistics.median(runs)


@contextlib.contextmanager
def broker(program: str, tcp: bool, repeat: int) -> Iterator[Measured]:
    """A broker as `trunkline serve` embeds it."""
    embedded = EmbeddedBroker(program)
    port = free_port()
    process = ServerProcess(
        [*embedded.command_line(), *(("--port", str(port)) if tcp else ())], environment={}, port=None
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not embedded.answers():
            if process.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the broker does not answer:\n{process.output()}")
            time.sleep(0.01)
        address = ("127.0.0.1", port) if tcp else str(embedded.socket_path)
        control = Line(address)
        for script in scripts.ALL:
            control.call("SCRIPT", "LOAD", script.source)
        yield Measured(f"redis://127.0.0.1:{port}" if tcp else embedded.url, address, control, repeat, process)
    finally:
        process.stop()
        embedded.remove()


def link_push(key: str, blob: bytes) -> bytes:
    """As _push of channel_layer/process_layer.py."""
    return b"".join(
        (pack("MULTI"), pack("RPUSH", key, blob), pack("PEXPIRE", key, LINK_EXPIRY_MS), pack("EXEC"))
    )  # four answers


def list_push(key: str, messages: list[bytes], capacity: int) -> bytes:
    return pack("EVALSHA", scripts.PUSH.sha1, 1, key, capacity, 60_000, *messages)


def blocking_read(key: str, count: int) -> bytes:
    return pack("BLMPOP", 2, 2, key, f"{key}:mail", "LEFT", "COUNT", count)


def per_core(cost_us: float) -> str:
    return f"{CORE_SHARE * 1e6 / cost_us:,.0f}"


def exchange(measured: Measured, pairs: int, push: Callable[[str], bytes], answers: int) -> Callable[[], None]:
    """A turn in which each of ``pairs`` senders pushes once to a reader that waits."""
    senders, readers = measured.lines(pairs), measured.lines(pairs)
    pushes = [push(f"capacity:{{{number}}}") for number in range(pairs)]
    reads = [blocking_read(f"capacity:{{{number}}}", 64) for number in range(pairs)]
    for reader, read in zip(readers, reads, strict=True):
        reader.send(read)

    def turn() -> None:
        for sender, data in zip(senders, pushes, strict=True):
            sender.send(data)
        for reader, read in zip(readers, reads, strict=True):
            reader.answers(1)
            reader.send(read)
        for sender in senders:
            sender.answers(answers)

    return turn


def part_blobs(measured: Measured) -> list[str]:
    """A blob of a link: one push and one blocking read, whatever it holds."""
    lines = [
        "| a blob of | one link, one at a time | 16 links at once | blobs/s at 70 % of a core |",
        "|---|---:|---:|---:|",
    ]
    for size, name in ((200, "200 B"), (2_000, "2 kB"), (16_000, "16 kB"), (65_000, "65 kB")):
        costs = []
        for pairs in (1, 16):
            turn = exchange(measured, pairs, lambda key, size=size: link_push(key, b"x" * size), 4)
            costs.append(measured.cost_us(turn, 8_000 // pairs, pairs))
        lines.append(f"| {name} | {costs[0]:.1f} µs | {costs[1]:.1f} µs | {per_core(costs[1])} |")
    return lines


def part_channels(measured: Measured) -> list[str]:
    """A message of a normal channel: push.lua, and the blocking read of whoever takes it."""
    lines = ["| messages in one call | a call | a message | messages/s at 70 % of a core |", "|---:|---:|---:|---:|"]
    for count in (1, 8, 64):
        turn = exchange(measured, 16, lambda key, count=count: list_push(key, [b"x" * 300] * count, 100), 1)
        cost = measured.cost_us(turn, 300, 16)
        lines.append(f"| {count} | {cost:.1f} µs | {cost / count:.2f} µs | {per_core(cost / count)} |")
    return lines


def broadcast(measured: Measured, senders: int, processes: int, is_linked: bool) -> Callable[[], None]:
    """A turn in which each of ``senders`` sends to one group once, which all of ``processes`` read."""
    sending, readers = measured.lines(senders), measured.lines(processes)
    group, keys = "capacity:{group}", [f"capacity:{{{number}}}" for number in range(processes)]
    measured.control.call("DEL", group)
    for number in range(processes):
        measured.control.call("ZADD", group, 4e12, f"i{number:012}")
    ask = pack("EVALSHA", scripts.GROUP_MEMBERS.sha1, 1, group)
    message = b"x" * 200
    pushes = b"".join(link_push(key, message) if is_linked else list_push(key, [message], 1000) for key in keys)
    reads = [blocking_read(key, 64) for key in keys]
    for reader, read in zip(readers, reads, strict=True):
        reader.send(read)

    def turn() -> None:
        for sender in sending:
            sender.send(ask)
        for sender in sending:
            sender.answers(1)
            sender.send(pushes)
        for sender in sending:
            sender.answers(processes * (4 if is_linked else 1))
        for reader, read in zip(readers, reads, strict=True):
            arrived = 0
            while arrived < senders:
                arrived += len(reader.answers(1)[0][1])
                reader.send(read)

    return turn


def part_groups(measured: Measured) -> list[str]:
    """One group_send: the registry is read once, then one message for each process with members."""
    lines = [
        "| processes with members | from a worker, alone | from a script, alone | from 16 workers at once "
        "| group_sends/s at 70 % of a core |",
        "|---:|---:|---:|---:|---:|",
    ]
    for processes in (1, 2, 4, 8, 16, 32, 64):
        costs = []
        for senders, is_linked in ((1, True), (1, False), (16, True)):
            turn = broadcast(measured, senders, processes, is_linked)
            costs.append(measured.cost_us(turn, 3_000 // processes // senders + 20, senders))
        cells = " | ".join(f"{cost:.0f} µs" for cost in costs)
        lines.append(f"| {processes} | {cells} | {per_core(costs[-1])} |")
    return lines


def part_looks(measured: Measured) -> list[str]:
    """A look at the leases of all peers, which each process does twice a second: EXISTS of each, in one write."""
    lines = ["| peers | a look | a peer |", "|---:|---:|---:|"]
    for peers in (1, 10, 50):
        looking = measured.lines(16)
        look = b"".join(pack("EXISTS", f"capacity:{{{number}}}:lease") for number in range(peers))

        def turn(looking: list[Line] = looking, look: bytes = look, peers: int = peers) -> None:
            for line in looking:
                line.send(look)
            for line in looking:
                line.answers(peers)

        cost = measured.cost_us(turn, 200, 16)
        lines.append(f"| {peers} | {cost:.1f} µs | {cost / peers:.2f} µs |")
    return lines


@contextlib.contextmanager
def serving(measured: Measured, *flags: str) -> Iterator[ServerProcess]:
    """`trunkline serve` on the broker."""
    port = free_port()
    measured.control.call("FLUSHALL")
    command = [
        str(BIN / "trunkline"),
        "serve",
        "applications:application",
        "--port",
        str(port),
        "--redis",
        measured.url,
    ]
    quiet = ("--no-access-log", "--log-level", "warning")
    process = ServerProcess([*command, *quiet, *flags], environment={"BENCH_BROADCAST": "groups"}, port=port)
    try:
        process.wait_until_it_serves()
        time.sleep(1.0)  # what starts late (worker threads, first leases) is not part of the work
        yield process
    finally:
        process.stop()


def used_by(process: ServerProcess, before: dict[int, float], roles: dict[int, str]) -> dict[str, float]:
    used = {"interface": 0.0, "worker": 0.0}
    for pid, cpu_s in process.cpu_s().items():
        if (role := roles.get(pid)) in used:
            used[role] += cpu_s - before.get(pid, 0.0)
    return used


# Name, mode, path, numbers of the client (S: seconds), flags.
WORK: tuple[tuple[str, str, str, tuple[Any, ...], tuple[str, ...]], ...] = (
    ("HTTP hello, 1 connection", "http", "/", (1, "S"), ()),
    ("HTTP hello, 64 connections", "http", "/", (64, "S"), ()),
    ("HTTP hello, 256 connections", "http", "/", (256, "S"), ()),
    (
        "HTTP hello, 256 connections, 2 interface servers, 4 workers",
        "http",
        "/",
        (256, "S"),
        ("--interfaces", "2", "--workers", "4"),
    ),
    ("WebSocket echo, 1 client", "echo", "/echo", (1, "S", 128), ()),
    ("WebSocket echo, 64 clients", "echo", "/echo", (64, "S", 128), ()),
    (
        "broadcast, 1,000 members in 1 process, 1 outstanding: a delivered message",
        "broadcast",
        "/broadcast",
        (1000, "S", 128, 1),
        (),
    ),
    ("the same, 4 outstanding", "broadcast", "/broadcast", (1000, "S", 128, 4), ()),
    ("opening a WebSocket", "connect", "/hold", (5000, 128), ()),
)


def part_processes(measured: Measured, seconds: float = 3.0) -> list[str]:
    """CPU of each process for each operation, `trunkline serve` under the client of `make bench`."""
    lines = [
        "| work | interface server | worker | broker | commands at the broker |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, mode, path, numbers, flags in WORK:
        runs: list[tuple[float, float, float, float]] = []
        for _ in range(measured.repeat):
            with serving(measured, *flags) as process:
                given = [seconds if number == "S" else number for number in numbers]
                with LoadClient(mode, process.port or 0, path, *given) as client:
                    client.wait_ready()
                    roles, before = process.roles(), process.cpu_s()
                    broker_before, commands_before = measured.cpu_s(), measured.commands()
                    result = client.work()
                    used = used_by(process, before, roles)
                    broker_s, commands = measured.cpu_s() - broker_before, measured.commands()
                count = result["count"]
                if not count:
                    raise RuntimeError(f"{name}: nothing was done")
                called = sum(
                    commands.get(word, 0) - commands_before.get(word, 0) for word in ("blmpop", "exec", "evalsha")
                )
                runs.append((used["interface"] / count, used["worker"] / count, broker_s / count, called / count))
        interface, worker, broker_cost, called = (statistics.median(column) for column in zip(*runs, strict=True))
        lines.append(
            f"| {name} | {interface * 1e6:.1f} µs | {worker * 1e6:.1f} µs | {broker_cost * 1e6:.2f} µs "
            f"| {called:.3f} |"
        )
    return lines


def part_idle(measured: Measured, seconds: float = 20.0) -> list[str]:
    """What processes and WebSockets cost that do nothing: leases, watching peers, blocking reads; pings."""
    lines = [
        "| idle | interface server | worker | broker | memory: interface server | worker |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    cases: tuple[tuple[str, int, tuple[str, ...]], ...] = (
        ("1 interface server, 1 worker", 0, ()),
        ("2 interface servers, 4 workers (of each)", 0, ("--interfaces", "2", "--workers", "4")),
        ("10,000 WebSockets, 1 + 1, pings every 20 s", 10_000, ()),
    )
    for name, sockets, flags in cases:
        with serving(measured, *flags) as process, contextlib.ExitStack() as stack:
            if not sockets:
                time.sleep(10)  # several processes on two cores take their time to start
            memory = process.resident_bytes()
            roles = process.roles()
            counts = {role: max(1, list(roles.values()).count(role)) for role in ("interface", "worker")}
            if sockets:
                client = stack.enter_context(LoadClient("hold", process.port or 0, "/hold", sockets))
                client.wait_ready()
                client.work()
                # The first pings come 20 s after the handshakes.
                time.sleep(20)
            before, broker_before = process.cpu_s(), measured.cpu_s()
            time.sleep(seconds)
            used, broker_s = used_by(process, before, roles), measured.cpu_s() - broker_before
            cells = [f"{used[role] / counts[role] / seconds * 1e3:.1f} ms/s" for role in ("interface", "worker")]
            cells.append(f"{broker_s / seconds * 1e3:.2f} ms/s")
            grown = {"interface": 0, "worker": 0}
            for pid, size in process.resident_bytes().items():
                if (role := roles.get(pid)) in grown:
                    grown[role] += size - memory[pid] if sockets else size
            for role in ("interface", "worker"):
                if sockets:
                    cells.append(f"{grown[role] / sockets / 1000:.1f} KB a WebSocket")
                else:
                    cells.append(f"{grown[role] / counts[role] / 1e6:.0f} MB")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


PARTS: dict[str, Callable[[Measured], list[str]]] = {
    "blobs": part_blobs,
    "channels": part_channels,
    "groups": part_groups,
    "looks": part_looks,
    "processes": part_processes,
    "idle": part_idle,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of the broker, and of our processes, for each operation.")
    parser.add_argument("--only", default="", help="parts, comma separated: " + ", ".join(PARTS))
    parser.add_argument("--program", help="the server (that of trunkline serve)")
    parser.add_argument("--tcp", action="store_true", help="over TCP instead of a unix socket")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--name", default="broker_capacity", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    chosen = [name for name in arguments.only.split(",") if name] or list(PARTS)
    for name in chosen:
        if name not in PARTS:
            parser.error(f"no part {name!r}: {', '.join(PARTS)}")
    if not CLIENT.exists():
        raise SystemExit("the load client is not compiled: run make bench-capacity")
    program = shutil.which(arguments.program) if arguments.program else find_server()
    if program is None:
        parser.error(f"there is no {arguments.program}")
    machine = describe_machine()
    with broker(program, arguments.tcp, arguments.repeat) as measured:
        server = dict(
            line.split(":", 1)
            for line in measured.control.call("INFO", "server").decode().split("\r\n")
            if ":" in line
        )
        version = (
            f"Valkey {server['valkey_version']}" if "valkey_version" in server else f"Redis {server['redis_version']}"
        )
        text = [
            "# What one broker carries",
            "",
            f"Measured {time.strftime('%Y-%m-%d')} at revision {machine['revision']}, on {machine['cores']} cores of "
            f"{machine['processor']}, Python {machine['python']}, {version} over "
            f"{'TCP (loopback)' if arguments.tcp else 'a unix socket'}; load average before: "
            f"{machine['load_average_before']:.1f}, after: LOAD_AFTER. CPU time for each operation, medians of "
            f'{arguments.repeat}. Columns with "at 70 % of a core" are calculated from it. Repeat with '
            "`make bench-capacity`.",
        ]
        for name in chosen:
            part = PARTS[name]
            print(f"{name} …", flush=True)
            found = part(measured)
            print("\n".join(found), flush=True)
            text += ["", f"## {name}", "", (part.__doc__ or "").strip(), "", *found]
    target = Path(HERE) / "results" / f"{arguments.name}.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(text).replace("LOAD_AFTER", f"{os.getloadavg()[0]:.1f}") + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
