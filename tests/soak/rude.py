"""How long the neighbours of rude clients wait, compared with a quiet time. Only printed: the machine decides, too.

The rude clients, and how each of them ends, are in tests/system/test_rude_clients.py; here some of each kind go on
for some seconds, in a process of their own, while clients beside them measure.
"""

import asyncio
import contextlib
import multiprocessing
import threading
import time
from types import SimpleNamespace

from tests.system.processes import Served
from tests.system.test_rude_clients import HEAD, open_socket, open_websocket

APP = "tests.system.applications:application"
EACH_S = 6.0
SETTLE_S = 2.0  # until the rude ones have begun; what is measured before does not count
NEIGHBOURS = 10
PAUSE_S = 0.02


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


def run():
    """Print the neighbours' p99, quiet and beside each kind of rude client."""
    context = multiprocessing.get_context("spawn")
    with Served(APP, "--workers", "2", "--no-access-log") as served:
        quiet_s = None
        for kind in (None, *KINDS):
            process = None
            if kind is not None:
                process = context.Process(target=_be_rude, args=(kind, served.port), daemon=True)
                process.start()
            try:
                waits_s = asyncio.run(_measure(served.port))
            finally:
                if process is not None:
                    process.kill()
                    process.join()
            p99_s = waits_s[int(len(waits_s) * 0.99)]
            quiet_s = quiet_s or p99_s
            shown = f"p99 {p99_s * 1000:6.1f} ms, {p99_s / quiet_s:4.1f} times the quiet one"
            print(f"neighbours of {kind or 'nobody':28} {shown}, of {len(waits_s)} requests", flush=True)
