"""Background work in workers of its own: Channels' ChannelNameRouter with sync and async consumers."""

import os
import signal

import httpx
import pytest

from channel_layer import Publisher
from tests.system.processes import Command, Served

SITE = """
import os, threading, time
import django
from asgiref.sync import async_to_sync
from django.conf import settings

settings.configure(
    ROOT_URLCONF=__name__, SECRET_KEY="secret", ALLOWED_HOSTS=["*"], USE_TZ=True,
    CHANNEL_LAYERS={"default": {"BACKEND": "channel_layer.RedisChannelLayer"}},
)
django.setup()

from channels.consumer import AsyncConsumer, SyncConsumer
from channels.layers import get_channel_layer
from channels.routing import ChannelNameRouter, ProtocolTypeRouter
from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django.urls import path


def say(*words):
    # In one write: the log shares the pipe.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())


class Thumbnails(SyncConsumer):
    def make(self, message):
        say("making", message["id"])
        time.sleep(message.get("seconds", 0))
        deadline = time.monotonic() + 60
        while "until" in message and not os.path.exists(message["until"]) and time.monotonic() < deadline:
            time.sleep(0.01)
        say("made", message["id"], self.scope["channel"], threading.current_thread() is threading.main_thread())

    def fail(self, message):
        raise RuntimeError("this consumer fails on purpose")


class Mails(AsyncConsumer):
    async def deliver(self, message):
        await self.channel_layer.send("thumbnails", {"type": "make", "id": "by " + message["to"]})
        say("delivered", message["to"])


def order(request):
    async_to_sync(get_channel_layer().send)("thumbnails", {"type": "make", "id": request.GET["id"]})
    return HttpResponse("ordered")

async def order_async(request):
    await get_channel_layer().send("mails", {"type": "deliver", "to": request.GET["to"]})
    return HttpResponse("ordered")

urlpatterns = [path("order", order), path("order-async", order_async)]
application = ProtocolTypeRouter({
    "http": get_asgi_application(),
    "channel": ChannelNameRouter({"thumbnails": Thumbnails.as_asgi(), "mails": Mails.as_asgi()}),
})
"""


@pytest.fixture
def site(tmp_path):
    (tmp_path / "main.py").write_text(SITE)
    return tmp_path


def background_worker(site, redis_url, *flags):
    command = Command("worker", "main:application", "--redis", redis_url, *flags, cwd=site)
    command.wait_for("worker w.* runs main:application")
    return command


def test_consumers_get_what_views_and_scripts_send(site):
    both = ("--channel", "thumbnails", "--channel", "mails")
    with Served("main:application", cwd=site) as served, background_worker(site, served.redis_url, *both) as worker:
        assert httpx.get(served.url + "/order?id=1", timeout=60).text == "ordered"
        worker.wait_for("made 1 thumbnails False")
        assert httpx.get(served.url + "/order-async?to=ada", timeout=60).text == "ordered"
        worker.wait_for("delivered ada")
        worker.wait_for("made by ada thumbnails False")
        with Publisher(served.redis_url) as publisher:
            publisher.send("thumbnails", {"type": "fail"})
            worker.wait_for("RuntimeError: this consumer fails on purpose")
            publisher.send("thumbnails", {"type": "make", "id": "behind the error"})
            worker.wait_for("made behind the error")
        # Requests are not for this worker.
        served.stop()
        assert "order" not in worker.output
        assert "made" not in served.output


def test_a_stop_finishes_the_message_in_hand_and_leaves_the_rest_to_the_next_worker(site):
    with Served("main:application", cwd=site) as served, Publisher(served.redis_url) as publisher:
        with background_worker(site, served.redis_url, "--channel", "thumbnails") as first:
            publisher.send("thumbnails", {"type": "make", "id": "first", "seconds": 1})
            for number in range(20):
                publisher.send("thumbnails", {"type": "make", "id": f"later{number}"})
            first.wait_for("making first")
            first.process.send_signal(signal.SIGTERM)  # Ctrl-C would leave it the second that it takes, and no more
            assert first.wait_ended()[0] == 0
            assert [line.split()[0] for line in first.output.splitlines() if "mak" in line or "made" in line] == [
                "making",
                "made",
            ]
        with background_worker(site, served.redis_url, "--channel", "thumbnails") as second:
            second.wait_for("made later19")
            made = [line.split()[1] for line in second.output.splitlines() if line.startswith("made")]
            assert made == [f"later{number}" for number in range(20)]


def test_several_workers_share_a_channel_and_a_killed_one_loses_what_it_had_in_hand(site):
    with Served("main:application", cwd=site) as served, Publisher(served.redis_url) as publisher:
        flags = ("--channel", "thumbnails")
        with (
            background_worker(site, served.redis_url, *flags) as one,
            background_worker(site, served.redis_url, *flags) as two,
        ):
            for number in range(20):
                publisher.send("thumbnails", {"type": "make", "id": number, "seconds": 0.05})
            # One for each: who has the first does not end it before the other one has the second.
            for _ in range(2):
                publisher.send("thumbnails", {"type": "make", "id": "x", "until": str(site / "both have x")})
            one.wait_for("making x")
            two.wait_for("making x")
            (site / "both have x").touch()
            one.wait_for("made x")
            two.wait_for("made x")
            made = [
                int(line.split()[1])
                for command in (one, two)
                for line in command.output.splitlines()
                if line.startswith("made") and "x" not in line
            ]
            assert sorted(made) == list(range(20))
            for _ in range(2):
                publisher.send("thumbnails", {"type": "make", "id": "long", "until": str(site / "one is dead")})
            one.wait_for("making long")
            two.wait_for("making long")
            os.kill(one.process.pid, signal.SIGKILL)
            one.wait_ended()
            (site / "one is dead").touch()
            two.wait_for("made long")
            publisher.send("thumbnails", {"type": "make", "id": "end"})
            two.wait_for("made end")
            assert two.output.count("made long") == 1  # at most once


def test_a_worker_may_take_requests_and_messages(site, broker_server):
    channels = ("--channel", "http.request", "--channel", "mails")
    socket_path = site / "http.sock"
    with (
        Command("interface", "--uds", str(socket_path), "--redis", broker_server.url) as interface,
        background_worker(site, broker_server.url, *channels) as worker,
        httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket_path)), base_url="http://site", timeout=60
        ) as client,
    ):
        interface.wait_for("accepts on")
        assert client.get("/order-async?to=grace").text == "ordered"
        worker.wait_for("delivered grace")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--channel", "with space"), "channel name 'with space' is not valid"),
        (("--channel", "a!b"), "belongs to one process"),
        (("--channel", "a", "--interface", "wsgi"), "'a' is background work, which a WSGI application cannot do"),
    ],
)
def test_wrong_channels_are_one_line(site, flags, text):
    command = Command("worker", "main:application", "--redis", "redis://127.0.0.1:1", *flags, cwd=site)
    with command:
        status, output = command.wait_ended()
    assert status == 2
    assert text in output
    assert "Traceback" not in output
