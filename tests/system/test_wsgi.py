"""Flask and Django's WSGI application, unmodified, in the threads of a worker."""

import concurrent.futures
import socket
from functools import partial

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.system.processes import Command, Served

FLASK = """
import threading
from asgiref.sync import async_to_sync
from flask import Flask, Response, request, send_file, session, stream_with_context
from channel_layer import get_channel_layer

app = Flask(__name__)
app.secret_key = "secret"
running, most, changed = 0, 0, threading.Condition()

@app.get("/")
def hello():
    return f"Hello, {request.args.get('name', 'world')}!"

@app.post("/form")
def form():
    session["user"] = request.form["user"]
    return {"user": request.form["user"], "file": len(request.files["file"].read())}

@app.get("/whoami")
def whoami():
    return {"user": session.get("user"), "path": request.path, "root": request.script_root, "url": request.url}

@app.post("/count")
def count():
    size = lines = 0
    while chunk := request.stream.read(100_000):
        size += len(chunk)
        lines += chunk.count(b"\\n")
    return {"size": size, "lines": lines}

@app.get("/stream")
def stream():
    def produce():
        try:
            for number in range(int(request.args["count"])):
                yield f"{number:09}\\n" * 1000
        finally:
            print("the generator is closed", flush=True)
    return Response(stream_with_context(produce()), mimetype="text/plain")

@app.get("/file")
def file():
    return send_file(__file__)

@app.get("/fail")
def fail():
    raise RuntimeError("this view fails on purpose")

@app.get("/meet")
def meet():
    global running, most
    with changed:
        running += 1
        most = max(most, running)
        changed.notify_all()
        changed.wait_for(lambda: most >= 3, 30)  # for those who should be here, too
    threading.Event().wait(0.1)  # and for those who should not
    with changed:
        running -= 1
    return {"most": most, "thread": threading.current_thread().name}

@app.get("/tell")
def tell():
    layer = get_channel_layer()
    async def there_and_back():
        name = await layer.new_channel()
        await layer.send(name, {"type": "note", "text": "told"})
        return await layer.receive(name)
    return async_to_sync(there_and_back)()
"""

DJANGO = """
import sys
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import FileResponse, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

settings.configure(
    ROOT_URLCONF=__name__, SECRET_KEY="secret", ALLOWED_HOSTS=["*"], USE_TZ=True,
    DATA_UPLOAD_MAX_MEMORY_SIZE=None, FILE_UPLOAD_MAX_MEMORY_SIZE=100_000,
)

def hello(request):
    return HttpResponse("Hello from Django, " + request.META["REMOTE_ADDR"])

def upload(request):
    sent = request.FILES["file"]
    return JsonResponse({"size": sum(len(chunk) for chunk in sent.chunks()), "kind": type(sent).__name__})

def stream(request):
    return StreamingHttpResponse(f"{number}\\n" for number in range(3))

def file(request):
    return FileResponse(open(__file__, "rb"))

def lines(request):
    print("a line", "for the log", file=request.environ["wsgi.errors"])
    return JsonResponse([line.decode() for line in request], safe=False)

urlpatterns = [
    path("", hello), path("upload", upload), path("stream", stream), path("file", file), path("lines", lines),
]
application = get_wsgi_application()
"""


@pytest.fixture(scope="module")
def flask(tmp_path_factory):
    directory = tmp_path_factory.mktemp("flask")
    (directory / "main.py").write_text(FLASK)
    with Served("main:app", "--interface", "wsgi", "--threads", "3", cwd=directory) as running:
        yield running


def test_flask_answers(flask):
    answer = httpx.get(flask.url, params={"name": "é"}, timeout=60)
    assert (answer.status_code, answer.text) == (200, "Hello, é!")
    assert httpx.head(flask.url, timeout=60).headers["content-length"] == "13"
    assert httpx.get(flask.url + "/nowhere", timeout=60).status_code == 404
    assert httpx.get(flask.url + "/tell", timeout=60).json() == {"type": "note", "text": "told"}


def test_flask_forms_files_and_sessions(flask):
    with httpx.Client(base_url=flask.url, timeout=60) as client:
        answer = client.post("/form", data={"user": "ada"}, files={"file": b"x" * 3_000_000})
        assert answer.json() == {"user": "ada", "file": 3_000_000}
        assert client.get("/whoami").json() == {
            "user": "ada",
            "path": "/whoami",
            "root": "",
            "url": flask.url + "/whoami",
        }


@pytest.mark.parametrize("kind", ["length", "chunks"])
def test_flask_reads_a_large_body_as_it_comes(flask, kind):
    def body():
        for _ in range(200):
            yield b"0123456789abcde\n" * 6250

    content = body() if kind == "chunks" else b"".join(body())
    answer = httpx.post(flask.url + "/count", content=content, timeout=60)
    assert answer.json() == {"size": 20_000_000, "lines": 1_250_000}


def test_flask_streams(flask):
    with httpx.stream("GET", flask.url + "/stream?count=2000", timeout=60) as answer:
        assert answer.headers["transfer-encoding"] == "chunked"
        assert sum(len(chunk) for chunk in answer.iter_raw()) == 20_000_000
    assert "def hello" in httpx.get(flask.url + "/file", timeout=60).text


def test_a_client_that_leaves_closes_the_generator_of_the_view(flask):
    closed = flask.output.count("the generator is closed")
    with socket.create_connection(("127.0.0.1", flask.port)) as client:
        client.sendall(b"GET /stream?count=1000000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")
    flask.wait_for("the generator is closed", count=closed + 1)


def test_an_error_in_a_view_is_answered_and_logged(flask):
    assert httpx.get(flask.url + "/fail", timeout=60).status_code == 500
    flask.wait_for("RuntimeError: this view fails on purpose")


def test_threads_bound_what_runs_and_the_rest_waits(flask):
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = [answer.json() for answer in pool.map(partial(httpx.get, timeout=60), [flask.url + "/meet"] * 12)]
    assert max(answer["most"] for answer in answers) == 3
    assert all(answer["thread"].startswith("wsgi") for answer in answers)


def test_a_websocket_to_a_wsgi_application_is_refused(flask):
    with pytest.raises(InvalidStatus) as refused:
        connect(flask.ws_url + "/")
    assert refused.value.response.status_code == 403


def test_django(tmp_path):
    (tmp_path / "main.py").write_text(DJANGO)
    with Served("main:application", "--interface", "wsgi", cwd=tmp_path) as served:
        assert httpx.get(served.url, timeout=60).text == "Hello from Django, 127.0.0.1"
        assert httpx.get(served.url + "/stream", timeout=60).text == "0\n1\n2\n"
        assert httpx.get(served.url + "/file", timeout=60).text == DJANGO
        answer = httpx.post(served.url + "/upload", files={"file": b"x" * 3_000_000}, timeout=60)
        assert answer.json() == {"size": 3_000_000, "kind": "TemporaryUploadedFile"}
        assert httpx.post(served.url + "/lines", content=b"one\ntwo", timeout=60).json() == ["one\n", "two"]
        served.wait_for("POST /lines: a line for the log")
        # A client that breaks off in mid-upload is no traceback for the operator.
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(b"POST /lines HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\none\n")
        assert httpx.get(served.url + "/stream", timeout=60).status_code == 200
        assert served.stop() == 0


def test_a_client_that_does_not_read_costs_a_thread_until_it_leaves(flask):
    closed = flask.output.count("the generator is closed")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", flask.port))
        client.sendall(b"GET /stream?count=1000000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(15).startswith(b"HTTP/1.1 200 OK")
        assert httpx.get(flask.url, timeout=60).status_code == 200
        assert flask.output.count("the generator is closed") == closed
    flask.wait_for("the generator is closed", count=closed + 1)


@pytest.mark.parametrize(
    ("reference", "flags", "text"),
    [
        ("main:app", (), "serve it with --interface wsgi"),
        ("asgi:app", ("--interface", "wsgi"), "looks like an ASGI application"),
    ],
)
def test_the_wrong_interface_is_one_line(tmp_path, reference, flags, text):
    (tmp_path / "main.py").write_text(FLASK)
    (tmp_path / "asgi.py").write_text("async def app(scope, receive, send): ...\n")
    with Command("serve", reference, "--port", "0", *flags, cwd=tmp_path) as command:
        status, output = command.wait_ended()
    assert status == 2
    assert text in output
    assert "Traceback" not in output
