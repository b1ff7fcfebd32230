"""The application under all servers of the comparison: it does what the probe's request tells it, and keeps notes.

A request carries a script in its ``X-Script`` header, a Python literal: a list of steps such as ``("receive",)`` or
``("send", {...})``; ``STEPS`` has them all. With ``X-Key`` the instance notes what it received and what ``send()``
raised; ``GET /-/notes?key=K`` waits until that instance is over and answers with the notes. So a probe shows both
sides of a conversation in one place, and nothing of a probe is hidden in here.

``PROBE_LIFESPAN`` says how the application behaves at its start and its end (``lifespan()``), and ``PROBE_LOG`` names
a file in which it writes down the order of things. Only ASGI is used, nothing of any server.
"""

import ast
import asyncio
import os
import time
from urllib.parse import parse_qs

NOTES = {}
OVER = {}
GATES = {}
LIFESPAN = {"calls": 0, "scope": None, "events": [], "loop": None}
SHARED = object()  # what the lifespan puts into its state: the same object must be seen by all connections


async def application(scope, receive, send):
    log(f"call {scope['type']}")
    if scope["type"] == "lifespan":
        await lifespan(scope, receive, send)
        return
    path = scope["path"]
    if path.startswith("/-/"):
        await CONTROL[path](scope, send)
        return
    headers = {bytes(name).lower(): bytes(value) for name, value in scope["headers"]}
    script = ast.literal_eval(headers.get(b"x-script", b"[('respond', b'hello')]").decode("ascii"))
    key = headers.get(b"x-key", b"").decode("ascii")
    notes = NOTES.setdefault(key, [])
    instance = Instance(scope, receive, send, notes)
    try:
        for step, *arguments in script:
            await STEPS[step](instance, *arguments)
        notes.append(("returned",))
    except asyncio.CancelledError:
        notes.append(("cancelled",))
        raise
    finally:
        OVER.setdefault(key, asyncio.Event()).set()


class Legacy:
    """The same in the style of ASGI 2."""

    def __init__(self, scope):
        self.scope = scope

    async def __call__(self, receive, send):
        await application(self.scope, receive, send)


class Instance:
    """One running script."""

    def __init__(self, scope, receive, send, notes):
        self.scope = scope
        self._receive = receive
        self._send = send
        self.notes = notes

    async def receive(self):
        event = await self._receive()
        self.notes.append(("received", plain(event) if type(event) is dict else repr(type(event))))
        return event

    async def send(self, event):
        try:
            await self._send(event)
        except Exception as error:
            self.notes.append(("raised", type(error).__name__, isinstance(error, OSError)))
            raise
        self.notes.append(("sent", event.get("type")))

    async def attempt(self, event):
        """Send what may raise, and go on."""
        try:
            await self.send(event)
        except Exception as error:
            log(f"attempt raised {error!r}")

    async def send_lazily(self, event):
        """ASGI allows any iterable as headers: here a generator of lists."""
        await self.send({**event, "headers": ([name, value] for name, value in event["headers"])})

    async def until(self, kind):
        while (await self.receive())["type"] != kind:
            pass

    async def wait(self, gate):
        async with asyncio.timeout(20):
            await GATES.setdefault(gate, asyncio.Event()).wait()

    async def sleep(self, duration_s):
        await asyncio.sleep(duration_s)

    async def note(self, text):
        self.notes.append(("noted", text))
        log(text)

    async def note_scope(self):
        self.notes.append(("scope", plain(self.scope)))

    async def mutate_scope(self):
        """Leave traces in what belongs to this connection alone."""
        self.scope["mutated"] = True
        if isinstance(self.scope["headers"], list):
            self.scope["headers"].append((b"mutated", b"yes"))
        if "state" in self.scope:
            self.scope["state"]["mutated"] = True

    async def note_state(self):
        state = self.scope.get("state")
        self.notes.append(
            ("state", None if state is None else (sorted(state), state.get("shared") is SHARED, id(state)))
        )

    async def respond(self, body, status=200, headers=()):
        headers = [*headers, (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def fail(self):
        raise RuntimeError("this script fails on purpose")

    async def echo(self):
        """WebSocket messages come back until the client leaves."""
        while (event := await self.receive())["type"] == "websocket.receive":
            await self.send({"type": "websocket.send", "text": event.get("text"), "bytes": event.get("bytes")})

    async def echo_request(self):
        """The body of the request comes back, when it is complete."""
        received, more = b"", True
        while more:
            event = await self.receive()
            received += event.get("body", b"")
            more = event.get("more_body", False)
        await self.respond(received)

    async def flood(self, kind, count):
        """Send pieces of 64 KiB, and note how many were taken."""
        self.notes.append(("flooded", 0))
        for number in range(count):
            if kind == "http":
                await self._send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
            else:
                await self._send({"type": "websocket.send", "bytes": bytes(65536)})
            self.notes[-1] = ("flooded", number + 1)


STEPS = {
    "receive": Instance.receive,
    "send": Instance.send,
    "attempt": Instance.attempt,
    "send lazily": Instance.send_lazily,
    "until": Instance.until,
    "wait": Instance.wait,
    "sleep": Instance.sleep,
    "note": Instance.note,
    "note scope": Instance.note_scope,
    "note state": Instance.note_state,
    "mutate scope": Instance.mutate_scope,
    "respond": Instance.respond,
    "fail": Instance.fail,
    "echo": Instance.echo,
    "echo request": Instance.echo_request,
    "flood": Instance.flood,
}


# What the prober asks between its probes


async def show_notes(scope, send):
    arguments = parse_qs(scope["query_string"].decode())
    key = arguments["key"][0]
    over = OVER.setdefault(key, asyncio.Event())
    is_over = True
    try:
        async with asyncio.timeout(float(arguments["timeout_s"][0])):
            await over.wait()
    except TimeoutError:
        is_over = False
    await answer(send, repr((is_over, NOTES.get(key, []))))


async def open_gate(scope, send):
    GATES.setdefault(parse_qs(scope["query_string"].decode())["name"][0], asyncio.Event()).set()
    await answer(send, "None")


async def show_lifespan(scope, send):
    await answer(send, repr({**LIFESPAN, "loop_now": id(asyncio.get_running_loop())}))


async def answer(send, text):
    body = text.encode()
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


CONTROL = {"/-/notes": show_notes, "/-/open": open_gate, "/-/lifespan": show_lifespan}


# The beginning and the end


async def lifespan(scope, receive, send):
    mode = os.environ.get("PROBE_LIFESPAN", "normal")
    LIFESPAN["calls"] += 1
    LIFESPAN["scope"] = plain(scope)
    LIFESPAN["loop"] = id(asyncio.get_running_loop())
    if mode == "raise":
        raise RuntimeError("this application knows no lifespan")
    event = await receive()
    LIFESPAN["events"].append(event)
    if mode == "raise on startup":
        raise RuntimeError("this application fails when it is started")
    if mode == "fail":
        await send({"type": "lifespan.startup.failed", "message": "the cellar is flooded"})
        return
    if mode == "slow":
        await asyncio.sleep(1)
    if "state" in scope:
        scope["state"]["shared"] = SHARED
    log("startup complete")
    await send({"type": "lifespan.startup.complete"})
    event = await receive()
    log(event["type"])
    if mode == "fail shutdown":
        await send({"type": "lifespan.shutdown.failed", "message": "the attic is on fire"})
        return
    await asyncio.sleep(0.5)
    log("shutdown complete")
    await send({"type": "lifespan.shutdown.complete"})


def log(text):
    if path := os.environ.get("PROBE_LOG"):
        with open(path, "a") as file:
            file.write(f"{time.monotonic():.6f} {text}\n")


def plain(value):
    """A copy that can be written as a literal; anything else becomes its repr, so that the prober sees it."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    for kind in (bool, int, float, str, bytes):
        if isinstance(value, kind):
            return kind(value)  # an enum may be a number, too
    if value is None or not hasattr(value, "__iter__"):
        return value if value is None else repr(value)
    return [plain(item) for item in value]
