"""The keys of a scope in the order of their UTF-8 bytes, for values that are kept in a dict.

Writers do nothing for it. A dict keeps its keys in the order of their creation, so the keys created since the last use
are found at its end; a deleted key is skipped when it is encountered. Until keys are first asked for in order there is
no index (docs/design/0038-keys-in-order.md).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from random import Random
from typing import Final

from scopestate.ops.turns import Range

BUCKET: Final = 512
"""Keys of a bucket that was just made."""
_LARGEST: Final = 4 * BUCKET
"""A bucket with more keys is divided when it is next sorted."""
SORTED_AT_ONCE: Final = 10_000
"""The most keys that are sorted in one step, which no other thread can interrupt: a few milliseconds."""
READ_WITHIN_TURN: Final = 10_000
"""The most keys that a turn reads, sorts, or adds to the index. More would keep other callers waiting."""

# Seeded by the operating system: a caller that chooses its keys cannot make the buckets uneven.
_sample: Final = Random().sample


class TooLong(Exception):
    """This many keys are not read within a turn: read them from copies, see `OrderedKeys.apart`."""


class OrderedKeys:
    """The keys of a dict of values in order, as the turns of its scope ask for them.

    Thread rules: within turns of the scope, except `accept` and `forget_if_unused`.
    """

    __slots__ = ("_creations", "_index", "_used", "_values", "patient")

    def __init__(self, values: dict[str, bytes], creations: Callable[[], int]) -> None:
        """`creations` returns how many keys the scope has created in its life."""
        self._values = values
        self._creations = creations
        self._index: KeyIndex | None = None
        self._used = False
        self.patient = False
        """True: however many keys it takes, they are read within the turn."""

    def find(self, within: Range, exists: Callable[[str], object]) -> list[str]:
        """Return the keys of a range that exist, in its order, at most `limit`. Raises TooLong."""
        self._used = True
        creations = self._creations()
        # Removed while it is changed: an index that an exception leaves half changed is not used again.
        index, self._index = self._index, None
        if index is not None and index.is_wasteful(len(self._values)):
            index = None
        hurried = len(self._values) > READ_WITHIN_TURN and not self.patient
        if index is None:
            if hurried:
                raise TooLong
            index = KeyIndex(list(self._values), creations)
        new = creations - index.creations
        if hurried and (new > READ_WITHIN_TURN or index.most(within) > READ_WITHIN_TURN):
            self._index = index
            raise TooLong
        if new:
            index.add(created_since(self._values, new), creations)
        found = index.find(within, exists)
        self._index = index
        return found

    def is_behind(self) -> bool:
        """Tell whether a turn would have to index more keys than it may.

        From any thread: the answer may be outdated.
        """
        if len(self._values) <= READ_WITHIN_TURN:
            return False
        index = self._index
        return index is None or self._creations() - index.creations > READ_WITHIN_TURN

    def check_length(self) -> None:
        """Raise TooLong if there are more keys than a turn reads."""
        if len(self._values) > READ_WITHIN_TURN and not self.patient:
            raise TooLong

    def is_made(self) -> bool:
        """Tell whether there is an index."""
        return self._index is not None

    def apart(self, copied: dict[str, bytes] | list[str]) -> KeysApart:
        """Return the keys of a copy for reads outside of turns: of the values, or of the keys if there is no index."""
        index, fresh, creations = self._index, list[str](), self._creations()
        if not isinstance(copied, dict):
            index = None  # another thread may have made one in the meantime
        elif index is not None:
            if creations - index.creations > len(copied) // 4 or index.is_wasteful(len(copied)):
                index = None
            else:
                index, fresh = index.copy(), created_since(copied, creations - index.creations)
        return KeysApart(self, copied, creations, index, fresh)

    def accept(self, index: KeyIndex) -> None:
        """Take an index that was made for an earlier moment: later turns need not make their own. From any thread."""
        now = self._index
        if now is None or now.creations <= index.creations:
            self._index = index

    def forget_if_unused(self) -> None:
        """Drop the index if no turn has asked for keys since the last call. From any thread."""
        if not self._used:
            # A turn that uses it at this moment puts it back; then the next call removes it.
            self._index = None
        self._used = False


class KeysApart:
    """The keys of copied values in order, in place of `OrderedKeys`. Used by one thread, outside of turns."""

    __slots__ = ("_creations", "_fresh", "_index", "_source", "_values")

    def __init__(
        self,
        source: OrderedKeys,
        values: dict[str, bytes] | list[str],
        creations: int,
        index: KeyIndex | None,
        fresh: list[str],
    ) -> None:
        """`fresh`: keys to add to the index, a copy; None: there is no index yet."""
        self._source = source
        self._values = values
        self._creations = creations
        self._index = index
        self._fresh = fresh

    def find(self, within: Range, exists: Callable[[str], object]) -> list[str]:
        """As `OrderedKeys.find`, however many keys there are. The scope's turns use the index from then on."""
        if self._index is None:
            self._index = KeyIndex(list(self._values), self._creations)
        elif self._fresh:
            self._index.add(self._fresh, self._creations)
            self._fresh = []
        found = self._index.find(within, exists)
        self._source.accept(self._index.copy())
        return found

    def check_length(self) -> None:
        """Any number of keys may be read here."""


class KeyIndex:
    """Sorted buckets of keys, which together hold each key that exists, and may hold keys that do not.

    Bucket `i` has the keys from `_lows[i]` up to `_lows[i + 1]`. Keys that were added wait beside their bucket, and are
    sorted in when the bucket is next read. The list of a bucket is never changed, only replaced, so a copy shares it.

    Thread rules: one thread at a time. A method that is interrupted by an exception may leave the index unusable.
    """

    __slots__ = ("_added", "_buckets", "_lows", "_size", "creations")

    def __init__(self, keys: Sequence[str], creations: int) -> None:
        """`keys` are distinct. `creations`: how many keys the scope had created in its life when they were read."""
        self._lows, self._buckets = _divided(keys)
        self._added: list[list[str] | None] = [None] * len(self._lows)
        self._size = len(keys)
        self.creations = creations
        """Every key that the scope had after this many creations is in the index, unless it is deleted."""

    def copy(self) -> KeyIndex:
        """Return a second index with the same keys. It takes time for each bucket, not for each key."""
        copied = KeyIndex.__new__(KeyIndex)
        copied._lows, copied._buckets = self._lows[:], self._buckets[:]
        copied._added = [None if added is None else added[:] for added in self._added]
        copied._size, copied.creations = self._size, self.creations
        return copied

    def is_wasteful(self, existing: int) -> bool:
        """Tell whether most of its keys are deleted, or were added twice. `existing`: how many keys there are."""
        return self._size > 2 * existing + _LARGEST

    def add(self, keys: Iterable[str], creations: int) -> None:
        """Add keys, which may be there already. `creations` is then as in the constructor."""
        lows, waiting = self._lows, self._added
        size = 0
        for key in keys:
            place = bisect_right(lows, key) - 1
            added = waiting[place]
            if added is None:
                waiting[place] = [key]
            else:
                added.append(key)
            size += 1
        self._size += size
        self.creations = creations

    def most(self, within: Range) -> int:
        """Return about how many keys a range may have."""
        high = within.high()
        first = bisect_right(self._lows, within.low()[0]) - 1
        last = len(self._lows) if high is None else bisect_left(self._lows, high)
        most = max(1, last - first) * (self._size // len(self._lows) + 1)
        return most if within.limit is None else min(most, within.limit)

    def find(self, within: Range, exists: Callable[[str], object]) -> list[str]:
        """Return the keys of a range that exist, in its order, at most `limit`."""
        low, included = within.low()
        high = within.high()
        if high is not None and high <= low:
            return []
        found: list[str] = []
        limit, reverse = within.limit, within.reverse
        if not reverse:
            place = bisect_right(self._lows, low) - 1
        else:
            place = (len(self._lows) if high is None else bisect_left(self._lows, high)) - 1
        while 0 <= place < len(self._lows) and (limit is None or len(found) < limit):
            first = self._lows[place]
            if high is not None and first >= high and not reverse:
                break
            made = self._sort_in(place, exists)
            if reverse:
                place += made - 1
                first = self._lows[place]
            bucket = self._buckets[place]
            # Only the buckets at the two ends of a range have keys outside of it.
            begin = (bisect_left if included else bisect_right)(bucket, low) if first <= low else 0
            end = len(bucket)
            if high is not None and bucket and bucket[-1] >= high:
                end = bisect_left(bucket, high)
            part = bucket[begin:end]
            if reverse:
                part.reverse()
            there = list(islice(filter(exists, part), None if limit is None else limit - len(found)))
            found += there
            if 2 * len(there) < len(bucket) and (limit is None or len(found) < limit) and len(part) == len(bucket):
                gone = self._shrink(place, there[::-1] if reverse else there)
                place -= 0 if reverse else gone  # the next one is in its place then
            if reverse and first <= low:
                break
            place += -1 if reverse else 1
        return found

    def _sort_in(self, place: int, exists: Callable[[str], object]) -> int:
        """Sort the keys that were added to a bucket into it. Return how many buckets it has become."""
        added = self._added[place]
        if added is None:
            return 1
        before = self._buckets[place]
        added.sort()
        # Two sorted lists in a row: `sort` merges them without comparing every pair.
        both = before + added
        both.sort()
        keys = list(filter(exists, dict.fromkeys(both)))
        buckets = [keys] if len(keys) <= _LARGEST else _cut(keys)
        self._size += len(keys) - len(both)
        self._buckets[place : place + 1] = buckets
        self._lows[place + 1 : place + 1] = [bucket[0] for bucket in buckets[1:]]
        self._added[place : place + 1] = [None] * len(buckets)
        return len(buckets)

    def _shrink(self, place: int, keys: list[str]) -> int:
        """Replace a bucket, most of whose keys are deleted, by its keys that exist. Return 1 if it is gone, else 0."""
        self._size -= len(self._buckets[place]) - len(keys)
        if keys or len(self._lows) == 1:
            self._buckets[place] = keys
            return 0
        del self._buckets[place], self._added[place]
        # The keys of this bucket's interval now belong to the bucket before; the first bucket begins with the smallest
        # text.
        del self._lows[place or 1]
        return 1


def created_since(values: dict[str, bytes], count: int) -> list[str]:
    """Return the last `count` keys that were created, in one step; if some were deleted, older ones are included."""
    return list(islice(reversed(values), count))


def _divided(keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return sorted buckets of distinct keys, and where each begins.

    No step is longer than a few milliseconds, so other threads run in between. Refused: `sorted(keys)`, which holds the
    interpreter lock for 100 to 1,500 ms if there are a million.
    """
    if len(keys) <= SORTED_AT_ONCE:
        buckets = _cut(sorted(keys)) or [[]]
        return ["", *[bucket[0] for bucket in buckets[1:]]], buckets
    lows = ["", *_begins(keys)]
    parts: list[list[str]] = [[] for _ in lows]
    for key in keys:
        parts[bisect_right(lows, key) - 1].append(key)
    all_lows: list[str] = []
    all_buckets: list[list[str]] = []
    for low, part in zip(lows, parts, strict=True):
        if len(part) <= _LARGEST:
            part.sort()
            all_lows.append(low)
            all_buckets.append(part)
        else:
            inner_lows, inner = _divided(part)
            all_lows += [low, *inner_lows[1:]]
            all_buckets += inner
    return all_lows, all_buckets


def _begins(keys: Sequence[str]) -> list[str]:
    """Return where buckets of about the same size begin, the first left out: by a sample of the keys."""
    # At most 10,000 keys, sorted in one step; larger parts than BUCKET are divided again.
    sample = sorted(_sample(keys, min(SORTED_AT_ONCE, 8 * (len(keys) // BUCKET))))
    count = min(len(sample) // 4, len(keys) // BUCKET)
    return [sample[len(sample) * place // count] for place in range(1, count)]


def _cut(keys: list[str]) -> list[list[str]]:
    return [keys[begin : begin + BUCKET] for begin in range(0, len(keys), BUCKET)]
