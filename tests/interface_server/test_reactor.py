"""Sockets under the reactor: what is written in a loop turn leaves at its end, once, and without a registration."""

import asyncio
import socket
import struct

import pytest
import uvloop
from twisted.internet.protocol import Factory, Protocol

from interface_server.reactor import Reactor

LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.SelectorEventLoop}


class WatchedLoop:
    """The loop, but it counts who asks to be told when a socket can be written."""

    def __init__(self, loop):
        self.loop = loop
        self.add_writer_count = 0

    def __getattr__(self, name):
        return getattr(self.loop, name)

    def add_writer(self, *arguments):
        self.add_writer_count += 1
        self.loop.add_writer(*arguments)


class WatchedSocket:
    """A socket, but it counts who sends, and fails if it is told to."""

    def __init__(self, real):
        self.real = real
        self.send_count = 0
        self.failure = None

    def __getattr__(self, name):
        return getattr(self.real, name)

    def send(self, data):
        self.send_count += 1
        if self.failure is not None:
            raise self.failure
        return self.real.send(data)


class Server(Protocol):
    def connectionMade(self):
        self.factory.made.append(self)
        self.socket = self.transport.socket = WatchedSocket(self.transport.socket)
        self.read = []

    def dataReceived(self, data):
        self.read.append(data)
        if data == b"fault":
            raise RuntimeError("a fault of the protocol")

    def connectionLost(self, reason):
        self.factory.lost.append(self)
        if self.factory.lost_raises:
            raise RuntimeError("odd")

    def pauseProducing(self):
        self.factory.calls.append("pause")

    def resumeProducing(self):
        self.factory.calls.append("resume")

    def stopProducing(self):
        self.factory.calls.append("stop")


class Setting:
    """A listening reactor and clients of plain sockets."""

    def __init__(self, loop):
        self.loop = loop
        self.watched = WatchedLoop(loop)
        self.reactor = Reactor(self.watched)
        self.factory = Factory.forProtocol(Server)
        self.factory.noisy = False
        self.factory.made, self.factory.lost, self.factory.calls, self.factory.lost_raises = [], [], [], False
        self.listener = self.reactor.listenTCP(0, self.factory, interface="127.0.0.1")
        self.clients = []

    def close(self):
        for client in self.clients:
            client.close()
        self.listener.stopReading()
        self.listener.socket.close()
        for selectable in self.reactor.removeAll():
            if hasattr(selectable, "socket"):
                selectable.socket.close()

    async def connect(self):
        client = socket.socket()
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.clients.append(client)
        await self.loop.sock_connect(client, ("127.0.0.1", self.listener.getHost().port))
        await self.until(lambda: len(self.factory.made) == len(self.clients))
        return client, self.factory.made[-1]

    async def until(self, condition):
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0)

    async def read(self, client, count):
        data = b""
        async with asyncio.timeout(30):
            while len(data) < count:
                piece = await self.loop.sock_recv(client, 65536)
                assert piece, f"ended after {len(data)} bytes"
                data += piece
        return data


@pytest.fixture(params=LOOPS)
def run(request):
    """Run a coroutine function with a Setting on a loop of its own."""

    def run(main):
        loop = LOOPS[request.param]()
        setting = Setting(loop)
        try:
            loop.run_until_complete(main(setting))
        finally:
            setting.close()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

    return run


def test_writes_of_a_turn_leave_at_its_end_in_one_send_and_nobody_is_registered(run):
    async def main(setting):
        client, server = await setting.connect()
        for word in (b"one ", b"two ", b"three"):
            server.transport.write(word)
        assert server.socket.send_count == 0
        assert server.transport in setting.reactor.getWriters()
        assert await setting.read(client, 13) == b"one two three"
        assert server.socket.send_count == 1
        assert setting.watched.add_writer_count == 0
        assert server.transport not in setting.reactor.getWriters()

    run(main)


def test_a_socket_that_does_not_take_everything_is_registered_and_gets_it_in_order(run):
    async def main(setting):
        client, server = await setting.connect()
        server.transport.registerProducer(server, True)
        data = b"".join(b"%07d\n" % number for number in range(800_000))
        server.transport.write(data)
        await setting.until(lambda: setting.watched.add_writer_count)
        server.transport.write(b"the end")
        assert await setting.read(client, len(data) + 7) == data + b"the end"
        assert setting.factory.calls[0] == "pause"
        await setting.until(lambda: setting.factory.calls[-1] == "resume")
        await setting.until(lambda: server.transport not in setting.reactor.getWriters())
        server.transport.write(b"more")
        assert await setting.read(client, 4) == b"more"

    run(main)


def test_a_short_write_that_the_socket_takes_in_part(run):
    async def main(setting):
        client, server = await setting.connect()
        server.transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        expected = bytearray()
        number = 0
        while not setting.watched.add_writer_count:
            expected += (data := b"%07d\n" % number * 500)
            server.transport.write(data)
            number += 1
            await asyncio.sleep(0)
        server.transport.write(b"the end")
        expected += b"the end"
        assert await setting.read(client, len(expected)) == expected
        await setting.until(lambda: setting.reactor.getWriters() == [])

    run(main)


def test_what_is_read_and_how_it_ends(run, caplog):
    async def main(setting):
        clients = [await setting.connect() for _ in range(3)]
        for (client, _), word in zip(clients, (b"one", b"two", b"fault"), strict=True):
            await setting.loop.sock_sendall(client, word)
        (polite, first), (rude, second), (_, third) = clients
        await setting.until(lambda: setting.factory.lost == [third])
        await setting.until(lambda: first.read == [b"one"] and second.read == [b"two"])
        polite.close()
        await setting.until(lambda: setting.factory.lost == [third, first])
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        rude.close()
        await setting.until(lambda: setting.factory.lost == [third, first, second])

    run(main)
    assert "a fault of the protocol" in caplog.text


def test_what_a_producer_writes_when_it_is_resumed_leaves_too(run):
    async def main(setting):
        client, server = await setting.connect()
        server.resumeProducing = lambda: server.transport.write(b"again")
        server.transport.registerProducer(server, True)
        server.transport.write(b"x" * 100_000)
        assert await setting.read(client, 100_005) == b"x" * 100_000 + b"again"

    run(main)


def test_close_behind_what_is_written(run):
    async def main(setting):
        client, server = await setting.connect()
        server.transport.write(b"last words")
        server.transport.loseConnection()
        assert await setting.read(client, 10) == b"last words"
        assert await setting.loop.sock_recv(client, 1) == b""
        await setting.until(lambda: setting.factory.lost == [server])

    run(main)


def test_half_close_behind_what_is_written(run):
    async def main(setting):
        client, server = await setting.connect()
        server.transport.write(b"last words")
        server.transport.loseWriteConnection()
        assert await setting.read(client, 10) == b"last words"
        assert await setting.loop.sock_recv(client, 1) == b""
        assert setting.factory.lost == []

    run(main)


def test_a_socket_lost_before_its_turn_is_not_written_to(run):
    async def main(setting):
        _, server = await setting.connect()
        server.transport.write(b"never")
        server.transport.abortConnection()
        await setting.until(lambda: setting.factory.lost == [server])
        assert server.socket.send_count == 0
        assert setting.reactor.getWriters() == []

    run(main)


def test_a_fault_of_one_socket_does_not_keep_the_others_from_writing(run, caplog):
    async def main(setting):
        _, first = await setting.connect()
        client, second = await setting.connect()
        setting.factory.lost_raises = True
        first.socket.failure = OSError("gone")
        first.transport.write(b"nowhere")
        second.transport.write(b"here")
        assert await setting.read(client, 4) == b"here"
        assert setting.factory.lost == [first]
        setting.factory.lost_raises = False

    run(main)
    assert [record.levelname for record in caplog.records if record.name == "trunkline.interface"] == ["ERROR"]


def test_a_connection_that_ends_another_one_of_the_same_turn(run):
    async def main(setting):
        _, first = await setting.connect()
        _, second = await setting.connect()
        first.resumeProducing = second.transport.abortConnection
        first.transport.registerProducer(first, True)
        first.transport.write(b"x" * 100_000)
        second.transport.write(b"never")
        await setting.read(setting.clients[0], 100_000)
        await setting.until(lambda: setting.factory.lost == [second])

    run(main)
