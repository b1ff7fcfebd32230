"""Connections between fake clients and a fake layer: claims, credit, lost openings, messages of groups.

The worker's side is the real flow control (channel_layer.connection), so that credit is exact.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import time

import msgpack
import pytest

from channel_layer.codec import decode_event, encode_event, encode_message
from channel_layer.connection import IncomingEvents, OutgoingEvents
from channel_layer.errors import BrokerUnavailable, ChannelFull
from channel_layer.frames import (
    FrameKind,
    Outcome,
    build_adopt,
    build_answer,
    build_claim,
    build_closed,
    build_credit,
    build_end,
    build_event,
    build_events,
    build_gone,
    build_grant,
    build_last,
    build_piece,
    build_receiving,
    build_release,
    build_released,
    build_state,
)
from channel_layer.openings import decode_opening
from interface_server.broadcast import JoinedBroadcasts
from interface_server.client import Refusal
from interface_server.client_connection import TRANSITIONS, UNCLAIMED_BYTES_MAX, ClientConnection, State
from interface_server.connections import Connections
from interface_server.settings import InterfaceSettings

WORKER, OTHER = "wworker", "wother"
GOODBYE = {"type": "websocket.disconnect", "code": 1001}


class FakeLayer:
    """Records frames; openings are stored when the test says so (``settle``)."""

    def __init__(self):
        self.process_id = "iinterface"
        self.broker_reachable = True
        self.sent: list[tuple[str, list]] = []
        self.congested: set[str] = set()
        self.forgotten: list[str] = []
        self.calls: list[tuple] = []  # (name, channel, argument, future)

    def link_send(self, peer, frame):
        self.sent.append((peer, msgpack.unpackb(frame)))

    def link_is_congested(self, peer):
        return peer in self.congested

    def hold_inbox(self, held):
        self.calls.append(("hold", None, held, None))

    def forget_channels(self, channels):
        self.forgotten.extend(channels)

    def _call(self, name, channel, argument):
        future = asyncio.get_running_loop().create_future()
        self.calls.append((name, channel, argument, future))
        return future

    def push_opening(self, channel, opening, *, exempt=False):
        return self._call("push", channel, opening)

    def find_openings(self, channel, elements):
        return self._call("find", channel, list(elements))

    def remove_opening(self, channel, element):
        return self._call("remove", channel, element)


class FakeClient:
    def __init__(self):
        self.log: list = []
        self.writes: list = []  # broadcasts that came in one piece
        self.connection = None
        self.on_event = None
        self.buffered = 0

    def application_event(self, event):
        self.log.append(event)
        if self.on_event is not None:
            self.on_event(event)

    def whole_response(self, status, headers, body):
        self.application_event({"type": "http.response", "status": status, "headers": headers, "body": body})

    def send_broadcast(self, broadcast):
        if isinstance(broadcast, JoinedBroadcasts):
            self.writes.append(broadcast)
            self.log += [one.payload for one in broadcast.broadcasts]
        else:
            self.log.append(broadcast.payload)

    def application_receiving(self):
        self.log.append("receiving")

    def application_ended(self, outcome):
        self.log.append(outcome)

    def refused(self, refusal):
        self.log.append(refusal)

    def pause_reading(self):
        self.log.append("pause")

    def resume_reading(self):
        self.log.append("resume")

    def buffered_bytes(self):
        return self.buffered


class Bench:
    """Connections, the fakes around them, and a clock."""

    def __init__(self, **settings):
        self.layer = FakeLayer()
        self.now = 1000.0
        self.timers: list[list] = []
        self.connections = Connections(
            self.layer,
            InterfaceSettings(redis_url="redis://unused", **settings),
            loop=asyncio.get_running_loop(),
            clock=lambda: self.now,
            call_later=self.call_later,
        )

    def call_later(self, delay_s, callback, *arguments):
        timer = [self.now + delay_s, callback, arguments]
        self.timers.append(timer)

        class Handle:
            def cancel(_):
                if timer in self.timers:
                    self.timers.remove(timer)

        return Handle()

    async def advance(self, seconds):
        """Let time pass in steps of the timers."""
        end = self.now + seconds
        while due := [timer for timer in self.timers if timer[0] <= end]:
            timer = min(due, key=lambda timer: timer[0])
            self.timers.remove(timer)
            self.now = max(self.now, timer[0])
            timer[1](*timer[2])
            await turn()
        self.now = end

    def open(self, protocol="websocket", first_event=None, **keywords):
        client = FakeClient()
        client.connection = self.connections.open(
            client, protocol=protocol, scope={"type": protocol}, first_event=first_event, **keywords
        )
        return client

    async def answer(self, name, result):
        """Answer the oldest open call of that name; an exception is raised in it."""
        call = next(call for call in self.layer.calls if call[0] == name and not call[3].done())
        if isinstance(result, Exception):
            call[3].set_exception(result)
        else:
            call[3].set_result(result)
        await turn()
        return call

    def open_calls(self, name):
        return [call for call in self.layer.calls if call[0] == name and not call[3].done()]

    def frame(self, encoded, peer=WORKER):
        self.connections.frame_received(peer, msgpack.unpackb(encoded))

    def take_sent(self):
        sent, self.layer.sent = self.layer.sent, []
        return sent

    async def owned(self, protocol="websocket", **keywords):
        """A connection that WORKER has."""
        client = self.open(protocol, **keywords)
        await self.answer("push", b"element%d" % client.connection.number)
        self.frame(build_claim(client.connection.number, 1))
        assert client.connection.state is State.OWNED
        self.take_sent()
        return client

    async def accepted(self, **keywords):
        client = await self.owned(**keywords)
        client.connection.accept_broadcasts()
        return client

    def group_send(self, message, *clients):
        self.connections.deliver([client.connection.reply_channel for client in clients], encode_message(message))


async def turn():
    """Let callbacks of finished futures run, and slices of a fan-out."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def bench():
    bench = Bench()
    yield bench
    check_books(bench)


def check_books(bench):
    """What must hold at any time between two calls."""
    connections = bench.connections
    known = connections._connections
    assert all(connection.state is not State.OVER for connection in known.values())
    alive = {connection.reply_channel for connection in known.values() if connection.is_alive}
    ending = {connection.reply_channel for connection in known.values() if connection.state is State.ENDING}
    assert set(connections._reply_channels) == alive - ending
    assert connections.open_count == len(alive)
    for peer, owned in connections._peers.items():
        assert owned
        assert all(connection.peer == peer for connection in owned)
    assert {connection for connection in known.values() if connection.peer is not None} == {
        connection for owned in connections._peers.values() for connection in owned
    }
    if not known:
        assert connections.memory.statistics().held_bytes == 0
        assert len(connections._watch) == 0
        assert not connections._parked


def number_of(client):
    return client.connection.number


def text(content):
    return {"type": "websocket.send", "text": content}


# Opening and claims


async def test_an_opening_says_everything_a_worker_needs(bench):
    first = {"type": "http.request", "body": b"a", "more_body": True}
    client = bench.open("http", first, tell_receiving=True)
    ((_, channel, encoded, _),) = bench.open_calls("push")
    opening = decode_opening(encoded)
    assert channel == "http.request"
    assert (opening.interface, opening.connection, opening.epoch) == ("iinterface", 1, 1)
    assert opening.reply_channel == "interface.iinterface!1" == client.connection.reply_channel
    assert opening.scope["extensions"]["channel_layer"] == {"reply_channel": "interface.iinterface!1"}
    assert decode_event(opening.first_event) == first
    assert opening.tell_receiving
    bench.open("websocket")
    assert bench.open_calls("push")[1][1] == "websocket.connect"


async def test_numbers_are_never_used_again(bench):
    first = bench.open()
    first.connection.finished()
    assert number_of(bench.open()) == number_of(first) + 1


async def test_the_first_claim_wins_and_every_other_is_answered_closed(bench):
    client = bench.open()
    await bench.answer("push", b"element")
    bench.frame(build_claim(1, 1))
    bench.frame(build_claim(1, 1), OTHER)
    bench.frame(build_claim(1, 2), OTHER)
    bench.frame(build_claim(1, 2), WORKER)
    bench.frame(build_claim(99, 1), OTHER)
    assert bench.take_sent() == [
        (WORKER, msgpack.unpackb(build_grant(1, 1))),
        (OTHER, msgpack.unpackb(build_closed(1, 1))),
        (OTHER, msgpack.unpackb(build_closed(1, 2))),
        (WORKER, msgpack.unpackb(build_closed(1, 2))),
        (OTHER, msgpack.unpackb(build_closed(99, 1))),
    ]
    assert client.connection.peer == WORKER


async def test_a_second_claim_of_the_owner_does_not_end_its_instance(bench):
    client = await bench.owned()
    bench.frame(build_claim(number_of(client), 1))
    assert bench.take_sent() == []
    assert client.connection.state is State.OWNED


RESPONSE = {"type": "http.response", "status": 200, "headers": [[b"x", b"y"]], "body": b"hello"}


def answer_of(client, epoch=1):
    return build_answer(number_of(client), epoch, 200, [(b"x", b"y")], b"hello")


@pytest.mark.parametrize("stored", [True, False])
async def test_an_answer_is_claim_events_and_end_in_one(bench, stored):
    client = bench.open("http")
    if stored:
        await bench.answer("push", b"element")
    bench.frame(answer_of(client))
    assert client.log == [RESPONSE]
    assert client.connection.state is State.OVER
    assert bench.layer.sent == []
    if not stored:
        await bench.answer("push", b"element")
    assert not bench.open_calls("remove")
    assert bench.connections.open_count == 0
    bench.frame(answer_of(client), OTHER)  # of the second copy of an opening
    assert client.log == [RESPONSE]
    assert bench.layer.sent == []
    assert bench.connections.statistics().dropped == {"answer nobody waits for": 1}


async def test_an_answer_to_a_connection_that_waits_for_the_broker(bench):
    client = bench.open("http")
    await bench.answer("push", BrokerUnavailable("gone"))
    assert client.connection.state is State.PARKED
    bench.frame(answer_of(client))
    assert client.log == [RESPONSE]


async def test_an_answer_of_the_owner_ends_the_connection(bench):
    client = await bench.owned("http")
    bench.frame(answer_of(client))
    assert client.log == [RESPONSE]
    assert client.connection.state is State.OVER
    assert bench.layer.sent == []
    assert bench.connections.open_count == 0
    bench.connections.peer_ended(WORKER, "killed")
    assert client.log == [RESPONSE]


async def test_an_answer_of_the_owner_to_a_client_that_has_left(bench):
    client = await bench.owned("http")
    client.connection.client_gone({"type": "http.disconnect"})
    bench.take_sent()
    bench.frame(answer_of(client))
    assert client.log == []
    assert client.connection.state is State.OVER
    assert bench.layer.sent == []


async def test_an_answer_to_a_websocket_is_a_fault_of_the_worker(bench, caplog):
    client = bench.open("websocket")
    bench.frame(answer_of(client))
    assert client.log == [Refusal.PROTOCOL]
    assert client.connection.state is State.OVER
    assert "an ANSWER to a websocket" in caplog.text


async def test_an_answer_does_not_touch_what_another_worker_has_or_another_epoch(bench):
    owned = await bench.owned("http")
    bench.frame(answer_of(owned), OTHER)
    waiting = bench.open("http")
    bench.frame(answer_of(waiting, epoch=2))
    assert owned.log == waiting.log == []
    assert bench.layer.sent == []
    assert owned.connection.state is State.OWNED
    assert waiting.connection.is_unclaimed


@pytest.mark.parametrize("of_the_owner", [False, True])
async def test_an_answer_waits_for_a_client_that_does_not_read(bench, of_the_owner):
    client = await bench.owned("http") if of_the_owner else bench.open("http")
    client.connection.pause_delivery()
    bench.frame(answer_of(client))
    assert client.log == []
    assert client.connection.state is State.ENDING
    client.connection.resume_delivery()
    assert client.log == [RESPONSE, Outcome.RETURNED]
    assert client.connection.state is State.OVER


async def test_an_answer_ends_the_wait_for_the_broker_also_while_the_client_does_not_read(bench):
    client = bench.open("http")
    await bench.answer("push", BrokerUnavailable("gone"))  # and it was stored all the same
    client.connection.pause_delivery()
    bench.frame(answer_of(client))
    assert client.connection.state is State.ENDING
    await bench.advance(10)
    bench.connections.broker_changed(True)
    assert bench.open_calls("push") == []
    client.connection.resume_delivery()
    assert client.log == [RESPONSE, Outcome.RETURNED]


async def test_an_answer_drops_what_a_group_sent_before(bench):
    client = bench.open("http")
    bench.group_send({"type": "http.response.body", "body": b"early", "more_body": True}, client)
    bench.frame(answer_of(client))
    assert client.log == [RESPONSE]


async def test_an_answer_that_cannot_be_delivered_is_refused(bench, caplog):
    client = bench.open("http")
    client.on_event = lambda event: 1 / 0
    bench.frame(answer_of(client))
    assert client.log == [RESPONSE, Refusal.PROTOCOL]
    assert "could not be delivered" in caplog.text


async def test_a_claim_may_come_before_the_broker_s_answer(bench):
    client = bench.open()
    bench.frame(build_claim(1, 1))
    assert client.connection.state is State.OWNED
    await bench.answer("push", b"element")
    await bench.advance(60)
    assert bench.open_calls("find") == bench.open_calls("remove") == []
    assert client.log == []


async def test_a_full_channel_refuses_at_once(bench):
    client = bench.open()
    await bench.answer("push", ChannelFull("full"))
    assert client.log == [Refusal.QUEUE_FULL]
    assert bench.layer.forgotten == [client.connection.reply_channel]
    assert bench.connections.statistics().refused == {"QUEUE_FULL": 1}


async def test_an_error_of_ours_refuses_and_is_logged(bench, caplog):
    client = bench.open()
    await bench.answer("push", ValueError("odd"))
    assert client.log == [Refusal.BROKER_DOWN]
    assert "odd" in caplog.text


async def test_a_client_that_leaves_before_the_claim_takes_its_opening_with_it(bench):
    client = bench.open()
    await bench.answer("push", b"element")
    client.connection.client_gone(GOODBYE)
    assert [call[1:3] for call in bench.open_calls("remove")] == [("websocket.connect", b"element")]
    await bench.answer("remove", True)
    bench.frame(build_claim(1, 1))
    assert bench.take_sent() == [(WORKER, msgpack.unpackb(build_closed(1, 1)))]
    assert client.log == []


async def test_a_client_that_leaves_while_its_opening_is_being_stored(bench):
    client = bench.open()
    client.connection.client_gone(GOODBYE)
    assert bench.open_calls("remove") == []
    await bench.answer("push", b"element")
    assert [call[2] for call in bench.open_calls("remove")] == [b"element"]
    await bench.answer("remove", BrokerUnavailable("away"))


async def test_the_limit_of_connections():
    bench = Bench(connections_max=1)
    first, second = bench.open("http"), bench.open("http")
    assert second.log == [], "never before open() has returned"
    await turn()
    assert second.log == [Refusal.TOO_MANY]
    first.connection.finished()
    third = bench.open("http")
    await turn()
    assert third.log == []
    check_books(bench)


# The broker is away


async def test_without_a_broker_a_new_connection_waits_and_is_then_refused(bench):
    bench.layer.broker_reachable = False
    first = bench.open()
    await bench.advance(3)
    second = bench.open()
    await bench.advance(1.9)
    assert first.log == []
    await bench.advance(0.2)
    assert (first.log, second.log) == ([Refusal.BROKER_DOWN], [])
    await bench.advance(3)
    assert second.log == [Refusal.BROKER_DOWN]
    assert bench.layer.calls == []


async def test_when_the_broker_comes_back_what_waits_is_stored(bench):
    bench.layer.broker_reachable = False
    clients = [bench.open() for _ in range(3)]
    clients[1].connection.client_gone(GOODBYE)
    bench.layer.broker_reachable = True
    bench.connections.broker_changed(True)
    assert [decode_opening(call[2]).connection for call in bench.open_calls("push")] == [1, 3]
    await bench.advance(10)
    assert clients[0].log == []


async def test_a_push_that_failed_is_tried_again_within_the_same_wait(bench):
    client = bench.open()
    bench.layer.broker_reachable = False
    await bench.answer("push", BrokerUnavailable("lost"))
    assert client.connection.state is State.PARKED
    bench.layer.broker_reachable = True
    bench.connections.broker_changed(True)
    await bench.answer("push", b"element")
    assert client.connection.state is State.WAITING


async def test_a_broker_that_refuses_writes_is_not_asked_for_ever(bench):
    client = bench.open()
    for _ in range(100):
        if not bench.open_calls("push"):
            break
        await bench.answer("push", BrokerUnavailable("read only"))
        await bench.advance(0.25)
    assert client.log == [Refusal.BROKER_DOWN]
    assert 15 < len(bench.layer.calls) <= 21
    await bench.advance(10)
    assert client.log == [Refusal.BROKER_DOWN]


async def test_no_wait_at_all():
    bench = Bench(broker_wait_s=0)
    bench.layer.broker_reachable = False
    client = bench.open()
    assert client.log == []
    await turn()
    assert client.log == [Refusal.BROKER_DOWN]
    check_books(bench)


async def test_only_as_many_wait_for_the_broker_as_a_channel_has_room_for():
    bench = Bench(opening_capacity=2)
    bench.layer.broker_reachable = False
    clients = [bench.open() for _ in range(3)]
    await turn()
    assert [client.log for client in clients] == [[], [], [Refusal.BROKER_DOWN]]


async def test_nobody_is_late_while_the_broker_is_away(bench):
    client = bench.open()
    await bench.answer("push", b"element")
    await bench.advance(1)
    bench.layer.broker_reachable = False
    bench.connections.broker_changed(False)
    await bench.advance(1000)
    assert bench.open_calls("find") == bench.open_calls("remove") == []
    bench.layer.broker_reachable = True
    bench.connections.broker_changed(True)
    await bench.advance(2)
    assert len(bench.open_calls("find")) == 1
    assert client.log == []


async def test_a_claim_of_a_connection_that_waits_for_the_broker_to_store_it_again(bench):
    client = bench.open()
    bench.layer.broker_reachable = False
    await bench.answer("push", BrokerUnavailable("lost after it was stored"))
    bench.frame(build_claim(1, 1))
    assert client.connection.state is State.OWNED
    bench.layer.broker_reachable = True
    bench.connections.broker_changed(True)
    await bench.advance(10)
    assert len(bench.layer.calls) == 1
    assert client.log == []


# Lost and late openings


async def test_a_lost_opening_is_sent_again_three_times_then_refused(bench):
    client = bench.open()
    for copy in range(4):
        await bench.answer("push", b"copy %d" % copy)
        for _ in range(2):
            await bench.advance(3)
            call = await bench.answer("find", [False])
            assert call[2] == [b"copy %d" % copy]
    assert client.log == [Refusal.OPENING_LOST]
    pushes = [call[2] for call in bench.layer.calls if call[0] == "push"]
    assert len(pushes) == 4
    assert len(set(pushes)) == 1, "the same epoch each time"


async def test_a_lost_opening_that_was_only_slow_can_still_be_claimed(bench):
    client = bench.open()
    await bench.answer("push", b"copy 0")
    for _ in range(2):
        await bench.advance(3)
        await bench.answer("find", [False])
    assert client.connection.state is State.PUSHING
    bench.frame(build_claim(1, 1))
    await bench.answer("push", b"copy 1")
    assert client.connection.state is State.OWNED
    bench.frame(build_claim(1, 1), OTHER)
    assert (OTHER, msgpack.unpackb(build_closed(1, 1))) in bench.take_sent()


async def test_the_queue_timeout_removes_the_opening_before_it_refuses(bench):
    client = bench.open()
    await bench.answer("push", b"element")
    while not bench.open_calls("remove"):
        assert bench.now < 1032
        await bench.advance(1)
        if bench.open_calls("find"):
            await bench.answer("find", [True])
    assert bench.now >= 1030
    assert client.log == []
    await bench.answer("remove", True)
    assert client.log == [Refusal.QUEUE_TIMEOUT]
    assert bench.open_calls("remove") == []
    assert bench.connections.statistics().openings.timed_out == 1


async def test_a_claim_that_crosses_the_removal_wins(bench):
    client = bench.open()
    await bench.answer("push", b"element")
    await bench.advance(32)
    assert len(bench.open_calls("remove")) == 1
    bench.frame(build_claim(1, 1))
    await bench.answer("remove", False)
    await bench.advance(10)
    assert client.log == []
    assert client.connection.state is State.OWNED


async def test_taken_at_the_last_moment_and_never_claimed(bench):
    client = bench.open()
    await bench.answer("push", b"element")
    await bench.advance(32)
    await bench.answer("remove", False)
    await bench.advance(4)
    assert client.log == [Refusal.QUEUE_TIMEOUT]


async def test_a_failing_look_is_repeated(bench, caplog):
    bench.open()
    await bench.answer("push", b"element")
    await bench.advance(3)
    await bench.answer("find", BrokerUnavailable("lost"))
    await bench.advance(1)
    await bench.answer("find", RuntimeError("odd"))
    assert "odd" in caplog.text
    await bench.advance(1)
    assert len(bench.open_calls("find")) == 1


async def test_an_idle_table_has_no_timers(bench):
    client = bench.open()
    await bench.answer("push", b"element")
    bench.frame(build_claim(1, 1))
    await bench.advance(5)
    assert bench.timers == []
    client.connection.finished()


# Every frame in every state

FRAMES = {
    FrameKind.CLAIM: build_claim(1, 1),
    FrameKind.GRANT: build_grant(1, 1),
    FrameKind.CLOSED: build_closed(1, 1),
    FrameKind.EVENT: build_event(1, 1, encode_event(text("hello"))),
    FrameKind.PIECE: build_piece(1, 1, b"x"),
    FrameKind.LAST: build_last(1, 1, b"x"),
    FrameKind.GONE: build_gone(1, 1),
    FrameKind.CREDIT: build_credit(1, 1, 0),
    FrameKind.RECEIVING: build_receiving(1, 1),
    FrameKind.END: build_end(1, 1, Outcome.RETURNED),
    FrameKind.EVENTS: build_events([(1, 1)], encode_event(text("hello"))),
    FrameKind.ANSWER: build_answer(1, 1, 200, [(b"x", b"y")], b"hello"),
    FrameKind.STATE: build_state(1, 1, 0, 0, b"state"),
    FrameKind.RELEASE: build_release(1, 1),
    FrameKind.RELEASED: build_released(1, 1, True),
    FrameKind.ADOPT: build_adopt(1, 1, b"opening", b"state", 0),
}
# What happens where the connection is owned by the sender: (client's log, state).
EFFECT = {
    State.OWNED: {
        FrameKind.CLOSED: ([], State.PUSHING),  # nothing was answered yet: another worker is asked
        FrameKind.EVENT: ([text("hello")], State.OWNED),
        FrameKind.RECEIVING: (["receiving"], State.OWNED),
        FrameKind.END: ([Outcome.RETURNED], State.OVER),
        FrameKind.EVENTS: ([text("hello")], State.OWNED),
        FrameKind.ANSWER: ([Refusal.PROTOCOL], State.OVER),  # it is for HTTP only
    },
    State.LEAVING: {
        FrameKind.ANSWER: ([], State.OVER),
        FrameKind.CLOSED: ([], State.OVER),
        FrameKind.END: ([], State.OVER),
    },
}
# Frames that nobody answers where the connection is not the sender's.
SILENT = {
    *(FrameKind.ANSWER, FrameKind.CLOSED, FrameKind.END, FrameKind.GRANT, FrameKind.LAST, FrameKind.GONE),
    *(FrameKind.RELEASED, FrameKind.ADOPT),
}


async def bring_to(bench, state):
    """Connection 1 in ``state``; returns its client."""
    if state is State.PARKED:
        bench.layer.broker_reachable = False
    client = bench.open()
    if state in (State.PARKED, State.PUSHING):
        return client
    await bench.answer("push", b"element")
    if state is State.WAITING:
        return client
    if state is State.OVER:
        client.connection.finished()
        return client
    bench.frame(build_claim(1, 1))
    if state is State.LEAVING:
        client.connection.finished()
    if state is State.MOVING:
        client.connection.accept_broadcasts()
        bench.frame(build_state(1, 1, 0, 0, b"state"))
        bench.frame(FRAMES[FrameKind.EVENT])
        client.connection.disown(State.MOVING)
        bench.connections._peers.clear()
        assert client.connection.epoch == 2
    if state is State.ENDING:
        client.connection.pause_delivery()
        bench.frame(FRAMES[FrameKind.EVENT])
        bench.frame(FRAMES[FrameKind.END])
    return client


@pytest.mark.parametrize(("state", "kind"), list(itertools.product(State, FRAMES)), ids=lambda value: value.name)
async def test_every_frame_in_every_state(bench, state, kind):
    client = await bring_to(bench, state)
    assert client.connection.state is state
    bench.take_sent()
    client.log.clear()
    bench.frame(FRAMES[kind])
    await turn()
    sent = bench.take_sent()
    if state in EFFECT:
        log, after = EFFECT[state].get(kind, ([], state))
        # Neither accepted nor with a checkpoint, or without its client: it cannot be given away.
        answer = [(WORKER, msgpack.unpackb(build_released(1, 1, False)))] if kind is FrameKind.RELEASE else []
        if kind is FrameKind.ANSWER and state is State.OWNED:
            answer = [(WORKER, msgpack.unpackb(build_closed(1, 1)))]
        assert (client.log, client.connection.state, sent) == (log, after, answer)
    elif kind is FrameKind.CLAIM and state in (State.PARKED, State.PUSHING, State.WAITING):
        assert client.connection.state is State.OWNED
        assert sent == [(WORKER, msgpack.unpackb(build_grant(1, 1)))]
    elif kind is FrameKind.ANSWER and state in (State.PARKED, State.PUSHING, State.WAITING):
        assert (client.log, client.connection.state, sent) == ([Refusal.PROTOCOL], State.OVER, [])
    else:
        assert (client.log, client.connection.state) == ([], state)
        assert sent == ([] if kind in SILENT else [(WORKER, msgpack.unpackb(build_closed(1, 1)))])


@pytest.mark.parametrize("kind", list(FRAMES), ids=lambda kind: kind.name)
@pytest.mark.parametrize(("peer", "epoch"), [(OTHER, 1), (WORKER, 2)])
async def test_no_other_worker_and_no_other_epoch_touches_a_connection(bench, kind, peer, epoch):
    client = await bench.owned()
    frame = msgpack.unpackb(FRAMES[kind])
    if kind is FrameKind.EVENTS:
        frame[1] = [[1, epoch]]
    else:
        frame[2] = epoch
    bench.connections.frame_received(peer, frame)
    await turn()
    assert (client.log, client.connection.state) == ([], State.OWNED)
    assert bench.take_sent() == ([] if kind in SILENT else [(peer, msgpack.unpackb(build_closed(1, epoch)))])


async def test_an_unknown_frame_is_counted(bench):
    bench.connections.frame_received(WORKER, [99, 1, 1])
    assert bench.connections.statistics().dropped == {"frame 99": 1}


async def test_every_transition_leads_somewhere_known():
    assert set(TRANSITIONS) == set(State)


# Events from the application


async def test_events_arrive_in_order_whatever_the_client_s_pauses(bench):
    generator = random.Random(7)
    client = await bench.accepted()
    outgoing = OutgoingEvents(1, 1)
    expected = []
    for index in range(300):
        expected.append(text(f"{index} " + "x" * generator.choice([0, 10, 3000, 70_000, 400_000])))
        outgoing.offer(encode_event(expected[-1]))
        for _ in range(generator.randrange(4)):
            for frame in outgoing.frames():
                bench.frame(frame)
            if generator.random() < 0.3:
                client.connection.pause_delivery()
            elif generator.random() < 0.6:
                client.connection.resume_delivery()
            for _, frame in bench.take_sent():
                assert frame[:3] == [FrameKind.CREDIT, 1, 1]
                outgoing.credit(frame[3])
    client.connection.resume_delivery()
    while not outgoing.is_empty:
        for frame in outgoing.frames():
            bench.frame(frame)
        credits_ = bench.take_sent()
        assert credits_, "somebody waits for ever"
        for _, frame in credits_:
            outgoing.credit(frame[3])
    assert client.log == expected


async def test_a_paused_client_costs_a_window(bench):
    client = await bench.accepted()
    client.connection.pause_delivery()
    outgoing = OutgoingEvents(1, 1)
    for _ in range(1000):
        outgoing.offer(encode_event(text("x" * 1000)))
    frames = outgoing.frames()
    for frame in frames:
        bench.frame(frame)
    assert len(frames) < 262144 / 1000
    assert bench.take_sent() == [], "no credit while nothing is delivered"
    assert client.log == []


async def test_more_than_the_window_ends_the_connection(bench, caplog):
    client = await bench.owned()
    client.connection.pause_delivery()
    for _ in range(300):
        bench.frame(build_event(1, 1, encode_event(text("x" * 1000))))
        if client.log:
            break
    assert client.log == [Refusal.PROTOCOL]
    assert bench.take_sent() == [(WORKER, msgpack.unpackb(build_closed(1, 1)))]
    assert "window" in caplog.text


@pytest.mark.parametrize("paused", [False, True])
async def test_an_event_that_cannot_be_read_ends_the_connection(bench, caplog, paused):
    client = await bench.owned()
    if paused:
        client.connection.pause_delivery()
    bench.frame(build_event(1, 1, b"\xc1"))
    client.connection.resume_delivery()
    assert client.log == [Refusal.PROTOCOL]
    assert bench.take_sent() == [(WORKER, msgpack.unpackb(build_closed(1, 1)))]


async def test_credit_for_what_was_never_sent_ends_the_connection(bench, caplog):
    client = await bench.owned()
    bench.frame(build_credit(1, 1, 10_000))
    assert client.log == [Refusal.PROTOCOL]


async def test_the_end_comes_behind_everything_that_was_sent(bench):
    client = await bench.owned()
    client.connection.pause_delivery()
    bench.frame(FRAMES[FrameKind.EVENT])
    bench.frame(FRAMES[FrameKind.EVENT])
    bench.frame(build_end(1, 1, Outcome.RAISED))
    assert client.log == []
    assert bench.layer.forgotten == [client.connection.reply_channel]
    client.on_event = lambda event: client.connection.pause_delivery()
    client.connection.resume_delivery()
    assert client.log == [text("hello")]
    client.on_event = None
    client.connection.resume_delivery()
    assert client.log == [text("hello"), text("hello"), Outcome.RAISED]
    assert client.connection.state is State.OVER


async def test_a_dead_worker_s_last_events_are_delivered_before_the_refusal(bench):
    paused, idle = await bench.owned("http"), await bench.owned("http")
    elsewhere = bench.open()
    await bench.answer("push", b"element")
    bench.frame(build_claim(number_of(elsewhere), 1), OTHER)
    paused.connection.pause_delivery()
    bench.frame(FRAMES[FrameKind.EVENT])
    bench.connections.peer_ended(WORKER, "lease gone")
    assert (paused.log, idle.log, elsewhere.log) == ([], [Refusal.WORKER_LOST], [])
    paused.connection.resume_delivery()
    assert paused.log == [text("hello"), Refusal.WORKER_LOST]
    assert bench.connections.statistics().refused == {"WORKER_LOST": 2}
    bench.connections.peer_ended(WORKER, "again")


async def test_a_client_may_end_others_while_it_is_told_that_its_worker_died(bench):
    clients = [await bench.owned("http") for _ in range(5)]
    for client in clients:
        client.refused = lambda refusal: [other.connection.client_gone(GOODBYE) for other in clients]
    bench.connections.peer_ended(WORKER, "gone")
    assert bench.connections.open_count == 0


async def test_an_unknown_outcome_of_a_later_release_is_a_failure(bench):
    client = await bench.owned()
    bench.frame(build_end(1, 1, 77))
    assert client.log == [Outcome.RAISED]


async def test_a_client_that_fails_ends_only_its_own_connection(bench, caplog):
    broken, fine = await bench.owned(), await bench.owned()
    broken.on_event = lambda event: 1 / 0
    bench.frame(FRAMES[FrameKind.EVENT])
    bench.frame(build_event(2, 1, encode_event(text("fine"))))
    assert broken.log == [text("hello"), Refusal.PROTOCOL]
    assert fine.log == [text("fine")]
    assert "ZeroDivisionError" in caplog.text


async def test_a_client_that_fails_keeps_nobody_from_hearing_of_a_dead_worker(bench, caplog):
    clients = [await bench.owned("http") for _ in range(3)]
    for client in clients:
        client.refused = lambda refusal: 1 / 0
    bench.connections.peer_ended(WORKER, "it died")
    assert caplog.text.count("ZeroDivisionError") >= 3
    assert bench.connections.open_count == 0
    check_books(bench)


async def test_a_client_that_fails_keeps_nobody_from_a_broadcast(bench, caplog):
    broken, fine = await bench.accepted(), await bench.accepted()
    broken.send_broadcast = lambda broadcast: 1 / 0
    bench.group_send(text("one"), broken, fine)
    await turn()
    bench.group_send(text("two"), broken, fine)
    await turn()
    assert broken.log == [Refusal.PROTOCOL]
    assert fine.log == [b"one", b"two"]
    assert "ZeroDivisionError" in caplog.text
    check_books(bench)


# Events to the application


async def test_events_before_the_claim_wait_and_stop_the_reading(bench):
    client = bench.open("http", {"type": "http.request", "body": b"x" * 8192, "more_body": True})
    await bench.answer("push", b"element")
    event = {"type": "http.request", "body": b"x" * 16384, "more_body": True}
    for _ in range(UNCLAIMED_BYTES_MAX // 16384):
        assert client.log == []
        client.connection.send_event(event)
    assert client.log == ["pause"]
    bench.frame(build_claim(1, 1))
    sent = [frame for _, frame in bench.take_sent()]
    assert [frame[0] for frame in sent] == [FrameKind.GRANT] + [FrameKind.EVENT] * 4
    assert client.log == ["pause", "resume"]


async def test_the_window_stops_the_reading_until_the_application_has_received(bench):
    first = {"type": "http.request", "body": b"x" * 8192, "more_body": True}
    client = await bench.owned("http", first_event=first)
    reader = IncomingEvents(1, 1)
    costs = [reader.receive(FrameKind.EVENT, encode_event(first))[1]]
    event = {"type": "http.request", "body": b"y" * 60_000, "more_body": True}
    for _ in range(5):
        client.connection.send_event(event)
    assert client.log == ["pause"]
    received = bench.take_sent()
    assert [frame[0] for _, frame in received] == [FrameKind.EVENT] * 4
    costs += [reader.receive(frame[0], frame[3])[1] for _, frame in received]
    for cost in costs:
        credit = reader.consume(cost)
        if credit is not None:
            bench.frame(credit)
    assert client.log == ["pause", "resume"]
    assert len(bench.take_sent()) == 1


async def test_a_congested_link_stops_the_reading_until_it_has_room(bench):
    client = await bench.owned()
    bench.layer.congested.add(WORKER)
    client.connection.send_event({"type": "websocket.receive", "text": "1"})
    client.connection.send_event({"type": "websocket.receive", "text": "2"})
    assert (client.log, bench.take_sent()) == (["pause"], [])
    bench.layer.congested.clear()
    bench.connections.peer_ready(WORKER)
    assert [decode_event(frame[3])["text"] for _, frame in bench.take_sent()] == ["1", "2"]
    assert client.log == ["pause", "resume"]
    bench.connections.peer_ready(WORKER)
    assert bench.take_sent() == []


async def test_a_worker_that_dies_while_its_link_is_congested(bench):
    client = await bench.owned("http")
    bench.layer.congested.add(WORKER)
    client.connection.send_event({"type": "http.request", "body": b"1"})
    bench.connections.peer_ended(WORKER, "killed")
    assert client.log == ["pause", Refusal.WORKER_LOST]
    assert bench.connections._waiting_for_link == {}
    bench.connections.peer_ready(WORKER)
    assert bench.take_sent() == []


async def test_what_a_client_says_when_its_instance_is_over_goes_nowhere(bench):
    client = await bring_to(bench, State.ENDING)
    bench.take_sent()
    for _ in range(100):
        client.connection.send_event({"type": "websocket.receive", "text": "x" * 10_000})
    assert (client.log, client.connection.waiting_bytes, bench.take_sent()) == ([], 0, [])


async def test_resuming_may_produce_more_than_fits(bench):
    client = await bench.owned()
    bench.layer.congested.add(WORKER)
    client.connection.send_event({"type": "websocket.receive", "text": "1"})

    def produce():
        client.log.append("resume")
        bench.layer.congested.add(WORKER)
        client.connection.send_event({"type": "websocket.receive", "text": "2"})

    client.resume_reading = produce
    bench.layer.congested.clear()
    bench.connections.peer_ready(WORKER)
    assert client.log == ["pause", "resume", "pause"]


async def test_the_disconnect_comes_behind_the_events_and_gone_before_them(bench):
    client = await bench.owned()
    for index in range(9):
        client.connection.send_event({"type": "websocket.receive", "text": f"{index}" + "x" * 32_000})
    client.connection.client_gone(GOODBYE)
    sent = [frame for _, frame in bench.take_sent()]
    assert [frame[0] for frame in sent] == [FrameKind.EVENT] * 8 + [FrameKind.GONE]
    assert bench.layer.forgotten == [client.connection.reply_channel]
    reader = IncomingEvents(1, 1)
    costs = [reader.receive(frame[0], frame[3])[1] for frame in sent[:8]]
    for cost in costs:
        credit = reader.consume(cost)
        if credit is not None:
            bench.frame(credit)
    rest = [frame for _, frame in bench.take_sent()]
    assert [frame[0] for frame in rest] == [FrameKind.EVENT, FrameKind.LAST]
    assert decode_event(rest[1][3]) == GOODBYE
    assert client.log == ["pause"], "a client that is gone is not called"


async def test_nothing_pending_needs_no_gone(bench):
    client = await bench.owned()
    client.connection.client_gone(GOODBYE)
    assert [frame[0] for _, frame in bench.take_sent()] == [FrameKind.LAST]
    client.connection.client_gone(GOODBYE)
    client.connection.finished(GOODBYE)
    client.connection.send_event({"type": "websocket.receive", "text": "late"})
    assert bench.take_sent() == []


@pytest.mark.parametrize("event", [None, {"type": "http.disconnect"}])
async def test_finished(bench, event):
    client = await bench.owned("http")
    client.connection.finished(event)
    assert [frame[0] for _, frame in bench.take_sent()] == ([] if event is None else [FrameKind.LAST])
    assert client.connection.state is State.LEAVING
    assert bench.connections.open_count == 0
    bench.frame(build_end(1, 1, Outcome.RETURNED))
    assert client.log == []


@pytest.mark.parametrize("how", ["event", "shared event", "group"])
async def test_only_an_instance_that_did_not_complete_its_response_is_told_of_its_end(bench, how):
    client = await bench.owned("http")
    client.connection.accept_broadcasts()
    last = {"type": "http.response.body", "body": b"", "more_body": False}

    def finish(event):
        if event["more_body"] is False:
            client.connection.finished({"type": "http.disconnect"})

    client.on_event = finish
    bench.frame(build_event(1, 1, encode_event({**last, "more_body": True})))
    if how == "event":
        bench.frame(build_event(1, 1, encode_event(last)))
    elif how == "shared event":
        bench.frame(build_events([[1, 1]], encode_event(last)))
    else:
        bench.group_send(last, client)
    await turn()
    assert client.connection.state is State.LEAVING
    assert [frame[0] for _, frame in bench.take_sent()] == ([FrameKind.LAST] if how == "group" else [])


async def test_an_instance_that_is_told_behind_its_events_need_not_send_for_ever(bench):
    """A group ended the response; the instance does not receive what the client sent, and streams on."""
    client = await bench.owned("http")
    for _ in range(9):
        client.connection.send_event({"type": "http.request", "body": b"x" * 32_000, "more_body": True})
    client.connection.finished({"type": "http.disconnect"})
    assert [frame[0] for _, frame in bench.take_sent()][-1] == FrameKind.GONE


async def test_an_instance_that_sends_on_after_the_client_left_is_not_left_waiting(bench):
    client = await bench.owned("http")
    client.connection.pause_delivery()
    outgoing = OutgoingEvents(1, 1)
    for _ in range(100):
        outgoing.offer(encode_event({"type": "http.response.body", "body": b"x" * 50_000, "more_body": True}))
    for frame in outgoing.frames():
        bench.frame(frame)
    assert bench.take_sent() == []
    client.connection.finished()
    for _ in range(200):
        for _, frame in bench.take_sent():
            if frame[0] == FrameKind.CREDIT:
                outgoing.credit(frame[3])
        for frame in outgoing.frames():
            bench.frame(frame)
    assert outgoing.is_empty
    assert client.log == []


# Messages of groups


async def test_a_broadcast_reaches_the_websockets_among_the_members(bench):
    first, second, http = await bench.accepted(), await bench.accepted(), await bench.owned("http")
    bench.group_send(text("hello"), first, second, http)
    bench.group_send({"type": "websocket.send", "bytes": b"\0"}, first)
    await turn()
    assert (first.log, second.log, http.log) == ([b"hello", b"\0"], [b"hello"], [])
    (reason,) = bench.connections.statistics().dropped
    assert "another protocol" in reason


async def test_broadcasts_before_accept_wait_and_come_behind_it(bench):
    client = await bench.owned()
    bench.group_send(text("early"), client)
    await turn()
    assert client.log == []
    client.on_event = lambda event: client.connection.accept_broadcasts()
    bench.frame(build_event(1, 1, encode_event({"type": "websocket.accept"})))
    assert client.log == [{"type": "websocket.accept"}, b"early"]
    assert bench.connections.memory.statistics().held_bytes == 0


async def test_broadcasts_around_an_accept_that_has_to_wait_keep_their_order(bench):
    client = await bench.owned()
    for index in range(3):
        bench.group_send(text(f"before {index}"), client)
    client.connection.pause_delivery()
    bench.frame(build_event(1, 1, encode_event({"type": "websocket.accept"})))
    bench.group_send(text("between"), client)
    bench.frame(FRAMES[FrameKind.EVENT])
    bench.group_send(text("behind"), client)
    client.on_event = lambda event: event["type"] == "websocket.accept" and client.connection.accept_broadcasts()
    client.connection.resume_delivery()
    await turn()
    early = [b"before 0", b"before 1", b"before 2"]
    assert client.log == [{"type": "websocket.accept"}, *early, b"between", text("hello"), b"behind"]
    assert bench.connections.memory.statistics().held_bytes == 0


@pytest.mark.parametrize("paused", [False, True])
async def test_what_is_queued_before_accept_goes_on_waiting_for_it(bench, paused):
    client = await bench.owned()
    if paused:
        client.connection.pause_delivery()
    # Not a plain event: something that stands in the queue until its turn comes.
    bench.frame(build_events([(1, 1)], encode_event({"type": "websocket.http.response.start"})))
    bench.group_send(text("x" * 1000), client)
    bench.group_send({"type": "websocket.close"}, client)
    client.connection.resume_delivery()
    await turn()
    assert client.log == [{"type": "websocket.http.response.start"}, {"type": "websocket.close"}]
    assert bench.connections.memory.statistics().held_bytes == 1000
    client.connection.accept_broadcasts()
    await turn()
    assert client.log[2:] == [b"x" * 1000]
    assert bench.connections.memory.statistics().held_bytes == 0


async def test_broadcasts_that_wait_together_are_joined_once_for_all(bench):
    clients = [await bench.accepted() for _ in range(3)]
    bench.group_send(text("a"), *clients)
    bench.group_send(text("b"), *clients)
    bench.group_send(text("c"), clients[2])
    await turn()
    assert [client.log for client in clients] == [[b"a", b"b"], [b"a", b"b"], [b"a", b"b", b"c"]]
    assert clients[0].writes[0] is clients[1].writes[0]
    assert clients[0].writes[0].frame == b"\x81\x01a\x81\x01b"
    assert clients[2].writes[0].frame == b"\x81\x01a\x81\x01b\x81\x01c"
    bench.group_send(text("a"), *clients)
    await turn()
    assert clients[0].log == [b"a", b"b", b"a"]


async def test_joined_events_of_instances_return_their_credit(bench):
    clients = [await bench.accepted() for _ in range(2)]
    event = encode_event(text("x" * 8000))
    for _ in range(3):
        bench.frame(build_events([(1, 1), (2, 1)], event))
    bench.group_send(text("of a group"), *clients)
    await turn()
    for client in clients:
        assert client.log == [b"x" * 8000] * 3 + [b"of a group"]
        assert len(client.writes) == 1
    for _ in range(8):
        for _ in range(3):
            bench.frame(build_events([(1, 1), (2, 1)], event))
        await turn()
    granted = [frame for _, frame in bench.layer.sent if frame[0] == FrameKind.CREDIT]
    assert {frame[1] for frame in granted} == {1, 2}
    assert max(frame[-1] for frame in granted) >= 24 * len(event)


async def test_a_broadcast_leaves_the_loop_to_others(bench):
    """With 10,000 clients, an HTTP request meanwhile shall wait for 20 ms at most; here is a fifth of both."""
    clients = [await bench.accepted() for _ in range(2000)]
    longest_s = []
    # Once is enough: on a virtual machine what others took of the processor counts as our time, too.
    while not longest_s or (min(longest_s) >= 0.004 and len(longest_s) < 30):
        count = len(longest_s) + 1
        start = time.thread_time()
        bench.group_send(text("x" * 128), *clients)
        turns_s = [time.thread_time() - start]
        while len(clients[-1].log) < count:
            start = time.thread_time()
            await asyncio.sleep(0)
            turns_s.append(time.thread_time() - start)
        assert len(turns_s) > 2000 // 50
        longest_s.append(max(turns_s))
    assert min(longest_s) < 0.004  # 0.8 ms where nothing else runs


async def test_what_comes_while_broadcasts_are_written_is_written_behind_them(bench):
    client = await bench.accepted()
    write = client.send_broadcast

    def write_and_get_more(broadcast):
        write(broadcast)
        if len(client.log) == 2:
            bench.frame(build_event(1, 1, encode_event(text("event"))))

    client.send_broadcast = write_and_get_more
    bench.group_send(text("a"), client)
    bench.group_send(text("b"), client)
    await turn()
    assert client.log == [b"a", b"b", text("event")]


async def test_a_broadcast_and_a_later_event_keep_their_order(bench):
    client = await bench.accepted()
    bench.group_send(text("first"), client)
    bench.frame(build_event(1, 1, encode_event(text("second"))))
    bench.group_send(text("third"), client)
    await turn()
    assert client.log == [b"first", text("second"), b"third"]


async def test_broadcasts_to_a_paused_client_wait_and_are_counted_until_it_reads(bench):
    client = await bench.accepted()
    client.connection.pause_delivery()
    for index in range(3):
        bench.group_send(text(f"{index}" * 1000), client)
        bench.frame(build_event(1, 1, encode_event(text(f"event {index}"))))
    await turn()
    assert client.log == []
    assert bench.connections.memory.statistics().held_bytes == 3000
    client.connection.resume_delivery()
    assert client.log == [
        thing for index in range(3) for thing in (f"{index}".encode() * 1000, text(f"event {index}"))
    ]
    assert bench.connections.memory.statistics().held_bytes == 0
    client.connection.pause_delivery()
    bench.group_send(text("once more"), client)
    assert bench.connections.memory.statistics().held_bytes == 64, "a message counts 64 bytes at least"


async def test_what_a_pause_within_a_fan_out_leaves_behind_is_counted(bench):
    client = await bench.accepted()
    for index in range(4):
        bench.group_send(text(f"{index}" * 10_000), client)  # too much for one write
    assert bench.connections.memory.statistics().held_bytes == 0, "it merely waits for its turn"
    write = client.send_broadcast

    def write_and_pause(broadcast):
        write(broadcast)
        client.connection.pause_delivery()

    client.send_broadcast = write_and_pause
    await turn()
    assert len(client.log) == 1
    assert bench.connections.memory.statistics().held_bytes == 30_000
    client.send_broadcast = write
    client.connection.resume_delivery()
    bench.group_send(text("last"), client)
    await turn()
    assert client.log[-1] == b"last"
    assert bench.connections.memory.statistics().held_bytes == 0


async def test_a_client_that_does_not_read_broadcasts_is_closed(bench):
    slow, fast = await bench.accepted(), await bench.accepted()
    slow.connection.pause_delivery()
    for _ in range(12):
        bench.group_send(text("x" * 100_000), slow, fast)
    await turn()
    assert slow.log == [Refusal.SLOW_CLIENT]
    assert len(fast.log) == 12
    (frame,) = [frame for _, frame in bench.take_sent() if frame[0] == FrameKind.LAST]
    assert decode_event(frame[3])["code"] == 1013
    assert slow.connection.state is State.LEAVING
    assert bench.connections.statistics().refused == {"SLOW_CLIENT": 1}
    assert bench.connections.memory.statistics().held_bytes == 0


async def test_what_waits_before_accept_is_bounded_too(bench):
    client = await bench.owned()
    for _ in range(12):
        bench.group_send(text("x" * 100_000), client)
    assert client.log == [Refusal.SLOW_CLIENT]


async def test_the_process_s_limit_closes_the_slowest_first():
    bench = Bench(buffer_memory_bytes_max=1_000_000)
    clients = [await bench.accepted() for _ in range(4)]
    for client in clients:
        client.connection.pause_delivery()
    for _ in range(8):
        bench.group_send(text("x" * 100_000), clients[2])
    bench.group_send(text("x" * 100_000), *clients)
    await turn()
    assert [client.log for client in clients] == [[], [], [Refusal.SLOW_CLIENT], []]
    check_books(bench)


async def test_a_member_that_left_gets_nothing_and_is_counted(bench):
    client = await bench.accepted()
    channel = client.connection.reply_channel
    bench.group_send(text("on its way"), client)
    client.connection.client_gone(GOODBYE)
    bench.connections.deliver([channel], encode_message(text("late")))
    await turn()
    assert client.log == []
    assert bench.connections.statistics().dropped == {"unknown channel": 1}


async def test_server_sent_events_reach_streaming_responses(bench):
    client = await bench.owned("http")
    bench.group_send({"type": "http.response.body", "body": b"early"}, client)
    await turn()
    assert client.log == []
    client.connection.accept_broadcasts()
    bench.group_send({"type": "http.response.body", "body": b"late"}, client)
    bench.group_send({"type": "http.response.body", "more_body": False}, client)
    await turn()
    assert client.log == [
        {"type": "http.response.body", "body": b"early", "more_body": True},
        {"type": "http.response.body", "body": b"late", "more_body": True},
        {"type": "http.response.body", "body": b"", "more_body": False},
    ]


async def test_a_group_can_close_websockets_even_before_accept(bench):
    open_, connecting = await bench.accepted(), await bench.owned()
    bench.group_send({"type": "websocket.close", "code": 4000}, open_, connecting)
    await turn()
    assert open_.log == connecting.log == [{"type": "websocket.close", "code": 4000}]


async def test_other_types_go_to_the_application(bench):
    client, waiting = await bench.accepted(), bench.open()
    message = {"type": "chat.message", "text": "hello"}
    bench.group_send(message, client, waiting)
    ((peer, frame),) = bench.take_sent()
    assert (peer, frame[:3], decode_event(frame[3])) == (WORKER, [FrameKind.EVENT, 1, 1], message)
    bench.frame(build_claim(number_of(waiting), 1))
    assert [frame[0] for _, frame in bench.take_sent()] == [FrameKind.GRANT, FrameKind.EVENT]


async def test_an_application_that_does_not_receive_is_bounded(bench):
    client = await bench.accepted()
    for _ in range(30):
        bench.group_send({"type": "chat.message", "text": "x" * 30_000}, client)
    assert client.connection.waiting_bytes < 2 * 262144
    assert "the application does not receive" in bench.connections.statistics().dropped
    assert client.log == ["pause"]


@pytest.mark.parametrize(
    "message",
    [
        {"text": "no type"},
        {"type": 7},
        {"type": "websocket.send"},
        {"type": "websocket.send", "text": "a", "bytes": b"b"},
        {"type": "websocket.send", "text": b"bytes"},
        {"type": "websocket.receive", "text": "forged"},
        {"type": "websocket.disconnect"},
        {"type": "websocket.accept"},
    ],
)
async def test_what_does_not_fit_is_dropped_counted_and_logged_once_in_a_while(bench, caplog, message):
    client = await bench.accepted()
    for _ in range(5):
        bench.group_send(message, client)
    await turn()
    assert (client.log, bench.take_sent()) == ([], [])
    assert sum(bench.connections.statistics().dropped.values()) == 5
    assert len([record for record in caplog.records if "dropped" in record.message]) == 1
    bench.now += 11
    bench.group_send(message, client)
    assert len([record for record in caplog.records if "dropped" in record.message]) == 2


@pytest.mark.parametrize(
    "message",
    [
        {"type": "http.response.body", "body": "text"},
        {"type": "http.response.body", "more_body": 1},
        {"type": "http.response.start", "status": 200},
        {"type": "http.request"},
    ],
)
async def test_what_does_not_fit_a_response_is_dropped(bench, message):
    client = await bench.owned("http")
    client.connection.accept_broadcasts()
    bench.group_send(message, client)
    await turn()
    assert (client.log, bench.take_sent()) == ([], [])


async def test_bytes_that_are_no_message_are_dropped(bench):
    client = await bench.accepted()
    bench.connections.deliver([client.connection.reply_channel], b"\xc1")
    assert sum(bench.connections.statistics().dropped.values()) == 1


async def test_made_up_types_do_not_fill_the_memory(bench):
    client = await bench.accepted()
    for index in range(300):
        bench.group_send({"type": f"websocket.made.up.{index}"}, client)
    assert len(bench.connections.statistics().dropped) <= 101


async def test_who_owns_a_channel(bench):
    client = await bench.owned()
    channel = client.connection.reply_channel
    assert bench.connections.owns_channel(channel, 0)
    assert bench.connections.owns_channel(channel, 1)
    assert not bench.connections.owns_channel(channel, 2)
    assert not bench.connections.owns_channel("interface.iinterface!77", 0)
    client.connection.client_gone(GOODBYE)
    assert not bench.connections.owns_channel(channel, 0)


# One event with many addressees


async def test_an_event_with_many_addressees_reaches_each_in_order(bench):
    clients = [await bench.accepted() for _ in range(3)]
    bench.frame(build_event(1, 1, encode_event(text("before"))))
    bench.frame(build_events([(1, 1), (2, 1), (3, 1), (99, 1)], encode_event(text("all"))))
    bench.frame(build_event(1, 1, encode_event(text("after"))))
    await turn()
    assert [client.log for client in clients] == [[text("before"), b"all", text("after")], [b"all"], [b"all"]]
    assert bench.take_sent() == [(WORKER, msgpack.unpackb(build_closed(99, 1)))]


async def test_such_an_event_is_framed_once(bench):
    clients = [await bench.accepted() for _ in range(3)]
    received = []
    for client in clients:
        client.send_broadcast = received.append
    bench.frame(build_events([(1, 1), (2, 1), (3, 1)], encode_event(text("all"))))
    await turn()
    assert len(received) == 3
    assert received[0] is received[1] is received[2]


async def test_a_fault_with_one_addressee_leaves_the_others_theirs(bench, caplog, monkeypatch):
    clients = [await bench.accepted() for _ in range(3)]
    receive = ClientConnection.shared_event_received

    def fail(connection, *arguments):
        if connection.number == 2:
            raise ZeroDivisionError
        return receive(connection, *arguments)

    monkeypatch.setattr(ClientConnection, "shared_event_received", fail)
    bench.frame(build_events([(1, 1), (2, 1), (3, 1)], encode_event(text("all"))))
    await turn()
    assert [client.log for client in clients] == [[b"all"], [Refusal.PROTOCOL], [b"all"]]
    assert "ZeroDivisionError" in caplog.text


async def test_such_an_event_in_the_middle_of_another_ends_its_connection(bench):
    clients = [await bench.accepted() for _ in range(2)]
    bench.frame(build_piece(1, 1, b"piece"))
    bench.frame(build_events([(1, 1), (2, 1)], encode_event(text("all"))))
    await turn()
    assert [client.log for client in clients] == [[Refusal.PROTOCOL], [b"all"]]
    assert bench.take_sent() == [(WORKER, msgpack.unpackb(build_closed(1, 1)))]


async def test_such_an_event_counts_against_each_window(bench):
    client = await bench.accepted()
    outgoing = OutgoingEvents(1, 1)
    event = encode_event(text("x" * 1000))
    for _ in range(2000):
        assert outgoing.admit(event)
        bench.frame(build_events([(1, 1)], event))
        await turn()
        for _, frame in bench.take_sent():
            outgoing.credit(frame[3])
    assert len(client.log) == 2000


async def test_another_event_with_many_addressees(bench):
    client = await bench.owned()
    accept = {"type": "websocket.accept"}
    client.on_event = lambda event: event == accept and client.connection.accept_broadcasts()
    bench.frame(build_events([(1, 1)], encode_event(accept)))
    bench.frame(build_events([(1, 1)], encode_event(text("not accepted when it came"))))
    await turn()
    assert client.log == [accept, text("not accepted when it came")]


@pytest.mark.parametrize("addressees", [[(1,)], [1], [("1", 1)]])
async def test_malformed_addressees_hurt_nobody(bench, caplog, addressees):
    client = await bench.accepted()
    bench.frame(build_events(addressees, encode_event(text("all"))))
    await turn()
    assert client.log == []
    assert client.connection.state is State.OWNED


# Stopping


async def test_a_drain_closes_websockets_and_lets_requests_finish(bench):
    socket, request, waiting = await bench.accepted(), await bench.owned("http"), bench.open()
    bench.connections.stop()
    assert (socket.log, request.log, waiting.log) == ([], [], [])
    draining = asyncio.create_task(bench.connections.drain(60))  # the waiting in it is real
    await turn()
    bench.now += 1.0  # few sockets: they go within a moment
    async with asyncio.timeout(30):
        while not (socket.log and waiting.log):  # noqa: ASYNC110 - the pace has steps of its own
            await asyncio.sleep(0.01)
    assert (socket.log, request.log, waiting.log) == ([Refusal.STOPPING], [], [Refusal.STOPPING])
    (frame,) = [frame for _, frame in bench.take_sent() if frame[0] == FrameKind.LAST]
    assert decode_event(frame[3])["code"] == 1012
    late, request_on_an_old_socket = bench.open(), await bench.owned("http")
    await turn()
    assert late.log == [Refusal.STOPPING]
    assert request_on_an_old_socket.log == []
    assert not draining.done()
    for each in (request, request_on_an_old_socket):
        each.connection.finished()
    await draining


async def test_a_response_that_is_still_being_read_is_waited_for_and_then_cut(bench):
    client = await bring_to(bench, State.ENDING)
    assert not await bench.connections.wait_idle(0)
    bench.connections.cut()
    assert client.log == [Refusal.STOPPING]
    assert await bench.connections.wait_idle(0)


async def test_cut_ends_what_is_left(bench):
    request = await bench.owned("http")
    assert not await bench.connections.wait_idle(0)
    bench.connections.cut()
    assert request.log == [Refusal.STOPPING]
    assert [decode_event(frame[3]) for _, frame in bench.take_sent()] == [{"type": "http.disconnect"}]
    assert await bench.connections.wait_idle(0)


async def test_close_gives_up_timers_and_calls(bench):
    bench.open()
    await bench.answer("push", b"element")
    bench.open()
    bench.layer.broker_reachable = False
    bench.open()
    leaving = bench.open()
    bench.layer.broker_reachable = True
    waiting = bench.open()
    leaving.connection.finished()
    bench.connections.close()
    assert bench.timers == []
    await turn()
    assert all(call[3].done() for call in bench.layer.calls if call[0] != "push")
    for _ in range(len(bench.open_calls("push"))):  # the layer ends them by itself
        await bench.answer("push", BrokerUnavailable("closed"))
    assert waiting.log == []
    assert bench.timers == []


async def test_statistics_and_repr(bench):
    socket = await bench.accepted()
    await bench.owned("http")
    (await bench.owned("http")).connection.finished()
    statistics = bench.connections.statistics()
    assert (statistics.http_open, statistics.websocket_open, statistics.leaving) == (1, 1, 1)
    assert (statistics.opened_total, statistics.pushes) == (3, 3)
    assert dataclasses.is_dataclass(statistics)
    assert "open=2" in repr(bench.connections)
    assert "OWNED" in repr(socket.connection)
