"""Applications of every style as one callable: ``await application(scope, receive, send)``.

Which style an object has is decided as ``asgiref.compatibility.is_double_callable`` decides, unless the operator
says it (``--interface``). To support another style: a name in settings.InterfaceStyle and its adapter in
``build_application()``; the rest of the worker sees only the result. Finding and importing the object is
loading.py's work, and how WSGI runs in threads is wsgi.py's.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from asgiref.compatibility import is_double_callable

from worker.loading import ApplicationError
from worker.settings import THREADS_DEFAULT, InterfaceStyle
from worker.wsgi import WsgiAdapter

__all__ = ["Application", "InterfaceMismatch", "Receive", "Scope", "Send", "build_application"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[object]]


class InterfaceMismatch(ApplicationError):
    """The application is evidently of another kind than ``interface`` says."""


def build_application(
    candidate: Any, interface: InterfaceStyle = "auto", *, threads: int = THREADS_DEFAULT
) -> Application:
    """Return ``candidate`` as a single callable. ``threads`` is for WSGI.

    With "auto" an object that asgiref takes for a double callable (ASGI 2) is adapted; where the guess is wrong (a
    partial of a class, a decorated function), ``interface`` says which it is. Raises InterfaceMismatch.
    """
    if interface == "wsgi":
        if _is_async(candidate) or _takes(candidate, 2) is False:
            raise InterfaceMismatch(
                f"--interface wsgi, but {candidate!r:.80} cannot be called with (environ, start_response): "
                "it looks like an ASGI application, for which --interface is not needed"
            )
        return WsgiAdapter(candidate, threads=threads)
    if not _is_async(candidate) and _takes(candidate, 2) and not _takes(candidate, 1) and not _takes(candidate, 3):
        raise InterfaceMismatch(
            f"{candidate!r:.80} takes two arguments, as WSGI applications do (environ, start_response): "
            "serve it with --interface wsgi"
        )
    if interface == "asgi2" and (_is_async(candidate) or (_takes(candidate, 3) and not _takes(candidate, 1))):
        raise InterfaceMismatch(
            f"--interface asgi2, but {candidate!r:.80} cannot be called with (scope): it looks like an ASGI 3 "
            "application, for which --interface is not needed"
        )
    if interface == "asgi3" and _takes(candidate, 1) and not _takes(candidate, 3):
        raise InterfaceMismatch(
            f"--interface asgi3, but {candidate!r:.80} cannot be called with (scope, receive, send): it looks like "
            "an ASGI 2 application, for which --interface is not needed"
        )
    if interface == "auto":
        interface = "asgi2" if is_double_callable(candidate) else "asgi3"  # type: ignore[no-untyped-call]
    return _from_double(candidate) if interface == "asgi2" else _single(candidate)


def _is_async(candidate: Any) -> bool:
    # On the type, where Python itself looks for __call__; that of a class is the class's own construction.
    return inspect.iscoroutinefunction(candidate) or inspect.iscoroutinefunction(type(candidate).__call__)


def _takes(candidate: Any, count: int) -> bool | None:
    """Whether it can be called with so many arguments; None where Python cannot tell."""
    try:
        signature = inspect.signature(candidate)
    except (TypeError, ValueError):  # built in, or a signature that lies
        return None
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _single(application: Any) -> Application:
    result: Application = application
    return result


def _from_double(application: Any) -> Application:
    async def single(scope: Scope, receive: Receive, send: Send) -> None:
        # ASGI 2, "Applications": the first call is synchronous and does no work that blocks; the second is
        # awaited at once.
        instance = application(scope)
        await instance(receive, send)

    return single
