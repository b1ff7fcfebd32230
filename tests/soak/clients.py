"""The soak's clients, and what they count: nothing may be lost, doubled, reordered, corrupted or closed.

Lives here: a WebSocket client that costs little enough for hundreds of them to get ten broadcasts a second in one
process, transfers over plain sockets, and the ``Tally``. Does not live here: what happens to the servers
(chaos.py), what is allowed (run.py asks ``Tally``).
"""

import asyncio
import hashlib
import os
import random
import struct
from dataclasses import dataclass, field

from tests.soak.application import PIECE_BYTES, body_pieces

# Nothing waits longer, whatever happened: a worker's death, noticed behind an outage, and a queue.
PATIENCE_S = 60.0
CONNECT_TIMEOUT_S = 60.0
# A worker that has just started reaches, while the registry of groups is not whole, whom it has a link with. So long
# it takes until it has one with each interface server.
YOUNG_S = 1.0


@dataclass
class Tally:
    """What went wrong, and how much went well. What the table of docs/failure_modes.md allows is counted apart."""

    echoes: int = 0
    broadcasts: int = 0  # sent
    broadcasts_counted: int = 0  # whose sender lived and whose group_send returned
    downloads: int = 0
    uploads: int = 0
    closed: int = 0
    lost: int = 0
    doubled: int = 0
    reordered: int = 0
    corrupted: int = 0
    failed: int = 0  # requests, in any way that is not allowed
    cut_allowed: int = 0  # responses of killed workers
    bad_gateway_allowed: int = 0  # uploads to killed workers
    refused_allowed: int = 0  # 503 during an outage
    pauses_s: list[float] = field(default_factory=list)  # from a message to its answer
    slowest: tuple[float, str] = (0.0, "")

    @property
    def is_clean(self) -> bool:
        return not (self.closed or self.lost or self.doubled or self.reordered or self.corrupted or self.failed)


class Numbers:
    """Numbers that should come once each and in order, from one sender."""

    def __init__(self):
        self._expected = 0
        self._missing = set()

    def came(self, number):
        """Return what is wrong with it: None, "doubled" or "reordered"."""
        if number >= self._expected:
            self._missing.update(range(self._expected, number))
            self._expected = number + 1
            return None
        if number in self._missing:
            self._missing.remove(number)
            return "reordered"
        return "doubled"

    def missing(self, sent_count):
        return len(self._missing) + max(0, sent_count - self._expected)


class Broadcasts:
    """Which broadcasts must reach whom."""

    def __init__(self):
        self.sender = []  # of each number: a process id, or None while it is not known or not counted
        self._arrived = []  # of each number: at how many
        self.member_count = 0
        self.dead = set()

    def begin(self):
        self.sender.append(None)
        self._arrived.append(0)
        return len(self.sender) - 1

    def returned(self, number, pid):
        if pid not in self.dead:
            self.sender[number] = pid

    def arrived(self, number):
        self._arrived[number] += 1

    def died(self, pid):
        """What it had sent and not everybody has is not counted."""
        self.dead.add(pid)
        for number in range(len(self.sender) - 1, -1, -1):
            if self.sender[number] == pid and self._arrived[number] < self.member_count:
                self.sender[number] = None

    def counted_since(self, first):
        return [number for number in range(first, len(self.sender)) if self.sender[number] is not None]


class Socket(asyncio.Protocol):
    """One WebSocket that sends numbered messages and checks all that comes: a burst, then its answers."""

    def __init__(self, who, soak):
        self.who = who
        self._soak = soak
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._upgraded = False
        self.joined = self._loop.create_future()  # the number of the first broadcast that counts
        self.ended = self._loop.create_future()
        self._closing = False
        self._sent_at = {}  # of messages without an answer
        self.sent_count = 0
        self._numbers = Numbers()
        self._first_broadcast = 0
        self._broadcasts = bytearray()  # 1: came
        self._last_of = {}  # sender -> the turn of its last broadcast that came
        self._code = None

    def __repr__(self):
        return f"<Socket {self.who} sent={self.sent_count} unanswered={len(self._sent_at)} code={self._code}>"

    def connection_made(self, transport):
        self._transport = transport
        transport.write(
            b"GET / HTTP/1.1\r\nHost: soak\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
        )

    def connection_lost(self, error):
        if not self._closing:
            self._soak.tally.closed += 1
            self._soak.complain(f"{self!r} was closed ({error})")
        if not self.joined.done():
            self.joined.set_exception(ConnectionError(f"{self!r} could not be opened"))
        self.ended.set_result(None)

    def data_received(self, data):
        buffer = self._buffer
        buffer += data
        if not self._upgraded:
            head, mark, rest = bytes(buffer).partition(b"\r\n\r\n")
            if not mark:
                return
            if not head.startswith(b"HTTP/1.1 101 "):
                self._soak.complain(f"{self!r}: {head[:60]!r}")
                self._transport.close()
                return
            self._upgraded = True
            buffer[:] = rest
        at, end = 0, len(buffer)
        while end - at >= 2:
            length, begin = buffer[at + 1], at + 2
            if length == 126:
                begin += 2
                if end < begin:
                    break
                length = int.from_bytes(buffer[at + 2 : begin], "big")
            elif length == 127:
                begin += 8
                if end < begin:
                    break
                length = int.from_bytes(buffer[at + 2 : begin], "big")
            if end - begin < length:
                break
            self._frame(buffer[at] & 15, bytes(buffer[begin : begin + length]))
            at = begin + length
        del buffer[:at]

    def _frame(self, opcode, payload):
        if opcode == 1:
            if payload.startswith(b"b "):
                _, sender, turn, number = payload.split(b" ")
                self._broadcast_came(sender, int(turn), int(number))
            elif payload.startswith(b"e "):
                self._answer_came(payload)
            else:
                assert payload == b"joined", payload
                self._first_broadcast = len(self._soak.broadcasts.sender)
                self.joined.set_result(None)
        elif opcode == 9:
            self._write(10, payload)
        elif opcode == 8:
            self._code = int.from_bytes(payload[:2], "big")

    def _answer_came(self, payload):
        _, count, text = payload.decode().split(" ", 2)
        number = int(text.partition(" ")[0])
        tally = self._soak.tally
        if int(count) != number:
            tally.corrupted += 1
            self._soak.complain(f"{self!r}: message {number} was answered with {count}")
        wrong = self._numbers.came(number)
        if wrong is not None:
            setattr(tally, wrong, getattr(tally, wrong) + 1)
            self._soak.complain(f"{self!r}: answer {number} came {wrong}")
        sent_at = self._sent_at.pop(number, None)
        if sent_at is not None:
            tally.echoes += 1
            pause_s = self._loop.time() - sent_at
            tally.pauses_s.append(pause_s)
            self._soak.paused(self, pause_s)
        if not self._sent_at:
            self._loop.call_later(random.uniform(0.5, 1.5) * self._soak.interval_s, self._talk)

    def _broadcast_came(self, sender, turn, number):
        broadcasts, tally = self._soak.broadcasts, self._soak.tally
        at = number - self._first_broadcast
        if at < 0:
            return  # behind group_add, and before we could know
        if len(self._broadcasts) <= at:
            self._broadcasts.extend(bytes(at + 1 - len(self._broadcasts)))
        if self._broadcasts[at]:
            tally.doubled += 1
            self._soak.complain(f"{self!r}: broadcast {number} came twice")
        self._broadcasts[at] = 1
        if self._last_of.get(sender, -1) > turn:
            tally.reordered += 1
            self._soak.complain(f"{self!r}: broadcast {number} came behind a later one of the same sender")
        self._last_of[sender] = turn
        broadcasts.arrived(number)

    def start(self):
        self._loop.call_later(random.uniform(0, self._soak.interval_s), self._talk)

    def _talk(self):
        if self._soak.is_over or self._transport.is_closing():
            return
        for _ in range(random.choice((1, 1, 1, 3))):
            self._sent_at[self.sent_count] = self._loop.time()
            self._write(1, b"%d %s" % (self.sent_count, b"x" * random.choice((0, 10, 10, 1000))))
            self.sent_count += 1

    def _write(self, opcode, payload):
        size = bytes((0x80 | len(payload),)) if len(payload) < 126 else b"\xfe" + struct.pack("!H", len(payload))
        self._transport.write(bytes((0x80 | opcode,)) + size + bytes(4) + payload)  # masked with zeros

    @property
    def is_answered(self):
        return not self._sent_at or self._transport.is_closing()

    def missing_broadcasts(self):
        came = self._broadcasts
        first = self._first_broadcast
        counted = self._soak.broadcasts.counted_since(first)
        return [number for number in counted if number - first >= len(came) or not came[number - first]]

    async def finish(self):
        """Count what is missing, and close."""
        tally = self._soak.tally
        if self.ended.done():
            return  # it is counted as closed
        missing = self._numbers.missing(self.sent_count)
        if missing:
            tally.lost += missing
            self._soak.complain(f"{self!r}: {missing} answers never came")
        if broadcasts := self.missing_broadcasts():
            tally.lost += len(broadcasts)
            self._soak.complain(f"{self!r}: broadcasts {broadcasts[:10]} never came")
        self._closing = True
        self._write(8, b"\x03\xe8")
        await asyncio.wait_for(self.ended, PATIENCE_S)
        if self._code != 1000:
            tally.closed += 1
            self._soak.complain(f"{self!r} was closed with {self._code}")


async def request(port, head, pieces=(), pause_s=0.0):
    """One request on a connection of its own; return (status, headers, reader, writer)."""
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head)
        for piece in pieces:
            writer.write(piece)
            await asyncio.wait_for(writer.drain(), PATIENCE_S)
            if pause_s:
                await asyncio.sleep(pause_s)
        answer = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)).decode("latin-1")
    except BaseException:
        writer.transport.abort()
        raise
    first, *lines = answer.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
    return int(first.split()[1]), headers, reader, writer


def plan():
    """(seed, pieces, pause) of a transfer: most trickle for some seconds, some are as fast as they may."""
    seed = os.urandom(8).hex()
    return (seed, 128, 0.0) if random.random() < 0.1 else (seed, random.randint(20, 60), 0.1)


async def download_for_ever(number, soak):
    while not soak.is_over:
        seed, pieces, pause_s = plan()
        began_at = soak.now()
        target = f"/download?seed={seed}&pieces={pieces}&pause={pause_s}"
        head = f"GET {target} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n"
        pid, got = 0, 0
        try:
            status, headers, reader, writer = await request(soak.port, head.encode())
            try:
                if status != 200:
                    soak.refused(f"download {number}", status, headers, began_at, is_safe=True)
                    continue
                pid = int(headers["x-pid"])
                digest = hashlib.sha256()
                while data := await asyncio.wait_for(reader.read(65536), PATIENCE_S):
                    digest.update(data)
                    got += len(data)
            finally:
                writer.transport.abort()
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            soak.cut(f"download {number} of {pid}: {error!r} behind {got} bytes", pid, began_at)
            continue
        expected = hashlib.sha256()
        for piece in body_pieces(seed, pieces):
            expected.update(piece)
        if got < pieces * PIECE_BYTES:
            soak.cut(f"download {number} of {pid}: {got} of {pieces * PIECE_BYTES} bytes", pid, began_at)
        elif digest.digest() != expected.digest():
            soak.tally.corrupted += 1
            soak.complain(f"download {number}: {got} bytes with a wrong digest")
        else:
            soak.tally.downloads += 1


async def upload_for_ever(number, soak):
    count = 0
    while not soak.is_over:
        count += 1
        seed, pieces, pause_s = plan()
        name = f"{number}.{count}"
        began_at = soak.now()
        head = f"POST /upload?id={name}&file={soak.posts} HTTP/1.1\r\nHost: soak\r\nConnection: close"
        head += f"\r\nContent-Length: {pieces * PIECE_BYTES}\r\n\r\n"
        digest = hashlib.sha256()

        def digested(seed=seed, pieces=pieces, digest=digest):
            for piece in body_pieces(seed, pieces):
                digest.update(piece)
                yield piece

        try:
            status, headers, reader, writer = await request(soak.port, head.encode(), digested(), pause_s)
            try:
                answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
            finally:
                writer.transport.abort()
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            soak.cut(f"upload {name}: {error!r}", 0, began_at)
            continue
        if status != 200:
            soak.refused(f"upload {name}", status, headers, began_at, is_safe=False)
        elif answer.decode() != digest.hexdigest():
            soak.tally.corrupted += 1
            soak.complain(f"upload {name}: answered with {answer!r}")
        else:
            soak.tally.uploads += 1
            soak.answered_posts.add(name)


async def broadcast_for_ever(soak, pause_s):
    """One broadcast each ``pause_s``; several are under way when answers take longer."""
    due_at = soak.now()
    async with asyncio.TaskGroup() as tasks:
        while not soak.is_over:
            tasks.create_task(_broadcast(soak))
            due_at += pause_s
            await asyncio.sleep(max(0.0, due_at - soak.now()))


async def _broadcast(soak):
    number = soak.broadcasts.begin()
    soak.tally.broadcasts += 1
    head = f"POST /broadcast?number={number} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    try:
        status, _, reader, writer = await request(soak.port, head.encode())
        try:
            answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        finally:
            writer.transport.abort()
    except (OSError, asyncio.IncompleteReadError, TimeoutError):
        return
    if status == 200:
        pid, age_s = answer.split()
        if float(age_s) > YOUNG_S or not soak.has_lost_data():
            soak.broadcasts.returned(number, int(pid))
