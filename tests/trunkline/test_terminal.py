"""A hang-up of the terminal, and a signal that somebody sent. The terminal is a real one, of a session of its own."""

import os
import pty
import select
import signal

from trunkline.terminal import TerminalWatch


def in_a_session(ignores_hangup):
    """What a process says about its terminal before and behind the hang-up, as bytes."""
    read_end, write_end = os.pipe()
    pid, master = pty.fork()
    if pid == 0:
        try:
            hung_up = []
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            watch_ignoring = TerminalWatch()
            signal.signal(signal.SIGHUP, lambda *_: hung_up.append(True))
            watch = watch_ignoring if ignores_hangup else TerminalWatch()
            os.write(write_end, b"%d" % watch.is_gone())
            while not hung_up:
                select.select([], [], [], 0.01)
            os.write(write_end, b"%d" % watch.is_gone())
        finally:
            os._exit(0)
    os.close(write_end)
    said = os.read(read_end, 1)
    os.close(master)  # what closing a window does
    ready, _, _ = select.select([read_end], [], [], 20)
    assert ready
    said += os.read(read_end, 1)
    os.close(read_end)
    os.waitpid(pid, 0)
    return said


def test_a_terminal_that_is_closed_is_gone():
    assert in_a_session(ignores_hangup=False) == b"01"


def test_under_nohup_it_does_not_matter():
    assert in_a_session(ignores_hangup=True) == b"00"


def test_a_process_without_a_terminal_never_loses_one(monkeypatch):
    monkeypatch.setattr("trunkline.terminal._has_terminal", lambda: False)
    watch = TerminalWatch()
    assert not watch.is_gone()
    assert repr(watch) == "<TerminalWatch without a terminal>"
