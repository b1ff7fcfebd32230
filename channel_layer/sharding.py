"""Where a key lives: slots, shards, and what the nodes of a Redis Cluster say about them. No I/O.

Redis Cluster divides the keys into 16,384 slots by what stands between the first "{" and the "}" behind it (the hash
tag), else by the whole key, and each slot belongs to one node. Several single servers (static sharding) divide the
same slots into equal ranges, in the order in which they are named. So keys with one hash tag are in one place in
both.

    key --slot_of--> slot --static_shard--> number of the server          CLUSTER SLOTS --read_slot_table--> owners
                          --SlotTable-----> node of the Cluster           MOVED, ASK --read_redirect--> Redirect
"""

from __future__ import annotations

from binascii import crc_hqx  # CRC-16/XMODEM, the one that Redis Cluster uses
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count
from typing import Any, Final, Literal

from channel_layer.errors import WireError

__all__ = [
    "SLOT_COUNT",
    "Node",
    "Redirect",
    "SlotTable",
    "read_redirect",
    "read_slot_table",
    "slot_of",
    "static_shard",
    "tag_for",
]

SLOT_COUNT: Final = 16384

# Host and port.
Node = tuple[str, int]


def slot_of(key: str) -> int:
    """Return the slot of a key, as Redis Cluster computes it."""
    _, brace, rest = key.partition("{")
    if brace:
        tag, brace, _ = rest.partition("}")
        if brace and tag:
            key = tag
    return crc_hqx(key.encode(), 0) % SLOT_COUNT


def static_shard(key: str, shard_count: int) -> int:
    """Return which of ``shard_count`` servers has the key, counted from 0."""
    return slot_of(key) * shard_count // SLOT_COUNT


def tag_for(slots: Collection[int]) -> str:
    """Return a hash tag whose slot is one of ``slots``, the same one in every process."""
    return next(tag for tag in map(str, count()) if slot_of(tag) in slots)


@dataclass(frozen=True, slots=True)
class SlotTable:
    """Who owns which slots, as one node of the Cluster sees it. Slots without an owner are in nobody's set."""

    owners: dict[Node, frozenset[int]]
    nodes: tuple[Node, ...]  # all that were named, replicas included: whom to ask next time


def read_slot_table(reply: Any, asked: Node) -> SlotTable:
    """Read an answer of ``asked`` to CLUSTER SLOTS. Raises WireError."""
    owners: dict[Node, set[int]] = {}
    nodes: dict[Node, None] = {}
    try:
        for first, last, master, *replicas in reply:
            node = _read_node(master, asked)
            owners.setdefault(node, set()).update(range(first, last + 1))
            nodes.update(dict.fromkeys(_read_node(each, asked) for each in (master, *replicas)))
    except (AttributeError, TypeError, ValueError) as error:
        raise WireError(f"what {asked[0]}:{asked[1]} answers to CLUSTER SLOTS cannot be read: {error}") from error
    return SlotTable({node: frozenset(slots) for node, slots in owners.items()}, tuple(nodes))


def _read_node(entry: Any, asked: Node) -> Node:
    host, port = entry[:2]
    # CLUSTER SLOTS: an empty or absent host means the one that was asked; a node that does not know a host name to
    # give says "?", and is not reached then, which the operator sees.
    return (host.decode() if host else asked[0]), int(port)


@dataclass(frozen=True, slots=True)
class Redirect:
    """MOVED: the slot belongs to another node. ASK: only this once, for a slot on its way. TRYAGAIN: keys are apart.

    In each case the command was not carried out.
    """

    kind: Literal["MOVED", "ASK", "TRYAGAIN"]
    node: Node | None = None  # to be asked; None with TRYAGAIN


def read_redirect(text: str, asked: Node) -> Redirect | None:
    """Return the redirection that an error of the node ``asked`` means; None for any other error."""
    kind, _, rest = text.partition(" ")
    if kind == "TRYAGAIN":
        return Redirect("TRYAGAIN")
    if kind == "MOVED" or kind == "ASK":
        _slot, _, place = rest.partition(" ")
        host, _, port = place.partition(" ")[0].rpartition(":")
        if port.isdecimal():
            return Redirect("MOVED" if kind == "MOVED" else "ASK", (host or asked[0], int(port)))
    return None
