"""Requests to other processes whose answer comes at an awkward instant."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from channel_layer.broker import Broker
from channel_layer.frames import build_group_add
from channel_layer.group_requests import GroupRequests
from channel_layer.inbox import ListWriter
from channel_layer.link import AWAY, LEFT, RESET, RESTARTED
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


def _requests(broker: object, link_send: Callable[[str, bytes], object] | None = None) -> GroupRequests:
    return GroupRequests(
        process_id="w1",
        keys=Keys(),
        broker=cast(Broker, broker),
        writer=cast(ListWriter, _Writer()),
        loop=asyncio.get_running_loop(),
        expiry_s=60.0,
        link_send=link_send,
    )


async def test_an_answer_that_comes_while_the_lease_is_looked_at_is_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("channel_layer.group_requests._LEASE_AGAIN_S", 0.0)
    leases = _Leases()
    requests = leases.requests = _requests(leases)
    await requests.ask("w2", "group", "specific.w2!a", add=True, epoch=0)
    assert leases.looks == 2
    assert requests.waiting == 0


@pytest.mark.parametrize("reason", [RESET, RESTARTED, AWAY])
async def test_an_owner_that_took_us_for_dead_is_asked_again(reason: str) -> None:
    sent: list[tuple[str, bytes]] = []
    requests = _requests(_Leases(), lambda owner, frame: sent.append((owner, frame)))
    asking = asyncio.create_task(requests.ask("i2", "group", "interface.i2!7", add=True, epoch=3))
    await asyncio.sleep(0)
    frame = build_group_add(7, 3, 1, "group")
    assert sent == [("i2", frame)]
    requests.peer_ended("i3", reason)
    assert sent == [("i2", frame)]
    requests.peer_ended("i2", reason)
    assert sent == [("i2", frame)] * 2
    assert not asking.done()
    requests.answered(1, True)
    await asking
    assert requests.waiting == 0


async def test_an_owner_that_is_gone_has_nothing_in_a_group() -> None:
    sent: list[tuple[str, bytes]] = []
    requests = _requests(_Leases(), lambda owner, frame: sent.append((owner, frame)))
    asking = asyncio.create_task(requests.ask("i2", "group", "interface.i2!7", add=False, epoch=3))
    await asyncio.sleep(0)
    requests.peer_ended("i2", LEFT)
    await asking
    assert len(sent) == 1
