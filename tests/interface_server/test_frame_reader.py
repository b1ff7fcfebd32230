"""Reading frames: whole, byte by byte, in pieces and with pauses, right and wrong ones."""

import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interface_server.frame_reader import TURN_FRAMES_MAX, FrameReader
from tests.interface_server.websocket_helpers import client_close, client_frame

MESSAGE_BYTES_MAX = 100_000


class Recorder:
    """Writes down what a reader calls; ``pause_after`` pauses it after so many messages."""

    def __init__(self, *, pause_after=None, message_bytes_max=MESSAGE_BYTES_MAX, window_bits=None):
        self.calls = []
        self.pause_after = pause_after
        self.reader = FrameReader(
            message=self.message,
            ping=lambda payload: self.calls.append(("ping", payload)),
            close_frame=lambda payload: self.calls.append(("close", payload)),
            fault=lambda code, reason: self.calls.append(("fault", code)),
            message_bytes_max=message_bytes_max,
            window_bits=window_bits,
        )

    def message(self, payload):
        self.calls.append(payload)
        if self.pause_after is not None and len(self.calls) % self.pause_after == 0:
            self.reader.pause()


def read(data, *, step=None, **arguments):
    recorder = Recorder(**arguments)
    for position in range(0, len(data), step or max(1, len(data))):
        recorder.reader.feed(data[position : position + (step or len(data))])
    return recorder.calls


# Each with what it is read as.
GOOD = {
    "text": (client_frame(1, "hällo".encode()), ["hällo"]),
    "empty text": (client_frame(1), [""]),
    "binary": (client_frame(2, b"\0\xff"), [b"\0\xff"]),
    "empty binary": (client_frame(2), [b""]),
    "126 bytes": (client_frame(2, b"x" * 126), [b"x" * 126]),
    "70000 bytes": (client_frame(2, b"x" * 70000), [b"x" * 70000]),
    "70000 bytes of text": (client_frame(1, "äß".encode() * 17500), ["äß" * 17500]),
    "zero mask": (client_frame(1, b"abc", mask=b"\0\0\0\0"), ["abc"]),
    "fragments": (
        client_frame(1, b"a", fin=False) + client_frame(0, b"b", fin=False) + client_frame(0, b"c"),
        ["abc"],
    ),
    "empty fragments": (client_frame(2, fin=False) + client_frame(0, fin=False) + client_frame(0), [b""]),
    "fragments inside a character": (
        client_frame(1, b"\xc3", fin=False) + client_frame(0, b"\xa4"),
        ["ä"],
    ),
    "control frames between fragments": (
        client_frame(1, b"a", fin=False) + client_frame(9, b"p") + client_frame(10, b"q") + client_frame(0, b"b"),
        [("ping", b"p"), "ab"],
    ),
    "ping": (client_frame(9, b"x" * 125), [("ping", b"x" * 125)]),
    "empty ping": (client_frame(9), [("ping", b"")]),
    "pong that nobody asked for": (client_frame(10, b"x"), []),
    "many fragments": (
        client_frame(2, b"ab", fin=False) + client_frame(0, b"cd", fin=False) * 1000 + client_frame(0, b"ef"),
        [b"ab" + b"cd" * 1000 + b"ef"],
    ),
    "text after a text in parts": (
        client_frame(1, b"\xc3", fin=False)
        + client_frame(0, b"\xa4")
        + client_frame(1, b"b")
        + client_frame(2, b"\xff"),
        ["ä", "b", b"\xff"],
    ),
    "close": (client_close(1000, b"bye") + client_frame(1, b"late"), [("close", b"\x03\xe8bye")]),
    "close without a code": (client_close(), [("close", b"")]),
    "close with half a code": (client_frame(8, b"\x03"), [("fault", 1002)]),
    "close inside a message": (client_frame(1, b"a", fin=False) + client_close(1001), [("close", b"\x03\xe9")]),
}
# Each with its close code. Nothing behind a fault is read.
BAD = {
    "not masked": (client_frame(1, b"a", mask=None), 1002),
    "control frame not masked": (client_frame(9, mask=None), 1002),
    "rsv1 without an extension": (client_frame(1, b"a", rsv=4), 1002),
    "rsv2": (client_frame(1, b"a", rsv=2), 1002),
    "rsv3 in a control frame": (client_frame(9, b"a", rsv=1), 1002),
    "reserved data opcode": (client_frame(3, b"a"), 1002),
    "reserved control opcode": (client_frame(11, b"a"), 1002),
    "continuation of nothing": (client_frame(0, b"a"), 1002),
    "message inside a message": (client_frame(1, b"a", fin=False) + client_frame(1, b"b"), 1002),
    "fragmented ping": (client_frame(9, b"a", fin=False), 1002),
    "long ping": (client_frame(9, b"x" * 126), 1002),
    "long close": (client_frame(8, b"\x03\xe8" + b"x" * 124), 1002),
    "length not minimal, 16 bits": (b"\x81\xfe\x00\x05" + bytes(4) + b"hello", 1002),
    "length not minimal, 64 bits": (b"\x81\xff" + (5).to_bytes(8, "big") + bytes(4) + b"hello", 1002),
    "length of 2**63": (b"\x82\xff" + (2**63).to_bytes(8, "big") + bytes(4), 1002),
    "not UTF-8": (client_frame(1, b"a\xff"), 1007),
    "half a character": (client_frame(1, b"a\xc3"), 1007),
    "a surrogate": (client_frame(1, b"\xed\xa0\x80"), 1007),
    "overlong": (client_frame(1, b"\xc0\xaf"), 1007),
    "beyond U+10FFFF": (client_frame(1, b"\xf4\x90\x80\x80"), 1007),
    "half a character in fragments": (client_frame(1, b"\xc3", fin=False) + client_frame(0), 1007),
    "not UTF-8 in a fragment": (client_frame(1, b"\xff", fin=False), 1007),
    "not UTF-8 in a large text": (client_frame(1, b"x" * 50000 + b"\xff" + b"x" * 40000), 1007),
    "too large": (client_frame(2, b"x" * (MESSAGE_BYTES_MAX + 1)), 1009),
    "too large by its head alone": (client_frame(2, length=2**62), 1009),
    "too large in fragments": (
        client_frame(2, b"x" * 60000, fin=False) + client_frame(0, b"x" * 60000, fin=False),
        1009,
    ),
}


@pytest.mark.parametrize("step", [None, 1, 2, 7, 4096, 5000])
@pytest.mark.parametrize("name", GOOD)
def test_frames_are_read(name, step):
    data, expected = GOOD[name]
    assert read(data, step=step) == expected


@pytest.mark.parametrize("step", [None, 1, 2, 7, 4096, 5000])
@pytest.mark.parametrize("name", BAD)
def test_faults_are_found_once_and_nothing_behind_them_is_read(name, step):
    data, code = BAD[name]
    before = client_frame(1, b"before")
    behind = client_frame(1, b"behind") + client_close(1000) + client_frame(3)
    assert read(before + data + behind, step=step) == ["before", ("fault", code)]


def compress(payload, bits=12):
    deflater = zlib.compressobj(6, zlib.DEFLATED, -bits)
    return (deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]


def compressed_frame(opcode, payload, **arguments):
    return client_frame(opcode, compress(payload), rsv=4, **arguments)


def cut(opcode, payload, at, *, rsv=4):
    """One message in two fragments."""
    return client_frame(opcode, payload[:at], rsv=rsv, fin=False) + client_frame(0, payload[at:])


NOISE = bytes((i * i * 7919 >> 5) & 0xFF for i in range(90_000))
GOOD_COMPRESSED = {
    "text": (compressed_frame(1, "hällo".encode()), ["hällo"]),
    "binary": (compressed_frame(2, b"\0\xff" * 500), [b"\0\xff" * 500]),
    "empty": (compressed_frame(1, b"") + client_frame(2, b"", rsv=4), ["", b""]),
    "not compressed": (client_frame(1, b"abc"), ["abc"]),
    "one after the other": (
        compressed_frame(1, b"a") + client_frame(1, b"b") + compressed_frame(1, b"c"),
        ["a", "b", "c"],
    ),
    "what does not get smaller": (compressed_frame(2, NOISE), [NOISE]),
    "the greatest size": (compressed_frame(2, bytes(MESSAGE_BYTES_MAX)), [bytes(MESSAGE_BYTES_MAX)]),
    "fragments": (cut(1, compress("hällo".encode() * 100), 5), ["hällo" * 100]),
    "fragments of nothing": (cut(1, compress("hällo".encode()), 0), ["hällo"]),
    "the last fragment empty": (cut(1, compress("hällo".encode()), 99), ["hällo"]),
    "a ping between fragments": (
        client_frame(1, compress(b"abc")[:2], rsv=4, fin=False)
        + client_frame(9, b"p")
        + client_frame(0, compress(b"abc")[2:]),
        [("ping", b"p"), "abc"],
    ),
    "plain fragments": (cut(1, b"abc", 1, rsv=0), ["abc"]),
}
BAD_COMPRESSED = {
    "rsv1 in a continuation": (
        client_frame(1, b"a", fin=False) + client_frame(0, b"b", rsv=4),
        1002,
    ),
    "rsv1 in a ping": (client_frame(9, b"a", rsv=4), 1002),
    "rsv2": (client_frame(1, b"a", rsv=2), 1002),
    "rsv1 and rsv2": (client_frame(1, compress(b"a"), rsv=6), 1002),
    "not masked": (client_frame(1, compress(b"a"), rsv=4, mask=None), 1002),
    "not DEFLATE": (client_frame(1, b"\xff\xff", rsv=4), 1007),
    "not DEFLATE in fragments": (cut(1, b"\xff\xff" * 9, 4), 1007),
    "cut off": (client_frame(2, compress(b"hello")[:-3], rsv=4), 1007),
    "cut off in fragments": (cut(2, compress(b"hello")[:-3], 2), 1007),
    "not UTF-8": (compressed_frame(1, b"a\xff"), 1007),
    "not UTF-8 in fragments": (cut(1, compress(b"a" * 500 + b"\xff" + b"b" * 500), 9), 1007),
    "half a character": (compressed_frame(1, b"a\xc3"), 1007),
    "half a character in fragments": (cut(1, compress(b"a\xc3"), 2), 1007),
    "too large": (compressed_frame(2, bytes(MESSAGE_BYTES_MAX + 1)), 1009),
    "too large in fragments": (cut(2, compress(bytes(MESSAGE_BYTES_MAX + 1)), 30), 1009),
    "too large by its head alone": (client_frame(2, rsv=4, length=2**62), 1009),
    "empty blocks without end": (client_frame(2, b"\0\0\0\xff\xff" * 50_000, rsv=4), 1009),
}


@pytest.mark.parametrize("step", [None, 1, 2, 7, 5000])
@pytest.mark.parametrize("name", GOOD_COMPRESSED)
def test_compressed_messages_are_read(name, step):
    data, expected = GOOD_COMPRESSED[name]
    assert read(data * 2, step=step, window_bits=12) == expected * 2


@pytest.mark.parametrize("step", [None, 1, 2, 7, 5000])
@pytest.mark.parametrize("name", BAD_COMPRESSED)
def test_faults_of_compressed_messages_are_found_once(name, step):
    data, code = BAD_COMPRESSED[name]
    behind = compressed_frame(1, b"behind") + client_close(1000)
    assert read(client_frame(1, b"a") + data + behind, step=step, window_bits=12) == ["a", ("fault", code)]


def test_a_bomb_in_fragments_costs_no_more_than_the_limit():
    bomb = compress(bytes(100_000_000))
    data = client_frame(2, bomb[:50_000], rsv=4, fin=False) + client_frame(0, bomb[50_000:])
    recorder = Recorder(window_bits=12)
    start = time.process_time()
    recorder.reader.feed(data)
    assert recorder.calls == [("fault", 1009)]
    assert time.process_time() - start < 0.05  # all of it: a quarter of a second


def test_pauses_between_compressed_messages_hold():
    recorder = Recorder(pause_after=1, window_bits=12)
    recorder.reader.feed(compressed_frame(1, b"a") + cut(1, compress(b"b"), 2) + compressed_frame(1, b"c"))
    assert recorder.calls == ["a"]
    recorder.reader.resume()
    assert recorder.calls == ["a", "b"]
    recorder.reader.resume()
    assert recorder.calls == ["a", "b", "c"]


def test_what_is_fed_from_within_a_call_comes_behind():
    """A client_connection that answers at once may bring more bytes before the reader is done."""
    calls = []

    def message(text):
        calls.append(text)
        if text == "a":
            reader.feed(client_frame(1, b"c") + client_frame(9, b"p"))

    reader = FrameReader(
        message=message, ping=calls.append, close_frame=calls.append, fault=None, message_bytes_max=1000
    )
    reader.feed(client_frame(1, b"a") + client_frame(1, b"b"))
    assert calls == ["a", "b", "c", b"p"]


@pytest.mark.parametrize("size", [0, 1, 3, 125, 126, 1023, 1024, 1025, 65_535, 65_536])
def test_the_short_way_and_autobahn_read_the_same(size):
    """Fragments are read by Autobahn, whole messages by the short way."""
    payload = bytes(index * 7 & 0x7F for index in range(size))
    for opcode in (1, 2):
        frames = client_frame(opcode, payload, mask=b"\x81\x02\xf3\x04")
        fragments = client_frame(opcode, payload, fin=False) + client_frame(0, b"")
        assert read(frames * 3) == read(fragments * 3) == [payload.decode() if opcode == 1 else payload] * 3


def test_a_message_of_the_greatest_size_is_taken():
    assert read(client_frame(2, b"x" * MESSAGE_BYTES_MAX)) == [b"x" * MESSAGE_BYTES_MAX]
    assert read(client_frame(2, b"x" * 50000, fin=False) + client_frame(0, b"x" * 50000)) == [b"x" * 100_000]


def test_an_oversized_message_is_refused_before_it_comes():
    recorder = Recorder()
    recorder.reader.feed(client_frame(2, b"x", length=MESSAGE_BYTES_MAX + 1))
    assert recorder.calls == [("fault", 1009)]
    assert "stopped=True" in repr(recorder.reader)


def test_text_that_is_not_utf8_is_a_fault_before_the_message_is_complete():
    recorder = Recorder()
    recorder.reader.feed(client_frame(1, b"x" * 90000)[:10])
    recorder.reader.feed(b"y" * 5000)
    recorder.reader.feed(b"\x00\x40\x80\xc0" * 100)
    assert recorder.calls == [("fault", 1007)]


def test_nothing_is_called_while_paused():
    recorder = Recorder(pause_after=1)
    recorder.reader.feed(client_frame(1, b"a") + client_frame(9, b"p") + client_frame(1, b"b"))
    assert recorder.calls == ["a"]
    recorder.reader.feed(client_frame(1, b"c") + client_close(1000))
    assert recorder.calls == ["a"]
    recorder.pause_after = None
    recorder.reader.resume()
    assert recorder.calls == ["a", ("ping", b"p"), "b", "c", ("close", b"\x03\xe8")]


def test_a_read_full_of_empty_messages_stops_at_the_pause():
    """64 KiB hold 10,922 empty messages; a window of events may be used up at any of them."""
    recorder = Recorder(pause_after=1)
    recorder.reader.feed(client_frame(2, mask=b"abcd") * 10_922)
    for count in range(1, 2000):
        assert len(recorder.calls) == count
        recorder.reader.resume()
    recorder.pause_after = None
    recorder.reader.resume()
    assert recorder.calls == [b""] * 10_922


@pytest.mark.parametrize("opcodes", [(9,), (10,), (2,), (9, 2), (9, 10, 1)])
def test_so_many_frames_are_read_in_a_turn(opcodes):
    """Whichever way they are read: the number of frames is what holds the loop up."""
    recorder = Recorder()
    turns = []
    reader = recorder.reader = FrameReader(
        message=recorder.message,
        ping=lambda payload: recorder.calls.append(("ping", payload)),
        close_frame=recorder.calls.append,
        fault=recorder.calls.append,
        message_bytes_max=MESSAGE_BYTES_MAX,
        turn_over=lambda: turns.append(len(recorder.calls)),
    )
    reader.feed(b"".join(client_frame(opcode) for opcode in opcodes) * (10_000 // len(opcodes)))
    while reader.is_behind:
        before = len(recorder.calls)
        reader.next_turn()
        assert len(recorder.calls) - before <= TURN_FRAMES_MAX
    assert 10_000 / TURN_FRAMES_MAX - 2 < len(turns) < 10_000 / TURN_FRAMES_MAX + 1
    assert len(recorder.calls) == (0 if opcodes == (10,) else 10_000 // len(opcodes) * len({*opcodes} - {10}))


@pytest.mark.parametrize("text", [False, True])
def test_fragments_are_frames_as_well(text):
    recorder = Recorder()
    turns = []
    reader = FrameReader(
        message=recorder.message,
        ping=recorder.calls.append,
        close_frame=recorder.calls.append,
        fault=recorder.calls.append,
        message_bytes_max=MESSAGE_BYTES_MAX,
        turn_over=lambda: turns.append(None),
    )
    reader.feed(
        client_frame(1 if text else 2, b"x", fin=False) + client_frame(0, b"x", fin=False) * 5000 + client_frame(0)
    )
    while reader.is_behind:
        assert recorder.calls == []
        reader.next_turn()
    assert recorder.calls == ["x" * 5001 if text else b"x" * 5001]
    assert len(turns) == 5002 // TURN_FRAMES_MAX


@settings(deadline=None)  # the machine may be busy
@given(st.data())
def test_the_short_ways_and_autobahn_read_the_same_of_fragments(data):
    """Byte by byte nearly everything goes to Autobahn; whole, nothing that is short."""
    frame = st.builds(
        client_frame,
        st.sampled_from([0, 0, 0, 1, 2, 8, 9, 10, 3]),
        st.sampled_from([b"", b"a", b"\xc3", b"\xa4", b"\xff", b"x" * 125, b"x" * 126, b"x" * 30_000]),
        fin=st.booleans(),
        rsv=st.sampled_from([0, 0, 0, 4, 1]),
        mask=st.sampled_from([b"abcd", b"\0\0\0\0", None, b"abcd"]),
    )
    wire = b"".join(data.draw(st.lists(frame, max_size=8)))
    window_bits = data.draw(st.sampled_from([None, 12]))
    whole = read(wire, window_bits=window_bits)
    assert read(wire, step=data.draw(st.sampled_from([1, 7, 130])), window_bits=window_bits) == whole


def test_small_frames_take_time_in_proportion_to_their_number():
    """Autobahn copies what it has not read at every frame: fed at once, this is quadratic."""

    def seconds(count):
        recorder = Recorder()
        data = client_frame(2, mask=b"abcd") * count
        start = time.process_time()
        recorder.reader.feed(data)
        elapsed = time.process_time() - start
        assert len(recorder.calls) == count
        return elapsed

    seconds(10_000)
    small, large = min(seconds(10_000) for _ in range(3)), min(seconds(100_000) for _ in range(3))
    assert large < small * 40  # quadratic: 100


def test_a_pause_within_resume_holds():
    recorder = Recorder()
    recorder.reader.pause()
    recorder.reader.feed(client_frame(1, b"a") * 3)
    assert recorder.calls == []
    recorder.pause_after = 2
    recorder.reader.resume()
    assert recorder.calls == ["a", "a"]


def test_a_stopped_reader_reads_nothing():
    recorder = Recorder()
    recorder.reader.feed(client_frame(1, b"a")[:3])
    recorder.reader.stop()
    recorder.reader.feed(client_frame(1, b"b"))
    recorder.reader.resume()
    assert recorder.calls == []


def test_readers_share_nothing():
    first, second = Recorder(), Recorder()
    first.reader.feed(client_frame(1, b"a", fin=False))
    second.reader.feed(client_frame(1, b"b"))
    first.reader.feed(client_frame(0, b"c"))
    assert (first.calls, second.calls) == (["ac"], ["b"])


MESSAGES = st.lists(st.one_of(st.text(max_size=300), st.binary(max_size=300)), max_size=8)


@settings(max_examples=200, deadline=None)
@given(messages=MESSAGES, data=st.data())
def test_any_messages_in_any_fragments_and_any_reads_come_through(messages, data):
    wire = b""
    for message in messages:
        payload = message.encode() if isinstance(message, str) else message
        cuts = sorted(data.draw(st.lists(st.integers(0, len(payload)), max_size=3)))
        parts = [payload[a:b] for a, b in zip([0, *cuts], [*cuts, len(payload)], strict=True)]
        for position, part in enumerate(parts):
            opcode = 0 if position else 1 if isinstance(message, str) else 2
            wire += client_frame(opcode, part, fin=position == len(parts) - 1)
    recorder = Recorder(pause_after=data.draw(st.one_of(st.none(), st.integers(1, 3))))
    position = 0
    while position < len(wire):
        step = data.draw(st.integers(1, 400))
        recorder.reader.feed(wire[position : position + step])
        position += step
    for _ in messages:
        recorder.reader.resume()
    assert recorder.calls == messages
