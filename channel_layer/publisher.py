"""Sending from a script: plain calls, no event loop, no thread, one connection.

    with Publisher("redis://localhost:6379") as publisher:
        publisher.group_send("room", {"type": "websocket.send", "text": "hello"})

For cron jobs, shells, Celery tasks and whatever else only sends. It writes what RedisChannelLayer writes: elements
of normal channels, and letters (mail.py) for process-local channels and for the processes that hold members of a
group. It never receives and never joins a group. redis-py does the talking, with its retries switched off: a push
that was written is not written again, since the first one may have been carried out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import redis

from channel_layer import mail, scripts
from channel_layer.base import Message
from channel_layer.capacity import Capacities
from channel_layer.channels_compat import channel_full
from channel_layer.codec import encode_message
from channel_layer.encryption import Cipher, keys_from_environment
from channel_layer.errors import BrokerError
from channel_layer.messages import CAPACITY_DEFAULT, EXPIRY_DEFAULT_S, check_seconds
from channel_layer.names import (
    NORMAL_MEMBER_MARK,
    Keys,
    check_channel_name,
    check_group_name,
    non_local_name,
    process_of,
)
from channel_layer.publisher_brokers import PublisherBrokers

__all__ = ["Publisher", "PublisherStatistics"]

# Longest wait for an answer, unless the URL has ?socket_timeout=. A broker that says nothing for so long is as good
# as unreachable to a script: BrokerUnavailable.
_SOCKET_TIMEOUT_S: Final = 5.0
# group_send writes at most so much before it reads answers: redis-py joins a pipeline into one piece of memory.
_PORTION_BYTES_MAX: Final = 8 * 1024 * 1024
_PORTION_COUNT_MAX: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherStatistics:
    """What a Publisher has done since it was made."""

    sent_count: int  # messages of send() that the broker stored
    full_count: int  # messages of send() refused with ChannelFull
    group_sent_count: int  # calls of group_send()
    group_stored_count: int  # messages of group_send() stored, one for each process or normal channel
    group_dropped_count: int  # messages of group_send() dropped, as the mail or the normal channel was full


class Publisher:
    """``send`` and ``group_send`` as plain calls. Connects at the first call; usable from several threads in turn.

    Never sends twice: after an error the caller decides. A context manager; close() ends the connection.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        prefix: str | None = None,
        expiry: float = EXPIRY_DEFAULT_S,
        capacity: int = CAPACITY_DEFAULT,
        channel_capacity: Mapping[Any, int] | None = None,
        symmetric_encryption_keys: Iterable[str | bytes] | None = None,
        socket_timeout_s: float = _SOCKET_TIMEOUT_S,
    ) -> None:
        """``url``, ``prefix`` and the keys come from TRUNKLINE_REDIS, TRUNKLINE_PREFIX and TRUNKLINE_ENCRYPTION_KEYS
        where they are not given.

        ``url`` may name several servers, Sentinels or a Cluster, as --redis does (docs/settings.md). ``expiry`` is
        in seconds, ``capacity`` and ``channel_capacity`` in messages, as for RedisChannelLayer; an answer of the
        broker is waited for ``socket_timeout_s`` seconds. Raises RuntimeError without a URL, and ValueError and
        TypeError, which name the option.
        """
        if url is None:
            url = os.environ.get("TRUNKLINE_REDIS") or None
        if url is None:
            raise RuntimeError(
                "no broker: give a URL or set TRUNKLINE_REDIS (for example TRUNKLINE_REDIS=redis://localhost:6379)"
            )
        if prefix is None:
            prefix = os.environ.get("TRUNKLINE_PREFIX") or "trunkline"
        self.expiry = check_seconds("expiry", expiry)
        self._expiry_ms = max(1, round(self.expiry * 1000))
        self._capacities = Capacities(capacity, channel_capacity)
        self._keys = Keys(prefix)
        self._cipher = Cipher(
            keys_from_environment() if symmetric_encryption_keys is None else symmetric_encryption_keys
        )
        self._brokers = PublisherBrokers(
            url,
            socket_timeout_s=check_seconds("socket_timeout_s", socket_timeout_s),
            client_name="trunkline:publisher",
        )
        self._is_closed = False
        self._sent_count = 0
        self._full_count = 0
        self._group_sent_count = 0
        self._group_stored_count = 0
        self._group_dropped_count = 0

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"<Publisher {self._brokers} prefix={self._keys.prefix} {state} sent={self._sent_count}>"

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def statistics(self) -> PublisherStatistics:
        """Return what was sent and refused since this object was made."""
        return PublisherStatistics(
            sent_count=self._sent_count,
            full_count=self._full_count,
            group_sent_count=self._group_sent_count,
            group_stored_count=self._group_stored_count,
            group_dropped_count=self._group_dropped_count,
        )

    def close(self) -> None:
        """Disconnect. Further calls raise RuntimeError."""
        self._is_closed = True
        self._brokers.close()

    def send(self, channel: str, message: Message) -> None:
        """Append a message to a channel; return when the broker has it.

        Raises ChannelFull, MessageTooLarge, InvalidMessage (a ValueError), InvalidName (a TypeError), BrokerError
        where the broker refuses the command, and BrokerUnavailable (a ConnectionError): then the message may or may
        not have been stored.
        """
        check_channel_name(channel)
        encoded = encode_message(message)
        process = process_of(channel)
        if process is None:
            key, content = self._keys.normal(channel), encoded
        else:
            key, content = self._keys.mail(process), mail.build_message(channel, encoded)
        capacity = self._capacities.of(channel)
        sealed = self._cipher.seal(content)
        (answer,) = self._run_scripts(scripts.PUSH, [(key, capacity, self._expiry_ms, sealed)])
        if _stored_count(answer) < 1:
            self._full_count += 1
            raise channel_full(
                f"channel {non_local_name(channel)!r} holds {capacity} messages, as many as its capacity allows"
            )
        self._sent_count += 1

    def group_send(self, group: str, message: Message) -> None:
        """Send a message to all channels of a group; return when it is on its way to each process with members.

        A process or normal channel that is full misses it (``group_dropped_count``); never raises ChannelFull.
        Otherwise raises what send() raises; BrokerUnavailable then means that some processes may have it and others
        not.
        """
        check_group_name(group)
        encoded = encode_message(message)
        # Both are encrypted once, however many processes get them.
        letter = self._cipher.seal(mail.build_group_send(group, encoded))
        encoded = self._cipher.seal(encoded)
        (members,) = self._run_scripts(scripts.GROUP_MEMBERS, [(self._keys.group(group),)])
        if isinstance(members, redis.ResponseError):
            raise BrokerError(str(members)) from members
        portion = max(1, min(_PORTION_COUNT_MAX, _PORTION_BYTES_MAX // len(letter)))
        failure: redis.ResponseError | None = None
        for first in range(0, len(members), portion):
            calls = [
                self._group_call(member.decode(), letter, encoded) for member in members[first : first + portion]
            ]
            for answer in self._run_scripts(scripts.PUSH, calls):
                if isinstance(answer, redis.ResponseError):
                    failure = answer  # the others get theirs all the same
                elif _stored_count(answer):
                    self._group_stored_count += 1
                else:
                    self._group_dropped_count += 1
        if failure is not None:
            raise BrokerError(str(failure)) from failure
        self._group_sent_count += 1

    def _group_call(self, member: str, letter: bytes, encoded: bytes) -> tuple[str | bytes | int, ...]:
        """Key and arguments of push.lua for one entry of the registry: a process, or a marked normal channel."""
        if member.startswith(NORMAL_MEMBER_MARK):
            channel = member.removeprefix(NORMAL_MEMBER_MARK)
            return self._keys.normal(channel), self._capacities.of(channel), self._expiry_ms, encoded
        return self._keys.mail(member), mail.MAIL_CAPACITY, self._expiry_ms, letter

    def _run_scripts(self, script: scripts.Script, calls: Sequence[tuple[str | bytes | int, ...]]) -> list[Any]:
        """Run a script once for each call (its key, then its arguments), in one pipeline; answers or ResponseErrors.

        Raises BrokerUnavailable.
        """
        if self._is_closed:
            raise RuntimeError(f"{self!r} was closed")
        return self._brokers.run(script, calls)


def _stored_count(answer: Any) -> int:
    """The first element of push.lua's answer."""
    if isinstance(answer, redis.ResponseError):
        raise BrokerError(str(answer)) from answer
    return int(answer[0])
