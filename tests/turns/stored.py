"""A scope as plain dicts: the view from which turns decide in these tests, and where their decisions are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from scopestate.ops.turns import Change, Entry, Keep, Kept, NewDeadline, Range, TtlRule, Turn
from scopestate.ops.values import encode

A = TypeVar("A")

Event = tuple[str, str, bytes | None, bytes | None, int]
"""(kind, key, JSON before, JSON after, revision)"""


@dataclass
class Limits:
    max_value_bytes: int = 0
    max_batch_bytes: int = 8 << 20


class Stored:
    """One scope. It is its own view."""

    def __init__(self, scope: str = "s", *, now_ms: int = 1_000, strict: bool = False) -> None:
        self.scope = scope
        self.store_id = "store"
        self.limits = Limits()
        self.strict = strict
        self.revision = 0
        self.ttl_rule: TtlRule | None = None
        self.now_ms = now_ms
        self.entries: dict[str, Entry] = {}
        self.answers: dict[str, Kept] = {}
        self.looked_at: list[str] = []

    # ------------------------------------------------------------------------------------------------- the view

    @property
    def plain(self) -> bool:
        return not self.expiring and not self.strict

    @property
    def expiring(self) -> bool:
        return self.ttl_rule is not None or any(entry.expires_ms is not None for entry in self.entries.values())

    def get(self, key: str) -> bytes | None:
        entry = self.entry(key)
        return None if entry is None else entry.json

    def entry(self, key: str) -> Entry | None:
        self.looked_at.append(key)
        entry = self.entries.get(key)
        return None if entry is None or self._is_over(entry) else entry

    def lapsed(self, key: str) -> Entry | None:
        entry = self.entries.get(key)
        return entry if entry is not None and self._is_over(entry) else None

    def values(self) -> list[bytes]:
        return [data for _, data in self.items()]

    def items(self) -> list[tuple[str, bytes]]:
        return [(key, entry.json) for key, entry in self.entries.items() if not self._is_over(entry)]

    def keys(self, within: Range) -> Iterable[str]:
        there = [key for key, entry in self.entries.items() if within.holds(key) and not self._is_over(entry)]
        there.sort(key=str.encode, reverse=within.reverse)
        return iter(there[: within.limit])

    def count(self, within: Range) -> int:
        return len(list(self.keys(within)))

    def due(self, limit: int) -> Sequence[str]:
        over = [(entry.expires_ms or 0, key) for key, entry in self.entries.items() if self._is_over(entry)]
        return [key for _, key in sorted(over)][:limit]

    def kept(self, idempotency_key: str) -> Kept | None:
        return self.answers.get(idempotency_key)

    def _is_over(self, entry: Entry) -> bool:
        return entry.expires_ms is not None and entry.expires_ms <= self.now_ms

    # ------------------------------------------------------------------------------------------------- the keeping

    def run(self, turn: Turn[A]) -> A:
        """Decide, and store the decision."""
        answer, _ = self.run_seeing(turn)
        return answer

    def run_seeing(self, turn: Turn[A]) -> tuple[A, list[Event]]:
        """As `run`; also return the events."""
        self.looked_at.clear()
        stored, answer = turn.decide(self)
        keys = turn.keys
        assert keys is None or set(self.looked_at) <= set(keys), "a turn may look at its own keys only"
        assert turn.writes or not stored
        return answer, self.keep(stored)

    def keep(self, decided: Sequence[Change | NewDeadline | Keep]) -> list[Event]:
        events: list[Event] = []
        for change in decided:
            if isinstance(change, Keep):
                self.answers[change.idempotency_key] = change.kept
                continue
            if isinstance(change, NewDeadline):
                key = change.key
                assert key not in {event[1] for event in events}
                self.entries[key] = Entry(self.entries[key].json, self.entries[key].revision, change.expires_ms)
                continue
            key, before, after, expires_ms = change.key, change.before, change.after, change.expires_ms
            stored = self.entries.get(key)
            assert before == (None if stored is None else stored.json), "a change begins with what is stored"
            self.revision += 1
            if change.expired:
                assert stored is not None
                assert self._is_over(stored)
                assert after is None
                assert expires_ms == stored.expires_ms
                kind = "expired"
            else:
                assert stored is None or not self._is_over(stored), "what is over is removed first"
                kind = "deleted" if after is None else "created" if before is None else "updated"
            if after is None:
                self.entries.pop(key, None)
            else:
                self.entries[key] = Entry(after, self.revision, expires_ms)
            events.append((kind, key, before, after, self.revision))
        return events

    def put(self, **values: Any) -> None:
        """Store values, each by a change of its own."""
        for key, value in values.items():
            self.revision += 1
            self.entries[key] = Entry(encode(value), self.revision)
