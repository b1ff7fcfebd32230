"""What happens to the broker and the workers during a soak, at random.

Deadly events (a worker is killed, or frozen for longer than a lease) are noticed more than a minute apart: a
connection that loses two owners within a minute is closed on purpose. All others come at any time, also on top of
each other, but for two outages of the broker.
"""

import asyncio
import itertools
import os
import random
import signal

from tests.system.processes import is_alive

QUIET_S = (1.0, 6.0)  # between two events
SHORT_FREEZE_S = (0.5, 1.8)  # shorter than a lease: nobody is declared dead
LONG_FREEZE_S = (8.0, 12.0)
OUTAGE_S = (1.0, 7.0)
DEADLY_EACH_S = 62.0
LOSS = "lose their application"
# The second: a new worker was killed while it started.
ROLLED = "all workers are replaced|is not replaced"
ROLL_TIMEOUT_S = 240.0  # three drains of up to 60 s, and what else happens meanwhile


class Chaos:
    def __init__(self, served, server, soak, seed):
        self._served = served
        self._server = server
        self._soak = soak
        self._chance = random.Random(seed)
        self._deadly_at = -DEADLY_EACH_S  # the last such event, or when it was noticed
        self._is_noticed = True
        self._loss_lines = 0  # of the log
        self._rolls = 0
        self._frozen = set()  # pids that stand still
        self._running = {}  # kind of event -> its task
        self.counts = {}

    async def rage(self, seconds):
        until = self._soak.now() + seconds
        watch = asyncio.create_task(self._watch_losses())
        kinds = {
            "broker": [self.restart_broker, self.flush_broker, self.stop_broker],
            "freeze": [self.stop_worker],
            "roll": [self.roll],
            "death": [self.kill_worker, self.freeze_worker],
        }
        turns = {kind: itertools.cycle(self._chance.sample(events, len(events))) for kind, events in kinds.items()}
        try:
            while self._soak.now() < until:
                await asyncio.sleep(self._chance.uniform(*QUIET_S))
                free = [kind for kind in kinds if self._may_happen(kind)]
                if free:
                    kind = self._chance.choice(free)
                    event = next(turns[kind])
                    self.counts[event.__name__] = self.counts.get(event.__name__, 0) + 1
                    self._running[kind] = asyncio.create_task(event())
            await asyncio.gather(*self._running.values())
            self._soak.tell("the events are over")
        finally:
            watch.cancel()
            for task in self._running.values():
                task.cancel()

    def _may_happen(self, kind):
        if kind in self._running:
            task = self._running[kind]
            if not task.done():
                return False
            task.result()
        if kind != "death":
            return True
        since_s = self._soak.now() - self._deadly_at
        # One that had nothing is missed by nobody.
        return since_s > DEADLY_EACH_S and (self._is_noticed or since_s > 2 * DEADLY_EACH_S)

    async def _watch_losses(self):
        while True:
            await asyncio.sleep(0.2)
            lines = self._served.output.count(LOSS)
            if lines != self._loss_lines:
                self._loss_lines = lines
                self._deadly_at, self._is_noticed = self._soak.now(), True
                self._soak.tell("a loss is noticed")

    # The broker

    async def restart_broker(self):
        pause_s = self._chance.choice((0, 0.3, 1.5))
        self._soak.tell(f"SIGKILL of the broker, an empty one after {pause_s} s")
        with self._soak.outage():
            self._soak.data_lost_at = self._soak.now()
            self._server.kill()
            await asyncio.sleep(pause_s)
            self._server.start()
            self._soak.data_lost_at = self._soak.now()

    async def flush_broker(self):
        self._soak.tell("FLUSHALL")

        def flush():
            with self._server.client() as client:
                client.flushall()

        with self._soak.outage():
            self._soak.data_lost_at = self._soak.now()
            await asyncio.to_thread(flush)
            self._soak.data_lost_at = self._soak.now()

    async def stop_broker(self):
        seconds = self._chance.uniform(*OUTAGE_S)
        self._soak.tell(f"SIGSTOP of the broker for {seconds:.1f} s")
        with self._soak.outage():
            self._server.pause()
            try:
                await asyncio.sleep(seconds)
            finally:
                self._server.resume()

    # Workers

    def _any_worker(self):
        alive = [pid for pid in self._served.pids("worker") if is_alive(pid)]
        # Not one that stands still already: the end of the shorter stop would be that of the longer, too.
        return self._chance.choice([pid for pid in alive if pid not in self._frozen] or alive)

    async def stop_worker(self):
        pid, seconds = self._any_worker(), self._chance.uniform(*SHORT_FREEZE_S)
        self._soak.tell(f"SIGSTOP of worker {pid} for {seconds:.1f} s")
        await self._freeze(pid, seconds)

    async def freeze_worker(self):
        pid, seconds = self._any_worker(), self._chance.uniform(*LONG_FREEZE_S)
        self._deadly_at, self._is_noticed = self._soak.now(), False
        self._soak.tell(f"SIGSTOP of worker {pid} for {seconds:.1f} s: it is taken for dead")
        self._soak.worker_died(pid)
        await self._freeze(pid, seconds)

    async def _freeze(self, pid, seconds):
        os.kill(pid, signal.SIGSTOP)
        self._frozen.add(pid)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._frozen.discard(pid)
            if is_alive(pid):
                os.kill(pid, signal.SIGCONT)

    async def kill_worker(self):
        pid = self._any_worker()
        self._deadly_at, self._is_noticed = self._soak.now(), False
        self._soak.tell(f"SIGKILL of worker {pid}")
        os.kill(pid, signal.SIGKILL)
        self._soak.worker_died(pid)

    async def roll(self):
        self._rolls += 1
        self._soak.tell("SIGHUP: the workers are replaced, one after the other")
        os.kill(self._served.process.pid, signal.SIGHUP)
        await asyncio.to_thread(self._served.wait_for, ROLLED, ROLL_TIMEOUT_S, self._rolls)
        self._soak.tell("the workers are replaced")
