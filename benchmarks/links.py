"""CPU per frame of two links in one process, the broker left out.

    python benchmarks/links.py [--uvloop]

Prints the CPU time of both ends together, per frame, from building it to its arrival: many small frames a loop
turn, as a busy process has them; one a turn, as an idle one has; and pieces of large bodies.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import uvloop

from channel_layer.frames import Frame, build_event
from channel_layer.links import Links

# Frames altogether, bytes of payload, frames in one turn of the loop.
RUNS = ((400_000, 200, 100), (400_000, 200, 1000), (100_000, 200, 1), (40_000, 65_000, 4))
NAMES = ("ibenchmark", "wbenchmark")


async def measure(frame_count: int, payload_bytes: int, burst: int) -> None:
    loop = asyncio.get_running_loop()
    members: dict[str, Links] = {}
    arrived = 0

    def push(peer: str, blobs: list[bytes]) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = loop.create_future()

        def store() -> None:
            for blob in blobs:
                members[peer].receive_blob(blob)
            answer.set_result(None)

        loop.call_soon(store)
        return answer

    def frame_received(peer: str, frame: Frame) -> None:
        nonlocal arrived
        arrived += 1

    def peer_ended(peer: str, reason: str) -> None:
        raise RuntimeError(f"the link to {peer} ended: {reason}")

    for name in NAMES:
        members[name] = Links(
            process_id=name,
            push=push,
            frame_received=frame_received,
            peer_ended=peer_ended,
            peer_ready=lambda peer: None,
            loop=loop,
        )
    payload = b"x" * payload_bytes
    sent = 0
    started = time.process_time()
    while sent < frame_count or arrived < sent:
        for name, peer in (NAMES, NAMES[::-1]):
            if sent < frame_count and not members[name].is_congested(peer):
                for number in range(burst):
                    members[name].send(peer, build_event(number, 1, payload))
                sent += burst
        await asyncio.sleep(0)
    seconds = time.process_time() - started
    for links in members.values():
        links.close()
    print(
        f"{payload_bytes:6} bytes, {burst:4} a turn: {seconds / sent * 1e6:6.2f} µs a frame, "
        f"{sent / seconds:9,.0f} frames/s, {sent * payload_bytes / seconds / 1e6:6,.0f} MB/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uvloop", action="store_true")
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if arguments.uvloop else None) as runner:
        for run in RUNS:
            runner.run(measure(*run))


if __name__ == "__main__":
    main()
