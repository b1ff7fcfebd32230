"""The spellings of a broker in channels_redis' ``hosts``, and which of them mean the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
from redis.asyncio import Connection, SSLConnection, UnixDomainSocketConnection

from channel_layer.broker_url import parse_broker_urls
from channel_layer.hosts import build_urls, is_same_broker


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("rediss://u:p@h", "rediss://u:p@h"),
        ("unix:///tmp/x.sock?db=3", "unix:///tmp/x.sock?db=3"),
        (("localhost", 6380), "redis://localhost:6380"),
        (["::1", 6379], "redis://[::1]:6379"),
        (("h", "6380"), "redis://h:6380"),
        # A URL with options beside it: the URL's own hold.
        ({"address": "redis://h:1"}, "redis://h:1"),
        ({"address": "redis://h:1", "db": 3}, "redis://h:1?db=3"),
        ({"address": "redis://h:1/2", "db": 3}, "redis://h:1/2"),
        ({"address": "redis://h:1?db=1", "db": 3, "socket_timeout": 3}, "redis://h:1?db=1&socket_timeout=3"),
        ({"address": "redis://h", "username": "u", "password": "p@"}, "redis://u:p%40@h"),
        ({"address": "redis://:mine@h", "password": "p"}, "redis://:mine@h"),
        ({"address": "redis://h", "ssl": True}, "rediss://h"),
        ({"address": "rediss://h", "ssl_cert_reqs": None}, "rediss://h?ssl_cert_reqs=none"),
        ({"address": "unix:///tmp/x?db=2", "password": "p"}, "unix://:p@/tmp/x?db=2"),
        ({"address": ("h", 1), "password": "p@ss:/"}, "redis://:p%40ss%3A%2F@h:1"),
        # redis-py's options
        ({"host": "h"}, "redis://h:6379"),
        ({}, "redis://localhost:6379"),
        ({"host": "h", "port": 7, "db": 3, "username": "u", "password": "p"}, "redis://u:p@h:7/3"),
        ({"host": "h", "db": 0, "password": None}, "redis://h:6379"),
        ({"host": "h", "ssl": True, "ssl_cert_reqs": None}, "rediss://h:6379?ssl_cert_reqs=none"),
        ({"host": "h", "connection_class": SSLConnection}, "rediss://h:6379"),
        ({"host": "h", "connection_class": Connection, "retry_on_error": [OSError]}, "redis://h:6379"),
        ({"path": "/tmp/a b", "db": 1, "connection_class": UnixDomainSocketConnection}, "unix:///tmp/a%20b?db=1"),
        ({"unix_socket_path": "/tmp/x", "password": "p"}, "unix://:p@/tmp/x"),
        # Sentinels
        ({"sentinels": [("a", 1), ("b", 2)], "master_name": "m"}, "redis+sentinel://a:1,b:2/m"),
        ({"sentinels": [["::1", 1], ("b",)], "service_name": "my m"}, "redis+sentinel://[::1]:1,b:26379/my%20m"),
        (
            {
                "sentinels": [("a", 1)],
                "master_name": "m",
                "sentinel_kwargs": {"password": "s"},
                "db": 2,
                "password": "p",
            },
            "redis+sentinel://:p@a:1/m/2?sentinel_password=s",
        ),
        (
            {"sentinels": [("a", 1)], "master_name": "m", "ssl": True, "db": 0},
            "rediss+sentinel://a:1/m?sentinel_ssl=false",
        ),
        (
            {"sentinels": [("a", 1)], "master_name": "m", "ssl": True, "sentinel_kwargs": {"ssl": True}},
            "rediss+sentinel://a:1/m",
        ),
    ],
    ids=str,
)
def test_a_host_in_every_form_that_channels_redis_takes(host: Any, url: str) -> None:
    assert build_urls([host]) == url
    assert len(parse_broker_urls(url)) == 1


def test_several_hosts_keep_their_order() -> None:
    assert build_urls([("a", 1), "redis://b", {"host": "c"}]) == "redis://a:1,redis://b,redis://c:6379"


@pytest.mark.parametrize(
    ("hosts", "error", "text"),
    [
        ("redis://h", TypeError, "hosts is a str, expected a list"),
        ({"host": "h"}, TypeError, "hosts is a dict, expected a list"),
        (7, TypeError, "hosts is a int"),
        ([7], TypeError, "hosts[0] is 7"),
        (["redis://h", ("h",)], TypeError, "hosts[1] is ('h',)"),
        ([("h", None)], TypeError, "port None"),
        ([("h", True)], TypeError, "port True"),
        ([{"address": 7}], TypeError, "hosts[0]['address'] is 7"),
        ([{"connection_class": UnixDomainSocketConnection}], TypeError, "hosts[0]['path'] is None"),
        ([{"host": "h", "connection_class": int}], ValueError, "hosts[0]['connection_class'] is <class 'int'>"),
        ([{"host": "h", "credential_provider": len}], ValueError, "give username and password"),
        ([{"sentinels": [("h", 1)]}], ValueError, "no 'master_name'"),
        ([{"master_name": "m"}], ValueError, "no 'sentinels'"),
        (
            [{"master_name": "m", "sentinels": [("h", 1)], "sentinel_kwargs": {"ssl": True}}],
            ValueError,
            "TLS to the Sentinels and none to their master",
        ),
        ([{"master_name": "m", "sentinels": ["h:1"]}], TypeError, "has 'h:1', expected a pair"),
    ],
    ids=str,
)
def test_what_is_no_host_is_refused(hosts: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        build_urls(hosts)


@pytest.mark.parametrize(
    "alike",
    [
        [
            "redis://localhost",
            "redis://localhost:6379/0",
            "redis://:secret@127.0.0.1?socket_timeout=3",
            "redis://[::1]",
        ],
        ["redis://Host:1/2", "redis://host:1?db=2", "redis://u@host:1/02"],
        ["unix:///tmp/a%20b", "unix:///tmp/a b", "unix://:p@/tmp/a%20b?db=0"],
        [
            "redis+sentinel://a,b:2/m",
            "rediss+sentinel://a,b:2/m/0",
            "redis+sentinel://b:2,a:26379/m?db=0",
            "redis+sentinel://:p@a:26379,b:2/m",
        ],
        ["redis+cluster://a,b", "redis+cluster://b:6379,a"],
    ],
)
def test_spellings_of_one_broker(alike: list[str]) -> None:
    for one in alike:
        for other in alike:
            assert is_same_broker(one, other), (one, other)


def test_different_brokers() -> None:
    different = [
        "redis://h", "redis://other", "redis://h:1", "redis://h/1", "unix:///tmp/h", "unix:///tmp/h?db=1",
        "redis+sentinel://h/m", "redis+sentinel://h/n", "redis+sentinel://h/m?db=1", "redis+sentinel://h/m/2", "redis+cluster://h",
    ]  # fmt: skip
    for one in different:
        for other in different:
            assert is_same_broker(one, other) == (one == other), (one, other)
    assert is_same_broker("redis://a,redis://b", "redis://a:6379, redis://b:6379")
    assert not is_same_broker("redis://a,redis://b", "redis://b,redis://a")
    assert not is_same_broker("redis://a", "redis://a,redis://b")
