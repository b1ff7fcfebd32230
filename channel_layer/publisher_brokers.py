"""Where the keys are, for plain calls: redis-py's clients, one for each server that was needed so far.

Lives here: asking Sentinels and Clusters with redis-py, and running scripts where their keys are. Does not live here:
what is sent (publisher.py); the same for our own processes (broker.py), which must not wait for an answer.

A script that a server refuses because it has no such script, does not have the key (any more) or takes no writes was
not carried out: it runs again, where the key is by then. One whose answer is lost does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    TryAgainError,
)
from redis.retry import Retry

from channel_layer.broker_sentinel import Opinion, read_opinion
from channel_layer.broker_url import BrokerAddress, ClusterPlace, SentinelPlace, parse_broker_urls, redact_urls
from channel_layer.errors import BrokerError, BrokerUnavailable, WireError
from channel_layer.scripts import Script
from channel_layer.sharding import Node, SlotTable, read_slot_table, slot_of, static_shard

__all__ = ["PublisherBrokers"]

# One connection a server: a second thread waits for it so long, then gets BrokerUnavailable.
_TURN_TIMEOUT_S: Final = 30.0
# A Sentinel or node that does not say where the keys are in this time is not asked; others know the same.
_ASK_TIMEOUT_S: Final = 1.0
# Before it is looked again where a key is; the tries go on for as long as an answer may take.
_LOOK_AGAIN_S: Final = 0.05

# Answers of a server that has carried nothing out. MasterDownError is a ClusterDownError.
_REFUSED: Final = (AskError, ClusterDownError, NoScriptError, ReadOnlyError, TryAgainError)

# redis-py leaves these without types.
_make_pool: Callable[..., redis.BlockingConnectionPool] = redis.BlockingConnectionPool

Call = tuple[str | bytes | int, ...]


class PublisherBrokers:
    """Runs scripts, each at the server that has its key. Nothing connects before the first one."""

    def __init__(self, text: str, *, socket_timeout_s: float, client_name: str) -> None:
        """``text``: see broker_url.py. Raises ValueError."""
        self._text = text
        self._places = parse_broker_urls(text, socket_timeout_s=socket_timeout_s)
        self._client_name = client_name
        self._timeout_s = socket_timeout_s
        self._clients: dict[tuple[Node, str | None, int], redis.Redis] = {}
        # Where the masters of Sentinels are, by the number of the shard; and the slots of a Cluster.
        self._masters: dict[int, BrokerAddress] = {}
        self._table: SlotTable | None = None
        self._hint: Node | None = None  # the node that a refusal named: it knows best

    def __str__(self) -> str:
        return redact_urls(self._text)

    def close(self) -> None:
        for client in list(self._clients.values()):  # other threads may be about to add one
            client.close()
            client.connection_pool.disconnect()

    def run(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        """Run a script once for each call (its key, then its arguments); return the answers, or ResponseErrors.

        One pipeline a server. Raises BrokerUnavailable: then some may have run and others not.
        """
        answers: list[Any] = [None] * len(calls)
        todo = list(range(len(calls)))
        deadline = time.monotonic() + self._timeout_s
        for try_number in count():
            with self._translated():
                for client, indexes in self._by_client(calls, todo, deadline):
                    for index, answer in zip(indexes, _pipeline(client, script, calls, indexes), strict=True):
                        answers[index] = answer
                    if any(isinstance(answers[index], NoScriptError) for index in indexes):
                        # A server that started anew, or a first call.
                        client.script_load(script.source)
                self._ask_where_told(script, calls, answers, todo)
            todo = [index for index in todo if isinstance(answers[index], _REFUSED)]
            if not todo:
                break
            if not self._is_cluster and any(isinstance(answers[index], AskError) for index in todo):
                raise BrokerError(f"broker {self} is a node of a Redis Cluster: name it with redis+cluster://")
            refusal = max((answers[index] for index in todo), key=lambda error: not isinstance(error, NoScriptError))
            if time.monotonic() >= deadline and try_number > 1:
                raise BrokerUnavailable(f"broker {self}: {refusal}") from refusal
            if not isinstance(refusal, NoScriptError):
                self._forget(refusal)
                time.sleep(_LOOK_AGAIN_S)
        return answers

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            self._forget(None)
            if isinstance(error, BrokerUnavailable):
                raise
            raise BrokerUnavailable(f"broker {self}: {error}") from error
        except redis.RedisError as error:
            raise BrokerError(f"broker {self}: {error}") from error

    def _by_client(
        self, calls: Sequence[Call], todo: Sequence[int], deadline: float
    ) -> list[tuple[redis.Redis, list[int]]]:
        """The clients for these calls, connected: what cannot connect has carried nothing out."""
        while True:
            try:
                indexes_of: dict[redis.Redis, list[int]] = {}
                for index in todo:
                    indexes_of.setdefault(self._client_for(str(calls[index][0])), []).append(index)
                for client in indexes_of:
                    pool = client.connection_pool
                    pool.release(pool.get_connection())
            except (redis.ConnectionError, redis.TimeoutError, OSError):
                # Where the keys do not move, an operator waits for the error.
                if not self._moves or time.monotonic() >= deadline:
                    raise
                self._forget(None)
                time.sleep(_LOOK_AGAIN_S)
            else:
                return list(indexes_of.items())

    def _ask_where_told(self, script: Script, calls: Sequence[Call], answers: list[Any], todo: Sequence[int]) -> None:
        """ASK: this once at the node that is named. By its source, which that node may not have yet."""
        for index in todo if self._is_cluster else ():
            error = answers[index]
            if isinstance(error, AskError) and not isinstance(error, MovedError):
                key, *arguments = calls[index]
                with self._client_at(self._template.at(error.host, error.port)).pipeline(
                    transaction=False
                ) as pipeline:
                    pipeline.execute_command("ASKING")  # type: ignore[no-untyped-call]
                    pipeline.eval(script.source, 1, key, *arguments)
                    answers[index] = pipeline.execute(raise_on_error=False)[1]

    # Where the keys are

    @property
    def _is_cluster(self) -> bool:
        return isinstance(self._places[0], ClusterPlace)

    @property
    def _moves(self) -> bool:
        return not all(isinstance(place, BrokerAddress) for place in self._places)

    @property
    def _template(self) -> BrokerAddress:
        place = self._places[0]
        assert isinstance(place, ClusterPlace)
        return place.seeds[0]

    def _client_for(self, key: str) -> redis.Redis:
        number = static_shard(key, len(self._places))
        place = self._places[number]
        if isinstance(place, BrokerAddress):
            return self._client_at(place)
        if isinstance(place, SentinelPlace):
            address = self._masters.get(number)
            if address is None:
                address = self._masters[number] = self._ask_sentinels(place)
            return self._client_at(address)
        table = self._table
        if table is None:
            table = self._table = self._ask_nodes(place)
        slot = slot_of(key)
        for node, slots in table.owners.items():
            if slot in slots:
                return self._client_at(self._template.at(*node))
        raise redis.ConnectionError(f"no node of the Cluster has slot {slot}")

    def _forget(self, refusal: Exception | None) -> None:
        """Ask anew at the next need."""
        self._masters.clear()
        self._table = None
        if isinstance(refusal, ReadOnlyError):
            for client in list(self._clients.values()):
                client.connection_pool.disconnect()  # a name may lead to another server by now
        self._hint = (refusal.host, int(refusal.port)) if isinstance(refusal, MovedError) else None

    def _ask_sentinels(self, place: SentinelPlace) -> BrokerAddress:
        opinions: list[Opinion] = []
        failure: Exception | None = None
        for sentinel in place.sentinels:
            try:
                with self._stranger(sentinel) as client:
                    opinions.append(read_opinion(client.execute_command("SENTINEL", "MASTER", place.master)))
            except (redis.RedisError, OSError, TypeError, ValueError) as error:
                failure = error
        if not opinions:
            raise redis.ConnectionError(f"none of the Sentinels answers: {failure}") from failure
        newest = max(opinions)
        return place.template.at(newest.host, newest.port)

    def _ask_nodes(self, place: ClusterPlace) -> SlotTable:
        failure: Exception | None = None
        known = [client.connection_pool.connection_kwargs for client in self._clients.values()]
        nodes = [self._hint, *((each["host"], each["port"]) for each in known), *(seed.node for seed in place.seeds)]
        for node in dict.fromkeys(node for node in nodes if node is not None):
            try:
                with self._stranger(place.seeds[0].at(*node)) as client:
                    table = read_slot_table(client.execute_command("CLUSTER", "SLOTS"), node)
                if table.owners:
                    return table
            except (redis.RedisError, OSError, WireError) as error:
                failure = error
        raise redis.ConnectionError(f"no node of the Cluster answers: {failure}") from failure

    # Clients

    def _client_at(self, address: BrokerAddress) -> redis.Redis:
        place = address.node, address.path, address.db
        client = self._clients.get(place)
        if client is None:
            made = self._make_client(
                address, address.socket_timeout_s, address.connect_timeout_s, client_name=self._client_name
            )
            # Another thread may have been faster. Ours has not connected yet.
            client = self._clients.setdefault(place, made)
        return client

    def _stranger(self, address: BrokerAddress) -> redis.Redis:
        """A client for one question."""
        return self._make_client(address, _ASK_TIMEOUT_S, _ASK_TIMEOUT_S)

    def _make_client(
        self, address: BrokerAddress, timeout_s: float, connect_timeout_s: float, **more: Any
    ) -> redis.Redis:
        options: dict[str, Any] = dict(address.client_options)
        options.update(
            socket_timeout=timeout_s,
            socket_connect_timeout=connect_timeout_s,
            # Explicitly, since redis-py's default makes three copies of one push when the answers are late.
            retry=Retry(NoBackoff(), 0),
            retry_on_timeout=False,
            retry_on_error=[],
            decode_responses=False,
            protocol=2,
            # The pool notices a fork and makes a new connection.
            max_connections=1,
            timeout=_TURN_TIMEOUT_S,
            **more,
        )
        return redis.Redis.from_pool(_make_pool(**options))


def _pipeline(client: redis.Redis, script: Script, calls: Sequence[Call], indexes: Sequence[int]) -> list[Any]:
    with client.pipeline(transaction=False) as pipeline:
        for index in indexes:
            key, *arguments = calls[index]
            pipeline.evalsha(script.sha1, 1, key, *arguments)
        answers: list[Any] = pipeline.execute(raise_on_error=False)
    return answers
