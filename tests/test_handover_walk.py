"""One WebSocket on its way through many workers: both real halves of a hand-over, with a wire of memory between them.

The client counts; the application answers each message with its number, and stores checkpoints as hypothesis says.
Workers die at any point, with whatever is on the wire; stop and give the WebSocket away; come to nothing. Whatever
happens, a client whose application commits gets each answer once and in order, for as long as it is connected; no
message is lost; and no buffer grows beyond its bound.
"""

import asyncio
import contextlib
import itertools
import random
from collections import deque

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channel_layer.frames import build_event
from interface_server.client import Refusal
from interface_server.connections import Connections
from interface_server.settings import InterfaceSettings
from worker.events import ClientDisconnected
from worker.process import WorkerProcess
from worker.settings import WorkerSettings

WINDOW_BYTES = 128 * 1024
INTERFACE = "iinterface"


class Worker:
    """A real WorkerProcess on a layer that is a pair of queues."""

    def __init__(self, world, number):
        self.process_id = f"wworker{number}"
        self.broker_reachable = True
        self.world = world
        self.to_interface = deque()
        self.to_worker = deque()
        self.process = WorkerProcess(
            WorkerSettings(redis_url="redis://unused", application="unused:app", close_timeout_s=float("inf")),
            application=world.application,
            layer=self,
        )

    def link_send(self, peer, frame):
        self.to_interface.append(msgpack.unpackb(frame))
        return len(self.to_interface)

    def link_send_event(self, peer, connection, epoch, payload, behind):
        return self.link_send(peer, build_event(connection, epoch, payload))

    def link_is_congested(self, peer):
        return False


class World:
    """The interface server, its client, and workers as needed."""

    def __init__(self, *, checkpoint_each, commit, notify, handover="checkpoint", answers_last=False):
        """``answers_last``: the application stores its checkpoint in front of the answer."""
        self.process_id = INTERFACE
        self.broker_reachable = True
        self.checkpoint_each = checkpoint_each
        self.commit = commit
        self.notify = notify
        self.answers_last = answers_last
        self.now = 1000.0
        self.workers = []
        self.queue = deque()
        self.timers = []
        self.connections = Connections(
            self,
            InterfaceSettings(redis_url="redis://unused", window_bytes=WINDOW_BYTES, handover=handover),
            loop=asyncio.get_running_loop(),
            clock=lambda: self.now,
            call_later=self.call_later,
        )
        self.applications = []  # (event loop task of) each call, for the failures of applications
        self.failures = []
        # As a client
        self.log = []
        self.end = None
        self.is_paused = False
        self.sent_count = 0
        self.reading_paused = False
        self.connection = None

    # As a ProcessLayer

    def link_send(self, peer, frame):
        self.worker(peer).to_worker.append(msgpack.unpackb(frame))

    def link_is_congested(self, peer):
        return False

    def hold_inbox(self, held):
        raise AssertionError("nobody broadcasts")

    def forget_channels(self, channels):
        pass

    def push_opening(self, channel, opening, *, exempt=False):
        future = asyncio.get_running_loop().create_future()
        future.set_result(opening)
        self.queue.append(opening)
        return future

    async def remove_opening(self, channel, element):
        with contextlib.suppress(ValueError):
            self.queue.remove(element)
            return True
        return False

    def call_later(self, delay_s, callback, *arguments):
        class Handle:
            def cancel(_):
                pass

        return Handle()

    def worker(self, process_id):
        return next(worker for worker in self.workers if worker.process_id == process_id)

    # As a client.Client

    def application_event(self, event):
        if event["type"] == "websocket.accept":
            self.connection.accept_broadcasts()
        self.log.append(event)

    def application_receiving(self):
        raise AssertionError

    def application_ended(self, outcome):
        self.end = outcome

    def refused(self, refusal):
        self.end = refusal

    def pause_reading(self):
        self.reading_paused = True

    def resume_reading(self):
        self.reading_paused = False

    def buffered_bytes(self):
        return 0

    # The application

    async def application(self, scope, receive, send):
        extension = scope["extensions"]["websocket.handover"]
        number, since = extension.get("state", 0), 0
        flags = {"commit": self.commit, "notify": self.notify}
        try:
            assert await receive() == {"type": "websocket.connect"}
            await send({"type": "websocket.accept"})
            if "state" not in extension:
                await send({"type": "websocket.handover.state", "state": 0, **flags})
            while True:
                event = await receive()
                if event["type"] == "websocket.handover.request":
                    await send({"type": "websocket.handover.state", "state": number, **flags})
                    since = 0
                    continue
                assert event["type"] == "websocket.receive", event
                heard, _, rest = event["text"].partition(" ")
                assert int(heard) == number + 1, f"message {heard} behind {number}"
                number += 1
                answer = {"type": "websocket.send", "text": f"{number} {rest}"}
                if not self.answers_last:
                    await send(answer)
                since += 1
                if since >= self.checkpoint_each:
                    since = 0
                    await send({"type": "websocket.handover.state", "state": number, **flags})
                if self.answers_last:
                    await send(answer)
        except AssertionError as error:
            self.failures.append(error)
        except ClientDisconnected:
            pass

    # What happens

    async def turn(self):
        for _ in range(4):
            await asyncio.sleep(0)

    def open(self):
        self.connection = self.connections.open(
            self,
            protocol="websocket",
            scope={"type": "websocket", "headers": []},
            first_event={"type": "websocket.connect"},
        )

    async def client_sends(self, size):
        if self.reading_paused or self.end is not None:
            return
        self.sent_count += 1
        text = f"{self.sent_count} " + "x" * size
        self.connection.send_event({"type": "websocket.receive", "text": text})
        await self.turn()

    def take(self):
        """A worker takes what waits."""
        if self.queue:
            worker = Worker(self, len(self.workers))
            self.workers.append(worker)
            taken = list(self.queue)
            self.queue.clear()
            worker.process._open_all("websocket", taken)

    async def move_frames(self, count, *, to_worker):
        """So many frames arrive, from or at any worker that is not dead."""
        for worker in self.workers:
            frames = worker.to_worker if to_worker else worker.to_interface
            for _ in range(min(count, len(frames))):
                frame = frames.popleft()
                if to_worker:
                    worker.process.frame_received(INTERFACE, frame)
                    await self.turn()
                else:
                    self.connections.frame_received(worker.process_id, frame)
        await self.turn()

    async def crash(self):
        """The owner dies, with what is on its wire."""
        peer = self.connection.peer
        if peer is None:
            return
        worker = self.worker(peer)
        worker.to_worker.clear()
        worker.to_interface.clear()
        self.connections.peer_ended(peer, "killed")
        worker.process.peer_ended(INTERFACE, "reset")
        await self.turn()
        worker.to_interface.clear()
        assert worker.process.instances() == []
        self.now += 61  # crashes in a row are another test

    async def stop(self):
        """The owner stops."""
        peer = self.connection.peer
        if peer is not None:
            process = self.worker(peer).process
            for instance in process.instances():
                instance.begin_move(process._move_settled)
            await self.turn()

    async def settle(self):
        """Everything arrives, until nothing is under way."""
        for _ in range(200):
            await self.turn()
            if self.is_paused:
                self.is_paused = False
                self.connection.resume_delivery()
            self.take()
            if not any(worker.to_worker or worker.to_interface for worker in self.workers) and not self.queue:
                return
            await self.move_frames(50, to_worker=True)
            await self.move_frames(50, to_worker=False)
        raise AssertionError("it does not come to rest")

    def check(self):
        assert self.failures == []
        handover = self.connection._handover
        assert sum(worker.process.statistics().unreadable_count for worker in self.workers) == 0
        if handover is not None:
            largest = 70_100
            assert handover.held_bytes <= WINDOW_BYTES / 2
            assert handover.retained_bytes <= 2 * WINDOW_BYTES + 64 * 1024 + 2 * largest
        queued = sum(item[2] for item in self.connection._queue or ())
        assert queued <= WINDOW_BYTES + 70_100
        assert self.connection._outgoing.waiting_bytes <= 2 * WINDOW_BYTES + 64 * 1024 + 2 * 70_100

    def answers(self):
        return [int(event["text"].partition(" ")[0]) for event in self.log if event["type"] == "websocket.send"]


STEPS = st.one_of(
    st.tuples(st.just("send"), st.sampled_from([0, 10, 1000, 20_000, 70_000])),
    st.tuples(st.just("send"), st.sampled_from([0, 10, 1000, 20_000, 70_000])),
    st.tuples(st.just("to worker"), st.integers(1, 6)),
    st.tuples(st.just("to interface"), st.integers(1, 6)),
    st.tuples(st.just("settle"), st.none()),
    st.tuples(st.just("take"), st.none()),
    st.tuples(st.just("crash"), st.none()),
    st.tuples(st.just("stop"), st.none()),
    st.tuples(st.just("pause"), st.booleans()),
)


async def walk(world, steps):
    world.open()
    if len(steps) % 8:
        await world.settle()  # accepted, with a checkpoint; else the walk begins at the very beginning
    for step, value in steps:
        if world.end is not None:
            break
        if step == "send":
            if world.log:  # accepted
                await world.client_sends(value)
        elif step == "take":
            world.take()
        elif step == "settle":
            await world.settle()
        elif step == "crash":
            await world.crash()
        elif step == "stop":
            await world.stop()
        elif step == "pause":
            if value != world.is_paused:
                world.is_paused = value
                if value:
                    world.connection.pause_delivery()
                else:
                    world.connection.resume_delivery()
        else:
            await world.move_frames(value, to_worker=step == "to worker")
        await world.turn()
        world.check()
    await world.settle()
    world.check()


async def over(world):
    """Cancel what still runs, so that no example leaves tasks behind."""
    for worker in world.workers:
        worker.process.peer_ended(INTERFACE, "reset")
    await world.turn()
    world.connections.close()


async def run_walk(world, steps):
    try:
        await walk(world, steps)
        is_open = world.end is None and bool(world.log)
        if is_open:
            await world.client_sends(1)
            await world.settle()
        assert world.end in (None, Refusal.WORKER_LOST)
        return is_open
    finally:
        await over(world)


async def walk_with_commit(steps, *, checkpoint_each, notify):
    world = World(checkpoint_each=checkpoint_each, commit=True, notify=notify)
    is_open = await run_walk(world, steps)
    answers = world.answers()
    assert answers == list(range(1, len(answers) + 1))
    if is_open:
        # What the next checkpoint would cover is all that may be missing.
        assert world.sent_count - len(answers) < checkpoint_each
    return world


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(STEPS, min_size=5, max_size=120),
    checkpoint_each=st.sampled_from([1, 1, 2, 5, 1000]),
    notify=st.booleans(),
)
def test_with_commit_each_answer_arrives_once_and_in_order(steps, checkpoint_each, notify):
    asyncio.run(walk_with_commit(steps, checkpoint_each=checkpoint_each, notify=notify))


def long_walk(generator, *, without=()):
    names = ["send"] * 6 + ["to worker"] * 3 + ["to interface"] * 3 + ["settle", "take", "crash", "stop", "pause"]
    steps = []
    for _ in range(400):
        name = generator.choice([name for name in names if name not in without])
        value = None
        if name == "send":
            value = generator.choice([0, 10, 1000, 20_000, 70_000])
        elif name.startswith("to "):
            value = generator.randint(1, 6)
        elif name == "pause":
            value = generator.random() < 0.5
        steps.append((name, value))
    return steps


@pytest.mark.parametrize("seed", range(40))
def test_long_walks_with_commit(seed):
    generator = random.Random(seed)
    steps = long_walk(generator)
    checkpoint_each = generator.choice([1, 1, 2, 5])
    world = asyncio.run(walk_with_commit(steps, checkpoint_each=checkpoint_each, notify=generator.random() < 0.5))
    if checkpoint_each == 1 and world.end is None:
        assert world.connections.statistics().moves.moved > 3
        assert len(world.answers()) > 50


@pytest.mark.parametrize("answers_last", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_long_walks_of_workers_that_stop_but_never_die(seed, answers_last):
    """Without a commit, too, nothing is lost and nothing comes twice."""

    async def example():
        generator = random.Random(seed)
        world = World(
            checkpoint_each=generator.choice([1, 1, 2, 5]),
            commit=answers_last and generator.random() < 0.5,
            notify=generator.random() < 0.5,
            answers_last=answers_last,
        )
        assert await run_walk(world, long_walk(generator, without=("crash",)))
        answers = world.answers()
        assert answers == list(range(1, len(answers) + 1))
        # With commit the last ones wait for a checkpoint.
        assert world.sent_count - len(answers) <= world.commit * world.checkpoint_each

    asyncio.run(example())


@pytest.mark.parametrize("seed", range(20))
def test_long_walks_without_commit_lose_nothing(seed):
    """What was sent since the last checkpoint may come again, in order, and never more than that."""

    async def example():
        generator = random.Random(seed)
        checkpoint_each = generator.choice([1, 2, 5])
        world = World(checkpoint_each=checkpoint_each, commit=False, notify=False)
        is_open = await run_walk(world, long_walk(generator))
        answers = world.answers()
        assert not answers or answers[0] == 1
        for before, after in itertools.pairwise(answers):
            assert before - checkpoint_each < after <= before + 1
        if is_open:
            assert answers[-1] == world.sent_count

    asyncio.run(example())
