"""Names of channels, groups and processes, and the broker keys they live under.

The one place that knows what a name looks like and which key it maps to. No I/O.

    http.request                  normal channel: many readers, each message to one of them
    interface.i7k3…!42            process-local channel: read by the one process whose id stands before the "!"
    <prefix>.<process id>!<local part>

A process id begins with a letter for its role (``i`` interface server, ``w`` worker, ``c`` any other
process, a client of the layer) and is random and new at every start, so a new process never adopts
an old inbox.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Final, Literal

from channel_layer.errors import InvalidName

__all__ = [
    "NAME_LENGTH_MAX",
    "NORMAL_MEMBER_MARK",
    "Keys",
    "Role",
    "check_channel_name",
    "check_group_name",
    "is_linked",
    "new_process_id",
    "non_local_name",
    "process_of",
]

# Channel layer specification, "Channels and Messages": a maximum length of at least 100.
NAME_LENGTH_MAX: Final = 100

# In the registry of a group stand processes. A normal channel belongs to none, so its membership stands there
# itself, behind this mark, which no process id begins with.
NORMAL_MEMBER_MARK: Final = "#"

Role = Literal["interface", "worker", "client"]
_ROLE_LETTERS: Final[dict[Role, str]] = {"interface": "i", "worker": "w", "client": "c"}

_CHANNEL_NAME = re.compile(r"[A-Za-z0-9._-]+(?:![A-Za-z0-9._-]*)?")
_GROUP_NAME = re.compile(r"[A-Za-z0-9._-]+")
_PREFIX = re.compile(r"[A-Za-z0-9._:-]+")
_ID_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"


def check_channel_name(name: object) -> str:
    """Return ``name`` if it is a valid channel name, else raise InvalidName (a TypeError)."""
    if isinstance(name, str) and len(name) <= NAME_LENGTH_MAX and _CHANNEL_NAME.fullmatch(name):
        return name
    raise InvalidName(
        f"channel name {name!r} is not valid: 1 to {NAME_LENGTH_MAX} ASCII letters, digits, "
        "'.', '-' and '_', with at most one '!'"
    )


def check_group_name(name: object) -> str:
    """Return ``name`` if it is a valid group name, else raise InvalidName (a TypeError)."""
    if isinstance(name, str) and len(name) <= NAME_LENGTH_MAX and _GROUP_NAME.fullmatch(name):
        return name
    raise InvalidName(
        f"group name {name!r} is not valid: 1 to {NAME_LENGTH_MAX} ASCII letters, digits, '.', '-' and '_'"
    )


def new_process_id(role: Role) -> str:
    """Return a new id for this start of a process: the letter of its role and 60 random bits."""
    return _ROLE_LETTERS[role] + "".join(secrets.choice(_ID_ALPHABET) for _ in range(12))


def non_local_name(channel: str) -> str:
    """Return the name up to and including "!", or the whole name of a normal channel."""
    head, mark, _ = channel.partition("!")
    return head + mark


def process_of(channel: str) -> str | None:
    """Return the id of the process that reads a process-local channel; None for a normal channel."""
    head, mark, _ = channel.partition("!")
    return head.rpartition(".")[2] if mark else None


def is_linked(process: str) -> bool:
    """True for interface servers and workers: they keep links; other processes have mail only."""
    return process[:1] in ("i", "w")


@dataclass(frozen=True, slots=True)
class Keys:
    """Broker keys of one deployment. ``prefix`` separates deployments that share a broker.

    Whatever one script touches has one hash tag, so everything works on Redis Cluster. The keys of
    normal channels and inboxes carry the version of their layout: an old process never pops what it cannot read.
    """

    prefix: str = "trunkline"

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix):
            raise InvalidName(f"prefix {self.prefix!r} is not valid: ASCII letters, digits, '.', ':', '-', '_'")

    def normal(self, channel: str) -> str:
        """List of the messages of a normal channel; their layout is still that of version 1."""
        return f"{self.prefix}:1:channel:{{{channel}}}"

    def openings(self, channel: str, version: int) -> str:
        """List of the connections that wait in a normal channel, from interface servers that speak ``version``."""
        return f"{self.prefix}:{version}:channel:{{{channel}}}"

    def link(self, process: str) -> str:
        """List of link blobs for a process."""
        return f"{self.prefix}:1:inbox:{{{process}}}:link"

    def mail(self, process: str) -> str:
        """List of single messages for a process."""
        return f"{self.prefix}:1:inbox:{{{process}}}:mail"

    def lease(self, process: str) -> str:
        """Present while the process is alive."""
        return f"{self.prefix}:lease:{{{process}}}"

    def death(self, process: str) -> str:
        """Present for a while after whoever had started the process saw that it is no more."""
        return f"{self.prefix}:death:{{{process}}}"

    def group(self, group: str) -> str:
        """Sorted set of the processes that hold members of the group, by deadline in broker time."""
        return f"{self.prefix}:group:{{{group}}}"

    @property
    def generation(self) -> str:
        """Random value that is missing only when the broker lost its data."""
        return f"{self.prefix}:generation"
