"""Process layers for the tests, several in one process, with listeners that remember what they were told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

from channel_layer.base import ChannelLayer
from channel_layer.frames import Frame
from channel_layer.process_layer import RedisProcessLayer
from tests.channel_layer.contract import MakePeer

__all__ = ["PATIENCE_S", "RecordingListener", "made_peers", "started", "until", "vanish"]

# Reached only when something is broken.
PATIENCE_S = 60.0
# The fixture ``patient_ends``, for scripts that are processes of their own.
PATIENT = """
import channel_layer.home, channel_layer.leases
# A machine that stands still for a moment is nothing to complain of, and the end is waited for.
channel_layer.leases.RENEWAL_TIMEOUT_S = channel_layer.home._STOP_TIMEOUT_S = 60.0
channel_layer.leases.LeaseKeeper.stop.__defaults__ = (True, 60.0)
"""


class RecordingListener:
    """A ProcessListener and LocalDelivery; ``changed`` is set whenever it is told something."""

    def __init__(self) -> None:
        self.frames: list[tuple[str, Frame]] = []
        self.ended: list[tuple[str, str]] = []
        self.ready: list[str] = []
        self.broker: list[bool] = []
        self.delivered: list[tuple[tuple[str, ...], bytes]] = []
        self.order: list[str] = []  # "frame" and "delivered", as they came
        self.changed = asyncio.Event()

    def frame_received(self, peer: str, frame: Frame) -> None:
        self.frames.append((peer, frame))
        self.order.append("frame")
        self.changed.set()

    def peer_ended(self, peer: str, reason: str) -> None:
        self.ended.append((peer, reason))
        self.changed.set()

    def peer_ready(self, peer: str) -> None:
        self.ready.append(peer)
        self.changed.set()

    def broker_changed(self, reachable: bool) -> None:
        self.broker.append(reachable)
        self.changed.set()

    def deliver(self, channels: Collection[str], encoded: bytes) -> None:
        self.delivered.append((tuple(channels), encoded))
        self.order.append("delivered")
        self.changed.set()

    async def until(self, condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Wait until ``condition`` holds; it is looked at whenever the listener is told something."""
        async with asyncio.timeout(patience_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


async def until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Wait until ``condition`` holds, for what nobody tells."""
    async with asyncio.timeout(patience_s):
        while not condition():  # noqa: ASYNC110 - for states that have no event
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def started(
    url: str, role: Any = "worker", *, delivery: bool = False, **options: Any
) -> AsyncIterator[tuple[RedisProcessLayer, RecordingListener]]:
    """A process layer with its listener, stopped in the end."""
    layer = RedisProcessLayer(url, role=role, **options)
    listener = RecordingListener()
    await layer.start(listener, listener.deliver if delivery else None)
    try:
        yield layer, listener
    finally:
        await layer.stop()


async def vanish(layer: RedisProcessLayer) -> None:
    """End a layer as SIGKILL ends its process: no goodbye, the lease expires, the inbox is not read."""
    parts = layer._parts
    assert parts is not None
    layer._parts = None
    assert parts.housekeeping is not None
    parts.housekeeping.cancel()
    if parts.links is not None:
        parts.links.close()
    if parts.lease is not None:
        parts.lease.stop(drop=False)
    assert parts.inbox is not None
    await parts.inbox.stop()
    await layer._broker.close()


@contextlib.asynccontextmanager
async def made_peers(build: Callable[[], RedisProcessLayer]) -> AsyncIterator[MakePeer]:
    """For the contract's ``make_peer``: layers of other processes, each with an id and an inbox of its own."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(layer: ChannelLayer) -> ChannelLayer:
            peer = build()
            await peer.start()
            stack.push_async_callback(peer.stop)
            return peer

        yield make
