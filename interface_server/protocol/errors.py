"""The errors of the protocol modules, named by who must act.

    BadRequest   the client: its bytes are not a request we serve

What an application does wrong is no exception here: http_exchange.py and websocket_session.py answer with what the
socket must do.
"""

from __future__ import annotations

__all__ = ["BadRequest"]


class BadRequest(Exception):
    """Answer with ``status`` and close the connection: what follows on it cannot be told apart any more.

    ``reason`` is a fixed sentence without anything the client sent, so it may go into the answer and into logs.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"
