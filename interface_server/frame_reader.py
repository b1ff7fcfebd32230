"""From a client's bytes to messages, pings, Closes and faults: WebSocket frames, read by Autobahn.

The only module that knows Autobahn, and Autobahn is a frame reader here and nothing else. Its handshake is not
used (protocol/websocket_handshake.py), its timers neither (deadlines.py), nor its state of the connection
(protocol/websocket_session.py), nor its writing: a server's frame is a header in front of the payload
(protocol/websocket_frames.py), and only frames that we build can be shared by all receivers of a broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from autobahn.websocket.protocol import TrafficStats, WebSocketServerProtocol
from autobahn.websocket.utf8validator import Utf8Validator

__all__ = ["FrameReader"]

# Autobahn copies what it has not read yet at every frame, so small frames are fed in small pieces; the payload of
# a large frame is fed as it comes.
_PIECE_BYTES: Final = 4096

# A message of many fragments is joined when it has so many pieces: each is an object of some 35 bytes beside its
# content, and a message of 16 MiB may come in fragments of one byte.
_PIECES_MAX: Final = 256


class FrameReader(WebSocketServerProtocol):
    """Turns a client's bytes into calls of four functions, and can be stopped between any two frames.

    ``__init__`` sets those fields of Autobahn's that reading frames uses. Autobahn's own ``__init__`` and
    ``_connectionMade`` are not called: they make two Deferreds and timers and format the whole configuration for a
    log line that nobody reads (0.3 ms). The tests walk through every path of the reading.
    """

    # Autobahn's configuration, the same for all.
    class _Server:
        isServer = True

    factory = _Server
    requireMaskedClientFrames = True
    applyMask = True
    utf8validateIncoming = False  # switched on for a message that comes in parts, see _onMessageFrameBegin
    logFrames = False
    logOctets = False
    failByDrop = False
    trackedTimings: Any = None
    autoPingPending = None
    autoPingTimeoutCall = None
    _perMessageCompress = None
    _isMessageCompressed = False
    # Counts all data messages of the process; Autobahn wants one.
    trafficStats: Any = TrafficStats()  # type: ignore[no-untyped-call]

    def __init__(
        self,
        *,
        message: Callable[[str | bytes], None],
        ping: Callable[[bytes], None],
        close_frame: Callable[[bytes], None],
        fault: Callable[[int, str], None],
        message_bytes_max: int,
    ) -> None:
        self._message = message
        self._ping = ping
        self._close_frame = close_frame
        self._fault = fault
        self._message_bytes_max = message_bytes_max  # beyond: fault 1009
        self._is_paused = False
        self._is_stopped = False  # by a Close or a fault: nothing behind it means anything (RFC 6455 section 5.5.1)
        self._is_running = False  # a call of _run is under way
        self._unfed = b""  # came while we were paused or running; bounded by what the transport reads at once
        self._pieces: list[bytes] = []  # of the message that is coming in
        self._joined: bytearray | None = None  # its earlier pieces, once there are many
        self._is_binary = False  # the message that is coming in
        self._message_bytes = 0  # of it, as its frames announce
        # Autobahn's.
        self.state = self.STATE_OPEN
        self.data = b""
        self.inside_message = False
        self.current_frame: Any = None
        self.control_frame_data: Any = None
        self.utf8validateIncomingCurrentMessage = False

    def __repr__(self) -> str:
        return (
            f"<FrameReader paused={self._is_paused} stopped={self._is_stopped} "
            f"buffered={len(self.data) + len(self._unfed)} message={self._message_bytes}>"
        )

    def feed(self, data: bytes) -> None:
        """Read what the client sent. What is read while paused waits."""
        if self._is_stopped:
            return
        self._unfed = self._unfed + data if self._unfed else data
        if not self._is_paused and not self._is_running:
            self._run()

    def pause(self) -> None:
        """Call nothing any more after the present call, until ``resume``."""
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        if not self._is_running and not self._is_stopped:
            self._run()

    def stop(self) -> None:
        """Read nothing any more."""
        self._is_stopped = True
        self.data = self._unfed = b""
        self._pieces = []
        self._joined = None

    def _run(self) -> None:
        self._is_running = True
        try:
            while True:
                while not self._is_paused and not self._is_stopped and self.processData():
                    pass
                if self._is_paused or not self._unfed:
                    return
                self._feed_piece()
        finally:
            self._is_running = False

    def _feed_piece(self) -> None:
        unfed = self._unfed
        frame = self.current_frame
        size = _PIECE_BYTES
        if frame is not None:
            size = max(size, frame.length - self.current_frame_masker.pointer())
        if len(unfed) <= size:
            piece, self._unfed = unfed, b""
        else:
            piece, self._unfed = unfed[:size], unfed[size:]
        self.data = self.data + piece if self.data else piece

    # Called by Autobahn

    def _onMessageBegin(self, isBinary: bool) -> None:
        self._is_binary = isBinary
        self._message_bytes = 0

    def _onMessageFrameBegin(self, length: int) -> None:
        self._message_bytes += length
        if self._message_bytes > self._message_bytes_max:
            self._fail(1009, f"message larger than {self._message_bytes_max} bytes")
            return
        frame = self.current_frame
        if frame.opcode == self.MESSAGE_TYPE_TEXT and not (frame.fin and length <= len(self.data)):
            # Not complete yet: let Autobahn check the UTF-8 piece by piece, so that a wrong byte is a fault when
            # it comes. A text that is all there is checked by decoding it.
            self.utf8validator: Any = Utf8Validator()  # type: ignore[no-untyped-call]
            self.utf8validateIncomingCurrentMessage = True
            self.utf8validateLast = (True, True, 0, 0)

    def _onMessageFrameData(self, payload: bytes) -> None:
        if payload and not self._is_stopped:
            self._pieces.append(payload)
            if len(self._pieces) >= _PIECES_MAX:
                if self._joined is None:
                    self._joined = bytearray()
                self._joined += b"".join(self._pieces)
                self._pieces.clear()

    def _onMessageFrameEnd(self) -> None:
        pass

    def _onMessageEnd(self) -> None:
        pieces, joined = self._pieces, self._joined
        self._pieces, self._joined = [], None
        if self._is_stopped:
            return
        if joined is not None:
            joined += b"".join(pieces)
            payload = bytes(joined)
        else:
            payload = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if self._is_binary:
            self._message(payload)
            return
        try:
            text = payload.decode()
        except UnicodeDecodeError:
            self._fail(1007, "text that is not UTF-8")
            return
        self._message(text)

    def processControlFrame(self) -> bool:
        payload = b"".join(self.control_frame_data)
        self.control_frame_data = None
        opcode = self.current_frame.opcode
        if opcode == 8:
            self.stop()
            self._close_frame(payload)
        elif opcode == 9:
            self._ping(payload)
        # A pong needs no answer: that anything came at all is what the ping asked for.
        return True

    def _protocol_violation(self, reason: str) -> bool:
        self._fail(1002, reason)
        return True  # read no further

    def _invalid_payload(self, reason: str) -> bool:
        self._fail(1007, "text that is not UTF-8")
        return True

    def _fail(self, code: int, reason: str) -> None:
        if not self._is_stopped:
            self.stop()
            self._fault(code, reason)
