"""A Starlette application that uses a request in every way, streams, and talks over a WebSocket.

pip install starlette python-multipart
trunkline serve examples.starlette_app:app
"""

import asyncio
import contextlib
import hashlib

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

import channel_layer


@contextlib.asynccontextmanager
async def lifespan(app):
    yield {"greeting": "hello"}


async def describe(request: Request):
    """What a request says of itself."""
    return JSONResponse(
        {
            "method": request.method,
            "url": str(request.url),
            "path": request.url.path,
            "query": dict(request.query_params),
            "headers": dict(request.headers),
            "cookies": request.cookies,
            "client": request.client.host if request.client else None,
            "greeting": request.state.greeting,
        }
    )


async def body(request: Request):
    return PlainTextResponse(hashlib.sha256(await request.body()).hexdigest())


async def stream(request: Request):
    """Reads a body of any size without holding it."""
    digest = hashlib.sha256()
    size = 0
    async for chunk in request.stream():
        digest.update(chunk)
        size += len(chunk)
    return JSONResponse({"bytes": size, "sha256": digest.hexdigest()})


async def json_body(request: Request):
    return JSONResponse({"received": await request.json()})


async def form(request: Request):
    async with request.form() as fields:
        answer = {}
        for name, value in fields.multi_items():
            answer[name] = value if isinstance(value, str) else {"file": value.filename, "bytes": value.size}
    return JSONResponse(answer)


async def countdown(request: Request):
    """A response that takes its time."""

    async def lines():
        for number in range(int(request.path_params["start"]), 0, -1):
            yield f"{number}\n"
            await asyncio.sleep(0.01)

    return StreamingResponse(lines(), media_type="text/plain")


async def events(request: Request):
    """Server-sent events: this response joins a group, and whoever sends to the group reaches it.

    The events come from POST /events, from any process; nothing runs here meanwhile.
    """
    reply_channel = request.scope["extensions"]["channel_layer"]["reply_channel"]

    async def nothing_of_our_own():
        await channel_layer.get_channel_layer().group_add("events", reply_channel)
        yield b": welcome\n\n"
        while not await request.is_disconnected():
            await asyncio.sleep(15)
            yield b": still here\n\n"

    return StreamingResponse(nothing_of_our_own(), media_type="text/event-stream")


async def publish(request: Request):
    text = (await request.body()).decode()
    lines = "".join(f"data: {line}\n" for line in text.splitlines())
    await channel_layer.get_channel_layer().group_send(
        "events", {"type": "http.response.body", "body": f"{lines}\n".encode()}
    )
    return PlainTextResponse("published\n")


async def echo(websocket: WebSocket):
    await websocket.accept()
    try:
        while True:
            await websocket.send_text(await websocket.receive_text())
    except WebSocketDisconnect:
        pass  # the client left; nothing to clean up


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/", describe, methods=["GET", "PUT", "DELETE"]),
        Route("/body", body, methods=["POST"]),
        Route("/stream", stream, methods=["POST"]),
        Route("/json", json_body, methods=["POST"]),
        Route("/form", form, methods=["POST"]),
        Route("/countdown/{start:int}", countdown),
        Route("/events", events, methods=["GET"]),
        Route("/events", publish, methods=["POST"]),
        WebSocketRoute("/echo", echo),
    ],
)
