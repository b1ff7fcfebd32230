"""The admin port, asked by well- and ill-behaved clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from http import HTTPStatus

import pytest

from channel_layer import admin
from channel_layer.admin import AdminPortError, AdminServer, Answer, alive, readiness


@pytest.fixture
async def server() -> AsyncIterator[AdminServer]:
    reasons: dict[str, str | None] = {"worker 1": None}
    server = AdminServer("127.0.0.1", 0, {"/healthz": alive, "/readyz": lambda: readiness(reasons)})
    server.reasons = reasons  # type: ignore[attr-defined]
    await server.start()
    yield server
    await server.close()


async def ask(server: AdminServer, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    async with asyncio.timeout(30):
        answer = await reader.read()
    writer.close()
    return answer


async def test_get_and_head(server: AdminServer) -> None:
    answer = await ask(server, b"GET /healthz?x=1 HTTP/1.1\r\nHost: a\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nConnection: close" in head
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body) == {"alive": True}
    head_only = await ask(server, b"HEAD /healthz HTTP/1.1\r\n\r\n")
    assert head_only == head + b"\r\n\r\n"


async def test_ready_only_if_all_are(server: AdminServer) -> None:
    assert b" 200 OK" in await ask(server, b"GET /readyz HTTP/1.1\r\n\r\n")
    server.reasons["worker 2"] = "draining"  # type: ignore[attr-defined]
    answer = await ask(server, b"GET /readyz HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
        "ready": False,
        "processes": {"worker 1": "ready", "worker 2": "draining"},
    }


def test_facts_stand_beside_the_answer_which_the_caller_may_decide() -> None:
    answer = readiness({"worker 1": None, "worker 2": "starting"}, is_ready=True, facts={"workers_known": 3})
    assert answer == Answer(
        HTTPStatus.OK,
        {"ready": True, "processes": {"worker 1": "ready", "worker 2": "starting"}, "workers_known": 3},
    )


def test_nobody_is_not_ready() -> None:
    assert readiness({}) == Answer(HTTPStatus.SERVICE_UNAVAILABLE, {"ready": False, "processes": {}})


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"rubbish\r\n\r\n", b"404"),
        (b"POST /readyz HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"405"),
        (b"\r\n\r\n", b"404"),
    ],
)
async def test_other_questions(server: AdminServer, request_: bytes, status: bytes) -> None:
    assert (await ask(server, request_)).split()[1] == status


async def test_who_says_too_much_is_dropped(server: AdminServer) -> None:
    try:
        answer = await ask(server, b"GET /" + b"x" * 100_000)
    except ConnectionError:
        answer = b""  # what was not read ends the connection with a reset
    assert answer == b""
    assert b" 200 OK" in await ask(server, b"GET /healthz HTTP/1.1\r\n\r\n")


async def test_who_says_too_little_is_dropped(server: AdminServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_TIMEOUT_S", 0.05)
    try:
        answer = await ask(server, b"GET /healthz")
    except ConnectionError:
        answer = b""  # it was dropped before it had said anything
    assert answer == b""


async def test_those_who_ask_nothing_keep_nobody_from_asking(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "_TIMEOUT_S", 3600.0)
    monkeypatch.setattr(admin, "_CONNECTIONS_MAX", 2)
    idle = []
    for count in (1, 2):
        idle.append(await asyncio.open_connection("127.0.0.1", server.port))
        async with asyncio.timeout(20):
            while len(server._connections) < count:  # noqa: ASYNC110 - the server tells nobody
                await asyncio.sleep(0.01)
    assert b" 200 OK" in await ask(server, b"GET /healthz HTTP/1.1\r\n\r\n")
    async with asyncio.timeout(20):
        assert await idle[0][0].read() == b"", "the oldest has made room"
    idle[1][1].write(b"GET /healthz HTTP/1.1\r\n\r\n")
    async with asyncio.timeout(20):
        assert b" 200 OK" in await idle[1][0].read()
    for _, each in idle:
        each.close()


async def test_close_drops_who_is_there_and_may_come_twice(server: AdminServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    assert await ask(server, b"GET /healthz HTTP/1.1\r\n\r\n")
    await server.close()
    await server.close()
    async with asyncio.timeout(30):
        assert await reader.read() == b""
    writer.close()
    assert "closed, 1 answers" in repr(server)


async def test_what_is_no_name_of_a_host_is_named() -> None:
    with pytest.raises(AdminPortError, match=r"cannot listen on the admin port a\.\.b:0: this is no name of a host"):
        await AdminServer("a..b", 0, {}).start()


async def test_a_host_that_nobody_knows_is_named() -> None:
    with pytest.raises(AdminPortError, match=r"admin port nowhere\.invalid:0: (?!Unknown error)\w"):
        await AdminServer("nowhere.invalid", 0, {}).start()


async def test_a_taken_port_is_named(server: AdminServer) -> None:
    with pytest.raises(AdminPortError, match=rf"cannot listen on the admin port 127\.0\.0\.1:{server.port}: Address"):
        await AdminServer("127.0.0.1", server.port, {}).start()
