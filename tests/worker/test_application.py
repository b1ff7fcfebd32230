"""Every style of application becomes one callable."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest

from tests.worker.support import http_scope
from worker.application import InterfaceMismatch, build_application
from worker.settings import InterfaceStyle


async def asgi3(scope: Any, receive: Any, send: Any) -> None:
    await send(("asgi3", scope, await receive()))


class Asgi3Instance:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await asgi3(scope, receive, send)


class Asgi2Class:
    def __init__(self, scope: Any, *, extra: str = "") -> None:
        self.scope = scope
        self.extra = extra

    async def __call__(self, receive: Any, send: Any) -> None:
        await send(("asgi2" + self.extra, self.scope, await receive()))


def asgi2_closure(scope: Any) -> Any:
    async def instance(receive: Any, send: Any) -> None:
        await send(("asgi2", scope, await receive()))

    return instance


class Asgi2Instance:
    def __call__(self, scope: Any) -> Any:
        return asgi2_closure(scope)


def sync_function_that_returns_a_coroutine(scope: Any, receive: Any, send: Any) -> Any:
    return asgi3(scope, receive, send)


def marked_single(scope: Any, receive: Any, send: Any) -> Any:
    return asgi3(scope, receive, send)


marked_single._asgi_single_callable = True  # type: ignore[attr-defined]


CASES: list[tuple[str, Any, InterfaceStyle, str]] = [
    ("coroutine function", asgi3, "auto", "asgi3"),
    ("instance", Asgi3Instance(), "auto", "asgi3"),
    ("partial of a coroutine function", functools.partial(asgi3), "auto", "asgi3"),
    ("marked as single", marked_single, "auto", "asgi3"),
    ("asgi2 class", Asgi2Class, "auto", "asgi2"),
    ("asgi2 closure", asgi2_closure, "auto", "asgi2"),
    ("asgi2 partial", functools.partial(Asgi2Class, extra="+"), "auto", "asgi2+"),
    ("asgi2 instance", Asgi2Instance(), "auto", "asgi2"),
    ("asgi2 said", asgi2_closure, "asgi2", "asgi2"),
    ("sync function, asgi3 said", sync_function_that_returns_a_coroutine, "asgi3", "asgi3"),
]


@pytest.mark.parametrize(
    ("application", "interface", "style"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
async def test_called_as_asgi3(application: Any, interface: InterfaceStyle, style: str) -> None:
    sent: list[Any] = []
    scope = {"type": "http"}

    async def receive() -> Any:
        return "event"

    async def send(message: Any) -> None:
        sent.append(message)

    await build_application(application, interface)(scope, receive, send)
    assert sent == [(style, scope, "event")]


async def test_a_sync_function_with_three_parameters_is_taken_for_asgi2_unless_told() -> None:
    # As asgiref guesses; --interface asgi3 is the way out.
    application = build_application(sync_function_that_returns_a_coroutine)
    with pytest.raises(TypeError):
        await application({}, None, None)  # type: ignore[arg-type]


def wsgi(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", [])
    return [b"wsgi"]


class WsgiInstance:
    def __call__(self, environ: Any, start_response: Any) -> Any:
        return wsgi(environ, start_response)


class WsgiClass:
    """PEP 3333's second example: the class is the application, its instance the iterable."""

    def __init__(self, environ: Any, start_response: Any) -> None:
        start_response("200 OK", [])

    def __iter__(self) -> Any:
        yield b"wsgi"


def anything(*arguments: Any) -> Any:
    return wsgi(*arguments)


WSGI = [wsgi, WsgiInstance(), WsgiInstance().__call__, WsgiClass, functools.partial(wsgi)]


@pytest.mark.parametrize("application", [*WSGI, anything])
async def test_wsgi_is_called_as_asgi3(application: Any) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("nobody reads the body")

    async def send(message: Any) -> None:
        sent.append(message)

    await build_application(application, "wsgi", threads=1)(http_scope(), receive, send)
    assert b"".join(message.get("body", b"") for message in sent) == b"wsgi"


@pytest.mark.parametrize("interface", ["auto", "asgi3", "asgi2"])
@pytest.mark.parametrize("application", WSGI)
def test_wsgi_that_nobody_announced_is_an_error_with_the_way_out(application: Any, interface: InterfaceStyle) -> None:
    with pytest.raises(InterfaceMismatch, match="serve it with --interface wsgi"):
        build_application(application, interface)


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "auto"], ids=lambda case: case[0])
def test_asgi_announced_as_the_other_one_is_an_error(case: Any) -> None:
    other = "asgi2" if case[3] == "asgi3" else "asgi3"
    if inspect.signature(case[1]).parameters.keys() == {"args", "kwargs"}:  # it tells nothing about itself
        build_application(case[1], other)
        return
    with pytest.raises(InterfaceMismatch, match=f"--interface {other}, but .* it looks like an ASGI"):
        build_application(case[1], other)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "marked as single"], ids=lambda case: case[0])
def test_asgi_announced_as_wsgi_is_an_error(case: Any) -> None:
    with pytest.raises(InterfaceMismatch, match="looks like an ASGI application"):
        build_application(case[1], "wsgi")
