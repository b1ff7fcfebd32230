"""A protocol of somebody's own: its connections between group, application and socket."""

import asyncio
import socket

import pytest
from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from channel_layer.codec import decode_event
from channel_layer.frames import FrameKind, build_event
from channel_layer.openings import decode_opening
from interface_server.client import Refusal
from interface_server.deadlines import Deadlines
from interface_server.own_protocol import OwnProtocol, OwnServer, serve
from interface_server.settings import InterfaceSettings
from tests.interface_server.test_connections import WORKER, Bench, FakeLayer, check_books, number_of, text, turn


@pytest.fixture
async def bench():
    bench = Bench()
    yield bench
    check_books(bench)


async def opened(bench, protocol="tcp"):
    client = await bench.owned(protocol)
    client.connection.accept_broadcasts()
    return client


def sent_to_the_application(bench):
    return [decode_event(frame[3]) for _, frame in bench.take_sent() if frame[0] in (FrameKind.EVENT, FrameKind.LAST)]


async def test_openings_go_to_a_channel_of_the_protocol(bench):
    bench.open("tcp", {"type": "tcp.connect"})
    ((_, channel, encoded, _),) = bench.open_calls("push")
    assert channel == "tcp.connect"
    opening = decode_opening(encoded)
    assert opening.scope["type"] == "tcp"
    assert decode_event(opening.first_event) == {"type": "tcp.connect"}
    statistics = bench.connections.statistics()
    assert (statistics.http_open, statistics.websocket_open, statistics.own_open) == (0, 0, 1)


async def test_events_of_the_application_go_to_the_socket(bench):
    client = await opened(bench)
    bench.frame(build_event(number_of(client), 1, b"\x81\xa4type\xa8tcp.data"))
    assert client.log == [{"type": "tcp.data"}]


async def test_messages_of_groups_go_to_the_socket_or_to_the_application_by_their_type(bench):
    own, other, web = await opened(bench), await opened(bench, "irc"), await bench.accepted()
    bench.take_sent()
    bench.group_send({"type": "tcp.data", "n": 1}, own)
    bench.group_send(text("hello"), own, other, web)
    bench.group_send({"type": "tcp.data", "n": 2}, own, other)
    bench.group_send({"type": "chat.roll_call"}, own, web)
    await turn()
    assert own.log == [{"type": "tcp.data", "n": 1}, {"type": "tcp.data", "n": 2}]
    assert other.log == []
    assert web.log == [b"hello"]
    frames = [(frame[1], decode_event(frame[3])["type"]) for _, frame in bench.take_sent()]
    assert frames == [
        (number_of(own), "websocket.send"),
        (number_of(other), "websocket.send"),
        (number_of(other), "tcp.data"),
        (number_of(own), "chat.roll_call"),
        (number_of(web), "chat.roll_call"),
    ]
    assert bench.connections.statistics().dropped == {}


async def test_a_stop_ends_the_connection_on_both_sides(bench):
    client = await opened(bench)
    bench.connections.stop()
    await bench.connections.drain(0)
    assert client.log == [Refusal.STOPPING]
    assert sent_to_the_application(bench) == [{"type": "tcp.disconnect"}]
    assert bench.connections.open_count == 0


async def test_a_worker_that_dies_refuses_the_client(bench):
    client = await opened(bench)
    bench.connections.peer_ended(WORKER, "killed")
    assert client.log == [Refusal.WORKER_LOST]


@pytest.mark.parametrize("name", ["http", "websocket", "lifespan", "channel", "", "TCP", "t.c.p", "tcp!"])
def test_scope_types_that_cannot_be_ones_own(name):
    protocol = type("Bad", (OwnProtocol,), {"scope_type": name})
    with pytest.raises(ValueError, match="scope_type is"):
        serve(protocol, InterfaceSettings(redis_url="redis://unused"))


def test_tls_is_refused_rather_than_forgotten():
    protocol = type("Good", (OwnProtocol,), {"scope_type": "tcp"})
    with pytest.raises(ValueError, match="does not speak TLS"):
        serve(protocol, InterfaceSettings(redis_url="redis://unused", ssl_certfile="/some.pem"))


# The server and its sockets


class Lines(OwnProtocol):
    scope_type = "tcp"

    def data_received(self, data):
        self.socket.send_event({"type": "tcp.line", "text": data.decode()})


class Transport(StringTransport):
    """Holds so many bytes, and remembers its end."""

    dataBuffer, offset, _tempDataLen = b"", 0, 0
    aborted_count = 0

    def setTcpNoDelay(self, enabled):
        pass

    def setTcpKeepAlive(self, enabled):
        pass

    def getHandle(self):
        return None

    def abortConnection(self):
        self.aborted_count += 1


class Layer(FakeLayer):
    process_id = "itest"

    async def stop(self):
        pass


@pytest.fixture
async def server():
    loop = asyncio.get_running_loop()
    reactor = AsyncioSelectorReactor(loop)
    server = OwnServer(
        Lines, InterfaceSettings(redis_url="redis://unused"), layer=Layer(), loop=loop, reactor=reactor
    )
    yield server
    await server.stop(asyncio.Event(), drain_timeout_s=0)
    reactor.removeAll()


def joined(server):
    client, transport = server.buildProtocol(None), Transport()
    client.makeConnection(transport)
    return client, transport


async def test_a_client_that_reads_nothing_is_dropped(server):
    clock = Clock()
    server.deadlines = Deadlines(call_later=clock.callLater, clock=clock.seconds)
    clients = [joined(server) for _ in range(4)]
    for client, transport in clients:
        transport._tempDataLen = 100_000
        client.pauseProducing()
    (_, stuck), (reads, of_reader), (closed, of_closed), (gone, of_gone) = clients
    reads.resumeProducing()
    closed.close()  # from here on it has its 5 s
    gone.connectionLost()
    clock.pump([0.5] * 238)
    assert stuck.aborted_count == 0
    clock.pump([0.5] * 4)
    assert [transport.aborted_count for transport in (stuck, of_reader, of_closed, of_gone)] == [1, 0, 0, 0]
    assert server.connections.open_count == 1
    for client, _ in clients[:3]:
        client.connectionLost()


async def test_a_stop_serves_those_whom_the_kernel_has_accepted(server):
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
        listening.setblocking(False)
        server.listen(listening)
        client.connect(listening.getsockname())
        client.setblocking(False)
        await server.stop(asyncio.Event(), drain_timeout_s=0)
        async with asyncio.timeout(30):
            assert await asyncio.get_running_loop().sock_recv(client, 1) == b""  # closed, not reset


async def test_the_layer_asks_which_openings_are_held(server):
    assert server._layer.openings_held == server.connections.openings_held
