"""Processes that die, cannot be started, are in the way or will not end. They are little scripts, not servers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from channel_layer.errors import BrokerUnavailable
from tests.system.processes import children_of
from trunkline import supervisor as module
from trunkline.broker import EmbeddedBroker
from trunkline.reload import SourceWatch
from trunkline.supervisor import ProcessSpec, Role, Supervisor
from trunkline.terminal import TerminalWatch

PATIENCE_S = 60.0
READY = "import os, sys, time; os.write(int(os.environ['TRUNKLINE_STATUS_FD']), b'ready\\n'); "
STAYS = READY + "time.sleep(60)"


def script(code: str, *, role: Role = Role.WORKER, number: int = 1) -> ProcessSpec:
    return ProcessSpec(role=role, number=number, command=[sys.executable, "-S", "-E", "-c", code])


@contextlib.asynccontextmanager
async def running(supervisor: Supervisor, status: int = 0) -> AsyncIterator[asyncio.Task[int]]:
    """Run it until the end of the block, then stop it as a signal does."""
    task = asyncio.create_task(supervisor.run())
    try:
        yield task
    finally:
        if not task.done():
            os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await task == status
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
        assert mine(supervisor) == []


def mine(supervisor: Supervisor) -> list[int]:
    """Processes that we started, zombies included."""
    return [pid for pid, command in children_of(os.getpid()) if not command or "TRUNKLINE_STATUS_FD" in command]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - other processes tell us nothing
            await asyncio.sleep(0.01)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_fifty_restarts_leave_no_descriptor_and_no_zombie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_S_MAX", 0.0)
    supervisor = Supervisor([script(READY + "sys.exit(3)")])
    (child,) = supervisor.children
    async with running(supervisor):
        await until(lambda: child.deaths_in_a_row >= 5)
        before = open_descriptors()
        await until(lambda: child.deaths_in_a_row >= 55)
        # Of the process of this moment there may be a pipe and a pidfd more or less.
        assert abs(open_descriptors() - before) <= 3
        assert len(mine(supervisor)) <= 2


async def test_what_a_dead_process_leaves_running_holds_no_descriptors_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An application's own subprocess may inherit the other end of the pipe that says "ready"."""
    monkeypatch.setattr(module, "RESTART_DELAY_S_MAX", 0.0)
    marker = tmp_path / "started before"
    code = (
        f"import os, subprocess, pathlib; marker = pathlib.Path({str(marker)!r})\n"
        "if not marker.exists():\n"
        "    marker.touch(); os.write(int(os.environ['TRUNKLINE_STATUS_FD']), b'ready\\n'); raise SystemExit(1)\n"
        "subprocess.Popen(['sleep', '4'], close_fds=False); raise SystemExit(1)\n"
    )
    supervisor = Supervisor([script(code)])
    (child,) = supervisor.children
    async with running(supervisor):
        await until(lambda: child.deaths_in_a_row >= 3)
        before = open_descriptors()
        await until(lambda: child.deaths_in_a_row >= 15)
        assert abs(open_descriptors() - before) <= 3


async def test_a_process_that_cannot_be_started_for_now_is_tried_again_and_the_others_serve_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_S_MAX", 0.05)
    supervisor = Supervisor([script(STAYS, role=Role.INTERFACE), script(STAYS)])
    interface, worker = supervisor.children
    async with running(supervisor) as task:
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        assert interface.process is not None
        assert worker.process is not None
        pids = interface.process.pid, worker.process.pid
        start = asyncio.create_subprocess_exec
        refused = 0

        async def refuse_twice(*command: Any, **options: Any) -> asyncio.subprocess.Process:
            nonlocal refused
            if refused < 2:
                refused += 1
                raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
            return await start(*command, **options)

        monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse_twice)
        os.kill(pids[1], signal.SIGKILL)
        await until(lambda: worker.alive and worker.is_ready and worker.process.pid != pids[1])
        assert refused == 2
        assert not task.done()
        assert interface.alive
        assert interface.process.pid == pids[0]


def names_itself(process_id: str, then: str) -> str:
    said = f"process {process_id}\\nready\\n"
    return f"import os, sys, time; os.write(int(os.environ['TRUNKLINE_STATUS_FD']), b'{said}'); {then}"


async def test_a_death_without_a_goodbye_is_told_and_another_end_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_S_MAX", 0.05)
    told: list[str] = []
    drains = "os.write(int(os.environ['TRUNKLINE_STATUS_FD']), b'draining\\n'); sys.exit(0)"
    specs = [script(names_itself("w1", "time.sleep(60)")), script(names_itself("w2", drains), number=2)]
    supervisor = Supervisor(specs, tell_death=told.append)
    first, second = supervisor.children
    async with running(supervisor):
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        assert first.process is not None
        pid = first.process.pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: told == ["w1"])
        deaths = second.deaths_in_a_row
        await until(lambda: second.deaths_in_a_row > deaths)
        assert told == ["w1"]
        await until(lambda: first.is_ready and first.process.pid != pid)
    assert told.count("w1") == 2  # such a script ends by the signal itself, and that is a death, too


async def test_an_end_with_status_0_in_the_midst_of_work_is_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """os._exit(0) in a view, say."""
    monkeypatch.setattr(module, "RESTART_DELAY_S_MAX", 0.05)
    told: list[str] = []
    supervisor = Supervisor([script(names_itself("w1", "sys.exit(0)"))], tell_death=told.append)
    async with running(supervisor):
        await until(lambda: len(told) >= 2)
    assert set(told) == {"w1"}


async def test_a_death_that_cannot_be_told_is_logged_and_replaced_as_any(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_S_MAX", 0.05)

    def fail(process_id: str) -> None:
        raise BrokerUnavailable("the broker is away")

    supervisor = Supervisor([script(names_itself("w1", "time.sleep(60)"))], tell_death=fail)
    (worker,) = supervisor.children
    async with running(supervisor):
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        assert worker.process is not None
        pid = worker.process.pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: "its death could not be told, its lease will: the broker is away" in caplog.text)
        await until(lambda: worker.alive and worker.is_ready and worker.process.pid != pid)


class Watch(SourceWatch):
    """Files change when the test says so."""

    def __init__(self) -> None:
        super().__init__(())
        self.change = asyncio.Event()

    async def changed(self) -> str:
        await self.change.wait()
        self.change.clear()
        return "application.py"


async def test_a_change_while_a_dead_worker_waits_to_be_replaced_starts_one_worker_not_two(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_S", 0.5)
    fixed = tmp_path / "fixed"
    code = READY + f"time.sleep(60 if os.path.exists({str(fixed)!r}) else 0); sys.exit(1)"
    watch = Watch()
    supervisor = Supervisor([script(code)], watch=watch)
    (child,) = supervisor.children
    async with running(supervisor):
        await until(lambda: supervisor.phase is module.Phase.RUNNING and child.deaths_in_a_row == 1)
        fixed.touch()
        watch.change.set()
        await until(lambda: supervisor.children[0] is not child and supervisor.children[0].is_ready)
        await asyncio.sleep(1.0)  # longer than the wait that was under way
        assert len(mine(supervisor)) == 1


async def test_stopping_while_a_process_waits_to_be_replaced_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_S", 60.0)
    monkeypatch.setattr(module, "RESTART_DELAY_S_MAX", 60.0)
    supervisor = Supervisor([script(READY + "sys.exit(1)")])
    async with running(supervisor):
        await until(lambda: supervisor.children[0].deaths_in_a_row == 1)


async def test_a_process_that_ends_before_it_is_ready_ends_the_command_with_its_status() -> None:
    supervisor = Supervisor([script(STAYS, role=Role.INTERFACE), script("raise SystemExit(7)")])
    async with running(supervisor, status=7) as task:
        await asyncio.wait((task,), timeout=PATIENCE_S)


@pytest.mark.parametrize("reload", [False, True])
async def test_one_that_was_ready_once_is_started_again_while_others_still_start(
    reload: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Even if the next one could not start."""
    monkeypatch.setattr(module, "RESTART_DELAY_S_MAX", 0.05)
    wait = (
        "import pathlib, time; here = pathlib.Path(" + repr(str(tmp_path)) + ")\n"
        "def wait(name):\n"
        "    while not (here / name).exists(): time.sleep(0.01)\n"
    )
    code = wait + (
        "if not (here / 'first').exists():\n"
        f"    (here / 'first').touch(); {READY}wait('others start'); sys.exit(1)\n"
        "if not (here / 'second').exists():\n"
        "    (here / 'second').touch(); 'TRUNKLINE_STATUS_FD'; raise SystemExit(1)\n"
        f"(here / 'third').touch(); {STAYS}"
    )
    other = wait + "(here / 'others start').touch(); wait('third'); " + STAYS
    supervisor = Supervisor([script(code), script(other, number=2)], watch=Watch() if reload else None)
    worker = supervisor.children[0]
    async with running(supervisor):
        await until(lambda: worker.keeper is not None and (worker.keeper.done() or (tmp_path / "third").exists()))
        assert worker.keeper is not None
        assert not worker.keeper.done()
        await until(lambda: worker.is_ready and supervisor.phase is module.Phase.RUNNING)


async def test_a_signal_during_the_start_ends_it_with_status_0() -> None:
    supervisor = Supervisor([script("import time; 'TRUNKLINE_STATUS_FD'; time.sleep(60)")])
    async with running(supervisor):
        await until(lambda: supervisor.children[0].alive)


class DumbBroker(EmbeddedBroker):
    """Runs and answers nobody."""

    def command_line(self) -> list[str]:
        return ["sleep", "60"]

    def answers(self) -> bool:
        return False


async def test_a_signal_while_the_broker_starts_is_obeyed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BROKER_START_TIMEOUT_S", 3600.0)
    broker = DumbBroker("sleep")
    try:
        supervisor = Supervisor([script(STAYS)], broker=broker)
        async with running(supervisor):
            await until(lambda: supervisor.broker is not None and supervisor._all_children()[-1].alive)
    finally:
        broker.remove()


async def test_a_frozen_process_is_killed_after_its_time_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_MARGIN_S", 0.3)
    supervisor = Supervisor([script(STAYS)], stop_timeout_s=0.0)
    (child,) = supervisor.children
    async with running(supervisor):
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        assert child.process is not None
        child.process.send_signal(signal.SIGSTOP)


async def test_a_second_signal_ends_what_does_not_obey_the_first() -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + STAYS
    supervisor = Supervisor([script(code)])
    async with running(supervisor) as task:
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: supervisor.phase is module.Phase.STOPPING)
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):  # less than its time to stop
            await asyncio.wait((task,))


class Gone(TerminalWatch):
    def is_gone(self) -> bool:
        return True


async def test_a_closed_terminal_that_is_announced_twice_lets_processes_end_by_themselves(tmp_path: Path) -> None:
    """By the shell and by the kernel, when it ends."""
    ended = tmp_path / "ended"
    code = (
        f"import pathlib, signal, sys, time\ndef end(*_): time.sleep(0.3); pathlib.Path({str(ended)!r}).touch(); "
        "sys.exit(0)\nsignal.signal(signal.SIGTERM, end)\n" + STAYS
    )
    supervisor = Supervisor([script(code)])
    async with running(supervisor) as task:
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        supervisor._hung_up(Gone())
        await until(lambda: supervisor.phase is module.Phase.STOPPING)
        supervisor._hung_up(Gone())
        await asyncio.wait((task,), timeout=PATIENCE_S)
    assert ended.exists()


# Replacing workers


async def roll(supervisor: Supervisor) -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    await asyncio.sleep(0)


def pids(supervisor: Supervisor) -> list[int]:
    return [child.process.pid for child in supervisor.children if child.process is not None]


async def test_workers_are_replaced_one_by_one_and_there_are_never_fewer(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # Each says when it is ready and when it is told to end, and takes its time for both.
    code = (
        "import os, signal, sys, time\n"
        f"def say(what): open({str(log)!r}, 'a').write(f'{{what}} {{os.getpid()}}\\n')\n"
        "def end(*_): say('told'); time.sleep(0.2); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "time.sleep(0.2); say('ready'); os.write(int(os.environ['TRUNKLINE_STATUS_FD']), b'ready\\n'); time.sleep(60)"
    )
    supervisor = Supervisor([script(STAYS, role=Role.INTERFACE), script(code), script(code, number=2)])
    async with running(supervisor):
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        interface, *before = pids(supervisor)
        await roll(supervisor)
        await until(lambda: not set(before) & set(pids(supervisor)) and len(mine(supervisor)) == 3)
        same, *after = pids(supervisor)
        assert same == interface
        said = [line.split() for line in log.read_text().splitlines()]
        assert said[2:] == [
            ["ready", str(after[0])],
            ["told", str(before[0])],
            ["ready", str(after[1])],
            ["told", str(before[1])],
        ]
        # What is there now is kept alive.
        os.kill(after[0], signal.SIGKILL)
        await until(lambda: supervisor.children[1].alive and pids(supervisor)[1] != after[0])
        await until(lambda: supervisor.children[1].is_ready)


async def test_a_new_worker_that_cannot_start_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    broken = tmp_path / "broken"
    code = f"import os, sys; os.path.exists({str(broken)!r}) and sys.exit(2); " + STAYS
    supervisor = Supervisor([script(code), script(code, number=2)])
    async with running(supervisor) as task:
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        before = pids(supervisor)
        broken.touch()
        await roll(supervisor)
        await until(lambda: "worker 1 is not replaced" in caplog.text)
        assert pids(supervisor) == before
        assert len(mine(supervisor)) == 2
        assert not task.done()
        broken.unlink()
        await roll(supervisor)
        await until(lambda: "all workers are replaced" in caplog.text)
        assert not set(before) & set(pids(supervisor))


async def test_a_new_worker_that_is_never_ready_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPLACEMENT_START_TIMEOUT_S", 0.5)
    waits = tmp_path / "waits"
    code = f"import os, time; os.path.exists({str(waits)!r}) and time.sleep(60); " + STAYS
    supervisor = Supervisor([script(code)])
    async with running(supervisor):
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        before = pids(supervisor)
        waits.touch()
        await roll(supervisor)
        await until(lambda: "worker 1 is not replaced" in caplog.text)
        assert "not ready after 0.5 s" in caplog.text
        assert pids(supervisor) == mine(supervisor) == before


async def test_a_signal_while_workers_are_replaced_replaces_them_once_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    supervisor = Supervisor([script(STAYS)])
    async with running(supervisor):
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        await roll(supervisor)
        await until(lambda: "replacing 1 worker, one after the other" in caplog.text)
        await roll(supervisor)
        await until(lambda: caplog.text.count("all workers are replaced") == 2)


async def test_a_change_of_the_source_while_workers_are_replaced_leaves_one_of_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    slow = tmp_path / "slow"
    code = f"import os, time; os.path.exists({str(slow)!r}) and time.sleep(0.5); " + STAYS
    watch = Watch()
    supervisor = Supervisor([script(code), script(code, number=2)], watch=watch)
    async with running(supervisor) as task:
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        before = pids(supervisor)
        slow.touch()
        await roll(supervisor)
        await until(lambda: len(mine(supervisor)) == 3)
        watch.change.set()
        await until(lambda: "all workers are replaced" in caplog.text or task.done())
        assert not task.done()
        await until(lambda: len(mine(supervisor)) == 2 and all(child.is_ready for child in supervisor.children))
        assert not set(before) & set(pids(supervisor))


async def test_a_change_of_the_source_that_cannot_start_processes_waits_for_the_next_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch()
    supervisor = Supervisor([script(STAYS)], watch=watch)
    async with running(supervisor) as task:
        await until(lambda: supervisor.phase is module.Phase.RUNNING)

        async def refuse(*command: Any, **options: Any) -> asyncio.subprocess.Process:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "create_subprocess_exec", refuse)
            watch.change.set()
            await until(lambda: "waiting for a file to change" in caplog.text and mine(supervisor) == [])
        assert not task.done()
        watch.change.set()
        await until(lambda: supervisor.children[0].alive and supervisor.children[0].is_ready)


async def test_a_process_that_could_not_reach_the_broker_is_tried_again_while_the_command_starts(
    tmp_path: Path,
) -> None:
    tried = tmp_path / "tried"
    code = (
        "import os, pathlib, time; fd = int(os.environ['TRUNKLINE_STATUS_FD'])\n"
        f"marker = pathlib.Path({str(tried)!r})\n"
        "if not marker.exists():\n"
        "    marker.touch(); os.write(fd, b'broker-away\\n'); raise SystemExit(1)\n"
        "os.write(fd, b'ready\\n'); time.sleep(60)"
    )
    supervisor = Supervisor([script(code)])
    async with running(supervisor):
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        assert supervisor.children[0].deaths_in_a_row == 1


# Hanging, and health


BEATS = (
    "import os, signal, sys, time; fd = int(os.environ['TRUNKLINE_STATUS_FD'])\n"
    "while True: os.write(fd, b'{}\\n'); time.sleep(0.05)"
)


async def test_what_says_nothing_for_too_long_is_ended_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor([script(STAYS), script(BEATS.format("ready"), number=2)], hang_timeout_s=4.0)
    silent, beating = supervisor.children
    async with running(supervisor):
        await until(lambda: silent.deaths_in_a_row >= 2)
        assert beating.deaths_in_a_row == 0
    assert "worker 1 was ended by SIGABRT; starting another" in caplog.text


async def test_ready_while_one_of_each_kind_is_also_before_all_have_started(tmp_path: Path) -> None:
    go = tmp_path / "go"
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)\n"
    interface, beats = BEATS.format("ready http://here"), BEATS.format("ready")
    supervisor = Supervisor(
        [
            script(interface, role=Role.INTERFACE),
            script(waits + interface, role=Role.INTERFACE, number=2),
            script(beats),
        ]
    )
    async with running(supervisor):
        await until(lambda: supervisor._readiness().status == 200)
        assert supervisor._readiness().content["processes"]["interface server 2"] == "starting"
        assert supervisor.phase is module.Phase.STARTING
        go.touch()
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        worker = supervisor.children[2]
        worker.send(signal.SIGKILL)
        await until(lambda: supervisor._readiness().status == 503)
        await until(lambda: supervisor._readiness().status == 200)
    assert supervisor._readiness().status == 503


async def test_the_supervisor_tells_for_each_process_why_it_is_not_ready() -> None:
    supervisor = Supervisor(
        [
            script(BEATS.format("ready http://here"), role=Role.INTERFACE),
            script("import time; " + READY.replace("ready", "ready\\nwaiting the broker is away") + "time.sleep(60)"),
        ]
    )
    assert supervisor._readiness().status == 503
    async with running(supervisor):
        await until(lambda: supervisor.phase is module.Phase.RUNNING)
        answer = supervisor._readiness()
        assert (answer.status, answer.content) == (
            503,
            {
                "ready": False,
                "processes": {"interface server 1": "ready", "worker 1": "the broker is away"},
            },
        )
        worker = supervisor.children[1]
        assert worker.explain_unready(worker.heard_at + 60) == "says nothing for 60 s"
        worker.send(signal.SIGKILL)
        await until(lambda: supervisor._readiness().content["processes"]["worker 1"] == "not running")
