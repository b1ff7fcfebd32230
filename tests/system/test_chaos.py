"""Whatever happens to the broker, a connection notices a pause only: nothing lost, doubled, reordered or closed.

Random events hit the broker under two interface servers and two workers with echoing WebSockets, members of a group
that is broadcast to, and downloads. The seed is printed; ``TRUNKLINE_CHAOS_SEED`` repeats a run (its events, not its
timing), ``TRUNKLINE_SOAK_S`` makes it longer.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import time

import httpx
import pytest
from websockets.asyncio.client import connect

from tests.system.applications import CHUNK
from tests.system.processes import Served

APP = "tests.system.chaos_application:application"
SOAK_S = float(os.environ.get("TRUNKLINE_SOAK_S", "20"))
SOCKETS = 30
MEMBERS = 20
DOWNLOADS = 10
ECHO_PAUSE_S = 0.01
BROADCAST_PAUSE_S = 0.01
DOWNLOAD_CHUNKS = 40
# Between two events; an outage itself lasts up to 3 s.
QUIET_S = (0.2, 2.5)
# Nothing waits longer, whatever happened.
PATIENCE_S = 30


class Story:
    """What happened when, for the one who has to find out why it failed."""

    def __init__(self):
        self.began = time.monotonic()
        self.lines = []

    def tell(self, text):
        self.lines.append(f"{time.monotonic() - self.began:8.3f} s  {text}")

    def fail(self, text):
        self.tell(f"FAILURE: {text}")
        raise AssertionError(text)


class Latencies:
    def __init__(self):
        self.values = []
        self.slowest = (0.0, "")  # seconds, and who it was

    def add(self, seconds, who):
        self.values.append(seconds)
        self.slowest = max(self.slowest, (seconds, who))

    def __str__(self):
        if not self.values:
            return "none"
        ordered = sorted(self.values)
        p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
        text = f"n={len(ordered)} p50={p50 * 1000:.1f} ms p99={p99 * 1000:.0f} ms max={ordered[-1]:.2f} s"
        return f"{text} ({self.slowest[1]})"


async def echo(number, url, story, latencies, stop):
    """Sends numbers, several on their way at a time, and reads them back."""
    async with connect(url, open_timeout=PATIENCE_S, ping_interval=None) as client:
        sent, received, sent_at = 0, 0, {}
        while received < sent or not stop.is_set():
            while sent < received + 3 and not stop.is_set():
                sent_at[sent] = time.monotonic()
                await client.send(str(sent))
                sent += 1
            try:
                text = await asyncio.wait_for(client.recv(), PATIENCE_S)
            except TimeoutError:
                story.fail(f"echo {number}: {received} did not come back within {PATIENCE_S} s ({sent} were sent)")
            if text != str(received):
                story.fail(f"echo {number}: {text} came back where {received} was due ({sent} were sent)")
            now = time.monotonic()
            took_s = now - sent_at.pop(received)
            latencies.add(took_s, f"echo {number}.{received}, back at {now - story.began:.3f} s")
            received += 1
            await asyncio.sleep(ECHO_PAUSE_S)
        await expect_nothing(client, f"echo {number}", story)
        return received


async def listen(number, url, story, joined, count):
    """Reads the broadcasts from 0 until told, by ``count``, how many there are."""
    expected, last = 0, None
    async with connect(url, open_timeout=PATIENCE_S, ping_interval=None) as client:
        assert await asyncio.wait_for(client.recv(), PATIENCE_S) == "joined"
        joined.release()
        while not (count.done() and expected == count.result()):
            receiving = asyncio.ensure_future(client.recv())
            either = {receiving} if count.done() else {receiving, count}
            await asyncio.wait(either, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                receiving.cancel()
                if count in either and count.done():
                    continue  # now it is known whether this was the last one
                story.fail(f"member {number}: {expected} did not come within {PATIENCE_S} s, the last was {last}")
            last = receiving.result()
            if last != str(expected):
                story.fail(f"member {number}: broadcast {last} came where {expected} was due")
            expected += 1
        await expect_nothing(client, f"member {number}", story)
    return expected


async def expect_nothing(client, who, story):
    """Nothing may come twice, and the connection must be as open as before."""
    with contextlib.suppress(TimeoutError):
        story.fail(f"{who}: {await asyncio.wait_for(client.recv(), 0.3)!r} came, and nothing was due")
    await client.close()
    if client.close_code != 1000:
        story.fail(f"{who}: closed with {client.close_code}")


async def download(number, client, url, story, stop):
    """Downloads again and again, and compares the digests."""
    expected = hashlib.sha256(CHUNK * DOWNLOAD_CHUNKS).hexdigest()
    count = 0
    while not stop.is_set():
        digest, size = hashlib.sha256(), 0
        try:
            async with client.stream("GET", url) as answer:
                if answer.status_code != 200:
                    story.fail(
                        f"download {number}.{count}: status {answer.status_code} {await answer.aread()!r:.200}"
                    )
                async for data in answer.aiter_raw():
                    digest.update(data)
                    size += len(data)
        except httpx.HTTPError as error:
            story.fail(f"download {number}.{count}: {error!r} after {size} of {len(CHUNK) * DOWNLOAD_CHUNKS} bytes")
        if digest.hexdigest() != expected:
            story.fail(f"download {number}.{count}: {size} bytes with a wrong digest")
        count += 1
    return count


class Chaos:
    """What may happen to a broker."""

    def __init__(self, server, story, chance):
        self._server = server
        self._story = story
        self._chance = chance
        self._events = [self.restart, self.flushall, self.kill_clients, self.freeze, self.flush_scripts]

    async def rage(self, until):
        order = []
        while time.monotonic() < until:
            if not order:  # each kind comes before one comes again
                order = self._chance.sample(self._events, len(self._events))
            await order.pop()()
            await asyncio.sleep(self._chance.uniform(*QUIET_S))

    async def restart(self):
        pause_s = self._chance.choice((0, 0.3, 1.5))
        self._story.tell(f"SIGKILL of the broker, started again after {pause_s} s")
        await asyncio.to_thread(self._server.kill)
        await asyncio.sleep(pause_s)
        await asyncio.to_thread(self._server.start)

    async def flushall(self):
        await self._command("FLUSHALL")

    async def kill_clients(self):
        await self._command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    async def flush_scripts(self):
        await self._command("SCRIPT", "FLUSH")

    async def freeze(self):
        seconds = round(self._chance.uniform(1, 3), 1)
        self._story.tell(f"SIGSTOP of the broker for {seconds} s")
        self._server.pause()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._server.resume()

    async def _command(self, *words):
        self._story.tell(" ".join(words))

        def run():
            with self._server.client() as client:
                client.execute_command(*words)

        await asyncio.to_thread(run)


@pytest.mark.timeout(120 + 2 * SOAK_S)
async def test_whatever_happens_to_the_broker_nothing_is_lost_doubled_reordered_or_closed(broker_server):
    seed = int(os.environ.get("TRUNKLINE_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    story, latencies = Story(), Latencies()
    story.tell(f"seed {seed}: TRUNKLINE_CHAOS_SEED={seed} repeats the events")
    # Two events in a row, between which nothing got through, may take longer than the 5 s that a request waits.
    waits = ("--broker-wait", "20")
    flags = ("--redis", broker_server.url, "--interfaces", "2", "--workers", "2", "--no-access-log", *waits)
    with Served(APP, *flags) as served:
        try:
            await run_chaos(served, broker_server, random.Random(seed), story, latencies)
        finally:
            # pytest shows it only after a failure (or with -s).
            print(f"echo latencies: {latencies}", *story.lines, sep="\n")
            print("What the server said:", served.output[-20_000:], sep="\n")


async def run_chaos(served, broker_server, chance, story, latencies):
    stop, joined = asyncio.Event(), asyncio.Semaphore(0)
    count = asyncio.get_running_loop().create_future()
    member_url = f"{served.ws_url}/member?group=chaos"
    limits = httpx.Limits(max_connections=DOWNLOADS)
    async with httpx.AsyncClient(timeout=PATIENCE_S, limits=limits) as client, asyncio.TaskGroup() as group:
        members = [group.create_task(listen(n, member_url, story, joined, count)) for n in range(MEMBERS)]
        for _ in range(MEMBERS):
            await asyncio.wait_for(joined.acquire(), PATIENCE_S)
        url = f"{served.url}/download?bytes={len(CHUNK) * DOWNLOAD_CHUNKS}&pause=0.03"
        downloads = [group.create_task(download(n, client, url, story, stop)) for n in range(DOWNLOADS)]
        echo_url = f"{served.ws_url}/echo"
        echoes = [group.create_task(echo(n, echo_url, story, latencies, stop)) for n in range(SOCKETS)]
        broadcast_url = f"{served.ws_url}/broadcaster?group=chaos&pause={BROADCAST_PAUSE_S}"
        async with connect(broadcast_url, open_timeout=PATIENCE_S, ping_interval=None) as broadcaster:
            await Chaos(broker_server, story, chance).rage(time.monotonic() + SOAK_S)
            story.tell("the events are over")
            await broadcaster.send("stop")
            count.set_result(int(await asyncio.wait_for(broadcaster.recv(), PATIENCE_S)))
            story.tell(f"{count.result()} messages were broadcast")
            stop.set()
            await asyncio.wait((*members, *echoes, *downloads))
    story.tell(
        f"{sum(task.result() for task in echoes)} echoes, {sum(task.result() for task in downloads)} downloads"
    )
    assert min(task.result() for task in echoes) > 0
    assert count.result() > 10
