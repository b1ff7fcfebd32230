"""What every process of ours does from its start to its end, whatever it serves.

    life = ProcessLife(...)           signals are ours from here on, and the admin port answers "starting"
    life.serving(layer, ...)          tells the supervisor; the loop shows each second that it turns
    await life.stop.wait()            SIGTERM, SIGINT or SIGHUP
    life.draining()                   not ready any more, at once
    … finish, within life.drain_timeout_s(…), or until life.at_once …
    await life.close()

SIGTERM is what ``docker stop``, Kubernetes and systemd send: it drains. SIGINT is somebody who waits at a terminal:
it drains, too, but for ``HURRIED_DRAIN_S`` at most. Another of these two ends the waiting.

A supervised process reports through a pipe (readiness.py has the words), and whoever hears nothing for --hang-timeout
ends it. One without a supervisor watches its own loop from a thread. Does not live here: what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import importlib.metadata
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, MutableMapping
from typing import Any, Final, NoReturn, Protocol

from channel_layer.admin import AdminServer, Answer, alive, readiness
from channel_layer.errors import BrokerUnavailable
from channel_layer.readiness import BEAT_INTERVAL_S, LifePhase, StatusWord, build_status, explain_unready

__all__ = [
    "HURRIED_DRAIN_S",
    "INTERRUPTED",
    "STATUS_VARIABLE",
    "ProcessLife",
    "StatusPipe",
    "WrongInput",
    "fail",
    "find_release",
    "leave",
    "unless",
]

logger = logging.getLogger("trunkline.channel_layer")

# Descriptor of the pipe to the supervisor.
STATUS_VARIABLE: Final = "TRUNKLINE_STATUS_FD"
# After Ctrl-C: a developer waits for the prompt.
HURRIED_DRAIN_S: Final = 1.0
# After a second signal: to say goodbye on the links. Then the others find us gone by our lease.
_FORCED_LEAVE_TIMEOUT_S: Final = 0.5
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# When a stack could not be written in this time (stderr is a pipe that nobody reads), the process ends without.
_DUMP_TIMEOUT_S: Final = 5.0


class WrongInput(Exception):
    """The operator's settings cannot be used; the text is the line for the operator."""


class ProvingLayer(Protocol):
    """What is asked of a RedisProcessLayer here."""

    @property
    def process_id(self) -> str: ...

    @property
    def broker_reachable(self) -> bool: ...

    @property
    def proved_at(self) -> float | None: ...

    def probe(self) -> None: ...

    def set_load(self, load: int, room: int) -> None: ...


class LeavingLayer(Protocol):
    """What is asked of a layer when its process ends."""

    async def stop(self) -> None: ...


def fail(error: Exception | str, status: int, *, pipe: StatusPipe) -> int:
    """Say the one line about what was wrong; return the exit status."""
    if isinstance(error, BrokerUnavailable):
        pipe.say(StatusWord.BROKER_AWAY)
    print(f"trunkline: {error}", file=sys.stderr)
    return status


def find_release() -> str:
    """The version of Trunkline, for the lease; "" where it runs without being installed."""
    try:
        return importlib.metadata.version("trunkline")
    except importlib.metadata.PackageNotFoundError:
        return ""


INTERRUPTED: Final = object()


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, object]) -> object:
    """The result of ``work``, or INTERRUPTED if ``event`` is set first: then ``work`` is cancelled or not begun."""
    if event.is_set():
        work.close()
        return INTERRUPTED
    task = asyncio.ensure_future(work)
    interrupted = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([task, interrupted], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        _abandon(task)
        await asyncio.wait([task])
        return INTERRUPTED
    finally:
        interrupted.cancel()
        if not task.done():  # we were cancelled
            _abandon(task)


def _abandon(task: asyncio.Future[object]) -> None:
    """Cancel it; how it ends is nobody's any more, and asyncio reports errors that nobody has looked at."""

    def look(task: asyncio.Future[object]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.info("what was interrupted ended with %r", error)

    task.add_done_callback(look)
    task.cancel()


async def leave(layer: LeavingLayer, at_once: asyncio.Event) -> bool:
    """Stop the layer. False: it had not ended ``_FORCED_LEAVE_TIMEOUT_S`` behind ``at_once``, and was given up."""

    async def limit() -> None:
        await at_once.wait()
        limited.reschedule(asyncio.get_running_loop().time() + _FORCED_LEAVE_TIMEOUT_S)

    limiting = asyncio.ensure_future(limit())
    try:
        async with asyncio.timeout(None) as limited:
            await layer.stop()
    except TimeoutError:
        return False
    finally:
        limiting.cancel()
    return True


class StatusPipe:
    """The way to the supervisor, if there is one."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Take the pipe that ``environ`` names; nobody else finds it there, nor do processes started from here."""
        descriptor = environ.pop(STATUS_VARIABLE, "")
        self._descriptor = int(descriptor) if descriptor else None
        if self._descriptor is not None:
            os.set_inheritable(self._descriptor, False)
            os.set_blocking(self._descriptor, False)

    def __repr__(self) -> str:
        return f"<StatusPipe {self._descriptor}>"

    @property
    def is_supervised(self) -> bool:
        return self._descriptor is not None

    def say(self, word: StatusWord, text: str = "") -> None:
        """Write a line. One that a frozen supervisor does not read is dropped, not waited for."""
        if self._descriptor is not None:
            # A supervisor that is gone is the business of trunkline/lifeline.py.
            with contextlib.suppress(OSError):
                os.write(self._descriptor, build_status(word, text))


def _leave_signals_to_python() -> None:
    """In a process that the application has forked (multiprocessing): what it is told is not told to us."""
    signal.set_wakeup_fd(-1)  # the same socket as ours: a SIGTERM for it would end us
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)


class ProcessLife:
    """One for a process that serves; to be made on its running loop. Raises nothing; see start()."""

    def __init__(
        self,
        name: str,
        *,
        pipe: StatusPipe,
        admin_host: str = "127.0.0.1",
        admin_port: int = 0,
        hang_timeout_s: float = 0.0,
    ) -> None:
        """``admin_port`` 0: no admin port; ``hang_timeout_s`` 0: a loop may be blocked for any time."""
        self.name = name
        self.phase = LifePhase.STARTING
        self.stop = asyncio.Event()
        self.at_once = asyncio.Event()  # wait for nothing any more
        self.is_hurried = False  # the signal was SIGINT
        self.beat_count = 0
        self._loop = asyncio.get_running_loop()
        self._admin: AdminServer | None = None
        if admin_port:
            self._admin = AdminServer(admin_host, admin_port, {"/healthz": alive, "/readyz": self._readiness})
        self._pipe = pipe
        self._hang_timeout_s = hang_timeout_s
        self._layer: ProvingLayer | None = None  # from serving() on
        self._load: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._facts: Callable[[], Mapping[str, Any]] = dict
        self._text = ""
        self._timer: asyncio.TimerHandle | None = None
        self._over = threading.Event()

    def __repr__(self) -> str:
        return f"<ProcessLife {self.name} {self.phase.value}, {self.beat_count} beats>"

    async def start(self) -> None:
        """Take the signals, and open the admin port. Raises AdminPortError."""
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in _SIGNALS:
                self._loop.add_signal_handler(number, self.signalled, number)
            os.register_at_fork(after_in_child=_leave_signals_to_python)
        if self._admin is not None:
            await self._admin.start()

    def signalled(self, number: signal.Signals) -> None:
        """A signal came that asks this process to end."""
        if not self.stop.is_set():
            self.is_hurried = number is signal.SIGINT
            self.stop.set()
        elif number is signal.SIGINT or (number is signal.SIGTERM and not self._pipe.is_supervised):
            # A supervised process gets SIGTERM twice where systemd sends it to the whole group; a supervisor that has
            # no more patience sends SIGKILL. SIGHUP comes by itself: from systemd behind SIGTERM (SendSIGHUP=), from
            # shell and kernel when a terminal is closed.
            self.at_once.set()

    def drain_timeout_s(self, configured_s: float) -> float:
        """How long what runs may go on."""
        return min(configured_s, HURRIED_DRAIN_S) if self.is_hurried else configured_s

    def serving(
        self,
        layer: ProvingLayer,
        text: str = "",
        *,
        load: Callable[[], tuple[int, int]],
        facts: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Everything is up. ``load`` tells what runs, of how much there is room for; 0 is no limit.

        ``facts`` is told whoever asks whether this process is ready, beside the answer.
        """
        self._layer, self._text, self._load, self._facts = layer, text, load, facts
        self.phase = LifePhase.SERVING
        self._pipe.say(StatusWord.PROCESS, layer.process_id)
        self._pipe.say(StatusWord.READY, text)
        self._beat()
        if not self._pipe.is_supervised and self._hang_timeout_s and not _has_terminal():
            threading.Thread(target=self._watch_loop, name="hang watch", daemon=True).start()

    def draining(self) -> None:
        """From now on the process is not ready."""
        self.phase = LifePhase.DRAINING
        self._pipe.say(StatusWord.DRAINING)

    async def close(self) -> None:
        """The process is about to end: no more beats, no more answers."""
        self._over.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._admin is not None:
            await self._admin.close()

    def explain_unready(self) -> str | None:
        """Why this process is not ready; None if it is."""
        layer = self._layer
        return explain_unready(
            self.phase,
            now=self._loop.time(),
            broker_reachable=layer is not None and layer.broker_reachable,
            proved_at=None if layer is None else layer.proved_at,
        )

    def _readiness(self) -> Answer:
        return readiness({self.name: self.explain_unready()}, facts=self._facts())

    def _beat(self) -> None:
        self.beat_count += 1
        layer = self._layer
        assert layer is not None
        if self.phase is LifePhase.SERVING:
            layer.probe()
            layer.set_load(*self._load())
            why = self.explain_unready()
            if why is None:
                self._pipe.say(StatusWord.READY, self._text)
            elif self.beat_count > 1:
                self._pipe.say(StatusWord.WAITING, why)
        else:
            self._pipe.say(StatusWord.DRAINING)
        self._timer = self._loop.call_later(BEAT_INTERVAL_S, self._beat)

    def _watch_loop(self) -> None:
        """On a thread: end the process when its loop stands still.

        Counted are our own turns: while the whole process is frozen (SIGSTOP), this thread is, too.
        """
        seen, silent_s = -1, 0.0
        while not self._over.wait(BEAT_INTERVAL_S):
            silent_s = 0.0 if self.beat_count != seen else silent_s + BEAT_INTERVAL_S
            seen = self.beat_count
            if silent_s >= self._hang_timeout_s:
                _end_hung(self.name, silent_s)


def _has_terminal() -> bool:
    """Somebody may sit there with a debugger."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def _end_hung(name: str, silent_s: float) -> NoReturn:
    # Not through logging: the loop may hang with its lock.
    faulthandler.dump_traceback_later(_DUMP_TIMEOUT_S, exit=True)
    os.write(2, f"trunkline: {name} hangs: its loop has not turned for {silent_s:.0f} s; it ends here:\n".encode())
    faulthandler.dump_traceback(all_threads=True)
    os._exit(1)
