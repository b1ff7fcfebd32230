"""The application of the soak: WebSockets that commit and are members, streams both ways, and broadcasts.

What each says of itself (its process id, a number) is what tests/soak/clients.py checks.
"""

import asyncio
import hashlib
import itertools
import os
import random
import time

from channel_layer import get_channel_layer
from channel_layer.errors import BrokerUnavailable
from tests.system.applications import lifespan, query, reply_channel, respond
from tests.system.handover_application import note

GROUP = "soak"
PIECE_BYTES = 8 * 1024
STARTED_AT = time.monotonic()
TURNS = itertools.count()  # of the broadcasts of this process: they must arrive in this order


async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["type"] == "websocket":
        await counter(scope, receive, send)
    else:
        await ROUTES[scope["path"]](scope, receive, send)


async def counter(scope, receive, send):
    """Answers each message with its number, and commits; what comes behind the commit leaves with the next one."""
    extension = scope["extensions"]["websocket.handover"]
    count = extension.get("state", 0)
    await receive()
    await send({"type": "websocket.accept"})
    if "state" not in extension:
        await get_channel_layer().group_add(GROUP, reply_channel(scope))
        await send({"type": "websocket.send", "text": "joined"})
        await send({"type": "websocket.handover.state", "state": 0, "commit": True})
    while (event := await receive())["type"] != "websocket.disconnect":
        await send({"type": "websocket.send", "text": f"e {count} {event['text']}"})
        count += 1
        await send({"type": "websocket.handover.state", "state": count, "commit": True})


def body_pieces(seed, pieces):
    generator = random.Random(seed)
    return (generator.randbytes(PIECE_BYTES) for _ in range(pieces))


async def download(scope, receive, send):
    """?pieces= of the body that belongs to ?seed=, a ?pause= between two of them."""
    arguments = query(scope)
    pieces, pause_s = int(arguments["pieces"]), float(arguments["pause"])
    headers = [(b"content-length", b"%d" % (pieces * PIECE_BYTES)), (b"x-pid", b"%d" % os.getpid())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in body_pieces(arguments["seed"], pieces):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        if pause_s:
            await asyncio.sleep(pause_s)
    await send({"type": "http.response.body", "body": b""})


async def upload(scope, receive, send):
    """Writes ?id= to ?file=, and answers with the digest of the body."""
    arguments = query(scope)
    note(arguments["file"], arguments["id"])
    digest, more = hashlib.sha256(), True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return
        digest.update(event.get("body", b""))
        more = event.get("more_body", False)
    await respond(send, digest.hexdigest().encode())


async def broadcast(scope, receive, send):
    """Sends ?number= to everybody, and says who did, and for how long it has been there."""
    text = f"b {os.getpid()} {next(TURNS)} {query(scope)['number']}"
    try:
        await get_channel_layer().group_send(GROUP, {"type": "websocket.send", "text": text})
    except BrokerUnavailable:
        await respond(send, b"", 500)  # not counted
    else:
        await respond(send, b"%d %f" % (os.getpid(), time.monotonic() - STARTED_AT))


ROUTES = {"/download": download, "/upload": upload, "/broadcast": broadcast}
