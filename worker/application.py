"""Applications of every style as one callable: ``await application(scope, receive, send)``.

Which style an object has is decided as ``asgiref.compatibility.is_double_callable`` decides, unless the operator
says it (``--interface``). To support another style (WSGI): a name in settings.InterfaceStyle and its adapter in
``ADAPTERS``; the rest of the worker sees only the result. Finding and importing the object is loading.py's work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final

from asgiref.compatibility import is_double_callable

from worker.settings import InterfaceStyle

__all__ = ["Application", "Receive", "Scope", "Send", "build_application"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[object]]


def build_application(candidate: Any, interface: InterfaceStyle = "auto") -> Application:
    """Return ``candidate`` as a single callable.

    With "auto" an object that asgiref takes for a double callable (ASGI 2) is adapted; where the guess is wrong (a
    partial of a class, a decorated function), ``interface`` says which it is.
    """
    if interface == "auto":
        interface = "asgi2" if is_double_callable(candidate) else "asgi3"  # type: ignore[no-untyped-call]
    return ADAPTERS[interface](candidate)


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


ADAPTERS: Final[Mapping[InterfaceStyle, Callable[[Any], Application]]] = {"asgi3": _single, "asgi2": _from_double}
