"""What every server of the benchmarks serves: plain ASGI, the same file for all.

    /            HTTP: 13 bytes of text
    /echo        WebSocket: each message comes back
    /hold        WebSocket: accepted, then nothing
    /broadcast   WebSocket: each message goes to everybody

Only the broadcast depends on the server, because ASGI has none. ``BENCH_BROADCAST=groups`` is what an application
on Trunkline writes. ``BENCH_BROADCAST=pubsub`` is what one writes by hand elsewhere: a subscription to one Redis
channel in each process and a loop over its sockets. Channels' own way is in channels_application.py.
"""

import asyncio
import os

BODY = b"Hello, world!"
RESPONSE_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/plain"), (b"content-length", b"13")],
}
RESPONSE_BODY = {"type": "http.response.body", "body": BODY}


async def application(scope, receive, send):
    if scope["type"] == "http":
        await send(RESPONSE_START)
        await send(RESPONSE_BODY)
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await WEBSOCKETS[scope["path"]](scope, receive, send)
    else:
        raise ValueError(f"this application does not speak {scope['type']}")


async def echo(scope, receive, send):
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": event["text"]})


async def hold(scope, receive, send):
    while (await receive())["type"] != "websocket.disconnect":
        pass


async def broadcast_by_groups(scope, receive, send):
    from channel_layer import get_channel_layer

    layer = get_channel_layer()
    await layer.group_add("everybody", scope["extensions"]["channel_layer"]["reply_channel"])
    while (event := await receive())["type"] == "websocket.receive":
        await layer.group_send("everybody", {"type": "websocket.send", "text": event["text"]})


class Subscription:
    """The sockets of this process, and the one task that writes to them what Redis sends."""

    def __init__(self):
        import redis.asyncio

        self.sends = {}
        self.redis = redis.asyncio.Redis.from_url(os.environ["BENCH_REDIS"], decode_responses=True)
        self.task = asyncio.create_task(self.run())

    async def run(self):
        async with self.redis.pubsub() as pubsub:
            await pubsub.subscribe("everybody")
            async for message in pubsub.listen():
                if message["type"] == "message":
                    event = {"type": "websocket.send", "text": message["data"]}
                    for send in list(self.sends.values()):
                        await send(event)


subscription = None


async def broadcast_by_pubsub(scope, receive, send):
    global subscription
    if subscription is None:
        subscription = Subscription()
    key = object()
    subscription.sends[key] = send
    try:
        while (event := await receive())["type"] == "websocket.receive":
            await subscription.redis.publish("everybody", event["text"])
    finally:
        del subscription.sends[key]


WEBSOCKETS = {
    "/echo": echo,
    "/hold": hold,
    "/broadcast": broadcast_by_groups if os.environ.get("BENCH_BROADCAST") == "groups" else broadcast_by_pubsub,
}
