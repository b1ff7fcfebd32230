"""Compressed WebSockets as clients see them: one of Python, a browser, one over HTTP/2, and one that means ill."""

import contextlib
import shutil
import zlib

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.sync.client import connect

from channel_layer import Publisher
from tests.system.h2_client import H2Client
from tests.system.h2_websocket import H2WebSocket
from tests.system.processes import Served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
APP = "tests.system.applications:application"
LARGE = "the quick brown fox jumps over the lazy dog, again; " * 200


@pytest.fixture(scope="module")
def served():
    with Served(APP, "--ws-per-message-deflate", "--ws-max-size", "100000") as served:
        yield served


def offers(**parameters):
    return {"compression": None, "extensions": [ClientPerMessageDeflateFactory(**parameters)]}


@pytest.mark.parametrize(
    "client",
    [
        {},  # what the library offers by itself: client_max_window_bits
        offers(),
        offers(server_max_window_bits=9),
        offers(server_max_window_bits=15, client_max_window_bits=15),
        offers(server_no_context_takeover=True, client_no_context_takeover=True, client_max_window_bits=10),
    ],
)
def test_messages_come_back_as_they_were(served, client):
    with connect(f"{served.ws_url}/echo", **client) as socket:
        answer = socket.response.headers["Sec-WebSocket-Extensions"]
        assert answer.startswith("permessage-deflate; server_no_context_takeover; client_no_context_takeover; ")
        for message in ("", "small", LARGE, LARGE.encode(), bytes(100_000), "ä" * 50_000):
            socket.send(message)
            assert socket.recv(timeout=60) == message
        socket.send(iter([LARGE[:100], LARGE[100:]]))  # in fragments
        assert socket.recv(timeout=60) == LARGE


def test_a_client_that_offers_nothing_gets_nothing(served):
    with connect(f"{served.ws_url}/echo", compression=None) as socket:
        assert "Sec-WebSocket-Extensions" not in socket.response.headers
        socket.send(LARGE)
        assert socket.recv(timeout=60) == LARGE


def test_a_broadcast_reaches_clients_with_every_setting(served):
    settings = [{}, {"compression": None}, offers(server_max_window_bits=9), offers(server_max_window_bits=10)]
    with contextlib.ExitStack() as stack:
        url = f"{served.ws_url}/member?group=room"
        clients = [stack.enter_context(connect(url, **each)) for each in settings * 5]
        for client in clients:
            assert client.recv(timeout=60) == "joined"
        with Publisher(served.redis_url) as publisher:
            for text in (LARGE, "small", LARGE.upper()):
                publisher.group_send("room", {"type": "websocket.send", "text": text})
        for client in clients:
            assert [client.recv(timeout=60) for _ in range(3)] == [LARGE, "small", LARGE.upper()]


def test_a_message_that_inflates_beyond_the_limit_ends_the_connection(served):
    with connect(f"{served.ws_url}/echo", max_size=None) as socket:
        socket.send(bytes(50_000_000))  # 50 KB on the wire
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(timeout=60)
        assert caught.value.rcvd.code == 1009


def test_compression_over_http2(served):
    offer = (b"sec-websocket-extensions", b"permessage-deflate; client_max_window_bits")
    with H2Client(served.port) as client:
        socket = H2WebSocket(client, "/echo", headers=[offer])
        assert dict(socket.stream.headers)[b"sec-websocket-extensions"].endswith(
            b"; server_max_window_bits=12; client_max_window_bits=12"
        )
        deflater = zlib.compressobj(wbits=-12)
        compressed = (deflater.compress(LARGE.encode()) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]
        socket.send(compressed, opcode=0x41)  # with RSV1
        client.read_until(lambda: len(socket.stream.body) >= 1)
        assert socket.stream.body[0] == 0xC1
        _, answer = socket.receive()
        assert len(answer) < len(LARGE) / 10
        assert zlib.decompressobj(wbits=-12).decompress(answer + b"\0\0\xff\xff").decode() == LARGE


ECHO_IN_A_PAGE = """
([url, text]) => new Promise((resolve, reject) => {
    const socket = new WebSocket(url);
    socket.onopen = () => { socket.send(text); socket.send("small"); };
    const got = [];
    socket.onmessage = event => {
        got.push(event.data);
        if (got.length == 2) { resolve([socket.extensions, ...got]); socket.close(); }
    };
    socket.onclose = event => reject(new Error("closed: " + event.code));
})
"""


def test_a_browser_agrees(served):
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(served.url)
        extensions, *got = page.evaluate(ECHO_IN_A_PAGE, [f"{served.ws_url}/echo", LARGE])
        browser.close()
    assert extensions.startswith("permessage-deflate; server_no_context_takeover")
    assert got == [LARGE, "small"]
