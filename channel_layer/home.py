"""The one loop on which a process that is no worker runs its channel layer: a background thread.

Django views, scripts and task queues call the layer from many loops and threads, and ``async_to_sync`` makes a new
loop for each call; connections that belonged to those loops would be made and lost with each. So the first call
starts a daemon thread with a loop of its own, one for each set of options, and all calls cross over to it. Lives
here: that thread, its start, its end at the exit of the process, and what a fork means. Does not live here: the
layer (process_layer.py), the crossing (crossing.py).

    first call --> thread, loop --> layer connected --exit of the process--> layer stopped, thread joined
                                          +--fork--> the child forgets it, and begins with a first call of its own
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Hashable
from typing import Final

from channel_layer.crossing import call_on
from channel_layer.process_layer import RedisProcessLayer

__all__ = ["Home", "close_homes", "home_for"]

logger = logging.getLogger("trunkline.channel_layer")

# At the exit of the process: a layer that cannot say goodbye in this time is left to its deadlines.
_STOP_TIMEOUT_S: Final = 3.0

_lock = threading.Lock()
# The homes of this process, by the options of their layers. One entry for each different use of the layer.
_homes: dict[Hashable, Home] = {}
# Those of the parent, after a fork. Kept, not used: their destruction would close and unregister descriptors that
# the parent's loop shares with us.
_of_parent: list[Home] = []
_is_prepared = False


class Home:
    """A thread with a loop, and the layer on it."""

    def __init__(self, make_layer: Callable[[], RedisProcessLayer]) -> None:
        self._make_layer = make_layer
        self._layer: RedisProcessLayer | None = None  # once it is connected
        self._starting: asyncio.Lock | None = None  # on the loop
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="trunkline channel layer", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Home {self._layer!r}>"

    @property
    def is_closed(self) -> bool:
        return not self._thread.is_alive()

    async def layer(self) -> RedisProcessLayer:
        """Return the connected layer; may be called on any loop. Raises BrokerUnavailable, BrokerUnsuitable."""
        if self._layer is not None:
            return self._layer
        return await call_on(self.loop, self._start)

    def close(self) -> None:
        """Stop the layer and the thread; blocks, for a few seconds at most. Not from the home's own thread."""
        if self._thread.is_alive():
            stopping = asyncio.run_coroutine_threadsafe(self._stop(), self.loop)
            try:
                stopping.result(_STOP_TIMEOUT_S)
            except TimeoutError:
                stopping.cancel()
                logger.warning("%r could not be stopped in %g s", self, _STOP_TIMEOUT_S)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(_STOP_TIMEOUT_S)

    # On the thread

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(asyncio.sleep(0))
            with contextlib.suppress(RuntimeError):  # an interpreter that shuts down starts no thread to wait in
                self.loop.run_until_complete(self.loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()

    async def _start(self) -> RedisProcessLayer:
        if self._starting is None:
            self._starting = asyncio.Lock()
        async with self._starting:
            if self._layer is None:
                layer = self._make_layer()
                await layer.start()
                self._layer = layer
            return self._layer

    async def _stop(self) -> None:
        layer, self._layer = self._layer, None
        if layer is not None:
            await layer.stop()


def home_for(options: Hashable, make_layer: Callable[[], RedisProcessLayer]) -> Home:
    """Return the home of this process for layers with these options; started if there is none."""
    global _is_prepared
    with _lock:
        home = _homes.get(options)
        if home is None:
            if not _is_prepared:
                _is_prepared = True
                # Importing has no effect, so not before the first use.
                atexit.register(close_homes)
                os.register_at_fork(after_in_child=_forget_parents_homes)
            home = _homes[options] = Home(make_layer)
        return home


def close_homes() -> None:
    """Stop all layers and threads of this process; the next call on a layer starts anew."""
    with _lock:
        homes = list(_homes.values())
        _homes.clear()
    for home in homes:
        home.close()


def _forget_parents_homes() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    _of_parent.extend(_homes.values())
    _homes.clear()
