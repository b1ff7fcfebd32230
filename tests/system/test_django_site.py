"""examples/django_site as its visitors use it: browser-like clients, two workers, one database."""

import contextlib
import json
import os
import re
import subprocess
import sys

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.system.processes import ROOT, Command, Served

SITE = ROOT / "examples" / "django_site"
PASSWORD = "correct horse battery staple"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A migrated database with the users ada and grace."""
    directory = tmp_path_factory.mktemp("data")
    for arguments in (
        ("migrate", "--verbosity", "0"),
        ("makemigrations", "--check", "--dry-run", "--verbosity", "0"),
        ("createsuperuser", "--noinput", "--username", "ada", "--email", "ada@example.org"),
        ("createsuperuser", "--noinput", "--username", "grace", "--email", "grace@example.org"),
    ):
        environment = {**os.environ, "BOARD_DATA": str(directory), "DJANGO_SUPERUSER_PASSWORD": PASSWORD}
        subprocess.run([sys.executable, "manage.py", *arguments], cwd=SITE, env=environment, check=True, timeout=60)
    return directory


@pytest.fixture(scope="module")
def site(data):
    with Served("project.asgi:application", "--workers", "2", cwd=SITE, env={"BOARD_DATA": str(data)}) as running:
        yield running


@pytest.fixture(scope="module")
def wsgi(data):
    flags = ("--interface", "wsgi", "--workers", "2")
    with Served("project.wsgi:application", *flags, cwd=SITE, env={"BOARD_DATA": str(data)}) as running:
        yield running


class Visitor:
    """A browser: cookies, forms with their tokens, and WebSockets of the same session."""

    def __init__(self, served, name=None):
        self.served = served
        self.client = httpx.Client(base_url=served.url, follow_redirects=True, timeout=60)
        if name is not None:
            answer = self.submit("/login", "/login", {"username": name, "password": PASSWORD})
            assert answer.status_code == 200, answer.text
            assert f"{name} <button>Log out" in answer.text

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()

    def submit(self, page, action, fields, files=None):
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', self.client.get(page).text).group(1)
        return self.client.post(
            action, data={"csrfmiddlewaretoken": token, **fields}, files=files, headers={"Referer": self.served.url}
        )

    def socket(self, path):
        cookies = "; ".join(f"{name}={value}" for name, value in self.client.cookies.items())
        headers = {"Cookie": cookies} if cookies else {}
        return connect(self.served.ws_url + path, origin=self.served.url, additional_headers=headers)


def read(socket):
    return json.loads(socket.recv(timeout=60))


@pytest.mark.parametrize("kind", ["site", "wsgi"])
def test_sessions_and_login(kind, request):
    served = request.getfixturevalue(kind)
    with Visitor(served) as visitor:
        for count in range(1, 6):  # on both workers
            page = visitor.client.get("/").text
            assert f"You have been here {count} time" in page
        assert "Log in</a>" in page
        answer = visitor.submit("/login", "/login", {"username": "ada", "password": "wrong"})
        assert "enter a correct username and password" in answer.text
        assert visitor.client.post("/pin", data={"text": "x"}).status_code == 403  # no token
    with Visitor(served, "ada") as ada:
        assert ada.client.get("/notices.json").json()["user"] == "ada"
        assert "Log in</a>" in ada.submit("/", "/logout", {}).text
        assert ada.client.get("/notices.json").json()["user"] == ""


@pytest.mark.parametrize("kind", ["site", "wsgi"])
def test_static_files(kind, request):
    served = request.getfixturevalue(kind)
    page = httpx.get(served.url + "/", timeout=60).text
    path = re.search(r'href="(/static/board/[^"]+\.css)"', page).group(1)
    answer = httpx.get(served.url + path, timeout=60)
    assert answer.headers["content-type"] == 'text/css; charset="utf-8"'
    assert answer.text == (SITE / "board/static/board/board.css").read_text("utf-8")
    modified = {"If-Modified-Since": answer.headers["last-modified"]}
    assert httpx.get(served.url + path, headers=modified, timeout=60).status_code == 304
    part = httpx.get(served.url + path, headers={"Range": "bytes=0-3"}, timeout=60)
    assert (part.status_code, part.text) == (206, "body")


@pytest.mark.parametrize("kind", ["site", "wsgi"])
def test_forms_uploads_and_downloads(kind, request):
    served = request.getfixturevalue(kind)
    content = os.urandom(5_000_000)  # above what Django keeps in memory
    with Visitor(served, "ada") as ada:
        text = f"A <file> of {kind}"
        page = ada.submit("/", "/pin", {"text": text}, files={"file": ("report.bin", content)}).text
        assert f"A &lt;file&gt; of {kind}" in page
        link = re.search(r'href="(/files/\d+)"', page).group(1)
        answer = ada.client.get(link)
        assert answer.content == content
        assert answer.headers["content-length"] == "5000000"
        assert "attachment" in answer.headers["content-disposition"]
        assert ada.submit("/", "/pin", {"text": ""}).status_code == 400
        assert ada.client.get("/files/999999").status_code == 404
        assert ada.client.get("/notices.json").json()["notices"][0]["text"] == text


def test_a_streamed_view_sends_every_row(site):
    with Visitor(site, "ada") as ada, ada.socket("/ws/board") as board:
        assert read(board) == {"welcome": "ada"}
        for number in range(30):
            board.send(json.dumps({"text": f'row {number} "quoted"'}))
            assert read(board)["text"] == f'row {number} "quoted"'
        with ada.client.stream("GET", "/notices.csv") as answer:
            assert answer.headers["transfer-encoding"] == "chunked"
            lines = "".join(answer.iter_text()).splitlines()
    assert lines[0] == "id,author,text"
    assert [line.partition(",")[2] for line in lines if "row" in line] == [
        f'ada,"row {number} ""quoted"""' for number in range(30)
    ]


def test_everybody_sees_a_new_notice_at_once(site):
    with contextlib.ExitStack() as stack:
        ada = stack.enter_context(Visitor(site, "ada"))
        stranger = stack.enter_context(Visitor(site))
        boards = [stack.enter_context(ada.socket("/ws/board")) for _ in range(5)]
        boards += [stack.enter_context(stranger.socket("/ws/board")) for _ in range(5)]
        assert [read(board)["welcome"] for board in boards] == ["ada"] * 5 + ["stranger"] * 5
        counts = [stack.enter_context(stranger.socket("/ws/count")) for _ in range(4)]
        before = {read(count) for count in counts}
        assert len(before) == 1
        # From a synchronous view ...
        ada.submit("/", "/pin", {"text": "from the form"})
        for board in boards:
            notice = read(board)
            assert (notice["author"], notice["text"]) == ("ada", "from the form")
        assert {read(count) for count in counts} == {before.copy().pop() + 1}
        # ... and from a consumer.
        boards[0].send(json.dumps({"text": "from the socket"}))
        for board in boards:
            assert read(board)["text"] == "from the socket"
        assert {read(count) for count in counts} == {before.pop() + 2}
        # Who is not logged in may look, not pin.
        boards[-1].send(json.dumps({"text": "vandalism"}))
        assert read(boards[-1]) == {"error": "log in first"}


def test_consumers_know_the_user_and_the_database(site):
    with Visitor(site, "grace") as grace, Visitor(site) as stranger:
        grace.submit("/", "/pin", {"text": "a needle in the haystack"})
        with stranger.socket("/ws/search") as search:
            search.send(json.dumps({"search": "NEEDLE"}))
            assert read(search) == {"found": ["a needle in the haystack"]}
        with grace.socket("/ws/authors") as authors:
            assert "grace" in read(authors)["authors"]
            with pytest.raises(ConnectionClosed):
                authors.recv(timeout=60)
            assert authors.close_code == 1000
        with pytest.raises(Exception, match="HTTP 403"), stranger.socket("/ws/authors"):
            pass


def test_reports_are_written_in_the_background(site, data):
    flags = ("--redis", site.redis_url, "--channel", "reports")
    with Visitor(site, "grace") as grace, contextlib.ExitStack() as stack:
        boards = [stack.enter_context(grace.socket("/ws/board")) for _ in range(3)]
        boards[0].send(json.dumps({"text": "three more words"}))
        for board in boards:
            assert read(board) == {"welcome": "grace"}
            assert read(board)["text"] == "three more words"
            board.send(json.dumps({"report": True}))  # it waits in its channel: nobody writes reports yet
        with Command("worker", "project.asgi:application", *flags, cwd=SITE, env={"BOARD_DATA": str(data)}) as worker:
            reports = [read(board)["report"] for board in boards]
            assert worker.stop() == 0
            assert "Traceback" not in worker.output
    assert len(set(reports)) == 1
    notices, words = map(int, re.fullmatch(r"(\d+) notices, (\d+) words", reports[0]).groups())
    assert words >= notices + 2


def test_a_page_of_another_origin_gets_no_socket(site):
    with pytest.raises(Exception, match="HTTP 403"), connect(site.ws_url + "/ws/board", origin="http://evil.example"):
        pass


def test_nothing_went_wrong_on_the_way(site, wsgi):
    """The last test of this file: nothing of the above may have left a traceback."""
    for served in (site, wsgi):
        assert served.stop() == 0
        assert "Traceback" not in served.output
