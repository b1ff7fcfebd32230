"""The application of test_chaos.py: those of applications.py, and one that broadcasts."""

import asyncio

from channel_layer import get_channel_layer
from tests.system import applications


async def application(scope, receive, send):
    if scope["type"] == "websocket" and scope["path"] == "/broadcaster":
        await broadcast(scope, receive, send)
    else:
        await applications.application(scope, receive, send)


async def broadcast(scope, receive, send):
    """Sends 0, 1, 2 … to ?group= every ?pause= seconds until told to stop; then says how many it sent."""
    arguments = applications.query(scope)
    layer = get_channel_layer()
    await receive()
    await send({"type": "websocket.accept"})
    told = asyncio.ensure_future(receive())
    number = 0
    while not told.done():
        await layer.group_send(arguments["group"], {"type": "websocket.send", "text": str(number)})
        number += 1
        await asyncio.wait((told,), timeout=float(arguments["pause"]))
    await send({"type": "websocket.send", "text": str(number)})
    await receive()
