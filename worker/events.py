"""What an application may send, and when: checked inside ``send()``, so that errors are raised at the faulty line.

A connection has one ``SentEvents`` object, ``HttpEvents`` or ``WebSocketEvents``. ``apply()`` takes what the
application sent and returns the events that may now leave: new dicts with the keys ASGI defines and nothing else,
ready for ``codec.encode_event``. A message that is refused changes no state. No I/O happens here.

    HTTP        WAITING --start--> STARTED --body, more_body False--> COMPLETE (whatever follows is ignored)
                STARTED --body, more_body False, trailers promised--> TRAILERS --trailers--> COMPLETE
                STARTED --pathsend--> COMPLETE (or TRAILERS)
    WebSocket   CONNECTING --accept--> OPEN --close--> CLOSED (whatever follows raises ClientDisconnected)
                CONNECTING --close--> CLOSED
                CONNECTING --http.response.start--> REFUSING --http.response.body, more_body False--> CLOSED
                OPEN --handover.state--> OPEN (a Checkpoint, where the extension is offered)

Where ASGI and practice differ: ``bytearray`` and ``memoryview`` are taken for ``bytes`` (Starlette passes
memoryviews on), a ``reason`` of None for "" (uvicorn takes it). Keys that are not known are dropped without a
word (ASGI, "Error Handling"); ``trailers`` is one of them where the extension is not offered. Events of extensions
are taken where the scope of the connection offers them.

To add an event: a row in ``TRANSITIONS`` and a method in ``_BUILDERS`` of its protocol.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from enum import Enum
from functools import lru_cache
from typing import Any, ClassVar, Final

from channel_layer.codec import encode_event, encode_message
from channel_layer.connection import PIECE_BYTES_MAX
from channel_layer.enums import quick
from channel_layer.errors import InvalidMessage, MessageTooLarge

__all__ = [
    "BODY_EVENT_BYTES_MAX",
    "EXTENSION_TRANSITIONS",
    "STATE_BYTES_MAX",
    "TRANSITIONS",
    "Checkpoint",
    "ClientDisconnected",
    "HttpEvents",
    "InvalidEvent",
    "SentEvents",
    "State",
    "WebSocketEvents",
]

Event = dict[str, Any]

# A checkpoint (websocket.handover), encoded. The interface server keeps one for each connection.
STATE_BYTES_MAX: Final = 64 * 1024
# What encoding adds to the state itself.
_STATE_ENVELOPE_BYTES: Final = len(encode_message({"state": None})) - 1

# A larger body leaves as several events, so that one send() of any size moves through the window and the client
# gets its first bytes before the last are encoded. With its keys such an event still fits one frame.
BODY_EVENT_BYTES_MAX: Final = PIECE_BYTES_MAX


class InvalidEvent(RuntimeError):
    """The application sent what ASGI does not allow, or not at this point; the text names event and value."""


class ClientDisconnected(OSError):
    """The client is gone or the connection is closed: nothing can be sent any more.

    ASGI "HTTP & WebSocket" 2.4 asks for a subclass of OSError. It is no fault of the application: one that lets
    it escape is not logged.
    """


@quick
class State(Enum):
    """Where a connection is; the value completes the sentence "the application sent … while"."""

    WAITING = "no response has been started"
    STARTED = "the response is being sent"
    TRAILERS = "the trailers of the response are awaited"
    COMPLETE = "the response is complete"
    CONNECTING = "the WebSocket is neither accepted nor closed"
    REFUSING = "the WebSocket is being refused with a response"
    OPEN = "the WebSocket is open"
    CLOSED = "the WebSocket is closed"


# What may be sent in which state, and where that leads. http.response.body leads to COMPLETE when it is the last.
# A pair that is not listed is an error, except in the two final states; ASGI "HTTP & WebSocket" 2.5.
TRANSITIONS: Final[Mapping[tuple[State, str], State]] = {
    (State.WAITING, "http.response.start"): State.STARTED,
    (State.STARTED, "http.response.body"): State.STARTED,
    (State.CONNECTING, "websocket.accept"): State.OPEN,
    (State.CONNECTING, "websocket.close"): State.CLOSED,
    (State.OPEN, "websocket.send"): State.OPEN,
    (State.OPEN, "websocket.close"): State.CLOSED,
}

# The same for events of extensions, where they are offered. A body or trailers of which more follow change nothing.
EXTENSION_TRANSITIONS: Final[Mapping[tuple[State, str], State]] = {
    (State.WAITING, "http.response.early_hint"): State.WAITING,
    (State.STARTED, "http.response.early_hint"): State.STARTED,
    (State.STARTED, "http.response.pathsend"): State.COMPLETE,
    (State.TRAILERS, "http.response.trailers"): State.COMPLETE,
    (State.CONNECTING, "websocket.http.response.start"): State.REFUSING,
    (State.REFUSING, "websocket.http.response.body"): State.CLOSED,
    (State.OPEN, "websocket.handover.state"): State.OPEN,
}

# Event types of ASGI extensions, by extension: an application that sends one where it is not offered did not look
# into scope["extensions"], which the error says.
_EXTENSIONS: Final[Mapping[str, str]] = {
    "http.response.push": "http.response.push",
    "http.response.zerocopysend": "http.response.zerocopysend",
    "http.response.pathsend": "http.response.pathsend",
    "http.response.early_hint": "http.response.early_hint",
    "http.response.trailers": "http.response.trailers",
    "http.response.debug": "http.response.debug",
    "websocket.handover.state": "websocket.handover",
    "websocket.http.response.start": "websocket.http.response",
    "websocket.http.response.body": "websocket.http.response",
}

# Longer texts are encoded each time: 64 are kept, and encoding is not what costs with long ones.
_KEPT_CHARS_MAX: Final = 4096

# RFC 9110 section 6.5.1: what must be known before the body cannot come behind it.
_NOT_IN_TRAILERS: Final = frozenset(
    (b"connection", b"content-length", b"host", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
# RFC 9110 section 5.6.2: what header names and WebSocket subprotocols are made of.
_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# RFC 9110 section 5.5: these would end the header field, and let a value add headers or a second response.
_VALUE_FORBIDDEN: Final = re.compile(rb"[\r\n\0]")
_MISSING: Final = object()


class Checkpoint(list[Event]):
    """A ``websocket.handover.state``: no events for the client, but in order with those."""

    __slots__ = ("commit", "notify", "state")

    def __init__(self, state: bytes, *, notify: bool, commit: bool) -> None:
        self.state = state  # encode_message({"state": …})
        self.notify = notify
        self.commit = commit


class SentEvents:
    """The events one application instance has sent so far, as far as the next one depends on them."""

    __slots__ = ("_extensions", "state")
    protocol: ClassVar[str]
    final_state: ClassVar[State]
    _builders: ClassVar[Mapping[str, Callable[[Any, Mapping[str, Any]], Iterable[Event]]]]

    state: State
    _extensions: Container[str]  # that the scope of this connection offers

    def apply(self, message: Mapping[str, Any]) -> Iterable[Event]:
        """Check one message of the application; return the events that leave now, in order, or a Checkpoint.

        The result may be lazy and is to be used once. Raises InvalidEvent, ClientDisconnected.
        """
        raise NotImplementedError

    @property
    def is_complete(self) -> bool:
        """True when the application has nothing more to say to the client."""
        return self.state is self.final_state

    @property
    def holds_start(self) -> bool:
        """True while an http.response.start waits for its body."""
        return False

    def release_start(self) -> Event | None:
        """Return the held http.response.start, if there is one: it leaves now, without a body."""
        return None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.state.name}>"

    def _build(self, message: Mapping[str, Any]) -> Iterable[Event]:
        try:
            kind = message["type"]
            builder = self._builders[kind]
        except (KeyError, TypeError):
            raise self._unknown(message) from None
        if (self.state, kind) not in TRANSITIONS:
            if kind in _EXTENSIONS:
                if _EXTENSIONS[kind] not in self._extensions:
                    raise self._unknown(message)
                if (self.state, kind) in EXTENSION_TRANSITIONS:
                    return builder(self, message)
            known = {**TRANSITIONS, **EXTENSION_TRANSITIONS}
            allowed = " or ".join(
                repr(sent)
                for state, sent in known
                if state is self.state and _EXTENSIONS.get(sent) in (None, *_offered(self._extensions))
            )
            raise InvalidEvent(f"the application sent {kind!r} while {self.state.value}; expected {allowed}")
        return builder(self, message)

    def _unknown(self, message: object) -> InvalidEvent:
        if not isinstance(message, Mapping):
            return InvalidEvent(f"the application sent a {type(message).__name__}, expected a dict: {message!r:.80}")
        kind = message.get("type")
        if not isinstance(kind, str):
            problem = 'has no "type"' if "type" not in message else f'has a "type" that is {kind!r:.80}, expected str'
            return InvalidEvent(f"the application sent a message that {problem} (keys: {list(message)!r:.200})")
        if kind in _EXTENSIONS and kind.startswith(self.protocol + "."):
            return InvalidEvent(
                f"the application sent {kind!r}, but the extension {_EXTENSIONS[kind]!r} is not offered: "
                'it is not in scope["extensions"]'
            )
        known = ", ".join(repr(name) for name in self._builders if name not in _EXTENSIONS)
        return InvalidEvent(
            f"the application sent {kind!r:.80} while {self.state.value}; on {self.protocol} connections "
            f"only these are known: {known}"
        )


class HttpEvents(SentEvents):
    """What the application sends in answer to one HTTP request.

    ``http.response.start`` is held until the first ``http.response.body`` (ASGI, "Response Start": it need not be
    sent before), so an application that fails in between still gets its clean 500.
    """

    __slots__ = ("_begun", "_held_start", "_with_trailers")
    protocol = "http"
    final_state = State.COMPLETE

    def __init__(self, extensions: Container[str] = ()) -> None:
        self.state = State.WAITING
        self._extensions = extensions
        self._with_trailers = False  # the start promised them
        self._begun = False  # something of the body has been sent
        self._held_start: Event | None = None

    def apply(self, message: Mapping[str, Any]) -> Iterable[Event]:
        if self.state is State.COMPLETE:
            # ASGI, "Response Body": further messages are ignored. Still an error: what no HTTP response knows.
            kind = message.get("type") if isinstance(message, Mapping) else None
            if isinstance(kind, str) and (kind in self._builders or kind in _EXTENSIONS) and kind.startswith("http."):
                return ()
        return self._build(message)

    @property
    def holds_start(self) -> bool:
        return self._held_start is not None

    def release_start(self) -> Event | None:
        start, self._held_start = self._held_start, None
        return start

    def _start(self, message: Mapping[str, Any]) -> Iterable[Event]:
        kind = "http.response.start"
        status = message.get("status", _MISSING)
        if not isinstance(status, int) or isinstance(status, bool):
            raise _wrong(kind, "status", status, "an int")
        # RFC 9110 section 15.2: 1xx is an interim response; as the only one it would leave the client waiting.
        if not 200 <= status <= 999:
            raise InvalidEvent(f'{kind}: "status" is {status}, expected 200 to 999')
        headers = _build_headers(kind, message.get("headers", ()))
        # int(): http.HTTPStatus is an int, too, and must not reach the codec.
        self._held_start = {"type": kind, "status": int(status), "headers": headers}
        if "http.response.trailers" in self._extensions:
            trailers = message.get("trailers", False)
            if type(trailers) is not bool:
                raise _wrong(kind, "trailers", trailers, "a bool")
            if trailers:
                self._with_trailers = self._held_start["trailers"] = True
        self.state = State.STARTED
        return ()

    def _body(self, message: Mapping[str, Any]) -> Iterable[Event]:
        kind = "http.response.body"
        body = message.get("body", b"")
        if type(body) is not bytes:
            body = _as_bytes(kind, "body", body)
        more_body = message.get("more_body", False)
        if type(more_body) is not bool:
            raise _wrong(kind, "more_body", more_body, "a bool")
        self._begun = True
        if not more_body:
            self.state = State.TRAILERS if self._with_trailers else State.COMPLETE
        start = self.release_start()
        if len(body) > BODY_EVENT_BYTES_MAX:
            return _cut_body(start, body, more_body, with_trailers=self._with_trailers)
        event = {"type": kind, "body": body, "more_body": more_body}
        if self.state is State.TRAILERS:
            event["trailers"] = True
        return (event,) if start is None else (start, event)

    def _early_hint(self, message: Mapping[str, Any]) -> Iterable[Event]:
        kind = "http.response.early_hint"
        links = message.get("links", _MISSING)
        if not isinstance(links, Iterable) or isinstance(links, str | bytes | Mapping):
            raise _wrong(kind, "links", links, "an iterable of bytes")
        built = [link if type(link) is bytes else _as_bytes(kind, "links", link) for link in links]
        for link in built:
            if _VALUE_FORBIDDEN.search(link):
                raise InvalidEvent(f'{kind}: "links" has a CR, LF or NUL: {link!r:.80}')
        # It needs no start, and cannot come behind the head: ASGI says the one, HTTP the other.
        return ({"type": kind, "links": built},) if built and not self._begun else ()

    def _trailers(self, message: Mapping[str, Any]) -> Iterable[Event]:
        kind = "http.response.trailers"
        headers = _build_headers(kind, message.get("headers", ()))
        for name, _ in headers:
            if name in _NOT_IN_TRAILERS:
                raise InvalidEvent(f'{kind}: "headers" has {name!r}, which cannot be a trailer (RFC 9110, 6.5.1)')
        more = message.get("more_trailers", False)
        if type(more) is not bool:
            raise _wrong(kind, "more_trailers", more, "a bool")
        if not more:
            self.state = State.COMPLETE
        return ({"type": kind, "headers": headers, "more_trailers": more},)

    def _pathsend(self, message: Mapping[str, Any]) -> Iterable[Event]:
        kind = "http.response.pathsend"
        path = message.get("path", _MISSING)
        if not isinstance(path, str):
            raise _wrong(kind, "path", path, "a str")
        _check_encodable(kind, "path", path)
        if not path.startswith("/") or "\0" in path:
            raise InvalidEvent(f'{kind}: "path" is {path!r:.200}, expected an absolute path')
        if self._begun:
            raise InvalidEvent(f"{kind}: the body has begun, a file cannot be part of it")
        self._begun = True
        self.state = State.TRAILERS if self._with_trailers else State.COMPLETE
        start = self.release_start()
        event = {"type": kind, "path": path}
        return (event,) if start is None else (start, event)

    _builders: ClassVar = {
        "http.response.start": _start,
        "http.response.body": _body,
        "http.response.early_hint": _early_hint,
        "http.response.trailers": _trailers,
        "http.response.pathsend": _pathsend,
    }


class WebSocketEvents(SentEvents):
    """What the application sends on one WebSocket.

    Of a refusal the start is held like that of an HTTP response.
    """

    __slots__ = ("_refusal",)
    protocol = "websocket"
    final_state = State.CLOSED

    def __init__(self, extensions: Container[str] = ()) -> None:
        self.state = State.CONNECTING
        self._extensions = extensions
        self._refusal: HttpEvents | None = None  # in REFUSING

    def apply(self, message: Mapping[str, Any]) -> Iterable[Event]:
        if self.state is State.CLOSED:
            raise ClientDisconnected("the application has closed this WebSocket, nothing can be sent any more")
        return self._build(message)

    def encode_text(self, message: Mapping[str, Any]) -> bytes | None:
        """The short way for what happens most: a ``websocket.send`` of text, encoded. None: ``apply`` knows."""
        if self.state is not State.OPEN or message.get("type") != "websocket.send":
            return None
        text = message.get("text")
        if type(text) is not str or message.get("bytes") is not None:
            return None
        try:
            return _encode_text(text) if len(text) <= _KEPT_CHARS_MAX else encode_event(_text_event(text))
        except UnicodeEncodeError:
            return None

    def _accept(self, message: Mapping[str, Any]) -> Iterable[Event]:
        kind = "websocket.accept"
        subprotocol = message.get("subprotocol")
        if subprotocol is not None:
            if not isinstance(subprotocol, str):
                raise _wrong(kind, "subprotocol", subprotocol, "a str or None")
            # RFC 6455 section 4.2.2: it goes into a header.
            if not _TOKEN.fullmatch(subprotocol.encode("utf-8", "replace")):
                raise InvalidEvent(f'{kind}: "subprotocol" is {subprotocol!r:.80}, which is not a token of RFC 9110')
        headers = _build_headers(kind, message.get("headers", ()))
        for name, _ in headers:
            if name == b"sec-websocket-protocol":
                raise InvalidEvent(f'{kind}: "headers" has sec-websocket-protocol, use the key "subprotocol"')
        self.state = State.OPEN
        return ({"type": kind, "subprotocol": subprotocol, "headers": headers},)

    def _send(self, message: Mapping[str, Any]) -> Iterable[Event]:
        kind = "websocket.send"
        text = message.get("text")
        data = message.get("bytes")
        if (text is None) == (data is None):
            problem = "neither is" if text is None else "both are"
            raise InvalidEvent(f'{kind}: exactly one of "text" and "bytes" must be given, {problem}')
        if data is not None:
            return ({"type": kind, "bytes": data if type(data) is bytes else _as_bytes(kind, "bytes", data)},)
        if not isinstance(text, str):
            raise _wrong(kind, "text", text, "a str")
        # Asking for ASCII is free, and it spares most messages the second look.
        if not text.isascii():
            _check_encodable(kind, "text", text)
        return (_text_event(text),)

    def _close(self, message: Mapping[str, Any]) -> Iterable[Event]:
        kind = "websocket.close"
        code = message.get("code", 1000)
        if not isinstance(code, int) or isinstance(code, bool):
            raise _wrong(kind, "code", code, "an int")
        if not _is_sendable_close_code(code):
            raise InvalidEvent(
                f'{kind}: "code" is {code}, expected 1000 to 1003, 1007 to 1014 or 3000 to 4999'
                " (RFC 6455 section 7.4)"
            )
        reason = message.get("reason")
        if reason is None:
            reason = ""
        if not isinstance(reason, str):
            raise _wrong(kind, "reason", reason, "a str")
        length_bytes = _check_encodable(kind, "reason", reason)
        # RFC 6455 section 5.5: a control frame carries 125 bytes, of which the code takes two.
        if length_bytes > 123:
            raise InvalidEvent(f'{kind}: "reason" is {length_bytes} bytes of UTF-8, at most 123 fit: {reason!r:.40}…')
        self.state = State.CLOSED
        return ({"type": kind, "code": int(code), "reason": reason},)

    def _handover_state(self, message: Mapping[str, Any]) -> Checkpoint:
        kind = "websocket.handover.state"
        for key in ("notify", "commit"):
            if type(message.get(key, False)) is not bool:
                raise _wrong(kind, key, message[key], "a bool")
        if "state" not in message:
            raise _wrong(kind, "state", _MISSING, "what the next instance is to know")
        try:
            state = encode_message({"state": message["state"]})
        except (InvalidMessage, MessageTooLarge) as error:
            raise InvalidEvent(f"{kind}: {error}") from error
        length = len(state) - _STATE_ENVELOPE_BYTES
        if length > STATE_BYTES_MAX:
            raise InvalidEvent(f'{kind}: "state" is {length} bytes when encoded, the limit is {STATE_BYTES_MAX}')
        return Checkpoint(state, notify=message.get("notify", False), commit=message.get("commit", False))

    def _refusal_start(self, message: Mapping[str, Any]) -> Iterable[Event]:
        refusal = HttpEvents()
        self._named(refusal.apply, {**message, "type": "http.response.start"})
        self._refusal = refusal
        self.state = State.REFUSING
        return ()

    def _refusal_body(self, message: Mapping[str, Any]) -> Iterable[Event]:
        assert self._refusal is not None
        events = self._named(self._refusal.apply, {**message, "type": "http.response.body"})
        if self._refusal.is_complete:
            self.state = State.CLOSED
        return ({**event, "type": f"websocket.{event['type']}"} for event in events)

    def _named(self, apply: Callable[[Mapping[str, Any]], Iterable[Event]], message: Event) -> Iterable[Event]:
        """An event of a refusal is the HTTP event of the same name, also where it is wrong."""
        try:
            return apply(message)
        except InvalidEvent as error:
            raise InvalidEvent(f"websocket.{error}") from None

    _builders: ClassVar = {
        "websocket.accept": _accept,
        "websocket.send": _send,
        "websocket.close": _close,
        "websocket.http.response.start": _refusal_start,
        "websocket.http.response.body": _refusal_body,
        "websocket.handover.state": _handover_state,
    }


def _text_event(text: str) -> Event:
    return {"type": "websocket.send", "text": text}


# The instances of a group send the same text one after the other. When it is full, the text used longest ago goes.
@lru_cache(maxsize=64)
def _encode_text(text: str) -> bytes:
    return encode_event(_text_event(text))


def _offered(extensions: Container[str]) -> Iterator[str]:
    return (name for name in set(_EXTENSIONS.values()) if name in extensions)


def _cut_body(start: Event | None, body: bytes, more_body: bool, *, with_trailers: bool) -> Iterator[Event]:
    if start is not None:
        yield start
    # Lazily: of a large body one piece at a time exists twice.
    view = memoryview(body)
    for offset in range(0, len(body), BODY_EVENT_BYTES_MAX):
        end = offset + BODY_EVENT_BYTES_MAX
        event: Event = {
            "type": "http.response.body",
            "body": bytes(view[offset:end]),
            "more_body": more_body or end < len(body),
        }
        if with_trailers and not event["more_body"]:
            event["trailers"] = True  # they follow: the response is not complete
        yield event


def _build_headers(kind: str, headers: Any) -> list[tuple[bytes, bytes]]:
    """Any iterable of pairs of bytes, as a list with lower-case names."""
    pairs = headers
    if type(headers) is not list and type(headers) is not tuple:
        if isinstance(headers, str | bytes | Mapping):
            raise _wrong(kind, "headers", headers, "an iterable of [name, value]")
        try:
            pairs = list(headers)
        except TypeError:
            raise _wrong(kind, "headers", headers, "an iterable of [name, value]") from None
    built = []
    for index, pair in enumerate(pairs):
        try:
            if type(pair) is not tuple and isinstance(pair, str | bytes):  # two characters would unpack, too
                raise TypeError
            name, value = pair
        except (TypeError, ValueError):
            raise _wrong(kind, f"headers[{index}]", pair, "[name, value]") from None
        if type(name) is not bytes:
            name = _as_bytes(kind, f"headers[{index}] name", name)
        if type(value) is not bytes:
            value = _as_bytes(kind, f"headers[{index}] value", value)
        lower = _build_header_name(name)
        if lower is None:
            raise InvalidEvent(f'{kind}: "headers[{index}] name" is {name!r:.80}, which is not a token of RFC 9110')
        if _VALUE_FORBIDDEN.search(value):
            raise InvalidEvent(f'{kind}: "headers[{index}] value" of {name!r} has a CR, LF or NUL: {value!r:.80}')
        built.append((lower, value))
    return built


# Applications use few names, again and again. When it is full, the name used longest ago is forgotten.
@lru_cache(maxsize=512)
def _build_header_name(name: bytes) -> bytes | None:
    return name.lower() if _TOKEN.fullmatch(name) else None


def _is_sendable_close_code(code: int) -> bool:
    # RFC 6455 section 7.4.1 and the IANA registry: 1005, 1006 and 1015 never travel, 1004 and 1016-2999 are reserved.
    return 3000 <= code <= 4999 or 1000 <= code <= 1003 or 1007 <= code <= 1014


def _as_bytes(kind: str, key: str, value: Any) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    hint = ", encode it" if isinstance(value, str) else ""
    raise _wrong(kind, key, value, f"bytes{hint}")


def _check_encodable(kind: str, key: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidEvent(
            f'{kind}: "{key}" has a lone surrogate at {error.start}, which UTF-8 cannot carry: {text!r:.80}'
        ) from None


def _wrong(kind: str, key: str, value: object, expected: str) -> InvalidEvent:
    if value is _MISSING:
        return InvalidEvent(f'{kind}: the key "{key}" is missing, expected {expected}')
    return InvalidEvent(f'{kind}: "{key}" is {value!r:.80} ({type(value).__name__}), expected {expected}')
