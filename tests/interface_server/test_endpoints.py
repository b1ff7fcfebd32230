"""What endpoint strings mean, and what is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from interface_server.endpoints import Endpoint, parse_endpoint, render_adopted


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("tcp:8000", {"host": "0.0.0.0", "port": 8000}),
        ("TCP:port=8000:interface=127.0.0.1", {"host": "127.0.0.1", "port": 8000}),
        ("tcp:80:127.0.0.1:7", {"host": "127.0.0.1", "port": 80, "backlog": 7}),
        (r"tcp:80:interface=\:\:1", {"host": "::1", "port": 80}),
        ("tcp6:80", {"host": "::", "port": 80}),
        (r"tcp6:80:interface=\:\:1", {"host": "::1", "port": 80}),
        ("unix:/run/app.sock", {"path": "/run/app.sock"}),
        ("unix:address=/run/app.sock:mode=660:lockfile=0", {"path": "/run/app.sock", "mode": "660"}),
        ("systemd:domain=INET:index=0", {"domain": "INET", "index": 0}),
        ("systemd:UNIX:name=web", {"domain": "UNIX", "name": "web"}),
        (
            "ssl:443:privateKey=key.pem:certKey=cert.pem",
            {"host": "0.0.0.0", "port": 443, "certfile": "cert.pem", "keyfile": "key.pem"},
        ),
        (
            "ssl:443:interface=10.0.0.1:privateKey=both.pem",
            {"host": "10.0.0.1", "port": 443, "certfile": "both.pem", "keyfile": "both.pem"},
        ),
        ("ssl:443", {"host": "0.0.0.0", "port": 443, "certfile": "server.pem", "keyfile": "server.pem"}),
    ],
)
def test_what_a_string_means(text: str, fields: dict[str, Any]) -> None:
    assert parse_endpoint(text) == Endpoint(text=text, **fields)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "sockets of the kind '' cannot be shared by processes; known are tcp, tcp6, ssl, unix, systemd"),
        ("onion:80", "sockets of the kind 'onion' cannot be shared"),
        ("haproxy:tcp:80", "cannot be shared"),
        ("stdio:", "cannot be shared"),
        ("tcp", "port is missing"),
        ("tcp:", "port is missing"),
        ("tcp:http", "port is 'http', a number is expected"),
        ("tcp:70000", "port is '70000'"),
        ("tcp:-1", "port is '-1'"),
        ("tcp:80:backlog=x", "backlog is 'x'"),
        ("tcp:80:port=81", "'port' is unknown or given twice"),
        ("tcp:80:colour=blue", "'colour' is unknown"),
        ("tcp:80:a:1:2", "takes no more than"),
        ("unix:", "address is missing"),
        ("unix:/a:mode=9", "mode is three octal digits"),
        ("systemd:domain=INET", "either index or name"),
        ("systemd:domain=INET:index=0:name=a", "either index or name"),
        ("systemd:index=0", "domain is missing"),
        ("ssl:443:privateKey=k:sslmethod=TLSv1_METHOD", "--ssl-min-version chooses"),
        ("ssl:443:privateKey=k:extraCertChain=c", "belong into the file of certKey"),
        ("ssl:443:privateKey=k:dhParameters=d", "elliptic curves"),
        ("tcp:80\\", "escapes nothing"),
    ],
)
def test_what_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^endpoint ") as refused:
        parse_endpoint(text)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", ["/a/key.pem", "a:b=c\\d e"])
def test_what_is_handed_to_a_process_comes_back(path: str) -> None:
    endpoint = parse_endpoint(render_adopted(7, path, path + "k"))
    assert (endpoint.fd, endpoint.certfile, endpoint.keyfile) == (7, path, path + "k")
    assert parse_endpoint(render_adopted(7, path, None)).keyfile == path
    assert parse_endpoint(render_adopted(7, None, None)).certfile is None
