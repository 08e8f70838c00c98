"""The scripts of `persistence/redis/numbered.py` in Python, on the keys of a played server."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

from scopestate.persistence.redis import numbered, script
from scopestate.persistence.redis.sidecar import PLAIN_BYTES

_LAST: Final = b"\xff"
_INDEX: Final = b"\xfe"

Hash = dict[bytes, bytes]


class SortedSet(dict[bytes, float]):
    """Members with their scores."""

    def by_score(self) -> list[bytes]:
        return sorted(self, key=lambda member: (self[member], member))


def digest_of(value: bytes) -> bytes:
    return hashlib.sha1(value, usedforsecurity=False).hexdigest()[:16].encode()


class Failed(Exception):
    """The script returns an error reply. What it has done so far stays."""


class Numbered:
    """One call of a script, with what all scripts share."""

    def __init__(
        self,
        keys: list[bytes],
        arguments: list[bytes],
        find: Callable[[bytes, type[Any]], Any],
        stored: dict[bytes, Any],
        now_ms: int,
        call: Callable[..., Any],
        may_write: Callable[[], None],
        wrote: Callable[[bytes, bytes, bytes | None, bytes | None], object],
    ) -> None:
        """`find(key, type)` is the value at a key, None without one; it refuses another type."""
        self.keys, self.arguments = keys, arguments
        self.find, self.stored, self.now_ms = find, stored, now_ms
        self.call, self.may_write, self.wrote = call, may_write, wrote
        self.number: int | None = None
        self.first = b""

    # ------------------------------------------------------------------------------------------------- data

    def hash(self, at: int = 0) -> Hash:
        return self.find(self.keys[at], dict) or {}

    def sorted(self, at: int) -> SortedSet:
        return self.find(self.keys[at], SortedSet) or SortedSet()

    def put(self, at: int, **_: Any) -> Hash:
        self.may_write()
        value: Hash = self.find(self.keys[at], dict)
        if value is None:
            value = self.stored[self.keys[at]] = {}
        return value

    def add(self, at: int, field: bytes, score: float) -> None:
        self.may_write()
        value = self.find(self.keys[at], SortedSet)
        if value is None:
            value = self.stored[self.keys[at]] = SortedSet()
        value[field] = score

    def drop(self, at: int, field: bytes) -> None:
        """Of a hash or a sorted set; the key goes with the last field."""
        self.may_write()
        value = self.stored.get(self.keys[at])
        if isinstance(value, dict):
            value.pop(field, None)
            if not value:
                del self.stored[self.keys[at]]

    def entry(self, field: bytes) -> bytes:
        return self.hash(1).get(field, b"")

    def has_lapsed(self, entry: bytes, value: bytes | None) -> bool:
        return (
            value is not None
            and len(entry) > PLAIN_BYTES
            and int(entry[PLAIN_BYTES:]) <= self.now_ms
            and entry[16:32] == digest_of(value)
        )

    # ---------------------------------------------------------------------------------------------- writing

    def take(self) -> bytes:
        if self.number is None:
            there = self.hash(1).get(_LAST)
            self.first = self.arguments[0]
            if there is not None and self.first <= there:
                self.first = b"%016d" % (int(there) + 1)
            self.number = int(self.first)
        else:
            self.number += 1
        return b"%016d" % self.number

    def adopted(self, field: bytes, value: bytes, entry: bytes) -> bytes:
        if entry[16:32] == digest_of(value):
            return entry
        if len(entry) > PLAIN_BYTES:
            self.drop(2, field)
        text = self.take()
        entry = text + digest_of(value)
        self.put(1).update({_LAST: text, field: entry})
        return entry

    def lapsed_fields(self) -> list[bytes]:
        due = self.sorted(2)
        return [
            field
            for field in due.by_score()
            if due[field] <= self.now_ms and self.has_lapsed(self.entry(field), self.hash().get(field))
        ]


class SetOne(Numbered):
    def run(self) -> Any:
        field, value, number, digest = self.arguments[:4]
        condition = self.arguments[4:]
        old, side = self.hash().get(field), self.hash(1)
        if _INDEX in side or len(side.get(field, b"")) > PLAIN_BYTES:
            return [numbered.SLOW, b""]
        kind = condition[:1]
        if (kind == [b"n"] and old is not None) or (kind in ([b"c"], [b"r"]) and old != condition[1]):
            return [0, b""]
        if kind == [b"r"] and side.get(field, b"")[:16] != condition[2]:
            return [0, b""]
        there = side.get(_LAST)
        if there is not None and number <= there:
            number = b"%016d" % (int(there) + 1)
        self.put(0)[field] = value
        self.put(1).update({_LAST: number, field: number + (digest or digest_of(value))})
        self.wrote(self.keys[0], field, old, value)
        return [script.DONE if condition else old, number]


class Commit(Numbered):
    def run(self) -> Any:
        number, expected, written = self.arguments[0], int(self.arguments[1]), int(self.arguments[2])
        fields, rest = self.arguments[3 : 3 + expected], self.arguments[3 + expected :]
        found, side = self.hash(), self.hash(1)
        if _INDEX in side:
            return [numbered.SLOW, b""]
        for field, value, known in zip(fields, rest[0 : 2 * expected : 2], rest[1 : 2 * expected : 2], strict=True):
            entry = side.get(field)
            if not known:
                if field in found:
                    return [0, b""]
            elif found.get(field) != value or entry is None or entry[:16] != known:
                return [0, b""]
            elif len(entry) > PLAIN_BYTES:
                return [numbered.SLOW, b""]
        if not written:
            return [script.DONE, b""]
        there = side.get(_LAST)
        if there is not None and number <= there:
            number = b"%016d" % (int(there) + 1)
        steps = [iter(rest[2 * expected :])] * 3
        writes = [(field, self.hash().get(field), value, digest) for field, value, digest in zip(*steps, strict=True)]
        for place, (field, old, value, digest) in enumerate(writes):
            text = b"%016d" % (int(number) + place) if place else number
            self.put(0)[field] = value
            self.put(1).update({_LAST: text, field: text + (digest or digest_of(value))})
            self.wrote(self.keys[0], field, old, value)
        return [script.DONE, number]


class GetOne(Numbered):
    def run(self) -> Any:
        (field,) = self.arguments
        old = self.hash().get(field)
        return None if self.has_lapsed(self.entry(field), old) else old


class Whole(Numbered):
    def run(self) -> Any:
        return [self.now_ms, self.lapsed_fields(), [part for pair in self.hash().items() for part in pair]]


class Writes(Numbered):
    """The script `WRITES`, entry by entry."""

    def run(self) -> Any:
        self.publishes = self.arguments[1] != b""
        self.kept_at = 7 if self.publishes else 4
        self.last = 0
        self.depth: bytes | None = None
        self.trace = b""
        self.following = 0
        self.failed: set[bytes] = set()
        replies: list[Any] = []
        i = 3
        sizes = {b"s": 4, b"n": 4, b"c": 5}
        while i < len(self.arguments):
            kind, field = self.arguments[i : i + 2]
            if kind == b"p":
                depth, _, self.trace = field.partition(b" ")
                self.depth = depth if depth != b"0" else None
                i += 2
                continue
            if kind == b"t":
                replies.append(self._transact(i + 1))
                i += 8 + 4 * int(field) + 5 * int(self.arguments[i + 2])
                continue
            if kind == b"e":
                replies.append(self._sweep(int(field)))
            elif kind == b"o":
                replies.append(self.find(self._kept(field), bytes))
            elif field in self.failed:
                replies.append(script.SKIPPED)
            else:
                replies.append(self._one(kind, field, self.arguments[i + 2 : i + sizes.get(kind, 2)]))
            i += sizes.get(kind, 2)
        return [*replies, *([self.last] if self.publishes else []), self.first]

    def _kept(self, index: bytes) -> bytes:
        return self.keys[self.kept_at + int(index) - 1]

    def _one(self, kind: bytes, field: bytes, rest: list[bytes]) -> Any:
        old, entry = self.hash().get(field), self.entry(field)
        if kind == b"l":
            if old is not None:
                entry = self.adopted(field, old, entry)
            return [old, entry, self.now_ms]
        lapsed = self.has_lapsed(entry, old)
        if kind == b"g":
            return None if lapsed else old
        if (kind == b"n" and old is not None and not lapsed) or (kind == b"c" and (old != rest[0] or lapsed)):
            self.failed.add(field)
            return 0
        reply: Any = script.DONE if kind in b"nc" else old
        deadline = entry[PLAIN_BYTES:] if kind == b"c" else b""
        if lapsed:
            at = entry[PLAIN_BYTES:]
            self._store(field, old, entry, expired=at)
            reply, old, entry = [old, at], None, b""
        if kind == b"d":
            self._store(field, old, entry)
        else:
            self._store(field, old, entry, *rest[-2:], deadline)
        return reply

    def _store(
        self,
        field: bytes,
        old: bytes | None,
        entry: bytes,
        new: bytes | None = None,
        digest: bytes = b"",
        deadline: bytes = b"",
        expired: bytes | None = None,
    ) -> None:
        text = self.take()
        if self.publishes:
            self._publish(field, old, new, text, expired)
        has_deadline = len(entry) > PLAIN_BYTES
        if new is not None:
            self.put(0)[field] = new
            self.put(1).update({_LAST: text, field: text + (digest or digest_of(new)) + deadline})
            if old is None and _INDEX in self.hash(1):
                self.add(3, field, 0)
            if deadline:
                self.add(2, field, int(deadline))
            elif has_deadline:
                self.drop(2, field)
        else:
            if old is not None:
                self.drop(0, field)
            self.put(1)[_LAST] = text
            if entry:
                self.drop(1, field)
            if has_deadline:
                self.drop(2, field)
            if not self.hash():
                self.put(1).pop(_INDEX, None)
                self.stored.pop(self.keys[3], None)
            elif old is not None and _INDEX in self.hash(1):
                self.drop(3, field)
        self.wrote(self.keys[0], field, old, new)

    def _publish(self, field: bytes, old: bytes | None, new: bytes | None, text: bytes, expired: bytes | None) -> None:
        self.last = number = self.call(b"INCR", self.keys[5])
        event = [b"n", str(number).encode(), b"s", self.arguments[2], b"k", field]
        event += [b"o", old] if old is not None else []
        event += [b"v", new] if new is not None else []
        event += [b"d", self.depth] if self.depth is not None else []
        event += [b"t", self.trace] if self.trace else []
        event += [b"r", text]
        event += [b"x", expired] if expired is not None else []
        event += [b"m", b"%d" % self.following] if self.following else []
        try:
            self.call(b"XADD", self.keys[4], b"MAXLEN", b"~", self.arguments[1], b"*", *event)
        except Exception:
            self.call(b"DECR", self.keys[5])
            raise

    def _transact(self, at: int) -> Any:
        arguments = self.arguments
        expected, stored = int(arguments[at]), int(arguments[at + 1])
        index, fingerprint, answer, unchanged, assumed = arguments[at + 2 : at + 7]
        at += 7
        self.sorted(2)
        fits = not (assumed and abs(self.now_ms - int(assumed)) > 1000)
        if unchanged and unchanged != self.hash(1).get(_LAST, b"") + b":%d" % len(self.hash()):
            fits = False
        fields: list[bytes] = []
        for field, state, value, entry in zip(*[iter(arguments[at : at + 4 * expected])] * 4, strict=True):
            fields.append(field)
            old = self.hash().get(field)
            if state == b"0":
                fits = fits and old is None
            else:
                there = self.entry(field)
                same = old == value and there == entry and self.has_lapsed(there, old) == (state == b"2")
                fits = fits and same
        skipped = not self.failed.isdisjoint(fields)
        kept = self.find(self._kept(index), bytes) if index and not skipped else None
        if kept is not None or skipped or not fits:
            self.failed.update(fields)
            return [numbered.KEPT, kept] if kept is not None else script.SKIPPED if skipped else 0
        at += 4 * expected
        steps = list(zip(*[iter(arguments[at : at + 5 * stored])] * 5, strict=True))
        self.following = len([step for step in steps if step[0] != b"e"])
        for kind, field, value, digest, deadline in steps:
            self.following -= kind != b"e"
            old, entry = self.hash().get(field), self.entry(field)
            if kind == b"w":
                self._store(field, old, entry, value, digest, deadline)
            elif kind == b"r":
                self._store(field, old, entry)
            elif kind == b"x":
                self._store(field, old, entry, expired=entry[PLAIN_BYTES:])
            else:
                if entry or deadline:
                    self.put(1)[field] = entry[:PLAIN_BYTES] + deadline
                if deadline:
                    self.add(2, field, int(deadline))
                else:
                    self.drop(2, field)
        if index:
            self.may_write()
            self.stored[self._kept(index)] = fingerprint + b"%016d" % (self.number or 0) + answer
        return script.DONE

    def _sweep(self, limit: int) -> Any:
        due = self.sorted(2)
        gone: list[Any] = [self.now_ms, b"", b""]
        for field in [field for field in due.by_score() if due[field] <= self.now_ms][:limit]:
            old, entry = self.hash().get(field), self.entry(field)
            if self.has_lapsed(entry, old):
                deadline = entry[PLAIN_BYTES:]
                self._store(field, old, entry, expired=deadline)
                gone += [field, old, deadline]
            else:
                self.drop(2, field)
                if entry:
                    self.put(1)[field] = entry[:PLAIN_BYTES]
        left = self.sorted(2).by_score()
        if left:
            gone[1:3] = [left[0], b"%d" % self.sorted(2)[left[0]]]
        return gone


class PublishOne(Writes):
    """The script `PUBLISH_ONE`: what `WRITES` does with one entry, on keys that it can do."""

    def run(self) -> Any:
        kept, scope, field, value, number, digest, *condition = self.arguments
        side = self.hash(1)
        if _INDEX in side or len(side.get(field, b"")) > PLAIN_BYTES:
            return [numbered.SLOW, 0, b""]
        kind, *expected = condition or [b"s"]
        self.keys = [*self.keys[:2], b"unused", b"unused", *self.keys[2:]]
        self.arguments = [number, kept, scope, kind, field, *expected, value, digest]
        return super().run()


class Ranged(Numbered):
    """The script `RANGE`."""

    def run(self) -> Any:
        _, kind, low, high, backwards, limit = self.arguments
        size, state = len(self.hash()), self.hash(1).get(_INDEX)
        index = self.sorted(3)
        is_small = size <= 1000 and state != b"ready"
        if not is_small and (state != b"ready" or len(index) != size):
            return 0
        lapsed = self.lapsed_fields()
        names = list(self.hash()) if is_small else [name for name in sorted(index) if _holds(name, low, high)]
        if kind == b"c" and not is_small:
            return [self.now_ms, self._stamp(size), 0, len(names), lapsed]
        names = [name for name in (names[::-1] if backwards else names) if name not in lapsed]
        if not is_small and limit:
            names = names[: int(limit)]
        values: list[bytes] = []
        entries: list[bytes] = []
        for name in names if kind in b"ve" else []:
            if name not in self.hash():
                self.drop(1, _INDEX)
                return 0
            values.append(self.hash()[name])
            if kind == b"e":
                entries.append(self.adopted(name, values[-1], self.entry(name)))
        return [self.now_ms, self._stamp(size), int(is_small), names, values, entries]

    def _stamp(self, size: int) -> bytes:
        return self.hash(1).get(_LAST, b"") + b":%d" % size


class Build(Numbered):
    """The script `BUILD`, in one step."""

    def run(self) -> Any:
        self.stored.pop(self.keys[3], None)
        for field in self.hash():
            self.add(3, field, 0)
        self.put(1)[_INDEX] = b"ready"
        return b"0"


def _holds(name: bytes, low: bytes, high: bytes) -> bool:
    return (low == b"-" or (name > low[1:] if low[:1] == b"(" else name >= low[1:])) and (
        high == b"+" or name < high[1:]
    )


SCRIPTS: Final[dict[bytes, type[Any]]] = {
    numbered.SET_ONE: SetOne,
    numbered.PUBLISH_ONE: PublishOne,
    numbered.COMMIT: Commit,
    numbered.GET_ONE: GetOne,
    numbered.WHOLE: Whole,
    numbered.WRITES: Writes,
    numbered.RANGE: Ranged,
    numbered.BUILD: Build,
}
