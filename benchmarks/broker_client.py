"""CPU per command of our broker client and of redis-py's asyncio client, against the same server.

    python benchmarks/broker_client.py redis://127.0.0.1:6379 [--uvloop]

Prints the CPU time of this process (not of the broker) per command: one command at a time, as a request alone has
it; a hundred at once, as one loop tick of a busy process has it. It writes keys that begin with ``benchmark:``.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable

import redis.asyncio
import uvloop

from channel_layer.broker import Broker

COMMAND_COUNT = 20_000
BATCH = 100
VALUE = b"x" * 300


async def measure(name: str, one: Callable[[], Awaitable[object]], batch: Callable[[], Awaitable[object]]) -> None:
    for _ in range(500):
        await one()
    started = time.process_time()
    for _ in range(COMMAND_COUNT // 10):
        await one()
    single_us = (time.process_time() - started) / (COMMAND_COUNT // 10) * 1e6
    started = time.process_time()
    for _ in range(COMMAND_COUNT // BATCH):
        await batch()
    batch_us = (time.process_time() - started) / COMMAND_COUNT * 1e6
    print(f"{name:44} one at a time {single_us:6.1f} µs   {BATCH} at once {batch_us:6.1f} µs a command")


async def main(url: str) -> None:
    broker = Broker(url, client_name="benchmark")
    await broker.connect()

    async def our_batch() -> None:
        await asyncio.gather(*(broker.call("SET", "benchmark:key", VALUE) for _ in range(BATCH)))

    await measure("Broker.call", lambda: broker.call("SET", "benchmark:key", VALUE), our_batch)

    client = redis.asyncio.Redis.from_url(url, protocol=2)

    async def pipeline() -> None:
        async with client.pipeline(transaction=False) as commands:
            for _ in range(BATCH):
                commands.set("benchmark:key", VALUE)
            await commands.execute()

    await measure("redis.asyncio, batch as a pipeline", lambda: client.set("benchmark:key", VALUE), pipeline)

    async def gathered() -> None:
        await asyncio.gather(*(client.set("benchmark:key", VALUE) for _ in range(BATCH)))

    await measure("redis.asyncio, batch gathered (pool)", lambda: client.set("benchmark:key", VALUE), gathered)
    await broker.call("DEL", "benchmark:key")
    await client.aclose()
    await broker.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if options.uvloop else None) as runner:
        runner.run(main(options.url))
