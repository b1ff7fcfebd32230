"""Says which thread and which loop run what, for test_sync_code.py: ASGI, Django, Channels, WSGI in one file."""

import asyncio
import contextvars
import json
import os
import threading
import time

import django
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.conf import settings

settings.configure(
    ROOT_URLCONF=__name__,
    SECRET_KEY="for tests only",
    ALLOWED_HOSTS=["*"],
    USE_TZ=True,
    CHANNEL_LAYERS={"default": {"BACKEND": "channel_layer.RedisChannelLayer"}},
)
django.setup()

from channels.generic.websocket import WebsocketConsumer  # noqa: E402
from channels.layers import get_channel_layer  # noqa: E402
from channels.routing import ProtocolTypeRouter  # noqa: E402
from django.core.asgi import get_asgi_application  # noqa: E402
from django.http import JsonResponse  # noqa: E402
from django.urls import path  # noqa: E402

variable = contextvars.ContextVar("variable", default="unset")
LONG_S = 0.5  # of a blocking call; requests that run beside each other and should not would meet in it
PATIENCE_S = 30  # for those who should


def here():
    """Thread and loop of the caller."""
    try:
        loop = id(asyncio.get_running_loop())
    except RuntimeError:
        loop = None
    thread = threading.current_thread()
    return {
        "thread": thread.ident,
        "name": thread.name,
        "is_main": thread is threading.main_thread(),
        "loop": loop,
        "variable": variable.get(),
    }


class Meeting:
    """Counts how many are in a blocking call at the same time."""

    def __init__(self):
        self.changed = threading.Condition()
        self.inside = 0
        self.most = 0  # since nobody was

    def block(self, until=1):
        """Return when so many have been here at the same time, or it is clear that they do not come."""
        with self.changed:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.changed.notify_all()
        time.sleep(LONG_S)
        with self.changed:
            self.changed.wait_for(lambda: self.most >= until, PATIENCE_S)
            most = self.most
            self.inside -= 1
            if not self.inside:
                self.most = 0
        return {**here(), "together": most}


meeting = Meeting()


async def plain(scope):
    return here()


async def blocking(scope):
    return meeting.block()


async def blocking_for_long(scope):
    """Says how often it was begun, wherever."""
    return block_for_long()


def block_for_long():
    with open(os.environ["BEGUN_FILE"], "a") as begun:
        begun.write("x")
    time.sleep(6.0)  # an opening that nobody claims is taken for lost after 3 s
    with open(os.environ["BEGUN_FILE"]) as begun:
        return {"begun": len(begun.read())}


async def sensitive(scope):
    return await sync_to_async(meeting.block)()


async def sensitive_in_context(scope):
    async with ThreadSensitiveContext():
        return await sync_to_async(meeting.block)(until=6)


async def insensitive(scope):
    return await sync_to_async(meeting.block, thread_sensitive=False)(until=4)


async def to_thread(scope):
    return await asyncio.to_thread(meeting.block, until=4)


async def context(scope):
    seen = here()["variable"]
    variable.set("of the request")

    def change():
        before = variable.get()
        variable.set("of the thread")
        return before

    return {"before": seen, "there": await sync_to_async(change)(), "back": variable.get()}


async def around(scope):
    """From the loop into a thread, and from there back by async_to_sync."""

    async def again():
        return here()

    def in_thread():
        return {"thread": here(), "again": async_to_sync(again)()}

    return {"first": here(), **await sync_to_async(in_thread)()}


VIEWS = {
    view.__name__: view
    for view in (
        plain,
        blocking,
        blocking_for_long,
        sensitive,
        sensitive_in_context,
        insensitive,
        to_thread,
        context,
        around,
    )
}


async def asgi3(scope, receive, send):
    if scope["type"] != "http":
        raise RuntimeError("HTTP only")
    answer = await VIEWS[scope["path"].strip("/")](scope)
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


def asgi2(scope):
    """A double callable: the first call is an ordinary function."""
    made = here()

    async def instance(receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": json.dumps({"made": made, "run": here()}).encode()})

    return instance


# Django and Channels


def sync_view(request):
    return JsonResponse(meeting.block(until=6))


async def async_view(request):
    return JsonResponse(here())


def telling_view(request):
    """The channel layer from synchronous code, as Channels documents it."""

    async def there_and_back():
        layer = get_channel_layer()
        name = await layer.new_channel()
        await layer.send(name, {"type": "note", "text": "told"})
        return {**await layer.receive(name), **here()}

    return JsonResponse({"view": here(), "call": async_to_sync(there_and_back)()})


urlpatterns = [path("sync", sync_view), path("async", async_view), path("tell", telling_view)]


class Consumer(WebsocketConsumer):
    def receive(self, text_data=None, bytes_data=None):
        self.send(json.dumps(meeting.block()))


site = ProtocolTypeRouter({"http": get_asgi_application(), "websocket": Consumer.as_asgi()})


# WSGI


def wsgi(environ, start_response):
    before = variable.get()
    variable.set("of the request")
    result = {"before": before, **meeting.block(until=1 if environ["PATH_INFO"] == "/tell" else 3)}
    if environ["PATH_INFO"] == "/tell":

        async def again():
            return here()

        result["call"] = async_to_sync(again)()
    start_response("200 OK", [("Content-Type", "application/json")])

    def body():
        yield json.dumps({**result, "iterated": here()}).encode()

    return body()
