"""Consumers of every kind. Synchronous handlers run in a thread, asynchronous ones on the worker's loop."""

from asgiref.sync import async_to_sync
from channels.consumer import SyncConsumer
from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncJsonWebsocketConsumer, JsonWebsocketConsumer, WebsocketConsumer

from board.models import Notice
from board.views import describe


class BoardConsumer(AsyncJsonWebsocketConsumer):
    """Asynchronous: tells of each new notice, and pins those up that come in, if somebody is logged in."""

    groups = ("board",)

    async def connect(self):
        await self.accept()
        await self.send_json({"welcome": self.scope["user"].username or "stranger"})

    async def receive_json(self, content):
        user = self.scope["user"]
        if not user.is_authenticated:
            await self.send_json({"error": "log in first"})
            return
        if "report" in content:
            # Work for a process of its own: ``trunkline worker project.asgi:application --channel reports``.
            order = {"type": "make", "author": user.pk, "answer_to": self.channel_name}
            await self.channel_layer.send("reports", order)
            return
        notice = await Notice.objects.acreate(author=user, text=content["text"])
        await self.channel_layer.group_send("board", describe(notice, user.username))

    async def notice_pinned(self, event):
        await self.send_json({"id": event["id"], "author": event["author"], "text": event["text"]})

    async def report_made(self, event):
        await self.send_json({"report": event["text"]})


class SearchConsumer(JsonWebsocketConsumer):
    """Synchronous, JSON: the ORM without further ado."""

    def receive_json(self, content):
        found = Notice.objects.filter(text__icontains=content["search"]).values_list("text", flat=True)
        self.send_json({"found": list(found[:20])})


class CountConsumer(WebsocketConsumer):
    """Synchronous: the number of notices, now and after each new one. Joins the group by hand."""

    def connect(self):
        async_to_sync(self.channel_layer.group_add)("board", self.channel_name)
        self.accept()
        self.notice_pinned(None)

    def disconnect(self, code):
        async_to_sync(self.channel_layer.group_discard)("board", self.channel_name)

    def notice_pinned(self, event):
        self.send(text_data=str(Notice.objects.count()))


class AuthorsConsumer(AsyncJsonWebsocketConsumer):
    """Asynchronous, with synchronous database code beside it; only for those who are logged in."""

    async def connect(self):
        if not self.scope["user"].is_authenticated:
            await self.close(code=4401)
            return
        await self.accept()
        await self.send_json({"authors": await self.authors()})
        await self.close()

    @database_sync_to_async
    def authors(self):
        return sorted(Notice.objects.values_list("author__username", flat=True).distinct().order_by())


class ReportConsumer(SyncConsumer):
    """Background work: one message after the other, however long each takes."""

    def make(self, message):
        notices = Notice.objects.filter(author_id=message["author"])
        words = sum(len(text.split()) for text in notices.values_list("text", flat=True))
        answer = {"type": "report.made", "text": f"{notices.count()} notices, {words} words"}
        async_to_sync(self.channel_layer.send)(message["answer_to"], answer)
