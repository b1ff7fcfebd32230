"""Offers of compression, and messages: whole, byte by byte, cut off, too large."""

import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interface_server.protocol.deflate import (
    CorruptMessage,
    Deflate,
    Inflater,
    MalformedOffer,
    MessageTooLarge,
    inflate,
    negotiate,
)
from interface_server.protocol.websocket_frames import BINARY, TEXT, build_frame

ANSWER = b"permessage-deflate; server_no_context_takeover; client_no_context_takeover; server_max_window_bits="
JSON = b'{"id": 17, "text": "the quick brown fox", "id": 18, "text": "jumps over the lazy dog"}' * 10

# What a client offers: the windows that we agree on, or None.
OFFERS = {
    b"permessage-deflate": (12, None),
    b"Permessage-Deflate": (12, None),
    b"permessage-deflate; client_max_window_bits": (12, 12),
    b"permessage-deflate; client_max_window_bits=15": (12, 12),
    b"permessage-deflate; client_max_window_bits=10": (12, 10),
    b"permessage-deflate; client_max_window_bits=8": (12, 8),
    b"permessage-deflate; server_max_window_bits=15": (12, None),
    b"permessage-deflate; server_max_window_bits=9": (9, None),
    b'permessage-deflate; server_max_window_bits="10"': (10, None),
    b'permessage-deflate; server_max_window_bits="1\\0"': (10, None),
    b"permessage-deflate ;\tserver_max_window_bits = 10 ; client_max_window_bits": (10, 12),
    b"permessage-deflate; server_no_context_takeover; client_no_context_takeover": (12, None),
    b"x-webkit-deflate-frame, permessage-deflate": (12, None),
    b"foo; bar=1; baz, , permessage-deflate": (12, None),
    # Declined, so the next one is taken.
    b"permessage-deflate; server_max_window_bits=8, permessage-deflate": (12, None),
    b"permessage-deflate; something_new, permessage-deflate; server_max_window_bits=11": (11, None),
    b"permessage-deflate; server_max_window_bits=8": None,
    b"permessage-deflate; server_max_window_bits": None,
    b"permessage-deflate; server_max_window_bits=16": None,
    b"permessage-deflate; server_max_window_bits=010": None,
    b"permessage-deflate; server_max_window_bits=ten": None,
    b"permessage-deflate; client_max_window_bits=7": None,
    b"permessage-deflate; client_max_window_bits=16": None,
    b"permessage-deflate; client_max_window_bits; client_max_window_bits": None,
    b"permessage-deflate; server_no_context_takeover=1": None,
    b"permessage-deflate; client_no_context_takeover=true": None,
    b"permessage-deflate; client_max_window_bits=10; client_max_window_bits=10": None,
    b"permessage-deflate; unknown": None,
    b"permessage-bzip2": None,
    b"": None,
}
MALFORMED = [
    b";",
    b"permessage-deflate;",
    b"permessage-deflate; ; client_max_window_bits",
    b"permessage-deflate; client_max_window_bits=",
    b"permessage-deflate; =10",
    b"permessage deflate",
    b'permessage-deflate; server_max_window_bits="1 0"',
    b'permessage-deflate; server_max_window_bits="10',
    b'x; y="a,b"',
    b"permessage-deflate; caf\xe9",
    b"permessage-deflate, \xff",
]


def compress(payload, *, bits=12, final=False):
    deflater = zlib.compressobj(6, zlib.DEFLATED, -bits, 5)
    if final:
        return deflater.compress(payload) + deflater.flush(zlib.Z_FINISH)
    return (deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]


def inflate_in_steps(data, step, *, bits=12, message_bytes_max=100_000):
    inflater = Inflater(bits, message_bytes_max)
    parts = [inflater.feed(data[at : at + step]) for at in range(0, len(data), step)]
    return b"".join(parts) + inflater.finish()


@pytest.mark.parametrize("offer", OFFERS)
def test_an_offer_is_accepted_or_declined(offer):
    deflate = negotiate([offer])
    bits = OFFERS[offer]
    if bits is None:
        assert deflate is None
        return
    assert deflate.server_window_bits == bits[0]
    assert deflate.client_window_bits == bits[1] or 15
    client = b"" if bits[1] is None else b"; client_max_window_bits=%d" % bits[1]
    assert deflate.answer == ANSWER + b"%d" % bits[0] + client


@pytest.mark.parametrize("offer", MALFORMED)
def test_a_malformed_offer_is_a_fault(offer):
    with pytest.raises(MalformedOffer):
        negotiate([offer])


def test_offers_may_be_spread_over_headers():
    assert negotiate([b"x", b"permessage-deflate; server_max_window_bits=9"]).server_window_bits == 9
    assert negotiate([]) is None


def test_connections_with_the_same_setting_share_it():
    assert negotiate([b"permessage-deflate"]) is negotiate([b"permessage-deflate; client_no_context_takeover"])


@pytest.mark.parametrize("bits", [9, 10, 11, 12])
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_a_message_is_compressed_within_its_window(bits, opcode):
    payload = JSON * 40
    frame = Deflate(bits, 15, b"").build_message(opcode, payload)
    assert frame[0] == 0xC0 | opcode
    assert len(frame) < len(payload) / 2
    compressed = frame[4:]
    assert int.from_bytes(frame[2:4], "big") == len(compressed)
    assert not compressed.endswith(b"\x00\x00\xff\xff")
    assert zlib.decompressobj(-bits).decompress(compressed + b"\x00\x00\xff\xff") == payload


def test_what_does_not_get_smaller_leaves_as_it_is():
    deflate = Deflate(12, 15, b"")
    for payload in (b"", JSON[:255], bytes(range(256))):
        assert deflate.build_message(BINARY, payload) == build_frame(BINARY, payload)
    assert deflate.build_message(BINARY, JSON[:256])[0] == 0xC2


def test_what_would_hold_the_loop_leaves_as_it_is():
    deflate = Deflate(12, 15, b"")
    assert deflate.build_message(BINARY, bytes(1024 * 1024))[0] == 0xC2
    payload = bytes(1024 * 1024 + 1)
    assert deflate.build_message(BINARY, payload) == build_frame(BINARY, payload)


# RFC 7692 section 7.2.3: the same "Hello" in all the ways it shows.
EXAMPLES = {
    "one block": (bytes.fromhex("f248cdc9c90700"), b"Hello"),
    "stored": (bytes.fromhex("000500faff48656c6c6f00"), b"Hello"),
    "final block": (bytes.fromhex("f348cdc9c9070000"), b"Hello"),
    "two blocks": (bytes.fromhex("f248050000 00ffffcac9c90700".replace(" ", "")), b"Hello"),
    "empty": (b"\x00", b""),
    "nothing at all": (b"", b""),
    "final block without what follows it": (bytes.fromhex("f348cdc9c90700"), b"Hello"),
    "a whole stream": (compress(JSON, final=True), JSON),
    "a whole stream and its empty block": (compress(JSON, final=True) + b"\x00", JSON),
    "several streams": (compress(b"Hel", final=True) * 3 + compress(b"lo"), b"HelHelHello"),
    "small window": (compress(JSON, bits=9), JSON),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_messages_are_inflated(name):
    data, expected = EXAMPLES[name]
    assert inflate(data, window_bits=12, message_bytes_max=10_000) == expected
    for step in (1, 2, 5, 4096):
        assert inflate_in_steps(data, step) == expected


def test_a_block_may_refer_to_what_stands_before_a_final_one():
    """RFC 7692 section 7.2.1 allows final blocks within a message, and forgets nothing at them."""
    text = bytes(range(200, 250)) * 3
    deflater = zlib.compressobj(6, zlib.DEFLATED, -12, 5, zdict=text)
    second = (deflater.compress(text) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]
    assert len(second) < 20  # it does refer
    data = compress(text, final=True) + second
    assert inflate(data, window_bits=12, message_bytes_max=1000) == text * 2
    for step in (1, 7):
        assert inflate_in_steps(data, step) == text * 2


@pytest.mark.parametrize("data", [b"\xff", b"\x07", b"hello", bytes.fromhex("f248cd"), compress(JSON)[:-1], JSON])
def test_what_is_not_deflate_or_only_half_of_it_is_corrupt(data):
    with pytest.raises(CorruptMessage):
        inflate(data, window_bits=12, message_bytes_max=10_000)
    with pytest.raises(CorruptMessage):
        inflate_in_steps(data, 1)


def test_a_larger_window_than_agreed_is_corrupt():
    noise = bytes((i * i * 7919 >> 5) & 0xFF for i in range(20_000))
    data = compress(noise + noise, bits=15)
    with pytest.raises(CorruptMessage):
        inflate(data, window_bits=9, message_bytes_max=100_000)


def test_the_largest_message_is_taken_and_one_byte_more_is_not():
    for size, fits in ((1000, True), (1001, False)):
        for data in (compress(bytes(size)), compress(bytes(size), final=True)):
            for read in (
                lambda data: inflate(data, window_bits=12, message_bytes_max=1000),
                lambda data: inflate_in_steps(data, 1, message_bytes_max=1000),
                lambda data: inflate_in_steps(data, 4096, message_bytes_max=1000),
            ):
                if fits:
                    assert read(data) == bytes(size)
                else:
                    with pytest.raises(MessageTooLarge):
                        read(data)


def test_a_bomb_is_not_inflated_beyond_the_limit():
    bomb = compress(bytes(200_000_000), bits=15)
    assert len(bomb) < 250_000
    for read in (
        lambda: inflate(bomb, window_bits=15, message_bytes_max=1_000_000),
        lambda: inflate_in_steps(bomb, 65536, bits=15, message_bytes_max=1_000_000),
    ):
        start = time.process_time()
        with pytest.raises(MessageTooLarge):
            read()
        assert time.process_time() - start < 0.1  # all of it: half a second


def test_nothing_comes_of_a_limit_that_is_used_up():
    inflater = Inflater(12, 5)
    assert inflater.feed(compress(b"Hello")) == b"Hello"
    assert inflater.finish() == b""
    assert "0 bytes left" in repr(inflater)


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.tuples(st.binary(max_size=600), st.booleans()), min_size=1, max_size=5),
    step=st.integers(min_value=1, max_value=700),
)
def test_any_cut_gives_the_same(parts, step):
    data = b"".join(
        compress(part, final=True) if final else compress(part) + b"\0\0\xff\xff" for part, final in parts
    )
    data += b"\x00"
    expected = b"".join(part for part, _ in parts)
    assert inflate(data, window_bits=12, message_bytes_max=5000) == expected
    assert inflate_in_steps(data, step) == expected


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(min_value=1, max_value=50))
def test_any_bytes_are_read_or_refused(data, step):
    def outcome(read):
        try:
            return read()
        except (CorruptMessage, MessageTooLarge) as error:
            return type(error)

    whole = outcome(lambda: inflate(data, window_bits=12, message_bytes_max=1000))
    steps = outcome(lambda: inflate_in_steps(data, step, message_bytes_max=1000))
    assert whole == steps or {whole, steps} == {CorruptMessage, MessageTooLarge}
