"""Hand-over for applications: store what the next instance must know, and get what the last one stored.

    from worker.handover import store_state, stored_state

Raw ASGI applications send ``websocket.handover.state`` themselves. Those built with a framework seldom can: the
``send`` of Starlette and Channels refuses events that it does not know, and Starlette's ``receive`` the request for a
last checkpoint. So these functions find the running instance by themselves, through its context, from any task or
thread it started. Under another server, and with ``--handover never``, they do nothing: the code runs everywhere.

The mixins at the end are for consumers of Django Channels. What is promised: docs/handover.md.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from asgiref.sync import async_to_sync

from worker.instance import CURRENT_INSTANCE

__all__ = ["HandoverMixin", "SyncHandoverMixin", "store_state", "stored_state"]

_NOTHING: Final = object()


def stored_state(default: Any = None) -> Any:
    """Return what the former instance of this WebSocket stored last; ``default`` where there was none.

    Always the same in one call of the application: its own checkpoints are for the next one.
    """
    instance = CURRENT_INSTANCE.get(None)
    return default if instance is None else instance.stored_state(default)


async def store_state(
    state: Any,
    *,
    commit: bool = False,
    latest: Callable[[], Any | Awaitable[Any]] | None = None,
) -> bool:
    """Store a checkpoint of this WebSocket: it covers every message that was received, and ``state`` must, too.

    ``commit``: from now on what is sent leaves together with the next checkpoint, or not at all. ``latest`` is called
    when the worker stops, to return the state as it is then; without it the WebSocket moves when it stands still.
    False: nothing was stored, because the WebSocket is not open (yet) or hand-over is not offered. Raises
    worker.events.InvalidEvent for a state that is larger than 64 KiB encoded, or of types that ASGI does not allow in
    events, and an OSError when the client is gone, as send() does.
    """
    instance = CURRENT_INSTANCE.get(None)
    if instance is None or not instance.takes_checkpoints:
        return False
    await instance.store_state(state, commit=commit, latest=latest)
    return True


class _Checkpointing:
    """What both mixins ask of a consumer."""

    handover_commit = False  # True: what is sent leaves with the next checkpoint only; docs/handover.md, "commit"

    def get_handover_state(self) -> Any:
        """Return what another instance needs to go on."""
        raise NotImplementedError(f"{type(self).__name__} needs a get_handover_state()")

    def set_handover_state(self, state: Any) -> None:
        """Take what the former instance returned; connect() comes next."""
        raise NotImplementedError(f"{type(self).__name__} needs a set_handover_state()")

    def _restore(self) -> None:
        state = stored_state(_NOTHING)
        if state is not _NOTHING:
            self.set_handover_state(state)


class HandoverMixin(_Checkpointing):
    """For asynchronous consumers of Channels, in front of ``AsyncWebsocketConsumer`` among the bases.

    Write ``get_handover_state`` and ``set_handover_state``. A checkpoint is stored behind connect() and behind each
    message of the client; where something else changes the state (a group's message, a timer), call
    ``await self.store_state()`` there, too.
    """

    async def store_state(self) -> bool:
        """Store what get_handover_state() returns; returns and raises as the function of this name."""
        return await store_state(
            self.get_handover_state(), commit=self.handover_commit, latest=self.get_handover_state
        )

    # Called by Channels

    async def websocket_connect(self, message: dict[str, Any]) -> None:
        self._restore()
        await super().websocket_connect(message)  # type: ignore[misc]
        await self.store_state()

    async def websocket_receive(self, message: dict[str, Any]) -> None:
        await super().websocket_receive(message)  # type: ignore[misc]
        await self.store_state()


class SyncHandoverMixin(_Checkpointing):
    """As HandoverMixin, in front of ``WebsocketConsumer``; ``store_state`` is a plain call."""

    def store_state(self) -> bool:
        # Without ``latest``: it would be called on the loop, where synchronous code of a consumer must not run.
        return async_to_sync(store_state)(self.get_handover_state(), commit=self.handover_commit)

    # Called by Channels

    def websocket_connect(self, message: dict[str, Any]) -> None:
        self._restore()
        super().websocket_connect(message)  # type: ignore[misc]
        self.store_state()

    def websocket_receive(self, message: dict[str, Any]) -> None:
        super().websocket_receive(message)  # type: ignore[misc]
        self.store_state()
