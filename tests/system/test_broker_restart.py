"""The broker dies without a trace and comes back, empty, under load: no connection notices more than a pause."""

import asyncio
import os
import signal

import httpx
import pytest
from websockets.asyncio.client import connect

from tests.system.processes import Served

APP = "tests.system.applications:application"
DOWNLOADS = 50
SOCKETS = 200
LINES = 400
# Longer than any outage that a test makes, and the wait of what was sent into it.
PATIENCE_S = 60


async def download(client, url):
    """Reads a slow stream of numbered lines; returns how many lines came, all of them in order."""
    expected = 0
    rest = b""
    async with client.stream("GET", url) as answer:
        assert answer.status_code == 200
        async for data in answer.aiter_raw():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                assert line == b"%d" % expected
                expected += 1
    assert rest == b""
    return expected


async def talk(url, started, stop):
    """Echoes numbers until told to stop; each answer must be the number just sent. Returns how many."""
    async with connect(url, open_timeout=60, ping_interval=None) as client:
        number = 0
        while not stop.is_set():
            await client.send(str(number))
            assert await asyncio.wait_for(client.recv(), PATIENCE_S) == str(number)
            number += 1
            started.release()
            await asyncio.sleep(0.02)
        # Nothing may come twice, either.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.recv(), 0.3)
        await client.close()
        assert client.close_code == 1000
        return number


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kills", [1, 3])
async def test_killing_the_broker_loses_doubles_and_closes_nothing(kills):
    with Served(APP, "--interfaces", "2", "--workers", "2", "--no-access-log") as served:
        # None is kept: one that was idle for 5 s would be used and closed at the same instant, now and then.
        limits = httpx.Limits(max_connections=DOWNLOADS, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            started, stop = asyncio.Semaphore(0), asyncio.Event()
            url = f"{served.url}/numbers?n={LINES}&pause=0.02"
            downloads = [asyncio.create_task(download(client, url)) for _ in range(DOWNLOADS)]
            talks = [asyncio.create_task(talk(f"{served.ws_url}/echo", started, stop)) for _ in range(SOCKETS)]

            async def answered(count):
                """Wait for so many answers from now on."""
                while not started.locked():
                    await started.acquire()
                for _ in range(count):
                    await asyncio.wait_for(started.acquire(), 60)

            await answered(2 * SOCKETS)
            for kill in range(1, kills + 1):
                os.kill(served.broker_pid(), signal.SIGKILL)
                await asyncio.to_thread(served.wait_for, "broker was ended by SIGKILL", 10, kill)
                await answered(5 * SOCKETS)
            stop.set()
            # Each ends with the answer that it waited for, or after it.
            assert min(await asyncio.gather(*talks)) > 0
            assert await asyncio.gather(*downloads) == [LINES] * DOWNLOADS
            assert (await client.get(served.url)).text == "hello"
