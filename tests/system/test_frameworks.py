"""Frameworks, unmodified: what their tutorials teach runs here."""

import contextlib
import json
import os
import subprocess
import sys

import httpx
import pytest
from websockets.sync.client import connect

from tests.system.processes import ROOT, Served

TUTORIAL = ROOT / "tests" / "system" / "channels_tutorial"

FASTAPI = """
from typing import Annotated
from fastapi import Depends, FastAPI, File, UploadFile, WebSocket, WebSocketDisconnect
from pydantic import BaseModel

app = FastAPI()

class Item(BaseModel):
    name: str
    price: float

def who(user: str = "nobody"):
    return user

@app.post("/items/{number}")
async def create(number: int, item: Item, user: Annotated[str, Depends(who)]):
    return {"number": number, "item": item, "user": user}

@app.get("/sync")
def in_a_thread():
    return {"from": "a thread"}

@app.post("/upload")
async def upload(file: UploadFile):
    return {"name": file.filename, "size": len(await file.read())}

@app.websocket("/ws/{room}")
async def talk(websocket: WebSocket, room: str):
    await websocket.accept(subprotocol="chat")
    try:
        while True:
            await websocket.send_json({"room": room, "got": await websocket.receive_json()})
    except WebSocketDisconnect as gone:
        print(f"gone {gone.code} {gone.reason}", flush=True)
"""


def test_fastapi(tmp_path):
    (tmp_path / "main.py").write_text(FASTAPI)
    with Served("main:app", cwd=tmp_path) as served:
        answer = httpx.post(served.url + "/items/7?user=ada", json={"name": "x", "price": 1.5}, timeout=60)
        assert answer.json() == {"number": 7, "item": {"name": "x", "price": 1.5}, "user": "ada"}
        assert httpx.post(served.url + "/items/x", json={}, timeout=60).status_code == 422
        assert httpx.get(served.url + "/sync", timeout=60).json() == {"from": "a thread"}
        upload = httpx.post(served.url + "/upload", files={"file": ("f", b"x" * 500_000)}, timeout=60)
        assert upload.json() == {"name": "f", "size": 500_000}
        assert httpx.get(served.url + "/openapi.json", timeout=60).json()["info"]["title"] == "FastAPI"
        with connect(served.ws_url + "/ws/kitchen", subprotocols=["chat", "other"]) as client:
            assert client.subprotocol == "chat"
            client.send('{"a": 1}')
            assert json.loads(client.recv(timeout=60)) == {"room": "kitchen", "got": {"a": 1}}
            client.close(4001, "enough")
        served.wait_for("gone 4001 enough")


@pytest.mark.parametrize("kind", ["chat", "async-chat"])
def test_channels_tutorial(kind):
    """Consumers of one room on two workers; messages from clients, from sync and async views, from a script."""
    with Served("mysite.asgi:application", "--workers", "2", cwd=TUTORIAL) as served, contextlib.ExitStack() as stack:
        assert "<title>lobby</title>" in httpx.get(served.url + "/chat/lobby/", timeout=60).text
        clients = [stack.enter_context(connect(f"{served.ws_url}/ws/{kind}/lobby/")) for _ in range(12)]

        def everybody_hears(message):
            for client in clients:
                assert json.loads(client.recv(timeout=60)) == {"message": message}

        clients[0].send('{"message": "hello"}')
        everybody_hears("hello")
        for number in range(10):  # each call has an event loop of its own
            assert httpx.get(f"{served.url}/say/lobby/?message=sync{number}", timeout=60).text == "said"
            everybody_hears(f"sync{number}")
        assert httpx.get(f"{served.url}/say-async/lobby/?message=async", timeout=60).text == "said"
        everybody_hears("async")
        script = (
            "import os, django; os.environ['DJANGO_SETTINGS_MODULE'] = 'mysite.settings'; django.setup()\n"
            "from asgiref.sync import async_to_sync\n"
            "from channels.layers import get_channel_layer\n"
            "send = async_to_sync(get_channel_layer().group_send)\n"
            "for n in range(3): send('chat_lobby', {'type': 'chat.message', 'message': f'script{n}'})\n"
        )
        environment = {**os.environ, "TRUNKLINE_REDIS": served.redis_url}
        shown = subprocess.run(
            [sys.executable, "-W", "error::ResourceWarning", "-c", script],
            check=True,
            cwd=TUTORIAL,
            env=environment,
            timeout=60,
            capture_output=True,
            text=True,
        )
        assert shown.stderr == ""
        for number in range(3):
            everybody_hears(f"script{number}")
        # Those who left hear nothing, and their leaving is noticed.
        for client in clients[6:]:
            client.close()
        del clients[6:]
        clients[0].send('{"message": "still here?"}')
        everybody_hears("still here?")
