"""Requests to other processes whose answer comes at an awkward instant."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from channel_layer.broker import Broker
from channel_layer.group_requests import GroupRequests
from channel_layer.inbox import ListWriter
from channel_layer.names import Keys


class _Writer:
    """A mail that takes everything."""

    def push(self, *_: object, **__: object) -> asyncio.Future[None]:
        pushed = asyncio.get_running_loop().create_future()
        pushed.set_result(None)
        return pushed


class _Leases:
    """A broker that knows no lease; the owner's answer comes while it answers the second look."""

    def __init__(self) -> None:
        self.looks = 0
        self.requests: GroupRequests | None = None

    def call(self, *_: object) -> asyncio.Future[int]:
        self.looks += 1
        if self.looks == 2:
            assert self.requests is not None
            self.requests.answered(1, True)
        looked = asyncio.get_running_loop().create_future()
        looked.set_result(0)
        return looked


async def test_an_answer_that_comes_while_the_lease_is_looked_at_is_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("channel_layer.group_requests._LEASE_AGAIN_S", 0.0)
    leases = _Leases()
    requests = leases.requests = GroupRequests(
        process_id="w1",
        keys=Keys(),
        broker=cast(Broker, leases),
        writer=cast(ListWriter, _Writer()),
        loop=asyncio.get_running_loop(),
        expiry_s=60.0,
        link_send=None,
    )
    await requests.ask("w2", "group", "specific.w2!a", add=True, epoch=0)
    assert leases.looks == 2
    assert requests.waiting == 0
