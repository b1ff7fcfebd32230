"""SIGHUP: new code in all workers, one after the other, and nobody outside notices."""

import contextlib
import os
import signal
import threading
from pathlib import Path

import httpx

from tests.system.processes import Command, Served, children_of, is_alive, wait_until

APPLICATION = """
import os
VERSION = "{version}"
print("importing {version}", flush=True)

async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            event = await receive()
            await send({{"type": event["type"] + ".complete"}})
            if event["type"] == "lifespan.shutdown":
                return
    body = b""
    while True:
        event = await receive()
        body += event.get("body", b"")
        if not event.get("more_body"):
            break
    answer = VERSION.encode() + b" " + body
    headers = [(b"content-length", b"%d" % len(answer))]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": answer}})
"""


# What is written again within a second, as long as before, would pass for the bytecode of the one before.
NO_BYTECODE = {"PYTHONDONTWRITEBYTECODE": "1"}


def write(directory: Path, version: str) -> None:
    (directory / "main.py").write_text(APPLICATION.format(version=version))


class Load:
    """Clients that ask without a pause: by GET and POST, on connections that are kept and on new ones."""

    def __init__(self, url: str, threads: int = 4) -> None:
        self.failures: list[str] = []
        self.versions: set[str] = set()
        self.count = 0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, number)) for number in range(threads)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(40)

    def _ask(self, url: str, number: int) -> None:
        with contextlib.ExitStack() as stack:
            kept = stack.enter_context(httpx.Client(timeout=60))
            while not self._over.is_set():
                content = f"{number}.{self.count}".encode()
                try:
                    if self.count % 10 == 0:
                        answer = httpx.post(url, content=content, timeout=60)
                    elif self.count % 2:
                        answer = kept.post(url, content=content)
                    else:
                        content = b""
                        answer = kept.get(url)
                    version, _, body = answer.content.partition(b" ")
                    if answer.status_code != 200 or body != content:
                        self.failures.append(f"{answer.status_code} {answer.content!r} for {content!r}")
                    self.versions.add(version.decode())
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                self.count += 1


def roll(command: Command, times: int) -> None:
    command.process.send_signal(signal.SIGHUP)
    command.wait_for("all workers are replaced", count=times)


def test_five_rolling_restarts_of_two_workers_under_load_fail_no_request(tmp_path: Path) -> None:
    write(tmp_path, "v0")
    with Served("main:application", "--workers", "2", "--no-access-log", cwd=tmp_path, env=NO_BYTECODE) as served:
        wait_until(lambda: len(served.pids("worker")) == 2, 60, "two workers run")
        interface = served.pids("interface server")
        pids = set(served.pids("worker"))
        with Load(served.url) as load:
            for number in range(1, 6):
                last = f"v{number - 1}"
                wait_until(lambda last=last: last in load.versions, 60, f"{last} answers")
                write(tmp_path, f"v{number}")
                roll(served, number)
                now = set(served.pids("worker"))
                assert len(now) == 2
                assert not now & pids
                assert not any(is_alive(pid) for pid in pids)
                pids = now
            wait_until(lambda: "v5" in load.versions, 60, "the last version answers")
        assert load.failures == []
        assert load.versions == {f"v{number}" for number in range(6)}
        assert load.count > 100
        assert served.pids("interface server") == interface
        assert "Traceback" not in served.output


def test_workers_of_their_own_command_are_replaced_too(tmp_path: Path, broker_server) -> None:
    write(tmp_path, "v0")
    redis = ("--redis", broker_server.url)
    with (
        Command("interface", "--port", "0", "--no-access-log", *redis) as interface,
        Command("worker", "main:application", "--workers", "2", *redis, cwd=tmp_path, env=NO_BYTECODE) as workers,
    ):
        url = interface.wait_for(r"accepts on (http://\S+)").group(1)
        workers.wait_for("2 workers")
        with Load(url, threads=2) as load:
            write(tmp_path, "v1")
            roll(workers, 1)
            wait_until(lambda: "v1" in load.versions, 60, "the new version answers")
        assert load.failures == []


def test_a_version_that_cannot_start_leaves_the_old_one_running(tmp_path: Path) -> None:
    write(tmp_path, "v0")
    with Served("main:application", "--workers", "2", "--no-access-log", cwd=tmp_path, env=NO_BYTECODE) as served:
        wait_until(lambda: len(served.pids("worker")) == 2, 60, "two workers run")
        pids = sorted(served.pids("worker"))
        with Load(served.url, threads=2) as load:
            (tmp_path / "main.py").write_text("def what is this\n")
            served.process.send_signal(signal.SIGHUP)
            served.wait_for("worker 1 is not replaced: the new one could not start; the old ones serve on")
            assert sorted(served.pids("worker")) == pids
            # And when it is mended, the next signal does it.
            write(tmp_path, "v1")
            roll(served, 1)
            wait_until(lambda: "v1" in load.versions, 60, "the mended version answers")
        assert load.failures == []


def test_stopping_while_workers_are_replaced_leaves_nobody_behind(tmp_path: Path) -> None:
    write(tmp_path, "v0")
    served = Served("main:application", "--workers", "2", cwd=tmp_path, env=NO_BYTECODE)
    (tmp_path / "main.py").write_text("import time\nprint('slow import', flush=True)\ntime.sleep(60)\n")
    served.process.send_signal(signal.SIGHUP)
    served.wait_for("slow import")
    children = [pid for pid, _ in children_of(served.process.pid)]
    assert len(children) == 5  # broker, interface server, two workers and a third
    os.kill(served.process.pid, signal.SIGTERM)
    assert served.wait_ended()[0] == 0
    assert not any(is_alive(pid) for pid in children)
    served.stop()
