"""Channels and groups: the ground floor of Trunkline, and what applications import.

    from channel_layer import get_channel_layer
    await get_channel_layer().group_send("room", {"type": "websocket.send", "text": "hello"})

    get_channel_layer     the layer of this process
    RedisChannelLayer     one with options of its own; the backend for Django Channels
    InMemoryChannelLayer  for tests: the same contract without a broker
    Publisher             send and group_send as plain calls, for scripts
    ChannelFull, MessageTooLarge, InvalidMessage    what they raise (errors.py has all)

What the calls do is said in base.ChannelLayer; docs/groups.md is the guide. Names are loaded at their first use, so
importing the package costs and does nothing; ``python publish.py`` loads the publisher only. Inside a worker
``get_channel_layer()`` is the worker's own layer, which worker/process.py installs; elsewhere it is one shared
RedisChannelLayer for the broker that TRUNKLINE_REDIS names.
"""

from __future__ import annotations

import importlib
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from channel_layer.base import ChannelLayer
    from channel_layer.errors import ChannelFull, InvalidMessage, MessageTooLarge
    from channel_layer.memory import InMemoryChannelLayer
    from channel_layer.publisher import Publisher
    from channel_layer.redis_layer import RedisChannelLayer

__all__ = [
    "ChannelFull",
    "InMemoryChannelLayer",
    "InvalidMessage",
    "MessageTooLarge",
    "Publisher",
    "RedisChannelLayer",
    "get_channel_layer",
    "install_process_layer",
    "installed_process_layer",
]

_MODULES = {
    "ChannelFull": "channel_layer.errors",
    "InMemoryChannelLayer": "channel_layer.memory",
    "InvalidMessage": "channel_layer.errors",
    "MessageTooLarge": "channel_layer.errors",
    "Publisher": "channel_layer.publisher",
    "RedisChannelLayer": "channel_layer.redis_layer",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


# What get_channel_layer() may return, each with the process it belongs to: a layer's thread and connections do not
# survive a fork, so a child of a worker or of a web server makes its own.
_lock = threading.Lock()
_process_layer: tuple[int, ChannelLayer] | None = None
_shared_layer: tuple[int, ChannelLayer] | None = None


def get_channel_layer() -> ChannelLayer:
    """Return the channel layer of this process: the same object every time, for any loop and any thread.

    In a worker it is the worker's own; elsewhere one for the broker in TRUNKLINE_REDIS, with the prefix in
    TRUNKLINE_PREFIX and the keys in TRUNKLINE_ENCRYPTION_KEYS. What its calls do and raise: base.ChannelLayer.
    Nothing connects before the first of them. Raises RuntimeError outside of a worker if TRUNKLINE_REDIS is not
    set.
    """
    global _shared_layer
    with _lock:
        pid = os.getpid()
        if _process_layer is not None and _process_layer[0] == pid:
            return _process_layer[1]
        if _shared_layer is None or _shared_layer[0] != pid:
            url = os.environ.get("TRUNKLINE_REDIS")
            if not url:
                raise RuntimeError(
                    "no channel layer: this process is not a Trunkline worker, and TRUNKLINE_REDIS is not set "
                    "(for example TRUNKLINE_REDIS=redis://localhost:6379)"
                )
            from channel_layer.redis_layer import RedisChannelLayer

            prefix = os.environ.get("TRUNKLINE_PREFIX") or "trunkline"
            _shared_layer = (pid, RedisChannelLayer(hosts=[url], prefix=prefix))
        return _shared_layer[1]


def install_process_layer(layer: ChannelLayer | None) -> None:
    """Make ``layer`` what get_channel_layer() returns in this process; None takes it back. For workers."""
    global _process_layer
    with _lock:
        _process_layer = None if layer is None else (os.getpid(), layer)


def installed_process_layer() -> ChannelLayer | None:
    """Return the layer that a worker installed in this process; None elsewhere, also after a fork."""
    with _lock:
        return _process_layer[1] if _process_layer is not None and _process_layer[0] == os.getpid() else None
