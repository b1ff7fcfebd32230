"""CPU per HTTP request of both halves in one process: no sockets, no broker, everything else as in production.

    python benchmarks/hot_paths.py [--profile]

The interface server's protocol objects are fed bytes and write into a list; its links and the worker's are joined
directly. So what is printed is our own Python, per request: parsing, openings, frames, links, the application's
task, the response. It is CPU of one thread, the least of many rounds, so other work on the machine changes little:
differences of half a microsecond show. For the whole, with its system calls, see bench.py.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import time
from collections import deque
from typing import Any

import uvloop
from twisted.internet.address import IPv4Address

from channel_layer.links import Links
from interface_server.access_log import AccessLog
from interface_server.connections import Connections
from interface_server.deadlines import Deadlines
from interface_server.http_factory import HttpFactory
from interface_server.protocol.server_headers import ServerHeaders
from interface_server.settings import InterfaceSettings
from worker.process import WorkerProcess
from worker.settings import WorkerSettings

REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nUser-Agent: load\r\nAccept: */*\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nUser-Agent: load\r\nContent-Length: 5\r\n\r\nhello"


async def application(scope: Any, receive: Any, send: Any) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/plain"), (b"content-length", b"13")],
        }
    )
    await send({"type": "http.response.body", "body": b"Hello, world!"})


class Layer:
    """One end of two joined processes."""

    def __init__(self, process_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.process_id = process_id
        self.broker_reachable = True
        self.other: Layer
        self.loop = loop
        self.listener: Any = None
        self.queue: deque[bytes] = deque()
        self.taker: asyncio.Future[None] | None = None
        self.links = Links(
            process_id=process_id,
            push=self._push,
            frame_received=lambda peer, frame: self.listener.frame_received(peer, frame),
            peer_ended=lambda peer, reason: print("ended", peer, reason),
            peer_ready=lambda peer: None,
            loop=loop,
        )
        self.link_send = self.links.send
        self.link_is_congested = self.links.is_congested

    def _push(self, peer: str, blobs: list[bytes]) -> asyncio.Future[Any]:
        answer = self.loop.create_future()
        self.loop.call_soon(self._store, blobs, answer)
        return answer

    def _store(self, blobs: list[bytes], answer: asyncio.Future[Any]) -> None:
        for blob in blobs:
            self.other.links.receive_blob(blob)
        answer.set_result(None)

    def push_opening(self, channel: str, opening: bytes) -> asyncio.Future[bytes]:
        future = self.loop.create_future()
        future.set_result(bytes(8) + opening)
        self.other.queue.append(opening)
        if self.other.taker is not None and not self.other.taker.done():
            self.other.taker.set_result(None)
        return future

    async def take_openings(self, channel: str, count: int) -> list[bytes]:
        while not self.queue or channel != "http.request":
            taker = self.loop.create_future()
            if channel == "http.request":
                self.taker = taker
            await taker
        return [self.queue.popleft() for _ in range(min(count, len(self.queue)))]

    def forget_channels(self, channels: Any) -> None:
        pass

    def hold_inbox(self, held: bool) -> None:
        pass


class Transport:
    dataBuffer = b""
    offset = _tempDataLen = 0

    def __init__(self, done: Any) -> None:
        self.done = done

    def write(self, data: bytes) -> None:
        assert data.startswith(b"HTTP/1.1 200")
        self.done()

    def writeSequence(self, data: Any) -> None:
        self.done()

    def getPeer(self) -> Any:
        return IPv4Address("TCP", "127.0.0.1", 50000)

    def getHost(self) -> Any:
        return IPv4Address("TCP", "127.0.0.1", 8000)

    def setTcpNoDelay(self, on: bool) -> None: ...
    def getHandle(self) -> None: ...
    def registerProducer(self, producer: Any, streaming: bool) -> None: ...
    def pauseProducing(self) -> None: ...
    def resumeProducing(self) -> None: ...


async def run(connections: int, rounds: int, request: bytes) -> float:
    loop = asyncio.get_running_loop()
    interface, worker = Layer("iinterface00000000", loop), Layer("wworker000000000", loop)
    interface.other, worker.other = worker, interface
    settings = InterfaceSettings(redis_url="redis://unused")
    held = Connections(interface, settings, loop=loop)
    interface.listener = held
    factory = HttpFactory(
        settings=settings,
        connections=held,
        websockets=None,
        access_log=AccessLog(wanted=False),
        deadlines=Deadlines(call_later=loop.call_later, clock=loop.time),
        server_headers=ServerHeaders(date=True, server=True, clock=time.time),
    )
    process = WorkerProcess(
        WorkerSettings(application="x", redis_url="redis://unused"), application=application, layer=worker
    )
    worker.listener = process
    process.start()
    answered = 0
    waiting: asyncio.Future[None] = loop.create_future()

    def done() -> None:
        nonlocal answered
        answered += 1
        if answered == connections:
            waiting.set_result(None)

    protocols = []
    for _ in range(connections):
        protocol = factory.buildProtocol(None)
        protocol.makeConnection(Transport(done))
        protocols.append(protocol)
    best = 1e9
    for _ in range(rounds):
        answered = 0
        waiting = loop.create_future()
        started = time.thread_time()
        for protocol in protocols:
            protocol.dataReceived(request)
        await waiting
        for _ in range(5):
            await asyncio.sleep(0)
        best = min(best, (time.thread_time() - started) / connections * 1e6)
    await process.stop(1)
    interface.links.close()
    worker.links.close()
    held.close()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--rounds", type=int, default=3000)
    arguments = parser.parse_args()
    for name, request in (("GET", REQUEST), ("POST", POST)):
        profile = cProfile.Profile() if arguments.profile else None
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            if profile:
                profile.enable()
            best = runner.run(run(8, arguments.rounds, request))
            if profile:
                profile.disable()
        print(f"{name:5}{best:7.1f} µs")
        if profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(60)


if __name__ == "__main__":
    main()
