"""The public RedisChannelLayer: the contract on both kinds of broker, its options, and the calls of any loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from channel_layer.base import ChannelLayer
from channel_layer.home import close_homes
from channel_layer.process_layer import RedisProcessLayer
from channel_layer.redis_layer import RedisChannelLayer
from tests.channel_layer.contract import ChannelLayerContract, HeldMessages, MakePeer
from tests.servers import BrokerServer


def messages_of(layer: Any) -> int:
    """What the layer of a home holds, read without a turn of its loop."""
    home = layer._home[1]
    return int(home._layer.statistics().local_channels.messages)


@pytest.fixture
def make_layer(any_broker_server: BrokerServer) -> Any:
    async def make(**options: Any) -> ChannelLayer:
        return RedisChannelLayer(hosts=[any_broker_server.url], **options)

    yield make
    close_homes()


@pytest.fixture
async def make_peer(any_broker_server: BrokerServer) -> AsyncIterator[MakePeer]:
    """A layer of another process: one with an id and an inbox of its own."""
    peers: list[RedisProcessLayer] = []

    async def make(layer: ChannelLayer) -> ChannelLayer:
        peer = RedisProcessLayer(any_broker_server.url)
        await peer.start()
        peers.append(peer)
        return peer

    yield make
    for peer in peers:
        await peer.stop()


@pytest.fixture
def held_messages() -> HeldMessages:
    return messages_of


class TestContract(ChannelLayerContract):
    """C1-C22 through the background thread."""
