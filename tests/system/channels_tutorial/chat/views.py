from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.http import HttpResponse
from django.shortcuts import render


def room(request, room_name):
    return render(request, "chat/room.html", {"room_name": room_name})


def say(request, room_name):
    """A sync view: each call of async_to_sync has an event loop of its own."""
    async_to_sync(get_channel_layer().group_send)(
        f"chat_{room_name}", {"type": "chat.message", "message": request.GET["message"]}
    )
    return HttpResponse("said")


async def say_async(request, room_name):
    await get_channel_layer().group_send(
        f"chat_{room_name}", {"type": "chat.message", "message": request.GET["message"]}
    )
    return HttpResponse("said")
