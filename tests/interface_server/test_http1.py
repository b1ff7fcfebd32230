"""The first part feeds bytes to a protocol on a transport of memory; the second uses real sockets and a reactor."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import h11
import pytest
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from channel_layer.frames import Outcome
from channel_layer.turns import Turns
from interface_server.access_log import AccessLog
from interface_server.client import Refusal
from interface_server.deadlines import Deadlines
from interface_server.end_watch import EndWatch
from interface_server.http1 import Phase
from interface_server.http_factory import HttpFactory
from interface_server.protocol.chunked_body import TURN_CHUNKS_MAX
from interface_server.protocol.server_headers import ServerHeaders
from interface_server.settings import InterfaceSettings

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class Transport(StringTransport):
    """Remembers what was done to it. Twisted's would report a full buffer by itself; here the test does."""

    def __init__(self, *, peer: Any = None, host: Any = None) -> None:
        super().__init__(hostAddress=host, peerAddress=peer)
        self.no_delay = False
        self.write_count = 0
        self.calls: list[str] = []  # "end writing", "close", "abort"
        self.dataBuffer = b""
        self.offset = 0
        self._tempDataLen = 0

    def write(self, data: bytes) -> None:
        assert "end writing" not in self.calls
        assert "close" not in self.calls
        self.write_count += 1
        super().write(data)

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def setTcpNoDelay(self, enabled: bool) -> None:
        self.no_delay = enabled

    def getHandle(self) -> None:
        return None

    def loseWriteConnection(self) -> None:
        assert self.producer is None, "Twisted would wait for the producer"
        self.calls.append("end writing")

    def loseConnection(self) -> None:
        assert self.producer is None, "Twisted would wait for the producer"
        self.calls.append("close")
        self.disconnecting = True

    def abortConnection(self) -> None:
        self.calls.append("abort")
        self.disconnecting = self.disconnected = True

    def take(self) -> bytes:
        data: bytes = self.value()
        self.clear()
        self.write_count = 0
        return data


class FakeConnection:
    """Stands for client_connection.ClientConnection."""

    def __init__(self, client: Any, scope: dict[str, Any], first_event: Any, tell_receiving: bool) -> None:
        self.number = 1
        self.reply_channel = "interface.test!1"
        self.client = client
        self.scope = scope
        self.tell_receiving = tell_receiving
        self.first_event = first_event
        self.events: list[dict[str, Any]] = [] if first_event is None else [first_event]
        self.calls: list[str] = []
        self.accepts_groups = False
        self.last_event: dict[str, Any] | None = None
        self.pause_after: int | None = None  # bytes

    @property
    def body(self) -> bytes:
        assert all(event["more_body"] for event in self.events[:-1])
        return b"".join(event["body"] for event in self.events)

    @property
    def is_complete(self) -> bool:
        return bool(self.events) and not self.events[-1]["more_body"]

    def send_event(self, event: dict[str, Any]) -> None:
        assert self.last_event is None
        assert event["type"] == "http.request"
        self.events.append(event)
        if self.pause_after is not None and len(self.body) >= self.pause_after:
            self.pause_after = None
            self.client.pause_reading()

    def client_gone(self, event: dict[str, Any]) -> None:
        self._ended("gone", event)

    def finished(self, event: dict[str, Any] | None = None) -> None:
        self._ended("finished", event)

    def _ended(self, call: str, event: Any) -> None:
        if self.last_event is None:  # the first of these calls counts, as in ClientConnection
            self.calls.append(call)
            self.last_event = event

    def pause_delivery(self) -> None:
        self.calls.append("pause")

    def resume_delivery(self) -> None:
        self.calls.append("resume")

    def accept_broadcasts(self) -> None:
        self.accepts_groups = True

    # What an application does

    def respond(
        self, body: bytes = b"ok", *headers: tuple[bytes, bytes], status: int = 200, more: bool = False
    ) -> None:
        self.client.application_event(
            {"type": "http.response.start", "status": status, "headers": [list(header) for header in headers]}
        )
        self.send(body, more=more)

    def send(self, body: bytes, *, more: bool = False) -> None:
        self.client.application_event({"type": "http.response.body", "body": body, "more_body": more})


class FakeConnections:
    def __init__(self, on_open: Callable[[FakeConnection], None] | None = None) -> None:
        self.opened: list[FakeConnection] = []
        self.on_open = on_open

    @property
    def last(self) -> FakeConnection:
        return self.opened[-1]

    def open(
        self, client: Any, *, protocol: str, scope: Any, first_event: Any, tell_receiving: bool = False
    ) -> FakeConnection:
        assert protocol == "http"
        connection = FakeConnection(client, scope, first_event, tell_receiving)
        self.opened.append(connection)
        if self.on_open is not None:
            self.on_open(connection)
        return connection


class FakeWebSocket:
    def __init__(self, head: Any, peer: Any, transport: Any) -> None:
        self.head, self.peer, self.transport = head, peer, transport
        self.calls: list[Any] = []
        self.has_unread = False
        self.read_over: Callable[[], None] | None = None  # it has something to read first

    def data_received(self, data: bytes) -> None:
        self.calls.append(data)

    def read_ended(self, over: Callable[[], None]) -> None:
        if self.has_unread:
            self.read_over = over
        else:
            over()

    def connection_lost(self) -> None:
        self.calls.append("lost")

    def pause_producing(self) -> None:
        self.calls.append("pause")

    def resume_producing(self) -> None:
        self.calls.append("resume")


class FakeWebSockets:
    def __init__(self) -> None:
        self.upgraded: list[FakeWebSocket] = []

    def upgrade(self, head: Any, *, peer: Any, transport: Any) -> FakeWebSocket:
        self.upgraded.append(FakeWebSocket(head, peer, transport))
        return self.upgraded[-1]


def build_factory(
    connections: Any, deadlines: Deadlines, *, end_watch: EndWatch | None = None, **changes: Any
) -> HttpFactory:
    changes.setdefault("server_header", False)
    changes.setdefault("date_header", False)
    settings = InterfaceSettings(redis_url="redis://nowhere.invalid", **changes)
    return HttpFactory(
        settings=settings,
        connections=connections,
        websockets=FakeWebSockets(),  # type: ignore[arg-type]
        access_log=AccessLog(),
        deadlines=deadlines,
        server_headers=ServerHeaders(
            date=settings.date_header, server=settings.server_header, extra=settings.extra_headers, clock=lambda: 0.0
        ),
        end_watch=end_watch,
        clock=lambda: 0.0,
    )


class World:
    """One factory, one socket."""

    def __init__(self, *, transport: Transport | None = None, **changes: Any) -> None:
        self.clock = Clock()
        self.connections = FakeConnections()
        self.deadlines = Deadlines(call_later=self.clock.callLater, clock=self.clock.seconds)
        self.factory = build_factory(self.connections, self.deadlines, **changes)
        self.turns: list[Callable[[], None]] = []  # what waits for the next turn of the loop
        self.factory.turns = Turns(self.turns.append)
        self.transport = Transport() if transport is None else transport
        self.protocol = self.factory.buildProtocol(None)
        self.protocol.makeConnection(self.transport)

    @property
    def websockets(self) -> Any:
        return self.factory.websockets

    @property
    def last(self) -> FakeConnection:
        return self.connections.last

    def feed(self, *data: bytes) -> None:
        for piece in data:
            self.protocol.dataReceived(piece)

    def take(self) -> bytes:
        return self.transport.take()

    @property
    def is_paused(self) -> bool:
        return bool(self.transport.producerState == "paused")

    @property
    def calls(self) -> list[str]:
        return self.transport.calls

    def advance(self, seconds: float) -> None:
        for _ in range(int(seconds * 4)):
            self.clock.advance(0.25)

    def run_turns(self) -> None:
        while self.turns:
            self.turns.pop(0)()

    def lose(self) -> None:
        self.protocol.connectionLost(Failure(ConnectionDone()))


def post(body_bytes: int, *headers: bytes) -> bytes:
    return b"\r\n".join((b"POST /p HTTP/1.1", b"Host: a", b"Content-Length: %d" % body_bytes, *headers, b"", b""))


# Requests and responses


def test_a_request_and_its_response() -> None:
    world = World()
    assert world.transport.no_delay
    world.feed(b"GET /a%20b?c HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n")
    scope = world.last.scope
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == ("/a b", b"/a%20b", b"c")
    assert scope["client"] == ("192.168.1.1", 54321)
    assert scope["server"] == ("10.0.0.1", 12345)
    assert world.last.events == [{"type": "http.request", "body": b"", "more_body": False}]
    world.last.respond()
    assert world.transport.write_count == 1
    assert world.take() == OK
    assert world.last.calls == ["finished"]
    assert world.last.last_event == {"type": "http.disconnect"}
    world.feed(GET)
    world.last.respond()
    assert world.take() == OK
    assert len(world.connections.opened) == 2
    assert world.calls == []


def test_byte_by_byte() -> None:
    world = World()
    data = post(5) + b"hello" + GET
    world.feed(*(data[index : index + 1] for index in range(len(data))))
    assert len(world.connections.opened) == 1
    assert world.last.body == b"hello"
    assert world.last.is_complete
    world.last.respond()
    assert world.take() == OK
    assert len(world.connections.opened) == 2


def test_a_streamed_response() -> None:
    world = World()
    world.feed(GET)
    world.last.client.application_event({"type": "http.response.start", "status": 200, "headers": []})
    assert world.last.accepts_groups
    assert world.take() == b""
    world.last.send(b"one", more=True)
    world.last.send(b"two", more=True)
    world.last.send(b"")
    assert world.take() == (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
    assert world.last.calls == ["finished"]


def test_groups_are_not_accepted_into_a_response_of_known_length() -> None:
    world = World()
    world.feed(GET)
    world.last.respond(b"o", (b"content-length", b"2"), more=True)
    assert not world.last.accepts_groups


def test_a_broadcast_means_nothing_here() -> None:
    world = World()
    world.feed(GET)
    world.last.client.send_broadcast(None)
    world.last.respond(b"", more=True)
    world.last.client.application_event({"type": "http.response.body", "body": "text", "more_body": True})
    world.last.send(b"")
    assert world.factory.statistics().dropped_total == 2


def test_http_1_0_closes() -> None:
    world = World()
    world.feed(b"GET / HTTP/1.0\r\n\r\n")
    world.last.respond()
    assert b"connection: close\r\n" in world.take()
    assert world.calls == ["close"]


def test_our_headers() -> None:
    world = World(server_header=True, date_header=True, extra_headers=((b"x-node", b"7"),))
    world.feed(GET)
    world.last.respond()
    assert b"date: Thu, 01 Jan 1970 00:00:00 GMT\r\nserver: trunkline\r\nx-node: 7\r\n" in world.take()
    world.feed(b"rubbish\r\n\r\n")
    assert b"server: trunkline\r\n" in world.take()


def test_root_path_and_proxy_headers() -> None:
    world = World(
        root_path="/api",
        transport=Transport(peer=IPv4Address("TCP", "127.0.0.1", 1), host=IPv4Address("TCP", "b", 2)),
    )
    world.feed(b"GET /x HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\n\r\n")
    scope = world.last.scope
    assert (scope["path"], scope["client"], scope["scheme"]) == ("/api/x", ("1.2.3.4", 0), "https")


@pytest.mark.parametrize(("changes", "peer"), [({}, "192.0.2.1"), ({"proxy_headers": False}, "127.0.0.1")])
def test_proxy_headers_of_anybody_are_not_believed(changes: dict[str, Any], peer: str) -> None:
    world = World(transport=Transport(peer=IPv4Address("TCP", peer, 1)), **changes)
    world.feed(b"GET /x HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\n\r\n")
    assert (world.last.scope["client"], world.last.scope["scheme"]) == ((peer, 1), "http")


def test_a_unix_socket() -> None:
    world = World(transport=Transport(peer=UNIXAddress(b""), host=UNIXAddress(b"/run/app.sock")))
    world.feed(GET)
    assert world.last.scope["client"] is None
    assert world.last.scope["server"] == ("/run/app.sock", None)
    assert not world.transport.no_delay


def test_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trunkline.access")
    world = World()
    world.feed(b"GET /x?y HTTP/1.1\r\nHost: a\r\n\r\n")
    world.last.respond(b"", status=404, more=True)
    world.last.send(b"")
    world.feed(GET)
    world.last.client.refused(Refusal.QUEUE_FULL)
    assert [record.getMessage() for record in caplog.records] == [
        '192.168.1.1:54321 - "GET /x?y HTTP/1.1" 404 0.0ms',
        '192.168.1.1:54321 - "GET / HTTP/1.1" 503 0.0ms',
    ]


# Pipelining


def test_pipelined_requests_are_served_one_after_the_other() -> None:
    world = World()
    world.feed(GET + post(3) + b"abc" + GET)
    assert len(world.connections.opened) == 1
    world.last.respond(b"1")
    assert len(world.connections.opened) == 2
    assert world.last.body == b"abc"
    world.last.respond(b"2")
    assert len(world.connections.opened) == 3
    world.last.respond(b"3")
    assert [part[-1:] for part in world.take().split(b"HTTP/1.1 200 OK")[1:]] == [b"1", b"2", b"3"]
    assert world.calls == []


def test_a_bad_second_request_does_not_cost_the_first_its_answer() -> None:
    world = World()
    world.feed(GET + b"rubbish\r\n\r\n")
    assert world.take() == b""
    world.last.respond()
    answer = world.take()
    assert answer.startswith(OK + b"HTTP/1.1 400 Bad Request\r\n")
    assert world.calls == ["end writing"]


def test_a_client_that_pipelines_too_much_is_not_read() -> None:
    world = World()
    world.feed(GET)
    world.feed(b"G" * 65_536)
    assert not world.is_paused
    world.feed(b"G")
    assert world.is_paused
    world.last.respond()
    assert not world.is_paused


def test_thousands_of_pipelined_requests_need_no_stack() -> None:
    world = World()
    world.connections.on_open = lambda connection: None
    world.feed(GET * 2300)
    for _ in range(2300):
        world.last.respond()
    assert world.take() == OK * 2300
    world = World()

    def respond_when_opened(connection: FakeConnection) -> None:
        connection.client.refused(Refusal.QUEUE_FULL)

    world.connections.on_open = respond_when_opened
    world.feed(GET * 2300)
    assert world.take().count(b"HTTP/1.1 503 ") == 2300


# Bodies


def test_the_first_piece_of_a_body_travels_with_the_opening() -> None:
    world = World()
    world.feed(post(5) + b"hel")
    assert world.last.first_event == {"type": "http.request", "body": b"hel", "more_body": True}
    world.feed(b"lo")
    assert world.last.events[1:] == [{"type": "http.request", "body": b"lo", "more_body": False}]
    world.last.respond()
    world.feed(post(5) + b"hello")
    assert world.last.first_event == {"type": "http.request", "body": b"hello", "more_body": False}


def test_a_body_that_is_not_there_yet_does_not_delay_the_opening() -> None:
    world = World()
    world.feed(post(5))
    assert world.last.first_event is None
    assert world.last.events == []
    world.feed(b"hello")
    assert world.last.body == b"hello"


def test_a_large_first_piece_follows_the_opening() -> None:
    world = World()
    world.feed(post(8193) + bytes(8193))
    assert world.last.first_event is None
    assert world.last.body == bytes(8193)
    assert world.last.is_complete
    world.last.respond()
    world.feed(post(8192) + bytes(8192))
    assert world.last.first_event["body"] == bytes(8192)


def test_a_chunked_body() -> None:
    world = World()
    world.feed(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"3\r\nabc\r\n", b"0\r\n")
    assert world.last.body == b"abc"
    assert not world.last.is_complete
    world.feed(b"\r\n")
    assert world.last.is_complete
    assert world.last.events[-1] == {"type": "http.request", "body": b"", "more_body": False}


def test_a_slow_application_stops_the_reading_of_its_client() -> None:
    world = World()
    world.feed(post(200_000))
    world.last.pause_after = 65_536
    world.feed(bytes(150_000))
    assert world.is_paused
    assert len(world.last.body) == 65_536
    world.last.client.resume_reading()
    assert not world.is_paused
    assert len(world.last.body) == 150_000
    world.last.client.pause_reading()
    assert world.is_paused
    world.last.respond()  # it will never read the rest
    assert not world.is_paused


CHUNKED: Final = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_read_full_of_small_chunks_takes_many_turns() -> None:
    """Between them all others are read; meanwhile the flood's own socket is not."""
    world = World()
    world.feed(CHUNKED, b"1\r\nx\r\n" * 10_000 + b"0\r\n\r\n" + GET)
    turns = 1
    while world.turns:
        assert world.is_paused
        assert len(world.last.body) == turns * TURN_CHUNKS_MAX
        world.last.client.pause_reading()
        world.last.client.resume_reading()  # changes nothing: it is not its turn
        assert len(world.last.body) == turns * TURN_CHUNKS_MAX
        assert len(world.turns) == 1
        world.turns.pop()()
        turns += 1
    assert turns == 10_000 // TURN_CHUNKS_MAX + 1
    assert world.last.is_complete
    assert world.last.body == b"x" * 10_000
    assert not world.is_paused
    world.last.respond()
    world.last.respond()
    assert world.take() == OK + OK


def test_small_chunks_in_one_packet_with_their_head_take_many_turns() -> None:
    world = World()
    world.feed(CHUNKED + b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n")
    assert len(world.last.body) == TURN_CHUNKS_MAX
    assert len(world.turns) == 1
    world.run_turns()
    assert len(world.last.body) == 1000
    assert world.last.is_complete


@pytest.mark.parametrize("end", ["lost", "answered", "not taken"])
def test_ends_between_two_turns_of_a_flood_of_chunks(end: str) -> None:
    world = World()
    world.feed(CHUNKED, b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n" + GET)
    connection = world.last
    if end == "lost":
        world.lose()
    elif end == "answered":
        connection.respond()
        assert world.protocol.phase is Phase.DRAIN
        assert world.is_paused
    else:
        connection.client.pause_reading()
    world.run_turns()
    assert len(connection.body) == TURN_CHUNKS_MAX
    if end == "answered":
        assert len(world.connections.opened) == 2  # the rest is thrown away, at its turns
        assert not world.is_paused
    elif end == "not taken":
        connection.client.resume_reading()
        world.run_turns()
        assert connection.is_complete


def test_a_body_nobody_read_is_dropped_before_the_next_request() -> None:
    world = World()
    world.feed(post(65_536) + bytes(100))
    world.last.respond()
    world.feed(bytes(65_000))
    assert world.protocol.phase is Phase.DRAIN
    world.feed(bytes(436) + GET)
    assert len(world.connections.opened) == 2
    world.last.respond()
    assert world.take() == OK + OK


def test_a_large_body_nobody_read_closes_the_connection() -> None:
    world = World()
    world.feed(post(1_000_000))
    world.last.respond()
    world.feed(bytes(65_536))
    assert world.calls == []
    world.feed(b"x")
    assert world.calls == ["end writing"]


def test_a_broken_chunk_is_answered_and_the_application_told() -> None:
    world = World()
    world.feed(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    world.feed(b"rubbish\r\n")
    assert world.last.calls == ["gone"]
    assert world.last.last_event == {"type": "http.disconnect"}
    assert world.take().startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert world.calls == ["end writing"]


def test_a_broken_chunk_behind_the_head_asks_nobody() -> None:
    world = World()
    world.feed(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nrubbish\r\n")
    assert world.connections.opened == []
    assert world.take().startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_a_broken_chunk_cuts_a_response_that_has_begun() -> None:
    world = World()
    world.feed(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    world.last.respond(b"x", more=True)
    world.take()
    world.feed(b"rubbish\r\n")
    assert world.take() == b""
    assert world.last.calls == ["gone"]
    assert world.calls == ["end writing"]


# 100 Continue

EXPECTING = post(5, b"Expect: 100-continue")


def test_100_continue_comes_when_the_application_receives() -> None:
    world = World()
    world.feed(EXPECTING)
    assert world.last.tell_receiving
    assert world.take() == b""
    world.last.client.application_receiving()
    assert world.take() == b"HTTP/1.1 100 Continue\r\n\r\n"
    world.feed(b"hello")
    world.last.respond()
    assert world.take() == OK
    assert world.calls == []


def test_a_client_that_sends_its_body_at_once_gets_no_100() -> None:
    for wire in ([EXPECTING + b"hel"], [EXPECTING, b"hel"]):
        world = World()
        world.feed(*wire)
        world.last.client.application_receiving()
        assert world.take() == b""
        world.feed(b"lo")
        world.last.respond()
        assert world.take() == OK
        assert world.calls == []
    world = World()
    world.feed(EXPECTING + b"hello")
    assert not world.last.tell_receiving


def test_a_client_that_waits_for_its_100_is_not_late() -> None:
    world = World(body_timeout_s=10)
    world.feed(EXPECTING)
    world.advance(60)
    assert world.calls == []
    world.last.client.application_receiving()
    assert world.take() == b"HTTP/1.1 100 Continue\r\n\r\n"
    world.advance(11)
    assert world.take().startswith(b"HTTP/1.1 408 ")


def test_a_final_answer_without_100_closes() -> None:
    world = World()
    world.feed(EXPECTING)
    world.last.respond(b"", status=413)
    answer = world.take()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close\r\n" in answer
    assert world.calls == ["end writing"]


# Refused requests


def test_a_bad_request_is_answered_and_the_rest_dropped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trunkline.interface")
    world = World()
    world.feed(b"GET / HTTP/1.1\r\n\r\n")
    answer = world.take()
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert answer.endswith(b"\r\n\r\nBad Request: Host is missing\n")
    assert b"connection: close\r\n" in answer
    assert world.connections.opened == []
    assert world.calls == ["end writing"]
    world.feed(GET)  # not read any more
    assert world.take() == b""
    world.protocol.readConnectionLost()
    assert world.calls == ["end writing", "close"]
    assert "Host is missing" in caplog.text
    assert world.factory.statistics().bad_requests_total == 1


@pytest.mark.parametrize(
    ("data", "changes", "status"),
    [
        (b"GET /" + b"a" * 100 + b" HTTP/1.1\r\n", {"request_line_bytes_max": 100}, 414),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 100, {"head_bytes_max": 100}, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: b\r\nA: b\r\n\r\n", {"headers_max": 2}, 431),
        (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", {}, 501),
        (b"GET / HTTP/2.0\r\n\r\n", {}, 505),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", {}, 400),
    ],
)
def test_limits_and_statuses(data: bytes, changes: dict[str, Any], status: int) -> None:
    world = World(**changes)
    world.feed(data)
    assert world.take().startswith(b"HTTP/1.1 %d " % status)
    assert world.calls == ["end writing"]


# Smuggling: each of these makes some servers see a second request (RFC 9112 section 11.2; the names are those of
# the literature: CL.TE, TE.CL, TE.0, CL.0, obs-fold, bare LF, chunk extension, trailer).

INNER = b"GET /inner HTTP/1.1\r\nHost: a\r\n\r\n"
SMUGGLED = [
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\nContent-Length: 4\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding\r\n : chunked\r\n\r\n0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nX: x\r\n\tTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nX: x\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nX: x\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nX: \x00Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER,
    b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 33\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0, 33\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent\x00-Length: 33\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0;\n\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\nx\r\n0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0 \r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxx\r\n0\r\n\r\n" + INNER,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX\x00: y\r\n\r\n" + INNER,
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + INNER,
    b"GET / HTTP/1.1\nHost: a\n\n" + INNER,
]


@pytest.mark.parametrize("data", SMUGGLED)
def test_nothing_is_smuggled(data: bytes) -> None:
    for feeds in ([data], [data[index : index + 1] for index in range(len(data))]):
        world = World()
        world.feed(*feeds)
        if world.connections.opened:  # its head was good and its body is not
            assert [connection.scope["path"] for connection in world.connections.opened] == ["/"]
            assert world.last.calls == ["gone"]
        assert world.take().count(b"HTTP/1.1 400 ") == 1
        assert world.calls == ["end writing"]
        assert world.protocol.phase is Phase.LINGER


# Applications that fail, and refusals


def test_an_application_that_returns_without_a_response() -> None:
    world = World()
    world.feed(GET)
    world.last.client.application_ended(Outcome.RETURNED)
    assert world.take().startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    world.feed(GET)
    world.last.respond()
    assert world.take() == OK


def test_an_application_that_ends_in_mid_body_cuts_its_response() -> None:
    world = World()
    world.feed(GET)
    world.last.respond(b"x", more=True)
    world.last.client.application_ended(Outcome.RAISED)
    assert not world.take().endswith(b"0\r\n\r\n")
    assert world.calls == ["close"]
    world = World()
    world.feed(b"GET / HTTP/1.0\r\n\r\n")
    world.last.respond(b"x", more=True)
    world.last.client.application_ended(Outcome.RAISED)
    assert world.calls == ["abort"]


def test_too_few_bytes_close_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.feed(GET)
    world.last.respond(b"x", (b"content-length", b"5"))
    assert world.calls == ["close"]
    assert "4 bytes less than its content-length of 5" in caplog.text


@pytest.mark.parametrize("refusal", list(Refusal))
def test_refusals(refusal: Refusal) -> None:
    world = World()
    world.feed(GET)
    world.last.client.refused(refusal)
    assert world.take().startswith(b"HTTP/1.1 %d " % refusal.status)
    assert world.calls == []
    world.feed(GET)
    world.last.respond(b"x", more=True)
    world.last.client.refused(refusal)
    assert world.calls == ["close"]


def test_nothing_happens_behind_the_end() -> None:
    world = World()
    world.feed(GET)
    client = world.last.client
    world.last.respond()
    world.take()
    client.application_event({"type": "http.response.body", "body": b"late", "more_body": False})
    client.application_receiving()
    client.application_ended(Outcome.RETURNED)
    client.refused(Refusal.WORKER_LOST)
    client.pause_reading()
    client.resume_reading()
    client.send_broadcast(None)
    assert client.buffered_bytes() == 0
    assert world.take() == b""
    assert not world.is_paused
    assert world.calls == []


# Slow clients


def test_a_full_transport_pauses_the_delivery() -> None:
    world = World()
    assert world.transport.producer is world.protocol
    assert world.transport.streaming
    world.feed(GET)
    world.last.respond(b"x", more=True)
    world.protocol.pauseProducing()
    world.protocol.resumeProducing()
    assert world.last.calls == ["pause", "resume"]
    world.transport.dataBuffer, world.transport.offset, world.transport._tempDataLen = bytes(100), 30, 7
    assert world.last.client.buffered_bytes() == 77


def test_the_next_request_begins_paused_if_the_transport_is_still_full() -> None:
    world = World()
    world.feed(GET + GET)
    first = world.last
    world.protocol.pauseProducing()
    first.respond()
    assert world.last is not first
    assert world.last.calls == ["pause"]
    world.protocol.resumeProducing()
    assert world.last.calls == ["pause", "resume"]
    assert first.calls == ["pause", "finished"]


# Clients that leave


def test_a_client_that_leaves() -> None:
    world = World()
    world.feed(post(5) + b"he")
    client = world.last.client
    world.lose()
    assert world.last.calls == ["gone"]
    assert world.last.last_event == {"type": "http.disconnect"}
    client.application_event({"type": "http.response.start", "status": 200, "headers": []})
    client.application_event({"type": "http.response.body", "body": b"x", "more_body": False})
    client.application_ended(Outcome.RETURNED)
    assert world.take() == b""
    assert world.factory.protocols == set()
    assert world.deadlines.statistics().armed_count == 0


def test_a_half_closed_client_gets_its_answers() -> None:
    world = World()
    world.feed(GET + GET)
    world.protocol.readConnectionLost()
    assert world.last.calls == []
    world.last.respond()
    world.last.respond(b"x", more=True)
    assert world.calls == []
    world.last.send(b"y")
    assert world.take().count(b"HTTP/1.1 200 OK") == 2
    assert world.calls == ["close"]
    assert world.transport.producerState == "producing"  # to read it again would report its end again


def test_a_half_closed_client_whose_body_is_incomplete_is_gone() -> None:
    world = World()
    world.feed(post(5) + b"he")
    world.protocol.readConnectionLost()
    assert world.last.calls == ["gone"]
    assert world.calls == ["abort"]


def test_a_client_that_ends_between_requests_or_in_a_head() -> None:
    for data in (b"", b"GET / HT", GET):
        world = World()
        if data:
            world.feed(data)
        if data == GET:
            world.last.respond()
        world.protocol.readConnectionLost()
        assert world.calls == ["close"]


def test_a_half_closed_client_to_whom_nothing_is_said_counts_as_gone() -> None:
    """It has most probably closed its socket; an application that waits for its disconnect is to get it."""
    world = World()
    world.feed(GET)
    world.protocol.readConnectionLost()
    world.advance(4)
    world.last.respond(b"x", more=True)
    world.advance(4)
    world.transport.dataBuffer = b"unread"
    world.advance(4)
    world.transport.dataBuffer = b""
    assert world.last.calls == []
    world.advance(6)
    assert world.last.calls == ["gone"]
    assert world.calls == ["abort"]


def test_a_half_closed_client_counts_as_gone_at_its_second_request_too() -> None:
    world = World()
    world.feed(GET + GET)
    world.protocol.readConnectionLost()
    world.last.respond()
    assert len(world.connections.opened) == 2
    world.advance(6)
    assert world.last.calls == ["gone"]
    assert world.calls == ["abort"]


def test_a_half_closed_client_counts_as_gone_although_its_body_was_read_late() -> None:
    world = World()
    world.feed(post(5))
    world.last.client.pause_reading()
    world.feed(b"hello")
    world.protocol.readConnectionLost()
    world.advance(4)
    world.last.client.resume_reading()
    assert world.last.is_complete
    world.advance(6)
    assert world.last.calls == ["gone"]


# Timeouts


def test_a_socket_that_says_nothing_is_closed() -> None:
    world = World(header_timeout_s=10)
    world.advance(10)
    assert world.calls == []
    world.advance(1)
    assert world.calls == ["close"]
    assert world.take() == b""


def test_a_body_that_trickles_gets_a_408_and_one_that_is_only_slow_does_not() -> None:
    for size, lives in ((1, False), (16, True)):
        world = World(body_timeout_s=10)
        world.feed(post(100_000))
        for _ in range(120):
            world.advance(0.25)  # more often than the timer ticks
            if world.calls:
                break
            world.feed(b"x" * size)
        assert (not world.calls) is lives
        assert world.take().startswith(b"" if lives else b"HTTP/1.1 408 ")


def test_a_client_that_reads_nothing_is_dropped() -> None:
    world = World(write_timeout_s=20)
    world.feed(GET)
    world.last.respond(b"x" * 100_000, more=True)
    world.transport._tempDataLen = 100_000
    world.protocol.pauseProducing()
    world.advance(18)
    world.transport._tempDataLen = 50_000
    world.advance(10)
    assert world.calls == []
    world.advance(22)
    assert world.calls == ["abort"]
    assert world.last.last_event == {"type": "http.disconnect"}
    assert world.factory.statistics().timeouts_total == 1


def test_the_write_timeout_ends_with_what_waited() -> None:
    world = World(write_timeout_s=20)
    world.feed(GET)
    world.last.respond(more=True)
    world.protocol.pauseProducing()
    world.protocol.resumeProducing()
    world.advance(60)
    assert world.calls == []


def test_a_head_that_drips_gets_a_408() -> None:
    world = World(header_timeout_s=10)
    for _ in range(11):
        assert world.calls == []
        world.feed(b"a")
        world.advance(1)
    assert world.take().startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert world.calls == ["end writing"]
    assert world.factory.statistics().timeouts_total == 1


def test_keep_alive_timeout() -> None:
    world = World(keep_alive_timeout_s=5, header_timeout_s=10)
    world.feed(GET)
    world.advance(60)  # the application may take its time
    world.last.respond()
    world.advance(5)
    assert world.calls == []
    world.feed(b"G")
    world.advance(9)  # now it is a head
    assert world.calls == []
    world.feed(GET[1:])
    world.last.respond()
    world.take()
    world.advance(6)
    assert world.calls == ["close"]
    assert world.take() == b""


def test_no_keep_alive() -> None:
    world = World(keep_alive_timeout_s=0)
    world.feed(GET)
    world.last.respond()
    assert b"connection: close" in world.take()
    assert world.calls == ["close"]


def test_a_body_that_stalls() -> None:
    world = World(body_timeout_s=10)
    world.feed(post(5000))
    for _ in range(3):
        world.advance(9)
        world.feed(bytes(1000))
        assert world.calls == []
    world.advance(11)
    assert world.last.calls == ["gone"]
    assert world.take().startswith(b"HTTP/1.1 408 ")
    assert world.calls == ["end writing"]


def test_a_body_we_do_not_read_does_not_stall() -> None:
    world = World(body_timeout_s=10)
    world.feed(post(100))
    world.last.client.pause_reading()
    world.advance(60)
    assert world.calls == []
    world.last.client.resume_reading()
    world.advance(9)
    assert world.calls == []
    world.feed(bytes(100))
    world.advance(60)  # complete: the application's turn
    assert world.calls == []


def test_a_rest_of_a_body_that_stalls() -> None:
    world = World(header_timeout_s=10)
    world.feed(post(5))
    world.last.respond()
    world.advance(11)
    assert world.calls == ["close"]


def test_a_rest_of_a_body_that_drips() -> None:
    world = World(header_timeout_s=10)
    world.feed(post(100))
    world.last.respond()
    for _ in range(11):
        assert world.calls == []
        world.feed(b"x")
        world.advance(1)
    assert world.calls == ["close"]


def test_a_rest_of_a_body_behind_the_stop_is_the_last_that_is_read() -> None:
    world = World()
    world.feed(post(5))
    world.last.respond()
    world.factory.stop()
    assert world.calls == []
    world.feed(b"hello")
    assert world.calls == ["close"]


def test_lingering_ends() -> None:
    world = World()
    world.feed(b"rubbish\r\n")
    world.protocol.writeConnectionLost()
    world.feed(bytes(1024 * 1024))
    assert not world.is_paused
    world.feed(b"x")
    assert world.is_paused
    world.advance(4)
    assert world.calls == ["end writing"]
    world.advance(2)
    assert world.calls == ["end writing", "abort"]


@pytest.mark.parametrize(
    "request_line", [b"GET / HTTP/1.0\r\n\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"]
)
def test_a_client_that_still_reads_its_answer_is_not_cut_off(request_line: bytes) -> None:
    world = World()
    world.feed(request_line)
    world.transport.dataBuffer = bytes(10_000)
    world.last.respond(b"", (b"connection", b"close"))
    calls = list(world.calls)
    for left in (8_000, 4_000, 2_000):
        world.transport.dataBuffer = bytes(left)
        world.advance(29)
    assert world.calls == calls
    world.advance(62)
    assert world.calls == [*calls, "abort"]


# Upgrades

UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def test_a_websocket_takes_the_socket_over() -> None:
    world = World()
    world.feed(UPGRADE + b"behind")
    (websocket,) = world.websockets.upgraded
    assert websocket.head.raw_path == b"/ws"
    assert websocket.peer.client == ("192.168.1.1", 54321)
    assert websocket.transport is world.transport
    assert websocket.calls == [b"behind"]
    world.feed(b"more")
    world.protocol.pauseProducing()
    world.protocol.resumeProducing()
    world.advance(100)  # its deadlines are its own
    world.lose()
    assert websocket.calls == [b"behind", b"more", "pause", "resume", "lost"]
    assert world.connections.opened == []
    assert world.calls == []


def test_a_websocket_behind_a_request() -> None:
    world = World()
    world.feed(GET + UPGRADE + b"x")
    assert world.websockets.upgraded == []
    world.protocol.pauseProducing()
    world.last.respond()
    (websocket,) = world.websockets.upgraded
    assert websocket.calls == ["pause", b"x"]


def test_a_websocket_with_much_behind_it_is_read_when_its_turn_comes() -> None:
    world = World()
    world.feed(GET, UPGRADE + bytes(80_000))
    assert world.is_paused
    world.last.respond()
    (websocket,) = world.websockets.upgraded
    assert websocket.calls == [bytes(80_000)]
    assert not world.is_paused


def test_a_websocket_whose_client_ends_its_side_is_lost() -> None:
    world = World()
    world.feed(UPGRADE)
    world.protocol.readConnectionLost()
    assert world.websockets.upgraded[0].calls == ["lost"]
    assert world.calls == ["close"]
    world.lose()
    assert world.websockets.upgraded[0].calls == ["lost"]


@pytest.mark.parametrize(
    "head",
    [
        UPGRADE.replace(b"GET", b"POST"),
        UPGRADE.replace(b"HTTP/1.1", b"HTTP/1.0"),
        UPGRADE.replace(b"WebSocket\r\n", b"h2c\r\n"),
        UPGRADE.replace(b", Upgrade", b""),
    ],
)
def test_any_other_upgrade_is_a_plain_request_with_its_body(head: bytes) -> None:
    world = World()
    world.feed(head.replace(b"Sec-WebSocket-Version", b"Content-Length: 3\r\nSec-WebSocket-Version") + b"abc")
    assert world.websockets.upgraded == []
    assert world.last.body == b"abc"


# Stopping


def test_stop_closes_idle_sockets_and_lets_requests_finish() -> None:
    idle, busy, streaming, websocket = World(), World(), World(), World()
    idle.feed(GET)
    idle.last.respond()
    busy.feed(GET)
    streaming.feed(GET)
    streaming.last.respond(b"x", more=True)
    websocket.feed(UPGRADE)
    for world in (idle, busy, streaming, websocket):
        world.factory.stop()
    assert idle.calls == ["close"]
    busy.last.respond()
    assert b"connection: close\r\n" in busy.take()
    assert busy.calls == ["close"]
    assert streaming.calls == []
    streaming.last.send(b"y")
    assert streaming.calls == ["close"]
    assert websocket.calls == []


@pytest.mark.parametrize("begun", [b"", GET[:10]])
def test_a_first_request_that_is_on_its_way_when_the_server_stops_is_answered(begun: bytes) -> None:
    world = World()
    if begun:
        world.feed(begun)
    assert world.factory.newcomers() == ([] if begun else [world.protocol])
    world.factory.stop()
    assert world.calls == []
    world.feed(GET[len(begun) :])
    assert world.factory.newcomers() == []
    world.last.respond()
    assert b"connection: close\r\n" in world.take()
    assert world.calls == ["close"]


def test_a_socket_that_comes_while_stopping_is_closed() -> None:
    world = World()
    world.factory.stop()
    protocol, transport = world.factory.buildProtocol(None), Transport()
    protocol.makeConnection(transport)
    assert transport.calls == ["close"]


def test_abort_drops_everything_and_says_when() -> None:
    world = World()
    world.feed(GET)
    world.factory.abort()
    assert world.calls == ["abort"]
    assert world.last.calls == ["gone"]
    emptied: list[bool] = []
    world.factory.when_empty = lambda: emptied.append(True)
    world.lose()
    assert emptied == [True]


def test_repr_and_statistics_show_the_state() -> None:
    world = World()
    world.feed(GET)
    world.last.respond()
    world.feed(GET)
    assert "EXCHANGE" in repr(world.protocol)
    assert "GET b'/'" in repr(world.last.client)
    statistics = world.factory.statistics()
    assert (statistics.sockets, statistics.idle, statistics.accepted_total, statistics.requests_total) == (1, 0, 1, 2)
    assert repr(world.factory) == "<HttpFactory sockets=1 stopping=False>"


# With real sockets


class Server:
    """A listener with an application for each request: a callable of the FakeConnection, on the loop."""

    def __init__(self, connections: FakeConnections, factory: HttpFactory, port: int) -> None:
        self.connections = connections
        self.factory = factory
        self.port = port

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def connect_socket(self) -> socket.socket:
        client = socket.socket()
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
        return client


@asynccontextmanager
async def serving(
    application: Callable[[FakeConnection], None] | None = None, **changes: Any
) -> AsyncIterator[Server]:
    loop = asyncio.get_running_loop()
    reactor = AsyncioSelectorReactor(loop)

    def on_open(connection: FakeConnection) -> None:
        if application is not None:
            loop.call_soon(application, connection)

    connections = FakeConnections(on_open)
    deadlines = Deadlines(call_later=loop.call_later, clock=loop.time, tick_s=0.02)
    end_watch = EndWatch(reactor)
    factory = build_factory(connections, deadlines, end_watch=end_watch, **changes)
    listener = reactor.listenTCP(0, factory, interface="127.0.0.1")
    try:
        yield Server(connections, factory, listener.getHost().port)
    finally:
        await listener.stopListening().asFuture(loop)
        factory.abort()
        await until(lambda: not factory.protocols)
        assert end_watch.statistics().watched_count == 0
        end_watch.close()
        deadlines.close()
        reactor.removeAll()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def respond(connection: FakeConnection) -> None:
    connection.respond()


async def test_h11_understands_us() -> None:
    """A client that was written by somebody else."""

    def application(connection: FakeConnection) -> None:
        if connection.scope["path"] == "/chunks":
            connection.respond(b"one", more=True)
            connection.send(b"two", more=True)
            connection.send(b"")
        elif connection.scope["path"] == "/none":
            connection.respond(b"", status=204)
        else:
            connection.respond(b"plain")

    async with serving(application) as server:
        reader, writer = await server.connect()
        client = h11.Connection(h11.CLIENT)
        for path, method, status, expected in (
            ("/", "GET", 200, b"plain"),
            ("/chunks", "GET", 200, b"onetwo"),
            ("/none", "GET", 204, b""),
            ("/", "HEAD", 200, b""),
            ("/chunks", "HEAD", 200, b""),
            ("/chunks", "GET", 200, b"onetwo"),
        ):
            request = h11.Request(method=method, target=path, headers=[("Host", "a")])
            writer.write(client.send(request) + client.send(h11.EndOfMessage()))
            body = b""
            while True:
                event = client.next_event()
                if event is h11.NEED_DATA:
                    client.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Response):
                    assert event.status_code == status
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    break
            assert isinstance(event, h11.EndOfMessage)
            assert body == expected
            client.start_next_cycle()
        writer.close()


async def test_a_half_closed_socket_gets_its_answer() -> None:
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(GET)
        writer.write_eof()
        await until(lambda: server.connections.opened and next(iter(server.factory.protocols))._read_ended)
        server.connections.last.respond()
        assert await reader.read() == OK
        await until(lambda: not server.factory.protocols)
        assert server.connections.last.calls == ["finished"]
        writer.close()


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


async def test_a_reset_is_noticed_though_the_socket_is_half_closed() -> None:
    """Twisted does not look at such a socket any more; without the watch the application would never know."""
    async with serving() as server:
        client = await server.connect_socket()
        client.send(GET)
        client.shutdown(socket.SHUT_WR)
        await until(lambda: server.connections.opened and next(iter(server.factory.protocols))._read_ended)
        assert server.connections.last.calls == []
        reset(client)
        await until(lambda: server.connections.last.calls == ["gone"])
        await until(lambda: not server.factory.protocols)


async def test_a_reset_is_noticed_though_the_socket_is_not_read() -> None:
    async with serving() as server:
        client = await server.connect_socket()
        client.send(post(1_000_000) + bytes(100))
        await until(lambda: server.connections.opened)
        server.connections.last.client.pause_reading()
        client.send(bytes(100_000))
        reset(client)
        await until(lambda: server.connections.last.calls == ["gone"])
        assert len(server.connections.last.body) <= 100
        await until(lambda: not server.factory.protocols)


async def test_a_client_that_closes_in_mid_body_is_noticed_though_the_socket_is_not_read() -> None:
    """What it sent lies unread in the kernel in front of its end; that it is too little can be counted."""
    async with serving() as server:
        client = await server.connect_socket()
        client.send(post(1_000_000))
        await until(lambda: server.connections.opened)
        server.connections.last.client.pause_reading()
        client.send(bytes(50_000))
        client.close()
        await until(lambda: server.connections.last.calls == ["gone"])
        await until(lambda: not server.factory.protocols)


async def test_a_body_that_is_complete_in_the_kernel_is_not_lost() -> None:
    async with serving() as server:
        client = await server.connect_socket()
        client.send(post(50_000))
        await until(lambda: server.connections.opened)
        server.connections.last.client.pause_reading()
        client.send(bytes(50_000))
        client.shutdown(socket.SHUT_WR)
        watch = server.factory.end_watch
        assert watch is not None
        await until(lambda: watch.statistics().reported_count == 1)
        server.connections.last.client.resume_reading()
        await until(lambda: server.connections.last.is_complete)
        assert len(server.connections.last.body) == 50_000
        server.connections.last.respond()
        assert await asyncio.get_running_loop().sock_recv(client, 1000) == OK
        client.close()


async def test_a_client_that_uploads_without_end_gets_its_answer() -> None:
    """A close with unread bytes would be a reset, which overtakes the answer."""

    def application(connection: FakeConnection) -> None:
        connection.respond(b"too much", status=413)

    async with serving(application) as server:
        reader, writer = await server.connect()
        writer.write(post(100_000_000) + bytes(2_000_000))
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert answer.endswith(b"too much")
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()  # a reset, noticed at once, although the socket is not read any more
        await until(lambda: not server.factory.protocols)


async def test_a_client_that_does_not_read_pauses_the_application() -> None:
    async with serving() as server:
        client = await server.connect_socket()
        client.send(GET)
        await until(lambda: server.connections.opened)
        connection = server.connections.last
        connection.respond(b"", more=True)
        size = 0
        while "pause" not in connection.calls:
            connection.send(bytes(65536), more=True)
            size += 65536
            await asyncio.sleep(0)
            assert size < 50_000_000
        assert connection.client.buffered_bytes() > 65536
        connection.send(b"", more=False)
        received = 0
        loop = asyncio.get_running_loop()
        while received < size:
            received += len(await loop.sock_recv(client, 1_000_000))
        await until(lambda: not next(iter(server.factory.protocols))._writing_paused)
        client.close()


async def test_a_slow_application_stops_a_fast_client() -> None:
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(post(20_000_000) + bytes(20_000_000))
        await until(lambda: server.connections.opened)
        connection = server.connections.last
        connection.client.pause_reading()
        read = len(connection.body)
        await asyncio.sleep(0.05)  # nothing to wait for: that nothing happens is the point
        assert len(connection.body) == read
        assert writer.transport.get_write_buffer_size() > 0
        connection.client.resume_reading()
        await until(lambda: connection.is_complete)
        assert len(connection.body) == 20_000_000
        connection.respond()
        assert await reader.read(1000) == OK
        writer.close()
