"""An application that blocks the loop of its worker for ever: the worker is ended, and says where it stood."""

import os
import signal
import threading

import httpx
import pytest

from tests.system.processes import Command, Served, wait_until

APPLICATION = """
import time

def stand_still():
    time.sleep(3600)

async def application(scope, receive, send):
    if scope["path"] == "/block":
        stand_still()
    if scope["path"] == "/slow":
        time.sleep(1.5)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"well"})
"""


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "main.py").write_text(APPLICATION)
    return tmp_path


def block(url):
    """Ask for what never answers; the answer comes when its worker is gone."""
    answers = []

    def ask():
        answers.append(httpx.post(f"{url}/block", timeout=60).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, answers


def test_the_supervisor_ends_a_worker_that_hangs_and_shows_where(directory):
    flags = ("--lifespan", "off", "--hang-timeout", "6")
    with Served("main:application", *flags, cwd=directory) as served:
        (pid,) = served.pids("worker")
        # Blocked for a while is slow, not dead.
        assert httpx.get(f"{served.url}/slow", timeout=60).text == "well"
        assert served.pids("worker") == [pid]
        thread, answers = block(served.url)
        served.wait_for(rf"worker 1 \(pid {pid}\) hangs: its loop has not turned for \d+ s", 60)
        served.wait_for(r'main\.py", line \d+ in stand_still', 60)
        # Killed if it has not ended 2 s after SIGABRT; that it has written its stack by then is what counts.
        served.wait_for("worker 1 was ended by SIG(ABRT|KILL); starting another")
        thread.join(30)
        assert answers == [502]
        wait_until(lambda: httpx.get(served.url, timeout=60).text == "well", 60, "another worker answers")


def test_a_frozen_process_is_ended_too(directory):
    flags = ("--lifespan", "off", "--hang-timeout", "5")
    with Served("main:application", *flags, cwd=directory) as served:
        (pid,) = served.pids("worker")
        os.kill(pid, signal.SIGSTOP)
        served.wait_for("worker 1 was ended by SIG(KILL|ABRT); starting another", 60)
        wait_until(lambda: httpx.get(served.url, timeout=60).text == "well", 60, "another worker answers")


def test_a_worker_without_a_supervisor_ends_itself(directory, broker_server):
    redis = ("--redis", broker_server.url)
    with (
        Command("interface", "--port", "0", *redis) as interface,
        Command(
            *("worker", "main:application", "--lifespan", "off", "--hang-timeout", "6", *redis), cwd=directory
        ) as worker,
    ):
        url = interface.wait_for(r"accepts on (http://\S+)").group(1)
        assert httpx.get(f"{url}/slow", timeout=60).text == "well"
        # Frozen is not hanging: its thread was frozen, too, and it goes on afterwards.
        worker.process.send_signal(signal.SIGSTOP)
        threading.Event().wait(8)
        worker.process.send_signal(signal.SIGCONT)
        assert httpx.get(f"{url}/", timeout=60).text == "well"
        thread, answers = block(url)
        status, output = worker.wait_ended()
        assert status == 1
        assert "trunkline: worker hangs: its loop has not turned for 6 s; it ends here:" in output
        assert "in stand_still" in output
        thread.join(30)
        assert answers == [502]
