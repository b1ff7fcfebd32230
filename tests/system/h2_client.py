"""A blocking HTTP/2 client on the h2 library that does what it is told, also what no decent client does."""

import socket
import time
from collections import defaultdict

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    InformationalResponseReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)


class Stream:
    """What has come on one stream."""

    def __init__(self):
        self.interim = []
        self.headers = None
        self.body = b""
        self.trailers = None
        self.is_ended = False
        self.reset = None  # error code

    @property
    def status(self):
        return None if self.headers is None else int(dict(self.headers)[b":status"])

    @property
    def is_over(self):
        return self.is_ended or self.reset is not None


class H2Client:
    """``grants``: whether what was read is granted to the server again."""

    def __init__(self, port, *, wrap=None, grants=True, timeout_s=60):
        self.socket = socket.create_connection(("127.0.0.1", port))
        if wrap is not None:
            self.socket = wrap(self.socket)
        self.timeout_s = timeout_s
        self.grants = grants
        self.streams = defaultdict(Stream)
        self.goaway = None  # the last ConnectionTerminated
        self.is_closed = False  # by the server
        self.h2 = H2Connection(
            H2Configuration(client_side=True, header_encoding=None, validate_outbound_headers=False)
        )
        self.h2.initiate_connection()
        self.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def flush(self):
        self.socket.sendall(self.h2.data_to_send())

    def begin(self, path, *, method="GET", headers=(), ends=True):
        """Send the head of a request; return the stream's id."""
        stream_id = self.h2.get_next_available_stream_id()
        fields = [
            *((b":method", method.encode()), (b":scheme", b"http"), (b":path", path.encode())),
            *((b":authority", b"localhost"), *headers),
        ]
        self.h2.send_headers(stream_id, fields, end_stream=ends)
        self.flush()
        return stream_id

    def send(self, stream_id, data, *, ends=False):
        """Send data as far as the windows allow, waiting for them; TimeoutError carries what was sent."""
        sent = 0
        while sent < len(data):
            room = min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size)
            if self.streams[stream_id].is_over:
                return sent
            if room <= 0:
                try:
                    self.read_once()
                except TimeoutError:
                    raise TimeoutError(sent) from None
                continue
            piece = data[sent : sent + room]
            self.h2.send_data(stream_id, piece)
            self.flush()
            sent += len(piece)
        if ends:
            self.h2.end_stream(stream_id)
            self.flush()
        return sent

    def read_once(self):
        self.socket.settimeout(self.timeout_s)
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            self.is_closed = True
            return
        for event in self.h2.receive_data(data):
            self.apply(event)
        self.flush_quietly()

    def flush_quietly(self):
        try:
            self.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.is_closed = True

    def apply(self, event):
        match event:
            case ResponseReceived():
                self.streams[event.stream_id].headers = event.headers
            case InformationalResponseReceived():
                self.streams[event.stream_id].interim.append(event.headers)
            case DataReceived():
                self.streams[event.stream_id].body += event.data
                if self.grants and event.flow_controlled_length:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case TrailersReceived():
                self.streams[event.stream_id].trailers = event.headers
            case StreamEnded():
                self.streams[event.stream_id].is_ended = True
            case StreamReset():
                self.streams[event.stream_id].reset = event.error_code
            case ConnectionTerminated():
                self.goaway = event

    def read_until(self, condition, timeout_s=60):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert not self.is_closed, "the server has closed the connection"
            assert time.monotonic() < deadline, "not in time"
            self.read_once()

    def finish(self, stream_id):
        """Wait for the end of a stream; return it."""
        stream = self.streams[stream_id]
        self.read_until(lambda: stream.is_over)
        return stream

    def get(self, path, **options):
        return self.finish(self.begin(path, **options))

    def wait_closed(self):
        while not self.is_closed:
            self.read_once()
