"""Several brokers, one of which dies or hangs under load: Sentinels, a Cluster, shards. Real commands, real clients.

50 WebSockets echo and 10 streams run through ``trunkline interface`` and ``trunkline worker``; none of them may lose,
double, reorder or close anything. What the layer does by itself is in tests/channel_layer/test_topologies.py.
"""

import asyncio
import contextlib
import re
import time

import httpx
import pytest
from websockets.asyncio.client import connect

from channel_layer.names import Keys
from channel_layer.sharding import static_shard
from tests.servers import ClusterServers, SentinelServers, shards, url_of
from tests.system.processes import Command, wait_until
from tests.system.test_broker_restart import PATIENCE_S, download, talk

APP = "tests.system.applications:application"
SOCKETS = 50
DOWNLOADS = 10
LINES = 300
# New requests are served again so much later than the new master is there: three times the promise of one second,
# and the openings that were lost with the old one are looked for after 2 s.
RESUME_S = 3 + 2
# Long enough for a process to be taken for dead by its lease.
OUTAGE_S = 8
# What does not pass through the lost shard is answered as ever.
ANSWER_S = 5
# Connections until one is served by a wanted pair of processes: of four by four, one pair is wanted at the worst.
TRIES = 200


class Load:
    """Clients that talk and download until they are told to stop."""

    def __init__(self, url, client):
        self._url = url
        self._client = client
        self._answered, self._stop = asyncio.Semaphore(0), asyncio.Event()

    async def __aenter__(self):
        echo_url = f"{self._url.replace('http', 'ws', 1)}/echo"
        stream_url = f"{self._url}/numbers?n={LINES}&pause=0.03"
        self._talks = [asyncio.create_task(talk(echo_url, self._answered, self._stop)) for _ in range(SOCKETS)]
        self._downloads = [asyncio.create_task(download(self._client, stream_url)) for _ in range(DOWNLOADS)]
        await self.answers(3 * SOCKETS)
        return self

    async def __aexit__(self, kind, *_):
        self._stop.set()
        if kind is not None:
            for task in (*self._talks, *self._downloads):
                task.cancel()
            return
        # Each ends with the answer that it waited for, or after it.
        assert min(await asyncio.gather(*self._talks)) > 0
        assert await asyncio.gather(*self._downloads) == [LINES] * DOWNLOADS

    async def answers(self, count):
        """Wait for so many answers from now on; fails at once when a client has failed."""
        while not self._answered.locked():
            await self._answered.acquire()
        for _ in range(count):
            waiting = asyncio.ensure_future(asyncio.wait_for(self._answered.acquire(), PATIENCE_S))
            await asyncio.wait((waiting, *self._talks), return_when=asyncio.FIRST_COMPLETED)
            for task in self._talks:
                if task.done():
                    waiting.cancel()
                    task.result()
            await waiting


@contextlib.asynccontextmanager
async def deployment(url, workers=2, interfaces=2):
    """The two halves, as production runs them; yields the address and the commands."""
    common = ("--redis", url)
    with (
        Command("interface", "--port", "0", "--no-access-log", f"--interfaces={interfaces}", *common) as interface,
        Command("worker", APP, f"--workers={workers}", *common) as worker,
    ):
        try:
            address = await asyncio.to_thread(interface.wait_for, r"serves .* on (http://\S+)")
            await asyncio.to_thread(worker.wait_for, r"workers \(pid")
            # None is kept: one that was idle for 5 s would be used and closed at the same instant, now and then.
            limits = httpx.Limits(max_connections=DOWNLOADS + TRIES, max_keepalive_connections=0)
            async with httpx.AsyncClient(timeout=PATIENCE_S, limits=limits) as client:
                yield address.group(1), client, (interface, worker)
        finally:
            # pytest shows it only after a failure (or with -s).
            print(interface.output[-10_000:], worker.output[-10_000:], sep="\n")


async def served_again(client, url):
    """Wait until a new request is answered; return how long that took."""
    began = time.monotonic()
    while True:
        answer = await client.get(url)
        if answer.status_code == 200:
            assert answer.text == "hello"
            return time.monotonic() - began
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0


def nobody_was_taken_for_dead(commands):
    for command in commands:
        assert "is dead" not in command.output
        assert "lose their application" not in command.output


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_a_failover_of_sentinels_is_a_pause(valkey_program, how):
    with SentinelServers(valkey_program, password="masters", sentinel_password="theirs") as servers:
        async with deployment(servers.url) as (url, client, commands):
            async with Load(url, client) as load:
                getattr(servers.master, how)()
                try:
                    await asyncio.to_thread(servers.wait_for_failover)
                    assert await served_again(client, url) < RESUME_S
                    await load.answers(5 * SOCKETS)
                finally:
                    if how == "pause":
                        servers.master.resume()
                # The old one comes back, as a replica of the new one.
                await load.answers(5 * SOCKETS)
            nobody_was_taken_for_dead(commands)
            assert "theirs" not in commands[0].output + commands[1].output


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_a_failover_in_a_cluster_is_a_pause(valkey_program, how):
    with ClusterServers(valkey_program) as servers:
        async with deployment(servers.url) as (url, client, commands):
            async with Load(url, client) as load:
                # The one that has the queue of new requests.
                queue = Keys().openings("http.request", 2)
                victim = servers.owner_of(queue)
                getattr(victim, how)()
                try:
                    await asyncio.to_thread(wait_until, lambda: servers.owner_of(queue) is not victim, 60, "failover")
                    assert await served_again(client, url) < RESUME_S
                    await load.answers(5 * SOCKETS)
                finally:
                    if how == "pause":
                        victim.resume()
                await load.answers(5 * SOCKETS)
            nobody_was_taken_for_dead(commands)


def shards_of(*processes):
    """The shards, of two, where the inboxes of these processes are."""
    return {static_shard(Keys().link(process), 2) for process in processes}


@contextlib.asynccontextmanager
async def deployment_on_both_shards(url):
    """A deployment with interface servers and workers on each of two shards, which chance decides when they start."""
    while True:
        async with deployment(url, workers=4, interfaces=4) as deployed:
            found = []
            for command, pattern in zip(
                deployed[2], (r"interface server (\w+) accepts", r"worker (\w+) runs"), strict=True
            ):
                await asyncio.to_thread(command.wait_for, pattern, count=4)
                found.append(re.findall(pattern, command.output))
            if all(shards_of(*processes) == {0, 1} for processes in found):
                yield deployed
                return


@contextlib.asynccontextmanager
async def talk_within(shard, url):
    """A WebSocket whose interface server and worker both have their inbox on ``shard``."""
    async with contextlib.AsyncExitStack() as others:
        for _ in range(TRIES):
            client = await others.enter_async_context(connect(url, open_timeout=PATIENCE_S, ping_interval=None))
            channels = client.response.headers["x-channels"].split(",")
            if shards_of(*(re.search(r"\.(\w+)!", channel)[1] for channel in channels)) == {shard}:
                yield client
                return
        raise AssertionError(f"none of {TRIES} WebSockets is served by two processes on shard {shard}")


@pytest.mark.timeout(240)
async def test_one_shard_down_stops_only_what_lives_there(valkey_program):
    """Whose halves are both on the other shard goes on; the rest pauses, and nothing is lost or closed."""
    with shards(valkey_program) as servers:
        async with deployment_on_both_shards(url_of(servers)) as (url, client, commands):
            queue_shard = static_shard(Keys().openings("http.request", 2), 2)
            echo_url = f"{url.replace('http', 'ws', 1)}/echo"
            async with Load(url, client) as load, talk_within(queue_shard, echo_url) as talker:
                servers[1 - queue_shard].kill()
                down_until = time.monotonic() + OUTAGE_S
                answered_count = 0
                while time.monotonic() < down_until:
                    await talker.send(str(answered_count))
                    assert await asyncio.wait_for(talker.recv(), ANSWER_S) == str(answered_count)
                    answered_count += 1
                    await asyncio.sleep(0.05)
                assert answered_count > OUTAGE_S
                # The queue lives; whoever takes from it and can be answered serves new requests.
                # All at once: those that need the other shard wait.
                answers = await asyncio.gather(*(client.get(url) for _ in range(TRIES)))
                statuses = [answer.status_code for answer in answers]
                assert 200 in statuses
                assert set(statuses) <= {200, 503}
                servers[1 - queue_shard].start()
                await load.answers(20 * SOCKETS)
                assert await served_again(client, url) < RESUME_S
                await asyncio.sleep(6)  # time to judge again
            nobody_was_taken_for_dead(commands)
