"""No child outlives its supervisor, however that ends.

Two means, for each alone has a hole. On Linux the kernel kills a child when its parent dies
(``PR_SET_PDEATHSIG``), which works for a broker we did not write, too. Elsewhere, and for a child whose parent
died before the call, our own processes watch a pipe whose other end only the supervisor holds: end of file
means that it is gone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Final

__all__ = ["LIFELINE_VARIABLE", "hold_lifeline", "load_parent_death_signal"]

LIFELINE_VARIABLE: Final = "TRUNKLINE_LIFELINE_FD"

_PR_SET_PDEATHSIG: Final = 1


def load_parent_death_signal() -> Callable[[], None] | None:
    """Return a function for a child to call before it executes its program; None where there is no such thing.

    The library is loaded now, in the parent: between fork and exec a child should not import anything.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):
        return None  # a libc without prctl: the pipe remains
    parent = os.getpid()

    def ask_for_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return ask_for_signal


def hold_lifeline() -> None:
    """In a supervised process: end at once when the supervisor is gone. Elsewhere: nothing."""
    text = os.environ.pop(LIFELINE_VARIABLE, None)
    if text is None:
        return
    descriptor = int(text)
    os.set_inheritable(descriptor, False)

    def watch() -> None:
        # Nothing is ever written: read() returns only when the other end is closed.
        os.read(descriptor, 1)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
