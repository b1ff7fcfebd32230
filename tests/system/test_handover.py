"""Live WebSockets that change their workers: killed, frozen, stopped and refused, with real processes.

The rules in all their combinations are in tests/test_handover_walk.py; here is that they hold where processes die.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import threading
import time

import httpx
import pytest
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from channel_layer import Publisher
from tests.system.processes import Command, Served, is_alive, wait_until

APP = "tests.system.handover_application:application"
# A death is noticed within 5 s (docs/failure_modes.md); three times that, for a machine that does other things.
NOTICED_S = 15


@pytest.fixture(scope="module")
def served():
    with Served(APP, "--workers", "3") as served:
        yield served


def ask(client, text="x", timeout_s=NOTICED_S):
    """Send, and return (count, pid) of the answer."""
    client.send(text)
    return read(client, timeout_s)


def read(client, timeout_s=NOTICED_S):
    count, pid, _ = client.recv(timeout=timeout_s).split(" ", 2)
    return int(count), int(pid)


def end_worker(served, number):
    pid = served.pids("worker")[0]
    os.kill(pid, number)
    wait_until(lambda: not is_alive(pid), 60, "it ends")


def wait_for_workers(served, count=3):
    """Wait until so many workers answer: a killed one is replaced."""
    pids = set()

    def enough():
        pids.add(int(httpx.get(f"{served.url}/pid", timeout=60).text))
        alive = {pid for pid in pids if is_alive(pid)}
        return len(alive) >= count

    wait_until(enough, 90, f"{count} workers answer")


def test_a_counter_survives_the_death_of_its_worker():
    with Served("examples.counter:application", "--workers", "2") as served, connect(served.ws_url) as client:
        for expected in (1, 2, 3):
            client.send("")
            count, pid = client.recv(timeout=60).split()
            assert int(count) == expected
        os.kill(int(pid), signal.SIGKILL)
        for expected in (4, 5, 6):
            client.send("")
            count, other = client.recv(timeout=NOTICED_S).split()
            assert int(count) == expected
            assert other != pid


@pytest.mark.parametrize("options", ["commit=1", "notify=1", "commit=1&notify=1", "plain=1"])
def test_a_worker_that_stops_gives_its_websockets_away(served, options):
    wait_for_workers(served)
    with connect(f"{served.ws_url}/counter?{options}") as client:
        count, pid = ask(client)
        assert count == 1
        os.kill(pid, signal.SIGTERM)
        expected, pids = 1, set()
        deadline = time.monotonic() + NOTICED_S
        while len(pids) < 1 or expected < 20:
            assert time.monotonic() < deadline
            count, now_at = ask(client)
            expected += 1
            assert count == expected
            if now_at != pid:
                pids.add(now_at)
        assert len(pids) == 1
        wait_until(lambda: not is_alive(pid), 30, "the worker has gone, and needed no drain timeout for it")


def test_messages_of_many_clients_under_deaths_and_stops(served):
    """With commit: each answer once and in order, whatever happens to the workers."""
    wait_for_workers(served)
    stop = threading.Event()

    def talk(number):
        sent = 0
        with connect(f"{served.ws_url}/counter?commit=1", open_timeout=60) as client:
            while not stop.is_set():
                burst = 1 + (number + sent) % 5
                for _ in range(burst):
                    client.send(f"m{sent}")
                    sent += 1
                for answered in range(sent - burst, sent):
                    count, _, text = client.recv(timeout=60).split(" ", 2)
                    assert (int(count), text) == (answered + 1, f"m{answered}")
        return sent

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        talks = [pool.submit(talk, number) for number in range(12)]
        time.sleep(1)
        for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
            end_worker(served, number)
            # Another loss within a minute would be the second one of some connections.
            wait_for_workers(served)
            time.sleep(1)
        stop.set()
        assert all(talk.result() > 10 for talk in talks)


def test_rolling_restarts_close_nothing_and_pause_shortly():
    """Two workers, replaced one after the other, five times, under 100 clients that commit."""

    async def talk(url, stop, pauses):
        async with connect_async(url, open_timeout=60) as client:
            count = 0
            while not stop.is_set():
                began_at = time.monotonic()
                await client.send("x")
                answer = await client.recv()
                pauses.append(time.monotonic() - began_at)
                count += 1
                assert answer.startswith(f"{count} ")
                await asyncio.sleep(0.05)

    async def roll(served):
        stop, pauses = asyncio.Event(), []
        async with asyncio.TaskGroup() as talks:
            for _ in range(100):
                talks.create_task(talk(f"{served.ws_url}/counter?commit=1", stop, pauses))
            await until(lambda: len(pauses) > 500)
            for restarts in range(1, 6):
                os.kill(served.process.pid, signal.SIGHUP)
                await asyncio.to_thread(served.wait_for, "all workers are replaced", count=restarts)
                count = len(pauses)
                await until(lambda count=count: len(pauses) > count + 500)
            stop.set()
        return sorted(pauses)

    with Served(APP, "--workers", "2") as served:
        pauses = asyncio.run(roll(served))
    # Promised are 0.5 s; three times that for a machine that does other things.
    assert pauses[int(len(pauses) * 0.99)] < 1.5, pauses[-20:]


async def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def test_a_frozen_worker_is_fenced_when_it_wakes(served, tmp_path):
    wait_for_workers(served)
    log = tmp_path / "log"
    with (
        connect(f"{served.ws_url}/counter?commit=1&group=fenced&log={log}") as client,
        Publisher(served.redis_url) as publisher,
    ):
        count, pid = ask(client)
        assert count == 1
        os.kill(pid, signal.SIGSTOP)
        try:
            client.send("late")  # waits in the inbox of the one that sleeps, too
            count, other = read(client)
            assert count == 2
            assert other != pid
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: log.exists() and f"{pid} discarded" in log.read_text(), NOTICED_S, "it cleans up")
        assert log.read_text().splitlines() == [f"{pid} cancelled", f"{pid} discarded"]  # and no disconnect
        # Its group_discard was not that of the owner.
        publisher.group_send("fenced", {"type": "websocket.send", "text": "still here"})
        assert client.recv(timeout=60) == "still here"
        assert ask(client) == (3, other)


def test_broadcasts_reach_a_client_without_a_worker():
    with Served(APP, "--workers", "1") as served:
        with (
            connect(f"{served.ws_url}/counter?commit=1&group=gap") as client,
            Publisher(served.redis_url) as publisher,
        ):
            _, pid = ask(client)
            os.kill(pid, signal.SIGSTOP)
            client.send("waits")
            for number in range(20):
                publisher.group_send("gap", {"type": "websocket.send", "text": f"broadcast {number}"})
                assert client.recv(timeout=15) == f"broadcast {number}"
                time.sleep(0.05)
            os.kill(pid, signal.SIGKILL)
            assert read(client, 30)[0] == 2
            publisher.group_send("gap", {"type": "websocket.send", "text": "and after"})
            assert client.recv(timeout=15) == "and after"


def test_a_state_that_the_next_instance_refuses_is_closed_1012(served):
    wait_for_workers(served)
    with connect(f"{served.ws_url}/counter") as client:
        _, pid = ask(client, "refuse")
        os.kill(pid, signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=NOTICED_S)
        assert client.close_code == 1012


def test_a_message_that_kills_each_worker_is_closed_1011(served):
    wait_for_workers(served)
    with connect(f"{served.ws_url}/counter?commit=1") as client:
        ask(client)
        client.send("die")
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=2 * NOTICED_S)
        assert client.close_code == 1011
    wait_for_workers(served)


def test_without_a_checkpoint_a_worker_s_death_is_told(served):
    wait_for_workers(served)
    with connect(f"{served.ws_url}/counter?store=no") as client:
        _, pid = ask(client)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=NOTICED_S)
        assert client.close_code == 1012


def test_never_and_always():
    with Served(APP, "--workers", "2", "--handover", "never") as served:
        with connect(f"{served.ws_url}/counter?commit=1") as client:  # the extension is not offered
            _, pid = ask(client)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=NOTICED_S)
            assert client.close_code == 1012
    with Served(APP, "--workers", "2", "--handover", "always") as served:
        with connect(f"{served.ws_url}/counter?store=no") as client:
            assert ask(client)[0] == 1
            _, pid = ask(client)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not is_alive(pid), 30, "it is dead")
            served.wait_for("1 connections lose their application", NOTICED_S)
            count, other = ask(client)
            assert (count, other != pid) == (1, True)  # begun anew
            os.kill(other, signal.SIGTERM)
            wait_until(lambda: not is_alive(other), 30, "it ends")
            assert ask(client)[0] == 1


def test_nobody_to_go_on():
    with Served(APP, "--workers", "1", "--handover-timeout", "1") as served:
        with connect(f"{served.ws_url}/counter") as client:
            _, pid = ask(client)
            os.kill(served.process.pid, signal.SIGSTOP)  # so that no other worker is started
            try:
                os.kill(pid, signal.SIGTERM)
                with pytest.raises(ConnectionClosed):
                    client.recv(timeout=NOTICED_S)
                assert client.close_code == 1012
            finally:
                os.kill(served.process.pid, signal.SIGCONT)


def test_a_developer_s_browser_stays_connected_over_code_changes(tmp_path):
    source = """
async def app(scope, receive, send):
    assert scope["type"] == "websocket"
    handover = scope["extensions"]["websocket.handover"]
    count = handover.get("state", 0)
    await receive()
    await send({"type": "websocket.accept"})
    while True:
        await send({"type": "websocket.handover.state", "state": count})
        if (await receive())["type"] == "websocket.disconnect":
            return
        count += 1
        await send({"type": "websocket.send", "text": f"VERSION {count}"})
"""

    def write(version):
        """At once: the watch is to see one change. Nobody keeps bytecode, which is told apart by seconds only."""
        (tmp_path / "new").write_text(source.replace("VERSION", version))
        (tmp_path / "new").replace(tmp_path / "edited.py")

    write("one")
    environment = {"PYTHONDONTWRITEBYTECODE": "1"}
    with Served("edited:app", "--reload", "--lifespan", "off", cwd=tmp_path, env=environment) as served:
        with connect(served.ws_url) as client:
            client.send("")
            assert client.recv(timeout=60) == "one 1"
            for count, version in enumerate(("two", "three"), 2):
                write(version)
                served.wait_for("changed: restarting the workers", count=count - 1)
                served.wait_for("runs edited:app", count=count)
                client.send("")
                assert client.recv(timeout=60) == f"{version} {count}"


# What nobody has answered yet


def test_a_safe_request_runs_again_once(served, tmp_path):
    wait_for_workers(served)
    for times, status in ((1, 200), (2, 502)):
        file = tmp_path / f"deaths{times}"
        answer = httpx.get(f"{served.url}/die?times={times}&file={file}", timeout=3 * NOTICED_S)
        assert answer.status_code == status
        assert len(file.read_text().splitlines()) == 2
        wait_for_workers(served)


def test_an_unsafe_request_and_a_begun_response_run_once(served, tmp_path):
    wait_for_workers(served)
    file = tmp_path / "deaths"
    assert httpx.post(f"{served.url}/die?times=1&file={file}", timeout=NOTICED_S).status_code == 502
    assert len(file.read_text().splitlines()) == 1
    wait_for_workers(served)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{served.url}/die?times=2&start=1&file={file}", timeout=NOTICED_S)
    assert len(file.read_text().splitlines()) == 2
    wait_for_workers(served)


def test_a_websocket_before_its_accept_runs_again_once(served, tmp_path):
    wait_for_workers(served)
    with connect(f"{served.ws_url}/die?times=1&file={tmp_path / 'one'}", open_timeout=2 * NOTICED_S) as client:
        assert client.recv(timeout=60) == "survived"
    wait_for_workers(served)
    with pytest.raises(InvalidStatus) as caught:
        connect(f"{served.ws_url}/die?times=9&file={tmp_path / 'two'}", open_timeout=3 * NOTICED_S).close()
    assert caught.value.response.status_code == 502
    assert len((tmp_path / "two").read_text().splitlines()) == 2
    wait_for_workers(served)


def test_posts_are_counted_at_most_once_under_chaos(served, tmp_path):
    wait_for_workers(served)
    file = tmp_path / "posts"
    file.touch()
    stop = threading.Event()

    def post(name):
        statuses = {}
        number = 0
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                number += 1
                identity = f"{name}-{number}"
                with contextlib.suppress(httpx.TransportError):
                    statuses[identity] = client.post(f"{served.url}/count?file={file}&id={identity}").status_code
        return statuses

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        posts = [pool.submit(post, f"p{number}") for number in range(8)]
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
            time.sleep(1)
            with contextlib.suppress(ProcessLookupError):  # one that was told to end has ended just now
                os.kill(served.pids("worker")[-1], number)
        time.sleep(6)
        stop.set()
        statuses = {identity: status for each in posts for identity, status in each.result().items()}
    ran = file.read_text().splitlines()
    assert len(set(ran)) == len(ran), "a POST ran twice"
    assert {identity for identity, status in statuses.items() if status == 200} <= set(ran)
    assert set(statuses.values()) <= {200, 502}
    assert sum(status == 200 for status in statuses.values()) > 100
    wait_for_workers(served)


def test_an_opening_that_the_broker_lost_is_sent_again(broker_server):
    flags = ("--redis", broker_server.url)
    with Command("interface", "--port", "0", *flags) as interface:
        url = interface.wait_for(r"accepts on (http://\S+)").group(1)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asking = pool.submit(httpx.get, f"{url}/pid", timeout=60)
            client = broker_server.client()

            def taken():
                return any(client.lpop(key) for key in client.keys("*http.request*") if client.type(key) == b"list")

            wait_until(taken, 30, "the opening is stored")
            with Command("worker", APP, *flags):
                assert asking.result().status_code == 200
        interface.wait_for("was lost; sent again")
