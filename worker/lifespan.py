"""The lifespan of the application in this worker: startup before the first connection, shutdown behind the last.

One per worker process, because there is one event loop in it (ASGI "Lifespan" 2.0). ``state`` is what the
application put into its lifespan scope; each connection's scope gets a shallow copy.

    NEW --startup()--> STARTING --startup.complete--> STARTED --shutdown()--> STOPPING --> OVER
                          +-- raised or returned instead: OVER ("auto": served without lifespan; "on": LifespanFailed)
                          +-- startup.failed: OVER, LifespanFailed

When the application's lifespan call ends by itself after its startup, no shutdown is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

from worker.application import Application, Scope
from worker.events import InvalidEvent
from worker.settings import LifespanMode

__all__ = ["Lifespan", "LifespanFailed", "LifespanPhase"]

logger = logging.getLogger("trunkline.worker")


class LifespanFailed(Exception):
    """The application could not start, so this worker must not; the text is the line for the operator."""


class LifespanPhase(Enum):
    NEW = "new"
    STARTING = "starting"
    STARTED = "started"
    STOPPING = "stopping"
    OVER = "over"


# What the application may answer in which phase.
_ANSWERS: Final[Mapping[LifespanPhase, tuple[str, ...]]] = {
    LifespanPhase.STARTING: ("lifespan.startup.complete", "lifespan.startup.failed"),
    LifespanPhase.STOPPING: ("lifespan.shutdown.complete", "lifespan.shutdown.failed"),
}
_FAILURES: Final = ("lifespan.startup.failed", "lifespan.shutdown.failed")


class Lifespan:
    """Runs the application's lifespan call. ``startup()`` once, then ``shutdown()`` once."""

    def __init__(self, application: Application, *, mode: LifespanMode = "auto") -> None:
        self.state: dict[str, Any] = {}
        self.phase = LifespanPhase.NEW
        self._application = application
        self._mode = mode
        self._task: asyncio.Task[None] | None = None
        # At most two events in all: startup and shutdown.
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._answered = asyncio.Event()  # in this phase
        self._failure: str | None = None  # the message of the last …failed event
        self._received = False  # the application took the startup event: it knows this protocol

    def __repr__(self) -> str:
        return f"<Lifespan {self._mode}, {self.phase.value}>"

    async def startup(self) -> None:
        """Send lifespan.startup and wait for the answer, however long: migrations and models take their time.

        Raises LifespanFailed. A cancelled call cancels the application's.
        """
        if self._mode == "off":
            self.phase = LifespanPhase.OVER
            return
        self.phase = LifespanPhase.STARTING
        self._events.put_nowait({"type": "lifespan.startup"})
        self._task = asyncio.create_task(self._run(), name="lifespan")
        try:
            await self._answered.wait()
        except asyncio.CancelledError:
            await self._finish(patience_s=0)
            raise
        if self._failure is not None:
            await self._finish()
            raise LifespanFailed(f"the application could not start{_colon(self._failure)}")
        if self.phase is LifespanPhase.OVER and self._mode == "on":
            raise LifespanFailed("the application has no working lifespan, and --lifespan on asks for one")

    async def shutdown(self, timeout_s: float) -> bool:
        """Send lifespan.shutdown and wait for the answer; False if it failed or did not come in time.

        Does nothing when the application takes no part in the protocol.
        """
        if self.phase is not LifespanPhase.STARTED:
            await self._finish()
            return True
        self.phase = LifespanPhase.STOPPING
        self._answered.clear()
        self._events.put_nowait({"type": "lifespan.shutdown"})
        try:
            async with asyncio.timeout(timeout_s):
                await self._answered.wait()
        except TimeoutError:
            logger.error("the application did not finish its lifespan shutdown within %g s", timeout_s)
            return False
        finally:
            await self._finish()
        if self._failure is not None:
            logger.error("the application's shutdown failed%s", _colon(self._failure))
            return False
        return True

    async def _finish(self, patience_s: float = 0.2) -> None:
        """End the application's call: most return by themselves right behind their last answer."""
        self.phase = LifespanPhase.OVER
        task = self._task
        if task is None:
            return
        await asyncio.wait([task], timeout=patience_s)
        if not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=1.0)  # one that refuses to be cancelled does not keep the worker

    async def _run(self) -> None:
        scope: Scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self.state,
        }
        try:
            await self._application(scope, self._receive, self._send)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._report(error)
        finally:
            if self.phase is not LifespanPhase.STOPPING:
                self.phase = LifespanPhase.OVER
            self._answered.set()

    def _report(self, error: BaseException) -> None:
        if self.phase is LifespanPhase.STARTING and self._failure is None:
            if self._mode == "on" or self._received:
                # It takes part in the protocol, so this is a fault of its own; ASGI still asks us to go on.
                logger.error("Exception in the application's lifespan startup", exc_info=error)
            if self._mode == "auto":
                logger.info("the application is served without lifespan: it raised %r for the lifespan scope", error)
        elif self.phase is LifespanPhase.STOPPING:
            logger.error("Exception in the application's lifespan shutdown", exc_info=error)
            self._failure = repr(error)
        elif self._failure is None:
            logger.error("Exception in the application's lifespan", exc_info=error)

    async def _receive(self) -> dict[str, Any]:
        event = await self._events.get()
        self._received = True
        return event

    async def _send(self, message: Mapping[str, Any]) -> None:
        kind = message.get("type") if isinstance(message, Mapping) else None
        # One answer for each event: after it nothing is expected.
        answers = () if self._answered.is_set() else _ANSWERS.get(self.phase, ())
        if kind not in answers:
            expected = " or ".join(repr(answer) for answer in answers) or "nothing"
            raise InvalidEvent(
                f"the application sent {kind!r:.80} while its lifespan is {self.phase.value}; expected {expected}"
            )
        if kind in _FAILURES:
            failure = message.get("message", "")
            if not isinstance(failure, str):
                raise InvalidEvent(f'{kind}: "message" is {failure!r:.80} ({type(failure).__name__}), expected str')
            self._failure = failure
        elif self.phase is LifespanPhase.STARTING:
            self.phase = LifespanPhase.STARTED
        self._answered.set()


def _colon(text: str) -> str:
    return f": {text.strip()}" if text.strip() else ""
