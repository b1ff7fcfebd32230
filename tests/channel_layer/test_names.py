from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel_layer.errors import InvalidName
from channel_layer.names import (
    NAME_LENGTH_MAX,
    Keys,
    check_channel_name,
    check_group_name,
    is_linked,
    new_process_id,
    non_local_name,
    process_of,
)

ALLOWED = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_"


@pytest.mark.parametrize("name", ["a", "A.b-c_9", ALLOWED, "http.request", "-", ".", "9", "x" * 99, "x" * 100])
def test_names_for_channels_and_groups(name: str) -> None:
    assert check_channel_name(name) == name
    assert check_group_name(name) == name


@pytest.mark.parametrize("name", ["a!", "a!b", "interface.i7!42", "x" * 98 + "!" + "y", "x" * 99 + "!"])
def test_process_local_names(name: str) -> None:
    assert check_channel_name(name) == name
    with pytest.raises(TypeError):
        check_group_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "!",
        "!a",
        "a!b!c",
        "a!!",
        "a?",
        "a?b",
        "a b",
        "a\n",  # "$" in a regular expression would let it through
        "a!b\n",
        "\na",
        "a/b",
        "a:b",
        "a{b}",
        "a*",
        "a\x00",
        "é",
        "x!é",  # \w would let it through
        "٣",  # so would \d
        "x!٣",
        "ａ",  # a fullwidth letter
        "x" * (NAME_LENGTH_MAX + 1),
        "x" * 99 + "!y",
        b"bytes",
        bytearray(b"a"),
        None,
        7,
        ["a"],
    ],
    ids=ascii,
)
def test_bad_names(name: Any) -> None:
    for check in (check_channel_name, check_group_name):
        with pytest.raises(TypeError) as raised:
            check(name)
        assert isinstance(raised.value, InvalidName)
        assert repr(name) in str(raised.value)


@given(st.text(max_size=110))
def test_names_are_what_the_rule_says(name: str) -> None:
    head, mark, local = name.partition("!")
    allowed = (
        0 < len(name) <= NAME_LENGTH_MAX and set(head) <= set(ALLOWED) and set(local) <= set(ALLOWED) and head != ""
    )
    if allowed:
        assert check_channel_name(name) == name
    else:
        with pytest.raises(InvalidName):
            check_channel_name(name)
    if allowed and not mark:
        assert check_group_name(name) == name
    else:
        with pytest.raises(InvalidName):
            check_group_name(name)


def test_process_ids_are_new_and_tell_their_role() -> None:
    ids = {new_process_id("interface") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch("i[a-z2-7]{12}", process) for process in ids)
    assert new_process_id("worker")[0] == "w"
    assert new_process_id("client")[0] == "c"


def test_who_keeps_links() -> None:
    assert is_linked(new_process_id("interface"))
    assert is_linked(new_process_id("worker"))
    assert not is_linked(new_process_id("client"))
    assert not is_linked("")


@pytest.mark.parametrize(
    ("channel", "non_local", "process"),
    [
        ("http.request", "http.request", None),
        ("interface.i7!42", "interface.i7!", "i7"),
        ("my.own.prefix.c9!x.y", "my.own.prefix.c9!", "c9"),
        ("i7!", "i7!", "i7"),
    ],
)
def test_parts_of_a_name(channel: str, non_local: str, process: str | None) -> None:
    assert non_local_name(channel) == non_local
    assert process_of(channel) == process


def test_keys_are_distinct() -> None:
    keys = Keys()
    names = [keys.normal("a"), keys.link("a"), keys.mail("a"), keys.lease("a"), keys.group("a"), keys.generation]
    assert len(set(names)) == len(names)
    assert all(name.startswith("trunkline:") for name in names)


def test_both_lists_of_an_inbox_are_in_one_slot() -> None:
    keys = Keys()
    tags = {re.findall(r"\{(.*?)\}", key)[0] for key in (keys.link("i7"), keys.mail("i7"))}
    assert tags == {"i7"}


def test_what_an_old_process_pops_carries_the_version() -> None:
    keys = Keys("p")
    assert keys.normal("c") == "p:1:channel:{c}"
    assert keys.openings("c", 1) == keys.normal("c")
    assert keys.openings("c", 2) == "p:2:channel:{c}"
    assert keys.link("c").startswith("p:1:")
    assert keys.mail("c").startswith("p:1:")


@pytest.mark.parametrize("prefix", ["", "a b", "a{b}", "a\n", "é", "a!"])
def test_bad_prefixes(prefix: str) -> None:
    with pytest.raises(InvalidName, match="prefix"):
        Keys(prefix)
