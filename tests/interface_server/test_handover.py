"""The rules of hand-over: what a checkpoint covers, what waits for it, who may go on; against a plain model."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from channel_layer.connection import FlowControlError
from channel_layer.frames import Outcome
from interface_server.handover import (
    FURTHER_TRIES_MAX,
    HELD_SHARE,
    STATE_BYTES_MAX,
    TWO_LOSSES_WITHIN_S,
    Handover,
    Loss,
    NextStep,
    decide_after_loss,
    decide_after_refusal,
)

WINDOW_BYTES = 4096


def make(offered_count=0, offered_bytes=0):
    return Handover(window_bytes=WINDOW_BYTES, offered_count=offered_count, offered_bytes=offered_bytes)


def cost(message):
    return max(64, len(message))


def text(number, size=0):
    return {"type": "websocket.send", "text": f"{number}" + "x" * size}


# What covers what


def test_messages_before_the_first_checkpoint_are_forgotten():
    handover = make(offered_count=3, offered_bytes=192)
    assert not handover.is_movable
    handover.checkpoint(2, b"state", is_commit=False)
    assert not handover.is_movable  # the third is on its way to the owner, and nobody has it
    handover.offered(b"four")
    handover.checkpoint(3, b"state", is_commit=False)
    assert handover.is_movable
    assert handover.begin_epoch() == [b"four"]


def test_a_checkpoint_lets_go_of_what_it_covers():
    handover = make()
    for number in range(5):
        handover.offered(b"%d" % number)
    handover.checkpoint(3, b"state", is_commit=False)
    assert (handover.retained_count, handover.retained_bytes) == (2, 128)
    assert handover.is_movable
    assert handover.begin_epoch() == [b"3", b"4"]
    # The next owner counts from 1.
    handover.offered(b"5")
    handover.checkpoint(1, b"new", is_commit=False)
    assert handover.begin_epoch() == [b"4", b"5"]
    assert handover.state == b"new"


@pytest.mark.parametrize("received", [-1, 1, 6, 2**40])
def test_a_checkpoint_for_messages_that_were_never_sent(received):
    handover = make()
    for number in range(5):
        handover.offered(b"%d" % number)
    handover.checkpoint(2, b"state", is_commit=False)
    with pytest.raises(FlowControlError, match=f"a checkpoint for {received} messages behind one for 2; 5 were sent"):
        handover.checkpoint(received, b"state", is_commit=False)


def test_a_state_that_is_too_large():
    handover = make()
    handover.checkpoint(0, b"x" * STATE_BYTES_MAX, is_commit=False)
    with pytest.raises(FlowControlError, match=f"of {STATE_BYTES_MAX + 1} bytes"):
        handover.checkpoint(0, b"x" * (STATE_BYTES_MAX + 1), is_commit=False)


def test_beyond_a_window_without_a_checkpoint_all_is_forgotten_until_the_next_one_that_covers_it():
    handover = make()
    handover.checkpoint(0, b"state", is_commit=False)
    messages = [b"x" * 1000 for _ in range(6)]
    for message in messages:
        handover.offered(message)
    handover.credited(4000)
    assert handover.is_movable
    handover.credited(5000)
    assert not handover.is_movable
    assert handover.retained_count == 0
    handover.offered(b"seven")
    handover.checkpoint(5, b"state", is_commit=False)
    assert not handover.is_movable  # the sixth is lost to anybody else
    handover.checkpoint(6, b"state", is_commit=False)
    assert handover.is_movable
    assert handover.begin_epoch() == [b"seven"]


# Commit


def test_what_is_sent_with_commit_leaves_with_the_next_checkpoint():
    handover = make()
    handover.checkpoint(0, b"state", is_commit=True)
    assert handover.sent(text(1), 64) == ()
    assert handover.sent(text(2), 64) == ()
    assert handover.held_bytes == 128
    assert handover.checkpoint(0, b"state", is_commit=True) == [(text(1), 64), (text(2), 64)]
    assert handover.held_bytes == 0
    handover.sent(text(3), 64)
    handover.begin_epoch()
    assert handover.checkpoint(0, b"state", is_commit=True) == ()  # of an owner that is no more


def test_a_checkpoint_without_commit_ends_the_waiting():
    handover = make()
    handover.checkpoint(0, b"state", is_commit=True)
    assert handover.takes_events
    handover.sent(text(1), 64)
    assert handover.checkpoint(0, b"state", is_commit=False) == [(text(1), 64)]
    assert not handover.takes_events


def test_half_a_window_waits_and_not_more():
    handover = make()
    handover.checkpoint(0, b"state", is_commit=True)
    limit = int(WINDOW_BYTES * HELD_SHARE)
    assert handover.sent(text(1), limit) == ()
    assert handover.is_movable
    assert handover.sent(text(2), 1) == [(text(1), limit), (text(2), 1)]
    assert not handover.is_movable  # the client has something that no checkpoint knows of
    assert handover.sent(text(3), 64) == [(text(3), 64)]  # and nothing waits any more
    handover.checkpoint(0, b"state", is_commit=True)
    assert handover.is_movable
    assert handover.sent(text(4), 64) == ()


@pytest.mark.parametrize("partial", [WINDOW_BYTES // 2, 10**6])
def test_a_large_event_on_its_way_needs_the_room(partial):
    handover = make()
    handover.checkpoint(0, b"state", is_commit=True)
    handover.sent(text(1), 64)
    assert handover.make_room(1000) == ()
    assert handover.make_room(partial) == [(text(1), 64)]
    assert not handover.is_movable


def test_a_close_takes_along_what_waits():
    handover = make()
    handover.checkpoint(0, b"state", is_commit=True)
    handover.sent(text(1), 64)
    close = {"type": "websocket.close", "code": 1000}
    assert handover.sent(close, 70) == [(text(1), 64), (close, 70)]


@pytest.mark.parametrize("outcome", list(Outcome))
def test_only_an_instance_that_returns_has_committed(outcome):
    handover = make()
    handover.checkpoint(0, b"state", is_commit=True)
    handover.sent(text(1), 64)
    assert list(handover.ended(outcome)) == ([(text(1), 64)] if outcome is Outcome.RETURNED else [])


def test_repr_tells_the_state():
    handover = make()
    assert repr(handover) == "<Handover no bytes of state, covers 0 of 0+0 messages, held=0 movable=False>"
    handover.offered(b"x")
    handover.checkpoint(1, b"state", is_commit=False)
    assert repr(handover) == "<Handover 5 bytes of state, covers 1 of 1+0 messages, held=0 movable=True>"


class Walk(RuleBasedStateMachine):
    """Every order of messages, credit, checkpoints, sends and changes of owner, against lists that forget nothing."""

    def __init__(self):
        super().__init__()
        self.handover = make()
        self.numbers = itertools.count(1)
        # The model. All messages of the client, and how far the state that is stored knows them.
        self.messages = []
        self.known = None  # so many messages the newest checkpoint covers; None: there is none
        self.epoch_from = 0  # messages before this one are not the present owner's
        self.received = 0  # by the present owner, in all
        self.client_has = []
        self.committed = []
        self.sent = []  # since the checkpoint
        self.is_commit = False
        self.leaked = False  # something that no checkpoint knows of has left

    def deliver(self, leaving):
        self.client_has += [event["text"] for event, _ in leaving]

    @rule(size=st.sampled_from([1, 50, 500, 3000]))
    def message(self, size):
        message = b"%d " % next(self.numbers) + b"x" * size
        self.messages.append(message)
        self.handover.offered(message)

    @precondition(lambda self: self.received < len(self.messages))
    @rule(count=st.integers(1, 5))
    def receive(self, count):
        self.received = min(len(self.messages), self.received + count)
        self.handover.credited(sum(map(cost, self.messages[self.epoch_from : self.received])))

    @rule(is_commit=st.booleans())
    def checkpoint(self, is_commit):
        self.deliver(self.handover.checkpoint(self.received - self.epoch_from, b"state", is_commit=is_commit))
        self.known = self.received
        self.is_commit = is_commit
        self.committed += self.sent
        self.sent = []
        self.leaked = False
        assert self.client_has[-len(self.committed) :] == self.committed or not self.committed

    @precondition(lambda self: self.is_commit)
    @rule(size=st.sampled_from([64, 300, 1500, 5000]))
    def send(self, size):
        event = text(next(self.numbers), size)
        self.sent.append(event["text"])
        self.deliver(self.handover.sent(event, size))

    @precondition(lambda self: self.handover.is_movable)
    @rule()
    def change_owner(self):
        replayed = self.handover.begin_epoch()
        assert replayed == self.messages[self.known :], "a message is lost, or comes although it is known"
        if self.is_commit:
            assert self.client_has == self.committed, "the client has what will come again, or lacks what will not"
        self.sent = []
        self.epoch_from = self.received = self.known
        self.handover.awaits_accept = False

    @invariant()
    def everything_is_bounded(self):
        assert self.handover.held_bytes <= WINDOW_BYTES / 2
        unreceived = sum(map(cost, self.messages[self.received :]))
        largest = 3010
        assert self.handover.retained_bytes <= WINDOW_BYTES + unreceived + largest

    @invariant()
    def a_fresh_checkpoint_makes_movable(self):
        if self.known is not None and self.known == self.received == len(self.messages) and not self.sent:
            assert self.handover.is_movable


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


# Who may go on


@pytest.mark.parametrize(
    ("is_answered", "is_repeatable", "is_movable", "step"),
    [
        (False, True, False, NextStep.RUN_AGAIN),
        (False, True, True, NextStep.RUN_AGAIN),
        (False, False, False, NextStep.REFUSE),  # a POST
        (True, True, False, NextStep.REFUSE),  # a response that has begun, a WebSocket without a checkpoint
        (True, False, False, NextStep.REFUSE),
        (True, True, True, NextStep.MOVE),
    ],
)
def test_what_follows_a_crash(is_answered, is_repeatable, is_movable, step):
    flags = {"is_answered": is_answered, "is_repeatable": is_repeatable, "is_movable": is_movable}
    loss = Loss()
    assert decide_after_loss(loss, 100.0, **flags) is step
    assert decide_after_loss(loss, 100.0 + TWO_LOSSES_WITHIN_S - 1, **flags) is NextStep.REFUSE_SECOND
    # The second one counts as the first of the next minute.
    assert decide_after_loss(loss, 101.0 + TWO_LOSSES_WITHIN_S, **flags) is NextStep.REFUSE_SECOND
    later = decide_after_loss(loss, 1000.0, **flags)
    assert later is (NextStep.REFUSE if step is NextStep.RUN_AGAIN else step)  # once


def test_who_gives_a_connection_back_is_followed_by_another_twice():
    loss = Loss()
    for _ in range(FURTHER_TRIES_MAX):
        assert decide_after_refusal(loss, is_answered=False, is_repeatable=True) is NextStep.RUN_AGAIN
    assert decide_after_refusal(loss, is_answered=False, is_repeatable=True) is NextStep.REFUSE
    assert decide_after_refusal(Loss(), is_answered=True, is_repeatable=True) is NextStep.REFUSE
    assert decide_after_refusal(Loss(), is_answered=False, is_repeatable=False) is NextStep.REFUSE
