"""The command with its real processes: frozen ones, and a broker that is away when it starts and while it runs."""

import os
import signal
import urllib.request

from websockets.sync.client import connect

from tests.servers import BrokerServer
from tests.system.processes import Command, Served, children_of, is_alive, wait_until

APP = "tests.system.applications:application"


def test_no_frozen_child_survives_a_killed_supervisor():
    with Served(APP, "--workers", "2") as served:
        children = [pid for pid, _ in children_of(served.process.pid)]
        frozen = [served.pids("worker")[0], served.pids("interface server")[0], served.broker_pid()]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        os.kill(served.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in children), 30, "all children have ended")
        assert len(children) == 4


def test_halves_with_several_processes_need_the_broker_at_the_start_and_outlive_its_absence(broker_server):
    redis = ("--redis", broker_server.url)
    # What is asked as soon as the broker is back waits for the processes to notice, however long that takes.
    interfaces = ("interface", "--port", "0", "--interfaces", "2", "--broker-wait", "60", *redis)
    workers = ("worker", APP, "--workers", "2", *redis)
    broker_server.kill()
    for argv in (interfaces, workers):
        with Command(*argv) as command:
            status, output = command.wait_ended()
        assert status == 1, output
        assert "is not reachable" in output
        assert "Traceback" not in output
        assert len(output.splitlines()) == 1
    broker_server.start()
    with Command(*interfaces) as interface, Command(*workers) as worker:
        url = interface.wait_for(r"serves .* on (http://\S+)").group(1)
        worker.wait_for(r"2 workers")

        def get():
            with urllib.request.urlopen(url, timeout=60) as answer:
                return answer.read()

        assert get() == b"hello"
        pids = [pid for command in (interface, worker) for pid, _ in children_of(command.process.pid)]
        assert len(pids) == 4
        broker_server.kill()
        for command in (interface, worker):
            command.wait_for(r"reconnecting", count=2)
        broker_server.start()
        assert get() == b"hello"
        assert all(is_alive(pid) for pid in pids)
        # And to the end while it is away.
        broker_server.kill()
        for command in (interface, worker):
            assert command.stop() == 0, command.output
            assert "Traceback" not in command.output


def test_a_broker_that_dies_while_processes_start_is_waited_for(broker_server, tmp_path):
    """Not the end of the command: while it runs it would wait, too."""
    go = tmp_path / "go"
    (tmp_path / "slow.py").write_text(
        f"""
import pathlib, time
print("importing", flush=True)
while not pathlib.Path({str(go)!r}).exists():
    time.sleep(0.02)

async def application(scope, receive, send):
    await send({{"type": "http.response.start", "status": 200, "headers": []}})
    await send({{"type": "http.response.body", "body": b"at last"}})
"""
    )
    redis = ("--redis", broker_server.url)
    with Command("worker", "slow:application", "--lifespan", "off", "--workers", "2", *redis, cwd=tmp_path) as worker:
        worker.wait_for("importing")
        broker_server.kill()
        go.touch()
        worker.wait_for("worker 1 ended with status 1; starting another", count=2)
        broker_server.start()
        worker.wait_for("2 workers")
        with Command("interface", "--port", "0", *redis) as interface:
            url = interface.wait_for(r"accepts on (http://\S+)").group(1)
            with urllib.request.urlopen(url, timeout=60) as answer:
                assert answer.read() == b"at last"
    assert worker.process.returncode == 0


def test_workers_are_replaced_through_an_outage(broker_server, tmp_path):
    """A broker that is away is no fault of the new code: SIGHUP is not forgotten."""
    application = """
async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"VERSION"})
"""
    # Of another length than the next one: what Python compiled of a file of the same second and length would stay.
    (tmp_path / "rolled.py").write_text(application.replace("VERSION", "first"))
    flags = ("--lifespan", "off", "--workers", "2", "--broker-wait", "60", "--redis", broker_server.url)
    with Served("rolled:application", *flags, cwd=tmp_path) as served:
        (tmp_path / "rolled.py").write_text(application.replace("VERSION", "second"))
        broker_server.kill()
        os.kill(served.process.pid, signal.SIGHUP)
        served.wait_for("no broker for the new worker 1; trying again", count=2)
        broker_server.start()
        served.wait_for("all workers are replaced")
        with urllib.request.urlopen(served.url, timeout=60) as answer:
            assert answer.read() == b"second"


def test_no_password_of_the_broker_is_in_logs_and_command_lines(valkey_program):
    with BrokerServer(valkey_program, tcp=True, password="hidden") as broker:
        for url in (broker.url, broker.url.replace(":hidden@", "") + "?password=hidden"):
            with Command("interface", "--port", "0", "--interfaces", "2", env={"TRUNKLINE_REDIS": url}) as command:
                command.wait_for("2 interface servers")
                children = children_of(command.process.pid)
            assert len(children) == 2
            assert "hidden" not in command.output + "".join(line for _, line in children)


def test_deaths_are_told_by_the_supervisor():
    """How soon is a matter of the machine; that nobody waited for a lease to end stands in the log."""
    with Served("examples.counter:application", "--workers", "2") as served:
        with connect(served.ws_url) as client:
            client.send("")
            count, pid = client.recv(timeout=60).split()
            assert count == "1"
            os.kill(int(pid), signal.SIGKILL)
            served.wait_for(r"process w\w+ is dead: its supervisor says so")
            client.send("")
            assert client.recv(timeout=60).split()[0] == "2"
            os.kill(served.pids("interface server")[0], signal.SIGKILL)
            served.wait_for(r"process i\w+ is dead: its supervisor says so")
        assert "it does not answer" not in served.output
