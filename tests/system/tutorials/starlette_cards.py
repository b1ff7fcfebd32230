"""A box of cards with what Starlette's documentation teaches, page by page. Served by test_tutorials.py."""

import asyncio
import base64
import binascii
import contextlib

from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser, requires
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.convertors import Convertor, register_url_convertor
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

templates = Jinja2Templates(directory="templates")


class Hexadecimal(Convertor):
    regex = "[0-9a-f]+"

    def convert(self, value):
        return int(value, 16)

    def to_string(self, value):
        return f"{value:x}"


register_url_convertor("hex", Hexadecimal())


@contextlib.asynccontextmanager
async def lifespan(app):
    app.state.cards = {7: "seven"}
    yield {"box": "wooden"}
    print("the box is closed", flush=True)


# Requests


async def describe(request):
    return JSONResponse(
        {
            "method": request.method,
            "url": str(request.url),
            "path": request.url.path,
            "query": request.query_params.multi_items(),
            "header": request.headers.getlist("x-color"),
            "cookies": request.cookies,
            "client": request.client.host,
            "state": request.state.box,
            "text": (await request.body()).decode(),
        }
    )


async def count_stream(request):
    pieces = size = 0
    async for piece in request.stream():
        pieces += bool(piece)
        size += len(piece)
    return JSONResponse({"pieces": pieces, "size": size})


async def form(request):
    async with request.form(max_fields=10) as data:
        contents = await data["card"].read()
        return JSONResponse({"name": data["name"], "file": data["card"].filename, "size": len(contents)})


async def card(request):
    return templates.TemplateResponse(request, "card.html", {"greeting": "Good day"})


async def typed(request):
    number, ratio, rest, code = (request.path_params[name] for name in ("number", "ratio", "rest", "code"))
    back = request.url_for("typed", number=number, ratio=ratio, rest=rest, code=code)
    return JSONResponse([number, ratio, code, rest, str(back)])


class Card(HTTPEndpoint):
    async def get(self, request):
        cards = request.app.state.cards
        number = request.path_params["number"]
        if number not in cards:
            raise HTTPException(404, detail="no such card")
        return PlainTextResponse(cards[number])

    async def put(self, request):
        request.app.state.cards[request.path_params["number"]] = (await request.json())["text"]
        return Response(status_code=204)

    def delete(self, request):  # in a thread
        del request.app.state.cards[request.path_params["number"]]
        return PlainTextResponse("deleted")


# Responses


async def slow_numbers(request):
    async def numbers():
        for number in range(5):
            yield f"<li>{number}"
            await asyncio.sleep(0.01)

    return StreamingResponse(numbers(), media_type="text/html")


async def endless(request):
    """Until the client leaves, as server-sent events do."""

    async def ticks():
        try:
            while True:
                yield "data: tick\n\n"
                await asyncio.sleep(0.01)
        finally:
            print("ticking ended", flush=True)

    return StreamingResponse(ticks(), media_type="text/event-stream")


async def file(request):
    return FileResponse("static/words.txt", stat_result=None, filename="a card.txt")


async def cookies(request):
    response = RedirectResponse("/describe", status_code=303)
    response.set_cookie("flavour", "oat", max_age=60, samesite="strict", httponly=True)
    response.set_cookie("size", "large")
    response.delete_cookie("old")
    return response


def say(text):
    print(text, flush=True)


async def say_async(text):
    await asyncio.sleep(0.01)
    say(text)


async def background(request):
    tasks = BackgroundTasks([BackgroundTask(say, "first task"), BackgroundTask(say_async, "second task")])
    return JSONResponse({"status": "started"}, background=tasks)


# Sessions and authentication


async def session(request):
    request.session["visits"] = request.session.get("visits", 0) + 1
    return JSONResponse(request.session)


class BasicAuthentication(AuthenticationBackend):
    async def authenticate(self, conn):
        header = conn.headers.get("authorization")
        if header is None:
            return None
        scheme, _, credentials = header.partition(" ")
        try:
            name, _, password = base64.b64decode(credentials).decode("ascii").partition(":")
        except (ValueError, binascii.Error) as error:
            raise AuthenticationError("these are no credentials") from error
        if scheme.lower() != "basic" or password != "secret":
            raise AuthenticationError("wrong password")
        return AuthCredentials(["reader"]), SimpleUser(name)


@requires("reader")
async def private(request):
    return PlainTextResponse(f"for {request.user.display_name}")


# Middleware and errors


class Stamp(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        response = await call_next(request)
        response.headers["x-stamp"] = "stamped"
        return response


class Bare:
    """Pure ASGI: changes events on their way."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_counted(event):
            if event["type"] == "http.response.start":
                event = {**event, "headers": [*event["headers"], (b"x-bare", b"passed")]}
            await send(event)

        await self.app(scope, receive, send_counted if scope["type"] == "http" else send)


class BurntCard(Exception):
    pass


async def burn(request):
    raise BurntCard("a card burns on purpose")


async def break_down(request):
    raise RuntimeError("this endpoint fails on purpose")


async def burnt(request, error):
    return JSONResponse({"burnt": str(error)}, status_code=410)


async def not_found(request, error):
    return HTMLResponse(f"<h1>not here</h1>{error.detail}", status_code=404)


# WebSockets


class Shout(WebSocketEndpoint):
    encoding = "json"

    async def on_connect(self, websocket):
        await websocket.accept(subprotocol="loud", headers=[(b"x-stand", b"here")])

    async def on_receive(self, websocket, data):
        await websocket.send_json({"shout": data["say"].upper()})

    async def on_disconnect(self, websocket, close_code):
        print(f"shouting ended with {close_code}", flush=True)


async def upside_down(websocket):
    await websocket.accept()
    async for data in websocket.iter_bytes():
        await websocket.send_bytes(data[::-1])


async def denied(websocket):
    await websocket.send_denial_response(JSONResponse({"why": "full"}, status_code=429))


async def with_a_reason(websocket):
    await websocket.accept()
    await websocket.send_text(f"{websocket.query_params['q']} {websocket.user.is_authenticated}")
    await websocket.close(4001, reason="enough")


app = Starlette(
    routes=[
        Host("api.example", Router([Route("/", lambda request: PlainTextResponse("the api"))])),
        Route("/describe", describe, methods=["GET", "POST"]),
        Route("/stream", count_stream, methods=["POST"]),
        Route("/form", form, methods=["POST"]),
        Mount(
            "/cards",
            routes=[Route("/hello/{name}", card), Route("/{number:int}", Card)],
            middleware=[Middleware(Bare)],
        ),
        Route("/typed/{number:int}/{ratio:float}/{code:hex}/{rest:path}", typed, name="typed"),
        Route("/slow", slow_numbers),
        Route("/endless", endless),
        Route("/file", file),
        Route("/cookies", cookies),
        Route("/background", background, methods=["POST"]),
        Route("/session", session),
        Route("/private", private),
        Route("/burn", burn),
        Route("/break", break_down),
        Mount("/static", StaticFiles(directory="static"), name="static"),
        WebSocketRoute("/shout", Shout),
        WebSocketRoute("/upside-down", upside_down),
        WebSocketRoute("/denied", denied),
        WebSocketRoute("/reason", with_a_reason),
    ],
    middleware=[
        Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "*.example", "api.example"]),
        Middleware(CORSMiddleware, allow_origins=["https://cards.example"], expose_headers=["x-stamp"]),
        Middleware(GZipMiddleware, minimum_size=500),
        Middleware(SessionMiddleware, secret_key="for tests only"),
        Middleware(
            AuthenticationMiddleware,
            backend=BasicAuthentication(),
            on_error=lambda conn, error: PlainTextResponse(str(error), status_code=401),
        ),
        Middleware(Stamp),
    ],
    exception_handlers={404: not_found, BurntCard: burnt},
    lifespan=lifespan,
)
