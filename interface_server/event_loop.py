"""The only bridge between asyncio and Twisted: one loop, which both run on.

Twisted's transports, Autobahn and the channel layer share a uvloop loop through Twisted's asyncio reactor.
Nobody else installs a reactor, imports ``twisted.internet.reactor`` or sets the loop's exception handler.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

__all__ = ["new_event_loop", "run"]

_LOGGER: Final = logging.getLogger("trunkline.interface")


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a uvloop loop; a plain one where uvloop does not exist (Windows) or is not installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.SelectorEventLoop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def run(main: Callable[[Any], Coroutine[Any, Any, int]]) -> int:
    """Run ``main(reactor)`` on a new loop under a new global reactor and return what it returns.

    Once in a process: Twisted's reactor cannot be started again. What ``main`` raises is raised here, after the
    reactor has stopped. Signal handlers are main's business (``loop.add_signal_handler``).
    """
    from twisted.internet.main import installReactor

    from interface_server.reactor import Reactor

    loop = new_event_loop()
    loop.set_exception_handler(_log_loop_error)
    asyncio.set_event_loop(loop)
    _log_twisted_errors()
    reactor: Any = Reactor(loop)
    installReactor(reactor)  # type: ignore[no-untyped-call]
    outcome: list[asyncio.Task[int]] = []

    async def guard() -> int:
        return await main(reactor)

    def start() -> None:
        task = loop.create_task(guard(), name="main")
        outcome.append(task)
        task.add_done_callback(lambda _: reactor.stop())

    try:
        reactor.callWhenRunning(start)
        # Twisted's own handlers would take SIGINT, SIGTERM and SIGCHLD away from the loop.
        reactor.run(installSignalHandlers=False)
        _cancel_tasks(loop)
        return outcome[0].result()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


def _cancel_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what main left running, as asyncio.run does; errors reach the log."""
    tasks = [task for task in asyncio.all_tasks(loop) if not task.done()]
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    for task in tasks:
        if not task.cancelled() and task.exception() is not None:
            _LOGGER.error("a task failed while it was cancelled: %r", task, exc_info=task.exception())


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The one place for exceptions of callbacks and of tasks that nobody awaited."""
    error = context.get("exception")
    details = ", ".join(f"{key}={value!r}" for key, value in context.items() if key not in ("exception", "message"))
    _LOGGER.error("%s (%s)", context.get("message", "error in the event loop"), details, exc_info=error)


def _log_twisted_errors() -> None:
    """Hand Twisted's warnings and failures to our logger; without an observer it prints them to stderr."""
    from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent, globalLogBeginner
    from zope.interface import provider

    levels = {LogLevel.warn: logging.WARNING, LogLevel.error: logging.ERROR, LogLevel.critical: logging.CRITICAL}

    @provider(ILogObserver)  # type: ignore[untyped-decorator]
    def observe(event: LogEvent) -> None:
        level = levels.get(event.get("log_level"))
        if level is not None:
            failure = event.get("log_failure")
            error = None if failure is None else (failure.type, failure.value, failure.getTracebackObject())
            _LOGGER.log(level, "%s", formatEvent(event), exc_info=error)

    globalLogBeginner.beginLoggingTo([observe], discardBuffer=True, redirectStandardIO=False)
