"""The streams of a cluster: one for each slot, so that a write, its number and its event are one step on its server."""

from __future__ import annotations

import binascii
import functools
import itertools
from typing import Final

from redis.crc import REDIS_CLUSTER_HASH_SLOTS

_LETTERS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


@functools.cache
def tags() -> tuple[str, ...]:
    """Return a text for each slot. A key with this text as its hash tag is in that slot.

    It is the first such text, by length and then by alphabet. It is part of the layout in Redis, so it never changes.
    """
    found: dict[int, str] = {}
    words = (word for length in itertools.count(1) for word in itertools.product(_LETTERS, repeat=length))
    while len(found) < REDIS_CLUSTER_HASH_SLOTS:
        text = "".join(next(words))
        # As `redis.crc.key_slot`, which looks for braces first: that takes four times as long.
        found.setdefault(binascii.crc_hqx(text.encode(), 0) % REDIS_CLUSTER_HASH_SLOTS, text)
    return tuple(found[slot] for slot in range(REDIS_CLUSTER_HASH_SLOTS))
