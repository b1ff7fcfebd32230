"""A proxy before a broker, to cut connections in ways a broker's own end never does.

Its speciality are ghosts: connections whose client side is gone while the server still believes in them, as after
a crashed machine or a forgetful NAT.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

__all__ = ["BrokerProxy"]


class BrokerProxy:
    """Listens on a unix socket of its own and forwards to the unix socket ``target``. Use with ``async with``."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name("proxy.sock")
        self.is_deaf = False  # while True, what the server says is thrown away
        self._server: asyncio.Server | None = None
        self.hung_count = 0  # bytes that came over connections that hang
        self._hanging: set[asyncio.StreamReader] = set()
        self._readers: list[asyncio.StreamReader] = []
        self._clients: list[asyncio.StreamWriter] = []
        self._servers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    async def __aenter__(self) -> BrokerProxy:
        self._server = await asyncio.start_unix_server(self._accept, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in (*self._clients, *self._servers):
            writer.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    def abandon_clients(self) -> None:
        """Close the client side of every connection; the server keeps its sides, and sees nothing."""
        for writer in self._clients:
            writer.close()
        self._clients.clear()

    def hang(self) -> None:
        """Let nothing more through on the connections there are, either way, and close none; new ones work.

        So does a firewall that has forgotten them.
        """
        self._hanging.update(self._readers)

    async def _accept(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_unix_connection(self.target)
        self._clients.append(to_client)
        self._servers.append(to_server)
        self._readers += (from_client, from_server)
        for copy in (self._copy(from_client, to_server, False), self._copy(from_server, to_client, True)):
            task = asyncio.get_running_loop().create_task(copy)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _copy(
        self, source: asyncio.StreamReader, destination: asyncio.StreamWriter, is_from_server: bool
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                if source in self._hanging:
                    self.hung_count += len(data)
                elif not (is_from_server and self.is_deaf):
                    destination.write(data)
        if is_from_server:
            destination.close()
