"""Applications that the system tests serve. Plain ASGI: what fails here is ours, not a framework's."""

import asyncio
import hashlib
import json
import os
from urllib.parse import parse_qs

from channel_layer import get_channel_layer

CHUNK = bytes(range(256)) * 256  # 64 KiB


async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["type"] == "http":
        await ROUTES.get(scope["path"], not_found)(scope, receive, send)
    else:
        await SOCKETS.get(scope["path"], echo)(scope, receive, send)


async def lifespan(receive, send):
    while True:
        event = await receive()
        await send({"type": f"{event['type']}.complete"})
        if event["type"] == "lifespan.shutdown":
            return


def query(scope):
    return {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}


async def respond(send, body, status=200, content_type=b"text/plain"):
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def not_found(scope, receive, send):
    await respond(send, b"not found", 404)


async def hello(scope, receive, send):
    await respond(send, b"hello")


async def show_scope(scope, receive, send):
    """Answers with the scope as JSON, bytes as Latin-1."""
    await respond(send, json.dumps(scope, default=lambda value: value.decode("latin-1")).encode())


async def pid(scope, receive, send):
    await respond(send, str(os.getpid()).encode())


async def upload(scope, receive, send):
    """Answers with the digest of the body."""
    digest, size, more = hashlib.sha256(), 0, True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return
        digest.update(event.get("body", b""))
        size += len(event.get("body", b""))
        more = event.get("more_body", False)
    await respond(send, json.dumps({"bytes": size, "sha256": digest.hexdigest()}).encode())


async def download(scope, receive, send):
    """Streams ?bytes=N, without a content-length, with an optional ?pause= between chunks."""
    left, pause = int(query(scope)["bytes"]), float(query(scope).get("pause", 0))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while left > 0:
        piece = CHUNK[: min(left, len(CHUNK))]
        left -= len(piece)
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        if pause:
            await asyncio.sleep(pause)
    await send({"type": "http.response.body", "body": b""})


async def numbers(scope, receive, send):
    """Streams lines 0 … n-1, one event each, slowly."""
    arguments = query(scope)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for number in range(int(arguments["n"])):
        await send({"type": "http.response.body", "body": b"%d\n" % number, "more_body": True})
        await asyncio.sleep(float(arguments.get("pause", 0)))
    await send({"type": "http.response.body", "body": b""})


async def fail(scope, receive, send):
    raise RuntimeError("this application fails on purpose")


async def fail_later(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"some", "more_body": True})
    raise RuntimeError("this application fails on purpose")


async def hang(scope, receive, send):
    print(f"hang?{scope['query_string'].decode()} has begun", flush=True)
    while (await receive())["type"] != "http.disconnect":
        pass
    print(f"hang?{scope['query_string'].decode()} is over", flush=True)


async def deaf(scope, receive, send):
    """Never receives and never answers."""
    await asyncio.sleep(3600)


async def sse(scope, receive, send):
    """A stream in the group ?group=."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": b": joined\n\n", "more_body": True})
    await get_channel_layer().group_add(query(scope)["group"], reply_channel(scope))
    await send({"type": "http.response.body", "body": b": ready\n\n", "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        pass


async def publish(scope, receive, send):
    """Sends the body to the group ?group= as a WebSocket text."""
    event = await receive()
    await get_channel_layer().group_send(
        query(scope)["group"], {"type": "websocket.send", "text": event["body"].decode()}
    )
    await respond(send, b"sent")


def reply_channel(scope):
    return scope["extensions"]["channel_layer"]["reply_channel"]


async def echo(scope, receive, send):
    """Says in its handshake which processes serve it: a channel of the interface server, and one of the worker."""
    await receive()
    channels = (reply_channel(scope), await get_channel_layer().new_channel())
    await send({"type": "websocket.accept", "headers": [(b"x-channels", ",".join(channels).encode())]})
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": event.get("text"), "bytes": event.get("bytes")})


async def member(scope, receive, send):
    """Joins ?group= and says so; what the client sends goes to the group."""
    group = query(scope)["group"]
    layer = get_channel_layer()
    await receive()
    await send({"type": "websocket.accept"})
    await layer.group_add(group, reply_channel(scope))
    await send({"type": "websocket.send", "text": "joined"})
    while (event := await receive())["type"] == "websocket.receive":
        await layer.group_send(group, {"type": "websocket.send", "text": event["text"]})


async def consumer(scope, receive, send):
    """Joins "consumers" as Channels' consumers do: each instance gets the group's messages and sends by itself.

    What the client sends goes to that group, and straight to all clients; in front of that and behind it this client
    gets a message of its own. Of the group's message each client gets two, and every second one its own between them.
    """
    layer = get_channel_layer()
    own = reply_channel(scope)
    channel = await layer.new_channel()
    await receive()
    await send({"type": "websocket.accept"})
    await layer.group_add("consumers", channel)
    await layer.group_add("clients", own)
    await send({"type": "websocket.send", "text": "joined"})

    async def carry_out():
        while True:
            message = await layer.receive(channel)
            number, size = message["number"], message["size"]
            await send({"type": "websocket.send", "text": f"all {number} {'.' * size}"})
            if message["number"] % 2:
                await send({"type": "websocket.send", "text": f"own {number} {own}"})
            await send({"type": "websocket.send", "bytes": b"again %d" % number})

    carrying_out = asyncio.create_task(carry_out())
    while (event := await receive())["type"] == "websocket.receive":
        said = json.loads(event["text"])
        await layer.group_send("consumers", {"type": "said", **said})
        await send({"type": "websocket.send", "text": f"in front {said['number']}"})
        await layer.group_send("clients", {"type": "websocket.send", "text": f"direct {said['number']}"})
        await send({"type": "websocket.send", "text": f"behind {said['number']}"})
    carrying_out.cancel()


async def flood(scope, receive, send):
    """Sends ?n= messages of ?bytes= as fast as it may; then says how long its sends took."""
    arguments = query(scope)
    await receive()
    await send({"type": "websocket.accept"})
    for _ in range(int(arguments["n"])):
        await send({"type": "websocket.send", "bytes": bytes(int(arguments["bytes"]))})
    await send({"type": "websocket.close"})


async def fail_socket(scope, receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    raise RuntimeError("this application fails on purpose")


ROUTES = {
    "/": hello,
    "/pid": pid,
    "/scope": show_scope,
    "/upload": upload,
    "/download": download,
    "/numbers": numbers,
    "/fail": fail,
    "/fail-later": fail_later,
    "/hang": hang,
    "/deaf": deaf,
    "/sse": sse,
    "/publish": publish,
}
SOCKETS = {"/echo": echo, "/member": member, "/consumer": consumer, "/flood": flood, "/fail": fail_socket}
