"""Starlette, FastAPI and Channels on a worker, with the client's side played by the test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings as django_settings
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from channel_layer.frames import FrameKind, Outcome
from tests.worker.support import INTERFACE, FakeInterface, FakeLayer, http_scope, make_opening, turns, websocket_scope
from worker.application import build_application
from worker.lifespan import Lifespan
from worker.process import WorkerProcess
from worker.settings import WorkerSettings


class Client:
    """One connection to an application on a WorkerProcess."""

    def __init__(self, application: Any, *, state: dict[str, Any] | None = None, reads: bool = True) -> None:
        self.layer = FakeLayer()
        self.interface = FakeInterface()
        self.reads = reads
        self.process = WorkerProcess(
            WorkerSettings(redis_url="redis://unused", application="unused:app"),
            application=build_application(application),
            layer=self.layer,  # type: ignore[arg-type]
            state=state,
        )
        self.process.start()

    async def open(self, scope: dict[str, Any], first: dict[str, Any]) -> None:
        await self.layer.offer(make_opening(scope, first=first))
        self.interface.event(first)
        await turns()
        if FrameKind.ANSWER not in [frame[1] for frame in self.layer.frames]:
            self.deliver(self.interface.frame(FrameKind.GRANT))

    def deliver(self, *frames: list[Any]) -> None:
        for frame in frames:
            self.process.frame_received(INTERFACE, frame)

    async def send(self, event: dict[str, Any]) -> None:
        self.deliver(*self.interface.event(event))
        await self.settle()

    async def leave(self, event: dict[str, Any]) -> None:
        self.deliver(self.interface.frame(FrameKind.GONE), *self.interface.last(event))
        await self.settle()

    async def settle(self) -> list[dict[str, Any]]:
        """Until nothing moves for 20 ms: frameworks use threads and timers of their own."""
        quiet = 0
        while quiet < 4:
            await turns()
            frames = self.layer.take() if self.reads else []
            self.deliver(*self.interface.read(frames))
            quiet = 0 if frames else quiet + 1
            await asyncio.sleep(0.005)
        return self.interface.events

    async def over(self) -> Outcome | None:
        async with asyncio.timeout(30):
            while self.process.instances():
                await self.settle()
        await self.settle()
        return self.interface.outcome

    def response(self) -> tuple[int, dict[bytes, bytes], bytes]:
        start, *bodies = self.interface.events
        assert not bodies[-1]["more_body"]
        return start["status"], dict(start["headers"]), b"".join(body["body"] for body in bodies)


async def request(
    application: Any, method: str = "GET", path: str = "/", *, chunks: tuple[bytes, ...] = (b"",), **scope: Any
) -> tuple[int, dict[bytes, bytes], bytes]:
    client = Client(application, state=scope.pop("state", None))
    events = [
        {"type": "http.request", "body": chunk, "more_body": number < len(chunks)}
        for number, chunk in enumerate(chunks, 1)
    ]
    await client.open(http_scope(method, path, **scope), events[0])
    for event in events[1:]:
        await client.send(event)
    assert await client.over() is Outcome.RETURNED
    return client.response()


async def everything(request: Request) -> Response:
    return JSONResponse(
        {
            "method": request.method,
            "url": str(request.url),
            "query": dict(request.query_params),
            "agent": request.headers.get("user-agent"),
            "twice": request.headers.getlist("x-twice"),
            "cookies": request.cookies,
            "client": list(request.client or ()),
            "path": request.path_params,
        }
    )


async def read_body(request: Request) -> Response:
    kind = request.path_params["kind"]
    if kind == "json":
        return JSONResponse(await request.json())
    if kind == "form":
        async with request.form() as form:
            return JSONResponse({key: value for key, value in form.items() if isinstance(value, str)})
    if kind == "stream":
        return PlainTextResponse(",".join([str(len(chunk)) async for chunk in request.stream()]))
    return Response(await request.body())


async def streaming(request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        for number in range(100):
            yield bytes([number]) * 10_000

    return StreamingResponse(parts())


def sync_endpoint(request: Request) -> Response:
    return PlainTextResponse(f"in a thread, {request.state.greeting}")


def make_starlette(**options: Any) -> Starlette:
    return Starlette(
        routes=[
            Route("/echo/{name}", everything),
            Route("/body/{kind}", read_body, methods=["POST"]),
            Route("/stream", streaming),
            Route("/sync", sync_endpoint),
        ],
        **options,
    )


async def test_starlette_request_data() -> None:
    status, headers, body = await request(
        make_starlette(),
        path="/echo/you",
        query_string=b"a=1&b=%C3%A4",
        headers=[
            [b"host", b"example.org"],
            [b"user-agent", b"test"],
            [b"x-twice", b"1"],
            [b"x-twice", b"2"],
            [b"cookie", b"k=v; l=w"],
        ],
    )
    assert (status, headers[b"content-type"]) == (200, b"application/json")
    assert json.loads(body) == {
        "method": "GET",
        "url": "http://example.org/echo/you?a=1&b=%C3%A4",
        "query": {"a": "1", "b": "ä"},
        "agent": "test",
        "twice": ["1", "2"],
        "cookies": {"k": "v", "l": "w"},
        "client": ["127.0.0.1", 50000],
        "path": {"name": "you"},
    }


@pytest.mark.parametrize(
    ("kind", "content_type", "chunks", "expected"),
    [
        ("json", b"application/json", (b'{"a": ', b"[1]}"), b'{"a":[1]}'),
        ("form", b"application/x-www-form-urlencoded", (b"a=1&b", b"=2"), b'{"a":"1","b":"2"}'),
        (
            "form",
            b"multipart/form-data; boundary=B",
            (b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n', b"x\r\n--B--\r\n"),
            b'{"a":"x"}',
        ),
        ("stream", b"text/plain", (b"12345", b"123", b"1", b""), b"5,3,1,0"),
        ("body", b"text/plain", (b"a" * 50_000, b"b" * 50_000), b"a" * 50_000 + b"b" * 50_000),
    ],
)
async def test_starlette_bodies(kind: str, content_type: bytes, chunks: tuple[bytes, ...], expected: bytes) -> None:
    headers = [[b"host", b"example.org"], [b"content-type", content_type]]
    status, _, body = await request(make_starlette(), "POST", f"/body/{kind}", chunks=chunks, headers=headers)
    assert (status, body) == (200, expected)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_starlette_streams(spec_version: str) -> None:
    asgi = {"version": "3.0", "spec_version": spec_version}
    status, _, body = await request(make_starlette(), path="/stream", asgi=asgi)
    assert (status, len(body)) == (200, 1_000_000)


async def test_middleware_that_wraps_receive_and_send() -> None:
    async def dispatch(request: Request, call_next: Any) -> Response:
        body = await request.body()
        response: Response = await call_next(request)
        response.headers["x-length"] = str(len(body))
        return response

    application = make_starlette(middleware=[Middleware(BaseHTTPMiddleware, dispatch=dispatch)])
    status, headers, body = await request(application, "POST", "/body/raw", chunks=(b"abc", b"def"))
    assert (status, headers[b"x-length"], body) == (200, b"6", b"abcdef")


async def test_the_lifespan_state_reaches_requests() -> None:
    @contextlib.asynccontextmanager
    async def lifespan_of(application: Starlette) -> AsyncIterator[dict[str, Any]]:
        yield {"greeting": "hello"}
        log.append("closed")

    log: list[str] = []
    application = make_starlette(lifespan=lifespan_of)
    lifespan = Lifespan(build_application(application), mode="on")
    await lifespan.startup()
    _, _, body = await request(application, path="/sync", state=lifespan.state)
    assert body == b"in a thread, hello"
    assert await lifespan.shutdown(5) is True
    assert log == ["closed"]


async def test_background_tasks_outlive_the_client() -> None:
    done = asyncio.Event()

    async def later() -> None:
        await go.wait()
        done.set()

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("ok", background=BackgroundTask(later))

    go = asyncio.Event()
    client = Client(Starlette(routes=[Route("/", endpoint)]))
    await client.open(http_scope(), {"type": "http.request"})
    await client.settle()
    assert client.response()[2] == b"ok"
    await client.leave({"type": "http.disconnect"})
    assert not done.is_set()
    go.set()
    assert await client.over() is Outcome.RETURNED
    assert done.is_set()


async def test_a_client_that_leaves_a_stream_costs_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    client = Client(make_starlette(), reads=False)
    await client.open(http_scope(path="/stream"), {"type": "http.request"})
    await client.settle()
    await client.leave({"type": "http.disconnect"})
    client.reads = True
    await client.over()
    assert caplog.text == ""


async def test_an_error_in_an_endpoint_is_answered_by_starlette_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def endpoint(request: Request) -> Response:
        raise ZeroDivisionError("mine")

    client = Client(Starlette(routes=[Route("/", endpoint)]))
    await client.open(http_scope(), {"type": "http.request"})
    assert await client.over() is Outcome.RAISED
    assert client.response()[0] == 500
    assert "ZeroDivisionError: mine" in caplog.text


fastapi = FastAPI()


@fastapi.websocket("/rooms/{room}")
async def rooms(websocket: WebSocket, room: str) -> None:
    await websocket.accept(subprotocol="chat", headers=[(b"X-Room", room.encode())])
    try:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            if message.get("text") == "close":
                await websocket.close(4001, "asked")
            elif message.get("bytes") is not None:
                await websocket.send_bytes(message["bytes"])
            else:
                await websocket.send_json({"room": room, "text": message["text"]})
    except (WebSocketDisconnect, RuntimeError) as error:
        left.append(error)


left: list[Exception] = []


async def test_fastapi_websocket() -> None:
    left.clear()
    client = Client(fastapi)
    await client.open(websocket_scope("/rooms/tea", subprotocols=["chat"]), {"type": "websocket.connect"})
    await client.send({"type": "websocket.receive", "text": "ä"})
    await client.send({"type": "websocket.receive", "bytes": b""})
    assert client.interface.events == [
        {"type": "websocket.accept", "subprotocol": "chat", "headers": [[b"x-room", b"tea"]]},
        {"type": "websocket.send", "text": '{"room":"tea","text":"ä"}'},
        {"type": "websocket.send", "bytes": b""},
    ]
    await client.leave({"type": "websocket.disconnect", "code": 1001, "reason": ""})
    assert await client.over() is Outcome.RETURNED
    (error,) = left
    assert isinstance(error, WebSocketDisconnect)
    assert error.code == 1001


async def test_fastapi_closes_with_code_and_reason() -> None:
    client = Client(fastapi)
    await client.open(websocket_scope("/rooms/tea"), {"type": "websocket.connect"})
    await client.send({"type": "websocket.receive", "text": "close"})
    assert client.interface.events[-1] == {"type": "websocket.close", "code": 4001, "reason": "asked"}
    await client.leave({"type": "websocket.disconnect", "code": 4001, "reason": "asked"})
    assert await client.over() is Outcome.RETURNED


async def test_fastapi_refuses_an_unknown_path() -> None:
    client = Client(fastapi)
    await client.open(websocket_scope("/nowhere"), {"type": "websocket.connect"})
    assert await client.over() is Outcome.RETURNED
    (close,) = client.interface.events
    assert close["type"] == "websocket.close"


class EchoConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    async def connect(self) -> None:
        await self.accept()

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        await self.send(text_data=text_data, bytes_data=bytes_data)
        if text_data == "close":
            await self.close(code=4000)


async def test_a_channels_consumer() -> None:
    if not django_settings.configured:
        django_settings.configure()
    client = Client(EchoConsumer.as_asgi())
    await client.open(websocket_scope(), {"type": "websocket.connect"})
    await client.send({"type": "websocket.receive", "text": "close"})
    assert client.interface.events == [
        {"type": "websocket.accept", "subprotocol": None, "headers": []},
        {"type": "websocket.send", "text": "close"},
        {"type": "websocket.close", "code": 4000, "reason": ""},
    ]
    await client.leave({"type": "websocket.disconnect", "code": 4000, "reason": ""})
    assert await client.over() is Outcome.RETURNED
