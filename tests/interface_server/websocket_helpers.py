"""What the tests of the WebSocket modules share: requests, a client's frames, a fake of connections.py."""

from collections.abc import Callable

from interface_server.client import Refusal
from interface_server.protocol.request import Peer, RequestHead
from interface_server.settings import InterfaceSettings

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455 section 1.3, with its answer:
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

UPGRADE_HEADERS = [
    (b"host", b"example.org"),
    (b"upgrade", b"websocket"),
    (b"connection", b"Upgrade"),
    (b"sec-websocket-key", KEY),
    (b"sec-websocket-version", b"13"),
]
PEER = Peer(client=("192.0.2.1", 5000), server=("192.0.2.2", 80))


def build_head(headers=UPGRADE_HEADERS, *, extra=(), without=(), method="GET", http_version="1.1", path=b"/ws"):
    kept = [header for header in headers if header[0] not in without]
    return RequestHead(
        method=method, raw_path=path, query_string=b"a=1", http_version=http_version, headers=[*kept, *extra]
    )


def build_settings(**changes):
    return InterfaceSettings(redis_url="redis://nowhere.invalid", **changes)


def client_frame(opcode, payload=b"", *, fin=True, mask: bytes | None = b"", rsv=0, length: int | None = None):
    """A frame as a client sends it. ``mask`` None: unmasked; ``length`` claims another one than is there."""
    if mask == b"":
        mask = b"\x37\xfa\x21\x3d"  # the one of RFC 6455 section 5.7: any will do, and tests should repeat
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    size = len(payload) if length is None else length
    bit = 0 if mask is None else 0x80
    if size < 126:
        head = bytes((first, bit | size))
    elif size < 65536:
        head = bytes((first, bit | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, bit | 127)) + size.to_bytes(8, "big")
    if mask is None:
        return head + payload
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


def client_close(code: int | None = None, reason=b""):
    return client_frame(8, b"" if code is None else code.to_bytes(2, "big") + reason)


class FakeConnection:
    """Stands for client_connection.ClientConnection; ``application`` answers what the client sends."""

    def __init__(self, hub, client, scope):
        self.hub = hub
        self.client = client
        self.scope = scope
        self.number = len(hub.opened) + 1
        self.reply_channel = f"interface.test!{self.number}"
        self.events = []
        self.last_event = None
        self.is_accepting = False
        self.is_delivery_paused = False
        self.delivery_calls = []

    # What ClientConnection offers to its client.

    def send_event(self, event):
        assert self.last_event is None, "an event behind the last one"
        self.events.append(event)
        if self.hub.application is not None:
            self.hub.application(self, event)

    def client_gone(self, event):
        if self.client is not None:
            self.client = None
            self.last_event = event
            if self.hub.on_gone is not None:
                self.hub.on_gone(self)

    finished = client_gone

    def pause_delivery(self):
        self.is_delivery_paused = True
        self.delivery_calls.append("pause")

    def resume_delivery(self):
        self.is_delivery_paused = False
        self.delivery_calls.append("resume")

    def accept_broadcasts(self):
        self.is_accepting = True

    # What the application's side would do.

    def send(self, event):
        self.client.application_event(event)

    def ended(self, outcome):
        client, self.client = self.client, None
        client.application_ended(outcome)

    def refuse(self, refusal: Refusal):
        client, self.client = self.client, None
        client.refused(refusal)


class FakeConnections:
    def __init__(self):
        self.opened = []
        self.application: Callable | None = None
        self.on_open: Callable | None = None
        self.on_gone: Callable | None = None
        self.away_s = 0.0

    def broker_away_s(self):
        return self.away_s

    def open(self, client, *, protocol, scope, first_event, tell_receiving=False):
        assert protocol == "websocket"
        assert first_event == {"type": "websocket.connect"}
        assert not tell_receiving
        connection = FakeConnection(self, client, scope)
        self.opened.append(connection)
        if self.on_open is not None:
            self.on_open(connection)
        return connection
