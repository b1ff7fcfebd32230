"""A blocking connection to wherever one key is, for the thread that keeps a lease.

No loop and nothing shared with broker.py: the lease must be renewed while the loop is blocked. Whenever it has to
connect, it asks anew where the key is: the Sentinels, or nodes of the Cluster. Lives here: that, and one command at
a time. Does not live here: when to renew, and trying again (leases.py).
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any, Final

import hiredis

from channel_layer.broker_connection import Argument, pack_command
from channel_layer.broker_sentinel import Opinion, read_opinion
from channel_layer.broker_url import BrokerAddress, ClusterPlace, Place, SentinelPlace
from channel_layer.errors import BrokerError, BrokerUnavailable, WireError
from channel_layer.sharding import Node, Redirect, read_redirect, read_slot_table, slot_of, static_shard

__all__ = ["LeaseConnection"]

# A Sentinel or node that does not answer for so long is not asked: others know the same, and the whole of a renewal
# has four times as much.
_ASK_TIMEOUT_S: Final = 0.25


class LeaseConnection:
    """Connects at the first execute(), and again after each error."""

    def __init__(self, places: tuple[Place, ...], key: str, *, timeout_s: float) -> None:
        """``timeout_s`` is the longest that execute() may take, connecting included."""
        self._place = places[static_shard(key, len(places))]
        self._slot = slot_of(key)
        self._timeout_s = timeout_s
        self._wire: _Wire | None = None
        self._last: BrokerAddress | None = None  # what Sentinels said last: better than nothing while none answers
        # Nodes of a Cluster, those first that should be asked first; the last answer named them.
        self._nodes = [seed.node for seed in self._place.seeds] if isinstance(self._place, ClusterPlace) else []

    def __str__(self) -> str:
        return str(self._wire.address if self._wire is not None else self._place)

    def execute(self, *args: Argument) -> Any:
        """Raises OSError (TimeoutError, BrokerUnavailable), BrokerError; it is disconnected then."""
        deadline = time.monotonic() + self._timeout_s
        try:
            if self._wire is None:
                self._wire = _Wire(self._locate(deadline), deadline)
            return self._wire.exchange(args, deadline)
        except BrokerError as error:
            redirect = None if self._wire is None else read_redirect(str(error), self._wire.address.node)
            if redirect is not None and isinstance(self._place, ClusterPlace):
                return self._follow(self._place, redirect, args, deadline)
            self.close()
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def _follow(self, place: ClusterPlace, redirect: Redirect, args: tuple[Argument, ...], deadline: float) -> Any:
        """The key is elsewhere, and the command was not carried out."""
        node = redirect.node
        if node is None:
            raise BrokerUnavailable(f"broker {self} moves the keys at this moment")
        wire = _Wire(place.seeds[0].at(*node), deadline)
        try:
            if redirect.kind == "ASK":
                wire.exchange(("ASKING",), deadline)
            answer = wire.exchange(args, deadline)
        except BaseException:
            self.close()
            wire.close()
            raise
        if redirect.kind == "ASK":
            wire.close()  # only this once
        else:
            self.close()
            self._wire = wire
        return answer

    # Where the key is

    def _locate(self, deadline: float) -> BrokerAddress:
        place = self._place
        if isinstance(place, SentinelPlace):
            return self._ask_sentinels(place, deadline)
        if isinstance(place, ClusterPlace):
            return self._ask_nodes(place, deadline)
        return place

    def _ask_sentinels(self, place: SentinelPlace, deadline: float) -> BrokerAddress:
        """What the newest opinion says; see broker_sentinel.py."""
        opinions: list[Opinion] = []
        failure: Exception = BrokerUnavailable(f"broker {place}: no time was left to ask its Sentinels")
        for sentinel in place.sentinels:
            until = min(deadline, time.monotonic() + _ASK_TIMEOUT_S)
            try:
                with contextlib.closing(_Wire(sentinel, until)) as wire:
                    opinions.append(read_opinion(wire.exchange(("SENTINEL", "MASTER", place.master), until)))
            except (OSError, BrokerError, TypeError, ValueError) as error:
                failure = error
            if time.monotonic() >= deadline:
                break
        if opinions:
            newest = max(opinions)
            self._last = place.template.at(newest.host, newest.port)
        if self._last is None:
            raise BrokerUnavailable(f"broker {place}: none of its Sentinels answers: {failure}") from failure
        return self._last

    def _ask_nodes(self, place: ClusterPlace, deadline: float) -> BrokerAddress:
        """What the first node says that answers. One that is wrong is found out: it says MOVED, or nothing."""
        failure: Exception = BrokerUnavailable(f"broker {place}: no time was left to ask its nodes")
        for node in list(self._nodes):
            until = min(deadline, time.monotonic() + _ASK_TIMEOUT_S)
            try:
                with contextlib.closing(_Wire(place.seeds[0].at(*node), until)) as wire:
                    table = read_slot_table(wire.exchange(("CLUSTER", "SLOTS"), until), node)
                owner = next(owner for owner, slots in table.owners.items() if self._slot in slots)
            except StopIteration:
                failure = BrokerUnavailable(f"broker {place}: no node has slot {self._slot}")
            except (OSError, BrokerError, WireError) as error:
                failure = error
            else:
                self._nodes = _ask_last(list(table.nodes), owner)
                return place.seeds[0].at(*owner)
            self._nodes = _ask_last(self._nodes, node)
            if time.monotonic() >= deadline:
                break
        raise BrokerUnavailable(f"broker {place}: no node of the Cluster answers: {failure}") from failure


def _ask_last(nodes: list[Node], last: Node) -> list[Node]:
    """The owner of our key, too: when we ask again, it is most likely the one that is in trouble."""
    return [*(node for node in nodes if node != last), last]


class _Wire:
    """A socket that is logged in, with a deadline for each exchange."""

    def __init__(self, address: BrokerAddress, deadline: float) -> None:
        self.address = address
        self._reader = hiredis.Reader()
        self._socket = self._connect(deadline)
        try:
            if address.username is not None or address.password is not None:
                user = () if not address.username else (address.username,)
                self.exchange(("AUTH", *user, address.password or ""), deadline)
            if address.db:
                self.exchange(("SELECT", address.db), deadline)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def exchange(self, args: tuple[Argument, ...], deadline: float) -> Any:
        self._socket.settimeout(_remaining_s(deadline))
        self._socket.sendall(pack_command(args))
        try:
            # None of the answers here is False, which is what hiredis returns while there is none.
            while (reply := self._reader.gets()) is False:
                self._socket.settimeout(_remaining_s(deadline))
                data = self._socket.recv(65536)
                if not data:
                    raise BrokerUnavailable(f"connection to broker {self.address} was closed by the broker")
                self._reader.feed(data)
        except hiredis.ProtocolError as error:
            raise BrokerUnavailable(f"what answers at {self.address} is not a broker: {error}") from error
        if isinstance(reply, hiredis.ReplyError):
            raise BrokerError(str(reply))
        return reply

    def _connect(self, deadline: float) -> socket.socket:
        address = self.address
        if address.path is not None:
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                plain.settimeout(_remaining_s(deadline))
                plain.connect(address.path)
            except BaseException:
                plain.close()
                raise
            return plain
        plain = socket.create_connection((address.host, address.port), timeout=_remaining_s(deadline))
        if address.ssl_context is None:
            return plain
        try:
            return address.ssl_context.wrap_socket(plain, server_hostname=address.host)
        except BaseException:
            plain.close()
            raise


def _remaining_s(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())
