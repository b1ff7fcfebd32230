"""One connection to the broker: commands out, answers back, in order.

Lives here: the pipeline (what is called within one loop tick leaves in one write; answers belong to the commands
in the order of writing), giving up a silent broker, TCP, TLS and unix sockets, logging in. Does not live here:
reconnecting and what the process does about an outage (broker.py), blocking reads (blocking_reader.py).

    open_connection() --> answering --lost, given up or closed--> over (lost_reason says why)

A command that was written is never written again: the broker may have carried it out (redis-py's default retry
makes three copies of one RPUSH). The one exception is not one: NOSCRIPT says that a script was *not* run.

To add a transport: a branch in open_connection(). Answers that need more than a future are objects with the
three methods of ``Answer``.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import hiredis

from channel_layer.broker_url import BrokerAddress
from channel_layer.errors import BrokerError, BrokerUnavailable, BrokerUnsuitable
from channel_layer.scripts import Script

__all__ = [
    "REFUSALS",
    "Answer",
    "Argument",
    "BrokerConnection",
    "BrokerNotServing",
    "CommandCounters",
    "ServerIdentity",
    "WritesRefused",
    "open_connection",
    "pack_command",
    "parse_info",
]

Argument = bytes | str | int

# Its stub allows tuples of one element only.
pack_command = cast(Callable[[tuple[Argument, ...]], bytes], hiredis.pack_command)

# Commands written or about to be, without an answer. When full, further ones fail with BrokerUnavailable
# ("overloaded") and are not written. Batching keeps a healthy process under a hundred.
UNANSWERED_COMMANDS_MAX: Final = 20_000

# Bytes that the socket does not take, because the broker does not read. When full, further commands fail with
# BrokerUnavailable ("overloaded"), until half of it has left.
UNWRITTEN_BYTES_MAX: Final = 32 * 1024 * 1024

# Error codes of a broker that is there but does not serve at the moment: it loads its data, became a replica (a
# blocked read then ends with UNBLOCKED), belongs to a Cluster that lacks masters, or a script keeps it busy. The
# command was not carried out.
_NOT_SERVING: Final = frozenset({"BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "READONLY", "UNBLOCKED"})

# Error codes of a broker that goes on answering and takes no writes for now, reads that pop included: no memory, disk
# or replicas left.
REFUSALS: Final = frozenset({"MISCONF", "NOREPLICAS", "OOM"})

# What hiredis returns while no whole answer is there. An object of our own: no answer can equal it.
_NO_ANSWER: Final = object()


class BrokerNotServing(BrokerUnavailable):
    """The broker answers, but serves no writes at the moment: it loads its data or is a replica.

    The command that got this answer was not carried out.
    """


class WritesRefused(BrokerError):
    """The broker answers, but takes no writes at the moment: memory, disk or replicas are missing."""


class Answer(Protocol):
    """Where the answer to a command goes. ``asyncio.Future`` is one; a done answer is left alone."""

    def done(self) -> bool: ...
    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, exception: Exception, /) -> None: ...


@dataclass(slots=True)
class CommandCounters:
    """Totals over all connections of one owner."""

    command_count: int = 0
    overloaded_count: int = 0
    noscript_count: int = 0
    written_bytes: int = 0
    received_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """Who answers at the other end. ``client_id`` means something to the server with this ``run_id`` only."""

    run_id: str
    client_id: int
    info: dict[str, str]  # INFO server

    @property
    def mode(self) -> str:
        """standalone, cluster or sentinel; Valkey 9 has another name for it."""
        return self.info.get("redis_mode") or self.info.get("server_mode", "standalone")


class BrokerConnection(asyncio.Protocol):
    """Made by open_connection(), and of no use any more once ``lost_reason`` is set."""

    __slots__ = (
        "_collected",
        "_collected_bytes",
        "_counters",
        "_gone",
        "_heard_at",
        "_is_write_paused",
        "_loop",
        "_name",
        "_owes_nothing_yet",
        "_reader",
        "_silence_timeout_s",
        "_silence_timer",
        "_transport",
        "_waiting",
        "lost_reason",
        "on_lost",
        "server",
    )

    def __init__(
        self, *, name: str, loop: asyncio.AbstractEventLoop, silence_timeout_s: float, counters: CommandCounters
    ) -> None:
        self._name = name  # for error texts: the URL without its password
        self._loop = loop
        # A broker that owes an answer and sends nothing for this long is given up.
        self._silence_timeout_s = silence_timeout_s
        self._counters = counters
        self._transport: asyncio.Transport | None = None
        self._gone: asyncio.Future[None] = loop.create_future()  # done when the socket is closed
        self._reader = hiredis.Reader(notEnoughData=_NO_ANSWER)
        self._waiting: deque[Answer] = deque()  # in the order of writing; UNANSWERED_COMMANDS_MAX
        self._collected: list[bytes] = []  # commands of this tick; UNWRITTEN_BYTES_MAX
        self._collected_bytes = 0
        self._is_write_paused = False
        self._owes_nothing_yet = False  # all unanswered commands are still collected, none is written
        # When bytes came last, or the first of the unanswered commands was written; monotonic, because uvloop's own
        # clock stands still while a callback runs.
        self._heard_at = 0.0
        self._silence_timer: asyncio.TimerHandle | None = None
        self.lost_reason: BrokerUnavailable | None = None
        self.on_lost: Callable[[BrokerConnection], None] | None = None
        self.server: ServerIdentity | None = None

    def __repr__(self) -> str:
        state = "answering" if self.lost_reason is None else f"over: {self.lost_reason}"
        return f"<BrokerConnection {self._name} {state}, {len(self._waiting)} unanswered>"

    @property
    def unanswered_count(self) -> int:
        return len(self._waiting)

    @property
    def silent_s(self) -> float:
        """How long the broker has owed an answer without sending anything."""
        return time.monotonic() - self._heard_at if self._waiting and not self._owes_nothing_yet else 0.0

    # Commands

    def call(self, args: Sequence[Argument]) -> asyncio.Future[Any]:
        """Send a command at the end of this tick; the future gets its answer.

        It fails with BrokerError (the broker's own text) or BrokerUnavailable. Cancelling it does not take the
        command back.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        self.send(pack_command(tuple(args)), future)
        return future

    def script(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> asyncio.Future[Any]:
        """Run a script by its digest, once more by its source if the broker forgot it (SCRIPT FLUSH)."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self.send_script(script, keys, args, future)
        return future

    def send_script(self, script: Script, keys: Sequence[str], args: Sequence[Argument], answer: Answer) -> None:
        """As script(), for another answer than a future."""
        tail = (len(keys), *keys, *args)
        self.send(
            pack_command(("EVALSHA", script.sha1, *tail)),
            _ScriptAnswer(self, answer, script, tail, self._counters),
        )

    def transaction(self, commands: Sequence[Sequence[Argument]]) -> asyncio.Future[list[Any]]:
        """MULTI, the commands, EXEC; the future gets the list of their answers.

        If one of several was refused when it ran, the future fails with that BrokerError and the others have
        been carried out: that is what a transaction is to Redis.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        self.send_transaction(commands, future)
        return future

    def send_transaction(self, commands: Sequence[Sequence[Argument]], answer: Answer) -> None:
        """As transaction(), for another answer than a future."""
        data = b"".join(
            (
                pack_command(("MULTI",)),
                *(pack_command(tuple(command)) for command in commands),
                pack_command(("EXEC",)),
            )
        )
        self.send(data, _TransactionAnswer(answer, len(commands)), answer_count=len(commands) + 2)

    def send(self, data: bytes, answer: Answer, answer_count: int = 1) -> None:
        """Send packed commands at the end of this tick; ``answer`` gets each of their ``answer_count`` answers."""
        if self.lost_reason is not None:
            answer.set_exception(self.lost_reason)
            return
        waiting = self._waiting
        if (
            len(waiting) >= UNANSWERED_COMMANDS_MAX
            or self._is_write_paused
            or self._collected_bytes >= UNWRITTEN_BYTES_MAX
        ):
            self._counters.overloaded_count += 1
            answer.set_exception(
                BrokerUnavailable(
                    f"connection to broker {self._name} is overloaded: {len(waiting)} commands without an answer; "
                    "this one was not sent"
                )
            )
            return
        if not waiting:
            self._owes_nothing_yet = True
        if not self._collected:
            self._loop.call_soon(self.flush)
        self._collected.append(data)
        self._collected_bytes += len(data)
        self._counters.command_count += 1
        if answer_count == 1:
            waiting.append(answer)
        else:
            waiting.extend([answer] * answer_count)

    def flush(self) -> None:
        """Write what was sent in this tick, if anything; the end of the tick then finds nothing to do."""
        collected = self._collected
        if self.lost_reason is not None or not collected:
            return
        assert self._transport is not None
        data = collected[0] if len(collected) == 1 else b"".join(collected)
        self._collected = []
        self._collected_bytes = 0
        self._counters.written_bytes += len(data)
        self._transport.write(data)
        if self._owes_nothing_yet:
            # From the write, not from the call: in between the application may block the loop for long.
            self._owes_nothing_yet = False
            self._heard_at = time.monotonic()
            if self._silence_timer is None:
                self._silence_timer = self._loop.call_later(self._silence_timeout_s, self._check_silence)

    # The end

    def _check_silence(self) -> None:
        # Both loops read their sockets before they run timers that are due (libuv since 1.45), so an answer that
        # arrived while the loop was blocked has been taken by now.
        self._silence_timer = None
        if not self._waiting or self._owes_nothing_yet:  # then flush() starts the timer anew
            return
        remaining_s = self._heard_at + self._silence_timeout_s - time.monotonic()
        if remaining_s > 0:
            self._silence_timer = self._loop.call_later(remaining_s, self._check_silence)
        else:
            self.give_up(f"broker {self._name} did not answer for {self._silence_timeout_s:g} s")

    def give_up(self, reason: str) -> None:
        """End the connection at once; unanswered commands fail and may or may not have been carried out."""
        self._end(BrokerUnavailable(reason))

    async def disconnect(self, reason: str) -> None:
        """give_up(), and wait until the socket is closed, which takes the loop a turn or two."""
        self.give_up(reason)
        if self._transport is not None:
            await asyncio.shield(self._gone)

    def _end(self, reason: BrokerUnavailable) -> None:
        if self.lost_reason is not None:
            return
        self.lost_reason = reason
        if self._silence_timer is not None:
            self._silence_timer.cancel()
            self._silence_timer = None
        if self._transport is not None:
            self._transport.abort()
        waiting, self._waiting = self._waiting, deque()
        self._collected = []
        for answer in waiting:
            if not answer.done():
                answer.set_exception(reason)
        if self.on_lost is not None:
            self.on_lost(self)

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's are transports, but not by inheritance
        transport.set_write_buffer_limits(high=UNWRITTEN_BYTES_MAX, low=UNWRITTEN_BYTES_MAX // 2)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        self._counters.received_bytes += len(data)
        reader, waiting = self._reader, self._waiting
        not_serving: BrokerNotServing | None = None
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _NO_ANSWER:
                if not waiting:
                    # Only an error comes unasked, just before the broker hangs up ("max number of clients reached").
                    self.give_up(f"broker {self._name} sent {str(reply)!r:.200} unasked")
                    return
                answer = waiting.popleft()
                if isinstance(reply, hiredis.ReplyError):
                    error = self._translate(reply)
                    if isinstance(error, BrokerNotServing):
                        not_serving = error
                    if not answer.done():
                        answer.set_exception(error)
                elif not answer.done():
                    answer.set_result(reply)
        except hiredis.ProtocolError as error:
            self.give_up(f"what answers at {self._name} is not a broker: {error}")
            return
        if not_serving is not None:
            # Nothing else this broker could answer is of use until it serves again: find that out by reconnecting.
            # Commands without an answer get another error than those that were refused: they may be carried out.
            self._end(BrokerUnavailable(str(not_serving)))

    def _translate(self, reply: hiredis.ReplyError) -> BrokerError | BrokerUnavailable:
        text = str(reply)
        code = text.partition(" ")[0]
        if code in REFUSALS:
            return WritesRefused(text)
        if code in _NOT_SERVING:
            return BrokerNotServing(f"broker {self._name} does not serve: {text}")
        if text.startswith("ERR max number of clients"):
            return BrokerUnavailable(f"broker {self._name}: {text}")
        return BrokerError(text)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(BrokerUnavailable(f"connection to broker {self._name} was lost: {exc or 'closed by the broker'}"))
        self._gone.set_result(None)

    def pause_writing(self) -> None:
        self._is_write_paused = True

    def resume_writing(self) -> None:
        self._is_write_paused = False


class _ScriptAnswer:
    """Passes the answer on; runs the script by its source if the broker says that it does not know it.

    Several scripts in flight are run again in their order. After a SCRIPT FLUSH, while another client loads the
    script at the same instant, a later one may overtake: an operator's action, and no message is lost.
    """

    __slots__ = ("_answer", "_connection", "_counters", "_script", "_tail")

    def __init__(
        self,
        connection: BrokerConnection,
        answer: Answer,
        script: Script,
        tail: tuple[Argument, ...],
        counters: CommandCounters,
    ) -> None:
        self._connection = connection
        self._answer = answer
        self._script = script
        self._tail = tail  # number of keys, keys, arguments
        self._counters = counters

    def done(self) -> bool:
        return self._answer.done()

    def set_result(self, result: Any, /) -> None:
        self._answer.set_result(result)

    def set_exception(self, exception: Exception, /) -> None:
        if isinstance(exception, BrokerError) and str(exception).startswith("NOSCRIPT"):
            self._counters.noscript_count += 1
            self._connection.send(pack_command(("EVAL", self._script.source, *self._tail)), self._answer)
        else:
            self._answer.set_exception(exception)


class _TransactionAnswer:
    """Takes the answers to MULTI, to each command (QUEUED, or why not) and to EXEC; passes on what EXEC says."""

    __slots__ = ("_answer", "_expected_count", "_refusal")

    def __init__(self, answer: Answer, command_count: int) -> None:
        self._answer = answer
        self._expected_count = command_count + 2
        self._refusal: Exception | None = None  # the first; EXEC says only that there was one

    def done(self) -> bool:
        return self._expected_count == 0 or self._answer.done()

    def set_result(self, result: Any, /) -> None:
        self._expected_count -= 1
        if self._expected_count:
            return
        for item in result:
            if isinstance(item, hiredis.ReplyError):
                self._answer.set_exception(BrokerError(str(item)))
                return
        self._answer.set_result(result)

    def set_exception(self, exception: Exception, /) -> None:
        self._expected_count -= 1
        if self._refusal is None:
            self._refusal = exception
        if self._expected_count == 0 or isinstance(exception, BrokerUnavailable):
            self._expected_count = 0  # a lost connection fails each of the answers
            self._answer.set_exception(self._refusal)


async def open_connection(
    address: BrokerAddress,
    *,
    client_name: str,
    loop: asyncio.AbstractEventLoop,
    silence_timeout_s: float,
    counters: CommandCounters,
    is_sentinel: bool = False,
) -> BrokerConnection:
    """Connect, log in and choose the database; ``connection.server`` then says who answers (but not a Sentinel).

    Raises BrokerUnavailable, BrokerNotServing; BrokerUnsuitable where only the operator can help (password,
    database, rights). A cancelled call leaves nothing behind.
    """
    connection = BrokerConnection(
        name=str(address), loop=loop, silence_timeout_s=silence_timeout_s, counters=counters
    )
    try:
        async with asyncio.timeout(address.connect_timeout_s):
            if address.path is not None:
                await loop.create_unix_connection(lambda: connection, address.path)
            else:
                await loop.create_connection(
                    lambda: connection,
                    address.host,
                    address.port,
                    ssl=address.ssl_context,
                    server_hostname=address.host if address.ssl_context is not None else None,
                )
            if is_sentinel:
                await _log_in_to_sentinel(connection, address)
            else:
                connection.server = await _log_in(connection, address, client_name)
    except TimeoutError as error:
        reason = f"broker {address} did not answer within {address.connect_timeout_s:g} s"
        await connection.disconnect(reason)
        raise BrokerUnavailable(reason) from error
    except OSError as error:
        await connection.disconnect(f"connecting to broker {address} ended: {error!r}")
        if isinstance(error, BrokerUnavailable):  # which is a ConnectionError: from _log_in
            raise
        what = "does not pass the TLS check" if isinstance(error, ssl.SSLError) else "is not reachable"
        raise BrokerUnavailable(f"broker {address} {what}: {error}") from error
    except BaseException as error:
        await connection.disconnect(f"connecting to broker {address} ended: {error!r}")
        raise
    return connection


async def _log_in_to_sentinel(connection: BrokerConnection, address: BrokerAddress) -> None:
    """Say who we are. Nothing else: a Sentinel's users may have the right to ask for masters, and no other."""
    if address.username is None and address.password is None:
        return
    user = () if not address.username else (address.username,)
    try:
        await connection.call(("AUTH", *user, address.password or ""))
    except BrokerError as error:
        raise BrokerUnsuitable(
            f"Sentinel {address} refuses sentinel_username or sentinel_password: {error}"
        ) from error


async def _log_in(connection: BrokerConnection, address: BrokerAddress, client_name: str) -> ServerIdentity:
    # All at once: if the first is refused, so are the others.
    log_in: asyncio.Future[Any] | None = None
    if address.username is not None or address.password is not None:
        user = () if address.username is None else (address.username,)
        log_in = connection.call(("AUTH", *user, address.password or ""))
    select = connection.call(("SELECT", address.db)) if address.db else None
    # What needs no right of its own in the smallest ACL comes first. INFO is also how LOADING shows.
    info = connection.call(("INFO", "server"))
    client_id = connection.call(("CLIENT", "ID"))
    naming = connection.call(("CLIENT", "SETNAME", client_name))
    calls = [call for call in (log_in, select, info, client_id, naming) if call is not None]
    results = await asyncio.gather(*calls, return_exceptions=True)
    for call, result in zip(calls, results, strict=True):
        if isinstance(result, BrokerError):
            what = {
                log_in: "refuses the user name or password",
                select: f"refuses database {address.db}",
                info: "refuses INFO, which must be allowed",
            }.get(call, "refuses CLIENT, which must be allowed")
            raise BrokerUnsuitable(f"broker {address} {what}: {result}")
        if isinstance(result, BaseException):
            raise result
    fields = parse_info(info.result())
    return ServerIdentity(run_id=fields.get("run_id", ""), client_id=client_id.result(), info=fields)


def parse_info(reply: bytes) -> dict[str, str]:
    """Return the fields of an INFO answer."""
    pairs = (line.partition(":") for line in reply.decode("utf-8", "replace").splitlines() if line[:1] != "#")
    return {name: value for name, colon, value in pairs if colon}
