"""The h2 library's connection, with what a server needs beyond it. No I/O.

    faults of one stream    reset that stream (RFC 9113 section 5.4.2); h2 ends the connection for most of them
    too many streams        refuse those beyond, which their client may try again; h2 ends the connection
    GOAWAY, from both       lets the streams that are there finish (section 6.8); h2 takes it for the end of all
    floods                  each frame that is cheap to send spends from a Budget (http2_budget.py)

h2 has one way to refuse a frame: an exception, upon which it writes a GOAWAY. Where only a stream is at fault, the
exception is caught here, before h2 hears of it, while its own state is what it was before the frame (of the
connection) and closed (of the stream). That takes methods of h2 that are not public: tests/…/test_http2_machine.py
notices when a release of h2 changes them. The alternative was a state machine of our own.
"""

from __future__ import annotations

from typing import Any, Final

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, H2Connection, _decode_headers
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, Event, StreamReset
from h2.exceptions import FlowControlError, InvalidBodyLengthError, ProtocolError, StreamClosedError
from h2.settings import SettingCodes, Settings
from h2.stream import StreamClosedBy
from hpack import HPACKError
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    RstStreamFrame,
    SettingsFrame,
)

from interface_server.protocol.http2_budget import Budget, Cost

__all__ = ["Flood", "Http2Machine"]

# What a client may send on a stream beyond what its application has credit for; beyond it the client waits.
STREAM_WINDOW_BYTES: Final = 128 * 1024
# On the whole connection. It opens as bytes are read, so it bounds one read, not memory.
CONNECTION_WINDOW_BYTES: Final = 1024 * 1024
# More at a time are refused. What RFC 9113 section 6.5.2 recommends as the least.
STREAMS_MAX: Final = 100
# A header list may be so many times larger than what we announce: then it is refused (431). Beyond that the
# connection ends, for h2 stops reading the list, and the two ends no longer agree about the compression.
_LIST_FACTOR: Final = 4

_Result = tuple[list[Frame], list[Event]]


class Flood(ProtocolError):
    """The client has spent its budget."""

    error_code = ErrorCodes.ENHANCE_YOUR_CALM


class Http2Machine(H2Connection):
    """``receive_data`` raises ProtocolError when the connection is over; the GOAWAY is in ``data_to_send`` then."""

    def __init__(self, *, header_list_bytes_max: int, now: float) -> None:
        super().__init__(H2Configuration(client_side=False, header_encoding=None, validate_outbound_headers=False))
        self.now = now  # seconds; the caller sets it before each receive_data
        self.budget = Budget(now)
        # In force from the first frame, not from the client's acknowledgement on: h2 counts by this object.
        self.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS_MAX,
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
                SettingCodes.MAX_HEADER_LIST_SIZE: header_list_bytes_max,
                SettingCodes.ENABLE_CONNECT_PROTOCOL: 1,
            },
        )
        self.decoder.max_header_list_size = header_list_bytes_max * _LIST_FACTOR
        self.initiate_connection()
        self.increment_flow_control_window(CONNECTION_WINDOW_BYTES - 65535)

    def __repr__(self) -> str:
        return f"<Http2Machine {self.state_machine.state.name} streams={len(self.streams)} {self.budget!r}>"

    def announce_end(self) -> None:
        """Write a GOAWAY: streams that come from now on will be refused, those that are there may finish."""
        self._prepare_for_sending([GoAwayFrame(0, last_stream_id=self.highest_inbound_stream_id)])

    def spend(self, cost: Cost) -> None:
        """Raises Flood."""
        if not self.budget.spend(cost, self.now):
            raise Flood(f"{cost.name} spent the rest of the budget")

    def send_data(self, stream_id: int, data: Any, end_stream: bool = False, pad_length: Any = None) -> None:
        super().send_data(stream_id, data, end_stream, pad_length)
        self.budget.earn()

    # Called by h2, for each frame that is complete

    def _receive_frame(self, frame: Frame) -> list[Event]:
        cost = self._cost_of(frame)
        if cost is not None:
            self.spend(cost)
        events = super()._receive_frame(frame)
        is_reset = False
        for event in events:
            if type(event) is StreamReset:
                is_reset = True
                self.spend(Cost.RESET)
        if type(frame) is RstStreamFrame and not is_reset:
            self.spend(Cost.CONTROL)
        return events

    def _cost_of(self, frame: Frame) -> Cost | None:
        kind = type(frame)
        if kind is HeadersFrame:
            self.budget.earn()
            return None
        if kind is RstStreamFrame:
            return None  # what it brings about is what it costs
        if isinstance(frame, DataFrame):
            # What is sent behind an early answer is of no stream, too: a client cannot know of the answer yet.
            is_idle = not frame.data and "END_STREAM" not in frame.flags
            stream = self.streams.get(frame.stream_id)
            return Cost.CONTROL if is_idle or stream is None or stream.closed else None
        if kind is SettingsFrame and "ACK" not in frame.flags:
            return Cost.SETTINGS
        # PING and answers to it, PRIORITY, WINDOW_UPDATE, GOAWAY, frames of types nobody knows.
        return Cost.CONTROL

    def _receive_headers_frame(self, frame: HeadersFrame) -> _Result:
        stream_id = frame.stream_id
        stream: Any = self.streams.get(stream_id)
        announced = None if stream is None else stream._expected_content_length
        try:
            if (
                stream is None
                and stream_id > self.highest_inbound_stream_id
                and stream_id % 2
                and self.open_inbound_streams >= STREAMS_MAX
            ):
                return self._refuse(frame)
            result = super()._receive_headers_frame(frame)
        except StreamClosedError:
            raise
        except ProtocolError as error:
            if isinstance(error.__cause__, HPACKError):
                if error.error_code == ErrorCodes.PROTOCOL_ERROR:
                    # RFC 9113 section 4.3: behind it the two ends do not agree about what is compressed how.
                    error.error_code = ErrorCodes.COMPRESSION_ERROR
                raise
            if stream_id not in self.streams:
                raise  # a stream cannot have this number: RFC 9113 section 5.1.1
            return self._reset(stream_id, ErrorCodes.PROTOCOL_ERROR)
        if "END_STREAM" in frame.flags:
            # RFC 9113 section 8.1.1. h2 looks at DATA only, and forgets the length when trailers come.
            stream = self.streams[stream_id]
            length = announced if announced is not None else stream._expected_content_length
            if length is not None and length != stream._actual_content_length:
                return self._reset(stream_id, ErrorCodes.PROTOCOL_ERROR)
        return result

    def _refuse(self, frame: HeadersFrame) -> _Result:
        """Do not begin a stream. Its fields are read all the same: later ones may refer to them."""
        stream_id = frame.stream_id
        _decode_headers(self.decoder, frame.data)
        self.state_machine.process_input(ConnectionInputs.RECV_HEADERS)
        self.highest_inbound_stream_id = stream_id
        self._closed_streams[stream_id] = StreamClosedBy.SEND_RST_STREAM
        self.spend(Cost.RESET)
        return [RstStreamFrame(stream_id, error_code=ErrorCodes.REFUSED_STREAM)], []

    def _receive_data_frame(self, frame: DataFrame) -> _Result:
        try:
            return super()._receive_data_frame(frame)
        except InvalidBodyLengthError:
            code = ErrorCodes.PROTOCOL_ERROR
        except FlowControlError:
            if self.inbound_flow_control_window < 0:
                raise  # the window of the whole connection
            code = ErrorCodes.FLOW_CONTROL_ERROR
        if frame.flow_controlled_length:
            # Nobody else will: it is of no stream any more.
            self.increment_flow_control_window(frame.flow_controlled_length)
        return self._reset(frame.stream_id, code)

    def _receive_rst_stream_frame(self, frame: RstStreamFrame) -> _Result:
        if frame.stream_id > self.highest_inbound_stream_id or not frame.stream_id % 2:
            raise ProtocolError(f"RST_STREAM of stream {frame.stream_id}, which is idle")  # RFC 9113 section 6.4
        return super()._receive_rst_stream_frame(frame)

    def _receive_naked_continuation(self, frame: ContinuationFrame) -> None:
        raise ProtocolError("CONTINUATION without HEADERS")  # RFC 9113 section 6.10

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> _Result:
        event = ConnectionTerminated()
        event.error_code = frame.error_code
        event.last_stream_id = frame.last_stream_id
        event.additional_data = frame.additional_data or None
        return [], [event]

    def _reset(self, stream_id: int, code: ErrorCodes) -> _Result:
        stream: Any = self.streams[stream_id]
        if stream.closed:  # by the exception
            stream.state_machine.stream_closed_by = StreamClosedBy.SEND_RST_STREAM
            frames: list[Frame] = [RstStreamFrame(stream_id, error_code=code)]
        else:
            frames = stream.reset_stream(code)
        return frames, [StreamReset(stream_id=stream_id, error_code=code, remote_reset=False)]
