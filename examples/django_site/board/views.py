"""Views of every kind: synchronous ones run in a thread of their request, asynchronous ones on the worker's loop."""

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django import forms
from django.contrib.auth.decorators import login_required
from django.http import FileResponse, JsonResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_POST

from board.models import Notice


class NoticeForm(forms.ModelForm):
    class Meta:
        model = Notice
        fields = ("text", "file")


def board(request):
    """Synchronous: template, ORM, session."""
    request.session["visits"] = request.session.get("visits", 0) + 1
    return render(
        request,
        "board/board.html",
        {
            "form": NoticeForm(),
            "notices": Notice.objects.select_related("author")[:50],
            "visits": request.session["visits"],
        },
    )


@require_POST
@login_required
def pin(request):
    """Synchronous: form, upload, ORM; and everybody who looks at the board is told, whichever worker serves them."""
    form = NoticeForm(request.POST, request.FILES)
    if not form.is_valid():
        return JsonResponse({"errors": form.errors}, status=400)
    form.instance.author = request.user
    notice = form.save()
    async_to_sync(get_channel_layer().group_send)("board", describe(notice, request.user.username))
    return redirect("board")


async def notices_json(request):
    """Asynchronous: user and ORM."""
    user = await request.auser()
    notices = [
        {"id": notice.id, "author": notice.author.username, "text": notice.text}
        async for notice in Notice.objects.select_related("author")[:50]
    ]
    return JsonResponse({"user": user.username, "notices": notices})


async def notices_csv(request):
    """Streamed: rows leave while the next ones are read from the database, however many there are."""

    async def rows():
        yield "id,author,text\n"
        async for notice in Notice.objects.select_related("author").order_by("id").aiterator(chunk_size=500):
            text = notice.text.replace('"', '""')
            yield f'{notice.id},{notice.author.username},"{text}"\n'

    return StreamingHttpResponse(rows(), content_type="text/csv")


def download(request, number):
    """A file, in blocks."""
    notice = get_object_or_404(Notice.objects.exclude(file=""), pk=number)
    return FileResponse(notice.file.open("rb"), as_attachment=True, filename=notice.file.name)


def describe(notice, author):
    """A notice as a message for the group: consumers' method ``notice_pinned``."""
    return {"type": "notice.pinned", "id": notice.id, "author": author, "text": notice.text}
