"""``--leaks``: many connections that begin and end in every way, and then everything must be as before.

The ways, and what is looked at, are those of tests/system/test_leaks.py; here are so many that a leak of a hundred
bytes a connection shows. Two commands one after the other: 19 of 20 connections go to one worker, in all ways that a
client has; the rest changes its worker, by SIGTERM and by SIGKILL, at a command of two.
"""

import asyncio
import os
import re
import time

from tests.system import test_leaks as ways
from tests.system.processes import Served, wait_until

MIB = 1024**2
HANDED_OVER_SHARE = 1 / 20
HANDED_OVER_EACH = 200
# Of a process between the first tenth and the end. 100 bytes for each of 100,000 connections would be 9.5 MiB.
GROWTH_BYTES_MAX = 10 * MIB


def run(count):
    """Print what is left of ``count`` connections; return True if nothing is."""
    handed_over = int(count * HANDED_OVER_SHARE)
    return all([_run_ways(count - handed_over), _run_handed_over(handed_over)])


def _run_ways(count):
    rounds = max(2, count // (len(ways.WAYS) * ways.EACH))
    with Served(ways.APP, "--workers", "1", "--no-access-log") as served:
        household = ways.Household(served)
        wait_until(lambda: len(list(household.redis.scan_iter("*lease*"))) == 2, 10, "both processes have a lease")
        before, descriptors = household.look(), household.descriptors()

        def one_round(number):
            asyncio.run(ways.one_round(served.port))

        growth = _repeat(one_round, rounds, len(ways.WAYS) * ways.EACH, household.memory)
        left = _wait_as_before(before, household.look)
        now = household.descriptors()
        household.redis.close()
        served.stop()
        told = served.output
    return _report(left, descriptors, now, growth, told)


def _run_handed_over(count):
    rounds = max(2, count // HANDED_OVER_EACH)
    with Served(ways.HANDOVER_APP, "--workers", "2", "--no-access-log") as served:
        household = ways.TwoWorkers(served)
        household.wait_for_both()
        pids = {"interface server": household.interface, "worker": household.stays}

        def descriptors():
            return {role: len(os.listdir(f"/proc/{pid}/fd")) for role, pid in pids.items()}

        before, descriptors_before = household.look(), descriptors()

        def one_round(number):
            asyncio.run(household.one_round(number, HANDED_OVER_EACH))

        growth = _repeat(one_round, rounds, HANDED_OVER_EACH, household.memory)
        household.wait_for_both()
        left = _wait_as_before(before, household.look)
        print(f"{household.handed_over} connections changed their worker")
        now = descriptors()
        household.redis.close()
        served.stop()
        told = served.output
    return _report(left, descriptors_before, now, growth, told)


def _repeat(one_round, rounds, each, memory):
    """Run the rounds; return how many bytes each process has grown since the first tenth."""
    began_at, first, next_line = time.monotonic(), max(1, rounds // 10), 0
    baseline = {}
    for number in range(rounds):
        if number == first:
            baseline = memory()
        one_round(number)
        if number >= next_line or number == rounds - 1:
            next_line += max(1, rounds // 10)
            shown = ", ".join(f"{role} {size / MIB:.1f} MiB" for role, size in memory().items())
            print(f"{time.monotonic() - began_at:6.0f} s  {(number + 1) * each} connections: {shown}", flush=True)
    return {role: now - baseline[role] for role, now in memory().items()}


def _wait_as_before(before, look):
    """What differs from ``before`` when all time for ending is over, as text."""
    deadline = time.monotonic() + 30
    while (now := look()) != before:
        if time.monotonic() > deadline:
            return f"before: {before}\nnow:    {now}"
        time.sleep(1)
    return ""


def _report(left, descriptors_before, descriptors, growth, told):
    faults = [left] if left else []
    faults += [
        f"{role}: {count} descriptors, {descriptors_before[role]} before"
        for role, count in descriptors.items()
        if count > descriptors_before[role] + 5
    ]
    faults += [f"{role} has grown by {size} bytes" for role, size in growth.items() if size > GROWTH_BYTES_MAX]
    if not re.search(r"<Connections open=0 known=0 parked=0 openings=0 workers=0 <BroadcastMemory 0 of", told):
        faults.append("the interface server still held connections when it stopped")
    shown = ", ".join(f"{role} {size / MIB:+.1f} MiB" for role, size in growth.items())
    print(f"grown: {shown}; descriptors: {descriptors_before} before, {descriptors} now")
    print("\n".join(faults) or "keys, objects, tasks, memberships, descriptors: as before", flush=True)
    return not faults
