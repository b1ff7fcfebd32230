"""HTTP: rows A and H, and those rules of RFC 9110 and 9112 on which they rest.

The sections cited are of the ASGI specification ("Core": specs/asgi.rst 3.0; "HTTP": specs/www.rst 2.5) unless an RFC
is named.
"""

from __future__ import annotations

from benchmarks.conformance.client import Failed, NotOffered
from benchmarks.conformance.probe import (
    MUST,
    SHOULD,
    Launcher,
    Server,
    body,
    check,
    demand,
    probe,
    start,
)

OK = [start(), body(b"ok")]


# Scope


@probe("A1", MUST, "the scope is a dict and its type a str (Core, Applications)")
def the_scope_is_a_dict(server: Server) -> None:
    found = server.scope()
    check(found["type"], "http", "type")


@probe("A2", MUST, 'the scope has asgi, a dict with a version of "3.0" (Core, Applications)')
def the_asgi_version_is_told(server: Server) -> None:
    found = server.scope()
    demand(isinstance(found.get("asgi"), dict), f"asgi is {found.get('asgi')!r}")
    check(found["asgi"].get("version"), "3.0", "version")
    demand(isinstance(found["asgi"].get("spec_version", "2.0"), str), "spec_version is no str")


@probe("A3", MUST, "events are dicts with a type of the protocol (Core, Events)")
def events_are_dicts(server: Server) -> None:
    with server.asked([("receive",), *OK]) as client:
        client.response()
    check(server.received()[0]["type"], "http.request", "type of the first event")


@probe("A14", MUST, "extensions, where there are any, are dicts by name (Core, Extensions)")
def extensions_are_dicts(server: Server) -> None:
    for extensions in (
        server.scope().get("extensions") or {},
        Server(server.running).websocket_scope().get("extensions"),
    ):
        for name, value in (extensions or {}).items():
            demand(isinstance(name, str) and isinstance(value, dict), f"{name!r}: {value!r}")


@probe("T1", MUST, "no tls extension without TLS (TLS, When to use this extension)")
def no_tls_extension_without_tls(server: Server) -> None:
    demand("tls" not in (server.scope().get("extensions") or {}), "there is one")


@probe("H1", MUST, "each request on a connection has a call and a scope of its own (HTTP Connection Scope)")
def each_request_has_its_own_scope(server: Server) -> None:
    script = [("note scope",), ("mutate scope",), ("respond", b"")]
    with server.http() as client:
        for number in range(2):
            check(client.get(script, f"/{number}", key=server.key).status, 200, "status")
    notes = server.notes()
    scopes = [note[1] for note in notes if note[0] == "scope"]
    check([found["path"] for found in scopes], ["/0", "/1"], "paths of the two scopes")
    demand("mutated" not in repr(scopes[1]), "what the first call left in its scope is in that of the second")


@probe("H2", MUST, "http_version of HTTP/1.1 (HTTP Connection Scope)")
def http_version_1_1(server: Server) -> None:
    check(server.scope()["http_version"], "1.1", "http_version")


@probe("H2", MUST, "http_version of HTTP/1.0 (HTTP Connection Scope)")
def http_version_1_0(server: Server) -> None:
    check(server.scope(version="1.0")["http_version"], "1.0", "http_version")


@probe("H3", MUST, "method is a str in upper case, whichever it is (HTTP Connection Scope)")
def the_method(server: Server) -> None:
    for method in ("DELETE", "PROPFIND"):
        check(Server(server.running).scope(method=method)["method"], method, "method")


@probe("H4", MUST, "scheme, where it is given, is http (HTTP Connection Scope)")
def the_scheme(server: Server) -> None:
    check(server.scope().get("scheme", "http"), "http", "scheme")


@probe("H5", MUST, "path is a str, decoded and without the query (HTTP Connection Scope)")
def the_path_is_decoded(server: Server) -> None:
    check(server.scope("/a%20b/%C3%BC%2Fx?c=d")["path"], "/a b/ü/x", "path")


@probe("H6", MUST, "raw_path, where it is given, is what was received, without the query (HTTP Connection Scope)")
def the_raw_path_is_unchanged(server: Server) -> None:
    found = server.scope("/%61%2fb//c?d").get("raw_path")
    if found is None:
        raise NotOffered("no raw_path")
    check(found, b"/%61%2fb//c", "raw_path")


@probe("H7", MUST, "query_string is bytes, still percent-encoded (HTTP Connection Scope)")
def the_query_string_is_encoded(server: Server) -> None:
    check(server.scope("/?a=%20b&c=%C3%BC+?")["query_string"], b"a=%20b&c=%C3%BC+?", "query_string")
    check(Server(server.running).scope("/")["query_string"], b"", "query_string without a query")


@probe("H8", MUST, 'root_path of an application that is mounted nowhere is "" (HTTP Connection Scope)')
def the_root_path(server: Server) -> None:
    check(server.scope().get("root_path", ""), "", "root_path")


@probe(
    "H9", MUST, "headers are pairs of bytes, duplicates kept, in the order of their values (HTTP Connection Scope)"
)
def duplicate_headers_are_kept(server: Server) -> None:
    headers = server.scope("/", "X-A: 1", "X-B: 0", "X-A: 2", "X-A: 2")["headers"]
    demand(all(type(name) is bytes and type(value) is bytes for name, value in headers), f"not bytes: {headers!r}")
    check([bytes(value) for name, value in headers if name.lower() == b"x-a"], [b"1", b"2", b"2"], "values of x-a")


@probe("H9", MUST, "header values are the bytes the client sent (WSGI encoding differences)")
def header_values_are_bytes(server: Server) -> None:
    headers = server.scope("/", "X-Name: J\xfcrgen")["headers"]
    check([value for name, value in headers if name.lower() == b"x-name"], [b"J\xfcrgen"], "value")


@probe("H9", SHOULD, "header names are in lower case (HTTP Connection Scope)")
def header_names_are_lowercased(server: Server) -> None:
    names = [name for name, _ in server.scope("/", "X-MiXed: 1")["headers"]]
    demand(b"x-mixed" in names, f"names are {names}")


@probe("H10", MUST, "client, where it is given, is the address of the socket: [str, int] (HTTP Connection Scope)")
def the_client_address(server: Server) -> None:
    with server.asked([("note scope",), ("respond", b"")]) as client:
        client.response()
        expected = list(client.socket.getsockname())
    found = next(note[1] for note in server.notes() if note[0] == "scope").get("client")
    if found is None:
        raise NotOffered("no client")
    check(list(found), expected, "client")
    demand(type(found[1]) is int, f"the port is {found[1]!r}")


@probe("H11", MUST, "server, where it is given, is the listening address: [str, int] (HTTP Connection Scope)")
def the_server_address(server: Server) -> None:
    found = server.scope().get("server")
    if found is None:
        raise NotOffered("no server")
    check(list(found), ["127.0.0.1", server.port], "server")
    demand(type(found[1]) is int, f"the port is {found[1]!r}")


# Requests


@probe("H13", MUST, "a chunked body is taken apart by the server (HTTP Connection Scope)")
def chunked_requests_are_decoded(server: Server) -> None:
    with server.asked([("echo request",)], "/", "Transfer-Encoding: chunked", method="POST") as client:
        client.send(b"3;extension=1\r\nabc\r\n")
        client.send(b"A\r\n0123456789\r\n")
        client.send(b"0\r\nX-Trailer: 1\r\n\r\n")
        check(client.response().body, b"abc0123456789", "the body")


@probe("H14", SHOULD, "a body reaches the application while it comes (HTTP, Request)")
def the_body_is_streamed(server: Server) -> None:
    script = [("receive",), start(), body(b"begun", True), ("until", "http.disconnect")]
    with server.asked(script, "/", "Content-Length: 10", method="POST") as client:
        client.send(b"01234")
        client.head()  # it comes although the body is not complete
    check(server.received()[0].get("more_body"), True, "more_body of the first event")


@probe("H14", MUST, "the last piece of a body, and no other, has no more_body (HTTP, Request)")
def the_end_of_the_body_is_told(server: Server) -> None:
    data = bytes(range(256)) * 1000
    script = [("echo request",), ("receive",)]
    with server.asked(script, "/", f"Content-Length: {len(data)}", method="POST") as client:
        client.send(data)
        check(client.response().body, data, "what came back")
    more = [event.get("more_body", False) for event in server.received() if event["type"] == "http.request"]
    check(more, [True] * (len(more) - 1) + [False], "more_body of the events")


@probe("H15", MUST, "a request without a body is one empty http.request (HTTP, Request)")
def a_request_without_body(server: Server) -> None:
    with server.asked([("receive",), *OK]) as client:
        client.response()
    (event,) = server.received()
    check((event.get("body", b""), event.get("more_body", False)), (b"", False), "body and more_body")


@probe("H14", MUST, "who expects it gets 100 Continue before the body (RFC 9110, 10.1.1)")
def a_100_continue(server: Server) -> None:
    fields = ("Content-Length: 4", "Expect: 100-continue")
    with server.asked([("receive",), *OK], "/", *fields, method="POST") as client:
        check(client.head().status, 100, "the first status")
        client.send(b"body")
        check(client.response().status, 200, "status")
    check(server.received()[0].get("body"), b"body", "the body")


# Responses


@probe("H16", MUST, "response headers are sent in the order of the application (HTTP, Response Start)")
def the_order_of_response_headers(server: Server) -> None:
    pairs = [(b"x-a", b"1"), (b"x-b", b"2"), (b"x-a", b"3"), (b"x-0", b"4")]
    with server.asked([start(200, pairs), body(b"ok")]) as client:
        fields = client.response().fields
    check([pair for pair in fields if pair[0].startswith(b"x-")], pairs, "headers of the response")


@probe("H16", MUST, "headers may be any iterable of iterables (HTTP, Response Start)")
def headers_may_be_a_generator(server: Server) -> None:
    lazily = ("send lazily", {"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"1")]})
    with server.asked([lazily, body(b"ok")]) as client:
        check(client.response().all(b"x-a"), [b"1"], "x-a")


@probe("H16", MUST, "headers may be missing (HTTP, Response Start)")
def headers_may_be_missing(server: Server) -> None:
    with server.asked([("send", {"type": "http.response.start", "status": 201}), body(b"ok")]) as client:
        found = client.response()
    check((found.status, found.body), (201, b"ok"), "status and body")


@probe("H16", MUST, "body and more_body may be missing (HTTP, Response Body)")
def the_body_may_be_missing(server: Server) -> None:
    with server.asked([start(), ("send", {"type": "http.response.body"})]) as client:
        found = client.response()
    check((found.status, found.body), (200, b""), "status and body")


@probe("H16", MUST, "status codes nobody knows are sent (HTTP, Response Start)")
def an_unknown_status(server: Server) -> None:
    with server.asked([start(299), body(b"ok")]) as client:
        check(client.response().status, 299, "status")


@probe("H18", MUST, "an application's Transfer-Encoding is ignored: an unknown one (HTTP, Response Start)")
def a_transfer_encoding_is_ignored(server: Server) -> None:
    with server.asked([start(200, [(b"transfer-encoding", b"gzip")]), body(b"one", True), body(b"two")]) as client:
        check(client.response().body, b"onetwo", "body")


@probe("H18", MUST, "an application's Transfer-Encoding is ignored: chunked, with a length (HTTP, Response Start)")
def a_transfer_encoding_beside_a_length(server: Server) -> None:
    pairs = [(b"content-length", b"4"), (b"transfer-encoding", b"chunked")]
    with server.asked([start(200, pairs), body(b"body")]) as client:
        found = client.response()
        check(found.body, b"body", "body")
        demand(
            not (found.all(b"content-length") and found.all(b"transfer-encoding")),
            "the response has Content-Length and Transfer-Encoding (RFC 9112, 6.2: must not)",
        )


@probe("H18", MUST, "a response without a length ends where it ends (HTTP Connection Scope)")
def a_response_of_unknown_length(server: Server) -> None:
    with server.asked([start(), body(b"one", True), body(b"", True), body(b"two", True), body()]) as client:
        check(client.response().body, b"onetwo", "body")


@probe("H18", MUST, "no chunks to HTTP/1.0 (RFC 9112, 6.1)")
def no_chunks_to_http_1_0(server: Server) -> None:
    with server.asked([start(), body(b"one", True), body(b"two")], version="1.0") as client:
        found = client.response()
    check((found.all(b"transfer-encoding"), found.body), ([], b"onetwo"), "Transfer-Encoding and body")


@probe("H20", MUST, "what was sent reaches the client though nothing follows (HTTP, Response Body)")
def the_body_is_flushed(server: Server) -> None:
    script = [start(), body(b"first", True), server.gate("go"), body(b" second")]
    with server.asked(script) as client:
        client.head()
        client.until(b"first", "the first piece of the body")
        server.open("go")
        client.until(b" second", "the second piece of the body")


@probe("H21", MUST, "events behind the last body are ignored (HTTP, Response Body)")
def events_behind_the_last_body(server: Server) -> None:
    script = [start(), body(b"complete"), body(b"more"), ("send", {"type": "http.response.start", "status": 500})]
    with server.asked(script) as client:
        check(client.response().body, b"complete", "body")
        notes = server.notes()
        demand(not [note for note in notes if note[0] == "raised"], f"send() raised: {notes}")
        check(client.get([("respond", b"next")]).body, b"next", "the next response on the connection")


@probe("H28", MUST, "each Set-Cookie stays a line of its own (HTTP)")
def cookies_are_not_joined(server: Server) -> None:
    cookies = [b"a=1; Expires=Thu, 01 Jan 2026 00:00:00 GMT", b"b=2"]
    with server.asked([start(200, [(b"set-cookie", value) for value in cookies]), body(b"ok")]) as client:
        check(client.response().all(b"set-cookie"), cookies, "set-cookie")


@probe("H29", MUST, "no body in answer to HEAD (RFC 9110, 9.3.2)")
def no_body_to_head(server: Server) -> None:
    with server.asked([start(200, [(b"content-length", b"4")]), body(b"body")], method="HEAD") as client:
        check(client.response("HEAD").all(b"content-length"), [b"4"], "content-length")
        check(client.get([("respond", b"next")]).body, b"next", "the next response on the connection")


@probe("H29", MUST, "no body in a 204 (RFC 9110, 15.3.5)")
def no_body_in_204(server: Server) -> None:
    no_body_in(server, 204)


@probe("H29", MUST, "no body in a 304 (RFC 9110, 15.4.5)")
def no_body_in_304(server: Server) -> None:
    no_body_in(server, 304)


def no_body_in(server: Server, status: int) -> None:
    """Behind the head may come the next response, or the end of the connection: nothing else."""
    with server.asked([start(status), ("attempt", {"type": "http.response.body", "body": b"body"})]) as client:
        check(client.response().status, status, "status")
        server.notes()
        try:
            client.request([("respond", b"next")], "/", "Connection: close")
            rest = client.rest()
        except (BrokenPipeError, ConnectionResetError):
            rest = b""
    demand(not rest or rest.startswith(b"HTTP/1.1 200 "), f"behind the head came {rest[:80]!r}")


# Applications that misbehave


@probe("H19", SHOULD, "an application that returns without a response ends the request (HTTP Connection Scope)")
def an_application_that_returns_without_a_response(server: Server) -> None:
    ends(server, [])


@probe("H19", SHOULD, "an application that returns behind the start ends the request (HTTP Connection Scope)")
def an_application_that_returns_behind_the_start(server: Server) -> None:
    ends(server, [start()])


@probe("A11", MUST, "an application that raises without a response ends the connection (Core, Error Handling)")
def an_application_that_raises(server: Server) -> None:
    ends(server, [("fail",)])


def ends(server: Server, script: list[tuple[object, ...]]) -> None:
    """Either a complete answer, which must not be a success, or the end of the connection."""
    with server.asked(script) as client:
        try:
            status = client.response().status
        except Failed as failure:
            if "closed" not in str(failure):
                raise
        else:
            demand(status >= 500, f"the answer is {status}")


@probe("H23", SHOULD, "an application that returns in the middle cuts the response (HTTP Connection Scope)")
def an_application_that_returns_in_the_middle(server: Server) -> None:
    cuts(server, [start(), body(b"half", True)])


@probe("A11", MUST, "an application that raises in the middle cuts the response (Core, Error Handling)")
def an_application_that_raises_in_the_middle(server: Server) -> None:
    cuts(server, [start(), body(b"half", True), ("fail",)])


@probe("H23", SHOULD, "less than the Content-Length is not a complete response (RFC 9112, 8)")
def less_than_the_content_length(server: Server) -> None:
    with server.asked([start(200, [(b"content-length", b"10")]), ("attempt", body(b"half")[1])]) as client:
        client.head()
        rest = client.rest()
    demand(len(rest) <= 4 and b"half".startswith(rest), f"behind the head came {rest!r}")


def cuts(server: Server, script: list[tuple[object, ...]]) -> None:
    with server.asked(script) as client:
        client.head()
        rest = client.rest()
    demand(b"half" in rest, f"behind the head came {rest!r}")
    demand(not rest.endswith(b"0\r\n\r\n"), "the response looks complete")


# Invalid events


def raises(server: Server, script: list[tuple[object, ...]]) -> None:
    """One of these attempts must raise. Whatever the server does to the connection afterwards is its affair."""
    with server.asked(script) as client:
        notes = server.notes()
        client.reset()
    demand([note for note in notes if note[0] == "raised"], f"send() took it: {notes}")


@probe("A9", SHOULD, "an unknown event raises in send() (Core, Error Handling)")
def an_unknown_event(server: Server) -> None:
    raises(server, [("attempt", {"type": "http.bogus"})])


@probe("A9", SHOULD, "an event without a type raises in send() (Core, Error Handling)")
def an_event_without_type(server: Server) -> None:
    raises(server, [("attempt", {"status": 200})])


@probe("A9", SHOULD, "a start without a status raises in send() (Core, Error Handling)")
def a_start_without_status(server: Server) -> None:
    raises(server, [("attempt", {"type": "http.response.start", "headers": []})])


@probe("A9", SHOULD, "a status that is no int raises in send() (Core, Error Handling)")
def a_status_of_the_wrong_type(server: Server) -> None:
    # Some servers look at the start only with the body: that is early enough.
    first = {"type": "http.response.start", "status": "200", "headers": []}
    raises(server, [("attempt", first), ("attempt", {"type": "http.response.body", "body": b"x"})])


@probe("A9", SHOULD, "headers of str raise in send() (Core, Error Handling)")
def headers_of_the_wrong_type(server: Server) -> None:
    first = {"type": "http.response.start", "status": 200, "headers": [("x-a", "1")]}
    raises(server, [("attempt", first), ("attempt", {"type": "http.response.body", "body": b"x"})])


@probe("A9", SHOULD, "a body of str raises in send() (Core, Error Handling)")
def a_body_of_the_wrong_type(server: Server) -> None:
    raises(server, [start(), ("attempt", {"type": "http.response.body", "body": "text"})])


@probe("A10", SHOULD, "keys that nobody knows are no error (Core, Error Handling)")
def additional_keys(server: Server) -> None:
    with server.asked([start(unknown={"a": 1}), body(b"ok", unknown=[1.5])]) as client:
        found = client.response()
    check((found.status, found.body), (200, b"ok"), "status and body")


# The end of the client


@probe("H24", MUST, "receive() behind a complete response is http.disconnect (HTTP, Disconnect)")
def a_disconnect_behind_the_response(server: Server) -> None:
    with server.asked([("receive",), start(), body(b"ok"), ("receive",)]) as client:
        client.response()
        check(server.received()[-1]["type"], "http.disconnect", "the last event")


@probe("H24", MUST, "a client that leaves before the response is an http.disconnect (HTTP, Disconnect)")
def a_client_that_leaves_before_the_response(server: Server) -> None:
    with server.asked([("receive",), ("note", "runs"), ("receive",)], method="POST") as client:
        server.settle()
        client.reset()
        check(server.received(10)[-1]["type"], "http.disconnect", "the last event")


@probe("H24", MUST, "a client that leaves in the middle is an http.disconnect (HTTP, Disconnect)")
def a_client_that_leaves_in_the_middle(server: Server) -> None:
    with server.asked([("receive",), start(), body(b"first", True), ("receive",)]) as client:
        client.until(b"first", "the first piece")
        client.reset()
        check(server.received(10)[-1]["type"], "http.disconnect", "the last event")


@probe("H24", MUST, "a client that closes its socket is an http.disconnect, too, in the end (HTTP, Disconnect)")
def a_client_that_closes(server: Server) -> None:
    with server.asked([("receive",), start(), body(b"first", True), ("receive",)]) as client:
        client.until(b"first", "the first piece")
        client.socket.close()
        check(server.received(12)[-1]["type"], "http.disconnect", "the last event")


@probe("H26", SHOULD, "send() raises an OSError when the client is gone (HTTP, Disconnected Client; version 2.4)")
def sending_to_nobody(server: Server) -> None:
    server.speaks("http", "2.4")
    last = {"type": "http.response.body", "body": b"late", "more_body": True}
    with server.asked([start(), body(b"first", True), ("until", "http.disconnect"), ("attempt", last)]) as client:
        client.until(b"first", "the first piece")
        client.reset()
        notes = server.notes(10)
    demand(notes[-2][0] == "raised" and notes[-2][2], f"the last notes are {notes[-2:]}")


@probe(
    "H27",
    SHOULD,
    "what send() raises then, and the application lets through, is not logged (HTTP, Disconnected Client)",
)
def a_disconnect_is_not_logged(server: Server) -> None:
    before = server.running.log()
    script = [start(), body(b"first", True), ("until", "http.disconnect"), body(b"late", True)]
    with server.asked(script) as client:
        client.until(b"first", "the first piece")
        client.reset()
        server.notes(10)
    server.settle()
    logged = server.running.log()[len(before) :]
    demand("Traceback" not in logged and "rror" not in logged, f"the log says {logged[-200:]!r}")


@probe("A16", SHOULD, "an application may clean up when its client has left (Core, Overview)")
def time_to_clean_up(server: Server) -> None:
    script = [start(), body(b"first", True), ("until", "http.disconnect"), ("sleep", 1), ("note", "cleaned")]
    with server.asked(script) as client:
        client.until(b"first", "the first piece")
        client.reset()
        notes = server.notes(12)
    demand(("noted", "cleaned") in notes, f"it noted {notes}")


@probe("A16", SHOULD, "an application may go on behind its response (Core, Overview)")
def time_behind_the_response(server: Server) -> None:
    with server.asked([start(), body(b"ok"), ("sleep", 1), ("note", "done")]) as client:
        client.response()
        client.reset()
        notes = server.notes(12)
    demand(("noted", "done") in notes, f"it noted {notes}")


# Connections


@probe("H1", MUST, "pipelined requests are answered in their order (RFC 9112, 9.3.2)")
def pipelined_requests(server: Server) -> None:
    scripts = [[("sleep", 0.2), ("respond", b"0")], [("respond", b"1")], [("respond", b"2")]]
    with server.http() as client:
        for script in scripts:
            client.request(script)
        check([client.response().body for _ in scripts], [b"0", b"1", b"2"], "the answers")


@probe("H1", MUST, "Connection: close closes (RFC 9112, 9.6)")
def connection_close(server: Server) -> None:
    with server.asked([("respond", b"ok")], "/", "Connection: close") as client:
        check(client.response().body, b"ok", "body")
        check(client.rest(), b"", "what follows")


@probe("H9", MUST, "a request without Host is a 400 (RFC 9112, 3.2)")
def no_host(server: Server) -> None:
    with server.asked([("respond", b"ok")], host=None) as client:
        check(client.response().status, 400, "status")


@probe("H9", MUST, "two Hosts are a 400 (RFC 9112, 3.2)")
def two_hosts(server: Server) -> None:
    with server.asked([("respond", b"ok")], "/", "Host: other") as client:
        check(client.response().status, 400, "status")


@probe("H9", MUST, "a space before the colon is a 400 (RFC 9112, 5.1)")
def a_space_before_the_colon(server: Server) -> None:
    with server.asked([("respond", b"ok")], "/", "X-A : 1") as client:
        check(client.response().status, 400, "status")


@probe("H13", MUST, "a Content-Length that is no number is a 400 (RFC 9112, 6.3)")
def a_wrong_content_length(server: Server) -> None:
    for value in ("+1", "1,2", "0x1", "-1"):
        with server.http() as client:
            client.request([("respond", b"ok")], "/", f"Content-Length: {value}", method="POST")
            check(client.response().status, 400, f"status of Content-Length: {value}")


@probe("H13", MUST, "an unknown last transfer coding is refused, and the connection closed (RFC 9112, 6.3)")
def an_unknown_transfer_coding(server: Server) -> None:
    with server.asked([("respond", b"ok")], "/", "Transfer-Encoding: gzip", method="POST") as client:
        status = client.response().status
        demand(400 <= status < 600, f"the status is {status}")
        client.send(b"GET / HTTP/1.1\r\nHost: smuggled\r\n\r\n")
        client.rest()


# Extensions


@probe("X5", MUST, "early hints, where they are offered, reach the client before the response (Extensions)")
def early_hints(server: Server) -> None:
    server.offers("http.response.early_hint")
    hint = ("send", {"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload"]})
    with server.asked([start(), hint, body(b"ok")]) as client:
        found = client.head()
        check((found.status, found.all(b"link")), (103, [b"</a.css>; rel=preload"]), "status and link")
        check(client.response().body, b"ok", "body")


TRAILERS = ("send", {"type": "http.response.trailers", "headers": [(b"x-sum", b"1")]})


@probe("X6", MUST, "trailers, where they are offered, reach a client that takes them (Extensions)")
def trailers(server: Server) -> None:
    server.offers("http.response.trailers", "http", "TE: trailers")
    with server.asked([start(trailers=True), body(b"ok"), TRAILERS], "/", "TE: trailers") as client:
        found = client.response()
        check((found.body, found.trailers), (b"ok", [(b"x-sum", b"1")]), "body and trailers")


@probe("X7", SHOULD, "http.response.debug is not offered (Extensions, Debug)")
def no_debug(server: Server) -> None:
    demand("http.response.debug" not in (server.scope().get("extensions") or {}), "it is")


@probe("A7", SHOULD, "applications in the style of ASGI 2 are served (Core, Legacy Applications)", launches=True)
def legacy_applications(launcher: Launcher) -> None:
    with launcher.start(application="Legacy") as running:
        check(Server(running).scope()["type"], "http", "type")
