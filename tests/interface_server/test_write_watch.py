"""Which clients count as not reading. That all kinds of sockets are watched: tests/system/test_rude_clients.py."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from twisted.internet.task import Clock

from interface_server.deadlines import Deadlines
from interface_server.transports import unsent_bytes
from interface_server.write_watch import WriteWatch

KIB = 1024


class Transport:
    """Holds so many bytes."""

    def __init__(self, handle: socket.socket | None = None) -> None:
        self.dataBuffer = b""
        self.offset = 0
        self._tempDataLen = 0
        self._handle = handle

    def hold(self, size: int) -> None:
        self._tempDataLen = size

    def getHandle(self) -> socket.socket | None:
        return self._handle


class World:
    def __init__(self, timeout_s: float = 120, transport: Transport | None = None) -> None:
        self.clock = Clock()
        self.transport = transport or Transport()
        self.stalled_count = 0
        self.watch = WriteWatch(
            self.transport,
            deadlines=Deadlines(call_later=self.clock.callLater, clock=self.clock.seconds),
            timeout_s=timeout_s,
            stalled=self._stalled,
        )

    def _stalled(self) -> None:
        self.stalled_count += 1

    def advance(self, seconds: float) -> None:
        for _ in range(int(seconds * 2)):
            self.clock.advance(0.5)


def test_a_client_that_takes_nothing_is_told_of_once() -> None:
    world = World()
    world.transport.hold(100 * KIB)
    world.watch.start()
    world.advance(119)
    assert world.stalled_count == 0
    world.advance(200)
    assert world.stalled_count == 1


@pytest.mark.parametrize(("step", "stalled_count"), [(16 * KIB, 0), (16 * KIB - 1, 1)])
def test_a_client_must_take_something_in_each_period(step: int, stalled_count: int) -> None:
    world = World()
    size = 200 * KIB
    world.transport.hold(size)
    world.watch.start()
    for _ in range(10):
        size -= step
        world.transport.hold(size)
        world.advance(120.5)
    assert world.stalled_count == stalled_count


def test_a_transport_that_was_emptied_begins_anew() -> None:
    world = World()
    world.transport.hold(100 * KIB)
    for _ in range(5):
        world.watch.start()
        world.advance(110)
        world.watch.stop()
        world.advance(200)
    assert world.stalled_count == 0


def test_what_is_written_meanwhile_buys_no_time() -> None:
    world = World()
    world.transport.hold(100 * KIB)
    for _ in range(13):
        world.watch.start()  # a ping was written
        world.advance(10)
    assert world.stalled_count == 1


def test_no_limit() -> None:
    world = World(timeout_s=0)
    world.transport.hold(100 * KIB)
    world.watch.start()
    world.advance(1000)
    assert world.stalled_count == 0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(listening.getsockname()))
        server, _ = listening.accept()
        stack.enter_context(server)
        server.setblocking(False)
        yield server, client


def test_what_the_kernel_holds_counts(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    transport = Transport(server)
    assert unsent_bytes(transport) == 0
    with contextlib.suppress(BlockingIOError):
        while True:
            server.send(bytes(64 * KIB))
    # What the client's kernel has, it acknowledges when it likes: 40 ms later, say, and another part behind a probe.
    before, after = -1, 0
    while before != after:
        transport.hold(0)
        before = unsent_bytes(transport)
        transport.hold(1000)
        with_ours = unsent_bytes(transport)
        transport.hold(0)
        after = unsent_bytes(transport)
    assert before > 64 * KIB
    assert with_ours == before + 1000
    # It reads, though less than what makes room for us.
    world = World(transport=transport)
    world.watch.start()
    before = unsent_bytes(transport)
    client.settimeout(5)
    while unsent_bytes(transport) > before - 32 * KIB:
        client.recv(4096)
    world.advance(121)
    assert world.stalled_count == 0
    # It reads no more. In the first period, seldom in another, there is what was still on its way.
    progress_max = unsent_bytes(transport) // (16 * KIB)
    periods = 0
    while not world.stalled_count:
        assert periods <= progress_max
        world.advance(121)
        periods += 1
    assert world.stalled_count == 1
