"""RedisChannelLayer as the backend of Django Channels: the tutorial's consumers and views, in a Django of their own.

Each test runs a script in a process of its own, because Django's settings are for once.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.channel_layer.processes import PATIENT
from tests.servers import BrokerServer

pytest.importorskip("channels")

HEAD = (
    PATIENT
    + """
import asyncio, logging, os, sys, threading
logging.getLogger("asyncio").addFilter(lambda record: not str(record.msg).startswith("Executing "))
from django.conf import settings
settings.configure(
    DEBUG=True, SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__,
    INSTALLED_APPS=["channels"],
    CHANNEL_LAYERS={"default": CHANNEL_LAYER},
)
import django
django.setup()
from asgiref.sync import async_to_sync, sync_to_async
from channels.layers import get_channel_layer
from asgiref.testing import ApplicationCommunicator

class WebsocketCommunicator(ApplicationCommunicator):
    # That of channels.testing needs Daphne to be imported.
    def __init__(self, application, path):
        scope = {"type": "websocket", "path": path, "headers": [], "query_string": b"", "subprotocols": []}
        super().__init__(application, scope)

    async def connect(self, timeout):
        await self.send_input({"type": "websocket.connect"})
        return (await self.receive_output(timeout))["type"] == "websocket.accept", None

    async def send_to(self, text_data):
        await self.send_input({"type": "websocket.receive", "text": text_data})

    async def receive_from(self, timeout):
        return (await self.receive_output(timeout))["text"]

    async def disconnect(self, timeout):
        await self.send_input({"type": "websocket.disconnect", "code": 1000})
        await self.wait(timeout)
"""
)

# As in the tutorial of Channels, parts 2 and 3.
CONSUMERS = """
import json
from channels.generic.websocket import AsyncWebsocketConsumer, WebsocketConsumer
from channels.routing import URLRouter
from django.urls import re_path, path
from django.http import HttpResponse

class AsyncChat(AsyncWebsocketConsumer):
    async def connect(self):
        self.group = "chat_" + self.scope["url_route"]["kwargs"]["room_name"]
        await self.channel_layer.group_add(self.group, self.channel_name)
        await self.accept()

    async def disconnect(self, close_code):
        await self.channel_layer.group_discard(self.group, self.channel_name)

    async def receive(self, text_data):
        message = json.loads(text_data)["message"]
        await self.channel_layer.group_send(self.group, {"type": "chat.message", "message": message})

    async def chat_message(self, event):
        await self.send(text_data=json.dumps({"message": event["message"]}))

class SyncChat(WebsocketConsumer):
    def connect(self):
        self.group = "chat_" + self.scope["url_route"]["kwargs"]["room_name"]
        async_to_sync(self.channel_layer.group_add)(self.group, self.channel_name)
        self.accept()

    def disconnect(self, close_code):
        async_to_sync(self.channel_layer.group_discard)(self.group, self.channel_name)

    def receive(self, text_data):
        message = json.loads(text_data)["message"]
        async_to_sync(self.channel_layer.group_send)(self.group, {"type": "chat.message", "message": message})

    def chat_message(self, event):
        self.send(text_data=json.dumps({"message": event["message"]}))

application = URLRouter([
    re_path(r"^ws/async/(?P<room_name>[a-z]+)/$", AsyncChat.as_asgi()),
    re_path(r"^ws/sync/(?P<room_name>[a-z]+)/$", SyncChat.as_asgi()),
])

def announce(request):
    async_to_sync(get_channel_layer().group_send)("chat_lobby", {"type": "chat.message", "message": "from a view"})
    return HttpResponse("sent")

urlpatterns = [path("announce/", announce)]
"""

CHAT = """
async def main():
    kinds = ("async", "sync", "async", "sync")
    clients = [WebsocketCommunicator(application, f"/ws/{kind}/lobby/") for kind in kinds]
    for client in clients:
        connected, _ = await client.connect(timeout=10)
        assert connected
    for number, client in enumerate(clients):
        await client.send_to(text_data=json.dumps({"message": f"hello {number}"}))
        for each in clients:
            assert json.loads(await each.receive_from(timeout=10)) == {"message": f"hello {number}"}
    from django.test import Client
    response = await sync_to_async(lambda: Client().get("/announce/"))()
    assert response.status_code == 200
    threads = [threading.Thread(target=lambda: Client().get("/announce/")) for _ in range(5)]
    for thread in threads:
        thread.start()
    for each in clients:
        for _ in range(6):
            assert json.loads(await each.receive_from(timeout=10)) == {"message": "from a view"}
    for thread in threads:
        await asyncio.to_thread(thread.join)
    await clients[0].disconnect(timeout=10)
    await clients[1].send_to(text_data=json.dumps({"message": "without the first"}))
    for each in clients[1:]:
        assert json.loads(await each.receive_from(timeout=10)) == {"message": "without the first"}
        await each.disconnect(timeout=10)
    # A cancelled receive() ends on the layer's thread a moment after it did here.
    async with asyncio.timeout(30):
        while (statistics := await get_channel_layer().statistics()).local_channels.receivers:
            await asyncio.sleep(0.01)
    assert statistics.groups.members == 0, statistics

asyncio.run(main())
asyncio.run(main())  # again, on a new loop
print("done")
"""

WORKER = """
from channels.consumer import SyncConsumer
from channels.routing import ChannelNameRouter, ProtocolTypeRouter
from channels.worker import Worker

class Thumbnails(SyncConsumer):
    def generate(self, message):
        async_to_sync(self.channel_layer.send)("results", {"type": "done", "id": message["id"]})

async def main():
    layer = get_channel_layer()
    router = ProtocolTypeRouter({"channel": ChannelNameRouter({"thumbnails": Thumbnails.as_asgi()})})
    worker = Worker(router, ["thumbnails"], layer, max_applications=10)
    working = asyncio.ensure_future(worker.handle())
    for number in range(10):
        await layer.send("thumbnails", {"type": "generate", "id": number})
    results = [(await asyncio.wait_for(layer.receive("results"), 10))["id"] for _ in range(10)]
    assert sorted(results) == list(range(10)), results
    working.cancel()

asyncio.run(main())
print("done")
"""

FULL = """
from channels.exceptions import ChannelFull
layer = get_channel_layer()
async_to_sync(layer.send)("x", {"type": "a"})
try:
    async_to_sync(layer.send)("x", {"type": "a"})
except ChannelFull as error:
    print("done")
"""


def run(server: BrokerServer, script: str, *, config: str = "{}", environment: bool = False) -> None:
    backend = f"{{'BACKEND': 'channel_layer.RedisChannelLayer', 'CONFIG': {config}}}"
    text = f"CHANNEL_LAYER = {backend}\n{HEAD}{CONSUMERS}{script}"
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRUNKLINE_")}
    if environment:
        env["TRUNKLINE_REDIS"] = server.url
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-c", text],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=env,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    # Channels itself warns about other things.
    for complaint in ("ResourceWarning", "never awaited", "never retrieved", "destroyed", "trunkline"):
        assert complaint not in done.stderr, done.stderr
    with server.client() as client:
        assert [key for key in client.keys("*") if b"inbox" in key or b"lease" in key] == []


def test_the_tutorials_chat_with_hosts(any_broker_server: BrokerServer) -> None:
    run(any_broker_server, CHAT, config=f"{{'hosts': [{any_broker_server.url!r}], 'prefix': 'asgi'}}")


def test_the_tutorials_chat_with_the_environment(broker_server: BrokerServer) -> None:
    run(broker_server, CHAT, environment=True)


def test_channels_own_worker(broker_server: BrokerServer) -> None:
    run(broker_server, WORKER, environment=True)


def test_channel_full_is_the_exception_of_channels(broker_server: BrokerServer) -> None:
    run(broker_server, FULL, config=f"{{'hosts': [{broker_server.url!r}], 'capacity': 1}}")
