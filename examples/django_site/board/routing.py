from django.urls import path

from board import consumers

websocket_urlpatterns = [
    path("ws/board", consumers.BoardConsumer.as_asgi()),
    path("ws/search", consumers.SearchConsumer.as_asgi()),
    path("ws/count", consumers.CountConsumer.as_asgi()),
    path("ws/authors", consumers.AuthorsConsumer.as_asgi()),
]
channel_names = {"reports": consumers.ReportConsumer.as_asgi()}
