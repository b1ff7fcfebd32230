"""Broadcasts, their way to many connections, and the limits of what waits."""

from collections import deque

import pytest

from interface_server.broadcast import Broadcast, BroadcastMemory, FanOut, JoinedBroadcasts
from interface_server.protocol.deflate import Deflate
from interface_server.protocol.websocket_frames import BINARY, TEXT, build_frame


def message(text="x"):
    return Broadcast({"type": "websocket.send", "text": text})


# Broadcast


def test_the_frame_is_built_once():
    broadcast = message("hällo")
    assert broadcast.frame == build_frame(TEXT, "hällo".encode())
    assert broadcast.frame is broadcast.frame
    assert (broadcast.opcode, broadcast.payload, broadcast.held_bytes) == (TEXT, "hällo".encode(), 64)
    assert Broadcast({"type": "websocket.send", "text": "x" * 65}).held_bytes == 65


def test_the_frame_is_compressed_once_for_each_window():
    nine, twelve = (Deflate(bits, 15, b"") for bits in (9, 12))
    broadcast = message("hällo" * 200)
    assert broadcast.compressed_frame(nine) == nine.build_message(TEXT, broadcast.payload)
    assert broadcast.compressed_frame(nine) is broadcast.compressed_frame(Deflate(9, 10, b"another client"))
    assert broadcast.compressed_frame(twelve) is not broadcast.compressed_frame(nine)
    assert broadcast.compressed_frame(nine)[0] == 0xC1
    assert broadcast.frame[0] == 0x81


def test_joined_frames_stand_one_behind_the_other():
    broadcasts = [message("a"), message("b" * 300)]
    joined = JoinedBroadcasts(broadcasts)
    assert joined.frame == broadcasts[0].frame + broadcasts[1].frame
    assert joined.frame is joined.frame
    deflate = Deflate(12, 15, b"")
    assert joined.compressed_frame(deflate) == broadcasts[0].frame + broadcasts[1].compressed_frame(deflate)
    assert joined.compressed_frame(deflate) is joined.compressed_frame(deflate)
    assert repr(joined) == "<JoinedBroadcasts 2>"


def test_binary_and_empty_messages():
    assert Broadcast({"type": "websocket.send", "bytes": b""}).frame == build_frame(BINARY, b"")
    assert Broadcast({"type": "websocket.send", "text": "", "bytes": None}).frame == build_frame(TEXT, b"")


@pytest.mark.parametrize(
    "event",
    [
        {"type": "websocket.send"},
        {"type": "websocket.send", "text": "a", "bytes": b"a"},
        {"type": "websocket.send", "text": 1},
        {"type": "websocket.close", "text": "a"},
        {"text": "a"},
    ],
)
def test_anything_else_is_refused(event):
    with pytest.raises(ValueError, match=r"not a websocket\.send"):
        Broadcast(event)


# FanOut


class Receiver:
    """A connection as far as broadcast.py knows it, with the queue that keeps the order."""

    def __init__(self, name="", *, held=0):
        self.name = name
        self.queue = deque()
        self.is_waiting = False
        self.written = []
        self.flush_count = 0
        self.on_flush = None
        self.unsent = held
        self.is_dropped = False
        self.has_failed = False
        self.memory = None

    def __repr__(self):
        return f"<Receiver {self.name}>"

    def queue_broadcast(self, broadcast):
        self.queue.append(broadcast)
        wanted, self.is_waiting = not self.is_waiting, True
        return wanted

    def flush_queue(self):
        self.is_waiting = False
        self.flush_count += 1
        self.written += self.queue
        self.queue.clear()
        if self.on_flush is not None:
            self.on_flush()

    def unsent_bytes(self):
        return self.unsent

    def failed(self):
        self.has_failed = True

    def drop_slow_client(self):
        self.is_dropped = True
        if self.memory is not None:
            self.memory.forget(self)


class Loop:
    """Runs what was scheduled in turns; ``now`` moves by ``step_s`` each time the clock is asked."""

    def __init__(self, step_s=0.0):
        self.now = 0.0
        self.step_s = step_s
        self.calls = []
        self.held = []  # what hold_input was called with

    def call_soon(self, callback):
        self.calls.append(callback)

    def clock(self):
        self.now += self.step_s
        return self.now

    def turn(self):
        calls, self.calls = self.calls, []
        for call in calls:
            call()

    def build(self, **arguments):
        return FanOut(call_soon=self.call_soon, clock=self.clock, hold_input=self.held.append, **arguments)


def test_nothing_is_written_before_the_loop_turns():
    loop = Loop()
    fan_out = loop.build()
    receivers = [Receiver() for _ in range(10)]
    fan_out.deliver(message(), receivers)
    assert not any(receiver.written for receiver in receivers)
    loop.turn()
    assert all(len(receiver.written) == 1 for receiver in receivers)
    assert loop.calls == []


def test_the_input_is_held_while_more_waits_than_is_written():
    loop = Loop()
    fan_out = loop.build(slice_connections=10, backlog_max=100)
    receivers = [Receiver() for _ in range(50)]
    fan_out.deliver(message(), receivers)
    fan_out.deliver(message(), receivers)
    assert loop.held == []
    fan_out.deliver(message(), receivers)
    fan_out.deliver(message(), receivers)  # what had been read already
    assert loop.held == [True]
    for _ in range(4):
        loop.turn()
    assert loop.held == [True]
    loop.turn()
    assert loop.held == [True, False]
    assert all(len(receiver.written) == 4 for receiver in receivers)
    fan_out.deliver(message(), receivers)
    fan_out.deliver(message(), receivers)
    assert fan_out.statistics().held_count == 1


def test_broadcasts_of_one_turn_are_flushed_together_and_in_order():
    loop = Loop()
    fan_out = loop.build()
    first, second, third = message("1"), message("2"), message("3")
    a, b = Receiver("a"), Receiver("b")
    fan_out.deliver(first, [a, b])
    fan_out.deliver(second, [b])
    fan_out.deliver(third, [b, a])
    loop.turn()
    assert a.written == [first, third]
    assert b.written == [first, second, third]
    assert (a.flush_count, b.flush_count) == (1, 1)


def test_many_connections_are_served_in_slices():
    loop = Loop()
    fan_out = loop.build(slice_connections=100)
    receivers = [Receiver() for _ in range(250)]
    fan_out.deliver(message(), receivers)
    done = []
    while loop.calls:
        loop.turn()
        done.append(sum(receiver.flush_count for receiver in receivers))
    assert done == [100, 200, 250]


def test_a_slice_ends_when_its_time_is_over():
    loop = Loop(step_s=0.003)
    fan_out = loop.build(slice_connections=1000, slice_s=0.005)
    receivers = [Receiver() for _ in range(100)]
    fan_out.deliver(message(), receivers)
    loop.turn()
    assert sum(receiver.flush_count for receiver in receivers) == 32
    while loop.calls:
        loop.turn()
    assert sum(receiver.flush_count for receiver in receivers) == 100


def test_one_that_fails_keeps_nobody_waiting(caplog):
    loop = Loop()
    fan_out = loop.build(slice_connections=2)
    receivers = [Receiver(str(number)) for number in range(5)]
    receivers[1].on_flush = lambda: 1 / 0
    fan_out.deliver(message(), receivers)
    while loop.calls:
        loop.turn()
    assert all(receiver.flush_count == 1 for receiver in receivers)
    assert [receiver.has_failed for receiver in receivers] == [False, True, False, False, False]
    assert "ZeroDivisionError" in caplog.text


def test_what_comes_between_slices_stands_behind():
    loop = Loop()
    fan_out = loop.build(slice_connections=1)
    first, second = message("1"), message("2")
    receivers = [Receiver(str(number)) for number in range(5)]
    fan_out.deliver(first, receivers)
    loop.turn()
    fan_out.deliver(second, receivers)
    while loop.calls:
        loop.turn()
    assert all(receiver.written == [first, second] for receiver in receivers)
    assert fan_out.statistics().waiting_count == 0


def test_delivering_from_within_a_flush():
    loop = Loop()
    fan_out = loop.build()
    first, second = message("1"), message("2")
    a, b = Receiver("a"), Receiver("b")

    def once():
        a.on_flush = None
        fan_out.deliver(second, [a, b])

    a.on_flush = once
    fan_out.deliver(first, [a, b])
    while loop.calls:
        loop.turn()
    assert a.written == b.written == [first, second]


def test_a_connection_can_ask_for_its_turn_itself():
    loop = Loop()
    fan_out = loop.build()
    receiver = Receiver()
    fan_out.add(receiver)
    assert receiver.flush_count == 0
    loop.turn()
    assert receiver.flush_count == 1


def test_no_receivers_no_turn():
    loop = Loop()
    fan_out = loop.build()
    fan_out.deliver(message(), [])
    assert loop.calls == []
    statistics = fan_out.statistics()
    assert (statistics.broadcast_count, statistics.receiver_count) == (1, 0)


# BroadcastMemory


def build_memory(*, client=1000, total=10_000):
    return BroadcastMemory(client_bytes_max=client, total_bytes_max=total)


def test_what_is_held_is_counted_and_released():
    memory, receiver = build_memory(), Receiver()
    memory.hold(receiver, 300)
    memory.hold(receiver, 200)
    assert memory.statistics().held_bytes == 500
    memory.release(receiver, 300)
    assert memory.statistics().held_bytes == 200
    memory.release(receiver, 200)
    statistics = memory.statistics()
    assert (statistics.held_bytes, statistics.holding_count, statistics.held_bytes_highest) == (0, 0, 500)


def test_a_client_beyond_its_limit_is_dropped():
    memory, receiver = build_memory(client=1000), Receiver()
    memory.hold(receiver, 600)
    memory.hold(receiver, 400)
    assert not receiver.is_dropped
    memory.hold(receiver, 1)
    assert receiver.is_dropped
    statistics = memory.statistics()
    assert (statistics.held_bytes, statistics.dropped_by_client_limit_count) == (0, 1)


def test_what_the_transport_holds_counts_too():
    memory, receiver = build_memory(client=1000), Receiver(held=900)
    memory.hold(receiver, 50)
    memory.hold(receiver, 50)
    assert not receiver.is_dropped
    memory.hold(receiver, 50)
    assert receiver.is_dropped


def test_one_broadcast_is_always_allowed():
    memory, receiver = build_memory(client=1000), Receiver(held=60_000)
    memory.hold(receiver, 5000)
    assert not receiver.is_dropped
    memory.hold(receiver, 1)
    assert receiver.is_dropped


def test_beyond_the_limit_of_the_process_those_that_hold_most_go_first():
    memory = build_memory(client=10_000, total=10_000)
    receivers = [Receiver(str(size)) for size in range(5)]
    for receiver in receivers:
        receiver.memory = memory
    for receiver, size in zip(receivers, (4000, 100, 3000, 1500, 1400), strict=True):
        memory.hold(receiver, size)
    assert not any(receiver.is_dropped for receiver in receivers)
    memory.hold(receivers[1], 1)  # 10,001; the first goes, and 6001 is below nine tenths
    assert [receiver.is_dropped for receiver in receivers] == [True, False, False, False, False]
    statistics = memory.statistics()
    assert (statistics.held_bytes, statistics.dropped_by_process_limit_count) == (6001, 1)
    memory.hold(receivers[1], 4000)  # 10,001 again: now it is the one that holds most
    assert [receiver.is_dropped for receiver in receivers] == [True, True, False, False, False]


def test_as_many_go_as_are_needed():
    memory = build_memory(client=10_000, total=1000)
    receivers = [Receiver() for _ in range(20)]
    for receiver in receivers:
        memory.hold(receiver, 50)
    memory.hold(receivers[0], 1)
    assert sum(receiver.is_dropped for receiver in receivers) == 2
    assert receivers[0].is_dropped
    assert memory.statistics().held_bytes == 900


def test_a_connection_that_is_over_holds_nothing():
    memory, receiver = build_memory(), Receiver()
    memory.hold(receiver, 500)
    memory.forget(receiver)
    memory.forget(receiver)
    memory.release(receiver, 500)
    assert memory.statistics().held_bytes == 0


def test_releasing_more_than_is_held_counts_what_was():
    memory, receiver, other = build_memory(), Receiver(), Receiver()
    memory.hold(receiver, 10)
    memory.hold(other, 10)
    memory.release(receiver, 50)
    assert memory.statistics().held_bytes == 10


def test_repr():
    assert "0 of 10000" in repr(build_memory())
    assert "waiting=0" in repr(Loop().build())
    assert "payload=1" in repr(message())
