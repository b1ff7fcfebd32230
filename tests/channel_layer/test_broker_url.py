"""Broker URLs: what they mean, and errors that show no password."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from channel_layer.broker_url import (
    BrokerAddress,
    ClusterPlace,
    SentinelPlace,
    parse_broker_url,
    parse_broker_urls,
    redact_url,
    redact_urls,
    split_urls,
)


def test_the_shortest_url() -> None:
    address = parse_broker_url("redis://")
    assert (address.host, address.port, address.path, address.db) == ("localhost", 6379, None, 0)
    assert (address.username, address.password, address.ssl_context) == (None, None, None)
    assert (address.socket_timeout_s, address.connect_timeout_s) == (5.0, 3.0)


def test_everything_a_url_can_say() -> None:
    address = parse_broker_url(
        "redis://me:p%40ss%2F@broker.example:7000/5?socket_timeout=1.5&socket_connect_timeout=2"
    )
    assert (address.host, address.port, address.db) == ("broker.example", 7000, 5)
    assert (address.username, address.password) == ("me", "p@ss/")
    assert (address.socket_timeout_s, address.connect_timeout_s) == (1.5, 2.0)


def test_ipv6_and_the_database_as_an_option() -> None:
    address = parse_broker_url("redis://[::1]:7000?db=4")
    assert (address.host, address.port, address.db) == ("::1", 7000, 4)


def test_unix_sockets() -> None:
    address = parse_broker_url("unix://:pw@/run/with%20blank.sock?db=2")
    assert (address.path, address.password, address.db) == ("/run/with blank.sock", "pw", 2)
    assert parse_broker_url("unix:///run/x.sock").path == "/run/x.sock"


def test_options_of_other_clients_are_taken_and_change_nothing() -> None:
    plain = parse_broker_url("redis://host")
    for option in ("protocol=3", "health_check_interval=30", "max_connections=9", "decode_responses=True"):
        address = parse_broker_url(f"redis://host?{option}")
        assert (address.host, address.db, address.socket_timeout_s) == (plain.host, plain.db, plain.socket_timeout_s)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "scheme"),
        ("localhost:6379", "scheme"),
        ("http://localhost", "scheme"),
        ("redis://host:port", "malformed"),
        ("redis://host:99999", "malformed"),
        ("redis://[::1", "malformed"),
        ("redis://host/name", "'name' is not a number"),
        ("redis://host/1/2", "not a number"),
        ("redis://host/-1", "not a number"),
        ("redis://host?db=-1", "negative"),
        ("redis://host?db=x", "db"),
        ("redis://host?socket_timeout=x", "socket_timeout"),
        ("redis://host?socket_timeout=0", "more than 0"),
        ("redis://host?socket_timeout=nan", "more than 0"),
        ("redis://host?socket_connect_timeout=inf", "more than 0"),
        ("redis://host?tmieout=3", "'tmieout' is not known"),
        ("redis://host?ssl_ca_certs=/x", "needs rediss"),
        ("redis://host#1", "%23"),
        ("unix://", "path"),
        ("unix://run/x.sock", "three slashes"),
        ("rediss://host?ssl_cert_reqs=maybe", "none, optional, required"),
        ("rediss://host?ssl_ca_certs=/no/such/file", "No such file"),
        ("rediss://host?ssl_keyfile=/no/such/file", "needs ssl_certfile"),
    ],
)
def test_bad_urls(url: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        parse_broker_url(url)
    if url:
        assert url.split("?")[0] in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:s3cret@host/name",
        "redis://:s3cret@host:port",
        "redis://:s3cret#x@host",
        "redis://:s3cret/x@host",
        "redis://:x@s3cret@host:port",
        "redis://:s3cret?x@host",
        "redis://host/name?password=s3cret",
        "rediss://host/name?ssl_password=s3cret&x=y",
        "unix://me:s3cret@",
        "http://me:s3cret@host",
    ],
)
def test_no_error_shows_a_password(url: str) -> None:
    with pytest.raises(ValueError, match="broker URL") as caught:
        parse_broker_url(url)
    assert "s3cret" not in str(caught.value)
    # Nor does the traceback, by an exception that led to this one.
    assert caught.value.__cause__ is None or "s3cret" not in str(caught.value.__cause__)
    assert caught.value.__suppress_context__ or "s3cret" not in str(caught.value.__context__)


def test_an_address_shows_no_password() -> None:
    address = parse_broker_url("redis://me:s3cret@host:7000/1")
    assert str(address) == "redis://me:***@host:7000/1"
    assert "s3cret" not in repr(address)
    assert redact_url("redis://host:7000/1") == "redis://host:7000/1"


def test_sentinels() -> None:
    url = "redis+sentinel://me:p%40@h1,h2:27000,[::1]/my%20master/2?sentinel_password=x%26y&socket_timeout=2"
    (place,) = parse_broker_urls(url)
    assert isinstance(place, SentinelPlace)
    assert place.master == "my master"
    assert [sentinel.node for sentinel in place.sentinels] == [("h1", 26379), ("h2", 27000), ("::1", 26379)]
    assert {(each.username or "", each.password, each.db) for each in place.sentinels} == {("", "x&y", 0)}
    master = place.template.at("10.0.0.1", 6379)
    assert (master.node, master.username, master.password, master.db) == (("10.0.0.1", 6379), "me", "p@", 2)
    assert master.socket_timeout_s == place.sentinels[0].socket_timeout_s == 2
    assert (master.client_options["host"], master.client_options["password"]) == ("10.0.0.1", "p@")
    assert str(master) == "redis://10.0.0.1:6379/2"
    assert str(place).startswith("redis+sentinel://me:***@h1,h2:27000,[::1]/my%20master/2?sentinel_password=***")
    (without,) = parse_broker_urls("redis+sentinel://:secret@h/m")
    assert isinstance(without, SentinelPlace)
    assert (without.sentinels[0].password, without.template.password) == (None, "secret")


def test_tls_to_sentinels_unless_it_is_said_otherwise() -> None:
    for query, expected in (("", True), ("?sentinel_ssl=true", True), ("?sentinel_ssl=no&ssl_cert_reqs=none", False)):
        (place,) = parse_broker_urls(f"rediss+sentinel://h/m{query}")
        assert isinstance(place, SentinelPlace)
        assert place.template.ssl_context is not None
        assert (place.sentinels[0].ssl_context is not None) is expected
        assert str(place.template.at("::1", 1)) == "rediss://[::1]:1"


def test_clusters() -> None:
    (place,) = parse_broker_urls("rediss+cluster://:pw@h1,h2:7001")
    assert isinstance(place, ClusterPlace)
    assert [seed.node for seed in place.seeds] == [("h1", 6379), ("h2", 7001)]
    assert {seed.password for seed in place.seeds} == {"pw"}
    assert all(seed.ssl_context is not None for seed in place.seeds)


def test_several_urls_are_shards_in_their_order() -> None:
    text = "redis://a:1, redis+sentinel://b,c/m,unix:///tmp/x.sock?db=3"
    places = parse_broker_urls(text)
    assert [type(place) for place in places] == [BrokerAddress, SentinelPlace, BrokerAddress]
    assert split_urls(text) == ["redis://a:1", "redis+sentinel://b,c/m", "unix:///tmp/x.sock?db=3"]
    assert redact_urls("redis://u:s1@a,redis://:s2@b") == "redis://u:***@a,redis://:***@b"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("redis+foo://h", "scheme"),
        ("unix+cluster://h", "scheme"),
        ("redis+sentinel://h1,h2", "name of the master is missing"),
        ("redis+sentinel://h1,,h2/m", "host 2 of 3 is empty"),
        ("redis+sentinel:///m", "a host is missing"),
        ("redis+sentinel://h/m/x", "'x' is not a number"),
        ("redis+sentinel://h/m?db=-1", "negative"),
        ("redis+sentinel://h1,h2:port/m", "malformed"),
        ("redis+sentinel://u:s3/cret@h/m", "malformed"),
        ("redis+sentinel://u:s3#cret@h/m", "%23"),
        ("rediss+sentinel://h/m?sentinel_ssl=perhaps", "true, false"),
        ("redis+sentinel://h/m?tmieout=3", "'tmieout' is not known"),
        ("redis+cluster://h/1", "no databases"),
        ("redis+cluster://h?db=1", "no databases"),
        ("redis+cluster://h?sentinel_password=x", r"\+sentinel"),
        ("redis://a,redis://b,redis://a", "broker URL 3 of 3 'redis://a': is named twice"),
        ("redis://a,redis+cluster://b", "broker URL 2 of 2 .*cannot be one of several"),
        ("redis://a,http://b", "broker URL 2 of 2 'http://b': the scheme"),
        ("redis+sentinel://h/m,redis+sentinel://h,i/m", "2 of 2 .*named twice"),
        ("redis://a,redis://b:s3cret", "broker URL 2 of 2 .*malformed"),
    ],
)
def test_bad_urls_of_several_servers(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        parse_broker_urls(text)
    assert "cret@" not in str(caught.value)


def test_tls_options_mean_what_they_mean_to_redis_py(tmp_path: Path) -> None:
    context = parse_broker_url("rediss://host").ssl_context
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    context = parse_broker_url("rediss://host?ssl_cert_reqs=none").ssl_context
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_NONE, False)
    context = parse_broker_url("rediss://host?ssl_check_hostname=false").ssl_context
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, False)
    context = parse_broker_url(f"rediss://host?ssl_min_version={int(ssl.TLSVersion.TLSv1_3)}").ssl_context
    assert context is not None
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    (tmp_path / "empty.pem").write_text("")
    with pytest.raises(ValueError, match="TLS options cannot be used"):
        parse_broker_url(f"rediss://host?ssl_certfile={tmp_path}/empty.pem")
