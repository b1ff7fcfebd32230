"""What a protocol module wants done: bytes to write, and how the exchange ends. Carried out by the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, NamedTuple

from channel_layer.enums import quick

__all__ = ["NOTHING", "End", "Output"]


@quick
class End(Enum):
    """The exchange is over; what becomes of its socket."""

    KEEP = "the response is complete; the next request may come"
    CLOSE = "the response is complete; close when it is written"
    CUT = "the response is incomplete and its framing shows that; close when it is written"
    # RFC 9112 section 8: without length and chunks only an error on the connection shows that something is missing.
    RESET = "the response is incomplete and only a reset shows that; abort"


class Output(NamedTuple):
    """One step. ``data`` is written at once and in order; then ``end``, if it is not None."""

    data: Sequence[Any] = ()  # bytes; in HTTP/2 what http2_exchange.py says
    end: End | None = None
    problem: str | None = None  # a fault of the application, for the log


NOTHING: Final = Output()
