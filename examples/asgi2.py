"""Applications in the older style, ASGI 2: called with the scope, they return what is awaited with the channels.

trunkline serve examples.asgi2:closure     (or partial, or Class)
"""

import functools


def closure(scope):
    async def instance(receive, send):
        await answer(scope, send, "a closure")

    return instance


def by_name(name, scope):
    return functools.partial(answer_by_name, scope, name)


async def answer_by_name(scope, name, receive, send):
    await answer(scope, send, name)


def partial(scope):
    return by_name("a partial", scope)


class Class:
    def __init__(self, scope):
        self.scope = scope

    async def __call__(self, receive, send):
        await answer(self.scope, send, "a class")


async def answer(scope, send, who):
    if scope["type"] != "http":
        raise ValueError(f"this application speaks HTTP only, not {scope['type']}")
    text = f"Hello from {who}, you asked for {scope['path']}\n"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text.encode()})
