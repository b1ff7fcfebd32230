"""Slots and the answers of Cluster nodes, compared with a real node's own arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from channel_layer.errors import WireError
from channel_layer.names import Keys, new_process_id
from channel_layer.sharding import (
    SLOT_COUNT,
    Redirect,
    SlotTable,
    read_redirect,
    read_slot_table,
    slot_of,
    static_shard,
    tag_for,
)

ASKED = ("10.0.0.1", 7000)


@given(st.text(alphabet="ab{}é:1", max_size=12))
def test_a_slot_is_what_every_other_client_computes(key: str) -> None:
    assert slot_of(key) == key_slot(key.encode())


def test_examples_of_the_cluster_specification() -> None:
    assert slot_of("123456789") == 0x31C3
    assert slot_of("{user1000}.following") == slot_of("{user1000}.followers")
    assert slot_of("foo{}{bar}") == key_slot(b"foo{}{bar}")
    assert slot_of("foo{{bar}}zap") == slot_of("{bar")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_static_shards_get_equal_parts_and_one_tag_stays_together(count: int) -> None:
    keys = Keys()
    counts = [0] * count
    for _ in range(300 * count):
        process = new_process_id("worker")
        shard = static_shard(keys.link(process), count)
        assert static_shard(keys.mail(process), count) == static_shard(keys.lease(process), count) == shard
        counts[shard] += 1
    assert min(counts) > 200


@given(st.sets(st.integers(0, SLOT_COUNT - 1), min_size=1, max_size=5))
def test_a_tag_lies_in_the_slots_it_was_asked_for(slots: set[int]) -> None:
    tag = tag_for(slots)
    assert slot_of(f"trunkline:generation:{{{tag}}}") in slots
    assert tag_for(set(slots)) == tag


def test_a_slot_table_names_owners_and_everybody() -> None:
    reply = [
        [0, 1, [b"10.0.0.1", 7000, b"id"], [b"10.0.0.4", 7003, b"id", []]],
        [2, 2, [b"", 7001, b"id"]],  # "" and nil: the host that was asked
        [5, 6, [None, 7000, b"id"]],
    ]
    assert read_slot_table(reply, ASKED) == SlotTable(
        {("10.0.0.1", 7000): frozenset({0, 1, 5, 6}), ("10.0.0.1", 7001): frozenset({2})},
        (("10.0.0.1", 7000), ("10.0.0.4", 7003), ("10.0.0.1", 7001)),
    )
    assert read_slot_table([], ASKED) == SlotTable({}, ())


@pytest.mark.parametrize("reply", [None, b"OK", [[1]], [[0, 1, b"node"]], [[0, 1, [b"h", b"port"]]], [0]])
def test_malformed_slot_tables(reply: object) -> None:
    with pytest.raises(WireError, match=r"10\.0\.0\.1:7000"):
        read_slot_table(reply, ASKED)


@pytest.mark.parametrize(
    ("text", "redirect"),
    [
        ("MOVED 3999 10.0.0.2:6381", Redirect("MOVED", ("10.0.0.2", 6381))),
        ("MOVED 3999 :6381", Redirect("MOVED", ("10.0.0.1", 6381))),
        ("MOVED 3999 ::1:6381", Redirect("MOVED", ("::1", 6381))),
        ("ASK 3999 host.example:6381", Redirect("ASK", ("host.example", 6381))),
        ("TRYAGAIN Multiple keys request during rehashing of slot", Redirect("TRYAGAIN")),
        ("MOVED", None),
        ("MOVED 1 nowhere", None),
        ("WRONGTYPE Operation", None),
        ("ERR", None),
    ],
)
def test_redirections(text: str, redirect: Redirect | None) -> None:
    assert read_redirect(text, ASKED) == redirect
