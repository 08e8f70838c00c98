"""The Redis keys for what iii's layout has no place for: revisions, deadlines, kept answers. Names and forms only.

The hash of a scope stays as iii knows it. Beside it, in the same slot of a cluster, are the keys that are named here
(docs/design/0040-redis-revisions.md).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from typing import Final

from redis.crc import key_slot

PREFIX: Final = b"scopestate:side:"
"""Of the hash with the revisions and deadlines of a scope. Field: the key. Value: an entry, as `entry_of` makes it."""
DUE_PREFIX: Final = b"scopestate:due:"
"""Of the sorted set with the keys of a scope that have a deadline, which is their score."""
KEPT_PREFIX: Final = b"scopestate:kept:"
"""Of the answer that is kept for an idempotency key."""

INDEX_PREFIX: Final = b"scopestate:index:"
"""Of the sorted set with the keys of a scope in order, made when many are first listed."""

# Two more fields of the side hash: b"\xff" has the number of the last change, b"\xfe" whether there is an index
# (`building`, `ready`). No key has these names: they are not UTF-8.
NUMBER_BYTES: Final = 16
_DIGEST_BYTES: Final = 16
PLAIN_BYTES: Final = NUMBER_BYTES + _DIGEST_BYTES
"""The size of an entry without a deadline."""

KEPT_MS: Final = 86_400_000
"""How long an answer is kept for its idempotency key."""
CLIENT_DIGEST_BYTES: Final = 256
"""The digest of a value of this size is computed here: Python's SHA-1 is several times as fast as that of a script."""


def digest_of(raw: bytes) -> bytes:
    """Return the digest by which values are compared: the first digits of `sha1hex`, as in a script."""
    return hashlib.sha1(raw, usedforsecurity=False).hexdigest()[:_DIGEST_BYTES].encode()


def digest_if_large(raw: bytes) -> bytes:
    """Return the digest of a large value; "" lets the script compute it."""
    return digest_of(raw) if len(raw) >= CLIENT_DIGEST_BYTES else b""


def number_text(number: int) -> bytes:
    """Return a number as the scripts compare it: as text of a fixed length."""
    return b"%016d" % number


def entry_of(number: bytes, raw: bytes, expires_ms: int | None = None) -> bytes:
    """Return the entry of a value: number, digest, and the deadline in milliseconds if there is one."""
    entry = number + digest_of(raw)
    return entry if expires_ms is None else b"%b%d" % (entry, expires_ms)


def revision_in(entry: bytes) -> int:
    """Return the revision in an entry."""
    return int(entry[:NUMBER_BYTES])


def deadline_in(entry: bytes) -> int | None:
    """Return the deadline in an entry, in milliseconds since the epoch."""
    return int(entry[PLAIN_BYTES:]) if len(entry) > PLAIN_BYTES else None


def fits(entry: bytes, raw: bytes) -> bool:
    """Return whether an entry is that of a value. It is not if another program wrote the value."""
    return entry[NUMBER_BYTES:PLAIN_BYTES] == digest_of(raw)


def beside(prefix: bytes, hash_key: bytes) -> bytes:
    """Return the name of a key in the same slot as the hash."""
    tag = _tag_in(hash_key)
    if tag:
        return b"%b{%b}%b" % (prefix, tag, hash_key)
    if hash_key and b"}" not in hash_key:
        return b"%b{%b}" % (prefix, hash_key)
    return b"%b{%b}%b" % (prefix, _tag_of_slot(key_slot(hash_key)), hash_key)


def hash_of(prefix: bytes, name: bytes) -> bytes:
    """Return the hash that a key made by `beside` belongs to."""
    tag, _, rest = name[len(prefix) + 1 :].partition(b"}")
    return rest or tag


def _tag_in(key: bytes) -> bytes:
    """Return what is in the first braces of a key, which alone decides its slot; "" if all of it does."""
    _, opening, rest = key.partition(b"{")
    tag, closing, _ = rest.partition(b"}")
    return tag if opening and closing else b""


@functools.lru_cache(maxsize=1024)
def _tag_of_slot(slot: int) -> bytes:
    """Return a text whose slot this is; a search of some milliseconds, for names with a brace that is no tag."""
    return next(text for number in itertools.count() if key_slot(text := b"%d" % number) == slot)
