"""A WebSocket client over HTTP/2 (RFC 8441): frames of wsproto's kind, built here, in the DATA of one stream."""

import os
import struct

__all__ = ["H2WebSocket"]


class H2WebSocket:
    def __init__(self, client, path, *, headers=()):
        self.client = client
        self.stream_id = client.h2.get_next_available_stream_id()
        fields = [
            *((b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"http")),
            *((b":path", path.encode()), (b":authority", b"localhost"), (b"sec-websocket-version", b"13"), *headers),
        ]
        client.h2.send_headers(self.stream_id, fields)
        client.flush()
        self.stream = client.streams[self.stream_id]
        client.read_until(lambda: self.stream.headers is not None or self.stream.is_over)

    def send(self, payload, opcode=2):
        self.client.send(self.stream_id, self.build_frame(payload, opcode))

    @staticmethod
    def build_frame(payload, opcode=2):
        mask = os.urandom(4)
        size = len(payload)
        if size < 126:
            length = bytes((0x80 | size,))
        elif size < 65536:
            length = b"\xfe" + struct.pack("!H", size)
        else:
            length = b"\xff" + struct.pack("!Q", size)
        repeated = (mask * (size // 4 + 1))[:size]
        masked = (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(size, "big")
        return bytes((0x80 | opcode,)) + length + mask + masked

    def receive(self):
        """Return opcode and payload of the next frame."""
        self.client.read_until(lambda: len(self.stream.body) >= 2)
        size = self.stream.body[1] & 0x7F
        header = {126: 4, 127: 10}.get(size, 2)
        self.client.read_until(lambda: len(self.stream.body) >= header)
        if header > 2:
            size = int.from_bytes(self.stream.body[2:header], "big")
        self.client.read_until(lambda: len(self.stream.body) >= header + size)
        frame, self.stream.body = self.stream.body[: header + size], self.stream.body[header + size :]
        return frame[0] & 0x0F, frame[header:]
