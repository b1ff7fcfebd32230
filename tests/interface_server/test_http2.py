"""HTTP/2 on a transport of memory, with the h2 library as the client: time, windows, ends. Real clients and abuse:
tests/system/test_http2.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, Event, ResponseReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes

from interface_server.http2 import Http2Connection, Phase
from interface_server.protocol.http2_exchange import Fields
from tests.interface_server.test_http1 import FakeConnection, FakeWebSocket, FakeWebSockets, World

START = {"type": "http.response.start", "status": 200, "headers": []}


class Upgrades(FakeWebSockets):
    def upgrade(self, head: Any, *, peer: Any, transport: Any, over_http2: bool = False) -> FakeWebSocket:
        assert over_http2
        return super().upgrade(head, peer=peer, transport=transport)


class Http2World(World):
    """One socket that speaks HTTP/2, and its client."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        self.factory.websockets = Upgrades()  # type: ignore[assignment]
        self.client = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self.client.initiate_connection()
        self.exchange()
        assert isinstance(self.protocol._successor, Http2Connection)
        self.server = self.protocol._successor

    def exchange(self) -> list[Event]:
        """Let both sides hear of everything; return what the client hears."""
        events: list[Event] = []
        while True:
            sent = self.client.data_to_send()
            if sent:
                self.feed(sent)
            received = self.take()
            if not received and not sent:
                return events
            events += self.client.receive_data(received)

    def request(self, path: str = "/", *, method: str = "GET", ends: bool = True, **pseudo: str) -> int:
        stream_id = self.client.get_next_available_stream_id()
        fields = {":method": method, ":scheme": "http", ":path": path, ":authority": "a"}
        fields |= {f":{name}": value for name, value in pseudo.items()}
        headers = [*fields.items(), ("sec-websocket-version", "13")]
        self.client.send_headers(stream_id, headers, end_stream=ends)
        self.exchange()
        return stream_id

    def send(self, connection: FakeConnection, body: bytes, *, more: bool = True) -> None:
        connection.client.application_event({"type": "http.response.body", "body": body, "more_body": more})


def of_kind(events: list[Event], kind: type[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_streams_are_served_side_by_side() -> None:
    world = Http2World()
    world.request("/a")
    world.request("/b")
    first, second = world.connections.opened
    assert [first.scope["path"], second.scope["path"]] == ["/a", "/b"]
    assert first.events == [{"type": "http.request", "body": b"", "more_body": False}]
    second.respond(b"B")
    events = world.exchange()
    assert [event.stream_id for event in of_kind(events, ResponseReceived)] == [3]
    first.respond(b"A")
    events = world.exchange()
    assert [event.data for event in of_kind(events, DataReceived)] == [b"A"]
    assert [event.stream_id for event in of_kind(events, StreamEnded)] == [1]
    assert first.calls == second.calls == ["finished"]
    assert world.server.streams == {}


def test_a_response_waits_for_the_client_s_windows_and_its_application_with_it() -> None:
    world = Http2World()
    stream_id = world.request()
    connection = world.last
    connection.client.application_event(START)
    for _ in range(3):
        world.send(connection, bytes(65535))
    events = world.exchange()
    assert sum(len(event.data) for event in of_kind(events, DataReceived)) == 65535  # the windows' size
    assert connection.calls == ["pause"]
    assert world.server.statistics().held_bytes == 2 * 65535
    for target in (None, stream_id):
        world.client.increment_flow_control_window(2 * 65535, target)
    events = world.exchange()
    assert sum(len(event.data) for event in of_kind(events, DataReceived)) == 2 * 65535
    assert connection.calls == ["pause", "resume"]


def test_a_full_socket_stops_all_streams() -> None:
    world = Http2World()
    world.request()
    world.protocol.pauseProducing()
    world.last.respond(b"x")
    assert world.take() == b""
    world.protocol.resumeProducing()
    assert of_kind(world.exchange(), StreamEnded)


def test_a_stream_that_begins_late_does_not_wait_for_a_long_one() -> None:
    world = Http2World()
    world.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 24})
    world.client.increment_flow_control_window(1 << 24)
    world.exchange()
    long = world.request()
    connection = world.last
    pieces_left = 40

    def write_more() -> None:
        nonlocal pieces_left
        pieces_left -= 1
        if pieces_left == 20:
            world.protocol.pauseProducing()
        if pieces_left > 0:
            world.send(connection, bytes(65 * 1024))

    connection.resume_delivery = write_more  # type: ignore[method-assign]
    connection.client.application_event(START)
    world.protocol.pauseProducing()
    world.send(connection, bytes(65 * 1024))
    world.protocol.resumeProducing()
    assert pieces_left == 20
    late = world.request()
    world.last.respond(b"short")
    world.protocol.resumeProducing()
    data = of_kind(world.exchange(), DataReceived)
    before = data[: [event.stream_id for event in data].index(late)]
    assert [event.stream_id for event in before] == [long] * 2  # one before the head, one before the body
    assert world.server.statistics().held_bytes == 0


def test_the_window_of_a_stream_opens_as_its_application_takes() -> None:
    world = Http2World()
    stream_id = world.request(method="POST", ends=False)
    connection = world.last
    connection.pause_after = 10_000
    sent = 0
    while (room := world.client.local_flow_control_window(stream_id)) > 0:
        world.client.send_data(stream_id, bytes(min(room, 16384)))
        sent += min(room, 16384)
        world.exchange()
    assert sent == len(connection.body) == 128 * 1024
    connection.client.resume_reading()
    world.exchange()
    assert world.client.local_flow_control_window(stream_id) == 128 * 1024
    # The connection's never closed.
    assert world.client.outbound_flow_control_window > 900_000


def test_a_stream_that_does_not_move_is_reset() -> None:
    world = Http2World()
    stream_id = world.request()
    connection = world.last
    connection.client.application_event(START)
    world.send(connection, bytes(100_000))
    world.exchange()
    world.advance(110)
    for target in (None, stream_id):
        world.client.increment_flow_control_window(1000, target)
    world.exchange()
    world.advance(110)  # it moved: another look after 120 s
    assert connection.last_event is None
    world.advance(25)
    (reset,) = of_kind(world.exchange(), StreamReset)
    assert reset.error_code == ErrorCodes.CANCEL
    assert connection.last_event == {"type": "http.disconnect"}
    assert world.server.streams == {}


def test_a_body_that_does_not_come_is_a_408_for_its_stream() -> None:
    world = Http2World(body_timeout_s=5)
    slow = world.request(method="POST", ends=False)
    world.advance(3)
    world.client.send_data(slow, bytes(1000))
    world.request("/other", method="POST")
    world.advance(4)
    assert of_kind(world.exchange(), ResponseReceived) == []
    world.advance(3)
    (response,) = of_kind(world.exchange(), ResponseReceived)
    assert dict(response.headers)[b":status"] == b"408"
    assert response.stream_id == slow
    assert world.connections.opened[0].last_event == {"type": "http.disconnect"}
    assert world.connections.opened[1].last_event is None


@pytest.mark.parametrize(("timeouts", "is_late"), [((120, 0), False), ((120, 5), True), ((0, 5), True)])
def test_the_time_of_a_body_goes_on_when_the_client_has_taken_what_was_held(
    timeouts: tuple[float, float], is_late: bool
) -> None:
    write_timeout_s, body_timeout_s = timeouts
    world = Http2World(write_timeout_s=write_timeout_s, body_timeout_s=body_timeout_s)
    stream_id = world.request(method="POST", ends=False)
    connection = world.last
    connection.client.application_event(START)
    world.send(connection, bytes(100_000))
    world.exchange()
    world.advance(10)  # it owes us nothing as long as we owe it the rest
    for target in (None, stream_id):
        world.client.increment_flow_control_window(100_000, target)
    assert sum(len(event.data) for event in of_kind(world.exchange(), DataReceived)) == 100_000 - 65535
    world.advance(4)
    assert connection.last_event is None
    world.advance(2)
    assert (connection.last_event is not None) is is_late
    world.advance(240)
    assert (connection.last_event is not None) is is_late


def test_a_client_that_waits_for_100_has_no_deadline_behind_what_was_held() -> None:
    world = Http2World()
    stream_id = world.client.get_next_available_stream_id()
    fields = [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "a")]
    world.client.send_headers(stream_id, [*fields, ("expect", "100-continue")])
    world.exchange()
    connection = world.last
    connection.client.application_event(START)
    world.send(connection, bytes(100_000))
    world.exchange()
    for target in (None, stream_id):
        world.client.increment_flow_control_window(100_000, target)
    world.exchange()
    world.advance(240)
    assert connection.last_event is None


def test_the_time_of_a_body_stands_still_while_its_application_does_not_take_it() -> None:
    world = Http2World(body_timeout_s=5)
    stream_id = world.request(method="POST", ends=False)
    world.last.pause_after = 1
    world.client.send_data(stream_id, b"x")
    world.exchange()
    world.advance(60)
    assert world.last.last_event is None
    world.last.client.resume_reading()
    world.advance(6)
    assert world.last.last_event is not None


def test_a_request_that_is_reset_in_the_same_read_asks_nobody() -> None:
    world = Http2World()
    stream_id = world.client.get_next_available_stream_id()
    fields = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")]
    world.client.send_headers(stream_id, fields, end_stream=True)
    world.client.reset_stream(stream_id)
    world.exchange()
    assert world.connections.opened == []


def test_data_and_a_reset_in_one_read() -> None:
    world = Http2World()
    stream_id = world.request(method="POST", ends=False)
    for _ in range(4):
        world.client.send_data(stream_id, bytes(16384))
    world.client.reset_stream(stream_id)
    world.exchange()
    assert world.last.last_event == {"type": "http.disconnect"}
    assert len(world.last.body) == 4 * 16384
    assert world.server.phase is Phase.OPEN


def test_idle_connections_are_closed() -> None:
    world = Http2World(keep_alive_timeout_s=2)
    world.request()
    world.advance(30)
    assert of_kind(world.exchange(), ConnectionTerminated) == []  # a request is served
    world.last.respond()
    world.advance(3)
    (goaway,) = of_kind(world.exchange(), ConnectionTerminated)
    assert goaway.error_code == ErrorCodes.NO_ERROR
    assert world.calls == ["close"]


def test_stop_waits_for_the_last_stream() -> None:
    world = Http2World()
    world.request()
    world.factory.stop()
    assert world.server.phase is Phase.DRAINING
    assert world.calls == []
    world.last.respond()
    assert world.calls == ["end writing"]
    idle = Http2World()
    idle.factory.stop()
    assert idle.calls == ["end writing"]


@pytest.mark.parametrize("reads", [1, 2])
def test_a_socket_that_begins_during_a_stop_is_told_behind_its_first_request(reads: int) -> None:
    world = World()
    world.factory.stop()
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    if reads == 2:  # as clients do that send their preface at once
        world.feed(client.data_to_send())
        assert not of_kind(client.receive_data(world.take()), ConnectionTerminated)
    fields = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")]
    client.send_headers(1, fields, end_stream=True)
    world.feed(client.data_to_send())
    (goaway,) = of_kind(client.receive_data(world.take()), ConnectionTerminated)
    assert (goaway.error_code, goaway.last_stream_id) == (ErrorCodes.NO_ERROR, 1)
    assert world.calls == []
    world.last.respond()
    assert len(world.connections.opened) == 1
    assert world.calls == ["end writing"]


def test_a_lost_socket_is_the_end_of_all_streams() -> None:
    world = Http2World()
    for _ in range(3):
        world.request()
    world.lose()
    assert [connection.last_event for connection in world.connections.opened] == [{"type": "http.disconnect"}] * 3
    assert world.server.deadline_tick is None


# WebSockets as their streams see them


async def open_websocket() -> tuple[Http2World, int, FakeWebSocket]:
    world = Http2World()
    stream_id = world.request("/ws", method="CONNECT", ends=False, protocol="websocket")
    websocket = world.websockets.upgraded[0]
    websocket.transport.write(Fields([(b":status", b"200")], False))
    assert of_kind(world.exchange(), ResponseReceived)
    return world, stream_id, websocket


async def test_a_websocket_whose_client_never_ends_its_side_leaves_nothing_behind() -> None:
    world, _, websocket = await open_websocket()
    websocket.transport.write(b"last words")
    websocket.transport.loseConnection()
    await asyncio.sleep(0)  # as Twisted's transports, it says so in another turn
    assert websocket.calls[-1] == "lost"
    events = world.exchange()
    assert [event.data for event in of_kind(events, DataReceived)] == [b"last words", b""]
    assert of_kind(events, StreamReset)[0].error_code == ErrorCodes.NO_ERROR
    assert world.server.streams == {}


async def test_a_websocket_that_lingers_is_read_until_its_deadline() -> None:
    world, stream_id, websocket = await open_websocket()
    websocket.transport.loseWriteConnection()
    world.client.send_data(stream_id, b"still talking")
    world.exchange()
    assert websocket.calls == [b"still talking"]
    websocket.transport.abortConnection()
    await asyncio.sleep(0)
    assert of_kind(world.exchange(), StreamReset)[0].error_code == ErrorCodes.CANCEL
    assert websocket.calls[-1] == "lost"
    assert world.server.streams == {}


async def test_a_websocket_s_transport_pauses_and_is_paused() -> None:
    world, stream_id, websocket = await open_websocket()
    websocket.transport.write(bytes(200_000))
    assert websocket.calls == ["pause"]
    assert websocket.transport.buffered_bytes() > 100_000
    world.exchange()
    for target in (None, stream_id):
        world.client.increment_flow_control_window(400_000, target)
    world.exchange()
    assert websocket.calls == ["pause", "resume"]
    websocket.transport.pauseProducing()
    for _ in range(8):
        world.client.send_data(stream_id, bytes(16384))
    world.exchange()
    assert world.client.local_flow_control_window(stream_id) == 0
    websocket.transport.resumeProducing()
    world.exchange()
    assert world.client.local_flow_control_window(stream_id) == 128 * 1024


@pytest.mark.parametrize("is_reset", [True, False])
async def test_the_client_s_end_of_a_websocket(is_reset: bool) -> None:
    world, stream_id, websocket = await open_websocket()
    if is_reset:
        world.client.reset_stream(stream_id)
    else:
        world.client.end_stream(stream_id)
    world.exchange()
    assert websocket.calls == ["lost"]
    assert world.server.streams == {}


@pytest.mark.parametrize("is_closed", [True, False])
async def test_the_client_s_end_of_a_websocket_waits_for_what_came_before(is_closed: bool) -> None:
    world, stream_id, websocket = await open_websocket()
    websocket.has_unread = True
    world.client.send_data(stream_id, b"messages", end_stream=True)
    assert of_kind(world.exchange(), StreamEnded) == []
    assert websocket.calls == [b"messages"]
    websocket.transport.pauseProducing()
    websocket.transport.resumeProducing()
    websocket.transport.write(b"an answer")
    if is_closed:
        websocket.transport.loseConnection()
    assert websocket.read_over is not None
    websocket.read_over()
    events = world.exchange()
    assert b"".join(event.data for event in of_kind(events, DataReceived)) == b"an answer"
    assert of_kind(events, StreamEnded)
    await asyncio.sleep(0)
    assert websocket.calls == [b"messages", "lost"]
    assert world.server.streams == {}


async def test_a_websocket_that_is_not_read_to_its_end_is_lost_with_its_stream() -> None:
    world, stream_id, websocket = await open_websocket()
    websocket.has_unread = True
    world.client.end_stream(stream_id)
    world.exchange()
    world.client.reset_stream(stream_id)
    world.exchange()
    assert websocket.calls == ["lost"]
    assert world.server.streams == {}


def test_a_body_that_trickles_is_a_408_for_its_stream() -> None:
    world = Http2World(body_timeout_s=5)
    slow = world.request(method="POST", ends=False)
    for _ in range(8):
        world.advance(1)
        world.client.send_data(slow, b"x")
        events = world.exchange()
        if of_kind(events, ResponseReceived):
            break
    (response,) = of_kind(events, ResponseReceived)
    assert dict(response.headers)[b":status"] == b"408"
