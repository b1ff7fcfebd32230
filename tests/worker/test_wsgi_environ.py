"""What a WSGI application finds in its environ."""

from __future__ import annotations

import io
from typing import Any

import pytest

from tests.worker.support import http_scope
from worker.wsgi_environ import build_environ


def environ_of(scope: dict[str, Any]) -> dict[str, Any]:
    return build_environ(scope, wsgi_input=io.BytesIO(), wsgi_errors=io.StringIO(), file_wrapper=list)


def test_a_plain_request() -> None:
    environ = environ_of(http_scope("POST", "/a", query_string=b"x=1&y=%20"))
    assert {name: environ[name] for name in environ if name.isupper()} == {
        "REQUEST_METHOD": "POST",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/a",
        "QUERY_STRING": "x=1&y=%20",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "REMOTE_ADDR": "127.0.0.1",
        "REMOTE_PORT": "50000",
        "HTTP_HOST": "example.org",
    }
    assert environ["wsgi.url_scheme"] == "http"
    assert environ["wsgi.version"] == (1, 0)


@pytest.mark.parametrize(
    ("raw_path", "root_path", "script_name", "path_info"),
    [
        (b"/", "", "", "/"),
        (b"/caf%C3%A9", "", "", "/caf\xc3\xa9"),  # the bytes of UTF-8, each as a character
        (b"/%FF", "", "", "/\xff"),  # not UTF-8 at all
        (b"/a%2Fb", "", "", "/a/b"),
        (b"/api/x", "/api", "/api", "/x"),
        (b"/api", "/api", "/api", ""),
        (b"/api//x", "/api/", "/api", "/x"),
        ("/é".encode() + b"/x", "/é", "/\xc3\xa9", "/x"),
        (b"*", "", "", "*"),
    ],
)
def test_paths_are_bytes_in_latin_1(raw_path: bytes, root_path: str, script_name: str, path_info: str) -> None:
    environ = environ_of(http_scope(raw_path=raw_path, root_path=root_path))
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == (script_name, path_info)


def test_without_raw_path_the_path_is_encoded() -> None:
    assert environ_of(http_scope(path="/api/é", raw_path=None, root_path="/api"))["PATH_INFO"] == "/\xc3\xa9"


@pytest.mark.parametrize("server", [None, ["/run/sock", None]])
@pytest.mark.parametrize(("scheme", "port"), [("http", "80"), ("https", "443")])
def test_a_unix_socket_has_a_name_and_a_port(server: Any, scheme: str, port: str) -> None:
    environ = environ_of(http_scope(server=server, client=None, scheme=scheme))
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == ("localhost", port)
    assert environ["REMOTE_ADDR"] == ""
    assert "REMOTE_PORT" not in environ


def test_headers_become_variables() -> None:
    headers = [
        (b"content-type", b"text/plain"),
        (b"content-length", b"5"),
        (b"x-forwarded-for", b"1.1.1.1"),
        (b"x_forwarded_for", b"6.6.6.6"),  # spoofed: the same variable
        (b"proxy", b"http://evil"),  # httpoxy
        (b"cookie", b"a=1"),
        (b"x-forwarded-for", b"2.2.2.2"),
        (b"cookie", b"b=2"),
        (b"x-latin", b"\xe9"),
    ]
    environ = environ_of(http_scope(headers=headers))
    assert {name: environ[name] for name in environ if name.startswith(("HTTP_", "CONTENT_"))} == {
        "CONTENT_TYPE": "text/plain",
        "CONTENT_LENGTH": "5",
        "HTTP_X_FORWARDED_FOR": "1.1.1.1,2.2.2.2",
        "HTTP_COOKIE": "a=1; b=2",
        "HTTP_X_LATIN": "\xe9",
    }
