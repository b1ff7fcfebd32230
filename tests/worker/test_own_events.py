"""What an application may send on a connection of somebody's own protocol."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest

from worker.events import ClientDisconnected, InvalidEvent, State
from worker.own_events import OwnEvents


def test_events_of_the_protocol_leave_as_plain_copies() -> None:
    events = OwnEvents("tcp")
    message = OrderedDict(type="tcp.data", data=b"x", parts=(1, [2.5, None]))
    (event,) = events.apply(message)
    assert event == {"type": "tcp.data", "data": b"x", "parts": [1, [2.5, None]]}
    assert type(event) is dict
    assert not events.is_complete


def test_nothing_follows_close() -> None:
    events = OwnEvents("tcp")
    assert list(events.apply({"type": "tcp.close"})) == [{"type": "tcp.close"}]
    assert events.state is State.CLOSED
    assert events.is_complete
    with pytest.raises(ClientDisconnected):
        events.apply({"type": "tcp.data"})


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"type": "http.response.start"}, 'expected a dict with a "type" tcp.'),
        ({"type": "tcpip.data"}, 'expected a dict with a "type" tcp.'),
        ({"type": 7}, 'expected a dict with a "type" tcp.'),
        ({}, 'expected a dict with a "type" tcp.'),
        ("tcp.data", 'expected a dict with a "type" tcp.'),
        ({"type": "tcp.data", "n": float("nan")}, 'tcp.data: message["n"]: NaN is not allowed'),
        ({"type": "tcp.close", "n": object()}, 'tcp.close: message["n"]'),
        ({"type": "tcp.data", "data": b"x" * 3_000_000}, "tcp.data: the message is"),
    ],
)
def test_what_is_refused_changes_nothing(message: Any, text: str) -> None:
    events = OwnEvents("tcp")
    with pytest.raises(InvalidEvent) as caught:
        events.apply(message)
    assert text in str(caught.value)
    assert events.state is State.OPEN
