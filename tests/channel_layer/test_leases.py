"""The lease thread against a real server."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

import msgpack
import pytest

from channel_layer.errors import BrokerError, BrokerUnavailable, WireError
from channel_layer.leases import DEATH_TOLD_S, Lease, LeaseKeeper, decode_lease, encode_lease, tell_death
from channel_layer.names import Keys
from tests.servers import BrokerServer

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def patient_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for a second is no outage here."""
    monkeypatch.setattr("channel_layer.leases.RENEWAL_TIMEOUT_S", PATIENCE_S)


def until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.005)


def test_a_lease_is_renewed_and_dropped(any_broker_server: BrokerServer) -> None:
    keeper = LeaseKeeper(any_broker_server.url, "lease", b"value", period_s=0.05, ttl_s=2.5)
    assert keeper.last_renewed is None
    with any_broker_server.client() as client:
        keeper.start()
        until(lambda: client.get("lease") == b"value")
        client.pexpire("lease", 100)
        until(lambda: client.pttl("lease") > 2000)
        until(lambda: keeper.statistics().renewal_count >= 5)
        asked_at = time.monotonic()
        count = keeper.statistics().renewal_count
        until(lambda: keeper.statistics().renewal_count >= count + 2)  # the second of them began after that
        assert keeper.last_renewed is not None
        assert asked_at <= keeper.last_renewed <= time.monotonic()
        assert keeper.statistics().is_running
        keeper.stop(timeout_s=PATIENCE_S)
        assert client.exists("lease") == 0
        assert not keeper.statistics().is_running
        until(lambda: len(client.client_list()) == 1)  # its connection is closed


def test_a_lease_that_is_not_dropped_expires(broker_server: BrokerServer) -> None:
    keeper = LeaseKeeper(broker_server.url, "lease", b"value", ttl_s=PATIENCE_S)
    with broker_server.client() as client:
        keeper.start()
        until(lambda: client.exists("lease"))
        keeper.stop(drop=False, timeout_s=PATIENCE_S)
        assert not keeper.statistics().is_running
        assert 0 < client.pttl("lease") <= PATIENCE_S * 1000


def test_the_next_renewal_writes_the_new_value(broker_server: BrokerServer) -> None:
    keeper = LeaseKeeper(broker_server.url, "lease", b"one", period_s=0.05)
    with broker_server.client() as client:
        keeper.start()
        until(lambda: client.get("lease") == b"one")
        keeper.update(b"two")
        until(lambda: client.get("lease") == b"two")
        keeper.stop()


def test_the_period_is_kept(broker_server: BrokerServer) -> None:
    keeper = LeaseKeeper(broker_server.url, "lease", b"value", period_s=0.1)
    started = time.monotonic()
    keeper.start()
    until(lambda: keeper.statistics().renewal_count >= 6)
    # Never ahead of its schedule; how far behind is a matter of the machine.
    assert time.monotonic() - started >= 0.5
    keeper.stop()


def test_a_restarted_broker_gets_the_lease_back_within_a_second(
    any_broker_server: BrokerServer, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = LeaseKeeper(any_broker_server.url, "lease", b"value")
    keeper.start()
    until(lambda: keeper.statistics().renewal_count)
    any_broker_server.kill()
    until(lambda: keeper.statistics().outage_count)
    renewed = keeper.last_renewed
    time.sleep(1.2)  # several tries, one line in the log
    assert keeper.last_renewed == renewed
    any_broker_server.start()
    with any_broker_server.client() as client:
        until(lambda: client.exists("lease"), timeout_s=10.0)  # a second, and ten times as long on a slow machine
    keeper.stop(timeout_s=PATIENCE_S)
    assert keeper.statistics().outage_count == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_frozen_broker_is_an_outage_and_does_not_hold_stop(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("channel_layer.leases.RENEWAL_TIMEOUT_S", 3.0)
    errors: list[Exception] = []
    is_outage = threading.Event()

    def on_outage(error: Exception) -> None:
        errors.append(error)
        is_outage.set()

    keeper = LeaseKeeper(broker_server.url, "lease", b"value", on_outage=on_outage)
    keeper.start()
    until(lambda: keeper.statistics().renewal_count)
    broker_server.pause()
    assert is_outage.wait(PATIENCE_S)
    started = time.monotonic()
    keeper.stop()
    assert time.monotonic() - started < 10
    broker_server.resume()
    assert len(errors) == 1
    until(lambda: not keeper.statistics().is_running)


def test_a_broker_that_is_not_there_at_the_start_is_an_outage(broker_server: BrokerServer) -> None:
    broker_server.kill()
    keeper = LeaseKeeper(broker_server.url, "lease", b"value")
    keeper.start()
    until(lambda: keeper.statistics().outage_count)
    broker_server.start()
    until(lambda: keeper.statistics().renewal_count)
    keeper.stop()


def test_an_answer_that_is_not_a_brokers_is_an_outage(valkey_program: str) -> None:
    """A balancer's error page, while the broker behind it is away."""
    errors: list[Exception] = []
    with BrokerServer(valkey_program, tcp=True) as server:
        server.kill()
        with socket.create_server(("127.0.0.1", server.port or 0)) as balancer:
            balancer.settimeout(60.0)
            keeper = LeaseKeeper(server.url, "lease", b"value", period_s=0.05, on_outage=errors.append)
            keeper.start()
            client, _ = balancer.accept()
            with client:
                client.sendall(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
                until(lambda: errors or not keeper.statistics().is_running, timeout_s=60.0)
        server.start()
        until(lambda: keeper.statistics().renewal_count or not keeper.statistics().is_running, timeout_s=60.0)
        assert keeper.statistics().is_running
        keeper.stop()
    assert isinstance(errors[0], BrokerUnavailable)
    assert "is not a broker" in str(errors[0])


def test_a_refused_renewal_is_an_outage(broker_server: BrokerServer) -> None:
    errors: list[Exception] = []
    with broker_server.client() as client:
        client.config_set("maxmemory", 1)
        keeper = LeaseKeeper(broker_server.url, "lease", b"value", period_s=0.05, on_outage=errors.append)
        keeper.start()
        until(lambda: errors)
        client.config_set("maxmemory", 0)
        until(lambda: keeper.statistics().renewal_count)
        keeper.stop()
    assert str(errors[0]).startswith("OOM")
    assert keeper.statistics().outage_count == 1


def test_password_and_database(valkey_program: str) -> None:
    with BrokerServer(valkey_program, tcp=True, password="pw") as server, server.client(db=3) as client:
        keeper = LeaseKeeper(f"{server.url}/3", "lease", b"value")
        keeper.start()
        until(lambda: client.get("lease") == b"value")
        keeper.stop()
        errors: list[Exception] = []
        wrong = LeaseKeeper(f"redis://:no@127.0.0.1:{server.port}", "lease", b"value", on_outage=errors.append)
        wrong.start()
        until(lambda: errors)
        wrong.stop()
        assert "WRONGPASS" in str(errors[0])


def test_a_blocked_main_thread_costs_no_lease(broker_server: BrokerServer) -> None:
    keeper = LeaseKeeper(broker_server.url, "lease", b"value", period_s=0.05)
    keeper.start()
    until(lambda: keeper.statistics().renewal_count)
    count = keeper.statistics().renewal_count
    end = time.monotonic() + PATIENCE_S
    while keeper.statistics().renewal_count < count + 3:  # never waits, as an application's endless loop
        assert time.monotonic() < end
    keeper.stop()


def test_stop_without_start_and_a_second_start(broker_server: BrokerServer) -> None:
    keeper = LeaseKeeper(broker_server.url, "lease", b"value")
    keeper.stop()
    keeper.start()
    with pytest.raises(RuntimeError):
        keeper.start()
    keeper.stop()
    with pytest.raises(RuntimeError):
        keeper.start()


def test_a_bad_url_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="scheme"):
        LeaseKeeper("http://x", "lease", b"value")


def test_lease_values() -> None:
    lease = Lease(role="worker", version="0.1.0", load=3, room=100)
    assert decode_lease(encode_lease(lease)) == lease
    assert decode_lease(msgpack.packb(["worker", "9.9", 1, 2, "of a later release"])).version == "9.9"


@pytest.mark.parametrize(
    "value", [b"", b"\xc1", msgpack.packb({}), msgpack.packb(["worker"]), msgpack.packb(["worker", "1", True, 0])]
)
def test_malformed_lease_values(value: bytes) -> None:
    with pytest.raises(WireError):
        decode_lease(value)


def test_a_death_is_told_for_a_while_in_place_of_the_lease(any_broker_server: BrokerServer) -> None:
    keys = Keys("test")
    with any_broker_server.client() as client:
        client.set(keys.lease("w1"), b"value", px=600_000)
        client.set(keys.lease("w2"), b"value", px=600_000)
        tell_death(any_broker_server.url, keys, "w1")
        assert sorted(client.keys()) == [keys.death("w1").encode(), keys.lease("w2").encode()]
        assert 0 < client.pttl(keys.death("w1")) <= DEATH_TOLD_S * 1000
        until(lambda: len(client.client_list()) == 1)  # its connection is closed


def test_a_death_that_cannot_be_told_raises_and_leaves_the_lease(broker_server: BrokerServer) -> None:
    keys = Keys("test")
    with broker_server.client() as client:
        client.set(keys.lease("w1"), b"value", px=600_000)
        client.config_set("maxmemory", 1)
        with pytest.raises(BrokerError, match="OOM"):
            tell_death(broker_server.url, keys, "w1")
        assert client.exists(keys.lease("w1"))
    broker_server.kill()
    with pytest.raises(OSError):  # noqa: PT011 - refused, or no such file
        tell_death(broker_server.url, keys, "w1")
