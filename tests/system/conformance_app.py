"""An application that does what the path names and keeps a record of what it saw, for the conformance tests.

``GET /record?key=K`` waits until the instance that was opened with ``?key=K`` is over, and answers with what it
noted. ``GET /scope`` and a WebSocket to ``/scope`` answer with the scope as a Python literal. One worker only: the
records are in its memory.
"""

import asyncio
import gc
from collections import Counter
from urllib.parse import parse_qs

from channel_layer import get_channel_layer

STARTED = []  # one entry for each lifespan.startup: (id of the loop, the lifespan scope)
RECORDS = {}
OVER = {}


async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(scope, receive, send)
        return
    arguments = {name: values[0] for name, values in parse_qs(scope["query_string"].decode("latin-1")).items()}
    key = arguments.get("key")
    table = HTTP if scope["type"] == "http" else WEBSOCKET
    path = scope["path"].removeprefix(scope["root_path"])
    behave = table.get(path, echo if scope["type"] == "http" else ws_echo)
    if key is None or behave is record:
        await behave(scope, receive, send, arguments)
        return
    notes = RECORDS.setdefault(key, [])
    over = OVER.setdefault(key, asyncio.Event())

    async def receive_and_note():
        try:
            event = await receive()
        except asyncio.CancelledError:
            notes.append("cancelled")
            raise
        notes.append(event)
        return event

    async def send_and_note(event):
        try:
            await send(event)
        except Exception as error:
            notes.append([type(error).__name__, isinstance(error, OSError)])
            raise

    try:
        await behave(scope, receive_and_note, send_and_note, arguments)
    finally:
        over.set()


async def lifespan(scope, receive, send):
    scope["state"]["started"] = [await receive()]
    STARTED.append((id(asyncio.get_running_loop()), {name: scope[name] for name in ("type", "asgi")}))
    await send({"type": "lifespan.startup.complete"})
    await receive()
    print("lifespan.shutdown", flush=True)
    await send({"type": "lifespan.shutdown.complete"})


async def respond(send, body, status=200, headers=()):
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def until_disconnect(receive):
    while not (event := await receive())["type"].endswith(".disconnect"):
        pass
    return event


# HTTP


async def record(scope, receive, send, arguments):
    async with asyncio.timeout(15):
        await OVER.setdefault(arguments["key"], asyncio.Event()).wait()
    await respond(send, repr(RECORDS[arguments["key"]]).encode())


def held_objects():
    """How many objects of each kind that belongs to connections the worker holds, and in which of its tables."""
    gc.collect()
    kinds = Counter(type(thing).__name__ for thing in gc.get_objects())
    held = {kind: kinds[kind] for kind in ("Instance", "IncomingEvents", "OutgoingEvents", "HttpEvents")}
    held["tasks"] = len(asyncio.all_tasks())
    process = get_channel_layer().epoch_of.__self__
    tables = {name: len(value) for name, value in vars(process).items() if isinstance(value, dict | list | set)}
    return held | tables


async def show_objects(scope, receive, send, arguments):
    await respond(send, repr(held_objects()).encode())


async def show_keys(scope, receive, send, arguments):
    await respond(send, repr(list(RECORDS)).encode())


async def show_scope(scope, receive, send, arguments):
    await respond(send, repr(scope).encode())


async def show_lifespan(scope, receive, send, arguments):
    scope["state"]["mine"] = "not the others'"
    await respond(send, repr((STARTED, id(asyncio.get_running_loop()), scope["state"]["started"])).encode())


async def echo(scope, receive, send, arguments):
    """Answers the body, piece by piece, while it comes."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    more = True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return
        more = event["more_body"]
        await send({"type": "http.response.body", "body": event["body"], "more_body": more})


async def answer(scope, receive, send, arguments):
    """Answers with ?status= and ?bytes= without looking at the request; ?length=1 announces the length."""
    body = bytes(int(arguments.get("bytes", 5)))
    headers = [(b"content-length", b"%d" % len(body))] if "length" in arguments else []
    await respond(send, body, int(arguments.get("status", 200)), headers)


async def nothing(scope, receive, send, arguments):
    pass


async def start_only(scope, receive, send, arguments):
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def half(scope, receive, send, arguments):
    """Returns, or raises, in the middle of a body."""
    headers = [(b"content-length", b"100")] if "length" in arguments else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    if "raise" in arguments:
        raise RuntimeError("half is enough")


async def fail(scope, receive, send, arguments):
    raise RuntimeError("this application fails on purpose")


async def silent(scope, receive, send, arguments):
    """Sends nothing, and ends when the client leaves; then tries to send."""
    await until_disconnect(receive)
    await respond(send, b"too late")


async def stream(scope, receive, send, arguments):
    """A first piece, then nothing more until the client leaves; then tries to send."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"first", "more_body": True})
    await until_disconnect(receive)
    await send({"type": "http.response.body", "body": b"too late", "more_body": True})


async def flood(scope, receive, send, arguments):
    """Sends without end and never receives."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})


async def linger(scope, receive, send, arguments):
    """Stays although its client has left."""
    if "start" in arguments:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
    await until_disconnect(receive)
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        RECORDS[arguments["key"]].append("cancelled")
        raise


NOT_ALLOWED = [
    {"type": "x", "value": float("nan")},
    {"type": "x", "value": float("-inf")},
    {"type": "x", "value": 2**63},
    {"type": "x", "value": {1: "a key that is no str"}},
    {"type": "x", "value": [object()]},
    {"type": "x", "value": {"deep": [{"a", "set"}]}},
]
ALLOWED = {"type": "x", "value": [None, True, -(2**63), 1.5, "ü", b"\xff", {"a": (1, 2)}]}


async def values(scope, receive, send, arguments):
    """A4, C1: what a message may hold, and what is refused where it is sent."""
    layer = get_channel_layer()
    channel = await layer.new_channel()
    failures = [await failure_of(layer.send(channel, message)) for message in NOT_ALLOWED]
    failures += [await failure_of(layer.group_send("values", message)) for message in NOT_ALLOWED]
    await layer.send(channel, ALLOWED)
    await respond(send, repr((failures, await layer.receive(channel))).encode())


async def after_complete(scope, receive, send, arguments):
    """What is received and sent behind a complete response."""
    await respond(send, b"complete")
    await send({"type": "http.response.body", "body": b"more"})
    await receive()
    await receive()


async def headers(scope, receive, send, arguments):
    """Headers a server has to look at."""
    pairs = [
        (b"set-cookie", b"a=1; Expires=Thu, 01 Jan 2026 00:00:00 GMT"),
        (b"Transfer-Encoding", b"gzip"),
        (b"set-cookie", b"b=2"),
        (b"X-Mixed", b"Case"),
    ]
    await respond(send, b"body", headers=pairs)


async def sse(scope, receive, send, arguments):
    """A stream in the group ?group=, which it never leaves."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begin", "more_body": True})
    await get_channel_layer().group_add(arguments["group"], reply_channel(scope))
    await send({"type": "http.response.body", "body": b"joined", "more_body": True})
    await until_disconnect(receive)


def reply_channel(scope):
    return scope["extensions"]["channel_layer"]["reply_channel"]


INVALID_HTTP = [
    {"type": "http.response.body", "body": b"before the start"},
    {"type": "http.response.start"},
    {"type": "http.response.start", "status": "200"},
    {"type": "http.response.start", "status": True},
    {"type": "http.response.start", "status": 2**70},
    {"type": "http.response.start", "status": 100},
    {"type": "http.response.start", "status": 200, "headers": [("name", "value")]},
    {"type": "http.response.start", "status": 200, "headers": [(b"name", b"a\r\nb: c")]},
    {"type": "http.response.start", "status": 200, "headers": [(b"na me", b"value")]},
    {"type": "http.bogus"},
    {"type": "websocket.send", "text": "x"},
    {"type": "http.disconnect"},  # asgiref.typing has it among what an application sends: a slip
    {"no type": 1},
    # Of extensions that are not offered.
    {"type": "http.response.push", "path": "/", "headers": []},
    {"type": "http.response.zerocopysend", "file": 1},
    {"type": "http.response.pathsend", "path": "/etc/hostname"},
    {"type": "http.response.debug", "info": {}},
]


async def invalid(scope, receive, send, arguments):
    """How each invalid event failed; then a valid response, with keys nobody knows."""
    failures = []
    for event in INVALID_HTTP:
        failures.append(await failure_of(send(event)))
    await send({"type": "http.response.start", "status": 200, "headers": [], "unknown": object()})
    failures.append(await failure_of(send({"type": "http.response.start", "status": 200})))
    failures.append(await failure_of(send({"type": "http.response.body", "body": "text"})))
    failures.append(await failure_of(send({"type": "http.response.body", "more_body": 1})))
    await send({"type": "http.response.body", "body": repr(failures).encode(), "unknown": object()})


async def failure_of(call):
    try:
        await call
    except Exception as error:
        return type(error).__name__
    return None


HTTP = {
    "/record": record,
    "/keys": show_keys,
    "/objects": show_objects,
    "/scope": show_scope,
    "/lifespan": show_lifespan,
    "/echo": echo,
    "/answer": answer,
    "/nothing": nothing,
    "/start-only": start_only,
    "/half": half,
    "/fail": fail,
    "/silent": silent,
    "/stream": stream,
    "/flood": flood,
    "/linger": linger,
    "/values": values,
    "/after-complete": after_complete,
    "/headers": headers,
    "/sse": sse,
    "/invalid": invalid,
}


# WebSocket


async def ws_echo(scope, receive, send, arguments):
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": event.get("text"), "bytes": event.get("bytes")})


async def ws_scope(scope, receive, send, arguments):
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": repr(scope)})
    await until_disconnect(receive)


async def ws_accept(scope, receive, send, arguments):
    """Accepts with a subprotocol and headers."""
    await receive()
    pairs = [(b"X-One", b"1"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
    await send({"type": "websocket.accept", "subprotocol": arguments.get("subprotocol"), "headers": pairs})
    await until_disconnect(receive)


async def ws_refuse(scope, receive, send, arguments):
    await receive()
    await send({"type": "websocket.close", "code": 4000})
    await receive()


async def ws_fail_early(scope, receive, send, arguments):
    raise RuntimeError("this application fails on purpose")


async def ws_fail(scope, receive, send, arguments):
    await receive()
    await send({"type": "websocket.accept"})
    raise RuntimeError("this application fails on purpose")


async def ws_return(scope, receive, send, arguments):
    await receive()
    await send({"type": "websocket.accept"})


async def ws_return_early(scope, receive, send, arguments):
    await receive()


async def ws_close(scope, receive, send, arguments):
    """Closes with ?code= and ?reason=; then looks what it gets, and whether it can send."""
    await receive()
    await send({"type": "websocket.accept"})
    event = {"type": "websocket.close"}
    if "code" in arguments:
        event["code"] = int(arguments["code"])
    if "reason" in arguments:
        event["reason"] = arguments["reason"]
    await send(event)
    await receive()
    await send({"type": "websocket.send", "text": "too late"})


async def ws_member(scope, receive, send, arguments):
    """Joins ?group= and never leaves it; what the client sends goes to the group."""
    layer = get_channel_layer()
    await receive()
    await send({"type": "websocket.accept"})
    await layer.group_add(arguments["group"], reply_channel(scope))
    await send({"type": "websocket.send", "text": "joined"})
    while (event := await receive())["type"] == "websocket.receive":
        await layer.group_send(arguments["group"], {"type": "websocket.send", "text": event["text"]})


async def ws_never_accept(scope, receive, send, arguments):
    await until_disconnect(receive)


async def ws_wait(scope, receive, send, arguments):
    """Accepts, waits for the end, tries to send."""
    await receive()
    await send({"type": "websocket.accept"})
    await until_disconnect(receive)
    await receive()
    await send({"type": "websocket.send", "text": "too late"})


async def ws_slow_reader(scope, receive, send, arguments):
    """Receives only after a while, what may have to wait behind the end of the client."""
    await receive()
    await send({"type": "websocket.accept"})
    await asyncio.sleep(0.5)
    await until_disconnect(receive)


async def ws_flood(scope, receive, send, arguments):
    """Sends without end and never receives."""
    await receive()
    await send({"type": "websocket.accept"})
    while True:
        await send({"type": "websocket.send", "bytes": bytes(65536)})


INVALID_EARLY = [
    {"type": "websocket.send", "text": "before the accept"},
    {"type": "websocket.accept", "headers": [(b"sec-websocket-protocol", b"x")]},
    {"type": "websocket.accept", "headers": [("name", "value")]},
    {"type": "websocket.accept", "subprotocol": b"x"},
    {"type": "http.response.start", "status": 200},
]
INVALID_OPEN = [
    {"type": "websocket.accept"},
    {"type": "websocket.send"},
    {"type": "websocket.send", "text": "x", "bytes": b"x"},
    {"type": "websocket.send", "text": b"x"},
    {"type": "websocket.send", "bytes": "x"},
    {"type": "websocket.close", "code": 1005},
    {"type": "websocket.close", "code": "1000"},
    {"type": "websocket.close", "reason": "x" * 124},
    {"type": "websocket.bogus"},
]


async def ws_invalid(scope, receive, send, arguments):
    failures = [await failure_of(send(event)) for event in INVALID_EARLY]
    await receive()
    await send({"type": "websocket.accept", "unknown": object()})
    failures += [await failure_of(send(event)) for event in INVALID_OPEN]
    await send({"type": "websocket.send", "text": repr(failures), "bytes": None, "unknown": object()})
    await until_disconnect(receive)


WEBSOCKET = {
    "/scope": ws_scope,
    "/accept": ws_accept,
    "/refuse": ws_refuse,
    "/fail-early": ws_fail_early,
    "/fail": ws_fail,
    "/return": ws_return,
    "/return-early": ws_return_early,
    "/close": ws_close,
    "/member": ws_member,
    "/never-accept": ws_never_accept,
    "/wait": ws_wait,
    "/slow-reader": ws_slow_reader,
    "/flood": ws_flood,
    "/invalid": ws_invalid,
}
