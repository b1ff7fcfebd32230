"""An application that uses the extensions its scope offers, as the path says."""

import os


async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["type"] == "http":
        await ROUTES[scope["path"]](scope, receive, send)
    else:
        await SOCKETS[scope["path"]](scope, receive, send)


async def lifespan(receive, send):
    while True:
        event = await receive()
        await send({"type": f"{event['type']}.complete"})
        if event["type"] == "lifespan.shutdown":
            return


def start(status=200, headers=(), **further):
    return {"type": "http.response.start", "status": status, "headers": headers, **further}


def body(data, more=False):
    return {"type": "http.response.body", "body": data, "more_body": more}


HINT = {"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload", b"</b.js>; rel=preload"]}


async def hint_before(scope, receive, send):
    await send(HINT)
    await send(start())
    await send(body(b"hinted"))


async def hint_behind(scope, receive, send):
    await send(start())
    await send(HINT)
    await send(body(b"hin", True))
    await send(HINT)  # too late: ignored
    await send(body(b"ted"))


async def trailers(scope, receive, send):
    await send(start(headers=[(b"trailer", b"x-sum, x-time")], trailers=True))
    await send(body(b"body"))
    if scope["query_string"] == b"forget" or "http.response.trailers" not in scope["extensions"]:
        return
    await send({"type": "http.response.trailers", "headers": [(b"x-sum", b"1")], "more_trailers": True})
    await send({"type": "http.response.trailers", "headers": [(b"x-time", b"2")]})


async def file(scope, receive, send):
    path = scope["query_string"].decode()
    length = os.stat(path).st_size if os.access(path, os.R_OK) else 0
    await send(start(headers=[(b"content-length", str(length).encode())]))
    await send({"type": "http.response.pathsend", "path": path})


async def file_trailers(scope, receive, send):
    await send(start(trailers=True))
    await send({"type": "http.response.pathsend", "path": scope["query_string"].decode()})
    await send({"type": "http.response.trailers", "headers": [(b"x-behind", b"file")]})


async def odd_headers(scope, receive, send):
    """What HTTP/2 must not send, among what it may."""
    names = (b"Connection", b"Keep-Alive", b"Transfer-Encoding", b"Upgrade", b"Content-Length", b"X-Odd")
    await send(start(204, [(name, b"1") for name in names]))
    await send(body(b"no body in a 204"))


async def refuse(scope, receive, send):
    await receive()
    headers = [(b"www-authenticate", b"Basic"), (b"content-length", b"12")]
    await send({"type": "websocket.http.response.start", "status": 401, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": b"who are ", "more_body": True})
    await send({"type": "websocket.http.response.body", "body": b"you?"})
    event = await receive()
    print(f"then: {event['type']} {event['code']}", flush=True)


async def refuse_nothing(scope, receive, send):
    await receive()
    await send({"type": "websocket.http.response.start", "status": 401, "headers": []})
    raise RuntimeError("this application fails on purpose")


async def close(scope, receive, send):
    await receive()
    await send({"type": "websocket.close"})


async def echo(scope, receive, send):
    await receive()
    await send({"type": "websocket.accept", "subprotocol": (scope["subprotocols"] or [None])[0]})
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": event.get("text"), "bytes": event.get("bytes")})


ROUTES = {
    "/hint-before": hint_before,
    "/hint-behind": hint_behind,
    "/trailers": trailers,
    "/odd-headers": odd_headers,
    "/file": file,
    "/file-trailers": file_trailers,
}
SOCKETS = {"/refuse": refuse, "/refuse-nothing": refuse_nothing, "/close": close, "/echo": echo}
