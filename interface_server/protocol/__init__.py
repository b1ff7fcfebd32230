"""What HTTP and WebSocket demand, decided without I/O: bytes and events in, bytes and events out.

Nothing here knows Twisted, asyncio or the broker; the modules above feed these and carry out what they return.
"""
