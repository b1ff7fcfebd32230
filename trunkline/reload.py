"""Watching source files, for ``--reload``. Knows files, not processes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator
from typing import Final

__all__ = ["SourceWatch"]

# Looking at some thousand files costs a few milliseconds, and no platform's notifications are needed for it.
POLL_INTERVAL_S: Final = 0.25
_SKIPPED_DIRECTORIES: Final = frozenset({"__pycache__", "node_modules", "site-packages", ".git", ".venv", "venv"})


class SourceWatch:
    """Notices changed, new and removed Python files below some directories."""

    def __init__(self, directories: Iterable[str]) -> None:
        self.directories = tuple(directories)
        self._seen = dict(self._scan())

    async def changed(self) -> str:
        """Wait until files change; return the path of one of them."""
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            now = dict(await asyncio.to_thread(lambda: list(self._scan())))
            if now != self._seen:
                difference = set(now.items()) ^ set(self._seen.items())
                self._seen = now
                return min(path for path, _ in difference)

    def _scan(self) -> Iterator[tuple[str, int]]:
        for top in self.directories:
            for directory, names, files in os.walk(top):
                names[:] = [name for name in names if name not in _SKIPPED_DIRECTORIES and not name.startswith(".")]
                for name in files:
                    if name.endswith(".py"):
                        path = os.path.join(directory, name)
                        try:
                            yield path, os.stat(path).st_mtime_ns
                        except FileNotFoundError:
                            continue  # removed since the directory was read: the next scan is complete
