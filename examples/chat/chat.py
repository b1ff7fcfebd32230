"""A chat with rooms: one page, one WebSocket for each window, one group for each room.

trunkline serve --app-dir examples/chat chat:application

What is said in a room goes to its group as a ``websocket.send``: the interface servers hand it to the browsers
themselves, and no worker is asked again. Who is in a room is nobody's to remember, so nothing is left behind by a
worker that dies: whoever wants to know calls the roll. A ``chat.roll_call`` to the group reaches the application
instance of every member, and each answers to the one who asked.
"""

import contextlib
import json
import re
from pathlib import Path
from urllib.parse import parse_qs

from channel_layer import ChannelFull, get_channel_layer

PAGES = {
    "/": ("index.html", b"text/html; charset=utf-8"),
    "/chat.js": ("chat.js", b"text/javascript; charset=utf-8"),
    "/chat.css": ("chat.css", b"text/css; charset=utf-8"),
}
ROOM_PATH = re.compile(r"/rooms/([a-z0-9-]{1,40})")
NAME_CHARACTERS_MAX = 40
TEXT_CHARACTERS_MAX = 2000


async def application(scope, receive, send):
    if scope["type"] == "http":
        await serve_page(scope, send)
    elif scope["type"] == "websocket":
        await Visitor(scope, receive, send).stay()
    else:
        raise ValueError(f"this application does not speak {scope['type']}")


async def serve_page(scope, send):
    name, content_type = PAGES.get(scope["path"], (None, b"text/plain"))
    body = (Path(__file__).parent / name).read_bytes() if name is not None else b"There is no such page.\n"
    headers = [
        (b"content-type", content_type),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-cache"),
    ]
    await send({"type": "http.response.start", "status": 404 if name is None else 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Visitor:
    """One window in one room, from its coming to its leaving."""

    def __init__(self, scope, receive, send):
        query = parse_qs(scope["query_string"].decode("ascii", "replace"))
        room = ROOM_PATH.fullmatch(scope["path"])
        self.receive = receive
        self.send = send
        self.reply_channel = scope["extensions"]["channel_layer"]["reply_channel"]
        self.group = f"chat.{room.group(1)}" if room else None
        self.name = query.get("name", [""])[0].strip()[:NAME_CHARACTERS_MAX]
        # The page makes it up and keeps it, so that a visitor who comes back is known to be the same.
        self.id = query.get("id", [""])[0][:NAME_CHARACTERS_MAX]
        self.layer = get_channel_layer()

    async def stay(self):
        await self.receive()  # websocket.connect
        if self.group is None or not self.name or not self.id:
            await self.send({"type": "websocket.close"})
            return
        await self.send({"type": "websocket.accept"})
        # From here on what is said in the room reaches this window. Nothing has to be undone at the end: the
        # membership ends with the connection.
        await self.layer.group_add(self.group, self.reply_channel)
        await self.tell_all("joined")
        await self.call_the_roll()
        while True:
            event = await self.receive()
            if event["type"] == "websocket.receive":
                await self.window_said(event.get("text") or "")
            elif event["type"] == "chat.roll_call":
                await self.answer(event["asker"])
            elif event["type"] == "websocket.disconnect":
                await self.tell_all("left")
                return

    async def window_said(self, text):
        try:
            message = json.loads(text)
            kind = message["kind"]
        except (ValueError, KeyError, TypeError):
            await self.send({"type": "websocket.close", "code": 1003, "reason": "JSON with a kind is expected"})
            return
        if kind == "say":
            text = str(message.get("text", "")).strip()[:TEXT_CHARACTERS_MAX]
            if text:
                await self.tell_all("said", text=text)
        elif kind == "who":
            await self.call_the_roll()

    async def call_the_roll(self):
        await self.layer.group_send(self.group, {"type": "chat.roll_call", "asker": self.reply_channel})

    async def answer(self, asker):
        # A large room answers all at once, and not everybody is heard; the asker's page calls the roll again soon.
        with contextlib.suppress(ChannelFull):
            await self.layer.send(asker, {"type": "websocket.send", "text": self.line("here")})

    async def tell_all(self, kind, **more):
        await self.layer.group_send(self.group, {"type": "websocket.send", "text": self.line(kind, **more)})

    def line(self, kind, **more):
        # The connection tells a visitor who came back from the one who leaves late.
        return json.dumps({"kind": kind, "id": self.id, "name": self.name, "connection": self.reply_channel, **more})
