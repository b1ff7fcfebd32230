"""Thousands of connections that begin and end in every way, and then: nothing is left of them, anywhere.

``make soak ARGS="--leaks 100000"`` does the same for longer (tests/soak/leaks.py).
"""

import ast
import asyncio
import os
import random
import re
import signal
import socket
import struct

import httpx
import redis
from websockets.asyncio.client import connect

from tests.system.processes import LATE_LEASE, Served, is_alive, memory_bytes, wait_until

APP = "tests.system.conformance_app:application"
MIB = 1024**2
ROUNDS = 6
WARMING_ROUNDS = 3  # fill the caches and the allocator's pools
EACH = 50  # connections of each way and round
AT_ONCE = 40
# Allocators keep some of what they got. A leak of one connection's objects (some KB) would be more after a round.
# A connection that stays is 5 KiB and more, and there are thousands; what fragments is less.
GROWTH_BYTES_MAX = 8 * MIB


class Visit:
    """One client socket, to be used with ``async with``."""

    def __init__(self, port):
        self.port = port

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_):
        self.writer.close()

    def send(self, text, body=b""):
        self.writer.write(text.replace("\n", "\r\n").encode() + body)

    def get(self, target, *headers):
        self.send("\n".join([f"GET {target} HTTP/1.1", "Host: x", *headers, "", ""]))

    async def upgrade(self, target):
        key = "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg=="
        self.get(target, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", key)
        return await self.reader.readuntil(b"\r\n\r\n")

    def message(self, text):
        self.writer.write(bytes((0x81, 0x80 | len(text), 0, 0, 0, 0)) + text)

    def polite_close(self):
        self.writer.write(b"\x88\x82\0\0\0\0\x03\xe8")

    def reset(self):
        ours = self.writer.get_extra_info("socket")
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


async def http_kept_alive(visit):
    for _ in range(3):
        visit.get("/answer")
        await visit.reader.readuntil(bytes(5))


async def http_closed(visit):
    visit.get("/answer", "Connection: close")
    assert b" 200 " in await visit.reader.read()


async def http_failed(visit):
    visit.get("/fail", "Connection: close")
    assert b" 500 " in await visit.reader.read()


async def http_cut(visit):
    visit.get("/half")
    assert b"half" in await visit.reader.read()


async def http_upload(visit):
    visit.send("POST /echo HTTP/1.1\nHost: x\nContent-Length: 300000\nConnection: close\n\n", bytes(300_000))
    assert len(await visit.reader.read()) > 300_000


async def http_refused(visit):
    visit.send("GET / HTTP/1.1\nHost: x\nHost: y\n\n")
    assert b" 400 " in await visit.reader.read()


async def http_left_at_once(visit):
    visit.get("/silent")
    await visit.writer.drain()
    visit.reset()


async def http_left_while_it_waits(visit):
    visit.get("/stream")
    await visit.reader.readuntil(b"first")
    random.choice((visit.reset, visit.writer.close))()


async def http_left_in_its_body(visit):
    visit.send("POST /silent HTTP/1.1\nHost: x\nContent-Length: 100000\n\n", bytes(50_000))
    await visit.writer.drain()
    random.choice((visit.reset, visit.writer.close))()


async def http_left_in_the_response(visit):
    visit.get("/flood")
    await visit.reader.readexactly(200_000)
    visit.reset()


async def http_member_left(visit):
    visit.get(f"/sse?group=stream{random.randrange(20)}")
    await visit.reader.readuntil(b"joined")
    visit.reset()


async def websocket_closed(visit):
    assert b" 101 " in await visit.upgrade("/echo")
    visit.message(b"hello")
    assert await visit.reader.readexactly(7) == b"\x81\x05hello"
    visit.polite_close()
    assert await visit.reader.read() == b"\x88\x02\x03\xe8"


async def websocket_closed_by_the_application(visit):
    await visit.upgrade("/close?code=4000")
    assert await visit.reader.readexactly(4) == b"\x88\x02\x0f\xa0"  # in front of ours, which it would answer else
    visit.polite_close()
    assert await visit.reader.read() == b""


async def websocket_failed(visit):
    await visit.upgrade("/fail")
    assert await visit.reader.readexactly(4) == b"\x88\x02\x03\xf3"  # see above
    visit.polite_close()
    assert await visit.reader.read() == b""


async def websocket_refused(visit):
    assert b" 403 " in await visit.upgrade("/refuse")


async def websocket_left_before_the_accept(visit):
    visit.get("/never-accept", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    await visit.writer.drain()
    visit.reset()


async def websocket_left(visit):
    await visit.upgrade("/wait")
    random.choice((visit.reset, visit.writer.close))()


async def websocket_left_in_a_flood(visit):
    await visit.upgrade("/flood")
    await visit.reader.readexactly(100_000)
    visit.reset()


async def websocket_member_closed(visit):
    await visit.upgrade(f"/member?group=group{random.randrange(20)}")
    await visit.reader.readuntil(b"joined")
    visit.message(b"to all")
    await visit.reader.readuntil(b"to all")
    visit.polite_close()
    await visit.reader.read()


async def websocket_member_left(visit):
    await visit.upgrade(f"/member?group=group{random.randrange(20)}")
    await visit.reader.readuntil(b"joined")
    visit.reset()


WAYS = [value for name, value in list(globals().items()) if name.startswith(("http_", "websocket_"))]


async def one_round(port):
    places = asyncio.Semaphore(AT_ONCE)

    async def one(way):
        async with places, asyncio.timeout(20), Visit(port) as visit:
            await way(visit)

    ways = WAYS * EACH
    random.shuffle(ways)
    await asyncio.gather(*[one(way) for way in ways])


def steady(look):
    """What is seen twice in a row: of the requests before it nothing is on its way any more."""
    before = look()
    while (now := look()) != before:
        before = now
    return before


class Household:
    """What the processes of one command hold."""

    def __init__(self, served):
        self.url = served.url
        self.pids = {"interface server": served.pids("interface server")[0], "worker": served.pids("worker")[0]}
        self.redis = redis.Redis.from_url(served.redis_url)

    def look(self):
        """Everything that must be as before when all connections are over."""
        return {
            "keys": sorted(self.redis.scan_iter(count=1000)),
            "worker": ast.literal_eval(httpx.get(self.url + "/objects", timeout=60).text),
        }

    def descriptors(self):
        return {role: len(os.listdir(f"/proc/{pid}/fd")) for role, pid in self.pids.items()}

    def memory(self):
        return {role: memory_bytes(pid) for role, pid in self.pids.items()}


def test_nothing_is_left_of_connections_that_are_over():
    with Served(APP, "--workers", "1", "--no-access-log") as served:
        household = Household(served)
        wait_until(lambda: len(list(household.redis.scan_iter("*lease*"))) == 2, 30, "both processes have a lease")
        before, descriptors_before = steady(household.look), household.descriptors()
        assert before["worker"]["Instance"] == 1  # the one that answers
        for _ in range(WARMING_ROUNDS):
            asyncio.run(one_round(served.port))
        memory_before = household.memory()
        for _ in range(ROUNDS):
            asyncio.run(one_round(served.port))
        # Clients that closed their socket while they waited for a response count as gone after 5 s.
        seen = []

        def is_as_before():
            seen.append(household.look())
            return seen[-1] == before

        try:
            wait_until(is_as_before, 45, "everything is as before")
        except AssertionError:
            assert seen[-1] == before  # which shows the difference
            raise
        wait_until(
            lambda: all(count < descriptors_before[role] + 5 for role, count in household.descriptors().items()),
            15,
            "the sockets are closed",
        )
        growth = {role: now - memory_before[role] for role, now in household.memory().items()}
        assert all(grown < GROWTH_BYTES_MAX for grown in growth.values()), growth
        household.redis.close()
        served.stop()
        told = served.output
    errors = [line for line in told.splitlines() if line.startswith(("ERROR", "CRITICAL", "WARNING"))]
    expected = rf" /(half|fail)\b|{LATE_LEASE}"
    assert not [line for line in errors if not re.search(expected, line)]
    assert re.search(r"<Connections open=0 known=0 parked=0 openings=0 workers=0 <BroadcastMemory 0 of", told)
    assert re.search(r"<WorkerProcess \w+: 0 http, 0 websocket> stops", told)


# Handed over

HANDOVER_APP = "tests.system.handover_application:application"
HANDED_OVER_EACH = 40
HANDED_OVER_ROUNDS = 6


class TwoWorkers:
    """A command of two workers: one stays, the other one is ended again and again, and its WebSockets go on."""

    def __init__(self, served):
        self.served = served
        self.interface = served.pids("interface server")[0]
        wait_until(lambda: len(served.pids("worker")) == 2, 60, "two workers run")
        self.stays = served.pids("worker")[0]
        self.redis = redis.Redis.from_url(served.redis_url)
        self.handed_over = 0

    async def one_round(self, number, count=HANDED_OVER_EACH):
        """Open, end a worker, see that everybody goes on, and leave in several ways; nobody leaves its group."""
        await asyncio.to_thread(self.wait_for_both)
        (victim,) = [pid for pid in self.served.pids("worker") if pid != self.stays]
        url = f"{self.served.ws_url}/counter?group=left{number % 5}"
        options = ("&commit=1", "&notify=1", "")
        clients, owners = [], []
        while victim not in owners:  # whoever has time takes them, all of them now and then
            opening = [connect(url + options[nth % 3], open_timeout=60, ping_interval=None) for nth in range(count)]
            opened = await asyncio.gather(*opening)
            clients += opened
            owners += await asyncio.gather(*[self.ask(client) for client in opened])
        os.kill(victim, (signal.SIGTERM, signal.SIGKILL)[number % 2])
        await asyncio.to_thread(wait_until, lambda: not is_alive(victim), 20, "it ends")
        assert await asyncio.gather(*[self.ask(client) for client in clients]) != owners
        self.handed_over += owners.count(victim)
        for nth, client in enumerate(clients):
            if nth % 2:
                await client.close()
            else:
                client.transport.abort()

    async def ask(self, client):
        """The process id of the worker that answers."""
        await client.send("x")
        return int((await asyncio.wait_for(client.recv(), 20)).split()[1])

    def wait_for_both(self):
        """Wait until the one that stays and another one answer, so that the next sockets go to both."""
        seen = set()

        def answered():
            seen.add(int(httpx.get(self.served.url + "/pid", timeout=60).text))
            return {pid for pid in seen if is_alive(pid)} - {self.stays} and self.stays in seen

        wait_until(answered, 90, "both workers answer")

    def look(self):
        """Everything that must be as before when all connections are over; process ids are of their time."""
        while True:
            pid, held = ast.literal_eval(httpx.get(self.served.url + "/objects", timeout=60).text)
            if pid == self.stays:
                break
        return {"keys": self.keys(), "worker": held, "members": self.redis.eval(MEMBERS, 0)}

    def keys(self):
        """Without process ids. What waited for a process that was killed expires by itself, in a minute."""
        keys = list(self.redis.scan_iter(count=1000))
        living = {key.partition(b"{")[2] for key in keys if b":lease:{" in key}
        found = []
        for key in keys:
            process = re.search(rb"\{([iw][a-z0-9]{12}\})", key)
            if process is None or process[1] in living or self.redis.pttl(key) == -1:
                found.append(re.sub(rb"\{([iw])[a-z0-9]{12}\}", rb"{\1}", key))
        return sorted(found)

    def memory(self):
        return {"interface server": memory_bytes(self.interface), "worker": memory_bytes(self.stays)}


MEMBERS = """
local found = 0
for _, key in ipairs(redis.call("KEYS", "*")) do
    if redis.call("TYPE", key).ok == "zset" then found = found + redis.call("ZCARD", key) end
end
return found
"""


def test_nothing_is_left_of_connections_that_were_handed_over():
    with Served(HANDOVER_APP, "--workers", "2", "--no-access-log") as served:
        household = TwoWorkers(served)
        household.wait_for_both()
        before = steady(household.look)
        descriptors = len(os.listdir(f"/proc/{household.interface}/fd"))
        asyncio.run(household.one_round(0))
        asyncio.run(household.one_round(1))
        memory_before = household.memory()
        for number in range(HANDED_OVER_ROUNDS):
            asyncio.run(household.one_round(number))
        household.wait_for_both()
        wait_until(lambda: household.look() == before, 60, "everything is as before")
        wait_until(
            lambda: len(os.listdir(f"/proc/{household.interface}/fd")) < descriptors + 5, 15, "the sockets are closed"
        )
        growth = {role: now - memory_before[role] for role, now in household.memory().items()}
        assert all(grown < GROWTH_BYTES_MAX for grown in growth.values()), growth
        assert household.handed_over > HANDED_OVER_EACH
        household.redis.close()
        served.stop()
        told = served.output
    assert "Traceback" not in told
    assert re.search(r"<Connections open=0 known=0 parked=0 openings=0 workers=0 ", told)
