"""Groups as applications, scripts and browsers use them."""

import contextlib
import json
import socket

import httpx
import pytest
import redis
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from channel_layer import Publisher
from tests.system.processes import Served, wait_until

APP = "tests.system.applications:application"


def test_one_send_reaches_members_on_every_interface_server():
    with Served(APP, "--interfaces", "2", "--workers", "2") as served, contextlib.ExitStack() as stack:
        url = f"{served.ws_url}/member?group=room"
        clients = [stack.enter_context(connect(url, open_timeout=60)) for _ in range(40)]
        for client in clients:
            assert client.recv(timeout=60) == "joined"
        for number in range(20):
            clients[number].send(f"message {number}")
            for client in clients:
                assert client.recv(timeout=60) == f"message {number}"
        # From outside: a script.
        with Publisher(served.redis_url) as publisher:
            for number in range(50):
                publisher.group_send("room", {"type": "websocket.send", "text": f"script {number}"})
        for client in clients:
            assert [client.recv(timeout=60) for _ in range(50)] == [f"script {n}" for n in range(50)]
        # From an HTTP request.
        assert httpx.post(f"{served.url}/publish?group=room", content="from a request", timeout=60).text == "sent"
        for client in clients:
            assert client.recv(timeout=60) == "from a request"
        # And a group ends them all.
        with Publisher(served.redis_url) as publisher:
            publisher.group_send("room", {"type": "websocket.close", "code": 4000, "reason": "over"})
        for client in clients:
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=60)
            assert client.close_code == 4000
            assert client.close_reason == "over"


def test_what_each_instance_sends_arrives_in_its_order():
    """Equal messages of many instances travel together; no client may see that."""
    clients_count, count, deaf = 24, 120, range(3, 6)
    with Served(APP, "--workers", "2") as served, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(connect(f"{served.ws_url}/consumer", open_timeout=20)) for _ in range(clients_count)
        ]
        for client in clients:
            assert client.recv(timeout=60) == "joined"
        taken = [[] for _ in clients]

        def said(messages):
            return [message for message in messages if message.startswith(("all", "own", "again"))]

        def read(index, until):
            """Read up to what ends the ``until``th message of the group, and the one behind it of the sender."""
            while f"again {until}" not in taken[index] or f"direct {until}" not in taken[index]:
                message = clients[index].recv(timeout=60)
                taken[index].append(message.decode() if isinstance(message, bytes) else message)

        for number in range(count):
            # For a while some do not read, so what is sent to them waits for their credit.
            size = 8000 if 20 <= number < 90 else 100
            clients[number % 2].send(json.dumps({"number": number, "size": size}))
            for index in range(clients_count):
                if index not in deaf or not 20 <= number < 90:
                    read(index, number)
        while f"behind {count - 1}" not in taken[(count - 1) % 2]:
            taken[(count - 1) % 2].append(clients[(count - 1) % 2].recv(timeout=60))

        for index, messages in enumerate(taken):
            heads = [" ".join(message.split()[:2]) for message in said(messages)]
            assert heads == [
                head
                for number in range(count)
                for head in (f"all {number}", *([f"own {number}"] if number % 2 else []), f"again {number}")
            ], index
            own = {message.split()[2] for message in messages if message.startswith("own")}
            assert len(own) == 1
            assert [m for m in messages if m.startswith("direct")] == [f"direct {n}" for n in range(count)]
        for index in range(2):
            around = [message for message in taken[index] if message.startswith(("in front", "direct", "behind"))]
            mine = [m for m in around if not m.startswith("direct") or int(m.split()[1]) % 2 == index]
            assert mine == [
                text for n in range(index, count, 2) for text in (f"in front {n}", f"direct {n}", f"behind {n}")
            ]


def test_membership_ends_with_the_connection_and_leaves_nothing():
    with Served(APP) as served, redis.Redis.from_url(served.redis_url) as broker:

        def keys():
            """What stands in the broker beside what each process keeps there while it lives."""
            lasting = (b"trunkline:lease:", b"trunkline:generation")
            return [key for key in broker.keys("*") if not key.startswith(lasting)]

        with connect(f"{served.ws_url}/member?group=a-room") as client:
            assert client.recv(timeout=60) == "joined"
            assert b"trunkline:group:{a-room}" in keys()
        wait_until(lambda: not keys(), 30, "nothing is left of the group")


def test_server_sent_events_through_a_group():
    with Served(APP) as served, socket.create_connection(("127.0.0.1", served.port)) as client:
        client.settimeout(60)
        client.sendall(b"GET /sse?group=news HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""

        def read_until(end):
            nonlocal received
            while end not in received:
                data = client.recv(65536)
                assert data, received
                received += data

        read_until(b": ready\n\n")
        with Publisher(served.redis_url) as publisher:
            # An absent more_body means that more follows, in a message from elsewhere.
            publisher.group_send("news", {"type": "http.response.body", "body": b"data: one\n\n"})
            publisher.group_send("news", {"type": "http.response.body", "body": b"data: two\n\n"})
            read_until(b"data: two\n\n")
            assert received.index(b"data: one") < received.index(b"data: two")
            publisher.group_send("news", {"type": "http.response.body", "body": b"data: end\n\n", "more_body": False})
            read_until(b"0\r\n\r\n")


def test_a_message_of_the_applications_own_type_reaches_the_instance(tmp_path):
    (tmp_path / "own.py").write_text(
        """
import json
from channel_layer import get_channel_layer

async def app(scope, receive, send):
    channel = scope["extensions"]["channel_layer"]["reply_channel"]
    await receive()
    await send({"type": "websocket.accept"})
    await get_channel_layer().group_add("own", channel)
    await send({"type": "websocket.send", "text": channel})
    while (event := await receive())["type"] != "websocket.disconnect":
        await send({"type": "websocket.send", "text": json.dumps(event)})
"""
    )
    with Served("own:app", "--lifespan", "off", cwd=tmp_path) as served, Publisher(served.redis_url) as publisher:
        with connect(served.ws_url) as client:
            channel = client.recv(timeout=60)
            publisher.group_send("own", {"type": "game.move", "from": [1, 2], "to": None})
            assert client.recv(timeout=60) == '{"type": "game.move", "from": [1, 2], "to": null}'
            publisher.send(channel, {"type": "websocket.send", "text": "straight to the client"})
            assert client.recv(timeout=60) == "straight to the client"
