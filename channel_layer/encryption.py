"""Encryption of what goes through the broker: symmetric keys, and their rotation.

Whoever can read the broker's memory, its network or its snapshots then sees sizes, times and names, but no contents.
Encrypted is every element of a list: messages of normal channels, openings, letters, blobs of links. Names are not:
channels, groups and process ids stand in keys and registries, where the broker itself works with them.

Lives here: keys, tokens, and what an element looks like when it is encrypted. Does not live here: the places where
elements leave and arrive, which are few: inbox.ListWriter, process_layer.py and publisher.py.

    element    deadline8 + Fernet token              (the deadline is the broker's; scripts/push.lua puts it in front)
    blob       process id + ":" + Fernet token       (whose blob it is must be known when it cannot be read)
    refusal    process id + ":?"                     (in place of a blob: I cannot read yours, our link is over)

The tokens are Fernet's, of ``cryptography``, and a key is made of a text as channels_redis does it: the SHA-256 of
it. The first key encrypts; every key decrypts. So a key is replaced in three rounds of restarts: [old, new]
everywhere, then [new, old], then [new]. Why without Fernet's time to live: docs/decisions/0013-encryption.md.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from channel_layer.errors import WireError
from channel_layer.frames import decode_blob

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Cipher",
    "Refused",
    "Undecryptable",
    "build_refusal",
    "environment_items",
    "keys_from_environment",
    "read_keys",
]

ENVIRONMENT_VARIABLE: Final = "TRUNKLINE_ENCRYPTION_KEYS"

# How every token begins: Fernet's version and the upper bytes of its time, in base64. Nothing that we write without
# encryption does: msgpack would call it the number 103 with something behind it.
_TOKEN_START: Final = b"gAAAA"
_SOURCE_BYTES_MAX: Final = 64  # of the process id in front of a blob
_REFUSAL: Final = b"?"


class Undecryptable(WireError):
    """Encrypted with a key that this process does not have, or encrypted on one side only.

    ``source`` is the process that says it sent the blob; None for other elements.
    """

    def __init__(self, text: str, source: str | None = None) -> None:
        super().__init__(text)
        self.source = source


class Refused(WireError):
    """The process ``source`` cannot read what we send it."""

    def __init__(self, source: str) -> None:
        super().__init__(f"process {source} cannot read what this process sends it")
        self.source = source


class Cipher:
    """Turns contents into what stands in the broker, and back. Without keys it changes nothing.

    Any thread may call it. It never shows a key.
    """

    def __init__(self, keys: Iterable[str | bytes] | None = ()) -> None:
        """Raises TypeError and ValueError for what is no key, and ImportError if ``cryptography`` is not there."""
        if isinstance(keys, str | bytes):
            # As in channels_redis: a str is a sequence of str, too, and each of its letters would be a key.
            raise ValueError("encryption keys are a list: the first encrypts, every one decrypts")
        digests = tuple(_digest(key) for key in keys or ())
        # What tells ciphers apart; a layer is made once for each. Not the keys, but as secret.
        self._digests = digests
        self._fernet: MultiFernet | None = _build_fernet(digests) if digests else None
        self.is_encrypting = self._fernet is not None

    def __repr__(self) -> str:
        return f"<Cipher {len(self._digests)} keys>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cipher) and self._digests == other._digests

    def __hash__(self) -> int:
        return hash(self._digests)

    def seal(self, content: bytes) -> bytes:
        """Return what to store for ``content``."""
        return content if self._fernet is None else self._fernet.encrypt(content)

    def open(self, sealed: bytes) -> bytes:
        """Return the content of what stood in the broker. Raises Undecryptable."""
        if self._fernet is None:
            if sealed.startswith(_TOKEN_START):
                raise Undecryptable(_NO_KEYS)
            return sealed
        return self._decrypt(self._fernet, sealed, None)

    def seal_blob(self, source: str, blob: bytes) -> bytes:
        """As ``seal`` for a blob that the process ``source`` sends."""
        return blob if self._fernet is None else b"%b:%b" % (source.encode(), self._fernet.encrypt(blob))

    def open_blob(self, sealed: bytes) -> bytes:
        """As ``open`` for a blob. Raises Undecryptable, with a source if that can be read, and Refused."""
        fernet = self._fernet
        if sealed[:1] == _BLOB_START:
            if fernet is None:
                return sealed
            raise Undecryptable(_NOT_ENCRYPTED, _source_of(sealed))
        head, colon, token = sealed[:_SOURCE_BYTES_MAX].partition(b":")
        source = head.decode() if colon and head.isalnum() else None
        if source is not None and token == _REFUSAL:
            raise Refused(source)
        if fernet is not None:
            return self._decrypt(fernet, sealed[len(head) + 1 :] if source is not None else sealed, source)
        if source is not None and token.startswith(_TOKEN_START):
            raise Undecryptable(_NO_KEYS, source)
        return sealed

    def _decrypt(self, fernet: MultiFernet, token: bytes, source: str | None) -> bytes:
        from cryptography.fernet import InvalidToken

        try:
            return fernet.decrypt(token)
        except InvalidToken:
            if not token.startswith(_TOKEN_START):
                raise Undecryptable(_NOT_ENCRYPTED, source) from None
            count = len(self._digests)
            raise Undecryptable(
                f"none of the {count} encryption keys of this process decrypts it" if count > 1
                else "the encryption key of this process does not decrypt it",
                source,
            ) from None  # fmt: skip


_NO_KEYS: Final = "it is encrypted, and this process has no encryption keys"
_NOT_ENCRYPTED: Final = "it is not encrypted, and this process has encryption keys"
_BLOB_START: Final = b"\x98"  # a blob is a msgpack array of eight


def build_refusal(source: str) -> bytes:
    """Return what tells a peer that ``source`` cannot read its blobs. Never encrypted: it has other keys, or none."""
    return b"%b:%b" % (source.encode(), _REFUSAL)


def _source_of(blob: bytes) -> str | None:
    try:
        return decode_blob(blob).source
    except WireError:
        return None


def read_keys(items: Sequence[str]) -> tuple[str, ...]:
    """Return the keys that the items of ``--encryption-keys`` mean.

    Each item is a key, or ``@`` and the path of a file of one key a line. Raises ValueError, which names the file and
    shows no key.
    """
    keys: list[str] = []
    for item in items:
        if not item.startswith("@"):
            keys.append(item)
            continue
        path = item.removeprefix("@")
        try:
            lines = Path(path).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the file of encryption keys {path!r} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"the file of encryption keys {path!r} has no key")
        keys += found
    return tuple(keys)


def keys_from_environment(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """As read_keys() for the items in TRUNKLINE_ENCRYPTION_KEYS; no keys if it is not set."""
    return read_keys(environment_items(environ))


def environment_items(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the items in TRUNKLINE_ENCRYPTION_KEYS, one a line, for read_keys()."""
    return tuple(line for line in environ.get(ENVIRONMENT_VARIABLE, "").split("\n") if line)


def _digest(key: object) -> bytes:
    if not isinstance(key, str | bytes):
        raise TypeError(f"an encryption key is a {type(key).__name__}, expected text or bytes")
    if not key:
        raise ValueError("an encryption key is empty")
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def _build_fernet(digests: Sequence[bytes]) -> Any:
    try:
        from cryptography.fernet import Fernet, MultiFernet
    except ImportError as error:
        raise ImportError(
            "encryption keys are given, and the package cryptography is missing: pip install 'trunkline[encryption]'"
        ) from error
    return MultiFernet([Fernet(base64.urlsafe_b64encode(digest)) for digest in digests])
