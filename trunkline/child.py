"""One supervised process: how it is started, what it says, how it is ended. When to do which is supervisor.py's.

    NEW --spawn()--> STARTING --"ready" on its pipe--> STARTED --+--> ENDED --spawn()--> …
                        +----------------------------------------+

It reports by lines on a pipe (channel_layer/readiness.py); one that says nothing for long hangs. The pipe is held by
the process alone, and by whatever it leaves running, which is why it is closed here when the next one starts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from channel_layer.process_life import STATUS_VARIABLE
from channel_layer.readiness import PROOF_AGE_S_MAX, StatusWord, decode_status
from trunkline.lifeline import LIFELINE_VARIABLE

__all__ = ["Child", "Lifeline", "ProcessSpec", "Role"]

logger = logging.getLogger("trunkline.supervisor")

# A line is 501 bytes at most; what comes without an end is not ours.
_LINE_BYTES_MAX: Final = 4096
# After SIGABRT, for the stack to be written; then SIGKILL, which a frozen process obeys, too.
_ABORT_TIMEOUT_S: Final = 2.0


class Role(Enum):
    """What a process is; they are started in this order and ended so that clients hear of it first."""

    BROKER = "broker"
    INTERFACE = "interface server"
    WORKER = "worker"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifeline:
    """What ties children to this process (lifeline.py)."""

    read_descriptor: int  # its other end is ours alone
    ask_for_signal: Callable[[], None] | None


class Child:
    """One supervised process through all its lives."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.process: asyncio.subprocess.Process | None = None
        self.ready: asyncio.Future[bool] | None = None  # True: it has started; False: it ended before
        self.keeper: asyncio.Task[None] | None = None  # starts another when it has ended
        self.started_at = 0.0
        self.deaths_in_a_row = 0
        self.has_been_ready = False  # in any of its lives
        self.is_broker_away = False  # it ended because it could not reach the broker when it started
        self.heard_at = 0.0  # when it last said something
        self.process_id = ""  # on the broker, as soon as it can have links; of the last one until the next one starts
        self._word: StatusWord | None = None  # what it said last
        self._text = ""
        self._pipe: int | None = None  # our end of it
        self._line = b""  # read, and not ended yet

    def __repr__(self) -> str:
        pid = self.process.pid if self.process is not None else None
        word = "silent" if self._word is None else self._word.value
        return f"<Child {self.spec.title}, pid {pid}, {word}, {self.deaths_in_a_row} deaths in a row>"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def is_ready(self) -> bool:
        """It has started."""
        return self.ready is not None and self.ready.done() and self.ready.result()

    def explain_unready(self, now: float) -> str | None:
        """Why it cannot serve at this moment; None if it can."""
        if not self.alive:
            return "not running"
        if not self.is_ready:
            return "starting"
        if now - self.heard_at > PROOF_AGE_S_MAX:
            return f"says nothing for {now - self.heard_at:.0f} s"
        if self._word is StatusWord.READY:
            return None
        return self._text or ("starting" if self._word is None else self._word.value)

    async def spawn(self, environment: Mapping[str, str], lifeline: Lifeline) -> None:
        """Start a process. Raises OSError."""
        loop = asyncio.get_running_loop()
        environment = {**environment, **self.spec.environment}
        pass_fds = list(self.spec.pass_fds)
        read = write = None
        self.ready = loop.create_future()
        self.is_broker_away, self._word, self._text, self._line = False, None, "", b""
        self.process_id = ""
        # Open still if the last one started a process that outlives it and holds the other end.
        self._close_pipe()
        if self.spec.role is not Role.BROKER:
            read, write = os.pipe()
            os.set_blocking(read, False)
            environment[STATUS_VARIABLE] = str(write)
            environment[LIFELINE_VARIABLE] = str(lifeline.read_descriptor)
            pass_fds += [write, lifeline.read_descriptor]
        try:
            self.process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if self.spec.role is Role.BROKER else None,
                env=environment,
                pass_fds=pass_fds,
                # Ctrl-C in a terminal reaches the whole foreground group: only the supervisor may act on it.
                start_new_session=True,
                preexec_fn=lifeline.ask_for_signal,
            )
        except BaseException:
            if read is not None:
                os.close(read)
            raise
        finally:
            if write is not None:
                os.close(write)
        self.started_at = self.heard_at = loop.time()
        if read is not None:
            self._pipe = read
            loop.add_reader(read, self._pipe_readable)
        logger.debug("%s started, pid %d", self.spec.title, self.process.pid)

    async def wait_ended(self) -> int:
        """Wait for the end of the process; return its status. ``ready`` is settled then."""
        assert self.process is not None
        assert self.ready is not None
        process, ready = self.process, self.ready
        status = await process.wait()
        if self.process is process:
            self._pipe_readable()  # its last words
            self._close_pipe()
        if not ready.done():
            ready.set_result(False)
        return status

    def unsaid_goodbye(self, status: int) -> str:
        """The id of the process, which has ended with ``status``, if the others do not know that; else ""."""
        has_said_it = status == 0 and self._word is StatusWord.DRAINING
        return "" if has_said_it else self.process_id

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if there is a process."""
        if self.alive and self.process is not None:
            self.process.send_signal(number)

    async def end(self, number: signal.Signals, timeout_s: float) -> None:
        """Ask the process to end; kill it after ``timeout_s``."""
        if not self.alive or self.process is None:
            return
        self.process.send_signal(number)
        try:
            await asyncio.wait_for(self.process.wait(), timeout_s)
        except TimeoutError:
            logger.error(
                "%s (pid %d) did not end within %.0f s: killing it", self.spec.title, self.process.pid, timeout_s
            )
            self.send(signal.SIGKILL)
            await self.process.wait()
        self._close_pipe()

    async def end_hung(self) -> None:
        """End a process whose loop stands still: it writes its stacks (faulthandler), if it still can."""
        self.send(signal.SIGABRT)
        if self.process is not None:
            try:
                await asyncio.wait_for(self.process.wait(), _ABORT_TIMEOUT_S)
            except TimeoutError:
                self.send(signal.SIGKILL)

    # The pipe

    def _pipe_readable(self) -> None:
        while self._pipe is not None:
            try:
                data = os.read(self._pipe, 65536)
            except BlockingIOError:
                return
            if not data:
                self._close_pipe()  # the process has ended or is about to; its keeper sees that
                return
            *lines, self._line = (self._line + data).split(b"\n")
            self._line = self._line[-_LINE_BYTES_MAX:]
            for line in lines:
                self._said(line)

    def _said(self, line: bytes) -> None:
        status = decode_status(line)
        if status is None:
            logger.debug("%s says %r", self.spec.title, line)
            return
        self.heard_at = asyncio.get_running_loop().time()
        if status[0] is StatusWord.PROCESS:
            self.process_id = status[1]
            return
        self._word, self._text = status
        if self._word is StatusWord.BROKER_AWAY:
            self.is_broker_away = True
        elif self._word is StatusWord.READY and self.ready is not None and not self.ready.done():
            logger.debug("%s is ready %s", self.spec.title, self._text)
            self.ready.set_result(True)
            self.has_been_ready = True

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            asyncio.get_running_loop().remove_reader(self._pipe)
            os.close(self._pipe)
            self._pipe = None
