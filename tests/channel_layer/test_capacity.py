from __future__ import annotations

import re
from typing import Any

import pytest

from channel_layer.capacity import Capacities


def test_the_default_is_that_of_channels() -> None:
    assert Capacities().of("any") == 100
    assert Capacities(7).of("any.c!x") == 7


@pytest.mark.parametrize(
    ("channel", "capacity"),
    [
        ("http.request", 200),
        ("http.response.i7!42", 10),
        ("http.response.i7", 5),  # the "!" of a glob stands for itself
        ("websocket.send!1", 20),
        ("websocket.send!", 5),
        ("xwebsocket.send!1", 5),
        ("Http.request", 5),  # case counts
        ("job.7", 3),
        ("job.77", 3),  # a regular expression matches from the start, not to the end
        ("myjob.7", 5),
        ("a", 5),
    ],
)
def test_patterns(channel: str, capacity: int) -> None:
    capacities = Capacities(
        5,
        {
            # The examples of Channels' documentation, in spirit.
            "http.request": 200,
            "http.response*!*": 10,
            re.compile(r"^websocket.send\!.+"): 20,
            re.compile(r"job\.\d"): 3,
        },
    )
    assert capacities.of(channel) == capacity


def test_the_first_match_wins() -> None:
    assert Capacities(1, {"a*": 2, "ab*": 3, re.compile("a"): 4}).of("abc") == 2
    assert Capacities(1, {re.compile("a"): 4, "a*": 2}).of("abc") == 4


def test_a_glob_is_for_the_whole_name() -> None:
    capacities = Capacities(1, {"work": 2, "mail?": 3, "x[0-9]": 4})
    assert [capacities.of(name) for name in ("work", "work.x", "mail1", "mail", "x7", "x77")] == [2, 1, 3, 1, 4, 1]


def test_later_changes_of_the_dict_change_nothing() -> None:
    patterns: dict[Any, int] = {"a": 2}
    capacities = Capacities(1, patterns)
    patterns["b"] = 3
    assert capacities.of("b") == 1


@pytest.mark.parametrize(
    ("default", "patterns", "error", "text"),
    [
        (True, None, TypeError, "capacity is True, expected an int"),
        (1.5, None, TypeError, "capacity is 1.5"),
        ("100", None, TypeError, "capacity is '100'"),
        (None, None, TypeError, "capacity is None"),
        (0, None, ValueError, "capacity is 0, expected at least 1"),
        (-1, None, ValueError, "capacity is -1"),
        (1, {"a": False}, TypeError, "channel_capacity['a'] is False"),
        (1, {"a": 0}, ValueError, "channel_capacity['a'] is 0"),
        (1, {re.compile("a"): "9"}, TypeError, "channel_capacity[re.compile('a')] is '9'"),
        (1, {b"a": 1}, TypeError, "has the key b'a', expected a glob"),
        (1, {re.compile(b"a"): 1}, TypeError, "has the key re.compile(b'a')"),
        (1, {None: 1}, TypeError, "has the key None"),
        (1, [("a", 1)], TypeError, "channel_capacity is a list, expected a dict"),
    ],
)
def test_bad_values_are_named(default: Any, patterns: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        Capacities(default, patterns)


def test_repr_shows_everything() -> None:
    text = repr(Capacities(5, {re.compile("a.*b"): 3}))
    assert "default=5" in text
    assert "'a.*b': 3" in text
