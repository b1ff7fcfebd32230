"""Starting the real command as a user would, watching what it prints, and ending it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
START_TIMEOUT_S = 60.0
# Of a line in the log: a busy machine may keep a broker from answering for the second that a lease's renewal has.
LATE_LEASE = r"lease \S+ cannot be renewed"


class Command:
    """One running ``trunkline …`` command. Its output is collected; ``wait_for`` waits for a line of it."""

    def __init__(self, *argv, cwd=ROOT, env=None):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRUNKLINE_")}
        environment["PYTHONUNBUFFERED"] = "1"
        environment.update(env or {})
        self.argv = argv
        self.process = subprocess.Popen(
            [str(Path(sys.executable).parent / "trunkline"), *argv],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._lines = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def _read(self):
        for line in self.process.stdout:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def output(self):
        with self._changed:
            return "\n".join(self._lines)

    def wait_for(self, pattern, timeout_s=START_TIMEOUT_S, count=1):
        """Wait until ``count`` lines match; return the match of the last of them."""
        expression = re.compile(pattern)
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = [match for line in self._lines if (match := expression.search(line))]
                if len(found) >= count:
                    return found[count - 1]
                left = deadline - time.monotonic()
                if left <= 0 or self._ended:
                    why = "the command ended" if self._ended else f"not within {timeout_s} s"
                    raise AssertionError(f"{pattern!r}: {why}; its output:\n" + "\n".join(self._lines))
                self._changed.wait(left)

    def wait_ended(self, timeout_s=30.0):
        """Wait for the end; return (exit status, output)."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status, self.output

    def stop(self):
        """End it as Ctrl-C does; kill it if it does not end. Returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(10)
        self.process.stdout.close()
        return self.process.returncode


class Served(Command):
    """A running ``trunkline serve`` on a free port."""

    def __init__(self, app, *flags, **kwargs):
        super().__init__("serve", app, "--port", "0", *flags, **kwargs)
        try:
            self.url = self.wait_for(r"serves .* on (https?://\S+)").group(1)
            self.redis_url = self.wait_for(r"broker: (?:embedded, )?(\S+)").group(1)
            self.wait_for(r"worker")
        except BaseException:
            self.stop()
            raise
        self.port = int(self.url.rpartition(":")[2])

    @property
    def ws_url(self):
        return self.url.replace("http", "ws", 1)

    def pids(self, role):
        """Process ids of ``role`` ("worker", "interface server") as they are now."""
        return [pid for pid, command in children_of(self.process.pid) if f"trunkline {role.split()[0]} " in command]

    def broker_pid(self):
        """Process id of the embedded broker, as soon as there is one."""

        def found():
            return [pid for pid, command in children_of(self.process.pid) if "-server" in command]

        wait_until(found, 30, "a broker runs")
        return found()[0]


def children_of(parent):
    """(pid, command line) of the children of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            if int(stat.rpartition(")")[2].split()[1]) == parent:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                found.append((int(entry.name), command))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def memory_bytes(pid):
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no VmRSS for {pid}")


def cpu_s(pid):
    """CPU that a process has taken by now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(condition, timeout_s, what):
    """Poll a condition that nobody announces (another process's state) until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)
