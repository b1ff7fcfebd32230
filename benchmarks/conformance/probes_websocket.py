"""WebSocket: rows W, and those rules of RFC 6455 on which they rest.

The sections cited are of the ASGI specification ("WebSocket": specs/www.rst 2.5; "Core": specs/asgi.rst 3.0) unless
an RFC is named.
"""

from __future__ import annotations

import struct

from benchmarks.conformance.client import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Failed,
    NotOffered,
    frame,
)
from benchmarks.conformance.probe import MUST, SHOULD, Launcher, Server, accept, check, demand, probe

CLOSED = ("until", "websocket.disconnect")
RECEIVE = ("receive",)
ECHO = [RECEIVE, accept(), ("echo",)]
WAIT = [RECEIVE, accept(), CLOSED]


def send(**keys: object) -> tuple[str, object]:
    return ("send", {"type": "websocket.send", **keys})


def close(**keys: object) -> tuple[str, object]:
    return ("send", {"type": "websocket.close", **keys})


# Scope


@probe("W3", MUST, 'the type of the scope is "websocket" (Websocket Connection Scope)')
def the_websocket_scope(server: Server) -> None:
    found = server.websocket_scope()
    check(found["type"], "websocket", "type")
    check(found["asgi"].get("version"), "3.0", "asgi version")


@probe("W4", MUST, "http_version and scheme, where they are given, are 1.1 and ws (Websocket Connection Scope)")
def the_websocket_scheme(server: Server) -> None:
    found = server.websocket_scope()
    check(found.get("http_version", "1.1"), "1.1", "http_version")
    check(found.get("scheme", "ws"), "ws", "scheme")


@probe("W5", MUST, "path is decoded, raw_path as received, query_string encoded (Websocket Connection Scope)")
def the_websocket_path(server: Server) -> None:
    found = server.websocket_scope("/%C3%BC%20/x?a=%20")
    check(found["path"], "/ü /x", "path")
    if found.get("raw_path") is not None:
        check(found["raw_path"], b"/%C3%BC%20/x", "raw_path")
    check(found.get("query_string") or b"", b"a=%20", "query_string")
    check(found.get("root_path", ""), "", "root_path")


@probe("W5", MUST, "headers are pairs of bytes, duplicates kept (Websocket Connection Scope)")
def websocket_headers_are_kept(server: Server) -> None:
    headers = server.websocket_scope("/", "X-A: 1", "X-B: 0", "X-A: 2", "X-A: 2")["headers"]
    demand(all(type(name) is bytes and type(value) is bytes for name, value in headers), f"not bytes: {headers!r}")
    check([value for name, value in headers if name.lower() == b"x-a"], [b"1", b"2", b"2"], "values of x-a")


@probe("W5", SHOULD, "headers are in the order of the request (Websocket Connection Scope)")
def websocket_headers_keep_their_order(server: Server) -> None:
    headers = server.websocket_scope("/", "X-B: 1", "X-A: 2", "X-C: 3")["headers"]
    names = [name.lower() for name, _ in headers if name.lower().startswith(b"x-") and len(name) == 3]
    check(names, [b"x-b", b"x-a", b"x-c"], "order of the names")


@probe("W5", MUST, "client and server, where they are given, are [str, int] (Websocket Connection Scope)")
def websocket_addresses(server: Server) -> None:
    with server.websocket([("note scope",), *WAIT]) as client:
        expected = list(client.socket.getsockname())
        client.close()
    found = next(note[1] for note in server.notes() if note[0] == "scope")
    if found.get("client") is None and found.get("server") is None:
        raise NotOffered("neither of them")
    if found.get("client") is not None:
        check(list(found["client"]), expected, "client")
    if found.get("server") is not None:
        check(list(found["server"]), ["127.0.0.1", server.port], "server")


@probe("W6", MUST, "subprotocols are what the client offers, in its order (Websocket Connection Scope)")
def subprotocols(server: Server) -> None:
    found = server.websocket_scope("/", "Sec-WebSocket-Protocol: b, a", "Sec-WebSocket-Protocol: c")
    check(list(found.get("subprotocols", ())), ["b", "a", "c"], "subprotocols")


# Handshake


@probe("W7", MUST, "the handshake waits for the application's answer (WebSocket, Connect)")
def the_handshake_waits(server: Server) -> None:
    with server.websocket([RECEIVE, server.gate("go"), accept(), CLOSED], accept=False) as client:
        demand(client.is_silent(0.5), f"before the application answered there came {client.data[:60]!r}")
        server.open("go")
        check(client.head().status, 101, "status")
        client.close()
    check(server.received()[0]["type"], "websocket.connect", "the first event")


@probe("W8", MUST, "websocket.close before accept is a 403 (WebSocket, Close)")
def a_refusal_is_a_403(server: Server) -> None:
    with server.websocket([RECEIVE, close()], accept=False) as client:
        check(client.head().status, 403, "status")


@probe("W9", MUST, "the chosen subprotocol is told to the client (WebSocket, Accept)")
def the_subprotocol_is_told(server: Server) -> None:
    script = [RECEIVE, accept(subprotocol="b"), CLOSED]
    with server.websocket(script, "/", "Sec-WebSocket-Protocol: a, b") as client:
        check(client.handshake.all(b"sec-websocket-protocol"), [b"b"], "sec-websocket-protocol")
        client.close()


@probe("W9", MUST, "no subprotocol is told where none is chosen (RFC 6455, 4.2.2)")
def no_subprotocol_is_told(server: Server) -> None:
    with server.websocket([RECEIVE, accept(subprotocol=None), CLOSED], "/", "Sec-WebSocket-Protocol: a, b") as client:
        check(client.handshake.all(b"sec-websocket-protocol"), [], "sec-websocket-protocol")
        client.close()


@probe("W9", MUST, "headers of accept are sent, in their order (WebSocket, Accept; version 2.1)")
def headers_of_the_accept(server: Server) -> None:
    server.speaks("websocket", "2.1")
    pairs = [(b"x-a", b"1"), (b"x-b", b"2"), (b"x-a", b"3")]
    with server.websocket([RECEIVE, accept(headers=pairs), CLOSED]) as client:
        check([pair for pair in client.handshake.fields if pair[0] in (b"x-a", b"x-b")], pairs, "headers")
        client.close()


@probe("W9", MUST, "Sec-WebSocket-Accept is computed from the key (RFC 6455, 4.2.2)")
def the_accept_key(server: Server) -> None:
    with server.websocket(WAIT) as client:
        check(
            client.handshake.all(b"sec-websocket-accept"), [b"BACScCJPNqyz+UBoqMH89VmURoA="], "Sec-WebSocket-Accept"
        )
        client.close()


@probe("W7", MUST, "another version is refused and told which one is spoken (RFC 6455, 4.2.2)")
def another_version(server: Server) -> None:
    with server.websocket(WAIT, version="99", accept=False) as client:
        found = client.head()
        demand(400 <= found.status < 500, f"the status is {found.status}")
        told = b",".join(found.all(b"sec-websocket-version"))
        demand(b"13" in [version.strip() for version in told.split(b",")], f"sec-websocket-version is {told!r}")


@probe("W7", MUST, "a handshake without a key is refused (RFC 6455, 4.2.1)")
def no_key(server: Server) -> None:
    fields = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
    with server.http() as client:
        client.request([("respond", b"plain")], "/", *fields, key=server.key)
        demand(client.head().status != 101, "it is accepted")


# Messages


@probe("W10", MUST, "text arrives as str, binary as bytes, the other one None (WebSocket, Receive)")
def kinds_of_messages(server: Server) -> None:
    with server.websocket(ECHO) as client:
        for opcode, payload in ((TEXT, "tüxt".encode()), (BINARY, b"\xff\0")):
            client.frame(opcode, payload)
            check(client.receive(), (opcode, payload), "what came back")
        client.close()
    text, binary = server.received()[1:3]
    check((text.get("text"), text.get("bytes")), ("tüxt", None), "text and bytes")
    check((binary.get("text"), binary.get("bytes")), (None, b"\xff\0"), "text and bytes")


@probe("W2", MUST, "fragments arrive as one message, with a PING between them (WebSocket; RFC 6455, 5.4)")
def fragments(server: Server) -> None:
    with server.websocket(ECHO) as client:
        client.frame(TEXT, "ü".encode()[:1], fin=False)
        client.frame(PING, b"between")
        client.frame(0, b"", fin=False)
        client.frame(0, "ü".encode()[1:])
        check(client.receive(), (PONG, b"between"), "the answer to the PING")
        check(client.receive(), (TEXT, "ü".encode()), "what came back")
        client.close()


@probe("W1", MUST, "a PING is answered, and the application sees nothing of it (RFC 6455, 5.5.2)")
def a_ping_is_answered(server: Server) -> None:
    with server.websocket(WAIT) as client:
        client.frame(PING, b"hello")
        check(client.receive(), (PONG, b"hello"), "the answer")
        client.frame(PONG, b"by the way")
        client.close()
    check([event["type"] for event in server.received()], ["websocket.connect", "websocket.disconnect"], "events")


@probe("W1", SHOULD, "the server pings clients that say nothing, where it is told to (WebSocket)", launches=True)
def the_server_pings(launcher: Launcher) -> None:
    if launcher.pings is None:
        raise Failed("it cannot be told to")
    with launcher.start(*launcher.pings) as running, Server(running).websocket(WAIT) as client:
        check(client.any_frame()[0], PING, "opcode of the first frame")


@probe("W10", MUST, "empty messages arrive (WebSocket, Receive)")
def empty_messages_arrive(server: Server) -> None:
    with server.websocket(ECHO) as client:
        client.frame(TEXT, b"")
        client.frame(BINARY, b"")
        client.frame(TEXT, b"end")
        while client.receive() != (TEXT, b"end"):
            pass
        client.close()
    found = [
        (event.get("text"), event.get("bytes")) for event in server.received() if event["type"] == "websocket.receive"
    ]
    check(found[:2], [("", None), (None, b"")], "the messages")


@probe("W11", MUST, "empty messages are sent (WebSocket, Send)")
def empty_messages_are_sent(server: Server) -> None:
    with server.websocket([RECEIVE, accept(), send(text=""), send(bytes=b""), send(text="end"), CLOSED]) as client:
        check([client.receive() for _ in range(3)], [(TEXT, b""), (BINARY, b""), (TEXT, b"end")], "the messages")
        client.close()


@probe("W11", MUST, "both keys may be there, one of them None (WebSocket, Send)")
def one_key_may_be_none(server: Server) -> None:
    script = [RECEIVE, accept(), send(text="a", bytes=None), send(text=None, bytes=b"b"), CLOSED]
    with server.websocket(script) as client:
        check([client.receive() for _ in range(2)], [(TEXT, b"a"), (BINARY, b"b")], "the messages")
        client.close()


@probe("W11", MUST, "messages of 64 KiB and more travel both ways (RFC 6455, 5.2)")
def large_messages(server: Server) -> None:
    payload = bytes(range(256)) * 1000
    with server.websocket(ECHO) as client:
        client.frame(BINARY, payload)
        check(client.receive() == (BINARY, payload), True, "that it comes back as it was")
        client.close()


@probe("A10", SHOULD, "keys that nobody knows are no error (Core, Error Handling)")
def additional_keys_of_websocket_events(server: Server) -> None:
    script = [RECEIVE, accept(unknown=1), send(text="a", unknown=[2]), close(unknown={"a": 3})]
    with server.websocket(script) as client:
        check(client.receive(), (TEXT, b"a"), "the message")
        check(client.closed()[0], 1000, "code")


# Invalid events


def raises(server: Server, script: list[tuple[object, ...]]) -> None:
    """The attempt in it must raise. Whatever the server does to the connection afterwards is its affair."""
    with server.websocket(script, accept=False) as client:
        notes = server.notes()
        client.reset()
    demand([note for note in notes if note[0] == "raised"], f"send() took it: {notes}")


@probe("A9", SHOULD, "an unknown WebSocket event raises in send() (Core, Error Handling)")
def an_unknown_websocket_event(server: Server) -> None:
    raises(server, [RECEIVE, accept(), ("attempt", {"type": "websocket.bogus"})])


@probe("W11", SHOULD, "websocket.send with neither text nor bytes raises (Core, Error Handling)")
def a_message_with_nothing(server: Server) -> None:
    raises(server, [RECEIVE, accept(), ("attempt", {"type": "websocket.send"})])


@probe("W11", SHOULD, "websocket.send with both raises (WebSocket, Send)")
def a_message_with_both(server: Server) -> None:
    raises(server, [RECEIVE, accept(), ("attempt", {"type": "websocket.send", "text": "a", "bytes": b"a"})])


@probe("W11", SHOULD, "text that is bytes raises (Core, Error Handling)")
def text_of_the_wrong_type(server: Server) -> None:
    raises(server, [RECEIVE, accept(), ("attempt", {"type": "websocket.send", "text": b"a"})])


@probe("A9", SHOULD, "headers of str in accept raise (Core, Error Handling; version 2.1)")
def accept_headers_of_the_wrong_type(server: Server) -> None:
    server.speaks("websocket", "2.1")
    raises(server, [RECEIVE, ("attempt", {"type": "websocket.accept", "headers": [("x-a", "1")]})])


# Ends


@probe("W12", MUST, "the client's close code reaches the application (WebSocket, Disconnect)")
def the_code_of_the_client(server: Server) -> None:
    with server.websocket(WAIT) as client:
        client.close(4001)
        client.closed()
        last = server.received()[-1]
    check((last["type"], last["code"]), ("websocket.disconnect", 4001), "type and code")


@probe("W12", MUST, "so does its reason (WebSocket, Disconnect; version 2.5)")
def the_reason_of_the_client(server: Server) -> None:
    server.speaks("websocket", "2.5")
    with server.websocket(WAIT) as client:
        client.close(4001, "weil ü")
        client.closed()
        check(server.received()[-1].get("reason"), "weil ü", "reason")


@probe("W12", SHOULD, "a Close without a code is 1005 (WebSocket, Disconnect)")
def a_close_without_code(server: Server) -> None:
    with server.websocket(WAIT) as client:
        client.close(None)
        client.closed()
        check(server.received()[-1]["code"], 1005, "code")


@probe("W12", MUST, "a client that is lost is a websocket.disconnect with an int (WebSocket, Disconnect)")
def a_lost_client(server: Server) -> None:
    with server.websocket(WAIT) as client:
        client.reset()
        last = server.received(10)[-1]
    check(last["type"], "websocket.disconnect", "type")
    demand(type(last["code"]) is int, f"the code is {last['code']!r}")


@probe("W12", MUST, "the application's own close, too, is a websocket.disconnect (WebSocket, Disconnect)")
def a_disconnect_behind_the_own_close(server: Server) -> None:
    with server.websocket([RECEIVE, accept(), close(code=4002), RECEIVE]) as client:
        check(client.closed()[0], 4002, "the code the client sees")
        client.close(4002)
        last = server.received()[-1]
    check(last["type"], "websocket.disconnect", "type")
    demand(type(last["code"]) is int, f"the code is {last['code']!r}")


@probe("W14", MUST, "a close without a code is sent as 1000 (WebSocket, Close)")
def the_default_code(server: Server) -> None:
    with server.websocket([RECEIVE, accept(), close()]) as client:
        check(client.closed()[0], 1000, "code")


@probe("W14", MUST, "the reason of a close reaches the client (WebSocket, Close; version 2.3)")
def the_reason_of_the_application(server: Server) -> None:
    server.speaks("websocket", "2.3")
    with server.websocket([RECEIVE, accept(), close(code=4003, reason="wegen ü")]) as client:
        check(client.closed(), (4003, "wegen ü"), "code and reason")


@probe(
    "W15", SHOULD, "send() raises an OSError when the client is gone (WebSocket, Disconnected Client; version 2.4)"
)
def sending_to_a_lost_client(server: Server) -> None:
    server.speaks("websocket", "2.4")
    with server.websocket([RECEIVE, accept(), CLOSED, ("attempt", send(text="late")[1])]) as client:
        client.reset()
        notes = server.notes(10)
    demand(notes[-2][0] == "raised" and notes[-2][2], f"the last notes are {notes[-2:]}")


@probe("W15", SHOULD, "send() raises an OSError behind the own close (WebSocket, Disconnected Client; version 2.4)")
def sending_behind_the_own_close(server: Server) -> None:
    server.speaks("websocket", "2.4")
    with server.websocket([RECEIVE, accept(), close(), CLOSED, ("attempt", send(text="late")[1])]) as client:
        client.closed()
        client.close()
        notes = server.notes()
    demand(notes[-2][0] == "raised" and notes[-2][2], f"the last notes are {notes[-2:]}")


@probe("W3", SHOULD, "an application that returns closes the socket (Websocket Connection Scope)")
def a_websocket_application_that_returns(server: Server) -> None:
    with server.websocket([RECEIVE, accept()]) as client:
        client.ended()


@probe("A11", MUST, "an application that raises behind accept closes the socket (Core, Error Handling)")
def a_websocket_application_that_raises(server: Server) -> None:
    with server.websocket([RECEIVE, accept(), ("fail",)]) as client:
        client.ended()


@probe("A11", MUST, "an application that raises before accept ends the handshake (Core, Error Handling)")
def a_websocket_application_that_raises_early(server: Server) -> None:
    refused(server, [RECEIVE, ("fail",)])


@probe("W3", SHOULD, "an application that returns before accept ends the handshake (Websocket Connection Scope)")
def a_websocket_application_that_returns_early(server: Server) -> None:
    refused(server, [RECEIVE])


def refused(server: Server, script: list[tuple[object, ...]]) -> None:
    with server.websocket(script, accept=False) as client:
        try:
            status = client.head().status
        except Failed as failure:
            if "closed" not in str(failure):
                raise
        else:
            demand(400 <= status < 600, f"the status is {status}")


@probe("A16", SHOULD, "an application may clean up when its client has left (Core, Overview)")
def time_to_clean_up_behind_a_websocket(server: Server) -> None:
    with server.websocket([*WAIT, ("sleep", 1), ("note", "cleaned")]) as client:
        client.close()
        notes = server.notes(12)
    demand(("noted", "cleaned") in notes, f"it noted {notes}")


# Clients that break the protocol: the connection must end, and nothing of it reach the application.


def fails(server: Server, data: bytes) -> None:
    """Which code its Close has, or whether there is one, is the server's affair (RFC 6455, 7.1.7)."""
    with server.websocket(WAIT) as client:
        client.send(data)
        client.ended()
    messages = [event for event in server.received(10) if event["type"] == "websocket.receive"]
    check(messages, [], "messages of the application")


@probe("W2", MUST, "a frame that is not masked ends the connection (RFC 6455, 5.1)")
def an_unmasked_frame(server: Server) -> None:
    fails(server, b"\x81\x01x")


@probe("W2", MUST, "text that is not UTF-8 ends the connection (RFC 6455, 8.1)")
def text_that_is_no_utf_8(server: Server) -> None:
    fails(server, frame(TEXT, b"\xff"))


@probe("W2", MUST, "a reserved bit ends the connection (RFC 6455, 5.2)")
def a_reserved_bit(server: Server) -> None:
    fails(server, b"\xb1" + frame(TEXT, b"x")[1:])


@probe("W2", MUST, "an unknown opcode ends the connection (RFC 6455, 5.2)")
def an_unknown_opcode(server: Server) -> None:
    fails(server, frame(3))


@probe("W2", MUST, "a control frame in fragments ends the connection (RFC 6455, 5.5)")
def a_fragmented_control_frame(server: Server) -> None:
    fails(server, frame(PING, b"x", fin=False))


@probe("W2", MUST, "a control frame that is too long ends the connection (RFC 6455, 5.5)")
def a_long_control_frame(server: Server) -> None:
    fails(server, frame(PING, bytes(126)))


@probe("W2", MUST, "a continuation of nothing ends the connection (RFC 6455, 5.4)")
def a_continuation_of_nothing(server: Server) -> None:
    fails(server, frame(0, b"x"))


@probe("W12", MUST, "a Close is answered with a Close (RFC 6455, 5.5.1)")
def a_close_is_answered(server: Server) -> None:
    with server.websocket(WAIT) as client:
        client.close(1001)
        check(client.receive()[0], CLOSE, "opcode of the answer")
        check(client.rest(), b"", "what follows")


@probe("W12", MUST, "a Close with one byte ends the connection (RFC 6455, 5.5.1)")
def a_close_with_one_byte(server: Server) -> None:
    with server.websocket(WAIT) as client:
        client.frame(CLOSE, b"\x03")
        client.ended()


@probe("W12", MUST, "a Close with a code that must not travel is an error (RFC 6455, 7.4.1)")
def a_close_with_a_forbidden_code(server: Server) -> None:
    with server.websocket(WAIT) as client:
        client.frame(CLOSE, struct.pack(">H", 1005))
        client.frame(TEXT, b"more")
        rest = client.rest()
    demand(not rest.startswith(b"\x88\x02" + struct.pack(">H", 1005)), "the code 1005 was sent back")
    check([event["type"] for event in server.received()], ["websocket.connect", "websocket.disconnect"], "events")


# Extensions


@probe("X1", MUST, "a denial response, where it is offered, reaches the client (Extensions)")
def a_denial_response(server: Server) -> None:
    server.offers("websocket.http.response", "websocket")
    script = [
        RECEIVE,
        ("send", {"type": "websocket.http.response.start", "status": 401, "headers": [(b"x-why", b"because")]}),
        ("send", {"type": "websocket.http.response.body", "body": b"who are ", "more_body": True}),
        ("send", {"type": "websocket.http.response.body", "body": b"you?"}),
    ]
    with server.websocket(script, accept=False) as client:
        found = client.response()
    check((found.status, found.all(b"x-why"), found.body), (401, [b"because"], b"who are you?"), "the response")
