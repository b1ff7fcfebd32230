"""Starts the processes of a command, keeps them alive, replaces them one by one, and ends them.

    STARTING --all ready--> RUNNING --SIGTERM, SIGINT--> STOPPING --all ended--> (returns)
        +-----a process could not start-------------------^

The supervisor serves nothing itself: it binds the listening sockets, starts the embedded broker, interface servers
and workers, and replaces what dies, each after a wait that doubles. SIGHUP replaces the workers, one after the other:
the new one is ready before the old one is told to end, so there are never fewer. What hangs is ended, and then it is
dead like any other. What died without a goodbye is told dead through the broker: the others need not wait for its
lease to end. One process is child.py; what each process is, is a ``ProcessSpec``, made in cli.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from enum import Enum
from typing import Any, Final

from channel_layer.admin import AdminServer, Answer, alive, readiness
from channel_layer.errors import BrokerError
from channel_layer.readiness import BEAT_INTERVAL_S
from trunkline.broker import EmbeddedBroker
from trunkline.child import Child, Lifeline, ProcessSpec, Role
from trunkline.lifeline import load_parent_death_signal
from trunkline.reload import SourceWatch
from trunkline.terminal import TerminalWatch

__all__ = ["ProcessSpec", "Role", "Supervisor"]

logger = logging.getLogger("trunkline.supervisor")

# A process that dies is started again after this long; the wait doubles while it keeps dying …
RESTART_DELAY_S: Final = 0.1
# … up to this: an application that cannot start then costs one attempt each 5 s, and a log line.
RESTART_DELAY_S_MAX: Final = 5.0
# A process that lived this long is not "keeping dying".
STEADY_AFTER_S: Final = 10.0
BROKER_START_TIMEOUT_S: Final = 10.0
# A process that is told to end has its drain, its lifespan shutdown, and so long for everything else; then it is
# killed. A worker lets cancelled applications end (2 s), says goodbye (2 s) and waits for threads (2 s).
STOP_MARGIN_S: Final = 8.0
# A worker that is to take the place of another may load its models for so long; then it is killed, and the old one
# stays.
REPLACEMENT_START_TIMEOUT_S: Final = 600.0
BROKER_STOP_TIMEOUT_S: Final = 2.0


class Phase(Enum):
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


class Supervisor:
    """Runs the processes of one command until a signal, or until one of them cannot start."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        broker: EmbeddedBroker | None = None,
        environment: dict[str, str] | None = None,
        on_ready: Callable[[], None] = lambda: None,
        on_stopping: Callable[[], None] = lambda: None,
        watch: SourceWatch | None = None,
        stop_timeout_s: float = 60.0,
        hang_timeout_s: float = 60.0,
        tell_death: Callable[[str], None] | None = None,
        admin_host: str = "127.0.0.1",
        admin_port: int = 0,
    ) -> None:
        """``stop_timeout_s``: longest drain and lifespan shutdown; ``hang_timeout_s`` and ``admin_port`` 0: none.

        ``tell_death(process_id)`` tells the processes of others; it is called on a thread, and may fail.
        """
        self.phase = Phase.STARTING
        self.children = [Child(spec) for spec in specs]
        self.broker = broker
        self._broker_child: Child | None = None
        if broker is not None:
            self._broker_child = Child(ProcessSpec(role=Role.BROKER, number=1, command=broker.command_line()))
        # Processes beside those in ``children``, while one takes the place of another: the new one until it is ready,
        # then the old one until it has ended. One of each at most, but for --reload: as many as there are workers.
        self._passing: set[Child] = set()
        self._environment = {**os.environ, **(environment or {})}
        self._on_ready = on_ready
        self._on_stopping = on_stopping
        self._watch = watch
        self._stop_timeout_s = stop_timeout_s + STOP_MARGIN_S
        self._hang_timeout_s = hang_timeout_s
        self._tell_death = tell_death
        self._admin: AdminServer | None = None
        if admin_port:
            self._admin = AdminServer(admin_host, admin_port, {"/healthz": alive, "/readyz": self._readiness})
        self._status = 0
        # What a death in the first phase is, is decided by whether the command has ever been ready.
        lifeline_read, self._lifeline_write = os.pipe()  # the write end is never inherited
        self._lifeline = Lifeline(read_descriptor=lifeline_read, ask_for_signal=load_parent_death_signal())
        self._stop_requested: asyncio.Event | None = None
        self._stop_signal = signal.SIGTERM  # with what the processes are told to end
        self._roll_requested: asyncio.Event | None = None
        self._swapping = asyncio.Lock()  # held while ``children`` changes, by SIGHUP or by --reload
        self._background: set[asyncio.Task[None]] = set()  # while RUNNING

    def __repr__(self) -> str:
        return f"<Supervisor {self.phase.value}, {sum(child.alive for child in self.children)} processes>"

    async def run(self) -> int:
        """Run everything; return the exit status of the command. Raises AdminPortError."""
        loop = asyncio.get_running_loop()
        self._stop_requested, self._roll_requested = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number)
        terminal = TerminalWatch()
        loop.add_signal_handler(signal.SIGHUP, self._hung_up, terminal)
        try:
            if self._admin is not None:
                await self._admin.start()
            if await self._start():
                self.phase = Phase.RUNNING
                self._on_ready()
                self._run_in_background(self._roll_when_asked(), "replace workers")
                if self._hang_timeout_s:
                    self._run_in_background(self._watch_for_hanging(), "watch for processes that hang")
                if self._watch is not None:
                    self._run_in_background(self._reload_on_change(), "restart workers on changes")
                await self._stop_requested.wait()
            self.phase = Phase.STOPPING
            self._on_stopping()
            await self._stop()
        finally:
            for child in self._all_children():  # only after a fault of our own
                child.send(signal.SIGKILL)
            if self._admin is not None:
                await self._admin.close()
            os.close(self._lifeline.read_descriptor)
            os.close(self._lifeline_write)
        return self._status

    def _all_children(self) -> list[Child]:
        broker = [self._broker_child] if self._broker_child is not None else []
        return [*self.children, *self._passing, *broker]

    def _workers(self) -> list[Child]:
        return [child for child in self.children if child.spec.role is Role.WORKER]

    def _readiness(self) -> Answer:
        """Ready while one process of each kind is: it serves then, whatever is the matter with the others."""
        if self.phase is Phase.STOPPING:
            return readiness({child.spec.title: self.phase.value for child in self.children})
        now = asyncio.get_running_loop().time()
        why_not = {
            # Some wait for the first of their kind.
            child: "starting"
            if self.phase is Phase.STARTING and child.process is None
            else child.explain_unready(now)
            for child in self.children
        }
        roles = {child.spec.role for child, reason in why_not.items() if reason is None}
        return readiness(
            {child.spec.title: reason for child, reason in why_not.items()},
            is_ready=roles == {child.spec.role for child in self.children},
        )

    def _run_in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(self._task_ended)

    # Signals

    def _signalled(self, number: signal.Signals) -> None:
        assert self._stop_requested is not None
        if self._stop_requested.is_set():
            logger.warning("second signal: ending everything at once")
            for child in self._all_children():
                child.send(signal.SIGKILL)
            return
        self._stop_signal = number
        self._stop_requested.set()

    def _hung_up(self, terminal: TerminalWatch) -> None:
        assert self._stop_requested is not None
        if terminal.is_gone():
            # Its shell and the kernel both say so: the second one is nobody's impatience.
            if not self._stop_requested.is_set():
                self._signalled(signal.SIGTERM)
            return
        for child in self.children:
            # One that is not ready yet might not expect the signal, and reads the files anyway.
            if child.spec.takes_hangup and child.is_ready:
                child.send(signal.SIGHUP)
        if self._workers():
            assert self._roll_requested is not None
            self._roll_requested.set()

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
                while not child.is_ready:
                    assert child.ready is not None
                    assert child.keeper is not None
                    # The keeper ends when it gives the child up; else it starts another, which has a new ``ready``.
                    waits: set[asyncio.Future[Any]] = {child.ready, child.keeper, stop}
                    if child.ready.done():
                        waits.remove(child.ready)
                        await asyncio.wait(waits, timeout=RESTART_DELAY_S, return_when=asyncio.FIRST_COMPLETED)
                    else:
                        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    if self._stop_requested.is_set() or child.keeper.done():
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
        await child.spawn(self._environment, self._lifeline)

    # Keeping alive

    def _keep(self, child: Child) -> None:
        child.keeper = asyncio.create_task(self._keep_alive(child), name=f"keep {child.spec.title} alive")
        child.keeper.add_done_callback(self._task_ended)

    async def _keep_no_more(self, children: Sequence[Child]) -> None:
        """From now on nothing is started in the place of ``children``; what runs, runs on."""
        keepers = [child.keeper for child in children if child.keeper is not None]
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
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
            status = await child.wait_ended()
            was_ready = child.is_ready
            if self._stop_requested.is_set():
                return
            # Which process that was is said now: the next one will have another id.
            self._run_in_background(
                self._tell(child.spec.title, child.unsaid_goodbye(status)), f"tell the death of {child.spec.title}"
            )
            # One that could not reach a broker that answered a moment ago is tried again, as one that runs would try.
            is_final = not was_ready and not child.is_broker_away and child.spec.role is not Role.BROKER
            if is_final and self.phase is Phase.STARTING:
                # It has said why itself. What never could start would not start the next time.
                if not child.has_been_ready:
                    self._status = status if status > 0 else 1
                    return
            elif is_final and self._watch is not None and child.spec.role is Role.WORKER:
                logger.warning("%s could not start; waiting for a file to change", child.spec.title)
                return
            if loop.time() - child.started_at > STEADY_AFTER_S:
                child.deaths_in_a_row = 0
            await self._start_another(child, _how_it_ended(status))

    async def _tell(self, title: str, process_id: str) -> None:
        """Tell the others that a process is no more."""
        if self._tell_death is None or not process_id:
            return
        if self.phase is Phase.STOPPING and self.broker is not None:
            return  # the others stop, too
        try:
            await asyncio.to_thread(self._tell_death, process_id)
        except (OSError, BrokerError, ValueError) as error:
            logger.warning("%s (%s): its death could not be told, its lease will: %s", title, process_id, error)

    async def _start_another(self, child: Child, what_happened: str) -> None:
        """Wait, and start a process, until that succeeds."""
        while True:
            delay_s = _restart_delay_s(child.deaths_in_a_row)
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

    async def _watch_for_hanging(self) -> None:
        """End processes that have said nothing for too long; their keepers start others."""
        loop = asyncio.get_running_loop()
        last_look = loop.time()
        while True:
            await asyncio.sleep(min(BEAT_INTERVAL_S, self._hang_timeout_s / 4))
            now = loop.time()
            # If we did not turn either (frozen, or a suspended machine), nobody is to blame for it.
            away_s, last_look = max(0.0, now - last_look - 2 * BEAT_INTERVAL_S), now
            for child in self.children:
                child.heard_at += away_s
                if child.spec.role is Role.BROKER or not (child.alive and child.is_ready):
                    continue
                if now - child.heard_at > self._hang_timeout_s:
                    assert child.process is not None
                    logger.error(
                        "%s (pid %d) hangs: its loop has not turned for %.0f s; it is ended, with its stack:",
                        *(child.spec.title, child.process.pid, now - child.heard_at),
                    )
                    await child.end_hung()

    # Replacing workers

    async def _roll_when_asked(self) -> None:
        assert self._roll_requested is not None
        while True:
            await self._roll_requested.wait()
            self._roll_requested.clear()  # a signal that comes meanwhile asks for another round
            workers = self._workers()
            logger.info("replacing %d worker%s, one after the other", len(workers), "s" if len(workers) > 1 else "")
            for number, worker in enumerate(workers, start=1):
                # Else a change of the source has replaced it meanwhile.
                if worker in self.children and not await self._replace(worker):
                    logger.error(
                        "%s is not replaced: the new one could not start; %s", worker.spec.title, _who_stays(number)
                    )
                    break
            else:
                logger.info("all workers are replaced")

    async def _replace(self, old: Child) -> bool:
        """Put a new process into the place of ``old``; False, and ``old`` stays, if it cannot start."""
        new = Child(old.spec)
        self._passing.add(new)  # also while this is cancelled: _stop() ends it
        while not await self._becomes_ready(new):
            if not new.is_broker_away:
                self._passing.discard(new)
                return False
            # No fault of the new code: tried again, as a process that runs would try.
            delay_s = _restart_delay_s(new.deaths_in_a_row)
            new.deaths_in_a_row += 1
            logger.warning("no broker for the new %s; trying again in %.1f s", old.spec.title, delay_s)
            await asyncio.sleep(delay_s)
        async with self._swapping:
            if old in self.children:
                # From here on ``new`` is the worker; ``old`` is not replaced any more when it ends.
                await self._keep_no_more((old,))
                self.children[self.children.index(old)] = new
                self._keep(new)
                self._passing.discard(new)
                self._passing.add(old)
                surplus = old
            else:  # a change of the source was faster
                surplus = new
        await self._end(surplus, signal.SIGTERM, self._stop_timeout_s)
        self._passing.discard(surplus)
        return True

    async def _becomes_ready(self, new: Child) -> bool:
        """Start it; False if it ended before it was ready."""
        try:
            await self._spawn(new)
        except OSError as error:
            logger.error("%s could not be started: %s", new.spec.title, error)
            return False
        assert new.ready is not None
        ended = asyncio.create_task(new.wait_ended())
        try:
            done, _ = await asyncio.wait(
                (new.ready, ended), timeout=REPLACEMENT_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                logger.error("the new %s is not ready after %g s", new.spec.title, REPLACEMENT_START_TIMEOUT_S)
                new.send(signal.SIGKILL)
                await ended
        finally:
            ended.cancel()
        return new.is_ready

    async def _reload_on_change(self) -> None:
        """Replace all workers at once: nobody is to see the old code any more, and nobody waits for its drain."""
        assert self._watch is not None
        while True:
            path = await self._watch.changed()
            logger.warning("%s changed: restarting the workers", path)
            async with self._swapping:
                workers = self._workers()
                # First the keepers: one that waits to replace a dead worker would start a second one beside ours.
                await self._keep_no_more(workers)
                for old in workers:
                    new = Child(old.spec)
                    self.children[self.children.index(old)] = new
                    self._passing.add(old)
                    self._run_in_background(self._hurry(old), f"end {old.spec.title}")
                    try:
                        await self._spawn(new)
                    except OSError as error:
                        title = new.spec.title
                        logger.error("%s could not be started: %s; waiting for a file to change", title, error)
                    else:
                        self._keep(new)

    async def _hurry(self, old: Child) -> None:
        """As after Ctrl-C: it takes nothing more at once, and hands over what it can."""
        await self._end(old, signal.SIGINT, STOP_MARGIN_S)
        self._passing.discard(old)

    # Stopping

    async def _end(self, child: Child, number: signal.Signals, timeout_s: float) -> None:
        await child.end(number, timeout_s)
        if child.process is not None and child.process.returncode is not None:
            await self._tell(child.spec.title, child.unsaid_goodbye(child.process.returncode))

    async def _stop(self) -> None:
        """Interface servers first, so that clients hear of it; then the workers; the broker carries both."""
        await self._keep_no_more(self._all_children())
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for role in (Role.INTERFACE, Role.WORKER):
            children = [child for child in (*self.children, *self._passing) if child.spec.role is role]
            # Others serve on without us: a worker's sockets are those of interface servers that stay.
            await asyncio.gather(*(self._end(child, self._stop_signal, self._stop_timeout_s) for child in children))
        if self._broker_child is not None:
            await self._broker_child.end(signal.SIGTERM, BROKER_STOP_TIMEOUT_S)


def _restart_delay_s(deaths_in_a_row: int) -> float:
    return min(RESTART_DELAY_S_MAX, RESTART_DELAY_S * 2.0 ** min(deaths_in_a_row, 16))


def _who_stays(number: int) -> str:
    return "the old ones serve on" if number == 1 else "it and those behind it serve on as they are"


def _how_it_ended(status: int) -> str:
    if status < 0:
        try:
            return f"was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"was ended by signal {-status}"
    return f"ended with status {status}"
