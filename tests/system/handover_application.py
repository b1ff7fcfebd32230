"""Applications whose WebSockets are handed over, and requests that kill their workers."""

import asyncio
import os
import signal
from pathlib import Path

from channel_layer import get_channel_layer
from tests.system.applications import query, reply_channel, respond
from tests.system.conformance_app import held_objects


async def application(scope, receive, send):
    if scope["type"] == "http":
        await ROUTES[scope["path"]](scope, receive, send)
    elif scope["type"] == "websocket":
        await SOCKETS[scope["path"]](scope, receive, send)
    else:
        raise ValueError(f"nothing here for {scope['type']}")


async def pid(scope, receive, send):
    await respond(send, str(os.getpid()).encode())


async def objects(scope, receive, send):
    """What this worker holds, beside its process id."""
    await respond(send, repr((os.getpid(), held_objects())).encode())


async def die(scope, receive, send):
    """Kills its worker while the file ?file= has fewer than ?times= lines, else answers; writes a line each time."""
    arguments = query(scope)
    times = note(arguments["file"], os.getpid())
    if times <= int(arguments["times"]):
        if "start" in arguments:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        # One that dies before its claim has left has taken nothing. The claim leaves behind our first turn; then the
        # interface server answers this on the same way, so it has had everything before it.
        await asyncio.sleep(0.1)
        await get_channel_layer().group_add("dying", reply_channel(scope))
        os.kill(os.getpid(), signal.SIGKILL)
    await respond(send, b"survived")


async def count_post(scope, receive, send):
    """Writes ?id= to ?file= and takes its time."""
    arguments = query(scope)
    note(arguments["file"], arguments["id"])
    await asyncio.sleep(0.02)
    await respond(send, b"done")


async def counter(scope, receive, send):
    """Answers each message with "count pid"; ?commit, ?notify, ?each= (checkpoints), ?group=, ?log= (its ends)."""
    arguments = query(scope) if scope["query_string"] else {}
    extension = scope["extensions"].get("websocket.handover")
    flags = {"commit": "commit" in arguments, "notify": "notify" in arguments}
    state = (extension or {}).get("state", {"count": 0})
    layer, group = get_channel_layer(), arguments.get("group")
    first = await receive()
    assert first == {"type": "websocket.connect"}, first
    if state.get("refuse"):
        await send({"type": "websocket.close"})
        return
    await send({"type": "websocket.accept"})
    if extension is not None and "state" not in extension:
        if group is not None:
            await layer.group_add(group, reply_channel(scope))
        if "store" not in arguments or arguments["store"] != "no":
            await send({"type": "websocket.handover.state", "state": state, **flags})
    elif "welcome" in arguments:
        await send({"type": "websocket.send", "text": "welcome"})
    try:
        while True:
            event = await receive()
            if event["type"] == "websocket.disconnect":
                log(arguments, f"disconnect {event['code']}")
                return
            if event["type"] == "websocket.handover.request":
                await send({"type": "websocket.handover.state", "state": state, **flags})
                continue
            text = event["text"]
            if text == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if text == "refuse":
                state["refuse"] = True
            state["count"] += 1
            await send({"type": "websocket.send", "text": f"{state['count']} {os.getpid()} {text}"})
            if arguments.get("store") != "no" and extension is not None:
                await send({"type": "websocket.handover.state", "state": state, **flags})
    except asyncio.CancelledError:
        log(arguments, "cancelled")
        raise
    finally:
        if group is not None:
            await layer.group_discard(group, reply_channel(scope))
            log(arguments, "discarded")


def log(arguments, line):
    if "log" in arguments:
        note(arguments["log"], f"{os.getpid()} {line}")


def note(path, line):
    """Append a line; return how many there are."""
    with Path(path).open("a+") as file:
        file.write(f"{line}\n")
        file.flush()
        file.seek(0)
        return len(file.readlines())


async def die_before_accept(scope, receive, send):
    arguments = query(scope)
    times = note(arguments["file"], os.getpid())
    await receive()
    if times <= int(arguments["times"]):
        os.kill(os.getpid(), signal.SIGKILL)
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": "survived"})
    await receive()


ROUTES = {"/pid": pid, "/objects": objects, "/die": die, "/count": count_post}
SOCKETS = {"/counter": counter, "/die": die_before_accept}
