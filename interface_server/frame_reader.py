"""From a client's bytes to messages, pings, Closes and faults: WebSocket frames, read by Autobahn.

The only module that knows Autobahn, and Autobahn is a frame reader here and nothing else. Its handshake is not
used (protocol/websocket_handshake.py), its timers neither (deadlines.py), nor its state of the connection
(protocol/websocket_session.py), nor its writing: a server's frame is a header in front of the payload
(protocol/websocket_frames.py), and only frames that we build can be shared by all receivers of a broadcast.

**The short way.** Autobahn takes 6.5 us for a small frame, half of it for a masker in C and the rest for hooks that
do nothing here. So what nearly every frame is, a whole message of text or bytes that is all there while Autobahn is
in the middle of nothing, is read by ``_read_whole_messages`` in 1.3 us. What floods consist of, pings, pongs and
short fragments, ``_read_short_frames`` reads in about as much, with Autobahn's own state of the message, so that
both can read parts of it. Everything else, and everything wrong, goes to Autobahn: the short ways know no faults but
those of the content.

**Compression** (protocol/deflate.py): Autobahn checks where a compressed frame may stand; inflating is ours, for it
must stop at the size that a message may have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from autobahn.websocket.protocol import TrafficStats, WebSocketServerProtocol
from autobahn.websocket.utf8validator import Utf8Validator
from autobahn.websocket.xormasker import create_xor_masker  # type: ignore[attr-defined]

from interface_server.protocol.deflate import CorruptMessage, Inflater, MessageTooLarge, inflate

__all__ = ["TURN_FRAMES_MAX", "FrameReader"]

# First bytes of frames that are a whole message: FIN, and the opcode of text or binary.
_TEXT: Final = 0x81
_BINARY: Final = 0x82
_COMPRESSED_TEXT: Final = 0xC1
_COMPRESSED_BINARY: Final = 0xC2
# … of the other frames that are read without Autobahn.
_PING: Final = 0x89
_PONG: Final = 0x8A
_FIRST_OF_TEXT: Final = 0x01
_FIRST_OF_BINARY: Final = 0x02
_MIDDLE: Final = 0x00
_LAST: Final = 0x80

# Up to here the mask is taken off as one large number (128 bytes: 0.5 us), beyond by Autobahn's masker (3 us for
# 1 KiB and 8 us for 64 KiB; as a number 2.2 and 165).
_NUMBER_BYTES_MAX: Final = 1024

# So many frames of a client are read in one turn of the loop: 0.5 ms with what becomes of them. One read may hold
# 10,922 pings, and everybody else would wait for all of them, at each of the four or five turns that an answer takes.
# The rest waits, with the transport paused, for another turn (turns.py).
TURN_FRAMES_MAX: Final = 64

# A message of many fragments is joined when it has so many pieces: each is an object of some 35 bytes beside its
# content, and a message of 16 MiB may come in fragments of one byte.
_PIECES_MAX: Final = 256


class _DeflateIsAgreed:
    """Stands for Autobahn's extension, by which it knows that a first frame may have RSV1; inflates nothing."""

    EXTENSION_NAME = "permessage-deflate"

    @staticmethod
    def start_decompress_message() -> None:
        pass

    @staticmethod
    def end_decompress_message() -> None:
        pass


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
        window_bits: int | None = None,
        turn_over: Callable[[], None] | None = None,
    ) -> None:
        """``window_bits``: what the client may compress with; None: messages must not be compressed.

        ``turn_over`` is called when enough was read for one turn of the loop (``is_behind``): stop feeding, and call
        ``next_turn`` in the next one. None: all is read at once.
        """
        self._message = message
        self._ping = ping
        self._close_frame = close_frame
        self._fault = fault
        self._message_bytes_max = message_bytes_max  # beyond: fault 1009
        self._turn_over = turn_over
        self._left = TURN_FRAMES_MAX  # frames of this turn
        self.is_behind = False  # frames wait for the next turn
        self._is_paused = False
        self._is_stopped = False  # by a Close or a fault: nothing behind it means anything (RFC 6455 section 5.5.1)
        self._is_running = False  # a call of _run is under way
        # What came and is not read yet: only while we are paused or running, so bounded by what the transport reads
        # at once. The first _at bytes of it are read.
        self._unfed = b""
        self._at = 0
        self._pieces: list[bytes] = []  # of the message that is coming in
        self._joined: bytearray | None = None  # its earlier pieces, once there are many
        self._is_binary = False  # the message that is coming in
        self._message_bytes = 0  # of it, as its frames announce
        self._window_bits = window_bits
        self._inflater: Inflater | None = None  # of the message that is coming in, if it is compressed
        # Autobahn's.
        self._perMessageCompress: Any = None if window_bits is None else _DeflateIsAgreed
        self.state = self.STATE_OPEN
        self.data = b""
        self.inside_message = False
        self.current_frame: Any = None
        self.control_frame_data: Any = None
        self.utf8validateIncomingCurrentMessage = False

    def __repr__(self) -> str:
        return (
            f"<FrameReader paused={self._is_paused} stopped={self._is_stopped} "
            f"buffered={len(self.data) + self.unread_bytes} message={self._message_bytes}>"
        )

    @property
    def unread_bytes(self) -> int:
        """What waits to be read: for ``resume``, or for the next turn."""
        return len(self._unfed) - self._at

    def feed(self, data: bytes) -> None:
        """Read what the client sent. What is read while paused waits."""
        if self._is_stopped:
            return
        if self._unfed:
            self._unfed = self._unfed[self._at :] + data
            self._at = 0
        else:
            self._unfed = data
        if not self._is_paused and not self._is_running and not self.is_behind:
            self._left = TURN_FRAMES_MAX
            self._run()

    def next_turn(self) -> None:
        """Go on behind ``turn_over``."""
        self.is_behind = False
        self._left = TURN_FRAMES_MAX
        if not self._is_paused and not self._is_running and not self._is_stopped:
            self._run()

    def pause(self) -> None:
        """Call nothing any more after the present call, until ``resume``."""
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        if not self._is_running and not self._is_stopped and not self.is_behind:
            self._run()

    def stop(self) -> None:
        """Read nothing any more."""
        self._is_stopped = True
        self.data = self._unfed = b""
        self._at = 0
        self._pieces = []
        self._joined = None
        self._inflater = None

    def _run(self) -> None:
        self._is_running = True
        try:
            while not self._is_paused and not self._is_stopped:
                if self._left <= 0 and self._turn_over is not None and self._at < len(self._unfed):
                    self.is_behind = True
                    self._turn_over()
                    return
                if (
                    self.current_frame is None
                    and not self.inside_message
                    and not self.data
                    and not self._read_whole_messages()
                ):
                    continue
                if self._at >= len(self._unfed):
                    self._unfed = b""
                    self._at = 0
                    return
                if self.current_frame is None and not self.data and self._read_short_frames():
                    continue
                self._left -= 1
                self._feed_autobahn()
        finally:
            self._is_running = False

    def _read_whole_messages(self) -> bool:
        """Read frames that are a whole message each. True: what comes next, if anything, is something else."""
        unfed = self._unfed
        at = self._at
        end_of_all = len(unfed)
        window_bits = self._window_bits
        while end_of_all - at >= 6:
            kind = unfed[at]
            if (
                kind != _TEXT
                and kind != _BINARY
                and (window_bits is None or (kind != _COMPRESSED_TEXT and kind != _COMPRESSED_BINARY))
            ):
                return True
            length = unfed[at + 1] - 0x80  # less than 0: not masked
            start = at + 6
            if length >= 126:
                # 127 stands for a length in 64 bits, which is more than one read.
                if length == 127 or end_of_all - at < 8:
                    return True
                length = unfed[at + 2] << 8 | unfed[at + 3]
                if length < 126:
                    return True
                start = at + 8
            end = start + length
            if length < 0 or end > end_of_all or length > self._message_bytes_max:
                return True
            payload = unfed[start:end]
            mask = unfed[start - 4 : start]
            if length <= _NUMBER_BYTES_MAX:
                pattern = (mask * ((length + 3) >> 2))[:length]
                payload = (int.from_bytes(payload, "big") ^ int.from_bytes(pattern, "big")).to_bytes(length, "big")
            else:
                payload = create_xor_masker(mask, length).process(payload)  # type: ignore[no-untyped-call]
            self._at = at = end
            if kind >= _COMPRESSED_TEXT:
                assert window_bits is not None
                try:
                    payload = inflate(payload, window_bits=window_bits, message_bytes_max=self._message_bytes_max)
                except (MessageTooLarge, CorruptMessage) as error:
                    self._inflating_failed(error)
                    return False
            if kind & 1:
                try:
                    text = payload.decode()
                except UnicodeDecodeError:
                    self._fail(1007, "text that is not UTF-8")
                    return False
                self._message(text)
            else:
                self._message(payload)
            self._left -= 1
            # Whoever was called may have paused, stopped or fed us.
            if self._is_paused or self._unfed is not unfed or self._left == 0:
                return False
        return True

    def _read_short_frames(self) -> bool:
        """Read pings, pongs and fragments that are all there and short. False: what comes next is none of these."""
        unfed = self._unfed
        at = self._at
        end_of_all = len(unfed)
        has_read = False
        while end_of_all - at >= 6:
            kind = unfed[at]
            length = unfed[at + 1] - 0x80
            start = at + 6
            end = start + length
            if not 0 <= length < 126 or end > end_of_all:
                return has_read
            if kind in (_MIDDLE, _LAST):
                if not self.inside_message or self._isMessageCompressed:
                    return has_read
            elif kind in (_FIRST_OF_BINARY, _FIRST_OF_TEXT):
                if self.inside_message:
                    return has_read
            elif kind != _PING and kind != _PONG:
                return has_read
            payload = b""
            if length:
                pattern = (unfed[start - 4 : start] * ((length + 3) >> 2))[:length]
                mask = int.from_bytes(pattern, "big")
                payload = (int.from_bytes(unfed[start:end], "big") ^ mask).to_bytes(length, "big")
            self._at = at = end
            self._left -= 1
            has_read = True
            if kind == _PING:
                self._ping(payload)
            elif kind != _PONG:
                self._fragment(kind, payload)
            # Whoever was called may have paused, stopped or fed us.
            if self._is_paused or self._unfed is not unfed or self._left <= 0:
                return True
        return has_read

    def _fragment(self, kind: int, payload: bytes) -> None:
        """Take a whole frame of a message that has others and is not compressed, as Autobahn would."""
        if kind in (_FIRST_OF_TEXT, _FIRST_OF_BINARY):
            self.inside_message = True
            self._isMessageCompressed = False
            self.utf8validateIncomingCurrentMessage = False
            self._onMessageBegin(kind == _FIRST_OF_BINARY)
            if kind == _FIRST_OF_TEXT:
                self._validate_as_it_comes()
        self._message_bytes += len(payload)
        if self._message_bytes > self._message_bytes_max:
            self._fail_too_large()
            return
        if self.utf8validateIncomingCurrentMessage and payload:
            self.utf8validateLast = self.utf8validator.validate(payload)
            if not self.utf8validateLast[0]:
                self._invalid_payload("")
                return
        self._onMessageFrameData(payload)
        if kind == _LAST:
            # A text that ends within a character is found by decoding it.
            self.inside_message = False
            self._onMessageEnd()

    def _validate_as_it_comes(self) -> None:
        """Check the UTF-8 of this text piece by piece, so that a wrong byte is a fault when it comes."""
        self.utf8validator: Any = Utf8Validator()  # type: ignore[no-untyped-call]
        self.utf8validateIncomingCurrentMessage = True
        self.utf8validateLast = (True, True, 0, 0)

    def _feed_autobahn(self) -> None:
        """Have Autobahn read one frame, or what there is of it: given more, it copies the rest at each frame."""
        if self.current_frame is not None:
            end = self._at + self.current_frame.length - self.current_frame_masker.pointer()
        else:
            if self.data:  # the beginning of a head
                self._unfed = self.data + self._unfed[self._at :]
                self._at = 0
            end = _frame_end(self._unfed, self._at)
        self.data = self._unfed[self._at : end]
        self._at = end
        while self.processData() and not self._is_stopped:
            pass

    # Called by Autobahn

    def _onMessageBegin(self, isBinary: bool) -> None:
        self._is_binary = isBinary
        self._message_bytes = 0
        if self._isMessageCompressed:
            assert self._window_bits is not None
            self._inflater = Inflater(self._window_bits, self._message_bytes_max)

    def _onMessageFrameBegin(self, length: int) -> None:
        self._message_bytes += length
        limit = self._message_bytes_max
        if self._inflater is not None:
            limit = 2 * limit + 1024  # of what it inflates to, the limit is kept while it inflates
        if self._message_bytes > limit:
            self._fail_too_large()
            return
        frame = self.current_frame
        if frame.opcode == self.MESSAGE_TYPE_TEXT and not (frame.fin and length <= len(self.data)):
            # Not complete yet. A text that is all there is checked by decoding it.
            self._validate_as_it_comes()

    def onFrameData(self, payload: bytes) -> bool | None:
        if self._inflater is None or self.current_frame.opcode > 7:
            result: bool | None = super().onFrameData(payload)
            return result
        return self._inflate(self._inflater.feed, payload)

    def _inflate(self, step: Callable[..., bytes], *arguments: bytes) -> bool:
        """Take what an inflater gives as Autobahn would take a frame's payload. False: it was a fault."""
        try:
            payload = step(*arguments)
        except (MessageTooLarge, CorruptMessage) as error:
            self._inflating_failed(error)
            return False
        if self.utf8validateIncomingCurrentMessage:
            self.utf8validateLast = self.utf8validator.validate(payload)
            if not self.utf8validateLast[0]:
                self._invalid_payload("")
                return False
        self._onMessageFrameData(payload)
        return True

    def _onMessageFrameData(self, payload: bytes) -> None:
        if payload and not self._is_stopped:
            self._pieces.append(payload)
            if len(self._pieces) >= _PIECES_MAX:
                if self._joined is None:
                    self._joined = bytearray()
                self._joined += b"".join(self._pieces)
                self._pieces.clear()

    def _onMessageFrameEnd(self) -> None:
        inflater = self._inflater
        if inflater is not None and self.current_frame.fin:
            self._inflater = None
            self._inflate(inflater.finish)

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

    def _inflating_failed(self, error: Exception) -> None:
        if isinstance(error, MessageTooLarge):
            self._fail_too_large()
        else:
            self._fail(1007, "a compressed message that cannot be inflated")

    def _fail_too_large(self) -> None:
        self._fail(1009, f"message larger than {self._message_bytes_max} bytes")

    def _fail(self, code: int, reason: str) -> None:
        if not self._is_stopped:
            self.stop()
            self._fault(code, reason)


def _frame_end(data: bytes, at: int) -> int:
    """Where the frame ends that begins at ``at``, as its head says; the end of ``data`` if that comes first."""
    size = len(data) - at
    if size < 2:
        return len(data)
    length = data[at + 1] & 0x7F
    head = 2
    if length == 126:
        head = 4
    elif length == 127:
        head = 10
    if size < head:
        return len(data)
    if head > 2:
        length = int.from_bytes(data[at + 2 : at + head], "big")
    if data[at + 1] & 0x80:
        head += 4
    return min(len(data), at + head + length)
