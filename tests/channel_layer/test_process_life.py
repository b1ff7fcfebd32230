"""Signals, beats and the line to the supervisor; what ends a process is in tests/system/."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from channel_layer import process_life
from channel_layer.errors import BrokerUnavailable
from channel_layer.process_life import INTERRUPTED, STATUS_VARIABLE, ProcessLife, StatusPipe, fail, leave, unless
from channel_layer.readiness import LifePhase

ALONE = StatusPipe({})


class Pipe:
    """Both ends of a status pipe."""

    def __init__(self) -> None:
        self.read_end, write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.environ = {STATUS_VARIABLE: str(write_end), "PATH": "/bin"}
        self.status = StatusPipe(self.environ)
        self.write_end = write_end

    def lines(self) -> list[str]:
        try:
            return os.read(self.read_end, 65536).decode().splitlines()
        except BlockingIOError:
            return []


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    os.close(pipe.read_end)
    os.close(pipe.write_end)


class StoppingLayer:
    """Its stop() ends when it is told that the others have heard."""

    def __init__(self) -> None:
        self.is_stopping = asyncio.Event()
        self.have_heard = asyncio.Event()

    async def stop(self) -> None:
        self.is_stopping.set()
        await self.have_heard.wait()


class FakeLayer:
    process_id = "w1"

    def __init__(self) -> None:
        self.broker_reachable = True
        self.proved_at: float | None = None
        self.probe_count = 0
        self.load = (0, 0)

    def probe(self) -> None:
        self.probe_count += 1
        if self.broker_reachable:
            self.proved_at = asyncio.get_running_loop().time()

    def set_load(self, load: int, room: int) -> None:
        self.load = (load, room)


def test_the_pipe_is_for_this_process_only(pipe: Pipe) -> None:
    assert pipe.environ == {"PATH": "/bin"}
    assert not os.get_inheritable(pipe.write_end)
    assert pipe.status.is_supervised
    assert not ALONE.is_supervised


def test_a_full_pipe_or_one_that_nobody_reads_is_not_waited_for() -> None:
    read_end, write_end = os.pipe()
    status = StatusPipe({STATUS_VARIABLE: str(write_end)})
    for _ in range(10_000):
        status.say(process_life.StatusWord.WAITING, "x" * 400)
    os.close(read_end)
    status.say(process_life.StatusWord.READY)
    os.close(write_end)


def test_a_failure_is_one_line_and_a_lost_broker_is_told(pipe: Pipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert fail("wrong", 2, pipe=pipe.status) == 2
    assert pipe.lines() == []
    assert fail(BrokerUnavailable("gone"), 1, pipe=pipe.status) == 1
    assert pipe.lines() == ["broker-away"]
    assert capsys.readouterr().err == "trunkline: wrong\ntrunkline: gone\n"


async def test_a_life(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_life, "BEAT_INTERVAL_S", 0.01)
    layer = FakeLayer()
    life = ProcessLife("worker", pipe=pipe.status)
    assert life.explain_unready() == "starting"
    life.serving(layer, "http://here", load=lambda: (3, 7))
    assert pipe.lines()[:2] == ["process w1", "ready http://here"]
    assert layer.load == (3, 7)
    await beats(life, 3)
    assert life.explain_unready() is None
    assert set(pipe.lines()) == {"ready http://here"}
    layer.broker_reachable = False
    await beats(life, 2)
    assert life.explain_unready() == "the broker does not answer"
    assert pipe.lines()[-1] == "waiting the broker does not answer"
    layer.broker_reachable = True
    life.draining()
    assert (life.phase, life.explain_unready()) == (LifePhase.DRAINING, "draining")
    probe_count = layer.probe_count
    await beats(life, 2)
    assert set(pipe.lines()) <= {"waiting the broker does not answer", "draining"}
    assert layer.probe_count == probe_count, "the layer may be gone"
    await life.close()
    count = life.beat_count
    await asyncio.sleep(0.05)
    assert life.beat_count == count


async def beats(life: ProcessLife, count: int) -> None:
    wanted = life.beat_count + count
    async with asyncio.timeout(30):
        while life.beat_count < wanted:  # noqa: ASYNC110 - nobody is told of a beat
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("is_supervised", "signals", "hurried", "at_once"),
    [
        (False, [signal.SIGTERM], False, False),
        (False, [signal.SIGINT], True, False),
        (False, [signal.SIGHUP], False, False),
        (False, [signal.SIGTERM, signal.SIGTERM], False, True),
        (False, [signal.SIGINT, signal.SIGINT], True, True),
        (True, [signal.SIGTERM, signal.SIGTERM], False, False),  # of systemd and of the supervisor
        (True, [signal.SIGTERM, signal.SIGINT], False, True),
        (False, [signal.SIGTERM, signal.SIGHUP], False, False),  # of systemd, with SendSIGHUP=
        (False, [signal.SIGHUP, signal.SIGHUP], False, False),  # of shell and kernel, when a terminal is closed
        (False, [signal.SIGHUP, signal.SIGTERM], False, True),
    ],
)
async def test_what_signals_mean(
    pipe: Pipe, is_supervised: bool, signals: list[Any], hurried: bool, at_once: bool
) -> None:
    life = ProcessLife("worker", pipe=pipe.status if is_supervised else ALONE)
    for number in signals:
        life.signalled(number)
    assert life.stop.is_set()
    assert (life.is_hurried, life.at_once.is_set()) == (hurried, at_once)
    assert life.drain_timeout_s(20.0) == (process_life.HURRIED_DRAIN_S if hurried else 20.0)
    assert life.drain_timeout_s(0.5) == 0.5


async def test_unless_gives_the_result_or_cancels_the_work() -> None:
    event = asyncio.Event()

    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await unless(event, work()) == 7
    cancelled = asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    waiting = asyncio.create_task(unless(event, endless()))
    await asyncio.sleep(0)
    event.set()
    assert await waiting is INTERRUPTED
    assert cancelled.is_set()
    assert await unless(event, work()) is INTERRUPTED  # not begun


async def test_an_error_of_interrupted_work_is_told_and_not_reported_as_one_that_nobody_looked_at(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))

    async def work(begun: asyncio.Event) -> None:
        try:
            begun.set()
            await asyncio.sleep(3600)
        finally:
            raise BrokerUnavailable("it was away, too")

    caplog.set_level("INFO", "trunkline.channel_layer")
    for how in ("by its event", "cancelled"):
        event, begun = asyncio.Event(), asyncio.Event()
        waiting = asyncio.create_task(unless(event, work(begun)))
        await begun.wait()
        if how == "cancelled":
            waiting.cancel()
        else:
            event.set()
        await asyncio.wait([waiting])
    del waiting
    async with asyncio.timeout(20):
        while caplog.text.count("it was away, too") < 2:  # noqa: ASYNC110 - a callback of a task that nobody has
            await asyncio.sleep(0)
    gc.collect()
    assert reported == []


async def test_a_layer_that_nobody_hurries_stops_in_its_own_time() -> None:
    layer, at_once = StoppingLayer(), asyncio.Event()
    leaving = asyncio.create_task(leave(layer, at_once))
    await layer.is_stopping.wait()
    layer.have_heard.set()
    assert await leaving


@pytest.mark.parametrize("is_stopping", [False, True], ids=["before", "while it stops"])
async def test_a_second_signal_limits_how_long_a_layer_stops(is_stopping: bool) -> None:
    layer, at_once = StoppingLayer(), asyncio.Event()
    if not is_stopping:
        at_once.set()
    leaving = asyncio.create_task(leave(layer, at_once))
    await layer.is_stopping.wait()
    at_once.set()
    async with asyncio.timeout(30):
        assert not await leaving
