"""Background work: the messages of one normal channel, given to one application instance.

    trunkline worker APP --channel thumbnails

What Channels' ``runworker`` does: the scope is ``{"type": "channel", "channel": "thumbnails", …}``, ``receive()``
returns the messages, one instance has one channel in one worker. A message is taken from the broker only when
``receive()`` asks for it (or no instance runs), so the others wait there, for whichever worker is free; each is given
to one instance, once, whatever becomes of it.

    IDLE --first message--> RUNNING --the application returned or raised--> IDLE (the next message starts it anew)
      +------ stop() ----------+--asks for more, or the time is up--> ENDED

There is nobody to answer: ``send()`` raises. Connections are process.py's and instance.py's business.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from worker.application import Application, Scope
from worker.events import InvalidEvent

__all__ = ["BackgroundChannel", "BackgroundStatistics"]

logger = logging.getLogger("trunkline.worker")

# After the stop timeout: for an instance that was cancelled to end. Then the process goes without it.
CANCEL_TIMEOUT_S: Final = 2.0


class Source(Protocol):
    """What is needed of base.ChannelLayer."""

    async def receive(self, channel: str) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundStatistics:
    received_count: int  # messages given to instances
    started_count: int  # instances
    failed_count: int  # instances that raised
    dropped_count: int  # messages without a type, and those that no instance took


class BackgroundChannel:
    """See the module's docstring. Used on the worker's loop; ``start()`` once, then ``stop()`` once."""

    def __init__(
        self,
        channel: str,
        *,
        application: Application,
        layer: Source,
        state: Mapping[str, Any],
        context: contextvars.Context | None = None,
    ) -> None:
        """``state`` is the lifespan's: each scope gets a shallow copy."""
        self.channel = channel
        self._application = application
        self._layer = layer
        self._state = state
        self._context = context
        self._loop = asyncio.get_running_loop()

        self._reader: asyncio.Task[None] | None = None
        self._instance: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()  # the reader is to take one message
        self._wanted.set()
        # Taken from the broker, and in nobody's hands yet. One at most.
        self._arrived: dict[str, Any] | None = None
        self._receivers: list[asyncio.Future[None]] = []  # one for each receive() that waits
        # Set when an instance has nothing in hand: it waits in receive(), or it ended.
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_stopping = False

        self._received_count = 0
        self._started_count = 0
        self._failed_count = 0
        self._dropped_count = 0

    def __repr__(self) -> str:
        state = "idle" if self._is_idle.is_set() else "busy"
        return f"<BackgroundChannel {self.channel}: {state}{', stopping' if self._is_stopping else ''}>"

    def statistics(self) -> BackgroundStatistics:
        return BackgroundStatistics(
            received_count=self._received_count,
            started_count=self._started_count,
            failed_count=self._failed_count,
            dropped_count=self._dropped_count,
        )

    def start(self) -> asyncio.Task[None]:
        """Begin to take messages; the task returned ends by itself only with an error that this cannot survive."""
        self._reader = self._loop.create_task(self._read(), name=f"read {self.channel}")
        return self._reader

    async def stop(self, timeout_s: float, *, at_once: asyncio.Event | None = None) -> int:
        """Take nothing more; return 1 if the instance refused to end, else 0.

        An instance that works on a message has ``timeout_s`` to ask for the next one, then it is cancelled; one
        that waits is cancelled now. ``at_once`` ends the waiting early.
        """
        self._is_stopping = True
        if self._reader is not None:
            self._reader.cancel()  # what is on its way to us goes back to the head of its channel
            await asyncio.wait([self._reader])
        if self._arrived is not None and self._instance is None:
            self._start_instance()
        await self._wait_unless(self._is_idle.wait(), timeout_s, at_once)
        instance = self._instance
        if self._arrived is not None:
            self._arrived = None
            self._dropped_count += 1
            logger.error("channel %s: a message is lost that was taken, and that no instance asked for", self.channel)
        if instance is None:
            return 0
        if not self._is_idle.is_set():
            logger.warning("channel %s: the worker stops, %g s were not enough to finish", self.channel, timeout_s)
        instance.cancel()
        await self._wait_unless(asyncio.wait([instance]), CANCEL_TIMEOUT_S, at_once)
        if instance.done():
            return 0
        logger.error("channel %s: its instance does not end although it was cancelled", self.channel)
        return 1

    # Called by the application

    async def receive(self) -> dict[str, Any]:
        """Wait for the next message. A cancelled call leaves it to the next one."""
        while self._arrived is None:
            self._is_idle.set()
            self._wanted.set()
            receiver = self._loop.create_future()
            self._receivers.append(receiver)
            try:
                await receiver
            finally:
                self._receivers.remove(receiver)
        message, self._arrived = self._arrived, None
        self._received_count += 1
        self._is_idle.clear()
        return message

    async def send(self, message: object) -> None:
        raise InvalidEvent(
            f"channel {self.channel!r}: there is no client to send to; what is meant for one goes through the "
            "channel layer, to its reply channel or to a group"
        )

    # Inside

    async def _read(self) -> None:
        while True:
            await self._wanted.wait()
            # Through outages of the broker. Cancelled, it leaves the message in the channel.
            message = await self._layer.receive(self.channel)
            kind = message.get("type")
            if not isinstance(kind, str) or not kind:
                self._dropped_count += 1
                logger.error('channel %s: a message without "type" is dropped: %.200r', self.channel, message)
                continue
            self._wanted.clear()
            self._arrived = message
            self._is_idle.clear()
            if self._instance is None:
                self._start_instance()
            for receiver in self._receivers:
                if not receiver.done():
                    receiver.set_result(None)

    def _start_instance(self) -> None:
        self._started_count += 1
        context = self._context.copy() if self._context is not None else None
        self._instance = self._loop.create_task(self._run(), name=f"channel {self.channel}", context=context)

    async def _run(self) -> None:
        begun_with = self._arrived
        scope: Scope = {
            "type": "channel",
            "asgi": {"version": "3.0"},
            "channel": self.channel,
            "state": dict(self._state),
        }
        try:
            await self._application(scope, self.receive, self.send)
        except GeneratorExit:
            raise  # the loop is torn down
        except asyncio.CancelledError:
            if not self._is_stopping:
                logger.exception("channel %s: the application was cancelled, and not by us", self.channel)
        except BaseException:  # sys.exit() in a consumer ends the consumer, not the worker
            self._failed_count += 1
            logger.exception("Exception in ASGI application, channel %s", self.channel)
        self._instance = None
        self._is_idle.set()
        if self._arrived is not None and self._arrived is begun_with:
            # Were it given to the next instance, one that no consumer wants would keep the worker busy for ever.
            self._arrived = None
            self._dropped_count += 1
            logger.error("channel %s: the application ended without taking its message, which is lost", self.channel)
        if self._arrived is not None:
            self._is_idle.clear()
            self._start_instance()
        else:
            self._wanted.set()

    async def _wait_unless(self, work: Any, timeout_s: float, at_once: asyncio.Event | None) -> None:
        waits = [self._loop.create_task(work)]
        if at_once is not None:
            waits.append(self._loop.create_task(at_once.wait()))
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
