from __future__ import annotations

import collections
import datetime
import decimal
import enum
import json
import re
import types
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel_layer import codec
from channel_layer.codec import decode_event, decode_message, encode_event, encode_message
from channel_layer.errors import InvalidMessage, MessageTooLarge, WireError
from channel_layer.messages import DEPTH_MAX, INT_MAX, INT_MIN, MESSAGE_BYTES_MAX, RESERVED_KEY

texts = st.text(max_size=20)  # without surrogates
leaves = (
    st.none()
    | st.booleans()
    | st.integers(INT_MIN, INT_MAX)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.binary(max_size=20)
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)
# hypothesis tries the words that it finds in the source, too.
messages = st.dictionaries(texts.filter(lambda key: key != RESERVED_KEY), values, max_size=4)


def same(one: Any, other: Any) -> bool:
    """Equal, also in every type: 1, 1.0 and True are three values."""
    return one == other and repr(one) == repr(other)


# Round trip


@given(messages)
def test_a_message_arrives_as_it_was(message: dict[str, Any]) -> None:
    encoded = encode_message(message)
    assert same(decode_message(encoded), message)
    assert same(decode_event(encoded), message)
    assert encode_event(message) == encoded
    # The slow way, taken for subclasses, comes to the same.
    assert same(codec._plain_copy(message, "message", DEPTH_MAX), message)


def test_encoding_is_a_snapshot() -> None:
    message: dict[str, Any] = {"list": [1, {"a": b"b"}]}
    encoded = encode_message(message)
    message["list"][1]["a"] = b"c"
    message["list"].append(2)
    message["added"] = 1
    assert decode_message(encoded) == {"list": [1, {"a": b"b"}]}


@pytest.mark.parametrize("number", [0, -1, 2**31, 2**32, INT_MAX, INT_MIN, 127, 128, -32, -33])
def test_ints_at_the_edges(number: int) -> None:
    assert same(decode_message(encode_message({"n": number})), {"n": number})


@pytest.mark.parametrize("number", [0.0, -0.0, 5e-324, 1.7976931348623157e308, -1.5])
def test_floats_at_the_edges(number: float) -> None:
    assert same(decode_message(encode_message({"n": number})), {"n": number})


def test_tuples_become_lists() -> None:
    Point = collections.namedtuple("Point", "x y")
    message = {"headers": ((b"a", b"b"), [b"c", (b"d",)]), "point": Point(1, 2), "empty": ()}
    assert decode_message(encode_message(message)) == {
        "headers": [[b"a", b"b"], [b"c", [b"d"]]],
        "point": [1, 2],
        "empty": [],
    }


def test_subclasses_become_their_base_type_with_its_value() -> None:
    class SafeString(str):  # as Django's: str() returns the object itself
        def __str__(self) -> str:
            return self

    class Colour(str, enum.Enum):  # noqa: UP042 - str() of it is "Colour.RED"
        RED = "red"

    class Level(enum.IntEnum):
        HIGH = 3

    class Loud(float):
        def __repr__(self) -> str:
            return "loud"

    class Data(bytes):
        def __bytes__(self) -> bytes:
            return b"other"

    message = {
        SafeString("key"): SafeString("<b>"),
        "colour": Colour.RED,
        Colour.RED: 1,
        "level": Level.HIGH,
        "float": Loud(1.5),
        "bytes": Data(b"data"),
        "ordered": collections.OrderedDict(a=1),
        "counted": collections.Counter("aa"),
        "default": collections.defaultdict(list, a=[1]),
    }
    assert same(
        decode_message(encode_message(message)),
        {
            "key": "<b>",
            "colour": "red",
            "red": 1,
            "level": 3,
            "float": 1.5,
            "bytes": b"data",
            "ordered": {"a": 1},
            "counted": {"a": 2},
            "default": {"a": [1]},
        },
    )


def test_a_dict_that_encodes_while_it_is_encoded_spoils_nothing() -> None:
    """msgpack's packer writes over the outer message when its pack() is entered again."""

    class Nested(dict[str, Any]):
        def items(self) -> Any:
            encode_message({"inner": [1, 2, 3]})
            encode_event({"inner": [1, 2, 3]})
            return super().items()

    message = {"before": "x" * 50, "nested": Nested(a=1), "after": "y" * 50}
    assert decode_message(encode_message(message)) == {"before": "x" * 50, "nested": {"a": 1}, "after": "y" * 50}


# What is refused, and where

NESTED_PLACES: list[tuple[str, Any]] = [
    ('message["value"]', lambda value: {"value": value}),
    ('message["headers"][2][1]', lambda value: {"headers": [[b"a", b"b"], [], [b"c", value, b"d"]]}),
    ('message["a"]["b"][0]["c"]', lambda value: {"x": 1, "a": {"b": [{"c": value}]}}),
    ('message["t"][1]', lambda value: {"t": (0, value)}),
    ('message[""]', lambda value: {"": value}),
    ('message["with \\"quotes\\""]', lambda value: {'with "quotes"': value}),
    ('message["é"]', lambda value: {"é": value}),
    ('message["\\n\\u00e9"]', lambda value: {"\né": value}),
    (f'message["{"k" * 40}…"]', lambda value: {"k" * 41: value}),
]

REFUSED: list[tuple[Any, str]] = [
    (float("nan"), "NaN is not allowed"),
    (float("inf"), "infinity is not allowed"),
    (float("-inf"), "-infinity is not allowed"),
    (2**63, "an int outside -2**63 … 2**63-1 is not allowed"),
    (-(2**63) - 1, "an int outside -2**63 … 2**63-1 is not allowed"),
    (2**64, "an int outside -2**63 … 2**63-1 is not allowed"),
    (10**5000, "an int outside -2**63 … 2**63-1 is not allowed"),
    (bytearray(b"x"), "bytearray is not allowed, use bytes"),
    (memoryview(b"x"), "memoryview is not allowed, use bytes"),
    ({1, 2}, "set is not allowed"),
    (frozenset(), "frozenset is not allowed"),
    (1j, "complex is not allowed"),
    (object(), "object is not allowed"),
    (decimal.Decimal(1), "Decimal is not allowed"),
    (datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), "datetime is not allowed"),
    (types.MappingProxyType({}), "mappingproxy is not allowed"),
    (range(3), "range is not allowed"),
    (ValueError, "type is not allowed"),
    (msgpack.Timestamp(0), "Timestamp is not allowed"),
    ("\ud800", "a lone surrogate (U+D800 at 0) is not allowed in text"),
    ("ab\udfffc", "a lone surrogate (U+DFFF at 2) is not allowed in text"),
    ({1: 2}, "the key 1 of type int is not allowed, use str"),
    ({b"k": 2}, "the key b'k' of type bytes is not allowed, use str"),
    ({None: 2}, "the key None of type NoneType is not allowed, use str"),
    ({"ok": 1, True: 2}, "the key True of type bool is not allowed, use str"),
    ({"\ud800": 2}, 'the key "\\ud800": a lone surrogate (U+D800 at 0) is not allowed in text'),
]


@pytest.mark.parametrize(("place", "build"), NESTED_PLACES, ids=[place for place, _ in NESTED_PLACES])
@pytest.mark.parametrize(("value", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_a_refused_value_is_named_with_its_place(place: str, build: Any, value: Any, text: str) -> None:
    with pytest.raises(InvalidMessage) as raised:
        encode_message(build(value))
    assert str(raised.value) == f"{place}: {text}"


def test_a_refused_value_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="NaN"):
        encode_message({"a": float("nan")})


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ([1], "message: list is not allowed, a message is a dict"),
        ("text", "message: str is not allowed, a message is a dict"),
        (None, "message: NoneType is not allowed, a message is a dict"),
        (types.MappingProxyType({"type": "x"}), "message: mappingproxy is not allowed, a message is a dict"),
        ({1: 2}, "message: the key 1 of type int is not allowed, use str"),
        ({"__asgi_channel__": "x"}, 'message["__asgi_channel__"]: this key is reserved for channel layers'),
    ],
)
def test_what_is_no_message(message: Any, text: str) -> None:
    with pytest.raises(InvalidMessage) as raised:
        encode_message(message)
    assert str(raised.value) == text


def test_the_reserved_key_is_reserved_at_the_top_only() -> None:
    message = {"inner": {"__asgi_channel__": 1}}
    assert decode_message(encode_message(message)) == message


@pytest.mark.parametrize("kind", [list, dict, tuple])
def test_depth(kind: type) -> None:
    def nest(levels: int) -> dict[str, Any]:
        """A message with so many containers inside each other, itself counted."""
        value: Any = 7
        for _ in range(levels - 1):
            value = {"k": value} if kind is dict else kind([value])
        return {"k": value}

    deepest = nest(DEPTH_MAX)
    assert json.dumps(decode_message(encode_message(deepest))) == json.dumps(deepest)
    with pytest.raises(InvalidMessage, match=f"more than {DEPTH_MAX} levels"):
        encode_message(nest(DEPTH_MAX + 1))
    with pytest.raises(WireError, match=f"more than {DEPTH_MAX} levels"):
        decode_message(msgpack.packb(nest(DEPTH_MAX + 1)))


def test_an_empty_container_counts_as_a_level_too() -> None:
    value: Any = []
    for _ in range(DEPTH_MAX - 2):
        value = [value]
    encode_message({"k": value})
    with pytest.raises(InvalidMessage, match="levels"):
        encode_message({"k": [value]})


def test_a_message_that_contains_itself() -> None:
    message: dict[str, Any] = {}
    message["self"] = [message]
    with pytest.raises(InvalidMessage, match="levels"):
        encode_message(message)


# Size


def test_size_is_measured_when_encoded() -> None:
    overhead = len(encode_message({"d": bytes(MESSAGE_BYTES_MAX - 100)})) - (MESSAGE_BYTES_MAX - 100)
    largest = {"d": bytes(MESSAGE_BYTES_MAX - overhead)}
    assert len(encode_message(largest)) == MESSAGE_BYTES_MAX
    with pytest.raises(MessageTooLarge) as raised:
        encode_message({"d": bytes(MESSAGE_BYTES_MAX - overhead + 1)})
    assert str(MESSAGE_BYTES_MAX) in str(raised.value)
    assert str(MESSAGE_BYTES_MAX + 1) in str(raised.value)


def test_one_megabyte_of_json_passes() -> None:
    for filler in ("x", "é", "\U0001d11e", '"'):
        message = {"type": "x", "text": ""}
        count = (1_000_000 - len(json.dumps(message))) // len(json.dumps(filler, ensure_ascii=False).encode()[1:-1])
        message["text"] = filler * count
        assert 999_990 < len(json.dumps(message, ensure_ascii=False).encode()) <= 1_000_000
        assert len(encode_message(message)) <= MESSAGE_BYTES_MAX


@pytest.mark.parametrize("value", [1.5, -1.5, 0.5, 1e300, 1, -1, 2**63 - 1, True, None, "", "x", [], {}, [1.5]])
def test_one_mebibyte_of_json_passes_whatever_its_arrays_hold(value: object) -> None:
    def size(array: list[object]) -> int:
        return len(json.dumps({"type": "x", "array": array}, separators=(",", ":")).encode())

    count = (2**20 - size([])) // (size([value] * 2) - size([value]))
    array = [value] * count
    assert 2**20 - 30 < size(array) <= 2**20
    assert len(encode_message({"type": "x", "array": array})) <= MESSAGE_BYTES_MAX


def test_events_have_no_limit_here() -> None:
    event = {"type": "websocket.receive", "bytes": bytes(2 * MESSAGE_BYTES_MAX)}
    assert decode_event(encode_event(event)) == event


# Decoding what others wrote


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [float("nan")]}, 'message["a"][0]: NaN is not allowed'),
        ({"a": float("-inf")}, 'message["a"]: -infinity is not allowed'),
        ({"a": 2**63}, 'message["a"]: an int outside'),
        ({"a": {b"k": 1}}, "of type bytes is not allowed"),
    ],
)
def test_values_that_asgi_does_not_allow(value: Any, text: str) -> None:
    with pytest.raises(WireError, match=re.escape(text)):
        decode_message(msgpack.packb(value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",  # a byte that msgpack never uses
        b"\x81",  # a map of one pair, without the pair
        b"\x81\xa1a",
        b"\x80\x80",  # trailing bytes
        b"\x90",
        b"\xc0",
        b"\x81\x01\x02",  # an int as a key
        b"\x81\x90\xc0",  # a list as a key
        b"\x81\xa1a\xa1\xff",  # text that is not UTF-8
        b"\x81\xa1a\xa3\xed\xa0\x80",  # a surrogate, as text
        b"\x81\xa1a\xd4\x05x",  # an extension type
        b"\x81\xa1a\xd6\xff\x00\x00\x00\x00",  # the extension type of timestamps
        b"\x81\xa1a\xc6\xff\xff\xff\xff",  # 4 GiB of bytes are announced
        b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0",
        b"\x81\xa1a" + b"\x91" * 900 + b"\xc0",
    ],
    ids=lambda data: data[:8].hex() or "nothing",
)
def test_bytes_that_are_no_message(data: bytes) -> None:
    with pytest.raises(WireError, match=f"{len(data)} bytes"):
        decode_message(data)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_or_read_but_never_crash(data: bytes) -> None:
    try:
        message = decode_message(data)
    except WireError:
        return
    message.pop("__asgi_channel__", None)
    assert same(decode_message(encode_message(message)), message)


@given(messages, st.data())
def test_cut_messages_are_refused(message: dict[str, Any], data: st.DataObject) -> None:
    encoded = encode_message(message)
    with pytest.raises(WireError):
        decode_message(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", b"\x80\x80", b"\x81\xa1a\xd4\x05x"])
def test_bytes_that_are_no_event(data: bytes) -> None:
    with pytest.raises(WireError, match="event"):
        decode_event(data)
