"""What the tutorials of FastAPI, Starlette and Django teach, with the real frameworks: small sites in their shape.

The Channels tutorial is in test_frameworks.py. Sites that keep something in memory run on one worker, others on two.
"""

import gzip
import json
import os
import re
import subprocess
import sys

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.system.processes import ROOT, Served

PASSWORD = "correct horse battery staple"
SITES = ROOT / "tests" / "system" / "tutorials"


# FastAPI


@pytest.fixture(scope="module")
def library():
    with Served("fastapi_library:app", cwd=SITES) as running:
        yield running


@pytest.fixture(scope="module")
def books(library):
    with httpx.Client(base_url=library.url, timeout=60) as client:
        yield client


def test_fastapi_path_and_query_parameters(books):
    assert books.get("/shelves/poems?skip=3&sold=yes").json() == {
        "shelf": "poems", "skip": 3, "limit": 10, "sold": True,
    }  # fmt: skip
    assert books.get("/shelves/other").status_code == 422
    assert books.get("/shelves/novels?limit=51").json() == {"fields": ["query.limit"]}
    assert books.get("/paths//home/ada/notes.txt").json() == {"path": "/home/ada/notes.txt"}
    assert books.get("/search?word=gr%C3%BCn&word=blau&year=1999").json() == {"words": ["grün", "blau"], "year": 1999}
    assert books.get("/search").json() == {"fields": ["query.word"]}
    assert books.get("/pages/1").json() == {"page": 1}
    assert books.get("/pages/0").json() == {"fields": ["path.number"]}


def test_fastapi_bodies_and_models(books):
    book = {"title": "Ästhetik", "price": 9.5, "tags": ["a", "b", "a"], "authors": [{"name": "Ada"}]}
    stored = books.post("/books", json=book)
    assert (stored.status_code, stored.json()) == (201, {"number": 1, "title": "Ästhetik"})
    assert books.post("/books", json={"title": "x" * 41, "price": -1}).json() == {
        "fields": ["body.title", "body.price"]
    }
    assert books.post("/books", content=b"{no json", headers={"Content-Type": "application/json"}).status_code == 422
    changed = books.put("/books/3?urgent=1", json={"book": book, "author": {"name": "Grace", "born": 1906}}).json()
    assert (changed["number"], changed["urgent"], changed["author"]) == (3, True, {"name": "Grace", "born": 1906})
    assert sorted(changed["book"]["tags"]) == ["a", "b"]


def test_fastapi_forms_files_and_raw_bodies(books):
    content = os.urandom(2_000_000)  # above what Starlette keeps in memory
    files = [("files", ("a.txt", b"words", "text/plain")), ("files", ("b.bin", content))]
    assert books.post("/form", data={"name": "Åse"}, files=files).json() == {
        "name": "Åse",
        "files": [["a.txt", "text/plain", 5], ["b.bin", "application/octet-stream", 2_000_000]],
    }
    assert books.post("/form", data={"name": "x"}).json() == {"fields": ["body.files"]}

    def pieces():
        for _ in range(300):
            yield b"x" * 10_000

    assert books.post("/raw", content=pieces()).json() == {"size": 3_000_000}


def test_fastapi_headers_cookies_and_responses(library, books):
    headers = [("User-Agent", "a test"), ("X-Token", "one"), ("X-Token", "two"), ("Cookie", "visits=4")]
    answer = httpx.get(f"{library.url}/echo", headers=headers, timeout=60)
    assert answer.json() == {"user_agent": "a test", "tokens": ["one", "two"], "visits": 4}
    assert answer.headers["set-cookie"] == "visits=5; HttpOnly; Path=/; SameSite=lax"
    assert answer.headers["x-seen"] == "a test"
    page = books.get("/old", follow_redirects=True)
    assert (page.text, page.history[0].status_code) == ("<h1>Library</h1>", 307)
    lines = "".join(f"{number}\n" for number in range(1000))
    for path in ("/numbers", "/threaded-numbers"):
        assert books.get(path).text == lines
    file = books.get("/download")
    assert file.text == "one\ntwo\nthree\n"
    assert file.headers["content-disposition"] == 'attachment; filename="words.txt"'
    assert books.get("/download", headers={"Range": "bytes=4-6"}).text == "two"
    assert books.get("/static/style.css").headers["content-type"].startswith("text/css")
    assert books.head("/page").status_code == 405


def test_fastapi_errors(library, books):
    overdue = books.get("/errors/overdue")
    assert (overdue.status_code, overdue.json()) == (418, {"overdue": 9})
    missing = books.get("/errors/http")
    assert (missing.status_code, missing.json(), missing.headers["x-reason"]) == (
        404, {"detail": "no such book"}, "burnt",
    )  # fmt: skip
    assert books.get("/errors/other").status_code == 500
    library.wait_for("this view fails on purpose")
    assert books.get("/nowhere").json() == {"detail": "Not Found"}


def test_fastapi_dependencies_security_and_background_tasks(library, books):
    key = {"X-Key": "open sesame"}
    assert books.get("/depends?limit=9", headers=key).json() == {"skip": 0, "limit": 9}
    library.wait_for(r"connection closed after \['used'\]")
    assert books.get("/depends").status_code == 401
    assert books.get("/basic", auth=("ada", "secret")).json() == {"user": "ada"}
    refused = books.get("/basic")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Basic")
    token = books.post("/token", data={"username": "ada", "password": "x"}).json()["access_token"]
    assert books.get("/me", headers={"Authorization": f"Bearer {token}"}).json() == {"user": "ada"}
    assert books.get("/me").status_code == 401
    assert books.post("/notify/grace").json() == {"sent": "grace"}
    library.wait_for("noted sync grace")
    library.wait_for("noted async grace")


def test_fastapi_middleware_routers_and_documentation(library, books):
    page = books.get("/page", headers={"Origin": "https://reader.example"})
    assert float(page.headers["x-process-time"]) >= 0
    assert page.headers["access-control-allow-origin"] == "https://reader.example"
    preflight = {"Origin": "https://reader.example", "Access-Control-Request-Method": "PUT"}
    assert books.options("/books/1", headers=preflight).headers["access-control-max-age"] == "77"
    assert "access-control-allow-origin" not in books.get("/page", headers={"Origin": "https://x.example"}).headers
    with books.stream("GET", "/numbers") as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert len(gzip.decompress(b"".join(answer.iter_raw())).split()) == 1000
    assert books.get("/admin/").status_code == 401
    assert books.get("/admin/", headers={"X-Key": "open sesame"}).json() == {
        "url": f"{library.url}/admin/", "motto": "from the lifespan", "ready": True, "client": "127.0.0.1",
    }  # fmt: skip
    assert books.get("/branch/here").json() == {"root_path": "/branch", "path": "/branch/here"}
    schema = books.get("/openapi.json").json()
    assert (schema["info"], len(schema["paths"]) > 15) == ({"title": "Library", "version": "7.1"}, True)
    assert "swagger-ui" in books.get("/docs").text
    assert books.get("/branch/openapi.json").json()["servers"] == [{"url": "/branch"}]


def test_fastapi_websockets(library):
    with pytest.raises(InvalidStatus, match="403"), connect(library.ws_url + "/rooms/1"):
        pass
    with connect(library.ws_url + "/rooms/1?name=Ada") as ada, connect(library.ws_url + "/rooms/2?name=Bo") as bo:
        ada.send("hello")
        assert ada.recv(timeout=60) == bo.recv(timeout=60) == "Ada in 1: hello"
        bo.close()
        assert ada.recv(timeout=60) == "Bo left"


def test_fastapi_ends_its_lifespan(library, books):
    assert library.stop() == 0
    assert "the library closes" in library.output
    assert library.output.count("Traceback") == library.output.count("RuntimeError: this view fails on purpose") == 1


# Starlette


@pytest.fixture(scope="module")
def box():
    with Served("starlette_cards:app", cwd=SITES) as running:
        yield running


@pytest.fixture(scope="module")
def cards(box):
    with httpx.Client(base_url=box.url, timeout=60) as client:
        yield client


def test_starlette_requests(box, cards):
    headers = [("X-Color", "red"), ("X-Color", "blue"), ("Cookie", "a=1; b=2")]
    answer = cards.post("/describe?q=gr%C3%BCn&q=2", headers=headers, content="wörter".encode()).json()
    assert answer == {
        "method": "POST",
        "url": f"{box.url}/describe?q=gr%C3%BCn&q=2",
        "path": "/describe",
        "query": [["q", "grün"], ["q", "2"]],
        "header": ["red", "blue"],
        "cookies": {"a": "1", "b": "2"},
        "client": "127.0.0.1",
        "state": "wooden",
        "text": "wörter",
    }
    content = os.urandom(3_000_000)
    streamed = cards.post("/stream", content=content).json()
    assert (streamed["size"], streamed["pieces"] > 10) == (3_000_000, True)
    assert cards.post("/form", data={"name": "Ada"}, files={"card": ("a.bin", content)}).json() == {
        "name": "Ada", "file": "a.bin", "size": 3_000_000,
    }  # fmt: skip


def test_starlette_routing(box, cards):
    assert cards.get("/typed/7/1.5/ff/x/y%20z").json() == [7, 1.5, 255, "x/y z", f"{box.url}/typed/7/1.5/ff/x/y z"]
    assert cards.get("/cards/7").text == "seven"
    assert cards.put("/cards/8", json={"text": "eight"}).status_code == 204
    assert cards.get("/cards/8").text == "eight"
    assert cards.delete("/cards/8").text == "deleted"
    missing = cards.get("/cards/8")
    assert (missing.status_code, missing.text) == (404, "<h1>not here</h1>no such card")
    wrong = cards.patch("/cards/7")
    assert (wrong.status_code, "GET" in wrong.headers["allow"]) == (405, True)
    assert cards.get("/slow/").status_code == 307
    assert cards.get("/", headers={"Host": "api.example"}).text == "the api"
    assert cards.get("/", headers={"Host": "evil.test"}).status_code == 400


def test_starlette_templates_static_files_and_responses(box, cards):
    page = cards.get("/cards/hello/Ada").text
    assert "<p>Good day, Ada</p>" in page
    link = re.search('href="([^"]+)"', page).group(1)
    assert link == f"{box.url}/static/style.css"
    style = cards.get(link, headers={"Accept-Encoding": "identity"})
    assert style.text == (SITES / "static" / "style.css").read_text()
    assert cards.get(link, headers={"If-None-Match": style.headers["etag"]}).status_code == 304
    assert cards.head(link).headers["content-length"] == style.headers["content-length"]
    assert cards.get("/static/../starlette_cards.py").status_code == 404
    with cards.stream("GET", "/slow") as slow:
        assert slow.headers["transfer-encoding"] == "chunked"
        assert slow.read() == b"<li>0<li>1<li>2<li>3<li>4"
    file = cards.get("/file", headers={"Range": "bytes=-6"})
    assert (file.status_code, file.text, file.headers["content-range"]) == (206, "three\n", "bytes 8-13/14")
    cookies = httpx.get(f"{box.url}/cookies", timeout=60).headers.get_list("set-cookie")
    assert [cookie.partition("=")[0] for cookie in cookies] == ["flavour", "size", "old"]
    assert cards.post("/background").json() == {"status": "started"}
    box.wait_for("first task")
    box.wait_for("second task")


def test_starlette_ends_a_stream_when_its_client_leaves(box, cards):
    with cards.stream("GET", "/endless") as endless:
        assert next(endless.iter_lines()) == "data: tick"
    box.wait_for("ticking ended")


def test_starlette_middleware_sessions_and_authentication(box, cards):
    answer = cards.get("/cards/7", headers={"Origin": "https://cards.example"})
    assert (answer.headers["x-stamp"], answer.headers["x-bare"]) == ("stamped", "passed")
    assert answer.headers["access-control-expose-headers"] == "x-stamp"
    assert "x-bare" not in cards.get("/describe").headers
    with httpx.Client(base_url=box.url, timeout=60) as visitor:
        assert [visitor.get("/session").json()["visits"] for _ in range(3)] == [1, 2, 3]
    assert cards.get("/private").status_code == 403
    assert cards.get("/private", auth=("ada", "secret")).text == "for ada"
    wrong = cards.get("/private", auth=("ada", "wrong"))
    assert (wrong.status_code, wrong.text) == (401, "wrong password")


def test_starlette_errors(box, cards):
    burnt = cards.get("/burn")
    assert (burnt.status_code, burnt.json()) == (410, {"burnt": "a card burns on purpose"})
    broken = cards.get("/break")
    assert (broken.status_code, broken.text) == (500, "Internal Server Error")
    box.wait_for("this endpoint fails on purpose")
    assert cards.get("/nowhere").status_code == 404


def test_starlette_websockets(box):
    with connect(box.ws_url + "/shout", subprotocols=["quiet", "loud"]) as client:
        assert (client.subprotocol, client.response.headers["x-stand"]) == ("loud", "here")
        client.send(json.dumps({"say": "hey"}))
        assert json.loads(client.recv(timeout=60)) == {"shout": "HEY"}
        client.close(4444)
    box.wait_for("shouting ended with 4444")
    with connect(box.ws_url + "/shout", subprotocols=["loud"]) as client:
        client.send("no json")
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=60)
    assert client.close_code == 1003
    with connect(box.ws_url + "/upside-down", max_size=None) as client:
        data = os.urandom(300_000)
        client.send(data)
        assert client.recv(timeout=60) == data[::-1]
    with pytest.raises(InvalidStatus) as denied, connect(box.ws_url + "/denied"):
        pass
    assert (denied.value.response.status_code, denied.value.response.body) == (429, b'{"why":"full"}')
    with connect(box.ws_url + "/reason?q=a") as client:
        assert client.recv(timeout=60) == "a False"
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=60)
    assert (client.close_code, client.close_reason) == (4001, "enough")


def test_starlette_ends_its_lifespan(box, cards):
    assert box.stop() == 0
    assert "the box is closed" in box.output
    # Starlette's endpoint also raises, behind its close with 1003, for the message that was no JSON: an error, and
    # the one that caused it.
    expected = ("this endpoint fails on purpose", "Malformed JSON data received.", "JSONDecodeError")
    assert [len(re.findall(rf"^\S+: {text}", box.output, re.M)) for text in expected[:2]] == [1, 1]
    assert box.output.count("Traceback") == len(expected)


# Django


@pytest.fixture(scope="module", params=["asgi", "wsgi"])
def polls(request, tmp_path_factory):
    """The site on two workers, its database migrated, with the superuser ada."""
    directory = tmp_path_factory.mktemp("polls")
    environment = {"POLLS_DATA": str(directory)}
    site = SITES / "polls_site"
    for arguments in (
        ("migrate", "--verbosity", "0"),
        ("createsuperuser", "--noinput", "--username", "ada", "--email", "ada@example.org"),
    ):
        subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=site,
            env={**os.environ, **environment, "DJANGO_SUPERUSER_PASSWORD": PASSWORD},
            check=True,
            timeout=60,
        )
    flags = ("--interface", request.param) if request.param == "wsgi" else ()
    with Served(
        f"mysite.{request.param}:application", "--workers", "2", *flags, cwd=site, env=environment
    ) as running:
        yield running
        assert running.stop() == 0
        assert "Traceback" not in running.output


class Browser(httpx.Client):
    """Follows redirects, and fills the token of a form in, as a browser does."""

    def submit(self, page, fields, action=None):
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', self.get(page).text).group(1)
        return self.post(action or page, data={"csrfmiddlewaretoken": token, **fields})


def test_django_polls_from_the_admin_to_the_results(polls):
    with (
        Browser(base_url=polls.url, follow_redirects=True, timeout=60) as ada,
        Browser(base_url=polls.url, follow_redirects=True, timeout=60) as voter,
    ):
        assert "No polls yet." in voter.get("/polls/").text
        assert "Log in" in ada.get("/admin/").text
        wrong = ada.submit("/admin/login/", {"username": "ada", "password": "wrong"})
        assert "Please enter the correct username and password" in wrong.text
        index = ada.submit("/admin/login/?next=/admin/", {"username": "ada", "password": PASSWORD})
        assert "Site administration" in index.text
        # A question with two choices, on one page of the admin.
        fields = {
            "text": "What <now>?",
            "published_0": "2026-01-02",
            "published_1": "03:04:05",
            "choice_set-TOTAL_FORMS": "2",
            "choice_set-INITIAL_FORMS": "0",
            "choice_set-MIN_NUM_FORMS": "0",
            "choice_set-MAX_NUM_FORMS": "1000",
            "choice_set-0-text": "Sleep",
            "choice_set-0-votes": "0",
            "choice_set-1-text": "Code",
            "choice_set-1-votes": "0",
        }
        added = ada.submit("/admin/polls/question/add/", fields)
        assert "was added successfully" in added.text
        question = int(re.search(r"/admin/polls/question/(\d+)/change/", added.text).group(1))
        assert "1 question" in ada.get("/admin/polls/question/?q=now").text
        assert "0 questions" in ada.get("/admin/polls/question/?q=never").text
        assert "Added" in ada.get(f"/admin/polls/question/{question}/history/").text
        incomplete = ada.submit("/admin/polls/question/add/", {**fields, "text": ""})
        assert "This field is required." in incomplete.text

        # A visitor votes.
        assert "What &lt;now&gt;?" in voter.get("/polls/").text
        detail = f"/polls/{question}/"
        choices = dict(re.findall(r'value="(\d+)"> (\w+)<', voter.get(detail).text))
        (code,) = [number for number, text in choices.items() if text == "Code"]
        for votes in range(1, 7):
            results = voter.submit(detail, {"choice": code}, f"{detail}vote/")
            assert str(results.url) == f"{polls.url}{detail}results/"
            assert f"Code: {votes} vote{'s' if votes > 1 else ''}" in results.text
            assert "Sleep: 0 votes" in results.text
            assert '<p class="success">Your vote counts.</p>' in results.text
        assert "You chose nothing." in voter.submit(detail, {}, f"{detail}vote/").text
        assert voter.post(f"{detail}vote/", data={"choice": code}).status_code == 403
        assert voter.get("/polls/999/").status_code == 404
        assert voter.get("/admin/polls/question/").url.path == "/admin/login/"

        # The question goes, by the admin's action.
        action = {"action": "delete_selected", "_selected_action": str(question), "post": "yes"}
        assert "Successfully deleted 1 question" in ada.submit("/admin/polls/question/", action).text
        assert "No polls yet." in voter.get("/polls/").text


def test_django_static_files_without_a_proxy(polls):
    for path in ("/static/polls/style.css", "/static/admin/css/base.css", "/static/admin/js/core.js"):
        answer = httpx.get(polls.url + path, timeout=60)
        assert answer.status_code == 200
        assert int(answer.headers["content-length"]) == len(answer.content) > 10
    assert httpx.get(polls.url + "/static/none.css", timeout=60).status_code == 404
    assert "DEBUG = True" in httpx.get(polls.url + "/nowhere", timeout=60).text  # Django's page for developers
