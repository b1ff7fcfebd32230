"""A client of HTTP/1.1 and WebSocket on plain sockets, that sends exactly what a probe wants and reads strictly.

What does not come in time, or is no HTTP, is a ``Failed`` with a line that says what was awaited and what came.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

TIMEOUT_S = 5.0
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class Failed(AssertionError):
    """The server did not do what the row asks for; the text says what it did."""


class NotOffered(Exception):
    """The row is about something optional that this server does not have, or a version it does not announce."""


class Connection:
    """A TCP connection with a buffer of what was read and not yet used."""

    def __init__(self, port: int, timeout_s: float = TIMEOUT_S) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self.data = b""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, awaited: str) -> bool:
        """Read something. False at the end of the connection."""
        try:
            received = self.socket.recv(65536)
        except TimeoutError:
            raise Failed(f"waited in vain for {awaited}; had {self.data[:80]!r}") from None
        except ConnectionResetError:
            received = b""
        self.data += received
        return bool(received)

    def until(self, mark: bytes, awaited: str) -> bytes:
        while mark not in self.data:
            if not self.read(awaited):
                raise Failed(f"the server closed instead of {awaited}; had {self.data[:80]!r}")
        found, _, self.data = self.data.partition(mark)
        return found

    def exactly(self, count: int, awaited: str) -> bytes:
        while len(self.data) < count:
            if not self.read(awaited):
                raise Failed(f"the server closed in the middle of {awaited}: {len(self.data)} of {count} bytes")
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def rest(self) -> bytes:
        """Everything until the server closes."""
        while self.read("the server's end of the connection"):
            pass
        rest, self.data = self.data, b""
        return rest

    def is_silent(self, duration_s: float) -> bool:
        """True when nothing comes for so long, and the connection stays open."""
        if self.data:
            return False
        self.socket.settimeout(duration_s)
        try:
            self.data += self.socket.recv(65536)
        except TimeoutError:
            return True
        except ConnectionResetError:
            return False
        finally:
            self.socket.settimeout(TIMEOUT_S)
        return False

    def reset(self) -> None:
        """Leave with a reset: the connection is gone, not only half of it."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class Response:
    def __init__(self, status: int, fields: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self.fields = fields  # names in lower case, in order
        self.body = b""
        self.trailers: list[tuple[bytes, bytes]] = []

    def all(self, name: bytes) -> list[bytes]:
        return [value for found, value in self.fields if found == name]


def fields_of(lines: list[bytes]) -> list[tuple[bytes, bytes]]:
    return [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]


class HttpConnection(Connection):
    def request(self, script: object, target: str = "/", *fields: str, **options: Any) -> None:
        self.send(head_of(script, target, *fields, **options))

    def get(self, script: object, target: str = "/", *fields: str, **options: Any) -> Response:
        self.request(script, target, *fields, **options)
        return self.response(method=options.get("method", "GET"))

    def head(self) -> Response:
        lines = self.until(b"\r\n\r\n", "the head of a response").split(b"\r\n")
        words = lines[0].split(b" ", 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise Failed(f"no status line: {lines[0][:80]!r}")
        return Response(int(words[1]), fields_of(lines[1:]))

    def response(self, method: str = "GET") -> Response:
        """The next final response; interim ones are passed over. RFC 9112, section 6.3."""
        found = self.head()
        while found.status < 200:
            found = self.head()
        codings, lengths = found.all(b"transfer-encoding"), found.all(b"content-length")
        if method == "HEAD" or found.status in (204, 304):
            return found
        if codings:
            if [coding.lower() for coding in codings] != [b"chunked"]:
                raise Failed(f"Transfer-Encoding of the response is {codings}")
            while size := int(self.until(b"\r\n", "a chunk").partition(b";")[0], 16):
                found.body += self.exactly(size, "a chunk")
                if self.exactly(2, "the end of a chunk") != b"\r\n":
                    raise Failed("a chunk is longer than it says")
            while line := self.until(b"\r\n", "the end of a chunked body"):
                found.trailers += fields_of([line])
        elif lengths:
            if len(set(lengths)) != 1:
                raise Failed(f"Content-Length of the response is {lengths}")
            found.body = self.exactly(int(lengths[0]), "the body")
        else:
            found.body = self.rest()
        return found


def head_of(
    script: object,
    target: str = "/",
    *fields: str,
    method: str = "GET",
    version: str = "1.1",
    key: str = "",
    host: str | None = "localhost",
) -> bytes:
    lines = [f"{method} {target} HTTP/{version}"]
    if host is not None:
        lines.append(f"Host: {host}")
    if script is not None:
        lines.append(f"X-Script: {script!a}")
    if key:
        lines.append(f"X-Key: {key}")
    return "\r\n".join([*lines, *fields, "", ""]).encode("latin-1")


class WebSocketConnection(HttpConnection):
    def __init__(
        self,
        port: int,
        script: object,
        target: str = "/",
        *fields: str,
        key: str = "",
        version: str = "13",
        accept: bool = True,
    ) -> None:
        super().__init__(port)
        self.pings = 0
        self.request(
            script,
            target,
            *("Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Version: {version}"),
            *("Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==", *fields),
            key=key,
        )
        if accept:
            self.handshake = self.head()
            if self.handshake.status != 101:
                raise Failed(f"the handshake was answered with {self.handshake.status}")

    def frame(self, opcode: int, payload: bytes = b"", *, fin: bool = True) -> None:
        self.send(frame(opcode, payload, fin=fin))

    def any_frame(self) -> tuple[int, bytes]:
        """(opcode, payload) of the next frame, joined if it is a message of several."""
        first, length = self.exactly(2, "a frame")
        if length == 126:
            (length,) = struct.unpack(">H", self.exactly(2, "a frame"))
        elif length == 127:
            (length,) = struct.unpack(">Q", self.exactly(8, "a frame"))
        payload = self.exactly(length, "a frame")
        if not first & 128 and first & 15 < 8:
            while True:
                opcode, more = self.any_frame()
                if opcode == 0:
                    return first & 15, payload + more
        return first & 15, payload

    def receive(self) -> tuple[int, bytes]:
        """The next frame that is no PING; those are answered."""
        while True:
            opcode, payload = self.any_frame()
            if opcode != PING:
                return opcode, payload
            self.pings += 1
            self.frame(PONG, payload)

    def close(self, code: int | None = 1000, reason: str = "") -> None:
        self.frame(CLOSE, b"" if code is None else struct.pack(">H", code) + reason.encode())

    def closed(self) -> tuple[int | None, str]:
        """(code, reason) of the server's Close, which must be what comes next; (None, "") if it has none."""
        opcode, payload = self.receive()
        if opcode != CLOSE:
            raise Failed(f"a frame with opcode {opcode} instead of a Close")
        return (struct.unpack(">H", payload[:2])[0] if payload else None), payload[2:].decode()

    def ended(self) -> int | None:
        """Wait until the server ends the connection, whatever it says before: the code of its Close, if any."""
        code = None
        while True:
            try:
                opcode, payload = self.any_frame()
            except Failed as failure:
                if "in vain" in str(failure):
                    raise Failed("the server leaves the connection open") from None
                return code
            if opcode == CLOSE:
                code = struct.unpack(">H", payload[:2])[0] if payload else 1005
                self.socket.close()
                return code


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    length = len(payload)
    if length < 126:
        head = bytes((opcode | fin << 7, 128 | length))
    elif length < 65536:
        head = bytes((opcode | fin << 7, 128 | 126)) + struct.pack(">H", length)
    else:
        head = bytes((opcode | fin << 7, 128 | 127)) + struct.pack(">Q", length)
    return head + b"\0\0\0\0" + payload
