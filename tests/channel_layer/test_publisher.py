from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from channel_layer import mail, scripts
from channel_layer.codec import decode_message
from channel_layer.errors import (
    BrokerError,
    BrokerUnavailable,
    ChannelFull,
    InvalidMessage,
    InvalidName,
    MessageTooLarge,
)
from channel_layer.messages import MESSAGE_BYTES_MAX, split_element
from channel_layer.names import NORMAL_MEMBER_MARK, Keys
from channel_layer.publisher import Publisher
from channel_layer.publisher_brokers import PublisherBrokers
from tests.servers import BrokerServer

KEYS = Keys("trunkline")


@pytest.fixture
def broker(broker_server: BrokerServer) -> Iterator[redis.Redis]:
    with broker_server.client() as client:
        yield client


@pytest.fixture
def publisher(broker_server: BrokerServer) -> Iterator[Publisher]:
    with Publisher(broker_server.url) as publisher:
        yield publisher


def contents(broker: redis.Redis, key: str) -> list[bytes]:
    return [split_element(element)[1] for element in broker.lrange(key, 0, -1)]


def register(broker: redis.Redis, group: str, *processes: str) -> None:
    for process in processes:
        broker.eval(scripts.GROUP_REGISTER.source, 1, KEYS.group(group), process, 60_000)


def letters(broker: redis.Redis, process: str) -> list[mail.Letter]:
    return [mail.decode_letter(content) for content in contents(broker, KEYS.mail(process))]


def test_send_to_a_normal_channel(any_broker_server: BrokerServer) -> None:
    with Publisher(any_broker_server.url) as publisher, any_broker_server.client() as broker:
        for number in range(3):
            publisher.send("work", {"type": "x", "number": number})
        messages = [decode_message(content) for content in contents(broker, KEYS.normal("work"))]
        assert [message["number"] for message in messages] == [0, 1, 2]
        assert publisher.statistics().sent_count == 3


def test_the_deadline_is_the_brokers_time_and_the_expiry(broker_server: BrokerServer, broker: redis.Redis) -> None:
    with Publisher(broker_server.url, expiry=7.5) as publisher:
        before_s, _ = broker.time()
        publisher.send("work", {"type": "x"})
        after_s, _ = broker.time()
    (element,) = broker.lrange(KEYS.normal("work"), 0, -1)
    deadline_ms, _ = split_element(element)
    assert before_s * 1000 + 7500 <= deadline_ms <= after_s * 1000 + 8500
    assert 0 < broker.pttl(KEYS.normal("work")) <= 7500


def test_send_to_a_process_local_channel_is_a_letter(publisher: Publisher, broker: redis.Redis) -> None:
    publisher.send("interface.iabc!7", {"type": "websocket.send", "text": "x"})
    ((kind, (channel, payload)),) = letters(broker, "iabc")
    assert (kind, channel) == (mail.LetterKind.MESSAGE, "interface.iabc!7")
    assert decode_message(payload) == {"type": "websocket.send", "text": "x"}


def test_group_send_is_one_letter_for_each_process(publisher: Publisher, broker: redis.Redis) -> None:
    register(broker, "room", "iabc", "wdef", "cghi")
    register(broker, "other", "iother")
    publisher.group_send("room", {"type": "websocket.send", "text": "x"})
    for process in ("iabc", "wdef", "cghi"):
        ((kind, (group, payload)),) = letters(broker, process)
        assert (kind, group) == (mail.LetterKind.GROUP_SEND, "room")
        assert decode_message(payload) == {"type": "websocket.send", "text": "x"}
    assert letters(broker, "iother") == []
    assert publisher.statistics().group_stored_count == 3


def test_group_send_reaches_normal_channels_that_are_members(
    broker_server: BrokerServer, broker: redis.Redis
) -> None:
    register(broker, "room", "iabc", NORMAL_MEMBER_MARK + "work", NORMAL_MEMBER_MARK + "full")
    with Publisher(broker_server.url, channel_capacity={"full": 1}) as publisher:
        for number in range(2):
            publisher.group_send("room", {"type": "x", "number": number})
        for channel, expected in (("work", [0, 1]), ("full", [0])):
            messages = [decode_message(content) for content in contents(broker, KEYS.normal(channel))]
            assert [message["number"] for message in messages] == expected
        assert len(letters(broker, "iabc")) == 2
        statistics = publisher.statistics()
    assert (statistics.group_stored_count, statistics.group_dropped_count) == (5, 1)


def test_group_send_to_nobody(publisher: Publisher, broker: redis.Redis) -> None:
    publisher.group_send("nobody", {"type": "x"})
    assert broker.keys() == []


def test_group_send_to_more_processes_than_one_portion_holds(publisher: Publisher, broker: redis.Redis) -> None:
    processes = [f"i{number}" for number in range(20)]
    register(broker, "room", *processes)
    publisher.group_send("room", {"type": "x", "data": bytes(MESSAGE_BYTES_MAX - 100)})
    assert [broker.llen(KEYS.mail(process)) for process in processes] == [1] * 20


def test_group_send_drops_for_a_full_mail_and_raises_nothing(publisher: Publisher, broker: redis.Redis) -> None:
    register(broker, "room", "ifull", "iother")
    for _ in range(mail.MAIL_CAPACITY):
        broker.rpush(KEYS.mail("ifull"), b"\x7f" + bytes(7) + b"old")
    publisher.group_send("room", {"type": "x"})
    assert broker.llen(KEYS.mail("ifull")) == mail.MAIL_CAPACITY
    assert broker.llen(KEYS.mail("iother")) == 1
    statistics = publisher.statistics()
    assert (statistics.group_stored_count, statistics.group_dropped_count) == (1, 1)


def test_a_mail_that_refuses_does_not_cost_the_others_theirs(publisher: Publisher, broker: redis.Redis) -> None:
    register(broker, "room", "ia", "ib", "ic")
    broker.set(KEYS.mail("ib"), "not a list")
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        publisher.group_send("room", {"type": "x"})
    assert [broker.llen(KEYS.mail(process)) for process in ("ia", "ic")] == [1, 1]


def test_a_key_of_another_kind_is_named_by_the_broker(publisher: Publisher, broker: redis.Redis) -> None:
    broker.set(KEYS.normal("work"), "not a list")
    broker.set(KEYS.group("room"), "not a sorted set")
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        publisher.send("work", {"type": "x"})
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        publisher.group_send("room", {"type": "x"})


def test_a_full_channel(broker_server: BrokerServer) -> None:
    with Publisher(broker_server.url, capacity=2, channel_capacity={"single": 1}) as publisher:
        for channel, capacity in (("work", 2), ("single", 1), ("a.cx!1", 2)):
            for _ in range(capacity):
                publisher.send(channel, {"type": "x"})
            with pytest.raises(ChannelFull, match="holds"):
                publisher.send(channel, {"type": "x"})
        assert publisher.statistics().full_count == 3


def test_nothing_wrong_reaches_the_broker(publisher: Publisher, broker: redis.Redis) -> None:
    bad: Any = {"type": "x", "list": [1, float("nan")]}
    with pytest.raises(InvalidMessage, match=r'message\["list"\]\[1\]: NaN'):
        publisher.send("work", bad)
    with pytest.raises(InvalidMessage, match="NaN"):
        publisher.group_send("room", bad)
    with pytest.raises(MessageTooLarge):
        publisher.send("work", {"type": "x", "data": bytes(MESSAGE_BYTES_MAX)})
    with pytest.raises(InvalidName):
        publisher.send("a b", {"type": "x"})
    with pytest.raises(InvalidName):
        publisher.group_send("a!b", {"type": "x"})
    assert broker.keys() == []


def test_the_environment_names_broker_and_prefix(
    broker_server: BrokerServer, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUNKLINE_REDIS", broker_server.url)
    monkeypatch.setenv("TRUNKLINE_PREFIX", "blue")
    with Publisher() as publisher:
        publisher.send("work", {"type": "x"})
    with Publisher(prefix="green") as publisher:
        publisher.send("work", {"type": "x"})
    assert sorted(broker.keys()) == [Keys(prefix).normal("work").encode() for prefix in ("blue", "green")]


def test_without_a_broker_the_text_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRUNKLINE_REDIS", raising=False)
    with pytest.raises(RuntimeError, match="TRUNKLINE_REDIS"):
        Publisher()
    monkeypatch.setenv("TRUNKLINE_REDIS", "")
    with pytest.raises(RuntimeError, match="TRUNKLINE_REDIS"):
        Publisher()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"url": "http://localhost"}, ValueError, "scheme"),
        ({"prefix": "a b"}, TypeError, "prefix"),
        ({"expiry": -1}, ValueError, "expiry"),
        ({"capacity": 0}, ValueError, "capacity"),
        ({"socket_timeout_s": None}, TypeError, "socket_timeout_s"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Publisher(**{"url": "redis://localhost", **options})


def test_a_broker_that_is_not_there_is_a_connection_error_without_the_password() -> None:
    with Publisher("unix://:secret@/nowhere/broker.sock") as publisher:
        with pytest.raises(ConnectionError) as raised:
            publisher.send("work", {"type": "x"})
        assert isinstance(raised.value, BrokerUnavailable)
        assert "/nowhere/broker.sock" in str(raised.value)
        assert "secret" not in str(raised.value) + repr(publisher)


def test_a_push_without_an_answer_is_written_once() -> None:
    """redis-py's default retry made three copies of it."""
    received = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def swallow() -> None:
            # Until the publisher gives up each connection that it makes; there must be one only.
            connection, _ = listening.accept()
            with connection:
                while data := connection.recv(65536):
                    received.extend(data)
                    if b"EVALSHA" not in data:
                        connection.sendall(b"+OK\r\n" * data.count(b"CLIENT"))

        thread = threading.Thread(target=swallow)
        thread.start()
        with Publisher(f"redis://127.0.0.1:{port}?retry_on_timeout=true", socket_timeout_s=3.0) as publisher:
            with pytest.raises(BrokerUnavailable):
                publisher.send("work", {"type": "x"})
        thread.join(timeout=10)
        assert not thread.is_alive()
        listening.settimeout(0)
        with pytest.raises(BlockingIOError):
            listening.accept()
    assert received.count(b"EVALSHA") == 1


def test_a_broker_that_hangs_is_given_up(broker_server: BrokerServer) -> None:
    with Publisher(broker_server.url, socket_timeout_s=3.0) as publisher:  # enough for a broker that does answer
        publisher.send("work", {"type": "x"})
        broker_server.pause()
        try:
            with pytest.raises(BrokerUnavailable):
                publisher.send("work", {"type": "x"})
        finally:
            broker_server.resume()
        publisher.send("after", {"type": "x"})


def test_it_goes_on_after_the_broker_started_anew(broker_server: BrokerServer) -> None:
    with Publisher(broker_server.url) as publisher:
        publisher.send("work", {"type": "x"})
        broker_server.restart()
        publisher.send("work", {"type": "x"})  # the dead connection is seen before anything is written
        with broker_server.client() as broker:
            assert broker.llen(KEYS.normal("work")) == 1
            register(broker, "room", "ia")
            broker.script_flush()
            publisher.group_send("room", {"type": "x"})
            assert broker.llen(KEYS.mail("ia")) == 1


def test_threads_share_one_connection(broker_server: BrokerServer, broker: redis.Redis) -> None:
    with Publisher(broker_server.url, capacity=1000) as publisher:

        def send_some() -> None:
            for _ in range(50):
                publisher.send("work", {"type": "x"})

        threads = [threading.Thread(target=send_some) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert broker.llen(KEYS.normal("work")) == 200
        assert len([each for each in broker.client_list() if each["name"] == "trunkline:publisher"]) == 1


def test_threads_that_begin_at_once_share_one_connection(
    broker_server: BrokerServer, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_have_begun = threading.Barrier(2)
    make_client = PublisherBrokers._make_client

    def make_client_late(*arguments: Any, **options: Any) -> redis.Redis:
        both_have_begun.wait(10)
        return make_client(*arguments, **options)

    def connection_count() -> int:
        return int(broker.info("stats")["total_connections_received"])

    monkeypatch.setattr(PublisherBrokers, "_make_client", make_client_late)
    count_before = connection_count()
    with Publisher(broker_server.url) as publisher, ThreadPoolExecutor(2) as threads:
        for sending in [threads.submit(publisher.send, "work", {"type": "x"}) for _ in range(2)]:
            sending.result()
        assert broker.llen(KEYS.normal("work")) == 2
        assert connection_count() - count_before == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_a_connection_of_its_own(broker_server: BrokerServer, broker: redis.Redis) -> None:
    with Publisher(broker_server.url) as publisher:
        publisher.send("work", {"type": "parent"})
        child = os.fork()
        if child == 0:
            try:
                publisher.send("work", {"type": "child"})
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        publisher.send("work", {"type": "parent"})
    messages = [decode_message(content)["type"] for content in contents(broker, KEYS.normal("work"))]
    assert messages == ["parent", "child", "parent"]


def test_a_closed_publisher_says_so(broker_server: BrokerServer) -> None:
    publisher = Publisher(broker_server.url)
    publisher.send("work", {"type": "x"})
    publisher.close()
    publisher.close()
    assert "closed" in repr(publisher)
    with pytest.raises(RuntimeError, match="closed"):
        publisher.send("work", {"type": "x"})
    with pytest.raises(RuntimeError, match="closed"):
        publisher.group_send("room", {"type": "x"})
