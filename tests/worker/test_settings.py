"""Which settings a worker refuses."""

from __future__ import annotations

from typing import Any

import pytest

from worker.settings import WorkerSettings


def make(**values: Any) -> WorkerSettings:
    return WorkerSettings(redis_url="redis://localhost", application="app:app", **values)


def test_the_defaults_are_accepted() -> None:
    settings = make()
    assert (settings.concurrency, settings.websockets_max) == (100, 20_000)
    assert settings.channels == ("http.request", "websocket.connect")


@pytest.mark.parametrize(
    "values",
    [
        {"concurrency": 0},
        {"websockets_max": 0},
        {"close_timeout_s": -1},
        {"close_timeout_s": float("nan")},
        {"drain_timeout_s": -0.1},
        {"lifespan_shutdown_timeout_s": -1},
        {"channels": ()},
        {"channels": ("thumbnails", "thumbnails")},
        {"channels": ("no spaces",)},
        {"channels": ("specific.w1!x",)},
        {"protocols": ("http",)},
        {"protocols": ("TCP",)},
        {"protocols": ("tcp", "tcp")},
        {"interface": "cgi"},
        {"threads": 0},
        {"lifespan": "maybe"},
    ],
)
def test_what_cannot_work_is_refused_with_name_and_value(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=name.removesuffix("s")):
        make(**values)


def test_background_channels_are_accepted_but_not_with_wsgi() -> None:
    assert make(channels=("thumbnails", "http.request")).channels == ("thumbnails", "http.request")
    assert make(channels=("http.request",), interface="wsgi").channels == ("http.request",)
    with pytest.raises(ValueError, match="'thumbnails' is background work"):
        make(channels=("thumbnails",), interface="wsgi")


def test_wsgi_takes_no_more_requests_than_it_has_threads() -> None:
    assert make(interface="wsgi").http_max == 16
    assert make(interface="wsgi", concurrency=4).http_max == 4
    assert make(threads=4).http_max == 100


def test_own_protocols_are_accepted_but_not_with_wsgi_nor_twice() -> None:
    assert make(protocols=("tcp", "irc2")).protocols == ("tcp", "irc2")
    with pytest.raises(ValueError, match="'tcp' is nothing a WSGI application can speak"):
        make(protocols=("tcp",), interface="wsgi")
    with pytest.raises(ValueError, match="'tcp' is taken twice"):
        make(protocols=("tcp",), channels=("tcp.connect",))


def test_no_secret_is_shown() -> None:
    settings = WorkerSettings(
        redis_url="redis://:hidden@localhost", application="app:app", encryption_keys=("hidden",)
    )
    assert "hidden" not in repr(settings)
