"""The Lua scripts, on both servers."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from channel_layer import scripts
from channel_layer.scripts import Script
from tests.servers import BrokerServer


@pytest.fixture
def client(any_broker_server: BrokerServer) -> Iterator[redis.Redis]:
    with any_broker_server.client() as client:
        yield client


def run(client: redis.Redis, script: Script, keys: list[str], *args: Any) -> Any:
    return client.execute_command("EVAL", script.source, len(keys), *keys, *args)


def now_ms(client: redis.Redis) -> int:
    seconds, microseconds = client.execute_command("TIME")
    return int(seconds) * 1000 + int(microseconds) // 1000


def messages(client: redis.Redis, key: str) -> list[bytes]:
    return [element[8:] for element in client.lrange(key, 0, -1)]


def expired(client: redis.Redis, message: bytes, by_ms: int = 1) -> bytes:
    return struct.pack(">Q", now_ms(client) - by_ms) + message


# Loading


def test_every_script_is_loaded_under_its_digest(client: redis.Redis) -> None:
    for script in scripts.ALL:
        assert script == scripts.load(script.name)
        assert client.script_load(script.source) == script.sha1 == hashlib.sha1(script.source.encode()).hexdigest()


def test_no_script_file_is_forgotten() -> None:
    directory = Path(scripts.__file__).parent
    assert {path.stem for path in directory.glob("*.lua")} == {script.name for script in scripts.ALL}


def test_every_script_says_what_it_takes_and_touches_declared_keys_only() -> None:
    for script in scripts.ALL:
        head = script.source.split("\nlocal ")[0]
        assert "KEYS[1]" in head
        assert "Returns" in head
        assert "One script, because" in head
        assert "KEYS[2]" not in script.source  # one key, one slot


def test_unknown_names_are_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        scripts.load("no_such_script")


# push


def test_push_stores_in_order_with_the_deadline_before_each_message(client: redis.Redis) -> None:
    before = now_ms(client)
    count, deadline_ms = run(client, scripts.PUSH, ["c"], 100, 60_000, b"a", b"", b"\x00\xff")
    assert count == 3
    assert before + 60_000 <= deadline_ms <= now_ms(client) + 60_000
    assert client.lrange("c", 0, -1) == [struct.pack(">Q", deadline_ms) + m for m in (b"a", b"", b"\x00\xff")]
    assert 59_000 < client.pttl("c") <= 60_000


def test_push_stores_as_many_as_there_is_room_for(client: redis.Redis) -> None:
    assert run(client, scripts.PUSH, ["c"], 3, 60_000, b"a", b"b")[0] == 2
    assert run(client, scripts.PUSH, ["c"], 3, 60_000, b"c", b"d", b"e")[0] == 1
    assert run(client, scripts.PUSH, ["c"], 3, 60_000, b"f")[0] == 0
    assert messages(client, "c") == [b"a", b"b", b"c"]
    assert client.lpop("c") is not None
    assert run(client, scripts.PUSH, ["c"], 3, 60_000, b"g")[0] == 1
    assert messages(client, "c") == [b"b", b"c", b"g"]


def test_push_over_a_capacity_that_has_become_smaller(client: redis.Redis) -> None:
    run(client, scripts.PUSH, ["c"], 10, 60_000, *[b"m"] * 10)
    assert run(client, scripts.PUSH, ["c"], 4, 60_000, b"x", b"y")[0] == 0
    assert client.llen("c") == 10


def test_push_with_capacity_0_stores_nothing_and_makes_no_key(client: redis.Redis) -> None:
    assert run(client, scripts.PUSH, ["c"], 0, 60_000, b"a")[0] == 0
    assert client.exists("c") == 0


def test_push_without_capacity_stores_thousands_in_order(client: redis.Redis) -> None:
    """Lua's unpack() alone takes 8,000 at most."""
    count = 25_001
    assert run(client, scripts.PUSH, ["c"], -1, 60_000, *range(count))[0] == count
    assert messages(client, "c") == [b"%d" % i for i in range(count)]


def test_expired_messages_at_the_head_hold_no_place(client: redis.Redis) -> None:
    client.rpush("c", expired(client, b"1"), expired(client, b"2"), expired(client, b"3"))
    run(client, scripts.PUSH, ["c"], -1, 60_000, b"live")
    # One place is needed and only one is made: the other expired ones are their reader's to drop.
    assert run(client, scripts.PUSH, ["c"], 4, 60_000, b"new")[0] == 1
    assert messages(client, "c") == [b"2", b"3", b"live", b"new"]
    assert run(client, scripts.PUSH, ["c"], 4, 60_000, b"x", b"y", b"z")[0] == 2
    assert messages(client, "c") == [b"live", b"new", b"x", b"y"]


def test_all_expired_makes_room_for_all(client: redis.Redis) -> None:
    client.rpush("c", *[expired(client, b"old")] * 5)
    assert run(client, scripts.PUSH, ["c"], 5, 60_000, *[b"%d" % i for i in range(7)])[0] == 5
    assert messages(client, "c") == [b"0", b"1", b"2", b"3", b"4"]
    assert client.pttl("c") > 0


def test_push_never_shortens_the_life_of_a_list_and_prolongs_it(client: redis.Redis) -> None:
    run(client, scripts.PUSH, ["c"], -1, 60_000, b"long")
    run(client, scripts.PUSH, ["c"], -1, 1_000, b"short")
    assert client.pttl("c") > 50_000
    run(client, scripts.PUSH, ["c"], -1, 90_000, b"longer")
    assert client.pttl("c") > 80_000
    run(client, scripts.PUSH, ["c"], 0, 900_000, b"refused")
    assert client.pttl("c") <= 90_000


def test_a_refused_push_to_a_list_whose_messages_all_expired_drops_them(client: redis.Redis) -> None:
    client.rpush("c", expired(client, b"old"))
    assert run(client, scripts.PUSH, ["c"], 0, 60_000, b"new")[0] == 0
    assert client.exists("c") == 0


# push_back


def test_push_back_restores_head_and_order_and_expiry(client: redis.Redis) -> None:
    assert run(client, scripts.PUSH_BACK, ["c"], 60_000, b"a", b"b") == 2
    assert 59_000 < client.pttl("c") <= 60_000
    client.pexpire("c", 100_000)
    assert run(client, scripts.PUSH_BACK, ["c"], 60_000, b"1", b"2", b"3") == 5
    assert client.lrange("c", 0, -1) == [b"1", b"2", b"3", b"a", b"b"]
    assert client.pttl("c") > 90_000


# Groups


def test_group_register_and_members(client: redis.Redis) -> None:
    before = now_ms(client)
    deadline_ms = run(client, scripts.GROUP_REGISTER, ["g"], "w1", 60_000)
    assert before + 60_000 <= deadline_ms <= now_ms(client) + 60_000
    run(client, scripts.GROUP_REGISTER, ["g"], "i1", 90_000)
    assert set(run(client, scripts.GROUP_MEMBERS, ["g"])) == {b"w1", b"i1"}
    assert client.zscore("g", "w1") == deadline_ms
    assert 89_000 < client.pttl("g") <= 90_000
    run(client, scripts.GROUP_REGISTER, ["g"], "w2", 1_000)
    assert client.pttl("g") > 80_000


def test_registering_again_renews(client: redis.Redis) -> None:
    run(client, scripts.GROUP_REGISTER, ["g"], "w1", 10_000)
    deadline_ms = run(client, scripts.GROUP_REGISTER, ["g"], "w1", 60_000)
    assert client.zrange("g", 0, -1, withscores=True) == [(b"w1", deadline_ms)]
    assert client.pttl("g") > 50_000


def test_entries_past_their_deadline_are_removed_and_not_returned(client: redis.Redis) -> None:
    client.zadd("g", {"dead": now_ms(client), "alive": now_ms(client) + 60_000})
    assert run(client, scripts.GROUP_MEMBERS, ["g"]) == [b"alive"]
    assert client.zrange("g", 0, -1) == [b"alive"]


def test_a_group_without_members_leaves_nothing_behind(client: redis.Redis) -> None:
    assert run(client, scripts.GROUP_MEMBERS, ["g"]) == []
    client.zadd("g", {"dead": 1})
    assert run(client, scripts.GROUP_MEMBERS, ["g"]) == []
    assert client.exists("g") == 0
