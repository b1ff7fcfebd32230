"""Connections that change their owners: frames, openings, deadlines and ends, with fake clients and a fake layer."""

import msgpack
import pytest

from channel_layer.broker_connection import WritesRefused
from channel_layer.codec import decode_event, encode_event
from channel_layer.connection import OutgoingEvents
from channel_layer.errors import BrokerUnavailable
from channel_layer.frames import (
    STATE_COMMIT,
    FrameKind,
    Outcome,
    build_claim,
    build_closed,
    build_credit,
    build_end,
    build_event,
    build_release,
    build_state,
)
from channel_layer.openings import decode_opening
from interface_server.client import Refusal
from interface_server.client_connection import State
from interface_server.moves import MOVES_AT_ONCE
from tests.interface_server.test_connections import (
    GOODBYE,
    OTHER,
    WORKER,
    Bench,
    FakeClient,
    check_books,
    number_of,
    text,
    turn,
)

ACCEPT = {"type": "websocket.accept", "subprotocol": None, "headers": []}
CONNECT = {"type": "websocket.connect"}
WHOLE = {"type": "http.request", "body": b"", "more_body": False}


@pytest.fixture
async def bench():
    bench = Bench()
    yield bench
    check_books(bench)


def receive(content):
    return {"type": "websocket.receive", "text": content}


async def accepted(bench, *, state=b"state", flags=0):
    """A WebSocket that WORKER has, accepted, with a checkpoint unless ``state`` is None."""
    client = await bench.owned(first_event=CONNECT)
    number = number_of(client)
    client.on_event = lambda event: event == ACCEPT and client.connection.accept_broadcasts()
    bench.frame(build_event(number, 1, encode_event(ACCEPT)))
    if state is not None:
        bench.frame(build_state(number, 1, 0, flags, state))
    client.log.clear()
    bench.take_sent()
    return client


def outgoing_of_worker():
    """What WORKER goes on sending with, behind its accept."""
    outgoing = OutgoingEvents(1, 1)
    assert outgoing.admit(encode_event(ACCEPT))
    return outgoing


async def adopted(bench, client, peer=OTHER):
    """The moving connection is taken by ``peer``; returns the frames it got behind ADOPT, and ADOPT."""
    number, epoch = number_of(client), client.connection.epoch
    await bench.answer("push", b"moving%d" % number)
    bench.frame(build_claim(number, epoch, adopts=True), peer)
    sent = [frame for to, frame in bench.take_sent() if to == peer and frame[1] == number]
    assert sent[0][:3] == [FrameKind.ADOPT, number, epoch]
    return sent[1:], sent[0]


def texts(frames):
    return [decode_event(frame[3])["text"] for frame in frames if frame[0] == FrameKind.EVENT]


# A crash


async def test_a_websocket_goes_on_in_another_worker_with_the_messages_behind_its_checkpoint(bench):
    client = await accepted(bench)
    for number in range(4):
        client.connection.send_event(receive(str(number)))
    bench.frame(build_state(1, 1, 2, 0, b"two"))
    bench.take_sent()
    bench.connections.peer_ended(WORKER, "killed")
    client.connection.send_event(receive("while nobody has it"))
    assert client.log == []
    ((_, channel, element, _),) = bench.open_calls("push")
    short = decode_opening(element)
    assert (channel, short.is_handover, short.epoch, short.scope) == (
        "websocket.connect",
        True,
        2,
        {"type": "websocket", "headers": []},
    )
    frames, adopt = await adopted(bench, client)
    opening = decode_opening(adopt[3])
    assert opening.scope["extensions"] == {
        "channel_layer": {"reply_channel": "interface.iinterface!1"},
        "websocket.handover": {},
    }
    assert adopt[4:] == [b"two", 0]
    assert texts(frames) == ["2", "3", "while nobody has it"]
    # Its accept is absorbed, what follows is not.
    bench.frame(build_event(1, 2, encode_event(ACCEPT)), OTHER)
    assert client.log == []
    bench.frame(build_event(1, 2, encode_event(text("here I am"))), OTHER)
    assert client.log == [text("here I am")]
    moves = bench.connections.statistics().moves
    assert (moves.moved, moves.waiting, moves.looking, moves.adopting) == (1, 0, 0, 0)
    client.connection.client_gone(GOODBYE)


async def test_the_former_owner_is_fenced(bench):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    await adopted(bench, client)
    bench.frame(build_event(1, 2, encode_event(ACCEPT)), OTHER)
    for frame in (
        build_event(1, 1, encode_event(text("late"))),
        build_state(1, 1, 0, 0, b"late"),
        build_release(1, 1),
        build_end(1, 1, Outcome.RAISED),
        build_closed(1, 1),
        build_claim(1, 1),
    ):
        bench.frame(frame)
    assert client.log == []
    assert client.connection.state is State.OWNED
    assert [frame[0] for to, frame in bench.take_sent() if to == WORKER] == [FrameKind.CLOSED] * 4
    channel = client.connection.reply_channel
    assert [bench.connections.owns_channel(channel, epoch) for epoch in (0, 1, 2)] == [True, False, True]
    client.connection.client_gone(GOODBYE)


async def test_without_a_checkpoint_it_is_closed_1012(bench):
    client = await accepted(bench, state=None)
    bench.connections.peer_ended(WORKER, "killed")
    assert client.log == [Refusal.WORKER_LOST]
    assert client.log[0].close_code == 1012


async def test_always_begins_anew_with_what_had_not_left():
    bench = Bench(handover="always")
    client = await accepted(bench, state=None)
    client.connection.send_event(receive("gone with its worker"))
    outgoing = client.connection._outgoing
    big = "x" * 60_000
    for number in range(6):
        client.connection.send_event(receive(f"{number}{big}"))
    unsent = [decode_event(each)["text"][0] for each in outgoing.unsent()]
    assert unsent
    bench.connections.peer_ended(WORKER, "killed")
    frames, adopt = await adopted(bench, client)
    assert adopt[4:] == [b"", 0]
    assert [content[0] for content in texts(frames)] == unsent
    bench.frame(build_event(1, 2, encode_event(ACCEPT)), OTHER)
    assert client.connection._handover is None  # as any other, from here on
    bench.frame(build_event(1, 2, encode_event(text("anew"))), OTHER)
    assert client.log[-1] == text("anew")
    client.connection.client_gone(GOODBYE)
    check_books(bench)


async def test_never_offers_nothing():
    bench = Bench(handover="never")
    client = await accepted(bench, state=None)
    bench.frame(build_state(1, 1, 0, 0, b"nobody asked"))
    assert client.connection.opening is None
    bench.connections.peer_ended(WORKER, "killed")
    assert client.log == [Refusal.WORKER_LOST]
    check_books(bench)


@pytest.mark.parametrize("handover", ["checkpoint", "never"])
async def test_who_is_offered_it(handover):
    bench = Bench(handover=handover)
    for protocol in ("websocket", "http", "tcpchat"):
        bench.open(protocol)
    offered = [
        "websocket.handover" in decode_opening(call[2]).scope["extensions"] for call in bench.open_calls("push")
    ]
    assert offered == [handover == "checkpoint", False, False]


async def test_two_crashes_within_a_minute_are_1011(bench):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    await adopted(bench, client)
    bench.frame(build_event(1, 2, encode_event(ACCEPT)), OTHER)
    bench.now += 59
    bench.connections.peer_ended(OTHER, "killed")
    assert client.log == [Refusal.OWNERS_LOST]
    assert client.log[0].close_code == 1011


async def test_the_second_worker_may_die_before_it_has_accepted_if_the_first_only_stopped(bench):
    client = await accepted(bench)
    bench.frame(build_release(1, 1))
    await adopted(bench, client)
    bench.connections.peer_ended(OTHER, "killed")
    assert (client.log, client.connection.epoch) == ([], 3)
    await adopted(bench, client, "wthird")
    bench.frame(build_event(1, 3, encode_event(ACCEPT)), "wthird")
    assert bench.connections.statistics().moves.moved == 1
    client.connection.client_gone(GOODBYE)


async def test_broadcasts_reach_the_client_while_nobody_has_it(bench):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    bench.group_send(text("from a group"), client)
    await turn()
    assert client.log == [b"from a group"]
    bench.group_send({"type": "chat.message", "text": "for the application"}, client)
    frames, _ = await adopted(bench, client)
    assert texts(frames) == ["for the application"]
    assert bench.layer.forgotten == []
    client.connection.client_gone(GOODBYE)
    assert bench.layer.forgotten == [client.connection.reply_channel]


async def test_reading_stops_when_nobody_takes_what_comes(bench):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    while client.log != ["pause"]:
        assert client.connection.waiting_bytes < 100_000
        client.connection.send_event(receive("x" * 10_000))
    await adopted(bench, client)
    assert client.log == ["pause", "resume"]
    client.connection.client_gone(GOODBYE)


async def test_what_the_client_has_yet_to_take_counts_for_the_next_owner(bench):
    client = await accepted(bench)
    client.connection.pause_delivery()
    old = OutgoingEvents(1, 1)
    for _ in range(3):
        old.offer(encode_event(text("y" * 60_000)))
    cost = old.offered_bytes
    for frame in old.frames():
        bench.frame(frame)
    bench.connections.peer_ended(WORKER, "killed")
    _, adopt = await adopted(bench, client)
    assert adopt[5] == cost
    new = OutgoingEvents(1, 2, carried_bytes=adopt[5])
    for event in [ACCEPT, *(text("z" * 60_000) for _ in range(4))]:
        new.offer(encode_event(event))
    for frame in new.frames():
        bench.frame(frame, OTHER)
    assert not new.is_empty  # a window in all, whoever sent it
    while not new.is_empty:
        client.connection.resume_delivery()
        credits_ = [frame for _, frame in bench.take_sent() if frame[0] == FrameKind.CREDIT]
        assert credits_, "somebody waits for ever"
        for frame in credits_:
            assert frame[2] == 2
            new.credit(frame[3])
        for frame in new.frames():
            bench.frame(frame, OTHER)
    assert [event["text"][0] for event in client.log] == ["y"] * 3 + ["z"] * 4
    client.connection.client_gone(GOODBYE)


# Commit


async def test_what_was_not_committed_dies_with_its_worker(bench):
    client = await accepted(bench, flags=STATE_COMMIT)
    client.connection.send_event(receive("1"))
    bench.frame(build_event(1, 1, encode_event(text("answer 1"))))
    assert client.log == []
    bench.frame(build_state(1, 1, 1, STATE_COMMIT, b"one"))
    assert client.log == [text("answer 1")]
    bench.frame(build_event(1, 1, encode_event(text("never committed"))))
    bench.connections.peer_ended(WORKER, "killed")
    frames, adopt = await adopted(bench, client)
    assert (frames, adopt[4]) == ([], b"one")
    bench.frame(build_event(1, 2, encode_event(ACCEPT)), OTHER)
    bench.frame(build_event(1, 2, encode_event(text("waits, too"))), OTHER)
    assert client.log == [text("answer 1")]
    bench.frame(build_end(1, 2, Outcome.RETURNED), OTHER)
    assert client.log == [text("answer 1"), text("waits, too"), Outcome.RETURNED]


@pytest.mark.parametrize("outcome", [Outcome.RAISED, Outcome.CANCELLED])
async def test_an_instance_that_fails_takes_along_what_it_had_not_committed(bench, outcome):
    client = await accepted(bench, flags=STATE_COMMIT)
    bench.frame(build_event(1, 1, encode_event(text("not committed"))))
    bench.frame(build_end(1, 1, outcome))
    assert client.log == [outcome]


async def test_more_than_half_a_window_leaves_and_is_told_by_no_hand_over(bench):
    client = await accepted(bench, flags=STATE_COMMIT)
    outgoing = outgoing_of_worker()
    for number in range(20):
        outgoing.offer(encode_event(text(f"{number:02}" + "x" * 50_000)))
    while not outgoing.is_empty:
        for frame in outgoing.frames():
            bench.frame(frame)
        for _, frame in bench.take_sent():
            if frame[0] == FrameKind.CREDIT:
                outgoing.credit(frame[3])
    assert [event["text"][:2] for event in client.log] == [f"{number:02}" for number in range(20)]
    bench.connections.peer_ended(WORKER, "killed")
    assert client.log[-1] is Refusal.WORKER_LOST


async def test_one_message_larger_than_a_window_passes_with_commit(bench):
    client = await accepted(bench, flags=STATE_COMMIT)
    outgoing = outgoing_of_worker()
    outgoing.offer(encode_event(text("small")))
    outgoing.offer(encode_event(text("x" * 1_000_000)))
    for _ in range(100):
        for frame in outgoing.frames():
            bench.frame(frame)
        for _, frame in bench.take_sent():
            if frame[0] == FrameKind.CREDIT:
                outgoing.credit(frame[3])
    assert outgoing.is_empty
    assert [len(event["text"]) for event in client.log] == [5, 1_000_000]
    client.connection.client_gone(GOODBYE)


# Without a window to keep it


async def test_an_application_that_receives_a_window_without_a_checkpoint_is_not_handed_over(bench):
    client = await accepted(bench)
    message = encode_event(receive("x" * 10_000))
    consumed = 64
    for _ in range(30):
        client.connection.send_event(receive("x" * 10_000))
        consumed += len(message)
        bench.frame(build_credit(1, 1, consumed))
    assert client.connection._handover.retained_bytes < 256 * 1024
    bench.frame(build_release(1, 1))
    assert bench.take_sent()[-1][1] == [FrameKind.RELEASED, 1, 1, False]
    bench.frame(build_state(1, 1, 30, 0, b"again"))
    bench.frame(build_release(1, 1))
    assert bench.take_sent()[-1][1] == [FrameKind.RELEASED, 1, 1, True]
    client.connection.client_gone(GOODBYE)


# A worker that stops


async def test_a_worker_gives_a_connection_away(bench):
    client = await accepted(bench)
    client.connection.send_event(receive("on its way"))
    bench.take_sent()
    bench.frame(build_release(1, 1))
    assert bench.take_sent() == [(WORKER, [FrameKind.RELEASED, 1, 1, True])]
    assert WORKER not in bench.connections._peers
    frames, _ = await adopted(bench, client)
    assert texts(frames) == ["on its way"]
    client.connection.client_gone(GOODBYE)


@pytest.mark.parametrize("state", [None, b"state"])
async def test_what_cannot_be_given_away(bench, state):
    if state is None:
        await accepted(bench, state=None)
    else:
        client = await accepted(bench)
        client.connection.client_gone(GOODBYE)  # LEAVING
    bench.take_sent()
    bench.frame(build_release(1, 1))
    assert bench.take_sent() == [(WORKER, [FrameKind.RELEASED, 1, 1, False])]


# Finding the next worker


async def test_thirty_two_look_at_a_time(bench):
    clients = [await accepted(bench) for _ in range(50)]
    bench.connections.peer_ended(WORKER, "killed")
    assert len(bench.open_calls("push")) == MOVES_AT_ONCE
    for taken in range(1, 19):
        call = await bench.answer("push", b"element")
        opening = decode_opening(call[2])
        bench.frame(build_claim(opening.connection, 2, adopts=True), OTHER)
        assert len(bench.open_calls("push")) == min(MOVES_AT_ONCE, 50 - taken)
    for client in clients:
        client.connection.client_gone(GOODBYE)
    assert len(bench.connections._moves) == 0
    bench.connections.peer_ended(OTHER, "killed")  # instances that are leaving


async def test_nobody_takes_it_in_time(bench):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    await bench.answer("push", b"moving")
    await bench.advance(29)
    assert client.log == []
    await bench.advance(1.5)
    assert client.log == [Refusal.NO_SUCCESSOR]
    assert client.log[0].close_code == 1012
    assert [call[2] for call in bench.open_calls("remove")] == [b"moving"]
    assert bench.connections.statistics().moves.given_up == 1


async def test_its_time_may_be_longer_than_that_of_the_queue():
    bench = Bench(queue_timeout_s=30.0, handover_timeout_s=100.0)
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    for _ in range(2):
        await bench.answer("push", b"moving")
        await bench.advance(31)
        await bench.answer("remove", True)
    await bench.answer("push", b"moving")
    await bench.advance(30)
    assert client.log == []
    await bench.advance(10)
    assert client.log == [Refusal.NO_SUCCESSOR]
    check_books(bench)


async def test_a_worker_that_takes_it_and_does_not_accept_in_time(bench):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    await adopted(bench, client)
    await bench.advance(31)
    assert client.log == [Refusal.NO_SUCCESSOR]
    assert bench.take_sent()[-1][1][0] == FrameKind.LAST
    bench.connections.peer_ended(OTHER, "done")


async def test_the_time_stands_still_while_the_broker_is_away(bench):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    bench.layer.broker_reachable = False
    bench.connections.broker_changed(False)
    await bench.answer("push", BrokerUnavailable("gone"))
    assert client.connection.state is State.MOVING
    await bench.advance(100)
    assert client.log == []
    bench.layer.broker_reachable = True
    bench.connections.broker_changed(True)
    await adopted(bench, client)
    assert client.log == []
    client.connection.client_gone(GOODBYE)


@pytest.mark.parametrize("error", [BrokerUnavailable("refused"), WritesRefused("NOREPLICAS")], ids=repr)
async def test_a_broker_that_refuses_is_asked_again(bench, error):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    await bench.answer("push", error)
    assert bench.open_calls("push") == []
    await bench.advance(1)
    await adopted(bench, client)
    client.connection.client_gone(GOODBYE)


async def test_an_opening_that_was_stored_although_the_broker_did_not_say_so_is_claimed_once(bench):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    await bench.answer("push", BrokerUnavailable("the answer was lost"))
    assert client.connection.state is State.MOVING
    bench.frame(build_claim(1, 2, adopts=True), OTHER)
    assert (client.connection.state, client.connection.peer) == (State.OWNED, OTHER)
    await bench.advance(1)
    bench.connections.broker_changed(True)
    assert bench.open_calls("push") == []
    bench.take_sent()
    bench.frame(build_claim(1, 2, adopts=True), "wthird")
    assert [(to, frame[0]) for to, frame in bench.take_sent()] == [("wthird", FrameKind.CLOSED)]
    bench.frame(build_event(1, 2, encode_event(ACCEPT)), OTHER)
    assert bench.connections.statistics().moves.moved == 1


async def test_a_lost_opening_is_stored_again(bench):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    await bench.answer("push", b"lost")
    for _ in range(2):
        await bench.advance(3)
        await bench.answer("find", [False])
    await adopted(bench, client)
    client.connection.client_gone(GOODBYE)


@pytest.mark.parametrize("how", ["an older release", "gave it back"])
async def test_a_refusal_tries_another_worker_twice(bench, how):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    for attempt in range(3):
        assert client.log == []
        worker = f"w{attempt}"
        epoch = client.connection.epoch
        if how == "an older release":
            await bench.answer("push", b"moving")
            bench.frame(build_claim(1, epoch), worker)
            assert bench.take_sent() == [(worker, msgpack.unpackb(build_closed(1, epoch)))]
        else:
            await adopted(bench, client, worker)
            bench.frame(build_closed(1, epoch), worker)
    assert client.log == [Refusal.NO_SUCCESSOR]


@pytest.mark.parametrize(
    "event",
    [
        {"type": "websocket.close", "code": 1000, "reason": ""},
        {"type": "websocket.http.response.start", "status": 403, "headers": []},
        text("no accept"),
    ],
)
async def test_anything_but_accept_closes_1012(bench, event):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    await adopted(bench, client)
    bench.frame(build_event(1, 2, encode_event(event)), OTHER)
    assert client.log == [Refusal.NOT_ADOPTED]
    last = bench.take_sent()[-1][1]
    assert (last[0], decode_event(last[3])["code"]) == (FrameKind.LAST, 1012)
    bench.frame(build_end(1, 2, Outcome.RETURNED), OTHER)
    assert bench.connections._connections == {}


@pytest.mark.parametrize("outcome", list(Outcome))
async def test_an_instance_that_ends_before_it_accepts_closes_1012(bench, outcome):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    await adopted(bench, client)
    bench.frame(build_end(1, 2, outcome), OTHER)
    assert client.log == [Refusal.NOT_ADOPTED]


async def test_a_client_that_has_left_is_not_counted_as_refused(bench):
    client = await accepted(bench)
    client.connection.client_gone(GOODBYE)
    bench.connections.peer_ended(WORKER, "killed")
    assert client.connection.state is State.OVER
    assert bench.connections.statistics().refused == {}


async def test_a_client_that_leaves_on_the_way(bench):
    early, waiting, taken = [await accepted(bench) for _ in range(3)]
    bench.connections.peer_ended(WORKER, "killed")
    early.connection.client_gone(GOODBYE)  # its opening is being stored
    calls = {decode_opening(call[2]).connection: call[3] for call in bench.open_calls("push")}
    calls[number_of(early)].set_result(b"one")
    calls[number_of(waiting)].set_result(b"two")
    await turn()
    assert waiting.connection.state is State.WAITING
    waiting.connection.client_gone(GOODBYE)
    assert [call[2] for call in bench.open_calls("remove")] == [b"one", b"two"]
    number = number_of(taken)
    bench.frame(build_claim(number, 2, adopts=True), OTHER)
    taken.connection.client_gone(GOODBYE)
    assert taken.connection.state is State.LEAVING
    assert bench.take_sent()[-1][1][0] == FrameKind.LAST
    bench.frame(build_event(number, 2, encode_event(ACCEPT)), OTHER)
    bench.frame(build_end(number, 2, Outcome.RETURNED), OTHER)
    assert bench.connections._connections == {}
    assert len(bench.connections._moves) == 0
    calls[number].set_result(b"late")
    await turn()


async def test_a_push_that_is_answered_when_the_next_owner_is_gone_already(bench):
    client = await accepted(bench)
    bench.connections.peer_ended(WORKER, "killed")
    (first,) = bench.open_calls("push")
    bench.frame(build_claim(1, 2, adopts=True), OTHER)
    bench.frame(build_closed(1, 2), OTHER)
    assert client.connection.state is State.PUSHING
    first[3].set_result(b"of epoch 2")
    await turn()
    assert client.connection.state is State.PUSHING
    await bench.answer("push", b"of epoch 3")
    assert client.connection.state is State.WAITING
    client.connection.client_gone(GOODBYE)


# What nobody has answered yet


async def request(bench, method, first):
    client = FakeClient()
    client.connection = bench.connections.open(
        client, protocol="http", scope={"type": "http", "method": method}, first_event=first
    )
    await bench.answer("push", b"element")
    bench.frame(build_claim(number_of(client), 1))
    bench.take_sent()
    return client


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_a_safe_request_runs_again_once(bench, method):
    client = await request(bench, method, WHOLE)
    bench.connections.peer_ended(WORKER, "killed")
    assert client.log == []
    ((_, channel, element, _),) = bench.open_calls("push")
    opening = decode_opening(element)
    assert (channel, opening.epoch, opening.is_handover) == ("http.request", 2, False)
    assert (opening.scope["method"], decode_event(opening.first_event)) == (method, WHOLE)
    await bench.answer("push", b"again")
    bench.frame(build_claim(1, 2), OTHER)
    assert bench.take_sent() == [(OTHER, [FrameKind.GRANT, 1, 2])]
    bench.now += 1000
    bench.connections.peer_ended(OTHER, "killed")
    assert client.log == [Refusal.WORKER_LOST]
    assert bench.connections.statistics().run_again == 1


@pytest.mark.parametrize(
    ("method", "first"),
    [
        ("POST", WHOLE),
        ("PUT", WHOLE),
        ("DELETE", WHOLE),
        ("GET", None),
        ("GET", {"type": "http.request", "body": b"x", "more_body": True}),  # the rest is gone with the worker
    ],
)
async def test_what_does_not_run_again(bench, method, first):
    client = await request(bench, method, first)
    bench.connections.peer_ended(WORKER, "killed")
    assert client.log == [Refusal.WORKER_LOST]


async def test_a_response_that_has_begun_does_not_begin_again(bench):
    client = await request(bench, "GET", WHOLE)
    start = {"type": "http.response.start", "status": 200, "headers": []}
    bench.frame(build_event(1, 1, encode_event(start)))
    assert client.connection.opening is None
    bench.connections.peer_ended(WORKER, "killed")
    assert client.log == [start, Refusal.WORKER_LOST]


async def test_a_client_that_is_gone_is_not_asked_for(bench):
    client = await request(bench, "GET", WHOLE)
    client.connection.client_gone({"type": "http.disconnect"})
    bench.connections.peer_ended(WORKER, "killed")
    assert bench.open_calls("push") == []


async def test_a_websocket_before_its_accept_runs_again_once(bench):
    client = await bench.owned(first_event=CONNECT)
    bench.group_send(text("for whom it may concern"), client)
    bench.connections.peer_ended(WORKER, "killed")
    call = await bench.answer("push", b"again")
    assert decode_event(decode_opening(call[2]).first_event) == CONNECT
    bench.frame(build_claim(1, 2), OTHER)
    bench.frame(build_event(1, 2, encode_event(ACCEPT)), OTHER)
    client.connection.accept_broadcasts()
    assert client.log == [ACCEPT, b"for whom it may concern"]
    client.connection.client_gone(GOODBYE)
    other = await bench.owned(first_event=CONNECT)
    bench.connections.peer_ended(WORKER, "killed")
    await bench.answer("push", b"again")
    bench.frame(build_claim(2, 2), OTHER)
    bench.connections.peer_ended(OTHER, "killed")
    assert other.log == [Refusal.OWNERS_LOST]
    assert other.log[0].status == 502


async def test_workers_that_give_an_opening_back_are_followed_by_two_others(bench):
    client = await bench.owned(first_event=CONNECT)
    for epoch in (1, 2, 3):
        assert client.log == []
        bench.frame(build_closed(1, epoch))
        if epoch < 3:
            await bench.answer("push", b"again")
            bench.frame(build_claim(1, epoch + 1))
    assert client.log == [Refusal.WORKER_LOST] or client.connection.epoch == 4


async def test_an_opening_that_runs_again_waits_for_the_broker(bench):
    client = await request(bench, "GET", WHOLE)
    bench.layer.broker_reachable = False
    bench.connections.peer_ended(WORKER, "killed")
    assert client.connection.state is State.PARKED
    await bench.advance(6)
    assert client.log == [Refusal.BROKER_DOWN]
