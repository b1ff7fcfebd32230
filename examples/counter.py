"""A counter for each window, that survives the death of its worker.

Each message adds one, and the answer is the new count. The count lives in a local variable of a running call, so a
worker that dies takes it along; but the call stores it as a checkpoint, and another worker goes on with it. The
window does not notice: its WebSocket belongs to the interface server (docs/handover.md).

    trunkline serve examples.counter:application --workers 2

Open http://127.0.0.1:8000/, click, and kill the worker whose number the page shows with ``kill -9``; the next count
takes up to half a second. (A window that loses two workers within a minute is closed: it might be what kills them.)
No imports of Trunkline are needed; under another server the extension is not there, and the counter dies with its
process.
"""

import os

PAGE = b"""<!doctype html>
<title>Counter</title>
<button>Count</button> <output>-</output> <small></small>
<script>
  const socket = new WebSocket(location.href.replace(/^http/, "ws"));
  document.querySelector("button").onclick = () => socket.send("");
  socket.onmessage = ({data}) => {
    const [count, pid] = data.split(" ");
    document.querySelector("output").textContent = count;
    document.querySelector("small").textContent = "worker " + pid;
  };
  socket.onclose = ({code}) => document.querySelector("small").textContent = "closed: " + code;
</script>
"""


async def application(scope, receive, send):
    if scope["type"] == "websocket":
        await count(scope, receive, send)
    elif scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": PAGE})
    else:
        raise ValueError(f"nothing here for {scope['type']}")


async def count(scope, receive, send):
    handover = scope.get("extensions", {}).get("websocket.handover")
    number = (handover or {}).get("state", 0)  # of the worker that was here before, if there was one
    await receive()  # websocket.connect
    await send({"type": "websocket.accept"})  # the client hears of the first one only
    while True:
        if handover is not None:
            # The commit: what was sent since the last one leaves together with this, or not at all.
            await send({"type": "websocket.handover.state", "state": number, "commit": True})
        if (await receive())["type"] == "websocket.disconnect":
            return
        number += 1
        await send({"type": "websocket.send", "text": f"{number} {os.getpid()}"})
