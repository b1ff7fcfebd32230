from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterator

import pytest
from twisted.internet.asyncioreactor import AsyncioSelectorReactor

from interface_server.end_watch import EndWatch, unread_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs epoll")


@pytest.fixture
async def watch() -> AsyncIterator[EndWatch]:
    reactor = AsyncioSelectorReactor(asyncio.get_running_loop())
    watch = EndWatch(reactor)
    yield watch
    watch.close()
    reactor.removeAll()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end and the client's, of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    with ours, client:
        yield ours, client


async def test_the_end_of_the_clients_side_is_told_once(
    watch: EndWatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, client = pair
    told: asyncio.Queue[bool] = asyncio.Queue()
    watch.add(ours.fileno(), told.put_nowait)
    watch.add(ours.fileno(), told.put_nowait)  # no second one
    client.send(b"data are none of its business")
    client.shutdown(socket.SHUT_WR)
    assert await told.get() is False
    assert watch.statistics().reported_count == 1
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert await told.get() is True
    assert watch.statistics().reported_count == 2
    assert repr(watch) == "<EndWatch 1 sockets>"


async def test_a_socket_whose_end_cannot_be_told_does_not_end_the_watch(
    watch: EndWatch, pair: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    ours, client = pair
    told: asyncio.Queue[bool] = asyncio.Queue()

    def fail(is_reset: bool) -> None:
        told.put_nowait(is_reset)
        raise RuntimeError("a fault of ours")

    watch.add(ours.fileno(), fail)
    client.shutdown(socket.SHUT_WR)
    assert await told.get() is False
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert await told.get() is True
    assert "a fault of ours" in caplog.text


async def test_a_discarded_socket_is_not_told(watch: EndWatch, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, client = pair
    told: list[bool] = []
    watch.add(ours.fileno(), told.append)
    client.close()
    watch.discard(ours.fileno())
    watch.discard(ours.fileno())
    watch.doRead()
    assert told == []
    assert watch.statistics().watched_count == 0


async def test_a_socket_may_be_discarded_behind_its_close(
    watch: EndWatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, _ = pair
    descriptor = ours.fileno()
    watch.add(descriptor, lambda is_reset: None)
    ours.close()
    watch.discard(descriptor)
    assert watch.statistics().watched_count == 0


def test_unread_bytes(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, client = pair
    assert unread_bytes(ours.fileno()) == 0
    client.send(bytes(1000))
    client.shutdown(socket.SHUT_WR)
    while unread_bytes(ours.fileno()) < 1000:
        pass
    assert unread_bytes(ours.fileno()) == 1000
