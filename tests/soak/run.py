"""``make soak``: hundreds of clients count what they get while brokers and workers are killed, stopped and replaced.

    python -m tests.soak.run                    ten minutes
    python -m tests.soak.run --minutes 2        shorter; --seed repeats the events, not their timing
    python -m tests.soak.run --rolling 5        only rolling restarts of two workers, and how long the clients waited
    python -m tests.soak.run --rude             only how long the neighbours of rude clients wait (rude.py)
    python -m tests.soak.run --leaks 100000     so many connections, opened and closed in every way (leaks.py)

500 echoing WebSockets that checkpoint with ``commit`` and are members of one group, 50 downloads, 50 uploads, a
broadcast each 100 ms. Exit status 1 if anything was closed, lost, doubled, reordered or corrupted, or failed in a way
that docs/failure_modes.md does not allow. Not collected by pytest: tests/system/ holds short versions of it.
"""

import argparse
import asyncio
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.servers import BrokerServer, find_redis_server, find_valkey_server
from tests.soak import clients, leaks, rude
from tests.soak.chaos import Chaos
from tests.system.processes import Served, is_alive, memory_bytes

APP = "tests.soak.application:application"
BROADCAST_EACH_S = 0.1
PAUSE_P99_S = 0.5  # promised for rolling restarts
REGISTRY_S = 4.0  # until all have registered their groups anew, behind lost data
COMPLAINTS_MAX = 50  # that are printed


class Soak:
    """What the clients share: what they count, and what is allowed at the moment."""

    def __init__(self, served, directory, *, interval_s):
        self.port = served.port
        self.interval_s = interval_s
        self.posts = Path(directory) / "posts"
        self.posts.touch()
        self.answered_posts = set()
        self.tally = clients.Tally()
        self.broadcasts = clients.Broadcasts()
        self.is_over = False
        self.complaints = 0
        self.data_lost_at = float("-inf")
        self._began_at = time.monotonic()
        self._outages = []  # [begin, end]
        self._deaths = []  # when a worker was killed, or frozen until it counts as dead
        self._longest = (0.0, "")  # since the last event

    def now(self):
        return asyncio.get_running_loop().time()

    def tell(self, text):
        pause_s, who = self._longest
        if pause_s:
            print(f"{'':10}   longest wait for an answer since: {pause_s:.2f} s ({who})")
        self._longest = (0.0, "")
        print(f"{time.monotonic() - self._began_at:8.2f} s  {text}", flush=True)

    def complain(self, text):
        self.complaints += 1
        if self.complaints <= COMPLAINTS_MAX:
            self.tell(f"FAULT: {text}")

    def paused(self, socket, pause_s):
        if pause_s > self._longest[0]:
            self._longest = (pause_s, socket.who)
        if pause_s > self.tally.slowest[0]:
            self.tally.slowest = (pause_s, f"{socket.who}, {time.monotonic() - self._began_at:.1f} s")

    def has_lost_data(self):
        """True while the registry of groups may not be whole."""
        return self.now() - self.data_lost_at < REGISTRY_S

    @contextlib.contextmanager
    def outage(self):
        outage = [self.now(), float("inf")]
        self._outages.append(outage)
        try:
            yield
        finally:
            outage[1] = self.now()

    def worker_died(self, pid):
        self._deaths.append(self.now())
        self.broadcasts.died(pid)

    def _has_died_since(self, began_at):
        return any(began_at <= at for at in self._deaths)

    def refused(self, who, status, headers, began_at, *, is_safe):
        """A request was answered with an error: count it, allowed or not."""
        now = self.now()
        waited = now - began_at > 4  # --broker-wait is 5 s
        is_outage = any(begin < now and end > began_at for begin, end in self._outages)
        if status == 502 and not is_safe and self._has_died_since(began_at):
            self.tally.bad_gateway_allowed += 1
        elif status == 503 and waited and is_outage and "retry-after" in headers:
            self.tally.refused_allowed += 1
        else:
            self.tally.failed += 1
            self.complain(f"{who}: status {status} {headers} after {now - began_at:.1f} s")

    def cut(self, text, pid, began_at):
        """A transfer ended too early: allowed if its worker was killed."""
        if pid in self.broadcasts.dead or (not pid and self._has_died_since(began_at)):
            self.tally.cut_allowed += 1
        else:
            self.tally.failed += 1
            self.complain(text)

    def check_posts(self):
        ran = self.posts.read_text().splitlines()
        if twice := len(ran) - len(set(ran)):
            self.tally.failed += twice
            self.complain(f"{twice} POSTs ran twice")
        if never := self.answered_posts - set(ran):
            self.tally.failed += len(never)
            self.complain(f"POSTs that never ran were answered: {sorted(never)[:5]}")


async def open_sockets(soak, count):
    loop = asyncio.get_running_loop()
    places = asyncio.Semaphore(50)

    async def one(number):
        async with places:
            _, socket = await loop.create_connection(
                lambda: clients.Socket(f"socket {number}", soak), "127.0.0.1", soak.port
            )
            await asyncio.wait_for(socket.joined, clients.CONNECT_TIMEOUT_S)
            return socket

    sockets = await asyncio.gather(*(one(number) for number in range(count)))
    soak.broadcasts.member_count = count
    for socket in sockets:
        socket.start()
    return sockets


async def settle(soak, sockets):
    """Wait until everything has come that is due, and close."""
    deadline = soak.now() + clients.PATIENCE_S
    waiting = list(sockets)
    while waiting and soak.now() < deadline:
        await asyncio.sleep(0.2)
        waiting = [socket for socket in waiting if not socket.is_answered or socket.missing_broadcasts()]
    for socket in sockets:
        await socket.finish()


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def report(soak, served, seconds):
    tally = soak.tally
    tally.broadcasts_counted = len(soak.broadcasts.counted_since(0))
    tracebacks = served.output.count("Traceback")
    print(f"""
{seconds:.0f} s: {tally.echoes} answers, {tally.broadcasts} broadcasts ({tally.broadcasts_counted} counted) to \
{soak.broadcasts.member_count} sockets, {tally.downloads} downloads, {tally.uploads} uploads
closed sockets       {tally.closed}
lost                 {tally.lost}
doubled              {tally.doubled}
reordered            {tally.reordered}
corrupted            {tally.corrupted}
failed               {tally.failed}
tracebacks           {tracebacks}
allowed: cut with their worker {tally.cut_allowed}, 502 {tally.bad_gateway_allowed}, 503 {tally.refused_allowed}
waits for an answer: p50 {percentile(tally.pauses_s, 0.5) * 1000:.1f} ms, \
p99 {percentile(tally.pauses_s, 0.99) * 1000:.0f} ms, longest {tally.slowest[0]:.2f} s ({tally.slowest[1]})""")
    if tracebacks:
        print(re.search(r"(?s)Traceback.{0,3000}", served.output)[0])
    return tally.is_clean and not tracebacks


def memory(served):
    return [memory_bytes(pid) // 1024**2 for pid in served.pids("interface server")]


async def soak_for(served, server, arguments, directory):
    soak = Soak(served, directory, interval_s=1.0)
    sockets = await open_sockets(soak, arguments.sockets)
    soak.tell(f"{len(sockets)} sockets are open; seed {arguments.seed}")
    before = memory(served)
    began_at = soak.now()
    chaos = Chaos(served, server, soak, arguments.seed)
    async with asyncio.TaskGroup() as tasks:
        for number in range(arguments.streams):
            tasks.create_task(clients.download_for_ever(number, soak))
            tasks.create_task(clients.upload_for_ever(number, soak))
        tasks.create_task(clients.broadcast_for_ever(soak, BROADCAST_EACH_S))
        try:
            await chaos.rage(60 * arguments.minutes)
            await asyncio.sleep(10)  # what began during the last event is noticed and over
        finally:
            soak.is_over = True
    soak.tell("waiting for what is due")
    await settle(soak, sockets)
    soak.check_posts()
    print("events:", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(chaos.counts.items())))
    print(f"interface servers: {before} MiB before, {memory(served)} MiB behind it")
    return report(soak, served, soak.now() - began_at)


async def roll_for(served, arguments, directory):
    """Rolling restarts, nothing else; a message of each client each 0.5 s."""
    soak = Soak(served, directory, interval_s=0.5)
    sockets = await open_sockets(soak, arguments.sockets)
    began_at = soak.now()
    worst = []
    await asyncio.sleep(3)
    soak.tell(f"quiet: p99 {percentile(soak.tally.pauses_s, 0.99) * 1000:.0f} ms")
    for number in range(1, arguments.rolling + 1):
        before, pids = len(soak.tally.pauses_s), served.pids("worker")
        os.kill(served.process.pid, signal.SIGHUP)
        await asyncio.to_thread(served.wait_for, "all workers are replaced", 60, number)
        assert not any(is_alive(pid) for pid in pids)
        await asyncio.sleep(2)  # the last answers of this restart
        pauses = soak.tally.pauses_s[before:]
        worst.append(percentile(pauses, 0.99))
        soak.tell(f"restart {number}: {len(pauses)} answers, p99 {worst[-1] * 1000:.0f} ms, max {max(pauses):.2f} s")
    soak.is_over = True
    await settle(soak, sockets)
    is_clean = report(soak, served, soak.now() - began_at)
    print(f"p99 of the worst restart: {max(worst) * 1000:.0f} ms, promised are {PAUSE_P99_S * 1000:.0f} ms")
    return is_clean and max(worst) < PAUSE_P99_S


def main():
    parser = argparse.ArgumentParser(prog="tests.soak.run", description="Breaks everything and counts what is lost.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "big"))
    parser.add_argument("--sockets", type=int, default=500)
    parser.add_argument("--streams", type=int, default=50, help="downloads, and as many uploads")
    parser.add_argument("--rolling", type=int, metavar="TIMES", help="only rolling restarts, of two workers")
    parser.add_argument("--leaks", type=int, metavar="CONNECTIONS", help="only open and close connections")
    parser.add_argument("--rude", action="store_true", help="only measure the neighbours of rude clients")
    parser.add_argument("--log", type=Path, help="file for what the servers print")
    arguments = parser.parse_args()
    if arguments.leaks:
        return 0 if leaks.run(arguments.leaks) else 1
    if not arguments.rolling:
        rude.run()
        if arguments.rude:
            return 0
    program = find_valkey_server() or find_redis_server()
    if program is None:
        sys.exit("neither valkey-server nor redis-server is installed")
    halves = ("2", "2") if arguments.rolling else ("2", "3")
    with tempfile.TemporaryDirectory() as directory, BrokerServer(program) as server:
        flags = ("--redis", server.url, "--interfaces", halves[0], "--workers", halves[1], "--no-access-log")
        # A slow machine is no reason to cut an upload of some seconds.
        flags += ("--drain-timeout", "60")
        with Served(APP, *flags) as served:
            try:
                if arguments.rolling:
                    is_clean = asyncio.run(roll_for(served, arguments, directory))
                else:
                    is_clean = asyncio.run(soak_for(served, server, arguments, directory))
            finally:
                if arguments.log:
                    arguments.log.write_text(served.output)
    print("clean" if is_clean else "NOT CLEAN")
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
