"""A chat over plain TCP, line by line, in the rooms of the WebSocket chat (examples/chat): a protocol of one's own.

    trunkline serve tcp_chat:application --app-dir examples --protocol tcp      (its output names the broker)
    python examples/tcp_chat.py --redis unix:///tmp/trunkline-…/broker.sock
    nc 127.0.0.1 8023

and http://127.0.0.1:8000/ in a browser. The first class is the protocol server, which holds the sockets and knows
lines, and nothing of rooms; the rest is the application, which runs in the workers and knows no sockets.
"""

import argparse
import json
import logging
import sys

from chat.chat import ROOM_PATH, TEXT_CHARACTERS_MAX, Visitor
from chat.chat import application as web_application

from interface_server.own_protocol import OwnProtocol, serve
from interface_server.settings import InterfaceSettings

LINE_BYTES_MAX = 8 * 1024  # a longer one ends the connection
SHOWN = {
    "said": "{name}: {text}",
    "joined": "* {name} is here",
    "left": "* {name} has left",
    "here": "* {name} is here",
}


class Lines(OwnProtocol):
    """Lines of UTF-8 text, as events ``tcp.line`` both ways."""

    scope_type = "tcp"

    def __init__(self, socket):
        super().__init__(socket)
        self.rest = b""  # of a line; bounded by LINE_BYTES_MAX and one read

    def data_received(self, data):
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.socket.send_event({"type": "tcp.line", "text": line.rstrip(b"\r").decode("utf-8", "replace")})
        if len(self.rest) > LINE_BYTES_MAX:
            self.socket.write(b"That line is too long.\r\n")
            self.socket.close()

    def event_received(self, event):
        self.socket.write(event["text"].encode("utf-8", "replace") + b"\r\n")

    def refused(self, reason):
        self.socket.write(f"Sorry: {reason}.\r\n".encode())


async def application(scope, receive, send):
    if scope["type"] == "tcp":
        await Caller(scope, receive, send).stay()
    else:
        await web_application(scope, receive, send)


class Caller(Visitor):
    """A visitor of the chat who came by TCP. What is said in the room arrives as it does for a browser."""

    def __init__(self, scope, receive, send):
        super().__init__({**scope, "path": "", "query_string": b""}, receive, send)
        self.id = self.reply_channel

    async def stay(self):
        await self.receive()  # tcp.connect
        await self.print("Which room, and who are you? For example: lobby ada")
        while self.group is None:
            event = await self.receive()
            if event["type"] == "tcp.disconnect":
                return
            room, _, name = event["text"].strip().partition(" ")
            if ROOM_PATH.fullmatch(f"/rooms/{room}") and name.strip():
                self.group, self.name = f"chat.{room}", name.strip()[:40]
            else:
                await self.print("A room (small letters, digits, -) and a name, please.")
        await self.layer.group_add(self.group, self.reply_channel)
        await self.tell_all("joined")
        try:
            await self.talk()
        finally:
            # Also when a line could not be printed: send() raises once the client is gone.
            await self.tell_all("left")

    async def talk(self):
        await self.call_the_roll()
        while True:
            event = await self.receive()
            if event["type"] == "tcp.line":
                if event["text"] == "/quit":
                    await self.send({"type": "tcp.close"})
                elif text := event["text"].strip()[:TEXT_CHARACTERS_MAX]:
                    await self.tell_all("said", text=text)
            elif event["type"] == "websocket.send":  # of the group: what browsers get as it is
                said = json.loads(event["text"])
                if said["id"] != self.id:
                    await self.print(SHOWN[said["kind"]].format(**said))
            elif event["type"] == "chat.roll_call":
                await self.answer(event["asker"])
            elif event["type"] == "tcp.disconnect":
                return

    async def print(self, text):
        await self.send({"type": "tcp.line", "text": "".join(c if c.isprintable() else " " for c in text)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The protocol server of the TCP chat.")
    parser.add_argument("--redis", default="redis://localhost:6379", help="the broker")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=8023, type=int)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    sys.exit(serve(Lines, InterfaceSettings(redis_url=options.redis, host=options.host, port=options.port)))
