"""WSGI applications behind receive() and send(): PEP 3333, threads, waiting, and ends of every kind."""

from __future__ import annotations

import asyncio
import contextvars
import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref.validate import validator

import pytest

from tests.worker.support import http_scope
from worker.events import ClientDisconnected
from worker.wsgi import WAITING_BYTES_MAX, WsgiAdapter, WsgiError

TIMEOUT_S = 20.0
PLAIN = [("Content-Type", "text/plain")]


class Exchange:
    """One request: what receive() gives is put into ``events``; what is sent is in ``sent``."""

    def __init__(self, application: Any, *events: Any, threads: int = 2, **scope: Any) -> None:
        self.adapter = (
            application if isinstance(application, WsgiAdapter) else WsgiAdapter(application, threads=threads)
        )
        self.scope = http_scope(**scope)
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for event in events or (body(b"", more_body=False),):
            self.events.put_nowait(event)
        self.sent: list[dict[str, Any]] = []
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.is_sending = asyncio.Event()
        self.has_received = asyncio.Event()
        self.failure: Exception | None = None

    async def receive(self) -> dict[str, Any]:
        event = await self.events.get()
        self.has_received.set()
        return event

    async def send(self, message: Any) -> None:
        self.is_sending.set()
        await self.may_send.wait()
        if self.failure is not None:
            raise self.failure
        self.sent.append(dict(message))

    async def run(self) -> Exchange:
        async with asyncio.timeout(TIMEOUT_S):
            await self.adapter(self.scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        headers: list[tuple[bytes, bytes]] = self.sent[0]["headers"]
        return headers

    @property
    def body(self) -> bytes:
        assert [event["more_body"] for event in self.sent[1:]] == [True] * (len(self.sent) - 2) + [False]
        return b"".join(event["body"] for event in self.sent[1:])


def body(data: bytes, *, more_body: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more_body}


async def wait_for(flag: threading.Event) -> None:
    assert await asyncio.to_thread(flag.wait, TIMEOUT_S)


class Chunks:
    """An iterable that notes how far it was asked, and whether it was closed."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks = chunks
        self.given = 0
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.chunks:
            self.given += 1
            yield chunk

    def close(self) -> None:
        assert not self.closed.is_set()
        self.closed.set()


# PEP 3333


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["list", "iterable", "write", "empty", "post", "head"])
async def test_wsgiref_finds_nothing_to_complain_of(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def application(environ: dict[str, Any], start_response: Any) -> Any:
        if kind == "post":
            stream = environ["wsgi.input"]
            assert stream.read(1) == b"o"
            assert stream.readline() == b"ne\n"
            assert stream.readlines(2) == [b"two\n"]
            assert list(stream) == [b"three\n", b"four"]
            assert stream.read(1) == b""
        errors = environ["wsgi.errors"]
        errors.write("hello ")
        errors.writelines(["from\n", "here"])
        errors.flush()
        if kind == "empty":
            start_response("204 No Content", [])
            return []
        write = start_response("200 OK", PLAIN)
        if kind == "write":
            write(b"12")
        return iter([b"3", b"", b"4"]) if kind == "iterable" else [b"34"]

    posted = [body(b"one\ntw"), body(b"o\nthree\n"), body(b"four", more_body=False)]
    exchange = Exchange(
        validator(application),
        *(posted if kind == "post" else ()),
        method={"post": "POST", "head": "HEAD"}.get(kind, "GET"),
        headers=[(b"content-length", b"18"), (b"content-type", b"x/y")] if kind == "post" else [],
    )
    with caplog.at_level(logging.ERROR):
        await exchange.run()
    assert exchange.body == {"write": b"1234", "empty": b""}.get(kind, b"34")
    assert exchange.status == (204 if kind == "empty" else 200)
    assert [record.getMessage() for record in caplog.records] == [
        f"{exchange.scope['method']} /: hello from",
        f"{exchange.scope['method']} /: here",
    ]


async def test_a_list_of_one_is_one_event_so_that_it_gets_its_length() -> None:
    def application(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", PLAIN)
        return [b"hello"]

    exchange = await Exchange(application).run()
    assert exchange.sent == [
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]},
        {"type": "http.response.body", "body": b"hello", "more_body": False},
    ]


async def test_nothing_leaves_before_the_first_chunk_that_is_not_empty() -> None:
    """So an application may take its start back, with exc_info."""

    def application(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", PLAIN)
        yield b""
        try:
            raise ValueError("no")
        except ValueError:
            start_response("500 Oh", [("X-Late", "1")], sys.exc_info())
        yield b"failed"

    exchange = await Exchange(application).run()
    assert (exchange.status, exchange.headers, exchange.body) == (500, [(b"x-late", b"1")], b"failed")


async def test_exc_info_behind_the_first_chunk_raises_the_error() -> None:
    def application(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", PLAIN)
        yield b"begun"
        try:
            raise ValueError("in the middle")
        except ValueError:
            start_response("500 Oh", [], sys.exc_info())
        yield b"never"

    exchange = Exchange(application)
    with pytest.raises(ValueError, match="in the middle"):
        await exchange.run()
    assert [event.get("body") for event in exchange.sent] == [None, b"begun"]
    assert exchange.sent[-1]["more_body"]


def calls(*arguments: Any, result: Any = (b"x",)) -> Callable[..., Any]:
    def application(environ: Any, start_response: Any) -> Any:
        start_response(*arguments)
        return result

    return application


def starts_twice(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    start_response("201 Created", [])
    return [b"x"]


@pytest.mark.parametrize(
    ("application", "text"),
    [
        (calls(200, []), "the status is 200 (int)"),
        (calls("OK", []), "the status is 'OK'"),
        (calls("100 Continue", []), "the status is '100 Continue'"),
        (calls("2000 OK", []), "the status is '2000 OK'"),
        (calls("200 OK", {}), "the headers are a dict, expected a list"),
        (calls("200 OK", [("X", 1)]), "('X', 1)"),
        (calls("200 OK", [("X", "\u20ac")]), "Latin-1"),
        (calls("200 OK", [("X", "1\r\nSet-Cookie: 2")]), "has CR, LF or NUL"),
        (calls("200 OK", [("", "1")]), "no name"),
        (calls("200 OK", [], result=["text"]), "'text' (str) as body, expected bytes"),
        (calls("200 OK", [], result=b"bytes"), "the application returned bytes, expected a list"),
        (calls("200 OK", [], result=iter([b"x", None])), "None (NoneType) as body"),
        (starts_twice, "called again"),
        (lambda environ, start_response: [b"x"], "without having called start_response()"),
    ],
)
async def test_what_pep_3333_forbids_is_an_error_that_names_it(application: Any, text: str) -> None:
    with pytest.raises(WsgiError) as caught:
        await Exchange(application).run()
    assert text in str(caught.value)


async def test_hop_by_hop_headers_are_the_servers() -> None:
    headers = [("Connection", "close"), ("Transfer-Encoding", "chunked"), ("X-One", "1"), ("Keep-Alive", "1")]
    exchange = await Exchange(calls("200 OK", headers)).run()
    assert exchange.headers == [(b"x-one", b"1")]


async def test_head_ends_with_the_first_chunk() -> None:
    chunks = Chunks(iter([b"", b"first", b"second"]))
    exchange = await Exchange(calls("200 OK", PLAIN, result=chunks), method="HEAD").run()
    assert exchange.status == 200
    assert exchange.body == b"first"  # the interface server drops it
    assert chunks.given == 2
    assert chunks.closed.is_set()


async def test_the_file_wrapper_reads_large_blocks_and_closes_the_file() -> None:
    file = io.BytesIO(b"x" * 200_000)
    file.seek(50_000)

    def application(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](file, 4096)

    exchange = await Exchange(application).run()
    assert len(exchange.body) == 150_000
    assert len(exchange.sent) <= 5
    assert file.closed


# Errors


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(3), KeyboardInterrupt(), StopIteration()])
async def test_what_the_application_raises_is_raised(error: BaseException) -> None:
    def application(environ: Any, start_response: Any) -> Any:
        raise error

    exchange = Exchange(application)
    # A coroutine cannot raise a StopIteration (PEP 479).
    with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error)):
        await exchange.run()
    assert exchange.sent == []


async def test_an_error_in_the_middle_closes_the_iterable() -> None:
    def broken() -> Iterator[bytes]:
        yield b"begun"
        raise ValueError("broken")

    chunks = Chunks(broken())
    exchange = Exchange(calls("200 OK", [], result=chunks))
    with pytest.raises(ValueError, match="broken"):
        await exchange.run()
    assert chunks.closed.is_set()
    assert exchange.sent[-1] == {"type": "http.response.body", "body": b"begun", "more_body": True}


async def test_an_error_in_close_comes_behind_the_response() -> None:
    class Closing(Chunks):
        def close(self) -> None:
            raise ValueError("in close")

    exchange = Exchange(calls("200 OK", [], result=Closing(iter([b"whole"]))))
    with pytest.raises(ValueError, match="in close"):
        await exchange.run()
    assert exchange.body == b"whole"


# Waiting


async def test_a_client_that_does_not_read_stops_the_iterable() -> None:
    last = WAITING_BYTES_MAX // 10_000 + 1  # chunks that fit, and the one that is too many
    chunks = Chunks(b"x" * 10_000 for _ in range(1000))
    exchange = Exchange(calls("200 OK", [], result=chunks))
    exchange.may_send.clear()
    running = asyncio.create_task(exchange.run())
    async with asyncio.timeout(TIMEOUT_S):
        while chunks.given < last:  # noqa: ASYNC110 - there is no event behind its counting
            await asyncio.sleep(0.001)
    await asyncio.wait([running], timeout=0.05)  # for it to go on, wrongly
    assert chunks.given == last
    exchange.may_send.set()
    await running
    assert len(exchange.body) == 10_000_000
    assert chunks.given == 1000


async def test_the_body_is_read_as_the_application_asks_for_it() -> None:
    read: list[bytes] = []
    asks = threading.Event()

    def application(environ: Any, start_response: Any) -> list[bytes]:
        read.append(environ["wsgi.input"].read(3))
        asks.set()
        read.append(environ["wsgi.input"].read())
        start_response("200 OK", [])
        return [b"read"]

    exchange = Exchange(application, body(b"abc"), method="POST")
    running = asyncio.create_task(exchange.run())
    await wait_for(asks)
    assert read == [b"abc"]
    assert not running.done()
    exchange.events.put_nowait(body(b""))
    exchange.events.put_nowait(body(b"d" * 100_000))
    exchange.events.put_nowait(body(b"e", more_body=False))
    await running
    assert read[1] == b"d" * 100_000 + b"e"
    assert exchange.events.empty()


async def test_a_body_that_is_not_asked_for_is_not_received() -> None:
    exchange = await Exchange(calls("200 OK", []), body(b"abc"), method="POST").run()
    assert exchange.events.qsize() == 1


async def test_reading_does_not_wait_behind_sending() -> None:
    """A client that reads the response only when its body was taken."""

    def application(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"first"
        yield environ["wsgi.input"].read()

    exchange = Exchange(application, body(b"abc", more_body=False), method="POST")
    exchange.may_send.clear()
    running = asyncio.create_task(exchange.run())
    await exchange.is_sending.wait()
    async with asyncio.timeout(TIMEOUT_S):
        await exchange.has_received.wait()
    exchange.may_send.set()
    await running
    assert exchange.body == b"firstabc"


# Ends


async def test_a_client_that_leaves_ends_the_iterable() -> None:
    chunks = Chunks(iter(lambda: b"x" * 1000, b""))  # without an end
    exchange = Exchange(calls("200 OK", [], result=chunks))
    exchange.failure = ClientDisconnected("the client has disconnected")
    with pytest.raises(ClientDisconnected, match="the client has disconnected"):
        await exchange.run()
    assert chunks.closed.is_set()


async def test_a_client_that_leaves_ends_reading_with_an_oserror() -> None:
    seen: list[BaseException] = []

    def application(environ: Any, start_response: Any) -> Any:
        try:
            environ["wsgi.input"].read()
        except OSError as error:
            seen.append(error)
            raise

    with pytest.raises(ClientDisconnected):
        await Exchange(application, body(b"abc"), {"type": "http.disconnect"}, method="POST").run()
    assert len(seen) == 1


@pytest.mark.parametrize("where", ["writing", "reading", "computing"])
async def test_a_cancelled_request_ends_its_thread_and_waits_for_it(where: str) -> None:
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def application(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        try:
            begun.set()
            if where == "reading":
                environ["wsgi.input"].read()
            elif where == "computing":
                assert go_on.wait(TIMEOUT_S)
            while True:
                yield b"x" * 10_000
        finally:
            closed.set()

    exchange = Exchange(application, body(b"abc"), method="POST")
    exchange.may_send.clear()
    running = asyncio.create_task(exchange.run())
    await wait_for(begun)
    if where == "writing":
        await exchange.is_sending.wait()
    running.cancel()
    if where == "computing":
        done, _ = await asyncio.wait([running], timeout=0.05)
        assert not done, "the place of a thread that still runs must not be given away"
        go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert closed.is_set()


async def test_a_cancelled_request_that_waits_for_a_thread_never_runs() -> None:
    begun, go_on = threading.Event(), threading.Event()
    ran: list[str] = []

    def application(environ: Any, start_response: Any) -> list[bytes]:
        ran.append(environ["PATH_INFO"])
        begun.set()
        assert go_on.wait(TIMEOUT_S)
        start_response("200 OK", [])
        return [b""]

    adapter = WsgiAdapter(application, threads=1)
    first = asyncio.create_task(Exchange(adapter, path="/1").run())
    await wait_for(begun)
    second = asyncio.create_task(Exchange(adapter, path="/2").run())
    await asyncio.sleep(0)  # it begins
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    go_on.set()
    await first
    assert ran == ["/1"]


# Threads


async def test_requests_run_beside_each_other_each_in_one_thread_and_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    together = threading.Barrier(4, timeout=TIMEOUT_S)
    threads: dict[str, set[int]] = {}

    class Result:
        def __init__(self, path: str) -> None:
            self.path = path

        def __iter__(self) -> Iterator[bytes]:
            for _ in range(5):
                threads[self.path].add(threading.get_ident())
                yield variable.get().encode()

        def close(self) -> None:
            threads[self.path].add(threading.get_ident())
            assert variable.get() == self.path

    def application(environ: Any, start_response: Any) -> Result:
        path = environ["PATH_INFO"]
        assert variable.get() == "of the request"
        variable.set(path)
        threads[path] = {threading.get_ident()}
        together.wait()
        start_response("200 OK", [])
        return Result(path)

    adapter = WsgiAdapter(application, threads=4)
    variable.set("of the request")
    exchanges = await asyncio.gather(*(Exchange(adapter, path=f"/{n}").run() for n in range(4)))
    assert [exchange.body for exchange in exchanges] == [b"/%d" % n * 5 for n in range(4)]
    assert all(len(idents) == 1 for idents in threads.values())
    assert len(set.union(*threads.values())) == 4
    assert variable.get() == "of the request"


async def test_a_websocket_is_refused() -> None:
    exchange = Exchange(calls("200 OK", []), {"type": "websocket.connect"}, type="websocket")
    await exchange.run()
    assert exchange.sent == [{"type": "websocket.close"}]


async def test_there_is_no_lifespan() -> None:
    with pytest.raises(WsgiError, match="'lifespan'"):
        await Exchange(calls("200 OK", []), type="lifespan").run()
