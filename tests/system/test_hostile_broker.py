"""Whoever can write to the broker writes rubbish into every list: all processes stay, and go on serving."""

import os
import random
import re

import httpx
import msgpack
import redis
from websockets.sync.client import connect

from tests.system.processes import Served, is_alive, wait_until
from tests.system.test_transfers import Growth

APP = "tests.system.applications:application"
DEADLINE = (2**62).to_bytes(8, "big")  # of an element of a normal channel, or a letter: far away


def values(chance, depth=0):
    kinds = [
        None,
        True,
        -1,
        0,
        1,
        2**63,
        2**64 - 1,
        float("nan"),
        "",
        "i1",
        b"",
        b"x" * 1000,
        msgpack.ExtType(1, b"x"),
    ]
    if depth < 3:
        kinds += [[values(chance, depth + 1) for _ in range(3)], {"type": values(chance, depth + 1)}, {b"k": 1}, {}]
    return chance.choice(kinds)


def rubbish(chance, sources):
    """Elements from noise to nearly right ones, with one field of another kind."""
    pack = msgpack.packb
    yield from (b"", b"\xc1", os.urandom(100), b"\xdd\xff\xff\xff\xff", b"\x91" * 10_000, b"x" * 1_000_000)
    for _ in range(200):
        yield pack(values(chance))
        source = chance.choice(sources)
        fields = [chance.choice([values(chance), 1, 2, 3]) for _ in range(chance.randrange(6))]
        frames = [[chance.choice([*range(40), values(chance)]), *fields]]
        yield pack([1, 0, source, chance.randrange(2**62), 1, 0, 0, frames])
        head = [1, chance.randrange(6), source, 1, 1, chance.choice([0, 2**63]), chance.choice([0, 2**63])]
        head[chance.randrange(7)] = values(chance)
        yield pack([*head, frames])
        yield DEADLINE + pack([1, chance.randrange(9), *fields])
        opening = [1, source, 1, 1, f"interface.{source}!1", {"type": "http"}, None, False, 262144]
        opening[chance.randrange(1, 9)] = values(chance)
        yield DEADLINE + pack(opening)
        scope = {
            "type": chance.choice(["http", "websocket", values(chance)]),
            "path": values(chance),
            "headers": values(chance),
        }
        yield DEADLINE + pack([1, source, 1, 1, f"interface.{source}!1", scope, None, False, 262144])


def test_rubbish_in_every_list():
    chance = random.Random(4)
    with Served(APP) as served, connect(f"{served.ws_url}/echo") as neighbour:
        pids = [*served.pids("worker"), *served.pids("interface server"), served.broker_pid()]
        with redis.Redis.from_url(served.redis_url) as broker, Growth(served) as growth:
            processes = []

            def are_alive():
                """Whether both have a lease; each process takes it by itself, and may be late with it."""
                keys = broker.keys("trunkline:lease:*")
                processes[:] = sorted(re.search(r"\{(.*)\}", key.decode())[1] for key in keys)
                return len(processes) == 2

            wait_until(are_alive, 60, "both processes have a lease")
            assert {process[0] for process in processes} == {"i", "w"}
            lists = [
                *(f"trunkline:1:inbox:{{{process}}}:{part}" for process in processes for part in ("link", "mail")),
                *(f"trunkline:1:channel:{{{channel}}}" for channel in ("http.request", "websocket.connect")),
            ]
            elements = list(rubbish(chance, ["w" + "z" * 12, "i" + "z" * 12, "nobody"]))
            for key in lists:
                for start in range(0, len(elements), 100):
                    broker.rpush(key, *elements[start : start + 100])
                assert httpx.get(served.url, timeout=60).text == "hello", key
                neighbour.send(key)
                assert neighbour.recv(timeout=60) == key
            wait_until(lambda: not any(broker.llen(key) for key in lists), 60, "everything is read")
            assert httpx.get(served.url, timeout=60).text == "hello"
        growth.check()
        assert all(is_alive(pid) for pid in pids)
        assert [*served.pids("worker"), *served.pids("interface server"), served.broker_pid()] == pids
