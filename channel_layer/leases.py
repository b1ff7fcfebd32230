"""The lease of this process: a key that says it is alive, kept by a thread of its own.

A thread with its own connection, because a process whose loop is blocked by the application is slow, not dead: its
lease must not depend on the loop. Does not live here: that connection (lease_connection.py), watching the leases of
others (liveness.py).

    start() --> renewing every period_s --stop()--> over (the key deleted, or left to expire)

A process that was killed cannot say so, but whoever started it can: ``tell_death()``.

To say more in a lease: a field of Lease; decode_lease() takes values with more fields than it knows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgpack

from channel_layer.broker_url import parse_broker_urls
from channel_layer.errors import BrokerError, WireError
from channel_layer.lease_connection import LeaseConnection
from channel_layer.names import Keys

__all__ = ["Lease", "LeaseKeeper", "LeaseStatistics", "decode_lease", "encode_lease", "tell_death"]

logger = logging.getLogger("trunkline.channel_layer")

# One renewal, connecting included. Shorter than the lease lives without renewal, so that one try that hangs does
# not cost the lease; the tries after it are at most a period apart.
RENEWAL_TIMEOUT_S: Final = 1.0
# How long a death stands in the broker: for those who are in a grace (liveness.py), and some looks. Who comes later
# misses the lease, as everybody would without.
DEATH_TOLD_S: Final = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What a process says about itself. ``load`` is what it runs now, of the ``room`` it has."""

    role: str
    version: str
    load: int = 0
    room: int = 0


def encode_lease(lease: Lease) -> bytes:
    encoded: bytes = msgpack.packb([lease.role, lease.version, lease.load, lease.room])
    return encoded


def decode_lease(value: bytes) -> Lease:
    """Decode the value of a lease. Raises WireError for anything no release writes."""
    try:
        fields = msgpack.unpackb(value)
    except Exception as error:  # msgpack raises half a dozen unrelated types
        raise WireError(f"lease of {len(value)} bytes is not msgpack: {error}") from error
    if not isinstance(fields, list) or [type(field) for field in fields[:4]] != [str, str, int, int]:
        raise WireError(f"lease is not an array of role, version, load and room: {fields!r:.80}")
    role, version, load, room = fields[:4]
    return Lease(role=role, version=version, load=load, room=room)


def tell_death(url: str, keys: Keys, process: str) -> None:
    """Say that ``process`` is dead, so that nobody waits for its lease to end. Only when that is certain (waitpid).

    Blocks for two seconds at most. Raises OSError, BrokerError, ValueError: then the lease ends by itself.
    """
    connection = LeaseConnection(parse_broker_urls(url), keys.lease(process), timeout_s=RENEWAL_TIMEOUT_S)
    try:
        # In this order: who misses a lease looks for the reason then.
        connection.execute("SET", keys.death(process), b"", "PX", int(DEATH_TOLD_S * 1000))
        connection.execute("DEL", keys.lease(process))
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class LeaseStatistics:
    is_running: bool
    renewal_count: int
    outage_count: int
    last_renewed: float | None


class LeaseKeeper:
    """Renews ``key`` from a daemon thread. Any thread may call its methods; stop() blocks, renewals never do.

    It does not survive a fork: a child is another process and has another id and lease.
    """

    def __init__(
        self,
        url: str,
        key: str,
        value: bytes,
        *,
        period_s: float = 0.5,
        ttl_s: float = 2.5,
        on_outage: Callable[[Exception], None] | None = None,
        each_period: Callable[[], None] | None = None,
        on_absence: Callable[[], None] | None = None,
    ) -> None:
        """``on_outage`` is called on the thread, once per outage; without it the outage is logged.

        ``each_period`` is called there behind each renewal, for what else must go on while the loop is blocked. It
        may raise BrokerError and OSError. ``on_absence`` is called there when absence_count has grown.

        Raises ValueError for a bad URL.
        """
        self._connection = LeaseConnection(parse_broker_urls(url), key, timeout_s=RENEWAL_TIMEOUT_S)
        self._may_have_moved = False  # set by any thread, taken by ours
        self._key = key
        self._value = value  # replaced as a whole by update(); read once per renewal
        self._period_s = period_s
        self._ttl_ms = int(ttl_s * 1000)
        self._on_outage = on_outage if on_outage is not None else self._log_outage
        self._each_period = each_period
        self._on_absence = on_absence
        self._thread: threading.Thread | None = None
        self._is_stopping = threading.Event()
        self._drop = False
        self._renewal_count = 0
        self._outage_count = 0
        # When the last successful renewal was *sent*, monotonic: the lease lives at least ttl_s from then.
        self.last_renewed: float | None = None
        # How often this thread slept longer than a lease lives beyond what it wanted: the whole process was frozen
        # (SIGSTOP, a suspended machine), and others may have found it dead meanwhile. A blocked loop or a broker that
        # is away do not count.
        self.absence_count = 0

    def __repr__(self) -> str:
        state = "running" if self._thread is not None and self._thread.is_alive() else "not running"
        return f"<LeaseKeeper {self._key} {state}, {self._renewal_count} renewals>"

    def statistics(self) -> LeaseStatistics:
        return LeaseStatistics(
            is_running=self._thread is not None and self._thread.is_alive(),
            renewal_count=self._renewal_count,
            outage_count=self._outage_count,
            last_renewed=self.last_renewed,
        )

    def start(self) -> None:
        """Take up the lease. The first renewal is on its way when this returns, not necessarily done."""
        if self._thread is not None:
            raise RuntimeError(f"{self!r} was started before")
        self._thread = threading.Thread(target=self._run, name=f"lease {self._key}", daemon=True)
        self._thread.start()

    def renewal(self) -> tuple[str, str, bytes, str, int]:
        """Return the command that takes or renews the lease."""
        return "SET", self._key, self._value, "PX", self._ttl_ms

    def update(self, value: bytes) -> None:
        """Have the next renewal write this value."""
        self._value = value

    def look_again(self) -> None:
        """Have the next renewal ask anew where the key is: its shard came back, perhaps elsewhere."""
        self._may_have_moved = True

    def stop(self, drop: bool = True, timeout_s: float = RENEWAL_TIMEOUT_S) -> None:
        """End the renewals and, with ``drop``, delete the lease; wait for that up to ``timeout_s``.

        Without ``drop``, or if the broker does not answer in time, the lease ends by expiring.
        """
        thread = self._thread
        if thread is None:
            return
        self._drop = drop
        self._is_stopping.set()
        thread.join(timeout_s)

    # On the thread

    def _run(self) -> None:
        is_outage = False
        next_renewal = time.monotonic()
        while not self._is_stopping.is_set():
            started = time.monotonic()
            if self._may_have_moved:
                self._may_have_moved = False
                self._connection.close()
            try:
                self._connection.execute(*self.renewal())
            except (BrokerError, OSError) as error:
                if not is_outage:
                    is_outage = True
                    self._outage_count += 1
                    self._on_outage(error)
            else:
                is_outage = False
                self.last_renewed = started
                self._renewal_count += 1
                self._do_the_rest()
            # From schedule to schedule, so that the time a renewal takes does not add up; but a process that was
            # stopped for a minute renews once, not a hundred times.
            next_renewal = max(next_renewal + self._period_s, time.monotonic() - self._period_s)
            asleep_since = time.monotonic()
            self._is_stopping.wait(max(0.0, next_renewal - asleep_since))
            if (time.monotonic() - asleep_since) * 1000 > self._ttl_ms:
                self.absence_count += 1
                if self._on_absence is not None:
                    self._on_absence()
        try:
            if self._drop and not is_outage:
                self._connection.execute("DEL", self._key)
        except (BrokerError, OSError) as error:
            logger.warning("lease %s could not be dropped, it expires: %s", self._key, error)
        finally:
            self._connection.close()

    def _do_the_rest(self) -> None:
        if self._each_period is not None:
            try:
                self._each_period()
            except (BrokerError, OSError) as error:
                logger.debug("lease %s: %s", self._key, error)
            except Exception:
                logger.exception("lease %s: what goes with it failed", self._key)

    def _log_outage(self, error: Exception) -> None:
        logger.warning("lease %s cannot be renewed at %s: %s", self._key, self._connection, error)
