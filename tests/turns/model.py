"""What a scope does, written as plainly as possible: the reference that the turns are compared with.

It shares no code with the turns except the ops of an update. Values are Python values; a write is one method.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Any

from scopestate.ops import MISSING, UpdateOp, apply


class Refused(Exception):
    """The write was refused: (code, facts)."""


@dataclass
class Slot:
    value: Any
    revision: int
    expires: int | None


@dataclass
class Model:
    now: int = 1_000
    revision: int = 0
    slots: dict[str, Slot] = field(default_factory=dict)
    answers: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    rule: tuple[int, bool] | None = None
    """(ttl, counted from creation)"""
    strict: bool = False
    events: list[tuple[str, str, Any, Any, int]] = field(default_factory=list)

    # ------------------------------------------------------------------------------------------------ small parts

    def alive(self, key: str) -> Slot | None:
        slot = self.slots.get(key)
        if slot is None or (slot.expires is not None and slot.expires <= self.now):
            return None
        return slot

    def revision_of(self, key: str) -> int:
        slot = self.alive(key)
        return slot.revision if slot else 0

    def value_of(self, key: str) -> Any:
        slot = self.alive(key)
        return copy.deepcopy(slot.value) if slot else None

    def expect(self, key: str, if_revision: int | None) -> None:
        if if_revision is not None and self.revision_of(key) != if_revision:
            raise Refused("CONFLICT", [(key, if_revision, self.revision_of(key))])

    def expire(self, key: str) -> None:
        """Remove what is over."""
        slot = self.slots.get(key)
        if slot is not None and self.alive(key) is None:
            self.revision += 1
            self.events.append(("expired", key, slot.value, None, self.revision))
            del self.slots[key]

    def write(self, key: str, value: Any, expires: int | None) -> None:
        self.expire(key)
        old = self.slots.get(key)
        self.revision += 1
        self.events.append(("updated" if old else "created", key, old.value if old else None, value, self.revision))
        self.slots[key] = Slot(value, self.revision, expires)

    def remove(self, key: str) -> None:
        self.expire(key)
        old = self.slots.pop(key, None)
        self.revision += 1
        self.events.append(("deleted", key, old.value if old else None, None, self.revision))

    def deadline(self, key: str, asked: tuple[str, Any], *, update: bool) -> int | None:
        word, number = asked
        slot = self.alive(key)
        if word == "ttl":
            return self.now + int(number)
        if word == "at":
            return int(number)
        if word == "keep" and slot is not None:
            return slot.expires
        if self.rule is not None:
            ttl, from_creation = self.rule
            return slot.expires if from_creation and slot is not None else self.now + ttl
        return slot.expires if update and slot is not None else None

    def computed(self, key: str, ops: list[UpdateOp]) -> tuple[Any, list[str]]:
        slot = self.alive(key)
        value, errors = apply(copy.deepcopy(slot.value) if slot else MISSING, ops)
        return value, [error.code for error in errors]

    # ------------------------------------------------------------------------------------------------------ writes

    def set(self, key: str, value: Any, asked: tuple[str, Any] = ("", None), if_revision: int | None = None) -> Any:
        self.expect(key, if_revision)
        old = self.value_of(key)
        self.write(key, value, self.deadline(key, asked, update=False))
        return old, value, self.revision

    def update(
        self,
        key: str,
        ops: list[UpdateOp],
        asked: tuple[str, Any] = ("", None),
        if_revision: int | None = None,
        atomic: bool = False,
    ) -> Any:
        self.expect(key, if_revision)
        old = self.value_of(key)
        value, codes = self.computed(key, ops)
        if codes and (atomic or self.strict):
            raise Refused("UPDATE_REFUSED", [(0, code) for code in codes])
        self.write(key, value, self.deadline(key, asked, update=True))
        return old, value, codes, self.revision

    def delete(self, key: str, if_revision: int | None = None) -> Any:
        self.expect(key, if_revision)
        old = self.value_of(key)
        self.remove(key)
        return old, self.revision

    def compare_and_set(self, key: str, expected: Any, value: Any) -> Any:
        if not same(self.value_of(key), expected):
            return False, self.value_of(key)
        self.write(key, value, self.deadline(key, ("", None), update=False))
        return True, None

    def touch(self, key: str, asked: tuple[str, Any]) -> bool:
        slot = self.alive(key)
        if slot is None:
            return False
        word, number = asked
        slot.expires = self.now + int(number) if word == "ttl" else int(number) if word == "at" else None
        return True

    def transaction(self, checks: list[tuple[str, int]], steps: list[tuple[Any, ...]]) -> Any:
        conflicts = [(key, wanted, self.revision_of(key)) for key, wanted in checks if self.revision_of(key) != wanted]
        if conflicts:
            raise Refused("CONFLICT", conflicts)
        # Done on a copy, one step after the other; then each key that has changed is written once.
        trial = copy.deepcopy(self)
        order: list[str] = []
        touched: list[str] = []
        results: list[Any] = []
        problems: list[tuple[int, str]] = []
        for index, (word, key, *rest) in enumerate(steps):
            if word == "set":
                results.append(trial.set(key, *rest)[:2])
            elif word == "update":
                value, codes = trial.computed(key, rest[0])
                problems += [(index, code) for code in codes]
                if codes:
                    continue
                results.append((trial.value_of(key), value))
                trial.write(key, value, trial.deadline(key, ("", None), update=True))
            elif word == "delete":
                results.append(trial.value_of(key))
                if trial.alive(key) is None:
                    continue
                trial.slots.pop(key)
            else:
                results.append(trial.touch(key, rest[0]))
                touched.append(key)
                continue
            if key not in order:
                order.append(key)
        if problems:
            raise Refused("UPDATE_REFUSED", problems)
        for key in order:
            if key in trial.slots:
                self.expire(key)
        for key in order:
            slot = trial.slots.get(key)
            if slot is not None:
                self.write(key, slot.value, slot.expires)
            elif self.alive(key) is not None:
                self.remove(key)
        for key in touched:
            if key not in order and self.alive(key) is not None:
                self.slots[key].expires = trial.slots[key].expires
        return results, self.revision

    def once(self, idempotency_key: str, content: Any, write: Any) -> tuple[Any, bool]:
        """Return the answer, and whether it is a repetition's."""
        if idempotency_key in self.answers:
            done, answer = self.answers[idempotency_key]
            if done != content:
                raise Refused("IDEMPOTENCY_MISMATCH", [])
            return answer, True
        answer = write()
        self.answers[idempotency_key] = (content, answer)
        return answer, False

    def expire_some(self, limit: int) -> int:
        over = sorted((slot.expires or 0, key) for key, slot in self.slots.items() if self.alive(key) is None)
        for _, key in over[:limit]:
            self.expire(key)
        return len(over[:limit])

    # ------------------------------------------------------------------------------------------------------- reads

    def listed(
        self,
        prefix: str | None,
        start: str | None,
        after: str | None,
        end: str | None,
        reverse: bool,
        limit: int | None,
    ) -> list[str]:
        found = []
        for key in self.slots:
            raw = key.encode()
            if (
                self.alive(key) is not None
                and (prefix is None or raw.startswith(prefix.encode()))
                and (start is None or raw >= start.encode())
                and (after is None or raw > after.encode())
                and (end is None or raw < end.encode())
            ):
                found.append(key)
        found.sort(key=str.encode, reverse=reverse)
        return found if limit is None else found[:limit]

    def delete_listed(self, keys: list[str]) -> int:
        for key in keys:
            self.remove(key)
        return len(keys)


def same(one: Any, other: Any) -> bool:
    """Return whether two values are the same JSON text, but for the order of fields."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
