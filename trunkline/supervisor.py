"""Starts the processes of a command, keeps them alive, and ends them.

    STARTING --all ready--> RUNNING --signal--> STOPPING --all ended--> (returns)
        +-----a process could not start------------^

The supervisor serves nothing itself: it binds the listening socket, starts the embedded broker, interface servers
and workers, and replaces what dies, each after a wait that doubles. A process says that it is ready by writing a
line to the pipe in ``TRUNKLINE_READY_FD``. What each process is, is a ``ProcessSpec``, made in cli.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from trunkline.broker import EmbeddedBroker
from trunkline.lifeline import LIFELINE_VARIABLE, load_parent_death_signal
from trunkline.reload import SourceWatch

__all__ = ["ProcessSpec", "Role", "Supervisor"]

logger = logging.getLogger("trunkline.supervisor")

READY_VARIABLE: Final = "TRUNKLINE_READY_FD"
# A process that dies is started again after this long; the wait doubles while it keeps dying …
RESTART_DELAY_S: Final = 0.1
# … up to this: an application that cannot start then costs one attempt each 5 s, and a log line.
RESTART_DELAY_S_MAX: Final = 5.0
# A process that lived this long is not "keeping dying".
STEADY_AFTER_S: Final = 10.0
BROKER_START_TIMEOUT_S: Final = 10.0
# After SIGTERM a process has this long; then it is killed. Above the processes' own grace periods: a worker lets its
# connections end (10 s, and 2 s for threads) and its lifespan shut down (30 s).
STOP_TIMEOUT_S: Final = 45.0
RELOAD_STOP_TIMEOUT_S: Final = 5.0
BROKER_STOP_TIMEOUT_S: Final = 2.0


class Role(Enum):
    """What a process is; they are started in this order and ended so that clients hear of it first."""

    BROKER = "broker"
    INTERFACE = "interface server"
    WORKER = "worker"


class Phase(Enum):
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One process to keep alive."""

    role: Role
    number: int
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # on top of the supervisor's
    pass_fds: tuple[int, ...] = ()
    takes_hangup: bool = False  # SIGHUP is passed on to it: it reads files again

    @property
    def title(self) -> str:
        return self.role.value if self.role is Role.BROKER else f"{self.role.value} {self.number}"


class Child:
    """One supervised process through all its lives."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.process: asyncio.subprocess.Process | None = None
        self.ready: asyncio.Future[bool] | None = None  # True: ready; False: ended before it was
        self.ready_pipe: int | None = None  # our end of it, until a line or the end of file was read
        self.keeper: asyncio.Task[None] | None = None  # starts another when it has ended
        self.started_at = 0.0
        self.deaths_in_a_row = 0

    def __repr__(self) -> str:
        pid = self.process.pid if self.process is not None else None
        return f"<Child {self.spec.title}, pid {pid}, {self.deaths_in_a_row} deaths in a row>"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def is_ready(self) -> bool:
        return self.ready is not None and self.ready.done() and self.ready.result()

    def restart_delay_s(self) -> float:
        exponent = min(self.deaths_in_a_row, 16)
        return min(RESTART_DELAY_S_MAX, RESTART_DELAY_S * 2.0**exponent)


class Supervisor:
    """Runs the processes of one command until a signal, or until one of them cannot start."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        broker: EmbeddedBroker | None = None,
        environment: dict[str, str] | None = None,
        on_ready: Callable[[], None] = lambda: None,
        watch: SourceWatch | None = None,
    ) -> None:
        self.phase = Phase.STARTING
        self.children = [Child(spec) for spec in specs]
        self.broker = broker
        self._broker_child: Child | None = None
        if broker is not None:
            self._broker_child = Child(ProcessSpec(role=Role.BROKER, number=1, command=broker.command_line()))
        self._environment = {**os.environ, **(environment or {})}
        self._on_ready = on_ready
        self._watch = watch
        self._status = 0
        self._parent_death_signal = load_parent_death_signal()
        self._lifeline_read, self._lifeline_write = os.pipe()  # the write end is never inherited
        self._stop_requested: asyncio.Event | None = None

    def __repr__(self) -> str:
        return f"<Supervisor {self.phase.value}, {sum(child.alive for child in self.children)} processes>"

    async def run(self) -> int:
        """Run everything; return the exit status of the command."""
        loop = asyncio.get_running_loop()
        self._stop_requested = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)
        if any(child.spec.takes_hangup for child in self.children):
            loop.add_signal_handler(signal.SIGHUP, self._hung_up)
        try:
            if await self._start():
                self.phase = Phase.RUNNING
                self._on_ready()
                reloader: asyncio.Task[None] | None = None
                if self._watch is not None:
                    reloader = asyncio.create_task(self._reload_on_change(), name="restart workers on changes")
                    reloader.add_done_callback(self._keeper_ended)
                await self._stop_requested.wait()
                if reloader is not None:
                    reloader.cancel()
                    await asyncio.wait((reloader,))
            self.phase = Phase.STOPPING
            await self._stop()
        finally:
            for child in self._all_children():  # only after a fault of our own
                if child.alive and child.process is not None:
                    child.process.kill()
            os.close(self._lifeline_read)
            os.close(self._lifeline_write)
        return self._status

    def _all_children(self) -> list[Child]:
        return self.children + ([self._broker_child] if self._broker_child is not None else [])

    def _signalled(self) -> None:
        assert self._stop_requested is not None
        if self._stop_requested.is_set():
            logger.warning("second signal: ending everything at once")
            for child in self._all_children():
                if child.alive and child.process is not None:
                    child.process.kill()
            return
        self._stop_requested.set()

    def _hung_up(self) -> None:
        for child in self.children:
            # One that is not ready yet might not expect the signal, and reads the files anyway.
            if child.spec.takes_hangup and child.process is not None and child.alive and child.is_ready:
                child.process.send_signal(signal.SIGHUP)

    # Starting

    async def _start(self) -> bool:
        """Start everything; False if a process could not start (``_status`` is set) or a signal came."""
        if self._broker_child is not None:
            await self._spawn(self._broker_child)
            if not await self._broker_answers():
                return False
            self._keep(self._broker_child)
        # One of each kind first: what is wrong with the application is then said once, not by every worker.
        firsts = [child for child in self.children if child.spec.number == 1]
        others = [child for child in self.children if child.spec.number != 1]
        return await self._start_together(firsts) and await self._start_together(others)

    async def _start_together(self, children: Sequence[Child]) -> bool:
        assert self._stop_requested is not None
        stop = asyncio.create_task(self._stop_requested.wait())
        try:
            for child in children:
                await self._spawn(child)
                self._keep(child)
            for child in children:
                assert child.ready is not None
                either: set[asyncio.Future[Any]] = {child.ready, stop}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if self._stop_requested.is_set() or not child.ready.result():
                    return False  # in the second case the keeper has set the status
        finally:
            stop.cancel()
        return True

    async def _broker_answers(self) -> bool:
        """Wait for the broker; False if it cannot be used (``_status`` is set) or a signal came."""
        assert self.broker is not None
        assert self._broker_child is not None
        assert self._stop_requested is not None
        deadline = time.monotonic() + BROKER_START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._stop_requested.is_set():
                return False
            if not self._broker_child.alive:
                self._status = 1
                logger.error("the broker (%s) ended at once; run it by hand to see why", self.broker.program)
                return False
            if await asyncio.to_thread(self.broker.answers):
                return True
            # The broker has no way to tell us; it is up within some 20 ms.
            await asyncio.sleep(0.01)
        self._status = 1
        logger.error("the broker (%s) does not answer on %s", self.broker.program, self.broker.socket_path)
        return False

    async def _spawn(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        environment = {**self._environment, **child.spec.environment}
        pass_fds = list(child.spec.pass_fds)
        ready_read = ready_write = None
        child.ready = loop.create_future()
        # Open still if the last one started a process that outlives it and holds the other end.
        self._close_ready_pipe(child)
        if child.spec.role is not Role.BROKER:
            ready_read, ready_write = os.pipe()
            environment[READY_VARIABLE] = str(ready_write)
            environment[LIFELINE_VARIABLE] = str(self._lifeline_read)
            pass_fds += [ready_write, self._lifeline_read]
        try:
            child.process = await asyncio.create_subprocess_exec(
                *child.spec.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if child.spec.role is Role.BROKER else None,
                env=environment,
                pass_fds=pass_fds,
                # Ctrl-C in a terminal reaches the whole foreground group: only the supervisor may act on it.
                start_new_session=True,
                preexec_fn=self._parent_death_signal,
            )
        except BaseException:
            if ready_read is not None:
                os.close(ready_read)
            raise
        finally:
            if ready_write is not None:
                os.close(ready_write)
        child.started_at = loop.time()
        if ready_read is not None:
            child.ready_pipe = ready_read
            loop.add_reader(ready_read, self._ready_pipe_readable, child, ready_read)
        logger.debug("%s started, pid %d", child.spec.title, child.process.pid)

    def _ready_pipe_readable(self, child: Child, descriptor: int) -> None:
        line = os.read(descriptor, 4096)
        self._close_ready_pipe(child)
        if line and child.ready is not None and not child.ready.done():
            logger.debug("%s: %s", child.spec.title, line.decode("utf-8", "replace").strip())
            child.ready.set_result(True)
        # End of file without a line: the process has ended or is about to; its keeper sees that.

    @staticmethod
    def _close_ready_pipe(child: Child) -> None:
        if child.ready_pipe is not None:
            asyncio.get_running_loop().remove_reader(child.ready_pipe)
            os.close(child.ready_pipe)
            child.ready_pipe = None

    # Keeping alive

    def _keep(self, child: Child) -> None:
        child.keeper = asyncio.create_task(self._keep_alive(child), name=f"keep {child.spec.title} alive")
        child.keeper.add_done_callback(self._keeper_ended)

    async def _keep_no_more(self, children: Sequence[Child]) -> None:
        """From now on nothing is started in the place of ``children``; what runs, runs on."""
        keepers = [child.keeper for child in children if child.keeper is not None]
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    def _keeper_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            assert self._stop_requested is not None
            logger.critical("%s failed", task.get_name(), exc_info=error)
            self._status = 1
            self._stop_requested.set()

    async def _keep_alive(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        assert self._stop_requested is not None
        while True:
            assert child.process is not None
            assert child.ready is not None
            status = await child.process.wait()
            was_ready = child.ready.done()
            if not was_ready:
                child.ready.set_result(False)
            if self._stop_requested.is_set():
                return
            if self.phase is Phase.STARTING and child.spec.role is not Role.BROKER and not was_ready:
                # It has said why itself. What cannot start now would not start the next time.
                self._status = status if status > 0 else 1
                return
            if self._watch is not None and child.spec.role is Role.WORKER and not was_ready:
                logger.warning("%s could not start; waiting for a file to change", child.spec.title)
                return
            if loop.time() - child.started_at > STEADY_AFTER_S:
                child.deaths_in_a_row = 0
            await self._start_another(child, _how_it_ended(status))

    async def _start_another(self, child: Child, what_happened: str) -> None:
        """Wait, and start a process, until that succeeds."""
        while True:
            delay_s = child.restart_delay_s()
            child.deaths_in_a_row += 1
            logger.error("%s %s; starting another in %.1f s", child.spec.title, what_happened, delay_s)
            await asyncio.sleep(delay_s)
            if child.spec.role is Role.BROKER and self.broker is not None:
                with contextlib.suppress(FileNotFoundError):
                    self.broker.socket_path.unlink()
            try:
                await self._spawn(child)
            except OSError as error:
                # No memory, processes or descriptors left, for now; the others serve on.
                what_happened = f"could not be started: {error}"
            else:
                return

    async def _reload_on_change(self) -> None:
        assert self._watch is not None
        while True:
            path = await self._watch.changed()
            logger.warning("%s changed: restarting the workers", path)
            workers = [child for child in self.children if child.spec.role is Role.WORKER]
            # First the keepers: one that waits to replace a dead worker would start a second one beside ours.
            await self._keep_no_more(workers)
            await asyncio.gather(*(self._end(child, RELOAD_STOP_TIMEOUT_S) for child in workers))
            for child in workers:
                child.deaths_in_a_row = 0
                await self._spawn(child)
                self._keep(child)

    # Stopping

    async def _stop(self) -> None:
        """Interface servers first, so that clients hear of it; then the workers; the broker carries both."""
        await self._keep_no_more(self._all_children())
        for role in (Role.INTERFACE, Role.WORKER):
            await asyncio.gather(
                *(self._end(child, STOP_TIMEOUT_S) for child in self.children if child.spec.role is role)
            )
        if self._broker_child is not None:
            await self._end(self._broker_child, BROKER_STOP_TIMEOUT_S)

    async def _end(self, child: Child, timeout_s: float) -> None:
        if not child.alive or child.process is None:
            return
        child.process.terminate()
        try:
            await asyncio.wait_for(child.process.wait(), timeout_s)
        except TimeoutError:
            logger.error(
                "%s (pid %d) did not end within %.0f s: killing it", child.spec.title, child.process.pid, timeout_s
            )
            child.process.kill()
            await child.process.wait()


def _how_it_ended(status: int) -> str:
    if status < 0:
        try:
            return f"was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"was ended by signal {-status}"
    return f"ended with status {status}"
