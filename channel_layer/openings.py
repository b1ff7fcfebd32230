"""Openings: the only part of a client connection that goes through a normal channel.

An opening is what a worker needs to start an application instance: the scope, where to answer, and the
first event if there is one already. It is one element of ``http.request`` or ``websocket.connect``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from channel_layer.connection import WINDOW_BYTES, WINDOW_BYTES_MIN
from channel_layer.errors import WireError, repr_short
from channel_layer.frames import WIRE_VERSION, WIRE_VERSION_PREVIOUS

__all__ = [
    "FIRST_BODY_BYTES_MAX",
    "NO_BODY",
    "NO_BODY_ENCODED",
    "SAFE_METHODS",
    "Opening",
    "decode_opening",
    "encode_opening",
    "pack_opening",
]

# The first piece of a request body travels with the opening: most forms and API calls fit, and 4096 waiting
# openings then cost 32 MiB of broker memory at most for bodies.
FIRST_BODY_BYTES_MAX: Final = 8 * 1024

# RFC 9110 section 9.2.1, without TRACE, which no server of ours passes on. Such a request starts with the claim, and
# may run a second time when the first one was lost.
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})

# The first event of a request without a body, which most have: not worth encoding and decoding each time. Whoever
# hands it to an application copies it.
NO_BODY: Final = {"type": "http.request", "body": b"", "more_body": False}

# Shared, so its buffer is allocated once.
_pack: Callable[[object], bytes] = msgpack.Packer(use_bin_type=True, autoreset=True).pack

NO_BODY_ENCODED: Final = _pack(NO_BODY)


@dataclass(slots=True, kw_only=True)  # not frozen: each request makes two, for 1 us more each
class Opening:
    """A connection that looks for a worker.

    ``scope`` is the ASGI scope without what only the worker knows (``state``); ``interface`` is the process id of
    the interface server and ``connection`` the number there; ``first_event`` is an encoded event, counted
    against the connection's window like any EVENT; ``tell_receiving`` asks for a RECEIVING frame at the
    application's first receive() (``Expect: 100-continue``); ``window_bytes`` is the window of the connection, each
    way: the interface server's setting, so that the two ends cannot disagree. ``is_handover``: the connection had an
    owner, and looks for another; then ``scope`` holds the type only, and no headers; all else comes with ADOPT.
    ``version`` is the wire that the interface server speaks: it gets no frames that are newer.
    """

    interface: str
    connection: int
    epoch: int
    reply_channel: str
    scope: dict[str, Any]
    first_event: bytes | None
    tell_receiving: bool = False
    window_bytes: int = WINDOW_BYTES
    is_handover: bool = False
    version: int = WIRE_VERSION


def encode_opening(opening: Opening) -> bytes:
    """Encode an opening; the scope was built by us of ASGI types only and is not checked again."""
    return _pack(
        [
            opening.version,
            opening.interface,
            opening.connection,
            opening.epoch,
            opening.reply_channel,
            opening.scope,
            opening.first_event,
            opening.tell_receiving,
            opening.window_bytes,
            *((True,) if opening.is_handover else ()),  # a release that does not know it ignores it
        ]
    )


def pack_opening(
    version: int,
    interface: str,
    connection: int,
    epoch: int,
    reply_channel: str,
    scope: dict[str, Any],
    first_event: bytes | None,
    tell_receiving: bool,
    window_bytes: int,
) -> bytes:
    """As ``encode_opening`` of one that is no hand-over, without making an Opening for each request."""
    return _pack(
        (version, interface, connection, epoch, reply_channel, scope, first_event, tell_receiving, window_bytes)
    )


def decode_opening(data: bytes) -> Opening:
    """Decode an opening. Raises WireError for anything this release does not write."""
    try:
        fields = msgpack.unpackb(data, raw=False)
    except Exception as error:  # msgpack raises half a dozen unrelated types
        raise WireError(f"opening of {len(data)} bytes is not msgpack: {error}") from error
    if not isinstance(fields, list) or len(fields) < 9 or fields[0] not in (WIRE_VERSION, WIRE_VERSION_PREVIOUS):
        raise WireError(
            f"opening is not an array of version {WIRE_VERSION_PREVIOUS} or {WIRE_VERSION}: {repr_short(fields)}"
        )
    version, interface, connection, epoch, reply_channel, scope, first_event, tell_receiving, window = fields[:9]
    is_handover = len(fields) > 9 and fields[9] is True
    if (
        type(interface) is not str
        or type(connection) is not int
        or type(epoch) is not int
        or type(reply_channel) is not str
        or type(scope) is not dict
        or not (first_event is None or type(first_event) is bytes)
        or type(tell_receiving) is not bool
        or type(window) is not int
        or window < WINDOW_BYTES_MIN
    ):
        raise WireError(f"opening has malformed fields: {repr_short(fields[:5])}")
    return Opening(
        interface=interface,
        connection=connection,
        epoch=epoch,
        reply_channel=reply_channel,
        scope=scope,
        first_event=first_event,
        tell_receiving=tell_receiving,
        window_bytes=window,
        is_handover=is_handover,
        version=version,
    )
