"""The Lua scripts of the channel layer, each a file beside this one.

Lives here: reading them and naming them. Does not live here: running them (broker.py). To add one: a file
``<name>.lua`` whose head says what KEYS and ARGV are and why it is one script, declaring every key it touches,
all in one slot; and a constant below, which is also what makes it loaded on every connect.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Final

__all__ = ["ALL", "GROUP_MEMBERS", "GROUP_REGISTER", "PUSH", "PUSH_BACK", "Script", "load"]


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the digest under which the broker knows it once it is loaded."""

    name: str
    source: str
    sha1: str


def load(name: str) -> Script:
    """Read the script ``<name>.lua`` of this package."""
    source = resources.files(__name__).joinpath(f"{name}.lua").read_text(encoding="utf-8")
    # Not for security: EVALSHA names scripts by their SHA-1.
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


PUSH: Final = load("push")
PUSH_BACK: Final = load("push_back")
GROUP_REGISTER: Final = load("group_register")
GROUP_MEMBERS: Final = load("group_members")

ALL: Final = (PUSH, PUSH_BACK, GROUP_REGISTER, GROUP_MEMBERS)
