"""The command with its real processes: frozen ones, and a broker that is away when it starts and while it runs."""

import os
import signal
import urllib.request

from tests.system.processes import Command, Served, children_of, is_alive, wait_until

APP = "tests.system.applications:application"


def test_no_frozen_child_survives_a_killed_supervisor():
    with Served(APP, "--workers", "2") as served:
        children = [pid for pid, _ in children_of(served.process.pid)]
        frozen = [served.pids("worker")[0], served.pids("interface server")[0], served.broker_pid()]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        os.kill(served.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in children), 5, "all children have ended")
        assert len(children) == 4


def test_halves_with_several_processes_need_the_broker_at_the_start_and_outlive_its_absence(broker_server):
    redis = ("--redis", broker_server.url)
    interfaces = ("interface", "--port", "0", "--interfaces", "2", *redis)
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
            with urllib.request.urlopen(url, timeout=20) as answer:
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
