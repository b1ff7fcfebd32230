"""The smallest application: plain ASGI, no framework.

trunkline serve examples.hello:application
"""


async def application(scope, receive, send):
    if scope["type"] != "http":
        raise ValueError(f"this application speaks HTTP only, not {scope['type']}")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"Hello, world!\n"})
