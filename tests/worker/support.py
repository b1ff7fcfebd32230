"""A layer without a broker and the other end of a connection, for the tests of the worker."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgpack

from channel_layer.codec import decode_event, encode_event
from channel_layer.connection import IncomingEvents, OutgoingEvents
from channel_layer.errors import BrokerUnavailable
from channel_layer.frames import WIRE_VERSION, Frame, FrameKind, Outcome, build_event
from channel_layer.openings import Opening, encode_opening
from worker.settings import HTTP_CHANNEL, WEBSOCKET_CHANNEL

INTERFACE = "itestinterface"
WINDOW_BYTES = 256 * 1024


def http_scope(method: str = "GET", path: str = "/", **more: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [[b"host", b"example.org"]],
        "client": ["127.0.0.1", 50000],
        "server": ["127.0.0.1", 8000],
        "extensions": {"channel_layer": {"reply_channel": "interface.itest!1"}},
        **more,
    }


def websocket_scope(path: str = "/ws", **more: Any) -> dict[str, Any]:
    scope = http_scope(path=path) | {"type": "websocket", "scheme": "ws", "subprotocols": []} | more
    del scope["method"]
    return scope


def make_opening(
    scope: dict[str, Any],
    *,
    connection: int = 1,
    epoch: int = 1,
    interface: str = INTERFACE,
    first: dict[str, Any] | None = None,
    tell_receiving: bool = False,
    window_bytes: int = WINDOW_BYTES,
    version: int = WIRE_VERSION,
) -> Opening:
    return Opening(
        interface=interface,
        connection=connection,
        epoch=epoch,
        reply_channel=f"interface.{interface}!{connection}",
        scope=scope,
        first_event=encode_event(first) if first is not None else None,
        tell_receiving=tell_receiving,
        window_bytes=window_bytes,
        version=version,
    )


class FakeLink:
    """Records frames; ``congested`` is set by the test."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.shareable: list[bytes] = []  # payloads of EVENTs that might have travelled with equal ones
        self.behind: list[int] = []  # the position each of them was not to overtake
        self.position = 0
        self.congested = False

    def link_send(self, peer: str, frame: bytes) -> int:
        self.frames.append([peer, *msgpack.unpackb(frame)])
        self.position += 1
        return self.position

    def link_send_event(self, peer: str, connection: int, epoch: int, payload: bytes, behind: int) -> int:
        assert behind <= self.position
        self.shareable.append(payload)
        self.behind.append(behind)
        return self.link_send(peer, build_event(connection, epoch, payload))

    def link_is_congested(self, peer: str) -> bool:
        return self.congested

    def take(self) -> list[Frame]:
        """The frames since the last call, without the peer."""
        taken, self.frames = self.frames, []
        return [frame[1:] for frame in taken]


class FakeLayer(FakeLink):
    """The parts of ProcessLayer that a worker uses, with the queues in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.process_id = "wtestworker"
        self.broker_reachable = True
        self.queues: dict[str, deque[bytes]] = {HTTP_CHANNEL: deque(), WEBSOCKET_CHANNEL: deque()}
        self.changed = asyncio.Condition()
        self.asked: list[tuple[str, int]] = []
        self.failures: list[Exception] = []  # raised by the next takes
        self.unreachable: set[str] = set()

    def peer_is_reachable(self, peer: str) -> bool:
        return peer not in self.unreachable

    async def offer(self, *openings: Opening | bytes, channel: str | None = None) -> None:
        async with self.changed:
            for opening in openings:
                if isinstance(opening, bytes):
                    assert channel is not None
                    self.queues[channel].append(opening)
                else:
                    protocol = opening.scope["type"]
                    name = HTTP_CHANNEL if protocol == "http" else WEBSOCKET_CHANNEL
                    self.queues[channel or name].append(encode_opening(opening))
            self.changed.notify_all()

    async def take_openings(self, channel: str, count: int) -> list[bytes]:
        self.asked.append((channel, count))
        if self.failures:
            raise self.failures.pop(0)
        queue = self.queues[channel]
        async with self.changed:
            await self.changed.wait_for(lambda: queue)
        return [queue.popleft() for _ in range(min(count, len(queue)))]

    def fail_next_take(self, error: Exception | None = None) -> None:
        self.failures.append(error or BrokerUnavailable("away"))


class FakeInterface:
    """The interface server's side of one connection: reads the frames of a link, grants credit as it reads."""

    def __init__(self, connection: int = 1, epoch: int = 1, window_bytes: int = WINDOW_BYTES) -> None:
        self.incoming = IncomingEvents(connection, epoch, window_bytes)
        self.outgoing = OutgoingEvents(connection, epoch, window_bytes)
        self.key = [connection, epoch]
        self.events: list[dict[str, Any]] = []
        self.outcome: Outcome | None = None
        self.claimed = False
        self.receiving = False
        self.closed = False

    def read(self, frames: Sequence[Frame]) -> list[Frame]:
        """Take frames of the worker; return the CREDIT frames that are due."""
        answers = []
        for frame in frames:
            kind = frame[0]
            assert frame[1:3] == self.key, frame
            assert self.outcome is None, f"{frame} behind END"
            if kind in (FrameKind.EVENT, FrameKind.PIECE):
                complete = self.incoming.receive(kind, frame[3])
                credit = None
                if complete is None:
                    credit = self.incoming.credit_frame()
                else:
                    self.events.append(decode_event(complete[0]))
                    credit = self.incoming.consume(complete[1])
                if credit is not None:
                    answers.append(msgpack.unpackb(credit))
            elif kind == FrameKind.CLAIM:
                self.claimed = True
            elif kind == FrameKind.ANSWER:
                self.claimed = True
                self.events.append({"type": "http.response.start", "status": frame[3], "headers": frame[4]})
                self.events.append({"type": "http.response.body", "body": frame[5], "more_body": False})
                self.outcome = Outcome.RETURNED
            elif kind == FrameKind.CREDIT:
                self.outgoing.credit(frame[3])
            elif kind == FrameKind.RECEIVING:
                self.receiving = True
            elif kind == FrameKind.END:
                self.outcome = Outcome(frame[3])
            elif kind == FrameKind.CLOSED:
                self.closed = True
            else:
                raise AssertionError(f"unexpected frame {frame}")
        return answers

    def event(self, event: dict[str, Any]) -> list[Frame]:
        """Frames that carry an event to the worker."""
        self.outgoing.offer(encode_event(event))
        return [msgpack.unpackb(frame) for frame in self.outgoing.frames()]

    def last(self, event: dict[str, Any]) -> list[Frame]:
        self.outgoing.offer_last(encode_event(event))
        return [msgpack.unpackb(frame) for frame in self.outgoing.frames()]

    def frame(self, kind: FrameKind, *fields: Any) -> Frame:
        return [int(kind), *self.key, *fields]


async def turns(count: int = 20) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)
