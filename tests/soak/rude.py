"""How long the neighbours of rude clients wait, compared with a quiet time. Only printed: the machine decides, too.

A rude client is a program that needs the same cores. So each kind is compared with two times: one in which nobody is
rude, and one in which a process takes as much CPU as this rude client took, and does nothing with it. The second is
what the server adds. Quiet times are measured again and again, since a machine has moods; the one before counts.

The rude clients, and how each of them ends, are in tests/system/test_rude_clients.py; here some of each kind go on
for some seconds, in a process of their own, while clients beside them measure.
"""

import asyncio
import contextlib
import multiprocessing
import threading
import time
from types import SimpleNamespace

from tests.system.processes import Served, cpu_s
from tests.system.test_rude_clients import HEAD, open_socket, open_websocket

APP = "tests.system.applications:application"
EACH_S = 6.0
SETTLE_S = 2.0  # until the rude ones have begun; what is measured before does not count
NEIGHBOURS = 10
PAUSE_S = 0.02
BUSY_PERIOD_S = 0.01  # in which a process that only takes CPU works once and sleeps once


def flood_pings(served):
    flood(open_websocket(served), b"\x89\x80\0\0\0\0" * 10_000)


def flood_tiny_messages(served):
    flood(open_websocket(served), b"\x82\x81\0\0\0\0x" * 10_000)


def flood_fragments(served):
    flood(open_websocket(served), b"\x02\x81\0\0\0\0x" + b"\x00\x81\0\0\0\0x" * 50 + b"\x80\x80\0\0\0\0")


def flood_requests(served):
    flood(open_socket(served), (HEAD + b"\r\n") * 500)


def flood_chunks(served):
    head = b"POST /upload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    flood(open_socket(served, head), b"1\r\nx\r\n" * 10_000)


def read_nothing(served):
    for _ in range(50):
        target = b"GET /download?bytes=100000000"
        KEPT.append(open_socket(served, target + b" HTTP/1.1\r\nHost: x\r\n\r\n", receive_bytes=4096))


def say_half_a_head(served):
    for _ in range(500):
        KEPT.append(open_socket(served, HEAD))


def connect_and_leave(served):
    while True:
        open_socket(served, HEAD + b"\r\n").close()


KINDS = {
    "500 halves of a head": (say_half_a_head, 1),
    "50 downloads nobody reads": (read_nothing, 1),
    "clients that leave at once": (connect_and_leave, 1),
    "two floods of pings": (flood_pings, 2),
    "two floods of tiny messages": (flood_tiny_messages, 2),
    "two floods of fragments": (flood_fragments, 2),
    "two floods of requests": (flood_requests, 2),
    "two floods of chunks": (flood_chunks, 2),
}
KEPT = []  # open until the process ends


def flood(client, data):
    """Send for ever, and read what comes."""
    client.settimeout(None)
    threading.Thread(target=_read, args=(client,), daemon=True).start()
    while True:
        client.sendall(data)


def _read(client):
    with contextlib.suppress(OSError):
        while client.recv(65536):
            pass


def _be_busy(share):
    """Take so much of a core, and do nothing with it."""
    while True:
        begun = time.process_time()
        while time.process_time() - begun < share * BUSY_PERIOD_S:
            pass
        time.sleep((1 - share) * BUSY_PERIOD_S)


def _be_rude(kind, port):
    rude, count = KINDS[kind]
    served = SimpleNamespace(port=port)
    threads = [threading.Thread(target=_until_refused, args=(rude, served), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(60)  # until this process is killed


def _until_refused(rude, served):
    with contextlib.suppress(OSError):
        rude(served)


async def _measure(port):
    """How long each of some polite clients waited, in order."""
    loop = asyncio.get_running_loop()
    from_s, until_s = loop.time() + SETTLE_S, loop.time() + EACH_S
    waits_s = []

    async def neighbour():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while loop.time() < until_s:
            begun = loop.time()
            writer.write(HEAD + b"\r\n")
            await asyncio.wait_for(reader.readuntil(b"hello"), 30)
            if begun > from_s:
                waits_s.append(loop.time() - begun)
            await asyncio.sleep(PAUSE_S)
        writer.close()

    await asyncio.gather(*(neighbour() for _ in range(NEIGHBOURS)))
    return sorted(waits_s)


def _beside(port, target, *arguments):
    """Measure beside a process that runs ``target``; return the waits, and how much of a core it took."""
    if target is None:
        return asyncio.run(_measure(port)), 0.0
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        waits_s = asyncio.run(_measure(port))
        share = min(1.0, cpu_s(process.pid) / EACH_S)
    finally:
        process.kill()
        process.join()
    return waits_s, share


def _show(who, waits_s, compared):
    p50_s, p99_s = (waits_s[int(len(waits_s) * part)] for part in (0.5, 0.99))
    ratios = ", ".join(f"{p99_s / other_s:4.1f} times the {name} one" for name, other_s in compared)
    print(
        f"{who:40} p50 {p50_s * 1000:6.1f} ms, p99 {p99_s * 1000:6.1f} ms{', ' if ratios else ''}{ratios}, "
        f"of {len(waits_s)} requests",
        flush=True,
    )
    return p99_s


def run():
    """Print the neighbours' p99, quiet and beside each kind of rude client."""
    with Served(APP, "--workers", "2", "--no-access-log") as served:
        for kind in KINDS:
            quiet_s = _show("neighbours of nobody", _beside(served.port, None)[0], ())
            rude_waits_s, share = _beside(served.port, _be_rude, kind, served.port)
            busy_waits_s, _ = _beside(served.port, _be_busy, share)
            busy_s = _show(f"… of a process that takes {share:4.0%} CPU", busy_waits_s, [("quiet", quiet_s)])
            _show(f"… of {kind}", rude_waits_s, [("quiet", quiet_s), ("busy", busy_s)])
