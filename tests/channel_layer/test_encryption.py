"""Keys and tokens; then process layers that encrypt, that rotate their keys, and that do not have the same."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from channel_layer.base import ChannelLayer
from channel_layer.encryption import Cipher, Refused, Undecryptable, build_refusal, keys_from_environment, read_keys
from channel_layer.frames import BlobKind, FrameKind, build_blob, build_event, build_grant
from channel_layer.home import close_homes
from channel_layer.openings import Opening, decode_opening, encode_opening
from channel_layer.process_layer import RedisProcessLayer
from channel_layer.publisher import Publisher
from channel_layer.redis_layer import RedisChannelLayer
from tests.channel_layer.contract import ChannelLayerContract, HeldMessages, MakePeer
from tests.channel_layer.processes import made_peers, started, until
from tests.channel_layer.test_redis_layer import messages_of
from tests.servers import BrokerServer

SECRET = "the words that nobody may read"
HELLO = {"type": "hello", "text": SECRET}
OPENING = Opening(
    interface="iabc", connection=1, epoch=1, reply_channel="interface.iabc!1",
    scope={"type": "http", "path": SECRET}, first_event=None,
)  # fmt: skip
BLOB = b"\x98 and so on"


# The cipher


def test_what_one_cipher_seals_another_with_the_same_keys_opens() -> None:
    cipher = Cipher(["one", b"two"])
    sealed = cipher.seal(b"content")
    assert b"content" not in sealed
    assert Cipher(["one", "two"]).open(sealed) == b"content"
    assert cipher.open_blob(cipher.seal_blob("wabc", BLOB)) == BLOB
    assert cipher.is_encrypting


def test_a_key_is_made_of_a_text_as_channels_redis_makes_it() -> None:
    fernet = Fernet(base64.urlsafe_b64encode(hashlib.sha256("sécret".encode()).digest()))
    assert fernet.decrypt(Cipher(["sécret"]).seal(b"content")) == b"content"
    assert Cipher(["sécret".encode()]).open(fernet.encrypt(b"content")) == b"content"


def test_the_first_key_encrypts_and_each_decrypts() -> None:
    old, both, new = Cipher(["old"]), Cipher(["new", "old"]), Cipher(["new"])
    assert both.open(old.seal(b"x")) == b"x"
    assert new.open(both.seal(b"x")) == b"x"
    with pytest.raises(Undecryptable, match="does not decrypt it"):
        old.open(both.seal(b"x"))
    with pytest.raises(Undecryptable, match="none of the 2 encryption keys"):
        both.open(Cipher(["another"]).seal(b"x"))


def test_a_token_that_was_changed_is_not_decrypted() -> None:
    cipher = Cipher(["key"])
    sealed = bytearray(cipher.seal(b"content"))
    sealed[-5] ^= 1
    with pytest.raises(Undecryptable):
        cipher.open(bytes(sealed))


@pytest.mark.parametrize("keys", [(), [], None])
def test_without_keys_nothing_changes(keys: Any) -> None:
    cipher = Cipher(keys)
    assert not cipher.is_encrypting
    assert cipher.seal(b"content") == cipher.open(b"content") == b"content"
    assert cipher.seal_blob("wabc", BLOB) == cipher.open_blob(BLOB) == BLOB
    assert cipher.open_blob(b"what it is links.py will say") == b"what it is links.py will say"


def test_encrypted_on_one_side_only_is_told_apart() -> None:
    plain, encrypting = Cipher(), Cipher(["key"])
    with pytest.raises(Undecryptable, match="it is encrypted, and this process has no encryption keys"):
        plain.open(encrypting.seal(b"content"))
    with pytest.raises(Undecryptable, match="it is not encrypted, and this process has encryption keys"):
        encrypting.open(plain.seal(b"content"))


def test_of_a_blob_that_cannot_be_read_the_sender_is_known() -> None:
    sealed = Cipher(["one"]).seal_blob("wabc", BLOB)
    for cipher in (Cipher(["two"]), Cipher()):
        with pytest.raises(Undecryptable) as caught:
            cipher.open_blob(sealed)
        assert caught.value.source == "wabc"
    for hostile in (BLOB, b"", b":", b"w" * 1000, b"w" * 70 + b":x", b"a b:gAAAAA", "é:gAAAAA".encode()):
        with pytest.raises(Undecryptable) as caught:
            Cipher(["one"]).open_blob(hostile)
        assert caught.value.source is None


def test_a_refusal_is_understood_with_keys_and_without() -> None:
    for cipher in (Cipher(["one"]), Cipher()):
        with pytest.raises(Refused) as caught:
            cipher.open_blob(build_refusal("wabc"))
        assert caught.value.source == "wabc"


def test_of_a_blob_that_is_not_encrypted_the_sender_is_known() -> None:
    blob = build_blob(BlobKind.DATA, source="wabc", stream=1, sequence=1)
    with pytest.raises(Undecryptable, match="is not encrypted") as caught:
        Cipher(["one"]).open_blob(blob)
    assert caught.value.source == "wabc"


def test_ciphers_are_alike_if_their_keys_are() -> None:
    assert Cipher(["a", "b"]) == Cipher([b"a", b"b"])
    assert hash(Cipher(["a"])) == hash(Cipher(["a"]))
    assert Cipher(["a", "b"]) != Cipher(["b", "a"])
    assert Cipher() != object()
    assert repr(Cipher(["secret"])) == "<Cipher 1 keys>"


@pytest.mark.parametrize(
    ("keys", "error", "text"),
    [
        ("secret", ValueError, "are a list"),
        (b"secret", ValueError, "are a list"),
        ([""], ValueError, "is empty"),
        ([7], TypeError, "is a int"),
    ],
)
def test_what_is_no_key_is_refused(keys: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Cipher(keys)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    with pytest.raises(ImportError, match="trunkline\\[encryption\\]"):
        Cipher(["key"])


# Where keys come from


def test_keys_are_given_as_they_are_or_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("new\n\n  old \n")
    assert read_keys(["first", f"@{tmp_path / 'keys'}", "last"]) == ("first", "new", "old", "last")
    assert keys_from_environment({"TRUNKLINE_ENCRYPTION_KEYS": f"one\n@{tmp_path / 'keys'}\n"}) == (
        "one",
        "new",
        "old",
    )
    assert keys_from_environment({}) == ()


def test_a_file_that_is_not_there_or_empty_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name, text in (("missing", "cannot be read"), ("empty", "has no key")):
        with pytest.raises(ValueError, match=text) as caught:
            read_keys([f"@{tmp_path / name}"])
        assert str(tmp_path / name) in str(caught.value)


# The contract of all layers


@pytest.fixture
def make_layer(broker_server: BrokerServer) -> Any:
    async def make(**options: Any) -> ChannelLayer:
        return RedisChannelLayer(hosts=[broker_server.url], symmetric_encryption_keys=["new", "old"], **options)

    yield make
    close_homes()


@pytest.fixture
async def make_peer(broker_server: BrokerServer) -> AsyncIterator[MakePeer]:
    """The other process encrypts with the older key."""
    async with made_peers(lambda: RedisProcessLayer(broker_server.url, cipher=Cipher(["old", "new"]))) as make:
        yield make


@pytest.fixture
def held_messages() -> HeldMessages:
    return messages_of


class TestContract(ChannelLayerContract):
    """C1-C22, encrypted, between processes whose keys are being replaced."""


# Layers


def everything_in(server: BrokerServer) -> bytes:
    """All keys and values that the broker holds."""
    pieces: list[bytes] = []
    with server.client() as client:
        for key in client.scan_iter():
            kind = client.type(key)
            if kind == b"list":
                values = client.lrange(key, 0, -1)
            elif kind == b"zset":
                values = client.zrange(key, 0, -1)
            else:
                values = [client.get(key)]
            pieces += [key, *values]
    return b"\n".join(pieces)


async def test_nothing_readable_waits_in_the_broker(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, "interface", cipher=Cipher(["key"])) as (sender, _):
        reader = RedisProcessLayer(broker_server.url, cipher=Cipher(["key"]))
        await reader.start()
        try:
            await sender.send("work", HELLO)
            await sender.push_opening("http.request", encode_opening(OPENING))
            await sender.send("specific.cother!x", HELLO)  # somebody's mail that is not read
            await sender.group_add("team", "work")
            await sender.group_send("team", HELLO)
            with Publisher(broker_server.url, symmetric_encryption_keys=["key"]) as publisher:
                publisher.send("work", HELLO)
                publisher.group_send("team", HELLO)
                publisher.send("specific.cother!x", HELLO)
            held = everything_in(broker_server)
            assert b"inbox:{cother}:mail" in held
            assert held.count(b"gAAAA") == 7
            assert SECRET.encode() not in held
            assert b"hello" not in held
            for _ in range(4):
                assert await reader.receive("work") == HELLO
            (opening,) = await sender.take_openings("http.request", 8)
            assert decode_opening(opening) == OPENING
        finally:
            await reader.stop()


async def test_an_encrypted_opening_is_found_and_removed(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, "interface", cipher=Cipher(["key"])) as (layer, _):
        element = await layer.push_opening("http.request", encode_opening(OPENING))
        assert await layer.find_openings("http.request", [element]) == [True]
        assert await layer.remove_opening("http.request", element)
        assert await layer.find_openings("http.request", [element]) == [False]


async def test_letters_and_local_channels_pass_between_processes(broker_server: BrokerServer) -> None:
    async with (
        started(broker_server.url, "worker", cipher=Cipher(["key"])) as (worker, _),
        started(broker_server.url, "interface", cipher=Cipher(["key"]), delivery=True) as (interface, listener),
    ):
        reply = f"interface.{interface.process_id}!1"
        await worker.group_add("team", reply)
        await worker.group_send("team", HELLO)
        await worker.send(reply, HELLO)
        with Publisher(broker_server.url, symmetric_encryption_keys=["key"]) as publisher:
            publisher.group_send("team", HELLO)
        await listener.until(lambda: len(listener.delivered) == 3)
        channel = await worker.new_channel()
        await interface.group_add("team", channel)  # asked for by mail
        await interface.group_send("team", HELLO)
        assert await worker.receive(channel) == HELLO
        assert worker.statistics().undecryptable_count == interface.statistics().undecryptable_count == 0


async def test_keys_are_rotated_in_three_rounds_without_losing_a_frame(broker_server: BrokerServer) -> None:
    """Two processes of which one is always a round behind: each reads the other."""
    rounds: list[tuple[list[str], list[str]]] = [
        (["old"], ["old", "new"]),
        (["old", "new"], ["new", "old"]),
        (["new", "old"], ["new"]),
    ]
    for behind, ahead in rounds:
        async with (
            started(broker_server.url, "worker", cipher=Cipher(behind)) as (one, heard_by_one),
            started(broker_server.url, "interface", cipher=Cipher(ahead)) as (other, heard_by_other),
        ):
            one.link_send(other.process_id, build_event(1, 1, b"there"))
            await heard_by_other.until(lambda heard=heard_by_other: len(heard.frames) == 1)  # type: ignore[misc]
            other.link_send(one.process_id, build_event(1, 1, b"and back"))
            await heard_by_one.until(lambda heard=heard_by_one: len(heard.frames) == 1)  # type: ignore[misc]
            await one.send("work", HELLO)
            assert await other.receive("work") == HELLO


async def test_blobs_on_their_way_are_encrypted(broker_server: BrokerServer) -> None:
    async with started(broker_server.url, "interface", cipher=Cipher(["key"])) as (layer, _):
        layer.link_send("wnobody", build_event(1, 1, SECRET.encode()))
        with broker_server.client() as client:
            key = layer.keys.link("wnobody")
            await until(lambda: client.llen(key) > 0)
            blob = client.lindex(key, 0)
        assert blob.startswith(layer.process_id.encode() + b":gAAAA")
        assert SECRET.encode() not in blob


async def test_a_message_of_another_key_is_dropped_counted_and_told(
    broker_server: BrokerServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("channel_layer.process_layer._UNDECRYPTABLE_LOG_INTERVAL_S", 60.0)
    async with started(broker_server.url, cipher=Cipher(["one"])) as (layer, _):
        channel = await layer.new_channel()
        waiting = asyncio.create_task(layer.receive(channel))
        for keys in (["two"], []):
            with Publisher(broker_server.url, symmetric_encryption_keys=keys) as publisher:
                publisher.send("work", HELLO)
                publisher.send(channel, HELLO)
        with Publisher(broker_server.url, symmetric_encryption_keys=["one"]) as publisher:
            publisher.send("work", {"type": "read"})
            publisher.send(channel, {"type": "read"})
        assert await layer.receive("work") == {"type": "read"}
        assert await waiting == {"type": "read"}
        assert layer.statistics().undecryptable_count == 4
        assert layer.statistics().inbox.error_count == 0  # type: ignore[union-attr]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1  # once in each interval
    text = errors[0].getMessage()
    assert "does not decrypt it. All processes need the same encryption keys" in text
    assert "one" not in text.split()


async def test_openings_that_a_worker_cannot_read_leave_room_for_those_that_it_can(
    broker_server: BrokerServer,
) -> None:
    async with (
        started(broker_server.url, "worker", cipher=Cipher(["one"])) as (worker, _),
        started(broker_server.url, "interface", cipher=Cipher(["two"])) as (stranger, _),
        started(broker_server.url, "interface", cipher=Cipher(["one"])) as (interface, _),
    ):
        taking = asyncio.create_task(worker.take_openings("http.request", 8))
        await stranger.push_opening("http.request", encode_opening(OPENING))
        await until(lambda: worker.statistics().undecryptable_count == 1)
        assert not taking.done()
        await interface.push_opening("http.request", encode_opening(OPENING))
        (opening,) = await taking
        assert decode_opening(opening) == OPENING


@pytest.mark.parametrize(
    "keys_of_worker",
    [["new", "old"], []],
    ids=["the worker reads the interface server but not the other way round", "encrypted on one side only"],
)
async def test_a_link_ends_on_both_sides_when_one_cannot_read_the_other(
    broker_server: BrokerServer, keys_of_worker: list[str]
) -> None:
    """As when the last round of a rotation comes too early: the connections end, instead of waiting for ever."""
    async with (
        started(broker_server.url, "worker", cipher=Cipher(keys_of_worker)) as (worker, heard_by_worker),
        started(broker_server.url, "interface", cipher=Cipher(["old"])) as (interface, heard_by_interface),
    ):
        # What the interface server has to say about a connection, and what the worker then answers.
        interface.link_send(worker.process_id, build_grant(1, 1))
        if keys_of_worker:
            await heard_by_worker.until(
                lambda: [frame[0] for _, frame in heard_by_worker.frames] == [FrameKind.GRANT]
            )
        worker.link_send(interface.process_id, build_event(1, 1, b"an event"))
        await heard_by_interface.until(lambda: bool(heard_by_interface.ended))
        assert heard_by_interface.ended[0][0] == worker.process_id
        assert "cannot be decrypted" in heard_by_interface.ended[0][1]
        await heard_by_worker.until(lambda: bool(heard_by_worker.ended))
        assert heard_by_worker.ended[0][0] == interface.process_id
        assert heard_by_interface.frames == []


async def test_garbage_in_the_inbox_ends_nothing(broker_server: BrokerServer) -> None:
    async with (
        started(broker_server.url, "worker", cipher=Cipher(["key"])) as (worker, heard_by_worker),
        started(broker_server.url, "interface", cipher=Cipher(["key"])) as (interface, heard_by_interface),
    ):
        interface.link_send(worker.process_id, build_grant(1, 1))
        await heard_by_worker.until(lambda: len(heard_by_worker.frames) == 1)
        with broker_server.client() as client:
            client.rpush(worker.keys.link(worker.process_id), b"\x00\xff", b"gAAAAgarbage", b"", b"i:" * 100)
        await until(lambda: worker.statistics().undecryptable_count == 4)
        interface.link_send(worker.process_id, build_grant(2, 1))
        await heard_by_worker.until(lambda: len(heard_by_worker.frames) == 2)
        assert heard_by_worker.ended == heard_by_interface.ended == []


async def test_asking_a_process_that_cannot_read_the_question_is_a_timeout(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("channel_layer.group_requests.ANSWER_WAIT_S", 0.3)
    async with (
        started(broker_server.url, "worker", cipher=Cipher(["one"])) as (owner, _),
        started(broker_server.url, "worker", cipher=Cipher(["two"])) as (asker, _),
    ):
        channel = await owner.new_channel()
        with broker_server.client() as client:  # else it looks like the channel of a dead process
            await until(lambda: bool(client.exists(owner.keys.lease(owner.process_id))))
        with pytest.raises(TimeoutError, match="did not answer"):
            await asker.group_add("team", channel)


async def test_the_publisher_takes_its_keys_from_the_environment(
    broker_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUNKLINE_ENCRYPTION_KEYS", "key\nolder")
    layer = RedisProcessLayer(broker_server.url, cipher=Cipher(["older", "key"]))
    await layer.start()
    try:
        with Publisher(broker_server.url) as publisher:
            publisher.send("work", HELLO)
        assert await layer.receive("work") == HELLO
    finally:
        await layer.stop()
