"""The opening handshake: what is an upgrade, what is wrong with one, what is answered."""

import pytest

from interface_server.protocol.deflate import negotiate
from interface_server.protocol.websocket_handshake import (
    Handshake,
    HandshakeFault,
    InvalidAccept,
    build_accept,
    build_refusal,
    is_websocket_upgrade,
    read_handshake,
)
from tests.interface_server.websocket_helpers import ACCEPT, KEY, UPGRADE_HEADERS, build_head


def parse(answer: bytes):
    head, mark, body = answer.partition(b"\r\n\r\n")
    assert mark
    first, *lines = head.split(b"\r\n")
    return first, [tuple(line.split(b": ", 1)) for line in lines], body


def changed(name, *values):
    return build_head(without=(name,), extra=[(name, value) for value in values])


# Is it one?


@pytest.mark.parametrize(
    "head",
    [
        build_head(),
        changed(b"upgrade", b"WebSocket"),
        changed(b"upgrade", b"h2c, websocket"),
        changed(b"upgrade", b"h2c", b"websocket"),
        changed(b"connection", b"keep-alive, Upgrade"),  # Firefox
        changed(b"connection", b"keep-alive", b"upgrade"),
        changed(b"connection", b" ,upgrade, "),
        # Faults are found later, by read_handshake.
        changed(b"sec-websocket-key"),
        changed(b"sec-websocket-version", b"8"),
    ],
)
def test_is_an_upgrade(head):
    assert is_websocket_upgrade(head)


@pytest.mark.parametrize(
    "head",
    [
        build_head(method="POST"),
        build_head(method="HEAD"),
        build_head(http_version="1.0"),  # RFC 9110 section 7.8
        build_head(http_version="2"),
        changed(b"upgrade"),
        changed(b"upgrade", b"h2c"),
        changed(b"upgrade", b"websockets"),
        changed(b"upgrade", b"websocket/13"),
        changed(b"connection"),
        changed(b"connection", b"keep-alive"),
        changed(b"connection", b"upgraded"),
    ],
)
def test_is_a_plain_request(head):
    assert not is_websocket_upgrade(head)


# What is wrong with it?


def test_a_good_one():
    handshake = read_handshake(build_head())
    assert handshake == Handshake(accept=ACCEPT, subprotocols=[], deflate=None)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([b"chat"], ["chat"]),
        ([b"chat, superchat"], ["chat", "superchat"]),
        ([b"a ,\tb", b"c"], ["a", "b", "c"]),
        ([b"b,a,b"], ["b", "a"]),
        ([b",, a,"], ["a"]),
        ([b""], []),
        ([b"graphql-transport-ws,v1.json!"], ["graphql-transport-ws", "v1.json!"]),
    ],
)
def test_subprotocols_are_read_in_order_and_once(lines, expected):
    assert read_handshake(changed(b"sec-websocket-protocol", *lines)).subprotocols == expected


def test_compression_is_agreed_on_where_it_is_on():
    head = changed(b"sec-websocket-extensions", b"x", b"permessage-deflate; client_max_window_bits")
    assert read_handshake(head).deflate is None
    assert read_handshake(head, may_deflate=True).deflate == negotiate(
        [b"permessage-deflate; client_max_window_bits"]
    )
    assert read_handshake(build_head(), may_deflate=True).deflate is None


def test_malformed_extensions_are_a_fault_only_for_who_reads_them():
    head = changed(b"sec-websocket-extensions", b"permessage-deflate; client_max_window_bits=")
    assert read_handshake(head).deflate is None
    with pytest.raises(HandshakeFault, match="Sec-WebSocket-Extensions") as caught:
        read_handshake(head, may_deflate=True)
    assert caught.value.status == 400


@pytest.mark.parametrize("values", [[], [b"8"], [b"12"], [b"013"], [b"13, 8"], [b"13", b"13"], [b""], [b"\xb2"]])
def test_another_version_is_told_which_one_we_speak(values):
    with pytest.raises(HandshakeFault, match="Sec-WebSocket-Version") as caught:
        read_handshake(changed(b"sec-websocket-version", *values))
    assert caught.value.status == 426
    assert dict(caught.value.headers) == {b"upgrade": b"websocket", b"sec-websocket-version": b"13"}


@pytest.mark.parametrize(
    "values",
    [
        [],
        [b""],
        [KEY, KEY],
        [KEY[:-1]],
        [KEY + b"="],
        [KEY[:-4]],  # 15 bytes and less
        [b"dGhlIHNhbXBsZSBub25jZTE2"],  # 18 bytes without padding
        [b"dGhlIHNhbXBsZSBub25jZ!=="],
        [b" " + KEY[1:]],
        [b"dGhlIHNhbXBsZSBub25jZQ\xff="],
    ],
)
def test_a_wrong_key_is_refused(values):
    with pytest.raises(HandshakeFault, match="Sec-WebSocket-Key") as caught:
        read_handshake(changed(b"sec-websocket-key", *values))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "header", [(b"content-length", b"5"), (b"transfer-encoding", b"chunked"), (b"content-length", b"00")]
)
def test_a_body_would_be_read_as_frames_so_it_is_refused(header):
    with pytest.raises(HandshakeFault, match="body") as caught:
        read_handshake(build_head(extra=[header]))
    assert caught.value.status == 400


def test_an_empty_body_may_be_announced():
    assert read_handshake(build_head(extra=[(b"content-length", b"0")])).accept == ACCEPT


@pytest.mark.parametrize("value", [b"a b", b"a;b", b"\xe4", b'"a"', b"a\x85b"])
def test_a_subprotocol_that_is_no_token_is_refused(value):
    with pytest.raises(HandshakeFault, match="Sec-WebSocket-Protocol") as caught:
        read_handshake(changed(b"sec-websocket-protocol", value))
    assert caught.value.status == 400


def test_what_a_client_sent_is_escaped_and_cut_in_the_text():
    with pytest.raises(HandshakeFault) as caught:
        read_handshake(changed(b"sec-websocket-version", b"\x1b[31m\xe4" + b"x" * 500))
    assert len(str(caught.value)) < 200
    assert str(caught.value).isascii()
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("byte", [0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x85])
def test_a_header_value_is_never_split_into_lines(byte):
    """CVE-2026-44546: Autobahn's parser took these bytes for ends of lines and found a header behind them."""
    value = b"x" + bytes((byte,)) + b"sec-websocket-protocol: smuggled"
    handshake = read_handshake(build_head(extra=[(b"x-harmless", value)]))
    assert handshake.subprotocols == []


# What is answered?


def accept(handshake=None, **arguments):
    handshake = handshake or read_handshake(changed(b"sec-websocket-protocol", b"chat, superchat"))
    return parse(build_accept(handshake, **{"subprotocol": None, **arguments}))


def test_accept():
    first, headers, body = accept()
    assert first == b"HTTP/1.1 101 Switching Protocols"
    assert headers == [(b"upgrade", b"websocket"), (b"connection", b"Upgrade"), (b"sec-websocket-accept", ACCEPT)]
    assert body == b""


def test_accept_with_everything():
    deflate = negotiate([b"permessage-deflate"])
    _, headers, _ = accept(
        Handshake(accept=ACCEPT, subprotocols=["chat", "superchat"], deflate=deflate),
        subprotocol="superchat",
        headers=[[b"X-B", b"1"], (b"x-a", b""), (b"x-b", b"2"), (b"server", b"mine")],
        server_headers=[(b"date", b"now"), (b"server", b"ours")],
    )
    assert headers[3:] == [
        (b"sec-websocket-protocol", b"superchat"),
        (b"sec-websocket-extensions", deflate.answer),
        (b"X-B", b"1"),
        (b"x-a", b""),
        (b"x-b", b"2"),
        (b"server", b"mine"),
        (b"date", b"now"),
    ]


@pytest.mark.parametrize("subprotocol", ["other", "", "Chat", 1, b"chat", ["chat"]])
def test_only_an_offered_subprotocol_can_be_chosen(subprotocol):
    with pytest.raises(InvalidAccept, match="subprotocol"):
        accept(subprotocol=subprotocol)


@pytest.mark.parametrize(
    "header",
    [
        (b"sec-websocket-protocol", b"chat"),
        (b"Sec-WebSocket-Accept", b"x"),
        (b"sec-websocket-extensions", b"x"),
        (b"connection", b"close"),
        (b"upgrade", b"h2c"),
        (b"content-length", b"0"),
        (b"transfer-encoding", b"chunked"),
        (b"x", b"a\r\nset-cookie: b"),
        (b"x", b"a\nb"),
        (b"x", b"a\0b"),
        (b"x\r\ny", b"a"),
        (b"x y", b"a"),
        (b"x:", b"a"),
        (b"", b"a"),
        ("x", "a"),
        (b"x", "a"),
        (b"x", 1),
        (b"x",),
        (b"x", b"a", b"b"),
        None,
        1,
    ],
)
def test_headers_that_may_not_be_sent(header):
    with pytest.raises(InvalidAccept, match="header"):
        accept(headers=[(b"x-good", b"1"), header])


@pytest.mark.parametrize("status", [400, 403, 426, 500, 502, 503, 504])
def test_refusals_are_complete_responses(status):
    first, headers, body = parse(build_refusal(status, server_headers=[(b"server", b"ours")]))
    fields = dict(headers)
    assert len(fields) == len(headers)
    assert first.startswith(b"HTTP/1.1 %d " % status)
    assert int(fields[b"content-length"]) == len(body) > 0
    assert b"close" in fields[b"connection"]
    assert fields[b"server"] == b"ours"
    assert (b"retry-after" in fields) == (status == 503)


def test_a_refusal_says_what_was_wrong():
    assert parse(build_refusal(400, text="nö"))[2] == "nö".encode()
    assert parse(build_refusal(403))[2] == b"Forbidden"
    assert parse(build_refusal(599))[0] == b"HTTP/1.1 599 "


def test_a_426_names_upgrade_in_connection():
    with pytest.raises(HandshakeFault) as caught:
        read_handshake(build_head(UPGRADE_HEADERS, without=(b"sec-websocket-version",)))
    fields = dict(parse(build_refusal(426, headers=caught.value.headers))[1])
    assert fields[b"connection"] == b"close, upgrade"
    assert fields[b"upgrade"] == b"websocket"
    assert fields[b"sec-websocket-version"] == b"13"
