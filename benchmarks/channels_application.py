"""The broadcast as Django Channels does it: an unmodified consumer, the same for every server and channel layer.

``BENCH_LAYER`` is the class of the channel layer, ``BENCH_LAYER_CONFIG`` its CONFIG in JSON.
"""

import json
import os

from django.conf import settings

settings.configure(
    SECRET_KEY="benchmark",
    ALLOWED_HOSTS=["*"],
    INSTALLED_APPS=["channels"],
    CHANNEL_LAYERS={
        "default": {"BACKEND": os.environ["BENCH_LAYER"], "CONFIG": json.loads(os.environ["BENCH_LAYER_CONFIG"])}
    },
)

import django  # noqa: E402 - Django wants its settings first

django.setup()

from channels.generic.websocket import AsyncWebsocketConsumer  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from django.urls import path  # noqa: E402


class Everybody(AsyncWebsocketConsumer):
    groups = ("everybody",)

    async def receive(self, text_data):
        await self.channel_layer.group_send("everybody", {"type": "said", "text": text_data})

    async def said(self, event):
        await self.send(text_data=event["text"])


application = ProtocolTypeRouter({"websocket": URLRouter([path("broadcast", Everybody.as_asgi())])})
