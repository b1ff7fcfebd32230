"""The adapter: with a transport that only records, then with real sockets and a real client."""

import asyncio
import logging
import socket
import zlib
from contextlib import asynccontextmanager

import msgpack
import pytest
import websockets
from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from websockets.asyncio.client import connect

from channel_layer.codec import decode_event, encode_event, encode_message
from channel_layer.frames import FrameKind, Outcome, build_claim, build_credit, build_event
from channel_layer.turns import Turns
from interface_server.access_log import AccessLog
from interface_server.broadcast import Broadcast
from interface_server.client import Refusal
from interface_server.connections import Connections
from interface_server.deadlines import Deadlines
from interface_server.end_watch import EndWatch
from interface_server.http_factory import HttpFactory
from interface_server.protocol.server_headers import ServerHeaders
from interface_server.protocol.websocket_frames import PING, PONG, TEXT, build_close, build_frame
from interface_server.protocol.websocket_session import State
from interface_server.websocket import WebSockets
from tests.interface_server.test_connections import FakeLayer
from tests.interface_server.websocket_helpers import (
    ACCEPT,
    PEER,
    FakeConnections,
    build_head,
    build_settings,
    client_close,
    client_frame,
)

PING_FRAME = build_frame(PING, b"")


class FakeTransport:
    """Records what an adapter does to Twisted's transport."""

    def __init__(self):
        self.written = b""
        self.write_count = 0
        self.is_reading = True
        self.ended = None  # "half", "close" or "abort"
        self.has_producer = True
        # What Twisted's FileDescriptor counts with.
        self.dataBuffer = b""
        self.offset = 0
        self._tempDataLen = 0

    def write(self, data):
        assert self.ended is None, f"written behind the end: {data!r}"
        self.written += data
        self.write_count += 1

    def take(self):
        written, self.written = self.written, b""
        return written

    def pauseProducing(self):
        assert self.is_reading
        self.is_reading = False

    def resumeProducing(self):
        assert not self.is_reading
        self.is_reading = True

    def unregisterProducer(self):
        self.has_producer = False

    def loseConnection(self):
        assert not self.has_producer
        self.ended = "close"

    def loseWriteConnection(self):
        assert not self.has_producer
        self.ended = "half"

    def abortConnection(self):
        self.ended = "abort"


class FakeClock:
    """Time that moves when told to."""

    def __init__(self):
        self.now = 1000.0
        self.calls = []

    def __call__(self):
        return self.now

    def call_later(self, delay_s, callback):
        self.calls.append((self.now + delay_s, callback))

    def advance(self, seconds):
        end = self.now + seconds
        while due := [call for call in self.calls if call[0] <= end]:
            first = min(due, key=lambda call: call[0])
            self.calls.remove(first)
            self.now = max(self.now, first[0])
            first[1]()
        self.now = end


class World:
    """One WebSocket between a recording transport and a fake connection."""

    def __init__(self, *, head=None, **changes):
        self.clock = FakeClock()
        self.connections = FakeConnections()
        self.access_log = RecordingLog()
        self.shared = WebSockets(
            settings=build_settings(**changes),
            connections=self.connections,
            access_log=self.access_log,
            deadlines=Deadlines(call_later=self.clock.call_later, clock=self.clock),
            server_headers=ServerHeaders(date=False, server=True, clock=self.clock),
            turns=Turns(lambda callback: self.turns.append(callback)),
        )
        self.turns = []  # what waits for the next turn of the loop
        self.transport = FakeTransport()
        self.client = self.shared.upgrade(head or build_head(), peer=PEER, transport=self.transport)

    def run_turns(self):
        while self.turns:
            self.turns.pop(0)()

    @property
    def connection(self):
        (connection,) = self.connections.opened
        return connection

    def accept(self, **fields):
        self.connection.send({"type": "websocket.accept", **fields})
        return self.transport.take()

    def events(self):
        """Payloads that the application got."""
        return [event.get("text", event.get("bytes")) for event in self.connection.events]

    @property
    def disconnect(self):
        event = self.connection.last_event
        return None if event is None else (event["code"], event["reason"])


class RecordingLog(AccessLog):
    def __init__(self):
        super().__init__()
        self.lines = []

    def websocket_accepted(self, *, client, raw_path, query_string, application_s=None):
        self.lines.append(("accepted", client, raw_path, query_string))

    def websocket_refused(self, *, client, raw_path, query_string, status, application_s=None):
        self.lines.append(("refused", status))

    def websocket_closed(self, *, client, raw_path, query_string, code, open_s=None):
        self.lines.append(("closed", code))


def opened(**changes):
    world = World(**changes)
    world.accept()
    return world


# Handshake


def test_the_application_is_asked_before_the_client_is_answered():
    world = World(head=build_head(extra=[(b"sec-websocket-protocol", b"a, b")]))
    assert world.transport.written == b""
    scope = world.connection.scope
    assert scope["type"] == "websocket"
    assert scope["subprotocols"] == ["a", "b"]
    assert scope["raw_path"] == b"/ws"
    assert not world.connection.is_accepting
    answer = world.accept(subprotocol="b", headers=[[b"x-a", b"1"]])
    assert answer.startswith(b"HTTP/1.1 101 ")
    for line in (b"sec-websocket-accept: " + ACCEPT, b"sec-websocket-protocol: b", b"x-a: 1", b"server: trunkline"):
        assert line + b"\r\n" in answer
    assert world.connection.is_accepting
    assert world.access_log.lines == [("accepted", ("192.0.2.1", 5000), b"/ws", b"a=1")]


def test_a_faulty_handshake_is_answered_without_asking_anybody():
    world = World(head=build_head(without=(b"sec-websocket-key",)))
    assert world.connections.opened == []
    assert world.transport.written.startswith(b"HTTP/1.1 400 ")
    assert world.transport.ended == "half"
    assert world.access_log.lines == [("refused", 400)]
    world.client.data_received(b"whatever")
    world.clock.advance(6)
    assert world.transport.ended == "abort"
    world.client.connection_lost()
    assert world.shared.clients == set()


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda connection: connection.send({"type": "websocket.close"}), 403),
        (lambda connection: connection.ended(Outcome.RETURNED), 500),
        (lambda connection: connection.ended(Outcome.RAISED), 500),
        (lambda connection: connection.ended(Outcome.CANCELLED), 503),
        (lambda connection: connection.refuse(Refusal.QUEUE_FULL), 503),
        (lambda connection: connection.refuse(Refusal.WORKER_LOST), 502),
    ],
)
def test_refusals(end, status):
    world = World()
    end(world.connection)
    assert world.transport.written.startswith(b"HTTP/1.1 %d " % status)
    assert world.transport.ended == "half"
    assert world.access_log.lines == [("refused", status)]
    assert world.client.state is State.CLOSED
    assert world.shared.statistics().refused_count == 1


def test_an_application_that_does_not_answer_costs_a_504():
    world = World(ws_handshake_timeout_s=10)
    world.clock.advance(9.9)
    assert world.transport.written == b""
    world.clock.advance(0.7)
    assert world.transport.written.startswith(b"HTTP/1.1 504 ")
    assert world.disconnect == (1006, "")


def test_the_handshake_timeout_stands_still_while_the_broker_is_away():
    world = World(ws_handshake_timeout_s=10)
    world.clock.advance(5)
    world.connections.away_s = 4.0  # and it goes on
    world.clock.advance(5.6)
    world.connections.away_s = 6.0
    world.clock.advance(4.5)
    assert world.transport.written == b""
    world.clock.advance(2.5)
    assert world.transport.written.startswith(b"HTTP/1.1 504 ")


def test_a_client_that_leaves_before_the_answer():
    world = World()
    world.client.connection_lost()
    assert world.disconnect == (1006, "")
    assert world.access_log.lines == []
    assert world.shared.clients == set()
    assert world.shared.deadlines.statistics().armed_count == 0


def test_an_accept_that_cannot_be_sent_is_logged(caplog):
    world = World()
    with caplog.at_level(logging.ERROR, "trunkline.interface"):
        answer = world.accept(headers=[[b"a", b"b\r\nc: d"]])
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert "websocket.accept" in caplog.text


def test_what_comes_before_the_answer_is_read_after_it():
    world = World()
    world.client.data_received(client_frame(1, b"early"))
    world.client.data_received(client_frame(1, b"bird"))
    assert world.connection.events == []
    world.accept()
    assert world.events() == ["early", "bird"]


def test_much_that_comes_before_the_answer_waits_in_the_kernel():
    world = World()
    message = client_frame(2, b"x" * 10_000)
    world.client.data_received(message)
    assert world.transport.is_reading
    world.client.data_received(message)
    assert not world.transport.is_reading
    world.accept()
    assert world.transport.is_reading
    assert world.events() == [b"x" * 10_000] * 2


def test_early_bytes_are_dropped_when_the_handshake_is_refused():
    world = World()
    world.client.data_received(client_frame(2, b"x" * 20_000))
    world.connection.send({"type": "websocket.close"})
    assert world.transport.is_reading  # for the end of the socket
    world.client.data_received(client_frame(2, b"x" * 20_000))
    assert world.connection.events == []


# Messages


def test_messages_both_ways():
    world = opened()
    world.client.data_received(client_frame(1, b"a") + client_frame(2, b"") + client_frame(1))
    assert world.connection.events == [
        {"type": "websocket.receive", "text": "a"},
        {"type": "websocket.receive", "bytes": b""},
        {"type": "websocket.receive", "text": ""},
    ]
    world.connection.send({"type": "websocket.send", "text": ""})
    world.connection.send({"type": "websocket.send", "bytes": b"b"})
    assert world.transport.take() == b"\x81\x00\x82\x01b"


def test_a_broadcast_is_one_bytes_object_for_all():
    broadcast = Broadcast({"type": "websocket.send", "text": "hello"})
    written = []
    for _ in range(2):
        world = opened()
        world.transport.write = written.append
        world.client.send_broadcast(broadcast)
    assert written[0] == build_frame(TEXT, b"hello")
    assert written[0] is written[1]


DEFLATE = build_head(extra=[(b"sec-websocket-extensions", b"permessage-deflate; client_max_window_bits")])


def compressing(**changes):
    world = World(head=DEFLATE, ws_per_message_deflate=True, **changes)
    assert b"sec-websocket-extensions: permessage-deflate; server_no_context" in world.accept()
    return world


def deflated_frame(opcode, payload, **arguments):
    deflater = zlib.compressobj(wbits=-12)
    compressed = (deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]
    return client_frame(opcode, compressed, rsv=4, **arguments)


def test_messages_are_compressed_both_ways():
    world = compressing()
    world.client.data_received(
        deflated_frame(1, b"hello") + client_frame(1, b"plain") + deflated_frame(2, b"x" * 999)
    )
    assert world.events() == ["hello", "plain", b"x" * 999]
    world.connection.send({"type": "websocket.send", "text": "x" * 999})
    frame = world.transport.take()
    assert frame[0] == 0xC1
    assert zlib.decompressobj(wbits=-12).decompress(frame[2:] + b"\0\0\xff\xff") == b"x" * 999
    world.connection.send({"type": "websocket.send", "text": "small"})
    assert world.transport.take() == build_frame(TEXT, b"small")


def test_nothing_is_compressed_without_the_flag():
    world = World(head=DEFLATE)
    assert b"extensions" not in world.accept()
    world.client.send_broadcast(Broadcast({"type": "websocket.send", "text": "x" * 999}))
    assert world.transport.take()[0] == 0x81
    world.client.data_received(deflated_frame(1, b"hello"))
    assert world.disconnect == (1002, "RSV = 4 and no extension negotiated")


def test_a_compressed_broadcast_is_one_bytes_object_for_all():
    broadcast = Broadcast({"type": "websocket.send", "text": "x" * 999})
    written = []
    for _ in range(2):
        world = compressing()
        world.transport.write = written.append
        world.client.send_broadcast(broadcast)
    assert written[0] is written[1]
    assert written[0][0] == 0xC1


def test_a_message_that_inflates_beyond_the_limit_is_a_1009():
    world = compressing(ws_max_size_bytes=1000)
    world.client.data_received(deflated_frame(2, bytes(1000)))
    assert world.events() == [bytes(1000)]
    world.client.data_received(deflated_frame(2, bytes(1001)))
    assert world.disconnect == (1009, "message larger than 1000 bytes")


def test_a_broadcast_behind_the_close_is_not_written():
    world = opened()
    world.connection.send({"type": "websocket.close"})
    world.transport.take()
    world.client.send_broadcast(Broadcast({"type": "websocket.send", "text": "late"}))
    assert world.transport.written == b""


def test_a_read_full_of_empty_messages_and_a_pause_after_the_first():
    """One read of 64 KiB holds 10,922 of them; whoever cannot take more than one gets no more than one."""
    world = opened()
    world.connections.application = lambda connection, event: connection.client.pause_reading()
    world.client.data_received(client_frame(2, mask=b"abcd") * 10_922)
    assert len(world.connection.events) == 1
    assert not world.transport.is_reading
    for count in range(2, 50):
        world.client.resume_reading()
        assert len(world.connection.events) == count
        assert not world.transport.is_reading
    world.connections.application = None
    world.client.resume_reading()
    assert not world.transport.is_reading
    world.run_turns()
    assert world.events() == [b""] * 10_922
    assert world.transport.is_reading


@pytest.mark.parametrize("frame", [client_frame(9, b"p"), client_frame(2, b"m"), client_frame(10)])
def test_a_read_full_of_small_frames_takes_many_turns(frame):
    """Between them all others are read; meanwhile the flood's own socket is not."""
    world = opened()
    world.client.data_received(frame * 1000)
    turns = 1
    while world.turns:
        assert not world.transport.is_reading
        world.client.pause_reading()
        world.client.resume_reading()  # changes nothing: it is not its turn
        assert not world.transport.is_reading
        world.client.data_received(frame)  # what was on its way although it is paused
        assert len(world.turns) == 1
        world.turns.pop()()
        turns += 1
    assert turns > 3
    assert world.transport.is_reading
    if frame[0] == 0x82:
        assert world.events() == [b"m"] * (1000 + turns - 1)


def test_an_end_between_two_turns():
    for end in ("lost", "closed"):
        world = opened()
        world.client.data_received(client_frame(9, b"p") * 1000)
        if end == "lost":
            world.client.connection_lost()
        else:
            world.connection.send({"type": "websocket.close"})
        world.run_turns()
        assert world.transport.is_reading == (end == "closed")


def test_a_transport_that_goes_on_although_paused_is_not_listened_to():
    world = opened()
    world.client.pause_reading()
    world.client.data_received(client_frame(1, b"a"))
    assert world.connection.events == []
    world.client.resume_reading()
    assert world.events() == ["a"]


def test_a_pause_before_the_accept_holds_behind_it():
    world = World()
    world.client.pause_reading()
    assert not world.transport.is_reading
    world.client.data_received(client_frame(1, b"a"))
    world.accept()
    assert world.events() == []
    assert not world.transport.is_reading
    world.client.resume_reading()
    assert world.events() == ["a"]
    assert world.transport.is_reading


def test_a_full_transport_pauses_delivery():
    world = opened()
    world.client.pause_producing()
    assert world.connection.is_delivery_paused
    world.client.resume_producing()
    assert world.connection.delivery_calls == ["pause", "resume"]


def test_buffered_bytes_are_what_twisted_has_not_written():
    world = opened()
    world.transport.dataBuffer, world.transport.offset, world.transport._tempDataLen = b"x" * 100, 40, 7
    assert world.client.buffered_bytes() == 67


# Ends


def test_the_application_closes():
    world = opened()
    world.connection.send({"type": "websocket.close", "code": 4001, "reason": "because"})
    assert world.transport.take() == build_close(4001, "because")
    assert world.disconnect == (4001, "because")
    assert world.transport.ended is None  # the client's Close is awaited
    world.client.data_received(client_frame(1, b"late") + client_close(4001))
    assert world.transport.ended == "close"
    assert world.connection.events == []
    world.client.connection_lost()
    assert world.access_log.lines[1:] == [("closed", 4001)]
    assert world.shared.clients == set()


def test_a_client_that_does_not_answer_our_close_is_cut_off():
    world = opened(ws_close_timeout_s=5)
    world.connection.ended(Outcome.RETURNED)
    assert world.transport.take() == build_close(1000)
    world.clock.advance(4.9)
    assert world.transport.ended is None
    world.clock.advance(0.7)
    assert world.transport.ended == "abort"


def test_a_client_that_still_reads_what_was_sent_before_the_close_gets_it():
    world = opened(ws_close_timeout_s=5)
    world.transport.dataBuffer = b"x" * 60_000
    world.connection.send({"type": "websocket.close"})
    for left in (40_000, 20_000, 1):
        world.transport.dataBuffer = b"x" * left
        world.clock.advance(5.5)
        assert world.transport.ended is None
    world.clock.advance(5.5)
    assert world.transport.ended == "abort"


def test_a_client_that_reads_a_byte_now_and_then_is_not_waited_for_for_ever():
    world = opened(ws_close_timeout_s=5)
    world.transport.dataBuffer = b"x" * 60_000
    world.connection.send({"type": "websocket.close"})
    for _ in range(20):
        world.transport.dataBuffer = world.transport.dataBuffer[1:]
        world.clock.advance(5.5)
    assert world.transport.ended == "abort"


def test_a_client_that_goes_on_behind_our_close_is_read_until_its_close_but_not_without_limit():
    world = opened()
    world.connection.send({"type": "websocket.close"})
    piece = client_frame(2, bytes(1024 * 1024))
    for _ in range(63):
        world.client.data_received(piece)
        assert world.transport.is_reading
    world.client.data_received(piece)
    assert not world.transport.is_reading
    assert world.connection.events == []
    world.clock.advance(5.5)
    assert world.transport.ended == "abort"


def test_a_client_that_goes_on_behind_a_refusal_is_read_no_more():
    world = World()
    world.connection.send({"type": "websocket.close"})
    assert world.transport.ended == "half"
    for _ in range(64):
        world.client.data_received(bytes(1024 * 1024))
    assert world.transport.is_reading
    world.client.data_received(b"x")
    assert not world.transport.is_reading


def test_a_closing_connection_reads_on_although_it_was_paused():
    world = opened()
    world.client.pause_reading()
    world.client.data_received(client_frame(1, b"unread") + client_close(1000))
    world.connection.send({"type": "websocket.close"})
    assert world.transport.is_reading
    assert world.transport.ended == "close"
    assert world.connection.events == []


@pytest.mark.parametrize(
    ("payload", "echo", "told"),
    [
        (client_close(), build_close(None), (1005, "")),
        (client_close(1000), build_close(1000), (1000, "")),
        (client_close(1001, b"bye"), build_close(1001), (1001, "bye")),
        (client_close(4999), build_close(4999), (4999, "")),
    ],
)
def test_the_client_closes(payload, echo, told):
    world = opened()
    world.client.data_received(client_frame(1, b"last") + payload + client_frame(1, b"late"))
    assert world.events() == ["last"]
    assert world.transport.take() == echo
    assert world.disconnect == told
    assert world.transport.ended == "close"
    world.client.connection_lost()
    assert world.access_log.lines[1:] == [("closed", told[0])]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (client_frame(1, b"a", mask=None), 1002),
        (client_frame(1, b"\xff"), 1007),
        (client_frame(2, length=2**40), 1009),
        (client_close(1005), 1002),
    ],
)
def test_faults_are_answered_and_told(data, code):
    world = opened(ws_max_size_bytes=1000)
    world.client.data_received(data + client_frame(1, b"late"))
    written = world.transport.take()
    assert written[0] == 0x88
    assert written[2:4] == code.to_bytes(2, "big")
    assert world.disconnect[0] == code
    assert world.connection.events == []
    # The client may still be sending: a reset must not overtake our Close.
    assert world.transport.ended == "half"
    world.client.data_received(b"x" * 100_000)
    world.clock.advance(6)
    assert world.transport.ended == "abort"


def test_loss():
    world = opened()
    world.client.connection_lost()
    assert world.disconnect == (1006, "")
    assert world.access_log.lines[1:] == [("closed", 1006)]
    assert world.shared.clients == set()
    assert world.shared.deadlines.statistics().armed_count == 0


NORMAL = client_close(1000)
MESSAGES = [b"%d" % number for number in range(100)]


def ended_by_client(world, *payloads, close=NORMAL):
    """Let the client send these messages and a Close, and end its side; return the calls of what ends the stream."""
    calls = []

    def over():
        calls.append("over")
        world.client.connection_lost()

    world.client.data_received(b"".join(client_frame(1, payload) for payload in payloads) + close)
    world.client.read_ended(over)
    return calls


@pytest.mark.parametrize(("close", "told"), [(NORMAL, (1000, "")), (b"", (1006, ""))])
def test_what_came_before_the_client_s_end_is_read_in_its_turns(close, told):
    world = opened()
    calls = ended_by_client(world, *MESSAGES, close=close)
    assert len(world.connection.events) < 100
    assert calls == []
    world.run_turns()
    assert world.events() == [message.decode() for message in MESSAGES]
    assert world.disconnect == told
    assert calls == ["over"]
    assert world.shared.clients == set()
    assert world.shared.deadlines.statistics().armed_count == 0


@pytest.mark.parametrize(("close", "told"), [(NORMAL, (1000, "")), (b"", (1006, ""))])
def test_what_came_before_the_client_s_end_waits_for_the_application(close, told):
    world = opened(ws_close_timeout_s=5)
    world.connections.application = lambda connection, event: connection.client.pause_reading()
    calls = ended_by_client(world, *MESSAGES[:10], close=close)
    for _ in range(9):
        assert world.disconnect is None
        assert calls == []
        world.clock.advance(4)
        world.client.resume_reading()
        world.run_turns()
    if close:
        world.client.resume_reading()
        world.run_turns()
    assert world.events() == [message.decode() for message in MESSAGES[:10]]
    assert world.disconnect == told
    assert calls == ["over"]
    assert world.shared.deadlines.statistics().armed_count == 0


def test_an_application_that_takes_nothing_before_the_client_s_end_hears_of_it_all_the_same():
    world = opened(ws_close_timeout_s=5)
    world.connections.application = lambda connection, event: connection.client.pause_reading()
    calls = ended_by_client(world, b"a", b"b")
    world.clock.advance(4)
    assert world.disconnect is None
    world.clock.advance(2)
    assert world.disconnect == (1006, "")
    assert calls == ["over"]
    assert world.shared.clients == set()
    assert world.shared.deadlines.statistics().armed_count == 0


def test_an_application_that_closes_before_the_client_s_end_is_read():
    world = opened()
    world.connections.application = lambda connection, event: connection.client.pause_reading()
    calls = ended_by_client(world, b"a", b"b", close=b"")
    world.connection.send({"type": "websocket.close"})
    assert world.disconnect == (1000, "")
    world.run_turns()
    assert calls == ["over"]
    assert world.events() == ["a"]
    assert world.shared.clients == set()
    assert world.shared.deadlines.statistics().armed_count == 0


def test_a_loss_does_not_wait_for_what_came_before():
    world = opened()
    calls = ended_by_client(world, *MESSAGES)
    world.client.connection_lost()
    assert world.disconnect == (1006, "")
    world.run_turns()
    assert calls == []
    assert world.shared.deadlines.statistics().armed_count == 0


def test_loss_is_told_once():
    world = opened()
    world.client.connection_lost()
    world.connection.last_event = None
    world.client.connection_lost()
    assert world.connection.last_event is None


@pytest.mark.parametrize("refusal", [Refusal.WORKER_LOST, Refusal.SLOW_CLIENT, Refusal.STOPPING])
def test_an_open_connection_is_refused(refusal):
    world = opened()
    world.connection.refuse(refusal)
    assert world.transport.take() == build_close(refusal.close_code, refusal.reason)
    assert world.access_log.lines[1:] == [("closed", refusal.close_code)]


def test_an_error_of_ours_costs_one_connection(caplog, monkeypatch):
    world = opened()
    monkeypatch.setattr("interface_server.frame_reader.FrameReader.processControlFrame", lambda self: 1 / 0)
    with caplog.at_level(logging.ERROR, "trunkline.interface"):
        world.client.data_received(client_frame(8))
    assert "ZeroDivisionError" in caplog.text
    assert world.transport.take() == build_close(1011, "internal error")
    assert world.disconnect == (1011, "internal error")


# Pings


def test_pings_are_answered():
    world = opened()
    world.client.data_received(client_frame(9, b"a") + client_frame(9))
    assert world.transport.take() == build_frame(PONG, b"a") + build_frame(PONG, b"")


def test_a_client_that_pings_and_does_not_read_makes_nothing_grow():
    world = opened()
    world.client.pause_producing()
    for number in range(10_000):
        world.client.data_received(client_frame(9, b"%d" % number, mask=b"abcd"))
    assert world.transport.written == b""
    world.client.resume_producing()
    assert world.transport.take() == build_frame(PONG, b"9999")
    world.client.resume_producing()
    assert world.transport.written == b""


def test_an_idle_client_is_pinged_and_given_up_when_it_stays_silent():
    world = opened(ws_ping_interval_s=20, ws_ping_timeout_s=10)
    world.clock.advance(19.9)
    assert world.transport.written == b""
    world.clock.advance(1.2)
    assert world.transport.take() == PING_FRAME
    world.clock.advance(9)
    assert world.transport.ended is None
    world.clock.advance(2)
    assert world.transport.ended == "abort"
    assert world.disconnect == (1006, "ping timeout")
    assert world.shared.statistics().ping_timeout_count == 1


@pytest.mark.parametrize("sign", [client_frame(10), client_frame(1, b"a"), client_frame(9)])
def test_any_sign_of_life_answers_a_ping(sign):
    world = opened(ws_ping_interval_s=20, ws_ping_timeout_s=10)
    for _ in range(5):
        world.clock.advance(21)
        assert PING_FRAME in world.transport.take()
        world.client.data_received(sign)
        world.transport.take()
    assert world.transport.ended is None


def test_a_client_that_speaks_is_not_pinged():
    world = opened(ws_ping_interval_s=20)
    for _ in range(100):
        world.clock.advance(5)
        world.client.data_received(client_frame(1, b"a"))
    assert world.transport.written == b""


def test_no_pings_at_all():
    world = opened(ws_ping_interval_s=0)
    world.clock.advance(1000)
    assert world.transport.written == b""
    assert world.shared.deadlines.statistics().armed_count == 0


def test_pings_without_a_timeout():
    world = opened(ws_ping_interval_s=20, ws_ping_timeout_s=0)
    world.clock.advance(205)
    assert world.transport.ended is None
    assert 8 <= world.transport.take().count(PING_FRAME) <= 10


def test_the_ping_timeout_stands_still_while_the_client_is_not_read():
    world = opened(ws_ping_interval_s=20, ws_ping_timeout_s=10)
    world.clock.advance(21)
    assert world.transport.take() == PING_FRAME
    world.client.pause_reading()
    world.clock.advance(300)
    assert world.transport.ended is None
    # It is pinged on: a client whose process is gone answers with a reset.
    assert world.transport.take().count(PING_FRAME) >= 10
    world.client.resume_reading()
    world.clock.advance(9)
    assert world.transport.ended is None
    world.clock.advance(40)
    assert world.transport.ended == "abort"


def test_a_slow_client_that_reads_is_not_given_up():
    """Its pong stands behind all that it has to read first."""
    world = opened(ws_ping_interval_s=20, ws_ping_timeout_s=10)
    world.client.pause_producing()
    for left in range(60_000, 0, -5_000):
        world.transport.dataBuffer = b"x" * left
        world.clock.advance(10)
    assert world.transport.ended is None
    world.clock.advance(60)  # nothing moves any more
    assert world.transport.ended == "abort"


def test_clients_that_came_together_are_looked_at_apart(monkeypatch):
    looks = []
    monkeypatch.setattr(Deadlines, "arm", lambda self, item, delay_s: looks.append(delay_s))
    for _ in range(50):
        opened(ws_ping_interval_s=20)
    first_looks = [delay for delay in looks if delay <= 20]
    assert max(first_looks) - min(first_looks) > 5


def test_repr_and_statistics_show_the_state():
    world = opened()
    assert "OPEN" in repr(world.client)
    statistics = world.shared.statistics()
    assert (statistics.connecting_count, statistics.open_count, statistics.closing_count) == (0, 1, 0)
    world.connection.send({"type": "websocket.close"})
    assert world.shared.statistics().closing_count == 1


# With real sockets


@asynccontextmanager
async def server(application=None, *, accept=True, on_open=None, **changes):
    """A listener whose application echoes; yields the connections, and its port with them."""
    loop = asyncio.get_running_loop()
    connections = FakeConnections()

    def echo(connection, event):
        connection.send({**event, "type": "websocket.send"})

    def accept_soon(connection):
        loop.call_soon(connection.send, {"type": "websocket.accept"})

    connections.application = echo if application is None else application
    connections.on_open = on_open or (accept_soon if accept else None)
    async with listener(connections, build_settings(**changes)) as (connections.port, connections.shared):
        yield connections


@asynccontextmanager
async def listener(connections, settings):
    loop = asyncio.get_running_loop()
    reactor = AsyncioSelectorReactor(loop)
    deadlines = Deadlines(call_later=loop.call_later, clock=loop.time, tick_s=0.02)
    access_log = AccessLog(wanted=False)
    server_headers = ServerHeaders(date=True, server=True, clock=lambda: 0)
    shared = WebSockets(
        settings=settings,
        connections=connections,
        access_log=access_log,
        deadlines=deadlines,
        server_headers=server_headers,
    )
    end_watch = EndWatch(reactor)
    factory = HttpFactory(
        settings=settings,
        connections=connections,
        websockets=shared,
        access_log=access_log,
        deadlines=deadlines,
        server_headers=server_headers,
        end_watch=end_watch,
    )
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    try:
        shared.protocols = factory.protocols
        yield port.getHost().port, shared
    finally:
        await port.stopListening().asFuture(loop)
        factory.abort()
        await until(lambda: not factory.protocols)
        end_watch.close()
        deadlines.close()


def url(connections):
    return f"ws://127.0.0.1:{connections.port}/ws?a=1"


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def raw(connections, *, receive_buffer=None):
    """A TCP connection with a completed handshake."""
    return await raw_to(connections.port, receive_buffer=receive_buffer)


async def raw_to(port, *, receive_buffer=None):
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock)
    head = build_head()
    lines = [b"GET /ws HTTP/1.1", *(name + b": " + value for name, value in head.headers), b"\r\n"]
    writer.write(b"\r\n".join(lines))
    answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 101 ")
    return reader, writer


async def test_echo_of_everything():
    async with server() as connections, connect(url(connections), max_size=None, compression=None) as client:
        for message in ("", b"", "hällo", b"\0\xff", "x" * 126, b"y" * 70_000, "€" * 400_000):
            await client.send(message)
            assert await client.recv() == message


async def test_fragments_with_pings_between_them():
    async with server() as connections, connect(url(connections), compression=None) as client:

        async def parts():
            for part in ("a", "b", "", "c"):
                yield part
                pong = await client.ping()
                await pong

        await client.send(parts())
        assert await client.recv() == "abc"


async def test_subprotocol_and_headers():
    def on_open(connection):
        event = {"type": "websocket.accept", "subprotocol": "b", "headers": [[b"x-a", b"1"], [b"x-a", b"2"]]}
        asyncio.get_running_loop().call_soon(connection.send, event)

    async with server(on_open=on_open) as connections:
        async with connect(url(connections), subprotocols=["a", "b"]) as client:
            assert client.subprotocol == "b"
            assert client.response.headers.get_all("x-a") == ["1", "2"]
            assert "date" in client.response.headers
        scope = connections.opened[0].scope
        assert scope["subprotocols"] == ["a", "b"]
        assert scope["query_string"] == b"a=1"


async def test_a_refused_handshake():
    def on_open(connection):
        asyncio.get_running_loop().call_soon(connection.send, {"type": "websocket.close"})

    async with server(on_open=on_open) as connections:
        with pytest.raises(websockets.InvalidStatus) as caught:
            await connect(url(connections))
        assert caught.value.response.status_code == 403


async def test_a_handshake_timeout():
    async with server(accept=False, ws_handshake_timeout_s=0.1) as connections:
        with pytest.raises(websockets.InvalidStatus) as caught:
            await connect(url(connections))
        assert caught.value.response.status_code == 504


async def test_a_real_client_sees_our_close():
    def application(connection, event):
        connection.send({"type": "websocket.send", "text": "first"})
        connection.send({"type": "websocket.close", "code": 4001, "reason": "becäuse"})

    async with server(application) as connections, connect(url(connections)) as client:
        await client.send("x")
        assert await client.recv() == "first"
        with pytest.raises(websockets.ConnectionClosed):
            await client.recv()
        await client.wait_closed()
        assert (client.close_code, client.close_reason) == (4001, "becäuse")
        await until(lambda: not connections.shared.clients)


async def test_a_real_client_closes():
    async with server() as connections:
        async with connect(url(connections)) as client:
            await client.send("x")
            await client.recv()
            await client.close(3005, "done")
        assert client.close_code == 3005
        assert connections.opened[0].last_event == {"type": "websocket.disconnect", "code": 3005, "reason": "done"}
        await until(lambda: not connections.shared.clients)


async def test_an_oversized_message_is_1009_also_while_it_is_being_sent():
    async with server(ws_max_size_bytes=100_000) as connections:
        reader, writer = await raw(connections)
        writer.write(client_frame(2, b"x" * 100_000))
        await reader.readexactly(100_010)
        writer.write(client_frame(2, length=20_000_000))
        for _ in range(200):
            writer.write(b"x" * 100_000)
            await writer.drain()
        assert await reader.read() == build_close(1009, "message larger than 100000 bytes")
        assert connections.opened[0].last_event["code"] == 1009
        writer.close()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (client_frame(1, b"\xff"), 1007),
        (client_frame(1, b"a", mask=None), 1002),
        (client_frame(9, b"x" * 126), 1002),
        (client_frame(5, b"a"), 1002),
        (client_close(1006), 1002),
    ],
    ids=["invalid UTF-8", "unmasked", "long control frame", "reserved opcode", "code that is never sent"],
)
async def test_faults_reach_the_client_with_their_code(data, code):
    async with server() as connections:
        reader, writer = await raw(connections)
        writer.write(data + b"garbage behind it" * 1000)
        head = await reader.readexactly(4)
        assert head[0] == 0x88
        assert head[2:4] == code.to_bytes(2, "big")
        assert len(await reader.read()) == head[1] - 2  # the end, not a reset
        writer.close()
        await until(lambda: not connections.shared.clients)
        assert connections.opened[0].last_event["code"] == code


async def test_byte_by_byte():
    async with server() as connections:
        reader, writer = await raw(connections)
        for byte in client_frame(1, "hällo".encode()) + client_frame(9, b"p") + client_close(1000):
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0)
        assert await reader.read() == build_frame(TEXT, "hällo".encode()) + build_frame(PONG, b"p") + build_close(
            1000
        )
        writer.close()


async def test_a_client_that_vanishes():
    async with server() as connections:
        _, writer = await raw(connections)
        writer.transport.abort()
        await until(lambda: connections.opened[0].last_event is not None)
        assert connections.opened[0].last_event["code"] == 1006
        await until(lambda: not connections.shared.clients)


async def test_a_client_that_ends_its_side_without_a_close():
    async with server() as connections:
        reader, writer = await raw(connections)
        writer.write(client_frame(1, b"last"))
        writer.write_eof()
        await until(lambda: connections.opened[0].last_event is not None)
        assert [event["text"] for event in connections.opened[0].events] == ["last"]
        assert connections.opened[0].last_event["code"] == 1006
        await reader.read()
        writer.close()


async def test_a_client_that_vanishes_while_it_is_not_read():
    def application(connection, event):
        connection.client.pause_reading()

    async with server(application, ws_ping_interval_s=0.1) as connections:
        _, writer = await raw(connections)
        writer.write(client_frame(1, b"a") * 3)
        await until(lambda: connections.opened[0].events)
        writer.close()  # the kernel answers our next ping with a reset
        await until(lambda: connections.opened[0].last_event is not None)
        assert connections.opened[0].last_event["code"] == 1006
        assert len(connections.opened[0].events) == 1


async def test_a_client_that_does_not_read_pauses_delivery_and_then_gets_everything():
    async with server(lambda connection, event: None) as connections:
        reader, writer = await raw(connections, receive_buffer=4096)
        writer.write(client_frame(1, b"go"))
        await until(lambda: connections.opened[0].events)
        connection = connections.opened[0]
        count = 0
        async with asyncio.timeout(30):
            while not connection.is_delivery_paused:
                connection.send({"type": "websocket.send", "bytes": b"x" * 10_000})
                count += 1
                await asyncio.sleep(0)
        assert 0 < connection.client.buffered_bytes() < 200_000
        received = 0
        while received < count * 10_004:
            received += len(await reader.read(65536))
        await until(lambda: not connection.is_delivery_paused)
        assert connection.client.buffered_bytes() == 0
        writer.close()


async def test_frames_of_one_loop_turn_are_sent_at_once():
    def application(connection, event):
        for number in range(100):
            connection.send({"type": "websocket.send", "text": str(number)})

    async with server(application) as connections:
        reader, writer = await raw(connections)
        writer.write(client_frame(1, b"go"))
        expected = b"".join(build_frame(TEXT, b"%d" % number) for number in range(100))
        assert await reader.read(65536) == expected
        writer.close()


# With real sockets and connections.py: group messages and credit


class Side:
    """The worker's side of a real Connections."""

    def __init__(self, settings):
        self.layer = FakeLayer()
        self.connections = Connections(self.layer, settings, loop=asyncio.get_running_loop())

    async def accept(self, number):
        """Take the connection with this number and accept it."""
        await until(lambda: len(self.layer.calls) >= number)
        self.layer.calls[number - 1][3].set_result(b"element %d" % number)
        self.frame(build_claim(number, 1))
        self.send(number, {"type": "websocket.accept"})

    def frame(self, encoded):
        self.connections.frame_received("wworker", msgpack.unpackb(encoded))

    def send(self, number, event):
        self.frame(build_event(number, 1, encode_event(event)))

    def group_send(self, numbers, event):
        channels = [f"interface.iinterface!{number}" for number in numbers]
        self.connections.deliver(channels, encode_message(event))

    def events(self, kind):
        """Events that were sent to the worker in frames of this kind."""
        return [decode_event(frame[3]) for _, frame in self.layer.sent if frame[0] == kind]


@asynccontextmanager
async def real_server(**changes):
    settings = build_settings(**changes)
    side = Side(settings)
    async with listener(side.connections, settings) as (port, shared):
        side.port, side.shared = port, shared
        try:
            yield side
        finally:
            side.connections.cut()
            side.connections.close()


async def test_what_groups_and_the_application_send_arrives_in_order():
    async with real_server() as side:
        opening = asyncio.ensure_future(raw_to(side.port))
        await side.accept(1)
        reader, writer = await opening
        for number in range(0, 200, 2):
            side.group_send([1], {"type": "websocket.send", "text": str(number)})
            side.send(1, {"type": "websocket.send", "text": str(number + 1)})
            if not number % 20:
                await asyncio.sleep(0)
        expected = b"".join(build_frame(TEXT, b"%d" % number) for number in range(200))
        assert await reader.readexactly(len(expected)) == expected
        writer.close()


async def test_a_client_that_does_not_read_broadcasts_is_closed_and_the_others_notice_nothing():
    async with real_server(client_buffer_bytes_max=300_000, ws_close_timeout_s=0.2) as side:
        clients = []
        for number in range(1, 6):
            opening = asyncio.ensure_future(raw_to(side.port, receive_buffer=4096 if number == 1 else None))
            await side.accept(number)
            clients.append(await opening)
        received = [0] * 5
        frame_bytes = len(build_frame(TEXT, b"x" * 20_000))

        async def read(position):
            while data := await clients[position][0].read(65536):
                received[position] += len(data)

        readers = [asyncio.ensure_future(read(position)) for position in range(1, 5)]
        count = 0
        while side.connections.open_count == 5:
            side.group_send(range(1, 6), {"type": "websocket.send", "text": "x" * 20_000})
            count += 1
            assert count < 1000
            expected = count * frame_bytes
            await until(lambda expected=expected: min(received[1:]) >= expected)
        assert received[1:] == [count * frame_bytes] * 4
        disconnects = side.events(FrameKind.LAST)
        assert [event["code"] for event in disconnects] == [1013]
        assert side.connections.memory.statistics().dropped_by_client_limit_count == 1
        assert side.connections.memory.statistics().held_bytes == 0
        # It gets what the sockets hold, then the end.
        await until(lambda: len(side.shared.clients) == 4)
        side.group_send(range(1, 6), {"type": "websocket.close", "code": 4000})
        async with asyncio.timeout(30):
            for _, writer in clients[1:]:
                writer.write(client_close(4000))
            await asyncio.gather(*readers)
        assert received[1:] == [count * frame_bytes + 4] * 4
        for _, writer in clients:
            writer.close()


async def test_a_window_of_messages_stops_the_reading_and_credit_goes_on_with_it():
    async with real_server(window_bytes=128 * 1024) as side:
        opening = asyncio.ensure_future(raw_to(side.port))
        await side.accept(1)
        _, writer = await opening
        payload = b"x" * 1000
        message = client_frame(2, payload)
        writer.write(message * 2000)
        (client,) = side.shared.clients
        await until(lambda: client._reading_paused)
        taken = len(side.events(FrameKind.EVENT))
        assert 100 < taken < 140  # 128 KiB
        total = 0
        while taken < 2000:
            total = sum(max(64, len(frame[3])) for _, frame in side.layer.sent if frame[0] == FrameKind.EVENT)
            side.frame(build_credit(1, 1, total))
            before = taken
            await until(lambda before=before: len(side.events(FrameKind.EVENT)) > before)
            taken = len(side.events(FrameKind.EVENT))
        assert side.events(FrameKind.EVENT) == [{"type": "websocket.receive", "bytes": payload}] * 2000
        writer.close()


async def test_an_upgrade_that_waited_behind_another_request_is_read():
    """Much was pipelined behind the first request, so the socket was not read any more."""
    async with real_server() as side:
        reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
        head = build_head()
        lines = [b"GET /ws HTTP/1.1", *(name + b": " + value for name, value in head.headers), b"\r\n"]
        writer.write(b"GET /plain HTTP/1.1\r\nhost: example.org\r\n\r\n" + b"\r\n".join(lines))
        messages = client_frame(2, b"x" * 1000) * 200
        writer.write(messages)
        await until(lambda: side.layer.calls)
        side.layer.calls[0][3].set_result(b"element 1")
        side.frame(build_claim(1, 1))
        (protocol,) = side.shared.protocols
        await until(lambda: not protocol._is_reading)
        side.send(1, {"type": "http.response.start", "status": 204, "headers": []})
        side.send(1, {"type": "http.response.body"})
        await side.accept(2)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        await until(lambda: len(side.events(FrameKind.EVENT)) >= 200)
        writer.close()
