"""A library with what FastAPI's tutorial teaches, chapter by chapter. Served by test_tutorials.py."""

import asyncio
import secrets
import time
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Annotated

from fastapi import (
    APIRouter,
    BackgroundTasks,
    Cookie,
    Depends,
    FastAPI,
    File,
    Form,
    Header,
    HTTPException,
    Path,
    Query,
    Request,
    Response,
    UploadFile,
    WebSocket,
    WebSocketDisconnect,
    WebSocketException,
    status,
)
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, StreamingResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials, OAuth2PasswordBearer, OAuth2PasswordRequestForm
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field


@asynccontextmanager
async def lifespan(app):
    app.state.ready_since = time.monotonic()
    yield {"motto": "from the lifespan"}
    print("the library closes", flush=True)


app = FastAPI(title="Library", version="7.1", lifespan=lifespan)
app.add_middleware(CORSMiddleware, allow_origins=["https://reader.example"], allow_methods=["*"], max_age=77)
app.add_middleware(GZipMiddleware, minimum_size=2000)
app.mount("/static", StaticFiles(directory="static"), name="static")


@app.middleware("http")
async def time_taken(request: Request, call_next):
    begun = time.perf_counter()
    response = await call_next(request)
    response.headers["X-Process-Time"] = f"{time.perf_counter() - begun:.6f}"
    return response


# Path and query parameters


class Shelf(StrEnum):
    novels = "novels"
    poems = "poems"


@app.get("/shelves/{shelf}")
async def show_shelf(shelf: Shelf, skip: int = 0, limit: Annotated[int, Query(le=50)] = 10, sold: bool = False):
    return {"shelf": shelf.value, "skip": skip, "limit": limit, "sold": sold}


@app.get("/paths/{file_path:path}")
async def show_path(file_path: str):
    return {"path": file_path}


@app.get("/search")
async def search(
    q: Annotated[list[str], Query(alias="word", min_length=1)], year: Annotated[int | None, Query()] = None
):
    return {"words": q, "year": year}


@app.get("/pages/{number}")
def show_page(number: Annotated[int, Path(ge=1)]):
    return {"page": number}


# Bodies, models, forms, files


class Author(BaseModel):
    name: str
    born: int | None = None


class Book(BaseModel):
    title: str = Field(max_length=40)
    price: float = Field(gt=0)
    tags: set[str] = set()
    authors: list[Author] = []


class StoredBook(BaseModel):
    number: int
    title: str


@app.post("/books", status_code=status.HTTP_201_CREATED, response_model=StoredBook)
async def store(book: Book):
    return {**book.model_dump(), "number": len(book.authors), "secret": "is not in the response model"}


@app.put("/books/{number}")
async def change(number: int, book: Book, author: Author, urgent: bool = False):
    return {"number": number, "book": book, "author": author, "urgent": urgent}


@app.post("/form")
async def form(name: Annotated[str, Form()], files: Annotated[list[UploadFile], File()]):
    return {"name": name, "files": [[file.filename, file.content_type, len(await file.read())] for file in files]}


@app.post("/raw")
async def raw(request: Request):
    size = 0
    async for piece in request.stream():
        size += len(piece)
    return {"size": size}


# Headers, cookies, responses


@app.get("/echo")
async def echo(
    response: Response,
    user_agent: Annotated[str | None, Header()] = None,
    x_token: Annotated[list[str] | None, Header()] = None,
    visits: Annotated[int, Cookie()] = 0,
):
    response.set_cookie("visits", str(visits + 1), httponly=True)
    response.headers["X-Seen"] = user_agent or ""
    return {"user_agent": user_agent, "tokens": x_token, "visits": visits}


@app.get("/page", response_class=HTMLResponse)
async def page():
    return "<h1>Library</h1>"


@app.get("/old")
async def old():
    return RedirectResponse("/page")


@app.get("/numbers")
async def numbers():
    async def lines():
        for number in range(1000):
            yield f"{number}\n"
            if number % 100 == 0:
                await asyncio.sleep(0)

    return StreamingResponse(lines(), media_type="text/plain")


@app.get("/threaded-numbers")
def threaded_numbers():
    return StreamingResponse((f"{number}\n" for number in range(1000)), media_type="text/plain")


@app.get("/download")
async def download():
    return FileResponse("static/words.txt", filename="words.txt")


# Errors


class Overdue(Exception):
    def __init__(self, days):
        self.days = days


@app.exception_handler(Overdue)
async def overdue(request: Request, error: Overdue):
    return JSONResponse({"overdue": error.days}, status_code=418)


@app.exception_handler(RequestValidationError)
async def invalid(request: Request, error: RequestValidationError):
    return JSONResponse({"fields": [".".join(map(str, each["loc"])) for each in error.errors()]}, status_code=422)


@app.get("/errors/{kind}")
async def fail(kind: str):
    if kind == "overdue":
        raise Overdue(9)
    if kind == "http":
        raise HTTPException(404, "no such book", headers={"X-Reason": "burnt"})
    raise RuntimeError("this view fails on purpose")


# Dependencies


async def connection():
    """One with a yield: its end runs behind the response."""
    log = []
    try:
        yield log
    finally:
        print(f"connection closed after {log}", flush=True)


class Paging:
    def __init__(self, skip: int = 0, limit: int = 3):
        self.skip, self.limit = skip, limit


def token(x_key: Annotated[str | None, Header()] = None):
    if x_key != "open sesame":
        raise HTTPException(401, "wrong key")
    return x_key


@app.get("/depends", dependencies=[Depends(token)])
async def depends(paging: Annotated[Paging, Depends()], log: Annotated[list, Depends(connection)]):
    log.append("used")
    return {"skip": paging.skip, "limit": paging.limit}


# Security

basic = HTTPBasic()
bearer = OAuth2PasswordBearer(tokenUrl="token")
TOKENS: dict[str, str] = {"token-of-ada": "ada"}


@app.get("/basic")
def who_by_basic(credentials: Annotated[HTTPBasicCredentials, Depends(basic)]):
    if not secrets.compare_digest(credentials.password.encode(), b"secret"):
        raise HTTPException(401, headers={"WWW-Authenticate": "Basic"})
    return {"user": credentials.username}


@app.post("/token")
async def login(data: Annotated[OAuth2PasswordRequestForm, Depends()]):
    return {"access_token": f"token-of-{data.username}", "token_type": "bearer"}


@app.get("/me")
async def me(token: Annotated[str, Depends(bearer)]):
    if token not in TOKENS:
        raise HTTPException(401)
    return {"user": TOKENS[token]}


# Background tasks


def note(text: str):
    print(f"noted {text}", flush=True)


async def note_later(text: str):
    await asyncio.sleep(0.05)
    print(f"noted {text}", flush=True)


@app.post("/notify/{name}")
async def notify(name: str, tasks: BackgroundTasks):
    tasks.add_task(note, f"sync {name}")
    tasks.add_task(note_later, f"async {name}")
    return {"sent": name}


# Bigger applications: routers, sub-applications, state

router = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(token)])


@router.get("/")
async def admin(request: Request):
    return {
        "url": str(request.url_for("admin")),
        "motto": request.state.motto,
        "ready": request.app.state.ready_since > 0,
        "client": request.client.host,
    }


app.include_router(router)
branch = FastAPI(title="Branch")


@branch.get("/here")
async def here(request: Request):
    return {"root_path": request.scope["root_path"], "path": request.url.path}


app.mount("/branch", branch)


# WebSockets


class Room:
    def __init__(self):
        self.sockets: list[WebSocket] = []

    async def say(self, text: str):
        for socket in self.sockets:
            await socket.send_text(text)


room = Room()


async def reader_name(websocket: WebSocket, name: Annotated[str | None, Query()] = None):
    if name is None:
        raise WebSocketException(code=status.WS_1008_POLICY_VIOLATION)
    return name


@app.websocket("/rooms/{number}")
async def enter(websocket: WebSocket, number: int, name: Annotated[str, Depends(reader_name)]):
    await websocket.accept()
    room.sockets.append(websocket)
    try:
        while True:
            await room.say(f"{name} in {number}: {await websocket.receive_text()}")
    except WebSocketDisconnect:
        room.sockets.remove(websocket)
        await room.say(f"{name} left")
