from __future__ import annotations

import pytest

from interface_server.protocol.request import Peer, RequestHead
from interface_server.protocol.scope import build_http_scope, build_websocket_scope, decode_path

PEER = Peer(client=("203.0.113.9", 4711), server=("192.0.2.1", 80))


def head(raw_path: bytes = b"/a%20b") -> RequestHead:
    return RequestHead(
        method="GET",
        raw_path=raw_path,
        query_string=b"x=%3f",
        http_version="1.1",
        headers=[(b"host", b"example.org"), (b"a", b"1"), (b"b", b"2"), (b"a", b"3")],
    )


def test_http_scope() -> None:
    assert build_http_scope(head(), PEER, root_path="") == {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "http_version": "1.1",
        "server": ("192.0.2.1", 80),
        "client": ("203.0.113.9", 4711),
        "scheme": "http",
        "method": "GET",
        "root_path": "",
        "path": "/a b",
        "raw_path": b"/a%20b",
        "query_string": b"x=%3f",
        "headers": [(b"host", b"example.org"), (b"a", b"1"), (b"b", b"2"), (b"a", b"3")],
        "extensions": {"http.response.early_hint": {}},
    }


def test_extensions_are_what_this_request_can_have() -> None:
    def offered(version: str, *fields: tuple[bytes, bytes], pathsend: bool = False) -> set[str]:
        request = RequestHead(
            method="GET", raw_path=b"/", query_string=b"", http_version=version, headers=list(fields)
        )
        return set(build_http_scope(request, PEER, root_path="", pathsend=pathsend)["extensions"])

    early_hint, trailers, pathsend = "http.response.early_hint", "http.response.trailers", "http.response.pathsend"
    assert offered("1.0", (b"te", b"trailers")) == set()
    assert offered("1.0", pathsend=True) == {pathsend}
    assert offered("1.1", (b"te", b"gzip;q=0.5")) == {early_hint}
    assert offered("1.1", (b"te", b"gzip;q=0.5, Trailers")) == {early_hint, trailers}
    assert offered("2") == {early_hint, trailers}


def test_websocket_scope() -> None:
    scope = build_websocket_scope(head(), PEER, root_path="", subprotocols=["chat", "v2"])
    expected = build_http_scope(head(), PEER, root_path="")
    del expected["method"]
    expected |= {"type": "websocket", "scheme": "ws", "subprotocols": ["chat", "v2"]}
    assert scope == {**expected, "extensions": {"websocket.http.response": {}}}


def test_schemes_under_tls() -> None:
    peer = Peer(client=PEER.client, server=PEER.server, tls=True)
    assert build_http_scope(head(), peer, root_path="")["scheme"] == "https"
    assert build_websocket_scope(head(), peer, root_path="", subprotocols=[])["scheme"] == "wss"


def test_unix_socket() -> None:
    scope = build_http_scope(head(), Peer(client=None, server=("/run/app.sock", None)), root_path="")
    assert scope["client"] is None
    assert scope["server"] == ("/run/app.sock", None)


@pytest.mark.parametrize(
    ("root_path", "raw_path", "path", "raw"),
    [
        ("/api", b"/x%2fy", "/api/x/y", b"/api/x%2fy"),
        ("/\u00e4", b"/x", "/\u00e4/x", "/\u00e4/x".encode()),
        ("/api", b"*", "*", b"*"),
    ],
)
def test_the_path_includes_the_root_path(root_path: str, raw_path: bytes, path: str, raw: bytes) -> None:
    scope = build_http_scope(head(raw_path), PEER, root_path=root_path)
    assert (scope["root_path"], scope["path"], scope["raw_path"]) == (root_path, path, raw)


@pytest.mark.parametrize(
    ("raw_path", "path"),
    [
        (b"/", "/"),
        (b"/%C3%A4", "/\u00e4"),
        (b"/%e2%82%ac", "/\u20ac"),
        (b"/%F0%9F%90%8D", "/\U0001f40d"),
        (b"/%25%32%46", "/%2F"),
        (b"/%zz%1%", "/%zz%1%"),
        (b"/%ff", "/\ufffd"),
        (b"/%ed%a0%80", "/\ufffd\ufffd\ufffd"),
        (b"/%00", "/\0"),
        (b"/+", "/+"),
    ],
)
def test_paths_are_decoded_once_and_always_text(raw_path: bytes, path: str) -> None:
    assert decode_path(raw_path) == path
    path.encode()


def test_nothing_is_shared_between_two_scopes() -> None:
    """CVE-2020-35681 was a scope that two connections shared."""
    first = build_http_scope(head(), PEER, root_path="")
    second = build_http_scope(head(), PEER, root_path="")
    first["asgi"]["changed"] = first["extensions"]["changed"] = True
    first["headers"].append((b"changed", b""))
    assert second == build_http_scope(head(), PEER, root_path="")
