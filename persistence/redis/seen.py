"""What this engine has seen of the keys of a scope, and the views that turns decide over.

Other engines may have changed a key since. So the decision of a turn is stored only if the keys that it has looked at
are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from scopestate.actors.backlog import Limits
from scopestate.actors.ports import WriteRule
from scopestate.errors import DeserializationError
from scopestate.ops.turns import Entry, Kept, Range, TtlRule
from scopestate.ops.values import parse
from scopestate.persistence.redis.sidecar import NUMBER_BYTES, PLAIN_BYTES, deadline_in, entry_of, revision_in

BULKY: Final = 1 << 16
"""A command or value of this many bytes is sent separately, so that it delays no other scope."""
_MOST_KEYS_SEEN: Final = 1024
_MOST_BYTES_SEEN: Final = 1 << 22

Known = tuple[bytes | None, bytes | None, bytes | None]
"""The value of a key as it is in Redis, and as scopestate writes it: they differ if another program wrote it. Then its
entry in the side hash: b"" if there is none, None if that is not known; of a write of this engine only the number."""
NOTHING: Final[Known] = (None, None, b"")


def entry_in(known: Known) -> bytes:
    """Return the whole entry of a key that has a value."""
    raw, _, entry = known
    assert raw is not None
    assert entry is not None
    return entry_of(entry, raw) if len(entry) == NUMBER_BYTES else entry


class Seen:
    """Key -> its last seen value; other engines may have changed it since. Used within the scope's turn."""

    def __init__(
        self, scope: str, note_misfit: Callable[[str, str, str], object], note_fit: Callable[[str, str], object]
    ) -> None:
        self._scope = scope
        self._note_misfit = note_misfit
        self._note_fit = note_fit
        self._misfits: set[str] = set()
        """Names that were reported as not UTF-8 or not holding JSON, until they are valid again."""
        self._keys: dict[str, Known] = {}
        self._bytes = 0
        self.bulky = False
        """True once a large value was seen."""
        self.get = self._keys.get

    def look(self, key: str, found: bytes | None, entry: bytes | None = None) -> Known:
        """Note the value of a key and return it. Raises DeserializationError if it is not JSON."""
        if found is None:
            self.remember(key, NOTHING)
            return NOTHING
        data = self.valid(key, found)
        known = self._keys.get(key)
        if known is None or known[2] is None or entry is not None:
            known = (found, found if data == found else data, entry)
            self.remember(key, known)
        return known

    def valid(self, key: str, raw: bytes, otherwise: bytes | None = None) -> bytes:
        """Return a value of Redis as scopestate writes it.

        If it is not JSON, return `otherwise` if that is given, or raise DeserializationError.
        """
        seen = self._keys.get(key)
        if seen is not None and raw == seen[0]:
            return seen[1]  # type: ignore[return-value]  # both are None, or neither
        try:
            data = parse(raw)
        except DeserializationError as error:
            self.forget(key)
            self.note_misfit(key, str(error))
            if otherwise is not None:
                return otherwise
            raise DeserializationError(
                f"what Redis holds for key {key!r} of scope {self._scope!r} is not JSON: {error}; set or delete the key"
            ) from error
        self.remember(key, (raw, raw if data == raw else data, None))
        return data

    def remember(self, key: str, known: Known) -> None:
        """Note the value of a key."""
        raw, keys = known[0], self._keys
        if key not in keys:  # those in `keys` are valid
            self._misfits.discard(key)
            self._note_fit(self._scope, key)
        size = 0 if raw is None else len(raw)
        if size >= BULKY:
            self.bulky = True
        self._bytes += size
        if self._bytes > _MOST_BYTES_SEEN or len(keys) > _MOST_KEYS_SEEN:
            # Refused: dropping only the oldest. That is more code, and saves one read in a thousand updates.
            keys.clear()
            self._bytes = size
        if size <= _MOST_BYTES_SEEN:
            keys[key] = known

    def note_misfit(self, name: str, problem: str) -> None:
        """Report a field of the hash that is not UTF-8 or does not hold JSON."""
        self._misfits.add(name)
        self._note_misfit(self._scope, name, problem)

    def note_gone(self, present: Collection[str]) -> None:
        """Withdraw the reports of names that are no longer in the hash; `present` has all of its names."""
        for name in self._misfits.difference(present):
            self._misfits.discard(name)
            self._note_fit(self._scope, name)

    def forget(self, key: str) -> None:
        """Forget the value of a key: it is unknown."""
        self._keys.pop(key, None)


class NotSeen(BaseException):
    """A turn has asked for something that was not read yet: see `EntryView.missing`.

    Not an Exception: a function of the program may handle those, and must not go on without the value.
    """


Ranges = dict[tuple[Range, bool], "list[str] | int"]
"""What was read of ranges: the keys, or their number if only that was asked for (True)."""


class ValueView:
    """The view of turns that need nothing but values: keys that were read. Used again for each turn."""

    store_id = ""
    revision = -1
    """So that answers without a revision have 0; a real one is put in when Redis has given it."""
    now_ms = 0
    strict = False
    plain = True
    expiring = False
    ttl_rule: TtlRule | None = None

    def __init__(self, scope: str, limits: Limits) -> None:
        self.scope = scope
        self.limits = limits
        self.found: Mapping[str, bytes | None] = {}

    def get(self, key: str) -> bytes | None:
        return self.found[key]

    def entry(self, key: str) -> Entry | None:
        """Return what is stored under a key, without a revision."""
        data = self.found[key]
        return None if data is None else Entry(data, 0)

    def lapsed(self, key: str) -> Entry | None:
        """Nothing expires."""
        return None

    def values(self) -> list[bytes]:
        return [data for data in self.found.values() if data is not None]

    def items(self) -> list[tuple[str, bytes]]:
        return [(key, data) for key, data in self.found.items() if data is not None]

    def keys(self, within: Range) -> Iterable[str]:
        """Yield the keys within a range, in order."""
        return keys_within(self.found, within)

    def count(self, within: Range) -> int:
        """Count the keys within a range."""
        return len(keys_within(self.found, within))

    def due(self, limit: int) -> Sequence[str]:
        """Nothing expires."""
        return ()

    def kept(self, idempotency_key: str) -> Kept | None:
        """Nothing is kept."""
        return None


def keys_within(names: Iterable[str], within: Range) -> list[str]:
    """Return the names within a range, in its order, at most its limit."""
    return sorted(filter(within.holds, names), reverse=within.reverse)[: within.limit]


class EntryView:
    """The view of turns that need more than values: entries that were read, and the time of the server.

    What was not read is noted in `missing`, and the turn is stopped there.
    """

    plain = False
    revision = 0

    def __init__(
        self,
        scope: str,
        store_id: str,
        limits: Limits,
        rule: WriteRule,
        known: dict[str, Known],
        now_ms: int | None,
        recall: Callable[[str], Known | None] | None = None,
    ) -> None:
        """`known`: what was read. `now_ms`: None if the time of the server is not known. `recall`: what this engine has
        seen of other keys, which may be old."""
        self.scope = scope
        self.store_id = store_id
        self.limits = limits
        self.strict = rule.strict
        self.ttl_rule = rule.ttl
        self.known = known
        self.used: dict[str, Known] = {}
        """What the turn has looked at. Only this must be unchanged when the turn is stored."""
        self.ranges: Ranges = {}
        self.unchanged = ""
        """With `ranges`: what the script compares to see that the scope is as it was then; "" without."""
        self.replay: Any = None
        """What is kept for the idempotency key of the turn."""
        self.answers: Mapping[str, Kept | None] | None = None
        """Idempotency key -> the kept answer; None: it was not looked at."""
        self.missing: dict[Any, None] = {}
        """What the turn has asked for and was not read: keys, ranges, and None for the time."""
        self.recalled = False
        """True if it has looked at something that may be old."""
        self.asked_time = False
        self._now_ms = now_ms
        self._recall = recall

    def without_recall(self, now_ms: int | None = None) -> EntryView:
        """Return the view itself, for what must not be old. `now_ms`: the time of the server."""
        self._recall = None
        if now_ms is not None:
            self._now_ms = now_ms
        return self

    @property
    def now_ms(self) -> int:
        self.asked_time = True
        if self._now_ms is None:
            raise self._missed(None)
        return self._now_ms

    @property
    def expiring(self) -> bool:
        if self.ttl_rule is not None:
            return True
        # Not `any`: for a few keys its generator takes twice as long.
        return max([len(entry or b"") for _, _, entry in self.known.values()], default=0) > PLAIN_BYTES

    def is_lapsed(self, known: Known) -> bool:
        """Return whether the deadline of a value has passed."""
        entry = known[2] or b""
        return len(entry) > PLAIN_BYTES and int(entry[PLAIN_BYTES:]) <= self.now_ms

    def get(self, key: str) -> bytes | None:
        known = self._find(key)
        return None if self.is_lapsed(known) else known[1]

    def entry(self, key: str) -> Entry | None:
        known = self._find(key)
        return None if known[1] is None or self.is_lapsed(known) else _entry(known)

    def lapsed(self, key: str) -> Entry | None:
        known = self._find(key)
        return _entry(known) if known[1] is not None and self.is_lapsed(known) else None

    def values(self) -> list[bytes]:
        return [data for _, data in self.items()]

    def items(self) -> list[tuple[str, bytes]]:
        found = [(key, self.get(key)) for key in self.keys(Range())]
        return [(key, data) for key, data in found if data is not None]

    def keys(self, within: Range) -> Iterable[str]:
        found = self.ranges.get((within, False))
        if found is None:
            raise self._missed((within, False))
        assert not isinstance(found, int)
        return iter(found)

    def count(self, within: Range) -> int:
        found = self.ranges.get((within, True))
        if found is None:
            raise self._missed((within, True))
        assert isinstance(found, int)
        return found

    def due(self, limit: int) -> Sequence[str]:
        """Redis itself knows what is due: see `sweep` in the script."""
        return ()

    def kept(self, idempotency_key: str) -> Kept | None:
        return None if self.answers is None else self.answers.get(idempotency_key)

    def _find(self, key: str) -> Known:
        known = self.used.get(key)
        if known is not None:
            return known
        known = self.known.get(key)
        if known is None and self._recall is not None:
            known = self._recall(key)
            if known is not None and known[2] is not None:
                self.recalled = True
                self.known[key] = known
            else:
                known = None
        if known is None:
            raise self._missed(key)
        self.used[key] = known
        return known

    def _missed(self, what: Any) -> NotSeen:
        self.missing[what] = None
        return NotSeen(what)


def _entry(known: Known) -> Entry:
    _, data, entry = known
    assert data is not None
    assert entry is not None
    return Entry(data, revision_in(entry), deadline_in(entry))
