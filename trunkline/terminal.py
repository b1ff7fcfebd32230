"""SIGHUP has two meanings: an operator asks for something, or the terminal that we were started in is gone."""

from __future__ import annotations

import os
import signal

__all__ = ["TerminalWatch"]


class TerminalWatch:
    """Made at the start; tells a hang-up of the terminal from a signal that somebody sent."""

    def __init__(self) -> None:
        # Under nohup nobody wants to end with the terminal.
        self._had_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN

    def __repr__(self) -> str:
        return f"<TerminalWatch {'with' if self._had_terminal else 'without'} a terminal>"

    def is_gone(self) -> bool:
        """True if there was a terminal when this was made, and there is none now."""
        return self._had_terminal and not _has_terminal()


def _has_terminal() -> bool:
    try:
        # The controlling terminal, whatever stdin is; ENXIO without one.
        descriptor = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    os.close(descriptor)
    return True
