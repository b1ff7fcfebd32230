"""What TLS transports give their protocols, and when. What clients see is in tests/system/test_tls.py."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from interface_server.settings import InterfaceSettings
from interface_server.tls import TURN_RECORDS_MAX, TlsContext, wrap_factory
from tests.certificates import Authority


class Taker(Protocol):
    """Takes data, and pauses at some of them."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.pauses_at = b""
        self.is_lost = False

    def dataReceived(self, data: bytes) -> None:
        self.taken.append(data)
        if data == self.pauses_at:
            self.transport.pauseProducing()

    def connectionLost(self, reason: Any = None) -> None:
        self.is_lost = True


class Tcp(StringTransport):
    """Closes when it is told to, as one does that has nothing to write."""

    connected = True

    def loseConnection(self) -> None:
        super().loseConnection()
        if self.connected:
            self.connected = False
            self.protocol.connectionLost(None)

    def abortConnection(self) -> None:
        """Its connectionLost comes in a later turn."""

    def loseWriteConnection(self) -> None:
        pass

    def unregisterProducer(self) -> None:
        """As of Twisted's TCP transports: there need not be one."""
        self.producer = None

    @property
    def is_read(self) -> bool:
        return self.connected and self.producerState == "producing"


class World:
    """A client, a TLS transport between a TCP one and a protocol; hands are shaken."""

    def __init__(self, authority: Authority) -> None:
        directory = authority.directory
        settings = InterfaceSettings(
            redis_url="redis://unused",
            ssl_certfile=str(directory / "server.pem"),
            ssl_keyfile=str(directory / "server.key"),
        )
        factory = wrap_factory(Factory.forProtocol(Taker), TlsContext(settings, alpn=()), Clock())
        self.tls: Any = factory.buildProtocol(None)  # type: ignore[arg-type]
        self.tcp = Tcp()
        self.tcp.protocol = self.tls
        self.tls.makeConnection(self.tcp)
        self.protocol: Taker = self.tls.wrappedProtocol
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=authority.path)
        self.client = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        while True:
            try:
                self.client.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.send()
                self.incoming.write(self.tcp.value())
                self.tcp.clear()
        self.send()

    def send(self) -> None:
        """What the client has written arrives in one read."""
        self.tls.dataReceived(self.outgoing.read())

    def pause_between_two(self) -> None:
        """b"1" and b"2" arrive at once; the protocol pauses at the first."""
        self.protocol.pauses_at = b"1"
        self.client.write(b"1")
        self.client.write(b"2")
        self.send()

    def leave(self) -> None:
        with contextlib.suppress(ssl.SSLWantReadError):
            self.client.unwrap()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    directory: Path = tmp_path_factory.mktemp("tls")
    authority = Authority(directory)
    authority.issue("server")
    return authority


@pytest.fixture
async def world(authority: Authority) -> World:
    return World(authority)


async def test_a_paused_protocol_gets_nothing_and_all_of_it_later(world: World) -> None:
    world.protocol.pauses_at = b"2"
    for data in (b"1", b"2", b"3", b"4"):
        world.client.write(data)
    world.leave()
    world.send()
    await asyncio.sleep(0)
    assert world.protocol.taken == [b"1", b"2"]
    assert not world.tcp.is_read
    assert world.tls.held_bytes() >= 2
    world.tls.resumeProducing()
    assert world.protocol.taken == [b"1", b"2"]  # not while it resumes
    await asyncio.sleep(0)
    assert world.protocol.taken == [b"1", b"2", b"3", b"4"]
    assert world.protocol.is_lost


async def test_a_protocol_that_pauses_again_meanwhile_stays_paused(world: World) -> None:
    world.pause_between_two()
    world.tls.resumeProducing()
    world.tls.pauseProducing()
    await asyncio.sleep(0)
    assert world.protocol.taken == [b"1"]
    assert not world.tcp.is_read
    world.tls.resumeProducing()
    await asyncio.sleep(0)
    assert world.protocol.taken == [b"1", b"2"]
    assert world.tcp.is_read


async def test_small_records_take_turns_with_the_others(world: World) -> None:
    count = 3 * TURN_RECORDS_MAX + 1
    for _ in range(count):
        world.client.write(b"x")
    world.send()
    for turn in (1, 2, 3):
        assert len(world.protocol.taken) == turn * TURN_RECORDS_MAX
        assert not world.tcp.is_read
        await asyncio.sleep(0)
    assert len(world.protocol.taken) == count
    assert world.tcp.is_read


async def test_what_is_held_is_not_less_than_what_came_and_was_not_taken(world: World) -> None:
    world.client.write(b"x" * 40_000)
    data = world.outgoing.read()
    world.tls.dataReceived(data[:30_000])  # the second record is not complete
    taken = sum(map(len, world.protocol.taken))
    assert 0 < taken < 30_000
    assert 30_000 - 1000 - taken < world.tls.held_bytes() < 20_000
    world.tls.dataReceived(data[30_000:])
    assert sum(map(len, world.protocol.taken)) == 40_000
    assert world.tls.held_bytes() < 5000


async def test_a_close_notify_that_was_held_when_our_side_has_ended(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.protocol.pauses_at = b"1"
    world.client.write(b"1")
    world.leave()
    world.send()
    world.tls.loseWriteConnection()
    world.tls.resumeProducing()
    await asyncio.sleep(0)
    assert world.protocol.is_lost
    assert not caplog.messages


async def test_a_client_that_has_left_is_not_waited_for_by_way_of_a_producer(world: World) -> None:
    """TCP asks the producer for more when it could write; what that writes is dropped, and nobody would close."""
    world.tls.registerProducer(world.protocol, True)
    assert world.tcp.producer is not None
    world.leave()
    world.send()
    assert world.tcp.producer is None


async def test_nothing_is_read_for_one_that_is_aborted(world: World) -> None:
    world.pause_between_two()
    world.tls.resumeProducing()
    world.tls.abortConnection()
    await asyncio.sleep(0)
    assert world.protocol.taken == [b"1"]
    assert not world.tcp.is_read
