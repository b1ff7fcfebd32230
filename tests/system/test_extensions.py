"""Extensions of ASGI through real processes, on HTTP/1.1. With HTTP/2: test_http2.py."""

import socket

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.system.processes import Served

APP = "tests.system.extensions_application:application"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Served(APP, "--pathsend") as running:
        yield running


def exchange(served, request):
    """Send a request that closes the connection; return the answer."""
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.settimeout(60)
        client.sendall(request)
        received = bytearray()
        while data := client.recv(65536):
            received += data
    return bytes(received)


def get(served, target, *fields, version="1.1"):
    lines = [f"GET {target} HTTP/{version}", "Host: x", "Connection: close", *fields, "", ""]
    return exchange(served, "\r\n".join(lines).encode())


def test_early_hints_before_and_behind_the_start(served):
    for target, body in (("/hint-before", b"hinted"), ("/hint-behind", b"3\r\nhin\r\n3\r\nted\r\n0\r\n\r\n")):
        answer = get(served, target)
        assert answer.startswith(
            b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\nlink: </b.js>; rel=preload\r\n\r\n"
            b"HTTP/1.1 200 OK\r\n"
        )
        assert answer.endswith(b"\r\n\r\n" + body)


def test_early_hints_are_not_offered_to_http_1_0(served):
    assert get(served, "/hint-before", version="1.0").startswith(b"HTTP/1.1 500 ")
    served.wait_for(r"the extension 'http.response.early_hint' is not offered")


def test_trailers(served):
    answer = get(served, "/trailers", "TE: trailers")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\ntransfer-encoding: chunked" in head
    assert body == b"4\r\nbody\r\n0\r\nx-sum: 1\r\nx-time: 2\r\n\r\n"


def test_a_client_that_takes_no_trailers_gets_none(served):
    head, _, body = get(served, "/trailers").partition(b"\r\n\r\n")
    assert b"\r\ncontent-length: 4" in head
    assert body == b"body"


def test_an_application_that_promises_trailers_and_sends_none(served):
    body = get(served, "/trailers?forget", "TE: trailers").partition(b"\r\n\r\n")[2]
    assert body == b"4\r\nbody\r\n0\r\n\r\n"
    served.wait_for("the application returned, but the trailers of the response are awaited")


@pytest.mark.parametrize("size", [0, 1, 65536, 5_000_000])
def test_pathsend(served, tmp_path, size):
    path = tmp_path / "file"
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    path.write_bytes(content)
    answer = get(served, f"/file?{path}")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"\r\ncontent-length: {size}\r\n".encode() in head + b"\r\n"
    assert body == content
    assert get(served, f"/file?{path}").startswith(b"HTTP/1.1 200 ")
    head_only = exchange(served, f"HEAD /file?{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert head_only.endswith(b"\r\n\r\n")


def test_pathsend_with_trailers(served, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    answer = get(served, f"/file-trailers?{path}", "TE: trailers")
    assert answer.endswith(b"\r\n0\r\nx-behind: file\r\n\r\n")


def test_a_file_that_is_not_there_is_a_500_and_a_line_in_the_log(served, tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        assert get(served, f"/file?{path}").startswith(b"HTTP/1.1 500 ")
    served.wait_for(r"nothing' cannot be sent: No such file")


def test_a_client_that_leaves_in_the_middle_of_a_file(served, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(50_000_000))
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(f"GET /file?{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert client.recv(1000)
    assert get(served, f"/file?{path}").endswith(bytes(1000))


def test_without_the_flag_pathsend_is_not_offered(tmp_path):
    with Served(APP) as running:
        assert get(running, f"/file?{tmp_path}").startswith(b"HTTP/1.1 500 ")
        running.wait_for(r"the extension 'http.response.pathsend' is not offered")


def test_a_websocket_is_refused_with_a_response(served):
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{served.ws_url}/refuse")
    response = refused.value.response
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Basic"
    assert response.body == b"who are you?"
    served.wait_for(r'"WebSocket /refuse" 401')
    served.wait_for(r"then: websocket.disconnect 1006")


def test_a_refusal_that_fails_in_the_middle(served):
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{served.ws_url}/refuse-nothing")
    assert refused.value.response.status_code == 500
